"""Text corpora to blocks of token ids.

A document is a line of a text file, or a row of a JSON-lines or Parquet file. Documents follow one another in a block,
but blocks never cross from one part of the corpus to the next: a part is 8 MiB of a plain file, a whole compressed
file, or a row group of a Parquet file. What is left over at the end of a part, less than a block, is dropped.
"""

import argparse
import gzip
import json
import os
import shutil
import zlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import numpy as np

from emkum.errors import UserError
from emkum.files import replaced_file
from emkum.prepare.caption_tables import choose_column, open_parquet
from emkum.prepare.common import add_common_arguments, add_set_parser, run_set
from emkum.prepare.raw_set import RawSet, Settings, Skipped, Written, part_path
from emkum.prepare.sources import SPLIT_NAMES, SPLIT_ORDER

# What other programs call the column of the text; the first that is there counts.
TEXT_COLUMNS = ("text", "content", "document", "article", "sentence", "caption")

_SUFFIXES = (".txt", ".txt.gz", ".gz", ".jsonl", ".jsonl.gz", ".parquet")
_PART_BYTES = 8 << 20
_BATCH_ROWS = 1024
# Of the files that parts are kept in until they are joined.
_PART_IDS = np.dtype("<i4")


def add_parser(subparsers: argparse._SubParsersAction) -> None:
    """Add the sub-command `text`."""
    parser = add_set_parser(
        subparsers,
        "text",
        help="your own text, as blocks of tokens",
        description="Text files to blocks of token ids. A document is a line (blank ones are passed over), or a row\n"
        "of a JSON-lines or Parquet file. Blocks do not cross from one file to the next, nor from one 8 MiB of a\n"
        "plain file, or row group of a Parquet file, to the next. The tokenizer is copied into DIR.",
        example="  emkum prepare text --input train=wiki1.txt wiki2.txt.gz --input valid=valid.txt \\\n"
        "      --tokenizer bert-base-uncased-vocab.txt --out data/wiki\n"
        "  emkum prepare text --input train=captions.jsonl --text-column caption --tokenizer spm.model \\\n"
        "      --block-size 0 --out data/captions",
    )
    parser.add_argument(
        "--input",
        action="append",
        nargs="+",
        required=True,
        metavar=("NAME=FILE", "FILE"),
        help="the files of a split, or folders of them; NAME is train, valid (or val, dev) or test; give it once a "
        f"split ({', '.join('*' + suffix for suffix in _SUFFIXES)})",
    )
    parser.add_argument(
        "--tokenizer",
        type=Path,
        required=True,
        metavar="PATH",
        help="SentencePiece file, BERT vocabulary, CLIP's merges, or folder with the files of one",
    )
    parser.add_argument(
        "--text-column",
        metavar="NAME",
        help=f"of JSON-lines and Parquet files (default: the first of {', '.join(TEXT_COLUMNS)} that is there)",
    )
    parser.add_argument(
        "--block-size",
        type=int,
        default=256,
        metavar="N",
        help="tokens of each block, begin and end token included; 0 = a document a block (default: %(default)s)",
    )
    parser.add_argument(
        "--max-tokens",
        type=int,
        default=64,
        metavar="N",
        help="with --block-size 0: most tokens of a document, begin and end token included; the rest is dropped "
        "(default: %(default)s)",
    )
    add_common_arguments(parser, shrink=False)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> None:
    """Make the folder that the arguments of the sub-command describe."""
    files = parse_inputs(args.input)
    run_set(TextCorpus(files, args.tokenizer, args.text_column, args.block_size, args.max_tokens), args)


def parse_inputs(groups: Sequence[Sequence[str]]) -> dict[str, list[Path]]:
    """NAME=FILE FILE ... arguments to split -> its files, in the order train, valid, test.

    Raises:
        UserError: one is malformed or given twice, or a file is missing or of another kind.
    """
    splits: dict[str, list[Path]] = {}
    # A word NAME=FILE begins another split, also behind the files of one.
    begun: list[list[str]] = []
    for group in groups:
        for place, word in enumerate(group):
            if place == 0 or word.partition("=")[0] in SPLIT_NAMES:
                begun.append([])
            begun[-1].append(word)
    for first, *more in begun:
        name, equals, file = first.partition("=")
        if not equals or not file or name not in SPLIT_NAMES:
            raise UserError(f"--input {first}: want NAME=FILE with NAME one of {', '.join(SPLIT_NAMES)}")
        split = SPLIT_NAMES[name]
        if split in splits:
            raise UserError(f"--input {first}: {split} is given twice")
        splits[split] = [path for named in (file, *more) for path in _expand(Path(named))]
    return {name: splits[name] for name in SPLIT_ORDER if name in splits}


