"""How many LayerNorms an accuracy budget costs: the trade table of each method, for docs/budget.md.

    python benchmarks/budget.py -m local-dir:MODEL --data-dir IMAGES [--max-drop 1.0] [--methods channel reconstruct]

Writes docs/budget.json after each method, skips what is there for the architecture (delete it to start over), and
prints the tables as Markdown. ``--rankings 2 4 6`` compares ways to rank the LayerNorms instead, so many kept.
"""

import argparse
import copy
import datetime
import json
import platform
from pathlib import Path

import torch

import normswap
from normswap.inputs.dataset import load_splits
from normswap.planning.plan import keep_more, model_name
from normswap.records.budget import BudgetRecord, SiteCost, Trial
from normswap.records.report import versions
from normswap.reporting.budget_tables import BUDGET_COLUMNS, budget_line, budget_rows
from normswap.search.sensitivity import site_costs

RESULTS = Path(__file__).resolve().parents[1] / "docs" / "budget.json"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("-m", "--model", required=True)
    parser.add_argument("--data-dir", required=True)
    parser.add_argument("--methods", nargs="+", default=["channel", "reconstruct"])
    parser.add_argument("--max-drop", type=float, default=1.0)
    parser.add_argument("--max-evaluations", type=int, default=8)
    parser.add_argument("--calib-samples", type=int, default=512)
    parser.add_argument("--eval-samples", type=int, help="a random part of the validation split  [all]")
    parser.add_argument("--rankings", nargs="+", type=int, default=[])
    parser.add_argument("--seed", type=int, default=42)
    arguments = parser.parse_args()

    model = normswap.load_model(arguments.model)
    train, validation = load_splits(model, arguments.data_dir, "train", "validation")
    calibration = train.draw(arguments.calib_samples, arguments.seed)
    if arguments.eval_samples:
        validation = validation.draw(arguments.eval_samples, arguments.seed)
    results = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    found = results.setdefault(model_name(model), {})
    for method in arguments.methods:
        key = f"rankings, {method}" if arguments.rankings else method
        if key not in found:
            take = rankings if arguments.rankings else measure
            found[key] = take(model, calibration, validation, method, arguments)
            RESULTS.write_text(json.dumps(results, indent=1) + "\n")
        (show_rankings if arguments.rankings else show)(method, found[key])


def rankings(model, calibration, validation, method, arguments) -> dict:
    """Return top-1 and KL with the k dearest LayerNorms kept, for each way to say which those are."""
    batches, labelled, answers = [x for x, _ in calibration], list(validation), {}
    plan = normswap.make_plan(model)
    sites = [site.path for site in plan.sites]

    def converted(kept):
        swapped = normswap.swap_norms(model, keep_more(model, plan, kept, "kept"))
        return swapped, normswap.calibrate(swapped, batches, model, options=normswap.CalibrationOptions(method=method))

    swapped, fitted = converted([])
    first, all_swapped = normswap.evaluate_models({"original": model, "all": swapped}, labelled)
    explained = {fit.site: fit.r2_original for fit in fitted.sites}
    dear = {"1 - R2 of the BatchNorm": sorted(sites, key=lambda site: explained[site])}
    if method == "channel":  # a layer that was re-solved does not fit its LayerNorm any more
        left = {}
        for site in sites:
            back = copy.deepcopy(swapped)
            back.set_submodule(site, copy.deepcopy(model.get_submodule(site)))
            left[site] = normswap.evaluate_models({"original": model, site: back}, batches)[-1].kl
        dear["one put back into the conversion"] = sorted(sites, key=left.__getitem__)
    costs = site_costs(model, model, plan, sites, batches)
    dear["one swapped in the original"] = [cost.site for cost in sorted(costs, key=lambda cost: -cost.kl)]
    rows = {}
    for name, ranked in dear.items():
        rows[name] = {}
        for k in arguments.rankings:
            models = {"original": model, "kept": converted(ranked[:k])[0]}
            stage = normswap.evaluate_models(models, labelled, answers=answers)[-1]
            rows[name][str(k)] = [stage.top1, stage.kl]
    where = {"calibration_data": calibration.description, "evaluation_data": validation.description}
    record = {"original": first.top1, "all swapped": [all_swapped.top1, all_swapped.kl], "rows": rows, "order": dear}
    return record | where | {"date": str(datetime.date.today()), "versions": versions()}


def show_rankings(method: str, record: dict) -> None:
    """Print the comparison as Markdown."""
    counts = list(next(iter(record["rows"].values())))
    print(f"\n`{method}`, original {record['original']:.2f} %, all swapped {record['all swapped'][0]:.2f} %\n")
    print(f"| ranked by | {' | '.join(f'{k} kept' for k in counts)} |\n|---|{'---:|' * len(counts)}")
    for name, row in record["rows"].items():
        print(f"| {name} | {' | '.join(f'{top1:.2f} ({kl:.3f})' for top1, kl in row.values())} |")
    print(f"\n{record['calibration_data']}; {record['evaluation_data']}; {record['date']}; {record['versions']}")


def measure(model, calibration, validation, method, arguments) -> dict:
    """Return the record of one search."""
    budget = normswap.AccuracyBudget(max_drop=arguments.max_drop, max_evaluations=arguments.max_evaluations)
    try:
        report = normswap.convert(
            model,
            calibration,
            eval_images=validation,
            calibration=normswap.CalibrationOptions(method=method),
            budget=budget,
        ).report
    except normswap.CheckFailedError as error:
        if error.report is None:
            raise
        report = error.report
    record = report.to_json()
    keys = ("calibration_data", "evaluation_data", "budget", "stages", "kept", "seconds", "versions")
    where = {"machine": platform.machine(), "threads": torch.get_num_threads()}
    return {key: record[key] for key in keys} | where | {"date": str(datetime.date.today())}


def show(method: str, record: dict) -> None:
    """Print one method's table as Markdown."""
    trade = BudgetRecord(**record["budget"])
    trade.costs = [SiteCost(**cost) for cost in record["budget"]["costs"]]
    trade.trials = [Trial(**trial) for trial in record["budget"]["trials"]]
    print(f"\n`{method}`: {budget_line(trade)}\n")
    print(f"| {' | '.join(BUDGET_COLUMNS)} |\n|{'---:|' * 8}---|")
    for row in budget_rows(trade):
        print(f"| {' | '.join(row)} |")
    print(f"\nKept: {', '.join(record['kept']) or 'none'}")
    print(f"{record['calibration_data']}; {record['evaluation_data']}; {record['date']}; {record['versions']}")


if __name__ == "__main__":
    main()
