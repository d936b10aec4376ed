"""The photos of the comparison are the same each time, and like photos."""

import io
import statistics

import pytest
from PIL import Image

from benchmarks import photos
from benchmarks.errors import BenchmarkError
from benchmarks.photos import Photo

pytestmark = pytest.mark.unit


@pytest.fixture(scope="module")
def standard() -> tuple[Photo, ...]:
    return photos.standard()


def sizes(found: tuple[Photo, ...]) -> list[tuple[int, int]]:
    return [Image.open(io.BytesIO(photo.data)).size for photo in found]


def test_the_standard_photos_are_the_same_in_every_run(standard):
    assert photos.digest(photos.standard()) == photos.digest(standard)
    assert photos.digest(photos.standard(seed=1)) != photos.digest(standard)


def test_they_have_the_size_and_the_weight_of_photos_from_the_web(standard):
    assert len(standard) == 64
    assert photos.mean_bytes(standard) == pytest.approx(116_000, rel=0.10)
    assert statistics.median(width * height for width, height in sizes(standard)) == 500 * 375
    assert len(set(sizes(standard))) >= 5
    assert any(height > width for width, height in sizes(standard))


def test_exactly_two_of_them_are_grey(standard):
    assert [index for index, photo in enumerate(standard) if photos.is_grey(photo)] == list(photos.GREY)


def test_no_two_of_them_are_the_same_picture(standard):
    assert len({photo.data for photo in standard}) == 64


def test_resized_photos_have_the_asked_size(standard):
    assert sizes(photos.resized(standard[:2], 120, 90)) == [(120, 90)] * 2


def test_written_photos_are_read_back_in_order(standard, tmp_path):
    photos.write(standard[:5], tmp_path)
    (tmp_path / "notes.txt").write_text("not a photo")
    assert photos.read(tmp_path) == standard[:5]


def test_a_folder_without_photos_is_refused_by_name(tmp_path):
    with pytest.raises(BenchmarkError, match=str(tmp_path)):
        photos.read(tmp_path)
