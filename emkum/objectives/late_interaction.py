"""Late interaction: captions and images compared token by token (CMLI, after FILIP), and tokens matched to patches.

B images of N patches, T captions of L tokens; captions are padded, images are not.
"""

import math
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from emkum.distributed import all_gather, all_gather_with_gradient, is_distributed, row_offset
from emkum.errors import UserError
from emkum.layers.precision import at_least_float32, normalized
from emkum.layers.temperature import LogitScale
from emkum.objectives.base import Objective, Requirements, Setting
from emkum.outputs import Batch, ModalityOutput, ObjectiveOutput, PairScores, StudentOutput, TeacherOutput

# The projection of a teacher's patches is drawn anew from this seed wherever it is built.
_PROJECTION_SEED = 0


@dataclass
class LateInteractionConfig:
    dim: int = field(default=256, metadata={"help": "channels that tokens are compared in; 0 = no projection"})
    chunk: int = field(
        default=16,
        metadata={
            "help": "images compared with all captions at once; fewer take less memory; 0 = all, none recomputed in "
            "the backward pass"
        },
    )
    top_fraction: float = field(
        default=1.0,
        metadata={
            "help": "part of the patches and of each caption's tokens that takes part: what the CLS token attends to "
            "most; 1 = all"
        },
    )
    initial_scale: float = field(
        default=1 / 0.07, metadata={"help": "initial scale of the logits (1 / temperature), learned within [1, 100]"}
    )


@dataclass
class Tokens:
    """Tokens of R rows.

    Attributes:
        features: (R, N, D).
        special: (R, N) bool, True at tokens that take no part, padding among them.
        places: (R, N) int64, where in its row each token stood that was chosen; None = they stand as they stood.
    """

    features: Tensor
    special: Tensor
    places: Tensor | None = None


def select_tokens(features: Tensor, special: Tensor, importance: Tensor, fraction: float) -> Tokens:
    """The most important tokens of each row, the most important first.

    Of n tokens that are not special, the `fraction` of n stays, rounded up. Rows are cut to what the longest possible
    row keeps, so that shapes do not depend on values.

    Args:
        features: (R, N, D). special: (R, N) bool.
        importance: (R, N), such as the attention that the CLS token pays to each.
        fraction: above 0, up to 1.
    """
    # Of a product a little above a whole number, as floating point gives it, the whole number is meant.
    kept = math.ceil(fraction * special.shape[1] - 1e-4)
    places = importance.detach().masked_fill(special, float("-inf")).topk(kept, dim=1).indices
    counts = (fraction * (~special).sum(1, keepdim=True) - 1e-4).ceil()
    chosen = features.gather(1, places[..., None].expand(-1, -1, features.shape[2]))
    return Tokens(chosen, torch.arange(kept, device=special.device) >= counts, places)


def late_interaction(images: Tensor, texts: Tensor, special: Tensor, chunk: int = 0) -> PairScores:
    """Scores of all pairs (FILIP, Yao et al. 2021, equations 2 to 4): image to text the mean over patches of the cosine
    with the most similar token, text to image the mean over tokens of the cosine with the most similar patch.

    Chunks are recomputed in the backward pass, so that memory grows with chunk * T * N * L, not with B * T * N * L.

    Args:
        images: (B, N, D) patches, not normalized.
        texts: (T, L, D) tokens, likewise.
        special: (T, L) bool, tokens that take no part. A caption without any other token scores 0 with every image.
        chunk: images at once; 0 = all, without recomputing.
    """
    images, texts = normalized(images), normalized(texts)
    if chunk == 0:
        return PairScores(*_pair_scores(images, texts, special))
    parts = [
        checkpoint(_pair_scores, part, texts, special, use_reentrant=False, preserve_rng_state=False)
        for part in images.split(chunk)
    ]
    return PairScores(*(torch.cat(scores) for scores in zip(*parts, strict=True)))


