"""Both models side by side: any batches, each image once, nothing left behind, in memory or on disk to the bit."""

import copy
import functools
import tempfile
from collections import Counter, namedtuple
from pathlib import Path

import pytest
import timm
import torch
from torch import nn

from normswap import (
    ArgumentError,
    CalibrationError,
    CalibrationOptions,
    calibrate,
    swap_norms,
)
from normswap.calibration import activation_store as spill
from normswap.calibration.activation_store import Store, _bytes, parse_bytes
from normswap.calibration.options import METHODS
from normswap.errors import OutputError
from normswap.inputs.batches import BATCH_SIZE, rebatched
from normswap.layers import TokenBatchNorm
from normswap.progress import no_progress
from normswap.surgery.swap import batch_norms

from ..models import FAMILY, family, images


def _calibrated(
    model: nn.Module, batches, method: str = "reconstruct", memory_budget: int | None = None, progress=no_progress
) -> dict[str, torch.Tensor]:
    swapped = swap_norms(model)
    options = CalibrationOptions(method=method, memory_budget=memory_budget)
    calibrate(swapped, batches, model, options, progress)
    return swapped.state_dict()


def _same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


@pytest.fixture
def temporary(tmp_path, monkeypatch) -> Path:
    """The folder for temporary files, empty."""
    folder = tmp_path / "temporary"
    folder.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(folder))
    return folder


@functools.cache
def _of_75(method: str = "reconstruct") -> tuple[nn.Module, torch.Tensor, dict[str, torch.Tensor]]:
    """Return a model, 75 images, and what one batch of them makes of it."""
    torch.manual_seed(0)
    model = family("vit")
    x = images(model, 75)
    return model, x, _calibrated(model, [x], method)


@pytest.mark.parametrize(
    ("method", "sizes"),
    [
        *(("reconstruct", sizes) for sizes in ([24, 48, 3], [1] * 75, [BATCH_SIZE + 1, 42], [0, 75])),
        *((method, [24, 48, 3]) for method in METHODS if method != "reconstruct"),
    ],
    ids=str,
)
def test_batching_does_not_matter(method, sizes):
    """Not even to rounding: the images are put together again before they are used."""
    model, x, whole = _of_75(method)
    assert _same(_calibrated(model, x.split(sizes), method), whole)


def test_every_image_matters():
    """Else what is said above of batches would be said of nothing."""
    model, x, whole = _of_75()
    fewer = _calibrated(model, [x[:-1]])
    assert not torch.equal(fewer["norm.running_mean"], whole["norm.running_mean"])


@pytest.mark.parametrize("sizes", [[4, 4, 4], [3, 5, 4], [12], [4, 8], [5, 5, 2], [1] * 12], ids=str)
@pytest.mark.parametrize("size", [1, 4, 5, 12, 32])
def test_rebatching_keeps_every_image_in_order(sizes, size):
    x = torch.arange(12.0).reshape(12, 1, 1, 1)
    batches = list(rebatched(x.split(sizes), size))
    assert torch.equal(torch.cat(batches), x)
    assert {len(b) for b in batches[:-1]} <= {size}
    assert 0 < len(batches[-1]) <= size


@pytest.mark.parametrize("name", FAMILY)
def test_every_site_is_set_and_the_original_stays(name):
    model = family(name)
    before = copy.deepcopy(model.state_dict())
    swapped = swap_norms(model)
    fresh = copy.deepcopy(swapped)
    found = calibrate(swapped, [images(model, 8)], original=model)
    norms = {path for path, module in model.named_modules() if isinstance(module, nn.LayerNorm)}
    assert {fit.site for fit in found.sites} == norms & batch_norms(swapped).keys()
    assert len(found.sites) == len({fit.site for fit in found.sites})
    for path, norm in batch_norms(swapped).items():
        assert not torch.equal(norm.running_var, fresh.get_submodule(path).running_var), path
        assert torch.isfinite(norm.running_var).all()
    assert _same(before, model.state_dict())


def test_labels_are_not_needed():
    model, x, whole = _of_75()
    assert _same(_calibrated(model, [(x, torch.arange(75))]), whole)
    assert _same(_calibrated(model, [[x, torch.arange(75)]]), whole)


def test_images_may_come_from_a_generator_once():
    model, x, whole = _of_75()
    assert _same(_calibrated(model, (batch for batch in x.split(7))), whole)


