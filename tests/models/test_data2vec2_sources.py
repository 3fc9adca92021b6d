"""How fairseq's Data2Vec 2 is imported."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from emkum.errors import UserError
from emkum.models import data2vec2_sources as sources
from emkum.models.data2vec2_sources import data2vec2_module


def test_loading_twice_gives_the_same_modules():
    first = data2vec2_module("models.data2vec2")
    assert data2vec2_module("models.data2vec2") is first
    assert data2vec2_module("models.modalities.images").ImageEncoder is first.ImageEncoder
    assert data2vec2_module("data.modality").Modality is first.Modality
    assert not any(name.startswith("examples.data2vec") for name in sys.modules)
    assert sources._RewritingFinder not in sys.meta_path


def test_import_beside_a_project_with_its_own_examples(tmp_path):
    (tmp_path / "examples" / "data2vec").mkdir(parents=True)
    (tmp_path / "examples" / "__init__.py").write_text("mine = True\n")
    (tmp_path / "examples" / "data2vec" / "__init__.py").write_text("raise RuntimeError('must not be imported')\n")
    script = """
import examples, os, sys, warnings
warnings.filterwarnings("error", "Importing from timm")
from emkum.models.data2vec2 import (data2vec2_module)
from fairseq.models import MODEL_REGISTRY
from fairseq.examples.data2vec.data.modality import Modality
images = data2vec2_module("models.modalities.images")
assert "mae" in MODEL_REGISTRY and "data2vec_multi" not in MODEL_REGISTRY
multi = data2vec2_module("models.data2vec2")
assert MODEL_REGISTRY["data2vec_multi"] is multi.Data2VecMultiModel
assert multi.ImageEncoder is images.ImageEncoder and images.Modality is Modality
assert sys.modules["examples"] is examples and examples.mine and os.path.samefile(examples.__path__[0], "examples")
assert not [name for name in sys.modules if name.startswith("examples.")]
files = [getattr(module, "__file__", None) for module in list(sys.modules.values())]
files = [file for file in files if file and "data2vec" in file and "fairseq" in file and "examples" in file]
assert len(files) == len(set(files)), files
"""
    environment = {**os.environ, "PYTHONPATH": str(Path(sources.__file__).parents[2])}
    command = [sys.executable, "-c", script]
    result = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr


def test_other_sources_are_refused(monkeypatch):
    monkeypatch.setitem(sources.REWRITES, "models.utils", (("text of another version", "", 1),))
    with pytest.raises(UserError, match=r"models/utils\.py holds 'text of another version' 0 times, not 1"):
        data2vec2_module("models.utils")
    assert "fairseq.examples.data2vec.models.utils" not in sys.modules


@pytest.mark.parametrize("name", sorted(sources.REWRITES))
def test_every_rewrite_is_needed_and_complete(name):
    module = data2vec2_module(name)
    source = Path(module.__file__).read_text()
    for text, replacement, count in sources.REWRITES[name]:
        assert source.count(text) == count
        source = source.replace(text, replacement)
    assert "from examples." not in source and "np.float)" not in source and "Config()\n" not in source


def test_missing_module_is_named():
    with pytest.raises(UserError, match=r"fairseq\.examples\.data2vec\.models\.none"):
        data2vec2_module("models.none")
