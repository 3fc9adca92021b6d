"""Two gloo processes with half the batch each, under fairseq's own wrapper, learn what one process learns."""

import pytest
import torch
import torch.multiprocessing as mp
from fairseq.distributed import LegacyDistributedDataParallel

from emkum.models.builders import build_student
from emkum.objectives import Setting, build_objectives
from user_dir.models.image_text_student import ImageTextStudentModel

IMAGES, CAPTIONS, LENGTH, VOCABULARY = 6, 2, 7, 40


def make_model(chunk: int = 0) -> ImageTextStudentModel:
    torch.manual_seed(0)
    options = {"student_size": "tiny", "image_size": 32, "image_patch_size": 8, "text_dropout": 0.0}
    student = build_student(options | {"text_attention_dropout": 0.0}, VOCABULARY)
    setting = Setting(width=student.width, contrast_width=student.contrast_width)
    return ImageTextStudentModel(student, build_objectives(["itc"], {}, setting), chunk=chunk).train()


def make_batch(images: slice) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    pixels = torch.randint(0, 256, (IMAGES, 3, 32, 32), dtype=torch.uint8, generator=generator)
    text = torch.randint(4, VOCABULARY, (IMAGES, CAPTIONS, LENGTH), generator=generator)
    text[::2, 1, 5:] = 1
    chosen = text[images].flatten(0, 1)
    rows = torch.arange(IMAGES)[images]
    return {
        "image": pixels[images],
        "text": chosen,
        "padding_mask": chosen.eq(1),
        "image_ids": rows,
        "caption_image": torch.arange(len(rows)).repeat_interleave(CAPTIONS),
    }


def learn(model: torch.nn.Module, images: slice) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    outputs, _ = model(**make_batch(images))
    outputs["itc"].loss.backward()
    inner = model.module if hasattr(model, "module") else model
    gradients = {name: p.grad for name, p in inner.named_parameters() if p.grad is not None}
    return outputs["itc"].loss.detach(), gradients


def worker(rank: int, port: int, chunk: int, queue: mp.SimpleQueue) -> None:
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", f"tcp://localhost:{port}", rank=rank, world_size=2)
    model = LegacyDistributedDataParallel(make_model(chunk), process_group=torch.distributed.group.WORLD)
    half = IMAGES // 2
    loss, gradients = learn(model, slice(rank * half, (rank + 1) * half))
    model.all_reduce_grads()
    torch.distributed.all_reduce(loss)
    if rank == 0:
        queue.put((loss.item() / 2, {name: gradient.numpy() for name, gradient in gradients.items()}))
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()


@pytest.mark.parametrize("chunk", [0, 2])
def test_itc_loss_and_gradients_of_two_processes_equal_one(chunk: int, free_port: int) -> None:
    queue = mp.get_context("spawn").Queue()
    context = mp.spawn(worker, args=(free_port, chunk, queue), nprocs=2, join=False)
    loss, gradients = queue.get(timeout=120)
    context.join()
    want_loss, want = learn(make_model(), slice(None))
    assert abs(loss - want_loss.item()) < 1e-5
    assert gradients.keys() == want.keys() and len(want) > 30
    for name, gradient in want.items():
        torch.testing.assert_close(torch.from_numpy(gradients[name]), gradient, rtol=1e-4, atol=1e-6, msg=name)
