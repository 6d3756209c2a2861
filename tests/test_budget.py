"""The accuracy budget: the search by its properties, the ranking by hand, and both on real models."""

import json
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import normswap
from normswap.budget import COLUMNS, Budget, Search, trade_line, trade_rows
from normswap.demo import FOLDER, MODEL
from normswap.evaluate import evaluate_models
from normswap.plan import keep_more
from normswap.rank import site_costs, spread
from normswap.report import StageMetrics
from normswap.swap import batch_norms, swap_norms
from normswap.trade import SiteCost

from .models import family, images
from .test_cli import one_object, run
from .tolerance import FOLD_FLOAT32

COSTS = st.lists(st.floats(0.01, 10), min_size=2, max_size=40)


def stage(top1: float | None, agreement: float | None = 90.0, n: int = 1000) -> StageMetrics:
    return StageMetrics("model", n, top1, top1, agreement, 0.1, 0.2, 1.0, 0)


def searched(budget: Budget, costs: dict[str, float], loss=None):
    """Run the search on a model whose every swapped site costs so many points, and count what it asks for."""
    calls = []

    def attempt(put_back):
        drop = sum(cost for site, cost in costs.items() if site not in put_back)
        drop = loss(len(put_back), drop) if loss else drop
        calls.append(tuple(put_back))
        return budget.trial(put_back, len(put_back), stage(100.0), stage(100 - drop), 0.0), tuple(put_back)

    def rank(result, sites):
        return [SiteCost(site, costs[site]) for site in sites]

    trade, result = Search(budget, list(costs), attempt, rank).run()
    assert trade.trials[trade.chosen].kept == list(result)
    return trade, result, calls


@given(COSTS, st.floats(0, 50), st.integers(1, 12), st.none() | st.integers(0, 45))
def test_the_search_keeps_its_promises(costs, max_drop, evaluations, max_keep):
    sites = {f"s{i}": cost for i, cost in enumerate(costs)}
    trade, result, calls = searched(Budget(max_drop, None, max_keep, evaluations), sites)
    assert len(trade.trials) == len(calls) <= evaluations
    assert len(set(map(frozenset, calls))) == len(calls), "a conversion was tried twice"
    limit = len(sites) - 1 if max_keep is None else min(max_keep, len(sites) - 1)
    assert all(len(set(put_back)) == len(put_back) <= limit for put_back in calls)
    assert calls[0] == ()
    holding = [t for t in trade.trials if t.shortfall <= 0]
    if holding:
        assert trade.best.put_back == len(result) == min(t.put_back for t in holding)
    else:
        assert trade.best.shortfall == min(t.shortfall for t in trade.trials)


@given(COSTS, st.floats(0.01, 100))
def test_with_evaluations_enough_it_finds_the_fewest(costs, max_drop):
    sites = {f"s{i}": cost for i, cost in enumerate(costs)}
    _, result, calls = searched(Budget(max_drop, None, None, 100), sites)
    by_cost = sorted(costs, reverse=True)
    fewest = next((k for k in range(len(costs)) if sum(by_cost[k:]) <= max_drop - 1e-6), None)
    if fewest is not None:  # sums in another order may differ in their last bit, hence the margin
        assert len(result) <= fewest
        assert len(calls) <= 3 + math.ceil(math.log2(len(costs))) + 2 * 2


def test_accuracy_that_is_not_monotone_does_no_harm():
    sites = {f"s{i}": 1.0 for i in range(16)}
    # Twelve LayerNorms are worse than eight here, so the bisection is led astray; what it takes still holds.
    trade, result, _ = searched(Budget(2.0, None, None, 20), sites, lambda k, drop: {8: 1.5, 12: 9.0}.get(k, drop))
    assert trade.best.drop <= 2.0
    assert len(result) == min(t.put_back for t in trade.trials if t.drop <= 2.0)


