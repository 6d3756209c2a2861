"""A swapped checkpoint and back: to the bit, with what calibration and the plan did to it, and on to a fused one."""

import json
import shutil

import pytest
import timm
import torch

import normswap
from normswap import ArgumentError, CheckFailedError, CheckpointError, convert, fuse, load_swapped, save_swapped
from normswap.demo import FOLDER, MODEL
from normswap.surgery.swap import batch_norms

from ..cli.test_cli import DEMO, IMAGES, one_object, run
from ..models import family, images, randomise_statistics, randomised, with_timm
from ..tolerance import FOLD_FLOAT32

# The families that differ in what a checkpoint has to carry; built with a class as an argument, none can be saved.
_FAMILIES = ("vit", "clip", "qk_norm_no_bias", "headless", "dinov2_registers", "relpos")


QUICK = normswap.CalibrationOptions(refine_steps=1)


def _written(tmp_path, model: torch.nn.Module, **arguments: object):
    result = convert(model, [images(model, 6)], calibration=QUICK, **arguments)  # the statistics are random anyway
    randomise_statistics(result.swapped)
    result.save_swapped(tmp_path / "swapped")
    return result, load_swapped(tmp_path / "swapped")


@pytest.mark.parametrize(
    ("name", "ffn_bn"), [*((name, "pre-act") for name in _FAMILIES), ("vit", "post-act"), ("relpos", "post-act")]
)
def test_round_trip(tmp_path, name, ffn_bn):
    model = family(name)
    result, loaded = _written(
        tmp_path,
        model,
        ffn_bn=ffn_bn,
        plan=normswap.make_plan(model, ["blocks.1.norm2"] if name != "relpos" else []),
    )
    x = images(model, 3, seed=9)
    with torch.no_grad():
        expected = result.swapped.eval()(x)
        assert torch.equal(loaded.model(x), expected)
        assert not torch.allclose(expected, model(x))
    assert list(batch_norms(loaded.model)) == list(batch_norms(result.swapped))
    assert loaded.plan == result.plan
    assert loaded.report.to_json() == json.loads(json.dumps(result.report.to_json()))
    assert sorted(path.name for path in (tmp_path / "swapped").iterdir()) == [
        "config.json",
        "swapped.json",
        "swapped.safetensors",
    ]


def test_layers_that_build_their_bias(tmp_path):
    model = randomised(
        timm.create_model("beit_base_patch16_224", img_size=32, embed_dim=48, num_heads=3, depth=2)
    ).eval()
    result, loaded = _written(tmp_path, model)
    x = images(model, 3, seed=9)
    with torch.no_grad():
        assert torch.equal(loaded.model(x), result.swapped.eval()(x))


def test_it_folds_as_it_would_have(tmp_path):
    model = family("vit")
    result = convert(model, [images(model, 6)], calibration=QUICK)
    result.save_swapped(tmp_path / "swapped")
    again = fuse(load_swapped(tmp_path / "swapped"))
    for name, tensor in result.model.state_dict().items():
        assert torch.equal(again.model.state_dict()[name], tensor), name
    again.save(tmp_path / "out")
    x = images(model, 3, seed=9)
    with torch.no_grad():
        assert torch.equal(normswap.load(tmp_path / "out")(x), result.model(x))
    assert 0 < again.report.fold_max_abs_err < FOLD_FLOAT32
    assert again.report.stages == result.report.stages


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """A small model, what became of it, and the folder of its swapped checkpoint, for tests that only read it."""
    torch.manual_seed(0)
    model, folder = family("vit"), tmp_path_factory.mktemp("written")
    result, _ = _written(folder, model)
    return model, result, folder / "swapped"


