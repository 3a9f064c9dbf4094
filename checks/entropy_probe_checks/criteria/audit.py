"""Every figure computed again from the evidence; the folder and the inputs, read and scored again by libraries."""

from __future__ import annotations

import math
import re
from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from entropy_probe import ProbeReport
from entropy_probe_checks.audit import Line, audit, worst
from entropy_probe_checks.criteria.verdicts import (
    Finding,
    at_most,
    from_evidence,
    in_se,
    largest,
    needed,
    not_applicable,
    of_a_normal,
    unseen,
)
from entropy_probe_checks.thresholds import limit_for

# Nats of all responses of a prompt: below it they may well be the same in both batches.
_CERTAIN = 5.0


@from_evidence()
def figures_recomputed(report: ProbeReport) -> Finding:
    """The largest |reported − recomputed| of any figure, relative to the size of its terms. It is infinite where a
    count or a text differs.

    A figure of the report is not what the formulas give from its own evidence (tokens, scores, derivatives, products of
    gradients). A sign, a factor, a standard error, a column or a batch is wrong. Do not believe that figure.
    """
    line = worst(_lines(report))
    return at_most(line.difference, limit_for(report, "figures_recomputed"), detail=f"[{line}]")


def _arrays(report: ProbeReport) -> Mapping[str, np.ndarray]:
    return needed(report.evidence).arrays


def _facts(report: ProbeReport) -> Mapping[str, Any]:
    return needed(report.evidence).facts


_last: tuple[ProbeReport, list[Line]] | None = None


def _lines(report: ProbeReport) -> list[Line]:
    """Of the auditor, who is asked once for a report."""
    global _last
    if _last is None or _last[0] is not report:
        _last = report, audit(report.model_dump(mode="json"), needed(report.evidence))
    return _last[1]


def audited(report: ProbeReport, *fields: str) -> float:
    """How far these figures are from the auditor's, over the size of their terms; 0 where no evidence is at hand."""
    if report.evidence is None:
        return 0.0
    starts = tuple(f"{field}{end}" for field in fields for end in (".", "["))
    own = [line for line in _lines(report) if line.name in fields or line.name.startswith(starts)]
    return worst(own).difference


@from_evidence()
def as_stored(report: ProbeReport) -> Finding:
    """The number of tensors that differ from what a second reader finds in the files. Weights are compared by shape, Σ
    and Σ²; moments by these and by step and hyper-parameters.

    The probe did not measure with what the trainer saved: a moment, a weight, a step or a hyper-parameter was changed
    between the file and the measurement. P, v and everything that follows from them describe another checkpoint.
    """
    facts, stored = _facts(report), _facts(report)["stored"]
    if isinstance(stored, str):
        return not_applicable(stored)
    arrays = _arrays(report)
    weights = _differing(
        [
            (tuple(shape), tuple(sums))
            for shape, sums in zip(facts["parameters"], arrays["sum.parameters"], strict=True)
        ],
        [(tuple(w["shape"]), tuple(w["sums"])) for w in stored["weights"]],
    )
    found = [f"{weights} weights"] if weights else []
    moments = 0
    if "sum.exp_avg" in arrays:
        moments_used = ("exp_avg", "exp_avg_sq", "max_exp_avg_sq")
        sums = np.concatenate([arrays[f"sum.{name}"] for name in moments_used], 1)
        used = list(zip(facts["hyper"], sums.tolist(), strict=True))
        moments = _states_differing(used, stored["states"])
        found += [f"{moments} states of the optimizer"] if moments else []
    dtypes = {w["dtype"] for w in stored["weights"]}
    named = report.checkpoint.weights_dtype
    if dtypes.isdisjoint(re.findall(r"\w+", named)):
        found.append(f"weights are {named}, stored as {', '.join(sorted(dtypes))}")
    detail = f"[{'; '.join(found)}]" if found else ""
    return at_most(
        float(weights + moments or len(found)), limit_for(report, "as_stored"), detail=detail
    )


_Entry = tuple[tuple[int, ...], tuple[float, ...]]


