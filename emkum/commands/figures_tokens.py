"""`emkum figures attention` and `emkum figures matches`: single tokens of images and captions."""

import argparse
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from string import punctuation
from typing import TYPE_CHECKING, Any

from emkum.commands.arguments import assert_at_least
from emkum.commands.figures_inputs import (
    add_student_arguments,
    centered_square,
    draw_samples,
    open_samples,
    report_files,
)
from emkum.errors import UserError

if TYPE_CHECKING:
    import numpy as np
    from PIL import Image
    from torch import Tensor

    from emkum.checkpoint import ImageTextModel
    from emkum.evaluation.token_figures import Attention, AttentionExample, MatchExample
    from emkum.objectives.late_interaction import Tokens

LAST, ROLLOUT = "last", "rollout"
_CLS, _SEP = "[CLS]", "[SEP]"


def add_parsers(kinds: Any) -> None:
    attention = kinds.add_parser(
        "attention",
        help="what tokens attend to in an image and its caption",
        description="What the CLS token and one patch attend to, over the image, and what the CLS token and one word "
        "attend to in the caption, as the student's own layers weigh them, mean over heads.",
        epilog="example: emkum figures attention --checkpoint runs/flickr8k --data data/flickr8k --word dog "
        "--layers last,rollout --out figures/attention",
    )
    add_student_arguments(attention, 3, "images with their first captions")
    _add_choice(attention)
    attention.add_argument(
        "--patch", default="", metavar="ROW,COLUMN", help="patch to show, from 1,1 at the upper left (default: middle)"
    )
    attention.add_argument(
        "--layers",
        default=f"{LAST},{ROLLOUT}",
        metavar="LAYER,LAYER",
        help=f"up to 3 of: numbers of layers from 1 on, the shared encoder's behind the encoders'; {LAST}; {ROLLOUT}, "
        "attention rolled out over all layers (default: %(default)s)",
    )
    attention.set_defaults(run=run_attention)
    matches = kinds.add_parser(
        "matches",
        help="which patch each token of a caption is most similar to",
        description="For students that were trained with the objective cmli: the tokens of captions on the patches "
        "that late interaction matches them with.",
        epilog="example: emkum figures matches --checkpoint runs/cmli --data data/flickr8k --out figures/matches",
    )
    add_student_arguments(matches, 3, "images with their first captions")
    _add_choice(matches)
    matches.set_defaults(run=run_matches)


