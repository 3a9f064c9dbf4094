"""Directional derivatives D_v of log p and H_t at every token, in forward mode or by differences of scores."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.autograd import forward_ad

from entropy_probe.config import ProbeConfig
from entropy_probe.estimators.policy import scores_along
from entropy_probe.model.forward import BoundModel
from entropy_probe.model.overrides import theta_plus_eta_v
from entropy_probe.processes.world import ALONE, World
from entropy_probe.stages.gradients.products import norm
from entropy_probe.stages.moved import moved
from entropy_probe.stages.responses.rollouts import Rollouts
from entropy_probe.stages.scores import (
    batches_by_length,
    read_rows,
    rows_without_graph,
    score,
    sharing,
)
from entropy_probe.stages.shared_prompts import read_once

if TYPE_CHECKING:
    from jaxtyping import Bool, Float, Int

TWO_POINTS, FIVE_POINTS = (-1, 1), (-2, -1, 1, 2)


@dataclass(frozen=True)
class Derivatives:
    """D_v log p and D_v H_t per token [B, G, T], zero past the end of a response.

    `logit` is the largest |z_j| of the logits, over the temperature, that predict the token, and `d_logit` the largest
    |D_v z_j|: how fast the policy moves, where it is so certain that log p and H hardly do. `rounding` is
    eps·max(1, logit)·d_logit: both derivatives are sums of p_j·D_v z_j, where a p_j is as uncertain as its logit, and
    the terms may cancel. `values` are log p and H_t where the derivatives are taken, of a pass in forward mode.
    """

    d_logp: Float[Tensor, "B G T"]
    d_entropy: Float[Tensor, "B G T"]
    logit: Float[Tensor, "B G T"]
    d_logit: Float[Tensor, "B G T"]
    rounding: Float[Tensor, "B G T"]
    values: Float[Tensor, "2 B G T"] | None = None

    @property
    def d_seq_logp(self) -> Float[Tensor, "B G"]:
        return self.d_logp.sum(-1)

    @property
    def d_rb_sum(self) -> Float[Tensor, "B G"]:
        return self.d_entropy.sum(-1)

    def replaced(
        self, prompts: Int[Tensor, " b"], chosen: Bool[Tensor, "b G"], others: Derivatives
    ) -> Derivatives:
        """With those of `others`, which are of some prompts, for the `chosen` responses of these."""
        found = {}
        for name, values in vars(self).items():
            if name == "values":
                continue
            other = getattr(others, name)
            other = torch.nn.functional.pad(other, (0, values.shape[-1] - other.shape[-1]))
            found[name] = values.clone()
            found[name][prompts] = torch.where(chosen[..., None], other, values[prompts])
        return Derivatives(**found)

    @property
    def fastest(self) -> float:
        """The largest |D_vS|, or a tenth of |D_v z| where that is more, 0 of none: steps are said in units of it.

        Where a policy is all but certain, S hardly moves along v, and 1 − p grows by e for every nat of a logit.
        """
        return max(largest(self.d_seq_logp), largest(self.d_logit) / 10)

    @property
    def fastest_sum(self) -> float:
        """The same, or the largest |D_vR|: where all responses are certain the entropy moves faster than log p."""
        return max(self.fastest, largest(self.d_rb_sum))


@torch.no_grad()
def directional_derivatives(
    bound: BoundModel,
    rollouts: Rollouts,
    v: Mapping[str, Tensor],
    config: ProbeConfig,
    eta: float = 0.0,
    some: Int[Tensor, " R"] | None = None,
    *,
    shared: bool = False,
    world: World = ALONE,
) -> Derivatives:
    """d/dη of log p and H_t at θ + ηv, in one forward-mode pass (a JVP), by the true derivative of the function.

    Of `some` rows, without which of all; the others' are 0. `shared`: behind prompts that are read once, where scores
    are read so. With a `world` all its processes call this. Raises `NotImplementedError` where an operation of the
    model has no forward-mode derivative.
    """
    shape = (6, len(rollouts.gen_lens), rollouts.max_gen_len)
    found = torch.zeros(shape, dtype=torch.float64)
    point = moved(bound, v, eta, world)
    along = _along_as(v, point, world)  # moved once, not for every batch of rows
    temperature = config.generation.temperature
    read = partial(_along, temperature)
    size = rows_without_graph(rollouts, config.generation)

    def in_batches() -> Iterator[tuple[Tensor, tuple[Tensor, ...]]]:
        if shared and sharing(bound, rollouts, config).shared:
            with forward_ad.dual_level():
                dual = _dual(point, along)
                yield from read_once(bound, rollouts, size, read, dual, some, true_derivative=True)
            return
        for rows in batches_by_length(rollouts, size, some):
            with forward_ad.dual_level():
                options = {"override": _dual(point, along), "true_derivative": True}
                parts = read_rows(bound, rollouts, rows, read, **options)
            yield rows, parts

    for rows, parts in in_batches():
        for whole, part in zip(found, parts, strict=True):
            whole[rows, : part.shape[1]] = part.double().cpu()
    eps = torch.finfo(bound.dtype).eps
    *values, d_logp, d_entropy, logit, d_logit = map(rollouts.per_prompt, found)
    logit, d_logit = logit / temperature, d_logit / temperature
    rounding = eps * logit.clamp(min=1.0) * d_logit
    return Derivatives(d_logp, d_entropy, logit, d_logit, rounding, torch.stack(values))


def _along_as(
    v: Mapping[str, Tensor], point: Mapping[str, Tensor], world: World
) -> dict[str, Tensor]:
    """v in the dtype and on the device of θ; of a world of one copy that is there once too."""
    if not world.one_copy or all(v[n].dtype == value.dtype for n, value in point.items()):
        return {name: v[name].to(value) for name, value in point.items()}
    dtype = next(iter(point.values())).dtype
    shapes = {name: tuple(value.shape) for name, value in point.items()}
    return world.made(shapes, lambda name: v[name].to(dtype), dtype)


def _dual(point: Mapping[str, Tensor], along: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: forward_ad.make_dual(value, along[name]) for name, value in point.items()}


def _along(temperature: float, logits: Tensor, tokens: Tensor) -> tuple[Tensor, ...]:
    """log p and the entropy of π, their derivatives; the largest |z|, and the largest |tangent of z|."""
    z, tangent = forward_ad.unpack_dual(logits)
    tangent = torch.zeros_like(z) if tangent is None else tangent
    found = scores_along(z, tangent, tokens, temperature)
    logit = _furthest(z)
    if not bool(logit.isfinite().all()):
        logit = _furthest(z.masked_fill(z.isinf(), 0.0))
    return *found, logit, _furthest(tangent)


def _furthest(values: Float[Tensor, "N V"]) -> Float[Tensor, " N"]:
    """max_j|x_j|, without a copy of them."""
    return torch.maximum(values.amax(-1), -values.amin(-1))


def derivatives_by_difference(
    float64: BoundModel,
    rollouts: Rollouts,
    v: Mapping[str, Tensor],
    config: ProbeConfig,
    h: float,
    eta: float = 0.0,
) -> Derivatives:
    """D_v log p and D_v H_t at θ + ηv as five-point differences of scores in true float64."""
    at = {}
    for k in FIVE_POINTS:
        override = theta_plus_eta_v(float64.registry, v, eta + k * h, float64.dtype)
        at[k] = score(float64, rollouts, config, override)
    logp, entropy = (
        {k: getattr(s, of) for k, s in at.items()} for of in ("token_logp", "rb_entropy")
    )
    d_logp, d_entropy = stencil_derivative(logp, h), stencil_derivative(entropy, h)
    size, moved = (
        torch.maximum(one.abs(), other.abs())
        for one, other in ((logp[1], entropy[1]), (d_logp, d_entropy))
    )
    rounding = torch.finfo(torch.float64).eps * size.clamp(min=1.0) / h
    return Derivatives(d_logp, d_entropy, size, moved, rounding)


Along = Callable[[Rollouts, float, float], Derivatives]
"""(rollouts, η, h) → D_v at θ + ηv, with a step h where it is a difference of scores."""


@dataclass(frozen=True)
class Second:
    """D²_v log p and D²_v H_t per token, zero past the end of a response, and what rounding leaves of their sums."""

    logp: Float[Tensor, "B G T"]
    entropy: Float[Tensor, "B G T"]
    rounding: Float[Tensor, "B G"]

    def replaced(
        self, prompts: Int[Tensor, " b"], chosen: Bool[Tensor, "b G"], others: Second
    ) -> Second:
        """As `Derivatives.replaced`."""
        logp, entropy = self.logp.clone(), self.entropy.clone()
        for values, other in ((logp, others.logp), (entropy, others.entropy)):
            wide = torch.nn.functional.pad(other, (0, values.shape[-1] - other.shape[-1]))
            values[prompts] = torch.where(chosen[..., None], wide, values[prompts])
        rounding = self.rounding.clone()
        rounding[prompts] = torch.where(chosen, others.rounding, rounding[prompts])
        return Second(logp, entropy, rounding)


@dataclass(frozen=True)
class Stencil:
    """D_v of some responses at θ, `None` where it is left to `middle`, and at the points kh of a stencil around it.

    D²_v f ≈ [D_vf(h) − D_vf(−h)]/(2h), or with five points
    """

    at_theta: Derivatives | None
    at: Mapping[int, Derivatives]
    h: float

    @property
    def middle(self) -> Derivatives:
        """D_v at θ as the mean of D_v at h and at −h, which is off by ½h²·D³_v: a share (1e-5)² of it."""
        up, down = self.at[1], self.at[-1]
        fields = {name: (getattr(up, name) + getattr(down, name)) / 2 for name in _OF_TOKENS}
        return Derivatives(**fields)

    @property
    def second(self) -> Second:
        logp, entropy = (
            stencil_derivative({k: getattr(d, of) for k, d in self.at.items()}, self.h)
            for of in ("d_logp", "d_entropy")
        )
        squares = torch.stack([d.rounding.square().sum(-1) for d in self.at.values()]).sum(0)
        return Second(logp, entropy, squares.sqrt() / (2 * self.h))

    def rough(self, curved: float) -> Bool[Tensor, "B G"]:
        """Whether D_v moves to one side of θ as it does not to the other, by more than rounding and a share `curved` of
        how it moves: a jump or a kink lies within the stencil, and two steps would not give the same D²_v."""
        if self.at_theta is None:
            return self._rough_between(curved)
        rough = torch.zeros_like(self.at_theta.d_seq_logp, dtype=torch.bool)
        known = self.at_theta.rounding.square().sum(-1).sqrt()
        for k in (k for k in self.at if k > 0):
            for of in ("d_seq_logp", "d_rb_sum"):
                down, still, up = (getattr(d, of) for d in (self.at[-k], self.at_theta, self.at[k]))
                apart = (up + down - 2 * still).abs()
                rough |= apart > curved * (up - down).abs() + _ROUNDINGS * known
        return rough

    def _rough_between(self, curved: float) -> Bool[Tensor, "B G"]:
        """The same by what lies between −h and h, without D_v at θ: f(h) − f(−h) is not 2h times the mean of the two
        D_vf, by more than the rounding of f; or they are further apart than any smooth f's that moves by 1e-5."""
        up, down = self.at[1], self.at[-1]
        rough = torch.zeros_like(up.d_seq_logp, dtype=torch.bool)
        assert up.values is not None
        assert down.values is not None
        eps = torch.finfo(torch.float64).eps
        known = up.rounding.square().sum(-1).sqrt()
        fastest = max(up.fastest_sum, down.fastest_sum)
        for k, of in enumerate(("d_seq_logp", "d_rb_sum")):
            above, below = getattr(up, of), getattr(down, of)
            chord = (up.values[k] - down.values[k]).sum(-1) / (2 * self.h)
            size = torch.maximum(up.logit, up.values[k].abs()).clamp(min=1.0)
            of_values = eps * size.square().sum(-1).sqrt() / self.h
            turned = (above - below).abs()
            off = (chord - (above + below) / 2).abs()
            rough |= off > curved * turned + _ROUNDINGS * (known + of_values)
            rough |= turned > curved * fastest + _ROUNDINGS * known
        return rough


