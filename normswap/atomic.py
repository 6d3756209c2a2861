"""A folder or a file that appears whole or not at all: written beside its target, synced to disk, then renamed.

On Linux an existing target is exchanged in one system call, so that a kill at any moment leaves either the old
folder or the new one. Elsewhere two renames are needed; a kill between them leaves the old folder under a name that
the next run puts back.
"""

import ctypes
import errno
import os
import re
import shutil
import socket
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

from .errors import ArgumentError, NormswapError, OutputError

_AT_FDCWD, _RENAME_EXCHANGE = -100, 2


def check_target(target: Path, overwrite: bool, protect: Iterable[Path] = ()) -> None:
    """Raise before any work is done if ``target`` cannot become a new folder.

    Args:
        target: the folder to come.
        overwrite: whether a folder with files in it may be replaced.
        protect: folders and files that must not lie inside the target, as the model that is read.

    Raises:
        ArgumentError: it is in the way of something, or not empty and ``overwrite`` is off.
        OutputError: its parent cannot be written.
    """
    if target.is_symlink() or (target.exists() and not target.is_dir()):
        raise ArgumentError(f"{target}: is not a folder; choose another output")
    _recover(target)
    resolved = target.resolve()
    for path in [Path.cwd(), Path.home(), *protect]:
        if target.exists() and path.resolve().is_relative_to(resolved):
            raise ArgumentError(f"{target}: holds {path}, which would be lost; choose another output")
    _refuse_files(target, overwrite)
    _check_parent(target)


@contextmanager
def new_folder(target: Path, overwrite: bool = False, protect: Iterable[Path] = ()) -> Iterator[Path]:
    """Yield an empty folder beside ``target`` that takes its place when the block ends without an error.

    Raises:
        ArgumentError, OutputError: see `check_target`; also when a file cannot be written. What stood at ``target``
            still stands then.
    """
    check_target(target, overwrite, protect)
    sweep(target)
    staging = _beside(target)
    try:
        shutil.rmtree(staging, ignore_errors=True)
        staging.mkdir(parents=True)
        yield staging
        _sync(staging)
        _refuse_files(target, overwrite)  # once more: much time may have passed
        _put(staging, target)
        _sync_path(target.parent)
    except Exception as error:
        _retell(error, staging, target)
        if not isinstance(error, OSError) or isinstance(error, NormswapError):
            raise
        reason = error.strerror or str(error)
        kept = "; what stood there still stands" if target.exists() else ""
        raise OutputError(f"{target}: cannot be written: {reason}{kept}") from error
    finally:
        shutil.rmtree(staging, ignore_errors=True)  # after an exchange this is the old folder


def check_file(target: Path, overwrite: bool) -> None:
    """Raise before any work is done if ``target`` cannot become a new file.

    Raises:
        ArgumentError: it is in the way of something, or there and ``overwrite`` is off.
        OutputError: its folder cannot be written.
    """
    if target.is_symlink() or (target.exists() and not target.is_file()):
        raise ArgumentError(f"{target}: is not a file; choose another output")
    if target.exists() and not overwrite:
        raise ArgumentError(f"{target}: is there already; choose another output, or replace it with `overwrite`")
    _check_parent(target)


@contextmanager
def new_file(target: Path, overwrite: bool = False) -> Iterator[Path]:
    """Yield the path of a file to write beside ``target``, which takes its name when the block ends without an error.

    What else the block writes into the same folder, as weights in a file of their own, is renamed first, under the
    name it has. Choose names that depend on the content: then a kill at any moment leaves a file and what it needs.

    Raises:
        ArgumentError, OutputError: see `check_file`; also when a file cannot be written.
    """
    check_file(target, overwrite)
    sweep(target)
    staging = _beside(target)
    try:
        shutil.rmtree(staging, ignore_errors=True)
        staging.mkdir(parents=True)
        yield staging / target.name
        _sync(staging)
        check_file(target, overwrite)  # once more: much time may have passed
        for path in sorted(staging.iterdir(), key=lambda path: path.name == target.name):
            os.replace(path, target.parent / path.name)
        _sync_path(target.parent)
    except Exception as error:
        _retell(error, staging, target.parent)
        if not isinstance(error, OSError) or isinstance(error, NormswapError):
            raise
        reason = error.strerror or str(error)
        kept = "; what stood there still stands" if target.exists() else ""
        raise OutputError(f"{target}: cannot be written: {reason}{kept}") from error
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def _retell(error: Exception, staging: Path, target: Path) -> None:
    """Put the target in the place of a folder that is gone when the error's text is read."""
    error.args = tuple(a.replace(str(staging), str(target)) if isinstance(a, str) else a for a in error.args)


