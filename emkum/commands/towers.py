"""A model that many figures are taken of: loaded once, and each split read by it once."""

from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from emkum.checkpoint import MODEL, ImageTextModel, find_checkpoint, load, model_name
from emkum.commands.evaluate_images import Features
from emkum.commands.evaluate_zero_shot import image_features
from emkum.commands.feature_models import BOTH, CLS, DEFAULT, FEATURES, MEAN, FeatureModel, open_model, open_student
from emkum.commands.image_features import LabeledSets, split_features
from emkum.commands.retrieval_inputs import ReadSplit
from emkum.data.shards import ShardedSamples
from emkum.errors import UserError
from emkum.objectives import parse_objectives
from emkum.weights import read_checkpoint


class Towers:
    """
    Args:
        source: a run's folder or a checkpoint.
        objectives: whose parts are wanted, by the content hash of the splits that are compared by them.
        cache: folder of features of classes' images.
        batch_size: images run at once. workers: decoding processes.
    """

    def __init__(
        self, source: Path, objectives: Mapping[str, Sequence[str]], cache: Path, batch_size: int, workers: int
    ) -> None:
        self.source, self.cache = source, cache
        self.batch_size, self.workers = batch_size, workers
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self._wanted = objectives
        self._read: dict[str, ReadSplit] = {}
        self._images: dict[str, Tensor] = {}
        self._models: dict[tuple[bool, str], FeatureModel] = {}

    @cached_property
    def _objectives(self) -> list[str] | None:
        """That the student was trained with; None of another kind of model."""
        state = read_checkpoint(find_checkpoint(self.source))
        return parse_objectives(state["cfg"]["model"]["objectives"]) if model_name(state) == MODEL else None

    @cached_property
    def student(self) -> ImageTextModel:
        """With those of its objectives that any line needs.

        Raises:
            UserError: it is no student.
        """
        wanted = {name for names in self._wanted.values() for name in names}
        return load(self.source, str(self.device), [name for name in self._objectives or () if name in wanted])

    def read(self, samples: ShardedSamples, needed: Sequence[str] = ()) -> ReadSplit:
        """Images and captions of a split.

        Args:
            samples: the split. needed: objectives by which it will be compared.

        Raises:
            UserError: the student was trained without one of these.
        """
        known, key = self.student.objectives, samples.content_hash()
        for name in [name for name in needed if name not in known]:
            trained = ", ".join(self._objectives or ())
            raise UserError(f"{self.source} was trained with {trained}, without the objective {name}")
        if key not in self._read:
            objectives = [name for name in self._wanted.get(key, ()) if name in known]
            self._read[key] = ReadSplit(self.student, samples, objectives, self.batch_size)
            self._images[key] = self._read[key].encoded.images
        return self._read[key]

    def images(self, samples: ShardedSamples) -> Tensor:
        """(n, D) unit vectors of a split's images in the student's space."""
        key = samples.content_hash()
        if key not in self._images:
            if key in self._wanted:
                self.read(samples)
            else:
                self._images[key] = image_features(self.student, samples, self.batch_size, self.workers)
        return self._images[key]

    def features(self, sets: LabeledSets, which: str, whole: bool) -> Features:
        """Features of both splits for a classifier.

        Args:
            sets: the splits. which: one of FEATURES.
            whole: of the student with its shared encoder, not of the image encoder alone.

        Raises:
            UserError: there are no such features.
        """
        if which not in FEATURES:
            raise UserError(f"--features {which!r} is unknown; choose from {', '.join(FEATURES)}")
        model = self._model(whole, which)
        train, test = (
            split_features(model, split.samples, self.cache, self.batch_size, self.workers)
            for split in (sets.train, sets.test)
        )
        if not whole:
            train, test = _part(train, which), _part(test, which)
        return Features(train, test, model.identity, self.device)

    def _model(self, whole: bool, which: str) -> FeatureModel:
        # An encoder's features are parts of one run; what a whole model gives as its global one is its own matter.
        which = which if whole else BOTH
        if (whole, which) not in self._models:
            source = str(self.source)
            if self._objectives is not None:
                model = open_student(self.student, source, whole, which, self.device)
            else:
                model = open_model(f"checkpoint:{source}" if whole else source, features=which, device=self.device)
            self._models[whole, which] = model
        return self._models[whole, which]


def _part(both: np.ndarray, which: str) -> np.ndarray:
    """CLS token and mean of patches side by side, or one of them."""
    width = both.shape[1] // 2
    return {CLS: both[:, :width], DEFAULT: both[:, :width], MEAN: both[:, width:], BOTH: both}[which]
