"""The HTML page: it loads nothing, runs nothing but its own script, and reads without it."""

from __future__ import annotations

import base64
import hashlib
import re
from collections import Counter
from dataclasses import replace
from html.parser import HTMLParser

import pytest
from report_fixtures import HOSTILE_NAMES, healthy_resnet, hostile, sigmoid_chain, with_pictures

from gradlint.compare import Move, compare
from gradlint.report import render
from gradlint.report.difference import render_difference
from gradlint.report.page import fix_blocks, waterfall

_VOID = {"meta", "input", "link", "br", "img", "col", "hr"}


class _Page(HTMLParser):
    """The elements of a page: tags must nest, text is collected per element."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.texts: list[tuple[str, str]] = []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in _VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.texts.append((self.open[-1] if self.open else "", data))

    def attributes(self, name: str) -> list[str]:
        return [attributes[name] or "" for _, attributes in self.tags if name in attributes]


MOVES = tuple(Move(name, name, moved) for name, moved in zip(HOSTILE_NAMES, (0.0, 1e-9, 0.3, 1e9) * 3, strict=True))
PAGES = {
    "changed": lambda: render_difference([compare(sigmoid_chain(12), sigmoid_chain(20))], "html"),
    "hostile changed": lambda: render_difference(
        [replace(compare(hostile(), healthy_resnet()), moves=MOVES), compare(None, hostile())], "html"
    ),
}
REPORTS = {
    "sigmoid": [sigmoid_chain()],
    "resnet": [healthy_resnet()],
    "hostile": [hostile()],
    "pictures": [with_pictures(sigmoid_chain(30))],
    "two": [sigmoid_chain(3), healthy_resnet()],
}


@pytest.fixture(params=[*REPORTS, *PAGES])
def page(request: pytest.FixtureRequest) -> _Page:
    return _Page(PAGES[request.param]() if request.param in PAGES else render(REPORTS[request.param], "html"))


def test_elements_nest_and_identifiers_are_unique_and_found(page: _Page) -> None:
    assert page.open == []
    ids = Counter(page.attributes("id"))
    assert max(ids.values()) == 1
    assert {href.removeprefix("#") for href in page.attributes("href")} <= set(ids)
    assert {part for labels in page.attributes("aria-labelledby") for part in labels.split()} <= set(ids)


def test_nothing_is_loaded_and_nothing_runs_but_the_page_itself(page: _Page) -> None:
    assert {tag for tag, _ in page.tags}.isdisjoint(
        {"img", "link", "iframe", "object", "embed", "base", "form", "image"}
    )
    names = {name for _, attributes in page.tags for name in attributes}
    assert not {name for name in names if name.startswith("on") or name in ("src", "style", "xlink:href", "action")}
    assert all(href.startswith("#") for href in page.attributes("href"))
    style = "".join(text for tag, text in page.texts if tag == "style")
    assert "url(" not in style
    assert "@import" not in style


def test_the_policy_allows_the_inline_style_and_script_by_their_hashes(page: _Page) -> None:
    policy = next(a["content"] for _, a in page.tags if a.get("http-equiv") == "Content-Security-Policy") or ""
    assert policy.startswith("default-src 'none'; ")
    for tag in ("style", "script"):
        text = "".join(data for name, data in page.texts if name == tag)
        digest = base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
        assert f"{tag}-src 'sha256-{digest}'" in policy
    assert [tag for tag, _ in page.tags].count("script") == 1


def test_it_is_one_document_with_landmarks_and_headed_tables(page: _Page) -> None:
    tags = Counter(tag for tag, _ in page.tags)
    assert (tags["main"], tags["head"], tags["html"]) == (1, 1, 1)
    assert all(attributes.get("scope") in ("row", "col") for tag, attributes in page.tags if tag == "th")
    pictures = [a for tag, a in page.tags if tag == "svg" and a.get("role") == "img"]
    assert pictures
    assert all(a.get("aria-label") for a in pictures)


def test_figures_are_finite_and_on_the_axis(page: _Page) -> None:
    shares = [value for name in ("x", "width", "x1", "x2") for value in page.attributes(name) if value.endswith("%")]
    assert shares
    assert all(0 <= float(value.removesuffix("%")) <= 100 for value in shares)


def test_the_ladder_has_a_row_per_layer_and_findings_say_what_to_change() -> None:
    page = _Page(render([sigmoid_chain(30)], "html"))
    rows = [identifier for identifier in page.attributes("id") if re.fullmatch(r"m0-l\d+", identifier)]
    assert len(rows) == 60
    text = " ".join(data for _, data in page.texts)
    assert "30 Sigmoid slopes take it." in text
    assert "x = x + block(x)" in [data for tag, data in page.texts if tag == "code"]


def test_hostile_names_are_text() -> None:
    text = render([hostile()], "html")
    assert "<script>alert" not in text
    assert "<img" not in text
    page = _Page(text)
    assert HOSTILE_NAMES[0] in [data.strip() for _, data in page.texts]
    assert not re.search("[\x00-\x09\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069\ud800-\udfff]", text)


def test_deep_models_fold_by_module_and_stay_small() -> None:
    text = render([healthy_resnet(200)], "html")
    page = _Page(text)
    summaries = [attributes for tag, attributes in page.tags if tag == "summary"]
    assert len(summaries) >= 100
    assert len(text) < 3_000_000


def test_a_thousand_layers_with_pictures_stay_under_three_megabytes() -> None:
    report = with_pictures(healthy_resnet(200), each=3)
    assert len(report.layers) > 1000
    text = render([report], "html")
    assert len(text.encode()) < 3_000_000
    assert text.count("<details><summary>pictures") == 250
    assert "250 layers have them: those with findings, others at even steps" in text


def test_layers_with_findings_come_first_where_not_all_have_pictures() -> None:
    report = with_pictures(sigmoid_chain(600), each=1)
    rows = re.findall(r'<tr role="row" id="m0-l(\d+)" class="(\w+)">.*?</tr>', render([report], "html"), re.DOTALL)
    assert len(rows) == 1200
    page = _Page(render([report], "html"))
    assert [tag for tag, _ in page.tags].count("figure") == 250


def test_a_picture_is_drawn_in_its_area_and_says_what_it_shows() -> None:
    page = _Page(render([with_pictures(sigmoid_chain(1))], "html"))
    figures = [tag for tag, _ in page.tags].count("figure")
    assert figures == 6
    spoken = [a.get("aria-label") or "" for tag, a in page.tags if tag == "svg" and a.get("viewbox")]
    kinds = ("Input over the slope", "Weights ", "Gradient of ", "Gradient over the time steps", "Attention logits",
             "Entropy of the attention")  # fmt: skip
    assert all(any(text.startswith(kind) for text in spoken) for kind in kinds)
    assert any("are zero" in text for text in spoken)
    paths = [a["d"] or "" for tag, a in page.tags if tag == "path" and a.get("class") in ("bars", "curve", "shade")]
    assert paths
    assert not re.search("nan|inf|e[+-]", " ".join(paths))


def test_what_cannot_be_drawn_is_left_out() -> None:
    text = render([hostile()], "html")
    paths = re.findall(r' (?:d|transform)="([^"]*)"', text)
    assert paths
    assert not [path for path in paths if re.search("nan|inf", path)]


def test_skip_connections_are_drawn_as_arcs() -> None:
    arcs = [a for tag, a in _Page(render([healthy_resnet()], "html")).tags if tag == "path" and a.get("class") == "arc"]
    assert len(arcs) == 1 + 2 * 8  # the legend's, then a start and an end per block


def test_the_waterfall_starts_at_the_output_and_ends_in_the_sum() -> None:
    report = sigmoid_chain(50)
    steps = waterfall(report, report.findings[0])
    assert [(step.name, step.figure, step.kind) for step in steps] == [
        ("50 Sigmoid slopes", "-30.0", "loss"),
        ("50 Gemms", "+12.5", "gain"),
        ("together", "-17.5", "sum"),
    ]
    assert steps[0].start == 0
    assert steps[0].width == 100


def test_a_fix_shows_its_lines_as_code() -> None:
    text = "Scale `conv1` by 2.4. PyTorch: `w.mul_(2.4)`. Keras:\n    w.assign(2.4 * w)"
    assert fix_blocks(text) == [
        ("prose", "Scale "),
        ("word", "conv1"),
        ("prose", " by 2.4. PyTorch: "),
        ("code", "w.mul_(2.4)"),
        ("prose", " Keras:"),
        ("code", "w.assign(2.4 * w)"),
    ]
