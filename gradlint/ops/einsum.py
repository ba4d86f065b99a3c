"""Einsum over any number of operands: traces and diagonals (repeated letters), ellipses, sums, broadcast sizes of 1.

y[out] = sum over the other letters of the product of all operands. By its symmetry the gradient of an operand is again
an einsum: of y's gradient and the other operands, over the operand's letters. Letters that occur nowhere else were
summed alone: the gradient is the same along them. Of a repeated letter only the diagonal has a gradient.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from gradlint.backward import Backward
from gradlint.domain import Array, Gradient, Moments
from gradlint.graph import attribute, dims
from gradlint.transfer import Context, row

Values = Sequence[ir.Value | None]
_SPARE = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz"


@dataclass(frozen=True)
class Equation:
    """Letters of each operand and of the output, ellipses spelled out."""

    operands: tuple[str, ...]
    out: str

    def sizes(self, shapes: Sequence[tuple[int, ...]]) -> dict[str, int]:
        found: dict[str, int] = {}
        for term, shape in zip(self.operands, shapes, strict=True):
            for letter, n in zip(term, shape, strict=True):
                found[letter] = max(found.get(letter, 1), n)
        return found


def parse(equation: str, ranks: Sequence[int]) -> Equation:
    """Spell out an equation for operands of these ranks; without `->` the letters that occur once, sorted, are left."""
    left, arrow, right = equation.replace(" ", "").partition("->")
    terms = left.split(",")
    spare = [c for c in _SPARE if c not in equation]
    spelled = [len(term.replace("...", "")) for term in terms]
    hidden = [rank - n if "..." in term else 0 for term, rank, n in zip(terms, ranks, spelled, strict=True)]
    dots = "".join(spare[: max(hidden, default=0)])
    operands = tuple(t.replace("...", dots[len(dots) - n :]) for t, n in zip(terms, hidden, strict=True))
    if arrow:
        return Equation(operands, right.replace("...", dots))
    letters = left.replace(",", "").replace(".", "")
    return Equation(operands, dots + "".join(sorted(c for c in set(letters) if letters.count(c) == 1)))


def _equation(node: ir.Node) -> Equation | None:
    ranks = [len(v.shape) if v is not None and v.shape is not None else None for v in node.inputs]
    if any(r is None for r in ranks):
        return None
    return parse(attribute(node, "equation", ""), [r for r in ranks if r is not None])


# -- estimates ---------------------------------------------------------------------------------------------------------


def contract(terms: Sequence[str], arrays: Sequence[Array], out: str, sizes: dict[str, int]) -> Array:
    """einsum of arrays that broadcast against their operands, the result broadcasting against the output."""
    used: list[str] = []
    slim: list[Array] = []
    for term, array in zip(terms, arrays, strict=True):
        keep = [k for k, n in enumerate(array.shape) if n > 1]
        used.append("".join(term[k] for k in keep))
        slim.append(array.reshape([array.shape[k] for k in keep]))
    seen = set("".join(used))
    alone = math.prod(n for letter, n in sizes.items() if letter not in seen and letter not in out)
    target = "".join(c for c in out if c in seen)
    result = np.einsum(f"{','.join(used)}->{target}", *slim, optimize=True)
    return np.asarray(result * alone).reshape([sizes[c] if c in seen else 1 for c in out])


@dataclass(frozen=True)
class _Case:
    equation: Equation
    xs: tuple[Moments, ...]
    sizes: dict[str, int]
    out: str


def _case(ctx: Context, node: ir.Node, xs: Sequence[Moments | None]) -> _Case | None:
    equation, shapes = _equation(node), [dims(v) for v in node.inputs]
    found: list[Moments] = []
    for value, x in zip(node.inputs, xs, strict=True):
        array = None if x is not None or ctx.varies(value) else ctx.array(value)
        known = x if array is None else Moments.constant(array.astype(np.float64))
        if known is None:
            return None
        found.append(known)
    if equation is None or any(s is None for s in shapes):
        return None
    return _Case(equation, tuple(found), equation.sizes([s for s in shapes if s is not None]), equation.out)


def einsum_moments(ctx: Context, node: ir.Node, xs: Sequence[Moments | None]) -> Sequence[Moments | None]:
    """Independent elements: Var = sum prod E[x^2] - sum prod E[x]^2; fixed and shared as far as all factors are.

    A part that is shared by the positions summed over adds up coherently: n^2.
    """
    c = _case(ctx, node, xs)
    if c is None:
        return (None,)
    terms = c.equation.operands

    def dot(arrays: Sequence[Array]) -> Array:
        return contract(terms, arrays, c.out, c.sizes)

    square = dot([x.mean**2 for x in c.xs])
    total = np.maximum(dot([x.second for x in c.xs]) - square, 0)
    fixed = np.maximum(dot([x.mean**2 + x.fixed for x in c.xs]) - square, 0)
    shared = np.maximum(dot([x.mean**2 + x.shared for x in c.xs]) - square, 0)
    local = np.maximum(total - fixed - shared, 0)
    return (Moments(dot([x.mean for x in c.xs]), fixed, shared * _positions_summed(c), local),)


def _positions_summed(c: _Case) -> float:
    """How many positions, resolved by no operand, are summed."""
    pairs = zip(c.equation.operands, c.xs, strict=True)
    units = {term[k] for term, x in pairs for k, n in enumerate(x.second.shape) if n > 1}
    return float(math.prod(n for letter, n in c.sizes.items() if letter not in units and letter not in c.out))


def einsum_pullback(
    ctx: Context,
    node: ir.Node,
    xs: Sequence[Moments | None],
    ys: Sequence[Moments | None],
    gs: Sequence[Gradient | None],
) -> Sequence[Gradient | None]:
    """E[g^2] times the second moments of the others, summed over the output's letters that the operand has not.

    What is the same at the positions summed over adds up coherently; into a constant also over the examples, which the
    loss's 1 / sqrt(B) undoes. Only diagonals of repeated letters carry a gradient: 1 / n of the elements.
    """
    c, g = _case(ctx, node, xs), gs[0]
    if c is None or g is None:
        return (None,) * len(node.inputs)
    found: list[Gradient | None] = []
    for k, term in enumerate(c.equation.operands):
        others = [j for j in range(len(c.xs)) if j != k]
        terms = [c.out, *(c.equation.operands[j] for j in others)]
        letters = "".join(dict.fromkeys(term))
        own = "".join(x for x in letters if not _is_broadcast(c, node, k, x))
        constant = not ctx.varies(node.inputs[k])
        seconds = [c.xs[j].second for j in others]
        same = contract(terms, [g.shared, *(c.xs[j].mean ** 2 + c.xs[j].shared for j in others)], own, c.sizes)
        whole = contract(terms, [g.shared, *seconds], own, c.sizes)
        rest = np.maximum(whole - same, 0) + contract(terms, [g.local, *seconds], own, c.sizes)
        over = _positions_over(ctx, c, g, k, own, constant)
        examples = float(ctx.batch) if constant and _sums_examples(ctx, c, k) else 1.0
        stretched = tuple(a for a, x in enumerate(letters) if x not in own)
        parts = (np.expand_dims(a / examples, stretched) for a in (same * over, rest))
        found.append(Gradient(*(_diagonal(a, term, c.sizes) for a in parts)))
    return found


def _is_broadcast(c: _Case, node: ir.Node, k: int, letter: str) -> bool:
    shape = dims(node.inputs[k]) or ()
    return shape[c.equation.operands[k].index(letter)] == 1 and c.sizes[letter] > 1


def _sums_examples(ctx: Context, c: _Case, k: int) -> bool:
    return bool(c.out) and c.out[0] not in c.equation.operands[k] and c.sizes[c.out[0]] == ctx.batch


def _positions_over(ctx: Context, c: _Case, g: Gradient, k: int, own: str, constant: bool) -> float:
    """How many positions of the output one element of operand k is summed over (the examples left out)."""
    resolved = {c.out[a] for a, n in enumerate(g.total.shape) if n > 1}
    for j, term in enumerate(c.equation.operands):
        if j != k:
            resolved |= {term[a] for a, n in enumerate(c.xs[j].second.shape) if n > 1}
    rest = [letter for letter in c.sizes if letter not in own and letter not in resolved]
    if constant and _sums_examples(ctx, c, k):
        rest = [letter for letter in rest if letter != c.out[0]]
    return float(math.prod(c.sizes[letter] for letter in rest))


def _diagonal(a: Array, term: str, sizes: dict[str, int]) -> Array:
    """From one axis per letter to one per axis of the operand; of a repeated letter 1 / n of the elements count."""
    extra = [k for k, letter in enumerate(term) if letter in term[:k]]
    for k in extra:
        a = np.expand_dims(a, k) / sizes[term[k]]
    for k in extra:  # units of the diagonal are averaged: the rest of each row is zero
        first = term.index(term[k])
        a = a.mean(axis=first, keepdims=True)
    return a


# -- exact gradients ---------------------------------------------------------------------------------------------------


def einsum_vjp(b: Backward, node: ir.Node, gs: Values) -> Values:
    """The einsum of g and the other operands over each operand's own letters; see the module's description."""
    equation, g = _equation(node), gs[0]
    assert equation is not None
    assert g is not None
    found: list[ir.Value | None] = []
    for k, value in enumerate(node.inputs):
        found.append(_operand_gradient(b, node, equation, k, g) if b.wanted(value) else None)
    return found


def _operand_gradient(b: Backward, node: ir.Node, equation: Equation, k: int, g: ir.Value) -> ir.Value:
    x, term = node.inputs[k], equation.operands[k]
    assert x is not None
    others = [j for j in range(len(node.inputs)) if j != k]
    letters = "".join(dict.fromkeys(term))
    elsewhere = set(equation.out).union(*(equation.operands[j] for j in others))
    stretched = {c for c in letters if c in elsewhere and _broadcast(node, equation, k, c)}
    kept = "".join(c for c in letters if c in elsewhere and c not in stretched)
    terms = [equation.out, *(equation.operands[j] for j in others)]
    d = g
    if others or equation.out != kept:
        d = b.op("Einsum", g, *(node.inputs[j] for j in others), equation=f"{','.join(terms)}->{kept}")
    missing = [a for a, c in enumerate(letters) if c not in kept]
    if missing:
        d = b.op("Unsqueeze", d, b.constant(missing))
    if any(c not in elsewhere or _narrow(node, equation, k, c) for c in letters):
        shape = b.shape(x)
        if len(letters) < len(term):
            shape = b.op("Gather", shape, b.constant([term.index(c) for c in letters]), dtype=ir.DataType.INT64)
        d = b.op("Expand", d, shape)
    return _on_diagonals(b, d, x, term) if len(letters) < len(term) else d


def _axis_size(node: ir.Node, equation: Equation, k: int, letter: str) -> int | None:
    value = node.inputs[k]
    size = value.shape[equation.operands[k].index(letter)] if value is not None and value.shape is not None else None
    return size if isinstance(size, int) else None


def _elsewhere(node: ir.Node, equation: Equation, k: int, letter: str) -> list[int | None]:
    others = [j for j, t in enumerate(equation.operands) if j != k and letter in t]
    return [_axis_size(node, equation, j, letter) for j in others]


def _broadcast(node: ir.Node, equation: Equation, k: int, letter: str) -> bool:
    """Is this operand of size 1 along a letter that is longer elsewhere?"""
    return _axis_size(node, equation, k, letter) == 1 and any(n != 1 for n in _elsewhere(node, equation, k, letter))


def _narrow(node: ir.Node, equation: Equation, k: int, letter: str) -> bool:
    """Is every other operand with this summed letter of size 1 along it, while this one is longer?"""
    sizes = _elsewhere(node, equation, k, letter)
    alone = letter not in equation.out and bool(sizes) and all(n == 1 for n in sizes)
    return alone and _axis_size(node, equation, k, letter) != 1


def _on_diagonals(b: Backward, d: ir.Value, x: ir.Value, term: str) -> ir.Value:
    """Spread one axis per letter over the operand's axes: zero off the diagonals of repeated letters."""
    extra = [k for k, letter in enumerate(term) if letter in term[:k]]
    d = b.op("Unsqueeze", d, b.constant(extra))
    for k in extra:
        first, rank = term.index(term[k]), len(term)
        size = b.op("Squeeze", b.op("Gather", b.shape(x), b.constant([k]), dtype=ir.DataType.INT64), b.constant([0]))
        steps = b.op("Range", b.constant(0), size, b.constant(1), dtype=ir.DataType.INT64)
        along, across = ([-1 if a == axis else 1 for a in range(rank)] for axis in (first, k))
        same = b.op(
            "Equal", b.op("Reshape", steps, b.constant(along)), b.op("Reshape", steps, b.constant(across)),
            dtype=ir.DataType.BOOL,
        )  # fmt: skip
        assert x.dtype is not None
        d = b.op("Mul", d, b.op("Cast", same, to=int(x.dtype.value), dtype=x.dtype))
    return d


row("Einsum", moments=einsum_moments, pullback=einsum_pullback, vjp=einsum_vjp)
