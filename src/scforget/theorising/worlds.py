"""The stages that need no cells: the propositions on designs that fulfil them, and worlds whose truth is known."""

from __future__ import annotations

import time

from scforget import artifacts, parallel
from scforget.context import open_theory
from scforget.progress import Progress
from scforget.theory import propositions
from scforget.theory.worlds import Worlds


def proposition_stage() -> None:
    """Check Proposition 1 and Corollary 2: exactly, by their rate of convergence, and by adversaries."""
    context = open_theory("proposition")
    started = time.perf_counter()
    record = propositions.run(context.params.theory.proposition, context.seed())
    artifacts.write_json(context.theory / "result.json", record)
    artifacts.write_json(context.theory / "cost.json", {"seconds": time.perf_counter() - started})
    context.track()


def worlds_stage() -> None:
    """Unlearn in mixtures of Gaussians, where the truth about every point is known."""
    context = open_theory("worlds")
    started = time.perf_counter()
    worlds = Worlds(context.params.theory.worlds, context.seed())
    with Progress(context.item.name, len(worlds.items), "worlds") as progress:
        found = parallel.each(worlds.make, worlds.items, progress.advance, context.warm_up)
    record, arrays = worlds.combine(found)
    artifacts.write_arrays(context.theory / "worlds.npz", arrays)
    artifacts.write_json(context.theory / "result.json", record)
    artifacts.write_json(context.theory / "cost.json", {"seconds": time.perf_counter() - started})
    context.track()
