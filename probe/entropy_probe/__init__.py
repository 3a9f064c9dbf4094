"""The entropy probe: what a checkpoint's next update does to the policy's entropy, and how far to trust the numbers.

    from entropy_probe import load_checkpoint, run_probe, ProbeConfig
    report = run_probe("runs/checkpoint-500")
    print(report.first_order.delta_h1, "±", report.first_order.delta_h1_se)

Names are loaded on first use, so importing this package imports neither torch nor pydantic.

run, pipeline/             what is measured, in order;   stages/  one step a file
estimators/                tensors in, numbers out;   model/  networks and files of weights
live, step_report          a step of a training, measured before it is taken;   integrations/  callbacks for trainers
processes/                 several processes under torchrun
config/, budgets, options  what can be set, by a file or on the command line
report, golden, plots      the numbers: their classes, kept ones to compare with, figures;   page/  all of it in HTML
schema/                    what every field of a report and of a configuration is
watching/                  a training run followed from outside: each new checkpoint measured once
compare, differences       reports side by side;   the difference of two entropies, and its standard error
integrations/              what trackers and trainers are told of a report
predictor_skill            predictors against the changes that a run made, from its reports
answer                     what a report and its verdicts come to, in a sentence
evidence, atomic           what the numbers are made of;   files that are whole or not there
afresh/                    the folder and the inputs, read and scored again by libraries alone
layout, base_model, text   where the files of a checkpoint are;   digests  what they hold, as one number
trainers/                  what a training run says of its own settings;   trl  the batch of every step of TRL
loading, inputs            a checkpoint as a configuration asks for it;   what a report depends on
sequence_processor         sampling and scores on a live model, by teacher_forcing
memory, cost/              how much is held, measured;   what a run costs, by formula
drill                      a dozen faults, planted into a run to see them caught
workloads                  stages to be timed;   demo/  the bundled checkpoint;   errors  one line each
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

_WHERE = {
    "load_checkpoint": "entropy_probe.model.checkpoint",
    "Checkpoint": "entropy_probe.model.checkpoint",
    "run_probe": "entropy_probe.run",
    "ProbeConfig": "entropy_probe.config",
    "ProbeReport": "entropy_probe.report",
    "Verdict": "entropy_probe.report",
    "SequenceProcessor": "entropy_probe.sequence_processor",
    "BatchedSequences": "entropy_probe.stages.responses.sequences",
    "GenerationConfig": "entropy_probe.config",
    "Prompt": "entropy_probe.stages.responses.prompts",
    "ProbeError": "entropy_probe.errors",
}
__all__ = [
    "BatchedSequences",
    "Checkpoint",
    "GenerationConfig",
    "ProbeConfig",
    "ProbeError",
    "ProbeReport",
    "Prompt",
    "SequenceProcessor",
    "Verdict",
    "load_checkpoint",
    "run_probe",
]

if TYPE_CHECKING:
    from entropy_probe.config import GenerationConfig, ProbeConfig
    from entropy_probe.errors import ProbeError
    from entropy_probe.model.checkpoint import Checkpoint, load_checkpoint
    from entropy_probe.report import ProbeReport, Verdict
    from entropy_probe.run import run_probe
    from entropy_probe.sequence_processor import SequenceProcessor
    from entropy_probe.stages.responses.prompts import Prompt
    from entropy_probe.stages.responses.sequences import BatchedSequences


def __getattr__(name: str) -> Any:
    if name not in _WHERE:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_WHERE[name]), name)
