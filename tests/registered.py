"""Registers all that `--user-dir` brings, on import: fairseq imports these itself only where nobody has imported the
folder before, as an earlier test of the same process may have."""

import importlib
import pkgutil

import user_dir.models
import user_dir.tasks

for package in (user_dir.models, user_dir.tasks):
    for module in pkgutil.iter_modules(package.__path__):
        importlib.import_module(f"{package.__name__}.{module.name}")
