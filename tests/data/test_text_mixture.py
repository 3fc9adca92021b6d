"""Several sets of text as one."""

import hashlib
from pathlib import Path

import numpy as np
import pytest

from emkum.data.text_mixture import MixedBlocks, assert_same_tokenizer, open_blocks
from emkum.data.token_blocks import TokenBlocks, TokenBlockWriter
from emkum.data.tokenizers import load_tokenizer
from emkum.errors import UserError

SETS = {"a": [[1, 2, 3], [4, 5]], "b": [[6], [7, 8], [9]]}


@pytest.fixture
def folders(tmp_path: Path) -> list[Path]:
    for name, blocks in SETS.items():
        (tmp_path / name).mkdir()
        with TokenBlockWriter(tmp_path / name / "train", 20) as writer:
            for block in blocks:
                writer.add(block)
    return [tmp_path / name for name in SETS]


def test_sets_stand_one_behind_the_other(folders: list[Path]) -> None:
    mixed = open_blocks(folders, "train")
    blocks = SETS["a"] + SETS["b"]
    assert [mixed[i].tolist() for i in range(len(mixed))] == blocks
    assert mixed.lengths == [2, 3] and mixed.caption_lengths.tolist() == [len(block) for block in blocks]
    assert mixed[np.int64(2)].tolist() == [6]
    for index in (5, -1):
        with pytest.raises(IndexError, match=f"block {index} of 5"):
            mixed[index]
    assert mixed.directory == f"{folders[0] / 'train'}:{folders[1] / 'train'}"


def test_hash_of_the_content(folders: list[Path]) -> None:
    parts = [TokenBlocks(folder / "train") for folder in folders]
    assert MixedBlocks(parts[:1]).content_hash() == parts[0].content_hash()
    joined = "".join(part.content_hash() for part in parts).encode()
    assert MixedBlocks(parts).content_hash() == hashlib.sha256(joined).hexdigest()
    assert MixedBlocks(parts[::-1]).content_hash() != MixedBlocks(parts).content_hash()


def test_missing_splits(folders: list[Path], tmp_path: Path) -> None:
    with pytest.raises(UserError, match=f"text folder {folders[0]} has no split 'valid'; there are train"):
        open_blocks(folders, "valid")
    with pytest.raises(UserError, match="has no split 'train'; make one with `emkum prepare text`"):
        open_blocks([tmp_path / "absent"], "train")


def test_tokenizers_must_be_the_same(tmp_path: Path) -> None:
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a"]
    contents = {"one": words, "same": words, "other": [*words, "b"]}
    for name, lines in contents.items():
        (tmp_path / f"{name}-vocab.txt").write_text("\n".join(lines) + "\n")
    one, same, other = (load_tokenizer(tmp_path / f"{name}-vocab.txt") for name in contents)
    assert_same_tokenizer(one, same, "A", "B")
    with pytest.raises(UserError, match="A and B have different tokenizers"):
        assert_same_tokenizer(one, other, "A", "B")
