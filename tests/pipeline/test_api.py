"""The Python API as design and README show it, and the examples as they stand."""

import json
import runpy
import subprocess
import sys
from pathlib import Path

import pytest
import timm
import torch
from torch import nn

import normswap
from normswap.demo import FOLDER, MODEL
from normswap.pipeline.work import Clock
from normswap.surgery.swap import batch_norms

from ..cli.test_cli import run
from ..models import family, images
from ..tolerance import FOLD_FLOAT64

ROOT = Path(__file__).resolve().parents[2]


def test_the_steps_and_convert_are_one_engine():
    model = family("vit", torch.float64)
    x = images(model, 10)
    plan = normswap.make_plan(model)
    swapped = normswap.swap_norms(model, plan, ffn_bn="pre-act")
    normswap.calibrate(swapped, [x], original=model, options=normswap.CalibrationOptions(method="channel"))
    fused = normswap.fold_norms(swapped)
    result = normswap.convert(model, [x], calibration=normswap.CalibrationOptions(method="channel"), ffn_bn="pre-act")
    assert type(result.model) is type(model)
    assert all(torch.equal(a, b) for a, b in zip(fused.parameters(), result.model.parameters(), strict=True))
    assert not any(isinstance(m, nn.LayerNorm) for m in result.model.modules())
    assert not batch_norms(result.model)


def test_report():
    model = family("vit")
    x, labels = images(model, 10), torch.arange(10) % 7
    report = normswap.convert(model, [(x, labels)]).report
    assert [stage.name for stage in report.stages] == ["original", "swapped", "calibrated", "fused"]
    assert all(stage.top1 is not None and stage.n == 10 for stage in report.stages)
    assert report.stages[0].agreement == 100
    assert report.stages[2].agreement == report.stages[3].agreement
    assert 0 <= report.fold_max_abs_err < 1e-3
    assert {"plan", "calibrate", "fold", "evaluate", "forward_pass"} <= report.seconds.keys()
    assert report.versions["normswap"] == normswap.__version__
    record = report.to_json()
    assert record["before"] == {"top1": report.stages[0].top1, "top5": report.stages[0].top5, "n": 10}
    assert record["sites"] == {"total": 5, "fold-forward": 5, "fold-backward": 0, "affine": 0, "keep": 0, "ffn_bn": 2}


def test_images_may_come_from_a_generator_once():
    model = family("vit")
    x = images(model, 9)
    a = normswap.convert(model, (batch for batch in x.split(4)))
    b = normswap.convert(model, [x])
    assert a.report.calib_samples == b.report.calib_samples == 9
    assert a.report.stages[0].n == 9
    with torch.no_grad():
        torch.testing.assert_close(a.model(x), b.model(x), rtol=1e-3, atol=1e-4)


def test_convert_never_prints_and_tells_its_progress(capfd):
    """Whatever it does, search, fine-tuning and fold included: what it has to say goes through the callback."""
    model = timm.create_model("vit_tiny_patch16_224", img_size=32, embed_dim=48, num_heads=3, depth=2, num_classes=7)
    x = images(model, 12)
    told = []
    normswap.convert(
        model,
        (batch for batch in x.split(5)),
        eval_images=([batch, batch.flatten(1).argmax(1) % 7] for batch in x.split(4)),
        budget=normswap.AccuracyBudget(min_agreement=0.0),
        finetune=normswap.FinetuneStage(
            options=normswap.FinetuneOptions(epochs=1, batch_size=4), images=(batch for batch in x.split(6))
        ),
        progress=lambda what, done, total: told.append((what, done, total)),
    )
    assert capfd.readouterr() == ("", "")
    assert all(isinstance(what, str) and 0 <= done <= total for what, done, total in told)
    assert {what.partition(":")[0] for what, *_ in told} == {"forward pass", "search", "finetune", "evaluate"}
    steps = {what.partition("; ")[2].partition(" ")[0].rstrip(":") for what, *_ in told if what.startswith("search")}
    assert steps == {"calibrate", "evaluate"}


def test_float64_folds_to_rounding_error():
    model = family("qk_norm_no_bias", torch.float64)
    assert normswap.convert(model, [images(model, 8)]).report.fold_max_abs_err < FOLD_FLOAT64


def test_the_model_stays_and_its_training_flag_is_carried():
    model = family("vit").train()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    result = normswap.convert(model, [images(model, 6)])
    assert result.model.training
    assert model.training
    assert all(torch.equal(before[k], v) for k, v in model.state_dict().items())


def test_checks_that_fail_carry_the_report():
    model = family("vit")
    data = [(images(model, 10), model(images(model, 10)).argmax(1))]
    with pytest.raises(normswap.CheckFailedError, match="`max_drop`") as caught:
        normswap.convert(
            model,
            data,
            calibration=normswap.CalibrationOptions(method="moments"),
            budget=normswap.AccuracyBudget(max_drop=0.0, max_keep=0),
        )
    assert caught.value.exit_code == 4
    assert caught.value.report.top1_drop > 0
    with pytest.raises(normswap.CheckFailedError, match="in float64 by"):
        normswap.convert(model, data, evaluation=normswap.EvaluationOptions(atol=0.0))
    with pytest.raises(normswap.CheckFailedError, match="needs labels"):
        normswap.convert(model, [data[0][0]], budget=normswap.AccuracyBudget(max_drop=1.0))