def stencil_without_jumps(
    along: Along,
    rollouts: Rollouts,
    at_theta: Derivatives | None,
    h: float,
    points: tuple[int, ...],
    known: Mapping[int, Derivatives] | None = None,
    of_all: Along | None = None,
) -> tuple[Derivatives, Second, int]:
    """(D_v at θ, `Stencil.second`, how many responses had a jump within the first step), of all responses. Without
    `at_theta` D_v is the `middle` of the first step, and exact for responses that have a jump in it. `known` are points
    of the first stencil that need not be asked for; the others of it are asked of `of_all`, as every process does.

    A step that crosses a router's choice or a kink of a ReLU gives another number with its length. So the prompts of
    such responses are asked again with shorter ones, until both sides of θ agree; those that no step makes agree, as
    those of a forward that is not a function, keep the first.
    """
    by_scores = len(points) > 2
    curved = 100 * (SCORE_CHANGE if by_scores else JVP_CHANGE)

    def stencil(some: Rollouts, still: Derivatives | None, h: float) -> Stencil:
        return Stencil(still, {k: along(some, k * h, h) for k in points}, h)

    first = {k: (known or {}).get(k) or (of_all or along)(rollouts, k * h, h) for k in points}
    whole = Stencil(at_theta, first, h)
    second, rough = whole.second, whole.rough(curved)
    count = int(rough.sum())
    if at_theta is None:
        at_theta, jumps = whole.middle, rough.any(1).nonzero()[:, 0]
        if len(jumps):
            exact = along(rollouts.of_prompts(jumps), 0.0, h)
            at_theta = at_theta.replaced(jumps, rough[jumps], exact)
    for shorter in _SHORTER:
        prompts = rough.any(1).nonzero()[:, 0]
        if not len(prompts):
            break
        some = rollouts.of_prompts(prompts)
        near = stencil(some, along(some, 0.0, h / shorter), h / shorter)
        mended = rough[prompts] & ~near.rough(curved)
        second = second.replaced(prompts, mended, near.second)
        if by_scores:
            assert near.at_theta is not None
            at_theta = at_theta.replaced(prompts, mended, near.at_theta)
        rough[prompts] &= ~mended
    return at_theta, second, count


