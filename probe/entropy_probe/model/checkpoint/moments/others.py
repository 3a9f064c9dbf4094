"""Optimizers whose step is not Adam's: named by the keys of their groups and states, and what they train.

Such a checkpoint is loaded for all that needs neither P nor v. An optimizer is Adam only where every key of its groups
and states is one of Adam's (`rule`): else it is another that is known, or the first key that is not Adam's is named.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from entropy_probe.errors import CheckpointError
from entropy_probe.model.checkpoint.moments.adam import group_keys, keys_by_group, number
from entropy_probe.model.checkpoint.moments.blocks import OF_BLOCKS
from entropy_probe.model.checkpoint.moments.order import names_in_file, names_of
from entropy_probe.model.checkpoint.moments.rule import strange_in_group, strange_in_state

_NONE = "it has no second moment"
_FACTORED = "it has no second moment per value"
_OWN = "its second moment is not Adam's"
_STEP = "its step is not Adam's"
_QUANTISED = "its second moment is quantised"
_PROJECTED = "its second moment is that of a projected gradient"
_UNKNOWN = "unknown"
_IN_PART = "not every tensor has Adam's second moment"


@dataclass(frozen=True)
class Kind:
    """An optimizer: `keys` that each of its groups has (and those that none has), and each state one of `states`.

    `loose`: what its states must look like is not known.
    """

    name: str
    why: str
    keys: frozenset[str]
    states: tuple[frozenset[str], ...]
    without: frozenset[str] = frozenset()
    loose: bool = False

    def is_of(self, group: Mapping[str, Any]) -> bool:
        return self.keys <= set(group) and not self.without & set(group)

    def has(self, entry: Mapping[str, Any], groups: Sequence[Mapping[str, Any]]) -> bool:
        """Whether a state is one of its states; SGD without momentum keeps nothing, or `None`."""
        if self.loose or (self.is_stateless(groups) and entry.get("momentum_buffer") is None):
            return True
        return any(all(isinstance(entry.get(key), Tensor) for key in keys) for keys in self.states)

    def is_stateless(self, groups: Sequence[Mapping[str, Any]]) -> bool:
        """Then an empty state does not mean that it was never stepped."""
        without = self.name == "SGD" and not any(group.get("momentum") for group in groups)
        return self.loose or without


@dataclass(frozen=True)
class OtherOptimizer:
    """What is known of an optimizer that is not Adam: its name, why it has no P, and the parameters that it trains."""

    kind: str
    why: str
    lr: float | None
    step: float | None
    trained: tuple[str, ...]

    @property
    def reason(self) -> str:
        """Why nothing that needs a second moment is measured."""
        return f"the optimizer is {self.kind}: {self.why}"


def _kind(name: str, why: str, keys: str, *states: str, without: str = "") -> Kind:
    of_states = tuple(frozenset(state.split()) for state in states)
    return Kind(name, why, frozenset(keys.split()), of_states, frozenset(without.split()))


# torch 2.13's, transformers' Adafactor, and others as their packages write them; the most telling keys first.
KINDS = (
    _kind("SGD", _NONE, "momentum dampening nesterov", "momentum_buffer"),
    _kind("Muon", _NONE, "momentum ns_steps", "momentum_buffer"),
    _kind("Muon", _NONE, "momentum use_muon", "momentum_buffer"),
    _kind("RMSprop", _OWN, "alpha centered", "square_avg"),
    _kind("Adagrad", _OWN, "lr_decay initial_accumulator_value", "sum"),
    _kind("Adadelta", _OWN, "rho eps", "square_avg acc_delta"),
    _kind("NAdam", _OWN, "momentum_decay betas", "exp_avg exp_avg_sq mu_product"),
    _kind("ASGD", _NONE, "lambd t0", "ax"),
    _kind("Rprop", _NONE, "etas step_sizes", "prev step_size"),
    _kind("Adafactor", _FACTORED, "beta2_decay d", "row_var col_var", "variance"),
    _kind("Adafactor", _FACTORED, "scale_parameter relative_step", "exp_avg_sq_row exp_avg_sq_col", "exp_avg_sq"),
    _kind("RAdam", _OWN, "betas foreach decoupled_weight_decay", "exp_avg exp_avg_sq", without="fused"),
    _kind("Adamax", _OWN, "betas foreach", "exp_avg exp_inf", without="fused decoupled_weight_decay"),
    replace(_kind("APOLLO", _PROJECTED, "rank proj scale_type"), loose=True),
    replace(_kind("GaLore", _PROJECTED, "rank update_proj_gap proj_type"), loose=True),
    _kind("LAMB", _STEP, "betas grad_averaging", "exp_avg exp_avg_sq"),
    _kind("Prodigy", _STEP, "betas d_coef", "exp_avg exp_avg_sq"),
    _kind("Lion", _NONE, "betas", "exp_avg", without="eps"),
)  # fmt: skip


_OF_TORCH = ("foreach", "maximize", "capturable", "differentiable")
"""Keys that torch's Adam has beside `amsgrad`, and others (SparseAdam, those that are built like it) without."""
_ADAM = Kind("Adam", "", frozenset(), ())
_BARE = Kind("", "", frozenset(), ())


