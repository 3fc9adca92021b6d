"""Captions to token ids: SentencePiece, BERT's WordPiece, and the byte-level BPE of GPT-2 and of CLIP.

What a text says never makes a special token: "<mask>" or "[SEP]" in a caption is cut into pieces like any other text.
A tokenizer may be forked into data loader workers and pickled, which carries the names of its files alone.
"""

import gzip
import html
import json
import shutil
import zlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from emkum.errors import UserError
from emkum.files import replaced_file

# fairseq's dictionary begins with <s>, <pad>, </s>, <unk>.
BOS, PAD, EOS, UNK = 0, 1, 2, 3

# Words of captions repeat: their ids are remembered, unless they are of a length that only junk has.
_REMEMBERED_WORDS = 1 << 15
_LONGEST_REMEMBERED = 40

_FORMS = (
    "a SentencePiece file (*.model, *.spm), a BERT vocabulary (*vocab.txt), CLIP's bpe_simple_vocab_16e6.txt.gz, or a "
    "folder with one of these, with encoder.json, vocab.bpe and dict.txt (GPT-2 over fairseq's dictionary) or with "
    "vocab.json and merges.txt (CLIP)"
)


@dataclass(frozen=True)
class SpecialTokens:
    """Ids of the begin, padding, end, unknown and mask tokens; None where the vocabulary has none.

    CLIP pads with 0, which is the piece "!" too: tell padding by lengths, not by ids, where CLIP's tokenizer may be in
    use.
    """

    bos: int
    pad: int
    eos: int
    unk: int | None
    mask: int | None

    @property
    def ids(self) -> tuple[int, ...]:
        """All of them, ascending."""
        return tuple(sorted({i for i in (self.bos, self.pad, self.eos, self.unk, self.mask) if i is not None}))


class Tokenizer(Protocol):
    """Text to ids.

    Attributes:
        special: ids of the special tokens.
        vocab_size: number of ids, special tokens included.
        files: what `load_tokenizer` needs to make it again; the name it looks for in a folder -> the file.
    """

    special: SpecialTokens
    vocab_size: int
    files: Mapping[str, Path]

    def pieces(self, text: str) -> list[int]:
        """Ids without begin and end tokens."""
        ...

    def texts(self, ids: Sequence[int]) -> list[str]:
        """What each of the ids that `pieces` gave reads, for people; what goes on within a word begins with "##"."""
        ...

    def word_starts(self, ids: Sequence[int] | np.ndarray) -> np.ndarray:
        """(L,) bool, True where a piece begins a new word.

        Args:
            ids: (L,) pieces; the first begins a word always. Special tokens may be among them: what it says of those
                means nothing.
        """
        ...


def encode(tokenizer: Tokenizer, text: str, max_tokens: int) -> list[int]:
    """Begin token, pieces, end token; cut to `max_tokens` so that the end token stays.

    Raises:
        UserError: not even the special tokens fit.
    """
    if max_tokens < 2:
        raise UserError(f"captions of {max_tokens} tokens have no room for begin and end; give at least 2")
    special = tokenizer.special
    return [special.bos, *tokenizer.pieces(text)[: max_tokens - 2], special.eos]


class _FromFiles:
    """What all kinds share: `source`, absolute, is what one is made from, and all that is pickled."""

    source: Path
    _starts: np.ndarray

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.source,)

    def word_starts(self, ids: Sequence[int] | np.ndarray) -> np.ndarray:
        starts = self._starts[np.asarray(ids, dtype=np.int64)]
        starts[:1] = True
        return starts

    def texts(self, ids: Sequence[int]) -> list[str]:
        return [
            self._text(i) if start else f"##{self._text(i)}"
            for i, start in zip(ids, self.word_starts(ids), strict=True)
        ]

    def _text(self, piece: int) -> str:
        raise NotImplementedError


