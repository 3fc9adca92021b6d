"""Options of the commands that work with one teacher: those of training, without its prefix."""

import argparse
from dataclasses import fields
from typing import TYPE_CHECKING

from emkum.errors import UserError

if TYPE_CHECKING:
    from emkum.teachers.base import Teacher


def add_teacher_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the teacher's name and the options of `emkum.teachers.base.TeacherConfig`, which takes torch to import."""
    parser.add_argument(
        "teacher",
        metavar="SPEC",
        help="timm:NAME, data2vec2:FILE, beit3:FILE, openclip:NAME, bert:DIR_OR_NAME, or checkpoint:FILE",
    )
    parser.add_argument(
        "--weights",
        default="hub",
        metavar="FILE",
        help="weights of a timm: or openclip: teacher: a local file, or 'hub' to download them (default)",
    )
    parser.add_argument(
        "--image-size",
        type=int,
        default=0,
        metavar="PIXELS",
        help="side of the teacher's crops; 0 = what the teacher was trained with (default)",
    )
    parser.add_argument(
        "--pooling",
        default="default",
        metavar="HOW",
        help="the global feature: default (as the model defines it), cls, mean or mean_max of patches, layers",
    )
    parser.add_argument(
        "--target",
        default="image",
        metavar="OF",
        help="of a teacher that reads both images and text: image (default), own, average, fused",
    )
    parser.add_argument(
        "--allow-missing",
        default="",
        metavar="NAMES",
        help="parameters that the weights may lack or have beside the teacher's, separated by commas; * stands for "
        "anything; empty = none (default)",
    )
    parser.add_argument(
        "--autocast",
        default="",
        metavar="TYPE",
        help="run the teacher under torch.autocast: auto, bfloat16, float16; empty = off (default)",
    )
    parser.add_argument("--compile", action="store_true", help="run the teacher through torch.compile")


def build_from(args: argparse.Namespace) -> "Teacher":
    """Build the teacher that the options of `add_teacher_arguments` name.

    Raises:
        UserError: there is no such teacher, or its weights do not fit.
    """
    from emkum.models.teacher_builders import build_teacher
    from emkum.teachers.base import TeacherConfig

    config = TeacherConfig(**{field.name: getattr(args, field.name) for field in fields(TeacherConfig)})
    try:
        return build_teacher(args.teacher, config, layers=False)
    except UserError as error:
        # Its options have a prefix in training alone.
        raise UserError(error.message.replace("--teacher-", "--")) from None