def _expand(path: Path) -> list[Path]:
    """The file, or the files of the folder that are of a known kind."""
    wanted = f"want {', '.join('*' + suffix for suffix in _SUFFIXES)}"
    if path.is_dir():
        files = sorted(file for file in path.iterdir() if file.is_file() and file.name.lower().endswith(_SUFFIXES))
        if not files:
            raise UserError(f"--input: folder {path} holds no text files; {wanted}")
        return files
    if not path.is_file():
        raise UserError(f"--input: there is no file {path}")
    if not path.name.lower().endswith(_SUFFIXES):
        raise UserError(f"--input: {path} is of no known kind; {wanted}")
    return [path]


@dataclass(frozen=True)
class Span:
    """A part of a corpus.

    Attributes:
        path: its file.
        column: of the text; None = lines of text.
        start, stop: lines that begin at these bytes of a plain file, or row groups of a Parquet file; of a compressed
            file, all lines.
    """

    path: Path
    column: str | None
    start: int
    stop: int

    def documents(self) -> Iterator[tuple[str, Any]]:
        """Where each document is, and what there is: bytes of a line, or the value of a Parquet row."""
        if self.path.suffix.lower() == ".parquet":
            return self._rows()
        return ((f"{self.path.name} byte {position}", line) for position, line in self._lines() if line.strip())

    def _rows(self) -> Iterator[tuple[str, Any]]:
        groups = list(range(self.start, self.stop))
        batches = open_parquet(self.path).iter_batches(_BATCH_ROWS, row_groups=groups, columns=[self.column])
        values = (value for batch in batches for value in batch.column(0).to_pylist())
        return ((f"{self.path.name} row {number} of group {self.start}", value) for number, value in enumerate(values))

    def _lines(self) -> Iterator[tuple[int, bytes]]:
        position = self.start
        try:
            with open_plain(self.path) as file:
                if self.start > 0:
                    # A line that began before belongs to the part before.
                    file.seek(self.start - 1)
                    position += len(file.readline()) - 1
                while position < self.stop and (line := file.readline()):
                    yield position, line
                    position += len(line)
        except (OSError, EOFError, zlib.error) as error:
            raise UserError(f"{self.path} cannot be read: {error}") from None


def open_plain(path: Path) -> IO[bytes]:
    """A text file for reading, uncompressed on the way where it ends with `.gz`."""
    return gzip.open(path, "rb") if path.suffix.lower() == ".gz" else open(path, "rb")


def spans_of(path: Path, text_column: str | None) -> list[Span]:
    """The parts of a file.

    Raises:
        UserError: it cannot be read, is not text, or lacks the column.
    """
    if path.suffix.lower() == ".parquet":
        file = open_parquet(path)
        column = choose_column(path, file.schema_arrow.names, text_column, TEXT_COLUMNS, "--text-column")
        kind = str(file.schema_arrow.field(column).type)
        if kind not in ("string", "large_string", "string_view"):
            raise UserError(f"{path}: column {column} is {kind}, not text")
        return [Span(path, column, group, group + 1) for group in range(file.num_row_groups)]
    column = _first_line(path, text_column)
    if path.suffix.lower() == ".gz":
        return [Span(path, column, 0, 1 << 62)]
    size = path.stat().st_size
    return [Span(path, column, start, min(start + _PART_BYTES, size)) for start in range(0, size, _PART_BYTES)]


def _first_line(path: Path, text_column: str | None) -> str | None:
    """The column of the text, by the first line of a JSON-lines file; None for text."""
    first = next((line for _, line in Span(path, None, 0, 1 << 62)._lines() if line.strip()), b"")
    if not path.name.lower().removesuffix(".gz").endswith(".jsonl"):
        if b"\0" in first:
            raise UserError(f"{path} is not text")
        return None
    if not first:
        raise UserError(f"{path} is empty")
    try:
        row = json.loads(first)
    except ValueError as error:
        raise UserError(f"{path}, line 1: no JSON ({error})") from None
    if not isinstance(row, dict):
        raise UserError(f"{path}, line 1: want one JSON object a line")
    return choose_column(path, list(row), text_column, TEXT_COLUMNS, "--text-column")