class SentencePieceTokenizer(_FromFiles):
    """A SentencePiece model.

    A model with fairseq's ids (<s> 0, <pad> 1, </s> 2, <unk> 3) is used as it is; it has a mask token where it has a
    piece <mask>. A model of n pieces with SentencePiece's own ids (<unk> 0, <s> 1, </s> 2, no <pad>) gets the layout of
    XLM-R and BEiT-3: <s> 0, <pad> 1, </s> 2, <unk> 3, each further piece one up, <mask> at n + 1.

    Raises:
        UserError: no SentencePiece model, or one with other ids.
    """

    _OWN_IDS = (1, -1, 2, 0)

    def __init__(self, path: Path) -> None:
        import sentencepiece

        self.source = Path(path).absolute()
        self.files = {"tokenizer.model": self.source}
        try:
            processor = sentencepiece.SentencePieceProcessor(model_file=str(path))
        except (OSError, RuntimeError) as error:
            raise UserError(f"{path} is not a SentencePiece model: {str(error).splitlines()[0]}") from None
        size = processor.vocab_size()
        ids = (processor.bos_id(), processor.pad_id(), processor.eos_id(), processor.unk_id())
        if ids == (BOS, PAD, EOS, UNK):
            mask, self._shift, self.vocab_size = processor.piece_to_id("<mask>"), 0, size
            mask = None if mask == UNK else mask
        elif ids == self._OWN_IDS:
            mask, self._shift, self.vocab_size = size + 1, 1, size + 2
        else:
            raise UserError(
                f"{path}: ids of <s>, <pad>, </s>, <unk> are {ids}; supported are {(BOS, PAD, EOS, UNK)} (fairseq's) "
                f"and {self._OWN_IDS} (SentencePiece's own)"
            )
        self.processor = processor
        self.special = SpecialTokens(BOS, PAD, EOS, UNK, mask)
        self._starts = np.zeros(self.vocab_size, dtype=bool)
        self._starts[self._shift : self._shift + size] = [processor.id_to_piece(i)[0] == "▁" for i in range(size)]

    def pieces(self, text: str) -> list[int]:
        pieces = self.processor.encode(well_formed(text))
        # Of the first three ids of a model with SentencePiece's own, text makes <unk> alone.
        return [piece + 1 if piece > 0 else UNK for piece in pieces] if self._shift else pieces

    def _text(self, piece: int) -> str:
        if piece == UNK:
            return "<unk>"
        text = self.processor.id_to_piece(piece - self._shift)
        return text.removeprefix("▁") or text


class BertTokenizer(_FromFiles):
    """BERT's WordPiece, from its `vocab.txt` with one piece a line.

    Text is lower-cased and loses its accents unless the vocabulary holds pieces with upper-case letters.

    Raises:
        UserError: no such vocabulary.
    """

    def __init__(self, path: Path) -> None:
        from tokenizers import Tokenizer as Backend
        from tokenizers import models, normalizers, pre_tokenizers

        self.source = Path(path).absolute()
        self.files = {"vocab.txt": self.source}
        pieces = _read_text(self.source).removesuffix("\n").split("\n")
        rows = {piece: row for row, piece in enumerate(pieces)}
        missing = [name for name in ("[CLS]", "[PAD]", "[SEP]", "[UNK]", "[MASK]") if name not in rows]
        if missing:
            raise UserError(f"{path} is no BERT vocabulary: it lacks {', '.join(missing)}")
        self.special = SpecialTokens(*(rows[name] for name in ("[CLS]", "[PAD]", "[SEP]", "[UNK]", "[MASK]")))
        self.vocab_size = len(pieces)
        self.cased = any(piece != piece.lower() and not piece.startswith("[") for piece in pieces)
        backend = Backend(models.WordPiece(rows, unk_token="[UNK]"))
        backend.normalizer = normalizers.BertNormalizer(lowercase=not self.cased)
        backend.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
        self._ids_of = _remembering(lambda word: backend.encode(word).ids)
        self._starts = np.array([not piece.startswith("##") for piece in pieces])
        self._names = pieces

    def pieces(self, text: str) -> list[int]:
        # BERT itself splits at spaces among others, and nothing in it looks across one.
        return self._ids_of(text.split(" "))

    def _text(self, piece: int) -> str:
        return self._names[piece].removeprefix("##")


