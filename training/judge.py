"""What answers of a served model are worth; operations get it handed in and import none of it."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from handlerlib.engine_spec import EngineSpec
from handlerlib.spec import ModelSpec
from training import evaluate, labelled, pipeline, scoring
from training.data import Sample
from training.evaluate import Evaluation, figures
from training.progress import Report
from training.scoring import Comparison, Questions


@dataclass(frozen=True, slots=True)
class Judge:
    """Samples to ask, the figures of the answers, and the artifact's own answers beside them."""

    report: Report
    root: str | Path | None = None
    """Where the data of an artifact's test split lies, if not where it was in training."""

    def labelled(self, data: Path, artifact: Path | None) -> Questions:
        """Samples of a folder or .csv. Raises DataError."""
        return labelled.labelled(data, artifact)

    def test_split(self, artifact: Path) -> Questions:
        """The artifact's own samples. Raises TargetError and DataError."""
        return pipeline.questions(artifact, report=self.report, root=self.root)

    def check_labels(self, asked: Questions, labels: Sequence[str], model: str) -> None:
        """Raises DataError when a sample's label is none of these."""
        scoring.check_labels(asked, labels, model)

    def figures(
        self,
        labels: Sequence[str],
        names: Sequence[str],
        true: Sequence[str],
        answers: Sequence[Mapping[int, float]],
        artifact: Path | None,
    ) -> tuple[Evaluation, bool]:
        """What answers by class number are worth, and whether every one of them names every class."""
        spec = None if artifact is None else ModelSpec.load(artifact)
        if spec is not None and spec.task != "multi-class":
            outputs_NK, complete = scoring.output_rows(answers, len(labels))
            return evaluate.answers(spec, names, true, outputs_NK), complete
        log_NK, complete = scoring.log_rows(answers, len(labels))
        return figures(tuple(labels), tuple(names), tuple(true), log_NK), complete

    def reference(self, artifact: Path, asked: Questions, names: Collection[str]) -> Evaluation:
        """The artifact's own answers to the samples of these names."""
        wanted = frozenset(names)
        again = dataclasses.replace(asked, total=len(wanted), read=lambda: _only(asked.read(), wanted), leave_out=False)
        return pipeline.evaluate_on(artifact, again, report=self.report)

    def compare(self, reference: Evaluation, served: Evaluation, artifact: Path, *, complete: bool) -> Comparison:
        """How far the answers to the same samples differ, and whether that is more than the artifact allows."""
        spec, engine = ModelSpec.load(artifact), EngineSpec.load(artifact)
        return scoring.compare(reference, served, spec, engine, complete=complete)


def _only(samples: Iterable[Sample], names: frozenset[str]) -> Iterator[Sample]:
    return (sample for sample in samples if sample.name in names)
