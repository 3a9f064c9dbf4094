"""Drawn cases: the same ones everywhere, far from their bounds on sound models, red where fixed rows are not."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

import models
from entropy_probe import ProbeConfig
from entropy_probe.model.forward import BoundModel, bind
from entropy_probe.report import InvarianceOfCases, WorstCase
from entropy_probe.stages.responses.rollouts_file import read_rollouts
from entropy_probe.stages.witnesses import continuity, invariance, properties
from entropy_probe.stages.witnesses.properties import Case, Space

SPACE = Space(vocabulary=67, columns=56, names=tuple("abcdefgh"), eos=(2,))
TINY = Space(vocabulary=2, columns=2, names=("a",), eos=())
ONE, ODD = 7, 66
"""Token ids: `ODD` is in no row of the file."""


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Rollouts without a response of one token and without the token `ODD`."""
    path = models.random_rollouts(tmp_path_factory.mktemp("rollouts") / "r.jsonl", prompts=5, responses=3, seed=3)
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    for line in lines:
        line["prompt_ids"] = [ONE if token == ODD else token for token in line["prompt_ids"]]
        line["response_ids"] = [[ONE, *(ONE if t == ODD else t for t in ids)] for ids in line["response_ids"]]
    path.write_text("\n".join(map(json.dumps, lines)))
    return path


def drawn(model: Any, examples: int = 8, dtype: torch.dtype = torch.float32, **config: Any) -> InvarianceOfCases:
    resolved = ProbeConfig.from_mapping({"invariance": {"max_examples": examples}, **config})
    found = properties.drawn_properties(bind(model, dtype), bind(model, torch.float64), resolved, [models.EOS])
    assert found is not None
    return found


def red(found: InvarianceOfCases) -> set[str]:
    return {name for name, worst in vars(found).items() if isinstance(worst, WorstCase) and worst.share > 1.0}


def red_on_fixed_rows(model: Any, file: Path, v: dict[str, torch.Tensor]) -> set[str]:
    """What the rows of the batch show: the properties, the zero check, and scaling along a v that moves everything."""
    bound, float64 = bind(model), bind(model, torch.float64)
    rollouts = read_rollouts(file, bound, None)
    fixed = invariance.invariance(bound, float64, rollouts, ProbeConfig())
    found = {name for name in ("padding", "batch", "chunk") if getattr(fixed, name).share > 1.0}
    ratio = continuity.scaling(float64, rollouts, v).logit_ratio
    found |= {"scaling"} if not 1 / 3 < ratio < 3 else set()
    return found | (set() if continuity.zero_check(bound, rollouts, v).bitwise else {"zero_step"})


def everything(model: Any) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {name: torch.randn(p.shape, generator=generator) for name, p in model.named_parameters() if p.requires_grad}


# what is drawn


def test_cases_are_the_same_wherever_they_are_drawn(tmp_path: Path) -> None:
    """Here and in a process with another hash seed; nothing is kept, and no random state moves."""
    code = (
        "import random, numpy, torch\n"
        "states = lambda: [random.getstate(), repr(numpy.random.get_state()), torch.get_rng_state().tolist()]\n"
        "from entropy_probe.stages.witnesses.properties import Space, draw\n"
        "before = states()\n"
        f"cases = draw({SPACE!r}, 20, 3)\n"
        f"[case.ids({SPACE!r}) for case in cases]\n"
        "assert states() == before\n"
        "print(cases)\n"
    )
    here = properties.draw(SPACE, 20, 3)
    command = [sys.executable, "-W", "error::UserWarning", "-c", code]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == repr(here)
    assert done.stderr == ""
    assert [path.name for path in tmp_path.iterdir() if path.name != "__pycache__"] == []


