"""open_clip's models as teachers against open_clip itself, with random weights that it wrote."""

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from emkum.data.tokenizers import encode, load_tokenizer
from emkum.errors import UserError
from emkum.models.teacher_builders import build_teacher
from emkum.teachers.base import TeacherConfig, TeacherInput

open_clip = pytest.importorskip("open_clip")

TINY = {
    "embed_dim": 24,
    "vision_cfg": {"image_size": 32, "layers": 2, "width": 64, "head_width": 16, "patch_size": 8},
    "text_cfg": {"context_length": 20, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 2},
}
NAME = "ViT-tiny-of-tests"
CAPTIONS = ["a dog in the snow", "two red circles left of a square", "cat"]


@pytest.fixture(scope="module", autouse=True)
def registered(tmp_path_factory: pytest.TempPathFactory) -> None:
    import json

    folder = tmp_path_factory.mktemp("configs")
    (folder / f"{NAME}.json").write_text(json.dumps(TINY))
    open_clip.add_model_config(folder)


@pytest.fixture(scope="module")
def model(registered: None) -> nn.Module:
    torch.manual_seed(0)
    model = open_clip.create_model(NAME).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.05)
    return model


@pytest.fixture(scope="module", params=["safetensors", "training checkpoint"])
def weights(request: pytest.FixtureRequest, model: nn.Module, tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("weights")
    if request.param == "safetensors":
        save_file(
            {name: value.contiguous() for name, value in model.state_dict().items()}, folder / "model.safetensors"
        )
        return str(folder / "model.safetensors")
    # As its trainer saves them from several devices.
    state = {f"module.{name}": value for name, value in model.state_dict().items()}
    torch.save({"epoch": 3, "name": "run", "state_dict": state}, folder / "epoch_3.pt")
    return str(folder / "epoch_3.pt")


def batch(images: Tensor, captions: list[str] | None = None, owners: list[int] | None = None) -> TeacherInput:
    ids = torch.arange(len(images))
    if captions is None:
        return TeacherInput(images, ids, ids, "train")
    tokenizer = load_tokenizer(Path(open_clip.__file__).parent / "bpe_simple_vocab_16e6.txt.gz")
    rows = [encode(tokenizer, caption, 20) for caption in captions]
    longest = max(map(len, rows))
    text = torch.tensor([row + [tokenizer.special.pad] * (longest - len(row)) for row in rows])
    hidden = torch.arange(longest) >= torch.tensor([len(row) for row in rows])[:, None]
    return TeacherInput(images, ids, ids, "train", text, hidden, torch.tensor(owners))


def pixels(count: int = 3) -> Tensor:
    torch.manual_seed(1)
    return torch.randint(0, 256, (count, 3, 32, 32), dtype=torch.uint8)


def expected_of(model: nn.Module, images: Tensor, captions: list[str]) -> tuple[Tensor, Tensor]:
    cfg = open_clip.model.get_model_preprocess_cfg(model)
    mean, std = (torch.tensor(cfg[key]).view(1, 3, 1, 1) for key in ("mean", "std"))
    tokens = open_clip.get_tokenizer(NAME)(captions)
    with torch.no_grad():
        return model.encode_image((images / 255 - mean) / std), model.encode_text(tokens)


def close(actual: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(actual, expected, rtol=0, atol=1e-5)


def test_image_and_text_features_are_open_clips(model: nn.Module, weights: str) -> None:
    images = pixels()
    expected, texts = expected_of(model, images, CAPTIONS)
    teacher = build_teacher(f"openclip:{NAME}", TeacherConfig(weights=weights, target="own"))
    output = teacher(batch(images, CAPTIONS, [0, 2, 2]))
    close(output.features, expected)
    close(output.text_features, texts)
    assert (teacher.width, teacher.image_size, teacher.grid, teacher.patch_width) == (24, 32, (4, 4), 64)
    assert (teacher.modalities, teacher.max_tokens, teacher.num_classes) == (("image", "text"), 20, 0)
    assert output.patches.shape == (3, 16, 64)
    # By default captions are not looked at.
    alone = build_teacher(f"openclip:{NAME}", TeacherConfig(weights=weights))(batch(images))
    close(alone.features, expected)
    assert alone.text_features is None


def test_the_average_of_both(model: nn.Module, weights: str) -> None:
    images, owners = pixels(), [0, 2, 2, 1]
    captions = [*CAPTIONS, "a photo of a tench"]
    expected, texts = expected_of(model, images, captions)
    teacher = build_teacher(f"openclip:{NAME}", TeacherConfig(weights=weights, target="average"))
    output = teacher(batch(images, captions, owners))
    of_image = [texts[0], texts[3], (texts[1] + texts[2]) / 2]
    close(output.features, torch.stack([(expected[i] + of_image[i]) / 2 for i in range(3)]))
    close(output.text_features, torch.stack([(expected[owner] + texts[t]) / 2 for t, owner in enumerate(owners)]))


def test_layers_of_the_image_tower(model: nn.Module, weights: str) -> None:
    images = pixels()
    teacher = build_teacher(f"openclip:{NAME}", TeacherConfig(weights=weights), layers=True)
    output = teacher(batch(images))
    assert [tuple(layer.shape) for layer in output.layers] == [(3, 17, 64)] * 2
    with torch.no_grad():
        normed = model.visual.ln_post(output.layers[-1])
        close(output.patches, normed[:, 1:])
        close(output.features, normed[:, 0] @ model.visual.proj)


@pytest.mark.parametrize(
    ("spec", "config", "message"),
    [
        ("openclip:ViT-Z-1", {}, "open_clip has no model 'ViT-Z-1'; close ones: ViT"),
        (f"openclip:{NAME}", {"weights": "no/such.pt"}, "no such file: no/such.pt"),
        (f"openclip:{NAME}", {"pooling": "cls"}, "knows default alone"),
        (f"openclip:{NAME}", {"weights": "hub"}, "the hub has several: give openclip:ViT-tiny-of-tests/TAG of none"),
        (f"openclip:{NAME}", {"weights": "", "target": "fused"}, "cannot read an image and a text together"),
        (f"openclip:{NAME}", {"weights": "", "target": "both"}, "choose from image, own, average, fused"),
    ],
)
def test_what_cannot_be(spec: str, config: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message) as caught:
        build_teacher(spec, TeacherConfig(**config))
    assert "\n" not in str(caught.value)


def test_weights_of_another_model(tmp_path: Path, model: nn.Module) -> None:
    state = {name: value for name, value in model.state_dict().items() if "ln_final" not in name}
    torch.save(state | {"more": torch.zeros(2)}, tmp_path / "other.pt")
    config = TeacherConfig(weights=str(tmp_path / "other.pt"))
    with pytest.raises(UserError, match=r"missing: ln_final.bias, ln_final.weight; unexpected: more"):
        build_teacher(f"openclip:{NAME}", config)
    allowed = TeacherConfig(weights=config.weights, allow_missing="ln_final.*,more")
    assert build_teacher(f"openclip:{NAME}", allowed).width == 24


def test_hub_out_of_reach(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    import huggingface_hub.constants

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(open_clip.factory, "download_pretrained", _unreachable)
    with pytest.raises(UserError, match="could not be downloaded .*open_clip_model.safetensors elsewhere"):
        build_teacher("openclip:ViT-B-32/laion2b_s34b_b79k")


def _unreachable(*arguments: Any, **options: Any) -> None:
    raise OSError("no way to the hub")
