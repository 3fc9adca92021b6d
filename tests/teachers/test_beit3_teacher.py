"""BEiT-3 as teacher of images, of captions, and of both together."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from emkum.errors import UserError
from emkum.models.beit3 import BEiT3
from emkum.teachers.base import FrozenTeacher, TeacherInput
from emkum.teachers.beit3_teacher import beit3_teacher
from emkum.weights import fingerprint

SIDE, PAD = 16, 1
TEXT = torch.tensor([[0, 7, 8, 9, 2], [0, 11, 2, PAD, PAD], [0, 12, 13, 2, PAD], [0, 5, 6, 7, 2]])
HIDDEN = TEXT == PAD
# Rows of the images that the captions describe.
OWNERS = [0, 2, 2, 1]


@pytest.fixture(autouse=True)
def one_thread() -> None:
    torch.manual_seed(0)
    torch.set_num_threads(1)


def encoder() -> BEiT3:
    sizes = {"width": 32, "layers": 3, "heads": 4, "ffn_width": 48, "max_positions": 12}
    model = BEiT3(20, **sizes, image_size=SIDE, patch_size=4)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.1)
    return model.eval()


def teacher_of(model: BEiT3, **options: Any) -> FrozenTeacher:
    return beit3_teacher(model, {"teacher": "beit3"}, Path("beit3.spm"), **options)


def pixels() -> Tensor:
    return torch.randint(0, 256, (3, 3, SIDE, SIDE), dtype=torch.uint8)


def batch(images: Tensor, captions: bool = True, padded: bool = True) -> TeacherInput:
    ids = torch.arange(len(images))
    text = (TEXT, HIDDEN if padded else None, torch.tensor(OWNERS)) if captions else ()
    return TeacherInput(images, ids, torch.full_like(ids, -1), "train", *text)


def close(actual: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(actual, expected, rtol=0, atol=1e-5)


def normalized(images: Tensor) -> Tensor:
    """Black is -1, white 1."""
    return images.float() / 127.5 - 1


def test_what_it_declares() -> None:
    model = encoder()
    teacher = teacher_of(model, max_tokens=10)
    assert (teacher.modalities, teacher.image_size, teacher.grid) == (("image", "text"), SIDE, (4, 4))
    assert (teacher.width, teacher.patch_width, teacher.num_classes, teacher.max_tokens) == (32, 32, 0, 10)
    assert teacher.tokenizer == Path("beit3.spm")
    known = {"teacher": "beit3", "pooling": "default", "weights_sha256": fingerprint(model), "mean": [0.5] * 3}
    assert teacher.identity.items() >= (known | {"std": [0.5] * 3, "image_size": SIDE, "target": "image"}).items()
    assert teacher_of(model).max_tokens == 12
    assert not any(module.training for module in teacher.model.modules())
    assert not any(parameter.requires_grad for parameter in teacher.model.parameters())


@pytest.mark.parametrize("layers", [False, True])
def test_images(layers: bool) -> None:
    model, images = encoder(), pixels()
    with torch.no_grad():
        tokens, states = model(normalized(images)).tokens, model.hidden_states(normalized(images))
    for pooling, expected in (("default", tokens[:, 0]), ("cls", tokens[:, 0]), ("mean", tokens[:, 1:].mean(1))):
        output = teacher_of(model, pooling=pooling, layers=layers)(batch(images, captions=False))
        close(output.features, expected)
        close(output.patches, tokens[:, 1:])
        assert output.text_features is None and output.logits is None
        assert (output.layers is None) == (not layers)
        for actual, state in zip(output.layers or states, states, strict=True):
            close(actual, state)


@pytest.mark.parametrize("padded", [True, False])
@pytest.mark.parametrize("pooling", ["default", "mean"])
def test_captions_and_pairs(pooling: str, padded: bool) -> None:
    model, images = encoder(), pixels()
    hidden = HIDDEN if padded else None
    with torch.no_grad():
        tokens = model(normalized(images)).tokens
        texts = model(text=TEXT, padding_mask=hidden).tokens[:, 0]
        pairs = [
            model(normalized(images[owner : owner + 1]), TEXT[t : t + 1], None if hidden is None else hidden[t : t + 1])
            for t, owner in enumerate(OWNERS)
        ]
    fused = torch.cat([pair.tokens[:, 0] for pair in pairs])
    of_images = tokens[:, 1:].mean(1) if pooling == "mean" else tokens[:, 0]

    def output_of(target: str) -> Any:
        return teacher_of(model, target=target, pooling=pooling)(batch(images, padded=padded))

    # By default captions are not looked at.
    assert output_of("image").text_features is None
    own = output_of("own")
    close(own.features, of_images)
    close(own.text_features, texts)
    average = output_of("average")
    close(average.features[2], (of_images[2] + (texts[1] + texts[2]) / 2) / 2)
    close(average.text_features[3], (of_images[1] + texts[3]) / 2)
    together = output_of("fused")
    close(together.text_features, fused)
    close(together.features, torch.stack([fused[0], fused[3], (fused[1] + fused[2]) / 2]))
    # Neither half alone.
    assert (fused - texts).abs().max() > 0.1 and (fused - tokens[OWNERS, 0]).abs().max() > 0.1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"pooling": "max"}, "--teacher-pooling 'max': beit3 knows default, cls, mean"),
        ({"max_tokens": 13}, "beit3 reads texts of up to 12 tokens, not of 13"),
        ({"target": "both"}, "choose from image, own, average, fused"),
    ],
)
def test_what_cannot_be(options: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        teacher_of(encoder(), **options)


def test_autocast_gives_float32_targets_that_are_near() -> None:
    model, images = encoder(), pixels()
    full, low = (teacher_of(model, target="fused", autocast=dtype)(batch(images)) for dtype in ("", "bfloat16"))
    for name in ("features", "text_features", "patches"):
        expected, actual = getattr(full, name), getattr(low, name)
        assert actual.dtype == torch.float32 and not torch.equal(actual, expected)
        torch.testing.assert_close(actual, expected, rtol=0.1, atol=0.1)
