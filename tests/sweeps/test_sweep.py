"""A sweep of real models from end to end in a tiny project, and what it refuses."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch

from scforget import artifacts, config, context, engine, loading, replay
from scforget.artifacts import Workspace
from scforget.errors import ArtifactError, ConfigError, DataError, NonFiniteError, ScforgetError
from scforget.methods import METHODS
from scforget.search import Choice, Range
from scforget.sweeps.requests import Arena, Request
from scforget.sweeps.sweep import Judge, Sweep, rounded, space_of, sweep
from spoiling import both, put

pytestmark = pytest.mark.usefixtures("no_tracking")

FILES = {"trials.csv", "best.yaml", "study.html", "cost.json"}
SAME = FILES - {"cost.json"}


def run(trials: int | None = None, method: str = "ssd", **more: Any) -> Path:
    return sweep(method, None, "part", **{"trials": trials, "timeout": None, "storage": None, **more})


def contents(folder: Path) -> dict[str, bytes]:
    return {name: (folder / name).read_bytes() for name in sorted(SAME)}


@pytest.fixture(scope="module")
def first(trained: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """What the pipeline's own sweep leaves."""
    root = tmp_path_factory.mktemp("first") / "project"
    shutil.copytree(trained, root, symlinks=True)
    threads = torch.get_num_threads()
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(root)
        patch.setenv("SCFORGET_WORKERS", "1")
        patch.setattr(context.Context, "track", lambda *_, **__: None)
        folder = run()
    torch.set_num_threads(threads)
    assert folder == root / "results" / "sweep" / "tiny" / "part" / "ssd"
    assert {path.name for path in folder.iterdir()} == FILES
    return contents(folder)


@pytest.fixture
def record(first: dict[str, bytes], tmp_path: Path) -> dict[str, Any]:
    (tmp_path / "best.yaml").write_bytes(first["best.yaml"])
    return dict(config.read_yaml(tmp_path / "best.yaml"))


@pytest.fixture
def table(first: dict[str, bytes], tmp_path: Path) -> pd.DataFrame:
    (tmp_path / "trials.csv").write_bytes(first["trials.csv"])
    return artifacts.read_table(tmp_path / "trials.csv")


# outs


def test_sweep_says_what_it_chose_and_how_both_settings_do_on_the_final_request(record, table):
    study = record["study"]
    assert (study["dataset"], study["scenario"], study["method"]) == ("tiny", "part", "ssd")
    assert (study["development"], study["trials"]) == ("part_dev", 4)
    assert (study["chosen_on"], study["judged_on"]) == ([0, 1, 2], [3, 4, 5])
    assert table["trial"].tolist() == [0, 1, 2, 3]
    assert table["default"].tolist() == [True, False, False, False]
    default = table.iloc[0]
    assert {key: default[key] for key in record["ranges"]} == record["default"]["settings"]
    for name in ("default", "tuned"):
        row = record[name]
        assert row["final"]["verdict"]
        assert row["final"]["utility"] in ("kept", "lost", "undetermined")
        assert row["optimism"] == pytest.approx(row["final"]["distance"] - row["development"]["distance"], abs=1e-5)
        assert row["final"]["cost"] > 0
    chosen = table[table["chosen"]]
    assert chosen["trial"].tolist() == [record["tuned"]["trial"]]
    assert chosen["feasible"].all()
    assert {key: chosen.iloc[0][key] for key in record["ranges"]} == record["tuned"]["settings"]
    assert record["tuned"]["development"]["distance"] == pytest.approx(chosen.iloc[0]["distance"], rel=1e-5)
    assert record["original"]["cost"] == 0.0
    assert record["original"]["distance"] > 0
    assert record["retrain"]["distance"] > 0


def test_sweep_leaves_the_same_bytes_when_it_is_run_again_from_scratch(project, first):
    shutil.rmtree(project.root / "work" / ".resume")
    folder = run()
    assert contents(folder) == first
    assert "seconds" in artifacts.read_json(folder / "cost.json")
    assert not any(b"seconds" in content for name, content in contents(folder).items() if name != "study.html")


def test_sweep_of_one_s_own_goes_on_where_the_shorter_ones_ended(project, first, capsys, monkeypatch):
    judged: list[int] = []
    plain = Judge.__call__

    def counted(judge: Judge, drawn: dict[str, Any], place: int) -> Any:
        judged.append(place)
        return plain(judge, drawn, place)

    monkeypatch.setattr(Judge, "__call__", counted)
    folder = run(2)
    assert folder == project.studies("tiny", "part", "ssd")
    shorter = artifacts.read_table(folder / "trials.csv")
    assert run(5) == folder
    longer = artifacts.read_table(folder / "trials.csv")
    assert "sweep: 2 trials; final distance: default " in capsys.readouterr().err
    columns = [name for name in shorter if name != "chosen"]
    pd.testing.assert_frame_equal(longer[columns].head(2), shorter[columns])
    assert not project.results("sweep").exists()
    assert contents(run()) == first  # the pipeline's takes of the same study what is its own, whoever went on with it
    assert judged == [0, 1, 2, 3, 4]


