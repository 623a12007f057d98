"""The commands of the classifiers' stages: ``scforget classifier …``, one for each DVC stage ``…_classifier``."""

from __future__ import annotations

from typing import Annotated

import typer

Dataset = Annotated[str, typer.Argument(help="A data set of params.yaml (pipeline.classifiers.datasets).")]
Scenario = Annotated[str, typer.Argument(help="A forget request of params.yaml (pipeline.classifiers.scenarios).")]
ShadowBlock = Annotated[str, typer.Argument(help="A block of params.yaml (pipeline.classifiers.shadow_blocks).")]
Method = Annotated[
    str | None,
    typer.Argument(help="A method of params.yaml (pipeline.classifiers.methods).", show_default="all of them"),
]

app = typer.Typer(
    no_args_is_help=True, rich_markup_mode=None,
    help="The same stages for classifiers, of cell types and of images (docs/classifiers.md).",
)  # fmt: skip


@app.command()
def prepare(dataset: Dataset) -> None:
    """Read the images or cells under data/DATASET, drop repeats, deal them, draw every scenario's forget set."""
    from scforget import stages

    stages.prepare_classifier(dataset)


@app.command()
def train(dataset: Dataset) -> None:
    """Train the originals: the classifiers that hold the items to be forgotten. Resumes after a kill."""
    from scforget import families, stages

    stages.train(dataset, families.CLASSIFIERS)


@app.command()
def retrain(dataset: Dataset, scenario: Scenario) -> None:
    """Train the target: classifiers that never saw the forgotten items. Resumes after a kill."""
    from scforget import families, stages

    stages.retrain(dataset, scenario, families.CLASSIFIERS)


@app.command()
def shadows(dataset: Dataset, shadow_block: ShadowBlock) -> None:
    """Train a block of shadow models on random halves of the items, for the attacks. Resumes after a kill."""
    from scforget import families, stages

    stages.shadows(dataset, shadow_block, families.CLASSIFIERS)


@app.command()
def unlearn(dataset: Dataset, scenario: Scenario, method: Method = None) -> None:
    """Unlearn the forget set from each original, by every method or by one. Resumes after a kill."""
    from scforget import families, stages

    stages.unlearn(dataset, scenario, method, families.CLASSIFIERS)


@app.command()
def reference(dataset: Dataset, scenario: Scenario) -> None:
    """Score originals and retrains: what there is to forget, the target, the noise between retrains."""
    from scforget import auditing, families

    auditing.reference(dataset, scenario, families.CLASSIFIERS)


@app.command()
def audit(
    dataset: Dataset,
    scenario: Scenario,
    explain: Annotated[bool, typer.Option("--explain", help="Run nothing: say in plain words what was found.")] = False,
) -> None:
    """Attack every method's classifiers, test them against the retrains, give the verdicts. Resumes after a kill."""
    from scforget import families

    if explain:
        from scforget import closing

        closing.explain(dataset, scenario, families.CLASSIFIERS)
    else:
        from scforget import auditing

        auditing.audit(dataset, scenario, families.CLASSIFIERS)
