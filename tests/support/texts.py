"""Short texts in two languages, and a real text model trained on them in a second."""

from __future__ import annotations

from pathlib import Path

from training import pipeline
from training.config import Recipe, load_recipe
from training.pipeline import Trained
from training.progress import silent

_WORLD = ("president", "minister", "election", "treaty", "border", "embassy")
_SPORTS = ("match", "goal", "coach", "season", "league", "striker")
_ENGLISH = (
    "The {0} spoke of the {1} after a long {2}",
    "A {0}, a {1} &amp; the {2}: <b>today</b>",
    "{2} and {1} #39;{0}",
)
_CHINESE = {
    "World": (
        "总统访问北京",
        "外交部长谈判",
        "选举结果公布",
        "边境条约签署",
        "大使馆发表声明",
        "总统谈选举",
        "部长谈条约",
    ),
    "Sports": (
        "球队赢得比赛",
        "教练更换前锋",
        "联赛赛季开始",
        "前锋打进两球",
        "比赛今晚进行",
        "球队更换教练",
        "联赛比赛开始",
    ),
}


def english() -> list[tuple[str, str]]:
    """Label and text, no two alike, many of each class."""
    return [
        (label, form.format(words[at], words[(at + step) % 6], words[(at + 2 * step + 1) % 6]))
        for label, words in (("World", _WORLD), ("Sports", _SPORTS))
        for at in range(6)
        for step in (1, 2, 4)
        for form in _ENGLISH
    ]


def chinese() -> list[tuple[str, str]]:
    """Label and text without a space between words."""
    return [(label, text) for label, texts in _CHINESE.items() for text in texts]


def write_csv(path: Path, rows: list[tuple[str, str]]) -> Path:
    """`label,text` with a row of names."""
    lines = ["label,text", *(f'{label},"{text}"' for label, text in rows)]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


def write_folders(folder: Path, rows: list[tuple[str, str]]) -> Path:
    """One .txt file per row, in the folder of its label."""
    for number, (label, text) in enumerate(rows):
        (folder / label).mkdir(parents=True, exist_ok=True)
        (folder / label / f"{number}.txt").write_text(text, encoding="utf-8")
    return folder


def recipe(csv: Path, *overrides: str) -> Recipe:
    """A recipe that trains in a second and knows both words and characters."""
    path = csv.with_suffix(".toml")
    path.write_text(
        'name = "news"\n[data]\nsource = "csv"\n[text]\nchar_ngrams = [1, 2]\nleast_texts = 1\n'
        '[model]\narchitecture = "embedding_bag"\nwidth = 0\nnaive_bayes = 0.5\nidf = true\npooling = "length"\n'
        '[train]\nepochs = 1\nbatch_size = 16\nthreads = 1\ndevice = "cpu"\n'
        "[serve]\nmax_bytes = 2000\nmax_instances = 8\n",
        encoding="utf-8",
    )
    return load_recipe(str(path), [f"data.root={csv}", *overrides])


def train(folder: Path, *overrides: str) -> Trained:
    """Run and artifact of a model for both languages below `folder`."""
    csv = write_csv(folder / "news.csv", english() + chinese())
    return pipeline.train(recipe(csv, *overrides), runs=folder / "runs", artifacts=folder / "artifacts", report=silent)


def train_folders(folder: Path) -> Trained:
    """As `train`, from class folders, with convolutions over characters in a row instead."""
    root = write_folders(folder / "articles", english() + chinese())
    overrides = (
        *("name=articles", f"data.root={root}", "data.source=texts", "text.word_ngrams=[]", "text.char_ngrams=[1]"),
        *(
            "text.repeats=all",
            "model.architecture=text_cnn",
            "model.width=16",
            "model.filters=32",
            "model.naive_bayes=0.5",
        ),
        *("train.epochs=8", "train.batch_size=8", "train.learning_rate=5e-3", "train.threads=1", "train.device=cpu"),
        *("serve.max_bytes=2000", "train.weight_decay=0", "model.idf=false", "model.pooling=mean"),
    )
    recipe = load_recipe("texts", overrides)
    return pipeline.train(recipe, runs=folder / "runs", artifacts=folder / "artifacts", report=silent)
