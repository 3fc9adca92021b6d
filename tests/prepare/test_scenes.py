"""Rendered scenes: determinism, splits without overlap, and words that are true of the pixels."""

import io
import json
import random
import re
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from emkum.data.shards import ShardSample, available_splits, open_split
from emkum.data.sounds import decode_sound
from emkum.data.tokenizers import load_tokenizer
from emkum.errors import UserError
from emkum.prepare.raw_set import Settings
from emkum.prepare.scene_drawing import draw_mask
from emkum.prepare.scene_facts import (
    BACKGROUND_COLORS,
    COLORS,
    MAX_OBJECTS,
    POSITIONS,
    SHAPES,
    SIZES,
    TEXTURES,
    Scene,
    SceneObject,
    tones,
    visible_colors,
)
from emkum.prepare.scene_sounds import render_sound
from emkum.prepare.scenes import Scenes, choose_attempts, make_sample, make_scene

NUM_IMAGES = 300
NUMBERS = {"one": 1, "two": 2, "three": 3}


@pytest.fixture(scope="module")
def out(tmp_path_factory: pytest.TempPathFactory, run_prepare) -> Path:
    folder = tmp_path_factory.mktemp("scenes") / "out"
    run_prepare("scenes", "--out", folder, "--num-images", NUM_IMAGES, "--seed", 3)
    return folder


@pytest.fixture(scope="module")
def samples(out: Path) -> list[ShardSample]:
    return [sample for split in available_splits(out) for sample in open_split(out, split)]


@pytest.fixture(scope="module")
def many_meta() -> list[dict]:
    """Facts and statements of many scenes, as small images."""
    return [make_sample(index, 0, seed=11, size=32, num_captions=1).meta for index in range(1500)]


def _pixels(sample: ShardSample) -> np.ndarray:
    image = Image.open(io.BytesIO(sample.image))
    assert image.format == "JPEG"
    return np.asarray(image.convert("RGB")).astype(float)


# Determinism and splits.


def test_splits_and_record(out: Path, samples: list[ShardSample]) -> None:
    assert {split: len(open_split(out, split)) for split in available_splits(out)} == {
        "train": 240,
        "valid": 30,
        "test": 30,
    }
    assert sorted(sample.image_id for sample in samples) == list(range(NUM_IMAGES))
    record = json.loads((out / "prepare.json").read_text())
    assert record["splits"]["train"] == {
        "images": 240,
        "captions": 1200,
        "duplicate_images": 0,
        "duplicate_names": 0,
        "skipped": 0,
        "skipped_captions": 0,
    }
    assert record["options"]["seed"] == 3
    assert sorted(path.name for path in out.parent.iterdir()) == ["out"]


def test_equal_seeds_give_equal_bytes_with_any_number_of_workers(out, tmp_path, run_prepare, folder_bytes) -> None:
    run_prepare("scenes", "--out", tmp_path / "b", "--num-images", NUM_IMAGES, "--seed", 3, "--workers", 2)
    assert folder_bytes(tmp_path / "b") == folder_bytes(out)
    run_prepare("scenes", "--out", tmp_path / "c", "--num-images", 20, "--seed", 4, "--vocab-size", 0)
    assert open_split(tmp_path / "c", "train")[0].image != open_split(out, "train")[0].image


def test_more_images_keep_the_first_ones(out: Path) -> None:
    raw = Scenes(20, seed=3)
    for split, count in raw.counts.items():
        assert raw.part_sizes(split, Settings()) == [count]
        for made, stored in zip(raw.samples(split, 0, count), open_split(out, split), strict=False):
            assert (made.key, made.image, made.captions) == (stored.key, stored.image, stored.captions)


def _content(sample: ShardSample) -> tuple:
    facts = sorted((o["shape"], o["color"], o["size"], o["position"]) for o in sample.meta["objects"])
    return tuple(facts), sample.meta["labels"]["background"], sample.meta["labels"]["texture"]


