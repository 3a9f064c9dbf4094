"""The report: every number that is shown, judged, compared or stored passes through `ProbeReport`.

The schema is part of the public contract (`schema_version` 1). Entropies and their changes are in nats. A field that
is `None` was not measured; the criterion that needs it says so. Numbers are plain JSON numbers; NaN and the
infinities are written as the strings "NaN", "Infinity", "-Infinity".
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any, Literal, NamedTuple

from pydantic import BaseModel, ConfigDict, PrivateAttr, ValidationError

from entropy_probe.atomic import write_atomically
from entropy_probe.errors import ProbeError
from entropy_probe.evidence import Evidence

SCHEMA_VERSION = 1

Status = Literal["pass", "fail", "inconclusive", "not_applicable"]


MOST_WITHOUT_ADVANTAGE = 0.8
"""From this share of prompts on, an update batch says next to nothing about the update."""


class _Section(BaseModel):
    model_config = ConfigDict(
        frozen=True, extra="forbid", ser_json_inf_nan="strings", protected_namespaces=()
    )


class OptimizerSection(_Section):
    """The optimizer as the checkpoint recorded it; `covered` of `total` trainable tensors have a second moment.

    `saved`: how many tensors stand under each set of hyper-parameters in the file; `read`: how many were taken with it.
    `no_second_moment`: why there are neither P nor v, where the optimizer is not Adam; `total` counts what it trains.
    """

    type: str
    lr: float | None
    betas: tuple[float, float] | None
    eps: float | None
    weight_decay: float | None
    step: int | None
    covered: int
    total: int
    saved: dict[str, int]
    read: dict[str, int]
    no_second_moment: str | None = None


class CheckpointSection(_Section):
    """`warnings`: what was found out about the checkpoint rather than read, a line each. `device_map`: the device of
    each module, where they are not all on one."""

    name: str
    path: str
    fingerprint: str
    model_type: str
    num_parameters: int
    num_trainable: int
    weights_dtype: str
    adapter: str | None
    global_step: int | None
    optimizer: OptimizerSection
    warnings: list[str]
    device_map: dict[str, str] | None

    @property
    def step(self) -> int | None:
        """The trainer's steps, or the optimizer's where the trainer wrote none down."""
        return self.optimizer.step if self.global_step is None else self.global_step


class BatchSection(_Section):
    """One batch of responses: `num_responses` of each prompt, or of the one that has most of them, `total_responses` in
    all. `num_tokens` counts the scored tokens, `mean_reward_se` needs two prompts. `given` is the file that was asked
    for, or `sampled`. `early_eos` counts the responses with an EOS before their last token, `unended` those that end
    neither with one nor at the length limit (`None` where the limit is not known, or stop strings end responses too).
    `fingerprint` is the SHA-256 of all token ids, the rewards, and the advantages of the file, `prompts_fingerprint` of
    the token ids of the prompts alone. `advantages`: `given` in the file, `weights` where it has those of tokens, or by
    the `recipe`. `reward` names what gave the rewards, or is `file`; `stand_in` says nothing of the policy. Where
    `prompts_are_builtin` nobody chose them, and the entropy is that on other questions than the policy's. `found`
    says what was odd about prompts and ids, and what was done.
    """

    num_prompts: int
    num_responses: int
    total_responses: int
    num_tokens: int
    source: str
    same_batch: bool
    mean_reward: float
    mean_reward_se: float | None
    zero_advantage_fraction: float
    missing_gold: int
    given: str
    early_eos: int
    unended: int | None
    fingerprint: str
    prompts_fingerprint: str
    advantages: str
    reward: str
    prompts_are_builtin: bool
    found: list[str]


class RecipeSetting(_Section):
    value: float | int | bool | str | None
    source: str


class RecipeSection(_Section):
    """Whose update this is: the recipe's `name`, the file that says so, and every part with where it is from.

    `not_reproduced`: what the trainer does and the probe does not, in sentences; `unread`: files with settings that
    could not be read.
    """

    name: str
    source: str
    settings: dict[str, RecipeSetting]
    not_reproduced: list[str]
    unread: list[str]

    @property
    def changed(self) -> bool:
        """Whether a part was set by the key `recipe`, beside the name."""
        return any(setting.source == "configuration" for setting in self.settings.values())

    def lines(self) -> list[str]:
        """For the eye: the name, what is set otherwise than in the notes and by whom, and what is left out."""
        by_source: dict[str, list[str]] = {}
        for key, setting in self.settings.items():
            if setting.source != "default":
                value = setting.value
                shown = f"{value:g}" if isinstance(value, float) else str(value)
                by_source.setdefault(setting.source, []).append(f"{key} {shown}")
        lines = [f"{self.name} ({self.source})"]
        lines += [f"{source}: {', '.join(parts)}" for source, parts in by_source.items()]
        if self.not_reproduced:
            lines.append(f"not reproduced: {' '.join(self.not_reproduced)}")
        return lines + [f"left unread: {trouble}" for trouble in self.unread]


class SamplingSection(_Section):
    """The shares of the responses of two prompts that the same seed, and another seed, draw again."""

    same_seed: float
    other_seed: float


class Estimate(_Section):
    value: float
    se: float


class Part(_Section):
    """What a group of tensors adds to δH₁. `se` is `None` where a single unit does not tell it."""

    value: float
    se: float | None


class EntropySection(_Section):
    """Ĥ per sequence (naive −S, and Rao-Blackwell R) and per token (ΣR/ΣT), in nats.

    `rb_q` is the Rao-Blackwell entropy of what was sampled from, π cut to its nucleus; equal to `rb` at top_p = 1.
    `surprise` is Σ_t(−log q_t − H(q_t)), with its standard error under q: a martingale, so that it is 0 in expectation,
    whatever ends a response, if the responses come from q. `rb_by_prompt`: mean of R over the responses of each prompt.
    `surprises` counts the tokens that were less likely than not: where a policy has next to none, the responses are all
    but one, and no standard error that comes from their spread holds. `per_token_by_prompt`: what each prompt says of
    `per_token`, Ĥ + (R − ĤT)/mean T averaged over its responses: the mean is the value, sd/√B the SE.
    """

    naive: Estimate
    rb: Estimate
    rb_q: Estimate
    surprise: Estimate
    per_token: Estimate
    rb_by_prompt: list[float]
    per_token_by_prompt: list[float]
    surprises: int


class Parts(_Section):
    """δH₁ as a sum over groups of tensors, by layer, by kind of module, and by what of a module is trained (LoRA's
    factors, the whole weight): each of the three adds up to δH₁. The SE of a part is by the formula of the whole."""

    layer: dict[str, Part]
    module: dict[str, Part]
    factor: dict[str, Part]


class UStatistic(_Section):
    """U_cross with its standard errors. `None`: too few units (the jackknife needs 3, the unbiased
    variance 5). `var_unbiased` needs all pairs of units: `None` too where several processes measured.
    """

    u_cross: float
    zeta1_plugin: float
    zeta1_jackknife: float | None
    se_plugin: float
    se_jackknife: float | None
    var_unbiased: float | None


class FirstOrderSection(UStatistic):
    """One batch (U) on both sides: U_cross and δH₁ = −lr·U_cross, with their standard errors.

    `interval` is U_cross ± t_{U−1}·se_plugin at 95 %; `bars_dot_plain` is X̄ᵀȲ, without P.
    `delta_h1_by_unit` and each table of `delta_h1_parts` add up to `delta_h1`.
    """

    mode: str
    estimator: str
    num_units: int
    interval: tuple[float, float]
    bars_dot: float
    bars_dot_plain: float
    diag_sum: float
    row_means: list[float]
    norm_x_sum: float
    norm_y_sum: float
    lr: float
    lr_source: str
    delta_h1: float
    delta_h1_se: float | None
    delta_h1_by_unit: list[float]
    delta_h1_parts: Parts


class TwoBatchSection(_Section):
    """E against U: bars_dot = X̄_EᵀPȲ_U, with `projections` s_k = X_kᵀPȲ_U of every unit of E (a prompt, in `exact`
    mode), `update_projections` t_m = X̄_EᵀPY_m of every unit of U, and the `interaction` s²_int of X_kᵀPY_m after both.
    Each table of `delta_h1_parts` adds up to `delta_h1`.

    Several processes never multiply all pairs: `interaction` is `None` there, and every SE but the conditional one
    counts it twice, which makes it too large by up to √2. Where U is a single unit, `interaction` and every SE but the
    conditional one are `None`: nothing is known of other batches."""

    bars_dot: float
    delta_h1: float
    delta_h1_se: float | None
    conditional_se: float | None
    projections: list[float]
    update_projections: list[float]
    interaction: float | None
    delta_h1_parts: Parts


class StepAgreement(_Section):
    """cos(v, step) and ‖v‖/‖step‖ beside a step of torch's own optimizer: the worst over the whole and over every
    parameter, and which one that was.

    Cosine 1 and ratio 1 where nothing moves; NaN without parameters.
    """

    cosine_with_optimizer_step: float | None
    norm_ratio_with_optimizer_step: float | None
    worst_parameter: str | None


class UpdateSection(StepAgreement):
    """The update direction v = v₀ + D·Ȳ per unit learning rate, and the slope of the entropy along it on the E batch.

    `estimators` holds the slope by every estimator of the entropy gradient; `delta_h1_per_lr_rb` is the one with
    `baseline`, which is also that of the curvature and of `delta_h_pd`. `eta_star` belongs to what is predicted:
    the slope cross-fitted where one batch serves as both, per token where `true_delta_h.normalize` says so.
    `slope_of_change` is the derivative at η = 0 of the estimator behind `delta_h_rb` itself, at top_p = 1, and
    `slope_of_change_size` the sum of the absolute values of its terms; `slope_of_change_per_token` that of
    `delta_h_per_token`; `curvature_of_change` is the second derivative of the former, and the size of its terms.
    `slope_of_v0` = −X̄ᵀv₀ (momentum and decay) and `slope_by_unit` = −X̄ᵀD·Y_u·(its share of the prompts), for every
    unit of the U batch, add up to −X̄ᵀv; `slope_rounding` is what the precision leaves of it: eps·max(1, |z|)·|D_v z| of
    the logits z at every token, by the weights of the slope; `slope_of_change_rounding` the same of `slope_of_change`.
    `num_kinked` responses had a jump or a kink within the step of their second derivative, which was made shorter.

    `clip_factor` is what clipping multiplied the gradient of `grad_norm` by; `grad_norm_logged` is the last that the
    trainer wrote down, of a step before. `momentum_share` = v₀ᵀv/‖v‖²: what of v was decided before this batch.
    `spread_over_batches` is the standard deviation, over U batches of this size, of the entropy's first-order change by
    the step, lr·slope, from that over the units of this one: −lr·X̄ᵀD·Y_u. The same per token, where X̄ is the gradient
    of the entropy per token, so that −X̄ᵀv is `delta_h1_per_lr_per_token`.
    """

    lr: float
    norm: float
    norm_v0: float
    grad_norm: float
    clip_factor: float
    grad_norm_logged: float | None
    momentum_share: float
    delta_h1_per_lr_naive: float
    delta_h1_per_lr_naive_se: float
    delta_h1_per_lr_rb: float
    delta_h1_per_lr_rb_se: float
    delta_h1_per_lr_cross: float | None
    delta_h1_per_lr_cross_se: float | None
    delta_h1_per_lr_cross_per_token: float | None
    delta_h1_per_lr_cross_per_token_se: float | None
    estimators: dict[str, Estimate]
    baseline: str
    slope_of_v0: float
    slope_by_unit: list[float]
    slope_rounding: float
    num_kinked: int
    spread_over_batches: float | None
    slope_of_v0_per_token: float
    slope_by_unit_per_token: list[float]
    slope_rounding_per_token: float
    spread_over_batches_per_token: float | None
    delta_h1_per_lr_per_token: float
    delta_h1_per_lr_per_token_se: float
    slope_of_change: float
    slope_of_change_size: float
    slope_of_change_rounding: float
    slope_of_change_per_token: float
    curvature_of_change: float
    curvature_of_change_size: float
    curvature: float | None
    curvature_se: float | None
    curvature_per_token: float
    curvature_per_token_se: float
    eta_star: float | None


class Look(_Section):
    """How many prompts E had, and the standard error of the change that they predicted (nats per token)."""

    num_prompts: int
    se: float


class ResolutionSection(_Section):
    """What the E batch can tell about the next step, η = lr.

    `per_token`         the change that it resolves: 2 SE of the predicted one, in nats per token
    `per_response`      the same in nats per response
    `prompts_needed`    about so many make the predicted change 2 SE: ⌈B·(2 SE/|predicted|)²⌉; `None` where it is 0
    `next_step`         95 % interval, per token, of the change by a step with another U batch of this size: the
                        predicted change ± t·√(SE² + 2·spread²), t of the fewer prompts less one; `None` where the U
                        batch was given, or has one prompt
    `target_se`         the SE that was asked for, nats per token; `looks` are the sizes of E at which it was looked
                        at, until it was reached or the prompts ended; `None` and empty where none was asked for
    """

    per_token: float
    per_response: float
    prompts_needed: int | None
    next_step: tuple[float, float] | None
    target_se: float | None
    looks: list[Look]

    @property
    def reached(self) -> bool | None:
        """Whether the SE that was asked for was reached."""
        return None if self.target_se is None else self.looks[-1].se <= self.target_se


class PredictorsSection(_Section):
    """Predictors of the entropy's change by the next step: three that need no gradient, and the parts of our own.

    `cov_logp_advantage` (Cui et al.), `steer` and `wang` are over the tokens of the U batch, of the responses that
    the step takes. A constant κ > 0 turns each into nats per token: it is fitted on earlier checkpoints of a run,
    and is not in them. Their SE is over prompts, and `None` where there is one. (`estimators/predictors.py`)

    `of_entropies` and `of_visits` add up to lr·slope per token along v on the E batch, and have nothing fitted: how the
    entropies of the steps change, lr·mean[D_vR]/mean T, and how it changes which steps are visited. The same per
    response. Where one batch serves as both, they are of that batch, and hold the noise that the update fitted.
    """

    cov_logp_advantage: float
    cov_logp_advantage_se: float | None
    steer: float
    steer_se: float | None
    wang: float
    wang_se: float | None
    of_entropies: float | None
    of_entropies_se: float | None
    of_visits: float | None
    of_visits_se: float | None
    of_entropies_per_response: float | None
    of_entropies_per_response_se: float | None
    of_visits_per_response: float | None
    of_visits_per_response_se: float | None


class RealUpdateSection(_Section):
    """The step that the trainer made from this checkpoint to the one at `path`, beside v: (θ′ − θ)/lr.

    `cosine` and `norm_ratio` (ours over theirs) of v; `gradient_cosine` and `gradient_norm_ratio` of the clipped
    gradient, which the two momenta tell where one step lies between. `rounding` and `gradient_rounding` are how far
    the stored dtypes alone can put them off, relative to their size. `own_batch`: U is the batch of that very step.
    `logged_grad_norm` is the trainer's own, before clipping, and `clip_factor` follows from it. ΔH along the real step:
    realised by importance sampling, and `predicted` by slope and curvature, as in `entropy_change`.
    """

    path: str
    steps_between: int
    own_batch: bool
    cosine: float
    norm_ratio: float
    rounding: float
    gradient_cosine: float | None
    gradient_norm_ratio: float | None
    gradient_rounding: float
    clip_factor: float | None
    logged_grad_norm: float | None
    delta_h: float
    delta_h_se: float
    delta_h_per_token: float
    delta_h_per_token_se: float
    predicted: float
    predicted_se: float
    predicted_per_token: float
    predicted_per_token_se: float


class Reweighting(_Section):
    """How the responses stand for those at θ + ηv, and whether they can.

    `ess` is that of the weights in use, `unclipped_ess_fraction` and `pareto_k` those of the weights before
    clipping. `method` is `snis`, or the fallback that was taken: `psis` (smoothed weights) or `resample`
    (fresh responses). `reliable` says whether it is to be believed: ESS/N and k̂ are within their limits and
    no weight was clipped, smoothed weights have k̂ within its limit, fresh responses need no weights.

    `restricted`: the responses were sampled at top_p < 1, and the change is that of π restricted to the
    nucleus; the slope of π's entropy predicts nothing about it.
    """

    eta: float
    ess: float
    ess_fraction: float
    unclipped_ess_fraction: float
    pareto_k: float | None
    clip_fraction: float
    log_weight_min: float
    log_weight_median: float
    log_weight_max: float
    method: str
    reliable: bool
    restricted: bool

    @property
    def plain(self) -> bool:
        """Whether the responses count as they were sampled: neither clipped, smoothed nor drawn afresh."""
        # NaN hides no row from what judges it
        return self.method == "snis" and not self.clip_fraction > 0.0


class Compared(NamedTuple):
    """The change at one η, realised and predicted, with standard errors; `None` where nothing is predicted."""

    unit: str
    realised: float
    realised_se: float
    predicted: float | None
    predicted_se: float | None
    difference: float | None
    difference_se: float | None

    @property
    def ratio(self) -> float | None:
        """Realised over predicted; `None` where that is 0."""
        return self.realised / self.predicted if self.predicted else None


class EntropyChangeRow(Reweighting):
    """The realised change at one η on the E batch.

    `delta_h` (naive) and `delta_h_rb` are by self-normalised importance sampling, `delta_h_pd` by the performance
    difference (null at top_p < 1), per response or per token, as `true_delta_h.normalize` says, with 95 % intervals;
    `delta_h_per_token` is Rao-Blackwell, `delta_h_per_token_naive` is not, and `delta_h_per_token_pd` is by the
    performance difference. The change that is reported, `realised`, is the last kind where it can be. `difference` is
    `realised` − `predicted`, `ratio` the one over the other; the same per token. `in_range` says whether the two are to
    be compared at this η: reliable, and near enough for second order, which needs ESS/N within its limit even where
    fresh responses were drawn.
    """

    delta_h: float
    delta_h_se: float
    delta_h_rb: float
    delta_h_rb_se: float
    delta_h_rb_by_prompt: list[float]
    delta_h_interval: tuple[float, float]
    delta_h_rb_interval: tuple[float, float]
    delta_h_per_token: float
    delta_h_per_token_se: float
    delta_h_per_token_interval: tuple[float, float]
    delta_h_per_token_naive: float
    delta_h_per_token_naive_se: float
    delta_h_pd: float | None
    delta_h_pd_se: float | None
    delta_h_pd_interval: tuple[float, float] | None
    delta_h_pd_by_prompt: list[float] | None
    delta_h_per_token_pd: float | None
    delta_h_per_token_pd_se: float | None
    delta_h_per_token_pd_interval: tuple[float, float] | None
    predicted: float | None
    predicted_se: float | None
    difference: float | None
    difference_se: float | None
    ratio: float | None
    in_range: bool | None
    predicted_per_token: float | None
    predicted_per_token_se: float | None
    difference_per_token: float | None
    difference_per_token_se: float | None

    @property
    def per_token(self) -> Compared:
        """The change that is reported beside the predicted one."""
        told = (self.predicted_per_token, self.predicted_per_token_se)
        off = (self.difference_per_token, self.difference_per_token_se)
        return Compared("nats/token", *self.realised_per_token, *told, *off)

    @property
    def per_response(self) -> Compared:
        """The same per response, where `true_delta_h.normalize` is `per_sequence`."""
        told = (self.predicted, self.predicted_se, self.difference, self.difference_se)
        return Compared("nats/response", *self.realised, *told)

    @property
    def realised(self) -> tuple[float, float]:
        """The change that is reported, and its standard error."""
        if self.plain and self.delta_h_pd is not None and self.delta_h_pd_se is not None:
            return self.delta_h_pd, self.delta_h_pd_se
        return self.delta_h_rb, self.delta_h_rb_se

    @property
    def realised_per_token(self) -> tuple[float, float]:
        """The same per token."""
        value, se = self.delta_h_per_token_pd, self.delta_h_per_token_pd_se
        if self.plain and value is not None and se is not None:
            return value, se
        return self.delta_h_per_token, self.delta_h_per_token_se


class RealStepSection(_Section):
    """ΔĤ_RB on a few prompts in true float64, at η = lr, in three ways: by functional override, with θ + lr·v
    written into a copy and undone, and after a step of torch's own optimizer.

    `delta_h`             ΔĤ_RB at θ + lr·v by functional override (nats)
    `virtual_difference`  |ΔĤ_RB in place − `delta_h`|, 0: the same numbers in the same operations
    `virtual_undone`      θ is back bit for bit
    `real_difference`     |ΔĤ_RB after the optimizer's step − `delta_h`|
    `real_relative`       the same over the terms that rounding acts on, Σŵ[R + T + |R − Ĥ|(|S| + T)]
    `real_seq_logp`       max_i|S_i after the optimizer's step − S_i(θ + lr·v)|/(|S_i| + T_i)

    The last two are a few ulp times what the network makes of one. T stands for tokens that are all but
    certain, where log p is smaller than its own rounding.
    """

    delta_h: float
    virtual_difference: float
    virtual_undone: bool
    real_difference: float
    real_relative: float
    real_seq_logp: float


class TaylorTests(_Section):
    """Slopes in log-log against η, on a few responses in true float64, for η from `taylor_eta_min` to
    `taylor_eta_max`.

    `logit_slope`      of ‖Δlogits‖ over the four lowest decades, 1; `logit_monotone`: it grows with η there;
                       `None` where no logit moves
    `delta_h_slope`    of |ΔĤ_RB|, 1, over η ≤ 0.02·`taylor_radius`
    `taylor_order`     of |ΔĤ_RB − η·`taylor_slope`|, 2, over η ≤ 0.1·`taylor_radius`
    `taylor_slope`     dΔĤ_RB/dη at 0 of this estimator on these responses, from a JVP
    `taylor_radius`    min(2|f′|/|f″|, 3|f″|/|f‴|) of f = ΔĤ_RB(η) on these responses
    `identity_error_*` |dΔĤ/dη by five points − from a JVP|/Σ|terms|
    `trusted_eta_min`  from it to `trusted_eta_max`, the longest such stretch, ΔĤ_RB in the configured dtype is
                       within 10 % of that in float64; `None`: nowhere

    The two orders are `None` where fewer than 1.5 decades of η are left between rounding, 1e3·eps·Ĥ, and the
    end of their range; the errors where ΔĤ does not move. What comes from a JVP is `None` where an operation of
    the model has no forward-mode derivative. All of them are `None` where the budget leaves them out.
    """

    taylor_order: float | None
    logit_slope: float | None
    logit_monotone: bool | None
    delta_h_slope: float | None
    identity_error_naive: float | None
    identity_error_rb: float | None
    identity_error_per_token: float | None
    trusted_eta_min: float | None
    trusted_eta_max: float | None
    taylor_eta_min: float | None
    taylor_eta_max: float | None
    taylor_radius: float | None
    taylor_slope: float | None


class ContinuitySection(TaylorTests):
    """Zero check in the configured precision; ratios in true float64, normalised so that 1 is perfect."""

    zero_check_max_abs: float
    zero_check_bitwise: bool
    eta_main: float
    eta_tiny: float
    param_ratio: float
    logit_ratio: float


class WorstCase(_Section):
    """The largest |difference| of a token's log p or entropy, or of a logit, its bound from rounding, and where it was
    found."""

    worst: float
    bound: float
    example: str

    @property
    def share(self) -> float:
        """How much of its bound it takes: 0 where nothing differs, infinite for NaN and above a bound of 0."""
        if self.worst == 0:
            return 0.0
        return (
            self.worst / self.bound if self.bound > 0 and not math.isnan(self.worst) else math.inf
        )


class InvarianceOfCases(_Section):
    """What a token's scores must not depend on: padding, neighbours in the batch, pieces in which logits are read.

    Of all cases, the one nearest to its bound. `num_examples` of them were drawn; `zero_step` and `scaling` are asked
    of drawn cases alone, `None` without:

    `zero_step`   max|logits of the module − logits at θ + 0·v| in the configured dtype, bit for bit: bound 0
    `scaling`     1 − min(r, 1/r) in true float64, r = (‖Δlogits(η/1000)‖/‖Δlogits(η)‖)·1000; `None` too where
                  rounding hides what every drawn v does to the logits
    """

    padding: WorstCase
    batch: WorstCase
    chunk: WorstCase
    zero_step: WorstCase | None
    scaling: WorstCase | None
    num_examples: int


class InvarianceSection(InvarianceOfCases):
    """The same on rows of the batch and on drawn cases together; and, of the rows, the configured `precision` against
    true float64."""

    precision: WorstCase


class CacheSection(_Section):
    """Logits as sampling takes them, a token after the other, against those of whole rows, which are scored: at the
    first tokens of two responses of the E batch.

    `over_cache`  over the model's cache, both responses together; `None`: it keeps none that can be used
    `instead`     as sampling reads rows where it does not do so, and `why` not; `None` where it does
    `read`        what it does: `over the cache`, over it `with prompts of one length at a time`, `from whole rows`
    """

    read: str
    over_cache: WorstCase | None
    instead: WorstCase | None
    why: str | None


class SamplerParitySection(_Section):
    """Log-probabilities that the sampler reported against teacher forcing, per token of the E batch (KL in nats)."""

    num_tokens: int
    mean_abs_difference: float
    max_abs_difference: float
    kl: float
    k3: float
    pearson: float | None
    ratio_min: float
    ratio_mean: float
    ratio_max: float
    share_outside: float


class RegistrySection(_Section):
    """Coverage is the share of trainable tensors that received a non-zero gradient from X and from Y.

    `explained` holds the tensors without a gradient whose reason is known: name → reason. `taken_as_frozen`: those of a
    full model that the optimizer has no state of; they are not among the trainable ones.
    """

    num_tensors: int
    num_parameters: int
    x_coverage: float
    y_coverage: float
    uncovered: list[str]
    explained: dict[str, str]
    taken_as_frozen: list[str]


class MomentsMatch(_Section):
    """Pairs of tensors of one shape, by the evidence in standard errors that each holds the other's second moments.

    `exchanged` is the largest, of `exchanged_pair`; `None` where no two tensors have one shape, or no gradient is
    there. In `num_undecided` of `num_pairs`, of the tensors in `undecided` (the smallest first), an exchange would
    not be seen: the evidence against it is below 5.
    """

    exchanged: float | None
    exchanged_pair: tuple[str, str] | None
    num_pairs: int
    num_undecided: int
    undecided: list[str]


class PreconditionerSection(MomentsMatch):
    """P = 1/(√v̂+ε) over all trainable tensors: how many there are, which lack state, its range, and its largest
    relative difference from what torch's own Adam divides by."""

    num_tensors: int
    missing: list[str]
    num_nonfinite: int
    smallest: float | None
    largest: float | None
    difference_from_torch: float | None