def test_cases_vary_and_fit() -> None:
    cases = properties.draw(SPACE, 60, 0)
    assert 40 < len(cases) <= 60
    assert len(set(cases)) == len(cases)
    assert [(row.prompt, row.response) for row in cases[0].rows] == [(1, 1)]
    lengths = {(row.prompt, row.response) for case in cases for row in case.rows}
    assert {1, 24} <= {prompt for prompt, _ in lengths} & {response for _, response in lengths}
    assert {len(case.rows) for case in cases} >= {1, 2, 8}
    assert {name for case in cases for name in case.names} == set(SPACE.names)
    assert {case.kind for case in cases} == {"any", "one", "edge"}
    assert properties.draw(SPACE, 60, 1) != cases
    for case in cases:
        ids = case.ids(SPACE)
        assert ids.shape == (len(case.rows), max(case.lengths))
        assert 0 <= int(ids.min()) <= int(ids.max()) < SPACE.vocabulary
        assert all(ids[i, n - 1] == 2 for i, n in enumerate(case.lengths) if case.rows[i].ended)
        assert 0 <= case.chosen < len(case.rows)


def test_the_smallest_model_has_cases() -> None:
    """Two positions, two tokens, one tensor: there are few cases, and they are drawn once each."""
    cases = properties.draw(TINY, 30, 0)
    assert {row for case in cases for row in case.lengths} == {2}
    assert {case.names for case in cases} == {("a",)}


def test_none_are_drawn_where_none_are_asked_for() -> None:
    model = models.tiny_model("llama")
    config = ProbeConfig.from_mapping({"invariance": {"max_examples": 0}})
    assert properties.drawn_properties(bind(model), bind(model, torch.float64), config, []) is None


# what is measured


@pytest.mark.parametrize("lora", [False, True])
@pytest.mark.parametrize("architecture", list(models.CONFIGS))
def test_every_architecture_is_far_from_its_bounds(architecture: str, lora: bool) -> None:
    model = models.tiny_model(architecture)
    model = models.add_adapter(model, architecture) if lora else model
    found = drawn(model, examples=20, generation={"temperature": 0.7, "top_p": 0.9})
    assert found.num_examples > 10
    assert found.zero_step.worst == 0
    assert found.scaling is not None
    assert found.scaling.worst < 1e-3
    for worst in (found.padding, found.batch, found.chunk, found.scaling):
        assert worst.share < 0.25, worst
    assert found.padding.worst > 0


def test_true_float64_alone() -> None:
    found = drawn(models.tiny_model("qwen3"), examples=3, dtype=torch.float64)
    assert red(found) == set()
    assert found.padding.bound < 1e-12


def test_tensors_that_move_nothing_are_not_judged() -> None:
    """LoRA at its start: B is zero, so A moves no logit."""
    model = models.add_adapter(models.tiny_model("llama"), "llama")
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.requires_grad_("lora_A" in name)
            if "lora_B" in name:
                parameter.zero_()
    assert drawn(model).scaling is None


# faults that the rows of the batch do not show


def neighbours(model: Any, patch: pytest.MonkeyPatch) -> None:
    """Rows touch each other where there are seven or more."""
    model.model.norm.register_forward_hook(
        lambda module, args, out: out + 1e-6 * out.mean(0, keepdim=True) if len(out) >= 7 else out
    )


def one_token(model: Any, patch: pytest.MonkeyPatch) -> None:
    """The score of a response of one token is read at the position before."""
    original = BoundModel.read_logits

    def shifted(self: BoundModel, ids: Any, rows: Any, columns: Any, *a: Any, **k: Any) -> Any:
        return original(self, ids, rows, (columns - int(len(columns) == 1)).clamp(min=0), *a, **k)

    patch.setattr(BoundModel, "read_logits", shifted)


def rare_token(model: Any, patch: pytest.MonkeyPatch) -> None:
    """One token's embedding depends on how many rows there are."""
    model.model.embed_tokens.register_forward_hook(
        lambda module, args, out: out + 1e-6 * len(out) * (args[0] == ODD)[..., None]
    )


