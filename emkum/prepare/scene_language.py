"""Scenes to words: captions, phrases for regions, and true and false statements."""

import random
from collections.abc import Callable, Sequence

from emkum.prepare.scene_facts import (
    BACKGROUND_COLORS,
    MAX_OBJECTS,
    OPPOSITE,
    RELATIONS,
    SHAPES,
    SIZES,
    TEXTURES,
    Scene,
    SceneObject,
    holds,
    visible_colors,
)

NUMBER_WORDS = ("no", "one", "two", "three")
STATEMENT_PAIRS = 3

_RELATION_WORDS = {
    "left of": ("left of", "to the left of", "on the left of"),
    "right of": ("right of", "to the right of", "on the right of"),
    "above": ("above", "higher than", "over"),
    "below": ("below", "lower than", "beneath"),
}
_POSITION_WORDS = {
    "top left": ("in the top left", "in the upper left corner"),
    "top": ("at the top", "at the top in the middle"),
    "top right": ("in the top right", "in the upper right corner"),
    "left": ("on the left", "at the left edge"),
    "center": ("in the center", "in the middle"),
    "right": ("on the right", "at the right edge"),
    "bottom left": ("in the bottom left", "in the lower left corner"),
    "bottom": ("at the bottom", "at the bottom in the middle"),
    "bottom right": ("in the bottom right", "in the lower right corner"),
}
_BACKGROUND_WORDS = {
    "plain": ("a plain {} background", "a {} background", "plain {}"),
    "striped": ("a striped {} background", "a {} background with stripes", "{} stripes"),
    "checkered": ("a checkered {} background", "a {} checkerboard", "{} checks"),
    "gradient": ("a {} gradient", "a {} gradient background", "a shaded {} background"),
}
_SIZE_WORDS = {"small": ("small", "little"), "large": ("large", "big")}

# Objects of one shape and color.
Group = Sequence[SceneObject]


def group_objects(scene: Scene) -> list[list[SceneObject]]:
    """Objects of equal shape and color together, in reading order of their first."""
    groups: dict[tuple[str, str], list[SceneObject]] = {}
    for item in scene.objects:
        groups.setdefault((item.shape, item.color), []).append(item)
    return list(groups.values())


def with_article(words: str) -> str:
    return f"{'an' if words[0] in 'aeiou' else 'a'} {words}"


def plural(shape: str) -> str:
    return f"{shape}es" if shape.endswith("s") else f"{shape}s"


def join(parts: Sequence[str]) -> str:
    return parts[0] if len(parts) == 1 else f"{', '.join(parts[:-1])} and {parts[-1]}"


def _name_group(group: Group, rng: random.Random, size_chance: float) -> str:
    """Such as "a large red circle", "two red circles"; the size where it is drawn and shared by the whole group."""
    words = [group[0].color, group[0].shape if len(group) == 1 else plural(group[0].shape)]
    if len({item.size for item in group}) == 1 and rng.random() < size_chance:
        words.insert(0, rng.choice(_SIZE_WORDS[group[0].size]))
    text = " ".join(words)
    return with_article(text) if len(group) == 1 else f"{NUMBER_WORDS[len(group)]} {text}"


def _name_background(scene: Scene, rng: random.Random) -> str:
    return rng.choice(_BACKGROUND_WORDS[scene.texture]).format(scene.background)


def _on_background(scene: Scene, rng: random.Random, chance: float = 1.0) -> str:
    # A lone object has too few facts to be found by without its background.
    if rng.random() >= (chance if len(scene.objects) > 1 else 1.0):
        return ""
    return f" {rng.choice(('on', 'on', 'against', 'in front of'))} {_name_background(scene, rng)}"


def _relation_between(a: Group, b: Group, rng: random.Random) -> str | None:
    """A relation that holds, in words; the one with the longer way where two hold; None where none does."""
    relations = [relation for relation in RELATIONS if holds(relation, a, b)]
    if not relations:
        return None
    if len(a) == len(b) == 1 and len(relations) == 2:
        columns, rows = abs(a[0].column - b[0].column), abs(a[0].row - b[0].row)
        if columns != rows:
            relations = [relation for relation in relations if (relation in RELATIONS[:2]) == (columns > rows)]
    return rng.choice(_RELATION_WORDS[rng.choice(relations)])