def test_no_content_occurs_twice(samples: list[ShardSample]) -> None:
    assert len({_content(sample) for sample in samples}) == NUM_IMAGES


def test_duplicate_contents_are_drawn_again(monkeypatch: pytest.MonkeyPatch) -> None:
    # With one background and one color some contents collide at once.
    for name, choice in (
        ("TEXTURES", ("plain",)),
        ("BACKGROUND_COLORS", {"gray": (128, 128, 128)}),
        ("SHAPES", ("star",)),
    ):
        monkeypatch.setattr(f"emkum.prepare.scene_facts.{name}", choice)
    attempts = choose_attempts(seed=1, num_images=400)
    assert attempts.max() > 0
    scenes = [make_scene(1, index, int(attempt)) for index, attempt in enumerate(attempts)]
    assert len({scene.content() for scene in scenes}) == 400
    # Drawing again never changes the number of objects.
    assert [len(scene.objects) for scene in scenes] == [len(make_scene(1, index, 0).objects) for index in range(400)]


@pytest.mark.parametrize("option", ["--num-images=9", "--image-size=8", "--captions-per-image=0", "--workers=0"])
def test_numbers_too_small(option: str, tmp_path: Path, run_prepare) -> None:
    with pytest.raises(UserError, match=f"{option.partition('=')[0]} .*want (at least|1 to)"):
        run_prepare("scenes", "--out", tmp_path / "out", option)
    assert list(tmp_path.iterdir()) == []


def test_after_an_error_in_the_middle_the_next_run_goes_on(
    tmp_path, run_prepare, monkeypatch, out, folder_bytes
) -> None:
    words = ["scenes", "--out", tmp_path / "out", "--num-images", NUM_IMAGES, "--seed", 3, "--workers", 1]

    def fail(split: str, part: int, folder: Path, settings: Settings) -> None:
        if split == "test":
            raise RuntimeError("in the middle")
        return write(split, part, folder, settings)

    raw = Scenes(NUM_IMAGES, seed=3)
    write = raw.write_part
    monkeypatch.setattr(raw, "write_part", fail)
    monkeypatch.setattr("emkum.prepare.scenes.Scenes", lambda *_: raw)
    with pytest.raises(RuntimeError, match="in the middle"):
        run_prepare(*words)
    # The folder is not there; what was made waits beside it.
    assert [path.name for path in tmp_path.iterdir()] == [".out.partial"]
    monkeypatch.undo()
    made = []
    again = Scenes.samples
    monkeypatch.setattr(
        Scenes, "samples", lambda self, split, *range_: made.append(split) or again(self, split, *range_)
    )
    run_prepare(*words)
    assert made == ["test"]
    assert folder_bytes(tmp_path / "out") == folder_bytes(out)


# Pixels.


def test_colors_stand_out() -> None:
    for background in BACKGROUND_COLORS:
        assert len(visible_colors(background)) >= 7
        for color in visible_colors(background):
            for ground in (BACKGROUND_COLORS[background], *tones(background)):
                assert np.linalg.norm(np.subtract(COLORS[color], ground)) > 90


def test_boxes_hold_the_objects_pixels(samples: list[ShardSample]) -> None:
    for sample in samples:
        pixels = _pixels(sample)
        assert pixels.shape == (64, 64, 3)
        for item in sample.meta["objects"]:
            x0, y0, x1, y1 = item["box"]
            assert 0 <= x0 < x1 <= 64 and 0 <= y0 < y1 <= 64
            alike = np.linalg.norm(pixels - COLORS[item["color"]], axis=-1) < 45
            area = (x1 - x0) * (y1 - y0)
            assert alike[y0:y1, x0:x1].sum() > 0.22 * area, (sample.key, item)
            # Tight: each side of the box touches the object, give or take a blurred pixel.
            for edge in (alike[y0 : y0 + 3, x0:x1], alike[y1 - 3 : y1, x0:x1]):
                assert edge.any(), (sample.key, item)
            for edge in (alike[y0:y1, x0 : x0 + 3], alike[y0:y1, x1 - 3 : x1]):
                assert edge.any(), (sample.key, item)


