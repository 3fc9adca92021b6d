"""`emkum teacher`: work with a frozen teacher before training."""

from typing import Any

from emkum.commands import teacher_cache, teacher_check


def add_parser(commands: Any) -> None:
    parser = commands.add_parser("teacher", help="check a teacher, or compute its targets once")
    kinds = parser.add_subparsers(dest="kind", required=True, metavar="KIND")
    teacher_check.add_parser(kinds)
    teacher_cache.add_parser(kinds)
