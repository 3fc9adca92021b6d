"""Blocks of token ids: cutting, and their files."""

import pickle
import tracemalloc
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest

from emkum.data.token_blocks import OFFSETS_NAME, TOKENS_NAME, TokenBlocks, TokenBlockWriter, blocks_of
from emkum.data.tokenizers import SpecialTokens
from emkum.errors import UserError

SPECIAL = SpecialTokens(bos=0, pad=1, eos=2, unk=3, mask=99)
BLOCKS = [[0, *range(10, 10 + length), 2] for length in (3, 1, 6, 20, 4)]


def written(directory: Path, blocks: Sequence[Sequence[int]] = BLOCKS, vocab_size: int = 100) -> TokenBlocks:
    with TokenBlockWriter(directory, vocab_size) as writer:
        for block in blocks:
            writer.add(block)
    assert (writer.num_blocks, writer.num_tokens) == (len(blocks), sum(map(len, blocks)))
    return TokenBlocks(directory)


# ----------------------------------------------------------------------------------------------------------------------
# Cutting
# ----------------------------------------------------------------------------------------------------------------------


def naive_blocks(documents: list[list[int]], block_size: int) -> list[list[int]]:
    stream: list[int] = []
    for number, document in enumerate(document for document in documents if document):
        stream += [2] * (number > 0) + document
    chunks = [stream[start : start + block_size - 2] for start in range(0, len(stream), block_size - 2)]
    whole = [chunk for chunk in chunks if len(chunk) == block_size - 2]
    return [[0, *chunk, 2] for chunk in whole or chunks]


def test_blocks_by_hand() -> None:
    documents = [[10, 11, 12], [], [20], [30, 31, 32, 33]]
    assert list(blocks_of(documents, SPECIAL, 6)) == [[0, 10, 11, 12, 2, 2], [0, 20, 2, 30, 31, 2]]
    assert list(blocks_of(documents, SPECIAL, 4)) == [
        [0, 10, 11, 2],
        [0, 12, 2, 2],
        [0, 20, 2, 2],
        [0, 30, 31, 2],
        [0, 32, 33, 2],
    ]


@pytest.mark.parametrize("block_size", [3, 4, 7, 16, 100, 10_000])
def test_blocks_against_a_naive_cut(block_size: int) -> None:
    rng = np.random.default_rng(block_size)
    documents = [rng.integers(10, 99, length).tolist() for length in rng.integers(0, 60, 40)]
    found = list(blocks_of(iter(documents), SPECIAL, block_size))
    assert found == naive_blocks(documents, block_size)
    assert all(len(block) == block_size for block in found) or len(found) == 1


def test_one_document_a_block() -> None:
    documents = [[10, 11, 12], [], [20], list(range(30, 60))]
    assert list(blocks_of(documents, SPECIAL, 0, max_tokens=5)) == [
        [0, 10, 11, 12, 2],
        [0, 20, 2],
        [0, 30, 31, 32, 2],
    ]
    assert list(blocks_of([list(range(600))], SPECIAL, 0)) == [[0, *range(510), 2]]


def test_no_documents() -> None:
    for size in (0, 5):
        assert list(blocks_of([], SPECIAL, size)) == list(blocks_of([[]], SPECIAL, size)) == []


def test_blocks_come_before_the_documents_end() -> None:
    def documents():
        yield list(range(10, 14))
        raise AssertionError("the second document is not needed yet")

    assert next(blocks_of(documents(), SPECIAL, 5)) == [0, 10, 11, 12, 2]


@pytest.mark.parametrize(("block_size", "max_tokens"), [(2, 512), (-1, 512), (0, 2)])
def test_no_room_in_a_block(block_size: int, max_tokens: int) -> None:
    with pytest.raises(UserError, match="give at least 3"):
        list(blocks_of([[10]], SPECIAL, block_size, max_tokens))


# ----------------------------------------------------------------------------------------------------------------------
# Files
# ----------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("vocab_size", "dtype"), [(100, np.uint16), (65_535, np.uint16), (65_536, np.int32), (250_002, np.int32)]
)
def test_round_trip(tmp_path: Path, vocab_size: int, dtype: type) -> None:
    expected = [*BLOCKS, [vocab_size - 1]]
    blocks = written(tmp_path / "train", expected, vocab_size)
    assert sorted(path.name for path in tmp_path.rglob("*.npy")) == [OFFSETS_NAME, TOKENS_NAME]
    tokens, offsets = (np.load(tmp_path / "train" / name) for name in (TOKENS_NAME, OFFSETS_NAME))
    assert tokens.dtype == dtype and tokens.tolist() == [i for block in expected for i in block]
    assert offsets.dtype == np.int64 and offsets.tolist() == [0, *np.cumsum([len(block) for block in expected])]
    assert len(blocks) == len(expected) and [block.tolist() for block in blocks] == expected
    assert blocks[0].dtype == np.int64 and blocks[np.int64(-1)].tolist() == [vocab_size - 1]
    assert blocks.lengths.tolist() == [len(block) for block in expected]
    blocks[0][:] = 7
    assert blocks[0].tolist() == expected[0]
    for index in (len(expected), -len(expected) - 1):
        with pytest.raises(IndexError):
            blocks[index]


