"""Images as a bad day makes them: noise, blur, wrong exposure, compression, something in the way, no image at all.

Kinds and order follow ImageNet-C (Hendrycks & Dietterich 2019, "Benchmarking Neural Network Robustness to Common
Corruptions and Perturbations"), for any image size and any number of channels. Packages with its code need OpenCV and
scikit-image, and they, like torchvision's transforms, draw from a global state. Here every image has a generator of its
own, seeded by its place, so that neither batches nor devices change what is drawn; strengths of one kind share draws.

Pixels `[B, C, H, W]` are in 0..1, before a model's normalisation, and stay there.
"""

import hashlib
import io
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from PIL import Image
from torch.nn import functional as F

Generators = Sequence[torch.Generator]
Apply = Callable[[torch.Tensor, float, Generators], torch.Tensor]

FAMILIES = ("noise", "blur", "tone", "digital", "occlusion", "frames")


@dataclass(frozen=True)
class Corruption:
    """One kind of corruption.

    Attributes:
        name: of the kind.
        family: one of `FAMILIES`.
        text: the name of one severity, with a place for its strength.
        strengths: from mild to severe, in the unit that ``text`` shows.
        apply: takes pixels `[B, C, H, W]`, a strength and a generator for each image.
    """

    name: str
    family: str
    text: str
    strengths: tuple[float, ...]
    apply: Apply

    def label(self, strength: float) -> str:
        """Return the name of one severity.

        >>> CORRUPTIONS["impulse noise"].label(5)
        'impulse noise 5 %'
        """
        return self.text.format(strength)

    def __call__(self, pixels: torch.Tensor, strength: float, seed: int = 0, start: int = 0) -> torch.Tensor:
        """Return the pixels `[B, C, H, W]` corrupted.

        Args:
            pixels: in 0..1.
            strength: any, not only one of ``strengths``.
            seed: draws noise, directions and places.
            start: place of the first image among all, so that batches do not matter.
        """
        generators = [_generator(self.name, seed, start + i) for i in range(len(pixels))]
        return self.apply(pixels, strength, generators).clamp(0, 1)


@dataclass(frozen=True)
class Case:
    """One kind of corruption at one strength: a row of the stress table."""

    corruption: Corruption
    strength: float

    @property
    def label(self) -> str:
        return self.corruption.label(self.strength)


@dataclass(frozen=True)
class View:
    """What views of calibration and fine-tuning draw from: one kind, its strength uniform between two."""

    corruption: str
    low: float
    high: float


def _generator(*key: object) -> torch.Generator:
    digest = hashlib.blake2b(repr(key).encode(), digest_size=8).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest, "big") >> 1)  # 63 bits


def _uniform(generators: Generators, *shape: int, like: torch.Tensor) -> torch.Tensor:
    """Return numbers in 0..1 `[B, *shape]`; drawn on the CPU, so that every device gets the same."""
    return torch.stack([torch.rand(shape, generator=g) for g in generators]).to(like)


def _gaussian_noise(x: torch.Tensor, sigma: float, generators: Generators) -> torch.Tensor:
    return x + sigma * torch.stack([torch.randn(x.shape[1:], generator=g) for g in generators]).to(x)


def _shot_noise(x: torch.Tensor, photons: float, generators: Generators) -> torch.Tensor:
    light = (x * photons).float().cpu()
    return torch.stack([torch.poisson(v, generator=g) for v, g in zip(light, generators, strict=True)]).to(x) / photons


def _impulse_noise(x: torch.Tensor, percent: float, generators: Generators) -> torch.Tensor:
    hit, colour = _uniform(generators, 2, 1, *x.shape[2:], like=x).unbind(1)  # [B, 1, H, W] each: whole pixels
    return torch.where(hit < percent / 100, (colour < 0.5).to(x), x)


def _defocus_blur(x: torch.Tensor, diameter: float, generators: Generators) -> torch.Tensor:
    y, z = _offsets(diameter, x)
    disc = (diameter / 2 + 0.5 - torch.hypot(y, z)).clamp(0, 1)  # [K, K], with a soft edge
    return _filtered(x, disc.expand(len(x), -1, -1))


