"""Step and sequence diagnostics against slow enumeration in plain Python, their inequalities, and the features φ."""

from __future__ import annotations

import dataclasses
import itertools
import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from entropy_probe.errors import ConfigError, MeasurementError
from entropy_probe.estimators import token_stats
from entropy_probe.estimators.policy import score_tokens
from entropy_probe.estimators.token_stats import (
    DistributionDiagnostics,
    baseline_features,
    sequence_diagnostics,
    step_diagnostics,
)

FAST = settings(derandomize=True, database=None, deadline=None, max_examples=60)


def close(expected: Any) -> Any:
    """Logits reach 1e4 in size: an ulp there is 2e-12, and a sum of a few of them stays below this."""
    return pytest.approx(expected, rel=1e-11, abs=1e-11)


KINDS = st.sampled_from(["normal", "peaked", "ties", "extreme", "shifted", "masked", "one_left"])
TOP_P = st.one_of(st.sampled_from([1e-9, 0.5, 0.9, 1 - 1e-9, 1.0]), st.floats(1e-6, 1.0))
TEMPERATURE = st.sampled_from([0.01, 0.3, 1.0, 2.0])


def logits_of(kind: str, steps: int, vocabulary: int, seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    z = torch.randn(steps, vocabulary, generator=generator, dtype=torch.float64)
    if kind == "peaked":
        return 20 * z
    if kind == "ties":
        return z.round()
    if kind == "extreme":
        return torch.tensor([-1e4, 0.0, 1e4], dtype=torch.float64)[(z.abs() * 100).long() % 3]
    if kind == "shifted":
        return z - 1e4
    if kind in ("masked", "one_left"):
        share = 0.6 if kind == "masked" else 1.0
        mask = torch.rand(steps, vocabulary, generator=generator) < share
        mask.scatter_(1, z.abs().argmax(1, keepdim=True), False)
        return z.masked_fill(mask, -math.inf)
    return 3 * z


def enumerate_step(z: list[float], top_p: float, temperature: float, eos: list[int]) -> dict[str, float]:
    """The definitions, token by token."""
    best = max(z)
    weights = [math.exp((x - best) / temperature) for x in z]
    total = math.fsum(weights)
    p = [w / total for w in weights]
    head, above = [], 0.0
    ranked = sorted(range(len(z)), key=p.__getitem__, reverse=True)
    for _, tied in itertools.groupby(ranked, key=p.__getitem__):  # tokens of equal probability are in together
        if above >= top_p + 1e-6:  # the edge that policy.py allows a float32 sampler
            break
        head.extend(tied)
        above = math.fsum(p[j] for j in head)
    inside = set(head) if top_p < 1 else set(range(len(z)))
    mass = math.fsum(p[i] for i in inside)
    q = [p[i] / mass if i in inside else 0.0 for i in range(len(z))]
    s, tail = (mass, math.fsum(p[i] for i in range(len(z)) if i not in inside))
    if top_p >= 1:
        s, tail = p[head[0]], math.fsum(p[i] for i in head[1:])
    mean = math.fsum(x * y for x, y in zip(q, z, strict=True) if x)
    largest = sorted(z, reverse=True)

    def entropy(distribution: list[float]) -> float:
        return -math.fsum(x * math.log(x) for x in distribution if x)

    return {
        "rb_entropy": entropy(q),
        "policy_entropy": entropy(p),
        "head_mass": s,
        "tail_mass": tail,
        "two_point_entropy": entropy([s, tail]),
        "top1_prob": max(q),
        "margin": largest[0] - largest[1],
        "collision": math.fsum(x * x for x in q),
        "renyi2": -math.log(math.fsum(x * x for x in q)),
        "effective_support": math.exp(entropy(q)),
        "logit_mean": mean,
        "logit_var": math.fsum(x * (y - mean) ** 2 for x, y in zip(q, z, strict=True) if x),
        "eos_prob": math.fsum(q[i] for i in eos),
    }


def mean(values: list[float]) -> float:
    return math.fsum(values) / len(values)


# against the definitions


@FAST
@given(KINDS, st.integers(1, 40), st.integers(2, 200), st.integers(0, 10_000), TOP_P, TEMPERATURE)
def test_every_field_against_enumeration(
    kind: str, steps: int, vocabulary: int, seed: int, top_p: float, temperature: float
) -> None:
    logits = logits_of(kind, steps, vocabulary, seed)
    eos = [seed % vocabulary, (seed + 1) % vocabulary]
    possible = torch.isfinite(logits).double()
    tokens = possible.multinomial(1, generator=torch.Generator().manual_seed(seed))[:, 0]
    pack = DistributionDiagnostics(top_p, temperature, eos).compute_from_logits(logits, tokens=tokens)
    slow = [enumerate_step(z, top_p, temperature, eos) for z in logits.tolist()]
    columns = {name: [row[name] for row in slow] for name in slow[0]}
    assert set(columns) == {field.name for field in dataclasses.fields(pack.step)}
    for name, column in columns.items():
        assert getattr(pack.step, name).tolist() == close(column), name

    surprisal = []
    for z, token in zip(logits.tolist(), tokens.tolist(), strict=True):
        total = math.fsum(math.exp((x - max(z)) / temperature) for x in z)
        surprisal.append(math.log(total) - (z[token] - max(z)) / temperature)
    h = columns["rb_entropy"]
    expected = {
        "gen_len": steps,
        "rb_entropy_sum": math.fsum(h),
        "rb_entropy_mean": mean(h),
        "rb_entropy_min": min(h),
        "rb_entropy_max": max(h),
        "rb_entropy_early": mean(h[:16]),
        "rb_entropy_late": mean(h[max(0, steps - 16) :]),
        "policy_entropy_sum": math.fsum(columns["policy_entropy"]),
        "naive_surprisal_sum": math.fsum(surprisal),
        "naive_surprisal_mean": mean(surprisal),
        "naive_surprisal_var": mean([(x - mean(surprisal)) ** 2 for x in surprisal]),
        "eos_prob_mean": mean(columns["eos_prob"]),
        "eos_prob_max": max(columns["eos_prob"]),
        "eos_prob_last": columns["eos_prob"][-1],
    }
    for name in ("head_mass", "tail_mass", "two_point_entropy", "top1_prob", "margin", "collision", "renyi2"):
        expected[f"{name}_mean"] = mean(columns[name])
    for name in ("effective_support", "logit_mean", "logit_var"):
        expected[f"{name}_mean"] = mean(columns[name])
    assert dataclasses.asdict(pack.seq) == close(expected)


@FAST
@given(KINDS, st.integers(2, 200), st.integers(0, 10_000), TOP_P, TEMPERATURE)
def test_inequalities(kind: str, vocabulary: int, seed: int, top_p: float, temperature: float) -> None:
    step = step_diagnostics(logits_of(kind, 5, vocabulary, seed), top_p, temperature, seed % vocabulary)
    slack = 1e-12  # rounding of sums of at most 200 terms of at most 1
    for field in dataclasses.fields(step):
        values = getattr(step, field.name)
        assert values.dtype == torch.float64
        assert not bool(values.isnan().any()), field.name
        if field.name not in ("logit_mean", "margin"):
            assert bool((torch.isfinite(values) & (values >= 0)).all()), field.name
    assert bool((step.margin >= 0).all())
    assert bool((-step.top1_prob.log() <= step.renyi2 + slack).all())
    assert bool((step.renyi2 <= step.rb_entropy + slack).all())
    assert bool((step.effective_support >= 1).all())
    assert bool((step.effective_support <= vocabulary * (1 + slack)).all())
    assert bool((step.collision >= 1 / vocabulary - slack).all())
    assert bool((step.collision <= step.top1_prob + slack).all())
    assert bool((step.head_mass + step.tail_mass - 1).abs().le(slack).all())
    assert bool((step.head_mass >= (top_p if top_p < 1 else 1 / vocabulary) - slack).all())
    assert bool((step.two_point_entropy <= math.log(2) + slack).all())
    # grouping: H(π) = H(s, 1−s) + s·H(head) + (1−s)·H(tail), and q is the head where top_p < 1
    grouped = step.two_point_entropy + (step.head_mass * step.rb_entropy if top_p < 1 else 0.0)
    assert bool((grouped <= step.policy_entropy + slack).all())
    if top_p == 1:
        assert torch.equal(step.rb_entropy, step.policy_entropy)
        assert torch.equal(step.head_mass, step.top1_prob)


# single values that can be checked by eye


def test_known_values() -> None:
    """π = (½, ¼, ¼): a nucleus of 0.6 ends between two tokens that are as probable as each other, and holds both.

    π = (½, ⅓, ⅙): a nucleus of 0.6 holds two tokens (the one that crosses stays), so q = (⅗, ⅖).
    """
    logits = torch.tensor([[math.log(4.0), math.log(2.0), math.log(2.0)]], dtype=torch.float64)
    whole, tied = step_diagnostics(logits, 1.0, 1.0, [2, 2]), step_diagnostics(logits, 0.6, 1.0, 2)
    assert whole.rb_entropy.item() == pytest.approx(1.5 * math.log(2), abs=1e-15)
    assert (whole.head_mass.item(), whole.tail_mass.item()) == pytest.approx((0.5, 0.5), abs=1e-15)
    assert whole.two_point_entropy.item() == pytest.approx(math.log(2), abs=1e-15)
    assert whole.collision.item() == pytest.approx(3 / 8, abs=1e-15)
    assert whole.margin.item() == pytest.approx(math.log(2), abs=1e-15)
    assert whole.eos_prob is not None
    assert whole.eos_prob.item() == pytest.approx(0.25, abs=1e-15)
    assert (tied.head_mass.item(), tied.tail_mass.item()) == pytest.approx((1.0, 0.0), abs=1e-15)
    assert tied.rb_entropy.item() == tied.policy_entropy.item() == whole.rb_entropy.item()
    assert tied.eos_prob is not None
    assert tied.eos_prob.item() == pytest.approx(0.25, abs=1e-15)
    cut = step_diagnostics(torch.tensor([[3.0, 2.0, 1.0]], dtype=torch.float64).log(), 0.6, 1.0, 2)
    assert (cut.head_mass.item(), cut.tail_mass.item()) == pytest.approx((5 / 6, 1 / 6), abs=1e-15)
    assert cut.top1_prob.item() == pytest.approx(3 / 5, abs=1e-15)
    assert cut.collision.item() == pytest.approx(13 / 25, abs=1e-15)
    entropy = math.log(2) / 2 + math.log(3) / 3 + math.log(6) / 6
    assert cut.policy_entropy.item() == pytest.approx(entropy, abs=1e-15)
    assert cut.eos_prob is not None
    assert cut.eos_prob.item() == 0.0
    # temperature divides inside the policy and leaves the logits' own margin alone
    assert step_diagnostics(logits, 1.0, 0.5).margin.item() == pytest.approx(math.log(2), abs=1e-15)
    assert step_diagnostics(logits, 1.0, 0.5).top1_prob.item() == pytest.approx(2 / 3, abs=1e-15)


def test_one_possible_token_is_exact() -> None:
    step = step_diagnostics(torch.tensor([[-math.inf, 2.5, -math.inf]]), 1.0, 1.0, 0)
    values = {name: value.item() for name, value in vars(step).items()}
    assert values == {
        "rb_entropy": 0.0,
        "policy_entropy": 0.0,
        "head_mass": 1.0,
        "tail_mass": 0.0,
        "two_point_entropy": 0.0,
        "top1_prob": 1.0,
        "margin": math.inf,
        "collision": 1.0,
        "renyi2": 0.0,
        "effective_support": 1.0,
        "logit_mean": 2.5,
        "logit_var": 0.0,
        "eos_prob": 0.0,
    }


@pytest.mark.parametrize("gap", [40.0, 200.0])
def test_a_tiny_tail_is_not_rounded_away(gap: float) -> None:
    """1 − s would be 0 from a gap of 37 on. Two-point entropy of a tail ε: ε(1 − ln ε) to first order."""
    step = step_diagnostics(torch.tensor([[0.0, -gap]], dtype=torch.float64), 1.0, 1.0)
    assert step.tail_mass.item() == pytest.approx(math.exp(-gap), rel=1e-12, abs=0)
    assert step.two_point_entropy.item() == pytest.approx(math.exp(-gap) * (1 + gap), rel=1e-12, abs=0)


def test_logits_of_1e4_keep_their_digits() -> None:
    """Logits and their shift by 1e4 are both exact in binary; dividing by the temperature first would cost 1e-12."""
    z = logits_of("normal", 6, 50, 3).mul(2**20).round() / 2**20
    plain, shifted = step_diagnostics(z, 0.9, 0.3), step_diagnostics(z + 1e4, 0.9, 0.3)
    for name in vars(plain):
        if name not in ("logit_mean", "eos_prob"):
            assert torch.equal(getattr(plain, name), getattr(shifted, name)), name


def test_masks_by_the_smallest_number_equal_masks_by_infinity() -> None:
    infinite = logits_of("masked", 4, 30, 5)
    smallest = infinite.masked_fill(torch.isneginf(infinite), torch.finfo(torch.float32).min)
    a, b = step_diagnostics(infinite, 0.9, 0.01, 1), step_diagnostics(smallest, 0.9, 0.01, 1)
    for name in vars(a):
        assert torch.equal(getattr(a, name), getattr(b, name)), name


# independence of everything around a step


def test_steps_do_not_depend_on_padding_batch_or_chunk(monkeypatch: pytest.MonkeyPatch) -> None:
    lengths, longest = [3, 7, 1, 12], 12
    responses = [logits_of("normal", length, 37, length) for length in lengths]
    padded = torch.stack([torch.cat([z, torch.zeros(longest - len(z), 37)]) for z in responses])
    for size in (1 << 22, 5 * 37, 1):
        monkeypatch.setattr(token_stats, "_CHUNK", size)
        step = step_diagnostics(padded, 0.8, 0.7, 4)
        features = baseline_features(padded, 0.8, 0.7, 20)
        assert features.shape == (4, longest, 7)
        for row, z in enumerate(responses):
            alone = DistributionDiagnostics(0.8, 0.7, 4).compute_from_logits(z, tokens=z.argmax(1))
            for name, value in vars(step).items():
                assert torch.allclose(value[row, : len(z)], getattr(alone.step, name), rtol=0, atol=1e-13), name
            assert torch.allclose(features[row, : len(z)], baseline_features(z, 0.8, 0.7, 20), rtol=0, atol=1e-13)
            surprisal = -score_tokens(z[None], z.argmax(1)[None], 0.7, 1.0).logp[0]
            assert alone.seq.naive_surprisal_sum == pytest.approx(float(surprisal.sum()), abs=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_float64_inside_and_no_gradient(dtype: torch.dtype) -> None:
    narrow = logits_of("normal", 4, 60, 2).to(dtype).requires_grad_()
    a, b = (step_diagnostics(z, 0.9, 0.7, 0) for z in (narrow, narrow.detach().double()))
    for name in vars(a):
        assert torch.equal(getattr(a, name), getattr(b, name)), name
        assert not getattr(a, name).requires_grad
    features = baseline_features(narrow, 0.9, 0.7, 4)
    assert features.dtype == torch.float64
    assert not features.requires_grad


# sequences


def test_windows_extremes_and_surprisals() -> None:
    """Entropies 0, 1, .., 39: the first 16 average 7.5, the last 16 31.5."""
    step = step_diagnostics(torch.zeros(40, 2), 1.0, 1.0)
    step = dataclasses.replace(step, rb_entropy=torch.arange(40, dtype=torch.float64), eos_prob=torch.arange(40.0) / 40)
    seq = sequence_diagnostics(step, torch.tensor([1.0, 3.0] * 20))
    assert (seq.rb_entropy_early, seq.rb_entropy_late) == (7.5, 31.5)
    assert (seq.rb_entropy_min, seq.rb_entropy_max, seq.rb_entropy_sum, seq.rb_entropy_mean) == (0, 39, 780, 19.5)
    assert (seq.naive_surprisal_sum, seq.naive_surprisal_mean, seq.naive_surprisal_var) == (80, 2, 1)
    assert seq.eos_prob_last == seq.eos_prob_max == pytest.approx(39 / 40)


def test_surprisal_from_scores_equals_surprisal_from_tokens() -> None:
    """Under π in both: at top_p < 1 too, where log q is another number."""
    logits, tokens = logits_of("normal", 20, 30, 9), torch.arange(20)
    measure = DistributionDiagnostics(0.7, 0.8)
    logp = score_tokens(logits[None], tokens[None], 0.8, 0.7).logp[0]
    by_tokens, by_scores = measure.compute_from_logits(logits, tokens=tokens), measure.compute_from_logits(logits, logp)
    for name, value in vars(by_tokens.seq).items():
        assert getattr(by_scores.seq, name) == (value if value is None else pytest.approx(value, rel=1e-12)), name
    assert by_tokens.seq.naive_surprisal_sum == pytest.approx(-float(logp.sum()), rel=1e-12)
    none = measure.compute_from_logits(logits).seq
    absent = {name for name, value in vars(none).items() if value is None}
    surprisals, eos = ("sum", "mean", "var"), ("mean", "max", "last")
    assert absent == {f"naive_surprisal_{x}" for x in surprisals} | {f"eos_prob_{x}" for x in eos}
    single = measure.compute_from_logits(logits[:1], logp[:1]).seq
    assert single.naive_surprisal_var == 0.0


# φ


@FAST
@given(KINDS, st.integers(1, 12), st.integers(2, 60), st.integers(0, 10_000), TOP_P, TEMPERATURE)
def test_features_against_enumeration(
    kind: str, steps: int, vocabulary: int, seed: int, top_p: float, temperature: float
) -> None:
    logits = logits_of(kind, steps, vocabulary, seed)
    features = baseline_features(logits, top_p, temperature, 50)
    assert bool(torch.isfinite(features).all())
    for t, z in enumerate(logits.tolist()):
        slow = enumerate_step(z, top_p, temperature, [])
        expected = [slow[name] for name in ("policy_entropy", "top1_prob", "margin", "head_mass")]
        expected[2] = min(expected[2], 1e4)
        expected += [slow["two_point_entropy"], slow["logit_var"], t / 50]
        assert features[t].tolist() == close(expected)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("temperature", [1.0, 0.6])
@pytest.mark.parametrize("scale", [0.1, 3.0, 40.0])
def test_features_alone_are_those_of_the_diagnostics(scale: float, temperature: float, dtype: torch.dtype) -> None:
    """float32 rounds each of the V terms by 6e-8 of itself and each d by 6e-8·|d|; a vocabulary that is no multiple of
    the blocks, tokens that cannot be, and steps that are all but certain."""
    logits = scale * torch.randn(9, 1000, generator=torch.Generator().manual_seed(3), dtype=dtype)
    logits[2, 5:] = -torch.inf
    logits[3, 7] = 300.0
    expected = token_stats.step_features(token_stats.step_diagnostics(logits, 1.0, temperature))
    found = token_stats.features_of_logits(logits, 1.0, temperature)
    rounding = 1e-12 if dtype is torch.float64 else 1e-6 * max(1.0, scale)
    torch.testing.assert_close(found, expected, rtol=rounding, atol=rounding * max(1.0, scale))
    nucleus = token_stats.step_features(token_stats.step_diagnostics(logits, 0.8, temperature))
    assert torch.equal(token_stats.features_of_logits(logits, 0.8, temperature), nucleus)


def test_features_are_functions_of_the_prefix() -> None:
    """What comes after a step, the response's own length included, is not in its features."""
    logits = logits_of("normal", 12, 20, 4)
    whole = baseline_features(logits, 0.9, 1.0, 12)
    for length in range(1, 12):
        assert torch.allclose(baseline_features(logits[:length], 0.9, 1.0, 12), whole[:length], rtol=0, atol=1e-13)


# errors


def test_errors_name_what_was_given() -> None:
    logits = torch.zeros(3, 4)
    measure = DistributionDiagnostics(0.9, 1.0)
    for top_p in (0.0, -1.0, 1.5, math.nan):
        with pytest.raises(ConfigError, match=rf"^top_p: is {top_p}"):
            DistributionDiagnostics(top_p, 1.0)
        with pytest.raises(ConfigError, match="top_p"):
            baseline_features(logits, top_p, 1.0, 3)
    for temperature in (0.0, -1.0, math.inf, math.nan):
        with pytest.raises(ConfigError, match=rf"^temperature: is {temperature}"):
            DistributionDiagnostics(1.0, temperature)
    for eos in (4, -1, [0, 7]):
        with pytest.raises(ConfigError, match="the logits have 4 entries"):
            step_diagnostics(logits, 1.0, 1.0, eos)
    for value in (math.nan, math.inf, -math.inf):
        broken = logits.clone()
        broken[1] = value
        with pytest.raises(MeasurementError, match=f"the largest logit of a step is {value}"):
            measure.compute_from_logits(broken)
    with pytest.raises(MeasurementError, match="give one of them"):
        measure.compute_from_logits(logits, torch.zeros(3), torch.zeros(3, dtype=torch.long))
    with pytest.raises(MeasurementError, match="the response has no token"):
        measure.compute_from_logits(logits[:0])
    steps = step_diagnostics(logits, 1.0, 1.0)
    with pytest.raises(MeasurementError, match="2 tokens for 3 steps"):
        sequence_diagnostics(steps, torch.zeros(2))
    impossible = logits.clone()
    impossible[2, 1] = -math.inf
    with pytest.raises(MeasurementError, match="the surprisal of token 2 is inf"):
        measure.compute_from_logits(impossible, tokens=torch.tensor([1, 1, 1]))
