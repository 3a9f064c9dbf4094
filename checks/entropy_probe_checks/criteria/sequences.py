"""A score depends on the sequence alone."""

from __future__ import annotations

import math

from entropy_probe import ProbeReport
from entropy_probe.report import WorstCase
from entropy_probe_checks.criteria.verdicts import (
    ENOUGH_SURPRISES,
    Criterion,
    Finding,
    at_least,
    at_most,
    in_se,
    inconclusive,
    largest,
    not_applicable,
)
from entropy_probe_checks.thresholds import limit_for
from entropy_probe_checks.uniform import departures

_FEW_NATS = 1.0  # per response: four and more responses of two prompts may well be the same


@Criterion
def padding_invariance(report: ProbeReport) -> Finding:
    """Largest |difference| of a token's log p or entropy between unpadded, right-padded and left-padded rows, in true
    float64 and in the configured precision: of the two, the one nearer to its bound.

    Padding changes a score: positions count padding, the mask lets it through, or the model does not honour
    attention_mask and position_ids.
    """
    return _within_rounding(report.invariance.padding)


@Criterion
def batch_invariance(report: ProbeReport) -> Finding:
    """Largest |difference| of a token's log p or entropy between a row scored alone and among other rows.

    Rows of a batch touch each other: something in the model normalises over the batch, or the bookkeeping of the rows
    is wrong. Scores then depend on tf_batch_size. Use one row at a time (generation.tf_batch_size: 1) if that is meant.
    """
    return _within_rounding(report.invariance.batch)


@Criterion
def chunk_invariance(report: ProbeReport) -> Finding:
    """Largest |difference| of a token's log p or entropy between whole logits and pieces of a few positions.

    The output layer is not a function of one position's hidden state, so it may not be applied to some positions at a
    time: entropies and log-probabilities in this report are not the model's.
    """
    return _within_rounding(report.invariance.chunk)


def _within_rounding(measured: WorstCase) -> Finding:
    """A bound of half a nat is none, and passes nothing: rounding gives 0.05 at 80 layers and 32k tokens in float32."""
    bound = measured.bound if measured.bound < 0.5 else math.nan
    return at_most(measured.worst, bound, detail=f"[{measured.example}]")


@Criterion
def cache_agrees(report: ProbeReport) -> Finding:
    """Largest |difference| of a logit between sampling, a token after the other, and the whole rows that are scored, at
    the first tokens of two responses.

    Responses are sampled from one distribution and scored with another: an adapter or a layer depends on more than the
    model's cache holds, or on tokens that come later. Entropy, slope and importance weights are then of a policy that
    nothing was sampled from. Give rollouts of an engine that reads whole rows (--probe-rollouts).
    """
    found = report.cache
    sources = (report.batch.source, report.update_batch.source)
    if "sampled" not in sources and report.config["true_delta_h"]["fallback"] != "resample":
        return not_applicable("The responses were not sampled here.")
    measured = found.over_cache if found.instead is None else found.instead
    if measured is None:
        return not_applicable("Nothing was sampled over the model's cache.")
    return _within_rounding(measured)


@Criterion
def on_policy(report: ProbeReport) -> Finding:
    """Largest departure, in standard errors, of the responses from independent draws from q: |mean of
    Σ_t(−log q_t − H(q_t))|, and the scale and the dependence of their tokens' probability integral transforms.

    The responses are not from this policy: another temperature or top_p, another checkpoint, other prompts than the
    sampler saw, or tokens scored at the wrong positions; or responses share the noise that they were drawn with, as
    with one seed for all. Entropy, slope, importance weights or standard errors are then of something else. Give the
    settings and the checkpoint that sampled them, and every response noise of its own.
    """
    surprise = report.entropy.surprise
    found = {"surprise": in_se(surprise.value, surprise.se)}
    if report.evidence is not None:
        batches = ("e",) if report.batch.same_batch else ("e", "u")
        found |= departures(report.evidence.arrays, batches)
    value = largest(*found.values())
    name = next(name for name, of in found.items() if of == value or math.isnan(value))
    limit, seen = limit_for(report, "on_policy"), report.entropy.surprises
    if name == "surprise" and surprise.value > 0 and value > limit and seen < ENOUGH_SURPRISES:
        why = (
            f"{seen} of {report.batch.num_tokens} tokens were less likely than not: what is so rare"
        )
        return inconclusive(f"{why} has no standard error. Give more responses.", value, limit)
    detail = f"[{name}; surprise {surprise.value:+.3g} ± {surprise.se:.2g} nats/response]"
    return at_most(value, limit, detail=detail)