def _differing(used: Sequence[_Entry], stored: Sequence[_Entry]) -> int:
    """How many of `used` have no partner of their shape and sums. Where a library stacks or splits tensors on the way
    (experts), neither side finds a partner; all of them together must have the same sums then."""
    rest, alone = _pairs(used, stored)
    left = [
        entry for entry in alone if not any(_same(entry, other) for other in used)
    ]  # tied: twice
    if not rest:
        return 0
    totals = [[math.fsum(sums[k] for _, sums in side) for k in (0, 1)] for side in (rest, left)]
    size = math.sqrt(max(totals[0][1], 1e-300) * sum(math.prod(shape) for shape, _ in rest))
    stacked = not {shape for shape, _ in rest} & {shape for shape, _ in left}
    same = (
        stacked
        and abs(totals[0][0] - totals[1][0]) <= 1e-9 * size
        and abs(totals[0][1] - totals[1][1]) <= 1e-9 * totals[0][1]
    )
    return 0 if same else len(rest)


def _pairs(used: Sequence[_Entry], stored: Sequence[_Entry]) -> tuple[list[_Entry], list[_Entry]]:
    """Those of each side that have no partner on the other."""
    by_shape: dict[tuple[int, ...], list[_Entry]] = defaultdict(list)
    for entry in stored:
        by_shape[entry[0]].append(entry)
    rest = []
    for entry in used:
        own = by_shape[entry[0]]
        partner = next((k for k, other in enumerate(own) if _same(entry, other)), None)
        if partner is None:
            rest.append(entry)
        else:
            own.pop(partner)
    return rest, [entry for own in by_shape.values() for entry in own]


def _same(one: _Entry, other: _Entry) -> bool:
    """Shapes are equal, and sums to the rounding of another order; Σ against √(n·Σ²), which bounds it."""
    if one[0] != other[0]:
        return False
    size = math.sqrt(math.prod(one[0]))
    return all(
        abs(a - b) <= 1e-9 * scale
        for k in range(0, len(one[1]), 2)
        for a, b, scale in (
            (one[1][k], other[1][k], size * math.sqrt(max(other[1][k + 1], 0.0)) + 1e-300),
            (one[1][k + 1], other[1][k + 1], abs(other[1][k + 1]) + 1e-300),
        )
    )


def _states_differing(
    used: Sequence[tuple[Mapping[str, Any], Sequence[float]]], stored: Sequence[Any]
) -> int:
    """How many states of either side have no partner with the same step, hyper-parameters and moments."""
    own_name = {
        **dict.fromkeys(("decoupled_weight_decay", "adam_w_mode"), "decoupled"),
        "correct_bias": "bias_correction",
    }
    kinds: dict[str, tuple[list[_Entry], list[_Entry]]] = defaultdict(lambda: ([], []))
    known: set[str] = set()
    if stored:
        known = set.intersection(*(set(state["hyper"]) for state in stored))
    for hyper, sums in used:
        if hyper["step"] == 0:  # none in the file: `preconditioner_complete` judges that
            continue
        told = {key: hyper[own_name.get(key, key)] for key in known}
        entry = tuple(hyper["shape"]), tuple(sums)
        kinds[_kind(hyper["step"], told)][0].append(entry)
    for state in stored:
        if state["step"] == 0:
            continue
        told = {key: state["hyper"][key] for key in known}
        entry = tuple(state["shape"]), tuple(state["sums"])
        kinds[_kind(state["step"], told)][1].append(entry)
    alone = [_pairs(one, other) for one, other in kinds.values()]
    return max(sum(len(rest) for rest, _ in alone), sum(len(left) for _, left in alone))


def _kind(step: float, hyper: Mapping[str, Any]) -> str:
    """What must be equal, as a text."""
    plain = {
        k: [float(x) for x in v] if isinstance(v, list | tuple) else v for k, v in hyper.items()
    }
    return repr(
        (float(step), sorted((k, float(v) if type(v) is int else v) for k, v in plain.items()))
    )


