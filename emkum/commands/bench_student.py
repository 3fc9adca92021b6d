"""Speed and memory of the student's training step, for variants of a recipe: `emkum bench student`.

Each run is a process of its own, so that its peak of memory is its own; it trains by `user_dir/benchmark.py`.
"""

import json
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import product
from pathlib import Path
from statistics import median
from typing import Any

import yaml

from emkum.commands.train import USER_DIR
from emkum.errors import UserError
from emkum.recipe import read_options, to_arguments

MODEL = {"task": "image_text", "arch": "image_text_student", "criterion": "multi_objective"}
# Options that a step on random inputs does not depend on.
WITHOUT_EFFECT = ("data", "teacher", "caption_tokenizer", "save_dir", "kd_cluster_centroids", "kd_vq_quantizer")
SPECIAL_PIECES = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")
RUN = "run"
CPU = "CPU"
MEMORY_OF_CPU = "Peak memory is the weights and what the process grew by while training."
MEMORY_OF_GPU = "Peak memory is what PyTorch allocated on the GPU, weights included."
_ERROR = "error: "
_LONGEST_REASON = 300


@dataclass(frozen=True)
class Work:
    """What each run does beside the recipe; see `user_dir.benchmark.Run`.

    Attributes:
        steps, warm_up: updates that are timed, and before these.
        caption_tokens: fewest and most tokens of a caption.
        vocab_size: ids of the tokenizer.
        target_width, classes: of the random targets that stand for a teacher's.
    """

    steps: int
    warm_up: int
    caption_tokens: tuple[int, int]
    vocab_size: int
    target_width: int
    classes: int


@dataclass(frozen=True)
class Variant:
    """A recipe with some options of its own.

    Attributes:
        options: these, by name.
        arguments: of `fairseq-train`.
    """

    options: Mapping[str, Any]
    arguments: list[str]

    @property
    def name(self) -> str:
        return " ".join(f"{key}={_word(value)}" for key, value in self.options.items()) or "the recipe"


def parse_varied(words: Sequence[str], batch_sizes: str | None) -> dict[str, list[Any]]:
    """Values of each option that is varied.

    Args:
        words: `key=a,b` each; values are read as YAML, `[a,b]` is one value that is a list.
        batch_sizes: `N,N`, the values of batch_size; None = it is not varied.

    Raises:
        UserError: a word is malformed, names an option twice or one that has no effect, or has no or equal values.
    """
    words = [*words, *([] if batch_sizes is None else [f"batch_size={batch_sizes}"])]
    varied: dict[str, list[Any]] = {}
    for word in words:
        key, equals, text = word.partition("=")
        key = key.lstrip("-").replace("-", "_")
        try:
            values = yaml.safe_load(f"[{text}]")
        except yaml.YAMLError:
            values = []
        if not key or not equals or not values or len(set(map(repr, values))) < len(values):
            raise UserError(f"--vary {word!r} must read key=value,value with different values")
        if key in varied:
            raise UserError(f"--vary: {key} is varied twice")
        if key in WITHOUT_EFFECT:
            raise UserError(f"--vary {key}: a step on random inputs does not depend on it")
        varied[key] = values
    return varied


def make_variants(
    recipe: str, overrides: Sequence[str], varied: Mapping[str, Sequence[Any]], folder: Path, cpu: bool
) -> list[Variant]:
    """One variant for each combination of varied options, the last option changing first.

    Args:
        recipe, overrides: as of `emkum train`.
        varied: from `parse_varied`.
        folder: of `write_stand_in`; receives what fairseq writes where a run fails.
        cpu: there is no GPU.

    Raises:
        UserError: the recipe cannot be read, is of another model, an option is unknown, or there is no batch size.
    """
    common = {"user_dir": str(USER_DIR)} | read_options(recipe, list(overrides))
    for key, value in MODEL.items():
        if common.get(key) != value:
            raise UserError(f"{recipe} has {key} {common.get(key)!r}; what can be measured is {value}")
    for key in WITHOUT_EFFECT:
        common.pop(key, None)
    if cpu:
        common.setdefault("cpu", True)
    common |= {"data": str(folder), "save_dir": str(folder / RUN), "distributed_world_size": 1}
    variants = []
    for values in product(*varied.values()):
        options = dict(zip(varied, values, strict=True))
        resolved = common | options
        size = resolved.get("batch_size")
        if not isinstance(size, int) or size < 1:
            raise UserError(f"batch size {size}: want a number of images, in the recipe or by --batch-size")
        variants.append(Variant(options, to_arguments(resolved)))
    return variants


def write_stand_in(folder: Path, vocab_size: int) -> None:
    """Write what the task wants of a data set, a split, which is never read, and a tokenizer; and a folder for the run.

    Args:
        folder: exists.
        vocab_size: ids of the tokenizer, the special ones first.
    """
    from emkum.data.shard_writing import ShardWriter

    with ShardWriter(folder / "train") as writer:
        writer.add("0", b"", "jpg", ["nothing"])
    # A run that fails leaves a checkpoint there, and would report that it cannot.
    (folder / RUN).mkdir()
    pieces = [*SPECIAL_PIECES, *(f"w{number}" for number in range(vocab_size - len(SPECIAL_PIECES)))]
    (folder / "vocab.txt").write_text("\n".join(pieces) + "\n", encoding="utf-8")


