"""The codebook against a loop over numbers, over batches, ranks and checkpoints."""

import copy

import pytest
import torch
import torch.multiprocessing as mp
import torch.nn.functional as F
from torch import Tensor

from emkum.models.codebook import START_ROWS_PER_CODE, Codebook, spherical_kmeans

COUNT, WIDTH, DECAY = 6, 3, 0.8


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


def unit(*shape: int, seed: int | None = None) -> Tensor:
    generator = None if seed is None else torch.Generator().manual_seed(seed)
    return F.normalize(torch.randn(*shape, generator=generator, dtype=torch.float64), dim=-1)


def new_codebook(revive_below: float = 0.0, window: int = 5) -> Codebook:
    return Codebook(COUNT, WIDTH, DECAY, revive_below, window).double().train()


def started(**options: float) -> Codebook:
    """After as many vectors as k-means wants, in two batches of one update."""
    book = new_codebook(**options)
    for vectors in unit(START_ROWS_PER_CODE * COUNT, WIDTH, seed=1).chunk(2):
        book(vectors)
    book.begin_update(1)
    assert book.is_started()
    return book


def same(one: Codebook, other: Codebook) -> bool:
    theirs = other.state_dict()
    return all(torch.equal(value, theirs[name]) for name, value in one.state_dict().items())


def test_vectors_pass_until_kmeans_has_enough() -> None:
    book = new_codebook()
    first, second = unit(START_ROWS_PER_CODE * COUNT, WIDTH).split([20, 4])
    assert torch.equal(book(first), first)
    book.begin_update(1)
    assert not book.is_started()
    assert torch.equal(book(second), second)
    assert not book.is_started(), "codes move between updates alone"
    book.begin_update(2)
    assert book.is_started()
    torch.testing.assert_close(book.codes.norm(dim=1), torch.ones(COUNT, dtype=torch.float64))
    assert book.usage.sum().item() == pytest.approx(1)
    codes = book(first)
    assert all((codes[i] == book.codes).all(1).any() for i in range(20))


def test_kmeans_finds_separate_clusters() -> None:
    centers = torch.eye(4, dtype=torch.float64)
    vectors = F.normalize(centers.repeat_interleave(8, 0) + 0.05 * torch.randn(32, 4, dtype=torch.float64), dim=1)
    # Of several starts, some have a vector of each cluster.
    found = [spherical_kmeans(vectors, 4, 10, torch.Generator().manual_seed(start)) for start in range(20)]
    best = max(found, key=lambda codes: (vectors @ codes.T).amax(1).mean())
    assert ((centers @ best.T).amax(1) > 0.99).all()
    torch.testing.assert_close(best.norm(dim=1), torch.ones(4, dtype=torch.float64))
    means = F.normalize(vectors.view(4, 8, 4).sum(1), dim=1)
    torch.testing.assert_close((means @ best.T).amax(1), torch.ones(4, dtype=torch.float64))


def test_codes_follow_as_in_a_loop() -> None:
    book = started()
    codes = [code.clone() for code in book.codes]
    usage, sums = book.usage.tolist(), [row.clone() for row in book.sums]
    for update in range(2, 6):
        batches = [unit(7, WIDTH, seed=10 * update + i) for i in range(3)]
        counts, totals = [0] * COUNT, [torch.zeros(WIDTH, dtype=torch.float64) for _ in range(COUNT)]
        for vectors in batches:
            given = book(vectors)
            for vector, code in zip(vectors, given, strict=True):
                similarities = [float(vector @ c) for c in codes]
                nearest = similarities.index(max(similarities))
                torch.testing.assert_close(code, codes[nearest], rtol=1e-9, atol=0)
                counts[nearest] += 1
                totals[nearest] += vector
        book.begin_update(update)
        for j in range(COUNT):
            usage[j] = DECAY * usage[j] + (1 - DECAY) * counts[j] / 21
            sums[j] = DECAY * sums[j] + (1 - DECAY) * totals[j] / 21
            codes[j] = sums[j] / sums[j].norm()
        torch.testing.assert_close(book.codes, torch.stack(codes), rtol=1e-9, atol=1e-12)
        assert book.usage.tolist() == pytest.approx(usage)


def test_several_batches_of_an_update_count_as_one() -> None:
    whole, parts = started(revive_below=0.3), started(revive_below=0.3)
    for update in range(2, 5):
        vectors = unit(12, WIDTH, seed=update)
        whole.begin_update(update - 1)
        whole(vectors)
        for piece in vectors.chunk(4):
            parts.begin_update(update - 1)
            parts(piece)
        for book in (whole, parts):
            book.begin_update(update)
    for name, value in whole.state_dict().items():
        torch.testing.assert_close(value, parts.state_dict()[name], rtol=1e-9, atol=1e-12)


def test_validation_and_idle_updates_leave_no_trace() -> None:
    book = started()
    before = copy.deepcopy(book.state_dict())
    book.eval()(unit(9, WIDTH))
    book.begin_update(1)
    assert all(torch.equal(value, before[name]) for name, value in book.state_dict().items())
    book.train().begin_update(2)
    for name in ("codes", "usage", "sums"):
        torch.testing.assert_close(getattr(book, name), before[name], rtol=1e-12, atol=0)


