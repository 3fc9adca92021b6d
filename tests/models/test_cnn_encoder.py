"""timm's convolutional networks as encoders, held against timm itself."""

from pathlib import Path

import pytest
import timm
import torch
from safetensors.torch import save_file
from torch import nn

from emkum.errors import UserError
from emkum.models.cnn_encoder import CnnImageEncoder

SIDE = 64
STAGES = {
    "test_resnet": ["layer1", "layer2", "layer3", "layer4"],
    "test_convnext": ["stages.0", "stages.1", "stages.2", "stages.3"],
    "test_efficientnet": ["blocks.0", "blocks.1", "blocks.2", "blocks.3", "blocks.4"],
    "regnetx_002": ["s1", "s2", "s3", "s4"],
    "mobilenetv3_small_050": [f"blocks.{index}" for index in range(6)],
}


@pytest.fixture(autouse=True)
def one_thread() -> None:
    torch.manual_seed(0)
    torch.set_num_threads(1)


def random_model(name: str) -> nn.Module:
    model = timm.create_model(name)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.05)
    return model.eval()


def save(model: nn.Module, path: Path) -> str:
    save_file({name: value.contiguous() for name, value in model.state_dict().items()}, path)
    return str(path)


@pytest.mark.parametrize("name", STAGES)
def test_the_map_of_features_as_tokens(name: str, tmp_path: Path) -> None:
    model = random_model(name)
    encoder = CnnImageEncoder(name, save(model, tmp_path / "model.safetensors"), SIDE).eval()
    images = torch.randn(2, 3, SIDE, SIDE)
    with torch.no_grad():
        features = model.forward_features(images)
        encoded = encoder(images)
        alone = encoder(images[1:])
    _, channels, rows, columns = features.shape
    assert rows * columns > 1 and features.std() > 1e-3
    assert encoded.padding_mask is None and encoded.tokens.shape == (2, 1 + rows * columns, channels)
    torch.testing.assert_close(encoded.cls, features.mean((2, 3)), rtol=0, atol=1e-5)
    for row in range(rows):
        for column in range(columns):
            token = encoded.tokens[:, 1 + row * columns + column]
            torch.testing.assert_close(token, features[:, :, row, column], rtol=0, atol=1e-5)
    torch.testing.assert_close(alone.tokens[0], encoded.tokens[1], rtol=0, atol=1e-5)
    assert (encoder.width, encoder.num_layers, encoder.num_heads) == (channels, len(STAGES[name]), 0)
    assert (encoder.image_size, encoder.mean, encoder.std) == (
        SIDE,
        tuple(model.pretrained_cfg["mean"]),
        tuple(model.pretrained_cfg["std"]),
    )


@pytest.mark.parametrize("name", STAGES)
def test_parts_by_name(name: str) -> None:
    encoder = CnnImageEncoder(name, "", SIDE)
    stages = [encoder.model.get_submodule(stage) for stage in STAGES[name]]
    assert [id(block) for block in encoder.all_blocks()] == [id(stage) for stage in stages]
    stem = {id(parameter) for parameter in encoder.embedding_parameters()}
    in_stages = {id(parameter) for stage in stages for parameter in stage.parameters()}
    assert stem and not stem & in_stages
    images = next(module for module in encoder.modules() if isinstance(module, nn.Conv2d))
    assert images.in_channels == 3 and id(images.weight) in stem


@pytest.mark.parametrize("name", STAGES)
def test_every_parameter_learns(name: str) -> None:
    encoder = CnnImageEncoder(name, "", SIDE)
    assert encoder.training and all(module.training for module in encoder.modules())
    encoder(torch.randn(2, 3, SIDE, SIDE)).tokens.square().sum().backward()
    assert not [key for key, parameter in encoder.named_parameters() if parameter.grad is None]


def test_building_leaves_statistics_alone() -> None:
    encoder = CnnImageEncoder("test_resnet", "", SIDE)
    counts = [buffer for name, buffer in encoder.named_buffers() if name.endswith("num_batches_tracked")]
    assert counts and not any(count.item() for count in counts)
    assert encoder.state_dict().keys() == CnnImageEncoder("test_resnet", "", 96).state_dict().keys()


@pytest.mark.parametrize(
    ("name", "deep"), [("test_resnet", "layer4.0.conv1"), ("test_convnext", "stages.3.blocks.0.conv_dw")]
)
def test_recomputed_activations_give_the_same_gradients(name: str, deep: str) -> None:
    encoder = CnnImageEncoder(name, "", SIDE)
    assert encoder.checkpoint_activations is False
    runs: list[int] = []
    encoder.model.get_submodule(deep).register_forward_pre_hook(lambda *_: runs.append(1))
    images, gradients = torch.randn(2, 3, SIDE, SIDE), []
    for checkpoint in (False, True):
        encoder.checkpoint_activations = checkpoint
        assert encoder.checkpoint_activations is checkpoint
        encoder.zero_grad()
        encoder(images).tokens.square().mean().backward()
        gradients.append({key: parameter.grad.clone() for key, parameter in encoder.named_parameters()})
    assert len(runs) == 3  # the second time once more, in the backward pass
    for key, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][key], gradient, rtol=1e-4, atol=1e-6, msg=key)


def test_what_a_network_does_not_have() -> None:
    encoder = CnnImageEncoder("test_resnet", "", SIDE)
    images = torch.randn(1, 3, SIDE, SIDE)
    with pytest.raises(ValueError, match="no patch embedding"):
        encoder.embed(images, torch.ones(1, 4, dtype=torch.bool), torch.zeros(encoder.width))
    for call in (lambda: encoder.block_state(0), lambda: encoder.drop_last_blocks(1)):
        with pytest.raises(UserError, match="timm's test_resnet: a CNN has no Transformer blocks"):
            call()
    tokens = torch.randn(2, 5, encoder.width)
    assert encoder.encode(tokens) is tokens


@pytest.mark.parametrize(
    ("name", "side", "message"),
    [
        ("test_vit", SIDE, "timm's test_vit gives no map of features of 64-pixel images; choose a convolutional"),
        ("vit_tiny_patch16_224", SIDE, "gives no map of features of 64-pixel images: Input height (64) doesn't match"),
        ("swin_tiny_patch4_window7_224", 224, "gives no map of features of 224-pixel images; choose"),
        ("test_resnet", 0, "timm's test_resnet gives no map of features of 0-pixel images: "),
        ("test_resnett", SIDE, "timm has no model 'test_resnett'; close ones: test_"),
    ],
)
def test_other_models_are_refused(name: str, side: int, message: str) -> None:
    with pytest.raises(UserError) as caught:
        CnnImageEncoder(name, "", side)
    assert message in str(caught.value) and "\n" not in str(caught.value)


def test_networks_that_cannot_do_all(tmp_path: Path) -> None:
    encoder = CnnImageEncoder("starnet_s1", "", SIDE)
    assert encoder.num_layers == 4
    weights = save(random_model("test_resnet"), tmp_path / "resnet.safetensors")
    with pytest.raises(UserError, match="resnet.safetensors does not hold the weights of timm's test_convnext"):
        CnnImageEncoder("test_convnext", weights, SIDE)
    with torch.device("meta"), pytest.raises(UserError, match="vgg11 cannot recompute its activations"):
        CnnImageEncoder("vgg11", "", SIDE).checkpoint_activations = True
    with torch.device("meta"), pytest.raises(UserError, match="timm does not tell the stages of inception_v3"):
        CnnImageEncoder("inception_v3", "", 128)
