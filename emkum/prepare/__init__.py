"""Raw data to tar shards, tables and token blocks: the command `emkum prepare`, one module a set."""

import argparse
from importlib import import_module

# Module of each sub-command, in the order of the help.
SETS = (
    "scenes",
    "flickr8k",
    "flickr30k",
    "coco",
    "visual_genome",
    "vqav2",
    "nlvr2",
    "img2dataset",
    "imagenet",
    "cifar",
    "image_folder",
    "glue",
    "text",
    "tokenizer",
)


def add_parser(subparsers: argparse._SubParsersAction) -> argparse.ArgumentParser:
    """Add the command `prepare` with one sub-command a set; each sets `run`, a function of the parsed arguments."""
    parser = subparsers.add_parser(
        "prepare",
        help="make a folder of tar shards out of a raw data set",
        description="Write a data set as one folder with a folder a split, and a record of what it was made from "
        "(prepare.json). The folder appears whole or not at all; an interrupted run goes on when its command is given "
        "again. What cannot be used is listed in skipped.jsonl.",
    )
    sets = parser.add_subparsers(dest="set", required=True, metavar="SET", title="sets")
    for name in SETS:
        import_module(f"emkum.prepare.{name}").add_parser(sets)
    return parser
