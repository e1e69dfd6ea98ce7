"""Processes that a test starts: they end in time, and nothing of them is left."""

import os
import signal
import subprocess
from typing import Any


def finished(command: list[str], timeout: float = 240, **options: Any) -> subprocess.CompletedProcess:
    """Runs a command that must succeed, in a group of its own, which is ended when it takes too long.

    A launcher is asked first, and so ends those that it started, which may be in groups of their own.
    """
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    process = subprocess.Popen(command, start_new_session=True, **pipes, **options)
    try:
        out, err = process.communicate(timeout=timeout)
    except subprocess.TimeoutExpired:
        process.terminate()
        try:
            process.communicate(timeout=20)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
        raise
    assert process.returncode == 0, err[-3000:]
    return subprocess.CompletedProcess(command, 0, out, err)
