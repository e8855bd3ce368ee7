"""The report's page in a real, headless Chromium: clicks, typing and dragging work."""

import re
import shutil
from collections.abc import Iterator
from itertools import pairwise
from typing import Any

import pytest

from experiments.report import build_report
from tests.experiments.runs import SIZES, VARIANTS, make_run

CHROMIUM = next(
    (path for name in ("chromium", "chromium-browser", "google-chrome") if (path := shutil.which(name))), None
)
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="no Chromium is installed")
PHONE = {"width": 375, "height": 700}
DESKTOP = {"width": 1200, "height": 900}


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    api = pytest.importorskip("playwright.sync_api", reason="the extra `test` is not installed: no playwright")
    with api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture(scope="module")
def address(tmp_path_factory: pytest.TempPathFactory) -> str:
    return build_report(make_run(tmp_path_factory.mktemp("run"))).as_uri()


@pytest.fixture
def page(browser: Any, address: str) -> Iterator[Any]:
    """The page, which must load nothing from elsewhere and print nothing on the console."""
    context = browser.new_context(viewport=DESKTOP, color_scheme="light")
    page = context.new_page()
    messages: list[str] = []
    page.on("console", lambda message: messages.append(message.text))
    page.on("pageerror", lambda error: messages.append(str(error)))
    page.on("request", lambda request: request.url.startswith(("file:", "data:")) or messages.append(request.url))
    page.goto(address)
    yield page
    assert messages == []
    context.close()


def background(page: Any) -> str:
    color: str = page.evaluate("getComputedStyle(document.body).backgroundColor")
    return color


def labels(page: Any) -> list[str]:
    """Labels of the visible rows, in their order."""
    texts: list[str] = page.locator(".results tbody tr:visible th").all_inner_texts()
    return texts


def test_sorting(page: Any) -> None:
    head = page.locator(".results th", has_text="Error to teacher, 256 px")
    head.get_by_role("button").click()
    assert head.get_attribute("aria-sort") == "ascending"
    column = page.locator(".results thead th").all_inner_texts().index(head.inner_text())
    keys = [
        row.locator("td").nth(column - 1).get_attribute("data-key") for row in page.locator(".results tbody tr").all()
    ]
    assert [float(k) for k in keys] == sorted(float(k) for k in keys) and len(keys) == len(VARIANTS)
    up = labels(page)
    head.get_by_role("button").focus()
    page.keyboard.press("Enter")
    assert head.get_attribute("aria-sort") == "descending" and labels(page)[0] == up[-1]
    page.locator(".results th").first.get_by_role("button").click()
    assert head.get_attribute("aria-sort") is None and labels(page) == sorted(labels(page), key=str.lower)


def test_filter(page: Any) -> None:
    box = page.get_by_label("Filter results")
    count = page.locator(".controls", has=box).get_by_role("status")
    box.fill("linear -causal")
    assert labels(page) == ["linear attention", "linear attention, not normalized"], "non-causal is another word"
    assert count.inner_text() == f"{len(labels(page))} of {len(VARIANTS)} rows"
    box.fill("nothing like this")
    assert labels(page) == [] and count.inner_text() == f"0 of {len(VARIANTS)} rows"
    box.fill("")
    assert len(labels(page)) == len(VARIANTS)


def test_factors_show_all_rows_first_and_parts_on_request(page: Any) -> None:
    rows = page.locator(".factors tbody tr:visible")
    box = page.get_by_label("Filter factors")
    first = rows.count()
    assert 0 < first < page.locator(".factors tbody tr").count()
    assert all("all rows" in text for text in rows.all_inner_texts())
    box.fill("")
    assert rows.count() == page.locator(".factors tbody tr").count() and len(labels(page)) == len(VARIANTS)


def test_the_slider_uncovers_the_teacher(page: Any) -> None:
    slider = page.locator("#split")
    slider.focus()
    page.keyboard.press("Home")
    clip = "getComputedStyle(document.getElementById('student')).clipPath"
    assert re.match(r"inset\(0px 0px 0px 0(%|px)\)|inset\(0px\)", page.evaluate(clip))
    page.keyboard.press("End")
    assert "100%" in page.evaluate(clip) and slider.get_attribute("aria-valuetext") == "100 % teacher"
    assert page.locator("#teacher").evaluate("i => i.complete && i.naturalWidth") == SIZES[0]
    page.locator("#size").select_option(str(SIZES[1]))
    page.wait_for_function("document.getElementById('teacher').naturalWidth === 128")
    before = page.locator("#student").get_attribute("src")
    button = page.locator(".wall button", has_text="LinFusion, not normalized")
    button.focus()
    page.keyboard.press("Enter")
    assert (
        button.get_attribute("aria-pressed") == "true"
        and page.locator("#name").inner_text() == "LinFusion, not normalized"
    )
    assert page.locator("#student").get_attribute("src") != before
    assert "LinFusion, not normalized, 128 px: red apple" in (page.locator("#student").get_attribute("alt") or "")


def test_light_and_dark(page: Any, browser: Any, address: str) -> None:
    light = background(page)
    page.locator("#theme").click()
    dark = background(page)
    assert dark != light and page.locator("#theme").inner_text() == "Light"
    page.reload()
    assert background(page) == dark, "the selection is stored"
    page.locator("#theme").click()
    assert background(page) == light
    with browser.new_context(color_scheme="dark") as context:
        other = context.new_page()
        other.goto(address)
        assert background(other) == dark, "without a selection, the system's"


def test_a_phone_scrolls_down_only(page: Any) -> None:
    page.set_viewport_size(PHONE)
    assert page.evaluate("document.documentElement.scrollWidth") <= PHONE["width"]
    slider = page.locator("#split").bounding_box()
    assert slider and slider["x"] >= 0 and slider["x"] + slider["width"] <= PHONE["width"]


def test_what_a_screen_reader_needs(page: Any) -> None:
    levels = [int(tag[1]) for tag in page.locator("h1, h2, h3, h4").evaluate_all("all => all.map(h => h.tagName)")]
    assert levels[0] == 1 and levels.count(1) == 1
    assert all(b - a <= 1 for a, b in pairwise(levels))
    assert page.locator("html").get_attribute("lang") == "en"
    assert page.locator("img:not([alt])").count() == 0
    unnamed = "all => all.filter(e => !e.innerText && !e.ariaLabel && !(e.labels && e.labels.length)).length"
    assert page.locator("button:visible, input:visible, select:visible").evaluate_all(unnamed) == 0
    assert page.locator(".results tbody th[scope=row]").count() == len(VARIANTS)
    page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.getAttribute('href')") == "#conclusions"
    assert page.locator("[tabindex]:not([tabindex='0'])").count() == 0


def test_without_script_there_is_a_sentence(browser: Any, address: str) -> None:
    with browser.new_context(java_script_enabled=False) as context:
        page = context.new_page()
        page.goto(address)
        assert "need JavaScript here" in page.locator("noscript").inner_text()
        assert page.locator("#viewer").is_hidden() and len(labels(page)) == len(VARIANTS)
