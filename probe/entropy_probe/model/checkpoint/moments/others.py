"""Optimizers that have no second moments of Adam's: named by the keys of their groups and states, and what they train.

Such a checkpoint is loaded for all that needs neither P nor v. A damaged state of Adam is never taken for one of them:
groups with `amsgrad` are Adam's, whatever their state, and so is an unknown optimizer with an `exp_avg_sq` anywhere.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from entropy_probe.errors import CheckpointError
from entropy_probe.model.checkpoint.moments.adam import group_keys, keys_by_group, number
from entropy_probe.model.checkpoint.moments.order import names_of

_NONE = "it has no second moment"
_FACTORED = "it has no second moment per value"
_OWN = "its second moment is not Adam's"
_STEP = "its step is not Adam's"
_QUANTISED = "its second moment is quantised"
_UNKNOWN = "none that is known has its keys"
_BITSANDBYTES = "__bnb_optimizer_quant_state__"


@dataclass(frozen=True)
class Kind:
    """An optimizer: `keys` that each of its groups has (and those that none has), and each state one of `states`."""

    name: str
    why: str
    keys: frozenset[str]
    states: tuple[frozenset[str], ...]
    without: frozenset[str] = frozenset()

    def is_of(self, group: Mapping[str, Any]) -> bool:
        return self.keys <= set(group) and not self.without & set(group)

    def has(self, entry: Mapping[str, Any], groups: Sequence[Mapping[str, Any]]) -> bool:
        """Whether a state is one of its states; SGD without momentum keeps nothing, or `None`."""
        if self.is_stateless(groups) and entry.get("momentum_buffer") is None:
            return True
        return any(all(isinstance(entry.get(key), Tensor) for key in keys) for keys in self.states)

    def is_stateless(self, groups: Sequence[Mapping[str, Any]]) -> bool:
        """Then an empty state does not mean that it was never stepped."""
        return self.name == "SGD" and not any(group.get("momentum") for group in groups)


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
    _kind("LAMB", _STEP, "betas grad_averaging", "exp_avg exp_avg_sq"),
    _kind("Prodigy", _STEP, "betas d_coef", "exp_avg exp_avg_sq"),
    _kind("Lion", _NONE, "betas", "exp_avg", without="eps"),
)  # fmt: skip


def recognise(state_dict: Mapping[str, Any], path: Path) -> Kind | None:
    """The optimizer that wrote this state_dict; `None` for Adam, and for all that may be a damaged Adam.

    Raises `CheckpointError` where groups or states are of different optimizers. One that is not in `KINDS` is
    unknown, and no damaged Adam, if its states are all of one form without `exp_avg_sq`: damage is here and there.
    """
    groups, entries = state_dict["param_groups"], _entries(state_dict)
    if any("amsgrad" in group for group in groups):
        return None
    kinds = [kind for kind in KINDS if any(kind.is_of(group) for group in groups)]
    if any("state1" in entry for entry in entries.values()):
        kinds = [_bitsandbytes(groups, list(entries.values()))]
    kind = next(
        (k for k in kinds if not entries or any(k.has(e, groups) for e in entries.values())), None
    )
    if kind is None:
        return _unknown(groups, entries)
    if not all(kind.is_of(group) for group in groups):
        raise CheckpointError(
            path, f"some of its groups alone are of {kind.name}", "save optimizer.state_dict()"
        )
    for key, entry in entries.items():
        if not kind.has(entry, groups):
            expected = " or ".join(
                " and ".join(f"`{k}`" for k in sorted(keys)) for keys in kind.states
            )
            keys = ", ".join(sorted(map(str, entry)))
            raise CheckpointError(
                path,
                f"tensor {key} lacks {expected} of {kind.name}, it has {keys}"[:200],
                "use an earlier checkpoint",
            )
    return kind


def map_other(
    kind: Kind, state_dict: dict[str, Any], model: nn.Module, path: Path
) -> OtherOptimizer:
    """The parameters that the optimizer trains, by names or a known order as for Adam; raises `CheckpointError`.

    A frozen parameter that was handed to it and has no state is none of them.
    """
    entries, parameters = _entries(state_dict), dict(model.named_parameters())
    shapes = {key: shape for key, entry in entries.items() if (shape := _shape(entry)) is not None}
    outlines = {key: {"": torch.empty(shape, device="meta")} for key, shape in shapes.items()}
    keys = keys_of(kind, state_dict, path)
    names, _ = names_of(keys, state_dict["param_groups"], outlines, parameters, model, path)
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
            path, "one parameter stands in it twice", "save the optimizer's state_dict again"
        )
    return described(kind, state_dict, path, tuple(trained))


def keys_of(kind: Kind, state_dict: dict[str, Any], path: Path) -> list[list[int | str]]:
    """The keys of each group; an empty state is an error, but for SGD without momentum."""
    groups = state_dict["param_groups"]
    if kind.is_stateless(groups):
        return [group_keys(group, path) for group in groups]
    return keys_by_group(state_dict, path)


def described(
    kind: Kind, state_dict: Mapping[str, Any], path: Path, trained: tuple[str, ...] = ()
) -> OtherOptimizer:
    """Its name, and the largest lr and step that it has: Adafactor may have no lr, SGD has no step."""
    lrs = [
        number(g["lr"], "`lr`", path) for g in state_dict["param_groups"] if g.get("lr") is not None
    ]
    steps = [
        number(e["step"], "`step`", path)
        for e in _entries(state_dict).values()
        if e.get("step") is not None
    ]
    return OtherOptimizer(
        kind.name, kind.why, max(lrs, default=None), max(steps, default=None), trained
    )


def _entries(state_dict: Mapping[str, Any]) -> dict[Any, dict[str, Any]]:
    """The states that hold anything; what bitsandbytes hides from FSDP in a dictionary of its own stands beside it."""
    entries = {
        key: entry
        for key, entry in state_dict["state"].items()
        if isinstance(entry, dict) and entry
    }
    inside = {key: entry.get(_BITSANDBYTES) for key, entry in entries.items()}
    return {
        key: {**entry, **of} if isinstance(of := inside[key], dict) else entry
        for key, entry in entries.items()
    }


def _bitsandbytes(
    groups: Sequence[Mapping[str, Any]], entries: Sequence[Mapping[str, Any]]
) -> Kind:
    """Tensors below a size stay in float32 beside the 8-bit ones. Adam and AdEMAMix have two states, others one."""
    of_one, of_two = (
        [t for e in entries if isinstance(t := e.get(key), Tensor)] for key in ("state1", "state2")
    )
    eight, form = (
        any(tensor.dtype is torch.uint8 for tensor in of_one),
        "its moments are in bitsandbytes' form",
    )
    bits = " 8-bit" if eight else ""
    if not of_two:
        return _kind(f"one of bitsandbytes{bits}", "it has one moment", "lr", "state1")
    name = "AdEMAMix" if any(group.get("alpha") for group in groups) else "AdamW"
    return _kind(f"{name}{bits}", _QUANTISED if eight else form, "lr", "state1 state2")


def _unknown(
    groups: Sequence[Mapping[str, Any]], entries: Mapping[Any, dict[str, Any]]
) -> Kind | None:
    forms = {frozenset(entry) for entry in entries.values()}
    if (
        len(forms) != 1
        or "exp_avg_sq" in next(iter(forms))
        or not all("lr" in group for group in groups)
    ):
        return None
    return Kind("unknown", _UNKNOWN, frozenset({"lr"}), (frozenset(),))


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
