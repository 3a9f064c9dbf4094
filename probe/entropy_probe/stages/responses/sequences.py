"""What `SequenceProcessor` takes and returns: responses and scores as padded tensors with lengths.

B prompts, G responses each, T tokens of the longest response, V tokens of the vocabulary. Values
past the end of a response are zero. Entropies are in nats.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any, TypeGuard

import numpy as np
import torch
from torch import Tensor, nn

from entropy_probe.errors import MeasurementError
from entropy_probe.estimators.token_stats import (
    DiagnosticsPack,
    SequenceDiagnostics,
    TokenStepDiagnostics,
)
from entropy_probe.model.forward import BoundModel, form
from entropy_probe.stages.responses.ids import early_eos
from entropy_probe.stages.responses.prompts import Prompt
from entropy_probe.stages.responses.rollouts import Rollouts

if TYPE_CHECKING:
    from jaxtyping import Float, Int


@dataclass(frozen=True)
class BatchedSequences:
    """B prompts with G responses each: prompts are padded on the left, responses on the right.

    All prompts are padded to one length. The generated region of (b, g) is

        sequences[b, g, prompt_lens[b] : prompt_lens[b] + gen_lens[b, g]]

    It ends with the EOS, with the token that completes a stop string, or at the length limit.
    `attention_masks` is 1 on prompt and response and 0 elsewhere, whatever the padding token is.
    `prompts` hold the gold answers of the rewards; sequences that were made elsewhere may come
    without.
    """

    sequences: Int[Tensor, "B G L"]
    prompt_lens: Int[Tensor, " B"]
    gen_lens: Int[Tensor, "B G"]
    attention_masks: Int[Tensor, "B G L"]
    responses_text: list[list[str]]
    prompts: list[Prompt] | None = None

    def prompt_ids(self, b: int) -> Int[Tensor, " P"]:
        end = int(self.prompt_lens[b])
        return self.sequences[b, 0, end - int(self.attention_masks[b, 0, :end].sum()) : end]

    def response_ids(self, b: int, g: int) -> Int[Tensor, " T"]:
        start = int(self.prompt_lens[b])
        return self.sequences[b, g, start : start + int(self.gen_lens[b, g])]


@dataclass(frozen=True)
class SequenceLogprobs:
    """One response of `LogprobResults`, without padding: [T] where those are [B, G, T]."""

    logprobs: Tensor
    entropies: np.ndarray
    sequence_logprobs: float
    token_logqs: Tensor
    sequence_logqs: float
    rewards: float
    rb_entropies: np.ndarray | None
    rb_entropies_q: np.ndarray | None
    rb_entropies_torch: Tensor | None
    baseline_feats_torch: Tensor | None
    logits: Tensor | None


@dataclass(frozen=True)
class LogprobResults:
    """Scores of every response; `results[b, g]` is one of them without padding.

    | field | shape | what |
    |---|---|---|
    | `logprobs` | [B, G, T] | log π of the generated tokens; carries the graph with `with_grad` |
    | `entropies` | [B, G, T] | naive surprisal −log π (numpy) |
    | `sequence_logprobs` | [B, G] | S = Σ_t log π, float64, no graph |
    | `token_logqs` | [B, G, T] | log q, q being π cut to its nucleus; −∞ outside it |
    | `sequence_logqs` | [B, G] | its sum |
    | `rewards` | [B, G] | of the text; 0 without a gold answer |
    | `gen_lens` | [B, G] | tokens of a response |
    | `rb_entropies` | [B, G, T] | entropy of π at every step (numpy), with `compute_rb` |
    | `rb_entropies_q` | [B, G, T] | the same of q |
    | `rb_entropies_torch` | [B, G, T] | entropy of π with its graph |
    | `baseline_feats_torch` | [B, G, T, 7] | φ of `token_stats.baseline_features`, no graph |
    | `logits` | [B, G, T, V] | logits before the temperature, with `return_logits` |

    `rb_entropies_torch` is there with `with_grad`, `compute_rb` and `generation.rb_requires_grad`.
    """

    logprobs: Float[Tensor, "B G T"]
    entropies: np.ndarray
    sequence_logprobs: Float[Tensor, "B G"]
    token_logqs: Float[Tensor, "B G T"]
    sequence_logqs: Float[Tensor, "B G"]
    rewards: Float[Tensor, "B G"]
    gen_lens: Int[Tensor, "B G"]
    rb_entropies: np.ndarray | None = None
    rb_entropies_q: np.ndarray | None = None
    rb_entropies_torch: Float[Tensor, "B G T"] | None = None
    baseline_feats_torch: Float[Tensor, "B G T 7"] | None = None
    logits: Float[Tensor, "B G T V"] | None = None

    def __getitem__(self, index: tuple[int, int]) -> SequenceLogprobs:
        b, g = index
        steps = int(self.gen_lens[b, g])

        def of_response(value: Any) -> Any:
            if value is None:
                return None
            return float(value[b, g]) if value.ndim == 2 else value[b, g, :steps]

        names = [field.name for field in fields(SequenceLogprobs)]
        return SequenceLogprobs(**{name: of_response(getattr(self, name)) for name in names})


@dataclass(frozen=True)
class DiagnosticsResults:
    """Diagnostics of every step [B, G, T], and of every response as a whole.

    Those of steps are zero past the end of a response.
    `results[b, g]` is the `DiagnosticsPack` of one response without padding; `diagnostics` has all
    of them as lists.
    """

    step: TokenStepDiagnostics
    seq: list[list[SequenceDiagnostics]]
    gen_lens: Int[Tensor, "B G"]

    def __getitem__(self, index: tuple[int, int]) -> DiagnosticsPack:
        b, g = index
        return DiagnosticsPack(steps_of(self.step, b, g, int(self.gen_lens[b, g])), self.seq[b][g])

    @property
    def diagnostics(self) -> list[list[DiagnosticsPack]]:
        return [[self[b, g] for g in range(len(row))] for b, row in enumerate(self.seq)]


def steps_of(step: TokenStepDiagnostics, b: int, g: int, steps: int) -> TokenStepDiagnostics:
    """One response of diagnostics [B, G, T], without padding."""
    values = {field.name: getattr(step, field.name) for field in fields(step)}
    known = {name: value for name, value in values.items() if value is not None}
    return TokenStepDiagnostics(**{name: value[b, g, :steps] for name, value in known.items()})


def batched(rollouts: Rollouts, tokenizer: Any, prompts: list[Prompt]) -> BatchedSequences:
    """Left-padded prompts, right-padded responses."""
    width, pad = int(rollouts.prompt_lens.max()), getattr(tokenizer, "pad_token_id", None)
    ids = torch.full((len(rollouts.ids), width + rollouts.max_gen_len), 0 if pad is None else pad)
    mask = torch.zeros_like(ids)
    texts = []
    for i, prompt_len in enumerate(rollouts.prompt_lens.tolist()):
        gen_len = int(rollouts.gen_lens[i])
        own = slice(width - prompt_len, width + gen_len)
        ids[i, own] = rollouts.ids[i, : prompt_len + gen_len]
        mask[i, own] = 1
        texts.append(tokenizer.decode(ids[i, width : own.stop].tolist(), skip_special_tokens=True))
    group = rollouts.num_responses
    return BatchedSequences(
        sequences=rollouts.per_prompt(ids),
        prompt_lens=torch.full((rollouts.num_prompts,), width),
        gen_lens=rollouts.per_prompt(rollouts.gen_lens),
        attention_masks=rollouts.per_prompt(mask),
        responses_text=[texts[n * group : (n + 1) * group] for n in range(rollouts.num_prompts)],
        prompts=prompts,
    )


def as_rollouts(sequences: BatchedSequences, bound: BoundModel, eos: Collection[int]) -> Rollouts:
    """The same rows padded on the right.

    Raises `MeasurementError` naming the row that is not as it is said to be.
    """
    _require_shapes(sequences)
    size_b, size_g, _ = sequences.sequences.shape
    all_ids, masks = sequences.sequences.cpu(), sequences.attention_masks.cpu().bool()
    rows, prompt_lens = [], []
    for b in range(size_b):
        for g in range(size_g):
            row, prompt_len = _row(sequences, b, g, all_ids[b, g], masks[b, g])
            _require_tokens(row, prompt_len, bound.vocabulary, eos, f"sequences[{b}, {g}]")
            rows.append(row)
            prompt_lens.append(prompt_len)
    return Rollouts(
        ids=nn.utils.rnn.pad_sequence(rows, batch_first=True),
        prompt_lens=torch.tensor(prompt_lens),
        gen_lens=sequences.gen_lens.reshape(-1).cpu(),
        rewards=torch.zeros(size_b, size_g, dtype=torch.float64),
        advantages=None,
        logprobs=None,
        source="sequences",
        missing_gold=0,
    )


def _require_shapes(sequences: BatchedSequences) -> None:
    """Every field as its annotation says, with the B, G and L of `sequences`."""
    whole = sequences.sequences
    if not _whole_numbers(whole) or whole.dim() != 3 or not whole.numel():
        problem = f"is {_form(whole)}"
        raise MeasurementError("sequences.sequences", problem, "give token ids [B, G, L]")
    size_b, size_g, length = whole.shape
    for name, shape in (
        ("prompt_lens", (size_b,)),
        ("gen_lens", (size_b, size_g)),
        ("attention_masks", (size_b, size_g, length)),
    ):
        value = getattr(sequences, name)
        if not _whole_numbers(value) or value.shape != shape:
            remedy = f"give whole numbers of shape {shape}"
            raise MeasurementError(f"sequences.{name}", f"is {_form(value)}", remedy)
    texts, prompts = sequences.responses_text, sequences.prompts
    if [len(of_prompt) for of_prompt in texts] != [size_g] * size_b:
        got = f"holds {[len(of_prompt) for of_prompt in texts]} texts"
        remedy = f"give {size_g} for each of the {size_b} prompts"
        raise MeasurementError("sequences.responses_text", got, remedy)
    if prompts is None:
        return
    if len(prompts) != size_b or not all(isinstance(p, Prompt) for p in prompts):
        remedy = f"give {size_b} of type Prompt, or None"
        raise MeasurementError("sequences.prompts", f"are {len(prompts)}", remedy)


def _whole_numbers(value: object) -> TypeGuard[Tensor]:
    return isinstance(value, Tensor) and not value.is_floating_point()


def _form(value: object) -> str:
    return form(value) if isinstance(value, Tensor) else type(value).__name__


def _row(
    sequences: BatchedSequences,
    b: int,
    g: int,
    ids: Tensor,
    mask: Tensor,
) -> tuple[Tensor, int]:
    """(prompt and response without padding, length of the prompt)."""
    where, length = f"sequences[{b}, {g}]", len(ids)
    start, gen_len = int(sequences.prompt_lens[b]), int(sequences.gen_lens[b, g])
    if not (0 < start < length and 0 < gen_len <= length - start):
        got = f"has prompt_lens {start} and gen_lens {gen_len} in a row of {length}"
        raise MeasurementError(where, got, "give at least one token of each, and lengths that fit")
    prompt_len, end = int(mask[:start].sum()), start + gen_len
    own = torch.zeros_like(mask)
    own[start - prompt_len : end] = True
    if prompt_len < 1 or not torch.equal(mask, own):
        expected = f"1 from the prompt's first token to {end - 1} and 0 elsewhere"
        got = f"has an attention mask that is not {expected}"
        raise MeasurementError(where, got, "pad prompts on the left and responses on the right")
    return ids[own], prompt_len


def _require_tokens(
    row: Tensor,
    prompt_len: int,
    vocabulary: int,
    eos: Collection[int],
    where: str,
) -> None:
    if int(row.min()) < 0 or int(row.max()) >= vocabulary:
        got = f"holds token {int(row.max() if int(row.min()) >= 0 else row.min())}"
        raise MeasurementError(where, got, f"give ids from 0 to {vocabulary - 1}")
    early = early_eos(row[prompt_len:].tolist(), eos)
    if early is not None:
        got = f"goes on after the EOS at {early}"
        raise MeasurementError(where, got, "end each response at its EOS")