@from_evidence(needs_second_moment=True)
def moments_possible(report: ProbeReport) -> Finding:
    """The largest |exp_avg|/√exp_avg_sq of any entry, relative to the most that Adam can reach in that many steps. By
    Cauchy and Schwarz this is (1−β₁)·√(Σ_{k<t}(β₁²/β₂)^k)/√(1−β₂).

    No run of Adam with these betas leads to such moments. The two belong to different tensors, one of them is a root or
    a square of itself, or the step or the betas are wrong. v then has a wrong size or a wrong sign. Moments in 8 bits
    are left out, because a correct run can lead to such ones: a second moment stays where it is when a step changes it
    by less than its rounding.
    """
    shares = []
    ratios = _arrays(report)["sum.moment_ratio"]
    for hyper, ratio in zip(_facts(report)["hyper"], ratios, strict=True):
        if hyper["step"] > 0 and 0 < hyper["betas"][1] < 1 and not hyper.get("in_8_bits"):
            beta1, beta2 = hyper["betas"]
            q, steps = beta1**2 / beta2, int(hyper["step"])
            series = float(steps) if q == 1 else (1 - q**steps) / (1 - q)
            shares.append(float(ratio) / ((1 - beta1) * math.sqrt(series / (1 - beta2))))
    if not shares:
        return not_applicable("No tensor has Adam state in more than 8 bits.")
    return at_most(largest(*shares), limit_for(report, "moments_possible"))


@from_evidence()
def plain_forward(report: ProbeReport) -> Finding:
    """The largest difference of a token's log p, entropy, features, place among all tokens or Σ_i p_i S_i from a plain
    computation, in nats. There, transformers and peft alone load the folder and score one unpadded response at a time.
    Two prompts of each batch are scored, and fresh ones.

    The measured model is not the one in the folder, or the scores are not its own: a weight, a scaling, the
    temperature, a position or a token differs. Nothing that is measured is about this checkpoint.
    """
    plain = _facts(report)["plain"]
    if isinstance(plain, str):
        return _unasked(plain)
    differences = []
    for at in [key for key in plain if key.startswith("at_")]:
        which = at.removeprefix("at_")
        for place, scored in zip(plain[which], plain[at], strict=True):
            own = (_row(report, f"{which}.{name}", place) for name in ("logp", "entropy"))
            differences += [
                float(np.abs(values[: len(again)] - np.array(again)).max())
                for values, again in zip(own, scored, strict=False)
            ]
            differences.append(_of_features(report, which, place, scored[2]))
            differences.append(_of_before(report, which, place, scored[3]))
            if f"{which}.mean_s" in _arrays(report):
                own_s = _row(report, f"{which}.mean_s", place)[: len(scored[4])]
                differences.append(float(np.abs(own_s - np.array(scored[4])).max()))
    return at_most(largest(*differences), limit_for(report, "plain_forward"))


@from_evidence(needs_second_moment=True)
def plain_step(report: ProbeReport) -> Finding:
    """The difference |ΔS − ΔS of the plain model with ηv written into its parameters| at the largest η of the sweep.
    The worst response is taken, relative to the largest |ΔS|.

    The responses were not scored at θ + ηv: the direction does not reach the parameters, it reaches others, or the
    scores after the step are those of another η. Do not believe any change of entropy in this report.
    """
    plain = _facts(report)["plain"]
    if isinstance(plain, str):
        return _unasked(plain)
    if "step" not in plain:
        return not_applicable("No step was taken.")
    before, after = (
        np.array([math.fsum(logp) for logp, *_ in plain[name]]) for name in ("at_e", "after")
    )
    places = plain["e"]
    own = np.array([_row(report, "e.logp", place).sum() for place in places])
    moved = np.array([_row(report, f"after.{plain['step']}.logp", place).sum() for place in places])
    tokens = max(len(logp) for logp, *_ in plain["at_e"])
    # where S is almost 0 at θ, rounding is too, and says nothing of that at θ + ηv
    of_tokens = math.sqrt(tokens) * report.invariance.precision.worst
    most, rounding = np.abs(after - before).max(), max(np.abs(own - before).max(), of_tokens)
    known = limit_for(report, "plain_forward") * tokens  # more is no rounding, and hides nothing
    if most <= 30 * rounding and rounding <= known:
        return unseen(
            f"Rounding hides the effect of the step: ΔS is at most {most:.1e}, and float32 gives S to {rounding:.1e}."
        )
    value = float(np.abs((moved - own) - (after - before)).max() / most)
    return at_most(value, limit_for(report, "plain_step"))


