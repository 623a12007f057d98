"""The two stages that judge: originals and retrains, then every method's models against them."""

from __future__ import annotations

from functools import cached_property
from pathlib import Path

from scforget import artifacts, parallel, scoring
from scforget.audit import assess, evidence
from scforget.audit.scene import Scene
from scforget.context import Context, open_item
from scforget.errors import DataError
from scforget.pipeline import dvc_md5
from scforget.progress import Progress
from scforget.results import Record

#: What the audit of a method leaves; the record is written last, so that where it is the rest is too.
FILES = ("scores.npz", "cells.csv", "result.json")


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
        scorer.attacker = scoring.read_attacker(self._folder)

    @cached_property
    def _folder(self) -> Path:
        return self._context.workspace.results("reference", *self._context.item.keys)

    @cached_property
    def _scene(self) -> Scene:
        return scoring.read_scene(self._folder)

    @cached_property
    def _target_attacks(self) -> Record:
        return dict(artifacts.read_json(self._folder / "result.json")["retrain"]["attacks"])

    def make(self, method: str) -> Path:
        """Audit a method in ``work/.resume``, or find its audit there; returns the folder with :data:`FILES`."""
        workspace, item, params = self._context.workspace, self._context.item, self._context.params
        models = workspace.work("unlearn", *item.keys, method)
        inputs = self._context.inputs.of_method(
            method, {models.relative_to(workspace.root).as_posix(): dvc_md5(models)}
        )
        folder = workspace.resume(inputs.fingerprint)
        if not (folder / FILES[-1]).exists():
            scored = self._scorer.population(models)
            found = assess.with_references(scored, self._scene.references, params.audit, own=False)
            try:
                record = assess.judge(
                    method, found, self._scene,
                    target_attacks=self._target_attacks, settings=params.audit, seed=params.seed,
                )  # fmt: skip
            except DataError as error:
                raise DataError(f"audit of {method}: {error.what}", error.found, error.wanted) from error
            record["fingerprint"] = inputs.fingerprint
            artifacts.write_arrays(folder / "scores.npz", scoring.population_arrays(method, found))
            artifacts.write_table(folder / "cells.csv", evidence.cell_table(found, self._scene, params.audit))
            artifacts.write_json(folder / "result.json", record)
        return folder


def reference(dataset: str, scenario: str) -> None:
    """Score originals and retrains: what there is to forget, the target, and the noise between retrains."""
    context = open_item("reference", dataset, scenario)
    workspace, settings = context.workspace, context.params.audit
    scorer = scoring.Scorer(workspace, context.params, dataset, scenario)
    folders = workspace.work("train", dataset), workspace.work("retrain", dataset, scenario)
    groups = scorer.groups(folders[0])
    attacker = scorer.train_published(folders[0], groups)
    originals, retrains = scorer.populations(*folders, meanwhile=context.warm_up)
    blocks = context.params.pipeline.shadow_blocks
    shadows = [workspace.work("shadows", dataset, str(block)) / "scores.npz" for block in blocks]
    references = scorer.references(retrains.scores["elbo"], shadows)
    scene = Scene(
        assess.with_references(originals, references, settings, own=False),
        assess.with_references(retrains, references, settings, own=True),
        groups, references, scorer.labels, scorer.names, scorer.donors,
    )  # fmt: skip
    seed = context.params.seed  # not the item's: the null band of a scenario is one and the same for all methods
    target = assess.describe_target(scene, settings, seed)
    target["mlp_null"] = scorer.shuffled(folders[1])
    target["gene_list"] = evidence.gene_list(scorer.gene_list(), groups, settings)
    original = assess.judge(
        "original", scene.originals, scene, target_attacks=target["attacks"], settings=settings, seed=seed
    )
    artifacts.write_json(context.results / "result.json", {"original": original, "retrain": target})
    published = {f"attacker/{name}": values for name, values in attacker.to_arrays().items()}
    artifacts.write_arrays(context.results / "scores.npz", {**scoring.scene_arrays(scene), **published})
    context.track()


def audit(dataset: str, scenario: str) -> None:
    """Attack every method's models, test them against the retrains, and give the verdicts."""
    context = open_item("audit", dataset, scenario)
    audits = Audits(context, scoring.Scorer(context.workspace, context.params, dataset, scenario))
    methods = context.params.pipeline.methods
    with Progress(context.item.name, len(methods)) as progress:
        made = parallel.each(audits.make, methods, progress.advance, context.warm_up)
    for method, folder in zip(methods, made, strict=True):
        for name in FILES:
            artifacts.copy(folder / name, context.results / method / name)
    context.track()
