"""Task `text_pretraining`: masked blocks of text, for a text encoder that is trained by itself."""

from functools import partial
from typing import Any

from fairseq.tasks import register_task

from emkum.data.masking import IGNORE, TextMaskingConfig
from emkum.data.order import OrderConfig
from emkum.data.text import TextItem
from emkum.errors import UserError
from emkum.options import collect_parts

from ..config import flat_dataclass
from ..datasets import EpochDataset
from ..text_data import SampledText, TextDataConfig, TextDataTask, collate

TASK_PARTS = {"text_mask": TextMaskingConfig, "order": OrderConfig}

TextPretrainingConfig = flat_dataclass("TextPretrainingConfig", TASK_PARTS, base=TextDataConfig)


@register_task("text_pretraining", dataclass=TextPretrainingConfig)
class TextPretrainingTask(TextDataTask):
    """Feeds texts with some of their tokens masked, anew each epoch."""

    def __init__(self, cfg: Any, load_pretrained: bool = True) -> None:
        super().__init__(cfg, load_pretrained)
        parts = collect_parts(TASK_PARTS, cfg)
        self.masking, self.order = parts["text_mask"], parts["order"]
        self.max_tokens = 0

    def build_model(self, cfg: Any, from_checkpoint: bool = False) -> Any:
        if "text_encoder" not in cfg or "init_from" in cfg:
            raise UserError("task text_pretraining trains --arch masked_language_model alone")
        model = super().build_model(cfg, from_checkpoint)
        self.max_tokens = model.encoder.max_positions
        return model

    def load_dataset(self, split: str, combine: bool = False, **kwargs: Any) -> None:
        blocks = self.open_blocks(split, self.max_tokens)
        dataset = SampledText(blocks, self.tokenizer, self.masking, self.cfg.seed)
        gather = partial(_collate, pad=self.tokenizer.special.pad, split=split)
        self.datasets[split] = EpochDataset(dataset, gather, split == "train", self.order)
        if split == "train":
            self.record_run(blocks.content_hash())
            self.keep_tokenizer()


def _collate(items: list[TextItem], pad: int, split: str) -> dict[str, Any]:
    """A batch whose input is the masked text, with what is to be predicted and how much of it there is."""
    batch = collate(items, pad, split)
    if not batch:
        return batch
    text, targets = batch.pop("masked_text"), batch.pop("masked_text_targets")
    inputs = {"text": text, "targets": targets, "num_targets": int((targets != IGNORE).sum())}
    return batch | {"net_input": batch["net_input"] | inputs}
