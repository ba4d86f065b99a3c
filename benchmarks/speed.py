"""Time and memory of the whole command, and of the probe's run against PyTorch and onnx-ad.

    python benchmarks/speed.py [GRADLINT]          prints a table; needs PyTorch, its exporter and onnx-ad; two threads

Per network: seconds of one torch forward + backward (median of 9), of the probe's run and of onnx-ad's backward model
in onnxruntime (median of 5 processes each, first run of a fresh session, gradients of all weights reduced to their RMS)
and their ratios to torch; then the whole command with and without the probe, and peak resident memory.
"""

import json
import shlex
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from pathlib import Path

import numpy as np
import torch
from torch import nn

warnings.filterwarnings("ignore")
torch.set_num_threads(2)


class Residual(nn.Module):
    def __init__(self, into, out, stride):
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(into, out, 3, stride, 1, bias=False), nn.BatchNorm2d(out), nn.ReLU(),
            nn.Conv2d(out, out, 3, 1, 1, bias=False), nn.BatchNorm2d(out),
        )  # fmt: skip
        same = into == out and stride == 1
        self.skip = (
            nn.Identity() if same else nn.Sequential(nn.Conv2d(into, out, 1, stride, bias=False), nn.BatchNorm2d(out))
        )

    def forward(self, x):
        return torch.relu(self.body(x) + self.skip(x))


def resnet18():
    stem = [nn.Conv2d(3, 64, 7, 2, 3, bias=False), nn.BatchNorm2d(64), nn.ReLU(), nn.MaxPool2d(3, 2, 1)]
    widths = [
        (64, 64, 1),
        (64, 64, 1),
        (64, 128, 2),
        (128, 128, 1),
        (128, 256, 2),
        (256, 256, 1),
        (256, 512, 2),
        (512, 512, 1),
    ]
    return nn.Sequential(
        *stem, *(Residual(*w) for w in widths), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(512, 10)
    )


def vgg11():
    layers, into = [], 3
    for out in (64, 0, 128, 0, 256, 256, 0, 512, 512, 0, 512, 512, 0):
        layers += [nn.Conv2d(into, out, 3, padding=1), nn.ReLU()] if out else [nn.MaxPool2d(2)]
        into = out or into
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(512 * 9, 1024), nn.ReLU(), nn.Linear(1024, 10))


