"""How many forwards a whole run costs: `python benchmarks/passes.py`, and `--help` for sizes.

Flops of every stage are counted, and given in forwards F of the E batch. Processor time of every stage is given in FB:
a forward and backward of the same batch that is written by hand and timed in the same process, before the run and
after it. The model is a random Qwen2 with LoRA (r = 8) on all linear layers of the blocks: 35 million parameters,
vocabulary 32 000. One thread. With a few prompts the stages that do not grow with the batch weigh more than with many;
`--scaled` gives the figures of another number of prompts: what grows in proportion to it, the rest as it was measured.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "tests"))

from counted import Counter, Sizes  # noqa: E402
from entropy_probe import ProbeConfig, load_checkpoint, run_probe  # noqa: E402
from entropy_probe.cost.computation import FORWARD, GROWING, of_pass  # noqa: E402
from entropy_probe.cost.sizes import Network  # noqa: E402

_GROWS = set(GROWING) - {"evidence"}  # mostly some responses of two prompts by the plain model
ROWS = 8  # of a pass that is written by hand: `tf_batch_size`


def by_hand(model: Any, rows: list[dict[str, Any]]) -> float:
    """Seconds of processor time: Σ log p of every response, forward and backward, logits of the responses alone."""
    model.eval()
    pairs = [(row["prompt_ids"], response) for row in rows for response in row["response_ids"]]
    start = time.process_time()
    for first in range(0, len(pairs), ROWS):
        some = pairs[first : first + ROWS]
        ids = torch.tensor([prompt + response for prompt, response in some])
        length = len(some[0][1])
        logits = model(ids, use_cache=False, logits_to_keep=length + 1).logits[:, :-1]
        loss = torch.nn.functional.cross_entropy(
            logits.flatten(0, 1).float(), ids[:, -length:].flatten(), reduction="sum"
        )
        loss.backward()
    model.zero_grad(set_to_none=True)
    return time.process_time() - start


def by_stage(read: Callable[[], float], run: Callable[[Any], object]) -> dict[str, float]:
    """What `read` grows by in each stage of a run, which is given a progress callback."""
    before: dict[str, float] = {}
    found: dict[str, float] = {}

    def progress(stage: str, done: int, total: int) -> None:
        if total != 1:
            return
        if not done:
            before[stage] = read()
        elif stage in before:
            found[stage] = found.get(stage, 0.0) + read() - before.pop(stage)

    run(progress)
    return found


def scaled(of: dict[str, float], unit: float, times: float) -> dict[str, float]:
    """Units of each stage, for a batch so many times as large."""
    return {
        stage: value / unit * (1.0 if stage in _GROWS else 1.0 / times)
        for stage, value in of.items()
    }


def main() -> None:
    parser = argparse.ArgumentParser(description="Forwards that a whole run costs.")
    parser.add_argument("--prompts", type=int, default=16)
    parser.add_argument("--group", type=int, default=8)
    parser.add_argument("--prompt-tokens", type=int, default=100)
    parser.add_argument("--tokens", type=int, default=200)
    parser.add_argument("--budget", default="standard")
    parser.add_argument("--scaled", type=int, help="give the figures of so many prompts")
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--hidden", type=int, default=384)
    parser.add_argument("--vocabulary", type=int, default=32_000)
    parser.add_argument(
        "--full", action="store_true", help="train all parameters instead of LoRA's"
    )
    parser.add_argument("--share-prompts", default="auto", help="`never` reads whole rows")
    parser.add_argument("--only", choices=("flops", "time"), help="measure one of the two")
    given = parser.parse_args()
    torch.set_num_threads(1)
    sizes = Sizes(
        given.hidden, 3 * given.hidden, given.layers, given.vocabulary, not given.full, given.prompts, given.prompts,
        given.group, given.prompt_tokens, given.tokens,
    )  # fmt: skip
    config = ProbeConfig.from_mapping(
        {
            "budget": given.budget,
            "share_prompts": given.share_prompts,
            "batch": {"num_prompts": given.prompts, "num_update_prompts": given.prompts},
            "generation": {"num_return_sequences": given.group, "max_new_tokens": given.tokens},
        }
    )
    times = (given.scaled or given.prompts) / given.prompts
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        checkpoint = load_checkpoint(sizes.checkpoint(folder))
        e, u = sizes.files(folder)
        rows = [json.loads(line) for line in e.read_text().splitlines()]
        network = Network.of(checkpoint.model)
        size = (
            f"{network.parameters / 1e6:.1f} M parameters, {network.trainable / 1e6:.2f} M trained"
        )
        print(
            f"{size}, {given.prompts} prompts, {given.group} responses, budget {given.budget}",
            flush=True,
        )

        def run(progress: Any) -> object:
            return run_probe(checkpoint, config, e, u, progress=progress)

        if given.only != "flops":
            hand = [by_hand(checkpoint.model, rows) for _ in range(2)]
            seconds = by_stage(time.process_time, run)
            hand += [by_hand(checkpoint.model, rows) for _ in range(2)]
            hand = min(hand[1:])
            print(f"one forward and backward by hand: {hand:.2f} s")
            show("forward-and-backwards in time", scaled(seconds, hand, times))
        if given.only != "time":
            counter = Counter()
            with counter:
                counted = by_stage(lambda: counter.flops, run)
            length = given.prompt_tokens + given.tokens
            forward = of_pass(network, FORWARD, given.prompts * given.group, length, given.tokens)
            show("forwards in flops", scaled(counted, forward, times))


def show(title: str, of: dict[str, float]) -> None:
    print(f"{title}: {sum(of.values()):.2f}")
    for stage, value in of.items():
        if value >= 0.005:
            print(f"  {stage:16} {value:6.2f}")


if __name__ == "__main__":
    main()
