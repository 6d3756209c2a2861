"""The promise of the output folder: plain timm loads it, without normswap, and answers with the very same numbers."""

import json
import os
import shutil
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

import normswap
from normswap.demo import FOLDER, MODEL

from ..cli.test_bad_input import assert_one_line, refused
from ..cli.test_cli import IMAGES, run

# What a user runs who never heard of normswap: importing it is made impossible first.
SCRIPT = r"""
import json, sys

class Blocker:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in ("normswap", "normswap_cli", "cli"):
            raise ImportError(f"{name} is blocked")

sys.meta_path.insert(0, Blocker())
for name in ("normswap", "normswap_cli"):
    try:
        __import__(name)
    except ImportError as error:
        assert "is blocked" in str(error)
    else:
        raise AssertionError(f"{name} could be imported")

import re
from safetensors.torch import save_file

folder, probe, answers = sys.argv[1:]
# What the model card says, as it stands.
(block,) = re.findall("```python\n(.*?)```", open(f"{folder}/README.md").read(), re.S)
exec(block.replace("PATH", folder))
model = model.eval()
images = torch.load(probe)
with torch.no_grad():
    save_file({"logits": model(images)}, answers)
try:
    timm.create_model(f"local-dir:{folder}", pretrained=True)
    without = None
except RuntimeError as error:
    without = str(error)
facts = {
    "class": type(model).__name__,
    "modules": sorted({type(module).__name__ for module in model.modules()}),
    "norms": [name for name, m in model.named_modules() if isinstance(m, (torch.nn.LayerNorm, torch.nn.BatchNorm1d))],
    "parameters": {name: list(p.shape) for name, p in model.named_parameters()},
    "num_classes": model.num_classes,
    "config": timm.data.resolve_model_data_config(model),
    "labels": list(model.pretrained_cfg["label_names"]),
    "without": without,
    "ours": sorted(name for name in sys.modules if name.partition(".")[0] in ("normswap", "normswap_cli", "cli")),
}
print(json.dumps(facts))
"""


@pytest.fixture(scope="module")
def conversion(tmp_path_factory):
    out = tmp_path_factory.mktemp("stock") / "out"
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # as in the subprocess: another number of threads may add in another order
    model = normswap.load_model(MODEL)
    result = normswap.convert(model, normswap.load_images(model, FOLDER, "train").draw(32, 0))
    result.save(out)
    probe = torch.randn(16, 3, 32, 32, generator=torch.Generator().manual_seed(3))
    with torch.no_grad():
        logits = result.model(probe)
        original = model(probe)
    torch.set_num_threads(threads)
    assert (logits - original).abs().max() > 1e-3  # a folder that holds the original would prove nothing
    return result, out, probe, logits


@pytest.fixture(scope="module")
def stock(conversion, tmp_path_factory):
    _, out, probe, _ = conversion
    folder = tmp_path_factory.mktemp("probe")
    torch.save(probe, folder / "probe.pt")
    arguments = [str(out), str(folder / "probe.pt"), str(folder / "answers.safetensors")]
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", SCRIPT, *arguments]
    done = subprocess.run(command, capture_output=True, text=True, cwd=folder, env=env)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout), load_file(folder / "answers.safetensors")["logits"]


def test_same_answers_to_the_bit(conversion, stock):
    assert torch.equal(stock[1], conversion[3])


def test_no_trace_of_normswap_or_layer_norm(stock):
    facts, _ = stock
    assert facts["ours"] == []
    assert facts["norms"] == []
    assert not [name for name in facts["modules"] if "norm" in name.lower()]
    assert "TokenBound" in facts["modules"]  # which the card defines
    assert facts["class"] == "VisionTransformer"


def test_without_norm_layer_timm_refuses(stock):
    """Loaded as an ordinary ViT the folder must fail loudly, not run with fresh LayerNorms."""
    without = stock[0]["without"]
    assert without is not None
    assert "Missing key" in without
    assert "blocks.0.norm1.weight" in without


def test_names_and_shapes_are_timms(conversion, stock):
    _, out, _, _ = conversion
    shapes = {name: list(tensor.shape) for name, tensor in load_file(out / "model.safetensors").items()}
    assert stock[0]["parameters"] == shapes
    before = {name: list(tensor.shape) for name, tensor in load_file(FOLDER / "model.safetensors").items()}
    assert shapes == {name: shape for name, shape in before.items() if "norm" not in name}


def test_preprocessing_and_labels_come_along(stock):
    facts, _ = stock
    source = json.loads((FOLDER / "config.json").read_text())
    expected = source["pretrained_cfg"]
    assert {k: facts["config"][k] for k in ("mean", "std", "interpolation", "crop_pct", "input_size")} == {
        k: expected[k] for k in ("mean", "std", "interpolation", "crop_pct", "input_size")
    }
    assert facts["labels"] == source["label_names"]
    assert facts["num_classes"] == 10


def test_normswap_loads_it_too(conversion):
    result, out, probe, logits = conversion
    loaded = normswap.load(out)
    assert not [path for path, module in loaded.named_modules() if isinstance(module, nn.LayerNorm)]
    assert loaded.state_dict().keys() == result.model.state_dict().keys()
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with torch.no_grad():
        assert torch.equal(loaded(probe), logits)
    torch.set_num_threads(threads)


def test_there_is_nothing_left_to_swap(conversion, tmp_path):
    (tmp_path / "to").mkdir()
    refused(tmp_path / "to" / "again", 3, ["no LayerNorm", "nothing to swap"], "-m", f"local-dir:{conversion[1]}")


@pytest.mark.parametrize("option", ["--checkpoint", "--num-classes", "--img-size"])
def test_options_that_would_be_ignored_are_refused(conversion, option):
    value = {"--checkpoint": FOLDER / "model.safetensors", "--num-classes": 7, "--img-size": 64}[option]
    result = run("evaluate", "-m", f"local-dir:{conversion[1]}", *IMAGES, "-q", option, value)
    assert result.exit_code != 0
    assert_one_line(result.stderr, [option])


DAMAGE = {
    "model.safetensors": [b"", None],
    "normswap.json": [b"{", b"[]", b"{}", b'{"format": 1, "edits": {}}', b'{"format": 99, "edits": {}}'],
    "config.json": [b"{", b"{}"],
}


@pytest.mark.parametrize(("name", "content"), [(name, c) for name, contents in DAMAGE.items() for c in contents])
def test_a_damaged_folder(conversion, tmp_path, name, content):
    folder = shutil.copytree(conversion[1], tmp_path / "copy")
    whole = (folder / name).read_bytes()
    (folder / name).write_bytes(whole[: len(whole) // 2] if content is None else content)
    result = run("evaluate", "-m", f"local-dir:{folder}", *IMAGES, "-q")
    assert result.exit_code == 1
    assert_one_line(result.stderr, [folder])
