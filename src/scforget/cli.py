"""The command line: one command for each DVC stage, and those that people use around the pipeline.

Arguments choose *what* to run; *how much* is in ``params.yaml``. Heavy imports wait until a command needs them.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Annotated, NoReturn

import typer

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
data = typer.Typer(no_args_is_help=True, rich_markup_mode=None, help="Fetch public data sets, and add your own.")
app.add_typer(data, name="data")

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
def ui(port: Annotated[int, typer.Option(help="Port on 127.0.0.1.")] = 5000) -> None:
    """Open MLflow's UI on 127.0.0.1 over mlruns/mlflow.db."""
    from scforget import tracking

    root = Path.cwd()
    address = tracking.uri(root)
    tracking.Store(root)  # makes the database if there is none, and ends in one line if it cannot be opened
    # Its job queue is for judging LLM traces: five more processes that nobody here asked for.
    quiet = {
        "MLFLOW_DISABLE_TELEMETRY": "true",
        "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false",
        "PYTHONWARNINGS": "ignore",
    }
    environment = {**os.environ, **quiet}
    if not address.startswith("sqlite"):
        raise ScforgetError(f"MLFLOW_TRACKING_URI is {address}: open it in a browser")
    command = [sys.executable, "-m", "mlflow", "ui", "--backend-store-uri", address]
    command += ["--host", "127.0.0.1", "--port", str(port), "--workers", "1"]
    print(f"MLflow: http://127.0.0.1:{port} (Ctrl-C ends it)", file=sys.stderr)
    sys.stderr.flush()
    os.execve(command[0], command, environment)  # becomes the server: whatever ends this ends it


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
    """Make data/pbmc68k anew from the scanpy package (normally `dvc pull -r bundled data.dvc` brings it)."""
    from scforget.data.sources import write_bundled

    write_bundled(Path("data") / "pbmc68k")


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
