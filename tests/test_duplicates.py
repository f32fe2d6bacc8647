"""Which images count as the same picture, on pictures drawn by code; and the cache of the answer."""

import io
from pathlib import Path

import imagehash
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageDraw, ImageEnhance

from datasets import DatasetError, ImageData, duplicate_groups, duplicates, leaking


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("CACHE_DIR", str(tmp_path / "cache"))
    return tmp_path / "cache"


def picture(seed: int, width: int = 240, height: int = 180) -> Image.Image:
    """Overlapping discs of random place, size and colour."""
    rng = np.random.default_rng(seed)
    image = Image.new("RGB", (width, height), tuple(rng.integers(0, 255, 3).tolist()))
    pen = ImageDraw.Draw(image)
    for _ in range(14):
        (x, y), radius = rng.uniform(0, 1, 2) * [width, height], rng.uniform(8, 60)
        pen.ellipse([x - radius, y - radius, x + radius, y + radius], tuple(rng.integers(0, 255, 3).tolist()))
    return image


def trousers(gap: int, shade: int, grain: int) -> Image.Image:
    """A garment of 28x28 gray pixels on black, as bright on average as `shade`."""
    image = Image.new("L", (28, 28))
    pen = ImageDraw.Draw(image)
    pen.rectangle([8, 0, 19, 8], shade)
    pen.rectangle([8, 8, 13 - gap, 27], shade)
    pen.rectangle([14 + gap, 8, 19, 27], shade)
    pixels = np.asarray(image).astype(float)
    noise = np.random.default_rng(grain).normal(0, 6, pixels.shape)
    return Image.fromarray((pixels + noise * (pixels > 0)).clip(0, 255).astype(np.uint8))


def recompressed(image: Image.Image, quality: int) -> Image.Image:
    file = io.BytesIO()
    image.save(file, "JPEG", quality=quality)
    return Image.open(file)


def collect(*pictures: Image.Image, size: int = 128) -> ImageData:
    resized = [np.asarray(image.resize((size, size), Image.Resampling.BILINEAR)) for image in pictures]
    images = np.stack([pixels.reshape(size, size, -1) for pixels in resized])
    return ImageData("drawn", images, np.zeros(len(images), np.int64), ("one",), len(images))


@pytest.mark.parametrize(
    "change",
    [
        lambda image: image.copy(),
        lambda image: image.resize((97, 61)),
        lambda image: image.resize((900, 600), Image.Resampling.LANCZOS),
        lambda image: recompressed(image, 25),
        lambda image: ImageEnhance.Brightness(image).enhance(1.15),
        lambda image: ImageEnhance.Contrast(image).enhance(0.7),
        lambda image: image.convert("L").convert("RGB"),
        lambda image: recompressed(image.crop((1, 1, 239, 179)), 60),
    ],
)
def test_changed_copies_are_found_among_other_pictures(change) -> None:
    others = [picture(seed) for seed in range(1, 30)]
    data = collect(picture(0), *others, change(picture(0)))
    assert duplicate_groups(data).tolist() == [*range(30), 0]


def test_equal_hashes_are_no_proof() -> None:
    # Each row has one shade, so all bits of the hash, which compares neighbours in a row, are 0.
    rng = np.random.default_rng(0)
    columns = rng.integers(0, 255, (8, 128)).astype(np.uint8)
    stripes = [Image.fromarray(np.tile(column[:, None, None], (1, 128, 3))) for column in columns]
    assert {str(imagehash.dhash(image)) for image in stripes} == {"0" * 16}
    assert duplicate_groups(collect(*stripes, recompressed(stripes[3], 80))).tolist() == [*range(8), 3]


def test_garments_that_look_alike_are_not_the_same() -> None:
    one, other_cut, other_cloth = trousers(1, 200, 0), trousers(2, 200, 0), trousers(1, 200, 1)
    lighter = one.point(lambda value: value * 1.1)
    data = collect(one, other_cut, other_cloth, lighter, size=28)
    flat = data.images.reshape(4, -1).astype(float)
    assert np.corrcoef(flat)[0, 2] > 0.99
    assert duplicate_groups(data).tolist() == [0, 1, 2, 0]


def test_even_images_are_the_same_only_if_they_are_equal() -> None:
    shades = [0, 255, 0, 128, 255]
    data = collect(*(Image.new("RGB", (128, 128), (shade,) * 3) for shade in shades))
    assert duplicate_groups(data).tolist() == [0, 1, 0, 3, 1]


