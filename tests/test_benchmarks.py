"""Every benchmark runs, the script for one GPU too, and the pages say what the committed results say."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch

import forked
from entropy_probe import ProbeConfig, load_checkpoint
from entropy_probe.estimators.parity import sampler_parity
from entropy_probe.model.forward import bind
from entropy_probe.stages.responses.rollouts_file import read_rollouts
from entropy_probe.stages.scores import score

ROOT = Path(__file__).parents[1]
FOLDER = ROOT / "benchmarks"


def module(path: Path) -> Any:
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None
    assert spec.loader is not None
    found: ModuleType = importlib.util.module_from_spec(spec)
    sys.modules[path.stem] = found  # its dataclasses look there for the types of their fields
    spec.loader.exec_module(found)
    return found


@pytest.fixture(scope="module")
def pages() -> Any:
    return module(ROOT / "docs" / "benchmarks.py")


@pytest.fixture(scope="module")
def checkpoints() -> Any:
    return module(FOLDER / "checkpoints.py")


def test_every_benchmark_runs(tmp_path: Path) -> None:
    """One case of each on models of next to nothing: ways that are compared agree, and memory is counted."""
    kept = tmp_path / "results.json"
    done = forked.command(f"pytest {FOLDER} --tiny -q -p benchmark --results={kept}", cwd=ROOT)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-1000:]
    ran = {f"test_{name}".partition("[")[0] for name in json.loads(kept.read_text())}
    written = (re.findall(r"^def (test_\w+)", path.read_text(), re.M) for path in FOLDER.glob("test_*.py"))
    assert ran == {name for names in written for name in names}


def test_the_script_for_a_gpu_runs_without_one(tmp_path: Path) -> None:
    out = tmp_path / "out.json"
    command = ["benchmarks/device.sh", "--device", "cpu", "--small", "--case", "0.5b-lora-1024", "--out", str(out)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}  # of tiny models several threads only wait for one another
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False, env=environment)
    assert done.returncode == 0, done.stderr
    said = json.loads(out.read_text())
    row = said["cases"]["0.5b-lora-1024"]
    assert row["exit"] == 0, row
    assert row["passed"] > 40
    assert {status for status, *_ in row["not_passed"].values()} == {"not_applicable"}
    assert row["zero_is_bitwise"] is True
    assert set(row["plan"]["held_over_planned"]) >= {"scores", "gradients", "slopes", "continuity"}
    assert row["by_hand"]["optimizer_step"]["seconds"] > 0
    assert max(row["by_hand"]["largest_difference_nats"].values()) < 1e-4  # float32 sums over 512 words


def test_numbers_beside_one_another(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is equal, near, a size of rounding, or off; times and memory are not compared."""
    monkeypatch.syspath_prepend(FOLDER)
    device = module(FOLDER / "device.py")
    one = {"a": 1.0, "b": [2.0, {"c": 3.0}], "d": 1e-9, "timing": {"x": 1.0}, "on": True, "only": 4.0}
    other = {"a": 1.0, "b": [2.001, {"c": 3.3}], "d": 2e-9, "timing": {"x": 2.0}, "on": False}
    assert device.beside(one, other) == {
        "compared": 4,
        "bitwise": 1,
        "within_1e-3": 2,
        "both_below_1e-6": 1,
        "outside": {"b[1].c": [3.0, 3.3]},
    }


@pytest.mark.parametrize(("little", "own"), [(1e-3, True), (1.0, False)])
def test_drawn_responses_are_the_models_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, checkpoints: Any, little: float, own: bool
) -> None:
    """Σ(−log p − H) of 1000 tokens and more has mean 0 under the model, as `on_policy` asks: |z| < 4. With layers of
    the usual size the same table is another policy, and is seen."""
    monkeypatch.setattr(checkpoints, "LITTLE", little)
    monkeypatch.setitem(checkpoints.SHAPES, "mid", (96, 192, 6, 4, 2, 2000))
    of = checkpoints.made("mid", tmp_path, torch.device("cpu"), lora=True)
    path = of.drawn(tmp_path / "e.jsonl", prompts=2, group=4, prompt=8, length=256, seed=0)
    loaded = load_checkpoint(of.folder)
    batch = read_rollouts(path, bind(loaded.model), loaded.tokenizer)
    scores = score(bind(loaded.model), batch, ProbeConfig())
    excess = (-scores.token_logp - scores.rb_entropy).flatten(0, 1)[batch.gen_mask]
    assert len(excess) > 1000
    assert (abs(float(excess.sum() / excess.norm())) < 4) is own


