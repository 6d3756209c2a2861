"""On a GPU: the same results as on the CPU, from the plan to the export. Skipped where there is none."""

import copy

import pytest
import torch
from torch import distributed, nn

import normswap
from normswap import FinetuneOptions
from normswap import distributed as sums
from normswap.calibration import activation_store as spill
from normswap.calibration.activation_store import Store
from normswap.demo import FOLDER, MODEL
from normswap.inputs.batches import BATCH_SIZE

from .cli.test_cli import one_object, run
from .models import FAMILY, family, images
from .tolerance import FOLD_FLOAT32, GPU

DEVICE = "cuda"
IMAGES = ("--data-dir", FOLDER, "-j", 0, "--device", DEVICE)
pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


@pytest.fixture(scope="module")
def converted(tmp_path_factory):
    out = tmp_path_factory.mktemp("gpu") / "out"
    swapped = out.with_name("swapped")
    result = run("convert", "-m", MODEL, *IMAGES, "-o", out, "--save-swapped", swapped, "--json")
    assert result.exit_code == 0, result.stderr
    return out, swapped, one_object(result)


@pytest.mark.parametrize("method", ["moments", "channel", "reconstruct"])
def test_calibration_is_the_cpus(method):
    original = normswap.load_model(MODEL).eval()
    train, evaluation = (normswap.load_images(original, FOLDER, split) for split in ("train", "validation"))
    batches, tests = [x for x, _ in train.draw(320, 0)], list(evaluation.draw(64, 0))
    fused = {}
    for device in ("cpu", DEVICE):
        model = copy.deepcopy(original).to(device)
        swapped = normswap.swap_norms(model)
        normswap.calibrate(swapped, batches, original=model, options=normswap.CalibrationOptions(method=method))
        fused[device] = normswap.fold_norms(swapped)
        assert {p.device.type for p in fused[device].parameters()} == {device}
    x = torch.cat([x for x, _ in tests])
    with torch.no_grad():
        plain, found, expected = original(x), fused[DEVICE](x.to(DEVICE)).cpu(), fused["cpu"](x)
    assert (found - expected).norm() < GPU * expected.norm()
    assert (expected - plain).norm() > 10 * (found - expected).norm()  # so calibration did something, the same thing


@pytest.mark.parametrize("name", sorted(FAMILY))
def test_every_family_folds(name):
    model = family(name).to(DEVICE)
    x = images(model, 4).to(DEVICE)
    swapped = normswap.swap_norms(model)
    normswap.calibrate(swapped, [x], original=model, options=normswap.CalibrationOptions(method="channel"))
    fused = normswap.fold_norms(swapped)
    with torch.no_grad():
        expected, found = swapped(x), fused(x)
    assert not any(isinstance(module, nn.BatchNorm1d) for module in fused.modules())
    assert (found - expected).abs().max() < FOLD_FLOAT32 * expected.abs().max().clamp(min=1)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_stays_half_and_finite(dtype):
    original = normswap.load_model(MODEL).to(DEVICE, dtype).eval()
    x = torch.cat([x for x, _ in normswap.load_images(original, FOLDER, "train").draw(160, 0)]).to(DEVICE, dtype)
    swapped = normswap.swap_norms(original)
    normswap.calibrate(swapped, [x], original=original)
    fused = normswap.fold_norms(swapped)
    with torch.no_grad():
        same = (fused(x).argmax(1) == original(x).argmax(1)).float().mean()
    assert {p.dtype for p in fused.parameters()} == {dtype}
    assert float(same) > 0.9


