"""Which parameters learn slower, are not decayed or do not learn, and the optimizer that reads it."""

import logging
from collections.abc import Callable

import pytest
import torch
from fairseq.optim.fp16_optimizer import FP16Optimizer
from torch import Tensor, nn

from emkum.errors import UserError
from emkum.layers.temperature import LogitScale
from emkum.layers.token_types import TokenTypes
from emkum.models.bert import BertEncoder
from emkum.models.data2vec2 import Data2Vec2ImageEncoder, Data2Vec2TextEncoder
from emkum.models.encoder import Encoder, LayerChoice
from emkum.models.parameter_groups import FreezeConfig, LearningRateConfig, assign_overrides, freeze
from emkum.models.timm_encoder import TimmImageEncoder
from user_dir.optimizers import GroupedAdamW, GroupedAdamWConfig

RATES = LearningRateConfig(image_encoder=0.2, text_encoder=0.5)


class SmallEncoder(Encoder):
    """Vectors as tokens, so that every kind of parameter is there and everything is learned from."""

    def __init__(self, num_layers: int, width: int = 4) -> None:
        super().__init__()
        self.patch_embed = nn.Linear(3, width)
        self.pos_embed = nn.Parameter(torch.randn(1, 3, width))
        self.cls_token = nn.Parameter(torch.randn(1, 1, width))
        self.norm = nn.LayerNorm(width)
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.LayerNorm(width), nn.Linear(width, width)) for _ in range(num_layers)
        )
        self.width, self.num_layers = width, num_layers

    def embed(self, inputs: Tensor, masked: Tensor | None = None, mask_token: Tensor | None = None) -> Tensor:
        tokens = self.patch_embed(inputs) + self.pos_embed
        return torch.cat([self.cls_token.expand(len(inputs), -1, -1), tokens], dim=1)

    def encode(self, tokens: Tensor, padding_mask: Tensor | None = None) -> Tensor:
        tokens = self.norm(tokens)
        for block in self.blocks:
            tokens = tokens + block(tokens)
        return tokens

    def all_blocks(self) -> list[nn.Module]:
        return list(self.blocks)

    def embedding_parameters(self) -> list[nn.Parameter]:
        return list(self.patch_embed.parameters())


class Student(nn.Module):
    """The parts that parameter groups know, and some that they do not."""

    def __init__(self, image_encoder: nn.Module | None, text_encoder: nn.Module | None, width: int = 4) -> None:
        super().__init__()
        self.image_encoder = image_encoder
        self.text_encoder = text_encoder
        self.text_projection = nn.Linear(width, width)
        self.after = nn.ModuleDict({"token_types": TokenTypes(width)})
        self.mask_token = nn.Parameter(torch.zeros(1, 1, width))


class Trained(nn.Module):
    """A student and an objective, as the fairseq model holds them."""

    def __init__(self, student: Student, rates: LearningRateConfig = RATES) -> None:
        super().__init__()
        self.student = student
        self.objectives = nn.ModuleDict({"itc": LogitScale()})
        assign_overrides(self, student, rates)


def small_student(image_layers: int = 3, text_layers: int = 2) -> Student:
    torch.manual_seed(0)
    return Student(SmallEncoder(image_layers), SmallEncoder(text_layers))


def scales(model: nn.Module, key: str) -> dict[str, float]:
    return {name: parameter.optim_overrides["optimizer"][key] for name, parameter in model.named_parameters()}


def decayed(model: nn.Module, prefix: str = "") -> set[str]:
    """Names below `prefix` of what is decayed."""
    found = scales(model, "weight_decay_scale")
    assert set(found.values()) == {0.0, 1.0}
    return {name.removeprefix(prefix) for name, scale in found.items() if scale == 1.0 and name.startswith(prefix)}


# ----------------------------------------------------------------------------------------------------------------------
# Weight decay
# ----------------------------------------------------------------------------------------------------------------------

