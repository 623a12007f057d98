"""P3's LiRA rate, of forgotten images and of images that no model ever saw, at the same threshold.

``python -m bench.lira_unseen FOLDER DATASET SCENARIO METHOD…``, FOLDER: a project after ``dvc repro audit_classifier``.
The threshold is that at which 1 % of the retained items are called non-members. Unseen items are non-members under
every model, so their rate says what a model that has forgotten would show; mean over models ± twice its standard error.
"""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np

from scforget import artifacts, engine, families, schema
from scforget.arrays import FloatArray, IntArray
from scforget.artifacts import Workspace

FNR = 0.01


class Gaussians:
    """Of each item's confidence under shadow models that trained on it and that did not; one variance of each kind."""

    def __init__(self, blocks: list[Path]) -> None:
        read = [artifacts.read_arrays(block / "scores.npz") for block in blocks]
        scores, members = (np.concatenate([block[name] for block in read]) for name in ("confidence", "members"))
        dealt = members.any(axis=0)  # items set aside are nobody's members
        self.place = {cell: i for i, cell in enumerate(read[0]["cells"][dealt].tolist())}
        self.ends = [self._moments(scores[:, dealt], chosen[:, dealt]) for chosen in (members, ~members)]

    @staticmethod
    def _moments(scores: FloatArray, chosen: FloatArray) -> tuple[FloatArray, float]:
        count = chosen.sum(axis=0)
        mean = (scores * chosen).sum(axis=0) / count
        return mean, float((((scores - mean) ** 2 * chosen).sum(axis=0) / (count - 1)).mean())

    def ratios(self, scores: FloatArray, items: IntArray) -> FloatArray:
        """Log-likelihood ratio of each item, higher = more member-like."""
        at = [self.place[item] for item in items.tolist()]
        inside, outside = (-0.5 * (np.log(v) + (scores - mean[at]) ** 2 / v) for mean, v in self.ends)
        return np.asarray(inside - outside)


def main(root: str, dataset: str, scenario: str, *methods: str) -> None:
    """Print a row for the originals, the retrained models and each method."""
    workspace, family, params = Workspace(Path(root)), families.CLASSIFIERS, schema.load(Path(root) / "params.yaml")
    engine.start(params.compute, multiplications=0)
    task, sets = family.task(workspace, params, dataset), family.sets(workspace, dataset)
    request = family.scenario(workspace, dataset, scenario).sets
    plan = family.plan(params)
    gaussians = Gaussians([workspace.work(family.stage("shadows"), dataset, str(b)) for b in plan.shadow_blocks])
    folders = {
        "original": family.train_folder(workspace, dataset),
        "retrain": workspace.work(family.stage("retrain"), dataset, scenario),
        **{name: workspace.work(family.stage("unlearn"), dataset, scenario, name) for name in methods},
    }
    print("| method | forgotten | unseen |\n| --- | --- | --- |")
    for name, folder in folders.items():
        rows = []
        for path in sorted(folder.glob("*.safetensors")):
            model = family.model(task, path)
            forget, retain, unseen = (
                gaussians.ratios(task.signals(model, items).score, items)
                for items in (request.forget, request.retain, sets.unseen)
            )
            threshold = np.sort(retain)[int(FNR * len(retain))]
            rows.append([(forget < threshold).mean(), (unseen < threshold).mean()])
        mean, error = np.mean(rows, axis=0), np.std(rows, axis=0, ddof=1) / len(rows) ** 0.5
        shown = " | ".join(f"{100 * m:.1f} ± {200 * e:.1f} %" for m, e in zip(mean, error, strict=True))
        print(f"| `{name}` | {shown} |", flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
