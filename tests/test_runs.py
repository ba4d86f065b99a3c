"""Runs of equal neighbours stand for the full array: every operation gives what it gives there."""

import itertools

import numpy as np
import pytest

from gradlint.runs import Runs, averages, encoded, grouped, positional, run, settled, side_by_side, stored


def drawn(seed, *sizes):
    """An array with one entry per element along axes given by a number, per run along those given by its counts."""
    values = np.random.default_rng(seed).standard_normal([n if isinstance(n, int) else len(n) for n in sizes])
    return encoded(values, tuple(None if isinstance(n, int) else n for n in sizes))


OPERANDS = {
    "one run each": drawn(0, 1, (1, 5), 4),
    "other runs": drawn(1, 1, (2, 4), 4),
    "alike": drawn(2, 1, 1, 4),
    "plain": drawn(3, 1, 6, 4),
    "a single run": drawn(4, 1, (6,), 4),
    "several examples": drawn(5, 3, (1, 5), 4),
}
BINARY = {
    "add": np.add,
    "where": lambda a, b: np.where(a > b, a, b),
    "clip": lambda a, b: np.clip(a, 0, abs(b)),
    "over features": lambda a, b: a @ np.swapaxes(b, -1, -2),
    "over positions": lambda a, b: np.swapaxes(a * np.ones((6, 1)), -1, -2) @ (b * np.ones((6, 1))),
    "broadcast": lambda a, b: np.broadcast_arrays(a, b)[1],
    "stack": lambda a, b: np.stack(np.broadcast_arrays(a, b)),
}
UNARY = {
    "sum": lambda a: a.sum(),
    "mean of one axis": lambda a: a.mean(axis=1),
    "mean of two": lambda a: np.mean(a, axis=(1, 2), keepdims=True),
    "variance": lambda a: a.var(axis=1),
    "largest": lambda a: a.max(axis=-2),
    "from the second on": lambda a: a[:, 1:],
    "one position": lambda a: a[:, 2],
    "features": lambda a: a[..., :2],
    "a new axis": lambda a: a[:, 2:4, None, 1:],
    "heads": lambda a: a.reshape(a.shape[0], 6, 2, 2),
    "rows": lambda a: a.reshape(-1, 4),
    "flat": lambda a: a.reshape(-1),
    "cut in two": lambda a: a.reshape(a.shape[0], 2, 3, 4),
    "transpose": lambda a: a.transpose((2, 1, 0)),
    "grown": lambda a: np.broadcast_to(a, (2, 3, 6, 4)),
    "what has no rule of its own": lambda a: np.concatenate([a, np.cumsum(a, axis=1)], 1),
}


@pytest.mark.parametrize("name", BINARY)
def test_two_arrays(name):
    for a, b in itertools.product(OPERANDS.values(), repeat=2):
        got, full = BINARY[name](a, b), BINARY[name](np.asarray(a), np.asarray(b))
        assert got.shape == full.shape
        np.testing.assert_allclose(np.asarray(got), full, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("name", UNARY)
@pytest.mark.parametrize("operand", ["one run each", "a single run", "several examples"])
def test_one_array(name, operand):
    a = OPERANDS[operand]
    got, full = np.asarray(UNARY[name](a)), UNARY[name](np.asarray(a))
    assert got.shape == full.shape
    np.testing.assert_allclose(got, full, rtol=1e-12, atol=1e-14)


def test_work_is_done_on_entries():
    token = drawn(0, 1, (1, 196), 768)
    logits = token @ np.swapaxes(token, -1, -2)
    assert isinstance(logits, Runs)
    assert logits.shape == (1, 197, 197)
    assert stored(logits) == 4
    assert stored(np.tanh(token) * 2 + 1, token) == 2 * 768
    assert isinstance(token.mean(axis=1), np.ndarray)


def test_joined_parts_are_runs_of_their_sizes():
    a, b, c = drawn(1, 1, 1, 4), drawn(2, 1, 3, 4), drawn(3, 1, (1, 5), 4)
    joined = side_by_side([a, b, c], [2, 3, 6], 1)
    assert joined.counts[1] == (2, 1, 1, 1, 1, 5)
    full = np.concatenate([np.repeat(a, 2, axis=1), b, np.asarray(c)], axis=1)
    np.testing.assert_array_equal(np.asarray(joined), full)
    assert side_by_side([a, a], [1, 196], 1) is a
    assert side_by_side([a, c], [0, 6], 1).counts[1] == (1, 5)


def test_averages_over_runs():
    table = np.arange(12.0).reshape(1, 6, 2)
    found = averages(table, (None, (1, 5), None))
    np.testing.assert_allclose(found.values, [[[0, 1], [6, 7]]])
    np.testing.assert_allclose(found.mean(axis=1), table.mean(axis=1))


def test_positions_are_alike_or_in_groups():
    token, plain = drawn(0, 1, (1, 5), 4), drawn(1, 1, 6, 4)
    assert grouped(token) == (1,)
    assert positional(1, token, drawn(2, 1, 1, 4))
    assert positional(-2, token)
    assert not positional(1, plain)
    assert settled(token[:, 1:], 1).shape == (1, 1, 4)
    assert run(drawn(3, 1, 1, 4), 1, 6).shape == (1, 6, 4)
