"""The nets: their published sizes, their parts, and what percell, vmap and a second net must find in them."""

from __future__ import annotations

from copy import deepcopy
from typing import Any

import pytest
import torch
from pydantic import TypeAdapter, ValidationError
from torch import Tensor, nn
from torch.func import functional_call, stack_module_state, vmap
from torch.nn.functional import cross_entropy

from scforget import percell
from scforget.errors import DataError
from scforget.models import classifiers
from scforget.models.classifiers import MLP, Classifier, ResNet18, SmallCNN, build

MLP_SETTINGS = classifiers.MLPSettings(kind="mlp", hidden=[6, 5], dropout=0.2)
CNN_SETTINGS = classifiers.SmallCNNSettings(kind="small_cnn", widths=[3, 4], hidden=5)
NETS: dict[str, tuple[Any, tuple[int, ...]]] = {
    "mlp": (lambda: build(MLP_SETTINGS, (7,), 3), (7,)),
    "mlp of images": (lambda: build(MLP_SETTINGS, (2, 4, 3), 3), (2, 4, 3)),
    "probe": (lambda: build(MLP_SETTINGS.model_copy(update={"hidden": []}), (7,), 3), (7,)),
    "small_cnn": (lambda: build(CNN_SETTINGS, (2, 9, 8), 3), (2, 9, 8)),
    "cifar": (lambda: ResNet18((3, 8, 8), 3, "cifar", width=2), (3, 8, 8)),
    "imagenet": (lambda: ResNet18((1, 32, 32), 3, "imagenet", width=2), (1, 32, 32)),
}


@pytest.fixture(params=NETS)
def net(request: pytest.FixtureRequest) -> tuple[Classifier, Tensor, Tensor]:
    """A net whose norms have seen something, and a batch of 6 with classes."""
    torch.manual_seed(0)
    made, shape = NETS[request.param]
    model, inputs = made(), torch.randn(6, *shape)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            assert module.running_mean is not None
            assert module.running_var is not None
            module.running_mean.normal_()
            module.running_var.uniform_(0.5, 2)
    return model, inputs, torch.tensor([0, 1, 2, 2, 1, 0])


