"""Commands in processes of their own, forked from one that has imported the libraries and done nothing else."""

from __future__ import annotations

import contextlib
import io
import multiprocessing
import sys
from collections.abc import Sequence
from importlib import import_module
from multiprocessing.connection import Connection
from typing import Any

_IMPORTED = [
    "torch",
    "transformers.models.auto.modeling_auto",
    "peft",
    "arviz_stats.base.array",
    "torch._decomp.decompositions_for_jvp",  # compiled where it is imported, at the first derivative
    "entropy_probe.run",
]
"""Before the fork; nothing has been computed by then, so that no thread of torch's is lost."""


def ended(command: str, arguments: Sequence[str]) -> tuple[int, str, str]:
    """(exit code, stdout, stderr) of `module:function`, called with the arguments; a process that dies has its exit
    code and says nothing."""
    context: Any = multiprocessing.get_context("forkserver" if sys.platform == "linux" else "spawn")
    if sys.platform == "linux":
        context.set_forkserver_preload(_IMPORTED)
    here, there = context.Pipe(duplex=False)
    process = context.Process(target=_answer, args=(command, list(arguments), there))
    process.start()
    there.close()
    try:
        return here.recv()
    except EOFError:
        process.join()
        return process.exitcode or 1, "", ""
    finally:
        process.join()
        here.close()


def _answer(command: str, arguments: Sequence[str], there: Connection) -> None:
    module, _, function = command.partition(":")
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = getattr(import_module(module), function)(arguments)
    there.send((code, out.getvalue(), err.getvalue()))
