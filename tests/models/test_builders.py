"""Every architecture option of the student, and the sizes that come of them."""

from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from emkum.errors import UserError
from emkum.models.beit3 import BEiT3
from emkum.models.builders import Targets, build_student
from emkum.models.model_info import without_memory
from emkum.models.student import ImageTextStudent

VOCABULARY, SIDE, PAD = 30, 32, 1


@pytest.fixture(autouse=True)
def one_thread() -> None:
    torch.manual_seed(0)
    torch.set_num_threads(1)


def student(targets: Targets | None = None, **options: Any) -> ImageTextStudent:
    options = {"student_size": "tiny", "image_size": SIDE, "image_patch_size": 8} | options
    return build_student(options, VOCABULARY, targets).eval()


def inputs(rows: int = 3) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(2)
    images = torch.randint(0, 256, (rows, 3, SIDE, SIDE), dtype=torch.uint8, generator=generator)
    text = torch.randint(4, VOCABULARY, (rows, 7), generator=generator)
    text[-1, 5:] = PAD
    return images, text, text.eq(PAD)


def count(module: nn.Module | None) -> int:
    return 0 if module is None else sum(p.numel() for p in module.parameters() if p.requires_grad)


def millions(*modules: nn.Module) -> float:
    return sum(map(count, modules)) / 1e6


# ----------------------------------------------------------------------------------------------------------------------
# Sizes of the base models
# ----------------------------------------------------------------------------------------------------------------------


def test_sizes_of_shre() -> None:
    """The thesis counts 42.3 to 43.1 M for its image encoder, 66.4 M for BERT's half, 5.5 M for the shared MLP and
    114.2 M for all. Ours are 43.1 + 66.4 + 5.5 = 115.0 M with the classifier of 1,000 classes, of 0.77 M: the thesis
    counts that with the shared MLP, but not in the sum."""
    model = build_student({"text_encoder": "bert", "shared_kind": "mlp"}, 30_522, Targets(logits=1000))
    assert count(model.image_encoder) == 6 * 7_087_872 + 590_592 + 768 + 2 * 768
    assert millions(model.image_encoder) == pytest.approx(43.1, abs=0.05)
    assert millions(model.text_encoder) == pytest.approx(66.4, abs=0.05)
    assert millions(model.shared_encoder, model.heads) == pytest.approx(5.5, abs=0.05)
    whole = millions(model) - millions(model.after)
    assert whole == pytest.approx(115.0, abs=0.05)
    assert whole - millions(model.heads) == pytest.approx(114.2, abs=0.05)


def test_sizes_with_a_shared_block_and_token_types() -> None:
    """The thesis counts 117 M; ours are 117.17, of which the distillation head is 0.59 and the rest 116.58: what it
    rounds is one of the two."""
    model = build_student({"text_encoder": "bert"}, 30_522, Targets(prediction=768))
    assert millions(model) == pytest.approx(117.17, abs=0.01)
    assert millions(model.heads) == pytest.approx(0.59, abs=0.01)
    assert count(model.after["token_types"]) == 1_536 + 768
    assert count(model.shared_encoder) == 7_087_872 + 2 * 768
    bare = build_student({"text_encoder": "bert", "token_type_layer_scale": 0}, 30_522)
    assert count(bare.after["token_types"]) == 1_536


def test_sizes_of_distilbeit3() -> None:
    """The thesis gives no count. Ours are 43.32 M of images and 92.12 M of text, of which 49.15 M are its 64,002 words;
    the 510 positions beyond the 512th, which captions never reach, would be 0.39 M more. Heads: the prediction of the
    teacher's CLS token, and a map of each modality for contrast."""
    options = {
        "image_encoder": "beit3:absent.pth", "text_encoder": "beit3", "text_weights": "absent.pth",
        "shared_kind": "none", "token_type_place": "none", "head_itc": "linear",
    }  # fmt: skip
    with without_memory():
        model = build_student(options, 64_002, Targets(prediction=768), pretrained=False)
    layers = 6 * (7_087_872 + 7_680)
    assert count(model.image_encoder) == layers + 590_592 + 768 + 199 * 768
    assert count(model.text_encoder) == layers + (64_002 + 514) * 768
    assert count(model.heads) == 2 * 768 + 768 * 768 + 768 + 2 * 768 * 768
    assert millions(model) == pytest.approx(43.32 + 92.12 + 1.77, abs=0.01)


