"""Faults that no identity, and no witness that begins after the reader, would see: of readers, of figures and their
standard errors, of inputs, and of what both sides of a comparison share.

They are written from the kinds: what is read, what is published, what is given, what is called by both sides.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from entropy_probe.estimators import importance, placing, policy, prediction, slope
from entropy_probe.model.checkpoint.moments import adam as optimizer
from entropy_probe.model.checkpoint.weights import adapter, pretrained
from entropy_probe.stages import batches, entropy, entropy_change, first_order, moments, scores, slopes, update
from entropy_probe.stages.gradients import coverage, unit_gradients
from entropy_probe.stages.responses import drawing, rollouts, sampled_rollouts, sampling, tasks
from entropy_probe.stages.responses.ids import Door
from faults import catalogue
from faults.catalogue import Patch, everywhere, then, with_fields

FIGURE = "figures_recomputed"
MANY_TOKENS = {"num_return_sequences": 6, "max_new_tokens": 16}
SAMPLED_AGAIN = {"true_delta_h": {"fallback": "resample", "etas": [20.0, 40.0]}}


def fault(on: str, red: str, *, also: str = "", **config: Any) -> Callable[[Any], Any]:
    """As in the catalogue, on a run without the parts that no fault here is for."""
    light: dict[str, Any] = {"budget": "smoke", "invariance": {"max_examples": 0}}
    return catalogue.fault(on, red, also=also, **(light | config))


# --- what is read: every witness of v and P begins after the reader


def read(patch: Patch, change: Callable[[Any], Any]) -> None:
    """Change the state of every parameter as it is read."""
    then(patch, optimizer.map_adam_state, lambda states: {name: change(state) for name, state in states.items()})


def rotated(patch: Patch, *fields: str) -> None:
    """Some fields of the state of the next parameter of the same shape."""

    def change(states: Mapping[str, Any]) -> dict[str, Any]:
        by_shape: dict[Any, list[str]] = {}
        for name, state in states.items():
            by_shape.setdefault(state.exp_avg.shape, []).append(name)
        new = dict(states)
        for names in by_shape.values():
            for name, other in zip(names, names[1:] + names[:1], strict=True):
                new[name] = dataclasses.replace(states[name], **{f: getattr(states[other], f) for f in fields})
        return new

    then(patch, optimizer.map_adam_state, change)


@fault("llama", "as_stored")
def momentum_read_as_zeros(patch: Patch) -> None:
    """exp_avg is read as zeros. v has no momentum, and torch's own step has none either."""
    read(patch, lambda s: with_fields(s, exp_avg=torch.zeros_like))


@fault("llama", "as_stored")
def momentum_read_negated(patch: Patch) -> None:
    """exp_avg is read with the other sign."""
    read(patch, lambda s: with_fields(s, exp_avg=torch.neg))


@fault("llama", "as_stored moments_possible")
def momentum_read_twice_as_large(patch: Patch) -> None:
    """exp_avg is read twice as large as it is."""
    read(patch, lambda s: with_fields(s, exp_avg=lambda m: 2 * m))


@fault("llama", "as_stored moments_possible")
def momentum_of_the_neighbour(patch: Patch) -> None:
    """exp_avg belongs to another tensor of the same shape, exp_avg_sq to the tensor itself."""
    rotated(patch, "exp_avg")


@fault("llama", "as_stored moments_possible", also="moments_match")
def second_moment_of_the_neighbour(patch: Patch) -> None:
    """exp_avg_sq belongs to another tensor of the same shape, exp_avg to the tensor itself."""
    rotated(patch, "exp_avg_sq")


@fault("llama", "as_stored", also="moments_match")
def root_of_the_second_moment(patch: Patch) -> None:
    """√exp_avg_sq is read in place of exp_avg_sq."""
    read(patch, lambda s: with_fields(s, exp_avg_sq=torch.sqrt))


@fault("llama", "as_stored moments_possible", also="moments_match")
def square_of_the_second_moment(patch: Patch) -> None:
    """exp_avg_sq² is read in place of exp_avg_sq."""
    read(patch, lambda s: with_fields(s, exp_avg_sq=torch.square))


