"""Pictures of a layer as SVG paths: bars of a histogram, a curve over them, a shaded part."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from gradlint.report.ladder import Rung
from gradlint.report.text import count, decades, figure, label
from gradlint.results import Picture

# The drawing area: every picture is that many units wide and high, stretched to its place by the page.
WIDE, HIGH = 256, 100
# Layers with pictures on a page: those with findings, then others at even steps. More would make it too large.
_MOST = 250
_FLAT = 0.05  # share of the largest slope under which a unit is saturated
_LARGEST = 1e38  # float32 holds no more
_THIN = 3.0  # units that the narrowest histogram takes
_REACH = 2.6  # standard deviations of an initialisation that are shown


@dataclass(frozen=True)
class Drawing:
    """One picture: paths in the drawing area, the ends of its axis, and what it says in words.

    bars are drawn under `place`, a transformation of their own units (a bin wide, HIGH high).
    """

    kind: str
    title: str
    note: str
    left: str
    right: str
    bars: str = ""
    place: str = ""
    shade: str = ""
    curve: str = ""

    @property
    def spoken(self) -> str:
        return f"{self.title}: {self.note}; from {self.left} to {self.right}" if self.note else self.title


@dataclass(frozen=True)
class Ridge:
    """The gradient of one weight on the axis that all of them share."""

    name: str
    layer: str
    bars: str
    place: str
    middle: str
    note: str


def drawings(rung: Rung) -> list[Drawing]:
    """The pictures of a layer; those that hold no number that can be drawn are left out."""
    return [drawn for picture in rung.row.pictures or () if (drawn := _drawing(picture)) is not None]


def pictured(ladder: Sequence[Rung]) -> set[int]:
    """Which rungs of the ladder show their pictures: all while they are few."""
    some = [i for i, rung in enumerate(ladder) if rung.row.pictures]
    if len(some) <= _MOST:
        return set(some)
    flagged = [i for i in some if ladder[i].level][:_MOST]
    rest = [i for i in some if i not in set(flagged)]
    room = _MOST - len(flagged)
    return {*flagged, *(rest[k * len(rest) // room] for k in range(room))}


def ridges(ladder: Sequence[Rung], shown: set[int], anchors: Mapping[int, str]) -> tuple[list[Ridge], float, float]:
    """The gradients of the weights side by side, and the ends of their axis in whole decades."""
    found = [
        (i, picture)
        for i in sorted(shown)
        for picture in ladder[i].row.pictures or ()
        if picture.kind == "gradient" and _is_histogram(picture)
    ]
    if not found:
        return [], 0.0, 0.0
    low = float(math.floor(min(_tail(picture) for _, picture in found)))
    high = float(math.ceil(max(picture.high for _, picture in found)))
    rows = []
    for i, picture in found:
        middle, note = _sizes(picture)
        place = _place(picture, low, high)
        rows.append(Ridge(label(picture.subject), anchors[i], _bars(picture.counts), place, middle, note))
    return rows, low, high


def _drawing(picture: Picture) -> Drawing | None:
    draw = {
        "input": _input, "weight": _weight, "gradient": _gradient, "time": _time, "logits": _logits,
        "entropy": _entropy,
    }[picture.kind]  # fmt: skip
    return draw(picture) if picture.kind == "time" or _is_histogram(picture) else None


def _is_histogram(picture: Picture) -> bool:
    """Is it one that can be drawn? A report is a file, and may hold anything."""
    fits = 0 < picture.high - picture.low < _LARGEST and max(abs(picture.low), abs(picture.high)) < _LARGEST
    return fits and sum(picture.counts) > 0 and min(picture.counts) >= 0 and picture.left_out >= 0


# -- one kind each -----------------------------------------------------------------------------------------------------


def _input(picture: Picture) -> Drawing | None:
    """Over the curve of the slope; the part where it is under 5 % of its largest is shaded."""
    if len(picture.curve) != len(picture.counts) or not all(0 <= v <= 1 for v in picture.curve):
        return None
    flat = [v < _FLAT for v in picture.curve]
    share = sum(n for n, is_flat in zip(picture.counts, flat, strict=True) if is_flat) / sum(picture.counts)
    step = WIDE / len(flat)
    return Drawing(
        "input", "Input over the slope", f"{100 * share:.0f} % where the slope is under 5 % of its largest",
        figure(picture.low), figure(picture.high), _bars(picture.counts), _place(picture, picture.low, picture.high),
        "".join(f"M{step * a:g},0H{step * b:g}V{HIGH}H{step * a:g}Z" for a, b in _runs(flat)),
        _line([(step * (k + 0.5), v) for k, v in enumerate(picture.curve)]),
    )  # fmt: skip


def _weight(picture: Picture) -> Drawing:
    """Beside the bell curve of the initialisation that the layer should have, each to its own height."""
    low, high, curve = picture.low, picture.high, ""
    title, std = f"Weights {label(picture.subject, 60)}", picture.std
    if std is None or not 1e-9 < std / (high - low) < 1e9:
        return Drawing(
            "weight", title, "", figure(low), figure(high), _bars(picture.counts), _place(picture, low, high)
        )
    low, high = min(low, -_REACH * std), max(high, _REACH * std)
    points = [low + k * (high - low) / 64 for k in range(65)]
    # Around its top too, where the axis is much wider than the curve.
    points = sorted([*points, *(std * (k / 4) for k in range(-10, 11))])
    curve = _line([(WIDE * (x - low) / (high - low), math.exp(-((x / std) ** 2) / 2)) for x in points])
    spread = math.sqrt(sum(n * x * x for x, n in _bins(picture)) / sum(picture.counts))
    note = f"standard deviation {figure(spread)}; {label(picture.scheme or 'the scheme', 20)} gives {figure(std)}"
    place = _place(picture, low, high)
    return Drawing("weight", title, note, figure(low), figure(high), _bars(picture.counts), place, "", curve)


def _gradient(picture: Picture) -> Drawing:
    title = f"Gradient of {label(picture.subject, 60)}, decades"
    place = _place(picture, picture.low, picture.high)
    ends = decades(picture.low), decades(picture.high)
    return Drawing("gradient", title, _sizes(picture)[1], *ends, _bars(picture.counts), place)


def _time(picture: Picture) -> Drawing | None:
    levels = picture.curve
    if len(levels) < 2 or not all(abs(v) < 1e4 for v in levels) or not 1 < picture.high < _LARGEST:
        return None
    low, high = min(levels), max(levels)
    span = max(high - low, 1.0)  # under a decade is hardly a change
    points = [(WIDE * k / (len(levels) - 1), (v - high) / span + 1) for k, v in enumerate(levels)]
    note = f"{decades(levels[0])} decades at the first step, {decades(levels[-1])} at the last"
    note += f" ({picture.evidence})" if picture.evidence else ""
    ends = "step 1", f"step {picture.high:.0f}"
    return Drawing("time", "Gradient over the time steps", note, *ends, curve=_line(points))


def _logits(picture: Picture) -> Drawing:
    note = f"standard deviation {figure(picture.std)}" if picture.std is not None and picture.std < math.inf else ""
    place = _place(picture, picture.low, picture.high)
    ends = figure(picture.low), figure(picture.high)
    return Drawing("logits", "Attention logits, less their mean per query", note, *ends, _bars(picture.counts), place)


def _entropy(picture: Picture) -> Drawing:
    mean = sum(n * x for x, n in _bins(picture)) / sum(picture.counts)
    note = f"on average {100 * min(max(mean, 0.0), 1.0):.0f} % of that of a look at all keys alike"
    low, high = min(picture.low, 0.0), max(picture.high, 1.0)
    place = _place(picture, low, high)
    return Drawing(
        "entropy", "Entropy of the attention", note, "one key", "all keys alike", _bars(picture.counts), place
    )


# -- paths -------------------------------------------------------------------------------------------------------------


def _bars(counts: Sequence[int]) -> str:
    """The outline of a histogram, a unit per bin, the largest HIGH high; in relative moves, which are short."""
    top = max(counts)
    heights = [round(HIGH * n / top) for n in counts]
    path, before, run = [f"M0,{HIGH}"], 0, 0
    for height in [*heights, 0]:
        if height != before:
            path.append((f"h{run}" if run else "") + f"v{before - height}")
            before, run = height, 0
        run += 1
    return "".join(path) + "Z"


def _place(picture: Picture, low: float, high: float) -> str:
    """The transformation that puts the bars where they belong on an axis from `low` to `high`."""
    unit = WIDE / (high - low)
    # What is too narrow to be seen is drawn a little wider.
    wide = max((picture.high - picture.low) * unit, _THIN)
    start = min((picture.low - low) * unit, WIDE - wide)
    return f"translate({start:.4g}) scale({wide / len(picture.counts):.4g} 1)"


def _line(points: Sequence[tuple[float, float]]) -> str:
    """A polyline through (x, share of the height)."""
    places = [(round(x), round(HIGH * (1 - y))) for x, y in points]
    (x, y), path = places[0], [f"M{places[0][0]},{places[0][1]}l"]
    for right, down in places[1:]:
        path.append(f"{right - x},{down - y} ")
        x, y = right, down
    return "".join(path).rstrip()


def _runs(flags: Sequence[bool]) -> Iterator[tuple[int, int]]:
    """Where the flags are up: [start, end) of each run."""
    start = None
    for k, up in enumerate([*flags, False]):
        if up and start is None:
            start = k
        elif not up and start is not None:
            yield start, k
            start = None


# -- numbers -----------------------------------------------------------------------------------------------------------


def _quantile(picture: Picture, share: float) -> float:
    """Of all the sample, the zeros that a logarithm leaves out counted as the smallest: never under the lowest edge."""
    wanted = share * (sum(picture.counts) + picture.left_out) - picture.left_out
    width = (picture.high - picture.low) / len(picture.counts)
    for k, n in enumerate(picture.counts):
        if n and wanted <= n:
            return picture.low + (k + max(wanted, 0.0) / n) * width
        wanted -= n
    return picture.high


def _bins(picture: Picture) -> list[tuple[float, int]]:
    """The middle of each bin, and its count."""
    width = (picture.high - picture.low) / len(picture.counts)
    return [(picture.low + (k + 0.5) * width, n) for k, n in enumerate(picture.counts)]


def _tail(picture: Picture) -> float:
    """Where the smallest hundredth ends: a few tiny elements would make the axis long."""
    return _quantile(picture, 0.01)


def _sizes(picture: Picture) -> tuple[str, str]:
    """The median of a gradient's elements in decades, and that with their share of zeros in words."""
    share = picture.left_out / (picture.left_out + sum(picture.counts))
    zeros = f"{100 * share:.0f} %" if share >= 0.005 else "a few" if share else ""
    if share >= 0.5:
        return "zero", f"{zeros} of its elements are zero"
    middle = decades(_quantile(picture, 0.5))
    return middle, f"half of its elements are above {middle}" + (f", {zeros} are zero" if zeros else "")


def legend(shown: int, layers: int) -> str:
    """How many of the layers have pictures, where it isn't all."""
    return "" if shown == layers else f"{count(shown, 'layer')} have them: those with findings, others at even steps"
