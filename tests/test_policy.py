"""π, q and their entropies against enumeration in plain Python, transformers' own warpers, and naive autograd."""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass, fields
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from transformers.generation.logits_process import (
    LogitsProcessorList,
    TemperatureLogitsWarper,
    TopPLogitsWarper,
)

from entropy_probe.estimators.policy import NUCLEUS_EDGE, TokenScores, float32_rounding, nucleus, score_tokens
from test_token_stats import logits_of

FAST = settings(derandomize=True, database=None, deadline=None, max_examples=60)
FEW = settings(FAST, max_examples=12)  # vocabularies of a thousand tokens, every token of them scored

KINDS = st.sampled_from(["normal", "peaked", "ties", "extreme", "shifted", "masked", "one_left"])
TOP_P = st.one_of(st.sampled_from([1e-9, 0.5, 0.9, 0.999999, 1 - 1e-9, 1.0]), st.floats(1e-6, 1.0))
TEMPERATURE = st.one_of(st.sampled_from([0.01, 0.7, 1.0, 10.0]), st.floats(0.01, 10.0))
SEEDS = st.integers(0, 10_000)
NAMES = [field.name for field in fields(TokenScores)]


def values_of(scored: TokenScores) -> tuple[Tensor, ...]:
    return tuple(getattr(scored, name) for name in NAMES)


# the slow version


@dataclass(frozen=True)
class Enumerated:
    """`above`: mass of the tokens that are strictly more probable."""

    p: list[float]
    logp: list[float]
    above: list[float]

    @property
    def entropy(self) -> float:
        return -math.fsum(p * logp for p, logp in zip(self.p, self.logp, strict=True) if p)

    rounding: float
    """Of a sampler that divides by the temperature in float32, in nats: 2⁻²³ of the largest quotient and 16."""

    def lowest(self, limit: float) -> float:
        """log p of the least probable token with less than `limit` above it, less what still counts as equal to it."""
        return min(logp for logp, above in zip(self.logp, self.above, strict=True) if above < limit) - self.rounding

    def renormalised(self, inside: list[bool]) -> tuple[list[float], float]:
        """(log q of every token, entropy of q)."""
        log_mass = math.log(math.fsum(p for p, i in zip(self.p, inside, strict=True) if i))
        logq = [logp - log_mass if i else -math.inf for logp, i in zip(self.logp, inside, strict=True)]
        return logq, -math.fsum(math.exp(x) * x for x in logq if math.exp(x))


def enumerate_policy(z: list[float], temperature: float) -> Enumerated:
    """The definitions, token by token, in sums that are rounded once."""
    best = max(z)
    d = [(x - best) / temperature for x in z]
    total = math.fsum(map(math.exp, d))
    p = [math.exp(x) / total for x in d]
    above, ranked = [0.0] * len(z), sorted(range(len(z)), key=d.__getitem__, reverse=True)
    for value, tied in itertools.groupby(enumerate(ranked), key=lambda pair: d[pair[1]]):
        members = list(tied)
        mass = math.fsum(p[i] for i in ranked[: members[0][0]]) if value < 0 else 0.0
        for _, i in members:
            above[i] = mass
    return Enumerated(p, [x - math.log(total) for x in d], above, 2**-23 * (abs(best) / temperature + 16))


def rounding_of(z: Tensor, temperature: float) -> Tensor:
    return float32_rounding(z.amax(-1), temperature)


def score_all(z: Tensor, temperature: float, top_p: float, dtype: torch.dtype | None = None) -> dict[str, Tensor]:
    """Every token of the vocabulary scored under one row of logits [V]: fields of shape [V]."""
    scored = score_tokens(z.expand(len(z), -1), torch.arange(len(z)), temperature, top_p, dtype)
    return vars(scored)


def close(expected: Any) -> Any:
    """Log-probabilities reach 2e6 (logits ±1e4, temperature 0.01), where an ulp is 2e-10; sums over 1000 terms of order
    1 are rounded by 1e-13."""
    return pytest.approx(expected, rel=1e-12, abs=1e-12)


