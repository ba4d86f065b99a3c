"""Every fact a rule may use: its name, unit, meaning and scopes; and the `Subject` that carries facts to the rules.

A fact is flat (a number, a truth or a text) and best evidence first: `X` is the measured value where there is one,
else the estimated, else the proved; `measured_X`, `estimated_X` and `proved_X` ask for one kind. A fact that is missing
from a subject, None or NaN is *not known*: a condition that needs it stays open.

A rule of scope `layer`, say, sees the subjects of scope `layer` only. Facts of scope `model` are known in every scope.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal, get_args

from gradlint.results import Blame, Evidence, Source

Scope = Literal["model", "layer", "activation", "weight", "recurrent", "attention"]
Fact = float | bool | str | None
Kind = Literal["number", "truth", "text"]

SCOPES: tuple[Scope, ...] = get_args(Scope)
EVERYWHERE = frozenset(SCOPES)
# An activation, a recurrent operator and an attention are layers too: what is said of layers is said of them.
LAYERS: frozenset[Scope] = frozenset({"layer", "activation", "recurrent", "attention"})


@dataclass(frozen=True)
class FactSpec:
    """What a fact is called, counted in and means; `unit` is `yes/no` for a truth and `text` for a text."""

    name: str
    unit: str
    meaning: str
    scopes: frozenset[Scope]

    @property
    def kind(self) -> Kind:
        if self.unit == "yes/no":
            return "truth"
        return "text" if self.unit == "text" else "number"


@dataclass(frozen=True)
class Subject:
    """One thing the rules judge, with what is known of it.

    `order` is its position in the graph, inputs first. `evidence` says how a quantitative fact is known; a fact without
    an entry is read from the file (structure) and weakens nothing. `blame` splits the layer's decay over nodes.
    A `model` subject occurs once and has order 0.
    """

    scope: Scope
    layer: str | None = None
    weight: str | None = None
    order: int = 0
    facts: Mapping[str, Fact] = field(default_factory=dict)
    evidence: Mapping[str, Evidence] = field(default_factory=dict)
    blame: Sequence[Blame] = ()
    source: Source | None = None


def _scopes(words: str) -> frozenset[Scope]:
    if words == "all":
        return EVERYWHERE
    if words == "layers":
        return LAYERS
    return frozenset(scope for scope in SCOPES if scope in words.split())


def _rows(scopes: str, *rows: tuple[str, str, str]) -> list[FactSpec]:
    return [FactSpec(name, unit, meaning, _scopes(scopes)) for name, unit, meaning in rows]


def _evident(scopes: str, kinds: str, *rows: tuple[str, str, str]) -> list[FactSpec]:
    """The best-evidence fact and one more per kind of evidence in `kinds`."""
    specs = _rows(scopes, *rows)
    for name, unit, meaning in rows:
        specs += _rows(scopes, *((f"{kind}_{name}", unit, f"{meaning} ({kind} only)") for kind in kinds.split()))
    return specs


_MODEL = (
    _rows(
        "all",
        ("stage", "text", "`init` or `trained`: guessed from the weights, or as --at-init / --trained say"),
        ("stage_given", "yes/no", "the stage was given with --at-init or --trained, not guessed"),
        ("mode", "text", "`train` (BatchNormalization by the batch) or `eval` (the graph as it stands)"),
        ("loss", "text", "`linear`, `cross-entropy`, `bce` or `mse`"),
        ("batch", "examples", "examples the probe ran on"),
        ("data_given", "yes/no", "the probe ran on the user's data, not on synthetic data"),
        ("optimizer", "text", "`sgd` or `adam`, as --optimizer says (`sgd` where it does not)"),
        ("learning_rate", "per step", "--lr, if given"),
        ("precision", "text", "the dtype of most weights: `float32`, `float16`, `bfloat16`, `float64`"),
        ("layers", "count", "layers with weights"),
        ("weights", "count", "trainable weights"),
        ("model_parameters", "count", "elements of all trainable weights"),
        ("quantized_ops", "count", "QuantizeLinear, DequantizeLinear and operators on quantised numbers"),
        ("folded_batchnorm", "count", "BatchNormalization nodes the exporter folded into the layer before"),
        ("folded_layers", "text", "names of the layers that took one in, a few of them"),
        ("restored_batchnorm", "count", "fresh ones of them that were put back, since mode is train"),
        ("export_line", "text", "the line of Python that exports this model without folding"),
        ("unmodelled_nodes", "count", "nodes whose operator has no row for the estimate"),
        ("unmodelled_share", "share", "nodes that lie behind an operator without a row, of all nodes"),
        ("unmodelled_ops", "text", "those operators, each with its number of nodes"),
        ("cut_nodes", "count", "nodes where the probe cut the gradient for want of a derivative it knows"),
        ("cut_ops", "text", "those operators, each with its number of nodes"),
        ("probe_skipped", "yes/no", "the probe was wanted and could not run (false with --no-probe)"),
        ("probe_skipped_reason", "text", "why the probe did not run"),
        ("probe_remedy", "text", "what to give so that it runs"),
        ("zero_head", "yes/no", "the head's weights are all zero, and the judgement drew them at 0.01"),
        ("residual_additions", "count", "additions in the model at which a skip joins"),
        ("trained_share", "share", "layers whose weights have left every standard initial distribution"),
        ("data_mean", "data units", "mean of the float inputs the probe ran on (those that vary)"),
        ("data_std", "data units", "standard deviation of the float inputs the probe ran on"),
        ("data_low", "data units", "least element of the float inputs the probe ran on"),
        ("data_high", "data units", "largest element of the float inputs the probe ran on"),
        ("classes", "count", "size of the logits' last axis under the cross-entropy loss"),
        ("initial_loss", "nats", "mean cross-entropy of the probe's batch"),
    )
    + _evident(
        "all",
        "estimated measured",
        ("trunk_min_decades", "decades", "the least `trunk_decades` of all layers"),
        ("trunk_max_decades", "decades", "the largest `trunk_growth` of all layers"),
        ("nonlinearity", "decades", "largest nonlinearity coefficient of all layers: how far the map is from linear"),
        (
            "sharpness",
            "decades",
            "log10 of the tangent kernel's trace: SGD is stable up to a rate of about 2 / 10^it",
        ),
        (
            "responsiveness",
            "decades",
            "log10 of that trace without what examples have in common: SGD needs about 1 / (rate * 10^it) steps",
        ),
        ("head_growth", "decades", "trunk gradient at the last features / at the outputs, where it grows; else 0"),
        ("learning_spread", "decades", "log10 of largest to smallest grad_rms / weight_rms over trunk kernels"),
    )
    + _evident(
        "all",
        "measured",
        ("alignment", "0..1", "likeness between examples kept from the inputs to the last features (CKA)"),
    )
)

_PLACE = _rows(
    "layer activation recurrent attention weight",
    ("op_type", "text", "the ONNX operator of the node"),
    ("module", "text", "the framework's module path, where the exporter recorded it"),
    ("depth", "0..1", "0 at the graph's input, 1 at its outputs: longest path to here over longest path through here"),
    ("layer_index", "count", "position among the layers with weights and the activations, 0 first"),
    ("is_gate", "yes/no", "its output multiplies another value (SiLU, GLU, squeeze-excite, gated cells)"),
    ("is_head", "yes/no", "the last layer before an output, or an activation behind it"),
    ("on_trunk", "yes/no", "its output carries the largest gradient across its cut of the graph, within a decade"),
    ("has_skip", "yes/no", "a path around this node (Add or Concat) joins behind it"),
    ("folded_norm", "yes/no", "the exporter folded a BatchNormalization into this layer"),
    ("main_weight", "text", "name of the layer's kernel"),
    ("fan_in", "count", "elements of the kernel per output unit"),
    ("fan_out", "count", "elements of the kernel per input unit"),
    ("next_activation", "text", "the activation that follows, as the fact `activation` names it, or `Identity`"),
    ("weight_rms", "weight units", "root mean square of the kernel (scope weight: of this weight)"),
    ("init_ratio", "ratio", "fan_in * E[w^2] / gain^2, gain that of the following activation: 1 keeps the scale"),
    ("init_factor", "factor", "multiply the kernel by this and init_ratio becomes 1"),
    ("init_scheme", "text", "the scheme that fits the following activation: `He`, `Xavier`, `LeCun`, `orthogonal`"),
    ("init_std", "value's", "standard deviation of the elements that this scheme gives"),
)

_LAYER = (
    _rows(
        "layers",
        ("is_structural_zero", "yes/no", "the gradient here is zero by construction: zero residual scale, key bias"),
        ("follows_norm", "yes/no", "a normalisation stands directly before this layer"),
        ("before_norm", "yes/no", "a normalisation stands between this layer and the activation that follows"),
        ("width", "count", "units of the output: channels, features"),
        ("chain_without_skip", "count", "weight layers in a row, ending here, that no Add or Concat bypasses"),
        ("batchnorm_chain", "count", "BatchNormalization + activation pairs in a row, ending here, without a skip"),
        ("narrow_sum", "sum of 1/width", "over the ReLU layers of the skip-free chain that ends here"),
        ("residual_index", "count", "residual additions from the input up to this one; absent elsewhere"),
        ("blocked_everywhere", "yes/no", "every path from here to the outputs crosses an operator without a gradient"),
        ("blocked_somewhere", "yes/no", "some path from here to the outputs crosses an operator without a gradient"),
        ("blocking_ops", "text", "those operators"),
        ("non_finite", "count", "NaN and infinite elements of the layer's weights"),
        ("non_finite_in", "text", "where they are: the name of the weight"),
        ("output_non_finite", "yes/no", "the output held a NaN or an infinity while the probe ran"),
        ("grad_non_finite", "yes/no", "the gradient of the output held a NaN or an infinity"),
        ("constant_branch", "yes/no", "the output does not depend on any input of the model"),
        ("running_var_min", "data units^2", "least running variance of a BatchNormalization"),
        ("norm_eps", "data units^2", "epsilon of a normalisation"),
        ("norm_scale_max", "factor", "largest |gamma| / sqrt(running_var + eps) of a BatchNormalization"),
        ("scale_max", "factor", "largest |element| of what a normalisation or a Mul multiplies each unit with"),
        ("gamma_near_zero", "share", "channels with |gamma| < 1e-6"),
        ("ends_residual", "yes/no", "a normalisation whose output goes straight into a residual Add"),
        ("post_norm_blocks", "count", "normalisations behind a residual Add, from the input up to here"),
        ("pole_derivative", "factor", "bound of |derivative| over the input's estimated range (Log, Sqrt, Div, ...)"),
        ("pole_in_range", "yes/no", "the proved range of the input reaches the pole"),
    )
    + _evident(
        "layers",
        "estimated measured",
        ("output_mean", "data units", "mean of the output"),
        ("output_std", "data units", "standard deviation of the output over examples, positions and units"),
        ("signal", "ratio", "standard deviation of the output over examples / its RMS; absent for constant branches"),
        ("trunk_signal", "ratio", "the largest `signal` of the values that cross this cut of the graph"),
        (
            "position_signal",
            "ratio",
            "of what the last layer reads: difference between positions / RMS, where each has an output; else absent",
        ),
        ("grad_rms", "per example", "root mean square of the gradient of the output (scope weight: of this weight)"),
        ("gain", "decades", "grad_norm at the input / at the output of this node"),
        ("trunk_decades", "decades", "trunk gradient (L2 norm) at this cut / the trunk's largest: 0 or below"),
        ("trunk_growth", "decades", "trunk gradient at this cut / that nearest the outputs; inf = not finite"),
        ("trunk_std", "data units", "the largest `output_std` of the values that cross this cut of the graph"),
        ("variance_ratio", "ratio", "variance of the output / of the first layer's output"),
        ("residual_growth", "ratio", "variance behind this residual addition / behind the first one"),
    )
    + _evident(
        "layers",
        "proved estimated measured",
        ("grad_norm", "per example", "L2 norm of the output's gradient, RMS over examples (proved: an upper bound)"),
        ("decades", "decades", "log10 of grad_norm / norm of the cotangent at the outputs (proved: an upper bound)"),
    )
    + _rows(
        "layers",
        ("proved_output_low", "data units", "no element of the output is below this, for every input in range"),
        ("proved_output_high", "data units", "no element of the output is above this, for every input in range"),
    )
)

_ACTIVATION = (
    _rows(
        "activation",
        ("activation", "text", "the function, patterns recognised: `Relu`, `Sigmoid`, `Silu`, `Gelu`, ..."),
        ("max_slope", "slope", "the largest |f'| of this function"),
        ("samples_per_unit", "count", "examples * positions the probe saw per unit: the weight of a measured `dead`"),
        ("sigmoid_chain", "count", "hidden Sigmoid or HardSigmoid in its chain, with no skip, no normalisation"),
        ("second_activation", "yes/no", "reads another activation with no layer between"),
        ("hidden_softmax", "yes/no", "a Softmax or LogSoftmax inside a chain: no attention, gate or head"),
        ("proved_input_low", "data units", "no element of the input is below this, for every input in range"),
        ("proved_input_high", "data units", "no element of the input is above this, for every input in range"),
    )
    + _evident(
        "activation",
        "estimated measured",
        ("slope", "slope", "E[f'(z)^2]^(1/2)"),
        ("saturated", "share", "units and examples with |f'| under 5 % of max |f'|"),
        ("input_std", "data units", "standard deviation of the input z"),
        ("input_high", "data units", "what z reaches: mean + 4 standard deviations"),
    )
    + _evident(
        "activation",
        "proved estimated measured",
        ("dead", "share", "units with slope 0 on every example (estimated: P(z > 0) < 1 %)"),
        ("flat", "share", "units and examples in a zone where the slope is 0 (Clip, HardSigmoid, HardSwish)"),
        ("fully_saturated", "share", "units and examples with |f'| < 1e-7: |z| > 16.1 for Sigmoid, 8.75 for Tanh"),
    )
)

_WEIGHT = (
    _rows(
        "weight",
        ("parameter", "text", "the framework's parameter name, where it can be told"),
        ("role", "text", "`kernel`, `bias`, `gamma`, `beta`, `embedding`, `recurrent`, `residual-scale`, `position`"),
        ("is_trainable", "yes/no", "training changes this weight"),
        (
            "is_structural_zero",
            "yes/no",
            "its gradient is zero by construction: key bias, behind a zero residual scale",
        ),
        ("reaches_output", "yes/no", "some path leads from it to an output, not only times zero"),
        ("elements", "count", "elements of the weight"),
        ("weight_mean", "weight units", "mean of the elements"),
        ("weight_std", "weight units", "standard deviation of the elements"),
        ("weight_max", "weight units", "largest |element|"),
        ("distinct_values", "count", "different values among the elements, counted up to 2"),
        ("near_zero_share", "share", "elements with |w| < 1e-5"),
        ("oversized_share", "share", "elements with |w| > 5"),
        ("duplicate_share", "share", "output units whose row (with bias) has cosine > 1 - 1e-6 with another"),
        ("duplicate_units", "count", "those units"),
        ("init_fit", "text", "the standard initial distribution these elements still match, best first"),
        ("init_fit_p", "0..1", "p-value of that fit (Kolmogorov-Smirnov)"),
        (
            "sharpness_share",
            "share",
            "squared gradient / the largest of all; absent with a normalisation behind",
        ),
        ("forward_scale", "data units", "standard deviation of the value this weight is multiplied with"),
    )
    + _evident(
        "weight",
        "estimated measured",
        ("grad_rms", "per batch", "root mean square of the gradient of this weight"),
        ("trunk_decades", "decades", "trunk gradient at the cut of this weight's layer / the trunk's largest"),
        (
            "update_ratio",
            "decades",
            "log10 of a step / weight_rms, for a loss whose gradient at the outputs has norm 1",
        ),
        ("fp16_underflow", "share", "elements of this weight's gradient that are under 2^-24 and not zero"),
    )
    + _evident(
        "weight",
        "measured",
        ("grad_mean_abs", "per batch", "mean |gradient| of this weight"),
        ("grad_zero_share", "share", "elements whose gradient is exactly zero"),
    )
)

_RECURRENT = _rows(
    "recurrent",
    ("cell", "text", "`RNN`, `LSTM`, `GRU`, or `unrolled` for a chain the exporter unrolled"),
    ("steps", "steps", "length of the sequence"),
    ("steps_assumed", "yes/no", "the length is symbolic and was assumed"),
    ("hidden_size", "count", "units of the hidden state"),
    ("recurrent_norm", "factor", "largest singular value of R"),
    ("recurrent_radius", "factor", "spectral radius of R"),
    ("max_slope", "slope", "the largest |f'| of the cell's activation"),
    ("forget_bias", "logit", "mean of Wb_f + Rb_f (ONNX gate order i, o, f, c)"),
    ("forget_gate", "0..1", "sigmoid(forget_bias): what the cell keeps per step"),
    ("update_bias", "logit", "mean of Wb_z + Rb_z (ONNX: h = (1 - z) h~ + z h_prev)"),
    ("update_gate", "0..1", "sigmoid(update_bias): what the state keeps per step"),
) + _evident(
    "recurrent",
    "proved estimated measured",
    ("time_decades", "decades", "log10 of |dL/dh_0| / |dL/dh_T|, the loss on the last step (proved: an upper bound)"),
)

_ATTENTION = (
    _rows(
        "attention",
        ("keys", "count", "keys a query chooses from"),
        ("head_dim", "count", "features per head, d"),
        ("is_scaled", "yes/no", "the logits are divided by sqrt(d), in the graph or folded into the query weight"),
        ("attention_index", "count", "attentions in series, ending here, that no path bypasses"),
    )
    + _evident(
        "attention",
        "estimated measured",
        ("logit_std", "logit", "standard deviation of the attention logits over keys"),
    )
    + _evident(
        "attention",
        "measured",
        ("max_probability", "0..1", "mean over queries of the largest attention weight"),
    )
)


def _table(*groups: list[FactSpec]) -> dict[str, FactSpec]:
    """One spec per name; a name that occurs in two scopes means the same in both, and its scopes are joined."""
    table: dict[str, FactSpec] = {}
    for spec in (spec for group in groups for spec in group):
        known = table.get(spec.name)
        if known is None:
            table[spec.name] = spec
        elif known.unit == spec.unit or known.kind == spec.kind == "number":
            table[spec.name] = FactSpec(spec.name, known.unit, known.meaning, known.scopes | spec.scopes)
        else:
            raise ValueError(f"fact {spec.name!r} has two units: {known.unit} and {spec.unit}")
    return table


FACTS: dict[str, FactSpec] = _table(_MODEL, _PLACE, _LAYER, _ACTIVATION, _WEIGHT, _RECURRENT, _ATTENTION)
