"""The whole idea in one layer: LayerNorm has no fold, BatchNorm has one, and this is it, in plain torch.

Run: python examples/fold_by_hand.py
"""

import torch
from torch import nn

torch.manual_seed(0)
tokens = torch.randn(1000, 8, dtype=torch.float64) * torch.logspace(-2, 2, 8) + 3  # [M, C], channels of every size
layer_norm = nn.LayerNorm(8).double()
linear = nn.Linear(8, 4).double()
nn.init.normal_(layer_norm.weight)
nn.init.normal_(layer_norm.bias)

# 1. What one affine map per channel can do for LayerNorm's output y: least squares, channel by channel.
y = layer_norm(tokens).detach()
x_centred, y_centred = tokens - tokens.mean(0), y - y.mean(0)
scale = (x_centred * y_centred).mean(0) / x_centred.square().mean(0)  # [C], cov(x, y) / var(x)
shift = y.mean(0) - scale * tokens.mean(0)
explained = 1 - (y - (scale * tokens + shift)).square().sum() / y_centred.square().sum()

# 2. The fold into the linear layer that reads it: W' = W * s (columns), b' = b + W @ h. Exact.
folded = nn.Linear(8, 4).double()
with torch.no_grad():
    folded.weight.copy_(linear.weight * scale)
    folded.bias.copy_(linear.bias + linear.weight @ shift)
    error = (folded(tokens) - linear(scale * tokens + shift)).abs().max()

print(f"share of LayerNorm's variance that the affine map explains: {explained:.3f}")
print(f"largest difference between folded and unfolded: {error:.1e}")
assert error < 1e-9
