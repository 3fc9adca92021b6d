"""GLUE from files in the official layout."""

import json
import shutil
from pathlib import Path

import pytest

from emkum.data.shards import available_splits
from emkum.data.tables import TABLE_NAME, Table
from emkum.errors import UserError

# Task -> file -> lines, as the download script leaves them.
FILES = {
    "CoLA": {
        "train.tsv": ["gj04\t1\t\tOur friends won't buy this.", 'gj04\t0\t*\t"They drank the pub.'],
        "dev.tsv": ["gj04\t1\t\tThe sailors rode the breeze."],
        "test.tsv": ["index\tsentence", "0\tBill whistled past the house.", "1\tThe car honked."],
    },
    "SST-2": {
        "train.tsv": ["sentence\tlabel", "hide new secretions \t0", 'a "smart" film \t1'],
        "dev.tsv": ["sentence\tlabel", "it 's charming . \t1"],
        "test.tsv": ["index\tsentence", "7\tuneasy mishmash"],
    },
    "MRPC": {
        "train.tsv": ["Quality\t#1 ID\t#2 ID\t#1 String\t#2 String", '1\t702\t703\tAmrozi accused "him".\tHe "did.'],
        "dev.tsv": ["Quality\t#1 ID\t#2 ID\t#1 String\t#2 String", "0\t1\t2\tOne.\tAnother."],
        "msr_paraphrase_train.txt": ["Quality\t#1 ID\t#2 ID\t#1 String\t#2 String", "0\t1\t2\tNot this.\tFile."],
        "msr_paraphrase_test.txt": ["Quality\t#1 ID\t#2 ID\t#1 String\t#2 String", "1\t3\t4\tThat is.\tIs that."],
    },
    "STS-B": {
        "train.tsv": [
            "index\tgenre\tfilename\tyear\told_index\tsource1\tsource2\tsentence1\tsentence2\tscore",
            "0\tmain\tMSRvid\t2012\t1\tnone\tnone\tA plane.\tAn air plane.\t5.000",
            "1\tmain\tMSRvid\t2012\t4\tnone\tnone\tA flute.\tA man.\t3.8",
        ],
        "dev.tsv": [
            "index\tgenre\tfilename\tyear\told_index\tsource1\tsource2\tsentence1\tsentence2\tscore",
            "0\tmain\tMSRvid\t2012\t1\tnone\tnone\tA hat.\tA hard hat.\t0",
        ],
        "test.tsv": [
            "index\tgenre\tfilename\tyear\told_index\tsource1\tsource2\tsentence1\tsentence2",
            "0\tmain\tMSRvid\t2012\t1\tnone\tnone\tA girl.\tA woman.",
        ],
    },
    "QQP": {
        "train.tsv": ["id\tqid1\tqid2\tquestion1\tquestion2\tis_duplicate", "133273\t2\t3\tWhy?\tWhy not?\t0"],
        "dev.tsv": ["id\tqid1\tqid2\tquestion1\tquestion2\tis_duplicate", "201359\t2\t3\tHow?\tHow so?\t1"],
        "test.tsv": ["id\tquestion1\tquestion2", "0\tWho?\tWho is it?"],
    },
    "MNLI": {
        "train.tsv": [
            "index\tpromptID\tpairID\tgenre\tsentence1\tsentence2\tlabel1\tgold_label",
            "0\t31\t31n\tgov\tCream skimming.\tProducts.\tneutral\tneutral",
            "1\t32\t32e\tgov\tYou know.\tYou lose.\tentailment\tentailment",
        ],
        "dev_matched.tsv": [
            "index\tpromptID\tpairID\tgenre\tsentence1\tsentence2\tlabel1\tlabel2\tgold_label",
            "0\t6\t6e\tslate\tThe new rights.\tEveryone.\tneutral\tcontradiction\tcontradiction",
        ],
        "dev_mismatched.tsv": [
            "index\tpromptID\tpairID\tgenre\tsentence1\tsentence2\tlabel1\tlabel2\tgold_label",
            "5\t7\t7c\tletters\tYour gift.\tA gift.\tentailment\tentailment\tentailment",
        ],
        "test_matched.tsv": ["index\tpromptID\tpairID\tgenre\tsentence1\tsentence2", "0\t3\t3\ttravel\tHills.\tHill."],
        "test_mismatched.tsv": ["index\tpromptID\tpairID\tgenre\tsentence1\tsentence2", "0\t4\t4\t9/11\tWhat.\tThat."],
    },
    "QNLI": {
        "train.tsv": ["index\tquestion\tsentence\tlabel", "0\tWhen?\tAfter 1968.\tnot_entailment"],
        "dev.tsv": ["index\tquestion\tsentence\tlabel", "0\tWhat?\tAs of 1990.\tentailment"],
        "test.tsv": ["index\tquestion\tsentence", "0\tWhere?\tIn Rome."],
    },
    "RTE": {
        "train.tsv": ["index\tsentence1\tsentence2\tlabel", "0\tNo Weapons.\tWeapons.\tnot_entailment"],
        "dev.tsv": ["index\tsentence1\tsentence2\tlabel", "0\tDana died.\tDana had died.\tentailment"],
        "test.tsv": ["index\tsentence1\tsentence2", "0\tMangla.\tHe."],
    },
    "WNLI": {
        "train.tsv": ["index\tsentence1\tsentence2\tlabel", "0\tI stuck a pin.\tThe pin.\t1"],
        "dev.tsv": ["index\tsentence1\tsentence2\tlabel", "0\tThe drain.\tThe hair.\t0"],
        "test.tsv": ["index\tsentence1\tsentence2", "0\tMaude.\tDora."],
    },
}

