"""The straight line: load, estimate, probe, gather, judge; the outcome is one Report."""

from __future__ import annotations

import hashlib
import math
import os
import time
from collections import Counter
from collections.abc import Mapping, Sequence, Set
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx_ir as ir

from gradlint.anatomy import Anatomy, anatomy
from gradlint.binding import Dims, deciding_inputs
from gradlint.canonical import canonicalize
from gradlint.data import Data, check_inputs, read_data, setting, synthetic
from gradlint.domain import Moments, Range
from gradlint.estimate import Estimate, Proof, estimate, prove
from gradlint.exceptions import DataError
from gradlint.fact_table import Fact, Subject
from gradlint.facts import EXPORT_LINE, Facts, gather, request
from gradlint.folding import folded_batchnorms, is_restored, restore_batchnorms
from gradlint.graph import FLOATS, batch_size, dims, is_float, op
from gradlint.identity import identities
from gradlint.judge import judge, verdict
from gradlint.load import Source, from_proto, read, source
from gradlint.naming import check_names
from gradlint.ops.quantization import is_quantized
from gradlint.options import Options
from gradlint.parameters import split_merged
from gradlint.pictures import pictured
from gradlint.probe import Probe, Skipped, probe
from gradlint.reach import disconnected_subjects, draw_zero_heads
from gradlint.recurrent_facts import unknown_lengths
from gradlint.results import LEVELS, Blame, Coverage, LayerRow, ModelInfo, Report, Settings, Summary
from gradlint.risk import risk
from gradlint.rulebook import Rulebook, configured_rules
from gradlint.source_tree import locate_sources
from gradlint.stage import guess_stage
from gradlint.unfolding import unfold

if TYPE_CHECKING:
    import onnx

_RANGE = 6.0  # the declared range of float inputs: synthetic data is clipped to it


def analyse(model: str | os.PathLike[str] | onnx.ModelProto, options: Options, book: Rulebook | None = None) -> Report:
    """Analyse one model and judge it by the rules of `book` (default: gradlint's own and those of `options.rules`)."""
    began = time.perf_counter()
    seen = _examine(model, options, 0)
    for attempt in range(1, _ATTEMPTS):
        if not seen.rejected:
            break
        again = _examine(model, options, attempt)
        seen = seen if again.rejected else again
    source, parts, guess, proof, probed = seen.source, seen.parts, seen.guess, seen.proof, seen.probed
    graph = source.model.graph
    stage = options.stage or guess_stage(parts.uses)
    model_facts = _model_facts(graph, parts, guess, probed, options, stage)
    model_facts["zero_head"] = seen.zero_head
    facts = gather(parts, guess, proof, probed, options, model_facts, seen.lengths, seen.disconnected)
    score = risk(facts)
    found = judge(
        facts.subjects,
        book or configured_rules(options.rules, options.levels, options.limits),
        preview=options.preview,
        select=options.select,
        ignore=options.ignore,
        extend_select=options.extend_select,
        layer_ignores=options.layer_ignores,
        identities=identities(parts),
    ).findings
    timing = {
        "load_s": seen.load_s,
        "estimate_s": seen.estimate_s,
        "probe_build_s": getattr(probed, "build_s", 0.0),
        "probe_run_s": getattr(probed, "run_s", 0.0),
    }
    worst = _worst(facts)
    layers = facts.layers
    if options.pictures:
        drawing = time.perf_counter()
        layers = pictured(facts, parts, probed if isinstance(probed, Probe) else None)
        timing["pictures_s"] = getattr(probed, "histograms_s", 0.0) + time.perf_counter() - drawing
    timing["total_s"] = time.perf_counter() - began
    counts = Counter(f.level for f in found)
    return Report(
        summary=Summary(verdict(found, score), score, stage, {k: counts[k] for k in LEVELS}, worst),
        model=_model_info(source, seen.inputs, facts),
        settings=Settings(
            options.mode, options.loss, options.seed, _examples(probed, guess), seen.origin, seen.assumed
        ),
        coverage=_coverage(graph, guess, probed),
        layers=_blamed(layers, facts.blames, {worst, *(finding.layer for finding in found)}),
        weights=facts.weights,
        findings=found,
        timing={k: round(v, 6) for k, v in timing.items()},
    )


