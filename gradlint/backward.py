"""The builder that vjp rows emit ONNX operators with."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import onnx_ir as ir

from gradlint.graph import dims


class Unsupported(Exception):
    """A vjp row meets a case it has no derivative for: the gradient is cut there, and listed."""


@dataclass(frozen=True)
class Cut:
    """Where a gradient stopped because an operator has no vjp row: everything before it is unknown, not zero."""

    node: str
    op_type: str


@dataclass
class Backward:
    """Builds the backward part of a graph. Equal expressions are built once (rows may recompute what others did).

    needs: the values whose gradient is wanted or lies on the way to one. byproducts: gradients a row meets on the way,
    by node and name (recurrences: "arriving", "leaving"). prefix: starts the name of all that is built.
    cuts, tainted: where gradients stopped, and the values whose gradient is therefore not whole; reached: the nodes it
    went through; slopes: what elementwise ones multiplied it with. reverse: differentiates a subgraph
    (`gradlint.reverse.backward`); outer: the builder of the graph around, which keeps the constants.
    """

    mode: str
    needs: set[ir.Value]
    reverse: Callable[..., tuple[Backward, dict[ir.Value, ir.Value], tuple[Cut, ...]]] | None = None
    outer: Backward | None = None
    cuts: list[Cut] = field(default_factory=list)
    tainted: set[ir.Value] = field(default_factory=set)
    reached: set[ir.Node] = field(default_factory=set)
    slopes: dict[ir.Node, ir.Value] = field(default_factory=dict)
    sent: list[tuple[ir.Value, ir.Value]] = field(default_factory=list)
    children: int = 0
    nodes: list[ir.Node] = field(default_factory=list)
    prefix: str = "grad"
    _emitted: int = 0
    _made: dict[Any, tuple[ir.Value, ...]] = field(default_factory=dict)
    constants: dict[Any, ir.Value] = field(default_factory=dict)
    byproducts: dict[tuple[ir.Node, str], ir.Value] = field(default_factory=dict)

    def op(
        self, op_type: str, *inputs: ir.Value | None, dtype: ir.DataType | None = None, **attributes: Any
    ) -> ir.Value:
        """One output of one operator; its type is that of the first typed input unless `dtype` says otherwise."""
        shorter = self._without_transposes(op_type, inputs, attributes)
        return shorter if shorter is not None else self.ops(op_type, *inputs, outputs=1, dtype=dtype, **attributes)[0]

    def _without_transposes(
        self, op_type: str, inputs: Sequence[ir.Value | None], attributes: dict[str, Any]
    ) -> ir.Value | None:
        """The same value with fewer transposes: pairs are composed, (A B)^T = B^T A^T, products read A for (A^T)^T."""
        sources = [None if v is None else v.producer() for v in inputs[:2]]
        if op_type == "Transpose" and (source := sources[0]) is not None:
            perm = attributes.get("perm")
            if source.op_type == "Transpose":
                return self._composed(source, perm)
            own = source.graph is None and len(source.inputs) == 2 and "alpha" not in source.attributes
            if source.op_type == "Gemm" and own and perm in (None, [1, 0]):
                left, right = (int(source.attributes.get_int(k, 0)) for k in ("transA", "transB"))
                return self.op("Gemm", source.inputs[1], source.inputs[0], transA=1 - right, transB=1 - left)
        if op_type == "Gemm":
            for k, flip in enumerate(("transA", "transB")):
                source = sources[k]
                if source is not None and source.op_type == "Transpose" and _swaps(source):
                    operands = [source.inputs[0] if i == k else v for i, v in enumerate(inputs)]
                    return self.op("Gemm", *operands, **{**attributes, flip: 1 - attributes.get(flip, 0)})
        return None

    def _composed(self, inner: ir.Node, perm: list[int] | None) -> ir.Value | None:
        """A further Transpose by `perm` of what `inner` transposed."""
        first = inner.attributes.get("perm")
        before = list(first.as_ints()) if first is not None else None
        if before is None or perm is None:
            return inner.inputs[0] if before is None and perm is None else None
        both = [before[k] for k in perm]
        if both == sorted(both):
            return inner.inputs[0]
        return self.op("Transpose", inner.inputs[0], perm=both)

    def ops(
        self,
        op_type: str,
        *inputs: ir.Value | None,
        outputs: int,
        dtype: ir.DataType | None = None,
        domain: str = "",
        **attributes: Any,
    ) -> tuple[ir.Value, ...]:
        """Several outputs of one operator."""
        attributes = {k: v for k, v in attributes.items() if v is not None}
        key = (op_type, domain, outputs, tuple(id(v) for v in inputs), repr(sorted(attributes.items())))
        if key in self._made:
            return self._made[key]
        name = f"{self.prefix}/{op_type}_{len(self.nodes)}"
        node = ir.node(op_type, list(inputs), attributes, domain=domain, num_outputs=outputs, name=name)
        kind = (
            dtype
            if dtype is not None
            else next((v.dtype for v in inputs if v is not None and v.dtype is not None), None)
        )
        for k, output in enumerate(node.outputs):
            output.name = f"{name}.{k}"
            if kind is not None:
                output.dtype = kind
        self.nodes.append(node)
        self._made[key] = tuple(node.outputs)
        return self._made[key]

    def constant(self, array: Any, dtype: Any = np.int64) -> ir.Value:
        """An initializer holding `array` (int64 unless told otherwise: axes, shapes, pads)."""
        array = np.asarray(array, dtype)
        key = (array.dtype.str, array.shape, array.tobytes())
        if key not in self.constants:
            name = f"{self.prefix}/constant_{len(self.constants)}"
            tensor = ir.tensor(array, name=name)
            value = ir.Value(
                name=name, const_value=tensor, shape=ir.Shape(array.shape), type=ir.TensorType(tensor.dtype)
            )
            self.constants[key] = value
        return self.constants[key]

    def scalar(self, number: float, like: ir.Value) -> ir.Value:
        """A constant of rank 0 in the type of `like`."""
        assert like.dtype is not None
        return self.constant(number, like.dtype.numpy())

    def shape(self, value: ir.Value) -> ir.Value:
        """The shape of a value as an int64 vector: a constant where it is known, else computed when it runs."""
        known = dims(value)
        return self.constant(known) if known is not None else self.op("Shape", value, dtype=ir.DataType.INT64)

    def wanted(self, value: ir.Value | None) -> bool:
        return value is not None and value in self.needs

    def total(self, terms: Sequence[ir.Value], value: ir.Value) -> ir.Value:
        """The sum of gradients of `value`; neighbouring pieces that zeros were put around are laid side by side."""
        terms = self._side_by_side(list(terms), value)
        total = terms[0]
        for term in terms[1:]:
            total = self.op("Add", total, term)
        return total

    def _side_by_side(self, terms: list[ir.Value], value: ir.Value) -> list[ir.Value]:
        """Pad(a) + Pad(b), where a ends as b begins along one axis, is Pad(Concat(a, b)): a sum and two passes less."""
        pads = {t: p for t in terms if (p := _padded(t, value)) is not None}
        for first, (axis, begin, end) in sorted(pads.items(), key=lambda item: item[1]):
            run, stop = [first], end
            for other, (axis_, start, end_) in sorted(pads.items(), key=lambda item: item[1]):
                if axis_ == axis and start == stop and first in terms and other in terms:
                    run.append(other)
                    stop = end_
            if len(run) > 1:
                joint = self.op("Concat", *(t.producer().inputs[0] for t in run), axis=axis)  # type: ignore[union-attr]
                rest = int(value.shape[axis]) - stop  # type: ignore[index, arg-type]
                if begin or rest:
                    joint = self.op("Pad", joint, self.constant([begin, rest]), None, self.constant([axis]))
                terms = [joint if t is first else t for t in terms if t is first or t not in run]
        return terms

    def sum_over(self, g: ir.Value, axes: Sequence[int], keepdims: bool = False) -> ir.Value:
        return self.op("ReduceSum", g, self.constant(list(axes)), keepdims=int(keepdims)) if axes else g

    def unbroadcast(self, g: ir.Value, target: ir.Value, full: ir.Value) -> ir.Value:
        """Sum `g`, shaped like the value `full`, over the axes along which `target` was broadcast."""
        big, small = full.shape, target.shape
        if big is None or small is None:
            return self.unbroadcast_at_run(g, target)
        lead = len(big) - len(small)
        axes = list(range(lead))
        for a, (n, m) in enumerate(zip(list(big)[lead:], small, strict=True)):
            if m == 1 and n != 1:
                axes.append(lead + a)
            elif m != n and not isinstance(m, int):
                return self.unbroadcast_at_run(g, target)
        if not axes:
            return g
        if all(a < lead for a in axes):
            return self._sum_leading(g, dims(full), lead)
        return self.op("Reshape", self.sum_over(g, axes, keepdims=True), self.shape(target))

    def _sum_leading(self, g: ir.Value, shape: tuple[int, ...] | None, lead: int) -> ir.Value:
        """Sum over the first `lead` axes; a row of ones times a matrix is onnxruntime's fastest way."""
        kind = g.dtype
        if shape is None or len(shape) != lead + 1 or kind is None:
            return self.sum_over(g, list(range(lead)))
        rows = math.prod(shape[:lead])
        g = g if lead == 1 else self.op("Reshape", g, self.constant([rows, shape[-1]]))
        return self.op("MatMul", self.constant(np.ones(rows), kind.numpy()), g)

    def unbroadcast_at_run(self, g: ir.Value, target: ir.Value) -> ir.Value:
        """Where symbols hide which axes were stretched: sum over the axes whose sizes differ, found when it runs."""
        shape = self.op("Shape", g, dtype=ir.DataType.INT64)
        rank = self.op("Size", shape, dtype=ir.DataType.INT64)
        small = self.op("Shape", target, dtype=ir.DataType.INT64)
        missing = self.op(
            "Reshape", self.op("Sub", rank, self.op("Size", small, dtype=ir.DataType.INT64)), self.constant([1])
        )
        padded = self.op("Concat", self.op("Expand", self.constant([1]), missing), small, axis=0)
        differs = self.op("Not", self.op("Equal", shape, padded, dtype=ir.DataType.BOOL))
        axes = self.op("Reshape", self.op("NonZero", differs, dtype=ir.DataType.INT64), self.constant([-1]))
        summed = self.op("ReduceSum", g, axes, keepdims=1, noop_with_empty_axes=1)
        return self.op("Reshape", summed, small)

    def emit(self, graph: ir.Graph, keep: Collection[ir.Value] | None = None) -> None:
        """Append what was built since the last time to `graph`; given `keep`, only what those values need."""
        fresh = self.nodes[self._emitted :]
        if keep is not None:
            unused = self._detached(fresh, {*keep, *self.byproducts.values()})
            self._made = {k: made for k, made in self._made.items() if made[0].producer() not in unused}
            self.slopes = {node: v for node, v in self.slopes.items() if v.producer() not in unused}
            fresh = [node for node in fresh if node not in unused]
        graph.extend(fresh)
        self._emitted = len(self.nodes)
        for value in self.constants.values() if self.outer is None else ():
            if value.graph is None:
                graph.register_initializer(value)

    def _detached(self, nodes: Sequence[ir.Node], keep: set[ir.Value]) -> set[ir.Node]:
        """The nodes that nothing reads, cut off from their inputs (a product whose transpose took its place)."""
        unused: set[ir.Node] = set()
        for node in reversed(nodes):
            if not any(o in keep or o.uses() for o in node.outputs):
                unused.add(node)
                for k in range(len(node.inputs)):
                    node.replace_input_with(k, None)
        return unused

    def send(self, value: ir.Value, g: ir.Value) -> None:
        """A gradient for a value that the node reads other than as an input: captured by its subgraph."""
        self.sent.append((value, g))


def _swaps(transpose: ir.Node) -> bool:
    """Does it exchange the axes of a matrix?"""
    perm = transpose.attributes.get("perm")
    return perm is None or list(perm.as_ints()) == [1, 0]


def _padded(term: ir.Value, value: ir.Value) -> tuple[int, int, int] | None:
    """(axis, begin, end) of the piece that `term`, shaped like `value`, puts zeros around along one axis."""
    node = term.producer()
    if node is None or node.op_type != "Pad" or len(node.inputs) < 4 or value.shape is None:
        return None
    pads, axes = (None if v is None or v.const_value is None else v.const_value.numpy() for v in node.inputs[1::2])
    if pads is None or axes is None or len(axes) != 1 or "mode" in node.attributes or node.inputs[2] is not None:
        return None
    axis = int(axes[0]) % len(value.shape)
    size = value.shape[axis]
    return (axis, int(pads[0]), size - int(pads[1])) if isinstance(size, int) else None
