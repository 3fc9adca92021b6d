"""Distillation of codes against loops in float64; the files that codes come from."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from emkum.errors import UserError
from emkum.objectives import Setting
from emkum.objectives.target_codes import (
    ClusterDistillation,
    ClusterDistillationConfig,
    CodeDistillation,
    CodeDistillationConfig,
    TargetCodes,
    assert_fitted_to,
    read_centroids,
    read_quantizer,
    write_centroids,
)
from emkum.outputs import StudentOutput
from tests.objectives.cases import SETTING, make_case
from tests.objectives.naive import assert_equals, cosine, cross_entropy, half, layer_norm
from tests.objectives.target_files import CLUSTERS, CODES, TEACHER, write_target_files

KINDS = ("cluster", "vq")


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


@pytest.fixture
def build(tmp_path: Path) -> Callable[..., TargetCodes]:
    """A function that builds either objective from its file, or without one."""
    options = write_target_files(tmp_path)

    def make(kind: str, with_file: bool = True, setting: Setting = SETTING) -> TargetCodes:
        path = options["kd_cluster_centroids" if kind == "cluster" else "kd_vq_quantizer"] if with_file else "gone"
        if kind == "cluster":
            return ClusterDistillation(ClusterDistillationConfig(CLUSTERS, path), setting)
        return CodeDistillation(CodeDistillationConfig(CODES, path), setting)

    return make


def naive_code(kind: str, objective: TargetCodes, feature: Tensor) -> int:
    table = objective.table
    if kind == "cluster":
        distances = [float(((feature - centroid) ** 2).sum()) for centroid in table.centroids.double()]
        return distances.index(min(distances))
    reduced = torch.stack(
        [(row * feature).sum() + b for row, b in zip(table.weight.double(), table.bias.double(), strict=True)]
    )
    similarities = [float(cosine(reduced, code)) for code in table.codes.double()]
    return similarities.index(max(similarities))


@pytest.mark.parametrize("own_targets", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_against_loops(build: Callable[..., TargetCodes], kind: str, own_targets: bool) -> None:
    objective = build(kind)
    with torch.no_grad():
        for parameter in objective.head.parameters():
            parameter.normal_()
    student, teacher, batch = make_case(6)
    batch = replace(batch, caption_image=batch.caption_image.flip(0))
    if own_targets:
        teacher = replace(teacher, text_features=torch.randn(12, SETTING.target_width, dtype=torch.float64))
    codes = [naive_code(kind, objective, feature) for feature in teacher.features]
    text_codes = [codes[row] for row in batch.caption_image]
    if own_targets:
        text_codes = [naive_code(kind, objective, feature) for feature in teacher.text_features]
    assert len(set(codes)) > 1

    def logits_of(tokens: Tensor) -> list[Tensor]:
        norm, linear = objective.head
        return [
            linear.weight @ (layer_norm(sample[0], 1e-6) * norm.weight + norm.bias) + linear.bias for sample in tokens
        ]

    def reference(student: StudentOutput) -> Tensor:
        halves = []
        for tokens, targets in ((student.image.tokens, codes), (student.text.tokens, text_codes)):
            halves.append([cross_entropy(row, code) for row, code in zip(logits_of(tokens), targets, strict=True)])
        return half(*halves)

    out = assert_equals(objective, (student, teacher, batch), reference)
    assert out.metrics.keys() == {"image_loss", "image_accuracy", "text_loss", "text_accuracy"}
    hits = [int(row.argmax()) == code for row, code in zip(logits_of(student.text.tokens), text_codes, strict=True)]
    assert out.metrics["text_accuracy"].item() == pytest.approx(100 * sum(hits) / len(hits))


@pytest.mark.parametrize("kind", KINDS)
def test_a_checkpoint_does_without_the_file(build: Callable[..., TargetCodes], kind: str) -> None:
    first, second = build(kind).double(), build(kind, with_file=False).double()
    with pytest.raises(UserError, match="must name a file where no checkpoint brings its content; gone does not exist"):
        second(*make_case())
    second.load_state_dict(first.state_dict())
    assert first(*make_case()).loss == second(*make_case()).loss
    assert first.state_dict().keys() == second.state_dict().keys()


@pytest.mark.parametrize("kind", KINDS)
def test_without_any_file(kind: str) -> None:
    config = ClusterDistillationConfig() if kind == "cluster" else CodeDistillationConfig()
    objective = (ClusterDistillation if kind == "cluster" else CodeDistillation)(config, SETTING)
    with pytest.raises(UserError, match=f"--kd-{kind}-.* must name a file .*; none is given"):
        objective(*make_case())


@pytest.mark.parametrize("kind", KINDS)
def test_codes_are_not_trained_and_survive_half_precision(build: Callable[..., TargetCodes], kind: str) -> None:
    objective = build(kind)
    assert {name.partition(".")[0] for name, _ in objective.named_parameters()} == {"head"}
    student, teacher, batch = make_case()
    codes = objective.table(teacher.features)
    assert objective.half().table(teacher.features).tolist() == codes.tolist()
    assert objective.bfloat16()(student, teacher, batch).loss.dtype == torch.float32


@pytest.mark.parametrize("kind", KINDS)
def test_files_of_other_sizes(build: Callable[..., TargetCodes], tmp_path: Path, kind: str) -> None:
    with pytest.raises(UserError, match="is made of features of 6 channels; the teacher's have 5"):
        build(kind, setting=replace(SETTING, target_width=5))
    options = write_target_files(tmp_path)
    with pytest.raises(UserError, match="has 5 codes: give --kd-cluster-clusters 5, not 1000"):
        ClusterDistillation(ClusterDistillationConfig(centroids=options["kd_cluster_centroids"]), SETTING)
    with pytest.raises(UserError, match="has 4 codes: give --kd-vq-codes 4, not 1024"):
        CodeDistillation(CodeDistillationConfig(quantizer=options["kd_vq_quantizer"]), SETTING)


def test_codes_of_another_teacher(build: Callable[..., TargetCodes]) -> None:
    objectives = torch.nn.ModuleDict({"kd_cluster": build("cluster"), "kd_vq": build("vq")})
    assert_fitted_to(objectives, dict(TEACHER))
    with pytest.raises(UserError, match="--kd-cluster-centroids .* fitted to another teacher .*weights_sha256"):
        assert_fitted_to(objectives, TEACHER | {"weights_sha256": "1"})
    # As after a run that went on without the file.
    assert_fitted_to(torch.nn.ModuleDict({"kd_vq": build("vq", with_file=False)}), {"teacher": "other"})


def test_file_of_centroids(tmp_path: Path) -> None:
    path, centroids = tmp_path / "new" / "c.safetensors", torch.randn(3, 2)
    write_centroids(path, centroids.T.contiguous().T, {"teacher": "t", "mean": [0.5, 0.1]})
    found = read_centroids(path)
    assert torch.equal(found.tensors["centroids"], centroids)
    assert (found.count, found.width, found.teacher) == (3, 2, {"teacher": "t", "mean": [0.5, 0.1]})
    with safe_open(path, "pt") as file:
        assert file.metadata().keys() == {"teacher"}
    assert [item.name for item in path.parent.iterdir()] == ["c.safetensors"]
    with pytest.raises(UserError, match="cannot write"):
        write_centroids(path / "below.safetensors", centroids, {})


def test_files_that_are_something_else(tmp_path: Path) -> None:
    other = tmp_path / "other.safetensors"
    for content in ({"x": torch.zeros(2)}, {"centroids": torch.zeros(2, 2)}):
        save_file(content, other)
        with pytest.raises(UserError, match="other.safetensors holds no centroids: make such a file with"):
            read_centroids(other)
    other.write_bytes(b"none")
    with pytest.raises(UserError, match="holds no centroids"):
        read_centroids(other)
    path = tmp_path / "student.pt"
    torch.save({"cfg": {"model": {"_name": "image_text_student"}}, "model": {"student.x": torch.zeros(1)}}, path)
    with pytest.raises(UserError, match="student.pt is no checkpoint of a run with --arch image_quantizer"):
        read_quantizer(path)
    torch.save([1, 2], path)
    with pytest.raises(UserError, match="is no checkpoint of a run"):
        read_quantizer(path)


def test_quantizer_without_codes(tmp_path: Path) -> None:
    path = Path(write_target_files(tmp_path)["kd_vq_quantizer"])
    state = torch.load(path, weights_only=True)
    state["model"]["quantizer.codebook.started"] = torch.tensor(False)
    torch.save(state, path)
    with pytest.raises(UserError, match="training stopped before the codebook had its first codes"):
        read_quantizer(path)
