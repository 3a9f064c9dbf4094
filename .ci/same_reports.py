"""Do two trees measure the same? Reports of several checkpoints by each, compared field by field.

    python .ci/same_reports.py BEFORE AFTER

BEFORE and AFTER are clones of this repository, each with its `.venv`. Every field of the reports is compared exactly,
but for those of the run itself: environment, timing, memory and the version. A field that only AFTER has is named.
Exit code 1 where a number differs.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

NOT_MEASURED = ("environment", "timing", "memory", "probe_version")

MAKE = """
import sys; from pathlib import Path; sys.path.insert(0, "tests")
import models
from entropy_probe import load_checkpoint
out = Path(sys.argv[1])
made = {"full": models.full_checkpoint(out / "full", "llama"),
        "lora": models.adapter_checkpoint(out / "lora", "qwen3"),
        "dora": models.adapter_checkpoint(out / "dora", "gemma2", use_dora=True)}
for name, folder in made.items():
    model = load_checkpoint(folder).model
    for seed, batch in enumerate("eu"):
        models.sampled_rollouts(out / f"{name}.{batch}.jsonl", model, prompts=7, responses=3, seed=seed)
"""

CASES: dict[str, dict[str, Any]] = {
    "standard": {},
    "blocks": {
        "first_order": {"mode": "block", "num_blocks": 3, "estimator": "rb", "baseline": "hk_ema"}
    },
    "per token": {"true_delta_h": {"normalize": "per_token", "fallback": "resample"}},
    "top_p": {"generation": {"top_p": 0.95}, "budget": "smoke"},
    "float64": {
        "precision": {
            s: {"dtype": "float64"} for s in ("func_override", "tf_nograd", "tf_withgrad")
        }
    },
}


def run(tree: Path, *arguments: str) -> None:
    python = tree / ".venv" / "bin" / "python"
    subprocess.run([str(python), *arguments], cwd=tree, check=True)  # noqa: S603


def differences(before: Any, after: Any, path: str = "") -> list[str]:
    """A line for each field that is not the same; `new` where only `after` has it."""
    if isinstance(before, dict) and isinstance(after, dict):
        found = [f"{path}{key}: gone" for key in before.keys() - after.keys()]
        found += [f"{path}{key}: new" for key in after.keys() - before.keys()]
        for key in before.keys() & after.keys():
            found += differences(before[key], after[key], f"{path}{key}.")
        return found
    if isinstance(before, list) and isinstance(after, list) and len(before) == len(after):
        found = []
        for i, pair in enumerate(zip(before, after, strict=True)):
            found += differences(*pair, f"{path}{i}.")
        return found
    return [] if before == after else [f"{path.rstrip('.')}: {before} before, {after} after"]


def leaves(value: Any) -> int:
    if isinstance(value, dict | list):
        return sum(map(leaves, value.values() if isinstance(value, dict) else value))
    return 1


def measured(tree: Path, work: Path, checkpoint: str, case: str) -> dict[str, Any]:
    """The report that a tree makes; `per token` has one batch for both."""
    config, out = work / "config.yaml", work / "report.json"
    config.write_text(json.dumps(CASES[case]))
    given = [f"--config={config}", f"--out={out}"]
    folder = checkpoint
    if checkpoint != "demo":
        folder = str(work / checkpoint)
        given.append(f"--rollouts={folder}.e.jsonl")
        if case != "per token":
            given.append(f"--update-rollouts={folder}.u.jsonl")
    run(tree, "-m", "entropy_probe", "run", folder, *given)
    of_anywhere = out.read_text().replace(str(tree), "")  # the bundled checkpoint lies in the tree
    report = json.loads(of_anywhere)
    return {key: value for key, value in report.items() if key not in NOT_MEASURED}


def main(before: Path, after: Path) -> int:
    demo = [("demo", case) for case in ("standard", "top_p")]  # it samples at that top_p
    files = [(name, case) for name in ("full", "lora", "dora") for case in CASES if case != "top_p"]
    failed = 0
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        run(before, "-c", MAKE, str(work))
        for checkpoint, case in [*demo, *files]:
            reports = [measured(tree, work, checkpoint, case) for tree in (before, after)]
            found = differences(*reports)
            count = f"{checkpoint}, {case}: {leaves(reports[0])} values, {len(found)} differ"
            print(count, *found[:20], sep="\n  ", flush=True)
            failed += bool(found)
    print(f"{len(demo) + len(files) - failed} passed, {failed} failed")
    return int(failed > 0)


if __name__ == "__main__":
    sys.exit(main(*(Path(given).resolve() for given in sys.argv[1:3])))
