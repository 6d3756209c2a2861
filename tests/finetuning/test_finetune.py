"""Fine-tuning: it learns, it is never worse for it, it survives kill -9, and bad numbers stop it in one line."""

import errno
import os
import re
import signal
import socket
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import distributed, multiprocessing
from torchvision.transforms.v2.functional import resized_crop

import normswap
from normswap import ArgumentError, CalibrationError, CheckpointError, FinetuneOptions, MissingExtraError, OutputError
from normswap.demo import FOLDER, MODEL
from normswap.finetuning.augment import _boxes, cropped, views
from normswap.finetuning.batch_norm_statistics import estimate_statistics
from normswap.surgery.swap import batch_norms

from ..child import ONE_THREAD
from ..cli.test_cli import DEMO, one_object, run
from ..models import family, images
from ..tolerance import PROCESSES

# Twelve steps on the demo model, from a start that leaves room: its norms set, its layers as they were.
LEARN = FinetuneOptions(epochs=2, lr=1e-3, bn_mode="train", batch_size=24)


def started(count: int = 160) -> tuple[torch.nn.Module, torch.nn.Module, list]:
    torch.manual_seed(0)
    original = normswap.load_model(MODEL)
    batches = list(normswap.load_images(original, FOLDER, "train").draw(count, 0))
    swapped = normswap.swap_norms(original)
    normswap.calibrate(swapped, batches, original=original, options=normswap.CalibrationOptions(method="channel"))
    return original, swapped, batches


@pytest.fixture(scope="module")
def start():
    return started()


def copied(model: torch.nn.Module) -> torch.nn.Module:
    twin = normswap.swap_norms(normswap.load_model(MODEL))
    twin.load_state_dict(model.state_dict())
    return twin


def same_weights(a: torch.nn.Module, b: dict) -> bool:
    return all(torch.equal(tensor, b[name]) for name, tensor in a.state_dict().items())


@pytest.mark.parametrize(
    "extra", [{}, {"labels": 1.0}, {"accumulate": 2}, {"ema": 0.5}, {"features": 0.0}, {"hflip": 0.5, "scale": 0.8}]
)
def test_it_learns(start, extra):
    original, swapped, batches = start
    before = {name: tensor.clone() for name, tensor in original.state_dict().items()}
    student, said = copied(swapped), []
    options = FinetuneOptions(**{**vars(LEARN), **extra})
    found = normswap.finetune(student, batches, original, options, progress=lambda *args: said.append(args))
    assert found.taken
    assert found.kl_after < 0.8 * found.kl_before
    assert (found.images, found.held_out, found.dropped) == (144, 16, 0)
    assert found.steps == 12 // options.accumulate
    assert found.loss_last < found.loss_first
    assert [done for _, done, _ in said] == list(range(1, found.steps + 1))
    assert re.match(r"finetune: loss \d\.\d+, agreement \d+\.\d %, \d+ images/s$", said[-1][0])
    assert same_weights(original, before)
    assert not any(module.training for module in student.modules())
    assert not same_weights(student, swapped.state_dict())


def test_views(start):
    x = torch.cat([x for x, _ in start[2]])
    assert views(x, 0.0, 1.0, 1) is x
    assert torch.equal(views(x, 1.0, 1.0, 1), x.flip(-1))
    some = views(x, 0.5, 1.0, 1)
    mirrored = (some == x.flip(-1)).flatten(1).all(1)
    assert 0.3 < float(mirrored.float().mean()) < 0.7
    assert torch.equal(some[~mirrored], x[~mirrored])
    before = torch.random.get_rng_state()
    cropped = views(x, 0.5, 0.6, 3)
    assert torch.equal(cropped, views(x, 0.5, 0.6, 3))
    assert not torch.equal(cropped, views(x, 0.5, 0.6, 4))
    assert cropped.shape == x.shape
    assert torch.equal(before, torch.random.get_rng_state())
    # The crops of an image differ from each other, and each is like the image.
    same = views(x[:1].expand(8, -1, -1, -1), 0.0, 0.6, 5)
    assert len({float(image.sum()) for image in same}) > 4
    assert all(float(torch.corrcoef(torch.stack([a.flatten(), x[0].flatten()]))[0, 1]) > 0.3 for a in same)


