"""First order: U_cross and δH₁ of one batch, X̄ᵀPȲ of two, and δH₁ as a sum over groups of tensors."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from entropy_probe import report as r
from entropy_probe.estimators import ustat
from entropy_probe.model.parts import part_of
from entropy_probe.stages.gradients.products import norm
from entropy_probe.stages.gradients.unit_gradients import UnitGradients

_Key = tuple[str, str]
_WHOLE: _Key = ("", "")


def first_order_section(
    units: UnitGradients, precond: Mapping[str, Tensor], lr: float, lr_source: str, estimator: str
) -> r.FirstOrderSection | None:
    """U_cross, its standard errors, and δH₁ = −lr·U_cross, of one batch on both sides; `None` of a single unit, which
    has no other to be multiplied with."""
    if len(units.sizes) < 2:
        return None

    def delta_h1(products: Tensor) -> r.Part:
        statistic = units.statistic(products)
        return r.Part(value=-lr * statistic.u_cross, se=lr * statistic.se_plugin)

    parts = units.gathered(_with_parts(units.products(precond)))
    whole = parts.pop(_WHOLE)
    moments, statistic = units.moments(whole), units.statistic(whole)
    num_prompts = float(units.sizes.sum())
    return r.FirstOrderSection(
        mode=units.units.mode,
        estimator=estimator,
        num_units=moments.num_units,
        interval=ustat.interval(statistic, moments.num_units),
        bars_dot=moments.bars_dot,
        bars_dot_plain=units.plain_product(),
        diag_sum=moments.diag_sum,
        row_means=moments.row_means.tolist(),
        norm_x_sum=num_prompts * norm(units.mean_x()),
        norm_y_sum=num_prompts * norm(units.mean_y()),
        lr=lr,
        lr_source=lr_source,
        delta_h1=-lr * statistic.u_cross,
        delta_h1_se=lr * statistic.se_plugin,
        delta_h1_by_unit=(-lr / moments.num_units * moments.row_means).tolist(),
        delta_h1_parts=_parts(parts, delta_h1),
        **statistic.model_dump(),
    )


def two_batch_section(
    e: UnitGradients, u: UnitGradients, precond: Mapping[str, Tensor], lr: float
) -> r.TwoBatchSection:
    """X̄_EᵀPȲ_U and δH₁ = −lr·X̄_EᵀPȲ_U, of two batches."""

    def delta_h1(products: Tensor) -> r.Part:
        moments = e.moments_with(u, products)
        return r.Part(value=-lr * moments.bars_dot, se=_times(lr, moments.total_se))

    parts = e.gathered_with(u, _with_parts(e.products_with(u, precond)))
    moments = e.moments_with(u, parts.pop(_WHOLE))
    return r.TwoBatchSection(
        bars_dot=moments.bars_dot,
        delta_h1=-lr * moments.bars_dot,
        delta_h1_se=_times(lr, moments.total_se),
        conditional_se=lr * moments.conditional_se,
        projections=moments.projections.tolist(),
        update_projections=moments.update_projections.tolist(),
        interaction=moments.interaction,
        delta_h1_parts=_parts(parts, delta_h1),
    )


def _times(lr: float, se: float | None) -> float | None:
    return None if se is None else lr * se


def _with_parts(products: Mapping[str, Tensor]) -> dict[_Key, Tensor]:
    """(table, label) → the sum of the products of a group of tensors; at `_WHOLE` that of all."""
    groups: dict[_Key, Tensor] = {_WHOLE: torch.stack(list(products.values())).sum(0)}
    for table in r.Parts.model_fields:
        for name, product in products.items():
            key = table, getattr(part_of(name), table)
            groups[key] = product + groups.get(key, 0.0)
    return groups


def _parts(groups: Mapping[_Key, Tensor], delta_h1: Callable[[Tensor], r.Part]) -> r.Parts:
    """δH₁ of each group of tensors."""
    tables: dict[str, dict[str, r.Part]] = {table: {} for table in r.Parts.model_fields}
    for (table, label), product in groups.items():
        tables[table][label] = delta_h1(product)
    return r.Parts(**tables)
