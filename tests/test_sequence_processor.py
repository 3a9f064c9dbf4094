"""`SequenceProcessor` on live models: every score against one unpadded float64 forward, and nothing changed."""

from __future__ import annotations

import copy
import dataclasses
import itertools
import logging
import os
import random
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tokenizers import Regex, Tokenizer, decoders, pre_tokenizers
from tokenizers import models as token_models
from torch import Tensor
from transformers import PreTrainedTokenizerFast

import models
from entropy_probe import ProbeConfig
from entropy_probe.config import GenerationConfig
from entropy_probe.errors import ConfigError, MeasurementError, OverrideError, ProbeError, RolloutsError
from entropy_probe.estimators.token_stats import TokenStepDiagnostics, sequence_diagnostics, step_diagnostics
from entropy_probe.model import forward
from entropy_probe.model.precision import TrueFloat64
from entropy_probe.model.registry import checksum
from entropy_probe.sequence_processor import SequenceProcessor
from entropy_probe.stages.responses.prompts import Prompt
from entropy_probe.stages.responses.sequences import BatchedSequences, DiagnosticsResults, LogprobResults
from entropy_probe.stages.responses.tasks import arithmetic

V = models.VOCABULARY
CHARACTERS = "0123456789abcdefghijklmnopqrstuvwxyz<>/ ?+-=,.;:!*()[]{}|@#$%&_^"
MODELS: dict[str, Callable[[], Any]] = {
    "llama": lambda: models.tiny_model("llama"),
    "gpt2": lambda: models.tiny_model("gpt2"),
    "gemma2": lambda: models.tiny_model("gemma2"),
    "qwen2 lora": lambda: models.add_adapter(models.tiny_model("qwen2"), "qwen2"),
    "llama dora": lambda: models.add_adapter(models.tiny_model("llama"), "llama", use_dora=True),
}
POLICIES = [(1.0, 1.0), (0.7, 1.0), (1.0, 0.8), (0.7, 0.8)]
EXACT = 1e-12  # what the scores promise in float64: rounding of logits of order 10 through two layers


def make_tokenizer(**special: Any) -> Any:
    """One token per character; ids 0, 1, 2 are pad, bos and eos as in `models`."""
    vocabulary = {"<p>": 0, "<s>": 1, "<e>": models.EOS, **{c: 3 + i for i, c in enumerate(CHARACTERS)}}
    assert len(vocabulary) == V
    tokenizer = Tokenizer(token_models.WordLevel(vocabulary, unk_token="?"))  # noqa: S106
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
    tokenizer.decoder = decoders.Fuse()
    names = {"pad_token": "<p>", "bos_token": "<s>", "eos_token": "<e>", **special}
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **names)


def config(dtype: str = "float64", **generation: Any) -> dict[str, Any]:
    return {
        "generation": {"max_new_tokens": 9, "num_return_sequences": 3, **generation},
        "precision": {"dtype": dtype},
    }


def processor(model: Any, dtype: str = "float64", tokenizer: Any = None, **generation: Any) -> SequenceProcessor:
    return SequenceProcessor(model, tokenizer or make_tokenizer(), config=config(dtype, **generation))


def by_hand(
    prompts: list[list[int]], responses: list[list[list[int]]], junk: int = 0, texts: list[list[str]] | None = None
) -> BatchedSequences:
    """What somebody else's sampler made, padded with the token `junk`, with more columns than it needs."""
    width, longest = max(map(len, prompts)), max(len(r) for group in responses for r in group)
    size_b, size_g = len(prompts), len(responses[0])
    ids = torch.full((size_b, size_g, width + longest + 2), junk)
    mask = torch.zeros_like(ids)
    for (b, prompt), g in itertools.product(enumerate(prompts), range(size_g)):
        row = prompt + responses[b][g]
        ids[b, g, width - len(prompt) : width - len(prompt) + len(row)] = torch.tensor(row)
        mask[b, g, width - len(prompt) : width - len(prompt) + len(row)] = 1
    lens = torch.tensor([[len(r) for r in group] for group in responses])
    texts = texts or [["" for _ in group] for group in responses]
    return BatchedSequences(ids, torch.full((size_b,), width), lens, mask, texts)


def drawn(seed: int = 0, size_b: int = 3, size_g: int = 2) -> tuple[list[list[int]], list[list[list[int]]]]:
    rng = random.Random(seed)
    tokens = lambda low, high: [rng.randrange(3, V) for _ in range(rng.randint(low, high))]  # noqa: E731
    return [tokens(1, 6) for _ in range(size_b)], [[tokens(1, 7) for _ in range(size_g)] for _ in range(size_b)]


PROMPTS, RESPONSES = drawn()
CELLS = [(b, g) for b in range(len(PROMPTS)) for g in range(len(RESPONSES[0]))]


# the slow twin


@dataclasses.dataclass
class Slow:
    """One response: its logits [T, V] by one unpadded forward, and everything else from their definition."""

    logits: Tensor
    tokens: list[int]
    temperature: float
    top_p: float

    @property
    def logp_all(self) -> Tensor:
        return torch.log_softmax(self.logits / self.temperature, -1)

    def inside(self, step: int) -> Tensor:
        """The most probable tokens before which less than `top_p` of the mass is."""
        kept, above = [], 0.0
        p = self.logp_all[step].detach().exp().tolist()
        for token in sorted(range(V), key=p.__getitem__, reverse=True):
            if above >= self.top_p + 1e-6:  # the edge that policy.py allows a float32 sampler
                break
            kept.append(token)
            above += p[token]
        return torch.tensor(sorted(kept))

    @property
    def logp(self) -> Tensor:
        return torch.stack([self.logp_all[t, token] for t, token in enumerate(self.tokens)])

    @property
    def logq(self) -> Tensor:
        values = []
        for t, token in enumerate(self.tokens):
            inside = self.inside(t)
            mass = torch.logsumexp(self.logp_all[t, inside], 0)
            outside = self.top_p < 1 and token not in inside.tolist()
            values.append(torch.tensor(-torch.inf).double() if outside else self.logp_all[t, token] - mass)
        return torch.stack(values)

    @property
    def entropy(self) -> Tensor:
        return -(self.logp_all.exp() * self.logp_all).sum(-1)

    @property
    def entropy_q(self) -> Tensor:
        if self.top_p == 1:
            return self.entropy
        values = []
        for t in range(len(self.tokens)):
            q = torch.softmax(self.logp_all[t, self.inside(t)], 0)
            values.append(-(q * q.log()).sum())
        return torch.stack(values)

    def step(self, eos: int | None) -> TokenStepDiagnostics:
        return step_diagnostics(self.logits, self.top_p, self.temperature, eos)


