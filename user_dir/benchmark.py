"""Training steps on random batches, timed: what `emkum bench student` runs, each time in a process of its own.

`python -m user_dir.benchmark` reads a `Run` as JSON from standard input and prints its figures as JSON. The step is
fairseq's own, with the registered task, model, criterion and optimizer; only the data and the teacher are made up.
"""

import contextlib
import gc
import json
import logging
import platform
import sys
import time
from dataclasses import dataclass
from itertools import chain, cycle, islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from fairseq import options, tasks, utils
from fairseq.dataclass.utils import convert_namespace_to_omegaconf
from fairseq.trainer import Trainer
from torch import Tensor, nn

from emkum.data.image_text import ImageTextItem, collate
from emkum.data.masking import mask_text
from emkum.data.transforms import crop_rows
from emkum.errors import UserError
from emkum.layers.nearest_code import CodeTable
from emkum.models.builders import count_image_tokens
from emkum.outputs import TeacherOutput
from emkum.teachers.base import IMAGE, TeacherInput

# Imported by fairseq where it loads this folder by itself.
from .models import image_text_student  # noqa: F401
from .tasks.image_text import ImageTextTask

# Updates' worth of different batches; steps take them in turn.
DIFFERENT_BATCHES = 2
# Channels in which an image quantizer compares codes (the S of the published one).
CODE_WIDTH = 16
# Where a recipe draws all captions of an image: as many as COCO has.
ALL_CAPTIONS = 5


@dataclass(frozen=True)
class Run:
    """What is to be done.

    Attributes:
        arguments: those of `fairseq-train`; the data are a folder whose tokenizer is used alone.
        steps, warm_up: updates of the optimizer, timed and before these.
        caption_tokens: fewest and most tokens of a caption, special ones included.
        target_width: channels of the teacher's features and patches.
        classes: of the teacher's logits.
    """

    arguments: list[str]
    steps: int
    warm_up: int
    caption_tokens: tuple[int, int]
    target_width: int
    classes: int


class RandomTeacher:
    """Random targets in a teacher's place: of a batch of given size always the same, made once, on the right device.

    Args:
        width: channels of features and patches.
        classes: of the logits.

    Attributes:
        targets: what it gives; None until `prepare`.
    """

    image_size = max_tokens = 0
    grid = tokenizer = None
    modalities = (IMAGE,)

    def __init__(self, width: int, classes: int) -> None:
        self.width = self.patch_width = width
        self.num_classes = classes
        self.identity = {"teacher": "random"}
        self.targets: TeacherOutput | None = None

    def prepare(self, images: int, patches: int, task: ImageTextTask, device: torch.device) -> None:
        """Make what the objectives of a task compare with.

        Args:
            images: B.
            patches: N, of each image; 0 where the student has none.
        """

        def draw(*shape: int) -> Tensor:
            return torch.randn(*shape, device=device)

        self.targets = TeacherOutput(
            features=draw(images, self.width),
            patches=draw(images, patches, self.width) if task.needs.patches else None,
            logits=draw(images, self.num_classes) if task.needs.logits else None,
        )

    def __call__(self, batch: TeacherInput) -> TeacherOutput:
        return self.targets


def random_batches(task: ImageTextTask, count: int, size: int, tokens: tuple[int, int], seed: int) -> list[dict]:
    """Batches as `collate` makes them, with whatever else the task's objectives read; pixels are the same in all.

    Args:
        task: with its model built.
        count: batches.
        size: B, images of each.
        tokens: fewest and most of a caption.
        seed: of all randomness, so that all variants see the same captions.
    """
    rng = np.random.default_rng(seed)
    further = task.multi_crop.number if task.needs.crops else 0
    views = [crop_rows(size, task.image_size) for _ in range(1 + further)]
    for row in chain.from_iterable(views):
        row.array[...] = rng.integers(0, 256, row.array.shape, dtype=np.uint8)
    batches = []
    for first in range(0, count * size, size):
        items = []
        for place in range(size):
            image, *crops = (rows[place].tensor for rows in views)
            item = ImageTextItem(first + place, "train", first + place, -1, image, _random_captions(task, tokens, rng))
            item.crops = crops or None
            if task.needs.masked_text:
                masked = [mask_text(ids, task.tokenizer, task.text_mask, rng) for ids in item.captions]
                item.masked_captions = masked
            if task.patch_masking is not None:
                item.patch_mask = task.patch_masking(rng)
            items.append(item)
        batches.append(collate(items, task.captions.groups, task.tokenizer.special.pad))
    return batches


def _random_captions(task: ImageTextTask, tokens: tuple[int, int], rng: np.random.Generator) -> list[list[int]]:
    special, most = task.tokenizer.special, task.captions.max_tokens
    captions = []
    for _ in range(task.captions.per_image or ALL_CAPTIONS):
        length = min(int(rng.integers(tokens[0], tokens[1] + 1)), most)
        # The vocabulary begins with the special tokens.
        pieces = rng.integers(len(special.ids), task.tokenizer.vocab_size, length - 2)
        captions.append([special.bos, *pieces.tolist(), special.eos])
    return captions


