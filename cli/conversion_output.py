"""What ``convert`` and ``demo`` say about a conversion."""

import sys
from pathlib import Path
from typing import Any

from . import next_command
from .console import Console


def show(console: Console, report: Any, verbose: int) -> None:
    """Say what was found, and print the data."""
    if report is not None:
        console.result(report.to_json(), *tell(console, report, verbose))


def tell(console: Console, report: Any, verbose: int) -> list[Any]:
    """Say what was found; return the tables."""
    from normswap.reporting.stress_tables import stress_line

    _say_calibration(console, report, verbose)
    for stage in report.stages:
        line = stage.accuracy_line()
        if line:
            part = f" on {stage.n} images" if stage.n != report.stages[0].n else ""
            console.say("eval", f"{stage.name:<10} {line}{part}")
    for name in report.skipped_images[:3]:
        console.say("skipped", f"{name} cannot be read")
    if len(report.skipped_images) > 3:
        console.say("skipped", f"{len(report.skipped_images)} images in all")
    console.say("fold", f"largest difference of an output, fused against unfused: {report.fold_max_abs_err:.3g}")
    if report.fold_warning is not None:
        console.say("note", report.fold_warning)
    if report.stress is not None:
        console.say("stress", stress_line(report.stress))
    return _tables(report, verbose)


def _say_calibration(console: Console, report: Any, verbose: int) -> None:
    from normswap.reporting.budget_tables import budget_line
    from normswap.reporting.conversion_tables import fit_line, kept_layers, scarce_rows

    if report.calibration_passes is not None:
        seconds, passes = report.seconds["calibrate"], report.calibration_passes
        console.say("cost", f"calibration took {seconds:.1f} s, {passes:.1f} plain forward passes over the images")
    if report.finetuning is not None:
        console.say("finetune", report.finetuning.line())
    fit = fit_line(report.fits)
    if fit:
        console.say("fit", fit)
    for line in kept_layers(report.layers, most=sys.maxsize if verbose else 3):
        console.say("kept", line)
    if report.stayed:
        console.say("stayed", f"{len(report.stayed)} of {len(report.plan)} LayerNorms: {', '.join(report.stayed)}")
    if report.budget is not None:
        console.say("budget", budget_line(report.budget))
    scarce = scarce_rows(report.layers)
    if scarce:
        console.say("scarce", scarce)


def _tables(report: Any, verbose: int) -> list[Any]:
    from rich.markup import escape

    from normswap.reporting.budget_tables import budget_table
    from normswap.reporting.conversion_tables import (
        WORST_COLUMNS,
        WORST_TITLE,
        layers_table,
        sites_table,
        stages_table,
        stream_table,
        worst_rows,
    )
    from normswap.reporting.stress_tables import stress_table
    from normswap.tables import table

    tables = []
    if verbose:
        tables += [sites_table(report.fits)] + ([layers_table(report.layers)] if report.layers else [])
    if report.stream:
        tables.append(stream_table(report.stream, every=verbose > 0))
    if report.worst:
        rows = worst_rows(report.worst, None if verbose else 3)
        cells = [[escape(cell) for cell in row] for row in rows]
        tables.append(table(WORST_COLUMNS, cells, WORST_TITLE, right=WORST_COLUMNS[-1:]))
    if verbose and report.stress is not None and report.stress.rows:
        tables.append(stress_table(report.stress))
    if report.budget is not None:
        tables.append(budget_table(report.budget))
    if report.stages:
        tables.append(stages_table(report.stages))
    return tables


def say_what_next(console: Console, options: dict[str, Any], report: Any) -> None:
    """Say what was written, how to load it, and how to measure it again."""
    from normswap.outputs.bounds_file import BOUNDS
    from normswap.outputs.save import PAGE
    from normswap.reporting.html_report import can_render

    out: Path = options["output"]
    page = (out / PAGE).is_file()
    bounds = f" {BOUNDS}," if report.bounded else ""
    files = f"model.safetensors,{bounds} config.json, normswap.json, README.md"
    console.say("wrote", f"{out}/{files}{f', {PAGE}' if page else ''}")
    if not page and options["report"] is not False:
        command = next_command.line("report", {}, out)
        missing = f"pip install 'normswap[report]' && {command}"
        why = f"it could not be made; for the reason run {command}" if can_render() else missing
        console.say("report", f"no {PAGE}: {why}")
    if report.stock_timm is None:
        norm, where = "torch.nn.Identity", ""
        if report.bounded:
            norm, where = f'partial(TokenBound, file="{out}/{BOUNDS}")', f", the class is in {out}/README.md"
        loads = f'timm.create_model("local-dir:{out}", pretrained=True, norm_layer={norm})'
        checked = f"checked, difference {report.read_back_err:.3g}"
        console.say("load with", f"{loads}   (normswap not needed{where}; {checked})")
    else:
        console.say("load with", f'normswap.load("{out}")   (not with plain timm: {report.stock_timm})')
    if options["save_swapped"] is not None:
        console.say("wrote", f"{options['save_swapped']}, with BatchNorm in: for normswap finetune and normswap fuse")
    changes = {**next_command.as_original(options), "model": f"local-dir:{out}"}
    changes |= {"stress_samples": None, "max_stress_drop": None}  # evaluate has a longer check of its own
    console.say("next", next_command.line("evaluate", options, **changes))
