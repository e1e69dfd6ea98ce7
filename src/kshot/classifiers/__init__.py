"""From image features to logits: one file a method."""

from kshot.classifiers.base import Classifier, ClassifierFactory, Task
from kshot.classifiers.class_mean import NearestClassMean
from kshot.classifiers.coop import CoOp
from kshot.classifiers.linear import LinearProbe
from kshot.classifiers.zero_shot import TextPrompt

__all__ = ["Classifier", "ClassifierFactory", "CoOp", "LinearProbe", "NearestClassMean", "Task", "TextPrompt"]
