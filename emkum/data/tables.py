"""Rows of text and labels, each randomly readable: JSON lines in `rows.jsonl`, every row's offset in `rows.npy`."""

import json
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np

from emkum.errors import UserError
from emkum.files import replaced_file

TABLE_NAME = "rows.npy"
ROWS_NAME = "rows.jsonl"


class Table:
    """A read-only sequence of rows; picklable, which carries the folder's name alone.

    Args:
        directory: one split of a prepared folder.

    Raises:
        UserError: its files are missing, or do not belong together.
    """

    def __init__(self, directory: str | Path) -> None:
        self.directory = Path(directory).absolute()
        rows = self.directory / ROWS_NAME
        try:
            # (rows + 1,) int64: where each row begins, and the end of the last.
            self._offsets = np.load(self.directory / TABLE_NAME, mmap_mode="r", allow_pickle=False)
            self._descriptor = os.open(rows, os.O_RDONLY)
        except (OSError, ValueError, EOFError):
            raise UserError(f"{self.directory} holds no table: want {ROWS_NAME} and {TABLE_NAME}") from None
        if int(self._offsets[-1]) != os.fstat(self._descriptor).st_size:
            raise UserError(f"{rows} is not the file that {TABLE_NAME} was made of: prepare the data again")

    def __del__(self) -> None:
        if hasattr(self, "_descriptor"):
            os.close(self._descriptor)

    def __getstate__(self) -> dict[str, Any]:
        return {"directory": self.directory}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(state["directory"])

    def __len__(self) -> int:
        return len(self._offsets) - 1

    def __getitem__(self, index: int) -> dict[str, Any]:
        if not 0 <= index < len(self):
            raise IndexError(f"row {index} of {len(self)}")
        start, stop = (int(offset) for offset in self._offsets[index : index + 2])
        return json.loads(os.pread(self._descriptor, stop - start, start))


def join_rows(parts: Iterable[Path], table: Path) -> int:
    """Join files of JSON lines to the table whose offsets are to be at `table`; return the number of rows.

    Raises:
        UserError: there is no row.
    """
    offsets = [0]
    with replaced_file(table.parent / ROWS_NAME) as temporary, open(temporary, "wb") as rows:
        for part in parts:
            with open(part, "rb") as file:
                for line in file:
                    rows.write(line)
                    offsets.append(offsets[-1] + len(line))
    if len(offsets) == 1:
        raise UserError(f"no rows to write into {table.parent}")
    with replaced_file(table) as temporary, open(temporary, "wb") as file:
        np.save(file, np.array(offsets, dtype=np.int64), allow_pickle=False)
    return len(offsets) - 1
