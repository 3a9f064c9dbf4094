"""Planted faults by name: what is wrong, where it is planted, and the criteria that turn red.

A fault is planted where a slip would be made: in an estimator, in a stage, or in the files. `python -m
faults.catalogue` (with `tests` on the path) writes the page docs/faults.md.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import functools
import inspect
import math
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from entropy_probe import loading
from entropy_probe.estimators import (
    adam,
    advantages,
    baselines,
    importance,
    performance_difference,
    policy,
    slope,
    update_weights,
    ustat,
)
from entropy_probe.model import forward, overrides, precision
from entropy_probe.model.capture import Capture
from entropy_probe.model.checkpoint.moments import adam as optimizer
from entropy_probe.model.checkpoint.weights import adapter
from entropy_probe.model.forward import BoundModel
from entropy_probe.model.output_layer import OutputLayer
from entropy_probe.model.prompt_cache import ReadPrompts
from entropy_probe.model.registry import Registry
from entropy_probe.stages import (
    batches,
    derivatives,
    entropy_change,
    first_order,
    scores,
    shared_prompts,
    slopes,
    update,
)
from entropy_probe.stages.gradients import products, unit_gradients
from entropy_probe.stages.responses import drawing, rollouts, sampled_rollouts, sampling, steps, trainers_rollouts
from entropy_probe.stages.witnesses import projections, real_step, torch_step
from faults.subjects import SUBJECTS

Patch = pytest.MonkeyPatch


@dataclass(frozen=True)
class Fault:
    """`plant` damages live code; then the criteria `red` fail, those in `also` may, and no other one does.

    A fault with `refused` ends the run with an error of that wording instead. Where no verdict can be stronger, those
    in `inconclusive` are. A fault without any of these is seen by no criterion.
    """

    name: str
    wrong: str
    plant: Callable[[Patch], None]
    subject: str
    config: dict[str, Any]
    red: frozenset[str]
    also: frozenset[str]
    inconclusive: frozenset[str]
    refused: str

    @property
    def seen(self) -> bool:
        return bool(self.red or self.inconclusive or self.refused)


FAULTS: dict[str, Fault] = {}


def fault(
    on: str, red: str = "", *, also: str = "", inconclusive: str = "", refused: str = "", **config: Any
) -> Callable[[Any], Any]:
    """Enter a function into the catalogue: its name, its docstring, and what reveals it."""

    def enter(plant: Callable[[Patch], None]) -> Callable[[Patch], None]:
        wrong = " ".join((inspect.getdoc(plant) or "").split())
        sets = (frozenset(names.split()) for names in (red, also, inconclusive))
        FAULTS[plant.__name__] = Fault(plant.__name__, wrong, plant, on, config, *sets, refused)
        return plant

    return enter


def everywhere(patch: Patch, original: Any, replacement: Any) -> None:
    """Replace a function under every name that a module of the library knows it by."""
    for name, module in list(sys.modules.items()):
        if name.startswith("entropy_probe.") or name == "entropy_probe":
            for key, value in list(vars(module).items()):
                if value is original:
                    patch.setattr(module, key, replacement)


def then(patch: Patch, original: Any, change: Callable[[Any], Any]) -> None:
    """Change what a function returns, wherever it is called."""
    everywhere(patch, original, functools.wraps(original)(lambda *a, **k: change(original(*a, **k))))


def with_fields(value: Any, **changes: Callable[[Any], Any]) -> Any:
    """A dataclass with some fields changed by functions."""
    return dataclasses.replace(value, **{name: change(getattr(value, name)) for name, change in changes.items()})


def scaled(by: float) -> Callable[[Any], Any]:
    def change(value: Any) -> Any:
        return {n: by * t for n, t in value.items()} if isinstance(value, dict) else by * value

    return change


# --- the gradients X and Y


@fault("llama", "gradient_witness projections_agree slope_identity")
def bracket_not_detached(patch: Patch) -> None:
    """The gradient also flows through the bracket S − S̄, so X is twice what it should be."""
    then(patch, unit_gradients.unit_gradients, lambda units: with_fields(units, x=scaled(2.0)))


@fault("llama", "gradient_witness slope_identity")
def bracket_not_detached_in_the_weights(patch: Patch) -> None:
    """The same factor 2 in X comes from the weights with which ∇S enters X. The fast pass computes what it is told."""
    then(patch, advantages.x_weights, scaled(2.0))


@fault("llama", "gradient_witness slope_identity")
def no_leave_one_out_baseline(patch: Patch) -> None:
    """X_n = mean S∇S without a baseline. It is unbiased, and its variance is larger."""
    everywhere(patch, advantages.x_weights, lambda seq_logp, present=None: seq_logp / seq_logp.shape[1])


@fault("llama", "gradient_witness slope_identity")
def baseline_holds_the_response_itself(patch: Patch) -> None:
    """S̄ is over all G responses, including the response itself. X shrinks by (G−1)/G."""
    everywhere(patch, advantages.x_weights, lambda s, present=None: (s - s.mean(1, keepdim=True)) / s.shape[1])


@fault("llama", "gradient_witness slope_identity")
def baseline_across_prompts(patch: Patch) -> None:
    """S̄ is over the responses of all prompts. Apart from the own response it is unbiased, but prompts are no longer
    independent."""
    everywhere(patch, advantages.x_weights, lambda s, present=None: (s - (s.sum() - s) / (s.numel() - 1)) / s.shape[1])


@fault("llama", "gradient_witness")
def advantages_not_centred(patch: Patch) -> None:
    """The raw rewards are used as advantages."""
    everywhere(patch, update_weights.advantages, lambda recipe, batch: batch.rewards)


@fault("llama", "gradient_witness")
def loss_over_own_length(patch: Patch) -> None:
    """Each response is divided by its own length, although the configured loss divides by the prompt's longest."""
    original = update_weights.normaliser
    own = {"normaliser": "sequence_mean"}
    everywhere(patch, original, lambda recipe, batch: original(recipe.model_copy(update=own), batch))


@fault("llama", "gradient_witness projections_agree slope_identity")
def gradients_of_another_row(patch: Patch) -> None:
    """A layer's inputs are combined with the output gradients of the next row's tokens."""
    original = Capture.add_outer
    patch.setattr(Capture, "add_outer", lambda c, w, left, right, rows: original(c, w, left, right.roll(1, 0), rows))


def _rolled(side: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: value.roll(1, 0) for name, value in side.items()}


@fault("llama", "gradient_witness projections_agree slope_identity", first_order={"mode": "block", "num_blocks": 3})
def blocks_of_x_mixed_up(patch: Patch) -> None:
    """A block holds the X of another block's prompts."""
    then(patch, unit_gradients.unit_gradients, lambda units: with_fields(units, x=_rolled))


@fault("llama", "gradient_witness", first_order={"mode": "block", "num_blocks": 3})
def blocks_of_y_mixed_up(patch: Patch) -> None:
    """A block holds the Y of another block's prompts."""
    then(patch, unit_gradients.unit_gradients, lambda units: with_fields(units, y=_rolled))


@fault("llama", "x_coverage y_coverage curvature_witness change_identity taylor_order", also="sweep_identity")
def part_of_the_forward_detached(patch: Patch) -> None:
    """An MLP's output is detached. Its parameters move the entropy, but their gradients are missing."""

    def detached(checkpoint: Any) -> Any:
        layer = checkpoint.model.model.layers[0].mlp
        layer.register_forward_hook(lambda module, inputs, output: output.detach())
        return checkpoint

    then(patch, loading.load_checkpoint, detached)


