"""What was done and what it cost: one record per step, as a table or as JSON.

Accuracy and agreement are in percent, as timm prints them; times in seconds; divergences in nats.
"""

from dataclasses import asdict, dataclass, field
from typing import Any

from .budget import BudgetRecord
from .json_types import plain
from .provenance import versions
from .stress import StressRecord
from .worst_images import WorstImage

# What loads an output folder: timm alone; normswap, on its own; normswap, into a model that the caller has.
LOAD_WITH = ("timm.create_model", "normswap.load", "normswap.load_into")


@dataclass(frozen=True)
class StageMetrics:
    """One model measured on one set of images.

    Attributes:
        name: original, swapped, calibrated, fused, ... or the model's name.
        n: how many images.
        top1: percent of images whose label is the highest logit; None without labels.
        top5: percent of images whose label is among the five highest; None without labels.
        agreement: percent of images where the highest logit is the original's; None for headless models.
        kl: mean over images of KL(original || model) of the softmax, in nats; None for headless models.
        worst_kl: the largest of them; infinite if a logit is not finite.
        cosine: mean cosine similarity of the output vector with the original's.
        non_finite: number of images with a NaN or infinite output.
    """

    name: str
    n: int
    top1: float | None
    top5: float | None
    agreement: float | None
    kl: float | None
    worst_kl: float | None
    cosine: float
    non_finite: int

    def accuracy_line(self) -> str | None:
        """Return the line timm's validate.py prints, None without labels."""
        if self.top1 is None or self.top5 is None:
            return None
        return f" * Acc@1 {self.top1:.3f} ({100 - self.top1:.3f}) Acc@5 {self.top5:.3f} ({100 - self.top5:.3f})"


@dataclass(frozen=True)
class SiteFit:
    """How well one calibrated norm reproduces the LayerNorm it stands for.

    Attributes:
        site: module path.
        samples: how many tokens were seen.
        r2: share of the variance of the LayerNorm's output on the same input that the BatchNorm explains, at most 1.
        r2_original: the same for what the original model has there: what is left after the drift of all sites before.
        r2_patch, r2_prefix: r2 of patch and of prefix tokens, both about the mean over all; None where there are none.
        bound: the name of the bound on what arrives at the norm.
    """

    site: str
    samples: int
    r2: float
    r2_original: float
    r2_patch: float | None = None
    r2_prefix: float | None = None
    bound: str = "none"


@dataclass(frozen=True)
class LayerFit:
    """How well one re-solved linear layer gives the original's activations.

    Attributes:
        layer: module path.
        role: "reader" of a norm, or "writer" to the residual stream.
        samples: how many rows (tokens, patches) were seen.
        r2_before: share of the wanted output's variance explained with the weights it had.
        r2: the same with the weights it has now; both on all images.
        penalty: relative ridge penalty, chosen on images held out; None if the layer keeps its weights.
        refined: what gradient steps left of the held-out error at the end of the branch; 1 where they were not
            needed or did not help.
        reason: why it keeps its weights; empty otherwise.
        inputs: how many it has; a writer with fewer than 10 rows for each can make other images blow up.
    """

    layer: str
    role: str
    samples: int
    r2_before: float | None = None
    r2: float | None = None
    penalty: float | None = None
    refined: float = 1.0
    reason: str = ""
    inputs: int = 0


@dataclass(frozen=True)
class StreamError:
    """How far the residual stream is from the original's where a layer has written to it.

    Each number is the mean over tokens of |converted - original| / |original - its mean over channels|. Measured on
    the first batches only.

    Attributes:
        after: the layer that wrote.
        patch_before, prefix_before: with the weights the layer had, for patch and for prefix tokens (class and
            register tokens); None where a model has none.
        patch, prefix: with the weights it has now.
    """

    after: str
    patch_before: float
    patch: float
    prefix_before: float | None = None
    prefix: float | None = None


@dataclass
class Calibration:
    """What `calibrate` found out.

    Attributes:
        sites: one entry per norm, in execution order.
        layers: one entry per layer around the norms that could be re-solved; empty for methods that do not.
        stream: the residual stream's error after each writer.
        refine_steps: gradient steps meant for every attention; None for methods without.
    """

    sites: list[SiteFit] = field(default_factory=list)
    layers: list[LayerFit] = field(default_factory=list)
    stream: list[StreamError] = field(default_factory=list)
    refine_steps: int | None = None


