"""What a command says to type next can be typed: it runs, on the same images and against the same original."""

import shlex
import shutil
from pathlib import Path

import pytest

from normswap.demo import FOLDER, MODEL
from normswap_cli import next_command
from normswap_cli.options import ModelKwarg

from .test_cli import DEMO, IMAGES, one_object, run

# What makes timm build the demo model from a name.
_SHAPE = ["--num-classes", 10, "--img-size", 32]
for _value in ("patch_size=4", "embed_dim=48", "depth=4", "num_heads=3"):
    _SHAPE += ["--model-kwargs", _value]


def _next(result, **placeholders) -> list[str]:
    """Return the words of the command that a run names last, without ``normswap``, its placeholders filled in."""
    assert result.exit_code == 0, result.stderr
    (line,) = [line for line in result.stderr.splitlines() if line.startswith("next ")]
    words = shlex.split(line.removeprefix("next").strip())
    assert words[0] == "normswap"
    assert set(placeholders) <= set(words)
    return [str(placeholders.get(word, word)) for word in words[1:]]


def _after(words, flag) -> str:
    return words[words.index(flag) + 1]


@pytest.fixture(scope="module")
def odd(tmp_path_factory):
    """Images in a folder with a space in its name and a split of another name, and weights in a file."""
    folder = tmp_path_factory.mktemp("odd") / "my images"
    folder.mkdir()
    shutil.copy(FOLDER / "validation.tar", folder / "holdout.tar")
    shutil.copy(FOLDER / "train.tar", folder / "train.tar")
    shutil.copy(FOLDER / "model.safetensors", folder / "my weights.safetensors")
    return folder


def test_from_conversion_to_export(odd, tmp_path):
    flags = ("--data-dir", odd, "--split", "holdout", "--crop-pct", 0.9, "--eval-samples", 16, "-j", 0)
    made = run(
        "convert", "-m", "vit_tiny_patch16_224", "--checkpoint", odd / "my weights.safetensors", *_SHAPE, *flags,
        "--method", "channel", "--calib-samples", 16, "-o", tmp_path / "a b" / "out",
        "--save-swapped", tmp_path / "a b" / "swapped", "--json",
    )  # fmt: skip
    words = _next(made)
    assert f"{tmp_path / 'a b' / 'swapped'}, with BatchNorm in" in made.stderr
    assert _after(words, "--split") == "holdout"
    measured = run(*words, "--json")
    assert measured.exit_code == 0, measured.stderr
    assert one_object(measured)["agreement"] == one_object(made)["agreement"]
    assert "16 of 360 images of my images/holdout.tar" in measured.stderr

    out = tmp_path / "a b" / "out"
    exported = run("export", out, *flags, "--format", "pt2", "--against", MODEL, "--atol", 0.001, "--json")
    words = _next(exported)
    assert (words[:2], _after(words, "--against"), _after(words, "--dtype")) == (["export", str(out)], MODEL, "fp16")
    assert "--atol" not in words
    half = run(*words, "--json")
    assert half.exit_code == 0, half.stderr
    assert one_object(half)["files"] == [str(out / "model.fp16.pt2")]


@pytest.fixture(scope="module")
def converted(tmp_path_factory):
    """The demo's output folder, and beside it its swapped checkpoint."""
    out = tmp_path_factory.mktemp("converted") / "out"
    flags = ("--method", "channel", "-o", out, "--save-swapped", out.parent / "swapped")
    made = run("convert", *DEMO, *flags)
    assert made.exit_code == 0, made.stderr
    return out


def test_from_fine_tuning_to_fold(odd, converted, tmp_path):
    swapped, tuned = converted.parent / "swapped", tmp_path / "tuned"
    flags = ("--data-dir", odd, "--split", "holdout", "--eval-samples", 16, "-j", 0)
    result = run("finetune", "-m", swapped, *flags, "--samples", 64, "--train-batch-size", 24, "-o", tuned)
    words = _next(result, FOLDER=tmp_path / "out two")
    folded = run(*words, "--json")
    assert folded.exit_code == 0, folded.stderr
    assert "16 of 360 images of my images/holdout.tar" in folded.stderr


