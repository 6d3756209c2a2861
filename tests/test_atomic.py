"""The output folder appears whole or not at all: errors, kills at any moment, leftovers, no exchange system call."""

import os
import random
import stat
import subprocess
import sys
import time
from pathlib import Path

import pytest

from normswap import ArgumentError, OutputError, atomic
from normswap.atomic import check_target, new_folder

# Runs normswap/atomic.py without normswap/__init__.py, which would import torch for seconds.
STUB = f"""
import sys, types
sys.modules["normswap"] = package = types.ModuleType("normswap")
package.__path__ = [{str(Path(atomic.__file__).parent)!r}]
from pathlib import Path
from normswap import atomic
assert "torch" not in sys.modules
"""

# Replaces one content by the other without end. Each has a file of its own, so that a mixture would show.
WRITER = (
    STUB
    + """
import itertools
target = Path(sys.argv[1])
if sys.argv[2] == "no exchange":
    atomic._exchange = lambda a, b: False
for letter in itertools.cycle("AB"):
    with atomic.new_folder(target, overwrite=True) as folder:
        for name in ("config", "record", f"only-{letter}"):
            (folder / name).write_text(letter * 5000)
    print("ready", flush=True)
"""
)


def write(target, text, meanwhile=lambda: None, **options):
    with new_folder(target, **options) as folder:
        (folder / "a").write_text(text)
        meanwhile()
        (folder / "below").mkdir()
        (folder / "below" / "b").write_text(text)


def content(target):
    """Return the text that both files hold; the folder must be complete and alone."""
    assert sorted(path.name for path in target.parent.iterdir()) == [target.name]
    assert sorted(str(path.relative_to(target)) for path in target.rglob("*")) == ["a", "below", "below/b"]
    texts = {(target / name).read_text() for name in ("a", "below/b")}
    assert len(texts) == 1
    return texts.pop()


def letter(target):
    """Return which of the writer's contents stands at the target: it must be one of them, whole."""
    found = {path.name: path.read_text() for path in target.iterdir()}
    which = next(iter(found.values()))[:1]
    assert found == dict.fromkeys(["config", "record", f"only-{which}"], which * 5000)
    return which


@pytest.fixture(params=[True, False], ids=["exchange", "no exchange"])
def exchange(request, monkeypatch):
    if not request.param:
        monkeypatch.setattr(atomic, "_exchange", lambda a, b: False)
    return request.param


@pytest.fixture
def target(tmp_path):
    return tmp_path / "to" / "out"


def test_a_folder_appears_whole(target):
    with new_folder(target) as folder:
        (folder / "a").write_text("1")
        assert not target.exists()
        assert folder.parent == target.parent  # else the rename would be a copy
    assert [path.name for path in target.parent.iterdir()] == ["out"]
    assert (target / "a").read_text() == "1"


def test_parents_are_made(tmp_path):
    write(tmp_path / "x" / "y" / "out", "1")
    assert content(tmp_path / "x" / "y" / "out") == "1"


def test_a_relative_target(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write(Path("out"), "1")
    write(Path("out"), "2", overwrite=True)
    assert content(tmp_path / "out") == "2"


def test_a_name_with_pattern_characters(tmp_path):
    for text in ("1", "2"):
        write(tmp_path / "a[b]*?", text, overwrite=True)
    assert content(tmp_path / "a[b]*?") == "2"


@pytest.mark.usefixtures("exchange")
def test_overwrite_replaces_everything(target):
    write(target, "old")
    (target / "old-only").touch()
    with pytest.raises(ArgumentError, match=r"not empty.*`overwrite`"):
        write(target, "new")
    assert (target / "a").read_text() == "old"
    write(target, "new", overwrite=True)
    assert content(target) == "new"


@pytest.mark.usefixtures("exchange")
def test_an_empty_folder_needs_no_overwrite(target):
    target.mkdir(parents=True)
    write(target, "1")
    assert content(target) == "1"


@pytest.mark.usefixtures("exchange")
@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt, SystemExit, MemoryError])
@pytest.mark.parametrize("old", [False, True])
def test_an_error_in_the_block_changes_nothing(target, error, old):
    if old:
        write(target, "old")

    def fail():
        raise error

    with pytest.raises(error):
        write(target, "new", fail, overwrite=True)
    if old:
        assert content(target) == "old"
    else:
        assert not list(target.parent.iterdir())


def test_a_file_that_cannot_be_written(target):
    write(target, "old")
    with pytest.raises(OutputError, match=r"cannot be written: No space left.*stands"), new_folder(target, True):
        raise OSError(28, "No space left on device")
    assert content(target) == "old"


def test_a_failed_rename_puts_the_old_folder_back(target, monkeypatch):
    write(target, "old")
    rename = Path.rename

    def fail(self, to):
        if f"-{os.getpid()}" in self.name:
            raise PermissionError(13, "Permission denied")
        return rename(self, to)

    monkeypatch.setattr(atomic, "_exchange", lambda a, b: False)
    monkeypatch.setattr(Path, "rename", fail)
    with pytest.raises(OutputError, match="Permission denied"):
        write(target, "new", overwrite=True)
    assert content(target) == "old"


@pytest.mark.usefixtures("exchange")
def test_what_appears_meanwhile_is_not_lost(target):
    """Without overwrite, a folder that another program makes while the block runs is not replaced."""

    def appear():
        target.mkdir()
        (target / "a").write_text("precious")

    with pytest.raises((ArgumentError, OutputError), match="out: "):
        write(target, "new", appear)
    assert [path.name for path in target.parent.iterdir()] == ["out"]
    assert (target / "a").read_text() == "precious"


