"""Figures under the names of trackers, and trackers themselves: what is logged is read back by each library's own
reader."""

from __future__ import annotations

import json
import math
import re
import struct
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import forked
import small_run
from entropy_probe import ProbeError, ProbeReport, Verdict
from entropy_probe.__main__ import main
from entropy_probe.errors import ConfigError
from entropy_probe.integrations import trackers
from entropy_probe.integrations.figures import FIGURES, VERDICTS, figures
from entropy_probe.integrations.trackers import Logged, Trackers, log_all, sink_of

OF_A_VERDICT = {"family": "zero_check", "value": 0.0, "limit": 1.0, "hint": ""}
FLOAT32 = 2.0**-24
"""Half an ulp of float32, relative: TensorBoard's scalars are float32."""


def logged(run: str = "runs/a") -> list[Logged]:
    return [Logged(run, f"checkpoint-{one.checkpoint.step}", one.checkpoint.step, one) for one in small_run.reports()]


def judged(report: ProbeReport, *statuses: str) -> ProbeReport:
    verdicts = [
        Verdict.model_validate(OF_A_VERDICT | {"criterion": f"c{n}", "status": status})
        for n, status in enumerate(statuses)
    ]
    return report.model_copy(update={"verdicts": verdicts})


def test_every_figure_is_the_reports_own() -> None:
    """Against the JSON of the report, read by its keys."""
    report = small_run.reports()[0]
    plain = json.loads(report.model_dump_json())
    row = next(row for row in plain["entropy_change"] if row["eta"] == plain["update"]["lr"])
    assert row["clip_fraction"] == 0.0
    assert row["method"] == "snis"
    assert figures(report) == {
        "probe/entropy": plain["entropy"]["per_token"]["value"],
        "probe/entropy_se": plain["entropy"]["per_token"]["se"],
        "probe/entropy_per_response": plain["entropy"]["rb"]["value"],
        "probe/entropy_per_response_se": plain["entropy"]["rb"]["se"],
        "probe/delta_h_predicted": row["predicted_per_token"],
        "probe/delta_h_se": row["predicted_per_token_se"],
        "probe/delta_h_realised": row["delta_h_per_token_pd"],
        "probe/delta_h_realised_se": row["delta_h_per_token_pd_se"],
        "probe/delta_h_predicted_per_response": row["predicted"],
        "probe/delta_h_predicted_per_response_se": row["predicted_se"],
        "probe/delta_h_realised_per_response": row["delta_h_pd"],
        "probe/delta_h_realised_per_response_se": row["delta_h_pd_se"],
        "probe/momentum_share": plain["update"]["momentum_share"],
        "probe/ess": row["unclipped_ess_fraction"],
        "probe/resolves": plain["resolution"]["per_token"],
        "probe/reward": plain["batch"]["mean_reward"],
    }


def test_the_page_names_every_figure() -> None:
    page = (Path(__file__).parents[1] / "docs" / "howto" / "beside.md").read_text()
    rows = re.findall(r"^\| `probe/(\w+)` \| (.+) \|$", page, re.MULTILINE)
    assert rows == [(name, what) for name, (what, _) in FIGURES.items()]


def test_the_verdict_is_a_number_where_something_was_judged() -> None:
    report = small_run.reports()[0]
    assert "probe/verdict" not in figures(report)
    assert figures(judged(report, "pass", "fail"))["probe/verdict"] == VERDICTS["bad"] == -1
    assert figures(judged(report, "pass", "inconclusive"))["probe/verdict"] == VERDICTS["unknown"] == 0
    assert set(figures(judged(report, "pass"))) == {f"probe/{name}" for name in FIGURES}


def test_without_a_second_moment_nothing_is_said_of_the_step() -> None:
    report = small_run.reports()[0].model_copy(update={"update": None, "resolution": None})
    assert set(figures(report)) == {
        f"probe/{name}"
        for name in ("entropy", "entropy_se", "entropy_per_response", "entropy_per_response_se", "reward")
    }