# ----------------------------------------------------------------------------------------------------------------------
# Shared encoder
# ----------------------------------------------------------------------------------------------------------------------


def test_kinds_of_shared_encoder() -> None:
    images, text, mask = inputs()
    width = 128
    blocks = student(shared_layers=2)(images, text, mask)
    mlp = student(Targets(logits=9), shared_kind="mlp")(images, text, mask)
    none = student(shared_kind="none", token_type_place="none")
    plain = none(images, text, mask)
    assert blocks.image.tokens.shape == (3, 17, width) and blocks.image.hidden.shape == (3, 4 * width)
    assert mlp.text.tokens.shape == (3, 1, width) and mlp.text.hidden.shape == (3, 4 * width)
    assert mlp.text.logits.shape == (3, 9) and mlp.text.prediction is None
    assert plain.text.hidden is None
    torch.testing.assert_close(plain.text.tokens, none.text_encoder(text, mask).tokens)


@pytest.mark.parametrize("source", ["text", "image"])
@pytest.mark.parametrize("norm", ["post", "pre"])
def test_shared_blocks_start_from_the_next_layers(source: str, norm: str, tmp_path: Path) -> None:
    """With BERT's order of norms they compute what the pretrained model's next layers would."""
    big = {"text_layers": 5, "image_layers": 5, "token_type_place": "none"}
    whole = student(**big)
    for name in ("text", "image"):
        encoder = getattr(whole, f"{name}_encoder")
        with torch.no_grad():
            for parameter in encoder.parameters():
                if parameter.requires_grad:
                    parameter.add_(torch.randn_like(parameter), alpha=0.05)
        save_file(
            {k: v.contiguous().clone() for k, v in encoder.state_dict().items()}, tmp_path / f"{name}.safetensors"
        )
    # Of this width no released model is known, so that its heads are given in a checkpoint with options.
    for name in ("text", "image"):
        state = getattr(whole, f"{name}_encoder").state_dict()
        torch.save({"model": state, "cfg": {"model": {"num_heads": 2}}}, tmp_path / f"{name}.pt")
    model = student(
        text_weights=str(tmp_path / "text.pt"),
        image_weights=str(tmp_path / "image.pt"),
        shared_init=source,
        shared_norm=norm,
        shared_layers=2,
        token_type_place="none",
    )
    images, text, mask = inputs()
    assert (model.text_encoder.num_layers, model.image_encoder.num_layers) == (3, 3)
    kept = getattr(whole, f"{source}_encoder").all_blocks()[3:]
    for block, origin in zip(model.shared_encoder.blocks, kept, strict=True):
        torch.testing.assert_close(block.attn.qkv.weight, origin.attn.qkv.weight)
        torch.testing.assert_close(block.mlp.fc2.bias, origin.mlp.fc2.bias)
    if norm == "post":
        # The epsilons of the norms differ by up to 1e-5.
        ours = model.encode_text(text, mask).tokens if source == "text" else model.encode_image(images).tokens
        theirs = whole.text_encoder(text, mask) if source == "text" else whole.image_encoder(whole.normalize(images))
        visible = ~mask if source == "text" else torch.ones(ours.shape[:2], dtype=torch.bool)
        torch.testing.assert_close(ours[visible], theirs.tokens[visible], rtol=1e-3, atol=1e-3)
    random = student(token_type_place="none", shared_layers=2)
    other = random.shared_encoder.blocks[0].attn.qkv.weight
    assert not torch.allclose(other, kept[0].attn.qkv.weight, atol=1e-2)


def test_shared_block_starts_from_a_timm_model(tmp_path: Path) -> None:
    source = timm.create_model("deit_tiny_patch16_224", img_size=SIDE)
    path = tmp_path / "vit.safetensors"
    save_file({k: v.contiguous() for k, v in source.state_dict().items()}, path)
    model = student(
        image_encoder="timm:deit_tiny_patch16_224",
        image_weights=str(path),
        image_layers=2,
        shared_init="image",
        shared_layers=1,
    )
    assert model.image_encoder.num_layers == 2
    for name, value in source.blocks[2].state_dict().items():
        torch.testing.assert_close(model.shared_encoder.blocks[0].state_dict()[name], value)


@pytest.fixture
def beit3(tmp_path: Path) -> tuple[Path, BEiT3]:
    model = BEiT3(
        VOCABULARY, width=128, layers=5, heads=2, ffn_width=512, image_size=SIDE, patch_size=8, max_positions=9
    )
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.05)
    torch.save({"model": model.state_dict()}, tmp_path / "beit3.pth")
    return tmp_path / "beit3.pth", model.eval()


