"""The table of remedies: what to change, and the line to write in PyTorch and Keras, with numbers where facts allow."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from gradlint.fact_table import Subject

Cause = Literal["activation", "weights", "norm", "time", "depth", "other"]
Values = Callable[[Subject], dict[str, str]]


@dataclass(frozen=True)
class Remedy:
    """`text`, `pytorch` and `keras` are format strings over `values(subject)` and the names of `places`."""

    treats: Cause
    text: str
    pytorch: str
    keras: str
    values: Values | None = None


def _number(subject: Subject, name: str) -> float | None:
    value = subject.facts.get(name)
    usable = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    return float(value) if usable and value is not None else None


def _text(subject: Subject, name: str, default: str) -> str:
    value = subject.facts.get(name)
    return value if isinstance(value, str) and value else default


def places(subject: Subject, layer: str | None = None) -> dict[str, str]:
    """The names every remedy may use: the layer (or what stands for it), its kernel, its activation."""
    kernel = subject.weight or _text(subject, "main_weight", "")
    layer = layer or (f"`{subject.layer}`" if subject.layer else "")
    unnamed = f"the weight before {layer}" if subject.scope == "activation" else "the weights"
    return {
        "layer": layer or "the model",
        "kernel": f"`{kernel}`" if kernel else unnamed,
        "activation": present_activation(subject) or "activation",
        "before": _before(present_activation(subject), layer),
    }


def _before(activation: str | None, layer: str) -> str:
    """Where a normalisation goes."""
    if not layer:
        return "before the activations"
    return f"before the {activation} at {layer}" if activation else f"behind {layer}"


def present_activation(subject: Subject) -> str | None:
    """The activation at this place: the subject itself, or the one that follows. None: none, or not known."""
    name = subject.facts.get("activation" if subject.scope == "activation" else "next_activation")
    return str(name) if name and name != "Identity" else None


def weight_factor(subject: Subject, name: str) -> float | None:
    """What the initialisation remedy `name` multiplies the kernel with; None where that is not known."""
    if name == "scale-init":
        return _number(subject, "init_factor")
    rms, fan_in = _number(subject, "weight_rms"), _number(subject, "fan_in")
    fan_out = _number(subject, "fan_out") or fan_in
    if name not in VARIANCES or not rms or not fan_in or not fan_out:
        return None
    return math.sqrt(VARIANCES[name](fan_in, fan_out)) / rms


def _scheme(name: str, title: str) -> Values:
    """The factor from the kernel's rms to the rms of an initialisation."""

    def values(subject: Subject) -> dict[str, str]:
        factor, kernel = weight_factor(subject, name), places(subject)["kernel"]
        if factor is None:
            return {"scaling": f"Initialise {kernel} by {title}"}
        return {"scaling": f"Initialise by {title}: multiply {kernel} by {factor:.3g}"}

    return values


def _smaller(subject: Subject) -> dict[str, str]:
    """The factor that brings the input of a saturated activation to unit scale."""
    std = _number(subject, "input_std")
    return {"factor": f" by {1 / std:.3g}" if std and std > 1 else " by 0.5"}


def _keep_scale(subject: Subject) -> dict[str, str]:
    factor = _number(subject, "init_factor")
    return (
        {"factor": f"{factor:.3g}", "number": f"{factor:.3g}"}
        if factor
        else {"factor": "1 / its gain", "number": "factor"}
    )


def _residual_scale(subject: Subject) -> dict[str, str]:
    """1/sqrt(L) for L residual branches (De & Smith 2020)."""
    blocks = _number(subject, "residual_additions") or _number(subject, "residual_index") or 0
    return {"scale": f"{1 / math.sqrt(blocks):.2g}" if blocks > 1 else "1/sqrt(number of blocks)"}


def _forget_bias(subject: Subject) -> dict[str, str]:
    """Chrono initialisation: log T remembers for about T steps (Tallec & Ollivier 2018)."""
    steps = _number(subject, "steps")
    if not steps or steps < 3:
        return {"bias": "1", "steps": ""}
    return {"bias": f"{math.log(steps):.1f}", "steps": f" for {steps:.0f} steps"}


