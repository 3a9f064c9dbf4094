"""One rank of real trainers under FSDP2 on the CPU, with the callback and without: `fsdp_callback.py FOLDER`, with
RANK, WORLD_SIZE, MASTER_* set. What each run came to goes into `FOLDER/rank-R.pt`.

accelerate takes FSDP on accelerators only, so its state is told by hand that it runs; all else is the trainers' own.
Beside each report stands that of one process: the same parameters, gradient, moments and prompts, put together from the
ranks' own shards, in a model that nothing has spread.
"""

from __future__ import annotations

import gc
import json
import logging
import math
import os
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import transformers
from accelerate.state import AcceleratorState, PartialState
from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin
from peft import LoraConfig, get_peft_model
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import callback_runs as runs
import trl_runs
from entropy_probe import live, memory
from entropy_probe.config import ProbeConfig
from entropy_probe.integrations import transformers as by_trainer
from entropy_probe.integrations.of_trainer import config_of
from entropy_probe.live import measure_step, whole
from entropy_probe.model import live_step, sharded
from entropy_probe.processes import one_copy
from entropy_probe.processes.world import World
from entropy_probe.step_report import StepReport

PROBE = runs.PROBE | {"every": 2}
EVERY_STEP = runs.PROBE | {"every": 1}
STEPS = 3
PROBED = [0, 2]
HELD: list[int] = []
"""`mapped` at each step of the run, and at its end."""
CASES: dict[str, dict[str, Any]] = {"full": {}, "lora": {}, "bf16": {"activation_checkpointing": True}}
"""Cases of `callback_runs`, with what accelerate's plugin is given."""
APART = "several machines, full"


def mapped() -> int:
    """How many pieces of memory that processes share this one can see."""
    return Path("/proc/self/maps").read_text().count("memfd:entropy-probe")


class Mapped(transformers.TrainerCallback):
    """Between what is measured and the optimizer's step, and after the training."""

    def on_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        HELD.append(mapped())

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        HELD.append(mapped())


def spread(folder: Path, case: str, **options: Any) -> Any:
    """TRL's trainer, which is told that it is under FSDP2."""
    AcceleratorState._reset_state(reset_partial_state=True)
    sizes = {"per_device_train_batch_size": 4, "max_completion_length": 4, "max_steps": STEPS, "logging_steps": 1}
    trainer = runs.grpo(folder, case, **sizes | options)
    plugin = FullyShardedDataParallelPlugin(
        fsdp_version=2,
        auto_wrap_policy="transformer_based_wrap",
        transformer_cls_names_to_wrap=["LlamaDecoderLayer"],
        **CASES[case],
    )
    if case == "bf16":
        plugin.set_mixed_precision("bf16")
    for state in (PartialState, AcceleratorState):
        state._shared_state.update(distributed_type=DistributedType.FSDP, device=torch.device("cpu"))
    AcceleratorState._shared_state["fsdp_plugin"] = plugin
    trainer.is_fsdp_enabled = True
    HELD.clear()
    trainer.add_callback(Mapped())
    return trainer


# One process beside them


def taken(model: Any, optimizer: Any) -> dict[str, dict[str, Any]]:
    """All that the next step is made of, by the names of a bare model: every rank's rows, one below the other."""
    optimizer = live_step.unwrapped(optimizer)
    groups = {id(p): group for group in optimizer.param_groups for p in group["params"]}
    found: dict[str, dict[str, Any]] = {}
    parts: dict[tuple[str, str], torch.Tensor] = {}
    for name, p in model.named_parameters():
        name = name.replace("_checkpoint_wrapped_module.", "")
        own = {"parameter": p.detach()}
        if p.grad is not None:
            own |= {"grad": p.grad} | optimizer.state.get(p, {})
            found[name] = {"group": {key: value for key, value in groups[id(p)].items() if key != "params"}}
        for key, tensor in own.items():
            local = tensor.to_local() if hasattr(tensor, "to_local") else tensor
            found.setdefault(name, {})[key] = local.clone()
            if local.shape != tensor.shape:
                parts[name, key] = local
    ranks: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(ranks, parts)
    for name, key in parts:
        found[name][key] = torch.cat([rank[name, key] for rank in ranks])
    return found


def put(model: Any, held: dict[str, dict[str, Any]]) -> None:
    with torch.no_grad():
        for name, p in model.named_parameters():
            p.copy_(held[name]["parameter"])