@fault("llama", "as_stored moments_possible", also="moments_match")
def moments_exchanged(patch: Patch) -> None:
    """|exp_avg| stands for exp_avg_sq, and the other way round."""
    read(patch, lambda s: dataclasses.replace(s, exp_avg=s.exp_avg_sq.sqrt() * 9, exp_avg_sq=s.exp_avg.abs() ** 2))


@fault("llama", "as_stored")
def moments_read_in_bfloat16(patch: Patch) -> None:
    """Both moments are rounded to bfloat16 on the way."""
    rounded = lambda t: t.bfloat16().float()  # noqa: E731
    read(patch, lambda s: with_fields(s, exp_avg=rounded, exp_avg_sq=rounded))


@fault("llama", "as_stored")
def adamw_read_as_adam(patch: Patch) -> None:
    """The decay goes through the moments, but AdamW's does not."""
    read(patch, lambda s: dataclasses.replace(s, decoupled=False))


@fault("coupled", "as_stored")
def adam_read_as_adamw(patch: Patch) -> None:
    """The decay does not go through the moments, but Adam's does."""
    read(patch, lambda s: dataclasses.replace(s, decoupled=True))


@fault("amsgrad", "as_stored")
def amsgrad_lost(patch: Patch) -> None:
    """The flag of AMSGrad is not read, and its maximum is not used."""
    read(patch, lambda s: dataclasses.replace(s, amsgrad=False, max_exp_avg_sq=None))


@fault("llama", "as_stored", also="optimizer_as_saved")
def maximize_read(patch: Patch) -> None:
    """The optimizer is read as one that maximizes."""
    read(patch, lambda s: dataclasses.replace(s, maximize=True))


@fault("llama", "as_stored", also="optimizer_as_saved moments_possible")
def step_read_one_late(patch: Patch) -> None:
    """The step is read as one more than it is."""
    read(patch, lambda s: with_fields(s, step=lambda t: t + 1))


@fault("llama", "as_stored moments_possible", also="optimizer_as_saved")
def step_read_one_early(patch: Patch) -> None:
    """The step is read as one less than it is."""
    read(patch, lambda s: with_fields(s, step=lambda t: t - 1))


@fault("llama", "as_stored optimizer_as_saved", also="moments_possible")
def betas_read_backwards(patch: Patch) -> None:
    """β₁ and β₂ are exchanged."""
    read(patch, lambda s: with_fields(s, betas=lambda b: b[::-1]))


@fault("llama", "as_stored optimizer_as_saved")
def epsilon_read_ten_times(patch: Patch) -> None:
    """ε is ten times what was saved."""
    read(patch, lambda s: with_fields(s, eps=lambda e: 10 * e))


@fault("two lrs", "as_stored", also="optimizer_as_saved")
def one_learning_rate_read_for_both(patch: Patch) -> None:
    """Both groups get the first one's learning rate."""
    read(patch, lambda s: dataclasses.replace(s, lr=1e-5))


@fault("llama", "as_stored optimizer_as_saved")
def decay_read_for_all(patch: Patch) -> None:
    """Norms decay as matrices do, although their group has no decay."""
    read(patch, lambda s: dataclasses.replace(s, weight_decay=0.1))


def weights(patch: Patch, load: Any, change: Callable[[str, Tensor], Tensor]) -> None:
    """Change the weights of a model as it is loaded."""

    def changed(model: Any) -> Any:
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                parameter.copy_(change(name, parameter))
        return model

    then(patch, load, changed)


@fault("llama", "as_stored", also="plain_forward plain_step")
def weights_rounded_to_bfloat16(patch: Patch) -> None:
    """Weights pass through bfloat16 as they are read."""
    weights(patch, pretrained.load_full_model, lambda _, p: p.bfloat16().float())


@fault("llama", "as_stored", also="plain_forward plain_step sampler_parity on_policy")
def weights_moved(patch: Patch) -> None:
    """Every weight is read a thousandth too large."""
    weights(patch, pretrained.load_full_model, lambda _, p: 1.001 * p)


@fault("llama", "as_stored plain_forward", also="plain_step sampler_parity on_policy")
def a_norm_left_as_it_was_made(patch: Patch) -> None:
    """The last norm is not read and keeps the ones of its construction."""
    weights(patch, pretrained.load_full_model, lambda n, p: torch.ones_like(p) if n == "model.norm.weight" else p)


