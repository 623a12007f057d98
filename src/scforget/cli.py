"""The command line: one command for each DVC stage, and those that people use around the pipeline.

Arguments choose *what* to run; *how much* is in ``params.yaml``. Heavy imports wait until a command needs them.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Annotated, Any, NoReturn

import typer
from typer.core import TyperGroup

from scforget import cli_classifier
from scforget.errors import ScforgetError

Dataset = Annotated[str, typer.Argument(help="A data set of params.yaml (pipeline.datasets).")]
Scenario = Annotated[str, typer.Argument(help="A forget request of params.yaml (pipeline.scenarios).")]
ShadowBlock = Annotated[str, typer.Argument(help="A block of params.yaml (pipeline.shadow_blocks).")]
Method = Annotated[
    str | None,
    typer.Argument(help="An unlearning method of params.yaml (pipeline.methods).", show_default="all of them"),
]

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    help="Forget cells from trained single-cell models, and prove it. `dvc repro` runs the whole pipeline; each of "
    "its stages is a command here. Settings are in params.yaml.",
)


class _RunFirst(TyperGroup):
    """A group whose first word may be a method: ``sweep ssd`` is ``sweep run ssd``."""

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        if args and args[0] not in self.commands:
            args = ["run", *args]
        return super().resolve_command(ctx, args)


data = typer.Typer(no_args_is_help=True, rich_markup_mode=None, help="Fetch public data sets, and add your own.")
app.add_typer(data, name="data")
searches = typer.Typer(
    cls=_RunFirst, no_args_is_help=True, rich_markup_mode=None,
    help="Search a method's settings: `scforget sweep METHOD --scenario S`, then `scforget sweep promote METHOD`.",
)  # fmt: skip
app.add_typer(searches, name="sweep", rich_help_panel="Around the pipeline")

theory = typer.Typer(
    no_args_is_help=True, rich_markup_mode=None,
    help="Why methods that move parameters fail: the stages of `make theory` (docs/theory.md).",
)  # fmt: skip
app.add_typer(theory, name="theory", rich_help_panel="Around the pipeline")

app.add_typer(cli_classifier.app, name="classifier", rich_help_panel="Stages of the pipeline")

PIPELINE = "Stages of the pipeline"
AROUND = "Around the pipeline"


@app.callback()
def _options(
    debug: Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")] = False,
) -> None:
    if debug:
        os.environ["SCFORGET_DEBUG"] = "1"


@app.command(rich_help_panel=PIPELINE)
def prepare(dataset: Dataset) -> None:
    """Read the counts under data/DATASET, drop poor cells, label the others."""
    from scforget import stages

    stages.prepare(dataset)


@app.command(rich_help_panel=PIPELINE)
def split(dataset: Dataset) -> None:
    """Deal the cells into train, stop, aside and unseen; choose genes; draw every scenario's forget set."""
    from scforget import stages

    stages.split(dataset)


@app.command(rich_help_panel=PIPELINE)
def train(dataset: Dataset) -> None:
    """Train the originals: the models that hold the cells to be forgotten. Resumes after a kill."""
    from scforget import stages

    stages.train(dataset)


@app.command(rich_help_panel=PIPELINE)
def retrain(dataset: Dataset, scenario: Scenario) -> None:
    """Train the target: models that never saw the forgotten cells. Resumes after a kill."""
    from scforget import stages

    stages.retrain(dataset, scenario)


@app.command(rich_help_panel=PIPELINE)
def shadows(dataset: Dataset, shadow_block: ShadowBlock) -> None:
    """Train a block of shadow models on random halves of the cells, for the attacks. Resumes after a kill."""
    from scforget import stages

    stages.shadows(dataset, shadow_block)


@app.command(rich_help_panel=PIPELINE)
def unlearn(dataset: Dataset, scenario: Scenario, method: Method = None) -> None:
    """Unlearn the forgotten cells from each original, by every method or by METHOD alone. Resumes after a kill."""
    from scforget import stages

    stages.unlearn(dataset, scenario, method)


@app.command(rich_help_panel=PIPELINE)
def reference(dataset: Dataset, scenario: Scenario) -> None:
    """Score originals and retrains: what there is to forget, the target, the noise between retrains."""
    from scforget import auditing

    auditing.reference(dataset, scenario)


