"""What becomes of a fold that rounding moves: proven right in float64 it is kept and said, proven wrong it is not."""

import pytest
import torch
from torch import nn

import normswap
from normswap import CheckFailedError, EvaluationOptions, fuse
from normswap.outputs.swapped_checkpoint import Swapped
from normswap.pipeline import checks, from_swapped
from normswap.pipeline.checks import FoldCheck
from normswap.surgery.fold import difference, fold_norms
from normswap.surgery.swap import batch_norms

from ..cli.test_cli import one_object, run
from ..models import family, images

CHANNEL = normswap.CalibrationOptions(method="channel", bound="none")


def swapped(offset: float = 0.0) -> tuple[Swapped, torch.Tensor]:
    """Return a swapped model whose tokens carry a constant that every norm takes off again: huge terms that cancel."""
    torch.manual_seed(0)
    model = family("avg_pool")
    x = images(model, 24)
    result = normswap.convert(model, [x], calibration=CHANNEL, ffn_bn="none")
    with torch.no_grad():
        result.swapped.pos_embed += offset
        for path, norm in batch_norms(result.swapped).items():
            if "norm" in path:
                norm.running_mean += offset
    return Swapped(result.swapped, model, result.plan, result.report), x


@pytest.mark.parametrize("offset", [1e5, 1e6])
def test_rounding_is_no_reason_to_discard(tmp_path, offset):
    checkpoint, x = swapped(offset)
    result = fuse(checkpoint, [x], original=checkpoint.original)
    report = result.report
    assert report.fold_max_rel_err > checks.ROUNDING
    assert report.fold_float64_err < checks.EXACT
    assert 0 <= report.fold_agreement <= 100
    assert "so the fold is right but this conversion amplifies rounding errors" in report.fold_warning
    assert "\n" not in report.fold_warning
    result.save(tmp_path / "out")
    assert report.fold_warning in (tmp_path / "out/README.md").read_text(encoding="utf-8")
    record = report.to_json()
    assert {"fold_max_abs_err", "fold_max_rel_err", "fold_float64_err", "fold_agreement", "fold_warning"} <= set(record)
    with pytest.raises(CheckFailedError, match=r"more than `atol` 0\.001; in float64 by .* so the fold is right"):
        fuse(checkpoint, [x], evaluation=EvaluationOptions(atol=1e-3))


def test_the_command_line_notes_it(tmp_path):
    checkpoint, _ = swapped(1e6)
    normswap.save_swapped(tmp_path / "swapped", checkpoint)
    done = run("fuse", "-m", tmp_path / "swapped", "-o", tmp_path / "out", "--json")
    assert done.exit_code == 0, done.stderr
    assert f"note       {one_object(done)['fold_warning']}" in done.stderr.splitlines()
    strict = run("fuse", "-m", tmp_path / "swapped", "-o", tmp_path / "strict", "--atol", 0.001)
    assert strict.exit_code == 4
    assert "more than --atol 0.001" in strict.stderr.splitlines()[-1]
    assert not (tmp_path / "strict").exists()


def test_usual_rounding_is_not_worth_a_word():
    checkpoint, x = swapped()
    report = fuse(checkpoint, [x]).report
    assert report.fold_warning is None
    assert 0 < report.fold_max_rel_err < checks.ROUNDING
    assert report.fold_float64_err < 1e-12
    assert report.fold_agreement == 100


@pytest.mark.parametrize("atol", [None, float("inf")])
def test_a_wrong_fold_is_found_below_what_rounding_does(monkeypatch, atol):
    """An error of a ten thousandth, which no bound on float32 could tell from rounding."""

    def wrong(model: nn.Module, **arguments: object) -> nn.Module:
        fused = fold_norms(model, **arguments)
        with torch.no_grad():
            fused.head.bias += 1e-4
        return fused

    checkpoint, x = swapped()
    monkeypatch.setattr(checks, "fold_norms", wrong)
    monkeypatch.setattr(from_swapped, "fold_norms", wrong)
    with pytest.raises(CheckFailedError, match=r"so the fold is wrong\): not saved$") as caught:
        fuse(checkpoint, [x], evaluation=EvaluationOptions(atol=atol))
    assert checks.EXACT < caught.value.report.fold_float64_err < checks.ROUNDING
    assert caught.value.report.fold_warning is None


class Single(nn.Module):
    """A model with a tensor that ``.double()`` does not reach."""

    def __init__(self, offset: float) -> None:
        super().__init__()
        self.layer, self.offset = nn.Linear(4, 3), offset
        self.table = torch.ones(4, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layer(x.flatten(1) @ self.table) + self.offset


@pytest.mark.parametrize(("offset", "problem"), [(0.0, False), (1.0, True)])
def test_where_float64_cannot_run_only_little_rounding_passes(offset, problem):
    model, other = Single(0.0), Single(offset)
    other.load_state_dict(model.state_dict())
    found = FoldCheck.of(model, other, [torch.randn(5, 1, 2, 2)], {})
    assert found.exact is None
    assert (found.problem(None) is not None) == problem
    assert found.warning is None


def test_differences_are_relative_to_all_outputs():
    def scaled(factor: float) -> nn.Module:
        layer = nn.Linear(2, 2, bias=False)
        layer.weight.data = torch.eye(2) * factor
        return nn.Sequential(nn.Flatten(), layer)

    x = torch.tensor([[[[3.0, 4.0]]], [[[0.0, 0.0]]]])  # an image whose outputs are all zero has no size of its own
    found = difference(scaled(2.0), scaled(3.0), iter([x[:1], x[1:]]))
    assert found.largest == 4.0
    assert found.relative == pytest.approx(4.0 / 5.0)  # sqrt((36 + 64 + 0 + 0) / 4) = 5
    assert found.agreement == 100
    assert difference(scaled(1.0), scaled(-1.0), [x]).agreement == 50
    assert difference(scaled(1.0), scaled(float("nan")), [x]).relative == float("inf")
    assert difference(scaled(0.0), scaled(0.0), [x]).relative == 0.0
