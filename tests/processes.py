"""Processes that a test starts: they end in time, and nothing of them is left."""

import gc
import os
import signal
import socket
import subprocess
import traceback
from collections.abc import Callable
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


def in_children(count: int, work: Callable[[], None], **environment: str) -> None:
    """Does the work in children of a program that has imported what it needs, and trains nothing itself.

    One child is alone; several find the environment that torchrun gives its processes.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    children = []
    gc.freeze()  # a child that searches what is here for garbage copies all of it
    for rank in range(count):
        child = os.fork()
        if not child:
            os.environ.update(environment)
            if count > 1:
                whose = {"RANK": rank, "LOCAL_RANK": rank, "GROUP_RANK": 0}
                whole = {"WORLD_SIZE": count, "LOCAL_WORLD_SIZE": count, "TORCHELASTIC_RUN_ID": "none"}
                where = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
                os.environ.update({name: str(value) for name, value in (whose | whole | where).items()})
            code = 1
            try:
                work()
                code = 0
            except BaseException:
                traceback.print_exc()
            finally:
                os._exit(code)
        children.append(child)
    codes = [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]
    assert not any(codes), codes