def recognise(state_dict: Mapping[str, Any], path: Path) -> Kind | None:
    """The optimizer that wrote this state_dict, `blocks.with_moments`; `None` for Adam, and for a damaged Adam.

    Raises `CheckpointError` where some groups are of a known optimizer and others of none, and where a state of a known
    one lacks what the others have.
    """
    entries, every = _entries(state_dict), state_dict["param_groups"]
    groups = [group for group in every if group.get("params")] or every
    kinds = [_kind_of(group, entries, path) for group in groups]
    if all(kind in (_ADAM, _BARE) for kind in kinds):
        return _unknown_by_state(groups, entries)
    unknown = next((kind for kind in kinds if kind.name == _UNKNOWN), None)
    if unknown is not None:
        return unknown
    names = list(dict.fromkeys(kind.name for kind in kinds if kind is not _BARE))
    if _BARE in kinds:
        raise CheckpointError(
            path, f"only some of its groups are of {names[0]}", "save optimizer.state_dict()"
        )
    return _in_one(names) if len(names) > 1 else _with_its_states(kinds[0], groups, entries, path)


def _kind_of(group: Mapping[str, Any], entries: Mapping[Any, dict[str, Any]], path: Path) -> Kind:
    """That of one group: a known one, Adam, bare (nothing tells), or an unknown one."""
    strange = strange_in_group(group)
    if strange is None and "amsgrad" in group:
        return _ADAM
    mine = {key: entries[key] for key in group.get("params", ()) if key in entries}
    kinds = (kind for kind in KINDS if kind.is_of(group))
    states = mine.values()
    known = next((k for k in kinds if not mine or any(k.has(e, [group]) for e in states)), None)
    if known is not None:
        return known
    if any("state1" in entry for entry in states):
        return _bitsandbytes(group, mine, path)
    if strange is not None:
        return _unknown(f"Adam has no {strange}")
    of_torch = next((key for key in _OF_TORCH if key in group), None)
    if of_torch is not None and "fused" not in group:
        return _unknown(f"its groups have `{of_torch}` and no `amsgrad`")
    return _ADAM if "betas" in group else _BARE


def _unknown_by_state(
    groups: Sequence[Mapping[str, Any]], entries: Mapping[Any, dict[str, Any]]
) -> Kind | None:
    """Adam's groups, or bare ones, and states of another optimizer; `None` where they may be a damaged Adam's: damage
    is here and there."""
    for entry in entries.values():
        if (strange := strange_in_state(entry)) is not None:
            return _unknown(f"Adam's states have no {strange}")
        for moment in (entry.get("exp_avg"), entry.get("exp_avg_sq")):
            if type(moment).__name__.startswith("OptimState"):
                return _kind_in(f"its moments are of torchao's {type(moment).__name__}")
    forms = {frozenset(entry) for entry in entries.values()}
    if any("amsgrad" in group for group in groups):
        return None
    if len(forms) == 1 and "exp_avg_sq" not in next(iter(forms)):
        return _unknown("its states have no `exp_avg_sq`")
    if not entries and not any("betas" in group for group in groups):
        return _unknown("its groups have no `betas`")
    return None


def _with_its_states(
    kind: Kind,
    groups: Sequence[Mapping[str, Any]],
    entries: Mapping[Any, dict[str, Any]],
    path: Path,
) -> Kind:
    for key, entry in entries.items():
        if kind.has(entry, groups):
            continue
        if any(pair <= set(entry) for pair in _OF_ADAM):
            return _in_one([kind.name, "Adam"])
        expected = " or ".join(" and ".join(f"`{k}`" for k in sorted(keys)) for keys in kind.states)
        keys = ", ".join(sorted(map(str, entry)))
        raise CheckpointError(
            path,
            f"tensor {key} lacks {expected} of {kind.name}, it has {keys}"[:200],
            "use an earlier checkpoint",
        )
    return kind


_OF_ADAM = ({"exp_avg", "exp_avg_sq"}, {"moment1", "moment2"})


def _in_one(names: Sequence[str]) -> Kind:
    in_order = sorted(names, key=lambda name: name == "Adam")
    return Kind(f"{' and '.join(in_order)} in one", _IN_PART, frozenset(), (), loose=True)


def _unknown(why: str) -> Kind:
    return Kind(_UNKNOWN, why, frozenset(), (), loose=True)


def _kind_in(why: str) -> Kind:
    return Kind("Adam in few bits", why, frozenset(), (), loose=True)


