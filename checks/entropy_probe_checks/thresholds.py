"""Every limit of every criterion, with its source. `limits: {name: value}` in the configuration replaces a value.

Gates (`bounds.py`) have no default: `limits: {name: {min: value, ..}}` turns one on.
"""

from __future__ import annotations

import difflib
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

from entropy_probe import ProbeReport
from entropy_probe.errors import ConfigError
from entropy_probe_checks.bounds import GATES, bounds_of, require_sensible


@dataclass(frozen=True)
class Limit:
    """A threshold and where it comes from; `key` is where the configuration sets it, `None`: the report derives it."""

    value: float | None
    source: str
    key: str | None


def _limit(name: str, value: float, source: str) -> tuple[str, Limit]:
    return name, Limit(value, source, f"limits.{name}")


LIMITS: dict[str, Limit] = (
    dict(
        [
            _limit(
                "figures_recomputed",
                2e-11,
                "Sums in another order differ by rounding: 2e-13 was measured over 90 runs",
            ),
            _limit(
                "as_stored",
                0.0,
                "The sums are of the same numbers, and are compared to 1e-9 because the order of adding differs",
            ),
            _limit(
                "moments_possible",
                1.01,
                "Cauchy-Schwarz gives 1, and moments that were stored in bfloat16 are off by 0.6 %",
            ),
            _limit(
                "fresh_responses",
                5.0,
                "The value is in standard errors of a normal distribution: noise alone exceeds the limit once in 1e6",
            ),
            _limit("prompts_as_given", 0.0, "The tokens must be the same"),
            _limit("rewards_again", 0.0, "The numbers must be the same"),
            _limit(
                "batches_independent",
                0.0,
                "Prompts are drawn without replacement, or each batch is drawn independently",
            ),
            _limit(
                "plain_forward",
                1e-3,
                "The limit is in nats: 2e-6 was measured, for float32 against the precision of the run",
            ),
            _limit(
                "plain_step",
                0.1,
                "The criterion is asked only if float32 gives the change to a thirtieth",
            ),
            _limit(
                "zero_check",
                0.0,
                "The same numbers go through the same kernels in the same order, so the results agree bit for bit",
            ),
            _limit(
                "drawn_zero_check",
                0.0,
                "Whatever v is, the same numbers go through the same kernels, so the results agree bit for bit",
            ),
            _limit(
                "param_scaling",
                2.0,
                "The tiny-step test of the original design notes has this limit; 1 ± 3e-9 was measured in float64",
            ),
            _limit(
                "logit_scaling",
                3.0,
                "The tiny-step test of the original design notes has this limit; 1 ± 3e-4 was measured in float64",
            ),
            _limit(
                "logit_slope",
                0.02,
                "A slope of 1 ± 2e-5 was measured in true float64; a model with parts in float32 gives 0.6 to 0.8",
            ),
            _limit(
                "delta_h_slope",
                0.02,
                "A slope of 1 ± 1e-3 was measured over 364 runs of six architectures",
            ),
            _limit(
                "taylor_order",
                0.1,
                "A slope of 2 ± 0.02 was measured; a derivative with another baseline gives 1",
            ),
            _limit(
                "change_identity",
                1e-6,
                "4e-11 was measured in true float64; a derivative that is off by 1e-3 gives 1e-5",
            ),
            _limit(
                "real_update_cosine",
                1e-8,
                "1e-9 was measured over 54 settings of TRL; another normaliser gives 1e-3, and missing clipping 1e-2",
            ),
            _limit(
                "real_update_norm",
                1e-5,
                "1e-6 was measured over 54 settings of TRL; four times the rounding is allowed if that is more",
            ),
            _limit(
                "step_resolved",
                1.0,
                "The limit is the optimizer's own step; 1e-4 to 1e-2 was measured in float32",
            ),
            _limit(
                "x_coverage", 1.0, "A tensor without a gradient is missing from every dot product"
            ),
            _limit(
                "y_coverage", 1.0, "A tensor without a gradient is missing from every dot product"
            ),
            _limit(
                "preconditioner_complete",
                0.0,
                "A tensor without Adam state would get P = 1 without notice",
            ),
            _limit(
                "optimizer_as_saved",
                0.0,
                "The file's contents are counted before anything is mapped",
            ),
            _limit(
                "preconditioner_finite",
                0.0,
                "One entry that is not finite makes every dot product NaN",
            ),
            _limit(
                "preconditioner_witness",
                1e-12,
                "1e-15 was measured in float64; a missing bias correction gives 0.9",
            ),
            _limit(
                "moments_match",
                5.0,
                "Healthy runs gave at most 0.3 on text as in training, 3.5 on sampled and 6.2 on random text; "
                "exchanged LoRA factors gave 5 to 16",
            ),
            _limit("buffers_overridden", 0.0, "The default path replaces parameters only"),
            _limit(
                "live_model_unmodified",
                0.0,
                "The checksum covers parameters, buffers, gradients and training mode, and must not change",
            ),
            _limit(
                "gradient_witness",
                1e-3,
                "Two orders of summation in float32 differ by 1e-6 to 1e-5, a lost or doubled term by 1e-2 and more",
            ),
            _limit(
                "projections_agree",
                1e-5,
                "2e-7 was measured in float32; an X_k that is off by 1e-3 gives 1e-5 to 1e-4, a lost or mixed one 1e-2",
            ),
            _limit(
                "curvature_witness",
                1e-6,
                "At most 3e-10 was measured in true float64, which is rounding; a factor 1.001 gives 1e-3",
            ),
            _limit(
                "u_cross_identity",
                1e-9,
                "Sums of 1e4 terms in float64 lose at most 1e-12 of their absolute sum",
            ),
            _limit(
                "delta_h1_identity",
                1e-9,
                "Both are sums of the same numbers in float64, in another order",
            ),
            _limit(
                "two_batch_identity",
                1e-9,
                "Both are sums of the same numbers in float64, in another order",
            ),
            _limit(
                "se_formula",
                1e-9,
                "The same formula is applied to the report's own row means, so only float64 rounding differs",
            ),
            _limit(
                "se_identity",
                1e-9,
                "se_jackknife/se_plugin is exactly (U−1)/(U−2), so only float64 rounding remains",
            ),
            _limit(
                "se_by_prompt",
                1e-6,
                "Two formulas give the same number, and their rounding is the rounding of ΔH relative to its terms",
            ),
            _limit(
                "se_agreement",
                3.0,
                "The original design notes ask that jackknife and plug-in agree within a factor of 2 to 3 on few units",
            ),
            _limit(
                "sampler_parity",
                1e-3,
                "On the demo, the same model in bf16 gives 3e-5; if 1 was asked for, "
                "temperature 0.9 gives 2e-3 and 0.7 gives 1e-1",
            ),
            _limit(
                "on_policy",
                5.0,
                "The value is in standard errors of a normal distribution: noise in one of them exceeds it once in 2e6",
            ),
            _limit(
                "ends_at_eos",
                0.0,
                "A response ends with its first EOS token, or at the length limit",
            ),
            _limit(
                "batches_as_given", 0.0, "Each batch must come from the source that was asked for"
            ),
            _limit(
                "seeded",
                0.9,
                "One response may differ, or a tenth of them: rounding can change a token",
            ),
            _limit(
                "gold_complete",
                0.0,
                "A prompt without a gold answer would take no part in the update, without notice",
            ),
            _limit("optimizer_step_cosine", 1e-12, "Both are in float64; 2e-16 was measured"),
            _limit(
                "optimizer_step_norm", 1e-10, "Both are in float64, and θ' − θ loses |θ|/|v| ulps"
            ),
            _limit("virtual_step", 0.0, "The same numbers go through the same operations"),
            _limit(
                "real_step",
                1e-12,
                "5e-15 was measured at 32 layers in float64; a moment that is off by 1e-3 gives 1e-9",
            ),
            _limit(
                "sweep_identity",
                2e-2,
                "At most 2e-3 was measured at small steps in float32; −v in place of v gives 0.9",
            ),
            _limit(
                "curvature_identity",
                2e-2,
                "At most 2e-3 was measured in float32; a curvature without the term 2·D_vR·D_vS gives 7e-2",
            ),
            _limit(
                "prediction",
                4.0,
                "The value is in standard errors of a normal distribution: noise alone exceeds the limit once in 1e4",
            ),
            _limit(
                "change_estimators_agree",
                4.0,
                "The value is in standard errors of a normal distribution: noise alone exceeds the limit once in 1e4",
            ),
            _limit("slope_identity", 1e-4, "1e-6 was measured in float32"),
            _limit("zero_step_change", 0.0, "At η = 0 both entropies are the same expression"),
            _limit("zero_step_ess", 0.0, "At η = 0 every weight is 1"),
        ]
    )
    | {
        "ess": Limit(
            0.5,
            "The original design notes give 0.3 to 0.5, and this is the stricter end",
            "true_delta_h.min_ess_fraction",
        ),
        "pareto_k": Limit(
            0.7,
            "Above 0.7 the estimate is unreliable (Vehtari et al. 2024)",
            "true_delta_h.max_pareto_k",
        ),
    }
    | {
        name: Limit(
            None,
            "The report gives the bound on rounding: 4·√(depth·length)·eps·max(|log p|, |largest logit|)",
            None,
        )
        for name in (
            "padding_invariance",
            "batch_invariance",
            "chunk_invariance",
            "precision_invariance",
        )
    }
    | {
        "cache_agrees": Limit(
            None,
            "The report gives the bound on rounding: 40·√(depth·length)·eps·max |logit|, "
            "and at most 4 to 8 was measured in place of 40",
            None,
        )
    }
    | {
        "drawn_scaling": Limit(
            None,
            "The report gives the bound: 0.1 for second order, of which 2e-4 was seen on six architectures, "
            "and rounding",
            None,
        )
    }
)


