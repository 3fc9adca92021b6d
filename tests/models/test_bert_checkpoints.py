"""Files of BERT: those that transformers wrote from random weights, and such as do not fit."""

import copy
import json
import logging
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import torch
from huggingface_hub.errors import EntryNotFoundError
from safetensors.torch import save_file
from torch import Tensor, nn

from emkum.errors import UserError
from emkum.models.bert import BertEncoder
from emkum.models.bert_checkpoints import BertFiles, bert_from_checkpoint, find_bert, load_bert_weights
from emkum.models.encoder import LayerChoice

transformers = pytest.importorskip("transformers")

VOCABULARY, WIDTH, LAYERS, POSITIONS, PAD = 50, 128, 3, 20, 0


@pytest.fixture(autouse=True)
def one_thread() -> None:
    torch.manual_seed(0)
    torch.set_num_threads(1)


def config_of(heads: int = 2, layers: int = LAYERS, **changes: Any) -> Any:
    return transformers.BertConfig(
        vocab_size=VOCABULARY,
        hidden_size=WIDTH,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        intermediate_size=96,
        max_position_embeddings=POSITIONS,
        **changes,
    )


def randomized(model: nn.Module, scale: float = 0.1) -> nn.Module:
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=scale)
    return model.eval()


@pytest.fixture(scope="module")
def model() -> nn.Module:
    """With as many heads as a width of 128 has in the released models."""
    return randomized(transformers.BertModel(config_of()))


def batch() -> tuple[Tensor, Tensor]:
    tokens = torch.randint(1, VOCABULARY, (3, 9))
    tokens[1, 6:] = PAD
    tokens[2, 3:] = PAD
    return tokens, tokens.eq(PAD)


def expected_of(model: nn.Module, tokens: Tensor, padding_mask: Tensor) -> list[Tensor]:
    """Outputs of all layers by transformers alone."""
    model = getattr(model, "bert", model)
    with torch.no_grad():
        output = model(tokens, attention_mask=(~padding_mask).long(), output_hidden_states=True)
    return list(output.hidden_states[1:])


def assert_same_outputs(encoder: BertEncoder, model: nn.Module) -> None:
    encoder.eval()
    tokens, padding_mask = batch()
    expected = expected_of(model, tokens, padding_mask)
    with torch.no_grad():
        states, encoded = encoder.hidden_states(tokens, padding_mask), encoder(tokens, padding_mask)
    assert len(states) == encoder.num_layers <= len(expected)
    # Values of order 1, not of nearly equal tokens.
    assert expected[-1].std() > 0.5 and (expected[-1][0, 0] - expected[-1][0, 1]).abs().max() > 0.1
    for actual, wanted in zip(states, expected, strict=False):
        torch.testing.assert_close(actual, wanted, rtol=0, atol=1e-5)
    assert torch.equal(encoded.tokens, states[-1]) and encoded.padding_mask is padding_mask


def one_line(call: Callable[[], Any]) -> str:
    with pytest.raises(UserError) as caught:
        call()
    message = str(caught.value)
    assert message.startswith("emkum: error: ") and "\n" not in message
    return message


def save_folder(model: nn.Module, folder: Path, form: str) -> Path:
    if form == "safetensors":
        model.save_pretrained(folder)
    else:
        folder.mkdir()
        model.config.save_pretrained(folder)
        torch.save(model.state_dict(), folder / "pytorch_model.bin")
    return folder


# outputs --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", ["safetensors", "bin"])
@pytest.mark.parametrize("kind", ["BertModel", "BertForPreTraining"])
def test_a_folder_gives_all_hidden_states_of_transformers(kind: str, form: str, tmp_path: Path) -> None:
    # Heads that config.json alone tells, and a norm that shows its epsilon.
    source = randomized(getattr(transformers, kind)(config_of(heads=4, layer_norm_eps=0.01)))
    encoder = bert_from_checkpoint(save_folder(source, tmp_path / "bert", form))
    assert (encoder.width, encoder.num_layers, encoder.num_heads) == (WIDTH, LAYERS, 4)
    assert encoder.max_positions == POSITIONS
    assert_same_outputs(encoder, source)