def test_wrong_arguments():
    model = family("vit")
    with pytest.raises(normswap.ArgumentError, match="method"):
        normswap.convert(model, [images(model)], calibration=normswap.CalibrationOptions(method="magic"))
    with pytest.raises(normswap.ArgumentError, match="all 5 LayerNorms are kept"):
        normswap.convert(model, [images(model)], plan=normswap.make_plan(model, keep=["*"]))
    with pytest.raises(normswap.ArgumentError, match="no images"):
        normswap.convert(model, [])


ERRORS = {
    "ArgumentError": (ValueError, 2),
    "BenchmarkError": (RuntimeError, 1),
    "CalibrationError": (ArithmeticError, 1),
    "CheckFailedError": (AssertionError, 4),
    "CheckpointError": (RuntimeError, 1),
    "DataError": (RuntimeError, 1),
    "FoldError": (ArithmeticError, 1),
    "HubError": (OSError, 1),
    "MissingExtraError": (ImportError, 1),
    "ModelRefusedError": (ValueError, 3),
    "NoLayerNormError": (ValueError, 3),
    "OutputError": (OSError, 1),
}


def test_every_error_is_the_builtin_that_users_catch_and_has_its_exit_code():
    public = {name for name in normswap.__all__ if name.endswith("Error")} - {"NormswapError"}
    assert public == set(ERRORS)
    for name, (builtin, code) in ERRORS.items():
        error = getattr(normswap, name)("text")
        assert isinstance(error, normswap.NormswapError), name
        assert isinstance(error, builtin), name
        assert (error.exit_code, str(error)) == (code, "text"), name


def test_the_clock_takes_down_each_step(monkeypatch):
    now = iter([10.0, 12.5, 20.0, 21.0])
    monkeypatch.setattr("normswap.pipeline.work.time.perf_counter", lambda: next(now))
    clock = Clock(plan=1.0)
    with clock("calibrate"):
        pass
    with clock("fold"):
        pass
    assert clock.seconds == {"plan": 1.0, "calibrate": 2.5, "fold": 1.0}


def test_example_fold_by_hand(capsys):
    runpy.run_path(str(ROOT / "examples" / "fold_by_hand.py"), run_name="__main__")
    assert "largest difference" in capsys.readouterr().out


def test_example_convert_with_the_api(capsys, monkeypatch):
    path = str(ROOT / "examples" / "convert_with_the_api.py")
    monkeypatch.setattr(sys, "argv", [path])
    runpy.run_path(path, run_name="__main__")
    assert "loaded by plain timm, its outputs differ by 0" in capsys.readouterr().out


@pytest.fixture
def deploy(monkeypatch, capsys):
    """Return a function that runs the example, whose commands run in this process; it gives exit code and output."""

    def command(words: list[str], stdout: int | None = None, text: bool = False) -> subprocess.CompletedProcess:
        assert words[:3] == [sys.executable, "-m", "normswap_cli"]
        result = run(*words[3:])
        sys.stderr.write(result.stderr)
        if stdout is None:
            sys.stdout.write(result.stdout)
        return subprocess.CompletedProcess(words, result.exit_code, result.stdout)

    def start(*arguments: str) -> tuple[int, str, str]:
        path = str(ROOT / "examples" / "deploy" / "deploy.py")
        monkeypatch.setattr(sys, "argv", [path, "-m", MODEL, "--data-dir", str(FOLDER), *arguments])
        monkeypatch.setattr(subprocess, "run", command)
        with pytest.raises(SystemExit) as ended:
            runpy.run_path(path, run_name="__main__")
        return ended.value.code, *capsys.readouterr()

    return start


FEW = (
    "--method",
    "channel",
    "--calib-samples",
    "64",
    "--eval-samples",
    "90",
    "-j",
    "0",
    "--device",
    "cpu",
    "-q",
    "--no-stress",
)


def test_example_deploy_ships_what_holds(deploy, tmp_path):
    out = tmp_path / "out"
    flags = ("--max-drop", "5", "--max-keep", "6", "--max-evaluations", "2", "--repo-id", "user/digits")
    code, stdout, stderr = deploy("-o", str(out), *flags, *FEW)
    assert code == 0, stderr
    kept = json.loads((out / "normswap.json").read_text())["report"]["kept"]
    assert kept, "nothing had to stay, so the example shows nothing"
    first, *files = stdout.splitlines()
    assert first.startswith(f"ship {out}: top-1 ")
    assert first.endswith(f"{len(kept)} LayerNorms stay: {', '.join(kept)}")
    assert {line.split()[0] for line in files} >= {"README.md", "config.json", "model.safetensors", "normswap.json"}


def test_example_deploy_passes_the_exit_code_on(deploy, tmp_path):
    code, stdout, stderr = deploy("-o", str(tmp_path / "out"), "--max-drop", "-50", "--max-keep", "0", *FEW)
    assert code == 4
    assert stdout.startswith("not shipped: top-1 ")
    assert stderr.splitlines()[-1].startswith("Error: top-1 ")
    assert not list(tmp_path.iterdir())
