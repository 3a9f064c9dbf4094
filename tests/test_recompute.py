"""Layers that are run again give the same captured gradients, bit for bit, and hold no graph of the whole row."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import peft
import pytest
import torch
import transformers
from torch.utils.checkpoint import CheckpointError

import models
from entropy_probe.memory import live_tensors
from entropy_probe.model import forward, recompute
from entropy_probe.model.capture import Capture
from entropy_probe.model.forward import BoundModel, bind
from entropy_probe.model.recompute import layers_of
from entropy_probe.model.registry import checksum
from test_capture import ADAPTERS, VARIANTS, Case

CASES: dict[str, Callable[[], Any]] = {
    f"{architecture} {variant}": lambda a=architecture, v=variant: VARIANTS[v](a)
    for architecture, variant in (
        *((architecture, "full") for architecture in models.CONFIGS),
        ("llama", "lora"),
        ("gemma2", "dora"),
        ("gpt2", "dora"),
        ("qwen2", "rslora, all biases"),
    )
}


def both(bound: BoundModel, case: Case, **options: Any) -> tuple[Any, Any]:
    """The sums, and what fell back, with layers kept and with layers run again."""
    return tuple(case.captured(replace(bound, recompute=again), **options) for again in (False, True))  # pyright: ignore[reportReturnType]


@pytest.mark.filterwarnings("ignore:Model with")
@pytest.mark.filterwarnings("ignore:Model has")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("name", CASES)
def test_bit_for_bit(monkeypatch: pytest.MonkeyPatch, name: str, dtype: torch.dtype) -> None:
    """As true derivative and as the module's own; for X and Y at once."""
    bound, runs = bind(CASES[name](), dtype), []
    case = Case.of()
    case = replace(case, weights=case.weights.to(dtype))
    counted(monkeypatch, runs)
    before = checksum(bound.module)
    for true in (False, True):
        (kept, fell_back), (again, fell_back_again) = both(bound, case, true_derivative=true)
        assert kept.keys() == again.keys()
        assert [n for n in kept if not torch.equal(kept[n], again[n])] == []
        assert fell_back == fell_back_again
    assert len(runs) >= 2 * len(layers_of(bound.language_model)) > 0
    assert checksum(bound.module) == before
    assert not any("forward" in vars(layer) for layer in layers_of(bound.language_model))


def counted(monkeypatch: pytest.MonkeyPatch, runs: list[int]) -> None:
    """Notes every second run of a layer, which the tests would pass without."""
    original = Capture.again

    @contextmanager
    def again(capture: Capture, activations: Any) -> Any:
        runs.append(len(activations))
        with original(capture, activations):
            yield

    monkeypatch.setattr(Capture, "again", again)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", ["ia3", "boft", "oft", "vera", "layer norms"])
def test_other_adapters(kind: str) -> None:
    torch.manual_seed(0)
    model = peft.get_peft_model(models.tiny_model("llama"), ADAPTERS[kind]())
    (kept, fell_back), (again, fell_back_again) = both(bind(model, torch.float64), Case.of())
    assert [n for n in kept if not torch.equal(kept[n], again[n])] == []
    assert fell_back == fell_back_again


def test_without_a_capture() -> None:
    """A gradient by autograd alone, of the witness that goes response by response."""
    bound = bind(models.tiny_model("llama"), torch.float64)
    found = []
    for again in (False, True):
        one = replace(bound, recompute=again)
        loss = Case.of().seq_logp(one, once=True).square().sum()
        found.append(torch.autograd.grad(loss, list(one.registry.trainable.values())))
    assert all(map(torch.equal, *found))


def test_where_it_has_no_part(monkeypatch: pytest.MonkeyPatch) -> None:
    """Twice differentiated, at other parameters, without a graph: nothing would be saved, or θ would be run again."""
    monkeypatch.setattr(recompute, "checkpoint", lambda *args, **options: pytest.fail("a layer was run again"))
    bound, case = replace(bind(models.tiny_model("llama"), torch.float64), recompute=True), Case.of()
    case.seq_logp(bound)
    case.seq_logp(bound, once=True, override={n: p.detach() for n, p in bound.registry.trainable.items()})
    with torch.no_grad():
        case.seq_logp(bound, once=True)


def test_lent_parameters() -> None:
    """A float64 copy that shares its frozen parameters: each layer is lent them a second time."""
    model = VARIANTS["lora"]("llama")
    bound = bind(model, torch.float64, lend_frozen=True)
    assert bound.lending is not None
    (kept, _), (again, _) = both(bound, Case.of())
    assert [n for n in kept if not torch.equal(kept[n], again[n])] == []


def test_what_is_held() -> None:
    """Of six layers one graph and five inputs: less than half of six graphs."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 4, "num_hidden_layers": 6}
    config = transformers.LlamaConfig(vocab_size=models.VOCABULARY, **sizes)
    model = transformers.LlamaForCausalLM(config)
    bound, case = bind(model.eval()), Case.of(2, 120, weightings=1, prompts=1)
    case = replace(case, weights=case.weights.float())
    case.captured(bound)
    cpu, once_more = torch.device("cpu"), replace(bound, recompute=True)
    kept = live_tensors(lambda: case.captured(bound), cpu).most
    assert live_tensors(lambda: case.captured(once_more), cpu).most < 0.5 * kept


@pytest.mark.parametrize("slip", ["not marked", "capture is not listening", "not evaluating"])
def test_a_slip_is_seen(monkeypatch: pytest.MonkeyPatch, slip: str) -> None:
    if slip == "not marked":
        monkeypatch.setattr(Capture, "mark", lambda *of: None)
    elif slip == "capture is not listening":

        @contextmanager
        def deaf(capture: Capture, activations: Any) -> Any:
            yield

        monkeypatch.setattr(Capture, "again", deaf)
    else:
        original = forward.forward_context
        monkeypatch.setattr(
            forward,
            "forward_context",
            lambda dtype, **of: original(torch.float32 if torch._C._current_graph_task_id() >= 0 else dtype, **of),
        )
    # what is saved of a linear layer happens to be the same without the capture; of a layer norm it is not
    model = models.tiny_model("gpt2") if slip == "capture is not listening" else VARIANTS["lora"]("llama")
    bound, case = bind(model, torch.float64), Case.of()
    assert is_seen(bound, case)


def is_seen(bound: BoundModel, case: Case) -> bool:
    """Torch compares what was saved with what is made again; else the sums differ, or a parameter falls back."""
    try:
        (kept, _), (again, fell_back) = both(bound, case)
    except CheckpointError:
        return True
    return bool(fell_back) or any(not torch.equal(kept[n], again[n]) for n in kept)
