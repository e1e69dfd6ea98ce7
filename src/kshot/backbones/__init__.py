"""Frozen models behind one interface: image features, slots, and a text tower where there is one."""

from kshot.backbones.base import Backbone
from kshot.backbones.language import VisionLanguageBackbone
from kshot.backbones.open_clip import OpenClip
from kshot.backbones.preprocessing import Preprocessing
from kshot.backbones.timm import Timm