class TextCorpus(RawSet):
    """The raw set.

    Args:
        files: split -> its files, in their order.
        tokenizer: its file or folder.
        text_column: of JSON-lines and Parquet files; None = a usual name.
        block_size: tokens of each block; 0 = a document a block.
        max_tokens: of a document that is a block.

    Raises:
        UserError: a file or the tokenizer cannot be used, or blocks have no room for text.
    """

    name = "text"

    def __init__(
        self,
        files: Mapping[str, Sequence[Path]],
        tokenizer: Path,
        text_column: str | None = None,
        block_size: int = 256,
        max_tokens: int = 64,
    ) -> None:
        from emkum.data.tokenizers import load_tokenizer

        if block_size != 0 and block_size < 3:
            raise UserError(f"--block-size {block_size}: want 0 (a document a block) or at least 3")
        if block_size == 0 and max_tokens < 3:
            raise UserError(f"--max-tokens {max_tokens}: want at least 3")
        self._tokenizer = load_tokenizer(tokenizer)
        self._sizes = block_size, max_tokens
        self._spans = {
            split: [span for path in paths for span in spans_of(path, text_column)] for split, paths in files.items()
        }
        self.options = {"text_column": text_column, "block_size": block_size}
        self.options |= {"max_tokens": max_tokens} if block_size == 0 else {}
        self.sources = {f"{split} {number}": path for split in files for number, path in enumerate(files[split])}
        self.sources |= {f"tokenizer {name}": path for name, path in self._tokenizer.files.items()}

    @property
    def splits(self) -> Sequence[str]:
        return tuple(self._spans)

    def part_sizes(self, split: str, settings: Settings) -> list[int]:
        return [0] * len(self._spans[split])

    def write_part(self, split: str, part: int, folder: Path, settings: Settings) -> Written:
        from emkum.data.token_blocks import blocks_of

        skipped: list[Skipped] = []
        used = 0

        def documents() -> Iterator[list[int]]:
            nonlocal used
            for text in _texts(self._spans[split][part], skipped):
                used += 1
                yield self._tokenizer.pieces(text)

        with (
            replaced_file(part_path(folder, part, "part.ids")) as ids,
            replaced_file(part_path(folder, part, "part.lengths")) as lengths,
            open(ids, "wb") as ids_file,
            open(lengths, "wb") as lengths_file,
        ):
            for number, block in enumerate(blocks_of(documents(), self._tokenizer.special, *self._sizes), start=1):
                ids_file.write(np.array(block, dtype=_PART_IDS).tobytes())
                lengths_file.write(np.array(len(block), dtype=_PART_IDS).tobytes())
                if number == settings.limit:
                    break
        return Written(used, skipped)

    def join(self, root: Path, settings: Settings) -> dict[str, dict[str, int]]:
        from emkum.data.tokenizers import copy_tokenizer

        copy_tokenizer(self._tokenizer, root)
        return {
            split: _join_blocks(root / split, len(spans), self._tokenizer.vocab_size, settings.limit)
            for split, spans in self._spans.items()
        }


def _texts(span: Span, skipped: list[Skipped]) -> Iterator[str]:
    """The documents of a part that can be used; the others are added to `skipped`."""
    for where, value in span.documents():
        try:
            text = _text_of(value, span.column)
        except ValueError as error:
            skipped.append(Skipped(where, str(error)))
            continue
        yield text


def _text_of(value: Any, column: str | None) -> str:
    if isinstance(value, bytes):
        try:
            value = value.decode("utf-8-sig").strip()
        except UnicodeDecodeError:
            raise ValueError("not UTF-8") from None
        if column is not None:
            try:
                row = json.loads(value)
            except (ValueError, RecursionError):
                raise ValueError("no JSON") from None
            value = row.get(column) if isinstance(row, dict) else None
    if not isinstance(value, str) or not value.strip():
        raise ValueError("no text" if column is None else f"no text as {column!r}")
    if any("\ud800" <= character <= "\udfff" for character in value):
        raise ValueError("not UTF-8")
    return value.strip()


def _blocks(folder: Path, parts: int) -> Iterator[np.ndarray]:
    """(L,) ids of each block of the parts, in their order."""
    for part in range(parts):
        with open(part_path(folder, part, "part.ids"), "rb") as ids:
            with open(part_path(folder, part, "part.lengths"), "rb") as lengths:
                while length := lengths.read(_PART_IDS.itemsize):
                    yield np.fromfile(ids, dtype=_PART_IDS, count=int(np.frombuffer(length, dtype=_PART_IDS)[0]))


def _join_blocks(folder: Path, parts: int, vocab_size: int, limit: int) -> dict[str, int]:
    """Write the files of a split beside its parts; at most `limit` blocks (0 = all)."""
    from emkum.data.token_blocks import OFFSETS_NAME, TOKENS_NAME, TokenBlockWriter

    scratch = folder / "joining"
    # What an interrupted run left.
    shutil.rmtree(scratch, ignore_errors=True)
    with TokenBlockWriter(scratch / "blocks", vocab_size) as writer:
        for block in _blocks(folder, parts):
            writer.add(block)
            if writer.num_blocks == limit:
                break
    for name in (TOKENS_NAME, OFFSETS_NAME):
        os.replace(scratch / "blocks" / name, folder / name)
    shutil.rmtree(scratch)
    return {"blocks": writer.num_blocks, "tokens": writer.num_tokens}
