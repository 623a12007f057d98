"""The classifiers' stages, on a tiny project: cells by an MLP, pictures of people by a CNN."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from classifying import METHODS, class_project, run_all
from scforget import artifacts, auditing, closing, families, populations, replay, stages
from scforget.artifacts import Workspace
from scforget.errors import ConfigError, DataError, NonFiniteError, ScforgetError, TooManyDivergedError
from scforget.families import CLASSIFIERS, VAES
from scforget.pipeline import Item, Pipeline
from spoiling import both, put, stages_in

DATASETS = ("tiny", "people")
MODELS = 8  # of a block of shadow models


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Everything made."""
    root = tmp_path_factory.mktemp("classifiers")
    class_project(root)
    with stages_in(root):
        for dataset in DATASETS:
            run_all(dataset)
    return root


@pytest.fixture
def project(finished: Path, tmp_path: Path) -> Path:
    """A copy of it to spoil."""
    root = tmp_path / "project"
    shutil.copytree(finished, root, symlinks=True)
    return root


def test_of_a_stage_s_name_tells_whose_it_is():
    assert families.of("train") is VAES
    assert families.of("train_classifier") is CLASSIFIERS
    assert [family.stage("audit") for family in (VAES, CLASSIFIERS)] == ["audit", "audit_classifier"]


@pytest.mark.parametrize("dataset", DATASETS)
def test_sets_are_disjoint_and_the_request_is_of_training_items(finished: Path, dataset: str):
    folder = Workspace(finished).work("prepare_classifier", dataset)
    items = artifacts.read_arrays(folder / "items.npz")
    sets = artifacts.read_arrays(folder / "sets.npz")
    request = artifacts.read_arrays(folder / "some.npz")
    dealt = np.concatenate([*sets.values(), items["test"]])
    assert len(np.unique(dealt)) == len(dealt) == len(items["labels"])
    assert not len(sets["stop"])
    assert np.array_equal(np.sort(np.concatenate([request["forget"], request["retain"]])), sets["train"])
    assert np.isin(request["controls"], sets["unseen"]).all()


def test_a_person_is_forgotten_whole_and_is_in_one_set(finished: Path):
    folder = Workspace(finished).work("prepare_classifier", "people")
    donors = artifacts.read_arrays(folder / "items.npz")["donors"]
    sets = artifacts.read_arrays(folder / "sets.npz")
    request = artifacts.read_arrays(folder / "some.npz")
    whose = [set(donors[members]) for members in sets.values() if len(members)]
    assert sum(map(len, whose)) == len(set().union(*whose))
    assert not set(donors[request["forget"]]) & set(donors[request["retain"]])


def test_a_shadow_model_has_seen_all_of_a_person_or_nothing(finished: Path):
    workspace = Workspace(finished)
    donors = artifacts.read_arrays(workspace.work("prepare_classifier", "people") / "items.npz")["donors"]
    shadow = artifacts.read_arrays(workspace.work("shadows_classifier", "people", "0") / "scores.npz")
    aside = artifacts.read_arrays(workspace.work("prepare_classifier", "people") / "sets.npz")["aside"]
    dealt = ~np.isin(shadow["cells"], aside)
    whose, members = donors[shadow["cells"][dealt]], shadow["members"][:, dealt]
    assert len(set(whose)) > 2
    for person in set(whose):
        assert set(members[:, whose == person].sum(axis=0)) == {MODELS // 2}
        assert (np.ptp(members[:, whose == person].astype(int), axis=1) == 0).all()


@pytest.mark.parametrize("dataset", DATASETS)
def test_every_population_has_its_models(finished: Path, dataset: str):
    workspace = Workspace(finished)
    populations_of = {
        ("train_classifier", dataset): 2, ("retrain_classifier", dataset, "some"): 4,
        ("shadows_classifier", dataset, "0"): MODELS,
        **{("unlearn_classifier", dataset, "some", method): 2 for method in METHODS},
    }  # fmt: skip
    for (stage, *keys), number in populations_of.items():
        assert len(list(workspace.work(stage, *keys).glob("*.safetensors"))) == number
        assert len(artifacts.read_json(workspace.results(stage, *keys) / "result.json")["seeds"]) == number


@pytest.mark.parametrize("dataset", DATASETS)
def test_audit_leaves_a_verdict_and_the_papers_numbers_of_every_method(finished: Path, dataset: str):
    workspace = Workspace(finished)
    for method in METHODS:
        record = artifacts.read_json(workspace.results("audit_classifier", dataset, "some", method) / "result.json")
        assert record["score"] == "confidence"
        assert record["verdict"] in {"FORGOTTEN", "NOT_FORGOTTEN", "OVER_FORGOTTEN", "UNDETERMINED"}
        assert record["utility"]["verdict"] in {"kept", "lost", "undetermined"}
        assert set(record["primary"]) == {"membership", "trace"}
        assert {"accuracy", "lira", "distance", "kaggle"} <= set(record["classification"])
    reference = artifacts.read_json(workspace.results("reference_classifier", dataset, "some") / "result.json")
    assert reference["retrain"]["verdict"] == "TARGET"
    assert "classification" in reference["original"]


def test_accuracies_are_those_of_the_models_counted_by_hand(finished: Path):
    workspace = Workspace(finished)
    with stages_in(finished):
        from scforget import schema

        params = schema.load(finished / "params.yaml")
        task = CLASSIFIERS.task(workspace, params, "people")
        sets = CLASSIFIERS.scenario(workspace, "people", "some").sets
        folder = CLASSIFIERS.train_folder(workspace, "people")
        record = artifacts.read_json(workspace.results("reference_classifier", "people", "some") / "result.json")
        for place, members in (("retain", sets.retain), ("forget", sets.forget)):
            counted = []
            for path in sorted(folder.glob("*.safetensors")):
                model = CLASSIFIERS.model(task, path)
                right = [
                    int(model(task.batch(np.array([item])).inputs).argmax()) == task.labels[item] for item in members
                ]
                counted.append(np.mean(right))
            found = record["original"]["classification"]["accuracy"][place]["per_seed"]
            assert np.allclose(found, counted)


def models(root: Path, *keys: str) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(Workspace(root).work(*keys).glob("*.safetensors"))}


