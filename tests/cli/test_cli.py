"""The command line from end to end: help, plan, conversion, comparison, what goes to stdout and to stderr."""

import json
import os
import re
import stat

import pytest
import torch
from click.testing import CliRunner, Result
from torch import nn

import normswap
from normswap.calibration.attention_refinement import STEPS
from normswap.demo import FOLDER, MODEL
from normswap_cli.main import cli

IMAGES = ("--data-dir", FOLDER, "--eval-samples", 32, "-j", 0, "--device", "cpu")
DEMO = ("-m", MODEL, *IMAGES, "--calib-samples", 32)
FILES = {"README.md", "bounds.safetensors", "config.json", "model.safetensors", "normswap.json", "report.html"}
STAGES = ["original", "swapped", "calibrated", "fused"]


def run(*arguments: object) -> Result:
    """Run the command line in this process; one thread, since more of them only wait for each other on tiny tensors."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        result = CliRunner().invoke(cli, [str(argument) for argument in arguments], prog_name="normswap")
    finally:
        torch.set_num_threads(threads)
    assert result.exception is None or isinstance(result.exception, SystemExit), repr(result.exception)
    return result


def one_object(result: Result) -> dict:
    """Return the one JSON object that stdout holds; anything before or behind it is an error."""
    record = json.loads(result.stdout)
    assert isinstance(record, dict)
    return record


@pytest.fixture(scope="module")
def converted(tmp_path_factory):
    out = tmp_path_factory.mktemp("converted") / "deep" / "out"
    result = run("convert", *DEMO, "-o", out, "--json")
    assert result.exit_code == 0, result.stderr
    return out, result


def test_inspect_table_and_json_agree():
    arguments = ("inspect", "-m", "vit_small_patch14_dinov2", "--num-classes", 10)
    record = one_object(run(*arguments, "--json"))
    assert record["counts"]["total"] == record["counts"]["fold-forward"] == len(record["sites"]) == 25
    assert {site["verdict"] for site in record["sites"]} == {"fold-forward"}
    assert [site["readers"] for site in record["sites"]][-1] == ["head"]

    shown = run(*arguments)
    assert shown.exit_code == 0
    header, *rows = [re.split(r" {2,}", line.strip()) for line in shown.stdout.splitlines() if line.strip()]
    assert header == ["site", "kind", "C", "readers", "verdict", "reason"]
    keys = ("path", "kind", "num_features", "readers", "verdict", "reason")
    record_rows = [{**site, "readers": ", ".join(site["readers"])} for site in record["sites"]]
    assert rows == [[str(site[key]) for key in keys] for site in record_rows]
    assert "25 LayerNorms: 25 fold-forward" in shown.stderr


def test_inspect_takes_the_demo_model():
    record = one_object(run("inspect", "-m", MODEL, "--keep", "norm", "--json"))
    assert record["counts"] | {"total": 9, "fold-forward": 8, "keep": 1, "ffn_bn": 4} == record["counts"]
    assert record["input_size"] == [3, 32, 32]


def test_convert_json(converted):
    out, result = converted
    record = one_object(result)
    given = {"model": MODEL, "out": str(out), "method": "reconstruct", "ffn_bn": "pre-act", "calib_samples": 32}
    assert {key: record[key] for key in given} == given
    sites = {"total": 9, "fold-forward": 9, "fold-backward": 0, "affine": 0, "keep": 0, "ffn_bn": 4}
    assert record["sites"] == sites
    assert [stage["name"] for stage in record["stages"]] == STAGES
    for stage, summary in ((record["stages"][0], record["before"]), (record["stages"][-1], record["after"])):
        assert summary == {key: stage[key] for key in ("top1", "top5", "n")}
    last = record["stages"][-1]
    assert {key: record[key] for key in ("agreement", "kl", "non_finite")} == {
        key: last[key] for key in ("agreement", "kl", "non_finite")
    }
    assert {"normswap", "torch", "timm", "safetensors"} <= record["versions"].keys()
    assert record["versions"]["normswap"] == normswap.__version__
    assert torch.__version__.startswith(record["versions"]["torch"])  # the one may leave out +cpu


def test_convert_numbers_are_plausible(converted):
    stages = {stage["name"]: stage for stage in one_object(converted[1])["stages"]}
    assert all(stage["n"] == 32 and stage["non_finite"] == 0 for stage in stages.values())
    assert stages["original"]["agreement"] == 100
    assert stages["original"]["kl"] == 0
    # The demo model reads 99 % of all digits, guessing gives 10 %; calibration has to show, on 32 images too.
    assert stages["original"]["top1"] > 90
    assert stages["calibrated"]["top1"] > stages["swapped"]["top1"] + 20
    # Exact fold: an answer may flip only where two logits tie, and 1e-5 on 32 images is room for none.
    assert stages["fused"]["top1"] == stages["calibrated"]["top1"]
    assert 0 < one_object(converted[1])["fold_max_abs_err"] < 1e-3


def test_convert_seconds_are_of_this_run(converted):
    seconds = one_object(converted[1])["seconds"]
    assert set(seconds) == {"plan", "forward_pass", "calibrate", "finetune", "fold", "evaluate", "stress"}
    assert seconds["finetune"] == 0, "nothing was fine-tuned"
    assert seconds["calibrate"] > seconds["forward_pass"] > 0, "calibration goes through both models"


def test_convert_takes_gradient_steps_as_asked(converted, tmp_path):
    assert one_object(converted[1])["refine_steps"] == STEPS
    assert f"at least {STEPS}" in " ".join(run("convert", "--help").stdout.split())
    result = run("convert", *DEMO, "-o", tmp_path / "out", "--refine-steps", 0, "--json")
    record = one_object(result)
    assert record["refine_steps"] == 0
    assert {layer["refined"] for layer in record["layers"]} == {1.0}


def test_convert_files(converted):
    out, result = converted
    assert {path.name for path in out.iterdir()} == FILES
    assert [path.name for path in out.parent.iterdir()] == ["out"]
    umask = os.umask(0)
    os.umask(umask)
    assert {stat.S_IMODE(path.stat().st_mode) for path in out.iterdir()} == {0o666 & ~umask}
    saved = json.loads((out / "normswap.json").read_text())["report"]
    assert saved == one_object(result)


def test_talk_goes_to_stderr(converted):
    _, result = converted
    lines = re.findall(r"^eval +(\w+) +\* Acc@1 ([\d.]+) \([\d.]+\) Acc@5 ([\d.]+) \([\d.]+\)$", result.stderr, re.M)
    stages = one_object(result)["stages"]
    assert lines == [(s["name"], f"{s['top1']:.3f}", f"{s['top5']:.3f}") for s in stages]
    assert "9 LayerNorms: 9 fold-forward; 4 FFN BatchNorms" in result.stderr
    assert "timm.create_model" in result.stderr


def test_images_are_named(converted):
    _, result = converted
    record = one_object(result)
    assert record["calibration_data"] == "32 of 320 images of demo/train.tar, seed 42"
    assert record["evaluation_data"] == "32 of 360 images of demo/validation.tar, seed 42"
    assert record["calibration_data"] in result.stderr
    assert record["evaluation_data"] in result.stderr
    assert "note" not in result.stderr


@pytest.mark.parametrize("subset", [(), ("--eval-samples", 8)])
def test_one_split_for_both_is_said(tmp_path, subset):
    data = ("--data-dir", FOLDER / "validation.tar", "--calib-samples", 32, "-j", 0, "--device", "cpu")
    result = run("convert", "-m", MODEL, *data, "--method", "channel", "-o", tmp_path / "out", *subset)
    assert result.exit_code == 0, result.stderr
    assert "calibrate  channel, on 32 of 360 images of demo/validation.tar, seed 42" in result.stderr
    assert "there is one split only" in result.stderr


def test_same_seed_same_file(converted, tmp_path):
    out, result = converted
    again = run("convert", *DEMO, "-o", tmp_path / "again", "--json", "-q")
    assert again.exit_code == 0
    assert again.stderr == ""  # quiet
    assert one_object(again)["stages"] == one_object(result)["stages"]
    assert (tmp_path / "again/model.safetensors").read_bytes() == (out / "model.safetensors").read_bytes()
    other = run("convert", *DEMO, "-o", tmp_path / "other", "--seed", 7)
    assert "seed 7" in other.stderr
    assert (tmp_path / "other/model.safetensors").read_bytes() != (out / "model.safetensors").read_bytes()
    for stage in STAGES:  # without --json, the data on stdout is the table
        assert re.search(rf"^{stage} +\d", other.stdout, re.M)


@pytest.mark.parametrize("target", [True, False])
def test_dry_run_writes_nothing(tmp_path, target):
    output = ("-o", tmp_path / "new" / "out") if target else ()
    result = run("convert", *DEMO, *output, "--dry-run", "--json")
    assert result.exit_code == 0, result.stderr
    record = one_object(result)
    assert record["dry_run"] is True
    assert record["counts"]["total"] == 9
    assert not list(tmp_path.iterdir())


def test_budget_exceeded(tmp_path):
    result = run("convert", *DEMO, "-o", tmp_path / "out", "--max-drop", 0, "--max-keep", 0, "--json")
    assert result.exit_code == 4
    record = one_object(result)
    drop = record["before"]["top1"] - record["after"]["top1"]
    assert drop > 0
    assert record["out"] is None
    assert record["budget"] is None  # with nothing to put back there is no search
    last = result.stderr.splitlines()[-1]
    assert last == f"Error: top-1 fell by {drop:.2f} points, more than --max-drop 0: not saved"
    assert not list(tmp_path.iterdir())


def test_fold_not_exact_enough(tmp_path):
    result = run("convert", *DEMO, "--method", "channel", "-o", tmp_path / "out", "--atol", 0, "--json")
    assert result.exit_code == 4
    assert one_object(result)["fold_max_abs_err"] > 0
    last = result.stderr.splitlines()[-1]
    assert last.startswith("Error: ")
    assert "--atol 0" in last
    assert "float64" in last
    assert not list(tmp_path.iterdir())


def test_keep(tmp_path):
    out = tmp_path / "out"
    flags = ("--method", "channel", "--keep", "blocks.0.*", "--keep", "norm")
    result = run("convert", *DEMO, "-o", out, *flags, "--json")
    assert result.exit_code == 0, result.stderr
    record = one_object(result)
    kept = {"blocks.0.norm1", "blocks.0.norm2", "norm"}
    assert {site["path"] for site in record["plan"] if site["verdict"] == "keep"} == kept
    assert record["sites"] | {"total": 9, "keep": 3, "fold-forward": 6} == record["sites"]
    assert "still a LayerNorm" in record["stock_timm"]
    assert "normswap.load" in result.stderr
    loaded = normswap.load(out)
    assert {path for path, module in loaded.named_modules() if isinstance(module, nn.LayerNorm)} == kept


def test_keep_that_fits_nothing(tmp_path):
    result = run("convert", *DEMO, "-o", tmp_path / "out", "--keep", "blocks.7.*", "-q")
    assert result.exit_code == 2
    assert result.stderr == "Error: --keep 'blocks.7.*' matches none of the 9 LayerNorms (for example blocks.0.norm1)\n"
    assert not list(tmp_path.iterdir())


def test_keep_everything(tmp_path):
    result = run("convert", *DEMO, "-o", tmp_path / "out", "--keep", "*", "-q")
    assert result.exit_code == 2
    assert "nothing to convert" in result.stderr
    assert not list(tmp_path.iterdir())


def test_evaluate_against_the_original(converted):
    out, result = converted
    evaluated = run("evaluate", "-m", f"local-dir:{out}", "--against", MODEL, *IMAGES, "--json")
    assert evaluated.exit_code == 0, evaluated.stderr
    record, expected = one_object(evaluated), one_object(result)
    assert [stage["name"] for stage in record["stages"]] == [MODEL, f"local-dir:{out}"]
    assert record["data"] == expected["evaluation_data"]
    # The same images, the same weights, the same batch: what convert said is what evaluate finds, to the bit.
    for key in ("n", "top1", "top5", "agreement", "kl", "worst_kl", "non_finite"):
        assert record[key] == expected["stages"][-1][key]
    assert "* Acc@1" in evaluated.stderr


def test_evaluate_alone_claims_no_agreement(converted):
    evaluated = run("evaluate", "-m", MODEL, *IMAGES, "--json", "-q")
    record = one_object(evaluated)
    assert record["top1"] == one_object(converted[1])["before"]["top1"]
    assert record["against"] is None
    assert "agreement" not in record
    assert evaluated.stderr == ""


def test_evaluate_without_labels(converted):
    arguments = ("-m", f"local-dir:{converted[0]}", "--against", MODEL, *IMAGES, "--no-labels", "--json")
    record = one_object(run("evaluate", *arguments))
    assert record["top1"] is None
    assert record["agreement"] == one_object(converted[1])["agreement"]


def test_demo_does_the_main_job(tmp_path):
    result = run("demo", "-o", tmp_path / "out", "--json")
    assert result.exit_code == 0, result.stderr
    record = one_object(result)
    assert record["before"]["n"] == record["after"]["n"] == 360
    assert record["calib_samples"] == 320
    assert record["after"]["top1"] > 95  # 98.1 when this was written, of 99.2; guessing gives 10
    assert {path.name for path in (tmp_path / "out").iterdir()} == FILES


def test_quiet_is_quiet_whatever_timm_says(tmp_path, caplog):
    """timm warns that mean and std of three channels do not fit one channel, and does so after the export too."""
    result = run("convert", *DEMO, "--method", "channel", "-o", tmp_path / "out", "--in-chans", 1, "-q")
    assert result.exit_code == 0
    assert result.stderr == ""
    assert not caplog.records  # pytest catches what logging would print to stderr elsewhere


def test_exit_code_does_not_depend_on_verbosity(tmp_path):
    for verbosity in ((), ("-v",), ("-vv",)):
        arguments = ["inspect", "-m", f"local-dir:{tmp_path / 'none'}", *verbosity]
        result = CliRunner().invoke(cli, arguments)
        assert result.exit_code == 2, verbosity
