"""The `emkum` command."""

import argparse
import logging
from collections.abc import Sequence

from emkum import __version__, prepare
from emkum.commands import bench, compare, data, evaluate, fit_clusters, glue, model, report, study, teacher, train


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="emkum", description="Small image-text models out of pretrained unimodal encoders."
    )
    parser.add_argument("--version", action="version", version=f"emkum {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for part in (prepare, data, train, compare, evaluate, glue, report, study, model, teacher, fit_clusters, bench):
        part.add_parser(commands)
    return parser


def main(arguments: Sequence[str] | None = None) -> None:
    """Run one command; mistakes of the user end it with one line and exit status 1."""
    args = build_parser().parse_args(arguments)
    # Libraries talk at length on the root logger once fairseq has configured it; warnings still come through.
    logging.disable(logging.INFO)
    args.run(args)


if __name__ == "__main__":
    main()