def test_what_is_ranked_wrong_is_thinned_out():
    """The first ranking puts a free site first; the ranking of the conversion that holds the budget lets it go."""
    sites = {"free": 0.0, "dear": 5.0, "a": 0.4, "b": 0.4, "c": 0.4}
    budget = Budget(1.5, None, None, 8)

    def attempt(put_back):
        drop = sum(cost for site, cost in sites.items() if site not in put_back)
        return budget.trial(put_back, len(put_back), stage(100.0), stage(100 - drop), 0.0), tuple(put_back)

    def rank(result, kept):
        return [SiteCost(site, 9.0 if site == "free" and result is None else sites[site]) for site in kept]

    trade, result = Search(budget, list(sites), attempt, rank).run()
    assert result == ("dear",)
    assert trade.costs[0] == SiteCost("free", 9.0)


def test_both_limits_hold_and_the_words_say_which_does_not():
    first = stage(80.0, 100.0)
    both = Budget(max_drop=1.0, min_agreement=95.0)
    assert both.problem(first, stage(79.0, 95.0)) is None
    assert both.problem(first, stage(78.0, 96.0)) == "top-1 fell by 2.00 points, more than --max-drop 1"
    assert both.problem(first, stage(80.0, 94.0)) == "94.00 % same answers, fewer than --min-agreement 95"
    assert " and " in both.problem(first, stage(70.0, 80.0))
    assert both.shortfall(first, stage(78.0, 80.0)) == pytest.approx(15)
    # Exactly the budget is within it, whatever binary fractions make of 76.7 - 75.7.
    assert Budget(max_drop=1.0).problem(stage(76.7), stage(75.7)) is None


def test_the_bound_on_the_error_bounds_the_error():
    """Over many draws of images the drop varies by no more than the trial says."""
    generator = torch.Generator().manual_seed(0)
    n, draws = 500, 4000
    # Per image: right before and not after (6 %), the other way round (2 %), wrong twice but differently (4 %).
    kind = torch.rand(draws, n, generator=generator)
    lost, won, other = kind < 0.06, (kind >= 0.06) & (kind < 0.08), (kind >= 0.08) & (kind < 0.12)
    spread_of_drop = float((100 * (lost.double() - won.double()).mean(1)).std())
    agreement = 100 * float(1 - (lost | won | other).double().mean())
    trial = Budget(max_drop=1.0).trial([], 0, stage(80.0, 100.0, n), stage(76.0, agreement, n), 1.0)
    assert 0.5 * trial.error < spread_of_drop < trial.error


@pytest.mark.parametrize(
    ("budget", "word"),
    [
        (Budget(max_drop=float("nan")), "nan"),
        (Budget(min_agreement=101.0), "--min-agreement"),
        (Budget(max_drop=1.0, max_keep=-1), "--max-keep"),
        (Budget(max_drop=1.0, max_evaluations=0), "--max-evaluations"),
        (Budget(max_keep=3), "goes with --max-drop"),
    ],
)
def test_budgets_that_cannot_be_meant(budget, word):
    with pytest.raises(normswap.ArgumentError, match=word):
        budget.check()


def test_a_sites_cost_is_what_swapping_it_alone_moves():
    model = family("deit3", torch.float64)
    with torch.no_grad():
        model.blocks[0].ls1.gamma.zero_()  # whatever norm1 gives, nothing of it arrives
    x = images(model, 12)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    plan = normswap.make_plan(model)
    sites = [site.path for site in plan.sites]
    found = {cost.site: cost.kl for cost in site_costs(model, model, plan, sites, x.split(5))}
    assert list(found) == sites
    assert found["blocks.0.norm1"] == pytest.approx(0, abs=1e-12)
    assert all(found[site] > 1e-6 for site in sites if site != "blocks.0.norm1")
    assert all(torch.equal(before[k], v) for k, v in model.state_dict().items())
    assert not batch_norms(model)
    assert not any(module._forward_hooks for module in model.modules())

    # By hand for one: least squares per channel in front of the last block's FFN, nothing else touched.
    site = "blocks.1.norm2"
    layer_norm, seen = model.get_submodule(site), []
    hook = layer_norm.register_forward_hook(lambda module, inputs, output: seen.append((inputs[0], output)))
    with torch.no_grad():
        model(x)
    hook.remove()
    rows, wanted = (t.reshape(-1, t.shape[-1]) for t in seen[0])  # [B, N, C] -> [M, C]
    scale = ((rows - rows.mean(0)) * (wanted - wanted.mean(0))).mean(0) / rows.var(0, correction=0)
    shift = wanted.mean(0) - scale * rows.mean(0)
    hook = layer_norm.register_forward_hook(lambda module, inputs, output: inputs[0] * scale + shift)
    with torch.no_grad():
        moved = model(x)
    hook.remove()
    with torch.no_grad():
        answers = model(x).log_softmax(1)
    kl = (answers.exp() * (answers - moved.log_softmax(1))).sum(1).mean()
    assert found[site] == pytest.approx(float(kl), rel=1e-6)


