"""The stress rows against a computation by hand, and what must not change them."""

import copy
import math

import pytest
import torch
from torch import nn

from normswap import ArgumentError, load_images, stress_models
from normswap.demo import FOLDER, MODEL
from normswap.evaluation.stress import BRIEF, STRESS, brief_stress
from normswap.pipeline.open_model import open_model
from normswap.records.stress import StressRecord

from ..models import family

MEAN, STD = (0.4, 0.5, 0.6), (0.2, 0.25, 0.3)
NOISE = [case for case in STRESS if case.label in ("Gaussian noise 0.16", "black frame")]


class Tiny(nn.Module):
    """Two layers, one of them within a module that gives more than a tensor."""

    class Pair(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = nn.Linear(12, 6)

        def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
            y = self.inner(x)
            return y, {"twice": 2 * y}

    def __init__(self, scale: float = 1.0) -> None:
        super().__init__()
        self.pair, self.head, self.scale = self.Pair(), nn.Linear(6, 7), scale

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.scale * self.head(self.pair(x.flatten(1))[1]["twice"])


def pixels(count: int = 10) -> torch.Tensor:
    return torch.rand(count, 3, 2, 2, generator=torch.Generator().manual_seed(1))


def normalised(x: torch.Tensor) -> torch.Tensor:
    return (x - torch.tensor(MEAN).view(-1, 1, 1)) / torch.tensor(STD).view(-1, 1, 1)


def stress(first: nn.Module, second: nn.Module, batches: list, rows=NOISE, **options) -> StressRecord:
    return stress_models(first, second, batches, rows, mean=MEAN, std=STD, **options)


def test_against_a_plain_computation():
    first, second = Tiny(), Tiny(3.0)
    labels = torch.arange(10) % 7
    kept = labels.clone()
    record = stress(
        first, second, [(normalised(pixels()[:6]), labels[:6]), (normalised(pixels()[6:]), labels[6:])], seed=4
    )
    assert torch.equal(labels, kept)
    assert [row.name for row in (record.clean, *record.rows)] == ["clean", "Gaussian noise 0.16", "black frame"]
    assert (record.images, record.seed, record.reason) == ("10 images passed by the caller", 4, "")
    for row, case in zip((record.clean, *record.rows), (None, *NOISE), strict=True):
        x = normalised(pixels() if case is None else case.corruption(pixels(), case.strength, seed=4))
        with torch.no_grad():
            p, q = first(x).double(), second(x).double()
            inner, outer = (2 * model.pair.inner(x.flatten(1)).abs().max() for model in (first, second))
        kl = (p.softmax(1) * (p.log_softmax(1) - q.log_softmax(1))).sum(1)
        assert (row.n, row.n_fp16, row.non_finite, row.non_finite_fp16) == (10, 10, 0, 0)
        assert row.top1_original == pytest.approx(100 * float((p.argmax(1) == labels).double().mean()))
        assert row.top1 == pytest.approx(100 * float((q.argmax(1) == labels).double().mean()))
        assert row.agreement == pytest.approx(100 * float((p.argmax(1) == q.argmax(1)).double().mean()))
        assert row.kl == pytest.approx(float(kl.mean()), rel=1e-4)
        assert row.worst_kl == pytest.approx(float(kl.max()), rel=1e-4)
        assert row.largest_logit_original == pytest.approx(float(p.abs().max()), rel=1e-5)
        assert row.largest_logit == pytest.approx(float(q.abs().max()), rel=1e-5)
        assert row.largest_activation_original == pytest.approx(float(max(inner, p.abs().max())), rel=1e-5)
        assert row.largest_activation == pytest.approx(float(max(outer, q.abs().max())), rel=1e-5)


def test_batches_do_not_matter_and_models_stay_as_they_are():
    first, second = family("vit").train(), family("vit")
    with torch.no_grad():
        second.head.weight.mul_(1.5)
    state = copy.deepcopy(second.state_dict())
    x = normalised(torch.rand(6, 3, 32, 32))
    whole, parts = (stress(first, second, list(x.split(size))) for size in (6, 4))
    assert whole.rows[0].kl == pytest.approx(parts.rows[0].kl, rel=1e-3)
    assert whole.rows[0].largest_activation == pytest.approx(parts.rows[0].largest_activation, rel=1e-4)
    assert all(module.training for module in first.modules())
    assert all(not module._forward_hooks for model in (first, second) for module in model.modules())
    assert all(torch.equal(value, state[name]) for name, value in second.state_dict().items())
    assert next(second.parameters()).dtype == torch.float32


def test_the_same_model_loses_nothing():
    model = Tiny()
    for row in stress(model, model, [normalised(pixels())], STRESS).rows:
        assert (row.top1, row.drop, row.agreement, row.kl, row.loss) == (None, None, 100.0, 0.0, 0.0)
        assert row.largest_activation == row.largest_activation_original > 0


@pytest.mark.parametrize(("share", "judged"), [(1.0, 10), (0.3, 4), (0, 0)])  # 3 of 8 images and 1 of 2
def test_what_passes_fp16_is_found_by_running_it(share, judged):
    record = stress(Tiny(), Tiny(3e5), list(normalised(pixels()).split(8)), fp16=share)
    assert record.clean.largest_logit > 65504
    assert (record.clean.n_fp16, record.clean.non_finite_fp16, record.clean.non_finite) == (judged, judged, 0)


def test_a_model_too_small_to_overflow_is_not_run_in_fp16(monkeypatch):
    seen = []
    monkeypatch.setattr(Tiny, "half", lambda self: seen.append(self) or nn.Identity())
    record = stress(Tiny(), Tiny(), [normalised(pixels())])
    assert len(seen) == 1  # Identity would give outputs of another shape, and finite ones
    assert record.clean.n_fp16 == 10
    big = Tiny()
    with torch.no_grad():
        big.head.weight[0] = 7e4  # does not fit itself
        big.head.bias[:] = 0
    monkeypatch.undo()
    small = normalised(pixels()) * 0 + 1e-9
    assert stress(Tiny(), big, [small]).clean.n_fp16 == 10


@pytest.mark.parametrize("text", ["\"fog\" not implemented for 'Half'", "expected float, got c10::Half"])
def test_a_model_that_has_no_half_precision_here_is_not_judged(text):
    class Wide(Tiny):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            if x.dtype == torch.float16:
                raise RuntimeError(text)
            return super().forward(x)

    record = stress(Tiny(), Wide(1e4), [normalised(pixels())])
    assert record.clean.largest_logit > 64
    assert (record.clean.n_fp16, record.rows[0].n_fp16, record.rows[0].non_finite_fp16) == (0, 0, 0)
    text = "out of memory"
    with pytest.raises(RuntimeError, match=text):
        stress(Tiny(), Wide(1e4), [normalised(pixels())])


def test_outputs_that_are_not_finite_are_infinitely_large():
    spoiled = Tiny()
    with torch.no_grad():
        spoiled.head.bias[0] = math.nan
    row = stress(Tiny(), spoiled, [normalised(pixels())]).rows[0]
    assert (row.largest_logit, row.largest_activation, row.worst_kl) == (math.inf,) * 3
    assert (row.cosine, row.non_finite, row.non_finite_fp16) == (None, 10, 10)
    assert row.non_finite_original == 0


def test_headless_models_have_sizes_and_an_angle():
    model = family("headless")
    row = stress(model, model, [(normalised(torch.rand(3, 3, 32, 32)), torch.zeros(3))]).rows[0]
    assert (row.top1, row.agreement, row.kl, row.worst_kl, row.loss) == (None,) * 5
    assert row.cosine == pytest.approx(1)
    assert row.largest_activation >= row.largest_logit > 0


@pytest.fixture(scope="module")
def demo():
    model = open_model(MODEL)
    return model, load_images(model, FOLDER, "validation")


def test_the_images_know_their_normalisation_and_progress_is_told(demo):
    model, images = demo
    told = []
    some = images.draw(5, 0)
    record = stress_models(model, model, some, NOISE, progress=lambda *now: told.append(now))
    assert record.images == some.description
    assert [what for what, *_ in told] == ["stress: clean", "stress: Gaussian noise 0.16", "stress: black frame"]
    assert [now for _, *now in told] == [[5, 15], [10, 15], [15, 15]]
    batches = list(some)
    by_config = stress_models(model, model, batches, NOISE)
    assert [row.top1 for row in by_config.rows] == [row.top1 for row in record.rows]


def test_the_brief_form_draws_or_takes_the_first(demo):
    model, images = demo
    drawn = brief_stress(model, model, images, samples=6, seed=3)
    assert drawn.images == images.draw(6, 3).description
    assert [row.name for row in drawn.rows] == [case.label for case in BRIEF]
    images.batch_size = 4
    firsts = brief_stress(model, model, list(images.draw(20, 3)), samples=6)
    assert [row.n for row in (firsts.clean, *firsts.rows)] == [6] * 11


def test_images_that_are_no_pixels_are_refused_and_the_brief_form_says_why():
    model = Tiny()
    wild = torch.full((2, 3, 2, 2), 9.0)
    with pytest.raises(ArgumentError, match=r"reach from 2\.\d\d to 3\.\d\d, not from 0 to 1.*`mean`"):
        stress(model, model, [wild])
    with pytest.raises(ArgumentError, match=r"Give `mean` and `std`"):
        stress_models(model, model, [wild])
    record = brief_stress(model, model, [wild])
    assert (record.clean, record.rows, record.drop) == (None, [], None)
    assert "Give `mean` and `std`" in record.reason


def test_wrong_arguments():
    with pytest.raises(ArgumentError, match="no images"):
        stress(Tiny(), Tiny(), [])
    other = Tiny()
    other.head = nn.Linear(6, 8)
    with pytest.raises(ArgumentError, match=r"shape \[10, 8\], the original \[10, 7\]"):
        stress(Tiny(), other, [normalised(pixels())])
