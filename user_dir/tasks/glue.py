"""Task `glue`: one of GLUE's tasks; scores it by its official metrics at every validation."""

import logging
import math
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from fairseq.data import FairseqDataset
from fairseq.logging import metrics
from fairseq.tasks import register_task
from omegaconf import open_dict
from torch import Tensor

from emkum.data.augment import generator, seeded
from emkum.data.glue import CLASSES_NAME, GlueDataConfig, GlueDataset, GlueItem, read_classes
from emkum.data.order import batches_by_length
from emkum.data.shards import available_splits
from emkum.data.tables import TABLE_NAME
from emkum.data.tokenizers import Tokenizer, copy_tokenizer, load_tokenizer
from emkum.data.worker_memory import hand_over
from emkum.distributed import all_gather_rows, rank
from emkum.errors import UserError
from emkum.evaluation.glue import SCORE, TASKS, glue_metrics, is_regression
from emkum.models.encoder_sources import LoadedEncoder
from emkum.options import collect_parts

from ..config import flat_dataclass
from ..models.text_classifier import complete_options
from ..prepared_data import PreparedDataConfig, PreparedDataTask

logger = logging.getLogger(__name__)

TASK_PARTS = {"glue": GlueDataConfig}

GlueConfig = flat_dataclass("GlueConfig", TASK_PARTS, base=PreparedDataConfig)


@register_task("glue", dataclass=GlueConfig)
class GlueTask(PreparedDataTask):
    """Fine-tuning of a text encoder on one of GLUE's tasks.

    Attributes:
        classes: names by label; empty where labels are scores.
        max_tokens: longest input.
        start: the encoder that the model starts from; None = the options alone say what it is.
        tokenizer: known once the model is built.
        load_pretrained: whether the model is to read weights; False where a checkpoint of all of it follows.
    """

    def __init__(self, cfg: Any, load_pretrained: bool = True) -> None:
        options = collect_parts(TASK_PARTS, cfg)["glue"]
        if options.task not in TASKS:
            raise UserError(f"--glue-task {options.task!r} is none of {', '.join(TASKS)}")
        self.name, self.max_tokens, self._tokenizer_given = options.task, options.max_tokens, options.tokenizer
        super().__init__(cfg)
        self.folder = Path(self.folders[0]) / self.name
        self.classes = read_classes(self.folder)
        if is_regression(self.name) != (not self.classes):
            raise UserError(f"{self.folder / CLASSES_NAME} does not go with {self.name}: prepare the data again")
        self.load_pretrained = load_pretrained
        self.start: LoadedEncoder | None = None
        self.tokenizer: Tokenizer | None = None
        self.scores = GlueScores(self.name)

    @classmethod
    def setup_task(cls, cfg: Any, from_checkpoint: bool = False, **kwargs: Any) -> "GlueTask":
        return cls(cfg, load_pretrained=not from_checkpoint)

    def splits_in(self, folder: str) -> list[str]:
        return available_splits(Path(folder) / self.name, TABLE_NAME)

    def build_model(self, cfg: Any, from_checkpoint: bool = False) -> Any:
        if "classifier_dropout" not in cfg:
            raise UserError("task glue trains --arch text_classifier alone")
        if self.load_pretrained:
            # The head starts from the same weights whatever encoder is made: making one draws from the generators.
            with seeded(generator(self.cfg.seed)), open_dict(cfg):
                self.start = complete_options(cfg, self._tokenizer_given)
        self.tokenizer = self._find_tokenizer()
        return super().build_model(cfg, from_checkpoint)

    def _find_tokenizer(self) -> Tokenizer:
        beside = Path(self.cfg.save_dir) / "tokenizer"
        if not self.load_pretrained and beside.is_dir():
            return load_tokenizer(beside)
        if self.start is not None and self.start.tokenizer is not None:
            return self.start.tokenizer
        if self._tokenizer_given:
            return load_tokenizer(self._tokenizer_given)
        raise UserError("task glue needs --glue-tokenizer, or an --init-from that comes with its tokenizer")

    def load_dataset(self, split: str, combine: bool = False, **kwargs: Any) -> None:
        names = self.splits_in(self.folders[0])
        if split not in names:
            raise UserError(f"{self.folder} has no split {split!r}; there are {', '.join(names)}")
        dataset = GlueDataset(self.folder / split, self.tokenizer, len(self.classes), self.max_tokens)
        training = split == "train"
        self.datasets[split] = GlueBatches(dataset, split, training)
        if training:
            self.record_run(dataset.content_hash(), encoder=None if self.start is None else self.start.identity)
            if rank() == 0:
                copy_tokenizer(self.tokenizer, Path(self.cfg.save_dir) / "tokenizer")

    def valid_step(self, sample: dict[str, Any], model: Any, criterion: Any) -> tuple:
        model.eval()
        with torch.no_grad():
            output = model(**sample["net_input"])
            # The criterion is given what the model made already.
            result = criterion(lambda **inputs: output, sample)
            columns = (sample["id"], model.predictions(output["outputs"]), sample["net_input"]["labels"])
            rows = torch.stack([column.double() for column in columns], dim=1)
        self.scores.add(sample["split"], torch.cat(all_gather_rows(rows)).cpu())
        return result

    def begin_valid_epoch(self, epoch: int, model: Any) -> None:
        self.scores.start("")

    def reduce_metrics(self, logging_outputs: list[dict[str, Any]], criterion: Any) -> None:
        super().reduce_metrics(logging_outputs, criterion)
        if not criterion.training:
            self.scores.log(metrics)