def slow(model: Any, prompt: list[int], response: list[int], temperature: float = 1.0, top_p: float = 1.0) -> Slow:
    """`model` is in float64 already."""
    with TrueFloat64():
        logits = model(torch.tensor([prompt + response]), use_cache=False).logits[0]
    return Slow(logits[len(prompt) - 1 : -1], response, temperature, top_p)


def upcast(model: Any) -> Any:
    return copy.deepcopy(model).double().eval()


def in_nucleus(model: Any, temperature: float, top_p: float) -> list[list[list[int]]]:
    """Responses of different length, each token the k-th most probable one: inside the nucleus as every sample is."""
    twin, made = upcast(model), []
    for b, prompt in enumerate(PROMPTS):
        made.append([])
        for g in range(2):
            response: list[int] = []
            for k in range(2 + (3 * b + 5 * g) % 7):
                probe = slow(twin, prompt, [*response, 3], temperature, top_p)
                inside = [token for token in probe.inside(len(response)).tolist() if token != models.EOS]
                response.append(inside[k % len(inside)])
            made[-1].append(response)
    return made


def close(actual: Any, expected: Any, atol: float = EXACT) -> None:
    double = [torch.as_tensor(value, dtype=torch.float64).detach() for value in (actual, expected)]
    torch.testing.assert_close(*double, rtol=atol, atol=atol)


# every number against the slow twin


@pytest.mark.parametrize(("temperature", "top_p"), POLICIES)
@pytest.mark.parametrize("kind", list(MODELS))
def test_scores_and_diagnostics_are_those_of_one_unpadded_forward(kind: str, temperature: float, top_p: float) -> None:
    model = MODELS[kind]()
    responses = in_nucleus(model, temperature, top_p)
    scored = processor(model, temperature=temperature, top_p=top_p)
    sequences = by_hand(PROMPTS, responses, junk=5)
    results, diagnostics = scored.teacher_force_logprobs_with_diagnostics(
        sequences, compute_rb=True, return_baseline_features=True, tf_batch_size=4
    )
    logits = scored.teacher_force_logprobs(sequences, return_logits=True).logits
    assert logits is not None
    assert results.rb_entropies is not None
    assert results.rb_entropies_q is not None
    assert results.baseline_feats_torch is not None
    assert results.rb_entropies_torch is None
    assert not results.logprobs.requires_grad
    twin = upcast(model)
    for b, g in CELLS:
        naive = slow(twin, PROMPTS[b], responses[b][g], temperature, top_p)
        steps = len(naive.tokens)
        own = results[b, g]
        close(own.logprobs, naive.logp)
        close(own.entropies, -naive.logp)
        close(own.token_logqs, naive.logq)
        close(own.sequence_logprobs, naive.logp.sum())
        close(own.sequence_logqs, naive.logq.sum())
        close(own.rb_entropies, naive.entropy)
        close(own.rb_entropies_q, naive.entropy_q)
        close(logits[b, g, :steps], naive.logits)
        step = naive.step(models.EOS)
        position = torch.arange(steps, dtype=torch.float64) / 9
        features = (naive.entropy, step.top1_prob, step.margin, step.head_mass, step.two_point_entropy, step.logit_var)
        close(own.baseline_feats_torch, torch.stack([*features, position], -1), 1e-11)
        pack = diagnostics[b, g]
        for field in dataclasses.fields(step):
            close(getattr(pack.step, field.name), getattr(step, field.name), 1e-11)  # logit_var adds squares of 10
        whole = sequence_diagnostics(step, -naive.logp.detach())
        for name, value in dataclasses.asdict(whole).items():
            assert getattr(pack.seq, name) == pytest.approx(value, rel=1e-11, abs=1e-11), name
        padded = (results.logprobs, results.entropies, results.token_logqs, results.rb_entropies, logits)
        more = (results.rb_entropies_q, results.baseline_feats_torch, diagnostics.step.margin)
        assert all(not np.asarray(values[b, g, steps:]).any() for values in (*padded, *more))


@pytest.mark.parametrize("where", ["theta", "override"])
@pytest.mark.parametrize("top_p", [1.0, 0.8])
@pytest.mark.parametrize("kind", list(MODELS))
def test_gradients_are_those_of_one_unpadded_forward(kind: str, top_p: float, where: str) -> None:
    """Of Σ log π, of Σ H and of Σ log q; under an override also those of the parameters left as they are."""
    model = MODELS[kind]()
    responses = in_nucleus(model, 0.7, top_p)
    live, twin = upcast(model), upcast(model)
    scored = processor(live, temperature=0.7, top_p=top_p, rb_requires_grad=True)
    named = {n: p for n, p in live.named_parameters() if p.requires_grad}
    override: dict[str, Tensor] = {}
    if where == "override":
        generator = torch.Generator().manual_seed(0)
        moved = list(named)[::2]
        v = {n: torch.randn(named[n].shape, generator=generator, dtype=torch.float64) for n in moved}
        override = {n: t.requires_grad_() for n, t in scored.build_params_override(v, 1e-3).items()}
        twin.load_state_dict(override, strict=False)
        for n, p in twin.named_parameters():
            assert n not in override or torch.equal(p, override[n])
    results = scored.teacher_force_logprobs(
        by_hand(PROMPTS, responses), with_grad=True, compute_rb=True, params_override=override, tf_batch_size=4
    )
    slow_ones = [slow(twin, PROMPTS[b], responses[b][g], 0.7, top_p) for b, g in CELLS]
    finite = torch.stack([s.logq.sum() for s in slow_ones]).isfinite()
    assert bool(finite.all()) or where == "override"
    sums: list[tuple[Any, Any]] = [
        (results.logprobs.sum(), sum(s.logp.sum() for s in slow_ones)),
        (results.rb_entropies_torch, sum(s.entropy.sum() for s in slow_ones)),
    ]
    if bool(finite.all()):
        sums.append((results.token_logqs.sum(), sum(s.logq.sum() for s in slow_ones)))
    targets: list[Tensor] = [*map(override.get, named, named.values())]  # pyright: ignore[reportAssignmentType]
    originals = [named[n] for n in override]
    twins: list[Tensor]
    for fast, expected in sums:
        close(fast.sum(), expected)
        twins = [p for p in twin.parameters() if p.requires_grad]
        wanted = torch.autograd.grad(expected, twins, retain_graph=True)
        for got, want in zip(torch.autograd.grad(fast.sum(), targets, retain_graph=True), wanted, strict=True):
            close(got, want, 1e-11)  # gradients of order 100
        if originals:
            unused = torch.autograd.grad(fast.sum(), originals, retain_graph=True, allow_unused=True)
            assert unused == (None,) * len(originals)


