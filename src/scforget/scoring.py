"""From models on disk to what the audit needs of them: scores of cells, utility, embeddings."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from scipy import sparse

from scforget import artifacts, families, loading, parallel, seeding
from scforget.arrays import BoolArray, FloatArray, IntArray
from scforget.artifacts import Workspace
from scforget.attacks import gene_list, mlp
from scforget.attacks.references import References
from scforget.audit import assess, utility
from scforget.audit.classification import ClassScene
from scforget.audit.scene import Groups, Population, Scene
from scforget.data import controls
from scforget.errors import ArtifactError, EmptyGroupError
from scforget.families import Family
from scforget.models.mixture import Model
from scforget.models.vae import VAE
from scforget.progress import Progress
from scforget.schema import Params
from scforget.tasks import Signals

CONTROLS = ("same_group", "matched_knn", "all_unseen")


@dataclass(frozen=True)
class Scored:
    """What is known of one model: of a population, one row of each array."""

    seed: int
    scores: dict[str, FloatArray]
    attackers: FloatArray
    utility: dict[str, dict[str, float]]
    latent: FloatArray


def stacked(models: Sequence[Scored]) -> dict[str, Any]:
    """What a population is made from; its latent means are the first model's."""
    return {
        "seeds": [model.seed for model in models],
        "scores": {name: np.stack([model.scores[name] for model in models]) for name in models[0].scores},
        "utility": [model.utility for model in models],
        "latent": models[0].latent.astype(np.float32),
        "attackers": np.stack([model.attackers for model in models]),
    }


def _models(folder: Path) -> list[Path]:
    """Models of a population in the order of their seeds."""
    paths = sorted(folder.glob("*.safetensors"), key=lambda path: int(path.stem))
    if len(paths) < 2:
        raise EmptyGroupError(str(folder), f"{len(paths)} models", "at least 2 to know how much models differ")
    return paths


