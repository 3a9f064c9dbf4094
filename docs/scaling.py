"""Measures what runs cost and writes the tables of `docs/scaling.md`: `python docs/scaling.py`, in some ten minutes;
`python docs/scaling.py long` and `python docs/scaling.py several`, in a second, those of long responses and of several
GPUs, which are made of formulas.

Every size is a random Qwen2 in a process of its own. Flops and live tensors are counted as in `tests/test_cost.py`; the
resident size is that of the report's `memory`, less what the process held before it loaded the checkpoint.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "scaling.md"
BEGIN, END = "<!-- measured: docs/scaling.py -->\n", "<!-- end of measured -->\n"
# Large enough to change no size: under a limit glibc gives back at once what is freed.
LIMIT = {"memory_limit": "12GiB"}
SHOWN = (
    "scores",
    "gradients",
    "first order",
    "update",
    "slopes",
    "entropy change",
    "witnesses",
    "properties",
    "continuity",
)
sys.path.insert(0, str(ROOT / "tests"))


def sizes(name: str) -> object:
    from counted import Sizes

    return {
        "deep, LoRA": Sizes(512, 1536, 12, 8192, e=2, u=2, group=4, prompt=16, response=48),
        "s32k, LoRA": Sizes(256, 768, 6, 32_000, e=2, u=2, group=8, prompt=32, response=128),
        "full": Sizes(384, 1152, 4, 16_384, lora=False, e=4, u=4, group=2, prompt=16, response=32),
    }[name]


NAMES = ("deep, LoRA", "s32k, LoRA", "full")


def measured(name: str, folder: Path) -> dict[str, dict[str, float]]:
    """predicted/measured of every stage."""
    import torch

    from counted import SMOKE, count
    from entropy_probe.cost import flops, peaks

    torch.set_num_threads(1)
    of = count(folder, sizes(name), SMOKE | LIMIT)  # pyright: ignore[reportArgumentType]
    counted = {s: n for s, n in of.flops.items() if s not in ("memory limit", "update")}
    computed, held = flops(of.network, of.run), peaks(of.network, of.run)
    memory = of.report.memory
    assert memory is not None
    assert memory.tf_batch_size == of.report.config["generation"]["tf_batch_size"]
    before = memory.stages["load"].at_start
    return {
        "flops": {s: computed[s] / n for s, n in counted.items() if n},
        "live": {s: held[s] / n for s, n in of.peaks.items() if s in held},
        "resident": {
            s: held[s] / (memory.stages[s].peak - before) for s in held if s in memory.stages
        },
        "size": {
            "gflop": sum(counted.values()) / 1e9,
            "mib": max(of.peaks[s] for s in held) / 2**20,
        },
        "more": {"N": of.network.parameters / 1e6, "D": of.network.trainable / 1e6},
    }


def table() -> str:
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        for number, name in enumerate(NAMES):
            place = str(Path(folder) / str(number))
            for verb in ("make", "measure"):
                command = [sys.executable, __file__, verb, name, place]
                done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)  # noqa: S603
            found = json.loads(done.stdout.splitlines()[-1])
            print(name, found, file=sys.stderr, flush=True)
            more, size = found["more"], found["size"]
            of_flops = " ".join(
                [f"N {more['N']:.0f} M, D {more['D']:.1f} M; {size['gflop']:.0f} GFLOP"]
            )
            rows.append(_row(f"{name}: {of_flops}", "flops", found["flops"]))
            rows.append(_row(f"most {size['mib']:.0f} MiB", "live tensors", found["live"]))
            rows.append(_row("", "resident", found["resident"]))
    head = f"| size | predicted/measured | {' | '.join(SHOWN)} |\n|{'---|' * (2 + len(SHOWN))}\n"
    return head + "".join(rows)


def _row(size: str, what: str, ratios: dict[str, float]) -> str:
    return f"| {size} | {what} | {' | '.join(f'{ratios[s]:.2f}' if s in ratios else '' for s in SHOWN)} |\n"


BEGIN_LONG, END_LONG = "<!-- long rows: docs/scaling.py long -->\n", "<!-- end of long rows -->\n"
# layers, h, f, heads, key-value heads, tied: Qwen2.5's
SHAPES = {
    "7 B": (28, 3584, 18944, 28, 4, False),
    "1.5 B": (28, 1536, 8960, 12, 2, True),
}
SHAPES |= {"8 B": (36, 4096, 12288, 32, 8, False), "70 B": (80, 8192, 28672, 64, 8, False)}
VOCABULARY, RANK = 152_064, 16


def network(shape: str, *, lora: bool) -> object:
    """The sizes of a decoder, trained in full or with LoRA on all linear layers of its blocks."""
    from entropy_probe.cost import Network

    layers, h, f, heads, pairs, tied = SHAPES[shape]
    keys = pairs * h // heads
    linear = [(h, h), (h, h), (h, keys), (h, keys), (h, f), (h, f), (f, h)]
    blocks = layers * sum(a * b for a, b in linear)
    factors = layers * RANK * sum(a + b for a, b in linear) if lora else 0
    whole = blocks + (1 if tied else 2) * h * VOCABULARY
    return Network(
        layers=layers,
        hidden=h,
        heads=heads,
        attention=h,
        keys=keys,
        intermediate=f,
        vocabulary=VOCABULARY,
        frozen=blocks if lora else 0,
        trained=factors if lora else blocks,
        head_trained=not lora,
        parameters=whole + factors,
        trainable=factors if lora else whole,
        tensors=layers * (14 if lora else 7),
        entries=4096 * layers * (14 if lora else 7),
        largest=RANK * f if lora else h * VOCABULARY,
        groups=layers,
    )


def of_long_rows(shape: str, *, lora: bool, length: int) -> dict[str, float]:
    """GiB on an accelerator by stage of the standard budget, one row at a time, layers run again, the float64 copy
    shared."""
    from entropy_probe.cost import Batch, Run, peaks

    batch = Batch(16, 8, 200, length)
    blocks = None if lora else 2
    run = Run(batch, batch, blocks=blocks, rows_at_once=1, lent=True, recompute=True)
    of = network(shape, lora=lora)
    held = peaks(of, run, on_accelerator=True)  # pyright: ignore[reportArgumentType]
    shown = ("scores", "gradients", "slopes", "entropy change", "real step", "witnesses")
    return {
        **{stage: held[stage] / 2**30 for stage in shown},
        "most": max(held.values()) / 2**30,
    }


def long_rows() -> str:
    rows = []
    for shape, lora, length in (
        ("7 B", True, 4096),
        ("7 B", True, 16384),
        ("1.5 B", True, 4096),
        ("1.5 B", True, 16384),
        ("1.5 B", False, 4096),
    ):
        found = of_long_rows(shape, lora=lora, length=length)
        kind = "LoRA" if lora else "full"
        rows.append((f"{shape} {kind}, T {length}", found))
    head = f"| GiB | {' | '.join(rows[0][1])} |\n|{'---|' * (1 + len(rows[0][1]))}\n"
    return head + "".join(
        f"| {name} | {' | '.join(f'{value:.0f}' for value in found.values())} |\n"
        for name, found in rows
    )


BEGIN_SEVERAL = "<!-- several GPUs: docs/scaling.py several -->\n"
END_SEVERAL = "<!-- end of several GPUs -->\n"
ON_A_MACHINE, GIB_OF_A_GPU = 8, 80
FLOPS_A_SECOND = 0.4 * 60e12
"""A stated share, 40 %, of what a card of 80 GiB does in float32 and float64, about 60·10¹² a second."""


def of_several(shape: str, *, lora: bool, gpus: int, once: bool) -> tuple[float, float, float]:
    """(GiB of a GPU, GiB of the memory of a machine, minutes): 64 prompts for E and for U, 8 responses of 1000 tokens;
    one row at a time, layers run again; full fine-tunes by 8 blocks and the smoke budget."""
    from entropy_probe.budgets import BUDGETS
    from entropy_probe.cost import Batch, Run, flops, peaks
    from entropy_probe.cost.tensors import of_machine

    of: Any = network(shape, lora=lora)
    batch, blocks = Batch(64, 8, 200, 1000), None if lora else 8
    options: dict[str, Any] = {"rows_at_once": 1, "recompute": True, "lent": True}
    left_out = () if lora else BUDGETS["smoke"].left_out
    run = Run(batch, batch, blocks=blocks, ranks=gpus, one_copy=once, left_out=left_out, **options)
    # of a machine: as many prompts for each process as there are of all
    here = replace(run, ranks=min(gpus, ON_A_MACHINE))
    if (machines := gpus // here.ranks) > 1:
        batch = Batch(64 // machines, 8, 200, 1000)
        blocks = None if blocks is None else max(2, blocks // machines)
        here = replace(here, e=batch, u=batch, blocks=blocks)
    of_gpu = max(peaks(of, run, on_accelerator=True).values()) / 2**30
    of_all = max(of_machine(of, here, on_accelerators=True).values()) / 2**30
    return of_gpu, of_all, sum(flops(of, run).values()) / FLOPS_A_SECOND / 60


def several() -> str:
    head = (
        "| model | GPUs | sharding | GiB of each GPU | GiB of each machine's memory | minutes |\n"
    )
    rows = [head, "|---|---|---|---|---|---|\n"]
    for shape in ("1.5 B", "8 B", "70 B"):
        for lora in (True, False):
            for gpus in (1, 8, 64):
                once = not lora and 1 < gpus <= ON_A_MACHINE
                found = of_several(shape, lora=lora, gpus=gpus, once=once)
                if found[0] > GIB_OF_A_GPU and 1 < gpus <= ON_A_MACHINE:
                    once, found = True, of_several(shape, lora=lora, gpus=gpus, once=True)
                of_gpu, of_all, minutes = found
                kind, how = "LoRA" if lora else "full", "parameter" if once else "prompt"
                time = f"{minutes:.0f}" if of_gpu <= GIB_OF_A_GPU else "does not fit"
                rows.append(
                    f"| {shape} {kind} | {gpus} | {how} | {of_gpu:.0f} | {of_all:.0f} | {time} |\n"
                )
    return "".join(rows)


def _write(begin: str, made: str, end: str) -> None:
    before, _, rest = PAGE.read_text().partition(begin)
    PAGE.write_text(before + begin + "\n" + made + "\n" + end + rest.partition(end)[2])


def main(arguments: list[str]) -> None:
    if arguments == ["long"]:
        _write(BEGIN_LONG, long_rows(), END_LONG)
        return
    if arguments == ["several"]:
        _write(BEGIN_SEVERAL, several(), END_SEVERAL)
        return
    if not arguments:
        _write(BEGIN, table(), END)
        return
    verb, name, place = arguments
    if verb == "make":
        sizes(name).checkpoint(Path(place))  # pyright: ignore[reportAttributeAccessIssue]
    else:
        print(json.dumps(measured(name, Path(place))))


if __name__ == "__main__":
    main(sys.argv[1:])
