"""Every operator of ONNX has a gradient, is declared to have none, is written out by its body, or is named here."""

import onnx

import gradlint.ops  # noqa: F401  (fills the tables)
from gradlint.transfer import BLOCKED, VJP

# No derivative row: what no exported model of a trained network contains, and what carries no floats.
WITHOUT = {
    "BitCast": "reads bits as another type",
    "ConcatFromSequence": "sequences are folded away, or the gradient is cut",
    "Constant": "has no input",
    "DeformConv": "declared a cut",
    "Det": "declared a cut",
    "ImageDecoder": "reads bytes",
    "MaxRoiPool": "declared a cut",
    "MelWeightMatrix": "made from settings",
    "Optional": "a wrapper that is folded away",
    "OptionalGetElement": "a wrapper that is folded away",
    "OptionalHasElement": "asks a question",
    "RegexFullMatch": "reads strings",
    "RoiAlign": "declared a cut",
    "STFT": "declared a cut",
    "SequenceAt": "sequences are folded away, or the gradient is cut",
    "SequenceConstruct": "sequences are folded away, or the gradient is cut",
    "SequenceEmpty": "has no input",
    "SequenceErase": "sequences are folded away, or the gradient is cut",
    "SequenceInsert": "sequences are folded away, or the gradient is cut",
    "SequenceLength": "counts",
    "SplitToSequence": "sequences are folded away, or the gradient is cut",
    "StringConcat": "reads strings",
    "StringNormalizer": "reads strings",
    "StringSplit": "reads strings",
    "TfIdfVectorizer": "reads words",
}


def newest_schemas() -> dict[str, onnx.defs.OpSchema]:
    found: dict[str, onnx.defs.OpSchema] = {}
    for schema in onnx.defs.get_all_schemas_with_history():
        known = found.get(schema.name)
        if schema.domain == "" and (known is None or known.since_version < schema.since_version):
            found[schema.name] = schema
    return {name: schema for name, schema in found.items() if not schema.deprecated}


def uncovered() -> set[str]:
    return {
        name
        for name, schema in newest_schemas().items()
        if name not in VJP
        and name not in BLOCKED
        and not schema.has_function
        and not schema.has_context_dependent_function
    }


def test_what_has_no_gradient_is_named():
    assert uncovered() == set(WITHOUT)


def test_declared_operators_exist():
    standard = {name for name in BLOCKED | set(VJP) if ":" not in name}
    assert standard <= set(newest_schemas())
