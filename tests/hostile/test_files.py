"""Rollouts and configurations that are no such files, by command line and plugin: one line, exit code 4."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable
from pathlib import Path

import pytest

from entropy_probe.__main__ import EXIT_USAGE, main
from entropy_probe.demo import checkpoint_path
from hostile.test_hostile import now, require_quick, session

GOOD = json.dumps({"prompt_ids": [5, 6], "response_ids": [[7, 8], [8]], "rewards": [1.0, 0.0]})
Write = Callable[[Path], object]


def holding(content: str | bytes) -> Write:
    return lambda path: path.write_bytes(content if isinstance(content, bytes) else content.encode())


def _laughs(merge: bool) -> str:
    """A billion laughs: lists of lists, or sections merged into sections."""
    one = (lambda name: f"<<: [{', '.join([name] * 9)}]") if merge else (lambda name: f"[{', '.join([name] * 9)}]")
    first = "a0: &a0 {seed: 1}\n" if merge else "a0: &a0 [ha]\n"
    form = "a{n}: &a{n} {{{one}}}\n" if merge else "a{n}: &a{n} {one}\n"
    return first + "".join(form.format(n=n, one=one(f"*a{n - 1}")) for n in range(1, 12))


ANY: dict[str, Write] = {
    "binary": holding(bytes(range(256)) * 40),
    "nul": holding(bytes(1000)),
    "directory": Path.mkdir,
    "pipe": os.mkfifo,
    "endless": lambda path: path.symlink_to("/dev/zero"),
    "loop": lambda path: path.symlink_to(path),
    "deep": holding("[" * 100_000),
    "one line": holding("x" * 5_000_000),
    "surrogate": holding(b'{"prompt": "\xed\xa0\x80"}'),
}
ROLLOUTS: dict[str, Write] = {
    **ANY,
    "empty": holding(""),
    "bom": holding(b"\xef\xbb\xbf" + GOOD.encode()),
    "nan": holding(GOOD + "\n" + GOOD.replace("1.0", "NaN")),
    "one prompt": holding(GOOD),
    "huge integer": holding(GOOD + "\n" + GOOD.replace("1.0", "9" * 5000)),
    "huge token": holding(GOOD + "\n" + GOOD.replace("[8]", f"[{10**300}]")),
    "not rectangular": holding(GOOD + "\n" + GOOD.replace("[[7, 8], [8]]", "[[7]]")),
}
YAML: dict[str, Write] = {
    **ANY,
    "laughs": holding(_laughs(merge=False)),
    "merged laughs": holding(_laughs(merge=True)),
    "call": holding("budget: !!python/object/apply:os.mkdir [executed]"),
    "name": holding("budget: !!python/name:os.system"),
    "nan": holding("generation: {temperature: .nan}"),
    "huge integer": holding("batch: {seed: -0x" + "f" * 9000 + "}"),
    "list": holding("- 1"),
    "key": holding("{[1]: 2}"),
    "no text": holding("1: 2"),
}
CASES = [("--rollouts", name, write) for name, write in ROLLOUTS.items()]
CASES += [("--config", name, write) for name, write in YAML.items()]


@pytest.mark.parametrize(("option", "name", "write"), CASES, ids=[f"{option[2:]}-{name}" for option, name, _ in CASES])
def test_one_line_and_exit_code_4(
    option: str, name: str, write: Write, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "given")
    start = now()
    assert main(["run", str(checkpoint_path()), option, "given"]) == EXIT_USAGE
    require_quick(start)
    (line,) = capsys.readouterr().err.splitlines()
    assert re.search(r"^entropy-probe: (given(:\d+)?: .*|--\w+: no such file: given); .+$", line)
    assert len(line) < 700
    assert not (tmp_path / "executed").exists()


IN_A_SESSION = [
    ("config", "merged laughs", ()),
    ("config", "call", ("-n2",)),
    ("config", "pipe", ()),
    ("rollouts", "endless", ()),
]


@pytest.mark.parametrize(("option", "name", "workers"), IN_A_SESSION, ids=lambda value: str(value))
def test_in_a_session(option: str, name: str, workers: tuple[str, ...], tmp_path: Path) -> None:
    (YAML if option == "config" else ROLLOUTS)[name](tmp_path / "given")
    code, output = session(tmp_path, "--probe-checkpoint=demo", f"--probe-{option}=given", "-m", "acceptance", *workers)
    assert code == EXIT_USAGE
    assert not re.search("Traceback|INTERNALERROR", output)
    assert len([line for line in output.splitlines() if "given" in line and "; " in line]) == 1
    assert not (tmp_path / "executed").exists()
