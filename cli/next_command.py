"""The command to type next, with the options that the one at hand was given."""

import shlex
from collections.abc import Iterable
from typing import Any

# What says which images, and how they are prepared; and the values that need not be typed.
_IMAGES = ("data_dir", "dataset", "split", "class_map", "no_labels", "crop_pct", "mean", "std", "interpolation")
_ARCHITECTURE = ("num_classes", "img_size", "in_chans", "model_kwargs")
_UNSAID = (None, "", False, ())
_DEFAULTS = {"split": "validation"}


def line(*words: Any) -> str:
    """Return a command line, quoted for a shell."""
    return shlex.join(str(word) for word in ("normswap", *words))


def flags(options: dict[str, Any], names: Iterable[str]) -> list[str]:
    """Return the flags of those options that were given something else than their default."""
    words: list[str] = []
    for name in names:
        value, flag = options[name], f"--{name.replace('_', '-')}"
        if value in _UNSAID or value == _DEFAULTS.get(name):
            continue
        if name == "model_kwargs":
            words += [word for key, part in value for word in (flag, f"{key}={part!r}")]
        elif value is True:
            words.append(flag)
        else:
            words += [flag, *map(str, value if isinstance(value, tuple) else (value,))]
    return words


def images(options: dict[str, Any]) -> list[str]:
    """Return the flags that name the same evaluation images."""
    return flags(options, _IMAGES)


def against(options: dict[str, Any]) -> list[str]:
    """Return the flags that name what ``-m`` named as the original to compare with."""
    words = ["--against", options["model"]]
    for name in ("pretrained", "checkpoint", "use_ema"):
        words += flags({f"against_{name}": options[name]}, [f"against_{name}"])
    return words + flags(options, _ARCHITECTURE)


def still_against(options: dict[str, Any]) -> list[str]:
    """Return the flags of ``--against`` as they were given."""
    return flags(options, ("against", "against_pretrained", "against_checkpoint", "against_use_ema"))