def check_against_enumeration(z: Tensor, temperature: float, top_p: float) -> None:
    """The nucleus, and that log q and entropy_q are those of this nucleus.

    A mass within 1e-12 of the limit (a cumulative sum over 1000 terms is rounded by 1e-13) may fall on either side; so
    may a token whose probability is 0 in float64, which nothing can draw.
    """
    slow = enumerate_policy(z.tolist(), temperature)
    got = score_all(z, temperature, top_p)
    assert not any(bool(values.isnan().any()) for values in got.values())
    assert got["logp"].tolist() == close(slow.logp)
    assert got["entropy"].tolist() == close([slow.entropy] * len(z))
    inside = torch.isfinite(got["logq"]).tolist()
    logp = torch.log_softmax((z - z.max()) / temperature, -1)
    mask = nucleus(logp, top_p, rounding=rounding_of(z, temperature)).tolist()
    limit = top_p + NUCLEUS_EDGE + slow.rounding
    highest_floor, lowest_floor = slow.lowest(limit - 1e-12), slow.lowest(limit + 1e-12)
    ulps = 1e-12 * max(1.0, abs(lowest_floor))
    possible = [i for i in range(len(z)) if slow.p[i] > 0]
    for i in possible:
        assert inside[i] == mask[i]
        if top_p >= 1 or slow.logp[i] > highest_floor + ulps:
            assert inside[i], i
        elif slow.logp[i] < lowest_floor - ulps:
            assert not inside[i], i
    in_out = [[z[i].item() for i in possible if inside[i] == side] for side in (True, False)]
    assert not in_out[1] or min(in_out[0]) > max(in_out[1])
    logq, entropy_q = slow.renormalised(inside)
    assert got["logq"].tolist() == close(logq)
    assert got["entropy_q"].tolist() == close([entropy_q] * len(z))


@FAST
@given(KINDS, st.integers(2, 200), SEEDS, TEMPERATURE, TOP_P)
def test_policy_against_enumeration(kind: str, vocabulary: int, seed: int, temperature: float, top_p: float) -> None:
    check_against_enumeration(logits_of(kind, 1, vocabulary, seed)[0], temperature, top_p)


@FEW
@given(KINDS, st.sampled_from([63, 64, 65, 300, 1000]), SEEDS, TEMPERATURE, TOP_P)
def test_large_vocabularies_against_enumeration(
    kind: str, vocabulary: int, seed: int, temperature: float, top_p: float
) -> None:
    """Above 64 entries the nucleus is read from the largest 64 where it ends there; the definition is the same."""
    check_against_enumeration(logits_of(kind, 1, vocabulary, seed)[0], temperature, top_p)


# the largest 64 entries, the largest 4096, and the sorted row


def spread(vocabulary: int, seed: int = 0) -> Tensor:
    """Distinct logits, all of about the same size, in random order: a nucleus may hold any number of tokens."""
    order = torch.randperm(vocabulary, generator=torch.Generator().manual_seed(seed))
    return torch.linspace(1.0, 0.0, vocabulary, dtype=torch.float64)[order]


def top_p_of(z: Tensor, size: int, temperature: float = 1.0) -> float:
    """A top_p for which the nucleus holds exactly the `size` most probable tokens: midway between two of its steps."""
    p = torch.softmax(z / temperature, -1).sort(descending=True).values
    above = (p.cumsum(-1) - p).tolist() if len(z) > 2000 else sorted(enumerate_policy(z.tolist(), temperature).above)
    return (above[size - 1] + (above[size] if size < len(z) else 1.0)) / 2


@pytest.mark.parametrize("vocabulary", [63, 64, 255, 256, 300, 16_383, 16_384, 20_000])
def test_nucleus_of_every_size_around_the_prefix(vocabulary: int) -> None:
    """Sizes at which the 64 and the 4096 largest entries just suffice, or just do not."""
    z = spread(vocabulary)
    for size in sorted({2, 32, *range(62, 67), 128, *range(4094, 4099), vocabulary - 1, vocabulary}):
        if size > vocabulary:
            continue
        top_p, largest = top_p_of(z, size), z.topk(size).values[-1]
        expected = z >= largest
        assert torch.equal(nucleus(torch.log_softmax(z, -1), top_p), expected), size
        ranks = torch.tensor([0, size - 1, min(size, vocabulary - 1)])  # the last one is outside, if there is one
        tokens = z.argsort(descending=True)[ranks]
        got = score_tokens(z.expand(3, -1), tokens, 1.0, top_p)
        logq = torch.log_softmax(z.masked_fill(~expected, -math.inf), -1)
        assert got.logq.tolist() == close(logq[tokens].tolist())
        assert got.entropy_q[0].item() == close(-float((logq.exp() * logq)[expected].sum()))


