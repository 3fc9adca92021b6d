"""The SentencePiece tokenizer that goes with prepared data, and the command that trains one."""

import argparse
import gzip
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from emkum.data.shard_writing import ShardWriter
from emkum.data.tokenizers import load_tokenizer
from emkum.errors import UserError
from emkum.prepare.tokenizer import add_parser, spread, train_sentencepiece

CAPTIONS = [f"A {size} {color} dog runs over the grass" for size in ("big", "small") for color in ("red", "brown")] * 5


def test_special_tokens_and_lower_case(tmp_path: Path) -> None:
    train_sentencepiece(iter(CAPTIONS), tmp_path / "tokenizer.model", 60)
    tokenizer = load_tokenizer(tmp_path / "tokenizer.model")
    assert tokenizer.vocab_size <= 60
    assert tokenizer.pieces("A BIG red Dog") == tokenizer.pieces("a big red dog")
    assert min(tokenizer.pieces("a big red dog")) > 3
    assert 3 in tokenizer.pieces("日")


def test_equal_captions_give_equal_bytes(tmp_path: Path) -> None:
    for name in ("a", "b"):
        train_sentencepiece(iter(CAPTIONS), tmp_path / f"{name}.model", 60)
    assert (tmp_path / "a.model").read_bytes() == (tmp_path / "b.model").read_bytes()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.model", "b.model"]


def test_vocabulary_may_come_out_smaller(tmp_path: Path) -> None:
    train_sentencepiece(iter(CAPTIONS), tmp_path / "tokenizer.model", 10_000)
    assert load_tokenizer(tmp_path).vocab_size < 200


@pytest.mark.parametrize(("captions", "size"), [([], 60), (CAPTIONS, 5)])
def test_impossible_vocabulary(tmp_path: Path, captions: list[str], size: int, capfd) -> None:
    with pytest.raises(UserError, match=f"tokenizer of {size} pieces") as caught:
        train_sentencepiece(iter(captions), tmp_path / "tokenizer.model", size)
    assert "\n" not in str(caught.value)
    assert list(tmp_path.iterdir()) == []


def test_an_error_in_the_captions_is_told_as_it_is(tmp_path: Path) -> None:
    def captions(error: BaseException):
        yield from CAPTIONS
        raise error

    for error in (UserError("shard 3 is damaged"), KeyboardInterrupt()):
        with pytest.raises(type(error)) as caught:
            train_sentencepiece(captions(error), tmp_path / "tokenizer.model", 60)
        assert caught.value is error
    assert list(tmp_path.iterdir()) == []


def test_odd_captions_do_not_stop_the_training(tmp_path: Path) -> None:
    odd = ["half a pair \ud83d of surrogates", "a nul \0 byte", "", "\n", "x" * 10_000, "日本 🙂"]
    train_sentencepiece(CAPTIONS + odd, tmp_path / "tokenizer.model", 100)
    assert load_tokenizer(tmp_path).pieces("a red dog")


@pytest.mark.parametrize(("total", "most"), [(10, 3), (10, 10), (10, 0), (10, 9), (7, 50), (0, 5), (0, 0), (1000, 333)])
def test_spread_takes_one_of_each_stretch(total: int, most: int) -> None:
    chosen = spread(total, most)
    count = min(total, most) if most else total
    assert len(chosen) == count
    for number, place in enumerate(chosen.tolist()):
        assert number * total // count <= place < (number + 1) * total // count


def test_spread_takes_all_captions_of_images_alike() -> None:
    counts = np.bincount(spread(50_000, 10_000) % 5)
    assert counts.min() > 1900 and counts.max() < 2100


# ----------------------------------------------------------------------------------------------------------------------
# The command
# ----------------------------------------------------------------------------------------------------------------------


def prepare_tokenizer(*arguments: object) -> None:
    parser = argparse.ArgumentParser()
    add_parser(parser.add_subparsers(required=True))
    args = parser.parse_args(["tokenizer", *map(str, arguments)])
    args.run(args)


