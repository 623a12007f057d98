"""Curvature of the mean loss without its matrix: Gauss-Newton products, conjugate gradients and the Newton step."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Literal

import torch
from torch import Tensor, nn
from torch.func import functional_call, jvp, vjp

from scforget import engine, seeding
from scforget.arrays import IntArray
from scforget.errors import EmptyGroupError, NonFiniteError
from scforget.models.likelihoods import LOG_INVERSE_DISPERSION_LIMIT, nb_log_prob, zinb_log_prob
from scforget.models.vae import VAE, Batch
from scforget.tasks import VaeTask
from scforget.training import Effort, Epoch, Loop

#: ``v -> A v`` for a symmetric positive definite A; ``[P]`` float64 in and out.
Product = Callable[[Tensor], Tensor]
#: What the network says of some cells, by name: ``logits``, ``log_r``, ``zero`` (each ``[B, G]``, where the
#: likelihood reads them), ``mu`` and ``log_var`` (``[B, Z]``).
Answers = dict[str, Tensor]

_BATCH = 512


def require_finite(tensors: Iterable[Tensor], step: int, name: str) -> None:
    """Raise :class:`~scforget.errors.NonFiniteError` if any number is NaN or infinite."""
    if not all(bool(torch.isfinite(tensor).all()) for tensor in tensors):
        raise NonFiniteError(step, name)


class ConjugateGradients(nn.Module):
    """State of the solution of A x = b from x = 0 (Hestenes and Stiefel 1952), as a part that a loop can save.

    Parameters
    ----------
    b : ``[P]``
        Right-hand side; kept in float64, as everything here.

    Attributes
    ----------
    x, remainder, direction : ``[P]``
        The solution so far, b − A x, and where the next step goes; no direction is left when b is 0, and when
        rounding hides that A is positive definite.
    taken
        Steps so far.
    """

    x: Tensor
    remainder: Tensor
    direction: Tensor
    norm: Tensor
    taken: Tensor

    def __init__(self, b: Tensor) -> None:
        super().__init__()
        b = b.detach().double()
        self.register_buffer("x", torch.zeros_like(b))
        self.register_buffer("remainder", b.clone())
        self.register_buffer("direction", b.clone())
        self.register_buffer("norm", b.norm())
        self.register_buffer("taken", torch.zeros((), dtype=torch.int64, device=b.device))

    @property
    def residual(self) -> float:
        """‖b − A x‖/‖b‖; 0 for b = 0."""
        return float(self.remainder.norm() / self.norm) if self.norm else 0.0

    def finished(self, tolerance: float) -> bool:
        """Whether the relative residual is small enough, or no direction is left."""
        return self.residual <= tolerance or not bool(self.direction.any())

    def step(self, product: Product) -> None:
        """Take one step.

        Raises
        ------
        NonFiniteError
            If A p is NaN or infinite.
        """
        image = product(self.direction)
        curvature = float(self.direction @ image)
        if not math.isfinite(curvature):
            raise NonFiniteError(0, "the curvature of the loss")
        if curvature <= 0:
            self.direction.zero_()
            return
        before = float(self.remainder @ self.remainder)
        self.x += (before / curvature) * self.direction
        self.remainder -= (before / curvature) * image
        self.direction *= float(self.remainder @ self.remainder) / before
        self.direction += self.remainder
        self.taken += 1


def conjugate_gradients(
    product: Product, b: Tensor, iterations: int, tolerance: float, *, loop: Loop | None = None
) -> ConjugateGradients:  # fmt: skip
    """Solve A x = b for a symmetric positive definite A given by its products.

    Parameters
    ----------
    b : ``[P]``
        Right-hand side.
    iterations : >= 0
        How many products at most; 0 leaves x = 0.
    tolerance : in (0, 1)
        Stop where ‖b − A x‖ <= tolerance·‖b‖, by the recurrence's own remainder.
    loop
        Saves each step, as a phase of its own, so that a killed process goes on from it.
    """
    solver = ConjugateGradients(b)

    def epoch(_number: int, _noise: torch.Generator) -> Epoch:
        solver.step(product)
        return {"residual": solver.residual}

    for number in range(1, iterations + 1):
        if solver.finished(tolerance):
            break
        if loop is None:
            solver.step(product)
        else:
            loop.run(f"conjugate gradients {number}", epoch, 1, parts={"solver": solver})
    return solver


def newton_step(
    model: nn.Module, product: Product, gradient: Tensor, *,
    damping: float, iterations: int, tolerance: float, loop: Loop | None = None,
) -> ConjugateGradients:  # fmt: skip
    """Move a model in place by one damped Newton step, θ ← θ − (G + d·I)⁻¹ ∇L(θ).

    Parameters
    ----------
    product
        v ↦ G v, with a positive semi-definite G.
    gradient : ``[P]``
        ∇L(θ), in the order of ``model.parameters()``.
    damping
        d > 0.

    Returns
    -------
    ConjugateGradients
        Holds the step as ``x``, and how well it solves the system.

    Raises
    ------
    NonFiniteError
        If the gradient, the curvature or the parameters after the step are NaN or infinite.

    Notes
    -----
    Where L is a quadratic function, G its Hessian and d·I the Hessian of its penalty, the result is the exact
    minimum: ridge regression without the cells left out.
    """
    require_finite([gradient], 0, "the gradient on the retained cells")
    solver = conjugate_gradients(lambda v: product(v) + damping * v, gradient, iterations, tolerance, loop=loop)
    with torch.no_grad():
        for parameter, change in zip(model.parameters(), unflatten(solver.x, model), strict=True):
            parameter.sub_(change)
    require_finite(model.parameters(), 1, "the parameters after the Newton step")
    return solver


def flatten(values: Iterable[Tensor]) -> Tensor:
    """Put the numbers of some tensors into one float64 vector ``[P]``."""
    return torch.cat([value.detach().double().ravel() for value in values])


def unflatten(vector: Tensor, model: nn.Module) -> list[Tensor]:
    """Cut a vector ``[P]`` into pieces of the shapes and dtypes of the model's parameters."""
    parameters = list(model.parameters())
    pieces = vector.split([parameter.numel() for parameter in parameters])
    return [piece.reshape(p.shape).to(p.dtype) for piece, p in zip(pieces, parameters, strict=True)]


