"""`make fuzz`: thousands of broken inputs; each is read, or refused by a `ProbeError`. Prints how many there were.

`python tests/fuzz/run.py --inputs 100000 --seed 7` tries others. A failure is shrunk to the smallest input that shows
it, and ends the run with exit code 1.
"""

from __future__ import annotations

import argparse
import faulthandler
import os
import sys
import tempfile
import time
import warnings
from pathlib import Path

import torch
from hypothesis import HealthCheck, given, seed, settings

sys.path.insert(0, str(Path(__file__).parent.parent))
from fuzz.targets import Target, targets

MOST_SECONDS = 60
"""For one input, before the process says where it is and ends."""


def fuzz(target: Target, count: int, seed_of_run: int) -> int:
    """Try `count` inputs or a few more; how many it were. Raises what a reader raised on the smallest of them."""
    tried = 0

    @seed(seed_of_run)
    @settings(max_examples=count, deadline=None, database=None, suppress_health_check=list(HealthCheck))
    @given(target.inputs)
    def one(content: object) -> None:
        nonlocal tried
        tried += 1
        faulthandler.dump_traceback_later(MOST_SECONDS, exit=True)
        target.read(content)

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            one()
    finally:
        faulthandler.cancel_dump_traceback_later()
    return tried


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--inputs", type=int, default=10_500)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", default="")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    total, failed = 0, 0
    with tempfile.TemporaryDirectory() as place:
        chosen = {name: target for name, target in targets(Path(place)).items() if arguments.only in name}
        os.chdir(place)  # a payload would leave its marker here
        for name, target in chosen.items():
            start = time.perf_counter()
            try:
                count = fuzz(target, max(1, int(arguments.inputs * target.share)), arguments.seed)
            except Exception:
                failed += 1
                sys.excepthook(*sys.exc_info())
                continue
            total += count
            print(f"{name}: {count} inputs, {time.perf_counter() - start:.0f} s", flush=True)
            assert not Path("executed").exists()
    print(f"{total} inputs, {failed} targets failed")
    return int(failed > 0)


if __name__ == "__main__":
    sys.exit(main())
