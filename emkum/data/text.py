"""Blocks of text for language modeling and text teachers. Plain PyTorch: `user_dir` adapts it to fairseq."""

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from emkum.data.augment import generator
from emkum.data.masking import IGNORE, TextMaskingConfig, mask_text
from emkum.data.token_blocks import TokenBlocks
from emkum.data.tokenizers import Tokenizer
from emkum.errors import UserError

# The masks derive from (seed, stream, epoch, index) alone. Not one of the streams of `emkum.data.image_text`: texts and
# image-text pairs of one run share its seed.
_MASK_STREAM = 4


@dataclass
class TextItem:
    """One block.

    Attributes:
        id: index in the split.
        ids: (L,) int64, special tokens included.
        inputs: (L,) int64, the ids with some masked; None without masking.
        targets: (L,) int64, what is to be predicted, else IGNORE; None without masking.
    """

    id: int
    ids: np.ndarray
    inputs: np.ndarray | None = None
    targets: np.ndarray | None = None


class TextDataset(torch.utils.data.Dataset):
    """Blocks of text with masks that are drawn anew each epoch.

    Args:
        blocks: one split.
        tokenizer: the one that made the blocks.
        masking: how many tokens to predict; None = no masks.
        seed: of the masks.
    """

    def __init__(
        self, blocks: TokenBlocks, tokenizer: Tokenizer, masking: TextMaskingConfig | None = None, seed: int = 1
    ) -> None:
        self.blocks = blocks
        self.tokenizer = tokenizer
        self.masking = masking
        self.seed = seed
        self.epoch = 1

    def __len__(self) -> int:
        return len(self.blocks)

    def set_epoch(self, epoch: int) -> None:
        """Choose the masks of an epoch, counted from 1."""
        self.epoch = epoch

    def __getitem__(self, index: int) -> TextItem:
        """Read one block and draw its mask.

        Raises:
            UserError: another tokenizer made it, or masks are wanted of one without a mask token.
        """
        index = int(index)
        ids = self.blocks[index]
        if ids.max() >= self.tokenizer.vocab_size:
            raise UserError(
                f"{self.blocks.directory} holds token {ids.max()}, but the tokenizer has {self.tokenizer.vocab_size} "
                "entries: give the one that the text was prepared with"
            )
        if self.masking is None:
            return TextItem(index, ids)
        rng = generator(self.seed, _MASK_STREAM, self.epoch, index)
        masked = mask_text(ids, self.tokenizer, self.masking, rng)
        return TextItem(index, ids, masked.inputs, masked.targets)


def collate_text(items: list[TextItem], pad: int) -> dict[str, Any]:
    """Stack items to a batch of B texts, padded to the longest.

    Args:
        items: what the dataset returned.
        pad: id at padding.

    Returns:
        id: (B,) int64. net_input: text (B, L) int64; padding_mask (B, L) bool, True at padding. masked_text,
        masked_text_targets: (B, L) int64 or None, with IGNORE where nothing is to be predicted. nsentences: B.
        ntokens: tokens without padding. Empty for no items.
    """
    if not items:
        return {}
    lengths = np.array([len(item.ids) for item in items])
    padding = np.arange(lengths.max()) >= lengths[:, None]
    masked = items[0].inputs is not None
    return {
        "id": torch.tensor([item.id for item in items]),
        "net_input": {
            "text": _padded([item.ids for item in items], padding, pad),
            "padding_mask": torch.from_numpy(padding),
        },
        "masked_text": _padded([item.inputs for item in items], padding, pad) if masked else None,
        "masked_text_targets": _padded([item.targets for item in items], padding, IGNORE) if masked else None,
        "nsentences": len(items),
        "ntokens": int(lengths.sum()),
    }


def _padded(rows: list[np.ndarray], padding: np.ndarray, value: int) -> Tensor:
    """(B, L) int64: the rows, with `value` where `padding` (B, L) is True."""
    table = np.full(padding.shape, value, dtype=np.int64)
    table[~padding] = np.concatenate(rows)
    return torch.from_numpy(table)
