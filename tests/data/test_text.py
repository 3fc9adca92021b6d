"""Blocks of text: masks of an epoch, batches."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import pytest
import torch

from emkum.data.masking import IGNORE, TextMaskingConfig
from emkum.data.text import TextDataset, TextItem, collate_text
from emkum.data.token_blocks import TokenBlocks, TokenBlockWriter
from emkum.data.tokenizers import SpecialTokens
from emkum.errors import UserError

SPECIAL = SpecialTokens(bos=0, pad=1, eos=2, unk=3, mask=99)
BLOCKS = [[0, *range(10, 10 + length), 2] for length in (3, 1, 6, 20, 4)]


class Numbers:
    special = SPECIAL
    vocab_size = 100
    files: Mapping[str, Path] = {}

    def pieces(self, text: str) -> list[int]:
        return [int(word) for word in text.split()]

    def word_starts(self, ids: Sequence[int] | np.ndarray) -> np.ndarray:
        return np.ones(len(ids), dtype=bool)


def written(directory: Path, blocks: Sequence[Sequence[int]] = BLOCKS, vocab_size: int = 100) -> TokenBlocks:
    with TokenBlockWriter(directory, vocab_size) as writer:
        for block in blocks:
            writer.add(block)
    assert (writer.num_blocks, writer.num_tokens) == (len(blocks), sum(map(len, blocks)))
    return TokenBlocks(directory)


def dataset(tmp_path: Path, masking: TextMaskingConfig | None = None, seed: int = 1) -> TextDataset:
    folder = tmp_path / "train"
    return TextDataset(TokenBlocks(folder) if folder.is_dir() else written(folder), Numbers(), masking, seed)


# ----------------------------------------------------------------------------------------------------------------------
# Items and batches
# ----------------------------------------------------------------------------------------------------------------------


def test_items_without_masking(tmp_path: Path) -> None:
    data = dataset(tmp_path)
    assert len(data) == len(BLOCKS)
    item = data[np.int64(2)]
    assert (item.id, item.ids.tolist(), item.inputs, item.targets) == (2, BLOCKS[2], None, None)


def test_masks_depend_on_seed_epoch_and_index_alone(tmp_path: Path) -> None:
    masking = TextMaskingConfig(prob=0.5, random=0.3)
    data = dataset(tmp_path, masking, seed=3)
    data.set_epoch(2)
    expected = [data[index] for index in range(len(data))]
    again = dataset(tmp_path, masking, seed=3)
    np.random.seed(9)
    _ = [again[index] for index in range(len(data))]
    again.set_epoch(2)
    loader = torch.utils.data.DataLoader(
        again, batch_size=1, num_workers=2, collate_fn=list, multiprocessing_context="fork"
    )
    for order in ((again[index] for index in (4, 2, 0, 1, 3)), (item for (item,) in loader)):
        for item in order:
            wanted = expected[item.id]
            assert (item.inputs == wanted.inputs).all() and (item.targets == wanted.targets).all()
            assert (item.ids == BLOCKS[item.id]).all()


def test_masks_change_with_seed_epoch_and_index(tmp_path: Path) -> None:
    written(tmp_path / "train", [[0, *range(10, 60), 2]] * 3)
    masks = []
    for seed in (1, 2):
        data = dataset(tmp_path, TextMaskingConfig(prob=0.5), seed)
        for epoch in (1, 2, 3):
            data.set_epoch(epoch)
            masks += [tuple(data[index].targets.tolist()) for index in range(3)]
    assert len(set(masks)) == len(masks) == 18


def test_blocks_of_another_tokenizer(tmp_path: Path) -> None:
    data = TextDataset(written(tmp_path / "train", [[5], [150]], 200), Numbers())
    assert data[0].ids.tolist() == [5]
    with pytest.raises(UserError, match="holds token 150, but the tokenizer has 100 entries"):
        data[1]


def test_collate_by_hand() -> None:
    items = [
        TextItem(7, np.array([0, 11, 12, 2]), np.array([0, 99, 12, 2]), np.array([IGNORE, 11, IGNORE, IGNORE])),
        TextItem(3, np.array([0, 2]), np.array([0, 2]), np.array([IGNORE, IGNORE])),
        # The padding id among the tokens, as CLIP's can be, is no padding.
        TextItem(5, np.array([0, 1, 2]), np.array([0, 99, 2]), np.array([IGNORE, 1, IGNORE])),
    ]
    batch = collate_text(items, pad=1)
    assert batch["id"].tolist() == [7, 3, 5]
    assert batch["net_input"]["text"].tolist() == [[0, 11, 12, 2], [0, 2, 1, 1], [0, 1, 2, 1]]
    assert batch["net_input"]["padding_mask"].tolist() == [
        [False] * 4,
        [False, False, True, True],
        [False] * 3 + [True],
    ]
    assert batch["masked_text"].tolist() == [[0, 99, 12, 2], [0, 2, 1, 1], [0, 99, 2, 1]]
    none = IGNORE
    assert batch["masked_text_targets"].tolist() == [[none, 11, none, none], [none] * 4, [none, 1, none, none]]
    assert (batch["nsentences"], batch["ntokens"]) == (3, 9)
    assert all(batch[name].dtype == torch.int64 for name in ("id", "masked_text", "masked_text_targets"))


def test_collate_without_masking(tmp_path: Path) -> None:
    data = dataset(tmp_path)
    batch = collate_text([data[index] for index in range(len(data))], pad=1)
    assert batch["net_input"]["text"].shape == (5, 22)
    assert batch["net_input"]["padding_mask"].logical_not().sum(1).tolist() == [len(block) for block in BLOCKS]
    assert batch["masked_text"] is None and batch["masked_text_targets"] is None
    assert collate_text([], pad=1) == {}
