"""The report in a real browser: it renders, sorts and filters, on a desk and on a phone."""

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from evaluation.__main__ import main

CHROMIUM = next(
    (found for name in ("chromium", "chromium-browser", "google-chrome") if (found := shutil.which(name))), None
)


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory, tiny_lm: Path) -> Path:
    """Two tasks, one of which has published rows, with awkward names and texts."""
    from tests.evaluation.conftest import make_texts

    folder = tmp_path_factory.mktemp("report")
    documents = folder / "documents.jsonl"
    documents.write_text(
        "".join(json.dumps({"text": f"<b>{i}</b> & {text}"}) + "\n" for i, text in enumerate(make_texts(40)))
    )
    systems = folder / "systems.yaml"
    systems.write_text(
        "- {name: other document, system: other}\n- {name: nothing, system: empty}\n"
        f"- {{name: '<i>AR</i> & \"T=1\"', system: 'hf:{tiny_lm}', unconditional: 2}}\n"
        f"- {{name: AR T=0.5, system: 'hf:{tiny_lm}', sampling: {{temperature: 0.5}}}}\n"
    )
    arguments = ["run", "--systems", str(systems), "--output", str(folder / "out"), "--prompts", "3", "--device", "cpu"]
    arguments += ["--metrics", "rouge,diversity,perplexity", "--judge", str(tiny_lm)]
    for name in ("wikipedia", "mine"):
        task = folder / f"{name}.yaml"
        task.write_text(f"name: {name}\nsource: {documents}\nn: 10\nmin_tokens: 20\nreference_tokenizer: {tiny_lm}\n")
        arguments += ["--task", str(task)]
    main(arguments)
    return folder / "out" / "report.html"


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    if CHROMIUM is None:
        pytest.skip("no Chromium on this machine (apt-get install chromium)")
    with playwright.sync_playwright() as running:
        chromium = running.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield chromium
        chromium.close()


@pytest.fixture
def page(browser: Any, report: Path) -> Iterator[Any]:
    """The report as a file in a window that sees no network; fails on an error in the console."""
    context = browser.new_context(viewport={"width": 1280, "height": 900}, offline=True)
    page = context.new_page()
    errors: list[str] = []
    page.on("console", lambda message: errors.append(message.text) if message.type in ("error", "warning") else None)
    page.on("pageerror", lambda error: errors.append(str(error)))
    page.on("requestfailed", lambda request: errors.append(request.url))
    page.goto(report.as_uri())
    yield page
    assert errors == []
    context.close()


def names(page: Any, table: int = 0) -> list[str]:
    """Systems of the rows that are shown, from the top."""
    rows = page.locator("table.scores").nth(table).locator("tbody tr:visible td:first-child")
    return [text.strip() for text in rows.evaluate_all("cells => cells.map(c => c.childNodes[0].textContent)")]


def values(page: Any, column: int, table: int = 0) -> list[float]:
    cells = page.locator("table.scores").nth(table).locator(f"tbody tr:visible td:nth-child({column + 1})")
    sorts = cells.evaluate_all("cells => cells.map(c => c.dataset.sort)")
    return [float(value) if value else float("nan") for value in sorts]


def test_renders(page: Any) -> None:
    assert page.locator("table.scores").count() == 3 and page.locator("h1").inner_text().startswith("Continuations of")
    assert names(page)[:6] == ["human", "shuffled", "other document", "nothing", '<i>AR</i> & "T=1"', "AR T=0.5"]
    assert page.locator("tr.groups th").all_inner_texts() == ["", "wikipedia", "mine"]
    assert page.locator("img").evaluate_all("images => images.every(i => i.complete && i.naturalWidth > 300)")
    assert page.locator("tr.published").count() == 7 and "published" in page.locator("tr.published").first.inner_text()
    assert page.locator("article b", has_text="worst: ROUGE-L").count() == 8
    assert "<b>" in page.locator(".prefix").first.inner_text()  # a text's own mark-up is text


def test_sorts_by_any_column_with_gaps_last(page: Any) -> None:
    heading = page.locator("table.scores").first.locator("tr.headings button").nth(1)
    heading.click()
    first = values(page, 1)
    assert first == sorted(first) and len(first) == 13
    heading.click()
    assert values(page, 1) == sorted(first, reverse=True)
    mine = page.locator("table.scores").first.locator("tr.headings button").nth(4)
    mine.click()
    shown = values(page, 4)
    known = [value for value in shown if value == value]
    assert known == sorted(known) and shown[len(known) :] and all(value != value for value in shown[len(known) :])
    page.locator("table.scores").first.locator("tr.headings button").first.click()
    assert names(page) == sorted(names(page), key=str.lower)


def test_filters_by_name_and_kind(page: Any) -> None:
    page.fill("#name", "ar t=")
    assert names(page) == names(page, 1) == ["AR T=0.5"]
    assert set(page.locator(".text[data-system]:visible").evaluate_all("all => all.map(e => e.dataset.system)")) == {
        "AR T=0.5"
    }
    page.fill("#name", "")
    page.uncheck("#sanity")
    page.uncheck("#published")
    assert names(page) == ['<i>AR</i> & "T=1"', "AR T=0.5"]
    page.check("#sanity")
    assert len(names(page)) == 6


@pytest.mark.parametrize("width", [1280, 390])
def test_nothing_runs_out_of_the_window(page: Any, width: int) -> None:
    page.set_viewport_size({"width": width, "height": 800})
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    first = page.locator("table.scores tbody td").first.bounding_box()
    assert first["width"] < 0.45 * width and first["height"] < 90
    assert float(page.evaluate("getComputedStyle(document.querySelector('td')).fontSize").removesuffix("px")) >= 12
