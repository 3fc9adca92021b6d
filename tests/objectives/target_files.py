"""Files that objectives read codes from, as small as the inputs of `cases.py`."""

from pathlib import Path

import torch

from emkum.models.quantizer import ImageQuantizer, QuantizerConfig
from emkum.objectives.target_codes import write_centroids
from tests.objectives.cases import SETTING

CLUSTERS, CODES = 5, 4
TEACHER = {"teacher": "tiny", "weights_sha256": "0"}


def write_target_files(
    folder: Path, width: int = SETTING.target_width, teacher: dict[str, str] | None = TEACHER
) -> dict[str, object]:
    """Write centroids and a checkpoint of an image quantizer; give the options that name them.

    Args:
        folder: where to.
        width: channels of the features that they are of.
        teacher: identity of what gave these; None = not known.
    """
    generator = torch.Generator().manual_seed(0)
    centroids, checkpoint = folder / "centroids.safetensors", folder / "quantizer.pt"
    write_centroids(centroids, torch.randn(CLUSTERS, width, generator=generator), teacher)
    config = QuantizerConfig(codes=CODES, code_width=3)
    state = {f"quantizer.{key}": value for key, value in ImageQuantizer(config, width, width).state_dict().items()}
    for name in ("project.weight", "project.bias", "codebook.codes"):
        state[f"quantizer.{name}"] = torch.randn(state[f"quantizer.{name}"].shape, generator=generator)
    state["quantizer.codebook.started"] = torch.tensor(True)
    options = {"model": {"_name": "image_quantizer"}}
    torch.save({"cfg": options, "model": state, "task_state": {"teacher": teacher}}, checkpoint)
    return {
        "kd_cluster_clusters": CLUSTERS,
        "kd_cluster_centroids": str(centroids),
        "kd_vq_codes": CODES,
        "kd_vq_quantizer": str(checkpoint),
    }
