"""Shared fixtures: a seed for each test, the shared model and images where they are there."""

import gc
import os
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from hypothesis import settings

from normswap.pipeline.stress_check import stress_check

# Workers side by side share the cores between them, and so do the commands that they start.
WORKERS = int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1"))
if WORKERS > 1 and "OMP_NUM_THREADS" not in os.environ:
    threads = max(1, torch.get_num_threads() // WORKERS)
    os.environ["OMP_NUM_THREADS"] = str(threads)
    torch.set_num_threads(threads)

# An example that waits for the other worker's is no slow example.
settings.register_profile("workers", deadline=None)
settings.load_profile("workers")

# The default, 700, is reached every few milliseconds of an export.
gc.set_threshold(10_000)

SHARED = Path(__file__).resolve().parents[2] / "shared"


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


def _stress_check(patch: pytest.MonkeyPatch, check: Callable) -> None:
    for step in ("steps", "from_swapped"):
        patch.setattr(f"normswap.pipeline.{step}.stress_check", check)


@pytest.fixture(scope="session", autouse=True)
def _no_stress_check() -> Iterator[None]:
    """Leave the check on corrupted images out of conversions: it takes longer than they do."""
    with pytest.MonkeyPatch.context() as patch:
        _stress_check(patch, lambda *_: None)
        yield


@pytest.fixture(scope="module")
def with_stress() -> Iterator[None]:
    """Let the conversions of a file make their check on corrupted images."""
    with pytest.MonkeyPatch.context() as patch:
        _stress_check(patch, stress_check)
        yield


@pytest.fixture(scope="module", autouse=True)
def _frozen() -> None:
    """Take what is imported out of garbage collection: going through it again and again is a fifth of an export."""
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="session")
def shared_model() -> str:
    folder = SHARED / "models" / "vits14_cifar10"
    if not folder.is_dir():
        pytest.skip(f"needs the pretrained ViT-S/14 in {folder}")
    return f"local-dir:{folder}"


@pytest.fixture(scope="session")
def shared_images() -> Path:
    folder = SHARED / "data" / "cifar10"
    if not folder.is_dir():
        pytest.skip(f"needs train.tar and validation.tar in {folder}")
    return folder
