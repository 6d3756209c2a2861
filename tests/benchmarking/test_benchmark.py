"""`normswap benchmark`: what is compared, what is recorded, and how it fails."""

import csv
import json
import sys
from contextlib import contextmanager

import pytest
import timm
import torch
from torch import nn

import normswap
from normswap.benchmarking import benchmark, timing
from normswap.benchmarking.benchmark import _rounds, benchmark_models
from normswap.benchmarking.engines import Runnable, _activations, prepare
from normswap.benchmarking.options import ENGINES
from normswap.benchmarking.results import AGAIN, BOUND, FUSED, ORIGINAL, VARIANTS
from normswap.benchmarking.variants import differences, norm_free, stand_in
from normswap.demo import FOLDER, MODEL
from normswap.layers import TokenAffine, TokenBound

from ..cli.test_cli import one_object, run
from ..models import family, images, randomise_statistics
from ..tolerance import FOLD_FLOAT32

CLI = ("benchmark", "-m", MODEL, "--rounds", 3, "--threads", 1, "--device", "cpu")


def fused_of(model: nn.Module, **plan: object) -> nn.Module:
    """Return the model converted with random BatchNorms."""
    swapped = normswap.swap_norms(model, normswap.make_plan(model, **plan)).eval()
    return normswap.fold_norms(randomise_statistics(swapped))