def replaced_weight(model: Any, patch: pytest.MonkeyPatch) -> None:
    """One token is treated apart where the embedding is not the module's own parameter."""
    model.model.embed_tokens.register_forward_hook(
        lambda module, args, out: (
            out + 1e-6 * (args[0] == ODD)[..., None] * (not isinstance(module.weight, torch.nn.Parameter))
        )
    )


def coarse_tensor(model: Any, patch: pytest.MonkeyPatch) -> None:
    """One tensor takes part in 20 bits, which a v that moves all of them hides."""
    model.model.layers[0].input_layernorm.register_forward_hook(
        lambda module, args, out: out * ((module.weight * 2**20).round() / 2**20 / module.weight)
    )


FAULTS: list[tuple[Callable[[Any, pytest.MonkeyPatch], None], set[str], set[str], str]] = [
    (neighbours, {"batch"}, {"batch", "padding"}, "row"),
    (one_token, {"chunk"}, {"chunk", "batch"}, "+1"),
    (rare_token, {"batch"}, {"batch", "padding"}, "row"),
    (replaced_weight, {"zero_step"}, {"zero_step", "scaling"}, "embed_tokens.weight"),
    (coarse_tensor, {"scaling"}, {"scaling"}, "layers.0.input_layernorm.weight"),
]


@pytest.mark.parametrize(("plant", "least", "most", "named"), FAULTS, ids=lambda x: getattr(x, "__name__", ""))
def test_faults_that_fixed_rows_miss(
    plant: Callable[[Any, pytest.MonkeyPatch], None],
    least: set[str],
    most: set[str],
    named: str,
    file: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model = models.tiny_model("llama")
    v = everything(model)
    plant(model, monkeypatch)
    assert red_on_fixed_rows(model, file, v) == set()
    found = drawn(model, examples=40)
    assert least <= red(found) <= most
    for name in least:
        assert named in getattr(found, name).example


def test_what_the_rows_are_can_be_made_again() -> None:
    """The example names a case that `draw` gives back."""
    model: Any = models.tiny_model("llama")
    rare_token(model, pytest.MonkeyPatch())
    example = drawn(model).batch.example
    number = int(example.removeprefix("drawn case ").partition(",")[0])
    case: Case = properties.draw(Space.of(bind(model), [models.EOS]), 8, 0)[number]
    assert example.startswith(f"drawn case {number}, {case}, float")
    assert ODD in case.ids(Space.of(bind(model), [models.EOS]))


def test_nan_is_the_worst_of_all() -> None:
    model: Any = models.tiny_model("llama")
    model.model.norm.register_forward_hook(lambda module, args, out: out * torch.nan)
    found = drawn(model, examples=2)
    assert {"padding", "batch", "chunk", "zero_step"} <= red(found)


def test_tokens_that_cannot_come_are_no_difference() -> None:
    """A model that gives some of its vocabulary a logit of −∞."""
    model: Any = models.tiny_model("llama")
    model.lm_head.register_forward_hook(lambda module, args, out: out.masked_fill(torch.arange(67) > 40, -torch.inf))
    assert {"padding", "batch", "chunk"}.isdisjoint(red(drawn(model)))


@pytest.mark.parametrize("seed", range(3))
def test_a_padding_token_of_zeros(seed: int) -> None:
    """Norm after norm multiplies what is added to nothing by 1/√eps: along such a row no step is small (0.999 came out
    for a bound of 0.1). No optimizer moves it, and no drawn v does."""
    torch.manual_seed(seed)
    config = transformers.LlamaConfig(**(models.ROPE | {"vocab_size": 4, "pad_token_id": 0}))
    model = transformers.LlamaForCausalLM(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.15 * torch.randn_like(parameter))
        model.model.embed_tokens.weight[0] = 0.0
    found = drawn(model.eval(), 12, batch={"seed": seed})
    assert red(found) == set()
    assert found.scaling is not None
