"""What of a network is trained, by one contract: adapters, or every weight."""

from dojo.finetune.adapters import Adapters
from dojo.finetune.contract import Trained
from dojo.finetune.cost import begin, cost_of, shape_of
from dojo.finetune.fit import planned
from dojo.finetune.inversion import Inversion
from dojo.finetune.lagged import Lagged
from dojo.finetune.lora import LoraArgs
from dojo.finetune.options import FinetuneAllArgs, FinetuneArgs, TextEncoderArgs, choose
from dojo.finetune.tokens import InversionArgs, PivotalArgs
from dojo.finetune.whole import AllWeights, FileArgs, FullArgs, WholeArgs

__all__ = [
    "Adapters",
    "AllWeights",
    "FileArgs",
    "FinetuneAllArgs",
    "FinetuneArgs",
    "FullArgs",
    "Inversion",
    "InversionArgs",
    "Lagged",
    "LoraArgs",
    "PivotalArgs",
    "TextEncoderArgs",
    "Trained",
    "WholeArgs",
    "begin",
    "choose",
    "cost_of",
    "planned",
    "shape_of",
]
