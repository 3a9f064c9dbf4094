"""`make mutants`: how many slips that a machine makes does the acceptance suite see?

    python tests/mutants/run.py [--seed 0] [--count 200]

Each mutant of the library is run in a process of its own on two checkpoints: the demo, which samples (smoke), and one
whose responses and rewards are in files (standard). *Killed*: an error, or a criterion that fails. *Equivalent*: no
number, text or verdict of either report moved, but by rounding. Whatever moved something and passed is a *survivor*,
with what moved.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter, defaultdict
from concurrent.futures import ThreadPoolExecutor
from math import isclose
from pathlib import Path
from typing import Any

TESTS = Path(__file__).parents[1]
ROOT = TESTS.parent
sys.path.insert(0, str(TESTS))

from mutants.mutate import Mutant, mutants  # noqa: E402

PLACES = ("estimators", "stages", "model", "pipeline", "run.py", "evidence.py")
# Of these a run says nothing, or they keep to limits of time and memory: other tests hold them.
LEFT_OUT = ("stages/memory", "pipeline/clock.py", "pipeline/environment.py", "model/quiet.py", "model/placement.py")
LIGHT = {"generation": {"num_return_sequences": 4, "max_new_tokens": 16}}
SMOKE = {"budget": "smoke", "batch": {"num_prompts": 6, "num_update_prompts": 6}, **LIGHT}
STANDARD = {"invariance": {"max_examples": 1}}
TIMEOUT = 180.0


def runs(folder: Path, standard: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """What every mutant is asked: statuses of the criteria, and the report, by checkpoint."""
    import warnings

    import torch

    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    from entropy_probe import ProbeConfig, run_probe
    from entropy_probe.demo import checkpoint_path
    from entropy_probe_checks.criteria import CRITERIA

    found = {}
    files = (folder / "files" / "ckpt", standard, folder / "files" / "e.jsonl", folder / "files" / "u.jsonl")
    # the shorter one first: most slips are seen there, and the demo is not asked then
    for name, (path, config, *batches) in {"files": files, "demo": (checkpoint_path(), SMOKE)}.items():
        report = run_probe(path, ProbeConfig.from_mapping(config), *batches)
        verdicts = {criterion: judge(report).status for criterion, judge in CRITERIA.items()}
        text = report.model_dump_json(exclude={"timing", "memory", "environment", "verdicts"})
        found[name] = {"verdicts": verdicts, "report": json.loads(text)}
        if "fail" in verdicts.values():
            break
    return found


def _asked(tree: Path, folder: Path, standard: dict[str, Any], answer: Path, trace: bool) -> None:
    """In a process of its own: the library of `tree`."""
    os.setsid()
    sys.path[:0] = [str(tree / "probe"), str(tree / "checks")]
    sys.dont_write_bytecode = True
    executed: dict[str, set[int]] = defaultdict(set)
    package = str(tree / "probe" / "entropy_probe") + "/"
    if trace:
        sys.settrace(_tracer(package, executed))
    with open(os.devnull, "w") as nowhere:
        os.dup2(nowhere.fileno(), 2)
    try:
        found: dict[str, Any] = {"runs": runs(folder, standard)}
    except BaseException as error:
        found = {"error": f"{type(error).__name__}: {error}"[:200]}
    sys.settrace(None)
    found["executed"] = {file.removeprefix(package): sorted(lines) for file, lines in executed.items()}
    answer.write_text(json.dumps(found))
    os._exit(0)


def _tracer(package: str, executed: dict[str, set[int]]) -> Any:
    def of_line(frame: Any, event: str, _: Any) -> Any:
        if event == "line":
            executed[frame.f_code.co_filename].add(frame.f_lineno)
        return of_line

    calls: Counter[Any] = Counter()

    def of_call(frame: Any, *_: Any) -> Any:
        """The first calls of a function, which go through most of its lines: the others at full speed."""
        code = frame.f_code
        if not code.co_filename.startswith(package) or calls[code] >= 8:
            return None
        calls[code] += 1
        return of_line

    return of_call


class Asked:
    """Copies of the tree, and processes that ask them; the libraries are imported once."""

    def __init__(self, folder: Path, workers: int, standard: dict[str, Any]) -> None:
        import peft  # noqa: F401
        import scipy.stats  # noqa: F401
        import transformers.models.auto.modeling_auto
        import transformers.models.llama.modeling_llama  # noqa: F401

        assert not any(name.partition(".")[0] == "entropy_probe" for name in sys.modules)
        self.folder, self.standard = folder, standard
        self._trees = [folder / f"tree-{k}" for k in range(workers)]
        for tree in self._trees:
            for part in ("probe", "checks"):
                shutil.copytree(ROOT / part, tree / part)

    def ask(self, mutant: Mutant | None, *, trace: bool = False) -> dict[str, Any]:
        tree = self._trees.pop()
        try:
            path = None if mutant is None else tree / "probe" / "entropy_probe" / mutant.file
            original = None if path is None else path.read_bytes()
            if path is not None and mutant is not None:
                path.write_text(mutant.source)
            answer = tree / "answer.json"
            answer.unlink(missing_ok=True)
            process = multiprocessing.get_context("fork").Process(
                target=_asked, args=(tree, self.folder, self.standard, answer, trace)
            )
            process.start()
            process.join(20 * TIMEOUT if trace else TIMEOUT)
            if process.is_alive() and process.pid is not None:
                os.killpg(process.pid, signal.SIGKILL)
            if path is not None and original is not None:
                times = (ROOT / "probe" / "entropy_probe" / path.relative_to(tree / "probe" / "entropy_probe")).stat()
                path.write_bytes(original)
                os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))
            return json.loads(answer.read_text()) if answer.is_file() else {"error": "no answer in time"}
        finally:
            self._trees.append(tree)


def moved(before: Any, after: Any, path: str = "") -> list[str]:
    """Where two reports differ."""
    if isinstance(before, dict) and isinstance(after, dict):
        keys = list(before) + [key for key in after if key not in before]
        return [m for key in keys for m in moved(before.get(key), after.get(key), f"{path}.{key}" if path else key)]
    if isinstance(before, list) and isinstance(after, list) and len(before) == len(after):
        return [
            m
            for k, (one, other) in enumerate(zip(before, after, strict=True))
            for m in moved(one, other, f"{path}[{k}]")
        ]
    if before == after or path.endswith("checkpoint.path"):  # each is asked in a folder of its own
        return []
    if isinstance(before, float) and isinstance(after, float) and isclose(before, after, rel_tol=1e-5, abs_tol=1e-10):
        return []  # rounding, of float32 or of float64
    return [f"{path}: {_short(before)} → {_short(after)}"]


def _short(value: Any) -> str:
    return f"{value:.6g}" if isinstance(value, float) else str(value)[:40]


def outcome(answer: dict[str, Any], healthy: dict[str, Any]) -> tuple[str, str]:
    """(killed, equivalent or survived; by what, or what moved)."""
    if "error" in answer:
        return "killed", f"error: {answer['error']}"
    for name, found in answer["runs"].items():
        red = [criterion for criterion, status in found["verdicts"].items() if status == "fail"]
        if red:
            return "killed", f"{name}: {', '.join(red[:4])}"
        opened = [
            criterion
            for criterion, status in found["verdicts"].items()
            if status == "inconclusive" != healthy["runs"][name]["verdicts"][criterion]
        ]
        if opened:
            return "killed", f"{name}: {', '.join(opened[:4])} open"
    differences = moved(
        {n: f["report"] for n, f in healthy["runs"].items()}, {n: f["report"] for n, f in answer["runs"].items()}
    )
    if not differences:
        return "equivalent", ""
    return "survived", f"{len(differences)} moved: {'; '.join(differences[:3])}"


def prepare(folder: Path) -> None:
    """The checkpoint of files, in a process of its own, so that nothing of ours is imported here."""
    process = multiprocessing.get_context("fork").Process(target=_files, args=(folder,))
    process.start()
    process.join()
    assert process.exitcode == 0


def _files(folder: Path) -> None:
    from faults.subjects import Bench

    made = Bench(folder).files("llama")
    (folder / "files").mkdir()
    for path, name in zip(made, ("ckpt", "e.jsonl", "u.jsonl"), strict=True):
        assert path is not None
        shutil.move(path, folder / "files" / name)


def judged(
    count: int, seed: int, workers: int, *, standard: dict[str, Any] = STANDARD, show: bool = True
) -> list[tuple[Mutant, str, str]]:
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        asked = Asked(folder, workers, standard)
        prepare(folder)
        healthy = asked.ask(None, trace=True)
        assert "error" not in healthy, healthy
        assert "fail" not in {s for f in healthy["runs"].values() for s in f["verdicts"].values()}, healthy
        executed = {
            file: set(lines)
            for file, lines in healthy["executed"].items()
            if file.startswith(PLACES) and not file.startswith(LEFT_OUT)
        }
        drawn = mutants(ROOT / "probe" / "entropy_probe", executed, count, seed)
        found: list[tuple[Mutant, str, str]] = []
        with ThreadPoolExecutor(workers) as pool:
            for mutant, answer in zip(drawn, pool.map(asked.ask, drawn), strict=True):
                found.append((mutant, *outcome(answer, healthy)))
                if show:
                    print(f"{len(found)} {found[-1][1]} {mutant} [{found[-1][2]}]"[:300], flush=True)
        return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--count", type=int, default=200)
    parser.add_argument("--workers", type=int, default=2)
    arguments = parser.parse_args()
    start = time.monotonic()
    found = judged(arguments.count, arguments.seed, arguments.workers)
    counts = {status: sum(one[1] == status for one in found) for status in ("killed", "equivalent", "survived")}
    told = counts["killed"] + counts["survived"]
    for mutant, status, what in found:
        if status != "killed":
            print(f"| `{mutant.file}:{mutant.line}` | `{mutant.what}` | {status} | {what} |".replace("\n", " "))
    print(
        f"seed {arguments.seed}: {len(found)} mutants, {counts['killed']} killed, {counts['equivalent']} equivalent, "
        f"{counts['survived']} survived: {100 * counts['killed'] / max(told, 1):.1f} % of those that move anything; "
        f"{time.monotonic() - start:.0f} s"
    )


if __name__ == "__main__":
    main()
