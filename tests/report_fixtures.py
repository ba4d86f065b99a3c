"""Reports built by hand for the renderers' tests: a starved chain, a healthy network, a hostile and a deep one."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

from gradlint.report import render
from gradlint.results import (
    Blame,
    Coverage,
    Fault,
    Finding,
    Fix,
    LayerRow,
    ModelInfo,
    Picture,
    Report,
    Settings,
    Source,
    Summary,
    WeightRow,
)

_TIMING = {"load_s": 0.01, "estimate_s": 0.02, "probe_build_s": 0.1, "probe_run_s": 0.2, "total_s": 0.33}
_SETTINGS = Settings(
    "train", "linear", 0, 8, "seeded standard normal, clipped to [-6, 6]", ("batch axis of input x is 8",)
)


def _model(path: str, nodes: int, parameters: int) -> ModelInfo:
    x = {"name": "x", "dtype": "float32", "shape": ["batch", 32]}
    y = {"name": "y", "dtype": "float32", "shape": ["batch", 10]}
    return ModelInfo(path, "ab" * 32, "pytorch 2.9.0", 18, nodes, parameters, (x,), (y,))


def _flow(decades: float, **more: float) -> dict[str, Any]:
    norm = 3.2 * 10**decades
    return {"output_mean": 0.1, "output_std": 0.5, "signal": 0.9, "grad_rms": norm / 8, "grad_norm": norm,
            "decades": decades, "gain": -0.1, **more}  # fmt: skip


def pictures(weight: str, decades: float = 0.0) -> tuple[Picture, ...]:
    """One picture of each kind."""
    hill = tuple(round(900 * math.exp(-((k - 15.5) ** 2) / 50)) for k in range(32))
    slope = tuple(round(1 / math.cosh((k - 15.5) / 6) ** 2, 3) for k in range(32))
    return (
        Picture("input", f"{weight}.z", -9.0, 9.0, hill, curve=slope),
        Picture("weight", weight, -0.3, 0.3, hill, scheme="He", std=0.25),
        Picture("gradient", weight, decades - 4.0, decades, hill, left_out=500),
        Picture("time", weight, 1.0, 200.0, curve=tuple(decades + k / 10 for k in range(120)), evidence="measured"),
        Picture("logits", weight, -2.0, 2.0, hill, std=0.6),
        Picture("entropy", weight, 0.2, 0.9, hill),
    )


def with_pictures(report: Report, each: int = 6) -> Report:
    """The report as a run for a page has it: layers with weights have `each` pictures, the others none."""
    rows = (replace(r, pictures=pictures(r.weights[0], number)[:each] if r.weights else ())
            for r in report.layers for number in [r.measured.get("decades") or 0.0])  # fmt: skip
    return replace(report, layers=tuple(rows))


def sigmoid_chain(depth: int = 50) -> Report:
    """`depth` pairs of Gemm and Sigmoid; each pair loses a third of a decade, the slopes 0.6, the Gemms win some."""
    layers, weights, before = [], [], ()
    for i in range(depth):
        dense, squash = f"layers.{2 * i}", f"layers.{2 * i + 1}"
        decades = -0.35 * (depth - 1 - i)
        name = f"{dense}.weight"
        source = Source("examples/deep_mlp.py", 14)
        layers.append(
            LayerRow(dense, "Gemm", dense, source, (8, 32), before, (name, f"{dense}.bias"), {"grad_norm": 90.0},
                     _flow(decades + 0.1), _flow(decades - 0.6))
        )  # fmt: skip
        layers.append(
            LayerRow(squash, "Sigmoid", squash, source, (8, 32), (dense,), (), {"output_range": [0.0, 1.0]},
                     _flow(decades + 0.6, slope=0.24, saturated=0.0), _flow(decades, slope=0.245, saturated=0.02))
        )  # fmt: skip
        grad = {"grad_rms": 0.01 * 10**decades, "grad_mean_abs": 0.008 * 10**decades, "zero_share": 0.0}
        weights.append(WeightRow(name, dense, (32, 32), 0.1, True, name, {"grad_rms": 0.012 * 10**decades}, grad))
        before = (squash,)
    blame = tuple(Blame(row.name, row.op_type, -0.6 if row.op_type == "Sigmoid" else 0.25) for row in layers)
    first = layers[0]
    layers[0] = LayerRow(**{**vars(first), "blame": blame})
    swap = Fix("relu", "Replace Sigmoid after `layers.0` by ReLU with He initialisation. PyTorch: `nn.ReLU(); "
               "nn.init.kaiming_normal_(w, nonlinearity=\"relu\")`. Keras: `Dense(32, activation=\"relu\", "
               "kernel_initializer=\"he_normal\")`.")  # fmt: skip
    skip = Fix("skip-connection", "Add a skip connection around every second layer. PyTorch: `x = x + block(x)`. "
               "Keras: `x = layers.add([x, block(x)])`.")  # fmt: skip
    loss = -0.35 * (depth - 1) - 0.6
    findings = (
        Finding("vanishing-gradient", "GL201", "error", "layers.0", None,
                f"the gradient at layers.0 is {-loss:.1f} decades under the output's", "measured",
                {"decades": loss}, (swap, skip), Source("examples/deep_mlp.py", 14), "f0" * 16),
        Finding("sigmoid-chain", "GL102", "error", "layers.1", None,
                f"{depth} Sigmoid layers in series without skip or normalisation", "estimated",
                {"length": depth}, (swap,), Source("examples/deep_mlp.py", 14), "f1" * 16),
        *(
        Finding("init-scale-mismatch", "GL301", "note", f"layers.{2 * i}", f"layers.{2 * i}.weight",
                "variance is 0.33 of Xavier's", "estimated", {"ratio": 0.33},
                (Fix("xavier", "multiply this weight by 1.73"),), None, f"{i:032x}")
            for i in range(12)
        ),
    )  # fmt: skip
    counts = {"error": 2, "warning": 0, "note": 12}
    summary = Summary("fail", 0.98, "init", counts, "layers.0")
    nodes = 2 * depth
    return Report(summary, _model("sigmoid50.onnx", nodes, depth * 1056), _SETTINGS, Coverage(nodes, nodes, nodes),
                  tuple(layers), tuple(weights), findings, _TIMING)  # fmt: skip


def healthy_resnet(blocks: int = 8) -> Report:
    """A residual network with batch normalisation: nothing above a note."""
    layers, weights, before = [], [], "stem.conv"

    def add(name: str, op_type: str, reads: tuple[str, ...], decades: float, **more: float) -> None:
        names = (f"{name}.weight",) if op_type in ("Conv", "Gemm", "BatchNormalization") else ()
        layers.append(LayerRow(name, op_type, name.rpartition(".")[0] or None, Source("nets/resnet.py", 31),
                               (8, 16, 32, 32), reads, names, {}, _flow(decades - 0.05, **more),
                               _flow(decades, **more)))  # fmt: skip
        grads = {"grad_rms": 0.004, "grad_mean_abs": 0.003, "zero_share": 0.0}
        weights.extend(WeightRow(n, name, (16, 16, 3, 3), 0.06, True, n, {"grad_rms": 0.0042}, grads) for n in names)

    add("stem.conv", "Conv", (), 0.31)
    for i in range(blocks):
        scope, decades = f"stage{1 + i // 2}.{i % 2}", 0.3 - 0.03 * i
        add(f"{scope}.conv1", "Conv", (before,), decades - 0.21)
        add(f"{scope}.bn1", "BatchNormalization", (f"{scope}.conv1",), decades - 0.19)
        add(f"{scope}.relu1", "Relu", (f"{scope}.bn1",), decades - 0.2, slope=0.71, dead=0.0)
        add(f"{scope}.conv2", "Conv", (f"{scope}.relu1",), decades - 0.24)
        add(f"{scope}.relu2", "Relu", (f"{scope}.conv2", before), decades, slope=0.8, dead=0.0)
        before = f"{scope}.relu2"
    add("fc", "Gemm", (before,), 0.0)
    summary = Summary("pass", 0.03, "init", {"error": 0, "warning": 0, "note": 0}, None)
    nodes = len(layers) + 12
    return Report(summary, _model("resnet.onnx", nodes, 175_258), _SETTINGS, Coverage(nodes, nodes, nodes),
                  tuple(layers), tuple(weights), (), _TIMING)  # fmt: skip


HOSTILE_NAMES = (
    "<script>alert(1)</script>",
    "\"'><img src=x onerror=alert(1)>",
    "a" * 10_000,
    "x\x1b[31mred\x1b]0;title\x07",
    "abc\u202edcba\u202c\u2066iso\u2069",
    "line\nbreak\r\n::error::injected",
    "c1\x85\x9b31m\x7f\x00",
    "表\u0301の層.注意",
    "| pipe `tick` **bold** {{ 7*7 }} {% raw %}",
    "lone\ud800surrogate",
    "percent%0A,colon:",
    "</style></script>]]>-->",
)


def _odd_pictures(name: str, first: float | None, second: float | None) -> tuple[Picture, ...]:
    """Pictures from a file that anyone may have written."""
    low, high = (math.nan if v is None else v for v in (first, second))
    odd = [Picture(p.kind, name, low, high, p.counts, 3, (low, high), None, name, -1.0) for p in pictures(name)]
    odd += [replace(p, subject=name, counts=(), curve=()) for p in pictures(name)]
    odd += [replace(p, subject=name, counts=(-1, 5), curve=(0.5, 7.0)) for p in pictures(name)]
    odd += [replace(p, subject=name, scheme=name, std=1e308, low=p.high, high=p.low) for p in pictures(name)]
    return (*odd, *(replace(p, subject=name, scheme=name, std=1e-308, left_out=-7) for p in pictures(name)))


def hostile() -> Report:
    """Names that attack every output, and figures that are no numbers, in pictures too."""
    odd = (math.nan, math.inf, -math.inf, None, 0.0, 1e308)
    layers = []
    for i, name in enumerate(HOSTILE_NAMES):
        flow = {"grad_norm": odd[i % 6], "decades": odd[(i + 1) % 6], "signal": odd[(i + 2) % 6], "slope": math.nan}
        layers.append(LayerRow(name, name[:40], name, Source(name, 3), ("N", name, 3), HOSTILE_NAMES[:i], (name,),
                               flow, flow, flow, (Blame(name, name, odd[i % 6] or 0.0),),
                               _odd_pictures(name, odd[i % 6], odd[(i + 1) % 6])))  # fmt: skip
    weights = tuple(
        WeightRow(name, name, (3, 3), math.nan, True, [name, name], {"grad_rms": math.inf}, {"grad_rms": None})
        for name in HOSTILE_NAMES
    )
    findings = tuple(
        Finding(rule, f"GL20{1 + i % 2}", ("error", "warning", "note")[i % 3], name, name, f"at {name} it fails",
                "measured", {name: math.nan}, (Fix(name, f"change {name}\n    {name}"),), Source(name, 7), name)
        for i, name in enumerate(HOSTILE_NAMES)
        for rule in ("vanishing-gradient", name)
    )  # fmt: skip
    info = {"name": HOSTILE_NAMES[0], "dtype": HOSTILE_NAMES[3], "shape": [HOSTILE_NAMES[4], 3]}
    model = ModelInfo(HOSTILE_NAMES[5], "00" * 32, HOSTILE_NAMES[3], 18, 12, 12, (info,), (info,))
    settings = Settings("train", HOSTILE_NAMES[1], 0, 8, HOSTILE_NAMES[3], HOSTILE_NAMES)
    counts = {"error": 8, "warning": 8, "note": 8}
    return Report(Summary("fail", math.nan, "init", counts, HOSTILE_NAMES[0]), model, settings,
                  Coverage(12, 3, 2, dict.fromkeys(HOSTILE_NAMES, 1)), tuple(layers), weights, findings,
                  _TIMING)  # fmt: skip


def faults() -> tuple[Fault, ...]:
    """A model that was not checked, and one for each hostile name."""
    return (Fault("nets/cut.onnx: truncated", "nets/cut.onnx"), *(Fault(f"{n}: broken {n}", n) for n in HOSTILE_NAMES))


SNAPSHOTS = Path(__file__).parent / "snapshots"


def snapshots() -> dict[str, str]:
    """What the files in `snapshots` hold, by name; run this file to write them anew, then read the difference."""
    reports = {"sigmoid": sigmoid_chain(), "resnet": healthy_resnet()}
    texts = {f"full-{name}.txt": render([report], "full") for name, report in reports.items()}
    texts["full-color.txt"] = render([sigmoid_chain(3)], "full", color=True, width=60)
    small = [sigmoid_chain(3), healthy_resnet(1)]
    for name, format in (("concise", "concise.txt"), ("github", "github.txt"), ("markdown", "markdown.md"),
                         ("junit", "junit.xml"), ("gitlab", "gitlab.json")):  # fmt: skip
        texts[format] = render(small, name)
    return texts


if __name__ == "__main__":
    for name, text in snapshots().items():
        (SNAPSHOTS / name).write_text(text, encoding="utf-8")
