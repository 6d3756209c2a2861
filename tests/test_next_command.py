"""What a command says to type next can be typed: it runs, on the same images and against the same original."""

import shlex
import shutil

import pytest

from normswap.demo import FOLDER, MODEL
from normswap_cli import next_command

from .test_cli import DEMO, IMAGES, one_object, run

# What makes timm build the demo model from a name.
_SHAPE = ["--num-classes", 10, "--img-size", 32]
for _value in ("patch_size=4", "embed_dim=48", "depth=4", "num_heads=3"):
    _SHAPE += ["--model-kwargs", _value]


def _next(result) -> list[str]:
    """Return the words of the command that a run names last, without ``normswap``."""
    (line,) = [line for line in result.stderr.splitlines() if line.startswith("next ")]
    words = shlex.split(line.removeprefix("next").strip())
    assert words[0] == "normswap"
    return words[1:]


@pytest.fixture(scope="module")
def odd(tmp_path_factory):
    """Images in a folder with a space in its name and a split of another name, and weights in a file."""
    folder = tmp_path_factory.mktemp("odd") / "my images"
    folder.mkdir()
    shutil.copy(FOLDER / "validation.tar", folder / "holdout.tar")
    shutil.copy(FOLDER / "train.tar", folder / "train.tar")
    return folder


def test_from_conversion_to_export(odd, tmp_path):
    flags = ("--data-dir", odd, "--split", "holdout", "--crop-pct", 0.9, "--eval-samples", 16, "-j", 0)
    made = run(
        "convert", "-m", "vit_tiny_patch16_224", "--checkpoint", FOLDER / "model.safetensors", *_SHAPE, *flags,
        "--method", "channel", "--calib-samples", 16, "-o", tmp_path / "a b" / "out",
        "--save-swapped", tmp_path / "a b" / "swapped", "--json",
    )  # fmt: skip
    assert made.exit_code == 0, made.stderr
    assert f"{tmp_path / 'a b' / 'swapped'}, with BatchNorm in" in made.stderr
    words = _next(made)
    assert words[words.index("--split") + 1] == "holdout"
    measured = run(*words, "--eval-samples", 16, "-j", 0, "--json")
    assert measured.exit_code == 0, measured.stderr
    assert one_object(measured)["agreement"] == one_object(made)["agreement"]

    out = tmp_path / "a b" / "out"
    exported = run("export", out, *flags, "--format", "pt2", "--against", MODEL, "--json")
    assert exported.exit_code == 0, exported.stderr
    words = _next(exported)
    assert (words[:2], words[words.index("--against") + 1]) == (["export", str(out)], MODEL)
    assert words[words.index("--split") + 1] == "holdout"


def test_from_fine_tuning_to_fold(odd, tmp_path):
    swapped, tuned = tmp_path / "swapped", tmp_path / "tuned"
    made = run("convert", *DEMO, "--method", "channel", "-o", tmp_path / "out", "--save-swapped", swapped)
    assert made.exit_code == 0, made.stderr
    flags = ("--data-dir", odd, "--split", "holdout", "--eval-samples", 16, "-j", 0)
    result = run("finetune", "-m", swapped, *flags, "--samples", 64, "--train-batch-size", 24, "-o", tuned)
    assert result.exit_code == 0, result.stderr
    words = ["out two" if word == "FOLDER" else word for word in _next(result)]
    words[words.index("-o") + 1] = str(tmp_path / "out two")
    folded = run(*words, "--eval-samples", 16, "-j", 0, "--json")
    assert folded.exit_code == 0, folded.stderr
    assert "16 of 360 images of my images/holdout.tar" in folded.stderr


def test_every_value_is_typed_as_it_was_given():
    options = {
        "model": "vit_tiny_patch16_224", "pretrained": False, "checkpoint": "a b.pth", "use_ema": True,
        "num_classes": 10, "img_size": None, "in_chans": 1, "model_kwargs": (("depth", 2), ("norm", "a b")),
        "data_dir": None, "dataset": "hfds/x", "split": "validation", "class_map": None, "no_labels": True,
        "crop_pct": None, "mean": (0.5, 0.5, 0.5), "std": None, "interpolation": "bilinear",
    }  # fmt: skip
    words = [*next_command.against(options), *next_command.images(options)]
    assert next_command.line("evaluate", *words) == (
        "normswap evaluate --against vit_tiny_patch16_224 --against-checkpoint 'a b.pth' --against-use-ema "
        "--num-classes 10 --in-chans 1 --model-kwargs depth=2 --model-kwargs 'norm='\"'\"'a b'\"'\"'' "
        "--dataset hfds/x --no-labels --mean 0.5 0.5 0.5 --interpolation bilinear"
    )


def test_commands_of_one_process_are_left_to_the_first(tmp_path, monkeypatch):
    made = run("convert", *DEMO, "--method", "channel", "-o", tmp_path / "out")
    assert made.exit_code == 0, made.stderr
    before = sorted(path.name for path in (tmp_path / "out").iterdir())
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "1")
    for command in (("export", tmp_path / "out", *IMAGES), ("evaluate", "-m", MODEL, *IMAGES), ("report", FOLDER)):
        result = run(*command)
        assert (result.exit_code, result.stdout, result.stderr) == (0, "", "")
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == before


def test_from_a_dry_run_to_the_push(tmp_path):
    run("convert", *DEMO, "--method", "channel", "-o", tmp_path / "out")
    given = ["--private", "--revision", "candidate", "--base-model", "user/base", "--message", "Ship it"]
    dry = run("push", tmp_path / "out", "user/model", *given, "--dry-run")
    assert dry.exit_code == 0, dry.stderr
    words = _next(dry)
    assert words == ["push", str(tmp_path / "out"), "user/model", *given, "(nothing", "was", "sent)"]
