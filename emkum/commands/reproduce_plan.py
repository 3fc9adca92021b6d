"""Which runs reproduce rows of the study, on which data, and how long each of them may be."""

import math
import shlex
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from emkum.commands.train import USER_DIR
from emkum.errors import UserError
from emkum.recipe import parse_overrides, read_mapping, read_recipe

EXAMPLES = USER_DIR.parent / "examples"
FILE = EXAMPLES / "reproduction" / "rows.yaml"
PREPARED, SLURM = "prepared", "slurm"
RETRIEVAL, ZERO_SHOT = "retrieval", "zero_shot"
# Of a run with a log so short that a curve has a few points, and so long that it stays readable.
_LOGGED = 40
# More epochs than any run has: these runs are validated and saved by updates, for an epoch of few pairs is short.
_NEVER = 1_000_000


@dataclass(frozen=True)
class Variant:
    """A row of the study, or a variant of one.

    Attributes:
        row: its number. preset: of the row's recipe; empty = the recipe itself.
        title: of the row. recipe: file.
        teacher: what it takes of its teacher, a key of the teachers; None without one.
        thesis: figures in percent by their names.
        against: keys of what it is compared with.
        expected: by RETRIEVAL and ZERO_SHOT, what became of them in the thesis: better, worse or same.
        needs: words that a user must give, and what they are.
    """

    row: str
    preset: str
    title: str
    recipe: Path
    teacher: str | None = None
    thesis: Mapping[str, float] = field(default_factory=dict)
    against: Sequence[str] = ()
    expected: Mapping[str, str] = field(default_factory=dict)
    needs: Mapping[str, str] = field(default_factory=dict)

    @property
    def key(self) -> str:
        return f"{self.row}:{self.preset}" if self.preset else self.row


@dataclass(frozen=True)
class Setup:
    """The data of all runs, and what stands for the thesis's teachers on it; see examples/reproduction/rows.yaml."""

    title: str
    preset: str
    steps: Mapping[str, str]
    options: Mapping[str, str]
    teachers: Mapping[str, str]
    places: Mapping[str, str] = field(default_factory=dict)
    instead: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)


@dataclass(frozen=True)
class Catalog:
    """What examples/reproduction/rows.yaml says.

    Attributes:
        teachers: the thesis's, by what rows take of them. setups: by the word of --data. variants: by key.
    """

    teachers: Mapping[str, str]
    setups: Mapping[str, Setup]
    variants: Mapping[str, Variant]


@dataclass(frozen=True)
class Given:
    """What a user asks for.

    Attributes:
        setup: the data. data: folder of it.
        places: in braces in the setup's words, by name. options: of all runs. steps: further options of steps and of
            SLURM, by name.
    """

    setup: Setup
    data: Path
    places: Mapping[str, str]
    options: Mapping[str, Any]
    steps: Mapping[str, Mapping[str, Any]]


@dataclass(frozen=True)
class Run:
    """One training.

    Attributes:
        key: of the first variant with these options. seed: of the run. folder: of the run.
        options: of `emkum train`, all of them.
    """

    key: str
    seed: int
    folder: Path
    options: Mapping[str, Any]

    @property
    def name(self) -> str:
        return f"row {self.key.replace(':', ', ')}, seed {self.seed}"


def read_catalog(path: Path = FILE) -> Catalog:
    """
    Raises:
        UserError: the file cannot be read, or compares with what is not in it.
    """
    content = read_mapping(path, "file of rows")
    variants = {}
    for number, row in content["rows"].items():
        common = {key: value for key, value in row.items() if key not in ("variants", "recipe")}
        recipe = EXAMPLES / "rows" / f"{row['recipe']}.yaml"
        for preset, about in row["variants"].items():
            about = dict(about)
            about["against"] = _listed(about.get("against"))
            if isinstance(word := about.get("expected"), str):
                about["expected"] = {RETRIEVAL: word, ZERO_SHOT: word}
            variant = Variant(str(number), preset, recipe=recipe, **common, **about)
            variants[variant.key] = variant
    for variant in variants.values():
        for key in variant.against:
            if key not in variants:
                raise UserError(f"{path}: {variant.key} is compared with {key!r}, which is not there")
    setups = {name: Setup(**setup) for name, setup in content["data"].items()}
    return Catalog(content["teachers"], setups, variants)


def _listed(value: str | list[str] | None) -> list[str]:
    return [] if value is None else [value] if isinstance(value, str) else list(value)


# ----------------------------------------------------------------------------------------------------------------------
# A user's words
# ----------------------------------------------------------------------------------------------------------------------


