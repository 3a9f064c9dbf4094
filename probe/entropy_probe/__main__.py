"""`entropy-probe run CHECKPOINT --out report.json`: the measurement alone, without pytest. `inspect` looks first,
`watch` follows a training run, `compare` puts reports side by side, `report` shows them as one HTML page, `audit`
computes the figures of a report again, `drill` plants faults to see them caught, `plan` says what a run would cost,
`rollouts` reads those of a trainer, `schema` says what every field of a report is."""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import io
import json
import os
import sys
import tempfile
import textwrap
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

from entropy_probe import __version__
from entropy_probe.errors import ConfigError, ProbeError, RolloutsError
from entropy_probe.options import PROMPT_TOKENS, overrides
from entropy_probe.processes import torchrun

if TYPE_CHECKING:
    from entropy_probe import ProbeConfig, ProbeReport
    from entropy_probe.integrations.trackers import Sink
    from entropy_probe.model.checkpoint.inspection import Inspection
    from entropy_probe.page.contents import Checkpoint

EXIT_FAILED, EXIT_USAGE, EXIT_PIPE = 1, 4, 141


def parser() -> argparse.ArgumentParser:
    main_parser = argparse.ArgumentParser(prog="entropy-probe", description=__doc__)
    main_parser.add_argument("--version", action="version", version=f"entropy-probe {__version__}")
    commands = main_parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    run = commands.add_parser("run", help="measure a checkpoint and write its report")
    run.add_argument(
        "checkpoint", metavar="CHECKPOINT", help="checkpoint folder, or `demo` for the bundled one"
    )
    run.add_argument(
        "--out",
        type=Path,
        metavar="FILE",
        help="the report.json to write (default: standard output)",
    )
    run.add_argument(
        "--evidence",
        type=Path,
        metavar="DIR",
        help="write what the numbers are made of to DIR/NAME.safetensors, for `audit`",
    )
    run.add_argument(
        "--plot",
        type=Path,
        metavar="FILE",
        help="draw prediction against realisation (.png or .svg)",
    )
    run.add_argument(
        "--html",
        type=Path,
        metavar="FILE",
        help="write the page of `report`: verdict, figures, every criterion (.html)",
    )
    _add_log(run)
    _add_what_is_measured(run)
    _add_watch(commands)
    _add_compare(commands)
    inspect = commands.add_parser("inspect", help="say what a checkpoint holds, without loading it")
    inspect.add_argument(
        "checkpoint", metavar="PATH", help="checkpoint or run folder, or `demo` for the bundled one"
    )
    inspect.add_argument("--base-model", type=Path, metavar="PATH", help="base model of an adapter")
    inspect.add_argument("--json", action="store_true", help="print JSON")
    audit = commands.add_parser(
        "audit", help="compute every figure of a report again from its evidence, without torch"
    )
    audit.add_argument("report", type=Path, metavar="REPORT", help="report.json")
    audit.add_argument(
        "--evidence",
        type=Path,
        metavar="DIR",
        required=True,
        help="the folder that --evidence or --probe-evidence wrote, or a file of it",
    )
    page = commands.add_parser(
        "report", help="show reports as one HTML page: verdict, figures, every criterion"
    )
    page.add_argument("reports", type=Path, nargs="+", metavar="REPORT", help="report.json")
    page.add_argument(
        "--html", type=Path, metavar="FILE", required=True, help="the page to write (.html)"
    )
    page.add_argument(
        "--evidence",
        type=Path,
        metavar="DIR",
        help="the folder that --evidence or --probe-evidence wrote: responses, tokens, the entropy audit",
    )
    rollouts = commands.add_parser(
        "rollouts",
        help="read rollouts that a trainer wrote (verl, TRL, prime-rl), and write them as JSON lines",
    )
    rollouts.add_argument("rollouts", type=Path, metavar="PATH", help="the trainer's file")
    rollouts.add_argument("--out", type=Path, metavar="FILE", help="the file to write the lines to")
    rollouts.add_argument(
        "--step", type=int, help="which step to read, if the file has several (default: the last)"
    )
    rollouts.add_argument(
        "--rewards",
        metavar="NAMES",
        help="the columns of TRL's table that are rewards, separated by commas",
    )
    drill = commands.add_parser(
        "drill",
        help="plant a dozen faults into runs on your checkpoint, and show which criterion sees each",
    )
    drill.add_argument(
        "checkpoint", metavar="CHECKPOINT", help="checkpoint folder, or `demo` for the bundled one"
    )
    _add_what_is_measured(drill)
    drill.add_argument("--fault", help=argparse.SUPPRESS)  # in a process of its own
    plan = commands.add_parser(
        "plan", help="say what memory and how many flops a run would take, without loading weights"
    )
    plan.add_argument(
        "checkpoint", metavar="CHECKPOINT", help="checkpoint folder, or `demo` for the bundled one"
    )
    plan.add_argument(
        "--prompt-tokens",
        type=int,
        default=PROMPT_TOKENS,
        metavar="P",
        help=f"tokens of a prompt (default: {PROMPT_TOKENS}); responses have generation.max_new_tokens",
    )
    plan.add_argument(
        "--processes",
        type=int,
        default=1,
        metavar="N",
        help="how many processes of one machine run together under torchrun (default: 1)",
    )
    _add_what_is_measured(plan)
    schema = commands.add_parser(
        "schema", help="print the JSON Schema of a report, or of the configuration"
    )
    schema.add_argument(
        "of",
        nargs="?",
        choices=("report", "config", "step"),
        default="report",
        help="which of them: of a checkpoint (default), the configuration, or of a step in training",
    )
    return main_parser