class IntegritySection(_Section):
    """The live module's checksum before and after the run, how many of the probe's own copies (float64) did not keep
    theirs, and the buffers that any mapping overrode."""

    checksum_before: str
    checksum_after: str
    copies_modified: int
    buffers_overridden: list[str]


class DistributedSection(_Section):
    """What each of `world_size` processes sent, as a ring sends it: `bytes_sent_per_rank` for sums of gradients, counts
    and scalars, which do not grow with the batch, and `bytes_of_prompts_per_rank` for the values of its own prompts,
    responses and tokens. `sharding`: what they hold, `prompt` a model each and the gradients of their own prompts,
    `parameter` all of it together, once."""

    world_size: int
    sharding: str
    bytes_sent_per_rank: int
    bytes_of_prompts_per_rank: int


class StageMemory(_Section):
    """Bytes held when the stage began, and the most held during it; of several processes the largest of each."""

    at_start: int
    peak: int


class MemorySection(_Section):
    """`counted`: `resident`, all that the process holds in memory, or `allocated`, by torch on the device. `stages` is
    empty where neither can be known.

    Under a `limit`: the most that was `expected` when the sizes were chosen, rows at once (`tf_batch_size`), and logits
    at once in a piece, `None`: as many as without a limit.

    `recompute`: whether decoder layers are run again in gradients instead of keeping their graph. `attention` of the
    longest rows where derivatives are taken: `short` rows hold all their weights, longer ones go in `blocks` of
    queries; `whole` are the weights of long rows in a model that multiplies queries and keys itself.
    `prompts_unshared`: why scoring reads a prompt with every response, and `None` where it reads each prompt once.

    `second_order_tokens`: the most of a row in second derivatives, where longer rows were shortened for them.
    `left_out` says why there are none.
    """

    counted: Literal["resident", "allocated"]
    stages: dict[str, StageMemory]
    limit: int | None
    expected: int | None
    tf_batch_size: int
    logits_at_once: int | None
    recompute: bool
    prompts_unshared: str | None
    attention: Literal["short", "blocks", "whole"]
    second_order_tokens: int | None
    left_out: str | None

    @property
    def said(self) -> list[str]:
        """What there is to say of memory; often nothing."""
        shorter = None
        if self.second_order_tokens is not None:
            shorter = f"second derivatives are of the first {self.second_order_tokens} tokens or fewer of long rows"
        found = (self.over_limit, self.held_whole, shorter, self.left_out)
        return [said for said in found if said is not None]

    @property
    def held_whole(self) -> str | None:
        """What there is to say where the model's own attention holds what blocks would not."""
        if self.attention != "whole":
            return None
        return (
            "the model multiplies queries and keys itself: derivatives hold the attention weights of whole rows, "
            "tokens squared for each head and layer"
        )

    @property
    def peak(self) -> int | None:
        """The most held in any stage."""
        return max((stage.peak for stage in self.stages.values()), default=None)

    @property
    def over_limit(self) -> str | None:
        """What there is to say where a stage held more than the limit."""
        if self.limit is None or self.peak is None or self.peak <= self.limit:
            return None
        stage = max(self.stages, key=lambda name: self.stages[name].peak)
        return f"{stage} held {self.peak / 2**30:.3g} GiB, more than memory_limit, {self.limit / 2**30:.3g} GiB"


