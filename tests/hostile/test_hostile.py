"""Every hostile checkpoint through all three doors: `load_checkpoint`, the command line, and the plugin.

Each ends in its one line with the right exit code in under ten seconds, or loads; nothing of it is executed, nothing
is written into it, and it has no traceback to show.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest

import forked
from entropy_probe import load_checkpoint
from entropy_probe.__main__ import EXIT_FAILED, EXIT_USAGE, main
from entropy_probe.model.checkpoint.inspect import inspect_checkpoint
from hostile.catalogue import CHECKPOINTS
from hostile.damage import MARKER, write_good
from rights import like_any_user

MOST_SECONDS, BUSY = 10.0, 3.0  # of the processor; the clock may be slower on a machine that does more at once
OTHERS = ("anyio", "benchmark", "hypothesispytest", "jaxtyping")
# Seen in the loaded model only: values and names of the weights, and where the adapter goes.
UNSEEN = {"weights-inf"}
DAMAGED = [name for name, case in CHECKPOINTS.items() if case.line is not None]
HERE = Path(__file__)


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> dict[bool, Path]:
    """An adapter and a full model, whole, each with its base."""
    root = tmp_path_factory.mktemp("good")
    return {full: write_good(root / str(full), full=full).parent for full in (False, True)}


def damaged(good: dict[bool, Path], name: str, place: Path) -> Path:
    """The checkpoint of that name, in `place`."""
    folder = Path(shutil.copytree(good[CHECKPOINTS[name].full], place / name)) / "checkpoint-100"
    CHECKPOINTS[name].do(folder)
    return folder


def now() -> tuple[float, float]:
    return time.process_time(), time.perf_counter()


def require_quick(start: tuple[float, float]) -> None:
    of_processor, of_clock = (after - before for after, before in zip(now(), start, strict=True))
    assert of_processor < MOST_SECONDS
    assert of_clock < BUSY * MOST_SECONDS


def state_of(folder: Path) -> dict[str, tuple[int, int]]:
    """Names below the folder with size and time, links not followed."""
    paths = list(folder.rglob("*")) if folder.is_dir() else []
    return {str(p.relative_to(folder)): (p.lstat().st_size, p.lstat().st_mtime_ns) for p in (*paths, folder)}


@pytest.mark.parametrize("name", list(CHECKPOINTS))
def test_it_loads_or_ends_in_one_line(
    good: dict[bool, Path], name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    case, folder = CHECKPOINTS[name], damaged(good, name, tmp_path)
    before = state_of(tmp_path)
    capsys.readouterr()  # of making it
    start = now()
    if case.line is None:
        assert re.search(case.says, " ".join(load_checkpoint(folder).info.warnings) or "steps differ: 7 to 100")
        assert re.search(case.says, " ".join(inspect_checkpoint(folder).warnings))
    else:
        code = main(["run", str(folder)])
        assert code == (EXIT_FAILED if folder.is_dir() else EXIT_USAGE)
        (line,) = capsys.readouterr().err.splitlines()
        assert re.search(r"^entropy-probe: [^;]+: .*; .+$", line)
        assert re.search(case.line, line)
    require_quick(start)
    start = now()
    code = main(["inspect", str(folder)])
    require_quick(start)
    assert code == (EXIT_USAGE if not folder.is_dir() else int(case.line is not None and name not in UNSEEN))
    captured = capsys.readouterr()
    assert len(captured.err.splitlines()) == int(code == EXIT_USAGE)
    assert [line for line in captured.out.splitlines() if line.startswith("problem: ")] or code != EXIT_FAILED
    assert not list(tmp_path.rglob(MARKER))
    assert state_of(tmp_path) == before


def session(cwd: Path, *args: str) -> tuple[int, str]:
    """pytest with our plugin and xdist only, in a process of its own: exit code and all that it wrote."""
    wide = {**os.environ, "COLUMNS": "1000"}  # lines that are read here are not cut
    without = (f"-pno:{name}" for name in OTHERS)
    done = forked.python("-m", "pytest", *without, *args, cwd=cwd, environment=wide, timeout=500)
    return done.returncode, done.stdout + done.stderr


@pytest.mark.parametrize("workers", [(), ("-n2",)], ids=["alone", "-n 2"])
def test_in_a_session_each_fails_one_check(good: dict[bool, Path], workers: tuple[str, ...], tmp_path: Path) -> None:
    names = [name for name in DAMAGED if damaged(good, name, tmp_path).is_dir()]
    options = [f"--probe-checkpoint={name}={tmp_path / name / 'checkpoint-100'}" for name in names]
    (tmp_path / "cwd").mkdir()
    # of so many checkpoints some of the checks that are skipped will do
    which = "acceptance and not (invariance or ustatistic or importance or prediction or sequences)"
    code, output = session(
        tmp_path / "cwd", *options, "-m", which, "--probe-budget=smoke", "-rfs", "-q", "--durations=5", *workers
    )
    assert code == pytest.ExitCode.TESTS_FAILED
    assert "Traceback" not in output
    assert "INTERNALERROR" not in output
    line_of_pytest = r"^FAILED probe-checks/test_checkpoint.py::test_loads\[(.+?)\] - Failed: (.*)$"
    failed = dict(re.findall(line_of_pytest, output, re.M))
    assert set(failed) == set(names)
    assert len(re.findall(r"^FAILED ", output, re.M)) == len(names)
    for name, line in failed.items():
        assert re.search(CHECKPOINTS[name].line or "", line), name
    assert set(re.findall(r"^SKIPPED .*?: (.*)$", output, re.M)) == {"checkpoint not loaded"}
    seconds = sorted(float(taken) for taken in re.findall(r"^([\d.]+)s (?:call|setup)", output, re.M))
    assert seconds[:-2][-1] < BUSY * MOST_SECONDS  # the first of each process imports transformers too
    assert not re.search(r"^(ERROR|.*\d+ (passed|error))", output, re.M)
    assert not list(tmp_path.rglob(MARKER))


def test_the_session_says_that_an_adapter_does_nothing(good: dict[bool, Path], tmp_path: Path) -> None:
    folder = damaged(good, "adapter-b-0", tmp_path)
    _, output = session(tmp_path, f"--probe-checkpoint={folder}", "probe-checks/test_checkpoint.py::test_loads")
    assert "every lora_B is zero: the adapter does nothing" in output


ODD_NAMES = ("a [1]", "b::c", "d e", "[x]", "f*g", "h;i", "é")


def test_odd_names(good: dict[bool, Path], tmp_path: Path) -> None:
    """Folders as a shell and a glob hand them over; the last one is not UTF-8, which safetensors cannot open."""
    for name in ODD_NAMES:
        shutil.copytree(good[False], tmp_path / "runs" / name)
        (tmp_path / "runs" / name / "checkpoint-100" / "optimizer.pt").write_bytes(b"")
    os.rename(tmp_path / "runs" / "é" / "checkpoint-100", os.fsencode(tmp_path / "runs" / "é") + b"/checkpoint-\xff")
    named = [f"--probe-checkpoint={tmp_path / 'runs' / name / 'checkpoint-100'}" for name in ODD_NAMES[:-1]]
    for given, *workers in ((named,), ([f"--probe-checkpoint={tmp_path}/runs/*/checkpoint-*"], "-n2")):
        code, output = session(tmp_path, *given, "-m", "acceptance", "-q", "-rf", *workers)
        assert code == pytest.ExitCode.TESTS_FAILED, output
        assert len(re.findall(r"^FAILED .*test_loads\[", output, re.M)) == len(named) + bool(workers), output
        assert output.count("optimizer.pt: cannot be read") >= len(named), output
        assert not re.search("Traceback|INTERNALERROR", output)


BOTH_COMMANDS = """
import sys
from entropy_probe.__main__ import main
codes = [main([command, path]) for path in sys.argv[1:] for command in ("run", "inspect")]
print("codes", *codes)
"""
UNREADABLE = (
    "optimizer.pt",
    "adapter_model.safetensors",
    "adapter_config.json",
    "tokenizer.json",
    ".",
    "../base",
    "..",
)


def test_what_may_not_be_read(good: dict[bool, Path], tmp_path: Path) -> None:
    folders = []
    for i, name in enumerate(UNREADABLE):
        folder = Path(shutil.copytree(good[False], tmp_path / str(i))) / "checkpoint-100"
        folders.append(folder)
        (folder / name).chmod(0)
    try:
        done = subprocess.run(
            [sys.executable, "-c", BOTH_COMMANDS, *map(str, folders)],
            capture_output=True,
            text=True,
            check=False,
            preexec_fn=like_any_user,
        )
    finally:
        for folder, name in zip(folders, UNREADABLE, strict=True):
            Path(os.path.normpath(folder / name)).chmod(0o755)
    assert "Traceback" not in done.stderr
    (codes,) = [line.split()[1:] for line in done.stdout.splitlines() if line.startswith("codes")]
    assert codes == ["1"] * 12 + ["4"] * 2, done.stderr + done.stdout
    assert all(re.search(r"^entropy-probe: [^;]+: .*; .+$", line) for line in done.stderr.splitlines())
    assert len(done.stderr.splitlines()) == len(UNREADABLE) + 1  # inspect writes its problems to standard output


MISSING = ("nowhere", "file", "loop", "x" * 300, "~nobody-there/x")


@pytest.mark.parametrize("command", ["run", "inspect"])
@pytest.mark.parametrize("name", MISSING)
def test_no_folder_is_exit_code_4(
    tmp_path: Path, command: str, name: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("file").touch()
    Path("loop").symlink_to("loop")
    assert main([command, name]) == EXIT_USAGE
    (line,) = capsys.readouterr().err.splitlines()
    assert line.endswith("; give a checkpoint folder")


def test_the_process_itself(tmp_path: Path) -> None:
    """Nothing is written on the way out either."""
    done = subprocess.run(
        [sys.executable, "-m", "entropy_probe", "run", "nowhere"], cwd=tmp_path, capture_output=True, check=False
    )
    assert (done.returncode, done.stdout, len(done.stderr.splitlines())) == (EXIT_USAGE, b"", 1)
