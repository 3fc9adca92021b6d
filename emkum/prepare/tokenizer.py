"""A SentencePiece tokenizer trained on captions."""

import io
import os
from collections.abc import Iterable
from pathlib import Path

from emkum.errors import UserError


def train_sentencepiece(captions: Iterable[str], path: str | Path, vocab_size: int) -> None:
    """Train a lower-casing unigram model whose special tokens have the ids of a fairseq dictionary.

    <s> is 0, <pad> 1, </s> 2, <unk> 3. Equal captions give equal bytes.

    Args:
        captions: training text, one caption an item.
        path: the model file to write.
        vocab_size: most pieces, special tokens included; fewer where the captions do not yield as many.

    Raises:
        UserError: no captions, or a vocabulary too small for their characters.
    """
    import sentencepiece

    path = Path(path)
    model = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(captions),
            # A writer instead of a file name: the name would be stored in the model.
            model_writer=model,
            model_type="unigram",
            vocab_size=vocab_size,
            # The usual 0.9995 would make a rare letter such as "q" unknown.
            character_coverage=0.99999,
            hard_vocab_limit=False,
            normalization_rule_name="nmt_nfkc_cf",
            bos_id=0,
            pad_id=1,
            eos_id=2,
            unk_id=3,
            num_threads=1,
            minloglevel=2,
        )
    except (RuntimeError, ValueError, OSError) as error:
        reason = str(error).strip().splitlines()
        raise UserError(
            f"cannot train a tokenizer of {vocab_size} pieces: {reason[-1] if reason else 'no captions'}"
        ) from None
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_bytes(model.getvalue())
    os.replace(temporary, path)
