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
                1e-10,
                "rounding of sums in another order; 1e-14 measured over 20 kinds of runs",
            ),
            _limit(
                "as_stored", 0.0, "sums of the same numbers, to 1e-9 for another order of adding"
            ),
            _limit(
                "moments_possible",
                1.01,
                "Cauchy-Schwarz gives 1; moments that were stored in bfloat16 are off by 0.6 %",
            ),
            _limit("fresh_responses", 5.0, "standard errors of a normal; noise alone: once in 1e6"),
            _limit("prompts_as_given", 0.0, "the same tokens"),
            _limit("rewards_again", 0.0, "the same numbers"),
            _limit("batches_independent", 0.0, "drawn without replacement, or each on its own"),
            _limit("plain_forward", 1e-3, "nats; 2e-6 measured: float32 against the run's own"),
            _limit("plain_step", 0.1, "float32 knows the change to a thirtieth where it is asked"),
            _limit(
                "zero_check",
                0.0,
                "same numbers through the same kernels in the same order: bit for bit",
            ),
            _limit(
                "drawn_zero_check",
                0.0,
                "the same numbers through the same kernels, whatever v: bit for bit",
            ),
            _limit(
                "param_scaling",
                2.0,
                "tiny-step test of the precision notes; 1 ± 3e-9 measured in true float64",
            ),
            _limit(
                "logit_scaling",
                3.0,
                "tiny-step test of the precision notes; 1 ± 3e-4 measured in true float64",
            ),
            _limit(
                "logit_slope",
                0.02,
                "1 ± 2e-5 measured in true float64; float32 islands give 0.6 to 0.8",
            ),
            _limit("delta_h_slope", 0.02, "1 ± 1e-3 measured over 364 runs of six architectures"),
            _limit(
                "taylor_order", 0.1, "2 ± 0.02 measured; a derivative with another baseline gives 1"
            ),
            _limit(
                "change_identity",
                1e-6,
                "4e-11 measured in true float64; a derivative off by 1e-3 shows as 1e-5",
            ),
            _limit(
                "real_update_cosine",
                1e-8,
                "1e-9 measured over 54 settings of TRL; another normaliser gives 1e-3, no clipping 1e-2",
            ),
            _limit(
                "real_update_norm",
                1e-5,
                "1e-6 measured over 54 settings of TRL; beyond it, four times what rounding explains",
            ),
            _limit("step_resolved", 1.0, "the step itself; 1e-4 to 1e-2 measured in float32"),
            _limit(
                "x_coverage", 1.0, "a tensor without a gradient is missing from every dot product"
            ),
            _limit(
                "y_coverage", 1.0, "a tensor without a gradient is missing from every dot product"
            ),
            _limit(
                "preconditioner_complete",
                0.0,
                "a tensor without Adam state would silently get P = 1",
            ),
            _limit(
                "optimizer_as_saved", 0.0, "what the file holds, counted before anything is mapped"
            ),
            _limit(
                "preconditioner_finite", 0.0, "one non-finite entry makes every dot product NaN"
            ),
            _limit(
                "preconditioner_witness",
                1e-12,
                "float64: 1e-15 measured; without bias correction 0.9",
            ),
            _limit(
                "moments_match",
                5.0,
                "healthy: at most 0.3 on text as in training, 3.5 sampled, 6.2 random; exchanged LoRA factors 5 to 16",
            ),
            _limit("buffers_overridden", 0.0, "the default path maps parameters only"),
            _limit(
                "live_model_unmodified",
                0.0,
                "checksum over parameters, buffers, gradients and training mode",
            ),
            _limit(
                "gradient_witness",
                1e-3,
                "two orders of summation in float32 differ by 1e-6 to 1e-5, a lost or doubled term by 1e-2 and more",
            ),
            _limit(
                "projections_agree",
                1e-5,
                "float32: 2e-7 measured; an X_k that is off by 1e-3 shows as 1e-5 to 1e-4, a lost or mixed one as 1e-2",
            ),
            _limit(
                "curvature_witness",
                1e-6,
                "true float64: at most 3e-10 measured, rounding of the difference; a factor 1.001 shows as 1e-3",
            ),
            _limit(
                "u_cross_identity",
                1e-9,
                "float64 sums of 1e4 terms lose at most 1e-12 of their absolute sum",
            ),
            _limit("delta_h1_identity", 1e-9, "float64 sums of the same numbers in another order"),
            _limit("two_batch_identity", 1e-9, "float64 sums of the same numbers in another order"),
            _limit(
                "se_formula",
                1e-9,
                "the same formula on the report's own row means; float64 rounding only",
            ),
            _limit(
                "se_identity",
                1e-9,
                "se_jackknife/se_plugin = (U−1)/(U−2) exactly; float64 rounding only",
            ),
            _limit(
                "se_by_prompt",
                1e-6,
                "the same number by two formulas; their rounding is that of ΔH over its terms",
            ),
            _limit(
                "se_agreement",
                3.0,
                "notes: jackknife and plug-in within a factor of 2 to 3 on few units",
            ),
            _limit(
                "sampler_parity",
                1e-3,
                "measured on the demo: the same model in bf16 3e-5, temperature 0.9 for 1 2e-3, 0.7 for 1 1e-1",
            ),
            _limit(
                "on_policy",
                5.0,
                "standard errors of a normal: a statistic of noise passes it once in 2e6",
            ),
            _limit("ends_at_eos", 0.0, "a response ends with its first EOS, or at the limit"),
            _limit("batches_as_given", 0.0, "each batch from where it was asked for"),
            _limit("seeded", 0.9, "all but one of 16, whose token a rounding may turn"),
            _limit(
                "gold_complete", 0.0, "a prompt without gold takes no part in the update, unnoticed"
            ),
            _limit("optimizer_step_cosine", 1e-12, "float64 against float64: 2e-16 measured"),
            _limit(
                "optimizer_step_norm", 1e-10, "float64 against float64; θ' − θ loses |θ|/|v| ulps"
            ),
            _limit("virtual_step", 0.0, "the same numbers in the same operations"),
            _limit(
                "real_step",
                1e-12,
                "5e-15 measured at 32 layers in float64; a moment off by 1e-3 shows as 1e-9",
            ),
            _limit(
                "sweep_identity",
                2e-2,
                "float32, small steps: at most 2e-3 measured; −v for v gives 0.9",
            ),
            _limit(
                "curvature_identity",
                2e-2,
                "float32: at most 2e-3 measured; without 2·D_vR·D_vS 7e-2",
            ),
            _limit(
                "prediction", 4.0, "standard errors of a normal; noise alone passes it once in 1e4"
            ),
            _limit(
                "change_estimators_agree",
                4.0,
                "standard errors of a normal; noise alone passes it once in 1e4",
            ),
            _limit("slope_identity", 1e-4, "float32: 1e-6 measured"),
            _limit("zero_step_change", 0.0, "at η = 0 both entropies are the same expression"),
            _limit("zero_step_ess", 0.0, "at η = 0 every weight is 1"),
        ]
    )
    | {
        "ess": Limit(
            0.5, "the stricter end of the notes' 0.3 to 0.5", "true_delta_h.min_ess_fraction"
        ),
        "pareto_k": Limit(
            0.7,
            "Vehtari et al. 2024: above 0.7 the estimate is unreliable",
            "true_delta_h.max_pareto_k",
        ),
    }
    | {
        name: Limit(
            None,
            "rounding: 4·√(depth·length)·eps·max(|log p|, |largest logit|), in the report",
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
            "rounding: 40·√(depth·length)·eps·max |logit|, in the report; 4 to 8 measured at most",
            None,
        )
    }
    | {
        "drawn_scaling": Limit(
            None,
            "0.1 for second order, of which 2e-4 was seen on six architectures, and rounding, in the report",
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
