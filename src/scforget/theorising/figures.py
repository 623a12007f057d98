"""The stage of pictures: the paper's, drawn from the audits, and this pipeline's; the claims; the selection guide."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import pandas as pd

from scforget import artifacts, parallel, results
from scforget.arrays import FloatArray
from scforget.audit import utility
from scforget.context import Context, open_theory
from scforget.errors import ConfigError
from scforget.exhibits import ablations, claims, fisher, fisher_more, guide, paper, paper_scatter, propositions, worlds
from scforget.progress import Progress
from scforget.report.figures import png_bytes, svg_text
from scforget.report.tables import to_csv
from scforget.results import Record

if TYPE_CHECKING:
    from matplotlib.figure import Figure

#: Whose latent spaces are shown beside each other; those that the pipeline has.
_MAPPED = ("original", "retain_finetune", "fisher_scrub", "partial_reset", "retrain")
_CRITICS = ("extragradient", "extragradient_published")
Draw = Callable[[], "Figure"]


class _Embedding(NamedTuple):
    """Makes the map of one population's latent space; picklable, as UMAP takes seconds each."""

    latent: FloatArray
    seed: int


def _embed(job: _Embedding) -> FloatArray:
    return utility.embedding(job.latent, seed=job.seed)


class Exhibition:
    """What the pictures of a project are drawn from."""

    def __init__(self, context: Context) -> None:
        self.context, self.workspace = context, context.workspace
        self.params = context.params
        if (own := self.params.theory.request) not in (known := self.params.pipeline.scenarios):
            why = f"{own!r} is not in pipeline.scenarios; there are {', '.join(known)}"
            raise ConfigError(self.workspace.params, "theory.request", why)
        self.audits = {
            (dataset, scenario): results.audits(self.workspace, dataset, scenario, self.params.pipeline.methods)
            for dataset in self.params.pipeline.datasets
            for scenario in self.params.pipeline.scenarios
        }

    def read(self, *parts: str) -> Any:
        """A record of another stage of this pipeline."""
        return artifacts.read_json(self.workspace.theory(*parts))

    def of_paper(self) -> Iterator[tuple[str, Draw]]:
        """The paper's pictures, each by its path without an ending."""
        for (dataset, scenario), audits in self.audits.items():
            folder, title = f"{dataset}/{scenario}", f"{dataset}, {scenario}"
            yield f"{folder}/advantage", partial(paper.advantage_bars, audits, title=title)
            yield f"{folder}/auc", partial(paper.auc_bars, audits, title=title)
            yield f"{folder}/attacks", partial(paper.attack_heatmap, audits, title=title)
            yield (
                f"{folder}/advantage_against_utility",
                partial(paper_scatter.advantage_against_utility, audits, title=title),
            )
            for key in ("membership", "trace"):
                yield f"{folder}/seeds_{key}", partial(paper_scatter.seed_boxes, audits, key, title=title)
            for method in _CRITICS:
                if method in audits:
                    yield f"{folder}/{method}", self._critics(dataset, scenario, method)
        for dataset in self.params.pipeline.datasets:
            own = {scenario: found for (one, scenario), found in self.audits.items() if one == dataset}
            yield f"{dataset}/forget_types", partial(paper_scatter.by_forget_type, own, title="By forget request")
            for control in ("same_group", "matched_knn"):
                yield (
                    f"{dataset}/requests_{control}",
                    partial(paper.place_bars, own, group=control, title=f"Advantage, {control} controls"),
                )
        if len(self.params.pipeline.datasets) > 1:
            for scenario in self.params.pipeline.scenarios:
                several = {one: found for (one, place), found in self.audits.items() if place == scenario}
                yield f"datasets_{scenario}", partial(paper.place_bars, several, title="Data sets side by side")

    def _critics(self, dataset: str, scenario: str, method: str) -> Draw:
        path = self.workspace.results("unlearn", dataset, scenario, method) / "history.csv"
        audits = self.audits[dataset, scenario]
        return partial(paper_scatter.extragradient_traces, artifacts.read_table(path), audits, method=method)

    def of_fisher(self) -> Iterator[tuple[str, Draw]]:
        """The Fisher analysis: every request, and more of the one that stands beside the paper's numbers."""
        requests, chosen = self.params.pipeline.scenarios, self.params.theory.request
        for dataset in self.params.pipeline.datasets:
            result = self.read("overlap", dataset, "result.json")
            scatter = artifacts.read_arrays(self.workspace.theory("overlap", dataset) / "scatter.npz")
            yield f"{dataset}/overlap_requests", partial(fisher.request_figure, result, requests)
            yield f"{dataset}/overlap_ladder", partial(fisher_more.ladder_figure, result, requests)
            for request in requests:
                yield f"{dataset}/{request}/overlap_layers", partial(fisher.layer_figure, result, request)
            for name, draw in (
                ("kinds", fisher.kind_figure), ("classifiers", fisher.classifier_figure),
                ("rank", fisher_more.rank_figure), ("factorisation", fisher_more.factorisation_figure),
            ):  # fmt: skip
                yield f"{dataset}/{chosen}/overlap_{name}", partial(draw, result, chosen)
            yield f"{dataset}/{chosen}/overlap_scatter", partial(fisher_more.scatter_figure, result, scatter, chosen)

    def claims(self) -> dict[str, pd.DataFrame]:
        """The paper's claims, data set by data set."""
        found, chosen = {}, self.params.theory.request
        for dataset in self.params.pipeline.datasets:
            more = {"features": self.read("ablation", dataset, "features.json")}
            if self.params.theory.ablation.conditional_scenario == chosen:
                more["conditional"] = self.read("ablation", dataset, "conditional.json")
            found[dataset] = claims.claims(self.read("overlap", dataset, "result.json"), more, request=chosen)
        return found

    def of_maps(self) -> Iterator[tuple[str, Draw]]:
        """Latent spaces before and after, of every data set's first request."""
        for dataset in self.params.pipeline.datasets:
            scenario = self.params.pipeline.scenarios[0]
            names = [name for name in _MAPPED if name in self.audits[dataset, scenario]]
            reference = artifacts.read_arrays(self.workspace.results("reference", dataset, scenario) / "scores.npz")
            jobs = [_Embedding(self._latent(dataset, scenario, name, reference), self.params.seed) for name in names]
            with Progress(f"maps of {dataset}", len(jobs), "maps") as progress:
                drawn = parallel.each(_embed, jobs, progress.advance)
            at = dict(zip(names, drawn, strict=True))
            labels, forget = reference["labels"], reference["forget"]
            title = f"{dataset}, {scenario}: latent means of one model each"
            yield (
                f"{dataset}/{scenario}/maps",
                partial(paper_scatter.latent_maps, at, labels, forget, title),
            )

    def _latent(self, dataset: str, scenario: str, name: str, reference: Mapping[str, Any]) -> FloatArray:
        if name in results.REFERENCES:
            return reference[f"{name}/latent"]
        scores = artifacts.read_arrays(self.workspace.results("audit", dataset, scenario, name) / "scores.npz")
        return scores[f"{name}/latent"]

    def of_ablations(self) -> Iterator[tuple[str, Draw]]:
        """What success depends on."""
        margins = self.params.audit.margins.model_dump()
        for dataset in self.params.pipeline.datasets:
            curves, grids = self.read("ablation", dataset, "curves.json"), self.read("ablation", dataset, "grids.json")
            sizes = self.read("ablation", dataset, "sizes.json")["rows"]
            features = self.read("ablation", dataset, "features.json")
            original = self.read("ablation", dataset, "result.json")["original"]
            seconds = self.read("ablation", dataset, "cost.json")["curves"]
            named = {_grid_name(rows): rows for rows in grids}
            if sizes:
                yield f"{dataset}/sizes", partial(ablations.size_figure, sizes, margins)
            if named:
                yield f"{dataset}/settings", partial(ablations.sensitivity_figure, named, original, margins)
            yield f"{dataset}/features", partial(ablations.feature_figure, features)
            for measure in ("distance", "membership", "elbo"):
                yield (
                    f"{dataset}/learning_{measure}",
                    partial(ablations.curve_figure, curves, seconds, curves[0][measure], measure),
                )

    def of_worlds(self) -> Iterator[tuple[str, Draw]]:
        """Propositions, and worlds whose truth is known."""
        record = self.read("proposition", "result.json")
        yield "proposition/convergence", partial(propositions.convergence, record["convergence"])
        simulated = record["simulated_bounds"]
        for outputs in sorted({row["outputs"] for row in simulated["profiles"]}):
            yield f"proposition/bounds_{outputs}", partial(propositions.bounds, simulated, outputs)
        first = [world for world in self.read("worlds", "result.json")["worlds"] if world["draw"] == 0]
        arrays = artifacts.read_arrays(self.workspace.theory("worlds") / "worlds.npz")
        yield "worlds/membership", partial(worlds.membership, first)
        yield "worlds/bound_against_likelihood", partial(worlds.bound_against_likelihood, first, arrays)
        for world in first:
            prefix = f"{world['world']}/0"
            if f"{prefix}/axis" in arrays:
                yield f"worlds/{world['world']}", partial(worlds.plane, arrays, prefix)

    def guided(self) -> pd.DataFrame:
        """Which method for which kind of request, of those that the pipeline ran."""
        kinds = {}
        for dataset, scenario in self.audits:
            request = self.params.datasets[dataset].scenarios[scenario]
            kinds[f"{dataset}/{scenario}"] = request.kind
        known = {place: kind for place, kind in kinds.items() if kind in guide.KINDS}
        return guide.guide({f"{d}/{s}": found for (d, s), found in self.audits.items() if f"{d}/{s}" in known}, known)


