"""Progress on a terminal and in a log, and how a command ends that is told to."""

import io
import os
import re
import signal
import subprocess
import sys
import threading

import click
import pytest
from rich.console import Console as RichConsole

from normswap_cli.console import Console, NormswapCommand
from normswap_cli.processes import Terminated, terminable

from ..child import started
from .test_cli import DEMO, one_object, run


class Clock:
    now = 0.0

    def __call__(self):
        return self.now


def _console(terminal=False, **options):
    console = Console(**options)
    console.talk = RichConsole(
        file=io.StringIO(),
        force_terminal=terminal,
        force_interactive=terminal,
        quiet=console.quiet,
        width=120,
        soft_wrap=True,
        highlight=False,
    )
    return console, lambda: console.talk.file.getvalue()


def test_a_terminal_gets_bars():
    console, shown = _console(terminal=True)
    with console.progress() as update:
        update("calibrate: blocks.0.norm1", 0, 4)
        update("calibrate: blocks.0.attn.qkv", 2, 4)
    assert "blocks.0.attn.qkv" in shown()
    assert "2/4" in shown()
    assert re.search(r"-:--:--|\d:\d\d:\d\d", shown())  # the time left
    assert "progress  " not in shown()


def test_a_log_gets_a_line_per_stage_and_one_in_thirty_seconds():
    clock = Clock()
    console, shown = _console(clock=clock)
    with console.progress() as update:
        for second in range(101):
            clock.now = float(second)
            update(f"calibrate: blocks.{second}.norm1", second, 400)
        update("evaluate", 0, 8)
        clock.now += 1
        update("evaluate", 8, 8)
    assert shown().splitlines() == [
        "progress   calibrate: 0 of 400",
        "progress   calibrate: 30 of 400 (8 %), 0:06:10 left, blocks.30.norm1",
        "progress   calibrate: 60 of 400 (15 %), 0:05:40 left, blocks.60.norm1",
        "progress   calibrate: 90 of 400 (22 %), 0:05:10 left, blocks.90.norm1",
        "progress   evaluate: 0 of 8",
    ]


def test_a_stage_that_runs_again_is_timed_anew():
    clock = Clock()
    console, shown = _console(clock=clock)
    with console.progress() as update:
        for clock.now, done in ((0, 0), (10, 100), (100, 0), (110, 1), (140, 2)):
            update("evaluate", done, 100)
    assert shown().splitlines() == [
        "progress   evaluate: 0 of 100",
        "progress   evaluate: 0 of 100",
        "progress   evaluate: 2 of 100 (2 %), 0:32:40 left",
    ]


@pytest.mark.parametrize("terminal", [True, False])
def test_quiet_silences_progress(terminal):
    console, shown = _console(terminal, quiet=True)
    with console.progress() as update:
        update("evaluate", 0, 8)
        update("evaluate", 8, 8)
    assert shown() == ""


def test_a_real_run_names_its_stages_and_keeps_stdout_pure(tmp_path):
    result = run("convert", *DEMO, "--method", "channel", "-o", tmp_path / "out", "--json")
    assert result.exit_code == 0
    one_object(result)
    stages = re.findall(r"^progress   ([a-z ]+): \d+ of \d+", result.stderr, re.M)
    assert list(dict.fromkeys(stages)) == ["forward pass", "calibrate", "evaluate"]


def _demo(folder, wait_for, number):
    """Start the demo, send it a signal after a line on stderr, and return how it ended and what it said after that."""
    command = [sys.executable, "-m", "normswap_cli", "demo", "-o", str(folder / "out")]
    with started(command) as process:
        assert process.stderr is not None
        assert any(line.startswith(wait_for) for line in process.stderr)
        process.send_signal(number)
        stdout, stderr = process.communicate(timeout=60)
    assert stdout == ""
    return process.returncode, [line for line in stderr.splitlines() if not line.startswith("progress ")]


def test_sigterm_during_calibration(tmp_path):
    code, said = _demo(tmp_path, "progress   calibrate: ", signal.SIGTERM)
    assert code == 143
    assert said == ["Error: terminated by SIGTERM; unfinished output was removed"]
    assert not list(tmp_path.iterdir())


def test_sigterm_while_the_folder_is_written(tmp_path):
    """What lies beside the target under a hidden name is removed, though a second signal comes, as timeout(1) sends."""
    script = """
import os, signal, sys
from pathlib import Path
from normswap_cli.main import cli
from normswap import atomic
sync = atomic._sync
def slow(folder):
    assert folder.name.startswith(".out.normswap-"), folder
    print(*sorted(p.name for p in folder.parent.iterdir()), flush=True)
    os.kill(os.getpid(), signal.SIGTERM)
    os.kill(os.getpid(), signal.SIGTERM)
    sync(folder)
atomic._sync = slow
cli(sys.argv[1:], "normswap")
"""
    arguments = ["convert", *map(str, DEMO), "--method", "moments", "--no-stress", "-q", "-o", str(tmp_path / "out")]
    done = subprocess.run([sys.executable, "-c", script, *arguments], capture_output=True, text=True)
    assert done.returncode == 143, done.stderr
    assert done.stdout.startswith(".out.normswap-")
    assert done.stderr == "Error: terminated by SIGTERM; unfinished output was removed\n"
    assert not list(tmp_path.iterdir())


@pytest.fixture
def _handler():
    before = signal.getsignal(signal.SIGTERM)
    yield
    signal.signal(signal.SIGTERM, before)


@pytest.mark.usefixtures("_handler")
def test_the_handler_is_there_only_while_a_command_runs():
    seen = []

    @click.command(cls=NormswapCommand)
    def command():
        seen.append(signal.getsignal(signal.SIGTERM))
        raise ValueError("it fails")

    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    with pytest.raises(click.ClickException, match="it fails"):
        command.main([], standalone_mode=False)
    assert callable(seen[0])
    assert seen[0] is not signal.SIG_DFL
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL


@pytest.mark.usefixtures("_handler")
def test_the_handler_of_a_caller_stays():
    def own(number, frame):
        raise AssertionError

    signal.signal(signal.SIGTERM, own)
    with terminable():
        assert signal.getsignal(signal.SIGTERM) is own
    assert signal.getsignal(signal.SIGTERM) is own


@pytest.mark.usefixtures("_handler")
def test_no_handler_in_a_thread_nor_in_the_other_processes(monkeypatch):
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    seen = []

    def look():
        with terminable():
            seen.append(signal.getsignal(signal.SIGTERM))

    thread = threading.Thread(target=look)
    thread.start()
    thread.join()
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "1")
    look()
    assert seen == [signal.SIG_DFL, signal.SIG_DFL]


@pytest.mark.usefixtures("_handler")
def test_a_forked_process_ends_as_without_a_handler():
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    with terminable():
        child = os.fork()
        if child == 0:
            try:
                os.kill(os.getpid(), signal.SIGTERM)
            finally:
                os._exit(0)
        _, status = os.waitpid(child, 0)
        assert os.WIFSIGNALED(status)
        assert os.WTERMSIG(status) == signal.SIGTERM
        with pytest.raises(Terminated):
            os.kill(os.getpid(), signal.SIGTERM)
