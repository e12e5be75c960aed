"""Low-rank adapters on a frozen network, and on CLIPs beside it, as what is trained."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import nn

from dojo import rng
from dojo.finetune import lora
from dojo.finetune.contract import Trained
from dojo.maths.objective import Objective
from dojo.models.family import Model
from dojo.run import averaging
from dojo.run.averaging import EmaArgs
from dojo.run.optim import OptimArgs
from dojo.run.run import Run


class Adapters(Trained):
    """Adapters in float32; the frozen weights are in the run's precision.

    A checkpoint holds one file, and one in `ema/` for the average. The reference is the network
    with its adapters switched off.
    """

    result_name = lora.WEIGHTS
    card_weights = lora.WEIGHTS
    reference_is_free = True
    has_reference = True

    def __init__(self, run: Run, args: lora.LoraArgs) -> None:
        super().__init__(run)
        self.args = args

    @property
    def dtype(self) -> torch.dtype:
        """float32, whatever the network is in."""
        return torch.float32

    def adapt(self, network: nn.Module) -> list[nn.Parameter]:
        """Adds adapters; A is drawn from torch's global generator."""
        return lora.add(network, self.args)

    def stored(self, network: nn.Module) -> nn.Module:
        """As it is: the adapters' own bytes are in `bytes_per_weight`."""
        return network

    def bytes_per_weight(
        self, optim: OptimArgs, ema: EmaArgs, *, with_reference: bool = False
    ) -> int:
        """See `Trained`; a reference takes nothing."""
        return optim.state_bytes(self.dtype) + ema.bytes_per_weight

    def load(
        self,
        model: Model,
        objective: Objective,
        *,
        with_reference: bool = False,
        text_encoders: Sequence[nn.Module] = (),
        text_lr: float | None = None,
    ) -> None:
        """Reads the network and adds adapters to it and to the CLIPs; see `Trained`."""
        self.model, self.objective = model, objective
        self.network = model.load_network(self.run.dtype, self.run.device)
        self.modules = [self.network, *text_encoders]
        rng.seed_global(self.run.seed, "adapter")
        self.groups = [{"params": self.adapt(self.network)}]
        rate = {} if text_lr is None else {"lr": text_lr}
        for text_encoder in text_encoders:
            self.groups.append({"params": lora.add_text(text_encoder, self.args), **rate})
        lora.start_from(self.args, *self.modules)
        self.params = [param for group in self.groups for param in group["params"]]
        self.network.eval()

    @contextmanager
    def reference(self) -> Iterator[nn.Module]:
        """The network without its adapters."""
        with lora.disabled(self.network):
            yield self.network

    def save(self, folder: Path) -> None:
        """See `Trained`."""
        lora.save(folder, *self.modules)
        self.model.finish(folder, self.objective)

    def restore(self, folder: Path) -> None:
        """See `Trained`."""
        lora.restore(folder, *self.modules)

    def save_average(self, folder: Path) -> None:
        """See `Trained`."""
        lora.save(folder / averaging.FOLDER, *self.modules)

    def restore_average(self, folder: Path) -> None:
        """See `Trained`."""
        lora.restore(folder / averaging.FOLDER, *self.modules)

    def save_result(self, folder: Path) -> Path:
        """Writes the adapters, in the formats that were asked for."""
        self.save(folder)
        lora.export(folder, self.args.lora_format)
        return folder / self.result_name
