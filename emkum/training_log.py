"""What fairseq logs with `--log-format json`, read back and shown to people."""

import json
import re
from pathlib import Path
from typing import Any

from emkum.errors import UserError

_LOG_LINE = re.compile(r"\| INFO \| (?P<tag>[\w.-]+) \| (?P<stats>\{.*\})\s*$")
_INFO = re.compile(r"\| (INFO|DEBUG) \|")


def parse_line(line: str) -> tuple[str, dict[str, float]] | None:
    """(tag, record) of a line of statistics; None for any other line."""
    match = _LOG_LINE.search(line)
    record = _record(match["tag"], match["stats"]) if match else None
    return None if record is None else (match["tag"], record)


class Progress:
    """Turns fairseq's log into short lines that tell a person how far a run is.

    Args:
        max_update: updates of the whole run; 0 = unknown.
    """

    # Shown by their own words, or of no interest while training.
    _HIDDEN = ("epoch", "update", "wps", "ups", "wpb", "bsz", "lr", "gnorm", "clip", "train_wall", "wall", "step")

    def __init__(self, max_update: int = 0) -> None:
        self.max_update = max_update
        self._inside_module = False

    def show(self, line: str) -> str | None:
        """What to print for a line of the log; None for nothing."""
        found = parse_line(line)
        if found is None:
            return self._other(line)
        tag, record = found
        if tag == "train_inner":
            return self._training(record)
        return None if tag == "train" else self._validation(tag, record)

    def _other(self, line: str) -> str | None:
        # fairseq prints its options and the model, the latter over many lines; run.json holds both.
        if _INFO.search(line):
            self._inside_module = line.rstrip().endswith("(")
            return None
        if self._inside_module and line.startswith((" ", ")")):
            return None
        return line.rstrip() or None

    def _training(self, record: dict[str, float]) -> str:
        rate = record.get("bsz", 0.0) * record.get("ups", 0.0)
        parts = [f"update {record['step']:.0f}" + (f"/{self.max_update}" if self.max_update else "")]
        parts += [f"{key} {value:.3g}" for key, value in record.items() if self._is_loss(key)]
        if rate > 0:
            parts.append(f"{rate:.0f} images/s")
        if self.max_update and record.get("ups"):
            left = (self.max_update - record["step"]) / record["ups"]
            parts.append(f"{left // 60:.0f}:{left % 60:02.0f} left")
        return " | ".join(parts)

    def _is_loss(self, key: str) -> bool:
        return key.endswith("loss") and key not in self._HIDDEN and "image_" not in key and "text_" not in key

    def _validation(self, tag: str, record: dict[str, float]) -> str:
        shown = [f"loss {record['loss']:.3g}"] if "loss" in record else []
        if "mean_recall" in record:
            recalls = " ".join(f"{record[f'{way}_r{k}']:.1f}" for way in ("i2t", "t2i") for k in (1, 5, 10))
            shown.append(f"mean recall {record['mean_recall']:.1f} % (i2t, t2i R@1/5/10: {recalls})")
        if "top1" in record:
            shown.append(f"top-1 {record['top1']:.1f} %")
        if "score" in record:
            shown.append(f"score {record['score']:.1f}")
        return f"{tag} at update {record['step']:.0f}: " + " | ".join(shown)


def read_training_log(path: str | Path) -> dict[str, list[dict[str, float]]]:
    """The histories in a log that fairseq wrote with `--log-format json`.

    Where a run was resumed into the same log, the records that the resumed run repeats or has gone back behind are
    replaced by its own.

    Args:
        path: the file that standard error or `--log-file` went to.

    Returns:
        By tag ("train_inner" within epochs, "train" and "valid", or another validation subset, after each), the
        records in order. A record has "step", the number of updates, and every number logged, under its name without
        the tag ("loss", not "valid_loss").

    Raises:
        UserError: no such file, or no such lines in it.
    """
    try:
        text = Path(path).read_text(encoding="utf-8", errors="replace")
    except OSError as error:
        raise UserError(f"cannot read training log {path}: {error.strerror}") from error
    histories: dict[str, list[dict[str, float]]] = {}
    for line in text.splitlines():
        found = parse_line(line)
        if found is not None:
            tag, record = found
            history = histories.setdefault(tag, [])
            while history and history[-1]["step"] >= record["step"]:
                history.pop()
            history.append(record)
    if not histories:
        raise UserError(f"no training records in {path}; train with --log-format json and keep what it prints")
    return histories


def _record(tag: str, stats: str) -> dict[str, float] | None:
    """One record, or None where the line is no statistics or was cut off."""
    try:
        values = json.loads(stats)
    except json.JSONDecodeError:
        return None
    numbers = {}
    for key, value in values.items():
        number = _number(value)
        if number is not None:
            numbers[key.removeprefix(f"{tag}_")] = number
    if "num_updates" not in numbers:
        return None
    return {"step": numbers.pop("num_updates"), **numbers}


def _number(value: Any) -> float | None:
    try:
        return float(value)
    except (TypeError, ValueError):
        return None
