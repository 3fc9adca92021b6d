"""What a raw data set is to `emkum prepare`, and how a part of one is written.

A set is cut into parts that any process can make alone: the output does not depend on how many processes there are,
and what an interrupted run has made is used by the next one.
"""

import json
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import groupby
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from emkum.data.decoding import BadImage, probe, shrink
from emkum.data.foreign_tars import TarSample, Unusable, read_foreign, tar_samples
from emkum.data.shard_writing import (
    NO_ID,
    PART_DTYPE,
    SplitParts,
    TarPart,
    content_hash,
    join_parts,
    make_record,
)
from emkum.data.tables import TABLE_NAME, join_rows
from emkum.errors import UserError
from emkum.files import replaced_file
from emkum.prepare.sounds import BadSound, stored_sound
from emkum.provenance import write_json

# Longer ones are pages that a crawler took for captions.
LONGEST_CAPTION = 10_000


@dataclass(frozen=True)
class Settings:
    """What the arguments common to all sets say; those that the output depends on are in `describe`.

    Attributes:
        workers: processes.
        limit: most items of a split; 0 = all.
        image_size: the shorter side that larger images are shrunk to, in pixels; 0 = files are stored unchanged.
        quality: of the JPEG that a shrunk image is stored as, 1 to 95.
        max_bad_fraction: a split with a larger part of bad samples stops the run.
        samples_per_shard: items of a part.
    """

    workers: int = 1
    limit: int = 0
    image_size: int = 0
    quality: int = 90
    max_bad_fraction: float = 0.1
    samples_per_shard: int = 1000

    def describe(self) -> dict[str, int]:
        names = ("limit", "image_size", "quality") if self.image_size else ("limit", "image_size")
        return {name: getattr(self, name) for name in names}


@dataclass(frozen=True)
class RawSample:
    """One image with captions as a raw set has them.

    Attributes:
        key: unique name in its split; dots and slashes become underscores.
        image: the encoded file.
        captions: none or more, stripped of white space where they are stored.
        image_id: the set's own number of the image, below 2**31; None = it has none.
        meta: further JSON values.
        group: samples of one group follow one another and are of use together alone; None = a sample of its own.
        sound: the encoded file of what goes with the image; None = none.
    """

    key: str
    image: bytes
    captions: Sequence[str] = ()
    image_id: int | None = None
    meta: dict[str, Any] = field(default_factory=dict)
    group: str | None = None
    sound: bytes | None = None


@dataclass(frozen=True)
class Skipped:
    """A sample, or one caption of it, that cannot be used; it is counted and listed in `skipped.jsonl`."""

    key: str
    reason: str
    what: str = "sample"


@dataclass(frozen=True)
class Written:
    """What came of a part: the number of samples that can be used, and what was skipped."""

    usable: int
    skipped: Sequence[Skipped]


class RawSet(ABC):
    """A data set in its raw form. It is pickled to worker processes, so it must not hold open files.

    Attributes:
        name: of the set.
        options: JSON values that the output depends on, beside the sources.
        sources: role -> raw file or folder.
        splits: names of its splits.
    """

    name: ClassVar[str]
    options: Mapping[str, Any]
    sources: Mapping[str, Path]

    @property
    @abstractmethod
    def splits(self) -> Sequence[str]: ...

    @abstractmethod
    def part_sizes(self, split: str, settings: Settings) -> list[int]:
        """Items of each part of a split; 0 where that is not known beforehand."""

    @abstractmethod
    def write_part(self, split: str, part: int, folder: Path, settings: Settings) -> Written:
        """Write a part's files, `part_path(folder, part, ...)`."""

    @abstractmethod
    def join(self, root: Path, settings: Settings) -> dict[str, dict[str, int]]:
        """Make each split, ROOT/SPLIT, of its parts; return its counts."""


def part_path(folder: Path, part: int, suffix: str) -> Path:
    """Name of a part's file."""
    return folder / f"{part:06d}.{suffix}"


class CountedSet(RawSet):
    """A set whose items can be counted and read from any of them on.

    Attributes:
        counts: split -> number of items.
    """

    counts: Mapping[str, int]

    @property
    def splits(self) -> Sequence[str]:
        return tuple(self.counts)

    def part_sizes(self, split: str, settings: Settings) -> list[int]:
        count = min(self.counts[split], settings.limit or self.counts[split])
        size = settings.samples_per_shard
        return [min(size, count - start) for start in range(0, count, size)]

    def range_of(self, split: str, part: int, settings: Settings) -> tuple[int, int]:
        """First item of a part, and the one after its last."""
        start = part * settings.samples_per_shard
        return start, start + self.part_sizes(split, settings)[part]


