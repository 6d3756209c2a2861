"""Images and models that make a solve hard: the API and the command line go on by rule, or stop in one line."""

import re
import signal
import sys
import time

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import nn

import normswap
from normswap import (
    ArgumentError,
    CalibrationError,
    ModelRefusedError,
    calibrate,
    convert,
    swap_norms,
)
from normswap.demo import FOLDER, MODEL

from ..child import started
from ..cli.test_bad_input import images as digits
from ..cli.test_bad_input import listing, out, refused
from ..cli.test_cli import DEMO, one_object, run
from ..models import family, images

__all__ = ["digits", "out"]  # fixtures

# Where how near the result comes is not the question.
QUICK = ("--refine-steps", 2)
CHANNEL = normswap.CalibrationOptions(method="channel")


def _error(converted: nn.Module, original: nn.Module, x: torch.Tensor) -> float:
    with torch.no_grad():
        return float((converted.eval()(x) - original(x)).norm() / original(x).norm())


def _both(model: nn.Module, x: torch.Tensor):
    channel, reconstructed = swap_norms(model), swap_norms(model)
    calibrate(channel, [x], original=model, options=normswap.CalibrationOptions(method="channel"))
    return channel, reconstructed, calibrate(reconstructed, [x], original=model)


@pytest.mark.parametrize("count", [1, 8])
def test_too_few_images_leave_every_layer_as_it_is(count):
    """5 tokens an image; no layer of this model has fewer than 48 inputs."""
    model = family("vit")
    channel, reconstructed, found = _both(model, images(model, count))
    assert len(found.layers) == 9
    for fit in found.layers:
        wide = {"mlp.fc2": 192}.get(fit.layer.partition("blocks.")[2][2:], 48)
        rows = count if fit.layer == "head" else 5 * count
        assert fit.reason == f"{wide} inputs need at least {wide} rows, these images give {rows}"
        assert (fit.samples, fit.r2, fit.penalty) == (rows, None, None)
    state = reconstructed.state_dict()
    assert all(torch.equal(state[key], value) for key, value in channel.state_dict().items())


def test_some_layers_have_enough():
    model = family("vit")
    _, _, found = _both(model, images(model, 30))
    kept = {fit.layer for fit in found.layers if fit.reason}
    assert kept == {"blocks.0.mlp.fc2", "blocks.1.mlp.fc2", "head"}
    assert all("150" in fit.reason or "30" in fit.reason for fit in found.layers if fit.reason)


HARD = {
    "one image again and again": lambda x: x[:1].expand_as(x),
    "one colour": lambda x: torch.full_like(x, 0.7),
    "black": torch.zeros_like,
    "one colour each": lambda x: x[:, :, :1, :1].expand_as(x),
    "huge": lambda x: x * 1e4,
    "tiny": lambda x: x * 1e-6,
}


# Fitted to next to no variation, a model is right on such images and may be wrong by any amount on others.
FAR_FROM_OTHERS = ("one colour each", "tiny")


@pytest.mark.parametrize(
    ("name", "case"),
    [*(("vit", case) for case in HARD), *((name, case) for name in ("clip", "no_qkv_bias") for case in list(HARD)[:2])],
)
def test_images_that_say_little_do_no_harm(name, case):
    """Right on them; what they do not have at all stays as it was, so on others not much worse than before."""
    model = family(name)
    x, other = HARD[case](images(model, 192)), images(model, 32, seed=5)
    channel, reconstructed, found = _both(model, x)
    assert all(torch.isfinite(tensor).all() for tensor in reconstructed.state_dict().values())
    assert _error(reconstructed, model, x) < _error(channel, model, x) / 4
    if case not in FAR_FROM_OTHERS:
        assert _error(reconstructed, model, other) < _error(channel, model, other) + 0.3
    assert all(fit.r2 <= 1 for fit in found.layers if not fit.reason)