class Encoder(nn.Module):
    """A pre-norm transformer, written out as most codebases do."""

    def __init__(self, width, depth, heads, tokens):
        super().__init__()
        self.embed, self.heads = nn.Linear(64, width), heads
        self.position = nn.Parameter(0.02 * torch.randn(1, tokens, width))
        self.layers = nn.ModuleList(
            nn.ModuleDict(
                {
                    "norm1": nn.LayerNorm(width), "qkv": nn.Linear(width, 3 * width),
                    "proj": nn.Linear(width, width), "norm2": nn.LayerNorm(width),
                    "up": nn.Linear(width, 4 * width), "down": nn.Linear(4 * width, width),
                }
            )
            for _ in range(depth)
        )  # fmt: skip
        self.head = nn.Linear(width, 10)

    def forward(self, x):
        h = self.embed(x) + self.position
        b, t, d = h.shape
        for m in self.layers:
            q, k, v = (
                m["qkv"](m["norm1"](h)).reshape(b, t, 3, self.heads, d // self.heads).permute(2, 0, 3, 1, 4).unbind(0)
            )
            p = torch.softmax(q @ k.transpose(-1, -2) * (d // self.heads) ** -0.5, -1)
            h = h + m["proj"]((p @ v).transpose(1, 2).reshape(b, t, d))
            h = h + m["down"](nn.functional.gelu(m["up"](m["norm2"](h))))
        return self.head(h.mean(1))


NETWORKS = {
    "resnet18": (resnet18, (4, 3, 96, 96)),
    "vgg11": (vgg11, (4, 3, 96, 96)),
    "transformer": (lambda: Encoder(192, 12, 3, 197), (4, 197, 64)),
    "small transformer": (lambda: Encoder(96, 6, 4, 32), (4, 32, 64)),
}


def seconds(step, count=9):
    step()
    times = []
    for _ in range(count):
        start = time.perf_counter()
        step()
        times.append(time.perf_counter() - start)
    return statistics.median(times)


# A process starts with its parent's peak memory on its account: a small one in between keeps torch's off it.
WRAPPER = """
import os, sys, time
start = time.perf_counter()
pid = os.posix_spawnp(sys.argv[1], sys.argv[1:], os.environ)
usage = os.wait4(pid, 0)[2]
print(time.perf_counter() - start, usage.ru_maxrss / 1024, file=sys.stderr)
"""


# The model's float weights become inputs, since onnx-ad differentiates by inputs; seeds have a trailing axis.
PEER = """
import sys, time, numpy as np, onnx, onnxruntime
from onnx import TensorProto, helper, numpy_helper
from onnx_ad import reverse
model, data = onnx.load(sys.argv[1]), np.load(sys.argv[2])
weights = {w.name: numpy_helper.to_array(w) for w in model.graph.initializer if w.data_type == TensorProto.FLOAT}
for w in [w for w in model.graph.initializer if w.name in weights]:
    model.graph.initializer.remove(w)
    model.graph.input.append(helper.make_tensor_value_info(w.name, w.data_type, w.dims))
back = reverse(model, layout="onnx")
options = onnxruntime.SessionOptions()
options.intra_op_num_threads = 2
session = onnxruntime.InferenceSession(back.SerializeToString(), options, providers=["CPUExecutionProvider"])
feed = {**weights, "x": data["x"]}
seed = next(i for i in session.get_inputs() if i.name not in feed)
out = next(o for o in model.graph.output)
shape = [d.dim_value for d in out.type.tensor_type.shape.dim]
feed[seed.name] = np.random.default_rng(0).standard_normal((*shape, 1), np.float32)
names = [o.name for o in session.get_outputs() if o.name.startswith("adj_") and o.name[4:] in weights]
start = time.perf_counter()
rms = [float(np.sqrt(np.mean(np.square(g)))) for g in session.run(names, feed)]
print(time.perf_counter() - start)
"""


def peer(path, data):
    """-> seconds of onnx-ad's backward model, or nan where it refuses the model."""
    done = subprocess.run([sys.executable, "-c", PEER, path, data], capture_output=True, text=True)
    return float(done.stdout) if done.returncode == 0 else float("nan")


def run(command):
    """-> (report, wall seconds, peak resident MB) of one process."""
    done = subprocess.run([sys.executable, "-c", WRAPPER, *command], capture_output=True, text=True, check=True)
    wall, peak = done.stderr.splitlines()[-1].split()
    return json.loads(done.stdout), float(wall), float(peak)


def main(gradlint="gradlint"):
    print(f"{'':18s} torch s  probe s  ratio  onnx-ad s  ratio | command s  MB | no probe s  estimate s  MB")
    for name, (build, shape) in NETWORKS.items():
        torch.manual_seed(0)
        net, x = build().eval(), torch.randn(*shape)
        target = torch.randn_like(net(x))

        def step(net=net, x=x, target=target):
            net.zero_grad(set_to_none=True)
            ((net(x) * target).sum() / len(x) ** 0.5).backward()

        own = seconds(step)
        with tempfile.TemporaryDirectory() as folder:
            path, data = str(Path(folder) / "net.onnx"), str(Path(folder) / "net.npz")
            torch.onnx.export(net, (x,), path, dynamo=True, verbose=False, input_names=["x"], optimize=False)
            np.savez(data, x=x.numpy())
            flags = "--mode eval --threads 2 --format json --fail-on never"
            command = [*shlex.split(gradlint), path, "--data", data, *flags.split()]
            rows = [run(command) for _ in range(5)]
            bare = [run([*command, "--no-probe"]) for _ in range(3)]
            other = statistics.median(peer(path, data) for _ in range(5))
        probe = statistics.median(r["timing"]["probe_run_s"] for r, _, _ in rows)
        wall, peak = (statistics.median(row[k] for row in rows) for k in (1, 2))
        light, small = (statistics.median(row[k] for row in bare) for k in (1, 2))
        estimate = statistics.median(r["timing"]["estimate_s"] for r, _, _ in bare)
        print(
            f"{name:18s} {own:7.3f} {probe:8.3f} {probe / own:6.2f} {other:10.3f} {other / own:6.2f} |"
            f" {wall:9.2f} {peak:4.0f} | {light:10.2f} {estimate:11.2f} {small:4.0f}",
            flush=True,
        )


if __name__ == "__main__":
    main(*sys.argv[1:])
