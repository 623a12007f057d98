import numpy as np
import pytest
import torch
from torch.nn.functional import cross_entropy

from scforget import seeding
from scforget.errors import DataError, EmptyGroupError, NonFiniteError
from scforget.models.classifiers import MLP
from scforget.models.vae import VAE, Batch, VAESettings
from scforget.theory import nets

LEVEL = 0.95


def settings(**changes):
    base = {
        "hidden": [6],
        "dropout": 0.0,
        "learning_rate": 1e-2,
        "weight_decay": 0.0,
        "batch_size": None,
        "max_epochs": 30,
        "stop_accuracy": None,
    }
    return nets.ClassifierSettings(**base | changes)


@pytest.fixture
def cells():
    generator = np.random.default_rng(0)
    labels = np.repeat([0, 1, 2], 20)
    inputs = 2.5 * np.eye(3, 5)[labels] + generator.normal(size=(60, 5))
    return inputs, labels


@pytest.fixture
def model(cells):
    return nets.fit_classifier(*cells, settings(max_epochs=8), 3, classes=4, held_out=cells, level=LEVEL)[0]


def vae(likelihood="nb"):
    kind = VAESettings(hidden=[16, 8], latent=3, likelihood=likelihood, dispersion="gene-cell", dropout=0.1)
    return VAE(30, kind)


def slow_fisher(model, inputs, labels, weights):
    """One backward pass a cell; ``labels`` and ``weights`` are [N, K]: K losses a cell."""
    total = {name: torch.zeros_like(p) for name, p in model.named_parameters()}
    for row, codes, shares in zip(inputs, labels, weights, strict=True):
        for code, share in zip(codes, shares, strict=True):
            model.zero_grad()
            logits = model(torch.as_tensor(row, dtype=torch.float32)[None])
            cross_entropy(logits, torch.tensor([code])).backward()
            for name, parameter in model.named_parameters():
                total[name] += float(share) * parameter.grad**2
    return {name: value / len(inputs) for name, value in total.items()}


def test_classifier_has_the_published_numbers_of_parameters():
    sizes = [(32, [], 14, 462), (2000, [512, 128], 14, 1_093_262)]
    for features, hidden, classes, wanted in sizes:
        built = MLP(features, hidden, classes, 0.3)
        assert sum(p.numel() for p in built.parameters()) == wanted
        assert nets.parameter_count(features, hidden, classes) == wanted


def test_classifier_is_built_as_the_encoder_of_the_vae_is():
    built, encoder = MLP(30, [16, 8], 4, 0.1).hidden, vae().encoder
    assert str(built) == str(encoder)
    assert {n: p.shape for n, p in built.named_parameters()} == {n: p.shape for n, p in encoder.named_parameters()}


def test_live_parameters_leaves_out_what_gets_no_gradient():
    for likelihood in ("nb", "log_mse"):
        one = vae(likelihood)
        batch = Batch(torch.ones(4, 30), torch.rand(4, 30), torch.full((4, 1), 30.0))
        mu, log_var = one.encode(batch.inputs)
        (one.log_prob(batch, one.decode(mu)).sum() + log_var.sum()).backward()
        assert nets.live_parameters(one) == sum(p.numel() for p in one.parameters() if p.grad is not None)


@pytest.mark.parametrize("parameters", [422_792, 5_299_984, 9_000])
def test_matched_widths_come_within_a_percent_of_the_size_and_keep_the_proportions(parameters):
    features = 20 if parameters < 10_000 else 500
    widths = nets.matched_widths(features, [512, 128], 10, parameters=parameters, tolerance=0.01)
    found = sum(p.numel() for p in MLP(features, widths, 10, 0.0).parameters())
    assert abs(found - parameters) <= 0.01 * parameters
    assert abs(widths[0] / widths[1] - 4) < 4 / widths[1]


def test_matched_widths_says_so_where_no_width_fits():
    for hidden in ([512, 128], []):
        with pytest.raises(DataError, match="size-matched"):
            nets.matched_widths(500, hidden, 10, parameters=2_200, tolerance=0.001)


