"""`emkum model info`: parts, operations and memory against counts by hand, on recipes and checkpoints."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

# What `--user-dir` registers; fairseq imports these itself only where nobody has imported the folder before.
import user_dir.models.data2vec2_image
import user_dir.models.image_text_student
import user_dir.tasks.image_text  # noqa: F401
from emkum.cli import main
from emkum.commands.model import read_recipe_source, typed
from emkum.errors import UserError
from emkum.layers.ema import EmaCopy
from emkum.models.builders import Targets, build_student
from emkum.models.model_info import (
    InputSizes,
    activation_bytes,
    count_flops,
    describe_values,
    estimate_memory,
    part_tree,
    saved_bytes,
    student_flops,
    without_memory,
)
from emkum.models.parameter_groups import FreezeConfig, freeze

VOCABULARY = 50
SMALL = {
    "student_width": 16, "student_heads": 2, "image_size": 8, "image_patch_size": 2, "image_layers": 2,
    "text_layers": 3, "text_max_positions": 12, "shared_layers": 1,
}  # fmt: skip
SIZES = InputSizes(image_size=8, tokens=5, captions=2)


def small_student(targets: Targets | None = None, **options: Any) -> nn.Module:
    with without_memory():
        return build_student(SMALL | options, VOCABULARY, targets or Targets(prediction=6), pretrained=False)


# ----------------------------------------------------------------------------------------------------------------------
# Parameters
# ----------------------------------------------------------------------------------------------------------------------


def test_parts_sum_up_and_are_told_apart() -> None:
    student = small_student()
    freeze(student, FreezeConfig(embeddings=True, text_all_but=1))
    tree = part_tree(student, "student")
    assert tree.parameters == sum(p.numel() for p in student.parameters())
    assert tree.trainable == sum(p.numel() for p in student.parameters() if p.requires_grad)
    for part in (tree, *tree.parts, *tree.parts[0].parts):
        if part.parts:
            assert part.parameters == sum(inner.parameters for inner in part.parts), part.name
            assert part.frozen == sum(inner.frozen for inner in part.parts), part.name
    parts = {part.name: part for part in tree.parts}
    assert set(parts) == {"image encoder", "text encoder", "after", "shared encoder", "heads"}
    assert parts["image encoder"].kind == "Data2Vec2ImageEncoder" and parts["after"].kind == ""
    block = 4 * 16 * 16 + 4 * 16 + 2 * 4 * 16 * 16 + 5 * 16 + 4 * 16
    image = {part.name: (part.parameters, part.trainable) for part in parts["image encoder"].parts}
    # Fixed positions are parameters that do not learn; a CLS token and a norm do.
    assert image == {
        "embedding": (16 * 12 + 16, 0),
        "positions, tokens, norms": (16 * 16 + 3 * 16, 3 * 16),
        "blocks 1 to 2": (2 * block, 2 * block),
    }
    text = {part.name: (part.parameters, part.trainable) for part in parts["text encoder"].parts}
    assert text["embedding"] == (VOCABULARY * 16, 0)
    assert text["blocks 1 to 2"] == (2 * block, 0) and text["block 3"] == (block, block)
    assert {part.name: part.parameters for part in parts["heads"].parts} == {"prediction": 2 * 16 + 16 * 6 + 6}


def test_levels_end_where_they_are_told_to() -> None:
    copy = EmaCopy(small_student(), 0.9)
    tree = part_tree(copy, "moving average", levels=0)
    assert tree.parts == () and tree.trainable == 0 and tree.frozen == part_tree(small_student(), "s").parameters


def test_a_base_model_takes_no_memory() -> None:
    with without_memory():
        student = build_student({}, 30_522, Targets(prediction=0), pretrained=False)
    assert {tensor.device.type for tensor in (*student.parameters(), *student.buffers())} == {"meta"}
    assert sum(parameter.numel() for parameter in student.parameters()) > 100e6


# ----------------------------------------------------------------------------------------------------------------------
# Operations
# ----------------------------------------------------------------------------------------------------------------------


def block_flops(tokens: int, width: int = 16) -> int:
    projections = tokens * (4 * width * width + 2 * width * 4 * width)
    attention = 2 * tokens * tokens * width
    return 2 * (projections + attention)


@pytest.mark.parametrize("attention", ["fused", "stock"])
def test_operations_against_a_count_by_hand(attention: str) -> None:
    student = small_student(student_attention=attention).eval()
    head = 2 * 16 * 6
    assert student_flops(student, SIZES) == {
        # 16 patches of 2 x 2 x 3 values and a CLS token through two blocks and the shared one.
        "image": 2 * 16 * 12 * 16 + 3 * block_flops(17) + head,
        "caption": 4 * block_flops(5) + head,
    }


def test_what_a_sound_costs() -> None:
    silent, hears = small_student().eval(), small_student(audio_encoder="data2vec2", audio_conv_width=4).eval()
    few, more = (student_flops(hears, replace(SIZES, samples=samples)) for samples in (4000, 8000))
    assert few.keys() == {"image", "caption", "sound"} and 1.9 * few["sound"] < more["sound"] < 2.5 * few["sound"]
    assert student_flops(hears, SIZES) == student_flops(silent, SIZES)
    assert activation_bytes(hears, replace(SIZES, samples=4000), 4) > 1.1 * activation_bytes(hears, SIZES, 4)


def test_operations_of_a_product() -> None:
    left, right = torch.ones(3, 4), torch.ones(4, 5)
    assert count_flops(lambda: left @ right) == 2 * 3 * 4 * 5


# ----------------------------------------------------------------------------------------------------------------------
# Memory
# ----------------------------------------------------------------------------------------------------------------------


def perceptron() -> nn.Sequential:
    with torch.device("meta"):
        return nn.Sequential(nn.Linear(3, 8), nn.GELU(), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 2))


def test_saved_tensors_against_a_count_by_hand() -> None:
    module = perceptron()
    inputs = torch.empty(10, 3, device="meta")
    # The input, what goes into and comes out of GELU, and the output of ReLU, which the last map shares with it.
    assert saved_bytes(module, lambda: module(inputs)) == 4 * 10 * (3 + 8 + 8 + 8)
    module[0].requires_grad_(False)
    module[2].requires_grad_(False)
    # Nothing before the last map is needed.
    assert saved_bytes(module, lambda: module(inputs)) == 4 * 10 * 8
    assert saved_bytes(module.requires_grad_(False), lambda: module(inputs)) == 0


def test_a_storage_counts_once_and_parameters_do_not() -> None:
    module = perceptron()
    inputs = torch.empty(10, 8, device="meta", requires_grad=True)

    def run() -> Tensor:
        halves = inputs[:, :4] * inputs[:, 4:]
        return (inputs @ module[2].weight.T).sum() + halves.sum() + (inputs * module[2].bias).sum()

    assert saved_bytes(module, run) == 4 * 10 * 8


def test_fused_attention_keeps_no_matrix() -> None:
    rows, heads, tokens, width = 2, 3, 50, 4
    qkv = torch.empty(3, rows, heads, tokens, width, device="meta", requires_grad=True)
    bias = torch.empty(1, heads, tokens, tokens, device="meta")
    size = 4 * rows * heads * tokens

    def run(**options: Any) -> Tensor:
        return F.scaled_dot_product_attention(*qkv.unbind(0), **options)

    # Queries, keys and values, which are one storage; output; one number a row.
    assert saved_bytes(nn.Identity(), run) == size * (3 * width + width + 1)
    assert saved_bytes(nn.Identity(), lambda: run(dropout_p=0.5)) == size * (4 * width + 1)
    assert saved_bytes(nn.Identity(), lambda: run(attn_mask=bias)) == size * (4 * width + 1) + bias.nbytes
    assert run().shape == (rows, heads, tokens, width)


def test_activations_are_linear_in_the_batch() -> None:
    student = small_student(text_dropout=0.1, text_attention_dropout=0.1).train()

    def run() -> None:
        student.encode_image(SIZES.images(7))
        student.encode_text(SIZES.texts(14))

    assert activation_bytes(student, SIZES, 7) == pytest.approx(saved_bytes(student, run), rel=1e-3)
    student.eval()
    activation_bytes(student, SIZES, 7)
    assert not student.training


def test_activations_are_those_of_a_real_forward() -> None:
    torch.manual_seed(0)
    options = SMALL | {"text_dropout": 0.0, "text_attention_dropout": 0.0}
    student = build_student(options, VOCABULARY, Targets(prediction=6), pretrained=False).train()
    images = torch.zeros(6, 3, 8, 8, dtype=torch.uint8)
    ids = torch.full((12, 5), 4)

    def run() -> None:
        student.encode_image(images)
        student.encode_text(ids)

    meta = small_student(text_dropout=0.0, text_attention_dropout=0.0)
    assert activation_bytes(meta, SIZES, 6) == pytest.approx(saved_bytes(student, run), rel=0.02)


def test_recomputed_activations_are_not_kept() -> None:
    kept = activation_bytes(small_student(), SIZES, 64)
    assert activation_bytes(small_student(student_checkpoint_activations=True), SIZES, 64) < 0.5 * kept


def test_memory_counts_everything_trained_and_kept() -> None:
    student = small_student()
    freeze(student, FreezeConfig(image_all_but=0))
    model = nn.ModuleDict({"student": student, "average": EmaCopy(student, 0.9)})
    memory = estimate_memory(model, student, SIZES, 3)
    total = sum(parameter.numel() for parameter in student.parameters())
    trainable = sum(parameter.numel() for parameter in student.parameters() if parameter.requires_grad)
    assert 0 < trainable < total
    assert memory.weights == 2 * 4 * total
    assert memory.gradients == 4 * trainable and memory.moments == 8 * trainable
    # Mean and standard deviation of three channels, and the number of updates.
    assert memory.buffers == 2 * 4 * 6 + 8
    assert memory.activations == activation_bytes(student, SIZES, 3) > 0
    assert memory.total == memory.weights + memory.buffers + 12 * trainable + memory.activations
    assert activation_bytes(small_student(), SIZES, 3) > 1.2 * memory.activations


def test_values_are_described() -> None:
    assert describe_values(torch.tensor([-3.0, 0.0, 1.0, 2.0])) == pytest.approx(
        {
            **{"mean": 0.0, "std": 3.5**0.5, "min": -3.0, "max": 2.0},
            **{"absolute_mean": 1.5, "absolute_std": 1.25**0.5, "absolute_min": 0.0, "absolute_max": 3.0},
        }
    )


# ----------------------------------------------------------------------------------------------------------------------
# The command
# ----------------------------------------------------------------------------------------------------------------------

RECIPE = {"task": "image_text", "arch": "image_text_student", "criterion": "multi_objective", "objectives": "itc"}
OPTIONS = RECIPE | SMALL | {"batch_size": 8, "caption_per_image": 2, "caption_max_tokens": 5}


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    path = tmp_path / "small.yaml"
    path.write_text(json.dumps(OPTIONS))
    return path


@pytest.fixture
def checkpoint(tmp_path: Path) -> Callable[..., Path]:
    """A function that saves what training would, with a scale of 1 ... D and changed options."""

    def save(**changes: Any) -> Path:
        torch.manual_seed(3)
        student = build_student(SMALL, VOCABULARY, Targets(prediction=6), pretrained=False)
        student.after["token_types"].scale.data.copy_(torch.arange(1.0, 17))
        state = {f"student.{name}": value for name, value in student.state_dict().items()}
        model = {"_name": "image_text_student", "objectives": "itc"} | SMALL | changes
        task = {"data": "not/there", "caption_tokenizer": None, "caption_max_tokens": 5, "caption_per_image": 1}
        content = {"cfg": {"model": model, "task": task, "dataset": {"batch_size": 8}}, "model": state}
        path = tmp_path / "run" / "checkpoint_last.pt"
        path.parent.mkdir(exist_ok=True)
        torch.save(content, path)
        return path

    return save


def info(*words: object) -> None:
    main(["model", "info", *map(str, words)])


def figures(tmp_path: Path, *words: object) -> dict[str, Any]:
    info(*words, "--json", tmp_path / "info.json")
    return json.loads((tmp_path / "info.json").read_text())


def test_a_recipe(recipe: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    found = figures(tmp_path, recipe, "--vocab-size", VOCABULARY)
    text = capsys.readouterr().out
    student = small_student(Targets())
    total = sum(parameter.numel() for parameter in student.parameters())
    assert found["parts"]["parts"][0]["parameters"] == total
    # The scale of the contrast.
    assert found["parts"]["parameters"] == total + 1
    assert found["flops"] == student_flops(student.eval(), SIZES)
    memory = found["memory_estimate"]
    assert memory["batch_size"] == 8 and memory["activations"] == activation_bytes(student, SIZES, 8)
    assert memory["total"] == sum(memory[k] for k in ("weights", "buffers", "gradients", "moments", "activations"))
    assert found["token_type_scale"] is None
    lines = [" ".join(line.split()) for line in text.splitlines()]
    assert lines[0] == str(recipe)
    assert f"student {total:,} {total - 256:,} 256 ImageTextStudent" in lines
    assert f"total {total + 1:,} {total - 255:,} 256" in lines
    assert f"caption of 5 tokens {found['flops']['caption'] / 1e9:.3f} GFLOPs" in lines
    assert "memory of training, an estimate: float32, 8 images with 2 captions of 5 tokens each" in lines
    assert "LayerScale" not in text and "no tokenizer" not in text
    assert max(map(len, text.splitlines())) <= 120


def test_options_change_what_is_counted(recipe: Path, tmp_path: Path) -> None:
    words = [
        recipe,
        "freeze_text_all_but=1",
        "average_decay=0.9",
        "objectives=itc,kd_mse",
        "token_type_layer_scale=1e-3",
    ]
    found = figures(tmp_path, *words, "--tokens", 9, "--batch-size", 2, "--vocab-size", VOCABULARY)
    student, objectives, average = found["parts"]["parts"]
    assert [part["name"] for part in objectives["parts"]] == ["itc"]
    assert average["parameters"] == student["parameters"] and average["trainable"] == 0
    text = next(part for part in student["parts"] if part["name"] == "text encoder")
    assert [part["name"] for part in text["parts"] if part["trainable"]] == ["block 3"]
    assert [part["name"] for part in student["parts"]][-1] == "heads"
    assert found["input"] == {"image_size": 8, "tokens": 9, "captions": 2, "samples": 0}
    assert found["memory_estimate"]["batch_size"] == 2
    assert any("as wide as the student's" in note for note in found["notes"])


def test_vocabulary_of_a_tokenizer_of_data_or_an_assumed_one(recipe: Path, tmp_path: Path) -> None:
    def ids(*words: object) -> int:
        found = figures(tmp_path, recipe, *words)
        text = next(part for part in found["parts"]["parts"][0]["parts"] if part["name"] == "text encoder")
        count = text["parts"][0]["parameters"] // 16
        assert any("no tokenizer is given: 30,522" in note for note in found["notes"]) == (count == 30_522)
        return count

    assert ids() == 30_522
    data = tmp_path / "data"
    data.mkdir()
    (data / "vocab.txt").write_text("\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a", "dog"]) + "\n")
    (tmp_path / "other-vocab.txt").write_text((data / "vocab.txt").read_text() + "cat\n")
    assert ids(f"data={data}:elsewhere") == 7
    assert ids(f"data={data}", f"caption_tokenizer={tmp_path / 'other-vocab.txt'}") == 8
    assert ids(f"data={data}", "--vocab-size", 11) == 11


def test_values_are_read_as_the_command_line_reads_them() -> None:
    found = typed({"token_type_layer_scale": "1e-5", "image_size": "64", "lr": [1], "shared_layers": None, "data": 3})
    assert found == {"token_type_layer_scale": 1e-5, "image_size": 64, "lr": [1], "shared_layers": None, "data": 3}


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["shard_layers=2"], "unknown recipe key 'shard_layers'; did you mean shared_layers"),
        (["image_size=wide"], "recipe key 'image_size' is 'wide', which is no int"),
        (["freeze_image_all_but=3"], "--freeze-image-all-but 3: want 0 to 2"),
        (["--tokens", "13"], "captions of 13 tokens .* exceed the 12 positions"),
        (["--tokens", "0"], "--tokens 0: want 1 or more"),
        (["arch=data2vec2_image"], "arch 'data2vec2_image'; what can be looked into is image_text_student"),
        (["caption_tokenizer=not/there"], "no tokenizer at not/there"),
        (["objectives=ict"], "--objectives 'ict'"),
    ],
)
def test_mistakes_in_recipes_are_named(recipe: Path, words: list[str], message: str) -> None:
    with pytest.raises(UserError, match=message) as raised:
        info(recipe, *words)
    assert "\n" not in raised.value.message


def test_a_recipe_without_a_batch_size(recipe: Path, tmp_path: Path) -> None:
    found = figures(tmp_path, recipe, "batch_size=null", "contrastive_chunk=16", "--vocab-size", VOCABULARY)
    assert found["memory_estimate"]["batch_size"] == 64
    assert any("no batch_size" in note for note in found["notes"])
    assert found["memory_estimate"]["activations"] == activation_bytes(small_student(Targets()), SIZES, 16)


def test_an_objective_that_needs_data_is_left_out_by_name(recipe: Path, tmp_path: Path) -> None:
    found = figures(tmp_path, recipe, "objectives=proximal_itc,itc", "--vocab-size", VOCABULARY)
    assert [part["name"] for part in found["parts"]["parts"][1]["parts"]] == ["itc"]
    assert any(note.startswith("left out: objective proximal_itc") for note in found["notes"])


def test_examples_can_be_looked_into() -> None:
    folder = Path(__file__).resolve().parents[2] / "examples"
    for name in ("scenes.yaml", "flickr8k.yaml"):
        assert read_recipe_source(str(folder / name), []).options["image_size"] in (64, 112)
    with pytest.raises(UserError, match="data2vec2_image"):
        read_recipe_source(str(folder / "data2vec2_image.yaml"), [])


def test_a_checkpoint(checkpoint: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    path = checkpoint(freeze_embeddings=True)
    found = figures(tmp_path, path.parent, "--vocab-size", VOCABULARY)
    student = small_student()
    freeze(student, FreezeConfig(embeddings=True))
    tree = part_tree(student, "student")
    assert found["parts"]["parts"][0]["parameters"] == tree.parameters
    assert found["parts"]["parts"][0]["trainable"] == tree.trainable
    scale = found["token_type_scale"]
    assert (scale["mean"], scale["min"], scale["absolute_max"]) == (8.5, 1.0, 16.0)
    assert scale["std"] == pytest.approx((255 / 12) ** 0.5)
    assert found["source"] == str(path)
    text = capsys.readouterr().out
    assert "LayerScale of the token types" in text and "mean 8.500e+00" in text and "8 images" in text


def test_checkpoints_that_do_not_fit_are_refused(checkpoint: Callable[..., Path], tmp_path: Path) -> None:
    path = checkpoint()
    with pytest.raises(UserError, match="does not fit its own options: 1 of its parameters differ.*embed_tokens.*50"):
        info(path, "--vocab-size", 51)
    with pytest.raises(UserError, match="options can be changed of a recipe"):
        info(path, "image_layers=1")
    with pytest.raises(UserError, match="does not fit its own options.*missing"):
        info(checkpoint(text_layers=4), "--vocab-size", VOCABULARY)
    torch.save({"cfg": {"model": {"_name": "data2vec2_image"}}, "model": {}}, path)
    with pytest.raises(UserError, match="is a checkpoint of data2vec2_image, not of image_text_student"):
        info(path)
    with pytest.raises(UserError, match="no such checkpoint"):
        info(tmp_path / "none.pt")
