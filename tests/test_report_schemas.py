"""The reports for programs are valid by the published schemas of their formats, and JSON by our own."""

from __future__ import annotations

import gzip
import json
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import xmlschema
from command import ROOT, SAMPLES
from report_fixtures import faults, healthy_resnet, hostile, sigmoid_chain

import gradlint
from gradlint.exceptions import UsageError
from gradlint.report import render
from gradlint.results import Report

SCHEMAS = ROOT / "tests" / "schemas"
OURS = ROOT / "gradlint" / "report.schema.json"
MODELS = [*sorted(SAMPLES.glob("*.onnx")), ROOT / "tests" / "exports" / "sigmoid_net.onnx"]
MADE = [sigmoid_chain, healthy_resnet, hostile]


@cache
def _report(model: Path) -> Report:
    """Of its own folder, so that paths are relative as in a repository."""
    data = model.with_suffix(".npz")
    report = gradlint.check(model, data=data if data.exists() else None, preview=True, threads=1)
    return replace(report, model=replace(report.model, path=model.name))


def _json_validator(path: Path) -> Callable[[Any], None]:
    schema = json.loads(path.read_text("utf-8"))
    kind = jsonschema.validators.validator_for(schema)
    kind.check_schema(schema)
    return kind(schema, format_checker=kind.FORMAT_CHECKER).validate


def _strict(text: str) -> Any:
    """JSON as its standard has it: Python's NaN and Infinity are none."""

    def refuse(name: str) -> None:
        raise AssertionError(f"{name} is not JSON")

    return json.loads(text, parse_constant=refuse)


def _all() -> Iterator[Sequence[Report]]:
    yield from ([_report(model)] for model in MODELS)
    yield from ([make()] for make in MADE)
    yield [*(make() for make in MADE), _report(MODELS[0])]


@pytest.mark.parametrize("format", ["json", "sarif", "gitlab", "junit"])
def test_every_report_is_valid(format: str) -> None:
    if format == "junit":
        validate = xmlschema.XMLSchema(SCHEMAS / "junit-10.xsd").validate
    else:
        name = {"sarif": "sarif-schema-2.1.0.json", "gitlab": "gitlab-code-quality.json"}
        check = _json_validator(SCHEMAS / name[format] if format in name else OURS)

        def validate(text: str) -> None:
            check(_strict(text))

    for reports in _all():
        validate(render(reports, format))
    for reports in ([], [healthy_resnet()]):
        validate(render(reports, format, faults=faults()))


def test_the_schemas_refuse_what_is_wrong() -> None:
    report = json.loads(healthy_resnet().to_json())
    with pytest.raises(jsonschema.ValidationError):
        _json_validator(OURS)({**report, "summary": {**report["summary"], "verdict": "good"}})
    with pytest.raises(jsonschema.ValidationError):
        _json_validator(SCHEMAS / "sarif-schema-2.1.0.json")({"version": "2.1.0", "runs": [{"results": []}]})
    with pytest.raises(jsonschema.ValidationError):
        _json_validator(SCHEMAS / "gitlab-code-quality.json")([{"description": "x"}])
    with pytest.raises(xmlschema.XMLSchemaException):
        xmlschema.XMLSchema(SCHEMAS / "junit-10.xsd").validate("<testsuites><testcase/></testsuites>")


# -- our own schema ----------------------------------------------------------------------------------------------------


def _undescribed(value: Any, schema: dict[str, Any], definitions: dict[str, Any], place: str) -> Iterator[str]:
    """Keys of a report that the schema says nothing of."""
    while "$ref" in schema:
        schema = definitions[schema["$ref"].rpartition("/")[2]]
    if "oneOf" in schema:
        schema = next((s for s in schema["oneOf"] if s.get("type", "object") != "null"), {})
    if isinstance(value, list):
        for item in value:
            yield from _undescribed(item, schema.get("items", {}), definitions, f"{place}[]")
    elif isinstance(value, dict) and "properties" in schema:
        for key, item in value.items():
            if key not in schema["properties"]:
                yield f"{place}.{key}"
            yield from _undescribed(item, schema["properties"].get(key, {}), definitions, f"{place}.{key}")


def test_the_schema_describes_every_key() -> None:
    schema = json.loads(OURS.read_text("utf-8"))
    for model in MODELS:
        found = _undescribed(_report(model).to_dict(), schema["$defs"]["report"], schema["$defs"], "report")
        assert sorted(set(found)) == []


def test_a_report_comes_back_from_its_text() -> None:
    for model in MODELS:
        report = _report(model)
        again = Report.from_json(report.to_json())
        assert again.to_json() == report.to_json()
        assert render([again], "full") == render([report], "full")


def test_the_version_is_in_the_text_and_checked() -> None:
    data = json.loads(healthy_resnet().to_json())
    assert data["schema"] == "gradlint-report/1"
    with pytest.raises(UsageError, match="'gradlint-report/2', expected 'gradlint-report/1'"):
        Report.from_json(json.dumps({**data, "schema": "gradlint-report/2"}))
    for text in ("", "{", "[" * 100_000, "nonsense"):
        with pytest.raises(UsageError, match="not JSON"):
            Report.from_json(text)


# -- the limits of code scanning ---------------------------------------------------------------------------------------


def test_sarif_of_thousands_of_findings_stays_within_the_limits() -> None:
    """Of a run 5,000 results are shown, the worst; a file has at most 10 MB when compressed, a rule 20 tags."""
    base = hostile()
    many = [
        replace(base, model=replace(base.model, path=f"m{k}.onnx"), findings=tuple(reversed(base.findings)))
        for k in range(400)
    ]
    found = sum(len(report.findings) for report in many)
    assert found > 5000
    text = render(many, "sarif")
    (run,) = json.loads(text)["runs"]
    levels = [result["level"] for result in run["results"]]
    assert len(levels) == 5000
    assert levels == sorted(levels, key=["error", "warning", "note"].index)
    errors = sum(finding.level == "error" for report in many for finding in report.findings)
    assert levels.count("error") == min(errors, 5000)
    assert len(gzip.compress(text.encode())) < 10_000_000
    assert all(len(rule["properties"]["tags"]) <= 10 for rule in run["tool"]["driver"]["rules"])
    assert all(len(result["locations"]) == 1 for result in run["results"])


def test_figures_that_are_not_finite_are_null() -> None:
    report = healthy_resnet()
    row = replace(report.layers[0], measured={"grad_norm": math.inf, "decades": -math.inf, "signal": math.nan})
    text = replace(report, layers=(row,)).to_json()
    assert _strict(text)["layers"][0]["measured"] == {"grad_norm": None, "decades": None, "signal": None}