@from_evidence(needs_second_moment=True)
def fresh_responses(report: ProbeReport) -> Finding:
    """The value |mean of Σ_t(−log p_t − H_t)| over the fresh responses of `fallback: resample`, scored at θ + ηv, in
    standard errors over responses. It is 0, apart from noise, if they were drawn at θ + ηv. The worst η counts.

    The fresh responses were not drawn at θ + ηv. Their mean entropy is that of other parameters, so its difference from
    the entropy at θ is not the change by this step.
    """
    arrays, found = _arrays(report), []
    for name in [name for name in arrays if name.startswith("fresh.") and name.endswith(".ids")]:
        logp, entropy = (arrays[name.replace(".ids", f".{of}")] for of in ("logp", "entropy"))
        surprise = (-logp - entropy).sum(-1).ravel()
        certain = entropy.sum(-1).mean() < 1 or len(np.unique(surprise)) < len(surprise) / 2
        if certain and surprise.mean() < 0:
            continue  # so certain that rare tokens, which the mean lives on, are not among them
        se = float(surprise.std(ddof=1)) / math.sqrt(len(surprise))
        found.append(of_a_normal(in_se(float(surprise.mean()), se), len(surprise) - 1))
    if not found:
        return not_applicable("No fresh responses were drawn, or nearly all of them are the same.")
    return at_most(largest(*found), limit_for(report, "fresh_responses"))


def _unasked(why: str) -> Finding:
    """Of a model that does not fit twice nothing is seen; one that transformers alone cannot load has no answer."""
    return unseen(why) if why.startswith("too large") else not_applicable(why)


def _of_features(
    report: ProbeReport, which: str, place: int, again: Sequence[Sequence[float]]
) -> float:
    """The largest difference of a feature of a token, relative to 1 + its size; at top_p = 1, where there are any."""
    own, expected = _columns(report, f"{which}.features", place), np.array(again)
    if own is None:
        return 0.0
    own = own[: len(again), : expected.shape[1]]
    expected[:, 2] = np.minimum(expected[:, 2], own[:, 2].max())  # a margin is capped
    return float((np.abs(own - expected) / (1 + np.abs(expected))).max())


def _of_before(
    report: ProbeReport, which: str, place: int, again: Sequence[Sequence[float]]
) -> float:
    """The same of the mass before a token, which rounding may move among tokens that are as likely."""
    before = _columns(report, f"{which}.before", place)
    if before is None:
        return 0.0
    by_likelihood, halved = before[: len(again)].T
    least, most, halved_again = np.array(again).T
    outside = np.maximum(least - by_likelihood, by_likelihood - most)
    return largest(0.0, float(outside.max()), float(np.abs(halved - halved_again).max()))


def _columns(report: ProbeReport, name: str, place: int) -> np.ndarray | None:
    """[T, C] of a response, by its place in the batch; `None` where there is none, or q is not π."""
    values = _arrays(report).get(name)
    if values is None or report.config["generation"]["top_p"] < 1:
        return None
    return values.reshape(-1, *values.shape[2:])[place]


def _row(report: ProbeReport, name: str, place: int) -> np.ndarray:
    """[T] of a response, by its place in the batch."""
    values = _arrays(report)[name]
    return values.reshape(-1, values.shape[-1])[place].astype(np.float64)


@from_evidence()
def prompts_as_given(report: ProbeReport) -> Finding:
    """The number of prompts, in both batches, whose tokens are not those of their line in the file, or not those of any
    question of the split.

    The probe measures other prompts than you asked for: a token is missing, another split or another file was read, or
    lines changed places.
    """
    return _of_inputs(
        report,
        lambda which, found: [f"{which} {n + 1}" for n in found["wrong"]],
        "prompts_as_given",
        "wrong",
    )