TIMM_BLOCK = ("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2")
BERT_BLOCK = (
    *(f"attention.self.{name}" for name in ("query", "key", "value")),
    *("attention.output.dense", "intermediate.dense", "output.dense"),
)
ENCODERS: dict[str, tuple[Callable[[], nn.Module], set[str]]] = {
    "data2vec2_image": (
        lambda: Data2Vec2ImageEncoder(8, 1, 1, 2, input_size=8, patch_size=4),
        {
            "modality_encoders.IMAGE.local_encoder.proj.weight",
            *(f"modality_encoders.IMAGE.context_encoder.blocks.0.{name}.weight" for name in TIMM_BLOCK),
            *(f"blocks.0.{name}.weight" for name in TIMM_BLOCK),
        },
    ),
    "data2vec2_text": (
        lambda: Data2Vec2TextEncoder(20, 8, 1, 0, 2, max_positions=8),
        {f"blocks.0.{name}.weight" for name in TIMM_BLOCK},
    ),
    "bert": (lambda: BertEncoder(20, 8, 1, 2, 16, 8), {f"encoder.layer.0.{name}.weight" for name in BERT_BLOCK}),
}


@pytest.mark.parametrize("name", ENCODERS)
def test_of_encoders_the_weights_of_layers_alone_are_decayed(name: str) -> None:
    make, expected = ENCODERS[name]
    model = Trained(Student(make(), None))
    assert decayed(model, "student.image_encoder.") == expected


@pytest.mark.parametrize("name", ["vit_tiny_patch16_224", "deit_tiny_distilled_patch16_224", "beit_base_patch16_224"])
def test_of_timm_models_the_weights_of_layers_alone_are_decayed(name: str) -> None:
    with torch.device("meta"):
        encoder = TimmImageEncoder(name, "", 32, LayerChoice(1))
    names = {path.rpartition(".")[2] for path, _ in encoder.named_parameters()}
    assert "cls_token" in names and names & {"pos_embed", "relative_position_bias_table"}
    model = Trained(Student(encoder, None))
    assert decayed(model, "student.image_encoder.model.") == {
        "patch_embed.proj.weight",
        *(f"blocks.0.{name}.weight" for name in TIMM_BLOCK),
    }


def test_beside_encoders_the_weights_of_layers_alone_are_decayed() -> None:
    model = Trained(small_student())
    assert {name for name in decayed(model) if "encoder" not in name} == {"student.text_projection.weight"}
    assert "student.image_encoder.patch_embed.weight" in decayed(model)
    for name in ("mask_token", "after.token_types.embedding.weight", "after.token_types.scale"):
        assert scales(model, "weight_decay_scale")[f"student.{name}"] == 0.0, name
    assert scales(model, "weight_decay_scale")["objectives.itc.log_scale"] == 0.0


# ----------------------------------------------------------------------------------------------------------------------
# Learning rates
# ----------------------------------------------------------------------------------------------------------------------


def layer_by_name(name: str) -> int:
    """Of a parameter in a SmallEncoder."""
    return int(name.split(".")[1]) + 1 if name.startswith("blocks.") else 0


def test_encoders_learn_at_their_own_rate() -> None:
    for name, scale in scales(Trained(small_student()), "lr_scale").items():
        kind = name.removeprefix("student.").split(".")[0]
        assert scale == {"image_encoder": 0.2, "text_encoder": 0.5}.get(kind, 1.0), name


def test_layers_learn_the_slower_the_closer_to_the_input_they_are() -> None:
    rates = LearningRateConfig(image_encoder=0.5, text_encoder=2.0, layer_decay=0.8)
    model = Trained(small_student(image_layers=3, text_layers=2), rates)
    found = scales(model, "lr_scale")
    for modality, factor, total in (("image", 0.5, 3), ("text", 2.0, 2)):
        prefix = f"student.{modality}_encoder."
        inside = {name.removeprefix(prefix): scale for name, scale in found.items() if name.startswith(prefix)}
        assert inside == {name: pytest.approx(factor * 0.8 ** (total + 1 - layer_by_name(name))) for name in inside}
        assert {layer_by_name(name) for name in inside} == set(range(total + 1))
    assert {scale for name, scale in found.items() if "_encoder." not in name} == {1.0}


