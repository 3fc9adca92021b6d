"""Frozen teachers against the libraries they come from."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from emkum.errors import UserError
from emkum.layers.layer_targets import mean_of_layers
from emkum.models.data2vec2 import IMAGENET_MEAN, IMAGENET_STD, Data2Vec2ImageEncoder, Data2Vec2TextEncoder
from emkum.models.teacher_builders import FORMS, assert_reads_images, build_teacher
from emkum.teachers.base import TeacherConfig, TeacherInput
from emkum.teachers.encoder_teacher import SelfTeacher, encoder_teacher
from emkum.teachers.timm_teacher import timm_teacher

SIDE = 32


@pytest.fixture(autouse=True)
def one_thread() -> None:
    torch.manual_seed(0)
    torch.set_num_threads(1)


def pixels(count: int = 3, side: int = SIDE) -> Tensor:
    return torch.randint(0, 256, (count, 3, side, side), dtype=torch.uint8)


def batch(images: Tensor, ids: list[int] | None = None, views: list[int] | None = None, split: str = "train"):
    ids = list(range(len(images))) if ids is None else ids
    return TeacherInput(images, torch.tensor(ids), torch.tensor(views or [-1] * len(ids)), split)


def timm_model(name: str, **arguments: Any) -> nn.Module:
    model = timm.create_model(name, **arguments)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.1)
    return model.eval()


def save(model: nn.Module, path: Path) -> str:
    save_file({name: value.contiguous() for name, value in model.state_dict().items()}, path)
    return str(path)


def expected_of(model: nn.Module, images: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Normalized with the model's own statistics, by timm alone: tokens, pooled feature, logits."""
    config = model.pretrained_cfg
    mean, std = (torch.tensor(config[key]).view(1, 3, 1, 1) for key in ("mean", "std"))
    normalized = (images.float() / 255 - mean) / std
    with torch.no_grad():
        tokens = model.forward_features(normalized)
        return tokens, model.forward_head(tokens, pre_logits=True), model(normalized)


