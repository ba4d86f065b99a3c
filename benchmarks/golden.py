"""Write the golden gradients of tests/golden: small networks exported by PyTorch, with the gradients it computes.

Needs PyTorch and its exporter (not dependencies of gradlint): python benchmarks/golden.py
Each NAME.onnx has NAME.npz: inputs and targets by name, and `LOSS.MODE.PARAMETER` = dL/dPARAMETER.
"""

import math
import re
import sys
import warnings
from pathlib import Path

import numpy as np
import torch
from torch import nn

warnings.filterwarnings("ignore")
FOLDER = Path(__file__).parent.parent / "tests" / "golden"


class Attention(nn.Module):
    """Pre-norm transformer block over 6 tokens, mean-pooled."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(11, 8)
        self.norm = nn.LayerNorm(8)
        self.qkv = nn.Linear(8, 24)
        self.proj = nn.Linear(8, 8)
        self.mlp = nn.Sequential(nn.LayerNorm(8), nn.Linear(8, 16), nn.GELU(), nn.Linear(16, 8))
        self.head = nn.Linear(8, 5)

    def forward(self, x):
        h = self.embed(x)
        b, t, d = h.shape
        q, k, v = self.qkv(self.norm(h)).reshape(b, t, 3, 2, d // 2).permute(2, 0, 3, 1, 4).unbind(0)
        p = torch.softmax(q @ k.transpose(-1, -2) / math.sqrt(d // 2), -1)
        h = h + self.proj((p @ v).transpose(1, 2).reshape(b, t, d))
        return self.head((h + self.mlp(h)).mean(1))


class Last(nn.Module):
    """A recurrent layer and a head on its last step."""

    def __init__(self, cell):
        super().__init__()
        self.rnn = cell
        self.head = nn.Linear(6, 3)

    def forward(self, x):
        return self.head(self.rnn(x)[0][:, -1])


class Tied(nn.Module):
    """Token logits with the embedding's own matrix: one parameter, two uses."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(9, 6)
        self.mix = nn.Linear(6, 6)

    def forward(self, x):
        return torch.tanh(self.mix(self.embed(x))) @ self.embed.weight.T


def cnn(*end):
    return nn.Sequential(
        nn.Conv2d(2, 6, 3, stride=2, padding=1), nn.BatchNorm2d(6), nn.ReLU(), nn.MaxPool2d(2),
        nn.Conv2d(6, 6, 3, padding=1, groups=3, bias=False), nn.BatchNorm2d(6), nn.SiLU(),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(6, 4), *end,
    )  # fmt: skip


# name -> (network, example input, losses)
CASES = {
    "mlp": (
        nn.Sequential(nn.Linear(5, 8), nn.Tanh(), nn.Linear(8, 8), nn.Sigmoid(), nn.Linear(8, 3)),
        (4, 5), ("linear", "cross-entropy", "mse"),
    ),
    "softmax_head": (
        nn.Sequential(nn.Linear(5, 8), nn.ELU(), nn.Linear(8, 3), nn.Softmax(-1)), (4, 5), ("cross-entropy",)
    ),
    "sigmoid_head": (nn.Sequential(nn.Linear(5, 8), nn.LeakyReLU(), nn.Linear(8, 1), nn.Sigmoid()), (4, 5), ("bce",)),
    "cnn": (cnn(), (4, 2, 12, 12), ("linear", "cross-entropy")),
    "attention": (Attention(), "ids", ("linear",)),
    "tied": (Tied(), "ids", ("linear", "cross-entropy")),
    "rnn": (Last(nn.RNN(4, 6, batch_first=True)), (3, 7, 4), ("linear",)),
    "lstm": (Last(nn.LSTM(4, 6, batch_first=True)), (3, 7, 4), ("linear", "cross-entropy")),
    "gru": (Last(nn.GRU(4, 6, batch_first=True)), (3, 7, 4), ("linear",)),
}  # fmt: skip


def loss_of(name, net, x, target):
    y = net(x)
    if name == "linear":
        return (y * target).sum() / math.sqrt(len(y))
    if name == "mse":
        return nn.functional.mse_loss(y, target)
    if name == "bce":
        return nn.functional.binary_cross_entropy(y, target)
    logits = net[:-1](x) if isinstance(net, nn.Sequential) and isinstance(net[-1], nn.Softmax) else y
    return nn.functional.cross_entropy(logits.flatten(0, -2), target.flatten())


def make(name, net, shape, losses):
    torch.manual_seed(0)
    for m in net.modules():
        if isinstance(m, nn.BatchNorm2d):
            m.momentum = None
            nn.init.uniform_(m.weight, 0.5, 1.5)
    x = torch.randint(0, 9, (4, 6)) if shape == "ids" else torch.randn(*shape)
    net.train()
    net(x)
    net.eval()
    modes = ("eval", "train") if any(isinstance(m, nn.BatchNorm2d) for m in net.modules()) else ("eval",)
    y = net(x)
    arrays = {"x": x.numpy()}
    for loss in losses:
        target = torch.randint(0, y.shape[-1], y.shape[:-1]) if loss == "cross-entropy" else torch.rand_like(y)
        arrays[f"{loss}.target"] = target.numpy()
        for mode in modes:
            net.train(mode == "train")
            net.zero_grad()
            loss_of(loss, net, x, target).backward()
            for parameter, p in net.named_parameters():
                arrays[f"{loss}.{mode}.{parameter}"] = p.grad.numpy().copy()
    net.eval()
    program = torch.onnx.export(
        net, (x,), dynamo=True, verbose=False, input_names=["x"], output_names=["y"], optimize=False
    )
    model = program.model_proto
    for node in model.graph.node:
        for entry in node.metadata_props:  # no path of the machine that made it
            entry.value = re.sub(r'File "[^"]*?(site-packages/[^"]*|golden\.py)"', r'File "\1"', entry.value)
    (FOLDER / f"{name}.onnx").write_bytes(model.SerializeToString(deterministic=True))
    np.savez_compressed(FOLDER / f"{name}.npz", **arrays)


if __name__ == "__main__":
    FOLDER.mkdir(exist_ok=True)
    for case, (network, example, kinds) in CASES.items():
        if len(sys.argv) < 2 or case in sys.argv[1:]:
            torch.manual_seed(1)
            make(case, network, example, kinds)
            print("made", case)