def test_layers_of_a_prenet_count_as_the_first_ones() -> None:
    encoder = Data2Vec2ImageEncoder(8, 1, 2, 2, input_size=8, patch_size=4)
    found = scales(Trained(Student(encoder, None), LearningRateConfig(layer_decay=0.5)), "lr_scale")
    prefix = "student.image_encoder."
    for name, expected in {
        "modality_encoders.IMAGE.local_encoder.proj.weight": 0.5**4,
        "modality_encoders.IMAGE.extra_tokens": 0.5**4,
        "modality_encoders.IMAGE.context_encoder.norm.weight": 0.5**4,
        "modality_encoders.IMAGE.context_encoder.blocks.0.mlp.fc1.weight": 0.5**3,
        "modality_encoders.IMAGE.context_encoder.blocks.1.mlp.fc1.weight": 0.5**2,
        "blocks.0.mlp.fc1.weight": 0.5,
    }.items():
        assert found[prefix + name] == expected, name


@pytest.mark.parametrize(
    ("option", "value"),
    [
        *(("layer_decay", value) for value in (0.0, -0.5, 1.01, float("nan"))),
        *(("image_encoder", value) for value in (-0.1, float("inf"), float("nan"))),
        ("text_encoder", -1.0),
    ],
)
def test_rates_out_of_their_range_are_refused(option: str, value: float) -> None:
    with pytest.raises(UserError, match=f"^emkum: error: --lr-scale-{option.replace('_', '-')} .*want .*(0|1)"):
        Trained(small_student(), LearningRateConfig(**{option: value}))


# ----------------------------------------------------------------------------------------------------------------------
# Frozen parameters
# ----------------------------------------------------------------------------------------------------------------------


def learning(encoder: nn.Module) -> set[str]:
    return {name for name, parameter in encoder.named_parameters() if parameter.requires_grad}


def frozen_student(**options: object) -> Student:
    student = small_student()
    freeze(student, FreezeConfig(**options))
    return student


def test_by_default_all_learns() -> None:
    assert all(parameter.requires_grad for parameter in frozen_student().parameters())


def test_embeddings_alone_are_frozen() -> None:
    frozen = {
        name for name, parameter in frozen_student(embeddings=True).named_parameters() if not parameter.requires_grad
    }
    assert frozen == {f"{m}_encoder.patch_embed.{kind}" for m in ("image", "text") for kind in ("weight", "bias")}


@pytest.mark.parametrize("count", [0, 1, 2, 3])
def test_the_last_blocks_alone_learn(count: int) -> None:
    student = frozen_student(image_all_but=count)
    everything = {name for name, _ in student.image_encoder.named_parameters()}
    assert learning(student.image_encoder) == {name for name in everything if layer_by_name(name) > 3 - count}
    assert len(learning(student.image_encoder)) == 4 * count
    assert all(parameter.requires_grad for parameter in student.text_encoder.parameters())


def test_each_encoder_has_its_own_option() -> None:
    student = frozen_student(text_all_but=1, image_all_but=0)
    assert learning(student.image_encoder) == set()
    assert learning(student.text_encoder) == {
        f"blocks.1.{part}.{kind}" for part in (0, 1) for kind in ("weight", "bias")
    }
    assert student.text_projection.weight.requires_grad and student.mask_token.requires_grad


def test_embeddings_stay_frozen_where_blocks_learn() -> None:
    student = frozen_student(embeddings=True, text_all_but=2)
    assert not learning(student.text_encoder) & {"patch_embed.weight", "pos_embed", "cls_token", "norm.weight"}
    assert learning(student.image_encoder) >= {"pos_embed", "cls_token", "norm.weight", "blocks.0.1.weight"}
    assert "patch_embed.weight" not in learning(student.image_encoder)