def assert_close(actual: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(actual, expected, rtol=0, atol=1e-6)


# test_vit normalizes with 0.5, deit_tiny with ImageNet's statistics.
@pytest.mark.parametrize("name", ["test_vit", "deit_tiny_patch16_224"])
def test_a_timm_vit_gives_its_own_features(name: str, tmp_path: Path) -> None:
    model = timm_model(name, img_size=SIDE)
    teacher = timm_teacher(name, TeacherConfig(save(model, tmp_path / "weights.safetensors"), SIDE))
    images = pixels()
    tokens, pooled, logits = expected_of(model, images)
    output = teacher(batch(images))
    assert_close(output.features, pooled)
    assert_close(output.logits, logits)
    assert_close(output.patches, tokens[:, 1:])
    assert teacher.width == teacher.patch_width == pooled.shape[1] and teacher.image_size == SIDE
    assert output.patches.shape == (3, (SIDE // 16) ** 2, teacher.width)
    assert teacher.grid == (SIDE // 16, SIDE // 16) and teacher.num_classes == logits.shape[1]
    assert teacher.modalities == ("image",)


# The last one widens its features before the classifier.
@pytest.mark.parametrize("name", ["test_resnet", "test_mambaout"])
def test_a_timm_cnn_gives_its_own_features_at_any_size(name: str, tmp_path: Path) -> None:
    model = timm_model(name)
    weights = save(model, tmp_path / "weights.safetensors")
    assert timm_teacher(name, TeacherConfig(weights)).image_size == model.pretrained_cfg["input_size"][-1] == 160
    teacher = timm_teacher(name, TeacherConfig(weights, image_size=64))
    images = pixels(side=64)
    features, pooled, logits = expected_of(model, images)
    output = teacher(batch(images))
    assert_close(output.features, pooled)
    assert_close(output.logits, logits)
    assert (teacher.width, teacher.image_size) == (pooled.shape[1], 64)
    rows, columns = teacher.grid
    # The map's places are patches, row by row, whichever way round the model keeps it.
    channels_last = getattr(model, "output_fmt", "NCHW") == "NHWC"
    expected = features if channels_last else features.permute(0, 2, 3, 1)
    assert expected.shape[1:3] == (rows, columns)
    for row in range(rows):
        for column in range(columns):
            assert_close(output.patches[:, row * columns + column], expected[:, row, column])


def test_a_model_without_classifier_has_no_logits() -> None:
    teacher = timm_teacher("vit_small_patch16_224.dino", TeacherConfig("", SIDE))
    output = teacher(batch(pixels()))
    assert output.logits is None and teacher.num_classes == 0
    assert output.features.shape == (3, teacher.width) == (3, 384)


def test_real_deit_tiny_tells_images_apart(shared_data: Path) -> None:
    name = "deit_tiny_patch16_224"
    weights = str(shared_data / name / "model_fp16.safetensors")
    teacher = build_teacher(f"timm:{name}", TeacherConfig(weights))
    model = timm.create_model(name, pretrained=True, pretrained_cfg_overlay={"file": weights}).eval()
    images = pixels(2, 224)
    assert (teacher.width, teacher.image_size) == (192, 224)
    assert_close(teacher(batch(images)).features, expected_of(model, images)[1])


def test_targets_take_no_gradient_but_losses_may_use_them(tmp_path: Path) -> None:
    teacher = timm_teacher("test_vit", TeacherConfig("", SIDE))
    output = teacher(batch(pixels()))
    assert not any(parameter.requires_grad for parameter in teacher.model.parameters())
    prediction = torch.randn(3, teacher.width, requires_grad=True)
    for part in (output.features, output.patches, output.logits):
        assert not part.requires_grad and not part.is_inference()
    (prediction * output.features).sum().backward()
    assert torch.equal(prediction.grad, output.features)


def test_a_teacher_stays_in_eval_mode() -> None:
    teacher = timm_teacher("test_resnet", TeacherConfig("", 64))
    before = {name: value.clone() for name, value in teacher.model.state_dict().items()}
    teacher(batch(pixels(side=64)))
    assert not any(module.training for module in teacher.model.modules())
    assert all(torch.equal(before[name], value) for name, value in teacher.model.state_dict().items())
    # No module's train(), to() or state_dict() can reach it.
    assert not isinstance(teacher, nn.Module)


def small_encoder(seed: int = 0) -> Data2Vec2ImageEncoder:
    torch.manual_seed(seed)
    encoder = Data2Vec2ImageEncoder(16, depth=2, prenet_depth=1, num_heads=2, input_size=SIDE, patch_size=8)
    with torch.no_grad():
        for parameter in encoder.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.1)
    return encoder


def test_encoder_teacher_pools_mean_and_maximum_of_patches() -> None:
    encoder = small_encoder()
    teacher = encoder_teacher(encoder, {"teacher": "mine"})
    images = pixels()
    output = teacher(batch(images))
    mean, std = (torch.tensor(values).view(1, 3, 1, 1) for values in (IMAGENET_MEAN, IMAGENET_STD))
    with torch.no_grad():
        tokens = encoder((images.float() / 255 - mean) / std).tokens
    for row in range(3):
        patches = tokens[row, 1:].double().numpy()
        expected = np.concatenate([patches.mean(0), patches.max(0)])
        np.testing.assert_allclose(output.features[row].numpy(), expected, atol=1e-5)
    assert torch.equal(output.patches, tokens[:, 1:])
    assert output.logits is None
    assert (teacher.width, teacher.image_size) == (32, SIDE)
    assert (output.features[0] - output.features[1]).abs().max() > 1e-2


def test_data2vec2_teacher_from_a_checkpoint(tmp_path: Path) -> None:
    encoder = small_encoder()
    path = tmp_path / "checkpoint.pt"
    torch.save({"model": encoder.state_dict(), "cfg": {"model": {"num_heads": 2, "norm_eps": 1e-6}}}, path)
    teacher = build_teacher(f"data2vec2:{path}")
    images = pixels()
    assert_close(teacher(batch(images)).features, encoder_teacher(encoder, {})(batch(images)).features)
    assert teacher.image_size == SIDE
    assert build_teacher(f"data2vec2:{path}", TeacherConfig(image_size=48)).image_size == 48


def test_identity_changes_with_the_weights(tmp_path: Path) -> None:
    model = timm_model("test_vit", img_size=SIDE)
    first = save(model, tmp_path / "first.safetensors")
    with torch.no_grad():
        model.blocks[3].mlp.fc1.bias[5] += 1e-3
    second = save(model, tmp_path / "second.safetensors")
    identities = [timm_teacher("test_vit", TeacherConfig(weights, SIDE)).identity for weights in (first, first, second)]
    assert identities[0] == identities[1]
    assert {key for key in identities[0] if identities[0][key] != identities[2][key]} == {"weights_sha256"}
    assert identities[0]["teacher"] == "timm:test_vit" and identities[0]["image_size"] == SIDE
    other = [encoder_teacher(small_encoder(seed), {"teacher": "x"}).identity for seed in (0, 0, 1)]
    assert other[0] == other[1] != other[2]


@pytest.mark.parametrize("spec", ["", "resnet50", "timm", "timm:", "cached:", "data2vec2:", "clip:ViT-B-32"])
def test_unknown_teachers_name_the_choices(spec: str) -> None:
    with pytest.raises(UserError, match="choose timm:NAME, data2vec2:FILE") as caught:
        build_teacher(spec)
    assert repr(spec) in str(caught.value) and "\n" not in str(caught.value)
    assert all(form in str(caught.value) for form in FORMS)


@pytest.mark.parametrize(
    ("spec", "config", "message"),
    [
        ("timm:no_such_model", {}, "timm has no model 'no_such_model'"),
        ("timm:test_vit", {"weights": "no/such.safetensors"}, "no such file: no/such.safetensors"),
        ("data2vec2:no/such.pt", {}, "no such file: no/such.pt"),
        ("checkpoint:no/such.pt", {}, "no such checkpoint: no/such.pt"),
        ("cached:no/such", {}, "no teacher cache at no/such"),
        ("cached:no/such", {"pooling": "cls"}, "--teacher-pooling has no effect on cached:no/such"),
        ("self", {}, "only training has"),
        ("timm:test_vit", {"weights": "", "pooling": "max"}, "'max': timm:test_vit knows default, cls, mean"),
        ("timm:test_resnet", {"weights": "", "pooling": "cls"}, "has no CLS token; choose default or mean"),
        ("timm:test_vit", {"weights": "", "target": "own"}, "needs a teacher that reads images and text"),
        ("timm:test_vit", {"weights": "", "autocast": "int8"}, "choose from auto, bfloat16, float16"),
    ],
)
def test_teachers_that_cannot_be_had(spec: str, config: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message) as caught:
        build_teacher(spec, TeacherConfig(**config))
    assert "\n" not in str(caught.value)


# ----------------------------------------------------------------------------------------------------------------------
# Poolings, layers, ways to run
# ----------------------------------------------------------------------------------------------------------------------


def test_timm_poolings(tmp_path: Path) -> None:
    name = "deit_tiny_patch16_224"
    model = timm_model(name, img_size=SIDE)
    weights = save(model, tmp_path / "weights.safetensors")
    images = pixels()
    tokens, pooled, _ = expected_of(model, images)
    for pooling, expected in (("default", pooled), ("cls", tokens[:, 0]), ("mean", tokens[:, 1:].mean(1))):
        teacher = timm_teacher(name, TeacherConfig(weights, SIDE, pooling))
        assert_close(teacher(batch(images)).features, expected)
        assert teacher.identity["pooling"] == pooling


@pytest.mark.parametrize("name", ["test_vit", "deit_tiny_patch16_224", "test_resnet"])
def test_all_layers_of_a_timm_model(name: str, tmp_path: Path) -> None:
    sizes = {} if name == "test_resnet" else {"img_size": SIDE}
    model = timm_model(name, **sizes)
    weights = save(model, tmp_path / "weights.safetensors")
    seen: list[Tensor] = []
    blocks = [model.layer1, model.layer2, model.layer3, model.layer4] if name == "test_resnet" else model.blocks
    hooks = [block.register_forward_hook(lambda _, __, output: seen.append(output.clone())) for block in blocks]
    images = pixels()
    _, pooled, logits = expected_of(model, images)
    for hook in hooks:
        hook.remove()
    output = timm_teacher(name, TeacherConfig(weights, SIDE), layers=True)(batch(images))
    assert_close(output.features, pooled)
    assert_close(output.logits, logits)
    for layer, expected in zip(output.layers[-len(blocks) :], seen[: len(blocks)], strict=True):
        assert_close(layer, expected.flatten(2).transpose(1, 2) if expected.ndim == 4 else expected)
    assert timm_teacher(name, TeacherConfig(weights, SIDE))(batch(images)).layers is None


def test_a_compiled_teacher_gives_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    compiled: list[nn.Module] = []

    def compile_by_name(module: nn.Module) -> Any:
        compiled.append(module)
        return lambda *arguments, **options: module(*arguments, **options)

    # The compiler itself takes half a minute and needs one of C++: that it gets the model is what is seen here.
    monkeypatch.setattr(torch, "compile", compile_by_name)
    torch.manual_seed(0)
    plain = timm_teacher("test_vit", TeacherConfig("", SIDE))
    assert compiled == []
    torch.manual_seed(0)
    teacher = timm_teacher("test_vit", TeacherConfig("", SIDE, compile=True))
    assert compiled == [teacher.model]
    images = pixels()
    assert torch.equal(teacher(batch(images)).features, plain(batch(images)).features)


def test_autocast_is_used_and_targets_are_float32() -> None:
    torch.manual_seed(0)
    full = timm_teacher("test_vit", TeacherConfig("", SIDE))
    torch.manual_seed(0)
    low = timm_teacher("test_vit", TeacherConfig("", SIDE, autocast="bfloat16"))
    images = pixels()
    one, other = full(batch(images)), low(batch(images))
    for name in ("features", "patches", "logits"):
        expected, actual = getattr(one, name), getattr(other, name)
        assert actual.dtype == torch.float32 and not torch.equal(actual, expected)
        torch.testing.assert_close(actual, expected, rtol=0.1, atol=0.1)


# ----------------------------------------------------------------------------------------------------------------------
# Data2Vec 2 and students
# ----------------------------------------------------------------------------------------------------------------------


def test_data2vec2_poolings_and_layers() -> None:
    encoder, images = small_encoder(), pixels()
    mean, std = (torch.tensor(values).view(1, 3, 1, 1) for values in (IMAGENET_MEAN, IMAGENET_STD))
    normalized = (images.float() / 255 - mean) / std
    with torch.no_grad():
        tokens, states = encoder(normalized).tokens, encoder.hidden_states(normalized)
    averaged = mean_of_layers(states)
    for pooling, features, patches in (
        ("cls", tokens[:, 0], tokens[:, 1:]),
        ("mean", tokens[:, 1:].mean(1), tokens[:, 1:]),
        ("layers", averaged[:, 0], averaged[:, 1:]),
    ):
        output = encoder_teacher(encoder, {}, TeacherConfig(pooling=pooling), layers=True)(batch(images))
        assert_close(output.features, features)
        assert_close(output.patches, patches)
        assert len(output.layers) == 3
        for layer, expected in zip(output.layers, states, strict=True):
            assert_close(layer, expected)
    with pytest.raises(UserError, match="data2vec2 knows default, mean_max, cls, mean, layers"):
        encoder_teacher(encoder, {}, TeacherConfig(pooling="max"))


def test_data2vec2_text_teacher(tmp_path: Path) -> None:
    torch.manual_seed(0)
    encoder = Data2Vec2TextEncoder(30, 16, depth=2, num_heads=2, max_positions=12).eval()
    path = tmp_path / "text.pt"
    torch.save({"model": encoder.state_dict(), "cfg": {"model": {"num_heads": 2, "norm_eps": 1e-5}}}, path)
    text = torch.tensor([[0, 5, 6, 7, 2], [0, 9, 2, 1, 1]])
    hidden = text == 1
    with torch.no_grad():
        tokens = encoder(text, hidden).tokens
    inputs = TeacherInput(None, torch.arange(2), torch.full((2,), -1), "train", text, hidden)
    teacher = build_teacher(f"data2vec2:{path}")
    assert (teacher.modalities, teacher.image_size, teacher.max_tokens, teacher.width) == (("text",), 0, 12, 16)
    assert_close(teacher(inputs).features, tokens[:, 0])
    mean = build_teacher(f"data2vec2:{path}", TeacherConfig(pooling="mean"))(inputs).features
    assert_close(mean, torch.stack([tokens[0, 1:].mean(0), tokens[1, 1:3].mean(0)]))
    with pytest.raises(UserError, match="reads text alone and has no targets for images"):
        assert_reads_images(teacher, "data2vec2:text.pt")


def test_the_students_own_average() -> None:
    class Average(nn.Module):
        def encode_image(self, images: Tensor) -> Any:
            assert not torch.is_grad_enabled()
            return type("Encoded", (), {"cls": images.half().mean((2, 3)), "tokens": images.flatten(2).half()})()

    teacher = SelfTeacher(SIDE)
    teacher.bind(Average())
    images = pixels()
    output = teacher(batch(images))
    torch.testing.assert_close(output.features, images.half().mean((2, 3)).float())
    assert output.features.dtype == output.patches.dtype == torch.float32
    assert teacher.width == 0 and teacher.image_size == SIDE
