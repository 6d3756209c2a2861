"""The accuracy budget on real models, from Python and from the command line."""

import json

import pytest
import torch
from hypothesis import strategies as st
from torch import nn

import normswap
from normswap.demo import FOLDER, MODEL
from normswap.reporting.budget_tables import BUDGET_COLUMNS, budget_line, budget_rows

from ..cli.test_cli import one_object, run
from ..models import family, images
from ..tolerance import FOLD_FLOAT32

COSTS = st.lists(st.floats(0.01, 10), min_size=2, max_size=40)


@pytest.fixture(scope="module")
def digits():
    """The demo's model, calibration images and labelled images, in batches."""
    model = normswap.load_model(MODEL)
    train = list(normswap.load_images(model, FOLDER, "train").draw(64, 0))
    return model, [x for x, _ in train], list(normswap.load_images(model, FOLDER, "validation").draw(120, 0))


@pytest.fixture(scope="module")
def budgeted(digits):
    model, calibration, labelled = digits
    return normswap.convert(
        model,
        calibration,
        calibration=normswap.CalibrationOptions(method="channel"),
        eval_images=labelled,
        budget=normswap.AccuracyBudget(max_drop=2.0, max_evaluations=3),
    )


def test_a_budget_that_is_missed_puts_layer_norms_back(budgeted, digits):
    report, trade = budgeted.report, budgeted.report.budget
    assert trade.met
    assert report.top1_drop <= 2.0
    assert trade.trials[0].drop > 2.0, "nothing to search for, so the test shows nothing"
    assert 0 < trade.best.put_back < 9
    assert 2 <= len(trade.trials) <= 3
    stay = {path for path, module in budgeted.model.named_modules() if isinstance(module, nn.LayerNorm)}
    assert stay == set(trade.best.kept) == {s.path for s in budgeted.plan.sites if s.verdict == "keep"}
    # The table measures the same model again, from the same images.
    last = report.stages[-1]
    assert (last.top1, last.agreement) == (trade.best.top1, trade.best.agreement)
    assert report.seconds["search"] > report.seconds["calibrate"]
    assert len(trade.costs) == trade.candidates == 9
    assert sorted((cost.kl for cost in trade.costs), reverse=True) == [cost.kl for cost in trade.costs]
    rows = budget_rows(trade)
    assert len(rows) == len(trade.trials)
    assert all(len(row) == len(BUDGET_COLUMNS) for row in rows)
    assert sum("taken" in row[-1] for row in rows) == 1
    assert f"holds with {trade.best.put_back} of 9 LayerNorms put back" in budget_line(trade)


def test_kept_norms_are_told_everywhere_and_load(budgeted, digits, tmp_path):
    budgeted.save(tmp_path / "out")
    kept = budgeted.report.budget.best.kept
    card = (tmp_path / "out/README.md").read_text()
    assert [line.split("`")[1] for line in card.splitlines() if line.startswith("- LayerNorm stays at `")] == kept
    assert "## Accuracy budget" in card
    record = json.loads((tmp_path / "out/normswap.json").read_text())["report"]
    assert record["kept"] == kept
    reasons = {site["reason"] for site in record["plan"] if site["path"] in kept}
    assert reasons == {"stays for the accuracy budget"}
    chosen = record["budget"]["trials"][record["budget"]["chosen"]]
    assert chosen["kept"] == kept
    assert chosen["top1"] == record["after"]["top1"]
    loaded = normswap.load(tmp_path / "out")
    x = digits[1][0]
    with torch.no_grad():
        assert torch.equal(loaded(x), budgeted.model.eval()(x))


def test_kept_norms_export_to_onnx(budgeted, digits, tmp_path):
    onnxruntime = pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    model, x = budgeted.model.eval(), digits[1][0][:2]
    torch.onnx.export(model, (x,), tmp_path / "model.onnx", dynamo=True, verbose=False)
    session = onnxruntime.InferenceSession(tmp_path / "model.onnx", providers=["CPUExecutionProvider"])
    (found,) = session.run(None, {session.get_inputs()[0].name: x.numpy()})
    with torch.no_grad():
        torch.testing.assert_close(torch.from_numpy(found), model(x), rtol=FOLD_FLOAT32, atol=FOLD_FLOAT32)


def test_a_budget_that_holds_costs_no_search():
    model = family("vit")
    report = normswap.convert(model, [images(model, 12)], budget=normswap.AccuracyBudget(min_agreement=0.0)).report
    assert len(report.budget.trials) == 1
    assert report.budget.met
    assert report.budget.costs == []
    assert report.to_json()["kept"] == []