class ImageSet(CountedSet):
    """Images that are written into new shards."""

    @abstractmethod
    def samples(self, split: str, start: int, stop: int) -> Iterator[RawSample | Skipped]:
        """Samples of the items `start` to `stop`, in an order that depends on options and sources alone."""

    def write_part(self, split: str, part: int, folder: Path, settings: Settings) -> Written:
        skipped: list[Skipped] = []
        with TarPart(part_path(folder, part, "tar"), part) as shard:
            samples = self.samples(split, *self.range_of(split, part, settings))
            for _, group in groupby(enumerate(samples), key=_group_of):
                _add_group(shard, [sample for _, sample in group], settings, skipped)
        _save_records(folder, part, shard.records)
        return Written(len(shard), skipped)

    def join(self, root: Path, settings: Settings) -> dict[str, dict[str, int]]:
        parts = {}
        for split in self.splits:
            numbers = range(len(self.part_sizes(split, settings)))
            shards = [part_path(root, number, "tar").name for number in numbers]
            parts[split] = SplitParts(".", shards, [part_path(root / split, n, "part.npy") for n in numbers])
        return _join_shards(root, parts, self.name)


def _group_of(numbered: tuple[int, RawSample | Skipped]) -> str | int:
    number, sample = numbered
    group = getattr(sample, "group", None)
    return number if group is None else group


def _add_group(shard: TarPart, samples: list[RawSample | Skipped], settings: Settings, skipped: list[Skipped]) -> None:
    """Check all samples of a group, then add all of them or none."""
    checked, bad = [], []
    for sample in samples:
        if isinstance(sample, Skipped):
            bad.append(sample)
            continue
        captions, problems = clean_captions(sample.key, sample.captions)
        skipped += problems
        try:
            if sample.captions and not captions:
                raise BadImage(f"none of its captions can be used: {problems[0].reason}")
            image, suffix = stored_image(sample.image, settings)
            checked.append((sample, captions, image, suffix, _stored_sound(sample)))
        except BadImage as error:
            bad.append(Skipped(sample.key, str(error)))
        except BadSound as error:
            bad.append(Skipped(sample.key, f"sound: {error}"))
    if bad:
        skipped += bad
        skipped += [Skipped(sample.key, f"belongs to {bad[0].key}") for sample, *_ in checked]
        return
    for sample, captions, image, suffix, sound in checked:
        key = sample.key.translate(_KEY_CHARACTERS)
        try:
            fingerprint = content_hash(sample.image)
            shard.add(key, image, suffix, captions, sample.meta, sample.image_id, fingerprint, sound)
        except UserError as error:
            skipped.append(Skipped(sample.key, str(error).rpartition("error: ")[2]))
        except UnicodeEncodeError:
            skipped.append(Skipped(sample.key, "its name or what is known of it is not UTF-8"))


def _stored_sound(sample: RawSample) -> bytes:
    return b"" if sample.sound is None else stored_sound(sample.sound)


_KEY_CHARACTERS = str.maketrans("./\\\0", "____")


def stored_image(data: bytes, settings: Settings) -> tuple[bytes, str]:
    """The bytes to store for an image file, and their suffix.

    Raises:
        BadImage: it cannot be decoded wholly, or is too small.
    """
    info = probe(data)
    if settings.image_size == 0 or min(info.width, info.height) <= settings.image_size:
        return data, info.suffix
    return shrink(info.image, settings.image_size, settings.quality), "jpg"


def clean_captions(key: str, captions: Sequence[str]) -> tuple[list[str], list[Skipped]]:
    """Captions that can be used, stripped of white space, and those that cannot.

    Text that was not UTF-8 is recognized by the escapes that reading it with `errors="surrogateescape"` leaves.
    """
    kept, skipped = [], []
    for number, caption in enumerate(captions):
        caption = caption.strip()
        reason = None
        if not caption:
            reason = "empty"
        elif len(caption) > LONGEST_CAPTION:
            reason = f"{len(caption):,} characters; more than {LONGEST_CAPTION:,} are no caption"
        elif any("\ud800" <= character <= "\udfff" for character in caption):
            reason = "not UTF-8"
        if reason is None:
            kept.append(caption)
        else:
            skipped.append(Skipped(key, reason, what=f"caption {number}"))
    return kept, skipped


