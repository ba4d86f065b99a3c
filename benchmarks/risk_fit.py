"""Fit the constants of gradlint/risk.py on networks labelled by training them, and cross-validate.

    python benchmarks/risk_fit.py LABELS.json DIR [--no-probe]

LABELS.json: a list of {id, sgd: {rate: final training accuracy}}; DIR/<id>.onnx and DIR/<id>.npz the networks at
initialisation with a batch of data. Untrainable: best accuracy under 0.5; trainable: over 0.9. Needs scikit-learn.
"""

import json
import sys
from pathlib import Path

import numpy as np
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import roc_auc_score
from sklearn.model_selection import StratifiedKFold

import gradlint
from gradlint import analysis
from gradlint.risk import TERMS, evidence, risk

found: dict[str, float] = {}


def remember(facts):
    found.clear()
    found.update(evidence(facts.model, facts.subjects))
    return risk(facts)


def main(labels: str, folder: str, *flags: str) -> None:
    analysis.risk = remember
    rows, sick = [], []
    for network in json.loads(Path(labels).read_text()):
        best = max(network["sgd"].values())
        if not 0.5 <= best <= 0.9:
            path = f"{folder}/{network['id']}"
            gradlint.check(f"{path}.onnx", data=f"{path}.npz", loss="cross-entropy", probe="--no-probe" not in flags)
            rows.append([min(found.get(t.name, t.unknown), t.cap) for t in TERMS])
            sick.append(best < 0.5)
    x, y = np.array(rows), np.array(sick)
    scores = np.zeros(len(y))
    for seed in range(10):
        for train, test in StratifiedKFold(5, shuffle=True, random_state=seed).split(x, y):
            scores[test] += LogisticRegression(C=0.3).fit(x[train], y[train]).decision_function(x[test])
    fit = LogisticRegression(C=0.3).fit(x, y)
    print(f"networks {len(y)}, untrainable {y.sum()}, cross-validated AUROC {roc_auc_score(y, scores):.3f}")
    print("intercept", round(fit.intercept_[0], 2))
    for term, weight, column in zip(TERMS, fit.coef_[0], x.T, strict=True):
        print(f"{term.name:14s} weight {weight:.2f} cap {term.cap:g}  alone: AUROC {roc_auc_score(y, column):.3f}")


if __name__ == "__main__":
    main(*sys.argv[1:])
