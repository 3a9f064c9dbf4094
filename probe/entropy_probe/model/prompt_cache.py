"""Keys and values of prompts that are read once, for all the responses that follow each of them.

    whole rows     forward([prompt; response])              of every response
    shared         forward(prompt), once;   forward(response | keys and values of its prompt)

In a causal model both have the same hidden states: what a token of the prompt is in a layer depends on no later token.
A pass that reads them changes nothing: it keeps no keys and values of its own, so that a prompt's serve any number of
batches of responses, and beside them one layer's are held at a time.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers.cache_utils import DynamicCache, DynamicLayer, DynamicSlidingWindowLayer

from entropy_probe.errors import CacheError
from entropy_probe.model.output_layer import Captured

if TYPE_CHECKING:
    from jaxtyping import Float, Int


@dataclass(frozen=True)
class ReadPrompts:
    """What a forward of `n` prompts, which end in the last column of `mask`, leaves for their responses.

    `last` are the hidden states at the last column, or the logits where the model is not split from its output layer.
    """

    mask: Int[Tensor, "n P"]
    last: Float[Tensor, "n D"]
    cache: Any
    captured: Captured

    def before(self, rows: Int[Tensor, " N"]) -> Any:
        """The cache of a forward whose row i follows the prompt `rows[i]`."""
        cache = copy.copy(self.cache)
        cache.layers = [_Before(layer, rows) for layer in self.cache.layers]
        return cache


class _Before(DynamicLayer):
    """A layer's keys and values of the prompts before some rows; those of the rows are appended, and not kept."""

    def __init__(self, of_prompts: DynamicLayer, rows: Int[Tensor, " N"]) -> None:
        super().__init__()
        self.is_initialized, self.is_sliding = True, of_prompts.is_sliding
        self._of_prompts, self._rows = of_prompts, rows

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """[N, H, P + T, D] of both."""
        before = self._of_prompts.keys, self._of_prompts.values
        keys, values = (
            torch.cat([held.index_select(0, self._rows.to(held.device)), own], -2)  # pyright: ignore[reportOptionalMemberAccess]
            for held, own in zip(before, (key_states, value_states), strict=True)
        )
        return keys, values

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self._of_prompts.get_mask_sizes(query_length)

    def get_seq_length(self) -> int:
        return self._of_prompts.get_seq_length()


def require_keys_and_values(cache: Any, kind: str) -> None:
    """Raise `CacheError` unless the cache holds keys and values, of every layer its own, and nothing else."""
    known, layers = (DynamicLayer, DynamicSlidingWindowLayer), getattr(cache, "layers", [])
    plain = all(type(layer) in known and layer.is_initialized for layer in layers)
    if type(cache) is not DynamicCache or not layers or not plain:
        raise CacheError(
            "scoring",
            f"the cache of {kind} holds more than keys and values of each layer",
            "share no prompts",
        )
