"""The page as a browser shows it: it loads nothing, its controls work, and it reads with its script switched off."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import pytest
from axe_playwright_python.sync_playwright import Axe
from conftest import MODELS
from playwright.sync_api import Browser, Page, expect

Scheme = Literal["light", "dark"]


def _open(browser: Browser, address: str, **settings: object) -> Page:
    page = browser.new_context(**settings).new_page()  # type: ignore[arg-type]
    page.goto(address)
    return page


@pytest.mark.parametrize("model", [*MODELS, "all", "changed", "deep", "hostile"])
def test_it_loads_nothing_and_complains_of_nothing(model: str, pages: dict[str, str], browser: Browser) -> None:
    page = browser.new_page()
    requests: list[str] = []
    complaints: list[str] = []
    page.on("request", lambda request: requests.append(request.url))
    page.on("console", lambda message: complaints.append(message.text))
    page.on("pageerror", lambda error: complaints.append(str(error)))
    page.goto(pages[model], wait_until="networkidle")
    assert requests == [pages[model]]
    assert complaints == []
    expect(page.locator("h1").first).to_be_visible()
    page.close()


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [390, 1280])
@pytest.mark.parametrize("model", ["digits_sigmoid", "resnet_bn", "all", "changed", "hostile"])
def test_axe_finds_no_barrier(model: str, width: int, scheme: Scheme, pages: dict[str, str], browser: Browser) -> None:
    page = _open(browser, pages[model], bypass_csp=True, color_scheme=scheme, viewport={"width": width, "height": 900})
    page.evaluate("for (const part of [...document.querySelectorAll('.look details')].slice(0, 6)) part.open = true")
    found = Axe().run(page)
    assert [violation["id"] for violation in found.response["violations"]] == []
    page.context.close()


@pytest.mark.parametrize("width", [390, 1280])
@pytest.mark.parametrize("model", ["sigmoid_chain_50", "lstm_200", "changed", "hostile"])
def test_nothing_runs_over_the_edge(model: str, width: int, pages: dict[str, str], browser: Browser) -> None:
    page = _open(browser, pages[model], viewport={"width": width, "height": 900})
    page.evaluate("for (const part of document.querySelectorAll('details')) part.open = true")
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    page.context.close()


@pytest.mark.parametrize("width", [390, 1280])
@pytest.mark.parametrize("model", ["digits_sigmoid", "changed"])
def test_the_axis_stands_over_its_bars(model: str, width: int, pages: dict[str, str], browser: Browser) -> None:
    page = _open(browser, pages[model], viewport={"width": width, "height": 900})
    boxes = [page.locator(f".ladder {place} svg").first.bounding_box() for place in (".scale .bar", "tbody .bar")]
    scale, bar = ((round(box["x"]), round(box["width"])) for box in boxes if box)
    assert scale == bar


def test_the_dark_page_is_dark(pages: dict[str, str], browser: Browser) -> None:
    shades = {}
    for scheme in ("light", "dark"):
        page = _open(browser, pages["digits_sigmoid"], color_scheme=scheme)
        color = page.evaluate(
            "getComputedStyle(document.documentElement).backgroundColor + getComputedStyle(document.body).color"
        )
        shades[scheme] = color
        page.context.close()
    assert shades["light"] != shades["dark"]


def test_levels_are_filtered(pages: dict[str, str], browser: Browser) -> None:
    page = _open(browser, pages["sigmoid_chain_50"])
    boxes = page.locator(".filters input")
    assert boxes.count() >= 2
    for index in range(boxes.count()):
        level = boxes.nth(index).get_attribute("value")
        groups = page.locator(f'.findings > .group[data-level="{level}"]')
        expect(groups.first).to_be_visible()
        boxes.nth(index).uncheck()
        expect(groups.first).to_be_hidden()
    page.context.close()


def test_weights_are_sorted_both_ways(pages: dict[str, str], browser: Browser) -> None:
    page = _open(browser, pages["digits_sigmoid"])
    page.locator(".weights summary").click()
    head = page.locator(".sortable th.n").first
    for order in ("ascending", "descending"):
        head.locator("button").click()
        expect(head).to_have_attribute("aria-sort", order)
        column = head.evaluate("cell => cell.cellIndex")
        texts = page.locator(f".sortable tbody tr > :nth-child({column + 1})").all_inner_texts()
        figures = [float(text) for text in texts]
        assert figures == sorted(figures, reverse=order == "descending")
    page.context.close()


def test_a_fix_is_copied(pages: dict[str, str], browser: Browser) -> None:
    page = _open(browser, pages["digits_sigmoid"], permissions=["clipboard-read", "clipboard-write"])
    code = page.locator(".fixes pre").first
    code.locator("button").click()
    expect(code.locator("button")).to_have_text("Copied")
    assert page.evaluate("navigator.clipboard.readText()") == code.locator("code").inner_text()
    page.context.close()


def test_groups_fold_all_at_once(pages: dict[str, str], browser: Browser) -> None:
    page = _open(browser, pages["resnet_bn"])
    parts, button = page.locator(".ladder details.part"), page.locator(".ladder h2 button")
    if button.inner_text() == "Unfold all":
        button.click()
    assert page.locator(".ladder details.part[open]").count() == parts.count() > 0
    button.click()
    assert page.locator(".ladder details.part[open]").count() == 0
    expect(button).to_have_text("Unfold all")
    page.context.close()


def test_columns_are_switched(pages: dict[str, str], browser: Browser) -> None:
    page = _open(browser, pages["digits_sigmoid"])
    expect(page.locator("td.k-signal").first).to_be_visible()
    page.locator("input.s-signal").uncheck()
    expect(page.locator("td.k-signal").first).to_be_hidden()
    page.context.close()


def test_it_prints(pages: dict[str, str], browser: Browser, tmp_path: Path) -> None:
    page = _open(browser, pages["digits_sigmoid"])
    page.emulate_media(media="print")
    expect(page.locator(".switches")).to_be_hidden()
    page.pdf(path=tmp_path / "page.pdf")
    assert (tmp_path / "page.pdf").read_bytes().startswith(b"%PDF")
    page.context.close()


def test_it_reads_without_its_script(pages: dict[str, str], browser: Browser) -> None:
    page = _open(browser, pages["digits_sigmoid"], java_script_enabled=False)
    expect(page.locator(".ladder tbody tr").first).to_be_visible()
    assert page.locator(".ladder tbody tr").count() >= 13
    expect(page.locator(".findings .card .message").first).to_be_visible()
    expect(page.locator(".fixes pre code").first).to_be_visible()
    page.locator(".look summary").first.click()
    expect(page.locator(".look figure").first).to_be_visible()
    assert page.locator("button:visible").count() == 0
    page.context.close()
