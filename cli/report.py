"""``normswap report``: report.html anew, from the numbers in an output folder."""

from pathlib import Path

import click
import cloup

from . import options as o
from .console import Console, NormswapCommand

BENCHMARK = "benchmark.json"


@cloup.command(cls=NormswapCommand)
@click.argument("folder", metavar="OUT", type=click.Path(exists=True, file_okay=False, path_type=Path))
@cloup.option_group(
    "Report",
    cloup.option(
        "--benchmark",
        type=click.Path(exists=True, dir_okay=False, path_type=Path),
        help=f"output of `normswap benchmark --json`  [OUT/{BENCHMARK}, if it exists]",
    ),
)
@o.messages_group()
def report(folder: Path, benchmark: Path | None, as_json: bool, quiet: bool, verbose: int) -> None:
    """Write report.html again from the numbers in an output folder.

    OUT is a folder that `normswap convert` wrote. OUT/report.html is one page without network: accuracy, fit by depth,
    worst images, speed, plan. Everything comes from OUT/normswap.json; nothing is measured again.

    \b
    normswap report out
    normswap report out --benchmark speed.json
    """
    console = Console(as_json, quiet)
    from normswap.atomic import write_file
    from normswap.outputs.save import PAGE, RECORD, read_record
    from normswap.reporting.html_report import check_extra, read_benchmark, render_page

    check_extra()
    record = read_record(folder)
    if benchmark is None and (folder / BENCHMARK).is_file():
        benchmark = folder / BENCHMARK
    measured = None if benchmark is None else read_benchmark(benchmark)
    text = render_page(record, measured, str(folder / RECORD))
    page = folder / PAGE
    write_file(page, text)
    result = {
        "report": str(page),
        "bytes": page.stat().st_size,
        "benchmark": None if measured is None else str(benchmark),
    }
    console.result(result, *(() if as_json else (str(page),)))
    console.say("speed", "not measured" if measured is None else f"from {benchmark}")
    console.say("next", f"open {page} in a browser")
