"""Several processes, each with its share of the images: the model that one process alone makes, on each of them."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import distributed, multiprocessing, nn

import normswap
from normswap.demo import FOLDER, MODEL
from normswap.inputs.batches import BATCH_SIZE
from normswap.records.report import Calibration

from .cli.test_cli import DEMO, FILES
from .models import family, images
from .tolerance import PROCESSES

WORLD = 2
TIMEOUT = 300  # seconds, for what takes ten
STEPS = 8  # enough of them to be seen, each in float64


def _calibrated(name: str, count: int, method: str) -> tuple[nn.Module, Calibration]:
    torch.set_num_threads(1)
    torch.manual_seed(0)
    model = normswap.load_model(MODEL).double() if name == "demo" else family(name, torch.float64)
    swapped = normswap.swap_norms(model)
    return swapped, normswap.calibrate(
        swapped,
        _images(name, model, count),
        original=model,
        options=normswap.CalibrationOptions(method=method, refine_steps=STEPS),
    )


def _images(name: str, model: nn.Module, count: int) -> list[torch.Tensor]:
    if name != "demo":
        return [images(model, count)]
    # Of noise, which it has never seen, a calibrated demo model makes 1e3 times the difference of its weights.
    return [batch.double() for batch, _ in normswap.load_images(model, FOLDER, "train").draw(count, 0)]


# Seven batches of the demo: one process has four, the other three. Few images make six small batches, the last smaller.
CASES = {
    "reconstruct": ("demo", 6 * BATCH_SIZE + 5, "reconstruct"),
    "few images": ("clip", BATCH_SIZE + 5, "reconstruct"),
    "channel": ("qk_norm_no_bias", 2 * BATCH_SIZE, "channel"),
}
TOO_FEW = ("vit", 1, "reconstruct")


def _found(arguments: tuple) -> object:
    try:
        swapped, found = _calibrated(*arguments)
    except normswap.NormswapError as error:
        return str(error)
    return swapped.state_dict(), found


def _rank(rank: int, folder: Path) -> None:
    """Do the work of one process; what it finds goes to a file."""
    distributed.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=WORLD)
    found = {name: _found(arguments) for name, arguments in {**CASES, "too few": TOO_FEW}.items()}
    torch.save(found, folder / f"{rank}.pt")
    distributed.destroy_process_group()


@pytest.fixture(scope="module")
def together(tmp_path_factory) -> dict[str, list]:
    """What each of two processes found, by case; all in one go, as most of their time goes into their start."""
    folder = tmp_path_factory.mktemp("together")
    started = multiprocessing.start_processes(_rank, (folder,), nprocs=WORLD, join=False, start_method="spawn")
    try:
        assert started.join(timeout=TIMEOUT) or started.join(timeout=TIMEOUT), "the processes wait for each other"
    finally:
        for process in started.processes:
            process.kill()
    ranks = [torch.load(folder / f"{rank}.pt", weights_only=False) for rank in range(WORLD)]
    return {name: [found[name] for found in ranks] for name in ranks[0]}


@pytest.mark.parametrize("case", CASES)
def test_processes_agree_with_one(together, case):
    swapped, alone = _calibrated(*CASES[case])
    (first, found), (second, _) = together[case]
    for name, tensor in swapped.state_dict().items():
        assert torch.equal(first[name], second[name]), name
        size = float(tensor.abs().max())
        torch.testing.assert_close(first[name], tensor, rtol=0, atol=PROCESSES * size, msg=name)
    x = _images(CASES[case][0], swapped, 4)[0]
    with torch.no_grad():
        answer = swapped.eval()(x)
        swapped.load_state_dict(first)
        torch.testing.assert_close(swapped(x), answer, rtol=PROCESSES, atol=PROCESSES)
    assert [(fit.site, fit.samples) for fit in found.sites] == [(fit.site, fit.samples) for fit in alone.sites]
    assert [(fit.layer, fit.samples, fit.penalty, fit.reason) for fit in found.layers] == [
        (fit.layer, fit.samples, fit.penalty, fit.reason) for fit in alone.layers
    ]
    if case == "reconstruct":  # else the gradient steps, which take most care, would not be tested
        assert any(fit.refined < 1 for fit in found.layers)
    for one, other in zip(alone.layers, found.layers, strict=True):
        assert one.reason or other.r2 == pytest.approx(one.r2, rel=PROCESSES)


def test_more_processes_than_batches(together):
    said = together["too few"]
    assert said == [said[0]] * WORLD
    assert "at least 2 batches" in said[0]


def _torchrun(*arguments) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={WORLD}"]
    command += ["-m", "normswap_cli", *map(str, arguments)]
    return subprocess.run(
        command, capture_output=True, text=True, timeout=TIMEOUT, env={**os.environ, "OMP_NUM_THREADS": "1"}
    )


def test_torchrun_writes_and_prints_once(tmp_path):
    out = tmp_path / "out"
    done = _torchrun("convert", *DEMO, "--calib-samples", 96, "-o", out, "--no-labels", "--no-stress")
    assert done.returncode == 0, done.stderr
    assert {path.name for path in out.iterdir()} == FILES
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    for label in ("load  ", "plan  ", "calibrate  ", "fold  ", "wrote  "):
        assert len(re.findall(rf"^{label}", done.stderr, re.M)) == 1, done.stderr
    assert len(re.findall(r"^fused ", done.stdout, re.M)) == 1


@pytest.mark.slow  # that each process stops, and with what words, is tested above
def test_torchrun_fails_in_one_line(tmp_path):
    done = _torchrun("convert", *DEMO, "--calib-samples", 1, "-o", tmp_path / "out")
    assert done.returncode != 0
    assert len(re.findall(r"^Error: 2 processes need at least 2 batches", done.stderr, re.M)) == 1, done.stderr
    assert not list(tmp_path.iterdir())
