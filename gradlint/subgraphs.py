"""Operators with a body, as vjp rows emit them: the builder of a subgraph, and Scan."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import onnx_ir as ir

from gradlint.backward import Backward

Values = list[ir.Value]
Step = Callable[[Backward, Values, Values], tuple[Values, Values]]


def inner(b: Backward, name: str) -> Backward:
    """A builder for a subgraph of what `b` builds: its names are distinct, its constants stand in the main graph."""
    return Backward(b.mode, b.needs, constants=b.constants, prefix=f"{b.prefix}/{name}_{len(b.nodes)}")


def emit(
    b: Backward, op_type: str, inputs: Sequence[ir.Value], outputs: Sequence[ir.Value], **attributes: object
) -> Values:
    """A node with subgraphs; its outputs get the types of `outputs` (never shared with an equal node)."""
    name = f"{b.prefix}/{op_type}_{len(b.nodes)}"
    node = ir.node(op_type, list(inputs), attributes, num_outputs=len(outputs), name=name)  # type: ignore[arg-type]
    for k, (made, like) in enumerate(zip(node.outputs, outputs, strict=True)):
        made.name, made.type = f"{name}.{k}", like.type
    b.nodes.append(node)
    return list(node.outputs)


def result(body: Backward, value: ir.Value, taken: set[ir.Value]) -> ir.Value:
    """`value` as an output of a subgraph: it must be computed there, and be no other output."""
    if value in taken or value.producer() not in body.nodes:
        name = f"{body.prefix}/Identity_{len(body.nodes)}"
        node = ir.node("Identity", [value], name=name)
        node.outputs[0].name, node.outputs[0].type = f"{name}.0", value.type
        body.nodes.append(node)
        value = node.outputs[0]
    taken.add(value)
    return value


def argument(body: Backward, name: str, like: ir.Value, *, sliced: bool = False) -> ir.Value:
    """An input of a subgraph: typed as `like`, or as a slice of it along axis 0."""
    shape = None if like.shape is None else ir.Shape(list(like.shape)[1:] if sliced else list(like.shape))
    return ir.Value(name=f"{body.prefix}/{name}", shape=shape, type=like.type)


def scan(b: Backward, step: Step, carried: Values, sequences: Values) -> tuple[Values, Values]:
    """Run `step` along axis 0 of `sequences`: the carried values after the last step, the outputs stacked.

    step(body, carried, slices) -> (carried, outputs) emits one step with the builder it is given. A sequence of known
    length 1 needs no Scan.
    """
    shape = sequences[0].shape
    if shape is not None and shape[0] == 1:
        first = b.constant([0])
        carried, outputs = step(b, carried, [b.op("Squeeze", s, first) for s in sequences])
        return carried, [b.op("Unsqueeze", o, first) for o in outputs]
    body = inner(b, "Scan")
    states = [argument(body, f"carried_{k}", v) for k, v in enumerate(carried)]
    slices = [argument(body, f"slice_{k}", v, sliced=True) for k, v in enumerate(sequences)]
    after, outputs = step(body, states, slices)
    taken: set[ir.Value] = set()
    results = [result(body, v, taken) for v in [*after, *outputs]]
    graph = ir.Graph([*states, *slices], results, nodes=body.nodes, name=body.prefix)
    found = emit(b, "Scan", [*carried, *sequences], results, body=graph, num_scan_inputs=len(sequences))
    return found[: len(carried)], found[len(carried) :]
