"""A model of open_clip as teacher: of images, of text, or of both."""

from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from emkum.errors import UserError
from emkum.outputs import TeacherOutput
from emkum.teachers.base import IMAGE, TEXT, FrozenTeacher, TeacherConfig, shared_options
from emkum.weights import HUB, fingerprint, first_line, load_strictly, official_state, read_checkpoint


def openclip_teacher(spec: str, config: TeacherConfig, layers: bool = False) -> FrozenTeacher:
    """A model of open_clip, whose features are its projections into the common space.

    Args:
        spec: open_clip's name of the architecture, such as `ViT-B-32`; for the hub with the weights' tag,
            `ViT-B-32/laion2b_s34b_b79k`.
        config: weights (a local file in open_clip's format, or `hub`), target, parameters that may be missing.
        layers: give the layers of the image tower.

    Raises:
        UserError: open_clip is not installed; unknown name; weights of another model; no way to the hub; no layers.
    """
    try:
        import open_clip
    except ImportError:
        raise UserError("openclip: teachers need the package open_clip_torch: pip install 'emkum[openclip]'") from None
    name, _, tag = spec.partition("/")
    if name not in open_clip.list_models():
        near = [known for known in open_clip.list_models() if known.startswith(name.split("-")[0])][:5]
        raise UserError(f"open_clip has no model {name!r}" + (f"; close ones: {', '.join(near)}" if near else ""))
    if config.pooling not in ("default",):
        raise UserError(f"--teacher-pooling {config.pooling!r}: an openclip: teacher knows default alone")
    size = {"force_image_size": config.image_size} if config.image_size else {}
    model = _open_clip_model(name, tag, config, size)
    preprocess = open_clip.model.get_model_preprocess_cfg(model)
    side = preprocess["size"]
    text = open_clip.get_model_config(name)["text_cfg"]
    # Other models read by a tokenizer of their own, which this project does not have.
    reads_text = not text.get("hf_tokenizer_name") and text.get("context_length", 77) > 0
    return FrozenTeacher(
        _OpenClipTeacher(model, f"openclip:{name}", text.get("context_length", 77), layers),
        {"teacher": f"openclip:{name}", "weights_sha256": fingerprint(model), "pooling": config.pooling},
        image_size=side if isinstance(side, int) else side[0],
        mean=tuple(preprocess["mean"]),
        std=tuple(preprocess["std"]),
        modalities=(IMAGE, TEXT) if reads_text else (IMAGE,),
        tokenizer=Path(open_clip.__file__).parent / "bpe_simple_vocab_16e6.txt.gz" if reads_text else None,
        max_tokens=text.get("context_length", 77) if reads_text else 0,
        layers=layers,
        **shared_options(config),
    )


def _open_clip_model(name: str, tag: str, config: TeacherConfig, size: dict[str, Any]) -> nn.Module:
    import open_clip

    # Towers of its own, pretrained alone, are not looked for: the whole model's weights follow.
    alone: dict[str, Any] = {"pretrained_image": False, "pretrained_text": False}
    if config.weights != HUB:
        model = open_clip.create_model(name, load_weights=False, **alone, **size)
        if config.weights:
            state = official_state(read_checkpoint(config.weights))
            load_strictly(model, state, config.weights, config.allow_missing, f"open_clip's {name}")
        return model
    if not tag:
        tags = [known for model, known in open_clip.list_pretrained() if model == name]
        raise UserError(
            f"openclip:{name}: the hub has several: give openclip:{name}/TAG of {', '.join(tags) or 'none'}"
        )
    try:
        return open_clip.create_model(name, pretrained=tag, require_pretrained=True, **alone, **size)
    except Exception as error:  # open_clip and the hub raise a dozen types
        raise UserError(
            f"weights {tag!r} of open_clip's {name} could not be downloaded ({first_line(error)[:120]}); download the "
            "model's open_clip_model.safetensors elsewhere and give its path instead of 'hub'"
        ) from None


class _OpenClipTeacher(nn.Module):
    def __init__(self, model: nn.Module, name: str, context_length: int, layers: bool) -> None:
        super().__init__()
        self.model = model
        self.context_length = context_length
        # Its own Vision Transformer gives tokens; towers of other libraries do it in as many ways.
        self.has_tokens = type(model.visual).__name__ == "VisionTransformer"
        if layers and not self.has_tokens:
            raise UserError(f"{name} does not give its layers: its image tower is no Vision Transformer of open_clip")

    def forward(
        self, images: Tensor, text: Tensor | None = None, padding_mask: Tensor | None = None, layers: bool = False
    ) -> TeacherOutput:
        patches, parts = None, None
        if self.has_tokens:
            found = self.model.visual.forward_intermediates(
                images, indices=None if layers else 1, output_fmt="NLC", output_extra_tokens=True
            )
            features, blocks = found["image_features"], found["image_intermediates"]
            patches = self.model.visual.ln_post(blocks[-1])
            if layers:
                prefixes = found["image_intermediates_prefix"]
                parts = tuple(torch.cat(pair, dim=1) for pair in zip(prefixes, blocks, strict=True))
        else:
            features = self.model.encode_image(images)
        texts = None if text is None else self.model.encode_text(self._whole(text, padding_mask))
        return TeacherOutput(features, text_features=texts, patches=patches, layers=parts)

    def _whole(self, text: Tensor, padding_mask: Tensor | None) -> Tensor:
        """(T, context length) ids: open_clip's own text towers take no shorter ones, and pad by 0."""
        if padding_mask is not None:
            text = text.masked_fill(padding_mask, 0)
        return F.pad(text, (0, self.context_length - text.shape[1]))
