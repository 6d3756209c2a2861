"""Bad input through the command line: the right exit code, one line that says what is wrong, and nothing written."""

import argparse
import json
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from normswap.demo import FOLDER, MODEL

from .test_cli import FAST, FILES, one_object, run

DATA = ("--data-dir", FOLDER)
# One thread: the machine that runs the tests has other things to do.
QUIET_ENV = {**os.environ, "OMP_NUM_THREADS": "1"}


def listing(folder):
    return sorted(path.relative_to(folder) for path in folder.rglob("*"))


def refused(out, code, says, *arguments):
    """Run ``convert`` with -q; want the exit code, one line on stderr with every one of the texts, and no trace."""
    before = listing(out.parent)
    result = run("convert", "-q", "-o", out, *FAST, *arguments)
    assert result.exit_code == code, result.stderr
    assert result.stdout == ""
    assert_one_line(result.stderr, says)
    assert listing(out.parent) == before
    return result.stderr


def assert_one_line(stderr, says):
    lines = [line for line in stderr.splitlines() if line and not line.startswith(("Usage: ", "Try 'normswap"))]
    assert len(lines) == 1, stderr
    assert lines[0].startswith("Error: ")
    assert "run again with -vv" not in lines[0]  # said of what normswap did not foresee
    for text in says:
        assert str(text) in lines[0]


@pytest.fixture
def out(tmp_path):
    (tmp_path / "to").mkdir()
    return tmp_path / "to" / "out"


@pytest.fixture
def model(tmp_path):
    """A copy of the demo model that a test may damage."""
    folder = tmp_path / "model"
    folder.mkdir()
    for name in ("config.json", "model.safetensors"):
        shutil.copy(FOLDER / name, folder)
    return folder


@pytest.fixture
def images(tmp_path):
    """40 digits in 10 class folders."""
    folder = tmp_path / "images"
    taken = dict.fromkeys("0123456789", 0)
    with tarfile.open(FOLDER / "train.tar") as tar:
        for member in tar.getmembers():
            if member.name.endswith(".png") and taken[member.name[0]] < 4:
                taken[member.name[0]] += 1
                tar.extract(member, folder, filter="data")
    assert len(list(folder.rglob("*.png"))) == 40
    return folder


@pytest.fixture
def weights():
    return load_file(FOLDER / "model.safetensors")


def truncate(path, keep=0.6):
    path.write_bytes(path.read_bytes()[: int(path.stat().st_size * keep)])


# Which model, which weights


def test_no_such_model_folder(out, tmp_path):
    missing = tmp_path / "nowhere"
    refused(out, 2, [missing, "no such folder"], "-m", f"local-dir:{missing}", *DATA)


def test_folder_without_config(out, model):
    (model / "config.json").unlink()
    refused(out, 2, [model, "no config.json"], "-m", f"local-dir:{model}", *DATA)


def test_folder_without_weights(out, model):
    (model / "model.safetensors").unlink()
    refused(out, 1, [model, "model.safetensors"], "-m", f"local-dir:{model}", *DATA)


@pytest.mark.parametrize("text", ["{", "[]", "{}", '{"architecture": "no_such_vit", "pretrained_cfg": {}}'])
def test_config_that_is_none(out, model, text):
    (model / "config.json").write_text(text)
    assert refused(out, 1, [model, "config"], "-m", f"local-dir:{model}", *DATA)


def test_folder_without_prefix(out, model):
    refused(out, 2, [f"local-dir:{model}", "is a folder"], "-m", model, *DATA)


def test_unknown_model(out):
    refused(out, 2, ["vit_tiny_patch16_225", "did you mean", "vit_tiny_patch16_224"], "-m", "vit_tiny_patch16_225")
    refused(out, 2, ["nonsense", "list_models"], "-m", "nonsense", *DATA)


def test_unknown_tag(out):
    refused(out, 2, ["no_such_tag", "vit_tiny_patch16_224"], "-m", "vit_tiny_patch16_224.no_such_tag", "--pretrained")