@fault("llama", "plain_forward", also="plain_step as_stored sampler_parity on_policy")
def rows_of_a_weight_reversed(patch: Patch) -> None:
    """The rows of the values' projection are in reverse order. The numbers and the sums are the same."""
    weights(patch, pretrained.load_full_model, lambda n, p: p.flip(0) if "v_proj" in n else p)


@fault("llama", "plain_forward", also="plain_step as_stored sampler_parity on_policy")
def embedding_shifted_by_a_token(patch: Patch) -> None:
    """Every token has the embedding of the token before it. The numbers and the sums are the same."""
    weights(patch, pretrained.load_full_model, lambda n, p: p.roll(1, 0) if "embed_tokens" in n else p)


@fault("lora", "plain_forward", also="plain_step sampler_parity on_policy")
def lora_scaling_halved(patch: Patch) -> None:
    """alpha/r is halved. No weight differs, but the model does."""

    def halved(model: Any) -> Any:
        for module in model.modules():
            if isinstance(getattr(module, "scaling", None), dict):
                module.scaling = {key: 0.5 * value for key, value in module.scaling.items()}
        return model

    then(patch, adapter.load_adapter, halved)


@fault("lora", "plain_forward as_stored", also="plain_step sampler_parity on_policy")
def lora_factor_left_at_zero(patch: Patch) -> None:
    """B of the values' adapter is not read and keeps the zeros of its construction."""
    weights(patch, adapter.load_adapter, lambda n, p: 0 * p if "v_proj.lora_B" in n else p)


@fault("dora", "plain_forward as_stored", also="plain_step sampler_parity on_policy")
def dora_magnitude_left_as_it_was_made(patch: Patch) -> None:
    """DoRA's magnitudes are not read and keep the norms of the base model."""
    weights(patch, adapter.load_adapter, lambda n, p: 1.1 * p if "magnitude" in n else p)


# --- what is published


def published(patch: Patch, section: Any, change: Callable[[Any], dict[str, Any]]) -> None:
    """Change fields of a section of the report as it is made."""
    then(patch, section, lambda made: made.model_copy(update=change(made)))


def of_u(patch: Patch, change: Callable[[Any], dict[str, Any]]) -> None:
    published(patch, first_order.first_order_section, change)


def of_update(patch: Patch, change: Callable[[Any], dict[str, Any]]) -> None:
    published(patch, slopes.update_section, change)


def of_rows(patch: Patch, change: Callable[[Any], dict[str, Any]]) -> None:
    published(patch, entropy_change.change_row, change)


def of_entropy(patch: Patch, change: Callable[[Any], dict[str, Any]]) -> None:
    published(patch, entropy.entropy_section, change)


def narrower(interval: tuple[float, float], by: float = 0.84) -> tuple[float, float]:
    """90 % in place of 95 %."""
    middle, half = sum(interval) / 2, (interval[1] - interval[0]) / 2
    return middle - by * half, middle + by * half


@fault("llama", FIGURE)
def norms_of_means_for_norms_of_sums(patch: Patch) -> None:
    """‖X̄‖ and ‖Ȳ‖ are published as ‖ΣX‖ and ‖ΣY‖."""
    of_u(patch, lambda s: {"norm_x_sum": s.norm_x_sum / s.num_units, "norm_y_sum": s.norm_y_sum / s.num_units})


@fault("llama", FIGURE)
def norms_exchanged(patch: Patch) -> None:
    """‖ΣX‖ and ‖ΣY‖ are exchanged."""
    of_u(patch, lambda s: {"norm_x_sum": s.norm_y_sum, "norm_y_sum": s.norm_x_sum})


@fault("llama", FIGURE)
def plain_product_with_the_preconditioner(patch: Patch) -> None:
    """X̄ᵀȲ is published with P in it."""
    of_u(patch, lambda s: {"bars_dot_plain": s.bars_dot})


@fault("llama", FIGURE, also="se_formula")
def unbiased_variance_halved(patch: Patch) -> None:
    """The unbiased variance of U_cross is halved."""
    of_u(patch, lambda s: {"var_unbiased": s.var_unbiased / 2})