# A row of each file, written out: split -> number, sentences, label, index.
EXPECTED = {
    "CoLA/train": (1, ['"They drank the pub.'], 0, 1),
    "CoLA/valid": (0, ["The sailors rode the breeze."], 1, 0),
    "CoLA/test": (1, ["The car honked."], None, 1),
    "SST-2/train": (1, ['a "smart" film'], 1, 1),
    "SST-2/valid": (0, ["it 's charming ."], 1, 0),
    "SST-2/test": (0, ["uneasy mishmash"], None, 7),
    "MRPC/train": (0, ['Amrozi accused "him".', 'He "did.'], 1, 0),
    "MRPC/valid": (0, ["One.", "Another."], 0, 0),
    "MRPC/test": (0, ["That is.", "Is that."], 1, 0),
    "STS-B/train": (1, ["A flute.", "A man."], 3.8, 1),
    "STS-B/valid": (0, ["A hat.", "A hard hat."], 0.0, 0),
    "STS-B/test": (0, ["A girl.", "A woman."], None, 0),
    "QQP/train": (0, ["Why?", "Why not?"], 0, 133273),
    "QQP/valid": (0, ["How?", "How so?"], 1, 201359),
    "QQP/test": (0, ["Who?", "Who is it?"], None, 0),
    "MNLI/train": (0, ["Cream skimming.", "Products."], 1, 0),
    "MNLI/valid": (0, ["The new rights.", "Everyone."], 2, 0),
    "MNLI/valid_mismatched": (0, ["Your gift.", "A gift."], 0, 5),
    "MNLI/test": (0, ["Hills.", "Hill."], None, 0),
    "MNLI/test_mismatched": (0, ["What.", "That."], None, 0),
    "QNLI/train": (0, ["When?", "After 1968."], 1, 0),
    "QNLI/valid": (0, ["What?", "As of 1990."], 0, 0),
    "QNLI/test": (0, ["Where?", "In Rome."], None, 0),
    "RTE/train": (0, ["No Weapons.", "Weapons."], 1, 0),
    "RTE/valid": (0, ["Dana died.", "Dana had died."], 0, 0),
    "RTE/test": (0, ["Mangla.", "He."], None, 0),
    "WNLI/train": (0, ["I stuck a pin.", "The pin."], 1, 0),
    "WNLI/valid": (0, ["The drain.", "The hair."], 0, 0),
    "WNLI/test": (0, ["Maude.", "Dora."], None, 0),
}


@pytest.fixture
def raw(tmp_path: Path) -> Path:
    folder = tmp_path / "raw"
    for task, files in FILES.items():
        (folder / task).mkdir(parents=True)
        for name, lines in files.items():
            (folder / task / name).write_text("\n".join(lines) + "\n", encoding="utf-8")
    return folder


def _run(run_prepare, raw: Path, out: Path, *more: object) -> None:
    run_prepare("glue", "--input", raw, "--out", out, "--workers", 1, *more)


def _skipped(out: Path) -> list[dict[str, str]]:
    return [json.loads(line) for line in (out / "skipped.jsonl").read_text().splitlines()]


def test_all_nine_tasks(raw, tmp_path, run_prepare) -> None:
    out = tmp_path / "out"
    _run(run_prepare, raw, out)
    splits = {f"{task}/{split}" for task in FILES for split in available_splits(out / task, TABLE_NAME)}
    assert splits == set(EXPECTED)
    for split, (number, sentences, label, index) in EXPECTED.items():
        row = Table(out / split)[number]
        expected = {f"sentence{place}": text for place, text in enumerate(sentences, start=1)}
        assert row == expected | {"label": label, "index": index}
        assert type(row["label"]) is type(label)
        assert sorted(path.name for path in (out / split).iterdir()) == ["rows.jsonl", "rows.npy"]
    assert available_splits(out / "CoLA", TABLE_NAME) == ["train", "valid", "test"]
    record = json.loads((out / "prepare.json").read_text())
    rows = {split: counts["rows"] for split, counts in record["splits"].items()}
    assert rows == {split: len(Table(out / split)) for split in EXPECTED}
    assert set(record["sources"]) == set(EXPECTED)


