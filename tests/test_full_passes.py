"""What a pass of a full fine-tune takes where it is computed: formulas against counted tensors, within 15 %.

On an accelerator there are θ and its float64 copy, and what a pass makes. v stands in memory beside it, so that each
pass makes a copy: here v is in another precision, which makes the same copy on the CPU.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from counted import Sizes
from entropy_probe import ProbeConfig, load_checkpoint
from entropy_probe.cost import tensors
from entropy_probe.cost.sizes import Batch, Network, Run
from entropy_probe.memory import live_tensors
from entropy_probe.model.capture import Capture
from entropy_probe.model.forward import bind
from entropy_probe.model.overrides import theta_plus_eta_v
from entropy_probe.stages.derivatives import directional_derivatives
from entropy_probe.stages.gradients.payloads import Payload
from entropy_probe.stages.responses.rollouts_file import read_rollouts
from entropy_probe.stages.scores import read_rows, score
from entropy_probe.stages.update import compute_update_vector_adamw
from entropy_probe.stages.witnesses import real_step
from entropy_probe.stages.witnesses.projections import by_alpha
from entropy_probe.stages.witnesses.witness import terms, twice_in_reverse

CPU = torch.device("cpu")
SIZES = (
    Sizes(128, 384, 2, 1024, lora=False, e=1, u=None, group=2, prompt=8, response=24),
    Sizes(96, 256, 4, 2048, lora=False, e=1, u=None, group=2, prompt=8, response=40),
    Sizes(160, 512, 3, 512, lora=False, e=1, u=None, group=2, prompt=20, response=76),
)
KINDS = ("gradients", "slopes", "entropy change", "real step", "loop", "alpha", "second")


def predicted(network: Network, run: Run) -> dict[str, float]:
    stages = tensors._above(network, run, there=True)
    more = {name: getattr(tensors, name)(network, run) for name in ("loop", "alpha")}
    more["second"] = tensors.second(network, run, there=True)
    return {kind: (stages | more)[kind] for kind in KINDS}


def measured(folder: Path, sizes: Sizes) -> tuple[dict[str, float], dict[str, float]]:
    """(predicted, counted) of one row."""
    checkpoint = load_checkpoint(sizes.checkpoint(folder))
    model, config = checkpoint.model, ProbeConfig.from_mapping({"generation": {"tf_batch_size": 1}})
    bound, float64 = bind(model), bind(model, torch.float64)
    rollouts = read_rollouts(sizes.rollouts(folder / "e.jsonl", 2, 1), bound, None)
    for of in (bound, float64):
        assert of.num_logits == sizes.vocabulary  # tries the output layer, which is no part of a pass
    parameters = bound.registry.trainable
    v32 = {name: torch.ones_like(p) * 1e-3 for name, p in parameters.items()}
    v64 = {name: d.double() for name, d in v32.items()}
    weights = torch.ones(2, 2, dtype=torch.float64)
    payload, row, lr = Payload(weights), torch.arange(1), 1e-6
    ascent = {name: d.flatten() for name, d in v64.items()}
    v = compute_update_vector_adamw(float64.registry, checkpoint.adam, ascent).v
    scores = score(bound, rollouts, config)

    def gradients() -> object:
        capture = Capture(parameters, torch.ones(2, 1), 1)
        options: Any = {"true_derivative": False, "capture": capture}
        (values,) = read_rows(bound, rollouts, row, payload.read(1.0), **options)
        return capture.sums(values.sum(-1))

    works: dict[str, Callable[[], object]] = {
        "gradients": gradients,
        "slopes": lambda: directional_derivatives(float64, rollouts, v32, config),
        "entropy change": lambda: score(
            bound, rollouts, config, theta_plus_eta_v(bound.registry, v32, lr, torch.float32)
        ),
        "real step": lambda: real_step.real_step(float64, rollouts, scores, v, ascent, checkpoint.adam, lr, config),
        "loop": lambda: torch.autograd.grad(
            terms(bound, rollouts, row, payload, config, true=True, once=True).sum(), list(parameters.values())
        ),
        "alpha": lambda: by_alpha(bound, rollouts, payload, v64, config),
        "second": lambda: twice_in_reverse(float64, rollouts, weights, v32, config),
    }
    assert set(works) == set(KINDS)
    run = Run(Batch(2, 2, sizes.prompt, sizes.response), blocks=1, rows_at_once=1)
    found = predicted(Network.of(model), run)
    return found, {kind: float(live_tensors(work, CPU).most) for kind, work in works.items()}


@pytest.fixture(scope="module")
def counts(tmp_path_factory: pytest.TempPathFactory) -> list[tuple[dict[str, float], dict[str, float]]]:
    return [measured(tmp_path_factory.mktemp("passes"), replace(sizes)) for sizes in SIZES]


@pytest.mark.parametrize("kind", KINDS)
def test_bytes_of_a_pass(counts: list[tuple[dict[str, float], dict[str, float]]], kind: str) -> None:
    ratios = [predicted[kind] / counted[kind] for predicted, counted in counts]
    assert ratios == pytest.approx([1.0] * len(SIZES), rel=0.15)
