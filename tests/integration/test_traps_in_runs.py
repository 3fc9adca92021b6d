"""fairseq's own trainer: what moves once an update, what a checkpoint brings back, and what validation scores."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from fairseq import options, tasks
from fairseq.dataclass.utils import convert_namespace_to_omegaconf
from fairseq.trainer import Trainer
from torch import Tensor

import emkum
from emkum.commands.evaluate import encode_split
from emkum.data.shards import open_split
from tests.integration.conftest import ROOT, STUDENT, TEACHER

# All that register something: fairseq's loader leaves out a `user_dir` of which another test has imported a part.
from user_dir.models import image_quantizer, image_text_student  # noqa: F401
from user_dir.tasks import image_quantization, image_text  # noqa: F401

# Of fairseq's own use of hydra.
pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")

# Plain gradient descent: Adam makes a step of rounding errors where a gradient is nearly 0.
PLAIN = {"optimizer": "nag", "momentum": 0, "lr_scheduler": "fixed", "lr": 0.1, "num_workers": 0}
STILL = {"text_dropout": 0, "text_attention_dropout": 0}
DINO = {"dino_prototypes": 16, "dino_hidden": 16, "dino_bottleneck": 8, "dino_center_decay": 0.5}
# Losses that are means over images and captions, one by one: four batches of two images are one of eight.
APART = {
    "objectives": "dino,kd_mse,kd_reduced",
    "teacher": "self",
    "average_decay": 0.7,
    "kd_reduced_dim": 8,
    "kd_reduced_decay": 0.6,
}
# Everything that has a state.
STATES = {
    "objectives": "itc,bank_itc,proximal_itc,momentum_itc,kd_contrastive,kd_reduced,itm,dino",
    "teacher": "self",
    "average_decay": 0.7,
    "average_end_decay": 0.9,
    "bank_itc_size": 10,
    "bank_itc_half_life": 3.0,
    "proximal_itc_negatives": 10,
    "momentum_itc_size": 10,
    "kd_contrastive_bank_size": 10,
    "kd_reduced_dim": 8,
    "itm_negatives": "hard",
    "freeze_image_all_but": 0,
    "freeze_embeddings": True,
}


@pytest.fixture(autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


def make_trainer(data: Path, folder: Path, base: dict[str, Any], seed: int = 1) -> Trainer:
    """The trainer of a run, before its first update; True stands for a flag without a value."""
    merged = base | PLAIN | {"user_dir": ROOT / "user_dir", "save_dir": folder, "cpu": True}
    words = [f"--{key.replace('_', '-')}" + ("" if value is True else f"={value}") for key, value in merged.items()]
    cfg = convert_namespace_to_omegaconf(
        options.parse_args_and_arch(options.get_training_parser(), [str(data), *words])
    )
    torch.manual_seed(seed)
    task = tasks.setup_task(cfg.task)
    model = task.build_model(cfg.model)
    task.load_dataset("train")
    return Trainer(cfg, task, model, task.build_criterion(cfg.criterion))


def update(trainer: Trainer, first: int, parts: int) -> None:
    """One update on eight images from `first` on, in so many batches."""
    dataset = trainer.task.datasets["train"]
    size = 8 // parts
    starts = range(first, first + 8, size)
    trainer.train_step([dataset.collater(dataset.__getitems__(list(range(s, s + size)))) for s in starts])


def states_by_parts(make: Callable[..., Trainer], updates: int) -> list[dict[str, Tensor]]:
    """State after updates of one batch each, and after the same in four."""
    found = []
    for parts in (1, 4):
        trainer = make()
        for number in range(updates):
            update(trainer, 8 * (number % 4), parts)
        found.append({name: value.clone() for name, value in trainer.model.state_dict().items()})
    return found


def assert_close(whole: dict[str, Tensor], parts: dict[str, Tensor], **tolerance: float) -> None:
    assert whole.keys() == parts.keys()
    for name, value in whole.items():
        torch.testing.assert_close(parts[name], value, **tolerance, msg=lambda text, n=name: f"{n}: {text}")


def test_average_and_center_move_once_an_update_of_four_batches(scenes: Path, tmp_path: Path) -> None:
    def make() -> Trainer:
        return make_trainer(scenes, tmp_path, STUDENT | STILL | DINO | APART)

    start = {name: value.clone() for name, value in make().model.state_dict().items()}
    whole, parts = states_by_parts(make, updates=4)
    assert_close(whole, parts, rtol=1e-3, atol=1e-5)
    # Each follows when the next update begins: three times after four updates.
    assert int(parts["ema.updates"]) == int(parts["objectives.dino.average_head.updates"]) == 3
    for name in (
        "ema.module.shared_encoder.norm.weight",
        "objectives.dino.center",
        "objectives.dino.average_head.module.prototypes",
        "objectives.kd_reduced.teacher_map.module.weight",
    ):
        assert (whole[name] - start[name]).abs().max() > 1e-3, f"{name} hardly moves: the test shows nothing"


def test_codes_move_once_an_update_of_four_batches(scenes: Path, teacher_weights: Path, tmp_path: Path) -> None:
    base = {
        "task": "image_quantization",
        "arch": "image_quantizer",
        "criterion": "model",
        "teacher": f"timm:{TEACHER}",
        "teacher_weights": teacher_weights,
        "teacher_image_size": 32,
        "quantizer_codes": 2,
        "quantizer_code_width": 3,
        "quantizer_decay": 0.6,
        # All patches: which ones are hidden is drawn once a batch.
        "quantizer_mask": 1.0,
        "batch_size": 8,
    }

    def make() -> Trainer:
        return make_trainer(scenes, tmp_path, base)

    whole, parts = states_by_parts(make, updates=4)
    assert_close(whole, parts, rtol=1e-3, atol=1e-5)
    assert whole["quantizer.codebook.started"] and int(parts["quantizer.codebook.updates"]) == 3


def test_a_checkpoint_has_everything_and_goes_on(scenes: Path, tmp_path: Path) -> None:
    """Queues, banks, centers, averages, draws, scales, and what is frozen, in a process that began otherwise."""
    base = STUDENT | DINO | STATES
    first = make_trainer(scenes, tmp_path, base)
    for number in range(3):
        update(first, 8 * number, parts=2)
    path = tmp_path / "checkpoint_last.pt"
    first.consolidate_optimizer()
    first.save_checkpoint(str(path), {"train_iterator": {"epoch": 1}})
    saved = torch.load(path, weights_only=True)["model"]
    second = make_trainer(scenes, tmp_path, base, seed=2)
    frozen = {name for name, parameter in second.model.student.named_parameters() if not parameter.requires_grad}
    assert sum(name.startswith("image_encoder.") for name in frozen) > 10
    assert {f"student.{name}" for name in frozen} <= saved.keys()
    assert {name for name, _ in first.model.named_parameters()} <= saved.keys()
    assert {f"objectives.{name}" for name, _ in first.model.objectives.named_buffers()} | {
        "ema.updates"
    } <= saved.keys()
    begun = second.model.state_dict()
    assert any(not torch.equal(begun[f"student.{name}"], saved[f"student.{name}"]) for name in frozen)
    second.load_checkpoint(str(path))
    assert second.get_num_updates() == 3
    for number in range(2):
        for trainer in (first, second):
            update(trainer, 8 * number, parts=2)
    assert_close(first.model.state_dict(), second.model.state_dict(), rtol=0, atol=0)
    # And it is what the student is loaded from.
    assert emkum.load(tmp_path).encode_text(["a red circle"]).shape == (1, 128)


class Counted:
    """In place of a model: what it is given, as features."""

    def encode_image(self, images: list) -> Tensor:
        return torch.ones(len(images), 2)

    def encode_text(self, texts: list[str]) -> Tensor:
        return torch.tensor([[float(len(text)), 1.0] for text in texts])


def test_every_caption_is_scored(scenes: Path, tmp_path: Path) -> None:
    """At validation and by `emkum evaluate`, whatever training takes of an image."""
    trainer = make_trainer(scenes, tmp_path, STUDENT | {"objectives": "itc", "caption_per_image": 2})
    samples = open_split(scenes, "valid")
    captions = [caption for i in range(len(samples)) for caption in samples[i].captions]
    assert (len(samples), len(captions)) == (4, 20)
    trainer.task.load_dataset("valid")
    dataset = trainer.task.datasets["valid"]
    trainer.task.begin_valid_epoch(1, trainer.model)
    for start in (0, 2):
        trainer.valid_step(dataset.collater(dataset.__getitems__([start, start + 1])))
    chunks = trainer.task.retrieval.chunks
    owners = [image for image in range(4) for _ in range(5)]
    assert sorted(torch.cat([chunk.caption_ids for chunk in chunks]).tolist()) == owners
    encoded = encode_split(Counted(), samples, batch_size=3)
    assert encoded.texts[:, 0].tolist() == [len(caption) for caption in captions]
    assert encoded.caption_image.tolist() == owners
