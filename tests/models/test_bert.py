"""BERT against transformers, with files that it wrote from random weights."""

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
from emkum.models.bert import BertEncoder, BertFiles, bert_from_checkpoint, find_bert

transformers = pytest.importorskip("transformers")

VOCABULARY, WIDTH, LAYERS, POSITIONS, PAD = 50, 128, 3, 20, 0


@pytest.fixture(autouse=True)
def one_thread() -> None:
    torch.manual_seed(0)
    torch.set_num_threads(1)


def config_of(heads: int = 2, **changes: Any) -> Any:
    return transformers.BertConfig(
        vocab_size=VOCABULARY,
        hidden_size=WIDTH,
        num_hidden_layers=LAYERS,
        num_attention_heads=heads,
        intermediate_size=96,
        max_position_embeddings=POSITIONS,
        **changes,
    )


def randomized(model: nn.Module) -> nn.Module:
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.1)
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


@pytest.mark.parametrize("kept", [1, 2])
def test_the_first_layers(model: nn.Module, kept: int, tmp_path: Path) -> None:
    encoder = bert_from_checkpoint(save_folder(model, tmp_path / "bert", "bin"), num_layers=kept)
    assert encoder.num_layers == kept == len(encoder.encoder["layer"])
    assert_same_outputs(encoder, model)


def test_padding_changes_nothing(model: nn.Module, tmp_path: Path) -> None:
    encoder = bert_from_checkpoint(save_folder(model, tmp_path / "bert", "bin")).eval()
    tokens, padding_mask = batch()
    with torch.no_grad():
        together = encoder(tokens, padding_mask).tokens
        for row, (ids, mask) in enumerate(zip(tokens, padding_mask, strict=True)):
            alone = encoder(ids[~mask][None]).tokens[0]
            torch.testing.assert_close(together[row, ~mask], alone, rtol=0, atol=1e-5)


def test_dropout_is_of_training_alone(model: nn.Module, tmp_path: Path) -> None:
    folder = save_folder(model, tmp_path / "bert", "bin")
    tokens, _ = batch()
    for options in ({}, {"dropout": 0.0}, {"attention_dropout": 0.0}):
        encoder = bert_from_checkpoint(folder, **options)
        assert not torch.equal(encoder(tokens).tokens, encoder(tokens).tokens)
        assert torch.equal(encoder.eval()(tokens).tokens, encoder(tokens).tokens)
    encoder = bert_from_checkpoint(folder, dropout=0.0, attention_dropout=0.0)
    trained = encoder(tokens).tokens
    assert torch.equal(trained, encoder.eval()(tokens).tokens)
    trained.sum().backward()
    assert all(parameter.grad is not None for parameter in encoder.parameters())


def test_a_new_encoder() -> None:
    encoder = BertEncoder(VOCABULARY, width=64, layers=2, heads=4, ffn_width=128, max_positions=8)
    for weights in (encoder.embeddings.word_embeddings.weight, encoder.encoder["layer"][1].output.dense.weight):
        assert weights.std().item() == pytest.approx(0.02, rel=0.1)
    assert encoder(torch.zeros(1, 8, dtype=torch.int64)).tokens.shape == (1, 8, 64)
    with pytest.raises(ValueError, match="9 tokens exceed the 8 positions"):
        encoder(torch.zeros(1, 9, dtype=torch.int64))
    with pytest.raises(ValueError, match="64 is no multiple of 5 heads"):
        BertEncoder(VOCABULARY, width=64, heads=5)


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
    assert bert_from_checkpoint(path, num_layers=1).num_layers == 1


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
    assert f"has 3 layers; {layers} cannot be kept" in one_line(lambda: bert_from_checkpoint(path, num_layers=layers))


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