def test_crops_are_what_a_resize_makes_of_them():
    x = torch.rand(4, 3, 20, 30, dtype=torch.float64)
    pixels = [(0, 0, 20, 30), (3, 5, 11, 20), (9, 0, 11, 9), (1, 14, 19, 15)]
    boxes = torch.tensor([[top / 20, left / 30, height / 20, width / 30] for top, left, height, width in pixels])
    got = cropped(x, boxes.double())
    for image, crop, box in zip(x, got, pixels, strict=True):
        expected = resized_crop(image, *box, [20, 30], antialias=True)
        # A resize that sees the crop alone repeats its outermost pixels: two on each side may differ.
        assert torch.allclose(crop[:, 2:-2, 2:-2], expected[:, 2:-2, 2:-2], atol=1e-5)  # the boxes are float32
    assert torch.allclose(got[0], x[0])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_crops_of_half_precision_are_those_of_full(dtype):
    x = torch.rand(4, 3, 224, 224).to(dtype)
    for seed in range(5):
        got = views(x, 0.5, 0.5, seed)
        assert got.dtype == dtype
        assert torch.equal(got, views(x.float(), 0.5, 0.5, seed).to(dtype))


def test_crops_lie_in_the_image_and_cover_what_they_may():
    boxes = _boxes(2000, 0.5, torch.Generator().manual_seed(0))
    top, left, height, width = boxes.T
    area = height * width
    assert ((boxes >= 0) & (boxes <= 1)).all()
    assert ((top + height <= 1 + 1e-6) & (left + width <= 1 + 1e-6)).all()
    assert area.min() > 0.45
    assert (area.max() > 0.99) & (area.mean() - 0.75).abs().lt(0.02)
    assert (width / height).max() < 1.22
    assert (width / height).min() > 0.82


def test_the_stem_stays_unless_it_is_wanted(start):
    original, swapped, batches = start
    for stem in (False, True):
        student = copied(swapped)
        student.patch_embed.proj.bias.requires_grad_(False)
        found = normswap.finetune(student, batches, original, FinetuneOptions(**{**vars(LEARN), "stem": stem}))
        assert found.taken
        assert torch.equal(student.patch_embed.proj.weight, swapped.patch_embed.proj.weight) is not stem
        assert torch.equal(student.patch_embed.proj.bias, swapped.patch_embed.proj.bias)
        assert not torch.equal(student.blocks[0].attn.qkv.weight, swapped.blocks[0].attn.qkv.weight)
        trained = {name: parameter.requires_grad for name, parameter in student.named_parameters()}
        assert [name for name, wanted in trained.items() if not wanted] == ["patch_embed.proj.bias"]


def test_frozen_norms_keep_their_statistics(start):
    original, swapped, batches = start
    student = copied(swapped)
    found = normswap.finetune(student, batches, original, FinetuneOptions(epochs=2, lr=1e-4, batch_size=24))
    assert found.taken
    for path, norm in batch_norms(student).items():
        for name in ("running_mean", "running_var"):
            assert torch.equal(getattr(norm, name), getattr(batch_norms(swapped)[path], name))


