"""Options become paths and names, or one line that says what is wrong."""

from __future__ import annotations

import sys
from fnmatch import fnmatch
from pathlib import Path

import pytest

from pytest_entropy_probe.settings import read_settings
from pytest_entropy_probe.targets import find_targets

# A user's own test that needs no more of a checkpoint than its folder: nothing is loaded.
OWN = "def test_own(probe_checkpoint): print('FOLDER', probe_checkpoint)"


@pytest.fixture
def own(pytester: pytest.Pytester) -> pytest.Pytester:
    pytester.makepyfile(test_own=OWN)
    return pytester


def _folders(*names: str) -> None:
    for name in names:
        Path(name).mkdir(parents=True)


@pytest.mark.parametrize(
    ("asked", "meant"),
    [
        ("runs/*/checkpoint-*", "runs/checkpoint-*"),
        ("run=runs/*/checkpoint-*", "runs/checkpoint-*"),
        ("many/checkpoint-*", "many/*/checkpoint-*"),
        ("many/*/*/checkpoint-*", "many/*/checkpoint-*"),
        ("runs/*/step-*", ""),
        ("*/*/checkpoint-*", ""),
    ],
)
def test_a_pattern_that_fits_nothing_names_one_that_does(tmp_path: Path, asked: str, meant: str) -> None:
    """One run where several were meant, or the reverse."""
    for name in ("runs/checkpoint-3", "runs/checkpoint-6", "many/a/checkpoint-1"):
        (tmp_path / name).mkdir(parents=True)
    (tmp_path / "deep").mkdir()
    start = tmp_path if asked[0] != "*" else tmp_path / "deep"
    with pytest.raises(pytest.UsageError) as caught:
        find_targets([asked], start, "--probe-checkpoint")
    said = str(caught.value)
    assert said.endswith(f"; give '{meant}', which fits folders that are there" if meant else " in NAME")
    if meant:
        find_targets([meant], tmp_path, "--probe-checkpoint")


@pytest.mark.parametrize(
    ("args", "complaint"),
    [
        (["--probe-checkpoint=nowhere"], "--probe-checkpoint: no such folder: *nowhere; give*"),
        (["--probe-checkpoint=no*where"], "--probe-checkpoint: no such folder: *where; give*"),
        (["--probe-checkpoint=test_own.py"], "--probe-checkpoint: no such folder: *test_own.py; give*"),
        (["--probe-checkpoint=a", "--probe-config=no.yaml"], "--probe-config: no such file: *no.yaml; give*"),
        (["--probe-checkpoint=a", "--probe-rollouts=a"], "--probe-rollouts: no such file: */a; give*"),
        (["--probe-checkpoint=a", "--probe-update-rollouts=x"], "--probe-update-rollouts: no such file: */x; give*"),
        (["--probe-checkpoint=a", "--probe-prompts=x"], "--probe-prompts: no such file or folder: */x; give*"),
        (["--probe-checkpoint=a", "--probe-base-model=x"], "--probe-base-model: no such folder: */x; give*"),
        (["--probe-checkpoint=a", "--probe-offload-folder=x"], "--probe-offload-folder: no such folder: */x; give*"),
        (
            ["--probe-checkpoint=a", "--probe-offload-folder=a"],
            "--probe-offload-folder: */a is in the checkpoint */a; give*",
        ),
        (["--probe-checkpoint=a", "--probe-seed=-1"], "--probe-seed: got '-1'; give*"),
        (["--probe-checkpoint=a", "--probe-json=a"], "--probe-json: */a is a folder; give*"),
        (["--probe-checkpoint=a", "--probe-checkpoint=b", "--probe-json=f"], "--probe-json: */f is a file; give*"),
        (
            ["--probe-checkpoint=a", "--probe-plot=f.pdf"],
            "--probe-plot: */f.pdf: is not a kind *; end its name in *",
        ),
        (["--probe-checkpoint=a", "--probe-plot=a"], "--probe-plot: */a is a folder; give*figure.png"),
        (["--probe-checkpoint=a", "--probe-checkpoint=b", "--probe-plot=f"], "--probe-plot: */f is a file; give*"),
        (["--probe-checkpoint=a", "-oprobe_plot=f.pdf"], "probe_plot (ini): */f.pdf: is not a kind *"),
        (["--probe-checkpoint=n=a", "--probe-checkpoint=n=b"], "--probe-checkpoint: the name 'n' is given to 2*"),
        (["--probe-checkpoint=a", "-oprobe_rollouts=x"], "probe_rollouts (ini): no such file: */x; give*"),
    ],
)
def test_usage_errors_name_option_value_and_remedy(own: pytest.Pytester, args: list[str], complaint: str) -> None:
    _folders("a", "b")
    Path("f").touch()
    with pytest.raises(pytest.UsageError) as error:
        read_settings(own.parseconfig("test_own.py", *args))
    assert fnmatch(str(error.value), complaint)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "args",
    [
        ["--probe-checkpoint=nowhere"],
        ["--probe-checkpoint=a", "--probe-config=bad.yaml"],
        ["--probe-checkpoint=a", "--probe-plot=figure.pdf"],
        ["--probe-checkpoint=a", "--probe-device-map=best"],
    ],
)
def test_usage_errors_end_with_exit_code_4_and_one_line(own: pytest.Pytester, args: list[str]) -> None:
    _folders("a")
    Path("bad.yaml").write_text("no_such_key: 1\n")
    result = own.runpytest_subprocess("test_own.py", *args)
    assert result.ret == pytest.ExitCode.USAGE_ERROR
    (line,) = filter(None, result.errlines)
    complaints = ["ERROR: *nowhere; *", "ERROR: *bad.yaml: *no_such_key*; *", "ERROR: *figure.pdf: *; *"]
    complaints.append("ERROR: configuration: `device_map`: got 'best', expected one of auto, *; correct the value")
    assert any(fnmatch(line, complaint) for complaint in complaints)