@pytest.mark.parametrize("suffix", ["safetensors", "bin", "pt"])
def test_a_single_file(model: nn.Module, suffix: str, tmp_path: Path) -> None:
    path = tmp_path / f"weights.{suffix}"
    save = save_file if suffix == "safetensors" else torch.save
    save(dict(model.state_dict()), path)
    assert_same_outputs(bert_from_checkpoint(path), model)


def test_a_checkpoint_of_pretraining_as_the_first_releases_had_it(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    source = randomized(transformers.BertForPreTraining(config_of()))
    state = {
        name.replace("LayerNorm.weight", "LayerNorm.gamma").replace("LayerNorm.bias", "LayerNorm.beta"): value
        for name, value in source.state_dict().items()
    }
    assert "bert.encoder.layer.0.output.LayerNorm.beta" in state and "cls.predictions.bias" in state
    state["bert.embeddings.position_ids"] = torch.arange(POSITIONS)[None]
    torch.save(state, tmp_path / "pytorch_model.bin")
    with caplog.at_level(logging.INFO, logger="emkum"):
        encoder = bert_from_checkpoint(tmp_path)
    assert_same_outputs(encoder, source)
    assert [record.getMessage() for record in caplog.records] == [
        f"{tmp_path / 'pytorch_model.bin'}: left out cls, pooler, which the encoder does not have"
    ]


def test_a_model_without_pooler(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    source = randomized(transformers.BertModel(config_of(), add_pooling_layer=False))
    with caplog.at_level(logging.INFO, logger="emkum"):
        encoder = bert_from_checkpoint(save_folder(source, tmp_path / "bert", "safetensors"))
    assert_same_outputs(encoder, source)
    assert not caplog.records
    names = {name: value.shape for name, value in source.state_dict().items()}
    assert {name: value.shape for name, value in encoder.state_dict().items()} == names


def test_dropout_is_as_given(model: nn.Module, tmp_path: Path) -> None:
    encoder = bert_from_checkpoint(save_folder(model, tmp_path / "bert", "bin"), dropout=0.3, attention_dropout=0.2)
    assert {module.p for module in encoder.modules() if isinstance(module, nn.Dropout)} == {0.3}
    assert {layer.attention["self"].dropout for layer in encoder.all_blocks()} == {0.2}


# layers ---------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def deep(tmp_path_factory: pytest.TempPathFactory) -> tuple[nn.Module, Path]:
    """Twelve layers, and their folder."""
    # Larger weights would make all tokens alike behind so many layers.
    source = randomized(transformers.BertModel(config_of(layers=12)), scale=0.03)
    return source, save_folder(source, tmp_path_factory.mktemp("deep") / "bert", "safetensors")


CHOICES = {
    "first": (LayerChoice(6), [0, 1, 2, 3, 4, 5]),
    "every_second": (LayerChoice(every_second=True), [0, 2, 4, 6, 8, 10]),
    "some_of_every_second": (LayerChoice(2, every_second=True), [0, 2]),
    "further": (LayerChoice(4, further=2), [0, 1, 2, 3, 4, 5]),
    "all": (None, list(range(12))),
}


@pytest.mark.parametrize("loaded", [False, True])
@pytest.mark.parametrize("name", CHOICES)
def test_chosen_layers(deep: tuple[nn.Module, Path], name: str, loaded: bool) -> None:
    choice, kept = CHOICES[name]
    source = copy.deepcopy(deep[0])
    source.encoder.layer = nn.ModuleList(source.encoder.layer[index] for index in kept)
    if loaded:
        encoder = empty_encoder(layers=len(kept))
        load_bert_weights(encoder, deep[1], choice)
    else:
        encoder = bert_from_checkpoint(deep[1], choice)
    assert encoder.num_layers == len(kept)
    assert_same_outputs(encoder, source)
    tokens = torch.randint(1, VOCABULARY, (1, 5))  # a batch of one
    with torch.no_grad():
        expected = source(tokens).last_hidden_state
        torch.testing.assert_close(encoder(tokens).tokens, expected, rtol=0, atol=1e-5)


# into an encoder that is there ----------------------------------------------------------------------------------------


def empty_encoder(**changes: Any) -> BertEncoder:
    sizes = {"vocab_size": VOCABULARY, "width": WIDTH, "layers": LAYERS, "heads": 2, "ffn_width": 96}
    return BertEncoder(**{**sizes, "max_positions": POSITIONS, **changes})


def test_longer_tables_are_cut(model: nn.Module, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    folder = save_folder(model, tmp_path / "bert", "safetensors")
    encoder = empty_encoder(vocab_size=40, max_positions=8)
    with caplog.at_level(logging.INFO, logger="emkum"):
        load_bert_weights(encoder, folder)
    assert torch.equal(encoder.embeddings.word_embeddings.weight, model.embeddings.word_embeddings.weight[:40])
    assert torch.equal(encoder.embeddings.position_embeddings.weight, model.embeddings.position_embeddings.weight[:8])
    assert [record.getMessage() for record in caplog.records][1:] == [
        f"{folder / 'model.safetensors'}: the first 40 of 50 rows are used for a vocabulary of that size",
        f"{folder / 'model.safetensors'}: the first 8 of 20 rows are used for a table of positions of that size",
    ]
    tokens = torch.randint(1, 40, (2, 8))
    with torch.no_grad():
        expected = model(tokens).last_hidden_state
        torch.testing.assert_close(encoder.eval()(tokens).tokens, expected, rtol=0, atol=1e-5)


def test_an_encoder_without_positions(model: nn.Module, tmp_path: Path) -> None:
    encoder = empty_encoder(own_positions=False, max_positions=2 * POSITIONS)
    load_bert_weights(encoder, save_folder(model, tmp_path / "bert", "bin"))
    tokens, padding_mask = batch()
    positions = model.embeddings.position_embeddings.weight[: tokens.shape[1]]
    with torch.no_grad():
        actual = encoder.eval().encode(encoder.embed(tokens) + positions, padding_mask)
        torch.testing.assert_close(actual, expected_of(model, tokens, padding_mask)[-1], rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"width": 64}, "model.safetensors does not fit the text encoder: width is 128, not 64"),
        ({"ffn_width": 128}, "model.safetensors does not fit the text encoder: feed-forward width is 96, not 128"),
        ({"token_types": 1}, "model.safetensors does not fit the text encoder: number of segments is 2, not 1"),
        ({"heads": 4}, "config.json does not fit the text encoder: num_attention_heads is 2, not 4"),
        ({"norm_eps": 1e-5}, "config.json does not fit the text encoder: layer_norm_eps is 1e-12, not 1e-05"),
        ({"vocab_size": 51}, "model.safetensors has embeddings of 50 rows for a vocabulary of 51"),
        ({"max_positions": 21}, "model.safetensors has embeddings of 20 rows for a table of positions of 21"),
        ({"layers": 4}, "model.safetensors has 3 layers; 4 cannot be kept"),
    ],
)
def test_an_encoder_of_other_sizes(model: nn.Module, changes: dict[str, Any], expected: str, tmp_path: Path) -> None:
    folder = save_folder(model, tmp_path / "bert", "safetensors")
    assert expected in one_line(lambda: load_bert_weights(empty_encoder(**changes), folder))


