"""Reading the samples of tars that another program wrote. Nothing is ever extracted."""

import json
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from emkum.data.shards import FOREIGN_JSON, NO_TEXT, PLAIN_TEXT, foreign_captions, member_key

IMAGE_SUFFIXES = ("jpg", "jpeg", "png", "webp", "gif", "bmp")


@dataclass
class TarMember:
    """A file in a tar: its name, and where its content is."""

    name: str
    offset: int
    length: int


@dataclass
class TarSample:
    """Members of one key that follow one another in a tar; None where there is no such member."""

    key: str
    image: TarMember | None = None
    text: TarMember | None = None
    json: TarMember | None = None

    @property
    def captions_member(self) -> tuple[TarMember | None, int]:
        """The member that holds the caption, and its kind."""
        if self.text is not None:
            return self.text, PLAIN_TEXT
        return (self.json, FOREIGN_JSON) if self.json is not None else (None, NO_TEXT)


@dataclass(frozen=True)
class Unusable:
    """A part of a tar that cannot be used, and why."""

    key: str
    reason: str


class _DamagedTar(Exception):
    """A tar ends, or cannot be read on, before its end mark."""


def tar_samples(path: Path) -> Iterator[TarSample | Unusable]:
    """Group the members of a tar that another program wrote. Nothing is ever extracted."""
    sample: TarSample | None = None
    suffixes: set[str] = set()
    try:
        for member in _tar_members(path):
            if isinstance(member, Unusable):
                yield member
                continue
            key = member_key(member.name)
            suffix = member.name[len(key) + 1 :].lower()
            # A second image or caption of the same name belongs to another sample.
            if sample is None or key != sample.key or suffix in suffixes:
                if sample is not None:
                    yield sample
                sample, suffixes = TarSample(key), set()
            suffixes.add(suffix)
            if suffix in IMAGE_SUFFIXES:
                sample.image = sample.image or member
            elif suffix == "txt":
                sample.text = member
            elif suffix == "json":
                sample.json = member
    except _DamagedTar as error:
        # What else the sample had may be lost.
        yield Unusable(path.name if sample is None else sample.key, str(error))
        return
    if sample is not None:
        yield sample


def _tar_members(path: Path) -> Iterator[TarMember | Unusable]:
    size = path.stat().st_size
    try:
        with tarfile.open(path, "r:") as archive:
            for info in archive:
                if not info.isfile():
                    continue
                if info.name.startswith("/") or ".." in info.name.split("/"):
                    yield Unusable(info.name, "its name leaves the folder")
                else:
                    yield TarMember(info.name, info.offset_data, info.size)
                if info.offset_data + info.size > size:
                    raise _DamagedTar(f"{path.name} is cut off within {info.name}")
                # The archive would keep every member's header in memory.
                archive.members.clear()
            # tarfile takes whatever is no header for the end; the true one is a block of zeros.
            archive.fileobj.seek(archive.offset)
            if archive.fileobj.read(tarfile.BLOCKSIZE) != bytes(tarfile.BLOCKSIZE):
                raise _DamagedTar(f"{path.name} is cut off or damaged at byte {archive.offset:,}")
    except (tarfile.TarError, ValueError, OverflowError) as error:
        raise _DamagedTar(f"{path.name} is no whole tar file: {error}") from None


def read_foreign(file: IO[bytes], sample: TarSample) -> tuple[bytes, bytes, tuple[str, ...]]:
    """Image, content of the caption's member, and captions of a sample in a tar that another program wrote.

    Raises:
        ValueError: there is no image, or the caption is not UTF-8 or no JSON object.
    """
    if sample.image is None:
        raise ValueError(f"no image among its members (want one of {', '.join(IMAGE_SUFFIXES)})")
    file.seek(sample.image.offset)
    image = file.read(sample.image.length)
    member, kind = sample.captions_member
    if member is None:
        return image, b"", ()
    file.seek(member.offset)
    text = file.read(member.length)
    try:
        return image, text, foreign_captions(kind, text)[0]
    except UnicodeDecodeError:
        raise ValueError("its caption is not UTF-8") from None
    except json.JSONDecodeError as error:
        raise ValueError(f"its JSON is damaged: {error.msg}") from None
