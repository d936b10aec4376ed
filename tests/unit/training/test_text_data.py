"""Texts as data: what files may look like, how they are divided, and what each mistake is called."""

from __future__ import annotations

import shlex
from pathlib import Path

import pytest

from handlerlib.text import Reader
from support import texts
from training import data
from training.config import Recipe, load_recipe
from training.data import Dataset
from training.errors import DataError, RecipeError
from training.progress import silent


def prepare(recipe: Recipe) -> Dataset:
    return data.prepare(data.survey(recipe, threads=1, report=silent), recipe, threads=1, report=silent)


def refuse(recipe: Recipe, message: str) -> DataError:
    with pytest.raises(DataError, match=message) as caught:
        prepare(recipe)
    assert caught.value.exit_code == 4
    assert caught.value.remedy
    return caught.value


def csv(folder: Path, *lines: str, encoding: str = "utf-8") -> Path:
    path = folder / "news.csv"
    path.write_text("\n".join(lines) + "\n", encoding=encoding)
    return path


def rows(count: int) -> list[str]:
    """Data rows of two classes in turn, no two alike."""
    return [f"{'ab'[number % 2]},word{number} and more" for number in range(count)]


def folders(folder: Path, **classes: int) -> Recipe:
    for label, count in classes.items():
        (folder / "texts" / label).mkdir(parents=True, exist_ok=True)
        for number in range(count):
            (folder / "texts" / label / f"{number}.txt").write_text(f"{label} text number {number}", encoding="utf-8")
    return texts.recipe(folder / "x.csv", "data.source=texts", f"data.root={folder / 'texts'}")


def test_class_folders_of_text_files(tmp_path: Path) -> None:
    recipe = folders(tmp_path, cats=10, dogs=10)
    (tmp_path / "texts" / "cats" / "picture.png").write_bytes(b"\x89PNG")
    dataset = prepare(recipe)
    assert dataset.classes == ("cats", "dogs")
    assert sum(dataset.sizes().values()) == 20
    assert [skipped.reason for skipped in dataset.notes.unreadable] == ["not a .txt file"]
    sample = next(dataset.samples("test"))
    assert sample.data.decode().startswith(sample.label)


def test_the_three_columns_of_ag_news(tmp_path: Path) -> None:
    lines = [f'"{number % 2 + 1}","Title ""{chr(97 + number)}""","A, comma"' for number in range(20)]
    recipe = load_recipe(
        "agnews",
        [f"data.root={csv(tmp_path, *lines)}", "data.train_rows=12", "data.validation_rows=4", "data.test_rows=4"],
    )
    recipe = recipe.model_copy(update={"data": recipe.data.model_copy(update={"class_names": ("World", "Sports")})})
    dataset = prepare(recipe)
    assert dataset.sizes() == {"train": 12, "validation": 4, "test": 4}
    names = {split: {dataset.images[row].entry.name for row in dataset.rows[split]} for split in data.SPLITS}
    assert names["train"] == {f"news.csv:{line}" for line in range(1, 13)}
    assert names["test"] == {f"news.csv:{line}" for line in range(17, 21)}
    first = next(one for one in dataset.images if one.entry.name == "news.csv:1")
    assert (first.entry.label, first.entry.read()) == ("World", b'Title "a"\nA, comma')


def test_rows_between_the_splits_are_not_used_and_copies_stay_on_one_side(tmp_path: Path) -> None:
    lines = ["label,text", *rows(30), "a,WORD0 and <b>more</b>", "b,last one"]
    wanted = ("data.train_rows=10", "data.validation_rows=4", "data.test_rows=4")
    dataset = prepare(texts.recipe(csv(tmp_path, *lines), *wanted))
    assert dataset.sizes() == {"train": 9, "validation": 4, "test": 4}
    assert dataset.notes.removed == ("news.csv:2",)
    assert "texts left out that the test" in next(iter(dataset.notes.lines()))


