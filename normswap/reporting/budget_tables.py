"""The search for an accuracy budget, as tables and lines."""

from rich.table import Table

from ..records.budget import BudgetRecord
from ..tables import number, table

BUDGET_COLUMNS = ("LayerNorms kept", "top-1 %", "drop", "agreement %", "+- at most", "KL", "seconds", "trial", "")


def budget_rows(record: BudgetRecord) -> list[list[str]]:
    """Return one row per trial under `BUDGET_COLUMNS`, fewest LayerNorms first: the trade in one look."""
    order = sorted(range(len(record.trials)), key=lambda i: (len(record.trials[i].kept), i))
    rows = []
    for i in order:
        t = record.trials[i]
        mark = "holds the budget" if t.shortfall <= 0 else f"misses by {t.shortfall:.2f}"
        mark += ", taken" if i == record.chosen else ""
        numbers = [number(v) for v in (t.top1, t.drop, t.agreement, t.error)]
        rows.append([str(len(t.kept)), *numbers, number(t.kl, 4), number(t.seconds, 0), str(i + 1), mark])
    return rows


def budget_title(record: BudgetRecord) -> str:
    """Return what the table of trials is about, in one line."""
    wanted = [] if record.max_drop is None else [f"top-1 down by at most {record.max_drop:g} points"]
    if record.min_agreement is not None:
        wanted.append(f"top-1 agreement of at least {record.min_agreement:g} %")
    return f"budget: {' and '.join(wanted)}"


def budget_table(record: BudgetRecord) -> Table:
    """Return `budget_rows` as a table."""
    return table(BUDGET_COLUMNS, budget_rows(record), budget_title(record), right=BUDGET_COLUMNS[:-1])


def budget_line(record: BudgetRecord) -> str:
    """Return how the search ended in one line."""
    best = record.best
    tries = f"{len(record.trials)} of at most {record.max_evaluations} evaluations"
    end = "holds" if record.met else "not met"
    return f"{end} with {best.put_back} of {record.candidates} LayerNorms put back, after {tries}"