def alone(
    bare: Any, kind: Callable[..., Any], before: Any, after: Any, config: ProbeConfig, prompts: Any, step: int
) -> StepReport:
    """The report of one process."""
    put(bare, before)
    groups = []
    trained = [(name, p) for name, p in bare.named_parameters() if "grad" in before[name]]
    for name, p in trained:
        p.grad = before[name]["grad"]
        groups.append(before[name]["group"] | {"params": [p]})
    optimizer = kind(groups)
    for name, p in trained:
        optimizer.state[p] = {k: v for k, v in before[name].items() if k not in ("parameter", "grad", "group")}
    probed = measure_step(bare, optimizer, trl_runs.tokenizer(), prompts, config, after_step=step)
    assert probed is not None
    put(bare, after)
    return probed.after(bare)


class Taken(transformers.TrainerCallback):
    """What the steps of a trainer are made of; added before the probe."""

    def __init__(self, trainer: Any) -> None:
        self.trainer, self.before, self.after = trainer, dict[int, Any](), dict[int, Any]()

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step in PROBED:
            self.before[state.global_step] = taken(self.trainer.model, self.trainer.optimizer)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step - 1 in PROBED:
            self.after[state.global_step - 1] = taken(self.trainer.model, self.trainer.optimizer)


def probed(folder: Path, case: str) -> tuple[runs.Found, Any, list[tuple[Any, Any]]]:
    """A run with the callback, its trainer, and in the first process each report with that of one process."""
    of: list[Taken] = []

    def make(folder: Path, case: str, **options: Any) -> Any:
        trainer = spread(folder, case, **options)
        of.append(Taken(trainer))
        trainer.add_callback(of[0])
        return trainer

    found, trainer = runs.run(folder, case, {**PROBE, "folder": folder / "probe"}, make)
    if dist.get_rank():
        return found, trainer, []
    bare = runs.grpo(folder, case).model  # of a trainer that never trains
    reports = []
    for step in PROBED:
        config = config_of(trainer, "smoke", PROBE["config"])
        given = of[0].before[step], of[0].after[step], config, trainer.train_dataset, step
        expected = alone(bare, torch.optim.AdamW, *given)
        report = StepReport.from_json(folder / "probe" / f"step-{step}.json")
        reports.append((report.model_dump(mode="json"), expected.model_dump(mode="json")))
    return found, trainer, reports


# A loop of one's own


PRECISE: dict[str, Any] = {part: {"dtype": "float64"} for part in ("func_override", "tf_nograd", "tf_withgrad")}
LOOP = ProbeConfig.from_mapping(
    {
        "budget": "standard",
        "precision": PRECISE,
        "batch": {"num_prompts": 4},
        "generation": {"max_new_tokens": 6, "num_return_sequences": 2},
    }
)


def tied() -> Any:
    model = trl_runs.tiny_model()
    model.lm_head.weight = model.model.embed_tokens.weight
    return model.double()


def experts() -> Any:
    """In float32, in which torch has a product for all experts; in float64, in which the curvature is, it has none."""
    torch.manual_seed(0)
    like = trl_runs.tiny_model().config
    config = transformers.MixtralConfig(
        vocab_size=like.vocab_size, hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=1, num_local_experts=4, bos_token_id=None, eos_token_id=like.eos_token_id,
        pad_token_id=like.pad_token_id,
    )  # fmt: skip
    return transformers.MixtralForCausalLM(config)


def adapted() -> Any:
    """Of rank 3, which is not the same number of rows in both processes; frozen layers stay in one memory."""
    torch.manual_seed(0)
    settings = LoraConfig(r=3, target_modules=["q_proj", "down_proj"], init_lora_weights=False)
    return get_peft_model(trl_runs.tiny_model(), settings).double()


def by_adapted_layer(model: Any) -> None:
    for part in (*model.base_model.model.model.layers, model):
        fully_shard(part)


def sharded_by_layer(model: Any) -> None:
    """All but the last norm, of which each process has a copy that it trains itself."""
    for part in (*model.model.layers, model):
        fully_shard(part, ignored_params={model.model.norm.weight})


def in_replicas(model: Any) -> None:
    """HSDP: each process has all of the rows, and all processes have the same."""
    fully_shard(model, mesh=init_device_mesh("cpu", (2, 1), mesh_dim_names=("copies", "rows")))


def in_a_way_of_torchs_own(model: Any) -> None:
    """As of a placement that is no plain block."""
    sharded._own_part = lambda tensor: None
    sharded_by_layer(model)


def of_each_its_own(model: Any) -> None:
    """Two trainings that know nothing of one another."""
    fully_shard(model, mesh=init_device_mesh("cpu", (2, 1), mesh_dim_names=("copies", "rows"))["rows"])