@pytest.mark.parametrize("with_grad", [False, True])
def test_an_override_is_the_model_with_these_parameters(with_grad: bool) -> None:
    model = models.tiny_model("gpt2")
    scored = processor(model, rb_requires_grad=True)
    v = {n: torch.randn_like(p) for n, p in model.named_parameters()}
    override = scored.build_params_override(v, 1e-2)
    assert all(t.dtype == torch.float64 and not t.requires_grad for t in override.values())
    moved = upcast(model)
    with torch.no_grad():
        for name, parameter in moved.named_parameters():
            parameter.add_(v[name].double(), alpha=1e-2)
    sequences = by_hand(PROMPTS, RESPONSES)
    override = {name: tensor.requires_grad_(with_grad) for name, tensor in override.items()}
    results = scored.teacher_force_logprobs(sequences, with_grad=with_grad, params_override=override)
    for b, g in CELLS:
        close(results[b, g].logprobs, slow(moved, PROMPTS[b], RESPONSES[b][g]).logp)
    assert results.logprobs.requires_grad is with_grad
    assert float((results.logprobs - scored.teacher_force_logprobs(sequences).logprobs).detach().abs().max()) > 1e-2


def fields_of(results: LogprobResults) -> dict[str, Any]:
    values = {f.name: getattr(results, f.name) for f in dataclasses.fields(results)}
    return {name: torch.as_tensor(value).detach() for name, value in values.items() if value is not None}


@pytest.mark.parametrize("kind", ["gpt2", "qwen2 lora"])
def test_the_zero_override_gives_the_same_bits(kind: str) -> None:
    model = MODELS[kind]()
    scored = processor(model, "float32")
    zero = {n: torch.randn_like(p) for n, p in model.named_parameters() if p.requires_grad}
    options: dict[str, Any] = {"compute_rb": True, "return_baseline_features": True, "return_logits": True}
    sequences = by_hand(PROMPTS, RESPONSES)
    plain = scored.teacher_force_logprobs(sequences, **options)
    same = scored.teacher_force_logprobs(sequences, params_override=scored.build_params_override(zero, 0.0), **options)
    for name, value in fields_of(plain).items():
        assert torch.equal(value, fields_of(same)[name]), name
    assert scored.build_params_override(None, 1.0) == {}


@pytest.mark.parametrize("with_grad", [False, True])
def test_scores_depend_on_neither_batch_nor_neighbours_nor_padding(with_grad: bool) -> None:
    prompts, responses = drawn(seed=1, size_b=5, size_g=3)
    scored = processor(models.tiny_model("mistral"), top_p=1.0, rb_requires_grad=True)
    options: dict[str, Any] = {"compute_rb": True, "return_baseline_features": True, "with_grad": with_grad}
    whole = scored.teacher_force_logprobs(by_hand(prompts, responses), **options)
    for size in (1, 2, 7, 100):
        again = scored.teacher_force_logprobs(by_hand(prompts, responses, junk=66), tf_batch_size=size, **options)
        for name, value in fields_of(whole).items():
            close(fields_of(again)[name], value)
    for b, g in itertools.product(range(5), range(3)):
        alone = scored.teacher_force_logprobs(by_hand([prompts[b]], [[responses[b][g]]]), **options)
        close(alone[0, 0].logprobs, whole[b, g].logprobs)
        close(alone[0, 0].rb_entropies, whole[b, g].rb_entropies)
        close(alone[0, 0].baseline_feats_torch, whole[b, g].baseline_feats_torch)


