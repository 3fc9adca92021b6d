"""`emkum teacher check` on tiny models, on teachers with chosen answers, and on the real DeiT-Tiny."""

import argparse
import io
import json
import re
import tarfile
import zipfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from safetensors.torch import save_file
from timm.data import ImageNetInfo
from torch import Tensor, nn

from emkum.cli import main
from emkum.commands import teacher_check, teacher_inputs
from emkum.commands.teacher_check import Classes, add_parser, find_classes, wnids_of
from emkum.commands.teacher_inputs import SENTENCES, center_part, tokenize_sentences
from emkum.data.tokenizers import load_tokenizer
from emkum.data.transforms import ImageTransform
from emkum.errors import UserError
from emkum.outputs import TeacherOutput
from emkum.teachers.base import FrozenTeacher, TeacherInput
from emkum.weights import fingerprint

SIDE = 32
WNIDS = [f"n0000000{number}" for number in range(6)]


@pytest.fixture(autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


def run(*arguments: object) -> None:
    parser = argparse.ArgumentParser()
    add_parser(parser.add_subparsers(required=True))
    args = parser.parse_args(["check", *map(str, arguments)])
    args.run(args)


def photo(seed: int, size: tuple[int, int] = (40, 30)) -> bytes:
    """A blurred mosaic of random colors."""
    colors = np.random.default_rng(seed).integers(0, 256, (3, 4, 3), dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(colors).resize(size, Image.Resampling.BICUBIC).save(file, "PNG")
    return file.getvalue()


def plain(red: int, green: int) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (12, 10), (red, green, 90)).save(file, "PNG")
    return file.getvalue()


def write_folder(folder: Path, files: Mapping[str, bytes]) -> Path:
    for name, data in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(data)
    return folder


def write_zip(path: Path, files: Mapping[str, bytes]) -> Path:
    with zipfile.ZipFile(path, "w") as archive:
        for name, data in files.items():
            archive.writestr(name, data)
    return path


def write_tar(path: Path, files: Mapping[str, bytes]) -> Path:
    with tarfile.open(path, "w") as archive:
        for name, data in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    return path


def some_photos(count: int = 5) -> dict[str, bytes]:
    return {f"photo{number}.png": photo(number) for number in range(count)}


def random_vit() -> nn.Module:
    torch.manual_seed(0)
    model = timm.create_model("test_vit", img_size=SIDE).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.1)
    return model


def save(model: nn.Module, path: Path) -> Path:
    save_file({name: value.contiguous() for name, value in model.state_dict().items()}, path)
    return path


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save(random_vit(), tmp_path_factory.mktemp("weights") / "vit.safetensors")


def vit_arguments(weights: Path, *others: object) -> list[object]:
    return ["timm:test_vit", "--weights", weights, "--image-size", SIDE, *others]


def printed_figures(text: str) -> dict[str, list[str]]:
    """Each statistic's printed values, a part each."""
    lines = {}
    for key, label in teacher_check._STATISTICS.items():
        found = re.search(rf"^{re.escape(label)}  +(.*)$", text, re.MULTILINE)
        lines[key] = found.group(1).split()
    return lines


# ----------------------------------------------------------------------------------------------------------------------
# Models of timm
# ----------------------------------------------------------------------------------------------------------------------


