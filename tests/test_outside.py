"""What a run does to the world outside: no network is asked, no checkpoint written into, no file left half written."""

from __future__ import annotations

import hashlib
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import forked
import models
from entropy_probe.demo import checkpoint_path
from rights import like_any_user

SMALL = "{'budget': 'smoke', 'batch': {'num_prompts': 2, 'num_update_prompts': 2}, "
SMALL += "'generation': {'num_return_sequences': 2, 'max_new_tokens': 4}}"
# Libraries catch what a failed request raises and go on: whoever asks leaves a mark as well.
NO_NETWORK = """
import socket
from pathlib import Path
def refuse(*args, **kwargs):
    Path("asked").write_text(repr(args))
    raise OSError("no network")
socket.socket.connect = socket.socket.connect_ex = refuse
socket.getaddrinfo = socket.create_connection = refuse
"""
MEASURE = f"""
from entropy_probe import ProbeConfig, ProbeError, run_probe
from entropy_probe.demo import checkpoint_path
run_probe(checkpoint_path(), ProbeConfig.from_mapping({SMALL}))
"""
HUB_NAME = """
import json
from pathlib import Path
from entropy_probe import ProbeError, load_checkpoint
file = Path("ckpt/adapter_config.json")
file.write_text(json.dumps(json.loads(file.read_text()) | {"base_model_name_or_path": "Qwen/Qwen2.5-0.5B"}))
try:
    load_checkpoint("ckpt")
except ProbeError as error:
    print(error)
"""
FULL_DISK = """
import resource, signal, sys
from pathlib import Path
from entropy_probe import ProbeError
from entropy_probe.atomic import write_atomically
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))
try:
    write_atomically(Path(sys.argv[1]), "x" * 10_000)
except ProbeError as error:
    print(error)
"""


def run(code: str, cwd: Path, *args: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", code, *args], cwd=cwd, capture_output=True, text=True, check=True, timeout=300
    )


def content(*folders: Path) -> dict[str, tuple[str, int]]:
    """Digest and time of every file."""
    files = [path for folder in folders for path in folder.rglob("*") if path.is_file()]
    return {str(p): (hashlib.sha256(p.read_bytes()).hexdigest(), p.stat().st_mtime_ns) for p in files}


def test_a_measurement_asks_no_network_and_writes_nothing_into_the_checkpoint(tmp_path: Path) -> None:
    folders = checkpoint_path(), checkpoint_path().parent / "base"
    before = content(*folders)
    run(NO_NETWORK + MEASURE, tmp_path)
    assert list(tmp_path.iterdir()) == []
    assert content(*folders) == before


WITHOUT_WRITING = """
import os, pytest
from entropy_probe.__main__ import main
for name in ("written", "checkpoint-100/written"):
    try:
        open(name, "w")
    except PermissionError:
        print("refused")
codes = [main(["inspect", "checkpoint-100"])]
codes += [main(["run", "checkpoint-100", "--budget", "smoke", "--out", os.devnull])]
codes += [pytest.main(["--probe-checkpoint=checkpoint-100", "--probe-budget=smoke", "-q", "probe-checks"])]
print("codes", *map(int, codes))
"""


@pytest.fixture
def read_only(tmp_path: Path) -> Iterator[Path]:
    """The demo and its base in a folder where nothing may be written."""
    place = tmp_path / "read-only"
    place.mkdir()
    for source in (checkpoint_path(), checkpoint_path().parent / "base"):
        shutil.copytree(source, place / source.name, copy_function=shutil.copyfile)
    paths = [place, *place.rglob("*")]
    for path in paths:
        path.chmod(0o555 if path.is_dir() else 0o444)
    yield place
    for path in paths:
        path.chmod(0o755)


def test_a_checkpoint_in_a_read_only_folder(read_only: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTEST_ADDOPTS", "-pno:jaxtyping -pno:cacheprovider -pno:anyio")
    before = content(read_only)
    command = [sys.executable, "-c", WITHOUT_WRITING]
    done = subprocess.run(
        command, cwd=read_only, capture_output=True, text=True, check=False, timeout=300, preexec_fn=like_any_user
    )
    assert done.stdout.count("refused") == 2
    assert done.stdout.splitlines()[-1] == "codes 0 0 0", done.stdout + done.stderr
    assert content(read_only) == before
    assert {path.name for path in read_only.iterdir()} == {"base", "checkpoint-100"}


def test_a_base_model_that_is_a_hub_name_is_not_asked_for(tmp_path: Path) -> None:
    models.adapter_checkpoint(tmp_path / "ckpt", "llama")
    done = run(NO_NETWORK + HUB_NAME, tmp_path)
    assert not (tmp_path / "asked").exists()
    (line,) = done.stdout.splitlines()
    assert "is not on disk, and nothing is downloaded; name the base model's folder" in line


@pytest.mark.parametrize("command", ["inspect", "run"])
def test_the_command_line_writes_nothing_into_the_checkpoint(tmp_path: Path, command: str) -> None:
    models.adapter_checkpoint(tmp_path / "ckpt", "llama")
    before = content(tmp_path)
    done = forked.python("-m", "entropy_probe", command, "ckpt", cwd=tmp_path)
    assert done.returncode in (0, 1), done.stderr  # a checkpoint without a tokenizer can't be sampled
    assert content(tmp_path) == before


def test_a_full_disk_leaves_the_old_file_and_no_part_of_the_new(tmp_path: Path) -> None:
    path = tmp_path / "report.json"
    path.write_text("old")
    done = run(FULL_DISK, tmp_path, str(path))
    assert done.stdout == f"{path}: cannot be written (File too large); choose another path\n"
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]