@app.command(rich_help_panel=PIPELINE)
def audit(
    dataset: Dataset,
    scenario: Scenario,
    explain: Annotated[bool, typer.Option("--explain", help="Run nothing: say in plain words what was found.")] = False,
) -> None:
    """Attack every method's models, test them against the retrains, and give the verdicts. Resumes after a kill."""
    if explain:
        from scforget import closing

        closing.explain(dataset, scenario)
    else:
        from scforget import auditing

        auditing.audit(dataset, scenario)


@app.command(rich_help_panel=PIPELINE)
def report() -> None:
    """Write report/: summary.json, tables, figures and report.html, verdicts first."""
    from scforget import closing

    closing.report()


@app.command(rich_help_panel=PIPELINE)
def track() -> None:
    """Create in MLflow every run that it lacks, from results on disk (after a restore from DVC's cache, say)."""
    from scforget import closing

    created, known, astray = closing.track()
    for name, path in astray.items():
        print(f"track: {name} left out: {path} is not as dvc.lock records it; run `dvc repro`", file=sys.stderr)
    print(f"track: {created} runs created, {known} known already", file=sys.stderr)


@app.command(rich_help_panel=AROUND)
def show() -> None:
    """Print the result tables of the last `dvc repro`, and where to look further."""
    from scforget import closing

    closing.show()


@app.command(rich_help_panel=AROUND)
def profile(name: Annotated[str, typer.Argument(help="A file of profiles/, without .yaml.")]) -> None:
    """Write the values of profiles/NAME.yaml into params.yaml, keeping comments (undo: git checkout params.yaml)."""
    from scforget import config, schema
    from scforget.errors import ConfigError

    path = Path("profiles") / f"{name}.yaml"
    if not path.exists():
        known = ", ".join(sorted(found.stem for found in Path("profiles").glob("*.yaml")))
        raise ConfigError(path, "", f"no such profile; there are: {known or 'none'}")
    config.apply_overrides(Path("params.yaml"), path, schema.Params)
    print(f"params.yaml now has the values of {path}; run `dvc repro`", file=sys.stderr)


@app.command(rich_help_panel=AROUND)
def promote(
    dataset: Dataset, scenario: Scenario,
    method: Annotated[str, typer.Argument(help="A method whose verdict is FORGOTTEN with utility kept.")],
    seed: Annotated[int | None, typer.Option(help="Which of its models.", show_default="the first")] = None,
) -> None:  # fmt: skip
    """Register a forgotten model, an original and a retrain in MLflow's registry; refuses any other verdict.

    They are found as models:/scforget-DATASET@forgotten, @original and @retrain (docs/registry.md).
    """
    from scforget import registry

    registry.promote(Path.cwd(), dataset, scenario, method, seed)


@app.command(rich_help_panel=AROUND)
def ui(
    port: Annotated[int, typer.Option(help="MLflow's port on 127.0.0.1.")] = 5000,
    studies_port: Annotated[int, typer.Option(help="optuna-dashboard's port on 127.0.0.1.")] = 5001,
    storage: Annotated[
        str | None, typer.Option(help="Database of the studies.", show_default="studies/studies.journal")
    ] = None,
) -> None:
    """Open MLflow over the runs and optuna-dashboard over the studies, on 127.0.0.1 (Ctrl-C ends both)."""
    from scforget import ui

    ui.serve(Path.cwd(), port, studies_port, storage)


SweepMethod = Annotated[str, typer.Argument(help="An unlearning method of params.yaml (unlearn).")]
SweepScenario = Annotated[str, typer.Option("--scenario", help="The request that it is tuned for.")]
SweepDataset = Annotated[
    str | None, typer.Option("--dataset", help="A data set of params.yaml.", show_default="the pipeline's only one")
]


@searches.command("run")
def sweep_run(  # noqa: PLR0917
    method: SweepMethod, scenario: SweepScenario, dataset: SweepDataset = None,
    trials: Annotated[
        int | None,
        typer.Option(min=1, help="Trials in all, finished ones included; results then go to studies/, not results/.",
                     show_default="sweep.trials of params.yaml"),
    ] = None,
    timeout: Annotated[float | None, typer.Option(min=0, help="Seconds after which no trial is begun.")] = None,
    storage: Annotated[
        str | None,
        typer.Option(help="A journal file, or postgresql+psycopg://USER@HOST/DATABASE for workers on several machines.",
                     show_default="studies/studies.journal"),
    ] = None,
) -> None:  # fmt: skip
    """Search a method's settings: near to the retrained models, cheap, utility kept.

    Settings are chosen on a development request (sweep.development in params.yaml) and judged on the scenario itself.
    Run the same command again, also on other machines at once, to go on with a study; a killed trial is run again.
    """
    from scforget.sweeps import sweep

    sweep.sweep(method, dataset, scenario, trials=trials, timeout=timeout, storage=storage)


