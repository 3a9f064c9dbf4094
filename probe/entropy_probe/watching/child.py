"""Be `python -m MODULE ARGUMENTS`, and end when the process that started this one does.

It is started as a file, with the standard library alone: what pytest rewrites must not have been imported before it.
The standard input is a pipe that the parent holds open. When that ends, however it ended, the pipe does.
"""

import os
import runpy
import signal
import sys
import threading


def _end_with_parent(pipe: int) -> None:
    while os.read(pipe, 4096):
        pass
    if (
        os.getpgrp() == os.getpid()
    ):  # a group of its own, as the parent starts it: with all that it has started
        os.killpg(0, signal.SIGKILL)
    os._exit(1)


if __name__ == "__main__":
    held = os.dup(0)
    with open(os.devnull) as nothing:
        os.dup2(nothing.fileno(), 0)
    threading.Thread(target=_end_with_parent, args=(held,), daemon=True).start()
    module = sys.argv[1]
    sys.argv[:] = sys.argv[1:]
    sys.path[0] = os.getcwd()  # as with -m
    runpy.run_module(module, run_name="__main__", alter_sys=True)