def test_a_teacher_that_is_alive(weights: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    photos = some_photos()
    folder = write_folder(tmp_path / "photos", photos)
    run(*vit_arguments(weights, "--images", folder, "--show", 2, "--json", tmp_path / "new" / "check.json"))
    text = capsys.readouterr().out
    record = json.loads((tmp_path / "new" / "check.json").read_text())

    model = random_vit()
    crops = torch.stack([ImageTransform(SIDE)(data) for data in photos.values()])
    with torch.no_grad():
        tokens = model.forward_features((crops.float() / 255 - 0.5) / 0.5)
        features, logits = model.forward_head(tokens, pre_logits=True), model.forward_head(tokens)

    parameters = sum(parameter.numel() for parameter in model.parameters())
    sha = fingerprint(model)
    for line in (
        r"teacher +timm:test_vit",
        rf"parameters +{parameters / 1e6:.2f} million",
        rf"weights +SHA-256 {sha[:12]}",
        r"reads +image",
        rf"input +{SIDE} x {SIDE} pixels",
        r"normalization +mean 0.5 0.5 0.5, standard deviation 0.5 0.5 0.5",
        r"features +64 channels, pooling default, target image",
        r"patches +64 channels in 2 x 2",
        r"classes +1,000",
    ):
        assert re.search(rf"^{line}$", text, re.MULTILINE), line
    declared = record["teacher"]
    assert declared["parameters"] == parameters and declared["identity"]["weights_sha256"] == sha
    assert (declared["width"], declared["grid"], declared["num_classes"]) == (64, [2, 2], 1000)

    assert f"checked on 5 images ({folder}), largest centered square" in text
    statistics = record["statistics"]
    assert set(statistics) == {"features", "patches"} and statistics["patches"]["count"] == 20
    assert statistics["features"]["norm_mean"] == pytest.approx(features.norm(dim=1).mean().item(), rel=1e-4)
    unit = nn.functional.normalize(features.double(), dim=1)
    cosines = (unit @ unit.T)[~torch.eye(5, dtype=torch.bool)]
    assert statistics["features"]["mean_cosine"] == pytest.approx(cosines.mean().item(), rel=1e-4)
    assert statistics["features"]["bad_values"] == 0 and record["bad_images"] == 0

    names = ImageNetInfo().label_descriptions()
    top = logits[0].softmax(0).topk(5)
    assert [shown["image"] for shown in record["shown"]] == ["photo0.png", "photo1.png"]
    assert [found["label"] for found in record["shown"][0]["classes"]] == top.indices.tolist()
    assert [found["percent"] for found in record["shown"][0]["classes"]] == pytest.approx(
        [100 * value for value in top.values.tolist()], rel=1e-3
    )
    assert names[top.indices[0]] in record["shown"][0]["classes"][0]["class"]
    assert re.search(rf"^photo0.png\n +[\d.]+ %  n\d{{8}} {re.escape(names[top.indices[0]])}$", text, re.MULTILINE)
    # Nothing says of what these photos are.
    assert record["accuracy"] is None and "top-1" not in text
    assert record["verdict"] == "alive" and record["reasons"] == []
    assert text.rstrip().splitlines()[-1].startswith("alive: features of 5 inputs")
    assert record["versions"]["timm"] == timm.__version__


def test_json_holds_what_is_printed(weights: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    photos = write_zip(tmp_path / "photos.zip", some_photos())
    run(*vit_arguments(weights, "--images", photos, "--json", tmp_path / "check.json"))
    text = capsys.readouterr().out
    record = json.loads((tmp_path / "check.json").read_text())
    assert list(record["statistics"]) == ["features", "patches"]
    for key, values in printed_figures(text).items():
        for part, value in zip(("features", "patches"), values, strict=True):
            assert float(value) == pytest.approx(record["statistics"][part][key], abs=5.1e-4), (part, key)
    percents = [found["percent"] for image in record["shown"] for found in image["classes"]]
    printed = re.findall(r"^ +([\d.]+) %  n\d{8}", text, re.MULTILINE)
    assert len(percents) == 25
    assert [float(value) for value in printed] == pytest.approx(percents, abs=0.051)
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".")] == []