def write_file(path: Path, text: str) -> None:
    """Write a text file, in UTF-8, in the place of what stands there.

    Raises:
        ArgumentError, OutputError: see `new_file`.
    """
    with new_file(path, overwrite=True) as file:
        write_text(file, text)


def write_text(path: Path, text: str) -> None:
    """Write a text file in UTF-8 whatever the system's encoding, with line ends as they are; see `decoded`."""
    path.write_bytes(decoded(text).encode("utf-8"))


def decoded(text: str) -> str:
    """Return text that UTF-8 can write.

    A name of a file that the system could not decode (in a C locale, any outside ASCII) gets its own letters back if
    its bytes are UTF-8, and a replacement character if they are not.

    >>> decoded("ä".encode().decode("ascii", "surrogateescape"))
    'ä'
    """
    known = re.sub("[\ud800-\udc7f\udd00-\udfff]", "\ufffd", text)  # halves of a letter, which are no bytes at all
    return known.encode("utf-8", "surrogateescape").decode("utf-8", "replace")


def _check_parent(target: Path) -> None:
    nearest = next(parent for parent in target.absolute().parents if parent.exists())
    if not nearest.is_dir():
        raise OutputError(f"{target}: {nearest} is not a folder")
    if not os.access(nearest, os.W_OK | os.X_OK):
        raise OutputError(f"{target}: {nearest} cannot be written")


def _refuse_files(target: Path, overwrite: bool) -> None:
    if target.is_dir() and any(target.iterdir()) and not overwrite:
        raise ArgumentError(f"{target}: not empty; choose another output, or replace it with `overwrite`")


def _prefix(target: Path) -> str:
    return f".{target.name}.normswap-{socket.gethostname()}-"


def _put(staging: Path, target: Path) -> None:
    if not target.exists():
        staging.rename(target)
        return
    if _exchange(staging, target):
        return
    aside = target.parent / f".{target.name}.normswap-aside"
    target.rename(aside)
    try:
        staging.rename(target)
    except BaseException:
        aside.rename(target)
        raise
    shutil.rmtree(aside, ignore_errors=True)


def _exchange(a: Path, b: Path) -> bool:
    """Swap two names in one step; False where the system or the file system cannot."""
    if not sys.platform.startswith("linux"):
        return False
    renameat2 = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
    if renameat2 is None:
        return False
    if renameat2(_AT_FDCWD, os.fsencode(a), _AT_FDCWD, os.fsencode(b), _RENAME_EXCHANGE) == 0:
        return True
    code = ctypes.get_errno()
    if code in (errno.EINVAL, errno.ENOSYS, errno.EXDEV, errno.EOPNOTSUPP):
        return False
    raise OSError(code, os.strerror(code), str(b))


def _recover(target: Path) -> None:
    aside = target.parent / f".{target.name}.normswap-aside"
    if not aside.is_dir():
        return
    if target.exists():  # the new folder was in place already, the old one is done with
        shutil.rmtree(aside, ignore_errors=True)
    else:
        aside.rename(target)


def _beside(target: Path) -> Path:
    """Return where this process writes what is to become ``target``."""
    return target.parent / f"{_prefix(target)}{os.getpid()}"


def sweep(target: Path) -> None:
    """Remove what killed runs on this machine left beside the target."""
    prefix = _prefix(target)
    for path in target.parent.glob(f"{_escape(prefix)}*"):
        pid = path.name.removeprefix(prefix)
        if not pid.isdigit() or int(pid) == os.getpid() or _alive(int(pid)):
            continue
        if path.is_dir():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)


def _escape(text: str) -> str:
    return "".join(f"[{c}]" if c in "*?[" else c for c in text)


def _alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except OSError:
        return True
    return True


def _sync(folder: Path) -> None:
    for path in sorted(folder.rglob("*"), reverse=True):
        _sync_path(path)
    _sync_path(folder)


def _sync_path(path: Path) -> None:
    if path.is_dir() and sys.platform == "win32":
        return  # Windows cannot open a folder
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