BEIT3 = {"token_type_place": "none", "text_max_positions": 9, "shared_layers": 2}


@pytest.mark.parametrize("choice", ["first", "every_second"])
@pytest.mark.parametrize("source", ["text", "image"])
def test_shared_blocks_start_from_the_next_layers_of_beit3(source: str, choice: str, beit3: tuple[Path, BEiT3]) -> None:
    """With their further norms they compute what the whole model would."""
    file, whole = beit3
    layers = 3 if choice == "first" else 1
    model = student(
        image_encoder=f"beit3:{file}",
        text_encoder="beit3",
        text_weights=str(file),
        shared_init=source,
        shared_sub_norms=True,
        **{f"{name}_layer_choice": choice for name in ("image", "text")},
        **{f"{name}_layers": layers for name in ("image", "text")},
        **BEIT3,
    )
    assert model.text_encoder.num_layers == model.image_encoder.num_layers == layers
    if choice == "every_second":
        whole.encoder.layers = whole.encoder.layers[::2]
    images, text, mask = inputs()
    with torch.no_grad():
        ours = model.encode_text(text, mask) if source == "text" else model.encode_image(images)
        theirs = whole(text=text, padding_mask=mask) if source == "text" else whole(model.normalize(images))
        # The final norm of the shared blocks is new, that of BEiT-3 has learned.
        norm = whole.encoder.layer_norm.B if source == "text" else whole.encoder.layer_norm.A
        expected = (theirs.tokens - norm.bias) / norm.weight
    visible = ~mask if source == "text" else torch.ones(ours.tokens.shape[:2], dtype=torch.bool)
    # The epsilons of the norms differ by 1e-5.
    torch.testing.assert_close(ours.tokens[visible], expected[visible], rtol=1e-3, atol=1e-3)


def test_what_does_not_go_together_with_beit3(beit3: tuple[Path, BEiT3]) -> None:
    file = str(beit3[0])
    images = BEIT3 | {"image_encoder": "beit3", "image_weights": file}
    texts = BEIT3 | {"text_encoder": "beit3", "text_weights": file}
    cases = {
        "--shared-init image: that model's layers do not fit the shared block (they differ in attn.norm.bias); "
        "--shared-sub-norms is for layers of beit3, which need it": images | {"shared_init": "image"},
        f"--image-encoder beit3:{file}: give beit3:FILE, or beit3 and the file by --image-weights": images
        | {"image_encoder": f"beit3:{file}", "image_weights": "other.pth"},
        "--text-encoder beit3:: give beit3:FILE": texts | {"text_encoder": "beit3:"},
        f"{file} has 5 layers; 6 cannot be kept": images | {"image_layers": 6},
        "; 4 cannot be kept and 2 behind them": images
        | {"image_layers": 4, "shared_init": "image", "shared_sub_norms": True},
        "--image-size 36 is no multiple of --image-patch-size 8": images | {"image_size": 36},
        "its patch size is 8, not 16": images | {"image_patch_size": 16},
        "positions for 9 tokens of text, not for 512 (--text-max-positions)": texts | {"text_max_positions": 512},
        "its width is 128, not 192": texts | {"student_size": "small"},
        "--shared-init text needs --text-weights": BEIT3 | {"text_encoder": "beit3", "shared_init": "text"},
    }
    for said, options in cases.items():
        with pytest.raises(UserError) as caught:
            student(**options)
        assert said in caught.value.message and "\n" not in caught.value.message
    with pytest.raises(UserError, match="text embedding of 30 rows; the vocabulary needs 31"):
        build_student({"student_size": "tiny"} | texts, VOCABULARY + 1)


# ----------------------------------------------------------------------------------------------------------------------
# What is added to tokens
# ----------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["learned", "sincos"])
@pytest.mark.parametrize("place", ["before", "after"])
def test_shared_positions_replace_the_encoders_own(kind: str, place: str) -> None:
    model = student(position_kind=kind, position_place=place, position_scale=1.0, text_max_positions=9)
    positions = getattr(model, place)["positions"].positions
    assert positions.shape == (17, 128)
    own = [name for name, _ in model.named_parameters() if "position" in name]
    assert own == ([f"{place}.positions.positions"] if kind == "learned" else [])
    images, text, mask = inputs()
    order = torch.tensor([0, 2, 1, *range(3, 7)])
    changed = model.encode_text(text[:, order], mask).cls - model.encode_text(text, mask).cls
    assert changed.abs().max() > 1e-4
    # Without them the order of words would make no difference.
    with torch.no_grad():
        positions.zero_()
    torch.testing.assert_close(model.encode_text(text[:, order], mask).cls, model.encode_text(text, mask).cls)


