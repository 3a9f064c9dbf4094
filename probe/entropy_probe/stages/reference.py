"""The reference model of a KL term: log p of the same tokens under another policy."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from entropy_probe.config import ProbeConfig
from entropy_probe.errors import MeasurementError
from entropy_probe.model.checkpoint.stored import Saved
from entropy_probe.model.checkpoint.weights.pretrained import load_full_model
from entropy_probe.model.forward import BoundModel, bind
from entropy_probe.model.placement import IN_MEMORY, place
from entropy_probe.processes.world import ALONE, World
from entropy_probe.stages.responses.rollouts import Rollouts
from entropy_probe.stages.scores import score

if TYPE_CHECKING:
    from jaxtyping import Float


def has_reference(model: nn.Module, config: ProbeConfig) -> bool:
    """Whether one is at hand: the folder that was given, or the base of an adapter."""
    return config.reference_model is not None or _without_adapter(model) is not None


@torch.no_grad()
def reference_logp(
    model: nn.Module,
    bound: BoundModel,
    rollouts: Rollouts,
    config: ProbeConfig,
    world: World = ALONE,
) -> Float[torch.Tensor, "B G T"]:
    """log p of every token under the reference, in the precision of the measurement: the model in `reference_model`,
    which processes of one copy hold once, else the model with its adapter off."""
    if config.reference_model is not None:
        folder = Path(config.reference_model).expanduser()

        def reference() -> nn.Module:
            loaded = load_full_model(folder, Saved(folder, "model"))
            return bind(loaded, bound.dtype).module if world.one_copy else loaded

        loaded = world.one(reference)
        if world.one_copy and bound.device.type != "cpu":
            place(loaded, IN_MEMORY, bound.device)
        else:
            loaded = loaded.to(bound.device)
        other = bind(loaded, bound.dtype)
        if other.vocabulary != bound.vocabulary:
            problem = f"has {other.vocabulary} tokens, but the checkpoint has {bound.vocabulary}"
            raise MeasurementError(folder, problem, "give the model that training began with")
        return score(other, rollouts, config).token_logp
    off = _without_adapter(model)
    if off is None:
        problem = "has a KL term, and no reference model is known"
        raise MeasurementError("recipe", problem, "give --probe-reference-model")
    trained = [(p, p.requires_grad) for m in (model, bound.module) for p in m.parameters()]
    try:
        with off, _layers_off(bound.module):
            return score(bound, rollouts, config).token_logp
    finally:  # peft makes every adapter trainable again
        for parameter, was_trained in trained:
            parameter.requires_grad_(was_trained)


@contextmanager
def _layers_off(module: nn.Module) -> Iterator[None]:
    """What `disable_adapter` does, in a copy that is bound in another dtype: that knows nothing of the live model's."""
    from peft.tuners.tuners_utils import BaseTunerLayer
    from peft.utils.other import AuxiliaryTrainingWrapper

    kinds = (BaseTunerLayer, AuxiliaryTrainingWrapper)
    layers: list[Any] = [part for part in module.modules() if isinstance(part, kinds)]
    on = [part for part in layers if not part.disable_adapters]
    for part in on:
        part.enable_adapters(enabled=False)
    try:
        yield
    finally:
        for part in on:
            part.enable_adapters(enabled=True)


def _without_adapter(model: nn.Module) -> AbstractContextManager[Any] | None:
    off: Any = getattr(model, "disable_adapter", None)
    return None if off is None else off()
