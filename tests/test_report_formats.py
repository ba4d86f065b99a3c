"""The reports for programs: JSON there and back, SARIF, GitHub, GitLab and JUnit by their specifications."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from xml.etree import ElementTree

import pytest
from markdown_it import MarkdownIt
from report_fixtures import faults, healthy_resnet, hostile, sigmoid_chain

from gradlint.exceptions import UsageError
from gradlint.report import FORMATS, render
from gradlint.results import Fault, Finding, Report, Source


def test_json_is_an_object_for_one_model_and_a_list_for_several() -> None:
    assert json.loads(render([healthy_resnet()], "json"))["schema"] == "gradlint-report/1"
    assert len(json.loads(render([healthy_resnet(), sigmoid_chain(2)], "json"))) == 2


def test_a_report_comes_back_from_json_as_it_was() -> None:
    report = sigmoid_chain(4)
    assert Report.from_dict(json.loads(render([report], "json"))) == report


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("make", [sigmoid_chain, healthy_resnet, hostile])
def test_every_format_is_the_same_from_the_json(make, format: str) -> None:
    report = make()
    again = Report.from_dict(json.loads(render([report], "json")))
    assert render([again], format) == render([report], format)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"schema": "other/2"}, "schema is 'other/2', expected 'gradlint-report/1'"),
        ({"layers": {}}, "report.layers: expected a list, found an object"),
        ({"layers": [3]}, r"report.layers\[0\]: expected an object, found a whole number"),
        ({"summary": {"verdict": "good"}}, "report.summary.verdict: 'good' is none of pass, warn, fail"),
        ({"coverage": {"nodes": "all"}}, "report.coverage.nodes: expected a whole number, found a string"),
        ({"coverage": {"nodes": True}}, "report.coverage.nodes: expected a whole number, found true or false"),
        ({"timing": {"total_s": "fast"}}, "report.timing.total_s: expected a number, found a string"),
        ({"model": {"path": "x"}}, "report.model: 'sha256' is missing"),
    ],
)
def test_a_malformed_report_is_refused_by_the_place_that_is_wrong(change: dict, message: str) -> None:
    data = json.loads(render([sigmoid_chain(2)], "json")) | change
    with pytest.raises(UsageError, match=message):
        Report.from_dict(data)


def test_a_report_that_is_no_object_is_refused() -> None:
    with pytest.raises(UsageError, match="expected a JSON object, found a list"):
        Report.from_dict([])


def test_keys_of_a_later_version_are_left_out() -> None:
    data = json.loads(render([healthy_resnet()], "json"))
    assert Report.from_dict(data | {"later": 1}) == healthy_resnet()


def _sarif(*reports: Report) -> dict:
    return json.loads(render(reports, "sarif"))["runs"][0]


def test_sarif_shows_the_python_line_and_names_the_node() -> None:
    run = _sarif(sigmoid_chain(3))
    result = run["results"][0]
    place = result["locations"][0]
    assert place["physicalLocation"]["artifactLocation"]["uri"] == "examples/deep_mlp.py"
    assert place["physicalLocation"]["region"] == {"startLine": 14}
    assert place["logicalLocations"] == [{"fullyQualifiedName": "layers.0", "kind": "element"}]
    rule = run["tool"]["driver"]["rules"][result["ruleIndex"]]
    assert (rule["id"], rule["name"]) == (result["ruleId"], "vanishing-gradient")
    assert "Why it matters" in rule["help"]["markdown"]


def test_sarif_puts_the_worst_first_and_tells_all_results_apart() -> None:
    run = _sarif(healthy_resnet(), sigmoid_chain(50), hostile())
    order = [["error", "warning", "note"].index(result["level"]) for result in run["results"]]
    assert order == sorted(order)
    prints = [result["partialFingerprints"]["primaryLocationLineHash"] for result in run["results"]]
    assert len(set(prints)) == len(prints)
    assert all(result["message"]["text"] for result in run["results"])


@pytest.mark.parametrize("file", ["/home/me/net.py", "../net.py", "C:\\net.py", "\\\\host\\net.py"])
def test_a_source_outside_the_repository_is_never_a_place(file: str) -> None:
    report = sigmoid_chain(2)
    finding = replace(report.findings[0], source=Source(file, 3))
    place = _sarif(replace(report, findings=(finding,)))["results"][0]["locations"][0]["physicalLocation"]
    assert place == {"artifactLocation": {"uri": "sigmoid50.onnx"}}


def test_sarif_uris_are_quoted() -> None:
    report = hostile()
    uris = [r["locations"][0]["physicalLocation"]["artifactLocation"]["uri"] for r in _sarif(report)["results"]]
    assert all(re.fullmatch(r"[A-Za-z0-9._~/%-]+|file:///[A-Za-z0-9._~/%-]+", uri) for uri in uris)


def test_sarif_of_a_run_that_missed_a_model_did_not_succeed() -> None:
    def invocation(*missed: Fault) -> dict:
        return json.loads(render([healthy_resnet()], "sarif", faults=missed))["runs"][0]["invocations"][0]

    assert invocation() == {"executionSuccessful": True}
    (told,) = invocation(faults()[0])["toolExecutionNotifications"]
    assert invocation(faults()[0])["executionSuccessful"] is False
    assert (told["level"], told["message"]["text"]) == ("error", "nets/cut.onnx: truncated")
    assert told["locations"][0]["physicalLocation"]["artifactLocation"]["uri"] == "nets/cut.onnx"


def test_github_annotates_models_that_were_not_checked_first() -> None:
    lines = render([sigmoid_chain(50)], "github", faults=faults()).splitlines()
    assert lines[0] == "::error file=nets/cut.onnx,title=not checked::nets/cut.onnx: truncated"
    assert sum(line.startswith("::error ") for line in lines) == 10
    assert "gradlint: 5 more errors without an annotation" in lines
    assert "gradlint: nets/cut.onnx: not checked" in lines
    assert all(re.match(r"(::(error|warning|notice) file=|gradlint: )", line) for line in lines)
    assert not any("##[" in line for line in lines)


def test_gitlab_blocks_on_models_that_were_not_checked() -> None:
    issues = json.loads(render([sigmoid_chain(3)], "gitlab", faults=faults()))
    assert [issue["severity"] for issue in issues[: len(faults())]] == ["blocker"] * len(faults())
    assert issues[0]["location"]["path"] == "nets/cut.onnx"
    assert len({issue["fingerprint"] for issue in issues}) == len(issues)


def test_junit_has_a_case_in_error_for_a_model_that_was_not_checked() -> None:
    root = ElementTree.fromstring(render([sigmoid_chain(3)], "junit", faults=faults()[:1]))
    assert {key: root.get(key) for key in ("tests", "failures", "errors")} == {
        "tests": "3",
        "failures": "2",
        "errors": "1",
    }
    (error,) = root.findall("testsuite[@name='nets/cut.onnx']/testcase/error")
    assert error.get("message") == "nets/cut.onnx: truncated"


def test_a_comment_tells_models_that_were_not_checked_first() -> None:
    lines = render([healthy_resnet(1)], "markdown", faults=faults()[:1] * 30).splitlines()
    assert lines[0] == "- 🛑 **not checked** nets/cut.onnx: truncated"
    assert lines[20] == "- and 10 more models not checked"
    assert "### ✅ **pass** resnet.onnx (risk 0.03)" in lines


def test_github_annotates_ten_of_a_level_and_says_how_many_are_left() -> None:
    lines = render([sigmoid_chain(50)], "github").splitlines()
    assert sum(line.startswith("::error ") for line in lines) == 2
    assert sum(line.startswith("::notice ") for line in lines) == 10
    assert "gradlint: 2 more notes without an annotation" in lines
    assert lines[0].startswith("::error file=examples/deep_mlp.py,line=14,title=GL201 vanishing-gradient::")


def test_github_commands_can_not_be_injected() -> None:
    report = hostile()
    name = "a,line=1::x%0A##[add-mask]y"
    finding = Finding("r", "GL999", "error", name, None, f"\n::error::{name}", "proved", {}, (), Source(name, 2))
    text = render([replace(report, findings=(finding,))], "github")
    assert "##[" not in text
    command = text.splitlines()[0]
    assert command.startswith("::error file=a%2Cline=1%3A%3Ax%250A# #[add-mask]y,line=2,title=GL999 r::")
    assert all(re.match(r"(::(error|warning|notice) file=|gradlint: )", line) for line in text.splitlines())


def test_gitlab_has_the_required_keys_and_unique_fingerprints() -> None:
    issues = json.loads(render([sigmoid_chain(3), hostile()], "gitlab"))
    assert len({issue["fingerprint"] for issue in issues}) == len(issues)
    for issue in issues:
        assert set(issue) == {"description", "check_name", "fingerprint", "severity", "location"}
        assert issue["severity"] in ("info", "minor", "major", "critical", "blocker")
        assert issue["location"]["lines"]["begin"] >= 1


def test_junit_fails_per_finding_and_passes_a_clean_model() -> None:
    root = ElementTree.fromstring(render([sigmoid_chain(3), healthy_resnet(), hostile()], "junit"))
    failing, clean, odd = root.findall("testsuite")
    assert [len(failing.findall("testcase/failure")), failing.get("failures")] == [2, "2"]
    assert [case.get("name") for case in clean.findall("testcase")] == ["gradient flow"]
    assert odd.get("tests") == str(len(odd.findall("testcase")))
    assert root.get("tests") == str(len(root.findall("testsuite/testcase")))


def test_markdown_shows_hostile_names_as_text() -> None:
    text = render([hostile()], "markdown", faults=faults())
    html = MarkdownIt("commonmark", {"html": True}).enable("table").render(text)
    tags = {tag.lower() for tag in re.findall(r"</?([a-zA-Z][a-zA-Z0-9]*)", html)}
    assert tags <= {"h3", "p", "ul", "li", "strong", "code", "pre", "details", "summary", "sub"}


def test_a_comment_on_many_models_stays_under_the_limit() -> None:
    text = render([sigmoid_chain(50)] * 30 + [healthy_resnet(1)] * 10, "markdown")
    assert len(text) < 65_536
    assert text.count("**pass** resnet.onnx") == 10
