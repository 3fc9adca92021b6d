"""From a teacher's name to the teacher."""

from collections.abc import Callable
from pathlib import Path

from emkum.data.tokenizers import load_tokenizer
from emkum.errors import UserError
from emkum.teachers.base import IMAGE, SELF, TEXT, Teacher, TeacherConfig, shared_options
from emkum.teachers.beit3_teacher import beit3_teacher
from emkum.teachers.bert_teacher import bert_teacher
from emkum.teachers.cached import CachedTeacher
from emkum.teachers.encoder_teacher import encoder_teacher, student_teacher
from emkum.teachers.openclip_teacher import openclip_teacher
from emkum.teachers.timm_teacher import timm_teacher
from emkum.weights import read_checkpoint


def build_teacher(
    spec: str, config: TeacherConfig | None = None, layers: bool = False, modality: str | None = None
) -> Teacher:
    """Build a teacher from its name.

    Args:
        spec: KIND:REST, with the kinds of TEACHERS.
        config: weights, input size, pooling and how to run; None = defaults.
        layers: give all layers.
        modality: what it is to read alone, of those kinds that can be asked; None = all that it can read.

    Raises:
        UserError: the name names nothing, or the teacher cannot be had.
    """
    kind, _, rest = spec.partition(":")
    if kind not in TEACHERS or not rest:
        if spec == SELF:
            raise UserError("--teacher self is the student's moving average, which only training has")
        raise UserError(f"--teacher {spec!r} is unknown; choose {', '.join(FORMS[:-1])} or {FORMS[-1]}")
    make = TEXT_TEACHERS.get(kind, TEACHERS[kind]) if modality == TEXT else TEACHERS[kind]
    return make(rest, config or TeacherConfig(), layers)


def assert_reads_images(teacher: Teacher, spec: str) -> None:
    """A student of images and captions is distilled from what a teacher makes of images.

    Raises:
        UserError: it reads text alone.
    """
    if IMAGE not in teacher.modalities:
        raise UserError(f"--teacher {spec} reads text alone and has no targets for images; choose a teacher of images")


def _data2vec2(path: str, config: TeacherConfig, layers: bool) -> Teacher:
    from emkum.models.data2vec2 import Data2Vec2ImageEncoder
    from emkum.models.data2vec2_checkpoints import encoder_from_checkpoint

    encoder = encoder_from_checkpoint(path, config.image_size or None, config.allow_missing)
    modality = IMAGE if isinstance(encoder, Data2Vec2ImageEncoder) else TEXT
    return encoder_teacher(encoder, {"teacher": "data2vec2"}, config, modality, layers=layers)


def _beit3(path: str, config: TeacherConfig, layers: bool) -> Teacher:
    """A released or fine-tuned BEiT-3."""
    from emkum.models.beit3_checkpoints import beit3_from_checkpoint, beit3_vocabulary

    model = beit3_from_checkpoint(path, config.image_size or None, allowed=config.allow_missing)
    vocabulary = beit3_vocabulary(path)
    _assert_vocabulary(vocabulary, len(model.text_embed.weight), path)
    return beit3_teacher(
        model,
        {"teacher": "beit3"},
        vocabulary if vocabulary.is_file() else None,
        # As in its own fine-tuning on pairs.
        min(64, model.max_positions),
        config.pooling,
        layers=layers,
        **shared_options(config),
    )


def _beit3_text(path: str, config: TeacherConfig, layers: bool) -> Teacher:
    """What BEiT-3 makes of texts alone, without its final norm."""
    from emkum.models.encoder_sources import load_text_encoder

    loaded = load_text_encoder(f"beit3:{path}")
    if loaded.tokenizer is None:
        raise UserError(f"beit3: a teacher of text needs beit3.spm beside {path}")
    tokenizer = Path(loaded.tokenizer.source)
    return encoder_teacher(loaded.encoder, {"teacher": "beit3"}, config, TEXT, tokenizer, layers)


