"""Ranking: each pair is to be more similar than its image is to other captions, and its caption to other images.

The hinge loss of SHRe ("See, Hear, and Read", Aytar et al. 2017).
"""

from dataclasses import dataclass, field

from torch import Tensor

from emkum.layers.precision import normalized
from emkum.objectives.base import Objective, Setting
from emkum.objectives.image_text_contrast import Pairs, top1_accuracy
from emkum.outputs import Batch, ObjectiveOutput, StudentOutput, TeacherOutput


@dataclass
class RankingConfig:
    margin: float = field(
        default=0.2, metadata={"help": "by how much the cosine of a pair is to exceed that of a false pair"}
    )


def ranking_loss(queries: Tensor, own: Tensor, others: Tensor, negatives: Tensor, margin: float) -> Tensor:
    """max(0, margin - cos(query, own) + cos(query, other)), summed over negatives, mean over queries.

    The sum grows with the number of negatives, as in the source.

    Args:
        queries: (Q, D).
        own: (Q, D), what belongs to each query.
        others: (K, D).
        negatives: (Q, K) bool, which of the others count for a query.
        margin: least wanted difference of cosines.

    Returns:
        scalar, of float32 at least.
    """
    queries = normalized(queries)
    pair = (queries * normalized(own)).sum(1, keepdim=True)
    excess = margin - pair + queries @ normalized(others).T
    return excess.relu().masked_fill(~negatives, 0.0).sum(1).mean()


class Ranking(Objective):
    """Half the mean over this rank's captions plus half the mean over their images, against all ranks' rows.

    Every caption makes one pair with its image, so that an image with several captions is a query once for each.
    Captions and images with equal image ids are no negatives of one another.
    """

    def __init__(self, config: RankingConfig, setting: Setting) -> None:
        super().__init__()
        self.margin = config.margin

    def forward(self, student: StudentOutput, teacher: TeacherOutput | None, batch: Batch) -> ObjectiveOutput:
        own = Pairs(student.image.features, student.text.features, batch.image_ids, batch.caption_ids)
        # Validation batches may differ in size between ranks; there the loss is each rank's own.
        everyone = own.gathered() if self.training else own
        pair_images = own.images[batch.caption_image]
        same_texts = own.text_ids[:, None] == everyone.text_ids[None]
        same_images = own.text_ids[:, None] == everyone.image_ids[None]
        i2t = ranking_loss(pair_images, own.texts, everyone.texts, ~same_texts, self.margin)
        t2i = ranking_loss(own.texts, pair_images, everyone.images, ~same_images, self.margin)
        image_positives = own.image_ids[:, None] == everyone.text_ids[None]
        metrics = {
            "i2t_loss": i2t.detach(),
            "t2i_loss": t2i.detach(),
            "i2t_accuracy": top1_accuracy(own.images, everyone.texts, image_positives),
            "t2i_accuracy": top1_accuracy(own.texts, everyone.images, same_images),
        }
        return ObjectiveOutput(0.5 * (i2t + t2i), metrics)
