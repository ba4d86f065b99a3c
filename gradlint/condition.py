"""The conditions of rule pages: Jinja's expression syntax over flat facts, checked at load, three-valued at work.

Allowed: fact names, `limits.name`, constants, `and or not`, comparisons, `in` a list of constants, arithmetic,
`a if c else b`, and calls of log10, abs, min, max. Anything else is refused when the page is read.

Unknown (None) spreads as in Kleene's strong logic: what compares or computes with an unknown is unknown, except that
`false and unknown` is false and `true or unknown` is true. An undefined number (1/0, log10(-1), NaN) is unknown too.
"""

from __future__ import annotations

import difflib
import math
import operator
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from jinja2 import Environment, TemplateSyntaxError, nodes
from jinja2.parser import Parser

from gradlint.exceptions import UsageError
from gradlint.fact_table import FACTS, Fact, Kind, Scope

Number = float | int
Limits = Mapping[str, Number]


@dataclass(frozen=True)
class Condition:
    """A checked expression: its source text and its syntax tree."""

    text: str
    tree: nodes.Expr


@dataclass(frozen=True)
class Outcome:
    """A value and the names of the facts that decided it."""

    value: Any
    used: frozenset[str] = frozenset()


UNKNOWN = Outcome(None)

_FUNCTIONS: dict[str, Callable[..., float]] = {"log10": math.log10, "abs": abs, "min": min, "max": max}
_ARITHMETIC: dict[type[nodes.Expr], Callable[[Any, Any], Any]] = {
    nodes.Add: operator.add,
    nodes.Sub: operator.sub,
    nodes.Mul: operator.mul,
    nodes.Div: operator.truediv,
    nodes.Pow: math.pow,
}
_COMPARISONS: dict[str, Callable[[Any, Any], bool]] = {
    "eq": operator.eq,
    "ne": operator.ne,
    "gt": operator.gt,
    "gteq": operator.ge,
    "lt": operator.lt,
    "lteq": operator.le,
    "in": lambda item, items: item in items,
    "notin": lambda item, items: item not in items,
}


def near(name: str, known: Iterable[str]) -> str:
    """`; did you mean a, b?` for a misspelt name, or nothing."""
    matches = difflib.get_close_matches(name, sorted(known), n=3, cutoff=0.6)
    return f"; did you mean {', '.join(matches)}?" if matches else ""


def parse_condition(text: str, scope: Scope, limits: Limits, where: str, kind: Kind = "truth") -> Condition:
    """Parse and check one expression of a rule of `scope`; `where` names the page and key in errors.

    Raises UsageError for a syntax error, an unknown fact or limit, a fact of another scope, a construct or a comparison
    that makes no sense, or a result that is not of `kind`.
    """
    try:
        parser = Parser(Environment(), text, state="variable")
        tree = parser.parse_expression()
        complete = parser.stream.eos
    except TemplateSyntaxError as error:
        raise UsageError(f"{where}: {error.message} in `{text}`") from error
    if not complete:
        raise UsageError(f"{where}: `{text}` is more than one expression")
    found = _Checker(scope, limits, where, text).kind(tree)
    if found != kind:
        raise UsageError(f"{where}: `{text}` is a {found}, not a {kind}")
    return Condition(text, tree)


@dataclass(frozen=True)
class _Checker:
    scope: Scope
    limits: Limits
    where: str
    text: str

    def fail(self, reason: str) -> UsageError:
        return UsageError(f"{self.where}: {reason} in `{self.text}`")

    def expect(self, node: nodes.Node, kind: Kind) -> None:
        found = self.kind(node)
        if found != kind:
            raise self.fail(f"a {found} stands where a {kind} is needed")

    def kind(self, node: nodes.Node) -> Kind:
        """The kind of the value of `node`; raises UsageError for what is not allowed."""
        match node:
            case nodes.Name(name=name):
                return check_fact(name, self.scope, self.where)
            case nodes.Const(value=value):
                return self.constant(value)
            case nodes.Getattr(node=nodes.Name(name="limits"), attr=attr):
                if attr not in self.limits:
                    raise self.fail(f"no limit named {attr!r}{near(attr, self.limits)}")
                return "number"
            case nodes.And() | nodes.Or():
                self.expect(node.left, "truth")
                self.expect(node.right, "truth")
                return "truth"
            case nodes.Not():
                self.expect(node.node, "truth")
                return "truth"
            case nodes.Compare():
                return self.comparison(node)
            case nodes.Add() | nodes.Sub() | nodes.Mul() | nodes.Div() | nodes.Pow():
                self.expect(node.left, "number")
                self.expect(node.right, "number")
                return "number"
            case nodes.Neg() | nodes.Pos():
                self.expect(node.node, "number")
                return "number"
            case nodes.CondExpr(test=test, expr1=left, expr2=right) if right is not None:
                self.expect(test, "truth")
                self.expect(right, self.kind(left))
                return self.kind(left)
            case nodes.Call():
                return self.call(node)
        raise self.fail(f"a {type(node).__name__} is not allowed")

    def constant(self, value: object) -> Kind:
        if isinstance(value, bool):
            return "truth"
        if isinstance(value, int | float):
            return "number"
        if isinstance(value, str):
            return "text"
        raise self.fail(f"the constant {value!r} is not allowed")

    def comparison(self, node: nodes.Compare) -> Kind:
        left = self.kind(node.expr)
        for operand in node.ops:
            if operand.op in ("in", "notin"):
                if not isinstance(operand.expr, nodes.List | nodes.Tuple):
                    raise self.fail("`in` needs a list of constants")
                for item in operand.expr.items:
                    if not isinstance(item, nodes.Const):
                        raise self.fail("`in` needs a list of constants")
                    self.expect(item, left)
                continue
            self.expect(operand.expr, left)
            if left != "number" and operand.op not in ("eq", "ne"):
                raise self.fail(f"a {left} has no order")
        return "truth"

    def call(self, node: nodes.Call) -> Kind:
        name = node.node.name if isinstance(node.node, nodes.Name) else "this"
        if name not in _FUNCTIONS or node.kwargs or node.dyn_args is not None or node.dyn_kwargs is not None:
            raise self.fail(f"{name!r} is no function of rules ({', '.join(_FUNCTIONS)})")
        expected = (1, 1) if name in ("log10", "abs") else (2, 8)
        if not expected[0] <= len(node.args) <= expected[1]:
            raise self.fail(f"{name} takes {'one argument' if expected[1] == 1 else 'two or more arguments'}")
        for argument in node.args:
            self.expect(argument, "number")
        return "number"


