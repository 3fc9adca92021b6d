"""The cache of a teacher's targets: what comes out of it is what the live teacher gives, or nothing at all."""

import json
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from emkum.errors import UserError
from emkum.outputs import TeacherOutput
from emkum.provenance import write_json
from emkum.teachers import cached as cached_module
from emkum.teachers.base import FrozenTeacher, TeacherInput
from emkum.teachers.cached import (
    MANIFEST_NAME,
    CachedTeacher,
    CacheManifest,
    missing_shards,
    pack,
    record_dtype,
    unpack,
    written_shard,
)

SIDE, SAMPLES, VIEWS, SHARD_SIZE = 16, 7, 2, 3
WIDTH, CLASSES, GRID = 6, 11, (2, 2)
CROPS = {"views": VIEWS, "min_scale": 0.5, "flip": True, "seed": 7}
PARTS = {
    "features": {"width": WIDTH},
    "logits": {"classes": CLASSES, "top": 0},
    "patches": {"grid": list(GRID), "width": WIDTH},
}


@pytest.fixture(autouse=True)
def one_thread() -> None:
    torch.manual_seed(0)
    torch.set_num_threads(1)


class TinyModel(nn.Module):
    """Four patches of six channels, their mean, and logits as large as real ones get."""

    def __init__(self) -> None:
        super().__init__()
        self.patch = nn.Conv2d(3, WIDTH, SIDE // 2, SIDE // 2)
        self.head = nn.Linear(WIDTH, CLASSES)

    def forward(
        self, images: Tensor, text: Tensor | None = None, padding_mask: Tensor | None = None, layers: bool = False
    ) -> TeacherOutput:
        patches = self.patch(images).flatten(2).transpose(1, 2)
        features = patches.mean(1)
        return TeacherOutput(features, patches=patches, logits=30 * self.head(features) + 12)


@pytest.fixture(scope="module")
def teacher() -> FrozenTeacher:
    torch.manual_seed(0)
    return FrozenTeacher(TinyModel(), {"teacher": "tiny", "weights_sha256": "0"}, SIDE, (0.5,) * 3, (0.1,) * 3)


def all_crops(views: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (views, SAMPLES, 3, SIDE, SIDE), dtype=torch.uint8, generator=generator)


@pytest.fixture(scope="module")
def crops() -> dict[str, Tensor]:
    return {"train": all_crops(VIEWS, 1), "valid": all_crops(1, 2)}


def batch(images: Tensor, ids: list[int], views: list[int], split: str = "train") -> TeacherInput:
    return TeacherInput(images, torch.tensor(ids), torch.tensor(views), split)


def manifest_of(teacher: FrozenTeacher, parts: Mapping[str, Any]) -> CacheManifest:
    splits = {
        "train": {"data_hash": "hash-train", "samples": SAMPLES, "crops": CROPS},
        "valid": {"data_hash": "hash-valid", "samples": SAMPLES, "crops": {"views": 0}},
    }
    return CacheManifest(teacher.identity, "float32", dict(parts), SHARD_SIZE, splits)


def write_cache(
    directory: Path, teacher: Callable[[TeacherInput], TeacherOutput], manifest: CacheManifest, crops: dict[str, Tensor]
) -> Path:
    """By batches of two, which do not cross shards."""
    write_json(directory / MANIFEST_NAME, manifest.as_json())
    for split in manifest.splits:
        (directory / split).mkdir()
    for shard in manifest.shards():
        with written_shard(directory, manifest, shard) as write:
            for start in range(shard.start, shard.stop, 2):
                ids = list(range(start, min(start + 2, shard.stop)))
                one = batch(crops[shard.split][shard.view, ids], ids, [shard.view] * len(ids), shard.split)
                write(teacher(one), one)
    return directory


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory, teacher: FrozenTeacher, crops: dict[str, Tensor]) -> Path:
    """All parts in full. Not to be changed."""
    return write_cache(tmp_path_factory.mktemp("teacher") / "cache", teacher, manifest_of(teacher, PARTS), crops)


