"""Sounds: the file that shards hold, crops and batches."""

import io
import wave

import numpy as np
import pytest

from emkum.data.sounds import SHORTEST, SoundConfig, crop_sound, decode_sound, stack_sounds, to_wav
from emkum.errors import UserError


def noise(length: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(-32768, 32768, length).astype(np.int16)


def test_samples_come_back_from_a_plain_wav() -> None:
    samples = noise(1000)
    data = to_wav(samples)
    assert np.array_equal(decode_sound(data), samples) and decode_sound(data).dtype == np.int16
    with wave.open(io.BytesIO(data)) as file:
        assert file.getparams()[:4] == (1, 2, 16_000, 1000)


def test_other_files_are_refused() -> None:
    buffer = io.BytesIO()
    with wave.open(buffer, "wb") as file:
        file.setparams((2, 2, 16_000, 0, "NONE", ""))
        file.writeframes(noise(1000).tobytes())
    for data in (b"", b"no sound", buffer.getvalue()):
        with pytest.raises(UserError, match="16-bit WAV of 16,000 Hz and one channel: prepare the data again"):
            decode_sound(data)


def test_crops_are_whole_middle_or_drawn() -> None:
    samples = np.arange(100, dtype=np.int16)
    assert np.array_equal(crop_sound(samples, 100), samples)
    assert crop_sound(samples, 41).tolist() == list(range(29, 70))
    starts = {int(crop_sound(samples, 98, np.random.default_rng(seed))[0]) for seed in range(30)}
    assert starts == {0, 1, 2}
    assert all(len(crop_sound(samples, 98, np.random.default_rng(seed))) == 98 for seed in range(5))


def test_batches_are_padded_to_the_longest_and_to_a_frame() -> None:
    sounds = [noise(500, 1), noise(700, 2)]
    batch = stack_sounds(sounds)
    assert batch.samples.shape == (2, 700) and batch.padding_mask.sum(1).tolist() == [200, 0]
    for row, sound in enumerate(sounds):
        assert np.array_equal(batch.samples[row][~batch.padding_mask[row]].numpy(), sound)
    assert batch.samples[0, 500:].abs().sum() == 0
    assert stack_sounds([noise(3)]).samples.shape == (1, SHORTEST)


def test_the_longest_sound_in_seconds() -> None:
    assert SoundConfig(1.5).max_samples == 24_000
    with pytest.raises(UserError, match="--sound-max-seconds 0.01: want 0.025 or more"):
        SoundConfig(0.01)
