"""Attention rolled out, matches of tokens and patches, and their pictures."""

from pathlib import Path

import numpy as np
import pytest
import torch
from matplotlib.figure import Figure
from PIL import Image
from torch import Tensor

from emkum.evaluation.token_figures import (
    Attention,
    AttentionExample,
    MatchExample,
    _ranges,
    attended,
    attention_figure,
    match_figure,
    rollout,
)
from tests.figure_checks import assert_readable, shown_texts

TOKENS = ["[CLS]", "a", "do", "##g", "$5_x", "\u732b", *["word", "##ly"] * 20, "[SEP]"]


def weights(tokens: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(tokens, tokens, generator=generator, dtype=torch.float64).softmax(1)


def test_rollout_by_loops() -> None:
    layers = [weights(4, seed) for seed in range(3)]
    flow = np.eye(4)
    for layer in layers:
        mixed = 0.5 * layer.numpy() + 0.5 * np.eye(4)
        flow = np.array([[sum(mixed[i, k] * flow[k, j] for k in range(4)) for j in range(4)] for i in range(4)])
    np.testing.assert_allclose(rollout(layers).numpy(), flow)
    assert rollout(layers).sum(1).tolist() == pytest.approx([1.0] * 4)


def test_rollout_takes_registers_along_until_they_are_taken_off() -> None:
    """Two registers stand behind the CLS token in the first layer; the second has none."""
    first, second = weights(6, 0), weights(4, 1)
    flow = (first + torch.eye(6)) / 2
    expected = (second + torch.eye(4)) / 2 @ flow[[0, 3, 4, 5]]
    torch.testing.assert_close(rollout([first, second]), expected.double())
    assert rollout([first, second]).sum(1).tolist() == pytest.approx([1.0] * 4)


def test_attended_leaves_registers_out() -> None:
    whole = weights(6, 0)
    assert attended(whole, 0, 4).tolist() == whole[0, [0, 3, 4, 5]].tolist()
    assert attended(whole, 2, 4).tolist() == whole[4, [0, 3, 4, 5]].tolist()
    assert attended(whole, 5, 6).tolist() == whole[5].tolist()
    # Rolled out: rows without registers, columns with them.
    flow = rollout([weights(6, 0), weights(4, 1)])
    assert attended(flow, 2, 4).tolist() == flow[2, [0, 3, 4, 5]].tolist()


def attention_example(side: int, layers: int, tokens: list[str], seed: int = 0) -> AttentionExample:
    rng = np.random.default_rng(seed)

    def shares(count: int) -> Attention:
        return Attention(*(row / row.sum() for row in rng.random((2, count)) ** 4))

    names = ["last layer", "rolled out", "layer 3"][:layers]
    image = Image.new("RGB", (50, 50), (0, 0, 0) if seed else (90, 80, 70))
    images, texts = ({name: shares(count) for name in names} for count in (1 + side**2, len(tokens)))
    return AttentionExample(image, (side - 1, 0), tokens, 1, images, texts)


@pytest.mark.parametrize(("side", "layers", "tokens"), [(14, 2, TOKENS), (1, 1, TOKENS[:3]), (4, 3, TOKENS)])
def test_the_picture_of_attention_is_readable(
    tmp_path: Path, drawn: list[Figure], side: int, layers: int, tokens: list[str]
) -> None:
    examples = [attention_example(side, layers, tokens, seed) for seed in range(2)]
    attention_figure(tmp_path / "attention", examples)
    assert_readable(drawn[0])
    maps = [axes.images[1].get_array() for axes in drawn[0].axes if len(axes.images) == 2]
    expected = [
        getattr(layer, way)[1:].reshape(side, side)
        for example in examples
        for layer in example.image_layers.values()
        for way in ("cls", "token")
    ]
    np.testing.assert_array_equal(maps, expected)


def match_example(side: int, tokens: list[str], hidden: int = 0) -> MatchExample:
    rng = np.random.default_rng(side)
    similarity = rng.uniform(-1, 1, (len(tokens), side * side))
    similarity[:, :hidden] = np.nan
    caption = " ".join(tokens)
    return MatchExample(Image.new("RGB", (50, 50)), caption, tokens, 0, similarity.reshape(-1, side, side))


def test_matches_are_those_of_a_loop() -> None:
    example = match_example(4, TOKENS, hidden=5)
    for token, patch in enumerate(example.patches):
        flat = example.similarity[token].ravel()
        assert patch == max(range(5, 16), key=lambda place: flat[place])


@pytest.mark.parametrize(("side", "tokens"), [(14, TOKENS[1:22]), (2, TOKENS), (14, TOKENS), (1, TOKENS[1:2])])
def test_the_picture_of_matches_is_readable(tmp_path: Path, drawn: list[Figure], side: int, tokens: list[str]) -> None:
    example = match_example(side, tokens, hidden=side // 3)
    match_figure(tmp_path / "matches", [example])
    texts = [text.get_text() for text in shown_texts(drawn[0])]
    assert len([text for text in texts if text.isdecimal()]) >= min(len(tokens), 32)
    assert_readable(drawn[0])


def test_ranges() -> None:
    assert _ranges([1, 2, 3, 5, 7, 8]) == "1\u20133 5 7 8"
    assert _ranges([4]) == "4"