@pytest.mark.parametrize(("modality", "count"), [("image", 4), ("image", -2), ("text", 3)])
def test_more_blocks_than_there_are_is_refused(modality: str, count: int) -> None:
    blocks = {"image": 3, "text": 2}[modality]
    with pytest.raises(UserError, match=f"--freeze-{modality}-all-but {count}: want 0 to {blocks}, .*or -1"):
        frozen_student(**{f"{modality}_all_but": count})


def test_freezing_what_is_not_there_is_refused() -> None:
    student = Student(SmallEncoder(1), None)
    freeze(student, FreezeConfig(embeddings=True, image_all_but=1))
    with pytest.raises(UserError, match="--freeze-text-all-but 0: the student has no text encoder"):
        freeze(student, FreezeConfig(text_all_but=0))


def test_dropout_of_frozen_encoders_stays() -> None:
    encoder = BertEncoder(20, 8, 1, 2, 16, 8, dropout=0.3)
    student = Student(SmallEncoder(1), encoder).train()
    freeze(student, FreezeConfig(text_all_but=0))
    torch.manual_seed(1)
    tokens = torch.ones(1, 4, dtype=torch.int64)
    assert not torch.equal(encoder(tokens).tokens, encoder(tokens).tokens)


def test_frozen_parameters_are_counted_in_one_line(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, logger="emkum.models.parameter_groups"):
        frozen_student(text_all_but=0, embeddings=True)
        frozen_student()
    text = sum(parameter.numel() for parameter in SmallEncoder(2).parameters())
    assert [record.getMessage() for record in caplog.records] == [
        f"frozen parameters: {text + 16} (image encoder 16, text encoder {text})",
        "frozen parameters: 0",
    ]


# ----------------------------------------------------------------------------------------------------------------------
# The optimizer
# ----------------------------------------------------------------------------------------------------------------------


def config(lr: float = 0.05, decay: float = 0.3) -> GroupedAdamWConfig:
    return GroupedAdamWConfig(adamw_beta1=0.8, adamw_beta2=0.9, adamw_eps=1e-5, adamw_weight_decay=decay, lr=[lr])


def trainable(model: nn.Module) -> list[nn.Parameter]:
    """What fairseq hands to the optimizer."""
    return [parameter for parameter in model.parameters() if parameter.requires_grad]


def make_gradients(student: Student) -> None:
    """One backward pass through both encoders, whose gradients are large against the optimizer's epsilon."""
    generator = torch.Generator().manual_seed(3)
    inputs = 100 * torch.randn(5, 3, 3, generator=generator)
    tokens = student.image_encoder(inputs).tokens + student.text_encoder(inputs).tokens
    tokens = student.after["token_types"](student.text_projection(tokens), 1)
    (1e4 * (tokens * torch.randn(tokens.shape, generator=generator)).sum()).backward()


def test_the_first_step_of_a_layer_is_as_long_as_its_rate() -> None:
    student = small_student()
    freeze(student, FreezeConfig(embeddings=True, text_all_but=1))
    model = Trained(student, LearningRateConfig(image_encoder=0.5, text_encoder=2.0, layer_decay=0.7))
    before = {name: parameter.detach().clone() for name, parameter in student.named_parameters()}
    optimizer = GroupedAdamW(config(lr=0.01, decay=0.0), trainable(model))
    make_gradients(student)
    optimizer.step()
    moved = {name: (parameter - before[name]).abs().max().item() for name, parameter in student.named_parameters()}
    for name, length in moved.items():
        if "_encoder." not in name:
            continue
        modality, _, inside = name.partition("_encoder.")
        layer = layer_by_name(inside)
        frozen = "patch_embed" in name or (modality == "text" and layer < 2)
        if frozen:
            assert length == 0.0, name
        else:
            factor, total = {"image": (0.5, 3), "text": (2.0, 2)}[modality]
            assert length == pytest.approx(0.01 * factor * 0.7 ** (total + 1 - layer), rel=1e-3), name
    assert sum(length == 0.0 for name, length in moved.items() if "text_encoder" in name) == 6 + 4
    assert moved["text_projection.weight"] == pytest.approx(0.01, rel=1e-3)
    assert moved["image_encoder.pos_embed"] == pytest.approx(0.01 * 0.5 * 0.7**4, rel=1e-3)


