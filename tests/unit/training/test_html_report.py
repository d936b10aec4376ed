"""A calibrated run of real digits: its temperature, its figures, and its report, read as strictly as can be."""

from __future__ import annotations

import base64
import dataclasses
import io
import json
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest
import torch
from PIL import Image

from handlerlib import imaging, loading
from handlerlib.calibration import soften
from handlerlib.spec import ModelSpec
from training import html_report, pipeline
from training.config import load_recipe
from training.data import Sample
from training.evaluate import Evaluation
from training.pipeline import Trained
from training.progress import silent

VOID = {"meta", "img", "br", "link", "input", "hr"}


class Page(HTMLParser):
    """Every element closed in order; what is loaded, said and shown."""

    def __init__(self, text: str) -> None:
        super().__init__(convert_charrefs=True)
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str]]] = []
        self.texts: list[str] = []
        self.feed(text)
        self.close()
        assert not self.open, f"never closed: {self.open}"

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        assert len({name for name, _ in attrs}) == len(attrs), f"an attribute twice: {tag} {attrs}"
        self.tags.append((tag, {name: value or "" for name, value in attrs}))
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open and self.open[-1] == tag, f"</{tag}> closes {self.open[-3:]}"
        self.open.pop()

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] != "style":
            self.texts.append(data)

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.texts).split())

    def all(self, tag: str) -> list[dict[str, str]]:
        return [attributes for name, attributes in self.tags if name == tag]


def check(page: Page) -> list[Image.Image]:
    """What holds for every report; its pictures come back decoded."""
    assert not {"script", "link", "iframe", "object", "form"} & {tag for tag, _ in page.tags}
    assert not [attributes for _, attributes in page.tags if any(name.startswith("on") for name in attributes)]
    identities = [attributes["id"] for _, attributes in page.tags if "id" in attributes]
    assert len(set(identities)) == len(identities)
    links = [attributes["href"] for _, attributes in page.tags if "href" in attributes]
    assert links and all(link.startswith("#") and link[1:] in identities for link in links)
    labelled = [attributes["aria-labelledby"] for attributes in page.all("section")]
    assert labelled and set(labelled) <= set(identities)
    assert all(attributes["scope"] in ("row", "col") for attributes in page.all("th"))
    assert len(page.all("caption")) == len(page.all("table"))
    assert page.all("html") == [{"lang": "en"}] and len(page.all("h1")) == len(page.all("title")) == 1
    pictures = []
    for attributes in page.all("img"):
        assert attributes["alt"].strip()
        kind, data = re.fullmatch(r"data:image/(png|jpeg);base64,([A-Za-z0-9+/=]+)", attributes["src"]).groups()  # type: ignore[union-attr]
        image = Image.open(io.BytesIO(base64.b64decode(data, validate=True)))
        image.load()
        assert image.format == kind.upper()
        pictures.append(image)
    return pictures


@dataclasses.dataclass(frozen=True, slots=True)
class Run:
    trained: Trained
    root: Path
    judged: Evaluation


@pytest.fixture(scope="module")
def digits(tmp_path_factory: pytest.TempPathFactory, digit_images: dict[str, list[bytes]]) -> Run:
    """Five classes, half of them for validation, and so little training that it makes mistakes."""
    folder = tmp_path_factory.mktemp("calibrated")
    for label in "34589":
        (folder / "photos" / label).mkdir(parents=True)
        for number, image in enumerate(digit_images[label][:100]):
            (folder / "photos" / label / f"{number}.png").write_bytes(image)
    settings = (
        "name=five", f"data.root={folder / 'photos'}", "data.validation=0.3", "data.test=0.3", "augment.flip=false",
        "model.architecture=tiny_cnn", "train.epochs=2", "train.batch_size=16", "train.threads=1", "train.device=cpu",
    )  # fmt: skip
    recipe = load_recipe("folder", settings)
    trained = pipeline.train(recipe, runs=folder / "runs", artifacts=folder / "artifacts", report=silent)
    return Run(trained, folder / "photos", pipeline.evaluate(trained.artifact))


# ---------------------------------------------------------------------------------------------------- the temperature


def test_the_temperature_is_in_spec_and_metrics_with_the_error_before_and_after(digits: Run) -> None:
    temperature = ModelSpec.load(digits.trained.artifact).temperature
    metrics = json.loads((digits.trained.run / "metrics.json").read_text())
    assert temperature != 1.0
    assert metrics["temperature"] == temperature
    assert 0 <= metrics["test_ece"] <= 1 and 0 <= metrics["test_ece_uncalibrated"] <= 1
    assert metrics["test_loss"] != metrics["test_loss_uncalibrated"]
    again = {key: value for key, value in digits.trained.metrics.items() if key.startswith("test_")}
    assert digits.judged.metrics == again
    assert digits.trained.metrics["validation_accuracy"] < 1


