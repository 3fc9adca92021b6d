"""A run's folder with a small student of random weights."""

from pathlib import Path
from typing import Any

import torch

from emkum.data.tokenizers import load_tokenizer
from emkum.models.builders import STUDENT_PARTS, Targets, build_student
from emkum.objectives import Setting, build_objectives
from emkum.options import flat_fields

OPTIONS = {
    "student_size": "tiny", "image_size": 32, "image_patch_size": 8, "image_layers": 1, "text_layers": 1,
    "text_max_positions": 64,
}  # fmt: skip
# Tokens of a caption.
LONGEST = 24


def save_student(folder: Path, data: Path, names: str, **options: Any) -> Path:
    """Write checkpoint_best.pt, as training with the named objectives leaves it, into a folder.

    Args:
        folder: the run's.
        data: whose tokenizer it reads.
        names: of objectives, separated by commas.
        options: of the student and the objectives, which change OPTIONS.
    """
    torch.manual_seed(0)
    # Blocks alone have attention.
    targets = Targets(cls_attention=options.get("shared_kind", "blocks") == "blocks")
    student = build_student(OPTIONS | options, load_tokenizer(data).vocab_size, targets)
    objectives = build_objectives(names.split(","), options, Setting(student.width, student.contrast_width))
    with torch.no_grad():
        # Random weights as they come say nearly the same of all images.
        for parameter in student.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.1)
        if "itm" in objectives:
            objectives["itm"].classifier.output.weight.mul_(20)
    weights = {f"student.{name}": value for name, value in student.state_dict().items()}
    weights |= {f"objectives.{name}": value for name, value in objectives.state_dict().items()}
    every = {name: item.default if item.default != "" else None for name, item in flat_fields(STUDENT_PARTS)}
    model = every | OPTIONS | options | {"_name": "image_text_student", "objectives": names}
    task = {"caption_max_tokens": LONGEST, "caption_tokenizer": None, "data": str(data)}
    torch.save({"cfg": {"model": model, "task": task}, "model": weights}, folder / "checkpoint_best.pt")
    return folder