def looped(
    shard: Callable[[Any], None], kind: Callable[..., Any], steps: int = 2, make: Callable[[], Any] = tied
) -> tuple[Any, Any]:
    """A model with tied embeddings that has taken steps in float64, with the gradient of the next; whole parameters are
    left where they are after the backward pass."""
    model = make()
    shard(model)
    model.set_reshard_after_backward(False)
    optimizer = kind(model.parameters())
    generator = torch.Generator().manual_seed(dist.get_rank())
    for step in range(steps + 1):
        ids = torch.randint(2, 40, (4, 9), generator=generator)
        model.zero_grad()
        model(input_ids=ids, labels=ids).loss.backward()
        if shard in (sharded_by_layer, in_a_way_of_torchs_own) and not hasattr(model.model.norm.weight, "to_local"):
            dist.all_reduce(model.model.norm.weight.grad, dist.ReduceOp.AVG)
        if step < steps:
            model.reshard()
            optimizer.step()
    return model, optimizer


ADAMW = partial(torch.optim.AdamW, lr=1e-3, weight_decay=0.1, foreach=False)
SGD = partial(torch.optim.SGD, lr=1e-2, momentum=0.9, weight_decay=0.1)
SINGLE = ProbeConfig.from_mapping(
    {"budget": "standard", "batch": {"num_prompts": 4}, "generation": {"max_new_tokens": 6, "num_return_sequences": 2}}
)


def both_in_float64(
    shard: Callable[[Any], None],
    kind: Callable[..., Any],
    make: Callable[[], Any] = tied,
    config: ProbeConfig = LOOP,
    *,
    with_room: bool = False,
) -> tuple[Any, Any]:
    """The prompts of the second process are not asked. `with_room`: as if each had its own model on an accelerator."""
    has_room = sharded._has_room
    if with_room:
        sharded._has_room = lambda device, size: True
    model, optimizer = looped(shard, kind, make=make)
    given = trl_runs.tokenizer(), runs.PROMPTS if dist.get_rank() == 0 else [], config
    probed = measure_step(model, optimizer, *given)
    before = taken(model, optimizer)
    optimizer.step()
    after = taken(model, optimizer)
    assert probed is not None
    report = probed.after(model).model_dump(mode="json")
    sharded._has_room = has_room
    if dist.get_rank():
        return report, report
    expected = alone(make(), kind, before, after, config, runs.PROMPTS, 0)
    return report, expected.model_dump(mode="json")


class Sent(TorchDispatchMode):
    """The numbers of every tensor that is sent, by operation and dtype."""

    def __init__(self) -> None:
        super().__init__()
        self.of: list[tuple[str, torch.dtype, int]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if "c10d" in str(func):
            tensors = [t for t in tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor)]
            self.of += [(str(func), t.dtype, t.numel()) for t in tensors]
        return func(*args, **(kwargs or {}))


def what_is_sent() -> dict[str, Any]:
    """For a step that is measured, and for whole tensors; and what one process reads where the other wrote."""
    model, optimizer = looped(sharded_by_layer, ADAMW)
    with Sent() as measuring:
        probed = measure_step(model, optimizer, trl_runs.tokenizer(), runs.PROMPTS, LOOP)
        assert probed is not None
        probed.after(model)
    with Sent() as whole_tensors:
        whole(model)
    found = live.ready(model, optimizer)
    assert found is not None
    of_model, of_step = next(found.module.parameters()), next(iter(found.step.move.values()))
    with torch.no_grad():
        if dist.get_rank():
            of_model.view(-1)[0] = of_step.view(-1)[0] = 17.0
        dist.barrier()
        seen = of_model.view(-1)[0].item(), of_step.view(-1)[0].item()
    sizes = [p.numel() for p in model.parameters()]
    sent = {"measuring": measuring.of, "whole": whole_tensors.of, "seen": seen, "sizes": sizes, "mapped": mapped()}
    del found, of_model, of_step
    return sent | {"mapped then": mapped()}


class Highest:
    """The most memory that this process has had for itself, above what it had at first, in bytes."""

    def __enter__(self) -> Highest:
        self.first = self.most = self._now()
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._watch)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        self._thread.join()

    @property
    def above(self) -> int:
        return self.most - self.first

    def _watch(self) -> None:
        while not self._ended.wait(0.002):
            self.most = max(self.most, self._now())

    def _now(self) -> int:
        status = Path("/proc/self/status").read_text()
        return 1024 * int(status.partition("RssAnon:")[2].split()[0])


