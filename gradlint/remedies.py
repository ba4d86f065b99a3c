"""The table of remedies: what to change, and the line to write in PyTorch and Keras."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from gradlint import remedy_values as values
from gradlint.remedy_values import Values

Cause = Literal["activation", "weights", "norm", "time", "depth", "other"]


@dataclass(frozen=True)
class Remedy:
    """`text`, `pytorch` and `keras` are format strings over `values(subject)` and the names of `places`."""

    treats: Cause
    text: str
    pytorch: str
    keras: str
    values: Values | None = None


def _activation(text: str, pytorch: str, keras: str) -> Remedy:
    return Remedy("activation", f"Replace the {{activation}} at {{layer}} by {text}", pytorch, keras)


def _init(name: str, title: str, pytorch: str, keras: str) -> Remedy:
    return Remedy("weights", "{scaling}{others}", pytorch, keras, values.scheme(name, title))


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
    "sigmoid-head": Remedy(
        "other",
        "Replace the softmax over a single unit, which is 1 for every input, by a sigmoid; or give it a unit per class",
        "nn.BCEWithLogitsLoss()(logits, target)",
        "layers.Dense(1, activation='sigmoid')",
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
        values.keep_scale,
    ),
    "smaller-init": Remedy(
        "weights",
        "Initialise smaller: multiply the weights before {layer}{factor}",
        "layer.weight.data.mul_(factor)",
        "layers.Dense(units, kernel_initializer=initializers.VarianceScaling(scale=factor ** 2))",
        values.smaller,
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
        values.residual_scale,
    ),
    "fewer-layers": Remedy(
        "depth",
        "Use {depth}: the loss of gradient multiplies per layer",
        "nn.Sequential(*blocks[:depth])",
        "keras.Sequential(blocks[:depth])",
        values.depth,
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
        values.steps,
    ),
    "forget-bias": Remedy(
        "time",
        "Start the forget bias at {bias}{steps}",
        "rnn.bias_ih_l0.data[hidden:2 * hidden].fill_({bias})",
        "layers.LSTM(units, bias_initializer=...)  # {bias} for the forget gate; unit_forget_bias=True gives 1",
        values.forget_bias,
    ),
    "update-bias": Remedy(
        "time",
        "Start the update bias at {bias}{steps}",
        "rnn.bias_ih_l0.data[hidden:2 * hidden].fill_({bias})",
        "layers.GRU(units, bias_initializer=...)  # {bias} for the update gate",
        values.forget_bias,
    ),
    # Attention
    "attention-scale": Remedy(
        "other",
        "Multiply the attention logits at {layer} by {scale}",
        "F.scaled_dot_product_attention(q, k, v)",
        "layers.MultiHeadAttention(heads, key_dim)",
        values.attention_scale,
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
        values.rate,
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
        values.input_scale,
    ),
    # Graph
    "epsilon": Remedy(
        "other",
        "Keep the input of {layer} away from the pole",
        "{pytorch}",
        "{keras}",
        values.epsilon,
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
        values.re_export,
    ),
    "probe-data": Remedy("other", "{remedy}", "{pytorch}", "{keras}", values.probe_data),
    "standard-operators": Remedy(
        "other",
        "Export the custom operators as standard ONNX ones, or as model functions",
        "torch.onnx.export(model, args, path, dynamo=True)",
        "model.export(path, format='onnx')",
    ),
}