@pytest.mark.parametrize("method", ["channel", "moments"])
def test_each_image_goes_through_each_model_once(method):
    """Counted on the live norms: every one runs once per batch, not once per site and batch."""
    model = family("vit")
    swapped = swap_norms(model)
    calls: Counter[str] = Counter()
    for prefix, which in (("original", model), ("converted", swapped)):
        for path, module in which.named_modules():
            if isinstance(module, nn.LayerNorm | TokenBatchNorm):
                module.register_forward_hook(lambda *_, key=f"{prefix} {path}": calls.update([key]))
    calibrate(swapped, [images(model, 5 * BATCH_SIZE)], original=model, options=CalibrationOptions(method=method))
    assert len(calls) == 12  # 5 LayerNorms, and as many BatchNorms with two more in the FFNs
    assert set(calls.values()) == {5 + 1}  # and once in the export


def test_dropout_and_drop_path_are_off_and_flags_come_back():
    arguments = {"img_size": 32, "embed_dim": 48, "num_heads": 3, "depth": 2, "num_classes": 7}
    model = timm.create_model("vit_tiny_patch16_224", drop_path_rate=0.5, proj_drop_rate=0.5, **arguments)
    x = images(model, 40)
    reference = _calibrated(copy.deepcopy(model).eval(), [x])
    model.train()
    swapped = swap_norms(model)
    calibrate(swapped, [x], original=model)
    assert all(module.training for module in [*model.modules(), *swapped.modules()])
    assert _same(reference, swapped.state_dict())


def test_progress_names_everything_once_and_ends():
    model = family("vit")
    told: list[tuple[str, int, int]] = []
    swapped = swap_norms(model)
    found = calibrate(swapped, [images(model, 8)], original=model, progress=lambda *step: told.append(step))
    (*steps, last) = told
    assert last == ("calibrate", len(steps), len(steps))
    assert [step[1:] for step in steps] == [(i, len(steps)) for i in range(len(steps))]
    named = [step[0].removeprefix("calibrate: ") for step in steps]
    assert sorted(named) == sorted([f.site for f in found.sites] + [f.layer for f in found.layers])


@pytest.fixture
def sizes(monkeypatch) -> list[int]:
    """What the values of a batch took in memory, each time they were put away."""
    seen: list[int] = []
    put = Store.put

    def spy(store, index, values):
        seen.append(_bytes(values))
        put(store, index, values)

    monkeypatch.setattr(Store, "put", spy)
    return seen


@pytest.mark.parametrize("name", ["vit", "clip_no_embed_class"])
def test_spilled_to_disk_or_not_is_the_same_to_the_bit(name, temporary, sizes, monkeypatch):
    model = family(name)
    x = images(model, 6 * BATCH_SIZE)
    reference = _calibrated(model, [x])
    assert not list(temporary.iterdir())
    written: list[Path] = []
    save = torch.save
    monkeypatch.setattr(torch, "save", lambda values, path: (written.append(path), save(values, path)))
    assert _same(_calibrated(model, [x], memory_budget=max(sizes)), reference)
    assert len({path.name for path in written}) > 3  # of six batches
    assert all(path.parent.parent == temporary for path in written)
    assert not list(temporary.iterdir())


def test_a_budget_below_one_batch_is_one_line(temporary, sizes):
    model = family("vit")
    x = images(model, 2 * BATCH_SIZE)
    with pytest.raises(
        ArgumentError, match=r"`memory_budget` 0\.0 MiB is too small: one batch .* takes 0\.\d MiB"
    ) as e:
        _calibrated(model, [x], memory_budget=1000)
    assert e.value.exit_code == 2
    assert "\n" not in str(e.value)
    assert not list(temporary.iterdir())


def test_an_interrupted_run_leaves_nothing_on_disk(temporary, sizes):
    model = family("vit")
    before = copy.deepcopy(model.state_dict())
    x = images(model, 4 * BATCH_SIZE)
    _calibrated(model, [x])
    on_disk = []

    def stop(what, done, total):
        on_disk.append(len(list(temporary.rglob("*.pt"))))
        if done > total // 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        _calibrated(model, [x], memory_budget=max(sizes), progress=stop)
    assert max(on_disk) > 0
    assert not list(temporary.iterdir())
    assert _same(before, model.state_dict())


def test_a_full_disk_is_one_line(temporary, sizes, monkeypatch):
    model = family("vit")
    x = images(model, 4 * BATCH_SIZE)
    _calibrated(model, [x])

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(OutputError, match=f"{temporary}.*No space left on device.*`memory_budget`.*TMPDIR"):
        _calibrated(model, [x], memory_budget=max(sizes))
    assert not list(temporary.iterdir())