@fault("llama", "gradient_witness", first_order={"estimator": "rb", "baseline": "hk"})
def later_entropy_one_step_late(patch: Patch) -> None:
    """The coefficients are R_{>t+1} in place of R_{>t}."""
    then(patch, baselines.rb_coefficients, lambda c: torch.cat([c[..., 1:], torch.zeros_like(c[..., :1])], -1))


@fault("llama", "gradient_witness", first_order={"estimator": "rb", "baseline": "hk_ema"})
def ema_holds_the_prompt_itself(patch: Patch) -> None:
    """The mean of R_{>t} that serves as a baseline includes the prompt's own responses."""

    def of_all(later: Tensor, present: Tensor, among: Any) -> Tensor:
        return (later.sum((0, 1)) / present.double().sum((0, 1)).clamp(min=1.0))[None, None]

    patch.setattr(baselines, "_mean_of_others", of_all)


# --- the preconditioner


@fault(
    "llama", "projections_agree", also="slope_identity delta_h1_identity se_formula two_batch_identity u_cross_identity"
)
def preconditioner_twice(patch: Patch) -> None:
    """P is applied on both sides of X̄ᵀPȲ."""
    original = products._gram
    patch.setattr(products, "_gram", lambda a, b, p: original(a, b, None if p is None else p.square()))


@fault(
    "llama", "projections_agree", also="slope_identity delta_h1_identity se_formula two_batch_identity u_cross_identity"
)
def preconditioner_on_neither_side(patch: Patch) -> None:
    """X̄ᵀȲ is used in place of X̄ᵀPȲ."""
    original = products._gram
    patch.setattr(products, "_gram", lambda a, b, p: original(a, b, None))


def _preconditioner(patch: Patch, change: Callable[[Any, Tensor, float, float, float], Tensor]) -> None:
    original = adam.preconditioner
    everywhere(patch, original, functools.partial(change, original))


@fault("llama", "preconditioner_witness")
def preconditioner_without_bias_correction(patch: Patch) -> None:
    """P = 1/(√exp_avg_sq + ε)."""
    _preconditioner(patch, lambda f, second, step, beta2, eps: f(second, math.inf, beta2, eps))


@fault("llama", "preconditioner_witness")
def preconditioner_of_the_wrong_step(patch: Patch) -> None:
    """The bias correction of P counts one step too many."""
    _preconditioner(patch, lambda f, second, step, beta2, eps: f(second, step + 1, beta2, eps))


@fault("llama", "preconditioner_witness")
def epsilon_inside_the_root(patch: Patch) -> None:
    """P = 1/√(v̂ + ε)."""
    _preconditioner(patch, lambda f, s, step, beta2, eps: (s.double() / (1 - beta2**step) + eps).rsqrt())


@fault("amsgrad", "preconditioner_witness")
def preconditioner_without_the_maximum(patch: Patch) -> None:
    """P of an AMSGrad checkpoint is made from exp_avg_sq and not from its running maximum."""
    original = update.adam_preconditioner

    def plain(states: Any, *world: Any) -> Any:
        return original({name: dataclasses.replace(state, amsgrad=False) for name, state in states.items()}, *world)

    everywhere(patch, original, plain)


@fault("llama", "preconditioner_witness")
def preconditioner_gated_on_gradients(patch: Patch) -> None:
    """The second moment is read only if a parameter has a .grad. Between two steps none has one, so P = 1."""
    then(patch, update.adam_preconditioner, lambda p: {name: torch.ones_like(value) for name, value in p.items()})


@fault(
    "llama",
    "preconditioner_finite preconditioner_witness",
    also="projections_agree se_agreement se_identity u_cross_identity delta_h1_identity se_formula two_batch_identity",
)
def epsilon_of_zero(patch: Patch) -> None:
    """ε counts as 0, and the embedding of a token that was never seen has no second moment."""
    _preconditioner(patch, lambda f, second, step, beta2, eps: f(second, step, beta2, 0.0))


# --- the update direction


def _direction(patch: Patch, change: Callable[..., Any]) -> None:
    """`change(original, parameter, ascent, exp_avg, exp_avg_sq, maximum, step, hyper)` in place of `adam_direction`."""
    original = adam.adam_direction
    everywhere(patch, original, functools.partial(change, original))


@fault("llama", "optimizer_step_cosine optimizer_step_norm real_step")
def v_without_bias_correction(patch: Patch) -> None:
    """v is made from the moments as they are, without division by 1 − β^t."""
    _direction(patch, lambda f, *a: f(*a[:5], math.inf, a[6]))


@fault("llama", "optimizer_step_cosine optimizer_step_norm real_step")
def v_of_the_wrong_step(patch: Patch) -> None:
    """The bias corrections are those of the last step and not of the next one."""
    _direction(patch, lambda f, *a: f(*a[:5], a[5] - 1, a[6]))


@fault("llama", "optimizer_step_cosine optimizer_step_norm real_step")
def v_with_epsilon_inside_the_root(patch: Patch) -> None:
    """√(ŝ + ε) is used in place of √ŝ + ε."""

    def inside(f: Any, p: Any, y: Any, m: Any, s: Any, maximum: Any, step: float, h: Any) -> Any:
        more = h.eps * (1 - h.beta2 ** (step + 1)) / h.beta2
        return f(p, y, m, s.double() + more, maximum, step, dataclasses.replace(h, eps=0.0))

    _direction(patch, inside)


def _hyper(patch: Patch, **changes: Any) -> None:
    _direction(patch, lambda f, *a: f(*a[:6], dataclasses.replace(a[6], **changes)))


@fault("llama", "optimizer_step_cosine optimizer_step_norm real_step")
def weight_decay_dropped(patch: Patch) -> None:
    """v lacks −weight_decay·θ."""
    _hyper(patch, weight_decay=0.0)


@fault("llama", "optimizer_step_cosine optimizer_step_norm real_step")
def momentum_dropped(patch: Patch) -> None:
    """v is made only from the gradient: exp_avg counts as zero."""
    _direction(patch, lambda f, *a: f(a[0], a[1], torch.zeros_like(a[2]), *a[3:]))


@fault("llama", "optimizer_step_norm real_step")
def v_too_long(patch: Patch) -> None:
    """v is too long by one part in a thousand."""
    _direction(patch, lambda f, *a: tuple(1.001 * part for part in f(*a)))


@fault("llama", "optimizer_step_cosine real_step")
def v_uphill(patch: Patch) -> None:
    """The sign of v is wrong."""
    _direction(patch, lambda f, *a: tuple(-part for part in f(*a)))


@fault("llama", "optimizer_step_cosine optimizer_step_norm real_step")
def v_from_the_gradient_of_the_objective(patch: Patch) -> None:
    """g = Ȳ in place of −Ȳ. Only the part of v that comes from the new gradient has the wrong sign."""
    _direction(patch, lambda f, *a: (f(a[0], -a[1], *a[2:])[0], -f(*a)[1]))


@fault("llama", "optimizer_step_cosine optimizer_step_norm real_step")
def default_hyper_parameters(patch: Patch) -> None:
    """torch's default β and ε are used in place of those of the group."""
    _hyper(patch, beta1=0.9, beta2=0.999, eps=1e-8)


