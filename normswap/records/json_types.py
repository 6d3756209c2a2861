"""Records as plain JSON types."""

import math
from typing import Any


def plain(value: Any) -> Any:
    """Return ``value`` with every NaN and infinity as None, since JSON has no words for them."""
    if isinstance(value, dict):
        return {k: plain(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [plain(v) for v in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
