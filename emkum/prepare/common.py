"""What all sets share: the interface of a raw set, and the way from it to a published folder of shards."""

import argparse
import hashlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any, Protocol

from tqdm import tqdm

from emkum.data.shards import ShardedSamples, ShardWriter, staged_directory
from emkum.errors import UserError
from emkum.prepare.tokenizer import train_sentencepiece
from emkum.provenance import package_versions

RECORD_NAME = "prepare.json"
TOKENIZER_NAME = "tokenizer.model"
SKIPPED_NAME = "skipped.jsonl"
_CHUNK_BYTES = 1 << 20


@dataclass(frozen=True)
class RawSample:
    """One image with captions as a raw set has them; see `ShardWriter.add` for the attributes."""

    key: str
    image: bytes
    suffix: str
    captions: tuple[str, ...]
    image_id: int
    meta: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class SkippedSample:
    """One image that cannot be used, and why; it is counted and listed in `skipped.jsonl`."""

    key: str
    reason: str


class RawSet(Protocol):
    """A data set in its raw form. A further set is one file with a class like this and an `add_parser`.

    Attributes:
        name: of the set.
        options: JSON values that the output depends on, beside the sources.
        sources: role -> raw file or folder.
        counts: split -> number of samples, skipped ones included.
    """

    name: str
    options: Mapping[str, Any]
    sources: Mapping[str, Path]
    counts: Mapping[str, int]

    def samples(self, split: str) -> Iterator[RawSample | SkippedSample]:
        """All samples of a split, in an order that depends on options and sources alone."""
        ...


def add_common_arguments(parser: argparse.ArgumentParser, vocab_size: int) -> None:
    """Add the options that every set has; `vocab_size` is the set's default."""
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="folder to make, absent or empty before")
    parser.add_argument(
        "--vocab-size",
        type=int,
        default=vocab_size,
        metavar="N",
        help="pieces of the SentencePiece tokenizer that is trained on the train captions, special tokens included; "
        "0 = train none (default: %(default)s)",
    )


def prepare(raw: RawSet, out: str | Path, vocab_size: int) -> None:
    """Write a raw set as shards, tokenizer and `prepare.json` into a folder that appears whole or not at all.

    Nothing is done where the folder was made before with the same options from the same sources.

    Args:
        raw: the set.
        out: folder to make.
        vocab_size: of the tokenizer; 0 = none.

    Raises:
        UserError: the folder holds something else, a split is empty, or the tokenizer cannot be trained.
    """
    out = Path(out)
    if vocab_size < 0:
        raise UserError(f"--vocab-size {vocab_size}: want 0 (no tokenizer) or more")
    if vocab_size > 0 and "train" not in raw.counts:
        raise UserError("the tokenizer is trained on the split train: give one, or --vocab-size 0")
    previous = _previous_record(out)
    record: dict[str, Any] = {
        "set": raw.name,
        "options": {**raw.options, "vocab_size": vocab_size},
        "sources": {role: hash_source(path) for role, path in raw.sources.items()},
    }
    if previous is not None:
        _assert_same(out, previous, record)
        print(f"{out}: made before with the same options and sources, nothing to do")
        return
    with staged_directory(out) as stage:
        with open(stage / SKIPPED_NAME, "w", encoding="utf-8") as skipped:
            record["splits"] = {split: _write_split(raw, split, stage, skipped) for split in raw.counts}
        if vocab_size > 0:
            train = ShardedSamples(stage / "train")
            captions = (caption for sample in train for caption in sample.captions)
            train_sentencepiece(captions, stage / TOKENIZER_NAME, vocab_size)
        record["versions"] = package_versions()
        (stage / RECORD_NAME).write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
    for split, counts in record["splits"].items():
        print(f"{out}: {split}: " + ", ".join(f"{number} {what}" for what, number in counts.items()))


def _write_split(raw: RawSet, split: str, stage: Path, skipped: IO[str]) -> dict[str, int]:
    counts = {"images": 0, "captions": 0, "skipped": 0}
    with ShardWriter(stage / split) as writer:
        for sample in tqdm(raw.samples(split), desc=split, total=raw.counts[split], unit="image", disable=None):
            if isinstance(sample, SkippedSample):
                counts["skipped"] += 1
                line = {"split": split, "key": sample.key, "reason": sample.reason}
                skipped.write(json.dumps(line, ensure_ascii=False) + "\n")
                continue
            writer.add(sample.key, sample.image, sample.suffix, sample.captions, sample.meta, sample.image_id)
            counts["images"] += 1
            counts["captions"] += len(sample.captions)
        if counts["images"] == 0:
            raise UserError(f"split {split} of {raw.name} has no usable image ({counts['skipped']} skipped)")
    return counts


def _previous_record(out: Path) -> dict[str, Any] | None:
    """The `prepare.json` of a folder that was made before; None where the folder can be made."""
    if not out.exists() or (out.is_dir() and not any(out.iterdir())):
        return None
    try:
        record = json.loads((out / RECORD_NAME).read_text(encoding="utf-8"))
        return {name: record[name] for name in ("set", "options", "sources")}
    except (OSError, ValueError, KeyError, TypeError):
        raise UserError(f"{out} exists and holds no prepared data: choose another --out or empty it") from None


def _assert_same(out: Path, previous: dict[str, Any], record: dict[str, Any]) -> None:
    difference = f"set {previous['set']} there, {record['set']} here" if previous["set"] != record["set"] else None
    for part, what in (("options", "option"), ("sources", "source")):
        there, here = previous[part], record[part]
        for name in sorted(there.keys() | here.keys()):
            if difference is None and there.get(name) != here.get(name):
                values = f": {there.get(name)} there, {here.get(name)} here" if part == "options" else " differs"
                difference = f"{what} {name}{values}"
    if difference is not None:
        raise UserError(f"{out} holds other prepared data ({difference}): choose another --out or remove it")


def hash_source(path: Path) -> str:
    """SHA-256 (hex) of a file; of a folder, of its files' relative names and contents."""
    digest = hashlib.sha256()
    files = [path] if path.is_file() else sorted(entry for entry in path.rglob("*") if entry.is_file())
    for file in files:
        if file != path:
            digest.update(f"{file.relative_to(path).as_posix()}\0{file.stat().st_size}\0".encode())
        with open(file, "rb") as stream:
            while chunk := stream.read(_CHUNK_BYTES):
                digest.update(chunk)
    return digest.hexdigest()