def test_tensorboard_reads_back_what_was_logged(tmp_path: Path) -> None:
    """One folder for one run, one each for several; steps in their order though the reports come in another."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    log_all([sink_of(f"tensorboard:{tmp_path / 'one'}")], reversed(logged()))
    log_all([sink_of(f"tensorboard:{tmp_path / 'two'}")], [*logged("runs/a"), *logged("runs/b")])
    for place in (tmp_path / "one", tmp_path / "two" / "a", tmp_path / "two" / "b"):
        found = EventAccumulator(str(place))
        found.Reload()
        assert set(found.Tags()["scalars"]) == set(figures(small_run.reports()[0]))
        for name in found.Tags()["scalars"]:
            events = found.Scalars(name)
            assert [event.step for event in events] == list(small_run.STEPS)
            for event, report in zip(events, small_run.reports(), strict=True):
                assert event.value == pytest.approx(figures(report)[name], rel=FLOAT32)


def history_of(file: Path) -> list[tuple[int, dict[str, Any]]]:
    """(step, values) of a W&B file: records in blocks as LevelDB's log has them, each a protobuf of W&B's own."""
    from wandb.proto.wandb_internal_pb2 import Record

    data, at, whole, rows = file.read_bytes(), 7, b"", []
    while at + 7 <= len(data):
        left = 32768 - at % 32768
        if left < 7:  # no room for a header
            at += left
            continue
        _, size, kind = struct.unpack_from("<IHB", data, at)
        whole += data[at + 7 : at + 7 + size]
        at += 7 + size
        if kind in (1, 4):  # whole, or the last part
            record, whole = Record.FromString(whole), b""
            if record.WhichOneof("record_type") == "history":
                items = {i.key or "/".join(i.nested_key): json.loads(i.value_json) for i in record.history.item}
                rows.append((record.history.step.num, items))
    return rows


def test_wandb_has_what_was_logged(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Offline. A step that is not larger than the last is no step of W&B's, and is logged all the same."""
    wandb = pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_DIR", str(tmp_path))
    first, second, third = logged()
    with Trackers([sink_of("wandb:mine")], keyed=True) as open_:
        for one in (first, third, second):
            open_.log(one)
    wandb.teardown()  # as at the end of a process: its own process has written the file when this returns
    (file,) = tmp_path.glob("wandb/offline-run-*/*.wandb")
    rows = [(step, values) for step, values in history_of(file) if "probe/entropy" in values]
    assert [values["probe/step"] for _, values in rows] == [10, 30, 20]
    assert [step for step, _ in rows][:2] == [10, 30]
    for (_, values), one in zip(rows, (first, third, second), strict=True):
        assert {name: values[name] for name in figures(one.report)} == figures(one.report)
    assert file.name == f"run-{Trackers([], keyed=True).key_of('runs/a')}.wandb"


def test_trackio_has_what_was_logged(tmp_path: Path) -> None:
    """In a process of its own: where its database is, is read when it is imported."""
    pytest.importorskip("trackio")
    files = []
    for one in small_run.reports():
        files.append(tmp_path / f"{one.checkpoint.step}.json")
        one.to_json(files[-1])
    code = """
import json, os, sys
os.environ["TRACKIO_DIR"] = sys.argv[1]
from entropy_probe import ProbeReport
from entropy_probe.integrations.trackers import Logged, Trackers, sink_of
reports = [ProbeReport.from_json(path) for path in sys.argv[2:]]
for some in (reports[:2], reports[2:]):  # a watcher that was ended, and watches again
    with Trackers([sink_of("trackio:mine")], keyed=True) as open_:
        for one in some:
            open_.log(Logged("runs/a", "c", one.checkpoint.step, one))
from trackio.sqlite_storage import SQLiteStorage
print(json.dumps(SQLiteStorage.get_logs("mine", "a")))
"""
    place = tmp_path / "trackio"
    done = subprocess.run([sys.executable, "-c", code, place, *files], capture_output=True, text=True, check=True)
    rows = json.loads(done.stdout)  # and nothing else was printed
    assert [row["step"] for row in rows] == list(small_run.STEPS)
    for row, report in zip(rows, small_run.reports(), strict=True):
        assert {name: row[name] for name in figures(report)} == figures(report)


