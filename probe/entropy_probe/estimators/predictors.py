"""Predictors of the entropy's change that need no gradient, from the scores of the batch that makes the step; and the
two parts of the probe's own slope.

l = log p of a generated token, p = e^l, A its advantage, H the entropy of the step it was drawn at, in nats. Means are
over the tokens of the batch. Each predictor is a number that a constant κ > 0 turns into a change of the entropy per
token: it has the sign of that change, and κ, a learning rate times what the trainer does to a gradient, is not in it.

    cov_logp_advantage  −Cov(l, A)                         Cui et al., arXiv 2505.22617
    steer               −mean[A·(1 − p)·(l + H)]           arXiv 2510.10150, (A/π_old)·π·(1 − π)·(l + H) at π_old = π
    wang                −mean[A·(S_k − Σ_i p_i S_i)]       Wang et al., arXiv 2602.03392, at ratio 1; k is the token

with S_i = p_i·(H + log p_i). All three are first-order changes of the mean entropy of a *tabular* softmax, whose states
keep their weights, by a step of size 1 that moves the logits of each state

    cov_logp_advantage  by A(a)                            a natural policy gradient; of one state
    steer               by A(a)·(1 − p(a))                 every token its own logit alone
    wang                by E[A·(e_a − p)]                  a plain policy gradient

(`tests/test_predictors.py` takes these steps.) Parameters that states share, Adam, momentum, decay, and a change of
which states are visited are in none of them.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from entropy_probe.estimators.policy import NOTHING
from entropy_probe.estimators.slope import PromptMean
from entropy_probe.estimators.token_stats import rows_in_chunk

if TYPE_CHECKING:
    from jaxtyping import Bool, Float

TOKENS, LOGP, ADVANTAGE, PRODUCT, STEER, WANG = range(6)
"""The columns of `prompt_sums`."""


def mean_s(logits: Float[Tensor, "N V"], temperature: float) -> Float[Tensor, " N"]:
    """Σ_i p_i S_i = Σ_i p_i²·(H + log p_i) of π = softmax(logits/temperature), in float64, without gradient.

    With d = (logits − max)/temperature and e = exp(d), so that the entropy need not be known first:

        [Σ e²d − Σe²·Σed/Σe]/(Σe)²
    """
    parts = logits.detach().split(rows_in_chunk(logits))
    return torch.cat([_mean_s_of_rows(z.double(), temperature) for z in parts])


def _mean_s_of_rows(z: Tensor, temperature: float) -> Tensor:
    d = (z - z.amax(-1, keepdim=True)).div_(temperature).clamp_(min=NOTHING)
    e = d.exp()
    weighted, total = d.mul_(e), e.sum(-1)
    mean_d = weighted.sum(-1) / total
    weighted_squares = weighted.mul_(e).sum(-1)
    squares = e.square_().sum(-1)
    return (weighted_squares - squares * mean_d) / total.square()


def prompt_sums(
    logp: Float[Tensor, "B G T"],
    entropy: Float[Tensor, "B G T"],
    mean_s: Float[Tensor, "B G T"],
    advantages: Float[Tensor, "B G"] | Float[Tensor, "B G T"],
    counts: Bool[Tensor, "B G T"],
) -> Float[Tensor, "B 6"]:
    """Σ over the tokens of a prompt that `counts` has of: 1, l, A, l·A, A·(1 − p)·(l + H), A·(S_k − Σ_i p_i S_i)."""
    logp, entropy = logp.double(), entropy.double()
    a = (advantages if advantages.dim() == 3 else advantages[..., None]).double().expand_as(logp)
    p, above = logp.exp(), entropy + logp
    # 1 − e^l as −expm1(l): a token that is all but certain keeps its digits
    terms = (
        torch.ones_like(logp),
        logp,
        a,
        a * logp,
        -a * torch.expm1(logp) * above,
        a * (p * above - mean_s.double()),
    )
    zero = torch.zeros((), dtype=torch.float64)
    return torch.stack([torch.where(counts, of, zero).sum((1, 2)) for of in terms], -1)


@dataclass(frozen=True)
class Predicted:
    """A predictor, and its standard error over prompts; `None` where there is one prompt."""

    value: float
    se: float | None


def of_scores(sums: Float[Tensor, "B 6"]) -> dict[str, Predicted]:
    """`cov_logp_advantage`, `steer` and `wang` from the sums of all prompts.

    With N tokens in all, x̄ = Σx/N: Cov(l, A) = mean(lA) − l̄·Ā. The SE is that of ratios of sums over prompts,
    √(B/(B−1)·Σ_n e_n²)/N with what prompt n adds to the numerator less what was expected of its N_n tokens:

        mean of x   e_n = Σx − N_n·x̄
        Cov(l, A)   e_n = ΣlA − l̄·ΣA − Ā·Σl + N_n·(l̄·Ā − Cov)

    The advantages are taken as given.
    """
    total = sums.sum(0)
    count = sums[:, TOKENS]
    mean = total / total[TOKENS]
    covariance = mean[PRODUCT] - mean[LOGP] * mean[ADVANTAGE]
    of_covariance = (
        sums[:, PRODUCT]
        - mean[LOGP] * sums[:, ADVANTAGE]
        - mean[ADVANTAGE] * sums[:, LOGP]
        + count * (mean[LOGP] * mean[ADVANTAGE] - covariance)
    )
    found = {"cov_logp_advantage": Predicted(-float(covariance), _se(of_covariance, total))}
    for name, column in (("steer", STEER), ("wang", WANG)):
        off = sums[:, column] - count * mean[column]
        found[name] = Predicted(-float(mean[column]), _se(off, total))
    return found


def _se(off: Float[Tensor, " B"], total: Float[Tensor, " 6"]) -> float | None:
    prompts = len(off)
    if prompts < 2:
        return None
    spread = prompts / (prompts - 1) * float(off.square().sum())
    return math.sqrt(spread) / float(total[TOKENS])


def parts_of_slope(
    slope: PromptMean,
    d_rb_sum: Float[Tensor, "B G"],
    lengths: Float[Tensor, "B G"] | None = None,
) -> tuple[PromptMean, PromptMean]:
    """The slope of the entropy along v in two parts that add up to it, prompt by prompt: how the entropies of the steps
    change, and how it changes which steps are visited.

        per response                    mean[D_vR],                 and the rest, mean[Σ_t c_t·D_v log p_t]
        per token, with the `lengths`   mean[D_vR]/mean T,          and the rest

    The first is all that a predictor with fixed states can see. Its influence per token is (D_vR − value·T)/mean T.
    """
    if lengths is None:
        of_entropies = d_rb_sum.mean(1)
    else:
        mean_t = lengths.mean()
        value = d_rb_sum.mean() / mean_t
        of_entropies = value + ((d_rb_sum - value * lengths) / mean_t).mean(1)
    return PromptMean(of_entropies), PromptMean(slope.per_prompt - of_entropies)
