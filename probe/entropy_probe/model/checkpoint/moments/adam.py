"""Adam's state, mapped to parameters by name.

`order` tells which parameter each of its tensors belongs to; `others` are those that are not Adam.
"""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from itertools import accumulate
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from entropy_probe.errors import CheckpointError, shown
from entropy_probe.model.checkpoint.files import load_pickle, require_dense
from entropy_probe.model.checkpoint.moments.blocks import QUANTISED, Blocks
from entropy_probe.model.checkpoint.moments.order import names_of
from entropy_probe.model.checkpoint.stand_ins import OF_OPTIMIZERS, standing_in
from entropy_probe.text import load_json

MissingState = Literal["raise", "identity"]
_ONLY_TENSORS = "save only the optimizer's state_dict, with tensors and numbers in place of objects"
_USE_ADAM = "use a checkpoint of Adam or AdamW"
_IDENTITY = "set first_order.missing_state: identity to take P = 1 there"
_NAMES_FILE = "optimizer_param_names.json"


@dataclass(frozen=True)
class AdamState:
    """Moments of one parameter in float32 or wider, and the hyper-parameters of its own group.

    `decoupled`: AdamW's decay; `initial_lr`: the peak of the scheduler, where one was used. `of_transformers`: the form
    of Transformers 4's own AdamW (`correct_bias`): ε is added before the bias is corrected, and the decay acts on what
    the step has made. `blocks`: the moments that are stored in 8 bits, by name, whose values `exp_avg` and the others
    are.
    """

    exp_avg: Tensor
    exp_avg_sq: Tensor
    max_exp_avg_sq: Tensor | None
    step: float
    lr: float
    betas: tuple[float, float]
    eps: float
    weight_decay: float
    initial_lr: float | None = None
    decoupled: bool = True
    amsgrad: bool = False
    maximize: bool = False
    bias_correction: bool = True
    of_transformers: bool = False
    blocks: Mapping[str, Blocks] = field(default_factory=dict)

    @property
    def kind(self) -> str:
        more = {
            " 8-bit": bool(self.blocks),
            " (AMSGrad)": self.amsgrad,
            " without bias correction": not self.bias_correction,
        }
        said = "".join(text for text, holds in more.items() if holds)
        return ("AdamW" if self.decoupled else "Adam") + said

    def rounding(self, moment: Literal["exp_avg", "exp_avg_sq"]) -> Tensor:
        """How far each of its values may be from what the optimizer had before it stored it."""
        if moment in self.blocks:
            return self.blocks[moment].rounding
        return 2.0**-24 * getattr(self, moment).abs()


def kind_of(states: Iterable[AdamState]) -> str:
    """All kinds among them; small tensors that stay in 32 bits beside 8-bit ones are none of their own."""
    kinds = sorted({state.kind for state in states})
    return " and ".join(k for k in kinds if not any(o.startswith(f"{k} 8-bit") for o in kinds))


def state_files(path: Path) -> list[Path]:
    """The files that `read_state` opens."""
    return [file for file in (path, path.with_name(_NAMES_FILE)) if file.is_file()]


def read_state(path: Path) -> dict[str, Any]:
    """The optimizer's state_dict in its file: at top level, or under `optimizer` or `optimizer_state_dict`.

    Its groups get the `param_names` that an optimizer_param_names.json beside it lists, group by group.
    """
    with standing_in(OF_OPTIMIZERS):
        content = load_pickle(path, _ONLY_TENSORS)
    nested = (
        [content.get(key) for key in ("optimizer", "optimizer_state_dict")]
        if isinstance(content, dict)
        else []
    )
    for candidate in [content, *nested]:
        if isinstance(candidate, dict) and "state" in candidate and "param_groups" in candidate:
            if not isinstance(candidate["state"], dict) or not isinstance(
                candidate["param_groups"], list | tuple
            ):
                break
            groups, names = list(candidate["param_groups"]), path.with_name(_NAMES_FILE)
            keys = [group_keys(group, path) for group in groups]
            return {
                **candidate,
                "param_groups": _named(groups, keys, names) if names.is_file() else groups,
            }
    raise CheckpointError(
        path,
        "holds no optimizer state_dict (`state`, `param_groups`)",
        "save optimizer.state_dict()",
    )


