"""The pictures of a layer as a browser shows them: folded, named, drawn inside their place, and on the common axis."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from conftest import MODELS
from playwright.sync_api import Browser, Page, expect


@pytest.fixture
def sigmoid(pages: dict[str, str], browser: Browser) -> Iterator[Page]:
    page = browser.new_page(viewport={"width": 1280, "height": 900})
    page.goto(pages["digits_sigmoid"])
    yield page
    page.close()


def test_they_are_shown_on_demand(sigmoid: Page) -> None:
    row = sigmoid.locator(".ladder tbody tr").first
    expect(row.locator("figure").first).to_be_hidden()
    row.locator("summary").press("Enter")
    expect(row.locator("figure")).to_have_count(2)
    expect(row.locator("figure").first).to_be_visible()
    place, table = row.locator(".pictures").bounding_box(), sigmoid.locator(".ladder").bounding_box()
    assert place is not None
    assert table is not None
    assert place["width"] > 0.5 * table["width"]


def test_the_rest_of_the_row_stays_where_it_was(sigmoid: Page) -> None:
    row = sigmoid.locator(".ladder tbody tr").first
    cells = [row.locator(name) for name in ("th", ".bar", ".figure", ".k-signal")]
    before = [cell.bounding_box() for cell in cells]
    figures = row.locator(".figure").evaluate("cell => getComputedStyle(cell).paddingRight")
    row.locator("summary").click()
    after = [cell.bounding_box() for cell in cells]
    assert figures == "0px"
    assert [box and (box["x"], box["y"]) for box in after] == [box and (box["x"], box["y"]) for box in before]


@pytest.mark.parametrize("model", MODELS)
def test_each_has_a_name_and_is_drawn_inside_its_place(model: str, pages: dict[str, str], browser: Browser) -> None:
    page = browser.new_page(viewport={"width": 1280, "height": 900})
    page.goto(pages[model])
    page.evaluate("for (const part of document.querySelectorAll('details')) part.open = true")
    pictures = page.locator(".look figure svg")
    assert pictures.count() >= 3
    for name in page.locator(".look summary").all_inner_texts():
        assert name.startswith("pictures of ") or "\n" in name
    drawn = pictures.evaluate_all("""all => all.map((picture) => {
        const place = picture.getBoundingClientRect();
        const boxes = [...picture.querySelectorAll("path")].map((path) => path.getBoundingClientRect());
        return [picture.getAttribute("aria-label"), boxes.length && boxes.every((box) =>
            box.left > place.left - 3 && box.right < place.right + 3 &&
            box.top > place.top - 3 && box.bottom < place.bottom + 3 && box.width > 0 && box.height > 0)];
    })""")
    assert [name for name, inside in drawn if not name or not inside] == []
    captions = page.locator(".look figcaption").evaluate_all("all => all.every(c => c.scrollWidth <= c.clientWidth)")
    assert captions
    page.close()


def test_gradients_lie_side_by_side_on_one_axis(sigmoid: Page) -> None:
    bars = sigmoid.locator(".ridges tbody path.bars")
    assert bars.count() == 7
    ends = bars.evaluate_all("all => all.map((path) => path.getBoundingClientRect().right)")
    assert ends == sorted(ends)
    lefts = sigmoid.locator(".ridges tbody svg").evaluate_all("all => all.map(s => s.getBoundingClientRect().left)")
    assert max(lefts) - min(lefts) < 1
    sigmoid.locator(".ridges tbody a").first.click()
    expect(sigmoid.locator(".ladder tbody tr").first).to_be_in_viewport()


def test_a_recurrent_layer_shows_time(pages: dict[str, str], browser: Browser) -> None:
    page = browser.new_page()
    page.goto(pages["lstm_200"])
    page.locator(".look summary").first.click()
    expect(page.locator("figure.time .curve")).to_be_visible()
    expect(page.locator("figure.time .ends")).to_have_text("step 1step 200")
    page.close()


def test_a_thousand_layers_open_folded_and_unfold(pages: dict[str, str], browser: Browser) -> None:
    page = browser.new_page()
    page.goto(pages["deep"])
    rows = page.locator(".ladder tbody tr")
    assert rows.count() > 1000
    page.get_by_role("button", name="Unfold all").click()
    expect(rows.last).to_be_visible()
    assert page.locator(".look details[open]").count() == 0
    page.close()


def test_a_comparison_shows_both_gradients_and_how_far_weights_moved(pages: dict[str, str], browser: Browser) -> None:
    page = browser.new_page(viewport={"width": 1280, "height": 900})
    page.goto(pages["changed"])
    first = page.locator(".ladder tbody tr").first
    before, after = first.locator("rect.before").bounding_box(), first.locator("rect.value").bounding_box()
    assert before is not None
    assert after is not None
    assert before["x"] == after["x"]
    assert before["width"] > 2 * after["width"]
    expect(page.get_by_role("heading", name="Findings: new")).to_be_visible()
    expect(page.get_by_role("heading", name="How far each weight moved")).to_be_visible()
    assert page.locator(".ladder use").count() == page.locator(".ladder tbody tr").count() > 0
    page.close()
