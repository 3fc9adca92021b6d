"""A SentencePiece tokenizer trained on captions: the command `emkum prepare tokenizer`."""

import argparse
import gzip
import io
import json
import zlib
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from emkum.data.shards import ShardedSamples, open_split
from emkum.data.tokenizers import well_formed
from emkum.errors import UserError
from emkum.files import replaced_file
from emkum.prepare.common import add_set_parser
from emkum.prepare.sources import hash_source
from emkum.provenance import package_versions, write_json

MODEL_NAME = "tokenizer.model"
RECORD_NAME = "tokenizer.json"

# Ids of the special tokens; `emkum.data.tokenizers` reads both.
LAYOUTS = {
    "fairseq": {"bos_id": 0, "pad_id": 1, "eos_id": 2, "unk_id": 3, "control_symbols": ["<mask>"]},
    "sentencepiece": {"unk_id": 0, "bos_id": 1, "eos_id": 2, "pad_id": -1},
}
_GOLDEN_RATIO = (5**0.5 - 1) / 2


def add_parser(subparsers: argparse._SubParsersAction) -> None:
    """Add the sub-command `tokenizer`."""
    parser = add_set_parser(
        subparsers,
        "tokenizer",
        help="a SentencePiece tokenizer from captions or text files",
        description="Train a lower-casing SentencePiece tokenizer (unigram). Writes tokenizer.model and, as a record\n"
        "of what it was made from, tokenizer.json. Nothing is done where both were made before from the same.",
        example="  emkum prepare tokenizer --data data/coco --vocab-size 8000 --out tokens\n"
        "  emkum prepare tokenizer --input a.txt b.txt.gz --vocab-size 64000 --layout sentencepiece --out tokens",
    )
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--data", type=Path, metavar="DIR", help="folder of prepared data whose captions to take")
    source.add_argument(
        "--input", type=Path, nargs="+", metavar="FILE", help="text files with a sentence a line, *.txt or *.gz"
    )
    parser.add_argument("--split", default="train", help="split of --data (default: %(default)s)")
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="folder for both files")
    parser.add_argument(
        "--vocab-size",
        type=int,
        required=True,
        metavar="N",
        help="most pieces of the model, its special tokens included; fewer where the text does not yield as many",
    )
    parser.add_argument(
        "--layout",
        choices=sorted(LAYOUTS),
        default="fairseq",
        help="ids of the special tokens. fairseq: <s> 0, <pad> 1, </s> 2, <unk> 3, <mask> 4. sentencepiece: its own, "
        "used as XLM-R and BEiT-3 do, with two more entries, <pad> and <mask> (default: %(default)s)",
    )
    parser.add_argument(
        "--max-sentences",
        type=int,
        default=1_000_000,
        metavar="N",
        help="train on this many sentences at most, evenly spread over the text; 0 = all (default: %(default)s)",
    )
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> None:
    """Make the tokenizer that the arguments of the sub-command describe.

    Raises:
        UserError: a source is missing or unusable, or the folder holds another tokenizer.
    """
    if args.max_sentences < 0:
        raise UserError(f"--max-sentences {args.max_sentences}: want 0 (all) or more")
    options = {"vocab_size": args.vocab_size, "layout": args.layout, "max_sentences": args.max_sentences}
    if args.data is not None:
        samples = open_split(args.data, args.split, require_captions=False)
        options["split"] = args.split
        sources = [{"name": args.data.name, "sha256": samples.content_hash()}]
    else:
        for path in args.input:
            _assert_text_file(path)
        sources = [{"name": path.name, "sha256": hash_source(path)} for path in args.input]
    record: dict[str, Any] = {"options": options, "sources": sources}
    if _is_made(args.out, record):
        print(f"{args.out / MODEL_NAME}: made before with the same options and sources, nothing to do")
        return
    if args.data is not None:
        total, skipped = int(samples.num_captions.sum(dtype=np.int64)), 0
        chosen = spread(total, args.max_sentences)
        sentences = _captions(samples, chosen)
    else:
        total, skipped = _count_sentences(args.input)
        chosen = spread(total, args.max_sentences)
        sentences = _pick(_sentences(args.input, Counter()), chosen)
    record |= {"sentences": total, "sentences_used": len(chosen), "lines_skipped": skipped}
    _make(args.out, record, tqdm(sentences, desc="sentences", total=len(chosen), disable=None))
    left_out = f"; lines left out that are not UTF-8: {skipped:,}" if skipped > 0 else ""
    print(f"{args.out / MODEL_NAME}: trained on {len(chosen):,} of {total:,} sentences{left_out}")


def _is_made(out: Path, record: dict[str, Any]) -> bool:
    """Whether the folder holds this tokenizer.

    Raises:
        UserError: it holds another, or is no folder.
    """
    if out.exists() and not out.is_dir():
        raise UserError(f"--out {out} is not a folder")
    if not (out / MODEL_NAME).exists():
        return False
    try:
        previous = json.loads((out / RECORD_NAME).read_text(encoding="utf-8"))
        there = {**previous["options"], "sources": [source["sha256"] for source in previous["sources"]]}
    except (OSError, ValueError, KeyError, TypeError):
        raise UserError(f"{out} holds a {MODEL_NAME} of another origin: choose another --out or remove it") from None
    here = {**record["options"], "sources": [source["sha256"] for source in record["sources"]]}
    different = [name for name in sorted(there.keys() | here.keys()) if there.get(name) != here.get(name)]
    if different:
        name = different[0]
        what = name if name == "sources" else f"{name} {there.get(name)} there, {here.get(name)} here"
        raise UserError(f"{out} holds another tokenizer ({what}): choose another --out or remove it")
    return True


