"""examples/paper: its four variants build, take a step and fold; its report renders whatever came out."""

import gzip
import importlib
import io
import json
import struct
import subprocess
import sys
import tarfile
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from PIL import Image
from torch import nn

from normswap.surgery.swap import batch_norms

from .child import ONE_THREAD
from .tolerance import FOLD_FLOAT64

FOLDER = Path(__file__).resolve().parents[1] / "examples" / "paper"
DEPTH = 2
NORMS = {"layernorm": 0, "batchnorm": 2 * DEPTH + 1, "pre-act": 3 * DEPTH + 1, "post-act": 3 * DEPTH + 1}


@pytest.fixture(scope="module")
def paper():
    """Two modules of the example, which is a folder of scripts and no package."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(FOLDER))
        names = ("tasks", "train", "report", "plot")
        before = {name: sys.modules.pop(name, None) for name in names}
        _, train, report, _ = (importlib.import_module(name) for name in names)
        yield train, report
        for name, module in before.items():
            sys.modules.pop(name)
            if module is not None:
                sys.modules[name] = module


@pytest.fixture
def small(paper):
    """Random images and a recipe of two updates."""
    script, _ = paper
    images, labels = torch.randn(16, *script.FASHION.input_size), torch.arange(16) % 10
    recipe = replace(script.Recipe(), train_images=16, test_images=16, epochs=1, batch=8, last_updates=1)
    return script.Data(images, labels, images, labels), recipe


def row(variant, lr, depth, seed, **other):
    made = {"variant": variant, "lr": lr, "depth": depth, "seed": seed, "top1": 80.0 + seed, "final_loss": 0.5}
    made |= {"crashed": False, "crashed_at": None, "diverged": False, "max_grad_norm": 3.0, "seconds": 1.0}
    return made | {"date": "2026-11-24"} | other


def content(script, runs, inference=()):
    made = script.Results(Path("nowhere.json"), script.Recipe()).content
    return made | {"runs": list(runs), "inference": list(inference)}


def test_the_variants_start_alike_with_fresh_norms(paper):
    script, _ = paper
    models = {variant: script.build(variant, DEPTH, seed=3) for variant in script.VARIANTS}
    assert {variant: len(batch_norms(model)) for variant, model in models.items()} == NORMS
    for variant, model in models.items():
        assert any(isinstance(m, nn.LayerNorm) for m in model.modules()) == (variant == "layernorm")
        for norm in batch_norms(model).values():
            fresh = nn.BatchNorm1d(norm.num_features)
            assert norm.eps == fresh.eps
            assert all(torch.equal(norm.state_dict()[k], v) for k, v in fresh.state_dict().items())
        assert torch.equal(model.blocks[0].mlp.fc1.weight, models["layernorm"].blocks[0].mlp.fc1.weight)


@pytest.mark.parametrize("variant", NORMS)
def test_a_variant_takes_its_steps(paper, small, variant):
    made = paper[0].train(variant, 1e-3, DEPTH, 0, *small)
    assert not made["crashed"]
    assert 0 < made["final_loss"] < 10
    assert 0 < made["max_grad_norm"] < 1e3


@pytest.mark.parametrize("variant", list(NORMS)[1:])
def test_fused_equals_unfused(paper, variant):
    model = paper[0].build(variant, DEPTH, seed=0).double().eval()
    for norm in batch_norms(model).values():
        for name, low, high in (("running_mean", -1, 1), ("running_var", 0.5, 2), ("weight", 0.5, 2), ("bias", -1, 1)):
            getattr(norm, name).data.uniform_(low, high)
    images = torch.randn(4, *paper[0].FASHION.input_size, dtype=torch.float64)
    fused = paper[0].fuse(model)
    assert not batch_norms(fused)
    assert (fused(images) - model(images)).abs().max() < FOLD_FLOAT64


def test_a_crash_is_seen(paper, small):
    data, recipe = small
    made = paper[0].train("layernorm", 1e-3, DEPTH, 0, replace(data, images=data.images * float("inf")), recipe)
    assert (made["crashed"], made["crashed_at"], made["top1"], made["diverged"]) == (True, 0, None, False)


def test_rows_stay_and_other_recipes_are_refused(paper, tmp_path):
    script, _ = paper
    path, recipe = tmp_path / "results.json", script.Recipe()
    script.Results(path, recipe).add("runs", row("layernorm", 0.1, 4, 0))
    again = script.Results(path, recipe)
    assert again.has("runs", variant="layernorm", lr=0.1, depth=4, seed=0)
    assert not again.has("runs", variant="layernorm", lr=0.1, depth=4, seed=1)
    assert [p.name for p in tmp_path.iterdir()] == ["results.json"]
    with pytest.raises(script.click.ClickException, match="has another recipe"):
        script.Results(path, replace(recipe, epochs=99))


@pytest.mark.slow
def test_the_grid_runs_in_several_processes(tmp_path):
    for name, count in (("train", 256), ("t10k", 64)):
        for what, shape in (("images-idx3", (count, 28, 28)), ("labels-idx1", (count,))):
            head = b"\0\0\x08" + bytes([len(shape)]) + struct.pack(f">{len(shape)}I", *shape)
            body = torch.randint(10, shape, dtype=torch.uint8).numpy().tobytes()
            (tmp_path / f"{name}-{what}-ubyte.gz").write_bytes(gzip.compress(head + body))
    results = tmp_path / "results.json"
    options = ["--seeds", "1", "--lr", "0.001", "--depth", "1", "--jobs", "2", "--results", str(results)]
    command = [sys.executable, str(FOLDER / "train.py"), "--data-dir", str(tmp_path), *options]
    done = subprocess.run(command, capture_output=True, text=True, env=ONE_THREAD, check=False)
    assert done.returncode == 0, done.stderr
    rows = json.loads(results.read_text())["runs"]
    assert sorted(row["variant"] for row in rows) == sorted(NORMS)
    assert not any(row["crashed"] for row in rows)
    assert len(done.stdout.splitlines()) == len(NORMS)


def test_a_run_that_fails_takes_no_other_with_it(paper, monkeypatch):
    script, _ = paper

    class Pool(ThreadPoolExecutor):
        def __init__(self, jobs, context, enter, arguments):
            super().__init__(jobs)

    def train(setting):
        if setting[3] == 1:
            raise RuntimeError("no memory")
        time.sleep(0.1)
        return {"seed": setting[3]}

    monkeypatch.setattr(script, "ProcessPoolExecutor", Pool)
    monkeypatch.setattr(script, "_train", train)
    task = replace(script.FASHION, load=lambda folder, recipe: None)
    rows = script.rows([("layernorm", 0.1, 4, seed) for seed in range(4)], task, Path(), "cpu", 2)
    assert next(rows) == {"seed": 0}
    with pytest.raises(RuntimeError, match="no memory"):
        list(rows)


def test_only_one_task_is_timed(paper, tmp_path):
    results = tmp_path / "r.json"
    options = ["--task", "photos", "--inference", "--results", str(results)]
    done = CliRunner().invoke(paper[0].main, options)
    assert done.exit_code == 2
    assert "times the model of Fashion-MNIST" in done.output
    assert not results.exists()


def test_photos_are_read_from_tars(paper, tmp_path):
    tasks = sys.modules["tasks"]
    for name, shade in (("train", 0), ("validation", 100)):
        with tarfile.open(tmp_path / f"{name}.tar", "w") as tar:
            for label, animal in enumerate(("cat", "dog")):
                for i in range(3):
                    content = io.BytesIO()
                    Image.new("RGB", (32, 32), (shade + 50 * label, 0, 255)).save(content, "PNG")
                    member = tarfile.TarInfo(f"{animal}/{i}.png")
                    member.size = content.tell()
                    content.seek(0)
                    tar.addfile(member, content)
    data = tasks.load_tars(tmp_path, replace(tasks.PHOTOS.recipe, train_images=4, mean=0.0, std=1.0))
    assert data.labels.tolist() == [0, 1, 0, 1]
    assert data.test_labels.tolist() == [0, 1] * 3
    assert data.images.shape == (4, *tasks.PHOTOS.input_size)
    assert (255 * data.images[:, 0, 0, 0]).round().tolist() == [0, 50, 0, 50]
    assert (data.test_images[:, 2] == 1).all()
    with tarfile.open(tmp_path / "train.tar", "w"):
        pass
    for folder in (tmp_path, tmp_path / "elsewhere"):  # nothing in it, not there
        with pytest.raises(paper[0].click.ClickException, match=r"train\.tar.*--data-dir"):
            tasks.load_tars(folder, tasks.PHOTOS.recipe)
    with pytest.raises(paper[0].click.ClickException, match=r"train\.tar.*--data-dir"):
        tasks.load_tars(tmp_path / "elsewhere", tasks.PHOTOS.recipe)


@pytest.mark.parametrize("jobs", ["1", "2"])
def test_missing_data_is_one_line(paper, tmp_path, jobs):
    options = ["--data-dir", str(tmp_path), "--jobs", jobs, "--results", str(tmp_path / "r.json")]
    done = CliRunner().invoke(paper[0].main, options)
    assert done.exit_code == 1
    assert "apt-get install dataset-fashion-mnist" in done.output


def test_the_report_says_what_came_out(paper):
    script, report = paper
    runs = [row(v, lr, d, s) for v in NORMS for lr in (0.1, 1.0) for d in (4, 8) for s in (0, 1)]
    lost = {"top1": None, "final_loss": None, "crashed": True}
    runs = [r | lost if r["variant"] == "batchnorm" and r["lr"] == 1 else r for r in runs]
    speed = {"depth": 4, "batch": 1, "layernorm_ms": 2.0, "fused_ms": 1.5, "norm_free_ms": 1.4, "date": "2026-11-25"}
    speed |= {"fused_speedup": [1.33, 1.2, 1.4], "norm_free_speedup": [1.43, 1.3, 1.5]}
    text = report.markdown([content(script, runs, [speed])])
    assert "| 4 | 1 | BatchNorm only | - | - | - | 2 of 2 | 0 of 2 | 3 | 1 |" in text
    assert "crashes seen in 8 runs" in text
    assert "fails more often than LayerNorm" in text
    assert "| 4 | 1 | 2.00 | 1.50 | 1.40 | 1.330 (1.200 to 1.400) | 1.430 (1.300 to 1.500) |" in text
    assert "2026-11-24 to 2026-11-25" in text
    without = report.markdown([content(script, [row(v, 0.1, 4, 0) for v in NORMS])])
    assert "not seen: no crash in 1 runs" in without
    assert "fails as often as LayerNorm" in without
    assert "no difference to speak of" in without
    photos = content(script, [row(v, 0.1, 4, 0) for v in NORMS]) | {"task": "photos"}
    both = report.markdown([content(script, runs), photos])
    assert "| here, a small ViT on Fashion-MNIST | here, a small ViT on photos |" in both
    assert both.count("\n## On ") == 2
    assert "](paper-photos.png)" in both


def test_the_report_is_written(paper, tmp_path):
    pytest.importorskip("matplotlib", reason="the plot needs matplotlib: pip install matplotlib")
    script, _ = paper
    results, docs = tmp_path / "results.json", tmp_path / "docs"
    lost = {"top1": None, "final_loss": None, "crashed": True}
    runs = [row("batchnorm", 0.1, 4, 1, **lost), *(row(v, 0.1, 4, 0) for v in NORMS)]
    results.write_text(json.dumps(content(script, runs)))
    done = CliRunner().invoke(script.main, ["--report", "--results", str(results), "--docs", str(docs)])
    assert done.exit_code == 0, done.output
    assert (docs / "paper.png").read_bytes().startswith(b"\x89PNG")
    assert "paper.png" in (docs / "paper.md").read_text()


def test_without_matplotlib_it_says_what_to_install(paper, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    script, report = paper
    with pytest.raises(script.click.ClickException, match="pip install matplotlib"):
        report.write_report([content(script, [row("layernorm", 0.1, 4, 0)])], tmp_path)
