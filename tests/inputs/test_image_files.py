"""Pixels of any width give the picture that 8 bits give; files that are not read are counted, broken ones named."""

import contextlib
import os
import tarfile
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from timm.data.readers.img_extensions import get_img_extensions

from normswap import ArgumentError, DataError, evaluate_models, load_images, load_model
from normswap.demo import FOLDER, MODEL
from normswap.inputs.image_files import all_suffixes, count_files, loaded, to_8_bits

GREY = np.arange(256, dtype=np.uint8).reshape(16, 16)


@pytest.fixture(scope="module")
def model():
    return load_model(MODEL)


def _save(image: Image.Image, path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    image.save(path)
    return path


WIDE = {
    "I;16 .png": (GREY.astype(np.uint16) * 257, "x.png"),
    "I;16 .tif": (GREY.astype(np.uint16) * 257, "x.tif"),
    "I;16B .tif": ((GREY.astype(np.uint16) * 257).astype(">u2"), "x.tif"),
    "I of 8 bits .tif": (GREY.astype(np.int32), "x.tif"),
    "I of 16 bits .tif": (GREY.astype(np.int32) * 257, "x.tif"),
    "I .pgm": (GREY.astype(np.int32) * 257, "x.pgm"),
    "F of 0..1 .tif": (GREY.astype(np.float32) / 255, "x.tif"),
    "F of 0..255 .tif": (GREY.astype(np.float32), "x.tif"),
}


@pytest.mark.parametrize("mode", ["RGB", "L"])
@pytest.mark.parametrize("kind", WIDE)
def test_wide_pixels_give_the_picture_of_8_bits(tmp_path, kind, mode):
    values, name = WIDE[kind]
    with Image.open(_save(Image.fromarray(values), tmp_path / name)) as image:
        assert image.mode.startswith(("I", "F"))  # else this would test nothing
        assert np.array_equal(to_8_bits(image, mode), Image.fromarray(GREY).convert(mode))


def test_dark_pages_of_16_bits_stay_dark(tmp_path):
    """A width is not guessed where the file says it."""
    values = np.full((4, 4), 200)
    for wide, name in ((values.astype(np.uint16), "x.png"), (values.astype(np.int32), "x.pgm")):
        with Image.open(_save(Image.fromarray(wide), tmp_path / name)) as image:
            assert np.asarray(to_8_bits(image, "L")).max() == 1


@pytest.mark.parametrize("mode", ["1", "L", "P", "LA", "RGBA", "CMYK", "YCbCr", "HSV"])
def test_other_modes_are_pillows_own(mode):
    image = Image.fromarray(np.stack([GREY, GREY.T, 255 - GREY], -1)).convert(mode)
    assert np.array_equal(to_8_bits(image, "RGB"), image.convert("RGB"))


@pytest.mark.parametrize("value", [-1.0, 300.0, float("nan"), float("inf")])
def test_floats_of_no_known_range_are_unreadable_by_name(tmp_path, model, value):
    good, bad = GREY.astype(np.float32) / 255, GREY.astype(np.float32) / 255
    bad[3, 3] = value
    _save(Image.fromarray(good), tmp_path / "good.tif")
    _save(Image.fromarray(bad), tmp_path / "bad.tif")
    images = load_images(model, tmp_path, "validation")
    assert sum(len(batch) for batch, _ in images) == 1
    assert "not 0..1 or 0..255" in images.skipped["bad.tif"]


def _unpacked(root: Path) -> Path:
    with tarfile.open(FOLDER / "validation.tar") as tar:
        tar.extractall(root, filter="data")
    return root


@pytest.fixture(scope="module")
def digits(tmp_path_factory):
    return _unpacked(tmp_path_factory.mktemp("digits"))


@pytest.mark.parametrize("dataset", ["", "torch/image_folder"])
def test_accuracy_on_16_bits_is_that_on_8(tmp_path, model, digits, dataset):
    for path in digits.rglob("*.png"):
        with Image.open(path) as image:
            wide = np.asarray(image.convert("L")).astype(np.uint16) * 257
        _save(Image.fromarray(wide), tmp_path / path.relative_to(digits))
    wide, narrow = (load_images(model, root, "validation", dataset) for root in (tmp_path, digits))
    assert len(wide) == len(narrow) == 360
    (a,), (b,) = evaluate_models({"": model}, wide), evaluate_models({"": model}, narrow)
    assert (a.top1, a.n) == (b.top1, b.n)
    assert a.top1 > 90


@pytest.mark.parametrize("in_tar", [False, True])
def test_formats_of_pillow_are_read_and_the_rest_is_counted(tmp_path, model, in_tar):
    root = tmp_path / "files"
    for number, suffix in enumerate((".png", ".JPG", ".webp", ".bmp", ".tif", ".gif")):
        image = Image.new("RGB", (16, 16), (40 * number, 10, 200))
        _save(image, root / str(number % 2) / f"{number}{suffix}")
    for name in ("readme.txt", "0/a.heic", "1/b.heic", "0/none"):
        (root / name).write_bytes(b"x")
    if in_tar:
        with tarfile.open(tmp_path / "files.tar", "w") as tar:
            tar.add(root, "files")
        root = tmp_path / "files.tar"
    images = load_images(model, root, "validation", labels=False)
    assert sum(len(batch) for batch, _ in images) == len(images) == 6
    assert images.files.read == Counter({".png": 1, ".jpg": 1, ".webp": 1, ".bmp": 1, ".tif": 1, ".gif": 1})
    assert images.files.left == Counter({".heic": 2, ".txt": 1, "": 1})
    assert images.files.line().endswith("not read: 2 .heic, 1 .txt, 1 without suffix")


def test_files_outside_the_class_map_are_counted_as_left(tmp_path, model):
    for name in ("cat", "dog", "cow"):
        _save(Image.new("RGB", (8, 8)), tmp_path / "images" / name / "a.png")
    (tmp_path / "map.txt").write_text("cat\ndog\n")
    images = load_images(model, tmp_path / "images", "validation", class_map=str(tmp_path / "map.txt"), labels=False)
    assert (images.files.read, images.files.left) == (Counter({".png": 2}), Counter({".png": 1}))


def test_timms_own_list_of_suffixes_comes_back():
    before = get_img_extensions()
    with contextlib.suppress(KeyError), all_suffixes():
        assert ".webp" in get_img_extensions()
        raise KeyError
    assert get_img_extensions() == before


@pytest.mark.parametrize("name", ["a.zip", "a.tar.gz", "a.tgz", "a.7z", "a.rar"])
def test_an_archive_says_what_is_taken(tmp_path, model, name):
    (tmp_path / name).write_bytes(b"x")
    with pytest.raises(DataError, match=rf"{name}: \.[\w.]+ is not taken; a folder or an uncompressed \.tar is taken"):
        load_images(model, tmp_path / name, "validation")
    with pytest.raises(DataError, match=rf"no images in it; there are 1 \.{name.split('.')[-1]}; read are \.png"):
        load_images(model, tmp_path, "validation")


def test_an_archived_split_is_named(tmp_path, model):
    _save(Image.new("RGB", (8, 8)), tmp_path / "train/0/a.png")
    (tmp_path / "val.tar.gz").write_bytes(b"x")
    with pytest.raises(DataError, match=r"val\.tar\.gz: \.tar\.gz is not taken"):
        load_images(model, tmp_path, "validation")


def _break_decoding(monkeypatch, error: Exception) -> None:
    """Let every file that is called bad end as a codec may."""
    whole = Image.open

    def broken(file, *arguments):
        if "bad" in str(getattr(file, "name", "")):
            raise error
        return whole(file, *arguments)

    monkeypatch.setattr(Image, "open", broken)


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize(
    "error", [RuntimeError("codec -2"), MemoryError(), AssertionError("odd"), IndexError("x"), UnicodeError("x")]
)
def test_whatever_a_codec_raises_names_the_file(tmp_path, model, monkeypatch, error, workers):
    for name in ("a", "bad", "c"):
        _save(Image.new("RGB", (8, 8)), tmp_path / f"{name}.png")
    _break_decoding(monkeypatch, error)
    images = load_images(model, tmp_path, "validation", workers=workers)
    assert sum(len(batch) for batch, _ in images) == 2
    assert list(images.skipped) == ["bad.png"]
    with pytest.raises(DataError, match=r"1 images of .* cannot be read, the first bad\.png \("):
        list(load_images(model, tmp_path, "validation", workers=workers, max_skipped=0))


@pytest.mark.parametrize("workers", [0, 1])
def test_a_loader_that_ends_early_says_why_in_one_line(workers):
    loader = torch.utils.data.DataLoader(_Broken(), num_workers=workers)
    with pytest.raises(DataError, match=r"^reading three images ended early: RuntimeError: disk gone$"):
        list(loaded(loader, "three images"))


class _Broken(torch.utils.data.Dataset):
    def __len__(self):
        return 3

    def __getitem__(self, index):
        raise RuntimeError("disk gone\nand more")


def test_a_worker_that_dies_is_one_line():
    with pytest.raises(DataError, match=r"ended early: RuntimeError: DataLoader worker .* exited unexpectedly"):
        list(loaded(torch.utils.data.DataLoader(_Deadly(), num_workers=1), "images"))


class _Deadly(torch.utils.data.Dataset):
    def __len__(self):
        return 3

    def __getitem__(self, index):
        os._exit(7)


def test_what_the_consumer_raises_stays_as_it_is():
    batches = loaded([1, 2], "images")
    next(batches)
    with pytest.raises(KeyError):
        batches.throw(KeyError())


def test_counting_says_nothing_of_a_very_large_tar(tmp_path, monkeypatch):
    monkeypatch.setattr("normswap.inputs.image_files._LARGEST_SCAN", 100)
    assert count_files(FOLDER / "validation.tar").left == Counter()


@pytest.mark.parametrize("name", ["sampels", "split_name", "workesr"])
def test_unknown_keywords_are_refused_by_name(model, name):
    with pytest.raises(ArgumentError, match=f"no argument '{name}'"):
        load_images(model, FOLDER, "train", **{name: 3})


def test_samples_are_a_seeded_draw(model):
    images = load_images(model, FOLDER, "train", samples=20, seed=3)
    expected = load_images(model, FOLDER, "train").draw(20, 3)
    assert images.description == expected.description
    assert torch.equal(next(iter(images))[0], next(iter(expected))[0])
    assert len(set(next(iter(images))[1].tolist())) > 3  # the first 20 of the .tar are all zeros
