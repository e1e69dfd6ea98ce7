"""Weight-tuning methods, one file each."""

from kshot.adapters.adalora import AdaLoRA
from kshot.adapters.autolora import AutoLoRA
from kshot.adapters.base import Adapter, SearchProblem, Shared, SlotAdapter
from kshot.adapters.dora import DoRA
from kshot.adapters.full import FullTuning
from kshot.adapters.hydralora import HydraLoRA
from kshot.adapters.lora import LoRA
from kshot.adapters.lora_xs import LoRAXS
from kshot.adapters.nola import NOLA
from kshot.adapters.pissa import PiSSA
from kshot.adapters.pranc import PRANC
from kshot.adapters.randlora import RandLoRA
from kshot.adapters.svft import SVFT
from kshot.adapters.vera import VeRA