def test_it_measures_on_images(written):
    model, _, folder = written
    loaded = load_swapped(folder)
    x = images(model, 6, seed=4)
    found = fuse(loaded, iter([x]), original=model, evaluation=normswap.EvaluationOptions(atol=1.0))
    assert [stage.name for stage in found.report.stages] == ["original", "swapped", "fused"]
    assert all(stage.n == 6 for stage in found.report.stages)
    assert found.report.stages[1].kl > 0.01  # random statistics
    with pytest.raises(CheckFailedError, match=r"^fused and unfused differ by .* more than `atol` 0") as error:
        fuse(load_swapped(folder), [x], evaluation=normswap.EvaluationOptions(atol=0.0))
    assert error.value.report.fold_max_abs_err > 0


def test_eps_comes_along(tmp_path):
    model = family("vit")
    for module in model.modules():
        if isinstance(module, torch.nn.LayerNorm):
            module.eps = 0.3
    result, loaded = _written(tmp_path, model, plan=normswap.make_plan(model, keep=["norm"]))
    x = images(model, 3, seed=9)
    with torch.no_grad():
        assert torch.equal(loaded.model(x), result.swapped.eval()(x))
    assert loaded.model.norm.eps == 0.3


def _break_weights(folder):
    path = folder / "swapped.safetensors"
    path.write_bytes(path.read_bytes()[:-100])


def _break_record(folder):
    (folder / "swapped.json").write_text("{")


def _other_format(folder):
    record = json.loads((folder / "swapped.json").read_text())
    (folder / "swapped.json").write_text(json.dumps(record | {"format": 99}))


def _other_verdicts(folder):
    record = json.loads((folder / "swapped.json").read_text())
    record["verdicts"][0][1] = "affine"
    (folder / "swapped.json").write_text(json.dumps(record))


def _other_weights(folder):
    other = family("qk_norm")
    swapped = normswap.swap_norms(other)
    save_swapped(
        folder / "other", normswap.Swapped(swapped, other, normswap.make_plan(other), load_swapped(folder).report)
    )
    (folder / "other" / "swapped.safetensors").rename(folder / "swapped.safetensors")


@pytest.mark.parametrize(
    ("damage", "text"),
    [
        (_break_weights, "cannot be rebuilt from its files .* truncated"),
        (_break_record, "cannot be rebuilt from its files"),
        (_other_format, "format 99; this normswap reads format 1"),
        (_other_verdicts, "plans this architecture otherwise: convert again"),
        (_other_weights, r"swapped\.safetensors: does not fit the model: .* unexpected"),
    ],
)
def test_damaged_folders(written, tmp_path, damage, text):
    shutil.copytree(written[2], tmp_path / "swapped")
    damage(tmp_path / "swapped")
    with pytest.raises(CheckpointError, match=text):
        load_swapped(tmp_path / "swapped")


def test_the_two_kinds_of_folder_are_told_apart(written, tmp_path):
    _, result, folder = written
    result.save(tmp_path / "out")
    with pytest.raises(ArgumentError, match=r"no swapped\.json in it.*it is fused already$"):
        load_swapped(tmp_path / "out")
    with pytest.raises(ArgumentError, match=r"no normswap\.json in it"):
        normswap.load(folder)


@pytest.fixture(scope="module")
def swapped(tmp_path_factory):
    folder = tmp_path_factory.mktemp("swapped")
    command = ("convert", *DEMO, "--method", "channel", "-o", folder / "out", "--save-swapped", folder / "swapped")
    result = run(*command)
    assert result.exit_code == 0, result.stderr
    return folder / "swapped"


def test_the_road_on_the_command_line(swapped, tmp_path):
    flags = ("--epochs", 2, "--samples", 160, "--lr", "1e-3", "--bn-mode", "train", "--train-batch-size", 24)
    tuned = run("finetune", "-m", swapped, *IMAGES, *flags, "-o", tmp_path / "tuned", "--json")
    assert tuned.exit_code == 0, tuned.stderr
    record = one_object(tuned)
    assert [stage["name"] for stage in record["stages"]] == ["original", "calibrated", "finetuned"]
    assert record["finetuning"]["taken"]
    assert record["stages"][2]["kl"] < record["stages"][1]["kl"]
    assert f"normswap fuse -m {tmp_path / 'tuned'}" in tuned.stderr

    fused = run("fuse", "-m", tmp_path / "tuned", *IMAGES, "-o", tmp_path / "out", "--json")
    assert fused.exit_code == 0, fused.stderr
    after = one_object(fused)
    assert [stage["name"] for stage in after["stages"]] == ["original", "swapped", "fused"]
    assert after["stages"][2]["kl"] == pytest.approx(record["stages"][2]["kl"], abs=FOLD_FLOAT32)
    assert after["finetuning"] == record["finetuning"]
    assert "- fine-tuned on 144 images, without labels: " in (tmp_path / "out" / "README.md").read_text()
    out = with_timm(tmp_path / "out")
    assert not any(isinstance(module, torch.nn.LayerNorm) for module in out.modules())


