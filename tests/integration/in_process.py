"""A run's task, model and criterion by fairseq's own parser, in this process."""

from argparse import Namespace
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from fairseq import options, tasks
from fairseq.dataclass.utils import convert_namespace_to_omegaconf
from fairseq.optim import build_optimizer
from fairseq.utils import import_user_module

import tests.registered  # noqa: F401

ROOT = Path(__file__).parents[2]


@dataclass
class Run:
    """What `fairseq-train` puts together; batches are the training data's first ones."""

    task: Any
    model: Any
    criterion: Any
    optimizer: Any

    def batch(self, start: int, stop: int) -> dict[str, Any]:
        dataset = self.task.datasets["train"]
        return dataset.collater(dataset.__getitems__(list(range(start, stop))))

    def backward(self, batch: dict[str, Any], update: int) -> dict[str, Any]:
        """One batch through fairseq's own step, without the optimizer's; the logged figures."""
        _, _, log = self.task.train_step(batch, self.model, self.criterion, self.optimizer, update)
        return log

    def gradients(self) -> dict[str, torch.Tensor]:
        return {name: p.grad for name, p in self.model.named_parameters() if p.grad is not None}


def make_run(data: Path, save_dir: Path, base: dict[str, Any], **changes: Any) -> Run:
    """A run with options `base` and `changes`; True stands for a flag without a value."""
    import_user_module(Namespace(user_dir=str(ROOT / "user_dir")))
    merged = {key: value for key, value in (base | changes).items() if value is not False}
    words = [f"--{k.replace('_', '-')}" + ("" if v is True else f"={v}") for k, v in merged.items()]
    words += [f"--save-dir={save_dir}", f"--user-dir={ROOT / 'user_dir'}", "--cpu"]
    parser = options.get_training_parser()
    cfg = convert_namespace_to_omegaconf(options.parse_args_and_arch(parser, [str(data), *words]))
    torch.manual_seed(1)
    task = tasks.setup_task(cfg.task)
    model = task.build_model(cfg.model)
    criterion = task.build_criterion(cfg.criterion)
    task.load_dataset("train")
    optimizer = build_optimizer(cfg.optimizer, [p for p in model.parameters() if p.requires_grad])
    return Run(task, model.train(), criterion, optimizer)


Maker = Callable[..., Run]