@pytest.fixture(autouse=True, scope="module")
def _short_turns():
    """Nothing here depends on how well the time is known."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(timing, "TURN_SECONDS", 0.005)
        patch.setattr(timing, "WARM_SECONDS", 0.005)
        yield


@pytest.fixture(scope="module")
def result() -> normswap.Benchmark:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    model = family("vit")
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    done = benchmark_models(model, fused_of(model), batch_sizes=[1, 4], rounds=3, clock="cpu", name="tiny")
    torch.set_num_threads(threads)
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
    return done


@pytest.mark.parametrize("name", ["vit", "deit_distilled", "dinov2_registers", "avg_pool", "siglip", "qk_norm"])
def test_the_bound_is_the_fused_model_where_all_is_folded(name):
    """The same operators on the same weights: equal to the bit. So nothing is left that would cost time."""
    model = family(name)
    fused = fused_of(model)
    bound = norm_free(model, fused)
    assert not any(isinstance(m, nn.LayerNorm | TokenAffine) for m in bound.modules())
    with torch.no_grad():
        answers = [m(images(model)) for m in (fused, bound, model)]
    assert torch.equal(answers[0], answers[1])
    assert not torch.allclose(answers[0], answers[2])
    assert differences(fused, bound) == []


@pytest.mark.parametrize(
    ("name", "plan", "words"),
    [
        ("headless", {}, "1 LayerNorms left a scale and shift: norm"),
        ("no_qkv_bias", {}, "2 biases were added by the fold: blocks.0.attn.qkv.bias, blocks.1.attn.qkv.bias"),
        ("vit", {"keep": ["blocks.1.norm1"]}, "1 LayerNorms are kept: blocks.1.norm1"),
    ],
)
def test_what_the_bound_does_not_have_is_named(name, plan, words):
    model = family(name)
    fused = fused_of(model, **plan)
    assert differences(fused, norm_free(model, fused)) == [words]


def test_bounds_are_named():
    model = family("vit")
    fused = stand_in(model)
    (words,) = differences(fused, norm_free(model, fused))
    assert words.startswith("5 LayerNorms left a bound: blocks.0.norm1, ")


@pytest.mark.parametrize("name", ["test_convnext", "swin_tiny_patch4_window7_224"])
def test_the_bound_of_an_architecture_that_does_not_take_identity(name):
    small = {} if name.startswith("test") else {"img_size": 64, "embed_dim": 24, "depths": (1, 1), "num_heads": (2, 2)}
    model = timm.create_model(name, **small).eval()
    bound = norm_free(model, model)
    assert not any(isinstance(m, nn.LayerNorm) for m in bound.modules())
    assert sum(isinstance(m, nn.LayerNorm) for m in model.modules()) > 3
    assert bound(images(model)).shape == model(images(model)).shape


def test_the_stand_in_has_the_operators_of_a_converted_model():
    model = family("no_qkv_bias")
    options = normswap.CalibrationOptions(method="channel", bound="tight")
    fused, real = stand_in(model), normswap.convert(model, [images(model, 40)], calibration=options).model
    assert any(isinstance(m, TokenBound) for m in fused.modules())
    assert [type(m) for m in fused.modules()] == [type(m) for m in real.modules()]
    assert {n: p.shape for n, p in fused.named_parameters()} == {n: p.shape for n, p in real.named_parameters()}


@pytest.mark.parametrize("rounds", [3, 4, 10])
def test_every_model_moves_as_often_and_none_is_always_first(rounds):
    moved, ran = [], []
    runs = {
        name: Runnable(lambda name=name: ran.append(name), lambda name=name: moved.append(name), lambda: None)
        for name in "ABCD"
    }
    told = []
    times = _rounds(runs, timing.wall_clock, rounds, 1, lambda name, turn: told.append((name, turn)))
    assert {len(t) for t in times.values()} == {rounds}
    assert "".join(moved) == "BCDACDABDABC"[: 4 * (min(rounds, 4) - 1)]
    assert told == [("ABCD"[i % 4], i) for i in range(4 * rounds)]
    assert len(ran) == 4 * rounds + len(moved)


def test_rows_have_timms_names_and_agree_with_the_rounds(result):
    rows = result.rows()
    assert [(r["infer_batch_size"], r["variant"]) for r in rows] == [(b, v) for b in (1, 4) for v in VARIANTS]
    for row, timed in zip(rows, result.timings, strict=True):
        assert {"infer_samples_per_sec", "infer_step_time", "infer_batch_size", "infer_img_size", "param_count"} <= {
            *row
        }
        assert len(timed.seconds) == 3
        median = sorted(timed.seconds)[1]
        assert row["infer_step_time"] == pytest.approx(1000 * median, abs=1e-3)
        assert row["infer_samples_per_sec"] == pytest.approx(timed.batch_size / median, abs=1e-2)
        original = result.timing("eager", timed.batch_size, ORIGINAL).seconds
        ratios = sorted(a / b for a, b in zip(original, timed.seconds, strict=True))
        assert row["ratio"] == (None if timed.variant == ORIGINAL else pytest.approx(ratios[1], abs=1e-4))
        assert (row["ratio_to_bound"] is None) == (timed.variant != FUSED)
    assert result.img_size == 32
    assert json.loads(json.dumps(result.to_json()))["settings"]["clock"] == "cpu"


def test_peak_memory_is_weights_and_activations(result):
    def memory(batch_size, variant):
        return result.timing("eager", batch_size, variant).peak_memory

    model = family("vit")
    weights = sum(4 * p.numel() for p in model.parameters())
    assert memory(1, ORIGINAL) == memory(1, AGAIN) > weights
    assert memory(1, FUSED) == memory(1, BOUND) < memory(1, ORIGINAL)
    assert memory(1, FUSED) < memory(4, FUSED)


def test_moved_weights_lie_elsewhere_and_are_the_same(tmp_path):
    model = family("vit").to(memory_format=torch.channels_last)
    run = prepare("eager", model, images(model), tmp_path)
    with torch.no_grad():
        before, places = run.step(), [(p.data_ptr(), p.stride()) for p in model.parameters()]
        run.move()
        after = [(p.data_ptr(), p.stride()) for p in model.parameters()]
        assert torch.equal(run.step(), before)
    assert all(old != new for (old, _), (new, _) in zip(places, after, strict=True))
    assert [stride for _, stride in places] == [stride for _, stride in after]


@pytest.mark.parametrize("held", [1, 3])
def test_the_peak_is_what_is_held_at_once(held):
    def step() -> None:
        for _ in range(2):
            kept = [torch.empty(2**20) for _ in range(held)]
            del kept

    assert _activations(step, torch.device("cpu")) == held * 4 * 2**20


def test_onnxruntime_gives_the_models_answers(tmp_path):
    pytest.importorskip("onnxruntime")
    model = family("vit")
    pixels = images(model, 3)
    with torch.no_grad():
        run = prepare("onnxruntime", model, pixels, tmp_path)
        for _ in range(2):
            assert torch.allclose(torch.as_tensor(run.step()), model(pixels), atol=FOLD_FLOAT32)
            run.move()
    assert run.peak_memory() is None


def test_an_engine_that_cannot_run_is_left_out_or_said():
    model = family("vit")
    options = {"batch_sizes": [1], "engines": ["eager", "onnxruntime"], "rounds": 3, "amp_dtype": torch.bfloat16}
    result = benchmark_models(model, fused_of(model), optional=["onnxruntime"], **options)
    assert result.cases() == [("eager", 1)]
    assert result.notes == ["onnxruntime: not measured: ONNX Runtime is measured in float32 only"]
    assert result.lines()[-1:] == result.notes
    with pytest.raises(normswap.BenchmarkError, match="float32 only"):
        benchmark_models(model, fused_of(model), **options)


def test_precision_and_layout_are_those_asked_for():
    model, seen = family("vit"), []
    fused = fused_of(model)
    for m in (model, fused):
        m.register_forward_pre_hook(
            lambda module, inputs: seen.append(
                (inputs[0].dtype, module.head.weight.dtype, inputs[0].is_contiguous(memory_format=torch.channels_last))
            )
        )
    result = benchmark_models(model, fused, rounds=3, dtype=torch.bfloat16, channels_last=True)
    assert set(seen) == {(torch.bfloat16, torch.bfloat16, True)}
    assert result.rows()[0]["precision"] == "bfloat16"
    assert model.head.weight.dtype == torch.float32


def test_a_case_is_timed_alone_and_prepared_before(monkeypatch):
    said: list[str] = []

    @contextmanager
    def alone():
        said.append("in")
        yield
        said.append("out")

    prepare, turns = benchmark.prepare, benchmark.take_turns
    monkeypatch.setattr(benchmark, "prepare", lambda *a: said.append("prepare") or prepare(*a))
    monkeypatch.setattr(benchmark, "take_turns", lambda *a: said.append("turns") or turns(*a))
    benchmark_models(family("vit"), batch_sizes=[1, 2], rounds=3, alone=alone)
    case = ["prepare"] * len(VARIANTS) + ["in"] + ["turns"] * len(VARIANTS) + ["out"]
    assert said == 2 * case


def test_memory_that_runs_out_while_warming_up_is_one_line(monkeypatch):
    def out_of_memory(step, clock):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(benchmark, "warm_up", out_of_memory)
    with pytest.raises(
        normswap.BenchmarkError, match=r"^original, warming up: cannot be run: OutOfMemoryError: CUDA out"
    ):
        benchmark_models(family("vit"), rounds=3)


@pytest.mark.slow
def test_compiled_models_are_timed():
    model = timm.create_model("vit_tiny_patch16_224", img_size=32, embed_dim=24, depth=1, num_heads=2).eval()
    result = benchmark_models(model, engines=["compile"], rounds=3)
    assert result.cases() == [("compile", 1)]
    assert all(t.peak_memory for t in result.timings)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_gpu_is_timed():
    model = family("vit")
    result = benchmark_models(model, batch_sizes=[1, 4], engines=["eager", "compile"], rounds=3, device="cuda")
    assert len(result.timings) == 4 * len(VARIANTS)
    assert result.settings["clock"] == "cuda events"
    assert next(model.parameters()).device.type == "cpu"
    assert all(t.peak_memory > 0 for t in result.timings)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"batch_sizes": []}, "batch sizes"),
        ({"batch_sizes": [0]}, "batch sizes"),
        ({"rounds": 2}, "at least 3"),
        ({"engines": ["jit"]}, f"engines are {', '.join(ENGINES)}, not jit"),
        ({"engines": []}, "not none"),
        ({"clock": "sun"}, "must be one of wall, cpu"),
        ({"device": "meta"}, "only cpu and cuda"),
    ],
)
def test_arguments_that_cannot_be_meant(arguments, words):
    with pytest.raises(normswap.ArgumentError, match=words):
        benchmark_models(family("vit"), **arguments)


def _denormals_are_zero() -> bool:
    return float(torch.full((1,), 1e-310, dtype=torch.float64).mul(1.0)) == 0


@pytest.mark.parametrize("given", [True, False])
def test_images_that_are_given_are_used_as_they_are(monkeypatch, given):
    """Random ones may drive a converted model to denormal numbers, whose cost no real image has."""
    model, seen = family("vit"), []
    own = images(model, 3, seed=7)

    def watched(engine, variant, batch, *settings):
        seen.append((batch, _denormals_are_zero(), settings[-1]))
        return prepare(engine, variant, batch, *settings)

    monkeypatch.setattr(sys.modules["normswap.benchmarking.benchmark"], "prepare", watched)
    before = _denormals_are_zero()
    batches = iter([own[:2], (own[2:], None)]) if given else None
    done = benchmark_models(model, fused_of(model), images=batches, batch_sizes=[2, 5], rounds=3)
    assert len(seen) == 2 * len(VARIANTS)
    for i, (batch, zero, flush) in enumerate(seen):
        size = [2, 5][i // len(VARIANTS)]
        assert len(batch) == size
        assert torch.equal(batch, own[torch.tensor([0, 1, 2, 0, 1])[:size]]) is given
        assert zero is flush is not given
    assert _denormals_are_zero() is before
    assert done.settings["images"] == ("3 images" if given else "random")


def test_no_images_to_run_on():
    with pytest.raises(normswap.ArgumentError, match="no images"):
        benchmark_models(family("vit"), images=[], rounds=3)


def test_the_command_line_takes_images(tmp_path):
    result = run(*CLI, "-b", "1,4", "--data-dir", FOLDER, "--split", "train", "--no-onnxruntime", "--json")
    assert result.exit_code == 0, result.stderr
    assert one_object(result)["settings"]["images"] == "4 of 320 images of demo/train.tar, seed 42"


def test_models_with_other_answers_are_refused():
    with pytest.raises(normswap.ArgumentError, match="different shapes"):
        benchmark_models(family("vit"), family("headless"), rounds=3)


def test_command_line(tmp_path):
    out = tmp_path / "new" / "speed.csv"
    result = run(*CLI, "-b", 1, "-b", "2,1", "--clock", "cpu", "--no-onnxruntime", "--csv", out, "--json")
    assert result.exit_code == 0, result.stderr
    record = one_object(result)
    assert record["model"] == MODEL
    assert [(r["infer_batch_size"], r["variant"]) for r in record["results"]] == [
        (b, v) for b in (1, 2) for v in VARIANTS
    ]
    with open(out, newline="") as file:
        rows = list(csv.DictReader(file))
    assert [float(r["infer_step_time"]) for r in rows] == [r["infer_step_time"] for r in record["results"]]
    assert {*rows[0]} == {*record["results"][0]} - {"infer_step_times"}
    assert [p.name for p in out.parent.iterdir()] == ["speed.csv"]
    assert result.stderr.count("5 % more") == 1
    assert "eager, batch 2: fused" in result.stderr


def test_command_line_against_a_converted_folder(tmp_path):
    model = normswap.load_model(MODEL)
    batch = torch.randn(8, *timm.models.get_model_input_config(model)["input_size"])
    normswap.convert(
        model,
        [batch],
        calibration=normswap.CalibrationOptions(method="channel"),
        evaluation=normswap.EvaluationOptions(atol=1.0),
    ).save(tmp_path / "out")
    out = f"local-dir:{tmp_path / 'out'}"
    result = run(*CLI, "-b", 1, "--against", out, "--no-onnxruntime")
    assert result.exit_code == 0, result.stderr
    assert "norm-free" in result.stdout
    assert "normswap convert" not in result.stderr
    refused = run("benchmark", "-m", out)
    assert refused.exit_code == 2
    assert "is converted already" in refused.stderr.splitlines()[-1]


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (("-b", "1,x"), 2, "whole numbers"),
        (("-b", "0"), 2, "whole numbers"),
        (("--rounds", 2), 2, "2 is not in the range"),
        (("--threads", 2, "--clock", "cpu"), 2, "one thread"),
        (("--against", "local-dir:/no/such"), 2, "no such folder"),
        (("--csv", f"{__file__}/speed.csv"), 1, "is not a folder"),
        (("--amp", "--onnxruntime", "-b", 1), 1, "float32 only"),
    ],
)
def test_command_line_errors_are_one_line(arguments, code, words):
    result = run(*CLI, *arguments)
    assert result.exit_code == code, result.stderr
    assert words in result.stderr.splitlines()[-1]
    assert not result.stdout


def test_random_weights_only_where_asked_for():
    with pytest.raises(normswap.ArgumentError, match="which weights"):
        normswap.load_model("test_vit")
    assert isinstance(normswap.load_model("test_vit", random_weights=True), nn.Module)