def test_a_second_fine_tuning_says_what_it_started_from(swapped, tmp_path):
    flags = (*IMAGES, "--samples", 64, "--train-batch-size", 24)
    run("finetune", "-m", swapped, *flags, "-o", tmp_path / "once")
    result = run("finetune", "-m", tmp_path / "once", *flags, "-o", tmp_path / "twice", "--json")
    assert result.exit_code == 0, result.stderr
    assert [stage["name"] for stage in one_object(result)["stages"]] == ["original", "finetuned before", "finetuned"]


def test_without_images_the_fold_is_checked_on_random_ones(swapped, tmp_path):
    result = run("fuse", "-m", swapped, "-o", tmp_path / "out")
    assert result.exit_code == 0, result.stderr
    assert "compared on random ones" in result.stderr
    failed = run("fuse", "-m", swapped, "-o", tmp_path / "other", "--atol", 0, "--json")
    assert failed.exit_code == 4
    assert one_object(failed)["fold_max_abs_err"] > 0
    assert not (tmp_path / "other").exists()


@pytest.mark.parametrize(
    ("arguments", "code", "text"),
    [
        (("--against", "vit_tiny_patch16_224"), 2, "weights are missing"),
        (("--against", "local-dir:/nowhere"), 2, "/nowhere"),
        (("--epochs", 1, "--resume"), 2, "--resume needs the state"),
        (("--samples", 3, "--train-batch-size", 24), 2, "fewer than one step takes"),
    ],
)
def test_bad_input(swapped, tmp_path, arguments, code, text):
    result = run("finetune", "-m", swapped, *IMAGES, "-o", tmp_path / "out", *arguments)
    assert result.exit_code == code, result.stderr
    assert text in result.stderr
    assert result.stderr.count("Error") == 1
    assert not (tmp_path / "out").exists()


def test_folders_in_the_way(swapped, tmp_path):
    onto_itself = run("fuse", "-m", swapped, "-o", swapped, "--overwrite")
    assert onto_itself.exit_code == 2
    assert "would be lost" in onto_itself.stderr
    for out, beside in (("x", "x"), ("x/y", "x"), ("x", "x/y")):  # one would replace, or hold, the other
        result = run("convert", *DEMO, "-o", tmp_path / out, "--save-swapped", tmp_path / beside, "--overwrite")
        assert result.exit_code == 2
        assert "a folder of its own" in result.stderr
    original = run("fuse", "-m", FOLDER, "-o", tmp_path / "y")
    assert original.exit_code == 2
    assert "no swapped.json" in original.stderr
    assert MODEL.endswith(str(FOLDER))


@pytest.fixture(scope="module")
def of_a_folder(tmp_path_factory):
    """An original in a folder of its own, and its swapped checkpoint."""
    folder = tmp_path_factory.mktemp("own")
    shutil.copytree(FOLDER, folder / "original")
    flags = ("-m", f"local-dir:{folder / 'original'}", *DEMO[2:], "--method", "channel", "-o", folder / "out")
    made = run("convert", *flags, "--save-swapped", folder / "swapped")
    assert made.exit_code == 0, made.stderr
    return folder / "original", folder / "swapped"