def test_names_of_classes(raw, tmp_path, run_prepare) -> None:
    _run(run_prepare, raw, tmp_path / "out")
    names = {
        task: json.loads((tmp_path / "out" / task / "classes.json").read_text())["class_name"]
        for task in FILES
        if task != "STS-B"
    }
    assert names["MNLI"] == ["entailment", "neutral", "contradiction"]
    assert names["RTE"] == names["QNLI"] == ["entailment", "not_entailment"]
    assert names["WNLI"] == ["not_entailment", "entailment"]
    assert names["CoLA"] == ["unacceptable", "acceptable"]
    assert not (tmp_path / "out" / "STS-B" / "classes.json").exists()


def test_second_run_does_nothing_and_number_of_processes_neither(
    raw, tmp_path, run_prepare, capsys, folder_bytes
) -> None:
    _run(run_prepare, raw, tmp_path / "out")
    before = folder_bytes(tmp_path / "out")
    capsys.readouterr()
    _run(run_prepare, raw, tmp_path / "out")
    assert "nothing to do" in capsys.readouterr().out
    assert folder_bytes(tmp_path / "out") == before
    run_prepare("glue", "--input", raw, "--out", tmp_path / "two", "--workers", 2)
    assert folder_bytes(tmp_path / "two") == before


def test_only_the_tasks_that_are_there(raw, tmp_path, run_prepare) -> None:
    for task in FILES:
        if task not in ("RTE", "CoLA"):
            shutil.rmtree(raw / task)
    (raw / "CoLA" / "test.tsv").unlink()
    (raw / "AX").mkdir()
    _run(run_prepare, raw, tmp_path / "out", "--limit", 1)
    record = json.loads((tmp_path / "out" / "prepare.json").read_text())
    assert list(record["splits"]) == ["CoLA/train", "CoLA/valid", "RTE/test", "RTE/train", "RTE/valid"]
    assert len(Table(tmp_path / "out" / "CoLA" / "train")) == 1


def test_mrpc_as_microsoft_publishes_it(raw, tmp_path, run_prepare) -> None:
    for name in ("train.tsv", "dev.tsv"):
        (raw / "MRPC" / name).unlink()
    _run(run_prepare, raw, tmp_path / "out")
    assert available_splits(tmp_path / "out" / "MRPC", TABLE_NAME) == ["train", "test"]
    assert Table(tmp_path / "out" / "MRPC" / "train")[0]["sentence1"] == "Not this."


def test_bad_rows_are_listed(raw, tmp_path, run_prepare) -> None:
    rte = [f"{n}\tOne {n}.\tTwo {n}.\tentailment".encode() for n in range(20)]
    rte[2] = b"2\tOne.\tentailment"
    rte[4] = b"4\tOne.\tTwo.\tmaybe"
    rte[5] = b"5\tO\xffne.\tTwo.\tentailment"
    rte[6] = b"x\tOne.\tTwo.\tentailment"
    header = b"\xef\xbb\xbfindex\tsentence1\tsentence2\tlabel\r\n"
    (raw / "RTE" / "train.tsv").write_bytes(header + b"\r\n".join(rte) + b"\r\n\r\n")
    sts = FILES["STS-B"]["train.tsv"] + [
        "\t".join(["2", *"gfyoss", "A.", "B.", score]) for score in ("5.1", "nan", "high")
    ]
    (raw / "STS-B" / "train.tsv").write_text("\n".join(sts))
    sst = FILES["SST-2"]["train.tsv"] + ["a film \t2", "a film \t-1"]
    (raw / "SST-2" / "train.tsv").write_text("\n".join(sst))
    _run(run_prepare, raw, tmp_path / "out", "--max-bad-fraction", 0.6)
    reasons = {line["key"]: line["reason"] for line in _skipped(tmp_path / "out")}
    assert reasons["RTE/train.tsv row 2"] == "3 fields, but there are 4 columns"
    assert reasons["RTE/train.tsv row 4"] == "label 'maybe' is none of entailment, not_entailment"
    assert reasons["RTE/train.tsv row 5"] == "not UTF-8"
    assert reasons["RTE/train.tsv row 6"] == "index 'x' is no number"
    assert reasons["SST-2/train.tsv row 2"] == "label '2' is none of 0, 1"
    assert reasons["SST-2/train.tsv row 3"] == "label '-1' is none of 0, 1"
    assert reasons["STS-B/train.tsv row 2"] == "score 5.1 is not in 0 ... 5"
    assert reasons["STS-B/train.tsv row 3"] == "score nan is not in 0 ... 5"
    assert "high" in reasons["STS-B/train.tsv row 4"]
    assert len(reasons) == 9
    table = Table(tmp_path / "out" / "RTE" / "train")
    assert [table[n]["index"] for n in range(len(table))] == [0, 1, 3, *range(7, 20)]
    assert table[0] == {"sentence1": "One 0.", "sentence2": "Two 0.", "label": 0, "index": 0}
    with pytest.raises(UserError, match="split SST-2/train of glue: 2 of 4 samples are bad"):
        _run(run_prepare, raw, tmp_path / "strict", "--max-bad-fraction", 0.4)


