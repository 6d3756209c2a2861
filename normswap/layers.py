"""BatchNorm over batch and tokens, and what is left of it when nothing can take the fold.

Letters: B batch, N tokens, C channels, H W height and width. In eval mode BatchNorm is an affine map per
channel, ``y = scale * x + shift`` (Ioffe & Szegedy 2015, section 3.1), which is why it folds and LayerNorm
does not.
"""

from typing import Any

import torch
from safetensors import safe_open
from torch import nn


class TokenBatchNorm(nn.BatchNorm1d):
    """BatchNorm of channels-last tokens `[..., C]`, statistics over every leading dimension.

    Args are those of `torch.nn.BatchNorm1d`; ``num_features`` is C.

    In eval mode the scale is computed as ``weight / sqrt(running_var + eps)``, in this order, so that
    ``weight = sqrt(running_var + eps)`` and ``bias = running_mean`` give the identity bit for bit (a product
    with the reciprocal square root, as in torch's kernel, would round).

    `torch.nn.SyncBatchNorm.convert_sync_batchnorm` takes dimension 1 for the channels and must not be used
    on this class.
    """

    channel_dim = -1
    # Always there, unlike in the base class.
    weight: nn.Parameter
    bias: nn.Parameter
    running_mean: torch.Tensor
    running_var: torch.Tensor
    # `[C]`, what `set_bound` sets; None without a bound.
    lower: torch.Tensor | None
    upper: torch.Tensor | None

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.register_buffer("lower", None)
        self.register_buffer("upper", None)

    def tokens(self, x: torch.Tensor) -> torch.Tensor:
        """Return a value that the norm reads as one row per token, `[M, C]`."""
        return x.movedim(self.channel_dim, -1).reshape(-1, self.num_features)  # [..., C] -> [M, C]

    def affine64(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Return scale and shift `[C]` of the eval-mode map in float64, detached."""
        mean, var, weight, bias = (
            t.detach().double() for t in (self.running_mean, self.running_var, self.weight, self.bias)
        )
        scale = weight / (var + self.eps).sqrt()
        return scale, bias - mean * scale

    @torch.no_grad()
    def set_statistics(self, mean: torch.Tensor, var: torch.Tensor) -> None:
        """Take population mean and (biased) variance `[C]`, any dtype and device."""
        self.running_mean.copy_(mean)
        self.running_var.copy_(var)

    @torch.no_grad()
    def set_affine(self, scale: torch.Tensor, shift: torch.Tensor) -> None:
        """Choose weight and bias so that, with the statistics as they are, ``y = scale * x + shift``.

        ``scale = 1, shift = 0`` gives an identity bit for bit, see the class.
        """
        sigma = (self.running_var + self.eps).sqrt()
        mean = self.running_mean
        self.weight.copy_(scale.to(sigma) * sigma)
        self.bias.copy_(shift.double() + mean.double() * (self.weight / sigma).double())

    def set_identity(self) -> None:
        """Make the eval-mode map the exact identity, whatever the statistics."""
        self.set_affine(torch.ones_like(self.weight), torch.zeros_like(self.weight))

    def set_bound(self, lower: torch.Tensor, upper: torch.Tensor) -> None:
        """Keep each channel of the input between ``lower`` and ``upper`` `[C]` from now on."""
        self.lower, self.upper = (v.detach().to(self.running_mean, copy=True) for v in (lower, upper))

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *rest: Any) -> None:
        for end in ("lower", "upper"):
            if getattr(self, end) is None and prefix + end in state_dict:
                setattr(self, end, torch.zeros_like(self.running_mean))
        super()._load_from_state_dict(state_dict, prefix, *rest)

    def bounded(self, x: torch.Tensor) -> torch.Tensor:
        """Return the input as the norm takes it, within its bound if it has one."""
        if self.lower is None or self.upper is None:
            return x
        return x.clamp(*(_along(v, x, self.channel_dim) for v in (self.lower, self.upper)))

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        if input.shape[self.channel_dim] != self.num_features:
            raise ValueError(
                f"expected {self.num_features} channels in dimension {self.channel_dim}, got {list(input.shape)}"
            )
        input = self.bounded(input)
        if self.training:
            x = input.movedim(self.channel_dim, -1)  # [B, C, H, W] -> [B, H, W, C]; tokens stay
            y = super().forward(x.reshape(-1, self.num_features))  # [..., C] -> [B*N, C]
            return y.reshape(x.shape).movedim(-1, self.channel_dim)  # and back
        sigma = (self.running_var + self.eps).sqrt()
        scale = self.weight / sigma
        shift = self.bias - self.running_mean * scale
        return torch.addcmul(
            _along(shift, input, self.channel_dim), input, _along(scale, input, self.channel_dim)
        )  # one pass over the tokens instead of two


class TokenBatchNorm2d(TokenBatchNorm):
    """The twin of `TokenBatchNorm` for channels-first maps `[B, C, H, W]`."""

    channel_dim = 1


class TokenBound(nn.Module):
    """Clamps each channel of tokens `[..., C]` or maps `[B, C, H, W]` to the range that a file has for it.

    Takes a norm's place in a converted model. As the ``norm_layer`` of timm it reads its range while timm loads the
    weights, also of a model inside another one:

        partial(TokenBound, file="OUT/bounds.safetensors")

    Args:
        args, arguments: a norm's, which are not needed.
        file: safetensors with ``lower`` and ``upper`` under the path of each module; a path that is not in it counts as
            a missing key. None: the range is set by hand.

    >>> bound = TokenBound()
    >>> bound.lower, bound.upper = torch.tensor([-1.0, -2.0]), torch.tensor([1.0, 2.0])
    >>> bound(torch.tensor([[3.0, -3.0]]))
    tensor([[ 1., -2.]])
    """

    def __init__(self, *args: Any, file: str | None = None, **arguments: Any) -> None:
        super().__init__()
        self.file = file
        # In no state dict: without them the weights are those of a model with nn.Identity here.
        self.register_buffer("lower", None, persistent=False)
        self.register_buffer("upper", None, persistent=False)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *rest: Any) -> None:
        super()._load_from_state_dict(state_dict, prefix, *rest)
        if self.file is None:
            return
        with safe_open(self.file, framework="pt") as bounds:
            names = [name for name in list(bounds.keys()) if f".{prefix}lower".endswith(f".{name}")]
            if names:
                lower = max(names, key=len)
                upper = lower.removesuffix("lower") + "upper"
                self.lower, self.upper = bounds.get_tensor(lower), bounds.get_tensor(upper)
                self.file = None  # read; it need not be there any more
            else:
                rest[2].append(f"{prefix}lower, which {self.file} has not")  # missing keys

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x if self.lower is None else torch.clamp(x, self.lower.to(x), self.upper.to(x))


class TokenAffine(TokenBound):
    """``y = weight * x + bias`` per channel: a BatchNorm with no neighbour to fold into, its statistics gone.

    Args:
        num_features: C.
        channel_dim: -1 for tokens `[..., C]`, 1 for maps `[B, C, H, W]`.
    """

    def __init__(
        self,
        num_features: int,
        channel_dim: int = -1,
        device: torch.device | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.num_features = num_features
        self.channel_dim = channel_dim
        self.weight = nn.Parameter(torch.ones(num_features, device=device, dtype=dtype))
        self.bias = nn.Parameter(torch.zeros(num_features, device=device, dtype=dtype))

    def extra_repr(self) -> str:
        return f"{self.num_features}, channel_dim={self.channel_dim}"

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        weight, bias = (_along(v, x, self.channel_dim) for v in (self.weight, self.bias))
        return torch.addcmul(bias, super().forward(x), weight)  # one pass over the tokens, as one LayerNorm kernel is


class NormedLinear(nn.Linear):
    """A linear layer with a BatchNorm on its output `[..., O]`; weight and bias keep the layer's own names.

    This is BatchNorm between the two linear layers of an FFN, before the activation (Yao et al. 2021,
    "Leveraging Batch Normalization for Vision Transformers"; the paper leaves the position open).
    """

    norm: TokenBatchNorm

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return self.norm(super().forward(input))


class NormedConv2d(nn.Conv2d):
    """`NormedLinear` for FFNs made of 1x1 convolutions, `[B, O, H, W]`."""

    norm: TokenBatchNorm

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return self.norm(super().forward(input))


def attach_norm(layer: nn.Linear | nn.Conv2d, norm: TokenBatchNorm) -> "NormedLinear | NormedConv2d":
    """Return a layer that shares every parameter and attribute of ``layer`` and ends in ``norm``."""
    kind: Any = NormedLinear if isinstance(layer, nn.Linear) else NormedConv2d
    normed: NormedLinear | NormedConv2d = kind.__new__(kind)
    normed.__dict__.update(_own_state(layer))
    normed.norm = norm
    return normed


def detach_norm(layer: NormedLinear | NormedConv2d) -> nn.Linear | nn.Conv2d:
    """Return the plain layer inside, with the very same parameters."""
    kind: Any = nn.Linear if isinstance(layer, NormedLinear) else nn.Conv2d
    plain: nn.Linear | nn.Conv2d = kind.__new__(kind)
    plain.__dict__.update(_own_state(layer))
    del plain._modules["norm"]
    return plain


def _along(vector: torch.Tensor, x: torch.Tensor, channel_dim: int) -> torch.Tensor:
    return vector if channel_dim == -1 else vector.reshape(-1, *[1] * (x.ndim - 2))  # [C] -> [C, 1, 1]


def _own_state(layer: nn.Module) -> dict:
    # The registries are dicts: sharing them would let one layer's change appear in the other.
    return {k: v.copy() if isinstance(v, dict) else v for k, v in layer.__dict__.items()}
