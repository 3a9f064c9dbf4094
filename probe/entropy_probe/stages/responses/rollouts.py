"""The responses on which everything is measured, as tensors: B prompts with up to G responses each.

They are read from a file (`rollouts_file.py`) or sampled from the policy (`sampled_rollouts.py`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn.functional import pad
from torch.nn.utils.rnn import pad_sequence

if TYPE_CHECKING:
    from jaxtyping import Bool, Float, Int

Progress = Callable[[str, int, int], None]


@dataclass(frozen=True)
class Rollouts:
    """B prompts with G responses each; row n·G + g is response g of prompt n. In a U batch from a file a prompt
    may have fewer: then the row is the prompt alone, no token of it is generated, and its reward and
    advantage are 0.

    `ids` [N, L] are right-padded: prompt, then response, then padding. The generated region of row
    i is `prompt_lens[i] … prompt_lens[i] + gen_lens[i] − 1`; it ends with the first EOS (scored) or
    at the length limit. `logprobs` are those that the sampler reported, where a file holds them;
    `advantages` [B, G] or [B, G, T] replace the rule, and where they are `weighed` all else that ∇log p
    is multiplied by; `micro_batches` say which responses the trainer takes together. `in_step` are those
    of a rollout that the step takes, the one that follows `after_step`; all of them.
    `reward` names what gave the rewards, `found` says what was found among ids and prompts, and the
    prompts are `builtin` where nobody chose them. `limit` is the length at which sampled ones end,
    where the model cannot hold what is configured; `further(first, count)` samples up to `count` prompts more, `first`
    of them after those that were asked for, where the batch may grow.
    Where these are a process's share of a batch, `first_prompt` of it stand before them.
    """

    ids: Int[Tensor, "N L"]
    prompt_lens: Int[Tensor, " N"]
    gen_lens: Int[Tensor, " N"]
    rewards: Float[Tensor, "B G"]
    advantages: Float[Tensor, "B G *T"] | None
    logprobs: Float[Tensor, "N T"] | None
    source: str
    missing_gold: int
    first_prompt: int = 0
    micro_batches: Int[Tensor, "B G"] | None = None
    in_step: Bool[Tensor, "B G"] | None = None
    after_step: int | None = None
    weighed: bool = False
    reward: str = "file"
    found: tuple[str, ...] = ()
    builtin: bool = False
    limit: int | None = None
    further: Callable[[int, int], Rollouts | None] | None = None

    @property
    def num_prompts(self) -> int:
        return self.rewards.shape[0]

    @property
    def num_responses(self) -> int:
        return self.rewards.shape[1]

    @cached_property
    def present(self) -> Bool[Tensor, "B G"]:
        """Whether there is such a response."""
        return self.per_prompt(self.gen_lens > 0)

    @property
    def max_gen_len(self) -> int:
        return int(self.gen_lens.max()) if len(self.gen_lens) else 0

    @property
    def _ends(self) -> Int[Tensor, " N"]:
        return self.prompt_lens + self.gen_lens

    @cached_property
    def gen_mask(self) -> Bool[Tensor, "N T"]:
        return torch.arange(self.max_gen_len)[None, :] < self.gen_lens[:, None]

    @cached_property
    def responses(self) -> list[list[int]]:
        """The tokens of every response."""
        rows, starts, ends = self.ids.tolist(), self.prompt_lens.tolist(), self._ends.tolist()
        return [row[start:end] for row, start, end in zip(rows, starts, ends, strict=True)]

    @cached_property
    def tokens(self) -> Int[Tensor, " K"]:
        """Every token of every row, without padding."""
        positions = torch.arange(self.ids.shape[1])[None, :]
        return self.ids[positions < self._ends[:, None]]

    def of_prompts(
        self, prompts: Int[Tensor, " b"], each: int | None = None, *, first_prompt: int = 0
    ) -> Rollouts:
        """The same for some prompts only, and the first responses of `each`, without which all."""
        group = torch.arange(self.num_responses)[:each]
        rows = (prompts[:, None] * self.num_responses + group).reshape(-1)

        def chosen(values: Tensor | None) -> Tensor | None:
            return None if values is None else values[prompts][:, :each]

        return replace(
            self,
            ids=self.ids[rows],
            prompt_lens=self.prompt_lens[rows],
            gen_lens=self.gen_lens[rows],
            rewards=self.rewards[prompts][:, :each],
            advantages=chosen(self.advantages),
            logprobs=None if self.logprobs is None else self.logprobs[rows],
            first_prompt=first_prompt,
            micro_batches=chosen(self.micro_batches),
            in_step=chosen(self.in_step),
        )

    def followed_by(self, more: Rollouts) -> Rollouts:
        """One batch of both, which were sampled alike; what was `found` in both is said of the second."""
        width = max(self.ids.shape[1], more.ids.shape[1])
        ids = [pad(rows.ids, (0, width - rows.ids.shape[1])) for rows in (self, more)]
        return replace(
            self,
            ids=torch.cat(ids),
            prompt_lens=torch.cat([self.prompt_lens, more.prompt_lens]),
            gen_lens=torch.cat([self.gen_lens, more.gen_lens]),
            rewards=torch.cat([self.rewards, more.rewards]),
            missing_gold=self.missing_gold + more.missing_gold,
            found=more.found,
        )

    def per_prompt(self, values: Tensor) -> Tensor:
        """[N, …] → [B, G, …]."""
        return values.reshape(self.num_prompts, self.num_responses, *values.shape[1:])


@dataclass(frozen=True)
class Group:
    """One prompt and its responses, as lists: a line of a rollouts file."""

    prompt: list[int]
    responses: list[list[int]]
    rewards: list[float]
    advantages: list[float] | list[list[float]] | None = None
    logprobs: list[list[float]] | None = None
    micro_batches: list[int] | None = None
    in_step: list[bool] | None = None
    after_step: int | None = None
    weighed: bool = False


def assembled(groups: Sequence[Group], source: str, missing_gold: int) -> Rollouts:
    """The groups as tensors, as wide as the largest of them."""
    widest = max(len(group.responses) for group in groups)
    groups = [_widened(group, widest) for group in groups]
    rows = [group.prompt + response for group in groups for response in group.responses]
    prompt_lens = torch.tensor([len(group.prompt) for group in groups])
    gen_lens = [len(response) for group in groups for response in group.responses]
    reported = [entry for group in groups for entry in group.logprobs or ()]
    advantages = None
    if all(group.advantages is not None for group in groups):
        advantages = _advantages([group.advantages for group in groups])
    given: dict[str, Any] = {
        key: torch.tensor([getattr(group, key) for group in groups])
        for key in ("micro_batches", "in_step")
        if all(getattr(group, key) is not None for group in groups)
    }
    return Rollouts(
        ids=pad_sequence(list(map(torch.tensor, rows)), batch_first=True),
        prompt_lens=prompt_lens.repeat_interleave(widest),
        gen_lens=torch.tensor(gen_lens),
        rewards=_table([group.rewards for group in groups]),
        advantages=advantages,
        logprobs=_padded(reported) if len(reported) == len(rows) else None,
        source=source,
        missing_gold=missing_gold,
        after_step=groups[0].after_step,
        weighed=groups[0].weighed,
        **given,
    )


def _widened(group: Group, size: int) -> Group:
    """With responses of no token, so that there are so many."""
    lacking = size - len(group.responses)
    if not lacking:
        return group
    nothing = {
        "responses": [],
        "rewards": 0.0,
        "logprobs": [],
        "micro_batches": 0,
        "in_step": False,
    }
    of_tokens = group.advantages is not None and isinstance(group.advantages[0], list)
    nothing["advantages"] = [] if of_tokens else 0.0
    if group.micro_batches is not None:
        nothing["micro_batches"] = group.micro_batches[0]
    given = {key: getattr(group, key) for key in nothing}
    return replace(
        group,
        **{key: of + [nothing[key]] * lacking for key, of in given.items() if of is not None},
    )


def _advantages(of_groups: Sequence[Any]) -> Float[Tensor, "B G *T"]:
    """One for each response, or one for each token, with zeros past the end."""
    if not isinstance(of_groups[0][0], list):
        return _table(of_groups)
    padded = _padded([entry for group in of_groups for entry in group])
    return padded.reshape(len(of_groups), -1, padded.shape[1])


def _table(rows: Sequence[Any]) -> Float[Tensor, "B G"]:
    return torch.tensor(rows, dtype=torch.float64)


def _padded(entries: Sequence[Sequence[float]]) -> Float[Tensor, "N T"]:
    """Zeros stand past the end of an entry."""
    tensors = [torch.tensor(entry, dtype=torch.float64) for entry in entries]
    return pad_sequence(tensors, batch_first=True)
