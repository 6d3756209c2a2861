"""Where a scale and a shift may go, operator by operator: each trap a small module, its verdict, and an exact fold."""

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from normswap import fold_norms, make_plan, swap_norms
from normswap.surgery.fold import max_difference
from normswap.surgery.swap import batch_norms

from ..models import randomise_statistics, randomised
from ..tolerance import FOLD_FLOAT64

WIDTH, HEADS = 12, 3


class _Trap(nn.Module):
    """A convolution stem, a norm and what ``read`` does with tokens `[B, N, C]`; layers are given by name."""

    def __init__(self, read, **layers: nn.Module) -> None:
        super().__init__()
        self.read = read
        self.stem = nn.Conv2d(3, WIDTH, 2, 2)
        self.norm = nn.LayerNorm(WIDTH)
        self.head = nn.Linear(WIDTH, WIDTH)
        for name, layer in layers.items():
            setattr(self, name, layer)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.read(self, self.stem(x).flatten(2).transpose(1, 2))  # [B, 3, H, W] -> [B, N, C]


class _SplitBias(nn.Module):
    """Attention whose qkv bias is made in forward, with the k part outside the state dict, as in BEiT and EVA."""

    def __init__(self, rotate: bool = False, persistent: bool = False, fused: bool = True, mask: bool = False) -> None:
        super().__init__()
        self.qkv = nn.Linear(WIDTH, 3 * WIDTH, bias=False)
        self.q_bias, self.v_bias = nn.Parameter(torch.randn(WIDTH)), nn.Parameter(torch.randn(WIDTH))
        self.register_buffer("k_bias", torch.zeros(WIDTH), persistent=persistent)
        self.register_buffer("angle", torch.randn(16, WIDTH // HEADS), persistent=False)
        self.rotate, self.fused, self.mask = rotate, fused, mask

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        qkv = F.linear(x, self.qkv.weight, torch.cat((self.q_bias, self.k_bias, self.v_bias)))
        qkv = qkv.reshape(*x.shape[:2], 3, HEADS, -1).permute(2, 0, 3, 1, 4)  # [B, N, 3*C] -> [3, B, heads, N, d]
        q, k, v = qkv.unbind(0)
        if self.rotate:
            k = k * self.angle
        if self.fused:
            x = F.scaled_dot_product_attention(q, k, v)
        else:
            logits = q @ k.transpose(-2, -1)
            x = (logits + self.angle[:, :1] if self.mask else logits.relu()).softmax(-1) @ v
        return x.transpose(1, 2).flatten(2)  # [B, heads, N, d] -> [B, N, C]


def _as_map(x: torch.Tensor) -> torch.Tensor:
    return x.transpose(1, 2).unflatten(2, (4, 4))  # [B, N, C] -> [B, C, 4, 4]


def _pool(**arguments):
    return _Trap(lambda m, x: m.conv(F.avg_pool2d(_as_map(m.norm(x * 1)), **arguments)), conv=nn.Conv2d(WIDTH, 4, 1))


def _attention(**arguments):
    return _Trap(lambda m, x: m.attn(m.norm(x * 1)), attn=_SplitBias(**arguments))


def _lstm(**arguments):
    layer = nn.LSTM(WIDTH, 5, batch_first=True, **arguments)
    return _Trap(lambda m, x: m.rnn(m.norm(x * 1))[0], rnn=layer)


def _no_bias() -> nn.Module:
    """A layer without bias between two norms: the first makes its bias, the second scales it without a shift."""

    def read(m: nn.Module, x: torch.Tensor) -> torch.Tensor:
        return m.second(m.reduce(m.norm(x * 1)) + m.position).sin()

    trap = _Trap(read, reduce=nn.Linear(WIDTH, WIDTH, bias=False), second=nn.LayerNorm(WIDTH))
    trap.position = nn.Parameter(torch.randn(16, WIDTH))
    return trap


FOLDS, STAYS = "fold-forward", "affine"

# name -> (model, verdict of the norm, a word of the reason)
TRAPS = {
    "q, k and v bias made in forward": (_attention(), FOLDS, "linear"),
    "the same, keys rotated": (_attention(rotate=True), FOLDS, "linear"),
    "the same, keys in the state dict": (_attention(persistent=True), FOLDS, "linear"),
    "the same, softmax by hand": (_attention(fused=False, mask=True), FOLDS, "linear"),
    "the same, no plain softmax": (_attention(fused=False), FOLDS, "linear"),
    "LSTM": (_lstm(), FOLDS, "linear"),
    "LSTM, both directions, two layers": (_lstm(bidirectional=True, num_layers=2), FOLDS, "linear"),
    "LSTM without bias": (_lstm(bias=False), STAYS, "without bias"),
    "average pool": (_pool(kernel_size=2), FOLDS, "linear"),
    "average pool, ceil mode": (_pool(kernel_size=3, stride=3, ceil_mode=True), FOLDS, "linear"),
    "average pool, padding not counted": (_pool(kernel_size=3, padding=1, count_include_pad=False), FOLDS, "linear"),
    "average pool, padding counted": (_pool(kernel_size=3, padding=1), STAYS, "avg_pool2d"),
    "average pool, own divisor": (_pool(kernel_size=2, divisor_override=3), STAYS, "avg_pool2d"),
    "1-d convolution": (
        _Trap(lambda m, x: m.conv(m.norm(x * 1).transpose(1, 2)), conv=nn.Conv1d(WIDTH, 6, 3, groups=2)),
        FOLDS,
        "linear",
    ),
    "1-d convolution, padded": (
        _Trap(lambda m, x: m.conv(m.norm(x * 1).transpose(1, 2)), conv=nn.Conv1d(WIDTH, 6, 3, padding=1)),
        STAYS,
        "pads",
    ),
    "padding given in the call": (
        _Trap(lambda m, x: F.conv2d(_as_map(m.norm(x * 1)), m.c.weight, m.c.bias, padding=1), c=nn.Conv2d(WIDTH, 4, 3)),
        STAYS,
        "pads",
    ),
    "weight called by another module": (
        _Trap(lambda m, x: F.linear(m.norm(x * 1), m.fc.weight, m.fc.bias), fc=nn.Linear(WIDTH, 4)),
        FOLDS,
        "linear",
    ),
    "called without the bias it has": (
        _Trap(lambda m, x: F.linear(m.norm(x * 1), m.fc.weight), fc=nn.Linear(WIDTH, 4)),
        STAYS,
        "would not use one",
    ),
    "norm of a norm": (
        _Trap(lambda m, x: m.head(m.second(m.norm(x * 1))), second=nn.LayerNorm(WIDTH)),
        FOLDS,
        "second takes it on",
    ),
    "norm of a norm that stays": (
        _Trap(lambda m, x: m.second(m.norm(x * 1).flip(2)) + x, second=nn.LayerNorm(WIDTH)),
        FOLDS,
        "second takes it on",
    ),
    "norm of a norm, padded between": (
        _Trap(lambda m, x: m.head(m.second(F.pad(m.norm(x * 1), (0, 0, 0, 2)))), second=nn.LayerNorm(WIDTH)),
        STAYS,
        "padding",
    ),
    "bias made by one norm, scaled by another": (_no_bias(), FOLDS, "gets a bias"),
    "gating over tokens": (
        _Trap(lambda m, x: m.mix(m.norm(x * 1).transpose(1, 2)).transpose(1, 2) * x, mix=nn.Linear(16, 16)),
        STAYS,
        "same channel",
    ),
    "activation reads it": (_Trap(lambda m, x: m.head(F.gelu(m.norm(x * 1)))), STAYS, "gelu"),
    "adaptive average over a map": (
        _Trap(lambda m, x: m.head(F.adaptive_avg_pool2d(_as_map(m.norm(x * 1)), 1).flatten(1))),
        FOLDS,
        "linear",
    ),
    "max pool": (_Trap(lambda m, x: F.max_pool2d(_as_map(m.norm(x * 1)), 2)), STAYS, "max pooling"),
}


@pytest.mark.parametrize("name", TRAPS)
def test_traps(name):
    model, verdict, word = TRAPS[name]
    torch.manual_seed(0)
    model = randomised(copy.deepcopy(model)).double().eval()
    plan = make_plan(model, input_size=(3, 8, 8))
    site = next(s for s in plan.sites if s.path == "norm")
    assert (site.verdict, word in site.reason) == (verdict, True), site.reason
    swapped = randomise_statistics(swap_norms(model, plan)).eval()
    fused = fold_norms(swapped, input_size=plan.input_size)
    x = torch.randn(2, 3, 8, 8).double()
    with torch.no_grad():
        scale = max(1.0, float(swapped(x).abs().max()))
    assert max_difference(swapped, fused, [x]) <= FOLD_FLOAT64 * scale
    bare = copy.deepcopy(swapped)
    for path in batch_norms(bare):
        bare.set_submodule(path, nn.Identity())
    assert max_difference(swapped, bare, [x]) > 1e-4 * scale  # the norm does something
    assert isinstance(fused.norm, nn.Identity) == (verdict == FOLDS)


@pytest.mark.parametrize(
    ("name", "carried"),
    [
        ("q, k and v bias made in forward", False),
        ("the same, softmax by hand", False),
        ("the same, keys rotated", True),
        ("the same, no plain softmax", True),
        ("the same, keys in the state dict", True),
    ],
)
def test_what_the_keys_take_is_left_out_only_where_softmax_drops_it(name, carried):
    model = randomised(copy.deepcopy(TRAPS[name][0])).double().eval()
    swapped = randomise_statistics(swap_norms(model, make_plan(model, input_size=(3, 8, 8)))).eval()
    fused = fold_norms(swapped, input_size=(3, 8, 8))
    assert bool(fused.attn.k_bias.abs().max() > 0) == carried
    assert ("attn.k_bias" in fused.state_dict()) == carried
    assert swapped.attn.k_bias.abs().max() == 0  # the copy was changed, not the model


def test_no_bias_is_made_for_keys_that_need_none():
    def read(m: nn.Module, x: torch.Tensor) -> torch.Tensor:
        y = m.norm(x * 1)
        return F.scaled_dot_product_attention(m.q(y), m.k(y), m.v(y))

    bare = {name: nn.Linear(WIDTH, WIDTH, bias=False) for name in "qkv"}
    model = randomised(_Trap(read, **bare)).double().eval()
    plan = make_plan(model, input_size=(3, 8, 8))
    assert plan.sites[0].row()["creates_bias"] == ["q", "v"]
    swapped = randomise_statistics(swap_norms(model, plan)).eval()
    fused = fold_norms(swapped, input_size=(3, 8, 8))
    assert (fused.k.bias, fused.q.bias is None) == (None, False)
    x = torch.randn(2, 3, 8, 8).double()
    assert max_difference(swapped, fused, [x]) <= FOLD_FLOAT64 * max(1.0, float(swapped(x).detach().abs().max()))


def test_a_norm_whose_reader_is_kept_stays():
    model = TRAPS["norm of a norm"][0]
    plan = make_plan(model, keep=["second"], input_size=(3, 8, 8))
    assert [(s.path, s.verdict) for s in plan.sites] == [("norm", "affine"), ("second", "keep")]
    assert "another norm reads it" in plan.sites[0].reason


def test_a_shared_part_of_a_bias_is_not_folded_into():
    model = copy.deepcopy(TRAPS["q, k and v bias made in forward"][0])
    model.attn.v_bias = model.attn.q_bias
    assert make_plan(model, input_size=(3, 8, 8)).sites[0].verdict == STAYS


def test_a_shared_buffer_is_not_folded_into():
    model = _Trap(lambda m, x: m.attn(m.norm(x * 1)) + m.other(x), attn=_SplitBias(rotate=True), other=_SplitBias())
    model.other.k_bias = model.attn.k_bias
    site = make_plan(model, input_size=(3, 8, 8)).sites[0]
    assert (site.verdict, "tied" in site.reason) == (STAYS, True)


def test_a_half_precision_overflow_changes_nothing_and_keeps_the_buffer_out():
    from normswap import FoldError

    model = copy.deepcopy(TRAPS["the same, keys rotated"][0]).half().eval()
    swapped = swap_norms(model, make_plan(model, input_size=(3, 8, 8)))
    swapped.norm.bias.data.fill_(6e4)
    swapped.attn.qkv.weight.data.fill_(100.0)
    before = copy.deepcopy(swapped.state_dict())
    with pytest.raises(FoldError, match="not finite in torch"):
        fold_norms(swapped, inplace=True, input_size=(3, 8, 8))
    after = swapped.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