def test_outside_the_boxes_there_is_background_alone(samples: list[ShardSample]) -> None:
    for sample in samples:
        pixels = _pixels(sample)
        outside = np.ones((64, 64), dtype=bool)
        for x0, y0, x1, y1 in (item["box"] for item in sample.meta["objects"]):
            outside[max(y0 - 2, 0) : y1 + 2, max(x0 - 2, 0) : x1 + 2] = False
        dark, light = (np.array(tone) for tone in tones(sample.meta["labels"]["background"]))
        assert (pixels[outside] > dark - 45).all() and (pixels[outside] < light + 45).all()


def test_boxes_do_not_overlap_and_sizes_differ(samples: list[ShardSample]) -> None:
    for sample in samples:
        boxes = [item["box"] for item in sample.meta["objects"]]
        for i, a in enumerate(boxes):
            for b in boxes[:i]:
                assert a[0] >= b[2] or b[0] >= a[2] or a[1] >= b[3] or b[1] >= a[3]
        for item in sample.meta["objects"]:
            height = item["box"][3] - item["box"][1]
            assert height <= 15 if item["size"] == "small" else height >= 17


def test_positions_name_the_place_of_the_box(samples: list[ShardSample]) -> None:
    for item in (item for sample in samples for item in sample.meta["objects"]):
        x0, y0, x1, y1 = item["box"]
        column, row = (int(np.digitize((a + b) / 128, (0.36, 0.64))) for a, b in ((x0, x1), (y0, y1)))
        assert POSITIONS[3 * row + column] == item["position"]


@pytest.mark.parametrize("shape", SHAPES)
def test_shapes_stay_within_their_radius(shape: str) -> None:
    rng = random.Random(0)
    for _ in range(20):
        scene = make_scene(rng.randrange(1000), 0, 0)
        item = scene.objects[0]
        mask = draw_mask(
            type(item)(shape, *item.facts[1:3], item.row, item.column, item.x, item.y, item.radius, 12.0), 96
        )
        rows, columns = np.nonzero(mask >= 128)
        for low, high, center in ((columns.min(), columns.max() + 1, item.x), (rows.min(), rows.max() + 1, item.y)):
            assert low >= 96 * (center - item.radius) - 1 and high <= 96 * (center + item.radius) + 1


def test_image_size(tmp_path: Path, run_prepare) -> None:
    run_prepare("scenes", "--out", tmp_path / "out", "--num-images", 10, "--image-size", 96, "--vocab-size", 0)
    sample = open_split(tmp_path / "out", "test")[0]
    assert _pixels(sample).shape == (96, 96, 3)
    large = make_sample(9, 0, seed=1, size=96, num_captions=1)
    assert large.image == sample.image


# Words. The checks read the text and know nothing of how it was made.

_THING = re.compile(
    rf"(?:\b(an?|two|three) )?(?:(small|little|large|big) )?({'|'.join(COLORS)}) ({'|'.join(SHAPES)})(e?s)?\b"
)
_RELATION = re.compile(
    r"\b(left of|right of|above|below|over|beneath|higher than|lower than|on the left of|on the right of)"
)
_SIZE_OF = {"small": "small", "little": "small", "large": "large", "big": "large"}


def _related(relation: str, a: list[int], b: list[int]) -> bool:
    """Whether box `a` lies so to box `b`, by the centers, which must differ clearly."""
    dx, dy = (b[0] + b[2] - a[0] - a[2]) / 2, (b[1] + b[3] - a[1] - a[3]) / 2
    distance = {"left": dx, "right": -dx, "above": dy, "over": dy, "higher": dy}
    words = [word for word in relation.split() if word in distance]
    value = distance[words[0]] if words else -dy
    return value > 5


def _find(objects: list[dict], words: tuple) -> list[dict]:
    _, size, color, shape, _ = words
    found = [o for o in objects if (o["color"], o["shape"]) == (color, shape)]
    return [o for o in found if not size or o["size"] == _SIZE_OF[size]]


