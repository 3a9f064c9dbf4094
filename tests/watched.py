"""A trainer that writes checkpoints in pieces and deletes old ones, and a measurement that only looks whether what it
was given is whole.

Nothing but the standard library is imported: the measurement is a process that must start fast. The files are as the
formats have them, with few values.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import random
import shutil
import sys
import time
import zipfile
from pathlib import Path

PARTIAL = "WATCHED_PARTIAL"
"""The variable that names the file into which a measurement writes what it was given in part."""
TEMPLATE = "WATCHED_TEMPLATE"
"""The variable that names the report that every measurement returns."""
MARKED = ("config.json", "model.safetensors.index.json", "optimizer.pt", "trainer_state.json")
"""What a checkpoint of the Trainer is not whole without, beside the shards."""


def safetensors(seed: str, values: int) -> bytes:
    payload = hashlib.sha256(seed.encode()).digest() * values
    tensor = {"dtype": "U8", "shape": [len(payload)], "data_offsets": [0, len(payload)]}
    header = json.dumps({"weight": tensor}).encode()
    return len(header).to_bytes(8, "little") + header + payload


def archive(seed: str) -> bytes:
    """A zip archive, as torch.save writes one; the same bytes every time."""
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as packed:
        for name in ("data.pkl", "data/0"):
            packed.writestr(zipfile.ZipInfo(f"archive/{name}"), hashlib.sha256(f"{seed}{name}".encode()).digest() * 40)
    return file.getvalue()


def files_of(step: int) -> dict[str, bytes]:
    """All files of the checkpoint; those of every fourth step have one file of weights."""
    shards = [f"model-{k:05d}-of-00002.safetensors" for k in (1, 2)]
    files = {
        "config.json": json.dumps({"model_type": "llama", "step": step}).encode(),
        "optimizer.pt": archive(f"optimizer {step}"),
        "rng_state.pth": archive(f"rng {step}"),
        "tokenizer.json": b"{}",
        "trainer_state.json": json.dumps({"global_step": step}).encode(),
    }
    if step % 4 == 0:
        return files | {"model.safetensors": safetensors(f"{step}", 200)}
    index = {"weight_map": {f"layer.{k}": shard for k, shard in enumerate(shards)}}
    files["model.safetensors.index.json"] = json.dumps(index).encode()
    return files | {shard: safetensors(f"{step} {shard}", 200) for shard in shards}


def write_in_pieces(run: Path, step: int, chance: random.Random, pause: float) -> None:
    """In any order and in chunks, with short pauses; or with pauses longer than the watcher's interval, where the files
    say of themselves that they are not whole; or under another name that is changed at the end."""
    files, style = files_of(step), chance.choice(("quick", "slow", "renamed"))
    names = list(files)
    chance.shuffle(names)
    if style == "slow":  # nothing tells of a file that is optional and not there yet
        names.sort(key=lambda name: name in MARKED or name.startswith("model"))
    named = chance.choice((f"tmp-checkpoint-{step}", f".tmp_{step}", f"checkpoint-{step}.tmp"))
    final = run / f"checkpoint-{step}"
    at = run / named if style == "renamed" else final
    at.mkdir()
    for name in names:
        ends = sorted(chance.randrange(len(files[name]) + 1) for _ in range(chance.randrange(3)))
        with (at / name).open("wb") as stream:
            for begin, end in zip([0, *ends], [*ends, len(files[name])], strict=True):
                stream.write(files[name][begin:end])
                stream.flush()
                is_marked = style != "quick" and (name in MARKED or name.startswith("model"))
                time.sleep(chance.random() * (4 * pause if is_marked and chance.random() < 0.3 else 0.02 * pause))
    if at != final:
        at.rename(final)


def train(run: Path, checkpoints: int, seed: int, pause: float, log: Path) -> None:
    """Steps 1, 2, … at random times, with a limit of checkpoints that are kept; `log` has (what, step, time)."""
    chance = random.Random(seed)
    kept, limit = [], chance.randrange(2, 6)
    run.mkdir(exist_ok=True)
    for step in range(1, checkpoints + 1):
        time.sleep(chance.random() * 3 * pause)
        write_in_pieces(run, step, chance, pause)
        kept.append(step)
        note(log, "complete", step)
        while len(kept) > limit or (len(kept) > 1 and chance.random() < 0.1):
            old = kept.pop(0)
            note(log, "deleted", old)
            shutil.rmtree(run / f"checkpoint-{old}")


def note(log: Path, what: str, step: int) -> None:
    with log.open("a") as stream:
        stream.write(json.dumps([what, step, time.time()]) + "\n")


def measure(arguments: list[str]) -> int:
    """What stands for pytest: it reads every byte, and says where one is not as it was written."""
    given = dict(one.split("=", 1) for one in arguments if one.startswith("--"))
    name, _, path = given["--probe-checkpoint"].partition("=")
    step = int(name.rpartition("-")[2])
    found = {file.name: file.read_bytes() for file in Path(path).iterdir()}
    time.sleep(0.05)
    found_later = {file.name: file.read_bytes() for file in Path(path).iterdir()}
    if not found == found_later == files_of(step):
        with open(os.environ[PARTIAL], "a") as stream:
            stream.write(f"{name}: {sorted(found)}\n")
    report = json.loads(Path(os.environ[TEMPLATE]).read_text())
    report["checkpoint"] |= {"name": name, "path": path, "global_step": step}
    Path(given["--probe-json"]).write_text(json.dumps(report))
    return 0


if __name__ == "__main__":
    sys.exit(measure(sys.argv[1:]))