class Gpt2Tokenizer(_FromFiles):
    """GPT-2's byte-level BPE over fairseq's dictionary, as RoBERTa and the released Data2Vec 2 text model use it.

    The mask token is the dictionary's last row. A word begins at a space, as in fairseq's whole-word masking.

    Args:
        directory: holds `encoder.json`, `vocab.bpe` and fairseq's `dict.txt`.

    Raises:
        UserError: a file is missing or malformed.
    """

    FILES = ("encoder.json", "vocab.bpe", "dict.txt")
    # Radford et al. 2019, their encoder: contractions, letters, digits, other characters, white space.
    _WORDS = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"

    def __init__(self, directory: Path) -> None:
        import regex

        self.source = Path(directory).absolute()
        self.files = {name: self.source / name for name in self.FILES}
        encoder, merges, dictionary = self.files.values()
        vocabulary = _read_vocabulary(encoder)
        rows = _read_dictionary(dictionary)
        self.vocab_size = len(rows)
        self.special = SpecialTokens(BOS, PAD, EOS, UNK, rows["<mask>"])
        row_of = {number: rows.get(str(number), UNK) for number in vocabulary.values()}
        bpe = _byte_level_bpe(vocabulary, _read_merges(merges), "", merges)
        self._split = regex.compile(self._WORDS).findall
        self._ids_of = _remembering(lambda word: [row_of[number] for number in bpe(word)])
        self._starts = np.zeros(self.vocab_size, dtype=bool)
        self._starts[[row_of[number] for piece, number in vocabulary.items() if piece.startswith("Ġ")]] = True
        self._starts[UNK] = False
        self._names = {row_of[number]: piece for piece, number in vocabulary.items()} | {UNK: "<unk>"}

    def pieces(self, text: str) -> list[int]:
        return self._ids_of(self._split(text))

    def _text(self, piece: int) -> str:
        return _from_bytes(self._names[piece])


class ClipTokenizer(_FromFiles):
    """CLIP's lower-casing byte-level BPE (Radford et al. 2021), padded with 0.

    Args:
        source: OpenAI's `bpe_simple_vocab_16e6.txt.gz`, or a folder with Hugging Face's `vocab.json` and `merges.txt`.

    Raises:
        UserError: a file is missing or malformed.
    """

    ARCHIVE = "bpe_simple_vocab_16e6.txt.gz"
    FILES = ("vocab.json", "merges.txt")
    _WORDS = r"'s|'t|'re|'ve|'m|'ll|'d|\p{L}+|\p{N}|[^\s\p{L}\p{N}]+"
    # The archive holds more merges than CLIP's 49,408 entries take: those of 256 bytes, each with and without the end
    # of a word, and two special tokens.
    _MERGES = 49_408 - 2 * 256 - 2

    def __init__(self, source: Path) -> None:
        import ftfy
        import regex

        self.source = Path(source).absolute()
        if self.source.is_dir():
            self.files = {name: self.source / name for name in self.FILES}
            vocabulary = _read_vocabulary(self.source / "vocab.json")
            merges = _read_merges(self.source / "merges.txt")
            names = ("<|startoftext|>", "<|endoftext|>")
            if any(name not in vocabulary for name in names):
                raise UserError(f"{self.source / 'vocab.json'} is not CLIP's: it lacks {' or '.join(names)}")
        else:
            self.files = {self.ARCHIVE: self.source}
            merges = _read_merges(self.source, self._MERGES)
            names = ("<start_of_text>", "<end_of_text>")
            alphabet = _byte_alphabet()
            entries = [*alphabet, *(byte + "</w>" for byte in alphabet), *map("".join, merges), *names]
            vocabulary = {piece: row for row, piece in enumerate(entries)}
        self.vocab_size = len(vocabulary)
        self.special = SpecialTokens(bos=vocabulary[names[0]], pad=0, eos=vocabulary[names[1]], unk=None, mask=None)
        self._fix = ftfy.fix_text
        self._split = regex.compile(self._WORDS, regex.IGNORECASE).findall
        self._ids_of = _remembering(_byte_level_bpe(vocabulary, merges, "</w>", self.source))
        self._ends = np.zeros(self.vocab_size, dtype=bool)
        self._ends[[row for piece, row in vocabulary.items() if piece.endswith("</w>")]] = True
        self._names = {row: piece for piece, row in vocabulary.items()}

    def pieces(self, text: str) -> list[int]:
        return self._ids_of(self._split(self._clean(text)))

    def word_starts(self, ids: Sequence[int] | np.ndarray) -> np.ndarray:
        starts = np.roll(self._ends[np.asarray(ids, dtype=np.int64)], 1)
        starts[:1] = True
        return starts

    def _text(self, piece: int) -> str:
        return _from_bytes(self._names[piece].removesuffix("</w>"))

    def _clean(self, text: str) -> str:
        # Most captions are plain enough that the mending, which takes longer than all the rest, changes nothing.
        if not (text.isascii() and text.isprintable() and "&" not in text):
            text = html.unescape(html.unescape(self._fix(text)))
        return text.lower()