def _caption_relation(scene: Scene, rng: random.Random) -> str | None:
    """Such as "a large red circle left of a blue star and above a green heart on a gray background"."""
    groups = group_objects(scene)
    rng.shuffle(groups)
    names = [_name_group(group, rng, 0.5) for group in groups]
    related, others = [], []
    for group, name in zip(groups[1:], names[1:], strict=True):
        relation = _relation_between(groups[0], group, rng)
        if relation is None:
            others.append(name)
        else:
            related.append(f"{relation} {name}")
    if not related:
        return None
    text = f"{names[0]} {' and '.join(related)}"
    if others:
        text += f", {rng.choice(('and', 'with'))} {join(others)}"
    return text + _on_background(scene, rng, 0.5)


def _caption_positions(scene: Scene, rng: random.Random) -> str:
    """Such as "a red circle in the top left and two blue stars, one on the right and one in the center"."""
    groups = group_objects(scene)
    rng.shuffle(groups)
    parts = []
    for group in groups:
        places = [rng.choice(_POSITION_WORDS[item.position]) for item in group]
        name = _name_group(group, rng, 0.3)
        parts.append(f"{name} {places[0]}" if len(group) == 1 else f"{name}, {join([f'one {p}' for p in places])}")
    if any(len(group) > 1 for group in groups):
        return "; ".join(parts) + _on_background(scene, rng, 0.3).replace(" ", ", all ", 1)
    return join(parts) + _on_background(scene, rng, 0.3)


def _list_groups(scene: Scene, rng: random.Random, size_chance: float) -> str:
    groups = group_objects(scene)
    rng.shuffle(groups)
    return join([_name_group(group, rng, size_chance) for group in groups])


def _caption_list(scene: Scene, rng: random.Random) -> str:
    """Such as "there are three shapes: a red circle and two small blue stars, on gray stripes"."""
    things = _list_groups(scene, rng, 0.7)
    count = len(scene.objects)
    shapes = f"{NUMBER_WORDS[count]} shape{'s' if count > 1 else ''}"
    lead = rng.choice(
        (
            f"there {'are' if count > 1 else 'is'} {shapes}: {things}",
            f"{shapes}, {things}",
            f"an image of {things}",
            f"a picture with {things}",
            f"a scene showing {things}",
            things,
        )
    )
    return lead + _on_background(scene, rng)


def _caption_background_first(scene: Scene, rng: random.Random) -> str:
    """Such as "on a striped gray background: a red circle and a blue star"."""
    things = _list_groups(scene, rng, 0.6)
    ground = _name_background(scene, rng)
    return rng.choice((f"on {ground}: {things}", f"{ground} with {things}", f"{ground} behind {things}"))


def _caption_sizes(scene: Scene, rng: random.Random) -> str | None:
    """Such as "a red circle which is large, and a small blue star"."""
    groups = [group for group in group_objects(scene) if len({item.size for item in group}) == 1]
    if len(groups) < len(group_objects(scene)):
        return None
    rng.shuffle(groups)
    first = f"{_name_group(groups[0], rng, 0.0)} which {'is' if len(groups[0]) == 1 else 'are'} {groups[0][0].size}"
    rest = [_name_group(group, rng, 1.0) for group in groups[1:]]
    return (f"{first}, and {join(rest)}" if rest else first) + _on_background(scene, rng, 0.5)


def _caption_terse(scene: Scene, rng: random.Random) -> str:
    """Little of the scene, such as "a blue star to the right of something red"."""
    groups = group_objects(scene)
    rng.shuffle(groups)
    count = len(scene.objects)
    shapes = f"{NUMBER_WORDS[count]} shapes" if count > 1 else "a single shape"
    options = [
        _list_groups(scene, rng, 0.0),
        f"{shapes} on {_name_background(scene, rng)}",
        f"{_name_group(groups[0], rng, 0.3)}{_on_background(scene, rng)}",
    ]
    if len(groups) > 1 and len(groups[1]) == 1:
        relation = _relation_between(groups[0], groups[1], rng)
        if relation is not None:
            options += 2 * [f"{_name_group(groups[0], rng, 0.0)} {relation} something {groups[1][0].color}"]
    return rng.choice(options)


_RICH: tuple[Callable[[Scene, random.Random], str | None], ...] = (
    _caption_relation,
    _caption_relation,
    _caption_positions,
    _caption_list,
    _caption_background_first,
    _caption_sizes,
)
_MAX_TRIES = 20


