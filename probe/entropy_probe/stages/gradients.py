"""Per-unit gradients X_u and Y_u, and the matrices X_nᵀPY_m that every first-order number comes from."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from entropy_probe.config import FirstOrderConfig, ProbeConfig
from entropy_probe.errors import MeasurementError
from entropy_probe.estimators.advantages import advantages, x_weights, y_weights
from entropy_probe.estimators.baselines import Among, rb_coefficients
from entropy_probe.estimators.policy import score_tokens, token_logp
from entropy_probe.model.capture import Capture
from entropy_probe.model.forward import BoundModel
from entropy_probe.stages.responses.rollouts import Progress, Rollouts
from entropy_probe.stages.scores import Read, Scores, read_rows
from entropy_probe.stages.share import Share

if TYPE_CHECKING:
    from jaxtyping import Float, Int

# Numbers of the rows of all units that are held in float64 at once, of one side of a product: 32 MiB.
IN_FLOAT64 = 1 << 22
# Gradients of single prompts that are held beside those of the units.
_WITNESSED = 8


@dataclass(frozen=True)
class UnitGradients:
    """name → [U, numel] in the compute dtype: X of every unit, and Y of every unit; the unit of each prompt.

    A unit is a prompt (`exact`), or the mean over a block of prompts whose sizes differ by at most one (`block`).

    Of several processes each holds the rows of its own units, and the sums over all: `sums_x` and `sums_y` of units,
    `means_x` and `means_y` of prompts, name → [numel] in float64. Alone these are not made.
    """

    x: dict[str, Float[Tensor, "U D"]]
    y: dict[str, Float[Tensor, "U D"]]
    unit_of: Int[Tensor, " B"]
    mode: str
    share: Share | None = None
    sums_x: dict[str, Float[Tensor, " D"]] = field(default_factory=dict)
    sums_y: dict[str, Float[Tensor, " D"]] = field(default_factory=dict)
    means_x: dict[str, Float[Tensor, " D"]] = field(default_factory=dict)
    means_y: dict[str, Float[Tensor, " D"]] = field(default_factory=dict)

    @property
    def several(self) -> bool:
        """Whether other processes hold units too."""
        return self.share is not None and self.share.several

    def mean_x(self) -> dict[str, Float[Tensor, " D"]]:
        """X̄ over all prompts, in float64."""
        return self.means_x if self.several else prompt_mean(self.x, self.sizes)

    def mean_y(self) -> dict[str, Float[Tensor, " D"]]:
        """Ȳ over all prompts, in float64."""
        return self.means_y if self.several else prompt_mean(self.y, self.sizes)

    def of_units(self, values: Tensor) -> Tensor:
        """[U, …] from [u, …] of everybody's own units."""
        return values if self.share is None else self.share.of_units(values)

    def rows(self, side: Mapping[str, Tensor], chosen: Int[Tensor, " k"]) -> dict[str, Float[Tensor, "k D"]]:
        """The rows of some units, wherever they are."""
        share = self.share
        return {n: t[chosen] if share is None else share.rows(t, chosen, share.units) for n, t in side.items()}

    @property
    def sizes(self) -> Int[Tensor, " U"]:
        return torch.bincount(self.unit_of)


def response_advantages(rollouts: Rollouts, config: FirstOrderConfig) -> Float[Tensor, "B G"]:
    """The file's own `advantages`, where it has them, else the configured rule on the rewards."""
    return rollouts.advantages if rollouts.advantages is not None else advantages(rollouts.rewards, config.advantage)


def response_weights(
    rollouts: Rollouts, scores: Scores, config: ProbeConfig
) -> tuple[Float[Tensor, "B G"], Float[Tensor, "B G"]]:
    """(c, a) with X_n = Σ_g c_ng ∇S_ng (the naive estimator) and Y_n = Σ_g a_ng ∇S_ng."""
    rule, limit = config.first_order.loss, config.generation.max_new_tokens
    advantage = response_advantages(rollouts, config.first_order)
    return x_weights(scores.seq_logp), y_weights(advantage, scores.gen_lens, rule, limit)


