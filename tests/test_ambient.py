"""What the caller has switched on in torch neither breaks nor changes a result, and is on again afterwards."""

from collections.abc import Callable
from contextlib import AbstractContextManager, ExitStack, contextmanager
from pathlib import Path
from typing import Any

import pytest
import timm
import torch

import normswap
from normswap.ambient import known_context, thaw

from .models import family, images


@contextmanager
def _set(setter: Callable[..., Any], value: Any, before: Any):
    setter(value)
    try:
        yield
    finally:
        setter(before)


AMBIENT: dict[str, Callable[[], AbstractContextManager[Any]]] = {
    "inference_mode": torch.inference_mode,
    "no_grad": torch.no_grad,
    "enable_grad": torch.enable_grad,
    "autocast": lambda: torch.autocast("cpu", torch.bfloat16),
    "default_dtype": lambda: _set(torch.set_default_dtype, torch.float64, torch.float32),
    "half_default_dtype": lambda: _set(torch.set_default_dtype, torch.float16, torch.float32),
    "default_device": lambda: torch.device("meta"),
    "deterministic": lambda: _set(torch.use_deterministic_algorithms, True, False),
    "matmul_precision": lambda: _set(torch.set_float32_matmul_precision, "medium", "highest"),
}
OPTIONS = normswap.CalibrationOptions(refine_steps=3)


def _state() -> tuple[Any, ...]:
    return (
        torch.is_inference_mode_enabled(),
        torch.is_grad_enabled(),
        torch.is_autocast_enabled("cpu"),
        torch.get_default_dtype(),
        torch.get_default_device(),
        torch.are_deterministic_algorithms_enabled(),
        torch.is_deterministic_algorithms_warn_only_enabled(),
        torch.get_float32_matmul_precision(),
        torch.get_num_threads(),
    )


def _bits(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def _assert_same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> None:
    assert a.keys() == b.keys()
    assert all(a[k].dtype == b[k].dtype and torch.equal(a[k], b[k]) for k in a)


@pytest.fixture(scope="module")
def outside() -> tuple[dict[str, torch.Tensor], float]:
    torch.manual_seed(0)
    model = family("vit")
    result = normswap.convert(model, [images(model, 20)], calibration=OPTIONS)
    assert result.report.fits
    return _bits(result.model), result.report.stages[-1].kl


@pytest.mark.parametrize("name", AMBIENT)
def test_a_conversion_is_the_one_from_outside(name, outside):
    model = family("vit")
    x = images(model, 20)
    with AMBIENT[name]():
        before = _state()
        result = normswap.convert(model, [x], calibration=OPTIONS)
        assert _state() == before
    _assert_same(_bits(result.model), outside[0])
    assert result.report.stages[-1].kl == outside[1]


def test_a_context_is_given_back_after_an_error_too():
    with ExitStack() as stack:
        for ambient in AMBIENT.values():
            stack.enter_context(ambient())
        before = _state()
        inside = []

        @known_context()
        def fails() -> None:
            inside.extend(_state())
            raise ZeroDivisionError

        with pytest.raises(ZeroDivisionError):
            fails()
        assert inside[:5] == [False, True, False, torch.float32, torch.device("cpu")]
        assert inside[6:8] == [True, "highest"]
        assert _state() == before


def test_the_number_of_threads_stays_the_callers():
    before = torch.get_num_threads()
    with _set(torch.set_num_threads, 1, before), known_context():
        assert torch.get_num_threads() == 1


def _steps(model: torch.nn.Module, x: torch.Tensor, folder: Path) -> dict[str, torch.Tensor]:
    """Run each of the long functions alone, on one model and the same images."""
    found = normswap.swap_norms(model)
    normswap.calibrate(found, [x], model, OPTIONS)
    tuning = normswap.finetune(found, [x], model, normswap.FinetuneOptions(batch_size=6))
    fused = normswap.fold_norms(found)
    (_, stage) = normswap.evaluate_models({"original": model, "fused": fused}, [x])
    report = normswap.export_model(fused, folder / "model.pt2", format="pt2")
    numbers = [stage.kl, tuning.kl_before, tuning.kl_after, report.comparison.max_abs_diff]
    with known_context():
        return _bits(fused) | {"numbers": torch.tensor(numbers, dtype=torch.float64)}


@pytest.fixture(scope="module")
def steps_outside(tmp_path_factory) -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    model = family("vit")
    return _steps(model, images(model, 20), tmp_path_factory.mktemp("outside"))


@pytest.mark.parametrize("name", ["inference_mode", "autocast", "default_dtype", "default_device"])
def test_the_single_steps_are_those_from_outside(name, steps_outside, tmp_path):
    model = family("vit")
    x = images(model, 20)
    with AMBIENT[name]():
        found = _steps(model, x, tmp_path)
    _assert_same(found, steps_outside)


def test_a_benchmark_keeps_the_precision_it_is_to_time(monkeypatch):
    monkeypatch.setattr("normswap.benchmarking.benchmark.warm_up", lambda step, clock: 1.0)
    monkeypatch.setattr("normswap.benchmarking.benchmark.steps_per_turn", lambda *_, **__: 1)
    model = family("vit")
    with torch.inference_mode(), torch.autocast("cpu"), AMBIENT["matmul_precision"](), AMBIENT["default_dtype"]():
        settings = normswap.benchmark_models(model, rounds=3).settings
    assert (settings["precision"], settings["amp_dtype"], settings["float32_matmul"]) == ("float32", None, "medium")


@pytest.mark.parametrize("name", ["inference_mode", "default_dtype", "default_device"])
def test_a_model_is_loaded_as_outside(name):
    arguments = {"img_size": 32, "embed_dim": 48, "num_heads": 3, "depth": 1, "random_weights": True}
    with AMBIENT[name]():
        model = normswap.load_model("vit_tiny_patch16_224", **arguments)
    assert {(p.dtype, p.device.type, p.is_inference()) for p in model.parameters()} == {(torch.float32, "cpu", False)}


def test_models_and_images_made_in_inference_mode_are_converted(outside):
    with torch.inference_mode():
        torch.manual_seed(0)
        model = family("vit")
        x = images(model, 20)
        result = normswap.convert(model, [x], calibration=OPTIONS)
        swapped = normswap.swap_norms(model, inplace=True)
    assert x.is_inference()
    _assert_same(_bits(result.model), outside[0])
    assert not any(p.is_inference() for p in (*result.model.parameters(), *swapped.parameters()))


def test_thawed_ties_stay_ties():
    with torch.inference_mode():
        model = timm.create_model("test_vit")
        model.blocks[1].mlp.fc1.weight = model.blocks[0].mlp.fc1.weight
    model.pos_embed.requires_grad_(False)
    thaw(model)
    assert model.blocks[1].mlp.fc1.weight is model.blocks[0].mlp.fc1.weight
    assert not model.pos_embed.requires_grad
    assert model.blocks[1].mlp.fc1.weight.requires_grad