@fault("llama", "optimizer_step_cosine optimizer_step_norm real_step")
def hyper_parameters_of_the_first_group(patch: Patch) -> None:
    """The first group's decay is used for every parameter, including the norms."""
    _hyper(patch, weight_decay=0.1)


@fault("two lrs", "optimizer_step_cosine optimizer_step_norm preconditioner_witness real_step")
def one_learning_rate_for_all_groups(patch: Patch) -> None:
    """Every group steps with the largest learning rate."""
    everywhere(patch, update.lr_shares, lambda states: dict.fromkeys(states, 1.0))


@fault("amsgrad", "optimizer_step_cosine optimizer_step_norm real_step")
def amsgrad_ignored(patch: Patch) -> None:
    """v is made from the second moment and not from its running maximum."""
    _hyper(patch, amsgrad=False)


@fault("coupled", "optimizer_step_cosine optimizer_step_norm real_step")
def coupled_decay_taken_for_decoupled(patch: Patch) -> None:
    """Plain Adam's decay is subtracted from θ, although it should go through the moments."""
    _hyper(patch, decoupled=True)


@fault("llama", "real_step", update={"max_grad_norm": 0.01})
def clipping_forgotten(patch: Patch) -> None:
    """The gradient is not clipped, although the configuration says so."""
    original = update.compute_update_vector_adamw
    everywhere(
        patch, original, lambda registry, states, ascent, limit, *a: original(registry, states, ascent, None, *a)
    )


@fault("lora", refused="the parameter is frozen")
def frozen_weight_in_v(patch: Patch) -> None:
    """v includes a weight of the base model, which the optimizer does not train."""

    def with_base(direction: Any) -> Any:
        extra = torch.ones(67, 24, dtype=torch.float64)
        return with_fields(direction, v=lambda v: {**v, "base_model.model.lm_head.weight": extra})

    then(patch, update.compute_update_vector_adamw, with_base)


@fault("qwen2", "moments_match")
def state_of_another_parameter(patch: Patch) -> None:
    """Two parameters of one shape exchange their Adam moments when the file is read."""

    def swapped(states: Any) -> Any:
        one, other = "model.layers.0.self_attn.q_proj.weight", "model.layers.0.self_attn.o_proj.weight"
        return {**states, one: states[other], other: states[one]}

    patch.setattr(optimizer, "map_adam_state", _after(optimizer.map_adam_state, swapped))


def _after(original: Any, change: Callable[[Any], Any]) -> Any:
    return lambda *a, **k: change(original(*a, **k))