def test_fit_classifier_learns_what_can_be_learnt_and_nothing_else(cells):
    inputs, labels = cells
    shuffled = np.random.default_rng(1).permutation(labels)
    new = np.random.default_rng(2).normal(size=inputs.shape) + 2.5 * np.eye(3, 5)[labels]
    probe = settings(hidden=[], max_epochs=200)
    _, facts = nets.fit_classifier(inputs, labels, probe, 0, classes=3, held_out=(new, labels), level=LEVEL)
    _, none = nets.fit_classifier(inputs, shuffled, probe, 0, classes=3, held_out=(new, labels), level=LEVEL)
    assert facts["parameters"] == 18
    assert facts["held_out"]["accuracy"] > 0.8
    assert none["held_out"]["interval"][0] < 0.5
    assert facts["held_out"]["interval"][0] < facts["held_out"]["accuracy"] < facts["held_out"]["interval"][1]


def test_fit_classifier_stops_at_the_accuracy_and_not_before(cells):
    early = settings(stop_accuracy=0.8, max_epochs=500, batch_size=16)
    _, facts = nets.fit_classifier(*cells, early, 0, classes=3, held_out=cells, level=LEVEL)
    assert facts["stopped"]
    assert facts["train"]["accuracy"] >= 0.8
    shorter = early.model_copy(update={"max_epochs": facts["epochs"] - 1})
    _, before = nets.fit_classifier(*cells, shorter, 0, classes=3, held_out=cells, level=LEVEL)
    assert not before["stopped"]
    assert before["train"]["accuracy"] < 0.8
    assert before["epochs"] == facts["epochs"] - 1


def test_fit_classifier_is_its_seed_s_and_leaves_the_global_stream_alone(cells):
    kind = settings(dropout=0.3, batch_size=7, max_epochs=3)
    before = torch.get_rng_state()
    fitted = [
        nets.fit_classifier(*cells, kind, seed, classes=3, held_out=cells, level=LEVEL)[0].output.weight
        for seed in (5, 5, 6)
    ]
    assert torch.equal(before, torch.get_rng_state())
    assert torch.equal(fitted[0], fitted[1])
    assert not torch.equal(fitted[0], fitted[2])


def test_fit_classifier_drops_units_in_training_alone(cells):
    with_it, without = (
        nets.fit_classifier(*cells, settings(dropout=p, max_epochs=3), 0, classes=3, held_out=cells, level=LEVEL)[0]
        for p in (0.5, 0.0)
    )
    assert not torch.equal(with_it.output.weight, without.output.weight)
    assert not with_it.training
    assert torch.equal(nets.logits_of(with_it, cells[0]), nets.logits_of(with_it, cells[0]))


def test_fit_classifier_takes_adam_s_steps(cells):
    inputs, labels = torch.tensor(cells[0], dtype=torch.float32), torch.tensor(cells[1])
    kind = settings(hidden=[], max_epochs=4, weight_decay=0.1)
    found, _ = nets.fit_classifier(*cells, kind, 5, classes=3, held_out=cells, level=LEVEL)
    with seeding.scope(5, "classifier"):
        slow = MLP(5, [], 3, 0.0)
    optimiser = torch.optim.Adam(slow.parameters(), lr=1e-2, weight_decay=0.1)
    for _ in range(4):
        optimiser.zero_grad()
        cross_entropy(slow(inputs), labels).backward()
        optimiser.step()
    torch.testing.assert_close(found.output.weight, slow.output.weight)


def test_fit_classifier_refuses_what_it_cannot_learn_from(cells):
    inputs, labels = cells
    for some, codes, wrong in [
        (inputs[:0], labels[:0], EmptyGroupError),
        (inputs, labels[:5], DataError),
        (inputs, labels + 2, DataError),
    ]:
        with pytest.raises(wrong):
            nets.fit_classifier(some, codes, settings(), 0, classes=3, held_out=cells, level=LEVEL)
    with pytest.raises(NonFiniteError, match="classifier"):
        nets.fit_classifier(inputs * np.nan, labels, settings(), 0, classes=3, held_out=cells, level=LEVEL)


