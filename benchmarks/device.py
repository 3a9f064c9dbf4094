"""One GPU, one run: the acceptance suite on real sizes, with its verdicts, time and memory by stage.

    python benchmarks/device.py [--device cuda] [--small] [--case NAME …] OUT.json

    demo            the bundled checkpoint, on the device and on the CPU: verdicts, and every number beside the other's
    0.5b-lora-256 … sizes of Qwen2.5 (Mistral's layers), random weights, two steps of AdamW, T tokens a response

Each case is a process of its own, so that its peak is its own. `--small` makes the models tiny: the script's own test.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch


@dataclass(frozen=True)
class Case:
    shape: str
    lora: bool
    length: int
    budget: str


SHAPES = {  # hidden, intermediate, layers, heads, key-value heads: Qwen2.5's
    "0.5b": (896, 4864, 24, 14, 2),
    "1.5b": (1536, 8960, 28, 12, 2),
    "small": (64, 128, 2, 4, 2),
}
CASES = {
    "0.5b-lora-256": Case("0.5b", True, 256, "smoke"),
    "0.5b-lora-1024": Case("0.5b", True, 1024, "smoke"),
    "0.5b-full-256": Case("0.5b", False, 256, "smoke"),
    "1.5b-lora-1024": Case("1.5b", True, 1024, "smoke"),
    "1.5b-lora-4096": Case("1.5b", True, 4096, "smoke"),
}
REWARD = """
import zlib

def drawn(response, gold):
    return float(zlib.crc32(response.encode()) % 2)
