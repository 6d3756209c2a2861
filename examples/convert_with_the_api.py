"""Convert a pretrained timm model from Python, look at the numbers, save it, and load it with plain timm.

Run: python examples/convert_with_the_api.py [MODEL DATA_DIR OUT]
It takes the model and images inside the package unless you name your own, as
    python examples/convert_with_the_api.py local-dir:my-model images out
"""

import sys
import tempfile
from functools import partial
from pathlib import Path

import timm
import torch

import normswap
from normswap.demo import FOLDER, MODEL


def main(name: str, data_dir: str, out: str) -> None:
    model = normswap.load_model(name)
    print(normswap.make_plan(model))

    images = normswap.load_images(model, data_dir, "train", labels=False).draw(256, seed=42)
    validation = normswap.load_images(model, data_dir, "validation")
    result = normswap.convert(model, images, eval_images=validation)
    for stage in result.report.stages:
        print(f"{stage.name:<10} top-1 {stage.top1:6.2f} %   agreement {stage.agreement:6.2f} %   KL {stage.kl:.4f}")
    print(f"the fold moved no output by more than {result.report.fold_max_abs_err:.1e}")
    result.save(out)

    # From here on normswap is not needed any more: OUT/README.md has the few lines of TokenBound.
    bounds = partial(normswap.TokenBound, file=f"{out}/bounds.safetensors")
    norm_layer = bounds if result.report.bounded else torch.nn.Identity
    fused = timm.create_model(f"local-dir:{out}", pretrained=True, norm_layer=norm_layer).eval()
    batch, _ = next(iter(validation))
    with torch.no_grad():
        difference = (fused(batch) - result.model(batch)).abs().max()
    print(f"wrote {out}; loaded by plain timm, its outputs differ by {difference:g}")


if __name__ == "__main__":
    if len(sys.argv) == 4:
        main(*sys.argv[1:])
    else:
        with tempfile.TemporaryDirectory() as folder:
            main(MODEL, str(FOLDER), str(Path(folder) / "out"))
