"""From classifiers on disk to what the audit needs of them: scores of items, accuracies, outputs."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from scforget import artifacts, families
from scforget.arrays import BoolArray, FloatArray, IntArray
from scforget.artifacts import Workspace
from scforget.attacks import confidence
from scforget.attacks.references import References
from scforget.audit.classification import ClassOutputs, ClassPopulation, ClassScene, class_record
from scforget.audit.scene import Groups, Population, Scene
from scforget.class_tasks import ClassSignals
from scforget.schema import Params
from scforget.scoring import BaseScorer, Scored, stacked


@dataclass(frozen=True)
class _ClassScored(Scored):
    """What is known of one classifier, with its ``logits [m, C]`` on scored, retained and test items."""

    logits: npt.NDArray[np.float32]


class ClassScorer(BaseScorer):
    """Scores classifiers; see :class:`~scforget.scoring.BaseScorer`.

    Its populations know besides what the classifiers say of all items: the scored ones, the retained ones, the test
    items, in that order.
    """

    def __init__(self, workspace: Workspace, params: Params, dataset: str, scenario: str) -> None:
        super().__init__(families.CLASSIFIERS, workspace, params, dataset, scenario)
        items = artifacts.read_arrays(workspace.work(families.ITEMS, dataset) / "items.npz")
        self._task = families.CLASSIFIERS.task(workspace, params, dataset)
        self._retain, self._test = self._scenario.sets.retain, items["test"].astype(np.int64)
        self.labels = items["classes"].astype(np.str_)[items["labels"][self.cells]]
        self.names = items["names"][self.cells].astype(np.str_)
        self.donors = items["donors"][self.cells].astype(np.str_)

    @property
    def _all_items(self) -> IntArray:
        return np.concatenate([self.cells, self._retain, self._test])

    def _marked(self, scored: BoolArray) -> BoolArray:
        """Mark some scored items among all."""
        return np.pad(scored, (0, len(self._retain) + len(self._test)))

    def _signals(self, path: Path) -> ClassSignals:
        found: ClassSignals = self._task.signals(families.CLASSIFIERS.model(self._task, path), self.cells)
        return found

    def _features(self, signals: ClassSignals) -> FloatArray:
        return confidence.attack_features(signals)

    def _score(self, path: Path) -> _ClassScored:
        model = families.CLASSIFIERS.model(self._task, path)
        signals, known, tested = (self._task.signals(model, cells) for cells in (self.cells, self._retain, self._test))
        scores, attackers = self._attack(signals, known)
        logits = np.concatenate([signals.logits, known.logits, tested.logits])
        return _ClassScored(
            int(path.stem), scores, attackers, self._utility(logits), signals.latent, logits.astype(np.float32)
        )

    def _utility(self, logits: FloatArray) -> dict[str, dict[str, float]]:
        """Accuracy on unseen and test items outside the forgotten kind, and inside it."""
        items = self._all_items
        judged = self._marked(self.unseen)
        judged[len(judged) - len(self._test) :] = True
        right, group = logits.argmax(axis=1) == self._task.labels[items], self._scenario.group[items]
        if group[judged].all():  # scattered: no kind is forgotten, every judged item counts as outside
            group = np.zeros_like(group)
        places = {"outside": judged & ~group, "inside": judged & group}
        return {name: {"accuracy": float(right[mask].mean())} for name, mask in places.items() if mask.any()}

    def _stack(self, models: list[_ClassScored]) -> ClassPopulation:
        sizes = [len(self.cells), len(self._retain), len(self._test)]
        _, retain, test = (np.repeat(which, sizes) for which in np.eye(3, dtype=bool))
        outputs = ClassOutputs(
            np.stack([model.logits for model in models]), self._task.labels[self._all_items],
            self._marked(self.forget), retain, test, self._marked(self._same_group),
        )  # fmt: skip
        return ClassPopulation(**stacked(models), outputs=outputs)

    def scene(self, originals: Population, retrains: Population, groups: Groups, shadows: list[Path]) -> ClassScene:
        """What every population of the scenario is judged against; with it, shadow models on the training items."""
        base: Scene = super().scene(originals, retrains, groups, shadows)
        assert isinstance(retrains, ClassPopulation)
        outputs = retrains.outputs
        trained = np.concatenate([self.cells[self.forget], self._retain])
        sure = [outputs.confidence(mask) for mask in (outputs.forget, outputs.retain)]
        known = References(
            np.concatenate(sure, axis=1), *self._shadows(shadows, trained), np.zeros(len(trained), dtype=bool)
        )
        return ClassScene(**vars(base), trained=known)

    def more(self, own: Population, scene: Scene, target: Mapping[str, Any] | None) -> dict[str, Any]:
        """Tables of the classifier papers, under ``classification``."""
        assert isinstance(own, ClassPopulation)
        assert isinstance(scene, ClassScene)
        known = None if target is None else target["classification"]
        return {"classification": class_record(own, scene, known, self._settings, self._seed)}
