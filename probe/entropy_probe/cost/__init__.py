"""What a run costs before it is made: flops by stage, the most bytes that each stage holds, bytes that are sent.

`Network` and `Run` are the sizes; `flops`, `held`, `peaks` and `sent` are closed formulas of them. They are for
decoders of Llama's and Qwen's kind, fully trained or with LoRA. Left out: mixtures of experts, DoRA, and
`fallback: resample`.

sizes  of a network and of a run;   computation  flops;   tensors  bytes held;   traffic  bytes sent
plan   what a run of a checkpoint would take, and what is chosen, before anything is loaded
"""

from entropy_probe.cost.computation import GROWING, flops
from entropy_probe.cost.sizes import Batch, Network, Run
from entropy_probe.cost.tensors import held, peaks
from entropy_probe.cost.traffic import Sent, sent

__all__ = ["GROWING", "Batch", "Network", "Run", "Sent", "flops", "held", "peaks", "sent"]
