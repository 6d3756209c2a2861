"""What runs a model: PyTorch eagerly, torch.compile, ONNX Runtime. Each makes one step that can be timed.

To add a runtime: name it in `ENGINES` of `normswap.benchmarking.options`, refuse in `check_engine` what it cannot do,
and return a `Runnable` for it from `prepare`. A file format of its own belongs to `normswap.exporting`.
"""

import json
import os
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..errors import BenchmarkError, MissingExtraError, one_line
from ..exporting.onnx_file import EXTRA_ONNX, open_session, write_onnx
from ..planning.graph import export_program
from .options import COMPILE, ONNXRUNTIME
from .timing import Step


@dataclass(frozen=True)
class Runnable:
    """One model on one engine.

    Attributes:
        step: runs the model once on the images and returns its output `[B, K]`, a tensor or an array.
        move: puts its weights elsewhere in memory; what runs best where is chance, and can make a few percent.
        peak_memory: measures the bytes of weights and activations that one step needs; None where nothing tells.
    """

    step: Step
    move: Callable[[], None]
    peak_memory: Callable[[], int | None]


def has_onnxruntime() -> bool:
    """Return whether the packages of the extra [onnx] are installed."""
    return all(find_spec(package) for package in EXTRA_ONNX)


def check_engine(engine: str, device: torch.device, dtype: torch.dtype, amp_dtype: torch.dtype | None = None) -> None:
    """Raise what `prepare` would, as far as it is known without a model: before minutes are spent on other engines.

    Raises:
        BenchmarkError: this engine does not do that.
        MissingExtraError: ONNX Runtime is not installed.
    """
    if engine != ONNXRUNTIME:
        return
    if not has_onnxruntime():
        raise MissingExtraError("ONNX Runtime is not installed: pip install 'normswap[onnx]'")
    if amp_dtype is not None or dtype != torch.float32:
        raise BenchmarkError("ONNX Runtime is measured in float32 only")
    if device.type == "cuda":
        import onnxruntime

        if "CUDAExecutionProvider" not in onnxruntime.get_available_providers():
            raise BenchmarkError("this ONNX Runtime has no CUDA provider: pip install onnxruntime-gpu")


@contextmanager
def denormals_as_zero() -> Iterator[None]:
    """Let this thread take denormal numbers as zero, where the processor can."""
    before = float(torch.full((1,), 1e-310, dtype=torch.float64).mul(1.0)) == 0
    torch.set_flush_denormal(True)
    try:
        yield
    finally:
        torch.set_flush_denormal(before)


def prepare(
    engine: str,
    model: nn.Module,
    images: torch.Tensor,
    folder: Path,
    amp_dtype: torch.dtype | None = None,
    flush: bool = False,
) -> Runnable:
    """Return a model ready to run on images `[B, C, H, W]`, both on their device and in their dtype and layout.

    Args:
        engine: "eager", "compile" or "onnxruntime".
        model: in eval mode.
        images: what each step computes on.
        folder: where files may lie as long as it runs, from `workplace`.
        amp_dtype: autocast to it; not for ONNX Runtime.
        flush: also let ONNX Runtime's own threads take denormal numbers as zero.

    Raises:
        BenchmarkError: this engine cannot run this model here.
        MissingExtraError: ONNX Runtime is not installed.
    """
    check_engine(engine, images.device, images.dtype, amp_dtype)
    if engine == ONNXRUNTIME:
        return _onnxruntime(model, images, Path(tempfile.mkdtemp(dir=folder)), flush)
    # Fixed sizes, so that no second batch size makes the first one's code general.
    run = torch.compile(model, dynamic=False) if engine == COMPILE else model

    def step() -> Any:
        with torch.autocast(images.device.type, amp_dtype) if amp_dtype else nullcontext():
            return run(images)

    def move() -> None:
        for tensor in [*model.parameters(), *model.buffers()]:
            tensor.data = tensor.data.clone()

    return Runnable(step, move, lambda: _weights(model) + _activations(step, images.device))


@contextmanager
def workplace(engine: str) -> Iterator[Path]:
    """Yield a folder for what `prepare` writes, which is deleted at the end.

    What was compiled before is forgotten: torch compiles a class anew only a few times and then falls back to eager.
    """
    if engine == COMPILE:
        torch.compiler.reset()
    try:
        with tempfile.TemporaryDirectory() as folder:
            yield Path(folder)
    finally:
        if engine == COMPILE:
            torch.compiler.reset()


def _weights(model: nn.Module) -> int:
    tensors = {t.data_ptr(): t for t in [*model.parameters(), *model.buffers()]}  # tied ones once
    return sum(t.numel() * t.element_size() for t in tensors.values())


def _activations(step: Step, device: torch.device) -> int:
    """Return the most bytes of tensors that a step holds at once, beyond what was held before it."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        step()
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device) - before
    level = os.environ.get("KINETO_LOG_LEVEL")
    os.environ["KINETO_LOG_LEVEL"] = "9"  # or the profiler writes to stderr that there is no GPU
    try:
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
            step()
        with tempfile.TemporaryDirectory() as folder:
            profile.export_chrome_trace(str(Path(folder) / "trace.json"))
            trace = json.loads((Path(folder) / "trace.json").read_text(encoding="utf-8"))
    finally:
        if level is None:
            del os.environ["KINETO_LOG_LEVEL"]
        else:
            os.environ["KINETO_LOG_LEVEL"] = level
    held = most = 0
    changes = [event for event in trace["traceEvents"] if event.get("name") == "[memory]"]
    for event in sorted(changes, key=lambda event: event["ts"]):
        held += event["args"]["Bytes"]  # negative where a tensor is freed
        most = max(most, held)
    return most


def _onnxruntime(model: nn.Module, images: torch.Tensor, folder: Path, flush: bool) -> Runnable:
    """Return the model on ONNX Runtime, on as many threads as torch has, or on the images' GPU."""
    device = images.device
    provider: Any = "CPUExecutionProvider"
    if device.type == "cuda":
        # On torch's stream, where the clock's events are.
        stream = str(torch.cuda.current_stream(device).cuda_stream)
        provider = ("CUDAExecutionProvider", {"device_id": str(device.index or 0), "user_compute_stream": stream})
    path = folder / "model.onnx"
    try:
        write_onnx(export_program(model, images.contiguous()), path)
        session = open_session(path, provider, flush=flush)
    except Exception as error:  # the exporter and the runtime have dozens of kinds
        raise BenchmarkError(f"ONNX Runtime cannot run it: {type(error).__name__}: {one_line(error)}") from error
    source, target = session.get_inputs()[0].name, session.get_outputs()[0].name
    with torch.no_grad():
        output = torch.empty_like(model(images))  # of the GPU's step
    binding: Any = None

    def bind() -> None:
        nonlocal binding
        binding = session.io_binding()  # images and answers stay on the GPU
        for put, name, tensor in ((binding.bind_input, source, images), (binding.bind_output, target, output)):
            put(name, "cuda", device.index or 0, "float32", list(tensor.shape), tensor.data_ptr())

    def move() -> None:
        nonlocal session
        session = open_session(path, provider, flush=flush)
        if device.type == "cuda":
            bind()

    def on_gpu() -> torch.Tensor:
        session.run_with_iobinding(binding)
        return output

    if device.type == "cuda":
        bind()
        return Runnable(on_gpu, move, lambda: None)
    pixels = images.numpy()
    return Runnable(lambda: session.run(None, {source: pixels})[0], move, lambda: None)
