"""Shared fixtures: a seed for each test, the shared model and images where they are there."""

from pathlib import Path

import pytest
import torch

SHARED = Path(__file__).resolve().parents[2] / "shared"


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


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