def _make(out: Path, record: dict[str, Any], sentences: Iterable[str]) -> None:
    """Train, and write the record before the model: a folder with a model has its record."""
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"cannot make {out}: {error.strerror}") from None
    with replaced_file(out / MODEL_NAME) as temporary:
        train_sentencepiece(sentences, temporary, record["options"]["vocab_size"], record["options"]["layout"])
        write_json(out / RECORD_NAME, {**record, "versions": package_versions()})


def spread(total: int, most: int) -> np.ndarray:
    """Ascending numbers of at most `most` of `total` things (0 = all), one out of each of as many equal stretches.

    The place in a stretch changes from one to the next: of captions that come in fives, not only the first is taken.
    """
    count = min(total, most) if most > 0 else total
    edges = np.arange(count + 1) * total // max(count, 1)
    places = np.arange(count) * _GOLDEN_RATIO % 1
    return edges[:-1] + (places * np.diff(edges)).astype(np.int64)


def _captions(samples: ShardedSamples, chosen: np.ndarray) -> Iterator[str]:
    """The chosen ones of all captions; samples without any of them are not read."""
    ends = np.cumsum(samples.num_captions, dtype=np.int64)
    owners = np.searchsorted(ends, chosen, side="right")
    present = -1
    captions: tuple[str, ...] = ()
    for number, owner in zip(chosen.tolist(), owners.tolist(), strict=True):
        if owner != present:
            present, captions = owner, samples[owner].captions
        yield captions[number - int(ends[owner])]


def _assert_text_file(path: Path) -> None:
    if path.suffix not in (".txt", ".gz"):
        raise UserError(f"--input {path}: want a text file with a sentence a line, *.txt or *.gz")
    if not path.is_file():
        raise UserError(f"--input: there is no file {path}")


def _sentences(paths: Sequence[Path], skipped: Counter[Path]) -> Iterator[str]:
    """Lines that are not blank; those that are not UTF-8 are left out and counted."""
    for path in paths:
        try:
            with gzip.open(path) if path.suffix == ".gz" else open(path, "rb") as file:
                for line in file:
                    try:
                        sentence = line.decode("utf-8-sig").strip()
                    except UnicodeDecodeError:
                        skipped[path] += 1
                        continue
                    if sentence:
                        yield sentence
        # What gzip raises for damaged files; BadGzipFile is an OSError without strerror.
        except (OSError, EOFError, zlib.error) as error:
            raise UserError(f"cannot read {path}: {getattr(error, 'strerror', None) or error}") from None


def _count_sentences(paths: Sequence[Path]) -> tuple[int, int]:
    """Number of sentences, and of lines that are left out."""
    skipped: Counter[Path] = Counter()
    total = sum(1 for _ in _sentences(paths, skipped))
    return total, skipped.total()


def _pick(sentences: Iterable[str], chosen: np.ndarray) -> Iterator[str]:
    wanted = iter(chosen.tolist())
    following = next(wanted, None)
    for number, sentence in enumerate(sentences):
        if number == following:
            yield sentence
            following = next(wanted, None)


def train_sentencepiece(captions: Iterable[str], path: str | Path, vocab_size: int, layout: str = "fairseq") -> None:
    """Train a lower-casing unigram model. Equal captions give equal bytes.

    Args:
        captions: training text, one caption an item.
        path: the model file to write.
        vocab_size: most pieces, special tokens included; fewer where the captions do not yield as many.
        layout: name of the special tokens' ids in `LAYOUTS`.

    Raises:
        UserError: no captions, or a vocabulary too small for their characters.
    """
    import sentencepiece

    model = io.BytesIO()
    watched = _Watched(captions)
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(watched),
            # A writer instead of a file name: the name would be stored in the model.
            model_writer=model,
            model_type="unigram",
            vocab_size=vocab_size,
            # The usual 0.9995 would make a rare letter such as "q" unknown.
            character_coverage=0.99999,
            hard_vocab_limit=False,
            normalization_rule_name="nmt_nfkc_cf",
            # More threads would add numbers in another order each time.
            num_threads=1,
            minloglevel=2,
            **LAYOUTS[layout],
        )
    except (RuntimeError, ValueError, OSError) as error:
        if watched.failure is not None:
            raise watched.failure from None
        reason = str(error).strip().splitlines()
        raise UserError(
            f"cannot train a tokenizer of {vocab_size} pieces: {reason[-1] if reason else 'no captions'}"
        ) from None
    with replaced_file(path) as temporary:
        temporary.write_bytes(model.getvalue())


class _Watched:
    """Captions on their way into SentencePiece, which turns an exception of theirs into one of its own."""

    def __init__(self, captions: Iterable[str]) -> None:
        self.captions = captions
        self.failure: BaseException | None = None

    def __iter__(self) -> Iterator[str]:
        try:
            yield from map(well_formed, self.captions)
        except BaseException as error:
            self.failure = error
            raise
