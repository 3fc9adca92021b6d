"""The bugs that `tests/mutation_check.py` puts in fit the tree as it is."""

import ast
from pathlib import Path

import pytest

from tests.mutation_check import ROOT, Mistake, applied, chosen, mutated
from tests.mutations.base import Edit, Mutation
from tests.mutations.table import MUTATIONS, TRAPS_AND_MUTATIONS


def test_each_trap_has_bugs_and_names_are_unique() -> None:
    assert len(TRAPS_AND_MUTATIONS) == 11
    assert all(len(mutations) >= 3 for mutations in TRAPS_AND_MUTATIONS.values())
    assert len(MUTATIONS) == sum(map(len, TRAPS_AND_MUTATIONS.values()))


@pytest.mark.parametrize("name", MUTATIONS)
def test_a_bug_fits_the_tree(name: str) -> None:
    """Its texts are found, what comes out is Python and something else, and its tests are there."""
    mutation = MUTATIONS[name]
    texts: dict[str, str] = {}
    for edit in mutation.edits:
        text = texts.setdefault(edit.file, (ROOT / edit.file).read_text(encoding="utf-8"))
        texts[edit.file] = applied(text, edit)
        assert texts[edit.file] != text
    for text in texts.values():
        ast.parse(text)
    assert mutation.tests
    for test in mutation.tests:
        file, _, function = test.partition("::")
        source = (ROOT / file).read_text(encoding="utf-8")
        assert f"def {function.partition('[')[0]}(" in source or not function, test


def test_a_file_is_restored_and_a_missing_text_is_said(tmp_path: Path) -> None:
    (tmp_path / "a.py").write_text("one = 1\ntwo = 1\n")
    mutation = Mutation("m", (Edit("a.py", "one = 1", "one = 2"), Edit("a.py", "one = 2", "one = 3")), ("t",))
    with mutated(tmp_path, mutation):
        assert (tmp_path / "a.py").read_text() == "one = 3\ntwo = 1\n"
    assert (tmp_path / "a.py").read_text() == "one = 1\ntwo = 1\n"
    for old, found in (("three", 0), ("= 1", 2)):
        wrong = Mutation("m", (Edit("a.py", "one", "1", 1), Edit("a.py", old, "x")), ("t",))
        with pytest.raises(Mistake, match=f"a.py has {found} times, not 1: '{old}'"), mutated(tmp_path, wrong):
            raise AssertionError("the context began")
        assert (tmp_path / "a.py").read_text() == "one = 1\ntwo = 1\n"


def test_unknown_names_are_said() -> None:
    with pytest.raises(Mistake, match="no bug is named nothing"):
        chosen(["nothing"])
    assert chosen([]) == list(MUTATIONS.values())
