"""The options of the calibration on the command line, and what it shows of it."""

import inspect
import re
import sys
from dataclasses import replace

import normswap
from normswap.calibration.estimators import ESTIMATORS
from normswap.calibration.options import METHODS, RECONSTRUCT
from normswap.planning.options import FFN_BN
from normswap_cli import arguments
from normswap_cli.main import cli

from .test_cli import DEMO, converted, one_object, run

__all__ = ["converted"]  # a fixture


def test_the_defaults_are_the_librarys():
    options = (
        cli.commands["convert"]
        # click keeps the names of the help option that it sees first, for every test that follows.
        .make_context("convert", ["-m", "vit", "-o", "out", "--finetune-epochs", "1"], **cli.context_settings)
        .params
    )
    assert arguments.calibration(options) == normswap.CalibrationOptions()
    assert arguments.budget(options) == normswap.AccuracyBudget()
    assert arguments.evaluation(options) == normswap.EvaluationOptions(name="vit")
    assert arguments.finetuning(options) == normswap.FinetuneOptions()
    stage = normswap.FinetuneStage(images="images", held_out="others")
    assert arguments.finetune_stage(options, normswap.FinetuneOptions(), "images", "others") == stage
    assert arguments.saving(options, (), {}) == replace(normswap.SaveOptions(), command=["normswap", *sys.argv[1:]])
    assert options["ffn_bn"] == inspect.signature(normswap.convert).parameters["ffn_bn"].default


def test_every_estimator_is_a_method_and_every_method_a_choice():
    choices = {p.name: p.type.choices for p in cli.commands["convert"].params if hasattr(p.type, "choices")}
    assert tuple(choices["method"]) == METHODS
    assert set(METHODS) == set(ESTIMATORS)
    assert (tuple(choices["reconstruct"]), tuple(choices["ffn_bn"])) == (RECONSTRUCT, FFN_BN)


def test_method_reconstruct_and_budget_reach_the_calibration(tmp_path, monkeypatch):
    given = {}

    def spy(*arguments, **options):
        given.update(inspect.signature(normswap.convert).bind(*arguments, **options).arguments)
        raise normswap.CalibrationError("seen")

    monkeypatch.setattr("normswap.pipeline.convert.convert", spy)
    words = ("--method", "channel", "--reconstruct", "readers", "--memory-budget", "1.5G", "--refine-steps", 5)
    words += ("--views", 0.25, "--bound", "wide")
    assert run("convert", *DEMO, "-o", tmp_path / "out", *words).exit_code == 1
    assert given["calibration"] == normswap.CalibrationOptions("channel", "readers", 5, 3 * 2**29, 0.25, "wide")
    assert run("convert", *DEMO, "-o", tmp_path / "out").exit_code == 1
    assert given["calibration"] == normswap.CalibrationOptions()


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

    brief = run("convert", *DEMO, "-o", tmp_path / "brief", "--refine-steps", 2)
    full = run("convert", *DEMO, "-o", tmp_path / "full", "--refine-steps", 2, "-v")
    assert (brief.exit_code, full.exit_code) == (0, 0)
    assert len(rows(brief.stdout, r"blocks\.\d\.mlp\.fc2")) == 4
    assert not rows(brief.stdout, r"blocks\.\d\.attn\.proj")
    assert len(rows(full.stdout, r"blocks\.\d\.attn\.proj")) == 4
    assert len(rows(full.stdout, r"blocks\.\d\.norm\d")) == 8
    assert len(re.findall(r"^blocks\S+ +(?:reader|writer) ", full.stdout, re.M)) == 16
    for result in (brief, full):
        assert re.search(
            r"^cost +calibration took \d+\.\d s, \d+\.\d plain forward passes over the images$",
            result.stderr,
            re.M,
        )
        assert rows(result.stdout, "fused")