def test_activations_leave_the_gpu_for_memory_and_memory_for_the_disk(monkeypatch, tmp_path):
    monkeypatch.setattr(spill.tempfile, "tempdir", str(tmp_path))
    model = family("vit").to(DEVICE)
    x = images(model, 6 * BATCH_SIZE)
    seen: list[tuple[int, int, int]] = []
    largest = 0
    put = Store.put

    def spy(store, index, values):
        nonlocal largest
        largest = max(largest, spill._bytes(values))
        put(store, index, values)
        seen.append((len(store.on_gpu), len(store.resident), len(store.on_disk)))

    monkeypatch.setattr(Store, "put", spy)

    def weights(budget: int | None) -> dict[str, torch.Tensor]:
        seen.clear()
        swapped = normswap.swap_norms(model)
        normswap.calibrate(swapped, [x], original=model, options=normswap.CalibrationOptions(memory_budget=budget))
        return swapped.state_dict()

    everything = weights(None)
    assert {counts[1:] for counts in seen} == {(0, 0)}
    little = weights(2 * largest)
    assert all(max(counts[i] for counts in seen) > 0 for i in range(3))
    assert all(torch.equal(tensor, little[name]) for name, tensor in everything.items())
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("extra", [{}, {"bn_mode": "train", "ema": 0.5}, {"hflip": 0.5, "scale": 0.8}])
def test_fine_tuning_learns(extra, tmp_path):
    original = normswap.load_model(MODEL).to(DEVICE).eval()
    batches = list(normswap.load_images(original, FOLDER, "train").draw(160, 0))
    swapped = normswap.swap_norms(original)
    normswap.calibrate(swapped, batches, original=original, options=normswap.CalibrationOptions(method="channel"))
    state = tmp_path / "state.pt"
    options = FinetuneOptions(epochs=2, lr=1e-3, batch_size=24, amp_dtype=torch.bfloat16, **extra)

    def stop(what, done, total):
        if done == 7:
            raise KeyboardInterrupt

    student = copy.deepcopy(swapped)
    with pytest.raises(KeyboardInterrupt):
        normswap.finetune(student, batches, original, options, state=state, save_every=0.0, progress=stop)
    student = copy.deepcopy(swapped)
    found = normswap.finetune(student, batches, original, options, state=state, resume=True)
    assert (found.taken, found.dropped, found.steps) == (True, 0, 12)
    assert found.kl_after < 0.8 * found.kl_before
    assert {p.device.type for p in student.parameters()} == {DEVICE}
    assert not state.exists()


def test_the_command_line(converted, tmp_path):
    out, swapped, record = converted
    stages = {stage["name"]: stage for stage in record["stages"]}
    assert stages["original"]["top1"] - stages["fused"]["top1"] < 2
    assert one_object(run("evaluate", "-m", f"local-dir:{out}", "--against", MODEL, *IMAGES, "--amp", "--json"))
    tuned = tmp_path / "tuned"
    done = run("finetune", "-m", swapped, *IMAGES, "--epochs", 1, "--train-amp", "-o", tuned, "--json")
    assert done.exit_code == 0, done.stderr
    done = run("fuse", "-m", tuned, *IMAGES, "-o", tmp_path / "fused", "--json")
    assert done.exit_code == 0, done.stderr
    done = run("export", out, "--format", "onnx", "--data-dir", FOLDER, "--json")
    assert done.exit_code == 0, done.stderr


def test_an_accuracy_budget(tmp_path):
    done = run(
        *("convert", "-m", MODEL, *IMAGES, "--method", "channel", "--max-drop", 3.0, "--calib-samples", 128),
        *("-o", tmp_path / "out", "--json"),
    )
    assert done.exit_code == 0, done.stderr
    assert one_object(done)["budget"]["met"] is True


def test_sums_go_through_nccl_and_those_in_memory_through_gloo(tmp_path, monkeypatch):
    distributed.init_process_group("cpu:gloo,cuda:nccl", init_method=f"file://{tmp_path}/meeting", rank=0, world_size=1)
    try:
        monkeypatch.setattr(sums, "world", lambda: (0, 2))  # one process sums as if it were one of two
        on_gpu, in_memory = torch.ones(3, dtype=torch.float64, device=DEVICE), torch.ones(3)
        sums.all_sum(on_gpu, in_memory)
        assert on_gpu.tolist() == in_memory.tolist() == [1, 1, 1]
        assert sums.from_first(on_gpu).tolist() == [1, 1, 1]
        assert sums.gathered(5)[0] == 5
    finally:
        distributed.destroy_process_group()
