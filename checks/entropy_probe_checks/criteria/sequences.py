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

_RARE = math.log(2e6)
"""Nats of responses that chance repeats once in two million times, as rarely as it fails `on_policy`."""


@Criterion
def padding_invariance(report: ProbeReport) -> Finding:
    """The largest difference of a token's log p or entropy between unpadded, right-padded and left-padded rows. It is
    measured in true float64 and in the configured precision, and the one nearer to its bound counts.

    Padding changes a score: positions count padding, the mask lets padding through, or the model ignores attention_mask
    or position_ids.
    """
    return _within_rounding(report.invariance.padding)


@Criterion
def batch_invariance(report: ProbeReport) -> Finding:
    """The largest difference of a token's log p or entropy between a row that is scored alone and the same row among
    others.

    The rows of a batch influence each other: something in the model normalises over the batch, or the bookkeeping of
    the rows is wrong. Scores then depend on tf_batch_size. If the model is meant to be so, score one row at a time
    (generation.tf_batch_size: 1).
    """
    return _within_rounding(report.invariance.batch)


@Criterion
def chunk_invariance(report: ProbeReport) -> Finding:
    """The largest difference of a token's log p or entropy between logits of the whole row and logits that are computed
    for a few positions at a time.

    The output layer depends on more than the hidden state of one position, so it may not be applied to a few positions
    at a time. The entropies and log-probabilities in this report are not the model's.
    """
    return _within_rounding(report.invariance.chunk)


def _within_rounding(measured: WorstCase) -> Finding:
    """A bound of half a nat is none, and passes nothing: rounding gives 0.05 at 80 layers and 32k tokens in float32."""
    bound = measured.bound if measured.bound < 0.5 else math.nan
    return at_most(measured.worst, bound, detail=f"[{measured.example}]")


@Criterion
def cache_agrees(report: ProbeReport) -> Finding:
    """The largest difference of a logit between sampling, one token after the other, and scoring, of whole rows. It is
    measured at the first tokens of two responses.

    Responses are sampled from one distribution and scored with another: an adapter or a layer depends on more than the
    model's cache holds, or on later tokens. Entropy, slope and importance weights are then those of a policy from which
    nothing was sampled. Give rollouts of an engine that reads whole rows (--probe-rollouts).
    """
    found = report.cache
    sources = (report.batch.source, report.update_batch.source)
    if "sampled" not in sources and report.config["true_delta_h"]["fallback"] != "resample":
        return not_applicable("The responses were not sampled here.")
    measured = found.over_cache if found.instead is None else found.instead
    if measured is None:
        return not_applicable("The responses were sampled without the model's cache.")
    return _within_rounding(measured)