def test_without_images_it_takes_rendered_scenes(weights: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    texts = []
    for name in ("first", "second"):
        run(*vit_arguments(weights, "--json", tmp_path / name))
        texts.append(capsys.readouterr().out)
    assert "checked on 16 images (rendered scenes, not photos)" in texts[0]
    assert texts[0] == texts[1]
    assert (tmp_path / "first").read_bytes() == (tmp_path / "second").read_bytes()
    run(*vit_arguments(weights, "--limit", 3))
    assert "checked on 3 images" in capsys.readouterr().out


def test_nan_in_the_weights_ends_it(weights: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    model = random_vit()
    with torch.no_grad():
        model.blocks[2].mlp.fc1.bias[5] = float("nan")
    broken = save(model, tmp_path / "nan.safetensors")
    with pytest.raises(UserError, match="timm:test_vit cannot teach: .* of its features are NaN") as caught:
        run(*vit_arguments(broken, "--images", write_zip(tmp_path / "p.zip", some_photos()), "--json", tmp_path / "j"))
    assert "\n" not in str(caught.value)
    text = capsys.readouterr().out
    assert "alive" not in text and printed_figures(text)["bad_values"][0] == str(5 * 64)
    record = json.loads((tmp_path / "j").read_text())
    assert record["verdict"] == "failed" and record["statistics"]["features"]["count"] == 0
    assert record["statistics"]["features"]["mean_cosine"] is None
    assert record["shown"] == [] and record["bad_logits"] == 5 * 1000 and record["reasons"][0] in str(caught.value)


def test_constant_features_end_it(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    model = random_vit()
    with torch.no_grad():
        model.norm.weight.zero_()
    with pytest.raises(UserError, match="its features are the same 5 times") as caught:
        run(*vit_arguments(save(model, tmp_path / "w.safetensors"), "--images", write_folder(tmp_path, some_photos())))
    assert "\n" not in str(caught.value)
    assert "alive" not in capsys.readouterr().out


def test_nearly_parallel_features_give_a_warning(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    model = random_vit()
    with torch.no_grad():
        model.norm.weight.fill_(0.01)
        model.norm.bias.fill_(1.0)
    weights = save(model, tmp_path / "w.safetensors")
    run(*vit_arguments(weights, "--images", write_folder(tmp_path / "p", some_photos()), "--json", tmp_path / "j"))
    text = capsys.readouterr().out
    assert re.search(r"^WARNING: features hardly differ \(mean cosine (0\.99\d|1\.000)\)", text, re.MULTILINE)
    assert "alive" not in text
    assert json.loads((tmp_path / "j").read_text())["verdict"] == "warning"


def test_one_image_shows_nothing(weights: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    run(*vit_arguments(weights, "--images", write_folder(tmp_path, some_photos(1))))
    text = capsys.readouterr().out
    assert "WARNING: one image does not show whether features differ" in text and "alive" not in text
    assert printed_figures(text)["mean_cosine"][0] == "-"


# ----------------------------------------------------------------------------------------------------------------------
# Teachers with chosen answers
# ----------------------------------------------------------------------------------------------------------------------


class ChosenTeacher:
    """Features are mean colors; logits those of a table's row, which the image's red names (ten a row)."""

    width, image_size, grid, patch_width, max_tokens = 3, 8, None, 0, 0
    modalities, tokenizer = ("image",), None
    identity = {"teacher": "chosen", "weights_sha256": "0123456789abcdef"}

    def __init__(self, table: Sequence[Sequence[float]]) -> None:
        self.table = torch.tensor(table)
        self.num_classes = self.table.shape[1]
        self.images: list[Tensor] = []

    def __call__(self, batch: TeacherInput) -> TeacherOutput:
        self.images.append(batch.images)
        colors = batch.images.float().mean((2, 3))
        rows = (colors[:, 0] / 10).round().long()
        return TeacherOutput(colors, logits=self.table[rows % len(self.table)])


@pytest.fixture
def check(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture) -> Callable[..., Any]:
    """A function that checks a given teacher; gives what it printed and what it wrote as JSON."""

    def check_teacher(teacher: Any, *arguments: object) -> tuple[str, dict[str, Any]]:
        monkeypatch.setattr(teacher_check, "build_from", lambda args: teacher)
        run("timm:chosen", "--json", tmp_path / "check.json", *arguments)
        return capsys.readouterr().out, json.loads((tmp_path / "check.json").read_text())

    return check_teacher


@pytest.fixture
def synsets(tmp_path: Path) -> Path:
    path = tmp_path / "synsets.txt"
    path.write_text("".join(f"{wnid} thing {number}, matter\n" for number, wnid in enumerate(WNIDS)))
    return path


# Row i is the answer to photo i, whose class is i: rank 0, rank 0, rank 3, a tie for the first place, last.
ANSWERS = [
    [9.0, 1, 2, 3, 4, 5],
    [1.0, 9, 2, 3, 4, 5],
    [6.0, 7, 2, 8, 1, 0],
    [9.0, 1, 2, 9, 4, 5],
    [1.0, 2, 3, 4, 0, 5],
]
PHOTOS = [plain(10 * number, 40 * number) for number in range(5)]


@pytest.mark.parametrize("kind", ["zip", "folder", "tar"])
@pytest.mark.parametrize(
    "pattern",
    [
        "{wnid}_thing.png",
        "{wnid}/{number}.png",
        "val/{wnid}-thing/x/{number}.png",
        "{wnid}/n00000000_{number}.png",
    ],
)
def test_known_accuracy(check: Callable[..., Any], synsets: Path, tmp_path: Path, kind: str, pattern: str) -> None:
    files = {pattern.format(wnid=WNIDS[number], number=number): data for number, data in enumerate(PHOTOS)}
    write = {"zip": write_zip, "folder": write_folder, "tar": write_tar}[kind]
    images = write(tmp_path / f"photos.{kind}", files)
    text, record = check(ChosenTeacher(ANSWERS), "--images", images, "--synsets", synsets, "--batch-size", 2)
    assert record["accuracy"] == pytest.approx(
        {"top_1": 40.0, "top_5": 80.0, "chance": 100 / 6, "images": 5, "without_class": 0}
    )
    assert "\ntop-1 40.0 %, top-5 80.0 % of 5 images named by class\n" in text
    assert "without a known class" not in text
    first = record["shown"][0]
    assert first["image"] == next(iter(files))
    assert [found["label"] for found in first["classes"]] == [0, 5, 4, 3, 2]
    assert first["classes"][0]["class"] == "n00000000 thing 0, matter"
    percent = 100 * torch.tensor(ANSWERS[0]).softmax(0)[0].item()
    assert re.search(rf"^ +{percent:.1f} %  n00000000 thing 0, matter$", text, re.MULTILINE)


def test_photos_without_a_known_class_are_left_out(check: Callable[..., Any], synsets: Path, tmp_path: Path) -> None:
    names = ("n00000000_a.png", "n99999999_b.png", "n000000001.png", "x.png")
    files = dict(zip(names, PHOTOS, strict=False))
    images = write_zip(tmp_path / "photos.zip", files)
    text, record = check(ChosenTeacher(ANSWERS), "--images", images, "--synsets", synsets)
    assert record["accuracy"]["top_1"] == 100 and record["accuracy"]["images"] == 1
    assert record["accuracy"]["without_class"] == 3
    assert "of 1 images named by class; 3 without a known class left out" in text
    assert record["statistics"]["features"]["count"] == 4


def test_a_classifier_at_chance_gives_a_warning(check: Callable[..., Any], synsets: Path, tmp_path: Path) -> None:
    # Right for a sixth of 24 photos, as a guess would be.
    files = {f"{WNIDS[number % 6]}_{number:02d}.png": plain(0, 10 * number) for number in range(24)}
    images = write_zip(tmp_path / "photos.zip", files)
    text, record = check(ChosenTeacher(ANSWERS), "--images", images, "--synsets", synsets)
    assert record["accuracy"]["top_1"] == pytest.approx(100 / 6)
    assert "WARNING: it classifies no better than chance (top-1 17 %)" in text and record["verdict"] == "warning"
    # Right for all of twelve.
    files = {f"{WNIDS[number % 2]}_{number:02d}.png": plain(10 * (number % 2), 10 * number) for number in range(12)}
    images = write_zip(tmp_path / "right.zip", files)
    text, record = check(ChosenTeacher(ANSWERS[:2]), "--images", images, "--synsets", synsets)
    assert record["accuracy"]["top_1"] == 100 and "no better than chance" not in text


def test_logits_that_are_nan_end_it(check: Callable[..., Any], synsets: Path, tmp_path: Path) -> None:
    images = write_zip(tmp_path / "p.zip", {f"{number}.png": data for number, data in enumerate(PHOTOS)})
    table = [[float("nan"), *row[1:]] for row in ANSWERS]
    with pytest.raises(UserError, match="5 of its logits are NaN or infinite"):
        check(ChosenTeacher(table), "--images", images)


def test_images_are_read_a_batch_at_a_time(
    check: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    events: list[str] = []

    class Watched(ChosenTeacher):
        def __call__(self, batch: TeacherInput) -> TeacherOutput:
            events.append(f"teacher {len(batch.images)}")
            assert batch.ids.tolist() == list(range(4 * len(self.images), 4 * len(self.images) + len(batch.images)))
            return super().__call__(batch)

    decode = teacher_inputs.decode
    monkeypatch.setattr(teacher_inputs, "decode", lambda data: events.append("read") or decode(data))
    check(Watched(ANSWERS), "--images", write_zip(tmp_path / "p.zip", some_photos(10)), "--batch-size", 4)
    four = ["read"] * 4
    assert events == [*four, "teacher 4", *four, "teacher 4", "read", "read", "teacher 2"]


def test_limit_spreads_over_all_photos(check: Callable[..., Any], tmp_path: Path) -> None:
    files = {f"{number:03d}.png": photo(number) for number in range(40)}
    _, record = check(ChosenTeacher(ANSWERS), "--images", write_zip(tmp_path / "p.zip", files), "--limit", 4)
    names = [shown["image"] for shown in record["shown"]]
    assert [int(name[:3]) // 10 for name in names] == [0, 1, 2, 3]
    assert record["statistics"]["features"]["count"] == 4


def test_bad_images_are_counted_and_named(check: Callable[..., Any], tmp_path: Path) -> None:
    files = some_photos(3) | {f"bad{number}.jpg": b"no image" for number in range(4)}
    files |= {"notes.txt": b"no image either", "cut.png": photo(0)[:60]}
    path = write_zip(tmp_path / "photos.zip", files)
    # A byte of a stored member changes: zipfile finds it by its checksum.
    data = path.read_bytes()
    place = data.index(photo(1)) + 50
    path.write_bytes(data[:place] + bytes([data[place] ^ 255]) + data[place + 1 :])
    text, record = check(ChosenTeacher(ANSWERS), "--images", path)
    assert record["bad_images"] == 6 and record["statistics"]["features"]["count"] == 2
    assert "left out, as they cannot be read: 6\n  bad0.jpg: no image" in text
    assert list(record["first_bad_images"]) == ["bad0.jpg", "bad1.jpg", "bad2.jpg"]
    assert "bad3.jpg" not in text and "notes.txt" not in text
    assert "checked on 2 images" in text
    only = write_zip(tmp_path / "only.zip", {"photo1.png": photo(1), "photo2.png": photo(2)})
    data = only.read_bytes()
    place = data.index(photo(1)) + 50
    only.write_bytes(data[:place] + bytes([data[place] ^ 255]) + data[place + 1 :])
    _, record = check(ChosenTeacher(ANSWERS), "--images", only)
    assert list(record["first_bad_images"]) == ["photo1.png"] and "CRC" in record["first_bad_images"]["photo1.png"]


def test_crops_are_those_of_training(check: Callable[..., Any], tmp_path: Path) -> None:
    photos = {f"{number}.png": photo(number, size) for number, size in enumerate([(40, 31), (17, 64), (8, 8)])}
    images = write_zip(tmp_path / "p.zip", photos)
    teacher = ChosenTeacher(ANSWERS)
    check(teacher, "--images", images)
    expected = torch.stack([ImageTransform(teacher.image_size)(data) for data in photos.values()])
    assert torch.equal(teacher.images[0].cpu(), expected)


def test_crop_fraction_shows_the_middle(check: Callable[..., Any], tmp_path: Path) -> None:
    # The middle 20 x 20 pixels are white.
    pixels = np.zeros((40, 60, 3), dtype=np.uint8)
    pixels[10:30, 20:40] = 255
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    images = write_zip(tmp_path / "p.zip", {"a.png": file.getvalue(), "b.png": photo(0)})
    shares = {}
    for fraction in (1.0, 0.75, 0.5):
        teacher = ChosenTeacher(ANSWERS)
        text, _ = check(teacher, "--images", images, "--crop-fraction", fraction)
        shares[fraction] = teacher.images[0][0].float().mean().item() / 255
        assert fraction == 1 or f"{fraction:g} of the centered square" in text
    # Resizing looks a little beyond the square.
    assert shares[0.5] == pytest.approx(1, abs=0.05)
    assert shares[0.75] == pytest.approx((2 / 3) ** 2, abs=0.05) and shares[1.0] == pytest.approx(1 / 4, abs=0.05)
    assert center_part(Image.new("RGB", (3, 1)), 0.1).size == (1, 1)


# ----------------------------------------------------------------------------------------------------------------------
# Teachers of text
# ----------------------------------------------------------------------------------------------------------------------


class TextModel(nn.Module):
    """Token embeddings, and their mean as the global feature; of images the mean color."""

    def __init__(self, of_images: bool) -> None:
        super().__init__()
        self.table = nn.Embedding(60, 3)
        self.of_images = of_images

    def forward(
        self, images: Tensor | None, text: Tensor | None, padding_mask: Tensor | None, layers: bool = False
    ) -> TeacherOutput:
        tokens = None if text is None else self.table(text)
        pooled = None
        if tokens is not None:
            kept = torch.ones_like(text, dtype=torch.bool) if padding_mask is None else ~padding_mask
            pooled = (tokens * kept[..., None]).sum(1) / kept.sum(1, keepdim=True)
        if self.of_images:
            return TeacherOutput(images.mean((2, 3)), text_features=pooled)
        return TeacherOutput(pooled, patches=tokens)


@pytest.fixture
def vocabulary(tmp_path: Path) -> Path:
    letters = "abcdefghijklmnopqrstuvwxyz"
    pieces = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *letters, *(f"##{letter}" for letter in letters), "."]
    (tmp_path / "vocab.txt").write_text("\n".join(pieces) + "\n")
    return tmp_path / "vocab.txt"


def text_teacher(tokenizer: Path | None, **options: Any) -> FrozenTeacher:
    torch.manual_seed(0)
    modalities = options.pop("modalities", ("text",))
    model = TextModel("image" in modalities)
    return FrozenTeacher(
        model, {"teacher": "text"}, modalities=modalities, tokenizer=tokenizer, max_tokens=40, **options
    )


def test_a_teacher_of_text_reads_sentences(check: Callable[..., Any], vocabulary: Path) -> None:
    teacher = text_teacher(vocabulary)
    text, record = check(teacher)
    assert "checked on 16 sentences" in text and re.search(r"^reads +text$", text, re.MULTILINE)
    assert f"at most 40 tokens by {vocabulary}" in text and "pixels" not in text
    lengths = [min(40, 2 + len(load_tokenizer(vocabulary).pieces(sentence))) for sentence in SENTENCES]
    assert len(set(lengths)) > 1
    # Padding is no token.
    assert record["statistics"]["patches"]["count"] == sum(lengths)
    ids, mask = tokenize_sentences(vocabulary, 40)
    means = torch.stack([teacher.model.table(row[~hidden]).mean(0) for row, hidden in zip(ids, mask, strict=True)])
    assert record["statistics"]["features"]["norm_mean"] == pytest.approx(means.norm(dim=1).mean().item(), rel=1e-5)
    assert record["shown"] == [] and record["accuracy"] is None


def test_a_teacher_of_text_without_a_tokenizer_says_so(check: Callable[..., Any], tmp_path: Path) -> None:
    text, record = check(text_teacher(None))
    assert "checked on nothing: it reads text alone, and no tokenizer is known" in text
    assert "WARNING: its features have not been looked at" in text and record["statistics"] == {}
    images = write_zip(tmp_path / "p.zip", some_photos(2))
    with pytest.raises(UserError, match="reads text alone; leave it out"):
        check(text_teacher(None), "--images", images)


def test_a_teacher_of_both_reads_sentences_where_the_target_needs_them(
    check: Callable[..., Any], vocabulary: Path, tmp_path: Path
) -> None:
    options: dict[str, Any] = {"modalities": ("image", "text"), "image_size": 8}
    images = write_zip(tmp_path / "p.zip", some_photos(20))
    text, record = check(text_teacher(vocabulary, **options), "--images", images)
    assert set(record["statistics"]) == {"features"} and "sentences" not in text
    text, record = check(text_teacher(vocabulary, target="own", **options), "--images", images, "--batch-size", 6)
    assert record["statistics"]["features"]["count"] == 20
    # Each sentence once.
    assert record["statistics"]["text_features"]["count"] == 16
    assert "with 16 sentences" in text and re.search(r"features +text features\n", text)
    with pytest.raises(UserError, match="--target own needs a tokenizer"):
        check(text_teacher(None, target="own", **options), "--images", images, "--target", "own")


# ----------------------------------------------------------------------------------------------------------------------
# Classes
# ----------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("n01440764_tench.jpg", ["n01440764"]),
        ("n01440764/x.jpg", ["n01440764"]),
        ("train/n01440764_tench/n02084071_5.JPEG", ["n01440764", "n02084071"]),
        ("a/n00000001/n00000002/x.jpg", ["n00000002", "n00000001"]),
        ("n014407641.jpg", []),
        ("xn01440764.jpg", []),
        ("tench.jpg", []),
    ],
)
def test_synsets_of_a_name(name: str, expected: list[str]) -> None:
    assert list(wnids_of(name)) == expected


@pytest.mark.parametrize("count", [1000, 11221, 11821, 21841, 21842, 21843])
def test_classes_of_known_sets(count: int) -> None:
    classes = find_classes(count, None)
    assert len(classes.names) == len(set(classes.wnids)) == count
    assert all(re.fullmatch(r"n\d{8}", wnid) for wnid in classes.wnids)


def test_classes_of_unknown_sets_are_numbers() -> None:
    assert find_classes(7, None) == find_classes(0, None) == Classes()
    assert Classes().describe(3) == "class 3"


def test_imagenet_classes_agree_with_a_synset_list(shared_data: Path) -> None:
    listed = find_classes(1000, shared_data / "imagenet_sample" / "synset_words.txt")
    known = find_classes(1000, None)
    assert list(listed.wnids) == list(known.wnids)
    assert known.describe(0) == "n01440764 tench, Tinca tinca"


# ----------------------------------------------------------------------------------------------------------------------
# Mistakes, and the real thing
# ----------------------------------------------------------------------------------------------------------------------


def test_mistakes_end_with_one_line(weights: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    write_folder(Path("photos"), some_photos(2))
    write_folder(Path("none"), {"notes.txt": b"text"})
    write_folder(Path("bad"), {"x.png": b"no image", "y.jpg": b""})
    Path("file.bin").write_bytes(b"neither")
    Path("three.txt").write_text("n00000000 a\nn00000001 b\nn00000002 c\n")
    Path("broken.txt").write_text("n00000000 a\ncat\n")
    vit = vit_arguments(weights)
    for arguments, message in (
        (["nothing"], "'nothing' is unknown; choose"),
        (["timm:no_such_model"], "timm has no model 'no_such_model'"),
        (["timm:test_vit", "--weights", "no/such.safetensors"], "no such file: no/such.safetensors"),
        (["timm:test_resnet", "--weights", weights, "--images", "photos"], "test_resnet"),
        (["cached:somewhere"], "cached:somewhere holds targets, not a model"),
        ([*vit, "--images", "no/such.zip"], "--images: there is no folder, zip or tar no/such.zip"),
        ([*vit, "--images", "file.bin"], "file.bin is neither a folder nor a zip file nor an uncompressed tar"),
        ([*vit, "--images", "none"], "--images: none holds no images"),
        ([*vit, "--images", "bad"], "--images bad: none of 2 images can be read; x.png: no image"),
        ([*vit, "--synsets", "no/such.txt"], "cannot read no/such.txt"),
        ([*vit, "--synsets", "broken.txt"], "broken.txt, line 2: want a synset"),
        ([*vit, "--synsets", "three.txt"], "three.txt lists 3 classes, but the teacher has 1,000"),
        ([*vit, "--limit", "-1"], "--limit -1: want 0 or more"),
        ([*vit, "--show", "-1"], "--show -1: want 0 or more"),
        ([*vit, "--batch-size", "0"], "--batch-size 0: want 1 or more"),
        ([*vit, "--crop-fraction", "0"], "--crop-fraction 0.0: want more than 0, at most 1"),
        ([*vit, "--crop-fraction", "nan"], "--crop-fraction nan: want more than 0, at most 1"),
        ([*vit, "--images", "photos", "--json", "file.bin/x.json"], "--json: cannot write file.bin/x.json"),
        ([*vit, "--images", "photos", "--json", "photos"], "--json: cannot write photos"),
    ):
        with pytest.raises(UserError, match=re.escape(message)) as caught:
            run(*arguments)
        assert "\n" not in str(caught.value), arguments


def test_the_real_deit_tiny_is_alive(shared_data: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    name = "deit_tiny_patch16_224"
    weights, images = shared_data / name / "model_fp16.safetensors", shared_data / "imagenet_sample" / "images.zip"
    run(f"timm:{name}", "--weights", weights, "--images", images, "--limit", 32, "--json", tmp_path / "check.json")
    text = capsys.readouterr().out
    record = json.loads((tmp_path / "check.json").read_text())
    assert re.search(r"^parameters +5\.72 million$", text, re.MULTILINE)
    assert record["teacher"]["grid"] == [14, 14] and record["verdict"] == "alive"
    accuracy = record["accuracy"]
    # Of all thousand it is 73.6 and 91.9 %, and timm by itself gives as much; chance is 0.1 and 0.5 %.
    assert accuracy["images"] == 32 and accuracy["top_1"] > 55 and accuracy["top_5"] > 80
    assert f"top-1 {accuracy['top_1']:.1f} %, top-5 {accuracy['top_5']:.1f} % of 32 images named by class" in text
    assert record["statistics"]["features"]["mean_cosine"] < 0.5


def test_errors_name_the_commands_own_options() -> None:
    with pytest.raises(UserError) as caught:
        main(["teacher", "check", "timm:test_vit", "--weights", "", "--pooling", "max"])
    assert "--pooling 'max'" in str(caught.value) and "--teacher-pooling" not in str(caught.value)