@from_evidence()
def rewards_again(report: ProbeReport) -> Finding:
    """The number of responses whose reward is not that of their line, or not that of the decoded text and the gold
    answer of their prompt. All responses of a file are checked, or those of eight prompts of a batch.

    The advantages, and with them the update, come from other rewards than these responses earn. The rewards belong to
    other responses or prompts, or to the gold answer of another question.
    """

    def wrong(which: str, found: Mapping[str, Any]) -> list[str]:
        own = _arrays(report)[f"{which}.rewards"].tolist()
        again = found.get("rewards", {})
        rows = again.items() if isinstance(again, Mapping) else enumerate(again)
        differing = [
            f"{which} {int(n) + 1}.{g + 1}"
            for n, rewards in rows
            for g, reward in enumerate(rewards)
            if int(n) >= len(own) or own[int(n)][g] != reward
        ]
        if found.get("advantages") != _given_advantages(report, which):
            differing.append(f"advantages of {which}")
        return differing

    return _of_inputs(report, wrong, "rewards_again", "rewards")


def _given_advantages(report: ProbeReport, which: str) -> list[Any] | None:
    """Of every response, or of its tokens, as a file has them: without what fills a table up."""
    arrays = _arrays(report)
    given = arrays.get(f"{which}.given_advantages")
    if given is None:
        return None
    lengths = arrays[f"{which}.gen_lens"].reshape(given.shape[:2]).tolist()
    return [
        [
            (a if given.ndim == 2 else a[:end]).tolist()
            for a, end in zip(own, ends, strict=True)
            if end
        ]
        for own, ends in zip(given, lengths, strict=True)
    ]


def _of_inputs(report: ProbeReport, wrong: Any, name: str, key: str) -> Finding:
    inputs = _facts(report)["inputs"]
    known = {which: of for which, of in inputs.items() if not isinstance(of, str) and key in of}
    if not known:
        why = next((of for of in inputs.values() if isinstance(of, str)), "")
        return not_applicable(
            why
            or "The probe does not read texts of a file, or rewards behind an entry point, a second time."
        )
    found = [text for which, of in known.items() for text in wrong(which, of)]
    detail = f"[{', '.join(found[:5])}{' …' if len(found) > 5 else ''}]" if found else ""
    return at_most(float(len(found)), limit_for(report, name), detail=detail)


@from_evidence()
def batches_independent(report: ProbeReport) -> Finding:
    """The number of prompts that E and U share, if prompts were sampled without replacement. Otherwise it is the number
    of whole groups of responses that they share, where a group has more than 5 nats.

    The update comes from responses on which its effect is measured. The two batches are not independent, so δH₁ and its
    standard error are not those of a step on other data.
    """
    if report.batch.same_batch:
        return not_applicable("One batch serves as both.")
    sampled = {report.batch.given, report.update_batch.given} == {"sampled"}
    inputs = _facts(report)["inputs"]["e"]
    distinct = not isinstance(inputs, str) and inputs.get("distinct", False)
    whole = not sampled or report.config["batch"]["with_replacement"] or not distinct
    one, other = (_groups(report, which, whole=whole) for which in ("e", "u"))
    shared = float(len(one & other))
    return at_most(shared, limit_for(report, "batches_independent"))


def _groups(report: ProbeReport, which: str, *, whole: bool) -> set[tuple[Any, ...]]:
    """The prompts of a batch, or each with all its responses."""
    arrays = _arrays(report)
    ids, starts, lengths = (
        arrays[f"{which}.{name}"] for name in ("ids", "prompt_lens", "gen_lens")
    )
    size = len(ids) // len(arrays[f"{which}.rewards"])
    rows = [
        tuple(row[: start + n]) for row, start, n in zip(ids.tolist(), starts, lengths, strict=True)
    ]
    if whole:  # where all responses are all but certain, they come again by themselves
        entropy = arrays[f"{which}.entropy"].sum((1, 2))
        chosen = [k for k in range(0, len(rows), size) if entropy[k // size] > _CERTAIN]
        return {tuple(rows[k : k + size]) for k in chosen}
    return {rows[k][: starts[k]] for k in range(0, len(rows), size)}
