"""Sounds of samples, stored as WAV files of 16-bit samples at 16 kHz in one channel, and crops of them."""

import io
import wave
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np

from emkum.errors import UserError

if TYPE_CHECKING:
    from torch import Tensor

SAMPLE_RATE = 16_000
# Samples of one frame of Data2Vec 2's audio encoder, 25 ms: what is shorter has nothing to be heard.
SHORTEST = 400
_SAMPLE_BYTES = 2


@dataclass
class SoundConfig:
    max_seconds: float = field(
        default=10.0,
        metadata={"help": "longest sound; of longer ones a part is read, drawn in training, else from the middle"},
    )

    def __post_init__(self) -> None:
        if self.max_samples < SHORTEST:
            raise UserError(f"--sound-max-seconds {self.max_seconds:g}: want {SHORTEST / SAMPLE_RATE:g} or more")

    @property
    def max_samples(self) -> int:
        return round(self.max_seconds * SAMPLE_RATE)


@dataclass
class SoundBatch:
    """Sounds of different lengths together.

    Attributes:
        samples: (B, L) int16, 0 at padding.
        padding_mask: (B, L) bool, True at padding.
    """

    samples: "Tensor"
    padding_mask: "Tensor"


def to_wav(samples: np.ndarray) -> bytes:
    """(n,) int16 samples as the file that shards hold; equal samples give equal bytes."""
    buffer = io.BytesIO()
    with wave.open(buffer, "wb") as file:
        file.setnchannels(1)
        file.setsampwidth(_SAMPLE_BYTES)
        file.setframerate(SAMPLE_RATE)
        file.writeframes(samples.astype("<i2").tobytes())
    return buffer.getvalue()


def decode_sound(data: bytes) -> np.ndarray:
    """(n,) int16, the samples of a file that `to_wav` made.

    Raises:
        UserError: it is another kind of file.
    """
    try:
        with wave.open(io.BytesIO(data)) as file:
            kind = file.getnchannels(), file.getsampwidth(), file.getframerate()
            content = file.readframes(file.getnframes())
    except (wave.Error, EOFError):
        kind, content = (), b""
    if kind != (1, _SAMPLE_BYTES, SAMPLE_RATE):
        raise UserError(f"a sound is no 16-bit WAV of {SAMPLE_RATE:,} Hz and one channel: prepare the data again")
    return np.frombuffer(content, "<i2").astype(np.int16)


def crop_sound(samples: np.ndarray, longest: int, rng: np.random.Generator | None = None) -> np.ndarray:
    """At most `longest` samples of a sound: at a place that `rng` draws, or the middle without one."""
    spare = len(samples) - longest
    if spare <= 0:
        return samples
    start = spare // 2 if rng is None else int(rng.integers(spare + 1))
    return samples[start : start + longest]


def stack_sounds(sounds: Sequence[np.ndarray]) -> SoundBatch:
    """Sounds, (n,) int16 each, padded to the longest one, and to one frame at least."""
    # Preparing data does without it.
    import torch

    lengths = np.array([len(sound) for sound in sounds])
    padding = np.arange(max(SHORTEST, int(lengths.max()))) >= lengths[:, None]
    samples = np.zeros(padding.shape, dtype=np.int16)
    samples[~padding] = np.concatenate(list(sounds))
    return SoundBatch(torch.from_numpy(samples), torch.from_numpy(padding))
