"""The NB likelihood with its gradient written out, against the elementwise form under autograd: time and error.

    python bench/likelihood.py

Both are timed in turns in one run, on one thread, forward and backward, on simulated counts of the bundled data's shape
and of the published network's, and each against float64. Then whole epochs of the default recipe, and the same with
batches sliced from sparse counts instead of kept dense. Prints a table.
"""

from __future__ import annotations

import time
from collections.abc import Callable

import numpy as np
import torch
from scipy import sparse
from torch import Tensor

from scforget import tasks
from scforget.models.likelihoods import nb_log_likelihood, nb_log_prob
from scforget.models.vae import VAE, Batch, Decoded, VAESettings
from scforget.tasks import VaeTask
from scforget.training import TrainingSettings, fit

Form = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]
TURNS = 15


def elementwise(counts: Tensor, logits: Tensor, log_library: Tensor, log_r: Tensor) -> Tensor:
    """What is replaced."""
    return nb_log_prob(counts, logits.log_softmax(-1) + log_library, log_r).sum(-1)


FORMS: dict[str, Form] = {"elementwise": elementwise, "written out": nb_log_likelihood}


def simulated(cells: int, genes: int, nonzero: float) -> Tensor:
    """Counts with about that share of nonzeros."""
    rng = np.random.default_rng(0)
    counts = rng.poisson(rng.gamma(0.5, 2.0, (cells, genes))) + 1
    return torch.from_numpy((counts * (rng.uniform(size=counts.shape) < nonzero)).astype(np.float32))


def gradients(form: Form, counts: Tensor, logits: Tensor, log_r: Tensor) -> tuple[Tensor, ...]:
    """Gradients in logits and log r of the summed likelihood."""
    inputs = logits.clone().requires_grad_(), log_r.clone().requires_grad_()
    log_library = counts.sum(-1, keepdim=True).clamp(min=1).log()
    return torch.autograd.grad(form(counts, inputs[0], log_library, inputs[1]).sum(), inputs)


def in_turns(jobs: dict[str, Callable[[], object]]) -> dict[str, float]:
    """Median milliseconds of each job, timed in turns after one turn that does not count."""
    times: dict[str, list[float]] = {name: [] for name in jobs}
    for _ in range(TURNS + 1):
        for name, job in jobs.items():
            start = time.perf_counter()
            job()
            times[name].append(1e3 * (time.perf_counter() - start))
    return {name: float(np.median(values[1:])) for name, values in times.items()}


def line(what: str, times: dict[str, float], errors: dict[str, float] | None = None) -> None:
    """Print one comparison."""
    slow, fast = times["elementwise"], times["written out"]
    error = "" if errors is None else "   gradient's relative error " + ", ".join(f"{e:.1e}" for e in errors.values())
    print(f"{what:44s} {slow:8.2f} ms -> {fast:8.2f} ms, x {slow / fast:.2f}{error}")


def losses(cells: int, genes: int, nonzero: float) -> None:
    """Loss and gradient alone."""
    counts = simulated(cells, genes, nonzero)
    generator = torch.Generator().manual_seed(0)
    logits, log_r = (torch.randn(counts.shape, generator=generator) for _ in range(2))
    exact = torch.cat(gradients(elementwise, *(t.double() for t in (counts, logits, log_r))))
    errors = {
        name: float((torch.cat(gradients(form, counts, logits, log_r)).double() - exact).norm() / exact.norm())
        for name, form in FORMS.items()
    }
    jobs = {name: lambda form=form: gradients(form, counts, logits, log_r) for name, form in FORMS.items()}
    line(f"loss, {cells} cells x {genes} genes, {nonzero:.0%} nonzero", in_turns(jobs), errors)


def recipe(batch: int) -> TrainingSettings:
    """Two epochs."""
    return TrainingSettings(
        learning_rate=1e-3, schedule="constant", batch_size=batch, max_epochs=2, patience=9, kl_warmup_epochs=0,
        free_bits=0.0,
    )  # fmt: skip


def make_task(cells: int, genes: int, nonzero: float, hidden: list[int]) -> VaeTask:
    """A task on simulated counts."""
    counts = sparse.csr_matrix(simulated(cells, genes, nonzero).numpy())
    settings = VAESettings(hidden=hidden, latent=16, likelihood="nb", dispersion="gene-cell", dropout=0.1)
    return VaeTask(counts, np.asarray(counts.sum(axis=1), dtype=np.float64).ravel(), settings)


def slicing(cells: int, genes: int, nonzero: float, hidden: list[int], batch: int) -> None:
    """Whole epochs, with batches sliced from sparse counts and from dense ones."""
    kept, everyone = tasks._DENSE_BYTES["cpu"], np.arange(cells)
    found = {}
    for name, limit in (("sliced", 0), ("dense", kept)):
        tasks._DENSE_BYTES["cpu"] = limit
        found[name] = make_task(cells, genes, nonzero, hidden)
        found[name].batch(everyone[:1])  # decides how it keeps them
    tasks._DENSE_BYTES["cpu"] = kept

    def train(task: VaeTask) -> None:
        fit(task.new_model(0), task, everyone[cells // 10 :], everyone[: cells // 10], recipe(batch), seed=0)

    times = in_turns({name: lambda task=task: train(task) for name, task in found.items()})
    ratio = times["sliced"] / times["dense"]
    line = f"{times['sliced']:8.2f} ms -> {times['dense']:8.2f} ms, x {ratio:.2f}"
    print(f"{'2 epochs, sparse counts sliced or kept dense':44s} {line}")


def epochs(cells: int, genes: int, nonzero: float, hidden: list[int], batch: int) -> None:
    """Whole epochs of training."""
    task = make_task(cells, genes, nonzero, hidden)
    fast, everyone = VAE.reconstruction, np.arange(cells)

    def slow(_model: VAE, batch: Batch, decoded: Decoded) -> Tensor:
        return elementwise(batch.counts, decoded.logits, batch.library.log(), decoded.log_inverse_dispersion)

    def train(method: Callable[[VAE, Batch, Decoded], Tensor]) -> None:
        VAE.reconstruction = method  # type: ignore[method-assign]
        fit(task.new_model(0), task, everyone[cells // 10 :], everyone[: cells // 10], recipe(batch), seed=0)

    times = in_turns({"elementwise": lambda: train(slow), "written out": lambda: train(fast)})
    VAE.reconstruction = fast  # type: ignore[method-assign]
    line(f"2 epochs, {cells} cells x {genes} genes, net {'-'.join(map(str, hidden))}", times)


def main() -> None:
    """Compare and print."""
    torch.set_num_threads(1)
    losses(32, 500, 0.26)
    losses(128, 2000, 0.1)
    epochs(350, 500, 0.26, [256, 64], 32)
    slicing(350, 500, 0.26, [256, 64], 32)
    epochs(1408, 2000, 0.1, [1024, 512, 128], 128)


if __name__ == "__main__":
    main()
