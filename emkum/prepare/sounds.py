"""Sound files as people have them, made into the one kind that shards hold."""

import io
import wave

import numpy as np

from emkum.data.sounds import SAMPLE_RATE, SHORTEST, to_wav

# Suffixes of files that are meant as sounds; all but the first need soundfile.
SUFFIXES = (".wav", ".flac", ".ogg", ".mp3")


class BadSound(Exception):
    """A sound that cannot be used; the message says why."""


def stored_sound(data: bytes) -> bytes:
    """The WAV file to store for a sound file: mean of its channels, at 16 kHz, 16 bits.

    Args:
        data: WAV of whole numbers; other WAV, FLAC, OGG and MP3 where soundfile is installed.

    Raises:
        BadSound: it cannot be decoded, or is shorter than 25 ms.
    """
    samples, rate = _decoded(data)
    mono = samples.mean(axis=1)
    if rate != SAMPLE_RATE:
        mono = _resampled(mono, rate)
    if len(mono) < SHORTEST:
        raise BadSound(f"shorter than {1000 * SHORTEST / SAMPLE_RATE:g} ms")
    if not np.isfinite(mono).all():
        raise BadSound("holds numbers that are not finite")
    return to_wav(np.clip(np.rint(mono * 32768), -32768, 32767).astype(np.int16))


def _decoded(data: bytes) -> tuple[np.ndarray, int]:
    """(n, channels) float64 within [-1, 1], and samples a second."""
    try:
        with wave.open(io.BytesIO(data)) as file:
            channels, width, rate, count = file.getparams()[:4]
            content = file.readframes(count)
    except (wave.Error, EOFError):
        return _decoded_by_soundfile(data)
    if len(content) < count * channels * width:
        raise BadSound("its file is cut off")
    return _whole_numbers(content, width).reshape(-1, channels), rate


def _whole_numbers(content: bytes, width: int) -> np.ndarray:
    """Samples of `width` bytes, the lowest first; those of one byte are unsigned, as WAV has them."""
    if width == 1:
        return np.frombuffer(content, np.uint8) / 128 - 1
    raw = np.frombuffer(content, np.uint8).reshape(-1, width)
    # The bytes that are there go to the top of 32 bits, so that the sign is right.
    padded = np.zeros((len(raw), 4), np.uint8)
    padded[:, 4 - width :] = raw
    return padded.view("<i4")[:, 0] / 2**31


def _decoded_by_soundfile(data: bytes) -> tuple[np.ndarray, int]:
    try:
        import soundfile
    except ImportError:
        raise BadSound("no WAV of whole numbers; others are read by soundfile: pip install 'emkum[sounds]'") from None
    try:
        samples, rate = soundfile.read(io.BytesIO(data), always_2d=True)
    except (RuntimeError, ValueError) as error:
        raise BadSound(f"cannot be decoded: {error}") from None
    return samples, rate


def _resampled(samples: np.ndarray, rate: int) -> np.ndarray:
    import torch
    from torchaudio.functional import resample

    return resample(torch.from_numpy(samples), rate, SAMPLE_RATE).numpy()