def describe(scene: Scene, number: int, rng: random.Random) -> list[str]:
    """Captions in varied words, different from one another while there are enough; every fifth tells little.

    The others name each object's shape and color, with relations, positions, sizes or the background.
    """
    captions: list[str] = []
    terse = rng.randrange(1, 5)
    for position in range(number):
        for _ in range(_MAX_TRIES):
            maker = _caption_terse if position % 5 == terse else rng.choice(_RICH)
            caption = maker(scene, rng)
            if caption is not None and caption not in captions:
                break
        captions.append(caption if caption is not None else _caption_list(scene, rng))
    return captions


def name_regions(scene: Scene) -> list[str]:
    """For each object the first of "red circle", "large red circle", "red circle in the top left" that fits only it."""
    names = []
    for item in scene.objects:
        short = f"{item.color} {item.shape}"
        alike = [other for other in scene.objects if (other.shape, other.color) == (item.shape, item.color)]
        if len(alike) == 1:
            names.append(short)
        elif sum(other.size == item.size for other in alike) == 1:
            names.append(f"{item.size} {short}")
        else:
            names.append(f"{short} {_POSITION_WORDS[item.position][0]}")
    return names


# A true and a false text that differ in one fact.
Pair = tuple[str, str]


def _state_presence(scene: Scene, rng: random.Random) -> Pair:
    item = rng.choice(scene.objects)
    kinds = {(other.shape, other.color) for other in scene.objects}
    if rng.random() < 0.5:
        wrong = [(item.shape, color) for color in visible_colors(scene.background)]
    else:
        wrong = [(shape, item.color) for shape in SHAPES]
    shape, color = rng.choice([kind for kind in wrong if kind not in kinds])
    return tuple(f"there is {with_article(f'{c} {s}')}" for s, c in ((item.shape, item.color), (shape, color)))


def _state_color(scene: Scene, rng: random.Random) -> Pair | None:
    shapes = [item.shape for item in scene.objects]
    single = [item for item in scene.objects if shapes.count(item.shape) == 1]
    if not single:
        return None
    item = rng.choice(single)
    wrong = rng.choice([color for color in visible_colors(scene.background) if color != item.color])
    return f"the {item.shape} is {item.color}", f"the {item.shape} is {wrong}"


def _state_size(scene: Scene, rng: random.Random) -> Pair | None:
    single = [group[0] for group in group_objects(scene) if len(group) == 1]
    if not single:
        return None
    item = rng.choice(single)
    wrong = SIZES[1 - SIZES.index(item.size)]
    return tuple(f"the {item.color} {item.shape} is {size}" for size in (item.size, wrong))


def _state_count(scene: Scene, rng: random.Random) -> Pair:
    right = len(scene.objects)
    wrong = rng.choice([count for count in range(1, MAX_OBJECTS + 1) if count != right])
    texts = [f"there {'is' if n == 1 else 'are'} {NUMBER_WORDS[n]} shape{'s' if n > 1 else ''}" for n in (right, wrong)]
    return texts[0], texts[1]


def _state_relation(scene: Scene, rng: random.Random) -> Pair | None:
    single = [group for group in group_objects(scene) if len(group) == 1]
    if len(single) < 2:
        return None
    a, b = rng.sample(single, 2)
    relation = rng.choice([relation for relation in RELATIONS if holds(relation, a, b)])
    first, second = (f"the {group[0].color} {group[0].shape}" for group in (a, b))
    return f"{first} is {relation} {second}", f"{first} is {OPPOSITE[relation]} {second}"


def _state_background(scene: Scene, rng: random.Random) -> Pair:
    names, right = rng.choice(((tuple(BACKGROUND_COLORS), scene.background), (TEXTURES, scene.texture)))
    wrong = rng.choice([name for name in names if name != right])
    noun = "is a" if "gradient" in (right, wrong) else "is"
    return tuple(f"the background {noun if name == 'gradient' else 'is'} {name}" for name in (right, wrong))


_STATEMENTS: tuple[Callable[[Scene, random.Random], Pair | None], ...] = (
    _state_presence,
    _state_color,
    _state_size,
    _state_count,
    _state_relation,
    _state_background,
)


def make_statements(scene: Scene, rng: random.Random) -> list[dict[str, str | bool]]:
    """True statements, each with a false one that differs in one fact, {"text", "label"}, in random order.

    Facts of false statements are drawn as those of scenes are, so that the words alone do not give the label away.
    """
    pairs = [pair for pair in (maker(scene, rng) for maker in _STATEMENTS) if pair is not None]
    statements = [
        {"text": text, "label": label}
        for pair in rng.sample(pairs, STATEMENT_PAIRS)
        for text, label in zip(pair, (True, False), strict=True)
    ]
    rng.shuffle(statements)
    return statements
