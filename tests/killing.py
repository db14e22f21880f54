"""Runs work in processes that kill themselves at a chosen moment, as a cluster would."""

import os
import signal
import sys
import traceback
from collections.abc import Callable
from typing import Any


def run_apart(work: Callable, *args: Any, **kwargs: Any) -> bool:
    """Runs `work` in a fork of this process, which must compute with one thread (others do not survive a fork).

    Returns:
        Whether it came to its end before it was killed. An error of its own ends this process.
    """
    child = os.fork()
    if child == 0:
        try:
            work(*args, **kwargs)
        except BaseException:
            traceback.print_exc()
            os._exit(3)
        os._exit(0)
    status = os.waitpid(child, 0)[1]
    if os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL:
        return False
    if status:
        sys.exit("the work failed")
    return True


def kill_at(function: Callable, call: int, instead: Callable | None = None) -> Callable:
    """`function`, at whose call with this number (from 0) the process dies: before it, or after `instead` was called
    in its place."""
    calls = iter(range(10**6))

    def deadly(*args: Any, **kwargs: Any) -> Any:
        if next(calls) == call:
            if instead is not None:
                instead(*args, **kwargs)
            os.kill(os.getpid(), signal.SIGKILL)
        return function(*args, **kwargs)

    return deadly