class TarSet(RawSet):
    """Shards that another program wrote; they are indexed where they are and never changed.

    Attributes:
        folders: split -> the folder of its shards.
        tars: split -> their names.
    """

    folders: Mapping[str, Path]
    tars: Mapping[str, Sequence[str]]

    @property
    def splits(self) -> Sequence[str]:
        return tuple(self.tars)

    def part_sizes(self, split: str, settings: Settings) -> list[int]:
        return [0] * len(self.tars[split])

    def write_part(self, split: str, part: int, folder: Path, settings: Settings) -> Written:
        path = self.folders[split] / self.tars[split][part]
        records: dict[str, tuple[int, ...]] = {}
        skipped: list[Skipped] = []
        seen: set[str] = set()
        try:
            file = open(path, "rb")
        except OSError as error:
            raise UserError(f"cannot read {path}: {error.strerror}") from None
        with file:
            for sample in tar_samples(path):
                where = f"{path.name}: {sample.key}"
                if isinstance(sample, Unusable):
                    skipped.append(Skipped(where, sample.reason))
                    continue
                try:
                    if sample.key in seen:
                        raise BadImage("an earlier sample of this shard has the same name")
                    seen.add(sample.key)
                    records[where] = _foreign_record(file, sample, part)
                except BadImage as error:
                    skipped.append(Skipped(where, str(error)))
                if len(records) == settings.limit > 0:
                    break
        found = np.array(list(records.values()), dtype=PART_DTYPE)
        captioned = found["num_captions"] > 0
        if captioned.any():
            # Where some have captions those without would make the split useless for learning from both.
            skipped += [Skipped(where, "no caption") for where, has in zip(records, captioned, strict=True) if not has]
            found = found[captioned]
        _save_records(folder, part, found)
        return Written(len(found), skipped)

    def join(self, root: Path, settings: Settings) -> dict[str, dict[str, int]]:
        parts = {}
        for split, names in self.tars.items():
            files = [part_path(root / split, number, "part.npy") for number in range(len(names))]
            parts[split] = SplitParts(str(self.folders[split].resolve()), names, files)
        return _join_shards(root, parts, self.name, settings.limit)


def _foreign_record(file: Any, sample: TarSample, shard: int) -> tuple[int, ...]:
    try:
        image, text, captions = read_foreign(file, sample)
    except ValueError as error:
        raise BadImage(str(error)) from None
    kept, problems = clean_captions(sample.key, captions)
    member, kind = sample.captions_member
    if member is not None and not kept:
        raise BadImage(f"caption: {problems[0].reason if problems else 'empty'}")
    probe(image)
    return make_record(
        (sample.image.offset, image),
        (member.offset if member else 0, text, kind),
        kept,
        NO_ID,
        shard,
        content_hash(sample.key.encode("utf-8", "surrogateescape")),
        content_hash(image),
    )


def _save_records(folder: Path, part: int, records: np.ndarray) -> None:
    with replaced_file(part_path(folder, part, "part.npy")) as temporary, open(temporary, "wb") as file:
        np.save(file, records, allow_pickle=False)


def _join_shards(root: Path, parts: Mapping[str, SplitParts], name: str, limit: int = 0) -> dict[str, dict[str, int]]:
    counts = {}
    for split, joined in join_parts(root, parts, limit).items():
        counts[split] = {"images": joined.images, "captions": joined.captions}
        counts[split]["duplicate_images"] = joined.duplicate_images
        counts[split]["duplicate_names"] = joined.duplicate_names
    return counts


class TableSet(CountedSet):
    """Rows of text and labels, written as JSON lines."""

    @abstractmethod
    def rows(self, split: str, start: int, stop: int) -> Iterator[dict[str, Any] | Skipped]:
        """The rows `start` to `stop`."""

    def write_part(self, split: str, part: int, folder: Path, settings: Settings) -> Written:
        skipped, usable = [], 0
        path = part_path(folder, part, "part.rows")
        with replaced_file(path) as temporary, open(temporary, "w", encoding="utf-8") as file:
            for row in self.rows(split, *self.range_of(split, part, settings)):
                if isinstance(row, Skipped):
                    skipped.append(row)
                else:
                    file.write(json.dumps(row, ensure_ascii=False) + "\n")
                    usable += 1
        return Written(usable, skipped)

    def join(self, root: Path, settings: Settings) -> dict[str, dict[str, int]]:
        counts = {}
        for split in self.splits:
            numbers = range(len(self.part_sizes(split, settings)))
            parts = [part_path(root / split, number, "part.rows") for number in numbers]
            counts[split] = {"rows": join_rows(parts, root / split / TABLE_NAME)}
        return counts


def write_part(raw: RawSet, split: str, part: int, folder: Path, settings: Settings) -> dict[str, Any]:
    """Make one part unless it is there; the file with its counts, written last, says that it is.

    Returns:
        usable, skipped, skipped_captions: numbers. reasons: of skipped samples, how often each of the commonest occurs.
    """
    done = part_path(folder, part, "part.json")
    if done.is_file():
        return json.loads(done.read_text(encoding="utf-8"))
    written = raw.write_part(split, part, folder, settings)
    skipped = written.skipped
    with replaced_file(part_path(folder, part, "part.jsonl")) as temporary:
        lines = ({"split": split, "key": s.key, "what": s.what, "reason": s.reason} for s in skipped)
        temporary.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    reasons = Counter(s.reason for s in skipped if s.what == "sample")
    counts = {
        "usable": written.usable,
        "skipped": reasons.total(),
        "skipped_captions": len(skipped) - reasons.total(),
        "reasons": dict(reasons.most_common(3)),
    }
    write_json(done, counts)
    return counts