def _add_watch(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    watch = commands.add_parser(
        "watch",
        help="follow training runs: measure each new checkpoint once, and exit with 1 if one has failed",
    )
    watch.add_argument(
        "runs",
        type=Path,
        nargs="+",
        metavar="RUN",
        help="the folder into which a trainer saves its checkpoints",
    )
    watch.add_argument(
        "-m",
        default="acceptance or gate",
        metavar="EXPRESSION",
        help="which checks are made, as pytest's -m (default: acceptance or gate)",
    )
    watch.add_argument(
        "--once",
        action="store_true",
        help="measure what is complete now, and end: for cron",
    )
    watch.add_argument(
        "--interval",
        type=_seconds,
        default=30.0,
        metavar="SECONDS",
        help="how often the folders are looked at, and how long a checkpoint must not have changed (default: 30)",
    )
    watch.add_argument(
        "-x",
        "--exitfirst",
        action="store_true",
        help="end at the first checkpoint that fails",
    )
    watch.add_argument(
        "--with-next",
        action="store_true",
        help="measure a checkpoint when the one after it is complete, and compare the predicted step with the real one",
    )
    watch.add_argument(
        "--state",
        type=Path,
        metavar="FILE",
        help="what is known of the run, a line a checkpoint (default: RUN/entropy-probe.jsonl); reports go beside it",
    )
    watch.add_argument(
        "--html",
        type=Path,
        metavar="FILE",
        help="write all checkpoints as one HTML page after each measurement",
    )
    watch.add_argument("--webhook", metavar="URL", help="post each verdict there, as JSON")
    _add_log(watch)
    _add_what_is_measured(watch)


def _add_compare(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    compare = commands.add_parser(
        "compare", help="put reports or checkpoints side by side, with differences and their errors"
    )
    compare.add_argument(
        "compared",
        nargs="+",
        metavar="A",
        help="a report.json, a folder with one, or a checkpoint, which is measured first; differences are to the first",
    )
    compare.add_argument("--markdown", action="store_true", help="a table in Markdown")
    compare.add_argument("--json", action="store_true", help="for machines")
    _add_what_is_measured(compare)


def _seconds(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0 < value < float("inf"):
        raise argparse.ArgumentTypeError(f"got {text!r}; give a number of seconds above 0")
    return value


def _add_log(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "--log",
        action="append",
        default=[],
        metavar="SINK",
        help="log the figures at the checkpoint's step: tensorboard:DIR, wandb[:PROJECT], trackio[:PROJECT] or "
        "jsonl:FILE; repeatable",
    )


def _add_what_is_measured(run: argparse.ArgumentParser) -> None:
    """Options that say what is measured, and with what, in groups."""
    group = run.add_argument_group("on which prompts and responses")
    group.add_argument("--prompts", type=Path, metavar="PATH", help="prompts to sample from")
    group.add_argument(
        "--rollouts",
        type=Path,
        metavar="FILE",
        help="responses on which the entropy is measured, in place of sampling (JSON lines)",
    )
    group.add_argument(
        "--update-rollouts",
        type=Path,
        metavar="FILE",
        help="responses from which the update is computed (JSON lines)",
    )
    group.add_argument("--seed", type=int, help="one seed for all sampling (default: 0)")
    group.add_argument(
        "--target-se",
        metavar="X",
        help="add prompts, up to batch.max_prompts, until the predicted change has a standard error of X nats per "
        "token; or 2se: half of that change",
    )
    group = run.add_argument_group("whose step")
    group.add_argument("--base-model", type=Path, metavar="PATH", help="base model of an adapter")
    group.add_argument(
        "--recipe",
        metavar="NAME",
        help="whose update: auto reads the checkpoint's own training settings (default); notes, trl-dapo, "
        "verl-grpo, ...; or a YAML file of parts",
    )
    group.add_argument(
        "--next",
        type=Path,
        metavar="PATH",
        help="the checkpoint one step later: the step that was really made (checkpoint-N+1 is found by itself)",
    )
    group.add_argument(
        "--reference-model",
        type=Path,
        metavar="PATH",
        help="the reference of a KL term; by default an adapter's base",
    )
    group = run.add_argument_group("how, and with what")
    group.add_argument("--config", type=Path, metavar="FILE", help="configuration (YAML)")
    group.add_argument(
        "--budget", help="how much is computed: smoke, standard or full (default: standard)"
    )
    group.add_argument("--device", help="where it runs (default: cpu)")
    group.add_argument(
        "--memory-limit",
        metavar="SIZE",
        help="the most memory to use, such as 8GiB; batches become smaller to keep it",
    )
    group.add_argument(
        "--device-map",
        metavar="NAME",
        help="for a model that outgrows one device: auto, balanced, balanced_low_0 or sequential",
    )
    group.add_argument(
        "--offload-folder",
        metavar="DIR",
        help="the folder for parts that do not fit into memory either",
    )
    group.add_argument(
        "--sharding",
        metavar="NAME",
        help="what several processes hold: prompt, a model each; parameter, one model together; auto (default)",
    )


def main(argv: Sequence[str] | None = None) -> int:
    """Exit codes: 0 all is well, 1 the checkpoint cannot be loaded or measured, 4 usage.

    Where the reader of a pipe is gone the command ends without a word, as one that SIGPIPE ended (141).
    """
    try:
        code = _main(argv)
        sys.stdout.flush()
    except BrokenPipeError:
        _let_go(sys.stdout, sys.stderr)
        return EXIT_PIPE
    except OSError as error:
        if error.filename is not None:  # of a file, and no business of standard output
            raise
        _let_go(sys.stdout)
        problem = f"cannot be written ({error.strerror})"
        print(f"entropy-probe: standard output: {problem}; free space on it", file=sys.stderr)
        return EXIT_FAILED
    return code


def _let_go(*streams: TextIO) -> None:
    """What these still hold goes nowhere: Python would try again when it ends, and complain."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    for stream in streams:
        try:
            stream.flush()
        except OSError:
            os.dup2(nowhere, stream.fileno())


def _main(argv: Sequence[str] | None) -> int:
    first = torchrun.rank() == 0
    try:
        with contextlib.nullcontext() if first else _silence():
            arguments = parser().parse_args(argv)
            arguments.argv = argv
    except SystemExit as stop:
        return EXIT_USAGE if stop.code else 0
    try:
        return {
            "inspect": _inspect,
            "run": _run,
            "watch": _watch,
            "compare": _compare,
            "audit": _audit,
            "report": _page,
            "plan": _plan,
            "rollouts": _rollouts,
            "drill": _drill if getattr(arguments, "fault", None) is None else _with_fault,
            "schema": _schema,
        }[arguments.command](arguments)
    except ProbeError as error:
        if first:
            print(f"entropy-probe: {error}", file=sys.stderr, flush=True)
        return EXIT_USAGE if isinstance(error, ConfigError | RolloutsError) else EXIT_FAILED


@contextlib.contextmanager
def _silence() -> Iterator[None]:
    """Of several processes rank 0 alone says something."""
    nowhere = io.StringIO()
    with contextlib.redirect_stdout(nowhere), contextlib.redirect_stderr(nowhere):
        yield


def _run(arguments: argparse.Namespace) -> int:
    config = _configured(arguments)
    _require_inputs(arguments)
    _require_outputs(arguments)
    sinks = _sinks(arguments)

    from entropy_probe import run_probe
    from entropy_probe.evidence import evidence_file
    from entropy_probe.layout import find_layout
    from entropy_probe.loading import load_configured
    from entropy_probe.page.writing import write_page
    from entropy_probe.plots import save_figure
    from entropy_probe.processes.world import World

    is_demo = arguments.checkpoint == "demo"
    world = World.of_torchrun()
    with world.together():
        checkpoint = _folder(arguments.checkpoint)
        note = None if is_demo else find_layout(checkpoint).note
        if note and world.first:
            print(f"entropy-probe: {note}", file=sys.stderr)
        loaded = load_configured(checkpoint, arguments.base_model, config, world)
    for warning in loaded.info.warnings if world.first else ():
        print(f"entropy-probe: warning: {warning}", file=sys.stderr)
    report = run_probe(
        loaded,
        config,
        arguments.rollouts,
        arguments.update_rollouts,
        prompts=arguments.prompts,
        next_checkpoint=arguments.next,
        name="demo" if is_demo else None,
        progress=_print_progress if world.first and sys.stderr.isatty() else None,
        world=world,
    )
    world.close()
    if not world.first:
        return 0
    for doubt in report.doubts:
        print(f"entropy-probe: {doubt}", file=sys.stderr)
    if report.no_second_moment is not None:
        print(
            f"entropy-probe: nothing about the next step: {report.no_second_moment}",
            file=sys.stderr,
        )
    for said in report.memory.said:
        print(f"entropy-probe: warning: {said}", file=sys.stderr)
    if arguments.out is None:
        print(report.model_dump_json(indent=2))
    else:
        report.to_json(arguments.out)
    if arguments.plot is not None:
        save_figure(report, arguments.plot)
    if sinks:
        from entropy_probe.integrations.trackers import Logged, log_all

        of = report.checkpoint
        log_all(sinks, [Logged(str(Path(of.path).parent), of.name, of.step, report)])
    if arguments.evidence is not None and report.evidence is not None:
        report.evidence.to_file(evidence_file(arguments.evidence, report.checkpoint.name))
    if arguments.html is not None:
        write_page(arguments.html, [_on_page(report)])
    return 0


def _sinks(arguments: argparse.Namespace) -> list[Sink]:
    from entropy_probe.integrations.trackers import sink_of

    return [sink_of(text) for text in arguments.log]


def _watch(arguments: argparse.Namespace) -> int:
    if arguments.next is not None:
        raise ConfigError("--next", "is one checkpoint, and a run has many", "give --with-next")
    _configured(arguments)
    _require_inputs(arguments)
    sinks = _sinks(arguments)
    if arguments.state is not None and len(arguments.runs) > 1:
        problem = f"is one file, and there are {len(arguments.runs)} runs"
        raise ConfigError("--state", problem, "leave it out, or watch each run on its own")

    from entropy_probe.integrations.trackers import Trackers
    from entropy_probe.page.writing import require_page
    from entropy_probe.watching import measuring
    from entropy_probe.watching.screen import Screen
    from entropy_probe.watching.watcher import Plan, Run, Watcher, ended_by_signals
    from entropy_probe.watching.webhook import require_url

    if arguments.html is not None:
        from entropy_probe.atomic import require_writable

        require_page(arguments.html)
        require_writable(arguments.html)
    if arguments.webhook is not None:
        require_url(arguments.webhook)
    plan = Plan(
        options=["-m", arguments.m, *_as_options_of_pytest(arguments)],
        interval=arguments.interval,
        once=arguments.once,
        exit_first=arguments.exitfirst,
        with_next=arguments.with_next,
        page=arguments.html,
        webhook=arguments.webhook,
    )
    measuring.require_options(plan.options)
    folders = {path.expanduser().resolve(): path for path in arguments.runs}
    runs = [Run.open(path, arguments.state) for path in folders.values()]
    trackers = Trackers(sinks, keyed=True, several=len(runs) > 1)
    with ended_by_signals(), Screen() as screen:
        return Watcher(runs, plan, screen, trackers).watch()


def _as_options_of_pytest(arguments: argparse.Namespace) -> list[str]:
    """What is measured, in the words of the plugin: its options have the same names, after `--probe-`."""
    known = argparse.ArgumentParser(add_help=False)
    _add_what_is_measured(known)
    given = []
    for action in known._actions:
        value = getattr(arguments, action.dest)
        if value is not None:
            path = isinstance(value, Path)
            text = str(value.expanduser().absolute()) if path else str(value)
            given.append(f"--probe-{action.dest.replace('_', '-')}={text}")
    return given


def _compare(arguments: argparse.Namespace) -> int:
    """Reports without verdicts, as `run` writes them, are judged here."""
    if len(arguments.compared) < 2:
        raise ConfigError("compare", "got one report", "give two or more")
    if arguments.markdown and arguments.json:
        raise ConfigError("--markdown", "is given beside --json", "choose one of them")
    _configured(arguments)
    _require_inputs(arguments)
    found = [_report_of(given) for given in arguments.compared]

    from entropy_probe.compare import Side, side_by_side
    from entropy_probe_checks.shown import judged

    reports = [
        _measured(given, arguments) if report is None else report
        for given, report in zip(arguments.compared, found, strict=True)
    ]
    names = [report.checkpoint.name for report in reports]
    if len(set(names)) < len(names):
        names = arguments.compared
    made = side_by_side(
        [Side(name, one, judged(one)) for name, one in zip(names, reports, strict=True)]
    )
    if arguments.json:
        print(made.to_json())
    elif arguments.markdown:
        print(made.markdown(), end="")
    else:
        print(made.text(plain="utf" not in (sys.stdout.encoding or "").lower()))
    return 0


def _report_of(given: str) -> ProbeReport | None:
    """The report in a file, or in a folder as report.json or the only file of JSON; `None` for a checkpoint."""
    from entropy_probe import ProbeReport
    from entropy_probe.layout import find_layout

    path = Path(given).expanduser()
    if path.is_file():
        return ProbeReport.from_json(path)
    folder = _folder(given)
    if (folder / "report.json").is_file():
        return ProbeReport.from_json(folder / "report.json")
    try:
        _ = find_layout(folder).optimizer
    except ProbeError as error:
        reports = list(folder.glob("*.json"))
        if len(reports) != 1:
            problem = (
                f"is not a checkpoint ({error.problem}), and it holds {len(reports)} JSON files"
            )
            raise ConfigError(given, problem, "give a report.json or a checkpoint") from None
        return ProbeReport.from_json(reports[0])
    return None


def _measured(given: str, arguments: argparse.Namespace) -> ProbeReport:
    from entropy_probe import ProbeReport

    with tempfile.TemporaryDirectory() as place:
        out = Path(place) / "report.json"
        nothing = {"evidence": None, "plot": None, "html": None, "log": []}
        _run(argparse.Namespace(**vars(arguments) | nothing | {"checkpoint": given, "out": out}))
        return ProbeReport.from_json(out)


def _configured(arguments: argparse.Namespace) -> ProbeConfig:
    """The configuration, whose limits criteria know."""
    from entropy_probe import ProbeConfig
    from entropy_probe_checks.thresholds import require_known

    config = ProbeConfig.load(arguments.config, overrides=overrides(arguments))
    require_known(config.limits, config.allow_inconclusive, has_baseline=True)  # a judge's business
    return config


def _require_inputs(arguments: argparse.Namespace) -> None:
    """Raises for a path that is not there, whether the measurement comes to need it or not."""
    for name in ("base_model", "reference_model", "next"):
        path = getattr(arguments, name)
        if path is not None and not path.expanduser().is_dir():
            option = f"--{name.replace('_', '-')}"
            raise ConfigError(option, f"no such folder: {path}", "give the path of a model folder")
    for name in ("rollouts", "update_rollouts", "prompts"):
        path = getattr(arguments, name)
        if path is not None and not path.expanduser().exists():
            option = f"--{name.replace('_', '-')}"
            raise ConfigError(option, f"no such file: {path}", "give the path of a file")


def _require_outputs(arguments: argparse.Namespace) -> None:
    """Raises for what could not be written, before it is measured."""
    from entropy_probe.atomic import require_folder, require_writable
    from entropy_probe.page.writing import require_page
    from entropy_probe.plots import require_drawable

    if arguments.plot is not None:
        require_drawable(arguments.plot)
    if arguments.html is not None:
        require_page(arguments.html)
    for path in filter(None, (arguments.out, arguments.plot, arguments.html)):
        require_writable(path)
    if arguments.evidence is not None:
        require_folder(arguments.evidence)


def _inspect(arguments: argparse.Namespace) -> int:
    from entropy_probe.model.checkpoint.inspect import inspect_checkpoint

    found = inspect_checkpoint(_folder(arguments.checkpoint), arguments.base_model)
    print(json.dumps(_plain(found), indent=2) if arguments.json else found.text())
    return EXIT_FAILED if found.problems else 0


def _plan(arguments: argparse.Namespace) -> int:
    config = _configured(arguments)
    if arguments.prompt_tokens < 1:
        raise ConfigError("--prompt-tokens", f"is {arguments.prompt_tokens}", "give 1 or more")
    if arguments.processes < 1:
        raise ConfigError("--processes", f"is {arguments.processes}", "give 1 or more")

    from entropy_probe.cost.plan import plan

    found = plan(
        _folder(arguments.checkpoint),
        config,
        arguments.prompt_tokens,
        arguments.base_model,
        arguments.processes,
    )
    print(found.text())
    return 0 if found.fits else EXIT_FAILED


def _plain(found: Inspection) -> dict[str, Any]:
    recipe = None if found.recipe is None else found.recipe.model_dump(mode="json")
    return asdict(dataclasses.replace(found, recipe=None)) | {"recipe": recipe}


def _audit(arguments: argparse.Namespace) -> int:
    from entropy_probe import ProbeReport
    from entropy_probe.evidence import Evidence, evidence_file
    from entropy_probe_checks.audit import LIMIT, audit, text

    report, place = ProbeReport.from_json(arguments.report), arguments.evidence
    if not place.is_file():
        place = evidence_file(place, report.checkpoint.name)
    try:
        lines = audit(report.model_dump(mode="json"), Evidence.from_file(place))
    except (KeyError, IndexError, TypeError, ValueError) as error:
        problem = f"does not hold what the figures are made of ({type(error).__name__}: {error})"
        raise ProbeError(place, problem, "give the evidence of this report") from error
    print(text(lines))
    return EXIT_FAILED if any(not line.difference <= LIMIT for line in lines) else 0


def _page(arguments: argparse.Namespace) -> int:
    from entropy_probe import ProbeReport
    from entropy_probe.atomic import require_writable
    from entropy_probe.evidence import Evidence, evidence_file
    from entropy_probe.page.writing import require_page, write_page

    require_page(arguments.html)
    require_writable(arguments.html)
    checkpoints: list[Checkpoint] = []
    for path in arguments.reports:
        report, place = ProbeReport.from_json(path), arguments.evidence
        if place is not None:
            place = place if place.is_file() else evidence_file(place, report.checkpoint.name)
            report = report.with_evidence(Evidence.from_file(place))
        checkpoints.append(_on_page(report))
    order = sorted(checkpoints, key=lambda c: (c.run, c.step is None, c.step or 0))
    write_page(arguments.html, order)
    return 0


def _on_page(report: ProbeReport) -> Checkpoint:
    """A report without verdicts, as `run` writes it, is judged here by every criterion."""
    from entropy_probe.page.contents import Checkpoint
    from entropy_probe.page.details import details_of
    from entropy_probe_checks.shown import explained, judged

    of = report.checkpoint
    run, verdicts = str(Path(of.path).parent), explained(judged(report))
    return Checkpoint(of.name, run, of.step, report, details_of(report), verdicts)


def _rollouts(arguments: argparse.Namespace) -> int:
    """What was understood goes to standard error, or to standard output the file to write the lines to to a file."""
    from entropy_probe.atomic import require_writable, write_atomically
    from entropy_probe.stages.responses.trainers_rollouts import understood

    path = arguments.rollouts
    if arguments.out is not None:
        require_writable(arguments.out)
    rewards = [name.strip() for name in (arguments.rewards or "").split(",") if name.strip()]
    found = understood(path, arguments.step, rewards)
    if found is None:
        problem = "is not a rollouts file that verl, TRL or prime-rl writes"
        raise RolloutsError(
            path,
            problem,
            "if it is JSON lines in this project's format, give it to --rollouts as it is",
        )
    lines = [line for _, line in found.lines]
    sizes = [len(line["rewards"]) for line in lines]
    keys = ", ".join(dict.fromkeys(key for line in lines for key in line))
    of_each = " to ".join(str(size) for size in sorted({min(sizes), max(sizes)}))
    said = [
        f"rollouts as {found.trainer} writes them: {len(lines)} prompts, {sum(sizes)} responses ({of_each} of each)",
        f"keys: {keys}",
        *found.assumed,
    ]
    written = "".join(json.dumps(line) + "\n" for line in lines)
    if arguments.out is not None:
        write_atomically(arguments.out, written.encode())
    else:
        print(written, end="")
    print("\n".join(said), file=sys.stderr if arguments.out is None else sys.stdout)
    return 0


def _schema(arguments: argparse.Namespace) -> int:
    from entropy_probe.schema import config_schema, report_schema, step_schema

    of = {"report": report_schema, "config": config_schema, "step": step_schema}
    made = of[arguments.of]()
    in_full = "utf" in (sys.stdout.encoding or "").lower()
    print(json.dumps(made, indent=1, ensure_ascii=not in_full))
    return 0


def _drill(arguments: argparse.Namespace) -> int:
    """First without a fault, then with each, every time in a process of its own."""
    _folder(arguments.checkpoint)
    _configured(arguments)
    _require_inputs(arguments)

    from entropy_probe import drill

    given = list(sys.argv[1:] if arguments.argv is None else arguments.argv)
    healthy = _statuses(given, "")
    red = _with_status(healthy, "fail")
    print(f"without a fault: {', '.join(red) or 'nothing is red'}", flush=True)
    unseen = []
    for name in drill.FAULTS:
        found = _statuses(given, name)
        seen = [one for one in _with_status(found, "fail") if one not in red]
        if found == healthy and "two_batches" in name:
            seen = ["not planted: one batch serves as both"]
        unseen += [] if seen else [name]
        by = ", ".join(seen) or "NOTHING"
        print(f"\n{name}\n    {drill.wrong(name)}", flush=True)
        print(textwrap.fill(f"seen by {by}", 80, initial_indent="    ", subsequent_indent="    "))
    print(f"\n{len(drill.FAULTS) - len(unseen)} of {len(drill.FAULTS)} faults were seen")
    return EXIT_FAILED if unseen or red else 0


def _statuses(given: Sequence[str], fault: str) -> dict[str, str]:
    """criterion → status of a run with this fault; an error counts as a criterion that sees it."""
    from entropy_probe.processes.apart import ended

    code, out, err = ended("entropy_probe.__main__:main", [*given, f"--fault={fault}"])
    if code != 0:
        lines = err.strip().splitlines() or [f"exit code {code}"]
        if not fault:
            raise ProbeError(
                "drill", f"the run without a fault fails: {lines[-1]}", "repair that first"
            )
        return {f"an error ({lines[-1].removeprefix('entropy-probe: ')})": "fail"}
    return json.loads(out.splitlines()[-1])


def _with_status(found: dict[str, str], status: str) -> list[str]:
    return [name for name, its in found.items() if its == status]


def _with_fault(arguments: argparse.Namespace) -> int:
    from entropy_probe import drill, run_probe
    from entropy_probe.loading import load_configured
    from entropy_probe_checks.criteria import CRITERIA

    arguments.budget = arguments.budget or "smoke"
    config = _configured(arguments)
    if arguments.fault:
        drill.plant(arguments.fault)
    loaded = load_configured(_folder(arguments.checkpoint), arguments.base_model, config)
    batches = arguments.rollouts, arguments.update_rollouts
    report = run_probe(loaded, config, *batches, prompts=arguments.prompts)
    print(json.dumps({name: criterion(report).status for name, criterion in CRITERIA.items()}))
    return 0


def _folder(given: str) -> Path:
    """The folder of the checkpoint. `ConfigError`, hence exit code 4, where there is none."""
    from entropy_probe.demo import checkpoint_path

    if given == "demo":
        return checkpoint_path()
    try:
        path = Path(given).expanduser()
        if path.is_dir():
            return path
        problem = "no such folder"
    except (OSError, RuntimeError) as error:  # no rights, a name too long, no such user
        path, problem = (
            Path(given),
            f"cannot be looked at ({getattr(error, 'strerror', None) or error})",
        )
    raise ConfigError(path, problem, "give a checkpoint folder")


def _print_progress(stage: str, done: int, total: int) -> None:
    print(
        f"\r\033[K{stage} {done}/{total}",
        end="\n" if stage == "continuity" and done else "",
        file=sys.stderr,
    )


if __name__ == "__main__":
    sys.exit(main())