def test_accuracy_counts_cells_by_their_highest_logit(model, cells):
    found = nets.accuracy(model, *cells, LEVEL)
    right = sum(
        int(model(torch.as_tensor(x, dtype=torch.float32)[None]).argmax()) == y for x, y in zip(*cells, strict=True)
    )
    assert found["accuracy"] == right / 60
    assert found["cells"] == 60
    assert 0 <= found["interval"][0] < found["accuracy"] < found["interval"][1] <= 1


def test_classifier_losses_are_those_of_single_cells(model, cells):
    inputs, labels = cells
    batches = list(nets.observed(inputs, labels, np.array([7, 30, 59])))
    found = torch.cat([nets.classifier_losses(model, batch) for batch in batches])
    probabilities = nets.logits_of(model, inputs).softmax(1)
    wanted = [-float(probabilities[i, labels[i]].log()) for i in (7, 30, 59)]
    np.testing.assert_allclose(found.detach(), wanted, rtol=1e-5)


def test_classifier_fisher_squares_each_cell_s_own_gradient(model, cells, monkeypatch):
    inputs, labels = cells
    some = np.array([3, 22, 23, 45, 59])
    monkeypatch.setattr(nets, "_BATCH", 2)
    found = nets.classifier_fisher(model, inputs, labels, some)
    wanted = slow_fisher(model, inputs[some], labels[some, None], np.ones((5, 1)))
    for name, value in wanted.items():
        torch.testing.assert_close(found[name], value)
    with pytest.raises(EmptyGroupError):
        nets.classifier_fisher(model, inputs, labels, some[:0])


def test_classifier_fisher_without_labels_is_the_expectation_over_those_the_model_draws(model, cells, monkeypatch):
    inputs, _ = cells
    some = np.array([3, 22, 23, 45, 59])
    monkeypatch.setattr(nets, "_BATCH", 7)
    found = nets.classifier_fisher(model, inputs, None, some)
    shares = nets.logits_of(model, inputs[some]).softmax(1).numpy()
    wanted = slow_fisher(model, inputs[some], np.tile(np.arange(4), (5, 1)), shares)
    for name, value in wanted.items():
        torch.testing.assert_close(found[name], value)


def test_classifier_fisher_of_drawn_labels_averages_to_the_expectation(model, cells):
    inputs, _ = cells
    every = np.arange(60)
    draws = [nets.true_fisher_labels(model, inputs, seed) for seed in range(60)]
    found = torch.stack([nets.classifier_fisher(model, inputs, d, every)["output.weight"].sum(1) for d in draws])
    wanted = nets.classifier_fisher(model, inputs, None, every)["output.weight"].sum(1)
    error = found.std(0) / 60**0.5
    assert ((found.mean(0) - wanted).abs() < 4 * error).all()


def test_classifier_fisher_of_wrong_labels_is_not_the_model_s_own(cells):
    inputs, labels = cells
    sure, _ = nets.fit_classifier(*cells, settings(max_epochs=200), 3, classes=3, held_out=cells, level=LEVEL)
    right, own, wrong = (
        float(nets.classifier_fisher(sure, inputs, codes, np.arange(60))["output.bias"].sum())
        for codes in (labels, None, (labels + 1) % 3)
    )
    assert wrong > 5 * own
    assert wrong > 5 * right


def test_true_fisher_labels_have_the_model_s_frequencies(model, cells):
    inputs, _ = cells
    one = np.repeat(inputs[:1], 20_000, 0)
    share = nets.logits_of(model, inputs[:1]).softmax(1).numpy()[0]
    found = np.bincount(nets.true_fisher_labels(model, one, 1), minlength=4) / len(one)
    assert (np.abs(found - share) < 4 * np.sqrt(share * (1 - share) / len(one)) + 1e-9).all()