class BaseScorer(ABC):
    """Scores populations of models of one family on the forget, unseen and aside cells of one scenario.

    Parameters
    ----------
    family
        Of the models.
    workspace, params
        Of the project.
    dataset, scenario
        Names in params.yaml.

    Attributes
    ----------
    cells : ``[n]``
        The scored cells: forget cells first, then all unseen ones, then those set aside.
    labels, names, donors : ``[n]``
        Their labels and names; whose each one is, empty where that is not known. Set by the family's own scorer.
    forget, unseen, aside : ``[n]`` bool
        Which is which.
    attacker
        The published attack's net, once it is there (:meth:`train_published`); of VAEs alone.
    """

    labels: npt.NDArray[np.str_]
    names: npt.NDArray[np.str_]
    donors: npt.NDArray[np.str_]

    def __init__(
        self, family: Family, workspace: Workspace, params: Params, dataset: str, scenario: str
    ) -> None:  # fmt: skip
        self._settings = family.audit(params)
        self._primary = family.primary
        self._seed = params.seed
        self._name = f"{dataset} {scenario}"
        self._scenario = family.scenario(workspace, dataset, scenario)
        sets, forget = family.sets(workspace, dataset), self._scenario.sets.forget
        self.cells: IntArray = np.concatenate([forget, sets.unseen, sets.aside])
        self.forget, self.unseen, self.aside = (
            np.repeat(which, [len(forget), len(sets.unseen), len(sets.aside)]) for which in np.eye(3, dtype=bool)
        )
        self._same_group: BoolArray = self.unseen & np.isin(self.cells, self._scenario.controls)
        self.attacker: mlp.PublishedAttacker | None = None

    @abstractmethod
    def _signals(self, path: Path) -> Any:
        """What a model says of the scored cells."""

    @abstractmethod
    def _features(self, signals: Any) -> FloatArray:
        """What the learned attack sees of the scored cells, ``[n, D]``."""

    @abstractmethod
    def _score(self, path: Path) -> Scored:
        """Score one model."""

    def _matched_by(self, signals: Any) -> FloatArray:
        """Where the scored cells lie, ``[n, Z]``, for the controls that are neighbours."""
        latent: FloatArray = signals.latent
        return latent

    def _stack(self, models: list[Any]) -> Population:
        return Population(**stacked(models), primary=self._primary)

    def _attack(self, signals: Any, known: Any) -> tuple[dict[str, FloatArray], FloatArray]:
        """Scores of every attack that looks at one model by itself, and the learned one's for each attacker seed."""
        settings = self._settings
        scores: dict[str, FloatArray] = {}
        for name, attack in settings.model_attacks.items():
            scores |= attack.run(signals, known, settings.of(name))
        learned = mlp.mlp(
            self._features(signals), self.forget, self._same_group, settings.of("mlp"),
            seeding.derive(self._seed, "mlp", self._name),
        )  # fmt: skip
        scores["mlp"] = learned.scores
        return scores, learned.per_attacker

    def populations(self, *folders: Path, meanwhile: Callable[[], None] | None = None) -> list[Population]:
        """Score every model of some folders on all cores, models in the order of their seeds; see ``parallel.each``."""
        groups = [_models(folder) for folder in folders]
        with Progress(f"scoring {self._name}", sum(map(len, groups))) as progress:
            every = [path for paths in groups for path in paths]
            scored = iter(parallel.each(self._score, every, progress.advance, meanwhile))
        return [self._stack([next(scored) for _ in paths]) for paths in groups]

    def population(self, folder: Path) -> Population:
        """Score every model of a folder, one after the other."""
        return self._stack([self._score(path) for path in _models(folder)])

    def groups(self, folder: Path) -> Groups:
        """Forget cells and the three kinds of control among the scored cells; neighbours by the first original.

        Neighbours are in its latent space; of a VAE under ``protocol: published``, by one draw of each posterior.
        """
        latent = self._matched_by(self._signals(_models(folder)[0]))
        matched = self.unseen.copy()
        matched[self.unseen] = controls.matched_knn(
            latent[self.forget], latent[self.unseen], self._settings.matched_neighbours
        )
        return Groups(self.forget, dict(zip(CONTROLS, (self._same_group, matched, self.unseen), strict=True)))

    def shuffled(self, folder: Path) -> dict[str, float]:
        """AUC of the learned attack on the first model of a folder when the labels mean nothing."""
        settings = self._settings.of("mlp")
        return mlp.shuffled_label_null(
            self._features(self._signals(_models(folder)[0])), self.forget, self._same_group, settings,
            seeding.derive(self._seed, "shuffled", self._name), settings.shuffled_draws,
        )  # fmt: skip

    def train_published(self, folder: Path, groups: Groups) -> mlp.PublishedAttacker | None:  # noqa: ARG002
        """Train the published attack's net, in a family that has one, and use it from now; else None."""
        return None

    def gene_list(self) -> FloatArray | None:
        """``[n]``: how typical each cell is of the modelled genes, before any model; None where there is no such."""
        return None

    def references(self, retrains: FloatArray, shadows: list[Path]) -> References:
        """Retrains and shadow models on the scored cells, for the attacks that need them."""
        return References(retrains, *self._shadows(shadows, self.cells), self.aside)

    def _shadows(self, paths: list[Path], cells: IntArray) -> tuple[FloatArray, BoolArray]:
        """``[S, n]`` each: shadow models' primary scores of some cells, and which model was trained on which."""
        scores, members = [], []
        for path in paths:
            block = artifacts.read_arrays(path)
            place = np.full(int(max(block["cells"].max(), cells.max())) + 1, -1)
            place[block["cells"]] = np.arange(len(block["cells"]))
            if missing := int((place[cells] < 0).sum()):
                why = f"{missing} cells of {self._name} are not in it; run the shadows stage again"
                raise ArtifactError(path, why)
            scores.append(block[self._primary][:, place[cells]])
            members.append(block["members"][:, place[cells]])
        return np.concatenate(scores), np.concatenate(members)

    def scene(self, originals: Population, retrains: Population, groups: Groups, shadows: list[Path]) -> Scene:
        """What every population of the scenario is judged against."""
        references, settings = self.references(retrains.score, shadows), self._settings
        return Scene(
            assess.with_references(originals, references, settings, own=False),
            assess.with_references(retrains, references, settings, own=True),
            groups, references, self.labels, self.names, self.donors,
        )  # fmt: skip

    def more(self, own: Population, scene: Scene, target: Mapping[str, Any] | None) -> dict[str, Any]:  # noqa: ARG002
        """What records of the family alone hold; ``target`` is the retrains' record, None where it is made."""
        return {}


