"""What the callback says during training, beside what came: TRL runs that collapse, and their healthy twins.

    python tests/loop_reality.py measure FOLDER [SEED…]      two runs of each seed, about four minutes each on one core
    python tests/loop_reality.py show FOLDER                 the tables of docs/howto/in-the-loop.md

The runs are those of docs/collapse.py. The callback probes every step, which changes nothing of the training, so that
what it says every fifth step is a part of the same. Every fifth step the change that came is measured on a second batch
too, of other prompts, which the prediction knows nothing of. Nothing here stops a run: `show` says where a gate would.
"""

from __future__ import annotations

import contextlib
import math
import shutil
import sys
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "docs"))

import collapse  # noqa: E402

import entropy_probe.demo  # noqa: E402
from entropy_probe.integrations.as_found import as_found  # noqa: E402
from entropy_probe.integrations.transformers import EntropyProbeCallback  # noqa: E402
from entropy_probe.live import ProbedStep, measure_step  # noqa: E402
from entropy_probe.report import Estimate  # noqa: E402
from entropy_probe.step_report import StepReport  # noqa: E402
from entropy_probe_checks.step_gates import baseline_of_step, judged_step  # noqa: E402

SEEDS = (13, 1, 2, 3, 4)
EVERY = 5
STEPS = 60
PROBE: dict[str, Any] = {"batch": {"num_prompts": 16}, "generation": {"num_return_sequences": 8}}
OTHER: dict[str, Any] = {
    "budget": "smoke",
    "batch": {"num_prompts": 64},
    "generation": {"num_return_sequences": 8, "max_new_tokens": 40},
}
GATES: dict[str, Any] = {
    "entropy, fall 0.3": {"entropy": {"fall": 0.3}},
    "predicted change, max 0.2, noise 3": {"predicted_change": {"max": 0.2, "noise": 3}},
    "ess, min 0.5": {"ess": {"min": 0.5}},
    "ess, min 0.9": {"ess": {"min": 0.9}},
    "ess, min 0.7": {"ess": {"min": 0.7}},
}


class Beside(EntropyProbeCallback):
    """With the change that came on another batch, in `FOLDER/other/step-N.json`."""

    other: ProbedStep | None = None

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        super().on_pre_optimizer_step(args, state, control, **kwargs)
        if state.global_step % EVERY == 0:
            trainer, setup = self._trainer, self._setup
            assert setup is not None
            with as_found():
                self.other = measure_step(
                    trainer.model, trainer.optimizer, setup.tokenizer, setup.prompts, OTHER,
                    after_step=state.global_step, seed=100_000 + state.global_step,
                )  # fmt: skip

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        super().on_step_end(args, state, control, **kwargs)
        if self.other is not None:
            assert self._setup is not None
            with as_found():
                found = self.other.after(self._trainer.model)
            found.to_json(self._setup.folder / "other" / f"step-{state.global_step - 1}.json")
            self.other = None


def train(folder: Path, factor: float, seed: int) -> None:
    """The training of docs/collapse.py with another seed, probed."""
    from torch.optim.lr_scheduler import LambdaLR

    from entropy_probe.demo import train as demo
    from entropy_probe.stages.responses.tasks import arithmetic

    folder.mkdir(parents=True)
    base = Path(entropy_probe.demo.__file__).with_name("base")
    shutil.copytree(base, folder / "base", copy_function=shutil.copyfile)
    demo.SEEDS["grpo"] = seed
    with contextlib.chdir(folder):
        trainer = demo.grpo_trainer(
            "base", arithmetic("train"), collapse.reward, output_dir=".", max_steps=collapse.STEPS,
            per_device_train_batch_size=collapse.BATCH, learning_rate=collapse.HEALTHY_LR, save_steps=10**6,
        )  # fmt: skip
        trainer.lr_scheduler = LambdaLR(
            trainer.create_optimizer(), lambda step: factor if step >= collapse.HEALTHY_STEPS else 1.0
        )
        trainer.add_callback(Beside(trainer, every=1, budget="smoke", max_share=1.0, folder="probe", config=PROBE))
        trainer.train()


