"""`entropy-probe watch`: what is complete, what is known of a run, each checkpoint once, and what is seen."""

from __future__ import annotations

import http.server
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

import forked
import small_run
import watch_runs
import watched
from entropy_probe import ProbeReport
from entropy_probe.__main__ import main
from entropy_probe.differences import entropy_per_token
from entropy_probe.errors import ConfigError
from entropy_probe.integrations.figures import figures
from entropy_probe.integrations.trackers import Trackers, sink_of
from entropy_probe.watching import child, measuring, watcher
from entropy_probe.watching.complete import Seen, fingerprint, what_is_missing
from entropy_probe.watching.screen import Screen, Shown, entropy_chart, page
from entropy_probe.watching.state import NAME, Record, State

SCREENS = Path(__file__).parent / "page" / "screens"


@pytest.fixture(scope="module")
def template(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The report that every measurement which is none returns."""
    path = tmp_path_factory.mktemp("template") / "report.json"
    small_run.reports()[0].to_json(path)
    return path


@pytest.fixture
def cheap(monkeypatch: pytest.MonkeyPatch, template: Path, tmp_path: Path) -> Path:
    """Measurements that look at the bytes alone; the file into which they write what was given in part."""
    monkeypatch.setattr(measuring, "command", lambda given: [sys.executable, "-S", "-E", watched.__file__, *given])
    monkeypatch.setattr(watcher, "_TICK", 0.01)
    monkeypatch.setenv(watched.TEMPLATE, str(template))
    monkeypatch.setenv(watched.PARTIAL, str(tmp_path / "partial"))
    return tmp_path / "partial"


def whole(folder: Path, step: int) -> Path:
    folder.mkdir(parents=True)
    for name, content in watched.files_of(step).items():
        (folder / name).write_bytes(content)
    return folder


def run_with(folder: Path, *steps: int) -> Path:
    for step in steps:
        whole(folder / f"checkpoint-{step}", step)
    return folder


def watch(
    run: Path, said: Callable[..., Any] = lambda *_: None, *, trackers: Trackers | None = None, **plan: Any
) -> int:
    """Once, with an interval that is short; `said` is called with every event."""
    screen = Screen(live=False)
    screen.say = said  # pyright: ignore[reportAttributeAccessIssue]
    opened = watcher.Run.open(run)
    try:
        of = watcher.Plan(**{"interval": 0.05, "once": True, **plan})
        return watcher.Watcher([opened], of, screen, trackers or Trackers([])).watch()
    finally:
        opened.state.close()


def records(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / NAME).read_text().splitlines()]


# What is complete


@pytest.mark.parametrize("step", [3, 4])
def test_every_prefix_of_every_file_is_seen_to_be_one(tmp_path: Path, step: int) -> None:
    """A file that is cut off anywhere, or not there, is missed; but for JSON whose beginning is JSON, and for what a
    checkpoint may be without."""
    folder = whole(tmp_path / f"checkpoint-{step}", step)
    assert what_is_missing(folder) == ""
    optional = {"rng_state.pth", "tokenizer.json"}
    for name, content in watched.files_of(step).items():
        file = folder / name
        file.unlink()
        assert bool(what_is_missing(folder)) == (name not in optional), name
        for length in {0, 1, 7, 8, 9, len(content) // 2, len(content) - 1} & set(range(len(content))):
            file.write_bytes(content[:length])
            is_whole = name.endswith((".pt", ".pth")) and 1 <= length < 4  # too short to say what it is
            assert is_whole or what_is_missing(folder), f"{name} at {length} of {len(content)}"
        file.write_bytes(content)
    assert what_is_missing(folder) == ""


def test_real_files_are_whole_and_their_prefixes_are_not(tmp_path: Path) -> None:
    """Files of torch.save and of safetensors themselves."""
    shutil.copytree(small_run.checkpoint(), tmp_path / "checkpoint-1")
    folder = tmp_path / "checkpoint-1"
    assert what_is_missing(folder) == ""
    for name in ("model.safetensors", "optimizer.pt"):
        content = (folder / name).read_bytes()
        for share in (0.1, 0.5, 0.999):
            (folder / name).write_bytes(content[: int(share * len(content))])
            assert what_is_missing(folder).startswith(name)
        (folder / name).write_bytes(content)
    save_file({"w": torch.zeros(0)}, folder / "model.safetensors")
    assert what_is_missing(folder) == ""


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda at: (at / "x.tmp").touch(), "x.tmp is being written"),
        (lambda at: (at / "tmp_model").mkdir() or (at / "tmp_model" / "x").touch(), "tmp_model/x is being written"),
        (lambda at: (at / "trainer_state.json").unlink(), "trainer_state.json is missing"),
        (lambda at: (at / "model.safetensors.index.json").unlink(), "model.safetensors.index.json is missing"),
        (lambda at: (at / "config.json").unlink(), "config.json is missing"),
        (lambda at: (at / "optimizer.pt").unlink(), "has no optimizer state"),
        (lambda at: (at / "optim_world_size_2_rank_0.pt").write_bytes(b"x"), "optim_world_size_2_rank_1.pt is missing"),
        (lambda at: (at / "__0_0.distcp").write_bytes(b"x"), ".metadata is missing"),
        (lambda at: [file.unlink() for file in at.iterdir()], "it is empty"),
    ],
)
def test_what_is_missing_is_named(tmp_path: Path, change: Callable[[Path], Any], said: str) -> None:
    folder = whole(tmp_path / "checkpoint-3", 3)
    change(folder)
    assert what_is_missing(folder).startswith(said)


def test_the_fingerprint_is_of_what_the_files_hold(tmp_path: Path) -> None:
    one = whole(tmp_path / "a", 3)
    time.sleep(0.01)
    copy = Path(shutil.copytree(one, tmp_path / "b", copy_function=shutil.copyfile))
    of = fingerprint(one, Seen.of(one))
    assert of == fingerprint(copy, Seen.of(copy))
    assert Seen.of(one) != Seen.of(copy)  # other inodes: another look at the same name would be a change
    large = copy / "optimizer.pt"
    for at in (0, 200_000, -1):  # the beginning, what is not read, the end
        content = bytearray(300_000)
        large.write_bytes(content)
        before = fingerprint(copy, Seen.of(copy))
        content[at] = 1
        large.write_bytes(content)
        assert (fingerprint(copy, Seen.of(copy)) == before) == (at == 200_000)


# What is known of a run


def line(step: int) -> Record:
    ended = measuring.Ended(True, "")
    report = small_run.reports()[0]
    return watcher.record_of(f"checkpoint-{step}", step, Path(f"/r/{step}"), "f" * 64, report, ended)


def test_a_line_that_was_cut_off_anywhere_is_removed(tmp_path: Path) -> None:
    file = tmp_path / NAME
    state = State(file)
    state.append(line(1))
    state.append(line(2))
    state.close()
    text = file.read_bytes()
    first = text.index(b"\n") + 1
    for length in (first, first + 1, (first + len(text)) // 2, len(text) - 1):
        file.write_bytes(text[:length])
        state = State(file)
        assert state.records == [line(1)]
        assert state.repaired == (length > first)
        state.append(line(2))
        state.close()
        assert file.read_bytes() == text


def test_a_state_that_is_none_is_one_line(tmp_path: Path) -> None:
    file = tmp_path / NAME
    file.write_text('{"checkpoint": 3}\n')
    with pytest.raises(ConfigError, match=rf"{NAME}:1: is not a record of a watcher; remove the line"):
        State(file)


def test_a_second_watcher_says_so_and_a_lock_ends_with_its_process(tmp_path: Path) -> None:
    run = run_with(tmp_path / "run")
    code = "import sys, time; from entropy_probe.watching.state import State; from pathlib import Path\n"
    code += "held = State(Path(sys.argv[1])); print('held', flush=True); time.sleep(60)"
    holds = subprocess.Popen([sys.executable, "-c", code, run / NAME], stdout=subprocess.PIPE)
    assert holds.stdout is not None
    assert holds.stdout.readline() == b"held\n"
    with pytest.raises(ConfigError, match="another watcher is at work on this run; end that one first"):
        watch(run)
    holds.kill()
    holds.wait()
    holds.stdout.close()
    assert watch(run) == 0


# Each checkpoint once


def test_each_is_measured_once_in_order_also_by_the_next_watcher(tmp_path: Path, cheap: Path) -> None:
    run, said = run_with(tmp_path / "run", 10, 2), []
    assert watch(run, lambda *of: said.append(of)) == 0
    assert watch(run, lambda *of: said.append(of)) == 0
    whole(run / "checkpoint-30", 30)
    whole(run / "tmp-checkpoint-40", 40)
    assert watch(run, lambda *of: said.append(of)) == 0
    assert [record["step"] for record in records(run)] == [2, 10, 30]
    assert [text for text, kind in said if kind == "running"] == [
        f"checkpoint-{step}: is measured" for step in (2, 10, 30)
    ]
    assert not cheap.exists()
    for record in records(run):
        assert record["report"] == str(run / "entropy-probe" / f"{record['checkpoint']}.json")
        assert ProbeReport.from_json(record["report"]).checkpoint.path == record["path"]
    assert sorted(path.name for path in run.iterdir()) == sorted(
        ["entropy-probe", NAME, *(f"checkpoint-{step}" for step in (2, 10, 30)), "tmp-checkpoint-40"]
    )


def test_nothing_is_measured_before_it_is_as_it_was_for_an_interval(tmp_path: Path) -> None:
    """By a clock of our own: a file that nobody misses comes late, another one changes in place, then nothing does."""
    run, clock = run_with(tmp_path / "run", 3), [0.0]
    folder = run / "checkpoint-3"
    (folder / "rng_state.pth").unlink()
    opened = watcher.Run.open(run)
    plan = watcher.Plan(interval=1.0)
    watches = watcher.Watcher([opened], plan, Screen(live=False), Trackers([]), now=lambda: clock[0])

    def settled(at: float) -> bool:
        clock[0] = at
        watches._look()
        return watches._next() is not None

    assert not settled(0.0)
    (folder / "rng_state.pth").write_bytes(watched.files_of(3)["rng_state.pth"])
    assert not settled(1.0)
    assert not settled(1.9)
    os.utime(folder / "tokenizer.json", ns=(1, 1))  # as a write of the same length
    assert not settled(2.0)
    assert not settled(2.9)
    assert settled(3.0)
    opened.state.close()


def test_one_that_was_written_anew_is_measured_again(tmp_path: Path, cheap: Path) -> None:
    run, said = run_with(tmp_path / "run", 3), []
    watch(run)
    shutil.rmtree(run / "checkpoint-3")
    whole(run / "checkpoint-3", 3)
    watch(run, lambda *of: said.append(of[0]))  # the same content: nothing to do
    assert len(records(run)) == 1
    (run / "checkpoint-3" / "trainer_state.json").write_text('{"global_step": 3, "began": "anew"}')
    watch(run, lambda *of: said.append(of[0]))
    assert "checkpoint-3: was written anew" in said
    first, second = records(run)
    assert first["fingerprint"] != second["fingerprint"]
    assert second["report"] == str(run / "entropy-probe" / f"checkpoint-3-{second['fingerprint'][:8]}.json")


def test_one_that_is_not_complete_is_named_and_left(tmp_path: Path, cheap: Path) -> None:
    run, said = run_with(tmp_path / "run", 3), []
    (run / "checkpoint-3" / "optimizer.pt").unlink()
    assert watch(run, lambda *of: said.append(of[0])) == 0
    assert said[0].startswith("checkpoint-3: is not complete: has no optimizer state")
    assert records(run) == []


def fails(code: str) -> Callable[[Any], list[str]]:
    """A measurement that is this code, `sys.argv[1:]` being what it was given."""
    return lambda given: [sys.executable, "-S", "-c", f"import os, shutil, signal, sys\n{code}", *given]


def test_a_folder_of_runs_is_not_watched_in_silence(tmp_path: Path) -> None:
    """A run that has saved nothing yet is watched without a word, unless it is looked at once."""
    said: list[str] = []
    (tmp_path / "logs").mkdir()
    assert watch(tmp_path, lambda text, _: said.append(text)) == 0
    run_with(tmp_path / "b", 3)
    run_with(tmp_path / "a" / "checkpoints", 3, 4)
    assert watch(tmp_path, lambda text, _: said.append(text)) == 0
    alone = f"{tmp_path} has no checkpoint-N, step-N or global_step_N"
    assert said == [alone, f"{alone}; to watch the runs in it, give their folders: a, b"]


def test_a_crash_is_tried_twice_and_does_not_end_the_watcher(
    tmp_path: Path, cheap: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, said = run_with(tmp_path / "run", 3, 4), []
    killed = fails("os.kill(os.getpid(), signal.SIGKILL)")
    well = measuring.command
    is_first = "checkpoint-3="
    monkeypatch.setattr(measuring, "command", lambda given: (killed if is_first in str(given) else well)(given))
    assert watch(run, lambda *of: said.append(of[0])) == 1
    assert [(record["step"], record["passed"]) for record in records(run)] == [(3, False), (4, True)]
    assert records(run)[0]["answer"].startswith("Not measured: the measurement ended with signal 9")
    assert sum("it is tried once more" in text for text in said) == 1
    assert watch(run) == 1  # the run has failed, and it is not measured again
    assert len(records(run)) == 2


def test_deleting_a_checkpoint_that_is_measured_leaves_it_whole(
    tmp_path: Path, cheap: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is measured on links; without them it is gone, which is said, and it does not count."""
    well = measuring.command
    for links in (True, False):
        run, said = run_with(tmp_path / f"run-{links}", 3), []

        def deletes(given: Any, run: Path = run) -> list[str]:
            shutil.rmtree(run / "checkpoint-3")
            return well(given)

        monkeypatch.setattr(measuring, "command", deletes)
        if not links:

            def refuse(*_: Any) -> None:
                raise PermissionError(1, "Operation not permitted")

            monkeypatch.setattr(os, "link", refuse)
        assert watch(run, lambda *of, said=said: said.append(of[0])) == 0
        assert len(records(run)) == links
        lost = "checkpoint-3: was deleted while it was measured, and does not count"
        assert (lost in said) == (not links)
    assert [path.name for path in run.rglob(".*")] == []


def test_one_that_is_written_to_while_it_is_measured_does_not_count(
    tmp_path: Path, cheap: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, said, well = run_with(tmp_path / "run", 3), [], measuring.command

    def writes(given: Any) -> list[str]:
        with (run / "checkpoint-3" / "optimizer.pt").open("r+b") as stream:  # the same file, which is linked
            stream.write(b"PK\3\4 anew")
        return well(given)

    monkeypatch.setattr(measuring, "command", writes)
    assert watch(run, lambda *of: said.append(of[0])) == 0
    assert said[-1] == "checkpoint-3: was written to while it was measured, and does not count"
    assert records(run) == []


def test_a_gate_that_fails_ends_with_1_and_x_stops_there(tmp_path: Path, cheap: Path, monkeypatch: Any) -> None:
    well = measuring.command
    red = ["sh", "-c", '"$@"; exit 1', "sh"]
    monkeypatch.setattr(
        measuring, "command", lambda given: [*(red if "checkpoint-2=" in str(given) else []), *well(given)]
    )
    for exit_first, steps in ((False, [1, 2, 3]), (True, [1, 2])):
        run = run_with(tmp_path / f"run-{exit_first}", 1, 2, 3)
        assert watch(run, exit_first=exit_first) == 1
        assert [record["step"] for record in records(run)] == steps
        assert [record["passed"] for record in records(run)] == [step != 2 for step in steps]


def test_with_next_waits_for_it_and_gives_it(tmp_path: Path, cheap: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Otherwise the checkpoint one step later is given where it is there."""
    given, well = [], measuring.command

    def noted(options: Any) -> list[str]:
        given.append({key: value for key, _, value in (one.partition("=") for one in options)})
        return well(options)

    monkeypatch.setattr(measuring, "command", noted)
    watch(run_with(tmp_path / "one", 1, 2, 5))
    assert [set(one) & {"--probe-next"} for one in given] == [{"--probe-next"}, set(), set()]
    given.clear()
    run = run_with(tmp_path / "two", 1, 5)
    watch(run, with_next=True)
    assert [one["--probe-next"] for one in given] == [str(run / measuring.LINKED_NEXT)]
    assert [record["step"] for record in records(run)] == [1]


def test_the_change_that_came_is_that_of_the_reports(tmp_path: Path, cheap: Path, monkeypatch: Any) -> None:
    """Beside what the checkpoint before predicted for a step; and figures are the reports'."""
    made = iter(small_run.reports())
    well = measuring.command

    def another(given: Any) -> list[str]:
        file = tmp_path / "next.json"
        next(made).to_json(file)
        os.environ[watched.TEMPLATE] = str(file)
        return well(given)

    monkeypatch.setattr(measuring, "command", another)
    run = run_with(tmp_path / "run", 10, 20)
    watch(run)
    one, two = small_run.reports()[:2]
    first, second = records(run)
    came = entropy_per_token(one, two)
    assert first["change"] is None
    assert second["change"] == {
        "since": "checkpoint-10",
        "steps": 10,
        "delta_h": came.value,
        "se": came.se,
        "paired": True,
        "predicted": figures(one)["probe/delta_h_predicted"],
        "predicted_se": figures(one)["probe/delta_h_se"],
    }
    assert {k: v for k, v in second["figures"].items() if k != "probe/verdict"} == figures(two)


class _Taker(http.server.BaseHTTPRequestHandler):
    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        self.server.taken.append((self.headers["Content-Type"], json.loads(body)))  # type: ignore[attr-defined]
        self.send_response(500 if self.path == "/broken" else 200)
        self.end_headers()

    def log_message(self, format: str, *args: Any) -> None:
        """Not shown."""


@pytest.fixture
def taker() -> Iterator[Any]:
    server: Any = http.server.ThreadingHTTPServer(("127.0.0.1", 0), _Taker)
    server.taken = []
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield server
    server.shutdown()
    thread.join()
    server.server_close()


def test_verdicts_are_posted_and_figures_logged(tmp_path: Path, cheap: Path, taker: Any) -> None:
    run, log = run_with(tmp_path / "run", 3, 4), tmp_path / "figures.jsonl"
    url = f"http://127.0.0.1:{taker.server_address[1]}/"
    assert watch(run, webhook=url, trackers=Trackers([sink_of(f"jsonl:{log}")])) == 0
    assert taker.taken == [("application/json", {"run": str(run), **record}) for record in records(run)]
    logged = [json.loads(text) for text in log.read_text().splitlines()]
    assert [(one["run"], one["checkpoint"], one["step"]) for one in logged] == [
        (str(run), f"checkpoint-{step}", step) for step in (3, 4)
    ]


def test_a_webhook_and_a_tracker_that_fail_are_warnings(tmp_path: Path, cheap: Path, taker: Any) -> None:
    run, said = run_with(tmp_path / "run", 3), []
    url = f"http://127.0.0.1:{taker.server_address[1]}/broken"
    sink = sink_of(f"jsonl:{tmp_path / 'log'}")
    (tmp_path / "log").mkdir()
    assert watch(run, lambda *of: said.append(of), webhook=url, trackers=Trackers([sink])) == 0
    warnings = [text for text, kind in said if kind == "warning"]
    assert len(warnings) == 2
    assert warnings[0].startswith(f"jsonl:{tmp_path / 'log'}: cannot be logged to")
    assert warnings[1].startswith("webhook at 127.0.0.1: did not take the verdict (HTTP Error 500")
    assert len(records(run)) == 1


def test_a_measurement_ends_with_its_watcher(tmp_path: Path) -> None:
    """The process, and what it has started, when the one that holds its standard input is killed."""
    (tmp_path / "measures.py").write_text(
        "import os, subprocess, sys, time\n"
        "inner = subprocess.Popen(['sleep', '60'])\n"
        "open('pids.tmp', 'w').write(f'{os.getpid()} {inner.pid}')\n"
        "os.rename('pids.tmp', 'pids')\ntime.sleep(60)\n"
    )
    holder = "import subprocess, sys, time\n"
    holder += f"subprocess.Popen([sys.executable, {child.__file__!r}, 'measures'], stdin=subprocess.PIPE, "
    holder += "start_new_session=True)\ntime.sleep(60)"
    held = subprocess.Popen([sys.executable, "-c", holder], cwd=tmp_path)
    wait_for(lambda: (tmp_path / "pids").exists())
    pids = [int(pid) for pid in (tmp_path / "pids").read_text().split()]
    assert all(is_alive(pid) for pid in pids)
    held.send_signal(signal.SIGKILL)
    held.wait()
    wait_for(lambda: not any(is_alive(pid) for pid in pids))


def wait_for(what: Callable[[], bool], seconds: float = 20.0) -> None:
    end = time.monotonic() + seconds
    while not what():
        assert time.monotonic() < end
        time.sleep(0.02)


def is_alive(pid: int) -> bool:
    """A zombie is not: nobody waits for an orphan in a container."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


@pytest.mark.parametrize("seed", range(2))
def test_while_a_trainer_writes_and_deletes_and_the_watcher_is_killed(
    tmp_path: Path, template: Path, seed: int
) -> None:
    """`python tests/watch_runs.py 100` does a hundred of these."""
    found = watch_runs.repetition(tmp_path, template, seed, checkpoints=5)
    assert found["kills"] >= 1
    assert found["measured"] >= 1


# What is seen


def shown_runs() -> tuple[list[Shown], list[tuple[str, str]]]:
    """A run whose entropy falls, with a gate that fails, one that could not be loaded, and one that is measured."""
    kept: list[Record] = []
    for k in range(12):
        figure = {
            "probe/entropy": 1.4 - 0.01 * k * k,
            "probe/entropy_se": 0.03,
            "probe/delta_h_predicted": -0.0012 * k,
            "probe/delta_h_se": 0.0004,
            "probe/delta_h_realised": -0.0013 * k,
            "probe/delta_h_realised_se": 0.0004,
            "probe/ess": 0.98,
            "probe/momentum_share": 0.89,
        }
        since = {"since": f"checkpoint-{50 * k}", "steps": 50, "delta_h": -0.011 * k, "se": 0.02, "paired": True}
        predicted = {"predicted": -0.001, "predicted_se": 0.0004}
        real = {"cosine": 0.987, "norm_ratio": 1.01, "steps_between": 50}
        record = {
            "checkpoint": f"checkpoint-{50 * (k + 1)}",
            "step": 50 * (k + 1),
            "path": "p",
            "fingerprint": "f",
            "passed": k < 9,
            "kind": "good" if k < 9 else "bad",
            "answer": "Healthy: x" if k < 9 else "Beyond your limits: entropy." if k < 11 else "Not measured: y.",
            "failed": [] if k < 9 else ["entropy", "reward"],
            "figures": {} if k == 11 else figure,
            "fidelity": real if k % 3 == 0 else None,
            "change": {**since, **predicted} if k else None,
            "report": None if k == 11 else "r",
            "seconds": 1.0,
            "time": "t",
        }
        kept.append(Record.model_validate(record))
    waiting = [("checkpoint-650", ""), ("checkpoint-700", "is being written"), ("checkpoint-750", "")]
    events = [("12:00:01 checkpoint-650: is measured", "running"), ("12:00:02 a webhook " + 30 * "failed ", "warning")]
    return [Shown("/data/runs/a", kept, ("checkpoint-650", 72.4), waiting)], events


def rendered(width: int, height: int, *, plain: bool, next_look: float | None = None) -> list[str]:
    from rich.console import Console

    shown, events = shown_runs()
    console = Console(width=width, height=height, color_system=None)
    with console.capture() as capture:
        console.print(page(shown, events, next_look, width=width, height=height, plain=plain))
    return [text.rstrip() for text in capture.get().splitlines()]


@pytest.mark.parametrize("width", [80, 120])
@pytest.mark.parametrize("plain", [False, True])
def test_the_live_page(width: int, plain: bool) -> None:
    """As in the folder `screens`, within the terminal, and nothing is cut off but what is named as such."""
    lines = rendered(width, 32, plain=plain)
    text = "\n".join(lines) + "\n"
    file = SCREENS / f"watch-{width}{'-plain' if plain else ''}.txt"
    if os.environ.get("SCREENS_WRITTEN_ANEW"):
        file.write_text(text, encoding="utf-8")
    assert text == file.read_text(encoding="utf-8")
    assert max(map(len, lines)) <= width
    assert len(lines) < 32
    assert "…" not in text
    assert text.isascii() == plain


def test_a_low_terminal_keeps_the_newest() -> None:
    for height in range(10, 40):
        lines = rendered(80, height, plain=False, next_look=3.2)
        assert len(lines) < height
        assert any(text.startswith(" 600 ") for text in lines), height
    assert "next look in 4 s; Ctrl-C ends" in lines


def test_points_of_the_chart_are_where_the_entropies_are() -> None:
    """The line of each point is the entropy's, to half a line; the bars reach as far as two standard errors."""
    (of,), _ = shown_runs()
    text = entropy_chart(of.records[:11], 80, 7, plain=False).plain.splitlines()
    lines = text[1:8]
    high, low = 1.4 + 0.06, 1.4 - 0.01 * 100 - 0.06
    columns = sorted({x for row in lines for x, cell in enumerate(row) if cell == "●"})
    assert len(columns) == 11
    for k, x in enumerate(columns):
        (y,) = [y for y, row in enumerate(lines) if len(row) > x and row[x] == "●"]
        assert abs(high - y * (high - low) / 6 - (1.4 - 0.01 * k * k)) <= (high - low) / 12 + 1e-12
    assert text[8].strip().startswith("└─ step 50 ")
    assert text[8].endswith(" 550")


# The command


def test_a_killed_watcher_goes_on_with_real_measurements(tmp_path: Path) -> None:
    """Its measurement ends with it. The next one measures the checkpoint once, with the verdicts of pytest itself, and
    ends with 1 where a gate fails."""
    run = small_run.write(tmp_path / "runs" / "a", (10,))
    small_run.prompts(tmp_path)
    (tmp_path / "probe.yaml").write_text(f"{small_run.YAML}limits: {{entropy: {{min: 6.0}}, reward: {{min: 0.0}}}}\n")
    given = ["--config=probe.yaml", "--prompts=prompts.jsonl"]
    begun = [sys.executable, "-m", "entropy_probe", "watch", "runs/a", "--interval=0.2", "-m", "gate", *given]
    around = {**os.environ, "PYTHONPATH": str(Path(__file__).parent)}
    first = subprocess.Popen(begun, cwd=tmp_path, env=around, stdout=subprocess.DEVNULL)
    linked = run / measuring.LINKED
    wait_for(linked.exists, seconds=60)
    time.sleep(0.5)
    first.kill()
    first.wait()
    wait_for(lambda: not any(str(linked) in text for text in command_lines()))
    done = forked.python(*begun[1:], "--once", "--html=page.html", cwd=tmp_path, environment=around)
    assert done.returncode == 1, done.stdout + done.stderr
    (record,) = records(run)
    assert (record["passed"], record["failed"], record["kind"]) == (False, ["entropy"], "bad")
    assert record["answer"].startswith("Beyond your limits: entropy.")
    assert sorted(path.name for path in run.iterdir()) == ["checkpoint-10", "entropy-probe", NAME]
    assert "checkpoint-10" in (tmp_path / "page.html").read_text()
    options = [option.replace("--", "--probe-") for option in given]
    options += ["--probe-checkpoint=runs/a/checkpoint-10", "--probe-json=own.json", "--probe-log=jsonl:own.jsonl"]
    own = subprocess.run(
        [sys.executable, "-m", "pytest", "-m", "gate", *options], cwd=tmp_path, env=around, capture_output=True
    )
    assert own.returncode == 1
    ours, theirs = (json.loads(Path(path).read_text()) for path in (record["report"], tmp_path / "own.json"))
    for report in (ours, theirs):
        for key in ("timing", "memory", "environment"):
            del report[key]
    assert ours == theirs
    logged = json.loads((tmp_path / "own.jsonl").read_text())
    assert {key: value for key, value in logged.items() if key.startswith("probe/")} == record["figures"]
    assert logged["step"] == record["step"] == 10


def command_lines() -> Iterator[str]:
    for file in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            yield file.read_text(errors="replace")
        except OSError:
            continue


def test_wrong_use_is_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    run = run_with(tmp_path / "run", 3)
    for given, said in (
        (["gone"], "gone: no such folder; give the folder into which the trainer saves checkpoints"),
        ([str(run / "checkpoint-3")], "is a checkpoint itself; give the folder above it"),
        ([str(run), "--webhook", "file:///etc/passwd"], "--webhook: got 'file:///etc/passwd'; give an address"),
        ([str(run), str(tmp_path), "--state", "s"], "--state: is one file, and there are 2 runs"),
        ([str(run), "--log", "x"], "--log: got 'x'; give one of tensorboard:DIR"),
        ([str(run), "--interval", "0"], "--interval: got '0'; give a number of seconds above 0"),
        ([str(run), "--next", str(tmp_path)], "--next: is one checkpoint, and a run has many; give --with-next"),
        ([str(run), "-m", "gate"], "watch: -m gate selects no check"),
    ):
        assert main(["watch", *given]) == 4
        err = capsys.readouterr().err
        assert said in err
        assert "Traceback" not in err