@pytest.fixture
def text_file(tmp_path: Path) -> Path:
    path = tmp_path / "a.txt"
    path.write_bytes(b"\xef\xbb\xbf" + "\n".join(CAPTIONS).encode() + b"\r\n\n  \nnot \xff UTF-8\n")
    return path


def record_of(out: Path) -> dict[str, Any]:
    return json.loads((out / "tokenizer.json").read_text())


def test_text_files_give_model_and_record(tmp_path: Path, text_file: Path, capsys: pytest.CaptureFixture) -> None:
    with gzip.open(tmp_path / "b.gz", "wb") as file:
        file.write("grün und blau\n".encode() * 5)
    out = tmp_path / "deep" / "out"
    prepare_tokenizer("--input", text_file, tmp_path / "b.gz", "--vocab-size", 60, "--out", out)
    assert sorted(path.name for path in out.iterdir()) == ["tokenizer.json", "tokenizer.model"]
    train_sentencepiece([*CAPTIONS, *["grün und blau"] * 5], tmp_path / "expected.model", 60)
    assert (out / "tokenizer.model").read_bytes() == (tmp_path / "expected.model").read_bytes()
    assert "trained on 25 of 25 sentences; lines left out that are not UTF-8: 1" in capsys.readouterr().out
    record = record_of(out)
    assert record["options"] == {"vocab_size": 60, "layout": "fairseq", "max_sentences": 1_000_000}
    assert [source["name"] for source in record["sources"]] == ["a.txt", "b.gz"]
    assert (record["sentences"], record["sentences_used"], record["lines_skipped"]) == (25, 25, 1)
    assert str(tmp_path) not in (out / "tokenizer.json").read_text()


def test_sentencepiece_layout(tmp_path: Path, text_file: Path) -> None:
    prepare_tokenizer("--input", text_file, "--vocab-size", 50, "--layout", "sentencepiece", "--out", tmp_path / "out")
    tokenizer = load_tokenizer(tmp_path / "out")
    assert tokenizer.vocab_size == len(tokenizer.processor) + 2 == tokenizer.special.mask + 1
    assert (tokenizer.special.bos, tokenizer.special.pad, tokenizer.special.eos, tokenizer.special.unk) == (0, 1, 2, 3)


def test_captions_of_prepared_data(tmp_path: Path) -> None:
    texts = [[f"image {number} caption {i} word{number % 3}{i}" for i in range(number % 4)] for number in range(1, 12)]
    with ShardWriter(tmp_path / "data" / "valid") as writer:
        for number, captions in enumerate(texts):
            writer.add(f"key{number}", b"no image is decoded", "jpg", captions)
    flat = [text for captions in texts for text in captions]
    for most in (0, 5):
        out = tmp_path / f"out{most}"
        options = ("--data", tmp_path / "data", "--split", "valid", "--vocab-size", 40, "--max-sentences", most)
        prepare_tokenizer(*options, "--out", out)
        train_sentencepiece([flat[i] for i in spread(len(flat), most)], tmp_path / "expected.model", 40)
        assert (out / "tokenizer.model").read_bytes() == (tmp_path / "expected.model").read_bytes()
        assert record_of(out)["sentences_used"] == (most or len(flat))
        assert record_of(out)["options"]["split"] == "valid"
    with pytest.raises(UserError, match="no split 'train'"):
        prepare_tokenizer("--data", tmp_path / "data", "--vocab-size", 40, "--out", tmp_path / "other")


def test_a_sample_of_the_sentences_of_files(tmp_path: Path) -> None:
    lines = [f"{word} number {number}" for number, word in enumerate(["alpha", "beta", "gamma", "delta"] * 30)]
    for name, part in (("a.txt", lines[:50]), ("b.txt", lines[50:])):
        (tmp_path / name).write_text("\n".join(part))
    inputs = (tmp_path / "a.txt", tmp_path / "b.txt")
    prepare_tokenizer("--input", *inputs, "--vocab-size", 60, "--max-sentences", 17, "--out", tmp_path / "out")
    train_sentencepiece([lines[i] for i in spread(120, 17)], tmp_path / "expected.model", 60)
    assert (tmp_path / "out" / "tokenizer.model").read_bytes() == (tmp_path / "expected.model").read_bytes()


