"""Images of one split that are in another one, too."""

import hashlib

import numpy as np
from tqdm import tqdm

from emkum.data.shards import ShardedSamples


def shared_images(samples: ShardedSamples, others: ShardedSamples) -> np.ndarray:
    """(len(samples),) bool, True where the encoded image is, byte for byte, one of the others.

    Splits of one prepared folder are told by their image ids, which are equal for equal images there. Of splits of two
    folders, images of equal lengths are read and hashed; the same photo in another size or encoding is not found.

    Args:
        samples, others: splits.

    Raises:
        UserError: a shard is damaged.
    """
    if samples.directory.resolve().parent == others.directory.resolve().parent:
        return np.isin(samples.image_ids, others.image_ids)
    lengths = np.intersect1d(samples.image_lengths, others.image_lengths)
    # Samples without an image have length 0.
    lengths = lengths[lengths > 0]
    own, theirs = (np.flatnonzero(np.isin(each.image_lengths, lengths)) for each in (samples, others))
    with tqdm(total=len(own) + len(theirs), desc="equal images", unit="image", disable=None) as progress:
        own_hashes, their_hashes = (
            np.array([_hash(split, row, progress) for row in rows], dtype="S16")
            for split, rows in ((samples, own), (others, theirs))
        )
    shared = np.zeros(len(samples), dtype=bool)
    shared[own[np.isin(own_hashes, their_hashes)]] = True
    return shared


def _hash(samples: ShardedSamples, row: int, progress: tqdm) -> bytes:
    progress.update()
    return hashlib.blake2b(samples[int(row)].image, digest_size=16).digest()