@dataclass(frozen=True)
class Payload:
    """What a prompt's gradient is made of: Σ_g w_ng ∇f_ng with constant `weights` w, where f = Σ_t log p_t or, with
    constant `coefficients` κ, f = Σ_t (H_t + κ_t·log p_t)."""

    weights: Float[Tensor, "B G"]
    coefficients: Float[Tensor, "B G T"] | None = None

    def read(self, temperature: float) -> Read:
        def logp(logits: Tensor, tokens: Tensor) -> tuple[Tensor, ...]:
            return (token_logp(logits, tokens, temperature),)

        def entropy_and_logp(logits: Tensor, tokens: Tensor, coefficients: Tensor) -> tuple[Tensor, ...]:
            scored = score_tokens(logits, tokens, temperature, 1.0)
            return (scored.entropy + coefficients.to(logits.dtype) * scored.logp,)

        return logp if self.coefficients is None else entropy_and_logp

    def of_rows(self, rows: Int[Tensor, " R"]) -> Float[Tensor, "R T"] | None:
        """κ of some responses."""
        return None if self.coefficients is None else self.coefficients.flatten(0, 1)[rows]

    def of_prompts(self, prompts: Int[Tensor, " b"]) -> Payload:
        """The same for some prompts only."""
        return Payload(self.weights[prompts], None if self.coefficients is None else self.coefficients[prompts])

    def sums(
        self, logp: Float[Tensor, "R T"], entropy: Float[Tensor, "R T"], rows: Int[Tensor, " R"]
    ) -> Float[Tensor, " R"]:
        """f of some responses in float64, from log p and H; or a derivative of f, from theirs."""
        kappa = self.of_rows(rows)
        if kappa is None:
            return logp.double().sum(-1)
        kappa = kappa[:, : logp.shape[-1]].to(logp.device)
        return (entropy.double() + kappa * logp.double()).sum(-1)


def payloads(
    rollouts: Rollouts, scores: Scores, config: ProbeConfig, among: Among | None = None
) -> tuple[Payload, Payload]:
    """Those of X, by the configured estimator of −∇H, and of Y; `among` where these are not all prompts.

    naive   X_n = Σ_g c_ng ∇S_ng
    rb      X_n = −(1/G) Σ_g Σ_t (∇H_t + (R_{≥t} − b_t) ∇log p_t)
    """
    weights_x, weights_y = response_weights(rollouts, scores, config)
    first_order, y = config.first_order, Payload(weights_y)
    if first_order.estimator == "naive":
        return Payload(weights_x), y
    kappa = rb_coefficients(scores.rb_entropy, scores.gen_lens, first_order.baseline, scores.features, among)
    return Payload(torch.full_like(weights_x, -1.0 / rollouts.num_responses), kappa), y


def per_token_payload(scores: Scores) -> Payload:
    """That of X for the entropy per token, whose mean over prompts estimates −∇(H/E[T]), naive:

        X_n = Σ_g c_ng ∇S_ng/T̄,   c of S − s̄T in place of S,   s̄ = ΣS/ΣT

    s̄ and T̄ are constants of it; what they add to the spread of a cross-fitted slope is lost in the noise of Y.
    """
    lengths = scores.gen_lens.double()
    excess = scores.seq_logp - scores.seq_logp.sum() / lengths.sum() * lengths
    return Payload(x_weights(excess) / lengths.mean())


def unit_gradients(
    bound: BoundModel,
    rollouts: Rollouts,
    config: ProbeConfig,
    of_x: Payload,
    of_y: Payload | None = None,
    *,
    stage: str = "gradients",
    progress: Progress | None = None,
    share: Share | None = None,
) -> UnitGradients:
    """X_n and Y_n (`payloads`) of every prompt n, or their means within blocks of prompts.

    Where the module detaches a part of itself (DoRA), or its padding token is read, X is the true derivative and Y the
    module's own autograd, because that is what the trainer's step uses; where the two are one, and both are weighted
    ∇S, X and Y come from one forward and one backward. Without `of_y` only X.

    With a `share` of `rollouts` the payloads are those of its own prompts, and only its units are made. What the others
    make is known by its sums: one all-reduce of ΣX and one of ΣY, in buckets.
    """
    parameters = bound.registry.trainable
    if not parameters:
        raise MeasurementError("gradients", "no parameter of the model is trainable", "set requires_grad")
    mode, units_of_all = units_of(bound, rollouts, config)
    one_pass = of_x.coefficients is None and bound.autograd_is_derivative_of(rollouts.tokens)
    unit_of = units_of_all
    if share is not None:
        rollouts, unit_of = share.own, units_of_all[share.prompts] - share.units.start
    sizes = torch.bincount(unit_of)
    x = {n: torch.zeros(len(sizes), p.numel(), dtype=bound.dtype) for n, p in parameters.items()}
    y = {n: torch.zeros_like(value) for n, value in x.items()} if of_y is not None else {}
    on_cpu = bound.device.type == "cpu"  # then sums are added where they belong, and no second copy is made of them
    temperature, per_row = config.generation.temperature, sizes[unit_of].repeat_interleave(rollouts.num_responses)

    def add(units: Tensor, rows: Tensor, sides: list[tuple[dict[str, Tensor], Payload]], *, true: bool) -> None:
        """One forward and one backward, for sides with the same payload; as many rows of each of the units."""
        weights = torch.stack([payload.weights.reshape(-1)[rows] / per_row[rows] for _, payload in sides])
        into = {
            name: [[side[name][unit].view(p.shape) for unit in units] for side, _ in sides]
            for name, p in parameters.items()
        }
        capture = Capture(parameters, weights.to(bound.device), len(units), into if on_cpu else None)
        payload = sides[0][1]
        options = {"beside": payload.of_rows(rows), "true_derivative": true, "capture": capture}
        (values,) = read_rows(bound, rollouts, rows, payload.read(temperature), **options)
        sums = capture.sums(values.sum(-1))
        for name, own in into.items() if not on_cpu else ():
            for k, n in itertools.product(range(len(sides)), range(len(units))):
                own[k][n].add_(sums[name][k][n].cpu())

    done = 0
    for units, rows in _microbatches(rollouts, unit_of, config.generation.tf_batch_size):
        if of_y is not None and one_pass:
            add(units, rows, [(x, of_x), (y, of_y)], true=False)
        else:
            add(units, rows, [(x, of_x)], true=True)
            if of_y is not None:
                add(units, rows, [(y, of_y)], true=False)
        done += len(rows)
        if progress is not None:
            progress(stage, done, len(rollouts.gen_lens))
    units = UnitGradients(x, y, units_of_all, mode, share)
    return _with_sums(units) if units.several else units


