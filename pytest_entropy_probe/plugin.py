"""The hooks of every run: options, ini keys, markers. With a checkpoint they wake the rest.

Without one this file, `names.py` and `fixtures.py` are all that is imported: every run of pytest
in the environment pays for them. PYTEST_DONT_REWRITE: nothing here asserts.
"""

from __future__ import annotations

import os
import shlex
import sys
from pathlib import Path

import pytest

from pytest_entropy_probe import fixtures
from pytest_entropy_probe.names import FLAGS, GOLDEN_FIXTURE, MARKERS, OPTIONS, REPEATABLE, option

pytest.register_assert_rewrite("entropy_probe_checks")


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("entropy-probe", "entropy probe of training checkpoints")
    for key, (metavar, _, text) in OPTIONS.items():
        name, dest = option(key), f"probe_{key}"
        if key in REPEATABLE:
            group.addoption(name, dest=dest, action="append", metavar=metavar, help=text)
            parser.addini(dest, text, type="linelist", default=[])
        else:
            group.addoption(name, dest=dest, metavar=metavar, help=text)
            parser.addini(dest, text, type="string", default="")
    for key, text in FLAGS.items():
        group.addoption(option(key), dest=f"probe_{key}", action="store_true", help=text)
        parser.addini(f"probe_{key}", text, type="bool", default=False)
    group.addoption(
        "--probe-explain",
        metavar="CRITERION",
        help="print what it measures, where its limit comes from, what a failure means ('all' for every one), and exit",
    )


def pytest_cmdline_main(config: pytest.Config) -> int | None:
    name = config.getoption("probe_explain")
    if name is not None:
        from pytest_entropy_probe.shown.explain import explanation

        encoding = getattr(sys.stdout, "encoding", None) or "ascii"
        print(explanation(name).encode(encoding, "replace").decode(encoding))
        return 0
    follows = _is_follower(config)
    if _wants_plan(config):
        from pytest_entropy_probe.dry_run import dry_run

        return 0 if follows else dry_run(config)
    if follows:
        from pytest_entropy_probe.follower import follow

        return follow(config)
    return None


def _wants_plan(config: pytest.Config) -> bool:
    """Without a checkpoint the option is refused in its place (`_refuse_checks`)."""
    asked = config.getoption("probe_dry_run") or config.getini("probe_dry_run")
    return bool(asked) and _checkpoints_given(config)


def _checkpoints_given(config: pytest.Config) -> bool:
    return bool(config.getoption("probe_checkpoint") or config.getini("probe_checkpoint"))


def _is_follower(config: pytest.Config) -> bool:
    """Whether torchrun started this process to measure with rank 0 (`follower.py`)."""
    options = config.known_args_namespace
    if "TORCHELASTIC_RUN_ID" not in os.environ or options.help or options.version:
        return False
    if not _checkpoints_given(config):
        return False
    from entropy_probe.processes import torchrun

    return torchrun.rank() > 0


@pytest.hookimpl(tryfirst=True)
def pytest_load_initial_conftests(early_config: pytest.Config) -> None:
    """Stop where pytest mistook the value of an option for the place of the tests."""
    if _is_follower(early_config):
        from pytest_entropy_probe.follower import silence

        silence()
    given = shlex.split(os.environ.get("PYTEST_ADDOPTS", ""))
    given += map(str, early_config.invocation_params.args)
    if any(arg.startswith("--probe-") and "=" not in arg for arg in given):
        from pytest_entropy_probe.rootdir import require_rootdir

        require_rootdir(early_config, given)


def pytest_configure(config: pytest.Config) -> None:
    for name, text in MARKERS.items():
        config.addinivalue_line("markers", f"{name}: {text}")
    config.pluginmanager.register(fixtures, "entropy_probe_fixtures")
    if config.option.help or config.option.version:
        return
    if _checkpoints_given(config):
        _wake(config)
    else:
        _refuse_checks(config)


def pytest_terminal_summary(
    terminalreporter: pytest.TerminalReporter, exitstatus: int, config: pytest.Config
) -> None:
    """Where nothing was selected: what -m takes, and what its tests need."""
    selected = config.getoption("markexpr", "")
    if exitstatus == pytest.ExitCode.NO_TESTS_COLLECTED and selected:
        import textwrap

        from pytest_entropy_probe.markers import why_nothing

        line = why_nothing(selected, has_checkpoint=_checkpoints_given(config))
        for part in (
            textwrap.wrap(f"entropy-probe: {line}", 80, break_on_hyphens=False) if line else ()
        ):
            terminalreporter.write_line(part)


def _refuse_checks(config: pytest.Config) -> None:
    for arg in map(
        str, config.invocation_params.args
    ):  # addopts of a file stay where there is no checkpoint
        if arg.startswith("--probe-"):
            needed = "nothing is measured without a checkpoint; add --probe-checkpoint=PATH"
            raise pytest.UsageError(f"{arg.partition('=')[0]}: {needed}")
    for arg in config.args:
        path = Path(arg.partition("::")[0])
        if path.parts[:1] == ("probe-checks",) and not path.exists():
            needed = "the shipped checks need a checkpoint; add --probe-checkpoint=PATH"
            raise pytest.UsageError(f"{arg}: {needed}")


def _wake(config: pytest.Config) -> None:
    from pytest_entropy_probe.settings import SETTINGS, read_settings

    config.stash[SETTINGS] = read_settings(config)

    # After the settings: an option that is wrong ends the run before anything large is imported.
    from pytest_entropy_probe import checks, ranks, speed
    from pytest_entropy_probe.collection import collect, workers
    from pytest_entropy_probe.collection.selectors import take_known_failures, take_selectors
    from pytest_entropy_probe.golden_files import PLUGIN, GoldenFiles
    from pytest_entropy_probe.library import require_device
    from pytest_entropy_probe.markers import Markers
    from pytest_entropy_probe.shown.summary import Summary
    from pytest_entropy_probe.subject import baseline, probe_config

    probe_config(config)
    if not hasattr(config, "workerinput"):  # where a usage error would be an internal one
        require_device(probe_config(config))
        config.pluginmanager.register(Markers(config), "entropy_probe_markers")
    for target in config.stash[SETTINGS].targets:
        baseline(config, target.name)
    take_selectors(config)
    take_known_failures(config)
    config.pluginmanager.register(checks, "entropy_probe_check_fixtures")
    config.pluginmanager.register(collect, "entropy_probe_collect")
    config.pluginmanager.register(speed, "entropy_probe_speed")
    speed.leave_no_empty_folder(config)
    config.pluginmanager.register(workers, "entropy_probe_workers")
    config.pluginmanager.register(GoldenFiles(config), PLUGIN)
    config.pluginmanager.register(Summary(config), "entropy_probe_summary")
    ranks.lead(config)


def pytest_itemcollected(item: pytest.Item) -> None:
    """`-m golden` selects everything that compares with golden files."""
    compares = GOLDEN_FIXTURE in getattr(item, "fixturenames", ())
    if compares and item.get_closest_marker("golden") is None:
        item.add_marker("golden")
