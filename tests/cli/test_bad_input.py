"""Bad input through the command line: the right exit code, one line that says what is wrong, and nothing written."""

import argparse
import json
import re
import resource
import shutil
import signal
import sys
import tarfile
from pathlib import Path

import pytest
import timm
import torch
from safetensors.torch import load_file, save_file

from normswap.demo import FOLDER, MODEL

from ..child import started
from .test_cli import DEMO, IMAGES, one_object, run

VIT = ("vit_tiny_patch16_224", "--img-size=32", "--num-classes=10")
VIT += tuple(f"--model-kwargs={argument}" for argument in ("patch_size=4", "embed_dim=48", "depth=4", "num_heads=3"))


def listing(folder):
    return sorted(path.relative_to(folder) for path in folder.rglob("*"))


def assert_one_line(stderr, says):
    lines = [line for line in stderr.splitlines() if line and not line.startswith(("Usage: ", "Try 'normswap"))]
    assert len(lines) == 1, stderr
    assert lines[0].startswith("Error: ")
    assert "run again with -vv" not in lines[0]  # said of what normswap did not foresee
    for text in says:
        assert str(text) in lines[0]


def refused(out, code, says, *arguments):
    """Run ``convert`` on the demo, with -q and other arguments: it must fail as said and leave no trace."""
    before = listing(out.parent)
    result = run("convert", *DEMO, "-q", "-o", out, *arguments)
    assert result.exit_code == code, result.stderr
    assert result.stdout == ""
    assert_one_line(result.stderr, says)
    assert listing(out.parent) == before
    return result.stderr


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
    with tarfile.open(FOLDER / "train.tar") as tar:
        names = sorted(name for name in tar.getnames() if name.endswith(".png"))
        for digit in "0123456789":
            for name in [name for name in names if name.startswith(f"{digit}/")][:4]:
                tar.extract(name, folder, filter="data")
    assert len(list(folder.rglob("*.png"))) == 40
    return folder


@pytest.fixture
def weights():
    return load_file(FOLDER / "model.safetensors")


