"""Captions to token ids. Every tokenizer follows fairseq's dictionary: <s> 0, <pad> 1, </s> 2, <unk> 3."""

import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

from emkum.errors import UserError

BOS, PAD, EOS, UNK = 0, 1, 2, 3


class Tokenizer(Protocol):
    """`vocab_size` counts the special tokens; `files` are what `load_tokenizer` needs to make it again."""

    vocab_size: int
    files: Sequence[Path]

    def pieces(self, text: str) -> list[int]:
        """Ids without special tokens."""
        ...


def encode(tokenizer: Tokenizer, text: str, max_tokens: int) -> list[int]:
    """<s> pieces </s>, cut to `max_tokens` so that the end token stays.

    Raises:
        UserError: not even the special tokens fit.
    """
    if max_tokens < 2:
        raise UserError(f"captions of {max_tokens} tokens have no room for <s> and </s>; give at least 2")
    return [BOS, *tokenizer.pieces(text)[: max_tokens - 2], EOS]


class SentencePieceTokenizer:
    """A SentencePiece model whose special tokens have fairseq's ids."""

    def __init__(self, path: Path) -> None:
        import sentencepiece

        try:
            self.processor = sentencepiece.SentencePieceProcessor(model_file=str(path))
        except (OSError, RuntimeError) as error:
            raise UserError(f"{path} is not a SentencePiece model: {str(error).splitlines()[0]}") from None
        ids = (self.processor.bos_id(), self.processor.pad_id(), self.processor.eos_id(), self.processor.unk_id())
        if ids != (BOS, PAD, EOS, UNK):
            raise UserError(f"{path}: ids of <s>, <pad>, </s>, <unk> are {ids}, want {(BOS, PAD, EOS, UNK)}")
        self.vocab_size = self.processor.vocab_size()
        self.files = (Path(path),)

    def pieces(self, text: str) -> list[int]:
        return self.processor.encode(text)


class Gpt2Tokenizer:
    """GPT-2's byte-level BPE over fairseq's dictionary, as RoBERTa and the released Data2Vec 2 text model use it.

    Args:
        directory: holds `encoder.json`, `vocab.bpe` and fairseq's `dict.txt`.
    """

    FILES = ("encoder.json", "vocab.bpe", "dict.txt")

    def __init__(self, directory: Path) -> None:
        from fairseq.data import Dictionary
        from fairseq.data.encoders.gpt2_bpe_utils import get_encoder

        self.files = tuple(Path(directory) / name for name in self.FILES)
        encoder_json, vocab_bpe, dictionary = map(str, self.files)
        self.bpe = get_encoder(encoder_json, vocab_bpe)
        self.dictionary = Dictionary.load(dictionary)
        # The masked language models of this family were trained with one more row, <mask>, at the end.
        self.dictionary.add_symbol("<mask>")
        self.vocab_size = len(self.dictionary)

    def pieces(self, text: str) -> list[int]:
        return [self.dictionary.index(str(piece)) for piece in self.bpe.encode(text)]


def load_tokenizer(path: str | Path) -> Tokenizer:
    """Load a tokenizer from a SentencePiece file, or from a folder that holds one or GPT-2's three files.

    Raises:
        UserError: nothing usable is there.
    """
    path = Path(path)
    if path.is_file():
        return SentencePieceTokenizer(path)
    if (path / "tokenizer.model").is_file():
        return SentencePieceTokenizer(path / "tokenizer.model")
    if all((path / name).is_file() for name in Gpt2Tokenizer.FILES):
        return Gpt2Tokenizer(path)
    raise UserError(
        f"no tokenizer at {path}: give a SentencePiece file, or a folder with tokenizer.model or with "
        f"{', '.join(Gpt2Tokenizer.FILES)}"
    )


def copy_tokenizer(tokenizer: Tokenizer, directory: str | Path) -> None:
    """Copy a tokenizer's files into `directory` so that a checkpoint can be used without the training data."""
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    for source in tokenizer.files:
        name = "tokenizer.model" if isinstance(tokenizer, SentencePieceTokenizer) else source.name
        target = directory / name
        if target.resolve() != source.resolve():
            temporary = target.with_suffix(target.suffix + ".tmp")
            shutil.copyfile(source, temporary)
            temporary.replace(target)
