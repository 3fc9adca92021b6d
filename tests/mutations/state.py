"""Bugs of what is kept from one update to the next, and from one process to the next."""

from tests.mutations.base import (
    BANK_TESTS,
    BANKS,
    CHECKPOINT,
    CODEBOOK,
    CODEBOOK_TESTS,
    CODES,
    CODES_MOVE_ONCE,
    DINO,
    DINO_TESTS,
    EMA,
    EMA_TESTS,
    ITM,
    KILL,
    MOVES_ONCE,
    QUEUE,
    REDUCED,
    STUDENT,
    TRAPS,
    UPDATES,
    Edit,
    Mutation,
    bug,
    not_persistent,
    state,
)

LOST_COUNTERS = [
    Mutation(
        "queue-position-is-an-int",
        (
            Edit(QUEUE, 'self.register_buffer("position", torch.zeros((), dtype=torch.int64))', "self.position = 0"),
            Edit(
                QUEUE,
                "self.position.copy_((self.position + features.shape[0]) % size)",
                "self.position = (self.position + features.shape[0]) % size",
            ),
        ),
        (
            f"{BANK_TESTS}::test_queue_wraps_around_and_survives_a_checkpoint",
            state("momentum_itc"),
            state("kd_contrastive"),
        ),
    ),
    bug(
        "bank-batches-is-an-int",
        BANKS,
        'self.register_buffer("pushes", torch.zeros((), dtype=torch.int64))',
        "self.pushes = 0",
        state("bank_itc"),
    ),
    bug("itm-draws-start-anew", ITM, "self._draws = int(self.draws)", "self._draws = 0", state("itm")),
    bug(
        "average-forgets-its-updates",
        EMA,
        "self._updates = int(self.updates)",
        "self._updates = 0",
        f"{EMA_TESTS}::test_a_restored_average_knows_its_updates",
    ),
    bug(
        "codebook-forgets-its-updates",
        CODEBOOK,
        "self._updates = int(self.updates)",
        "self._updates = 0",
        f"{TRAPS}::test_restored_codes_know_their_updates",
    ),
    bug("objectives-skip-an-update-on-resuming", UPDATES, "    model._begun = -1", "    pass", CHECKPOINT),
]

LOST_STATE = [
    not_persistent(
        "queue-features-not-persistent",
        QUEUE,
        'self.register_buffer("features", torch.zeros(size, width))',
        state("momentum_itc"),
    ),
    not_persistent(
        "queue-ids-not-persistent", QUEUE, "torch.full((size,), EMPTY, dtype=torch.int64))", state("kd_contrastive")
    ),
    not_persistent(
        "bank-ages-not-persistent",
        BANKS,
        'self.register_buffer("image_written", torch.zeros(config.size, dtype=torch.int64))',
        f"{KILL}[objectives]",
    ),
    not_persistent(
        "sample-bank-not-persistent",
        BANKS,
        "torch.zeros(setting.num_images, setting.contrast_width))",
        state("proximal_itc"),
        count=2,
    ),
    not_persistent(
        "center-not-persistent", DINO, 'self.register_buffer("center", torch.zeros(config.prototypes))', state("dino")
    ),
    not_persistent("pending-center-not-persistent", DINO, "torch.zeros(config.prototypes + 1))", state("dino")),
    not_persistent(
        "codebook-sums-not-persistent",
        CODEBOOK,
        'self.register_buffer("new_sums", torch.zeros(count, width))',
        f"{KILL}[quantizer]",
    ),
]

AVERAGE_EACH_BATCH = [
    bug(
        "average-follows-each-call",
        EMA,
        "        if num_updates == last:\n            return\n",
        "",
        f"{EMA_TESTS}::test_once_an_update_however_often_it_is_called",
        MOVES_ONCE,
    ),
    Mutation(
        "student-average-follows-each-batch",
        (
            Edit(UPDATES, "if num_updates != self._begun:", "if True:"),
            Edit(
                STUDENT,
                "self.ema.follow(self.student, num_updates, decay)",
                "self.ema.follow(self.student, int(self.ema.updates) + 1, decay)",
            ),
        ),
        (MOVES_ONCE,),
    ),
    bug(
        "dino-head-follows-each-batch",
        DINO,
        "        if self.training:\n            self._add_to_center(teacher_logits)\n",
        "        if self.training:\n            self._add_to_center(teacher_logits)\n"
        "            self.average_head.follow(self.head, int(self.average_head.updates) + 1, 0.5)\n",
        MOVES_ONCE,
    ),
    bug(
        "reduced-map-follows-each-call",
        REDUCED,
        "self.teacher_map.follow(self.student_map, num_updates)",
        "self.teacher_map.follow(self.student_map, int(self.teacher_map.updates) + 1)",
        "tests/objectives/test_reduced_distillation.py::test_teacher_map_follows_once_an_update",
    ),
]

CENTER_EACH_BATCH = [
    bug("objectives-begin-each-batch", UPDATES, "if num_updates != self._begun:", "if True:", MOVES_ONCE),
    bug(
        "center-moves-each-batch",
        DINO,
        "        self.pending += all_gather(own[None]).sum(0)\n",
        "        self.pending += all_gather(own[None]).sum(0)\n"
        "        mean = self.pending[:-1] / self.pending[-1]\n"
        "        self.center.lerp_(mean, 1 - self.config.center_decay)\n"
        "        self.pending.zero_()\n",
        f"{DINO_TESTS}::test_the_center_moves_once_an_update",
        MOVES_ONCE,
    ),
    bug(
        "codes-move-each-call",
        CODEBOOK,
        "        if num_updates == last:\n            return\n",
        "",
        CODES_MOVE_ONCE,
    ),
    bug(
        "codes-move-each-batch",
        CODEBOOK,
        "            self._count(vectors, codes)\n",
        "            self._count(vectors, codes)\n            self._move()\n",
        f"{CODEBOOK_TESTS}::test_several_batches_of_an_update_count_as_one",
        CODES_MOVE_ONCE,
    ),
]

FROZEN_PARTS = [
    bug(
        "checkpoints-without-frozen-parts",
        STUDENT,
        "    def begin_update(self, num_updates: int) -> None:\n",
        "    def state_dict(self, *arguments: Any, **options: Any) -> Any:\n"
        "        frozen = {name for name, p in self.named_parameters() if not p.requires_grad}\n"
        "        found = super().state_dict(*arguments, **options)\n"
        "        return {name: value for name, value in found.items() if name not in frozen}\n\n"
        "    def begin_update(self, num_updates: int) -> None:\n",
        CHECKPOINT,
    ),
    bug(
        "checkpoints-without-the-average",
        EMA,
        '    def train(self, mode: bool = True) -> "EmaCopy":\n',
        "    def state_dict(self, *arguments: object, **options: object) -> object:\n"
        '        return options.get("destination", {})\n\n'
        '    def train(self, mode: bool = True) -> "EmaCopy":\n',
        CHECKPOINT,
        f"{EMA_TESTS}::test_a_restored_average_knows_its_updates",
    ),
    not_persistent(
        "checkpoints-without-fitted-codes",
        CODES,
        "self.register_buffer(name, torch.zeros(shape))",
        "tests/objectives/test_target_codes.py::test_a_checkpoint_does_without_the_file",
    ),
]
