"""The suite in anyone's repository: every option that changes what is collected, in which order, and where."""

from __future__ import annotations

import ast
import json
import os
import subprocess
from pathlib import Path

import pytest

import entropy_probe_checks
from matrix.conftest import OWN, Repository

FAMILIES = {
    file.stem: {f"{node.name}[demo]" for node in ast.parse(file.read_text()).body if isinstance(node, ast.FunctionDef)}
    for file in Path(entropy_probe_checks.__file__).parent.glob("test_*.py")
    if file.stem not in ("test_golden", "test_gate", "test_benchmark")  # collected on request
}
SHIPPED = set().union(*FAMILIES.values())
SCALING = FAMILIES["test_scaling"]
PARAM = "probe-checks/test_scaling.py::test_param_scaling[demo]"


@pytest.mark.parametrize(
    "args",
    [
        (),
        ("--ff",),
        ("--lf",),
        ("-p", "no:cacheprovider"),
        ("-p", "no:xdist"),
        ("-s",),
        ("-W", "error"),
        ("--import-mode=prepend",),
        *(("-n2", f"--dist={mode}") for mode in ("load", "loadscope", "loadfile", "loadgroup", "worksteal", "no")),
    ],
    ids=" ".join,
)
def test_everything_runs(repository: Repository, args: tuple[str, ...]) -> None:
    ran = repository.run(*args, measure=args in ((), ("-W", "error"), ("-n2", "--dist=load")))
    assert ran.code == 0, ran.output
    assert ran.own == OWN
    assert ran.shipped == SHIPPED
    assert "passed" in ran.outcomes["test_measures[demo]"]


def test_every_worker_with_dist_each(repository: Repository) -> None:
    ran = repository.run("-n2", "--dist=each")
    assert ran.code == 0, ran.output
    assert ran.shipped == SHIPPED
    assert ran.own == OWN


@pytest.mark.parametrize(
    ("args", "own", "shipped"),
    [
        (("-k", "scaling"), set(), SCALING),
        (("-k", "scaling or double"), {"check_double"}, SCALING),
        (("-m", "acceptance"), set(), SHIPPED),
        (("-m", "scaling"), set(), SCALING),
        (("-m", "not acceptance"), OWN, set()),
        (("-m", "own"), {"check_marked"}, set()),
        (("--deselect", PARAM), OWN, SHIPPED - {"test_param_scaling[demo]"}),
        (("--deselect", "probe-checks/test_scaling.py"), OWN, SHIPPED - SCALING),
        (("tests/deep",), {"check_deep"}, set()),
        ((PARAM,), set(), {"test_param_scaling[demo]"}),
        (("probe-checks/test_scaling.py",), set(), SCALING),
        (("probe-checks",), set(), SHIPPED),
        ((PARAM, "tests/deep"), {"check_deep"}, {"test_param_scaling[demo]"}),
        (("-n2", PARAM), set(), {"test_param_scaling[demo]"}),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, tuple) else None,
)
def test_selection(repository: Repository, args: tuple[str, ...], own: set[str], shipped: set[str]) -> None:
    ran = repository.run(*args)
    assert ran.code == 0, ran.output
    assert ran.own == own
    assert ran.shipped == shipped


@pytest.mark.parametrize("where", ["probe-checks/test_scaling.py", "../../probe-checks/test_scaling.py"])
def test_selection_from_a_subfolder(repository: Repository, where: str) -> None:
    ran = repository.run(where, cwd="tests/deep")
    assert ran.code == 0, ran.output
    assert ran.shipped == SCALING
    assert not ran.own


def test_collect_only_measures_nothing(repository: Repository) -> None:
    ran = repository.run("--co", "-q")
    assert ran.code == 0, ran.output
    assert f"{PARAM}\n" in ran.output
    assert "tests/check_own.py::check_double\n" in ran.output
    assert not ran.outcomes


def test_doctests_of_the_repository(repository: Repository) -> None:
    ran = repository.run("--doctest-modules", "probe", "tests", "probe-checks")
    assert ran.code == 0, ran.output
    assert "probe.core.double" in ran.outcomes
    assert ran.own == OWN
    assert ran.shipped == SHIPPED


def test_last_failed_and_first_failure(repository: Repository) -> None:
    """A limit that cannot be met fails one check, beside a failure of the repository's own: --lf then runs these two
    alone, --ff first, -x stops at the first."""
    small = repository.folder / "small.yaml"
    small.write_text(small.read_text() + "limits: {param_scaling: 0.5}\n")
    (repository.folder / "tests" / "check_fails.py").write_text("def check_fails(): assert 1 > 2\n")
    failing = {"check_fails", "test_param_scaling[demo]"}
    first = repository.run()
    assert first.code == 1
    assert {name for name, outcome in first.outcomes.items() if outcome == "failed"} == failing
    assert "param_scaling: 1 > 0.5" in first.output
    again = repository.run("--lf")
    assert again.code == 1
    assert set(again.outcomes) == failing
    ordered = repository.run("--ff")
    assert set(list(ordered.outcomes)[:2]) == failing
    assert ordered.shipped == SHIPPED
    stopped = repository.run("--ff", "-x")
    assert len(stopped.outcomes) == 1
    assert set(stopped.outcomes) < failing