class Scorer(BaseScorer):
    """Scores VAEs; see :class:`BaseScorer`."""

    def __init__(self, workspace: Workspace, params: Params, dataset: str, scenario: str) -> None:
        super().__init__(families.VAES, workspace, params, dataset, scenario)
        cells, genes, markers = loading.load_cells(workspace, dataset)
        self._samples_latent = params.protocol == "published"
        self._task = loading.make_task(cells, genes, params.datasets[dataset].model)
        self._markers = np.flatnonzero(np.isin(genes, markers)).astype(np.int64)
        self.labels = cells.obs["label"].astype(str).to_numpy()[self.cells].astype(np.str_)
        self.names = cells.obs_names.to_numpy()[self.cells].astype(np.str_)
        known = cells.obs["donor"].astype(str).to_numpy() if "donor" in cells.obs else np.full(cells.n_obs, "")
        self.donors = known[self.cells].astype(np.str_)
        self._raw, self._modelled = sparse.csr_matrix(cells.X), np.isin(cells.var_names, genes)

    def _signals(self, path: Path) -> Signals:
        return self._task.signals(loading.load_model(self._task, path), self.cells)

    def _features(self, signals: Signals) -> FloatArray:
        return mlp.attack_features(signals)

    def _features_as_published(self, model: VAE) -> FloatArray:
        """What the published attacker sees, of one draw of each posterior; a mixture has no single one."""
        noise = seeding.torch_generator(self._seed, "published attacker", self._name)
        with torch.no_grad():
            return self._task.features(model, self._task.batch(self.cells), noise).double().cpu().numpy()

    def _score(self, path: Path) -> Scored:
        model = loading.load_model(self._task, path)
        signals = self._task.signals(model, self.cells)
        scores, attackers = self._attack(signals, self._task.signals(model, self._scenario.sets.retain))
        if self.attacker is not None and isinstance(model, VAE):
            scores["published_mlp"] = self.attacker.score(self._features_as_published(model))
        return Scored(int(path.stem), scores, attackers, self._utility(model, signals), signals.mu)

    def _matched_by(self, signals: Signals) -> FloatArray:
        latent = signals.latent
        if self._samples_latent:
            noise = seeding.numpy_generator(self._seed, "matched", self._name)
            latent = latent + np.exp(0.5 * signals.log_var) * noise.standard_normal(latent.shape)
        return latent

    def train_published(self, folder: Path, groups: Groups) -> mlp.PublishedAttacker:
        """Train the published attack's net on the first original, as the single-cell paper did, and use it from now."""
        features = self._features_as_published(loading.load_original(self._task, _models(folder)[0]))
        seed = seeding.derive(self._seed, "published attacker", self._name)
        self.attacker = mlp.fit_published(features, groups.forget, groups.controls["matched_knn"], seed)
        return self.attacker

    def gene_list(self) -> FloatArray | None:
        """``[n]``: how typical each cell is of the modelled genes, before any model; None when all genes are."""
        if self._modelled.all():
            return None
        counts = self._raw[self.cells]
        totals = np.maximum(np.asarray(counts.sum(axis=1)).ravel(), 1.0)
        expression = sparse.csr_matrix(sparse.diags(np.median(totals) / totals) @ counts).log1p()
        return gene_list.gene_list(expression, self._modelled)

    def _utility(self, model: Model, signals: Signals) -> dict[str, dict[str, float]]:
        """Utility on unseen cells outside the forgotten kind, and inside it."""
        unseen, group = self.unseen, self._scenario.group[self.cells]
        if group[unseen].all():  # scattered: no kind is forgotten, every unseen cell counts as outside
            group = np.zeros_like(group)
        places = {"outside": unseen & ~group, "inside": unseen & group}
        return {name: self._utility_of(model, signals, mask) for name, mask in places.items() if mask.any()}

    def _utility_of(self, model: Model, signals: Signals, mask: BoolArray) -> dict[str, float]:
        cells, mu, labels = self.cells[mask], signals.mu[mask], self.labels[mask]
        expressed = self._task.batch(cells).inputs[:, torch.from_numpy(self._markers)].double().cpu().numpy()
        decoded = self._task.decoded_means(model, cells, self._markers)
        found = {
            "elbo": float(signals.elbo[mask].mean()),
            "kl": float(signals.kl[mask].mean()),
            "marker_r": utility.marker_correlation(expressed, decoded),
            **utility.latent_agreement(mu, labels, seed=self._seed),
            **utility.cell_type_accuracy(mu, labels, seed=self._seed),
            **utility.posterior_predictive(self._task.counts[cells].toarray(), *self._task.predicted(model, cells)),
        }
        return {name: value for name, value in found.items() if np.isfinite(value)}