def test_statistics_are_those_of_clean_images():
    """In train mode each norm sees what the norms before it make of this very batch; one batch is checked by hand."""
    model = family("vit", torch.float64)
    swapped = normswap.swap_norms(model)
    x = images(swapped, 16)
    estimate_statistics(swapped, [x])
    norms, seen = batch_norms(swapped), {}
    hooks = [
        norm.register_forward_pre_hook(lambda _, inputs, path=path: seen.setdefault(path, inputs[0]))
        for path, norm in norms.items()
    ]
    with torch.no_grad():
        swapped.eval()
        for norm in norms.values():
            norm.train()
        swapped(x)
    for hook in hooks:
        hook.remove()
    for path, norm in norms.items():
        rows = seen[path].movedim(norm.channel_dim, -1).reshape(-1, norm.num_features)
        fresh = normswap.swap_norms(model).get_submodule(path)
        assert not torch.equal(norm.running_mean, fresh.running_mean)
    first = next(iter(norms))
    rows = seen[first].reshape(-1, norms[first].num_features)
    estimate_statistics(swapped, [x])
    torch.testing.assert_close(norms[first].running_mean, rows.mean(0), rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(norms[first].running_var, rows.var(0, correction=0), rtol=1e-10, atol=1e-12)


def test_steps_without_finite_numbers_are_dropped(start):
    original, swapped, batches = start
    student = copied(swapped)
    pixels = torch.cat([x for x, _ in batches])
    found = normswap.finetune(student, [pixels], original, LEARN)
    assert found.dropped == 0
    order = torch.randperm(160, generator=torch.Generator().manual_seed(LEARN.seed))
    pixels = pixels.clone()
    pixels[order[-1]] = float("nan")  # trained on, in one step of six
    student = copied(swapped)
    found = normswap.finetune(student, [pixels], original, FinetuneOptions(**{**vars(LEARN), "bn_mode": "frozen"}))
    assert found.dropped == 2
    assert all(bool(torch.isfinite(tensor).all()) for tensor in student.state_dict().values())


def test_too_many_of_them_end_the_run(start, tmp_path):
    original, swapped, batches = start
    pixels = torch.cat([x for x, _ in batches])
    pixels = pixels.masked_fill(torch.ones_like(pixels).bool(), float("inf"))
    student = copied(swapped)
    with pytest.raises(
        CalibrationError, match=r"^fine-tuning: 5 steps in a row gave no finite loss .* at step 5 of 12"
    ):
        normswap.finetune(student, [pixels], original, LEARN, state=tmp_path / "state.pt")
    assert same_weights(student, swapped.state_dict())
    assert [path.name for path in tmp_path.iterdir()] == ["state.pt"]


def trained(state: Path, resume: bool = False) -> dict[str, torch.Tensor]:
    """Fine-tune from the start in one thread, as processes do that are to give the same bits."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        original, swapped, batches = started()
        options = FinetuneOptions(**{**vars(LEARN), "hflip": 0.5, "scale": 0.8})
        normswap.finetune(swapped, batches, original, options, state=state, resume=resume, save_every=0.0)
    finally:
        torch.set_num_threads(threads)
    return swapped.state_dict()


SCRIPT = "import sys; from tests.finetuning.test_finetune import trained; trained(sys.argv[1])"


def test_kill_and_resume_give_the_same_bits(tmp_path):
    root = Path(__file__).resolve().parents[2]
    undisturbed = trained(tmp_path / "a.state")
    state = tmp_path / "b.state"
    with subprocess.Popen([sys.executable, "-c", SCRIPT, str(state)], env=ONE_THREAD, cwd=root) as process:
        until = time.monotonic() + 120
        while not state.exists() or torch.load(state, weights_only=True)["state"]["counts"][0] < 3:
            assert process.poll() is None
            assert time.monotonic() < until
            time.sleep(0.01)
        process.send_signal(signal.SIGKILL)
    done = torch.load(state, weights_only=True)["state"]["counts"][0]
    assert 3 <= done < 12
    # What a process killed while it writes leaves, whether or not this one was: the run that goes on tidies it up.
    left = tmp_path / f".b.state.normswap-{socket.gethostname()}-{process.pid}"
    left.mkdir(exist_ok=True)
    (left / "b.state").write_bytes(b"half")
    of_another = tmp_path / f".b.state.normswap-elsewhere-{process.pid}"
    of_another.write_bytes(b"half")
    resumed = trained(state, resume=True)
    assert all(torch.equal(undisturbed[name], resumed[name]) for name in undisturbed)
    assert [path.name for path in tmp_path.iterdir()] == [of_another.name]  # no states


def test_a_state_that_cannot_be_gone_on_from(start, tmp_path):
    original, swapped, batches = start
    state = tmp_path / "state.pt"

    learn = replace(LEARN, views=0.0)  # infinite images are no pixels, so the default would differ with them

    def refused(text: str, options: FinetuneOptions = learn) -> None:
        with pytest.raises(CheckpointError, match=text):
            normswap.finetune(copied(swapped), batches, original, options, state=state, resume=True)

    refused("no such file, so there is no run to resume")
    pixels = [torch.full_like(torch.cat([x for x, _ in batches]), float("inf"))]
    with pytest.raises(CalibrationError):
        normswap.finetune(copied(swapped), pixels, original, learn, state=state)
    refused("the state of another run .sums differ.: start afresh")
    refused("the state of another run .options, sums differ.", FinetuneOptions(epochs=2))
    whole = state.read_bytes()
    state.write_bytes(whole[: len(whole) // 2])
    refused("no state of a run, or truncated")
    state.write_bytes(b"")
    refused("no state of a run, or truncated")
    with pytest.raises(ArgumentError, match="`resume` needs `state`, the file"):
        normswap.finetune(copied(swapped), batches, original, LEARN, resume=True)


def test_a_full_disk_loses_nothing(start, tmp_path, monkeypatch):
    original, swapped, batches = start
    state = tmp_path / "state.pt"
    state.write_text("old")

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OutputError, match="cannot be written: No space left on device"):
        normswap.finetune(copied(swapped), batches, original, LEARN, state=state, save_every=0.0)
    assert state.read_text() == "old"
    assert list(tmp_path.iterdir()) == [state]


@pytest.mark.parametrize(
    ("take", "options", "text"),
    [
        (0, {}, "there are no images"),
        (1, {}, "at least two images, there are 1"),
        (20, {}, r"18 images to train on \(2 held out\) are fewer than one step takes, 24"),
        (160, {"bn_mode": "off"}, "`bn_mode` must be one of frozen, train, not 'off'"),
        (160, {"lr": 0.0}, "`lr` must be above 0"),
        (160, {"lr": float("nan")}, "`lr` must be above 0"),
        (160, {"kl": -1.0}, "must be 0 or more"),
        (160, {"kl": 0.0, "features": 0.0}, "there is nothing to train for"),
        (160, {"ema": 1.0}, "`ema` between 0 and 1"),
        (160, {"hflip": 1.5}, "`hflip` must be a probability"),
        (160, {"scale": 0.0}, "`scale` a share of an image's area"),
    ],
)
def test_bad_arguments(start, take, options, text):
    original, swapped, batches = start
    pixels = torch.cat([x for x, _ in batches])[:take]
    student = copied(swapped)
    with pytest.raises(ArgumentError, match=text):
        normswap.finetune(student, [pixels] * bool(take), original, FinetuneOptions(**{**vars(LEARN), **options}))
    assert same_weights(student, swapped.state_dict())


def test_labels_and_heads_must_fit(start):
    original, swapped, batches = start
    options = FinetuneOptions(**{**vars(LEARN), "labels": 1.0})
    wrong = [(x, y + 5) for x, y in batches]
    with pytest.raises(ArgumentError, match="labels go from 5 to 14, the model has classes 0 to 9"):
        normswap.finetune(copied(swapped), wrong, original, options)
    with pytest.raises(ArgumentError, match="the images have no labels"):
        normswap.finetune(copied(swapped), [x for x, _ in batches], original, options)
    student = copied(swapped)
    student.reset_classifier(7)
    with pytest.raises(ArgumentError, match="different heads: \\(7,\\) outputs against the original's \\(10,\\)"):
        normswap.finetune(student, batches, original, LEARN)


def test_accelerate_is_named_when_it_is_missing(start, monkeypatch):
    original, swapped, batches = start
    monkeypatch.setitem(sys.modules, "accelerate", None)
    with pytest.raises(MissingExtraError, match=re.escape("pip install 'normswap[train]'")):
        normswap.finetune(copied(swapped), batches, original, LEARN)


def _rank(rank: int, folder: Path) -> None:
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE="2", MASTER_ADDR="127.0.0.1", MASTER_PORT="0")
    torch.set_num_threads(1)
    distributed.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    original, swapped, batches = started()
    found = normswap.finetune(swapped, batches, original, FinetuneOptions(**{**vars(LEARN), "batch_size": 12}))
    torch.save((swapped.state_dict(), found), folder / f"{rank}.pt")
    distributed.destroy_process_group()


def test_two_processes_train_one_model(start, tmp_path):
    started = multiprocessing.start_processes(_rank, (tmp_path,), nprocs=2, join=False, start_method="spawn")
    try:
        assert started.join(timeout=200) or started.join(timeout=200)
    finally:
        for process in started.processes:
            process.kill()
    (first, found), (second, _) = (torch.load(tmp_path / f"{rank}.pt", weights_only=False) for rank in range(2))
    for name, tensor in first.items():
        torch.testing.assert_close(tensor, second[name], rtol=PROCESSES, atol=PROCESSES, msg=name)
    assert found.taken
    assert found.steps == 12
    assert found.kl_after < 0.8 * found.kl_before


def test_convert_fine_tunes(tmp_path):
    result = run(
        "convert", *DEMO, "-o", tmp_path / "out", "--method", "channel", "--calib-samples", 160, "--json",
        "--finetune-epochs", 2, "--lr", "1e-3", "--bn-mode", "train", "--train-batch-size", 24,
    )  # fmt: skip
    assert result.exit_code == 0, result.stderr
    record = one_object(result)
    assert [stage["name"] for stage in record["stages"]] == ["original", "swapped", "calibrated", "finetuned", "fused"]
    assert record["finetuning"]["taken"]
    assert record["finetuning"]["options"]["epochs"] == "2"
    assert record["stages"][3]["kl"] < record["stages"][2]["kl"]
    assert record["stages"][4]["agreement"] == record["stages"][3]["agreement"]
    assert record["seconds"]["finetune"] > 0
    assert re.search(
        r"^finetune +12 steps in \d+ s; KL [\d.]+ to [\d.]+ \(\+-[\d.]+\), top-1 agreement", result.stderr, re.MULTILINE
    )


@pytest.mark.parametrize(
    ("flags", "text"),
    [
        (["--resume"], "--resume, --auto-resume, --finetune-state and --control require --finetune-epochs"),
        (["--finetune-epochs", 1, "--resume"], "--resume needs the state file of a run: --finetune-state"),
    ],
)
def test_flags_that_need_others(tmp_path, flags, text):
    result = run("convert", *DEMO, "-o", tmp_path / "out", *flags)
    assert result.exit_code == 2
    assert text in result.stderr
