"""How arithmetic is chosen, checked and switched; what half precision changes, and what it must not."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from pydantic import ValidationError
from torch import Tensor

from scforget import engine, seeding
from scforget.arrays import IntArray
from scforget.class_tasks import AugmentationSettings, ClassBatch, ClassifierTask
from scforget.class_training import AdamSettings, class_epoch, new_optimiser
from scforget.engine import ComputeSettings, Numerics, NumericsSettings
from scforget.errors import ConfigError
from scforget.models.classifiers import SmallCNNSettings
from scforget.models.vae import VAE
from scforget.pipeline import Inputs, Item
from scforget.populations import Population
from scforget.tasks import VaeTask
from scforget.training import Effort, TrainingSettings, adam, train_epoch

SETTINGS: dict[str, Any] = {"matrix_products": "auto", "autocast": "none", "device": "cpu", "threads": 1}
PLAIN, HALF = Numerics("mkl", "none", "cpu", 1), Numerics("mkl", "bf16", "cpu", 1)
LARGE, SMALL = 128 * 2000 * 1024, 32 * 60 * 16
AMD = ("AuthenticAMD", frozenset({"fma", "avx2", "avx512f"}))
LIMIT = 2e-6  # of the self-check
CPUINFO = """processor\t: 0
vendor_id\t: AuthenticAMD
flags\t\t: fpu avx2 avx512f
bugs\t\t:

processor\t: 1
vendor_id\t: AuthenticAMD
flags\t\t: fpu avx2 avx512f
"""

Recipe = Callable[..., dict[str, Any]]


@pytest.fixture(autouse=True)
def _as_before() -> Iterator[None]:
    """Put back what the process computes with, and forget what was found out under patches."""
    current, scheduler = engine._current, engine._scheduler
    threads, precision = torch.get_num_threads(), precision_switch()
    yield
    engine._current, engine._scheduler = current, scheduler
    torch.set_num_threads(threads)
    torch.backends.mkldnn.matmul.fp32_precision = precision  # type: ignore[attr-defined]
    engine.product_error.cache_clear()


@pytest.fixture
def amd(monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine on which oneDNN pays, and is as accurate."""
    monkeypatch.setattr(engine, "_flags", lambda: AMD)
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: True)
    monkeypatch.setattr(engine, "product_error", fixed_error(5e-7))