class Verdict(_Section):
    """What one criterion concluded from the report; `hint` says what it means and what to do. `unseen`: it was not
    asked, because rounding, kinks or a missing derivative hide what it would see. `unit`: of value and limit, where
    these are no values of the quantity itself, as of a bound that speaks of a baseline."""

    criterion: str
    family: str
    status: Status
    value: float | str | None
    limit: float | str | None
    hint: str
    unseen: bool = False
    unit: str = ""


class BaselineSection(_Section):
    """What gates compare with: the quantities of another report, with their standard errors; and what of its prompts
    and rewards nobody chose."""

    name: str
    fingerprint: str
    not_chosen: str
    quantities: dict[str, Estimate]


class ProbeReport(_Section):
    """`baseline` is added by who judges. `left_out` are the parts of the measurement that the budget left out.

    Where the optimizer is not Adam, and `no_second_moment` says so, all that needs P or v is `None`: `first_order`,
    `two_batch`, `update`, `resolution`, `preconditioner`, `real_step`; of `entropy_change` the row at η = 0 is there,
    and what `continuity` and `witness` need a direction for is along −sign(X̄), with P = 1.
    """

    schema_version: int = SCHEMA_VERSION
    probe_version: str
    checkpoint: CheckpointSection
    config: dict[str, Any]
    left_out: list[str]
    recipe: RecipeSection
    batch: BatchSection
    update_batch: BatchSection
    sampling: SamplingSection | None
    entropy: EntropySection
    first_order: FirstOrderSection | None
    two_batch: TwoBatchSection | None
    update: UpdateSection | None
    predictors: PredictorsSection
    entropy_change: list[EntropyChangeRow]
    resolution: ResolutionSection | None
    continuity: ContinuitySection
    invariance: InvarianceSection
    cache: CacheSection
    sampler_parity: SamplerParitySection | None
    witness: dict[str, float | None] | None
    real_step: RealStepSection | None
    real_step_missing: str | None
    real_update: RealUpdateSection | None
    real_update_missing: str | None
    registry: RegistrySection
    preconditioner: PreconditionerSection | None
    integrity: IntegritySection
    verdicts: list[Verdict]
    baseline: BaselineSection | None
    distributed: DistributedSection | None
    environment: dict[str, str | int]
    memory: MemorySection
    timing: dict[str, float]

    _evidence: Evidence | None = PrivateAttr(default=None)

    def __eq__(self, other: object) -> bool:
        """Whether all fields are equal; evidence is no field."""
        return isinstance(other, ProbeReport) and self.__dict__ == other.__dict__

    @property
    def evidence(self) -> Evidence | None:
        """What the numbers are made of, where it is at hand: it is kept in a file of its own, if asked for."""
        return self._evidence

    def with_evidence(self, evidence: Evidence | None) -> ProbeReport:
        """The same report beside other evidence, or beside none."""
        copy = self.model_copy()
        copy._evidence = evidence
        return copy

    @property
    def next_step(self) -> EntropyChangeRow | None:
        """The change by the optimizer's next step, η = lr; `None` where the optimizer is not Adam."""
        lr = None if self.update is None else self.update.lr
        return next((row for row in self.entropy_change if row.eta == lr), None)

    @property
    def no_second_moment(self) -> str | None:
        """Why nothing was measured that needs Adam's second moment; `None` where it was."""
        return self.checkpoint.optimizer.no_second_moment

    @property
    def not_chosen(self) -> str:
        """What nobody chose, in the words that stand beside every figure that depends on it; empty where all is the
        user's."""
        builtin = self.batch.prompts_are_builtin or self.update_batch.prompts_are_builtin
        stand_in = "stand_in" in (self.batch.reward, self.update_batch.reward)
        return {
            (True, True): "not your prompts, nor reward",
            (True, False): "not your prompts",
            (False, True): "not your reward",
        }.get((builtin, stand_in), "")

    @property
    def doubts(self) -> list[str]:
        """What must be known before a figure is read: prompts and rewards that nobody chose, an update batch that says
        nothing, and what was odd about prompts and ids."""
        said, u = [], self.update_batch
        if self.batch.prompts_are_builtin or u.prompts_are_builtin:
            said.append("built-in prompts: give yours, --probe-prompts=FILE (or rollouts)")
        if "stand_in" in (self.batch.reward, u.reward):
            said.append("stand-in reward, which says nothing about the policy: set batch.reward")
        if u.zero_advantage_fraction >= MOST_WITHOUT_ADVANTAGE:
            share = f"{u.zero_advantage_fraction:.0%} of the update's prompts have no advantage"
            said.append(f"{share}: the step is only momentum and decay")
        asked = self.config["first_order"]["lr"]
        if self.update is not None and self.checkpoint.optimizer.lr == 0 and asked is None:
            source = "lr" if self.first_order is None else self.first_order.lr_source
            kind = "initial_lr" if source.startswith("initial_lr") else "lr"
            ended = "the optimizer's lr is 0, its schedule has ended"
            said.append(f"{ended}: the step is at {kind} {self.update.lr:.3g}")
        found = {"entropy": self.batch.found} | ({} if u.same_batch else {"update": u.found})
        lines = dict.fromkeys(line for of in found.values() for line in of)
        for line in lines:
            where = [which for which, of in found.items() if line in of]
            said.append(line if where == list(found) else f"{where[0]} batch: {line}")
        if self.cache.why is not None:
            said.append(f"sampled {self.cache.read}: {self.cache.why}")
        return said

    def compared(self, row: EntropyChangeRow) -> list[Compared]:
        """The change per token, then per response, where that was asked for."""
        per_token = self.config["true_delta_h"]["normalize"] == "per_token"
        return [row.per_token] if per_token else [row.per_token, row.per_response]

    @property
    def unit_of_change(self) -> str:
        """Of the changes in `entropy_change`, as `true_delta_h.normalize` says."""
        return (
            "nats/token"
            if self.config["true_delta_h"]["normalize"] == "per_token"
            else "nats/response"
        )

    def to_json(self, path: str | Path) -> None:
        """Write the report atomically: a kill at any moment leaves the old file or the new one."""
        write_atomically(Path(path), self.model_dump_json(indent=2) + "\n")

    @classmethod
    def from_json(cls, path: str | Path) -> ProbeReport:
        try:
            text = Path(path).read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise ProbeError(path, f"cannot be read ({error})", "give a report.json") from error
        try:
            return cls.model_validate_json(text)
        except ValidationError as error:
            first = error.errors()[0]
            key = ".".join(str(part) for part in first["loc"])
            raise ProbeError(
                path, f"is not a report: {key}: {first['msg']}", "write it again with this version"
            ) from error