def choose_variants(catalog: Catalog, text: str) -> list[Variant]:
    """The variants of rows, in the file's order.

    Args:
        catalog: of all. text: numbers of rows, or keys of variants, separated by commas.

    Raises:
        UserError: there is no such row.
    """
    words = [word.strip() for word in text.split(",") if word.strip()]
    rows = list(dict.fromkeys(variant.row for variant in catalog.variants.values()))
    for word in words:
        if word not in rows and word not in catalog.variants:
            row = word.partition(":")[0]
            there = [key for key, variant in catalog.variants.items() if variant.row == row] or rows
            raise UserError(f"--rows {word!r}: choose from {', '.join(there)}")
    # "12" is all variants of row 12, also where "12" is the key of one.
    chosen = [each for each in catalog.variants.values() if each.row in words or each.key in words]
    if not chosen:
        raise UserError("--rows: name one row or more")
    return chosen


def read_words(catalog: Catalog, words: Sequence[str], data: str, out: Path, preset: str | None = None) -> Given:
    """
    Args:
        catalog: of rows and data. words: key=value. data: the word of --data. out: folder of all.
        preset: of the recipes; None = the data's own.

    Raises:
        UserError: a word is missing, or names nothing.
    """
    name = data if data in catalog.setups and data != PREPARED else PREPARED
    setup = catalog.setups[name]
    setup = setup if preset is None else replace(setup, preset=preset)
    if name == PREPARED and not Path(data).is_dir():
        others = ", ".join(key for key in catalog.setups if key != PREPARED)
        raise UserError(f"--data {data}: there is no such folder; want {others} or a folder made by `emkum prepare`")
    options, places, steps = parse_overrides(list(words)), {}, {}
    for key in [key for key in options if "." in key]:
        step, _, option = key.partition(".")
        if step not in setup.steps and step != SLURM:
            raise UserError(f"{key}=: want {', '.join(f'{each}.OPTION' for each in (*setup.steps, SLURM))}")
        steps.setdefault(step, {})[option] = options.pop(key)
    for key, about in setup.places.items():
        if key not in options:
            raise UserError(f"--data {data} needs {key}=PATH, {about}")
        places[key] = str(options.pop(key))
        if not Path(places[key]).exists():
            raise UserError(f"{key}: there is no {places[key]}")
    for key in ("seed", "save_dir", "data", "valid_subset"):
        if key in options:
            raise UserError(f"{key} is set by the command: leave {key}= out")
    folder = Path(data) if name == PREPARED else out / "data"
    places |= {"out": str(out), "recipes": str(EXAMPLES), "data": str(folder)}
    return Given(setup, folder, places, options, steps)


def assert_needs(variants: Iterable[Variant], given: Given) -> None:
    """
    Raises:
        UserError: a row needs a word that is not given.
    """
    there = {*given.options, *(f"{step}.{key}" for step, options in given.steps.items() for key in options)}
    for variant in variants:
        for key, about in variant.needs.items():
            if key not in there:
                raise UserError(f"row {variant.row} needs {key}={about}")


def step_words(given: Given) -> dict[str, list[str]]:
    """The words of each `emkum` command that makes what the runs share; none of a teacher where the user names one."""
    steps = {}
    for name, text in given.setup.steps.items():
        if name != "data" and "teacher" in given.options:
            continue
        words: list[str] = []
        for word in shlex.split(text):
            words += raw_files(Path(given.places["flickr8k"])) if word == "{files}" else [word.format(**given.places)]
        for key, value in given.steps.get(name, {}).items():
            words += [f"{key}={value}"] if words[0] == "train" else [f"--{key.replace('_', '-')}", str(value)]
        steps[name] = words
    return steps


def raw_files(folder: Path) -> list[str]:
    """Options of `emkum prepare flickr8k` for the files of a folder as people have it.

    Raises:
        UserError: some of them are not there.
    """

    def first(what: str, names: Sequence[str]) -> str:
        found = next((folder / name for name in names if (folder / name).exists()), None)
        if found is None:
            raise UserError(f"flickr8k={folder}: no {what} there; looked for {', '.join(names)}")
        return str(found)

    words = ["--images", first("photos", ["images.zip", "Images.zip", "Images", "images", "Flicker8k_Dataset"])]
    words += ["--captions", first("captions", ["captions.txt", "Flickr8k.token.txt"])]
    for split, name in {"train": "train", "valid": "dev", "test": "test"}.items():
        path = folder / f"Flickr_8k.{name}Images.txt"
        if split != "test" or path.is_file():
            words += ["--split", f"{split}={first(f'list of the {name} photos', [path.name])}"]
    return words


# ----------------------------------------------------------------------------------------------------------------------
# Runs
# ----------------------------------------------------------------------------------------------------------------------


