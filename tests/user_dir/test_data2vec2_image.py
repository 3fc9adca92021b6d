"""Self-supervised image pretraining with fairseq's own Data2Vec 2, through the real commands."""

import json
import os
import subprocess
import sys
from dataclasses import fields, replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
from fairseq import options

import user_dir.models.data2vec2_image as pretraining
import user_dir.tasks.image_pretraining as task
from emkum.data.images import ImageDataset, collate
from emkum.data.shards import open_split
from emkum.data.transforms import ImageTransform
from emkum.errors import UserError
from emkum.models.data2vec2_checkpoints import image_encoder_from_checkpoint

ROOT = Path(__file__).resolve().parents[2]
SIDE, UPDATES = 32, 16
TINY = pretraining.Data2Vec2Config(
    embed_dim=48, depth=2, prenet_depth=1, num_heads=2, input_size=SIDE, patch_size=4, clone_batch=2,
    average_top_k_layers=2, recon_loss=1.0, decoder_dim=16, decoder_layers=1, decoder_groups=4,
    ema_decay=0.9, ema_end_decay=0.99, ema_anneal_end_step=10,
)  # fmt: skip


@pytest.fixture(autouse=True)
def one_thread():
    torch.manual_seed(0)
    torch.set_num_threads(1)


@pytest.fixture(scope="module")
def scenes(run_prepare, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("data") / "scenes"
    run_prepare("scenes", "--num-images", 40, "--seed", 1, "--out", folder)
    return folder


def train(scenes: Path, save_dir: Path, *arguments: str, updates: int = UPDATES) -> subprocess.CompletedProcess:
    d2v = [f"--d2v-{item.name.replace('_', '-')}={getattr(TINY, item.name)}" for item in fields(TINY)]
    command = [
        sys.executable, "-m", "fairseq_cli.train", str(scenes), "--user-dir", str(ROOT / "user_dir"), "--cpu",
        "--task=image_pretraining", "--arch=data2vec2_image", "--criterion=model", *d2v,
        "--optimizer=grouped_adamw", "--lr=0.003", "--batch-size=16", f"--max-update={updates}", "--num-workers=0",
        "--disable-validation", "--no-epoch-checkpoints", "--log-format=json", "--log-interval=4", "--seed=3",
        "--log-keys=['target_var', 'pred_var']", "--save-dir", str(save_dir), *arguments,
    ]  # fmt: skip
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.run(command, env=environment, cwd=save_dir.parent, capture_output=True, text=True)


@pytest.fixture(scope="module")
def run(scenes, tmp_path_factory) -> tuple[Path, str]:
    """A finished run's checkpoint and its log."""
    save_dir = tmp_path_factory.mktemp("run") / "checkpoints"
    result = train(scenes, save_dir)
    log = result.stdout + result.stderr
    assert result.returncode == 0, log
    return save_dir / "checkpoint_last.pt", log


def logged(log: str) -> list[dict[str, str]]:
    lines = [line.split(" | ")[-1] for line in log.splitlines() if "| train_inner |" in line]
    return [json.loads(line) for line in lines]


def test_options_collide_with_none_of_fairseq():
    """fairseq's parser drops the second of two options of one name without a word."""
    fairseq_own = {action.dest for action in options.get_training_parser()._actions}
    seen: set[str] = set()
    for config in (pretraining.Data2Vec2ImageConfig, task.ImagePretrainingConfig):
        # Those that take fairseq's own value are no options of ours; the folder is positional.
        own = {item.name for item in fields(config) if not str(item.default).startswith("${")} - {"_name", "data"}
        assert own.isdisjoint(fairseq_own), own & fairseq_own
        assert own.isdisjoint(seen), own & seen
        seen |= own
    assert "d2v_embed_dim" in seen and "crop_min_scale" in seen


def test_training_lowers_the_loss(run):
    records = logged(run[1])
    losses = [float(record["loss"]) for record in records]
    assert int(records[-1]["num_updates"]) == UPDATES and losses[-1] < 0.9 * losses[0], losses
    assert float(records[-1]["target_var"]) > 0.1
    assert "Warning" not in run[1], run[1]


def test_checkpoint_is_that_of_data2vec2(run):
    path, _ = run
    checkpoint = torch.load(path, weights_only=True)
    model = pretraining.Data2Vec2ImageModel(pretraining.fairseq_config(TINY, seed=3, max_update=UPDATES))
    model.load_state_dict(checkpoint["model"])
    model.eval()
    encoder = image_encoder_from_checkpoint(path).eval()
    images = torch.randint(0, 256, (3, 3, SIDE, SIDE), dtype=torch.uint8)
    mean, std = (255 * torch.tensor(values).view(3, 1, 1) for values in (encoder.mean, encoder.std))
    with torch.no_grad():
        expected = model.extract_features(images, remove_extra_tokens=False)
        actual = encoder((images - mean) / std).tokens
    torch.testing.assert_close(actual, expected["x"], rtol=0, atol=1e-5)
    assert encoder.num_heads == TINY.num_heads and encoder.num_layers == 3 and encoder.image_size == SIDE
    moved = [not torch.equal(model.ema.fp32_params[name], value) for name, value in model.named_parameters()
             if name.startswith("blocks.")]  # fmt: skip
    assert all(moved), "the teacher is a copy of the student"


def test_resuming_equals_an_uninterrupted_run(run, scenes, tmp_path):
    for updates in (5, UPDATES):  # five updates end amid the third epoch, which has two
        result = train(scenes, tmp_path / "resumed", updates=updates)
        assert result.returncode == 0, result.stderr
    whole, resumed = (
        torch.load(path, weights_only=True)["model"] for path in (run[0], tmp_path / "resumed" / "checkpoint_last.pt")
    )
    for name, value in whole.items():
        pairs = [(value, resumed[name])] if name != "_ema" else [(value[key], resumed[name][key]) for key in value]
        assert all(torch.equal(a, b) for a, b in pairs), name


def test_features_under_autocast():
    cfg = pretraining.fairseq_config(TINY, seed=1, max_update=10)
    model = pretraining.Data2Vec2ImageModel(cfg, autocast="bfloat16").train()
    images = torch.randint(0, 256, (4, 3, SIDE, SIDE), dtype=torch.uint8)
    for _ in range(2):
        losses = model(image=images)["losses"]
        assert set(losses) == {"cls", "recon", "IMAGE_regression"}
        sum(loss.float().mean() for loss in losses.values()).backward()
        model.set_num_updates(model.num_updates + 1)
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters() if p.requires_grad)
    assert all(value.dtype == torch.float32 for value in model.ema.fp32_params.values())


