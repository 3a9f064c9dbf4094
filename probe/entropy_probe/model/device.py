"""The device that a name means, or one line that says why it cannot be used."""

from __future__ import annotations

import torch

from entropy_probe.errors import ConfigError, reason


def usable_device(device: str) -> torch.device:
    """The device, which was seen to hold a tensor. Raises `ConfigError`."""
    try:
        chosen = torch.device(device)
        if chosen.type == "meta":
            raise RuntimeError("it holds no data")
        chosen = torch.empty(0, device=chosen).device
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise ConfigError(
            f"device {device!r}",
            f"cannot be used ({reason(error)})",
            "choose another --probe-device",
        ) from error
    return chosen