def _steps(subject: Subject) -> dict[str, str]:
    """The number of steps over which at most one decade is lost."""
    steps, lost = _number(subject, "steps"), _number(subject, "time_decades")
    if not steps or not lost:
        return {"steps": "20"}
    return {"steps": f"{max(1, int(steps / max(abs(lost), 1.0)))}"}


def _attention_scale(subject: Subject) -> dict[str, str]:
    size = _number(subject, "head_dim")
    return {"scale": f"{1 / math.sqrt(size):.3g}" if size else "1/sqrt(d)"}


def _rate(subject: Subject) -> dict[str, str]:
    """The learning rate at which an update is a thousandth of the weight (update_ratio -3)."""
    ratio, rate = _number(subject, "update_ratio"), _number(subject, "learning_rate")
    optimizer = "Adam" if subject.facts.get("optimizer") == "adam" else "SGD"
    if ratio is None or not rate:
        return {"rate": "by a factor of 10", "lr": "lr", "optimizer": optimizer}
    wanted = f"{rate * 10 ** (-3 - ratio):.1g}"
    return {"rate": f"to {wanted}", "lr": wanted, "optimizer": optimizer}


def _depth(subject: Subject) -> dict[str, str]:
    """The depth at which the same loss per layer stays within two decades."""
    layers, lost = _number(subject, "layers"), _number(subject, "trunk_decades")
    if not layers or lost is None or lost > -2:
        return {"depth": "fewer layers"}
    return {"depth": f"at most {max(1, int(layers * 2 / abs(lost)))} of the {layers:.0f} layers"}


def _re_export(subject: Subject) -> dict[str, str]:
    default = "torch.onnx.export(model, args, path, dynamo=True, optimize=False)"
    return {"line": _text(subject, "export_line", default)}


def _probe_data(subject: Subject) -> dict[str, str]:
    remedy = _text(subject, "probe_remedy", "Give data that fit the inputs with --data")
    save = "np.savez('data.npz', **inputs)"
    pytorch, keras = (
        (save, save)
        if "--data" in remedy
        else ("torch.onnx.export(model, args, path)", "model.export(path, format='onnx')")
    )
    return {"remedy": remedy, "pytorch": pytorch, "keras": keras}


def _input_scale(subject: Subject) -> dict[str, str]:
    mean, std = _number(subject, "data_mean"), _number(subject, "data_std")
    return {"mean": "mean" if mean is None else f"{mean:.3g}", "std": "std" if not std else f"{std:.3g}"}


def _activation(text: str, pytorch: str, keras: str) -> Remedy:
    return Remedy("activation", f"Replace the {{activation}} at {{layer}} by {text}", pytorch, keras)


def _init(name: str, title: str, pytorch: str, keras: str) -> Remedy:
    return Remedy("weights", "{scaling}{others}", pytorch, keras, _scheme(name, title))


# Variance of a kernel's elements by fan_in and fan_out.
VARIANCES: dict[str, Callable[[float, float], float]] = {
    "he-init": lambda fan_in, _: 2 / fan_in,
    "xavier-init": lambda fan_in, fan_out: 2 / (fan_in + fan_out),
    "lecun-init": lambda fan_in, _: 1 / fan_in,
}


