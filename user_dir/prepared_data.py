"""What all tasks on prepared data share."""

import json
import logging
import os
from argparse import Namespace
from collections import deque
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fairseq.dataclass import FairseqDataclass
from fairseq.logging import metrics
from fairseq.tasks import FairseqTask
from omegaconf import II, OmegaConf, open_dict

from emkum.data.mixture import MixedSamples, open_mixture
from emkum.data.shards import available_splits
from emkum.distributed import rank
from emkum.errors import UserError
from emkum.provenance import differing_keys, package_versions, write_json
from emkum.teachers.base import Teacher

logger = logging.getLogger(__name__)


@dataclass
class PreparedDataConfig(FairseqDataclass):
    data: str = field(
        default="",
        metadata={"help": "folder that `emkum prepare` wrote, or several as A:B to train on all; A is validated on"},
    )
    max_nonfinite: int = field(
        default=10,
        metadata={"help": "end the run after so many updates in a row whose gradients are not finite; each is skipped"},
    )
    seed: int = II("common.seed")
    save_dir: str = II("checkpoint.save_dir")


class PreparedDataTask(FairseqTask):
    """A task on a folder of `emkum prepare`: early checks, fresh batches each epoch, a record of the run.

    Attributes:
        teacher: frozen, outside every module that is wrapped or saved; None without one.
    """

    teacher: Teacher | None = None

    def __init__(self, cfg: Any) -> None:
        refuse_half_precision_on_cpu(cfg)
        super().__init__(cfg)
        with open_dict(cfg):
            # Read by fairseq's iterator factory. New batches and new workers each epoch: kept workers would go on
            # drawing the first epoch's crops.
            cfg.rebuild_batches, cfg.reuse_dataloader, cfg.persistent_workers = True, False, False
        # Split and ids of the latest batches, as many as an update has; updates skipped so far, in all and in a row.
        self._batches: deque[tuple[str, Any]] = deque(maxlen=_batches_an_update(cfg))
        self._skipped = self._skipped_in_a_row = 0
        self.folders = [folder for folder in (cfg.data or "").split(os.pathsep) if folder]
        for folder in self.folders or ["(no folder)"]:
            if not self.splits_in(folder):
                raise UserError(f"{folder} holds no prepared split; make one with `emkum prepare`")

    def splits_in(self, folder: str) -> list[str]:
        """Names of the splits of this task's kind in a folder of prepared data."""
        return available_splits(folder)

    def open_samples(self, split: str, require_captions: bool = True, fraction: float = 1.0) -> MixedSamples:
        """A split: for training a fraction of that of all folders, for validation the first folder's."""
        if split != "train":
            return open_mixture(self.folders[:1], split, require_captions)
        return open_mixture(self.folders, split, require_captions, fraction, self.cfg.seed)

    def get_batch_iterator(self, dataset: Any, *arguments: Any, **options: Any) -> Any:
        # Without worker processes, a thread of fairseq's would read ahead: augmentation there and mixing, dropout and
        # stochastic depth here would draw from the same generators.
        if options.get("num_workers", 0) == 0:
            options["data_buffer_size"] = 0
        iterator = super().get_batch_iterator(dataset, *arguments, **options)
        iterator.disable_shuffling = not dataset.shuffles_batches
        return iterator

    def train_step(self, sample: dict[str, Any], *arguments: Any, **options: Any) -> tuple:
        self._batches.append((sample["split"], sample["id"]))
        return super().train_step(sample, *arguments, **options)

    def optimizer_step(self, optimizer: Any, model: Any, update_num: int) -> None:
        super().optimizer_step(optimizer, model, update_num)
        batches = list(self._batches)
        self._batches.clear()
        # In half precision fairseq's own optimizer stands around the one that steps.
        if not getattr(getattr(optimizer, "fp32_optimizer", optimizer), "is_skipping", False):
            self._skipped_in_a_row = 0
            return
        self._skipped += 1
        self._skipped_in_a_row += 1
        path = self._note_skipped(batches, update_num)
        metrics.log_scalar("skipped_updates", self._skipped, weight=0, round=0)
        if self._skipped_in_a_row >= self.cfg.max_nonfinite:
            raise UserError(
                f"gradients were not finite in {self._skipped_in_a_row} updates in a row (--max-nonfinite); their "
                f"samples are in {path}, and the last checkpoint in {self.cfg.save_dir} is from before"
            )

    def _note_skipped(self, batches: list[tuple[str, Any]], update_num: int) -> Path:
        """Write down which samples an update had whose gradients are not finite."""
        path = Path(self.cfg.save_dir) / (f"nonfinite.rank{rank()}.jsonl" if rank() else "nonfinite.jsonl")
        entry = {"update": update_num, "batches": [{"split": split, "ids": ids.tolist()} for split, ids in batches]}
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(entry) + "\n")
        logger.warning("update %d is skipped: its gradients are not finite; its samples are in %s", update_num, path)
        return path

    @property
    def _teacher_identity(self) -> dict[str, Any] | None:
        return None if self.teacher is None else self.teacher.identity

    def state_dict(self) -> dict[str, Any]:
        """What checkpoints keep of the task: which teacher it was."""
        identity = self._teacher_identity
        return super().state_dict() | ({} if identity is None else {"teacher": identity})

    def _assert_same_teacher(self) -> None:
        """A run that goes on from its checkpoint goes on with its teacher."""
        folder, identity = Path(self.cfg.save_dir), self._teacher_identity
        if not (folder / "checkpoint_last.pt").is_file() or not (folder / "run.json").is_file():
            return
        before = json.loads((folder / "run.json").read_text(encoding="utf-8")).get("teacher")
        if before != identity:
            differing = differing_keys(before or {}, identity or {})
            raise UserError(
                f"{folder} was begun with another teacher (it differs in {', '.join(differing)}); choose another "
                "--save-dir, and --restore-file to start from its checkpoint"
            )

    def record_run(self, train_hash: str, **more: Any) -> None:
        """Leave beside the checkpoints what the run was made with: options, versions, data, identity of the teacher.

        Args:
            train_hash: content hash of the training split.
            more: further entries of the record.

        Raises:
            UserError: the run was begun with another teacher.
        """
        self._assert_same_teacher()
        if rank() != 0:
            return
        record = {
            "options": _plain(OmegaConf.to_container(self.cfg._get_root(), resolve=True, enum_to_str=True)),
            "versions": package_versions(),
            "data": {"folders": [str(Path(folder).resolve()) for folder in self.folders], "train_hash": train_hash},
            "teacher": self._teacher_identity,
            **more,
        }
        write_json(Path(self.cfg.save_dir) / "run.json", record)

    def max_positions(self) -> None:
        return None

    @property
    def source_dictionary(self) -> None:
        return None

    target_dictionary = source_dictionary


