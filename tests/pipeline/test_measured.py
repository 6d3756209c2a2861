"""What a conversion measures on all images, and what on a part of them; how it knows the pixels of its images."""

import pytest
import torch

import normswap
from normswap import CalibrationOptions, FinetuneOptions
from normswap.demo import FOLDER, MODEL
from normswap.inputs.normalisation import NormalisationError

from ..cli.test_cli import DEMO, one_object, run

CHANNEL = CalibrationOptions(method="channel")


@pytest.fixture(scope="module")
def model():
    return normswap.load_model(MODEL)


def test_stages_between_see_a_part_of_the_images(model, monkeypatch):
    monkeypatch.setattr("normswap.evaluation.evaluate.BRIEF", 8)
    folded_on = []

    def counted(unfused, fused, batches, verdicts, of=normswap.pipeline.steps.FoldCheck.of):
        folded_on.append(sum(map(len, batches)))
        return of(unfused, fused, batches, verdicts)

    monkeypatch.setattr("normswap.pipeline.steps.FOLD_IMAGES", 16)
    monkeypatch.setattr("normswap.pipeline.steps.FoldCheck.of", counted)
    images = normswap.load_images(model, FOLDER, "train").draw(40, 0)
    report = normswap.convert(model, images, calibration=CHANNEL).report
    assert [(stage.name, stage.n) for stage in report.stages] == [
        ("original", 40),
        ("swapped", 8),
        ("calibrated", 8),
        ("fused", 40),
    ]
    assert folded_on == [16]


def test_training_knows_how_a_set_was_normalised(model):
    """Also where a control makes a list of it, and refuses what cannot be corrupted before it calibrates."""
    images = normswap.load_images(model, FOLDER, "train", mean=(0.4,), std=(0.3,)).draw(40, 0)
    options = FinetuneOptions(batch_size=12, views=0.5, labels=1.0)
    stage = normswap.FinetuneStage(options, control=True)
    report = normswap.convert(model, images, calibration=CHANNEL, finetune=stage).report
    assert report.finetuning.options["views"] == "0.5"
    seen = []
    with pytest.raises(NormalisationError, match="not from 0 to 1"):
        normswap.convert(
            model,
            [9 * torch.randn(20, 3, 32, 32)],
            calibration=CHANNEL,
            finetune=FinetuneOptions(batch_size=6, views=0.5),
            progress=lambda *said: seen.append(said[0]),
        )
    assert not any("calibrate" in said for said in seen)


def test_the_command_line_passes_the_share_on(tmp_path):
    flags = ["--finetune-epochs", "1", "--finetune-views", "0.25", "--method", "channel", "--calib-samples", "60"]
    result = run("convert", *DEMO, *flags, "--eval-samples", "20", "--json", "-o", str(tmp_path / "out"))
    assert one_object(result)["finetuning"]["options"]["views"] == "0.25"
