"""ΔĤ after a step that is taken: θ + lr·v written in place and undone, and a step of torch's own optimizer.

Both on a copy, so that the live model is not touched for a moment: an interrupted or failing pass leaves nothing to
repair, and a graph that the caller holds stays valid (an in-place write, undone or not, would end it).
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor

from entropy_probe.config import ProbeConfig
from entropy_probe.errors import NoCopyError
from entropy_probe.estimators import importance
from entropy_probe.memory import available_bytes
from entropy_probe.model.checkpoint import AdamState
from entropy_probe.model.forward import BoundModel
from entropy_probe.model.overrides import theta_plus_eta_v
from entropy_probe.model.registry import Registry
from entropy_probe.report import RealStepSection
from entropy_probe.stages.entropy_change import change_at
from entropy_probe.stages.made import Made
from entropy_probe.stages.responses.rollouts import Rollouts
from entropy_probe.stages.scores import Scores, score
from entropy_probe.stages.witnesses.taylor import with_plain_weights
from entropy_probe.stages.witnesses.torch_step import learning_rates, take_step

_PROMPTS = _RESPONSES = 2  # of each


@torch.no_grad()
def real_step(
    float64: BoundModel,
    rollouts: Rollouts,
    scores: Scores,
    v: Mapping[str, Tensor],
    ascent: Mapping[str, Tensor],
    adam: Mapping[str, AdamState],
    lr: float,
    config: ProbeConfig,
) -> RealStepSection:
    """ΔĤ_RB(lr) of two responses of two prompts in three ways. `scores` are those of all responses at θ, `ascent` is
    the Ȳ that v was made from, before clipping.

    Raises `NoCopyError` where the copy and its optimizer do not fit.
    """
    require_memory(needed_bytes(float64, adam), available_bytes(float64.device))
    config = with_plain_weights(config)
    prompts = torch.linspace(
        0, rollouts.num_prompts - 1, min(_PROMPTS, rollouts.num_prompts)
    ).long()
    few = rollouts.of_prompts(prompts, _RESPONSES)
    scores = scores.of_prompts(prompts, _RESPONSES)
    # With the log q that was measured: in float64 a token may fall out at the edge of the nucleus.
    before = score(float64, few, config, {}).with_logq_of(scores)
    functional = score(
        float64, few, config, theta_plus_eta_v(float64.registry, v, lr, float64.dtype)
    )
    own = copied(float64, v)
    originals, now = float64.registry.parameters, own.registry.parameters
    virtual = after_virtual_step(own, few, v, lr, config, originals)
    undone = all(torch.equal(now[name], originals[name]) for name in v)
    real = after_real_step(own, few, ascent, adam, lr, config)
    delta_h, in_place, stepped = (
        change_at(before, s, lr, config).rb.value for s in (functional, virtual, real)
    )
    sizes, apart = functional.seq_logp.abs() + functional.gen_lens, abs(stepped - delta_h)
    return RealStepSection(
        delta_h=delta_h,
        virtual_difference=abs(in_place - delta_h),
        virtual_undone=undone,
        real_difference=apart,
        real_relative=apart / _terms(before, functional, config),
        real_seq_logp=float(((real.seq_logp - functional.seq_logp).abs() / sizes).max()),
    )


def _terms(before: Scores, after: Scores, config: ProbeConfig) -> float:
    """Σŵ[R + T + |R − Ĥ|(|S| + T)]: dĤ = Σŵ[dR + (R − Ĥ)dS], with dR and dS in proportion to R + T and |S| + T."""
    weights = importance.snis_weights(
        after.seq_logp - before.seq_logq, config.true_delta_h.clip_log_weight
    ).normalised
    entropy, tokens = after.rb_sum, after.gen_lens
    off_mean = (entropy - (weights * entropy).sum()).abs()
    return float((weights * (entropy + tokens + off_mean * (after.seq_logp.abs() + tokens))).sum())


def after_virtual_step(
    bound: BoundModel,
    rollouts: Rollouts,
    v: Mapping[str, Tensor],
    eta: float,
    config: ProbeConfig,
    theta: Mapping[str, Tensor] | None = None,
) -> Scores:
    """Scores at θ + ηv, which stands in the module itself while they are made."""
    with virtually_stepped(bound, v, eta, theta):
        return score(bound, rollouts, config, {})


@contextmanager
def virtually_stepped(
    bound: BoundModel,
    v: Mapping[str, Tensor],
    eta: float,
    theta: Mapping[str, Tensor] | None = None,
) -> Iterator[None]:
    """θ + ηv of `theta_plus_eta_v` in place; θ is put back from a copy, bit for bit, whatever happens inside. The copy
    is `theta`, where there is one already: then nothing else is held.

    p + δ − δ would not be p.
    """
    registry = bound.registry
    if theta is None:
        theta = {name: registry.parameters[name].detach().clone() for name in v}
    before = theta

    def stepped(name: str) -> Tensor:
        return theta_plus_eta_v(registry, {name: v[name]}, eta, bound.dtype)[name]

    try:
        _write(registry, Made(v, stepped))
        yield
    finally:
        _write(registry, Made(v, lambda name: before[name].detach()))


@torch.no_grad()
def _write(registry: Registry, values: Mapping[str, Tensor]) -> None:
    for name, value in values.items():
        registry.parameters[name].copy_(value)


def after_real_step(
    bound: BoundModel,
    rollouts: Rollouts,
    ascent: Mapping[str, Tensor],
    adam: Mapping[str, AdamState],
    lr: float,
    config: ProbeConfig,
) -> Scores:
    """Scores after `take_real_step`, which changes `bound` for good: give a copy."""
    take_real_step(bound.registry, ascent, adam, lr, config.whose_update.max_grad_norm)
    return score(bound, rollouts, config, {})


def take_real_step(
    registry: Registry,
    ascent: Mapping[str, Tensor],
    adam: Mapping[str, AdamState],
    lr: float,
    max_grad_norm: float | None,
) -> None:
    """One step of torch's own optimizer at `lr`, on the gradient −Ȳ, clipped as `clip_grad_norm_` clips it: by the norm
    of all first, then one parameter after the other, so that one gradient and its moments are held."""
    parameters = {name: registry.parameters[name] for name in adam}
    lrs, norm_of = learning_rates(adam, lr), torch.nn.utils.get_total_norm

    def gradient(name: str) -> Tensor:
        p = parameters[name]
        return -ascent[name].reshape(p.shape).to(p)

    norm = None if max_grad_norm is None else norm_of([norm_of([gradient(name)]) for name in adam])
    for name, p in parameters.items():
        p.grad = gradient(name)
        if max_grad_norm is not None and norm is not None:
            torch.nn.utils.clip_grads_with_norm_([p], max_grad_norm, norm)
        take_step({name: p}, adam, lrs)
        p.grad = None


def copied(bound: BoundModel, names: Iterable[str]) -> BoundModel:
    """A copy of the module with its own parameters of these names and its own buffers; all others are shared."""
    kept = set(names)
    shared = {id(p): p for name, p in bound.registry.parameters.items() if name not in kept}
    try:
        return BoundModel(
            Registry(copy.deepcopy(bound.module, shared)), bound.dtype, lending=bound.lending
        )
    except (RuntimeError, TypeError) as error:
        raise NoCopyError(
            "the model", f"cannot be copied ({error})", "remove its other arguments"
        ) from error


def needed_bytes(bound: BoundModel, adam: Mapping[str, AdamState]) -> int:
    """What a step on a copy holds at once: each parameter of the optimizer; of the largest its gradient and its two
    moments (three under AMSGrad); and the buffers."""
    parameters = {name: bound.registry.parameters[name] for name in adam}
    sizes = {name: p.numel() * p.element_size() for name, p in parameters.items()}
    of_step = (size * (4 if adam[name].amsgrad else 3) for name, size in sizes.items())
    buffers = sum(b.numel() * b.element_size() for b in bound.module.buffers())
    return sum(sizes.values()) + max(of_step, default=0) + buffers


def require_memory(needed: int, available: int | None) -> None:
    """Raise `NoCopyError` with both numbers where less is known to be available."""
    if available is not None and needed > available:
        raise NoCopyError(
            "optimizer step on a copy",
            f"the copy, its gradient and its optimizer need {needed / 2**30:.2g} GiB, {available / 2**30:.2g} "
            "are available",
            "free memory, or choose another --probe-device",
        )
