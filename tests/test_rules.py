"""Rule pages: each parses, explains itself, and its examples yield what they say; a page that is wrong says why."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx.parser
import pytest
from builders import DATA, build

import gradlint
from gradlint.exceptions import UsageError
from gradlint.fact_table import FACTS, Subject
from gradlint.fixes import write_fix
from gradlint.remedies import REMEDIES
from gradlint.rulebook import SECTIONS, Example, Rule, Rulebook, configure, explain, load_rules, parse_page

BOOK = load_rules()
EXAMPLES = [
    pytest.param(rule, example, id=f"{rule.name}-{'yes' if example.triggers else 'no'}-{number}")
    for rule in BOOK.rules
    for number, example in enumerate(rule.examples)
]

PAGE = """# my-rule

One sentence.

```toml
code = "TEAM001"
status = "stable"
level = "warning"
scope = "layer"
since = "1.0"
when = "decades < -limits.floor and not is_gate"
message = "{{ layer }}: {{ decades | decades }}"
fixes = ["relu"]
limits.floor = 3.0
```

## Why it matters

Because of [this paper](https://example.org/paper) and

- one reason.

## How to fix it

```python
nn.ReLU()
```

## When to ignore it

Never.

## References

- A paper.

## Triggers

```python mode="eval" seed=3
mlp(depth=50, activation="Sigmoid")
```

Expect: my-rule, vanishing-gradient

## Does not trigger

```python
mlp(depth=2)
```

Expect: nothing
"""


@pytest.mark.parametrize(("rule", "example"), EXAMPLES)
def test_example_yields_what_the_page_says(rule: Rule, example: Example, tmp_path: Path) -> None:
    model = build(example.text) if example.kind == "python" else onnx.parser.parse_model(example.text)
    options = dict(example.options)
    if "data" in options:
        shape = (16, model.graph.input[0].type.tensor_type.shape.dim[1].dim_value)
        np.savez(tmp_path / "data.npz", **DATA[options["data"]](shape))
        options["data"] = tmp_path / "data.npz"
    report = gradlint.check(model, preview=rule.status == "preview", **options)
    found = {finding.rule for finding in report.findings}
    alarms = {finding.rule for finding in report.findings if finding.level != "note"}
    assert (rule.name in found) is example.triggers
    assert found.issuperset(example.expect)
    if not example.expect:
        assert alarms == set()


@pytest.mark.parametrize("rule", [pytest.param(rule, id=rule.name) for rule in BOOK.rules])
def test_page_is_complete(rule: Rule) -> None:
    assert rule.code.startswith("GL")
    assert rule.path == f"rules/{rule.name}.md"
    assert tuple(rule.sections) == SECTIONS
    assert {True, False} == {example.triggers for example in rule.examples}
    assert "PyTorch" in rule.sections["How to fix it"]
    assert "Keras" in rule.sections["How to fix it"]
    text = explain(rule)
    assert text.startswith(f"{rule.name} ({rule.code}")
    assert "```" not in text


def test_expectations_name_rules_that_exist() -> None:
    names = {rule.name for rule in BOOK.rules}
    for rule in BOOK.rules:
        for example in rule.examples:
            assert names.issuperset(example.expect)


@pytest.mark.parametrize("name", sorted(REMEDIES))
def test_remedy_writes_a_line_for_each_framework_even_when_nothing_is_known(name: str) -> None:
    text = write_fix(name, Subject("layer", layer="blocks.0"))
    assert " PyTorch: `" in text
    assert " Keras: `" in text
    assert "{" not in text.partition("PyTorch")[0]


def test_every_remedy_is_reachable_from_a_rule() -> None:
    assert {fix for rule in BOOK.rules for fix in rule.fixes} == set(REMEDIES)


def test_facts_are_documented() -> None:
    for name, spec in FACTS.items():
        assert spec.name == name
        assert spec.unit
        assert spec.meaning
        assert spec.scopes


def test_rule_is_found_by_name_and_by_code_and_near_names_are_given() -> None:
    assert BOOK.find("GL201") is BOOK.find("vanishing-gradient")
    with pytest.raises(UsageError, match="did you mean vanishing-gradient"):
        BOOK.find("vanishing-gradients")


def test_page_reads_as_written() -> None:
    rule = parse_page(PAGE, "pages/my-rule.md")
    assert (rule.name, rule.code, rule.title) == ("my-rule", "TEAM001", "One sentence.")
    assert list(rule.conditions) == ["warning"]
    assert rule.limits == {"floor": 3.0}
    first, second = rule.examples
    assert first.triggers
    assert first.expect == ("my-rule", "vanishing-gradient")
    assert first.options == {"mode": "eval", "seed": 3}
    assert second.expect == ()


def test_explanation_is_plain_text() -> None:
    text = explain(parse_page(PAGE, "pages/my-rule.md"))
    assert "warning when: decades < -limits.floor and not is_gate\nlimits.floor = 3\n" in text
    assert "Because of this paper (https://example.org/paper) and" in text
    assert "- one reason." in text
    assert "    nn.ReLU()" in text
    assert "Does not trigger" not in text


@pytest.mark.parametrize(
    ("old", "new", "reason"),
    [
        ("# my-rule", "# My Rule", "must be the file's name"),
        ("# my-rule", "# other-rule", "must be the file's name"),
        ("One sentence.\n", "", "one sentence and a fenced toml block"),
        ('code = "TEAM001"\n', "", "the key 'code' is missing"),
        ('code = "TEAM001"', 'code = "one"', "capitals and three or four digits"),
        ('code = "TEAM001"', "code = 1", "code must be a text"),
        ('status = "stable"', 'status = "stabel"', "none of stable, preview; did you mean stable?"),
        ('level = "warning"\n', "", "the key 'level' is missing"),
        ('scope = "layer"', 'scope = "layers"', "did you mean layer?"),
        ("fixes =", "fixs =", "no key 'fixs'; did you mean fixes?"),
        ('["relu"]', '["rleu"]', "did you mean relu"),
        ('["relu"]', '"relu"', "fixes must be a list of texts"),
        ("limits.floor = 3.0", "limits.floor = true", "limits.floor must be a number"),
        ("limits.floor = 3.0", "limits.flor = 3.0", "no limit named 'floor'; did you mean flor?"),
        ("limits.floor = 3.0", "limits.floor = = 3", "toml block"),
        ("decades < -limits", "decade < -limits", "no fact named 'decade'; did you mean"),
        ("decades < -limits.floor", "sigmoid_chain > 4", "not known in scope layer"),
        ("not is_gate", "not op_type", "a text stands where a truth is needed"),
        ("not is_gate", "op_type > 'a'", "a text has no order"),
        ("not is_gate", "layer.upper() == 'A'", "is not allowed|is no function"),
        ("not is_gate", "open('x') == 1", "'open' is no function"),
        ("not is_gate", "decades | abs > 1", "a Filter is not allowed"),
        ("not is_gate", "op_type in fan_in", "needs a list of constants"),
        ("not is_gate", "log10(decades, 2) < 1", "log10 takes one argument"),
        ("not is_gate", "not is_gate is_head", "more than one expression"),
        ("not is_gate", "(decades", "unexpected"),
        ("decades < -limits.floor and not is_gate", "decades", "is a number, not a truth"),
        ("{{ decades | decades }}", "{{ decade }}", "no fact named 'decade'"),
        ("{{ decades | decades }}", "{{ decades | decods }}", "no filter 'decods'; did you mean decades"),
        ("{{ decades | decades }}", "{{ layer.__class__ }}", "only `limits` has attributes"),
        ("{{ decades | decades }}", "{{ limits.flor }}", "no limit named 'flor'"),
        ("## Why it matters", "## Why it mattes", "did you mean Why it matters?"),
        ("- A paper.", "", "'## References' is missing or empty"),
        ("Expect: nothing", "Nothing.", "must follow each example"),
        ("```python\nmlp(depth=2)", "```bash\nmlp(depth=2)", "fenced onnx or python block"),
        ("seed=3", "seed=", "settings of an example"),
    ],
)
def test_wrong_page_says_what_is_wrong(old: str, new: str, reason: str) -> None:
    assert old in PAGE
    with pytest.raises(UsageError, match=reason) as caught:
        parse_page(PAGE.replace(old, new, 1), "pages/my-rule.md")
    assert "\n" not in str(caught.value)
    assert str(caught.value).startswith("pages/my-rule.md")


def test_table_of_levels_takes_the_place_of_a_level() -> None:
    table = PAGE.replace('level = "warning"\n', "").replace('when = "', 'when.error = "')
    assert list(parse_page(table, "my-rule.md").conditions) == ["error"]
    with pytest.raises(UsageError, match="or a table of error, warning, note"):
        parse_page(PAGE.replace('when = "', 'when.error = "'), "my-rule.md")


def test_own_pages_join_the_packaged_ones(tmp_path: Path) -> None:
    (tmp_path / "my-rule.md").write_text(PAGE)
    (tmp_path / "README.md").write_text("Our rules.")
    book = load_rules([tmp_path])
    assert len(book.rules) == len(BOOK.rules) + 1
    assert book.find("TEAM001").path == str(tmp_path / "my-rule.md")


def test_code_used_twice_is_refused(tmp_path: Path) -> None:
    (tmp_path / "my-rule.md").write_text(PAGE.replace("TEAM001", "GL201"))
    with pytest.raises(UsageError, match=r"has the name or code of rules/vanishing-gradient\.md"):
        load_rules([tmp_path])


def test_explained_rule_must_exist(tmp_path: Path) -> None:
    text = PAGE.replace('fixes = ["relu"]', 'fixes = ["relu"]\nexplains = ["dead-rel"]')
    (tmp_path / "my-rule.md").write_text(text)
    with pytest.raises(UsageError, match="no rule 'dead-rel'; did you mean dead-relu"):
        load_rules([tmp_path])


@pytest.mark.parametrize("folder", ["missing", "."])
def test_folder_without_pages_is_refused(tmp_path: Path, folder: str) -> None:
    with pytest.raises(UsageError, match=r"is not a folder|no page"):
        load_rules([tmp_path / folder])


def test_settings_change_levels_and_limits() -> None:
    book: Rulebook = configure(BOOK, {"GL201": {"level": "note", "limits": {"error": 5}}})
    rule = book.find("vanishing-gradient")
    assert rule.forced_level == "note"
    assert rule.limits == {"warning": 2.5, "error": 5}
    assert BOOK.find("GL201").forced_level is None


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        ({"GL2011": {}}, "no rule 'GL2011'; did you mean GL201"),
        ({"GL201": {"levl": "note"}}, "no key 'levl'; did you mean level"),
        ({"GL201": {"level": "notes"}}, "did you mean note"),
        ({"GL201": {"limits": {"errors": 1}}}, "no limit 'errors'; did you mean error"),
        ({"GL201": {"limits": {"error": "1"}}}, "must be a number"),
    ],
)
def test_wrong_settings_are_refused(settings: dict[str, dict[str, object]], reason: str) -> None:
    with pytest.raises(UsageError, match=reason):
        configure(BOOK, settings)