def test_sweep_interrupted_and_resumed_leaves_what_an_uninterrupted_one_does(project, first, monkeypatch, capsys):
    plain, calls = Request.unlearned, []

    def interrupted(*arguments: Any) -> Any:
        calls.append(0)
        if len(calls) in (2, 8):
            raise KeyboardInterrupt
        return plain(*arguments)

    monkeypatch.setattr(Request, "unlearned", interrupted)
    for done in (0, 1):
        with pytest.raises(KeyboardInterrupt):
            run()
        assert f"{done} of 4 trials are kept; the same command goes on" in capsys.readouterr().err
        assert not project.results("sweep").exists()
    assert contents(run()) == first


def test_sweep_takes_no_trial_after_its_time_and_leaves_nothing_if_there_is_none(project):
    assert not run(timeout=0.0).exists()


def test_sweep_says_how_many_are_missing(project, capsys):
    run(2)
    folder = run(4, timeout=0.0)
    assert len(artifacts.read_table(folder / "trials.csv")) == 2
    assert "sweep: 2 trials (2 of 4: the same command goes on); final distance" in capsys.readouterr().err


def test_sweep_keeps_its_study_where_it_is_told_to(project):
    run(1, storage=str(project.root / "elsewhere" / "mine.journal"))
    assert (project.root / "elsewhere" / "mine.journal").exists()
    assert not (project.root / "studies" / "studies.journal").exists()


def test_sweep_of_other_settings_is_another_study(project):
    names = set()
    for value in (None, 2.0, 3.0):
        if value is not None:
            put("unlearn", "ssd", "lam", value=value)(project.root)
        names.add(Sweep(context.open_sweep("ssd", "tiny", "part")).name)
    put("sweep", "trials", value=99)(project.root)  # as many trials as one likes are the same study
    names.add(Sweep(context.open_sweep("ssd", "tiny", "part")).name)
    assert len(names) == 3
    assert all(name.startswith("tiny/part/ssd/") for name in names)


def test_sweep_fills_followers_and_overridden_ranges(project):
    table = artifacts.read_table(run(3, method="partial_reset") / "trials.csv")
    assert table["max_epochs"].between(1, 4).all()
    assert "patience" not in table.columns
    assert table.iloc[0]["max_epochs"] == 2


def test_sweep_whose_models_all_diverge_promotes_nothing(project, monkeypatch, capsys):
    def diverging(*_: Any, **__: Any) -> None:
        raise NonFiniteError(3, "the loss")

    monkeypatch.setitem(METHODS, "ssd", METHODS["ssd"]._replace(run=diverging))
    folder = run(2)
    record = config.read_yaml(folder / "best.yaml")
    assert "tuned" not in record
    assert record["study"]["diverged"] == 2
    assert record["default"]["final"]["diverged"].startswith("training: the loss became NaN")
    table = artifacts.read_table(folder / "trials.csv")
    assert table["state"].tolist() == ["diverged"] * 2
    assert not table[["feasible", "chosen"]].to_numpy().any()
    assert "nothing to promote" in capsys.readouterr().err
    (tracked,) = replay.studies(project, context.open_sweep("ssd", None, "part").inputs, folder)
    assert len(tracked.children) == 2


def test_sweep_default_beyond_the_ranges_is_not_the_first_trial_but_judged_at_the_end(project):
    put("sweep", "ranges", value={"ssd": {"alpha": {"low": 0.5, "high": 1.0, "log": True}}})(project.root)
    folder = run(2)
    table, record = artifacts.read_table(folder / "trials.csv"), config.read_yaml(folder / "best.yaml")
    assert not table["default"].any()
    assert table["alpha"].between(0.5, 1.0).all()
    assert "development" not in record["default"]
    assert record["default"]["final"]["distance"] > 0


@pytest.mark.parametrize("value", [0.00123456789, 3, "D", True, 123456.0])
def test_rounded_keeps_four_digits_of_a_float_alone(value):
    assert rounded(value) == {0.00123456789: 0.001235, 123456.0: 123500.0}.get(value, value)
    assert type(rounded(value)) is type(value)


def test_judge_gives_each_model_a_stream_of_its_own(project, monkeypatch):
    seeds: list[tuple[int, int]] = []

    def noted(_: Any, settings: Any, original: int, seed: int) -> str:
        seeds.append((original, seed))
        return "enough"

    monkeypatch.setattr(Request, "unlearned", noted)
    opened = context.open_sweep("ssd", None, "part")
    arena = Arena(opened, "ssd")
    judge = Judge(Request(arena, "part", "final"), opened, arena.base, [0, 1, 2])
    assert judge({"alpha": 2.0}, 0) == "enough"
    judge({"alpha": 2.0}, 1)
    judge.models({"alpha": 2.0}, "final")
    assert [original for original, _ in seeds] == [0, 1, 2] * 3
    assert len({seed for _, seed in seeds}) == 9


# what is refused


def nothing(_: Path) -> None:
    """Leave the project as it is."""