def test_lines_are_appended_and_hold_what_json_cannot(tmp_path: Path) -> None:
    file = tmp_path / "new" / "figures.jsonl"
    odd = small_run.reports()[0]
    batch = odd.batch.model_copy(update={"mean_reward": math.nan})
    for one in (*logged(), Logged("runs/a", "odd", None, odd.model_copy(update={"batch": batch}))):
        log_all([sink_of(f"jsonl:{file}")], [one])
    lines = [json.loads(line, parse_constant=pytest.fail) for line in file.read_text().splitlines()]
    assert [line["step"] for line in lines] == [*small_run.STEPS, None]
    assert lines[1] == {"run": "runs/a", "checkpoint": "checkpoint-20", "step": 20, **figures(small_run.reports()[1])}
    assert lines[3]["probe/reward"] == "NaN"


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("mlflow:x", "--log: got 'mlflow:x'; give one of tensorboard:DIR, wandb[:PROJECT], trackio[:PROJECT], jsonl:"),
        ("jsonl", "--log: 'jsonl' does not say where to write; write jsonl:FILE"),
        ("tensorboard:", "--log: 'tensorboard:' does not say where to write; write tensorboard:DIR"),
        ("jsonl:.", "is a folder; give the path of a file"),
        ("tensorboard:file", "is a file; give a folder"),
    ],
)
def test_a_sink_that_cannot_be_used_is_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: str, said: str
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError) as caught:
        sink_of(text)
    assert said in str(caught.value)


def test_a_library_that_is_missing_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trackers, "find_spec", lambda name: None)
    with pytest.raises(ConfigError) as caught:
        sink_of("wandb")
    line = "--log: the library wandb is not installed; pip install pytest-entropy-probe[wandb]"
    assert str(caught.value) == line


def test_one_sink_that_fails_leaves_the_others_theirs(tmp_path: Path) -> None:
    bad, good = tmp_path / "bad", tmp_path / "good.jsonl"
    sinks = [sink_of(f"jsonl:{bad}"), sink_of(f"jsonl:{good}")]
    bad.mkdir()
    with pytest.raises(ProbeError) as caught:
        log_all(sinks, logged()[:1])
    assert str(caught.value).startswith(f"jsonl:{bad}: cannot be logged to (IsADirectoryError")
    assert len(good.read_text().splitlines()) == 1


def test_run_logs_at_the_step_of_the_checkpoint(tmp_path: Path) -> None:
    """Nothing was judged, so that there is no verdict; and the report is the one that is written."""
    run = small_run.write(tmp_path / "a", (20,))
    (tmp_path / "probe.yaml").write_text(small_run.YAML)
    given = [f"--config={tmp_path / 'probe.yaml'}", f"--prompts={small_run.prompts(tmp_path)}"]
    out, log = tmp_path / "report.json", tmp_path / "log.jsonl"
    assert main(["run", str(run / "checkpoint-20"), "--out", str(out), f"--log=jsonl:{log}", *given]) == 0
    known = {"run": str(run), "checkpoint": "checkpoint-20", "step": 20}
    assert json.loads(log.read_text()) == {**known, **figures(ProbeReport.from_json(out))}


def test_pytest_and_run_complain_before_they_measure(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert main(["run", "demo", "--log=mlflow:x"]) == 4
    assert capsys.readouterr().err.startswith("entropy-probe: --log: got 'mlflow:x'; give one of")
    done = forked.python("-m", "pytest", "--probe-checkpoint=demo", "--probe-log=jsonl", cwd=tmp_path)
    assert done.returncode == 4
    assert "ERROR: --probe-log: 'jsonl' does not say where to write; write jsonl:FILE" in done.stderr


def test_nothing_imports_a_tracker() -> None:
    """Neither the library, nor the plugin, nor the module of trackers itself before something is logged."""
    code = """
import sys, entropy_probe, entropy_probe.run, pytest_entropy_probe.plugin, pytest_entropy_probe.shown.summary
import entropy_probe.integrations.trackers as trackers
trackers.sink_of("jsonl:here")
print(*sorted({"tensorboard", "wandb", "trackio", "trl"} & set(sys.modules)))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == ""
