"""What commands ask of their words."""

import argparse

from emkum.errors import UserError


def assert_at_least(args: argparse.Namespace, **least: int) -> None:
    """
    Args:
        args: a command's words.
        least: the smallest value that each of some options may have; None, for one that was not given, passes.

    Raises:
        UserError: one has a smaller value.
    """
    for name, smallest in least.items():
        value = getattr(args, name)
        if value is not None and value < smallest:
            raise UserError(f"--{name.replace('_', '-')} {value}: want {smallest} or more")


def parse_seeds(text: str) -> list[int]:
    """
    Raises:
        UserError: it is no list of different whole numbers from 0 on.
    """
    words = text.split(",")
    if not all(word.strip().isdecimal() for word in words) or len({int(word) for word in words}) < len(words):
        raise UserError(f"--seeds {text!r}: want different whole numbers, separated by commas, such as 1,2,3")
    return [int(word) for word in words]
