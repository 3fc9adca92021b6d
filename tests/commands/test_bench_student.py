"""`emkum bench student`: that it measures real training steps of what it names, not how fast this machine is."""

import json
import re
import shlex
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from subprocess import CompletedProcess
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import user_dir.benchmark as benchmark
from emkum.cli import main
from emkum.commands import bench_student
from emkum.commands.bench_student import Variant, Work, make_variants, parse_varied, write_stand_in
from emkum.errors import UserError
from emkum.layers.nearest_code import CodeTable

pytestmark = [
    # Of fairseq, within the process of the tests.
    pytest.mark.filterwarnings("ignore::UserWarning:hydra.*"),
    pytest.mark.filterwarnings(r"ignore:\s*'config' is validated:UserWarning"),
    pytest.mark.filterwarnings("ignore:.*torch.cuda.amp.autocast:FutureWarning"),
]

VOCABULARY = 50
RECIPE = {
    "task": "image_text", "arch": "image_text_student", "criterion": "multi_objective", "objectives": "itc",
    "optimizer": "grouped_adamw", "lr_scheduler": "fixed", "lr": [0.01], "clip_norm": 1.0, "seed": 3,
    "student_width": 16, "student_heads": 2, "image_size": 32, "image_patch_size": 4, "image_layers": 2,
    "text_layers": 2, "text_max_positions": 24, "shared_layers": 1, "caption_per_image": 2, "caption_max_tokens": 12,
    "data": "not/there", "teacher": "timm:not_there",
}  # fmt: skip


