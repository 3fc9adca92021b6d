"""Bugs that training code is prone to, as changes to this tree, and the tests that should notice each."""

from tests.mutations.across_ranks import FIRST_RANKS_ROWS, GRADIENTS, LABEL_OFFSETS, ONE_PROCESS
from tests.mutations.base import Mutation
from tests.mutations.state import AVERAGE_EACH_BATCH, CENTER_EACH_BATCH, FROZEN_PARTS, LOST_COUNTERS, LOST_STATE
from tests.mutations.values import ONE_CAPTION, ZEROS

# What each list is about, in the words of the list of traps.
TRAPS_AND_MUTATIONS: dict[str, list[Mutation]] = {
    "gathered features sliced alike on every rank": FIRST_RANKS_ROWS,
    "a position as a Python int, lost on resuming": LOST_COUNTERS,
    "queues and other state not persistent": LOST_STATE,
    "moving average updated once a batch instead of once an update": AVERAGE_EACH_BATCH,
    "center or codes updated once a batch instead of once an update": CENTER_EACH_BATCH,
    "gradient off by the number of ranks with a correct forward": GRADIENTS,
    "label offset by rank wrong": LABEL_OFFSETS,
    "a variable missing where there is one process": ONE_PROCESS,
    "retrieval scored with one caption an image": ONE_CAPTION,
    "checkpoints that leave out frozen parts and load strictly": FROZEN_PARTS,
    "a number of 0 taken for none": ZEROS,
}
MUTATIONS: dict[str, Mutation] = {m.name: m for mutations in TRAPS_AND_MUTATIONS.values() for m in mutations}
