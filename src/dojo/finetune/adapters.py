"""Low-rank adapters on a frozen network, and on CLIPs beside it, as what is trained."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from copy import copy
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

from dojo import rng
from dojo.cli import UserError
from dojo.finetune import lora
from dojo.finetune.contract import Trained
from dojo.finetune.offload import Storage, keep_activations_on_cpu
from dojo.finetune.tokens import PivotalArgs, Vectors, meta_clips, numbers_of
from dojo.lazy import torch
from dojo.maths.objective import Objective
from dojo.models import attention
from dojo.models.family import Model, ModelArgs
from dojo.models.opening import facts_of
from dojo.run import averaging
from dojo.run.averaging import EmaArgs
from dojo.run.optim import OptimArgs
from dojo.run.run import Run

if TYPE_CHECKING:
    from torch import nn

# What LoRA files call the text encoders, in their order.
TEXT_PARTS = ("text_encoder", "text_encoder_2")


class Adapters(Trained):
    """Adapters in float32; the frozen weights are in the run's precision, or packed.

    A checkpoint holds one file, and one in `ema/` for the average. The reference is the network
    with its adapters switched off: of a packed network the packed one.
    """

    result_name = lora.WEIGHTS
    card_weights = lora.WEIGHTS
    reference_is_free = True
    result_has_frozen = False
    has_reference = True

    def __init__(
        self,
        run: Run,
        args: lora.LoraArgs,
        *,
        model: Model | None = None,
        tokens: PivotalArgs | None = None,
        text: bool = True,
    ) -> None:
        """
        Args:
            model: as far as it is known before its weights, for words that are new to it.
            tokens: how these are trained.
            text: the text encoders get adapters; without, they are there for new words alone.
        """
        super().__init__(run)
        self.args = args
        self.tokens, self.text = tokens, text
        self.vectors: Vectors | None = None
        self._known = model
        self.storage = Storage(args.base_precision, args.blocks_on_cpu)

    def with_args(self, args: lora.LoraArgs) -> Adapters:
        """The same with other options of the adapters."""
        other = copy(self)
        other.args = args
        other.storage = Storage(args.base_precision, args.blocks_on_cpu)
        return other

    @property
    def beside(self) -> int:
        """The vectors of new words, and the adapters of the text encoders."""
        adapters = [one for clip in self._clips.values() for one in clip.parameters()]
        vectors = numbers_of(self._known) if self._known is not None else 0
        return vectors + sum(one.numel() for one in adapters if one.requires_grad)

    def text_networks(self) -> Mapping[str, nn.Module]:
        """The CLIPs, if they get adapters or have new words."""
        return self._clips

    @cached_property
    def _clips(self) -> dict[str, nn.Module]:
        model = self._known
        if model is None or not (self.text or model.words):
            return {}
        clips = meta_clips(model, self.run.dtype)
        for part, clip in clips.items():
            if self.text:
                self.adapt_text(clip, part)
        return clips

    @property
    def dtype(self) -> torch.dtype:
        """float32, whatever the network is in."""
        return torch.float32

    def check(self, args: OptimArgs) -> None:
        """See `Trained`."""
        if args.fused_backward:
            raise UserError(
                "--fused_backward is for training all weights (--finetune full, train_full_*.py): "
                "the gradients of adapters take next to nothing"
            )
        self.args.check_package()
        super().check(args)

    def check_model(self, args: ModelArgs) -> None:
        """See `Trained`."""
        if self.storage and args.torch_compile:
            flag = "--blocks_on_cpu" if self.args.blocks_on_cpu else "--base_precision"
            raise UserError(
                f"--torch_compile does not go with {flag}, whose weights are fetched between the "
                "products: leave it out"
            )

    def stored_bytes(self, network: nn.Module) -> tuple[int, int]:
        """See `Trained`; of weights in CPU memory those on their way count."""
        return self.storage.bytes_of(network)

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

    def bytes_per_weight(self, optim: OptimArgs, ema: EmaArgs) -> int:
        """See `Trained`."""
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
        store = self.storage.prepare if self.storage else None
        replicas = self.run.replicas
        with replicas.turn():
            self.network = model.load_network(self.run.dtype, replicas.home, prepare=store)
            attention.install(self.network, model.args.attention_backend)
            if model.args.activations_on_cpu:
                keep_activations_on_cpu(self.network)
            self.modules = [self.network, *text_encoders]
            rng.seed_global(self.run.seed, "adapter")
            self.groups = [{"params": self.adapt(self.network)}]
            rates = [*text_rates, *(None for _ in text_encoders)]
            for text_encoder, part, rate in zip(text_encoders, TEXT_PARTS, rates, strict=False):
                if not self.text:
                    break
                group = {"params": self.adapt_text(text_encoder, part)}
                self.groups.append(group if rate is None else {**group, "lr": rate})
            lora.start_from(self.args, *self.adapted)
            if model.words is not None and self.tokens is not None:
                self.vectors = Vectors(model.words, text_encoders)
                self.groups.append({"params": self.vectors.params, **self.tokens.group})
            self.spread()
        self.network.eval()

    @property
    def adapted(self) -> list[nn.Module]:
        """Those of `modules` that have adapters."""
        return self.modules if self.text else self.modules[:1]

    @contextmanager
    def reference(self) -> Iterator[nn.Module]:
        """The network without its adapters."""
        with lora.disabled(self.network):
            yield self.network

    def save(self, folder: Path) -> None:
        """See `Trained`."""
        self._save(folder)
        self.model.finish(folder, self.objective)

    def _save(self, folder: Path) -> None:
        lora.save(folder, *self.adapted)
        if self.vectors is not None:
            self.vectors.save(folder)

    def restore(self, folder: Path) -> None:
        """See `Trained`."""
        lora.restore(folder, *self.adapted)
        if self.vectors is not None:
            self.vectors.restore(folder)

    def save_average(self, folder: Path) -> None:
        """See `Trained`."""
        self._save(folder / averaging.FOLDER)

    def restore_average(self, folder: Path) -> None:
        """See `Trained`."""
        self.restore(folder / averaging.FOLDER)

    def save_result(self, folder: Path) -> Path:
        """Writes the adapters, in the formats that were asked for, and a file for each new word."""
        lora.save(folder, *self.adapted)
        if self.vectors is not None:
            self.vectors.write(folder)
        self.model.finish(folder, self.objective)
        lora.export(folder, self.args.lora_format, lora.Base.of(self.model, self.objective))
        return folder / self.result_name
