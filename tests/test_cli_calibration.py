"""The options of the calibration on the command line, and what it shows of it."""

import inspect
import re
from typing import get_args

import normswap
from normswap.calibrate import RECONSTRUCT
from normswap.estimate import METHODS
from normswap.plan import FfnBn
from normswap_cli.main import cli

from .test_cli import DEMO, converted, one_object, run

__all__ = ["converted"]  # a fixture


def test_the_choices_are_the_librarys():
    """Spelled out in the command line, since the library's own lists come with torch."""
    choices = {
        p.name: (p.type.choices, p.default) for p in cli.commands["convert"].params if hasattr(p.type, "choices")
    }
    parameters = inspect.signature(normswap.convert).parameters
    for name, library in (("method", METHODS), ("reconstruct", RECONSTRUCT), ("ffn_bn", get_args(FfnBn))):
        assert sorted(choices[name][0]) == sorted(library)
        assert choices[name][1] == parameters[name].default


def test_method_reconstruct_and_budget_reach_the_calibration(tmp_path, monkeypatch):
    given = {}

    def spy(*arguments, **options):
        given.update(inspect.signature(normswap.convert).bind(*arguments, **options).arguments)
        raise normswap.CalibrationError("seen")

    monkeypatch.setattr("normswap.pipeline.convert", spy)
    arguments = ("--method", "channel", "--reconstruct", "readers", "--memory-budget", "1.5G")
    assert run("convert", *DEMO, "-o", tmp_path / "out", *arguments).exit_code == 1
    assert (given["method"], given["reconstruct"], given["memory_budget"]) == ("channel", "readers", 3 * 2**29)
    assert run("convert", *DEMO, "-o", tmp_path / "out").exit_code == 1
    assert (given["method"], given["reconstruct"], given["memory_budget"]) == ("reconstruct", "all", None)


def test_readers_only(converted, tmp_path):
    result = run("convert", *DEMO, "-o", tmp_path / "out", "--reconstruct", "readers", "--json")
    assert result.exit_code == 0, result.stderr
    record = one_object(result)
    assert (record["method"], record["reconstruct"]) == ("reconstruct", "readers")
    assert {fit["role"] for fit in record["layers"]} == {"reader"}
    assert {fit["role"] for fit in one_object(converted[1])["layers"]} == {"reader", "writer"}
    assert "calibrate  reconstruct readers, on 32 of 320 images" in result.stderr


def test_tables_are_brief_and_in_full_with_v(tmp_path):
    def rows(text, name):
        return re.findall(rf"^{name} +[\d-]", text, re.M)

    brief = run("convert", *DEMO, "-o", tmp_path / "brief")
    full = run("convert", *DEMO, "-o", tmp_path / "full", "-v")
    assert (brief.exit_code, full.exit_code) == (0, 0)
    assert len(rows(brief.stdout, r"blocks\.\d\.mlp\.fc2")) == 4
    assert not rows(brief.stdout, r"blocks\.\d\.attn\.proj")
    assert len(rows(full.stdout, r"blocks\.\d\.attn\.proj")) == 4
    assert len(rows(full.stdout, r"blocks\.\d\.norm\d")) == 8
    assert len(re.findall(r"^blocks\S+ +(?:reader|writer) ", full.stdout, re.M)) == 16
    for result in (brief, full):
        assert re.search(
            r"^cost +calibration took \d+\.\d s, \d+\.\d plain forward passes over the same images$",
            result.stderr,
            re.M,
        )
        assert rows(result.stdout, "fused")
