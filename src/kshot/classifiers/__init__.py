"""From image features to logits: one file a method."""

from kshot.classifiers.average import Average
from kshot.classifiers.base import Classifier, ClassifierFactory, Shots, Task, TextClassifier
from kshot.classifiers.clap import CLAP
from kshot.classifiers.class_mean import NearestClassMean
from kshot.classifiers.class_mean_text import ClassMeanText
from kshot.classifiers.clip_adapter import CLIPAdapter
from kshot.classifiers.cocoop import CoCoOp
from kshot.classifiers.coop import CoOp
from kshot.classifiers.dept import DePT
from kshot.classifiers.gda import GDA
from kshot.classifiers.kernel_ridge import KernelRidge
from kshot.classifiers.kgcoop import KgCoOp
from kshot.classifiers.linear import LinearProbe
from kshot.classifiers.logistic import LogisticProbe
from kshot.classifiers.lp_plus_plus import LPPlusPlus
from kshot.classifiers.maple import MaPLe
from kshot.classifiers.prolip import ProLIP
from kshot.classifiers.promptsrc import PromptSRC
from kshot.classifiers.ridge import Ridge
from kshot.classifiers.task_res import TaskRes
from kshot.classifiers.tip_adapter import TipAdapter, TipAdapterF
from kshot.classifiers.two_stage import TwoStage
from kshot.classifiers.vpt import VPT
from kshot.classifiers.zero_shot import TextPrompt
