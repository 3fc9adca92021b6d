"""`emkum figures retrieval`: queries of both directions with what is retrieved for them."""

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

from emkum.commands.arguments import assert_at_least
from emkum.commands.evaluate import LATE_INTERACTION
from emkum.commands.figures_inputs import add_student_arguments, open_samples, report_files
from emkum.errors import UserError

if TYPE_CHECKING:
    from emkum.commands.retrieval_inputs import ComparedSplit
    from emkum.data.shards import ShardedSamples
    from emkum.evaluation.retrieval_figure import Example


def add_parser(kinds: Any) -> None:
    parser = kinds.add_parser(
        "retrieval",
        help="queries of both directions with what is retrieved for them",
        description="Queries drawn by a seed, half of them found at once and half of them not, as far as there are "
        "such, with their best candidates, each marked right or wrong.",
        epilog="example: emkum figures retrieval --checkpoint runs/flickr8k --data data/flickr8k --out figures/found",
    )
    add_student_arguments(parser, 4, "queries each way")
    parser.add_argument("--candidates", type=int, default=5, metavar="K", help="shown of each (default: %(default)s)")
    parser.add_argument(
        "--scores",
        choices=("cls", LATE_INTERACTION),
        default="cls",
        help="what is compared, as of `emkum evaluate retrieval` (default: %(default)s)",
    )
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> None:
    assert_at_least(args, examples=1, candidates=1)
    if args.candidates > 8:
        raise UserError(f"--candidates {args.candidates}: a page has room for 8")
    import torch

    from emkum.checkpoint import load
    from emkum.commands.retrieval_inputs import ReadSplit, objectives_for

    samples = open_samples(args.data, args.split)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    objectives = objectives_for(args.scores, None)
    read = ReadSplit(load(args.checkpoint, device, objectives), samples, objectives)
    compared = read.compared(args.scores)
    protocol = {"checkpoint": str(args.checkpoint), "split": args.split, "scores": args.scores}
    files, facts = show_retrieval(args.out, samples, compared, args.examples, args.seed, args.candidates)
    report_files(files, protocol | facts)


def show_retrieval(
    path: Path, samples: "ShardedSamples", compared: "ComparedSplit", count: int, seed: int, k: int = 5
) -> tuple[list[Path], dict[str, Any]]:
    """Draw queries of both directions with their best candidates.

    Args:
        path: where to write.
        samples: the split.
        compared: its scores.
        count: queries each way.
        seed: of the draw.
        k: candidates.

    Returns:
        The files written, and what they show.
    """
    from emkum.data.decoding import decode
    from emkum.evaluation.retrieval_figure import retrieval_examples

    owner = compared.caption_image.tolist()
    both, notes = _draw(compared, len(samples), count, seed, k)
    found_images = [row for example in both["t2i"] for row in example.found]
    found_captions = [row for example in both["i2t"] for row in example.found]
    first: dict[int, int] = {}
    for row, image in enumerate(owner):
        first.setdefault(image, row)
    shown = {*found_captions, *(example.query for example in both["t2i"])}
    captions = {row: samples[owner[row]].captions[row - first[owner[row]]] for row in shown}
    images = {row: decode(samples[row].image) for row in {*found_images, *(example.query for example in both["i2t"])}}
    files = retrieval_examples(path, images, captions, both["i2t"], both["t2i"], owner, notes)
    keys = {"i2t": lambda row: samples[row].key, "t2i": lambda row: captions[row]}
    candidates = {"i2t": lambda row: captions[row], "t2i": lambda row: samples[row].key}
    facts = {
        way: [
            {"query": keys[way](one.query), "found": [candidates[way](row) for row in one.found], "rank": one.rank}
            for one in examples
        ]
        for way, examples in both.items()
    }
    return files, facts | {"seed": seed, "notes": notes}


def _draw(
    compared: "ComparedSplit", num_images: int, count: int, seed: int, k: int
) -> "tuple[dict[str, list[Example]], dict[str, str]]":
    """Examples of both ways, and how many queries of all were found at once."""
    import torch

    from emkum.evaluation.ranks import NEVER, find_ranks
    from emkum.evaluation.retrieval import nearest
    from emkum.evaluation.retrieval_figure import Example, choose_queries

    ranks = find_ranks(compared.score, compared.caption_image, num_images)
    owner = compared.caption_image.cpu()
    queries = {"i2t": owner.unique(), "t2i": torch.arange(len(owner))}
    all_ranks = {"i2t": ranks.images.cpu(), "t2i": ranks.captions.cpu()}
    chosen = {way: choose_queries(all_ranks[way], count, seed, rows) for way, rows in queries.items()}
    lists = nearest(compared.score, chosen["i2t"], chosen["t2i"], compared.caption_image.device, k)
    examples, notes = {}, {}
    for way, found in (("i2t", lists.image_to_text), ("t2i", lists.text_to_image)):
        places = [all_ranks[way][row].item() for row in chosen[way]]
        examples[way] = [
            Example(query, rows, None if place == NEVER else place + 1)
            for query, rows, place in zip(chosen[way], found.tolist(), places, strict=True)
        ]
        share = 100 * (all_ranks[way][queries[way]] == 0).double().mean().item()
        notes[way] = f"{share:.1f} % of {len(queries[way]):,} queries right at rank 1"
    return examples, notes