def test_name_without_weights(out):
    refused(out, 2, ["test_vit", "--pretrained", "--checkpoint"], "-m", "test_vit", *DATA)


def test_two_sources_of_weights(out, tmp_path):
    (tmp_path / "x.pth").touch()
    refused(out, 2, ["exclude"], "-m", "test_vit", "--pretrained", "--checkpoint", tmp_path / "x.pth", *DATA)


def test_model_without_layer_norm(out, tmp_path):
    import timm

    save_file(timm.create_model("test_vit4").state_dict(), tmp_path / "test_vit4.safetensors")
    says = ["test_vit4", "no LayerNorm", "RmsNorm"]
    refused(out, 3, says, "-m", "test_vit4", "--checkpoint", tmp_path / "test_vit4.safetensors", *DATA)
    result = run("inspect", "-m", "test_vit4", "-q")
    assert result.exit_code == 3
    assert_one_line(result.stderr, says)


def test_random_head(out):
    refused(out, 2, ["10 classes", "--num-classes 7", "random head"], "-m", MODEL, "--num-classes", 7, *DATA)


# Checkpoints


@pytest.mark.parametrize("where", ["folder", "safetensors", "pth", "html.pth", "empty.pth", "empty.safetensors"])
def test_unreadable_weights(out, model, tmp_path, weights, where):
    path = {"folder": model / "model.safetensors"}.get(where, tmp_path / f"weights.{where}")
    if where == "pth":
        torch.save(weights, path)
    elif where == "safetensors":
        shutil.copy(model / "model.safetensors", path)
    elif where == "html.pth":
        path.write_text("<!doctype html><title>404</title>" * 9)
    else:
        path.touch()
    if where in ("folder", "safetensors", "pth"):
        truncate(path)
    checkpoint = () if where == "folder" else ("--checkpoint", path)
    line = refused(out, 1, [model if where == "folder" else path], "-m", f"local-dir:{model}", *checkpoint, *DATA)
    assert "cannot be read" in line
    assert "run code" not in line  # a broken file is not a dangerous one


def test_no_such_checkpoint(out, tmp_path):
    refused(out, 2, [tmp_path / "none.pth", "exist"], "-m", MODEL, "--checkpoint", tmp_path / "none.pth", *DATA)


def test_wrong_keys(out, tmp_path, weights):
    path = tmp_path / "weights.safetensors"
    renamed = {name.replace("blocks.0.", "layers.0."): tensor for name, tensor in weights.items()}
    save_file(renamed, path)
    says = [path, "12 missing (blocks.0.norm1.weight", "12 unexpected (layers.0."]
    refused(out, 1, says, "-m", MODEL, "--checkpoint", path, *DATA)


def test_wrong_keys_in_a_folder(out, model, weights):
    del weights["blocks.2.attn.qkv.weight"]
    save_file(weights, model / "model.safetensors")
    refused(out, 1, [model, "blocks.2.attn.qkv.weight"], "-m", f"local-dir:{model}", *DATA)


def test_checkpoint_of_other_width(out, tmp_path, weights):
    path = tmp_path / "weights.safetensors"
    save_file({**weights, "blocks.1.mlp.fc1.bias": torch.zeros(5)}, path)
    says = [path, "blocks.1.mlp.fc1.bias [5] instead of [192]"]
    refused(out, 1, says, "-m", MODEL, "--checkpoint", path, *DATA)


def test_checkpoint_of_other_classes(out, tmp_path):
    path = FOLDER / "model.safetensors"
    says = [path, "10 rows", "--num-classes 10"]
    refused(out, 1, says, "-m", MODEL, "--checkpoint", path, "--num-classes", 7, *DATA)


@pytest.mark.parametrize("content", [{}, {"state_dict": {}}, [torch.zeros(2)], {"epoch": 3}, 7])
def test_checkpoint_without_tensors(out, tmp_path, content):
    path = tmp_path / "weights.pth"
    torch.save(content, path)
    refused(out, 1, [path], "-m", MODEL, "--checkpoint", path, *DATA)