@pytest.fixture(autouse=True)
def one_thread(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    torch.manual_seed(0)
    torch.set_num_threads(1)
    yield


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    path = tmp_path / "small.yaml"
    path.write_text(json.dumps(RECIPE))
    return path


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """What stands for a data set."""
    path = tmp_path / "stand-in"
    path.mkdir()
    write_stand_in(path, VOCABULARY)
    return path


@pytest.fixture
def variant(recipe: Path, folder: Path) -> Callable[..., Variant]:
    """A function that makes a variant of the recipe."""

    def make(**options: Any) -> Variant:
        values = {key: [value] for key, value in ({"batch_size": 4} | options).items()}
        return make_variants(str(recipe), [], values, folder, cpu=True)[0]

    return make


@pytest.fixture
def measured(variant: Callable[..., Variant], monkeypatch: pytest.MonkeyPatch) -> Callable[..., SimpleNamespace]:
    """A function that measures a variant in this process; gives its figures, trainer, batches, and first weights."""

    def measure(tokens: tuple[int, int] = (4, 12), steps: int = 2, warm_up: int = 1, **options: Any) -> SimpleNamespace:
        found = SimpleNamespace(updates=[])

        def spy(trainer: Any, updates: Any) -> float:
            if not found.updates:
                found.trainer = trainer
                found.weights = {name: p.detach().clone() for name, p in trainer.model.named_parameters()}
            updates = list(updates)
            found.updates += updates
            return original(trainer, updates)

        original = benchmark.run_steps
        monkeypatch.setattr(benchmark, "run_steps", spy)
        run = benchmark.Run(variant(**options).arguments, steps, warm_up, tokens, target_width=6, classes=7)
        found.figures = benchmark.measure(run)
        monkeypatch.setattr(benchmark, "run_steps", original)
        return found

    return measure


# ----------------------------------------------------------------------------------------------------------------------
# The command
# ----------------------------------------------------------------------------------------------------------------------


def bench(*words: object) -> None:
    main(["bench", "student", *map(str, words)])


def test_chunks_take_less_memory(recipe: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    words = [recipe, "objectives=itc,kd_contrastive", "--vary", "contrastive_chunk=0,8", "--batch-size", 256]
    words += ["--steps", 1, "--warm-up", 1, "--rounds", 1, "--vocab-size", VOCABULARY, "--json", tmp_path / "s.json"]
    bench(*words)
    lines = capsys.readouterr().out.splitlines()
    written = json.loads((tmp_path / "s.json").read_text())
    whole, chunked = written["variants"]
    assert [row["options"] for row in (whole, chunked)] == [
        {"contrastive_chunk": 0, "batch_size": 256},
        {"contrastive_chunk": 8, "batch_size": 256},
    ]
    for row in (whole, chunked):
        assert (row["images"], row["pairs"], row["device"], row["threads"]) == (256, 512, "CPU", 1)
        assert len(row["pairs_per_second"]) == len(row["milliseconds_per_step"]) == 1
        assert row["pairs_per_second"][0] == pytest.approx(512 / row["milliseconds_per_step"][0] * 1000)
        assert row["ratio"] == pytest.approx(row["pairs_per_second"][0] / whole["pairs_per_second"][0])
        assert row["weight_bytes"] > 4 * 16 * VOCABULARY
    # 256 images of 65 tokens, each kept some hundred times 16 channels: about 120 MiB against a few.
    assert chunked["peak_bytes"] < 0.5 * whole["peak_bytes"]
    assert whole["peak_bytes"] > 60 * 2**20
    assert written["settings"]["caption_tokens"] == [8, 20] and written["settings"]["steps"] == 1
    assert written["machine"]["cores"] >= 1 and "torch" in written["machine"]["versions"]
    assert lines[0] == written["command"] and shlex.split(lines[0])[:4] == ["emkum", "bench", "student", str(recipe)]
    assert "threads: 1" in lines[1]
    assert re.split(r"  +", lines[3])[:4] == ["variant", "images", "pairs", "pairs/s"]
    assert lines[4].startswith("contrastive_chunk=0 batch_size=256     256    512") and lines[4].endswith(" 1.00")
    assert "without the teacher" in " ".join(lines[6:]) and max(map(len, lines[1:])) <= 120


def test_a_failing_run_is_told_in_one_line(recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # A stand-in for Python, whose own start takes seconds: it fails as the second variant would.
    script = tmp_path / "python"
    script.write_text(
        "#!/bin/sh\nif grep -q heads=3; then printf 'a warning\\nemkum: error: wrong heads\\n' >&2; exit 1; fi\n"
        'echo noise; echo \'{"seconds": 1, "pairs": 2}\'\n'
    )
    script.chmod(0o755)
    monkeypatch.setattr(bench_student.sys, "executable", str(script))
    with pytest.raises(UserError) as raised:
        bench(recipe, "--vary", "student_heads=2,3", "--batch-size", 2, "--vocab-size", VOCABULARY)
    assert raised.value.message == "student_heads=3 batch_size=2: wrong heads"


def test_mistakes_in_a_run_are_named(measured: Callable[..., SimpleNamespace], capsys: pytest.CaptureFixture) -> None:
    with pytest.raises(UserError, match="--student-width 16 is no multiple of --student-heads 3"):
        measured(student_heads=3)
    with pytest.raises(SystemExit):
        measured(contrastive_chunk="few")
    last = capsys.readouterr().err.splitlines()[-1]
    failed = CompletedProcess([], 2, "", last)
    assert bench_student._reason(failed) == "argument --contrastive-chunk: invalid int value: 'few'"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["shared_layer=2"], "unknown recipe key 'shared_layer'; did you mean shared_layers"),
        (["--vary", "contrastive_chnk=0,8"], "unknown recipe key 'contrastive_chnk'; did you mean contrastive_chunk"),
        (["--vary", "contrastive_chunk"], "--vary 'contrastive_chunk' must read key=value,value"),
        (["--vary", "contrastive_chunk="], "--vary 'contrastive_chunk=' must read"),
        (["--vary", "contrastive_chunk=8,8"], "with different values"),
        (["--vary", "objectives=[itc"], r"--vary 'objectives=\[itc' must read"),
        (["--vary", "batch_size=2,4"], "--vary: batch_size is varied twice"),
        (["--vary", "teacher=self,null"], "--vary teacher: a step on random inputs does not depend on it"),
        (["--batch-size", "many"], "batch size many: want a number of images"),
        (["--batch-size", "4,0"], "batch size 0: want"),
        (["arch=data2vec2_image"], "has arch 'data2vec2_image'; what can be measured is image_text_student"),
        (["--steps", "0"], "--steps 0: want 1 or more"),
        (["--vocab-size", "5"], "--vocab-size 5: want 6 or more"),
        (["--caption-tokens", "9", "8"], "--caption-tokens 9 8: want"),
        (["--caption-tokens", "1", "8"], "--caption-tokens 1 8: want 2 or more"),
    ],
)
def test_mistakes_are_told_before_anything_runs(
    recipe: Path, words: list[str], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bench_student, "run_variant", lambda *arguments: pytest.fail("a run was started"))
    size = [] if "--batch-size" in words else ["--batch-size", "4"]
    with pytest.raises(UserError, match=message) as raised:
        bench(recipe, *words, *size)
    assert "\n" not in raised.value.message