def test_captions_name_what_is_there(samples: list[ShardSample]) -> None:
    for sample in samples:
        objects = sample.meta["objects"]
        for caption in sample.captions:
            for match in _THING.finditer(caption):
                article, _, _, _, many = match.groups()
                found = _find(objects, match.groups())
                wanted = {"two": 2, "three": 3}.get(article, 1)
                assert len(found) == wanted and bool(many) == (wanted > 1), (caption, objects)
                if article in ("a", "an"):
                    first = match.group(0).split()[1][0]
                    assert article == ("an" if first in "aeiou" else "a"), caption
            count = re.search(r"\b(one|two|three|single) shapes?\b", caption)
            if count:
                assert {"single": 1, **NUMBERS}[count.group(1)] == len(objects)
            is_are = re.search(r"([a-z]+) which (is|are) (small|large)", caption)
            if is_are:
                match = list(_THING.finditer(caption[: is_are.end(1)]))[-1]
                assert {o["size"] for o in _find(objects, match.groups())} == {is_are.group(3)}, caption


def test_captions_tell_relations_truly(samples: list[ShardSample]) -> None:
    checked = 0
    for sample in samples:
        objects = sample.meta["objects"]
        for caption in sample.captions:
            relations = list(_RELATION.finditer(caption))
            things = list(_THING.finditer(caption))
            for relation in relations:
                after = [match for match in things if match.start() >= relation.end()]
                something = re.match(r" something (\w+)", caption[relation.end() :])
                if something:
                    others = [o for o in objects if o["color"] == something.group(1)]
                    subject = _find(objects, things[0].groups())
                    others = [o for o in others if o not in subject]
                    assert any(_related(relation.group(1), a["box"], b["box"]) for a in subject for b in others)
                else:
                    for a in _find(objects, things[0].groups()):
                        for b in _find(objects, after[0].groups()):
                            assert _related(relation.group(1), a["box"], b["box"]), (caption, objects)
                checked += 1
    assert checked > 200


def test_captions_tell_backgrounds_truly(samples: list[ShardSample]) -> None:
    textures = {
        "stripes": "striped",
        "striped": "striped",
        "check": "checkered",
        "gradient": "gradient",
        "shaded": "gradient",
    }
    told = 0
    for sample in samples:
        labels = sample.meta["labels"]
        for caption in sample.captions:
            for color in BACKGROUND_COLORS:
                assert color not in caption.split() or color == labels["background"], caption
                told += color in caption.split()
            for word, texture in {**textures, "plain": "plain"}.items():
                assert word not in caption or texture == labels["texture"], caption
    assert told > len(samples)


def test_captions_are_varied_and_mostly_tell_all(samples: list[ShardSample]) -> None:
    complete = 0
    for sample in samples:
        assert len(sample.captions) == 5
        kinds = {(o["color"], o["shape"]) for o in sample.meta["objects"]}
        named = [{match.groups()[2:4] for match in _THING.finditer(caption)} for caption in sample.captions]
        assert named[0] == kinds
        complete += sum(kinds == names for names in named)
    assert complete >= 0.8 * 5 * len(samples)
    distinct = [len(set(sample.captions)) for sample in samples]
    assert np.mean(distinct) > 4.9
    texts = Counter(caption for sample in samples for caption in sample.captions)
    assert sum(count == 1 for count in texts.values()) > 0.75 * 5 * len(samples)


def test_regions_fit_one_object_alone(samples: list[ShardSample]) -> None:
    for sample in samples:
        regions, objects = sample.meta["regions"], sample.meta["objects"]
        assert len({region["phrase"] for region in regions}) == len(regions)
        for region, item in zip(regions, objects, strict=True):
            assert region["box"] == item["box"]
            fitting = _find(objects, _THING.search(region["phrase"]).groups())
            assert item in fitting
            if len(fitting) > 1:
                assert region["phrase"].endswith(item["position"])


