"""Error rates and power of whole audits, by simulation of the scores that models give to cells."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, replace
from functools import cache

import numpy as np
import pytest

from audit.simulating import SETTINGS, cell_groups, decided, judged, make_scene, population
from scforget.arrays import FloatArray
from scforget.audit import assess
from scforget.audit.scene import Population, Scene
from scforget.audit.verdict import Verdict

AUDITS = 200
FORGET, CONTROLS, ASIDE = 30, 30, 20
GROUPS, IS_ASIDE = cell_groups(FORGET, CONTROLS, ASIDE)


@dataclass(frozen=True)
class World:
    """How scores come about: score = cell + model + cell × model, each Gaussian; spreads and shifts in nats.

    Attributes
    ----------
    originals, unlearned, retrained
        Numbers of models.
    cell, model, noise
        Spread between cells, between models on all cells of the kind alike, and between models on each cell.
    members
        How much better unlearned models know the forget cells than retrained ones do.
    kind
        The same, of the whole kind: forget cells and controls.
    """

    originals: int = 8
    unlearned: int = 8
    retrained: int = 16
    cell: float = 32.7
    model: float = 1.6
    noise: float = 5.0
    members: float = 0.0
    kind: float = 0.0

    def draw(self, seed: int) -> tuple[Population, Scene]:
        """Return the unlearned models, and what they are audited against."""
        rng = np.random.default_rng(seed)
        cells = -500 + self.cell * rng.normal(size=len(IS_ASIDE))

        def scores(models: int, members: float, kind: float) -> FloatArray:
            effects = self.model * rng.normal(size=(models, 1)) + self.noise * rng.normal(size=(models, len(cells)))
            shift: FloatArray = cells + effects + kind * ~IS_ASIDE + members * GROUPS.forget
            return shift

        originals = population(scores(self.originals, 3 * SPREAD, 3 * SPREAD))
        target = population(scores(self.retrained, 0.0, 0.0))
        own = population(scores(self.unlearned, self.members, self.kind))
        # Four pairs of shadows, of which either half knows the cells that the other half does not.
        half = (rng.random((4, len(cells))) < 0.5) & ~IS_ASIDE
        knows = np.concatenate([half, ~half & ~IS_ASIDE])
        shadows = scores(8, 0.0, 0.0) + 3 * SPREAD * knows
        return own, make_scene(originals, target, GROUPS, IS_ASIDE, shadows, knows)


SPREAD = 5.25  # nats, of a cell's score between models: root of 1.6² + 5.0²
# Chosen so that models differ as the bundled data's do: AUC by 0.012, trace by 0.35.
FRESH = World()
# Shifts at which the mean AUC is 0.54 and the trace is 2.0, twice the margins.
REMEMBERED, KIND_REMEMBERED = World(members=4.7), World(kind=2 * SPREAD)
SCRUBBED = World(members=-5 * SPREAD)
# Models that differ so much that the margin of membership hardly matters.
NOISY = World(noise=30.0)


@cache
def rates(world: World) -> dict[Verdict, float]:
    """Share of each verdict in simulated audits."""
    counts = Counter(decided(*world.draw(seed)) for seed in range(AUDITS))
    return {verdict: counts[verdict] / AUDITS for verdict in Verdict}


def test_worlds_are_as_far_apart_as_said() -> None:
    """Means over simulated audits: the spreads of the bundled data, and shifts of twice the margins."""

    def statistics(world: World) -> dict[str, tuple[FloatArray, FloatArray]]:
        found = [assess._statistics(own, scene.target, GROUPS, SETTINGS) for own, scene in map(world.draw, range(40))]
        return {
            name: (np.array([one[name][0] for one in found]), np.array([one[name][1] for one in found]))
            for name in ("membership", "trace")
        }

    fresh, members, kind = (statistics(world) for world in (FRESH, REMEMBERED, KIND_REMEMBERED))
    assert fresh["membership"][1].std(axis=1, ddof=1).mean() == pytest.approx(0.012, abs=0.001)
    assert fresh["trace"][1].std(axis=1, ddof=1).mean() == pytest.approx(0.35, abs=0.03)
    for found, name, shift in ((members, "membership", 0.04), (kind, "trace", 2.0)):
        own, base = found[name]
        assert own.mean() - base.mean() == pytest.approx(shift, rel=0.1)


@pytest.mark.parametrize("world", [FRESH, NOISY], ids=["bundled", "noisy"])
def test_judge_calls_fresh_retrains_not_forgotten_in_at_most_five_percent(world: World) -> None:
    found = rates(world)
    assert found[Verdict.NOT_FORGOTTEN] <= 0.05, found
    assert found[Verdict.OVER_FORGOTTEN] <= 0.05, found


def test_judge_calls_equal_populations_forgotten_in_at_least_eighty_percent() -> None:
    assert rates(FRESH)[Verdict.FORGOTTEN] >= 0.8, rates(FRESH)


@pytest.mark.parametrize("world", [REMEMBERED, KIND_REMEMBERED], ids=["members", "kind"])
def test_judge_finds_a_leak_of_twice_the_margin_in_at_least_eighty_percent(world: World) -> None:
    assert rates(world)[Verdict.NOT_FORGOTTEN] >= 0.8, rates(world)


def test_judge_finds_over_scrubbed_models_in_at_least_eighty_percent() -> None:
    assert rates(SCRUBBED)[Verdict.OVER_FORGOTTEN] >= 0.8, rates(SCRUBBED)


@pytest.mark.parametrize(
    ("world", "verdict", "words"),
    [
        (FRESH, Verdict.FORGOTTEN, "Forgotten: nothing more of these 30 cells was found in 8 unlearned models"),
        (REMEMBERED, Verdict.NOT_FORGOTTEN, "Not forgotten: these very cells can still be told"),
        (KIND_REMEMBERED, Verdict.NOT_FORGOTTEN, "Not forgotten: these cells are not remembered, their kind is"),
        (SCRUBBED, Verdict.OVER_FORGOTTEN, "Over-forgotten: the models treat these cells as stranger"),
    ],
    ids=["fresh", "members", "kind", "scrubbed"],
)
def test_judge_says_what_its_deciding_parts_say(world: World, verdict: Verdict, words: str) -> None:
    """Whole records, of which the simulations above take only the verdict; a leak can fail to be seen once in a few."""
    right = 0
    for seed in range(3):
        own, scene = world.draw(seed)
        record = judged(own, scene)
        assert record["verdict"] == decided(own, scene)
        assert not record["nothing_to_forget"]
        assert record["utility"]["verdict"] == "kept"
        right += record["verdict"] == verdict and record["explanation"].startswith(words)
    assert right >= 2


def test_judge_of_few_models_is_undetermined_and_says_how_many_would_decide() -> None:
    own, scene = replace(FRESH, unlearned=3, retrained=6).draw(0)
    record = judged(own, scene)
    assert record["verdict"] == decided(own, scene) == Verdict.UNDETERMINED
    open_ones = {name: found for name, found in record["primary"].items() if found["side"] != "inside"}
    needed = max(found["models_needed"] for found in open_ones.values())
    assert needed > 1
    first = f"Undetermined: the evidence does not decide on {' and '.join(open_ones)}."
    assert record["explanation"].startswith(first)
    assert f"about {3 * needed} unlearned and {6 * needed} retrained models would decide" in record["explanation"]
    assert f"({30 * needed} to forget, {30 * needed} controls)" in record["explanation"]


@pytest.mark.parametrize("retrained", [2, 3])
def test_judge_of_few_retrains_seldom_gives_a_verdict(retrained: int) -> None:
    few = rates(replace(FRESH, unlearned=2, retrained=retrained))
    assert few[Verdict.UNDETERMINED] >= 0.8, few
    assert few[Verdict.NOT_FORGOTTEN] <= 0.05, few


def test_judge_of_two_retrains_is_undetermined_and_says_what_is_missing() -> None:
    """Each of two stands alone when the other is left out, so that there is no spread to measure the trace in."""
    own, scene = replace(FRESH, retrained=2).draw(0)
    record = judged(own, scene)
    assert record["verdict"] == decided(own, scene) == Verdict.UNDETERMINED
    assert "does not decide on" in record["explanation"]
    assert "At least 2 unlearned and 3 retrained models, trained independently, are needed." in record["explanation"]