_PARTS = 20_000  # of blame that a report holds for layers nobody speaks of


def _blamed(
    layers: tuple[LayerRow, ...], blames: Mapping[str, Sequence[Blame]], told: Set[str | None]
) -> tuple[LayerRow, ...]:
    """Blame grows with the square of the depth: past `_PARTS` of it, layers in `told` alone get theirs."""
    few = sum(map(len, blames.values())) <= _PARTS
    return tuple(replace(row, blame=tuple(blames[row.name]) if few or row.name in told else None) for row in layers)


_ATTEMPTS = 9  # sizes tried for dimensions nobody gave, when the model rejects one as it runs


@dataclass(frozen=True)
class _Examined:
    """One pass of load, estimate and probe. rejected: the model ran into sizes that had been chosen for it."""

    source: Source
    inputs: tuple[Mapping[str, Any], ...]
    assumed: tuple[str, ...]
    parts: Anatomy
    guess: Estimate
    proof: Proof
    probed: Probe | Skipped | None
    origin: str
    rejected: bool
    load_s: float
    estimate_s: float
    lengths: frozenset[str]
    disconnected: tuple[Subject, ...]
    zero_head: bool


def _examine(model: str | os.PathLike[str] | onnx.ModelProto, options: Options, passed_over: int) -> _Examined:
    began = time.perf_counter()
    source = _source(model)
    graph = source.model.graph
    check_names(graph, options)
    data = _given(graph, options)
    settings = {str(v.name): setting(v, options.seed, _value(v, options, data)) for v in deciding_inputs(graph)}
    inputs = list(graph.inputs)
    given = {n: _sizes(v, data.inputs[n]) for v in graph.inputs if data and (n := str(v.name)) in data.inputs}
    shapes = {**{n: s for n, s in given.items() if n not in settings}, **options.shapes}
    bound = Dims(options.batch, options.dims, shapes, settings, passed_over)
    lengths = unknown_lengths(graph, frozenset({*options.dims, *shapes}))
    disconnected = tuple(disconnected_subjects(graph))
    unfold(source.model)
    sizes = canonicalize(source.model, bound, source.path)
    if options.mode == "train":
        restore_batchnorms(graph)
    split_merged(source.model)
    locate_sources(graph, options.source_root)
    parts = anatomy(graph)
    zero_head = draw_zero_heads(parts, options.seed)
    assumed = [*sizes, *(f"{n} = {a.item()}" for n, a in settings.items() if n not in options.values)]
    loaded = time.perf_counter()
    guess = _estimate(graph, options, data, assumed)
    estimated = time.perf_counter()
    probed, origin = _probe(source, guess, parts, options, data)
    if isinstance(probed, Skipped) and sizes and (probed.rejected or not probed.remedy):
        probed = replace(probed, remedy=_other_sizes(sizes, probed.remedy))
    measured = time.perf_counter()
    proof = prove(graph, _ranges(graph, options), batch=guess.batch, mode=options.mode)  # its ranges take memory
    rejected = bool(sizes) and getattr(probed, "rejected", False)
    described = tuple(_described(v) for v in inputs)
    times = (loaded - began, estimated - loaded + time.perf_counter() - measured)
    before = (lengths, disconnected)
    return _Examined(
        source, described, tuple(assumed), parts, guess, proof, probed, origin, rejected, *times, *before, zero_head
    )


def _other_sizes(chosen: Sequence[str], remedy: str) -> str:
    return f"choose other sizes than {_few(chosen)} with --dim NAME=SIZE" + (f", or {remedy}" if remedy else "")


def _sizes(value: ir.Value, array: np.ndarray) -> tuple[int, ...]:
    """The data's sizes where the model leaves them open; a fixed batch stays (longer data runs in parts)."""
    own = list(value.shape) if value.shape is not None else list(array.shape)
    return tuple(d if isinstance(d, int) and d > 0 else n for d, n in zip(own, array.shape, strict=True))


