"""`entropy-probe watch` while a trainer writes and deletes, and the watcher is killed at random.

    python tests/watch_runs.py [COUNT]

Each complete checkpoint that lived long enough is measured exactly once, and none in part.
"""

from __future__ import annotations

import contextlib
import json
import os
import random
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

import forked
import watched

PAUSE = 0.2
"""The watcher's interval, seconds."""
LONG = 2.5
"""Seconds after which a checkpoint must have been measured: a life of the watcher is 0.6 s at least, which is enough
for one look after another and a measurement, and there are at most ten before it."""


def watch(run: Path, said: Path, partial: Path, template: Path, once: bool) -> None:
    """The watcher, in a process of its own, with a measurement that looks at the bytes."""
    from entropy_probe.integrations.trackers import Trackers
    from entropy_probe.watching import measuring, watcher
    from entropy_probe.watching.screen import Screen

    os.environ |= {watched.PARTIAL: str(partial), watched.TEMPLATE: str(template)}
    watcher._TICK = 0.01
    measuring.command = lambda given: [sys.executable, "-S", "-E", watched.__file__, *given]
    with said.open("a") as stream, contextlib.redirect_stdout(stream):
        opened = watcher.Run.open(run)
        plan = watcher.Plan(interval=PAUSE, once=once)
        watcher.Watcher([opened], plan, Screen(live=False), Trackers([])).watch()


def repetition(folder: Path, template: Path, seed: int, checkpoints: int = 10) -> dict[str, Any]:
    """Raises `AssertionError` where a checkpoint was measured in part, twice or not at all."""
    chance = random.Random(seed)
    run, log, said, partial = (folder / name for name in ("run", "log", "said", "partial"))
    run.mkdir()
    arguments = run, said, partial, template
    trainer = forked.SERVER.Process(target=watched.train, args=(run, checkpoints, seed, PAUSE, log))
    trainer.start()
    kills = 0
    while trainer.is_alive():
        watcher = forked.SERVER.Process(target=watch, args=(*arguments, False))
        watcher.start()
        life = time.monotonic() + chance.uniform(0.6, 2.5)
        while time.monotonic() < life and trainer.is_alive():
            time.sleep(0.01)
        watcher.kill()
        watcher.join()
        kills += 1
    last = forked.SERVER.Process(target=watch, args=(*arguments, True))
    last.start()
    last.join()
    assert last.exitcode == 0, said.read_text()
    assert trainer.exitcode == 0
    return {"kills": kills, **judged(run, log, partial)}


def judged(run: Path, log: Path, partial: Path) -> dict[str, int]:
    assert not partial.exists(), f"measured in part: {partial.read_text()}"
    records = [json.loads(line) for line in (run / "entropy-probe.jsonl").read_text().splitlines()]
    times = Counter(record["step"] for record in records)
    assert set(times.values()) <= {1}, f"measured twice: {times}"
    complete, deleted = {}, {}
    for what, step, at in map(json.loads, log.read_text().splitlines()):
        (complete if what == "complete" else deleted)[step] = at
    never = [
        step
        for step, at in complete.items()
        if step not in times and (step not in deleted or deleted[step] - at >= LONG)
    ]
    assert not never, f"never measured: {never}"
    for record in records:
        assert json.loads(Path(record["report"]).read_text())["checkpoint"]["path"] == record["path"]
    left = [path.name for path in run.rglob(".*")]
    assert not left, f"left behind: {left}"
    lives = [deleted[step] - at for step, at in complete.items() if step in deleted]
    return {
        "measured": len(records),
        "deleted": len(deleted),
        "long": sum(life >= LONG for life in lives),
        "missed": len(complete) - len(records),
    }


def main(count: int, first: int = 0) -> None:
    import small_run

    total: Counter[str] = Counter()
    with tempfile.TemporaryDirectory() as folder:
        template = Path(folder) / "template.json"
        small_run.reports()[0].to_json(template)
        for seed in range(first, first + count):
            place = Path(folder) / str(seed)
            place.mkdir()
            total.update(repetition(place, template, seed))
            print(seed, dict(total), flush=True)


if __name__ == "__main__":
    main(*map(int, sys.argv[1:] or ["100"]))
