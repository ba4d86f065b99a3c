"""What a remedy fills in for one place: its names, and the numbers that its facts allow."""

from __future__ import annotations

import math
from collections.abc import Callable

from gradlint.fact_table import Subject

Values = Callable[[Subject], dict[str, str]]

# Variance of a kernel's elements by fan_in and fan_out.
VARIANCES: dict[str, Callable[[float, float], float]] = {
    "he-init": lambda fan_in, _: 2 / fan_in,
    "xavier-init": lambda fan_in, fan_out: 2 / (fan_in + fan_out),
    "lecun-init": lambda fan_in, _: 1 / fan_in,
}


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


def scheme(name: str, title: str) -> Values:
    """The factor from the kernel's rms to the rms of an initialisation."""

    def values(subject: Subject) -> dict[str, str]:
        factor, kernel = weight_factor(subject, name), places(subject)["kernel"]
        if factor is None:
            return {"scaling": f"Initialise {kernel} by {title}"}
        return {"scaling": f"Initialise by {title}: multiply {kernel} by {factor:.3g}"}

    return values


def smaller(subject: Subject) -> dict[str, str]:
    """The factor that brings the input of a saturated activation to unit scale."""
    std = _number(subject, "input_std")
    return {"factor": f" by {1 / std:.3g}" if std and std > 1 else " by 0.5"}


def keep_scale(subject: Subject) -> dict[str, str]:
    factor = _number(subject, "init_factor")
    return (
        {"factor": f"{factor:.3g}", "number": f"{factor:.3g}"}
        if factor
        else {"factor": "1 / its gain", "number": "factor"}
    )


def residual_scale(subject: Subject) -> dict[str, str]:
    """1/sqrt(L) for L residual branches (De & Smith 2020)."""
    blocks = _number(subject, "residual_additions") or _number(subject, "residual_index") or 0
    return {"scale": f"{1 / math.sqrt(blocks):.2g}" if blocks > 1 else "1/sqrt(number of blocks)"}


def forget_bias(subject: Subject) -> dict[str, str]:
    """Chrono initialisation: log T remembers for about T steps (Tallec & Ollivier 2018)."""
    steps = _number(subject, "steps")
    if not steps or steps < 3:
        return {"bias": "1", "steps": ""}
    return {"bias": f"{math.log(steps):.1f}", "steps": f" for {steps:.0f} steps"}


def steps(subject: Subject) -> dict[str, str]:
    """The number of steps over which at most one decade is lost."""
    steps, lost = _number(subject, "steps"), _number(subject, "time_decades")
    if not steps or not lost:
        return {"steps": "20"}
    return {"steps": f"{max(1, int(steps / max(abs(lost), 1.0)))}"}


def attention_scale(subject: Subject) -> dict[str, str]:
    size = _number(subject, "head_dim")
    return {"scale": f"{1 / math.sqrt(size):.3g}" if size else "1/sqrt(d)"}


def rate(subject: Subject) -> dict[str, str]:
    """The learning rate at which an update is a thousandth of the weight (update_ratio -3)."""
    ratio, rate = _number(subject, "update_ratio"), _number(subject, "learning_rate")
    optimizer = "Adam" if subject.facts.get("optimizer") == "adam" else "SGD"
    if ratio is None or not rate:
        return {"rate": "by a factor of 10", "lr": "lr", "optimizer": optimizer}
    wanted = f"{rate * 10 ** (-3 - ratio):.1g}"
    return {"rate": f"to {wanted}", "lr": wanted, "optimizer": optimizer}


def depth(subject: Subject) -> dict[str, str]:
    """The depth at which the same loss per layer stays within two decades."""
    layers, lost = _number(subject, "layers"), _number(subject, "trunk_decades")
    if not layers or lost is None or lost > -2:
        return {"depth": "fewer layers"}
    return {"depth": f"at most {max(1, int(layers * 2 / abs(lost)))} of the {layers:.0f} layers"}


def re_export(subject: Subject) -> dict[str, str]:
    default = "torch.onnx.export(model, args, path, dynamo=True, optimize=False)"
    return {"line": _text(subject, "export_line", default)}


def probe_data(subject: Subject) -> dict[str, str]:
    remedy = _text(subject, "probe_remedy", "Give data that fit the inputs with --data")
    save = "np.savez('data.npz', **inputs)"
    pytorch, keras = (
        (save, save)
        if "--data" in remedy
        else ("torch.onnx.export(model, args, path)", "model.export(path, format='onnx')")
    )
    return {"remedy": remedy, "pytorch": pytorch, "keras": keras}


def epsilon(subject: Subject) -> dict[str, str]:
    """The operator on what an epsilon keeps away from its pole."""
    name = _text(subject, "op_type", "Log")
    form = {"Div": "x / {}", "Reciprocal": "1 / {}", "Pow": "{} ** p"}.get(name)
    forms = (form, form) if form else (f"torch.{name.lower()}({{}})", f"ops.{name.lower()}({{}})")
    y = "y" if name == "Div" else "x"
    return {"pytorch": forms[0].format(f"{y}.clamp_min(1e-6)"), "keras": forms[1].format(f"ops.maximum({y}, 1e-6)")}


def input_scale(subject: Subject) -> dict[str, str]:
    mean, std = _number(subject, "data_mean"), _number(subject, "data_std")
    return {"mean": "mean" if mean is None else f"{mean:.3g}", "std": "std" if not std else f"{std:.3g}"}
