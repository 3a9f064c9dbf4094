"""Pages in Chromium without a window, opened from disk: no complaint, no request, all is drawn and works.

Skipped where no Chromium is installed; what needs none is in `test_page.py`.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

import chromium
from chromium import Browser
from entropy_probe.page.contents import Checkpoint
from entropy_probe.page.writing import write_page
from pages import HOSTILE, UNLOADED

pytestmark = pytest.mark.skipif(chromium.PROGRAM is None, reason="no Chromium is installed")

DRAWN = """[...document.querySelectorAll("figure svg")].map(svg => {
  const box = svg.getBoundingClientRect(), marks = svg.querySelectorAll("path, use").length;
  return [box.width, box.height, marks, svg.querySelectorAll("text").length];
})"""
OUTSIDE = """[...document.querySelectorAll("body *")].filter(e =>
  e.getBoundingClientRect().right > innerWidth + 1 && !e.closest(".scroll") && !e.closest("svg")
).map(e => e.outerHTML.slice(0, 200))"""
PALE = """[...document.querySelectorAll("figure svg text")].filter(e =>
  getComputedStyle(e).fill === getComputedStyle(document.body).backgroundColor).length"""


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with chromium.browser() as browser:
        yield browser


@pytest.fixture(scope="module")
def places(three: list[Checkpoint], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Of three checkpoints and one that does not load; of that alone; of ten; of a run without own prompts."""
    folder = tmp_path_factory.mktemp("browser")
    report = three[0].report
    assert report is not None
    batch = report.batch.model_copy(update={"prompts_are_builtin": True})
    chosen = replace(three[0], report=report.model_copy(update={"batch": batch}))
    ten = [replace(three[k % 3], name=f"checkpoint-{k}", step=k) for k in range(10)]
    runs = {"three": [*three, UNLOADED], "unloaded": [UNLOADED], "ten": ten, "not chosen": [chosen]}
    for name, checkpoints in runs.items():
        write_page(folder / f"{name}.html", checkpoints)
    return {name: folder / f"{name}.html" for name in runs}


@pytest.mark.parametrize(("name", "figures"), [("three", 26), ("unloaded", 0), ("ten", 82), ("not chosen", 8)])
def test_it_opens_and_draws(browser: Browser, places: dict[str, Path], name: str, figures: int) -> None:
    path = places[name]
    assert path.stat().st_size < 3_000_000
    for width, dark in ((400, True), (1400, False)):
        browser.open(path, width, dark=dark)
        assert browser.complaints == []
        assert browser.requests == [path.resolve().as_uri()]
        assert browser.run("document.title") != "taken"
        drawn = browser.run(DRAWN)
        assert len(drawn) == figures
        for wide, high, marks, texts in drawn:
            assert 300 <= wide <= 561
            assert high >= 100
            assert marks >= 5
            assert texts >= 4
        assert browser.run("document.documentElement.scrollWidth") == width, browser.run(OUTSIDE)
        assert browser.run(OUTSIDE) == []
        assert browser.run(PALE) == 0
        assert browser.run('document.querySelector(".verdict").getBoundingClientRect().bottom') < 900
        background = browser.run("getComputedStyle(document.body).backgroundColor")
        assert background == ("rgb(20, 23, 27)" if dark else "rgb(255, 255, 255)")


def test_a_hostile_prompt_is_shown_as_text(browser: Browser, places: dict[str, Path]) -> None:
    browser.open(places["three"], 1400)
    assert HOSTILE in browser.run('document.querySelector("#checkpoint-0-responses-table").textContent')
    assert browser.run("document.images.length") == 0
    assert browser.run("document.scripts.length") == 1


def test_a_foreign_script_would_not_run(browser: Browser, places: dict[str, Path], tmp_path: Path) -> None:
    """Were something left unescaped, the page's policy would still stop it; and the listener above sees it."""
    text = places["unloaded"].read_text(encoding="utf-8")
    poisoned = tmp_path / "poisoned.html"
    poisoned.write_text(text.replace("<main", f"{HOSTILE}<script>document.title = 'taken'</script><main"))
    browser.open(poisoned, 1400)
    assert browser.run("document.title") != "taken"
    assert browser.complaints != []


