"""Text files of every kind to blocks of token ids."""

import gzip
import json
import os
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest

import emkum.prepare.text as text_module
from emkum.data.token_blocks import TokenBlocks, blocks_of
from emkum.data.tokenizers import encode, load_tokenizer
from emkum.errors import UserError
from emkum.prepare.text import Span, spans_of

pyarrow = pytest.importorskip("pyarrow")
parquet = pytest.importorskip("pyarrow.parquet")

WORDS = [
    "[PAD]",
    "[UNK]",
    "[CLS]",
    "[SEP]",
    "[MASK]",
    *"a the dog cat runs sleeps on under red green house tree".split(),
]


def _lines(seed: int, number: int) -> list[str]:
    rng = np.random.default_rng(seed)
    return [" ".join(rng.choice(WORDS[5:], rng.integers(1, 12))) for _ in range(number)]


TRAIN, VALID = _lines(0, 60), _lines(1, 7)


@pytest.fixture
def raw(tmp_path: Path) -> Path:
    """The same documents in all kinds of files, and a tokenizer."""
    folder = tmp_path / "raw"
    folder.mkdir()
    (folder / "vocab.txt").write_text("\n".join(WORDS) + "\n")
    for name, lines in (("train", TRAIN), ("valid", VALID)):
        plain = "".join(f"{line}\n" for line in lines)
        rows = "".join(json.dumps({"id": number, "caption": line}) + "\n" for number, line in enumerate(lines))
        (folder / f"{name}.txt").write_text(plain)
        (folder / f"{name}.jsonl").write_text(rows)
        for kind, content in (("txt", plain), ("jsonl", rows)):
            with gzip.open(folder / f"{name}.{kind}.gz", "wt") as file:
                file.write(content)
        table = pyarrow.table({"id": range(len(lines)), "caption": lines})
        parquet.write_table(table, folder / f"{name}.parquet", row_group_size=1000)
    return folder


def _arguments(raw: Path, out: Path, kind: str = "txt", **options: object) -> list[object]:
    inputs = [f"--input={split}={raw / split}.{kind}" for split in ("train", "valid")]
    options = {"tokenizer": raw / "vocab.txt", "out": out, "workers": 1} | options
    more = [text for option, value in options.items() for text in (f"--{option.replace('_', '-')}", value)]
    return ["text", *inputs, *more]


def _expected(raw: Path, lines: list[str], block_size: int, max_tokens: int = 64) -> list[list[int]]:
    """Blocks written out: begin, the next tokens of all documents with end tokens between them, end."""
    tokenizer = load_tokenizer(raw / "vocab.txt")
    if block_size == 0:
        return [encode(tokenizer, line, max_tokens) for line in lines]
    stream: list[int] = []
    for line in lines:
        stream += ([tokenizer.special.eos] if stream else []) + list(tokenizer.pieces(line))
    room = block_size - 2
    whole = [stream[start : start + room] for start in range(0, len(stream) - room + 1, room)]
    return [[tokenizer.special.bos, *block, tokenizer.special.eos] for block in whole]


def _blocks(folder: Path) -> list[list[int]]:
    return [block.tolist() for block in TokenBlocks(folder)]


@pytest.mark.parametrize("kind", ["txt", "txt.gz", "jsonl", "jsonl.gz", "parquet"])
@pytest.mark.parametrize("block_size", [0, 16])
def test_all_kinds_of_files_give_the_same_blocks(raw, tmp_path, run_prepare, kind, block_size) -> None:
    out = tmp_path / "out"
    run_prepare(*_arguments(raw, out, kind, block_size=block_size, max_tokens=8))
    for split, lines in (("train", TRAIN), ("valid", VALID)):
        blocks = _blocks(out / split)
        assert blocks == _expected(raw, lines, block_size, 8)
        assert block_size == 0 or all(len(block) == 16 for block in blocks)
    assert load_tokenizer(out).pieces("a red dog") == load_tokenizer(raw / "vocab.txt").pieces("a red dog")
    counts = json.loads((out / "prepare.json").read_text())["splits"]["valid"]
    blocks = _blocks(out / "valid")
    assert (counts["blocks"], counts["tokens"]) == (len(blocks), sum(map(len, blocks)))
    assert sorted(path.name for path in (out / "valid").iterdir()) == ["offsets.npy", "tokens.npy"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "raw"]