@torch.no_grad()
def late_interaction_scores(
    images: Tensor, texts: Tensor, special: Tensor, chunk: int = 16, text_chunk: int = 256
) -> PairScores:
    """The scores of `late_interaction` without gradient, for retrieval over a whole evaluation set.

    Args:
        images, texts, special: of `late_interaction`.
        chunk: images at once. text_chunk: captions at once; both bound the memory and leave the result alone.
    """
    parts = [normalized(part) for part in images.split(chunk)]
    columns = []
    for tokens, hidden in zip(texts.split(text_chunk), special.split(text_chunk), strict=True):
        captions = normalized(tokens)
        scores = [_pair_scores(patches, captions, hidden) for patches in parts]
        columns.append([torch.cat(way) for way in zip(*scores, strict=True)])
    return PairScores(*(torch.cat(way, dim=1) for way in zip(*columns, strict=True)))


def _pair_scores(images: Tensor, texts: Tensor, special: Tensor) -> tuple[Tensor, Tensor]:
    """Both scores (B, T) of unit vectors; arguments of `late_interaction`."""
    (b, n, _), (t, length, _) = images.shape, texts.shape
    similarity = images.flatten(0, 1) @ texts.flatten(0, 1).T
    counts = (~special).sum(1)
    best_patch = similarity.view(b, n, t, length).max(1).values.masked_fill(special, 0)
    # Neither maximum keeps its input for the backward pass, so that it may be written over.
    similarity.masked_fill_(special.flatten(), float("-inf"))
    best_token = similarity.view(b, n, t, length).max(3).values.masked_fill(counts == 0, 0)
    return best_token.mean(1), best_patch.sum(2) / counts.clamp(min=1)


class LateInteraction(Objective):
    """CMLI: contrast of this rank's images with all ranks' captions, and of its captions with all ranks' images.

    Captions and images with equal image ids are positives of one another, as in ITC. Of several ranks, each compares
    its images with everybody's captions; what its own captions score with the other ranks' images is gathered from
    there, so that patches stay where they are.
    """

    def __init__(self, config: LateInteractionConfig, setting: Setting) -> None:
        super().__init__()
        for option, value in (("dim", config.dim), ("chunk", config.chunk)):
            if value < 0:
                raise UserError(f"--cmli-{option} {value}: choose 0 or more")
        if not 0 < config.top_fraction <= 1:
            raise UserError(f"--cmli-top-fraction {config.top_fraction}: choose above 0, up to 1")
        self.chunk, self.top_fraction = config.chunk, config.top_fraction
        self.scale = LogitScale(config.initial_scale)
        self.image_projection = nn.Linear(setting.width, config.dim) if config.dim > 0 else None
        self.text_projection = nn.Linear(setting.width, config.dim) if config.dim > 0 else None

    @classmethod
    def requires_of(cls, config: LateInteractionConfig) -> Requirements:
        return Requirements(tokens=True, cls_attention=config.top_fraction < 1)

    def image_tokens(self, output: ModalityOutput) -> Tokens:
        """Projected patches that take part, for `late_interaction`; none of them is special."""
        none = torch.zeros(output.tokens.shape[:2], dtype=torch.bool, device=output.tokens.device)
        return self._projected(output, none, 1, self.image_projection)

    def text_tokens(self, output: ModalityOutput, special: Tensor | None) -> Tokens:
        """The same of captions; `special` (T, L) as in `Batch`."""
        return self._projected(output, _known(special, "cmli"), 0, self.text_projection)

    def _projected(self, output: ModalityOutput, special: Tensor, first: int, projection: nn.Linear | None) -> Tokens:
        """Tokens from the place `first` on."""
        tokens = Tokens(output.tokens[:, first:], special[:, first:])
        if self.top_fraction < 1:
            if output.cls_attention is None:
                raise UserError("--cmli-top-fraction: this student has no attention to choose tokens by; choose 1")
            importance = output.cls_attention[:, first:]
            tokens = select_tokens(tokens.features, tokens.special, importance, self.top_fraction)
        if projection is None:
            return tokens
        return Tokens(_project(tokens.features, projection), tokens.special, tokens.places)

    def forward(self, student: StudentOutput, teacher: TeacherOutput | None, batch: Batch) -> ObjectiveOutput:
        images, texts = self.image_tokens(student.image), self.text_tokens(student.text, batch.special)
        image_ids, text_ids = batch.image_ids, batch.caption_ids
        # Validation batches may differ in size between ranks; there the loss is each rank's own.
        keys, all_image_ids, all_text_ids = texts, image_ids, text_ids
        if self.training:
            keys, all_image_ids, all_text_ids = _gathered(texts), all_gather(image_ids), all_gather(text_ids)
        scores = late_interaction(images.features, keys.features, keys.special, self.chunk)
        of_texts, start = scores.text_to_image, 0
        if self.training:
            of_texts, start = all_gather_with_gradient(of_texts), row_offset(len(text_ids))
        to_images = of_texts[:, start : start + len(text_ids)].T
        scale = self.scale()
        i2t, i2t_accuracy = _contrast(scores.image_to_text, image_ids[:, None] == all_text_ids, scale)
        t2i, t2i_accuracy = _contrast(to_images, text_ids[:, None] == all_image_ids, scale)
        metrics = {
            "i2t_loss": i2t.detach(),
            "t2i_loss": t2i.detach(),
            "i2t_accuracy": i2t_accuracy,
            "t2i_accuracy": t2i_accuracy,
            "scale": scale.detach(),
        }
        return ObjectiveOutput(0.5 * (i2t + t2i), metrics)