def _batches_an_update(cfg: Any) -> int:
    """The most that `--update-freq` says; 1 where a task's options stand alone."""
    optimization = getattr(cfg._get_root(), "optimization", None)
    return 1 if optimization is None else max(optimization.update_freq)


def _plain(options: Any) -> Any:
    """Options without Namespaces, which some of fairseq's own parts still have for theirs."""
    if isinstance(options, Namespace):
        options = vars(options)
    return {key: _plain(value) for key, value in options.items()} if isinstance(options, dict) else options


def refuse_half_precision_on_cpu(cfg: Any) -> None:
    """fairseq's own half precision on a CPU ends in an assertion of CUDA, or takes the path for TPUs.

    Args:
        cfg: a task's options, inside those of a run or alone.

    Raises:
        UserError: `--cpu` stands beside `--fp16` or `--bf16`, or there is `--amp`.
    """
    common = getattr(cfg._get_root(), "common", None)
    if common is not None and common.get("amp", False):
        raise UserError("--amp would compute the losses in half precision, too; use --autocast auto instead")
    if common is None or not common.get("cpu", False):
        return
    wrong = [f"--{name}" for name in ("fp16", "bf16") if common.get(name, False)]
    if wrong:
        raise UserError(f"{wrong[0]} needs a GPU; on --cpu use float32, or --autocast bfloat16")