@pytest.mark.parametrize("part_bytes", [1, 7, 100, 1000])
def test_each_line_belongs_to_one_part(raw, monkeypatch, part_bytes) -> None:
    """Whatever the ranges of bytes: also where one ends within a line, at its end, or within a run of empty lines."""
    path = raw / "odd.txt"
    content = b"first\n\n\nsecond longer line\r\n" + "dritte Zeile, grün\n".encode() + b"x\n\nlast without end"
    path.write_bytes(content)
    monkeypatch.setattr(text_module, "_PART_BYTES", part_bytes)
    spans = spans_of(path, None)
    assert len(spans) == -(-len(content) // part_bytes)
    found = [line for span in spans for _, line in span.documents()]
    assert found == [line for line in content.splitlines(keepends=True) if line.strip()]
    places = [int(where.split()[-1]) for span in spans for where, _ in span.documents()]
    assert all(content[place:].startswith(line) for place, line in zip(places, found, strict=True))


def test_parts_are_joined_in_order_and_blocks_do_not_cross_them(raw, tmp_path, run_prepare, monkeypatch) -> None:
    monkeypatch.setattr(text_module, "_PART_BYTES", 500)
    spans = spans_of(raw / "train.txt", None)
    assert len(spans) > 3
    parts = [[line.decode().strip() for _, line in span.documents()] for span in spans]
    run_prepare(*_arguments(raw, tmp_path / "out", block_size=10))
    assert _blocks(tmp_path / "out" / "train") == [block for part in parts for block in _expected(raw, part, 10)]


def test_several_files_a_split_and_folders(raw, tmp_path, run_prepare) -> None:
    folder = tmp_path / "corpus"
    folder.mkdir()
    for name in ("train.txt", "valid.jsonl"):
        shutil.copy(raw / name, folder / name)
    (folder / "notes.md").write_text("no part of it")
    common = ["--tokenizer", raw / "vocab.txt", "--block-size", 0, "--workers", 1]
    run_prepare("text", f"--input=train={folder}", *common, "--out", tmp_path / "folder")
    run_prepare(
        *("text", "--input", f"train={raw / 'train.txt'}", raw / "valid.parquet"), *common, "--out", tmp_path / "files"
    )
    expected = _expected(raw, TRAIN + VALID, 0)
    assert _blocks(tmp_path / "folder" / "train") == _blocks(tmp_path / "files" / "train") == expected


def test_number_of_processes_changes_nothing(raw, tmp_path, run_prepare, folder_bytes, monkeypatch) -> None:
    monkeypatch.setattr(text_module, "_PART_BYTES", 500)
    for workers in (1, 2):
        run_prepare(*_arguments(raw, tmp_path / str(workers), block_size=10, workers=workers))
    assert folder_bytes(tmp_path / "1") == folder_bytes(tmp_path / "2")


def test_limit_counts_blocks(raw, tmp_path, run_prepare, monkeypatch) -> None:
    monkeypatch.setattr(text_module, "_PART_BYTES", 500)
    run_prepare(*_arguments(raw, tmp_path / "all", block_size=10))
    run_prepare(*_arguments(raw, tmp_path / "some", block_size=10, limit=20))
    blocks = _blocks(tmp_path / "all" / "train")
    assert len(blocks) > 20
    assert _blocks(tmp_path / "some" / "train") == blocks[:20]


def test_second_run_does_nothing_and_options_count(raw, tmp_path, run_prepare, capsys, folder_bytes) -> None:
    out = tmp_path / "out"
    run_prepare(*_arguments(raw, out, block_size=16))
    before = folder_bytes(out)
    capsys.readouterr()
    # Where blocks have a size, the length of documents does not count.
    run_prepare(*_arguments(raw, out, block_size=16, max_tokens=9))
    assert "nothing to do" in capsys.readouterr().out
    with pytest.raises(UserError, match="option block_size: 16 there, 17 here"):
        run_prepare(*_arguments(raw, out, block_size=17))
    (raw / "vocab.txt").write_text("\n".join([*WORDS, "more"]))
    with pytest.raises(UserError, match="source tokenizer vocab.txt differs"):
        run_prepare(*_arguments(raw, out, block_size=16))
    assert folder_bytes(out) == before


def test_interrupted_join_is_made_again(raw, tmp_path, run_prepare, monkeypatch, folder_bytes) -> None:
    replace = os.replace

    def stop(source: Path, target: Path) -> None:
        if Path(source).parent.name == "blocks":
            raise KeyboardInterrupt
        replace(source, target)

    run_prepare(*_arguments(raw, tmp_path / "whole", block_size=0))
    with monkeypatch.context() as patched:
        patched.setattr("emkum.prepare.text.os.replace", stop)
        with pytest.raises(KeyboardInterrupt):
            run_prepare(*_arguments(raw, tmp_path / "out", block_size=0))
    assert (tmp_path / ".out.partial" / "train" / "joining").is_dir()
    run_prepare(*_arguments(raw, tmp_path / "out", block_size=0))
    assert folder_bytes(tmp_path / "out") == folder_bytes(tmp_path / "whole")


def test_bad_documents_are_listed(raw, tmp_path, run_prepare) -> None:
    rows = [json.dumps({"text": line}).encode() for line in TRAIN]
    rows[3] = b'{"text": "dog"'
    rows[5] = b'{"other": "dog"}'
    rows[6] = b'{"text": " "}'
    rows[7] = b'{"text": 5}'
    rows[8] = b'{"text": "d\xf6g"}'
    rows[9] = rb'{"text": "\ud800"}'
    (raw / "train.jsonl").write_bytes(b"\n".join(rows))
    (raw / "valid.jsonl").write_text('{"text": "a dog"}\n')
    run_prepare(*_arguments(raw, tmp_path / "out", "jsonl", block_size=0, max_bad_fraction=0.2))
    skipped = [json.loads(line) for line in (tmp_path / "out" / "skipped.jsonl").read_text().splitlines()]
    reasons = ["no JSON", "no text as 'text'", "no text as 'text'", "no text as 'text'", "not UTF-8", "not UTF-8"]
    assert [line["reason"] for line in skipped] == reasons
    assert skipped[0]["key"] == f"train.jsonl byte {sum(len(row) + 1 for row in rows[:3])}"
    good = [line for number, line in enumerate(TRAIN) if number not in (3, 5, 6, 7, 8, 9)]
    assert _blocks(tmp_path / "out" / "train") == _expected(raw, good, 0)
    with pytest.raises(UserError, match="split train of text: 6 of 60 samples are bad"):
        run_prepare(*_arguments(raw, tmp_path / "strict", "jsonl", block_size=0, max_bad_fraction=0.05))


def test_null_and_missing_rows_of_parquet(raw, tmp_path, run_prepare) -> None:
    table = pyarrow.table({"text": ["a dog", None, "", "the cat"]})
    parquet.write_table(table, raw / "train.parquet", row_group_size=2)
    assert len(spans_of(raw / "train.parquet", None)) == 2
    run_prepare(*_arguments(raw, tmp_path / "out", "parquet", block_size=0, max_bad_fraction=0.5))
    assert _blocks(tmp_path / "out" / "train") == _expected(raw, ["a dog", "the cat"], 0)
    skipped = [json.loads(line)["key"] for line in (tmp_path / "out" / "skipped.jsonl").read_text().splitlines()]
    assert skipped == ["train.parquet row 1 of group 0", "train.parquet row 0 of group 1"]


def _spoil(raw: Path, what: str) -> list[object]:
    """Break one thing; return further arguments."""
    if what == "unknown kind":
        (raw / "train.pdf").write_bytes(b"%PDF")
        return ["--input", f"test={raw / 'train.pdf'}"]
    if what == "missing file":
        return ["--input", f"test={raw / 'none.txt'}"]
    if what == "no name":
        return ["--input", raw / "train.txt"]
    if what == "given twice":
        return ["--input", f"val={raw / 'train.txt'}"]
    if what == "empty folder":
        (raw / "empty").mkdir()
        return ["--input", f"test={raw / 'empty'}"]
    if what == "binary":
        (raw / "train.txt").write_bytes(b"\x89PNG\0\0\0")
    elif what == "empty":
        (raw / "train.txt").write_bytes(b"\n\n")
    elif what == "no gzip":
        (raw / "t.txt.gz").write_bytes(b"no gzip")
        return ["--input", f"test={raw / 't.txt.gz'}"]
    elif what == "gzip cut off":
        content = gzip.compress("".join(_lines(3, 20_000)).encode() + b"\n" + b"\n".join([b"a dog"] * 9), 1)
        (raw / "t.txt.gz").write_bytes(content[:-20])
        return ["--input", f"test={raw / 't.txt.gz'}"]
    elif what == "no JSON":
        (raw / "t.jsonl").write_text("a dog\n")
        return ["--input", f"test={raw / 't.jsonl'}"]
    elif what == "no object":
        (raw / "t.jsonl").write_text('["a dog"]\n')
        return ["--input", f"test={raw / 't.jsonl'}"]
    elif what == "missing column":
        return ["--input", f"test={raw / 'train.jsonl'}", "--text-column", "words"]
    elif what == "no usual column":
        parquet.write_table(pyarrow.table({"words": ["a dog"]}), raw / "t.parquet")
        return ["--input", f"test={raw / 't.parquet'}"]
    elif what == "column of numbers":
        return ["--input", f"test={raw / 'train.parquet'}", "--text-column", "id"]
    elif what == "no Parquet":
        (raw / "t.parquet").write_text("no Parquet")
        return ["--input", f"test={raw / 't.parquet'}"]
    elif what == "no tokenizer":
        (raw / "vocab.txt").unlink()
    elif what == "small blocks":
        return ["--block-size", 2]
    elif what == "short documents":
        return ["--block-size", 0, "--max-tokens", 2]
    return []


@pytest.mark.parametrize(
    ("what", "message"),
    [
        ("unknown kind", r"--input: .*train.pdf is of no known kind; want \*.txt"),
        ("missing file", "--input: there is no file .*none.txt"),
        ("no name", "want NAME=FILE with NAME one of train, valid"),
        ("given twice", "valid is given twice"),
        ("empty folder", "--input: folder .*empty holds no text files"),
        ("binary", "train.txt is not text"),
        ("empty", "split train of text has no usable sample"),
        ("no gzip", "t.txt.gz cannot be read: Not a gzipped file"),
        ("gzip cut off", "t.txt.gz cannot be read: Compressed file ended"),
        ("no JSON", "t.jsonl, line 1: no JSON"),
        ("no object", "t.jsonl, line 1: want one JSON object a line"),
        ("missing column", "--text-column words: .*train.jsonl has the columns id, caption"),
        ("no usual column", "t.parquet has the columns words, none of text, .*: name one with --text-column"),
        ("column of numbers", "train.parquet: column id is int64, not text"),
        ("no Parquet", "cannot read .*t.parquet"),
        ("no tokenizer", "no tokenizer at .*vocab.txt"),
        ("small blocks", "--block-size 2: want 0"),
        ("short documents", "--max-tokens 2: want at least 3"),
    ],
)
def test_mistakes_are_named_in_one_line_and_leave_nothing(raw, tmp_path, run_prepare, what, message) -> None:
    more = _spoil(raw, what)
    with pytest.raises(UserError, match=message) as caught:
        run_prepare(*_arguments(raw, tmp_path / "out"), *more)
    assert "\n" not in str(caught.value)
    assert [path.name for path in tmp_path.iterdir()] == ["raw"]


def test_missing_pyarrow_is_named(raw, tmp_path, run_prepare, monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(UserError, match=r"Parquet is read by pyarrow: pip install 'emkum\[parquet\]'"):
        run_prepare(*_arguments(raw, tmp_path / "out", "parquet"))


def test_real_captions(shared_data: Path, tmp_path: Path, run_prepare) -> None:
    source = shared_data / "flickr30k_captions" / "val.txt.gz"
    vocabulary = shared_data / "tokenizers" / "bert-base-uncased-vocab.txt"
    for block_size in (0, 256):
        run_prepare(
            *("text", f"--input=valid={source}", "--tokenizer", vocabulary, "--block-size", block_size),
            *("--out", tmp_path / str(block_size), "--workers", 1),
        )
    with gzip.open(source, "rt", encoding="utf-8") as file:
        lines = [line.strip() for line in file]
    assert len(lines) == 5070
    tokenizer = load_tokenizer(tmp_path / "0")
    captions = TokenBlocks(tmp_path / "0" / "valid")
    assert [block.tolist() for block in captions] == [encode(tokenizer, line, 64) for line in lines]
    documents = (tokenizer.pieces(line) for line in lines)
    assert _blocks(tmp_path / "256" / "valid") == list(blocks_of(documents, tokenizer.special, 256))


def test_span_of_a_missing_file_is_a_clear_mistake(tmp_path) -> None:
    with pytest.raises(UserError, match="gone.txt cannot be read"):
        list(Span(tmp_path / "gone.txt", None, 0, 10).documents())
