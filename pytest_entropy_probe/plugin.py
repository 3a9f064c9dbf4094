"""Options, ini keys and markers; wakes the rest of the plugin when a checkpoint is given.

Without a checkpoint nothing happens but the parsing of options: this file, `settings.py`, `fixtures.py` and `golden.py`
import pytest and the standard library only.
"""

from __future__ import annotations

import os
import shlex
import sys
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from _pytest.config.findpaths import locate_config

from pytest_entropy_probe.settings import SETTINGS, Settings, checkpoints_given, read_settings

if TYPE_CHECKING:
    from _pytest.config.argparsing import OptionGroup

pytest.register_assert_rewrite("entropy_probe_checks")

# key → (metavar, is it a path, help); the option is --probe-KEY, the ini key probe_KEY.
OPTIONS: dict[str, tuple[str, bool, str]] = {
    "checkpoint": ("[NAME=]PATH", True, "checkpoint folder to probe; repeatable; globs; 'demo' is the bundled one"),
    "base_model": (
        "PATH",
        True,
        "base model of an adapter that names none, or model folder of a checkpoint without config.json",
    ),
    "config": ("FILE", True, "configuration (YAML)"),
    "rollouts": ("FILE", True, "responses on which the entropy is measured, in place of sampling (JSON lines)"),
    "update_rollouts": ("FILE", True, "responses from which the update is computed (JSON lines)"),
    "prompts": ("FILE", True, "prompts to sample from (JSON lines)"),
    "budget": ("NAME", False, "how much is computed: smoke, standard or full; anything you set yourself stays"),
    "device": ("DEVICE", False, "where it runs: cpu, cuda, cuda:1"),
    "memory_limit": ("SIZE", False, "memory that is kept to by smaller batches, such as 8GiB"),
    "device_map": (
        "NAME",
        False,
        "for a model that outgrows one device: auto, balanced, balanced_low_0 or sequential; a map by module is for "
        "the configuration",
    ),
    "offload_folder": ("DIR", True, "where the part of it goes that outgrows the memory too; default: a temporary one"),
    "seed": ("N", False, "one seed for all sampling"),
    "json": ("PATH", True, "write report.json here; with several checkpoints a folder of them"),
    "plot": ("PATH", True, "draw prediction against realisation here (.png, .svg); with several checkpoints a folder"),
    "baseline": ("PATH", True, "report.json that gates compare with; or a folder of them, NAME.json each"),
    "golden_dir": ("DIR", True, "compare with the golden files in DIR/NAME/"),
    "golden_update": ("MODE", False, "write golden files: missing, changed or all"),
    "xfails": ("FILE", True, "known failures: id prefix and reason a line; strict"),
}
FLAGS: dict[str, str] = {
    "golden_update_in_ci": "let --probe-golden-update write where CI is set",
    "no_cache": "measure again; a report that pytest's cache holds is neither used nor kept",
}

MARKERS = {
    "acceptance": "every numerical criterion of the entropy probe",
    "zero_check": "a mapping of the unchanged parameters changes no logit",
    "scaling": "parameters, logits and entropy respond to a step size as their derivative says",
    "registry": "every trainable tensor is there, in order, with a gradient and a preconditioner",
    "ustatistic": "the cross-prompt U-statistic, its diagonal and its standard errors agree",
    "importance": "importance weights are fit to measure the change of entropy",
    "sequences": "log-probabilities and entropies of sequences are exact",
    "prediction": "the predicted change of entropy against the measured one",
    "golden": "comparison with stored numbers of the same checkpoint",
    "gate": "training-health limits; off unless limits are configured",
    "benchmark": "how long scoring, gradients and the sweep take, by pytest-benchmark; off unless asked for",
}


def pytest_addoption(parser: pytest.Parser) -> None:
    group: OptionGroup = parser.getgroup("entropy-probe", "entropy probe of training checkpoints")
    for key, (metavar, _, text) in OPTIONS.items():
        repeatable = key == "checkpoint"
        group.addoption(
            f"--probe-{key.replace('_', '-')}",
            dest=f"probe_{key}",
            action="append" if repeatable else "store",
            metavar=metavar,
            help=text,
        )
        parser.addini(
            f"probe_{key}", text, type="linelist" if repeatable else "string", default=[] if repeatable else ""
        )
    for key, text in FLAGS.items():
        group.addoption(f"--probe-{key.replace('_', '-')}", dest=f"probe_{key}", action="store_true", help=text)
        parser.addini(f"probe_{key}", text, type="bool", default=False)
    group.addoption(
        "--probe-explain",
        metavar="CRITERION",
        help="print what it measures, why its limit, what a failure means ('all' for every one), and exit",
    )