# Largest change of a response's log-probability, or of a logit, along a stencil. Of D_v, which is exact: a central
# difference errs by (1e-5)² in truncation and 1e-16/1e-5 in rounding, both below 1e-9 of the terms; a long step crosses
# the kinks of a ReLU. Of scores, twice in a row: a longer step, as 1e-16·|S| is divided by it twice.
JVP_CHANGE, SCORE_CHANGE = 1e-5, 1e-3
_SHORTER = (16.0, 256.0)
_ROUNDINGS = 30.0
_OF_TOKENS = ("d_logp", "d_entropy", "logit", "d_logit", "rounding")


def step_of(fastest: float, v: Mapping[str, Tensor], change: float) -> float:
    """h with fastest·h = change, where `fastest` is the largest |D_vS| of a response."""
    return change / fastest if fastest > 0 else change / max(norm(v), 1.0)


def largest(values: Tensor) -> float:
    """max|values|, 0 of none."""
    return float(values.abs().max()) if values.numel() else 0.0


def stencil_derivative(values: Mapping[int, Tensor], h: float) -> Tensor:
    """[f(h) − f(−h)]/(2h), or [8(f(h) − f(−h)) − (f(2h) − f(−2h))]/(12h), from f at the given multiples of h."""
    if 2 not in values:
        return (values[1] - values[-1]) / (2 * h)
    return (8 * (values[1] - values[-1]) - (values[2] - values[-2])) / (12 * h)