def resolve(variant: Variant, given: Given) -> dict[str, Any]:
    """Options of a variant's runs, without what differs between them.

    Raises:
        UserError: the recipe has no such preset.
    """
    presets = [given.setup.preset, *([variant.preset] if variant.preset else [])]
    options = read_recipe(variant.recipe, ",".join(presets))
    has_teacher = options.get("teacher") is not None
    shared = {key: value.format(**given.places) for key, value in given.setup.options.items()}
    instead = {} if "teacher" in given.options else given.setup.instead.get(variant.row, {})
    if "max_update" in given.options:
        options["warmup_updates"] = _scaled(options, given.options["max_update"])
    options = options | shared | instead | given.options
    if "kd_cluster" not in str(options["objectives"]).split(","):
        options.pop("kd_cluster_centroids", None)
    if not has_teacher:
        options = {key: value for key, value in options.items() if not key.startswith("teacher")}
    elif str(options["teacher"]).startswith("cached:"):
        # Those are options of the live teacher.
        options = {key: value for key, value in options.items() if not key.startswith("teacher_")}
    return {key: value for key, value in options.items() if value is not None}


def sized(options: Mapping[str, Any], updates: int, checks: int, given: Mapping[str, Any]) -> dict[str, Any]:
    """Options with another number of updates: the warm-up is the same part of them.

    Args:
        options: of a run. updates: the number. checks: validations, after each of which a run can go on.
        given: by a user; these count more.
    """
    every = math.ceil(updates / checks)
    mine = {"max_update": updates, "warmup_updates": _scaled(options, updates)}
    mine |= {"log_interval": max(1, updates // _LOGGED)}
    mine |= {"validate_interval": _NEVER, "save_interval": _NEVER, "save_interval_updates": every}
    mine |= {"validate_interval_updates": every, "keep_interval_updates": 1}
    return {**options, **mine, **{key: given[key] for key in mine if key in given}}


def _scaled(options: Mapping[str, Any], updates: int) -> int:
    """Updates of the warm-up where it is the same part of another number of updates."""
    return updates * options.get("warmup_updates", 0) // options["max_update"]


def owners(catalog: Catalog, variants: Iterable[Variant], given: Given) -> dict[str, str]:
    """By the key of each variant, that of the first in the file with the same options, whose runs are its runs, too."""
    found: list[tuple[dict[str, Any], str]] = []
    wanted, result = {variant.key for variant in variants}, {}
    for key, variant in catalog.variants.items():
        options = resolve(variant, given)
        owner = next((other for before, other in found if before == options), None)
        if owner is None:
            found.append((options, key))
        if key in wanted:
            result[key] = owner or key
    return result


def make_run(options: Mapping[str, Any], key: str, seed: int, folder: Path, subsets: str) -> Run:
    """A run in a folder of its own below `folder`; `subsets` are the splits that it is validated on."""
    own = folder / f"row{key.replace(':', '_')}" / f"seed{seed}"
    return Run(key, seed, own, {**options, "seed": seed, "save_dir": str(own), "valid_subset": subsets})


# ----------------------------------------------------------------------------------------------------------------------
# Time
# ----------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Rate:
    """What a run takes, in seconds: fixed, for start and validations, and an update."""

    fixed: float
    update: float

    def seconds(self, updates: int) -> float:
        return self.fixed + updates * self.update


def choose_updates(rates: Sequence[Rate], jobs: int, seconds: float, most: int, least: int) -> int:
    """The largest number of updates, equal for all runs, with which they fit.

    Args:
        rates: of every run. jobs: how many run at once. seconds: that there are. most, least: updates of a run.

    Raises:
        UserError: not even the least number fits.
    """
    fixed, update = sum(rate.fixed for rate in rates), sum(rate.update for rate in rates)
    updates = min(most, int((seconds * jobs - fixed) / update))
    if updates < least:
        needed = (fixed + least * update) / jobs / 60
        raise UserError(
            f"--budget-minutes: {len(rates)} runs of {least} updates alone take about {needed:.0f} more minutes; give "
            "more, or fewer rows or seeds, or smaller runs (image_size=64, batch_size=64)"
        )
    return updates


def seconds_per_update(histories: Mapping[str, Sequence[Mapping[str, float]]]) -> float | None:
    """Seconds of an update by the clock, of a log; stretches in which it was validated are left out."""
    records = [record for record in histories.get("train_inner", []) if "wall" in record]
    checked = {record["step"] for tag, history in histories.items() if "train" not in tag for record in history}
    seconds = updates = 0.0
    for before, after in zip(records, records[1:], strict=False):
        took = after["wall"] - before["wall"]
        if took >= 0 and not any(before["step"] <= step < after["step"] for step in checked):
            seconds, updates = seconds + took, updates + after["step"] - before["step"]
    return seconds / updates if updates else None
