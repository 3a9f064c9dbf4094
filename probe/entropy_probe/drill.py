"""A fire drill: a dozen faults of docs/faults.md, to be planted one at a time into a run on somebody's own checkpoint.

Each damages live code of this process and is never taken back: a process has one fault at most.
"""

from __future__ import annotations

import dataclasses
import math
import sys
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from entropy_probe.estimators import policy, slope
from entropy_probe.model.checkpoint import load
from entropy_probe.model.checkpoint.moments import adam
from entropy_probe.model.forward import BoundModel
from entropy_probe.stages import entropy_change, update
from entropy_probe.stages.gradients import unit_gradients
from entropy_probe.stages.responses import rollouts


def plant(name: str) -> None:
    """Damage the library in this process."""
    FAULTS[name]()


def wrong(name: str) -> str:
    """What is wrong, in a line."""
    return " ".join((FAULTS[name].__doc__ or "").split())


def _everywhere(original: Any, replacement: Any) -> None:
    for module_name, module in list(sys.modules.items()):
        if module_name.partition(".")[0] == "entropy_probe":
            for key, value in list(vars(module).items()):
                if value is original:
                    setattr(module, key, replacement)


def _then(original: Callable[..., Any], change: Callable[[Any], Any]) -> None:
    _everywhere(original, lambda *a, **k: change(original(*a, **k)))


def _read(change: Callable[[Any], Any]) -> None:
    def changed(states: Mapping[str, Any]) -> dict[str, Any]:
        return {name: change(state) for name, state in states.items()}

    adam.map_adam_state = _after(adam.map_adam_state, changed)


def _after(original: Callable[..., Any], change: Callable[[Any], Any]) -> Any:
    return lambda *a, **k: change(original(*a, **k))


def momentum_read_negated() -> None:
    """exp_avg is read with the other sign."""
    _read(lambda state: dataclasses.replace(state, exp_avg=-state.exp_avg))


def step_read_one_late() -> None:
    """One step more has been taken."""
    _read(lambda state: dataclasses.replace(state, step=state.step + 1))


def weights_moved() -> None:
    """Every weight is read a thousandth too large."""

    def moved(built: Any) -> Any:
        with torch.no_grad():
            for parameter in built.model.parameters():
                parameter.mul_(1.001)
        return built

    load.build = _after(load.build, moved)


def bracket_not_detached() -> None:
    """The gradient flows through the bracket S − S̄ too: X is twice what it is."""

    def twice(units: Any) -> Any:
        return dataclasses.replace(units, x={name: 2 * x for name, x in units.x.items()})

    _then(unit_gradients.unit_gradients, twice)


def preconditioner_without_bias_correction() -> None:
    """P = 1/(√exp_avg_sq + ε)."""
    original = update.preconditioner
    _everywhere(original, lambda second, step, beta2, eps: original(second, math.inf, beta2, eps))


def v_uphill() -> None:
    """The sign of v."""

    def uphill(direction: Any) -> Any:
        turned = {
            f: {n: -t for n, t in getattr(direction, f).items()} for f in ("v", "v0", "diagonal")
        }
        return dataclasses.replace(direction, **turned)

    _then(update.compute_update_vector_adamw, uphill)


def scored_after_half_a_step() -> None:
    """The sweep scores at θ + ½ηv what it reports at η."""
    original = entropy_change.moved
    entropy_change.moved = lambda bound, v, eta, world: original(bound, v, eta / 2, world)


def entropies_ten_percent_too_large() -> None:
    """Every entropy of a token is 10 % too large, at θ and at θ + ηv, with its derivatives."""

    def larger(scored: Any) -> Any:
        return dataclasses.replace(
            scored, entropy=1.1 * scored.entropy, entropy_q=1.1 * scored.entropy_q
        )

    _then(policy.score_tokens, larger)


def logits_one_position_late() -> None:
    """The token at i is scored with the logits at i, which have seen it."""
    original = BoundModel.read_logits

    def late(self: Any, ids: Tensor, rows: Tensor, columns: Tensor, *a: Any, **k: Any) -> Any:
        return original(self, ids, rows, (columns + 1).clamp(max=ids.shape[1] - 1), *a, **k)

    setattr(BoundModel, "read_logits", late)  # noqa: B010


def errors_of_slopes_not_over_root_b() -> None:
    """SEs of slopes and predictions are standard deviations: so wide that `prediction` says nothing."""

    def deviation(self: slope.PromptMean) -> float:
        return float(self.per_prompt.std())

    setattr(slope.PromptMean, "se", property(deviation))  # noqa: B010


def rewards_reversed_in_their_group() -> None:
    """The first response has the reward of the last."""

    def reversed_in_groups(batch: Any) -> Any:
        return dataclasses.replace(batch, rewards=batch.rewards.flip(1))

    _then(rollouts.assembled, reversed_in_groups)


def two_batches_without_the_preconditioner() -> None:
    """The two-batch term, its projections and its SEs all lack P, and agree with one another."""
    original = unit_gradients.UnitGradients.products_with

    def plain(self: Any, u: Any, precond: Mapping[str, Tensor]) -> Any:
        return original(self, u, {name: torch.ones_like(p) for name, p in precond.items()})

    setattr(unit_gradients.UnitGradients, "products_with", plain)  # noqa: B010


FAULTS: dict[str, Callable[[], None]] = {
    fault.__name__: fault
    for fault in (
        momentum_read_negated,
        step_read_one_late,
        weights_moved,
        bracket_not_detached,
        preconditioner_without_bias_correction,
        v_uphill,
        scored_after_half_a_step,
        entropies_ten_percent_too_large,
        logits_one_position_late,
        errors_of_slopes_not_over_root_b,
        rewards_reversed_in_their_group,
        two_batches_without_the_preconditioner,
    )
}
