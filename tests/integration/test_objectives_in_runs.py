"""Every objective inside a whole run: real scenes, the real task and criterion, a real teacher of random weights."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from safetensors.torch import save_file

from emkum.errors import UserError
from emkum.models.student import joined
from emkum.objectives import OBJECTIVES
from tests.integration.conftest import STUDENT
from tests.integration.in_process import Run, make_run
from tests.objectives.target_files import write_target_files

# What an objective needs beside the defaults, and sizes that fit a test.
NEEDS: dict[str, dict[str, Any]] = {
    "kd_contrastive": {"kd_contrastive_bank_size": 20},
    "bank_itc": {"bank_itc_size": 20},
    "momentum_itc": {"momentum_itc_size": 20, "average_decay": 0.9},
    "dino": {
        "average_decay": 0.9,
        "average_end_decay": 1.0,
        "dino_crops": True,
        "multi_crop_number": 2,
        "dino_prototypes": 32,
        "dino_hidden": 16,
        "dino_bottleneck": 8,
    },
    "kd_reduced": {"kd_reduced_dim": 8, "student_width": 64, "student_heads": 1},
    "mim": {"patch_mask_min_block": 2},
}
IMAGE_ALONE = ("mim", "kd_patch")
TEACHER_WIDTH = 64
SMALL = {"shared_dropout": 0.1, "text_max_positions": 64}


@pytest.fixture(scope="module")
def classifier(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """A teacher with features, logits and as many patches as the student has."""
    torch.manual_seed(5)
    path = tmp_path_factory.mktemp("teacher") / "vit.safetensors"
    save_file(timm.create_model("test_vit").state_dict(), path)
    return {"teacher": "timm:test_vit", "teacher_weights": path, "teacher_image_size": 64}


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Centroids and codes of features as wide as the teacher's."""
    return write_target_files(tmp_path_factory.mktemp("files"), TEACHER_WIDTH, teacher=None)


@pytest.fixture
def start(scenes: Path, tmp_path: Path, classifier: dict[str, Any], files: dict[str, Any]) -> Callable[..., Run]:
    def run(objectives: str, **options: Any) -> Run:
        needs = {key: value for name in objectives.split(",") for key, value in NEEDS.get(name, {}).items()}
        return make_run(
            scenes, tmp_path, STUDENT | SMALL | classifier | files, objectives=objectives, **(needs | options)
        )

    return run


@pytest.mark.parametrize("name", OBJECTIVES)
def test_an_objective_learns_in_a_run(name: str, start: Callable[..., Run]) -> None:
    run = start(name)
    before = {key: value.clone() for key, value in run.model.state_dict().items()}
    for update in range(2):
        log = run.backward(run.batch(0, 8), update)
        assert torch.isfinite(log["loss"]) and f"{name}_loss" in log
        run.optimizer.clip_grad_norm(1.0)
        run.optimizer.step()
        run.optimizer.zero_grad()
    changed = [key for key, value in run.model.state_dict().items() if not torch.equal(value, before[key])]
    assert any(key.startswith("student.text_encoder") for key in changed) or name in IMAGE_ALONE
    assert any(key.startswith("student.image_encoder") for key in changed) or name == "mlm"
    run.model.eval()
    with torch.no_grad():
        loss, _, _ = run.criterion(run.model, run.batch(8, 16))
    assert torch.isfinite(loss)


def together(*names: str) -> str:
    return ",".join(names)