def truncate(path):
    path.write_bytes(path.read_bytes()[: path.stat().st_size * 6 // 10])


ARGUMENTS = {
    "no such model folder": (2, ["/no/where", "no such folder"], ["-m", "local-dir:/no/where"]),
    "typo in the model": (2, ["_225", "did you mean", "vit_tiny_patch16_224"], ["-m", "vit_tiny_patch16_225"]),
    "unknown model": (2, ["nonsense", "list_models"], ["-m", "nonsense"]),
    "unknown tag": (2, ["no_tag", "vit_tiny_patch16_224"], ["-m", "vit_tiny_patch16_224.no_tag", "--pretrained"]),
    "no weights": (2, ["test_vit", "--pretrained", "--checkpoint"], ["-m", "test_vit"]),
    "two weights": (2, ["exclude"], ["-m", "test_vit", "--pretrained", "--checkpoint", FOLDER / "model.safetensors"]),
    "no such checkpoint": (2, ["none.pth", "exist"], ["--checkpoint", "/no/where/none.pth"]),
    "no EMA without checkpoint": (2, ["--use-ema", "--checkpoint"], ["--use-ema"]),
    "random head": (2, ["10 classes", "--num-classes 7", "random head"], ["--num-classes", 7]),
    "no such image folder": (2, ["/no/images", "exist"], ["--data-dir", "/no/images"]),
    "no such split": (2, ["nonsense", "split"], ["--split", "nonsense"]),
    "no such training split": (2, ["nonsense", "split"], ["--train-split", "nonsense"]),
    "no such device": (2, ["--device", "nonsense"], ["--device", "nonsense"]),
    "no such interpolation": (2, ["interpolation", "nonsense"], ["--interpolation", "nonsense"]),
    "negative crop": (2, ["--crop-pct"], ["--crop-pct", -1]),
    "std 0": (2, ["--std"], ["--std", 0, 0, 0]),
    "seed too large": (2, ["--seed"], ["--seed", 2**70]),
    "budget is no number": (2, ["--max-drop"], ["--max-drop", "nan"]),
    "tolerance is no number": (2, ["--atol"], ["--atol", "nan"]),
    "4 channels": (1, ["4 channels"], ["--in-chans", 4]),
}


@pytest.mark.parametrize("case", ARGUMENTS)
def test_arguments(out, case):
    code, says, arguments = ARGUMENTS[case]
    refused(out, code, says, *arguments)


def test_no_images_named(out):
    result = run("convert", "-m", MODEL, "-o", out, "-q")
    assert result.exit_code == 2
    assert_one_line(result.stderr, ["--data-dir"])
    result = run("convert", "-m", MODEL, "-o", out, "-q", "--dataset", "torch/cifar10")
    assert result.exit_code in (1, 2)
    assert_one_line(result.stderr, ["torch/cifar10", "--data-dir"])
    assert not list(out.parent.iterdir())


def test_folder_without_config(out, model):
    (model / "config.json").unlink()
    refused(out, 2, [model, "no config.json"], "-m", f"local-dir:{model}")


def test_folder_without_weights(out, model):
    (model / "model.safetensors").unlink()
    refused(out, 1, [model, "model.safetensors"], "-m", f"local-dir:{model}")


@pytest.mark.parametrize("text", ["{", "[]", "{}", '{"architecture": "no_such_vit", "pretrained_cfg": {}}'])
def test_config_that_is_none(out, model, text):
    (model / "config.json").write_text(text)
    refused(out, 1, [model, "config"], "-m", f"local-dir:{model}")


def test_folder_without_prefix(out, model):
    refused(out, 2, [f"local-dir:{model}", "is a folder"], "-m", model)


def test_model_without_layer_norm(out, tmp_path):
    save_file(timm.create_model("test_vit4").state_dict(), tmp_path / "test_vit4.safetensors")
    says = ["test_vit4", "no LayerNorm", "RmsNorm"]
    refused(out, 3, says, "-m", "test_vit4", "--checkpoint", tmp_path / "test_vit4.safetensors", "--no-labels")
    result = run("inspect", "-m", "test_vit4", "-q")
    assert result.exit_code == 3
    assert_one_line(result.stderr, says)


@pytest.mark.parametrize("where", ["folder", "safetensors", "pth", "html.pth", "empty.pth", "empty.safetensors"])
def test_unreadable_weights(out, model, tmp_path, weights, where):
    path = {"folder": model / "model.safetensors"}.get(where, tmp_path / f"weights.{where}")
    if where == "pth":
        torch.save(weights, path)
    elif where == "safetensors":
        shutil.copy(model / "model.safetensors", path)
    elif where == "html.pth":
        path.write_text("<!doctype html><title>404</title>" * 9)
    elif where != "folder":
        path.touch()
    if where in ("folder", "safetensors", "pth"):
        truncate(path)
    checkpoint = () if where == "folder" else ("--checkpoint", path)
    line = refused(out, 1, [model if where == "folder" else path], "-m", f"local-dir:{model}", *checkpoint)
    assert "cannot be read" in line
    assert "run code" not in line  # a broken file is not a dangerous one


def test_wrong_keys(out, model, tmp_path, weights):
    path = tmp_path / "weights.safetensors"
    save_file({name.replace("blocks.0.", "layers.0."): tensor for name, tensor in weights.items()}, path)
    refused(out, 1, [path, "12 missing (blocks.0.norm1.", "12 unexpected (layers.0."], "--checkpoint", path)
    del weights["blocks.2.attn.qkv.weight"]
    save_file(weights, model / "model.safetensors")
    refused(out, 1, [model, "blocks.2.attn.qkv.weight"], "-m", f"local-dir:{model}")


def test_wrong_shapes(out, tmp_path, weights):
    path = tmp_path / "weights.safetensors"
    save_file({**weights, "blocks.1.mlp.fc1.bias": torch.zeros(5)}, path)
    refused(out, 1, [path, "blocks.1.mlp.fc1.bias [5] instead of [192]"], "--checkpoint", path)
    path = FOLDER / "model.safetensors"
    refused(out, 1, [path, "10 rows", "--num-classes 10"], "--checkpoint", path, "--num-classes", 7)


@pytest.mark.parametrize("content", [{}, {"state_dict": {}}, [torch.zeros(2)], {"epoch": 3}, 7])
def test_checkpoint_without_tensors(out, tmp_path, content):
    path = tmp_path / "weights.pth"
    torch.save(content, path)
    refused(out, 1, [path], "--checkpoint", path)


class _Bomb:
    def __init__(self, marker):
        self.marker = marker

    def __reduce__(self):
        return Path.touch, (self.marker,)


@pytest.mark.parametrize("zipped", [True, False])
def test_code_in_a_pickle_never_runs(out, tmp_path, weights, zipped):
    path, marker = tmp_path / "weights.pth", tmp_path / "executed"
    content = {"state_dict": weights, "extra": _Bomb(marker)}
    torch.save(content, path, _use_new_zipfile_serialization=zipped)
    refused(out, 1, [path, "run code", "safetensors"], "--checkpoint", path)
    assert not marker.exists()
    torch.load(path, weights_only=False)  # else the test would show nothing
    assert marker.exists()


NAN_SITES = {
    "blocks.1.norm1.weight": "blocks.1.norm1",
    "patch_embed.proj.weight": "blocks.0.norm1",
    "blocks.2.mlp.fc1.bias": "blocks.2.mlp.fc1",
    "head.bias": "head",
}


@pytest.mark.parametrize("name", NAN_SITES)
def test_nan_in_the_weights(out, model, weights, name):
    weights[name].view(-1)[0] = float("nan")
    save_file(weights, model / "model.safetensors")
    refused(out, 1, [f"Error: {NAN_SITES[name]}: ", "not finite"], "-m", f"local-dir:{model}")


def other(weights):
    return {name: tensor * 0.5 for name, tensor in weights.items()}


WRAPS = {
    "safetensors": lambda w: w,
    "pth": lambda w: w,
    "state_dict.pt": lambda w: {"state_dict": w},
    "model.pth": lambda w: {"model": w},
    "module.pth": lambda w: {f"module.{name}": tensor for name, tensor in w.items()},
    "with_ema.pth": lambda w: {"state_dict": w, "state_dict_ema": other(w)},
    "use_ema.pth.tar": lambda w: {"state_dict": other(w), "state_dict_ema": w},
    # what timm's train.py writes
    "timm.pth.tar": lambda w: {"epoch": 3, "arch": "x", "state_dict": w, "args": argparse.Namespace(lr=0.1)},
}


@pytest.mark.parametrize("name", WRAPS)
def test_checkpoints_that_work(tmp_path, weights, name):
    """A plain name with a checkpoint answers as the demo model does, whose weights are in it."""
    path = tmp_path / name if "." in name else tmp_path / f"weights.{name}"
    (save_file if name == "safetensors" else torch.save)(WRAPS[name](weights), path)
    ema = ["--use-ema"] if name.startswith("use_ema") else []
    arguments = ("-m", *VIT, "--checkpoint", path, "--against", MODEL, *IMAGES, "-q", "--json")
    record = one_object(run("evaluate", *arguments, *ema))
    assert (record["kl"], record["agreement"]) == (0, 100)
    if "ema" in name:  # turned round, the flag gives the other weights
        turned = [] if ema else ["--use-ema"]
        assert one_object(run("evaluate", *arguments, *turned))["kl"] > 0.01


def test_ema_that_is_not_there(out, tmp_path, weights):
    path = tmp_path / "weights.pth"
    torch.save({"state_dict": weights}, path)
    refused(out, 1, [path, "EMA", "--use-ema"], "--checkpoint", path, "--use-ema")


@pytest.mark.parametrize("what", ["empty", "class folders", "text", "empty.tar", "text.tar", "broken.tar"])
def test_no_images(out, tmp_path, what):
    data, note = tmp_path / what, tmp_path / "note.txt"
    note.write_text("no image" * 99)
    if what == "broken.tar":
        shutil.copy(note, data)
    elif what.endswith(".tar"):
        with tarfile.open(data, "w") as tar:
            if what == "text.tar":
                tar.add(note, "0/note.txt")
    else:
        (data / ("" if what == "empty" else "0")).mkdir(parents=True)
        if what == "text":
            shutil.copy(note, data / "0")
    refused(out, 1, [data], "--data-dir", data)


def test_all_images_corrupt(out, images):
    for path in images.rglob("*.png"):
        path.write_text("no image")
    refused(out, 1, ["32 images of", "images", "cannot be read", "0/", ".png"], "--data-dir", images)
    refused(out, 1, ["no image of", "can be read", "0/", ".png"], "--data-dir", images, "--max-skipped", 1000)


def test_one_corrupt_image(out, images):
    broken = sorted(images.rglob("*.png"))[17]
    truncate(broken)
    name = broken.relative_to(images)
    flags = ("--method", "channel", "-j", 0, "--device", "cpu")
    result = run("convert", "-m", MODEL, "--data-dir", images, *flags, "-o", out, "--json")
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
    arguments = ("--data-dir", images, "--calib-samples", 40, "-b", 9, *limit)
    refused(out, 1, [f"{broken} images of", "0/", "--max-skipped"], *arguments)


def test_labels_of_another_task(out, images):
    for digit in "56789":
        shutil.rmtree(images / digit)
    refused(out, 1, [images, "5 classes", "10", "--no-labels"], "--data-dir", images)
    arguments = ("convert", *DEMO, "-o", out, "--method", "channel", "--data-dir", images, "--no-labels", "--json")
    record = one_object(run(*arguments))
    assert record["before"] == {"top1": None, "top5": None, "n": 20}
    assert record["agreement"] > 10
    result = run(*arguments, "--max-drop", 5, "--overwrite", "-q")
    assert result.exit_code == 2  # said before any work is done
    assert_one_line(result.stderr, ["--max-drop", "labels"])


def test_output_not_empty(out):
    out.mkdir()
    (out / "thesis.txt").write_text("years of work")
    refused(out, 2, [out, "--overwrite"])
    assert (out / "thesis.txt").read_text() == "years of work"


@pytest.mark.parametrize("flag", [(), ("--overwrite",)])
def test_output_is_a_file_or_below_one(out, flag):
    out.write_text("years of work")
    refused(out, 2, [out, "not a folder"], *flag)
    for below in (out / "new", out / "new" / "er"):
        result = run("convert", *DEMO, "-q", "-o", below, *flag)
        assert result.exit_code in (1, 2)
        assert_one_line(result.stderr, [out, "not a folder"])
    assert out.read_text() == "years of work"


@pytest.mark.parametrize("precious", ["model", "parent of the model", "checkpoint", "data", "class map", "cwd"])
def test_overwrite_spares_what_is_in_use(out, model, images, monkeypatch, precious):
    (out / "work").mkdir(parents=True)
    given = {
        "model": lambda: ("-m", f"local-dir:{shutil.copytree(model, out, dirs_exist_ok=True)}"),
        "parent of the model": lambda: ("-m", f"local-dir:{shutil.copytree(model, out / 'model')}"),
        "checkpoint": lambda: ("--checkpoint", shutil.copy(model / "model.safetensors", out)),
        "data": lambda: ("--data-dir", shutil.copytree(images, out / "images")),
        "class map": lambda: ("--class-map", shutil.copy(images.parent / "map.txt", out)),
        "cwd": lambda: monkeypatch.chdir(out / "work") or (),
    }
    (images.parent / "map.txt").write_text("\n".join("0123456789"))
    refused(out, 2, [out, "would be lost"], *given[precious](), "--overwrite")


def test_disk_full(out):
    """A file size limit stands for the full disk: both make the write of the weights fail half-way."""
    out.mkdir()
    (out / "old.txt").write_text("the old folder")
    limit = 200_000  # bytes: more than config.json, less than the weights
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, before[1]))
    try:
        done = run("convert", *DEMO, "--method", "moments", "-q", "-o", out, "--overwrite")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert done.exit_code == 1, done.stderr
    assert done.stdout == ""
    assert_one_line(done.stderr, [out, "cannot be written", "File too large"])
    assert listing(out.parent) == [Path("out"), Path("out/old.txt")]


def test_interrupt(tmp_path):
    """Ctrl-C in the middle of the work."""
    command = [sys.executable, "-m", "normswap_cli", "demo", "-o", str(tmp_path / "out")]
    with started(command) as process:
        assert process.stderr is not None
        assert any(line.startswith("evaluate") for line in process.stderr)  # said right before the work starts
        process.send_signal(signal.SIGINT)
        stdout, stderr = process.communicate(timeout=60)
    assert process.returncode == 1
    assert [line for line in stderr.splitlines() if line and not line.startswith("progress ")] == ["Aborted!"]
    assert stdout == ""
    assert not list(tmp_path.iterdir())
