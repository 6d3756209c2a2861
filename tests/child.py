"""Programs that a test starts and interrupts."""

import os
import signal
import subprocess

# One thread: the machine that runs the tests has other things to do.
ONE_THREAD = {**os.environ, "OMP_NUM_THREADS": "1"}


def started(command: list[str], **environment: str) -> subprocess.Popen:
    """Start a program that hears Ctrl-C; one that a shell started in the background would inherit a deaf ear."""
    return subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**ONE_THREAD, **environment},
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