def reports(folder: Path) -> list[StepReport]:
    found = [StepReport.from_json(path) for path in folder.glob("step-*.json")]
    return sorted(found, key=lambda report: report.after_step)


def stopped(run: list[StepReport], gates: dict[str, Any], every: int) -> int | None:
    """The steps that were taken when a gate first failed, the one that was probed among them."""
    baseline: dict[str, Estimate] = {}
    for report in run:
        if report.after_step % every:
            continue
        baseline = baseline or baseline_of_step(report)
        if any(verdict.status == "fail" for verdict in judged_step(report, gates, baseline)):
            return report.after_step + 1
    return None


def halved(run: list[StepReport]) -> int | None:
    """The steps after which the entropy per token was first below half of what it was at the beginning."""
    first = run[0].entropy.per_token.value
    return next((r.after_step for r in run if r.entropy.per_token.value < first / 2), None)


def show(folder: Path) -> None:
    runs = {path.parent.name: reports(path) for path in sorted(folder.glob("*/probe"))}
    print("| run | halved after | " + " | ".join(f"{name}, every {n}" for name in GATES for n in (1, 5)) + " |")
    for name, run in runs.items():
        cells = [stopped(run, gates, n) for gates in GATES.values() for n in (1, 5)]
        print(f"| {name} | {halved(run)} | " + " | ".join(str(cell) for cell in cells) + " |")
    for kind in ("healthy", "collapse"):
        print(f"{kind}: {accuracy(folder, kind)}")


def accuracy(folder: Path, kind: str) -> str:
    """Predicted against what came on the other batch, every fifth of the first 60 steps: shares within 2 SE, and r."""
    pairs = []
    for path in sorted(folder.glob(f"{kind}-*/probe")):
        came = {report.after_step: report.came for report in reports(path / "other")}
        for report in reports(path):
            row = came.get(report.after_step)
            predicted = report.predicted_per_token.best
            if report.after_step >= STEPS or row is None:
                continue
            own = report.came
            assert own is not None
            pairs.append((predicted.value, predicted.se, *row.realised_per_token, *own.realised_per_token))
    if len(pairs) < 3:
        return "too few"
    table = torch.tensor(pairs, dtype=torch.float64)
    predicted, se, other, other_se, own, _ = table.unbind(1)
    inside = ((predicted - other).abs() <= 2 * torch.hypot(se, other_se)).double().mean()
    of_se = ((predicted - own).abs() <= 2 * se).double().mean()
    corr = float(torch.corrcoef(torch.stack([predicted, other]))[0, 1])
    same = float(torch.corrcoef(torch.stack([predicted, own]))[0, 1])
    noise = float(se.square().mean()), float(other_se.square().mean())
    spread = math.sqrt(max(float(other.var()) - noise[1], 0.0))
    return (
        f"{len(pairs)} steps; within 2 SE of another batch {inside:.0%}, r {corr:.2f}; of the same batch {of_se:.0%}, "
        f"r {same:.2f}; SE {math.sqrt(noise[0]):.2g} and {math.sqrt(noise[1]):.2g}, true changes spread by {spread:.2g}"
    )


def main() -> None:
    what, folder = sys.argv[1], Path(sys.argv[2]).resolve()
    if what == "show":
        show(folder)
        return
    torch.set_num_threads(1)
    for seed in map(int, sys.argv[3:] or SEEDS):
        for name, factor in (("collapse", collapse.TOO_LARGE), ("healthy", 1.0)):
            if not (folder / f"{name}-{seed}").exists():
                train(folder / f"{name}-{seed}", factor, seed)
                print(name, seed, "done", flush=True)


if __name__ == "__main__":
    main()