def test_shadows_that_are_made_together_are_resumed_bit_for_bit(project: Path, monkeypatch: pytest.MonkeyPatch):
    before = models(project, "shadows_classifier", "tiny", "0")
    shutil.rmtree(project / "work" / ".resume")
    calls = []
    finish = populations.Population._finish

    def stop_after_three(self: Any, *arguments: Any) -> None:
        if len(calls) == 3:
            raise KeyboardInterrupt
        calls.append(arguments)
        finish(self, *arguments)

    with stages_in(project):
        with monkeypatch.context() as patch:
            patch.setattr(populations.Population, "_finish", stop_after_three)
            with pytest.raises(KeyboardInterrupt):
                stages.shadows("tiny", "0", CLASSIFIERS)
        stages.shadows("tiny", "0", CLASSIFIERS)
    assert models(project, "shadows_classifier", "tiny", "0") == before


def test_where_one_of_several_models_diverges_each_is_made_alone(project: Path, monkeypatch: pytest.MonkeyPatch):
    def diverges(*_: Any, **__: Any) -> None:
        raise NonFiniteError(3, "the loss")

    shutil.rmtree(project / "work" / ".resume")
    monkeypatch.setattr(families, "fit_together", diverges)
    with stages_in(project):
        stages.shadows("tiny", "0", CLASSIFIERS)
        alone = models(project, "shadows_classifier", "tiny", "0")
        put("classifiers", "tiny", "together", value=1)(project)
        stages.shadows("tiny", "0", CLASSIFIERS)
    assert models(project, "shadows_classifier", "tiny", "0") == alone
    assert len(alone) == MODELS


def test_a_stage_that_runs_again_gives_the_same_bytes(project: Path):
    def left() -> dict[str, bytes]:
        places = [project / "results" / f"{stage}_classifier" / "tiny" for stage in ("unlearn", "reference", "audit")]
        files = [path for place in places for path in place.rglob("*") if path.is_file() and path.name != "cost.json"]
        return {path.as_posix(): path.read_bytes() for path in sorted(files)}

    before = left()
    shutil.rmtree(project / "work" / ".resume")
    with stages_in(project):
        stages.unlearn("tiny", "some", None, CLASSIFIERS)
        auditing.reference("tiny", "some", CLASSIFIERS)
        auditing.audit("tiny", "some", CLASSIFIERS)
    assert left() == before


def test_replay_has_a_run_for_every_population_and_every_judgement(finished: Path):
    workspace, pipeline = Workspace(finished), Pipeline(finished)
    names = []
    for stage in ("train", "retrain", "shadows", "unlearn", "reference", "audit"):
        for item in pipeline.items(f"{stage}_classifier"):
            runs = replay.runs(workspace, pipeline.inputs(item))
            assert runs, item
            assert all(run.tags["dvc.stage"] == item.name for run in runs)
            names += [run.name for run in runs]
    assert "comparison tiny_classifier some" in names
    assert names.count("ungan some audit of classifier") == len(DATASETS)


