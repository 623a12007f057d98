"""The shape of params.yaml: every key is needed, none is unknown, names fit, and sections follow the registries."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from scforget import config, schema
from scforget.attacks import ATTACKS
from scforget.errors import ConfigError
from scforget.methods import CLASSIFIER_METHODS, METHODS
from scforget.settings import Settings
from scforget.theory.worlds import WorldMethods

ROOT = Path(__file__).parents[1]
PATH = ROOT / "params.yaml"
# whose keys are names that the person chooses
OPEN = (
    "downloads", "datasets", "datasets.pbmc68k.scenarios", "classifiers", "classifiers.digits.scenarios",
    "classifiers.pbmc68k.scenarios", "sweep.development", "sweep.ranges", "theory.worlds.worlds",
    "theory.worlds.methods",
)  # fmt: skip


@pytest.fixture(scope="module")
def content() -> dict[str, Any]:
    return dict(config.read_yaml(PATH))


def mappings(value: Any, place: tuple[str, ...] = ()) -> Iterator[tuple[str, ...]]:
    """Places of all mappings, outermost first."""
    if isinstance(value, dict):
        yield place
        for key, item in value.items():
            yield from mappings(item, (*place, key))


def at(value: Any, place: tuple[str, ...]) -> Any:
    for key in place:
        value = value[key]
    return value


def changed(content: dict[str, Any], *place: str, value: Any) -> dict[str, Any]:
    made = copy.deepcopy(content)
    at(made, place[:-1])[place[-1]] = value
    return made


def refused(content: dict[str, Any]) -> ConfigError:
    with pytest.raises(ConfigError) as caught:
        config.validate(PATH, content, schema.Params)
    assert caught.value.exit_code == 2
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 400
    return caught.value


def test_load_reads_the_params_of_the_project_and_freezes_them():
    params = schema.load(PATH)
    assert params.unlearn.retain_finetune.learning_rate == 1e-4  # unquoted, without a point: a number in YAML 1.2
    with pytest.raises(ValidationError, match="frozen"):
        params.seed = 1


def test_params_need_every_key_but_names(content):
    tried = 0
    for place in mappings(content):
        if ".".join(place) in OPEN:
            continue
        for key in at(content, place):
            less = copy.deepcopy(content)
            del at(less, place)[key]
            error = refused(less)
            if key != "kind":  # without it, the section has no shape that could be wanted
                assert error.key == ".".join((*place, key))
                assert error.why.startswith("missing;")
            tried += 1
    assert tried > 60


def test_params_refuse_an_unknown_key_anywhere(content):
    for place in mappings(content):
        if ".".join(place) not in OPEN:
            more = copy.deepcopy(content)
            at(more, place)["surprise"] = 1
            error = refused(more)
            assert error.key.endswith("surprise")
            assert error.why == "unknown key; check its spelling and its place"


def test_params_take_no_number_as_text_and_no_text_as_number(content):
    tried = 0
    for place in mappings(content):
        for key, value in at(content, place).items():
            if isinstance(value, int | float):
                refused(changed(content, *place, key, value=str(value)))
                refused(changed(content, *place, key, value=2 if isinstance(value, bool) else True))
                tried += 1
            elif isinstance(value, str):
                refused(changed(content, *place, key, value=1))
                tried += 1
    assert tried > 50


def test_params_say_which_data_sets_scenarios_and_methods_there_are(content):
    error = refused(changed(content, "pipeline", "datasets", value=["pbmc68k", "pbmc"]))
    assert error.why == "pipeline.datasets names 'pbmc', which has no section under datasets"
    error = refused(changed(content, "pipeline", "scenarios", value=["nk"]))
    there = ", ".join(content["datasets"]["pbmc68k"]["scenarios"])
    assert error.why == f"datasets.pbmc68k.scenarios lacks 'nk'; it has {there}"
    error = refused(changed(content, "pipeline", "methods", value=["ssd", "magic"]))
    known = [name for name in METHODS if not name.endswith("_published")]
    why = f"unknown method 'magic'; known: {', '.join(known)}; most also as NAME_published"
    assert (error.key, error.why) == ("pipeline.methods", why)
    for axis in ("datasets", "scenarios", "methods"):
        assert "at least 1 item" in refused(changed(content, "pipeline", axis, value=[])).why
    plan = ("pipeline", "classifiers")
    error = refused(changed(content, *plan, "datasets", value=["photos"]))
    assert error.why == "pipeline.classifiers.datasets names 'photos', which has no section under classifiers"
    error = refused(changed(content, *plan, "methods", value=["dp_sgd"]))
    assert error.why == f"unknown method 'dp_sgd'; known: {', '.join(CLASSIFIER_METHODS)}"
    config.validate(PATH, changed(content, *plan, "datasets", value=[]), schema.Params)  # no classifiers at all


@pytest.mark.parametrize("seeds", [[], [3], [3, 3], [1, 2, 1], ["1", "2"], 3])
def test_params_need_two_different_seeds_or_more(content, seeds):
    for population in ("train", "retrain"):
        assert refused(changed(content, population, "seeds", value=seeds)).key.startswith(f"{population}.seeds")


@pytest.mark.parametrize("name", ["a b", "a-b", "a/b", "..", "", "a.b", "cd4+", "é"])
def test_names_hold_nothing_that_a_path_a_stage_or_a_dotted_key_could_trip_over(content, name):
    dataset = content["datasets"]["pbmc68k"]
    assert "string should match pattern" in refused(changed(content, "datasets", name, value=dataset)).why
    scenario = dataset["scenarios"]["cd56_nk"]
    assert "pattern" in refused(changed(content, "datasets", "pbmc68k", "scenarios", name, value=scenario)).why


@pytest.mark.parametrize(
    ("place", "value", "said"),
    [
        (("split", "fractions", "train"), 0.55, "must be 1, not 1.1"),
        (("split", "fractions", "train"), 0.0, "greater than 0"),
        (("prepare", "leiden"), {"resolution": 1.0, "n_neighbors": 5, "n_pcs": 5, "n_top_genes": 5}, "both is given"),
        (("prepare", "label_column"), None, "neither is given"),
        (("scenarios", "cd56_nk"), {"kind": "kluster", "cluster": "B"}, "'kluster' found using 'kind' does not match"),
        (("model", "hidden"), [], "at least 1 item"),
        (("training", "patience"), 0, "greater than 0"),
    ],
)
def test_params_of_a_data_set_must_make_sense(content, place, value, said):
    assert said in refused(changed(content, "datasets", "pbmc68k", *place, value=value)).why


@pytest.mark.parametrize(
    ("place", "value", "said"),
    [
        (("development",), {}, "development names no request to choose settings on for 'scattered'"),
        (("full", "scenarios"), ["cd56_nk"], "development names no request to choose settings on for 'cd56_nk'"),
        (
            ("development",),
            {"scattered": "nowhere"},
            "lacks 'nowhere'; add it ({kind: sibling, of: scattered})",
        ),
        (("seeds",), 2, "greater than or equal to 3"),
        (("retrains",), 3, "greater than or equal to 4"),
        (("trials",), 0, "greater than 0"),
        (("startup_trials",), 0, "greater than or equal to 1"),
        (("ranges",), {"ssd": {"alpha": {"low": 2.0, "high": 1.0, "log": True}}}, "low must be below high"),
        (("ranges",), {"ssd": {"alpha": {"low": 0.0, "high": 1.0, "log": True}}}, "log needs low > 0"),
        (("ranges",), {"ssd": {"reference": {"values": []}}}, "at least 1 item"),
        (("ranges",), {"ssd": {"alpha": {"low": "a", "high": 1.0, "log": True}}}, "must be a number, found 'a'"),
    ],
)
def test_params_of_sweeps_must_make_sense(content, place, value, said):
    assert said in refused(changed(content, "sweep", *place, value=value)).why


@pytest.mark.parametrize(
    ("place", "value"),
    [(("methods",), ["ssd", "magic"]), (("full", "methods"), ["magic"]), (("ranges",), {"magic": {}})],
)
def test_params_say_which_methods_can_be_searched(content, place, value):
    with pytest.raises(ConfigError, match="unknown method 'magic'; known: retain_finetune, "):
        config.validate(PATH, changed(content, "sweep", *place, value=value), schema.Params)


def test_params_refuse_a_sweep_of_a_request_that_the_pipeline_lacks(content):
    less = changed(content, "pipeline", "scenarios", value=["cd56_nk"])
    assert "sweep.scenarios: 'scattered' is not in pipeline.scenarios" in refused(less).why
    schema.Params.model_validate(changed(less, "sweep", "methods", value=[]))  # of none at all it says nothing


def test_sections_follow_the_registries():
    assert list(schema.UnlearnSettings.model_fields) == list(METHODS)
    attacks = schema.Params.model_fields["audit"].annotation.model_fields["attacks"].annotation
    assert list(attacks.model_fields) == list(ATTACKS)
    for name, method in METHODS.items():
        assert schema.UnlearnSettings.model_fields[name].annotation is method.settings


def test_no_setting_has_a_default_that_dvc_would_not_see():
    def settings(kind: type[Settings]) -> Iterator[type[Settings]]:
        yield kind
        for sub in kind.__subclasses__():
            yield from settings(sub)

    ours = [kind for kind in settings(Settings) if kind.__module__.startswith("scforget")]
    assert len(ours) > 15
    for kind in ours:
        if kind is WorldMethods:  # a method that is not named there is not run, which DVC does see
            continue
        for name, field in kind.model_fields.items():
            assert field.is_required(), f"{kind.__name__}.{name}"


def test_params_of_the_published_protocol_name_published_variants_only(content):
    published = changed(content, "protocol", value="published")
    error = refused(published)
    assert "protocol published runs retain_finetune_published, not retain_finetune" in error.why
    beside = ["ssd_published", "retrain_published", "sisa"]  # what the paper lacks may run beside it
    schema.Params.model_validate(changed(published, "pipeline", "methods", value=beside))