def test_more_rows_than_there_are(tmp_path: Path) -> None:
    path = csv(tmp_path, "label,text", *rows(10))
    wanted = ("data.train_rows=8", "data.validation_rows=4", "data.test_rows=4")
    refuse(texts.recipe(path, *wanted), r"news\.csv has 10 rows of data, the recipe wants 8 \+ 4 \+ 4")


def test_a_folder_with_train_and_test_files(tmp_path: Path) -> None:
    for name, first in (("train", 0), ("test", 100)):
        lines = [line.replace("word", f"word{first}") for line in rows(12)]
        (tmp_path / f"{name}.csv").write_text("label,text\n" + "\n".join(lines) + "\n")
    dataset = prepare(texts.recipe(tmp_path / "x.csv", f"data.root={tmp_path}"))
    assert dataset.sizes()["test"] == 12
    assert all(dataset.images[row].entry.name.startswith("test.csv") for row in dataset.rows["test"])


def test_the_vocabulary_is_of_the_training_texts_alone(tmp_path: Path) -> None:
    dataset = prepare(texts.recipe(csv(tmp_path, "label,text", *rows(40))))
    assert dataset.text is not None
    train = {number for row in dataset.rows["train"] for number in dataset.terms[row].tolist()}
    assert train == set(range(1, dataset.text.rows))
    row = dataset.rows["test"][0]
    text = dataset.images[row].entry.read().decode()
    assert dataset.terms[row].tolist() == list(Reader(dataset.text).numbers(text) or ())


def test_another_encoding_is_read_and_served_as_utf_8(tmp_path: Path) -> None:
    path = csv(tmp_path, "label,text", *(f"{line} café" for line in rows(20)), encoding="latin-1")
    dataset = prepare(texts.recipe(path, "data.encoding=latin-1"))
    assert "café" in next(dataset.samples("test")).data.decode("utf-8")


def test_wrong_bytes_are_named_with_their_line(tmp_path: Path) -> None:
    path = csv(tmp_path, "label,text", *rows(6), "a,café", encoding="latin-1")
    error = refuse(texts.recipe(path), r"news\.csv, line 8: not utf-8: .*\(byte \d+\)")
    assert "data.encoding=" in error.remedy
    recipe = folders(tmp_path, cats=4, dogs=4)
    (tmp_path / "texts" / "cats" / "bad.txt").write_bytes(b"one\ncaf\xe9 \xff")
    refuse(recipe, r"cats/bad\.txt, line 2: not utf-8")


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        (["label,text"], "holds no readable text"),
        (["label,text", "a,x", "a,y", "a,z"], "only one class, 'a'"),
        (["label,text", *rows(8), "c,alone"], "class 'c' .* has 1 readable text, two are the least"),
        (["label,words", *rows(4)], "no column 'text': its first row names label, words"),
        (["label,text,text", "a,x,y"], "more than one column 'text'"),
        (["label,text", *rows(4), "a,b,c"], "line 6: 3 values, the columns are 2"),
        (["label,text", *rows(4), "only"], "line 6: 1 values, the columns are 2"),
        (["label,text", *rows(4), 'a,"never closed'], "line 6: unexpected end of data"),
        (["label,text", *rows(4), 'a,"closed"too early'], "line 6: "),
        (["label,text", *rows(4), ",no class"], "line 6: no class in the column 'label'"),
        (["label,text", *rows(8), "a,...", "b,<br>"], r"nothing is left of 2 texts .*news\.csv:1[01]"),
    ],
)
def test_mistakes_in_a_file(tmp_path: Path, lines: list[str], message: str) -> None:
    refuse(texts.recipe(csv(tmp_path, *lines)), message)