@pytest.mark.parametrize("tied_from", [50, 63, 64, 65])
@pytest.mark.parametrize("tied_until", [64, 65, 100])
def test_ties_across_the_end_of_the_prefix(tied_from: int, tied_until: int) -> None:
    """All the tokens that are as probable as the one that crosses top_p are in, those beyond the 64 largest too."""
    z = torch.linspace(1.0, 0.0, 400, dtype=torch.float64)
    z[tied_from:tied_until] = z[tied_from].item()
    z = z[torch.randperm(400, generator=torch.Generator().manual_seed(1))]
    ends = max(tied_from + 1, tied_until)
    for top_p in (top_p_of(z, tied_from), top_p_of(z, ends)):
        check_against_enumeration(z, 1.0, top_p)
    slow = enumerate_policy(z.tolist(), 1.0)
    middle = sorted(slow.above)[tied_from] - NUCLEUS_EDGE + 1e-9  # just reaches the tied ones
    assert int(nucleus(torch.log_softmax(z, -1), middle).sum()) == ends
    check_against_enumeration(z, 1.0, middle)


def test_equal_probabilities_are_in_together() -> None:
    for vocabulary in (2, 256, 257, 1000):
        for top_p in (1e-9, 0.3, 0.999999):
            assert bool(nucleus(torch.full((1, vocabulary), -math.log(vocabulary)), top_p).all())
    thirds = torch.tensor([0.2, 0.4, 0.2, 0.2], dtype=torch.float64).log()
    assert nucleus(thirds, 0.39).tolist() == [False, True, False, False]
    assert nucleus(thirds, 0.41).tolist() == [True] * 4


def test_rows_that_need_sorting_beside_rows_that_do_not() -> None:
    """A row's nucleus depends on that row only: one that ends within 64 entries, within 4096, beyond, and ties."""
    top_p, base = 0.7, spread(20_000)
    rows = [base * scale for scale in (800.0, 0.1, 20.0, 0.0, 4000.0, 20.0)]
    scored = score_tokens(torch.stack(rows), torch.arange(6), 1.0, top_p)
    sizes = nucleus(torch.log_softmax(torch.stack(rows), -1), top_p).sum(-1).tolist()
    assert [sum(size > prefix for prefix in (64, 4096)) for size in sizes] == [0, 2, 1, 2, 0, 1]
    for i, row in enumerate(rows):
        alone = score_tokens(row, torch.tensor(i), 1.0, top_p)
        p = torch.softmax(row, -1).sort(descending=True).values
        lowest = p[(p.cumsum(-1) - p < top_p + NUCLEUS_EDGE).sum() - 1]
        assert sizes[i] == int((p >= lowest).sum())
        for name in NAMES:
            assert getattr(scored, name)[i].item() == close(getattr(alone, name).item()), name


# what generation can emit


def kept_by_generate(logits: Tensor, temperature: float, top_p: float) -> Tensor:
    """Tokens that `generate` can emit: its logits processors, in its order, on logits copied to float32."""
    warpers = LogitsProcessorList()
    if temperature != 1.0:
        warpers.append(TemperatureLogitsWarper(temperature))
    if top_p < 1.0:
        warpers.append(TopPLogitsWarper(top_p))
    ids = torch.zeros(len(logits), 1, dtype=torch.long)
    return torch.isfinite(warpers(ids, logits.to(torch.float32, copy=True)))  # pyright: ignore[reportArgumentType]


def all_have_log_q(logits: Tensor, kept: Tensor, temperature: float, top_p: float, dtype: torch.dtype) -> bool:
    row, token = kept.nonzero(as_tuple=True)
    return bool(torch.isfinite(score_tokens(logits[row], token, temperature, top_p, dtype).logq).all())


