"""Python processes without the seconds in which torch and transformers are imported.

They are forked from one process, which imports these libraries and ours once and does nothing else; neither the plugin
nor the checks, whose asserts pytest rewrites, are in it. What is about the start of a process, what it imports or how
much memory it holds starts one of its own.
"""

from __future__ import annotations

import atexit
import gc
import multiprocessing
import os
import runpy
import shlex
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

IMPORTED = (
    "arviz_stats.base.array",
    "entropy_probe.run",
    "entropy_probe.watching.watcher",
    "pydantic.main",
    "pydantic.type_adapter",
    "pytest",
    "rich.console",
    "torch",
    "torch._decomp.decompositions_for_jvp",
    "torch.func",
    "torch.testing",
    "peft",
    "safetensors.torch",
    "scipy.stats",
    "transformers.models.auto.modeling_auto",
    "transformers.models.auto.tokenization_auto",
    "transformers.models.llama.modeling_llama",
    "transformers.models.qwen2.modeling_qwen2",
    "transformers.trainer_pt_utils",
)
SERVER = multiprocessing.get_context("forkserver")
"""The only one of a process: whoever forks in another way than by `python` asks here, since what the server imports is
said once for all."""
SERVER.set_forkserver_preload(list(IMPORTED))


def python(
    *arguments: str | os.PathLike[str],
    cwd: str | os.PathLike[str] | None = None,
    environment: Mapping[str, str] | None = None,
    timeout: float | None = None,
) -> subprocess.CompletedProcess[str]:
    """`subprocess.run([sys.executable, *arguments], capture_output=True, text=True, …)`.

    The arguments begin with `-m MODULE`, `-c CODE` or a file's name.
    """
    command = [os.fspath(argument) for argument in arguments]
    with tempfile.TemporaryDirectory() as place:
        outputs = [Path(place) / name for name in ("stdout", "stderr")]
        process = SERVER.Process(
            target=_become,
            args=(command, os.fspath(cwd or os.getcwd()), _of_no_worker(environment), outputs, _fresh_path()),
        )
        process.start()
        process.join(timeout)
        if process.exitcode is None:
            process.kill()
            process.join()
            raise subprocess.TimeoutExpired(command, timeout or 0.0)
        code = process.exitcode
        process.close()
        said = [output.read_text(encoding="utf-8", errors="surrogateescape") for output in outputs]
    return subprocess.CompletedProcess([sys.executable, *command], code, *said)


def ranks(
    size: int,
    *arguments: str | os.PathLike[str],
    environment: Mapping[str, str] | None = None,
    timeout: float | None = None,
) -> list[subprocess.CompletedProcess[str]]:
    """So many processes at once, as torch.distributed wants them; on a port of their own, if none is given."""
    given = os.environ if environment is None else environment
    shared = {"WORLD_SIZE": str(size), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), **given}

    def start(rank: int) -> subprocess.CompletedProcess[str]:
        own = shared | {"RANK": str(rank), "LOCAL_RANK": str(rank)}
        return python(*arguments, environment=own, timeout=timeout)

    with ThreadPoolExecutor(size) as threads:
        return list(threads.map(start, range(size)))


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as free:
        return free.getsockname()[1]


def command(line: str, **options: Any) -> subprocess.CompletedProcess[str]:
    """A line of a shell that starts `python` or a script beside it, without pipes and variables."""
    name, *arguments = shlex.split(line)
    script = [] if name == "python" else [Path(sys.executable).parent / name]
    return python(*script, *arguments, **options)


def runs_of(pytester: pytest.Pytester) -> Callable[..., pytest.RunResult]:
    """`pytester.run`, where what is run is `runpytest_subprocess`'s."""
    original = pytester.run

    def run(*arguments: str | os.PathLike[str], **options: Any) -> pytest.RunResult:
        if arguments[:2] != (sys.executable, "-mpytest"):
            return original(*arguments, **options)
        start = time.perf_counter()
        done = python("-m", "pytest", *arguments[2:], timeout=options.get("timeout"))
        print(done.stdout, done.stderr, sep="\n")
        lines = done.stdout.splitlines(), done.stderr.splitlines()
        return pytest.RunResult(done.returncode, *lines, time.perf_counter() - start)

    return run


def _of_no_worker(environment: Mapping[str, str] | None) -> dict[str, str]:
    """What says that this is one of xdist's processes is left out: in those pytest-benchmark measures nothing."""
    given = os.environ if environment is None else environment
    return {name: value for name, value in given.items() if not name.startswith("PYTEST_XDIST")}


@cache
def _fresh_path() -> list[str]:
    """`sys.path` of a Python that was just started, without the folder that comes first."""
    code = "import sys; print(*sys.path[1:], sep='\\n')"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return done.stdout.splitlines()


def _become(
    command: Sequence[str], cwd: str, environment: Mapping[str, str], outputs: Sequence[Path], path: list[str]
) -> None:
    """Be the process that `python *command` would be."""
    for number, output in enumerate(outputs, start=1):
        with output.open("wb") as stream:
            os.dup2(stream.fileno(), number)
    gc.freeze()  # what the libraries hold is not looked through again
    os.chdir(cwd)
    os.environ.clear()
    os.environ.update(environment)
    for name in ("__mp_main__", __name__):
        sys.modules.pop(name, None)
    _spare_from_rewriting()
    first, *rest = command
    try:
        if first == "-m":
            sys.argv, sys.path[:] = rest[:], [cwd, *path]
            runpy.run_module(rest[0], run_name="__main__", alter_sys=True)
        elif first == "-c":
            sys.argv, sys.path[:] = ["-c", *rest[1:]], ["", *path]
            _run_code(rest[0])
        else:
            sys.argv, sys.path[:] = list(command), [str(Path(cwd, first).parent), *path]
            runpy.run_path(first, run_name="__main__")
    finally:
        atexit._run_exitfuncs()


def _run_code(code: str) -> None:
    main = sys.modules["__main__"] = ModuleType("__main__")
    exec(compile(code, "<string>", "exec"), main.__dict__)  # noqa: S102 (a test's own)


def _spare_from_rewriting() -> None:
    """pytest warns of modules with plugins that were imported before it could rewrite their asserts."""
    for name in ("anyio", "_hypothesis_globals", "hypothesis", "jaxtyping"):
        if name in sys.modules:
            sys.modules[name].__doc__ = "PYTEST_DONT_REWRITE"
