"""The arguments that all sets have."""

import argparse
import os
from pathlib import Path

from emkum.errors import UserError
from emkum.prepare.raw_set import RawSet, Settings
from emkum.prepare.runner import prepare


def add_set_parser(
    subparsers: argparse._SubParsersAction, name: str, help: str, description: str, example: str
) -> argparse.ArgumentParser:
    """Add the sub-command of a set; description and example keep their line breaks."""
    return subparsers.add_parser(
        name,
        help=help,
        description=description,
        epilog=f"example:\n{example}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )


def add_common_arguments(parser: argparse.ArgumentParser, vocab_size: int | None = None, shrink: bool = True) -> None:
    """Add the arguments that all sets have.

    Args:
        parser: of the set.
        vocab_size: the set's default; None = it trains no tokenizer.
        shrink: whether its images can be stored smaller than they are.
    """
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="folder to make, absent or empty before")
    if vocab_size is not None:
        parser.add_argument(
            "--vocab-size",
            type=int,
            default=vocab_size,
            metavar="N",
            help="pieces of the SentencePiece tokenizer that is trained on the train captions, special tokens "
            "included; 0 = train none (default: %(default)s)",
        )
    if shrink:
        parser.add_argument(
            "--image-size",
            type=int,
            default=0,
            metavar="PIXELS",
            help="shrink larger images to this shorter side, stored as JPEG; 0 = store the files unchanged (default)",
        )
        parser.add_argument(
            "--quality", type=int, default=90, help="of those JPEG files, 1 to 95 (default: %(default)s)"
        )
    parser.add_argument("--limit", type=int, default=0, metavar="N", help="most items of each split; 0 = all (default)")
    parser.add_argument(
        "--max-bad-fraction",
        type=float,
        default=0.1,
        metavar="F",
        help="stop where more than this part of a split cannot be used (default: %(default)s)",
    )
    parser.add_argument(
        "--workers",
        type=int,
        default=os.cpu_count() or 1,
        metavar="N",
        help="processes; the output does not depend on it (default: one a core, %(default)s here)",
    )


def run_set(raw: RawSet, args: argparse.Namespace, **changed: int) -> None:
    """Make the folder that the common arguments describe out of a raw set.

    Args:
        raw: the set.
        args: with what `add_common_arguments` added.
        changed: settings that the set itself decides.

    Raises:
        UserError: an argument is out of its range, and whatever `prepare` raises.
    """
    ranges = {"workers": (1, 256), "limit": (0, None), "image_size": (0, None), "quality": (1, 95)}
    ranges["max_bad_fraction"] = (0, 1)
    values = {name: getattr(args, name) for name in ranges if hasattr(args, name)} | changed
    for name, value in values.items():
        least, most = ranges[name]
        if value < least or (most is not None and value > most):
            wanted = f"at least {least}" if most is None else f"{least} to {most}"
            raise UserError(f"--{name.replace('_', '-')} {value}: want {wanted}")
    prepare(raw, args.out, Settings(**values), getattr(args, "vocab_size", 0))