def of_its_own() -> dict[str, int]:
    """What a process holds by itself while a model is measured that is longer than all else, with the curvature."""
    like = trl_runs.tiny_model().config
    of_model = transformers.LlamaConfig(
        vocab_size=like.vocab_size, hidden_size=256, intermediate_size=1024, num_hidden_layers=10, bos_token_id=None,
        num_attention_heads=4, eos_token_id=like.eos_token_id, pad_token_id=like.pad_token_id,
    )  # fmt: skip
    model, optimizer = looped(sharded_by_layer, ADAMW, 1, lambda: transformers.LlamaForCausalLM(of_model))
    model.reshard()
    memory.trim()  # what is free would be taken again, and not be seen
    few = {"num_return_sequences": 2, "max_new_tokens": 2}
    config = ProbeConfig.from_mapping({"budget": "standard", "batch": {"num_prompts": 2}, "generation": few})
    with Highest() as measuring:
        probed = measure_step(model, optimizer, trl_runs.tokenizer(), runs.PROMPTS, config)
    assert probed is not None
    optimizer.step()
    memory.trim()
    with Highest() as after:
        probed.after(model)
    size = sum(p.numel() * p.element_size() for p in model.parameters())
    return {"model": size, "measuring": measuring.above, "after": after.above}


@contextmanager
def several_machines() -> Iterator[None]:
    """The second process does not see the first one's memory."""
    kept = one_copy.has_content
    if dist.get_rank():
        one_copy.has_content = lambda path, content: False
    yield
    one_copy.has_content = kept


@several_machines()
def on_several_machines() -> tuple[Any, Any] | None:
    """The first measures alone."""
    model, optimizer = looped(sharded_by_layer, ADAMW)
    probed = measure_step(model, optimizer, trl_runs.tokenizer(), runs.PROMPTS, LOOP)
    before = taken(model, optimizer)
    refused = "" if probed is None else said(lambda: probed.after(model))
    optimizer.step()
    now, after = whole(model), taken(model, optimizer)
    if dist.get_rank():
        assert probed is now is None
        return None
    assert probed is not None
    assert now is not None
    assert "give `entropy_probe.live.whole(model)`" in refused
    expected = alone(tied(), ADAMW, before, after, LOOP, runs.PROMPTS, 0)
    return probed.after(now).model_dump(mode="json"), expected.model_dump(mode="json")


def not_spread(scale: float = 1.0) -> tuple[Any, Any]:
    """Each process has the whole model, and the mean of the gradients of both, as under DDP; the second process `scale`
    times that."""
    model = tied()
    generator = torch.Generator().manual_seed(dist.get_rank())
    ids = torch.randint(2, 40, (4, 9), generator=generator)
    model(input_ids=ids, labels=ids).loss.backward()
    for p in model.parameters():
        dist.all_reduce(p.grad, dist.ReduceOp.AVG)
        p.grad *= scale if dist.get_rank() else 1.0
    return model, ADAMW(model.parameters())


def each_some_prompts() -> tuple[Any, Any, list[int]]:
    """The report of both processes, that of one, and the prompts of each."""
    model, optimizer = not_spread()
    given = trl_runs.tokenizer(), runs.PROMPTS, LOOP
    probed, expected = measure_step(model, optimizer, *given, by_all=True), measure_step(model, optimizer, *given)
    assert probed is not None
    assert expected is not None
    optimizer.step()
    reports = [step.after(model).model_dump(mode="json") for step in (probed, expected)]
    return *reports, [step.share.own.num_prompts for step in (probed, expected)]


def told_what_cannot_be_told() -> None:
    world = World.of_training()
    with world.together():
        world.told(lambda: None)


def said(work: Callable[[], object]) -> str:
    try:
        work()
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return "nothing"


def refusals() -> dict[str, str]:
    """What is not measured, and the line that says so."""
    given = trl_runs.tokenizer(), runs.PROMPTS, LOOP
    model, optimizer = looped(sharded_by_layer, ADAMW, 0)
    found = {}
    for kind in (partial(torch.optim.Adafactor, lr=1e-2), type("OwnAdamW", (torch.optim.AdamW,), {})):
        other = kind(model.parameters())
        found[type(other).__name__] = said(lambda other=other: measure_step(model, other, *given))
    if dist.get_rank():
        model.lm_head.weight.grad = None
    found["gradients"] = said(lambda: measure_step(model, optimizer, *given))
    found["steps"] = said(lambda: measure_step(*not_spread(-1.0), *given, by_all=True))
    found["told"] = said(lambda: told_what_cannot_be_told())
    found["not finite"] = str(measure_step(*not_spread(math.nan), *given, by_all=True))
    found["mesh"] = said(lambda: measure_step(*looped(of_each_its_own, ADAMW, 0), *given))
    return found


