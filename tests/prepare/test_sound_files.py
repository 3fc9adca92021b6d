"""Sound files of many kinds, made into the one that shards hold."""

import io
import wave

import numpy as np
import pytest

from emkum.data.sounds import decode_sound, to_wav
from emkum.prepare.sounds import BadSound, stored_sound

RATE = 16_000


def tone(pitch: float = 440.0, rate: int = RATE, seconds: float = 0.5) -> np.ndarray:
    return 0.5 * np.sin(2 * np.pi * pitch * np.arange(round(rate * seconds)) / rate)


def wav(samples: np.ndarray, width: int = 2, rate: int = RATE) -> bytes:
    """(n,) or (n, channels) in [-1, 1] as whole numbers of `width` bytes."""
    numbers = np.rint(samples * (2 ** (8 * width - 1) - 1)).astype(np.int64) + (128 if width == 1 else 0)
    content = numbers.astype("<i8").reshape(-1).view(np.uint8).reshape(-1, 8)[:, :width].tobytes()
    buffer = io.BytesIO()
    with wave.open(buffer, "wb") as file:
        file.setparams((1 if samples.ndim == 1 else samples.shape[1], width, rate, 0, "NONE", ""))
        file.writeframes(content)
    return buffer.getvalue()


@pytest.mark.parametrize("width", [1, 2, 3, 4])
def test_whole_numbers_of_every_width(width: int) -> None:
    found = decode_sound(stored_sound(wav(tone(), width))) / 32768
    assert np.abs(found - tone()).max() < (0.02 if width == 1 else 1e-4)


def test_a_file_of_the_right_kind_keeps_its_samples() -> None:
    samples = np.random.default_rng(0).integers(-32768, 32768, 2000).astype(np.int16)
    assert stored_sound(to_wav(samples)) == to_wav(samples)


def test_channels_are_averaged() -> None:
    both = np.stack([tone(440), tone(1000)], axis=1)
    found = decode_sound(stored_sound(wav(both))) / 32768
    assert np.abs(found - both.mean(1)).max() < 1e-4


@pytest.mark.parametrize("rate", [8000, 44_100])
def test_other_rates_are_resampled(rate: int) -> None:
    found = decode_sound(stored_sound(wav(tone(rate=rate), rate=rate))) / 32768
    # The filter rings at both ends.
    inner = slice(200, 7800)
    assert len(found) == 8000 and np.abs(found[inner] - tone()[inner]).max() < 0.01


def test_loud_samples_are_clipped_not_wrapped() -> None:
    loudest = decode_sound(stored_sound(wav(np.tile([1.0, -1.0], 4000), rate=8000, width=4)))
    assert loudest.max() <= 32767 and loudest.min() >= -32768
    assert stored_sound(wav(np.ones(1000), width=4)) == to_wav(np.full(1000, 32767, np.int16))


def test_sounds_that_cannot_be_used() -> None:
    whole = wav(tone())
    for data, reason in (
        (whole[:1000], "its file is cut off"),
        (wav(tone(seconds=0.02)), "shorter than 25 ms"),
        (b"", "soundfile|cannot be decoded"),
        (b"no sound at all", "soundfile|cannot be decoded"),
    ):
        with pytest.raises(BadSound, match=reason):
            stored_sound(data)
