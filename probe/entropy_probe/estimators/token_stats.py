"""What the distribution behind every generated token looks like, per step and per sequence, and the features φ.

    step_diagnostics         logits → TokenStepDiagnostics: entropy, head and tail, margin, moments, .. of every step
    sequence_diagnostics     steps of one response (and its surprisals) → SequenceDiagnostics: sums, means, windows
    DistributionDiagnostics  both at once, under one sampling policy
    baseline_features        logits → φ, the seven regressors of the baseline `hk_ridge`

z are the logits as the model gave them, π = softmax(z/temperature), q is π cut to its nucleus (`policy.nucleus`) and
renormalised: what the tokens were sampled from. q = π at top_p = 1. Entropies and surprisals are in nats, 0·ln 0 = 0.
Everything is computed in float64 and carries no gradient. A logit of −∞ is a token of probability zero.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from entropy_probe.errors import ConfigError, MeasurementError
from entropy_probe.estimators.policy import NOTHING, added, float32_rounding, nucleus, score_tokens

if TYPE_CHECKING:
    from jaxtyping import Float, Int

WINDOW = 16
"""Steps in the early and in the late window of a response; all of its steps where it is shorter (then both agree)."""

MARGIN_CAP = 1e4
LOGIT_VAR = 5  # of the features φ
"""Largest margin that enters φ. Models stay far below it; a mask (−∞, or the smallest number of a dtype) does not, and
one infinite or huge entry would make the regression on φ meaningless."""

# Logits held in float64 at once: 32 MB an intermediate tensor, whatever the vocabulary and the length
_CHUNK = 1 << 22


@dataclass(frozen=True)
class TokenStepDiagnostics:
    """One number per step, float64, [.., T] each. The *head* is the nucleus at top_p < 1 and the top-1 token at
    top_p = 1; under q the nucleus holds everything, so head and tail are weighed under π.

    | field | formula |
    |---|---|
    | `rb_entropy` | H(q) = −Σ_x q(x) ln q(x) |
    | `policy_entropy` | H_t = H(π) = −Σ_x π(x) ln π(x); equal to `rb_entropy` at top_p = 1 |
    | `head_mass` | s = Σ_{x in head} π(x) |
    | `tail_mass` | 1 − s, summed over the tail itself: a tail of 1e-30 does not read 0 |
    | `two_point_entropy` | −s ln s − (1−s) ln(1−s) |
    | `top1_prob` | max_x q(x) |
    | `margin` | z₍₁₎ − z₍₂₎, largest minus second largest logit; 0 for a tie, +∞ where only one token is possible |
    | `collision` | Σ_x q(x)² |
    | `renyi2` | −ln Σ_x q(x)² |
    | `effective_support` | exp(H(q)) |
    | `logit_mean` | E_q z = Σ_x q(x) z(x) |
    | `logit_var` | Var_q z = Σ_x q(x) (z(x) − E_q z)² |
    | `eos_prob` | Σ_{x in EOS} q(x); `None` where no EOS was given, 0 where the nucleus leaves it out |
    """

    rb_entropy: Float[Tensor, "*batch T"]
    policy_entropy: Float[Tensor, "*batch T"]
    head_mass: Float[Tensor, "*batch T"]
    tail_mass: Float[Tensor, "*batch T"]
    two_point_entropy: Float[Tensor, "*batch T"]
    top1_prob: Float[Tensor, "*batch T"]
    margin: Float[Tensor, "*batch T"]
    collision: Float[Tensor, "*batch T"]
    renyi2: Float[Tensor, "*batch T"]
    effective_support: Float[Tensor, "*batch T"]
    logit_mean: Float[Tensor, "*batch T"]
    logit_var: Float[Tensor, "*batch T"]
    eos_prob: Float[Tensor, "*batch T"] | None = None


@dataclass(frozen=True)
class SequenceDiagnostics:
    """One response of T steps, in numbers. `x_mean` = (1/T) Σ_t x_t of the step's `x`, unless said otherwise.

    | field | formula |
    |---|---|
    | `gen_len` | T |
    | `rb_entropy_sum`, `_mean`, `_min`, `_max` | Σ_t H(q_t), its mean, its extremes |
    | `rb_entropy_early`, `_late` | mean of H(q_t) over the first, and over the last, min(`WINDOW`, T) steps |
    | `policy_entropy_sum` | R = Σ_t H(π_t) |
    | `naive_surprisal_sum`, `_mean` | −S = −Σ_t ln π(x_t) of the generated tokens x_t, and −S/T |
    | `naive_surprisal_var` | (1/T) Σ_t (−ln π(x_t) + S/T)²: 0 at T = 1 |
    | `head_mass_mean`, `tail_mass_mean`, `two_point_entropy_mean`, `top1_prob_mean` | means |
    | `margin_mean` | mean; +∞ if one step has only one possible token |
    | `collision_mean`, `renyi2_mean`, `effective_support_mean` | means (not functions of the mean entropy) |
    | `logit_mean_mean`, `logit_var_mean` | means |
    | `eos_prob_mean`, `_max`, `_last` | mean, maximum, and q_T(EOS) at the last step |

    Surprisals are `None` where no tokens were given, EOS fields where no EOS was.
    """

    gen_len: int
    rb_entropy_sum: float
    rb_entropy_mean: float
    rb_entropy_min: float
    rb_entropy_max: float
    rb_entropy_early: float
    rb_entropy_late: float
    policy_entropy_sum: float
    head_mass_mean: float
    tail_mass_mean: float
    two_point_entropy_mean: float
    top1_prob_mean: float
    margin_mean: float
    collision_mean: float
    renyi2_mean: float
    effective_support_mean: float
    logit_mean_mean: float
    logit_var_mean: float
    naive_surprisal_sum: float | None
    naive_surprisal_mean: float | None
    naive_surprisal_var: float | None
    eos_prob_mean: float | None
    eos_prob_max: float | None
    eos_prob_last: float | None


@dataclass(frozen=True)
class DiagnosticsPack:
    """Every step of one response, and the response as a whole."""

    step: TokenStepDiagnostics
    seq: SequenceDiagnostics


@dataclass(frozen=True)
class DistributionDiagnostics:
    """Diagnostics under the policy that was sampled from; `eos_token_id` may be several ids.

    Raises `ConfigError` for a policy that is none.
    """

    top_p: float
    temperature: float
    eos_token_id: int | Sequence[int] | None = None

    def __post_init__(self) -> None:
        _check_policy(self.top_p, self.temperature)

    def compute_from_logits(
        self,
        logits: Float[Tensor, "T V"],
        token_logp: Float[Tensor, " T"] | None = None,
        tokens: Int[Tensor, " T"] | None = None,
    ) -> DiagnosticsPack:
        """Diagnostics of one response from the logits that predict its T tokens, without padding.

        Surprisals are −`token_logp` (log π of the generated tokens, as scored elsewhere), or of `tokens` under these
        logits; `None` without either. Raises `MeasurementError` for both at once, for another length than T, for no
        step at all, for a step without a possible token, and for a token of probability zero.
        """
        if token_logp is not None and tokens is not None:
            raise MeasurementError(
                "diagnostics", "got `token_logp` and `tokens`", "give one of them"
            )
        _check_length(tokens if token_logp is None else token_logp, len(logits))
        step = step_diagnostics(logits, self.top_p, self.temperature, self.eos_token_id)
        surprisal = None if token_logp is None else -token_logp.detach().double()
        if tokens is not None:
            size = rows_in_chunk(logits)
            parts = zip(
                logits.detach().split(size), tokens.to(logits.device).split(size), strict=True
            )
            surprisal = torch.cat([_surprisal(z.double(), x, self.temperature) for z, x in parts])
        return DiagnosticsPack(step, sequence_diagnostics(step, surprisal))


def step_diagnostics(
    logits: Float[Tensor, "*batch T V"],
    top_p: float,
    temperature: float,
    eos_token_id: int | Sequence[int] | None = None,
) -> TokenStepDiagnostics:
    """Every step by itself: a step's numbers depend on its own V logits only, not on padding or on its neighbours.

    Needs V ≥ 2. Raises `ConfigError` for a policy that is none or an EOS outside the vocabulary, `MeasurementError`
    where the largest logit of a step is not finite.
    """
    _check_policy(top_p, temperature)
    vocabulary, shape = logits.shape[-1], logits.shape[:-1]
    eos = [eos_token_id] if isinstance(eos_token_id, int) else list(eos_token_id or ())
    if any(not 0 <= token < vocabulary for token in eos):
        raise ConfigError(
            "eos_token_id",
            f"is {eos_token_id}, the logits have {vocabulary} entries",
            "give an id below that number",
        )
    rows = logits.detach().reshape(-1, vocabulary)
    parts = [
        _of_rows(part.double(), top_p, temperature, eos)
        for part in rows.split(rows_in_chunk(logits))
    ]
    return TokenStepDiagnostics(
        **{name: torch.cat([part[name] for part in parts]).reshape(shape) for name in parts[0]}
    )


def _of_rows(z: Tensor, top_p: float, temperature: float, eos: list[int]) -> dict[str, Tensor]:
    """The fields of `TokenStepDiagnostics` for logits [R, V] in float64."""
    top = z.amax(-1, keepdim=True)
    if not bool(torch.isfinite(top).all()):
        row = int((~torch.isfinite(top[:, 0])).nonzero()[0])
        raise MeasurementError(
            "logits",
            f"the largest logit of a step is {float(top[row])}",
            "use a checkpoint and masks that leave a finite one",
        )
    # before the division: the difference of two logits of size 1e4 is exact, that of their quotients is not
    below_top = z - top
    logp = torch.log_softmax(below_top / temperature, dim=-1)
    p = logp.exp()
    if top_p < 1.0:
        head = nucleus(logp, top_p, rounding=float32_rounding(top[:, 0], temperature))
        logq = torch.log_softmax(
            (below_top / temperature).masked_fill(~head, float("-inf")), dim=-1
        )
        q = logq.exp()
    else:
        head = torch.zeros_like(p, dtype=torch.bool).scatter(-1, p.argmax(-1, keepdim=True), True)
        logq, q = logp, p
    head_mass, tail_mass = (
        p.masked_fill(outside, 0.0).sum(-1).clamp(max=1.0) for outside in (~head, head)
    )
    smaller = torch.minimum(head_mass, tail_mass)
    entropy = _entropy(q, logq)
    collision = q.square().sum(-1).clamp(max=1.0)
    # a token of q = 0 may have a logit of −∞ or −3e38
    below_top = below_top.masked_fill(q == 0.0, 0.0)
    mean_below_top = (q * below_top).sum(-1, keepdim=True)
    largest = z.topk(2, dim=-1).values
    return {
        "rb_entropy": entropy,
        "policy_entropy": _entropy(p, logp),
        "head_mass": head_mass,
        "tail_mass": tail_mass,
        "two_point_entropy": -torch.xlogy(smaller, smaller)
        - (1.0 - smaller) * torch.log1p(-smaller),
        "top1_prob": q.amax(-1),
        "margin": largest[:, 0] - largest[:, 1],
        "collision": collision,
        "renyi2": (1.0 / collision).log(),
        "effective_support": entropy.exp(),
        "logit_mean": (top + mean_below_top).squeeze(-1),
        "logit_var": (q * (below_top - mean_below_top).square()).sum(-1),
    } | ({"eos_prob": q[:, sorted(set(eos))].sum(-1)} if eos else {})


def _surprisal(z: Tensor, tokens: Tensor, temperature: float) -> Tensor:
    return -score_tokens((z - z.amax(-1, keepdim=True))[None], tokens[None], temperature, 1.0).logp[
        0
    ]


def _entropy(p: Tensor, logp: Tensor) -> Tensor:
    return (p * -logp.masked_fill(p == 0.0, 0.0)).sum(-1)


def rows_in_chunk(logits: Tensor) -> int:
    """Rows of logits that are taken at a time."""
    return max(1, _CHUNK // logits.shape[-1])


def _check_policy(top_p: float, temperature: float) -> None:
    if not 0.0 < top_p <= 1.0:
        raise ConfigError("top_p", f"is {top_p}", "give a number above 0 and at most 1")
    if not 0.0 < temperature < float("inf"):
        raise ConfigError("temperature", f"is {temperature}", "give a finite number above 0")


def _check_length(given: Tensor | None, steps: int) -> None:
    if given is not None and len(given) != steps:
        raise MeasurementError(
            "diagnostics",
            f"{len(given)} tokens for {steps} steps of logits",
            "give one for each step",
        )


def sequence_diagnostics(
    step: TokenStepDiagnostics, surprisal: Float[Tensor, " T"] | None = None
) -> SequenceDiagnostics:
    """Aggregate the T steps of one response; `surprisal` is −ln π of its tokens.

    Raises `MeasurementError` for T = 0, for a surprisal that is not finite, and for another number of surprisals.
    """
    entropy = step.rb_entropy
    steps = entropy.shape[0]
    if steps == 0:
        raise MeasurementError(
            "diagnostics", "the response has no token", "leave out empty responses"
        )
    _check_length(surprisal, steps)
    if surprisal is not None and not bool(torch.isfinite(surprisal).all()):
        at = int((~torch.isfinite(surprisal)).nonzero()[0])
        raise MeasurementError(
            "diagnostics",
            f"the surprisal of token {at} is {float(surprisal[at])}",
            "give the tokens that these logits predict, and their log-probabilities",
        )
    eos = step.eos_prob
    return SequenceDiagnostics(
        gen_len=steps,
        rb_entropy_sum=float(entropy.sum()),
        rb_entropy_mean=float(entropy.mean()),
        rb_entropy_min=float(entropy.min()),
        rb_entropy_max=float(entropy.max()),
        rb_entropy_early=float(entropy[:WINDOW].mean()),
        rb_entropy_late=float(entropy[-WINDOW:].mean()),
        policy_entropy_sum=float(step.policy_entropy.sum()),
        head_mass_mean=float(step.head_mass.mean()),
        tail_mass_mean=float(step.tail_mass.mean()),
        two_point_entropy_mean=float(step.two_point_entropy.mean()),
        top1_prob_mean=float(step.top1_prob.mean()),
        margin_mean=float(step.margin.mean()),
        collision_mean=float(step.collision.mean()),
        renyi2_mean=float(step.renyi2.mean()),
        effective_support_mean=float(step.effective_support.mean()),
        logit_mean_mean=float(step.logit_mean.mean()),
        logit_var_mean=float(step.logit_var.mean()),
        naive_surprisal_sum=None if surprisal is None else float(surprisal.sum()),
        naive_surprisal_mean=None if surprisal is None else float(surprisal.mean()),
        naive_surprisal_var=None if surprisal is None else float(surprisal.var(correction=0)),
        eos_prob_mean=None if eos is None else float(eos.mean()),
        eos_prob_max=None if eos is None else float(eos.max()),
        eos_prob_last=None if eos is None else float(eos[-1]),
    )


def baseline_features(
    logits: Float[Tensor, "*batch T V"], top_p: float, temperature: float, max_new_tokens: int
) -> Float[Tensor, "*batch T 7"]:
    """φ_t of the baseline `hk_ridge`, float64, without gradient, in this order:

        H(π_t), top-1 of q_t, min(margin, MARGIN_CAP), head mass s, entropy of (s, 1−s), Var_q(z), t/max_new_tokens

    t counts from 0. The position is relative to the length *limit*: a baseline must be a function of the prefix, and
    the length of the response itself is not (with t/T the slope is biased). So padding changes nothing either.
    """
    return features_of_steps(step_diagnostics(logits, top_p, temperature), max_new_tokens)


def features_of_steps(
    step: TokenStepDiagnostics, max_new_tokens: int
) -> Float[Tensor, "*batch T 7"]:
    """`baseline_features` from diagnostics that are there already."""
    return with_position(step_features(step), max_new_tokens)


def step_features(step: TokenStepDiagnostics) -> Float[Tensor, "*batch T 6"]:
    """φ_t without its last entry: what one step knows by itself."""
    margin = step.margin.clamp(max=MARGIN_CAP)
    # LOGIT_VAR is the place of the last
    features = (
        step.policy_entropy,
        step.top1_prob,
        margin,
        step.head_mass,
        step.two_point_entropy,
        step.logit_var,
    )
    return torch.stack(features, dim=-1)


def features_of_logits(
    logits: Float[Tensor, "R V"], top_p: float, temperature: float
) -> Float[Tensor, "R 6"]:
    """`step_features(step_diagnostics(logits, top_p, temperature))`, by these alone where q = π: in the dtype of the
    logits, with sums in float64, in a seventh of the time.

        d = (z − max z)/temperature,  e = exp d,  s = 1/Σe,  Var z = temperature²·[Σed²/Σe − (Σed/Σe)²]
    """
    if top_p < 1.0:
        return step_features(step_diagnostics(logits, top_p, temperature))
    _check_policy(top_p, temperature)
    return torch.cat(
        [_features_of_rows(z, temperature) for z in logits.detach().split(rows_in_chunk(logits))]
    )


# Probabilities of float32 end at 1e-45, and have few digits below 1e-38; entropies, of float64, go on to 1e-305.
_FAINT = 1e-30


def _features_of_rows(z: Tensor, temperature: float) -> Float[Tensor, "R 6"]:
    largest, places = z.topk(2, dim=-1)
    d = (z - largest[:, :1]).div_(temperature).clamp_(min=NOTHING)
    e = d.exp().scatter_(
        -1, places[:, :1], 0.0
    )  # of the others: 1 − s is known where s is all but 1
    others = added(e, torch.float64)
    faint = others < _FAINT
    total = 1.0 + others
    weighted = e.mul_(d)
    mean = added(weighted, torch.float64) / total
    square = added(weighted.mul_(d), torch.float64) / total
    head, tail = 1.0 / total, others / total
    smaller = torch.minimum(head, tail)
    of_two = -torch.xlogy(smaller, smaller) - (1.0 - smaller) * torch.log1p(-smaller)
    margin = (largest[:, 0].double() - largest[:, 1].double()).clamp(max=MARGIN_CAP)
    variance = temperature**2 * (square - mean.square()).clamp(min=0.0)
    found = torch.stack([others.log1p() - mean, head, margin, head, of_two, variance], -1)
    if z.dtype != torch.float64 and faint.any():
        found[faint] = _features_of_rows(z[faint].double(), temperature)
    return found


def with_position(
    features: Float[Tensor, "*batch T 6"], max_new_tokens: int
) -> Float[Tensor, "*batch T 7"]:
    """φ_t with t/max_new_tokens for its last entry."""
    position = (
        torch.arange(features.shape[-2], device=features.device, dtype=features.dtype)
        / max_new_tokens
    )
    return torch.cat([features, position[:, None].expand(*features.shape[:-1], 1)], dim=-1)