def copy_of(cache: Path, tmp_path: Path) -> Path:
    for path in cache.rglob("*"):
        if path.is_file():
            target = tmp_path / "copy" / path.relative_to(cache)
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes(path.read_bytes())
    return tmp_path / "copy"


def assert_close(actual: Tensor, expected: Tensor) -> None:
    """As close as float16 comes."""
    torch.testing.assert_close(actual, expected, rtol=2**-10, atol=1e-4)


# ----------------------------------------------------------------------------------------------------------------------
# What comes out
# ----------------------------------------------------------------------------------------------------------------------


def test_cached_targets_equal_live_ones_in_every_view(
    cache: Path, teacher: FrozenTeacher, crops: dict[str, Tensor]
) -> None:
    cached = CachedTeacher(cache)
    cached.open_split("train", "hash-train", CROPS)
    # Of several shards and both views, in no order, and one of them twice.
    ids, views = [6, 0, 3, 3, 5, 0, 6], [1, 0, 0, 1, 1, 0, 0]
    images = crops["train"][views, ids]
    live, output = teacher(batch(images, ids, views)), cached(batch(images, ids, views))
    assert_close(output.features, live.features)
    assert_close(output.patches, live.patches)
    torch.testing.assert_close(output.logits, live.logits, rtol=0, atol=0.05)
    torch.testing.assert_close(output.logits.softmax(1), live.logits.softmax(1), rtol=0, atol=3e-4)
    for part in (output.features, output.patches, output.logits):
        assert part.dtype == torch.float32 and part.device == images.device and not part.requires_grad
    assert output.text_features is None and output.layers is None
    # Views and samples differ by more than the tolerance.
    assert (live.features[2] - live.features[3]).abs().max() > 0.05
    assert (live.features[0] - live.features[1]).abs().max() > 0.05


def test_centered_targets_serve_any_crop(cache: Path, teacher: FrozenTeacher, crops: dict[str, Tensor]) -> None:
    cached = CachedTeacher(cache)
    cached.open_split("valid", "hash-valid", CROPS)
    live = teacher(batch(crops["valid"][0, [1, 1, 1, 4]], [1, 1, 1, 4], [0] * 4, "valid")).features
    others = torch.zeros(4, 3, SIDE, SIDE, dtype=torch.uint8)
    assert_close(cached(batch(others, [1, 1, 1, 4], [-1, 0, 1, 5], "valid")).features, live)


def test_it_declares_what_is_stored(tmp_path: Path, cache: Path, teacher: FrozenTeacher, crops: dict) -> None:
    whole = CachedTeacher(cache)
    live = {name: getattr(teacher, name) for name in ("width", "num_classes", "grid", "patch_width", "modalities")}
    assert {name: getattr(whole, name) for name in live} == live
    assert (whole.image_size, whole.tokenizer, whole.max_tokens) == (0, None, 0)
    assert whole.identity == teacher.identity
    little = CachedTeacher(
        write_cache(tmp_path / "little", teacher, manifest_of(teacher, {"features": PARTS["features"]}), crops)
    )
    assert (little.width, little.num_classes, little.grid, little.patch_width) == (WIDTH, 0, None, 0)
    output = little(batch(crops["train"][0, [2]], [2], [0]))
    assert output.logits is None and output.patches is None and output.features.shape == (1, WIDTH)


def rebuilt(logits: np.ndarray, top: int) -> np.ndarray:
    """Probabilities (C,) of one row: the largest are kept, what is left is spread evenly. Float64."""
    exponentials = [math.exp(value - max(logits)) for value in logits.tolist()]
    shares = [value / sum(exponentials) for value in exponentials]
    kept = sorted(range(len(shares)), key=lambda number: -shares[number])[:top]
    left = (1 - sum(shares[number] for number in kept)) / max(1, len(shares) - top)
    return np.array([shares[number] if number in kept else left for number in range(len(shares))])


