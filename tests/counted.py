"""What a run computes and holds, counted: products of matrices and live tensors, stage by stage.

`count` runs `run_probe` on a random Qwen2 or Llama of given sizes, with a batch of random tokens, all responses of one
length.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import socket
import sys
import weakref
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import peft
import torch
import transformers
from torch import Tensor
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from entropy_probe import ProbeConfig, ProbeReport, load_checkpoint, run_probe
from entropy_probe.cost.sizes import Batch, Network, Run
from entropy_probe.processes.world import World

aten = torch.ops.aten


def _product(at: int) -> Any:
    def flops(*args: Any, out_val: Any = None, **kwargs: Any) -> int:
        return 2 * args[at].numel() * args[at + 1].shape[-1]

    return flops


def _attention(products: int, at: int) -> Any:
    def flops(*args: Any, out_val: Any = None, **kwargs: Any) -> int:
        (batch, heads, columns, size), keys = args[at].shape, args[at + 1].shape[-2]
        return products * 2 * batch * heads * columns * keys * size

    return flops


# What torch's counter does not know: products in place, and attention's fused kernel on the CPU. All pairs of tokens
# count, as for its other kernels.
UNKNOWN = {
    aten.addmm_: _product(1),
    aten._scaled_dot_product_flash_attention_for_cpu: _attention(2, 0),
    aten._scaled_dot_product_flash_attention_for_cpu_backward: _attention(5, 1),
}


class Counter(TorchDispatchMode):
    """Flops by torch's own formulas; bytes of the storages that live `now`, and the most since `peak` was set back.

    torch's `FlopCounterMode` finds the same flops, but it follows modules with hooks that keep graphs alive.
    """

    def __init__(self) -> None:
        super().__init__()
        self.flops = self.now = self.peak = 0
        self._sizes: dict[int, int] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        packet = func._overloadpacket
        if (formula := UNKNOWN.get(packet, flop_registry.get(packet))) is not None:
            self.flops += formula(*args, **(kwargs or {}), out_val=out)
        for leaf in pytree.tree_leaves(out):
            if isinstance(leaf, Tensor) and not leaf._is_zerotensor():
                self.add(leaf)
        return out

    def add(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self._sizes:
            return
        self._sizes[key] = storage.nbytes()
        self.now += storage.nbytes()
        self.peak = max(self.peak, self.now)
        weakref.finalize(storage, self._drop, key)

    def _drop(self, key: int) -> None:
        self.now -= self._sizes.pop(key)


@dataclass(frozen=True)
class Counted:
    """By stage flops, and the most bytes of tensors at any time; the sizes for the formulas."""

    flops: dict[str, int]
    peaks: dict[str, int]
    network: Network
    run: Run
    report: ProbeReport


@dataclass(frozen=True)
class Sizes:
    """A network and its batches: so many prompts in E and in U, `None` for one batch that serves as both."""

    hidden: int = 64
    intermediate: int = 192
    layers: int = 2
    vocabulary: int = 512
    lora: bool = True
    e: int = 3
    u: int | None = 2
    group: int = 2
    prompt: int = 10
    response: int = 20
    kind: str = "Qwen2"
    heads: int = 4

    def checkpoint(self, folder: Path) -> Path:
        """Random weights and moments. LoRA (r = 8) on all linear layers of the blocks."""
        torch.manual_seed(0)
        config = getattr(transformers, f"{self.kind}Config")(
            vocab_size=self.vocabulary,
            hidden_size=self.hidden,
            intermediate_size=self.intermediate,
            num_hidden_layers=self.layers,
            num_attention_heads=self.heads,
            num_key_value_heads=2,
            max_position_embeddings=4096,
            eos_token_id=2,
        )
        model: Any = transformers.AutoModelForCausalLM.from_config(config)
        if self.lora:
            model.save_pretrained(folder / "base")
            model.name_or_path = str(folder / "base")
            model = peft.get_peft_model(model, peft.LoraConfig(r=8, target_modules="all-linear", task_type="CAUSAL_LM"))
        parameters = [p for p in model.parameters() if p.requires_grad]
        optimizer = torch.optim.AdamW(parameters, lr=1e-5)
        for name, p in model.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(p, std=0.02)
        for p in parameters:
            moments = {"exp_avg": 1e-4 * torch.randn_like(p), "exp_avg_sq": 1e-4 * (torch.rand_like(p) + 0.1)}
            optimizer.state[p] = {"step": torch.tensor(10.0), **moments}
        model.save_pretrained(folder / "checkpoint")
        torch.save(optimizer.state_dict(), folder / "checkpoint" / "optimizer.pt")
        return folder / "checkpoint"

    def rollouts(self, path: Path, prompts: int, seed: int) -> Path:
        random = torch.Generator().manual_seed(seed)

        def tokens(length: int) -> list[int]:
            return torch.randint(3, self.vocabulary, (length,), generator=random).tolist()

        lines = [
            {
                "prompt_ids": tokens(self.prompt),
                "response_ids": [tokens(self.response) for _ in range(self.group)],
                "rewards": torch.rand(self.group, generator=random).tolist(),
            }
            for _ in range(prompts)
        ]
        path.write_text("\n".join(map(json.dumps, lines)) + "\n")
        return path

    def files(self, folder: Path) -> tuple[Path, Path | None]:
        folder.mkdir(parents=True, exist_ok=True)
        u = None if self.u is None else self.rollouts(folder / "u.jsonl", self.u, 2)
        return self.rollouts(folder / "e.jsonl", self.e, 1), u

    def run(self, network: Network, config: ProbeConfig, etas: int, **others: Any) -> Run:
        e, u = (None if n is None else Batch(n, self.group, self.prompt, self.response) for n in (self.e, self.u))
        assert e is not None
        return Run.of(network, config, e, u, etas=etas, **others)


SMOKE: dict[str, Any] = {"budget": "smoke", "invariance": {"max_examples": 1}}
SIZES = {
    "small": Sizes(),
    "full": Sizes(layers=3, vocabulary=2048, lora=False, e=2, u=None),
    "wide": Sizes(hidden=128, intermediate=512, e=5, u=4, group=4),
    "long": Sizes(layers=3, vocabulary=8192, prompt=20, response=44, kind="Llama"),
}


def count(folder: Path, sizes: Sizes, given: dict[str, Any]) -> Counted:
    """One run under the counter."""
    config = ProbeConfig.from_mapping(given)
    made = folder / "checkpoint"
    checkpoint = load_checkpoint(made if made.is_dir() else sizes.checkpoint(folder))
    counter = Counter()
    for tensor in (*checkpoint.model.parameters(), *checkpoint.model.buffers()):
        counter.add(tensor)
    for state in checkpoint.adam.values():
        counter.add(state.exp_avg)
        counter.add(state.exp_avg_sq)
    before: dict[str, int] = {}
    computed: dict[str, int] = {}
    peaks: dict[str, int] = {}

    def progress(stage: str, done: int, total: int) -> None:
        if total != 1:
            return
        if not done:
            before[stage], counter.peak = counter.flops, counter.now
        elif stage in before:
            computed[stage] = computed.get(stage, 0) + counter.flops - before.pop(stage)
            peaks[stage] = max(peaks.get(stage, 0), counter.peak)

    with counter:
        report = run_probe(checkpoint, config, *sizes.files(folder), progress=progress)
    network, held = Network.of(checkpoint.model), report.memory
    assert held is not None
    run = sizes.run(network, config, len(report.entropy_change))
    run = replace(run, rows_at_once=held.tf_batch_size, logits_at_once=held.logits_at_once)
    return Counted(computed, peaks, network, run, report)


def main(folder: Path, names: list[str], size: int) -> None:
    """So many processes; rank 0 writes what was sent, for each of some `SIZES`. They part after all imports."""
    torch.set_num_threads(1)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        os.environ |= {"TORCHELASTIC_RUN_ID": "counted", "WORLD_SIZE": str(size), "MASTER_ADDR": "127.0.0.1"}
        os.environ["MASTER_PORT"] = str(free.getsockname()[1])
    fork = multiprocessing.get_context("fork")
    others = [fork.Process(target=_measured, args=(folder, names, rank)) for rank in range(size)]
    for process in others:
        process.start()
    for process in others:
        process.join()
    sys.exit(any(process.exitcode for process in others))


def _measured(folder: Path, names: list[str], rank: int) -> None:
    os.environ["RANK"] = str(rank)
    world = World.of_torchrun()
    for name in names:
        files = SIZES[name].files(folder / name / str(rank))
        for sharding in ("prompt", "parameter") if name == "full" else ("prompt",):
            config = ProbeConfig.from_mapping(SMOKE | {"sharding": sharding})
            report = run_probe(folder / name / "checkpoint", config, *files, world=world)
            if world.first:
                report.to_json(folder / name / f"{sharding}-{world.size}.json")
    world.close()


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[3:], int(sys.argv[2]))
