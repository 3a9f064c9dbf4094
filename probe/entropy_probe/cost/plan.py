"""What a run of a checkpoint would take, from its files' headers and the configuration: `entropy-probe plan`.

No weights are read, and nothing is computed but the formulas of `cost`. A run under a `memory_limit` counts passes on
the model itself before it begins, and its choice is then the one that counts; this is the estimate of it.
"""

from __future__ import annotations

import itertools
import math
import warnings
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from entropy_probe import memory
from entropy_probe.base_model import find_base_model
from entropy_probe.budgets import BUDGETS
from entropy_probe.config import ProbeConfig
from entropy_probe.cost.computation import flops
from entropy_probe.cost.sizes import Batch, Network, Run
from entropy_probe.cost.tensors import of_machine, peaks
from entropy_probe.layout import configured, find_layout
from entropy_probe.model.attention import is_long
from entropy_probe.model.checkpoint import readers
from entropy_probe.model.checkpoint.weights.build import build

_PROCESS = 0.4 * 2**30
"""What the interpreter and its libraries take of a process's memory."""
_SHORTEST = 16  # tokens of a response, below which none is suggested


@dataclass(frozen=True)
class Estimate:
    """A run by stage: the most bytes held, and flops; `room` is what there is, `None` where it is not known.

    `run` has what was chosen: `rows_at_once` (`tf_batch_size`), `recompute`, and whether frozen parameters are `lent`
    to the float64 copy. `remedies` are changes with which it would fit, and what each then takes.
    """

    network: Network
    run: Run
    device: str
    room: float | None
    whose: str
    bytes: dict[str, float]
    flops: dict[str, float]
    remedies: list[str]

    @property
    def most(self) -> float:
        return max(self.bytes.values())

    @property
    def fits(self) -> bool:
        return self.room is None or self.most <= self.room

    def text(self) -> str:
        """One line a stage, then what was chosen, and whether it fits."""
        n, run = self.network, self.run
        sizes = f"{n.parameters / 1e6:.4g} M parameters, {n.trainable / 1e6:.4g} M of them trained"
        batches = " and ".join(f"{b.prompts} prompts × {b.group} responses" for b in run.batches)
        lines = [
            f"{sizes}; {batches}, {run.e.prompt:g} + {run.e.response:g} tokens; {self.device}",
            f"{'stage':<16}{'GiB':>10}{'10¹² flops':>14}",
        ]
        for stage, computed in self.flops.items():
            held = f"{self.bytes[stage] / 2**30:.2f}" if stage in self.bytes else ""
            lines.append(f"{stage:<16}{held:>10}{computed / 1e12:>14.3g}")
        lines.append(
            f"{'most, and all':<16}{self.most / 2**30:>10.2f}{sum(self.flops.values()) / 1e12:>14.3g}"
        )
        scores = run.rows_at_once * n.heads * run.e.length**2
        how = "long rows, in blocks" if is_long(int(scores)) else "short rows"
        lines.append(f"chosen: {_said(run)}; attention of {how}")
        if run.on_disk:
            size = run.of_gradients(n) / 2**30
            lines.append(f"gradients of {run.units_u} blocks stand on disk: {size:.3g} GiB")
        if run.ranks > 1:
            how = "one model together" if run.one_copy else "a model each"
            there = torch.device(self.device).type != "cpu"
            of_all = of_machine(n, run, on_accelerators=there)
            most = max(of_all.values()) + run.ranks * _PROCESS
            lines.append(
                f"{run.ranks} processes hold {how} (sharding: {'parameter' if run.one_copy else 'prompt'}): "
                f"{most / 2**30:.3g} GiB of the machine's memory at most; flops are those of rank 0"
            )
        if self.room is None:
            lines.append("what memory there is cannot be known here: give --memory-limit")
        else:
            word = "fits" if self.fits else "does not fit"
            lines.append(f"{word} {self.whose}, {self.room / 2**30:.3g} GiB")
        return "\n".join([*lines, *(f"would fit: {remedy}" for remedy in self.remedies)])


def plan(
    path: str | Path,
    config: ProbeConfig,
    prompt: int,
    base_model: str | Path | None = None,
    processes: int = 1,
) -> Estimate:
    """Of the checkpoint in a folder, with prompts of so many tokens and responses of `generation.max_new_tokens`, on
    so many `processes` of one machine.

    Raises `CheckpointError` as loading does where names or shapes do not fit.
    """
    return estimate(network_of(path, base_model), config, prompt, processes)


def network_of(path: str | Path, base_model: str | Path | None = None) -> Network:
    """The sizes of a checkpoint's model, from headers; the model is on the meta device."""
    base = None if base_model is None else Path(base_model).expanduser()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # loading notes of transformers
        layout = configured(find_layout(path), base)
        base = find_base_model(layout.weights, base) if layout.is_adapter else None
        return Network.of(build(layout, readers.read(layout), base, values=False).model)