@pytest.mark.parametrize("scale", [1.0, 30.0])
@pytest.mark.parametrize("shift", [0.0, -300.0, 3000.0])
@pytest.mark.parametrize("top", [0, 1, 5, CLASSES - 1])
def test_softmax_survives_however_large_logits_are(top: int, shift: float, scale: float) -> None:
    """Float16 logits alone would be off: near 3,000 their steps are of 2."""
    logits = torch.randn(6, CLASSES) * scale + shift
    description = {"classes": CLASSES, "top": top}
    dtype = record_dtype("logits", description)
    ids = list(range(6))
    records = pack("logits", dtype, TeacherOutput(logits, logits=logits), batch(logits, ids, ids))
    assert records.dtype == dtype and records.shape == (6,)
    output = unpack("logits", records, description, torch.device("cpu"))
    assert output.dtype == torch.float32 and output.shape == (6, CLASSES)
    for row in range(6):
        expected = rebuilt(logits[row].double().numpy(), top or CLASSES)
        np.testing.assert_allclose(output[row].double().softmax(0).numpy(), expected, atol=1e-3 / 2)
    # The largest logit itself is exact.
    assert torch.equal(output.amax(1), logits.amax(1))


@pytest.mark.parametrize(("classes", "number"), [(2**15, np.int16), (2**15 + 1, np.int32)])
def test_numbers_of_many_classes_fit(classes: int, number: type) -> None:
    description = {"classes": classes, "top": 2}
    dtype = record_dtype("logits", description)
    logits = torch.zeros(1, classes)
    logits[0, -1], logits[0, 5] = 20, 19
    records = pack("logits", dtype, TeacherOutput(logits, logits=logits), batch(logits, [0], [0]))
    assert records["number"].dtype == number
    output = unpack("logits", records, description, torch.device("cpu"))
    torch.testing.assert_close(output.softmax(1), logits.softmax(1), rtol=0, atol=1e-3)


