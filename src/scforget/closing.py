"""The end of the pipeline: the report from all results, the runs that MLflow lacks, the tables on the terminal."""

from __future__ import annotations

import platform
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pandas as pd
from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from scforget import artifacts, engine, families, parallel, pictures, replay, results, schema
from scforget.artifacts import Workspace
from scforget.config import read_yaml
from scforget.data.splits import ScenarioSettings
from scforget.errors import ConfigError
from scforget.families import Family
from scforget.pipeline import THEORY, Pipeline
from scforget.progress import Progress
from scforget.report import classification, comparisons, figures, page, tables
from scforget.report import explain as saying
from scforget.report.sweeps import displayed, sweep_table
from scforget.results import Record
from scforget.tracking import Store

_FAMILIES = (families.VAES, families.CLASSIFIERS)
_LIBRARIES = ("scforget", "torch", "scanpy", "anndata", "numpy", "scipy", "mlflow", "dvc")


@dataclass(frozen=True)
class Drawing:
    """Draws what the report shows of one population; picklable, so that worker processes can share the populations."""

    workspace: Workspace
    seed: int

    def __call__(self, place: tuple[str, str, str, str]) -> dict[str, bytes]:
        """PNG files by stem, of a method (or ``original``, ``retrain``) in a scenario of a data set, and a family."""
        _, scenario, method, suffix = place
        drawn = {f"{name}_{method}": figure for name, figure in pictures.audited(self.workspace, *place).items()}
        if not suffix or method in results.REFERENCES:  # two seconds each; a classifier tells by its answers
            drawn[f"umap_{method}"] = pictures.umap(self.workspace, *place, self.seed)
        folder = self.workspace.results(*results.models_stage(*place))
        history = artifacts.read_table(folder / "history.csv")
        if len(history):
            drawn[f"training_curves_{method}"] = figures.training_curves(history, f"{scenario}, {method}")
        return {stem: figures.png_bytes(figure) for stem, figure in drawn.items()}


def _compared(audits: dict[str, Record]) -> dict[str, bytes]:
    """The pictures that all methods share."""
    drawn = {
        "distance_to_target": comparisons.distance_to_target(audits),
        "cost_against_trace": comparisons.cost_against_trace(audits),
        "attack_grid": comparisons.attack_grid(audits),
    }
    if classification.known(audits):
        drawn |= classification.pictures(audits)
    return {stem: figures.png_bytes(figure) for stem, figure in drawn.items()}


@dataclass(frozen=True)
class Place:
    """A forget request, and the family of models it is put to."""

    family: Family
    dataset: str
    scenario: str

    @property
    def title(self) -> str:
        """What the data set is called where both families stand side by side."""
        return f"{self.dataset}{self.family.suffix}"

    def request(self, params: schema.Params) -> ScenarioSettings:
        """What is asked for."""
        return self.family.requests(params, self.dataset)[self.scenario]

    def audits(self, workspace: Workspace, params: schema.Params) -> dict[str, Record]:
        """Records of everything that was audited here."""
        methods = self.family.plan(params).methods
        return results.audits(workspace, self.dataset, self.scenario, methods, self.family.suffix)


def _places(params: schema.Params) -> list[Place]:
    """Every request of the pipeline, those to VAEs first."""
    return [
        Place(family, dataset, scenario)
        for family in _FAMILIES
        for dataset in family.plan(params).datasets
        for scenario in family.plan(params).scenarios
    ]


def _scenario(
    workspace: Workspace, params: schema.Params, place: Place, audits: dict[str, Record], pictured: dict[str, bytes]
) -> dict[str, Any]:  # fmt: skip
    """Write tables and figures of one scenario; return what the page shows of it."""
    table = tables.scenario_table(audits)
    name = f"{place.title}-{place.scenario}"
    artifacts.write_bytes(workspace.report / "tables" / f"{name}.csv", tables.to_csv(table).encode())
    artifacts.write_bytes(workspace.report / "tables" / f"{name}.md", tables.to_markdown(table).encode())
    if classification.known(audits):
        own = classification.class_table(audits)
        text = tables.markdown(classification.display(own))
        artifacts.write_bytes(workspace.report / "tables" / f"{name}-classification.csv", tables.to_csv(own).encode())
        artifacts.write_bytes(workspace.report / "tables" / f"{name}-classification.md", text.encode())
    for stem, content in pictured.items():
        artifacts.write_bytes(workspace.report / "figures" / name / f"{stem}.png", content)
    request = place.request(params)
    context = {
        "dataset": place.title,
        "scenario": place.scenario,
        "kind": request.kind,
        "n_forget": audits["original"]["groups"]["forget"],
        "request": ", ".join(f"{key}: {value}" for key, value in request.model_dump().items()),
    }
    # the page is made to be sent on: the curves of every method would be a third of it, and lie beside it
    shown = {stem: content for stem, content in pictured.items() if not stem.startswith("training_curves")}
    return {"context": context, "audits": audits, "figures": shown, "table": table}


def _seeds(params: schema.Params) -> dict[str, Any]:
    """Seeds of the models that are judged and of those they are judged against."""
    return {
        f"{name}{family.suffix.replace('_', ' of ')}": family.seeds(params, stage)
        for family in _FAMILIES
        if family.plan(params).datasets
        for name, stage in (("originals", "train"), ("retrains", "retrain"))
    }


