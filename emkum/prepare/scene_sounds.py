"""Scenes to sounds: what is in a scene, told without words.

Objects sound one after the other, in reading order of their cells. An object's color is the pitch of its tone, its
shape the timbre, its size the length; how late it starts tells its cell. The background is a quiet hum below all
tones: its color the pitch, its texture how the hum swells.
"""

import numpy as np
from numpy.typing import NDArray

from emkum.data.sounds import SAMPLE_RATE, to_wav
from emkum.prepare.scene_facts import BACKGROUND_COLORS, COLORS, SHAPES, TEXTURES, Scene, SceneObject

# The beginning of an object's tone moves by this much a cell; lengths and fades in seconds.
_SECONDS_A_CELL = 0.05
_LENGTHS = {"small": 0.1, "large": 0.2}
_FADE = 0.01
_TAIL = 0.02
# Pitches rise by minor thirds for objects, by whole tones for backgrounds.
_LOWEST, _COLOR_STEP = 220.0, 2 ** (3 / 12)
_LOWEST_HUM, _HUM_STEP = 82.0, 2 ** (2 / 12)
# Of each shape, the amplitudes of the tone's multiples 1, 2, 3 ...
_TIMBRES = dict(
    zip(
        SHAPES,
        (
            (1.0,),
            (1.0, 0.0, 0.6, 0.0, 0.4, 0.0, 0.3),
            (1.0, 0.0, 0.25, 0.0, 0.1),
            (1.0, 0.7, 0.6, 0.5, 0.4, 0.35, 0.3),
            (1.0, 0.8),
            (0.3, 1.0, 0.3, 1.0),
            (1.0, 0.0, 0.0, 0.0, 0.9),
            (0.5, 0.3, 1.0, 0.7),
        ),
        strict=True,
    )
)
_TONE, _HUM, _NOISE = 0.22, 0.05, 0.004
# A singer is never quite on pitch.
_DETUNE = 0.004

Samples = NDArray[np.float64]


def render_sound(scene: Scene, rng: np.random.Generator) -> bytes:
    """A WAV file of about half a second (0.12 to 0.62 s); equal scenes and generators give equal bytes.

    Args:
        scene: what sounds.
        rng: of pitch within a few thousandths, of loudness within a fifth, and of a little noise.
    """
    parts = [(_start(item), _tone(item, rng)) for item in scene.objects]
    length = max(start + len(tone) for start, tone in parts) + _samples(_TAIL)
    sound = _NOISE * rng.standard_normal(length) + _hum(scene, length, rng)
    for start, tone in parts:
        sound[start : start + len(tone)] += tone
    return to_wav(np.rint(32767 * np.clip(sound, -1, 1)).astype(np.int16))


def _samples(seconds: float) -> int:
    return round(seconds * SAMPLE_RATE)


def _start(item: SceneObject) -> int:
    return _samples(_SECONDS_A_CELL * (3 * item.row + item.column))


def _tone(item: SceneObject, rng: np.random.Generator) -> Samples:
    """(n,) of one object, rising and falling softly."""
    length = _samples(_LENGTHS[item.size])
    pitch = _LOWEST * _COLOR_STEP ** list(COLORS).index(item.color) * (1 + _DETUNE * rng.uniform(-1, 1))
    times = np.arange(length) / SAMPLE_RATE
    timbre = np.array(_TIMBRES[item.shape])
    waves = np.sin(2 * np.pi * pitch * np.outer(np.arange(1, len(timbre) + 1), times))
    tone = timbre @ waves / np.sqrt((timbre**2).sum())
    fade = np.minimum(1, np.minimum(times, times[::-1]) / _FADE)
    return _TONE * rng.uniform(0.8, 1.0) * fade * tone


def _hum(scene: Scene, length: int, rng: np.random.Generator) -> Samples:
    """(length,) of the background."""
    times = np.arange(length) / SAMPLE_RATE
    pitch = _LOWEST_HUM * _HUM_STEP ** list(BACKGROUND_COLORS).index(scene.background)
    pitch *= 1 + _DETUNE * rng.uniform(-1, 1)
    beat = {
        "plain": np.ones(length),
        "striped": 0.5 - 0.5 * np.cos(2 * np.pi * 25 * times),
        "checkered": (np.floor(times * 20) % 2 == 0).astype(float),
        "gradient": np.linspace(0, 1.5, length),
    }
    assert beat.keys() == set(TEXTURES)
    # A second wave, for what plays no low tones.
    return _HUM * beat[scene.texture] * (np.sin(2 * np.pi * pitch * times) + np.sin(4 * np.pi * pitch * times))