@pytest.mark.parametrize(
    "objectives",
    [
        "itc,kd_mse,kd_kl,kd_contrastive",
        "itc,cmli,itm,mlm,mim",
        "itc,momentum_itc,bank_itc,dino",
        "ranking,proximal_itc,target_cmli,kd_patch",
        "kd_reduced,kd_cluster,kd_vq",
    ],
)
def test_chunks_give_the_losses_and_gradients_of_the_whole_batch(objectives: str, start: Callable[..., Run]) -> None:
    """Without dropout; `tests/models/test_chunked.py` has it with the same random numbers."""
    still = {"shared_dropout": 0, "text_dropout": 0, "text_attention_dropout": 0}
    found = []
    for chunk in (0, 3):
        run = start(objectives, contrastive_chunk=chunk, **still)
        log = run.backward(run.batch(0, 8), 0)
        log = run.backward(run.batch(8, 16), 0)
        found.append((log, run.gradients(), dict(run.model.named_buffers())))
    (whole, gradients, buffers), (parts, ours, our_buffers) = found
    for key, value in whole.items():
        torch.testing.assert_close(parts[key], value, rtol=1e-5, atol=1e-4, msg=key)
    assert gradients.keys() == ours.keys()
    for key, value in gradients.items():
        scale = value.abs().max().item()
        torch.testing.assert_close(ours[key], value, rtol=1e-4, atol=1e-5 * max(scale, 1e-3), msg=key)
    for key, value in buffers.items():
        torch.testing.assert_close(our_buffers[key], value, rtol=1e-5, atol=1e-5, msg=key)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"objectives": "momentum_itc", "average_decay": 0}, "momentum_itc compares .* --average-decay"),
        ({"objectives": "dino", "multi_crop_number": 0}, "further crops of each image: give --multi-crop-number"),
        ({"objectives": "itc", "itc_weight_schedule": "step"}, "--itc-weight-schedule 'step' is unknown"),
        ({"objectives": "mim", "image_encoder": "timm:test_resnet"}, "the student has 1 and the teacher 16"),
        ({"objectives": "itc,cmli", "shared_kind": "mlp"}, "--shared-kind mlp gives the CLS token alone"),
        ({"objectives": "itc", "itc_layers": "hidden", "shared_kind": "none"}, "--itc-layers hidden needs"),
        ({"objectives": "mim", "teacher_image_size": 32}, "the student has 16 and the teacher 4"),
        ({"objectives": "momentum_itc", "average_end_decay": 1.0, "max_update": 0}, "give --max-update"),
        ({"objectives": "itc", "contrastive_chunk": 2, "image_encoder": "timm:test_resnet"}, "over the batch"),
        ({"objectives": "itc", "caption_max_tokens": 65}, "--caption-max-tokens 65 exceeds --text-max-positions 64"),
        ({"objectives": "itc", "freeze_text_all_but": 9}, "--freeze-text-all-but"),
    ],
)
def test_what_is_missing_is_said(options: dict[str, Any], said: str, start: Callable[..., Run]) -> None:
    with pytest.raises(UserError, match=said) as caught:
        start(options.pop("objectives"), **options)
    assert "\n" not in caught.value.message


def test_chunks_of_16_equal_a_batch_of_128_with_dropout_and_drop_path(
    start: Callable[..., Run], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Against one graph over the same chunks, so that dropout draws the same numbers."""

    def in_one_graph(encode: Callable, chunks: list, module: Any, length: int = 0, *others: Any, **more: Any) -> Any:
        parts = [encode(*chunk) for chunk in chunks]
        return joined(parts, length or parts[0].tokens.shape[1])

    noise = {"shared_dropout": 0.2, "shared_drop_path": 0.2, "image_drop_path": 0.2, "text_drop_path": 0.2}
    found = []
    for replaced in (False, True):
        if replaced:
            monkeypatch.setattr("user_dir.models.image_text_student.encode_in_chunks", in_one_graph)
        run = start("itc,kd_contrastive,cmli,momentum_itc", contrastive_chunk=16, batch_size=16, **noise)
        items = run.task.datasets["train"].__getitems__(list(range(32))) * 4
        items = [replace(item, image_id=number) for number, item in enumerate(items)]
        torch.manual_seed(7)
        log = run.backward(run.task.datasets["train"].collater(items), 0)
        found.append((log, run.gradients()))
    (ours, gradients), (whole, expected) = found
    for key in ("loss", "itc_loss", "kd_contrastive_loss", "cmli_loss", "momentum_itc_loss"):
        torch.testing.assert_close(ours[key], whole[key], rtol=1e-5, atol=1e-5, msg=key)
    assert gradients.keys() == expected.keys()
    for key, value in expected.items():
        atol = 1e-5 * max(value.abs().max().item(), 1e-3)
        torch.testing.assert_close(gradients[key], value, rtol=1e-4, atol=atol, msg=key)


def test_weights_follow_their_schedule(start: Callable[..., Run]) -> None:
    run = start(
        "itc,kd_mse",
        kd_mse_weight=2.0,
        kd_mse_weight_schedule="linear",
        kd_mse_weight_updates=4,
        itc_weight_schedule="cosine",
        itc_weight_end=0.5,
        max_update=10,
    )
    for update, (itc, mse) in {0: (1.0, 0.0), 2: (0.952254, 1.0), 5: (0.75, 2.0), 10: (0.5, 2.0)}.items():
        log = run.backward(run.batch(0, 8), update)
        expected = itc * log["itc_loss"] + mse * log["kd_mse_loss"]
        torch.testing.assert_close(log["loss"], expected, rtol=1e-5, atol=1e-5)
