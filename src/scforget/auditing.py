"""The audit of one scenario: every method's models attacked, tested and judged; what is done is kept."""

from __future__ import annotations

from functools import cached_property
from pathlib import Path

from scforget import artifacts, scoring
from scforget.audit import assess
from scforget.audit.assess import Groups, Population
from scforget.context import Context
from scforget.pipeline import dvc_md5
from scforget.results import Record

#: What the audit of a method leaves; the record is written last, so that where it is the rest is too.
FILES = ("scores.npz", "result.json")


class Audits:
    """Judges one method after the other; picklable, so that worker processes can share the methods.

    Parameters
    ----------
    context
        The stage item: a data set and a scenario.
    scorer
        Of that scenario.
    """

    def __init__(self, context: Context, scorer: scoring.Scorer) -> None:
        self._context = context
        self._scorer = scorer

    @cached_property
    def _folder(self) -> Path:
        return self._context.workspace.results("reference", *self._context.item.keys)

    @cached_property
    def _references(self) -> tuple[Population, Population, Groups]:
        return self._scorer.references(self._folder)

    @cached_property
    def _target_attacks(self) -> Record:
        return dict(artifacts.read_json(self._folder / "result.json")["retrain"]["attacks"])

    def make(self, method: str) -> Path:
        """Audit a method in ``work/.resume``, or find its audit there; returns the folder with :data:`FILES`."""
        workspace, item = self._context.workspace, self._context.item
        models = workspace.work("unlearn", *item.keys, method)
        inputs = self._context.inputs.of_method(
            method, {models.relative_to(workspace.root).as_posix(): dvc_md5(models)}
        )
        folder = workspace.resume(inputs.fingerprint)
        if not (folder / "result.json").exists():
            found = self._scorer.population(models)
            originals, retrains, groups = self._references
            record = assess.judge(
                method, found, originals=originals, target=retrains, target_attacks=self._target_attacks,
                groups=groups, settings=self._context.params.audit, seed=self._context.params.seed,
            )  # fmt: skip
            record["fingerprint"] = inputs.fingerprint
            scores = {f"{method}/{name}": values for name, values in found.scores.items()}
            artifacts.write_arrays(folder / "scores.npz", {**scores, f"{method}/latent": found.latent})
            artifacts.write_json(folder / "result.json", record)
        return folder
