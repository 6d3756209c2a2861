"""Graphs for deployment: what is written runs, gives the model's answers, says what is in it, and appears only then."""

import json
import shutil

import onnx
import onnxruntime
import pytest
import torch
from torch import nn

import normswap
from normswap import atomic, export_model
from normswap.demo import FOLDER, MODEL
from normswap.errors import ArgumentError, CheckFailedError, ModelRefusedError, OutputError
from normswap.exporting import onnx_file as onnxfile

from ..cli.test_bad_input import assert_one_line, truncate
from ..cli.test_cli import DEMO, IMAGES, one_object, run
from ..models import family

# An exported graph runs the same float32 operations, fused otherwise: 1e-6 on logits of order 10.
GRAPH_FLOAT32 = 1e-4
KEPT = ("blocks.0.norm1", "norm")


class Small(nn.Module):
    """A quick stand-in where a test is about files, not about transformers."""

    def __init__(self, seed=0):
        super().__init__()
        torch.manual_seed(seed)
        self.layer = nn.Linear(48, 5)

    def forward(self, x):
        return self.layer(x.flatten(1))  # [B, C, H, W] -> [B, K]


class OneBatch(Small):
    """Takes two images at once and no other number."""

    def forward(self, x):
        return super().forward(x.reshape(2, 3, 4, 4))


PICTURES = [torch.randn(5, 3, 4, 4, generator=torch.Generator().manual_seed(3))]


@pytest.fixture(scope="module")
def converted(tmp_path_factory):
    """The demo model, converted and exported in one go."""
    out = tmp_path_factory.mktemp("export") / "out"
    result = run("convert", *DEMO, "-o", out, "--export", "onnx", "--json")
    assert result.exit_code == 0, result.stderr
    return out, result


@pytest.fixture(scope="module")
def partial(tmp_path_factory):
    out = tmp_path_factory.mktemp("partial") / "out"
    keep = [argument for site in KEPT for argument in ("--keep", site)]
    assert run("convert", *DEMO, "--method", "channel", "-o", out, *keep, "-q").exit_code == 0
    return out


@pytest.fixture
def folder(converted, tmp_path):
    """A copy of the converted folder, without the graph."""
    return shutil.copytree(converted[0], tmp_path / "out", ignore=shutil.ignore_patterns("*.onnx"))


def session(path):
    return onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])


def test_convert_writes_a_graph_without_layernorm(converted):
    out, result = converted
    record = one_object(result)["export"]
    assert record["files"] == [str(out / "model.onnx")]
    assert record["size"] == (out / "model.onnx").stat().st_size
    assert (record["opset"], record["dtype"], record["input_shape"]) == (18, "fp32", ["batch", 3, 32, 32])
    assert (record["layer_norms"], record["graph"]["layer_norms"], record["graph"]["chains"]) == ([], [], [])
    assert record["comparison"]["n"] == 32
    assert record["comparison"]["agreement"] == 100
    assert 0 < record["comparison"]["max_abs_diff"] < GRAPH_FLOAT32
    assert "0 LayerNormalization nodes, 0 ReduceMean/Sqrt chains" in result.stderr
    proto = onnx.load(out / "model.onnx")
    types = [node.op_type for node in proto.graph.node]
    assert record["graph"]["nodes"] == {kind: types.count(kind) for kind in set(types)}
    assert not {"LayerNormalization", "ReduceMean", "Sqrt"} & set(types)
    said = {entry.key: entry.value for entry in proto.metadata_props}
    assert said["normswap.layer_norms"] == "none"
    assert json.loads(said["normswap.preprocessing"])["input_size"] == [3, 32, 32]


@pytest.mark.parametrize("count", [1, 3])
def test_the_batch_size_is_open(converted, count):
    model = normswap.load(converted[0])
    x = 0.1 * torch.randn(count, 3, 32, 32)  # nearly grey: loud noise is like no digit, and its logits are 50
    (found,) = session(converted[0] / "model.onnx").run(["logits"], {"images": x.numpy()})
    with torch.no_grad():
        torch.testing.assert_close(torch.from_numpy(found), model(x), atol=GRAPH_FLOAT32, rtol=0)


def test_pt2(folder):
    result = run("export", folder, "--format", "pt2", *IMAGES, "--json")
    assert result.exit_code == 0, result.stderr
    record = one_object(result)
    assert record["comparison"] | {"max_abs_diff": 0, "agreement": 100, "non_finite": 0} == record["comparison"]
    assert record["opset"] is None
    extra = {"normswap.json": ""}
    program = torch.export.load(folder / "model.pt2", extra_files=extra)
    assert json.loads(extra["normswap.json"])["normswap.layer_norms"] == "none"
    x = 0.1 * torch.randn(3, 3, 32, 32)
    with torch.no_grad():
        torch.testing.assert_close(program.module()(x), normswap.load(folder)(x), atol=GRAPH_FLOAT32, rtol=0)
    again = run("export", folder, "--format", "pt2", *IMAGES, "-q")
    assert again.exit_code == 2
    assert_one_line(again.stderr, ["model.pt2", "--overwrite"])
    random = run("export", folder, "--format", "pt2", "--overwrite")
    assert random.exit_code == 0
    assert "random images" in random.stderr
    assert "next       normswap export" in random.stderr