def limit_for(report: ProbeReport, name: str) -> float:
    """The limit in force: the configuration's, else the default."""
    chosen = report.config["limits"].get(name, LIMITS[name].value)
    assert isinstance(chosen, int | float)
    return float(chosen)


def in_force(config: Mapping[str, Any]) -> dict[str, tuple[float | str | None, str]]:
    """Every criterion's limit under a resolved configuration, and its source: the key that set it, or its reason.

    Of gates, those that are on.
    """
    shown: dict[str, tuple[float | str | None, str]] = {}
    for name, limit in LIMITS.items():
        value: Any = config
        for part in (limit.key or "").split("."):
            value = value.get(part) if isinstance(value, Mapping) else None
        if isinstance(value, int | float) and value != limit.value:
            shown[name] = (float(value), f"{limit.key} of the configuration")
        else:
            shown[name] = (limit.value, limit.source)
    for name, bounds in bounds_of(config["limits"]).items():
        text = ", ".join(f"{key} {value:g}" for key, value in bounds.items())
        shown[name] = (text, f"limits.{name} of the configuration")
    return shown


def require_known(
    limits: Mapping[str, Any],
    allow_inconclusive: Collection[str] = (),
    *,
    has_baseline: bool = False,
) -> None:
    """Raise on the first name in `limits` or `allow_inconclusive` that no criterion has, or value that does not fit."""
    settable = [*(name for name, limit in LIMITS.items() if limit.key == f"limits.{name}"), *GATES]
    for name in limits:
        if name in LIMITS and name not in settable:
            key = LIMITS[name].key
            problem = f"the limit of `{name}` is not set under `limits`"
            remedy = f"set {key}" if key else "leave it out: the report derives this limit"
            raise ConfigError("configuration", problem, remedy)
        _require_criterion(name, settable, "limits")
    for name in allow_inconclusive:
        _require_criterion(name, [*LIMITS, *GATES], "allow_inconclusive")
    for name, value in limits.items():
        if isinstance(value, Mapping) != (name in GATES):
            remedy = f"write `{name}: {{min: ..}}`" if name in GATES else "give a number"
            raise ConfigError("configuration", f"`limits.{name}` is {value}", remedy)
        if isinstance(value, Mapping):
            require_sensible(name, value, has_baseline=has_baseline)


def _require_criterion(name: str, valid: Collection[str], key: str) -> None:
    if name not in valid:
        near = difflib.get_close_matches(name, valid, n=1)
        remedy = f"did you mean `{near[0]}`?" if near else f"choose from {', '.join(valid)}"
        raise ConfigError("configuration", f"unknown criterion `{name}` under `{key}`", remedy)