@searches.command("promote")
def sweep_promote(
    method: SweepMethod,
    scenario: Annotated[str | None, typer.Option(help="If the method was tuned for several.")] = None,
    dataset: SweepDataset = None,
) -> None:
    """Write the chosen settings of a sweep into params.yaml, keeping its comments (undo: git checkout params.yaml)."""
    from scforget.sweeps import promote

    for line in promote.promote(Path.cwd(), method, dataset, scenario):
        print(line, file=sys.stderr)
    print("look at `git diff params.yaml`, run `dvc repro`, commit", file=sys.stderr)


@theory.command()
def overlap(dataset: Dataset) -> None:
    """Compare the Fisher information of forgotten and retained cells, in VAEs of several kinds and in classifiers."""
    from scforget.theorising import overlap as stage

    stage.overlap_stage(dataset)


@theory.command()
def proposition() -> None:
    """Check Proposition 1 and Corollary 2: exactly, by their rate of convergence, and against adversaries."""
    from scforget.theorising import worlds as stage

    stage.proposition_stage()


@theory.command()
def worlds() -> None:
    """Unlearn in mixtures of Gaussians, whose truth is known, and compare attacks and verdicts with it."""
    from scforget.theorising import worlds as stage

    stage.worlds_stage()


@theory.command()
def ablation(dataset: Dataset) -> None:
    """Vary forget sets, settings, what an attack sees, and the decoder; draw learning curves."""
    from scforget.theorising import ablation as stage

    stage.ablation_stage(dataset)


@theory.command("figures")
def draw_figures() -> None:
    """Draw the paper's pictures and this pipeline's, and write the table of claims and the method selection guide."""
    from scforget.theorising import figures as stage

    stage.figures_stage()


@data.command("list")
def list_sets() -> None:
    """List the public data sets that `scforget data fetch` knows."""
    from scforget.data.public import PUBLIC

    for name, known in sorted(PUBLIC.items()):
        print(f"{name}: {known.what} ({known.licence})")


@data.command()
def fetch(name: Annotated[str, typer.Argument(help="One of `scforget data list`.")]) -> None:
    """Download a public data set into downloads/NAME; a broken download is resumed. The hash goes into params.yaml."""
    from scforget import datasets

    datasets.fetch(Path.cwd(), name)


@data.command()
def add(
    path: Annotated[Path, typer.Argument(help="An .h5ad, a 10x .h5, a 10x mtx folder, or downloads/NAME.")],
    name: Annotated[str, typer.Option(help="Name of the data set in params.yaml.")],
    layer: Annotated[str | None, typer.Option(help="Layer of an h5ad that holds the counts, if not X.")] = None,
) -> None:
    """Check a data set, copy it to data/NAME and put it under DVC (`dvc add data`)."""
    from scforget import datasets

    datasets.add(Path.cwd(), path, name, layer)


@data.command()
def simulate(
    preset: Annotated[str, typer.Argument(help="paper_shape (33,088 x 2,000, 14 clusters) or tiny (240 x 60).")],
    name: Annotated[str, typer.Option(help="Name of the data set in params.yaml.")],
) -> None:
    """Simulate negative-binomial cells with planted clusters and donors into data/NAME, and put it under DVC."""
    from scforget import datasets

    datasets.simulate(Path.cwd(), preset, name)


@data.command()
def bundled() -> None:
    """Make data/pbmc68k and data/digits, where missing, anew from scanpy and scikit-learn.

    Normally `dvc pull -r bundled data.dvc` brings them.
    """
    from scforget import datasets

    datasets.bundled(Path.cwd())


def _fail(error: ScforgetError) -> NoReturn:
    print("scforget:", " ".join(str(error).splitlines()), file=sys.stderr)  # names may hold a line break
    sys.exit(error.exit_code)


def main() -> None:
    """Run the command line; an expected error ends in one line and its class's exit code."""
    # One thread a process: many small models run side by side, and results do not depend on the number of cores.
    for variable in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"):
        os.environ.setdefault(variable, "1")
    try:
        app()
    except ScforgetError as error:
        if os.environ.get("SCFORGET_DEBUG"):
            raise
        _fail(error)