def map_other(
    kind: Kind, state_dict: dict[str, Any], model: nn.Module, path: Path
) -> OtherOptimizer:
    """The parameters that the optimizer trains, by names or a known order as for Adam; raises `CheckpointError`.

    A frozen parameter that was handed to it and has no state is none of them.
    """
    entries, parameters = _entries(state_dict), dict(model.named_parameters())
    keys, groups = keys_of(kind, state_dict, path), state_dict["param_groups"]
    shapes = {key: shape for key, entry in entries.items() if (shape := _shape(entry)) is not None}
    if kind.loose:
        shapes = {}
        trainable = tuple(name for name, p in parameters.items() if p.requires_grad)
        whole = sum(map(len, keys)) in (len(trainable), len(parameters))
        if whole and names_in_file(keys, groups) is None:  # then their order does not matter
            return described(kind, state_dict, path, trainable)
    outlines = {key: {"": torch.empty(shape, device="meta")} for key, shape in shapes.items()}
    names, _ = names_of(keys, groups, outlines, parameters, model, path)
    for key, name in names.items():
        if shapes.get(key, parameters[name].shape) != parameters[name].shape:
            raise CheckpointError(
                path,
                f"{name}: its state is of shape {tuple(shapes[key])}, the parameter {tuple(parameters[name].shape)}",
                "use the optimizer saved with this model",
            )
    trained = [
        name for key, name in names.items() if key in entries or parameters[name].requires_grad
    ]
    if len(trained) > len(set(trained)):
        raise CheckpointError(
            path, "one parameter is in it twice", "save the optimizer's state_dict again"
        )
    return described(kind, state_dict, path, tuple(trained))


def keys_of(kind: Kind, state_dict: dict[str, Any], path: Path) -> list[list[int | str]]:
    """The keys of each group; an empty state is an error where the optimizer is known to have one."""
    groups = state_dict["param_groups"]
    if kind.is_stateless(groups):
        return [group_keys(group, path) for group in groups]
    return keys_by_group(state_dict, path)


def described(
    kind: Kind, state_dict: Mapping[str, Any], path: Path, trained: tuple[str, ...] = ()
) -> OtherOptimizer:
    """Its name, and the largest lr and step that it has: Adafactor may have no lr, SGD has no step."""
    groups, entries = state_dict["param_groups"], _entries(state_dict).values()

    def numbers(key: str, *places: Mapping[str, Any]) -> list[float]:
        values = [place[key] for place in places if place.get(key) is not None]
        if kind.loose:  # who knows what it keeps there
            values = [
                v for v in values if isinstance(v, int | float) or getattr(v, "numel", int)() == 1
            ]
        return [number(value, f"`{key}`", path) for value in values]

    lrs, steps = numbers("lr", *groups), numbers("step", *entries, *groups)
    return OtherOptimizer(
        kind.name, kind.why, max(lrs, default=None), max(steps, default=None), trained
    )


def _entries(state_dict: Mapping[str, Any]) -> dict[Any, dict[str, Any]]:
    """The states that hold anything."""
    return {
        key: entry
        for key, entry in state_dict["state"].items()
        if isinstance(entry, dict) and entry
    }


def _bitsandbytes(
    group: Mapping[str, Any], entries: Mapping[Any, dict[str, Any]], path: Path
) -> Kind:
    """What `blocks` does not unpack: Adam and AdEMAMix have two states, LAMB a norm, others one state."""
    packed = {key: entry for key, entry in entries.items() if "state1" in entry}
    of_one, of_two = (
        [t for e in packed.values() if isinstance(t := e.get(key), Tensor)]
        for key in ("state1", "state2")
    )
    eight = any(tensor.dtype is torch.uint8 for tensor in of_one)
    bits = " 8-bit" if eight else ""
    if not of_two:
        return _kind(f"one of bitsandbytes{bits}", "it has one moment", "lr", "state1")
    of = {
        "LAMB": any("unorm_vec" in entry for entry in packed.values()),
        "AdEMAMix": len(group.get("betas") or ()) > 2,
    }
    name = next((name for name, holds in of.items() if holds), None)
    if name is not None:
        return _kind(f"{name}{bits}", _STEP, "lr", "state1 state2")
    for key, entry in packed.items():
        if entry.keys() & {"absmax1", "absmax2"} and entry.keys() <= OF_BLOCKS:
            problem = f"tensor {key}: its moments, their maps and their scales do not fit together"
            raise CheckpointError(path, problem, "use an earlier checkpoint")
    why = _QUANTISED if eight else "its moments are in bitsandbytes' form"
    return Kind(f"AdamW{bits}", why, frozenset(), (), loose=True)  # small tensors are unpacked


def _shape(entry: Mapping[str, Any]) -> torch.Size | None:
    """That of the parameter, as far as its state tells: of a tensor that has it, or of Adafactor's two factors."""
    row, column = entry.get("exp_avg_sq_row"), entry.get("exp_avg_sq_col")
    if isinstance(row, Tensor) and isinstance(column, Tensor):
        return torch.Size([*row.shape, column.shape[-1]])
    row, column = entry.get("row_var"), entry.get("col_var")
    if isinstance(row, Tensor) and isinstance(column, Tensor):
        return torch.Size([*row.shape[:-1], column.shape[-1]])
    known = (
        "state2",
        "state1",
        *sorted(key for kind in KINDS for keys in kind.states for key in keys),
    )
    return next(
        (t.shape for key in known if isinstance(t := entry.get(key), Tensor) and t.ndim > 0), None
    )
