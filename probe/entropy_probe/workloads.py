"""The stages that take the time of a measurement, ready to be called again and again: the benchmark family's."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch

from entropy_probe.model.overrides import theta_plus_eta_v
from entropy_probe.model.precision import numerics
from entropy_probe.pipeline.prepared import Prepared
from entropy_probe.stages.gradients.payloads import payloads
from entropy_probe.stages.gradients.unit_gradients import unit_gradients
from entropy_probe.stages.gradients.units import units_of
from entropy_probe.stages.responses.rollouts import Rollouts
from entropy_probe.stages.scores import score
from entropy_probe.stages.share import Share

_ETA = 1e-6  # any step costs the same


@dataclass(frozen=True)
class Workload:
    """One call, which ends when its work is done, and how many generated tokens it goes through."""

    call: Callable[[], None]
    tokens: int


@contextmanager
def workload(prepared: Prepared, stage: str) -> Iterator[Workload]:
    """The stage on the batch that the measurement would use, under the configured precision and threads.

    scoring     log p and entropy of every generated token of the E batch
    gradients   X and Y of every prompt of the U batch
    sweep       θ + ηv for one η, and the E batch scored there
    """
    bound, config = prepared.model, prepared.config
    with numerics(config.precision, prepared.checkpoint.info.num_parameters):
        if stage == "gradients":
            batch = prepared.update_rollouts
            scores = score(bound, batch, config, with_features=True)
            of_x, of_y = payloads(batch, scores, config)
            alone = Share.of(batch, units_of(bound, batch, config))

            def once() -> object:
                return unit_gradients(bound, alone, config, of_x, of_y)

        else:
            batch = prepared.rollouts
            direction = {name: p.detach() for name, p in bound.registry.trainable.items()}

            def once() -> object:
                if stage == "scoring":
                    return score(bound, batch, config)
                return score(bound, batch, config, theta_plus_eta_v(bound.registry, direction, _ETA, bound.dtype))

        def call() -> None:
            once()
            if bound.device.type == "cuda":
                torch.cuda.synchronize(bound.device)

        yield Workload(call, _tokens(batch))


def _tokens(batch: Rollouts) -> int:
    return int(batch.gen_lens.sum())