def test_costs_in_a_conversion_leave_its_batch_norms_alone():
    model = family("vit")
    x = images(model, 8)
    plan = normswap.make_plan(model)
    part = keep_more(model, plan, ["blocks.1.norm1", "norm"], "stays")
    swapped = swap_norms(model, part)
    normswap.calibrate(swapped, [x], model, "channel")
    before = {k: v.clone() for k, v in swapped.state_dict().items()}
    costs = site_costs(swapped, model, plan, ["blocks.1.norm1", "norm"], [x])
    whole = evaluate_models({"original": model, "swapped": swapped}, [x])[-1].kl
    assert [cost.site for cost in costs] == ["blocks.1.norm1", "norm"]
    assert all(cost.kl != whole for cost in costs)
    assert all(torch.equal(before[k], v) for k, v in swapped.state_dict().items())


def test_ranking_looks_at_images_from_everywhere():
    batches = list(torch.arange(100.0).reshape(-1, 1, 1, 1).split(30))  # [100] -> [100, 1, 1, 1]
    chosen = torch.cat(spread(batches, 10, 4)).flatten()
    assert chosen.tolist() == [0, 10, 20, 30, 40, 50, 60, 70, 80, 90]
    assert len(torch.cat(spread(batches, 1000, 64))) == 100


def test_more_kept_sites_keep_their_reasons():
    model = family("headless")
    plan = normswap.make_plan(model, keep=["blocks.0.norm1"])
    more = keep_more(model, plan, ["blocks.1.norm2"], "stays for a test")
    reasons = {site.path: site.reason for site in more.sites if site.verdict == "keep"}
    assert reasons == {"blocks.0.norm1": "excluded by --keep", "blocks.1.norm2": "stays for a test"}
    assert keep_more(model, plan, [], "nothing") is plan
    assert [s for s in more.sites if s.verdict != "keep"] == [
        s for s in plan.sites if s.path not in ("blocks.0.norm1", "blocks.1.norm2")
    ]


def test_answers_are_asked_for_once():
    model, other = family("vit"), family("vit")
    x, asked = images(model, 9), []
    model.register_forward_hook(lambda *_: asked.append(1))
    answers: dict[int, torch.Tensor] = {}
    once = evaluate_models({"a": model, "b": other}, x.split(4), answers=answers)
    assert len(asked) == len(answers) == 3
    again = evaluate_models({"a": model, "b": other}, x.split(4), answers=answers)
    assert len(asked) == 3
    assert once == again == evaluate_models({"a": model, "b": other}, x.split(4))


@pytest.fixture(scope="module")
def digits():
    """The demo's model, calibration images and labelled images, in batches."""
    model = normswap.load_model(MODEL)
    train = list(normswap.load_images(model, FOLDER, "train").draw(64, 0))
    return model, [x for x, _ in train], list(normswap.load_images(model, FOLDER, "validation").draw(120, 0))


