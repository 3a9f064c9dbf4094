"""How often another seed draws the same responses: as often as `seeded` says, counted over many seeds."""

from __future__ import annotations

import math
import re

import pytest
import torch

from entropy_probe import ProbeConfig, ProbeReport, load_checkpoint, run_probe
from entropy_probe.demo import checkpoint_path
from entropy_probe.model.forward import bind
from entropy_probe.report import SamplingSection
from entropy_probe.stages.responses.sampling import Stream, sample
from entropy_probe_checks.criteria import CRITERIA

SEEDS = 400


@pytest.fixture(scope="module")
def report() -> ProbeReport:
    """Two responses of one token, whose first two prompts come again now and then."""
    generation = {"max_new_tokens": 1, "num_return_sequences": 2, "temperature": 2.0}
    return run_probe(checkpoint_path(), config=ProbeConfig.from_mapping({"budget": "smoke", "generation": generation}))


def test_chance_repeats_the_responses_as_often_as_it_says(report: ProbeReport) -> None:
    again = report.model_copy(update={"sampling": SamplingSection(same_seed=1.0, other_seed=1.0)})
    again = again.with_evidence(report.evidence)
    verdict = CRITERIA["seeded"](again)
    said = re.search(r"with probability ([\d.e-]+)", verdict.hint)
    assert verdict.status == "inconclusive"
    assert said is not None
    assert "allow_inconclusive" in verdict.hint
    chance = float(said[1])

    loaded = load_checkpoint(checkpoint_path())
    assert report.evidence is not None
    arrays = report.evidence.arrays
    starts, ids = arrays["e.prompt_lens"][:4], arrays["e.ids"][:4]
    prompts = [ids[n, : starts[n]].tolist() for n in (0, 2)]
    drawn = [row[start : start + 1].tolist() for row, start in zip(ids, starts, strict=True)]
    bound = bind(loaded.model)
    found = 0
    with torch.no_grad():
        for seed in range(SEEDS):
            found += drawn == sample(
                bound, prompts, num_return_sequences=2, temperature=2.0, top_p=1.0, max_new_tokens=1, eos_ids=[],
                noise=Stream.of(seed, 2), gen_batch_size=4,
            )  # fmt: skip
    assert 0.02 < chance < 0.98  # else nothing is counted
    assert abs(found / SEEDS - chance) <= 4 * math.sqrt(chance * (1 - chance) / SEEDS), (found, chance)
