"""Where a BatchNorm can go inside a feed-forward network. Imports no torch, so that the command line can read it."""

from typing import Literal, get_args

FfnBn = Literal["pre-act", "post-act", "none"]
FFN_BN: tuple[str, ...] = get_args(FfnBn)