def _grid_name(rows: list[Record]) -> str:
    return f"{rows[0]['method']}: {' × '.join(rows[0]['values'])}"


class _Writer:
    """Draws one picture and writes it as PNG and as SVG; worker processes share the pictures."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def __call__(self, picture: tuple[str, Draw]) -> None:
        """Draw; the picture is on disk before the next is begun."""
        stem, draw = picture
        figure = draw()
        artifacts.write_bytes(self._folder / f"{stem}.png", png_bytes(figure))
        artifacts.write_bytes(self._folder / f"{stem}.svg", svg_text(figure).encode())


def _write(folder: Path, pictures: Iterator[tuple[str, Draw]], name: str) -> int:
    """Draw and write pictures on all cores."""
    every = list(pictures)
    with Progress(name, len(every), "pictures") as progress:
        parallel.each(_Writer(folder), every, progress.advance)
    return len(every)


def figures_stage() -> None:
    """Draw everything; each picture is on disk before the next is begun."""
    context = open_theory("figures")
    exhibition = Exhibition(context)
    folder, count = context.theory, 0
    claimed = exhibition.claims()
    for dataset, table in claimed.items():
        artifacts.write_bytes(folder / dataset / "claims.csv", to_csv(table).encode())
    artifacts.write_bytes(folder / "claims.md", claims.to_markdown(claimed).encode())
    for name in ("fisher", "ablations", "worlds", "paper", "maps"):
        count += _write(folder, getattr(exhibition, f"of_{name}")(), name)
    chosen = exhibition.guided()
    artifacts.write_bytes(folder / "guide.csv", to_csv(chosen).encode())
    artifacts.write_bytes(folder / "guide.md", guide.to_markdown(chosen).encode())
    verdicts = {
        dataset: {str(k): int(v) for k, v in table["verdict"].value_counts().items()}
        for dataset, table in claimed.items()
    }
    artifacts.write_json(folder / "result.json", {"pictures": count, "claims": verdicts})
    context.track()