def _motion_blur(x: torch.Tensor, length: float, generators: Generators) -> torch.Tensor:
    angle = math.pi * _uniform(generators, 1, 1, like=x)  # [B, 1, 1]
    y, z = _offsets(length, x)
    along, across = z * angle.cos() + y * angle.sin(), z * angle.sin() - y * angle.cos()  # [B, K, K]
    return _filtered(x, (length / 2 + 0.5 - along.abs()).clamp(0, 1) * (1 - across.abs()).clamp(0, 1))


def _offsets(width: float, like: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return row and column offsets `[K, 1]` and `[1, K]` from the centre of a kernel that holds ``width`` pixels."""
    radius = max(math.ceil((width - 1) / 2), 0)
    steps = torch.arange(-radius, radius + 1, device=like.device, dtype=like.dtype)
    return steps[:, None], steps[None, :]


def _filtered(x: torch.Tensor, kernels: torch.Tensor) -> torch.Tensor:
    """Return each image `[B, C, H, W]` filtered by its own kernel `[B, K, K]`; beyond the border lies the border."""
    b, c, h, w = x.shape
    r = kernels.shape[-1] // 2
    weight = (kernels / kernels.sum((1, 2), keepdim=True)).repeat_interleave(c, 0)[:, None]  # [B*C, 1, K, K]
    padded = F.pad(x, [r] * 4, mode="replicate").reshape(1, b * c, h + 2 * r, w + 2 * r)
    return F.conv2d(padded, weight, groups=b * c).reshape(x.shape)  # [1, B*C, H, W] -> [B, C, H, W]


def _brightness(x: torch.Tensor, shift: float, generators: Generators) -> torch.Tensor:
    return x + shift


def _contrast(x: torch.Tensor, factor: float, generators: Generators) -> torch.Tensor:
    mean = x.mean((2, 3), keepdim=True)
    return (x - mean) * factor + mean


def _jpeg(x: torch.Tensor, quality: float, generators: Generators) -> torch.Tensor:
    coded = (x * 255).round().to(torch.uint8).cpu()
    if x.shape[1] != 3:
        coded = coded.flatten(0, 1)[:, None]  # [B, C, H, W] -> [B*C, 1, H, W]: JPEG knows grey and colour only
    decoded = torch.stack([_through_jpeg(image, int(quality)) for image in coded])
    return decoded.reshape(x.shape).to(x) / 255


def _through_jpeg(image: torch.Tensor, quality: int) -> torch.Tensor:
    """Return bytes `[C, H, W]` as they come out of a file; torchvision is about to lose its own functions for that."""
    c, h, w = image.shape
    written = image.permute(1, 2, 0).contiguous().numpy().tobytes()  # [C, H, W] -> [H, W, C]
    file = io.BytesIO()
    Image.frombytes("RGB" if c == 3 else "L", (w, h), written).save(file, "JPEG", quality=quality)
    read = bytearray(Image.open(file).tobytes())
    return torch.frombuffer(read, dtype=torch.uint8).view(h, w, c).permute(2, 0, 1)  # [H, W, C] -> [C, H, W]


def _pixelate(x: torch.Tensor, block: float, generators: Generators) -> torch.Tensor:
    h, w = x.shape[2:]
    coarse = F.adaptive_avg_pool2d(x, (math.ceil(h / block), math.ceil(w / block)))
    return F.interpolate(coarse, (h, w), mode="nearest-exact")


def _occlusion(x: torch.Tensor, percent: float, generators: Generators) -> torch.Tensor:
    """Cover a part of each image, of its own shape, in black (DeVries & Taylor 2017, "Cutout")."""
    side = math.sqrt(percent / 100)
    hidden = torch.ones(len(x), 1, 1, 1, dtype=torch.bool, device=x.device)
    places = (1 - side) * _uniform(generators, 2, like=x)  # [B, 2]: top and left, as shares
    for dim, size in enumerate(x.shape[2:]):
        centres = (torch.arange(size, device=x.device, dtype=x.dtype) + 0.5) / size
        first = places[:, dim, None]  # [B, 1]
        within = (first <= centres) & (centres < first + side)  # [B, size]
        hidden = hidden & within.view(len(x), 1, *((-1, 1) if dim == 0 else (1, -1)))
    return x.masked_fill(hidden, 0)


def _black(x: torch.Tensor, _: float, generators: Generators) -> torch.Tensor:
    return torch.zeros_like(x)


def _white(x: torch.Tensor, _: float, generators: Generators) -> torch.Tensor:
    return torch.ones_like(x)


def _one_colour(x: torch.Tensor, _: float, generators: Generators) -> torch.Tensor:
    return _uniform(generators, x.shape[1], 1, 1, like=x).expand_as(x).contiguous()


def _uniform_noise(x: torch.Tensor, _: float, generators: Generators) -> torch.Tensor:
    return _uniform(generators, *x.shape[1:], like=x)


CORRUPTIONS: dict[str, Corruption] = {
    c.name: c
    for c in (
        Corruption("Gaussian noise", "noise", "Gaussian noise {:.2f}", (0.04, 0.08, 0.16, 0.30), _gaussian_noise),
        Corruption("shot noise", "noise", "shot noise, {:g} photons", (60, 12, 3), _shot_noise),
        Corruption("impulse noise", "noise", "impulse noise {:g} %", (1, 5, 10), _impulse_noise),
        Corruption("defocus blur", "blur", "defocus blur {:g} px", (5, 9, 13), _defocus_blur),
        Corruption("motion blur", "blur", "motion blur {:g} px", (5, 9, 15), _motion_blur),
        Corruption("brighter", "tone", "brightness {:+g}", (0.2, 0.4), _brightness),
        Corruption("darker", "tone", "brightness {:+g}", (-0.2, -0.4), _brightness),
        Corruption("contrast", "tone", "contrast x {:g}", (0.5, 0.25, 0.1), _contrast),
        Corruption("JPEG", "digital", "JPEG quality {:g}", (25, 10, 5), _jpeg),
        Corruption("pixelate", "digital", "pixelate {:g} px", (2, 4, 8), _pixelate),
        Corruption("occlusion", "occlusion", "occlusion {:g} %", (10, 25, 50), _occlusion),
        Corruption("black", "frames", "black frame", (1,), _black),
        Corruption("white", "frames", "white frame", (1,), _white),
        Corruption("one colour", "frames", "frame of one colour", (1,), _one_colour),
        Corruption("uniform noise", "frames", "frame of uniform noise", (1,), _uniform_noise),
    )
}

# Strong noise and weak contrast stand there twice: they are what a model without LayerNorm finds hardest.
VIEWS = (
    View("Gaussian noise", 0, 0.32),
    View("Gaussian noise", 0.1, 0.32),
    View("shot noise", 2, 40),
    View("impulse noise", 0, 10),
    View("defocus blur", 1, 13),
    View("motion blur", 1, 15),
    View("brighter", -0.45, 0.45),
    View("contrast", 0.1, 1.3),
    View("contrast", 0.05, 0.4),
    View("JPEG", 5, 40),
    View("pixelate", 1.5, 8),
    View("occlusion", 0, 50),
)


def without(*families: str) -> tuple[View, ...]:
    """Return the views of all families but these: to calibrate without one of them and test on it.

    >>> [view.corruption for view in without("noise", "blur", "tone")]
    ['JPEG', 'pixelate', 'occlusion']
    """
    return tuple(v for v in VIEWS if CORRUPTIONS[v.corruption].family not in families)


def random_views(
    pixels: torch.Tensor, seed: int, start: int = 0, share: float = 1.0, views: Sequence[View] = VIEWS
) -> torch.Tensor:
    """Return the images `[B, C, H, W]`, some of them with one corruption, its kind and strength drawn by chance.

    Args:
        pixels: in 0..1.
        seed: draws; another epoch is another seed.
        start: place of the first image among all, so that batches do not matter.
        share: how likely an image is corrupted.
        views: kinds and strengths, each entry as likely as another.

    >>> views = random_views(torch.rand(8, 3, 16, 16), seed=1, share=0.5)
    >>> views.shape, bool(((0 <= views) & (views <= 1)).all())
    (torch.Size([8, 3, 16, 16]), True)
    """
    result = pixels.clone()
    for i in range(len(pixels)):
        chance, kind, strength = torch.rand(3, generator=_generator("view", seed, start + i)).tolist()
        if views and chance < share:
            view = views[int(kind * len(views))]
            corruption, drawn = CORRUPTIONS[view.corruption], view.low + strength * (view.high - view.low)
            result[i : i + 1] = corruption(pixels[i : i + 1], drawn, seed, start + i)
    return result
