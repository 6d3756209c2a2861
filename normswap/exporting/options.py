"""What an exported graph can be. Imports no torch, so that the command line can read it."""

from typing import Literal, get_args

Format = Literal["onnx", "pt2"]
FORMATS: tuple[str, ...] = get_args(Format)
DTYPES = ("fp32", "fp16")
# torch's exporter is written for this opset; others are made from it by rules of their own or by conversion.
DEFAULT_OPSET = 18
# Largest difference of an output from the float32 model. FP16 has 11 bits, and a ViT rounds a hundred times.
ATOL = {"fp32": 1e-3, "fp16": 0.1}
