"""Labels go by the names of their classes where both sides have some; labels of no class are refused."""

from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from PIL import Image

import normswap
from normswap import ArgumentError, DataError, evaluate_models, load_images, load_model
from normswap.demo import FOLDER, MODEL
from normswap.inputs.labels import are_indices, check_labels, label_order

NAMES = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine"]


@pytest.fixture(scope="module")
def model():
    found = load_model(MODEL)
    assert found.pretrained_cfg["label_names"] == NAMES
    return found


@pytest.fixture(scope="module")
def digits(model):
    """Pictures [360, 32, 32] in 8 bits and their labels."""
    images = load_images(model, FOLDER, "validation", mean=(0.0,) * 3, std=(1.0,) * 3)
    pictures, labels = zip(*images, strict=True)
    return (torch.cat(pictures)[:, 0] * 255).round().to(torch.uint8).numpy(), torch.cat(labels).tolist()


def _write(root: Path, digits, folder_of: list[str]) -> Path:
    """Write each picture into the folder of its class."""
    for number, (picture, label) in enumerate(zip(*digits, strict=True)):
        path = root / folder_of[label] / f"{number:03}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(picture).save(path)
    return root


def _top1(model, images) -> float:
    (found,) = evaluate_models({"model": model}, images)
    return found.top1


@pytest.mark.parametrize("change", [str, str.upper, str.title])
@pytest.mark.parametrize("dataset", ["", "torch/image_folder"])
def test_names_in_another_order_score_as_in_the_models(tmp_path, model, digits, change, dataset):
    """Sorted, eight comes first: by their number alone nine labels in ten would be wrong."""
    folders = [change(name) for name in NAMES]
    images = load_images(model, _write(tmp_path, digits, folders), "validation", dataset)
    assert _top1(model, images) == _top1(model, load_images(model, FOLDER, "validation")) > 90
    (note,) = images.notes
    assert "go by name" in note
    assert images.classes == folders
    assert _top1(model, images.draw(100, 0)) > 90
    assert images.draw(100, 0).notes == images.notes


def test_names_are_compared_with_the_descriptions_too(tmp_path, model, digits, monkeypatch):
    synsets = [f"n{label}" for label in range(10)]
    config = {**model.pretrained_cfg, "label_names": synsets}
    config["label_descriptions"] = dict(zip(synsets, NAMES, strict=True))
    monkeypatch.setattr(model, "pretrained_cfg", config)
    images = load_images(model, _write(tmp_path / "a", digits, NAMES), "validation")
    assert _top1(model, images) > 90
    assert images.notes
    assert not load_images(model, _write(tmp_path / "b", digits, synsets), "validation").notes


@pytest.mark.parametrize("dataset", ["", "torch/image_folder"])
def test_other_names_are_refused_and_the_odd_ones_named(tmp_path, model, digits, dataset):
    root = _write(tmp_path, digits, [".ipynb_checkpoints" if name == "seven" else name for name in NAMES])
    odd = r"not among the model's: \.ipynb_checkpoints; not among these: seven"
    with pytest.raises(DataError, match=rf"not the model's classes \({odd}\): give `class_map`, or `labels=False`"):
        load_images(model, root, "validation", dataset)
    assert load_images(model, root, "validation", dataset, labels=False).num_classes is None
    (root / "map.txt").write_text("\n".join(name if name != "seven" else ".ipynb_checkpoints" for name in NAMES))
    if not dataset:
        assert _top1(model, load_images(model, root, "validation", class_map=str(root / "map.txt"))) > 90


def test_another_number_of_classes_names_the_odd_ones(tmp_path, model, digits):
    root = _write(tmp_path, digits, NAMES)
    (root / "extra").mkdir()
    Image.new("L", (8, 8)).save(root / "extra" / "a.png")
    with pytest.raises(DataError, match=r"11 classes and the model has 10 \(not among the model's: extra\)"):
        load_images(model, root, "validation")


