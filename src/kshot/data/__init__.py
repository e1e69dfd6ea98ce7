"""Data sets, k-shot sampling and loading."""

from kshot.data.datamodule import FewShotDataModule
from kshot.data.parts import Batch
from kshot.data.protocols import TestSet
from kshot.data.transforms import Augment, CropFlip