@fault("llama", FIGURE, also="delta_h1_identity")
def parts_of_modules_exchanged(patch: Patch) -> None:
    """The parts of attention and of the MLP are exchanged. Their sum is the same."""

    def change(section: Any) -> dict[str, Any]:
        table = dict(section.delta_h1_parts.module)
        table["attention"], table["mlp"] = table["mlp"], table["attention"]
        return {"delta_h1_parts": section.delta_h1_parts.model_copy(update={"module": table})}

    of_u(patch, change)


@fault("llama", FIGURE, also="delta_h1_identity")
def errors_of_parts_are_that_of_the_whole(patch: Patch) -> None:
    """Every part of δH₁ has the SE of the whole."""

    def change(section: Any) -> dict[str, Any]:
        parts = section.delta_h1_parts
        tables = {
            table: {k: e.model_copy(update={"se": section.delta_h1_se}) for k, e in getattr(parts, table).items()}
            for table in ("layer", "module", "factor")
        }
        return {"delta_h1_parts": parts.model_copy(update=tables)}

    of_u(patch, change)


@fault("llama", FIGURE, also="two_batch_identity")
def two_batches_without_the_preconditioner(patch: Patch) -> None:
    """The two-batch term, its projections and its SEs all lack P, and agree with one another."""
    original = unit_gradients.UnitGradients.products_with

    def plain(self: Any, u: Any, precond: Mapping[str, Tensor]) -> Any:
        return original(self, u, {name: torch.ones_like(p) for name, p in precond.items()})

    patch.setattr(unit_gradients.UnitGradients, "products_with", plain)


@fault("llama", FIGURE, also="two_batch_identity")
def two_batches_with_x_of_the_update(patch: Patch) -> None:
    """X of U is used in place of X of E. The section agrees with itself, but it is about one batch."""
    original = first_order.two_batch_section
    everywhere(patch, original, lambda e, u, *more: original(u, u, *more))


def standard_errors(patch: Patch, factor: Callable[[int], float]) -> None:
    """Of all means over prompts."""
    original = slope.PromptMean.se.fget
    assert original is not None
    patch.setattr(slope.PromptMean, "se", property(lambda self: factor(len(self.per_prompt)) * original(self)))


@fault("llama", FIGURE, also="prediction")
def errors_of_slopes_not_over_root_b(patch: Patch) -> None:
    """SEs of slopes and predictions are standard deviations. They are so wide that `prediction` says nothing."""
    standard_errors(patch, math.sqrt)


@fault("llama", FIGURE, also="prediction")
def errors_of_slopes_over_root_b_twice(patch: Patch) -> None:
    """SEs of slopes and predictions are divided by √B twice."""
    standard_errors(patch, lambda size: 1 / math.sqrt(size))


@fault("llama", FIGURE, also="slope_identity")
def columns_of_estimators_exchanged(patch: Patch) -> None:
    """In the table of estimators, naive and Rao-Blackwell without a baseline are exchanged."""

    def change(section: Any) -> dict[str, Any]:
        table = dict(section.estimators)
        table["naive"], table["rb_none"] = table["rb_none"], table["naive"]
        return {"estimators": table}

    of_update(patch, change)


@fault("llama", FIGURE)
def eta_star_halved(patch: Patch) -> None:
    """η* lacks its factor 2. If the curvature is not decided, η* is `None` and stays so."""
    everywhere(patch, prediction.eta_star, lambda s, c: abs(s.value) / abs(c.value))


@fault("llama", FIGURE)
def curvature_per_token_is_that_per_response(patch: Patch) -> None:
    """The curvature per response is published as the one per token."""
    of_update(patch, lambda s: {"curvature_per_token": s.curvature})


@fault("llama", FIGURE)
def error_per_token_is_that_per_response(patch: Patch) -> None:
    """The SE of the slope per response is published as the one per token."""
    of_update(patch, lambda s: {"delta_h1_per_lr_per_token_se": s.delta_h1_per_lr_rb_se})


@fault("llama", FIGURE)
def norm_of_momentum_is_that_of_v(patch: Patch) -> None:
    """‖v‖ is published as ‖v₀‖."""
    of_update(patch, lambda s: {"norm_v0": s.norm})


@fault("llama", FIGURE, update={"max_grad_norm": 0.1})
def gradient_norm_after_clipping(patch: Patch) -> None:
    """‖g‖ is published as it is after clipping."""
    of_update(patch, lambda s: {"grad_norm": min(s.grad_norm, 0.1)})


