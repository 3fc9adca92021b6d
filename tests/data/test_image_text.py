"""Image-caption pairs: crops, captions and batches."""

import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from emkum.data.augment import Augment, AugmentConfig
from emkum.data.image_text import ImageTextDataset, ImageTextItem, MultiCropConfig, collate
from emkum.data.masking import IGNORE, BlockMasking, TextMaskingConfig
from emkum.data.shard_writing import ShardWriter
from emkum.data.shards import ShardedSamples
from emkum.data.sounds import SoundConfig, to_wav
from emkum.data.tokenizers import SpecialTokens, encode, load_tokenizer
from emkum.data.transforms import ImageTransform
from emkum.errors import UserError
from emkum.prepare.tokenizer import train_sentencepiece

WIDTH, HEIGHT, SAMPLES, CAPTIONS = 96, 64, 4, 5
RANDOM = ImageTransform(16, min_scale=0.3, flip=True)


@pytest.fixture(autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


class Words:
    """A tokenizer whose words are their own ids."""

    vocab_size = 100
    files: Sequence[Path] = ()
    special = SpecialTokens(bos=0, pad=1, eos=2, unk=3, mask=99)

    def pieces(self, text: str) -> list[int]:
        return [int(word) for word in text.split()]

    def word_starts(self, ids: Sequence[int]) -> np.ndarray:
        return np.ones(len(ids), dtype=bool)


def gradient(width: int = WIDTH, height: int = HEIGHT) -> Image.Image:
    """Red grows by 2 a column, green by 3 a row: a pixel tells where it came from."""
    pixels = np.zeros((height, width, 3), dtype=np.uint8)
    pixels[..., 0] = 2 * np.arange(width)
    pixels[..., 1] = 3 * np.arange(height)[:, None]
    return Image.fromarray(pixels)


def encoded(image: Image.Image, kind: str = "PNG") -> bytes:
    file = io.BytesIO()
    image.save(file, kind)
    return file.getvalue()


@pytest.fixture(scope="module")
def samples(tmp_path_factory: pytest.TempPathFactory) -> ShardedSamples:
    """Equal images, all with the first id; captions "10 10", "11 11", ... of image 0, "20 20", ... of image 1."""
    directory = tmp_path_factory.mktemp("data") / "train"
    with ShardWriter(directory, samples_per_shard=3) as writer:
        for number in range(SAMPLES):
            captions = [f"{10 * (number + 1) + i} " * 2 for i in range(CAPTIONS)]
            writer.add(f"key{number}", encoded(gradient()), "png", captions, image_id=100 + number // 2)
    return ShardedSamples(directory)


def dataset(samples: ShardedSamples, transform: ImageTransform = RANDOM, **arguments: Any) -> ImageTextDataset:
    return ImageTextDataset(samples, Words(), transform, **arguments)


def drawn(data: ImageTextDataset, index: int) -> list[int]:
    """The first word of each caption drawn."""
    return [caption[1] for caption in data[index].captions]


# ----------------------------------------------------------------------------------------------------------------------
# Crops
# ----------------------------------------------------------------------------------------------------------------------


def test_an_item_carries_its_names(samples: ShardedSamples) -> None:
    item = dataset(samples, split="valid")[3]
    assert (item.id, item.split, item.image_id, item.view, item.teacher_image) == (3, "valid", 100, -1, None)
    assert item.image.shape == (3, 16, 16) and item.image.dtype == torch.uint8


def test_crops_and_captions_depend_on_seed_epoch_and_index_alone(samples: ShardedSamples) -> None:
    data = dataset(samples, captions_per_image=2, seed=3)
    data.set_epoch(2)
    expected = [data[index] for index in range(SAMPLES)]
    again = dataset(samples, captions_per_image=2, seed=3)
    np.random.seed(99)
    torch.manual_seed(99)
    again.set_epoch(1)
    _ = [again[index] for index in range(SAMPLES)]
    again.set_epoch(2)
    for index in (2, 0, np.int64(3), 1, 2):
        assert torch.equal(again[index].image, expected[index].image)
        assert again[index].captions == expected[index].captions
    loader = torch.utils.data.DataLoader(
        again, batch_size=1, num_workers=2, collate_fn=list, multiprocessing_context="fork"
    )
    for (item,), wanted in zip(loader, expected, strict=True):
        assert torch.equal(item.image, wanted.image) and item.captions == wanted.captions


def test_crops_change_with_seed_epoch_and_index(samples: ShardedSamples) -> None:
    crops = []
    for seed in (1, 2):
        data = dataset(samples, seed=seed)
        for epoch in (1, 2, 3):
            data.set_epoch(epoch)
            crops += [data[index].image.numpy().tobytes() for index in range(SAMPLES)]
    assert len(set(crops)) == len(crops) == 24


def test_crops_repeat_after_num_views_epochs(samples: ShardedSamples) -> None:
    data = dataset(samples, num_views=3)
    crops, views = [], []
    for epoch in range(1, 8):
        data.set_epoch(epoch)
        crops.append(data[1].image.numpy().tobytes())
        views.append(data[1].view)
    assert views == [0, 1, 2, 0, 1, 2, 0]
    assert crops == [crops[view] for view in views]
    assert len(set(crops)) == 3


def test_captions_go_on_changing_where_crops_repeat(samples: ShardedSamples) -> None:
    data = dataset(samples, captions_per_image=1, num_views=1)
    seen = set()
    for epoch in range(1, 30):
        data.set_epoch(epoch)
        seen |= set(drawn(data, 0))
    assert seen == {10, 11, 12, 13, 14}


def test_student_and_teacher_see_the_same_region(samples: ShardedSamples) -> None:
    data = dataset(samples, ImageTransform(32, min_scale=0.3, flip=True), teacher_size=64)
    pairs = []
    for epoch in range(1, 9):
        data.set_epoch(epoch)
        item = data[0]
        assert item.image.shape == (3, 32, 32) and item.teacher_image.shape == (3, 64, 64)
        pairs.append((item.image.float(), F.avg_pool2d(item.teacher_image.float(), 2)))
    errors = torch.tensor([[(one - other).abs().mean() for _, other in pairs] for one, _ in pairs])
    assert errors.diagonal().max() < 1.0
    assert errors[~torch.eye(len(pairs), dtype=torch.bool)].min() > 2.0
    slopes = {bool((student[0, 16, -1] > student[0, 16, 0]).item()) for student, _ in pairs}
    assert slopes == {True, False}, "both mirrored and plain crops should be among them"


def test_the_student_sees_the_same_crop_with_and_without_a_teacher(samples: ShardedSamples) -> None:
    alone = dataset(samples)
    for teacher_size in (0, 16, 24):
        item = dataset(samples, teacher_size=teacher_size)[2]
        assert torch.equal(item.image, alone[2].image)
        assert (item.teacher_image is None) == (teacher_size != 24)


def test_crops_are_described_by_what_they_depend_on(samples: ShardedSamples) -> None:
    described = dataset(samples, num_views=4, seed=6).describe_crops()
    assert described == {"views": 4, "min_scale": 0.3, "flip": True, "seed": 6}
    assert dataset(samples, ImageTransform(16), num_views=4, seed=6).describe_crops() == {"views": 0}


def test_evaluation_sees_the_centered_square(samples: ShardedSamples) -> None:
    data = dataset(samples, ImageTransform(HEIGHT), num_views=3)
    whole = torch.from_numpy(np.array(gradient())).permute(2, 0, 1)
    for epoch in (1, 2):
        data.set_epoch(epoch)
        assert torch.equal(data[0].image, whole[:, :, 16:80])
        assert data[0].view == 0


# ----------------------------------------------------------------------------------------------------------------------
# Captions
# ----------------------------------------------------------------------------------------------------------------------


def test_captions_are_drawn_without_replacement(samples: ShardedSamples) -> None:
    data = dataset(samples, captions_per_image=3)
    draws = set()
    for epoch in range(1, 21):
        data.set_epoch(epoch)
        words = drawn(data, 1)
        assert len(words) == len(set(words)) == 3 and set(words) <= {20, 21, 22, 23, 24}
        draws.add(tuple(words))
    assert len(draws) > 10


@pytest.mark.parametrize("wanted", [5, 7, 10, 12])
def test_more_captions_than_there_are_begin_again(samples: ShardedSamples, wanted: int) -> None:
    words = drawn(dataset(samples, captions_per_image=wanted), 0)
    assert len(words) == wanted
    for start in range(0, wanted, CAPTIONS):
        part = words[start : start + CAPTIONS]
        assert len(set(part)) == len(part)


def test_zero_gives_all_captions_in_their_order(samples: ShardedSamples) -> None:
    data = dataset(samples, captions_per_image=0)
    assert drawn(data, 0) == [10, 11, 12, 13, 14]
    assert data[2].captions == [[0, word, word, 2] for word in range(30, 35)]


def test_images_draw_apart(samples: ShardedSamples) -> None:
    data = dataset(samples, captions_per_image=5)
    orders = {tuple(word % 10 for word in drawn(data, index)) for index in range(SAMPLES)}
    assert len(orders) > 1


def test_truncation_keeps_the_end_token(samples: ShardedSamples) -> None:
    text = "4 5 6 7 8"
    assert encode(Words(), text, 7) == [0, 4, 5, 6, 7, 8, 2]
    assert encode(Words(), text, 6) == [0, 4, 5, 6, 7, 2]
    assert encode(Words(), text, 3) == [0, 4, 2]
    assert encode(Words(), text, 2) == [0, 2]
    assert encode(Words(), "", 7) == [0, 2]
    assert dataset(samples, max_tokens=3, captions_per_image=0)[0].captions == [[0, word, 2] for word in range(10, 15)]
    for too_few in (1, 0, -1):
        with pytest.raises(UserError, match="at least 2"):
            encode(Words(), text, too_few)


# ----------------------------------------------------------------------------------------------------------------------
# Batches
# ----------------------------------------------------------------------------------------------------------------------


def item(number: int, captions: list[list[int]], teacher_size: int = 0) -> ImageTextItem:
    image = torch.full((3, 2, 2), number, dtype=torch.uint8)
    teacher = torch.full((3, teacher_size, teacher_size), number, dtype=torch.uint8) if teacher_size else None
    return ImageTextItem(number, "train", 70 + number, number % 2, image, captions, teacher)


def test_collate_by_hand() -> None:
    items = [
        item(5, [[0, 11, 12, 13, 2], [0, 14, 2]]),
        item(3, [[0, 21, 22, 2]]),
        item(8, [[0, 31, 2], [0, 2], [0, 32, 33, 2]]),
    ]
    batch = collate(items, num_groups=2)
    net_input = batch["net_input"]
    assert net_input["text"].tolist() == [
        [0, 2, 1, 1, 1],
        [0, 14, 2, 1, 1],
        [0, 31, 2, 1, 1],
        [0, 21, 22, 2, 1],
        [0, 32, 33, 2, 1],
        [0, 11, 12, 13, 2],
    ]
    assert net_input["padding_mask"].tolist() == [
        [column >= length for column in range(5)] for length in (2, 3, 3, 4, 4, 5)
    ]
    assert net_input["groups"] == [(3, 3), (3, 5)]
    assert net_input["caption_image"].tolist() == [2, 0, 2, 1, 2, 0]
    assert net_input["image_ids"].tolist() == [75, 73, 78]
    assert torch.equal(net_input["image"], torch.stack([item.image for item in items]))
    assert batch["id"].tolist() == [5, 3, 8] and batch["view"].tolist() == [1, 1, 0]
    assert (batch["split"], batch["nsentences"], batch["ntokens"]) == ("train", 3, 21)
    assert batch["teacher_image"] is None and batch["crops"] is None
    assert batch["masked_text"] is None and batch["num_text_targets"] is None
    special = [[0, 1, 2, 3, 4], [0, 2, 3, 4], [0, 2, 3, 4], [0, 3, 4], [0, 3, 4], [0, 4]]
    assert [row.nonzero().flatten().tolist() for row in batch["special"]] == special
    assert net_input["text"].dtype == batch["id"].dtype == torch.int64


def test_collate_stacks_teacher_images() -> None:
    batch = collate([item(1, [[0, 2]], 4), item(2, [[0, 2]], 4)])
    assert batch["teacher_image"].shape == (2, 3, 4, 4)
    assert batch["teacher_image"][:, 0, 0, 0].tolist() == [1, 2]


@pytest.mark.parametrize(("count", "groups"), [(1, 1), (5, 1), (5, 2), (5, 3), (5, 5), (2, 4), (9, 4)])
def test_groups_cover_all_captions(count: int, groups: int) -> None:
    lengths = np.random.default_rng(count).integers(1, 9, count)
    batch = collate([item(i, [[0, *range(10, 10 + n), 2]]) for i, n in enumerate(lengths)], groups)
    text, found = batch["net_input"]["text"], batch["net_input"]["groups"]
    assert len(found) == min(groups, count)
    assert sum(rows for rows, _ in found) == count
    assert max(rows for rows, _ in found) - min(rows for rows, _ in found) <= 1
    start = 0
    for rows, length in found:
        longest = int(text[start : start + rows].ne(1).sum(1).max())
        assert length == longest
        start += rows


def test_no_items_are_an_empty_batch() -> None:
    assert collate([]) == {}


def test_padding_is_told_by_lengths_not_by_ids() -> None:
    # CLIP's padding is the piece "!" too.
    batch = collate([item(1, [[5, 0, 6], [5, 0, 0, 6]])], pad=0)
    assert batch["net_input"]["text"].tolist() == [[5, 0, 6, 0], [5, 0, 0, 6]]
    assert batch["net_input"]["padding_mask"].tolist() == [[False, False, False, True], [False] * 4]


# ----------------------------------------------------------------------------------------------------------------------
# Further crops
# ----------------------------------------------------------------------------------------------------------------------


def test_further_crops_are_of_the_students_size_and_change_nothing_else(samples: ShardedSamples) -> None:
    plain = dataset(samples, captions_per_image=2, teacher_size=24)
    assert plain[0].crops is None and dataset(samples, multi_crop=MultiCropConfig(number=0))[0].crops is None
    data = dataset(samples, captions_per_image=2, teacher_size=24, multi_crop=MultiCropConfig(3, 0.1, 0.3))
    for index in range(SAMPLES):
        one, other = data[index], plain[index]
        assert [(crop.shape, crop.dtype) for crop in one.crops] == [((3, 16, 16), torch.uint8)] * 3
        assert torch.equal(one.image, other.image) and torch.equal(one.teacher_image, other.teacher_image)
        assert one.captions == other.captions


def test_further_crops_follow_seed_epoch_and_index_alone(samples: ShardedSamples) -> None:
    """Where the first crops repeat, too: no target of theirs is cached."""
    found: dict[bytes, tuple[int, ...]] = {}
    for number in (2, 3):
        for seed in (1, 2):
            data = dataset(samples, seed=seed, num_views=1, multi_crop=MultiCropConfig(number, 0.1, 0.3))
            for epoch in (1, 2):
                data.set_epoch(epoch)
                for index in range(SAMPLES):
                    for place, crop in enumerate(data[index].crops):
                        key = (seed, epoch, index, place)
                        assert found.setdefault(crop.numpy().tobytes(), key) == key
    assert len(found) == 2 * 2 * SAMPLES * 3


def test_further_crops_keep_their_part_of_the_area(samples: ShardedSamples) -> None:
    """Red and green tell from which columns and rows a crop is."""
    data = dataset(samples, ImageTransform(64, min_scale=0.9), multi_crop=MultiCropConfig(6, 0.05, 0.4))
    parts = []
    for epoch in range(1, 9):
        data.set_epoch(epoch)
        for crop in data[0].crops:
            columns, rows = (
                int(channel.max() - channel.min()) / step for channel, step in zip(crop, (2, 3), strict=False)
            )
            parts.append((columns + 1) * (rows + 1) / (WIDTH * HEIGHT))
    assert 0.04 < min(parts) < 0.12 and 0.33 < max(parts) < 0.45
    mirrored = {
        bool(crop[0, 8, -1] < crop[0, 8, 0]) for crop in dataset(samples, multi_crop=MultiCropConfig(9))[0].crops
    }
    assert mirrored == {True, False}, "crops are mirrored where the first one may be"


def test_further_crops_are_augmented_as_the_first_one(samples: ShardedSamples) -> None:
    augment = Augment(AugmentConfig(color_jitter=0.8, color_jitter_prob=1.0))
    plain = dataset(samples, multi_crop=MultiCropConfig(2))[1]
    changed = dataset(samples, multi_crop=MultiCropConfig(2), augment=augment)[1]
    assert not any(map(torch.equal, plain.crops, changed.crops))
    inactive = dataset(samples, multi_crop=MultiCropConfig(2), augment=Augment(AugmentConfig()))[1]
    assert all(map(torch.equal, plain.crops, inactive.crops))


def test_further_crops_of_a_batch_come_view_by_view(samples: ShardedSamples) -> None:
    data = dataset(samples, multi_crop=MultiCropConfig(2))
    items = [data[index] for index in (2, 0, 3)]
    crops = collate(items)["crops"]
    assert crops.shape == (6, 3, 16, 16) and crops.dtype == torch.uint8
    expected = [item.crops[view] for view in range(2) for item in items]
    assert all(map(torch.equal, crops, expected))
    whole = collate(data.__getitems__([2, 0, 3]))
    assert torch.equal(whole["crops"], crops)
    assert torch.equal(whole["net_input"]["image"], collate(items)["net_input"]["image"])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((-1,), "--multi-crop-number -1: want 0"),
        ((2, 0.0, 0.4), "--multi-crop-min-scale 0.0 and --multi-crop-max-scale 0.4"),
        ((2, 0.5, 0.4), "the first not above the second"),
        ((2, 0.5, 1.1), "--multi-crop-max-scale 1.1"),
    ],
)
def test_options_of_further_crops_are_checked(arguments: tuple[Any, ...], message: str) -> None:
    with pytest.raises(UserError, match=message):
        MultiCropConfig(*arguments)


