"""`emkum evaluate`: figures of a trained student, or of an image encoder, on prepared data."""

import argparse
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from emkum.commands import evaluate_images, evaluate_zero_shot, finetune, scorecard
from emkum.commands.arguments import assert_at_least
from emkum.errors import UserError
from emkum.provenance import write_json

if TYPE_CHECKING:
    from torch import Tensor

    from emkum.checkpoint import ImageTextModel
    from emkum.data.shards import ShardedSamples

LATE_INTERACTION = "late_interaction"
# Pairs of senses -> what stands for images and for captions in the scores. Of text and audio it is sounds and captions,
# since a sound may have several captions.
PAIRS = {"image-text": ("image", "text"), "image-audio": ("image", "audio"), "text-audio": ("audio", "text")}
IMAGE_TEXT, *_ = PAIRS


def add_parser(commands: Any) -> None:
    parser = commands.add_parser("evaluate", help="evaluate a trained student or an encoder")
    kinds = parser.add_subparsers(dest="kind", required=True, metavar="KIND")
    scorecard.add_parser(kinds)
    add_retrieval_parser(kinds)
    evaluate_zero_shot.add_parser(kinds)
    evaluate_images.add_parser(kinds)
    finetune.add_parser(kinds)


def add_retrieval_parser(kinds: Any) -> None:
    """Add the sub-command `retrieval`."""
    retrieval = kinds.add_parser(
        "retrieval",
        help="image-text retrieval, both directions",
        description="Recall at 1, 5 and 10 in percent, and the median rank, images to captions and captions to images, "
        "over a whole split. All captions of an image count; ties count against the model. Further figures are in "
        "--json; docs/evaluation.md says what each of them is.",
        epilog="example: emkum evaluate retrieval --checkpoint runs/flickr8k --data data/flickr8k --split valid",
    )
    retrieval.add_argument("--checkpoint", required=True, help="checkpoint file, or a run's folder for its best one")
    retrieval.add_argument("--data", required=True, help="folder made by `emkum prepare`")
    retrieval.add_argument("--split", default="test", help="split to score (default: %(default)s)")
    retrieval.add_argument("--json", help="also write the figures to this file")
    retrieval.add_argument("--batch-size", type=int, default=128, help="images encoded at once (default: %(default)s)")
    retrieval.add_argument(
        "--pair",
        choices=PAIRS,
        default=IMAGE_TEXT,
        help="senses that are compared, for students that hear; the figures of sounds are named by a, such as i2a_r1 "
        "(default: %(default)s)",
    )
    retrieval.add_argument(
        "--scores",
        choices=("cls", LATE_INTERACTION),
        default="cls",
        help="what is compared: features of the CLS tokens, or patches and tokens one by one, for students trained "
        "with the objective cmli (default: %(default)s)",
    )
    retrieval.add_argument(
        "--rerank",
        choices=("itm",),
        help="order each query's best candidates anew by whether they match, for students trained with this objective",
    )
    retrieval.add_argument(
        "--rerank-k", type=int, default=16, metavar="K", help="candidates that are ordered anew (default: %(default)s)"
    )
    retrieval.set_defaults(run=run_retrieval)


@dataclass
class EncodedSplit:
    """A whole split in a student's space; of another pair of senses, what stands for images and captions.

    Attributes:
        images: (N, D) unit vectors. texts: (T, D) unit vectors.
        caption_image: (T,) row of each caption's image.
    """

    images: "Tensor"
    texts: "Tensor"
    caption_image: "Tensor"


def encode_split(
    model: "ImageTextModel", samples: "ShardedSamples", batch_size: int = 128, pair: str = IMAGE_TEXT
) -> EncodedSplit:
    """Encode every image and every caption of a split, or another pair of PAIRS, with a progress bar."""
    import torch
    from tqdm import tqdm

    from emkum.data.decoding import decode
    from emkum.data.sounds import decode_sound

    encode = {
        "image": lambda batch: model.encode_image([decode(sample.image) for sample in batch]),
        "text": lambda batch: model.encode_text([caption for sample in batch for caption in sample.captions]),
        "audio": lambda batch: model.encode_audio([decode_sound(sample.sound) for sample in batch]),
    }
    first, second = PAIRS[pair]
    images, texts, owners = [], [], []
    for start in tqdm(range(0, len(samples), batch_size), desc="encoding", unit="batch"):
        batch = [samples[i] for i in range(start, min(start + batch_size, len(samples)))]
        images.append(encode[first](batch))
        texts.append(encode[second](batch))
        repeats = [len(sample.captions) if second == "text" else 1 for sample in batch]
        owners += [start + row for row, count in enumerate(repeats) for _ in range(count)]
    return EncodedSplit(torch.cat(images), torch.cat(texts), torch.tensor(owners))


def _assert_pair(args: argparse.Namespace, samples: "ShardedSamples") -> None:
    if args.pair == IMAGE_TEXT:
        return
    if args.scores != "cls" or args.rerank:
        raise UserError(f"--pair {args.pair} compares features alone: leave out --scores and --rerank")
    if not samples.has_sound.all():
        raise UserError(f"--pair {args.pair}: split {args.split} of {args.data} has images without a sound")


def run_retrieval(args: argparse.Namespace) -> None:
    assert_at_least(args, rerank_k=1, batch_size=1)
    import torch

    from emkum.checkpoint import load
    from emkum.commands.retrieval_inputs import ReadSplit, objectives_for
    from emkum.data.shards import open_split
    from emkum.evaluation.report import named_ways, rank_summary, retrieval_table
    from emkum.evaluation.retrieval import average_median_rank, chance_recall, retrieval_metrics

    samples = open_split(args.data, args.split)
    if len(samples) == 0:
        raise UserError(f"split {args.split} of {args.data} has no images")
    _assert_pair(args, samples)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    objectives = objectives_for(args.scores, args.rerank)
    read = ReadSplit(load(args.checkpoint, device, objectives), samples, objectives, args.batch_size, args.pair)
    compared = read.compared(args.scores, args.rerank, args.rerank_k)
    pairs = compared.score, compared.caption_image, len(samples)
    metrics = retrieval_metrics(*pairs, reranking=compared.reranking)
    metrics |= average_median_rank(*pairs, reranking=compared.reranking)
    chance = chance_recall(len(samples), compared.caption_image)
    first, second = (sense[0] for sense in PAIRS[args.pair])
    ways = f"{first}2{second}", f"{second}2{first}"
    chance, metrics = named_ways(chance, ways), named_ways(metrics, ways)
    print(retrieval_table({"chance": chance, str(args.checkpoint): metrics}, ways=ways))
    print(rank_summary(metrics, ways))
    if args.json:
        protocol = {"scores": args.scores, "rerank": args.rerank, "split": args.split}
        if args.pair != IMAGE_TEXT:
            protocol["pair"] = args.pair
        write_json(args.json, metrics | protocol | ({"rerank_k": args.rerank_k} if args.rerank else {}))