def _value(value: ir.Value, options: Options, data: Data | None) -> float | None:
    """What --input or the data give for an input of one element."""
    name = str(value.name)
    if name in options.values:
        return options.values[name]
    return float(data.inputs[name].item()) if data is not None and name in data.inputs else None


def _source(model: str | os.PathLike[str] | onnx.ModelProto) -> Source:
    if isinstance(model, str | os.PathLike):
        return read(model)
    content = model.SerializeToString(deterministic=True)
    return source(from_proto(model, "model", Path(".")), "model", hashlib.sha256(content).hexdigest(), model)


def _given(graph: ir.Graph, options: Options) -> Data | None:
    """The user's data, checked; scalars of --input are filled in later, when shapes are known."""
    inputs = {str(v.name): v for v in graph.inputs if v.name not in graph.initializers}
    if options.data is None:
        return None
    outputs = tuple(str(o.name) for o in graph.outputs)
    return check_inputs(read_data(options.data, inputs, outputs), inputs)


def _estimate(graph: ir.Graph, options: Options, data: Data | None, assumed: list[str]) -> Estimate:
    inputs: dict[str, Moments] = {}
    for value in graph.inputs:
        name, rank = str(value.name), len(value.shape or ())
        if not is_float(value):
            continue
        if name in options.stats:
            means, deviations = (np.asarray(s, np.float64) for s in options.stats[name])
            axis = 1 if rank >= 3 else rank - 1
            shape = [-1 if a == axis and max(means.size, deviations.size) > 1 else 1 for a in range(rank)]
            zero = np.zeros((1,) * rank)
            inputs[name] = Moments(means.reshape(shape), zero, zero, np.square(deviations).reshape(shape))
        elif name in options.ranges:
            low, high = options.ranges[name]
            inputs[name] = Moments.normal(rank, (low + high) / 2, (high - low) ** 2 / 12)
        elif data is not None and name in data.inputs:
            array = data.inputs[name].astype(np.float64)
            inputs[name] = Moments.normal(rank, float(array.mean()), float(array.var()))
        else:
            continue
        assumed.append(
            f"{name}: mean {float(inputs[name].mean.mean()):.3g}, variance {float(inputs[name].var.mean()):.3g}"
        )
    if not inputs and any(is_float(v) for v in graph.inputs):
        assumed.append("inputs estimated as standard normal")
    return estimate(graph, batch=batch_size(graph), mode=options.mode, inputs=inputs)


def _ranges(graph: ir.Graph, options: Options) -> dict[str, Range]:
    found = {}
    for value in graph.inputs:
        if is_float(value):
            low, high = options.ranges.get(str(value.name), (-_RANGE, _RANGE))
            one = np.ones((1,) * len(value.shape or ()))
            found[str(value.name)] = Range(low * one, high * one)
    return found


def _probe(
    source: Source, guess: Estimate, parts: Anatomy, options: Options, data: Data | None
) -> tuple[Probe | Skipped | None, str]:
    """The measurement, or why there is none; and where its data came from, in words."""
    if not options.probe:
        return None, "none"
    graph = source.model.graph
    given = dict(data.inputs) if data else {}
    for value in graph.inputs:
        name = str(value.name)
        if name in options.values and value.dtype is not None:
            kind = np.float32 if value.dtype in FLOATS else value.dtype.numpy()
            given[name] = np.full(dims(value) or (), options.values[name], kind)
    try:
        made = synthetic(graph, options.seed, given)
    except DataError as error:
        return Skipped(str(error), "give --data or --input-shape"), "none"
    origin = data.origin if data else "synthetic"
    if data is not None and made:
        origin += f" (synthetic: {', '.join(made)})"
    whole = Data({**made, **given}, data.targets if data else {}, origin)
    found = probe(
        source.model,
        whole,
        request(parts, guess, pictures=options.pictures),
        loss=options.loss,
        mode=options.mode,
        seed=options.seed,
        threads=options.threads,
    )
    return found, origin


