"""fairseq's sources of Data2Vec 2, which do not import as they are.

`data2vec2_module` loads them from their own place, `fairseq.examples.data2vec`, with the few texts of REWRITES
replaced on the way.
"""

import importlib
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.machinery import ModuleSpec, PathFinder, SourceFileLoader
from types import CodeType, ModuleType
from typing import Any

from emkum.errors import UserError

PACKAGE = "fairseq.examples.data2vec"


def _absolute_imports(count: int) -> tuple[str, str, int]:
    return "from examples.data2vec.", f"from {PACKAGE}.", count


def _config_default(field: str, config: str) -> tuple[str, str, int]:
    """Python >= 3.11 refuses an instance of a dataclass as default of a field."""
    return f"    {field} = {config}()\n", f"    {field} = field(default_factory={config})\n", 1


# module below PACKAGE -> (text, replacement, occurrences)
REWRITES: dict[str, tuple[tuple[str, str, int], ...]] = {
    "models.data2vec2": (
        _absolute_imports(6),
        _config_default("audio: D2vAudioConfig", "D2vAudioConfig"),
        _config_default("image: D2vImageConfig", "D2vImageConfig"),
        _config_default("text: D2vTextConfig", "D2vTextConfig"),
        _config_default("modalities: D2vModalitiesConfig", "D2vModalitiesConfig"),
    ),
    "models.mae": (("dtype=np.float)", "dtype=np.float64)", 1),),
    "models.modalities.audio": (_absolute_imports(1),),
    "models.modalities.base": (
        _absolute_imports(1),
        ("from dataclasses import dataclass\n", "from dataclasses import dataclass, field\n", 1),
        _config_default("decoder: Optional[D2vDecoderConfig]", "D2vDecoderConfig"),
    ),
    "models.modalities.images": (_absolute_imports(2),),
    "models.modalities.text": (_absolute_imports(1),),
}


class _RewritingLoader(SourceFileLoader):
    """Compiles a source file after replacing texts. Never reads or writes bytecode caches: they hold the original."""

    def __init__(self, fullname: str, path: str, rewrites: tuple[tuple[str, str, int], ...]) -> None:
        super().__init__(fullname, path)
        self.rewrites = rewrites

    def get_code(self, fullname: str) -> CodeType:
        source = self.get_data(self.path).decode("utf-8")
        for text, replacement, count in self.rewrites:
            if source.count(text) != count:
                raise UserError(
                    f"{self.path} holds {text.strip()!r} {source.count(text)} times, not {count}: this version of "
                    "fairseq is not the one supported; install fairseq-fixed 0.12.3.1"
                )
            source = source.replace(text, replacement)
        return self.source_to_code(source.encode("utf-8"), self.path)


class _RewritingFinder:
    """Finds the modules of REWRITES, and no other, where the ordinary path finder finds them."""

    @staticmethod
    def find_spec(fullname: str, path: Any = None, target: ModuleType | None = None) -> ModuleSpec | None:
        rewrites = REWRITES.get(fullname.removeprefix(f"{PACKAGE}."))
        if rewrites is None or not fullname.startswith(f"{PACKAGE}."):
            return None
        spec = PathFinder.find_spec(fullname, path, target)
        if spec is not None:
            spec.loader = _RewritingLoader(fullname, spec.origin, rewrites)
        return spec


@contextmanager
def _rewriting_imports() -> Iterator[None]:
    sys.meta_path.insert(0, _RewritingFinder)
    try:
        with warnings.catch_warnings():
            # fairseq imports timm's layers by their old name.
            warnings.filterwarnings("ignore", "Importing from timm.models.layers is deprecated", FutureWarning)
            yield
    finally:
        sys.meta_path.remove(_RewritingFinder)


def data2vec2_module(name: str) -> ModuleType:
    """Import a module of fairseq's Data2Vec 2, such as `models.modalities.images`.

    Modules stay in `sys.modules` under their own names, so a second call gives the same classes, and fairseq models
    (`mae`, and `data2vec_multi` with `models.data2vec2`) are registered once.

    Raises:
        UserError: the installed fairseq has no Data2Vec 2, or another version of it.
    """
    fullname = f"{PACKAGE}.{name}"
    if fullname in sys.modules:
        return sys.modules[fullname]
    try:
        with _rewriting_imports():
            return importlib.import_module(fullname)
    except ModuleNotFoundError as error:
        if error.name is not None and fullname.startswith(error.name):
            raise UserError(f"the installed fairseq has no {fullname}: install fairseq-fixed 0.12.3.1") from None
        raise
