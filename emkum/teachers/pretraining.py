"""What public weights have seen, and whether with labels: what a table of figures must say of them.

timm's names tell it by their tags, the part behind the dot: sets that stand behind `_ft_` or at the end were learned
with labels, what precedes `_ft_` by the method that is named there; without a tag it is the architecture's default
one. Of BEiT-3 and Data2Vec 2 there is one published pretraining each. Of what no rule knows, nothing is said.
"""

import re
from dataclasses import dataclass

LABELS, IMAGES, TEXTS = "labels", "images", "texts"
IMAGENET_1K, IMAGENET_21K, COCO, VISUAL_GENOME = "ImageNet-1K", "ImageNet-21K", "COCO", "Visual Genome"


@dataclass(frozen=True)
class Exposure:
    """What weights have seen.

    Attributes:
        data: a set in words.
        how: with its LABELS, its IMAGES alone, or images with their TEXTS.
        source: where that is said.
    """

    data: str
    how: str
    source: str


_TAG = "timm's tag"
_MASKED = "He et al. 2022 (MAE), Woo et al. 2023 (ConvNeXt V2), Assran et al. 2023 (I-JEPA)"
# A tag's end, or the side of the images that may stand there.
_END = r"(_\d{3})?$"
# Regular expressions that are looked for in a tag; all that fit apply. ImageNet-12K is a part of 21K (22K).
_BY_TAG: tuple[tuple[str, Exposure], ...] = (
    (rf"(^|_)in1k{_END}", Exposure(IMAGENET_1K, LABELS, _TAG)),
    (rf"^(?!mim_in22k(_ft_in1k)?$).*?(in12k|in21k|in22k)({_END}|_in1k|_ft_in1k)", Exposure(IMAGENET_21K, LABELS, _TAG)),
    (r"^(mae|fcmae)($|_ft_)|^mae_in1k_ft_|^in1k_ijepa$", Exposure(IMAGENET_1K, IMAGES, _MASKED)),
    (r"^dino$", Exposure(IMAGENET_1K, IMAGES, "Caron et al. 2021 (DINO)")),
    (r"^in1k_ft_", Exposure(IMAGENET_1K, IMAGES, "Peng et al. 2022 (BEiT v2)")),
    (
        r"^in22k_ft_|^in22k_ijepa$",
        Exposure(IMAGENET_21K, IMAGES, "Bao et al. 2022 (BEiT), Assran et al. 2023 (I-JEPA)"),
    ),
    (r"^mim_in22k", Exposure(IMAGENET_21K, IMAGES, "Fang et al. 2023 (EVA-02)")),
    (r"^lvd142m$", Exposure("LVD-142M, into which ImageNet went", IMAGES, "Oquab et al. 2023 (DINOv2), appendix A")),
    (
        r"(^|_)(openai|laion|metaclip|datacomp|webli|dfn)",
        Exposure("image-text pairs from the web", TEXTS, _TAG),
    ),
)
_BEIT3 = "Wang et al. 2022 (BEiT-3), on the data of pretraining"
_BY_KIND: dict[str, tuple[Exposure, ...]] = {
    "beit3": (
        Exposure(COCO, TEXTS, _BEIT3),
        Exposure(VISUAL_GENOME, TEXTS, _BEIT3),
        Exposure(IMAGENET_21K, IMAGES, _BEIT3),
    ),
    "data2vec2": (Exposure(IMAGENET_1K, IMAGES, "Baevski et al. 2022 (data2vec 2.0)"),),
    "openclip": (Exposure("image-text pairs from the web", TEXTS, "Cherti et al. 2023 (OpenCLIP)"),),
}


def timm_tag(name: str) -> str:
    """A name's tag, or its architecture's default one; empty where timm knows none."""
    architecture, _, tag = name.partition(".")
    if tag:
        return tag
    import timm

    config = timm.get_pretrained_cfg(architecture) if timm.is_model(architecture) else None
    return (config.tag if config else None) or ""


def exposures(spec: str) -> list[Exposure]:
    """What the public weights of a teacher or an encoder have seen; nothing where that is not known.

    Args:
        spec: KIND:REST or KIND, as teachers and encoders are named.
    """
    kind, _, name = spec.partition(":")
    if kind != "timm":
        return list(_BY_KIND.get(kind, ()))
    tag = timm_tag(name)
    found = [exposure for pattern, exposure in _BY_TAG if tag and re.search(pattern, tag)]
    with_labels = {exposure.data for exposure in found if exposure.how == LABELS}
    return [exposure for exposure in found if exposure.how == LABELS or exposure.data not in with_labels]
