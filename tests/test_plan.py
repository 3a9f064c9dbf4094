"""`entropy-probe plan`: the sizes are those of the loaded model, what is chosen fits, and what would fit does."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path
from typing import Any

import pytest

from counted import Sizes
from entropy_probe import ProbeConfig, load_checkpoint, memory
from entropy_probe.__main__ import main
from entropy_probe.cost.plan import estimate, network_of
from entropy_probe.cost.sizes import Batch, Network, Run

PAGE = Path(__file__).parents[1] / "docs" / "scaling.md"


def scaling() -> Any:
    spec = importlib.util.spec_from_file_location("scaling", PAGE.with_suffix(".py"))
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("lora", [True, False], ids=["LoRA", "full"])
def test_sizes_of_headers_are_those_of_the_model(tmp_path: Path, lora: bool) -> None:
    folder = Sizes(lora=lora).checkpoint(tmp_path)
    assert network_of(folder) == Network.of(load_checkpoint(folder).model)


def config(**given: Any) -> ProbeConfig:
    return ProbeConfig.from_mapping({"generation": {"max_new_tokens": 4096}, "device": "cuda"} | given)


def test_choices_shrink_with_the_limit() -> None:
    """Rows first, then layers that are run again; and where nothing fits, each remedy does."""
    network, found = scaling().network("1.5 B", lora=True), []
    for gib in (300, 120, 70, 36, 24, 16, 12):
        of = estimate(network, config(memory_limit=f"{gib}GiB", budget="smoke"), 200)
        assert of.fits
        assert of.most <= gib * 2**30
        found.append((of.run.recompute, -of.run.rows_at_once))
    assert found == sorted(found)
    assert len(set(found)) == len(found)
    least = estimate(network, config(memory_limit="9GiB"), 200)
    assert not least.fits
    tokens = next(re.search(r"max_new_tokens: (\d+)", said) for said in least.remedies if "max_new" in said)
    assert tokens is not None
    shorter = {"generation": {"max_new_tokens": int(tokens[1])}}
    assert estimate(network, config(memory_limit="9GiB", **shorter), 200).fits
    needed = re.search(r"a memory of ([\d.]+) GiB", least.remedies[-1])
    assert needed is not None
    assert estimate(network, config(memory_limit=f"{1.01 * float(needed[1]):.3f}GiB"), 200).fits


def test_second_derivatives_are_left_out_where_they_alone_are_too_much() -> None:
    """As under a limit (stages/memory/memory_limit.py)."""
    network = scaling().network("1.5 B", lora=True)
    less, more = (estimate(network, config(memory_limit=f"{gib}GiB"), 200) for gib in (12, 13))
    assert less.fits
    assert more.fits
    assert (less.run.second_order, more.run.second_order) == (False, True)
    assert "no second derivatives" in less.text()
    assert "no second derivatives" not in more.text()
    assert sum(less.flops.values()) < sum(more.flops.values())


def test_never_means_never() -> None:
    network = scaling().network("1.5 B", lora=True)
    of = estimate(network, config(memory_limit="20GiB", budget="smoke", recompute="never"), 200)
    assert not of.run.recompute
    assert estimate(network, config(memory_limit="20GiB", budget="smoke"), 200).run.recompute


@pytest.mark.parametrize(("limit", "code", "said"), [("8GiB", 0, "fits memory_limit"), ("1MiB", 1, "would fit: ")])
def test_the_command(capsys: pytest.CaptureFixture[str], limit: str, code: int, said: str) -> None:
    assert main(["plan", "demo", "--memory-limit", limit]) == code
    shown = capsys.readouterr().out
    assert said in shown
    assert "slopes" in shown


def test_no_prompt(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", "demo", "--prompt-tokens", "0"]) == 4
    assert "--prompt-tokens: is 0; give 1 or more" in capsys.readouterr().err


def test_the_table_is_what_the_formulas_say() -> None:
    """And models with LoRA and in full fit the cards that the page speaks of, under the standard budget."""
    made = scaling()
    assert made.BEGIN_LONG + "\n" + made.long_rows() + "\n" + made.END_LONG in PAGE.read_text()
    assert made.of_long_rows("7 B", lora=True, length=4096)["most"] <= 45
    assert made.of_long_rows("7 B", lora=True, length=16384)["most"] <= 75
    assert made.of_long_rows("1.5 B", lora=False, length=4096)["most"] <= 60


def test_a_full_fine_tune_runs_by_default(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a machine with four times what its checkpoint holds; where memory is short, its gradients stand on disk."""
    network = scaling().network("1.5 B", lora=False)
    held = 3 * 4 * network.parameters  # θ and two moments in float32
    of_two = Run(Batch(16, 8, 200, 256), blocks=2).of_gradients(network)
    given = config(generation={"max_new_tokens": 256, "tf_batch_size": 1}, device="cpu")
    for room, on_disk in ((4 * held, True), (2.1 * of_two, False)):
        monkeypatch.setattr(memory, "available_bytes", lambda device, room=room: int(room))
        found = estimate(network, given, 200)
        assert found.run.on_disk is on_disk
        assert found.run.blocks == 2
        assert found.fits
        assert ("gradients of 2 blocks stand on disk: 80.5 GiB" in found.text()) == on_disk
