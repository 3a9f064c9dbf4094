"""The difference of an entropy between two reports, and its standard error."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from typing import NamedTuple

from entropy_probe.report import Estimate, ProbeReport


class Difference(NamedTuple):
    """The other value less the first, its SE, and whether that is over prompts, of the differences of each."""

    value: float
    se: float
    paired: bool


def difference(
    one: Estimate,
    other: Estimate,
    by_prompt: tuple[Sequence[float], Sequence[float]] | None = None,
) -> Difference:
    """Of independent estimates √(SE₁² + SE₂²). With what each prompt says of the two, as `by_prompt`, in the same order
    and with the estimates as means, sd(b_k − a_k)/√B over the B prompts: what the prompts share drops out.
    """
    value = other.value - one.value
    if by_prompt is None or len(by_prompt[0]) < 2:
        return Difference(value, math.hypot(one.se, other.se), paired=False)
    terms = [b - a for a, b in zip(*by_prompt, strict=True)]
    return Difference(value, statistics.stdev(terms) / math.sqrt(len(terms)), paired=True)


def same_prompts(one: ProbeReport, other: ProbeReport) -> bool:
    """Whether the entropies of both are on the same prompts, in the same order."""
    return one.batch.prompts_fingerprint == other.batch.prompts_fingerprint


def entropy_per_token(one: ProbeReport, other: ProbeReport) -> Difference:
    """ΔH per token, paired by prompts where both have the same ones."""
    a, b = one.entropy, other.entropy
    pairs = (a.per_token_by_prompt, b.per_token_by_prompt) if same_prompts(one, other) else None
    return difference(a.per_token, b.per_token, pairs)


def entropy_per_response(one: ProbeReport, other: ProbeReport) -> Difference:
    """ΔH per response, Rao-Blackwell, paired by prompts where both have the same ones."""
    a, b = one.entropy, other.entropy
    pairs = (a.rb_by_prompt, b.rb_by_prompt) if same_prompts(one, other) else None
    return difference(a.rb, b.rb, pairs)
