"""A folder that a trainer wrote → `Checkpoint`. It loads exactly, or fails with one line.

Nothing in it is executed.

load      the steps, in a line: layout → stored → model → optimizer's state → placement → info
loaded    what comes of it
stored    what the files hold, without values, and values on demand
readers   the reader of each format
formats/  the readers;   files  safetensors and tensors-only pickles;   stand_ins  for classes in them
weights/  full models, adapters over a base model, tokenizers
moments/  the optimizer's state by parameter name
inspect   what a folder holds, without loading it (and inspect_optimizer)
inspection  the same for the eye
"""

from entropy_probe.model.checkpoint.load import load_checkpoint
from entropy_probe.model.checkpoint.loaded import Checkpoint, CheckpointInfo
from entropy_probe.model.checkpoint.moments.adam import AdamState
from entropy_probe.model.checkpoint.moments.others import OtherOptimizer

__all__ = ["AdamState", "Checkpoint", "CheckpointInfo", "OtherOptimizer", "load_checkpoint"]