def _remembering(ids_of_word: Callable[[str], list[int]]) -> Callable[[Iterable[str]], list[int]]:
    """From a function that gives a word's ids to one that gives those of many words, and remembers short ones."""

    def ids_of(word: str) -> list[int]:
        return ids_of_word(well_formed(word))

    remembered = lru_cache(maxsize=_REMEMBERED_WORDS)(ids_of)

    def ids_of_all(words: Iterable[str]) -> list[int]:
        return [i for word in words for i in (remembered(word) if len(word) <= _LONGEST_REMEMBERED else ids_of(word))]

    return ids_of_all


def _byte_level_bpe(
    vocabulary: dict[str, int], merges: list[tuple[str, str]], end_of_word: str, path: Path
) -> Callable[[str], list[int]]:
    """A function that gives a word's ids; `path` is named in errors."""
    from tokenizers import Tokenizer as Backend
    from tokenizers import models, pre_tokenizers

    try:
        bpe = models.BPE(vocab=vocabulary, merges=merges, end_of_word_suffix=end_of_word)
    # The library raises plain exceptions where a merge's result is no piece of the vocabulary.
    except Exception as error:
        raise UserError(f"{path} does not go with its vocabulary: {str(error).splitlines()[0]}") from None
    backend = Backend(bpe)
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    return lambda word: backend.encode(word).ids


def _byte_alphabet() -> list[str]:
    """The 256 characters that stand for bytes in byte-level BPE, in the order of CLIP's vocabulary."""
    from tokenizers import pre_tokenizers

    return sorted(pre_tokenizers.ByteLevel.alphabet())


def _from_bytes(piece: str) -> str:
    """What a piece of byte-level BPE reads; bytes that make no whole character become U+FFFD."""
    from tokenizers import decoders

    text = decoders.ByteLevel().decode([piece])
    return text.strip() or text


def well_formed(text: str) -> str:
    """Lone surrogates, which broken escapes in JSON leave, become question marks."""
    return text.encode("utf-8", errors="replace").decode("utf-8")


# ----------------------------------------------------------------------------------------------------------------------
# Files
# ----------------------------------------------------------------------------------------------------------------------


def _read_text(path: Path) -> str:
    try:
        with (gzip.open if path.suffix == ".gz" else open)(path, "rt", encoding="utf-8") as file:
            return file.read()
    # BadGzipFile is an OSError without strerror.
    except (OSError, EOFError, zlib.error) as error:
        raise UserError(f"cannot read {path}: {getattr(error, 'strerror', None) or error}") from None
    except UnicodeDecodeError:
        raise UserError(f"{path} is not UTF-8 text") from None


def _read_vocabulary(path: Path) -> dict[str, int]:
    try:
        vocabulary = json.loads(_read_text(path))
    except ValueError:
        raise UserError(f"{path} is not JSON") from None
    if not isinstance(vocabulary, dict) or sorted(map(str, vocabulary.values())) != sorted(
        map(str, range(len(vocabulary)))
    ):
        raise UserError(f"{path} does not give each piece its number, from 0 without gaps")
    return vocabulary


