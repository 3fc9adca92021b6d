"""Tables of captions: CSV, TSV, JSON lines or Parquet with a column of image names, one of captions, and
possibly one of the names of sounds."""

import csv
import json
from array import array
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple, TextIO

import numpy as np

from emkum.errors import UserError

# What other programs call the columns; the first that is there counts, upper and lower case alike.
IMAGE_COLUMNS = ("image", "file_name", "filename", "image_name", "filepath", "image_path", "path")
CAPTION_COLUMNS = ("caption", "captions", "text", "title", "sentence", "sentences")
SOUND_COLUMNS = ("sound", "audio", "wav", "sound_file", "audio_file", "sound_path", "audio_path")

# Suffixes of caption tables; a *.txt is taken for TSV where its first line has a tab, else for CSV.
SUFFIXES = (".csv", ".tsv", ".txt", ".jsonl", ".parquet")
_BATCH_ROWS = 4096
_LONGEST_FIELD = 1 << 26

# Where a row is from, and its fields of the wanted columns, not yet checked.
_Row = tuple[str, tuple[Any, ...]]


class _Column(NamedTuple):
    """A wanted column; see `choose_column`."""

    wanted: str | None
    usual: Sequence[str]
    option: str


class CaptionTable:
    """The captions of every image that a table names, in a few bytes beyond the text itself, and its sound.

    Args:
        path: the table; its suffix tells what it is.
        image_column: of the image's name; None = the first of IMAGE_COLUMNS that is there.
        caption_column: of a caption, or of a list of them; None = the first of CAPTION_COLUMNS that is there.
        sound_column: of the image's sound; None = the first of SOUND_COLUMNS that is there.
        with_sounds: read sounds; otherwise no column of them is looked for.

    Attributes:
        names: of the images, in the order of their first rows.
        sounds: image's number -> name of its sound, of images that have one.

    Raises:
        UserError: the file is missing, of another kind, lacks a column, has a malformed row, or two sounds of an image.
    """

    def __init__(
        self,
        path: Path,
        image_column: str | None = None,
        caption_column: str | None = None,
        sound_column: str | None = None,
        with_sounds: bool = False,
    ) -> None:
        columns = [
            _Column(image_column, IMAGE_COLUMNS, "--image-column"),
            _Column(caption_column, CAPTION_COLUMNS, "--caption-column"),
        ]
        if with_sounds:
            columns.append(_Column(sound_column, SOUND_COLUMNS, "--sound-column"))
        numbers: dict[str, int] = {}
        self.sounds: dict[int, str] = {}
        owners, ends, text = array("q"), array("q", [0]), bytearray()
        for where, (name, captions, *sound) in _rows(path, columns):
            number = numbers.setdefault(_checked_name(name, where), len(numbers))
            if sound and sound[0]:
                found = _checked_name(sound[0], where, "sound")
                if self.sounds.setdefault(number, found) != found:
                    raise UserError(f"{where}: {found} is a second sound of {name}; an image has one")
            for caption in _checked_captions(captions, where):
                # What is no UTF-8 travels as escapes, and is sorted out by whoever writes captions.
                text += caption.encode("utf-8", "surrogatepass")
                ends.append(len(text))
                owners.append(number)
        if not numbers:
            raise UserError(f"{path} holds no captions")
        self.names = list(numbers)
        self._text, self._ends = bytes(text), np.array(ends)
        # Captions of one image need not follow one another in the table.
        self._order = np.argsort(np.array(owners), kind="stable")
        self._begins = np.searchsorted(np.array(owners)[self._order], np.arange(len(numbers) + 1))

    def __len__(self) -> int:
        return len(self.names)

    def captions(self, number: int) -> list[str]:
        """Captions of the image `names[number]`, in the order of their rows."""
        rows = self._order[self._begins[number] : self._begins[number + 1]]
        return [self._text[self._ends[row] : self._ends[row + 1]].decode("utf-8", "surrogatepass") for row in rows]


def _checked_name(name: Any, where: str, what: str = "image") -> str:
    if not isinstance(name, str) or not name.strip():
        raise UserError(f"{where}: the {what} must be a file's name, not {_shown(name)}")
    return name.strip().replace("\\", "/").removeprefix("./")


def _checked_captions(captions: Any, where: str) -> Sequence[str]:
    if captions is None or captions == []:
        return [""]
    listed = captions if isinstance(captions, list) else [captions]
    for caption in listed:
        if not isinstance(caption, str):
            raise UserError(f"{where}: the caption must be text or a list of texts, not {_shown(caption)}")
    return listed


def _shown(value: Any) -> str:
    """A value for a message, which encoded images must not flood."""
    return repr(value) if isinstance(value, str | int | float | None) else f"a {type(value).__name__}"


