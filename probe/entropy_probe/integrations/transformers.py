"""The entropy probe inside of a training loop: `Trainer`, and TRL's `GRPOTrainer` and `RLOOTrainer`.

    from entropy_probe.integrations.transformers import EntropyProbeCallback

    trainer = GRPOTrainer(…)
    trainer.add_callback(EntropyProbeCallback(trainer, every=50, gates={"entropy": {"min": 0.05}}))
    trainer.train()

Nothing else of this library imports this module.
"""

from __future__ import annotations

import logging
import math
import time
import weakref
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
from transformers import TrainerCallback
from transformers.trainer_callback import ExportableState

from entropy_probe.atomic import require_folder
from entropy_probe.config import ProbeConfig
from entropy_probe.errors import ConfigError, ProbeError, reason, shown
from entropy_probe.integrations.as_found import as_found
from entropy_probe.integrations.of_trainer import (
    Prompts,
    config_of,
    gradient_scale,
    prompts_of,
    require_whole,
    tokenizer_of,
)
from entropy_probe.live import (
    RECIPE,
    ProbedStep,
    give_back,
    in_float64,
    measured,
    ready_in_all,
    whole,
)
from entropy_probe.model.live_step import unwrapped
from entropy_probe.model.sharded import is_sharded
from entropy_probe.processes.of_training import agreed, is_first, of_first, part
from entropy_probe.report import Estimate, Verdict
from entropy_probe.step_report import SinceSection, StepReport

__all__ = ["EntropyProbeCallback"]

_LOG = logging.getLogger("entropy_probe")
"""Its warnings go here, and not through `warnings`, whose filters can make an error of one and stop the training."""


@dataclass(frozen=True)
class _Setup:
    """What the first process measures with."""

    config: ProbeConfig
    prompts: Prompts
    where: str
    tokenizer: Any
    gates: dict[str, dict[str, float]]
    folder: Path


@dataclass(frozen=True)
class _Told:
    """What the first process tells the others at the end of a step that was probed, so that all do the same. Before the
    first step it tells them with what `config` they measure."""

    trouble: str | None
    figures: dict[str, float]
    failed: list[str]
    kept: dict[str, Any]
    config: ProbeConfig | None = None