def test_any_number_of_files_is_read_through_few(
    cache: Path, teacher: FrozenTeacher, crops: dict[str, Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cached_module, "_MAX_OPEN_FILES", 2)
    cached = CachedTeacher(cache)
    ids, views = list(range(SAMPLES)) * 2, [0] * SAMPLES + [1] * SAMPLES
    images = crops["train"][views, ids]
    for _ in range(2):
        assert_close(cached(batch(images, ids, views)).features, teacher(batch(images, ids, views)).features)
    assert cached._open.cache_info().currsize == 2


# ----------------------------------------------------------------------------------------------------------------------
# What is on the disk
# ----------------------------------------------------------------------------------------------------------------------


def test_files_are_those_that_the_manifest_promises(cache: Path, teacher: FrozenTeacher) -> None:
    files = {path.relative_to(cache).as_posix() for path in cache.rglob("*") if path.is_file()}
    expected = {
        f"{split}/{part}-{view:02d}-{shard:06d}.npy"
        for split, views in (("train", VIEWS), ("valid", 1))
        for part in PARTS
        for view in range(views)
        for shard in range(3)
    }
    assert files == expected | {MANIFEST_NAME}
    content = json.loads((cache / MANIFEST_NAME).read_text())
    assert content["teacher"] == teacher.identity and content["parts"] == PARTS
    assert CacheManifest.read(cache).as_json() == content


def test_numpy_reads_the_files(cache: Path) -> None:
    shapes = {
        name: np.load(cache / "train" / f"{name}.npy", allow_pickle=False)
        for name in ("features-00-000000", "features-01-000002", "patches-00-000001", "logits-01-000002")
    }
    assert {name: (array.shape, array.dtype) for name, array in shapes.items()} == {
        "features-00-000000": ((SHARD_SIZE, WIDTH), np.float16),
        "features-01-000002": ((1, WIDTH), np.float16),
        "patches-00-000001": ((SHARD_SIZE, 4, WIDTH), np.float16),
        "logits-01-000002": ((1,), record_dtype("logits", PARTS["logits"])),
    }


def test_a_shard_appears_whole_or_not_at_all(tmp_path: Path, teacher: FrozenTeacher, crops: dict[str, Tensor]) -> None:
    manifest = manifest_of(teacher, PARTS)
    (tmp_path / "train").mkdir()
    shard = next(manifest.shards())
    one = batch(crops["train"][0, [0, 1]], [0, 1], [0, 0])
    with pytest.raises(RuntimeError, match="out of memory"), written_shard(tmp_path, manifest, shard) as write:
        write(teacher(one), one)
        raise RuntimeError("out of memory")
    assert list((tmp_path / "train").iterdir()) == []
    assert missing_shards(tmp_path, manifest)[0] == shard


def test_a_folder_that_cannot_be_written(tmp_path: Path, teacher: FrozenTeacher) -> None:
    manifest = manifest_of(teacher, PARTS)
    with pytest.raises(UserError, match="cannot write into .*train: No such file or directory") as caught:
        with written_shard(tmp_path, manifest, next(manifest.shards())):
            pass
    assert "\n" not in str(caught.value) and "run the same `emkum teacher cache` command again" in str(caught.value)


def test_a_teacher_that_gives_another_shape_than_it_declared(tmp_path: Path, teacher: FrozenTeacher) -> None:
    manifest = manifest_of(teacher, {"features": {"width": WIDTH}})
    (tmp_path / "train").mkdir()
    wide = TeacherOutput(torch.zeros(2, WIDTH + 1))
    with pytest.raises(ValueError, match=r"declared features \(6,\) a sample and gives \(7,\)"):
        with written_shard(tmp_path, manifest, next(manifest.shards())) as write:
            write(wide, batch(torch.zeros(2), [0, 1], [0, 0]))
    assert list((tmp_path / "train").iterdir()) == []


# Far below the largest is only what is stored: of the largest logits alone, none.
MISFITS = [70000.0, math.inf, math.nan, -70000.0]


@pytest.mark.parametrize(
    ("part", "description", "value"),
    [
        *(("features", {"width": CLASSES}, value) for value in MISFITS),
        *(("patches", {"grid": [1, CLASSES], "width": 1}, value) for value in MISFITS),
        *(("logits", {"classes": CLASSES, "top": 0}, value) for value in MISFITS),
        *(("logits", {"classes": CLASSES, "top": 3}, value) for value in MISFITS[:-1]),
    ],
)
def test_what_does_not_fit_is_never_stored(part: str, description: dict[str, Any], value: float) -> None:
    values = torch.randn(3, CLASSES)
    values[1, 4] = value
    if part == "patches":
        values = values[:, :, None]
    output = TeacherOutput(values, **{part: values} if part != "features" else {})
    with pytest.raises(
        UserError, match=rf"{part} of sample 8 of split 'valid' \(view 2\) do not fit float16"
    ) as caught:
        pack(part, record_dtype(part, description), output, batch(values, [5, 8, 9], [2, 2, 2], "valid"))
    assert f"{value:g}" in str(caught.value) and "\n" not in str(caught.value)


def test_a_class_that_cannot_be_is_not_stored_by_leaving_it_out() -> None:
    """With the largest logits alone it is in none of the stored numbers, but in what is left for the others."""
    logits = torch.full((1, CLASSES), -math.inf)
    logits[0, :3] = 1.0
    dtype = record_dtype("logits", {"classes": CLASSES, "top": 3})
    with pytest.raises(UserError, match="logits of sample 0 .* they reach from -inf to 1"):
        pack("logits", dtype, TeacherOutput(logits, logits=logits), batch(logits, [0], [0]))


# ----------------------------------------------------------------------------------------------------------------------
# Refusals
# ----------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("split", "data_hash", "wanted", "message"),
    [
        ("test", "hash-train", CROPS, "has no split 'test', only train, valid"),
        ("train", "hash-other", CROPS, "was made of other data than the split 'train'"),
        ("valid", "hash-train", {"views": 0}, "was made of other data than the split 'valid'"),
        ("train", "hash-train", CROPS | {"seed": 8}, "crops with seed = 7, training uses 8"),
        ("train", "hash-train", CROPS | {"min_scale": 0.6}, "crops with min_scale = 0.5, training uses 0.6"),
        ("train", "hash-train", CROPS | {"flip": False}, "crops with flip = True, training uses False"),
        ("train", "hash-train", CROPS | {"views": 4}, "crops with views = 2, training uses 4"),
        ("train", "hash-train", CROPS | {"views": 0}, "crops with views = 2, training uses 0"),
        ("train", "hash-train", {"views": 0}, "training uses"),
    ],
)
def test_cache_refuses_what_it_was_not_made_for(
    cache: Path, split: str, data_hash: str, wanted: dict[str, Any], message: str
) -> None:
    with pytest.raises(UserError, match=message) as caught:
        CachedTeacher(cache).open_split(split, data_hash, wanted)
    assert "\n" not in str(caught.value) and str(cache) in str(caught.value)