@pytest.mark.parametrize("kind", ["one", "copies", "one colour"])
def test_hard_images_on_the_command_line(tmp_path, digits, kind):
    data, out = tmp_path / "data", tmp_path / "out"
    data.mkdir()
    first = Image.open(min(digits.rglob("*.png")))
    for i in range(1 if kind == "one" else 40):
        (Image.new("RGB", (32, 32), (90, 30, 200)) if kind == "one colour" else first).save(data / f"{i}.png")
    result = run("convert", "-m", MODEL, "--data-dir", data, "-j", 0, "--device", "cpu", "-o", out, "--json")
    assert result.exit_code == 0, result.stderr
    record = one_object(result)
    assert record["agreement"] == 100
    assert record["non_finite"] == 0
    kept = {fit["layer"]: fit["reason"] for fit in record["layers"] if fit["reason"]}
    assert len(kept) == {"one": 5, "copies": 1, "one colour": 1}[kind]  # 65 rows, and one for the head, an image
    assert f"kept       {len(kept)} of 17 layers kept their weights\n" in result.stderr
    shown = re.findall(
        r"^kept +(\S+): (\d+ inputs need at least \d+ rows, these images give \d+)$", result.stderr, re.M
    )
    assert dict(shown) == dict(list(kept.items())[:3])
    card = (out / "README.md").read_text()
    assert f"- {len(kept)} of 17 layers kept their weights" in card
    assert all(f"- {layer}: {reason}" in card for layer, reason in shown)


def test_nan_pixels_on_the_command_line(out):
    """Pixels are bytes, so only a mean or deviation can spoil them."""
    refused(out, 1, ["blocks.0.norm1: ", "not finite"], "--mean", "nan", 0.5, 0.5)


@pytest.mark.parametrize(("name", "dtype"), [("vit", torch.float16), ("vit", torch.bfloat16), ("clip", torch.bfloat16)])
def test_half_precision(name, dtype):
    """Sums are taken in more, so the error is that of the format and not of the solve."""
    torch.manual_seed(0)
    model = family(name, dtype)
    double = family(name, torch.float64)
    double.load_state_dict(model.state_dict())
    x = images(model, 192)
    swapped, exact = swap_norms(model), swap_norms(double)
    found = calibrate(swapped, [x], original=model)
    calibrate(exact, [x.double()], original=double)
    assert all(fit.r2 > fit.r2_before for fit in found.layers if fit.role == "reader" and not fit.reason)
    assert {p.dtype for p in swapped.parameters()} >= {dtype}
    rounding = 20 * torch.finfo(dtype).eps
    assert _error(swapped.double(), double, x.double()) < _error(exact, double, x.double()) + rounding


def test_half_precision_and_the_fold_check():
    """What is checked is the fold, in float32, and not how coarse the format is."""
    model = family("vit", torch.bfloat16)
    report = (result := convert(model, [images(model, 64)])).report
    assert report.fold_max_abs_err < 1e-3
    assert report.fold_float64_err < 1e-12
    assert report.fold_warning is None
    assert {p.dtype for p in result.model.parameters()} == {torch.bfloat16}


@pytest.mark.parametrize("dtype", [torch.float16, pytest.param(torch.bfloat16, marks=pytest.mark.slow)])
def test_half_checkpoints_on_the_command_line(tmp_path, dtype):
    """timm loads them into a float32 model, and so does convert."""
    path = tmp_path / "half.safetensors"
    save_file({name: t.to(dtype) for name, t in load_file(FOLDER / "model.safetensors").items()}, path)
    flags = ("--checkpoint", path, "--calib-samples", 320, "--views", 0, *QUICK)
    result = run("convert", *DEMO, *flags, "-o", tmp_path / "out", "--json")
    assert result.exit_code == 0, result.stderr
    record = one_object(result)
    assert record["agreement"] > 90
    assert {t.dtype for t in load_file(tmp_path / "out/model.safetensors").values()} == {torch.float32}


def test_another_image_size():
    model = family("vit")
    with pytest.raises(
        ModelRefusedError, match=r"images of \[3, 48, 48\].*Input height \(48\) doesn't match"
    ) as caught:
        convert(model, [torch.randn(4, 3, 48, 48)])
    assert "\n" not in str(caught.value)
    with pytest.raises(ModelRefusedError, match=r"images of \[3, 48, 48\]"):
        calibrate(swap_norms(model), [torch.randn(4, 3, 48, 48)], original=model)
    with pytest.raises(ArgumentError, match="one size"):
        convert(model, [images(model), torch.randn(4, 3, 48, 48)])
    bigger = convert(family("dynamic_size"), [torch.randn(64, 3, 48, 48)], calibration=CHANNEL)
    assert bigger.plan.input_size == (3, 48, 48)


def test_another_image_size_on_the_command_line(tmp_path, out):
    # timm resamples the positions
    result = run("convert", *DEMO, "--img-size", 48, "--method", "channel", "-o", tmp_path / "out", "--json")
    assert result.exit_code == 0, result.stderr
    assert normswap.load(tmp_path / "out").patch_embed.img_size == (48, 48)


