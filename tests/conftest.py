"""Shared fixtures: a seed for each test, the shared model and images where they are there."""

import os
from pathlib import Path

import pytest
import torch
from hypothesis import settings

# Workers side by side share the cores between them, and so do the commands that they start.
WORKERS = int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1"))
if WORKERS > 1 and "OMP_NUM_THREADS" not in os.environ:
    threads = max(1, torch.get_num_threads() // WORKERS)
    os.environ["OMP_NUM_THREADS"] = str(threads)
    torch.set_num_threads(threads)

# An example that waits for the other worker's is no slow example.
settings.register_profile("workers", deadline=None)
settings.load_profile("workers")

SHARED = Path(__file__).resolve().parents[2] / "shared"


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def _no_stress_check(request, monkeypatch) -> None:
    """Leave the check on corrupted images out of conversions: it takes longer than they do."""
    if "with_stress" not in request.fixturenames:
        for step in ("steps", "from_swapped"):
            monkeypatch.setattr(f"normswap.pipeline.{step}.stress_check", lambda *_: None)


@pytest.fixture(scope="session")
def with_stress() -> None:
    """Let conversions make their check on corrupted images."""


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