@fault("llama", "optimizer_as_saved")
def default_hyper_parameters_when_read(patch: Patch) -> None:
    """The groups' β, ε and decay are not read from the file. torch's defaults are used."""

    def default(states: Any) -> Any:
        values = {"betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 0.01}
        return {name: dataclasses.replace(state, **values) for name, state in states.items()}

    patch.setattr(optimizer, "map_adam_state", _after(optimizer.map_adam_state, default))


@fault("llama", "optimizer_as_saved")
def parameter_lost_when_read(patch: Patch) -> None:
    """A state that is in the file is not mapped. The parameter counts as frozen, and v does not move it."""

    def lost(states: Any) -> Any:
        return {name: state for name, state in states.items() if "down_proj" not in name}

    patch.setattr(optimizer, "map_adam_state", _after(optimizer.map_adam_state, lost))


# --- the statistics


def _moments(patch: Patch, change: Callable[[Any, Tensor], dict[str, Any]]) -> None:
    original = ustat.cross_moments

    def changed(gram: Tensor) -> Any:
        moments = original(gram)
        return dataclasses.replace(moments, **change(moments, gram.double()))

    everywhere(patch, original, changed)


@fault("llama", "u_cross_identity", also="delta_h1_identity se_formula")
def factor_of_u_dropped(patch: Patch) -> None:
    """U_cross lacks U/(U−1): the sum of the off-diagonal entries is divided by U²."""
    _moments(patch, lambda m, k: {"u_cross": m.u_cross * (m.num_units - 1) / m.num_units})


@fault("llama", "u_cross_identity", also="delta_h1_identity se_formula")
def diagonal_kept(patch: Patch) -> None:
    """X̄ᵀPȲ, which includes each prompt's own X_nᵀPY_n, is used as U_cross."""
    _moments(patch, lambda m, k: {"u_cross": m.bars_dot})


@fault("llama", "u_cross_identity se_identity se_formula", also="se_agreement delta_h1_identity")
def diagonal_kept_in_the_row_means(patch: Patch) -> None:
    """The mean over the other prompts includes the prompt itself."""
    _moments(patch, lambda m, k: {"row_means": 0.5 * (k.mean(1) + k.mean(0))})


@fault("llama", "se_identity se_formula", also="delta_h1_identity u_cross_identity")
def row_means_of_one_side(patch: Patch) -> None:
    """r_n is made only from X_nᵀP·Ȳ, without Y_nᵀP·X̄. The mean is right, and half of the spread is missing."""
    _moments(patch, lambda m, k: {"row_means": (k.sum(1) - k.diagonal()) / (m.num_units - 1)})


def _statistic(patch: Patch, change: Callable[[Any, int], dict[str, Any]]) -> None:
    original = ustat.u_statistic

    def changed(moments: Any, gram: Tensor) -> Any:
        statistic = original(moments, gram)
        return statistic.model_copy(update=change(statistic, moments.num_units))

    everywhere(patch, original, changed)


@fault("llama", "se_identity se_formula", also="delta_h1_identity")
def plugin_with_a_spurious_factor(patch: Patch) -> None:
    """ζ̂₁ has U/(4(U−1)) in place of 1/(U−1). This is invisible at U = 4, and 5.7 times too large at 128."""
    _statistic(
        patch, lambda s, u: {"se_plugin": s.se_plugin * math.sqrt(u / 4), "zeta1_plugin": s.zeta1_plugin * u / 4}
    )


@fault("llama", "se_identity se_formula")
def jackknife_over_one_unit_too_many(patch: Patch) -> None:
    """U_{−u} is divided by U−1 in place of U−2."""
    _statistic(patch, lambda s, u: {"se_jackknife": s.se_jackknife * (u - 2) / (u - 1)})


@fault("llama", "se_identity se_agreement se_formula", also="delta_h1_identity")
def standard_error_of_a_sum(patch: Patch) -> None:
    """√(4ζ̂₁·U), the standard error of a sum, is used for the mean."""
    _statistic(patch, lambda s, u: {"se_plugin": s.se_plugin * u})


@fault("llama", "delta_h1_identity")
def delta_h1_with_the_wrong_sign(patch: Patch) -> None:
    """δH₁ = lr·U_cross."""
    then(patch, first_order.first_order_section, lambda f: f.model_copy(update={"delta_h1": -f.delta_h1}))


@fault("llama", "two_batch_identity")
def interaction_counted_twice(patch: Patch) -> None:
    """The standard error across two batches includes the interaction of prompts in both of its terms."""
    from entropy_probe.estimators import two_batch

    def more(moments: Any) -> Any:
        return with_fields(moments, total_se=scaled(math.sqrt(2)))

    then(patch, two_batch.two_batch_moments, more)


@fault("llama", "se_by_prompt")
def responses_taken_for_independent(patch: Patch) -> None:
    """The standard error of ΔĤ is over N responses, as if those of one prompt were independent."""
    everywhere(patch, importance.cluster_se, lambda phi: float(phi.std()) / math.sqrt(phi.numel()))


@fault("llama", "se_by_prompt")
def entropy_with_the_error_of_one_prompt(patch: Patch) -> None:
    """The standard error of the entropy is the spread of the prompts' means, not divided by √B."""
    everywhere(patch, importance.mean_and_se, lambda v: (float(v.mean()), float(v.double().mean(1).std())))


# --- the slopes and the curvature


@fault("llama", "change_identity", also="sweep_identity")
def per_token_slope_without_its_denominator(patch: Patch) -> None:
    """The slope per token is Σ(R·D_vS + D_vR)/ΣT. It forgets that the mean length changes with the weights too."""

    def without(rb_sum: Tensor, lengths: Tensor, d_seq_logp: Tensor, d_rb_sum: Tensor) -> Any:
        terms = (rb_sum * d_seq_logp + d_rb_sum) * lengths.numel() / lengths.sum()
        return slope.PromptMean(terms.mean(1))

    everywhere(patch, slope.per_token_slope, without)


@fault("gpt2", "curvature_witness")
def nested_jvp(patch: Patch) -> None:
    """D²_v is a JVP within a JVP. In a layer norm torch computes it wrongly without an error."""
    original = slopes.slopes_along

    def nested(bound: BoundModel, float64: BoundModel, share: Any, s: Any, v: Any, config: Any, *rest: Any) -> Any:
        along, batch = original(bound, float64, share, s, v, config, *rest), share.own
        theta = float64.registry.parameters
        rows = torch.arange(len(batch.gen_lens))

        def sums(eta: Tensor) -> tuple[Tensor, Tensor]:
            override = {n: theta[n].detach() + eta * d.double() for n, d in v.items()}
            scored = scores.score_rows(float64, batch, rows, config, override=override, true_derivative=True)
            return scored.logp.sum(-1), scored.entropy.sum(-1)

        zero, one = torch.zeros((), dtype=torch.float64), torch.ones((), dtype=torch.float64)
        first = lambda eta: torch.func.jvp(sums, (eta,), (one,))[1]  # noqa: E731
        second = torch.func.jvp(first, (zero,), (one,))[1]
        d2_seq_logp, d2_rb_sum = (batch.per_prompt(d.detach()) for d in second)
        return dataclasses.replace(along, d2_seq_logp=d2_seq_logp, d2_rb_sum=d2_rb_sum)

    everywhere(patch, original, nested)


@fault("sampled", "curvature_identity", first_order={"lr": 3e-3})
def curvature_without_the_cross_term(patch: Patch) -> None:
    """vᵀ∇²Hv lacks 2·D_vH_t times D_v of the tokens before."""
    original = performance_difference.expansion

    def without(d_logp: Tensor, d_entropy: Tensor, *rest: Tensor) -> Any:
        found = original(d_logp, d_entropy, *rest)
        found.second[0] -= (2 * (d_logp.cumsum(-1) - d_logp) * d_entropy).sum(-1)
        return found

    everywhere(patch, original, without)


def _with_terms(patch: Patch, of_terms: Callable[[Tensor, Tensor, Tensor], Tensor]) -> None:
    """Change terms made of log ρ_t, H_t⁺ − H_t and c [2, …]."""

    def terms(logp: Tensor, entropy: Tensor, logp_after: Tensor, entropy_after: Tensor, c: Tensor) -> Tensor:
        moved, change = logp_after.double() - logp.double(), entropy_after.double() - entropy.double()
        return of_terms(moved, torch.stack([change, torch.zeros_like(change)]), c).sum(-1)

    everywhere(patch, performance_difference.change_terms, terms)


@fault("sampled", "figures_recomputed curvature_identity", first_order={"lr": 3e-3})
def change_by_tokens_weighs_with_the_own_token(patch: Patch) -> None:
    """The weight of a step includes its own token: w_{≤t} in place of w_{<t}."""
    _with_terms(patch, lambda d, h, c: d.cumsum(-1).exp() * (h + torch.expm1(d) * c))


@fault("sampled", "figures_recomputed curvature_identity", first_order={"lr": 3e-3})
def change_by_tokens_with_the_prefix_of_the_step_before(patch: Patch) -> None:
    """The weight of a step lacks the token just before it."""
    _with_terms(patch, lambda d, h, c: (d.cumsum(-1) - d - d.roll(1, -1)).exp() * (h + torch.expm1(d) * c))


@fault("sampled", "sweep_identity figures_recomputed", also="prediction")
def change_by_tokens_counts_its_own_step(patch: Patch) -> None:
    """Only in the change, R_{≥t} takes the place of R_{>t}: the entropy of the step is counted twice."""

    def with_own(logp: Tensor, entropy: Tensor, logp_after: Tensor, entropy_after: Tensor, c: Tensor) -> Tensor:
        return original(logp, entropy, logp_after, entropy_after, c + torch.stack([entropy, torch.zeros_like(entropy)]))

    original = performance_difference.change_terms
    everywhere(patch, original, with_own)


@fault("sampled", "figures_recomputed")
def group_baseline_holds_the_response_itself(patch: Patch) -> None:
    """The mean of the prompt's responses that serves as a baseline includes the own one, and is not shrunk."""
    original = baselines.rb_coefficients

    def with_own(entropy: Tensor, lengths: Tensor, baseline: Any, *rest: Any) -> Tensor:
        if baseline != "hk_group":
            return original(entropy, lengths, baseline, *rest)
        later = original(entropy, lengths, "hk")
        present = (torch.arange(later.shape[-1]) < lengths[..., None]).double()
        return later - present * later.sum(1, keepdim=True) / present.sum(1, keepdim=True).clamp(min=1)

    everywhere(patch, original, with_own)


@fault(
    "sampled",
    "sweep_identity figures_recomputed",
    also="zero_step_change change_estimators_agree prediction curvature_identity",
)
def change_by_tokens_of_another_response(patch: Patch) -> None:
    """What a response says about the change is combined with its neighbour's entropies at θ+ηv."""

    def shifted(logp: Tensor, entropy: Tensor, logp_after: Tensor, entropy_after: Tensor, c: Tensor) -> Tensor:
        return original(logp, entropy, logp_after, entropy_after.roll(1, 0), c)

    original = performance_difference.change_terms
    everywhere(patch, original, shifted)


@fault("llama", "slope_identity", first_order={"estimator": "rb"})
def slope_without_the_entropy_of_the_step(patch: Patch) -> None:
    """The Rao-Blackwell slope lacks Σ_t D_vH_t."""
    original = slope.rb_slope
    everywhere(patch, original, lambda c, d_logp, d_entropy: original(c, d_logp, torch.zeros_like(d_entropy)))


@fault("dora", "change_identity", also="sweep_identity curvature_witness taylor_order")
def detached_norm_taken_for_the_derivative(patch: Patch) -> None:
    """peft detaches DoRA's weight norm, and the result is taken for the derivative of the function."""
    patch.setattr(BoundModel, "autograd_is_derivative", True)


@fault(
    "llama", "projections_agree change_identity", also="curvature_witness slope_identity sweep_identity taylor_order"
)
def derivatives_all_zero(patch: Patch) -> None:
    """A forward-mode pass loses its tangents and gives D_v = 0 everywhere."""
    then(
        patch,
        derivatives.directional_derivatives,
        lambda d: with_fields(d, d_logp=torch.zeros_like, d_entropy=torch.zeros_like),
    )


@fault("llama", "projections_agree")
def alpha_trick_lost(patch: Patch) -> None:
    """The α-trick gives up, as where an operation lacks the derivative that it needs."""

    def lacking(*_: Any) -> Tensor:
        raise NotImplementedError

    patch.setattr(projections, "by_alpha", lacking)


@fault("llama", "slope_identity", also="projections_agree")
def rounding_without_end(patch: Patch) -> None:
    """What rounding leaves of D_v is divided by nothing, so that it hides everything."""
    then(patch, slopes.derived, lambda d: with_fields(d, at_theta=_with_rounding(math.inf)))


@fault("llama", "slope_identity", also="projections_agree")
def rounding_forgotten(patch: Patch) -> None:
    """Rounding is said to leave nothing of D_v."""
    then(patch, slopes.derived, lambda d: with_fields(d, at_theta=_with_rounding(0.0)))


def _with_rounding(value: float) -> Callable[[Any], Any]:
    return lambda at_theta: with_fields(at_theta, rounding=lambda r: torch.full_like(r, value))


# --- the realised change


@fault("llama", "change_identity taylor_order sweep_identity")
def log_weights_reversed(patch: Patch) -> None:
    """w = p(θ)/p(θ+ηv)."""
    original = importance.snis_weights
    everywhere(patch, original, lambda log_weights, clip=None: original(-log_weights, clip))


@fault("nucleus", "change_identity taylor_order")
def weights_from_p_in_place_of_q(patch: Patch) -> None:
    """The denominator of the weights is π, although the responses were sampled from its nucleus."""
    original = entropy_change.change_at

    def from_p(before: Any, *rest: Any) -> Any:
        return original(dataclasses.replace(before, token_logq=before.token_logp), *rest)

    everywhere(patch, original, from_p)


@fault("llama", "change_identity taylor_order sweep_identity", also="se_by_prompt")
def weights_not_self_normalised(patch: Patch) -> None:
    """Σwf/N is used in place of Σwf/Σw."""
    original = importance.snis_weights

    def plain(log_weights: Tensor, clip: float | None = None) -> Any:
        return dataclasses.replace(original(log_weights, clip), normalised=log_weights.exp() / log_weights.numel())

    everywhere(patch, original, plain)


@fault("llama", "zero_step_ess")
def ess_of_weights_that_are_not_normalised(patch: Patch) -> None:
    """ESS = 1/Σw², although the weights do not add up to 1."""
    original = importance.snis_weights

    def other(log_weights: Tensor, clip: float | None = None) -> Any:
        return dataclasses.replace(original(log_weights, clip), ess=1.0 / float((2 * log_weights).exp().sum()))

    everywhere(patch, original, other)


@fault("llama", "zero_step_change zero_step_ess")
def stale_scores(patch: Patch) -> None:
    """The scores at θ were made before θ changed."""

    def stale(s: Any) -> Any:
        read = ("token_logp", "token_logq", "rb_entropy", "rb_entropy_q")
        return dataclasses.replace(s, **{name: getattr(s, name) * 1.001 for name in read})

    original = entropy_change.sweep
    everywhere(patch, original, lambda bound, batch, s, *a, **k: original(bound, batch, stale(s), *a, **k))


@fault(
    "llama",
    "zero_step_change change_identity delta_h_slope",
    also="se_by_prompt taylor_order real_step virtual_step prediction",
)
def change_that_is_no_number(patch: Patch) -> None:
    """ΔĤ is NaN."""
    then(patch, importance.entropy_change, lambda c: dataclasses.replace(c, value=math.nan))


@fault("llama", "change_identity sweep_identity", also="se_by_prompt")
def change_that_is_always_zero(patch: Patch) -> None:
    """ΔĤ is 0 at every η, which is right only at η = 0."""
    then(patch, importance.entropy_change, lambda c: dataclasses.replace(c, value=0.0, influence=0.0 * c.influence))


# --- θ + ηv


def _stepped(patch: Patch, change: Callable[[Any, dict[str, Tensor], float], dict[str, Tensor]]) -> None:
    """`change(registry, θ + ηv, η)` in place of θ + ηv, wherever it is built."""
    original = overrides.theta_plus_eta_v
    everywhere(
        patch, original, lambda registry, v, eta, dtype: change(registry, original(registry, v, eta, dtype), eta)
    )


def _rounded(dtype: torch.dtype) -> Callable[[Any, dict[str, Tensor], float], dict[str, Tensor]]:
    return lambda registry, mapping, eta: {name: t.to(dtype).to(t.dtype) for name, t in mapping.items()}


@fault("llama", "sweep_identity")
def realised_at_the_opposite_step(patch: Patch) -> None:
    """ΔH is measured at θ − ηv."""
    original = entropy_change.moved
    patch.setattr(entropy_change, "moved", lambda bound, v, eta, world: original(bound, v, -eta, world))


@fault(
    "llama",
    "zero_check zero_step_change zero_step_ess param_scaling drawn_scaling drawn_zero_check",
    also="change_identity curvature_witness delta_h_slope logit_scaling real_step taylor_order",
)
def not_theta_at_zero(patch: Patch) -> None:
    """The mapping at η = 0 differs from θ by one part in a million."""
    _stepped(patch, lambda registry, mapping, eta: scaled(1 + 1e-6)(mapping))


@fault(
    "llama",
    "zero_check zero_step_change zero_step_ess param_scaling logit_scaling drawn_scaling drawn_zero_check",
    also="change_identity curvature_witness delta_h_slope logit_slope projections_agree real_step slope_identity "
    "sweep_identity taylor_order",
)
def added_in_bfloat16(patch: Patch) -> None:
    """θ + ηv is rounded to bf16."""
    _stepped(patch, _rounded(torch.bfloat16))


@fault(
    "llama",
    "param_scaling logit_scaling logit_slope drawn_scaling",
    also="change_identity curvature_witness delta_h_slope real_step taylor_order",
)
def added_in_float32(patch: Patch) -> None:
    """θ + ηv is rounded to float32 in the float64 checks."""
    _stepped(patch, _rounded(torch.float32))


@fault(
    "llama",
    "param_scaling logit_scaling real_step",
    also="curvature_witness projections_agree slope_identity change_identity sweep_identity",
)
def nothing_overridden(patch: Patch) -> None:
    """θ + ηv is θ, and no change looks like a perfect one."""
    _stepped(
        patch,
        lambda registry, mapping, eta: {name: registry.parameters[name].detach().to(t) for name, t in mapping.items()},
    )


# steps well above what float32 leaves of a change, on any processor
@fault(
    "lora", "real_step sweep_identity", also="prediction live_model_unmodified virtual_step",
    true_delta_h={"etas": [-1e-4, 1e-4]},
)  # fmt: skip
def base_weights_moved(patch: Patch) -> None:
    """A weight of the frozen base model moves with η at every measurement of ΔH."""

    def moved(registry: Registry, mapping: dict[str, Tensor], eta: float) -> dict[str, Tensor]:
        name = "base_model.model.lm_head.weight"
        base = registry.parameters[name].detach()
        return {**mapping, name: (base + eta * base).to(next(iter(mapping.values())))}

    original, of_sweep = overrides.theta_plus_eta_v, entropy_change.moved
    patch.setattr(real_step, "theta_plus_eta_v", lambda g, v, eta, dtype: moved(g, original(g, v, eta, dtype), eta))
    patch.setattr(
        entropy_change, "moved", lambda bound, v, eta, world: moved(bound.registry, of_sweep(bound, v, eta, world), eta)
    )


@fault("qwen2", "virtual_step real_step", also="projections_agree slope_identity curvature_witness change_identity")
def tied_weights_updated_once_of_twice(patch: Patch) -> None:
    """The override reaches the embeddings, but not the output layer that is tied to them."""
    original = OutputLayer.names_in

    def by_name(self: Any, tensors: Any) -> dict[str, str]:
        return {name: own for name, own in original(self, tensors).items() if name.endswith(own)}

    patch.setattr(OutputLayer, "names_in", by_name)


@fault("llama", "buffers_overridden")
def buffers_overridden(patch: Patch) -> None:
    """Each pass uses its own copy of the buffers."""
    original = scores.read_rows

    def read_rows(bound: BoundModel, *a: Any, override: Any = None, **k: Any) -> Any:
        buffers = {name: b.clone() for name, b in bound.module.named_buffers()}
        return original(bound, *a, override={**(override or {}), **buffers}, **k)

    everywhere(patch, original, read_rows)


def _after_sweep(patch: Patch, size: float) -> None:
    original = entropy_change.sweep

    def sweep(bound: BoundModel, *a: Any, **k: Any) -> Any:
        result = original(bound, *a, **k)
        with torch.no_grad():
            next(bound.module.parameters()).view(-1)[0].add_(size)
        return result

    everywhere(patch, original, sweep)


@fault("llama", "live_model_unmodified")
def live_model_changed(patch: Patch) -> None:
    """One weight of the user's model is not restored."""
    _after_sweep(patch, 1e-4)


_FLOAT64 = {"dtype": "float64"}


@fault("llama", "live_model_unmodified", precision=_FLOAT64)
def own_copy_changed(patch: Patch) -> None:
    """One weight of the float64 copy is not restored."""
    _after_sweep(patch, 1e-9)


@fault("llama", refused="no parameter gets a gradient")
def registry_of_another_module(patch: Patch) -> None:
    """The names belong to the parameters of a copy of the module that runs."""

    def of_a_copy(bound: BoundModel) -> BoundModel:
        bound.registry.__dict__["parameters"] = dict(copy.deepcopy(bound.module).named_parameters())
        return bound

    then(patch, forward.bind, of_a_copy)


@fault("llama", "virtual_step", also="real_step")
def step_not_undone(patch: Patch) -> None:
    """θ + ηv was written into the copy, and one tensor is not restored."""
    original = real_step.virtually_stepped

    @contextlib.contextmanager
    def stepped(bound: BoundModel, v: dict[str, Tensor], eta: float, theta: Any = None) -> Any:
        with original(bound, v, eta, theta):
            yield
        name = next(iter(v))
        bound.registry.parameters[name].data.add_(v[name], alpha=eta)

    everywhere(patch, original, stepped)


# --- the forward


@fault(
    "llama",
    "batch_invariance",
    also="change_identity chunk_invariance curvature_witness gradient_witness padding_invariance "
    "projections_agree real_step sampler_parity slope_identity taylor_order x_coverage y_coverage",
)
def rows_normalised_together(patch: Patch) -> None:
    """A norm computes its scale from all rows of the batch."""

    def together(checkpoint: Any) -> Any:
        norm = checkpoint.model.model.layers[0].input_layernorm
        norm.register_forward_hook(lambda module, inputs, output: output / output.detach().square().mean().sqrt())
        return checkpoint

    then(patch, loading.load_checkpoint, together)


@fault(
    "gpt2",
    "zero_check zero_step_change zero_step_ess logit_scaling batch_invariance sampler_parity drawn_scaling "
    "drawn_zero_check",
    also="change_identity chunk_invariance curvature_witness delta_h_slope gradient_witness logit_slope "
    "padding_invariance precision_invariance projections_agree real_step slope_identity taylor_order virtual_step",
)
def dropout_left_on(patch: Patch) -> None:
    """The model runs in training mode."""
    patch.setattr(BoundModel, "_evaluating", lambda self: contextlib.nullcontext())

    def training(checkpoint: Any) -> Any:
        checkpoint.model.train()
        return checkpoint

    then(patch, loading.load_checkpoint, training)


@fault(
    "llama",
    "precision_invariance",
    also="gradient_witness padding_invariance projections_agree slope_identity batch_invariance",
)
def autocast_left_on(patch: Patch) -> None:
    """The trainer's bf16 autocast is on during the forward."""

    @contextlib.contextmanager
    def on() -> Any:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            yield

    everywhere(patch, precision.autocast_off, on)


class _ShortMantissa(TorchFunctionMode):
    """Products whose factors keep 10 bits of a float32's mantissa."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.nn.functional.linear and args[0].dtype is torch.float32:
            rounded = [((a.detach() * 8193) - (a.detach() * 8193 - a.detach())) - a.detach() + a for a in args[:2]]
            args = (*rounded, *args[2:])
        return func(*args, **(kwargs or {}))


@fault("llama", "precision_invariance", also="padding_invariance projections_agree slope_identity")
def products_in_tf32(patch: Patch) -> None:
    """Matrix products round their factors to TF32's 10 bits."""
    original = precision.forward_context

    @contextlib.contextmanager
    def rounding(*a: Any, **k: Any) -> Any:
        with original(*a, **k), _ShortMantissa():
            yield

    everywhere(patch, original, rounding)


@fault(
    "llama",
    "logit_scaling logit_slope drawn_scaling",
    also="change_identity curvature_witness delta_h_slope taylor_order",
)
def float32_islands_in_float64(patch: Patch) -> None:
    """In the float64 copy, norms, rotary embeddings and softmax still run in float32."""
    plain = lambda self, func, types, args=(), kwargs=None: func(*args, **(kwargs or {}))  # noqa: E731
    patch.setattr(precision.TrueFloat64, "__torch_function__", plain)


@fault(
    "llama",
    "change_identity gradient_witness",
    also="batch_invariance chunk_invariance delta_h_slope padding_invariance precision_invariance slope_identity "
    "sweep_identity taylor_order projections_agree",
)
def log_softmax_in_bfloat16(patch: Patch) -> None:
    """Logits are rounded to bf16 before the softmax."""
    original = policy.score_tokens
    everywhere(patch, original, lambda logits, *a, **k: original(logits.bfloat16().to(logits.dtype), *a, **k))


def _arguments(patch: Patch, change: Callable[[dict[str, Any]], dict[str, Any]]) -> None:
    original = BoundModel._arguments
    patch.setattr(BoundModel, "_arguments", lambda *a: change(original(*a)))


@fault("gpt2", "padding_invariance")
def no_position_ids(patch: Patch) -> None:
    """Positions count padding, so a left-padded row starts late. Rotary positions hide this."""
    _arguments(patch, lambda k: {name: value for name, value in k.items() if name != "position_ids"})


@fault("llama", "padding_invariance")
def mask_lets_padding_through(patch: Patch) -> None:
    """The attention mask is all ones on left-padded rows."""
    _arguments(patch, lambda k: {n: torch.ones_like(v) if n == "attention_mask" else v for n, v in k.items()})


@fault("lora", "x_coverage y_coverage sampler_parity")
def adapter_not_applied(patch: Patch) -> None:
    """A layer runs without its adapter."""

    def without(model: Any) -> Any:
        model.base_model.model.model.layers[0].mlp.down_proj._disable_adapters = True
        return model

    then(patch, adapter.load_adapter, without)


@fault("lora", "x_coverage y_coverage")
def adapter_merged(patch: Patch) -> None:
    """A layer's adapter is merged into its weight. The scores are the same, but its factors move nothing any more."""

    def merged(model: Any) -> Any:
        model.base_model.model.model.layers[0].mlp.down_proj.merge()
        return model

    then(patch, adapter.load_adapter, merged)


@fault("lora", refused="no trainable parameter influences the scores")
def every_adapter_merged(patch: Patch) -> None:
    """The whole adapter is merged: no trainable parameter takes part in the forward."""

    def merged(checkpoint: Any) -> Any:
        checkpoint.model.merge_adapter()
        return checkpoint

    then(patch, loading.load_checkpoint, merged)


@fault("lora", "sampler_parity")
def another_base_model(patch: Patch) -> None:
    """The adapter is put on base weights that it was not trained on."""
    from entropy_probe.model.checkpoint.weights import pretrained

    def other(model: Any) -> Any:
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.mul_(1.1)
        return model

    then(patch, pretrained.load_full_model, other)


# --- which tokens are scored, and how


@fault("llama", "chunk_invariance sampler_parity padding_invariance", also="batch_invariance")
def logits_one_position_late(patch: Patch) -> None:
    """The token at i is scored with the logits at i, which have already seen it."""
    original = BoundModel.read_logits

    def late(self: Any, ids: Tensor, rows: Tensor, columns: Tensor, *a: Any, **k: Any) -> Any:
        return original(self, ids, rows, (columns + 1).clamp(max=ids.shape[1] - 1), *a, **k)

    patch.setattr(BoundModel, "read_logits", late)


@fault("llama", "chunk_invariance", also="batch_invariance curvature_witness")
def entropy_of_the_wrong_step(patch: Patch) -> None:
    """H_t is computed from the logits of the step before."""
    original = scores._scored

    def rolled(*a: Any) -> tuple[Tensor, ...]:
        logp, logq, entropy, entropy_q = original(*a)
        return logp, logq, entropy.roll(1, 0), entropy_q.roll(1, 0)

    patch.setattr(scores, "_scored", rolled)


def _lines(patch: Patch, change: Callable[[Any], Any]) -> None:
    then(patch, rollouts.assembled, change)


@fault("llama", "chunk_invariance sampler_parity", also="batch_invariance")
def window_one_token_early(patch: Patch) -> None:
    """The generated region starts and ends one token early."""
    original = scores.read_rows

    def early(bound: Any, batch: Any, *a: Any, **k: Any) -> Any:
        return original(bound, with_fields(batch, prompt_lens=lambda n: n - 1), *a, **k)

    everywhere(patch, original, early)


@fault("sampled", "ends_at_eos", also="seeded")
def eos_dropped(patch: Patch) -> None:
    """The EOS that ends a response is not scored."""

    def dropped(r: Any) -> Any:
        last = r.ids.gather(1, (r.prompt_lens + r.gen_lens - 1)[:, None])[:, 0]
        return with_fields(r, gen_lens=lambda n: (n - (last < 30).long()).clamp(min=1))

    then(patch, batches.draw_batches, lambda batches: tuple(map(dropped, batches)))


@fault("llama", "sampler_parity on_policy", also="ends_at_eos")
def padding_scored(patch: Patch) -> None:
    """Every response counts as if it were as long as the longest."""

    def as_long(r: Any) -> Any:
        room = r.ids.shape[1] - r.prompt_lens
        return with_fields(r, gen_lens=lambda n: torch.minimum(torch.full_like(n, int(n.max())), room))

    _lines(patch, as_long)


@fault("llama", refused="goes on after the EOS")
def tokens_after_eos(patch: Patch) -> None:
    """The engine did not stop at an EOS, and its file has the tokens that came after."""
    original = trainers_rollouts.json_lines

    def lines(*a: Any) -> Any:
        for where, row in original(*a):
            first, *rest = row["response_ids"]
            yield where, {**row, "response_ids": [[2, *first], *rest]}

    patch.setattr(trainers_rollouts, "json_lines", lines)


@fault(
    "temperature",
    "chunk_invariance gradient_witness projections_agree sampler_parity",
    also="slope_identity batch_invariance change_identity sweep_identity taylor_order curvature_witness",
)
def temperature_in_the_gradients_only(patch: Patch) -> None:
    """Scores are at temperature 1, and gradients at the configured one."""
    original = policy.score_tokens
    patch.setattr(scores, "score_tokens", lambda z, tokens, temperature, *a, **k: original(z, tokens, 1.0, *a, **k))


@fault("temperature", "gradient_witness projections_agree", also="slope_identity")
def temperature_in_the_scores_only(patch: Patch) -> None:
    """Gradients are at temperature 1, and scores at the configured one."""
    original = policy.token_logp
    everywhere(patch, original, lambda logits, tokens, temperature: original(logits, tokens, 1.0))


@fault("temperature", "sampler_parity", generation={"temperature": 1.0})
def temperature_of_the_sampler_only(patch: Patch) -> None:
    """Responses sampled at 0.7 are scored at 1, as the configuration says."""


@fault("top_k", "sampler_parity")
def top_k_left_at_50(patch: Patch) -> None:
    """The engine cut to its default top_k of 50. The policy that is scored is not cut."""


@fault("nucleus", refused="outside the nucleus")
def nucleus_without_the_crossing_token(patch: Patch) -> None:
    """The token that crosses top_p is left out: q of a sampled token is 0."""

    def narrower(ranked: Tensor, log_sum: Tensor, limits: Tensor) -> Any:
        mass = (ranked - log_sum[:, None]).double().exp()
        inside = (mass.cumsum(-1) < limits[:, None]).sum(-1).clamp(min=1)
        return ranked.gather(1, inside[:, None] - 1)[:, 0], inside == ranked.shape[1]

    patch.setattr(policy, "_edge_of", narrower)


@fault("sampled", "on_policy")
def sampler_at_another_temperature(patch: Patch) -> None:
    """Tokens are drawn at temperature 1 and scored at 0.7."""
    original = drawing.masses
    everywhere(patch, original, lambda logits, temperature, top_p: original(logits, 1.0, top_p))


@fault("sampled", "on_policy", generation={"temperature": 1.5})
def sampler_with_a_default_top_k(patch: Patch) -> None:
    """Tokens are drawn from the 50 largest logits, which is the default of generate()."""
    original = drawing.masses

    def cut(logits: Tensor, *a: Any) -> Tensor:
        return original(logits.masked_fill(logits < logits.topk(50).values[:, -1:], -math.inf), *a)

    everywhere(patch, original, cut)


@fault("sampled", "on_policy", generation={"top_p": 0.5})
def sampler_without_the_crossing_token(patch: Patch) -> None:
    """The sampler's nucleus ends before the token that crosses top_p."""

    def narrower(logp: Tensor, top_p: float, **k: Any) -> Tensor:
        ranked, order = logp.exp().sort(descending=True)
        inside = ranked.cumsum(-1) < top_p
        inside[:, 0] = True
        return torch.zeros_like(inside).scatter(-1, order, inside)

    patch.setattr(drawing, "nucleus", narrower)


@fault("sampled", "on_policy", also="seeded ends_at_eos")
def prompt_scored_with_the_response(patch: Patch) -> None:
    """The last token of every prompt counts as generated."""
    _lines(patch, lambda r: with_fields(r, prompt_lens=lambda n: n - 1, gen_lens=lambda n: n + 1))


@fault("sampled", inconclusive="y_coverage se_identity", also="on_policy")
def one_noise_for_all_responses(patch: Patch) -> None:
    """The responses of a prompt are drawn with the same numbers, so they are one response G times."""
    original = drawing.noise_of
    patch.setattr(sampling, "noise_of", lambda seed, prompt, response: original(seed, prompt, 0))


@fault("sampled", "seeded", also="on_policy")
def seed_ignored(patch: Patch) -> None:
    """The configured seed is not used: every run draws the same responses."""
    original = drawing.noise_of
    patch.setattr(sampling, "noise_of", lambda seed, prompt, response: original(0, prompt, response))


@fault("sampled", "cache_agrees", also="on_policy")
def cached_positions_one_too_late(patch: Patch) -> None:
    """Tokens after the prompt are read one position too late, and nothing asks whether the cache agrees."""
    original = BoundModel.next_logits

    def late(self: BoundModel, ids: Tensor, mask: Tensor, cache: Any = None, **k: Any) -> Any:
        own = self._arguments

        def arguments(*a: Any) -> dict[str, Any]:
            made = own(*a)
            return made | {"position_ids": made["position_ids"] + (cache is not None)}

        with pytest.MonkeyPatch.context() as inner:
            inner.setattr(BoundModel, "_arguments", lambda _, *a: arguments(*a))
            return original(self, ids, mask, cache, **k)

    patch.setattr(BoundModel, "next_logits", late)
    everywhere(patch, steps.way_of, lambda *a, **k: steps.Way(steps.OverCache))


def _shared_without_a_trial(patch: Patch) -> None:
    """Prompts are read once, and nothing asks whether that gives what whole rows give."""
    patch.setattr(scores, "sharing", lambda *a: shared_prompts.Sharing())


@fault("llama", "plain_forward sampler_parity", also="change_identity taylor_order sweep_identity")
def keys_of_the_next_prompt(patch: Patch) -> None:
    """Responses are scored behind the keys and values of the prompt after theirs, and nothing asks whether these give
    what whole rows give."""
    original = ReadPrompts.before
    patch.setattr(ReadPrompts, "before", lambda self, rows: original(self, (rows + 1) % len(self.mask)))
    _shared_without_a_trial(patch)


@fault("llama", "plain_forward sampler_parity", also="change_identity taylor_order")
def shared_positions_one_too_late(patch: Patch) -> None:
    """Behind a prompt that is read once, tokens stand one position too late, and nothing asks whether these scores are
    those of whole rows."""
    original = BoundModel._called

    def late(self: Any, ids: Tensor, mask: Any, keep: slice, mapping: Any, true: bool, more: Any = None) -> Any:
        if more and "past_key_values" in more:
            positions = (mask.long().cumsum(1) - 1).clamp(min=0)[:, -ids.shape[1] :]
            more = {**more, "position_ids": positions + 1}
        return original(self, ids, mask, keep, mapping, true, more)

    patch.setattr(BoundModel, "_called", late)
    _shared_without_a_trial(patch)


@fault("sampled", "ends_at_eos")
def sampler_goes_on_after_eos(patch: Patch) -> None:
    """Responses run to the length limit, even after an EOS."""
    patch.setattr(sampled_rollouts, "eos_ids", lambda model, tokenizer: [])


@fault("sampled", "ends_at_eos")
def sampler_drops_eos(patch: Patch) -> None:
    """The EOS that ended a response is cut off."""
    original = sampling.sample

    def cut(*a: Any, eos_ids: Any, **k: Any) -> Any:
        drawn = original(*a, eos_ids=eos_ids, **k)
        return [tokens[:-1] if tokens[-1] in eos_ids and len(tokens) > 1 else tokens for tokens in drawn]

    patch.setattr(sampled_rollouts, "sample", cut)


@fault("llama", "batches_as_given")
def batches_swapped(patch: Patch) -> None:
    """The update comes from the E batch, and the entropy is measured on the U batch."""
    then(patch, batches.draw_batches, lambda batches: batches[::-1])


@fault("llama", "batches_as_given")
def update_file_not_used(patch: Patch) -> None:
    """The E batch serves as both, although U has a file of its own."""
    then(patch, batches.draw_batches, lambda batches: (batches[0], batches[0]))


@fault("llama", "gradient_witness projections_agree slope_identity")
def gradients_all_zero(patch: Patch) -> None:
    """The fast pass returns zeros, and two zeros agree."""
    then(patch, unit_gradients.unit_gradients, lambda units: with_fields(units, x=scaled(0.0), y=scaled(0.0)))


@fault("llama", "optimizer_step_cosine optimizer_step_norm")
def step_compared_with_itself(patch: Patch) -> None:
    """The step of torch's optimizer is compared for none of the parameters."""
    original = torch_step.optimizer_step_agreement
    everywhere(patch, original, lambda registry, states, *a: original(registry, {}, *a))


def page() -> str:
    """The catalogue as a page of documentation."""
    rows: dict[bool, list[str]] = {True: [], False: []}
    for f in FAULTS.values():
        sections = [section for section in f.config.values() if isinstance(section, dict)]
        settings = [f"{k} {v}" for s in sections for k, v in s.items() if k not in ("dtype", "max_examples")]
        on = "; ".join([SUBJECTS[f.subject].what, *(text for text in settings if "{" not in text)])
        caught = [*map(_code, sorted(f.red)), *(f"{_code(name)} (inconclusive)" for name in sorted(f.inconclusive))]
        caught += [f"an error: “{f.refused}”"] if f.refused else []
        cells = [_code(f.name), f.wrong, on]
        cells += [", ".join(caught), ", ".join(map(_code, sorted(f.also)))] if f.seen else []
        rows[f.seen].append(f"| {' | '.join(cells)} |")
    page = _PAGE.format(count=len(FAULTS), seen="\n".join(rows[True]))
    page += (Path(__file__).parents[1] / "mutants" / "last.md").read_text(encoding="utf-8")
    return page + (_UNSEEN.format(missed=len(rows[False]), unseen="\n".join(rows[False])) if rows[False] else "")


def _code(name: str) -> str:
    return f"`{name}`"


_PAGE = """# Planted faults

The acceptance suite exists to notice mistakes. This page lists {count} faults. Each is planted in the code or in the
files, where such a mistake would be made. The criteria under *caught by* must then turn red. Those in the last column
may turn red as well, because they read the same damaged numbers. So may all criteria of the family `audit`, which read
every number. No other criterion turns red. `tests/faults/` plants every fault, and
`PYTHONPATH=tests python -m faults.catalogue > docs/faults.md` writes this page.

| fault | what is wrong | revealed on | caught by | may be red too |
|---|---|---|---|---|
{seen}
"""
_UNSEEN = """
## What no criterion sees

{missed} of them change no criterion. Only tests against slow references keep them from a user.

| fault | what is wrong | tried on |
|---|---|---|
{unseen}
"""


if __name__ == "__main__":
    from faults import catalogue, inputs, more, predictors, recipes  # the one that faults are entered in

    assert more
    assert recipes
    assert inputs
    assert predictors
    sys.stdout.write(catalogue.page())