def test_the_original_is_never_replaced(of_a_folder):
    copied, swapped = of_a_folder
    before = sorted(path.name for path in copied.iterdir())
    for command in (("fuse",), ("finetune", *IMAGES)):
        result = run(*command, "-m", swapped, "-o", copied, "--overwrite")
        assert result.exit_code == 2
        assert "would be lost" in result.stderr
    assert sorted(path.name for path in copied.iterdir()) == before


def test_an_original_that_moved_away(of_a_folder, tmp_path):
    copied, swapped = of_a_folder
    moved = copied.rename(tmp_path / "elsewhere")
    try:
        lost = run("finetune", "-m", swapped, *IMAGES, "-o", tmp_path / "tuned")
    finally:
        moved.rename(copied)
    assert lost.exit_code == 2
    assert lost.stderr.splitlines()[-1].endswith("if it has moved, give its place with --against")


def test_no_other_command_takes_it_for_a_model(swapped):
    result = run("evaluate", "-m", f"local-dir:{swapped}", *IMAGES)
    assert result.exit_code == 2
    assert "fold it first, with normswap fuse" in result.stderr


def test_preprocessing_comes_along(tmp_path):
    crop = ("--crop-pct", 0.5, "--interpolation", "nearest")
    run("convert", *DEMO, *crop, "--method", "channel", "-o", tmp_path / "out", "--save-swapped", tmp_path / "swapped")
    run(
        "finetune", "-m", tmp_path / "swapped", *IMAGES, "--samples", 64, "--train-batch-size", 24, "-o", tmp_path / "t"
    )
    for folder in ("swapped", "t"):
        config = json.loads((tmp_path / folder / "config.json").read_text())["pretrained_cfg"]
        assert (config["crop_pct"], config["interpolation"]) == (0.5, "nearest")


def test_labels_are_missed_before_calibration(tmp_path):
    flags = ("--finetune-epochs", 1, "--label-weight", 1, "--no-labels")
    result = run("convert", *DEMO, *flags, "-o", tmp_path / "out")
    assert result.exit_code == 2
    assert "--label-weight needs labels" in result.stderr
    assert "calibrate" not in result.stderr


def test_a_budget_is_judged_again_after_fine_tuning_and_fold(tmp_path):
    """Met by the conversion; what is fused afterwards is another model, and its record must not say so."""
    budget = ("--min-agreement", 1, "--max-keep", 1)
    command = ("convert", *DEMO, *budget, "--refine-steps", 2, "-o", tmp_path / "out", "--json")
    made = run(*command, "--save-swapped", tmp_path / "swapped")
    assert one_object(made)["budget"]["met"] is True
    for missed in (False, True):
        loaded = load_swapped(tmp_path / "swapped")
        original = normswap.load_model(MODEL)
        batches = list(normswap.load_images(original, FOLDER, "train").draw(32, 0))
        if missed:
            loaded.report.budget.min_agreement = 99.9
            randomise_statistics(loaded.model)
        normswap.finetune_swapped(loaded, original, batches, normswap.FinetuneOptions(batch_size=16))
        assert loaded.report.budget.met is not missed
        loaded.report.budget.met = missed
        assert (
            fuse(loaded, batches, original=original, evaluation=normswap.EvaluationOptions(atol=1.0)).report.budget.met
            is not missed
        )


def test_images_that_calibration_saw_are_no_judges(swapped, tmp_path):
    """The converted demo saw 32 images; with all 320 to train on, none of the rest is held out that it saw."""
    flags = (*IMAGES, "--train-batch-size", 24, "-o", tmp_path / "tuned")
    clean = run("finetune", "-m", swapped, *flags)
    assert clean.exit_code == 0, clean.stderr
    assert "optimistic" not in clean.stderr
    all_of_them = ("-m", MODEL, *IMAGES, "--calib-samples", 320, "--method", "channel")
    run("convert", *all_of_them, "-o", tmp_path / "out", "--save-swapped", tmp_path / "swapped")
    told = run("finetune", "-m", tmp_path / "swapped", *flags, "--overwrite")
    assert told.exit_code == 0, told.stderr
    assert "held-out images were also used for calibration" in told.stderr