def _model_facts(
    graph: ir.Graph, parts: Anatomy, guess: Estimate, probed: Probe | Skipped | None, options: Options, stage: str
) -> dict[str, Fact]:
    folded = folded_batchnorms(graph)
    unmodelled = Counter(op(n) for n in guess.unmodelled)
    nodes = sum(1 for _ in graph.all_nodes())
    facts: dict[str, Fact] = {
        "stage": stage,
        "stage_given": options.stage is not None,
        "mode": options.mode,
        "loss": options.loss,
        "batch": _examples(probed, guess),
        "data_given": options.data is not None,
        "optimizer": options.optimizer or "sgd",
        "learning_rate": options.lr,
        "layers": len(parts.weighted),
        "weights": len(parts.uses),
        "model_parameters": _parameters(parts),
        "folded_batchnorm": len(folded),
        "folded_layers": _few([str(n.name) for n in folded]),
        "restored_batchnorm": sum(map(is_restored, folded)),
        "export_line": EXPORT_LINE,
        "unmodelled_nodes": sum(unmodelled.values()),
        "unmodelled_share": len(guess.behind) / max(1, nodes),
        "unmodelled_ops": ", ".join(f"{name} ({n})" for name, n in sorted(unmodelled.items())),
        "quantized_ops": sum(1 for n in graph.all_nodes() if is_quantized(n)),
        "probe_skipped": False,
        "cut_nodes": 0,
    }
    if isinstance(probed, Skipped):
        facts |= {"probe_skipped": True, "probe_skipped_reason": probed.reason, "probe_remedy": probed.remedy or None}
    elif probed is not None:
        cuts = Counter(c.op_type for c in probed.cuts)
        facts |= probed.whole
        facts["cut_nodes"] = sum(cuts.values())
        facts["cut_ops"] = ", ".join(f"{name} ({n})" for name, n in sorted(cuts.items()))
    return facts


def _few(names: Sequence[str], most: int = 4) -> str:
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")


def _parameters(parts: Anatomy) -> int:
    return sum(math.prod(dims(v) or ()) for v in {u.value for u in parts.uses})


def _examples(probed: Probe | Skipped | None, guess: Estimate) -> int:
    return getattr(probed, "examples", guess.batch)


def _coverage(graph: ir.Graph, guess: Estimate, probed: Probe | Skipped | None) -> Coverage:
    nodes = list(graph)
    measured: frozenset[str] = getattr(probed, "measured", frozenset())
    return Coverage(
        nodes=len(nodes),
        estimated=sum(n not in guess.behind for n in nodes),
        measured=sum(str(n.name) in measured for n in nodes),
        unmodelled=dict(sorted(Counter(op(n) for n in guess.unmodelled).items())),
    )


def _worst(facts: Facts) -> str | None:
    """The layer with the least trunk gradient by the best evidence, if it is behind at all."""
    rows = [(s.facts["trunk_decades"], s.layer) for s in facts.subjects if s.layer and "trunk_decades" in s.facts]
    finite = [(float(d), name) for d, name in rows if isinstance(d, float | int)]
    return min(finite, default=(0.0, None), key=lambda row: row[0])[1]


def _model_info(source: Source, inputs: tuple[Mapping[str, Any], ...], facts: Facts) -> ModelInfo:
    model = source.model
    producer = " ".join(p for p in (model.producer_name, model.producer_version) if p)
    return ModelInfo(
        path=source.path,
        sha256=source.sha256,
        producer=producer,
        opset=source.opset,
        nodes=source.nodes,
        parameters=int(facts.model.get("model_parameters") or 0),
        inputs=inputs,
        outputs=tuple(_described(v) for v in model.graph.outputs),
    )


def _described(value: ir.Value) -> Mapping[str, Any]:
    return {
        "name": str(value.name),
        "dtype": str(value.dtype.name if value.dtype else "?").lower(),
        "shape": list(dims(value) or ()),
    }
