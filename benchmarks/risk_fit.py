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
from sklearn.metrics import precision_score, recall_score, roc_auc_score
from sklearn.model_selection import StratifiedKFold

import gradlint
from gradlint import analysis
from gradlint.risk import CAPS, evidence, lost, risk

found: dict[str, float] = {}


def remember(facts):
    found.clear()
    found.update(evidence(facts.model, facts.subjects))
    return risk(facts)


def main(labels: str, folder: str, *flags: str) -> None:
    analysis.risk = remember
    rows, totals, sick = [], [], []
    for network in json.loads(Path(labels).read_text()):
        best = max(network["sgd"].values())
        if not 0.5 <= best <= 0.9:
            path = f"{folder}/{network['id']}"
            gradlint.check(f"{path}.onnx", data=f"{path}.npz", loss="cross-entropy", probe="--no-probe" not in flags)
            rows.append([min(found[name], cap) for name, cap in CAPS.items()])
            totals.append([lost(found)])
            sick.append(best < 0.5)
    x, total, y = np.array(rows), np.array(totals), np.array(sick)
    scores = np.zeros(len(y))
    for seed in range(10):
        for train, test in StratifiedKFold(5, shuffle=True, random_state=seed).split(total, y):
            scores[test] += LogisticRegression(C=0.3).fit(total[train], y[train]).decision_function(total[test])
    fit = LogisticRegression(C=0.3).fit(total, y)
    print(f"networks {len(y)}, untrainable {y.sum()}")
    print(f"cross-validated: AUROC {roc_auc_score(y, scores):.3f}, risk >= 0.5 has precision "
          f"{precision_score(y, scores > 0):.3f} and recall {recall_score(y, scores > 0):.3f}")  # fmt: skip
    print(f"steepness {fit.coef_[0][0]:.2f} half {-fit.intercept_[0] / fit.coef_[0][0]:.2f}")
    for name, column in zip(CAPS, x.T, strict=True):
        print(f"{name:14s} cap {CAPS[name]:g}  alone: AUROC {roc_auc_score(y, column):.3f}")


if __name__ == "__main__":
    main(*sys.argv[1:])
