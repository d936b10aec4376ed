"""Figures of an evaluation against numbers worked out by hand, and the temperature against one that is known."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from handlerlib import loading
from handlerlib.calibration import soften
from handlerlib.spec import TEMPERATURES
from support.artifacts import write_artifact
from training.calibrate import BINS, at_temperature, expected_error, fit_temperature, reliability
from training.evaluate import Evaluation, confused, figures
from training.optimize import judge


def answers(labels: str, true: str, rows: list[list[float]]) -> Evaluation:
    names = [f"sample{number}" for number in range(len(rows))]
    return figures(tuple(labels), names, list(true), np.log(np.array(rows)).astype(np.float32))


# -------------------------------------------------------------------------------------------------------- calibration


def test_expected_calibration_error_of_five_answers() -> None:
    """Bins of 1/15. Two answers of 0.95, one right: 2/5 x |0.5 - 0.95|. One of 0.65, right: 1/5 x |1 - 0.65|. 0.35 and
    0.36 share a bin, one right: 2/5 x |0.5 - 0.355|. In all 0.18 + 0.07 + 0.058."""
    bins = reliability([0.95, 0.95, 0.65, 0.35, 0.36], [True, False, True, True, False])
    assert len(bins) == BINS == 15
    assert expected_error(bins) == pytest.approx(0.308, abs=1e-12)
    assert [(number, one.count) for number, one in enumerate(bins) if one.count] == [(5, 2), (9, 1), (14, 2)]


def test_a_bin_holds_its_upper_edge_and_not_its_lower() -> None:
    bins = reliability([0.5, 0.50001, 1.0], [True, True, True], bins=2)
    assert [one.count for one in bins] == [1, 2]


def test_no_answers_have_no_error() -> None:
    assert expected_error(reliability([], [])) == 0.0


def drawn(seed: int, count: int = 6000, classes: int = 5) -> tuple[NDArray[np.float32], list[int]]:
    """Logits, and labels that are drawn from their softmax: calibrated by construction."""
    generator = torch.Generator().manual_seed(seed)
    logits = 2 * torch.randn(count, classes, generator=generator)
    return logits.numpy(), torch.multinomial(logits.softmax(dim=1), 1, generator=generator)[:, 0].tolist()


@pytest.mark.parametrize("scale", [0.5, 1.0, 2.5])
def test_the_temperature_of_scaled_logits_is_their_scale(scale: float) -> None:
    logits, true = drawn(3)
    found = fit_temperature(scale * logits, true)
    assert found == pytest.approx(scale, rel=0.05)


def test_the_temperature_lowers_the_error_of_other_answers() -> None:
    found = fit_temperature(2.5 * drawn(3)[0], drawn(3)[1])
    assert found is not None
    logits, true = drawn(4)
    labels, names = tuple("abcde"), [str(number) for number in range(len(true))]
    said = [labels[number] for number in true]
    log_NK = at_temperature((2.5 * logits).astype(np.float32), 1.0)
    raw_NK = torch.from_numpy(log_NK).log_softmax(dim=1).numpy()
    before, after = figures(labels, names, said, raw_NK), figures(labels, names, said, at_temperature(raw_NK, found))
    assert before.metrics["test_ece"] > 0.1
    assert after.metrics["test_ece"] < 0.03
    assert after.metrics["test_loss"] < before.metrics["test_loss"]
    assert after.metrics["test_accuracy"] == before.metrics["test_accuracy"]


def test_too_few_samples_give_no_temperature() -> None:
    logits, true = drawn(5)
    assert fit_temperature(logits[:99], true[:99]) is None
    assert fit_temperature(logits[:100], true[:100]) is not None


def test_right_answers_alone_make_nobody_certain() -> None:
    """198 right ones of 198 with logits 2 and 0: 199 in 200, so that 2 / T is log 199."""
    logits = np.tile(np.array([[2.0, 0.0]], dtype=np.float32), (198, 1))
    assert fit_temperature(logits, [0] * 198) == pytest.approx(2 / math.log(199), abs=1e-4)


def test_the_temperature_stays_within_what_a_spec_may_hold() -> None:
    logits, _ = drawn(6)
    nothing_to_do_with_it = np.random.default_rng(6).integers(0, 5, len(logits)).tolist()
    assert fit_temperature(20 * logits, nothing_to_do_with_it) == TEMPERATURES[1]


def test_an_engine_is_judged_at_the_models_temperature(tmp_path: Path) -> None:
    """Engines give probabilities at temperature 1, golden samples hold those at the spec's."""
    folder = write_artifact(tmp_path)
    model = loading.load(folder, torch.device("cpu"))
    softened = tuple(
        dataclasses.replace(one, probabilities=tuple(soften(torch.tensor([one.probabilities]), 2.5)[0].tolist()))
        for one in model.spec.golden.samples
    )
    golden = dataclasses.replace(model.spec.golden, samples=softened)
    warm = dataclasses.replace(model.spec, temperature=2.5, golden=golden)
    assert judge.golden(model.engine, warm, folder, 1).difference < 1e-5
    forgotten = dataclasses.replace(warm, temperature=1.0)
    assert judge.golden(model.engine, forgotten, folder, 1).difference > 1e-3


