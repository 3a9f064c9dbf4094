"""The sampler: exact distribution, exact cache, and responses that do not depend on how they are batched."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from scipy import stats

import models
from architectures import tiny_model
from entropy_probe.errors import ConfigError, MeasurementError
from entropy_probe.estimators.policy import score_tokens
from entropy_probe.model.forward import BoundModel, bind
from entropy_probe.stages.responses.drawing import draw, masses, noise_of
from entropy_probe.stages.responses.sampling import StopStrings, Stream, sample
from entropy_probe.stages.responses.steps import OverCache, Unpadded, WholeRows, agreement, left_padded

V = models.VOCABULARY
PROMPTS = [[5, 6, 7, 0, 8, 9, 10, 11, 12, 13, 14], [20], [30, models.EOS, 32, 33, 34]]
POLICIES = [(1.0, 1.0), (0.6, 1.0), (1.0, 0.7), (1.6, 0.85)]


@pytest.fixture(autouse=True)
def _one_thread() -> Any:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def bound_model(architecture: str, dtype: torch.dtype = torch.float64, attention: str | None = None) -> BoundModel:
    model = models.tiny_model(architecture)
    if attention is not None:
        model.set_attn_implementation(attention)
    return bind(model, dtype)


def run(bound: BoundModel, prompts: Any = PROMPTS, seed: int = 3, first: int = 0, **changes: Any) -> list[list[int]]:
    settings: dict[str, Any] = {
        "num_return_sequences": 5,
        "temperature": 1.0,
        "top_p": 1.0,
        "max_new_tokens": 12,
        "eos_ids": [models.EOS],
        "noise": Stream.of(seed, len(prompts), first),
        "gen_batch_size": 64,
    }
    return sample(bound, prompts, **{**settings, **changes})


# the cache


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("architecture", list(models.CONFIGS))
def test_cached_logits_are_those_of_the_full_forward(architecture: str, attention: str) -> None:
    """Token by token, rows left-padded, the cache repeated and rows leaving; mistral's and gemma2's window is 8."""
    if (architecture, attention) == ("gemma2", "sdpa"):
        pytest.skip("soft-capped logits have the eager implementation only")
    bound = bound_model(architecture, attention=attention)
    generator = torch.Generator().manual_seed(0)
    rows = [list(prompt) for prompt in PROMPTS for _ in range(2)]
    ids, mask = left_padded(PROMPTS, pad=0)
    logits, cache = bound.next_logits(ids, mask)
    twice = torch.arange(3).repeat_interleave(2)
    cache.batch_select_indices(twice)
    logits, mask = logits[twice], mask[twice]
    worst = 0.0
    for step in range(14):
        for row, own in zip(rows, logits, strict=True):
            full = bound.direct_logits(torch.tensor([row]))[0, -1]
            worst = max(worst, float((full - own).detach().abs().max()))
        if step == 5:
            kept = torch.tensor([0, 2, 3, 5])
            cache.batch_select_indices(kept)
            rows, mask = [rows[i] for i in kept], mask[kept]
        tokens = torch.randint(V, (len(rows), 1), generator=generator)
        for row, token in zip(rows, tokens[:, 0].tolist(), strict=True):
            row.append(token)
        mask = torch.cat([mask, torch.ones(len(rows), 1, dtype=mask.dtype)], 1)
        logits, cache = bound.next_logits(tokens, mask, cache)
    assert worst < 1e-10  # float64 rounding of logits of order 10 through two layers: 1e-14 to 1e-13


def test_next_logits_leave_the_model_as_it_was() -> None:
    """No graph, dropout off for the call only."""
    model = models.add_adapter(models.tiny_model("llama"), "llama", lora_dropout=0.5).train()
    bound = bind(model)
    ids, mask = left_padded(PROMPTS, pad=0)
    first, second = (bound.next_logits(ids, mask)[0] for _ in range(2))
    assert torch.equal(first, second)
    assert not first.requires_grad
    assert model.training


def test_rows_that_the_model_cannot_hold() -> None:
    bound = bound_model("gpt2")
    with pytest.raises(MeasurementError, match="cannot hold rows of 65 tokens"):
        run(bound, [[5] * 60], max_new_tokens=20, eos_ids=[])
    assert [len(r) for r in run(bound, [[5] * 60], max_new_tokens=5, eos_ids=[])] == [5] * 5


# models whose logits do not come over a key-value cache


def whole_row_by_row(bound: BoundModel, prompts: Any, group: int, length: int, seed: int) -> list[list[int]]:
    """Every token from the logits of its own row, unpadded, with the noise that belongs to it."""
    responses = []
    for n, prompt in enumerate(prompts):
        for g in range(group):
            noise, tokens = noise_of(seed, n, g), []
            while len(tokens) < length and tokens[-1:] != [models.EOS]:
                with torch.no_grad():
                    logits = bound.direct_logits(torch.tensor([[*prompt, *tokens]]))[:, -1]
                uniforms = torch.from_numpy(noise.random((1, (V - 1).bit_length())))
                tokens.append(int(draw(masses(logits, 1.0, 1.0), uniforms)))
            responses.append(tokens)
    return responses


def activated(architecture: str = "llama") -> Any:
    """LoRA that is switched on by tokens 9, 10 of the prompt: a cached pass sees one token, and so no adapter."""
    model = models.add_adapter(models.tiny_model(architecture), architecture, alora_invocation_tokens=[9, 10])
    return model.eval()


DIFFERS = "with its cache, logits differ by up to"
OTHER_CACHES: dict[str, tuple[Any, type, str]] = {
    "activated LoRA": (activated, WholeRows, DIFFERS),
    "positions of its own": (lambda: tiny_model("bart"), Unpadded, DIFFERS),
    "a state that padding enters": (lambda: tiny_model("mamba"), Unpadded, DIFFERS),
    "a cache that does not part with rows": (
        lambda: tiny_model("minimax"),
        WholeRows,
        "the cache of `minimax` cannot be used (",
    ),
    "attention and linear attention": (lambda: tiny_model("qwen3_next"), OverCache, ""),
    "attention and Mamba, experts": (lambda: tiny_model("jamba"), OverCache, ""),
    "a state that is not asked for": (lambda: tiny_model("rwkv"), WholeRows, "`rwkv` keeps no cache"),
}


@pytest.mark.parametrize("kind", list(OTHER_CACHES))
def test_what_is_sampled_is_what_is_scored(kind: str) -> None:
    """Whatever a model keeps of its prompt: rows of different length, some of which end early."""
    make, reads, why_not = OTHER_CACHES[kind]
    bound = bind(make(), torch.float64)
    prompts = [[5, 9, 10], [20, 30, 40, 9, 10, 21, 22, 23, 24], [7, 8, 9, 10], [7, 9, 10, 3]]
    drawn = run(bound, prompts, num_return_sequences=2, max_new_tokens=6, gen_batch_size=4)
    assert drawn == whole_row_by_row(bound, prompts, 2, 6, seed=3)
    (way,) = bound.ways
    assert way.steps is reads
    assert way.why.startswith(why_not)
    assert bool(way.why) == bool(why_not)


def test_agreement_is_of_every_position() -> None:
    """A difference at one position of one row is found, and its size."""
    bound = bound_model("llama")
    original, calls = BoundModel.next_logits, []

    def off(self: BoundModel, *args: Any, **options: Any) -> Any:
        calls.append(1)
        logits, cache = original(self, *args, **options)
        if len(calls) == 4:
            logits[1, 7] += 1e-3
        return logits, cache

    prompts, responses = PROMPTS[:2], [[5, 6, 7, 8], [9]]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(BoundModel, "next_logits", off)
        worst = agreement(bound, OverCache, prompts, responses, 5)
    assert worst.worst == pytest.approx(1e-3, rel=1e-9)
    assert worst.worst > 1e3 * worst.bound
    assert worst.example.startswith("token 4 after a prompt of ")
    for way in (OverCache, WholeRows):
        healthy = agreement(bound, way, prompts, responses, 5)
        assert healthy.worst < healthy.bound < 1e-11


# the distribution


def exact_q(bound: BoundModel, rows: torch.Tensor, temperature: float, top_p: float) -> torch.Tensor:
    """q of the token after each of `rows` [R, L], by sorting and adding up: [R, V]."""
    with torch.no_grad():
        p = torch.softmax(bound.direct_logits(rows)[:, -1] / temperature, -1)
    rows_of_q = []
    for row in p.tolist():
        q, total = [0.0] * V, 0.0
        for token in sorted(range(V), key=row.__getitem__, reverse=True):
            q[token] = row[token]
            total += row[token]
            if total >= top_p:
                break
        rows_of_q.append([mass / total for mass in q])
    return torch.tensor(rows_of_q, dtype=torch.float64)


def chi_square(counts: torch.Tensor, expected: torch.Tensor) -> float:
    """p-value, cells of fewer than 5 expected counts taken together; a count where nothing may fall gives 0."""
    if float(counts[expected == 0].sum()) > 0:
        return 0.0
    common = expected >= 5
    observed, theory = counts[common].tolist(), expected[common].tolist()
    rest = float(expected[~common].sum())
    if rest >= 5:
        observed, theory = [*observed, float(counts[~common].sum())], [*theory, rest]
    scale = sum(observed) / sum(theory)  # differs from 1 only where a rest below 5 was left out
    return float(stats.chisquare(observed, [scale * t for t in theory]).pvalue) if len(observed) > 1 else 1.0


@pytest.mark.parametrize(("temperature", "top_p"), POLICIES)
def test_pairs_and_third_tokens_follow_the_exact_distribution(temperature: float, top_p: float) -> None:
    """3 rows of a batch of different lengths, 1000 responses each: (first, second) jointly, and the third token.

    A response that ended early counts as `ended` where it has no token, so the end is tested too.
    """
    bound = bound_model("llama")
    group, ended = 1000, V
    responses = run(
        bound,
        num_return_sequences=group,
        temperature=temperature,
        top_p=top_p,
        max_new_tokens=3,
        gen_batch_size=2000,
        seed=17,
    )
    for n, prompt in enumerate(PROMPTS):
        pairs, third = torch.zeros(V, V + 1), torch.zeros(V + 1)
        for response in responses[n * group : (n + 1) * group]:
            tokens = response + [ended] * (3 - len(response))
            pairs[tokens[0], tokens[1]] += 1
            third[tokens[2]] += 1
        every = torch.arange(V)
        one = torch.cat([torch.tensor([prompt]).expand(V, -1), every[:, None]], 1)
        two = torch.cat([one.repeat_interleave(V, 0), every.repeat(V)[:, None]], 1)
        q1 = exact_q(bound, torch.tensor([prompt]), temperature, top_p)[0]
        q12 = torch.zeros(V, V + 1, dtype=torch.float64)
        q12[:, :V] = q1[:, None] * exact_q(bound, one, temperature, top_p)
        q12[models.EOS] = 0.0
        q12[models.EOS, ended] = q1[models.EOS]
        alive = q12[:, :V].clone()
        alive[:, models.EOS] = 0.0
        q3 = torch.zeros(V + 1, dtype=torch.float64)
        reached = alive.flatten() > 0
        q3[:V] = alive.flatten()[reached] @ exact_q(bound, two[reached], temperature, top_p)
        q3[ended] = 1 - alive.sum()
        assert chi_square(pairs.sum(1), group * q1) > 1e-4
        assert chi_square(pairs.flatten(), group * q12.flatten()) > 1e-4
        assert chi_square(third, group * q3) > 1e-4


@pytest.mark.parametrize("size", [2, 3, 64, 67, 130])
def test_draw_follows_the_masses(size: int) -> None:
    """20000 draws from random masses, a third of them zero; sizes around powers of two, where the tree is ragged."""
    generator = torch.Generator().manual_seed(size)
    mass = torch.rand(size, generator=generator).pow(3)
    mass[torch.arange(size) % 3 == 1] = 0.0
    draws = 20000
    uniforms = torch.from_numpy(noise_of(1, 2, size).random((draws, (size - 1).bit_length())))
    counts = torch.bincount(draw(mass.expand(draws, -1), uniforms), minlength=size)
    assert chi_square(counts.double(), draws * mass.double() / mass.double().sum()) > 1e-4


def test_draw_at_the_ends_of_the_unit_interval() -> None:
    """A token without mass is never drawn, not even by 0 or by the largest number below 1."""
    last = math.nextafter(1.0, 0.0)
    for size in (1, 2, 5, 67):
        levels = (size - 1).bit_length()
        for token in range(size):
            mass = torch.full((2, size), 0.0).index_fill_(1, torch.tensor([token]), 1e-30)
            uniforms = torch.tensor([[0.0] * levels, [last] * levels], dtype=torch.float64)
            assert draw(mass, uniforms).tolist() == [token, token]


def test_extreme_logits() -> None:
    logits = torch.tensor([[1e4, -1e4, float("-inf"), 1e4], [float("-inf")] * 3 + [-3e38]])
    mass = masses(logits, 1.0, 1.0)
    assert mass.tolist() == [[1, 0, 0, 1], [0, 0, 0, 1]]
    assert masses(logits[:1], 1.0, 1e-9).tolist() == [[1, 0, 0, 1]]  # as probable as each other: in together
    logits[0, 3] -= 1.0
    assert masses(logits[:1], 1.0, 1e-9).tolist() == [[1, 0, 0, 0]]
    for bad in (float("nan"), float("inf")):
        with pytest.raises(MeasurementError, match="not finite"):
            draw(masses(torch.tensor([[0.0, bad]]), 1.0, 1.0), torch.tensor([[0.5]], dtype=torch.float64))


def test_the_edge_of_the_nucleus_is_inside_the_scorers() -> None:
    """With a little over `top_p` above a token the sampler leaves it out, and the scorer's margin still holds it."""
    logits = torch.tensor([[0.5, 0.3, 0.2]], dtype=torch.float64).log()
    top_p = 0.8 - 5e-7
    assert (masses(logits, 1.0, top_p) > 0).tolist() == [[True, True, False]]
    assert (masses(logits, 1.0, 0.8 + 1e-9) > 0).all()
    assert torch.isfinite(score_tokens(logits[:, None].expand(1, 3, 3), torch.arange(3)[None], 1.0, top_p).logq).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(("temperature", "top_p"), POLICIES)