@Criterion
def on_policy(report: ProbeReport) -> Finding:
    """The largest departure of the responses from independent draws from q, in standard errors. Three statistics are
    tested: |mean of Σ_t(−log q_t − H(q_t))|, and the scale and the dependence of the tokens' probability integral
    transforms.

    The responses are not from this policy. They were sampled at another temperature or top_p, from another checkpoint
    or for other prompts, or tokens are scored at the wrong positions. Or the responses share their random numbers, as
    with one seed for all. Entropy, slope, importance weights or standard errors then describe something else. Give the
    settings and the checkpoint that sampled the responses, and draw each response with its own random numbers.
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
        why = f"Only {seen} of {report.batch.num_tokens} tokens had a probability below 1/2."
        return inconclusive(
            f"{why} So few give no valid standard error. Give more responses.", value, limit
        )
    detail = f"[{name}; surprise {surprise.value:+.3g} ± {surprise.se:.2g} nats/response]"
    return at_most(value, limit, detail=detail)


@Criterion
def ends_at_eos(report: ProbeReport) -> Finding:
    """The number of responses, in both batches, that go on after an EOS token or end without one before the length
    limit.

    The sampler does not stop at the EOS token, cuts it off, or uses another one. Tokens after the end are then scored
    as part of the answer, or the EOS token, which the policy chose, is not scored.
    """
    batches = (report.batch, report.update_batch)
    wrong = sum(batch.early_eos + (batch.unended or 0) for batch in batches)
    return at_most(float(wrong), limit_for(report, "ends_at_eos"))


@Criterion
def batches_as_given(report: ProbeReport) -> Finding:
    """The number of batches, of the two, that do not come from the source that was asked for: a file, or sampling.

    E and U are exchanged, or a file is not used. The update is then judged on the responses that it comes from.
    """
    wrong = [
        batch.source for batch in (report.batch, report.update_batch) if batch.source != batch.given
    ]
    detail = f"[{', '.join(wrong)}]" if wrong else ""
    return at_most(float(len(wrong)), limit_for(report, "batches_as_given"), detail=detail)


@Criterion
def seeded(report: ProbeReport) -> Finding:
    """The share of the responses of two prompts that are drawn again with the same seed; one response may always
    differ. With another seed, some responses must differ.

    The seed does not decide what is sampled. Either two runs with one seed are not the same run, or every run draws the
    same responses. Run again with --probe-no-cache. If the check fails again, set generation.gen_batch_size to 1: if it
    then passes, the sampled tokens depend on the other rows of a batch.
    """
    drawn, limit = report.sampling, limit_for(report, "seeded")
    if drawn is None:
        return not_applicable("The responses were not sampled here.")
    if drawn.other_seed == 1.0 and drawn.same_seed == 1.0:
        nats = _nats_of_two_prompts(report)
        if nats > _RARE:
            return Finding("fail", 1.0, limit, "[another seed draws the same responses]")
        return inconclusive(
            f"Another seed draws the same responses of the two prompts, which chance alone does with probability "
            f"{math.exp(-nats):.2g}: on these prompts the policy hardly ever varies. So the seed cannot be judged. "
            f"Nothing is wrong with the other figures. If you expect so little entropy, list `seeded` under "
            f"allow_inconclusive. Otherwise give prompts whose responses vary, or raise "
            f"generation.num_return_sequences."
        )
    responses = 2 * report.config["generation"]["num_return_sequences"]
    return at_least(
        drawn.same_seed, limit if limit == 1.0 else min(limit, (responses - 1) / responses)
    )


def _nats_of_two_prompts(report: ProbeReport) -> float:
    """−Σ log q of the responses of E's first two prompts: independent draws are the same with probability e^−that. It
    is G·ΣH of the two, which is its expectation, where no evidence is at hand."""
    if report.evidence is not None:
        return -float(report.evidence.arrays["e.logq"][:2].sum())
    return report.config["generation"]["num_return_sequences"] * math.fsum(
        report.entropy.rb_by_prompt[:2]
    )


@Criterion
def gold_complete(report: ProbeReport) -> Finding:
    """The number of prompts without a gold answer, in both batches, where `tag_pref` rewards sampled responses.

    Without a gold answer the reward is 0, and so are all advantages of the prompt: it adds nothing to the update. Give
    `gold`, or a reward that needs none (batch.reward).
    """
    batches = (report.batch, report.update_batch)
    sampled = [b for b in batches if b.source == "sampled" and "tag_pref" in b.reward]
    if not sampled:
        return not_applicable("No batch was sampled here with rewards from tag_pref.")
    missing = float(sum(b.missing_gold for b in sampled))
    return at_most(missing, limit_for(report, "gold_complete"), otherwise="inconclusive")


@Criterion
def precision_invariance(report: ProbeReport) -> Finding:
    """The largest difference of a token's log p or entropy between the configured precision and true float64.

    The forward pass does not run in the precision that the configuration names. TF32 or autocast acts within it, or the
    softmax or the addition of θ and ηv runs in fewer bits.
    """
    precision = report.config["precision"]
    if precision["func_override"]["dtype"] == "float64":
        return not_applicable("The run is in float64 itself.")
    if precision["allow_tf32"]:
        return not_applicable("The configuration allows TF32.")
    return _within_rounding(report.invariance.precision)


@Criterion
def sampler_parity(report: ProbeReport) -> Finding:
    """The KL divergence from the sampler to teacher forcing, per token (k3 estimate, in nats). It needs rollouts that
    carry `logprobs`.

    The engine that sampled does not agree with the model here: the temperature or top_p is set on one side only, the
    weights differ, or the engine runs in low precision. Importance weights are then wrong. Give the temperature and
    top_p that were used, and the checkpoint that was sampled from.
    """
    measured = report.sampler_parity
    if measured is None:
        return not_applicable("The rollouts carry no `logprobs` of the engine that sampled them.")
    outside, difference = measured.share_outside, measured.mean_abs_difference
    detail = f"[{outside:.2%} of ratios outside 0.9 to 1.1, mean |Δ| {difference:.2g}]"
    return at_most(measured.k3, limit_for(report, "sampler_parity"), detail=detail)
