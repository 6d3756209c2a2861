"""Put what `performance.py` measured into words and tables: docs/performance.md."""

from collections.abc import Iterable
from typing import Any

from normswap.benchmarking.options import COMPILE, EAGER, ENGINES
from normswap.benchmarking.results import AGAIN, BOUND, FUSED, ORIGINAL, VARIANTS

MODELS = {
    "ViT-Ti": "vit_tiny_patch16_224",
    "ViT-S": "vit_small_patch16_224",
    "ViT-B": "vit_base_patch16_224",
    "DeiT-S, distilled": "deit_small_distilled_patch16_224",
    "Swin-T": "swin_tiny_patch4_window7_224",
    "ConvNeXt-T": "convnext_tiny",
}
GPU_BATCHES, GPU_PRECISIONS, GPU_ENGINES = (1, 128), ("float32", "bfloat16"), (EAGER, COMPILE)


def gain(value: float, digits: int = 1) -> str:
    """Return a ratio as a gain in percent."""
    return f"{100 * (value - 1):+.{digits}f}"


def variants(record: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Return the four results of a case by variant."""
    return {row["variant"]: row for row in record["results"]}


def case_row(record: dict[str, Any]) -> str:
    """Return one line of a table: one model, engine and batch size."""
    of = variants(record)
    original, fused, bound, again = (of[name] for name in VARIANTS)

    def ratio(row: dict[str, Any], name: str = "ratio") -> str:
        return f"{gain(row[name])} ({gain(row[f'{name}_q25'])} to {gain(row[f'{name}_q75'])})"

    memory = [
        "-" if row["infer_peak_memory"] is None else f"{row['infer_peak_memory']:.0f}" for row in (original, fused)
    ]
    title = next((title for title, name in MODELS.items() if name == record["model"]), record["model"])
    cells = [
        title,
        original["engine"],
        original["infer_batch_size"],
        *(f"{row['infer_step_time']:.2f}" for row in (original, fused, bound)),
        f"**{gain(fused['ratio'])}** ({gain(fused['ratio_q25'])} to {gain(fused['ratio_q75'])})",
        ratio(bound),
        ratio(fused, "ratio_to_bound"),
        ratio(again),
        *memory,
    ]
    return f"| {' | '.join(map(str, cells))} |"


def order(record: dict[str, Any]) -> tuple[int, ...]:
    """Return where a case stands in its table."""
    row = record["results"][0]
    return (
        list(MODELS.values()).index(record["model"]) if record["model"] in MODELS.values() else len(MODELS),
        ENGINES.index(row["engine"]),
        row["infer_batch_size"],
    )


def machine_table(records: list[dict[str, Any]]) -> list[str]:
    """Return the tables of everything that was measured on one machine with one set of settings."""
    settings, versions = records[0]["settings"], records[0]["versions"]
    dates = sorted({record["date"] for record in records})
    shared = " The machine was shared with other programs." if any(record["shared"] for record in records) else ""
    clock = {
        "cpu": "CPU time of the process, on which other programs on the core have little influence",
        "wall": "wall clock",
    }.get(settings["clock"], settings["clock"])
    device = "CPU" if settings["device"] == "cpu" else settings["device"]
    rounds = sorted({record["settings"]["rounds"] for record in records})
    return [
        f"### {device}, {settings['precision']}",
        "",
        f"{records[0]['machine']}, {settings['threads']} thread(s), {' to '.join(sorted({dates[0], dates[-1]}))}, "
        f"torch {versions['torch']}, timm {versions['timm']}; {' or '.join(map(str, rounds))} rounds, clock: {clock}."
        f"{shared}",
        "",
        "| model | engine | batch | original, ms | fused, ms | norm-free, ms | gain of fused, % (quartiles) "
        "| gain of norm-free, % | fused against norm-free, % | copy of the original, % | original, MiB | fused, MiB |",
        "|---|---|--:|--:|--:|--:|--:|--:|--:|--:|--:|--:|",
        *map(case_row, sorted(records, key=order)),
        "",
    ]


def gpu_matrices(records: list[dict[str, Any]]) -> list[str]:
    """Return the grid of every GPU that was measured, or one where nothing was."""
    gpus = sorted({record["settings"]["device"] for record in records} - {"cpu"})
    lines: list[str] = []
    for gpu in gpus or ["no GPU yet"]:
        lines += [f"### {gpu}", "", *gpu_matrix([r for r in records if r["settings"]["device"] == gpu]), ""]
    return lines


def gpu_matrix(records: list[dict[str, Any]]) -> list[str]:
    """Return what of one GPU's grid is known: the gain of each cell, or that it was not measured."""
    known = {
        (r["model"], r["settings"]["precision"], r["results"][0]["engine"], r["results"][0]["infer_batch_size"]): r
        for r in records
    }
    columns = [(p, e, b) for p in GPU_PRECISIONS for e in GPU_ENGINES for b in GPU_BATCHES]
    lines = [
        f"| model | {' | '.join(f'{p}, {e}, batch {b}' for p, e, b in columns)} |",
        f"|---|{'--:|' * len(columns)}",
    ]
    for title, name in MODELS.items():
        found = [known.get((name, *column)) for column in columns]
        cells = [
            "not measured" if r is None else f"{'~ ' * (standing(r) == 'drowned')}{gain(variants(r)[FUSED]['ratio'])} %"
            for r in found
        ]
        lines.append(f"| {title} | {' | '.join(cells)} |")
    return lines


def standing(record: dict[str, Any]) -> str:
    """Return whether fused is "faster" than the original, "slower", or by no more than the noise: "drowned"."""
    of = variants(record)
    fused, noise = of[FUSED], abs(of[AGAIN]["ratio"] - 1)
    if fused["ratio_q75"] < 1 and 1 - fused["ratio"] > noise:
        return "slower"
    return "drowned" if abs(fused["ratio"] - 1) <= max(fused["ratio_q75"] - fused["ratio_q25"], noise) else "faster"


def findings(records: Iterable[dict[str, Any]]) -> list[str]:
    """Return how many cases are faster, drowned in noise, slower, and off the norm-free bound."""
    names: dict[str, list[str]] = {"faster": [], "drowned": [], "slower": [], "off": []}
    total = 0
    for record in records:
        total += 1
        of, settings = variants(record), record["settings"]
        fused, noise = of[FUSED], abs(of[AGAIN]["ratio"] - 1)
        where = "CPU" if settings["device"] == "cpu" else f"{settings['device']}, {settings['precision']}"
        name = f"{record['model']}, {where}, {fused['engine']}, batch {fused['infer_batch_size']}"
        names[standing(record)].append(name)
        if fused["ratio_to_bound_q75"] < 1 and 1 - fused["ratio_to_bound"] > noise:
            names["off"].append(f"{name} ({gain(fused['ratio_to_bound'])} %)")

    def listed(what: str) -> str:
        return ":" + "".join(f"\n  - {name}" for name in names[what]) if names[what] else "."

    return [
        f"- {total} cases were measured. The fused model is faster than the original by more than the spread in "
        f"{len(names['faster'])}.",
        f"- In {len(names['drowned'])} the gain is no larger than the noise and proves nothing{listed('drowned')}",
        f"- In {len(names['slower'])} the fused model is measurably slower than the original{listed('slower')}",
        f"- In {len(names['off'])} the fused model is measurably slower than the norm-free bound{listed('off')}",
    ]


ON_IMAGES = (
    "Time can depend on the images. On noise, which no photo resembles, the attention of a converted model can become",
    "so peaked that its softmax gives denormal numbers, and many CPUs are several times slower with these. With the",
    "demo model ONNX Runtime took 16.5 ms instead of 8.9 for 16 images of noise, and 8.2 instead of 8.7 for 16 of the",
    "model's own images (an experiment during development). PyTorch's kernels did not slow down. `normswap benchmark`",
    "therefore takes images with `--data-dir`; without it the images are random, and denormal numbers count as zero,",
    "as with `torch.set_flush_denormal(True)` in any program.",
)


ON_GPU = (
    "Fused against original, % more images per second, in float32 (TF32 off, torch's default) and with weights and",
    "images in bfloat16. A ~ marks a gain no larger than the noise. Eagerly every LayerNorm runs kernels of its own,",
    "and removing it removes them. A compiler fuses them with adjacent operators, so less can be gained. In float32",
    "with large batches the matrix products dominate.",
    "",
    "Each model had a process of its own: `python benchmarks/performance.py --device cuda -m MODEL --rounds 10",
    "--threads 2 --shared --lock FILE --out FILE.md`; `--render --add FILE.json` combined the results. While one model",
    "was timed, the others compiled and ran their first steps. This disturbed all measurements, those of compiled",
    "batches of 128 most, and explains the wide spread of some.",
)


def real_table(record: dict[str, Any]) -> list[str]:
    """Return the section about one pretrained model on images, from what ``normswap benchmark --json`` printed."""
    rows = {(r["infer_batch_size"], r["engine"], r["variant"]): r for r in record["results"]}
    settings, versions = record["settings"], record["versions"]
    lines = [
        "## A pretrained model on images",
        "",
        f"{record['model']} at {record['img_size']} pixels, converted by `reconstruct`, on {settings['images']}; "
        f"{settings['threads']} thread(s), torch {versions['torch']}, timm {versions['timm']}, {settings['rounds']} "
        "rounds, clock: CPU time. `normswap benchmark -m ... --against local-dir:out --data-dir ... -b 1,16 "
        "--threads 1 --clock cpu --json` measured it.",
        "",
        "| engine | batch | original, ms | fused, ms | norm-free, ms | gain of fused, % | copy of the original, % |",
        "|---|--:|--:|--:|--:|--:|--:|",
    ]
    for batch, engine in dict.fromkeys((batch, engine) for batch, engine, _ in rows):
        of = {variant: rows[batch, engine, variant] for variant in VARIANTS}
        times = " | ".join(f"{of[name]['infer_step_time']:.2f}" for name in (ORIGINAL, FUSED, BOUND))
        spread = f"({gain(of[FUSED]['ratio_q25'])} to {gain(of[FUSED]['ratio_q75'])})"
        cells = f"{gain(of[FUSED]['ratio'])} {spread} | {gain(of[AGAIN]['ratio'])}"
        lines.append(f"| {engine} | {batch} | {times} | {cells} |")
    return [*lines, ""]


def document(records: list[dict[str, Any]], real: dict[str, Any] | None) -> str:
    """Return docs/performance.md."""
    groups: dict[tuple, list[dict[str, Any]]] = {}
    for record in records:
        settings = record["settings"]
        group = (record["machine"], *(settings[n] for n in ("device", "precision", "threads", "clock")))
        groups.setdefault(group, []).append(record)
    different = {r["model"]: r["differences"] for r in records if r["differences"]}
    missing = [title for title, name in MODELS.items() if name not in {record["model"] for record in records}]
    notes = sorted({note for r in records for note in r["notes"]})
    return "\n".join(
        [
            "# Speed without LayerNorm",
            "",
            "Written by `python benchmarks/performance.py`; `performance.json` holds each case. `normswap benchmark`",
            "measures your own model, converted or not.",
            "",
            "The four models are timed round-robin: the original, the fused one, the norm-free bound (the same",
            "architecture with `norm_layer=torch.nn.Identity`, or with every LayerNorm replaced by it if timm does",
            "not accept that argument) and a second copy of the original, whose ratio shows the noise. Times are",
            "medians over the rounds. A gain is the ratio of images per second to the original's in the same round:",
            "median, quartiles in brackets.",
            "",
            "Equal models differ by the location of their weights in memory, so all weights are moved three times",
            "during a measurement, and the spread includes this. On a CPU glibc is told to keep freed memory;",
            "otherwise page faults would slow down some models more than others. Weights and images are random unless",
            "stated otherwise. Peak memory is that of the weights and activations of one step, without the images.",
            "",
            *findings(records),
            *([f"- Not measured on any machine: {', '.join(missing)}."] if missing else []),
            "",
            "## Measured",
            "",
            *(line for group in groups.values() for line in machine_table(group)),
            *([] if real is None else real_table(real)),
            *ON_IMAGES,
            "",
            "## GPU",
            "",
            *ON_GPU,
            "",
            *gpu_matrices(records),
            "## What the fused models compute in addition to the norm-free bound",
            "",
            *(f"- {model}: {'; '.join(lines)}" for model, lines in different.items()),
            *([] if different else ["None: every LayerNorm was folded, and no bias was added."]),
            "",
            *(["## Notes", "", *(f"- {note}" for note in notes), ""] if notes else []),
        ]
    )
