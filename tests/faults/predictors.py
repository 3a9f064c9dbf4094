"""Faults of the predictors that stand beside the probe's own figures."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

from torch import Tensor

from entropy_probe.estimators import predictors
from entropy_probe.estimators.predictors import ADVANTAGE, LOGP, PRODUCT, STEER, TOKENS, WANG
from faults.catalogue import Patch, everywhere, then
from faults.more import FIGURE, fault


def columns(patch: Patch, change: Any) -> None:
    """Change the sums of the prompts that the predictors are made of."""

    def changed(sums: Tensor) -> Tensor:
        sums = sums.clone()
        change(sums)
        return sums

    then(patch, predictors.prompt_sums, changed)


@fault("temperature", "plain_forward")
def mean_of_s_at_temperature_1(patch: Patch) -> None:
    """Σ_i p_i S_i belongs to the policy before its temperature. log p and H do not."""
    original = predictors.mean_s
    everywhere(patch, original, lambda logits, _: original(logits, 1.0))


@fault("llama", "plain_forward")
def mean_of_s_is_the_collision(patch: Patch) -> None:
    """Σ_i p_i² is used in place of Σ_i p_i S_i."""
    everywhere(patch, predictors.mean_s, lambda logits, t: (logits.double() / t).softmax(-1).square().sum(-1))


@fault("llama", FIGURE)
def covariance_is_not_centred(patch: Patch) -> None:
    """mean(A·log p) is published as the covariance. If responses differ in length, the mean of A is not 0."""

    def change(sums: Tensor) -> None:
        sums[:, LOGP] = 0.0

    columns(patch, change)


@fault("llama", FIGURE)
def covariance_has_the_other_sign(patch: Patch) -> None:
    """Cov is published in place of −Cov: the predictor lacks the sign of the change."""
    then(patch, predictors.of_scores, lambda found: found | {"cov_logp_advantage": _negated(found)})


def _negated(found: Any) -> Any:
    of = found["cov_logp_advantage"]
    return dataclasses.replace(of, value=-of.value)


@fault("llama", FIGURE)
def steer_and_wang_exchanged(patch: Patch) -> None:
    """The two predictors have each other's name."""

    def change(sums: Tensor) -> None:
        sums[:, [STEER, WANG]] = sums[:, [WANG, STEER]]

    columns(patch, change)


@fault("llama", FIGURE)
def predictors_of_prompts_not_of_tokens(patch: Patch) -> None:
    """Every prompt has the same weight, however many tokens it has."""

    def change(sums: Tensor) -> None:
        sums[:, [LOGP, ADVANTAGE, PRODUCT, STEER, WANG]] /= sums[:, [TOKENS]]
        sums[:, TOKENS] = 1.0

    columns(patch, change)


@fault("llama", FIGURE)
def errors_of_predictors_without_bessel(patch: Patch) -> None:
    """SEs of the predictors lack √(B/(B−1))."""
    original = predictors._se
    everywhere(patch, original, lambda off, total: original(off, total) * math.sqrt((len(off) - 1) / len(off)))


@fault("llama", FIGURE)
def parts_of_the_slope_exchanged(patch: Patch) -> None:
    """The part of the entropies and the part of the visits are exchanged. Their sum is the same."""
    then(patch, predictors.parts_of_slope, lambda parts: parts[::-1])


@fault("one batch", FIGURE)
def parts_of_the_slope_without_the_mean_length(patch: Patch) -> None:
    """The part of the entropies per response is published as the one per token."""
    original = predictors.parts_of_slope
    everywhere(patch, original, lambda slope, d_r, lengths=None: original(slope, d_r))
