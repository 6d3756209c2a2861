"""Make the demo that ships in ``normswap/demo``: a tiny trained timm ViT and the images to try it on.

Source: scikit-learn's ``load_digits``, 1,797 hand written digits of 8x8 grey pixels (UCI "Optical Recognition of
Handwritten Digits", CC BY 4.0). 36 images of each class are set aside for validation and never trained on; the other
1,437 train a small ``vit_tiny_patch16_224`` from scratch. Written to ``--out``:

* ``config.json``, ``model.safetensors``: the model, for ``timm.create_model("local-dir:DIR", pretrained=True)``
* ``train.tar``: 320 of the training images, 32 of each class, as 8x8 PNGs in one folder per class
* ``validation.tar``: the 360 validation images

Images reach the model, here and later, through timm's own tar reader and the evaluation transform of the model's data
config, which scales them up. One run takes about a minute on two CPU cores. The tars come out the same byte for byte
(under the same Pillow); the weights do on the same machine and versions, elsewhere they may differ a little.

Usage: ``python examples/make_demo.py [--out DIR]`` (needs ``pip install scikit-learn``)
"""

import argparse
import io
import shutil
import sys
import tarfile
import tempfile
import time
from pathlib import Path

import numpy as np
import timm
import torch
from PIL import Image
from timm.data import create_dataset, create_transform, resolve_model_data_config
from timm.models import save_for_hf
from timm.optim import create_optimizer_v2
from timm.scheduler import create_scheduler_v2
from torch import Tensor, nn
from torch.nn import functional as F

SEED = 0
TRAIN_PER_CLASS = 32  # of the images trained on, how many are shipped in train.tar
VALIDATION_PER_CLASS = 36
EPOCHS = 40
BATCH_SIZE = 64
MODEL_FILES = ("config.json", "model.safetensors")
TAR_FILES = ("train.tar", "validation.tar")

MODEL_NAME = "vit_tiny_patch16_224"
MODEL_ARGS = {"img_size": 32, "patch_size": 4, "embed_dim": 48, "depth": 4, "num_heads": 3, "num_classes": 10}
DATA_CONFIG = {
    "input_size": (3, 32, 32),
    "interpolation": "bicubic",
    "crop_pct": 1.0,
    "mean": (0.5, 0.5, 0.5),
    "std": (0.5, 0.5, 0.5),
}
MODEL_CONFIG = {
    "label_names": ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine"],
    "pretrained_cfg": {  # in place of the tag and license of timm's ImageNet weights for this architecture
        "tag": "digits",
        "license": "mit",
        "description": "Trained from scratch by normswap's examples/make_demo.py on scikit-learn's digits "
        "(UCI Optical Recognition of Handwritten Digits, CC BY 4.0)",
    },
}


def load_digits() -> tuple[np.ndarray, np.ndarray]:
    """The images as uint8 (1797, 8, 8), and their labels."""
    try:
        from sklearn.datasets import load_digits as sklearn_load_digits
    except ImportError:
        sys.exit("make_demo.py takes the digits from scikit-learn, which is not installed: pip install scikit-learn")
    digits = sklearn_load_digits()
    return np.rint(digits.images * (255 / 16)).astype(np.uint8), digits.target


