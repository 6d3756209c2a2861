"""Counting an exported graph: every spelling of a LayerNorm is found, and nothing else is taken for one."""

import onnx
import pytest
import torch
from onnx import TensorProto, helper
from torch import nn
from torch.nn import functional as F

from normswap.exporting.layernorm_search import count_onnx, count_program
from normswap.exporting.onnx_file import read_onnx, write_onnx
from normswap.planning.graph import export_program

EPS = 1e-5


def by_hand(x):
    centred = x - x.mean(-1, keepdim=True)
    return centred / (centred.pow(2).mean(-1, keepdim=True) + EPS).sqrt()


def by_product(x):
    centred = x - x.mean(-1, keepdim=True)
    return centred * torch.rsqrt((centred * centred).mean(-1, keepdim=True) + EPS)


def by_moments(x):
    mean = x.mean(-1, keepdim=True)
    variance = (x * x).mean(-1, keepdim=True) - mean * mean
    return (x - mean) / torch.sqrt(variance + EPS)


def by_power(x):
    centred = x - x.mean(-1, keepdim=True)
    return centred * (centred.square().mean(-1, keepdim=True) + EPS) ** -0.5


def by_sum(x):
    centred = x - x.sum(-1, keepdim=True) / x.shape[-1]
    return centred / (centred.square().sum(-1, keepdim=True) / x.shape[-1] + EPS).sqrt()


def by_var(x):
    return (x - x.mean(-1, keepdim=True)) / (x.var(-1, keepdim=True, unbiased=False) + EPS).sqrt()


def by_var_mean(x):
    variance, mean = torch.var_mean(x, dim=-1, keepdim=True, correction=0)
    return (x - mean) * torch.rsqrt(variance + EPS)


SPELLINGS = [by_hand, by_product, by_moments, by_power, by_sum, by_var, by_var_mean]


class Spelt(nn.Module):
    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, x):
        return self.function(x)


class Others(nn.Module):
    """What looks like parts of a LayerNorm and is none: attention's scale, pooling, L2, RMSNorm, a weight's norm."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(4, 4))

    def forward(self, x):
        scale = x.abs().sum().sqrt()
        scores = (x / scale) @ (x / scale).transpose(-2, -1)
        pooled = (x - x.mean(-1, keepdim=True)).mean(1, keepdim=True)
        length = x / (x.square().sum(-1, keepdim=True) + EPS).sqrt()
        rms = x * torch.rsqrt(x.square().mean(-1, keepdim=True) + EPS)
        standardised = x @ by_hand(self.weight)
        return scores + pooled + length + rms + standardised


@pytest.mark.parametrize("function", SPELLINGS)
def test_every_spelling_is_found_in_a_program(function):
    model = nn.Sequential(nn.Conv2d(3, 3, 1), Spelt(function))
    x = torch.randn(2, 3, 4, 8)
    torch.testing.assert_close(Spelt(function)(x), F.layer_norm(x, (8,), eps=EPS), atol=1e-5, rtol=1e-5)
    found = count_program(export_program(model, x, dynamic=True))
    assert (found.layer_norms, found.chains) == ((), ("1",))
    assert found.nodes["conv2d"] == 1


def test_nothing_else_is_taken_for_one():
    found = count_program(export_program(Others(), torch.randn(2, 4, 4)))
    assert found.norms == ()
    assert found.nodes["sqrt"] >= 3
    assert found.nodes["mean"] >= 4


def test_a_whole_one_is_named_by_its_module():
    model = nn.Sequential(nn.Identity(), nn.Sequential(nn.LayerNorm(8), nn.GELU()))
    found = count_program(export_program(model, torch.randn(2, 8)))
    assert (found.layer_norms, found.chains) == (("1.0",), ())
    assert "1 LayerNormalization nodes" in found.line()
    assert "1.0" in found.line()


def test_onnx_has_the_same(tmp_path):
    """One graph with every spelling, a whole LayerNorm and the decoys, through torch's exporter and its optimiser."""
    model = nn.Sequential(*map(Spelt, SPELLINGS), Others(), nn.LayerNorm(4))
    program = export_program(model, torch.randn(2, 4, 4), dynamic=True)
    write_onnx(program, tmp_path / "m.onnx")
    proto = read_onnx(tmp_path / "m.onnx")
    found = count_onnx(proto)
    assert found.chains == tuple(map(str, range(len(SPELLINGS)))) == count_program(program).chains
    assert found.layer_norms == ("8",)
    assert sum(found.nodes.values()) == len(proto.graph.node)
    assert found.nodes["LayerNormalization"] == 1


@pytest.mark.parametrize("square", ["Pow", "Mul"])
def test_onnx_without_the_exporters_notes(square):
    """The chain as other exporters write it: constants in nodes, no module paths."""
    two = helper.make_node("Constant", [], ["two"], value=helper.make_tensor("v", TensorProto.FLOAT, [], [2.0]))
    eps = helper.make_node("Constant", [], ["eps"], value=helper.make_tensor("v", TensorProto.FLOAT, [], [EPS]))
    nodes = [
        helper.make_node("ReduceMean", ["x"], ["mean"], keepdims=1),
        helper.make_node("Sub", ["x", "mean"], ["centred"]),
        helper.make_node(square, ["centred", "two" if square == "Pow" else "centred"], ["squared"]),
        helper.make_node("ReduceMean", ["squared"], ["variance"], keepdims=1),
        helper.make_node("Add", ["variance", "eps"], ["floored"]),
        helper.make_node("Sqrt", ["floored"], ["sigma"], name="the_root"),
        helper.make_node("Div", ["centred", "sigma"], ["y"]),
    ]
    value = [helper.make_tensor_value_info(name, TensorProto.FLOAT, [2, 8]) for name in ("x", "y")]
    graph = helper.make_graph([two, eps, *nodes], "g", value[:1], value[1:])
    proto = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)])
    onnx.checker.check_model(proto)
    assert count_onnx(proto).chains == ("the_root",)
    for gone in ("Sub", "Div", "Sqrt"):  # without any one of its parts it is no LayerNorm
        kept = [node for node in (two, eps, *nodes) if node.op_type != gone]
        assert count_onnx(helper.make_model(helper.make_graph(kept, "g", value[:1], value[1:]))).norms == ()