@pytest.mark.parametrize("place", ["before", "after"])
@pytest.mark.parametrize("layer_scale", [0.0, 0.5])
def test_token_types_tell_the_modality_at_their_place(place: str, layer_scale: float) -> None:
    model = student(token_type_place=place, token_type_layer_scale=layer_scale)
    images, text, mask = inputs()
    before = model(images, text, mask)
    layer = getattr(model, place)["token_types"]
    assert (layer.scale is None) == (layer_scale == 0)
    seen = []
    encode = model.image_encoder.encode
    model.image_encoder.encode = lambda tokens, padding_mask=None: seen.append(tokens) or encode(tokens, padding_mask)
    model.encode_image(images)
    offset = seen[0] - model.image_encoder.embed(model.normalize(images))
    scale = 1.0 if layer.scale is None else layer.scale
    expected = layer.embedding.weight[0] * scale if place == "before" else torch.zeros(128)
    torch.testing.assert_close(offset, expected.expand_as(offset), rtol=0, atol=1e-5)
    with torch.no_grad():
        layer.embedding.weight[1] += torch.randn(128)
    after = model(images, text, mask)
    torch.testing.assert_close(after.image.features, before.image.features)
    assert (after.text.features - before.text.features).abs().max() > 1e-3


def test_projections_between_encoders_and_shared_encoder() -> None:
    wide = student(shared_width=64, text_encoder="bert")
    assert wide.image_projection.out_features == 64 and wide.text_projection.in_features == 128
    assert isinstance(student().image_projection, nn.Identity)
    linear = student(projection_kind="linear")
    assert linear.image_projection.weight.shape == (128, 128)
    assert linear.image_projection is not linear.text_projection
    mlp = student(projection_kind="mlp", shared_width=64)
    shapes = [tuple(p.shape) for p in mlp.text_projection.parameters()]
    assert shapes == [(64, 128), (64,), (64, 64), (64,)]
    images, text, mask = inputs()
    assert mlp(images, text, mask).text.features.shape == (3, 64)


def test_heads() -> None:
    images, text, mask = inputs()
    model = student(Targets(prediction=5, logits=9), head_itc="linear", head_itc_width=7)
    output = model(images, text, mask)
    assert model.contrast_width == 7
    for part, head in ((output.image, model.heads.contrast[0]), (output.text, model.heads.contrast[1])):
        torch.testing.assert_close(part.features, part.cls @ head.weight.T)
        assert part.prediction.shape == (3, 5) and part.logits.shape == (3, 9)
    assert model.heads.contrast[0] is not model.heads.contrast[1]
    same = student(Targets(prediction=128), head_kd="none")(images, text, mask)
    assert torch.equal(same.image.prediction, same.image.cls)


def test_convolutional_image_encoder() -> None:
    model = student(image_encoder="timm:test_resnet", shared_width=64)
    images, text, mask = inputs()
    output = model(images, text, mask)
    assert output.image.features.shape == (3, 64)
    torch.testing.assert_close(
        model.image_encoder(model.normalize(images)).tokens[:, 1:].mean(1),
        model.image_encoder(model.normalize(images)).cls,
    )


def test_masked_patches_are_replaced_by_a_learned_token() -> None:
    images, _, _ = inputs()
    model = student(Targets(masked_images=True))
    masked = torch.zeros(3, 16, dtype=torch.bool)
    masked[:, :5] = True
    plain, hidden = model.encode_image(images), model.encode_image(images, masked)
    assert not torch.allclose(plain.tokens, hidden.tokens)
    # What stood at masked patches makes no difference.
    other = images.clone()
    other[:, :, :8] = 0
    other[:, :, 8:16, :8] = 0
    torch.testing.assert_close(model.encode_image(other, masked).tokens, hidden.tokens)
    assert student().mask_token is None