def measure(
    recipe: str, overrides: Sequence[str], varied: Mapping[str, Sequence[Any]], work: Work, rounds: int
) -> list[dict[str, Any]]:
    """Figures of each variant. A round goes through all variants, so that what slows the machine slows all of them.

    Args:
        recipe, overrides, varied: as of `make_variants`.
        work: what each run does.
        rounds: runs of each variant.

    Returns:
        For each variant "name" and "options"; of each round "pairs_per_second" and "milliseconds_per_step"; "ratio" of
        the rate to the first variant's of the same round, the median; "peak_bytes", the most of all rounds; and
        "weight_bytes", "images", "pairs", "device" and "threads" of `user_dir.benchmark.measure`.

    Raises:
        UserError: a variant cannot be made, or its run fails.
    """
    import torch

    with tempfile.TemporaryDirectory(prefix="emkum-bench-") as folder:
        variants = make_variants(recipe, overrides, varied, Path(folder), cpu=not torch.cuda.is_available())
        write_stand_in(Path(folder), work.vocab_size)
        runs: list[list[dict[str, Any]]] = [[] for _ in variants]
        for _ in range(rounds):
            for variant, done in zip(variants, runs, strict=True):
                done.append(run_variant(variant, work))
    rates = [[work.steps * run["pairs"] / run["seconds"] for run in done] for done in runs]
    return [
        {
            "name": variant.name,
            "options": dict(variant.options),
            "pairs_per_second": own,
            "milliseconds_per_step": [1000 * run["seconds"] / work.steps for run in done],
            "ratio": median(rate / first for rate, first in zip(own, rates[0], strict=True)),
            "peak_bytes": max(run["peak_bytes"] for run in done),
            **{key: done[0][key] for key in ("weight_bytes", "images", "pairs", "device", "threads")},
        }
        for variant, done, own in zip(variants, runs, rates, strict=True)
    ]


def run_variant(variant: Variant, work: Work) -> dict[str, Any]:
    """Train for some steps in a process of its own.

    Returns:
        What `user_dir.benchmark.measure` does.

    Raises:
        UserError: it fails.
    """
    description = {key: value for key, value in asdict(work).items() if key != "vocab_size"}
    places = [str(USER_DIR.parent), *filter(None, [os.environ.get("PYTHONPATH")])]
    child = subprocess.run(
        # -P: another `user_dir` in the present folder is not meant.
        [sys.executable, "-P", "-m", f"{USER_DIR.name}.benchmark"],
        input=json.dumps({"arguments": variant.arguments} | description),
        env={**os.environ, "PYTHONPATH": os.pathsep.join(places)},
        capture_output=True,
        text=True,
        errors="replace",
    )
    if child.returncode != 0:
        raise UserError(f"{variant.name}: {_reason(child)}")
    return json.loads(child.stdout.splitlines()[-1])


def _reason(child: subprocess.CompletedProcess) -> str:
    """Why a run failed, in one line."""
    if child.returncode < 0:
        name = signal.Signals(-child.returncode).name
        return f"the run was ended by {name}" + (", perhaps for want of memory" if name == "SIGKILL" else "")
    lines = [line.strip() for line in child.stderr.splitlines() if line.strip()]
    last = lines[-1] if lines else f"the run ended with status {child.returncode}"
    # What programs put in front of their own messages.
    return (last.partition(_ERROR)[2] or last)[:_LONGEST_REASON]


def format_report(
    figures: Sequence[Mapping[str, Any]], command: str, machine: Mapping[str, Any], work: Work, rounds: int
) -> str:
    """What was measured, where, and a table of it.

    Args:
        figures: from `measure`.
        command: as it was given.
        machine: "processor", "cores" and "load".
        work, rounds: as of `measure`.
    """
    first = figures[0]
    processor = f"{machine['processor']}, {machine['cores']} cores, load {machine['load'][0]:.1f}"
    on_cpu = first["device"] == CPU
    place = f"{processor}; PyTorch threads: {first['threads']}" if on_cpu else f"{first['device']} ({processor})"
    memory = MEMORY_OF_CPU if on_cpu else MEMORY_OF_GPU
    shortest, longest = work.caption_tokens
    return "\n".join(
        [
            command,
            f"on {place}",
            "",
            *_table(figures),
            "",
            "A step is forward, losses, backward and optimizer, without the teacher and without reading data; a pair",
            f"is a caption with its image. Random images, captions of {shortest} to {longest} tokens, random weights.",
            f"Medians over rounds ({rounds}, of {work.steps} timed steps each), variants in turn; the ratio is that of",
            f"pairs/s to the first variant's. {memory}",
        ]
    )


def _table(figures: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    """Lines with medians over rounds, and the lowest and the highest rate."""
    width = max(len("variant"), *(len(row["name"]) for row in figures))
    yield f"{'variant':<{width}}  images  pairs  pairs/s  lowest to highest    ms/step  peak MiB  ratio"
    for row in figures:
        rates = row["pairs_per_second"]
        spread = f"{_rate(min(rates))} to {_rate(max(rates))}"
        yield (
            f"{row['name']:<{width}}  {row['images']:>6}  {row['pairs']:>5}  {_rate(median(rates)):>7}  {spread:>17}  "
            f"{median(row['milliseconds_per_step']):>9,.1f}  {row['peak_bytes'] / 2**20:>8,.0f}  {row['ratio']:>5.2f}"
        )


def _rate(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.1f}"


def _word(value: Any) -> str:
    """A value as the command line takes it."""
    if isinstance(value, list):
        return f"[{','.join(map(_word, value))}]"
    if value is None:
        return "null"
    return str(value).lower() if isinstance(value, bool) else str(value)