def test_frozen_parameters_are_not_decayed_either() -> None:
    student = small_student()
    freeze(student, FreezeConfig(image_all_but=0))
    model = Trained(student)
    optimizer = GroupedAdamW(config(), trainable(model))
    before = [parameter.detach().clone() for parameter in student.image_encoder.parameters()]
    make_gradients(student)
    optimizer.step()
    assert all(map(torch.equal, student.image_encoder.parameters(), before))
    assert all(parameter.grad is None for parameter in student.image_encoder.parameters())


def test_copies_in_full_precision_keep_rate_and_decay() -> None:
    model = Trained(small_student(), LearningRateConfig(image_encoder=0.5, layer_decay=0.7)).half()
    copies = FP16Optimizer.build_fp32_params(None, trainable(model), flatten=False)
    assert {copy.dtype for copy in copies} == {torch.float32}
    optimizer = GroupedAdamW(config(), copies)
    found = {id(p): (group["lr"], group["weight_decay"]) for group in optimizer.param_groups for p in group["params"]}
    for (name, parameter), copy in zip(model.named_parameters(), copies, strict=True):
        own = parameter.optim_overrides["optimizer"]
        assert found[id(copy)] == (pytest.approx(0.05 * own["lr_scale"]), 0.3 * own["weight_decay_scale"]), name
    # Embeddings and blocks of the encoders, and all else.
    assert len({lr for lr, _ in found.values()}) == 4 + 3 + 1


def test_a_student_trains_in_as_many_groups_as_there_are_scales() -> None:
    model = Trained(small_student())
    optimizer = GroupedAdamW(config(), model.parameters())
    found = [(group["lr_scale"], group["weight_decay"]) for group in optimizer.param_groups]
    assert sorted(found) == sorted((rate, decay) for rate in (0.2, 0.5, 1.0) for decay in (0.0, 0.3))
    grouped = [id(parameter) for group in optimizer.param_groups for parameter in group["params"]]
    assert sorted(grouped) == sorted(id(parameter) for parameter in model.parameters())


def test_groups_are_printed_one_a_line_with_what_they_are(caplog: pytest.LogCaptureFixture) -> None:
    model = Trained(small_student(1, 1), LearningRateConfig(image_encoder=0.5, layer_decay=0.7))
    with caplog.at_level(logging.INFO, logger="user_dir.optimizers"):
        GroupedAdamW(config(), model.parameters())
    lines = [" ".join(record.getMessage().split()) for record in caplog.records]
    assert lines == [
        # The student's own parameter comes first.
        "group of 21 parameters, lr x 1 weight decay 0 mask token, text projection, after token types, objectives itc",
        "group of 28 parameters, lr x 0.245 weight decay 0 image encoder embeddings",
        "group of 12 parameters, lr x 0.245 weight decay 0.3 image encoder embeddings",
        "group of 12 parameters, lr x 0.35 weight decay 0 image encoder layer 1",
        "group of 16 parameters, lr x 0.35 weight decay 0.3 image encoder layer 1",
        "group of 28 parameters, lr x 0.49 weight decay 0 text encoder embeddings",
        "group of 12 parameters, lr x 0.49 weight decay 0.3 text encoder embeddings",
        "group of 12 parameters, lr x 0.7 weight decay 0 text encoder layer 1",
        "group of 16 parameters, lr x 0.7 weight decay 0.3 text encoder layer 1",
        "group of 16 parameters, lr x 1 weight decay 0.3 text projection",
    ]