@pytest.mark.parametrize(
    ("text", "size"),
    [("1", 1), ("512", 512), ("1k", 2**10), ("512M", 2**29), ("8G", 2**33), ("2.5 GiB", 5 * 2**29), ("1TB", 2**40)],
)
def test_memory_sizes(text, size):
    assert parse_bytes(text) == size


@pytest.mark.parametrize("text", ["", "G", "0", "-1G", "8X", "1e999", "nan", "eight", "1 2", "0.1", "M8"])
def test_what_is_no_memory_size(text):
    with pytest.raises(ArgumentError, match="512M or 8G"):
        parse_bytes(text)


def test_the_first_batches_stay_in_memory(temporary):
    store = Store(3 * 4 * 100)
    for i in range(5):
        store.put(i, {"x": torch.full((100,), float(i))})
    assert (sorted(store.resident), sorted(store.on_disk)) == ([0, 1, 2], [3, 4])
    assert store.peak == store.budget
    for i in range(5):
        assert torch.equal(store.take(i)["x"], torch.full((100,), float(i)))
    store.close()
    assert not list(temporary.iterdir())


def test_what_an_accelerator_has_no_room_for_goes_to_memory_and_comes_back(temporary, monkeypatch):
    went: list[str] = []

    def move(values, device):
        went.append(device.type)
        return values

    monkeypatch.setattr(spill, "moved", move)
    monkeypatch.setattr(spill, "_free_on", lambda device: 2 * 2 * 400)
    store = Store(3 * 400)
    for i in range(6):
        store.put(i, {"x": torch.empty(100, device="meta")})  # 400 bytes
    assert (sorted(store.on_gpu), sorted(store.resident), sorted(store.on_disk)) == ([0, 1], [2, 3, 4], [5])
    assert went == ["cpu"] * 4
    for i in range(6):
        assert store.take(i)["x"].device.type == "meta"
    assert went == ["cpu"] * 4 + ["meta"] * 4
    assert not store.on_gpu
    assert not store.resident
    store.close()


def test_moved_keeps_what_holds_the_tensors():
    pair = namedtuple("pair", "a b")
    values = {"x": (torch.ones(1), [torch.ones(2)]), "y": pair(torch.ones(3), 4)}
    found = spill.moved(values, torch.device("meta"))
    assert found["x"][0].device.type == found["x"][1][0].device.type == found["y"].a.device.type == "meta"
    assert isinstance(found["y"], pair)
    assert found["y"].b == 4


@pytest.mark.parametrize("where", ["image", "weight", "infinite image"])
@pytest.mark.parametrize("method", METHODS)
def test_non_finite_statistics_name_the_site(where, method):
    model = family("vit")
    x = images(model, 4)
    if where == "weight":
        model.blocks[0].mlp.fc2.weight.data[0, 0] = float("inf")
    else:
        x[2, 0, 0, 0] = float("nan" if where == "image" else "inf")
    site = "blocks.0.norm1"
    if where == "weight":  # seen where it is, or else behind it
        site = "blocks.0.mlp.fc2" if method == "reconstruct" else "blocks.1.norm1"
    with pytest.raises(CalibrationError, match=site) as caught:
        _calibrated(model, [x], method)
    assert caught.value.exit_code == 1


def test_wrong_arguments():
    model = family("vit")
    swapped = swap_norms(model)
    with pytest.raises(ArgumentError, match="reconstruct, channel, moments"):
        calibrate(swapped, [images(model)], original=model, options=CalibrationOptions(method="magic"))
    with pytest.raises(ArgumentError, match="all, readers"):
        calibrate(swapped, [images(model)], original=model, options=CalibrationOptions(reconstruct="writers"))
    with pytest.raises(ArgumentError, match="no images"):
        calibrate(swapped, [], original=model)
    with pytest.raises(ArgumentError, match=r"\[B, C, H, W\]"):
        calibrate(swapped, [torch.zeros(3)], original=model)
    with pytest.raises(ArgumentError, match=r"one size; there are \[3, 32, 32\] and \[3, 48, 48\]"):
        calibrate(swapped, [images(model), torch.zeros(2, 3, 48, 48)], original=model)
    with pytest.raises(ArgumentError, match="swap first"):
        calibrate(model, [images(model)], original=model)
