"""What was measured: the checkpoint and its optimizer, as the report shows them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping

from entropy_probe import report as r
from entropy_probe.errors import printable
from entropy_probe.model.checkpoint import AdamState, Checkpoint, OtherOptimizer
from entropy_probe.model.checkpoint.moments.adam import hyper_parameters, kind_of


def checkpoint_section(checkpoint: Checkpoint, name: str | None) -> r.CheckpointSection:
    """Under `name`, or under that of the folder."""
    info, other = checkpoint.info, checkpoint.other
    return r.CheckpointSection(
        name=printable(name or info.path.name),
        path=printable(info.path),
        fingerprint=info.fingerprint,
        model_type=info.model_type,
        num_parameters=info.num_parameters,
        num_trainable=info.num_trainable,
        weights_dtype=info.weights_dtype,
        adapter=info.adapter,
        global_step=info.global_step,
        optimizer=_adam(checkpoint.adam, info.saved_states) if other is None else _other(other),
        warnings=list(info.warnings),
        device_map=info.device_map,
    )


def _adam(adam: Mapping[str, AdamState], saved: dict[str, int]) -> r.OptimizerSection:
    first = next(iter(adam.values()))
    with_state = [state for state in adam.values() if state.step > 0]
    return r.OptimizerSection(
        type=kind_of(adam.values()),
        lr=max(state.lr for state in adam.values()),
        betas=first.betas,
        eps=first.eps,
        weight_decay=first.weight_decay,
        step=int(max(state.step for state in adam.values())),
        covered=len(with_state),
        total=len(adam),
        saved=saved,
        read=dict(Counter(map(_hyper_parameters, with_state))),
    )


def _hyper_parameters(state: AdamState) -> str:
    return hyper_parameters(state.lr, *state.betas, state.eps, state.weight_decay)


def _other(optimizer: OtherOptimizer) -> r.OptimizerSection:
    return r.OptimizerSection(
        type=optimizer.kind,
        lr=optimizer.lr,
        betas=None,
        eps=None,
        weight_decay=None,
        step=None if optimizer.step is None else int(optimizer.step),
        covered=0,
        total=len(optimizer.trained),
        saved={},
        read={},
        no_second_moment=optimizer.reason,
    )