class _Bomb:
    def __init__(self, marker):
        self.marker = marker

    def __reduce__(self):
        return Path.touch, (self.marker,)


@pytest.mark.parametrize("old_format", [False, True])
def test_code_in_a_pickle_never_runs(out, tmp_path, weights, old_format):
    marker = tmp_path / "executed"
    path = tmp_path / "weights.pth"
    content = {"state_dict": weights, "extra": _Bomb(marker)}
    torch.save(content, path, _use_new_zipfile_serialization=not old_format)
    refused(out, 1, [path, "run code", "safetensors"], "-m", MODEL, "--checkpoint", path, *DATA)
    assert not marker.exists()
    torch.load(path, weights_only=False)  # else the test would show nothing
    assert marker.exists()


@pytest.mark.parametrize(
    ("name", "site"),
    [
        ("blocks.1.norm1.weight", "blocks.1.norm1"),
        ("patch_embed.proj.weight", "blocks.0.norm1"),
        ("blocks.2.mlp.fc1.bias", "blocks.3.norm1"),
        ("head.bias", "head.bias"),
    ],
)
def test_nan_in_the_weights(out, model, weights, name, site):
    broken = weights[name].clone()
    broken.view(-1)[0] = float("nan")
    save_file({**weights, name: broken}, model / "model.safetensors")
    refused(out, 1, [f"Error: {site}: ", "not finite"], "-m", f"local-dir:{model}", *DATA)


def perturbed(weights):
    return {name: tensor * 0.5 for name, tensor in weights.items()}


@pytest.mark.parametrize(
    ("suffix", "wrap", "ema"),
    [
        ("safetensors", lambda w: w, False),
        ("pth", lambda w: w, False),
        ("pt", lambda w: {"state_dict": w}, False),
        ("pth", lambda w: {"model": w}, False),
        ("pth", lambda w: {f"module.{name}": tensor for name, tensor in w.items()}, False),
        ("pth.tar", lambda w: {"state_dict": w, "state_dict_ema": perturbed(w)}, False),
        ("pth.tar", lambda w: {"state_dict": perturbed(w), "state_dict_ema": w}, True),
        # what timm's train.py writes
        ("pth.tar", lambda w: {"epoch": 3, "arch": "x", "state_dict": w, "args": argparse.Namespace(lr=0.1)}, False),
    ],
    ids=["safetensors", "plain", "state_dict", "model", "module", "not-ema", "ema", "timm-train"],
)
def test_checkpoints_that_work(tmp_path, weights, suffix, wrap, ema):
    path = tmp_path / f"weights.{suffix}"
    save_file(weights, path) if suffix == "safetensors" else torch.save(wrap(weights), path)
    # A base whose own weights are others, so that only the checkpoint's can give the demo's answers.
    arguments = ("--img-size", 32, "--num-classes", 10, *[f"--model-kwargs={k}" for k in ARCHITECTURE])
    flags = ("--use-ema",) if ema else ()
    record = one_object(run("evaluate", "-m", MODEL, "--checkpoint", path, *flags, *AGAINST))
    assert (record["kl"], record["agreement"]) == (0, 100)
    plain = run("evaluate", "-m", "vit_tiny_patch16_224", "--checkpoint", path, *flags, *arguments, "--json", *EVAL)
    assert one_object(plain)["top1"] == record["top1"] > 90
    if "state_dict_ema" in wrap(weights):  # and without the flag, or with it, the other ones
        flags = () if ema else ("--use-ema",)
        record = one_object(run("evaluate", "-m", MODEL, "--checkpoint", path, *flags, *AGAINST))
        assert record["kl"] > 0.01


ARCHITECTURE = ("patch_size=4", "embed_dim=48", "depth=4", "num_heads=3")
EVAL = ("-j", 0, "--eval-samples", 16, *DATA, "-q")
AGAINST = ("--against", MODEL, "--json", *EVAL)


