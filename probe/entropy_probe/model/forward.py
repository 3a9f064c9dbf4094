"""`BoundModel`: a module bound to one registry and one dtype.

The network is called here, and by `output_layer`, which calls what stands behind the backbone row by row.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from entropy_probe.errors import CacheError, MeasurementError, OverrideError, ProbeError
from entropy_probe.model.attention import BlockedAttention, is_long
from entropy_probe.model.capture import Capture
from entropy_probe.model.lending import Lending
from entropy_probe.model.output_layer import Captured, OutputLayer
from entropy_probe.model.own_forward import with_own_forward
from entropy_probe.model.placement import Placement
from entropy_probe.model.precision import forward_context, has_detached_norm, untrained_tokens
from entropy_probe.model.prompt_cache import ReadPrompts, require_keys_and_values
from entropy_probe.model.recompute import layers_of, recomputed
from entropy_probe.model.registry import Registry, unwrap
from entropy_probe.model.switches import as_needed, switched

if TYPE_CHECKING:
    from jaxtyping import Float, Int

# Logits that are held at once, and positions at least. Below 64 rows, reading the head's weights for every piece is the
# larger cost; from 64 to 512 rows the time is the same within noise, and memory grows (`benchmarks/test_scoring.py`).
_CHUNK = 1 << 21
_ROWS = 64
# The same where each piece is differentiated as it is made. A row of 196 (at a vocabulary of 32k) takes 0.8 of the time
# of a row of 64; from 32 MB on, memory that is fetched anew for every piece takes the gain away.
_CHUNK_DIFFERENTIATED = 3 << 21
_MANY_HEADS = (
    64  # of a model that does not say how many it has: each call of attention is then looked at
)


@dataclass(frozen=True)
class BoundModel:
    """One module for the registry, the mapping and the forward, with the dtype in which all three work.

    `overridden` collects the names that any mapping replaced during the run. `lending`: how parameters that are
    elsewhere, or in another dtype, come to where they are used; `None` where all are there.
    `ways` has how sampling reads rows, once that was tried, and `sharing` whether prompts can be read once for all
    their responses. `recompute`: a graph that is differentiated once keeps the inputs of the decoder layers alone.
    `logits_at_once` is how many logits a piece may hold (at least one position's); `None`: as many as are fastest.
    """

    registry: Registry
    dtype: torch.dtype
    overridden: set[str] = field(default_factory=set)
    ways: list[Any] = field(default_factory=list)
    sharing: list[Any] = field(default_factory=list)
    logits_at_once: int | None = None
    lending: Lending | None = None
    recompute: bool = False

    @property
    def module(self) -> nn.Module:
        return self.registry.module

    def positions_at_once(self, vocabulary: int, fastest: int | None = None) -> int:
        """Positions whose logits make up a piece: `fastest` logits (default: those of a pass that is not captured)."""
        most = max(_ROWS, (fastest or _CHUNK) // vocabulary)
        return (
            most
            if self.logits_at_once is None
            else max(1, min(most, self.logits_at_once // vocabulary))
        )

    def spread_over(self, rows: int, columns: int) -> slice:
        """Columns, evenly spread, whose whole logits in so many rows are four pieces at most; all where they fit."""
        most = max(1, 4 * (self.logits_at_once or _CHUNK) // (rows * self.num_logits))
        return slice(None) if columns <= most else slice(None, None, -(-columns // most))

    @cached_property
    def device(self) -> torch.device:
        return self.registry.device if self.lending is None else self.lending.main

    @property
    def on_one_device(self) -> bool:
        """Whether all of the forward is made on `device`."""
        return self.lending is None or self.lending.on_one_device

    @cached_property
    def language_model(self) -> nn.Module:
        """The causal language model inside a PEFT wrapper; adapters stay in place and active."""
        base = getattr(self.module, "get_base_model", None)
        return base() if callable(base) else self.module  # pyright: ignore[reportReturnType]

    @cached_property
    def takes_logits_to_keep(self) -> bool:
        return "logits_to_keep" in inspect.signature(self.language_model.forward).parameters

    @cached_property
    def vocabulary(self) -> int:
        """Token ids that the input embeddings take; without known ones there is no limit."""
        embeddings = getattr(self.language_model, "get_input_embeddings", lambda: None)()
        return 2**62 if embeddings is None else int(embeddings.weight.shape[0])

    @property
    def longest_row(self) -> int | None:
        """Tokens of the longest row that the model's configuration allows; `None`: it says none."""
        config = getattr(self.language_model, "config", None)
        most = getattr(config, "max_position_embeddings", None) or 0
        return most if most > 0 else None  # XLNet's −1 is no limit

    @cached_property
    def num_logits(self) -> int:
        """Logits of a position."""
        if self._split is not None:
            return self._split[1]
        with torch.no_grad():
            return self.logits(torch.zeros(1, 1, dtype=torch.long, device=self.device)).shape[-1]

    @cached_property
    def autograd_is_derivative(self) -> bool:
        """False where the module detaches a part of itself (DoRA), or has `untrained_tokens`."""
        return not has_detached_norm(self.module) and not self.untrained_tokens

    @cached_property
    def untrained_tokens(self) -> set[int]:
        return untrained_tokens(self.module)

    def autograd_is_derivative_of(self, tokens: Int[Tensor, " K"]) -> bool:
        """Whether the module's own autograd is the derivative where these tokens are read."""
        if self.autograd_is_derivative or has_detached_norm(self.module):
            return self.autograd_is_derivative
        return not self.untrained_tokens & set(tokens.unique().tolist())

    def logits(
        self,
        ids: Int[Tensor, "N L"],
        *,
        mask: Int[Tensor, "N L"] | None = None,
        keep: slice = slice(None),
        override: Mapping[str, Tensor] | None = None,
        true_derivative: bool = False,
        once: bool = False,
    ) -> Float[Tensor, "N K V"]:
        """Logits at the positions `keep`, at θ or with the parameters in `override` replaced.

        Without `mask` the rows are right-padded: the causal path needs none, since padding stands after every scored
        token. With `mask` positions count real tokens only, so that left padding changes no score. Buffers are never
        overridden. `true_derivative`: the derivative of the function itself, in forward or reverse mode; `once`: in
        reverse mode, and no derivative of it.
        """
        with self._long_rows(ids, true_derivative, once):
            called = self._called(ids, mask, keep, dict(override or {}), true_derivative)
            return self._kept(called, keep)

    def read_logits(
        self,
        ids: Int[Tensor, "N L"],
        rows: Int[Tensor, " R"],
        columns: Int[Tensor, " R"],
        read: Callable[[Float[Tensor, "r V"], slice], tuple[Tensor, ...]],
        *,
        mask: Int[Tensor, "N L"] | None = None,
        override: Mapping[str, Tensor] | None = None,
        true_derivative: bool = False,
        once: bool = False,
        rows_at_once: int | None = None,
        capture: Capture | None = None,
    ) -> tuple[Tensor, ...]:
        """What `read` makes of the logits at the given positions, a few positions at a time; options as in `logits`.

            read(logits(ids, ..)[rows, columns], slice(0, R))

        `read(logits, part)` gets positions `part` of the R and returns tensors with one entry for each. Only these
        positions go through the output layer, `rows_at_once` at a time (by default those of a piece), so neither
        [N, L, V] nor, with a graph, [R, V] is ever held: a piece is computed again when its gradient is asked for.

        `capture` listens to the forward pass. Of what `read` then returns, `capture.sums` is asked for sums over a row:
        its derivative is known beforehand, so each piece is differentiated as it is made, and its logits are neither
        kept nor computed twice. More than one tensor may it be where `trains_output_layer` is false.
        """
        mapping = dict(override or {})
        once = once or capture is not None
        capturing = self._capturing(capture, ids, true_derivative, once and not mapping)
        long_rows = self._long_rows(ids, true_derivative, once)
        if capture is not None:
            ids = _marked(ids, capture)
        if self._split is None:
            first, last = int(columns.min()), int(columns.max()) + 1
            keep = slice(first, last)
            with long_rows, capturing:
                logits = self._kept(self._called(ids, mask, keep, mapping, true_derivative), keep)
            return read(logits[rows, columns - first], slice(0, len(rows)))
        output_layer, _ = self._split
        with output_layer.skipped() as captured, long_rows, capturing:
            self._called(ids, mask, slice(None), mapping, true_derivative)
        assert captured.states is not None
        states = captured.states[rows, columns]
        options = {
            "true_derivative": true_derivative,
            "rows_at_once": rows_at_once,
            "capture": capture,
        }
        return self._read_states(captured, states, rows, read, mapping, **options)

    def _read_states(
        self,
        captured: Captured,
        states: Float[Tensor, "R D"],
        rows: Int[Tensor, " R"],
        read: Callable[[Float[Tensor, "r V"], slice], tuple[Tensor, ...]],
        mapping: dict[str, Tensor],
        *,
        true_derivative: bool = False,
        rows_at_once: int | None = None,
        capture: Capture | None = None,
    ) -> tuple[Tensor, ...]:
        """What `read` makes of the logits of hidden states, a piece of them at a time."""
        assert self._split is not None
        output_layer, vocabulary = self._split
        own_names = output_layer.names_in(self._tensors)
        own_mapping = {own: mapping[name] for name, own in own_names.items() if name in mapping}
        if (
            capture is not None or not torch.is_grad_enabled()
        ):  # else pieces are made again later, each lent its own
            with nullcontext() if capture is None else capture:
                own_mapping |= self._lent(own_names, mapping)
        used = [mapping.get(name, self._tensors[name]) for name in own_names]
        versions = [tensor._version for tensor in used]
        piece = _Piece(
            self,
            output_layer,
            captured,
            own_mapping,
            used,
            versions,
            rows,
            read,
            true_derivative,
            capture,
        )
        if capture is not None and torch.is_grad_enabled():
            size = self.positions_at_once(vocabulary, _CHUNK_DIFFERENTIATED)
            return _differentiated(piece, states, rows, size, capture)
        size = rows_at_once or self.positions_at_once(vocabulary)
        if size >= len(rows):
            return piece(states, slice(0, len(rows)), record=True)
        pieces = []
        for part in _parts(len(rows), size):
            if torch.is_grad_enabled():
                again = checkpoint(
                    piece, states[part], part, use_reentrant=False, preserve_rng_state=False
                )
                pieces.append(again)
            else:
                pieces.append(piece(states[part], part))
        return tuple(map(torch.cat, zip(*pieces, strict=True)))

    @torch.no_grad()
    def read_prompts(
        self,
        ids: Int[Tensor, "n P"],
        mask: Int[Tensor, "n P"],
        override: Mapping[str, Tensor] | None = None,
        *,
        true_derivative: bool = False,
    ) -> ReadPrompts:
        """Prompts, padded to the left, read once for the responses to them. Without a graph.

        Raises `CacheError` where the model keeps no cache, or one that holds more than keys and values.
        """
        if self._cache_name != "past_key_values":
            raise CacheError("scoring", f"{self.kind} keeps no keys and values", "share no prompts")
        mapping, split, captured = dict(override or {}), self._split, Captured()
        keep = (
            slice(-1, None) if split is None else slice(None)
        )  # of rows that are skipped there is no last one
        skipped = nullcontext(captured) if split is None else split[0].skipped()
        with skipped as captured, self._long_rows(ids, true_derivative, once=False):
            output = self._called(ids, mask, keep, mapping, true_derivative, {"use_cache": True})
        cache = getattr(output, self._cache_name, None)
        require_keys_and_values(cache, self.kind)
        states = self._kept(output, keep) if split is None else captured.states
        assert states is not None
        return ReadPrompts(mask, states[:, -1].clone(), cache, captured)

    @torch.no_grad()
    def read_after(
        self,
        prompts: ReadPrompts,
        of_prompt: Int[Tensor, " N"],
        ids: Int[Tensor, "N T"],
        mask: Int[Tensor, "N T"],
        rows: Int[Tensor, " R"],
        steps: Int[Tensor, " R"],
        read: Callable[[Float[Tensor, "r V"], slice], tuple[Tensor, ...]],
        override: Mapping[str, Tensor] | None = None,
        *,
        true_derivative: bool = False,
    ) -> tuple[Tensor, ...]:
        """`read_logits` of rows whose prompts are read already: the responses `ids`, padded to the right, follow the
        prompts `of_prompt`. Without a graph.

            read(logits([prompt; ids])[rows, P − 1 + steps], slice(0, R))

        The logits at step t stand behind t tokens of the response; so its last token need not be among the `ids`.
        """
        split, mapping, captured = self._split, dict(override or {}), prompts.captured
        states = prompts.last[of_prompt[rows]]
        if ids.shape[1]:
            seen = torch.cat([prompts.mask[of_prompt], mask], 1)
            more = {"use_cache": True, "past_key_values": prompts.before(of_prompt)}
            scores = self._scores(len(ids), seen.shape[1]) * ids.shape[1] // seen.shape[1]
            long_rows = (
                BlockedAttention(once=not true_derivative) if is_long(scores) else nullcontext()
            )
            skipped = nullcontext(captured) if split is None else split[0].skipped()
            with skipped as captured, long_rows:
                output = self._called(ids, seen, slice(None), mapping, true_derivative, more)
            own = self._kept(output, slice(None)) if split is None else captured.states
            assert own is not None
            later = steps > 0
            states[later] = own[rows[later], steps[later] - 1]
        if split is None:
            return read(states, slice(0, len(rows)))
        return self._read_states(
            captured, states, rows, read, mapping, true_derivative=true_derivative
        )

    @cached_property
    def _split(self) -> tuple[OutputLayer, int] | None:
        """The output layer and the size of the vocabulary; `None` where the two parts do not give what the whole gives.

        Tried once, on two tokens.
        """
        output_layer = OutputLayer.of(self.language_model)
        if output_layer is None:
            return None
        ids = torch.tensor([[0, 1]], device=self.device)
        with torch.no_grad():
            whole = self._kept(self._called(ids, None, slice(None), {}, False), slice(None))[0]
            try:
                with output_layer.skipped() as captured:
                    self._called(ids, None, slice(None), {}, False)
                if captured.states is None:
                    return None
                with self._running():
                    parts = output_layer(captured, captured.states[0], {})
            except (TypeError, AttributeError, RuntimeError, ValueError, IndexError):
                return None
        close = parts.shape == whole.shape and torch.allclose(
            parts, whole, rtol=1e-4, atol=1e-4, equal_nan=True
        )
        return (output_layer, whole.shape[-1]) if close else None

    @cached_property
    def trains_output_layer(self) -> bool:
        """Whether a trained parameter is read where logits are made of hidden states, or may be."""
        if self._split is None:
            return True
        names = self._split[0].names_in(self._tensors)
        return any(name in self.registry.trainable for name in names)

    @cached_property
    def _modules(self) -> list[nn.Module]:
        return list(self.module.modules())

    @cached_property
    def _switched(self) -> list[tuple[Any, str]]:
        return switched(self._modules)

    @cached_property
    def _tensors(self) -> dict[str, Tensor]:
        return {**self.registry.parameters, **dict(self.module.named_buffers())}

    @contextmanager
    def _running(self, true_derivative: bool = False, *, record: bool = True) -> Iterator[None]:
        """The state of the module and of torch in which a forward runs; `record`: where it is recorded, the graph is to
        refer to the homes of what it is lent."""
        differentiate = true_derivative and not self.autograd_is_derivative
        in_forward_mode = true_derivative and not torch.is_grad_enabled()
        context = forward_context(
            self.dtype,
            forward_mode=true_derivative,
            differentiate=differentiate,
            tangents=in_forward_mode and self.registry.has_frozen,
        )
        lent = nullcontext()
        if self.lending is not None:
            lent = self.lending(self.module, record=record and torch.is_grad_enabled())
        with self._evaluating(), as_needed(self._switched), context, lent:
            yield

    def attention_of(self, rows: int, columns: int) -> Literal["short", "blocks", "whole"]:
        """How so many rows are attended to where a derivative in forward mode or a second one is taken: `short` ones by
        torch's MATH kernel, others in `blocks`, or `whole` where the model multiplies queries and keys itself."""
        config = getattr(self.language_model, "config", None)
        if not is_long(self._scores(rows, columns)):
            return "short"
        return "blocks" if getattr(config, "_attn_implementation", "") == "sdpa" else "whole"

    def _scores(self, rows: int, columns: int) -> int:
        heads = getattr(getattr(self.language_model, "config", None), "num_attention_heads", None)
        return rows * columns**2 * (heads or _MANY_HEADS)

    def _long_rows(
        self, ids: Tensor, true_derivative: bool, once: bool
    ) -> AbstractContextManager[object]:
        """Attention in blocks, where some layer has so many scores. A capture is entered within it, and so sees a call
        first and marks what comes of it."""
        scores = self._scores(*ids.shape)
        plain = once or not true_derivative
        return BlockedAttention(once=plain) if is_long(scores) else nullcontext()

    @contextmanager
    def _capturing(
        self, capture: Capture | None, ids: Tensor, true_derivative: bool, may_recompute: bool
    ) -> Iterator[None]:
        """The capture, and layers that are recomputed, within the same contexts as at first."""

        @contextmanager
        def again(activations: Sequence[Tensor]) -> Iterator[None]:
            with (
                self._long_rows(ids, true_derivative, once=True),
                nullcontext() if capture is None else capture.again(activations),
                self._running(true_derivative, record=False),
            ):
                yield

        with ExitStack() as stack:
            if self.recompute and may_recompute and torch.is_grad_enabled():
                is_activation = (lambda _: False) if capture is None else capture.is_of_batch
                layers = layers_of(self.language_model)
                stack.enter_context(recomputed(layers, again, is_activation))
            if capture is not None:
                stack.enter_context(capture)
            yield

    def recording(self) -> AbstractContextManager[None]:
        """For `torch.autograd.grad(create_graph=True)`: that graph refers to the homes of lent parameters too."""
        return nullcontext() if self.lending is None else self.lending.recording()

    def _lent(
        self, own_names: Mapping[str, str], mapping: Mapping[str, Tensor]
    ) -> dict[str, Tensor]:
        """What the output layer would be lent for every piece, by its own names, once for all of them."""
        if self.lending is None:
            return {}
        prefix = next(
            name for name, part in self.module.named_modules() if part is self.language_model
        )
        found = {}
        for name, own in own_names.items():
            home = mapping.get(name, self._tensors[name])
            lent = self.lending.lent(f"{prefix}.{own}" if prefix else own, home)
            if lent is not home:
                found[own] = lent
        return found

    def _called(
        self,
        ids: Tensor,
        mask: Tensor | None,
        keep: slice,
        mapping: dict[str, Tensor],
        true_derivative: bool,
        more: Mapping[str, Any] | None = None,
    ) -> Any:
        self._record(mapping)
        try:
            with self._running(true_derivative):
                arguments = self._arguments(ids, mask, keep) | dict(more or {})
                return self._functional_call(mapping, ids, arguments)
        except _OURS:
            raise
        except Exception as error:
            if _out_of_range(error):
                raise MeasurementError(
                    "rollouts",
                    f"the model cannot score rows of {ids.shape[1]} tokens ({error})",
                    "give shorter ones",
                ) from error
            if true_derivative:  # the caller knows another way to it
                raise
            raise MeasurementError(
                "the model",
                f"{self.kind} cannot score rows of {ids.shape[1]} token ids ({said(error)})",
                "give --probe-rollouts of rows that it takes, if it takes any",
            ) from error

    def _functional_call(
        self, mapping: Mapping[str, Tensor], ids: Tensor, arguments: dict[str, Any]
    ) -> Any:
        """`torch.func.functional_call(module, mapping, (ids,), arguments)`, which looks for tied parameters every time.

        With many small modules, such as adapters, that takes a tenth of a pass; here it is done once.
        """
        if not mapping:
            return self.module(ids, **arguments)
        untied = {name: value for own, value in mapping.items() for name in self._names_of[own]}
        return torch.func.functional_call(self.module, untied, (ids,), arguments, tie_weights=False)

    @cached_property
    def _names_of(self) -> dict[str, list[str]]:
        """The name of each tensor → all names that it has; a tied one has several."""
        tensors = [
            *self.module.named_parameters(remove_duplicate=False),
            *self.module.named_buffers(remove_duplicate=False),
        ]
        names_of: dict[int, list[str]] = {}
        for name, tensor in tensors:
            names_of.setdefault(id(tensor), []).append(name)
        return {name: names_of[id(tensor)] for name, tensor in tensors}

    def direct_logits(
        self,
        ids: Int[Tensor, "N L"],
        *,
        mask: Int[Tensor, "N L"] | None = None,
        keep: slice = slice(None),
    ) -> Float[Tensor, "N K V"]:
        """The same logits at θ by calling the module itself: what the zero check compares with."""
        with self._long_rows(ids, False, False), self._running():
            output = self.module(ids, **self._arguments(ids, mask, keep))
        return self._kept(output, keep)

    def next_logits(
        self,
        ids: Int[Tensor, "N L"],
        mask: Int[Tensor, "N M"] | None,
        cache: Any | None = None,
        *,
        override: Mapping[str, Tensor] | None = None,
    ) -> tuple[Float[Tensor, "N V"], Any]:
        """Logits of the token that follows the last column, and the model's cache, which now holds `ids` too.

            logits(rows, mask=mask, keep=slice(-1, None))[:, 0]      where rows [N, M] end in ids

        `cache` holds the M − L columns before `ids`; it is extended in place, and None stands for an empty one.
        Without `mask` no row has padding, and the model counts positions itself. Without a graph. Raises `CacheError`
        where the model has no cache, or one that does not hold its own past.
        """
        if self._cache_name is None:
            raise CacheError("sampling", f"{self.kind} keeps no cache", "give --probe-rollouts")
        with torch.no_grad(), self._running():
            keep = slice(-1, None)
            arguments = self._arguments(ids, mask, keep) | {
                "use_cache": True,
                self._cache_name: cache,
            }
            if override:
                self._record(override)
            try:
                output = self._functional_call(override or {}, ids, arguments)
            except _OURS:
                raise
            except Exception as error:
                if _out_of_range(error):
                    held = (ids if mask is None else mask).shape[1]
                    raise MeasurementError(
                        "sampling",
                        f"the model cannot hold rows of {held} tokens ({error})",
                        "sample shorter ones",
                    ) from error
                problem = f"the cache of {self.kind} cannot be used ({said(error)})"
                raise CacheError("sampling", problem, "give --probe-rollouts") from error
        cache = getattr(output, self._cache_name, None)
        if cache is None:
            raise CacheError("sampling", f"{self.kind} keeps no cache", "give --probe-rollouts")
        return self._kept(output, keep)[:, 0], cache

    @cached_property
    def _cache_name(self) -> str | None:
        """The model's argument, and its output, that is the cache."""
        taken = inspect.signature(self.language_model.forward).parameters
        return next((name for name in ("past_key_values", "cache_params") if name in taken), None)

    @cached_property
    def kind(self) -> str:
        """The type of the model, for messages."""
        config = getattr(self.language_model, "config", None)
        return f"`{getattr(config, 'model_type', type(self.language_model).__name__)}`"

    def _arguments(self, ids: Tensor, mask: Tensor | None, keep: slice) -> dict[str, Any]:
        arguments: dict[str, Any] = {"use_cache": False}
        if mask is not None:
            arguments["attention_mask"] = mask
            arguments["position_ids"] = (mask.long().cumsum(1) - 1).clamp(min=0)[:, -ids.shape[1] :]
        if self.takes_logits_to_keep and keep != slice(None):
            arguments["logits_to_keep"] = torch.arange(ids.shape[1], device=ids.device)[keep]
        return arguments

    def _kept(self, output: Any, keep: slice) -> Tensor:
        logits = output.logits if hasattr(output, "logits") else output[0]
        return logits if self.takes_logits_to_keep else logits[:, keep]

    def _record(self, mapping: Mapping[str, Tensor]) -> None:
        self.overridden.update(mapping)
        for name, value in mapping.items():
            own = self._tensors.get(name)
            if own is None:
                raise OverrideError(
                    f"override[{name!r}]",
                    "the unwrapped model has no such name",
                    "use named_parameters()",
                )
            if value.shape != own.shape or value.dtype not in (own.dtype, self.dtype):
                raise OverrideError(
                    f"override[{name!r}]",
                    f"is {form(value)}, the model works with {form(own)}",
                    "cast it to the configured dtype",
                )

    @contextmanager
    def _evaluating(self) -> Iterator[None]:
        training = [module for module in self._modules if module.training]
        for module in training:
            module.training = False
        try:
            yield
        finally:
            for module in training:
                module.training = True


# What is said already, or of the machine and not of the model.
_OURS = (ProbeError, MemoryError, torch.OutOfMemoryError)


def _out_of_range(error: Exception) -> bool:
    """Whether a table of the model, such as that of positions, was asked for more than it has."""
    return isinstance(error, IndexError) and "out of range in self" in str(error)


def said(error: Exception) -> str:
    """The type of a library's exception, and the first 120 characters of what it says."""
    return f"{type(error).__name__}: {' '.join(str(error).split())[:120]}"


def _marked(ids: Tensor, capture: Capture) -> Tensor:
    """The ids as `capture` is to know them: rows and positions must not be confused."""
    if ids.shape[0] == ids.shape[1]:
        ids = torch.nn.functional.pad(ids, (0, 1))
    capture.shape = (ids.shape[0], ids.shape[1])
    capture.mark(ids)
    return ids


def _differentiated(
    piece: _Piece, states: Tensor, rows: Tensor, size: int, capture: Capture
) -> tuple[Tensor, ...]:
    """Each piece differentiated as it is made, so that its logits are neither kept nor computed twice."""
    found: list[list[tuple[Tensor, Tensor]]] = []
    for part in _parts(len(rows), size):
        own = states[part].detach().requires_grad_()
        of_part = piece(own, part)
        found.append([(capture.piece(of, rows[part], own), of.detach()) for of in of_part])
    whole: list[Any] = [
        _Differentiated.apply(states, *map(torch.cat, zip(*parts, strict=True)))
        for parts in zip(*found, strict=True)
    ]
    return tuple(whole)


@dataclass(frozen=True)
class _Piece:
    """What `read` makes of the logits of positions `part`, from their hidden states; the `used` tensors must not have
    changed since, because a piece may be computed again."""

    bound: BoundModel
    output_layer: OutputLayer
    captured: Captured
    mapping: dict[str, Tensor]
    used: list[Tensor]
    versions: list[int]
    rows: Tensor
    read: Callable[[Tensor, slice], tuple[Tensor, ...]]
    true_derivative: bool
    capture: Capture | None

    def __call__(self, states: Tensor, part: slice, *, record: bool = False) -> tuple[Tensor, ...]:
        if self.versions != [tensor._version for tensor in self.used]:
            raise MeasurementError(
                "gradients",
                "the output layer was changed between forward and backward",
                "ask for gradients first",
            )
        of_positions = (
            nullcontext() if self.capture is None else self.capture.positions(self.rows[part])
        )
        if self.capture is not None:
            self.capture.mark(states)
        with of_positions, self.bound._running(self.true_derivative, record=record):
            logits = self.output_layer(self.captured, states, self.mapping)
        return self.read(logits, part)


class _Differentiated(torch.autograd.Function):
    """Values [R] that depend on states [R, D] of their own position, with their gradients [R, D]."""

    @staticmethod
    def forward(ctx: Any, states: Tensor, gradients: Tensor, values: Tensor) -> Tensor:
        ctx.save_for_backward(gradients)
        return values

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:  # pyright: ignore[reportIncompatibleMethodOverride]
        (gradients,) = ctx.saved_tensors
        return gradient[:, None] * gradients, None, None


def _parts(length: int, size: int) -> Iterator[slice]:
    return (slice(start, min(start + size, length)) for start in range(0, length, size))


def form(tensor: Tensor) -> str:
    """Shape and dtype, for messages."""
    return f"{tuple(tensor.shape)} {tensor.dtype}".replace("torch.", "")


def bind(
    model: nn.Module, dtype: torch.dtype = torch.float32, *, lend_frozen: bool = False
) -> BoundModel:
    """Bind the unwrapped model if it already is of `dtype`; else a copy of it, floating buffers included.

    `lend_frozen`, and always of a placed model: the copy has the very same frozen parameters, and is lent each in
    `dtype` while a layer uses it, so that a copy of an adapter costs its trainable parameters and one layer.
    """
    module = unwrap(model)
    require_held(module)
    _refuse_unswappable(module)
    placement = Placement.of(module)
    main = None if placement is None else placement.main
    floating = {p.dtype for p in module.parameters() if p.is_floating_point()}
    if floating == {dtype}:
        return BoundModel(
            Registry(module), dtype, lending=None if main is None else _lending(module, dtype, main)
        )
    lends = lend_frozen or placement is not None
    shared = {id(p): p for p in module.parameters() if not p.requires_grad} if lends else {}
    memo: dict[int, Any] = dict(shared)
    try:
        clone = copy.deepcopy(module, memo)
    except (RuntimeError, TypeError) as error:
        problem = f"cannot be copied to {dtype} ({error})".replace("torch.", "")
        raise MeasurementError(
            "the model", problem, f"give it in {dtype}".replace("torch.", "")
        ) from error
    with_own_forward(clone, memo)
    for parameter in clone.parameters():
        if id(parameter) not in shared:
            parameter.grad = None
    without_grouped_experts(clone, dtype)
    if (
        not lends
    ):  # accelerate puts a `to` on a model that it spreads, and a copy's is that of the live model
        return BoundModel(Registry(nn.Module.to(clone, dtype)), dtype)
    for part in clone.modules():  # as `Module.to` does, but for what is shared
        for parameter in part._parameters.values():
            if (
                parameter is not None
                and id(parameter) not in shared
                and parameter.is_floating_point()
            ):
                parameter.data = parameter.data.to(dtype)
        for name, buffer in part._buffers.items():
            if buffer is not None and buffer.is_floating_point():
                part._buffers[name] = buffer.to(dtype)
    return BoundModel(Registry(clone), dtype, lending=_lending(clone, dtype, main))


def without_grouped_experts(copy: nn.Module, dtype: torch.dtype) -> nn.Module:
    """The copy; in float64, which torch's grouped product of experts does not know, it takes one after the other."""
    for part in copy.modules():
        config = getattr(part, "config", None)
        if dtype is torch.float64 and hasattr(config, "_experts_implementation"):
            config._experts_implementation = "eager"  # pyright: ignore[reportAttributeAccessIssue, reportOptionalMemberAccess]
    return copy


def _lending(module: nn.Module, dtype: torch.dtype, main: torch.device | None) -> Lending | None:
    lending = Lending.of(module, dtype, main)
    return lending if lending.needed(module) else None


def require_held(module: nn.Module) -> None:
    """Raise for a model that accelerate has offloaded: its hooks put θ where θ + ηv should stand, and ΔH would be 0."""
    for name, tensor in (*module.named_parameters(), *module.named_buffers()):
        if tensor.is_meta:
            raise MeasurementError(
                f"parameter {name}",
                "has no data (it is on the meta device, as accelerate's offload leaves it)",
                "load the model without offload, or its checkpoint with the probe's own device_map",
            )


def _refuse_unswappable(module: nn.Module) -> None:
    """Refuse a tied parameter inside a ParameterDict or ParameterList.

    torch's `functional_call` swaps such a one in and does not put the original back (seen with peft's
    `trainable_token_indices` on tied embeddings).
    """
    names_of: dict[int, list[str]] = {}
    for name, parameter in module.named_parameters(remove_duplicate=False):
        names_of.setdefault(id(parameter), []).append(name)
    for tied in names_of.values():
        for name in tied if len(tied) > 1 else ():
            owner = module.get_submodule(name.rpartition(".")[0])
            if isinstance(owner, nn.ParameterDict | nn.ParameterList):
                raise OverrideError(
                    f"parameter {name}",
                    f"is tied, in a {type(owner).__name__}: it cannot be replaced without changing the model",
                    "untie the embeddings",
                )