def measure(run: Run) -> dict[str, Any]:
    """Build what a run trains, and time its steps.

    Returns:
        seconds: of all timed steps. images, pairs: of a step. peak_bytes: the most memory that weights, inputs,
        activations, gradients and the optimizer's state took. weight_bytes: of parameters and buffers. device: its
        name. threads: of PyTorch on the CPU.
    """
    parser = options.get_training_parser()
    cfg = convert_namespace_to_omegaconf(options.parse_args_and_arch(parser, input_args=run.arguments))
    torch.manual_seed(cfg.common.seed)
    size, parts = cfg.dataset.batch_size, cfg.optimization.update_freq[0]
    task = tasks.setup_task(cfg.task, from_checkpoint=True)
    if min(run.caption_tokens[1], task.captions.max_tokens) < run.caption_tokens[0]:
        raise UserError(f"captions of {run.caption_tokens[0]} tokens exceed caption_max_tokens")
    task.teacher = RandomTeacher(run.target_width, run.classes)
    task.num_train_images = size * parts * DIFFERENT_BATCHES
    model = task.build_model(cfg.model)
    fill_code_tables(model)
    patches = count_image_tokens(model.student.image_encoder) - 1
    trainer = Trainer(cfg, task, model, task.build_criterion(cfg.criterion))
    weights = weight_bytes(model)
    # With it, the trainer forgets the peak of memory at each step.
    trainer.cuda_env = None
    memory = PeakMemory(trainer.device, weights)
    batches = random_batches(task, parts * DIFFERENT_BATCHES, size, run.caption_tokens, cfg.common.seed)
    task.teacher.prepare(size, patches, task, trainer.device)
    if trainer.cuda:
        batches = utils.move_to_cuda(batches)
    updates = cycle([batches[first : first + parts] for first in range(0, len(batches), parts)])
    run_steps(trainer, islice(updates, run.warm_up))
    return {
        "seconds": run_steps(trainer, islice(updates, run.steps)),
        "images": size * parts,
        "pairs": parts * len(batches[0]["net_input"]["text"]),
        "peak_bytes": memory.peak_bytes(),
        "weight_bytes": weights,
        "device": torch.cuda.get_device_name() if trainer.cuda else "CPU",
        "threads": torch.get_num_threads(),
    }


def fill_code_tables(model: nn.Module) -> None:
    """Random entries for tables of centroids and codes, whose files a recipe's run would read."""
    for table in model.modules():
        if isinstance(table, CodeTable):
            shapes = {name: getattr(table, name).shape for name in table.names}
            table.fill(**{name: torch.randn([side or CODE_WIDTH for side in shape]) for name, shape in shapes.items()})


def run_steps(trainer: Trainer, updates: Any) -> float:
    """Seconds that updates of the optimizer take, each of a list of batches."""
    _synchronize(trainer.device)
    begin = time.perf_counter()
    for batches in updates:
        trainer.train_step(batches, raise_oom=True)
    _synchronize(trainer.device)
    return time.perf_counter() - begin


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def weight_bytes(model: nn.Module) -> int:
    """What parameters and buffers take."""
    return sum(tensor.numel() * tensor.element_size() for tensor in (*model.parameters(), *model.buffers()))


class PeakMemory:
    """Most memory since this was made, weights included.

    Of a GPU, what PyTorch had allocated. Of a CPU, how much the process grew, and the weights: it also counts what
    libraries load at the first step, some ten MiB.

    Args:
        device: where the weights are.
        weights: their bytes.
    """

    def __init__(self, device: torch.device, weights: int) -> None:
        self.device = device
        self.weights = weights
        gc.collect()
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
            return
        # Forget the peak of building the model; where this is not allowed, that peak counts, too.
        with contextlib.suppress(OSError):
            Path("/proc/self/clear_refs").write_text("5")
        self.before = _resident("VmRSS")

    def peak_bytes(self) -> int:
        if self.device.type == "cuda":
            return torch.cuda.max_memory_allocated(self.device)
        return self.weights + _resident("VmHWM") - self.before


def _resident(name: str) -> int:
    """Bytes of resident memory by Linux's name: VmRSS at present, VmHWM at most.

    Not `ru_maxrss`: that begins with what the parent held when it started this process.

    Raises:
        UserError: not under Linux.
    """
    if platform.system() != "Linux":
        raise UserError("memory of a step on the CPU is measured under Linux alone")
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{name}:"):
            return 1024 * int(line.split()[1])
    raise RuntimeError(f"/proc/self/status has no {name}")


if __name__ == "__main__":
    logging.disable(logging.INFO)
    print(json.dumps(measure(Run(**json.load(sys.stdin)))))
