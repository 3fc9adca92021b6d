"""The `emkum` command."""

import argparse
import logging
import signal
import sys
import threading
from collections.abc import Sequence

from emkum import __version__, prepare
from emkum.commands import (
    bench,
    compare,
    data,
    evaluate,
    figures,
    fit_clusters,
    glue,
    model,
    report,
    reproduce,
    study,
    teacher,
    train,
)


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="emkum", description="Small image-text models out of pretrained unimodal encoders."
    )
    parser.add_argument("--version", action="version", version=f"emkum {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    results = (evaluate, glue, report, figures, study, reproduce)
    for part in (prepare, data, train, compare, *results, model, teacher, fit_clusters, bench):
        part.add_parser(commands)
    return parser


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """Read a command's words; `key=value` words may stand anywhere among its options.

    By itself argparse takes those alone that stand together with the first of the command's words.
    """
    parser = build_parser()
    args, rest = parser.parse_known_args(arguments)
    wrong = [word for word in rest if word.startswith("-") or "=" not in word]
    if wrong or (rest and not hasattr(args, "overrides")):
        parser.error(f"unrecognized arguments: {' '.join(wrong or rest)}")
    if rest:
        args.overrides = [*args.overrides, *rest]
    return args


def main(arguments: Sequence[str] | None = None) -> None:
    """Run one command; mistakes of the user end it with one line and exit status 1."""
    args = parse(arguments)
    if threading.current_thread() is threading.main_thread():
        # What ends a command ends the commands that it runs, too.
        signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    # Libraries talk at length on the root logger once fairseq has configured it; warnings still come through.
    logging.disable(logging.INFO)
    args.run(args)


if __name__ == "__main__":
    main()