def test_ema_that_is_not_there(out, tmp_path, weights):
    path = tmp_path / "weights.pth"
    torch.save({"state_dict": weights}, path)
    line = refused(out, 1, [path, "EMA"], "-m", MODEL, "--checkpoint", path, "--use-ema", *DATA)
    assert "--use-ema" in line


# Images


def test_no_images_named(out):
    refused(out, 2, ["--data-dir"], "-m", MODEL)


def test_no_such_image_folder(out, tmp_path):
    refused(out, 2, [tmp_path / "none", "exist"], "-m", MODEL, "--data-dir", tmp_path / "none")


@pytest.mark.parametrize("what", ["empty", "class folders", "text", "empty.tar", "text.tar"])
def test_no_images(out, tmp_path, what):
    data = tmp_path / what
    if what.endswith(".tar"):
        (tmp_path / "note.txt").write_text("no image")
        with tarfile.open(data, "w") as tar:
            if what == "text.tar":
                tar.add(tmp_path / "note.txt", "0/note.txt")
    else:
        data.mkdir()
    if what in ("class folders", "text"):
        (data / "0").mkdir()
    if what == "text":
        (data / "0" / "note.txt").write_text("no image")
    refused(out, 1, [data, "images"], "-m", MODEL, "--data-dir", data)


def test_tar_that_is_none(out, tmp_path):
    data = tmp_path / "images.tar"
    data.write_bytes(b"not a tar" * 99)
    refused(out, 1, [data], "-m", MODEL, "--data-dir", data)


def test_all_images_corrupt(out, images):
    for path in images.rglob("*.png"):
        path.write_text("no image")
    arguments = ("-m", MODEL, "--data-dir", images)
    refused(out, 1, ["32 images of", "images", "cannot be read", "0/", ".png"], *arguments)
    refused(out, 1, ["no image of", "images", "can be read", "0/", ".png"], *arguments, "--max-skipped", 1000)


def test_one_corrupt_image(out, images):
    broken = sorted(images.rglob("*.png"))[17]
    truncate(broken)
    name = broken.relative_to(images)
    result = run("convert", "-m", MODEL, "--data-dir", images, "-j", 0, "-o", out, "--json")
    assert result.exit_code == 0, result.stderr
    record = one_object(result)
    assert record["skipped_images"] == [str(name)]
    assert record["calib_samples"] == record["before"]["n"] == 39
    assert len(re.findall(rf"^skipped +{name} ", result.stderr, re.M)) == 1
    assert json.loads((out / "normswap.json").read_text())["report"]["skipped_images"] == [str(name)]


@pytest.mark.parametrize(("broken", "limit"), [(11, ()), (1, ("--max-skipped", 0))])
def test_too_many_corrupt_images(out, images, broken, limit):
    for path in sorted(images.rglob("*.png"))[:broken]:
        truncate(path)
    arguments = ("-m", MODEL, "--data-dir", images, "--calib-samples", 40, "-b", 9, *limit)
    refused(out, 1, [f"{broken} images of", "0/", "--max-skipped"], *arguments)


def test_labels_of_another_task(out, images):
    for digit in "56789":
        shutil.rmtree(images / digit)
    arguments = ("-m", MODEL, "--data-dir", images)
    refused(out, 1, [images, "5 classes", "10", "--no-labels"], *arguments)
    result = run("convert", "-o", out, *FAST, *arguments, "--no-labels", "--json", "-q")
    record = one_object(result)
    assert record["before"] == {"top1": None, "top5": None, "n": 20}
    assert record["agreement"] > 10
    result = run("convert", "-o", out, *FAST, *arguments, "--no-labels", "--max-drop", 5, "--overwrite", "-q")
    assert result.exit_code == 4
    assert_one_line(result.stderr, ["--max-drop", "labels"])


# Outputs


def test_output_not_empty(out):
    out.mkdir()
    (out / "thesis.txt").write_text("years of work")
    refused(out, 2, [out, "--overwrite"], "-m", MODEL, *DATA)
    assert (out / "thesis.txt").read_text() == "years of work"


