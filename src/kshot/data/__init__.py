"""Data sets, k-shot sampling and loading."""

from kshot.data.datamodule import FewShotDataModule
from kshot.data.images import Augment, CropFlip
from kshot.data.parts import Batch
from kshot.data.protocols import TestSet