def _contrast(scores: Tensor, positives: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
    """Cross-entropy against evenly weighted positives, mean over queries, and accuracy in percent.

    Args:
        scores: (Q, K). positives: (Q, K) bool, at least one True a row. scale: of the logits.
    """
    targets = positives.to(scores.dtype)
    loss = F.cross_entropy(scale * scores, targets / targets.sum(1, keepdim=True))
    best = scores.detach().argmax(1, keepdim=True)
    return loss, positives.gather(1, best).float().mean() * 100


def _gathered(tokens: Tokens) -> Tokens:
    """Those of all ranks in rank order, features with gradient, padded to the longest rows of any rank."""
    features, special = tokens.features, tokens.special
    if is_distributed():
        length = torch.full((1,), special.shape[1], device=special.device)
        # Shapes are the host's business: the one value that it waits for, and on several devices alone.
        lacking = int(all_gather(length).max()) - special.shape[1]
        features, special = F.pad(features, (0, 0, 0, lacking)), F.pad(special, (0, lacking), value=True)
    return Tokens(all_gather_with_gradient(features), all_gather(special))


def _project(tokens: Tensor, projection: nn.Linear) -> Tensor:
    """The tokens may come in a lower precision than the objective's own parameters have."""
    return projection(tokens.to(projection.weight.dtype))


def _known(special: Tensor | None, name: str) -> Tensor:
    if special is None:
        raise UserError(f"objective {name} must know which tokens are special; these captions do not say")
    return special


@dataclass
class TargetLateInteractionConfig:
    dim: int = field(default=32, metadata={"help": "channels that tokens and the teacher's patches are compared in"})
    empty_target: bool = field(
        default=False,
        metadata={"help": "let tokens that no patch fits, such as function words, match one learned target instead"},
    )


@dataclass
class Matches:
    """Which target each token is matched to.

    Attributes:
        rows: (T, L) int64, of the targets.
        similarity: (T, L), cosine with it; without gradient, as is the choice.
    """

    rows: Tensor
    similarity: Tensor


@torch.no_grad()
def match_tokens(tokens: Tensor, targets: Tensor) -> Matches:
    """The most similar target, by the cosine, of each token.

    Args:
        tokens: (T, L, D).
        targets: (T, K, D), each row's own.
    """
    best = (normalized(tokens) @ normalized(targets).transpose(1, 2)).max(2)
    return Matches(best.indices, best.values)


def mean_over_tokens(values: Tensor, special: Tensor) -> Tensor:
    """Mean over each caption's tokens that are not special, then over all captions; one without any counts as 0.

    Args:
        values: (T, L). special: (T, L) bool.
    """
    return (values.masked_fill(special, 0).sum(1) / (~special).sum(1).clamp(min=1)).mean()


def random_projection(width: int, dim: int) -> Tensor:
    """(width, dim), the same at every call: orthonormal columns, or as many orthogonal rows as there are where dim is
    the larger.

    Of whitened features, of squared length `width`, it makes features whose channels have a mean square of about 1.
    """
    generator = torch.Generator().manual_seed(_PROJECTION_SEED)
    size = max(width, dim)
    rotation = torch.linalg.qr(torch.randn(size, size, generator=generator, dtype=torch.float64)).Q
    return (rotation[:width, :dim] * math.sqrt(size / width)).float()


class TargetLateInteraction(Objective):
    """Target-CMLI: half the patches' squared error plus half that of tokens matched to patches of their own image.

    Were the teacher's projection learned, both sides could become 0 and the loss with them. So it is random and fixed
    (Johnson and Lindenstrauss 1984), behind a LayerNorm without parameters: targets keep their distances, have unit
    scale and never move, and the student's projections alone learn.

    The empty target would open the same way out: a token and the target that it is matched to approach one another
    until every token is matched to it. So it follows the tokens that match it, and they do not follow it: a token that
    no patch fits is left alone.
    """

    requires = Requirements(patches=True, tokens=True, patch_grid=True)
    projection: Tensor

    def __init__(self, config: TargetLateInteractionConfig, setting: Setting) -> None:
        super().__init__()
        if config.dim < 1:
            raise UserError(f"--target-cmli-dim {config.dim}: choose 1 or more")
        self.image_projection = nn.Linear(setting.width, config.dim)
        self.text_projection = nn.Linear(setting.width, config.dim)
        self.register_buffer("projection", random_projection(setting.patch_width, config.dim))
        self.empty = nn.Parameter(torch.randn(config.dim)) if config.empty_target else None

    def forward(self, student: StudentOutput, teacher: TeacherOutput | None, batch: Batch) -> ObjectiveOutput:
        targets = self.project_patches(teacher.patches)
        image, image_similarity = self._image_loss(student.image, targets)
        special = _known(batch.special, "target_cmli")
        tokens = at_least_float32(_project(student.text.tokens, self.text_projection))
        own = targets[batch.caption_image]
        if self.empty is not None:
            own = torch.cat([own, self.empty.to(own.dtype).expand(len(own), 1, -1)], dim=1)
        matches = match_tokens(tokens, own)
        # Without an empty target no row has this number.
        is_empty = matches.rows == targets.shape[1]
        chosen = own.gather(1, matches.rows[..., None].expand(-1, -1, own.shape[2]))
        errors = (torch.where(is_empty[..., None], tokens.detach(), tokens) - chosen).square().mean(2)
        text = mean_over_tokens(errors, special)
        metrics = {
            "image_loss": image.detach(),
            "text_loss": text.detach(),
            "image_similarity": image_similarity,
            "text_similarity": mean_over_tokens(matches.similarity, special),
        }
        if self.empty is not None:
            metrics["empty_share"] = 100 * mean_over_tokens(is_empty.float(), special)
        return ObjectiveOutput(0.5 * (image + text), metrics)

    @torch.no_grad()
    def project_patches(self, patches: Tensor) -> Tensor:
        """(B, N_t, D_p) of the teacher to targets (B, N_t, dim)."""
        patches = at_least_float32(patches)
        return F.layer_norm(patches, patches.shape[-1:]) @ self.projection.to(patches.dtype)

    def _image_loss(self, output: ModalityOutput, targets: Tensor) -> tuple[Tensor, Tensor]:
        """Mean squared error patch by patch, and the mean cosine."""
        patches = at_least_float32(_project(output.tokens[:, 1:], self.image_projection))
        if patches.shape[1] != targets.shape[1]:
            raise UserError(
                f"target_cmli compares patch by patch: the student has {patches.shape[1]} patches, the teacher "
                f"{targets.shape[1]}; choose image and patch sizes that give as many"
            )
        similarity = F.cosine_similarity(patches.detach(), targets, dim=2).mean()
        return F.mse_loss(patches, targets), similarity
