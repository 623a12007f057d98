"""The product, through the functions that its own stages call."""

from __future__ import annotations

import time
from dataclasses import asdict
from typing import Any

import numpy as np
import torch
from bench.engine import cells, naive
from bench.engine.measuring import peak_mb, profile

from scforget import engine, fisher, parallel, private, seeding, training
from scforget.models.vae import VAE, VAESettings
from scforget.tasks import VaeTask
from scforget.training import Effort, TrainingSettings

DP_BATCH, SIGMA, CLIP = 256, 0.5, 1.0
DRAWS = 5  # of each held-out cell's posterior


def configure(numerics: str, threads: int) -> None:
    """Choose how this process computes: ``fp32`` or ``bf16``, with the matrix products that a stage would choose."""
    settings = engine.NumericsSettings(
        matrix_products="auto", autocast="bf16" if numerics == "bf16" else "none", device="cpu", threads=threads
    )
    torch.set_num_threads(threads)  # choosing multiplies matrices
    engine.use(engine.choose(settings, cells.BATCH * cells.GENES * cells.HIDDEN[0]))


def make_task(path: str) -> VaeTask:
    """All cells and the published architecture."""
    counts = cells.load(path)
    settings = VAESettings(
        hidden=cells.HIDDEN, latent=cells.LATENT, likelihood="nb", dispersion="gene-cell", dropout=cells.DROPOUT
    )
    return VaeTask(counts, np.asarray(counts.sum(axis=1), dtype=np.float64).ravel(), settings)


def recipe(batch: int) -> TrainingSettings:
    """Plain Adam on the ELBO."""
    return TrainingSettings(
        learning_rate=cells.LEARNING_RATE, schedule="constant", batch_size=batch, max_epochs=1, patience=1,
        kl_warmup_epochs=0, free_bits=0.0,
    )  # fmt: skip


class Ours:
    """One model in training.

    Parameters
    ----------
    numerics, threads
        See :func:`configure`.
    without, train
        Leave out that many of the first cells, as a retrain does, of that many to train on.
    """

    def __init__(
        self, path: str, threads: int, numerics: str = "fp32", without: int = 0, train: int = cells.TRAIN
    ) -> None:
        configure(numerics, threads)
        self.baseline = peak_mb()
        self.task = make_task(path)
        everyone = np.arange(self.task.counts.shape[0])
        self.train, self.held_out = everyone[without:train], everyone[cells.TRAIN :]
        self.model: VAE = self.task.new_model(cells.SEED)
        self.optimiser = training.adam(self.model, cells.LEARNING_RATE)
        self.effort, self.noise = Effort(), seeding.torch_generator(cells.SEED, "bench")
        self.source = seeding.torch_generator(cells.SEED, "bench", "privacy")

    def _some(self, n: int) -> np.ndarray:
        return self.train[torch.randperm(len(self.train), generator=self.noise)[:n].numpy()]

    def _pass(self, chosen: np.ndarray, batch: int) -> float:
        start = time.perf_counter()
        training.train_epoch(
            self.model, self.task, chosen, recipe(batch), self.optimiser, self.noise, self.effort
        )  # fmt: skip
        return time.perf_counter() - start

    def steps(self, n: int, batch: int = cells.BATCH) -> float:
        """Train on so many batches; seconds a step."""
        return self._pass(self._some(n * batch), batch) / n

    def profile(self, n: int) -> dict[str, Any]:
        """What the steps spend their time in."""
        return profile(lambda: self.steps(n), n)

    def epoch(self, batch: int = cells.BATCH) -> dict[str, float]:
        """Train for a whole epoch; its seconds, and the held-out ELBO at z = μ and over draws of z, nats a cell."""
        seconds = self._pass(self.train, batch)
        self.model.eval()
        return {"seconds": seconds, "elbo": training.mean_elbo(self.task, self.model, self.held_out),
                "elbo_of_draws": self._elbo_of_draws()}  # fmt: skip

    @torch.no_grad()
    def _elbo_of_draws(self) -> float:
        noise, total = seeding.torch_generator(cells.SEED, "bench", "evaluation"), 0.0
        for start in range(0, len(self.held_out), 512):
            batch = self.task.batch(self.held_out[start : start + 512])
            for _ in range(DRAWS):
                total -= float(self.task.loss(self.model, batch, noise).total.double().sum())
        return total / DRAWS / len(self.held_out)

    def private_steps(self, n: int) -> float:
        """Take private steps on batches of 256; seconds a step."""
        mechanism = private.Mechanism(CLIP, SIGMA, DP_BATCH / len(self.train), DP_BATCH, n)
        parameters = dict(self.model.named_parameters())
        self.model.train()
        chosen = self._some(n * DP_BATCH).reshape(n, DP_BATCH)
        start = time.perf_counter()
        for part in chosen:
            private.step(
                self.model, self.optimiser, parameters,
                lambda part=part: self.task.loss(self.model, self.task.batch(part), self.noise).total,
                mechanism=mechanism, source=self.source, effort=self.effort,
            )  # fmt: skip
        return (time.perf_counter() - start) / n

    def retrain(self, epochs: int) -> list[list[float]]:
        """Train a new model by one cycle.

        Returns
        -------
        list
            After each epoch the seconds so far, and the held-out ELBO at z = μ and over draws of z, nats a cell.
        """
        curve: list[list[float]] = []
        self.model = self.task.new_model(cells.SEED)
        cycle = {"schedule": "one_cycle", "learning_rate": cells.CYCLE_RATE, "max_epochs": epochs, "patience": epochs}
        settings = recipe(cells.BATCH).model_copy(update=cycle)
        optimiser, spent = training.adam(self.model, settings.learning_rate), 0.0
        for number in range(1, epochs + 1):
            start = time.perf_counter()
            with seeding.scope(cells.SEED, "bench", "retrain", number) as noise:
                training.train_epoch(
                    self.model, self.task, self.train, settings, optimiser, noise, self.effort,
                    rates=training.rates(settings, len(self.train), number), beta=min(1.0, number / cells.KL_WARM_UP),
                )  # fmt: skip
            spent += time.perf_counter() - start
            self.model.eval()
            curve.append([spent, training.mean_elbo(self.task, self.model, self.held_out), self._elbo_of_draws()])
            print(f"ours: epoch {number} of {epochs}, {spent:.0f} s, held-out ELBO {curve[-1][1]:.2f}", flush=True)
        return curve

    def fisher(self, n: int | None = None) -> float:
        """Seconds a cell of the diagonal of n cells, or of all but those that a retrain goes without."""
        chosen = self.train[:n]
        start = time.perf_counter()
        fisher.diagonal(self.model, self.task, chosen, draws=1, seed=cells.SEED)
        return (time.perf_counter() - start) / len(chosen)

    def fisher_error(self, n: int) -> dict[str, float]:
        """Relative error of the diagonal, of all parameters together and of the worst tensor.

        Against a loop in float64 over plain torch's form of the same model, at the same draws.
        """
        chosen = self.train[:n]
        found = fisher.diagonal(self.model, self.task, chosen, draws=1, seed=cells.SEED)
        net = naive.Net(self.task.counts.shape[1], 0.0).double()
        net.load_state_dict(self.model.state_dict())
        counts = torch.from_numpy(self.task.counts[chosen].toarray()).double()
        # in float32 as drawn there: float64 would take other numbers from the stream
        noise = torch.randn(n, cells.LATENT, generator=seeding.torch_generator(cells.SEED, "fisher"))
        wanted = naive.squares_of_each_cell(net, counts, noise.double())
        off = {name: found[name].double() - value for name, value in wanted.items()}
        norms = torch.tensor([[float(off[name].norm()), float(wanted[name].norm())] for name in wanted])
        together = norms.norm(dim=0)
        return {"together": float(together[0] / together[1]), "worst": float((norms[:, 0] / norms[:, 1]).max())}

    def facts(self) -> dict[str, Any]:
        """Parameters, peak memory, and what the process computed with."""
        return {
            "parameters": sum(parameter.numel() for parameter in self.model.parameters()),
            "peak_mb": peak_mb(), "baseline_mb": self.baseline, "numerics": asdict(engine.current()),
            "torch_switch": torch.backends.mkldnn.matmul.fp32_precision,
        }  # fmt: skip


