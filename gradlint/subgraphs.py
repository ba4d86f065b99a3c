"""Operators with bodies: what they read from outside, and how vjp rows emit them."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import onnx_ir as ir

from gradlint.backward import Backward

Values = list[ir.Value]
Step = Callable[[Backward, Values, Values], tuple[Values, Values]]


def subgraphs(node: ir.Node) -> list[ir.Graph]:
    """The bodies of a node, not those inside them."""
    found = []
    for attr in node.attributes.values():
        if attr.type == ir.AttributeType.GRAPH:
            found.append(attr.as_graph())
        elif attr.type == ir.AttributeType.GRAPHS:
            found.extend(attr.as_graphs())
    return found


def name_outputs(model: ir.Model) -> None:
    """Every output of an If, Loop or Scan gets a name, in place: onnxruntime crashes where a Loop's are left out."""
    taken = {o.name for n in model.graph.all_nodes() for o in n.outputs}
    for graph in (model.graph, *model.graph.subgraphs()):
        taken.update(v.name for v in (*graph.inputs, *graph.initializers.values()))
    for node in model.graph.all_nodes():
        if node.domain not in ("", "ai.onnx") or node.op_type not in ("If", "Loop", "Scan"):
            continue
        node.resize_outputs(len(subgraphs(node)[0].outputs) - (node.op_type == "Loop"))
        for k, output in enumerate(node.outputs):
            if not output.name:
                output.name = f"{node.name or node.op_type}/output_{k}"
                while output.name in taken:
                    output.name += "'"
                taken.add(output.name)


def captured(node: ir.Node) -> list[ir.Value]:
    """The values that the bodies of a node read from outside, at any depth, each once."""
    reads: dict[ir.Value, None] = {}
    own: set[ir.Value] = set()
    pending = subgraphs(node)
    while pending:
        graph = pending.pop()
        own.update((*graph.inputs, *graph.initializers.values()))
        for inside in graph:
            own.update(inside.outputs)
            reads.update((v, None) for v in inside.inputs if v is not None)
            pending.extend(subgraphs(inside))
        reads.update((v, None) for v in graph.outputs)
    return [v for v in reads if v not in own]


def inner(b: Backward, name: str, needs: set[ir.Value] | None = None) -> Backward:
    """A builder for a subgraph of what `b` builds: its names are distinct, its constants stand in the main graph."""
    b.children += 1
    prefix = f"{b.prefix}/{name}_{b.children}"
    return Backward(b.mode, b.needs if needs is None else needs, b.reverse, b, constants=b.constants, prefix=prefix)


def emit(
    b: Backward, op_type: str, inputs: Sequence[ir.Value], outputs: Sequence[ir.Value], **attributes: object
) -> Values:
    """A node with subgraphs; its outputs get the types of `outputs` (never shared with an equal node)."""
    name = f"{b.prefix}/{op_type}_{len(b.nodes)}"
    attributes = {k: v for k, v in attributes.items() if v is not None}
    node = ir.node(op_type, list(inputs), attributes, num_outputs=len(outputs), name=name)  # type: ignore[arg-type]
    for k, (made, like) in enumerate(zip(node.outputs, outputs, strict=True)):
        made.name, made.type = f"{name}.{k}", like.type
    b.nodes.append(node)
    return list(node.outputs)


def argument(body: Backward, name: str, like: ir.Value, *, sliced: bool = False) -> ir.Value:
    """An input of a subgraph: typed as `like`, or as a slice of it along axis 0."""
    shape = None if like.shape is None else ir.Shape(list(like.shape)[1:] if sliced else list(like.shape))
    return ir.Value(name=f"{body.prefix}/{name}", shape=shape, type=like.type)


def scan(b: Backward, step: Step, carried: Values, sequences: Values, rank: int) -> tuple[Values, Values]:
    """Run `step` along axis 0 of `sequences`: the carried values after the last step, the outputs stacked.

    step(body, carried, slices) -> (carried, outputs) emits one step with the builder it is given; all it returns has
    `rank` (runtimes must know it). A sequence of known length 1 needs no Scan.
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
    graph = ir.Graph([*states, *slices], [], nodes=body.nodes, name=body.prefix)
    finish(graph, [*after, *outputs])
    for value in graph.outputs:
        value.shape = value.shape or ir.Shape([None] * rank)
    found = emit(b, "Scan", [*carried, *sequences], graph.outputs, body=graph, num_scan_inputs=len(sequences))
    return found[: len(carried)], found[len(carried) :]


def copied(b: Backward, graph: ir.Graph) -> ir.Graph:
    """A copy of a body, to be differentiated inside another node: every name in it is new."""
    b.children += 1
    prefix = f"{b.prefix}/body_{b.children}"
    copy = graph.clone(allow_outer_scope_values=True)
    copy.name = prefix
    for part in (copy, *copy.subgraphs()):
        for value in part.inputs:
            value.name = f"{prefix}/{value.name}"
        for value in list(part.initializers.values()):
            value.name = f"{prefix}/{value.name}"
        for node in part:
            node.name = f"{prefix}/{node.name}"
            for value in node.outputs:
                value.name = f"{prefix}/{value.name}" if value.name else value.name
    return copy


def finish(graph: ir.Graph, outputs: Sequence[ir.Value]) -> None:
    """Give a body its outputs, each computed inside it and there once; what serves none of them goes."""
    taken: set[ir.Value] = set(graph.inputs)
    del graph.outputs[:]
    for k, value in enumerate(outputs):
        node = value.producer()
        if value in taken or node is None or node.graph is not graph:
            copy = ir.node("Identity", [value], name=f"{graph.name}/output_{k}")
            made = copy.outputs[0]
            made.name, made.type, made.shape = f"{graph.name}/output_{k}.0", value.type, value.shape
            graph.append(copy)
            value = made
        taken.add(value)
        graph.outputs.append(value)
    for node in reversed(list(graph)):
        if not any(o.uses() or o.is_graph_output() for o in node.outputs):
            graph.remove(node, safe=True)
    for name, value in list(graph.initializers.items()):
        if not value.uses():
            del graph.initializers[name]