@pytest.fixture(scope="module")
def budgeted(digits):
    model, calibration, labelled = digits
    return normswap.convert(model, calibration, "channel", eval_images=labelled, max_drop=2.0, max_evaluations=3)


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
    rows = trade_rows(trade)
    assert len(rows) == len(trade.trials)
    assert all(len(row) == len(COLUMNS) for row in rows)
    assert sum("taken" in row[-1] for row in rows) == 1
    assert f"holds with {trade.best.put_back} of 9 LayerNorms put back" in trade_line(trade)


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
    report = normswap.convert(model, [images(model, 12)], min_agreement=0.0).report
    assert len(report.budget.trials) == 1
    assert report.budget.met
    assert report.budget.costs == []
    assert report.to_json()["kept"] == []


def test_agreement_needs_no_labels_and_a_generator_will_do(digits):
    model, calibration, labelled = digits
    result = normswap.convert(
        model,
        iter(calibration),
        "channel",
        eval_images=(x for x, _ in labelled),
        min_agreement=97.0,
        max_evaluations=2,
        keep=["norm"],
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
        normswap.convert(model, data, "channel", max_drop=-1.0, max_keep=1, finetune_options=options)
    report = caught.value.report
    assert [s.name for s in report.stages] == ["original", "swapped", "calibrated", "finetuned", "fused"]
    assert report.finetuning.steps > 0
    assert len(report.budget.trials) == 2
    assert not report.budget.met
    assert isinstance(caught.value.conversion, normswap.Conversion)
    assert "more than --max-drop -1, the best of 2 tries with at most 1 put back" in str(caught.value)


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
    assert all(name.split()[0] in result.stderr for name in COLUMNS if name)
    assert "normswap.load" in result.stderr


def test_a_budget_that_cannot_be_met_saves_the_best_only_if_asked(tmp_path):
    """Without --save-best nothing is saved, which tests/test_cli.py shows."""
    budget = ("--max-drop", -50, "--keep", "norm", "--max-evaluations", 1, "--save-best")
    result = run("convert", *CHANNEL, *budget, "-o", tmp_path / "out", "--json")
    assert result.exit_code == 4
    record = one_object(result)
    assert record["budget"]["met"] is False
    assert len(record["budget"]["trials"]) == 1
    assert record["kept"] == ["norm"]
    last = result.stderr.splitlines()[-1]
    assert last.startswith("Error: top-1 ")
    assert last.endswith(f": saved all the same as {tmp_path / 'out'}")
    assert "not met" in (tmp_path / "out/README.md").read_text()
    stay = [p for p, m in normswap.load(tmp_path / "out").named_modules() if isinstance(m, nn.LayerNorm)]
    assert stay == record["kept"]


def test_the_best_is_exported_too(tmp_path):
    flags = ("--max-drop", -50, "--keep", "norm", "--max-evaluations", 1, "--save-best", "--export", "pt2")
    result = run("convert", *CHANNEL, *flags, "-o", tmp_path / "out", "--json")
    assert result.exit_code == 4
    record = one_object(result)
    assert record["budget"]["met"] is False
    assert record["export"]["files"] == [str(tmp_path / "out" / "model.pt2")]
    assert (tmp_path / "out" / "model.pt2").is_file()
    assert result.stderr.splitlines()[-1].startswith("Error: top-1 ")


def test_agreement_of_a_model_without_classes_is_refused_before_calibration():
    model = family("headless")
    said = []
    with pytest.raises(normswap.ArgumentError, match="needs a model with classes"):
        normswap.convert(model, [images(model, 6)], min_agreement=90, progress=lambda what, *_: said.append(what))
    assert not said


@pytest.mark.parametrize("flags", [["--max-keep", 2], ["--save-best"]])
def test_limits_without_a_budget(tmp_path, flags):
    result = run("convert", *DIGITS, *flags, "-o", tmp_path / "out", "-q")
    assert result.exit_code == 2
    assert "--max-drop or --min-agreement" in result.stderr
    assert len(result.stderr.splitlines()) == 1
    assert not list(tmp_path.iterdir())