def test_what_the_weights_alone_do_not_tell(model: nn.Module, tmp_path: Path) -> None:
    path = changed_file(model, tmp_path, lambda state: None)
    encoder = empty_encoder()
    load_bert_weights(encoder, path)
    assert_same_outputs(encoder, model)
    message = one_line(lambda: load_bert_weights(encoder, path, LayerChoice(2)))
    assert f"2 layers of {path} are chosen for a text encoder of 3" in message
    path = changed_file(model, tmp_path, lambda state: state.pop("encoder.layer.2.output.dense.bias"))
    message = one_line(lambda: load_bert_weights(encoder, path))
    assert f"{path} does not fit BERT; missing: encoder.layer.2.output.dense.bias" in message
    load_bert_weights(encoder, path, allowed="*output.dense.bias")


# files ----------------------------------------------------------------------------------------------------------------


def test_what_lies_beside_the_weights(model: nn.Module, tmp_path: Path) -> None:
    folder = save_folder(model, tmp_path / "bert", "safetensors")
    weights = folder / "model.safetensors"
    assert find_bert(folder) == find_bert(str(weights)) == BertFiles(weights, folder / "config.json")
    (folder / "vocab.txt").write_text("[PAD]\n")
    # The format that holds no code goes first.
    torch.save({}, folder / "pytorch_model.bin")
    assert find_bert(folder) == BertFiles(weights, folder / "config.json", folder / "vocab.txt")
    alone = tmp_path / "alone.bin"
    alone.touch()
    assert find_bert(alone) == BertFiles(alone)