def _assert_vocabulary(vocabulary: Path, rows: int, weights: str | Path) -> None:
    """Raise UserError where a vocabulary has ids that the model has no embedding of."""
    if vocabulary.is_file() and (size := load_tokenizer(vocabulary).vocab_size) > rows:
        raise UserError(f"{vocabulary} has {size:,} ids, but {weights} has embeddings of {rows:,} alone")


def _bert(source: str, config: TeacherConfig, layers: bool) -> Teacher:
    from emkum.models.bert_checkpoints import bert_from_checkpoint, find_bert

    files = find_bert(source)
    model = bert_from_checkpoint(files, allowed=config.allow_missing)
    if files.vocabulary is not None:
        _assert_vocabulary(files.vocabulary, len(model.embeddings.word_embeddings.weight), files.weights)
    return bert_teacher(
        model,
        {"teacher": "bert"},
        files.vocabulary,
        pooling=config.pooling,
        layers=layers,
        **shared_options(config),
    )


def _checkpoint(path: str, config: TeacherConfig, layers: bool) -> Teacher:
    """A run's folder or checkpoint: of a student, of Data2Vec 2 pretraining, or of an encoder by itself."""
    from emkum.checkpoint import find_checkpoint, load, model_name
    from emkum.models.encoder_sources import DATA2VEC2_MODEL, IMAGE_MODELS, TEXT_MODELS, load_text_encoder

    path = find_checkpoint(path)
    name = model_name(read_checkpoint(path))
    if name == DATA2VEC2_MODEL:
        return _data2vec2(str(path), config, layers)
    if name in IMAGE_MODELS:
        return _image_run(path, config, layers)
    if name in TEXT_MODELS:
        loaded = load_text_encoder(str(path))
        tokenizer = Path(loaded.tokenizer.source)
        return encoder_teacher(loaded.encoder, {"teacher": "checkpoint"}, config, TEXT, tokenizer, layers)
    model = load(path)
    if config.image_size not in (0, model.image_size):
        raise UserError(f"--teacher-image-size {config.image_size}: {path} was trained with {model.image_size} pixels")
    return student_teacher(
        model.student,
        {"teacher": "checkpoint"},
        config,
        model.image_size,
        Path(model.tokenizer.source),
        model.max_tokens,
        layers,
    )


def _image_run(path: Path, config: TeacherConfig, layers: bool) -> Teacher:
    """An image encoder that was distilled or fine-tuned by itself."""
    from emkum.models.encoder_sources import load_image_encoder

    encoder = load_image_encoder(str(path), image_size=config.image_size).encoder
    if layers and not hasattr(encoder, "hidden_states"):
        raise UserError(f"{path} is a convolutional network, which gives no layers to distill")
    return encoder_teacher(encoder, {"teacher": "checkpoint"}, config, IMAGE, layers=layers)


def _cached(directory: str, config: TeacherConfig, layers: bool) -> Teacher:
    if layers:
        raise UserError(f"teacher cache {directory} holds no layers; give the teacher itself")
    # Other options are those of the teacher in memory, and mean nothing here.
    for name in ("pooling", "target"):
        if getattr(config, name) != getattr(TeacherConfig, name):
            raise UserError(f"--teacher-{name} has no effect on cached:{directory}: give it to `emkum teacher cache`")
    return CachedTeacher(directory)


# Kind -> function of what follows the colon, options, and whether all layers are wanted.
TEACHERS: dict[str, Callable[[str, TeacherConfig, bool], Teacher]] = {
    "timm": timm_teacher,
    "data2vec2": _data2vec2,
    "beit3": _beit3,
    "bert": _bert,
    "openclip": openclip_teacher,
    "checkpoint": _checkpoint,
    "cached": _cached,
}
# The same of teachers that are to read text alone, where another one of their kind reads images too.
TEXT_TEACHERS: dict[str, Callable[[str, TeacherConfig, bool], Teacher]] = {"beit3": _beit3_text}
FORMS = (
    "timm:NAME",
    "data2vec2:FILE",
    "beit3:FILE",
    "bert:DIR_OR_NAME",
    "openclip:NAME",
    "checkpoint:FILE",
    "cached:DIR",
)