class EntropyProbeCallback(TrainerCallback, ExportableState):
    """What the step that the trainer is about to take does to the policy's entropy, every so many steps.

        trainer.add_callback(EntropyProbeCallback(trainer, every=50, gates={"entropy": {"fall": 0.5}}, action="stop"))

    After clipping and before the optimizer's step, v = θ' − θ is computed from `.grad` by the optimizer's own class.
    The entropy, its change to first order along v, and the change at θ + v are measured on responses of the callback's
    own (`entropy_probe.live.measure_step`). After the step the change that came is measured on the same responses. The
    figures are logged as `probe/…`, in nats per token unless their name says otherwise; a report of each probed step is
    written to `folder` (`entropy-probe` in the run's own) as `step-N.json`, N being the steps that were taken before.

    `prompts` are a file, or a list of texts, messages or rows; by default those of the training set. `budget` and
    `config` are those of a configuration; temperature, length and chat template are the trainer's, unless `config`
    says otherwise. `gates` are bounds on `entropy`, `predicted_change` and `realised_ratio` as under `limits` of a
    configuration, where `fall` and `rise` speak of the first probe of the run; and on `ess`, the share ESS/N of the
    responses that still represent the policy after the step. If one is missed a warning is
    logged, and with `action="stop"` the training ends after this step.

    `max_share`: the interval grows where the probe would take more of the time than this. The training itself goes on
    as it would have without: the generators of random numbers, modes, gradients, hooks and caches are as they were.
    With several processes all measure together, each some of the prompts. Under FSDP2 each takes the step of its own
    shards, and the processes of the machine hold the model that is measured once; on several machines the first one
    measures while the others wait. It tells all of them what to do.

    Whatever goes wrong, a misspelt gate as well as a full disk, is said in one warning, and the callback is off from
    then on. It never stops a training of its own accord.
    """

    _newest: ClassVar[weakref.ref[EntropyProbeCallback] | None] = None

    def __init__(
        self,
        trainer: Any = None,
        *,
        every: int = 50,
        prompts: Prompts = None,
        budget: Literal["smoke", "standard", "full"] = "smoke",
        gates: Mapping[str, Mapping[str, float]] | None = None,
        action: Literal["warn", "stop"] = "warn",
        max_share: float = 0.05,
        folder: str | Path | None = None,
        config: Mapping[str, Any] | None = None,
    ) -> None:
        if trainer is None:
            self._take_over()
            return
        self._trainer, self._every, self._prompts, self._budget = trainer, every, prompts, budget
        self._gates, self._action, self._max_share = gates or {}, action, max_share
        self._folder, self._config = folder, config
        self.kept: dict[str, Any] = {"recipe": f"{RECIPE.name} ({RECIPE.source})"}
        self._setup: _Setup | None = None
        self._of_first: ProbeConfig | None = None
        self._off = self._due = self._has_written = False
        self._trouble: str | None = None
        self._probed: ProbedStep | None = None
        self._spent, self._training_since, self._steps = 0.0, 0.0, 0
        type(self)._newest = weakref.ref(self)

    def _take_over(self) -> None:
        """`restore_callback_states_from_checkpoint` makes each callback again, from what a file can hold: the new one
        takes the place of the one that was made with the trainer."""
        made = None if self._newest is None else self._newest()
        if made is None:
            raise TypeError("EntropyProbeCallback needs the trainer: EntropyProbeCallback(trainer)")
        vars(self).update(vars(made))

    def state(self) -> dict[str, Any]:
        """For trainer_state.json: the recipe, the last figures, when the next probe is due."""
        return {"args": {}, "attributes": {"kept": self.kept}}

    # Events, in the order in which a step has them

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        name, told = type(self).__name__, None
        stored = state.stateful_callbacks.get(name)
        if state.global_step > 0 and isinstance(stored, dict):
            self.kept |= stored.get("attributes", {}).get("kept", {})
        state.stateful_callbacks.setdefault(name, self.state())  # a trainer saves what is in there
        self._off, self._due, self._trouble = False, False, None
        if is_first():
            try:
                with as_found():
                    self._setup = self._checked(Path(args.output_dir))
            except Exception as error:
                self._trouble = _said(error)
            due = max(self.kept.get("next", 0), state.global_step)
            config = None if self._setup is None else self._setup.config
            told = _Told(self._trouble, {}, [], self.kept | {"next": due}, config)
        told = of_first(told)
        assert told is not None
        self._of_first = told.config
        self._obey(told, control)
        self._training_since, self._steps = time.perf_counter(), 0

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._steps += 1
        self._due = not self._off and state.global_step >= self.kept["next"]
        if not self._due:
            return
        start = time.perf_counter()
        try:
            with as_found():
                self._probed = self._measured(state.global_step)
        except Exception as error:
            self._trouble = _said(error)
        self._give_back()
        self._spent = time.perf_counter() - start

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if not self._due:
            return
        came = self._came()
        told = of_first(self._judged(came, state.global_step) if is_first() else None)
        assert told is not None
        if not isinstance(came, StepReport):  # else `ProbedStep.after` has done so
            came = None
            self._give_back()
        self._due, self._probed = False, None
        self._obey(told, control)
        if told.figures:
            try:
                self._log(args, state, control, told.figures)
            except Exception as error:  # of a tracker: the others are told when the next is due
                self._warn_of(_said(error))
        self._training_since, self._steps = time.perf_counter(), 0

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        part()

    # What the first process does

    def _checked(self, output: Path) -> _Setup:
        """All that can be wrong before there is a step; raises `ProbeError`."""
        from entropy_probe_checks.step_gates import checked_bounds

        for name, value, least in (("every", self._every, 1), ("max_share", self._max_share, 0)):
            is_number = isinstance(value, int | float) and not isinstance(value, bool)
            if not is_number or not value >= least or value == 0:
                raise ConfigError(name, f"is {shown(value)}", f"give a number of {least} or more")
        if self._action not in ("warn", "stop"):
            raise ConfigError("action", f"is {shown(self._action)}", "give `warn` or `stop`")
        require_whole(self._trainer)
        prompts, where = prompts_of(self._trainer, self._prompts)
        folder = output / "entropy-probe" if self._folder is None else Path(self._folder)
        require_folder(folder)
        return _Setup(
            config_of(self._trainer, self._budget, self._config),
            prompts,
            where,
            tokenizer_of(self._trainer),
            checked_bounds(self._gates),
            folder,
        )

    # What all processes do together

    def _measured(self, step: int) -> ProbedStep | None:
        trainer, setup = self._trainer, self._setup
        if not of_first(self._trouble is None):
            return None
        config = self._of_first
        assert config is not None

        def given() -> tuple[Any, float, Any]:
            optimizer = unwrapped(trainer.optimizer)
            tokenizer = tokenizer_of(trainer) if setup is None else setup.tokenizer
            return optimizer, gradient_scale(trainer, optimizer), tokenizer

        optimizer, scale, tokenizer = agreed(given)
        found = ready_in_all(trainer.model, optimizer, scale, wide=in_float64(config))
        if found is None or not found.step.finite:
            return None
        prompts, where = (None, "") if setup is None else (setup.prompts, setup.where)
        return measured(found, tokenizer, prompts, config, after_step=step, where=where)

    def _came(self) -> StepReport | torch.nn.Module | None:
        """The report with the change that came, where all processes measure it; where the first does so alone, the
        model after the step, whole; `None` where nothing is asked."""
        start, probed = time.perf_counter(), self._probed
        try:
            model = self._trainer.model
            asked, of_all = of_first(
                (self._trouble is None and probed is not None, probed and probed.is_of_all)
            )
            if not asked:
                return None
            with as_found():
                if of_all:
                    assert probed is not None
                    return probed.after(model)
                return whole(model) if is_sharded(model) else model
        except Exception as error:
            self._trouble = _said(error)
            return None
        finally:
            self._spent += time.perf_counter() - start

    def _give_back(self) -> None:
        if self._of_first is not None:
            give_back(self._of_first)

    # What the first process does

    def _judged(self, came: StepReport | torch.nn.Module | None, steps: int) -> _Told:
        """The change that came, the verdicts, the report on disk, and when to probe again."""
        nothing = {"next": steps}  # the scaler left the step out: the next one is probed
        if self._trouble is not None or self._probed is None or came is None:
            return _Told(self._trouble, {}, [], self.kept | nothing)
        start = time.perf_counter()
        training = start - self._training_since - self._spent
        try:
            with as_found():
                report = came if isinstance(came, StepReport) else self._probed.after(came)
                report = self._judged_report(report, steps - 1)
            setup = self._setup
            assert setup is not None
            if self._has_written and not setup.folder.exists():
                _LOG.warning("%s was deleted; reports go on in a new one", setup.folder)
            report.to_json(setup.folder / f"step-{steps - 1}.json")
            self._has_written = True
        except Exception as error:
            return _Told(_said(error), {}, [], self.kept)
        spent = self._spent + time.perf_counter() - start
        interval = self._interval(spent, training / max(self._steps, 1))
        figures = {name: value for name, value in report.figures.items() if math.isfinite(value)}
        figures |= {"seconds": spent, "interval": float(interval)}
        failed = [_line(verdict) for verdict in report.gates if verdict.status == "fail"]
        predicted = report.predicted_per_token.best.model_dump()
        last = {"step": steps - 1, "entropy": report.entropy.per_token.model_dump()}
        kept = self.kept | {"last": last | {"predicted": predicted}, "figures": figures}
        kept |= {"next": steps - 1 + interval, "interval": interval}
        return _Told(None, figures, failed, kept)

    def _judged_report(self, report: StepReport, step: int) -> StepReport:
        from entropy_probe_checks.step_gates import baseline_of_step, judged_step

        assert self._setup is not None
        report = report.model_copy(update={"since": self._since(report, step)})
        if "baseline" not in self.kept:
            first = baseline_of_step(report)
            self.kept["baseline"] = {name: of.model_dump() for name, of in first.items()}
        before = {name: Estimate(**of) for name, of in self.kept["baseline"].items()}
        gates = judged_step(report, self._setup.gates, before)
        return report.model_copy(update={"gates": gates})

    def _since(self, report: StepReport, step: int) -> SinceSection | None:
        """The change of the entropy since the last probe, if that was before this one."""
        last = self.kept.get("last")
        if last is None or last["step"] >= step:
            return None
        now, then = report.entropy.per_token, Estimate(**last["entropy"])
        change = Estimate(value=now.value - then.value, se=math.hypot(now.se, then.se))
        return SinceSection(
            after_step=last["step"],
            steps=step - last["step"],
            change=change,
            predicted=Estimate(**last["predicted"]),
        )

    def _interval(self, spent: float, of_a_step: float) -> int:
        """Steps until the next probe: `every`, or as many as bring the probe's share of the time down to `max_share`.

        spent / (spent + n·of_a_step) ≤ max_share
        """
        share = self._max_share
        if share >= 1 or of_a_step <= 0:
            return int(self._every)
        return max(int(self._every), math.ceil(spent * (1 - share) / (share * of_a_step)))

    # What all processes do

    def _obey(self, told: _Told, control: Any) -> None:
        self.kept = told.kept
        if told.trouble is not None:
            self._off = True
            self._warn_of(told.trouble)
        if told.failed and is_first():
            stops = "; the training stops" if self._action == "stop" else ""
            _LOG.warning("%s%s", "; ".join(told.failed), stops)
        if told.failed and self._action == "stop":
            control.should_training_stop = True

    def _warn_of(self, trouble: str) -> None:
        """Once, and by the first process alone."""
        if is_first() and self._trouble != _SAID:
            _LOG.warning("the entropy probe is off, and the training goes on: %s", trouble)
            self._trouble = _SAID

    def _log(self, args: Any, state: Any, control: Any, figures: dict[str, float]) -> None:
        """To `log_history` and every other callback, as `Trainer.log` does; a trainer's own `log` may average what it
        has gathered, and begin anew."""
        logs = {f"probe/{name}": value for name, value in figures.items()}
        if state.epoch is not None:
            logs["epoch"] = state.epoch
        state.log_history.append({**logs, "step": state.global_step})
        should_log = control.should_log  # of the step's own log, which is still to come
        try:
            self._trainer.callback_handler.on_log(args, state, control, logs)
        finally:
            control.should_log = should_log


_SAID = "said"


def _said(error: Exception) -> str:
    """One line: our own errors say what to do."""
    if isinstance(error, ProbeError):
        return str(error)
    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return "the probe does not fit into memory; give config={'batch': {'num_prompts': …}} fewer prompts"
    return f"{type(error).__name__}: {reason(error)}; take the callback out, or report this"


def _line(verdict: Verdict) -> str:
    return f"gate {verdict.criterion} failed: {verdict.value:.3g}, limit {verdict.limit:.3g} {verdict.hint}"