@fault("llama", FIGURE)
def slopes_of_units_reversed(patch: Patch) -> None:
    """The slopes of the units of U are in reverse order. Their sum is the same."""
    of_update(patch, lambda s: {"slope_by_unit": s.slope_by_unit[::-1]})


@fault("one batch", FIGURE)
def cross_fitted_slope_is_the_plain_one(patch: Patch) -> None:
    """With one batch the slope is not cross-fitted: it includes the diagonal X_nᵀDY_n."""
    of_update(patch, lambda s: {"delta_h1_per_lr_cross": s.delta_h1_per_lr_naive})


@fault("one batch", FIGURE, also="prediction")
def cross_fitted_with_the_preconditioner(patch: Patch) -> None:
    """The cross-fitted slope uses half of D."""
    original = slopes.cross_fitted_slope

    def half(units: Any, direction: Any) -> Any:
        return original(units, with_fields(direction, diagonal=lambda d: {n: 0.5 * t for n, t in d.items()}))

    everywhere(patch, original, half)


@fault("llama", FIGURE, also="se_by_prompt zero_step_change sweep_identity curvature_identity prediction")
def naive_and_rao_blackwell_exchanged(patch: Patch) -> None:
    """In the row, the ΔH of −S and of R are exchanged, with their SEs."""
    of_rows(
        patch,
        lambda row: {
            "delta_h": row.delta_h_rb, "delta_h_se": row.delta_h_rb_se,
            "delta_h_rb": row.delta_h, "delta_h_rb_se": row.delta_h_se,
        },
    )  # fmt: skip


@fault("llama", FIGURE)
def intervals_of_90_percent(patch: Patch) -> None:
    """The 95 % intervals of ΔH are 90 % intervals."""
    names = ("delta_h_interval", "delta_h_rb_interval", "delta_h_per_token_interval")
    of_rows(patch, lambda row: {name: narrower(getattr(row, name)) for name in names})


@fault("llama", FIGURE)
def interval_of_a_normal(patch: Patch) -> None:
    """The intervals of ΔH use the quantile of a normal in place of Student's."""
    original = importance.Change.interval
    patch.setattr(importance.Change, "interval", lambda self: narrower(original(self), 0.7))


@fault("llama", FIGURE, also="prediction")
def prediction_without_the_half(patch: Patch) -> None:
    """The prediction is η·slope + η²·curvature."""
    original = prediction.predict

    def whole(eta: float, realised: Any, slope_of: Any, bent: Any, unit_of: Any) -> Any:
        twice = slope.PromptMean(2 * bent.per_prompt)
        return original(eta, realised, slope_of, twice, unit_of)

    everywhere(patch, original, whole)


@fault("llama", FIGURE)
def ratio_upside_down(patch: Patch) -> None:
    """The ratio is predicted over realised."""
    of_rows(patch, lambda row: {"ratio": None if not row.ratio else 1 / row.ratio})


@fault("llama", FIGURE, also="prediction")
def errors_of_differences_as_if_independent(patch: Patch) -> None:
    """The SE of realised minus predicted is computed as if they were measured on different prompts."""
    of_rows(patch, lambda row: {"difference_se": math.hypot(row.delta_h_pd_se, row.predicted_se)})


@fault("llama", FIGURE, also="prediction")
def everything_in_range(patch: Patch) -> None:
    """Prediction and realisation are compared at every η."""
    of_rows(patch, lambda row: {"in_range": not row.in_range})


@fault("llama", FIGURE, also="prediction")
def changes_of_prompts_reversed(patch: Patch) -> None:
    """The changes of the prompts are in reverse order. Their spread is the same."""
    of_rows(patch, lambda row: {"delta_h_rb_by_prompt": row.delta_h_rb_by_prompt[::-1]})


@fault("llama", FIGURE, also="sweep_identity")
def per_token_is_per_response(patch: Patch) -> None:
    """ΔH per response is published as the one per token."""
    of_rows(patch, lambda row: {"delta_h_per_token": row.delta_h_rb})


@fault("llama", FIGURE)
def per_token_naive_is_rao_blackwell(patch: Patch) -> None:
    """The Rao-Blackwell ΔH per token is published as the naive one."""
    of_rows(patch, lambda row: {"delta_h_per_token_naive": row.delta_h_per_token})


