"""Several classifiers of one architecture, trained side by side: one pass through all of them for a batch of each.

A small net spends most of a step on calls, not on arithmetic, and K nets together make hardly more calls than one.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import numpy as np
import torch
from torch import Tensor, nn
from torch.func import functional_call, stack_module_state, vmap

from scforget import engine, seeding
from scforget.arrays import FloatArray, IntArray
from scforget.class_tasks import ClassBatch, ClassifierTask
from scforget.class_training import ClassTrainingSettings, class_batches, class_rates, new_optimiser
from scforget.errors import DataError, EmptyGroupError
from scforget.models.classifiers import Classifier
from scforget.training import Checkpoint, Effort, Epoch, Loop, Trained, descend

_PHASE = "fit"  # names the streams, as in fit_classifier
_ROW = ("train_loss", "train_accuracy")


class _Stack:
    """Nets that take the same number of steps an epoch, and so have one learning rate at each.

    Their parameters are leaves ``[K, …]``, of which one optimiser is that of each net, as it works entry by entry.
    """

    def __init__(  # noqa: PLR0917
        self, which: Sequence[int], models: Sequence[Classifier], cells_of_each: Sequence[IntArray],
        seeds: Sequence[int], task: ClassifierTask, settings: ClassTrainingSettings,
    ) -> None:  # fmt: skip
        self.which, self.task, self.settings = which, task, settings
        self.models = [models[k].train() for k in which]
        self.cells_of_each, self.seeds = [cells_of_each[k] for k in which], [seeds[k] for k in which]
        leaves, self.buffers = stack_module_state(self.models)
        # contiguous, as a checkpoint gives the optimiser's state back: of two layouts a fused step would mix entries
        self.parameters = {name: leaf.detach().contiguous().requires_grad_() for name, leaf in leaves.items()}
        self.optimiser = new_optimiser(self.parameters.values(), settings.optimiser)
        self.effort = Effort()

    def _answer(self, parameters: dict[str, Tensor], buffers: dict[str, Tensor], inputs: Tensor) -> Tensor:
        logits: Tensor = functional_call(self.models[0], (parameters, buffers), (inputs,))
        return logits

    def _each(self) -> Iterator[tuple[dict[str, Tensor], dict[str, Tensor]]]:
        """Parameters and buffers of each net, as views."""
        parameters, buffers = ([value.unbind() for value in own.values()] for own in (self.parameters, self.buffers))
        for k in range(len(self.models)):
            yield (
                dict(zip(self.parameters, (values[k] for values in parameters), strict=True)),
                dict(zip(self.buffers, (values[k] for values in buffers), strict=True)),
            )

    def logits(self, inputs: Sequence[Tensor]) -> Tensor:
        """Logits of each net for its own inputs ``[B_k, …]``, one net's below the other's: ``[Σ B_k, C]``.

        Batches of several sizes go through their nets one by one: padding would enter the statistics of a BatchNorm.
        """
        if len({len(one) for one in inputs}) == 1:
            return vmap(self._answer)(self.parameters, self.buffers, torch.stack(list(inputs))).flatten(0, 1)
        return torch.cat([self._answer(*own, one) for own, one in zip(self._each(), inputs, strict=True)])

    def step(self, batches: Sequence[ClassBatch]) -> FloatArray:
        """Take one step down each net's mean loss; return ``[2, K]``: sums of losses (nats), and how many were right.

        No net's loss depends on another's parameters, so the gradient of the sum of their means is that of each mean.
        """
        sizes, labels = [len(batch.labels) for batch in batches], torch.cat([batch.labels for batch in batches])
        with engine.autocast():
            logits = self.logits([batch.inputs for batch in batches])
        losses = self.task.cross_entropy(logits, labels)
        descend(self.optimiser, torch.stack([own.mean() for own in losses.split(sizes)]).sum(), self.effort)
        rows = torch.stack([losses.detach().double(), (logits.detach().argmax(1) == labels).double()]).cpu().numpy()
        return np.asarray(np.add.reduceat(rows, np.cumsum([0, *sizes[:-1]]), axis=1))

    def epoch(self, number: int) -> Epoch:
        """Make each net's epoch; return mean losses and accuracies on the way, under names that end in the net's."""
        size, sums = self.settings.batch_size, np.zeros((2, len(self.models)))
        noises = [seeding.torch_generator(seed, _PHASE, "epoch", number) for seed in self.seeds]
        orders = [class_batches(*own) for own in zip(self.cells_of_each, [size] * len(noises), noises, strict=True)]
        rates = class_rates(self.settings, len(self.cells_of_each[0]), number)
        self.effort.steps = (number - 1) * len(rates)
        for rate, *parts in zip(rates, *orders, strict=True):
            self.optimiser.param_groups[0]["lr"] = rate
            sums += self.step([self.task.batch(part, noise) for part, noise in zip(parts, noises, strict=True)])
        self._give_back()
        means = sums / [len(cells) for cells in self.cells_of_each]
        named = dict(zip(_ROW, means, strict=True))
        return {f"{name} {k}": float(row[i]) for name, row in named.items() for i, k in enumerate(self.which)}

    @torch.no_grad()
    def _give_back(self) -> None:
        """Write what was learned into the nets themselves."""
        for model, (parameters, buffers) in zip(self.models, self._each(), strict=True):
            model.load_state_dict(parameters | buffers)


def _check(models: Sequence[Classifier], cells_of_each: Sequence[IntArray], seeds: Sequence[int]) -> None:
    """Refuse what cannot be trained side by side."""
    what = "nets to train side by side"
    numbers = len(models), len(cells_of_each), len(seeds)
    if len(set(numbers)) > 1 or not models:
        raise DataError(what, "{} nets, {} lists of items, {} seeds".format(*numbers), "as many of each, at least 1")
    if len({id(model) for model in models}) < len(models):
        raise DataError(what, "one of them twice", "a net of its own for each seed")
    forms = [(type(net), {name: value.shape for name, value in net.state_dict().items()}) for net in models]
    if any(form != forms[0] for form in forms):
        raise DataError(what, "several architectures", "one")
    rates = {part.p for model in models for part in model.modules() if isinstance(part, nn.Dropout) and part.p}
    if rates:
        why = "no dropout, whose masks are drawn net by net; or to train one by one (together: 1)"
        raise DataError(what, f"dropout {max(rates):g}", why)
    for k, cells in enumerate(cells_of_each):
        if not len(cells):
            raise EmptyGroupError(f"items of net {k}", 0, "at least 1")


def _stacks(
    models: Sequence[Classifier], cells_of_each: Sequence[IntArray], seeds: Sequence[int], task: ClassifierTask,
    settings: ClassTrainingSettings,
) -> list[_Stack]:  # fmt: skip
    """Sort the nets by their number of steps an epoch."""
    steps = [len(class_rates(settings, len(cells), 1)) for cells in cells_of_each]
    each = ([k for k, own in enumerate(steps) if own == number] for number in sorted(set(steps)))
    return [_Stack(which, models, cells_of_each, seeds, task, settings) for which in each]


def _row(joint: Epoch, k: int) -> Epoch:
    """Row of one net's history."""
    return {"epoch": joint["epoch"], **{name: joint[f"{name} {k}"] for name in _ROW}}


