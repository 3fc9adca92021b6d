"""The fairseq face of EMKUM: `fairseq-train --user-dir user_dir`.

fairseq's loader imports `tasks` and `models` by itself; everything else that registers must be imported here.
"""

import warnings

for _message in (
    r".*`torch\.jit\..*` is deprecated.*",
    r".*pin_memory.*",
    r".*pkg_resources is deprecated.*",
    r".*torch\.cuda\.amp\..*is deprecated.*",
    r".*torch\.nn\.utils\.weight_norm.*is deprecated.*",
    r".*hydra\.experimental\..* is no longer experimental.*",
    r"\s*The version_base parameter is not specified.*",
    r".*Usage of deprecated keyword in package header.*",
    r"\s*'config' is validated against ConfigStore schema.*",
    r"\s*The strict flag in the compose API is deprecated.*",
    r".*Importing from timm\.models\..* is deprecated.*",
):
    warnings.filterwarnings("ignore", message=_message)

from . import criterions, optimizers  # noqa: E402

__all__ = ["criterions", "optimizers"]
