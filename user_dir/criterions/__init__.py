"""Criterions that fairseq registers by name."""

from . import multi_objective

__all__ = ["multi_objective"]