def test_kept_layernorms_are_said_everywhere(partial):
    result = run("export", partial, *IMAGES, "--json")
    assert result.exit_code == 0, result.stderr
    record = one_object(result)
    assert tuple(record["layer_norms"]) == tuple(record["graph"]["layer_norms"]) == KEPT
    assert record["graph"]["nodes"]["LayerNormalization"] == 2
    assert record["graph"]["chains"] == []
    assert record["comparison"]["agreement"] == 100
    assert "stayed     2 LayerNorms: blocks.0.norm1, norm" in result.stderr
    card = (partial / "README.md").read_text()
    assert "with fewer LayerNorms" in card
    assert all(f"- LayerNorm stays at `{site}`: " in card for site in KEPT)
    said = {entry.key: entry.value for entry in onnx.load(partial / "model.onnx").metadata_props}
    assert said["normswap.layer_norms"] == ", ".join(KEPT)


def test_a_layernorm_that_was_not_kept_is_an_error(partial, tmp_path):
    with pytest.raises(CheckFailedError, match=r"1 LayerNorms that were not kept, as norm: not saved") as caught:
        export_model(normswap.load(partial), tmp_path / "m.pt2", format="pt2", kept=["blocks.0.norm1"])
    assert caught.value.report.layer_norms == KEPT
    assert not list(tmp_path.iterdir())


def test_fp16(folder):
    result = run("export", folder, "--dtype", "fp16", "--against", MODEL, *IMAGES, "--json")
    assert result.exit_code == 0, result.stderr
    record = one_object(result)
    half = record["half"]
    assert (half["non_finite"], half["norms"], len(half["original_norms"])) == (0, [], 9)
    assert {"tensor", "largest", "original"} <= half["tensors"][0].keys()
    assert half["tensors"][0]["largest"] < 65504
    assert record["comparison"]["agreement"] == 100
    (given,) = session(folder / "model.fp16.onnx").get_inputs()
    assert (given.type, given.shape[1:]) == ("tensor(float16)", [3, 32, 32])
    assert "no LayerNorm here" in result.stderr
    assert "none overflows" in result.stderr


def test_fp16_that_overflows_is_not_saved(folder, tmp_path):
    model = normswap.load(folder)
    with torch.no_grad():
        model.blocks[1].mlp.fc1.bias += 1e5
    batch = [torch.randn(2, 3, 32, 32)]
    with pytest.raises(CheckFailedError, match="NaN or infinity for 2 of 2 images"):
        export_model(model, tmp_path / "new" / "m.pt2", batch, "pt2", dtype="fp16")
    assert not list((tmp_path / "new").iterdir())


def test_int8_is_measured_and_not_saved(folder):
    result = run("export", folder, "--int8", "--against", MODEL, *IMAGES, "--calib-samples", 16, "--json")
    assert result.exit_code == 0, result.stderr
    stages = one_object(result)["int8"]["stages"]
    name = f"local-dir:{folder}"
    assert [stage["name"] for stage in stages] == ["original", "original INT8", name, f"{name} INT8"]
    float_, int8 = stages[0], stages[1]
    assert int8["kl"] > float_["kl"] == 0  # something was quantised
    assert all(stage["agreement"] > 80 and stage["n"] == 32 for stage in stages)  # digits are easy; guessing gives 10
    assert sorted(path.name for path in folder.glob("model.*")) == ["model.onnx", "model.safetensors"]


def test_too_small_a_tolerance(folder):
    before = sorted(folder.iterdir())
    result = run("export", folder, "--format", "pt2", "--dtype", "fp16", *IMAGES, "--atol", 1e-9, "--json")
    assert result.exit_code == 4
    assert one_object(result)["comparison"]["max_abs_diff"] > 1e-9
    assert "more than --atol 1e-09: not saved" in result.stderr.splitlines()[-1]
    assert sorted(folder.iterdir()) == before


def test_static(tmp_path):
    report = export_model(Small(), tmp_path / "m.onnx", PICTURES, static=3)  # 5 images: the second batch is filled up
    assert report.input_shape == (3, 3, 4, 4)
    assert report.comparison.max_abs_diff < GRAPH_FLOAT32
    assert session(tmp_path / "m.onnx").get_inputs()[0].shape == [3, 3, 4, 4]


def test_a_model_that_fixes_its_batch_wants_static(tmp_path):
    with pytest.raises(ModelRefusedError, match=r"cannot leave the batch size open .* `static`"):
        export_model(OneBatch(), tmp_path / "m.pt2", [PICTURES[0][:4]], "pt2")
    export = export_model(OneBatch(), tmp_path / "m.pt2", [PICTURES[0][:2]], "pt2", static=2)
    assert export.input_shape == (2, 3, 4, 4)


