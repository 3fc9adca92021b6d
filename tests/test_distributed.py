"""The same losses, gradients and state on 1, 2 and 4 gloo processes as on one process with the whole batch."""

from pathlib import Path

import pytest
import torch
import torch.multiprocessing as mp

from emkum.objectives import OBJECTIVES, build_objectives
from tests.objectives.cases import CAPTIONS, OPTIONS, SETTING, after_updates, make_case, part_of
from tests.objectives.target_files import write_target_files

IMAGES, STEPS = 8, 2


def run_objective(name: str, options: dict[str, object], rows: slice) -> dict[str, torch.Tensor]:
    """Some rows of two batches through an objective: last loss, gradients and buffers after, by name."""
    torch.manual_seed(0)
    objective = build_objectives([name], options, SETTING)[name].double().train()
    return after_updates(objective, [part_of(make_case(IMAGES, seed=step), rows) for step in range(STEPS)])


def worker(rank: int, world: int, port: int, options: dict[str, object], queue: mp.SimpleQueue) -> None:
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", f"tcp://localhost:{port}", rank=rank, world_size=world)
    share = IMAGES // world
    for name in OBJECTIVES:
        found = run_objective(name, options, slice(rank * share, (rank + 1) * share))
        gathered = {}
        for key, value in found.items():
            parts = [torch.empty_like(value) for _ in range(world)]
            torch.distributed.all_gather(parts, value.contiguous())
            if key.startswith("input"):
                # Of losses that are averaged over ranks; crops come view by view.
                views = 2 if ".crops" in key or key.startswith("input crops") else 1
                pieces = [part.chunk(views) for part in parts]
                gathered[key] = torch.cat([torch.cat(view) for view in zip(*pieces, strict=True)]) / world
            elif key.startswith("buffer"):
                assert all(torch.equal(part, parts[0]) for part in parts), f"{name}: {key} differs between ranks"
                gathered[key] = parts[0]
            else:
                gathered[key] = torch.stack(parts).mean(0)
        if rank == 0:
            queue.put((name, {key: value.tolist() for key, value in gathered.items()}))
    torch.distributed.destroy_process_group()


@pytest.mark.parametrize("world", [2, 4])
def test_losses_gradients_and_state_equal_one_global_batch(world: int, free_port: int, tmp_path: Path) -> None:
    assert IMAGES % world == 0 and CAPTIONS > 1
    options = OPTIONS | write_target_files(tmp_path)
    context = mp.get_context("spawn")
    queue = context.Queue()
    running = mp.spawn(worker, args=(world, free_port, options, queue), nprocs=world, join=False)
    results = {}
    while len(results) < len(OBJECTIVES) and not running.join(timeout=0.1):
        while not queue.empty():
            name, found = queue.get()
            results[name] = found
    while not queue.empty():
        name, found = queue.get()
        results[name] = found
    for name in OBJECTIVES:
        want = run_objective(name, options, slice(0, IMAGES))
        assert results[name].keys() == want.keys()
        assert any(key.startswith("input") for key in want)
        for key, reference in want.items():
            ours = torch.tensor(results[name][key], dtype=reference.dtype)
            torch.testing.assert_close(
                ours, reference, rtol=1e-5, atol=1e-7, msg=lambda text, n=name, k=key: f"{n}, {k}: {text}"
            )