def test_tables_are_sorted_by_keyboard(browser: Browser, places: dict[str, Path]) -> None:
    browser.open(places["ten"], 1400)
    column = """[...document.querySelectorAll("#checkpoints tbody tr")].map(row => Number(row.cells[2].dataset.sort))"""
    focus = 'document.querySelectorAll("#checkpoints thead button")[2].focus()'
    head = 'document.querySelectorAll("#checkpoints thead th")[2].getAttribute("aria-sort")'
    given = browser.run(column)
    for key, order, reverse in (("Enter", "descending", True), (" ", "ascending", False)):
        browser.run(focus)
        browser.press(key, 13 if key == "Enter" else 32)
        assert browser.run(head) == order
        assert browser.run(column) == sorted(given, reverse=reverse)
    assert given != sorted(given)
    names = """[...document.querySelectorAll("#checkpoints tbody tr")].map(row => row.cells[0].textContent)"""
    browser.run('document.querySelectorAll("#checkpoints thead button")[0].click()')
    assert browser.run(names) == sorted(browser.run(names), reverse=True)


def test_what_is_missing_is_sorted_last(browser: Browser, places: dict[str, Path]) -> None:
    browser.open(places["three"], 1400)
    names = """[...document.querySelectorAll("#checkpoints tbody tr")].map(row => row.cells[0].textContent)"""
    for _ in range(2):
        browser.run('document.querySelectorAll("#checkpoints thead button")[2].click()')
        assert browser.run(names)[-1] == UNLOADED.name


def test_criteria_are_filtered(browser: Browser, places: dict[str, Path]) -> None:
    browser.open(places["three"], 1400)
    table = "#checkpoint-2-criteria-table"
    shown = f'[...document.querySelectorAll("{table} tbody tr")].filter(r => !r.hidden).map(r => r.dataset.status)'
    assert set(browser.run(shown)) == {"pass", "fail", "inconclusive", "not_applicable"}
    filters = "document.querySelector('[data-table=checkpoint-2-criteria-table]')"
    browser.run(
        f"{{const s = {filters}.querySelector('select'); s.value = 'fail'; s.dispatchEvent(new Event('change'))}}"
    )
    assert browser.run(shown) == ["fail"]
    typed = (
        f"{{const i = {filters}.querySelector('input'); i.value = 'nothing so'; i.dispatchEvent(new Event('input'))}}"
    )
    browser.run(typed)
    assert browser.run(shown) == []
    assert browser.run(f"{filters}.querySelector('output').textContent").startswith("0 of ")


def test_links_lead_to_each_checkpoint(browser: Browser, places: dict[str, Path]) -> None:
    browser.open(places["ten"], 1400)
    links = browser.run("""[...document.querySelectorAll("#checkpoints a")].map(a =>
      [a.textContent, document.querySelector(a.getAttribute("href")).querySelector("h2").textContent])""")
    assert [name for name, _ in links] == [f"checkpoint-{k}" for k in range(10)]
    assert all(name == heading for name, heading in links)


def test_all_is_open_in_print(browser: Browser, places: dict[str, Path]) -> None:
    browser.open(places["not chosen"], 1400)
    closed = 'document.querySelectorAll("details:not([open])").length'
    before = browser.run(closed)
    assert before > 0
    browser.run('dispatchEvent(new Event("beforeprint"))')
    assert browser.run(closed) == 0
    browser.run('dispatchEvent(new Event("afterprint"))')
    assert browser.run(closed) == before
    assert len(browser.call("Page.printToPDF")["data"]) > 20_000


def test_it_reads_without_a_script(browser: Browser, places: dict[str, Path]) -> None:
    browser.call("Emulation.setScriptExecutionDisabled", value=True)
    try:
        browser.open(places["three"], 400)
        assert browser.complaints == []
        assert browser.run('[...document.querySelectorAll(".filter")].filter(f => f.offsetParent).length') == 0
        assert browser.run('document.querySelectorAll("th button").length') == 0
        assert browser.run('document.querySelector("#checkpoint-2-failures").offsetHeight') > 0
    finally:
        browser.call("Emulation.setScriptExecutionDisabled", value=False)