def test_the_batch_size_must_come_from_somewhere(recipe: Path) -> None:
    with pytest.raises(UserError, match="batch size None: want a number of images, in the recipe or by --batch-size"):
        bench(recipe)


def test_a_file_that_cannot_be_written(recipe: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    figures = {"seconds": 1.0, "images": 4, "pairs": 8, "peak_bytes": 5, "weight_bytes": 5}
    monkeypatch.setattr(bench_student, "run_variant", lambda *_: figures | {"device": "CPU", "threads": 1})
    with pytest.raises(UserError, match="--json: cannot write .*small.yaml/figures.json: ") as raised:
        bench(recipe, "--batch-size", 4, "--vocab-size", VOCABULARY, "--json", recipe / "figures.json")
    assert "\n" not in raised.value.message


def test_reasons_of_failed_runs() -> None:
    def reason(code: int, errors: str) -> str:
        return bench_student._reason(CompletedProcess([], code, "", errors))

    assert reason(1, "Traceback:\n  line\nValueError: too many\n\n") == "ValueError: too many"
    assert reason(1, "warning\nemkum: error: no such file\n") == "no such file"
    assert reason(2, "usage: x\nx: error: argument --lr: invalid\n") == "argument --lr: invalid"
    assert reason(-9, "") == "the run was ended by SIGKILL, perhaps for want of memory"
    assert reason(-11, "") == "the run was ended by SIGSEGV"
    assert reason(1, "") == "the run ended with status 1"
    assert len(reason(1, "x" * 1000)) == 300


# ----------------------------------------------------------------------------------------------------------------------
# Variants and rounds
# ----------------------------------------------------------------------------------------------------------------------


def test_values_are_read_as_yaml() -> None:
    words = ["objectives=itc,[itc,kd_mse]", "student-checkpoint-activations=false,true", "clip_norm=null,1e-1"]
    assert parse_varied([*words, "image_encoder=timm:deit_tiny,data2vec2"], "2,4") == {
        "objectives": ["itc", ["itc", "kd_mse"]],
        "student_checkpoint_activations": [False, True],
        "clip_norm": [None, "1e-1"],
        "image_encoder": ["timm:deit_tiny", "data2vec2"],
        "batch_size": [2, 4],
    }


def test_each_combination_is_a_variant(recipe: Path, folder: Path) -> None:
    words = ["objectives=itc,[itc,kd_mse]", "student_checkpoint_activations=false,true"]
    variants = make_variants(str(recipe), ["seed=7"], parse_varied(words, "8"), folder, cpu=True)
    assert [variant.name for variant in variants] == [
        "objectives=itc student_checkpoint_activations=false batch_size=8",
        "objectives=itc student_checkpoint_activations=true batch_size=8",
        "objectives=[itc,kd_mse] student_checkpoint_activations=false batch_size=8",
        "objectives=[itc,kd_mse] student_checkpoint_activations=true batch_size=8",
    ]
    for index, variant in enumerate(variants):
        arguments = variant.arguments
        assert ("--student-checkpoint-activations" in arguments) == (index % 2 == 1)
        assert f"--objectives={'itc,kd_mse' if index > 1 else 'itc'}" in arguments
        assert {"--cpu", "--seed=7", "--batch-size=8", str(folder)} <= set(arguments)
        # Neither the recipe's data nor its teacher.
        assert not any("not" in argument.split("/")[0] for argument in arguments)
    assert make_variants(str(recipe), ["batch_size=8"], {}, folder, cpu=True)[0].name == "the recipe"


def test_variants_take_turns(recipe: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    order: list[int] = []
    # Of three rounds of two variants.
    seconds = iter([2.0, 1.0, 4.0, 8.0, 2.0, 4.0])

    def run(variant: Variant, work: Work) -> dict[str, Any]:
        size = variant.options["batch_size"]
        order.append(size)
        figures = {"weight_bytes": 5, "images": size, "device": "CPU", "threads": 1}
        return figures | {"seconds": next(seconds), "pairs": 2 * size, "peak_bytes": 100 * size + len(order)}

    monkeypatch.setattr(bench_student, "run_variant", run)
    work = Work(steps=10, warm_up=1, caption_tokens=(8, 20), vocab_size=VOCABULARY, target_width=6, classes=7)
    first, second = bench_student.measure(str(recipe), [], parse_varied([], "4,8"), work, rounds=3)
    assert order == [4, 8] * 3
    assert first["pairs_per_second"] == [40, 20, 40] and second["pairs_per_second"] == [160, 20, 40]
    assert first["milliseconds_per_step"] == [200, 400, 200]
    # Of each round: 4, 1, 1.
    assert (first["ratio"], second["ratio"]) == (1, 1)
    assert (first["peak_bytes"], second["peak_bytes"]) == (405, 806)
    machine = {"processor": "a processor", "cores": 2, "load": (0.5, 0, 0)}
    lines = bench_student.format_report([first, second], "the command", machine, work, 3).splitlines()
    assert lines[:2] == ["the command", "on a processor, 2 cores, load 0.5; PyTorch threads: 1"]
    assert re.split(r"  +", lines[5]) == ["batch_size=8", "8", "16", "40.0", "20.0 to 160", "400.0", "0", "1.00"]
    first["device"] = "a GPU"
    lines = bench_student.format_report([first, second], "the command", machine, work, 3).splitlines()
    assert lines[1] == "on a GPU (a processor, 2 cores, load 0.5)" and "on the GPU" in lines[-1]


# ----------------------------------------------------------------------------------------------------------------------
# The step
# ----------------------------------------------------------------------------------------------------------------------


def tokens_of(batch: Mapping[str, Any]) -> list[Tensor]:
    inputs = batch["net_input"]
    return [text[~hidden] for text, hidden in zip(inputs["text"], inputs["padding_mask"], strict=True)]


def test_steps_train(measured: Callable[..., SimpleNamespace]) -> None:
    found = measured(steps=3, warm_up=2, update_freq=[2], objectives="itc,kd_mse")
    assert found.trainer.get_num_updates() == 5
    figures = found.figures
    assert (figures["images"], figures["pairs"]) == (8, 16)
    assert figures["seconds"] > 0 and figures["device"] == "CPU" and figures["threads"] == 1
    model = found.trainer.model
    assert figures["weight_bytes"] == sum(t.nbytes for t in (*model.parameters(), *model.buffers()))
    moved = [
        name for name, p in model.named_parameters() if p.requires_grad and not torch.equal(p, found.weights[name])
    ]
    assert len(moved) > 0.9 * sum(p.requires_grad for p in model.parameters())
    assert found.trainer.optimizer.param_groups[0]["params"][0] in found.trainer.optimizer.optimizer.state
    # Different batches in turn, each of them half of an update.
    first, second, third = found.updates[:3]
    assert len(first) == 2 and first[0] is third[0] and first[0] is not second[0]
    assert not torch.equal(first[0]["id"], first[1]["id"])


def test_captions_are_of_the_lengths_asked_for(measured: Callable[..., SimpleNamespace]) -> None:
    found = measured(tokens=(4, 20), steps=1, batch_size=64, caption_groups=3)
    batch = found.updates[0][0]
    captions = tokens_of(batch)
    assert len(captions) == 128 and batch["net_input"]["image"].shape == (64, 3, 32, 32)
    # The recipe cuts captions at 12 tokens.
    assert {len(ids) for ids in captions} == set(range(4, 13))
    inner = torch.cat([ids[1:-1] for ids in captions])
    assert inner.min() >= 5 and inner.max() < VOCABULARY
    special = found.trainer.task.tokenizer.special
    assert all((ids[0], ids[-1]) == (special.bos, special.eos) for ids in captions)
    groups = batch["net_input"]["groups"]
    assert len(groups) == 3 and sum(rows for rows, _ in groups) == 128
    assert batch["net_input"]["image"].float().std() > 60


def test_variants_see_the_same_captions(measured: Callable[..., SimpleNamespace]) -> None:
    one = measured(steps=1).updates[0][0]
    other = measured(steps=1, contrastive_chunk=2, student_attention="stock").updates[0][0]
    for mine, theirs in zip(tokens_of(one), tokens_of(other), strict=True):
        assert torch.equal(mine, theirs)
    assert torch.equal(one["net_input"]["image"], other["net_input"]["image"])


def test_all_captions_of_an_image_are_as_many_as_in_coco(measured: Callable[..., SimpleNamespace]) -> None:
    assert measured(steps=1, caption_per_image=0).figures["pairs"] == 5 * 4


def test_objectives_get_what_they_need(measured: Callable[..., SimpleNamespace]) -> None:
    objectives = ["kd_kl", "kd_patch", "proximal_itc", "mlm", "mim", "dino"]
    options = {"average_decay": 0.9, "multi_crop_number": 2, "dino_crops": True, "text_mask_prob": 0.5}
    found = measured(steps=1, objectives=objectives, **options)
    batch = found.updates[0][0]
    assert batch["crops"].shape == (8, 3, 32, 32) and batch["patch_mask"].shape == (4, 8, 8)
    assert batch["patch_mask"].sum() == 4 * round(0.38 * 64)
    assert 0 < batch["num_text_targets"] == (batch["masked_text_targets"] >= 0).sum()
    targets = found.trainer.task.teacher.targets
    assert (targets.features.shape, targets.logits.shape, targets.patches.shape) == ((4, 6), (4, 7), (4, 64, 6))
    assert found.trainer.get_num_updates() == 2
    # A bank of all images of the data has a row for each that occurs.
    ids = np.concatenate([batch["id"] for update in found.updates for batch in update])
    assert sorted(set(ids)) == list(range(found.trainer.task.num_train_images))


def test_code_tables_stand_in_for_files(measured: Callable[..., SimpleNamespace]) -> None:
    sizes = {"kd_cluster_clusters": 9, "kd_vq_codes": 11, "kd_cluster_centroids": "not/there", "kd_vq_quantizer": "nor"}
    found = measured(steps=1, objectives="kd_cluster,kd_vq", **sizes)
    tables = {type(part).__name__: part for part in found.trainer.model.modules() if isinstance(part, CodeTable)}
    # The random teacher has 6 channels.
    assert {name: getattr(tables["NearestCode"], name).shape for name in tables["NearestCode"].names} == {
        "weight": (16, 6), "bias": (16,), "codes": (11, 16),
    }  # fmt: skip
    codes = [table(found.trainer.task.teacher.targets.features) for table in tables.values()]
    assert len(codes) == 2 and all(len(set(of_table.tolist())) > 1 for of_table in codes)


def test_captions_that_the_recipe_cuts_shorter_are_refused(measured: Callable[..., SimpleNamespace]) -> None:
    with pytest.raises(UserError, match="captions of 14 tokens exceed caption_max_tokens"):
        measured(tokens=(14, 20))


def test_peak_of_memory_is_found_after_it_is_over() -> None:
    memory = benchmark.PeakMemory(torch.device("cpu"), weights=1000)
    torch.ones(2**25)
    # 128 MiB that are gone by now.
    assert 120 * 2**20 < memory.peak_bytes() < 250 * 2**20
    fresh = benchmark.PeakMemory(torch.device("cpu"), weights=1000)
    assert 1000 <= fresh.peak_bytes() < 60 * 2**20
