"""Sentences, or pairs of them, with a label, as `emkum prepare glue` writes them: tokenized whole, batched by length.

Plain PyTorch: `user_dir` adapts it to fairseq. Text encoders here read one segment, so that two sentences are told
apart by what stands between them: BERT's [SEP], or fairseq's two </s>, as RoBERTa has them.
"""

import hashlib
import math
from array import array
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from emkum.data.labels import read_class_names
from emkum.data.shards import CLASSES_NAME
from emkum.data.tables import ROWS_NAME, TABLE_NAME, Table
from emkum.data.text import TextItem, collate_text
from emkum.data.tokenizers import BertTokenizer, SpecialTokens, Tokenizer
from emkum.errors import UserError

TOP_SCORE = 5.0
# Begin, one piece, what separates, one piece, end: less is no pair.
_LEAST_TOKENS = 6


@dataclass
class GlueDataConfig:
    task: str = field(default="", metadata={"help": "one of GLUE's tasks, such as CoLA or SST-2"})
    tokenizer: str = field(default="", metadata={"help": "tokenizer's file or folder; empty = that of --init-from"})
    max_tokens: int = field(
        default=128,
        metadata={"help": "longest input in tokens, special ones included; of two sentences the longer is cut first"},
    )


def read_classes(folder: str | Path) -> tuple[str, ...]:
    """Names of a task's classes by label; empty where its labels are scores.

    Args:
        folder: of the task, beside whose splits the names are.

    Raises:
        UserError: the file of names is damaged.
    """
    return tuple(read_class_names(folder)) if (Path(folder) / CLASSES_NAME).is_file() else ()


def join_sentences(
    sentences: Sequence[Sequence[int]], special: SpecialTokens, separators: int, max_tokens: int
) -> list[int]:
    """One sequence of ids out of one sentence or two.

    Args:
        sentences: one or two, without special tokens.
        special: of the tokenizer.
        separators: end tokens between two sentences.
        max_tokens: of all, special tokens included. What is too much is taken from the end of the longer sentence; of
            equally long ones the first keeps a piece more.
    """
    first, *others = sentences
    if not others:
        return [special.bos, *first[: max_tokens - 2], special.eos]
    (second,) = others
    room = max_tokens - 2 - separators
    kept = min(len(first), max(room - len(second), room - room // 2))
    return [special.bos, *first[:kept], *[special.eos] * separators, *second[: room - kept], special.eos]


@dataclass
class GlueItem(TextItem):
    """One row.

    Attributes:
        label: the class, or the score; NaN where the file has none.
    """

    label: float = math.nan


class GlueDataset(torch.utils.data.Dataset):
    """All rows of a split, tokenized; a few bytes a token in memory.

    Args:
        directory: the split.
        tokenizer: of the text encoder.
        num_classes: labels are 0 to so many less 1; 0 = scores from 0 to 5.
        max_tokens: of an input, special ones included.
        labeled: whether every row must have a label.

    Attributes:
        lengths: (n,) int64, tokens of each row.
        labels: (n,) float64, NaN where there is none.
        index: (n,) int64, the number of each row in the benchmark's own file.

    Raises:
        UserError: there is no such table, a row lacks something, or a label is none of the classes.
    """

    def __init__(
        self, directory: str | Path, tokenizer: Tokenizer, num_classes: int, max_tokens: int, labeled: bool = True
    ) -> None:
        if max_tokens < _LEAST_TOKENS:
            raise UserError(f"--glue-max-tokens {max_tokens}: two sentences need at least {_LEAST_TOKENS}")
        self.directory = Path(directory)
        self.pad = tokenizer.special.pad
        self.num_classes = num_classes
        separators = 1 if isinstance(tokenizer, BertTokenizer) else 2
        table = Table(directory)
        # Plain arrays: lists of numbers take ten times the memory, and large tasks have tens of millions of tokens.
        tokens, offsets, labels, index = array("i"), array("q", [0]), array("d"), array("q")
        for number in range(len(table)):
            row = table[number]
            try:
                texts = [row[name] for name in ("sentence1", "sentence2") if name == "sentence1" or name in row]
                label, own_number = row["label"], row["index"]
            except KeyError as error:
                raise UserError(
                    f"{self.directory}, row {number} lacks {error}: want a table of `emkum prepare glue`"
                ) from None
            pieces = [tokenizer.pieces(text) for text in texts]
            tokens.extend(join_sentences(pieces, tokenizer.special, separators, max_tokens))
            offsets.append(len(tokens))
            labels.append(self._checked(label, number, labeled))
            index.append(own_number)
        self._tokens, self._offsets = np.array(tokens, dtype=np.int32), np.array(offsets)
        self.labels, self.index = np.array(labels), np.array(index)
        self.lengths = np.diff(self._offsets)

    def _checked(self, label: Any, number: int, labeled: bool) -> float:
        """A row's label as a number."""
        if label is None:
            if labeled:
                raise UserError(f"{self.directory}, row {number} has no label: the split can be predicted, not scored")
            return math.nan
        is_number = isinstance(label, int | float) and not isinstance(label, bool)
        if self.num_classes == 0:
            if not is_number or not 0 <= label <= TOP_SCORE:
                raise UserError(f"{self.directory}, row {number}: score {label!r} is not in 0 ... {TOP_SCORE:g}")
        elif not is_number or label not in range(self.num_classes):
            raise UserError(f"{self.directory}, row {number}: label {label!r} is not in 0 ... {self.num_classes - 1}")
        return float(label)

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> GlueItem:
        start, stop = self._offsets[index : index + 2].tolist()
        return GlueItem(int(index), self._tokens[start:stop].astype(np.int64), label=float(self.labels[index]))

    def collate(self, items: Sequence[GlueItem]) -> dict[str, Any]:
        """Stack B items to a batch, padded to the longest; empty for none.

        Returns:
            id: (B,) int64. net_input: text (B, L) int64; padding_mask (B, L) bool, True at padding, None where there is
            none; labels (B,), int64 classes or float32 scores. nsentences: B. ntokens: tokens without padding.
        """
        if not items:
            return {}
        batch = collate_text(list(items), self.pad)
        kind = torch.int64 if self.num_classes else torch.float32
        # Of rows without a label the classes are -1.
        labels = np.nan_to_num([item.label for item in items], nan=-1.0)
        inputs = batch["net_input"]
        inputs["labels"] = torch.tensor(labels, dtype=kind)
        if batch["ntokens"] == inputs["text"].numel():
            inputs["padding_mask"] = None
        return {key: batch[key] for key in ("id", "net_input", "nsentences", "ntokens")}

    def batches(self, batch_size: int) -> list[np.ndarray]:
        """All rows once, the shortest first, in batches: as little padding as there can be."""
        order = np.argsort(self.lengths, kind="stable")
        return [order[start : start + batch_size] for start in range(0, len(order), batch_size)]

    def content_hash(self) -> str:
        """SHA-256 (hex) of the split's files."""
        digest = hashlib.sha256()
        for name in (ROWS_NAME, TABLE_NAME):
            with open(self.directory / name, "rb") as file:
                digest.update(hashlib.file_digest(file, "sha256").digest())
        return digest.hexdigest()