@fault("llama", FIGURE)
def mean_for_the_median_of_weights(patch: Patch) -> None:
    """The median of the log-weights is the middle of their range."""
    of_rows(patch, lambda row: {"log_weight_median": (row.log_weight_min + row.log_weight_max) / 2})


@fault("llama", FIGURE, also="ess zero_step_ess")
def ess_of_squared_weights(patch: Patch) -> None:
    """ESS is computed from the squared weights."""
    original = importance.snis_weights
    everywhere(
        patch, original, lambda lw, clip=None: dataclasses.replace(original(lw, clip), ess=original(2 * lw, clip).ess)
    )


@fault("llama", FIGURE, true_delta_h={"clip_log_weight": 1e-4})
def ess_before_clipping_is_the_one_after(patch: Patch) -> None:
    """The ESS of clipped weights, which always look healthy, is published as the ESS before clipping."""
    of_rows(patch, lambda row: {"unclipped_ess_fraction": row.ess_fraction})


@fault("llama", FIGURE, true_delta_h={"clip_log_weight": 1e-4})
def clipped_weights_not_counted(patch: Patch) -> None:
    """No weight counts as clipped."""
    of_rows(patch, lambda row: {"clip_fraction": 0.0})


@fault("llama", FIGURE, also="se_by_prompt")
def entropy_rb_holds_the_naive_one(patch: Patch) -> None:
    """The naive entropy is published as the Rao-Blackwell one."""
    of_entropy(patch, lambda s: {"rb": s.naive})


@fault("llama", FIGURE)
def entropy_per_token_is_a_mean_of_ratios(patch: Patch) -> None:
    """The entropy per token is the mean over prompts of R/T in place of ΣR/ΣT."""
    of_entropy(patch, lambda s: {"per_token": s.per_token.model_copy(update={"value": s.per_token.value * 1.05})})


@fault("nucleus", FIGURE)
def entropy_of_the_nucleus_is_that_of_the_policy(patch: Patch) -> None:
    """The entropy of π is published as the entropy of what was sampled from."""
    of_entropy(patch, lambda s: {"rb_q": s.rb})


@fault("llama", FIGURE)
def surprise_in_wide_errors(patch: Patch) -> None:
    """The SE of the surprise is ten times too large, so `on_policy` passes everything."""
    of_entropy(patch, lambda s: {"surprise": s.surprise.model_copy(update={"se": 10 * s.surprise.se})})


@fault("llama", FIGURE)
def entropies_of_prompts_reversed(patch: Patch) -> None:
    """The entropies of the prompts are in reverse order."""
    of_entropy(patch, lambda s: {"rb_by_prompt": s.rb_by_prompt[::-1]})


@fault("llama", FIGURE)
def zero_advantages_inverted(patch: Patch) -> None:
    """The share of prompts that add nothing is exchanged with the share of those that do."""
    published(patch, batches.batch_section, lambda b: {"zero_advantage_fraction": 1 - b.zero_advantage_fraction})


@fault("llama", FIGURE)
def mean_reward_of_the_first_responses(patch: Patch) -> None:
    """The mean reward is half of that of the batch."""
    published(patch, batches.batch_section, lambda b: {"mean_reward": 0.5 * b.mean_reward})


@fault("llama", FIGURE)
def error_of_the_reward_as_if_responses_were_prompts(patch: Patch) -> None:
    """The SE of the mean reward is divided by √(BG)."""
    published(patch, batches.batch_section, lambda b: {"mean_reward_se": b.mean_reward_se / math.sqrt(b.num_responses)})


@fault("llama", FIGURE)
def tokens_of_the_prompts_counted(patch: Patch) -> None:
    """The count of scored tokens has one more for every response."""
    published(patch, batches.batch_section, lambda b: {"num_tokens": b.num_tokens + b.num_prompts})


@fault("llama", FIGURE)
def range_of_the_preconditioner_exchanged(patch: Patch) -> None:
    """The smallest and the largest entry of P are exchanged."""
    published(patch, moments.preconditioner_section, lambda p: {"smallest": p.largest, "largest": p.smallest})


@fault("llama", FIGURE)
def parameters_counted_twice(patch: Patch) -> None:
    """The number of trained values is doubled."""
    published(patch, coverage.gradient_coverage, lambda c: {"num_parameters": 2 * c.num_parameters})


