"""Imports run one way. The rules are checked on the real tree, and on small trees that break each of them."""

import ast
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent

# For each part of emkum, the other parts it must not import.
FORBIDDEN = {
    "teachers": {"data", "evaluation", "models"},
    "data": {"teachers", "evaluation", "models"},
    "evaluation": {"teachers", "data", "models"},
    "objectives": {"models"},
}
# For each part of emkum, the only parts it may import beside itself.
ALLOWED = {
    "outputs": set(),
    "errors": set(),
    "distributed": set(),
    "layers": {"outputs", "errors"},
}


def modules(folder: Path) -> Iterator[tuple[str, Path]]:
    """Dotted name and file of each module below `folder`, which is a package."""
    for path in sorted(folder.rglob("*.py")):
        parts = path.relative_to(folder.parent).with_suffix("").parts
        yield ".".join(parts[:-1] if parts[-1] == "__init__" else parts), path


def imported(name: str, path: Path) -> Iterator[tuple[int, str]]:
    """Line and dotted name of whatever the module imports, at its top or within functions.

    `from a import b` gives a.b, whether b is a module or not: rules look at beginnings alone.
    """
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"), str(path))):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                package = name.split(".") if path.name == "__init__.py" else name.split(".")[:-1]
                above = package[: len(package) - node.level + 1]
                base = ".".join([*above, base]).rstrip(".")
            yield from ((node.lineno, f"{base}.{alias.name}") for alias in node.names)
        elif isinstance(node, ast.Call) and ast.unparse(node.func).split(".")[-1] in ("import_module", "__import__"):
            if node.args and isinstance(node.args[0], ast.Constant) and isinstance(node.args[0].value, str):
                yield node.lineno, node.args[0].value


def import_violations(root: Path) -> Iterator[str]:
    """Imports that run the wrong way."""
    for folder in ("emkum", "user_dir"):
        for name, path in modules(root / folder):
            place, part = path.relative_to(root), (name.split(".") + [""])[1]
            for line, target in imported(name, path):
                top, _, rest = target.partition(".")
                other = rest.split(".")[0]
                if top == "tests":
                    yield f"{place}:{line}: {folder} must not import tests"
                if folder != "emkum":
                    continue
                if top == "user_dir":
                    yield f"{place}:{line}: emkum must not import user_dir"
                if top != "emkum" or other == part:
                    continue
                if other in FORBIDDEN.get(part, ()):
                    yield f"{place}:{line}: {part} must not import {other}"
                if part in ALLOWED and other not in ALLOWED[part]:
                    allowed = ", ".join(sorted(ALLOWED[part])) or "nothing of emkum"
                    yield f"{place}:{line}: {part} imports {other}, but may import {allowed}"


def other_violations(root: Path) -> Iterator[str]:
    """Missing docstrings, and the file that would shadow fairseq's `examples` package."""
    for _, path in modules(root / "emkum"):
        tree = ast.parse(path.read_text(encoding="utf-8"), str(path))
        if tree.body and ast.get_docstring(tree) is None:  # an empty __init__.py says nothing and needs no words
            yield f"{path.relative_to(root)}: no module docstring"
    if (root / "examples" / "__init__.py").exists():
        yield "examples/__init__.py: shadows the `examples` package that Data2Vec 2 imports"


def violations(root: Path) -> list[str]:
    return [*import_violations(root), *other_violations(root)]


def third_party_of_distributed(root: Path) -> set[str]:
    """Top-level packages that `emkum.distributed` imports, without the standard library."""
    path = root / "emkum" / "distributed.py"
    names = {target.split(".")[0] for _, target in imported("emkum.distributed", path)}
    return names - set(sys.stdlib_module_names)


def test_the_tree_keeps_the_rules():
    assert len(list(modules(ROOT / "emkum"))) > 5, "the walk found nothing to check"
    assert violations(ROOT) == []


def test_distributed_needs_torch_alone():
    assert third_party_of_distributed(ROOT) <= {"torch"}