def test_mistakes_in_class_folders(tmp_path: Path) -> None:
    refuse(folders(tmp_path, cats=4), "only one class, 'cats'")
    recipe = folders(tmp_path, dogs=8)
    (tmp_path / "texts" / "dogs" / "empty.txt").write_bytes(b"")
    (tmp_path / "texts" / "dogs" / "marks.txt").write_text("<p>...</p>")
    refuse(recipe, r"nothing is left of 2 texts .*dogs/empty\.txt")
    (tmp_path / "texts" / "birds").mkdir()
    refuse(recipe, "birds")


def test_empty_texts_may_be_left_out(tmp_path: Path) -> None:
    dataset = prepare(texts.recipe(csv(tmp_path, "label,text", *rows(20), "a,..."), "data.empty=leave_out"))
    assert [skipped.reason for skipped in dataset.notes.unreadable] == ["empty after normalisation"]
    assert sum(dataset.sizes().values()) == 20


def test_classes_that_are_not_known(tmp_path: Path) -> None:
    names = 'data.class_names=["World", "Sports"]'
    good = [f"{number % 2 + 1},text {number}" for number in range(8)]
    assert prepare(texts.recipe(csv(tmp_path, "label,text", *good), names)).classes == ("World", "Sports")
    refuse(texts.recipe(csv(tmp_path, "label,text", *good, "3,x"), names), "line 10: class '3' is neither")


