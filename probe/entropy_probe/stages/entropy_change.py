"""The realised entropy change ΔH(η) on the same responses, over a grid of η."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from entropy_probe import report as r
from entropy_probe.config import ProbeConfig
from entropy_probe.errors import ConfigError
from entropy_probe.estimators import importance, performance_difference, prediction
from entropy_probe.estimators.baselines import chosen
from entropy_probe.model.forward import BoundModel
from entropy_probe.model.precision import numerics
from entropy_probe.stages.gradients.units import units_of_prompts
from entropy_probe.stages.moved import moved
from entropy_probe.stages.responses.rollouts import Progress, Rollouts
from entropy_probe.stages.scores import Scores, score
from entropy_probe.stages.share import Share

if TYPE_CHECKING:
    from jaxtyping import Float

_STEPS = {"auto": (0, -0.5, -1), "fine": (0, -0.5, -1, -1.5, -2)}
"""log10 of the η of a grid over the farthest that there may be. The farthest is too long for a difference of second
order, and a hundredth of it is lost in the rounding of float32: two that agree lie between."""


@dataclass(frozen=True)
class EntropyChange:
    """ΔH(η), and what the weights of the responses are worth.

    `naive` and `rb` are by self-normalised importance sampling, `by_tokens` by the performance difference, where the
    policy is not cut to its nucleus: per response or per token, as `true_delta_h.normalize` says; the others are per
    token always. `after` are the scores of this process's own responses at θ + ηv; `fresh` those of all fresh
    responses, where they were drawn, and `drawn` these themselves, of the own prompts.
    """

    weights: r.Reweighting
    naive: importance.Change
    rb: importance.Change
    naive_per_token: importance.Change
    per_token: importance.Change
    by_tokens: importance.Change | None
    by_tokens_per_token: importance.Change | None
    after: Scores
    fresh: Scores | None
    drawn: Rollouts | None

    @property
    def eta(self) -> float:
        return self.weights.eta

    @property
    def realised(self) -> importance.Change:
        """The one that is reported: by tokens, unless it is asked of other weights or other responses than those as
        they are (clipped, smoothed, drawn afresh), or of the restricted policy."""
        return self.rb if self.by_tokens is None or not self.weights.plain else self.by_tokens

    @property
    def realised_per_token(self) -> importance.Change:
        """The same per token."""
        plain = self.by_tokens_per_token if self.weights.plain else None
        return self.per_token if plain is None else plain


def grid(
    config: ProbeConfig, lr: float, d_seq_logp: Tensor | None = None, reach: float = math.inf
) -> list[float]:
    """The configured η; or of the smaller of lr and the η at which ESS/N is expected to fall to `min_ess_fraction`
    ± itself, a third and a tenth of it (10^−½ and 10^−1; `auto`), or ± two a decade down to a hundredth (`fine`). And
    ± `reach`, as far as slope and curvature are taken for the change, where that is smaller than all of these. η = 0
    and lr are always in it.

        ESS/N ≈ exp(−η²·Var D_vS)       (log-weights are normal and small: their variance is η²·Var D_vS)
    """
    etas = config.true_delta_h.etas
    if not isinstance(etas, str):
        return sorted({0.0, lr, *etas})
    end = lr
    if d_seq_logp is not None and float(d_seq_logp.var()) > 0:
        end = min(
            lr,
            math.sqrt(-math.log(config.true_delta_h.min_ess_fraction) / float(d_seq_logp.var()))
            or lr,
        )
    steps = [end * 10**exponent for exponent in _STEPS[etas]]
    if 0 < reach < steps[-1]:
        steps.append(reach)
    return sorted({0.0, lr, *(sign * step for step in steps for sign in (-1.0, 1.0))})


def change_at(
    scores: Scores,
    scores_after: Scores,
    eta: float,
    config: ProbeConfig,
    terms: Float[Tensor, "2 B G"] | None = None,
) -> EntropyChange:
    """log w = S(θ⁺) − log q, then ΔĤ of −S and of R; with smoothed weights where `fallback: psis` applies.

    `terms` are `performance_difference.change_terms` of all responses.
    """
    limits, log_weights = config.true_delta_h, scores_after.seq_logp - scores.seq_logq
    weights = importance.snis_weights(log_weights, limits.clip_log_weight)
    # clipped weights always look healthy: what they are worth is what the others were
    unclipped_ess = importance.snis_weights(log_weights).ess
    pareto_k = importance.pareto_k(log_weights, unclipped_ess)
    heavy_tail = pareto_k is not None and pareto_k > limits.max_pareto_k
    enough = unclipped_ess / log_weights.numel() >= limits.min_ess_fraction
    method, reliable = "snis", enough and not heavy_tail and weights.clip_fraction == 0.0
    normalised = weights.normalised
    has_tail = pareto_k is not None
    if limits.fallback == "psis" and eta != 0 and not reliable and has_tail:
        normalised = importance.snis_weights(importance.smoothed(log_weights)).normalised
        method, reliable = "psis", not heavy_tail
    at_theta = importance.snis_weights(scores.seq_logp - scores.seq_logq, limits.clip_log_weight)
    found = r.Reweighting(
        eta=eta,
        ess=weights.ess,
        ess_fraction=weights.ess / log_weights.numel(),
        unclipped_ess_fraction=unclipped_ess / log_weights.numel(),
        pareto_k=pareto_k,
        clip_fraction=weights.clip_fraction,
        log_weight_min=float(log_weights.min()),
        log_weight_median=float(log_weights.median()),
        log_weight_max=float(log_weights.max()),
        method=method,
        reliable=reliable,
        restricted=config.generation.top_p < 1.0,
    )
    changes = _changes(scores, scores_after, at_theta.normalised, normalised, config)
    by_tokens = per_token = None
    if terms is not None and not found.restricted:
        by_tokens, per_token = _by_tokens(scores, terms, config)
    return EntropyChange(
        found,
        **changes,
        by_tokens=by_tokens,
        by_tokens_per_token=per_token,
        after=scores_after,
        fresh=None,
        drawn=None,
    )


def _by_tokens(
    scores: Scores, terms: Float[Tensor, "2 B G"], config: ProbeConfig
) -> tuple[importance.Change, importance.Change]:
    """As `true_delta_h.normalize` says, and per token."""
    rb_sum, lengths = scores.rb_sum, scores.gen_lens.double()
    per_token = performance_difference.change_per_token(terms, rb_sum, lengths)
    change = per_token
    if config.true_delta_h.normalize == "per_sequence":
        change = performance_difference.change_per_response(terms, rb_sum)
    return change, per_token


def _changes(
    before: Scores,
    after: Scores,
    weights_before: Tensor,
    weights_after: Tensor,
    config: ProbeConfig,
) -> dict[str, importance.Change]:
    """ΔĤ of −S and of R, as `true_delta_h.normalize` says and per token."""
    lengths = before.gen_lens.double(), after.gen_lens.double()

    def change(of_before: Tensor, of_after: Tensor, *, per_token: bool) -> importance.Change:
        units = lengths if per_token else None
        return importance.entropy_change(of_before, of_after, weights_before, weights_after, units)

    per_token = config.true_delta_h.normalize == "per_token"
    return {
        "naive": change(-before.seq_logp, -after.seq_logp, per_token=per_token),
        "rb": change(before.rb_sum, after.rb_sum, per_token=per_token),
        "naive_per_token": change(-before.seq_logp, -after.seq_logp, per_token=True),
        "per_token": change(before.rb_sum, after.rb_sum, per_token=True),
    }


def sweep(
    bound: BoundModel,
    share: Share,
    scores: Scores,
    v: Mapping[str, Tensor],
    etas: Sequence[float],
    config: ProbeConfig,
    progress: Progress | None = None,
    redraw: Callable[[Mapping[str, Tensor]], Rollouts] | None = None,
    *,
    tokens: Scores | None = None,
    coefficients: Float[Tensor, "2 b G t"] | None = None,
) -> list[EntropyChange]:
    """ΔH at θ + ηv for every η: one scoring pass each, with only the parameters in v replaced, one copy at a time.

    `scores` are those of all responses, `tokens` those of the own, with `performance_difference.coefficients`, without
    which there is no change by tokens.
    Where the weights are not to be believed, fresh responses of the same prompts are drawn at θ + ηv by `redraw`,
    if it is given, and scored there.
    """
    changes = []
    for done, eta in enumerate(etas, start=1):
        override = moved(bound, v, eta, share.world)
        after = score(bound, share.own, config, override)
        terms = None
        if tokens is not None and coefficients is not None:
            before = tokens.token_logp, tokens.rb_entropy
            own = performance_difference.change_terms(
                *before, after.token_logp, after.rb_entropy, coefficients
            )
            terms = torch.stack(share.whole(torch.stack([*own], -1)).unbind(-1))
        change = change_at(scores, share.scores(after), eta, config, terms)
        change = replace(change, after=after)
        # below top_p = 1 fresh responses would measure another entropy than the weighted ones do
        believed = change.weights.reliable or change.weights.restricted
        to_redraw = redraw is not None and eta != 0 and not believed
        if redraw is not None and share.world.any(to_redraw):
            drawn = redraw(override)
            fresh = share.scores(score(bound, drawn, config, override))
            change = replace(resampled(change, scores, fresh, config), drawn=drawn)
        changes.append(change)
        del override
        if progress is not None:
            progress("entropy change", done, len(etas))
    return changes


def resampled(
    change: EntropyChange, scores: Scores, fresh: Scores, config: ProbeConfig
) -> EntropyChange:
    """Mean over fresh responses at θ⁺ minus mean over those at θ, of the same prompts: no importance weights."""
    even = torch.full_like(scores.seq_logp, 1.0 / scores.seq_logp.numel())
    found = change.weights.model_copy(update={"method": "resample", "reliable": True})
    changes = _changes(scores, fresh, even, even, config)
    return replace(change, weights=found, **changes, fresh=fresh)


def change_row(
    change: EntropyChange,
    predicted: prediction.Prediction | None,
    of_tokens: prediction.Prediction | None,
    reach: float,
    min_ess: float,
) -> r.EntropyChangeRow:
    """The row of the report, beside what is `predicted`, which holds up to η = `reach`, and `of_tokens`, the same per
    token."""
    near = abs(change.eta) <= reach and change.weights.unclipped_ess_fraction >= min_ess
    by_tokens, of_token = change.by_tokens, change.by_tokens_per_token
    row = r.EntropyChangeRow(
        **change.weights.model_dump(),
        delta_h=change.naive.value,
        delta_h_se=change.naive.se,
        delta_h_rb=change.rb.value,
        delta_h_rb_se=change.rb.se,
        delta_h_rb_by_prompt=change.rb.influence.mean(1).tolist(),
        delta_h_interval=change.naive.interval(),
        delta_h_rb_interval=change.rb.interval(),
        delta_h_per_token=change.per_token.value,
        delta_h_per_token_se=change.per_token.se,
        delta_h_per_token_interval=change.per_token.interval(),
        delta_h_per_token_naive=change.naive_per_token.value,
        delta_h_per_token_naive_se=change.naive_per_token.se,
        delta_h_pd=by_tokens and by_tokens.value,
        delta_h_pd_se=by_tokens and by_tokens.se,
        delta_h_pd_interval=by_tokens and by_tokens.interval(),
        delta_h_pd_by_prompt=by_tokens and by_tokens.influence.mean(1).tolist(),
        delta_h_per_token_pd=of_token and of_token.value,
        delta_h_per_token_pd_se=of_token and of_token.se,
        delta_h_per_token_pd_interval=of_token and of_token.interval(),
        predicted=None,
        predicted_se=None,
        difference=None,
        difference_se=None,
        ratio=None,
        in_range=None,
        predicted_per_token=of_tokens and of_tokens.value,
        predicted_per_token_se=of_tokens and of_tokens.se,
        difference_per_token=of_tokens and of_tokens.difference,
        difference_per_token_se=of_tokens and of_tokens.difference_se,
    )
    if predicted is None:
        return row
    value = change.realised.value
    beside = {
        "predicted": predicted.value,
        "predicted_se": predicted.se,
        "difference": predicted.difference,
        "difference_se": predicted.difference_se,
        "ratio": value / predicted.value if predicted.value != 0 else None,
        "in_range": change.weights.reliable and near,
    }
    return row.model_copy(update=beside)


def entropy_change_two_batch_vector(
    bound: BoundModel,
    rollouts: Rollouts,
    *,
    update_vector_named: Mapping[str, Tensor],
    etas: Sequence[float],
    config: ProbeConfig | None = None,
) -> dict[str, Any]:
    """The notes' verb: `{H_orig, H_upd_list, etas, deltaH_true_list, snis_diagnostics}` (Rao-Blackwell by importance
    sampling, nats).

    No optimizer step: θ + ηv by functional override on the E batch, with v from the U batch. At top_p < 1 all entropies
    are of the policy restricted to the nucleus. Raises `ConfigError` for `fallback: resample`, which needs what
    `run_probe` has: a tokenizer and a seed.
    """
    config = config or ProbeConfig()
    if config.true_delta_h.fallback == "resample":
        raise ConfigError(
            "true_delta_h.fallback",
            "`resample` is not offered here",
            "use run_probe, or psis or none",
        )
    with numerics(config.precision, sum(p.numel() for p in bound.registry.parameters.values())):
        baseline = chosen(config.first_order.baseline)
        scores = score(bound, rollouts, config, with_features=baseline == "hk_ridge")
        alone = Share.of(rollouts, units_of_prompts(rollouts))
        c = performance_difference.coefficients(
            scores.rb_entropy, scores.gen_lens, baseline, scores.features
        )
        own = {"tokens": scores, "coefficients": c}
        changes = sweep(bound, alone, scores, update_vector_named, etas, config, **own)
        still = change_at(scores, scores, 0.0, config).rb
    return {
        "H_orig": still.before,
        "H_upd_list": [still.before + change.rb.value for change in changes],
        "etas": list(etas),
        "deltaH_true_list": [change.rb.value for change in changes],
        "snis_diagnostics": [_diagnostics(change.weights) for change in changes],
    }


def _diagnostics(weights: r.Reweighting) -> dict[str, Any]:
    same = ("ess_fraction", "pareto_k", "clip_fraction", "method", "reliable")
    return {"ESS": weights.ess} | {name: getattr(weights, name) for name in same}