def test_pickles_carry_the_name_alone(tmp_path: Path) -> None:
    blocks = written(tmp_path / "train", [[5] * 1000] * 50)
    state = pickle.dumps(blocks)
    assert len(state) < 1000
    assert [block.tolist() for block in pickle.loads(state)] == [[5] * 1000] * 50


def test_hash_tells_contents_apart(tmp_path: Path) -> None:
    blocks = [[5, 6], [7, 8, 9]]
    hashes = [
        written(tmp_path / str(number), content, vocab_size).content_hash()
        for number, (content, vocab_size) in enumerate(
            [(blocks, 100), (blocks, 90), ([[5, 6], [7, 8, 8]], 100), ([[5, 6, 7], [8, 9]], 100), (blocks, 70_000)]
        )
    ]
    assert hashes[0] == hashes[1] and len(set(hashes)) == 4


def test_the_folder_appears_whole_or_not_at_all(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="stop"):
        with TokenBlockWriter(tmp_path / "train", 100) as writer:
            writer.add([1, 2])
            assert not (tmp_path / "train").exists()
            raise RuntimeError("stop")
    with pytest.raises(UserError, match="no text to write into .*train"):
        with TokenBlockWriter(tmp_path / "train", 100):
            pass
    assert list(tmp_path.iterdir()) == []
    written(tmp_path / "train")
    with pytest.raises(UserError, match="exists already"):
        written(tmp_path / "train")
    assert [path.name for path in tmp_path.iterdir()] == ["train"]


def test_memory_does_not_grow_with_the_text(tmp_path: Path) -> None:
    block = np.arange(500)
    tracemalloc.start()
    with TokenBlockWriter(tmp_path / "train", 1000) as writer:
        for _ in range(5000):
            writer.add(block)
        _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert (tmp_path / "train" / TOKENS_NAME).stat().st_size > 5_000_000
    assert peak < 500_000


@pytest.mark.parametrize("block", [[], [100], [-1], [[1, 2]]])
def test_blocks_that_are_none(tmp_path: Path, block: list) -> None:
    with pytest.raises(ValueError, match="want one dimension|for a vocabulary of 100"):
        written(tmp_path / "train", [block])
    assert list(tmp_path.iterdir()) == []


def test_damaged_files(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="text folder .*absent does not exist"):
        TokenBlocks(tmp_path / "absent")
    folder = tmp_path / "train"
    written(folder)
    whole = {name: (folder / name).read_bytes() for name in (TOKENS_NAME, OFFSETS_NAME)}
    for name, content in whole.items():
        for damaged in (content[:-2], content[:50], b"", None):
            (folder / name).unlink() if damaged is None else (folder / name).write_bytes(damaged)
            with pytest.raises(UserError, match=f"{name} .*prepare the text again") as caught:
                TokenBlocks(folder)
            assert "\n" not in str(caught.value)
        (folder / name).write_bytes(content)
    np.save(folder / TOKENS_NAME, np.zeros(44, dtype=np.float32))
    with pytest.raises(UserError, match="tokens.npy is not the file of that name"):
        TokenBlocks(folder)
    (folder / TOKENS_NAME).write_bytes(whole[TOKENS_NAME])
    np.save(folder / OFFSETS_NAME, np.array([0, 5, 3, 44]))
    with pytest.raises(UserError, match="offsets.npy is damaged at block 1"):
        TokenBlocks(folder)[1]
    np.save(folder / OFFSETS_NAME, np.array([0, 5, 43]))
    with pytest.raises(UserError, match="offsets.npy does not go with tokens.npy"):
        TokenBlocks(folder)


def test_pickled_input_is_not_loaded(tmp_path: Path) -> None:
    written(tmp_path / "train")
    np.save(tmp_path / "train" / TOKENS_NAME, np.array([{}], dtype=object), allow_pickle=True)
    with pytest.raises(UserError, match="missing or damaged"):
        TokenBlocks(tmp_path / "train")
