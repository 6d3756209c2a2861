"""ONNX files: written by torch's exporter, checked, and run by ONNX Runtime.

The three packages come with the extra ``onnx`` and are imported where they are used.
"""

import hashlib
from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..errors import ArgumentError, CheckFailedError, MissingExtraError, ModelRefusedError, first_line, innermost
from ..planning.graph import quiet
from .options import DEFAULT_OPSET

EXTRA_ONNX = ("onnx", "onnxscript", "onnxruntime")
# A protobuf file holds less than 2 GB; the graph and its names take a share of that.
_LARGEST_FILE = 1_900_000_000


def require_onnx() -> None:
    """Raise `MissingExtraError` before any work is done if a package of the extra ``onnx`` is not installed."""
    for package in EXTRA_ONNX:
        if find_spec(package) is None:
            raise MissingExtraError(f"ONNX needs {package}: pip install 'normswap[onnx]'")


def write_onnx(
    program: torch.export.ExportedProgram,
    path: Path,
    opset: int = DEFAULT_OPSET,
    output: str = "logits",
    metadata: Mapping[str, str] | None = None,
    external_data: bool = False,
) -> None:
    """Translate an exported program with one image input, named "images", and write it.

    Args:
        program: from `normswap.planning.graph.export_program`.
        path: the file; its folder also takes the weights where they do not fit in.
        opset: version of ONNX's operators.
        output: name of the output.
        metadata: what the file says of itself.
        external_data: weights in a file of their own, ``NAME.HASH.data``, even where they would fit in.

    Raises:
        ArgumentError: the opset is not known, or the program cannot be expressed in it.
        ModelRefusedError: the exporter knows no translation.
        CheckFailedError: ``onnx.checker`` does not accept the file.
    """
    import onnx
    import onnx_ir

    newest = onnx.defs.onnx_opset_version()
    if opset > newest:
        raise ArgumentError(f"`opset` {opset}: the onnx package knows opsets up to {newest}")
    with torch.no_grad(), quiet():
        try:
            translated = torch.onnx.export(
                program,
                dynamo=True,
                input_names=["images"],
                output_names=[output],
                opset_version=opset,
                verbose=False,
            )
        except Exception as error:  # the exporter raises many kinds; its reason stands in the innermost one
            raise ModelRefusedError(
                f"torch's ONNX exporter cannot translate the model: {first_line(innermost(error))}"
            ) from error
    assert translated is not None  # it is for dynamo=True
    model = translated.model
    reached = model.opset_imports.get("")
    if reached != opset:
        raise ArgumentError(
            f"`opset` {opset}: the graph cannot be converted to it (it is {reached}); take {DEFAULT_OPSET} or later"
        )
    model.metadata_props.update(metadata or {})
    tensors = {name: value.const_value for name, value in model.graph.initializers.items()}
    total = sum(tensor.nbytes for tensor in tensors.values() if tensor is not None)
    if external_data or total > _LARGEST_FILE:
        digest = hashlib.sha256()
        for name, tensor in tensors.items():
            digest.update(name.encode())
            if tensor is not None:
                digest.update(tensor.tobytes())
        onnx_ir.save(model, path, external_data=f"{path.name}.{digest.hexdigest()[:8]}.data")
    else:
        onnx_ir.save(model, path)
    try:
        onnx.checker.check_model(str(path), full_check=True)  # by path, so that more than 2 GB are read
    except Exception as error:  # checker and shape inference have their own kinds
        raise CheckFailedError(
            f"onnx.checker does not accept the graph: {first_line(innermost(error))}: not saved"
        ) from error


def read_onnx(path: Path) -> Any:
    """Return the ``onnx.ModelProto`` in a file, without weights that are in a file of their own."""
    import onnx

    return onnx.load(str(path), load_external_data=False)


def open_session(path: Path, provider: Any = "CPUExecutionProvider", optimise: bool = True, flush: bool = False) -> Any:
    """Return an ``onnxruntime.InferenceSession`` on as many CPU threads as torch has.

    Args:
        path: the file.
        provider: ONNX Runtime's name of what runs it, or a pair of that name and its options.
        optimise: let ONNX Runtime fuse nodes.
        flush: let its threads take denormal numbers as zero.
    """
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    options.inter_op_num_threads = 1
    options.log_severity_level = 3  # errors; they are raised too
    if not optimise:
        options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    if flush:
        options.add_session_config_entry("session.set_denormal_as_zero", "1")
    return onnxruntime.InferenceSession(str(path), options, providers=[provider])


class OnnxModel(nn.Module):
    """An ONNX file in ONNX Runtime on the CPU, with one input and one output, called as a module is.

    Args:
        path: the file.
        optimise: let ONNX Runtime fuse nodes. Off for quantised graphs: they then run as pairs of quantise and
            dequantise in float, so that no kernel of this CPU has its own say.

    Raises:
        CheckFailedError: ONNX Runtime cannot load it.
    """

    def __init__(self, path: Path, optimise: bool = True) -> None:
        super().__init__()
        try:
            self.session = open_session(path, optimise=optimise)
        except Exception as error:  # its own classes, without a common base
            raise CheckFailedError(
                f"ONNX Runtime cannot load the graph: {first_line(innermost(error))}: not saved"
            ) from error
        (self.input,) = self.session.get_inputs()

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Return the output `[B, K]` for images `[B, C, H, W]`, in the graph's own type, where the images are.

        Raises:
            CheckFailedError: ONNX Runtime cannot run it.
        """
        try:
            (output,) = self.session.run(None, {self.input.name: images.detach().cpu().contiguous().numpy()})
        except Exception as error:
            raise CheckFailedError(
                f"ONNX Runtime cannot run the graph: {first_line(innermost(error))}: not saved"
            ) from error
        return torch.from_numpy(output).to(images.device)
