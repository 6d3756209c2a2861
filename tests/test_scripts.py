"""The scripts that make the documents: what they say of a record is what it holds."""

import importlib
import json
import sys
import threading
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module", params=["performance_document", "finetuning", "calibration"])
def script(request):
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(ROOT / "benchmarks"))
        yield importlib.import_module(request.param)
        sys.modules.pop(request.param)


def record(name: str) -> list[dict]:
    found = json.loads((ROOT / "docs" / f"{name}.json").read_text())
    return found if isinstance(found, list) else found["rows"]


def test_the_document_is_what_the_record_says(script):
    name = script.__name__.removesuffix("_document")
    rows, text = record(name), (ROOT / "docs" / f"{name}.md").read_text()
    if name == "performance":
        real = json.loads((ROOT / "docs" / "performance-real.json").read_text())
        assert script.document(rows, real) == text
    else:
        made = script.tables(rows) if name == "finetuning" else script.table(rows)
        lines = [line for line in made.splitlines() if line]
        assert len(lines) > 10
        assert [line for line in lines if line not in text] == []


def case(ratio, low, high, again=1.0, bound=1.0, device="cpu"):
    def row(variant, ratio, low, high):
        made = {"variant": variant, "engine": "eager", "infer_batch_size": 1, "ratio_to_bound": bound}
        return made | {"ratio": ratio, "ratio_q25": low, "ratio_q75": high, "ratio_to_bound_q75": bound}

    names = ("original", "fused", "norm-free", "original again")
    spreads = ((1.0, 1.0, 1.0), (ratio, low, high), (ratio, low, high), (again, again, again))
    results = [row(name, *spread) for name, spread in zip(names, spreads, strict=True)]
    settings = {"device": device, "precision": "float32"}
    return {"model": "vit_tiny_patch16_224", "settings": settings, "results": results}


@pytest.fixture(scope="module")
def performance():
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(ROOT / "benchmarks"))
        yield importlib.import_module("performance_document")


@pytest.mark.parametrize(
    ("measured", "standing"),
    [
        (case(1.1, 1.09, 1.11), "faster"),
        (case(1.1, 1.0, 1.2), "drowned"),  # wider than the gain
        (case(1.1, 1.09, 1.11, again=0.85), "drowned"),  # copies of the original differ by more
        (case(0.9, 0.89, 0.91), "slower"),
        (case(0.99, 0.9, 1.05), "drowned"),
    ],
)
def test_a_gain_is_one_beyond_the_noise(performance, measured, standing):
    assert performance.standing(measured) == standing
    (total, *others) = performance.findings([measured])
    assert f"in {int(standing == 'faster')}." in total
    for line, name in zip(others, ("drowned", "slower"), strict=False):
        assert f"In {int(standing == name)} " in line


def test_every_gpu_has_a_table_of_its_own(performance):
    lines = performance.gpu_matrices(
        [case(1.2, 1.19, 1.21, device="A"), case(1.1, 1.0, 1.3, device="B"), case(1.5, 1.5, 1.5)]
    )
    assert [line for line in lines if line.startswith("###")] == ["### A", "### B"]
    ours = [line for line in lines if line.startswith("| ViT-Ti |")]
    assert ["+20.0 %" in line for line in ours] == [True, False]
    assert ["~ +10.0 %" in line for line in ours] == [False, True]
    assert not any("+50" in line for line in lines)
    assert "not measured" in "".join(performance.gpu_matrices([]))


def test_two_that_share_a_lock_take_turns(performance, tmp_path):
    locked, said = importlib.import_module("performance").locked, []

    def work(name):
        with locked(tmp_path / "lock"):
            said.append(name)
            time.sleep(0.05)
            said.append(name)

    threads = [threading.Thread(target=work, args=(name,)) for name in "ab"]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert said[0] == said[1]
    assert said[2] == said[3]
