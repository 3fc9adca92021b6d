"""Raw files in the forms that people have them."""

import hashlib
import os
import tarfile
import zipfile
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path, PurePosixPath

from emkum.errors import UserError

# Other names of the splits.
SPLIT_NAMES = {"train": "train", "valid": "valid", "val": "valid", "dev": "valid", "test": "test"}
SPLIT_ORDER = ("train", "valid", "test")
_ARCHIVES = (".zip", ".tar", ".gz", ".tgz", ".bz2", ".xz")
_CHUNK_BYTES = 1 << 20


def hash_source(path: Path) -> str:
    """SHA-256 (hex) that tells one source from another.

    Of a file, its content; of an archive of images, which may be of any size, its members' names, sizes and (in a zip)
    checksums; of a folder, its files' relative names and sizes. What the samples hold is checked by the prepared
    data's own checksums.
    """
    digest = hashlib.sha256()
    if path.is_dir():
        for file in sorted(entry for entry in path.rglob("*") if entry.is_file()):
            digest.update(f"{file.relative_to(path).as_posix()}\0{file.stat().st_size}\0".encode("utf-8", "replace"))
    elif zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as archive:
            for info in archive.infolist():
                digest.update(f"{info.filename}\0{info.file_size}\0{info.CRC}\0".encode("utf-8", "replace"))
    elif path.suffix == ".tar":
        digest.update(f"{path.name}\0{path.stat().st_size}".encode())
    else:
        with open(path, "rb") as stream:
            while chunk := stream.read(_CHUNK_BYTES):
                digest.update(chunk)
    return digest.hexdigest()


class ImageFiles:
    """The files of a folder, a zip or an uncompressed tar, by their relative names. Picklable: it opens what it needs
    on first use, and again in another process. Nothing is extracted.

    Args:
        path: the folder or archive.
        option: the option that named it, for messages.

    Raises:
        UserError: it is neither.
    """

    def __init__(self, path: Path, option: str = "--images") -> None:
        self.path = Path(path)
        self._zip: zipfile.ZipFile | None = None
        # Of a tar, where each member is: (offset, length).
        self._places: dict[str, tuple[int, int]] = {}
        try:
            if self.path.is_dir():
                self.names = sorted(_walk(self.path))
            elif zipfile.is_zipfile(self.path):
                infos = self._archive().infolist()
                self.names = [info.filename for info in infos if not info.is_dir() and _is_visible(info.filename)]
            elif self.path.is_file() and tarfile.is_tarfile(self.path):
                self._places = _tar_places(self.path)
                self.names = list(self._places)
            elif self.path.exists():
                raise UserError(f"{option}: {self.path} is neither a folder nor a zip file nor an uncompressed tar")
            else:
                raise UserError(f"{option}: there is no folder, zip or tar {self.path}")
        except (OSError, zipfile.BadZipFile, tarfile.TarError) as error:
            raise UserError(f"{option}: {self.path} cannot be read: {error}") from None

    def __getstate__(self) -> dict[str, object]:
        return self.__dict__ | {"_zip": None}

    def _archive(self) -> zipfile.ZipFile:
        if self._zip is None:
            self._zip = zipfile.ZipFile(self.path)
        return self._zip

    def read(self, name: str) -> bytes:
        """Content of a file.

        Raises:
            Exception: whatever zipfile or the operating system raise for a file that cannot be read.
        """
        if self._places:
            offset, length = self._places[name]
            with open(self.path, "rb") as file:
                file.seek(offset)
                return file.read(length)
        if self.path.is_dir():
            return (self.path / name).read_bytes()
        return self._archive().read(name)

    def by_base_name(self, wanted: Iterable[str]) -> dict[str, str]:
        """Base name -> name of each wanted file that is there.

        Raises:
            UserError: two wanted files share their base name.
        """
        wanted = set(wanted)
        found: dict[str, str] = {}
        for name in self.names:
            base = PurePosixPath(name).name
            if base in wanted:
                if base in found:
                    raise UserError(f"{self.path} holds two files named {base}")
                found[base] = name
        return found


def _walk(folder: Path) -> Iterable[str]:
    for root, folders, files in os.walk(folder):
        folders[:] = [name for name in folders if _is_visible(name)]
        relative = PurePosixPath(Path(root).relative_to(folder).as_posix())
        yield from (str(relative / name) for name in files if _is_visible(name))


def _is_visible(name: str) -> bool:
    """macOS packs a shadow tree of resource forks, and hidden files are nobody's images."""
    parts = PurePosixPath(name).parts
    return "__MACOSX" not in parts and not parts[-1].startswith(".")


def _tar_places(path: Path) -> dict[str, tuple[int, int]]:
    with tarfile.open(path, "r:") as archive:
        files = (info for info in archive if info.isfile() and _is_visible(info.name))
        return {info.name: (info.offset_data, info.size) for info in files}


def read_error(error: Exception) -> str:
    """One line on why a file could not be read."""
    lines = str(error).splitlines()
    return f"{type(error).__name__}: {lines[0] if lines else 'cannot be read'}"


def parse_splits(arguments: Sequence[str], option: str = "--split") -> dict[str, Path]:
    """NAME=FILE arguments to split -> file, in the order train, valid, test.

    Raises:
        UserError: one is malformed, given twice, or its file is missing.
    """
    splits: dict[str, Path] = {}
    for argument in arguments:
        name, equals, file = argument.partition("=")
        if not equals or not file or name not in SPLIT_NAMES:
            raise UserError(f"{option} {argument}: want NAME=FILE with NAME one of {', '.join(SPLIT_NAMES)}")
        split = SPLIT_NAMES[name]
        if split in splits:
            raise UserError(f"{option} {argument}: {split} is given twice")
        if not Path(file).exists():
            raise UserError(f"{option} {argument}: there is no file {file}")
        splits[split] = Path(file)
    return {name: splits[name] for name in SPLIT_ORDER if name in splits}


def read_lines(path: Path) -> list[str]:
    """Lines of a text file, stripped; bytes that are not UTF-8 become escapes that `clean_captions` recognizes.

    Raises:
        UserError: the file cannot be read, or is no text.
    """
    try:
        text = path.read_bytes()
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from None
    if b"\0" in text[:_CHUNK_BYTES]:
        raise UserError(f"{path} is not UTF-8 text")
    # Python's own splitlines would also cut at characters that captions may hold.
    return [line.strip() for line in text.decode("utf-8-sig", errors="surrogateescape").split("\n")]


def assert_none(names: Sequence[str], what: str) -> None:
    """Raise UserError where images lack something: `what` they lack, how many do, and the first of them."""
    if names:
        raise UserError(f"{what} for {len(names)} of its images, the first {names[0]}")


def assert_disjoint(splits: Mapping[str, Sequence[str]], sources: Mapping[str, Path]) -> None:
    """Raise UserError where an image is listed twice, in one split or in two."""
    seen: dict[str, str] = {}
    for split, names in splits.items():
        for name in names:
            if name in seen:
                raise UserError(f"image {name} is listed twice: in {seen[name]} and in {sources[split]}")
            seen[name] = str(sources[split])
