"""One token of every row, drawn from logits with numbers that belong to the row."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from entropy_probe.errors import MeasurementError
from entropy_probe.estimators.policy import nucleus
from entropy_probe.model.precision import maybe_cast_logits_fp32

if TYPE_CHECKING:
    from jaxtyping import Float, Int


def noise_of(seed: int, prompt: int, response: int) -> np.random.Generator:
    """The numbers of one response: a stretch of a counter-based generator that is its own.

    Philox counts from `response`·2¹⁹² under the key (seed, prompt). Every step takes the same count
    of numbers, so the numbers of a step depend on nothing that was drawn before.
    """
    key = np.array([seed % 2**64, prompt], dtype=np.uint64)
    counter = np.array([0, 0, 0, response], dtype=np.uint64)
    return np.random.Generator(np.random.Philox(key=key, counter=counter))


def masses(
    logits: Float[Tensor, "N V"],
    temperature: float,
    top_p: float,
) -> Float[Tensor, "N V"]:
    """q up to a factor per row: exp(logits/temperature − max), zero outside the nucleus.

    The nucleus is that of `score_tokens` without its margin, so that a token at the edge has finite
    log q when the logits are computed again.
    """
    scaled = maybe_cast_logits_fp32(logits) / temperature
    mass = (scaled - scaled.amax(-1, keepdim=True)).exp_()
    if top_p >= 1.0:
        return mass
    inside = nucleus(torch.log_softmax(scaled, dim=-1), top_p, edge=0.0)
    return mass.masked_fill_(~inside, 0.0)


def draw(mass: Float[Tensor, "N V"], uniforms: Float[Tensor, "N D"]) -> Int[Tensor, " N"]:
    """One token per row with probability mass/Σ mass, from D = ⌈log₂ V⌉ numbers in [0, 1) per row.

    A tree of sums over halves of halves: at every node the next number decides between its two
    children,

        second if u·(m₁ + m₂) ≥ m₁,

    and a token without mass is never reached. Perturbed masses change the choice only where a
    number is as close to m₁/(m₁ + m₂) as the perturbation. Along a row that adds up to about log₂ V
    boundaries, each off by at most the relative error of the masses. One number inverting the
    cumulative sum would cross V of them, and the noise of a Gumbel maximum costs V numbers a token.
    """
    sums = [mass]
    while sums[-1].shape[1] > 1:
        wide = sums[-1]
        half = (wide.shape[1] + 1) // 2
        narrow = wide[:, :half].clone()
        narrow[:, : wide.shape[1] - half] += wide[:, half:]
        sums.append(narrow)
    if not bool(torch.isfinite(sums[-1]).all()):
        problem = "the model's logits are not finite"
        raise MeasurementError("sampling", problem, "use an earlier checkpoint")
    node = torch.zeros(len(mass), 1, dtype=torch.long, device=mass.device)
    for depth, wide in enumerate(reversed(sums[:-1])):
        size = wide.shape[1]
        other = node + (size + 1) // 2
        of_other = wide.gather(1, other.clamp(max=size - 1)).double()
        m1 = wide.gather(1, node).double()
        m2 = of_other.masked_fill(other >= size, 0.0)
        node = torch.where(uniforms[:, depth, None] * (m1 + m2) >= m1, other, node)
    return node[:, 0]