def test_a_figure_without_matplotlib_is_refused_at_the_start(
    own: pytest.Pytester, monkeypatch: pytest.MonkeyPatch
) -> None:
    _folders("a")
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(pytest.UsageError, match=r"^--probe-plot: .*; pip install pytest-entropy-probe\[plots\]$"):
        read_settings(own.parseconfig("test_own.py", "--probe-checkpoint=a", "--probe-plot=figure.svg"))


def test_where_figures_go(own: pytest.Pytester) -> None:
    _folders("a", "b")
    one = read_settings(own.parseconfig("test_own.py", "--probe-checkpoint=a", "--probe-plot=figure.svg"))
    assert one.plot_file("a") == own.path / "figure.svg"
    two = read_settings(
        own.parseconfig("test_own.py", "--probe-checkpoint=a", "--probe-checkpoint=b", "--probe-plot=figures")
    )
    assert two.plot_file("b") == own.path / "figures" / "b.png"


@pytest.mark.parametrize(
    ("values", "names"),
    [
        (["a/x"], ["x"]),
        (["mine=a/x"], ["mine"]),
        (["lr=3/x"], ["x"]),  # a folder of that name exists, so this is no NAME=PATH
        (["a/x", "a/x"], ["x"]),
        (["one=a/x", "two=a/x"], ["one", "two"]),
        (["r*/checkpoint-*"], ["r1/checkpoint-5", "checkpoint-10", "r2/checkpoint-5"]),
        (["r1/checkpoint-*"], ["checkpoint-5", "checkpoint-10"]),
        (["all=r1/checkpoint-*"], ["all/checkpoint-5", "all/checkpoint-10"]),
        (["~/a/x"], ["x"]),
        (["demo", "also=demo"], ["demo", "also"]),
    ],
)
def test_names(own: pytest.Pytester, values: list[str], names: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(own.path))
    _folders("a/x", "lr=3/x", "r1/checkpoint-5", "r1/checkpoint-10", "r2/checkpoint-5")
    config = own.parseconfig("test_own.py", *(f"--probe-checkpoint={value}" for value in values))
    settings = read_settings(config)
    assert [target.name for target in settings.targets] == names
    assert all(target.path.is_dir() for target in settings.targets)


def test_ini_keys_start_at_rootdir_and_give_way_to_the_command_line(
    own: pytest.Pytester, monkeypatch: pytest.MonkeyPatch
) -> None:
    _folders("a", "b", "sub")
    own.makeini("[pytest]\nprobe_checkpoint =\n  a\n  second=b\n")
    monkeypatch.chdir("sub")
    from_ini = own.runpytest_subprocess("-rP", "../test_own.py")
    from_ini.assert_outcomes(passed=2)
    from_ini.stdout.fnmatch_lines(
        ["entropy-probe *: 2 checkpoints: a, second; a path was given, add probe-checks *", f"FOLDER {own.path / 'b'}"]
    )
    from_command_line = own.runpytest_subprocess("-rP", "../test_own.py", "--probe-checkpoint=../b")
    from_command_line.assert_outcomes(passed=1)
    from_command_line.stdout.fnmatch_lines(["entropy-probe *: b (*", f"FOLDER {own.path / 'b'}"])


def test_a_separate_value_must_not_move_rootdir(pytester: pytest.Pytester, monkeypatch: pytest.MonkeyPatch) -> None:
    _folders("elsewhere/ckpt", "repo/below", "repo/sub")
    Path("repo/pytest.ini").write_text("[pytest]\n")
    Path("repo/test_own.py").write_text(OWN)
    monkeypatch.chdir("repo")
    outside = pytester.path / "elsewhere" / "ckpt"
    result = pytester.runpytest_subprocess("--probe-checkpoint", str(outside))
    assert result.ret == pytest.ExitCode.USAGE_ERROR
    result.stderr.fnmatch_lines([f"ERROR: *write --probe-checkpoint={outside}"])
    assert not list((pytester.path / "elsewhere").rglob(".pytest_cache"))
    assert not list(outside.iterdir())
    for args in ([f"--probe-checkpoint={outside}"], ["--probe-checkpoint", "below"]):
        result = pytester.runpytest_subprocess("test_own.py", *args)
        result.assert_outcomes(passed=1)
        result.stdout.fnmatch_lines(["rootdir: */repo"])
    monkeypatch.chdir("sub")
    pytester.runpytest_subprocess("../test_own.py", "--probe-checkpoint", "../below").assert_outcomes(passed=1)


def test_a_run_folder_stands_for_its_newest_checkpoint(own: pytest.Pytester) -> None:
    _folders("run/checkpoint-9", "run/checkpoint-10", "run/checkpoint-11")
    for n in (9, 10):
        Path(f"run/checkpoint-{n}/optimizer.pt").touch()
    result = own.runpytest_subprocess("--probe-checkpoint=run", "test_own.py", "-s")
    result.stdout.fnmatch_lines([
        "entropy-probe *: run (run/checkpoint-10)*",
        "  checkpoint-10 is the newest of 3 checkpoints in *run; 1 newer without optimizer state",
        "*FOLDER */run/checkpoint-10*",
    ])  # fmt: skip