def test_output_is_a_file(out):
    for flag in ((), ("--overwrite",)):
        out.write_text("years of work")
        refused(out, 2, [out, "not a folder"], "-m", MODEL, *DATA, *flag)
        assert out.read_text() == "years of work"


def test_output_below_a_file(out):
    out.write_text("years of work")
    for below in (out / "new", out / "new" / "er"):
        result = run("convert", "-q", "-o", below, "-m", MODEL, *DATA)
        assert result.exit_code in (1, 2)
        assert_one_line(result.stderr, [f"{out}", "not a folder"])
    assert out.read_text() == "years of work"


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_output_in_a_read_only_folder(out):
    out.parent.chmod(0o555)
    refused(out, 1, [out, "cannot be written"], "-m", MODEL, *DATA)


@pytest.mark.parametrize("precious", ["model", "parent of the model", "checkpoint", "data", "working directory"])
def test_overwrite_spares_what_is_in_use(out, model, images, monkeypatch, precious):
    out.mkdir()
    arguments = {"model": MODEL, "data": images, "checkpoint": FOLDER / "model.safetensors"}
    if precious == "model":
        arguments["model"] = f"local-dir:{shutil.copytree(model, out, dirs_exist_ok=True)}"
    elif precious == "parent of the model":
        arguments["model"] = f"local-dir:{shutil.copytree(model, out / 'model')}"
    elif precious == "checkpoint":
        arguments["checkpoint"] = shutil.copy(model / "model.safetensors", out)
    elif precious == "data":
        arguments["data"] = shutil.copytree(images, out / "images")
    else:
        (out / "work").mkdir()
        monkeypatch.chdir(out / "work")
    given = ("-m", arguments["model"], "--data-dir", arguments["data"], "--checkpoint", arguments["checkpoint"])
    refused(out, 2, [out, "would be lost"], *given, "--overwrite")


def test_disk_full(out):
    """A file size limit stands for the full disk: both make the write of the weights fail half-way."""
    out.mkdir()
    (out / "old.txt").write_text("the old folder")
    command = [sys.executable, "-m", "normswap_cli", "convert", "-q", "-o", out, "--overwrite", "-m", MODEL]
    command += [*DATA, *FAST]
    limit = 200_000  # bytes: more than config.json, less than the weights
    done = subprocess.run(
        [str(argument) for argument in command],
        capture_output=True,
        text=True,
        env=QUIET_ENV,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit)),
    )
    assert done.returncode == 1, done.stderr
    assert done.stdout == ""
    assert_one_line(done.stderr, [out, "cannot be written", "File too large"])
    assert listing(out.parent) == [Path("out"), Path("out/old.txt")]


def test_interrupt(tmp_path):
    """Ctrl-C in the middle of the work."""
    command = [sys.executable, "-m", "normswap_cli", "demo", "-o", tmp_path / "out"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=QUIET_ENV)
    assert process.stderr is not None
    for line in process.stderr:
        if line.startswith("evaluate"):  # said right before the work starts
            break
    process.send_signal(signal.SIGINT)
    stdout, stderr = process.communicate(timeout=60)
    assert process.returncode == 1
    assert stderr.split() == ["Aborted!"]
    assert stdout == ""
    assert not list(tmp_path.iterdir())


def test_a_converted_model_is_told_apart(out):
    """Nothing is left to swap, and options that would be ignored are refused."""
    assert run("convert", "-q", "-o", out, *FAST, "-m", MODEL, *DATA).exit_code == 0
    assert {path.name for path in out.iterdir()} == FILES
    again = out.parent / "again"
    refused(again, 3, ["no LayerNorm", "nothing to swap"], "-m", f"local-dir:{out}", *DATA)
    checkpoint = ("--checkpoint", FOLDER / "model.safetensors")
    for ignored in (checkpoint, ("--num-classes", 7), ("--img-size", 64)):
        result = run("evaluate", "-m", f"local-dir:{out}", *EVAL, *ignored)
        assert result.exit_code != 0, ignored
        assert_one_line(result.stderr, [ignored[0]])
