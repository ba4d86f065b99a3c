"""Skip connections beside the ladder: which of a few lanes starts, ends or passes at each layer."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from gradlint.report.ladder import Rung

LANES = 6


@dataclass(frozen=True)
class Rail:
    """What is drawn beside one layer: lanes that leave it, join it, run past it, and its links to its neighbours."""

    starts: tuple[int, ...] = ()
    joins: tuple[int, ...] = ()
    ends: tuple[int, ...] = ()
    passes: tuple[int, ...] = ()
    from_above: bool = False
    to_below: bool = False


def rails(ladder: Sequence[Rung]) -> tuple[list[Rail], int]:
    """A rail per layer, and how many skip connections found no lane.

    A layer that is read by later ones than its neighbour has one lane, from itself to the last of its readers.
    """
    index = {rung.row.name: i for i, rung in enumerate(ladder)}
    readers: dict[int, list[int]] = {}
    linked = [False] * (len(ladder) + 1)
    for i, rung in enumerate(ladder):
        for source in {index[name] for name in rung.row.inputs if name in index}:
            if source == i - 1:
                linked[i] = True
            elif source < i - 1:
                readers.setdefault(source, []).append(i)
    lane_of: dict[int, int] = {}
    free_from = [0] * LANES
    for source in sorted(readers):
        lane = next((k for k in range(LANES) if free_from[k] <= source), None)
        if lane is not None:
            lane_of[source], free_from[lane] = lane, max(readers[source])
    result = []
    for i in range(len(ladder)):
        spans = [
            (lane, source, readers[source]) for source, lane in lane_of.items() if source <= i <= readers[source][-1]
        ]
        result.append(
            Rail(
                starts=tuple(lane for lane, source, _ in spans if source == i),
                joins=tuple(lane for lane, _, ends in spans if i in ends[:-1]),
                ends=tuple(lane for lane, source, ends in spans if i == ends[-1]),
                passes=tuple(lane for lane, source, ends in spans if source < i < ends[-1]),
                from_above=linked[i],
                to_below=linked[i + 1],
            )
        )
    return result, sum(len(ends) for source, ends in readers.items() if source not in lane_of)