# ----------------------------------------------------------------------------------------------------------------------
# Augmentation and masks
# ----------------------------------------------------------------------------------------------------------------------


def test_augmentation_changes_the_students_crop_alone(samples: ShardedSamples) -> None:
    augment = Augment(AugmentConfig(color_jitter=0.8, color_jitter_prob=1.0))
    for teacher_size in (0, 16, 24):
        plain = dataset(samples, teacher_size=teacher_size)[1]
        changed = dataset(samples, teacher_size=teacher_size, augment=augment)[1]
        assert not torch.equal(plain.image, changed.image)
        if teacher_size == 24:
            assert torch.equal(plain.teacher_image, changed.teacher_image)
        elif teacher_size == 16:
            # Of the same size as the student's, which does without a second crop unless its own is changed.
            assert plain.teacher_image is None
            assert torch.equal(changed.teacher_image, plain.image)
    assert torch.equal(dataset(samples, augment=Augment(AugmentConfig()))[1].image, dataset(samples)[1].image)


def test_masks_belong_to_their_captions_and_images(samples: ShardedSamples) -> None:
    masking = {"text_masking": TextMaskingConfig(prob=0.5), "patch_masking": BlockMasking((4, 6), 9, min_block=4)}
    data = dataset(samples, captions_per_image=3, **masking)
    items = [data[index] for index in range(SAMPLES)]
    batch = collate(items, num_groups=2)
    text, inputs, targets = batch["net_input"]["text"], batch["masked_text"], batch["masked_text_targets"]
    assert inputs.shape == targets.shape == text.shape
    predicted = targets != IGNORE
    assert torch.equal(targets[predicted], text[predicted]) and torch.equal(inputs[~predicted], text[~predicted])
    assert batch["num_text_targets"] == int(predicted.sum()) > 0
    assert not predicted[batch["special"]].any()
    assert (inputs == Words.special.mask).any() and not predicted[batch["net_input"]["padding_mask"]].any()
    assert batch["patch_mask"].shape == (SAMPLES, 4, 6) and (batch["patch_mask"].sum((1, 2)) == 9).all()
    for row, one in enumerate(items):
        np.testing.assert_array_equal(batch["patch_mask"][row], one.patch_mask)