def test_no_root_a_missing_one_and_an_unknown_encoding(tmp_path: Path) -> None:
    path = csv(tmp_path, "label,text", *rows(8))
    refuse(texts.recipe(path, f"data.root={tmp_path / 'none'}"), "none is neither a .csv file nor a folder")
    for encoding in ("klingon", "hex", "base64", "rot13", "zlib"):
        refuse(texts.recipe(path, f"data.encoding={encoding}"), f"encoding '{encoding}' is not known")
    (tmp_path / "bare.toml").write_text(
        'name="x"\n[data]\nsource="csv"\n[model]\narchitecture="text_cnn"\n', encoding="utf-8"
    )
    refuse(load_recipe(str(tmp_path / "bare.toml")), "needs to know where the texts lie")


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("data.image_size=32", r"data\.image_size is not for the source 'csv'"),
        ("data.channels=3", r"data\.channels is not for the source 'csv'"),
        ("augment.flip=true", "augment is not for the source 'csv'"),
        ("serve.max_pixels=5", r"serve\.max_pixels is not for the source 'csv'"),
        ("model.whiten=true", r"model\.whiten is not for the source 'csv'"),
        ("train.channels_last=true", r"train\.channels_last is not for the source 'csv'"),
        ("text.stopwords=english", r"unknown key 'text\.stopwords', did you mean 'text\.stop_words'"),
        ("data.text_column=x", r"unknown key 'data\.text_column', did you mean 'data\.text_columns'"),
        ("text.word_ngrams=[2,1]", r"word_ngrams must be ascending"),
        ("model.width=64", "model.naive_bayes needs"),
        ("model.architecture=text_cnn", "model.width: text_cnn needs at least 1"),
        ("data.train_rows=0", "go together"),
        ("data.source=texts", r"data\.root|data\.class_names|not for the source 'texts'"),
    ],
)
def test_what_is_for_images_is_refused_for_texts(override: str, message: str) -> None:
    with pytest.raises(RecipeError, match=message) as caught:
        load_recipe("agnews", [override])
    assert caught.value.exit_code == 3


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("text.html=false", "text is not for the source 'digits'"),
        ("data.encoding=cp1252", r"data\.encoding is not for the source 'digits'"),
        ("model.naive_bayes=0.1", r"model\.naive_bayes is not for the source 'digits'"),
        ("model.architecture=embedding_bag", "architecture 'embedding_bag' is not for images"),
    ],
)
def test_what_is_for_texts_is_refused_for_images(override: str, message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        load_recipe("digits", [override])


def test_an_architecture_for_images_is_refused_for_texts() -> None:
    with pytest.raises(RecipeError, match="architecture 'resnet18' is not for texts"):
        load_recipe("agnews", ["model.architecture=resnet18", "model.naive_bayes=0"])


@pytest.mark.parametrize("name", ["agnews", "digits"])
def test_a_recorded_recipe_is_read_again(name: str) -> None:
    from training.config import parse

    recipe = load_recipe(name, [])
    assert parse(recipe.model_dump(mode="json"), where="there") == recipe
    assert ("text" in recipe.identity()) == (name == "agnews")
    assert ("augment" in recipe.identity()) == (name != "agnews")


@pytest.mark.parametrize(
    ("encoding", "lines"),
    [
        ("gb18030", ["政治,总统今天访问了北京并发表讲话", "体育,球队在昨晚的比赛中赢得了冠军"]),
        ("big5", ["政治,總統今天訪問了北京並發表講話", "體育,球隊在昨晚的比賽中贏得了冠軍"]),
        ("cp932", ["政治,大統領は今日、北京を訪問して演説した。", "スポーツ,チームは昨夜の試合で優勝した"]),
        ("euc_jp", ["政治,大統領は今日、北京を訪問して演説した。", "スポーツ,チームは昨夜の試合で優勝した"]),
        ("cp949", ["정치,대통령은 오늘 베이징을 방문해 연설했다", "스포츠,팀은 어젯밤 경기에서 우승했다"]),
        ("cp1252", ["reise,Jürgen Schäfer fährt für Übungen fort", "essen,Müller grüßt naïve Gäste"]),
    ],
)
def test_the_remedy_for_wrong_bytes_names_what_they_are(tmp_path: Path, encoding: str, lines: list[str]) -> None:
    remedy = refuse(texts.recipe(csv(tmp_path, "label,text", *lines, encoding=encoding)), "not utf-8").remedy
    assert (
        remedy == f"store it as UTF-8, or --set data.encoding={encoding} if it is that; look at the labels afterwards"
    )


def test_utf_8_is_named_where_another_encoding_was_asked_for(tmp_path: Path) -> None:
    path = csv(tmp_path, "label,text", "政治,总统", "体育,球队")
    assert "data.encoding=utf-8 " in refuse(texts.recipe(path, "data.encoding=ascii"), "not ascii").remedy


def unspaced(folder: Path, *overrides: str) -> Recipe:
    """Chinese headlines as the recipe `texts` takes them."""
    path = texts.write_csv(folder / "chinese.csv", texts.chinese())
    return load_recipe("texts", [f"data.root={path}", "data.validation=0.3", *overrides])


def test_words_of_texts_without_spaces_are_told_to_be_characters(tmp_path: Path) -> None:
    remedy = refuse(unspaced(tmp_path), "no term is in 2 training texts").remedy
    assert remedy == "--set 'text.word_ngrams=[]' --set 'text.char_ngrams=[1,2,3]': there are no spaces between words"
    overrides = [part for part in shlex.split(remedy.partition("]':")[0] + "]'") if part != "--set"]
    followed = prepare(unspaced(tmp_path, *overrides))
    assert followed.notes.advice == ()
    assert followed.text is not None
    assert {" 前", " 前锋"} <= set(followed.text.vocabulary)


def test_training_on_such_words_all_the_same_is_noted(tmp_path: Path) -> None:
    noted = list(prepare(unspaced(tmp_path, "text.least_texts=1")).notes.lines())
    assert noted == [
        "most texts have no spaces between words: --set 'text.word_ngrams=[]' --set 'text.char_ngrams=[1,2,3]'"
        " reads them by characters"
    ]


@pytest.mark.parametrize("text", ["总统 今天 访问 北京", "a few words and 北京 among them"])
def test_texts_with_spaces_are_not(tmp_path: Path, text: str) -> None:
    lines = [f"{'ab'[number % 2]},{text} {number}" for number in range(20)]
    assert prepare(texts.recipe(csv(tmp_path, "label,text", *lines), "text.char_ngrams=[]")).notes.advice == ()
