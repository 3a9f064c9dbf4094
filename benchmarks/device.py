"""One GPU, at most eight minutes: the suite on real sizes, beside the CPU, the plan, TRL and an optimizer step.

    benchmarks/device.sh [--device cuda] [--small] [--case NAME …] [--seconds 460] [--out FILE.json]

demo         the bundled checkpoint
0.5b-short   0.5 billion parameters, LoRA, 64 tokens a response: small enough for the CPU
0.5b-lora-1024 … 1.5b-full-4096    sizes of Qwen2.5, random weights, LoRA or all parameters, tokens a response

Of every case: verdicts, time and the largest memory by stage, the memory over what `entropy_probe.cost` expects, and
whether ΔH is 0 bit for bit at η = 0. Of the first two also: the same run on the CPU, number by number, and the same run
again on the device, which must give every number again bit for bit. Of all but the demo: TRL's functions score the same
responses, and one optimizer step is made by hand; time, memory, and the largest difference of log p and of an entropy.

Each suite is a process of its own, so that its peak is its own. The three of one case run at once, and that on the CPU
goes on beside the next cases: look at the times of the larger cases. Results are written after every case; what there
is no time for is said to be left out. `--small` makes the models tiny.
"""

from __future__ import annotations

import argparse
import datetime
import gc
import importlib.metadata
import json
import math
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from checkpoints import made

RESULTS = Path(__file__).parent / "results"
TOLERANCE = (
    1e-3  # of a number, between two devices: float32 sums in another order, with some cancellation
)
ROUNDING = 1e-6  # a number below it is a size of rounding
PROMPT = 64