@pytest.mark.parametrize("form", ["safetensors", "bin"])
def test_the_hub(model: nn.Module, form: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = save_folder(model, tmp_path / "hub", form)
    (folder / "vocab.txt").write_text("[PAD]\n")

    def download(name: str, file: str) -> str:
        assert name == "someone/bert-base-x"
        if not (folder / file).exists():
            raise EntryNotFoundError(file)
        return str(folder / file)

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
    files = find_bert("someone/bert-base-x")
    assert files == BertFiles(find_bert(folder).weights, folder / "config.json", folder / "vocab.txt")
    assert_same_outputs(bert_from_checkpoint(files), model)
    # What is here goes first.
    (tmp_path / "someone" / "bert-base-x").mkdir(parents=True)
    assert "holds neither model.safetensors nor" in one_line(lambda: find_bert("someone/bert-base-x"))


WHAT_TO_DO = (
    "put model.safetensors or pytorch_model.bin, with config.json and vocab.txt, into a folder and give its path"
)


def test_no_way_to_the_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def unreachable(*arguments: Any) -> None:
        raise OSError("no route to host\nand more")

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", unreachable)
    message = one_line(lambda: find_bert("bert-base-uncased"))
    assert "bert-base-uncased is no file or folder here and could not be downloaded (no route to host); " in message
    assert message.endswith(WHAT_TO_DO)
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    assert "(the package huggingface_hub is not installed); put" in one_line(lambda: find_bert("bert-base-uncased"))


@pytest.mark.parametrize("source", ["weights.bin", "/no/such/folder", "a/b/c", "./bert", "bert base"])
def test_paths_are_not_looked_for_on_the_hub(source: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", lambda *arguments: pytest.fail("asked the hub"))
    assert f"no such file or folder: {source}; {WHAT_TO_DO}" in one_line(lambda: find_bert(source))


# wrong files ----------------------------------------------------------------------------------------------------------


def changed_file(model: nn.Module, folder: Path, change: Callable[[dict[str, Tensor]], Any]) -> Path:
    state = dict(model.state_dict())
    change(state)
    torch.save(state, folder / "weights.bin")
    return folder / "weights.bin"


def test_missing_and_unexpected_parameters(model: nn.Module, tmp_path: Path) -> None:
    def change(state: dict[str, Tensor]) -> None:
        del state["encoder.layer.1.attention.self.query.bias"]
        state["encoder.layer.1.crossattention.self.query.bias"] = torch.zeros(WIDTH)

    path = changed_file(model, tmp_path, change)
    message = one_line(lambda: bert_from_checkpoint(path))
    assert f"{path} does not fit BERT; missing: encoder.layer.1.attention.self.query.bias; " in message
    assert message.endswith("unexpected: encoder.layer.1.crossattention.self.query.bias")
    assert bert_from_checkpoint(path, allowed="*self.query.bias").num_layers == LAYERS
    # Layers that are left out are not asked for.
    assert bert_from_checkpoint(path, LayerChoice(1)).num_layers == 1


def test_a_layer_in_the_middle_is_missing(model: nn.Module, tmp_path: Path) -> None:
    def change(state: dict[str, Tensor]) -> None:
        for name in [name for name in state if name.startswith("encoder.layer.1.")]:
            del state[name]

    message = one_line(lambda: bert_from_checkpoint(changed_file(model, tmp_path, change)))
    assert "missing: encoder.layer.1." in message and "unexpected: encoder.layer.2." in message


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (lambda state: state.clear(), "it lacks embeddings.word_embeddings.weight, embeddings.position_embeddings"),
        (
            lambda state: state.pop("embeddings.position_embeddings.weight"),
            "lacks embeddings.position_embeddings.weight",
        ),
        (lambda state: state.update({"embeddings.word_embeddings.weight": torch.ones(3)}), "has other shapes of it"),
        (
            lambda state: state.update({"embeddings.token_type_embeddings.weight": torch.ones(1, WIDTH)}),
            "is no checkpoint of BERT: it has one token type, as RoBERTa's have",
        ),
    ],
)
def test_files_of_other_models(
    model: nn.Module, change: Callable[[dict[str, Tensor]], Any], expected: str, tmp_path: Path
) -> None:
    path = changed_file(model, tmp_path, change)
    message = one_line(lambda: bert_from_checkpoint(path))
    assert f"{path} is no checkpoint of BERT" in message and expected in message


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"model_type": "roberta"}, "model_type is 'roberta'; of BERT's kind only 'bert' is supported"),
        ({"hidden_act": "relu"}, "hidden_act is 'relu'; of BERT's kind only 'gelu' is supported"),
        ({"position_embedding_type": "relative_key"}, "position_embedding_type is 'relative_key'"),
        ({"is_decoder": True}, "is_decoder is True"),
        ({"num_hidden_layers": 12}, "config.json: num_hidden_layers is 3, not 12"),
        ({"vocab_size": 30_522}, "config.json: vocab_size is 50, not 30522"),
        ({"num_attention_heads": 5}, "config.json: num_attention_heads 5 does not go with a width of 128"),
        ({"num_attention_heads": "12"}, "config.json: num_attention_heads '12' does not go with a width of 128"),
    ],
)
def test_a_config_of_another_model(model: nn.Module, changes: dict[str, Any], expected: str, tmp_path: Path) -> None:
    folder = save_folder(model, tmp_path / "bert", "bin")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | changes))
    assert expected in one_line(lambda: bert_from_checkpoint(folder))


