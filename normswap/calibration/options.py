"""How to calibrate: every choice in one place. Imports no torch, so that the command line can read it."""

from dataclasses import dataclass

from ..errors import ArgumentError

METHODS = ("reconstruct", "channel", "moments")
RECONSTRUCT = ("all", "readers")
BOUNDS = ("none", "wide", "tight")
SHARE = 0.5  # corrupted copies for each calibration image, where nothing is said about it
AUTO = "auto"  # one of the bounds for each norm


@dataclass(frozen=True)
class CalibrationOptions:
    """How to calibrate.

    Attributes:
        method: "reconstruct" fits every BatchNorm by least squares per channel and re-solves the layers around it,
            "channel" does the first only, "moments" takes mean and variance and keeps LayerNorm's weight and bias.
        reconstruct: "all" re-solves the layers that read a norm and those that write to the residual stream,
            "readers" the first only. Other methods do not look at it.
        refine_steps: gradient steps, of 32 images each and their views, for what every attention reads, where writers
            are re-solved too; 0 for none. Default: one on every batch that is fitted to, but at least 28. More of them
            bring the outputs nearer to the original's and cost time, see docs/calibration.md.
        memory_budget: bytes that activations at rest may take in memory, the rest goes to disk; default: half of
            what is free. On a GPU as many may stay there, up to half of what is free there.
        views: so many copies of each calibration image are added, 0 to 1, each with one random corruption (noise, blur,
            brightness, contrast and so on). They make the converted model hold on images unlike the calibration images,
            see docs/robustness.md. Default: 0.5 for "reconstruct", if there are 100 images and they are pixels in 0..1
            once their normalisation is undone; else 0.
        bound: what a channel may be where a LayerNorm was: "tight" is the range of 99 % of its values on the
            calibration images, class and patch tokens apart, "wide" that of 99.95 %, "none" anything. "auto" is, for
            each norm, the tightest that hardly adds to its error on images held out, and "none" for "moments".

    >>> CalibrationOptions(method="channel").check()
    >>> CalibrationOptions(method="magic").check()
    Traceback (most recent call last):
        ...
    normswap.errors.ArgumentError: `method` must be one of reconstruct, channel, moments, not 'magic'
    """

    method: str = "reconstruct"
    reconstruct: str = "all"
    refine_steps: int | None = None
    memory_budget: int | None = None
    views: float | None = None
    bound: str = AUTO

    def check(self) -> None:
        """Refuse invalid values.

        Raises:
            ArgumentError: unknown method or choice of layers, unknown bound, a negative number of steps, no memory at
                all.
        """
        if self.method not in METHODS:
            raise ArgumentError(f"`method` must be one of {', '.join(METHODS)}, not {self.method!r}")
        if self.reconstruct not in RECONSTRUCT:
            raise ArgumentError(f"`reconstruct` must be one of {', '.join(RECONSTRUCT)}, not {self.reconstruct!r}")
        if self.refine_steps is not None and self.refine_steps < 0:
            raise ArgumentError(f"`refine_steps` must be 0 or more, not {self.refine_steps}")
        if self.memory_budget is not None and self.memory_budget < 1:
            raise ArgumentError(f"`memory_budget` must be a number of bytes above 0, not {self.memory_budget}")

        if self.bound not in (AUTO, *BOUNDS):
            raise ArgumentError(f"`bound` must be one of {', '.join((AUTO, *BOUNDS))}, not {self.bound!r}")
        if self.views is not None and not 0 <= self.views <= 1:
            raise ArgumentError(f"`views` must be a number of copies per image from 0 to 1, not {self.views}")

    @property
    def effective_bound(self) -> str:
        """The bound, or how it is chosen: what the literature does, "moments", has none unless it is asked for."""
        return BOUNDS[0] if self.bound == AUTO and self.method == METHODS[-1] else self.bound

    @property
    def solves_writers(self) -> bool:
        """Whether the layers that write to the residual stream are re-solved too."""
        return self.method == "reconstruct" and self.reconstruct == "all"