def size(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


def test_resnet18_has_the_published_numbers_of_parameters() -> None:
    with torch.device("meta"):
        assert size(ResNet18((3, 32, 32), 10, "cifar")) == 11_173_962
        assert size(ResNet18((3, 32, 32), 10, "imagenet")) == 11_181_642


def test_mlp_has_the_published_numbers_of_parameters_and_names() -> None:
    assert size(MLP(32, [], 14, 0.0)) == 462
    assert size(MLP(2000, [512, 128], 14, 0.3)) == 1_093_262
    names = ["hidden.0.weight", "hidden.0.bias", "hidden.1.weight", "hidden.1.bias", "output.weight", "output.bias"]
    assert list(MLP(4, [3], 2, 0.1).state_dict()) == names


def test_small_cnn_has_the_parameters_of_its_layers() -> None:
    convolutions = 9 * (2 * 3 + 3 * 4) + 2 * (3 + 4)  # no biases; two of each norm
    left = 4 * 2 * 2  # 9 x 8 halved twice
    assert size(build(CNN_SETTINGS, (2, 9, 8), 3)) == convolutions + (left + 1) * 5 + (5 + 1) * 3


@pytest.mark.parametrize(("stem", "side"), [("cifar", 32), ("imagenet", 64)])
def test_resnet18_halves_images_as_published(stem: Any, side: int) -> None:
    model, sides = ResNet18((3, side, side), 10, stem, width=1).eval(), []
    inputs = torch.zeros(1, 3, side, side)
    for block in model.blocks()[:-1]:
        inputs = block(inputs)
        sides.append(inputs.shape[-1])
    assert sides == ([32, 32, 16, 8, 4] if stem == "cifar" else [16, 16, 8, 4, 2])


def test_resnet18_starts_from_he_s_weights_and_norms_that_do_nothing() -> None:
    torch.manual_seed(1)
    model = ResNet18((3, 32, 32), 10, "cifar")
    for name, module in model.named_modules():
        if isinstance(module, nn.Conv2d):
            wanted = (2 / (module.out_channels * module.weight[0, 0].numel())) ** 0.5
            noise = 5 / (2 * module.weight.numel()) ** 0.5  # five standard errors of a standard deviation
            assert abs(float(module.weight.detach().std()) / wanted - 1) < noise, name
        if isinstance(module, nn.BatchNorm2d):
            assert bool((module.weight == 1).all())
            assert bool((module.bias == 0).all())


def test_small_cnn_equals_the_order_that_is_usual() -> None:
    torch.manual_seed(2)
    model, inputs = build(CNN_SETTINGS, (2, 9, 8), 3), torch.randn(5, 2, 9, 8)
    assert isinstance(model, SmallCNN)
    usual = inputs
    for block in deepcopy(model).body:
        convolution, norm, pool, relu = block  # type: ignore[misc]
        usual = pool(relu(norm(convolution(usual))))
    torch.testing.assert_close(model.body(inputs), usual)


def test_forward_is_the_output_layer_on_the_features(net: tuple[Classifier, Tensor, Tensor]) -> None:
    model, inputs, _ = net
    model.eval()
    features = model.features(inputs)
    assert features.shape == (6, model.output.in_features)
    torch.testing.assert_close(model(inputs), features @ model.output.weight.T + model.output.bias)
    assert model(inputs).shape == (6, 3)


def test_blocks_hold_every_parameter_once_in_order(net: tuple[Classifier, Tensor, Tensor]) -> None:
    model = net[0]
    found = [parameter for block in model.blocks() for parameter in block.parameters()]
    assert [id(one) for one in found] == [id(one) for one in model.parameters()]
    assert model.blocks()[-1] is model.output


def test_blocks_of_an_mlp_are_its_hidden_layers() -> None:
    model, inputs = MLP(7, [6, 5], 3, 0.0), torch.randn(4, 7)
    first, second, output = model.blocks()
    assert torch.equal(output(second(first(inputs))), model(inputs))


def test_eval_mode_treats_examples_alone(net: tuple[Classifier, Tensor, Tensor]) -> None:
    model, inputs, _ = net
    model.eval()
    torch.testing.assert_close(model(inputs)[2:3], model(inputs[2:3]))


def test_percell_finds_the_gradients_of_single_examples(net: tuple[Classifier, Tensor, Tensor]) -> None:
    model, inputs, labels = net[0].double().eval(), net[1].double(), net[2]
    rows = []
    for x, y in zip(inputs, labels, strict=True):
        model.zero_grad()
        cross_entropy(model(x[None]), y[None]).backward()
        rows.append({name: deepcopy(value.grad) for name, value in model.named_parameters()})
    traces, losses = percell.trace(model, lambda: cross_entropy(model(inputs), labels, reduction="none"))
    found = {name: value for one in traces for name, value in one.squares().items()}
    slow = {name: torch.stack([row[name] for row in rows]).square().sum(0) for name in rows[0]}  # type: ignore[misc]
    assert found.keys() == slow.keys()
    for name, value in slow.items():
        torch.testing.assert_close(found[name], value)
    norms = [sum(float(part.square().sum()) for part in row.values()) for row in rows]  # type: ignore[union-attr]
    torch.testing.assert_close(percell.squared_norms(traces, losses), torch.tensor(norms, dtype=torch.float64))


@pytest.mark.parametrize("name", ["mlp", "small_cnn", "cifar"])
def test_stacked_nets_train_as_single_ones_do(name: str) -> None:
    made, shape = NETS[name]
    torch.manual_seed(3)
    models = [made().train() for _ in range(2)]
    for module in (module for model in models for module in model.modules() if isinstance(module, nn.Dropout)):
        module.p = 0.0
    inputs, labels = torch.randn(2, 8, *shape), torch.randint(3, (2, 8))
    parameters, buffers = stack_module_state(models)  # type: ignore[arg-type]

    def one(weights: dict[str, Tensor], state: dict[str, Tensor], x: Tensor, y: Tensor) -> Tensor:
        return cross_entropy(functional_call(models[0], (weights, state), (x,)), y)

    losses = vmap(one)(parameters, buffers, inputs, labels)
    losses.sum().backward()
    for k, model in enumerate(models):
        loss = cross_entropy(model(inputs[k]), labels[k])
        loss.backward()
        torch.testing.assert_close(losses[k], loss)
        for key, value in model.named_parameters():
            torch.testing.assert_close(parameters[key].grad[k], value.grad, rtol=1e-4, atol=1e-5)
        for key, value in model.named_buffers():
            torch.testing.assert_close(buffers[key][k], value)


@pytest.mark.parametrize("name", ["small_cnn", "cifar"])
def test_channels_last_changes_only_where_numbers_lie(name: str) -> None:
    made, shape = NETS[name]
    torch.manual_seed(4)
    last = made().to(memory_format=torch.channels_last)
    plain = deepcopy(last).to(memory_format=torch.contiguous_format)
    inputs = torch.randn(4, *shape)
    torch.testing.assert_close(last(inputs), plain(inputs))
    assert any(not value.is_contiguous() for value in last.parameters())


def test_build_follows_the_settings_in_params_yaml() -> None:
    read = TypeAdapter(classifiers.NetSettings).validate_python
    found = {
        "mlp": build(read({"kind": "mlp", "hidden": [6], "dropout": 0.5}), (7,), 3),
        "small_cnn": build(read({"kind": "small_cnn", "widths": [4], "hidden": 3}), (1, 8, 8), 3),
        "resnet18": build(read({"kind": "resnet18", "stem": "cifar"}), (3, 8, 8), 3),
    }
    assert [type(model) for model in found.values()] == [MLP, SmallCNN, ResNet18]
    assert [module.p for module in found["mlp"].modules() if isinstance(module, nn.Dropout)] == [0.5]
    assert found["small_cnn"].output.in_features == 3
    assert found["resnet18"].stem[0].kernel_size == (3, 3)  # type: ignore[index, union-attr]
    for wrong in (
        {"kind": "mlp", "hidden": [0], "dropout": 0.1}, {"kind": "mlp", "hidden": [3], "dropout": 1.0},
        {"kind": "small_cnn", "widths": [], "hidden": 3}, {"kind": "resnet18", "stem": "mnist"}, {"kind": "vgg"},
        {"kind": "mlp", "hidden": [3]},
    ):  # fmt: skip
        with pytest.raises(ValidationError):
            read(wrong)


@pytest.mark.parametrize(
    ("settings", "shape", "classes", "said"),
    [
        (CNN_SETTINGS, (7,), 3, r"shape \(7,\); wanted images \[channels"),
        (CNN_SETTINGS, (1, 3, 9), 3, "1 x 3 x 9; wanted at least 4 pixels a side for 2 halvings"),
        (classifiers.ResNet18Settings(kind="resnet18", stem="cifar"), (7,), 3, "or an mlp"),
        (classifiers.ResNet18Settings(kind="resnet18", stem="cifar"), (3, 32, 7), 3, "at least 8 pixels"),
        (classifiers.ResNet18Settings(kind="resnet18", stem="imagenet"), (3, 28, 28), 3, "at least 32 pixels"),
        (MLP_SETTINGS, (7,), 1, "found 1; wanted at least 2"),
        (MLP_SETTINGS, (), 3, "inputs of a classifier"),
        (MLP_SETTINGS, (0,), 3, "inputs of a classifier"),
        (CNN_SETTINGS, (0, 8, 8), 3, "inputs of a classifier"),
    ],
)
def test_build_refuses_what_a_net_cannot_take(settings: Any, shape: tuple[int, ...], classes: int, said: str) -> None:
    with pytest.raises(DataError, match=said):
        build(settings, shape, classes)
