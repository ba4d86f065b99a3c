"""If, Loop and Scan: the estimate follows their bodies as it follows the graph around them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TypeVar

import numpy as np
import onnx_ir as ir

from gradlint.domain import Array, Gradient, Moments
from gradlint.graph import dims, is_float
from gradlint.iterations import Iteration, Track, original, parts_of
from gradlint.iterations import steps as known_steps
from gradlint.ops.control_vjp import if_vjp, iteration_vjp
from gradlint.subgraphs import captured, subgraphs
from gradlint.transfer import Context, row

Known = TypeVar("Known", Moments, Gradient)
_FOLLOWED = 100  # steps of a Loop or Scan that are followed, and assumed where their number is not known


def _moments(ctx: Context, value: ir.Value) -> Moments | None:
    if value in ctx.moments or ctx.varies(value) or not is_float(value):
        return ctx.moments.get(value)
    array = ctx.array(value)
    return None if array is None else Moments.constant(array.astype(np.float64))


def _add(ctx: Context, value: ir.Value, g: Gradient) -> None:
    ctx.gradients[value] = ctx.gradients[value] + g if value in ctx.gradients else g


# -- If ----------------------------------------------------------------------------------------------------------------


def if_moments(ctx: Context, node: ir.Node, xs: Sequence[Moments | None]) -> Sequence[Moments | None]:
    """Either branch is taken as equally likely: the outputs have the moments of the mixture."""
    if ctx.forward is None:
        return (None,) * len(node.outputs)
    for body in subgraphs(node):
        ctx.forward(body)
    found = []
    for k, output in enumerate(node.outputs):
        rank = None if output.shape is None else len(output.shape)
        parts = [_moments(ctx, body.outputs[k]) for body in subgraphs(node)]
        known = [m for m in parts if m is not None and rank in (None, m.mean.ndim)]
        found.append(_mixed(known[0], known[-1]) if known else None)
    return found


def _mixed(a: Moments, b: Moments) -> Moments:
    if a is b or a.mean.ndim != b.mean.ndim:
        return a
    apart = np.square(a.mean - b.mean) / 4
    return Moments(
        (a.mean + b.mean) / 2, (a.fixed + b.fixed) / 2, (a.shared + b.shared) / 2 + apart, (a.local + b.local) / 2
    )


def if_pullback(
    ctx: Context,
    node: ir.Node,
    xs: Sequence[Moments | None],
    ys: Sequence[Moments | None],
    gs: Sequence[Gradient | None],
) -> Sequence[Gradient | None]:
    """Signals from outside get the gradient of the worse branch, the one that sends less of it back.

    So do weights; one that only the other branch reads gets the gradient it has there.
    """
    if ctx.backward is None:
        return (None,) * len(node.inputs)
    outside = captured(node)
    found = [ctx.backward(body, _seeds(body.outputs, gs)) for body in subgraphs(node)]
    signals = [v for v in outside if ctx.varies(v)]
    worse, other = sorted(found, key=lambda part: sum(_energy(part[v], v) for v in signals if v in part))
    for value in outside:
        if value in worse:
            _add(ctx, value, worse[value])
        elif value in other and not ctx.varies(value):
            _add(ctx, value, other[value])
    for part in found:
        ctx.gradients.update((v, g) for v, g in part.items() if v not in outside)
    return (None,) * len(node.inputs)


def _energy(g: Gradient, value: ir.Value) -> float:
    return float(np.mean(g.total)) * math.prod(dims(value) or (1,))


def _seeds(outputs: Sequence[ir.Value], gs: Sequence[Gradient | None]) -> dict[ir.Value, Gradient]:
    seeds: dict[ir.Value, Gradient] = {}
    for value, g in zip(outputs, gs, strict=True):
        if g is not None and is_float(value) and (value.shape is None or len(value.shape) == g.local.ndim):
            seeds[value] = seeds[value] + g if value in seeds else g
    return seeds


# -- Loop and Scan -----------------------------------------------------------------------------------------------------


def _steps(parts: Iteration) -> int:
    """The number of steps, `_FOLLOWED` where it is not known."""
    count = known_steps(parts)
    return _FOLLOWED if count is None else count


def _at(known: Known, track: Track, step: int, steps: int) -> Known:
    """What is known of one step's slice."""
    index = steps - 1 - step if track.reverse else step

    def take(array: Array) -> Array:
        return np.take(array, index if array.shape[track.axis] > 1 else 0, axis=track.axis)

    return known.map(take)


def _stacked(parts: list[Array], track: Track, steps: int) -> Array:
    """The inverse; steps that were not followed are like the last one that was."""
    full = list(np.broadcast_arrays(*parts))
    full += [full[-1]] * (steps - len(full))
    return np.stack(full[::-1] if track.reverse else full, axis=track.axis)