def read_scene(folder: Path) -> Scene:
    """Read back what the ``reference`` stage left: what every population of a scenario is judged against."""
    arrays = artifacts.read_arrays(folder / "scores.npz")
    records = artifacts.read_json(folder / "result.json")
    primary = records["original"].get("score", "elbo")

    def part(name: str) -> dict[str, npt.NDArray[Any]]:
        return {key.removeprefix(f"{name}/"): v for key, v in arrays.items() if key.startswith(f"{name}/")}

    def population(name: str) -> Population:
        scores = part(name)
        latent, attackers = scores.pop("latent"), scores.pop("attackers")
        return Population(records[name]["seeds"], scores, records[name]["utility_rows"], latent, attackers, primary)

    originals, retrains = population("original"), population("retrain")
    groups = Groups(arrays["forget"], {name: arrays[name] for name in CONTROLS})
    shadows, trained = part("shadow"), part("trained")
    references = References(retrains.score, shadows[primary], shadows["members"], arrays["aside"])
    known = originals, retrains, groups, references, arrays["labels"], arrays["names"], arrays["donors"]
    return ClassScene(*known, trained=References(**trained)) if trained else Scene(*known)


def read_attacker(folder: Path) -> mlp.PublishedAttacker:
    """Read back the published attack's net."""
    arrays = artifacts.read_arrays(folder / "scores.npz")
    kept = {key.removeprefix("attacker/"): v for key, v in arrays.items() if key.startswith("attacker/")}
    return mlp.PublishedAttacker.from_arrays(kept)


def scene_arrays(scene: Scene) -> dict[str, npt.NDArray[Any]]:
    """What :func:`read_scene` reads back."""
    arrays: dict[str, npt.NDArray[Any]] = {
        "forget": scene.groups.forget,
        "aside": scene.references.aside,
        **scene.groups.controls,
    }
    arrays |= {"labels": scene.labels, "names": scene.names, "donors": scene.donors}
    arrays |= {f"shadow/{scene.target.primary}": scene.references.shadows, "shadow/members": scene.references.members}
    if isinstance(scene, ClassScene):
        arrays |= {f"trained/{key}": values for key, values in vars(scene.trained).items()}
    for name, population in (("original", scene.originals), ("retrain", scene.target)):
        arrays |= population_arrays(name, population)
    return arrays


def population_arrays(name: str, population: Population) -> dict[str, npt.NDArray[Any]]:
    """Arrays of one population, each under its name."""
    arrays: dict[str, npt.NDArray[Any]] = {f"{name}/{key}": values for key, values in population.scores.items()}
    return {**arrays, f"{name}/latent": population.latent, f"{name}/attackers": population.attackers}