class GlueBatches(FairseqDataset):
    """A split as fairseq wants it: batches of similar length, which are drawn anew each epoch to train on.

    Args:
        dataset: the split.
        split: its name.
        training: shuffle; otherwise the shortest come first.
    """

    # fairseq may shuffle the batches once more.
    shuffles_batches = True
    can_reuse_epoch_itr_across_epochs = False

    def __init__(self, dataset: GlueDataset, split: str, training: bool) -> None:
        self.dataset = dataset
        self.split = split
        self.training = training

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> GlueItem:
        return self.dataset[index]

    def collater(self, items: list[GlueItem]) -> dict[str, Any]:
        batch = self.dataset.collate(items)
        return hand_over(batch | {"split": self.split}) if batch else {}

    def ordered_indices(self) -> np.ndarray:
        # fairseq calls this under a seed made of the run's seed and the epoch.
        return np.random.permutation(len(self)) if self.training else np.arange(len(self))

    def batch_by_size(
        self,
        indices: np.ndarray,
        max_tokens: int | None = None,
        max_sentences: int | None = None,
        required_batch_size_multiple: int = 1,
    ) -> list[np.ndarray]:
        if max_sentences is None:
            raise UserError("batches are counted in rows here: give --batch-size, not --max-tokens")
        if not self.training:
            return self.dataset.batches(max_sentences)
        # fairseq's seed is gone by now; the epoch's order seeds what follows from it.
        return batches_by_length(indices, self.dataset.lengths, max_sentences, np.random.RandomState(indices[:8]))


class GlueScores:
    """Collects the predictions on one validation set and logs the metrics over all of them.

    They are logged as derived meters, the only kind that fairseq does not write into checkpoints. Each active
    aggregator counts the batches it has seen: one that has not seen all of them gives NaN instead of the metrics of a
    part.

    Args:
        task: one of GLUE's.
    """

    _SEEN = "_glue_batches"

    def __init__(self, task: str) -> None:
        self.task = task
        self.start("")

    def start(self, split: str) -> None:
        """Forget what was collected; go on with `split`."""
        self.split = split
        # Number of a row -> prediction and label. A row that comes again counts once: a device without data of its own
        # repeats a batch.
        self.rows: dict[int, tuple[float, float]] = {}
        self.batches = self._unlogged = 0
        self._result: dict[str, float] | None = None

    def add(self, split: str, rows: Tensor) -> None:
        """Add one batch of all devices, (B, 3): number, prediction and label. Another split than before starts anew."""
        if split != self.split:
            self.start(split)
        self.rows |= {int(number): (prediction, label) for number, prediction, label in rows.tolist()}
        self.batches += 1
        self._unlogged += 1
        self._result = None

    def log(self, metrics: Any) -> None:
        """Log to all active aggregators of fairseq's `metrics` what was added since the last call."""
        if self._unlogged == 0:
            return
        metrics.log_scalar(self._SEEN, 1.0, self._unlogged)
        self._unlogged = 0
        for name in (*TASKS[self.task].metrics, SCORE):
            metrics.log_derived(name, partial(self._metric, name))

    def _metric(self, name: str, meters: Any) -> float:
        if int(meters[self._SEEN].count) != self.batches:
            return math.nan
        if self._result is None:
            predictions, labels = np.array(list(self.rows.values())).T
            self._result = glue_metrics(self.task, predictions, labels)
        return round(self._result[name], 3)