def _follow(ctx: Context, parts: Iteration, step: int, steps: int, states: Sequence[Moments | None]) -> None:
    """Moments inside the body at one step."""
    assert ctx.forward is not None
    for s, m in zip(parts.states, states, strict=True):
        _set(ctx, s.into, m)
    for track in parts.slices:
        whole = _moments(ctx, track.whole)
        _set(ctx, track.each, None if whole is None else _at(whole, track, step, steps))
    if parts.number is not None:
        ctx.moments[parts.number] = Moments.constant(np.float64(step) * np.ones((1,) * len(parts.number.shape or ())))
    for node in parts.body.all_nodes():
        ctx.corrections.pop(node, None)
    ctx.forward(parts.body)


def _set(ctx: Context, value: ir.Value, m: Moments | None) -> None:
    ctx.moments.pop(value, None)
    if m is not None:
        ctx.moments[value] = m


def iteration_moments(ctx: Context, node: ir.Node, xs: Sequence[Moments | None]) -> Sequence[Moments | None]:
    """Step by step, the moments of the states carried along; at most 100 steps, the rest like the last of them."""
    parts = parts_of(node)
    steps = 0 if parts is None else _steps(parts)
    if ctx.forward is None or parts is None or steps == 0:
        return (None,) * len(node.outputs)
    states = [_moments(ctx, s.first) for s in parts.states]
    outputs: dict[ir.Value, list[Moments | None]] = {t.whole: [] for t in parts.outputs}
    for step in range(min(steps, _FOLLOWED)):
        _follow(ctx, parts, step, steps, states)
        states = [_moments(ctx, s.out) for s in parts.states]
        for t in parts.outputs:
            outputs[t.whole].append(_moments(ctx, t.each))
    found: dict[ir.Value, Moments | None] = dict(zip((s.last for s in parts.states), states, strict=True))
    for t in parts.outputs:
        each = [m for m in outputs[t.whole] if m is not None]
        if len(each) == len(outputs[t.whole]):
            names = ("mean", "fixed", "shared", "local")
            found[t.whole] = Moments(*(_stacked([getattr(m, n) for m in each], t, steps) for n in names))
    return [found.get(v) for v in node.outputs]


def iteration_pullback(
    ctx: Context,
    node: ir.Node,
    xs: Sequence[Moments | None],
    ys: Sequence[Moments | None],
    gs: Sequence[Gradient | None],
) -> Sequence[Gradient | None]:
    """The steps backwards: gradients of what is captured add over the steps, taken as uncorrelated.

    Of what the body computes the mean over the steps is kept.
    """
    parts = parts_of(node)
    steps = 0 if parts is None else _steps(parts)
    if ctx.backward is None or parts is None or steps == 0:
        return (None,) * len(node.inputs)
    followed, given = min(steps, _FOLLOWED), dict(zip(node.outputs, gs, strict=True))
    trail = [[_moments(ctx, s.first) for s in parts.states]]
    for step in range(followed):
        _follow(ctx, parts, step, steps, trail[-1])
        trail.append([_moments(ctx, s.out) for s in parts.states])
    d_states = [given[s.last] for s in parts.states]
    d_slices: dict[ir.Value, list[Gradient]] = {t.each: [] for t in parts.slices}
    outside, norms = set(captured(node)), list[tuple[float, float]]()
    for step in range(followed - 1, -1, -1):
        _follow(ctx, parts, step, steps, trail[step])
        outs: list[Gradient | None] = []
        for t in parts.outputs:
            g = given[t.whole]
            outs.append(None if g is None else _at(g, t, step, steps))
        seeds = _seeds([original(v) for v in (*_outs(parts), *(t.each for t in parts.outputs))], [*d_states, *outs])
        found = ctx.backward(parts.body, seeds)
        d_states = [found.get(s.into) for s in parts.states]
        ends = [seeds.get(original(s.out)) for s in parts.states]
        norms.append((_norm(ctx, parts, d_states), _norm(ctx, parts, ends)))
        for t in parts.slices:
            if t.each in found:
                d_slices[t.each].insert(0, found[t.each])
        for value, g in found.items():
            _add(ctx, value, g if value in outside else g.scaled(1 / followed))
    ctx.profiles[node] = np.array(norms[::-1]).T
    result = {s.first: g for s, g in zip(parts.states, d_states, strict=True)}
    for t in parts.slices:
        each = d_slices[t.each]
        if len(each) == followed:
            result[t.whole] = Gradient(
                *(_stacked([getattr(g, n) for g in each], t, steps) for n in ("shared", "local"))
            )
    return [None if v is None else result.get(v) for v in node.inputs]


def _outs(parts: Iteration) -> list[ir.Value]:
    return [s.out for s in parts.states]


def _norm(ctx: Context, parts: Iteration, gs: Sequence[Gradient | None]) -> float:
    """Of the gradient of all states, per example."""
    energies = [_energy(g, s.into) for s, g in zip(parts.states, gs, strict=True) if g is not None]
    return math.sqrt(sum(energies) / ctx.batch)


row("If", moments=if_moments, pullback=if_pullback, vjp=if_vjp)
row("Loop", moments=iteration_moments, pullback=iteration_pullback, vjp=iteration_vjp)
row("Scan", moments=iteration_moments, pullback=iteration_pullback, vjp=iteration_vjp)
