"""`emkum data`: what is in a folder of prepared data."""

import argparse
import io
import json
import os
import warnings
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image

from emkum.errors import UserError

if TYPE_CHECKING:
    from emkum.data.shards import ShardedSamples, ShardSample
    from emkum.evaluation.contact_sheet import Section, Tile

# Kinds of splits.
IMAGES, TABLE, TOKENS = "images", "table", "tokens"

SHEET_NAME = "contact_sheet.png"
TILES_OF_SPLIT = 12
SHOWN_ROWS = 3
LINE_WIDTH = 110
BAR_WIDTH = 40
MOST_BARS = 12


def add_parser(commands: Any) -> None:
    parser = commands.add_parser("data", help="look into prepared data")
    kinds = parser.add_subparsers(dest="kind", required=True, metavar="KIND")
    info = kinds.add_parser(
        "info",
        help="counts, lengths of captions, sizes of images, and a picture of some samples",
        description="Print what is in a folder that `emkum prepare` made. Sizes and lengths come from evenly spread "
        "samples. Where there are images, a contact sheet of some of them with their captions is written; nothing is "
        "written into the prepared folder.",
        epilog="example: emkum data info data/flickr8k --out flickr8k.png",
    )
    info.add_argument("data", type=Path, metavar="DIR", help="folder made by `emkum prepare`")
    info.add_argument("--split", default="", metavar="NAME", help="only this one, such as train or CoLA/train")
    info.add_argument(
        "--out",
        type=Path,
        default=Path(SHEET_NAME),
        metavar="FILE.png",
        help="contact sheet (default: %(default)s in the current folder)",
    )
    info.add_argument(
        "--samples",
        type=int,
        default=2000,
        metavar="N",
        help="samples of each split that are read; 0 = all (default: %(default)s)",
    )
    info.set_defaults(run=run_info)


def run_info(args: argparse.Namespace) -> None:
    splits = find_splits(args.data)
    if args.split:
        if args.split not in splits:
            raise UserError(f"{args.data} has no split {args.split!r}; choose from {', '.join(splits)}")
        splits = {args.split: splits[args.split]}
    if args.samples < 0:
        raise UserError(f"--samples {args.samples}: want 0 (all) or more")
    if args.out.suffix.lower() != ".png":
        raise UserError(f"--out {args.out}: want a name that ends in .png")
    record = _record(args.data)
    if record:
        print(f"{args.data}: {record.get('set', '?')}, made by emkum {record.get('versions', {}).get('emkum', '?')}")
    sections = []
    for name, kind in splits.items():
        counts = record.get("splits", {}).get(name, {})
        if kind == IMAGES:
            lines, section = _describe_images(args.data / name, name, counts, args.samples)
            sections.append(section)
        else:
            lines = (_describe_table if kind == TABLE else _describe_tokens)(args.data / name, counts)
        print(f"\n{name}", *(f"  {line}" for line in lines), sep="\n")
    if sections:
        _write_sheet(args.out, sections)


def find_splits(data_dir: Path) -> dict[str, str]:
    """Name -> kind of all splits in a folder, TASK/SPLIT where a task has its own; train, valid and test go first.

    Raises:
        UserError: there is none.
    """
    from emkum.data.shards import INDEX_NAME, SPLIT_ORDER
    from emkum.data.tables import TABLE_NAME
    from emkum.data.token_blocks import OFFSETS_NAME

    markers = {INDEX_NAME: IMAGES, TABLE_NAME: TABLE, OFFSETS_NAME: TOKENS}

    def place(name: str) -> tuple[str, int, str]:
        task, _, split = name.rpartition("/")
        return task, SPLIT_ORDER.index(split) if split in SPLIT_ORDER else len(SPLIT_ORDER), split

    if not data_dir.is_dir():
        raise UserError(f"data folder {data_dir} does not exist; make one with `emkum prepare`")
    found = {}
    for folder in (*data_dir.glob("*/"), *data_dir.glob("*/*/")):
        kind = next((kind for marker, kind in markers.items() if (folder / marker).is_file()), None)
        name = folder.relative_to(data_dir).as_posix()
        if kind is not None and not name.startswith("."):
            found[name] = kind
    if not found:
        raise UserError(f"{data_dir} holds no prepared split; make one with `emkum prepare`")
    return {name: found[name] for name in sorted(found, key=place)}