def check_fact(name: str, scope: Scope, where: str) -> Kind:
    """The kind of a fact that a rule of `scope` may use; UsageError with near names for one it may not."""
    spec = FACTS.get(name)
    if spec is None:
        visible = [fact for fact, known in FACTS.items() if scope in known.scopes]
        raise UsageError(f"{where}: no fact named {name!r}{near(name, visible)}")
    if scope not in spec.scopes:
        raise UsageError(f"{where}: the fact {name!r} is not known in scope {scope} ({', '.join(sorted(spec.scopes))})")
    return spec.kind


def evaluate(condition: Condition, facts: Mapping[str, Fact], limits: Limits) -> Outcome:
    """The value (None = unknown) of a checked condition, and the facts that decided it."""
    return _value(condition.tree, facts, limits)


def names_in(condition: Condition) -> frozenset[str]:
    """The facts a condition names."""
    root = nodes.Output([condition.tree])
    functions = {id(call.node) for call in root.find_all(nodes.Call)}
    return frozenset(n.name for n in root.find_all(nodes.Name) if n.name != "limits" and id(n) not in functions)


def _value(node: nodes.Node, facts: Mapping[str, Fact], limits: Limits) -> Outcome:
    match node:
        case nodes.Name(name=name):
            value = facts.get(name)
            unknown = value is None or (isinstance(value, float) and math.isnan(value))
            return UNKNOWN if unknown else Outcome(value, frozenset({name}))
        case nodes.Const(value=value):
            return Outcome(value)
        case nodes.Getattr(attr=attr):
            return Outcome(limits[attr])
        case nodes.And():
            return _connect(node, facts, limits, decisive=False)
        case nodes.Or():
            return _connect(node, facts, limits, decisive=True)
        case nodes.Not():
            inner = _value(node.node, facts, limits)
            return UNKNOWN if inner.value is None else Outcome(not inner.value, inner.used)
        case nodes.Compare():
            return _compare(node, facts, limits)
        case nodes.CondExpr():
            test = _value(node.test, facts, limits)
            chosen = node.expr1 if test.value else node.expr2
            if test.value is None or chosen is None:
                return UNKNOWN
            return _apply(lambda value, _: value, [_value(chosen, facts, limits), test])
        case nodes.Neg():
            return _apply(operator.neg, [_value(node.node, facts, limits)])
        case nodes.Pos():
            return _value(node.node, facts, limits)
        case nodes.Call(node=nodes.Name(name=name), args=args):
            return _apply(_FUNCTIONS[name], [_value(argument, facts, limits) for argument in args])
        case nodes.BinExpr():
            operands = [_value(node.left, facts, limits), _value(node.right, facts, limits)]
            return _apply(_ARITHMETIC[type(node)], operands)
    raise AssertionError(f"unchecked expression node {type(node).__name__}")


def _connect(node: nodes.BinExpr, facts: Mapping[str, Fact], limits: Limits, *, decisive: bool) -> Outcome:
    """Kleene's `and` (decisive = False) and `or` (decisive = True): one decisive side decides alone."""
    left, right = _value(node.left, facts, limits), _value(node.right, facts, limits)
    deciding = [side for side in (left, right) if side.value is decisive]
    if deciding:
        return Outcome(decisive, frozenset().union(*(side.used for side in deciding)))
    if left.value is None or right.value is None:
        return UNKNOWN
    return Outcome(not decisive, left.used | right.used)


def _compare(node: nodes.Compare, facts: Mapping[str, Fact], limits: Limits) -> Outcome:
    left, used = _value(node.expr, facts, limits), frozenset[str]()
    open_question = False
    for operand in node.ops:
        if isinstance(operand.expr, nodes.List | nodes.Tuple):
            right = Outcome([item.value for item in operand.expr.items if isinstance(item, nodes.Const)])
        else:
            right = _value(operand.expr, facts, limits)
        link = _apply(_COMPARISONS[operand.op], [left, right])
        if link.value is False:
            return link
        open_question |= link.value is None
        used |= link.used
        left = right
    return UNKNOWN if open_question else Outcome(True, used)


def _apply(function: Callable[..., Any], operands: list[Outcome]) -> Outcome:
    if any(operand.value is None for operand in operands):
        return UNKNOWN
    try:
        value = function(*(operand.value for operand in operands))
    except (ValueError, ZeroDivisionError, OverflowError):
        return UNKNOWN
    if isinstance(value, float) and math.isnan(value):
        return UNKNOWN
    return Outcome(value, frozenset().union(*(operand.used for operand in operands)))