def test_replay_gives_the_numbers_of_the_papers_as_metrics(finished: Path):
    pipeline = Pipeline(finished)
    inputs = pipeline.inputs(Item("audit_classifier", ("people", "some")))
    run = next(run for run in replay.runs(Workspace(finished), inputs) if run.name.startswith("ungan some audit"))
    assert {"audit/confidence/auc", "utility/accuracy"} <= set(run.metrics)
    assert any(key.startswith("classification/accuracy") for key in run.metrics)
    assert run.params["method"] == "ungan"
    assert "surrogate" not in run.params
    assert run.params["critic.surrogate"] == "cramer"


def test_explain_says_in_words_what_was_found(finished: Path, capsys: pytest.CaptureFixture[str]):
    with stages_in(finished):
        closing.explain("people", "some", CLASSIFIERS)
    assert "people / some" in capsys.readouterr().out


def of_people(*keys: str, value: Any) -> Callable[[Path], None]:
    return put("classifiers", "people", *keys, value=value)


BAD: list[tuple[Callable[[Path], None], type[ScforgetError], str]] = [
    (put("pipeline", "classifiers", "datasets", value=["other"]), ConfigError, "no section under classifiers"),
    (put("pipeline", "classifiers", "scenarios", value=["none"]), ConfigError, "lacks 'none'"),
    (put("pipeline", "classifiers", "methods", value=["dp_sgd"]), ConfigError, "unknown method 'dp_sgd'"),
    (of_people("items", value={"kind": "cells"}), ConfigError, "it is missing"),
    (of_people("items", value={"kind": "sounds"}), ConfigError, "items.kind"),
    (of_people("model", value={"kind": "resnet18", "stem": "imagenet"}), DataError, "32 pixels"),
    (of_people("split", "limit", value=10_000), DataError, "10000"),
    (of_people("split", "preset", value="p3"), ConfigError, "preset"),
    (of_people("training", "optimiser", value={"kind": "adam", "learning_rate": 1e-3}), ConfigError, "weight_decay"),
    (of_people("scenarios", "some", value={"kind": "cluster", "cluster": "cat"}), DataError, "cat"),
    (of_people("scenarios", "some", value={"kind": "donor", "donor": "nobody"}), DataError, "nobody"),
    (lambda root: (root / "data/people/images.npz").unlink(), DataError, "data/people"),
    (lambda root: (root / "data/people/images.npz").write_bytes(b"PK\x03\x04"), DataError, "images.npz"),
    (put("audit_classifier", "min_controls", value=1000), DataError, "1000"),
    (
        both(of_people("model", value={"kind": "mlp", "hidden": [8], "dropout": 0.5}), of_people("together", value=4)),
        ConfigError, "dropout",
    ),
]  # fmt: skip


@pytest.mark.parametrize(("spoil", "kind", "said"), BAD)
def test_bad_input_ends_in_one_clear_line(
    project: Path, spoil: Callable[[Path], None], kind: type[ScforgetError], said: str
) -> None:
    def make() -> None:
        stages.prepare_classifier("people")
        stages.train("people", CLASSIFIERS)
        stages.shadows("people", "0", CLASSIFIERS)

    spoil(project)
    with stages_in(project), pytest.raises(kind) as caught:
        make()
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_sole_forgotten_item_that_batch_norm_cannot_take_is_told_as_a_failure(
    project: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refused(*_: Any, **__: Any) -> None:
        raise ValueError("Expected more than 1 value per channel when training, got input size torch.Size([1, 4])")

    monkeypatch.setitem(
        families.CLASSIFIERS.methods, "ungan", families.CLASSIFIERS.methods["ungan"]._replace(run=refused)
    )
    shutil.rmtree(project / "work" / ".resume")
    with stages_in(project), pytest.raises(TooManyDivergedError, match="a batch of one item"):
        stages.unlearn("people", "some", None, CLASSIFIERS)
    for method in ("retain_finetune", "ssd"):  # the others are made all the same
        assert len(models(project, "unlearn_classifier", "people", "some", method)) == 2


def test_what_is_left_out_of_the_images_is_counted(finished: Path):
    record = artifacts.read_json(Workspace(finished).results("prepare_classifier", "people") / "result.json")
    assert (record["repeats"], record["disputed"]) == (0, 0)


def test_replay_tells_the_families_runs_and_params_apart(finished: Path):
    workspace, pipeline = Workspace(finished), Pipeline(finished)
    (run,) = replay.runs(workspace, pipeline.inputs(Item("prepare_classifier", ("tiny",))))
    assert run.params["split.fractions.test"] == 0.1
    names = {run.name for run in replay.runs(workspace, pipeline.inputs(Item("audit_classifier", ("tiny", "some"))))}
    assert "ssd some audit of classifier" in names