def _record(data_dir: Path) -> dict[str, Any]:
    """`prepare.json`, or nothing where it is missing or damaged."""
    try:
        record = json.loads((data_dir / "prepare.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return record if isinstance(record, dict) else {}


@dataclass
class SampleFigures:
    """What some samples look like.

    Attributes:
        samples: how many.
        words: of each of their captions.
        widths, heights: of each of their images, in pixels, as stored.
        formats: how many images are of each; "unreadable" where it cannot be told.
    """

    samples: int = 0
    words: list[int] = field(default_factory=list)
    widths: list[int] = field(default_factory=list)
    heights: list[int] = field(default_factory=list)
    formats: Counter[str] = field(default_factory=Counter)

    def add(self, sample: "ShardSample") -> None:
        self.samples += 1
        self.words += [len(caption.split()) for caption in sample.captions]
        if not sample.image:
            return
        try:
            # The header alone; of huge images Pillow would warn.
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                image = Image.open(io.BytesIO(sample.image))
        except Exception:  # Pillow's parsers raise whatever a damaged file makes them stumble over.
            self.formats["unreadable"] += 1
            return
        self.formats[image.format or "unreadable"] += 1
        self.widths.append(image.width)
        self.heights.append(image.height)


def spread(length: int, count: int) -> list[int]:
    """One number out of each of `count` equal parts of range(length), the same ones every time; all of it where it has
    no more. Drawn, because equal steps would meet the same few classes of a set that goes round its classes."""
    if count >= length:
        return list(range(length))
    ends = np.arange(count + 1) * length // count
    return np.random.default_rng(0).integers(ends[:-1], ends[1:]).tolist()


def _describe_images(folder: Path, name: str, counts: dict[str, Any], wanted: int) -> tuple[list[str], "Section"]:
    from tqdm import tqdm

    from emkum.data.shards import ShardedSamples
    from emkum.evaluation.contact_sheet import Section

    samples = ShardedSamples(folder)
    manifest = samples.manifest
    figures = SampleFigures()
    for position in tqdm(spread(len(samples), wanted or len(samples)), desc=name, unit="sample", disable=None):
        figures.add(samples[position])
    lines = [
        f"{len(samples):,} images in {_several(len(manifest.names), 'shard')}, {_bytes(sum(manifest.sizes))}",
        f"{_several(manifest.num_captions, 'caption')}, {manifest.num_captions / len(samples):.3g} an image; "
        f"{_several(manifest.num_without_caption, 'image')} without",
        *([f"{_several(heard, 'sound')}"] if (heard := int(samples.has_sound.sum())) else []),
        *_describe_counts(counts),
        *describe_figures(figures, len(samples)),
    ]
    tiles = [_tile(samples, position) for position in spread(len(samples), TILES_OF_SPLIT)]
    title = f"{name}: {len(samples):,} images, {_several(manifest.num_captions, 'caption')}"
    return lines, Section(title, tiles)


def _describe_counts(counts: dict[str, Any]) -> Iterator[str]:
    """What `emkum prepare` left out, and what it found twice."""
    if "skipped" in counts:
        captions = _several(counts.get("skipped_captions", 0), "caption")
        yield f"left out when prepared: {_several(counts['skipped'], 'sample')}, {captions}"
    if "duplicate_images" in counts:
        names = counts.get("duplicate_names", 0)
        images = _several(counts["duplicate_images"], "image")
        yield f"duplicates: {images} like an earlier one; {names:,} left out for a name that was there before"


def describe_figures(figures: SampleFigures, length: int) -> Iterator[str]:
    """Lines on sizes, formats and caption lengths.

    Args:
        figures: of some samples.
        length: of the split.
    """
    if figures.samples < length:
        yield f"of {figures.samples:,} evenly spread samples:"
    for what, values in (("width", figures.widths), ("height", figures.heights)):
        if values:
            least, median, most = np.min(values), np.median(values), np.max(values)
            yield f"{what + ' (min, median, max)':<27}{least:,} {median:,.0f} {most:,} px"
    total = figures.formats.total()
    if total:
        shares = (f"{kind} {100 * n / total:.3g} %" for kind, n in figures.formats.most_common(4))
        yield f"{'formats':<27}{', '.join(shares)}"
    if figures.words:
        words = np.array(figures.words)
        yield f"{'words a caption':<27}median {np.median(words):.0f}, most {words.max():,}"
        yield from histogram(words)


def histogram(words: np.ndarray) -> Iterator[str]:
    """Bars of text over numbers of words.

    At most MOST_BARS, equally wide and so that nearly all captions are below the last, which holds all that are longer.

    Args:
        words: (captions,) int.
    """
    step = max(1, -(-int(np.percentile(words, 99)) // (MOST_BARS - 1)))
    bins = np.minimum((np.maximum(words, 1) - 1) // step, MOST_BARS - 1)
    counts = np.bincount(bins)
    for number, count in enumerate(counts):
        first, last = number * step + 1, (number + 1) * step
        label = f"{first}+" if number == MOST_BARS - 1 else str(first) if step == 1 else f"{first}-{last}"
        bar = "#" * int(np.ceil(BAR_WIDTH * count / counts.max()))
        yield f"  {label:>9} {bar:<{BAR_WIDTH}} {100 * count / len(words):5.1f} %"


def _tile(samples: "ShardedSamples", position: int) -> "Tile":
    """A sample on the contact sheet; where it has no caption, what else is known of it."""
    from emkum.data.decoding import BadImage, decode
    from emkum.evaluation.contact_sheet import Tile

    sample = samples[position]
    try:
        image = decode(sample.image)
    except BadImage:
        image = None
    meta = [f"{name}: {value if isinstance(value, str) else json.dumps(value)}" for name, value in sample.meta.items()]
    return Tile(image, sample.captions or meta, sample.key)


def _describe_table(folder: Path, counts: dict[str, Any]) -> list[str]:
    from emkum.data.tables import Table

    table = Table(folder)
    size = sum(path.stat().st_size for path in folder.iterdir())
    rows = [table[position] for position in spread(len(table), SHOWN_ROWS)]
    columns = dict.fromkeys(name for row in rows for name in row)
    return [
        f"{_several(len(table), 'row')}, {_bytes(size)}; columns {', '.join(columns)}",
        *_describe_counts(counts),
        *(_shortened(json.dumps(row, ensure_ascii=False)) for row in rows),
    ]


def _describe_tokens(folder: Path, counts: dict[str, Any]) -> list[str]:
    from emkum.data.token_blocks import TokenBlocks

    blocks = TokenBlocks(folder)
    size = sum(path.stat().st_size for path in folder.iterdir())
    lengths = blocks.lengths
    return [
        f"{_several(len(blocks), 'block')} of {int(lengths.sum()):,} tokens, {_bytes(size)}",
        f"{'tokens a block':<27}{lengths.min():,} {np.median(lengths):,.0f} {lengths.max():,} (min, median, max)",
        *_describe_counts(counts),
        *(_shortened(" ".join(map(str, blocks[p][:LINE_WIDTH]))) for p in spread(len(blocks), SHOWN_ROWS)),
    ]


def _write_sheet(path: Path, sections: Sequence["Section"]) -> None:
    from emkum.evaluation.contact_sheet import contact_sheet

    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        contact_sheet(path, sections)
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror}") from None
    print(f"\ncontact sheet: {os.path.relpath(path)}")


def _several(count: int, what: str) -> str:
    return f"{count:,} {what}{'' if count == 1 else 's'}"


def _bytes(count: int) -> str:
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:.3g} {unit}"
        count /= 1000
    return f"{count:.3g} TB"


def _shortened(line: str) -> str:
    return line if len(line) <= LINE_WIDTH else f"{line[: LINE_WIDTH - 3]}..."