def split(labels: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Indices of all training images, of those shipped in train.tar, and of the validation images."""
    rng = np.random.RandomState(SEED)  # its stream is frozen, so the split stays the same under every numpy
    validation, training, shipped = [], [], []
    for label in range(10):
        indices = rng.permutation(np.flatnonzero(labels == label))
        validation.append(indices[:VALIDATION_PER_CLASS])
        training.append(indices[VALIDATION_PER_CLASS:])
        shipped.append(training[-1][:TRAIN_PER_CLASS])
    return np.concatenate(training), np.concatenate(shipped), np.concatenate(validation)


def write_tar(path: Path, images: np.ndarray, labels: np.ndarray, indices: np.ndarray) -> None:
    """Write images as ``LABEL/INDEX.png``, sorted, with nothing of this machine, user or hour in the headers."""
    with tarfile.open(path, "w", format=tarfile.USTAR_FORMAT) as tar:
        for name, index in sorted((f"{labels[i]}/{i:04d}.png", i) for i in indices):
            png = io.BytesIO()
            Image.fromarray(images[index]).save(png, "PNG", optimize=True)
            info = tarfile.TarInfo(name)  # mtime, uid and gid 0, no user or group name, mode 644
            info.size = png.tell()
            png.seek(0)
            tar.addfile(info, png)


def read_tar(path: Path, model: nn.Module) -> tuple[Tensor, Tensor]:
    """All images and labels of a tar, as timm's reader and the model's evaluation transform give them."""
    transform = create_transform(**resolve_model_data_config(model), is_training=False)
    dataset = create_dataset("", root=str(path), transform=transform)
    images, labels = zip(*(dataset[i] for i in range(len(dataset))), strict=True)
    return torch.stack(images), torch.tensor([int(label) for label in labels])


def augment(images: Tensor, generator: torch.Generator) -> Tensor:
    """Shift each image by up to one of its 8x8 pixels, and turn, scale and shear it a little."""
    n = len(images)
    theta = torch.eye(2, 3) + 0.12 * (2 * torch.rand(n, 2, 3, generator=generator) - 1)
    theta[:, :, 2] *= 0.25 / 0.12  # the whole image is 2 wide in these coordinates
    grid = F.affine_grid(theta, list(images.shape), align_corners=False)
    black = images.amin()
    return F.grid_sample(images - black, grid, align_corners=False) + black  # black flows in from outside


def train(model: nn.Module, images: Tensor, labels: Tensor) -> None:
    """Train in place: AdamW, cosine schedule with warm-up, the last epoch's weights."""
    optimizer = create_optimizer_v2(model, opt="adamw", lr=2e-3, weight_decay=0.05)
    scheduler, epochs = create_scheduler_v2(
        optimizer, sched="cosine", num_epochs=EPOCHS, warmup_epochs=3, warmup_lr=1e-4, min_lr=1e-5
    )
    generator = torch.Generator().manual_seed(SEED)
    model.train()
    for epoch in range(epochs):
        scheduler.step(epoch)
        total = 0.0
        for batch in torch.randperm(len(images), generator=generator).split(BATCH_SIZE):
            loss = F.cross_entropy(model(augment(images[batch], generator)), labels[batch], label_smoothing=0.05)
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            total += loss.item() * len(batch)
        if epoch % 10 == 9 or epoch == epochs - 1:
            print(f"epoch {epoch + 1}/{epochs}: loss {total / len(images):.3f}", flush=True)
    model.eval()


@torch.inference_mode()
def top1(model: nn.Module, images: Tensor, labels: Tensor) -> float:
    """Top-1 accuracy, in percent."""
    return 100 * (model.eval()(images).argmax(1) == labels).float().mean().item()


def make_demo(out: Path) -> None:
    """Make all files in a temporary folder, check them there, then move them to ``out``."""
    images, labels = load_digits()
    training, shipped, validation = split(labels)
    torch.manual_seed(SEED)
    with tempfile.TemporaryDirectory() as folder:
        tmp = Path(folder)
        write_tar(tmp / "training.tar", images, labels, training)  # all that is trained on; not shipped
        write_tar(tmp / "train.tar", images, labels, shipped)
        write_tar(tmp / "validation.tar", images, labels, validation)

        model = timm.create_model(MODEL_NAME, **MODEL_ARGS, pretrained_cfg_overlay=DATA_CONFIG)
        start = time.perf_counter()
        train(model, *read_tar(tmp / "training.tar", model))
        print(f"trained on {len(training)} images in {time.perf_counter() - start:.0f} s")
        save_for_hf(model, tmp, model_config=MODEL_CONFIG, safe_serialization=True, data_config=DATA_CONFIG)

        saved = timm.create_model(f"local-dir:{tmp}", pretrained=True)
        accuracy = {name: top1(saved, *read_tar(tmp / name, saved)) for name in TAR_FILES}
        out.mkdir(parents=True, exist_ok=True)
        for name in MODEL_FILES + TAR_FILES:
            shutil.copyfile(tmp / name, out / name)

    print(f"{sum(p.numel() for p in saved.parameters()):,} parameters")
    for name in MODEL_FILES + TAR_FILES:
        print(f"{out / name}: {(out / name).stat().st_size:,} bytes")
    for name in TAR_FILES:
        print(f"{name}: top-1 {accuracy[name]:.2f} %")


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(
        description="Make the demo model and images of normswap from scikit-learn's digits."
    )
    default = Path(__file__).resolve().parents[1] / "normswap" / "demo"
    parser.add_argument("--out", type=Path, default=default, metavar="DIR", help="folder to write to (%(default)s)")
    make_demo(parser.parse_args().out)


if __name__ == "__main__":
    main()
