"""The flags that this project adds to fairseq's."""

import argparse
from dataclasses import MISSING, dataclass, field, fields
from itertools import combinations
from typing import Any

import pytest
from fairseq import options as fairseq_options
from fairseq.dataclass import FairseqDataclass
from fairseq.dataclass.utils import gen_parser_from_dataclass
from fairseq.registry import REGISTRIES

from emkum.models.builders import STUDENT_PARTS
from emkum.objectives import OBJECTIVE_PARTS
from emkum.options import collect_parts, flat_fields
from user_dir.config import flat_dataclass
from user_dir.criterions.multi_objective import MultiObjectiveConfig
from user_dir.models.data2vec2_image import Data2Vec2ImageConfig
from user_dir.models.dino_image import DinoImageConfig
from user_dir.models.image_classifier import ImageClassifierConfig
from user_dir.models.image_quantizer import ImageQuantizerConfig
from user_dir.models.image_text_student import ImageTextStudentConfig
from user_dir.models.masked_language_model import MaskedLanguageModelConfig
from user_dir.models.text_classifier import TextClassifierConfig
from user_dir.models.unimodal_student import ImageStudentConfig, TextStudentConfig
from user_dir.optimizers import GroupedAdamWConfig
from user_dir.tasks.glue import GlueConfig
from user_dir.tasks.image_classification import ImageClassificationConfig
from user_dir.tasks.image_distillation import ImageDistillationConfig
from user_dir.tasks.image_pretraining import ImagePretrainingConfig
from user_dir.tasks.image_quantization import ImageQuantizationConfig
from user_dir.tasks.image_text import ImageTextConfig
from user_dir.tasks.image_views import ImageViewsConfig
from user_dir.tasks.text_distillation import TextDistillationConfig
from user_dir.tasks.text_pretraining import TextPretrainingConfig

CONFIGS = {
    "task image_text": ImageTextConfig,
    "task image_pretraining": ImagePretrainingConfig,
    "task image_quantization": ImageQuantizationConfig,
    "task image_distillation": ImageDistillationConfig,
    "task image_views": ImageViewsConfig,
    "task image_classification": ImageClassificationConfig,
    "task text_distillation": TextDistillationConfig,
    "task text_pretraining": TextPretrainingConfig,
    "task glue": GlueConfig,
    "model image_text_student": ImageTextStudentConfig,
    "model data2vec2_image": Data2Vec2ImageConfig,
    "model image_quantizer": ImageQuantizerConfig,
    "model image_student": ImageStudentConfig,
    "model text_student": TextStudentConfig,
    "model masked_language_model": MaskedLanguageModelConfig,
    "model dino_image": DinoImageConfig,
    "model image_classifier": ImageClassifierConfig,
    "model text_classifier": TextClassifierConfig,
    "criterion multi_objective": MultiObjectiveConfig,
    "optimizer grouped_adamw": GroupedAdamWConfig,
}


def flags_of(parser: argparse.ArgumentParser) -> set[str]:
    return {flag for action in parser._actions for flag in action.option_strings or [action.dest]}


def flags(config: type) -> set[str]:
    """What a dataclass adds to fairseq's parser, which silently drops a flag that is already there."""
    parser = argparse.ArgumentParser(add_help=False)
    gen_parser_from_dataclass(parser, config())
    return flags_of(parser)


def own_fields(config: type) -> list[Any]:
    """All but those that stand for an option of fairseq's, such as its seed."""
    return [item for item in fields(config) if not str(item.default).startswith("${") and item.name != "_name"]


def test_the_walk_sees_flags() -> None:
    weights = {f"--{name.replace('_', '-')}-weight" for name in (*OBJECTIVE_PARTS, "audio_loss")}
    endings = ("", "-schedule", "-updates", "-end")
    assert flags(MultiObjectiveConfig) == {f"{weight}{ending}" for weight in weights for ending in endings}
    assert {"data", "--teacher", "--teacher-weights", "--crop-flip"} <= flags(ImageTextConfig)
    assert "--seed" not in flags(ImageTextConfig), "it is fairseq's own"


# A run has one task, one model, one criterion and one optimizer.
@pytest.mark.parametrize(
    ("one", "other"), [pair for pair in combinations(CONFIGS, 2) if pair[0].split()[0] != pair[1].split()[0]]
)
def test_no_flag_is_defined_twice(one: str, other: str) -> None:
    assert flags(CONFIGS[one]) & flags(CONFIGS[other]) == set()


@pytest.mark.parametrize("name", CONFIGS)
def test_no_flag_is_one_of_fairseqs_own(name: str) -> None:
    theirs = flags_of(fairseq_options.get_training_parser())
    assert {"--seed", "--batch-size", "--lr", "--save-dir", "--task", "--arch"} <= theirs
    assert flags(CONFIGS[name]) & theirs == set()


