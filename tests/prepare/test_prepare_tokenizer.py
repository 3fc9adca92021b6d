"""The SentencePiece tokenizer that goes with prepared data."""

from pathlib import Path

import pytest

from emkum.data.tokenizers import load_tokenizer
from emkum.errors import UserError
from emkum.prepare.tokenizer import train_sentencepiece

CAPTIONS = [f"A {size} {color} dog runs over the grass" for size in ("big", "small") for color in ("red", "brown")] * 5


def test_special_tokens_and_lower_case(tmp_path: Path) -> None:
    train_sentencepiece(iter(CAPTIONS), tmp_path / "tokenizer.model", 60)
    tokenizer = load_tokenizer(tmp_path / "tokenizer.model")
    assert tokenizer.vocab_size <= 60
    assert tokenizer.pieces("A BIG red Dog") == tokenizer.pieces("a big red dog")
    assert min(tokenizer.pieces("a big red dog")) > 3
    assert 3 in tokenizer.pieces("日")


def test_equal_captions_give_equal_bytes(tmp_path: Path) -> None:
    for name in ("a", "b"):
        train_sentencepiece(iter(CAPTIONS), tmp_path / f"{name}.model", 60)
    assert (tmp_path / "a.model").read_bytes() == (tmp_path / "b.model").read_bytes()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.model", "b.model"]


def test_vocabulary_may_come_out_smaller(tmp_path: Path) -> None:
    train_sentencepiece(iter(CAPTIONS), tmp_path / "tokenizer.model", 10_000)
    assert load_tokenizer(tmp_path).vocab_size < 200


@pytest.mark.parametrize(("captions", "size"), [([], 60), (CAPTIONS, 5)])
def test_impossible_vocabulary(tmp_path: Path, captions: list[str], size: int, capfd) -> None:
    with pytest.raises(UserError, match=f"tokenizer of {size} pieces") as caught:
        train_sentencepiece(iter(captions), tmp_path / "tokenizer.model", size)
    assert "\n" not in str(caught.value)
    assert list(tmp_path.iterdir()) == []