REFUSED: list[tuple[Callable[[Path], None], dict[str, Any], type[ScforgetError], str]] = [
    (nothing, {"method": "magic"}, ConfigError, "magic: not known; there are retain_finetune, "),
    (nothing, {"dataset": "pbmc"}, ConfigError, "pbmc: not known; there are tiny"),
    (nothing, {"scenario": "part_dev"}, ConfigError, "pipeline: tiny part_dev is not in it, and a sweep is judged by "),
    (nothing, {"scenario": "nonsense"}, ConfigError, "pipeline: tiny nonsense is not in it"),
    (nothing, {"method": "ssd_published"}, ConfigError, "sweep.ranges.ssd_published: no setting of it has a search"),
    (put("train", "seeds", value=[0, 1, 2, 3]), {}, DataError, "made again"),
    (both(put("sweep", "methods", value=[]), put("sweep", "scenarios", value=[]),
          put("sweep", "development", value={"other": "part"}), put("sweep", "full", "scenarios", value=["other"])),
     {}, ConfigError, "sweep.development: names no request to choose settings on for part; add one of kind sibling"),
    (put("sweep", "development", value={"part": "nowhere"}), {}, ConfigError, "nowhere"),
    (put("sweep", "development", value={"part": "part"}), {}, DataError, "forgotten cells in both"),
    (put("sweep", "ranges", value={"ssd": {"alpha": {"low": -1.0, "high": 1.0, "log": False}}}), {}, ConfigError,
     "sweep.ranges.ssd.alpha: -1.0 does not do: "),
    (put("sweep", "ranges", value={"ssd": {"beta": {"low": 1.0, "high": 2.0, "log": False}}}), {}, ConfigError,
     "sweep.ranges.ssd.beta: 1.0 does not do: "),
    (put("sweep", "ranges", value={"ssd": {"reference": {"values": ["D", "X"]}}}), {}, ConfigError,
     "sweep.ranges.ssd.reference: 'X' does not do: "),
    (put("sweep", "ranges", value={"ssd": {"draws": {"low": 1.0, "high": 2.0, "log": False}}}), {}, ConfigError,
     "sweep.ranges.ssd.draws: 1.0 does not do: "),
    (put("sweep", "ranges", value={"ssd": {"alpha.beta": {"low": 1, "high": 2, "log": False}}}), {}, ConfigError,
     "sweep.ranges.ssd.alpha.beta: 1 does not do: "),
    (put("sweep", "ranges", value={"magic": {}}), {}, ConfigError, "unknown method 'magic'"),
]  # fmt: skip


@pytest.mark.parametrize(("spoil", "asked", "kind", "said"), REFUSED, ids=[row[3][:40] for row in REFUSED])
def test_sweep_refuses_in_one_line(project, spoil, asked, kind, said):
    spoil(project.root)
    if said == "made again":  # fewer originals were trained
        path = project.results("train", "tiny") / "result.json"
        made = artifacts.read_json(path)
        artifacts.write_json(path, {**made, "seeds": {seed: made["seeds"][seed] for seed in "0123"}})
        said = "originals of tiny: found 4 originals, of which sweep.seeds takes 3; wanted 2 or more left"
    names = {"method": "ssd", "dataset": None, "scenario": "part", **asked}
    with pytest.raises(ScforgetError) as caught:
        sweep(*names.values(), trials=2, timeout=None, storage=None)
    assert type(caught.value) is kind
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 600
    assert not project.studies("tiny").exists()


def test_sweep_of_one_of_two_data_sets_wants_a_name(project):
    put("pipeline", "datasets", value=["tiny", "twin"])(project.root)
    put("datasets", "twin", value=config.read_yaml(project.params)["datasets"]["tiny"])(project.root)
    with pytest.raises(ConfigError, match=r"there are tiny, twin; say which with --dataset"):
        run()


def test_sweep_before_the_pipeline_says_what_to_run(project):
    shutil.rmtree(project.work("retrain"))
    with pytest.raises(ArtifactError, match=r"no such file, and a stage depends on it; run `dvc repro`"):
        run()


def test_space_of_tries_every_end_against_the_method(project):
    base = Arena(context.open_sweep("ssd", None, "part"), "ssd").base
    space = space_of(project.params, "ssd", base, {})
    assert {"alpha", "lam"} <= set(space)
    assert all(isinstance(one, Range | Choice) for one in space.values())


def test_sweep_s_models_are_those_of_the_stage_s_code(project):
    """Settings of params.yaml by the judge's way are what `unlearn` would make with the same seed."""
    opened = context.open_sweep("ssd", None, "part")
    arena = Arena(opened, "ssd")
    request = Request(arena, "part", "final")
    scored = request.unlearned(arena.base, 3, 7)
    engine.start(opened.params.compute, 0)
    sets = loading.load_scenario(project, "tiny", "part").sets
    model = METHODS["ssd"].run(
        loading.load_original(arena.task, arena.original(3)), arena.task, sets, arena.base, seed=7
    )
    assert not isinstance(scored, str)
    assert scored.elbo == request.score(model.model, 0).elbo
    assert scored.passes == model.effort.passes > 0


def test_workspace_has_a_place_for_studies():
    assert Workspace(Path("/lab")).studies("tiny", "part", "ssd") == Path("/lab/studies/tiny/part/ssd")
