"""JUnit XML: a suite per model, a failing case per error or warning, and a passing case for a clean model.

A model that was not checked is a suite with one case in error.
"""

from __future__ import annotations

from collections.abc import Sequence
from xml.etree.ElementTree import Element, SubElement, indent, tostring

from gradlint.report.headline import blame_summary, finding_blame, headline, ranked
from gradlint.report.text import label, prose
from gradlint.results import Fault, Finding, Report


def render(reports: Sequence[Report], faults: Sequence[Fault] = ()) -> str:
    """Notes are told in the suite's output, not as cases."""
    root = Element("testsuites", name="gradlint")
    totals = [_suite(root, report) for report in reports]
    for fault in faults:
        _not_checked(root, fault)
    root.set("tests", str(sum(tests for tests, _ in totals) + len(faults)))
    root.set("failures", str(sum(failures for _, failures in totals)))
    root.set("errors", str(len(faults)))
    indent(root, " ")
    return '<?xml version="1.0" encoding="UTF-8"?>\n' + tostring(root, encoding="unicode") + "\n"


def _suite(root: Element, report: Report) -> tuple[int, int]:
    path = label(report.model.path)
    failing = [finding for finding in ranked(report.findings) if finding.level != "note"]
    tests = max(len(failing), 1)
    suite = SubElement(root, "testsuite", name=path, tests=str(tests), failures=str(len(failing)), errors="0")
    for finding in failing:
        place = label(finding.layer or finding.weight or "the model")
        case = SubElement(suite, "testcase", classname=path, name=f"{label(finding.rule)} at {place}")
        failure = SubElement(case, "failure", type=finding.level, message=prose(finding.message))
        failure.text = _details(report, finding)
    if not failing:
        SubElement(suite, "testcase", classname=path, name="gradient flow")
    output = SubElement(suite, "system-out")
    notes = [f"note {label(f.code)} {label(f.rule)}: {prose(f.message)}" for f in report.findings if f.level == "note"]
    output.text = "\n".join([headline(report), *notes])
    return tests, len(failing)


def _not_checked(root: Element, fault: Fault) -> None:
    path = label(fault.path)
    suite = SubElement(root, "testsuite", name=path, tests="1", failures="0", errors="1")
    case = SubElement(suite, "testcase", classname=path, name="gradient flow")
    SubElement(case, "error", type="not checked", message=prose(fault.message))


def _details(report: Report, finding: Finding) -> str:
    lines = [f"{label(finding.code)} ({finding.evidence})"]
    if blame := blame_summary(finding_blame(report, finding)):
        lines.append(f"blame: {blame}")
    lines += [f"fix: {prose(fix.text)}" for fix in finding.fixes[:3]]
    if finding.source:
        lines.append(f"source: {label(finding.source.file)}:{finding.source.line}")
    return "\n".join(lines)
