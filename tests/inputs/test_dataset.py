"""Images in: the model's own data config, the split that is there, a fixed draw, and broken images named."""

import tarfile
from pathlib import Path

import pytest
import torch
from PIL import Image
from timm.data import create_dataset, create_loader, resolve_data_config

from normswap import ArgumentError, DataError, load_images, load_model
from normswap.demo import FOLDER, MODEL
from normswap.inputs.dataset import find_split, load_splits


@pytest.fixture(scope="module")
def model():
    return load_model(MODEL)


def _folder(root: Path, classes: int = 10, per_class: int = 2) -> Path:
    for c in range(classes):
        (root / str(c)).mkdir(parents=True, exist_ok=True)
        for i in range(per_class):
            Image.new("RGB", (20, 30), (c * 20, i * 50, 100)).save(root / str(c) / f"{i}.png")
    return root


def test_pixels_are_those_of_timms_own_loader(model):
    config = resolve_data_config({}, model=model)
    dataset = create_dataset("", root=str(FOLDER / "validation.tar"))
    loader = create_loader(
        dataset, **{k: v for k, v in config.items() if k != "crop_mode"}, batch_size=360, use_prefetcher=False
    )
    expected, labels = next(iter(loader))
    ours, our_labels = next(iter(load_images(model, FOLDER, "validation", batch_size=360)))
    assert torch.equal(ours, expected)
    assert torch.equal(our_labels, labels)
    assert ours.shape == (360, 3, 32, 32)


def test_the_config_can_be_overridden(model):
    own, wide = load_images(model, FOLDER, "validation"), load_images(model, FOLDER, "validation", mean=(0.1, 0.1, 0.1))
    assert not torch.equal(next(iter(own))[0], next(iter(wide))[0])


def test_splits(tmp_path, model):
    calibration, evaluation = load_splits(model, FOLDER, "train", "validation")
    assert ("train.tar" in calibration.description, "validation.tar" in evaluation.description) == (True, True)
    assert (len(calibration), len(evaluation), calibration.num_classes, evaluation.num_classes) == (320, 360, None, 10)
    single = _folder(tmp_path / "single")
    calibration, evaluation = load_splits(model, single, "train", "validation")
    assert calibration is evaluation
    named = tmp_path / "named"
    _folder(named / "val")
    _folder(named / "training", per_class=3)
    calibration, evaluation = load_splits(model, named, "train", "validation")
    assert (len(calibration), len(evaluation)) == (30, 20)
    assert find_split(named, "validation") == named / "val"
    only_train = tmp_path / "only"
    _folder(only_train / "train")
    calibration, evaluation = load_splits(model, only_train, "train", "validation")
    assert "only/train" in evaluation.description


def test_a_draw_is_random_and_repeatable(model):
    images = load_images(model, FOLDER, "validation", batch_size=400)
    drawn = {seed: next(iter(images.draw(50, seed)))[0] for seed in (1, 2)}
    assert torch.equal(drawn[1], next(iter(images.draw(50, 1)))[0])
    assert not torch.equal(drawn[1], drawn[2])
    assert len(images.draw(10_000, 1)) == 360
    assert "50 of 360 images" in images.draw(50, 7).description
    assert "seed 7" in images.draw(50, 7).description


def test_workers_give_the_same_images(model):
    alone, helped = (list(load_images(model, FOLDER, "validation", workers=w, batch_size=100)) for w in (0, 2))
    assert all(torch.equal(a[0], b[0]) and torch.equal(a[1], b[1]) for a, b in zip(alone, helped, strict=True))


def test_broken_images_are_named_and_never_replaced(tmp_path, model):
    root = _folder(tmp_path)
    good = (root / "3" / "0.png").read_bytes()
    (root / "3" / "0.png").write_bytes(good[: len(good) // 2])
    (root / "4" / "1.png").write_bytes(b"not an image")
    images = load_images(model, root, "validation", batch_size=4)
    labels = torch.cat([labels for _, labels in images])
    assert len(labels) == 18
    assert sorted(images.skipped) == ["3/0.png", "4/1.png"]
    assert torch.bincount(labels).tolist() == [2, 2, 2, 1, 1, 2, 2, 2, 2, 2]
    strict = load_images(model, root, "validation", batch_size=4, max_skipped=1)
    with pytest.raises(DataError, match="2 images"):
        list(strict)


def test_no_images(tmp_path, model):
    (tmp_path / "empty").mkdir()
    tarfile.open(tmp_path / "empty.tar", "w").close()
    for path in ("empty", "empty.tar"):
        with pytest.raises(DataError, match=r"empty(\.tar)?: "):
            load_images(model, tmp_path / path, "validation")
    with pytest.raises(ArgumentError, match="no such folder"):
        load_images(model, tmp_path / "missing", "validation")
    with pytest.raises(ArgumentError, match="no split 'night'"):
        load_images(model, FOLDER, "night")
    with pytest.raises(ArgumentError, match="`data_dir`"):
        load_images(model, None, "validation")


def test_labels_must_fit(tmp_path, model):
    with pytest.raises(DataError, match="5 classes and the model has 10"):
        load_images(model, _folder(tmp_path / "five", classes=5), "validation")
    assert load_images(model, tmp_path / "five", "validation", labels=False).num_classes is None
    flat = tmp_path / "flat"
    flat.mkdir()
    Image.new("RGB", (8, 8)).save(flat / "a.png")
    ((_, labels),) = list(load_images(model, flat, "validation"))
    assert labels is None


def test_grey_models_read_grey_images(tmp_path):
    import timm

    model = timm.create_model("vit_tiny_patch16_224", img_size=32, in_chans=1, num_classes=10, depth=1)
    x, _ = next(iter(load_images(model, FOLDER, "validation", mean=(0.5,), std=(0.5,))))
    assert x.shape[1:] == (1, 32, 32)


def test_torchvision_datasets_work_by_timms_name(tmp_path, model):
    root = _folder(tmp_path)
    images = load_images(model, root, "validation", dataset="torch/image_folder")
    assert (len(images), images.num_classes) == (20, 10)
    assert next(iter(images))[0].shape == (20, 3, 32, 32)