@pytest.mark.parametrize("content", ["[1]", "{", ""])
def test_a_config_that_is_none(model: nn.Module, content: str, tmp_path: Path) -> None:
    folder = save_folder(model, tmp_path / "bert", "bin")
    (folder / "config.json").write_text(content)
    assert f"{folder / 'config.json'} is not a JSON object" in one_line(lambda: bert_from_checkpoint(folder))


def test_heads_that_nothing_tells(tmp_path: Path) -> None:
    path = tmp_path / "weights.bin"
    torch.save(BertEncoder(VOCABULARY, width=96, layers=1, heads=3, ffn_width=32).state_dict(), path)
    message = one_line(lambda: bert_from_checkpoint(path))
    assert "config.json beside it must tell the number of heads in a width of 96" in message


@pytest.mark.parametrize("layers", [0, 4])
def test_more_layers_than_there_are(model: nn.Module, layers: int, tmp_path: Path) -> None:
    path = changed_file(model, tmp_path, lambda state: None)
    assert f"has 3 layers; {layers} cannot be kept" in one_line(lambda: bert_from_checkpoint(path, LayerChoice(layers)))


@pytest.mark.parametrize("form", ["safetensors", "bin"])
def test_half_a_download(model: nn.Module, form: str, tmp_path: Path) -> None:
    path = find_bert(save_folder(model, tmp_path / "bert", form)).weights
    content = path.read_bytes()
    path.write_bytes(content[: len(content) // 2])
    assert str(path) in one_line(lambda: bert_from_checkpoint(tmp_path / "bert"))


class Exploit:
    """Unpickling this makes a folder."""

    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[str]]:
        return os.mkdir, (str(self.target),)


def test_code_is_refused_and_not_run(model: nn.Module, tmp_path: Path) -> None:
    path, target = tmp_path / "pytorch_model.bin", tmp_path / "made_by_the_file"
    torch.save({**model.state_dict(), "more": Exploit(target)}, path)
    assert f"{path} is refused: it holds more than tensors" in one_line(lambda: bert_from_checkpoint(tmp_path))
    assert not target.exists()