def test_masks_change_nothing_else_and_follow_seed_epoch_and_index(samples: ShardedSamples) -> None:
    masking = {"text_masking": TextMaskingConfig(prob=0.5), "patch_masking": BlockMasking((4, 6), 9, min_block=4)}
    plain, masked, again = dataset(samples), dataset(samples, **masking), dataset(samples, **masking)
    seen = set()
    for epoch in (1, 2):
        for data in (plain, masked, again):
            data.set_epoch(epoch)
        for index in range(SAMPLES):
            assert torch.equal(masked[index].image, plain[index].image)
            assert masked[index].captions == plain[index].captions
            assert plain[index].masked_captions is None and plain[index].patch_mask is None
            np.testing.assert_array_equal(masked[index].patch_mask, again[index].patch_mask)
            for one, two in zip(masked[index].masked_captions, again[index].masked_captions, strict=True):
                np.testing.assert_array_equal(one.inputs, two.inputs)
            seen.add(masked[index].patch_mask.tobytes())
    assert len(seen) == 2 * SAMPLES


def test_captions_by_the_teachers_tokenizer_are_in_the_batchs_order(samples: ShardedSamples) -> None:
    class Characters:
        """One token a character, so that captions of as many words differ in length."""

        special = SpecialTokens(bos=5, pad=9, eos=6, unk=None, mask=None)

        def pieces(self, text: str) -> list[int]:
            return [ord(letter) for letter in text]

    plain = dataset(samples, captions_per_image=2)
    data = dataset(samples, captions_per_image=2, teacher_tokenizer=Characters(), teacher_max_tokens=6)
    items = [data[index] for index in range(SAMPLES)]
    assert [one.captions for one in items] == [plain[index].captions for index in range(SAMPLES)]
    batch = collate(items, num_groups=2, teacher_pad=9)
    net = batch["net_input"]
    assert batch["teacher_text"].shape == batch["teacher_padding_mask"].shape
    assert torch.equal(batch["teacher_text"] == 9, batch["teacher_padding_mask"])
    pairs = {
        (tuple(own), tuple(teachers))
        for one in items
        for own, teachers in zip(one.captions, one.teacher_captions, strict=True)
    }
    for text, hidden, other, other_hidden in zip(
        net["text"], net["padding_mask"], batch["teacher_text"], batch["teacher_padding_mask"], strict=True
    ):
        assert (tuple(text[~hidden].tolist()), tuple(other[~other_hidden].tolist())) in pairs
    assert max(len(teachers) for one in items for teachers in one.teacher_captions) == 6
    assert collate([plain[0]])["teacher_text"] is None


