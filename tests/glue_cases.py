"""A small GLUE that can be learned, and a small text encoder to learn it with."""

from collections.abc import Callable
from pathlib import Path

import torch

from emkum.data.tokenizers import load_tokenizer
from emkum.models.encoder_sources import text_encoder_from_options

LETTERS = "abcdefghijklmnopqrstuvwxyz"
WORDS = ("yes", "no", "maybe", "the", "cat", "dog", "sat", "ran")
ANSWERS = {"yes": "entailment", "maybe": "neutral", "no": "contradiction"}
# Of a student that reads 40 tokens.
OPTIONS = {
    "student_size": "tiny",
    "student_width": 32,
    "student_heads": 2,
    "text_encoder": "bert",
    "text_layers": 2,
    "text_max_positions": 40,
}


def write_vocabulary(folder: Path) -> Path:
    """A vocabulary of WordPiece with a few words and all letters."""
    folder.mkdir(parents=True, exist_ok=True)
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    pieces = [*special, ".", *WORDS, *LETTERS, *(f"##{letter}" for letter in LETTERS)]
    path = folder / "vocab.txt"
    path.write_text("\n".join(pieces) + "\n")
    return path


def write_source(folder: Path) -> Path:
    """The folder of a run of `text_student` with random weights, of a size that lets attention tell words apart."""
    tokenizer = load_tokenizer(write_vocabulary(folder / "tokenizer"))
    torch.manual_seed(3)
    encoder = text_encoder_from_options(OPTIONS, tokenizer.vocab_size, tokenizer.special.pad)
    state = {f"encoder.{name}": value * (5 if value.ndim == 2 else 1) for name, value in encoder.state_dict().items()}
    cfg = {"model": {"_name": "text_student", **OPTIONS}, "task": {"data": "", "text_tokenizer": None}}
    torch.save({"cfg": cfg, "model": state}, folder / "checkpoint_best.pt")
    return folder


def _sentences(row: int) -> tuple[str, str, str]:
    """Two sentences, and the answer that the second one begins with."""
    animal, verb = ("cat", "dog")[row % 2], ("sat", "ran")[row // 2 % 2]
    answer = list(ANSWERS)[row % 3]
    return f"the {animal} {verb}{' the dog' * (row % 4)}", f"{answer} the {animal}", answer


def _mnli(count: int, first: int = 0, labeled: bool = True) -> list[str]:
    lines = ["index\tsentence1\tsentence2" + ("\tgold_label" if labeled else "")]
    for row in range(first, first + count):
        one, two, answer = _sentences(row)
        lines.append(f"{row}\t{one}\t{two}" + (f"\t{ANSWERS[answer]}" if labeled else ""))
    return lines


def _stsb(count: int, labeled: bool = True) -> list[str]:
    lines = ["index\tsentence1\tsentence2" + ("\tscore" if labeled else "")]
    scores = {"yes": 5.0, "maybe": 2.4, "no": 0.2}
    for row in range(count):
        one, two, answer = _sentences(row)
        lines.append(f"{row}\t{one}\t{two}" + (f"\t{scores[answer]}" if labeled else ""))
    return lines


def _cola(count: int) -> list[str]:
    return [f"gj04\t{int(row % 3 > 0)}\t\t{' '.join(_sentences(row)[:2])}" for row in range(count)]


FILES = {
    "MNLI": {
        "train.tsv": _mnli(96),
        "dev_matched.tsv": _mnli(12, first=100),
        "dev_mismatched.tsv": _mnli(9, first=200),
        "test_matched.tsv": _mnli(6, first=300, labeled=False),
        "test_mismatched.tsv": _mnli(3, first=400, labeled=False),
    },
    "STS-B": {"train.tsv": _stsb(45), "dev.tsv": _stsb(12), "test.tsv": _stsb(4, labeled=False)},
    "CoLA": {"train.tsv": _cola(45), "dev.tsv": _cola(12)},
}


def prepare_glue(folder: Path, run_prepare: Callable[..., None]) -> Path:
    """Prepared MNLI, STS-B and CoLA."""
    for task, files in FILES.items():
        (folder / "raw" / task).mkdir(parents=True)
        for name, lines in files.items():
            (folder / "raw" / task / name).write_text("\n".join(lines) + "\n")
    run_prepare("glue", "--input", folder / "raw", "--out", folder / "glue")
    return folder / "glue"