"""
PROMPTS = [{"prompt": " ".join(f"w{(97 * k + n * n) % 400}" for n in range(40))} for k in range(64)]


def words(size: int) -> Any:
    """A tokenizer of as many words as the model has tokens."""
    import tokenizers
    import transformers

    names = {
        name: k for k, name in enumerate(["<pad>", "<eos>", *(f"w{k}" for k in range(size - 2))])
    }
    plain = tokenizers.Tokenizer(tokenizers.models.WordLevel(names, unk_token="w0"))  # noqa: S106
    plain.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    named = {"eos_token": "<eos>", "pad_token": "<pad>"}
    return transformers.PreTrainedTokenizerFast(tokenizer_object=plain, **named)


def written(case: Case, folder: Path, device: str, small: bool) -> Path:
    """A checkpoint as Trainer leaves it: bf16 weights, and AdamW after two steps on random tokens."""
    import peft
    import transformers

    torch.manual_seed(0)
    hidden, inner, layers, heads, pairs = SHAPES["small" if small else case.shape]
    config = transformers.MistralConfig(
        vocab_size=512 if small else 151_936,
        hidden_size=hidden,
        intermediate_size=inner,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=pairs,
        max_position_embeddings=32_768,
        tie_word_embeddings=True,
    )
    with torch.device(device):
        model: Any = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    tokenizer = words(config.vocab_size)
    target = folder / "checkpoint"
    if case.lora:
        base = folder / "base"
        model.to(torch.bfloat16).save_pretrained(base)
        tokenizer.save_pretrained(base)
        model = peft.get_peft_model(
            model.float(), peft.LoraConfig(r=16, target_modules="all-linear")
        )
        model.peft_config["default"].base_model_name_or_path = str(base)
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-5 if case.lora else 1e-6)
    for _ in range(2):
        ids = torch.randint(len(tokenizer), (4, 64), device=device)
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    (model if case.lora else model.to(torch.bfloat16)).save_pretrained(target)
    tokenizer.save_pretrained(target)
    torch.save(optimizer.state_dict(), target / "optimizer.pt")
    return target


def suite(
    checkpoint: str, device: str, folder: Path, *options: str, limit: float | None = None
) -> dict[str, Any]:
    """What `pytest -m acceptance` says of a checkpoint: seconds, what is no pass, time and memory by stage."""
    report = folder / f"{device.replace(':', '-')}.json"
    command = [
        sys.executable,
        "-m",
        "pytest",
        f"--probe-checkpoint={checkpoint}",
        "-m",
        "acceptance",
        "-q",
    ]
    command += [
        "-p",
        "no:cacheprovider",
        f"--probe-device={device}",
        f"--probe-json={report}",
        *options,
    ]
    began = time.perf_counter()
    try:
        ended = subprocess.run(  # noqa: S603
            command,
            cwd=folder,
            capture_output=True,
            text=True,
            env={**os.environ, "COLUMNS": "120"},
            timeout=limit,
        )
    except subprocess.TimeoutExpired as late:
        told = late.stderr or b""
        return {"exit": f"ended after {limit} s", "output": told.decode()[-1500:]}
    row: dict[str, Any] = {
        "exit": ended.returncode,
        "seconds": round(time.perf_counter() - began, 1),
    }
    if not report.exists():
        return {**row, "output": ended.stdout[-3000:] + ended.stderr[-3000:]}
    said = json.loads(report.read_text())
    row["passed"] = sum(v["status"] == "pass" for v in said["verdicts"])
    row["not_passed"] = {
        v["criterion"]: [v["status"], v["value"], v["limit"]]
        for v in said["verdicts"]
        if v["status"] != "pass"
    }
    row["time"] = {name: round(value, 2) for name, value in said["timing"].items()}
    row["memory"] = said["memory"]
    row["report"] = said
    if ended.returncode:
        row["output"] = ended.stdout[-3000:]
    return row


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
    """The ten numbers of two reports that differ most, relatively, and how many are equal to 1e-3."""
    expected = dict(numbers(other))
    off = {
        name: abs(x - expected[name]) / max(abs(x), abs(expected[name]), 1e-300)
        for name, x in numbers(one)
        if name in expected and x != expected[name] and math.isfinite(x)
    }
    most = sorted(off, key=lambda name: -off[name])
    return {
        "compared": len(expected),
        "within_1e-3": len(expected) - sum(value > 1e-3 for value in off.values()),
        "most": {name: off[name] for name in most[:25]},
        "median": sorted(off.values())[len(off) // 2] if off else 0.0,
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--small", action="store_true", help="tiny models and short responses")
    parser.add_argument("--case", action="append", choices=["demo", *CASES], help="default: all")
    parser.add_argument("out", type=Path)
    parser.add_argument("--limit", type=float, help="seconds, after which a case is ended")
    given = parser.parse_args()
    cuda = given.device.startswith("cuda")
    results: dict[str, Any] = {
        "device": torch.cuda.get_device_name(given.device) if cuda else "cpu",
        "torch": torch.__version__,
        "cases": {},
    }
    for name in given.case or ["demo", *CASES]:
        with tempfile.TemporaryDirectory() as place:
            folder = Path(place)
            try:
                results["cases"][name] = row = measured(
                    name, folder, given.device, small=given.small, limit=given.limit
                )
            except Exception as error:  # the other cases are still asked
                results["cases"][name] = row = {"exit": repr(error)}
        print(
            name,
            json.dumps({k: v for k, v in row.items() if k not in {"time", "memory"}})[:1500],
            flush=True,
        )
        given.out.write_text(json.dumps(results, indent=1) + "\n")


def measured(
    name: str, folder: Path, device: str, *, small: bool, limit: float | None
) -> dict[str, Any]:
    if name == "demo":
        row = suite("demo", device, folder, limit=limit)
        if "report" in row:
            cpu = suite("demo", "cpu", folder)
            row["beside_cpu"] = beside(row.pop("report"), cpu.pop("report"))
            row["cpu"] = {key: cpu[key] for key in ("exit", "seconds", "time")}
        return row
    case = CASES[name]
    began = time.perf_counter()
    checkpoint = written(case, folder, device, small)
    if device.startswith("cuda"):
        torch.cuda.empty_cache()
    (folder / "rewards.py").write_text(REWARD)
    (folder / "probe.yaml").write_text(
        json.dumps(
            {
                "generation": {"max_new_tokens": 16 if small else case.length},
                "batch": {"reward": "rewards:drawn"},
            }
        )
    )
    (folder / "prompts.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in PROMPTS))
    made = time.perf_counter() - began
    row = suite(
        str(checkpoint),
        device,
        folder,
        f"--probe-budget={case.budget}",
        "--probe-config=probe.yaml",
        "--probe-prompts=prompts.jsonl",
        limit=limit,
    )
    row.pop("report", None)
    shutil.rmtree(checkpoint)
    return {"made_in": round(made, 1), **row}


if __name__ == "__main__":
    main()
