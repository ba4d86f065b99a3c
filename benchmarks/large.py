"""Time and memory on transformers with external weights, at three sizes up to 2 GB.

    python benchmarks/large.py [GRADLINT]      prints a table; needs 4 GB of disk in the temporary folder

Per size: the estimate (--no-probe) and `gradlint differentiate`: seconds and peak resident memory (pages of the memory
map count) of the process.
"""

import json
import os
import shlex
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

WIDTH, HEADS, TOKENS = 928, 8, 32


class Writer:
    """Collects nodes; weights go to one external file as they come."""

    def __init__(self, folder):
        self.nodes, self.weights, self.file = [], [], open(Path(folder) / "weights.bin", "wb")  # noqa: SIM115
        self.rng = np.random.default_rng(0)

    def node(self, op, *inputs, **attributes):
        name = f"{op}_{len(self.nodes)}"
        self.nodes.append(helper.make_node(op, list(inputs), [f"{name}.out"], name=name, **attributes))
        return f"{name}.out"

    def weight(self, name, *shape, std):
        array = (std * self.rng.standard_normal(shape, dtype=np.float32)) if std else np.ones(shape, np.float32)
        tensor = TensorProto(name=name, data_type=TensorProto.FLOAT, dims=shape, data_location=TensorProto.EXTERNAL)
        for key, value in {"location": "weights.bin", "offset": self.file.tell(), "length": array.nbytes}.items():
            tensor.external_data.add(key=key, value=str(value))
        self.file.write(array.tobytes())
        self.weights.append(tensor)
        return name

    def constant(self, name, array):
        self.weights.append(numpy_helper.from_array(np.asarray(array), name))
        return name


def transformer(folder, depth):
    """A pre-norm transformer of `depth` layers; returns the model's path."""
    w = Writer(folder)
    split = w.constant("split", np.array([0, 0, HEADS, WIDTH // HEADS], np.int64))
    merge = w.constant("merge", np.array([0, 0, WIDTH], np.int64))
    scale = w.constant("scale", np.float32((WIDTH // HEADS) ** -0.5))

    def linear(x, name, into, out):
        return w.node("MatMul", x, w.weight(f"{name}.weight", into, out, std=into**-0.5))

    def heads(x):
        return w.node("Transpose", w.node("Reshape", x, split), perm=[0, 2, 1, 3])

    h = "x"
    for k in range(depth):
        n = w.node("LayerNormalization", h, w.weight(f"{k}.norm1", WIDTH, std=0), axis=-1)
        q, key, v = (heads(linear(n, f"{k}.{part}", WIDTH, WIDTH)) for part in "qkv")
        p = w.node("MatMul", w.node("Mul", q, scale), w.node("Transpose", key, perm=[0, 1, 3, 2]))
        mixed = w.node("MatMul", w.node("Softmax", p, axis=-1), v)
        joined = w.node("Reshape", w.node("Transpose", mixed, perm=[0, 2, 1, 3]), merge)
        h = w.node("Add", h, linear(joined, f"{k}.proj", WIDTH, WIDTH))
        n = w.node("LayerNormalization", h, w.weight(f"{k}.norm2", WIDTH, std=0), axis=-1)
        wide = w.node("Gelu", linear(n, f"{k}.up", WIDTH, 4 * WIDTH))
        h = w.node("Add", h, linear(wide, f"{k}.down", 4 * WIDTH, WIDTH))
    w.file.close()
    shape = ["batch", TOKENS, WIDTH]
    graph = helper.make_graph(
        w.nodes,
        "transformer",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, shape)],
        [helper.make_tensor_value_info(h, TensorProto.FLOAT, shape)],
        w.weights,
    )
    path = Path(folder) / "model.onnx"
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=9), path)
    return str(path)


def run(command):
    """-> (stdout, wall seconds, peak resident MB) of one process."""
    with tempfile.TemporaryFile() as out:
        start = time.perf_counter()
        pid = os.posix_spawnp(command[0], command, os.environ, file_actions=[(os.POSIX_SPAWN_DUP2, out.fileno(), 1)])
        _, status, usage = os.wait4(pid, 0)
        out.seek(0)
        return out.read(), time.perf_counter() - start, usage.ru_maxrss / 1024, status


def main(gradlint="gradlint"):
    print("layers  weights MB | estimate s  command s  peak MB | differentiate s  peak MB")
    for depth in (12, 24, 48):
        with tempfile.TemporaryDirectory() as folder:
            path = transformer(folder, depth)
            size = os.path.getsize(Path(folder) / "weights.bin") / 1e6
            text, wall, peak, _ = run(
                [*shlex.split(gradlint), path, "--no-probe", "--format", "json", "--fail-on", "never"]
            )
            seconds = json.loads(text)["timing"]["estimate_s"]
            back = str(Path(folder) / "backward.onnx")
            _, took, used, status = run([*shlex.split(gradlint), "differentiate", path, "-o", back])
            assert status == 0, "differentiate failed"
            print(
                f"{depth:6d} {size:11.0f} | {seconds:10.2f} {wall:10.2f} {peak:8.0f} | {took:15.2f} {used:8.0f}",
                flush=True,
            )


if __name__ == "__main__":
    main(*sys.argv[1:])
