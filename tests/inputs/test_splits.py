"""Which folder is which split: usual names in any case, a question where it is not clear, never two pooled."""

from pathlib import Path

import pytest
import torch
from PIL import Image

import normswap
from normswap import ArgumentError, load_images, load_model
from normswap.demo import FOLDER, MODEL
from normswap.inputs.dataset import load_splits
from normswap.inputs.overlap import shared_images


@pytest.fixture(scope="module")
def model():
    return load_model(MODEL)


def _make(root: Path, *folders: str, classes: int = 10, per_class: int = 1) -> Path:
    for folder in folders:
        for c in range(classes):
            (root / folder / str(c)).mkdir(parents=True)
            for i in range(per_class):
                Image.new("L", (8, 8), 20 * c).save(root / folder / str(c) / f"{i}.png")
    return root


def _flat(root: Path, *folders: str) -> Path:
    for folder in folders:
        (root / folder).mkdir(parents=True)
        Image.new("L", (8, 8)).save(root / folder / "a.png")
    return root


def _where(images) -> str:
    return images.description.rpartition("/")[2]


@pytest.mark.parametrize("dataset", ["", "torch/image_folder"])
@pytest.mark.parametrize(
    ("train", "evaluation"),
    [
        ("train", "test"), ("Train", "Val"), ("training", "testing"), ("TRAIN", "VALIDATION"), ("train", "valid"),
        ("Training", "Eval"), ("train", "evaluation"), ("train", "Test"),
    ],
)  # fmt: skip
def test_usual_names_in_any_case(tmp_path, model, train, evaluation, dataset):
    root = _make(tmp_path, train, evaluation)
    calibration, evaluated = load_splits(model, root, "train", "validation", dataset)
    if not dataset:
        assert (_where(calibration), _where(evaluated)) == (train, evaluation)
    assert len(calibration) == len(evaluated) == 10
    assert shared_images(evaluated, [calibration], 10) == 0
    assert shared_images(evaluated.draw(5, 0), [evaluated], 5) == 5
    assert calibration.notes == evaluated.notes == ()


def test_images_to_validate_on_go_before_those_to_test_on(tmp_path, model):
    root = _make(tmp_path, "test", "train", "val")
    assert _where(load_images(model, root, "validation")) == "val"
    assert _where(load_images(model, root, "test")) == "test"
    assert _where(load_images(model, root, "TEST")) == "test"


def test_test_is_no_split_to_calibrate_on(tmp_path, model):
    root = _make(tmp_path, "test")
    _make(tmp_path, "Val")
    with pytest.raises(
        ArgumentError, match=r"which is the train split\? There are Val, test: name one as `train_split`"
    ):
        load_splits(model, root, "train", "validation")
    calibration, evaluation = load_splits(model, root, "Val", "test")
    assert (_where(calibration), _where(evaluation)) == ("Val", "test")


@pytest.mark.parametrize(
    "names", [("seg_train", "seg_test"), ("train2017", "val2017"), ("part_a", "part_b"), ("train", "holdout"),
              ("training set", "test set")],
)  # fmt: skip
def test_folders_that_look_like_splits_are_listed(tmp_path, model, names):
    root = _make(tmp_path, *names)
    listed = ", ".join(sorted(names))
    with pytest.raises(ArgumentError, match=rf"There are {listed}: name one as `(train_)?split`"):
        load_splits(model, root, "train", "validation")
    with pytest.raises(ArgumentError, match=rf"There are {listed}: name one as `split`"):
        load_images(model, root, "validation")
    calibration, evaluation = load_splits(model, root, *names)
    assert (_where(calibration), _where(evaluation)) == names
    once, twice = load_splits(model, root, names[0], names[0])
    assert once is twice


def test_a_name_that_is_not_there_lists_what_is(tmp_path, model):
    with pytest.raises(ArgumentError, match=r"no split 'night', neither .* night\.tar; there are a, b"):
        load_images(model, _make(tmp_path, "a", "b"), "night")


