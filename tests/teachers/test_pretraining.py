"""What public weights have seen, by timm's names, and what nobody says."""

import pytest
import timm

from emkum.teachers.pretraining import IMAGENET_1K, IMAGENET_21K, IMAGES, LABELS, TEXTS, exposures

WEB = ("image-text pairs from the web", TEXTS)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("timm:deit_tiny_patch16_224", [(IMAGENET_1K, LABELS)]),  # by its default tag, fb_in1k
        ("timm:resnet50.a1_in1k", [(IMAGENET_1K, LABELS)]),
        ("timm:vit_base_patch16_224.augreg2_in21k_ft_in1k", [(IMAGENET_1K, LABELS), (IMAGENET_21K, LABELS)]),
        ("timm:convnext_base.fb_in22k_ft_in1k_384", [(IMAGENET_1K, LABELS), (IMAGENET_21K, LABELS)]),
        ("timm:vit_base_patch16_224.augreg_in21k", [(IMAGENET_21K, LABELS)]),
        ("timm:beitv2_base_patch16_224.in1k_ft_in22k", [(IMAGENET_21K, LABELS), (IMAGENET_1K, IMAGES)]),
        ("timm:beit_base_patch16_224.in22k_ft_in22k", [(IMAGENET_21K, LABELS)]),
        ("timm:eva02_base_patch14_224.mim_in22k", [(IMAGENET_21K, IMAGES)]),
        ("timm:eva02_base_patch14_448.mim_in22k_ft_in1k", [(IMAGENET_1K, LABELS), (IMAGENET_21K, IMAGES)]),
        ("timm:vit_base_patch16_224.dino", [(IMAGENET_1K, IMAGES)]),
        ("timm:vit_base_patch16_224.mae", [(IMAGENET_1K, IMAGES)]),
        ("timm:convnextv2_tiny.fcmae_ft_in1k", [(IMAGENET_1K, LABELS)]),
        ("timm:vit_base_patch16_clip_224.openai", [WEB]),
        ("timm:vit_base_patch16_clip_224.laion2b_ft_in1k", [(IMAGENET_1K, LABELS), WEB]),
        ("timm:vit_base_patch16_dinov3.lvd1689m", []),
        ("timm:no_such_model", []),
        ("bert:folder", []),
        ("openclip:ViT-B-32", [WEB]),
        ("data2vec2:base.pt", [(IMAGENET_1K, IMAGES)]),
    ],
)
def test_what_weights_have_seen(name: str, expected: list[tuple[str, str]]) -> None:
    found = exposures(name)
    assert [(each.data, each.how) for each in found] == expected
    assert all(each.source for each in found)


def test_the_texts_of_beit3_are_told() -> None:
    assert ("COCO", TEXTS) in [(each.data, each.how) for each in exposures("beit3:base.pth")]


def test_every_tag_that_ends_in_a_set_is_one_with_labels() -> None:
    names = [name for name in timm.list_pretrained() if name.endswith("_in1k")]
    assert len(names) > 500
    for name in names:
        assert (IMAGENET_1K, LABELS) in [(each.data, each.how) for each in exposures(f"timm:{name}")], name