def test_golden_answers_evaluation_and_worker_agree(digits: Run) -> None:
    model = loading.load(digits.trained.artifact, torch.device("cpu"))
    spec = model.spec

    def answer(data: bytes) -> torch.Tensor:
        return model.probabilities(imaging.batch([data], spec.preprocess, spec.limits), 1)[0]

    assert loading.self_test(model, answer, digits.trained.artifact) < 1e-6
    samples = list(pipeline.test_samples(digits.trained.artifact))
    served = torch.stack([answer(sample.data) for sample in samples])
    assert [sample.name for sample in samples] == [one.name for one in digits.judged.predictions]
    torch.testing.assert_close(served, torch.from_numpy(digits.judged.log_NK).exp(), atol=1e-5, rtol=0)
    plain = soften(served, 1 / spec.temperature)
    assert not torch.allclose(served, plain, atol=1e-4)


def test_a_recipe_can_leave_calibration_out(digits: Run, tmp_path: Path) -> None:
    settings = json.loads((digits.trained.run / "recipe.json").read_text())
    from training.config import parse

    recipe = parse(settings | {"evaluate": {"calibrate": False}}, where="test")
    trained = pipeline.train(recipe, runs=tmp_path / "runs", artifacts=tmp_path / "artifacts", report=silent)
    assert "temperature" not in json.loads((trained.artifact / "model_spec.json").read_text())
    assert trained.metrics["temperature"] == 1.0
    assert "test_ece_uncalibrated" not in trained.metrics
    ours = digits.trained.metrics
    assert trained.metrics["test_ece"] == pytest.approx(ours["test_ece_uncalibrated"])
    assert trained.metrics["test_accuracy"] == ours["test_accuracy"]


# --------------------------------------------------------------------------------------------------------- the report


def test_the_report_of_a_run_holds_everything(digits: Run) -> None:
    path = digits.trained.artifact / "report.html"
    page = Page(path.read_text(encoding="utf-8"))
    pictures = check(page)
    assert path.read_bytes() == (digits.trained.run / "report.html").read_bytes()
    wrong = sum(one.label != one.predicted for one in digits.judged.predictions)
    assert wrong > 0
    assert 4 < len(pictures) <= 4 + wrong
    provenance = json.loads((digits.trained.artifact / "provenance.json").read_text())
    expected = [
        f"{digits.judged.metrics['test_accuracy']:.2%}",
        f"{digits.judged.metrics['test_ece']:.2%}",
        f"{digits.judged.metrics['test_ece_uncalibrated']:.2%}",
        f"{digits.judged.metrics['test_roc_auc']:.4f}",
        provenance["data_digest"],
        provenance["run"],
        provenance["versions"]["torch"],
        "train.batch_size = 16",
        "Guo, Pleiss, Sun, Weinberger",
    ]
    assert [text for text in expected if text not in page.text] == []


def test_pictures_of_mistakes_say_what_they_show(digits: Run) -> None:
    page = Page((digits.trained.run / "report.html").read_text(encoding="utf-8"))
    said = [attributes["alt"] for attributes in page.all("img") if "taken for" in attributes["alt"]]
    shown = [alt for alt in said if alt.endswith("sure")]
    mistakes = {
        f"{one.name}: {one.label}, taken for {one.predicted}, {one.probability:.1%} sure"
        for one in digits.judged.predictions
        if one.label != one.predicted
    }
    assert shown and set(shown) <= mistakes


def test_a_page_again_is_the_same_bytes(digits: Run) -> None:
    asked = pipeline.questions(digits.trained.run)
    subject = pipeline.subject(digits.trained.run, asked)
    one, other = (html_report.render(subject, digits.judged, asked.read()) for _ in range(2))
    assert one == other


def test_names_from_outside_cannot_become_markup() -> None:
    import numpy as np

    from training.evaluate import figures

    labels = ("<script>alert(1)</script>", 'b" onerror="x')
    log_NK = np.log(np.array([[0.9, 0.1], [0.8, 0.2], [0.3, 0.7]], dtype=np.float32))
    judged = figures(labels, ["<b>1", "2", "3"], [labels[1], labels[0], labels[1]], log_NK)
    text = "<img src=x onerror=alert(1)> " + "long " * 100
    samples = [Sample(name, label, text.encode()) for name, label in (("<b>1", labels[1]),)]
    served = html_report.Served(facts=[("address", "<i>")], failures=[("<u>", "status <422>")])
    subject = html_report.Subject(title="<h1>", subtitle="&", served=served, warnings=["<p>"])
    page = Page(html_report.render(subject, judged, samples))
    check(page)
    assert "<script>alert(1)</script>" in page.text
    assert "<img src=x onerror=alert(1)> long" in page.text and "…" in page.text
    assert not page.all("b") and not page.all("i") and not page.all("u")


def test_without_mistakes_the_page_says_so() -> None:
    import numpy as np

    from training.evaluate import figures

    judged = figures(("a", "b"), ["1", "2"], ["a", "b"], np.log(np.array([[0.9, 0.1], [0.2, 0.8]], dtype=np.float32)))
    page = Page(html_report.render(html_report.Subject(title="t", subtitle="s"), judged, iter(())))
    check(page)
    assert "There are none: every answer is right." in page.text