@pytest.mark.parametrize("at", range(1, 6))
def test_it_goes_on_from_a_checkpoint(at: int) -> None:
    """Saved after an update's batches as training does, also amid what k-means waits for."""
    book = new_codebook(revive_below=0.5)
    resumed = None
    for update in range(6):
        for one in (book, resumed):
            if one is not None:
                one.begin_update(update)
                one(unit(8, WIDTH, seed=update))
        if update == at - 1:
            resumed = new_codebook(revive_below=0.5)
            # As fairseq does: the number of updates comes before the weights.
            resumed.begin_update(at)
            resumed.load_state_dict(book.state_dict())
    assert book.is_started() and same(book, resumed)


def test_dead_codes_are_put_on_the_latest_vectors() -> None:
    book = started(revive_below=0.4)
    with torch.no_grad():
        book.codes.copy_(F.normalize(torch.tensor([[1.0, 0.0, 0.0]]) + 1e-3 * torch.randn(COUNT, WIDTH), dim=1))
        book.usage.copy_(torch.tensor([0.5, 0.5, 0.0, 0.0, 0.0, 0.0]))
        book.sums.copy_(book.codes * book.usage[:, None])
    alive = book.codes[:2].clone()
    vectors = unit(COUNT, WIDTH)
    with torch.no_grad():
        book._keep(vectors)
    book.begin_update(2)
    torch.testing.assert_close(book.codes[:2], alive)
    placed = [int((vectors == code).all(1).nonzero()) for code in book.codes[2:]]
    assert len(set(placed)) == COUNT - 2, "each on another vector"
    assert book.usage[2:].tolist() == pytest.approx([1 / COUNT] * 4)
    torch.testing.assert_close(F.normalize(book.sums, dim=1), book.codes)


def test_vectors_that_are_not_finite_spoil_nothing() -> None:
    book, clean = started(revive_below=0.9), started(revive_below=0.9)
    vectors = unit(6, WIDTH)
    bad = torch.cat([vectors, torch.full((2, WIDTH), float("nan"), dtype=torch.float64)])
    book(bad)
    clean(vectors)
    torch.testing.assert_close(book.new_counts, clean.new_counts)
    torch.testing.assert_close(book.new_sums, clean.new_sums)
    for update in range(2, 5):
        book.begin_update(update)
    assert all(value.isfinite().all() for value in book.state_dict().values())
    torch.testing.assert_close(book.codes.norm(dim=1), torch.ones(COUNT, dtype=torch.float64))


def test_figures_by_hand() -> None:
    book = started(window=3)
    with torch.no_grad():
        book.codes.copy_(torch.cat([torch.eye(3), -torch.eye(3)]))
        book.usage.copy_(torch.tensor([0.5, 0.25, 0.25, 0.0, 0.0, 0.0]))
    assert book.figures()["perplexity"].item() == pytest.approx(2**1.5)
    for update, axes in ((2, [0, 1]), (3, [0]), (4, [2]), (5, [])):
        if axes:
            book(torch.eye(3, dtype=torch.float64)[axes])
        book.begin_update(update)
    # Within updates 3 to 5: the codes 0 and 2.
    assert book.figures()["codes_used"].item() == pytest.approx(100 * 2 / 6)


def test_averages_stay_in_float32() -> None:
    book = started().half()
    assert {value.dtype for value in book.state_dict().values()} == {torch.float32, torch.int64, torch.bool}
    assert Codebook(COUNT, WIDTH, DECAY, 0.0, 5).double().codes.dtype == torch.float64


# ----------------------------------------------------------------------------------------------------------------------
# Several processes
# ----------------------------------------------------------------------------------------------------------------------

STEPS, ROWS = 6, 12


def run_steps(rows: slice) -> dict[str, Tensor]:
    book = new_codebook(revive_below=0.5)
    for update in range(STEPS):
        book.begin_update(update)
        book(unit(ROWS, WIDTH, seed=update)[rows])
    book.begin_update(STEPS)
    assert book.is_started()
    return book.state_dict()


def worker(rank: int, world: int, port: int, queue: mp.SimpleQueue) -> None:
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", f"tcp://localhost:{port}", rank=rank, world_size=world)
    share = ROWS // world
    state = run_steps(slice(rank * share, (rank + 1) * share))
    queue.put({name: value.tolist() for name, value in state.items()})
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()


def test_two_ranks_have_the_same_codes_as_one_process(free_port: int) -> None:
    queue = mp.get_context("spawn").SimpleQueue()
    running = mp.spawn(worker, args=(2, free_port, queue), nprocs=2, join=False)
    states = [queue.get() for _ in range(2)]
    while not running.join():
        pass
    assert states[0] == states[1]
    for name, value in run_steps(slice(0, ROWS)).items():
        torch.testing.assert_close(torch.tensor(states[0][name], dtype=value.dtype), value, rtol=1e-9, atol=1e-12)
