"""The report of one step that was probed while a run was training: what it was expected to do, and what it did.

It is smaller than `ProbeReport`, and a class of its own. The update is the trainer's own, not one that the probe makes
of a batch: there is no U batch, no U_cross and no second moment to be judged, and no file that could be read again.
Entropies and their changes are in nats. A field that is `None` was not measured.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

from pydantic import ValidationError

from entropy_probe.atomic import write_atomically
from entropy_probe.errors import ProbeError
from entropy_probe.report import (
    EntropyChangeRow,
    EntropySection,
    Estimate,
    RecipeSection,
    ResolutionSection,
    Verdict,
    _Section,
)

STEP_SCHEMA_VERSION = 1


class StepBatchSection(_Section):
    """The E batch: `num_responses` of each prompt, `num_tokens` scored tokens in all; where the `prompts` are from, and
    what was `found` odd about them."""

    num_prompts: int
    num_responses: int
    num_tokens: int
    prompts: str
    fingerprint: str
    found: list[str]


class StepUpdateSection(_Section):
    """The step that the optimizer was about to take, θ' − θ.

    `optimizer` is its class, `lr` the largest of its groups, `norm` is ‖θ' − θ‖, `grad_norm` that of the gradient after
    clipping. `momentum_share` is v₀ᵀv/‖v‖² of the part v₀ that momentum and decay alone would move. `in_float64`:
    whether the step was computed in float64, or in the dtypes of the optimizer's own state.
    """

    optimizer: str
    lr: float
    norm: float
    grad_norm: float
    momentum_share: float
    in_float64: bool


class StepPrediction(_Section):
    """The change by the step: to `first_order`, ∇Hᵀ(θ' − θ), and to second order, with half the curvature along the
    step; `None` where the budget leaves the curvature out."""

    first_order: Estimate
    second_order: Estimate | None

    @property
    def best(self) -> Estimate:
        """To second order, where that was measured."""
        return self.second_order or self.first_order


class SinceSection(_Section):
    """The change of the entropy per token since the probe before this one, as the difference of two measured entropies.

    Both come from other prompts and responses: the SE is that of two independent batches. `steps` were taken, and for
    the first of them alone `predicted` was the change; `None` where that probe predicted nothing.
    """

    after_step: int
    steps: int
    change: Estimate
    predicted: Estimate | None


class StepReport(_Section):
    """What was known before the step after `after_step` steps, and, as `came`, what it did.

    `entropy` is at θ. `predicted_per_token` and `predicted_per_response` are of this step. `realised` is the change at
    θ + (θ' − θ) in the dtype of the measurement, before the step was taken, and `came` that at the θ' that the trainer
    made, both on the same responses by importance weights, where η = 1 is the whole step. `came` is `None` until the
    step was taken. `gates` are the verdicts of the bounds that the user set. `seconds` is what the probe took.
    """

    schema_version: int = STEP_SCHEMA_VERSION
    kind: Literal["step"] = "step"
    probe_version: str
    after_step: int
    config: dict[str, Any]
    recipe: RecipeSection
    batch: StepBatchSection
    entropy: EntropySection
    update: StepUpdateSection
    predicted_per_token: StepPrediction
    predicted_per_response: StepPrediction
    realised: EntropyChangeRow
    resolution: ResolutionSection
    came: EntropyChangeRow | None
    since: SinceSection | None
    gates: list[Verdict]
    environment: dict[str, str | int]
    timing: dict[str, float]

    @property
    def seconds(self) -> float:
        return sum(self.timing.values())

    @property
    def figures(self) -> dict[str, float]:
        """What is logged: a name → a number."""
        predicted, realised = self.predicted_per_token.best, self.realised.realised_per_token
        found = {
            "entropy": self.entropy.per_token.value,
            "entropy_se": self.entropy.per_token.se,
            "entropy_per_response": self.entropy.rb.value,
            "delta_h_predicted": predicted.value,
            "delta_h_se": predicted.se,
            "delta_h_predicted_per_response": self.predicted_per_response.best.value,
            "delta_h_predicted_per_response_se": self.predicted_per_response.best.se,
            "delta_h_realised": realised[0],
            "delta_h_realised_se": realised[1],
            "ess": self.realised.unclipped_ess_fraction,
            "momentum_share": self.update.momentum_share,
            "resolves": self.resolution.per_token,
            "gates_failed": float(sum(verdict.status == "fail" for verdict in self.gates)),
            "seconds": self.seconds,
        }
        if self.came is not None:
            found["delta_h_came"], found["delta_h_came_se"] = self.came.realised_per_token
        if self.since is not None:
            found["delta_h_since"] = self.since.change.value
            found["delta_h_since_se"] = self.since.change.se
        return found

    def to_json(self, path: str | Path) -> None:
        """Write the report atomically: a kill at any moment leaves the old file or the new one."""
        write_atomically(Path(path), self.model_dump_json(indent=2) + "\n")

    @classmethod
    def from_json(cls, path: str | Path) -> StepReport:
        try:
            return cls.model_validate_json(Path(path).read_text(encoding="utf-8"))
        except (OSError, UnicodeDecodeError) as error:
            remedy = "give a report that the callback wrote"
            raise ProbeError(path, f"cannot be read ({error})", remedy) from error
        except ValidationError as error:
            first = error.errors()[0]
            key = ".".join(str(part) for part in first["loc"])
            problem = f"is not the report of a step: {key}: {first['msg']}"
            raise ProbeError(path, problem, "write it again with this version") from error