def test_weights_in_a_file_of_their_own(tmp_path):
    path = tmp_path / "m.onnx"
    first = export_model(Small(), path, PICTURES, external_data=True)
    assert len(first.files) == 2
    assert {str(p) for p in tmp_path.iterdir()} == set(first.files)
    second = export_model(Small(seed=1), path, PICTURES, external_data=True, overwrite=True)
    assert second.files[1] != first.files[1]  # another name, so that a graph never finds the weights of another
    assert {str(p) for p in tmp_path.iterdir()} == set(second.files)
    (found,) = session(path).run(None, {"images": PICTURES[0].numpy()})
    with torch.no_grad():
        torch.testing.assert_close(torch.from_numpy(found), Small(seed=1)(PICTURES[0]), atol=1e-5, rtol=0)


def test_opset(tmp_path):
    export_model(Small(), tmp_path / "m.onnx", PICTURES, opset=21)
    assert onnx.load(tmp_path / "m.onnx").opset_import[0].version == 21
    with pytest.raises(ArgumentError, match="`opset` 99"):
        export_model(Small(), tmp_path / "n.onnx", PICTURES, opset=99)
    assert [p.name for p in tmp_path.iterdir()] == ["m.onnx"]


def test_headless(tmp_path):
    report = export_model(family("headless"), tmp_path / "m.pt2", format="pt2")
    assert report.comparison.agreement is None
    assert report.comparison.max_abs_diff == 0
    assert len(report.layer_norms) == 5
    json.dumps(report.to_json())


@pytest.mark.parametrize("package", ["onnx", "onnxscript", "onnxruntime"])
def test_a_missing_extra_is_named(folder, tmp_path, monkeypatch, package):
    monkeypatch.setattr(onnxfile, "find_spec", lambda name: None if name == package else object())
    for arguments in (("export", folder), ("convert", *DEMO, "-o", tmp_path / "new", "--export", "onnx")):
        result = run(*arguments, "-q")
        assert result.exit_code == 1
        assert_one_line(result.stderr, [package, "normswap[onnx]"])
    assert not (tmp_path / "new").exists()


CASES = {
    "nothing to export": (2, ["-m MODEL"], []),
    "two models": (2, ["-m MODEL"], ["OUT", "-m", MODEL]),
    "no file for -m": (2, ["--output"], ["-m", MODEL]),
    "not converted": (2, ["no normswap.json", "-m local-dir:"], [FOLDER]),
    "no such folder": (2, ["no normswap.json"], ["/no/where"]),
    "another suffix": (2, ["ends in .onnx"], ["OUT", "-o", "model.pb"]),
    "fp16 without images": (2, ["real images", "--data-dir"], ["OUT", "--dtype", "fp16"]),
    "int8 without images": (2, ["--int8", "--data-dir"], ["OUT", "--int8"]),
    "int8 of pt2": (2, ["INT8", "ONNX"], ["OUT", "--int8", "--format", "pt2", *IMAGES]),
    "tolerance is no number": (2, ["--atol"], ["OUT", "--atol", "nan"]),
    "folder in the way": (2, ["is not a file"], ["OUT", "-o", "OUT/model.onnx"]),
}


@pytest.mark.parametrize("case", CASES)
def test_bad_input(folder, case):
    code, says, arguments = CASES[case]
    if case == "folder in the way":
        (folder / "model.onnx").mkdir()
    before = sorted(folder.iterdir())
    result = run("export", *(str(a).replace("OUT", str(folder)) for a in arguments), *(["-q"] if arguments else []))
    assert result.exit_code == code, result.stderr
    assert_one_line(result.stderr, says)
    assert sorted(folder.iterdir()) == before


def test_damaged_weights(folder):
    truncate(folder / "model.safetensors")
    result = run("export", folder, "-q")
    assert result.exit_code == 1
    assert_one_line(result.stderr, ["model.safetensors", "truncated"])
    assert not list(folder.glob("*.onnx"))


def test_a_damaged_graph_does_not_load(tmp_path):
    export_model(Small(), tmp_path / "m.onnx", PICTURES)
    truncate(tmp_path / "m.onnx")
    with pytest.raises(CheckFailedError, match="cannot load the graph"):
        onnxfile.OnnxModel(tmp_path / "m.onnx")


def test_a_file_appears_whole_or_not_at_all(tmp_path):
    target = tmp_path / "deep" / "file"
    with pytest.raises(OSError, match="half"), atomic.new_file(target) as beside:
        raise OSError(beside.write_text("half") and "half")
    assert not list(tmp_path.rglob("*file*"))
    with atomic.new_file(target) as beside:
        beside.write_text("whole")
        (beside.parent / "more").write_text("part")
    assert {p.name: p.read_text() for p in target.parent.iterdir()} == {"file": "whole", "more": "part"}
    with pytest.raises(ArgumentError, match="there already"), atomic.new_file(target):
        pass
    with pytest.raises(OutputError, match="still stands"), atomic.new_file(target, overwrite=True):
        raise OSError("disk full")
    assert target.read_text() == "whole"