@dataclass(frozen=True)
class Case:
    """`twice`: on the CPU too, and again on the device."""

    shape: str
    lora: bool = True
    length: int = 64
    prompts: int = 4
    group: int = 2
    twice: bool = False

    def small(self) -> Case:
        return Case("small", self.lora, max(8, self.length // 64), 4, 2, self.twice)


CASES = {
    "demo": None,
    "0.5b-short": Case("0.5b", twice=True),
    "0.5b-lora-1024": Case("0.5b", length=1024),
    "1.5b-lora-1024": Case("1.5b", length=1024),
    "0.5b-full-1024": Case("0.5b", lora=False, length=1024),
    "1.5b-lora-4096": Case("1.5b", length=4096, prompts=2),
    "0.5b-lora-4096": Case("0.5b", length=4096, prompts=2),
    "0.5b-full-4096": Case("0.5b", lora=False, length=4096, prompts=2),
    "1.5b-full-1024": Case("1.5b", lora=False, length=1024),
    "1.5b-full-4096": Case("1.5b", lora=False, length=4096, prompts=2),
}


class Suite:
    """`pytest -m acceptance` of a checkpoint, begun; `result()` waits for its end."""

    def __init__(
        self,
        checkpoint: str,
        device: str,
        folder: Path,
        *options: str,
        name: str = "on-device",
        threads: int | None = None,
    ) -> None:
        self.report = folder / f"{name}.json"
        plugin = [] if _installed() else ["-p", "pytest_entropy_probe.plugin"]
        own = [f"--probe-device={device}", f"--probe-json={self.report}", *options]
        command = [sys.executable, "-m", "pytest", *plugin, f"--probe-checkpoint={checkpoint}"]
        command += ["-m", "acceptance", "-q", "-p", "no:cacheprovider", *own]
        environment = {**os.environ, "COLUMNS": "120"}
        if threads is not None:
            environment["OMP_NUM_THREADS"] = str(max(1, threads))
        self._log = (folder / f"{self.report.stem}.log").open("w+")
        self._began = time.perf_counter()
        self._process = subprocess.Popen(  # noqa: S603
            command, cwd=folder, stdout=self._log, stderr=subprocess.STDOUT, env=environment
        )

    def result(self, limit: float) -> dict[str, Any]:
        """Exit code, seconds, verdicts that are no pass, time and memory by stage, and the whole `report`."""
        try:
            code: int | str = self._process.wait(timeout=max(limit, 1.0))
        except subprocess.TimeoutExpired:
            self.stop()
            code = f"ended after {limit:.0f} s"
        row: dict[str, Any] = {
            "exit": code,
            "seconds": round(time.perf_counter() - self._began, 1),
        }
        self._log.seek(0)
        output = self._log.read()
        self._log.close()
        if code != 0:
            row["output"] = output[-3000:]
        if not self.report.exists():
            return row
        said = json.loads(self.report.read_text())
        statuses = [(v["criterion"], v["status"], v["value"], v["limit"]) for v in said["verdicts"]]
        row["passed"] = sum(status == "pass" for _, status, *_ in statuses)
        row["not_passed"] = {name: of for name, *of in statuses if of[0] != "pass"}
        row["zero_is_bitwise"] = said["continuity"]["zero_check_bitwise"]
        row["time"] = {name: round(value, 2) for name, value in said["timing"].items()}
        row["memory"] = said["memory"]
        row["report"] = said
        return row

    def stop(self) -> None:
        if self._process.poll() is None:
            self._process.kill()
            self._process.wait()


def _installed() -> bool:
    return any(
        point.name == "entropy_probe" for point in importlib.metadata.entry_points(group="pytest11")
    )


def numbers(report: Any, at: str = "") -> Iterator[tuple[str, float]]:
    """Every number of a report, but of what differs between two runs of one measurement."""
    if isinstance(report, dict):
        for key, value in report.items():
            if not at and key in {
                "timing",
                "memory",
                "environment",
                "verdicts",
                "benchmark",
                "config",
            }:
                continue
            yield from numbers(value, f"{at}.{key}" if at else key)
    elif isinstance(report, list):
        for place, value in enumerate(report):
            yield from numbers(value, f"{at}[{place}]")
    elif isinstance(report, int | float) and not isinstance(report, bool):
        yield at, float(report)


def beside(one: Any, other: Any) -> dict[str, Any]:
    """How many numbers of two reports are equal bit for bit, within 1e-3, below 1e-6 in both; and the others."""
    expected = dict(numbers(other))
    found = {name: x for name, x in numbers(one) if name in expected and math.isfinite(x)}
    off = {
        name: abs(x - expected[name]) / max(abs(x), abs(expected[name]), 1e-300)
        for name, x in found.items()
    }
    rounding = {n for n, x in found.items() if max(abs(x), abs(expected[n])) < ROUNDING}
    outside = {n: of for n, of in off.items() if of > TOLERANCE and n not in rounding}
    most = sorted(outside, key=lambda name: -outside[name])
    return {
        "compared": len(found),
        "bitwise": sum(value == 0 for value in off.values()),
        "within_1e-3": sum(value <= TOLERANCE for value in off.values()),
        "both_below_1e-6": sum(off[name] > TOLERANCE for name in rounding),
        "outside": {name: [found[name], expected[name]] for name in most[:40]},
    }


def against_plan(
    row: dict[str, Any], checkpoint: Path, configured: dict[str, Any], prompts: int
) -> dict[str, Any]:
    """The plan's bytes of every stage, and what was held at most over them. On the CPU the process counts too."""
    from entropy_probe.config import ProbeConfig
    from entropy_probe.cost.plan import estimate, network_of

    config = ProbeConfig.from_mapping(
        {**configured, "batch": {"num_prompts": prompts, "num_update_prompts": prompts}}
    )
    planned = estimate(network_of(checkpoint), config, PROMPT).bytes
    held = {stage: of["peak"] for stage, of in row["memory"]["stages"].items()}
    return {
        "bytes": {stage: round(of) for stage, of in planned.items()},
        "held_over_planned": {s: round(held[s] / of, 3) for s, of in planned.items() if s in held},
    }


def by_hand(checkpoint: Path, rollouts: Path, device: str) -> dict[str, Any]:
    """On one model: our scores and those of TRL's functions, and one step of AdamW on −A·log p, layers run again."""
    from trl.trainer.utils import entropy_from_logits, selective_log_softmax

    from entropy_probe import load_checkpoint
    from entropy_probe.config import ProbeConfig
    from entropy_probe.model.forward import bind
    from entropy_probe.stages.responses.rollouts_file import read_rollouts
    from entropy_probe.stages.scores import score

    of = load_checkpoint(checkpoint, device=device)
    bound: Any = bind(of.model)
    model: Any = bound.module
    batch = read_rollouts(rollouts, bound, of.tokenizer)
    config = ProbeConfig.from_mapping({"generation": {"tf_batch_size": 2}})
    inside = batch.gen_mask
    steps = torch.arange(batch.max_gen_len)[None] < batch.gen_lens[:, None]

    def logits(row: int) -> tuple[Any, Any]:
        first = int(batch.prompt_lens[row])
        last = first + int(batch.gen_lens[row])
        ids = batch.ids[row : row + 1, :last].to(device)
        kept = model(ids, use_cache=False, logits_to_keep=last - first + 1).logits[:, :-1]
        return kept, ids[:, first:]

    @torch.no_grad()
    def trl() -> tuple[torch.Tensor, torch.Tensor]:
        logp, entropy = (torch.zeros(steps.shape, dtype=torch.float64) for _ in range(2))
        for row, length in enumerate(batch.gen_lens.tolist()):
            kept, tokens = logits(row)
            logp[row, :length] = selective_log_softmax(kept, tokens)[0].double().cpu()
            entropy[row, :length] = entropy_from_logits(kept)[0].double().cpu()
        return logp, entropy

    def step() -> None:
        parameters = [p for p in model.parameters() if p.requires_grad]
        optimizer = torch.optim.AdamW(parameters, lr=0.0)
        advantages = batch.rewards - batch.rewards.mean(1, keepdim=True)
        for row, advantage in enumerate(advantages.flatten().tolist()):
            kept, tokens = logits(row)
            (-advantage * selective_log_softmax(kept, tokens).mean()).backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    our, ours = timed(lambda: score(bound, batch, config), device)
    their, of_trl = timed(trl, device)
    own = our.token_logp.flatten(0, 1), our.rb_entropy.flatten(0, 1)
    off = [float((a - b)[steps].abs().max()) for a, b in zip(own, their, strict=True)]
    model.train()
    model.enable_input_require_grads()
    model.gradient_checkpointing_enable()
    _, of_step = timed(step, device)
    return {
        "tokens": int(inside.sum()),
        "scores": ours,
        "trl": of_trl,
        "optimizer_step": of_step,
        "largest_difference_nats": dict(zip(("log_p", "entropy"), off, strict=True)),
    }


def timed(work: Callable[[], Any], device: str) -> tuple[Any, dict[str, float]]:
    """What the second call gives, its seconds, and the most bytes that torch held (none on the CPU)."""
    cuda = device.startswith("cuda")
    work()
    if cuda:
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
    began = time.perf_counter()
    found = work()
    if cuda:
        torch.cuda.synchronize()
    row = {"seconds": round(time.perf_counter() - began, 4)}
    if cuda:
        row["peak_bytes"] = torch.cuda.max_memory_allocated()
    return found, row


class Session:
    """The cases of one call, and the time that is left for them."""

    def __init__(self, given: argparse.Namespace) -> None:
        self.device, self.small = given.device, given.small
        self._ends = time.perf_counter() + given.seconds
        self._waiting: list[Callable[[], None]] = []
        self._suites: list[Suite] = []

    def _begun(self, *arguments: Any, **options: Any) -> Suite:
        self._suites.append(Suite(*arguments, **options))
        return self._suites[-1]

    def stop(self) -> None:
        """End what still runs."""
        for suite in self._suites:
            suite.stop()

    @property
    def left(self) -> float:
        return self._ends - time.perf_counter()

    def suites(
        self, row: dict[str, Any], checkpoint: str, folder: Path, *options: str, twice: bool
    ) -> None:
        """The suite on the device, into `row`; `twice`: again, and on the CPU, which is waited for at the end."""
        if not twice:
            row |= self._begun(checkpoint, self.device, folder, *options).result(self.left)
            row.pop("report", None)
            return
        cores = os.cpu_count() or 2
        cpu = self._begun(checkpoint, "cpu", folder, *options, name="on-cpu", threads=cores // 2)
        of_device = [
            self._begun(checkpoint, self.device, folder, *options, name=name, threads=cores // 4)
            for name in ("on-device", "again")
        ]
        first, again = (suite.result(self.left) for suite in of_device)
        row |= first
        report = row.pop("report", None)

        def compared() -> None:
            on_cpu = cpu.result(self.left)
            both = {"again": again.pop("report", None), "cpu": on_cpu.pop("report", None)}
            row["again"] = {"exit": again["exit"], "seconds": again["seconds"]}
            row["cpu"] = {k: on_cpu.get(k) for k in ("exit", "seconds", "time", "not_passed")}
            for name, other in both.items():
                if report is not None and other is not None:
                    row[name]["beside"] = beside(report, other)

        self._waiting.append(compared)

    def demo(self, folder: Path) -> dict[str, Any]:
        row: dict[str, Any] = {}
        self.suites(row, "demo", folder, twice=True)
        return row

    def case(self, case: Case, folder: Path) -> dict[str, Any]:
        began = time.perf_counter()
        of = made(case.shape, folder, torch.device(self.device), lora=case.lora)
        sizes = {"group": case.group, "prompt": PROMPT, "length": case.length}
        files = [
            of.drawn(folder / f"{name}.jsonl", prompts=case.prompts, seed=seed, **sizes)
            for seed, name in enumerate("eu")
        ]
        row: dict[str, Any] = {"made_in": round(time.perf_counter() - began, 1)}
        checkpoint = of.folder
        del of
        self._free()
        configured = self._configured(case)
        (folder / "probe.yaml").write_text(json.dumps(configured))
        options = ["--probe-budget=smoke", "--probe-config=probe.yaml"]
        options += [f"--probe-rollouts={files[0]}", f"--probe-update-rollouts={files[1]}"]
        self.suites(row, str(checkpoint), folder, *options, twice=case.twice)
        if "memory" in row:
            row["plan"] = _tried(lambda: against_plan(row, checkpoint, configured, case.prompts))
        if self.left > 0:
            row["by_hand"] = _tried(lambda: by_hand(checkpoint, files[0], self.device))
            self._free()
        return row

    def _configured(self, case: Case) -> dict[str, Any]:
        generation = {
            "max_new_tokens": case.length,
            "num_return_sequences": case.group,
            "tf_batch_size": 1 if case.length > 2048 else 2,
        }
        found: dict[str, Any] = {"generation": generation, "device": self.device}
        if not case.lora:  # two blocks of X and Y are held in memory, not on the device
            found["first_order"] = {"mode": "block", "num_blocks": 2, "max_gradient_gib": 96}
        return found

    def _free(self) -> None:
        gc.collect()
        if self.device.startswith("cuda"):
            torch.cuda.empty_cache()

    def finish(self) -> None:
        for wait in self._waiting:
            wait()
        self._waiting.clear()

    def row(self, name: str, folder: Path) -> dict[str, Any]:
        case = CASES[name]
        if self.left < 20:
            return {"exit": "left out: no time"}
        if case is None:
            return _tried(lambda: self.demo(folder))
        row = _tried(lambda: self.case(case.small() if self.small else case, folder))
        self._free()
        return row


def _tried(work: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """What it gives, or what it raised: the other cases are still asked."""
    try:
        return work()
    except Exception as error:
        return {"exit": f"{type(error).__name__}: {str(error)[:600]}"}


def missing() -> list[str]:
    """Packages that a case needs and that are not here."""
    wanted = [
        "torch",
        "transformers",
        "peft",
        "pydantic",
        "arviz_stats",
        "pytest_benchmark",
        "trl",
    ]
    return [name for name in wanted if importlib.util.find_spec(name) is None]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--small", action="store_true", help="tiny models and short responses")
    parser.add_argument("--case", action="append", choices=list(CASES), help="default: all")
    parser.add_argument("--seconds", type=float, default=460.0, help="after which no case begins")
    parser.add_argument("--out", type=Path, help="default: benchmarks/results/DATE-CARD.json")
    given = parser.parse_args()
    lacking = missing()
    if lacking:
        parser.error(
            f"not installed here: {', '.join(lacking)}; install them, or give WHEELS=FOLDER"
        )
    if given.device.startswith("cuda") and not torch.cuda.is_available():
        parser.error("torch sees no GPU here; give --device cpu --small to try the script")
    card = torch.cuda.get_device_name(given.device) if given.device.startswith("cuda") else "cpu"
    day = datetime.datetime.now(datetime.UTC).date()
    slug = re.sub(r"\W+", "-", card.lower())
    out = given.out or RESULTS / f"{day}-device-{slug}.json"
    session = Session(given)
    results: dict[str, Any] = {
        "device": card,
        "day": str(day),
        "torch": torch.__version__,
        "transformers": importlib.metadata.version("transformers"),
        "small": given.small,
        "cases": {},
    }
    with tempfile.TemporaryDirectory() as place:
        try:
            for name in given.case or list(CASES):
                folder = Path(place) / name
                folder.mkdir()
                results["cases"][name] = row = session.row(name, folder)
                keys = ("exit", "seconds", "passed", "not_passed", "by_hand")
                print(name, json.dumps({k: row.get(k) for k in keys})[:1500], flush=True)
                out.write_text(json.dumps(results, indent=1) + "\n")
                case = CASES[name]
                if case is not None and not case.twice:
                    shutil.rmtree(folder, ignore_errors=True)
            session.finish()
            out.write_text(json.dumps(results, indent=1) + "\n")
        finally:
            session.stop()
    print(out)


if __name__ == "__main__":
    main()
