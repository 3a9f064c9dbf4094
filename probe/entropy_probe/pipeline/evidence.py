"""Evidence of a run: what its figures are made of, gathered once all is measured.

The products X_uᵀPY_v are computed here a second time, by other code than `stages/gradients/products.py`; all else is
handed over as the figures were made of it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from entropy_probe.errors import printable
from entropy_probe.evidence import Evidence
from entropy_probe.model.checkpoint import AdamState
from entropy_probe.model.checkpoint.files import logged_entropy
from entropy_probe.pipeline.again import found_again
from entropy_probe.pipeline.measured import Batch, Measured
from entropy_probe.pipeline.next_step import NextStep
from entropy_probe.pipeline.prepared import Prepared
from entropy_probe.stages.gradients.payloads import response_advantages
from entropy_probe.stages.gradients.unit_gradients import (
    OwnUnitGradients,
    PairedUnitGradients,
    UnitGradients,
    UnitGradientsOnce,
)
from entropy_probe.stages.responses.texts import texts_of

_AT_ONCE = 1 << 21  # numbers of one side of a product that are held in float64


def evidence_of(
    of: Measured, step: NextStep, prepared: Prepared, eos: Sequence[int]
) -> Evidence | None:
    """All processes take part; rank 0 has it."""
    arrays: dict[str, Tensor] = {}
    names = list(of.bound.registry.trainable)
    batches = {"e": of.e} if of.same_batch else {"e": of.e, "u": of.u}
    for which, batch in batches.items():
        _add(arrays, which, _batch(batch, of))
    if step.along is not None:
        at_theta, share = step.along.at_theta, of.e.share
        arrays["e.d_logp"] = share.all_tokens(at_theta.d_logp)
        arrays["e.d_entropy"] = share.all_tokens(at_theta.d_entropy)
        arrays["e.d_rounding"] = share.all_tokens(at_theta.rounding)
        arrays["e.d2_logp"] = share.all_tokens(step.along.twice.logp)
        arrays["e.d2_entropy"] = share.all_tokens(step.along.twice.entropy)
    for k, change in enumerate(step.changes):
        share, after, fresh = of.e.share, change.after, change.fresh
        found = {"logp": after.token_logp, "entropy": after.rb_entropy}
        _add(arrays, f"after.{k}", {n: share.all_tokens(values) for n, values in found.items()})
        if fresh is not None:
            found = {"logp": fresh.token_logp, "entropy": fresh.rb_entropy}
            _add(arrays, f"fresh.{k}", found | {"gen_lens": fresh.gen_lens})
        if change.drawn is not None and not of.e.share.several:
            tokens = {"ids": change.drawn.ids, "prompt_lens": change.drawn.prompt_lens}
            _add(arrays, f"fresh.{k}", tokens)
    if step.direction is not None:
        u, direction = of.u.gradients, step.direction
        of_u = _products(u, u, step.precond, names)
        _add(arrays, "u.gram", of_u)
        if not of.same_batch:
            _add(arrays, "eu.gram", _across(of.e.gradients, u, step.precond, names))
        moved = list(direction.v)
        x_bar, v0 = of.e.gradients.mean_x(), direction.v0
        for name, x_mean in (("x", x_bar), ("xt", step.x_per_token)):
            arrays[f"e.{name}_v0"] = torch.stack([_dot(x_mean[n], v0[n]) for n in moved])
            along = (_times(u.y[n], x_mean[n] * direction.diagonal[n].reshape(-1)) for n in moved)
            arrays[f"u.y_d{name}"] = u.of_units(sum(along))  # pyright: ignore[reportArgumentType]
        crossed = None if step.predicting is None else step.predicting.crossed
        for which, gradients in (("u", u if of.same_batch else None), ("crossed", crossed)):
            if gradients is not None:
                x_v0 = sum(_times(gradients.x[n], v0[n].reshape(-1)) for n in moved)
                arrays[f"{which}.x_v0"] = gradients.of_units(x_v0)  # pyright: ignore[reportArgumentType]
                _add(arrays, f"{which}.gram_d", _products(gradients, u, direction.diagonal, moved))
        if of.e.share.world.first:
            _add(arrays, "sum", _sums(of, step, names))
        _add(arrays, "match", step.of_match)
    if of.growth is not None and of.growth.of_update is not None:
        arrays["target.terms"] = of.growth.of_update
    if not of.e.share.world.first:
        return None
    parameters = {n: p.detach() for n, p in of.bound.registry.parameters.items()}
    arrays["sum.parameters"] = _first_two(parameters)
    whole = {
        "names": names,
        "mode": of.u.gradients.units.mode,
        "world_size": of.e.share.world.size,
        "looks": [] if of.growth is None else [look.num_prompts for look in of.growth.looks],
        "etas": [change.eta for change in step.changes],
        "moved": [] if step.direction is None else list(step.direction.v),
        "hyper": _hyper(of),
        "parameters": [list(p.shape) for p in of.bound.registry.parameters.values()],
        "other": None if of.checkpoint.other is None else of.checkpoint.other.reason,
    }
    whole |= found_again(of, step, prepared)
    kept = {name: np.asarray(values.detach().cpu()) for name, values in arrays.items()}
    return Evidence(kept, whole | _given(of, prepared, eos))


def _given(of: Measured, prepared: Prepared, eos: Sequence[int]) -> dict[str, Any]:
    """What is known of the batches and the checkpoint beside what is measured."""
    batches = of.e.rollouts, of.u.rollouts
    folder = prepared.checkpoint.info.path
    return {
        "eos": list(eos),
        "fingerprint": prepared.checkpoint.info.fingerprint,
        "given": [printable(given) for given in prepared.given],
        "source": [printable(batch.source) for batch in batches],
        "reward": [printable(batch.reward) for batch in batches],
        "builtin": [batch.builtin for batch in batches],
        "found": [[printable(line) for line in batch.found] for batch in batches],
        "weighed": [batch.weighed for batch in batches],
        "missing_gold": [batch.missing_gold for batch in batches],
        "texts": [texts_of(prepared.checkpoint.tokenizer, batch) for batch in batches],
        "trainer_entropy": logged_entropy(folder) if folder.name else None,
    }


def _add(arrays: dict[str, Tensor], prefix: str, more: Mapping[str, Tensor]) -> None:
    arrays.update({f"{prefix}.{name}": values for name, values in more.items()})


def _batch(batch: Batch, of: Measured) -> dict[str, Tensor]:
    """Tokens, rewards and scores at θ of a whole batch."""
    rollouts, tokens, share = batch.rollouts, batch.tokens, batch.share
    found = {
        "ids": rollouts.ids,
        "prompt_lens": rollouts.prompt_lens,
        "gen_lens": rollouts.gen_lens,
        "rewards": rollouts.rewards,
        "advantages": response_advantages(rollouts, of.config),
        "unit_of_prompt": batch.gradients.units.of_prompt,
        "logp": share.all_tokens(tokens.token_logp),
        "logq": share.all_tokens(tokens.token_logq),
        "entropy": share.all_tokens(tokens.rb_entropy),
        "entropy_q": share.all_tokens(tokens.rb_entropy_q),
    }
    if tokens.features is not None:
        found["features"] = share.all_tokens(tokens.features)
    if tokens.before is not None:
        found["before"] = share.all_tokens(tokens.before)
    if tokens.mean_s is not None:
        found["mean_s"] = share.all_tokens(tokens.mean_s)
    if rollouts.in_step is not None:
        found["in_step"] = rollouts.in_step.long()
    if rollouts.advantages is not None:
        found["given_advantages"] = rollouts.advantages
    if rollouts.logprobs is not None:
        found["sampler_logprobs"] = rollouts.logprobs
    found["x_norms"] = _unit_norms(batch.gradients, batch.gradients.x)
    if batch.gradients.y:
        found["y_norms"] = _unit_norms(batch.gradients, batch.gradients.y)
        reached = (batch.gradients.x, batch.gradients.y)
        counts = torch.tensor([[int(t.count_nonzero()) for t in side.values()] for side in reached])
        found["reached"] = share.world.total(counts)
    return found


def _unit_norms(gradients: UnitGradients, rows: Mapping[str, Tensor]) -> Tensor:
    squares = [
        t[:, part].double().square().sum(1)
        for t in rows.values()
        for part in _pieces(t.shape[1], len(t))
    ]
    return gradients.of_units(torch.stack(squares).sum(0)).sqrt()


def _products(
    x: UnitGradients, y: UnitGradients, precond: Mapping[str, Tensor], names: list[str]
) -> dict[str, Tensor]:
    """`k` [N, U, U] = X_nᵀPY_m by tensor; of several processes `sums` [N, U, 3], over m, over n, and the diagonal."""
    if not isinstance(x, OwnUnitGradients):
        return {"k": torch.stack([_gram(x.x[n], y.y[n], precond[n]) for n in names])}
    assert isinstance(y, OwnUnitGradients)
    if isinstance(x, PairedUnitGradients):
        assert isinstance(y, PairedUnitGradients)
        return {"k": _of_pairs(x, y, precond, names)}
    found = []
    for n in names:
        p = precond[n].double().reshape(-1)
        own = torch.zeros(len(x.x[n]), dtype=torch.float64)
        for part in _pieces(len(p), len(own)):
            own += (x.x[n][:, part].double() * p[part] * y.y[n][:, part].double()).sum(1)
        sides = (_times(x.x[n], p * y.sums_y[n]), _times(y.y[n], p * x.sums_x[n]), own)
        found.append(torch.stack(sides, 1))
    return {"sums": torch.stack([x.of_units(of_tensor) for of_tensor in found])}


def _across(
    e: UnitGradients, u: UnitGradients, precond: Mapping[str, Tensor], names: list[str]
) -> dict[str, Tensor]:
    """`k` [N, E, U]; of several processes `s` [N, E] = X_kᵀPȲ and `t` [N, U] = X̄ᵀPY_m."""
    if not isinstance(e, OwnUnitGradients):
        return {"k": torch.stack([_gram(e.x[n], u.y[n], precond[n]) for n in names])}
    if isinstance(e, PairedUnitGradients):
        assert isinstance(u, PairedUnitGradients)
        return {"k": _of_pairs(e, u, precond, names)}
    weight = {n: precond[n].double().reshape(-1) for n in names}
    s = [_times(e.x[n], weight[n] * u.mean_y()[n]) for n in names]
    t = [_times(u.y[n], weight[n] * e.mean_x()[n]) for n in names]
    of_e, of_u = (torch.stack([b.of_units(row) for row in of]) for b, of in ((e, s), (u, t)))
    return {"s": of_e, "t": of_u}


def _of_pairs(
    x: UnitGradients, y: PairedUnitGradients, precond: Mapping[str, Tensor], names: list[str]
) -> Tensor:
    """[N, U, U] of all units: each process multiplies its own rows of X with Y of everybody, a piece at a time."""
    units = len(y.sizes)
    found = []
    for n in names:
        flat, own = precond[n].reshape(-1), torch.zeros(len(x.x[n]), units, dtype=torch.float64)
        for part in _pieces(len(flat), units):
            # not by `every_y`, which the figures are made by: what both call, no comparison sees
            once = isinstance(y, UnitGradientsOnce)
            every = (y.every[1][n][:, part] if once else y.of_units(y.y[n][:, part])).double()
            own += (x.x[n][:, part].double() * flat[part].double()) @ every.T
        found.append(x.of_units(own))
    return torch.stack(found)


def _gram(x: Tensor, y: Tensor, p: Tensor) -> Tensor:
    """Σ_d X_nd·P_d·Y_md in float64."""
    flat, total = p.reshape(-1), torch.zeros(len(x), len(y), dtype=torch.float64)
    for part in _pieces(x.shape[1], max(len(x), len(y))):
        total += (x[:, part].double() * flat[part].double()) @ y[:, part].double().T
    return total


def _times(rows: Tensor, vector: Tensor) -> Tensor:
    """rows · vector in float64."""
    flat, total = vector.reshape(-1), torch.zeros(len(rows), dtype=torch.float64)
    for part in _pieces(rows.shape[1], len(rows)):
        total += (rows[:, part].double() @ flat[part].double()[:, None])[:, 0]
    return total


def _dot(a: Tensor, b: Tensor) -> Tensor:
    return torch.dot(a.double().reshape(-1), b.double().reshape(-1))


def _pieces(length: int, rows: int) -> Iterator[slice]:
    size = max(1, _AT_ONCE // max(rows, 1))
    return (slice(start, start + size) for start in range(0, length, size))


def _sums(of: Measured, step: NextStep, names: list[str]) -> dict[str, Tensor]:
    """Of each tensor: of X̄, Ȳ, ΣX·ΣY, θ, v, v₀, P and of the moments."""
    assert step.direction is not None
    u, direction, adam = of.u.gradients, step.direction, of.checkpoint.adam
    x_bar, y_bar, units = u.mean_x(), of.ascent, len(u.sizes)

    def square(values: Mapping[str, Tensor], of_names: list[str]) -> Tensor:
        return torch.stack([_dot(values[n], values[n]) for n in of_names])

    parameters = {n: p.detach() for n, p in of.bound.registry.parameters.items()}
    moved = list(direction.v)
    found = {
        "x_bar_squared": square(x_bar, names),
        "y_bar_squared": square(y_bar, names),
        "y_bar_squared_moved": square(y_bar, moved),
        "plain": torch.stack([_dot(*_over_units(u, n)) for n in names]) / units**2,
        "v_squared": square(direction.v, moved),
        "v0_squared": square(direction.v0, moved),
        "v0_v": torch.stack([_dot(direction.v0[n], direction.v[n]) for n in moved]),
        "p_min": torch.stack([step.precond[n].double().min() for n in step.precond]),
        "p_max": torch.stack([step.precond[n].double().max() for n in step.precond]),
        "p_nonfinite": torch.tensor(
            [int((~torch.isfinite(p)).sum()) for p in step.precond.values()]
        ),
        "numel": torch.tensor([parameters[n].numel() for n in names]),
    }
    found["moment_ratio"] = torch.tensor([_moment_ratio(adam[n]) for n in moved])
    found["exp_avg"] = _first_two({n: adam[n].exp_avg for n in moved})
    found["exp_avg_sq"] = _first_two({n: adam[n].exp_avg_sq for n in moved})
    nothing = torch.zeros(1)
    largest = {n: adam[n].max_exp_avg_sq for n in moved}
    found["max_exp_avg_sq"] = _first_two(
        {n: nothing if t is None else t for n, t in largest.items()}
    )
    return found


def _over_units(u: UnitGradients, name: str) -> tuple[Tensor, Tensor]:
    """ΣX and ΣY over units, of a tensor."""
    if isinstance(u, OwnUnitGradients):
        return u.sums_x[name], u.sums_y[name]
    return u.x[name].sum(0, dtype=torch.float64), u.y[name].sum(0, dtype=torch.float64)


def _first_two(tensors: Mapping[str, Tensor]) -> Tensor:
    """[N, 2]: Σ and Σ² of each, in float64."""
    sums = [
        (
            float(t.sum(dtype=torch.float64)),
            float(torch.linalg.vector_norm(t, dtype=torch.float64).square()),
        )
        for t in tensors.values()
    ]
    return torch.tensor(sums, dtype=torch.float64).reshape(-1, 2)


def _moment_ratio(state: AdamState) -> float:
    """max |exp_avg|/√exp_avg_sq over the entries; squares below what float32 holds count as that."""
    smallest = torch.finfo(torch.float32).tiny
    ratio = state.exp_avg.abs() / (state.exp_avg_sq.clamp(min=0.0) + smallest).sqrt()
    ratio = ratio.masked_fill(state.exp_avg_sq == 0, 0.0)  # it fell below what its dtype holds
    return float(ratio.max()) if ratio.numel() else 0.0


def _hyper(of: Measured) -> list[dict[str, Any]]:
    """Of each tensor with a state, as v and P took them."""
    fields = ("step", "lr", "initial_lr", "betas", "eps", "weight_decay")
    flags = ("decoupled", "amsgrad", "maximize", "bias_correction")
    return [
        {"name": name, "shape": list(state.exp_avg.shape), "in_8_bits": bool(state.blocks)}
        | {field: getattr(state, field) for field in (*fields, *flags)}
        for name, state in of.checkpoint.adam.items()
    ]
