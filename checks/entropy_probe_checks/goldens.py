"""Which numbers of a report golden files hold, and how far from them is still right.

A sum loses digits relative to the sum of its terms' absolute values, not to itself, so every field comes with a scale,
a size of the terms that its numbers were made of. One relative tolerance for each dtype is taken of it.

Left out, because rounding alone decides them: the zero check, scaling and Taylor ratios, witnesses, differences from
torch's own optimizer, invariances, `worst_parameter`, and `in_range`, `exchanged` and `num_undecided`, which compare
numbers that may be equal. They have criteria, as have sampler parity, the real step and integrity. Left out, because
they follow from what is there: intervals, `difference`, `ratio`, `eta_star`. Left out, because they are the machine's:
timing, paths, environment.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, TypeAlias

from entropy_probe import ProbeReport
from entropy_probe.golden import Field, Tolerance, Value
from entropy_probe.report import BatchSection, Estimate, FirstOrderSection, Part, Parts

EXACT = 0.0
Scaled: TypeAlias = dict[str, tuple[Value, float]]

# dtype → (tolerance, largest difference seen), both in parts of the scale. Seen on the demo over kernels (default,
# AVX2, AVX-512), one and two threads, and batches of 3 and 8. In float64 a factor 1.001 on one tensor, or on one second
# moment, moves what depends on it by 1e-9 to 3e-4 of the scale, and curvatures by 4e-6 to 6e-4.
SUMS = {"float64": (1e-10, 2e-13), "float32": (3e-4, 3e-6)}
CURVATURES = {"float64": (5e-7, 1e-9), "float32": (1e-3, 6e-6)}


@dataclass(frozen=True)
class GoldenSection:
    """`scaled(report)`: field → (value, scale), or the reason why there is nothing to compare. Call it for fields."""

    scaled: Callable[[ProbeReport], Scaled | str]

    @property
    def name(self) -> str:
        return self.scaled.__name__

    def __call__(self, report: ProbeReport) -> dict[str, Field] | str:
        found = self.scaled(report)
        if isinstance(found, str):
            return found
        dtype = report.config["precision"]["func_override"]["dtype"]
        return {
            name: Field(value, _tolerance(name, scale, dtype))
            for name, (value, scale) in found.items()
        }


def _tolerance(name: str, scale: float, dtype: str) -> Tolerance:
    """Curvatures are differences of slopes, and lose digits of their own."""
    if scale == EXACT:
        return Tolerance(0.0, 0.0, "read or counted")
    if not math.isfinite(scale):
        return Tolerance(0.0, 0.0, "what its scale is made of is not a number")
    rtol, seen = (CURVATURES if name.startswith("curvature") else SUMS)[dtype]
    source = f"{rtol:.0e} of {scale:.3g}; {seen:.0e} of it seen in {dtype} over kernels, threads and batch sizes"
    return Tolerance(0.0, float(f"{rtol * scale:.2g}"), source)


def _estimates(prefix: str, estimates: Mapping[str, Estimate | Part], scale: float) -> Scaled:
    """[value, standard error] of each."""
    return {f"{prefix}{key}": ([of.value, of.se], scale) for key, of in estimates.items()}


def _parts(parts: Parts, scale: float) -> Scaled:
    return {
        key: value
        for table in ("layer", "module", "factor")
        for key, value in _estimates(f"{table}.", getattr(parts, table), scale).items()
    }


def _largest(values: Iterable[float]) -> float:
    return max(map(abs, values), default=0.0)


@GoldenSection
def checkpoint(report: ProbeReport) -> Scaled:
    """What was read from the folder."""
    of, optimizer = report.checkpoint, report.checkpoint.optimizer
    names = ("model_type", "num_parameters", "num_trainable", "weights_dtype", "adapter")
    read = ("type", "lr", "eps", "weight_decay", "step", "covered", "total")
    return {
        **{name: (getattr(of, name), EXACT) for name in names},
        **{f"optimizer.{name}": (getattr(optimizer, name), EXACT) for name in read},
        "optimizer.betas": (None if optimizer.betas is None else list(optimizer.betas), EXACT),
    }


@GoldenSection
def batch(report: ProbeReport) -> Scaled:
    """What the two batches consist of."""
    return {**_of_batch("e", report.batch), **_of_batch("u", report.update_batch)}


def _of_batch(name: str, of: BatchSection) -> Scaled:
    counts = (
        "num_prompts",
        "num_responses",
        "num_tokens",
        "missing_gold",
        "early_eos",
        "unended",
        "same_batch",
    )
    return {
        **{f"{name}.{count}": (getattr(of, count), EXACT) for count in counts},
        f"{name}.mean_reward": (of.mean_reward, 1.0),
        f"{name}.zero_advantage_fraction": (of.zero_advantage_fraction, 1.0),
    }


@GoldenSection
def entropy(report: ProbeReport) -> Scaled:
    """Scale: the mean entropy of a response, of a token; `surprise` is a difference of two of the former."""
    of = report.entropy
    return {
        **_estimates(
            "",
            {key: getattr(of, key) for key in ("naive", "rb", "rb_q", "surprise")},
            _nats(report),
        ),
        **_estimates("", {"per_token": of.per_token}, abs(of.per_token.value)),
        "rb_by_prompt": (list(of.rb_by_prompt), _largest(of.rb_by_prompt)),
    }


def _nats(report: ProbeReport) -> float:
    """Entropy and surprisal of a response, on average: what changes and differences are subtracted from."""
    return max(abs(report.entropy.naive.value), abs(report.entropy.rb.value))


def _gram(of: FirstOrderSection) -> float:
    """The size of one entry X_iᵀPY_j: means over rows, columns and all of them are sums of such."""
    return max(_largest(of.row_means), abs(of.diag_sum) / of.num_units)


@GoldenSection
def first_order(report: ProbeReport) -> Scaled | str:
    """Scale: an entry of the matrix X_iᵀPY_j, its square for variances, times lr for δH₁."""
    of = report.first_order
    if of is None:
        return report.no_second_moment or "the update batch has one prompt; give more"
    size = _gram(of)
    linear = ("u_cross", "bars_dot", "row_means", "se_plugin", "se_jackknife")
    return {
        **{
            name: (getattr(of, name), EXACT)
            for name in ("mode", "estimator", "num_units", "lr_source")
        },
        **{name: (getattr(of, name), size) for name in linear},
        **{
            name: (getattr(of, name), size**2)
            for name in ("zeta1_plugin", "zeta1_jackknife", "var_unbiased")
        },
        **{
            name: (getattr(of, name), getattr(of, name))
            for name in ("norm_x_sum", "norm_y_sum", "lr")
        },
        "diag_sum": (of.diag_sum, size * of.num_units),
        "bars_dot_plain": (
            of.bars_dot_plain,
            of.norm_x_sum * of.norm_y_sum / report.update_batch.num_prompts**2,
        ),
        "delta_h1": (of.delta_h1, of.lr * size),
        "delta_h1_se": (of.delta_h1_se, of.lr * size),
        "delta_h1_by_unit": (of.delta_h1_by_unit, of.lr * size / of.num_units),
        **_parts(of.delta_h1_parts, of.lr * size),
    }


@GoldenSection
def two_batch(report: ProbeReport) -> Scaled | str:
    """Scale: the largest projection; its square for the variance; times lr for δH₁."""
    of, next_step = report.two_batch, report.update
    if next_step is None:
        return str(report.no_second_moment)
    if of is None:
        return "one batch serves as both; give --probe-update-rollouts too"
    size, lr = _largest([*of.projections, *of.update_projections]), next_step.lr
    return {
        "bars_dot": (of.bars_dot, size),
        "projections": (of.projections, size),
        "update_projections": (of.update_projections, size),
        "interaction": (of.interaction, max(size**2, of.interaction or 0.0)),
        **{
            name: (getattr(of, name), lr * size)
            for name in ("delta_h1", "delta_h1_se", "conditional_se")
        },
        **_parts(of.delta_h1_parts, lr * size),
    }


@GoldenSection
def update(report: ProbeReport) -> Scaled | str:
    """Scale of slopes: the terms of the slope of ΔH itself; of curvatures: of its second derivative."""
    of = report.update
    if of is None:
        return str(report.no_second_moment)
    size = max(of.slope_of_change_size, *(max(abs(e.value), e.se) for e in of.estimators.values()))
    bend = max(of.curvature_of_change_size, abs(of.curvature or 0.0), of.curvature_se or 0.0)
    per_token = max(abs(of.delta_h1_per_lr_per_token), of.delta_h1_per_lr_per_token_se)
    bend_per_token = max(abs(of.curvature_per_token), of.curvature_per_token_se)
    slopes = (
        "delta_h1_per_lr_cross",
        "delta_h1_per_lr_cross_se",
        "slope_of_v0",
        "slope_by_unit",
        "slope_of_change",
    )
    bends = ("curvature_of_change", "curvature_of_change_size", "curvature", "curvature_se")
    return {
        **{
            name: (getattr(of, name), getattr(of, name))
            for name in ("norm", "norm_v0", "grad_norm")
        },
        **{name: (getattr(of, name), size) for name in (*slopes, "slope_of_change_size")},
        **_estimates("slope.", of.estimators, size),
        "slope.per_token": (
            [of.delta_h1_per_lr_per_token, of.delta_h1_per_lr_per_token_se],
            per_token,
        ),
        **{name: (getattr(of, name), bend) for name in bends},
        "curvature.per_token": (
            [of.curvature_per_token, of.curvature_per_token_se],
            bend_per_token,
        ),
    }


@GoldenSection
def entropy_change(report: ProbeReport) -> Scaled:
    """One value a step η. Scale: the entropies that are subtracted; 1 for shares and k̂."""
    rows, nats = report.entropy_change, _nats(report)
    num_responses = report.batch.total_responses
    per_token = abs(report.entropy.per_token.value)

    def column(name: str) -> list[Any]:
        return [getattr(row, name) for row in rows]

    changes = (
        "delta_h",
        "delta_h_se",
        "delta_h_rb",
        "delta_h_rb_se",
        "delta_h_rb_by_prompt",
        "delta_h_pd",
        "delta_h_pd_se",
        "predicted",
    )
    logs = (
        "log_weight_min",
        "log_weight_median",
        "log_weight_max",
        "predicted_se",
        "difference_se",
    )
    shares = ("ess_fraction", "unclipped_ess_fraction", "clip_fraction", "pareto_k")
    tokens = ("delta_h_per_token", "delta_h_per_token_naive", "delta_h_per_token_pd")
    return {
        "eta": (column("eta"), _largest(column("eta"))),
        "ess": (column("ess"), float(num_responses)),
        **{name: (column(name), EXACT) for name in ("method", "reliable", "restricted")},
        **{name: (column(name), nats) for name in (*changes, *logs)},
        **{name: (column(name), 1.0) for name in shares},
        **{name + se: (column(name + se), per_token) for name in tokens for se in ("", "_se")},
    }


@GoldenSection
def registry(report: ProbeReport) -> Scaled:
    """Every trainable tensor and its preconditioner; coverage is a share of them."""
    of, precond = report.registry, report.preconditioner
    names = ("num_tensors", "num_parameters", "x_coverage", "y_coverage", "uncovered")
    counts: Scaled = {name: (getattr(of, name), EXACT) for name in names}
    if precond is None:
        return counts
    counted = ("num_tensors", "missing", "num_nonfinite", "num_pairs")
    ends = ("smallest", "largest")
    return {
        **counts,
        **{f"preconditioner.{name}": (getattr(precond, name), EXACT) for name in counted},
        **{
            f"preconditioner.{name}": (getattr(precond, name), getattr(precond, name) or EXACT)
            for name in ends
        },
    }


SECTIONS: dict[str, GoldenSection] = {
    section.name: section
    for section in (
        checkpoint,
        batch,
        entropy,
        first_order,
        two_batch,
        update,
        entropy_change,
        registry,
    )
}
