"""Published architectures at their own initialisation, and sabotaged twins: what gradlint says, what training says.

    python benchmarks/architectures.py make LIST DIR            export each architecture and its twins
    python benchmarks/architectures.py train LIST DIR           train each of them briefly
    python benchmarks/architectures.py judge LIST DIR GRADLINT  run gradlint, print the tables

LIST: lines of `kind name`, kind `timm` or `hf`. Needs torch, timm and transformers. Names of twins at the end restrict
a step to them. Each step leaves a file per network in DIR and goes on where it stopped. Models are exported in eval
mode with their BatchNormalization kept; gradlint judges them in train mode, with batch statistics. Nothing is drawn
anew: zero-initialised heads and residual scales stay.
"""

import copy
import enum
import importlib.abc
import importlib.machinery
import json
import re
import shlex
import subprocess
import sys
import types
import warnings
from pathlib import Path
from unittest.mock import MagicMock

warnings.filterwarnings("ignore")
SIDE, BATCH, CLASSES, TOKENS, WORDS = 64, 8, 4, 32, 512
RATES, STEPS = (0.3, 0.03, 0.003), 150
TWINS = ("default", "sigmoid", "x0.1", "x10", "no-skip", "no-norm")
TWINS += ("x10+no-norm", "sigmoid+no-norm", "no-norm+no-skip", "sigmoid+no-norm+no-skip")  # what is robust to one


# -- architectures -----------------------------------------------------------------------------------------------------


