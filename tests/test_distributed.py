"""The same loss and gradients on 1, 2 and 4 gloo processes as on one process with the whole batch."""

import pytest
import torch
import torch.multiprocessing as mp

from emkum.objectives import build_objectives
from emkum.outputs import Batch, Encoded, StudentOutput, TeacherOutput

ROWS, CAPTIONS, WIDTH, TARGET = 8, 2, 6, 5


def make_inputs() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(3)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64).float()

    # Rows 1 and 6 show the same image, on different ranks wherever there are several.
    ids = torch.arange(ROWS)
    ids[6] = ids[1]
    return {
        "image": draw(ROWS, WIDTH),
        "text": draw(ROWS * CAPTIONS, WIDTH),
        "target": draw(ROWS, TARGET),
        "weight": draw(TARGET, WIDTH),
        "ids": ids,
    }


def run_objective(name: str, inputs: dict, rows: slice) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Loss on some rows, and the gradients of a shared weight and of the logit scale, after two steps."""
    torch.manual_seed(0)
    objectives = build_objectives([name], {"kd_contrastive_bank_size": 12}, TARGET).train()
    weight = inputs["weight"].clone().requires_grad_()
    features = inputs["image"][rows], inputs["text"].view(ROWS, CAPTIONS, WIDTH)[rows].flatten(0, 1)
    captions = torch.arange(features[0].shape[0]).repeat_interleave(CAPTIONS)
    batch = Batch(inputs["ids"][rows], captions)
    for step in range(2):
        image, text = (part @ weight.T for part in features)
        encoded = Encoded(image[:, None])
        student = StudentOutput(encoded, encoded, image, text, image, text)
        loss = objectives[name](student, TeacherOutput(inputs["target"][rows] + step), batch).loss
    loss.backward()
    scale = [p.grad for p in objectives.parameters()]
    return loss.detach(), weight.grad, scale[0] if scale else torch.zeros(())


def worker(rank: int, world: int, port: int, names: list[str], queue: mp.SimpleQueue) -> None:
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", f"tcp://localhost:{port}", rank=rank, world_size=world)
    inputs, share = make_inputs(), ROWS // world
    for name in names:
        loss, *gradients = run_objective(name, inputs, slice(rank * share, (rank + 1) * share))
        # What DDP does with gradients, and logging with losses: average over ranks.
        for tensor in (loss, *gradients):
            torch.distributed.all_reduce(tensor)
        if rank == 0:
            queue.put((name, *(tensor.div(world).tolist() for tensor in (loss, *gradients))))
    torch.distributed.destroy_process_group()


@pytest.mark.parametrize("world", [2, 4])
def test_losses_and_gradients_equal_one_global_batch(world: int, free_port: int) -> None:
    names = ["itc", "kd_mse", "kd_contrastive"]
    inputs = make_inputs()
    context = mp.get_context("spawn")
    queue = context.SimpleQueue()
    mp.spawn(worker, args=(world, free_port, names, queue), nprocs=world)
    for _ in names:
        name, *got = queue.get()
        want = run_objective(name, inputs, slice(None))
        for ours, reference in zip(got, want, strict=True):
            torch.testing.assert_close(torch.tensor(ours), reference, rtol=1e-5, atol=1e-6, msg=name)