def pytest_cmdline_main(config: pytest.Config) -> int | None:
    name = config.getoption("probe_explain")
    if name is None:
        return _follow(config) if _is_follower(config) else None
    from pytest_entropy_probe.explain import explanation

    encoding = getattr(sys.stdout, "encoding", None) or "ascii"
    print(explanation(name).encode(encoding, "replace").decode(encoding))
    return 0


def _is_follower(config: pytest.Config) -> bool:
    """Whether torchrun started this process to measure with rank 0 (`processes.py`)."""
    options = config.known_args_namespace
    if "TORCHELASTIC_RUN_ID" not in os.environ or options.help or options.version or not checkpoints_given(config):
        return False
    from entropy_probe.processes import torchrun

    return torchrun.rank() > 0


def _follow(config: pytest.Config) -> int:
    from pytest_entropy_probe.processes import follow

    try:
        config.stash[SETTINGS] = read_settings(config)
    except pytest.UsageError:
        return pytest.ExitCode.USAGE_ERROR
    return follow(config)


@pytest.hookimpl(tryfirst=True)
def pytest_load_initial_conftests(early_config: pytest.Config) -> None:
    """Stop where pytest mistook the value of an option for the place of the tests.

    Before plugins are known pytest takes PATH in `--probe-checkpoint PATH` for a test path. Outside the repository that
    moves rootdir: the repository's configuration is ignored, and the cache is written beside the checkpoint.
    """
    if _is_follower(early_config):
        from pytest_entropy_probe.processes import silence

        silence()
    if early_config.known_args_namespace.inifilename:
        return
    here, root = early_config.invocation_params.dir, early_config.rootpath
    for option, value in _separate_values(early_config):
        path = Path(os.path.abspath(here / value))
        folder = path if path.is_dir() else path.parent
        harmless = folder.is_relative_to(here) and not (root != here and root.is_relative_to(folder))
        configured = early_config.inipath is not None and locate_config(here, [here])[1] == early_config.inipath
        if path.exists() and not harmless and not configured:
            raise pytest.UsageError(
                f"{option} {value}: pytest took this path for rootdir ({root}); write {option}={value}"
            )


def _separate_values(config: pytest.Config) -> Iterator[tuple[str, str]]:
    """(option, value) of our path options whose value is an argument of its own."""
    names = {f"--probe-{key.replace('_', '-')}" for key, (_, is_path, _) in OPTIONS.items() if is_path}
    args = [*shlex.split(os.environ.get("PYTEST_ADDOPTS", "")), *map(str, config.invocation_params.args)]
    return ((option, value) for option, value in pairwise(args) if option in names)


def pytest_configure(config: pytest.Config) -> None:
    from pytest_entropy_probe import fixtures, golden

    for name, text in MARKERS.items():
        config.addinivalue_line("markers", f"{name}: {text}")
    config.stash[SETTINGS] = Settings()
    config.pluginmanager.register(fixtures, "entropy_probe_fixtures")
    config.pluginmanager.register(golden, "entropy_probe_golden")
    if config.option.help or config.option.version:
        return
    if checkpoints_given(config):
        _wake(config)
    else:
        _refuse_checks(config)


def _refuse_checks(config: pytest.Config) -> None:
    for arg in config.args:
        path = Path(arg.partition("::")[0])
        if path.parts[:1] == ("probe-checks",) and not path.exists():
            raise pytest.UsageError(f"{arg}: the shipped checks need a checkpoint; add --probe-checkpoint=PATH")


def _wake(config: pytest.Config) -> None:
    from pytest_entropy_probe import collect, fixtures, golden, processes, speed, summary

    config.stash[SETTINGS] = read_settings(config)
    fixtures.probe_config(config)
    for target in config.stash[SETTINGS].targets:
        fixtures.baseline(config, target.name)
    collect.take_selectors(config)
    collect.take_known_failures(config)
    config.pluginmanager.register(collect, "entropy_probe_collect")
    config.pluginmanager.register(speed, "entropy_probe_speed")
    config.pluginmanager.register(golden.Files(config), golden.FILES)
    config.pluginmanager.register(summary.Summary(config), "entropy_probe_summary")
    processes.lead(config)