def _provenance(workspace: Workspace, pipeline: Pipeline, params: schema.Params) -> dict[str, Any]:
    """What the results were made from and on. No commit: one made after the run would be the wrong one to name."""
    data = {
        item.keys[0]: inputs.deps[f"data/{item.keys[0]}"]
        for item, inputs in pipeline.recorded().items()
        if item.stage.startswith("prepare")
    }
    costs = [path for family in _FAMILIES for path in workspace.results(family.stage("train")).glob("*/cost.json")]
    machines = [artifacts.read_json(path)["machine"] for path in costs]
    return {
        "command": "dvc repro",
        "data_md5": data,
        "params": params.model_dump(mode="json"),
        "seeds": {"global": params.seed, **_seeds(params)},
        "hardware": machines[0] if machines else None,
        "versions": {"python": platform.python_version(), **{name: version(name) for name in _LIBRARIES}},
    }


def report() -> None:
    """Write ``report/``: summary.json, a table and figures for each scenario, and report.html."""
    root = Path.cwd()
    params, workspace, pipeline = schema.load(root / "params.yaml"), Workspace(root), Pipeline(root)
    engine.start(params.compute, multiplications=0)
    audits = {place: place.audits(workspace, params) for place in _places(params)}
    drawings = [
        (place.dataset, place.scenario, method, place.family.suffix)
        for place, found in audits.items()
        for method in found
    ]
    with Progress("report", len(drawings), "populations") as progress:
        made = parallel.each(Drawing(workspace, params.seed), drawings, progress.advance)
    drawn = dict(zip(drawings, made, strict=True))
    scenarios = {}
    for place, found in audits.items():
        pictured = _compared(found)
        for method in found:
            pictured |= drawn[place.dataset, place.scenario, method, place.family.suffix]
        scenarios[f"{place.title}/{place.scenario}"] = _scenario(workspace, params, place, found, pictured)
    summary = tables.summary({name: scenario["audits"] for name, scenario in scenarios.items()})
    artifacts.write_json(workspace.report / "summary.json", summary)
    sweeps = _sweeps(workspace, params)
    artifacts.write_bytes(workspace.report / "tables" / "sweeps.csv", tables.to_csv(sweeps).encode())
    html = page.render(list(scenarios.values()), _provenance(workspace, pipeline, params), displayed(sweeps))
    artifacts.write_bytes(workspace.report / "report.html", html.encode())


def _sweeps(workspace: Workspace, params: schema.Params) -> pd.DataFrame:
    """Default against tuned settings, of the pipeline's own sweeps."""
    places = [
        workspace.results("sweep", dataset, scenario, method) / "best.yaml"
        for dataset in params.pipeline.datasets
        for scenario in params.sweep.scenarios
        for method in params.sweep.methods
    ]
    return sweep_table(read_yaml(path) for path in places if path.exists())


def track() -> tuple[int, int, dict[str, str]]:
    """Log every finished stage item that MLflow lacks.

    Returns
    -------
    created, known
        Runs that were created, and that were there.
    astray
        Items left out because a file is not the one that ``dvc.lock`` records, with that file.

    Raises
    ------
    TrackingError
        If the store does not answer.
    """
    root = Path.cwd()
    workspace, store = Workspace(root), Store(root)
    created = known = 0
    left_out: dict[str, str] = {}
    folders = [Path(), *([THEORY] if (root / THEORY / "dvc.lock").exists() else [])]
    for pipeline in (Pipeline(root, folder) for folder in folders):
        astray = pipeline.astray()
        left_out |= {item.name: path for item, path in astray.items()}
        for item, inputs in pipeline.recorded().items():
            if item in astray:
                continue
            for run in replay.runs(workspace, inputs):
                if store.log(run, "restored"):
                    created += 1
                else:
                    known += 1
    return created, known, left_out


def explain(dataset: str, scenario: str, family: Family = families.VAES) -> None:
    """Print what the audit of one forget request found, in plain words."""
    root = Path.cwd()
    params, workspace = schema.load(root / "params.yaml"), Workspace(root)
    place = Place(family, dataset, scenario)
    if place not in (places := _places(params)):
        known = [f"{one.dataset} {one.scenario}" for one in places if one.family is family]
        why = f"{dataset} {scenario} is not part of it; it has {', '.join(known)}"
        raise ConfigError(root / "params.yaml", family.methods_key.rpartition(".")[0], why)
    audits, request = place.audits(workspace, params), place.request(params)
    wanted = ", ".join(f"{key} {value}" for key, value in request.model_dump().items())
    size = audits["original"]["groups"]["forget"]
    print(saying.explain(audits, f"{dataset} / {scenario}: forget {size} {tables.items(audits)} ({wanted})"))


def show() -> None:
    """Print the result table of every scenario, and where to look further."""
    root = Path.cwd()
    params, workspace = schema.load(root / "params.yaml"), Workspace(root)
    console = Console()
    if not console.is_terminal:
        console.width = 150
    for place in _places(params):
        audits = place.audits(workspace, params)
        table = tables.scenario_table(audits)
        console.print(tables.to_rich(table, f"{place.title} / {place.scenario}"))
        if classification.known(audits):
            console.print(classification.to_rich(classification.class_table(audits), "The papers' numbers"))
        console.print()
    if rows := displayed(_sweeps(workspace, params)):
        grid = Table(*rows[0], title="Settings: default against tuned", box=box.SIMPLE_HEAD)
        for row in rows:
            grid.add_row(*map(Text, row.values()))
        console.print(grid)
    console.print("The whole report:   report/report.html")
    console.print("Compare the runs:   make ui   (then http://127.0.0.1:5000)")