@dataclass(frozen=True)
class Finetuning:
    """What `finetune` did.

    Attributes:
        options: every option, as text.
        images, held_out: how many were trained on, and how many measured the rest.
        steps: how many were tried; ``dropped`` of them gave numbers that were not finite.
        loss_first, loss_last: mean training loss of the first and of the last tenth of the steps.
        kl_before, kl_after: mean KL (or relative squared error, without classes) from the original, images held out.
        kl_gain_error: standard error of the mean of kl_before - kl_after over these images.
        agreement_before, agreement_after: percent of them with the original's answer.
        taken: False if it was not closer by two standard errors, and got its old weights back.
        seconds: wall time of the training, since the last start.
        resumed_at: step from which it went on after an interruption; None without one.
    """

    options: dict[str, str]
    images: int
    held_out: int
    steps: int
    dropped: int
    loss_first: float | None
    loss_last: float | None
    kl_before: float
    kl_after: float
    kl_gain_error: float
    agreement_before: float | None
    agreement_after: float | None
    taken: bool
    seconds: float
    resumed_at: int | None = None

    def line(self) -> str:
        """Return what it did in one line."""
        same = ""
        if self.agreement_before is not None and self.agreement_after is not None:
            same = f", top-1 agreement {self.agreement_before:.1f} to {self.agreement_after:.1f} %"
        end = "" if self.taken else "; no sure gain, so the weights before it stay"
        steps = f"{self.steps} steps" + (f" ({self.dropped} dropped)" if self.dropped else "")
        steps += "" if self.resumed_at is None else f", resumed at step {self.resumed_at},"
        kl = f"KL {self.kl_before:.4f} to {self.kl_after:.4f} (+-{self.kl_gain_error:.4f})"
        return f"{steps} in {self.seconds:.0f} s; {kl}{same} on {self.held_out} images held out{end}"


@dataclass
class ConversionReport:
    """Everything `convert` found out; `to_json` is what ``--json`` prints and normswap.json keeps.

    About the fold, fused against unfused: ``fold_max_abs_err`` is the largest difference of an output,
    ``fold_max_rel_err`` the same relative to the root mean square of the outputs, ``fold_float64_err`` that relative
    difference where both run in float64 (None where they cannot), ``fold_agreement`` the percentage of images with the
    same answer (None for headless models), and ``fold_warning`` says if rounding moved outputs more than usual.

    About the folder: ``load_with`` is one of `LOAD_WITH`, ``stock_timm`` why it is not the first, and ``read_back_err``
    the largest difference of an output after it was read back.
    """

    model: str
    architecture: str
    method: str
    ffn_bn: str
    calib_samples: int
    sites: dict[str, int]
    plan: list[dict[str, Any]]
    ffns: list[dict[str, Any]]
    calibration_data: str
    evaluation_data: str
    reconstruct: str | None = None
    refine_steps: int | None = None
    views: float = 0.0
    bound: str = "none"
    out: str | None = None
    fits: list[SiteFit] = field(default_factory=list)
    layers: list[LayerFit] = field(default_factory=list)
    stream: list[StreamError] = field(default_factory=list)
    finetuning: Finetuning | None = None
    budget: BudgetRecord | None = None
    stages: list[StageMetrics] = field(default_factory=list)
    fold_max_abs_err: float | None = None
    created_biases: list[str] = field(default_factory=list)
    stock_timm: str | None = None
    worst: list[WorstImage] = field(default_factory=list)
    stress: StressRecord | None = None
    overlap: int | None = None  # evaluation images that were calibrated or trained on too; None if not known
    skipped_images: list[str] = field(default_factory=list)
    seconds: dict[str, float] = field(default_factory=dict)
    versions: dict[str, str] = field(default_factory=versions)
    fold_max_rel_err: float | None = None
    fold_float64_err: float | None = None
    fold_agreement: float | None = None
    fold_warning: str | None = None
    load_with: str | None = None
    bounded: bool = False  # whether the folder has bounds
    read_back_err: float | None = None

    @property
    def top1_drop(self) -> float | None:
        """Top-1 of the original minus top-1 of the last stage, in points; None without labels."""
        if not self.stages or self.stages[0].top1 is None or self.stages[-1].top1 is None:
            return None
        return self.stages[0].top1 - self.stages[-1].top1

    @property
    def stayed(self) -> dict[str, str]:
        """Why each LayerNorm that is still there is there, by module path."""
        return {site["path"]: site["reason"] for site in self.plan if site["verdict"] == "keep"}

    @property
    def calibration_passes(self) -> float | None:
        """What calibration cost, in plain forward passes of the original over the images without their copies."""
        calibrate, forward = self.seconds.get("calibrate"), self.seconds.get("forward_pass")
        return calibrate / forward if calibrate is not None and forward else None

    def to_json(self) -> dict[str, Any]:
        """Return plain JSON types; the keys are a contract and only grow."""
        record = asdict(self)
        first, last = (self.stages[0], self.stages[-1]) if self.stages else (None, None)
        record["before"] = _accuracy(first)
        record["after"] = _accuracy(last)
        record["agreement"] = last.agreement if last else None
        record["kl"] = last.kl if last else None
        record["kept"] = list(self.stayed)
        record["non_finite"] = last.non_finite if last else 0
        record["calibration_passes"] = self.calibration_passes
        record["stress"] = None if self.stress is None else self.stress.to_json()
        return plain(record)


def _accuracy(stage: StageMetrics | None) -> dict[str, Any]:
    if stage is None:
        return {"top1": None, "top5": None, "n": 0}
    return {"top1": stage.top1, "top5": stage.top5, "n": stage.n}
