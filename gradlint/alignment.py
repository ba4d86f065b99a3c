"""How much of the likeness between examples survives on the way through the network.

Centred kernel alignment (Kornblith et al. 2019) between the inputs and the last features, by the unbiased estimator of
the Hilbert-Schmidt independence criterion (Song et al. 2012). Near 0 where all examples look alike (ordered phase) and
where similar examples look unrelated (chaotic phase, shattered functions: Balduzzi et al. 2017): a network that has
lost the geometry of its inputs learns by heart at best.
"""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np

Matrix = np.ndarray


def gram_of_inputs(arrays: Iterable[np.ndarray], examples: int) -> Matrix:
    """Inner products of examples over all inputs that vary: floats as they are, ids as equal or not. Shape (B, B)."""
    total = np.zeros((examples, examples))
    for array in arrays:
        axis = next((a for a in (0, 1) if a < array.ndim and array.shape[a] == examples), None)
        if axis is None:
            continue
        rows = np.moveaxis(array, axis, 0).reshape(examples, -1)
        if rows.dtype.kind == "f":
            flat = rows.astype(np.float64)
            scale = float(np.mean(flat**2)) * flat.shape[1]
            total += flat @ flat.T / (scale or 1.0)
        else:
            total += np.stack([(rows == row).mean(axis=1) for row in rows])
    return total


def alignment(k: Matrix, m: Matrix) -> float | None:
    """CKA of two Gram matrices in [0, 1]; None for fewer than 5 examples or where one of them is constant."""
    if len(k) < 5 or not (np.isfinite(k).all() and np.isfinite(m).all()):
        return None
    own = _independence(k, k) * _independence(m, m)
    if own <= 0:
        return 0.0 if _independence(k, k) > 0 else None
    return float(np.clip(_independence(k, m) / np.sqrt(own), 0.0, 1.0))


def _independence(k: Matrix, m: Matrix) -> float:
    """Unbiased estimate of the Hilbert-Schmidt independence criterion, up to 1 / (n (n - 3))."""
    n = len(k)
    k, m = k - np.diag(np.diag(k)), m - np.diag(np.diag(m))
    trace = float(np.sum(k * m.T))
    return trace + float(k.sum() * m.sum()) / ((n - 1) * (n - 2)) - 2 / (n - 2) * float(k.sum(axis=0) @ m.sum(axis=1))