def test_from_inspection_to_conversion(odd, tmp_path):
    keep = ["--keep", "blocks.0.*", "--keep", "norm"]
    words = _next(run("inspect", "-m", MODEL, *keep), IMAGES=odd, OUT=tmp_path / "out")
    assert [word for word in words if word.startswith("--keep")] == ["--keep", "--keep"]
    done = run(*words, "--split", "holdout", "--calib-samples", 16, "--method", "channel", "-j", 0, "--json")
    assert done.exit_code == 0, done.stderr
    assert one_object(done)["kept"] == ["blocks.0.norm1", "blocks.0.norm2", "norm"]


def test_inspection_hands_on_the_architecture():
    words = _next(run("inspect", "-m", "vit_tiny_patch16_224", *_SHAPE, "--num-classes", 0))
    assert words == [
        "convert", "-m", "vit_tiny_patch16_224", "--pretrained", "--num-classes", "0", "--img-size", "32",
        *(str(word) for word in _SHAPE[4:]), "--data-dir", "IMAGES", "-o", "OUT",
    ]  # fmt: skip


def test_from_benchmark_to_conversion(odd, tmp_path):
    model = ("-m", "vit_tiny_patch16_224", "--checkpoint", odd / "my weights.safetensors", *_SHAPE)
    timing = ("-b", 1, "--rounds", 3, "--no-onnxruntime", "--device", "cpu")
    words = _next(run("benchmark", *model, *timing, "--data-dir", odd, "--split", "holdout"), OUT=tmp_path / "out")
    assert "--pretrained" not in words
    assert (_after(words, "--split"), _after(words, "--device")) == ("holdout", "cpu")
    done = run(*words, "--calib-samples", 16, "--eval-samples", 16, "--method", "channel", "-j", 0)
    assert done.exit_code == 0, done.stderr


def test_from_a_dry_run_to_the_push(converted, monkeypatch):
    given = ["--private", "--revision", "candidate", "--base-model", "user/base", "--message", "Ship it"]
    dry = run("push", converted, "user/model", *given, "--dry-run")
    words = _next(dry)
    assert words == ["push", str(converted), "user/model", *given]
    assert "dry run    nothing was sent\n" in dry.stderr
    monkeypatch.setattr("normswap.outputs.hub.push", lambda upload, message: f"sent: {message}")
    sent = run(*words)
    assert "pushed     sent: Ship it\n" in sent.stderr


def test_every_value_is_typed_as_it_was_given():
    options = {
        "model": "vit_tiny_patch16_224", "pretrained": False, "checkpoint": Path("a b.pth"), "use_ema": True,
        "num_classes": 0, "img_size": None, "in_chans": 1, "model_kwargs": (("depth", 2), ("norm", "a b")),
        "data_dir": None, "dataset": "hfds/x", "split": "validation", "class_map": None, "no_labels": True,
        "crop_pct": None, "mean": (0.5, 0.5, 0.5), "std": None, "interpolation": "bilinear", "workers": 0,
        "batch_size": 64, "output": "elsewhere", "as_json": True, "quiet": False, "verbose": 2, "calib_samples": 3,
    }  # fmt: skip
    line = next_command.line("evaluate", options, **{**next_command.as_original(options), "model": "local-dir:out"})
    assert line == (
        "normswap evaluate -m local-dir:out --num-classes 0 --in-chans 1 --model-kwargs depth=2 "
        "--model-kwargs 'norm='\"'\"'a b'\"'\"'' --against vit_tiny_patch16_224 --against-checkpoint 'a b.pth' "
        "--against-use-ema --dataset hfds/x --no-labels --mean 0.5 0.5 0.5 --interpolation bilinear -j 0"
    )
    assert ModelKwarg().convert(shlex.split(line)[11], None, None) == ("norm", "a b")


def test_a_flag_with_two_names_is_carried_as_it_was_given():
    options = {"model": "x", "report": False, "pretrained": False}
    assert next_command.line("convert", options) == "normswap convert -m x --no-report"
    assert next_command.line("convert", {**options, "report": True}) == "normswap convert -m x --report"
    assert next_command.line("convert", {**options, "report": None}) == "normswap convert -m x"


def test_commands_of_one_process_are_left_to_the_first(converted, monkeypatch):
    before = sorted(path.name for path in converted.iterdir())
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "1")
    for command in (("export", converted, *IMAGES), ("evaluate", "-m", MODEL, *IMAGES), ("report", FOLDER)):
        result = run(*command)
        assert (result.exit_code, result.stdout, result.stderr) == (0, "", "")
    assert sorted(path.name for path in converted.iterdir()) == before