def _spoil(raw: Path, what: str) -> Path:
    """Break one thing; return the input."""
    if what == "no task":
        return raw / "CoLA"
    if what == "no folder":
        return raw / "none"
    if what == "missing train":
        (raw / "RTE" / "train.tsv").unlink()
    elif what == "missing dev":
        (raw / "RTE" / "dev.tsv").unlink()
    elif what == "missing dev of MRPC":
        (raw / "MRPC" / "dev.tsv").unlink()
    elif what == "missing column":
        (raw / "QQP" / "train.tsv").write_text("id\tquestion1\tquestion2\n0\tWhy?\tHow?\n")
    elif what == "another delimiter":
        (raw / "RTE" / "dev.tsv").write_text("index,sentence1,sentence2,label\n0,One,Two,entailment\n")
    elif what == "CoLA of other columns":
        (raw / "CoLA" / "train.tsv").write_text("1\tOur friends.\n")
    elif what == "header alone":
        (raw / "WNLI" / "dev.tsv").write_text("index\tsentence1\tsentence2\tlabel\n")
    elif what == "empty file":
        (raw / "WNLI" / "dev.tsv").write_text("")
    elif what == "all rows bad":
        (raw / "WNLI" / "dev.tsv").write_text("index\tsentence1\tsentence2\tlabel\n0\tOne.\tTwo.\t2\n")
    return raw


@pytest.mark.parametrize(
    ("what", "message"),
    [
        ("no task", "--input: .*CoLA holds none of the folders CoLA, SST-2, MRPC"),
        ("no folder", "--input: .*none holds none of the folders"),
        ("missing train", "--input: .*RTE lacks train.tsv"),
        ("missing dev", "--input: .*RTE lacks dev.tsv"),
        ("missing dev of MRPC", "--input: .*MRPC lacks dev.tsv"),
        ("missing column", "train.tsv lacks the column is_duplicate; it has id, question1, question2"),
        ("another delimiter", "dev.tsv lacks the column sentence1, sentence2, label; it has index,sentence1"),
        ("CoLA of other columns", "train.tsv, line 1: want the 4 columns source, label, mark, sentence"),
        ("header alone", "dev.tsv has no rows"),
        ("empty file", "dev.tsv has no rows"),
        ("all rows bad", "split WNLI/valid of glue has no usable sample .*label '2' is none of 0, 1"),
    ],
)
def test_mistakes_are_named_in_one_line_and_leave_nothing(raw, tmp_path, run_prepare, what, message) -> None:
    with pytest.raises(UserError, match=message) as caught:
        _run(run_prepare, _spoil(raw, what), tmp_path / "out")
    assert "\n" not in str(caught.value)
    assert [path.name for path in tmp_path.iterdir()] == ["raw"]


def test_real_tasks(shared_data: Path, tmp_path: Path, run_prepare) -> None:
    source, out = shared_data / "glue", tmp_path / "out"
    _run(run_prepare, source, out)
    names = {"train": "train.tsv", "valid": "dev.tsv", "test": "msr_paraphrase_test.txt"}
    labels = {"CoLA": 1, "SST-2": 1, "MRPC": 0, "STS-B": 9, "RTE": 3, "WNLI": 3}
    spelled = {"entailment": 0, "not_entailment": 1}
    for task, column in labels.items():
        splits = available_splits(out / task, TABLE_NAME)
        assert splits == (["train", "valid", "test"] if task == "MRPC" else ["train", "valid"])
        for split in splits:
            lines = (source / task / names[split]).read_text(encoding="utf-8").removesuffix("\n").split("\n")
            fields = [line.split("\t") for line in (lines if task == "CoLA" else lines[1:])]
            table = Table(out / task / split)
            assert len(table) == len(fields)
            for number in range(0, len(table), 97):
                text = fields[number][column]
                label = spelled[text] if task == "RTE" else float(text)
                assert table[number]["label"] == label
                assert table[number]["sentence1"] in [field.strip() for field in fields[number]]
    assert _skipped(out) == []
    assert len(Table(out / "SST-2" / "train")) == 20_000
