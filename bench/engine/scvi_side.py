"""scvi-tools on the same cells: its own `train`, timed by a callback, so that setting up a trainer does not count."""

from __future__ import annotations

import logging
import time
import warnings
from typing import Any

import numpy as np
import torch
from bench.engine import cells
from bench.engine.measuring import peak_mb
from lightning.pytorch.callbacks import Callback

from scforget.models.likelihoods import nb_log_prob
from scforget.models.vae import gaussian_kl

DRAWS = 5


class _Clock(Callback):
    """Seconds of each epoch; after each, the answer of ``evaluate``, which does not count."""

    def __init__(self, evaluate: Any = None) -> None:
        self.seconds: list[float] = []
        self.elbo: list[float] = []
        self._evaluate = evaluate

    def on_train_epoch_start(self, *_: object) -> None:
        self._start = time.perf_counter()

    def on_train_epoch_end(self, *_: object) -> None:
        self.seconds.append(time.perf_counter() - self._start)
        if self._evaluate is not None:
            self.elbo.append(self._evaluate())
            line = f"scvi: epoch {len(self.seconds)}, {sum(self.seconds):.0f} s, held-out ELBO {self.elbo[-1]:.2f}"
            print(line, flush=True)


class Scvi:
    """scVI with one hidden layer, as wide as gives the published number of parameters.

    Under this likelihood its library encoder and its dropout head are never used. They count in none of its time, so
    that a net of as many parameters in all is a third smaller at work.

    Parameters
    ----------
    idle
        Count the parameters that are never used, too.
    switched
        With oneDNN's matrix products, one line of torch.
    train
        How many cells to train on.
    """

    def __init__(
        self, path: str, threads: int, switched: bool = False, train: int = cells.TRAIN, idle: bool = False
    ) -> None:
        import scvi
        from anndata import AnnData

        warnings.simplefilter("ignore")  # not ours to mend
        for name in ("lightning.pytorch", "lightning.fabric", "scvi"):
            logging.getLogger(name).setLevel(logging.ERROR)
        torch.set_num_threads(threads)
        if switched:
            torch.backends.mkldnn.matmul.fp32_precision = "bf16"
        scvi.settings.seed = cells.SEED
        counts = cells.load(path).astype(np.float32)
        self._held_out, self._train, self._idle = counts[cells.TRAIN :], train, idle
        self._model_class = scvi.model.SCVI
        self._data = AnnData(X=counts[:train])
        self._model_class.setup_anndata(self._data)
        few, many = (self._parameters(self._new(width)) for width in (100, 200))
        self.width = round(100 + 100 * (self._wanted() - few) / (many - few))  # their number is linear in the width
        self.model = self._new(self.width)

    def _new(self, width: int) -> Any:
        return self._model_class(
            self._data, n_hidden=width, n_latent=cells.LATENT, n_layers=1, dropout_rate=cells.DROPOUT,
            dispersion="gene-cell", gene_likelihood="nb", use_layer_norm="both", use_batch_norm="none",
        )  # fmt: skip

    def _parameters(self, model: Any) -> int:
        unused = () if self._idle else ("l_encoder.", "decoder.px_dropout_decoder.")
        return sum(value.numel() for name, value in model.module.named_parameters() if not name.startswith(unused))

    def _wanted(self) -> int:
        from bench.engine.naive import Net

        return sum(parameter.numel() for parameter in Net(self._data.n_vars, 0.0).parameters())

    def _fit(self, epochs: int, clock: _Clock) -> None:
        self.model.train(
            max_epochs=epochs, accelerator="cpu", devices=1, train_size=1.0, batch_size=cells.BATCH,
            # the whole ELBO from the first epoch on, as in what it is compared with
            plan_kwargs={"lr": cells.LEARNING_RATE, "n_epochs_kl_warmup": None},
            enable_progress_bar=False, enable_model_summary=False, logger=False, callbacks=[clock],
        )  # fmt: skip

    def epoch(self) -> float:
        """Train for an epoch; seconds a step."""
        clock = _Clock()
        self._fit(1, clock)
        return clock.seconds[0] * cells.BATCH / self._train

    def curve(self, epochs: int) -> list[list[float]]:
        """Train a new model; after each epoch its seconds so far and its held-out ELBO."""
        self.model = self._new(self.width)
        clock = _Clock(self._elbo)
        self._fit(epochs, clock)
        return [[float(s), e] for s, e in zip(np.cumsum(clock.seconds), clock.elbo, strict=True)]

    @torch.no_grad()
    def _elbo(self) -> float:
        """Held-out ELBO over draws of z by the formula that our own is scored with, nats a cell."""
        module, total = self.model.module, 0.0
        module.eval()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(cells.SEED)
            for start in range(0, self._held_out.shape[0], 512):
                counts = torch.from_numpy(self._held_out[start : start + 512].toarray())
                one_batch = torch.zeros(len(counts), 1)
                for _ in range(DRAWS):
                    inferred = module.inference(counts, one_batch)
                    posterior = inferred["qz"]
                    found = module.generative(inferred["z"], inferred["library"], one_batch)["px"]
                    each = nb_log_prob(counts, found.mu.log(), found.theta.log()).double().sum(-1)
                    kl = gaussian_kl(posterior.loc, 2 * posterior.scale.log()).double().sum(-1)
                    total += float((each - kl).sum())
        module.train()
        return total / DRAWS / self._held_out.shape[0]

    def facts(self) -> dict[str, Any]:
        """Width, parameters, how many of them get a gradient under this likelihood, peak memory and torch's switch."""
        learning = sum(p.numel() for p in self.model.module.parameters() if p.grad is not None)
        every = sum(p.numel() for p in self.model.module.parameters())
        return {"n_hidden": self.width, "n_layers": 1, "parameters": every, "parameters_with_gradient": learning,
                "peak_mb": peak_mb(), "torch_switch": torch.backends.mkldnn.matmul.fp32_precision}  # fmt: skip
