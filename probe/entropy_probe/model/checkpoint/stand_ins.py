"""What stands for the classes of libraries in a pickle: none of their code is run, and they need not be installed."""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import Any, NoReturn

import torch
from torch import Tensor


class _Nothing:
    """It takes anything, keeps nothing and does nothing."""

    def __new__(cls, *_: Any, **__: Any) -> _Nothing:
        return super().__new__(cls)

    def __setstate__(self, _: Any) -> None:
        pass


class _OptimState(Tensor):
    """A moment of torchao's: a shape without values, with what it is made of (`codes`, `scale`, `qmap`)."""

    @classmethod
    def __torch_dispatch__(cls, func: Any, *_: Any, **__: Any) -> NoReturn:
        raise NotImplementedError(f"{func} of a quantised moment")

    def __setstate__(self, state: Any) -> None:
        for part in ("codes", "scale", "qmap"):
            if isinstance(state, dict) and part in state:
                setattr(self, part, state[part])


DEEPSPEED = [
    (_Nothing, f"deepspeed.{name}")
    for name in (
        "runtime.fp16.loss_scaler.LossScaler",
        "runtime.fp16.loss_scaler.DynamicLossScaler",
        "runtime.zero.config.ZeroStageEnum",
        "utils.tensor_fragment.fragment_address",
    )
]
OF_OPTIMIZERS = [
    *(
        (_Nothing, name)
        for name in (
            "galore_torch.galore_projector.GaLoreProjector",
            "apollo_torch.svd_projector.GaLoreProjector",
            "apollo_torch.random_projector.GradientProjector",
        )
    ),
    *(
        (type(name, (_OptimState,), {}), f"torchao.{place}.subclass_{bits}.{name}")
        for place in ("optim", "prototype.low_bit_optim")
        for bits, name in (
            ("8bit", "OptimState8bit"),
            ("4bit", "OptimState4bit"),
            ("fp8", "OptimStateFp8"),
        )
    ),
]


def standing_in(classes: list[tuple[type, str]]) -> AbstractContextManager[Any]:
    """`torch.load(weights_only=True)` makes these instead."""
    listed: list[Any] = classes
    return torch.serialization.safe_globals(listed)
