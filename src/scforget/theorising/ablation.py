"""The stage of ablations: what an unlearning method's success depends on, one thing after the other."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import TypeVar

from scforget import artifacts, loading, parallel
from scforget.context import open_theory
from scforget.errors import ConfigError
from scforget.models.vae import VAE
from scforget.progress import Progress
from scforget.results import Record
from scforget.settings import Settings
from scforget.tasks import VaeTask
from scforget.theorising.arena import Arena, make_all
from scforget.theory import ablations, attackers, curves, sizes, variants
from scforget.theory.judging import RETRAINS, Case, Judge, make_case
from scforget.theory.variants import Variant

JobT = TypeVar("JobT")
ResultT = TypeVar("ResultT")
PLAIN, CONDITIONAL = "plain", "conditional"


class Ablation:
    """One data set's ablations, each a record of its own.

    Raises
    ------
    ConfigError
        If a request is not part of the pipeline, whose retrained models judge.
    """

    def __init__(self, arena: Arena) -> None:
        self._arena, self._settings = arena, arena.settings.ablation
        self._params, self._seed = arena.context.params, arena.context.seed()
        known, own = self._params.pipeline.scenarios, self._settings
        for name in (own.scenario, own.conditional_scenario, *own.feature_scenarios):
            if name not in known:
                why = (
                    f"{name!r} is not in pipeline.scenarios, whose retrained models judge; there are {', '.join(known)}"
                )
                raise ConfigError(arena.context.workspace.params, "theory.ablation", why)
        self._originals = arena.originals()
        self.judge = self._judge(self._settings.scenario)
        self.starts = [self.judge.case.score(original) for original in self._originals]

    def _each(self, what: str, function: Callable[[JobT], ResultT], jobs: Sequence[JobT]) -> list[ResultT]:
        with Progress(f"{self._arena.context.item.name} {what}", len(jobs), "jobs") as progress:
            return parallel.each(function, jobs, progress.advance)

    def _methods(self, names: Sequence[str]) -> dict[str, Settings]:
        return {name: getattr(self._params.unlearn, name) for name in names}

    def _judge(self, scenario: str) -> Judge:
        """By the pipeline's retrained models of a request."""
        arena, workspace = self._arena, self._arena.context.workspace
        case = self._case(scenario)
        made = artifacts.read_json(workspace.results("retrain", arena.dataset, scenario) / "result.json")["seeds"]
        folder = workspace.work("retrain", arena.dataset, scenario)
        scored = [
            case.score(loading.load_model(arena.task, folder / f"{seed}.safetensors"), row["passes"])
            for seed, row in made.items()
        ]
        return Judge(case, scored, self._params.audit, self._seed)

    def _case(self, scenario: str, task: VaeTask | None = None, original: VAE | None = None) -> Case:
        found, neighbours = self._arena.scenario(scenario), self._params.audit.matched_neighbours
        task, original = task or self._arena.task, original or self._originals[0]
        return make_case(task, found, self._arena.sets.unseen, original, neighbours)

    def sizes(self) -> Record:
        """How much is remembered of forget sets of every size, of one cluster and scattered."""
        arena, settings, audit = self._arena, self._settings.sizes, self._params.audit
        if not settings.sizes:
            return {"rows": [], "contrasts": []}
        methods = self._methods(settings.methods)
        recipe = self._params.datasets[arena.dataset].training
        cases = sizes.size_cases(
            arena.task, arena.obs, arena.sets, self._originals[0], settings=settings, audit=audit, seed=self._seed
        )
        jobs = sizes.size_jobs(cases, self._originals, recipe, methods, settings=settings, seed=self._seed)
        made = self._each("sizes", ablations.make, jobs)
        return sizes.size_rows(cases, self._originals, jobs, made, settings=settings, audit=audit, seed=self._seed)

    def grids(self) -> list[list[Record]]:
        """Each method by its settings."""
        found = []
        for grid in self._settings.grids:
            base = getattr(self._params.unlearn, grid.method)
            jobs = ablations.grid_jobs(self.judge.case, self._originals, base, grid, self._seed)
            made = self._each(f"{grid.method} {' '.join(grid.grid)}", ablations.make, jobs)
            found.append(ablations.grid_rows(self.judge, self.starts, jobs, made, grid))
        return found

    def features(self) -> dict[str, list[Record]]:
        """The learned attack by what it sees, on originals; of each request."""
        found = {}
        for scenario in self._settings.feature_scenarios:
            judge = self._judge(scenario)
            starts = [judge.case.score(original) for original in self._originals]
            jobs = attackers.feature_attacks(judge, starts, self._params.audit.of("mlp"), self._seed)
            found[scenario] = attackers.feature_rows(judge, starts, self._each("features", attackers.attack, jobs))
        return found

    def curves(self) -> tuple[list[Record], list[Record]]:
        """What every method has reached, epoch by epoch; passes, and apart from them seconds."""
        settings, case, arena = self._settings.curves, self.judge.case, self._arena
        recipe = self._params.datasets[arena.dataset].training
        seeds = [arena.context.seed("curves", run) for run in range(settings.runs)]
        jobs = ablations.scratch_jobs(case, ablations.RETRAIN, recipe, seeds)
        for method, own in self._methods(settings.methods).items():
            jobs += ablations.method_jobs(case, method, own, self._originals[: settings.runs], self._seed)
        made = self._each("curves", partial(curves.record, growth=settings.growth), jobs)
        return curves.curve_rows(self.judge, jobs, made)

    def conditional(self) -> Record:
        """Whether scrubbing works better where the decoder is told each cell's group."""
        arena, name = self._arena, self._settings.conditional_scenario
        task, sets = arena.tasks()[CONDITIONAL], arena.scenario(name).sets
        full = arena.trained(CONDITIONAL, task)
        made = make_all(arena.context.item.name, {CONDITIONAL: full}, arena.seeds)[CONDITIONAL]
        retrained = arena.trained(f"{CONDITIONAL} without {name}", task, sets)
        seeds = range(max(RETRAINS, self._settings.conditional_retrains))
        targets = make_all(arena.context.item.name, {retrained.name: retrained}, seeds)[retrained.name]
        case = self._case(name, task, made[0])
        judge = Judge(case, [case.score(model) for model in targets], self._params.audit, self._seed)
        kinds = {PLAIN: Variant(self._judge(name), self._originals), CONDITIONAL: Variant(judge, made)}
        methods = self._methods(self._settings.conditional_methods)
        jobs = variants.variant_jobs(kinds, methods, self._seed)
        models = variants.variant_models(kinds, methods, jobs, self._each("scrubbed", ablations.make, jobs))
        attacks = variants.variant_attacks(kinds, models, self._params.audit.of("mlp"), self._seed)
        return variants.variant_rows(kinds, models, self._each("attacks", attackers.attack, attacks))


def ablation_stage(dataset: str) -> None:
    """Run every ablation of a data set; a record of each is on disk before the next begins."""
    started = time.perf_counter()
    context = open_theory("ablation", dataset)
    found = Ablation(Arena(context))
    rows, seconds = found.curves()
    artifacts.write_json(context.theory / "curves.json", rows)
    for make in (found.features, found.conditional, found.grids, found.sizes):
        artifacts.write_json(context.theory / f"{make.__name__}.json", make())
    original = found.judge.judge(found.starts, found.starts)
    named = context.params.theory.ablation.scenario
    artifacts.write_json(context.theory / "result.json", {"scenario": named, "original": original})
    artifacts.write_json(context.theory / "cost.json", {"seconds": time.perf_counter() - started, "curves": seconds})
    context.track()
