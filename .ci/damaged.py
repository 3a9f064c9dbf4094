"""Damaged copies of the demo, against an installed wheel: exit 1, one line with file and remedy, no traceback.

`python damaged.py PYTEST` runs in an empty folder, with the Python that the wheel is installed in.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from entropy_probe.demo import checkpoint_path


def one_nan(folder: Path) -> None:
    path = folder / "adapter_model.safetensors"
    tensors = load_file(path)
    next(iter(tensors.values())).view(-1)[0] = float("nan")
    save_file(tensors, path, metadata={"format": "pt"})


def moment_removed(folder: Path) -> None:
    content = torch.load(folder / "optimizer.pt", weights_only=True)
    del content["state"][5]["exp_avg_sq"]
    torch.save(content, folder / "optimizer.pt")


def optimizer_of_another_model(folder: Path) -> None:
    module = torch.nn.Linear(3, 3)
    optimizer = torch.optim.AdamW(module.parameters())
    module(torch.ones(1, 3)).sum().backward()
    optimizer.step()
    torch.save(optimizer.state_dict(), folder / "optimizer.pt")


DAMAGE: dict[str, tuple[Callable[[Path], None], str, str]] = {
    "nan": (one_nan, "adapter_model.safetensors: ", "; use an earlier checkpoint"),
    "moment": (moment_removed, "optimizer.pt: ", "; use a checkpoint of Adam or AdamW"),
    "other": (
        optimizer_of_another_model,
        "optimizer.pt: ",
        "; use the optimizer saved with this model",
    ),
}


def main(pytest: str) -> int:
    failed = 0
    for name, (damage, file, remedy) in DAMAGE.items():
        work = Path(name)
        folder = Path(shutil.copytree(checkpoint_path(), work / "checkpoint-100"))
        shutil.copytree(checkpoint_path().parent / "base", work / "base")
        damage(folder)
        command = [pytest, f"--probe-checkpoint={folder}", "-m", "acceptance"]
        done = subprocess.run(command, capture_output=True, text=True, check=False)  # noqa: S603
        output = done.stdout + done.stderr
        lines = [line for line in output.splitlines() if file in line and remedy in line]
        good = (
            done.returncode == 1
            and bool(lines)
            and "Traceback" not in output
            and "Error\n" not in output
        )
        print(f"damaged copy ({name}): exit {done.returncode}: {lines[0] if lines else output}")
        failed += not good
    print(f"{len(DAMAGE) - failed} passed, {failed} failed")
    return int(failed > 0)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