def _read_merges(path: Path, most: int | None = None) -> list[tuple[str, str]]:
    """The first `most` pairs of pieces, one a line, of a file whose first line is its version; None = all."""
    lines = _read_text(path).removesuffix("\n").split("\n")[1:]
    merges = [tuple(line.split()) for line in lines[:most]]
    for number, merge in enumerate(merges, start=2):
        if len(merge) != 2:
            raise UserError(f"{path} holds no merges of byte-level BPE: line {number} is not two pieces and a space")
    return merges


def _read_dictionary(path: Path) -> dict[str, int]:
    """fairseq's `dict.txt`, "PIECE COUNT" a line: rows with the special tokens before them and <mask> after them."""
    rows = {"<s>": BOS, "<pad>": PAD, "</s>": EOS, "<unk>": UNK}
    for number, line in enumerate(_read_text(path).removesuffix("\n").split("\n"), start=1):
        piece, _, count = line.rstrip().rpartition(" ")
        if not piece or not count.isdigit() or piece in rows:
            raise UserError(f"{path}, line {number}: want a piece that is not listed before it, a space and its count")
        rows[piece] = len(rows)
    # The masked language models of this family were trained with one more row.
    rows.setdefault("<mask>", len(rows))
    return rows


def load_tokenizer(path: str | Path) -> Tokenizer:
    """Load a tokenizer from a file or folder, whose kind its names tell.

    In a folder, `tokenizer.model` goes first, then GPT-2's three files, then the other kinds.

    Raises:
        UserError: nothing usable is there; the message names all that is.
    """
    make, source = _find(Path(path))
    return make(source)


def _find(path: Path) -> tuple[type, Path]:
    """The class of the tokenizer that is there, and what it is made from."""
    if path.is_file():
        for suffixes, kind in (
            ((".model", ".spm"), SentencePieceTokenizer),
            (("vocab.txt",), BertTokenizer),
            ((".txt.gz",), ClipTokenizer),
        ):
            if path.name.endswith(suffixes):
                return kind, path
    elif path.is_dir():
        found = _find_in_folder(path)
        if found is not None:
            return found
    raise UserError(f"no tokenizer at {path}: give {_FORMS}")


def _find_in_folder(folder: Path) -> tuple[type, Path] | None:
    def holds(names: Iterable[str]) -> bool:
        return all((folder / name).is_file() for name in names)

    if holds(["tokenizer.model"]):
        return SentencePieceTokenizer, folder / "tokenizer.model"
    if holds(Gpt2Tokenizer.FILES):
        return Gpt2Tokenizer, folder
    for kind, patterns in ((SentencePieceTokenizer, ("*.model", "*.spm")), (BertTokenizer, ("*vocab.txt",))):
        files = sorted(file for pattern in patterns for file in folder.glob(pattern) if file.is_file())
        if len(files) > 1:
            raise UserError(f"{folder} holds several tokenizers: give one of {', '.join(file.name for file in files)}")
        if files:
            return kind, files[0]
    if holds([ClipTokenizer.ARCHIVE]):
        return ClipTokenizer, folder / ClipTokenizer.ARCHIVE
    return (ClipTokenizer, folder) if holds(ClipTokenizer.FILES) else None


def copy_tokenizer(tokenizer: Tokenizer, directory: str | Path) -> None:
    """Copy a tokenizer's files into `directory` so that a checkpoint can be used without the training data.

    Raises:
        UserError: the folder holds a tokenizer of another kind, which `load_tokenizer` would take.
    """
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    for name, source in tokenizer.files.items():
        if (directory / name).resolve() != source.resolve():
            with replaced_file(directory / name) as temporary:
                shutil.copyfile(source, temporary)
    kind, source = _find(directory)
    if kind is not type(tokenizer):
        raise UserError(f"{directory} holds another tokenizer ({source.name}): remove it")