def test_labels_describe_the_largest_object(samples: list[ShardSample]) -> None:
    for sample in samples:
        labels, objects = sample.meta["labels"], sample.meta["objects"]
        largest = [o for o in objects if o["size"] == "large"] or objects
        first = min(largest, key=lambda o: POSITIONS.index(o["position"]))
        assert labels["count"] == len(objects)
        assert (labels["shape"], labels["color"]) == (first["shape"], first["color"])


def _is_true(text: str, meta: dict) -> bool:
    """Judge a statement by the structured facts and boxes."""
    objects, labels = meta["objects"], meta["labels"]
    if match := re.fullmatch(r"there (?:is|are) (one|two|three) shapes?", text):
        return len(objects) == NUMBERS[match[1]]
    if match := re.fullmatch(r"there is an? (\w+) (\w+)", text):
        return any((o["color"], o["shape"]) == match.groups() for o in objects)
    if match := re.fullmatch(r"the background is (?:a )?(\w+)", text):
        assert match[1] in (*BACKGROUND_COLORS, *TEXTURES)
        return match[1] in (labels["background"], labels["texture"])
    if match := re.fullmatch(r"the (\w+) is (\w+)", text):
        (item,) = [o for o in objects if o["shape"] == match[1]]
        return item["color"] == match[2]
    if match := re.fullmatch(r"the (\w+) (\w+) is (small|large)", text):
        (item,) = [o for o in objects if (o["color"], o["shape"]) == match.groups()[:2]]
        return item["size"] == match[3]
    match = re.fullmatch(r"the (\w+) (\w+) is (left of|right of|above|below) the (\w+) (\w+)", text)
    (a,) = [o for o in objects if (o["color"], o["shape"]) == (match[1], match[2])]
    (b,) = [o for o in objects if (o["color"], o["shape"]) == (match[4], match[5])]
    return _related(match[3], a["box"], b["box"])


def test_statements_are_labeled_truly_and_balanced(samples: list[ShardSample]) -> None:
    for sample in samples:
        statements = sample.meta["statements"]
        assert len(statements) == 6
        assert sum(statement["label"] for statement in statements) == 3
        for statement in statements:
            assert _is_true(statement["text"], sample.meta) == statement["label"], (statement, sample.meta)


def test_statements_without_the_image_are_at_chance(many_meta: list[dict]) -> None:
    # The likelier label of each text, learned on one half, judged on the other; and the same for pairs of words.
    half = len(many_meta) // 2
    for features in (lambda text: [text], lambda text: list(zip(text.split(), text.split()[1:], strict=False))):
        votes: Counter = Counter()
        for meta in many_meta[:half]:
            for statement in meta["statements"]:
                for feature in features(statement["text"]):
                    votes[feature] += 1 if statement["label"] else -1
        right = []
        for meta in many_meta[half:]:
            for statement in meta["statements"]:
                score = sum(np.sign(votes[feature]) for feature in features(statement["text"]))
                right.append(0.5 if score == 0 else float((score > 0) == statement["label"]))
        assert abs(np.mean(right) - 0.5) < 0.04


def test_facts_are_evenly_spread(many_meta: list[dict]) -> None:
    counts = Counter(meta["labels"]["count"] for meta in many_meta)
    assert set(counts) == set(range(1, MAX_OBJECTS + 1))
    assert min(counts.values()) > 0.28 * len(many_meta)
    objects = [o for meta in many_meta for o in meta["objects"]]
    for name, choices, low in (("shape", SHAPES, 0.09), ("size", SIZES, 0.47), ("color", tuple(COLORS), 0.05)):
        shares = Counter(o[name] for o in objects)
        assert set(shares) == set(choices)
        assert min(shares.values()) > low * len(objects)


def test_tokenizer_knows_every_word(out: Path, samples: list[ShardSample]) -> None:
    tokenizer = load_tokenizer(out)
    assert 50 < tokenizer.vocab_size <= 400
    texts = [caption for sample in samples for caption in sample.captions]
    assert not any(3 in tokenizer.pieces(text) for text in texts)
    assert max(len(tokenizer.pieces(text)) for text in texts) < 62