@pytest.mark.parametrize("encoder", ["data2vec2", "beit3", "timm:test_vit"])
def test_stock_and_fused_attention_agree(encoder: str) -> None:
    images, text, mask = inputs()
    fused, stock = (student(image_encoder=encoder, student_attention=kind) for kind in ("fused", "stock"))
    stock.load_state_dict(fused.state_dict())
    ours, theirs = fused(images, text, mask), stock(images, text, mask)
    torch.testing.assert_close(ours.image.tokens, theirs.image.tokens, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(ours.text.tokens[~mask], theirs.text.tokens[~mask], rtol=1e-4, atol=1e-5)


def test_recomputed_activations_change_nothing() -> None:
    images, text, mask = inputs()
    gradients = []
    for recompute in (False, True):
        torch.manual_seed(0)
        model = student(
            student_checkpoint_activations=recompute, shared_dropout=0.2, image_drop_path=0.2, text_encoder="bert"
        ).train()
        torch.manual_seed(1)
        output = model(images, text, mask)
        (output.image.features.square().mean() + output.text.features.square().mean()).backward()
        gradients.append({name: p.grad for name, p in model.named_parameters() if p.grad is not None})
    assert gradients[0].keys() == gradients[1].keys()
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient, rtol=1e-4, atol=1e-6, msg=name)


@pytest.mark.parametrize("options", [{}, {"text_encoder": "bert", "image_encoder": "timm:test_vit"}])
def test_compiled_student_gives_the_same(options: dict[str, str]) -> None:
    model = student(Targets(prediction=5), **options)
    images, text, mask = inputs()
    compiled = torch.compile(model, backend="aot_eager")
    torch._dynamo.reset()
    ours, plain = compiled(images, text, mask), model(images, text, mask)
    for name in ("image", "text"):
        torch.testing.assert_close(getattr(ours, name).features, getattr(plain, name).features, rtol=1e-4, atol=1e-5)


# ----------------------------------------------------------------------------------------------------------------------
# Mistakes
# ----------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"student_width": 130, "student_heads": 4}, "--student-width 130 is no multiple of --student-heads 4"),
        ({"shared_width": 64, "shared_heads": 3}, "--shared-width 64 is no multiple of --shared-heads 3"),
        ({"shared_kind": "mpl"}, "--shared-kind 'mpl' is unknown; choose from blocks, mlp, none"),
        ({"shared_init": "text"}, "--shared-init text needs --text-weights"),
        ({"text_encoder": "gpt"}, "--text-encoder 'gpt' is unknown; choose data2vec2, bert or beit3"),
        ({"position_kind": "rope"}, "--position-kind 'rope' is unknown; choose from mixed, learned, sincos"),
        ({"image_layer_choice": "last"}, "--image-layer-choice 'last' is unknown; choose from first, every_second"),
        ({"image_size": 33}, "--image-size 33 is no multiple of --image-patch-size 8"),
        ({"head_itc_width": 9}, "--head-itc-width 9 needs --head-itc linear"),
        (
            {"token_type_place": "before", "image_encoder": "timm:test_vit"},
            "--token-type-place before needs encoders of one width; they have 64 and 128",
        ),
        ({"image_layers": -1}, "--image-layers -1: want 1 or more"),
        ({"image_encoder": "timm:test_vit", "image_layers": 40}, "40 cannot be kept"),
    ],
)
def test_mistakes_are_one_clear_line(options: dict[str, Any], said: str) -> None:
    with pytest.raises(UserError) as caught:
        student(**options)
    assert said in caught.value.message and "\n" not in caught.value.message


def test_shared_blocks_need_the_heads_of_the_layers_they_start_from(tmp_path: Path) -> None:
    path = tmp_path / "vit.safetensors"
    model = timm.create_model("deit_tiny_patch16_224", img_size=SIDE)
    save_file({k: v.contiguous() for k, v in model.state_dict().items()}, path)
    options = {"image_encoder": "timm:deit_tiny_patch16_224", "image_weights": str(path), "shared_init": "image"}
    with pytest.raises(UserError, match="--shared-init image: that model has 3 attention heads .* not 6"):
        student(**options, shared_heads=6)
    with pytest.raises(UserError, match="they differ in"):
        student(**options, shared_width=96, shared_heads=3)
    with pytest.raises(UserError, match="12 layers; 12 cannot be kept and 1 behind them"):
        student(**options, image_layers=12)


def test_teacher_of_another_width_needs_a_head() -> None:
    with pytest.raises(UserError, match="--head-kd none needs a teacher as wide .* 5 and 128"):
        student(Targets(prediction=5), head_kd="none")
