"""Metrics against a plain computation over all images at once."""

import pytest
import torch
from torch import nn

from normswap import ArgumentError, evaluate_models

from ..models import family, images


def _pair() -> tuple[nn.Module, nn.Module]:
    torch.manual_seed(1)
    first = family("vit")
    torch.manual_seed(2)
    return first, family("vit")


def test_against_a_plain_computation():
    original, other = _pair()
    x, labels = images(original, 30), torch.randint(0, 7, (30,))
    batches = list(zip(x.split([8, 8, 14]), labels.split([8, 8, 14]), strict=True))
    reference, measured = evaluate_models({"original": original, "other": other}, batches)
    with torch.no_grad():
        p, q = original(x).double(), other(x).double()
    top5 = q.topk(5).indices
    kl = (p.softmax(1) * (p.log_softmax(1) - q.log_softmax(1))).sum(1)
    assert measured.n == 30
    assert measured.top1 == pytest.approx(100 * float((q.argmax(1) == labels).double().mean()))
    assert measured.top5 == pytest.approx(100 * float((top5 == labels[:, None]).any(1).double().mean()))
    assert measured.agreement == pytest.approx(100 * float((q.argmax(1) == p.argmax(1)).double().mean()))
    assert measured.kl == pytest.approx(float(kl.mean()), rel=1e-5)
    assert measured.worst_kl == pytest.approx(float(kl.max()), rel=1e-5)
    assert 0 < measured.kl < measured.worst_kl
    assert (reference.agreement, reference.kl, reference.cosine) == (100, 0, pytest.approx(1))


def test_the_line_that_timm_prints():
    (stage,) = evaluate_models(
        {"m": nn.Sequential(nn.Flatten(), nn.Linear(3, 3))}, [(torch.randn(4, 3, 1, 1), torch.zeros(4))]
    )
    assert stage.accuracy_line() == f" * Acc@1 {stage.top1:.3f} ({100 - stage.top1:.3f}) Acc@5 100.000 (0.000)"


def test_without_labels_agreement_still_comes():
    original, other = _pair()
    _, measured = evaluate_models({"a": original, "b": other}, [images(original, 8)])
    assert (measured.top1, measured.top5, measured.accuracy_line()) == (None, None, None)
    assert measured.agreement is not None
    assert measured.kl > 0


def test_headless_models_are_compared_by_angle():
    torch.manual_seed(1)
    first = family("headless")
    torch.manual_seed(2)
    _, measured = evaluate_models({"a": first, "b": family("headless")}, [(images(first, 8), torch.zeros(8))])
    assert (measured.top1, measured.agreement, measured.kl, measured.worst_kl) == (None, None, None, None)
    assert -1 <= measured.cosine < 1


def test_non_finite_outputs_are_counted_and_infinitely_far():
    class Spoiled(nn.Module):
        num_classes = 3

        def __init__(self, spoil: bool) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.randn(3, 3))
            self.spoil = spoil

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            y = x.flatten(1) @ self.weight
            return torch.where(torch.arange(len(y))[:, None] == 1, float("nan"), y) if self.spoil else y

    _, measured = evaluate_models({"a": Spoiled(False), "b": Spoiled(True)}, [torch.randn(4, 3, 1, 1)])
    assert measured.non_finite == 1
    assert measured.worst_kl == float("inf")


def test_modes_come_back_and_amp_changes_digits():
    original, _ = _pair()
    original.train()
    x = images(original, 8)
    evaluate_models({"a": original}, [x])
    assert all(module.training for module in original.modules())
    full, half = (
        evaluate_models({"a": original, "b": family("vit")}, [x], amp_dtype=d)[1] for d in (None, torch.bfloat16)
    )
    assert full.kl != half.kl


def test_wrong_arguments():
    original, _ = _pair()
    with pytest.raises(ArgumentError, match="no images"):
        evaluate_models({"a": original}, [])
    with pytest.raises(ArgumentError, match="outputs"):
        evaluate_models({"a": original, "b": family("headless")}, [images(original)])


def test_models_between_are_measured_on_a_part_that_is_spread_evenly(monkeypatch):
    monkeypatch.setattr("normswap.evaluation.evaluate.BRIEF", 8)
    torch.manual_seed(0)
    models = {name: nn.Sequential(nn.Flatten(), nn.Linear(12, 3)) for name in ("original", "between", "fused")}
    batches = [torch.rand(4, 3, 2, 2) for _ in range(10)]
    found = {stage.name: stage for stage in evaluate_models(models, batches, total=40, brief=["between"])}
    assert [stage.n for stage in found.values()] == [40, 8, 40]
    part = evaluate_models(models, [torch.cat(batches)[::5]])
    assert found["between"].kl == pytest.approx(part[1].kl)
    with pytest.raises(ArgumentError, match="`brief` holds the first or the last"):
        evaluate_models(models, batches, total=40, brief=["fused"])
    everything = evaluate_models(models, batches, brief=["between"])  # nobody knows how many there will be
    assert [stage.n for stage in everything] == [40, 40, 40]