@pytest.mark.parametrize("kind", ["lr_scheduler", "optimizer"])
def test_no_flag_is_one_of_a_scheduler_or_optimizer_of_fairseqs(kind: str) -> None:
    registered = REGISTRIES[kind]["dataclass_registry"]
    theirs = {name: config for name, config in registered.items() if config is not GroupedAdamWConfig}
    assert "cosine" in theirs or "adam" in theirs
    for name, config in theirs.items():
        for our_name, ours in CONFIGS.items():
            assert flags(ours) & flags(config) == set(), f"{our_name} and {kind} {name}"


@pytest.mark.parametrize("name", CONFIGS)
def test_every_option_has_a_default_and_a_help_text(name: str) -> None:
    assert own_fields(CONFIGS[name])
    for item in own_fields(CONFIGS[name]):
        assert item.default is not MISSING or item.default_factory is not MISSING, item.name
        text = item.metadata.get("help", "")
        # argparse formats help texts: a lone percent sign breaks --help.
        assert len(text) > 3 and "%" not in text and not text.endswith("."), item.name


@pytest.mark.parametrize("name", CONFIGS)
def test_no_switch_is_on_by_default(name: str) -> None:
    config = CONFIGS[name]
    for item in own_fields(config):
        assert item.default is not True, item.name
        assert item.type is not bool or item.default is False, item.name
    parser = argparse.ArgumentParser(add_help=False)
    gen_parser_from_dataclass(parser, config())
    assert not [action.dest for action in parser._actions if action.nargs == 0 and action.const is not True]


@pytest.mark.parametrize("name", CONFIGS)
def test_an_empty_text_is_null(name: str) -> None:
    # fairseq hands an empty string on as null, which only an optional field takes.
    assert [item.name for item in own_fields(CONFIGS[name]) if item.default == ""] in ([], ["data"])


def test_defaults_give_the_parts_their_own_defaults() -> None:
    parts = {**STUDENT_PARTS, **OBJECTIVE_PARTS}
    built = collect_parts(parts, ImageTextStudentConfig())
    assert built == {prefix: part() for prefix, part in parts.items()}


def test_flags_reach_the_part_they_are_named_for() -> None:
    parser = argparse.ArgumentParser()
    gen_parser_from_dataclass(parser, ImageTextStudentConfig())
    words = ["--image-size=64", "--shared-dropout=0.5", "--image-weights=hub", "--kd-mse-whiten", "--text-weights="]
    built = collect_parts({**STUDENT_PARTS, **OBJECTIVE_PARTS}, parser.parse_args(words))
    assert (built["image"].size, built["image"].weights, built["shared"].dropout) == (64, "hub", 0.5)
    assert built["kd_mse"].whiten is True
    assert built["text"].weights == "" and built["student"].size == "base"


def option(default: Any, **metadata: str) -> Any:
    return field(default=default, metadata={"help": "words"} | metadata)


@dataclass
class Bank:
    size: int = option(1)


@dataclass
class BankSize:
    bank_size: int = option(2)


@dataclass
class Switch:
    on: bool = option(True)


@dataclass
class Silent:
    size: int = 1


@dataclass
class Required:
    size: int = field(metadata={"help": "words"})


@dataclass
class Base(FairseqDataclass):
    kd_size: int = option(3)


def test_flat_dataclass_joins_base_and_parts() -> None:
    made = flat_dataclass("Made", {"kd": BankSize, "itc": Bank}, base=Base)
    assert issubclass(made, Base) and made.__name__ == "Made"
    built = made()
    assert (built.kd_size, built.kd_bank_size, built.itc_size) == (3, 2, 1)
    assert flags(made) == {"--kd-size", "--kd-bank-size", "--itc-size"}


@pytest.mark.parametrize(
    ("parts", "message"),
    [
        ({"kd": BankSize, "kd_bank": Bank}, "option kd_bank_size is defined twice"),
        ({"kd": Bank}, "option kd_size of Made is defined twice"),
        ({"a": Switch}, "option a_on of Made must default to False"),
        ({"a": Silent}, "option a_size of Made needs a default and a help text"),
        ({"a": Required}, "option a_size of Made needs a default and a help text"),
    ],
)
def test_flat_dataclass_refuses(parts: dict[str, type], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        flat_dataclass("Made", parts, base=Base)


def test_flat_fields_keep_their_order() -> None:
    assert [name for name, _ in flat_fields({"b": Bank, "a": BankSize})] == ["b_size", "a_bank_size"]


def test_collect_parts_from_a_mapping_or_an_object() -> None:
    parts = {"itc": Bank, "kd": BankSize}
    for given in ({"itc_size": 5, "kd_bank_size": None, "other": 1}, argparse.Namespace(itc_size=5, other=1)):
        assert collect_parts(parts, given) == {"itc": Bank(5), "kd": BankSize(2)}
    assert collect_parts(parts, {"itc_size": 0})["itc"].size == 0
