"""What distillation of all layers shares between images and text: the teacher, and the student that starts from it."""

from collections.abc import Callable
from math import prod
from typing import Any

from omegaconf import open_dict

from emkum.data.augment import generator, seeded
from emkum.errors import UserError
from emkum.models.builders import count_image_tokens
from emkum.models.encoder import Encoder, LayerChoice
from emkum.models.encoder_changes import copy_layers
from emkum.models.encoder_sources import LoadedEncoder, encoder_source_of_teacher
from emkum.models.teacher_builders import FORMS, build_teacher
from emkum.options import flat_fields
from emkum.teachers.base import IMAGE, TEXT, Teacher, TeacherConfig, reads_captions

TEACHER, NONE = "teacher", "none"
TEACHER_HELP = f"frozen teacher, all of whose layers are distilled: {', '.join(FORMS)}"


def build_layer_teacher(spec: str | None, config: TeacherConfig, modality: str, seed: int) -> Teacher:
    """The teacher, which gives all its layers.

    Args:
        spec: KIND:REST.
        config: its options.
        modality: what it is to read alone.
        seed: of what making it draws.

    Raises:
        UserError: there is none, it cannot be had, gives no layers or reads something else.
    """
    if not spec:
        raise UserError(f"distillation needs --teacher: {', '.join(FORMS)}")
    # The student starts from the same weights whatever making its teacher draws from the generators.
    with seeded(generator(seed)):
        teacher = build_teacher(spec, config, layers=True, modality=modality)
    if reads_captions(teacher):
        raise UserError(f"--teacher-target {config.target}: here are no captions; leave it at image")
    # One that could read both is asked for what it makes of images.
    if (IMAGE if IMAGE in teacher.modalities else TEXT) != modality:
        raise UserError(f"--teacher {spec} gives no layers of {modality}; choose a teacher that reads {modality} alone")
    return teacher


def load_start(
    cfg: Any,
    spec: str,
    config: TeacherConfig,
    parts: dict[str, type],
    load: Callable[[str, str], LoadedEncoder],
) -> LoadedEncoder | None:
    """Load what the student starts from, and let the options say what it is made of, so that checkpoints of the student
    can be read without it. How many layers are kept is left to the options.

    Args:
        cfg: the model's flat options, changed in place.
        spec, config: of the teacher.
        parts: of the encoder's options.
        load: makes an encoder from a source and its weights.

    Returns:
        None where the student is to be made from its options alone.

    Raises:
        UserError: the source cannot be read, or other options contradict it.
    """
    if starts_alone(cfg):
        return None
    (modality,) = parts.keys() - {"student"}
    if cfg[f"{modality}_weights"]:
        raise UserError(
            f"--{modality}-weights beside --init-from {cfg.init_from}: give one; --init-from none with weights"
        )
    source, weights = cfg.init_from, ""
    if source == TEACHER:
        source = encoder_source_of_teacher(spec)
        weights = config.weights if source.startswith("timm:") else ""
    elif source.startswith("timm:"):
        raise UserError(f"--init-from {source}: give --init-from none, --image-encoder {source} and --image-weights")
    with seeded(generator(0)):
        start = load(source, weights)
    if not start.options:
        raise UserError(f"--init-from {cfg.init_from}: that encoder cannot be trained without the student around it")
    defaults = {name: item.default for name, item in flat_fields(parts)}
    with open_dict(cfg):
        for name, value in start.options.items():
            if name in ("student_size", f"{modality}_layers"):
                continue
            if cfg[name] not in (defaults[name], value):
                option = f"--{name.replace('_', '-')}"
                raise UserError(f"{option} {cfg[name]}: --init-from {cfg.init_from} has {value}; leave {option} out")
            cfg[name] = value
    return start


def starts_alone(cfg: Any) -> bool:
    """Whether the student is made from its options alone."""
    return cfg.init_from in (None, NONE)


def copy_start(encoder: Encoder, start: LoadedEncoder, layer_choice: str) -> None:
    """Give the student its layers of the encoder that it starts from.

    Raises:
        UserError: there are fewer.
    """
    choice = LayerChoice(encoder.num_layers, layer_choice == "every_second")
    copy_layers(encoder, start.encoder, start.identity["source"], choice)


def assert_comparable(encoder: Encoder, teacher: Teacher, spec: str) -> None:
    """The student's tokens are those of the teacher, one by one.

    Raises:
        UserError: they differ in width or number, or the student has no layers.
    """
    if not hasattr(encoder, "hidden_states"):
        raise UserError("distillation of layers needs a Transformer as student")
    if encoder.width != teacher.patch_width:
        raise UserError(
            f"the tokens of --teacher {spec} have {teacher.patch_width} channels, the student's {encoder.width}"
        )
    if teacher.grid is None:
        return
    if encoder.image_size != teacher.image_size:
        raise UserError(
            f"--image-size {encoder.image_size}: --teacher {spec} sees {teacher.image_size} pixels; give both alike"
        )
    patches = count_image_tokens(encoder) - 1
    if patches != prod(teacher.grid):
        raise UserError(f"--teacher {spec} has {prod(teacher.grid)} patches, the student {patches}")