def _with_sums(units: UnitGradients) -> UnitGradients:
    """ΣX and ΣY over the units of all processes, and over their prompts, where a unit is more than one."""
    assert units.share is not None
    world, sizes = units.share.world, units.sizes.double()
    own, total = sizes[units.share.units], float(sizes.sum())
    found = {}
    for side, rows in (("x", units.x), ("y", units.y)):
        once = torch.ones_like(own)
        sums = found[f"sums_{side}"] = world.totals({name: weighted_sum(once, t) for name, t in rows.items()})
        if units.mode == "block":
            sums = world.totals({name: weighted_sum(own, t) for name, t in rows.items()})
        found[f"means_{side}"] = {name: t / total for name, t in sums.items()}
    return replace(units, **found)


def _microbatches(rollouts: Rollouts, unit_of: Int[Tensor, " B"], size: int) -> Iterator[tuple[Tensor, Tensor]]:
    """(units, rows) with at most `size` rows of similar length, as many of each unit, one unit after the other: some
    prompts that are units themselves, some prompts of one unit, or some rows of one prompt."""
    group, at_once = rollouts.num_responses, max(1, size // rollouts.num_responses)
    lengths = rollouts.per_prompt(rollouts.prompt_lens + rollouts.gen_lens).amax(1)
    order = torch.argsort(lengths, stable=True)
    if not len(unit_of):
        return
    single = len(unit_of) == int(unit_of.max()) + 1
    for within in [order] if single else [order[unit_of[order] == unit] for unit in unit_of.unique()]:
        for prompts in within.split(at_once):
            rows = (prompts[:, None] * group + torch.arange(group)).reshape(-1)
            for part in rows.split(max(size, 1)) if len(prompts) == 1 else [rows]:
                yield unit_of[prompts] if single else unit_of[prompts[:1]], part


def units_of(bound: BoundModel, rollouts: Rollouts, config: ProbeConfig) -> tuple[str, Int[Tensor, " B"]]:
    """(mode, the unit of each prompt); the same however many processes there are."""
    mode, num_units = units_within_memory(bound, rollouts, config)
    return mode, torch.arange(rollouts.num_prompts) * num_units // rollouts.num_prompts


def units_within_memory(bound: BoundModel, rollouts: Rollouts, config: ProbeConfig) -> tuple[str, int]:
    """(mode, number of units): every prompt a unit in `exact` mode where the gradients fit into
    `first_order.max_gradient_gib`, else as many blocks as fit; `num_blocks` of them in `block` mode.

    Held at once are X and Y of the U batch, X of the E batch, and X and Y of two prompts in two ways, for the witness.
    """
    first_order, size_b = config.first_order, rollouts.num_prompts
    room = (first_order.max_gradient_gib * 2**30 / _bytes_of_one(bound) - _WITNESSED) / 3
    if first_order.mode == "exact" and size_b <= room:
        return "exact", size_b
    most = int(room)
    wanted = max(most, 2) if first_order.mode == "exact" else min(first_order.num_blocks, size_b)
    if wanted > most:
        raise MeasurementError(
            "first_order.max_gradient_gib",
            f"gradients of {wanted} blocks need {bytes_of_units(bound, wanted) / 2**30:.2g} GiB, "
            f"{first_order.max_gradient_gib:g} are allowed",
            "raise it, or set first_order.num_blocks lower" if wanted > 2 else "raise it",
        )
    return "block", wanted


def bytes_of_units(bound: BoundModel, units: int) -> int:
    """What the gradients of so many units take, with those of the witness."""
    return int((3 * units + _WITNESSED) * _bytes_of_one(bound))


def _bytes_of_one(bound: BoundModel) -> float:
    return sum(p.numel() for p in bound.registry.trainable.values()) * torch.finfo(bound.dtype).bits / 8


def gram(
    left: Mapping[str, Float[Tensor, "U D"]],
    right: Mapping[str, Float[Tensor, "V D"]],
    precond: Mapping[str, Float[Tensor, ...]] | None = None,
) -> Float[Tensor, "U V"]:
    """Σ_names left_u · P ⊙ right_v in float64; P enters each product exactly once (P = 1 without `precond`)."""
    return torch.stack(list(grams(left, right, precond).values())).sum(0)


def grams(
    left: Mapping[str, Float[Tensor, "U D"]],
    right: Mapping[str, Float[Tensor, "V D"]],
    precond: Mapping[str, Float[Tensor, ...]] | None = None,
) -> dict[str, Float[Tensor, "U V"]]:
    """The terms of `gram`, by name."""
    return {name: _gram(a, right[name], None if precond is None else precond[name]) for name, a in left.items()}


def _gram(a: Tensor, b: Tensor, precond: Tensor | None) -> Tensor:
    total, p = torch.zeros(len(a), len(b), dtype=torch.float64), None if precond is None else precond.reshape(-1)
    for part in _columns(a if len(a) > len(b) else b):
        scaled = b[:, part].double() if p is None else b[:, part].double() * p[part].double()
        total += a[:, part].double() @ scaled.T
    return total


def dots(
    rows: Mapping[str, Float[Tensor, "U D"]],
    vector: Mapping[str, Float[Tensor, ...]],
    precond: Mapping[str, Float[Tensor, ...]] | None = None,
) -> dict[str, Float[Tensor, " U"]]:
    """row_u · P ⊙ vector in float64, by name."""
    return {name: g[:, 0] for name, g in grams(rows, {n: v.reshape(1, -1) for n, v in vector.items()}, precond).items()}


def own_dots(
    units: UnitGradients, precond: Mapping[str, Float[Tensor, ...]], names: Iterable[str] | None = None
) -> dict[str, Float[Tensor, "u 3"]]:
    """By name, of each own unit: Σ_m K_nm, Σ_m K_mn and K_nn, of the matrix K_nm = X_nᵀPY_m that nobody holds.

    x_n·P·ΣY,   y_n·P·ΣX,   x_n·P·y_n
    """
    found = {}
    for name in units.x if names is None else names:
        x, y, p = units.x[name], units.y[name], {name: precond[name]}
        rows, columns = (
            dots({name: side}, {name: total[name]}, p)[name] for side, total in ((x, units.sums_y), (y, units.sums_x))
        )
        diagonal = torch.zeros(len(x), dtype=torch.float64)
        for part in _columns(x):
            diagonal += (x[:, part].double() * p[name].reshape(-1)[part].double() * y[:, part].double()).sum(1)
        found[name] = torch.stack([rows, columns, diagonal], 1)
    return found


def prompt_mean(units: Mapping[str, Float[Tensor, "U D"]], sizes: Int[Tensor, " U"]) -> dict[str, Float[Tensor, " D"]]:
    """Mean over prompts, in float64: units weighted by the number of their prompts."""
    share = sizes.double() / sizes.sum()
    return {name: weighted_sum(share, values) for name, values in units.items()}


def weighted_sum(weights: Float[Tensor, " U"], rows: Float[Tensor, "U D"]) -> Float[Tensor, " D"]:
    """Σ_u weights_u·rows_u in float64."""
    parts = [(weights[:, None] * rows[:, part].double()).sum(0) for part in _columns(rows)]
    return torch.cat(parts) if parts else rows.new_zeros(0, dtype=torch.float64)


def _columns(rows: Tensor) -> Iterator[slice]:
    """A few columns at a time."""
    size = max(1, IN_FLOAT64 // max(len(rows), 1))
    return (slice(start, start + size) for start in range(0, rows.shape[1], size))
