"""The callback that every long step takes: what it does, how far it is, how far it has to go."""

from collections.abc import Callable

Progress = Callable[[str, int, int], None]


def no_progress(what: str, done: int, total: int) -> None:
    """Show nothing; the default wherever a `Progress` is taken."""
