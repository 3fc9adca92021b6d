"""Rendered scenes: the data that comes with the project, made on the spot."""

import argparse
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from emkum.errors import UserError
from emkum.prepare.common import add_common_arguments, add_set_parser, run_set
from emkum.prepare.raw_set import ImageSet, RawSample, Settings
from emkum.prepare.scene_drawing import render
from emkum.prepare.scene_facts import MAX_OBJECTS, Scene, draw_scene
from emkum.prepare.scene_language import describe, make_statements, name_regions
from emkum.prepare.scene_sounds import render_sound

# Goes up whenever equal options would give another output.
GENERATOR_VERSION = 1
MIN_IMAGES, MIN_SIDE = 10, 32
# Scene i goes to the split of position i modulo 10.
_SPLIT_CYCLE = 8 * ("train",) + ("valid", "test")


def add_parser(subparsers: argparse._SubParsersAction) -> None:
    """Add the sub-command `scenes`."""
    parser = add_set_parser(
        subparsers,
        "scenes",
        help="rendered scenes of colored shapes with captions, regions and statements; needs no download",
        description="Render scenes of one to three colored shapes: 80 % train, 10 % valid, 10 % test. No scene\n"
        "content (shapes, colors, sizes, coarse positions and background) occurs twice. Each sample's JSON holds\n"
        "captions, regions (phrase and box in pixels), objects, labels, and as many true as false statements.\n"
        "With --sounds each scene has a sound, too, that tells its objects and background without words.",
        example="  emkum prepare scenes --num-images 5000 --seed 1 --out data/scenes",
    )
    parser.add_argument(
        "--num-images", type=int, default=5000, metavar="N", help="scenes of all splits (default: %(default)s)"
    )
    parser.add_argument(
        "--seed", type=int, default=1, help="equal seeds give equal bytes with equal versions (default: %(default)s)"
    )
    parser.add_argument(
        "--image-size",
        dest="scene_size",
        type=int,
        default=64,
        metavar="PIXELS",
        help="side of the square images (default: %(default)s)",
    )
    parser.add_argument(
        "--captions-per-image", type=int, default=5, metavar="N", help="captions of an image (default: %(default)s)"
    )
    parser.add_argument(
        "--sounds",
        action="store_true",
        help="also a sound of half a second or so for each scene; all else stays",
    )
    add_common_arguments(parser, vocab_size=400, shrink=False)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> None:
    """Make the folder that the arguments of the sub-command describe."""
    run_set(Scenes(args.num_images, args.seed, args.scene_size, args.captions_per_image, args.sounds), args)


class Scenes(ImageSet):
    """The raw set.

    Args:
        num_images: of all splits together.
        seed: of everything.
        image_size: side in pixels.
        captions_per_image: how many.
        sounds: whether each scene has one.

    Raises:
        UserError: a number is too small.
    """

    name = "scenes"

    def __init__(
        self,
        num_images: int,
        seed: int = 1,
        image_size: int = 64,
        captions_per_image: int = 5,
        sounds: bool = False,
    ) -> None:
        _assert_at_least("--num-images", num_images, MIN_IMAGES)
        _assert_at_least("--seed", seed, 0)
        _assert_at_least("--image-size", image_size, MIN_SIDE)
        _assert_at_least("--captions-per-image", captions_per_image, 1)
        self.options: dict[str, Any] = {
            "num_images": num_images,
            "seed": seed,
            "scene_size": image_size,
            "captions_per_image": captions_per_image,
            "generator": GENERATOR_VERSION,
        }
        # Sets without sounds are named as they were before there were any.
        if sounds:
            self.options["sounds"] = True
        self.sources: dict[str, Path] = {}
        splits = [_SPLIT_CYCLE[index % len(_SPLIT_CYCLE)] for index in range(num_images)]
        self.counts = {split: splits.count(split) for split in dict.fromkeys(_SPLIT_CYCLE)}
        self._attempts: np.ndarray | None = None

    def part_sizes(self, split: str, settings: Settings) -> list[int]:
        # Chosen once, before the set is handed to worker processes: which content is new depends on all scenes before.
        if self._attempts is None:
            self._attempts = choose_attempts(self.options["seed"], self.options["num_images"])
        return super().part_sizes(split, settings)

    def samples(self, split: str, start: int, stop: int) -> Iterator[RawSample]:
        """In the order of the scenes' numbers, which are also their image ids."""
        numbers = [n for n in range(self.options["num_images"]) if _SPLIT_CYCLE[n % len(_SPLIT_CYCLE)] == split]
        options = self.options
        for number in numbers[start:stop]:
            attempt = int(self._attempts[number])
            yield make_sample(
                number,
                attempt,
                options["seed"],
                options["scene_size"],
                options["captions_per_image"],
                options.get("sounds", False),
            )


def _assert_at_least(option: str, value: int, least: int) -> None:
    if value < least:
        raise UserError(f"{option} {value}: want at least {least}")


def make_scene(seed: int, index: int, attempt: int) -> Scene:
    """Scene number `index`; further attempts have as many objects, so that the counts stay evenly spread."""
    count = random.Random(f"{seed} count {index}").randint(1, MAX_OBJECTS)
    return draw_scene(random.Random(f"{seed} scene {index} {attempt}"), count)


def choose_attempts(seed: int, num_images: int) -> np.ndarray:
    """(num_images,) uint16, for each scene the first attempt whose content no scene before it has."""
    attempts = np.zeros(num_images, dtype=np.uint16)
    seen: set[bytes] = set()
    for index in range(num_images):
        while (content := make_scene(seed, index, int(attempts[index])).content()) in seen:
            if attempts[index] == np.iinfo(np.uint16).max:
                raise UserError(f"--num-images {num_images}: there are not as many different scenes")
            attempts[index] += 1
        seen.add(content)
    return attempts


def make_sample(index: int, attempt: int, seed: int, size: int, num_captions: int, sounds: bool = False) -> RawSample:
    """Render and describe one scene.

    Args:
        index: number of the scene.
        attempt: number of its attempt.
        seed: of the set.
        size: side in pixels.
        num_captions: how many.
        sounds: make its sound, too.
    """
    scene = make_scene(seed, index, attempt)
    image, boxes = render(scene, size, np.random.default_rng((seed, index)))
    words = random.Random(f"{seed} words {index}")
    captions = describe(scene, num_captions, words)
    main = scene.main_object
    meta = {
        "regions": [{"phrase": name, "box": box} for name, box in zip(name_regions(scene), boxes, strict=True)],
        "objects": [
            {"shape": o.shape, "color": o.color, "size": o.size, "position": o.position, "box": box}
            for o, box in zip(scene.objects, boxes, strict=True)
        ],
        "labels": {
            "shape": main.shape,
            "color": main.color,
            "count": len(scene.objects),
            "background": scene.background,
            "texture": scene.texture,
        },
        "statements": make_statements(scene, words),
    }
    # Its own generator, so that images and words are those of a set without sounds.
    sound = render_sound(scene, np.random.default_rng((seed, index, 1))) if sounds else None
    return RawSample(f"{index:06d}", image, tuple(captions), image_id=index, meta=meta, sound=sound)