def fit_together(
    models: Sequence[Classifier], task: ClassifierTask, cells_of_each: Sequence[IntArray],
    settings: ClassTrainingSettings, *, seeds: Sequence[int], checkpoint: Checkpoint | None = None,
    cell_set: str = "retain", on_epoch: Callable[[list[Epoch]], None] | None = None,
) -> list[Trained]:  # fmt: skip
    """Train K nets in place, each as :func:`~scforget.class_training.fit_classifier` would alone, up to rounding.

    Parameters
    ----------
    models
        K of one architecture, without dropout.
    cells_of_each
        K lists ``[N_k]`` of items to train on. Nets whose lists make different numbers of steps are not computed
        together, nor is a step in which batches differ in size: the last one of an epoch.
    seeds
        K; each names every random stream of its net's run, whichever other nets are trained with it.
    checkpoint
        Of all K nets together, saved after each epoch; a saved state is taken up.
    cell_set
        Under which name the passes are counted.
    on_epoch
        Called with the K rows of each finished epoch (for progress).

    Returns
    -------
    list of Trained
        In the order of ``models``, all in eval mode, each with its own history and effort.

    Raises
    ------
    DataError
        Of nets that differ, of numbers of nets, lists and seeds that do, of dropout, of an empty list.
    NonFiniteError
        If a loss of any net is NaN or infinite; trained one by one, the others would end well.
    """
    _check(models, cells_of_each, seeds)
    if not settings.epochs:
        return [Trained(model.eval()) for model in models]
    loop = Loop(nn.ModuleList(models), seed=seeds[0], checkpoint=checkpoint)
    stacks = _stacks(models, cells_of_each, seeds, task, settings)

    def epoch(number: int, _noise: torch.Generator) -> Epoch:
        return {key: value for stack in stacks for key, value in stack.epoch(number).items()}

    loop.run(
        _PHASE, epoch, settings.epochs, parts={str(i): stack.optimiser for i, stack in enumerate(stacks)},
        on_epoch=on_epoch and (lambda joint: on_epoch([_row(joint, k) for k in range(len(models))])),
    )  # fmt: skip
    trained = []
    for k, (model, cells) in enumerate(zip(models, cells_of_each, strict=True)):
        effort = Effort(settings.epochs * len(class_rates(settings, len(cells), 1)))
        effort.count(cell_set, settings.epochs * len(cells))
        trained.append(Trained(model, [_row(joint, k) for joint in loop.history], effort))
    return trained