def fake_tree(root: Path, files: dict[str, str]) -> Path:
    sound = {
        "emkum/__init__.py": "",
        "emkum/outputs.py": '"""O."""\nimport torch\n',
        "emkum/errors.py": '"""E."""\n',
        "emkum/distributed.py": '"""D."""\nimport os\nimport torch.distributed as dist\n',
        "emkum/layers/__init__.py": "",
        "emkum/layers/heads.py": '"""H."""\nfrom emkum.outputs import Encoded\nfrom . import blocks\n',
        "emkum/layers/blocks.py": '"""B."""\nfrom ..errors import UserError\n',
        "emkum/data/text.py": '"""T."""\nfrom emkum.data.shards import Shards\nfrom emkum.distributed import rank\n',
        "emkum/objectives/itc.py": '"""I."""\nfrom emkum.layers import heads\n',
        "emkum/models/student.py": '"""S."""\nimport emkum.layers.heads\nimport emkum.objectives.itc\n',
        "emkum/cli.py": '"""C."""\nfrom emkum import data, evaluation, models, teachers\n',
        "user_dir/__init__.py": "from emkum.models import student\n",
    }
    for name, text in (sound | files).items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return root


def test_a_sound_tree_passes(tmp_path):
    root = fake_tree(tmp_path, {})
    assert violations(root) == []
    assert third_party_of_distributed(root) == {"torch"}


@pytest.mark.parametrize(
    ("file", "text", "expected"),
    [
        ("emkum/cli.py", "import user_dir.config\n", "emkum must not import user_dir"),
        ("emkum/models/a.py", "def f():\n    from user_dir import config\n", "emkum must not import user_dir"),
        ("emkum/models/a.py", "import importlib\nimportlib.import_module('user_dir.tasks')\n", "not import user_dir"),
        ("emkum/outputs.py", "from emkum.errors import UserError\n", "outputs imports errors, but may import nothing"),
        ("emkum/errors.py", "from . import outputs\n", "errors imports outputs, but may import nothing"),
        ("emkum/distributed.py", "from emkum import outputs\n", "distributed imports outputs"),
        ("emkum/layers/heads.py", "from ..objectives.itc import itc\n", "layers imports objectives"),
        ("emkum/layers/heads.py", "from emkum.distributed import rank\n", "layers imports distributed"),
        ("emkum/layers/__init__.py", "from ..models import student\n", "layers imports models"),
        ("emkum/objectives/itc.py", "import emkum.models.student\n", "objectives must not import models"),
        ("emkum/teachers/timm.py", "from emkum.data.images import decode\n", "teachers must not import data"),
        ("emkum/teachers/timm.py", "from emkum import evaluation\n", "teachers must not import evaluation"),
        ("emkum/teachers/timm.py", "from emkum.models import student\n", "teachers must not import models"),
        ("emkum/data/text.py", "from emkum.teachers import timm\n", "data must not import teachers"),
        ("emkum/data/text.py", "from ..evaluation import knn\n", "data must not import evaluation"),
        ("emkum/data/text.py", "from ..models.student import Student\n", "data must not import models"),
        ("emkum/evaluation/knn.py", "from emkum.data import shards\n", "evaluation must not import data"),
        ("emkum/evaluation/knn.py", "from emkum.teachers import timm\n", "evaluation must not import teachers"),
        ("emkum/evaluation/knn.py", "import emkum.models\n", "evaluation must not import models"),
        ("user_dir/tasks/a.py", "from tests.helpers import tiny\n", "user_dir must not import tests"),
        ("emkum/layers/heads.py", "x = 1\n", "no module docstring"),
        ("examples/__init__.py", "", "shadows the `examples` package"),
    ],
)
def test_each_rule_can_fail(tmp_path, file, text, expected):
    if expected != "no module docstring":
        text = '"""Words."""\n' + text
    found = violations(fake_tree(tmp_path, {file: text}))
    assert len(found) == 1 and expected in found[0] and found[0].startswith(file), found


def test_a_further_package_in_distributed_is_found(tmp_path):
    root = fake_tree(tmp_path, {"emkum/distributed.py": '"""D."""\nimport numpy as np\n'})
    assert third_party_of_distributed(root) == {"numpy"}
