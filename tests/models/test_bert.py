"""BERT as an encoder, against transformers and against a layer written out from its parameters."""

from collections.abc import Mapping

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from emkum.models.bert import BertEncoder

transformers = pytest.importorskip("transformers")

VOCABULARY, WIDTH, LAYERS, HEADS, POSITIONS, PAD = 50, 32, 3, 4, 20, 0
SIZES = {"width": WIDTH, "layers": LAYERS, "heads": HEADS, "ffn_width": 48, "max_positions": POSITIONS}


@pytest.fixture(autouse=True)
def one_thread() -> None:
    torch.manual_seed(0)
    torch.set_num_threads(1)


def randomized(module: nn.Module) -> nn.Module:
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.1)
    return module


def new_encoder(**options: float | bool) -> BertEncoder:
    return randomized(BertEncoder(VOCABULARY, **{**SIZES, **options}))


def batch() -> tuple[Tensor, Tensor]:
    tokens = torch.randint(1, VOCABULARY, (3, 9))
    tokens[1, 6:] = PAD
    return tokens, tokens.eq(PAD)


# Sizes and values -----------------------------------------------------------------------------------------------------


def test_a_new_encoder() -> None:
    encoder = BertEncoder(VOCABULARY, width=64, layers=2, heads=4, ffn_width=128, max_positions=8)
    for weights in (encoder.embeddings.word_embeddings.weight, encoder.encoder["layer"][1].output.dense.weight):
        assert weights.std().item() == pytest.approx(0.02, rel=0.1)
    assert (encoder.vocab_size, encoder.width, encoder.num_layers, encoder.num_heads) == (VOCABULARY, 64, 2, 4)
    assert encoder(torch.zeros(1, 8, dtype=torch.int64)).tokens.shape == (1, 8, 64)
    with pytest.raises(ValueError, match="9 tokens exceed the 8 positions"):
        encoder(torch.zeros(1, 9, dtype=torch.int64))
    with pytest.raises(ValueError, match="64 is no multiple of 5 heads"):
        BertEncoder(VOCABULARY, width=64, heads=5)


def test_embedding_and_encoding_are_apart() -> None:
    encoder = new_encoder().eval()
    source = transformers.BertModel(
        transformers.BertConfig(
            vocab_size=VOCABULARY,
            hidden_size=WIDTH,
            num_hidden_layers=LAYERS,
            num_attention_heads=HEADS,
            intermediate_size=48,
            max_position_embeddings=POSITIONS,
        ),
        add_pooling_layer=False,
    ).eval()
    source.load_state_dict(encoder.state_dict())
    tables = source.embeddings
    tokens, padding_mask = batch()
    added = tables.word_embeddings(tokens) + tables.token_type_embeddings.weight[0]
    added = added + tables.position_embeddings.weight[: tokens.shape[1]]
    expected = source(tokens, attention_mask=(~padding_mask).long()).last_hidden_state
    embedded = encoder.embed(tokens)
    torch.testing.assert_close(embedded, added, rtol=0, atol=1e-6)
    encoded = encoder(tokens, padding_mask)
    assert torch.equal(encoder.encode(embedded, padding_mask), encoded.tokens)
    assert encoded.padding_mask is padding_mask
    torch.testing.assert_close(encoded.tokens[~padding_mask], expected[~padding_mask], rtol=0, atol=1e-5)


def test_what_is_added_to_the_embedding_goes_through_its_norm() -> None:
    encoder = new_encoder().eval()
    tokens, _ = batch()
    # A norm takes no notice of a constant over the channels.
    shifted = encoder.encode(encoder.embed(tokens) + 3.0)
    torch.testing.assert_close(shifted, encoder(tokens).tokens, rtol=0, atol=1e-4)


def test_padding_changes_nothing() -> None:
    encoder = new_encoder().eval()
    tokens, padding_mask = batch()
    together = encoder(tokens, padding_mask).tokens
    for row, (ids, mask) in enumerate(zip(tokens, padding_mask, strict=True)):
        alone = encoder(ids[~mask][None]).tokens[0]
        torch.testing.assert_close(together[row, ~mask], alone, rtol=0, atol=1e-6)


def test_texts_are_not_masked_by_embeddings() -> None:
    tokens, padding_mask = batch()
    with pytest.raises(ValueError, match="masked by its token ids"):
        new_encoder().embed(tokens, padding_mask[:, 1:], torch.zeros(WIDTH))


# Positions ------------------------------------------------------------------------------------------------------------


def test_without_positions_order_means_nothing() -> None:
    encoder = new_encoder(own_positions=False).eval()
    assert not any("position" in name for name in encoder.state_dict())
    with_positions = new_encoder().eval()
    tokens = torch.randint(1, VOCABULARY, (2, POSITIONS + 5))
    order = torch.randperm(tokens.shape[1])
    expected = encoder(tokens).tokens[:, order]
    torch.testing.assert_close(encoder(tokens[:, order]).tokens, expected, rtol=0, atol=1e-5)
    tokens, order = tokens[:, :9], torch.arange(8, -1, -1)
    moved = with_positions(tokens[:, order]).tokens - with_positions(tokens).tokens[:, order]
    assert moved.abs().max() > 0.1