def test_a_second_run_does_nothing(tmp_path: Path, text_file: Path, capsys: pytest.CaptureFixture) -> None:
    arguments = ("--input", text_file, "--vocab-size", 60, "--out", tmp_path / "out")
    prepare_tokenizer(*arguments)
    files = [tmp_path / "out" / name for name in ("tokenizer.model", "tokenizer.json")]
    before = [(path.stat().st_mtime_ns, path.stat().st_ino) for path in files]
    capsys.readouterr()
    prepare_tokenizer(*arguments)
    assert "nothing to do" in capsys.readouterr().out
    assert [(path.stat().st_mtime_ns, path.stat().st_ino) for path in files] == before
    for more, message in (
        (("--layout", "sentencepiece"), "layout fairseq there, sentencepiece here"),
        (("--max-sentences", "3"), "max_sentences 1000000 there, 3 here"),
    ):
        with pytest.raises(UserError, match=f"holds another tokenizer .{message}"):
            prepare_tokenizer(*arguments, *more)
    text_file.write_text("other text")
    with pytest.raises(UserError, match=r"holds another tokenizer \(sources\)"):
        prepare_tokenizer(*arguments)
    files[1].unlink()
    with pytest.raises(UserError, match="holds a tokenizer.model of another origin"):
        prepare_tokenizer(*arguments)


def test_an_interrupted_run_leaves_no_model(tmp_path: Path, text_file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def stop(*_: object) -> None:
        raise KeyboardInterrupt

    arguments = ("--input", text_file, "--vocab-size", 60, "--out", tmp_path / "out")
    with monkeypatch.context() as patch:
        patch.setattr("emkum.prepare.tokenizer.write_json", stop)
        with pytest.raises(KeyboardInterrupt):
            prepare_tokenizer(*arguments)
    assert list((tmp_path / "out").iterdir()) == []
    prepare_tokenizer(*arguments)
    assert load_tokenizer(tmp_path / "out").vocab_size <= 60


def test_wrong_sources(tmp_path: Path, text_file: Path) -> None:
    (tmp_path / "c.jsonl").write_text("{}")
    (tmp_path / "broken.gz").write_bytes(gzip.compress(b"a dog\n" * 1000)[:-20])
    (tmp_path / "no.gz").write_bytes(b"a dog\n")
    (tmp_path / "empty.txt").write_text("\n\n")
    rest = ("--vocab-size", 60, "--out", tmp_path / "out")
    for name, message in (
        ("c.jsonl", r"c.jsonl: want a text file .*\.txt or \*\.gz"),
        ("absent.txt", "there is no file .*absent.txt"),
        ("broken.gz", "cannot read .*broken.gz"),
        ("no.gz", "cannot read .*no.gz: Not a gzipped file"),
        ("empty.txt", "cannot train a tokenizer of 60 pieces"),
    ):
        with pytest.raises(UserError, match=message) as caught:
            prepare_tokenizer("--input", tmp_path / name, *rest)
        assert "\n" not in str(caught.value)
    with pytest.raises(UserError, match="data folder .* does not exist"):
        prepare_tokenizer("--data", tmp_path / "absent", *rest)
    with pytest.raises(UserError, match="--max-sentences -1: want 0"):
        prepare_tokenizer("--input", text_file, *rest, "--max-sentences", -1)
    with pytest.raises(UserError, match="--out .*a.txt is not a folder"):
        prepare_tokenizer("--input", text_file, "--vocab-size", 60, "--out", text_file)
    assert not (tmp_path / "out" / "tokenizer.model").exists()