@Criterion
def ends_at_eos(report: ProbeReport) -> Finding:
    """Number of responses, in both batches, that go on after an EOS or end without one before the length limit.

    Tokens after the end are scored as if they had been answered, or the EOS, a decision of the policy, is not: the
    sampler does not stop, cuts the EOS off, or knows another one.
    """
    batches = (report.batch, report.update_batch)
    wrong = sum(batch.early_eos + (batch.unended or 0) for batch in batches)
    return at_most(float(wrong), limit_for(report, "ends_at_eos"))


@Criterion
def batches_as_given(report: ProbeReport) -> Finding:
    """Number of the two batches that do not come from where they were asked for: a file, or sampling.

    E and U are exchanged, or a file is not used: the update is judged on responses that it comes from.
    """
    wrong = [
        batch.source for batch in (report.batch, report.update_batch) if batch.source != batch.given
    ]
    detail = f"[{', '.join(wrong)}]" if wrong else ""
    return at_most(float(len(wrong)), limit_for(report, "batches_as_given"), detail=detail)


@Criterion
def seeded(report: ProbeReport) -> Finding:
    """Share of the responses of two prompts that come again with the same seed; with another seed some must differ.

    The seed does not decide what is sampled: two runs are not the same run, or every run draws the same responses.
    """
    drawn, limit = report.sampling, limit_for(report, "seeded")
    if drawn is None:
        return not_applicable("The responses were not sampled here.")
    if drawn.other_seed == 1.0 and drawn.same_seed == 1.0:
        known = report.entropy.rb.value < _FEW_NATS
        return Finding(
            "inconclusive" if known else "fail",
            1.0,
            limit,
            "[another seed draws the same responses]",
        )
    return at_least(drawn.same_seed, limit)


@Criterion
def gold_complete(report: ProbeReport) -> Finding:
    """Number of prompts without a gold answer, in both batches, where `tag_pref` rewards sampled responses.

    Without gold the reward is 0 and all advantages of the prompt are 0: it adds nothing to the update. Give `gold`, or
    a reward that needs none (batch.reward).
    """
    batches = (report.batch, report.update_batch)
    sampled = [b for b in batches if b.source == "sampled" and "tag_pref" in b.reward]
    if not sampled:
        return not_applicable("The rewards are not from tag_pref.")
    missing = float(sum(b.missing_gold for b in sampled))
    return at_most(missing, limit_for(report, "gold_complete"), otherwise="inconclusive")


@Criterion
def precision_invariance(report: ProbeReport) -> Finding:
    """Largest |difference| of a token's log p or entropy between the configured precision and true float64.

    The configured precision is not what it is called: TF32 or autocast within the forward, a softmax in fewer bits, or
    an addition of θ and ηv in them.
    """
    precision = report.config["precision"]
    if precision["func_override"]["dtype"] == "float64":
        return not_applicable("The run is in float64 itself.")
    if precision["allow_tf32"]:
        return not_applicable("TF32 is allowed by the configuration.")
    return _within_rounding(report.invariance.precision)


@Criterion
def sampler_parity(report: ProbeReport) -> Finding:
    """KL from the sampler to teacher forcing per token (k3 estimate, nats), where rollouts carry `logprobs`.

    The engine that sampled does not agree with the model here: temperature or top_p on one side only, other weights,
    or an engine in low precision. Importance weights are then wrong. Give the temperature and top_p that were used, and
    the checkpoint that was sampled from.
    """
    measured = report.sampler_parity
    if measured is None:
        return not_applicable("The rollouts carry no `logprobs` of the engine that sampled them.")
    outside, difference = measured.share_outside, measured.mean_abs_difference
    detail = f"[{outside:.2%} of ratios outside 0.9 to 1.1, mean |Δ| {difference:.2g}]"
    return at_most(measured.k3, limit_for(report, "sampler_parity"), detail=detail)
