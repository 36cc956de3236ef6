"""Networks: sizes and names of the papers, pretrained weights that fit and work, the default for a data set."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from torch.nn import functional as F

from ockham.errors import DataError, OckhamError
from ockham.zoo import data, networks, paper

PARAMETERS = {
    "digits_mlp": 50_826,
    "lenet_300_100": 266_610,
    "lenet5_caffe": 431_080,
    "resnet20": 269_722,
    "resnet32": 464_154,
    "resnet56": 853_018,
    "resnet110": 1_727_962,
    "vgg16": 14_724_042,
    "vgg16_quarter": 923_130,
    "mlp_swish": 1_149_010,
    "mlp_swish_cifar": 2_293_010,
    "lenet_tanh": 61_706,
    "lenet_tanh_cifar": 550_362,
    "vit": 3_186_442,
    "vit_cifar": 3_194_634,
    "mixer": 1_987_722,
    "mixer_cifar": 1_995_914,
}
GREY = ("lenet_300_100", "lenet5_caffe", "mlp_swish", "lenet_tanh", "vit", "mixer")
SHAPES = {"digits_mlp": (1, 8, 8), **dict.fromkeys(GREY, (1, 28, 28))}


def built(name):
    torch.manual_seed(0)
    return networks.NETWORKS[name]()


@pytest.mark.parametrize("name", networks.NETWORKS)
def test_parameters_and_outputs(name):
    network = built(name)
    assert sum(p.numel() for p in network.parameters()) == PARAMETERS[name]
    x = torch.randn(3, *SHAPES.get(name, (3, 32, 32)))
    output = network(x)
    assert output.shape == (3, 10)
    output.square().sum().backward()
    assert all(p.grad is not None and bool(p.grad.isfinite().all()) for p in network.parameters())


def test_every_network_is_listed():
    assert networks.NETWORKS.keys() == PARAMETERS.keys()
    assert all(networks.NETWORKS[name].__name__ == name for name in PARAMETERS)


def test_mlp_is_its_layers():
    network = networks.mlp([6, 5, 4, 3], nn.Tanh)
    assert [name for name, _ in network.named_children()] == ["flatten", "fc1", "act1", "fc2", "act2", "fc3"]
    x = torch.randn(7, 2, 3)
    hidden = torch.tanh(network.fc2(torch.tanh(network.fc1(x.reshape(7, 6)))))
    assert torch.equal(network(x), network.fc3(hidden))


def test_a_character_sees_only_those_before_it():
    torch.manual_seed(0)
    network = paper.CharTransformer(11, context=8, dim=16, blocks=2, heads=2).eval()
    symbols = torch.randint(0, 11, (2, 8))
    changed = symbols.clone()
    changed[:, 5] = (changed[:, 5] + 1) % 11
    a, b = network(symbols), network(changed)
    assert a.shape == (2, 11, 8)
    torch.testing.assert_close(a[:, :, :5], b[:, :, :5])
    assert not torch.allclose(a[:, :, 5:], b[:, :, 5:])


def test_attention_is_that_of_torch():
    torch.manual_seed(0)
    ours, theirs = paper.Attention(12, 3, causal=False), nn.MultiheadAttention(12, 3, batch_first=True)
    with torch.no_grad():
        theirs.in_proj_weight.copy_(torch.cat([ours.query.weight, ours.key.weight, ours.value.weight]))
        theirs.in_proj_bias.copy_(torch.cat([ours.query.bias, ours.key.bias, ours.value.bias]))
        theirs.out_proj.load_state_dict(ours.out.state_dict())
    x = torch.randn(2, 5, 12)
    torch.testing.assert_close(ours(x), theirs(x, x, x, need_weights=False)[0])
    with pytest.raises(OckhamError, match="multiple"):
        paper.Attention(12, 5, causal=False)


def test_small_images_are_padded_around():
    x = torch.randn(1, 1, 28, 27)
    padded = paper.PadTo32()(x)
    assert padded.shape == (1, 1, 32, 32) and torch.equal(padded[:, :, 2:30, 2:29], x)
    assert float(padded.abs().sum()) == float(x.abs().sum()) and paper.PadTo32()(padded) is padded


@pytest.mark.parametrize("sizes", [[], [3], [3, 0, 2]])
def test_mlp_of_no_size(sizes):
    with pytest.raises(OckhamError, match="sizes"):
        networks.mlp(sizes)


def test_lenet5_is_its_layers():
    network, x = built("lenet5_caffe"), torch.randn(2, 1, 28, 28)
    maps = F.max_pool2d(F.conv2d(x, network.conv1.weight, network.conv1.bias), 2)
    maps = F.max_pool2d(F.conv2d(maps, network.conv2.weight, network.conv2.bias), 2)
    expected = network.fc2(torch.relu(network.fc1(maps.flatten(1))))
    assert torch.equal(network(x), expected) and maps.shape == (2, 50, 4, 4)


def test_shortcut_pads_channels_and_drops_pixels():
    shortcut, x = networks.PadShortcut(1, 2, 2), torch.randn(2, 3, 5, 5)
    expected = torch.zeros(2, 6, 3, 3)
    expected[:, 1:4] = x[:, :, ::2, ::2]
    assert torch.equal(shortcut(x), expected)
    assert repr(shortcut) == "PadShortcut(before=1, after=2, stride=2)"


def test_resnet_shortcuts_and_classes():
    network = networks.resnet20(classes=7)
    assert network(torch.randn(2, 3, 32, 32)).shape == (2, 7)
    shortcuts = [repr(m.shortcut) for m in network.modules() if isinstance(m, networks.ResidualBlock)]
    assert shortcuts.count("Identity()") == 7
    assert [shortcuts[3], shortcuts[6]] == [
        "PadShortcut(before=8, after=8, stride=2)",
        "PadShortcut(before=16, after=16, stride=2)",
    ]


@pytest.mark.parametrize(
    ("shape", "classes", "name"),
    [((8, 8), 10, "digits_mlp"), ((28, 28), 10, "lenet_300_100"), ((3, 32, 32), 10, "resnet20")],
)
def test_suggested_network_takes_the_data(shape, classes, name):
    got = made(shape, classes)
    assert networks.suggest(got) == name
    assert built(name)(got.test_x).shape == (len(got.test_y), classes)


@pytest.mark.parametrize(("classes", "single", "outputs"), [(3, False, 3), (0, False, 1), (2, True, 1)])
def test_tables_get_a_small_network_of_their_own_width(classes, single, outputs):
    got = made((5,), classes)
    name = networks.suggest(got, single=single)
    assert name == f"mlp_5_50_50_{outputs}" and networks.constructor(name)()(got.test_x).shape[1:] == (outputs,)


def test_names_build_what_they_say():
    assert networks.constructor("lenet5_caffe") is networks.NETWORKS["lenet5_caffe"]
    assert [m.out_features for m in networks.constructor("mlp_7_3")() if isinstance(m, torch.nn.Linear)] == [3]
    for name in ("mlp", "mlp_7", "mlp_0_3", "mlp_a_3", "mlp_7_99999999", "net_7_3", "mlp_swish_8", ""):
        assert networks.constructor(name) is None, name


@pytest.mark.parametrize(
    ("shape", "classes", "said"),
    [((28, 28), 26, "(1, 28, 28) and 26 classes"), ((28, 28), 0, "regression targets")],
)
def test_no_network_to_suggest(shape, classes, said):
    with pytest.raises(DataError) as caught:
        networks.suggest(made(shape, classes))
    assert said in str(caught.value) and "--model" in str(caught.value) and "resnet20" in str(caught.value)


def made(shape, classes):
    n, rng = 30, np.random.default_rng(0)
    y = np.arange(n) % classes if classes else rng.normal(size=n)
    x = rng.normal(size=(n, *shape))
    return data.from_arrays("made", (x, y), (x, y))


@pytest.mark.data
@pytest.mark.parametrize("name", ["resnet20", "resnet56"])
def test_pretrained_weights_fit_by_name(real_data, name):
    weights = load_file(real_data / "pretrained" / f"{name}-cifar10.safetensors")
    network = built(name)
    network.load_state_dict(weights, strict=True)
    state = network.state_dict()
    assert all(torch.equal(state[key], value) for key, value in weights.items())


@pytest.mark.data
def test_pretrained_resnet20_reaches_its_accuracy(real_data):
    network = networks.resnet20().eval()
    network.load_state_dict(load_file(real_data / "pretrained" / "resnet20-cifar10.safetensors"), strict=True)
    image = pytest.importorskip("PIL.Image")
    sheets = [np.asarray(image.open(real_data / "cifar10" / f"test_00{i}.webp").convert("RGB")) for i in (0, 1)]
    x = torch.from_numpy(np.concatenate(sheets).reshape(1000, 32, 32, 3)).permute(0, 3, 1, 2) / 255
    x = (x - torch.tensor([0.485, 0.456, 0.406])[:, None, None]) / torch.tensor([0.229, 0.224, 0.225])[:, None, None]
    y = torch.from_numpy(np.load(real_data / "cifar10" / "test_labels.npy")[:1000]).long()
    with torch.no_grad():
        right = torch.cat([network(part).argmax(1) for part in x.split(250)]).eq(y)
    assert right.float().mean() >= 0.91