def test_every_sampled_token_has_finite_log_q(temperature: float, top_p: float, dtype: torch.dtype) -> None:
    bound = bound_model("qwen2", dtype)
    responses = run(bound, num_return_sequences=100, temperature=temperature, top_p=top_p, max_new_tokens=8, eos_ids=[])
    for n, prompt in enumerate(PROMPTS):
        own = torch.tensor(responses[n * 100 : (n + 1) * 100])
        rows = torch.cat([torch.tensor([prompt]).expand(100, -1), own], 1)
        with torch.no_grad():
            logits = bound.logits(rows, keep=slice(len(prompt) - 1, -1))
        scores = score_tokens(logits, own, temperature, top_p)
        assert torch.isfinite(scores.logq).all()
        assert torch.isfinite(scores.logp).all()


# the noise


def test_noise_belongs_to_seed_prompt_response_and_step() -> None:
    streams = {(s, n, g): noise_of(s, n, g).random(40) for s in (0, 1) for n in (0, 1, 2) for g in (0, 1, 2)}
    assert len(np.unique(np.concatenate(list(streams.values())))) == 40 * len(streams)
    in_steps = noise_of(1, 2, 0)
    assert np.array_equal(np.concatenate([in_steps.random(8) for _ in range(5)]), streams[1, 2, 0])
    noise_of(-1, 0, 0).random()