# Blocks ---------------------------------------------------------------------------------------------------------------


def naive_post_norm(state: Mapping[str, Tensor], x: Tensor, heads: int) -> Tensor:
    """A layer of BERT on (N, D) tokens, one head after the other."""

    def linear(name: str, x: Tensor) -> Tensor:
        return x @ state[f"{name}.weight"].T + state[f"{name}.bias"]

    def norm(name: str, x: Tensor) -> Tensor:
        centered = x - x.mean(-1, keepdim=True)
        scaled = centered / (centered.square().mean(-1, keepdim=True) + 1e-12).sqrt()
        return scaled * state[f"{name}.weight"] + state[f"{name}.bias"]

    outputs = []
    parts = [part.chunk(heads, -1) for part in linear("attn.qkv", x).chunk(3, -1)]
    for query, key, value in zip(*parts, strict=True):
        outputs.append((query @ key.T / query.shape[-1] ** 0.5).softmax(-1) @ value)
    x = norm("norm1", x + linear("attn.proj", torch.cat(outputs, -1)))
    return norm("norm2", x + linear("mlp.fc2", F.gelu(linear("mlp.fc1", x))))


def test_the_state_of_a_block_computes_what_the_layer_does() -> None:
    encoder = new_encoder().double().eval()
    blocks = encoder.all_blocks()
    assert len(blocks) == LAYERS
    for index, block in enumerate(blocks):
        state = encoder.block_state(index)
        assert not any(value.requires_grad for value in state.values())
        x = torch.randn(7, WIDTH, dtype=torch.float64)
        torch.testing.assert_close(block(x[None], None)[0], naive_post_norm(state, x, HEADS), rtol=0, atol=1e-10)


def test_the_word_embedding() -> None:
    encoder = new_encoder()
    assert [id(parameter) for parameter in encoder.embedding_parameters()] == [
        id(encoder.embeddings.word_embeddings.weight)
    ]


def test_dropped_blocks_leave_the_earlier_ones_as_they_were() -> None:
    encoder = new_encoder().eval()
    tokens, padding_mask = batch()
    states = encoder.hidden_states(tokens, padding_mask)
    encoder.drop_last_blocks(0)
    assert encoder.num_layers == len(encoder.all_blocks()) == LAYERS
    encoder.drop_last_blocks(2)
    assert encoder.num_layers == len(encoder.all_blocks()) == 1
    assert torch.equal(encoder(tokens, padding_mask).tokens, states[0])
    assert not torch.equal(states[0], states[2])


# Training -------------------------------------------------------------------------------------------------------------


def test_dropout_is_of_training_alone() -> None:
    tokens, _ = batch()
    for options in ({}, {"dropout": 0.0}, {"attention_dropout": 0.0}):
        encoder = new_encoder(**options)
        assert not torch.equal(encoder(tokens).tokens, encoder(tokens).tokens)
        assert torch.equal(encoder.eval()(tokens).tokens, encoder(tokens).tokens)
    encoder = new_encoder(dropout=0.0, attention_dropout=0.0)
    trained = encoder(tokens).tokens
    assert torch.equal(trained, encoder.eval()(tokens).tokens)
    trained.sum().backward()
    assert all(parameter.grad is not None for parameter in encoder.parameters())


def test_stochastic_depth_grows_to_the_last_layer() -> None:
    encoder = new_encoder(drop_path=0.4)
    rates = [
        [getattr(part.drop_path, "drop_prob", 0.0) for part in (layer.attention["output"], layer.output)]
        for layer in encoder.all_blocks()
    ]
    assert rates == [[0.0, 0.0], [pytest.approx(0.2)] * 2, [pytest.approx(0.4)] * 2]
    assert encoder.state_dict().keys() == new_encoder().state_dict().keys()


def test_stochastic_depth_leaves_both_branches_out() -> None:
    encoder = new_encoder(layers=2, drop_path=1 - 1e-9, dropout=0.0, attention_dropout=0.0).train()
    tokens, _ = batch()
    first, second = encoder.hidden_states(tokens)
    last = encoder.all_blocks()[1]
    expected = last.output.LayerNorm(last.attention["output"].LayerNorm(first))
    torch.testing.assert_close(second, expected, rtol=0, atol=1e-6)
    assert not torch.equal(encoder.eval()(tokens).tokens, second)


def test_recomputed_activations_give_the_same_gradients() -> None:
    encoder = new_encoder(drop_path=0.3).train()
    tokens, padding_mask = batch()
    runs = []
    encoder.all_blocks()[1].register_forward_pre_hook(lambda *_: runs.append(1))
    gradients = []
    for checkpoint in (False, True):
        encoder.checkpoint_activations = checkpoint
        encoder.zero_grad()
        torch.manual_seed(5)
        encoder(tokens, padding_mask).tokens[~padding_mask].square().mean().backward()
        gradients.append({name: parameter.grad.clone() for name, parameter in encoder.named_parameters()})
    assert len(runs) == 3  # the second time once more, in the backward pass
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient, rtol=0, atol=1e-7, msg=name)
    assert gradients[0]["encoder.layer.0.output.dense.weight"].abs().max() > 0