def test_no_images_no_groups() -> None:
    empty = ImageData("empty", np.empty((0, 128, 128, 3), np.uint8), np.empty(0, np.int64), ("a", "b"), 0)
    assert duplicate_groups(empty).tolist() == []


def test_groups_go_through_others() -> None:
    pairs = np.array([[1, 4], [2, 3], [4, 5]])
    assert duplicates.connect(pairs, 7).tolist() == [0, 1, 2, 2, 1, 1, 6]


def test_pairs_name_distance_and_correlation() -> None:
    data = collect(picture(0), picture(1), recompressed(picture(0), 15), picture(1))
    near = duplicates.near_duplicates(data)
    assert near.pairs.tolist() == [[0, 2], [1, 3]]
    hashes = [imagehash.dhash(Image.fromarray(data.images[row])) for row in (0, 2)]
    assert near.distance.tolist() == [hashes[0] - hashes[1], 0]
    assert 0.97 < near.correlation[0] < 1 and near.correlation[1] == 1


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 300), st.integers(0, 10), st.integers(0, 2**32 - 1))
def test_search_finds_each_close_pair_of_hashes_once(count: int, limit: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    centres = rng.integers(0, 2**63, 5, dtype=np.uint64)
    flips = np.bitwise_or.reduce(np.uint64(1) << rng.integers(0, 64, (count, 6), dtype=np.uint64), axis=1)
    hashes = centres[rng.integers(0, 5, count)] ^ flips
    found = [
        (*sorted((int(i), int(j))), int(bits))
        for block in duplicates._candidates(hashes, limit)
        for i, j, bits in zip(*block, strict=True)
    ]
    expected = {
        (i, j, bits)
        for i in range(count)
        for j in range(i + 1, count)
        if (bits := (int(hashes[i]) ^ int(hashes[j])).bit_count()) <= limit
    }
    assert len(found) == len(expected) and set(found) == expected


@given(st.lists(st.integers(0, 6), min_size=1, max_size=30), st.data())
def test_leaking_names_images_whose_group_is_in_training(ids: list[int], draw: st.DataObject) -> None:
    order = draw.draw(st.permutations(range(len(ids))))
    cut = draw.draw(st.integers(0, len(ids)))
    train, others = np.array(order[:cut], dtype=int), np.array(order[cut:], dtype=int)
    trained = {ids[i] for i in train}
    assert leaking(np.array(ids), train, others).tolist() == [i for i in others if ids[i] in trained]


def test_answer_is_kept_and_a_damaged_one_made_again(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    searches = []
    search = duplicates._search
    monkeypatch.setattr(duplicates, "_search", lambda *arguments: searches.append(1) or search(*arguments))
    data = collect(picture(0), picture(1), recompressed(picture(0), 50))

    def groups() -> tuple[list[int], int]:
        return duplicate_groups(data).tolist(), len(searches)

    assert groups() == ([0, 1, 0], 1)
    assert groups() == ([0, 1, 0], 1)
    (entry,) = cache.glob("near-duplicates-*/pairs.npz")
    whole = entry.read_bytes()
    swapped = whole.replace(np.array([0, 2]).astype("<i8").tobytes(), np.array([0, 1]).astype("<i8").tobytes())
    for number, damage in enumerate((b"", b"no archive", whole[:-40], whole[: len(whole) // 2], swapped)):
        assert damage != whole
        entry.write_bytes(damage)
        assert groups() == ([0, 1, 0], 2 + number)
    assert list(cache.glob("*/*")) == [entry] and entry.read_bytes()[:4] == whole[:4]

    monkeypatch.setattr(duplicates, "METHOD", duplicates.METHOD + 1)
    assert groups()[1] == 7
    monkeypatch.setattr(duplicates, "PHOTOGRAPHS", duplicates.Limits(0, 1))
    assert groups() == ([0, 1, 2], 8)
    assert duplicate_groups(collect(picture(0), picture(1))).tolist() == [0, 1]  # other images, other entry


def test_cache_is_in_the_data_folder_unless_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CACHE_DIR")
    monkeypatch.setattr("datasets.images.DATA_DIR", tmp_path / "data")
    duplicate_groups(collect(picture(0), picture(1)))
    assert len(list((tmp_path / "data" / "cache").glob("near-duplicates-*"))) == 1


def test_cache_that_cannot_be_written_is_one_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("not a folder")
    monkeypatch.setenv("CACHE_DIR", str(tmp_path / "file" / "cache"))
    with pytest.raises(DatasetError, match=r"cannot write the cache of near duplicates to .*CACHE_DIR"):
        duplicate_groups(collect(picture(0), picture(1)))