@pytest.mark.parametrize("names", [[str(label) for label in range(10)], [f"{label:04}" for label in range(10)]])
def test_folders_called_by_their_label_are_labels(tmp_path, model, digits, names):
    images = load_images(model, _write(tmp_path, digits, names), "validation")
    assert not images.notes
    assert _top1(model, images) > 90


def test_models_without_names_go_by_number(tmp_path, digits):
    bare = timm.create_model("vit_tiny_patch16_224", img_size=32, num_classes=10, depth=1)
    images = load_images(bare, _write(tmp_path, digits, NAMES), "validation")
    assert (images.num_classes, images.label_order, images.notes) == (10, None, ())
    other_head = load_model("test_vit", num_classes=10, weights=False)
    other_head.pretrained_cfg = {**other_head.pretrained_cfg, "label_names": ["a", "b"]}  # of the head before
    assert load_images(other_head, tmp_path, "validation").label_order is None


def test_a_class_map_of_several_folders_to_a_label(tmp_path, model, digits):
    import pickle

    root = _write(tmp_path / "images", digits, [*NAMES[:9], "nueve"])
    (root / "neuf").mkdir()
    Image.new("L", (8, 8)).save(root / "neuf" / "a.png")
    mapped = {name: label for label, name in enumerate([*NAMES[:9], "nueve"])} | {"neuf": 9}
    (tmp_path / "map.pkl").write_bytes(pickle.dumps(mapped))
    images = load_images(model, root, "validation", class_map=str(tmp_path / "map.pkl"))
    assert (len(images), images.num_classes) == (361, 10)
    (tmp_path / "map.pkl").write_bytes(pickle.dumps({**mapped, "neuf": -1}))
    with pytest.raises(DataError, match="label -1, and the model has 10 classes"):
        list(load_images(model, root, "validation", class_map=str(tmp_path / "map.pkl")))


def test_order_is_a_permutation_that_brings_each_name_to_its_own():
    generator = torch.Generator().manual_seed(0)
    for _ in range(20):
        shuffled = torch.randperm(10, generator=generator).tolist()
        found = [NAMES[i] for i in shuffled]
        assert [NAMES[label] for label in label_order(found, [["x"], NAMES])] == found
    assert label_order([*NAMES[:9], "x"], [NAMES]) is None
    # macOS takes letters apart, and a C locale hands over bytes.
    for spelling in ("a\u0308", "ä".encode().decode("ascii", "surrogateescape")):
        assert label_order(["b", spelling], [["ä", "b"]]) == (1, 0)
    assert label_order(NAMES, []) is None
    assert not are_indices(["1", "0"])


@pytest.mark.parametrize("kind", [torch.tensor, np.array, list])
@pytest.mark.parametrize("bad", [-1, 10, -100])
def test_labels_of_no_class_are_refused_whatever_holds_them(model, kind, bad):
    images = torch.zeros(4, 3, 32, 32)
    why = "labels count from 0" if bad > 0 else f"labels must be class numbers from 0, and one is {bad}"
    with pytest.raises(ArgumentError, match=why):
        evaluate_models({"model": model}, [(images, kind([0, 1, bad, 2]))])
    (found,) = evaluate_models({"model": model}, [(images, kind([0, 1, 9, 2]))])
    assert found.top1 is not None


@pytest.mark.parametrize(
    "labels", [torch.eye(4, 10), [1, 2, 3], torch.full((4,), 0.5), torch.zeros(4, 1).long(), "abcd"]
)
def test_what_is_no_label_for_each_image_is_refused(labels):
    with pytest.raises(ArgumentError, match="labels must be"):
        check_labels(labels, 4, 10)


def test_labels_of_no_class_are_refused_before_calibration(model):
    """They may stand in any batch, and calibration takes an hour."""
    images, labels = torch.randn(40, 3, 32, 32), torch.arange(40) % 10 + 1
    calls = []
    with pytest.raises(ArgumentError, match="label 10, and the model has classes 0 to 9"):
        normswap.convert(model, [images], eval_images=[(images, labels)], progress=lambda *call: calls.append(call))
    assert not [what for what, *_ in calls if what.startswith("calibrate")]