# What goes wrong


def plant(where: Any, name: str, rank: int, what: Any) -> None:
    """From here on a function of the library does something else, on one rank alone."""
    if dist.get_rank() == rank:
        setattr(where, name, what)


def raises(*_: Any, **__: Any) -> Any:
    raise RuntimeError("planted")


class NoneLeft:
    """No memory from the second question on: that for the change that came."""

    def __init__(self) -> None:
        self.asked = 0

    def __call__(self, device: torch.device) -> int:
        self.asked += 1
        return 1 << 50 if self.asked == 1 else 0


class FailsAgain:
    """The function works once: what it is for after the step fails."""

    def __init__(self, function: Callable[..., Any]) -> None:
        self.function, self.called = function, 0

    def __call__(self, *given: Any, **options: Any) -> Any:
        self.called += 1
        return self.function(*given, **options) if self.called == 1 else raises()


FAILURES: dict[str, tuple[Any, str, int, Any]] = {
    "a step of the second": (live_step, "_moved", 1, raises),
    "the scaler of the second": (by_trainer, "gradient_scale", 1, raises),
    "memory of the second": (sharded, "available_bytes", 1, NoneLeft()),
    "a copy of the first": (sharded, "beside", 0, raises),
    "a part of the second": (sharded, "_own_part", 1, raises),
    "scores of the second": (live, "score", 1, raises),
    "the change of the second": (live, "together", 1, FailsAgain(live.together)),
    "the change of the first": (live, "together", 0, FailsAgain(live.together)),
}


class Lines(logging.Handler):
    def __init__(self) -> None:
        super().__init__()
        self.said: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.said.append(record.getMessage())


def main() -> None:
    folder, found = Path(sys.argv[1]), dict[str, Any]()
    torch.set_num_threads(1)
    gc.freeze()  # trainers collect garbage when they end
    dist.init_process_group("gloo")
    runs.AT = 1
    lines = Lines()
    logging.getLogger("entropy_probe").addHandler(lines)
    for case in CASES:
        found[f"{case}, without"], _ = runs.run(folder / case, case, None, spread)
    for name in (*CASES, APART):
        with several_machines() if name == APART else nullcontext():
            case = "full" if name == APART else name
            found[f"{name}, with"], trainer, found[f"{name}, reports"] = probed(folder / name, case)
        found[f"{name}, held"] = list(HELD)
        found[f"{name}, logged"] = [entry["step"] - 1 for entry in runs.logged(trainer)]
    prompts = folder / "prompts.jsonl"
    for name in ("prompts of the first", *FAILURES):
        own = {**EVERY_STEP, "folder": folder / name, "prompts": prompts}
        if dist.get_rank() == 0:
            prompts.write_text("".join(json.dumps({"prompt": text}) + "\n" for text in runs.PROMPTS))
        at_step = partial(prompts.unlink, missing_ok=True)
        kept = where = function = None
        if name in FAILURES:
            where, function, *_ = FAILURES[name]
            kept, at_step = getattr(where, function), partial(plant, *FAILURES[name])
        lines.said.clear()
        found[name], trainer = runs.run(folder / "full", "full", own, spread, at_step=at_step)
        found[f"{name}, held"] = list(HELD)
        found[f"{name}, logged"] = [entry["step"] - 1 for entry in runs.logged(trainer)]
        found[f"{name}, said"] = list(lines.said)
        if kept is not None:
            setattr(where, function, kept)
    own_part = sharded._own_part
    found["loops"] = [
        both_in_float64(sharded_by_layer, ADAMW),
        both_in_float64(in_replicas, SGD),
        both_in_float64(in_a_way_of_torchs_own, ADAMW),
    ]
    sharded._own_part = own_part
    found["loops"] += [
        both_in_float64(sharded_by_layer, ADAMW, with_room=True),
        both_in_float64(sharded_by_layer, ADAMW, experts, SINGLE),
        both_in_float64(by_adapted_layer, ADAMW, adapted),
    ]
    found["of its own"] = of_its_own()
    found["sent"] = what_is_sent()
    found["several machines"] = on_several_machines()
    found["not spread"] = each_some_prompts()
    found["refusals"] = refusals()
    torch.save(found, folder / f"rank-{os.environ['RANK']}.pt")
    dist.barrier()
    dist.destroy_process_group()
    sys.stdout.flush()
    os._exit(0)  # gloo's threads, which outlive the group, abort one interpreter in ten while it shuts down


if __name__ == "__main__":
    main()