# ----------------------------------------------------------------------------------------------------------------------
# Tokenizers
# ----------------------------------------------------------------------------------------------------------------------

SENTENCES = [f"a {size} {color} dog runs over the grass" for size in ("big", "small") for color in ("red", "tan")] * 5


@pytest.fixture(scope="module")
def model_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.model"
    train_sentencepiece(iter(SENTENCES), path, 60)
    return path


def test_padding_is_masked_for_every_tokenizer(model_file: Path, samples: ShardedSamples) -> None:
    tokenizer = load_tokenizer(model_file)
    texts = ("a dog", "a small red dog runs over the grass")
    batch = collate([item(i, [encode(tokenizer, text, 64)]) for i, text in enumerate(texts)])
    lengths: Tensor = batch["net_input"]["padding_mask"].logical_not().sum(1)
    assert lengths.tolist() == [len(encode(tokenizer, text, 64)) for text in texts]


# sounds ---------------------------------------------------------------------------------------------------------------


def test_sounds_are_cropped_and_padded(samples: ShardedSamples, tmp_path: Path) -> None:
    lengths = (450, 900, 1500, 600)
    sounds = [np.arange(1, length + 1, dtype=np.int16) for length in lengths]
    with ShardWriter(tmp_path / "train") as writer:
        for number, sound in enumerate(sounds):
            writer.add(f"key{number}", encoded(gradient()), "png", ["10 10"], sound=to_wav(sound))
    heard = ShardedSamples(tmp_path / "train")
    longest = SoundConfig(800 / 16_000)
    training = ImageTextDataset(heard, Words(), RANDOM, sounds=longest)
    batch = collate(training.__getitems__(range(4)))["net_input"]
    assert batch["audio"].shape == (4, 800) and batch["audio"].dtype == torch.int16
    assert (~batch["audio_padding_mask"]).sum(1).tolist() == [450, 800, 800, 600]
    assert torch.equal(batch["audio"] == 0, batch["audio_padding_mask"])
    starts = set()
    for training.epoch in range(1, 6):
        starts.add(int(training[2].sound[0]))
        assert np.array_equal(training[2].sound, training[2].sound)
    assert len(starts) > 1
    scored = ImageTextDataset(heard, Words(), ImageTransform(16), sounds=longest, split="valid")
    assert int(scored[2].sound[0]) == 351 and np.array_equal(scored[0].sound, sounds[0])
    silent = ImageTextDataset(heard, Words(), RANDOM)
    assert "audio" not in collate([silent[0]])["net_input"]
    # Whether sounds are read changes no crop.
    training.set_epoch(1)
    assert torch.equal(silent[1].image, training[1].image)
    with pytest.raises(UserError, match="split train has 4 of 4 images without a sound; prepare it with --sounds"):
        ImageTextDataset(samples, Words(), RANDOM, sounds=longest)
