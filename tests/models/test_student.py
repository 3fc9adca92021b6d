"""The image-text student and its builder."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from emkum.errors import UserError
from emkum.layers.attention import choose_attention_kernel
from emkum.layers.token_types import IMAGE, TEXT, TokenTypes
from emkum.models.builders import Targets, build_student
from emkum.models.encoder_builders import SIZES
from emkum.models.student import ImageNormalizer, ImageTextStudent, normalized_sounds
from emkum.outputs import StudentOutput

PAD, VOCABULARY, SIDE = 1, 30, 16
LENGTHS = (3, 4, 4, 6, 7)


@pytest.fixture(autouse=True)
def one_thread() -> None:
    torch.manual_seed(0)
    torch.set_num_threads(1)


def student(target_width: int | None = None, seed: int = 0, **options: Any) -> ImageTextStudent:
    """A tiny student in float64 and eval mode whose every parameter is random enough to matter."""
    torch.manual_seed(seed)
    options = {"student_size": "tiny", "image_size": SIDE, "image_patch_size": 8} | options
    model = build_student(options, VOCABULARY, Targets(target_width))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.1)
    return model.double().eval()


def captions(lengths: tuple[int, ...] = LENGTHS, padded_to: int = max(LENGTHS)) -> tuple[Tensor, Tensor]:
    """Random captions, ordered by length as `collate` orders them, and their padding mask."""
    generator = torch.Generator().manual_seed(1)
    text = torch.randint(4, VOCABULARY, (len(lengths), max(lengths)), generator=generator)
    text = nn.functional.pad(text, (0, padded_to - max(lengths)), value=PAD)
    for row, length in enumerate(lengths):
        text[row, length:] = PAD
    return text, text.eq(PAD)


def images(count: int = 3) -> Tensor:
    return torch.randint(0, 256, (count, 3, SIDE, SIDE), dtype=torch.uint8, generator=torch.Generator().manual_seed(2))


def compared(output: StudentOutput) -> list[Tensor]:
    """Features and predictions of both modalities."""
    return [value for part in (output.image, output.text) for value in (part.features, part.prediction)]


def assert_same_tokens(actual: Tensor, expected: Tensor, padding_mask: Tensor) -> None:
    """Equal wherever there is no padding; there the tokens mean nothing."""
    torch.testing.assert_close(actual[~padding_mask], expected[~padding_mask], rtol=0, atol=1e-6)


def test_more_padding_changes_nothing() -> None:
    model = student()
    text, mask = captions()
    longer, longer_mask = captions(padded_to=max(LENGTHS) + 5)
    expected = model.encode_text(text, mask).tokens
    assert_same_tokens(model.encode_text(longer, longer_mask).tokens[:, : text.shape[1]], expected, mask)
    for row, length in enumerate(LENGTHS):
        alone = model.encode_text(text[row : row + 1, :length]).tokens
        torch.testing.assert_close(alone[0], expected[row, :length], rtol=0, atol=1e-6)


def test_what_stands_at_padding_changes_nothing() -> None:
    model = student()
    text, mask = captions()
    other = torch.where(mask, torch.full_like(text, 7), text)
    assert_same_tokens(model.encode_text(other, mask).tokens, model.encode_text(text, mask).tokens, mask)


@pytest.mark.parametrize("groups", [[(5, 7)], [(2, 4), (3, 7)], [(1, 3), (2, 4), (1, 6), (1, 7)]])
def test_groups_of_captions_change_nothing(groups: list[tuple[int, int]]) -> None:
    model = student()
    text, mask = captions()
    whole, grouped = model.encode_text(text, mask), model.encode_text(text, mask, groups)
    assert grouped.tokens.shape == whole.tokens.shape
    assert torch.equal(grouped.padding_mask, mask)
    assert_same_tokens(grouped.tokens, whole.tokens, mask)
    output = model(images(), text, mask, groups)
    torch.testing.assert_close(output.text.features, whole.cls, rtol=0, atol=1e-6)


def test_groups_run_at_their_own_length() -> None:
    model = student()
    text, mask = captions()
    shapes = []
    embed = model.text_encoder.embed
    model.text_encoder.embed = lambda tokens: shapes.append(tuple(tokens.shape)) or embed(tokens)
    model.encode_text(text, mask, [(2, 4), (3, 7)])
    assert shapes == [(2, 4), (3, 7)]


def test_a_batch_is_as_its_rows_alone() -> None:
    model = student(target_width=5)
    text, mask = captions()
    whole = model(images(), text, mask)
    for row in range(3):
        part = slice(row, row + 1)
        alone = model(images()[part], text[part], mask[part])
        for ours, reference in zip(compared(alone), compared(whole), strict=True):
            torch.testing.assert_close(ours, reference[part], rtol=0, atol=1e-6)
    assert (whole.image.features[0] - whole.image.features[1]).abs().max() > 1e-2
    assert (whole.text.features[0] - whole.text.features[1]).abs().max() > 1e-2


def test_the_order_of_tokens_matters() -> None:
    model = student()
    text, mask = captions((5,), 5)
    turned = text[:, [0, 2, 1, 3, 4]]
    assert (model.encode_text(text, mask).cls - model.encode_text(turned, mask).cls).abs().max() > 1e-3
    picture = images(1)
    assert (model.encode_image(picture).cls - model.encode_image(picture.flip(-1)).cls).abs().max() > 1e-3


def test_features_are_the_shared_cls_tokens() -> None:
    model = student(target_width=5)
    text, mask = captions()
    output = model(images(), text, mask)
    assert torch.equal(output.image.features, output.image.tokens[:, 0])
    assert torch.equal(output.text.features, output.text.tokens[:, 0])
    assert output.image.tokens.shape == (3, 1 + (SIDE // 8) ** 2, model.image_encoder.width)
    assert output.text.tokens.shape == (*text.shape, model.image_encoder.width)
    assert output.image.padding_mask is None and torch.equal(output.text.padding_mask, mask)
    assert output.image.prediction.shape == (3, 5) and output.text.prediction.shape == (5, 5)
    torch.testing.assert_close(output.text.prediction, model.heads.prediction(output.text.features))


def test_state_dict_round_trip() -> None:
    text, mask = captions()
    source, target = student(target_width=5, seed=0), student(target_width=5, seed=1)
    expected = source(images(), text, mask)
    assert not torch.allclose(target(images(), text, mask).image.features, expected.image.features, atol=1e-2)
    target.load_state_dict(source.state_dict())
    loaded = target(images(), text, mask)
    for ours, reference in zip(compared(loaded), compared(expected), strict=True):
        assert torch.equal(ours, reference)


def test_eval_is_deterministic_and_training_is_not() -> None:
    model = student(text_dropout=0.3, shared_dropout=0.3, image_drop_path=0.5)
    text, mask = captions()
    first, second = (model(images(), text, mask) for _ in range(2))
    assert torch.equal(first.text.features, second.text.features)
    assert torch.equal(first.image.features, second.image.features)
    model.train()
    first, second = (model(images(), text, mask) for _ in range(2))
    assert not torch.equal(first.text.features, second.text.features)
    assert not torch.equal(first.image.features, second.image.features)


def test_widths_that_differ_are_projected() -> None:
    model = student(image_encoder="timm:test_vit", image_size=32, image_layers=1, text_layers=1)
    wide, narrow = model.text_encoder.width, model.image_encoder.width
    assert (wide, narrow) == (SIZES["tiny"].width, 64)
    assert isinstance(model.image_projection, nn.Identity)
    assert (model.text_projection.in_features, model.text_projection.out_features) == (wide, narrow)
    picture = torch.randint(0, 256, (2, 3, 32, 32), dtype=torch.uint8)
    text, mask = captions()
    output = model(picture, text, mask)
    assert output.image.features.shape == (2, narrow) and output.text.features.shape == (len(text), narrow)
    with torch.no_grad():
        model.text_projection.weight.zero_()
        model.text_projection.bias.zero_()
    flat = model.encode_text(text, mask).cls
    torch.testing.assert_close(flat, flat[:1].expand_as(flat))


def test_equal_widths_are_not_projected() -> None:
    model = student()
    assert isinstance(model.text_projection, nn.Identity) and isinstance(model.image_projection, nn.Identity)


def count(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def test_token_types_add_two_vectors_and_a_layer_scale() -> None:
    with torch.device("meta"):
        assert count(TokenTypes(768, None)) == 1536
        assert count(TokenTypes(768)) == 1536 + 768
    width = SIZES["tiny"].width
    without = count(student(token_type_place="none"))
    assert count(student(token_type_layer_scale=0)) - without == 2 * width
    assert count(student()) - without == 3 * width


def test_token_types_are_scaled_and_added() -> None:
    layer = TokenTypes(4, layer_scale=0.5)
    tokens = torch.randn(2, 3, 4)
    rows = layer.embedding.weight
    assert not torch.equal(rows[IMAGE], rows[TEXT])
    for token_type in (IMAGE, TEXT):
        torch.testing.assert_close(layer(tokens, token_type), tokens + 0.5 * rows[token_type])
    assert torch.equal(TokenTypes(4).scale, torch.full((4,), 1e-5))
    bare = TokenTypes(4, layer_scale=None)
    assert bare.scale is None
    torch.testing.assert_close(bare(tokens, TEXT), tokens + bare.embedding.weight[TEXT])


def test_each_modality_gets_its_own_token_type() -> None:
    text, mask = captions()
    model, bare = student(), student(token_type_place="none")
    bare.load_state_dict({k: v for k, v in model.state_dict().items() if not k.startswith("after.token_types.")})
    for zeroed, changed, kept in ((IMAGE, "text", "image"), (TEXT, "image", "text")):
        saved = model.after.token_types.embedding.weight.detach().clone()
        with torch.no_grad():
            model.after.token_types.embedding.weight[zeroed] = 0
        output, plain = model(images(), text, mask), bare(images(), text, mask)
        torch.testing.assert_close(getattr(output, kept).features, getattr(plain, kept).features)
        assert not torch.allclose(getattr(output, changed).features, getattr(plain, changed).features)
        with torch.no_grad():
            model.after.token_types.embedding.weight.copy_(saved)


@pytest.mark.parametrize("scale", [0, 0.0])
def test_layer_scale_zero_means_none(scale: float) -> None:
    assert student(token_type_layer_scale=scale).after.token_types.scale is None


@pytest.mark.parametrize(
    ("option", "value", "named"),
    [
        ("student_size", "huge", ["--student-size 'huge'", *SIZES]),
        ("image_encoder", "resnet50", ["--image-encoder 'resnet50'", "data2vec2", "timm:NAME"]),
        ("image_encoder", "timm:no_such_vit", ["no_such_vit"]),
        ("token_type_place", "within", ["--token-type-place 'within'", "before", "after", "none"]),
        ("image_weights", "no/such/file.pt", ["no/such/file.pt"]),
        ("text_weights", "no/such/file.pt", ["no/such/file.pt"]),
    ],
)
def test_unknown_values_are_one_line_that_names_the_choices(option: str, value: str, named: list[str]) -> None:
    with pytest.raises(UserError) as caught:
        student(**{option: value})
    message = str(caught.value)
    assert "\n" not in message
    assert all(name in message for name in named), message


def test_pretrained_weights_are_not_read_where_a_checkpoint_follows() -> None:
    options = {"student_size": "tiny", "image_size": SIDE, "image_patch_size": 8}
    options |= {"image_weights": "no/such/file.pt", "text_weights": "no/such/file.pt"}
    assert isinstance(build_student(options, VOCABULARY, pretrained=False), ImageTextStudent)


@pytest.mark.parametrize("name", SIZES)
def test_every_size_builds(name: str) -> None:
    size = SIZES[name]
    model = build_student({"student_size": name, "image_size": 32}, VOCABULARY, Targets(7))
    for encoder in (model.image_encoder, model.text_encoder):
        assert (encoder.width, encoder.num_heads, encoder.num_layers) == (size.width, size.heads, size.layers)
        assert len(encoder.all_blocks()) == size.layers
    assert [block.attn.num_heads for block in model.shared_encoder.blocks] == [size.heads] * size.shared_layers
    prenet = [key for key in model.image_encoder.state_dict() if "context_encoder.blocks" in key]
    assert len({key.split(".blocks.")[1].split(".")[0] for key in prenet}) == size.prenet_layers


def test_layers_can_be_chosen_apart() -> None:
    model = student(image_layers=1, text_layers=2, shared_layers=3)
    assert model.image_encoder.num_layers == 1
    assert model.text_encoder.num_layers == 2
    assert len(model.shared_encoder.blocks) == 3


def test_without_a_target_there_is_no_distillation_head() -> None:
    text, mask = captions()
    with_head, without = student(target_width=5), student()
    output = without(images(), text, mask)
    assert without.heads.prediction is None
    assert output.image.prediction is None and output.text.prediction is None
    extra = with_head.state_dict().keys() - without.state_dict().keys()
    assert extra and all(key.startswith("heads.prediction.") for key in extra)


def test_pixels_are_normalized() -> None:
    normalize = ImageNormalizer((0.5, 0.25, 0.0), (0.5, 0.25, 1.0))
    pixels = torch.tensor([0, 255, 51], dtype=torch.uint8).view(1, 3, 1, 1)
    torch.testing.assert_close(normalize(pixels).flatten(), torch.tensor([-1.0, 3.0, 0.2]))
    assert normalize.half()(pixels).dtype == torch.float16
    assert normalize.state_dict() == {}


@pytest.mark.parametrize("encoder", ["data2vec2", "timm:test_vit"])
def test_bfloat16_autocast_is_close_to_float32(encoder: str) -> None:
    model = build_student(
        {"student_size": "tiny", "image_size": 32, "image_patch_size": 8, "image_encoder": encoder},
        VOCABULARY,
        Targets(5),
    ).eval()
    picture = torch.randint(0, 256, (3, 3, 32, 32), dtype=torch.uint8)
    text, mask = captions()
    exact = model(picture, text, mask)
    choose_attention_kernel(model, picture.device, torch.bfloat16)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        rough = model(picture, text, mask)
    # The head's output is small beside what it sums, so that its relative error is larger.
    for name, limit in {"features": 1e-2, "prediction": 2e-2}.items():
        for modality in ("image", "text"):
            expected, actual = (getattr(getattr(o, modality), name).float() for o in (exact, rough))
            error = ((actual - expected).norm() / expected.norm()).item()
            assert 0 < error < limit, f"{modality} {name}: {error}"


@pytest.mark.skipif(not torch.cuda.is_available(), reason="half precision of the whole model needs a GPU")
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_on_a_gpu_is_close_to_float32(dtype: torch.dtype) -> None:
    options = {"student_size": "tiny", "image_size": 32, "image_patch_size": 8}
    model = build_student(options, VOCABULARY, Targets(5)).eval().cuda()
    picture = torch.randint(0, 256, (3, 3, 32, 32), dtype=torch.uint8).cuda()
    text, mask = (part.cuda() for part in captions())
    exact = model(picture, text, mask)
    rough = model.to(dtype)(picture, text, mask)
    for expected, actual in zip(compared(exact), compared(rough), strict=True):
        assert actual.dtype == dtype
        assert (actual.float() - expected).norm() < 2e-2 * expected.norm()


# sounds ---------------------------------------------------------------------------------------------------------------


def sounds(lengths: tuple[int, ...] = (1600, 700, 420), padded_to: int = 1600) -> tuple[Tensor, Tensor]:
    """Random sounds, each of its own loudness and offset, and their padding mask."""
    padding = torch.arange(padded_to) >= torch.tensor(lengths)[:, None]
    generator = torch.Generator().manual_seed(3)
    samples = torch.randn(len(lengths), padded_to, generator=generator) * torch.tensor([[3000.0], [50.0], [900.0]])
    return (samples + torch.tensor([[500.0], [-20.0], [0.0]])).to(torch.int16).masked_fill(padding, 0), padding


def test_each_sound_gets_mean_0_and_variance_1() -> None:
    samples, padding = sounds()
    found = normalized_sounds(samples, padding, torch.float64)
    for row, mask in zip(found, padding, strict=True):
        assert row[~mask].mean().abs() < 1e-9 and row[mask].abs().sum() == 0
    alone = nn.functional.layer_norm(samples[1, :700].double() / 32768, (700,), eps=1e-5)
    torch.testing.assert_close(found[1, :700], alone)
    torch.testing.assert_close(normalized_sounds(samples[1:2, :700], None, torch.float64)[0], alone)
    assert found[0].square().mean() == pytest.approx(1, abs=0.01)
    assert normalized_sounds(torch.zeros(1, 500, dtype=torch.int16)).abs().sum() == 0


@pytest.mark.parametrize("options", [{}, {"token_type_place": "before"}, {"position_kind": "learned"}])
def test_a_sound_is_the_same_alone_and_in_a_batch(options: dict[str, Any]) -> None:
    model = student(audio_encoder="data2vec2", audio_conv_width=4, audio_layers=2, head_itc="linear", **options)
    for padded_to in (1600, 2500):
        samples, padding = sounds(padded_to=padded_to)
        together = model.encode_audio(samples, padding)
        assert together.tokens.shape[:2] == together.padding_mask.shape
        for row, length in enumerate((1600, 700, 420)):
            alone = model.encode_audio(samples[row : row + 1, :length])
            torch.testing.assert_close(together.features[row : row + 1], alone.features, rtol=0, atol=1e-6)
    assert len(model.heads.contrast) == 3 and student(head_itc="linear").audio_encoder is None
    types = model.before["token_types"] if "token_type_place" in options else model.after["token_types"]
    assert types.embedding.weight.shape[0] == 3
