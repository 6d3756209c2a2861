"""A preempted conversion: killed at any moment after calibration, it goes on and does not calibrate again."""

import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import normswap
from normswap import ArgumentError, CheckpointError, FinetuneOptions, FinetuneStage
from normswap.finetuning.trainer import Run
from normswap.search import trials

from ..child import ONE_THREAD
from ..cli.test_cli import DEMO, one_object, run
from ..models import family, images

ROOT = Path(__file__).resolve().parents[2]
TRAINING = FinetuneOptions(epochs=2, lr=1e-3, batch_size=6)


def converted(state: Path, resume: object = False, **arguments: object) -> normswap.Conversion:
    torch.manual_seed(0)
    model = family("no_qkv_bias")
    options = {"calibration": normswap.CalibrationOptions(refine_steps=2), **arguments}
    stage = FinetuneStage(TRAINING, state=state, resume=resume)
    return normswap.convert(model, [images(model, 40)], finetune=stage, **options)


def same(a: torch.nn.Module, b: torch.nn.Module) -> bool:
    one, other = a.state_dict(), b.state_dict()
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


@pytest.fixture
def calibrations(monkeypatch) -> list:
    """Count them."""
    made, calibrate = [], trials.calibrate

    def counted(*arguments: object) -> object:
        made.append(arguments)
        return calibrate(*arguments)

    monkeypatch.setattr(trials, "calibrate", counted)
    return made


@pytest.fixture
def killed_at(monkeypatch):
    """Return a function that ends the process in a step, as if by a signal that nothing hears."""

    class Killed(BaseException):
        pass

    def kill(step: int, **arguments: object) -> None:
        take = Run._take

        def taken(self: Run) -> bool:
            if self.step == step:
                raise Killed
            return take(self)

        with monkeypatch.context() as patch:
            patch.setattr(Run, "_take", taken)
            with pytest.raises(Killed):
                converted(**arguments)

    return kill


SCRIPT = """
import os, signal, sys
from pathlib import Path
from normswap.finetuning.trainer import Run
from tests.pipeline.test_resumption import converted
Run._take = lambda self: os.kill(os.getpid(), signal.SIGKILL)
converted(Path(sys.argv[1]))
"""


@pytest.mark.slow  # without a process of its own it is tested below; one is killed in tests/finetuning/test_finetune.py
def test_killed_right_after_calibration(tmp_path, calibrations):
    state = tmp_path / "run.state"
    done = subprocess.run([sys.executable, "-c", SCRIPT, str(state)], env=ONE_THREAD, cwd=ROOT)
    assert done.returncode == -signal.SIGKILL
    assert [path.name for path in tmp_path.iterdir()] == ["run.state"]
    result = converted(state, "auto")
    assert not calibrations
    assert result.report.finetuning.resumed_at == 0
    result.save(tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert normswap.load(tmp_path / "out") is not None


@pytest.mark.parametrize(
    "arguments", [{}, {"budget": normswap.AccuracyBudget(min_agreement=100.0, max_keep=2, max_evaluations=2)}]
)
def test_the_result_is_that_of_an_undisturbed_run(tmp_path, calibrations, killed_at, arguments, monkeypatch):
    monkeypatch.setattr(normswap.AccuracyBudget, "problem", lambda *_: None)  # whether it is met is not the question
    whole = converted(tmp_path / "a.state", **arguments)
    count = len(calibrations)
    killed_at(0, state=tmp_path / "b.state", resume="auto", **arguments)
    assert len(calibrations) == 2 * count
    result = converted(tmp_path / "b.state", True, **arguments)
    assert len(calibrations) == 2 * count
    assert same(result.model, whole.model)
    assert same(result.swapped, whole.swapped)
    assert result.plan.sites == whole.plan.sites
    one, other = result.report.to_json(), whole.report.to_json()
    for key in ("fits", "layers", "stream", "stages", "kept", "fold_max_abs_err", "created_biases"):
        assert one[key] == other[key], key
    assert one["seconds"]["calibrate"] > 0


def test_what_comes_after_training_can_be_lost_as_well(tmp_path, calibrations, monkeypatch):
    state = tmp_path / "run.state"

    def full(*_: object, **__: object) -> None:
        raise MemoryError

    with monkeypatch.context() as patch:
        patch.setattr("normswap.pipeline.steps.fold_norms", full)
        with pytest.raises(MemoryError):
            converted(state)
    result = converted(state, True)
    assert len(calibrations) == 1
    assert result.report.finetuning.resumed_at == result.report.finetuning.steps
    assert state.exists()
    result.save(tmp_path / "out")
    assert not state.exists()


def test_it_is_looked_at_before_any_work(tmp_path, calibrations, killed_at):
    state = tmp_path / "run.state"
    with pytest.raises(CheckpointError, match=r"run\.state: no such file, so there is no run to resume"):
        converted(state, True)
    with pytest.raises(ArgumentError, match="`resume` must be True, False or 'auto', not 'perhaps'"):
        converted(state, "perhaps")
    killed_at(0, state=state)
    assert len(calibrations) == 1
    with pytest.raises(CheckpointError, match=r"another run \(calibration options differ\): start afresh"):
        converted(state, "auto", calibration=normswap.CalibrationOptions(refine_steps=3))
    with pytest.raises(CheckpointError, match=r"another run \(accuracy budget differ\)"):
        converted(state, True, budget=normswap.AccuracyBudget(min_agreement=1.0))
    whole = state.read_bytes()
    state.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(CheckpointError, match="no state of a run, or truncated"):
        converted(state, "auto")
    assert len(calibrations) == 1
    assert len(state.read_bytes()) == len(whole) // 2, "what was there is not replaced"


def test_one_command_for_a_scheduler_that_requeues(tmp_path, calibrations, monkeypatch):
    state = tmp_path / "run.state"
    command = ("convert", *DEMO, "-o", tmp_path / "out", "--method", "channel", "--json")
    command += ("--finetune-epochs", 1, "--train-batch-size", 8, "--finetune-state", state, "--auto-resume")

    def interrupted(self: Run) -> bool:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Run, "_take", interrupted)
        first = run(*command)
    assert first.exit_code == 1
    assert f"resume     no, this run begins; its state will be in {state}" in first.stderr.splitlines()
    second = run(*command)
    assert second.exit_code == 0, second.stderr
    assert f"resume     from {state}" in second.stderr.splitlines()
    assert len(calibrations) == 1
    assert one_object(second)["finetuning"]["resumed_at"] == 0
    assert re.search("resumed at step 0", second.stderr)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


@pytest.mark.parametrize(
    ("flags", "code", "text"),
    [
        (("--resume",), 2, "--resume needs the state file of a run"),
        (("--auto-resume",), 2, "--auto-resume needs the state file of a run"),
        (("--resume", "--auto-resume"), 2, "exclude each other"),
        (("--resume", "--finetune-state", "none.state"), 1, "none.state: no such file, so there is no run to resume"),
    ],
)
def test_bad_flags_are_refused_before_the_model_is_loaded(tmp_path, flags, code, text):
    command = ("convert", "-m", "local-dir:/nowhere", "--data-dir", tmp_path, "-o", tmp_path / "out")
    result = run(*command, "--finetune-epochs", 1, *flags)
    assert result.exit_code == code, result.stderr
    assert text in result.stderr.splitlines()[-1]
