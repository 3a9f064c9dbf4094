"""Draws docs/run.svg, the picture in the README, from a real run: `python docs/picture.py` (or `make picture`).

The run happens on a pseudo-terminal of 80 columns; what it printed is drawn as it is, colours included.
"""

from __future__ import annotations

import io
import os
import pty
import re
import subprocess
import sys
import tempfile
from pathlib import Path

from rich.console import Console
from rich.terminal_theme import TerminalTheme
from rich.text import Text

COLUMNS = 80
ARGUMENTS = [
    "--probe-checkpoint=demo",
    "-m",
    "acceptance",
    "-p",
    "no:cacheprovider",
    "-p",
    "no:benchmark",
]
BACKGROUND, FOREGROUND = (24, 26, 31), (208, 211, 216)
THEME = TerminalTheme(
    BACKGROUND,
    FOREGROUND,
    [
        BACKGROUND,
        (224, 108, 117),
        (126, 190, 110),
        (214, 174, 98),
        (97, 160, 230),
        (190, 120, 210),
        (86, 182, 194),
        FOREGROUND,
    ],
)
# rich's own template loads its font from the web; this one asks for what the reader has.
TEMPLATE = """<svg viewBox="0 0 {width} {height}" xmlns="http://www.w3.org/2000/svg">
<style>
.{unique_id}-matrix {{ font-family: ui-monospace, Menlo, Consolas, "DejaVu Sans Mono", monospace;
  font-size: {char_height}px; line-height: {line_height}px; }}
{styles}
</style>
<defs><clipPath id="{unique_id}-clip-terminal"><rect x="0" y="0" width="{terminal_width}" height="{terminal_height}"/>
</clipPath>{lines}</defs>
<rect fill="#181a1f" width="{width}" height="{height}" rx="8"/>
<g transform="translate(9, 12)" clip-path="url(#{unique_id}-clip-terminal)">{backgrounds}
<g class="{unique_id}-matrix">{matrix}</g></g>
</svg>
"""


def run_on_a_terminal(command: list[str], folder: str) -> str:
    """What the command prints to a terminal of 80 columns."""
    parent, child = pty.openpty()
    environment = {
        **os.environ,
        "COLUMNS": str(COLUMNS),
        "TERM": "xterm-256color",
        "PY_COLORS": "1",
    }
    with subprocess.Popen(  # noqa: S603
        command, cwd=folder, stdout=child, stderr=subprocess.DEVNULL, env=environment
    ) as process:
        os.close(child)
        printed = b""
        while True:
            try:
                chunk = os.read(parent, 65536)
            except OSError:  # how a pseudo-terminal says that its other end is closed
                break
            if not chunk:
                break
            printed += chunk
        if process.wait() != 0:
            raise SystemExit(printed.decode())
    os.close(parent)
    return printed.decode().replace("\r\n", "\n")


def main() -> None:
    pytest = str(Path(sys.executable).with_name("pytest"))
    with tempfile.TemporaryDirectory() as folder:
        output = run_on_a_terminal([pytest, *ARGUMENTS], folder)
    lines = [
        line.strip("\r").rpartition("\r")[2] for line in output.split("\n")
    ]  # what "collecting ..." was overwritten with
    kept = [
        line for line in lines if not re.match(r"(platform|rootdir:|plugins:|configfile:)", line)
    ]
    text = "$ pytest --probe-checkpoint=demo -m acceptance\n" + "\n".join(kept)
    text = re.sub(r"demo \(.*?\)", "demo", text)
    console = Console(record=True, width=COLUMNS, file=io.StringIO(), legacy_windows=False)
    console.print(Text.from_ansi(text))
    target = Path(__file__).with_name("run.svg")
    svg = console.export_svg(theme=THEME, code_format=TEMPLATE, unique_id="run")
    target.write_text(svg, encoding="utf-8")
    print(f"{target.name}: {len(svg) // 1024} KiB")


if __name__ == "__main__":
    main()