def _squared_score(batch: Batch, answers: Mapping[str, Tensor], log_mean: Tensor) -> Tensor:
    """(∂ log p(x)/∂ log r)² of each observed count, ``[B, G]``."""
    log_r = answers["log_r"].detach().requires_grad_()
    if "zero" in answers:
        log_prob = zinb_log_prob(batch.counts, log_mean, log_r, answers["zero"])
    else:
        log_prob = nb_log_prob(batch.counts, log_mean, log_r)
    return torch.autograd.grad(log_prob.sum(), log_r)[0].square()


def weigh(
    likelihood: Literal["nb", "zinb", "log_mse"], batch: Batch, answers: Mapping[str, Tensor],
    tangent: Mapping[str, Tensor],
) -> Answers:  # fmt: skip
    """Multiply a change of the answers by H, a positive semi-definite curvature of each cell's loss in its answers.

    Parameters
    ----------
    answers, tangent
        See :data:`Answers`; detached.

    Returns
    -------
    dict
        H times ``tangent``, by name.

    Notes
    -----
    H is block-diagonal: the blocks are the answers.

    - KL to the prior: its Hessian, 1 for μ and σ²/2 for log σ².
    - ``log_mse``, logits: 2 L² K K with K = diag(s) − s sᵀ the Jacobian of the softmax s and L the cell's sum of
      log1p values; the residual's own curvature is left out, as always in Gauss-Newton.
    - ``nb``, logits: Cᵀ diag(w) C with C = I − 1 sᵀ the Jacobian of the log-softmax and w = μ r/(μ + r), the
      expected information in log μ. log r: the squared score. Mean and dispersion are orthogonal parameters of the
      negative binomial (Cox and Reid 1987), so the expected block between them is 0.
    - ``zinb``: as if it were known which zeros are inflated (complete data): w weighted by 1 − π, and π(1 − π) for
      the zero logits. That is never less than the expected information of the counts alone. log r: the squared
      score, without its blocks to the other two, which are not 0 here.
    """
    found = {"mu": tangent["mu"], "log_var": 0.5 * answers["log_var"].exp() * tangent["log_var"]}
    logits, change = answers["logits"], tangent["logits"]
    shares = logits.softmax(-1)
    centred = change - (shares * change).sum(-1, keepdim=True)
    if likelihood == "log_mse":
        scaled = 2 * batch.inputs.sum(-1, keepdim=True).square() * shares * centred
        return found | {"logits": shares * (scaled - (shares * scaled).sum(-1, keepdim=True))}
    log_mean = logits.log_softmax(-1) + batch.library.log()
    log_r = answers["log_r"].clamp(-LOG_INVERSE_DISPERSION_LIMIT, LOG_INVERSE_DISPERSION_LIMIT)
    weight = (log_mean + log_r - torch.logaddexp(log_mean, log_r)).exp()
    if "zero" in answers:
        inflated = answers["zero"].sigmoid()
        weight = weight * (1 - inflated)
        found["zero"] = inflated * (1 - inflated) * tangent["zero"]
    weighted = weight * centred
    found["logits"] = weighted - shares * weighted.sum(-1, keepdim=True)
    found["log_r"] = _squared_score(batch, answers, log_mean) * tangent["log_r"]
    return found