# --------------------------------------------------------------------------------------------------- areas and losses


def test_areas_of_four_answers() -> None:
    """Scores 0.1, 0.4, 0.35, 0.8 of b, true a, a, b, b: 3 of 4 pairs are in order; precision is 1 at recall 1/2 and 2/3 at
    recall 1, so that average precision is 1/2 x 1 + 1/2 x 2/3."""
    found = answers("ab", "aabb", [[0.9, 0.1], [0.6, 0.4], [0.65, 0.35], [0.2, 0.8]])
    assert [row.roc_auc for row in found.per_class] == [0.75, 0.75]
    assert [row.average_precision for row in found.per_class] == pytest.approx([5 / 6, 5 / 6])
    assert found.metrics["test_roc_auc"] == 0.75
    assert found.metrics["test_average_precision"] == pytest.approx(5 / 6)
    assert found.metrics["test_loss"] == pytest.approx(-math.log(0.9 * 0.6 * 0.35 * 0.8) / 4, rel=1e-6)


def test_a_class_without_samples_has_no_area_and_counts_in_no_mean() -> None:
    found = answers("abc", "aabb", [[0.8, 0.1, 0.1], [0.5, 0.4, 0.1], [0.5, 0.4, 0.1], [0.1, 0.8, 0.1]])
    assert found.per_class[2].roc_auc is found.per_class[2].average_precision is None
    assert found.metrics["test_roc_auc"] == np.mean([row.roc_auc for row in found.per_class[:2]])


def test_a_class_that_neither_occurs_nor_is_answered_counts_in_no_macro_figure() -> None:
    metrics = answers("abc", "ab", [[0.8, 0.1, 0.1], [0.2, 0.7, 0.1]]).metrics
    assert [metrics[f"test_macro_{name}"] for name in ("precision", "recall", "f1")] == [1.0, 1.0, 1.0]
    metrics = answers("abc", "ab", [[0.8, 0.1, 0.1], [0.2, 0.1, 0.7]]).metrics
    assert metrics["test_macro_f1"] == pytest.approx(1 / 3)


def test_samples_of_one_class_only_have_no_areas() -> None:
    assert not {"test_roc_auc", "test_average_precision"} & set(answers("ab", "aa", [[0.9, 0.1], [0.3, 0.7]]).metrics)


def test_confused_pairs_by_frequency_with_the_surest_mistakes_first() -> None:
    rows = [[0.2, 0.7, 0.1], [0.1, 0.8, 0.1], [0.3, 0.6, 0.1], [0.1, 0.2, 0.7], [0.9, 0.05, 0.05], [0.9, 0.05, 0.05]]
    pairs = confused(answers("abc", "aaabac", rows), pairs=2, examples=2)
    assert [(pair.label, pair.predicted, pair.count) for pair in pairs] == [("a", "b", 3), ("b", "c", 1)]
    assert [one.name for one in pairs[0].worst] == ["sample1", "sample0"]