def test_pages_say_what_the_results_say(pages: Any) -> None:
    """Every marked figure and table; `python docs/benchmarks.py` writes them."""
    marked = 0
    for path in pages.pages():
        text = path.read_text()
        assert pages.page(text) == text, f"{path.relative_to(ROOT)}: run python docs/benchmarks.py"
        marked += len(pages.FIGURE.findall(text)) + len(pages.TABLE.findall(text))
        assert len(re.findall("<!-- benchmark", text)) == len(pages.FIGURE.findall(text)) + len(
            pages.TABLE.findall(text)
        ), f"{path.relative_to(ROOT)}: a mark has no figure in front of it"
        for paragraph in re.split(r"\n\n|\n\* ", text):
            if re.search(r"`benchmarks/test_\w+\.py`", paragraph) and "make bench" not in paragraph:
                assert "<!-- benchmark: " in paragraph, paragraph
    assert marked > 20


def test_a_figure_that_is_off_is_written_anew(pages: Any) -> None:
    key = next(name for name, of in pages.results().items() if of.get("ratios"))
    way, ratio = next(iter(pages.results()[key]["ratios"].items()))
    mark = f"<!-- benchmark: {key}: ratios.{way} -->"
    assert pages.page(f"takes 9876.54{mark} times") == f"takes {ratio:.2f}{mark} times"
    assert pages.page(f"1/9876{mark}") == f"1/{1 / ratio:.0f}{mark}"
    with pytest.raises(KeyError):
        pages.page("1.0<!-- benchmark: nothing[s32k]: ratios.TRL -->")


def test_results_have_no_memory_of_zero(pages: Any) -> None:
    """Tensors are counted as they come and go; a resident peak after a larger one would be 0."""
    held = [b for of in pages.results().values() for b in of.get("bytes", {}).values()]
    assert len(held) > 50
    assert min(held) > 0


def test_lines_from_vllm_are_read_with_their_log_probabilities(tmp_path: Path, checkpoints: Any) -> None:
    """The page's program on objects with vLLM's attributes, which hold responses and log p of the model itself."""
    page = (ROOT / "docs" / "howto" / "rollouts.md").read_text()
    code = re.search(r'```python title="from_vllm.py"\n(.*?)```', page, re.DOTALL)
    assert code is not None
    program: dict[str, Any] = {"__name__": "from_vllm"}
    exec(code[1], program)  # noqa: S102 (our own page's)
    of = checkpoints.made("small", tmp_path, torch.device("cpu"), lora=True)
    drawn = of.drawn(tmp_path / "drawn.jsonl", prompts=2, group=3, prompt=4, length=8, seed=1)
    loaded = load_checkpoint(of.folder)
    bound = bind(loaded.model)
    batch = read_rollouts(drawn, bound, loaded.tokenizer)
    logp = score(bound, batch, ProbeConfig()).token_logp
    with (tmp_path / "e.jsonl").open("w") as file:
        for n, text in enumerate(drawn.read_text().splitlines()):
            given = json.loads(text)
            responses = [
                SimpleNamespace(
                    token_ids=tuple(ids),
                    # beside the sampled token vLLM gives others where more are asked for
                    logprobs=[
                        {token: SimpleNamespace(logprob=float(logp[n, g, t])), 0: SimpleNamespace(logprob=-99.0)}
                        if token
                        else {token: SimpleNamespace(logprob=float(logp[n, g, t]))}
                        for t, token in enumerate(ids)
                    ],
                )
                for g, ids in enumerate(given["response_ids"])
            ]
            output = SimpleNamespace(prompt_token_ids=given["prompt_ids"], outputs=responses)
            file.write(program["line"](output, given["rewards"]) + "\n")
    read = read_rollouts(tmp_path / "e.jsonl", bound, loaded.tokenizer)
    assert torch.equal(read.ids, batch.ids)
    assert read.logprobs is not None
    found = sampler_parity(logp, read.per_prompt(read.logprobs), read.per_prompt(read.gen_mask))
    assert found.max_abs_difference < 1e-12  # of values that went through JSON unchanged
