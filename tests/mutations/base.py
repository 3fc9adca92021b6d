"""What a bug in the table is: changes to files of this tree, and the tests that should notice them."""

from dataclasses import dataclass

DISTRIBUTED = "emkum/distributed.py"
QUEUE = "emkum/layers/feature_queue.py"
EMA = "emkum/layers/ema.py"
SCALE = "emkum/layers/temperature.py"
CODES = "emkum/layers/nearest_code.py"
ITC = "emkum/objectives/image_text_contrast.py"
BANKS = "emkum/objectives/negative_banks.py"
KD = "emkum/objectives/knowledge_distillation.py"
REDUCED = "emkum/objectives/reduced_distillation.py"
CMLI = "emkum/objectives/late_interaction.py"
ITM = "emkum/objectives/matching.py"
MASKED = "emkum/objectives/masked_modeling.py"
DINO = "emkum/objectives/self_distillation.py"
WEIGHTS = "emkum/objectives/weights.py"
CODEBOOK = "emkum/models/codebook.py"
QUANTIZER = "emkum/models/quantizer.py"
GROUPS = "emkum/models/parameter_groups.py"
RETRIEVAL = "emkum/evaluation/retrieval.py"
RANKS = "emkum/evaluation/ranks.py"
EVALUATE = "emkum/commands/evaluate.py"
METERS = "user_dir/meters.py"
TASK = "user_dir/tasks/image_text.py"
STUDENT = "user_dir/models/image_text_student.py"
UPDATES = "user_dir/updates.py"

TRAPS = "tests/objectives/test_traps.py"
RUNS = "tests/integration/test_traps_in_runs.py"
KILL = "tests/integration/test_kill_and_resume.py::test_killed_and_resumed_equals_uninterrupted"
EMA_TESTS = "tests/layers/test_ema.py"
BANK_TESTS = "tests/objectives/test_negative_banks.py"
KD_TESTS = "tests/objectives/test_knowledge_distillation.py"
DINO_TESTS = "tests/objectives/test_self_distillation.py"
CODEBOOK_TESTS = "tests/models/test_codebook.py"
RETRIEVAL_TESTS = "tests/evaluation/test_retrieval.py"
METER_TESTS = "tests/user_dir/test_meters.py"

MOVES_ONCE = f"{RUNS}::test_average_and_center_move_once_an_update_of_four_batches"
CODES_MOVE_ONCE = f"{RUNS}::test_codes_move_once_an_update_of_four_batches"
CHECKPOINT = f"{RUNS}::test_a_checkpoint_has_everything_and_goes_on"


def ranks(variant: str) -> str:
    """The test of two ranks against one batch."""
    return f"{TRAPS}::test_two_ranks_are_one_batch[{variant}]"


def state(objective: str) -> str:
    """The test of an objective's state in checkpoints."""
    return f"{TRAPS}::test_state_is_in_checkpoints_and_goes_on_from_them[{objective}]"


@dataclass(frozen=True)
class Edit:
    """A text in a file and what is put in its place.

    Attributes:
        file: path within the tree.
        old: stands in the file `count` times.
        new: in its place.
    """

    file: str
    old: str
    new: str
    count: int = 1


@dataclass(frozen=True)
class Mutation:
    """A bug.

    Attributes:
        name: for `--only`.
        edits: all that is changed.
        tests: pytest's names of those that should notice.
    """

    name: str
    edits: tuple[Edit, ...]
    tests: tuple[str, ...]


def bug(name: str, file: str, old: str, new: str, *tests: str, count: int = 1) -> Mutation:
    """A mutation of one edit."""
    return Mutation(name, (Edit(file, old, new, count),), tests)


def not_persistent(name: str, file: str, end: str, *tests: str, count: int = 1) -> Mutation:
    """A buffer that checkpoints leave out; `end` is the call that registers it, or its end."""
    assert end.endswith(")")
    return bug(name, file, end, f"{end[:-1]}, persistent=False)", *tests, count=count)