@fault("llama", FIGURE, also="delta_h1_identity two_batch_identity prediction")
def learning_rate_of_the_default(patch: Patch) -> None:
    """The learning rate of δH₁ is the default, and the report calls it the optimizer's."""
    everywhere(patch, update.learning_rate, lambda *_: (1e-4, "optimizer"))


# --- what is given


def rewards(patch: Patch, change: Callable[[Tensor], Tensor]) -> None:
    """Of batches that a file gives, as they are assembled."""
    then(patch, rollouts.assembled, lambda r: dataclasses.replace(r, rewards=change(r.rewards)))


@fault("llama", "rewards_again")
def rewards_reversed_in_their_group(patch: Patch) -> None:
    """The first response has the reward of the last."""
    rewards(patch, lambda r: r.flip(1))


@fault("llama", "rewards_again")
def rewards_of_the_next_prompt(patch: Patch) -> None:
    """Every prompt has the rewards of the next one."""
    rewards(patch, lambda r: r.roll(1, 0))


@fault("sampled", "rewards_again")
def sampled_rewards_reversed(patch: Patch) -> None:
    """The first response that was sampled has the reward of the last."""
    rewards(patch, lambda r: r.flip(1))


@fault("llama", "rewards_again")
def rewards_rounded(patch: Patch) -> None:
    """Rewards pass through bfloat16."""
    rewards(patch, lambda r: r.bfloat16().double())


@fault("llama", "prompts_as_given batches_independent rewards_again", also="batches_as_given on_policy")
def update_is_the_e_batch(patch: Patch) -> None:
    """U is a copy of E, under its own name."""
    then(patch, batches.draw_batches, lambda both: (both[0], dataclasses.replace(both[0], source=both[1].source)))