def test_spread_over_devices_is_that_of_all_tokens(monkeypatch):
    mine, theirs = torch.randn(6, 5), 3 + 2 * torch.randn(6, 5)
    expected = torch.sqrt(torch.cat([mine, theirs]).var(dim=0) + 1e-6).mean()
    other = iter([torch.tensor(6.0), theirs.sum(0), theirs.pow(2).sum(0)])
    monkeypatch.setattr(dist, "is_initialized", lambda: True)
    monkeypatch.setattr(dist, "all_reduce", lambda tensor: tensor.add_(next(other)))
    torch.testing.assert_close(pretraining.Data2Vec2ImageModel.compute_var(mine), expected)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_heads": 5}, "--d2v-embed-dim 48 is no multiple of --d2v-num-heads 5"),
        ({"decoder_dim": 18}, "--d2v-decoder-dim 18 is no multiple of --d2v-decoder-groups 4"),
        ({"input_size": 30}, "--d2v-input-size 30 is no multiple of --d2v-patch-size 4"),
        ({"average_top_k_layers": 3}, "want 1 to --d2v-depth 2"),
        ({"embed_dim": 64}, "needs --d2v-embed-dim 48"),
    ],
)
def test_options_that_do_not_go_together(change, message):
    with pytest.raises(UserError, match=message):
        pretraining.fairseq_config(replace(TINY, **change), seed=1, max_update=1)


def test_crops_depend_on_seed_epoch_and_index_alone(scenes):
    def items(seed: int, epoch: int) -> torch.Tensor:
        dataset = ImageDataset(open_split(scenes, "train"), ImageTransform(SIDE, 0.3, flip=True), seed)
        dataset.set_epoch(epoch)
        return torch.stack([dataset[np.int64(i)].views[0] for i in range(4)])

    assert torch.equal(items(1, 1), items(1, 1))
    assert not torch.equal(items(1, 1), items(1, 2))
    assert not torch.equal(items(1, 1), items(2, 1))


def test_collate(scenes):
    dataset = ImageDataset(open_split(scenes, "valid"), ImageTransform(SIDE))
    batch = collate([dataset[2], dataset[0]])
    assert batch["id"].tolist() == [2, 0] and batch["nsentences"] == batch["ntokens"] == 2
    image = batch["net_input"]["image"]
    assert image.shape == (2, 3, SIDE, SIDE) and image.dtype == torch.uint8
    assert collate([]) == {}
