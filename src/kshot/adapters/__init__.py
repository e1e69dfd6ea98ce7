"""Weight-tuning methods, one file each."""

from kshot.adapters.base import Adapter, SlotAdapter
from kshot.adapters.full import FullTuning, unadapted
from kshot.adapters.lora import LoRA

__all__ = ["Adapter", "FullTuning", "LoRA", "SlotAdapter", "unadapted"]