def _named(
    groups: list[dict[str, Any]], keys: list[list[int | str]], path: Path
) -> list[dict[str, Any]]:
    """The groups with `param_names` from the file: a list of names for each group, or one list for all in a row."""
    names, sizes = load_json(path), [len(of_group) for of_group in keys]
    if (
        isinstance(names, list)
        and all(isinstance(name, str) for name in names)
        and len(names) == sum(sizes)
    ):
        names = [
            names[end - size : end] for size, end in zip(sizes, accumulate(sizes), strict=True)
        ]
    if not isinstance(names, list) or [isinstance(n, list) and len(n) for n in names] != sizes:
        raise CheckpointError(
            path,
            f"is not a list of names for each group of {sizes} tensors",
            "save both files at the same step",
        )
    for group, of_group in zip(groups, names, strict=True):
        if group.get("param_names", of_group) != of_group:
            raise CheckpointError(
                path, "differs from the optimizer's own `param_names`", "remove the wrong one"
            )
    return [
        {**group, "param_names": of_group} for group, of_group in zip(groups, names, strict=True)
    ]


def inventory(state_dict: dict[str, Any]) -> dict[str, int]:
    """How many tensors with both moments stand under each set of hyper-parameters, as the file has them."""
    counted: Counter[str] = Counter()
    for group in state_dict["param_groups"]:
        for key in group["params"]:
            entry = state_dict["state"].get(key)
            if isinstance(entry, dict) and {"exp_avg", "exp_avg_sq"} <= set(entry):
                beta1, beta2 = map(float, group["betas"])
                values = (
                    float(group["lr"]),
                    beta1,
                    beta2,
                    float(group["eps"]),
                    float(group.get("weight_decay", 0.0)),
                )
                counted[hyper_parameters(*values)] += 1
    return dict(counted)


def hyper_parameters(lr: float, beta1: float, beta2: float, eps: float, weight_decay: float) -> str:
    """As they are shown in a report."""
    return f"lr {lr:.9g}, betas {beta1:.9g} {beta2:.9g}, eps {eps:.9g}, weight decay {weight_decay:.9g}"


def map_adam_state(
    state_dict: dict[str, Any],
    model: nn.Module,
    path: Path,
    missing_state: MissingState = "raise",
    notes: list[str] | None = None,
) -> dict[str, AdamState]:
    """`{parameter name: AdamState}` for the parameters the optimizer holds, in the order of the groups.

    A parameter without moments raises, or under `missing_state="identity"` gets those of a fresh optimizer (step 0).
    One that stands in the optimizer without any state had no gradient at any step: in a full model, where all are
    trainable as far as the files tell, it was frozen, and is left out. `notes` gets a line where the order was decided
    by content.

    Raises `CheckpointError` where the order cannot be proved, where a shape differs, where a moment is missing or not
    finite, or where the optimizer is not of Adam's kind.
    """
    state, groups = state_dict["state"], state_dict["param_groups"]
    parameters = dict(model.named_parameters())
    keys = adam_keys(state_dict, path)
    names, note = names_of(keys, groups, state, parameters, model, path)
    full_model = all(parameter.requires_grad for parameter in parameters.values())
    # state that belongs to no group may be that of a tensor which then seems to have none
    may_be_frozen = full_model and missing_state == "raise" and set(state) <= set(names)
    mapped: dict[str, AdamState] = {}
    for group, group_keys in zip(groups, keys, strict=True):
        for key in group_keys:
            name = names[key]
            if (may_be_frozen or not parameters[name].requires_grad) and state.get(key) in (
                None,
                {},
            ):
                continue  # it was handed to the optimizer and never stepped
            if name in mapped:
                raise CheckpointError(
                    path, f"{name} is in it twice", "save the optimizer's state_dict again"
                )
            mapped[name] = adam_state(
                name, state.get(key), group, parameters[name].shape, path, missing_state
            )
    if not mapped:
        raise CheckpointError(
            path, "has no state of any of its tensors", "save optimizer.state_dict() again"
        )
    if notes is not None:
        notes += [line for line in (note, lost_to_rounding(mapped.values())) if line]
    return mapped