def _add_choice(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--keys", default="", metavar="KEY,KEY", help="show the images of these keys instead")
    parser.add_argument(
        "--word", default="", help="word to show, of captions that have it (default: each caption's longest one)"
    )


# ----------------------------------------------------------------------------------------------------------------------
# Captions
# ----------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Caption:
    """A caption as the student reads it.

    Attributes:
        text: whole. ids: special tokens included. tokens: in words, likewise.
        word: place of the first token of the chosen word.
    """

    text: str
    ids: list[int]
    tokens: list[str]
    word: int


@dataclass(frozen=True)
class Pair:
    """An image with its first caption.

    Attributes:
        key: of the sample. image: as a student sees it.
    """

    key: str
    image: "Image.Image"
    caption: Caption


def find_word(tokens: Sequence[str], word: str = "") -> int | None:
    """Place of the first token of a word; of the longest one where none is given. None where it is not there.

    Args:
        tokens: without special ones; "##" begins what goes on within a word.
        word: case does not count; tokens joined, so that it may be longer than any.
    """
    words: list[tuple[int, str]] = []
    for number, token in enumerate(tokens):
        if token.startswith("##") and words:
            words[-1] = (words[-1][0], words[-1][1] + token[2:])
        else:
            words.append((number, token))
    # Some tokenizers leave punctuation at a word, or the mark of its beginning alone before it.
    words = [(number, text.strip(punctuation + "\u2581").casefold()) for number, text in words]
    if word:
        return next((number for number, text in words if text == word.strip().casefold()), None)
    return max(words, key=lambda pair: (len(pair[1]), -pair[0]), default=(None,))[0]


def read_caption(model: "ImageTextModel", text: str, word: str = "") -> Caption | None:
    """None where the caption, cut to the student's longest, has no such word, or no word at all."""
    ids = model.tokenize([text])[0]
    tokens = model.tokenizer.texts(ids[1:-1])
    place = find_word(tokens, word)
    return None if place is None else Caption(text, ids, [_CLS, *tokens, _SEP], 1 + place)


def _pairs(args: argparse.Namespace, model: "ImageTextModel") -> list[Pair]:
    """The images that are shown.

    Raises:
        UserError: none has the word.
    """
    from emkum.data.decoding import decode

    samples = open_samples(args.data, args.split)
    found: dict[int, Caption] = {}

    def fits(row: int) -> bool:
        caption = read_caption(model, samples[row].captions[0], args.word)
        if caption is not None:
            found[row] = caption
        return caption is not None

    rows = draw_samples(samples, args.examples, args.seed, args.keys, fits)
    rows = [row for row in rows if row in found or fits(row)]
    if not rows:
        where = f"--keys {args.keys}" if args.keys else f"split {args.split} of {args.data}"
        raise UserError(f"--word {args.word!r}: no first caption of {where} has it")
    return [Pair(samples[row].key, centered_square(decode(samples[row].image)), found[row]) for row in rows]


# ----------------------------------------------------------------------------------------------------------------------
# Attention
# ----------------------------------------------------------------------------------------------------------------------


def run_attention(args: argparse.Namespace) -> None:
    assert_at_least(args, examples=1)
    layers = [name.strip() for name in args.layers.split(",") if name.strip()]
    if not 1 <= len(layers) <= 3 or not all(name in (LAST, ROLLOUT) or name.isdecimal() for name in layers):
        raise UserError(f"--layers {args.layers!r}: want one to three of {LAST}, {ROLLOUT} and numbers of layers")
    from emkum.checkpoint import load
    from emkum.evaluation.token_figures import attention_figure

    model = load(args.checkpoint, _device())
    patches = _count_patches(model)
    patch = _parse_patch(args.patch, round(patches**0.5))
    pairs = _pairs(args, model)
    examples = [attention_example(model, pair, patch, layers) for pair in pairs]
    facts = {
        "checkpoint": str(args.checkpoint),
        "split": args.split,
        "seed": args.seed,
        "patch": [place + 1 for place in patch],
        "images": [_attention_facts(pair, example) for pair, example in zip(pairs, examples, strict=True)],
    }
    report_files(attention_figure(args.out, examples), facts)


def attention_example(
    model: "ImageTextModel", pair: Pair, patch: tuple[int, int], layers: Sequence[str]
) -> "AttentionExample":
    """One image and its caption, each run alone.

    Raises:
        UserError: there is no such layer.
    """
    from emkum.evaluation.token_figures import AttentionExample

    image = record_attention(lambda: next(model.image_outputs([pair.image])))
    text = record_attention(lambda: next(model.text_outputs([pair.caption.ids])))
    patches = _count_patches(model)
    token = 1 + patch[0] * round(patches**0.5) + patch[1]
    shown = {}
    for side, recorded, place, tokens in (
        ("images", image, token, 1 + patches),
        ("captions", text, pair.caption.word, len(pair.caption.ids)),
    ):
        shown[side] = {_layer_name(name): _attention(recorded, name, place, tokens, side) for name in layers}
    return AttentionExample(
        pair.image, patch, pair.caption.tokens, pair.caption.word, shown["images"], shown["captions"]
    )


def record_attention(run: Callable[[], Any]) -> "list[Tensor]":
    """(N, N) of each layer that runs, mean over heads, of the first row of a batch."""
    from emkum.layers.attention import AttentionRecorder

    with AttentionRecorder() as recorder:
        run()
    return [weights[0].mean(0) for weights in recorder.weights]


def _attention(recorded: "list[Tensor]", name: str, token: int, tokens: int, side: str) -> "Attention":
    from emkum.evaluation.token_figures import Attention, attended, rollout

    if not recorded:
        raise UserError(f"this student attends to nothing in {side}: it has no Transformer block there")
    if name == ROLLOUT:
        weights = rollout(recorded)
    else:
        number = len(recorded) if name == LAST else int(name)
        if not 1 <= number <= len(recorded):
            raise UserError(f"--layers {name}: {side} pass layers 1 to {len(recorded)}; or choose {LAST} or {ROLLOUT}")
        weights = recorded[number - 1]
    return Attention(attended(weights, 0, tokens), attended(weights, token, tokens))


def _layer_name(name: str) -> str:
    return {LAST: "last layer", ROLLOUT: "rolled out"}.get(name, f"layer {name}")


def _attention_facts(pair: Pair, example: "AttentionExample") -> dict[str, Any]:
    def shares(layers: Any) -> dict[str, Any]:
        return {name: {"cls": _rounded(one.cls), "token": _rounded(one.token)} for name, one in layers.items()}

    caption = {"tokens": pair.caption.tokens, "word": pair.caption.tokens[pair.caption.word]}
    return {"key": pair.key} | caption | {"image": shares(example.image_layers), "text": shares(example.text_layers)}


def _rounded(values: "np.ndarray") -> list[Any]:
    return values.astype(float).round(4).tolist()


def _count_patches(model: "ImageTextModel") -> int:
    """P of the student's images."""
    import torch

    with torch.no_grad():
        blank = torch.zeros(1, 3, model.image_size, model.image_size, device=model.device)
        return model.student.image_encoder.embed(blank).shape[1] - 1


def _parse_patch(text: str, side: int) -> tuple[int, int]:
    """Row and column from 0 on, of a square of `side` patches either way."""
    if not text:
        return side // 2, side // 2
    parts = [part.strip() for part in text.split(",")]
    if len(parts) != 2 or not all(part.isdecimal() and 1 <= int(part) <= side for part in parts):
        raise UserError(f"--patch {text!r}: want ROW,COLUMN, each from 1 to {side}")
    return int(parts[0]) - 1, int(parts[1]) - 1


def _device() -> str:
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"


# ----------------------------------------------------------------------------------------------------------------------
# Matches
# ----------------------------------------------------------------------------------------------------------------------


def run_matches(args: argparse.Namespace) -> None:
    assert_at_least(args, examples=1)
    from emkum.checkpoint import load
    from emkum.commands.retrieval_inputs import CMLI
    from emkum.evaluation.token_figures import match_figure

    model = load(args.checkpoint, _device(), [CMLI])
    pairs = _pairs(args, model)
    examples = [match_example(model, pair) for pair in pairs]
    facts = {
        "checkpoint": str(args.checkpoint),
        "split": args.split,
        "seed": args.seed,
        "images": [_match_facts(pair, example) for pair, example in zip(pairs, examples, strict=True)],
    }
    report_files(match_figure(args.out, examples), facts)


def match_example(model: "ImageTextModel", pair: Pair) -> "MatchExample":
    """Cosines of a caption's tokens with the patches of its image, in the space that `cmli` compares them in."""
    import torch

    from emkum.commands.retrieval_inputs import CMLI
    from emkum.evaluation.token_figures import MatchExample
    from emkum.layers.precision import normalized

    objective = model.objectives[CMLI]
    with torch.no_grad():
        output = next(model.image_outputs([pair.image]))
        part = next(model.text_outputs([pair.caption.ids]))
        image, text = objective.image_tokens(output), objective.text_tokens(part.output, part.special)
        patches = output.tokens.shape[1] - 1
        cosines = normalized(text.features[0]) @ normalized(image.features[0]).T
        similarity = cosines.new_full((len(cosines), patches), torch.nan)
        similarity[:, _places(image)] = cosines
    kept = sorted((place, row) for row, place in enumerate(_places(text)) if not bool(text.special[0, row]))
    tokens = [pair.caption.tokens[place] for place, _ in kept]
    word = next((number for number, (place, _) in enumerate(kept) if place == pair.caption.word), 0)
    side = round(patches**0.5)
    values = similarity[[row for _, row in kept]].reshape(len(kept), side, side)
    return MatchExample(pair.image, pair.caption.text, tokens, word, values.cpu().numpy())


def _places(tokens: "Tokens") -> list[int]:
    """Of the first row's tokens; with some `top_fraction` not all take part."""
    return list(range(tokens.features.shape[1])) if tokens.places is None else tokens.places[0].tolist()


def _match_facts(pair: Pair, example: "MatchExample") -> dict[str, Any]:
    matches = []
    for token, patch, values in zip(example.tokens, example.patches, example.similarity, strict=True):
        row, column = divmod(int(patch), values.shape[1])
        matches.append({"token": token, "patch": [row + 1, column + 1], "cosine": round(float(values[row, column]), 4)})
    return {"key": pair.key, "caption": pair.caption.text, "matches": matches}