@pytest.mark.parametrize("kind", list(MODELS))
def test_the_output_layer_in_pieces(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A piece is three positions; scores, diagnostics, logits and gradients are those of one piece."""
    live = upcast(MODELS[kind]())
    scored = processor(live, rb_requires_grad=True, top_p=0.9)
    responses = in_nucleus(live, 1.0, 0.9)
    sequences = by_hand(PROMPTS, responses)
    named = [p for p in live.parameters() if p.requires_grad]
    options: dict[str, Any] = {"compute_rb": True, "return_baseline_features": True, "return_logits": True}

    def measured() -> tuple[dict[str, Any], dict[str, Any], tuple[Tensor, ...]]:
        without = scored.teacher_force_logprobs(sequences, **options)
        results = scored.teacher_force_logprobs(sequences, with_grad=True, **options)
        assert results.rb_entropies_torch is not None
        assert results.logits is not None
        loss = (results.logprobs * torch.arange(results.logprobs.shape[-1])).sum() + results.rb_entropies_torch.sum()
        return fields_of(without), fields_of(results), torch.autograd.grad(loss + results.logits.sin().sum(), named)

    whole = measured()
    sizes: list[int] = []
    checkpoint = forward.checkpoint
    monkeypatch.setattr(forward, "_CHUNK", 1)
    monkeypatch.setattr(forward, "_ROWS", 3)
    monkeypatch.setattr(forward, "checkpoint", lambda f, x, *a, **k: sizes.append(len(x)) or checkpoint(f, x, *a, **k))
    pieces = measured()
    assert len(sizes) > 2
    assert max(sizes) == 3
    for one, other in zip(whole[:2], pieces[:2], strict=True):
        for name, value in one.items():
            close(other[name], value, 1e-11)  # logit_var adds squares of logits of order 10
    for one, other in zip(whole[2], pieces[2], strict=True):
        close(other, one, 1e-11)


# precision of the live model


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("kind", ["llama", "qwen2 lora"])
def test_a_bfloat16_model_is_scored_upcast_and_gets_the_gradient(kind: str, dtype: str) -> None:
    model = MODELS[kind]().to(torch.bfloat16)
    wide = copy.deepcopy(model).to(getattr(torch, dtype))
    results = processor(model, dtype, rb_requires_grad=True).teacher_force_logprobs(
        by_hand(PROMPTS, RESPONSES), with_grad=True, compute_rb=True
    )
    expected = processor(wide, dtype, rb_requires_grad=True).teacher_force_logprobs(
        by_hand(PROMPTS, RESPONSES), with_grad=True, compute_rb=True
    )
    assert results.rb_entropies_torch is not None
    assert expected.rb_entropies_torch is not None
    assert torch.equal(results.logprobs, expected.logprobs)
    assert torch.equal(results.rb_entropies_torch, expected.rb_entropies_torch)
    (results.logprobs.sum() + results.rb_entropies_torch.sum()).backward()
    (expected.logprobs.sum() + expected.rb_entropies_torch.sum()).backward()
    reached = 0
    for narrow, own in zip(model.parameters(), wide.parameters(), strict=True):
        assert (narrow.grad is None) == (own.grad is None)
        if narrow.grad is not None and own.grad is not None:
            assert narrow.grad.dtype == torch.bfloat16
            assert torch.equal(narrow.grad, own.grad.bfloat16())
            reached += 1
    assert reached == sum(p.requires_grad for p in model.parameters())


def test_an_override_of_a_bfloat16_model_is_in_the_configured_dtype() -> None:
    model: Any = models.tiny_model("llama")
    model.to(torch.bfloat16)
    scored = processor(model, "float32")
    v = {n: torch.randn_like(p) for n, p in model.named_parameters()}
    override = scored.build_params_override(v, 1e-6)
    assert {t.dtype for t in override.values()} == {torch.float32}
    name = next(iter(v))
    assert torch.equal(override[name], model.get_parameter(name).detach().float() + 1e-6 * v[name].float())
    moved = scored.teacher_force_logprobs(by_hand(PROMPTS, RESPONSES), params_override=override).logprobs
    plain = scored.teacher_force_logprobs(by_hand(PROMPTS, RESPONSES)).logprobs
    assert not torch.equal(moved, plain)  # in bf16 the step would disappear
    close(moved, plain, 1e-3)


@pytest.mark.parametrize("live", [torch.bfloat16, torch.float32])
def test_training_between_two_calls_is_seen(live: torch.dtype) -> None:
    model: Any = models.tiny_model("llama")
    model.to(live)
    scored, sequences = processor(model, "float32"), by_hand(PROMPTS, RESPONSES)
    before = scored.teacher_force_logprobs(sequences).logprobs
    first = scored.generate_batched(["ab", "c"], seed=1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    loss = -scored.teacher_force_logprobs(sequences, with_grad=True).logprobs.mean()
    loss.backward()
    optimizer.step()
    after = scored.teacher_force_logprobs(sequences).logprobs
    assert float(after.mean()) > float(before.mean())
    assert torch.equal(after, processor(copy.deepcopy(model), "float32").teacher_force_logprobs(sequences).logprobs)
    assert not torch.equal(first.sequences[..., :3], scored.generate_batched(["ab", "c"], seed=1).sequences[..., :3])


# the model and the process are left as they were


def process_state() -> list[Any]:
    return [
        torch.get_rng_state().tolist(),
        repr(np.random.get_state()),
        torch.get_num_threads(),
        torch.get_default_dtype(),
        torch.are_deterministic_algorithms_enabled(),
        torch.is_deterministic_algorithms_warn_only_enabled(),
        torch.get_float32_matmul_precision(),
        torch.backends.cudnn.allow_tf32,
        torch.is_grad_enabled(),
        torch.is_autocast_enabled("cpu"),
        logging.getLogger("transformers").level,
    ]


def hooks_of(model: Any) -> list[int]:
    names = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    return [len(getattr(module, name)) for module in model.modules() for name in names]


@pytest.mark.parametrize("live", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("kind", ["gpt2", "qwen2 lora"])
def test_nothing_is_changed(kind: str, live: torch.dtype) -> None:
    """Weights, buffers, gradients, requires_grad, training mode, hooks, identities, generators and global settings.

    `random` is looked at in a process of its own: beartype, which checks types here, draws from it.
    """
    model = MODELS[kind]().to(live).train()
    model.get_input_embeddings().eval()  # a part of it only
    for i, parameter in enumerate(model.parameters()):
        parameter.requires_grad_(parameter.requires_grad and i % 5 != 0)
        if parameter.requires_grad and i % 2:
            parameter.grad = torch.full_like(parameter, 0.5)
    scored, sequences = processor(model, "float32"), by_hand(PROMPTS, RESPONSES)
    v = {n: torch.ones_like(p) for n, p in model.named_parameters() if p.requires_grad}
    state = lambda: (  # noqa: E731
        checksum(model),
        [(n, id(p), p.data_ptr(), p._version) for n, p in model.named_parameters()],
        [(n, id(b)) for n, b in model.named_buffers()],
        [module.training for module in model.modules()],
        [None if p.grad is None else p.grad.sum().item() for p in model.parameters()],
        hooks_of(model),
        sorted(vars(model)),
    )
    before, around = state(), process_state()
    scored.generate_with_logprobs(["ab", "c"], seed=0, compute_rb=True)
    kinds: list[dict[str, Any]] = [{}, {"with_grad": True}, {"params_override": scored.build_params_override(v, 1e-3)}]
    for options in kinds:
        scored.teacher_force_logprobs_with_diagnostics(sequences, compute_rb=True, **options)
    scored.teacher_force_logprobs(sequences, return_logits=True)
    scored.debug_zero_check(sequences.sequences[0], sequences.attention_masks[0])
    scored.generate_with_replacement_sampling(2, "arithmetic", seed=3)
    scored.sample_prompts("arithmetic", num_prompts=2, seed=1)
    override = {n: torch.full_like(p, torch.nan) for n, p in v.items()}
    with pytest.raises(ProbeError):
        scored.teacher_force_logprobs(sequences, params_override=override)
    assert state() == before
    assert process_state() == around


_IN_A_PROCESS = """
import random, sys
import models
from entropy_probe.sequence_processor import SequenceProcessor
from test_sequence_processor import make_tokenizer
processor = SequenceProcessor(models.tiny_model("llama"), make_tokenizer(), None, {"generation": {"max_new_tokens": 3}})
before = random.getstate()
processor.generate_with_logprobs(dataset_name="arithmetic", num_prompts=2, with_grad=True, compute_rb=True)
processor.generate_with_replacement_sampling(2, "arithmetic", max_prompts_pool=3)
sys.exit(random.getstate() != before)
"""


def test_pythons_own_generator_is_not_used() -> None:
    folder = str(Path(__file__).parent)
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([folder, *sys.path])}
    done = subprocess.run([sys.executable, "-c", _IN_A_PROCESS], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("live", [torch.bfloat16, torch.float32])
def test_autocast_and_dropout_around_a_call_change_no_number(live: torch.dtype) -> None:
    model = models.add_adapter(models.tiny_model("llama"), "llama", lora_dropout=0.5).to(live)
    scored, sequences = processor(model, "float32"), by_hand(PROMPTS, RESPONSES)
    plain = scored.teacher_force_logprobs(sequences).logprobs
    drawn_plain = scored.generate_batched(["ab", "c"], seed=1)
    model.train()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        for with_grad in (False, True):
            assert torch.equal(scored.teacher_force_logprobs(sequences, with_grad=with_grad).logprobs.detach(), plain)
        assert torch.equal(scored.generate_batched(["ab", "c"], seed=1).sequences, drawn_plain.sequences)
        assert torch.is_autocast_enabled("cpu")
    with torch.inference_mode(False), torch.no_grad():  # no_grad around: the graph is there all the same
        assert scored.teacher_force_logprobs(sequences, with_grad=True).logprobs.requires_grad
        assert not torch.is_grad_enabled()
    assert not scored.teacher_force_logprobs(sequences).logprobs.requires_grad
    assert all(module.training for module in model.modules())


class Compiled(torch.nn.Module):
    """As torch.compile wraps a module."""

    def __init__(self, module: torch.nn.Module) -> None:
        super().__init__()
        self._orig_mod = module

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        raise AssertionError("the wrapper was called")


@pytest.mark.parametrize("wrap", [torch.nn.DataParallel, Compiled, lambda m: Compiled(torch.nn.DataParallel(m))])
def test_wrappers_are_taken_off_and_adapters_stay(wrap: Callable[[Any], Any]) -> None:
    model = MODELS["qwen2 lora"]()
    scored, plain, sequences = processor(wrap(model)), processor(model), by_hand(PROMPTS, RESPONSES)
    v = {n: torch.ones_like(p) for n, p in model.named_parameters() if p.requires_grad}
    override = scored.build_params_override(v, 1e-2)
    kinds: list[dict[str, Any]] = [{}, {"params_override": override}, {"with_grad": True}]
    for options in kinds:
        got = scored.teacher_force_logprobs(sequences, **options).logprobs
        assert torch.equal(got, plain.teacher_force_logprobs(sequences, **options).logprobs)
    first, second = (s.generate_batched(["ab"], seed=0).sequences for s in (scored, plain))
    assert torch.equal(first, second)
    with model.disable_adapter():
        without = plain.teacher_force_logprobs(sequences).logprobs
    assert not torch.equal(without, plain.teacher_force_logprobs(sequences).logprobs)


# buffers, the zero check


def test_buffers_are_the_models_own_unless_given() -> None:
    model = models.tiny_model("llama")
    scored, sequences = processor(model, "float32"), by_hand(PROMPTS, RESPONSES)
    plain = scored.teacher_force_logprobs(sequences).logprobs
    name, own = next((n, b) for n, b in model.named_buffers() if "inv_freq" in n and "original" not in n)
    given = scored.teacher_force_logprobs(sequences, buffers_override={name: own * 0.5}).logprobs
    assert not torch.equal(given, plain)
    assert torch.equal(scored.teacher_force_logprobs(sequences, buffers_override={name: own.clone()}).logprobs, plain)
    assert torch.equal(scored.teacher_force_logprobs(sequences).logprobs, plain)
    own.mul_(0.5)
    assert torch.equal(scored.teacher_force_logprobs(sequences).logprobs, given)


def test_the_zero_check() -> None:
    model = models.tiny_model("qwen2")
    scored, sequences = processor(model, "float32"), by_hand(PROMPTS, RESPONSES)
    ids, mask = sequences.sequences[0], sequences.attention_masks[0]
    for check in (scored.debug_zero_check(ids, mask), scored.debug_zero_check(ids)):
        assert check.bitwise
        assert check.max_abs == 0.0
    calls = itertools.count()
    handle = model.model.layers[0].register_forward_hook(lambda m, a, output: output + 1e-3 * next(calls))
    with pytest.raises(MeasurementError, match=r"zero check: max\|direct - functional.* expected at most 0; look for"):
        scored.debug_zero_check(ids, mask)
    assert not scored.debug_zero_check(ids, mask, atol=10.0).bitwise
    handle.remove()
    model.model.layers[0].register_forward_hook(lambda m, a, output: output * torch.nan)
    with pytest.raises(MeasurementError, match="is nan"):
        scored.debug_zero_check(ids, mask, atol=10.0)


# sampling


def rows_of(sequences: BatchedSequences) -> list[list[list[int]]]:
    size_b, size_g = sequences.gen_lens.shape
    return [[sequences.response_ids(b, g).tolist() for g in range(size_g)] for b in range(size_b)]


def test_a_seed_fixes_the_responses_whatever_the_batch() -> None:
    scored = processor(models.tiny_model("llama"))
    prompts = ["ab", "cdefgh", "1", "ab"]
    expected = scored.generate_batched(prompts, 5, seed=7)
    for size in (1, 2, 3, 8, 100):
        assert rows_of(scored.generate_batched(prompts, 5, size, seed=7)) == rows_of(expected)
    assert rows_of(scored.generate_batched(prompts, 5, seed=8)) != rows_of(expected)
    rows = rows_of(expected)
    assert rows[0] != rows[3]  # the same prompt twice has its own noise


def test_torch_manual_seed_governs_unseeded_calls() -> None:
    scored = processor(models.tiny_model("llama"))
    calls: list[Callable[[], Any]] = [
        lambda: rows_of(scored.generate_batched(["ab", "c"])),
        lambda: scored.sample_prompts("arithmetic", num_prompts=5),
        lambda: rows_of(scored.generate_with_logprobs(dataset_name="arithmetic", num_prompts=2)[0]),
        lambda: scored.generate_with_replacement_sampling(4, "arithmetic")[0].prompts,
    ]
    for call in calls:
        torch.manual_seed(3)
        first, second = call(), call()
        assert first != second
        torch.manual_seed(3)
        assert [call(), call()] == [first, second]


@pytest.mark.parametrize("pad", ["<p>", "<e>", None])
def test_a_response_ends_at_its_stop_whatever_pads(pad: str | None) -> None:
    """Mask, length, tokens and text agree, and the scores are those of the response alone."""
    model = models.tiny_model("llama")
    tokenizer = make_tokenizer(pad_token=pad)
    scored = processor(model, tokenizer=tokenizer, max_new_tokens=30, num_return_sequences=12)
    sequences, results, _ = scored.generate_with_logprobs(["ab", "cdefgh"], seed=5)
    start, length = int(sequences.prompt_lens[0]), sequences.sequences.shape[-1]
    assert sequences.prompt_lens.tolist() == [6, 6]
    assert [sequences.prompt_ids(b).tolist() for b in (0, 1)] == [tokenizer(p).input_ids for p in ("ab", "cdefgh")]
    ended = 0
    twin = upcast(model)
    for b, g in itertools.product(range(2), range(12)):
        response, gen_len = sequences.response_ids(b, g).tolist(), int(sequences.gen_lens[b, g])
        assert len(response) == gen_len
        assert models.EOS not in response[:-1]
        assert response[-1] == models.EOS or gen_len == 30
        ended += response[-1] == models.EOS and gen_len < 30
        prompt_len = len(sequences.prompt_ids(b))
        mask = [0] * (6 - prompt_len) + [1] * (prompt_len + gen_len) + [0] * (length - start - gen_len)
        assert sequences.attention_masks[b, g].tolist() == mask
        assert sequences.responses_text[b][g] == tokenizer.decode(response, skip_special_tokens=True)
        close(results[b, g].logprobs, slow(twin, sequences.prompt_ids(b).tolist(), response).logp)
    assert ended > 3


def test_a_stop_string_that_spans_tokens_ends_the_response() -> None:
    tokenizer = make_tokenizer()
    scored = processor(models.tiny_model("llama"), max_new_tokens=30, num_return_sequences=12)
    free = scored.generate_batched(["ab", "c"], seed=5)
    text = free.responses_text[0][0]
    stops = [text[8:11], *(free.responses_text[1][g][5:7] for g in (3, 4))]
    assert all(len(tokenizer(s).input_ids) > 1 for s in stops)
    limited = processor(models.tiny_model("llama"), max_new_tokens=30, num_return_sequences=12, stop=stops)
    stopped = limited.generate_batched(["ab", "c"], seed=5)
    shortened = 0
    for b, g in itertools.product(range(2), range(12)):
        whole = free.response_ids(b, g).tolist()
        expected = next(
            (n for n in range(1, len(whole) + 1) if any(s in tokenizer.decode(whole[:n]) for s in stops)), len(whole)
        )
        shortened += expected < len(whole)
        assert stopped.response_ids(b, g).tolist() == whole[:expected]
        assert int(stopped.gen_lens[b, g]) == expected
        start = int(stopped.prompt_lens[b])
        assert stopped.attention_masks[b, g, start:].sum() == expected
        assert stopped.responses_text[b][g] == tokenizer.decode(whole[:expected], skip_special_tokens=True)
    assert shortened >= 2
    limited.teacher_force_logprobs(stopped)


def test_prompts_are_texts_or_prompts_and_one_response_is_enough() -> None:
    scored = processor(models.tiny_model("llama"))
    mixed = [Prompt("ab", "3"), "c"]
    sequences, results, diagnostics = scored.generate_with_logprobs(mixed, G=1, seed=0)
    assert sequences.prompts == [Prompt("ab", "3"), Prompt("c")]
    assert rows_of(sequences) == rows_of(scored.generate_batched(["ab", "c"], 1, seed=0))
    assert results.logprobs.shape[:2] == (2, 1)
    assert [len(row) for row in diagnostics.diagnostics] == [1, 1]
    assert diagnostics.diagnostics[1][0].seq == diagnostics[1, 0].seq
    assert results.sequence_logprobs.dtype == torch.float64


def test_generate_with_logprobs_is_its_three_parts() -> None:
    scored = processor(models.tiny_model("llama"), top_p=0.9, rb_requires_grad=True)
    sequences, results, diagnostics = scored.generate_with_logprobs(
        dataset_name="arithmetic", split="test", num_prompts=3, G=2, seed=4, with_grad=True, compute_rb=True
    )
    prompts = scored.sample_prompts("arithmetic", "test", 3, seed=4)
    assert sequences.prompts == prompts
    assert set(prompts) <= set(arithmetic("test"))
    again = scored.generate_batched(prompts, 2, seed=4)
    assert torch.equal(again.sequences, sequences.sequences)
    scores, same = scored.teacher_force_logprobs_with_diagnostics(again, with_grad=True, compute_rb=True)
    for name, value in fields_of(results).items():
        assert torch.equal(value, fields_of(scores)[name]), name
    assert diagnostics.seq == same.seq
    assert results.logprobs.requires_grad
    assert isinstance(diagnostics, DiagnosticsResults)
    assert bool(torch.isfinite(results.token_logqs).all())


def test_sequences_of_transformers_generate() -> None:
    """Put into `BatchedSequences` by hand: left-padded prompts, EOS as padding behind the responses."""
    model: Any = models.tiny_model("llama")
    tokenizer = make_tokenizer(padding_side="left")
    encoded = tokenizer(["ab", "cdefgh"], return_tensors="pt", padding=True)
    torch.manual_seed(0)
    whole = model.generate(
        **encoded, do_sample=True, top_k=0, max_new_tokens=30, num_return_sequences=4, pad_token_id=models.EOS
    )
    start = encoded.input_ids.shape[1]
    lens = [next((i + 1 for i, t in enumerate(r) if t == models.EOS), len(r)) for r in whole[:, start:].tolist()]
    assert min(lens) < max(lens)
    mask = torch.zeros_like(whole)
    mask[:, :start] = encoded.attention_mask.repeat_interleave(4, 0)
    for row, n in zip(mask, lens, strict=True):
        row[start : start + n] = 1
    texts = [tokenizer.decode(r[start : start + n], skip_special_tokens=True) for r, n in zip(whole, lens, strict=True)]
    sequences = BatchedSequences(
        whole.reshape(2, 4, -1),
        torch.tensor([start, start]),
        torch.tensor(lens).reshape(2, 4),
        mask.reshape(2, 4, -1),
        [texts[:4], texts[4:]],
    )
    results = processor(model).teacher_force_logprobs(sequences)
    twin = upcast(model)
    for b, g in itertools.product(range(2), range(4)):
        prompt = [encoded.input_ids[0, -2:].tolist(), encoded.input_ids[1].tolist()][b]
        response = whole[b * 4 + g, start : start + lens[b * 4 + g]].tolist()
        close(results[b, g].logprobs, slow(twin, prompt, response).logp)


def test_replacement_sampling() -> None:
    scored = processor(models.tiny_model("llama"), max_new_tokens=2)
    sequences, results, _ = scored.generate_with_replacement_sampling(
        40, "arithmetic", "test", max_prompts_pool=5, seed=1, compute_rb=True, tf_batch_size=64, gen_batch_size=16
    )
    assert sequences.prompts is not None
    assert sequences.gen_lens.shape == (40, 1)
    assert results.rb_entropies is not None
    assert len(set(sequences.prompts)) == 5  # of 40 draws from 5, one is missed with probability 7e-4
    assert set(sequences.prompts) <= set(arithmetic("test"))
    assert [p.text for p in sequences.prompts] != [p.text for p in sequences.prompts[::-1]]
    again = scored.generate_with_replacement_sampling(40, "arithmetic", "test", max_prompts_pool=5, seed=1)[0]
    assert rows_of(again) == rows_of(sequences)
    repeated = next(p for p in sequences.prompts if sequences.prompts.count(p) > 4)
    own = [rows_of(sequences)[i] for i, p in enumerate(sequences.prompts) if p == repeated]
    assert len({str(rows) for rows in own}) > 1  # draws of one prompt are independent
    whole = scored.generate_with_replacement_sampling(12, "arithmetic", seed=1, max_prompts_pool=10**6)[0]
    assert whole.prompts is not None
    assert len(set(whole.prompts)) > 5
    with pytest.raises(ConfigError, match="G: is 2: responses to one prompt are not independent; leave it at 1"):
        scored.generate_with_replacement_sampling(4, "arithmetic", G=2)
    zeros: list[dict[str, Any]] = [{"total_sequences": 0}, {"total_sequences": 3, "max_prompts_pool": 0}]
    for options in zeros:
        with pytest.raises(ConfigError, match="is 0; give a whole number from 1 on"):
            scored.generate_with_replacement_sampling(dataset_name="arithmetic", **options)


def test_sample_prompts() -> None:
    scored = processor(models.tiny_model("llama"))
    prompts = scored.sample_prompts("arithmetic", num_prompts=200, seed=1)
    assert len(set(prompts)) == 200
    assert set(prompts) <= set(arithmetic("train"))
    assert prompts == scored.sample_prompts("arithmetic", num_prompts=200, seed=1)
    assert prompts != scored.sample_prompts("arithmetic", num_prompts=200, seed=2)
    assert len(scored.sample_prompts("arithmetic", "test", 1000, seed=0)) == 1000
    with pytest.raises(ConfigError, match="num_prompts: 1001 were asked for, but arithmetic test has 1000"):
        scored.sample_prompts("arithmetic", "test", 1001)
    with pytest.raises(ConfigError, match="did you mean `arithmetic`"):
        scored.sample_prompts("arithmetik")
    with pytest.raises(ConfigError, match="split: is 'tset'; give train or test"):
        scored.sample_prompts("arithmetic", "tset")


# configuration


def test_forms_of_configuration() -> None:
    model = models.tiny_model("llama")
    own = GenerationConfig(max_new_tokens=4, top_p=0.5)
    assert SequenceProcessor(model).config == GenerationConfig()
    assert SequenceProcessor(model, config=own).config == own
    assert SequenceProcessor(model, config={"generation": {"max_new_tokens": 4, "top_p": 0.5}}).config == own
    assert SequenceProcessor(model, config={"generation": own}).config == own
    probe = ProbeConfig(generation=own)
    assert SequenceProcessor(model, config=probe).config == own
    assert SequenceProcessor(model, config=probe).precision == probe.precision
    assert GenerationConfig(num_return_sequences=1).num_return_sequences == 1


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"generation": {"temprature": 1}}, "configuration: unknown key `generation.temprature`; did you mean `temp"),
        ({"generaton": {}}, "configuration: unknown key `generaton`; did you mean `generation`?"),
        ({"batch": {}}, "configuration: unknown key `batch`; valid keys are generation, precision"),
        ({"generation": {"do_sample": False}}, "`generation.do_sample`: input should be True, got False"),
        ({"generation": {"top_p": 0}}, "`generation.top_p`: input should be greater than 0, got 0"),
        ({"precision": {"tf_nograd": {"autocast": True}}}, "`precision.tf_nograd.autocast`: input should be False"),
        ({"precision": {"func_override": {"dtype": "float64"}}}, "must have the same dtype"),
    ],
)
def test_a_configuration_that_cannot_be(values: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        SequenceProcessor(models.tiny_model("llama"), config=values)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


# errors


def test_what_cannot_be_sampled() -> None:
    scored = processor(models.tiny_model("gpt2"))
    cases: list[tuple[Callable[[], Any], type[ProbeError], str]] = [
        (lambda: scored.generate_batched([]), ConfigError, "prompts: are []; give a list of at least one"),
        (lambda: scored.generate_batched(["a", ""]), ConfigError, "prompts: entry 1 has neither a text nor messages"),
        (lambda: scored.generate_batched(["a" * 65]), MeasurementError, "cannot hold rows of 65 tokens"),
        (lambda: scored.generate_batched(["a"], G=0), ConfigError, "G: is 0; give a whole number"),
        (lambda: scored.generate_batched(["a"], gen_batch_size=0), ConfigError, "gen_batch_size: is 0"),
        (lambda: scored.generate_with_logprobs(), ConfigError, "give one of them"),
        (lambda: scored.generate_with_logprobs(["a"], dataset_name="arithmetic"), ConfigError, "give one of them"),
        (lambda: scored.generate_with_logprobs([]), ConfigError, "prompts: are []"),
        (lambda: scored.generate_batched("abc"), ConfigError, "prompts: are 'abc'; give a list"),
        (lambda: scored.generate_batched(["\ud800"]), ConfigError, "prompts: entry 0 has a lone surrogate"),
        (lambda: scored.generate_batched(["a"], seed=-1), ConfigError, "seed: is -1; give a whole number from 0 on"),
        (lambda: scored.generate_batched(["a"], seed=2**70), ConfigError, "seed: is 1180591620717411303424"),
        (lambda: SequenceProcessor(scored.model, reward="x:y"), ConfigError, "batch.reward"),
        (lambda: GenerationConfig(top_p=0.0), ConfigError, "GenerationConfig: `top_p`: input should be greater than 0"),
        (lambda: GenerationConfig(temprature=1.0), ConfigError, "did you mean `temperature`?"),
        (lambda: SequenceProcessor(scored.model).generate_batched(["a"]), MeasurementError, "tokenizer: was not given"),
    ]
    for call, kind, message in cases:
        with pytest.raises(kind) as caught:
            call()
        assert message in str(caught.value)
        assert "\n" not in str(caught.value)


def changed(sequences: BatchedSequences, name: str, index: Any, value: Any) -> BatchedSequences:
    tensor = getattr(sequences, name).clone()
    tensor[index] = value
    return dataclasses.replace(sequences, **{name: tensor})


GOOD = by_hand(PROMPTS, RESPONSES)
START = int(GOOD.prompt_lens[0])
BAD: dict[str, tuple[BatchedSequences, str]] = {
    "gen_len 0": (changed(GOOD, "gen_lens", (1, 0), 0), "sequences[1, 0]: has"),
    "gen_len negative": (changed(GOOD, "gen_lens", (1, 0), -1), "sequences[1, 0]: has"),
    "gen_len beyond": (changed(GOOD, "gen_lens", (2, 1), 99), "has prompt_lens 5 and gen_lens 99 in a row of 14"),
    "gen_len short": (changed(GOOD, "gen_lens", (0, 0), len(RESPONSES[0][0]) + 1), "has an attention mask that is not"),
    "no prompt": (changed(GOOD, "prompt_lens", 1, 0), "sequences[1, 0]: has prompt_lens 0"),
    "mask 0 in the response": (changed(GOOD, "attention_masks", (0, 1, START), 0), "sequences[0, 1]: has an attention"),
    "mask 1 after it": (changed(GOOD, "attention_masks", (0, 1, -1), 1), "pad prompts on the left and responses on"),
    "token outside": (
        changed(GOOD, "sequences", (2, 0, START), V),
        "holds token 67; give ids from 0 to 66",
    ),
    "token negative": (changed(GOOD, "sequences", (2, 0, START), -1), "sequences[2, 0]: holds token -1"),
    "goes on after EOS": (
        changed(GOOD, "sequences", (0, 1, START), models.EOS),
        "sequences[0, 1]: goes on after the EOS at 0; end each response at its EOS",
    ),
    "fewer texts": (dataclasses.replace(GOOD, responses_text=[["", ""]] * 2), "holds [2, 2] texts; give 2 for each"),
    "fewer prompts": (dataclasses.replace(GOOD, prompts=[Prompt("a")]), "sequences.prompts: are 1; give 3"),
}


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        (
            "sequences",
            torch.zeros(3, 4, dtype=torch.long),
            "is (3, 4) int64; give token ids [B, G, L]",
        ),
        ("sequences", GOOD.sequences.float(), "float32; give token ids"),
        ("sequences", GOOD.sequences.tolist(), "is list; give token ids"),
        ("sequences", GOOD.sequences[:0], "; give token ids"),
        ("prompt_lens", GOOD.prompt_lens[:1], "sequences.prompt_lens: is (1,) int64; give whole numbers of shape (3,)"),
        ("prompt_lens", GOOD.prompt_lens.tolist(), "sequences.prompt_lens: is list; give whole numbers"),
        ("gen_lens", GOOD.gen_lens.flatten(), "sequences.gen_lens: is (6,) int64; give whole numbers of shape (3, 2)"),
        ("gen_lens", GOOD.gen_lens.double(), "sequences.gen_lens: is (3, 2) float64"),
        ("attention_masks", GOOD.attention_masks[..., :-1], "give whole numbers of shape (3, 2, 14)"),
    ],
)
def test_shapes_that_do_not_fit(name: str, value: Any, message: str) -> None:
    loose = object.__new__(BatchedSequences)  # what a caller without enforced annotations can build
    for field in dataclasses.fields(GOOD):
        object.__setattr__(loose, field.name, value if field.name == name else getattr(GOOD, field.name))
    with pytest.raises(MeasurementError) as caught:
        processor(models.tiny_model("llama")).teacher_force_logprobs(loose)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("kind", list(BAD))
def test_sequences_that_are_not_as_they_are_said_to_be(kind: str) -> None:
    sequences, message = BAD[kind]
    with pytest.raises(MeasurementError) as caught:
        processor(models.tiny_model("llama")).teacher_force_logprobs(sequences)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_what_cannot_be_scored() -> None:
    model = models.tiny_model("llama")
    scored = processor(model, "float32")
    name, own = next(iter(model.named_parameters()))
    cases: list[tuple[dict[str, Any], type[ProbeError], str]] = [
        (
            {"params_override": {"x": own.detach()}},
            OverrideError,
            "the unwrapped model has no 'x' among",
        ),
        ({"params_override": {name: torch.zeros(1)}}, OverrideError, "is (1,) float32, the model works with (67, 24)"),
        ({"params_override": {name: own.detach().double()}}, OverrideError, "is (67, 24) float64, the model works"),
        (
            {"params_override": {name: own.detach() * torch.nan}},
            MeasurementError,
            "not finite with the override",
        ),
        (
            {"buffers_override": {"x": torch.zeros(1)}},
            OverrideError,
            "the unwrapped model has no 'x' among",
        ),
        ({"buffers_override": {name: own.detach()}}, OverrideError, f"no '{name}' among these"),
        (
            {"params_override": dict(model.named_buffers())},
            OverrideError,
            "the unwrapped model has no",
        ),
        ({"tf_batch_size": 0}, ConfigError, "tf_batch_size: is 0; give a whole number from 1 on"),
    ]
    for options, kind, message in cases:
        with pytest.raises(kind) as caught:
            scored.teacher_force_logprobs(GOOD, **options)
        assert message in str(caught.value)
        assert "\n" not in str(caught.value)
    with pytest.raises(RolloutsError, match=r"outside the nucleus of top_p 0\.01"):
        processor(model, top_p=0.01).teacher_force_logprobs(GOOD)
    with pytest.raises(OverrideError, match="direction v"):
        scored.build_params_override({"x": own.detach()}, 1.0)


def test_nothing_trainable() -> None:
    model = models.tiny_model("llama").requires_grad_(False)
    scored = processor(model)
    assert not scored.teacher_force_logprobs(GOOD).logprobs.requires_grad
    with pytest.raises(MeasurementError, match="with_grad: neither a parameter of the model"):
        scored.teacher_force_logprobs(GOOD, with_grad=True)
    with pytest.raises(MeasurementError, match="inference mode is on"), torch.inference_mode():
        scored.teacher_force_logprobs(GOOD, with_grad=True)
    name, own = next(iter(upcast(model).named_parameters()))
    override = {name: own.detach().requires_grad_()}
    results = scored.teacher_force_logprobs(GOOD, with_grad=True, params_override=override)
    assert float(torch.autograd.grad(results.logprobs.sum(), override[name])[0].abs().max()) > 0


# rewards


def half_of_gold(response: str, gold: str | None) -> float:
    return len(response) + float(gold or -1) / 2


def test_rewards() -> None:
    model = models.tiny_model("llama")
    texts = [["<answer>3</answer>", "3"], ["<answer>3</answer>", "<answer>4.0</answer>"], ["<answer>3</answer>", ""]]
    sequences = by_hand(PROMPTS, RESPONSES, texts=texts)
    assert processor(model).teacher_force_logprobs(sequences).rewards.tolist() == [[0, 0]] * 3
    asked = dataclasses.replace(sequences, prompts=[Prompt("a", "3"), Prompt("b", "4"), Prompt("c")])
    results = processor(model).teacher_force_logprobs(asked)
    assert results.rewards.tolist() == [[1, 0], [0, 1], [0, 0]]
    assert results[1, 1].rewards == 1.0
    own = SequenceProcessor(model, config=config(), reward=f"{__name__}:half_of_gold")
    expected = [[len(t) + g / 2 for t in row] for row, g in zip(texts, (3, 4, -1), strict=True)]
    assert own.teacher_force_logprobs(asked).rewards.tolist() == expected
    with pytest.raises(ConfigError, match="did you mean `tag_pref`"):
        SequenceProcessor(model, reward="tagpref")


def test_without_a_known_eos_there_is_no_eos_probability() -> None:
    model = models.tiny_model("llama")
    model.config.eos_token_id = model.generation_config.eos_token_id = None
    results, diagnostics = SequenceProcessor(model, config=config()).teacher_force_logprobs_with_diagnostics(
        GOOD, return_baseline_features=True
    )
    assert diagnostics.step.eos_prob is None
    assert diagnostics[0, 0].seq.eos_prob_last is None
    assert results.baseline_feats_torch is not None


# progress


def test_progress_reaches_the_logger(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    clock: Iterator[int] = itertools.count(0, 3)
    monkeypatch.setattr("entropy_probe.sequence_processor.time.monotonic", lambda: next(clock))
    logger = logging.getLogger("mine")
    scored = SequenceProcessor(models.tiny_model("llama"), make_tokenizer(), logger, config())
    with caplog.at_level(logging.INFO):
        scored.generate_batched(["ab", "c"], 4, 2, seed=0)
    own = [record.getMessage() for record in caplog.records if record.name == "mine"]
    assert 3 < len(own) < 30
    assert all("of at most 72 tokens" in message for message in own)
    done = [int(message.split()[1]) for message in own]
    assert done == sorted(done)
    assert scored.logger is logger
    assert SequenceProcessor(scored.model).logger.name == "entropy_probe"


@pytest.fixture(autouse=True)
def _one_thread() -> Any:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