def lost_to_rounding(states: Iterable[AdamState]) -> str:
    """How many second moments 8 bits have made 0, in a line; "" for none."""
    of_second = [state.blocks["exp_avg_sq"] for state in states if "exp_avg_sq" in state.blocks]
    lost, total = (
        sum(of) for of in ([b.num_lost for b in of_second], [b.codes.numel() for b in of_second])
    )
    return f"8 bits round {lost} of {total} second moments to 0: P is 1/ε there" if lost else ""


def adam_keys(state_dict: dict[str, Any], path: Path) -> list[list[int | str]]:
    """`keys_by_group` of Adam's groups. Raises for those that Adam cannot have written."""
    if any("foreach" in group and "amsgrad" not in group for group in state_dict["param_groups"]):
        raise CheckpointError(path, "its groups lack `amsgrad`: it is not torch's Adam", _USE_ADAM)
    return keys_by_group(state_dict, path)


def keys_by_group(state_dict: dict[str, Any], path: Path) -> list[list[int | str]]:
    """The keys of each param_group. Raises for an optimizer that was never stepped."""
    keys = [group_keys(group, path) for group in state_dict["param_groups"]]
    if not state_dict["state"]:
        steps = [group.get("step") for group in state_dict["param_groups"]]
        if any(step is not None and number(step, "`step`", path) > 0 for step in steps):
            raise CheckpointError(
                path, "has no moments (its `state` is empty)", "save optimizer.state_dict() again"
            )
        raise CheckpointError(
            path, "was never stepped (its `state` is empty)", "save it after at least one step"
        )
    return keys


def group_keys(group: Any, path: Path) -> list[int | str]:
    """The keys of one param_group, as `state` has them."""
    params = group.get("params") if isinstance(group, dict) else None
    if not isinstance(params, list | tuple) or any(type(key) not in (int, str) for key in params):
        raise CheckpointError(
            path, "has a param_group without a list of `params`", "save optimizer.state_dict()"
        )
    return list(params)


def adam_state(
    name: str,
    entry: Any,
    group: dict[str, Any],
    shape: torch.Size,
    path: Path,
    missing_state: MissingState = "raise",
) -> AdamState:
    """What the file holds of one parameter of that shape. Raises `CheckpointError` for anything that Adam cannot be."""
    entry = entry if isinstance(entry, dict) else {}
    if missing_state == "identity" and not {"exp_avg", "exp_avg_sq"} <= set(entry):
        zeros = torch.zeros(shape)
        entry = {"exp_avg": zeros, "exp_avg_sq": zeros, "max_exp_avg_sq": zeros, "step": 0}
    elif not entry:
        raise CheckpointError(
            path, f"{name} has no state", f"save it after a step of every parameter, or {_IDENTITY}"
        )
    moments = _moments(name, entry, shape, path, amsgrad=_flag(group, ("amsgrad",), path))
    step = number(entry.get("step", group.get("step")), f"{name}: `step`", path)
    if step < 1 and missing_state == "raise":
        raise CheckpointError(
            path, f"{name}: `step` is {step:g}", "save it after at least one step"
        )
    betas = group.get("betas")
    if isinstance(betas, Tensor) and betas.ndim == 1:
        betas = list(betas)
    if not isinstance(betas, list | tuple) or len(betas) != 2:
        raise CheckpointError(path, f"`betas` is {shown(betas)}", _USE_ADAM)
    beta1, beta2 = (number(beta, "`betas`", path) for beta in betas)
    eps, lr = number(group.get("eps"), "`eps`", path), number(group.get("lr"), "`lr`", path)
    weight_decay = number(group.get("weight_decay", 0.0), "`weight_decay`", path)
    for what, value, valid in (
        ("`betas`", (beta1, beta2), 0 <= beta1 < 1 and 0 <= beta2 < 1),
        ("`eps`", eps, eps >= 0),
        ("`lr`", lr, lr >= 0),
        ("`weight_decay`", weight_decay, weight_decay >= 0),
    ):
        if not valid:
            raise CheckpointError(path, f"{what} is {value}", _USE_ADAM)
    initial_lr = group.get("initial_lr")
    return AdamState(
        exp_avg=moments["exp_avg"],
        exp_avg_sq=moments["exp_avg_sq"],
        max_exp_avg_sq=moments.get("max_exp_avg_sq"),
        step=step,
        lr=lr,
        betas=(beta1, beta2),
        eps=eps,
        weight_decay=weight_decay,
        initial_lr=None if initial_lr is None else number(initial_lr, "`initial_lr`", path),
        # torch's Adam and AdamW share a class since 2.8 and say which they are; older files come from AdamW.
        decoupled=_flag(group, ("decoupled_weight_decay", "adam_w_mode"), path, absent=True),
        amsgrad=_flag(group, ("amsgrad",), path),
        maximize=_flag(group, ("maximize",), path),
        bias_correction=_flag(group, ("bias_correction", "correct_bias"), path, absent=True),
        of_transformers="correct_bias" in group,
        blocks=entry.get(QUANTISED, {}),
    )