@pytest.mark.parametrize("top_p", [1.0, 0.8])
@pytest.mark.parametrize("architecture", list(models.CONFIGS))
def test_responses_do_not_depend_on_the_batch(architecture: str, top_p: float) -> None:
    """The same whatever `gen_batch_size`, whichever prompts come along, and when the prompts are split over runs."""
    bound = bound_model(architecture)
    settings = {"top_p": top_p, "eos_ids": range(0, V, 6), "max_new_tokens": 10}
    whole = run(bound, **settings)
    assert len({len(r) for r in whole}) > 3
    assert len({tuple(r) for r in whole}) > 8
    for size in (1, 2, 7, 10):
        assert run(bound, **settings, gen_batch_size=size) == whole
    assert run(bound, PROMPTS[1:], **settings, first=1) == whole[5:]
    three = run(bound, **settings, num_return_sequences=3)
    assert three == [whole[n * 5 + g] for n in range(3) for g in range(3)]
    assert run(bound, **{**settings, "max_new_tokens": 4}) == [r[:4] for r in whole]


def test_float32_responses_do_not_depend_on_the_batch() -> None:
    """15 × 12 tokens with some 6 choices each, moved by 1e-6: a thousandth of a response is expected to differ."""
    bound = bound_model("llama", torch.float32)
    whole = run(bound)
    for size in (1, 7):
        assert sum(a != b for a, b in zip(run(bound, gen_batch_size=size), whole, strict=True)) <= 1