@pytest.fixture
def rounding(monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine on which oneDNN does round operands to bfloat16, as AMX would."""
    state, product = {"library": "mkl"}, torch.Tensor.__matmul__

    def rounded(left: Tensor, right: Tensor) -> Tensor:
        if state["library"] == "onednn" and left.dtype == torch.float32:
            left, right = left.bfloat16().float(), right.bfloat16().float()
        return product(left, right)

    monkeypatch.setattr(engine, "_flags", lambda: AMD)
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: True)
    monkeypatch.setattr(engine, "_set", lambda library: state.update(library=library))
    monkeypatch.setattr(torch.Tensor, "__matmul__", rounded)
    engine.product_error.cache_clear()


def fixed_error(value: float) -> Any:
    """In place of ``product_error``."""
    return lambda _library: value


def settings(**changes: Any) -> NumericsSettings:
    return NumericsSettings(**{**SETTINGS, **changes})


def precision_switch() -> str:
    return str(torch.backends.mkldnn.matmul.fp32_precision)  # type: ignore[attr-defined]


def test_product_error_of_mkl_is_that_of_float32() -> None:
    assert 1e-9 < engine.product_error("mkl") < 1e-6


def test_product_error_leaves_the_switch_as_it_is() -> None:
    engine.use(PLAIN)
    engine.product_error("onednn")
    assert precision_switch() == "none"


def test_product_error_finds_operands_that_were_rounded(rounding: None) -> None:
    """A relative rounding of 2⁻⁹ at most for each operand: about 2e-3 of the norm, a thousand times the limit."""
    assert engine.product_error("mkl") < 1e-6
    assert 1e-3 < engine.product_error("onednn") < 4e-3
    assert engine.product_error("onednn") > 100 * LIMIT


def test_choose_falls_back_where_products_are_rounded(rounding: None) -> None:
    assert engine.choose(settings(), LARGE).matrix_products == "mkl"
    with pytest.raises(ConfigError, match=r"compute\.numerics\.matrix_products.*\(relative error 2e-03\); use mkl"):
        engine.choose(settings(matrix_products="onednn"), LARGE)


@pytest.mark.parametrize(("error", "library"), [(LIMIT, "onednn"), (1.01 * LIMIT, "mkl")])
def test_choose_asks_for_an_accuracy(amd: None, monkeypatch: pytest.MonkeyPatch, error: float, library: str) -> None:
    monkeypatch.setattr(engine, "product_error", fixed_error(error))
    assert engine.choose(settings(), LARGE).matrix_products == library


def test_choose_takes_onednn_for_large_products_only(amd: None) -> None:
    assert engine.choose(settings(), LARGE).matrix_products == "onednn"
    assert engine.choose(settings(), SMALL).matrix_products == "mkl"
    assert engine.choose(settings(matrix_products="mkl"), LARGE).matrix_products == "mkl"
    assert engine.choose(settings(matrix_products="onednn"), SMALL).matrix_products == "onednn"


@pytest.mark.parametrize("flags", [("GenuineIntel", AMD[1]), ("AuthenticAMD", frozenset({"avx2"})), ("", frozenset())])
def test_choose_stays_with_mkl_on_other_processors(
    amd: None, monkeypatch: pytest.MonkeyPatch, flags: tuple[str, frozenset[str]]
) -> None:
    monkeypatch.setattr(engine, "_flags", lambda: flags)
    assert engine.choose(settings(), LARGE).matrix_products == "mkl"


def test_choose_stays_with_mkl_where_torch_has_no_onednn(amd: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: False)
    assert engine.choose(settings(), LARGE).matrix_products == "mkl"


def test_choose_needs_no_clock_and_gives_the_same_again(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse() -> float:
        raise AssertionError("a stopwatch")

    with monkeypatch.context() as patched:
        for clock in ("time", "time_ns", "perf_counter", "perf_counter_ns", "monotonic", "process_time"):
            patched.setattr(time, clock, refuse)
        first = engine.choose(settings(), LARGE)
        engine.product_error.cache_clear()
        again = engine.choose(settings(), LARGE)
    assert first == again


def test_choose_passes_on_what_is_not_to_be_chosen() -> None:
    chosen = engine.choose(settings(matrix_products="mkl", autocast="bf16", threads=3), SMALL)
    assert chosen == Numerics("mkl", "bf16", "cpu", 3)
    assert str(chosen) == "matrix_products mkl, autocast bf16, device cpu, threads 3"


@pytest.mark.parametrize(
    ("flags", "chosen"),
    [
        ({"avx512f", "avx512_bf16"}, "bf16"),
        ({"amx_bf16"}, "bf16"),
        ({"avx512f", "avx512_vnni"}, "none"),
        (set(), "none"),
    ],
)
def test_choose_halves_precision_where_the_processor_can(
    monkeypatch: pytest.MonkeyPatch, flags: set[str], chosen: str
) -> None:
    monkeypatch.setattr(engine, "_flags", lambda: ("GenuineIntel", frozenset(flags)))
    asked = settings(matrix_products="mkl", autocast="auto")
    assert engine.choose(asked, SMALL) == Numerics("mkl", chosen, "cpu", 1)  # type: ignore[arg-type]
    assert engine.choose(asked, LARGE) == engine.choose(asked, SMALL)
    for plain in ("none", "bf16"):
        assert engine.choose(settings(autocast=plain), SMALL).autocast == plain


@pytest.mark.parametrize("able", [True, False])
def test_choose_halves_precision_on_cuda_where_the_device_can(monkeypatch: pytest.MonkeyPatch, able: bool) -> None:
    """The processor's own flags do not matter there, and what torch only emulates does not count."""

    def supported(including_emulation: bool = True) -> bool:
        return able or including_emulation

    monkeypatch.setattr(engine, "_flags", lambda: ("", frozenset() if able else frozenset({"avx512_bf16"})))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", supported)
    chosen = engine.choose(settings(matrix_products="mkl", autocast="auto", device="cuda"), SMALL)
    assert str(chosen) == f"matrix_products mkl, autocast {'bf16' if able else 'none'}, device cuda, threads 1"


def test_choose_of_auto_without_the_device_says_that(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ConfigError, match="no CUDA device is here"):
        engine.choose(settings(autocast="auto", device="cuda"), SMALL)


def test_a_missing_device_is_one_line_that_says_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    wanted = Numerics("mkl", "none", "cuda", 1)
    for attempt in (lambda: engine.choose(settings(device="cuda"), SMALL), lambda: engine.use(wanted)):
        with pytest.raises(ConfigError) as caught:
            attempt()
        assert str(caught.value) == "params.yaml: compute.numerics.device: no CUDA device is here; use cpu"
    assert engine.device() == torch.device("cpu")


def test_flags_are_read_from_cpuinfo(tmp_path: Path) -> None:
    path = tmp_path / "cpuinfo"
    path.write_text(CPUINFO)
    assert engine._flags(path) == ("AuthenticAMD", {"fpu", "avx2", "avx512f"})
    path.write_text("Processor\t: ARMv8\nFeatures\t: fp asimd\n\nno colon here\n")
    assert engine._flags(path) == ("", frozenset())
    assert engine._flags(tmp_path / "missing") == ("", frozenset())


def test_use_sets_threads_and_products_and_says_so(amd: None) -> None:
    engine.use(Numerics("onednn", "none", "cpu", 2))
    assert (torch.get_num_threads(), precision_switch()) == (2, "bf16")
    assert engine.current() == Numerics("onednn", "none", "cpu", 2)
    engine.use(PLAIN)
    assert (torch.get_num_threads(), precision_switch()) == (1, "none")


def test_use_again_checks_nothing_and_repairs_what_others_changed(monkeypatch: pytest.MonkeyPatch) -> None:
    engine.use(PLAIN)
    monkeypatch.setattr(engine, "_check", lambda _: pytest.fail("checked again"))
    torch.set_num_threads(2)
    engine.use(PLAIN)
    assert torch.get_num_threads() == 1


def test_use_leaves_everything_where_it_refuses(rounding: None) -> None:
    engine.use(PLAIN)
    with pytest.raises(ConfigError, match="use mkl"):
        engine.use(Numerics("onednn", "none", "cpu", 2))
    assert (engine.current(), torch.get_num_threads()) == (PLAIN, 1)


def test_start_decides_for_the_process() -> None:
    numerics = {**SETTINGS, "matrix_products": "mkl", "autocast": "bf16"}
    engine.start(ComputeSettings(numerics=numerics, scheduler="tcp://here:8786"), SMALL)
    assert (engine.current(), engine.scheduler()) == (HALF, "tcp://here:8786")
    engine.start(ComputeSettings(numerics=SETTINGS, scheduler=None), SMALL)
    assert (engine.current(), engine.scheduler()) == (PLAIN, None)


def test_normal_is_the_stream_of_the_generator() -> None:
    with seeding.scope(0, "noise") as noise, seeding.scope(0, "noise") as same:
        assert torch.equal(engine.normal((3, 4), noise), torch.randn(3, 4, generator=same))


def trained(task: VaeTask, recipe: Recipe, numerics: Numerics) -> tuple[VAE, float]:
    """One epoch of a new model, and its mean loss."""
    engine.use(numerics)
    model = task.new_model(0)
    optimiser = adam(model, 1e-3)
    with seeding.scope(0, "epoch") as noise:
        row = train_epoch(model, task, np.arange(200), TrainingSettings(**recipe()), optimiser, noise, Effort())
    assert all(value.dtype == torch.float32 for state in optimiser.state.values() for value in state.values())
    return model, row["train_loss"]


@pytest.mark.parametrize("changes", [{}, {"likelihood": "zinb", "dispersion": "gene"}, {"likelihood": "log_mse"}])
def test_autocast_changes_training_a_little(
    make_task: Callable[..., VaeTask], recipe: Recipe, changes: dict[str, Any]
) -> None:
    """bfloat16 keeps 8 bits: the parameters of an epoch differ, and by a fraction of the way that they went."""
    task = make_task(**changes)
    (full, loss), (half, other_loss) = (trained(task, recipe, numerics) for numerics in (PLAIN, HALF))
    models = (task.new_model(0), full, half)
    start, end, other = (torch.cat([p.detach().ravel() for p in model.parameters()]) for model in models)
    assert other.dtype == torch.float32
    assert 0 < float((end - other).norm()) < 0.25 * float((end - start).norm())
    assert other_loss == pytest.approx(loss, rel=5e-3)


@pytest.mark.parametrize("name", ["nb", "zinb", "log_mse"])
def test_autocast_runs_layers_in_bfloat16_and_leaves_losses_in_float32(
    make_task: Callable[..., VaeTask], name: str
) -> None:
    task = make_task(likelihood=name)
    model, batch = task.new_model(0), task.batch(np.arange(40))
    engine.use(HALF)
    with engine.autocast(), seeding.scope(0, "latent") as noise:
        assert model.encoder[:1](batch.inputs).dtype == torch.bfloat16
        posterior = model.encode(batch.inputs)
        decoded = [part for part in model.decode(posterior[0]) if part is not None]
        loss = task.loss(model, batch, noise)
    assert {part.dtype for part in (*posterior, *decoded, *loss)} == {torch.float32}
    loss.total.mean().backward()
    assert {parameter.grad.dtype for parameter in model.parameters() if parameter.grad is not None} == {torch.float32}


def test_autocast_of_none_does_nothing(task: VaeTask) -> None:
    engine.use(PLAIN)
    with engine.autocast():
        assert task.new_model(0).encoder[:1](task.batch(np.arange(4)).inputs).dtype == torch.float32


def test_autocast_leaves_scoring_as_it_is(task: VaeTask) -> None:
    model, cells, found = task.new_model(0), np.arange(60), []
    for numerics in (PLAIN, HALF):
        engine.use(numerics)
        signals, (means, zeros) = task.signals(model, cells), task.predicted(model, cells)
        found.append(np.r_[signals.elbo, signals.kl, signals.mu.ravel(), means, zeros])
    assert found[0].tobytes() == found[1].tobytes()


def laid_out(images: Tensor) -> bool:
    """Whether the channels of a place lie side by side in memory."""
    return images.is_contiguous(memory_format=torch.channels_last)


def trained_on_pictures(layout: torch.memory_format) -> Tensor:
    """State of a small convolutional net after an epoch in float64, where no rounding turns a rectifier over."""

    class Task(ClassifierTask):
        def batch(self, cells: IntArray, noise: torch.Generator | None = None) -> ClassBatch:
            batch = super().batch(cells, noise)
            assert laid_out(batch.inputs)
            return ClassBatch(batch.inputs.double().contiguous(memory_format=layout), batch.labels)

        def cross_entropy(self, logits: Tensor, labels: Tensor) -> Tensor:
            return torch.nn.functional.cross_entropy(logits, labels, reduction="none")

    rng, net = np.random.default_rng(0), SmallCNNSettings(kind="small_cnn", widths=[4, 6], hidden=5)
    inputs, labels = rng.integers(0, 256, (40, 3, 8, 8), dtype=np.uint8), rng.integers(0, 2, 40)
    task = Task(inputs, labels, ("a", "b"), net, AugmentationSettings(crop=1, flip=True, noise=0.1))
    model = task.new_model(0)
    assert all(laid_out(parameter) for parameter in model.parameters() if parameter.ndim == 4)
    model = model.double().to(memory_format=layout)  # type: ignore[call-overload]
    optimiser = new_optimiser(model.parameters(), AdamSettings(kind="adam", learning_rate=0.01, weight_decay=0.1))
    class_epoch(model, task, np.arange(40), 8, optimiser, seeding.torch_generator(0), Effort())
    return torch.cat([value.double().ravel() for value in model.state_dict().values()])


def test_layout_of_pictures_changes_nothing_but_the_last_digits() -> None:
    """Nets and batches come with the channels of a place side by side, and are the same with rows side by side."""
    engine.use(PLAIN)
    last, first = trained_on_pictures(torch.channels_last), trained_on_pictures(torch.contiguous_format)
    torch.testing.assert_close(last, first, rtol=1e-10, atol=1e-10)


def test_models_of_other_arithmetic_have_other_fingerprints(amd: None) -> None:
    """So that none is taken for the other when a stage is taken up."""
    context = SimpleNamespace(inputs=Inputs(Item("train", ("pbmc68k",)), {}, {}))
    population = Population(context, task=None, sets=None, cell_set="retain")  # type: ignore[arg-type]
    found = []
    for numerics in (PLAIN, HALF, Numerics("onednn", "none", "cpu", 1), Numerics("mkl", "none", "cpu", 2), PLAIN):
        engine.use(numerics)
        found.append(population.fingerprint(3))
    assert len(set(found)) == 4
    assert found[0] == found[-1]


@pytest.mark.parametrize(
    ("key", "value"), [("matrix_products", "fastest"), ("autocast", True), ("device", "tpu"), ("threads", 0)]
)
def test_numerics_settings_refuse_what_is_unknown(key: str, value: object) -> None:
    with pytest.raises(ValidationError, match=key):
        settings(**{key: value})


def test_compute_settings_refuse_an_address_without_a_scheme() -> None:
    with pytest.raises(ValidationError, match="scheduler"):
        ComputeSettings(numerics=SETTINGS, scheduler="localhost:8786")