def _moments(
    name: str, entry: dict[str, Any], shape: torch.Size, path: Path, *, amsgrad: bool
) -> dict[str, Tensor]:
    """The moments of one parameter, float32 or wider: finite, of its shape, and the second ones not negative."""
    for moment in ("exp_avg", "exp_avg_sq"):
        if not isinstance(entry.get(moment), Tensor):
            present = ", ".join(
                sorted(key if isinstance(key, str) else shown(key) for key in entry)
            )
            raise CheckpointError(
                path,
                f"{name} has no `{moment}`, only {present}",
                f"{_USE_ADAM}, or {_IDENTITY}",
            )
    if amsgrad and not isinstance(entry.get("max_exp_avg_sq"), Tensor):
        raise CheckpointError(
            path, f"{name} has no `max_exp_avg_sq` under amsgrad", "save the optimizer again"
        )
    moments: dict[str, Tensor] = {}
    for moment in ("exp_avg", "exp_avg_sq", "max_exp_avg_sq"):
        tensor = entry.get(moment)
        if tensor is None:
            continue
        require_dense(tensor, f"{name}: `{moment}`", path)
        if not tensor.is_floating_point():
            raise CheckpointError(
                path, f"{name}: `{moment}` is a tensor of {tensor.dtype}", "save floating moments"
            )
        if tensor.shape != shape:
            raise CheckpointError(
                path,
                f"{name}: `{moment}` has shape {tuple(tensor.shape)}, the parameter {tuple(shape)}",
                "use the optimizer saved with this model",
            )
        tensor = tensor.to(torch.promote_types(tensor.dtype, torch.float32))
        if not bool(torch.isfinite(tensor).all()):
            raise CheckpointError(
                path, f"{name}: `{moment}` is not finite", "use an earlier checkpoint"
            )
        if moment != "exp_avg" and bool((tensor < 0).any()):
            raise CheckpointError(
                path, f"{name}: `{moment}` is negative somewhere", "use an earlier checkpoint"
            )
        moments[moment] = tensor
    return moments


def _flag(
    group: dict[str, Any], keys: tuple[str, ...], path: Path, *, absent: bool = False
) -> bool:
    """What the group says under any of these keys. Raises where it says two things."""
    said: dict[str, bool] = {}
    for key in keys:
        value = group.get(key)
        if not isinstance(value, int | None):
            raise CheckpointError(
                path,
                f"`{key}` is {shown(value)}, expected true or false",
                "save optimizer.state_dict()",
            )
        if value is not None:
            said[key] = bool(value)
    if len(set(said.values())) > 1:
        both = ", ".join(f"`{key}: {value}`" for key, value in said.items())
        raise CheckpointError(path, f"its groups have {both}", "remove the wrong one")
    return next(iter(said.values()), absent)


def number(value: Any, what: str, path: Path) -> float:
    """A finite number from an int, a float, or a tensor with one element."""
    if isinstance(value, Tensor) and value.numel() == 1:
        value = value.item()
    if (
        isinstance(value, bool)
        or not isinstance(value, int | float)
        or not abs(value) <= sys.float_info.max
    ):
        raise CheckpointError(
            path, f"{what} is {shown(value)}, expected a number", "save optimizer.state_dict()"
        )
    return float(value)