# Sounds.


def _spectrum(samples: np.ndarray) -> np.ndarray:
    """Power at each whole Hz."""
    return np.abs(np.fft.rfft(samples, 16_000)) ** 2


def test_sounds_change_nothing_else(tmp_path: Path, run_prepare, folder_bytes) -> None:
    options = ("--num-images", 20, "--seed", 3, "--image-size", 32, "--vocab-size", 0)
    run_prepare("scenes", "--out", tmp_path / "silent", *options)
    for name in ("heard", "again"):
        run_prepare("scenes", "--out", tmp_path / name, *options, "--sounds")
    assert folder_bytes(tmp_path / "heard") == folder_bytes(tmp_path / "again")
    silent, heard = (list(open_split(tmp_path / name, "train")) for name in ("silent", "heard"))
    assert [sample._replace(sound=b"") for sample in heard] == silent
    assert all(0.1 < len(decode_sound(sample.sound)) / 16_000 < 0.65 for sample in heard)
    assert len({sample.sound for sample in heard}) == len(heard)
    records = [json.loads((tmp_path / name / "prepare.json").read_text())["options"] for name in ("silent", "heard")]
    assert "sounds" not in records[0] and records[1] == records[0] | {"sounds": True}


def test_a_sound_tells_color_shape_size_and_cell() -> None:
    def lone(shape: str, color: str, size: str, row: int, column: int) -> np.ndarray:
        item = SceneObject(shape, color, size, row, column, 0.5, 0.5, 0.1, 0.0)
        return decode_sound(render_sound(Scene((item,), "plain", "gray"), np.random.default_rng(0)))

    pitches = []
    for color in COLORS:
        spectrum = _spectrum(lone("circle", color, "large", 0, 0))
        pitches.append(200 + int(spectrum[200:].argmax()))
    assert np.allclose(np.array(pitches[1:]) / pitches[:-1], 2 ** (3 / 12), atol=0.03)
    # A circle's tone is pure; a square's has a third multiple, and no second one.
    red = pitches[0]
    power = {shape: _spectrum(lone(shape, "red", "large", 0, 0)) for shape in SHAPES}
    around = {shape: [power[shape][n * red - 15 : n * red + 15].max() for n in (1, 2, 3)] for shape in SHAPES}
    assert around["circle"][2] < 0.01 * around["circle"][0] and around["square"][2] > 0.1 * around["square"][0]
    assert around["square"][1] < 0.01 * around["square"][0] < around["star"][1]
    assert len({tuple(np.rint(np.log10(values)).tolist()) for values in around.values()}) > 4
    assert len(lone("circle", "red", "large", 0, 0)) > len(lone("circle", "red", "small", 0, 0)) + 1000
    begins = []
    for cell in range(9):
        loud = np.abs(lone("circle", "black", "small", *divmod(cell, 3))) > 0.12 * 32768
        begins.append(int(loud.argmax()))
    assert np.allclose(np.diff(begins), 800, atol=60)


def test_a_sound_tells_the_background() -> None:
    item = SceneObject("circle", "red", "small", 2, 2, 0.5, 0.5, 0.1, 0.0)
    hums = {}
    for texture in TEXTURES:
        for background in BACKGROUND_COLORS:
            sound = decode_sound(render_sound(Scene((item,), texture, background), np.random.default_rng(0)))
            hums[texture, background] = sound[:6000].astype(float)
    plain = [20 + int(_spectrum(hums["plain", background])[20:200].argmax()) for background in BACKGROUND_COLORS]
    assert np.all(np.diff(plain) > 5)
    loud = {texture: np.abs(hums[texture, "gray"]).reshape(-1, 400).max(1) for texture in TEXTURES}
    assert loud["gradient"][-1] > 3 * loud["gradient"][0] and loud["plain"].min() > 0.5 * loud["plain"].max()
    assert loud["checkered"].min() < 0.4 * loud["checkered"].max()
