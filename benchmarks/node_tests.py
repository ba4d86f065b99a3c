"""Gradients of ONNX's own node tests (one node, float input and output) against finite differences in float64.

python benchmarks/node_tests.py [OPERATOR]

right: every float input has a gradient, and it agrees. wrong: one does not, or it does not run. refused: one depends on
an input that gets none. Left out of the share: `none`, cases without a derivative (rounding, comparisons: differences
are zero and no gradient is given), `random` operators, and `reference`, those where ONNX's reference evaluator can't
compute the case beside its values, or disagrees with onnxruntime on its result.
"""

import collections
import sys
import warnings
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))

from node_cases import cases, judge

warnings.filterwarnings("ignore")
KINDS = ("right", "wrong", "refused", "none", "random", "reference")


def main(only: str | None) -> None:
    counts: dict[str, collections.Counter[str]] = collections.defaultdict(collections.Counter)
    lines = []
    for case in cases(only):
        verdict = judge(case)
        counts[case.op][verdict.kind] += 1
        if verdict.kind in ("wrong", "refused", "reference"):
            lines.append(f"{verdict.kind:9} {case.name}: {verdict.detail}")
    print("\n".join(sorted(lines)))
    print(f"\n{'operator':34}" + "".join(f"{k:>10}" for k in KINDS))
    for op, found in sorted(counts.items()):
        if only or any(found[k] for k in ("wrong", "refused", "reference")):
            print(f"{op:34}" + "".join(f"{found[k]:10}" for k in KINDS))
    total = sum(counts.values(), collections.Counter())
    print(f"{'all':34}" + "".join(f"{total[k]:10}" for k in KINDS))
    judged = total["right"] + total["wrong"] + total["refused"]
    print(f"\nright: {total['right']} of {judged} = {total['right'] / max(1, judged):.3f}; wrong: {total['wrong']}")


if __name__ == "__main__":
    main(sys.argv[1] if len(sys.argv) > 1 else None)