@FAST
@given(
    st.integers(2, 200),
    SEEDS,
    st.one_of(st.sampled_from([1e-9, 0.5, 0.9, 0.999999, 1.0]), st.floats(1e-3, 0.999)),
    st.one_of(st.sampled_from([0.01, 1.0, 10.0]), st.floats(0.01, 10.0)),
    st.sampled_from(["float32", "bfloat16", "ties", "masked"]),
)
def test_every_token_that_generate_keeps_is_in_the_nucleus(
    vocabulary: int, seed: int, top_p: float, temperature: float, kind: str
) -> None:
    """Logits of a float32 model, of a bfloat16 one (8 bits: many are equal), integers, and with tokens masked out."""
    logits = 4 * logits_of(kind if kind in ("ties", "masked") else "normal", 2, vocabulary, seed).float()
    if kind == "bfloat16":
        logits = logits.bfloat16()
    kept = kept_by_generate(logits, temperature, top_p)
    for dtype in (torch.float64, torch.float32):
        assert all_have_log_q(logits, kept, temperature, top_p, dtype), dtype


@FEW
@given(st.sampled_from([257, 300, 1000]), SEEDS, st.floats(0.3, 0.999), st.floats(0.5, 10.0), st.booleans())
def test_every_token_that_generate_keeps_is_in_a_large_nucleus(
    vocabulary: int, seed: int, top_p: float, temperature: float, coarse: bool
) -> None:
    logits = logits_of("normal", 2, vocabulary, seed).float()
    logits = logits.bfloat16() if coarse else logits
    kept = kept_by_generate(logits, temperature, top_p)
    assert all_have_log_q(logits, kept, temperature, top_p, torch.float64)


@pytest.mark.parametrize("vocabulary", [2, 3, 7, 10, 33, 50])
def test_edge_of_the_nucleus_is_not_narrower_than_the_samplers(vocabulary: int) -> None:
    """Probabilities about one float32 ulp apart, and top_p = k/V: a float32 cumulative sum decides by rounding.

    The logits differ by 1e-7 (float64 keeps them apart) so that they are not in together for being equal.
    """
    logits = -1e-7 * torch.arange(vocabulary, dtype=torch.float64)[None]
    for k in range(1, vocabulary):
        kept = kept_by_generate(torch.zeros_like(logits), 1.0, k / vocabulary)
        inside = nucleus(torch.log_softmax(logits, -1), k / vocabulary)
        assert int(inside.sum()) >= int(kept.sum()), k


def test_the_edge_is_the_width_that_is_stated() -> None:
    """A token is in with a mass above it that exceeds top_p by less than `edge`, and out with more or just as much."""
    logp = torch.tensor([0.5, 0.3, 0.2], dtype=torch.float64).log()
    for edge in (0.0, NUCLEUS_EDGE, 1e-3):
        tiny = 1e-12
        assert nucleus(logp, 0.8 - edge + tiny, edge=edge).tolist() == [True, True, True]
        assert nucleus(logp, 0.8 - edge - tiny, edge=edge).tolist() == [True, True, False]
    half = torch.tensor([0.5, 0.25, 0.25], dtype=torch.float64).log()
    assert nucleus(half, 0.5, edge=0.0).tolist() == [True, False, False]  # ½ < ½ is false
    for top_p in (0.8 - 0.9e-6, 0.8 - 1.1e-6):  # the default edge, in the number that the documents give
        expected = [True, True, top_p > 0.8 - 1e-6]
        assert nucleus(logp, top_p).tolist() == expected
    for excess, expected in ((0.9, True), (1.1, False)):  # scores add what float32 rounding of the logits can do
        top_p = 0.8 - excess * (1e-6 + 2.0**-23 * (math.log(2) + 16))
        assert bool(torch.isfinite(score_all(logp, 1.0, top_p)["logq"])[2]) == expected


