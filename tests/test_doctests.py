"""The examples in docstrings run, and every public function is in one."""

import doctest
import importlib
import inspect
from pathlib import Path

import pytest
import timm
import torch
from torch import nn

import normswap
from normswap.benchmarking import timing

LIBRARY = Path(normswap.__file__).parent
SOURCES = {
    ".".join(("normswap", *path.relative_to(LIBRARY).with_suffix("").parts)): path.read_text()
    for path in LIBRARY.rglob("*.py")
}
# What an example may use without importing it.
NAMES = {"normswap": normswap, "timm": timm, "torch": torch, "nn": nn}


@pytest.mark.parametrize("module", sorted(name for name, text in SOURCES.items() if ">>> " in text))
def test_examples_run(module, monkeypatch):
    monkeypatch.setattr(timing, "TURN_SECONDS", 0.005)
    monkeypatch.setattr(timing, "WARM_SECONDS", 0.005)
    found = doctest.testmod(importlib.import_module(module), extraglobs=NAMES, optionflags=doctest.ELLIPSIS)
    assert found.attempted > 0
    assert found.failed == 0


@pytest.mark.parametrize("name", [name for name in normswap.__all__ if inspect.isfunction(getattr(normswap, name))])
def test_every_public_function_is_in_an_example(name):
    examples = [line for text in SOURCES.values() for line in text.splitlines() if line.strip()[:4] in (">>> ", "... ")]
    assert any(f"{name}(" in line for line in examples)
