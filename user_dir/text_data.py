"""What tasks on blocks of text share."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Optional

from emkum.data.shards import available_splits
from emkum.data.text import TextDataset, TextItem, collate_text
from emkum.data.text_mixture import MixedBlocks, assert_same_tokenizer, open_blocks
from emkum.data.token_blocks import TOKENS_NAME
from emkum.data.tokenizers import copy_tokenizer, load_tokenizer
from emkum.distributed import rank
from emkum.errors import UserError

from .prepared_data import PreparedDataConfig, PreparedDataTask


@dataclass
class TextDataConfig(PreparedDataConfig):
    text_tokenizer: Optional[str] = field(
        default=None,
        metadata={
            "help": "tokenizer that the text was prepared with, file or folder; empty = the one in the data folder"
        },
    )


class TextDataTask(PreparedDataTask):
    """A task on folders of `emkum prepare text`.

    Attributes:
        tokenizer: of the text.
        load_pretrained: whether the model is to read weights; False where a checkpoint of all of it follows.
    """

    def __init__(self, cfg: Any, load_pretrained: bool = True) -> None:
        super().__init__(cfg)
        self.tokenizer = load_tokenizer(cfg.text_tokenizer or self.folders[0])
        for folder in [] if cfg.text_tokenizer else self.folders[1:]:
            assert_same_tokenizer(self.tokenizer, load_tokenizer(folder), self.folders[0], folder)
        self.load_pretrained = load_pretrained

    @classmethod
    def setup_task(cls, cfg: Any, from_checkpoint: bool = False, **kwargs: Any) -> "TextDataTask":
        return cls(cfg, load_pretrained=not from_checkpoint)

    def splits_in(self, folder: str) -> list[str]:
        return available_splits(folder, TOKENS_NAME)

    def open_blocks(self, split: str, max_tokens: int) -> MixedBlocks:
        """A split: for training that of all folders, for validation the first folder's.

        Raises:
            UserError: it is missing, or has blocks of more than `max_tokens` tokens.
        """
        blocks = open_blocks(self.folders if split == "train" else self.folders[:1], split)
        longest = int(blocks.caption_lengths.max())
        if longest > max_tokens:
            raise UserError(
                f"{blocks.directory} has blocks of {longest} tokens, but the model reads {max_tokens} at most: prepare "
                "the text with a smaller --block-size"
            )
        return blocks

    def keep_tokenizer(self) -> None:
        """Copy the tokenizer beside the checkpoints, so that they can be used without the data."""
        if rank() == 0:
            copy_tokenizer(self.tokenizer, Path(self.cfg.save_dir) / "tokenizer")


class SampledText(TextDataset):
    """TextDataset under the name that EpochDataset asks for."""

    @property
    def samples(self) -> MixedBlocks:
        return self.blocks


def collate(items: list[TextItem], pad: int, split: str) -> dict[str, Any]:
    """`collate_text` with the name of the split, and without a padding mask where nothing is padded."""
    batch = collate_text(items, pad)
    if not batch:
        return batch
    if batch["ntokens"] == batch["net_input"]["text"].numel():
        batch["net_input"]["padding_mask"] = None
    return batch | {"split": split}
