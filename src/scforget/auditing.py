"""The two stages that judge: originals and retrains, then every method's models against them."""

from __future__ import annotations

from functools import cached_property
from pathlib import Path

from scforget import artifacts, families, parallel, scoring
from scforget.audit import assess, evidence
from scforget.audit.scene import Scene
from scforget.class_scoring import ClassScorer
from scforget.context import Context, open_item
from scforget.errors import DataError
from scforget.families import Family
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
    family
        Of the models.
    """

    def __init__(self, context: Context, scorer: scoring.BaseScorer, family: Family = families.VAES) -> None:
        self._context, self._scorer, self._family = context, scorer, family
        if family is families.VAES:
            scorer.attacker = scoring.read_attacker(self._folder)

    @cached_property
    def _folder(self) -> Path:
        return self._context.workspace.results(self._family.stage("reference"), *self._context.item.keys)

    @cached_property
    def _scene(self) -> Scene:
        return scoring.read_scene(self._folder)

    @cached_property
    def _target(self) -> Record:
        return dict(artifacts.read_json(self._folder / "result.json")["retrain"])

    def make(self, method: str) -> Path:
        """Audit a method in ``work/.resume``, or find its audit there; returns the folder with :data:`FILES`."""
        workspace, item, params = self._context.workspace, self._context.item, self._context.params
        settings = self._family.audit(params)
        models = workspace.work(self._family.stage("unlearn"), *item.keys, method)
        inputs = self._context.inputs.of_method(
            method, {models.relative_to(workspace.root).as_posix(): dvc_md5(models)}
        )
        folder = workspace.resume(inputs.fingerprint)
        if not (folder / FILES[-1]).exists():
            scored = self._scorer.population(models)
            found = assess.with_references(scored, self._scene.references, settings, own=False)
            try:
                record = assess.judge(
                    method, found, self._scene,
                    target_attacks=self._target["attacks"], settings=settings, seed=params.seed,
                )  # fmt: skip
                record |= self._scorer.more(scored, self._scene, self._target)
            except DataError as error:
                raise DataError(f"audit of {method}: {error.what}", error.found, error.wanted) from error
            record["fingerprint"] = inputs.fingerprint
            artifacts.write_arrays(folder / "scores.npz", scoring.population_arrays(method, found))
            artifacts.write_table(folder / "cells.csv", evidence.cell_table(found, self._scene, settings))
            artifacts.write_json(folder / "result.json", record)
        return folder


def _scorer(family: Family, context: Context) -> scoring.BaseScorer:
    made = ClassScorer if family is families.CLASSIFIERS else scoring.Scorer
    return made(context.workspace, context.params, *context.item.keys)


def reference(dataset: str, scenario: str, family: Family = families.VAES) -> None:
    """Score originals and retrains: what there is to forget, the target, and the noise between retrains."""
    context = open_item(family.stage("reference"), dataset, scenario)
    workspace, settings = context.workspace, family.audit(context.params)
    scorer = _scorer(family, context)
    folders = workspace.work(family.stage("train"), dataset), workspace.work(family.stage("retrain"), dataset, scenario)
    groups = scorer.groups(folders[0])
    attacker = scorer.train_published(folders[0], groups)
    originals, retrains = scorer.populations(*folders, meanwhile=context.warm_up)
    shadows = [
        workspace.work(family.stage("shadows"), dataset, str(block)) / "scores.npz"
        for block in family.plan(context.params).shadow_blocks
    ]
    scene = scorer.scene(originals, retrains, groups, shadows)
    seed = context.params.seed  # not the item's: the null band of a scenario is one and the same for all methods
    target = assess.describe_target(scene, settings, seed)
    target["mlp_null"] = scorer.shuffled(folders[1])
    target["gene_list"] = evidence.gene_list(scorer.gene_list(), groups, settings)
    target |= scorer.more(scene.target, scene, None)
    original = assess.judge(
        "original", scene.originals, scene, target_attacks=target["attacks"], settings=settings, seed=seed
    )
    original |= scorer.more(scene.originals, scene, target)
    artifacts.write_json(context.results / "result.json", {"original": original, "retrain": target})
    kept = attacker.to_arrays().items() if attacker is not None else ()
    published = {f"attacker/{name}": values for name, values in kept}
    artifacts.write_arrays(context.results / "scores.npz", {**scoring.scene_arrays(scene), **published})
    context.track()


def audit(dataset: str, scenario: str, family: Family = families.VAES) -> None:
    """Attack every method's models, test them against the retrains, and give the verdicts."""
    context = open_item(family.stage("audit"), dataset, scenario)
    audits = Audits(context, _scorer(family, context), family)
    methods = family.plan(context.params).methods
    with Progress(context.item.name, len(methods)) as progress:
        made = parallel.each(audits.make, methods, progress.advance, context.warm_up)
    for method, folder in zip(methods, made, strict=True):
        for name in FILES:
            artifacts.copy(folder / name, context.results / method / name)
    context.track()