class _Network(nn.Module):
    """The answers of a VAE as a module's forward pass, so that its parameters can be replaced by dual numbers."""

    def __init__(self, model: VAE) -> None:
        super().__init__()
        self.model = model

    def forward(self, batch: Batch, noise: Tensor) -> Answers:
        mu, log_var = self.model.encode(batch.inputs)
        decoded = self.model.decode(mu + (0.5 * log_var).exp() * noise, batch.condition)
        answers = {"mu": mu, "log_var": log_var, "logits": decoded.logits}
        if self.model.settings.likelihood != "log_mse":
            answers["log_r"] = decoded.log_inverse_dispersion
        if decoded.zero_logits is not None:
            answers["zero"] = decoded.zero_logits
        return answers


class GaussNewton:
    """Gradient of the mean loss over some cells, and products with its Gauss-Newton matrix, at a model's parameters.

    Parameters
    ----------
    model
        In eval mode; :attr:`product` follows its parameters if they change.
    cells : ``[N]``, N > 0
        The set S.
    draws : >= 1
        Fixed latent draws per cell: L_S is the mean over cells and over these draws.
    seed
        Names the stream of the draws.
    effort
        Counts every pass, as one over retained cells.

    Notes
    -----
    G = mean over cells and draws of Jᵀ H J: J is the Jacobian of a cell's answers (:data:`Answers`) in the
    parameters, through the latent draw too, and H that of :func:`weigh`. G is never formed: J v comes from forward-
    mode and Jᵀ u from reverse-mode differentiation, a batch of cells at a time (Schraudolph 2002).
    """

    def __init__(
        self, model: VAE, task: VaeTask, cells: IntArray, *, draws: int, seed: int, effort: Effort
    ) -> None:  # fmt: skip
        if not len(cells):
            raise EmptyGroupError("Gauss-Newton", "0 cells", "at least one")
        self._network, self._task, self._cells = _Network(model.eval()), task, cells
        self._draws, self._seed, self._effort = draws, seed, effort

    def _parts(self) -> Iterator[tuple[Batch, torch.Generator]]:
        """Batches, each as often as there are draws, with the stream of the draw: the same one in every pass."""
        noise = seeding.torch_generator(self._seed, "gauss-newton")
        for start in range(0, len(self._cells), _BATCH):
            batch = self._task.batch(self._cells[start : start + _BATCH])
            for _ in range(self._draws):
                yield batch, noise

    def _mean(self, totals: Iterable[Tensor], forward: int) -> Tensor:
        passes = self._draws * len(self._cells)
        self._effort.count("retain", passes, forward=forward)
        return flatten(totals) / passes

    def gradient(self) -> Tensor:
        """∇L_S, ``[P]``: one forward and one backward pass of each cell and draw."""
        model = self._network.model
        totals = [torch.zeros_like(parameter) for parameter in model.parameters()]
        for batch, noise in self._parts():
            loss = self._task.loss(model, batch, noise).total.sum()
            each = torch.autograd.grad(loss, list(model.parameters()), allow_unused=True, materialize_grads=True)
            totals = [total + value for total, value in zip(totals, each, strict=True)]
        return self._mean(totals, forward=1)

    def product(self, vector: Tensor) -> Tensor:
        """Return G v, ``[P]``, for a vector ``[P]``: two forward passes (one carries J v along) and a backward pass."""
        values = {name: parameter.detach() for name, parameter in self._network.named_parameters()}
        tangents = dict(zip(values, unflatten(vector, self._network), strict=True))
        totals = {name: torch.zeros_like(value) for name, value in values.items()}
        for batch, noise in self._parts():
            eps = engine.normal((len(batch.inputs), self._task.settings.latent), noise)
            for name, value in self._one(batch, eps, values, tangents).items():
                totals[name] += value
        return self._mean(totals.values(), forward=2)

    def _one(
        self, batch: Batch, noise: Tensor, values: dict[str, Tensor], tangents: dict[str, Tensor]
    ) -> dict[str, Tensor]:  # fmt: skip
        def answer(parameters: dict[str, Tensor]) -> Answers:
            found: Answers = functional_call(self._network, parameters, (batch, noise))
            return found

        with warnings.catch_warnings():
            # torch's first dual number loads rules that torch itself wrote in deprecated TorchScript
            warnings.filterwarnings("ignore", "`torch.jit.script", DeprecationWarning)
            change: Answers = jvp(answer, (values,), (tangents,))[1]
        answers, pull_back = vjp(answer, values)[:2]
        weighed = weigh(self._network.model.settings.likelihood, batch, answers, change)
        ordered = {name: weighed[name] for name in answers}
        back: dict[str, Tensor] = pull_back(ordered, retain_graph=False, create_graph=False)[0]
        return back
