"""Every planted fault turns the criteria red that are there for it and no others; without a fault none is red."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import pytest
import torch

import models
from entropy_probe import ProbeConfig, run_probe
from entropy_probe.model import forward
from entropy_probe_checks.criteria import CRITERIA
from faults import inputs, predictors, recipes  # noqa: F401 (enter their faults)
from faults.catalogue import FAULTS, Fault, page
from faults.more import FIGURE
from faults.subjects import Bench, Subject, adapter, full, statuses

# More data decides these; nothing that is planted here makes them more than inconclusive.
AUDIT = {name for name, criterion in CRITERIA.items() if criterion.family == "audit"}
"""They read all damaged numbers, and all that the files say of them."""
STATISTICAL = {
    "ess", "pareto_k", "preconditioner_complete", "step_resolved", "gold_complete", "prediction",
    "change_estimators_agree",
}  # fmt: skip

HEALTHY = {
    "llama": partial(full, "llama", layers=2),
    "qwen2": partial(full, "qwen2", layers=2),
    "qwen3-lora": partial(adapter, "qwen3", layers=2),
    "mistral": partial(full, "mistral", layers=2),
    "gemma2-dora": partial(adapter, "gemma2", layers=2, use_dora=True),
    "gpt2": partial(full, "gpt2", layers=2),
    "phi3-lora": partial(adapter, "phi3", layers=2),
    "gpt_neox": partial(full, "gpt_neox", layers=2),
    "mixtral-lora": partial(adapter, "mixtral", layers=2),
}


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Bench:
    return Bench(tmp_path_factory.mktemp("faults"))


@pytest.mark.parametrize("fault", FAULTS.values(), ids=FAULTS)
def test_fault_is_caught(bench: Bench, fault: Fault, monkeypatch: pytest.MonkeyPatch) -> None:
    bench.files(fault.subject)  # made before anything is damaged
    fault.plant(monkeypatch)
    if fault.refused:
        with pytest.raises(Exception, match=fault.refused):
            bench.run(fault.subject, fault.config)
        return
    found = statuses(bench.run(fault.subject, fault.config))
    red = {name for name, status in found.items() if status == "fail"}
    assert fault.red <= red <= fault.red | fault.also | AUDIT
    assert {found[name] for name in fault.inconclusive} <= {"inconclusive"}


def test_every_criterion_has_its_fault() -> None:
    assert set(CRITERIA) - {name for fault in FAULTS.values() for name in fault.red} == STATISTICAL


# One of each kind that no author of a criterion had thought of, none of which ends the run.
MANY = (
    "momentum_read_negated", "step_read_one_late", "weights_rounded_to_bfloat16", "rewards_reversed_in_their_group",
    "two_batches_without_the_preconditioner", "errors_of_slopes_not_over_root_b", "intervals_of_90_percent",
    "ratio_upside_down", "entropies_ten_percent_too_large", "zero_advantages_inverted", "norms_exchanged",
    "columns_of_estimators_exchanged", "per_token_is_per_response", "slopes_of_units_reversed", "everything_in_range",
    "entropy_rb_holds_the_naive_one", "mean_reward_of_the_first_responses", "prediction_without_the_half",
    "range_of_the_preconditioner_exchanged", "ess_of_squared_weights", "scored_after_half_a_step",
)  # fmt: skip


def test_many_at_once_hide_nothing(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    """21 faults in one tree: every criterion that one of them alone turns red is red, and the figures are."""
    bench.files("llama")
    for name in MANY:
        FAULTS[name].plant(monkeypatch)
    found = statuses(bench.run("llama", FAULTS[MANY[0]].config))
    expected = {name for fault in MANY for name in FAULTS[fault].red}
    assert FIGURE in expected
    assert {name for name, status in found.items() if status == "fail"} >= expected


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("name", HEALTHY)
def test_without_a_fault_nothing_is_red(bench: Bench, name: str, seed: int) -> None:
    found = statuses(bench.run(name, {}, seed, Subject(name, HEALTHY[name])))
    assert {n for n, status in found.items() if status == "fail"} == set()
    assert {n for n, status in found.items() if status == "inconclusive"} <= STATISTICAL | {"prediction"}


def test_a_router_near_a_tie_moves_no_derivative(bench: Bench) -> None:
    """A router's choice is so close that scores a thousandth of a nat apart lie on either side of it: their differences
    gave a curvature of −37000 for −28. The float64 copy has derivatives of its experts."""
    experts = Subject("experts", partial(adapter, "mixtral"))
    found = statuses(bench.run("experts", {"invariance": {"max_examples": 0}}, 4, experts))
    assert {n for n, status in found.items() if status == "fail"} == set()
    assert found["curvature_witness"] == "pass"


def test_a_jump_within_the_steps_is_left_out(bench: Bench) -> None:
    """Within the η of the Taylor tests a router chooses anew: the remainder came out of order 1.84."""
    experts = Subject("two layers of experts", partial(adapter, "mixtral", layers=2))
    found = statuses(bench.run("two layers of experts", {"invariance": {"max_examples": 0}}, 4, experts))
    assert {n for n, status in found.items() if status == "fail"} == set()
    assert found["taylor_order"] == "pass"


def test_autocast_outside_changes_nothing(bench: Bench) -> None:
    clean = bench.run("llama", {}).model_dump(exclude={"timing", "memory"})
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert bench.run("llama", {}).model_dump(exclude={"timing", "memory"}) == clean


def test_tied_parameter_in_a_dict_is_refused() -> None:
    """`functional_call` would leave θ + ηv in the live module."""
    from peft import LoraConfig, get_peft_model

    model = models.tiny_model("qwen2")
    config = LoraConfig(target_modules=["q_proj"], trainable_token_indices=[4, 5], task_type="CAUSAL_LM")
    with pytest.raises(Exception, match="is tied, in a ParameterDict") as caught:
        forward.bind(get_peft_model(model, config))
    assert "\n" not in str(caught.value)


def test_uncovered_parameters_are_named(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoint, e, u = bench.files("llama")
    FAULTS["part_of_the_forward_detached"].plant(monkeypatch)
    uncovered = run_probe(checkpoint, ProbeConfig(), e, u).registry.uncovered
    assert {name.split(".")[-2] for name in uncovered} == {
        "down_proj",
        "gate_proj",
        "up_proj",
        "post_attention_layernorm",
    }


def test_the_page_is_the_catalogue() -> None:
    assert (Path(__file__).parents[2] / "docs" / "faults.md").read_text() == page()