@fault("sampled", "batches_independent")
def update_has_the_prompts_of_e(patch: Patch) -> None:
    """U is sampled from the prompts of E."""
    then(patch, tasks.draw_prompts, lambda drawn: drawn[: len(drawn) // 2] * 2)


@fault("llama", "prompts_as_given rewards_again", also="on_policy")
def lines_in_reverse(patch: Patch) -> None:
    """The prompts of a file are in reverse order."""
    then(
        patch, batches.draw_batches, lambda both: tuple(b.of_prompts(torch.arange(b.num_prompts).flip(0)) for b in both)
    )


@fault("sampled", "prompts_as_given", also="seeded rewards_again")
def last_token_of_the_prompt_dropped(patch: Patch) -> None:
    """Prompts are encoded without their last token."""
    original = Door.of_prompt
    patch.setattr(Door, "of_prompt", lambda door, prompt: original(door, prompt)[:-1])


@fault("sampled", "prompts_as_given")
def another_split(patch: Patch) -> None:
    """Prompts come from the training split."""
    original = tasks.dataset_prompts
    everywhere(patch, original, lambda name, split: original(name, "train" if split == "test" else "test"))


@fault("sampled tag", "rewards_again")
def gold_of_another_question(patch: Patch) -> None:
    """Every prompt has the gold answer of the next one."""

    def exchanged(drawn: list[Any]) -> list[Any]:
        golds = [prompt.gold for prompt in drawn]
        return [tasks.Prompt(p.text, gold) for p, gold in zip(drawn, golds[1:] + golds[:1], strict=True)]

    then(patch, tasks.draw_prompts, exchanged)


def noise(patch: Patch, change: Callable[[int, int, int], tuple[int, int, int]]) -> None:
    """Change (seed, prompt, response), of which the noise of a response is a function."""
    original = drawing.noise_of
    patch.setattr(sampling, "noise_of", lambda *of: original(*change(*of)))


@fault("sampled", "on_policy", generation=MANY_TOKENS)
def one_noise_for_all_prompts(patch: Patch) -> None:
    """The g-th responses of all prompts are drawn with the same numbers."""
    noise(patch, lambda seed, prompt, response: (seed, 0, response))


@fault("sampled", "on_policy", generation=MANY_TOKENS)
def noise_for_pairs_of_responses(patch: Patch) -> None:
    """Two responses of a prompt are drawn with the same numbers, and are the same."""
    noise(patch, lambda seed, prompt, response: (seed, prompt, response // 2))


@fault("sampled", "on_policy", also="seeded", generation=MANY_TOKENS)
def noise_of_e_for_u(patch: Patch) -> None:
    """Both batches are sampled with the seed of E."""
    original = batches._seed
    patch.setattr(batches, "_seed", lambda which, seed: original("E", seed))


@fault("sampled", "on_policy", generation=MANY_TOKENS)
def update_drawn_too_cold(patch: Patch) -> None:
    """Only U is drawn at 0.6 of its temperature."""
    original = sampled_rollouts.sample

    def colder(*given: Any, temperature: float, noise: Any, **more: Any) -> Any:
        of_u = {seed for seed, _ in noise} == {batches._seed("U", 0)}
        return original(*given, temperature=0.6 * temperature if of_u else temperature, noise=noise, **more)

    patch.setattr(sampled_rollouts, "sample", colder)


@fault("llama", "plain_forward", also="on_policy")
def mass_before_a_token_with_its_own(patch: Patch) -> None:
    """The mass before a token includes the token's own."""

    def wider(logits: Tensor, tokens: Tensor, temperature: float, top_p: float) -> Tensor:
        own = (logits / temperature).softmax(-1).gather(-1, tokens[:, None]).double()
        return placing_before(logits, tokens, temperature, top_p) + own

    placing_before = placing.mass_before
    patch.setattr(scores, "mass_before", wider)


# --- what both sides of a comparison call


def entropies(patch: Patch, change: Callable[[Any], Any]) -> None:
    then(patch, policy.score_tokens, change)


@fault("llama", "plain_forward", also="on_policy slope_identity")
def entropies_ten_percent_too_large(patch: Patch) -> None:
    """Every entropy of a token is 10 % too large, at θ and at θ + ηv, with its derivatives."""
    entropies(patch, lambda s: with_fields(s, entropy=lambda h: 1.1 * h, entropy_q=lambda h: 1.1 * h))


@fault("llama", "plain_forward", also="on_policy sampler_parity precision_invariance slope_identity")
def entropies_in_bits(patch: Patch) -> None:
    """Entropies are in bits."""
    entropies(patch, lambda s: with_fields(s, entropy=lambda h: h / math.log(2), entropy_q=lambda h: h / math.log(2)))


@fault(
    "temperature",
    "plain_forward",
    also="on_policy sampler_parity gradient_witness slope_identity projections_agree sweep_identity",
)
def temperature_forgotten_everywhere(patch: Patch) -> None:
    """Scores and gradients are at temperature 1."""
    original = policy.score_tokens
    everywhere(patch, original, lambda logits, tokens, _, *more: original(logits, tokens, 1.0, *more))


@fault("sampled", "plain_forward", also="fresh_responses", **SAMPLED_AGAIN)
def fresh_responses_scored_at_theta(patch: Patch) -> None:
    """Responses that were drawn at θ + ηv are scored at θ, and reported as reliable."""
    original = entropy_change.score

    def at_theta(bound: Any, batch: Any, config: Any, override: Any = None, **more: Any) -> Any:
        return original(bound, batch, config, {} if batch.source == "resampled" else override, **more)

    patch.setattr(entropy_change, "score", at_theta)


@fault("sampled", "fresh_responses", **SAMPLED_AGAIN)
def fresh_responses_drawn_at_theta(patch: Patch) -> None:
    """Responses that are scored at θ + ηv were drawn at θ, and are reported as reliable."""
    original = sampled_rollouts.redrawn
    everywhere(patch, original, lambda *a, override, **k: original(*a, override={}, **k))


@fault("llama", "plain_step", also="prediction sweep_identity curvature_identity ess real_step virtual_step")
def scored_after_half_a_step(patch: Patch) -> None:
    """The sweep scores at θ + ½ηv and reports this as η."""
    original = entropy_change.moved
    patch.setattr(entropy_change, "moved", lambda bound, v, eta, world: original(bound, v, eta / 2, world))


@fault("llama", FIGURE)
def rewards_of_e_in_the_section_of_u(patch: Patch) -> None:
    """The section of U has the rewards of E."""
    original, first = batches.batch_section, []

    def same(*arguments: Any) -> Any:
        first.append(original(*arguments))
        return first[-1].model_copy(update={"mean_reward": first[0].mean_reward})

    everywhere(patch, original, same)