def test_agreement_needs_no_labels_and_a_generator_will_do(digits):
    model, calibration, labelled = digits
    result = normswap.convert(
        model,
        iter(calibration),
        calibration=normswap.CalibrationOptions(method="channel"),
        eval_images=(x for x, _ in labelled),
        budget=normswap.AccuracyBudget(min_agreement=97.0, max_evaluations=2),
        plan=normswap.make_plan(model, keep=["norm"]),
    )
    trade = result.report.budget
    assert result.report.stages[-1].agreement >= 97
    assert result.report.stages[-1].top1 is None
    assert trade.candidates == 8
    assert [t.put_back for t in trade.trials] == [0, 7]  # the last evaluation goes to the most that may stay
    assert trade.trials[0].kept == ["norm"]
    assert len(trade.best.kept) == 8


def test_fine_tuning_comes_after_the_search_and_counts():
    """What the search leaves short, fine-tuning may make up: the final model is judged, not the trial."""
    model = family("vit")
    x = images(model, 12)
    data = [(x, model(x).argmax(1))]
    options = normswap.FinetuneOptions(epochs=1, lr=1e-9, batch_size=4)
    with pytest.raises(normswap.CheckFailedError) as caught:
        normswap.convert(
            model,
            data,
            calibration=normswap.CalibrationOptions(method="channel"),
            budget=normswap.AccuracyBudget(max_drop=-1.0, max_keep=1),
            finetune=options,
        )
    report = caught.value.report
    assert [s.name for s in report.stages] == ["original", "swapped", "calibrated", "finetuned", "fused"]
    assert report.finetuning.steps > 0
    assert len(report.budget.trials) == 2
    assert not report.budget.met
    assert isinstance(caught.value.conversion, normswap.Conversion)
    assert "more than `max_drop` -1, the best of 2 tries with at most 1 put back" in str(caught.value)


DIGITS = ("-m", MODEL, "--data-dir", FOLDER, "--eval-samples", 90, "--calib-samples", 64, "-j", 0, "--device", "cpu")
CHANNEL = (*DIGITS, "--method", "channel")


def test_the_command_line_shows_the_trade(tmp_path):
    budget = ("--max-drop", 3, "--max-keep", 6, "--max-evaluations", 2)
    result = run("convert", *CHANNEL, *budget, "-o", tmp_path / "out", "--json")
    assert result.exit_code == 0, result.stderr
    record = one_object(result)
    trade = record["budget"]
    assert (trade["max_drop"], trade["max_keep"], trade["max_evaluations"], trade["met"]) == (3, 6, 2, True)
    assert len(trade["trials"]) == 2
    kept = record["kept"]
    assert f"{len(kept)} of 9 LayerNorms: {', '.join(kept)}" in result.stderr
    assert "holds with" in result.stderr
    assert "budget: top-1 down by at most 3 points" in result.stderr
    assert all(name.split()[0] in result.stderr for name in BUDGET_COLUMNS if name)
    assert "normswap.load" in result.stderr


def test_a_budget_that_cannot_be_met_saves_the_best_only_if_asked(tmp_path):
    """Without --save-best nothing is saved, which tests/cli/test_cli.py shows."""
    budget = ("--max-drop", -50, "--keep", "norm", "--max-evaluations", 1, "--save-best", "--export", "pt2")
    result = run("convert", *CHANNEL, *budget, "-o", tmp_path / "out", "--json")
    assert result.exit_code == 4
    record = one_object(result)
    assert record["export"]["files"] == [str(tmp_path / "out" / "model.pt2")]  # what is saved is exported too
    assert (tmp_path / "out" / "model.pt2").is_file()
    assert record["budget"]["met"] is False
    assert len(record["budget"]["trials"]) == 1
    assert record["kept"] == ["norm"]
    last = result.stderr.splitlines()[-1]
    assert last.startswith("Error: top-1 ")
    assert last.endswith(f": saved all the same as {tmp_path / 'out'}")
    assert "not met" in (tmp_path / "out/README.md").read_text()
    stay = [p for p, m in normswap.load(tmp_path / "out").named_modules() if isinstance(m, nn.LayerNorm)]
    assert stay == record["kept"]


def test_agreement_of_a_model_without_classes_is_refused_before_calibration():
    model = family("headless")
    said = []
    with pytest.raises(normswap.ArgumentError, match="needs a model with classes"):
        normswap.convert(
            model,
            [images(model, 6)],
            budget=normswap.AccuracyBudget(min_agreement=90),
            progress=lambda what, *_: said.append(what),
        )
    assert not said


@pytest.mark.parametrize("flags", [["--max-keep", 2], ["--save-best"]])
def test_limits_without_a_budget(tmp_path, flags):
    result = run("convert", *DIGITS, *flags, "-o", tmp_path / "out", "-q")
    assert result.exit_code == 2
    assert "--max-drop or --min-agreement" in result.stderr
    assert len(result.stderr.splitlines()) == 1
    assert not list(tmp_path.iterdir())