def test_a_run_without_its_suite_is_an_error(repository: Repository) -> None:
    """The checks are missing from the installation: the user's tests alone must not make the run green."""
    (repository.folder / "entropy_probe_checks").mkdir()
    (repository.folder / "entropy_probe_checks" / "__init__.py").touch()
    (repository.folder / "entropy_probe_checks" / "thresholds.py").write_text(
        "LIMITS = {}\ndef require_known(*_, **__): pass\ndef in_force(_): return {}\n"
    )
    ran = repository.run()
    assert ran.code not in (0, 5), ran.output
    assert "no checks are installed" in ran.output


def test_without_a_checkpoint_the_repository_is_as_before(repository: Repository) -> None:
    ran = repository.run(checkpoint=None)
    assert ran.code == 0, ran.output
    assert ran.own == OWN
    assert not ran.shipped
    assert "entropy" not in ran.output.replace("entropy-probe-0.1.0", "")


def test_checkpoint_is_loaded_once_whatever_the_workers(repository: Repository) -> None:
    """Three checkpoints: every check once for each, one load and one measurement for each, the same numbers.

    Alone in both Pythons, and with xdist, which is the same in both, once by two workers and once by three.
    """
    (repository.folder / "conftest.py").write_text(
        "import entropy_probe.model.checkpoint as c, os\n"
        "original = c.load_checkpoint\n"
        "def counted(path, *a, **k):\n"
        f"    open({str(repository.folder / 'loads')!r}, 'a').write(f'{{os.getpid()}}\\n')\n"
        "    return original(path, *a, **k)\n"
        "c.load_checkpoint = counted\n"
    )
    with (repository.folder / "small.yaml").open("a") as small:
        small.write("invariance: {max_examples: 2}\n")
    reports = {}
    more = ("--probe-checkpoint=b=demo", "--probe-checkpoint=c=demo", "--probe-no-cache", "-W", "default")
    more += ("--probe-budget=smoke",)  # what is measured six times is the same in every other test of this file
    workers = ("-n2",) if repository.python.parents[1].name == "new" else ("-n3", "--dist=worksteal")
    for name, args in {"alone": (), "workers": workers}.items():
        loads = repository.folder / "loads"
        loads.unlink(missing_ok=True)
        ran = repository.run(
            *args, *more, f"--probe-json={repository.folder / name}", checkpoint="a=demo", measure=True
        )
        assert ran.code == 0, ran.output
        assert len(ran.shipped) == 3 * len(SHIPPED)
        assert len(loads.read_text().split()) == 3
        reports[name] = {
            file.stem: json.loads(file.read_text()) for file in sorted((repository.folder / name).glob("*.json"))
        }
    for name, by_checkpoint in reports.items():
        assert list(by_checkpoint) == ["a", "b", "c"]
        for checkpoint, report in by_checkpoint.items():
            for volatile in ("timing", "memory", "environment"):
                report.pop(volatile)
            report["checkpoint"].pop("name")
            report["verdicts"].sort(key=lambda verdict: verdict["criterion"])
            assert report == reports["alone"]["a"], (name, checkpoint)


def test_rootdir_trap(repository: Repository, tmp_path: Path) -> None:
    """A path with a blank before it, outside the repository, would become rootdir: exit 4, naming the `=` form."""
    outside = tmp_path / "elsewhere" / "ckpt"
    outside.mkdir(parents=True)
    ran = repository.run("--probe-checkpoint", str(outside), checkpoint=None)
    assert ran.code == 4
    assert f"--probe-checkpoint={outside}" in ran.output
    inside = repository.folder / "runs" / "ckpt"
    inside.mkdir(parents=True)
    for form in (["--probe-checkpoint", "runs/ckpt"], ["--probe-checkpoint=runs/ckpt"]):
        ran = repository.run(*form, "--co", "-q", checkpoint=None)
        assert ran.code == 0, ran.output
        assert "probe-checks/test_checkpoint.py::test_loads[ckpt]" in ran.output
    assert list(inside.iterdir()) == []
    assert list(outside.iterdir()) == []


HEAVY = {"numpy", "torch", "transformers", "pydantic", "rich", "jaxtyping", "scipy"}
SPY = """
import sys

def pytest_unconfigure():
    print("IMPORTED", *sorted({name.partition(".")[0] for name in sys.modules}))
"""


def test_a_run_without_a_checkpoint_imports_nothing_heavy(repository: Repository) -> None:
    """Neither through us nor through the plugins of what we require, which are all on."""
    (repository.folder / "spy.py").write_text(SPY)
    environment = {key: value for key, value in os.environ.items() if not key.startswith("PYTEST")}
    command = [repository.python, "-m", "pytest", "--co", "-q", "-p", "spy"]
    done = subprocess.run(command, cwd=repository.folder, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    imported = set(done.stdout.partition("IMPORTED")[2].split())
    assert {"pytest_entropy_probe", "pytest_benchmark"} <= imported
    assert not HEAVY & imported
