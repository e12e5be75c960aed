"""How a pipeline is opened to draw with, and where it computes: options of whatever draws."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Literal, Self

from dojo.cli import UserError
from dojo.evaluate import pipelines
from dojo.lazy import torch
from dojo.models import attention
from dojo.models.precisions import dtype_of, exact_float32

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True, kw_only=True)
class PlaceArgs:
    """Precision, device and memory of a pipeline that draws."""

    single_file_config: str | None = None
    """folder or hub id with the configurations and tokenizers that a single file lacks"""
    tencent_weights: pipelines.TencentWeights = "auto"
    """of Tencent's own folder of Hunyuan-DiT, which model/pytorch_model_*.pt: auto is the averaged
    one (ema), or the one that is there; with LoRAs the one that the args.json of their runs says"""
    dtype: Literal["auto", "fp32", "fp16", "bf16"] = "auto"
    """precision; auto is bf16 on CUDA, fp16 on MPS, fp32 on a CPU"""
    device: Literal["auto", "cuda", "mps", "cpu"] = "auto"
    """where to compute"""
    offload: Literal["none", "model", "sequential"] = "none"
    """keep parts of the model in CPU memory while they are not needed (CUDA)"""
    attention_backend: attention.Backend | None = None
    """what computes the network's attention, by diffusers' names (sage, flash, ...); unset is
    torch's own choice"""

    def find_device(self) -> torch.device:
        """The device that `--device` names, or for auto the best that there is.

        Raises:
            UserError: there is none, or `--offload` needs another.
        """
        there = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}
        name: str = self.device
        if name == "auto":
            name = next((kind for kind, usable in there.items() if usable), "cpu")
        elif not there.get(name, True):
            raise UserError(f"--device {name}: this machine has none")
        if self.offload != "none" and name != "cuda":
            raise UserError(f"--offload {self.offload} needs a CUDA device")
        return torch.device(name)

    def dtype_on(self, device: torch.device) -> torch.dtype:
        """The precision of a pipeline on a device."""
        if self.dtype != "auto":
            return dtype_of(self.dtype)
        return {"cuda": torch.bfloat16, "mps": torch.float16}.get(device.type, torch.float32)

    def for_loras(self, name: str, loras: Sequence[str]) -> Self:
        """The same with the network of Tencent's own folder that LoRAs were trained on, where it is
        left open.

        Raises:
            UserError: they were trained on different ones.
        """
        if self.tencent_weights != "auto":
            return self
        return replace(self, tencent_weights=pipelines.trained_on(name, loras))

    def load(self, name: str, device: torch.device) -> Any:
        """The pipeline of a name, on the CPU still, in the precision of the device.

        From here on float32 is not shortened to TensorFloat-32.

        Raises:
            UserError: see `pipelines.load_pipeline` and `attention.check`.
        """
        dtype = self.dtype_on(device)
        exact_float32()
        attention.check(self.attention_backend, attention.FLAG, device, dtype, trains=False)
        pipeline = pipelines.load_pipeline(
            name, dtype, self.single_file_config, self.tencent_weights
        )
        network = getattr(pipeline, "transformer", None) or pipeline.unet
        attention.install(network, self.attention_backend)
        return pipeline

    def put(self, pipeline: Any, device: torch.device) -> None:
        """Brings a pipeline to the device, or its parts when they are needed (`--offload`)."""
        if self.offload == "model":
            pipeline.enable_model_cpu_offload(device=device)
        elif self.offload == "sequential":
            pipeline.enable_sequential_cpu_offload(device=device)
        else:
            pipeline.to(device)