@pytest.mark.parametrize(("umask", "mode"), [(0o022, 0o755), (0o027, 0o750), (0o077, 0o700), (0o002, 0o775)])
def test_permissions_follow_the_umask(target, umask, mode):
    before = os.umask(umask)
    try:
        write(target, "1")
        write(target, "2", overwrite=True)
    finally:
        os.umask(before)
    assert stat.S_IMODE(target.stat().st_mode) == mode


@pytest.mark.parametrize("dangling", [False, True])
def test_a_link_is_no_target(tmp_path, dangling):
    real = tmp_path / "real"
    if not dangling:
        write(real, "1")
    (tmp_path / "link").symlink_to(real)
    for overwrite in (False, True):
        with pytest.raises(ArgumentError, match=r"link: is not a folder"):
            write(tmp_path / "link", "2", overwrite=overwrite)
    assert (tmp_path / "link").is_symlink()
    assert dangling or (real / "a").read_text() == "1"


def test_a_file_is_no_target(tmp_path):
    (tmp_path / "file").write_text("1")
    with pytest.raises(ArgumentError, match="file: is not a folder"):
        write(tmp_path / "file", "2", overwrite=True)
    with pytest.raises((ArgumentError, OutputError), match="file"):
        write(tmp_path / "file" / "out", "2")
    assert (tmp_path / "file").read_text() == "1"


def test_a_place_where_nobody_can_write():
    if not Path("/proc/self").exists():
        pytest.skip("needs /proc")
    with pytest.raises(OutputError, match=r"^/proc/normswap-out: cannot be (written|created): \S"):
        write(Path("/proc/normswap-out"), "1")


def test_protected_paths(tmp_path, monkeypatch):
    out = tmp_path / "out"
    write(out, "1")
    for inside in (out, out / "a", out / "below" / "b", out / "below" / ".." / "a"):
        with pytest.raises(ArgumentError, match="would be lost"):
            check_target(out, True, [inside])
    (tmp_path / "link").symlink_to(out / "a")
    with pytest.raises(ArgumentError, match="would be lost"):
        check_target(out, True, [tmp_path / "link"])
    check_target(out, True, [tmp_path, tmp_path / "out2"])
    monkeypatch.chdir(out / "below")
    with pytest.raises(ArgumentError, match="would be lost"):
        check_target(out, True)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(out / "below"))
    with pytest.raises(ArgumentError, match="would be lost"):
        check_target(out, True)
    assert (out / "a").read_text() == "1"


@pytest.mark.parametrize("how", ["exchange", "no exchange"])
def test_kill_at_any_moment(tmp_path, how):
    """SIGKILL at random moments leaves one whole content; the next run cleans up what the killed one left."""
    target = tmp_path / "out"
    moments = random.Random(1)
    seen, leftovers = set(), 0
    for _ in range(25):
        command = [sys.executable, "-c", WRITER, str(target), how]
        with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
            assert process.stdout is not None
            ready = process.stdout.readline()
            time.sleep(moments.uniform(0.02, 0.06))
            process.kill()
            _, errors = process.communicate()
        assert (ready, errors) == ("ready\n", "")
        if how == "exchange":
            assert target.exists()  # at no moment is there nothing
        elif not target.exists():
            check_target(target, overwrite=True)  # puts the old folder back
        seen.add(letter(target))
        leftovers += len(list(tmp_path.iterdir())) > 1
    assert seen == {"A", "B"}
    assert leftovers > 5  # else the kills came at harmless moments and showed nothing
    write(target, "last", overwrite=True)
    assert content(target) == "last"


def test_a_killed_run_is_swept_by_the_next_one(target):
    script = (
        STUB
        + """
import os, signal
with atomic.new_folder(Path(sys.argv[1])) as folder:
    (folder / "a").write_text("half")
    os.kill(os.getpid(), signal.SIGKILL)
"""
    )
    killed = subprocess.run([sys.executable, "-c", script, str(target)])
    assert killed.returncode < 0
    (left,) = target.parent.iterdir()
    assert left.name.startswith(".out.normswap-")
    neighbour = target.parent / left.name.replace(".out.", ".out2.")
    left.rename(neighbour)  # another target's leftover is not ours
    left.mkdir()
    write(target, "1")
    assert {path.name for path in target.parent.iterdir()} == {"out", neighbour.name}


def test_a_running_neighbour_is_not_swept(target):
    script = (
        STUB
        + """
with atomic.new_folder(Path(sys.argv[1]), overwrite=True) as folder:
    (folder / "a").write_text("slow")
    print("ready", flush=True)
    sys.stdin.read()
"""
    )
    command = [sys.executable, "-c", script, str(target)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as slow:
        assert slow.stdout is not None
        assert slow.stdout.readline() == "ready\n"
        write(target, "quick")
        assert (target / "a").read_text() == "quick"
        slow.communicate("")
    assert slow.returncode == 0
    assert [path.name for path in target.parent.iterdir()] == ["out"]
    assert (target / "a").read_text() == "slow"


ASIDE = ".out.normswap-aside"


def test_a_folder_left_aside_comes_back(target):
    """Two renames, and a kill between them: the old folder is found under its other name."""
    write(target.parent / ASIDE, "old")
    with pytest.raises(ArgumentError, match="not empty"):
        write(target, "new")
    assert content(target) == "old"
    target.rename(target.parent / ASIDE)
    write(target, "new", overwrite=True)
    assert content(target) == "new"


@pytest.mark.usefixtures("exchange")
def test_a_folder_left_aside_is_not_in_the_way(target):
    """Two renames, and a kill before the old folder was removed: the next runs work, and remove it."""
    write(target, "new")
    write(target.parent / ASIDE, "old")
    write(target, "newer", overwrite=True)
    assert content(target) == "newer"
