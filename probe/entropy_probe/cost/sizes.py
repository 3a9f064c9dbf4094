"""What the cost of a run depends on: the network, the two batches, and a few numbers of the configuration."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

from torch import nn

from entropy_probe.budgets import Part
from entropy_probe.config import ProbeConfig
from entropy_probe.model.parts import part_of
from entropy_probe.stages.witnesses.shortened import LONGEST


@dataclass(frozen=True)
class Network:
    """A decoder of Llama's or Qwen's kind: blocks of attention and a gated MLP, then a linear output layer.

    `frozen` and `trained` count the weights of the linear layers of the blocks (LoRA's factors are linear layers too);
    `head_trained`: the output layer [V, h] is trained. `parameters` (N) and `trainable` (D) count all values, a tied
    weight once. Of the trainable `tensors`, `largest` is the size of the largest, `entries` are compared with Adam's
    moments, and by `groups` δH₁ is split. `attention` is heads·(size of a head), `keys` the same of the heads that have
    keys and values of their own.
    """

    layers: int
    hidden: int
    heads: int
    attention: int
    keys: int
    intermediate: int
    vocabulary: int
    frozen: int
    trained: int
    head_trained: bool
    parameters: int
    trainable: int
    tensors: int
    entries: int
    largest: int
    groups: int

    @classmethod
    def of(cls, model: nn.Module) -> Network:
        """The sizes of a loaded model, in a PEFT wrapper or not."""
        base: Any = (
            unwrapped() if callable(unwrapped := getattr(model, "get_base_model", None)) else model
        )
        config: Any = base.config
        head = base.get_output_embeddings().weight
        tables = {id(part.weight) for part in model.modules() if isinstance(part, nn.Embedding)}
        named = dict(model.named_parameters())
        linear = {
            n: p for n, p in named.items() if p.dim() > 1 and p is not head and id(p) not in tables
        }
        names = [n for n, p in named.items() if p.requires_grad]
        trainable = [named[n] for n in names]
        heads = config.num_attention_heads
        size = getattr(config, "head_dim", None) or config.hidden_size // heads
        return cls(
            layers=config.num_hidden_layers,
            hidden=config.hidden_size,
            heads=heads,
            attention=heads * size,
            keys=(getattr(config, "num_key_value_heads", None) or heads) * size,
            intermediate=getattr(config, "intermediate_size", None) or 4 * config.hidden_size,
            vocabulary=head.shape[0],
            frozen=sum(p.numel() for p in linear.values() if not p.requires_grad),
            trained=sum(p.numel() for p in linear.values() if p.requires_grad),
            head_trained=head.requires_grad,
            parameters=sum(p.numel() for p in named.values()),
            trainable=sum(p.numel() for p in trainable),
            tensors=len(trainable),
            entries=sum(min(p.numel(), 4096) for p in trainable),
            largest=max(p.numel() for p in trainable),
            groups=1
            + len({(table, label) for n in names for table, label in part_of(n)._asdict().items()}),
        )


@dataclass(frozen=True)
class Batch:
    """B prompts of P tokens with G responses of T tokens: means, where they differ; `longest` is then P + T at most.

    Rows are padded to the longest that they are computed with. Lengths are taken to be spread evenly around the mean.
    """

    prompts: int
    group: int
    prompt: float
    response: float
    longest: float = 0.0

    @property
    def rows(self) -> int:
        return self.prompts * self.group

    @property
    def length(self) -> float:
        """L = P + T."""
        return self.prompt + self.response

    def of(self, prompts: int) -> Batch:
        """So many of its prompts."""
        return replace(self, prompts=min(prompts, self.prompts))

    @property
    def short(self) -> Batch:
        """Rows as they are differentiated twice (stages/witnesses/shortened.py)."""
        generated = min(self.response, max(LONGEST - self.prompt, LONGEST / 2))
        prompt = min(self.prompt, LONGEST - generated)
        longest = min(self.longest, LONGEST)
        return replace(self, prompt=prompt, response=generated, longest=longest)

    @property
    def responses(self) -> Batch:
        """The responses alone."""
        return replace(self, prompt=0.0, longest=max(self.longest - self.prompt, 0.0))

    def longest_of(self, rows: float) -> float:
        """The longest of so many rows, whichever they are."""
        return self.length + max(self.longest - self.length, 0.0) * max(rows - 1, 0) / (rows + 1)

    def sorted_by(self, rows: float) -> float:
        """Columns of a row where rows of similar length, so many of them, are computed together."""
        passes = max(self.rows / rows, 1.0)
        return self.length + (self.longest_of(self.rows) - self.length) / passes


@dataclass(frozen=True)
class Run:
    """E, and U (`None`: E serves as both); how many η; units of U and of E, where these are blocks of prompts.

    `rows_at_once` is `tf_batch_size`, `ranks` the number of processes, `cases` those of the drawn properties;
    `logits_at_once`, `recompute` and other `rows_at_once` are in the report's `memory` where there was a limit. `lent`:
    the float64 copy shares the frozen parameters. Without `second_order` the witnesses take no second derivatives.
    `on_disk`: where gradients of units stand. `share_prompts`: a prompt may be read once for all its responses.
    `one_copy`: `ranks` processes hold what is as long as the parameters together, once.
    """

    e: Batch
    u: Batch | None = None
    etas: int = 7
    blocks: int | None = None
    rows_at_once: int = 8
    logits_at_once: int | None = None
    ranks: int = 1
    sampled: bool = False
    rb: bool = False
    float64: bool = False
    cases: int = 5
    seed: int = 0
    pairs_gib: float = 1.0
    left_out: tuple[Part, ...] = ()
    recompute: bool = False
    lent: bool = False
    second_order: bool = True
    on_disk: bool = False
    share_prompts: bool = True
    one_copy: bool = False

    @classmethod
    def of(
        cls,
        network: Network,
        config: ProbeConfig,
        e: Batch,
        u: Batch | None,
        *,
        etas: int = 7,
        **others: Any,
    ) -> Run:
        """What the configuration says beside the batches; `auto` makes 7 to 10 η."""
        return cls(
            e=e,
            u=u,
            etas=etas,
            blocks=_blocks(network, config, e if u is None else u),
            rows_at_once=config.generation.tf_batch_size,
            rb=config.first_order.estimator == "rb",
            float64=config.precision.dtype == "float64",
            cases=config.invariance.max_examples,
            seed=config.batch.seed,
            pairs_gib=config.first_order.max_pairs_gib,
            left_out=config.left_out,
            share_prompts=config.share_prompts == "auto",
            **others,
        )

    @property
    def batches(self) -> list[Batch]:
        return [self.e] if self.u is None else [self.e, self.u]

    @property
    def few_at_once(self) -> int:
        """Rows of a pass that is differentiated twice."""
        return max(1, self.rows_at_once // 4)

    @property
    def update(self) -> Batch:
        return self.e if self.u is None else self.u

    @property
    def same_batch(self) -> bool:
        return self.u is None

    @property
    def units_u(self) -> int:
        return min(self.blocks or self.update.prompts, self.update.prompts)

    @property
    def units_e(self) -> int:
        return min(self.blocks or self.e.prompts, self.e.prompts)

    def shares_a_forward(self, network: Network) -> bool:
        """Whether X of E and X̄ per token come from one forward: `stages.gradients.unit_gradients`."""
        apart = self.rb or self.same_batch or network.head_trained or self.ranks > 1
        return not apart and not self.recompute and self.logits_at_once is None

    def paired(self, network: Network) -> bool:
        """Whether of several processes Y of all units goes round (stages/gradients/units.py)."""
        sent = self.units_u * network.trainable * (8 if self.float64 else 4)
        return self.ranks > 1 and (self.one_copy or sent <= self.pairs_gib * 2**30)

    def own(self, batch: Batch) -> Batch:
        """The prompts of the process that has most."""
        return batch.of(math.ceil(batch.prompts / self.ranks))

    def of_gradients(self, network: Network) -> float:
        """Bytes of those of the units, and of the witness (`bytes_of_units` of stages/gradients/units.py)."""
        return (3 * self.units_u + 8) * (8 if self.float64 else 4) * network.trainable

    def leaves_out(self, part: Part) -> bool:
        return part in self.left_out


def _blocks(network: Network, config: ProbeConfig, u: Batch) -> int | None:
    """As many as fit into `first_order.max_gradient_gib` (stages/gradients.py); `None` where every prompt does."""
    first_order, bytes_of = config.first_order, 8 if config.precision.dtype == "float64" else 4
    room = (first_order.max_gradient_gib * 2**30 / (bytes_of * network.trainable) - 8) / 3
    if first_order.mode == "block":
        return min(first_order.num_blocks, u.prompts)
    return None if u.prompts <= room else max(int(room), 2)
