"""DeepSpeed's engine under our scripts on a CPU, where accelerate would not make one."""

import os
from collections.abc import Sequence
from typing import Any

import accelerate
from accelerate.state import PartialState
from accelerate.utils import DeepSpeedPlugin, DistributedType

from tests.processes import _run


def run(script: str, flags: Sequence[str], stage: int) -> None:
    """Runs a training script in one of several gloo processes, with a ZeRO stage.

    accelerate joins the processes as it does on a CPU and is told afterwards that they are
    DeepSpeed's, so that all that follows is what it would do on GPUs.
    """
    os.environ["DS_ACCELERATOR"] = "cpu"
    from deepspeed.ops import __compatible_ops__  # pyright: ignore[reportMissingImports]

    __compatible_ops__["deepspeed_shm_comm"] = False  # C++ that would be compiled for minutes
    plugin = DeepSpeedPlugin(zero_stage=stage, gradient_accumulation_steps="auto")  # pyright: ignore
    begin = accelerate.Accelerator.__init__

    def become(self: Any, **options: Any) -> None:
        begin(self, **options)
        plugin.set_mixed_precision(self.mixed_precision)
        plugin.select(_from_accelerator_state=True)
        for state in (self.state, PartialState()):
            state._shared_state["distributed_type"] = DistributedType.DEEPSPEED
        self.state.deepspeed_plugins = plugin
        self.native_amp, self.deepspeed_engine_wrapped = False, None

    accelerate.Accelerator.__init__ = become  # pyright: ignore
    _run(script, flags)