def test_seeds_differ_and_no_global_generator_is_touched() -> None:
    bound = bound_model("llama")
    torch.manual_seed(5)
    before = torch.random.get_rng_state(), np.random.get_state()[1].tolist()
    a = run(bound, seed=1)
    assert torch.equal(torch.random.get_rng_state(), before[0])
    assert np.random.get_state()[1].tolist() == before[1]
    torch.manual_seed(6)
    assert run(bound, seed=1) == a
    assert run(bound, seed=2) != a


def test_a_prompt_that_comes_twice_has_noise_of_its_own() -> None:
    responses = run(bound_model("llama"), [[5, 6]] * 12, num_return_sequences=1)
    assert len({tuple(r) for r in responses}) > 9


def test_a_prompt_is_read_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tokens that go through the network: those of the prompts once, and one for every token that has a successor."""
    bound = bound_model("llama")
    seen: list[int] = []
    prompt = [5, 6, 7, 8]
    run(bound, [prompt])  # once for a model, its cache is tried
    bound.module.register_forward_pre_hook(lambda _, args: seen.append(args[0].numel()))
    for size in (2, 5, 64):
        seen.clear()
        responses = run(bound, [prompt] * 3, gen_batch_size=size, eos_ids=list(range(0, V, 4)))
        assert any(len(r) < 12 for r in responses)
        assert sum(seen) == 3 * len(prompt) + sum(len(r) - 1 for r in responses)


# the end


@pytest.mark.parametrize("eos", [[0], [models.EOS], [0, models.EOS, 9, 40, 41]])
def test_responses_end_at_their_first_eos(eos: list[int]) -> None:
    """Also when EOS is the id that fills the padding, and when it stands in the prompt."""
    bound = bound_model("llama")
    free = run(bound, num_return_sequences=16, max_new_tokens=30, eos_ids=[])
    assert {len(r) for r in free} == {30}
    ended = run(bound, num_return_sequences=16, max_new_tokens=30, eos_ids=eos)
    first = [next((i for i, token in enumerate(r) if token in eos), 29) for r in free]
    assert ended == [r[: i + 1] for r, i in zip(free, first, strict=True)]
    assert sum(len(r) < 30 for r in ended) > 3


def text_of(tokens: list[int]) -> str:
    """Tokens of 0 to 3 characters, which spell any two-letter string in several ways."""
    return "".join(("", "a", "b", "ab", "ba", "bb", "a<", "aab")[token % 8] for token in tokens)


@pytest.mark.parametrize("strings", [("abba",), ("b<", "aaa"), ("a<",)])
def test_responses_end_with_the_token_that_completes_a_stop_string(strings: tuple[str, ...]) -> None:
    bound = bound_model("llama")
    free = run(bound, num_return_sequences=16, max_new_tokens=40, eos_ids=[])
    stopped = run(bound, num_return_sequences=16, max_new_tokens=40, eos_ids=[], stop=StopStrings(text_of, strings))
    lengths = [
        next((i for i in range(1, 41) if any(s in text_of(response[:i]) for s in strings)), 40) for response in free
    ]
    assert stopped == [response[:i] for response, i in zip(free, lengths, strict=True)]
    assert len(set(lengths)) > 5


def test_eos_before_a_stop_string() -> None:
    bound = bound_model("llama")
    stop = StopStrings(text_of, ("abba",))
    both = run(bound, num_return_sequences=16, max_new_tokens=40, stop=stop)
    separate = (
        run(bound, num_return_sequences=16, max_new_tokens=40),
        run(bound, num_return_sequences=16, max_new_tokens=40, eos_ids=[], stop=stop),
    )
    assert both == [min(pair, key=len) for pair in zip(*separate, strict=True)]
    assert both not in separate


def test_stop_strings_in_windows_of_a_long_response() -> None:
    """Bytes as tokens: characters cut apart, tokens without text in between, text beyond the stop in its last token."""

    def decode(tokens: list[int]) -> str:
        return b"".join(bytes([t]) if t < 256 else b">\n\n" + b" " * 40 for t in tokens if t != 0).decode(
            "utf-8", errors="replace"
        )

    stop = StopStrings(decode, ("</é>", "</answer>"))
    start = list(("é" * 200).encode())
    assert not stop.completed(start)
    assert stop.completed(start + list("</é>".encode()))
    assert not stop.completed(start + list("</é".encode()))
    assert stop.completed([*start, *b"</answer", 300])
    assert stop.completed([*start, *(x for byte in b"</answer" for x in (byte, *[0] * 50)), 300])
    assert stop.completed(list(b"</answer>"))
    assert StopStrings(decode, ("€€€",)).completed(
        start + list("€€€".encode())
    )  # 9 bytes: cut ones count as characters
    whole: list[int] = []

    def counted(tokens: list[int]) -> str:
        whole.append(len(tokens))
        return decode(tokens)

    StopStrings(counted, ("</answer>",)).completed(list(b"a" * 5000))
    assert sum(whole) < 200
    for strings in ((), ("a", "")):
        with pytest.raises(ConfigError, match="stop strings"):
            StopStrings(decode, strings)


def test_prompts_without_tokens_and_no_prompts() -> None:
    bound = bound_model("llama")
    with pytest.raises(MeasurementError, match="prompt 12: has no token"):
        run(bound, [[5], []], first=10)
    assert run(bound, []) == []


def test_progress_counts_tokens_to_the_end() -> None:
    seen: list[tuple[int, int]] = []
    run(bound_model("llama"), gen_batch_size=4, progress=lambda done, every: seen.append((done, every)))
    done = [d for d, _ in seen]
    assert done == sorted(done)
    assert done[-1] == 15 * 12
    assert {every for _, every in seen} == {15 * 12}
    assert len(seen) > 20