class Member:
    """Trains one of several models for a few steps; sent to worker processes."""

    def __init__(self, task: VaeTask, steps: int) -> None:
        self._task, self._steps = task, steps

    def __call__(self, seed: int) -> float:
        """Return the last mean loss."""
        model = self._task.new_model(seed)
        chosen = np.arange(self._steps * cells.BATCH)
        with seeding.scope(seed, "bench") as noise:
            row = training.train_epoch(
                model, self._task, chosen, recipe(cells.BATCH), training.adam(model, cells.LEARNING_RATE), noise,
                Effort(),
            )  # fmt: skip
        return float(row["train_loss"])


class Ensemble:
    """Several models: ``together`` in processes of one thread, or one after another on all threads.

    Never both in one process: what is forked must not have run several threads before.
    """

    def __init__(self, path: str, threads: int, together: bool) -> None:
        configure("fp32", 1 if together else threads)
        self._together, self._task = together, make_task(path)

    def train(self, models: int, steps: int) -> float:
        """Train that many models; seconds."""
        member, start = Member(self._task, steps), time.perf_counter()
        if self._together:
            parallel.each(member, range(models), lambda: None)
        else:
            for seed in range(models):
                member(seed)
        return time.perf_counter() - start


class Growth:
    """One epoch on some cells, with the memory that it took."""

    def __init__(self, path: str, threads: int) -> None:
        configure("fp32", threads)
        self._baseline, self._path = peak_mb(), path

    def epoch(self, most_steps: int | None) -> dict[str, float]:
        """Time an epoch, or estimate it from a number of steps."""
        task = make_task(self._path)
        (n, genes), loaded = task.counts.shape, peak_mb()
        model, effort, noise = task.new_model(cells.SEED), Effort(), seeding.torch_generator(cells.SEED, "bench")
        optimiser = training.adam(model, cells.LEARNING_RATE)

        def train(chosen: np.ndarray) -> float:
            start = time.perf_counter()
            training.train_epoch(model, task, chosen, recipe(cells.BATCH), optimiser, noise, effort)
            return (time.perf_counter() - start) / len(chosen)

        train(np.arange(5 * cells.BATCH))
        seconds = n * train(np.arange(n)[: most_steps and most_steps * cells.BATCH])
        return {
            "cells": n, "genes": genes, "nonzeros": task.counts.nnz, "epoch_seconds": seconds, "peak_mb": peak_mb(),
            "loaded_mb": loaded, "above_baseline_mb": peak_mb() - self._baseline,
            "dense_counts_mb": n * genes * 4 / 2**20,
        }  # fmt: skip
