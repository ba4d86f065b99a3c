"""From facts to findings: three-valued conditions, evidence, grouping, selection, causes, verdict and fixes."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gradlint.condition import evaluate, names_in, parse_condition
from gradlint.exceptions import UsageError
from gradlint.fact_table import Evidence, Fact, Scope, Subject
from gradlint.fixes import choose_fixes, main_cause, write_fix
from gradlint.judge import Judgement, Tally, blame_in_words, fingerprint, judge, verdict
from gradlint.message import render_message
from gradlint.results import Blame, Finding, Level, Source
from gradlint.rulebook import configure, load_rules

BOOK = load_rules()
CHAIN = ("vanishing-gradient",)


def subject(
    scope: Scope = "layer", name: str = "a", order: int = 0, evidence: Evidence = "estimated", **facts: Fact
) -> Subject:
    """Its numbers are known by `evidence`; the truths and texts are read from the file."""
    defaults: dict[str, Fact] = {"is_gate": False, "is_head": False, "is_structural_zero": False, "optimizer": "sgd"}
    numbers = {fact: evidence for fact, value in facts.items() if isinstance(value, float)}
    return Subject(scope, layer=name, order=order, facts={**defaults, **facts}, evidence=numbers)


def chain(*decades: float | None) -> list[Subject]:
    return [subject(name=f"layers.{i}", order=i, trunk_decades=value) for i, value in enumerate(decades)]


def sums(*growths: float | None) -> list[Subject]:
    """Residual additions, whose rule names up to three places one by one."""
    return [subject(name=f"sums.{i}", order=i, residual_growth=value) for i, value in enumerate(growths)]


def only(judgement: Judgement) -> Finding:
    (finding,) = judgement.findings
    return finding


def finding(level: Level) -> Finding:
    return Finding("r", "GL999", level, None, None, "", "proved")


# -- Conditions ------------------------------------------------------------------------------------------------------


def value(text: str, **facts: Fact) -> object:
    return evaluate(parse_condition(text, "layer", {"floor": 3.0}, "test"), facts, {"floor": 3.0}).value


@pytest.mark.parametrize(
    ("left", "right", "both", "either"),
    [
        (True, True, True, True),
        (True, False, False, True),
        (True, None, None, True),
        (False, True, False, True),
        (False, False, False, False),
        (False, None, False, None),
        (None, True, None, True),
        (None, False, False, None),
        (None, None, None, None),
    ],
)
def test_and_and_or_follow_kleene(left: Fact, right: Fact, both: Fact, either: Fact) -> None:
    assert value("is_gate and is_head", is_gate=left, is_head=right) is both
    assert value("is_gate or is_head", is_gate=left, is_head=right) is either


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("decades < -limits.floor", True),
        ("decades < -limits.floor and gain < 0", None),
        ("not gain > 0", None),
        ("-5 < decades < -3", True),
        ("-3 < decades < gain", False),
        ("gain < decades < -3", None),
        ("op_type in ['Relu', 'Clip']", True),
        ("op_type not in ('Relu', 'Clip')", False),
        ("op_type == 'Relu'", True),
        ("module == 'a'", None),
        ("log10(fan_in) == 2", True),
        ("log10(fan_in - 100) < 0", None),
        ("1 / (fan_in - 100) > 0", None),
        ("abs(decades) + 2 ** 3 == 12", True),
        ("min(fan_in, 3, 7) == 3 and max(fan_in, 3) == 100", True),
        ("min(gain, 3) < 4", None),
        ("(1 if op_type == 'Relu' else 2) == 1", True),
        ("(1 if is_gate else 2) == 1", None),
        ("grad_norm < 1", None),
    ],
)
def test_expression_of_facts(text: str, expected: Fact) -> None:
    assert value(text, decades=-4.0, op_type="Relu", fan_in=100.0, grad_norm=math.nan) is expected


def test_condition_names_its_facts() -> None:
    condition = parse_condition("abs(decades) > limits.a and op_type in ['X']", "layer", {"a": 1}, "test")
    assert names_in(condition) == {"decades", "op_type"}
    assert names_in(parse_condition("abs(decades)", "layer", {}, "test", "number")) == {"decades"}


@given(st.lists(st.sampled_from([True, False, None]), min_size=3, max_size=3))
def test_an_answer_never_depends_on_what_is_unknown(values: list[bool | None]) -> None:
    names = ("is_gate", "is_head", "has_skip")
    text = "(is_gate and not is_head) or (has_skip and is_head)"
    answer = value(text, **dict(zip(names, values, strict=True)))
    fillings: Iterable[list[bool]] = [[]]
    for known in values:
        fillings = [[*f, option] for f in fillings for option in ((True, False) if known is None else (known,))]
    possible = {value(text, **dict(zip(names, filling, strict=True))) for filling in fillings}
    if answer is not None:
        assert possible == {answer}


# -- Findings --------------------------------------------------------------------------------------------------------


def test_strongest_level_that_holds_wins() -> None:
    levels = [
        [finding.level for finding in judge(chain(decades), BOOK, select=CHAIN).findings]
        for decades in (-1.0, -2.7, -3.5)
    ]
    assert levels == [[], ["warning"], ["error"]]


def test_adam_forgives_scale_but_not_a_collapsed_signal() -> None:
    adam = Subject("model", facts={"optimizer": "adam", "learning_spread": 6.0, "stage": "init"})
    places = [replace(s, facts={k: v for k, v in s.facts.items() if k != "optimizer"}) for s in chain(-4.0)]
    found = judge([adam, *places, subject(trunk_signal=1e-4)], BOOK, select=("GL201", "GL204", "GL208")).findings
    assert {f.rule: f.level for f in found} == {
        "signal-collapse": "error",
        "vanishing-gradient": "warning",
        "uneven-learning": "note",
    }
    assert "layer-wise-rate" not in {fix.name for f in found for fix in f.fixes}


def test_unknown_is_not_judged_and_never_clean() -> None:
    judgement = judge(chain(-1.0, None, None), BOOK, select=CHAIN)
    assert judgement.findings == ()
    assert judgement.tallies == {"vanishing-gradient": Tally(judged=1, not_judged=2)}


def test_rule_is_about_the_subjects_its_where_admits() -> None:
    gate = subject("activation", op_type="Sigmoid", saturated=0.9, fully_saturated=0.0, is_gate=True)
    relu = subject("activation", op_type="Relu", saturated=0.9)
    judgement = judge([gate, relu], BOOK, select=("saturated-activation",))
    assert judgement.findings == ()
    assert judgement.tallies["saturated-activation"] == Tally(0, 0)


def test_consecutive_layers_share_a_finding_of_the_worst() -> None:
    found = only(judge(chain(-4.0, -5.5, -2.7, -0.5), BOOK, select=CHAIN))
    assert (found.layer, found.level) == ("layers.1", "error")
    assert found.message.endswith("; and 2 more layers, layers.0 to layers.2")
    assert found.metrics == {"trunk_decades": -5.5, "layers": 3, "first": "layers.0", "last": "layers.2"}


def test_a_sound_layer_parts_groups_and_an_unknown_one_does_not() -> None:
    assert len(judge(sums(1e5, 1.0, 1e5), BOOK, select=("GL505",)).findings) == 2
    assert len(judge(sums(1e5, None, 1e5), BOOK, select=("GL505",)).findings) == 1


def test_more_places_than_a_rule_names_share_one_finding() -> None:
    assert len(judge(sums(1e5, 1.0, 1e5, 1.0, 1e5), BOOK, select=("GL505",)).findings) == 3
    found = only(judge(sums(1e5, 1.0, 1e5, 1.0, 1e5, 1.0, 1e6), BOOK, select=("GL505",)))
    assert found.message.endswith("; and 3 more layers, sums.0 to sums.6")
    assert len(judge(chain(-4.0, -1.0, -4.0), BOOK, select=CHAIN).findings) == 1


def test_a_trained_model_on_made_up_inputs_is_warned_about_and_told_why() -> None:
    model = Subject("model", facts={"stage": "trained", "data_given": False})
    found = only(judge([model, *chain(-4.0)], BOOK, select=CHAIN))
    assert found.level == "warning"
    assert "judged on made-up inputs" in found.message
    assert only(judge([model, *chain(-2.7)], BOOK, select=CHAIN)).level == "note"
    proved = subject(proved_decades=-4.0, on_trunk=True)
    assert only(judge([model, proved], BOOK, select=("GL203",))).level == "error"


def test_what_follows_from_bounds_alone_is_said_of_every_input() -> None:
    facts = {"cell": "RNN", "steps": 100.0, "steps_assumed": False, "time_decades": -9.0}
    measured = subject("recurrent", "rnn", evidence="measured", **facts, proved_time_decades=-7.5)
    assert "; proved for every input in range" in only(judge([measured], BOOK, select=("GL401",))).message
    loose = subject("recurrent", "rnn", evidence="measured", **facts, proved_time_decades=-6.5)
    assert "every input" not in only(judge([loose], BOOK, select=("GL401",))).message


def test_an_estimate_more_than_two_decades_off_is_mentioned() -> None:
    def message(estimated: float) -> str:
        place = subject(evidence="measured", trunk_decades=-5.0, measured_trunk_decades=-5.0)
        return only(
            judge([replace(place, facts={**place.facts, "estimated_trunk_decades": estimated})], BOOK, select=CHAIN)
        ).message

    assert message(-2.5).endswith("; the estimate differs: -2.5 decades")
    assert "estimate" not in message(-3.5)


def test_groups_follow_the_graph_whatever_order_subjects_come_in() -> None:
    subjects = chain(-4.0, -1.0, -3.5)
    assert judge(subjects, BOOK) == judge(subjects[::-1], BOOK)


@pytest.mark.parametrize("evidence", ["proved", "estimated", "measured"])
def test_finding_carries_the_evidence_of_its_facts(evidence: Evidence) -> None:
    found = only(judge([subject(trunk_decades=-4.0, evidence=evidence)], BOOK, select=CHAIN))
    assert found.evidence == evidence


def test_measured_wins_and_structure_is_proved() -> None:
    mixed = subject("activation", op_type="Relu", width=64, dead=0.9, samples_per_unit=8.0, estimated_dead=0.8)
    mixed = Subject("activation", layer="a", facts=mixed.facts, evidence={"dead": "measured"})
    assert only(judge([mixed], BOOK, select=("GL104",))).evidence == "measured"
    folded = Subject("model", facts={"folded_batchnorm": 3.0, "folded_layers": "conv1, conv2, conv3"})
    found = only(judge([folded], BOOK, select=("GL502",)))
    assert found.evidence == "proved"
    assert "folded 3 BatchNorm into the layers before (conv1, conv2, conv3)" in found.message


def test_few_samples_need_the_estimate_to_agree() -> None:
    few = {"op_type": "Relu", "dead": 0.9, "samples_per_unit": 8.0, "width": 64}
    assert judge([subject("activation", **few, estimated_dead=0.1, proved_dead=0.0)], BOOK).findings == ()
    assert only(judge([subject("activation", **few, estimated_dead=0.9)], BOOK)).rule == "dead-relu"


def test_half_the_units_of_a_narrow_layer_may_be_off_by_chance() -> None:
    levels = [
        [
            f.level
            for f in judge(
                [subject("activation", op_type="Relu", dead=0.72, width=width, samples_per_unit=640.0, stage="init")],
                BOOK,
            ).findings
        ]
        for width in (10, 400)
    ]
    assert levels == [[], ["error"]]


def test_facts_of_the_model_are_known_everywhere() -> None:
    model = Subject("model", facts={"layers": 50.0})
    found = only(judge([model, *chain(-10.0)], BOOK, select=CHAIN))
    texts = {fix.name: fix.text for fix in found.fixes}
    assert texts["fewer-layers"].startswith("Use at most 10 of the 50 layers")


def test_findings_are_sorted_by_level_then_code_then_place() -> None:
    subjects = [
        *sums(2e3, 1.0, 1e5),
        Subject("model", facts={"folded_batchnorm": 1.0, "folded_layers": "conv", "probe_skipped": True}),
        subject("activation", "tanh", 5, op_type="Tanh", saturated=0.9, fully_saturated=0.0),
    ]
    found = [(finding.level, finding.code, finding.layer) for finding in judge(subjects, BOOK).findings]
    assert found == [
        ("error", "GL505", "sums.2"),
        ("warning", "GL101", "tanh"),
        ("warning", "GL505", "sums.0"),
        ("note", "GL502", None),
        ("note", "GL902", None),
    ]


def test_a_cause_explains_the_gradient_before_it_and_the_signal_behind_it() -> None:
    dead = subject("activation", "relu.1", 1, op_type="Relu", width=64, dead=0.9, samples_per_unit=640.0, stage="init")
    above, below = subject(order=0, trunk_decades=-4.0), subject(order=2, trunk_signal=1e-4)
    first, *others = judge([above, below, dead], BOOK, select=("GL104", "GL201", "GL204")).findings
    assert first.rule == "dead-relu"
    for found in others:
        assert found.message.endswith("; a consequence of dead-relu at relu.1")
        assert found.metrics["cause_layer"] == "relu.1"
    above, below = subject(order=0, trunk_signal=1e-4), subject(order=2, trunk_decades=-4.0)
    for found in judge([above, below, dead], BOOK, select=("GL201", "GL204")).findings:
        assert "consequence" not in found.message


def test_a_cause_stands_before_its_consequences_and_is_as_severe() -> None:
    growing = subject(order=3, residual_growth=1e5)
    found = judge([subject(trunk_growth=4.0, head_growth=0.0), growing], BOOK, select=("GL202", "GL505")).findings
    assert [f.code for f in found] == ["GL505", "GL202"]
    growing = subject(order=3, residual_growth=2e3)
    found = judge([subject(trunk_growth=4.0, head_growth=0.0), growing], BOOK, select=("GL202", "GL505")).findings
    assert [f.code for f in found] == ["GL202", "GL505"]
    assert "consequence" not in found[0].message


def test_finding_keeps_source_and_fingerprint() -> None:
    place = Source("net.py", 12)
    found = only(judge([Subject("layer", "a", facts=chain(-4.0)[0].facts, source=place)], BOOK, select=CHAIN))
    assert found.source == place
    assert found.fingerprint == fingerprint("GL201", "a", None)
    assert len(found.fingerprint) == 16
    assert len({fingerprint("GL201", "a", "b"), fingerprint("GL201", "ab", None), fingerprint("GL202", "a", "b")}) == 3


def test_settings_reach_the_findings() -> None:
    book = configure(BOOK, {"vanishing-gradient": {"level": "note", "limits": {"warning": 0.5}}})
    assert only(judge(chain(-1.0), book, select=CHAIN)).level == "note"


# -- Selection and verdict -------------------------------------------------------------------------------------------


def names(**selection: object) -> set[str]:
    return set(judge([], BOOK, **selection).tallies)


def test_selectors_take_codes_their_beginnings_and_names() -> None:
    stable = {rule.name for rule in BOOK.rules if rule.status == "stable"}
    assert names() == stable
    assert names(preview=True) == {rule.name for rule in BOOK.rules}
    assert names(select=("GL201", "dead-relu")) == {"vanishing-gradient", "dead-relu"}
    assert names(select=("GL9",)) == {name for name in stable if BOOK.find(name).code.startswith("GL9")}
    assert names(select=("GL201",), extend_select=("GL104",)) == {"vanishing-gradient", "dead-relu"}
    assert names(ignore=("GL2", "dead-relu")) == {
        name for name in stable if not BOOK.find(name).code.startswith("GL2") and name != "dead-relu"
    }


@pytest.mark.parametrize("key", ["select", "ignore", "extend_select"])
def test_selector_that_fits_no_rule_is_refused(key: str) -> None:
    with pytest.raises(UsageError, match="no rule matches 'vanishing-gradent'; did you mean vanishing-gradient"):
        names(**{key: ("vanishing-gradent",)})


@pytest.mark.parametrize(
    ("levels", "risk", "expected"),
    [
        (("error",), 0.5, "fail"),
        (("error",), None, "fail"),
        (("error",), 0.49, "warn"),
        (("warning",), 0.9, "warn"),
        (("warning",), None, "warn"),
        (("note",), 0.25, "warn"),
        (("note",), 0.24, "pass"),
        ((), None, "pass"),
        ((), 0.0, "pass"),
    ],
)
def test_verdict(levels: tuple[Level, ...], risk: float | None, expected: str) -> None:
    assert verdict([finding(level) for level in levels], risk) == expected


# -- Messages, blame and fixes ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("{{ decades | decades }}", "-3.2 decades"),
        ("{{ decades | times }}", "1,700 times"),
        ("{{ gain | times }}", "10^18 times"),
        ("{{ slope | times }}", "1.3 times"),
        ("{{ trunk_growth | times }}", "infinitely many times"),
        ("{{ signal | percent }}", "12 %"),
        ("{{ signal | short }}", "0.123"),
        ("{{ layers }}", "50"),
        ("{{ grad_rms }} {{ grad_rms | decades }} {{ grad_rms | percent }}", "unknown unknown unknown"),
        ("{% if grad_rms is none %}none{% endif %}", "none"),
        ("two\n  lines", "two lines"),
    ],
)
def test_message_rounds_for_people(text: str, expected: str) -> None:
    facts = {
        "decades": -3.23,
        "gain": -18.1,
        "slope": 0.1,
        "trunk_growth": math.inf,
        "signal": 0.1234,
        "layers": 50.0,
    }
    assert render_message(text, facts, "test") == expected


def test_message_that_breaks_its_bounds_is_refused() -> None:
    with pytest.raises(UsageError, match="can't be rendered"):
        render_message("{% for i in range(10 ** 9) %}x{% endfor %}", {}, "test")


def test_blame_is_summed_by_operator() -> None:
    blame = [Blame(f"a{i}", "Sigmoid", -0.6) for i in range(30)] + [Blame("m", "MatMul", 2.04), Blame("r", "Add", 0.0)]
    assert blame_in_words(blame) == "30 Sigmoid -18.0, 1 MatMul +2.0"
    assert blame_in_words([]) == ""


@pytest.mark.parametrize(
    ("operators", "cause"),
    [
        ((("Sigmoid", -18.0), ("MatMul", 2.0)), "activation"),
        ((("Sigmoid", -1.0), ("Gemm", -4.0)), "weights"),
        ((("Relu", -2.0), ("Conv", 7.0)), "weights"),
        ((("LSTM", -4.0),), "time"),
        ((("Add", -4.0),), "other"),
    ],
)
def test_main_cause_took_most_decades(operators: tuple[tuple[str, float], ...], cause: str) -> None:
    assert main_cause([Blame(op, op, decades) for op, decades in operators]) == cause


def test_fixes_follow_the_blame() -> None:
    names = ("relu", "he-init", "elu", "lstm")
    by_blame = {
        op: [fix.name for fix in choose_fixes(names, Subject("layer", "a", blame=(Blame("n", op, -5.0),)))]
        for op in ("Sigmoid", "Gemm", "RNN")
    }
    assert by_blame["Sigmoid"] == ["relu", "elu", "he-init"]
    assert by_blame["Gemm"] == ["he-init", "relu", "elu"]
    assert by_blame["RNN"] == ["lstm", "relu", "he-init", "elu"]
    assert [fix.name for fix in choose_fixes(names, Subject("recurrent", "a"))] == list(names)


def test_what_is_there_already_is_no_fix() -> None:
    names = ("relu", "elu", "batch-norm", "skip-connections", "scale-init")
    here = {"next_activation": "Relu", "follows_norm": True, "has_skip": True}
    assert [fix.name for fix in choose_fixes(names, Subject("layer", "a", facts=here))] == ["elu"]


def test_what_has_no_place_here_is_no_fix() -> None:
    assert set(chosen_fixes(("log-softmax",), op_type="Log")) == {"log-softmax"}
    assert chosen_fixes(("log-softmax",), op_type="Sqrt") == {}
    assert set(chosen_fixes(("standard-operators",), unmodelled_ops="my.company:Swirl (2)")) == {"standard-operators"}
    assert chosen_fixes(("standard-operators",), unmodelled_ops="STFT (1)") == {}


def chosen_fixes(names: tuple[str, ...], *blame: Blame, scope: Scope = "layer", **facts: Fact) -> dict[str, str]:
    return {f.name: f.text for f in choose_fixes(names, Subject(scope, "a", facts=facts, blame=blame))}


def test_no_activation_is_replaced_where_there_is_none() -> None:
    assert chosen_fixes(("relu", "selu"), next_activation="Identity") == {}
    assert set(chosen_fixes(("relu", "selu"))) == {"relu", "selu"}


def test_a_softmax_of_an_attention_is_not_replaced() -> None:
    blame = (Blame("attention", "Softmax", -1.5), Blame("act.1", "Sigmoid", -1.0), Blame("act.2", "Sigmoid", -1.0))
    assert (
        "Replace the Sigmoid at `act.1` to `act.2`" in chosen_fixes(("relu",), *blame, next_activation="Relu")["relu"]
    )
    assert chosen_fixes(("relu",), blame[0], next_activation="Identity") == {}
    assert "Replace the Softmax at `a`" in chosen_fixes(("relu",), blame[0], next_activation="Softmax")["relu"]


def test_the_blamed_activation_is_named_where_the_next_one_is_a_relu() -> None:
    sigmoids = (Blame("act.3", "Sigmoid", -2.0), Blame("act.5", "Sigmoid", -2.0))
    texts = chosen_fixes(("relu",), *sigmoids, next_activation="Relu")
    assert texts["relu"].startswith("Replace the Sigmoid at `act.3` to `act.5` by ReLU")


def test_a_scale_that_fits_or_would_make_it_worse_is_no_fix() -> None:
    names, kernel = ("he-init", "scale-init"), {"fan_in": 200.0, "weight_rms": 0.1}
    assert set(chosen_fixes(names, **kernel, init_factor=1.05)) == set()
    decay, growth = Blame("n", "Gemm", -3.0), Blame("n", "Gemm", 3.0)
    assert set(chosen_fixes(names, decay, fan_in=200.0, weight_rms=0.2, init_factor=0.5)) == set()
    assert set(chosen_fixes(names, growth, fan_in=200.0, weight_rms=0.2, init_factor=0.5)) == set(names)
    assert set(chosen_fixes(names, growth, fan_in=200.0, weight_rms=0.02, init_factor=5.0)) == set()


def test_cells_are_not_advised_to_themselves_and_gates_only_to_their_cell() -> None:
    names = ("lstm", "gru", "forget-bias", "update-bias")
    assert set(chosen_fixes(names, scope="recurrent", cell="RNN")) == {"lstm", "gru"}
    assert set(chosen_fixes(names, scope="recurrent", cell="LSTM")) == {"gru", "forget-bias"}
    assert set(chosen_fixes(names, scope="recurrent", cell="GRU")) == {"lstm", "update-bias"}
    texts = chosen_fixes(("lstm",), Blame("rnn", "RNN", -4.0), op_type="Conv")
    assert texts["lstm"].startswith("Replace the recurrence at `rnn` by an LSTM")


def test_residual_scale_needs_residuals() -> None:
    assert chosen_fixes(("residual-scale",), residual_additions=0.0) == {}
    assert "by 0.25" in chosen_fixes(("residual-scale",), residual_additions=16.0)["residual-scale"]


def test_one_place_is_named_once() -> None:
    text = write_fix("batch-norm", Subject("layer", "a", facts={"next_activation": "Tanh"}), ("a", "a"))
    assert text.startswith("Put a BatchNorm before the Tanh at `a`.")


def test_fix_names_the_whole_span_of_a_group() -> None:
    found = only(judge(chain(-4.0, -5.5, -2.7), BOOK, select=CHAIN))
    assert found.fixes[0].text.startswith("Replace the activation at `layers.0` to `layers.2` by ReLU")


@pytest.mark.parametrize(
    ("name", "facts", "text"),
    [
        ("he-init", {"main_weight": "l3.weight", "weight_rms": 0.1, "fan_in": 200.0}, "multiply `l3.weight` by 1"),
        (
            "he-init",
            {"main_weight": "l3.weight", "weight_rms": 0.0577, "fan_in": 100.0},
            "multiply `l3.weight` by 2.45",
        ),
        ("xavier-init", {"weight_rms": 0.05, "fan_in": 100.0, "fan_out": 100.0}, "multiply the weights by 2"),
        ("scale-init", {"main_weight": "w", "init_factor": 1.7321}, "Multiply `w` by 1.73"),
        ("forget-bias", {"steps": 100.0}, "Start the forget bias at 4.6 for 100 steps"),
        ("residual-scale", {"residual_index": 20.0}, "Scale each residual branch by 0.22"),
        ("attention-scale", {"head_dim": 64.0}, "by 0.125"),
        ("learning-rate", {"update_ratio": -1.0, "learning_rate": 0.1}, "Change the learning rate to 0.001"),
        ("gradient-clipping", {}, "Clip the gradient at norm 1.0"),
        ("relu", {"next_activation": "Sigmoid"}, "Replace the Sigmoid at `a` by ReLU"),
        ("re-export", {"export_line": "export(optimize=False)"}, "PyTorch: `export(optimize=False)`"),
        ("epsilon", {"op_type": "Sqrt"}, "PyTorch: `torch.sqrt(x.clamp_min(1e-6))`"),
        ("epsilon", {"op_type": "Div"}, "Keras: `x / ops.maximum(y, 1e-6)`"),
    ],
)
def test_fix_computes_its_numbers(name: str, facts: dict[str, Fact], text: str) -> None:
    assert text in write_fix(name, Subject("layer", "a", facts=facts))