REMEDIES: dict[str, Remedy] = {
    # Activations
    "relu": _activation("ReLU, with He initialisation", "nn.ReLU()", "layers.ReLU()"),
    "leaky-relu": _activation("LeakyReLU", "nn.LeakyReLU(0.01)", "layers.LeakyReLU(negative_slope=0.01)"),
    "prelu": _activation("PReLU, whose negative slope is learned", "nn.PReLU()", "layers.PReLU()"),
    "elu": _activation("ELU", "nn.ELU()", "layers.ELU()"),
    "selu": _activation("SELU, with LeCun initialisation", "nn.SELU()", "layers.Activation('selu')"),
    "swish": _activation("Swish (SiLU)", "nn.SiLU()", "layers.Activation('silu')"),
    "gelu": _activation("GELU", "nn.GELU()", "layers.Activation('gelu')"),
    "tanh": _activation("Tanh, whose slope reaches 1", "nn.Tanh()", "layers.Activation('tanh')"),
    "softplus": _activation("Softplus, which grows linearly", "nn.Softplus()", "layers.Activation('softplus')"),
    "remove-activation": Remedy(
        "activation",
        "Remove the {activation} at {layer}",
        "drop the line from nn.Sequential, or call the layer before it alone",
        "layers.Dense(units, activation=None)",
    ),
    "log-softmax": Remedy(
        "activation",
        "Leave the logits as they are and let the loss take the softmax",
        "nn.CrossEntropyLoss()(logits, target)",
        "losses.SparseCategoricalCrossentropy(from_logits=True)",
    ),
    "widen-range": Remedy(
        "activation",
        "Widen the range of the {activation} at {layer}, or replace it by an unbounded one",
        "nn.Hardtanh(-10.0, 10.0)",
        "layers.ReLU(max_value=None)",
    ),
    # Initialisation
    "he-init": _init(
        "he-init",
        "He (variance 2 / fan_in, for ReLU)",
        "nn.init.kaiming_normal_(layer.weight, nonlinearity='relu')",
        "layers.Dense(units, kernel_initializer='he_normal')",
    ),
    "xavier-init": _init(
        "xavier-init",
        "Xavier (variance 2 / (fan_in + fan_out), for Tanh)",
        "nn.init.xavier_normal_(layer.weight)",
        "layers.Dense(units, kernel_initializer='glorot_normal')",
    ),
    "lecun-init": _init(
        "lecun-init",
        "LeCun (variance 1 / fan_in, for SELU)",
        "nn.init.kaiming_normal_(layer.weight, nonlinearity='linear')",
        "layers.Dense(units, kernel_initializer='lecun_normal')",
    ),
    "orthogonal-init": Remedy(
        "weights",
        "Initialise {kernel} as an orthogonal matrix: every singular value is 1",
        "nn.init.orthogonal_(layer.weight)",
        "layers.Dense(units, kernel_initializer='orthogonal')",
    ),
    "scale-init": Remedy(
        "weights",
        "Multiply {kernel} by {factor}, so that the layer keeps the scale{others}",
        "layer.weight.data.mul_({number})",
        "layer.kernel.assign({number} * layer.kernel)",
        _keep_scale,
    ),
    "smaller-init": Remedy(
        "weights",
        "Initialise smaller: multiply the weights before {layer}{factor}",
        "layer.weight.data.mul_(factor)",
        "layers.Dense(units, kernel_initializer=initializers.VarianceScaling(scale=factor ** 2))",
        _smaller,
    ),
    "random-init": Remedy(
        "weights",
        "Draw {kernel} at random: equal units get equal gradients and stay equal",
        "nn.init.kaiming_normal_(layer.weight)",
        "layers.Dense(units, kernel_initializer='he_normal')",
    ),
    "positive-bias": Remedy(
        "weights",
        "Start the bias before {layer} slightly above zero",
        "nn.init.constant_(layer.bias, 0.01)",
        "layers.Dense(units, bias_initializer=initializers.Constant(0.01))",
    ),
    "head-init": Remedy(
        "weights",
        "Start the head near zero, so that the first predictions are uniform",
        "nn.init.normal_(head.weight, std=0.01); nn.init.zeros_(head.bias)",
        "layers.Dense(classes, kernel_initializer=initializers.RandomNormal(stddev=0.01))",
    ),
    # Normalisation
    "batch-norm": Remedy(
        "norm",
        "Put a BatchNorm {before}",
        "nn.BatchNorm1d(features)  # BatchNorm2d behind a convolution",
        "layers.BatchNormalization()",
    ),
    "layer-norm": Remedy(
        "norm",
        "Put a LayerNorm {before}",
        "nn.LayerNorm(features)",
        "layers.LayerNormalization()",
    ),
    "reset-norm": Remedy(
        "norm",
        "Reset the scale and the running statistics at {layer}, and recompute them on real data",
        "norm.reset_running_stats(); nn.init.ones_(norm.weight)",
        "layers.BatchNormalization(gamma_initializer='ones', moving_variance_initializer='ones')",
    ),
    "pre-norm": Remedy(
        "norm",
        "Normalise before the block, not behind the addition",
        "x = x + block(norm(x))",
        "x = layers.Add()([x, block(layers.LayerNormalization()(x))])",
    ),
    "deepnorm": Remedy(
        "norm",
        "Keep post-norm and scale the residual up (DeepNorm: alpha = (2 N)^(1/4) for N encoder blocks)",
        "x = norm(alpha * x + block(x))",
        "x = layers.LayerNormalization()(alpha * x + block(x))",
    ),
    # Depth
    "skip-connections": Remedy(
        "depth",
        "Add skip connections (ResNet) around the layers at {layer}",
        "x = x + block(x)",
        "x = layers.Add()([x, block(x)])",
    ),
    "residual-scale": Remedy(
        "depth",
        "Scale each residual branch by {scale}, or start it at zero (SkipInit, Fixup)",
        "x = x + scale * block(x)",
        "x = layers.Add()([x, scale * block(x)])",
        _residual_scale,
    ),
    "fewer-layers": Remedy(
        "depth",
        "Use {depth}: the loss of gradient multiplies per layer",
        "nn.Sequential(*blocks[:depth])",
        "keras.Sequential(blocks[:depth])",
        _depth,
    ),
    "wider-layers": Remedy(
        "depth",
        "Widen the layers before {layer}: fluctuations grow with the sum of 1/width",
        "nn.Linear(inputs, 4 * features)",
        "layers.Dense(4 * units)",
    ),
    "layer-wise-pretraining": Remedy(
        "depth",
        "Train the layers one after the other first (multi-level hierarchy), then all together",
        "for block in blocks: fit(autoencoder(block))",
        "for block in blocks: autoencoder(block).fit(x, x)",
    ),
    # Time
    "lstm": Remedy(
        "time",
        "Replace the recurrence at {layer} by an LSTM, whose cell state carries the gradient",
        "nn.LSTM(inputs, hidden)",
        "layers.LSTM(units)",
    ),
    "gru": Remedy("time", "Replace the recurrence at {layer} by a GRU", "nn.GRU(inputs, hidden)", "layers.GRU(units)"),
    "orthogonal-recurrence": Remedy(
        "time",
        "Initialise the recurrent weight at {layer} as an orthogonal matrix or the identity",
        "nn.init.orthogonal_(rnn.weight_hh_l0)",
        "layers.SimpleRNN(units, recurrent_initializer='orthogonal')",
    ),
    "truncated-backprop": Remedy(
        "time",
        "Cut the sequence to about {steps} steps, or carry the state and backpropagate through that many",
        "hidden = hidden.detach()  # every so many steps",
        "layers.LSTM(units, stateful=True)  # on shorter windows",
        _steps,
    ),
    "forget-bias": Remedy(
        "time",
        "Start the forget bias at {bias}{steps}",
        "rnn.bias_ih_l0.data[hidden:2 * hidden].fill_({bias})",
        "layers.LSTM(units, bias_initializer=...)  # {bias} for the forget gate; unit_forget_bias=True gives 1",
        _forget_bias,
    ),
    "update-bias": Remedy(
        "time",
        "Start the update bias at {bias}{steps}",
        "rnn.bias_ih_l0.data[hidden:2 * hidden].fill_({bias})",
        "layers.GRU(units, bias_initializer=...)  # {bias} for the update gate",
        _forget_bias,
    ),
    # Attention
    "attention-scale": Remedy(
        "other",
        "Multiply the attention logits at {layer} by {scale}",
        "F.scaled_dot_product_attention(q, k, v)",
        "layers.MultiHeadAttention(heads, key_dim)",
        _attention_scale,
    ),
    "qk-norm": Remedy(
        "norm",
        "Normalise queries and keys before their product at {layer}",
        "q, k = q_norm(q), k_norm(k)",
        "q, k = layers.LayerNormalization()(q), layers.LayerNormalization()(k)",
    ),
    # Training
    "gradient-clipping": Remedy(
        "other",
        "Clip the gradient at norm 1.0",
        "nn.utils.clip_grad_norm_(model.parameters(), 1.0)",
        "optimizers.SGD(clipnorm=1.0)",
    ),
    "learning-rate": Remedy(
        "other",
        "Change the learning rate {rate}",
        "torch.optim.{optimizer}(params, lr={lr})",
        "optimizers.{optimizer}({lr})",
        _rate,
    ),
    "warm-up": Remedy(
        "other",
        "Warm the learning rate up over the first steps",
        "torch.optim.lr_scheduler.LinearLR(optimizer, 0.01, total_iters=1000)",
        "optimizers.schedules.CosineDecay(0.0, steps, warmup_target=lr, warmup_steps=1000)",
    ),
    "layer-wise-rate": Remedy(
        "other",
        "Give each layer its own rate (LARS, Adam, or parameter groups)",
        "torch.optim.Adam(model.parameters())",
        "optimizers.Adam()",
    ),
    "weight-decay": Remedy(
        "other",
        "Shrink {kernel} by weight decay",
        "torch.optim.SGD(params, lr, weight_decay=1e-4)",
        "optimizers.SGD(lr, weight_decay=1e-4)",
    ),
    "loss-scaling": Remedy(
        "other",
        "Scale the loss in half precision",
        "torch.amp.GradScaler('cuda')",
        "mixed_precision.LossScaleOptimizer(optimizer)",
    ),
    "bfloat16": Remedy(
        "other",
        "Train in bfloat16, which has the exponent range of float32",
        "torch.autocast('cuda', dtype=torch.bfloat16)",
        "mixed_precision.set_global_policy('mixed_bfloat16')",
    ),
    "normalise-inputs": Remedy(
        "other",
        "Normalise the inputs: subtract {mean}, divide by {std}",
        "x = (x - mean) / std",
        "layers.Normalization(mean=mean, variance=std ** 2)",
        _input_scale,
    ),
    # Graph
    "epsilon": Remedy(
        "other",
        "Keep the input of {layer} away from the pole",
        "torch.log(x.clamp_min(1e-6))",
        "ops.log(ops.maximum(x, 1e-6))",
    ),
    "straight-through": Remedy(
        "other",
        "Let the gradient pass {layer} unchanged (straight-through estimator, or Gumbel softmax)",
        "x + (hard(x) - x).detach()",
        "x + ops.stop_gradient(hard(x) - x)",
    ),
    "reconnect": Remedy(
        "other",
        "Remove {kernel} from the model, or connect it to an output",
        "model.register_parameter(name, None)",
        "build the model without the layer",
    ),
    "repair-weights": Remedy(
        "other",
        "Restore {kernel} from a checkpoint before the values were lost; find the step that made them",
        "torch.autograd.set_detect_anomaly(True)",
        "keras.callbacks.TerminateOnNaN()",
    ),
    "float-model": Remedy(
        "other",
        "Lint the float model from before quantisation",
        "torch.onnx.export(float_model, args, path)",
        "float_model.export(path, format='onnx')",
    ),
    "re-export": Remedy(
        "other",
        "Export again without folding",
        "{line}",
        "model.export(path, format='onnx')",
        _re_export,
    ),
    "probe-data": Remedy("other", "{remedy}", "{pytorch}", "{keras}", _probe_data),
    "standard-operators": Remedy(
        "other",
        "Export the custom operators as standard ONNX ones, or as model functions",
        "torch.onnx.export(model, args, path, dynamo=True)",
        "model.export(path, format='onnx')",
    ),
}
