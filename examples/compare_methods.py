"""Compare the calibration methods on one model: the figures of the README come from here.

Run: python examples/compare_methods.py MODEL DATA_DIR [CALIB_SAMPLES]
Without arguments: the model and images inside the package. Prints a Markdown table and what it was measured on.
"""

import datetime
import platform
import sys

import torch

import normswap
from normswap.calibration.options import METHODS
from normswap.demo import FOLDER, MODEL
from normswap.inputs.dataset import load_splits
from normswap.surgery.fold import max_difference


def main(name: str, data_dir: str, samples: int) -> None:
    model = normswap.load_model(name)
    images, evaluation = load_splits(model, data_dir, "train", "validation", workers=2)
    batches = [batch for batch, _ in images.draw(samples, seed=42)]
    plan = normswap.make_plan(model)
    models = {"original, with LayerNorm": model}
    folds = {}
    for method in sorted(METHODS, reverse=True):
        swapped = normswap.swap_norms(model, plan)
        normswap.calibrate(swapped, batches, original=model, options=normswap.CalibrationOptions(method=method))
        fused = normswap.fold_norms(swapped)
        folds[f"`{method}`"] = max_difference(swapped, fused, batches)
        models[f"`{method}`"] = fused
    print("| BatchNorm set by | top-1 % | top-5 % | agreement % | KL | worst KL | fold error |")
    print("|---|---|---|---|---|---|---|")
    for stage in normswap.evaluate_models(models, evaluation):
        error = f"{folds[stage.name]:.1e}" if stage.name in folds else "-"
        numbers = f"{stage.top1:.2f} | {stage.top5:.2f} | {stage.agreement:.2f} | {stage.kl:.3f} | {stage.worst_kl:.1f}"
        print(f"| {stage.name} | {numbers} | {error} |")
    print(f"\n{plan.model}, {plan.summary()}.")
    print(f"Calibrated on {sum(map(len, batches))} of {images.description}; measured on {evaluation.description}.")
    print(
        f"{datetime.date.today()}, {platform.machine()}, {torch.get_num_threads()} threads, torch {torch.__version__}"
    )


if __name__ == "__main__":
    arguments = sys.argv[1:] or [MODEL, str(FOLDER)]
    main(arguments[0], arguments[1], int(arguments[2]) if len(arguments) > 2 else 1024)