def test_one_split_is_used_for_both_and_said(tmp_path, model):
    root = _make(tmp_path, "Train")
    calibration, evaluation = load_splits(model, root, "train", "validation")
    assert calibration is evaluation
    images = load_images(model, root, "validation")
    assert _where(images) == "Train"
    assert images.notes == (f"{root} has no split validation: Train is used",)
    named, same = load_splits(model, _make(tmp_path / "other", "holdout"), "train", "holdout")
    assert named is same
    assert _where(named) == "holdout"


def test_class_folders_alone_stay_one_set(tmp_path, model):
    root = _make(tmp_path, ".")
    calibration, evaluation = load_splits(model, root, "train", "validation")
    assert calibration is evaluation
    assert (len(evaluation), evaluation.num_classes) == (10, 10)


@pytest.mark.parametrize("name", ["train", "test", "bullet train", "test tube"])
def test_a_class_may_be_called_like_a_split(tmp_path, model, name):
    root = _flat(tmp_path, name, "bus", "car")
    calibration, evaluation = load_splits(model, root, "train", "validation", labels=False)
    assert calibration is evaluation
    assert len(evaluation) == 3


def test_flat_splits_without_classes(tmp_path, model):
    calibration, evaluation = load_splits(model, _flat(tmp_path, "train", "val"), "train", "validation")
    assert (_where(calibration), _where(evaluation), evaluation.num_classes) == ("train", "val", None)


def test_images_in_both_sets_are_counted(tmp_path, model):
    train, validation = (load_images(model, FOLDER, split) for split in ("train", "validation"))
    assert shared_images(validation, [train], 360) == 0
    assert shared_images(validation, [validation], 360) == 360
    assert shared_images(validation, [load_images(model, FOLDER, "validation").draw(50, 1)], 360) == 50
    assert shared_images(validation.draw(40, 3), [validation.draw(90, 3), train], 40) == 40
    root = _make(tmp_path / "files", "train")
    (root / "val").symlink_to(root / "train")
    linked, again = load_splits(model, root, "train", "validation")
    assert shared_images(again, [linked], 10) == 10
    x = torch.randn(6, 3, 32, 32)
    assert shared_images([(x[:4], torch.zeros(4))], [[x[2:]], None], 4) == 2
    assert shared_images([x], [iter([x])], 6) == 0  # what can be gone through once is left alone


@pytest.mark.parametrize(
    "form",
    [
        lambda x: x,
        lambda x: (x, torch.zeros(len(x))),
        lambda x: [x],
        list,
        lambda x: x.numpy(),
        lambda x: {"pixel_values": x},
        lambda x: [{"pixel_values": x.numpy(), "labels": [0] * len(x)}],
        lambda x: [(image, 0) for image in x],
    ],
)
def test_images_in_both_are_found_in_every_form(form):
    x = torch.randn(6, 3, 32, 32)
    assert shared_images(form(x[:4]), [form(x[2:])], 4) == 2


@pytest.mark.parametrize("shared", [0, 8, 20])
def test_the_report_says_how_many_are_in_both(model, shared):
    images = torch.cat([x for x, _ in load_images(model, FOLDER, "train", samples=60, seed=0)])
    options = normswap.CalibrationOptions(method="channel")
    report = normswap.convert(
        model, [images[:40]], eval_images=[images[40 - shared : 60 - shared]], calibration=options
    ).report
    assert report.to_json()["overlap"] == shared
    count = "all" if shared == 20 else f"{shared} of them"
    said = f" ({count} also used for calibration or training)" if shared else ""
    assert report.evaluation_data == f"20 images passed by the caller{said}"


def test_without_evaluation_images_the_report_says_so(model):
    images = load_images(model, FOLDER, "train", samples=30)
    report = normswap.convert(model, images, calibration=normswap.CalibrationOptions(method="channel")).report
    assert report.overlap == 30
    assert report.evaluation_data == f"{images.description} (all also used for calibration or training)"
