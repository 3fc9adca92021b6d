"""Raw data to tar shards: the command `emkum prepare`, one module a set."""

import argparse

from emkum.prepare import flickr8k, scenes

SETS = (scenes, flickr8k)


def add_parser(subparsers: argparse._SubParsersAction) -> argparse.ArgumentParser:
    """Add the command `prepare` with one sub-command a set; each sets `run`, a function of the parsed arguments."""
    parser = subparsers.add_parser(
        "prepare",
        help="make a folder of tar shards out of a raw data set",
        description="Write a data set as one folder of tar shards a split, with a tokenizer trained on its captions "
        "and a record of what it was made from (prepare.json). The folder appears whole or not at all.",
    )
    sets = parser.add_subparsers(dest="set", required=True, metavar="SET", title="sets")
    for module in SETS:
        module.add_parser(sets)
    return parser