class _Torchvision(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Lets timm be imported without torchvision, of which its models use nothing."""

    def find_spec(self, name, path=None, target=None):
        return (
            importlib.machinery.ModuleSpec(name, self, is_package=True) if name.split(".")[0] == "torchvision" else None
        )

    def create_module(self, spec):
        module = types.ModuleType(spec.name)
        module.__path__, module.__version__ = [], "0.20.0"
        module.__getattr__ = lambda name: type(name, (), {}) if name[0].isupper() else MagicMock()
        module.InterpolationMode = enum.Enum("InterpolationMode", "NEAREST BILINEAR BICUBIC BOX HAMMING LANCZOS")
        return module

    def exec_module(self, module):
        pass


def build(kind, name):
    """The network at its default initialisation, without dropout, and a batch of inputs."""
    import torch

    torch.manual_seed(0)
    net = timm_network(name) if kind == "timm" else transformer(name)
    for module in net.modules():
        if isinstance(module, torch.nn.modules.dropout._DropoutNd):
            module.p = 0.0
        for rate in ("drop_prob", "attention_dropout", "dropout", "activation_dropout", "hidden_dropout"):
            if isinstance(getattr(module, rate, None), float):
                setattr(module, rate, 0.0)
    return net, batch(kind, torch.Generator().manual_seed(1))[0]


def timm_network(name):
    finder = _Torchvision()
    sys.meta_path.insert(0, finder)
    import timm

    sys.meta_path.remove(finder)
    for module in [m for m in sys.modules if m.split(".")[0] == "torchvision"]:
        del sys.modules[module]
    try:
        return timm.create_model(name, num_classes=CLASSES, img_size=SIDE)
    except TypeError:
        return timm.create_model(name, num_classes=CLASSES)


def transformer(name):
    import torch
    import transformers as tf

    heads = {"num_hidden_layers": 6, "num_attention_heads": 4, "vocab_size": WORDS}
    tiny, few = {"hidden_size": 96, "intermediate_size": 192, **heads}, {"num_labels": CLASSES}
    net = {
        "bert": lambda: tf.BertForSequenceClassification(tf.BertConfig(**tiny, **few)),
        "roberta": lambda: tf.RobertaForSequenceClassification(tf.RobertaConfig(**tiny, **few)),
        "distilbert": lambda: tf.DistilBertForSequenceClassification(
            tf.DistilBertConfig(dim=96, n_layers=6, n_heads=4, hidden_dim=192, vocab_size=WORDS, **few)
        ),
        "electra": lambda: tf.ElectraForSequenceClassification(tf.ElectraConfig(**tiny, **few, embedding_size=64)),
        "albert": lambda: tf.AlbertForSequenceClassification(tf.AlbertConfig(**tiny, **few, embedding_size=64)),
        "gpt2": lambda: tf.GPT2LMHeadModel(
            tf.GPT2Config(n_embd=96, n_layer=6, n_head=4, vocab_size=WORDS, n_positions=64)
        ),
        "llama": lambda: tf.LlamaForCausalLM(tf.LlamaConfig(**tiny, num_key_value_heads=2)),
        "qwen2": lambda: tf.Qwen2ForCausalLM(tf.Qwen2Config(**tiny, num_key_value_heads=2)),
        "gpt_neox": lambda: tf.GPTNeoXForCausalLM(tf.GPTNeoXConfig(**tiny)),
        "opt": lambda: tf.OPTForCausalLM(
            tf.OPTConfig(
                hidden_size=96,
                num_hidden_layers=6,
                num_attention_heads=4,
                ffn_dim=192,
                vocab_size=WORDS,
                word_embed_proj_dim=96,
                max_position_embeddings=64,
            )
        ),
    }[name]()
    net.config.use_cache = False
    net.config._attn_implementation = "eager"

    class Logits(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.net = net

        def forward(self, x):
            return self.net(input_ids=x).logits

    return Logits()


def batch(kind, generator):
    """Inputs of CLASSES kinds, in noise, and which they are: smooth patterns, or texts of words of their own."""
    import torch

    classes = torch.randint(0, CLASSES, (BATCH,), generator=generator)
    if kind == "hf":
        words = torch.randint(0, 4 * CLASSES, (BATCH, TOKENS), generator=generator)
        theirs = torch.rand(words.shape, generator=generator) < 0.9
        return torch.where(theirs, words // CLASSES + 4 * classes[:, None], words), classes
    patterns = torch.randn(CLASSES, 3, 4, 4, generator=torch.Generator().manual_seed(7))
    patterns = torch.nn.functional.interpolate(patterns, SIDE, mode="bicubic")
    return patterns[classes] + torch.randn(BATCH, 3, SIDE, SIDE, generator=generator), classes


# -- sabotage ----------------------------------------------------------------------------------------------------------

ACTIVATION = re.compile(r"ReLU6?|GELU\w*|NewGELU\w*|SiLU\w*|Swish\w*|Hard[Ss]wish\w*|Mish")
NORM = re.compile(r"\w*(BatchNorm|LayerNorm|RMSNorm|GroupNorm|FrozenBatchNorm)(2d|1d|Act2d|Act|1)?|\w*NormAct2d")


def sabotaged(net, twin, inputs):
    """The network with what `twin` names changed or taken away; None where there is nothing to take."""
    import torch

    for part in twin.split("+"):
        changed = 1
        if part == "sigmoid":
            changed = replaced(net, ACTIVATION, lambda module: torch.nn.Sigmoid())
        elif part == "no-norm":
            changed = replaced(net, NORM, lambda module: getattr(module, "act", None) or torch.nn.Identity())
        elif part == "no-skip":
            net, changed = without_skips(net, inputs)
        elif part != "default":
            with torch.no_grad():
                for kernel in {id(k): k for k in kernels(net)}.values():
                    kernel.mul_(float(part[1:]))
        if not changed:
            return None
    return net


def kernels(net):
    kinds = re.compile(r"\w*(Linear|Conv[12]d\w*|Conv1D)")
    return [m.weight for m in net.modules() if kinds.fullmatch(type(m).__name__) and hasattr(m, "weight")]


def replaced(net, pattern, other):
    """Puts `other(module)` in the place of each module whose class matches; returns how many there were."""
    found = [(n, m) for n, m in net.named_modules() if pattern.fullmatch(type(m).__name__)]
    for path, module in found:
        parent, _, child = path.rpartition(".")
        setattr(net.get_submodule(parent), child, other(module))
    return len(found)


def without_skips(net, inputs):
    """Each sum of a value and of what was computed from it becomes the latter. In the mode the network is in."""
    import torch

    graph_module = torch.export.export(net, (inputs,), strict=False).module()
    ancestors, changed = {}, 0
    for node in list(graph_module.graph.nodes):
        if node.op == "call_function" and node.target in (torch.ops.aten.add.Tensor, torch.ops.aten.add_.Tensor):
            a, b = (n if isinstance(n, torch.fx.Node) else None for n in node.args[:2])
            branch = b if a in ancestors.get(b, ()) else a if b in ancestors.get(a, ()) else None
            if branch is not None and a.op == b.op == "call_function":
                node.replace_all_uses_with(branch)
                graph_module.graph.erase_node(node)  # no dead code to its compiler where it adds in place
                changed += 1
                continue
        ancestors[node] = frozenset().union(*(ancestors[n] | {n} for n in node.all_input_nodes))
    graph_module.recompile()
    return graph_module, changed


# -- steps -------------------------------------------------------------------------------------------------------------


def architectures(listing):
    lines = [line.split()[:2] for line in Path(listing).read_text().splitlines()]
    return [tuple(words) for words in lines if words and not words[0].startswith("#")]


def make(listing, folder, *twins):
    import torch

    Path(folder).mkdir(parents=True, exist_ok=True)
    for kind, name in architectures(listing):
        for twin in twins or TWINS:
            path = Path(folder, f"{name}.{twin}.onnx")
            none = path.with_suffix(".none")
            if path.exists() or none.exists():
                continue
            try:
                net, inputs = build(kind, name)
                net = sabotaged(net.eval(), twin, inputs)
                if net is None:
                    none.touch()
                    continue
                torch.onnx.export(net, (inputs,), dynamo=True, verbose=False, optimize=False).save(path)
                print("made", path.name, flush=True)
            except Exception as error:
                print("FAILED", path.name, repr(error)[:300], flush=True)


def train(listing, folder, *twins):
    """Per network the share of right answers in the last batches, at each rate until one succeeds."""
    import torch

    torch.set_num_threads(1)
    for kind, name in architectures(listing):
        for twin in twins or TWINS:
            path = Path(folder, f"{name}.{twin}.train.json")
            if path.exists() or not Path(folder, f"{name}.{twin}.onnx").exists():
                continue
            net, inputs = build(kind, name)
            start = sabotaged(net.train(), twin, inputs)
            right = {}
            for rate in RATES[1:] + RATES[:1]:
                right[rate] = trained(copy.deepcopy(start), kind, rate)
                if right[rate] > 0.9:
                    break
            path.write_text(json.dumps(right))
            print(path.name, right, flush=True)


def trained(net, kind, rate):
    """Share of right answers in the last 15 batches; ends early when nearly all are right or the loss is not finite."""
    import torch

    optimizer = torch.optim.SGD([p for p in net.parameters() if p.requires_grad], rate, momentum=0.9)
    generator, right = torch.Generator().manual_seed(3), []
    for _ in range(STEPS):
        inputs, classes = batch(kind, generator)
        logits = net(inputs)
        logits = logits[:, -1] if logits.dim() == 3 else logits
        loss = torch.nn.functional.cross_entropy(logits, classes)
        if not loss.isfinite():
            return 0.0
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        right.append(float((logits.argmax(-1) == classes).float().mean()))
        if len(right) >= 15 and sum(right[-15:]) > 14.5:
            break
    return round(sum(right[-15:]) / 15, 3)


# -- what gradlint says ------------------------------------------------------------------------------------------------

INIT = {"scale-init", "he-init", "xavier-init", "lecun-init", "smaller-init"}
ACTIVATIONS = {"relu", "leaky-relu", "elu", "gelu", "swish", "tanh", "selu", "prelu"}


def names_cause(twin, finding):
    """Whether the fix a finding puts first undoes (a part of) the sabotage."""
    if not finding["fixes"]:
        return False
    name, text = finding["fixes"][0]["name"], finding["fixes"][0]["text"]
    factor = re.search(r"[Mm]ultiply .* by ([\d.e+-]+\d)", text)
    named = {
        "sigmoid": name in ACTIVATIONS and "Sigmoid" in text,
        "x0.1": name in INIT and factor is not None and float(factor[1]) > 1,
        "x10": name in INIT and factor is not None and float(factor[1]) < 1,
        "no-skip": name == "skip-connections",
        "no-norm": name in ("batch-norm", "layer-norm"),
    }
    return any(named[part] for part in twin.split("+"))


def report(path, gradlint, *flags):
    """gradlint's report on a model, kept beside it."""
    kept = path.with_suffix(".json" if not flags else ".static.json")
    if not kept.exists():
        command = [*shlex.split(gradlint), str(path), "--format", "json", "--mode", "train", "--threads", "1", *flags]
        ran = subprocess.run(command, capture_output=True, text=True)
        if ran.returncode > 1:
            raise SystemExit(f"{path}: {ran.stderr}")
        kept.write_text(ran.stdout)
    return json.loads(kept.read_text())


def judge(listing, folder, gradlint, *twins):
    for _, name in architectures(listing):
        for twin in twins or TWINS:
            path = Path(folder, f"{name}.{twin}.onnx")
            if path.exists():
                print(row(name, twin, path, gradlint), flush=True)


def row(name, twin, path, gradlint):
    words = [f"{name[:22]:22s} {twin:23s}"]
    labels = path.with_suffix(".train.json")
    right = max(json.loads(labels.read_text()).values()) if labels.exists() else None
    words.append("     " if right is None else "TRAIN" if right > 0.9 else "stuck" if right < 0.5 else "slow ")
    for flags in ((), ("--no-probe",)):
        said = report(path, gradlint, *flags)
        loud = [f for f in said["findings"] if f["level"] != "note"]
        causes = [f for f in loud if "cause" not in f["metrics"]]
        words.append(f"| {said['summary']['verdict']} {said['summary']['risk']:.2f}")
        if twin != "default":
            words.append("cause" if any(names_cause(twin, f) for f in causes) else "-----")
        words.append(" ".join(f"{f['rule']}:{f['level'][0]}>{(f['fixes'] or [{'name': ''}])[0]['name']}" for f in loud))
    return " ".join(words)


if __name__ == "__main__":
    {"make": make, "train": train, "judge": judge}[sys.argv[1]](*sys.argv[2:])