def test_one_image_at_a_time(tmp_path):
    """The batch of the loader is not that of the calibration."""
    flags = ("--method", "channel", "--no-report", "-q")
    one = run("convert", *DEMO, *flags, "-b", 1, "-o", tmp_path / "one")
    many = run("convert", *DEMO, *flags, "-o", tmp_path / "many")
    assert (one.exit_code, many.exit_code) == (0, 0)
    weights = [load_file(tmp_path / name / "model.safetensors") for name in ("one", "many")]
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])


def test_training_mode_does_not_matter():
    found = []
    for training in (True, False):
        torch.manual_seed(0)
        model = family("vit").train(training)
        result = convert(model, [images(model, 64)])
        assert result.model.training == model.training == training
        found.append(result.model.state_dict())
    assert all(torch.equal(found[0][key], value) for key, value in found[1].items())


def test_an_error_of_the_images_is_not_hidden():
    model = family("vit")
    with pytest.raises(CalibrationError, match=r"blocks\.0\.norm1"):
        convert(model, [images(model).fill_(float("nan"))])


@pytest.mark.parametrize("size", ["8X", "0", "-1G", "none"])
def test_what_is_no_memory_budget(out, size):
    refused(out, 2, ["--memory-budget", size, "512M or 8G"], f"--memory-budget={size}")


def test_a_memory_budget_that_is_too_small(out):
    refused(out, 2, ["--memory-budget 0.0 MiB is too small", "one batch of activations takes"], "--memory-budget=1K")


def test_a_memory_budget_changes_nothing(tmp_path):
    arguments = ("convert", *DEMO, "--calib-samples", 96, "--method", "channel", "--no-report", "-q")
    for name, budget in (("small", ["--memory-budget", "3M"]), ("large", [])):
        result = run(*arguments, "-o", tmp_path / name, *budget)
        assert result.exit_code == 0, result.stderr
    weights = [(tmp_path / name / "model.safetensors").read_bytes() for name in ("small", "large")]
    assert weights[0] == weights[1]


@pytest.mark.slow  # tests/calibration/test_lockstep.py interrupts a calibration that writes to disk, from Python
def test_interrupt_while_activations_are_on_disk(tmp_path):
    """Ctrl-C in the middle of the calibration: no output, and nothing among the temporary files."""
    temporary, target = tmp_path / "tmp", tmp_path / "to"
    temporary.mkdir()
    target.mkdir()
    command = [sys.executable, "-m", "normswap_cli", "convert", *map(str, DEMO), "--calib-samples", "320"]
    command += ["--memory-budget", "3M", "-o", str(target / "out")]
    with started(command, TMPDIR=str(temporary)) as process:
        until = time.monotonic() + 120
        while not list(temporary.glob("normswap-*/*.pt")):
            assert process.poll() is None, "it ended before anything went to disk"
            assert time.monotonic() < until
            time.sleep(0.01)
        process.send_signal(signal.SIGINT)
        stdout, stderr = process.communicate(timeout=60)
    assert process.returncode == 1
    assert stderr.split()[-1] == "Aborted!"
    assert "Traceback" not in stderr
    assert stdout == ""
    assert not listing(target)
    assert not [path for path in temporary.iterdir() if path.name.startswith("normswap")]


@pytest.mark.parametrize("ratio", [*(pytest.param(ratio, marks=pytest.mark.slow) for ratio in (5, 15)), 30])
def test_tokens_with_massive_activations(ratio):
    """Two tokens carry one huge channel through the depth, as large ViTs' do: the others must not pay for them."""
    model = normswap.load_model(MODEL)
    images = torch.cat([batch for batch, _ in normswap.load_images(model, FOLDER, "train")])
    others = torch.cat([batch for batch, _ in normswap.load_images(model, FOLDER, "validation")])
    sigmas: list[torch.Tensor] = []
    hooks = [
        block.norm1.register_forward_pre_hook(lambda _, x: sigmas.append(x[0].std(-1, correction=0)))
        for block in model.blocks
    ]
    with torch.no_grad():
        model(images[:64])
        spike = ratio * float(sigmas[0].median()) * model.embed_dim**0.5
        model.pos_embed[0, [4, 9], 7] += spike
        del sigmas[:]
        wanted = model(others)
    assert all(bool((sigma[:, 4] > 0.6 * ratio * sigma.median()).all()) for sigma in sigmas)
    for hook in hooks:
        hook.remove()
    swapped = normswap.swap_norms(model)
    found = normswap.calibrate(swapped, images.split(32), original=model)
    with torch.no_grad():
        agreement = (swapped.eval()(others).argmax(1) == wanted.argmax(1)).float().mean()
    assert agreement > 0.97
    assert found.stream[-1].patch < 0.2  # of the stream, 0.15 without the spikes
