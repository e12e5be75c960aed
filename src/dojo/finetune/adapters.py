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
from dojo.models.opening import facts_of
from dojo.run import averaging
from dojo.run.averaging import EmaArgs
from dojo.run.optim import OptimArgs
from dojo.run.run import Run

# What LoRA files call the text encoders, in their order.
TEXT_PARTS = ("text_encoder", "text_encoder_2")


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
        """Adds adapters; A is drawn from torch's global generator.

        A LoHa or LoKr that training starts from is kept as it is.
        """
        if path := lora.lycoris_start(self.args):
            return lora.add_lycoris(path, network, self.args, facts_of(network).part)
        return lora.add(network, self.args)

    def adapt_text(self, text_encoder: nn.Module, part: str) -> list[nn.Parameter]:
        """The same of a text encoder."""
        if path := lora.lycoris_start(self.args):
            return lora.add_lycoris(path, text_encoder, self.args, part)
        return lora.add_text(text_encoder, self.args)

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
        text_rates: Sequence[float] = (),
    ) -> None:
        """Reads the network and adds adapters to it and to the CLIPs; see `Trained`."""
        self.model, self.objective = model, objective
        self.network = model.load_network(self.run.dtype, self.run.device)
        self.modules = [self.network, *text_encoders]
        rng.seed_global(self.run.seed, "adapter")
        self.groups = [{"params": self.adapt(self.network)}]
        rates = [*text_rates, *(None for _ in text_encoders)]
        for text_encoder, part, rate in zip(text_encoders, TEXT_PARTS, rates, strict=False):
            group = {"params": self.adapt_text(text_encoder, part)}
            self.groups.append(group if rate is None else {**group, "lr": rate})
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
        lora.export(folder, self.args.lora_format, lora.Base.of(self.model, self.objective))
        return folder / self.result_name