def changed(content: dict[str, Any], *path: str, to: Any = None) -> str:
    """The manifest with one entry changed; left out where there is no value."""
    content = json.loads(json.dumps(content))
    place = content
    for name in path[:-1]:
        place = place[name]
    if to is None:
        del place[path[-1]]
    else:
        place[path[-1]] = to
    return json.dumps(content)


@pytest.mark.parametrize("text", [None, "", "{", "[]", "{}", '"text"', "3", '{"teacher": {}, "width": 3}', "\udcff"])
def test_a_folder_that_is_no_cache(tmp_path: Path, text: str | None) -> None:
    if text is not None:
        (tmp_path / MANIFEST_NAME).write_bytes(text.encode("utf-8", "surrogateescape"))
    with pytest.raises(UserError, match="no teacher cache at .* make one with `emkum teacher cache`") as caught:
        CachedTeacher(tmp_path)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("path", "to"),
    [
        (["version"], 2),
        (["teacher"], "timm"),
        (["shard_size"], None),
        (["shard_size"], 0),
        (["shard_size"], "3"),
        (["parts"], []),
        (["parts", "features"], None),
        (["parts", "features", "width"], "6"),
        (["parts", "logits", "top"], None),
        (["splits"], []),
        (["splits", "train", "data_hash"], None),
        (["splits", "train", "samples"], "7"),
        (["splits", "train", "crops"], {}),
    ],
)
def test_a_damaged_manifest(tmp_path: Path, cache: Path, path: list[str], to: Any) -> None:
    copy = copy_of(cache, tmp_path)
    content = json.loads((cache / MANIFEST_NAME).read_text())
    (copy / MANIFEST_NAME).write_text(changed(content, *path, to=to))
    with pytest.raises(UserError, match="no teacher cache at .*missing, damaged or of another version"):
        CachedTeacher(copy)


@pytest.mark.parametrize("damage", ["missing", "empty", "cut", "longer"])
@pytest.mark.parametrize("name", ["features-01-000001", "logits-01-000001"])
def test_an_incomplete_cache_asks_for_the_command_again(tmp_path: Path, cache: Path, name: str, damage: str) -> None:
    copy = copy_of(cache, tmp_path)
    path = copy / "train" / f"{name}.npy"
    content = path.read_bytes()
    path.write_bytes({"empty": b"", "cut": content[:-1], "longer": content + b"0", "missing": b""}[damage])
    if damage == "missing":
        path.unlink()
    with pytest.raises(UserError, match="is incomplete: 1 of 9 shards .* number 1 of split 'train', view 1") as caught:
        CachedTeacher(copy)
    assert "run the same `emkum teacher cache` command again" in str(caught.value) and "\n" not in str(caught.value)
    shard = CacheManifest.read(copy).shard("train", 1, 1)
    assert missing_shards(copy, CacheManifest.read(copy)) == [shard]


def test_a_file_of_the_right_length_that_is_another(tmp_path: Path, cache: Path, crops: dict[str, Tensor]) -> None:
    copy = copy_of(cache, tmp_path)
    path = copy / "train" / "features-00-000001.npy"
    path.write_bytes(bytes(path.stat().st_size))
    cached = CachedTeacher(copy)
    cached(batch(crops["train"][0, [0]], [0], [0]))
    with pytest.raises(UserError, match="features-00-000001.npy is damaged: delete it and run the same"):
        cached(batch(crops["train"][0, [3]], [3], [0]))