def estimate(network: Network, config: ProbeConfig, prompt: int, processes: int = 1) -> Estimate:
    """As configured, or under a `memory_limit` the first choice that fits, the smallest where none does.

    Of several processes on the CPU the bytes are those of all, on accelerators of one.
    """
    device = torch.device(config.device)
    accelerator, overhead = device.type != "cpu", 0.0 if device.type != "cpu" else _PROCESS
    room, whose = config.memory_limit, "memory_limit"
    if room is None:
        known = device.type == "cpu" or torch.cuda.is_available()
        room, whose = memory.available_bytes(device) if known else None, "what is free now"

    def held(run: Run) -> dict[str, float]:
        if not accelerator and config.memory_limit is None and run.ranks > 1:
            found = of_machine(network, run)
            return {stage: of + run.ranks * overhead for stage, of in found.items()}
        found = peaks(network, run, on_accelerator=accelerator)
        return {stage: of + overhead for stage, of in found.items()}

    def fitting(run: Run) -> Run | None:
        return next((one for one in _choices(run, config) if most(one) <= (room or 0)), None)

    def most(run: Run) -> float:
        return max(held(run).values())

    asked = replace(_run(network, config, prompt, room), ranks=processes)
    once = replace(asked, one_copy=True)
    if processes > 1 and config.sharding != "prompt":
        too_much = network.trainable == network.parameters and most(asked) > (room or math.inf)
        asked = once if config.sharding == "parameter" or too_much else asked
    chosen = asked
    remedies: list[str] = []
    if config.memory_limit is not None:
        chosen = fitting(asked) or [*_choices(asked, config)][-1]
    if room is not None and most(chosen) > room:
        under = None if config.memory_limit is not None else fitting(asked)
        if under is not None:
            remedies.append(f"memory_limit: {room / 2**30:.3g}GiB, with {_said(under)}")
        for what, runs in _others(network, config, prompt, room):
            found = next(((of, run) for of, one in runs if (run := fitting(one)) is not None), None)
            if found is not None:
                remedies.append(f"{what}: {found[0]}, with {_said(found[1])}")
        remedies.append(f"a memory of {most([*_choices(asked, config)][-1]) / 2**30:.3g} GiB")
    return Estimate(
        network, chosen, config.device, room, whose, held(chosen), flops(network, chosen), remedies
    )


def _run(network: Network, config: ProbeConfig, prompt: int, room: float | None) -> Run:
    group, tokens = config.generation.num_return_sequences, config.generation.max_new_tokens
    e, u = (
        Batch(prompts, group, prompt, tokens)
        for prompts in (config.batch.num_prompts, config.batch.num_update_prompts)
    )
    given = config.true_delta_h.etas
    etas = {} if given == "auto" else {"etas": 11 if given == "fine" else len(given)}
    again = config.recompute == "always"
    run = Run.of(network, config, e, u, sampled=True, recompute=again, **etas)
    # where they are more than allowed, and than half of what is free (stages/gradients/units.py)
    most = config.first_order.max_gradient_gib * 2**30
    known = config.device == "cpu" and config.memory_limit is None and room is not None
    return replace(run, on_disk=known and run.of_gradients(network) > max(most, (room or 0) / 2))


def _choices(run: Run, config: ProbeConfig) -> Iterator[Run]:
    """In the order in which a run under a limit tries them: as it is asked for; a float64 copy that shares the frozen
    parameters, and fewer rows; no second derivatives; layers that are run again."""
    yield run
    powers = [run.rows_at_once >> k for k in range(run.rows_at_once.bit_length())]
    with_second = (False,) if run.leaves_out("projections") else (True, False)
    for again in (run.recompute, True) if config.recompute == "auto" else (run.recompute,):
        for second, rows in itertools.product(with_second, powers):
            yield replace(run, rows_at_once=rows, lent=True, recompute=again, second_order=second)


def _said(run: Run) -> str:
    """What is chosen of it."""
    chosen = [f"tf_batch_size {run.rows_at_once}"]
    chosen += ["layers run again"] if run.recompute else []
    chosen += ["a shared float64 copy"] if run.lent else []
    left_out = run.leaves_out("projections") and run.leaves_out("curvature witness")
    chosen += [] if run.second_order or left_out else ["no second derivatives"]
    return ", ".join(chosen)


Others = Iterator[tuple[str, Run]]


def _others(
    network: Network, config: ProbeConfig, prompt: int, room: float | None
) -> Iterator[tuple[str, Others]]:
    """Keys of the configuration that make a run smaller, each with values in the order in which they are tried."""
    asked = _run(network, config, prompt, room)
    if set(asked.left_out) != set(BUDGETS["smoke"].left_out):
        yield "budget", iter([("smoke", replace(asked, left_out=BUDGETS["smoke"].left_out))])

    def shorter() -> Others:
        tokens = config.generation.max_new_tokens // 2
        while tokens >= _SHORTEST:
            of = config.generation.model_copy(update={"max_new_tokens": tokens})
            run = _run(network, config.model_copy(update={"generation": of}), prompt, room)
            yield str(tokens), run
            tokens //= 2

    yield "generation.max_new_tokens", shorter()