def _rows(path: Path, wanted: Sequence[_Column]) -> Iterator[_Row]:
    suffix = path.suffix.lower()
    if suffix not in SUFFIXES:
        raise UserError(f"{path} is no caption table: want {', '.join('*' + suffix for suffix in SUFFIXES)}")
    if suffix == ".parquet":
        yield from _parquet_rows(path, wanted)
        return
    try:
        # A CSV's fields may hold line breaks of their own, which `newline=""` leaves as they are.
        newline = "\n" if suffix in (".tsv", ".jsonl") else ""
        with open(path, encoding="utf-8-sig", errors="surrogateescape", newline=newline) as file:
            if suffix == ".jsonl":
                yield from _json_rows(path, file, wanted)
                return
            header = file.readline()
            if "\0" in header:
                raise UserError(f"{path} is not text")
            if suffix == ".tsv" or (suffix == ".txt" and "\t" in header):
                records = enumerate((_tab_fields(line) for line in file), start=2)
                yield from _table_rows(path, _tab_fields(header), records, wanted)
            else:
                yield from _table_rows(path, next(csv.reader([header]), []), _csv_records(path, file), wanted)
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from None


def _csv_records(path: Path, file: TextIO) -> Iterator[tuple[int, list[str]]]:
    """The line that each record begins at, and its fields; the header has been read."""
    # Enormous captions are sorted out later, one by one; csv's own limit would stop the whole table.
    csv.field_size_limit(_LONGEST_FIELD)
    reader = csv.reader(file, strict=True)
    while True:
        number = reader.line_num + 2
        try:
            record = next(reader, None)
        except csv.Error as error:
            raise UserError(f"{path}, line {number}: no CSV ({error})") from None
        if record is None:
            return
        yield number, record


def _tab_fields(line: str) -> list[str]:
    return [_unquoted(field) for field in line.rstrip("\r\n").split("\t")]


def _unquoted(field: str) -> str:
    """Take off the quotation marks that spreadsheets put around a field; stray ones belong to the caption."""
    inner = field[1:-1].replace('""', "")
    if len(field) >= 2 and field[0] == field[-1] == '"' and '"' not in inner:
        return field[1:-1].replace('""', '"')
    return field


def _table_rows(
    path: Path, header: list[str], records: Iterable[tuple[int, list[str]]], wanted: Sequence[_Column]
) -> Iterator[_Row]:
    header = [name.strip() for name in header]
    places = [header.index(column) for column in _columns(path, header, wanted)]
    for number, record in records:
        if record in ([], [""]):
            continue
        if len(record) != len(header):
            raise UserError(f"{path}, line {number}: {len(record)} fields, but the header has {len(header)}")
        yield f"{path}, line {number}", tuple(record[place] for place in places)


def _json_rows(path: Path, file: TextIO, wanted: Sequence[_Column]) -> Iterator[_Row]:
    columns = None
    for number, line in enumerate(file, start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except ValueError as error:
            raise UserError(f"{path}, line {number}: no JSON ({error})") from None
        if not isinstance(row, dict):
            raise UserError(f"{path}, line {number}: want one JSON object a line")
        columns = columns or _columns(path, list(row), wanted)
        for column in columns:
            if column not in row:
                raise UserError(f"{path}, line {number}: no {column!r}, which earlier lines have")
        yield f"{path}, line {number}", tuple(row[column] for column in columns)


def _parquet_rows(path: Path, wanted: Sequence[_Column]) -> Iterator[_Row]:
    file = open_parquet(path)
    columns = _columns(path, file.schema_arrow.names, wanted)
    number = 0
    for batch in file.iter_batches(batch_size=_BATCH_ROWS, columns=list(columns)):
        for fields in zip(*(batch.column(column).to_pylist() for column in columns), strict=True):
            number += 1
            yield f"{path}, row {number}", fields


def open_parquet(path: Path) -> Any:
    """The `pyarrow.parquet.ParquetFile` of a file.

    Raises:
        UserError: pyarrow is not installed, or the file is missing or no Parquet.
    """
    try:
        import pyarrow
        from pyarrow import parquet
    except ImportError:
        raise UserError(f"{path}: Parquet is read by pyarrow: pip install 'emkum[parquet]'") from None
    try:
        return parquet.ParquetFile(path)
    except (OSError, pyarrow.ArrowException) as error:
        raise UserError(f"cannot read {path}: {str(error).splitlines()[0]}") from None


def _columns(path: Path, there: list[str], wanted: Sequence[_Column]) -> list[str]:
    return [choose_column(path, there, *column) for column in wanted]


def choose_column(path: Path, there: Sequence[str], wanted: str | None, usual: Sequence[str], option: str) -> str:
    """Name of a table's column.

    Args:
        path: the table, for messages.
        there: names of its columns.
        wanted: what the user named; None = the first of `usual` that is there.
        usual: names that such a column often has, in lower case.
        option: that names it.

    Raises:
        UserError: it is not there.
    """
    if wanted is not None:
        if wanted in there:
            return wanted
        raise UserError(f"{option} {wanted}: {path} has the columns {', '.join(there)}")
    lower = {name.lower(): name for name in reversed(there)}
    for name in usual:
        if name in lower:
            return lower[name]
    raise UserError(f"{path} has the columns {', '.join(there)}, none of {', '.join(usual)}: name one with {option}")