@pytest.mark.parametrize("temperature", [0.01, 0.1, 0.7, 1.05, 1.5])
def test_near_ties_of_float32(temperature: float) -> None:
    """Pairs of neighbouring float32 logits, which the division may make equal: `generate` keeps either of the two.

    And a top_p just below the mass of the first, where the rounding of that mass decides whether the second is in.
    """
    generator = torch.Generator().manual_seed(0)
    first = (20 * torch.randn(400, generator=generator)).abs() + 1
    second = torch.nextafter(first, torch.tensor(-torch.inf))
    for one, other in ((first, second), (second, first)):
        logits = torch.stack([one, other, torch.full_like(one, -50.0)], -1)
        kept = kept_by_generate(logits, temperature, 0.3)
        assert all_have_log_q(logits, kept, temperature, 0.3, torch.float64)
    logits = torch.stack([first, first - 2 * temperature], -1)
    p1 = torch.softmax(logits.double() / temperature, -1)[:, 0]
    for below in (0.0, 1.5e-6, 1e-5):
        for row, mass in zip(logits, p1.tolist(), strict=True):
            kept = kept_by_generate(row[None], temperature, mass - below)
            assert all_have_log_q(row[None], kept, temperature, mass - below, torch.float64)


# extremes


def test_extreme_logits() -> None:
    logits = torch.tensor([[1e4, -1e4, 0.0], [0.0, 0.0, -math.inf]], dtype=torch.float64)
    scored = score_tokens(logits, torch.tensor([0, 1]), 1.0, 1.0)
    assert scored.entropy.tolist() == pytest.approx([0.0, math.log(2)], abs=1e-12)
    assert scored.logp.tolist() == pytest.approx([0.0, -math.log(2)], abs=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("top_p", [1e-9, 0.5, 0.999999, 1.0])
@pytest.mark.parametrize("temperature", [0.01, 1.0, 10.0])
def test_one_possible_token_is_exact(temperature: float, top_p: float, dtype: torch.dtype) -> None:
    """All but one logit −∞, or so far below that exp is 0: log-probability 0 and entropy 0, to the last bit."""
    for nothing in (-math.inf, -1e30):
        got = score_all(torch.tensor([nothing, 2.5, nothing], dtype=dtype), temperature, top_p)
        assert all(got[name][1].item() == 0.0 for name in NAMES)
        assert got["entropy"].tolist() == got["entropy_q"].tolist() == [0.0] * 3
        if nothing == -math.inf:
            assert got["logp"].tolist() == got["logq"].tolist() == [-math.inf, 0.0, -math.inf]


def test_log_probability_is_not_floored() -> None:
    """A token of logp −2e6 reads so, not as some lowest representable probability."""
    z = torch.tensor([1e4, -1e4, 1e4 - 100.0], dtype=torch.float64)
    got = score_all(z, 0.01, 1.0)
    assert got["logp"].tolist() == got["logq"].tolist() == [0.0, -2e6, -1e4]
    assert score_all(z / 100, 1.0, 1.0)["logp"].tolist() == close(enumerate_policy((z / 100).tolist(), 1.0).logp)


# shapes, dtypes, the caller's tensor


@pytest.mark.parametrize("top_p", [0.8, 1.0])
def test_any_batch_shape(top_p: float) -> None:
    """[V], [T, V] and [N, T, V] hold the same rows; so do a view that is not contiguous and a batch without rows."""
    z = logits_of("normal", 6, 300, 4).reshape(2, 3, 300)
    tokens = z.argmax(-1)
    whole = score_tokens(z, tokens, 0.7, top_p)
    flat = score_tokens(z.reshape(6, 300), tokens.reshape(6), 0.7, top_p)
    turned = score_tokens(z.transpose(0, 1).contiguous().transpose(0, 1), tokens, 0.7, top_p)
    none = score_tokens(z[:0], tokens[:0], 0.7, top_p)
    for name in NAMES:
        values = getattr(whole, name)
        assert values.shape == (2, 3)
        assert torch.allclose(values.reshape(6), getattr(flat, name), rtol=0, atol=1e-13), name
        assert torch.allclose(values, getattr(turned, name), rtol=0, atol=1e-13), name
        assert getattr(none, name).shape == (0, 3)
        for n, t in itertools.product(range(2), range(3)):
            single = getattr(score_tokens(z[n, t], tokens[n, t], 0.7, top_p), name)
            assert single.shape == ()
            assert single.item() == close(values[n, t].item()), name
    logp = torch.log_softmax(z, -1)
    assert torch.equal(nucleus(logp, top_p).reshape(6, 300), nucleus(logp.reshape(6, 300), top_p))
    assert torch.equal(nucleus(logp, top_p)[1, 2], nucleus(logp[1, 2], top_p))


@pytest.mark.parametrize("top_p", [0.8, 1.0])
@pytest.mark.parametrize("narrow", [torch.float32, torch.bfloat16])
def test_dtype_is_the_one_of_the_computation(narrow: torch.dtype, top_p: float) -> None:
    """Narrow logits scored in float64 are, bit for bit, the scores of the same numbers held in float64."""
    z, tokens = logits_of("normal", 5, 300, 7).to(narrow), torch.arange(5)
    wide, expected = (score_tokens(t, tokens, 0.7, top_p, torch.float64) for t in (z, z.double()))
    for name in NAMES:
        assert getattr(wide, name).dtype == torch.float64
        assert torch.equal(getattr(wide, name), getattr(expected, name)), name
        assert getattr(score_tokens(z.float(), tokens, 0.7, top_p), name).dtype == torch.float32
    single = score_tokens(z, tokens, 0.7, top_p, torch.float32)
    # d reaches −15, where half an ulp of float32 is 5e-7; a log of a sum of 300 terms adds 1e-6 at most
    assert torch.allclose(single.logp.double(), expected.logp, rtol=0, atol=5e-6)
    assert torch.allclose(single.entropy.double(), expected.entropy, rtol=0, atol=2e-5)
    assert torch.allclose(single.entropy_q.double(), expected.entropy_q, rtol=0, atol=2e-5)


@pytest.mark.parametrize("top_p", [0.8, 1.0])
@pytest.mark.parametrize("dtype", [None, torch.float32, torch.float64])
@pytest.mark.parametrize("own", [torch.float32, torch.float64])
@pytest.mark.parametrize("mode", ["plain", "graph", "no_grad", "forward"])
def test_the_callers_logits_are_left_alone(
    mode: str, own: torch.dtype, dtype: torch.dtype | None, top_p: float
) -> None:
    z = logits_of("masked", 3, 300, 2).to(own)
    before, tokens = z.clone(), z.argmax(-1)
    if mode == "forward":
        torch.func.jvp(lambda t: values_of(score_tokens(t, tokens, 0.7, top_p, dtype)), (z,), (torch.ones_like(z),))
    elif mode == "no_grad":
        with torch.no_grad():
            score_tokens(z.requires_grad_(), tokens, 0.7, top_p, dtype)
    else:
        score_tokens(z.requires_grad_(mode == "graph"), tokens, 0.7, top_p, dtype)
    nucleus(torch.log_softmax(z, -1), top_p)
    assert torch.equal(z.detach(), before)


@pytest.mark.parametrize("top_p", [0.8, 1.0])
def test_the_same_numbers_with_and_without_a_graph(top_p: float) -> None:
    """Without a graph the tensors are reused in place; no number may change by that."""
    z, tokens = logits_of("masked", 4, 300, 3), torch.arange(4)
    plain = score_tokens(z, tokens, 0.7, top_p)
    graph = score_tokens(z.clone().requires_grad_(), tokens, 0.7, top_p)
    for name in NAMES:
        assert getattr(graph, name).requires_grad
        assert not getattr(plain, name).requires_grad
        assert torch.equal(getattr(plain, name), getattr(graph, name)), name


# derivatives


def naive(z: Tensor, tokens: Tensor, temperature: float, inside: Tensor) -> tuple[Tensor, ...]:
    """log π, log q and both entropies in a line each, given the nucleus; impossible tokens are left out of the sums."""

    def entropy(logs: Tensor) -> Tensor:
        logs = torch.where(torch.isfinite(logs), logs, 0.0)
        return -(torch.where(logs < 0, logs.exp(), 0.0) * logs).sum(-1)

    logp = torch.log_softmax(z / temperature, -1)
    logq = torch.log_softmax((z / temperature).masked_fill(~inside, -math.inf), -1)
    picked = [logs.gather(-1, tokens[..., None])[..., 0] for logs in (logp, logq)]
    return (*picked, entropy(logp), entropy(logq))


@settings(FAST, max_examples=30)
@given(
    st.sampled_from(["normal", "ties", "masked", "shifted"]),
    st.sampled_from([2, 5, 40, 300]),
    SEEDS,
    st.floats(0.3, 3.0),
    st.one_of(st.just(1.0), st.floats(0.1, 0.99)),
)
def test_derivatives_against_naive_autograd(
    kind: str, vocabulary: int, seed: int, temperature: float, top_p: float
) -> None:
    """Reverse mode equals autograd of the naive formula, and forward mode (`jvp`) equals reverse along a tangent.

    Gradients are of order 1/temperature ≤ 4 and come from sums of at most 300 terms; logits near 1e4 (`shifted`) reach
    the naive formula divided by the temperature, which costs it 4e-12.
    """
    z = logits_of(kind, 3, vocabulary, seed)
    tokens = z.argmax(-1)
    logp = torch.log_softmax((z - z.amax(-1, keepdim=True)) / temperature, -1)
    inside = nucleus(logp, top_p, rounding=rounding_of(z, temperature))
    generator = torch.Generator().manual_seed(seed)
    tangent = torch.randn(z.shape, generator=generator, dtype=torch.float64)
    weights = torch.randn(3, generator=generator, dtype=torch.float64)

    def scores(t: Tensor) -> tuple[Tensor, ...]:
        return values_of(score_tokens(t, tokens, temperature, top_p))

    forward = torch.func.jvp(scores, (z,), (tangent,))[1]
    for index, name in enumerate(NAMES):
        own, slow = z.clone().requires_grad_(), z.clone().requires_grad_()
        (gradient,) = torch.autograd.grad((weights * scores(own)[index]).sum(), own)
        (expected,) = torch.autograd.grad((weights * naive(slow, tokens, temperature, inside)[index]).sum(), slow)
        assert bool(torch.isfinite(gradient).all()), name
        assert torch.allclose(gradient, expected, rtol=0, atol=1e-10), name
        assert float(weights @ forward[index]) == pytest.approx(float((gradient * tangent).sum()), abs=1e-11), name


@pytest.mark.parametrize("top_p", [0.8, 1.0])
def test_first_and_second_derivatives_by_differences(top_p: float) -> None:
    """gradcheck's own tolerances; the nucleus of these rows is not at an edge, so a step of 1e-6 does not change it."""
    z = logits_of("normal", 3, 6, 1).requires_grad_()
    tokens = z.argmax(-1)
    assert int((~nucleus(torch.log_softmax(z.detach() / 1.3, -1), 0.8)).sum()) > 0

    def scores(t: Tensor) -> tuple[Tensor, ...]:
        return values_of(score_tokens(t, tokens, 1.3, top_p))

    assert torch.autograd.gradcheck(scores, (z,), check_forward_ad=True)
    assert torch.autograd.gradgradcheck(scores, (z,), check_fwd_over_rev=True)


@pytest.mark.parametrize("kind", ["extreme", "masked", "one_left"])
@pytest.mark.parametrize("temperature", [0.01, 1.0, 10.0])
@pytest.mark.parametrize("top_p", [1e-9, 0.5, 0.999999, 1.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_no_gradient_is_nan(kind: str, temperature: float, top_p: float, dtype: torch.dtype) -> None:
    """Tokens inside the nucleus, outside it, and of logit −∞; both modes."""
    z = logits_of(kind, 1, 300, 6)[0].to(dtype)
    tokens = torch.cat([z.argmax(-1, keepdim=True), torch.arange(0, 300, 30)])
    logits = z.repeat(len(tokens), 1)

    def scores(t: Tensor) -> tuple[Tensor, ...]:
        return values_of(score_tokens(t, tokens, temperature, top_p))

    for index, name in enumerate(NAMES):
        own = logits.clone().requires_grad_()
        (gradient,) = torch.autograd.grad(scores(own)[index].sum(), own)
        assert bool(torch.isfinite(gradient).all()), name
        assert not bool(gradient[torch.isneginf(logits)].any()) or name in ("logp", "logq")
    for name, tangent in zip(NAMES, torch.func.jvp(scores, (logits,), (torch.ones_like(logits),))[1], strict=True):
        assert bool(torch.isfinite(tangent).all()), name
