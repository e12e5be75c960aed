"""New words alone as what is trained (textual inversion): the network stays as it is."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from dojo.cli import UserError
from dojo.finetune import embeddings
from dojo.finetune.contract import Trained
from dojo.finetune.offload import keep_activations_on_cpu
from dojo.finetune.tokens import Vectors, meta_clips, numbers_of
from dojo.lazy import torch
from dojo.models import attention
from dojo.run import averaging

if TYPE_CHECKING:
    from torch import nn

    from dojo.maths.objective import Objective
    from dojo.models.family import Model, ModelArgs
    from dojo.run.averaging import EmaArgs
    from dojo.run.optim import OptimArgs
    from dojo.run.run import Run


class Inversion(Trained):
    """The vectors of new words, in float32; network and encoders are in the run's precision.

    A checkpoint holds them as they are trained, and as other programs read them. The model as it
    was is the model as it is, of prompts without the words.
    """

    result_name = embeddings.FOLDER
    card_weights = embeddings.FOLDER
    reference_is_free = True
    result_has_frozen = False
    has_reference = False

    def __init__(self, run: Run, model: Model) -> None:
        super().__init__(run)
        self._known = model

    @property
    def beside(self) -> int:
        """The vectors'."""
        return numbers_of(self._known)

    def text_networks(self) -> Mapping[str, nn.Module]:
        """The CLIPs, behind whose first layer the vectors lie."""
        return meta_clips(self._known, self.run.dtype)

    @property
    def dtype(self) -> torch.dtype:
        """float32, whatever the network is in."""
        return torch.float32

    def check(self, args: OptimArgs) -> None:
        """See `Trained`."""
        if args.fused_backward:
            raise UserError(
                "--fused_backward is for training all weights (--finetune full, train_full_*.py): "
                "the gradients of a few vectors take next to nothing"
            )
        super().check(args)

    def adapt(self, network: nn.Module) -> list[nn.Parameter]:
        """Nothing in the network is trained."""
        return []

    def stored(self, network: nn.Module) -> nn.Module:
        """As it is."""
        return network

    def bytes_per_weight(self, optim: OptimArgs, ema: EmaArgs) -> int:
        """See `Trained`."""
        return optim.state_bytes(self.dtype) + ema.bytes_per_weight

    def check_model(self, args: ModelArgs) -> None:
        """See `Trained`; every option goes."""

    def load(
        self,
        model: Model,
        objective: Objective,
        *,
        with_reference: bool = False,
        text_encoders: Sequence[nn.Module] = (),
        text_rates: Sequence[float] = (),
    ) -> None:
        """Reads the network and finds the vectors in the CLIPs; see `Trained`."""
        assert model.words is not None, "the model has been taught the words"
        self.model, self.objective = model, objective
        self.network = model.load_network(self.run.dtype, self.run.replicas.home)
        attention.install(self.network, model.args.attention_backend)
        if model.args.activations_on_cpu:
            keep_activations_on_cpu(self.network)
        self.modules = [self.network, *text_encoders]
        self.vectors = Vectors(model.words, text_encoders)
        self.groups = [{"params": self.vectors.params}]
        self.spread()
        self.network.eval()

    @contextmanager
    def reference(self) -> Iterator[nn.Module]:
        """The network, which is what it was."""
        yield self.network

    def save(self, folder: Path) -> None:
        """See `Trained`."""
        self.vectors.save(folder)
        self.model.finish(folder, self.objective)

    def restore(self, folder: Path) -> None:
        """See `Trained`."""
        self.vectors.restore(folder)

    def save_average(self, folder: Path) -> None:
        """See `Trained`."""
        self.vectors.save(folder / averaging.FOLDER)

    def restore_average(self, folder: Path) -> None:
        """See `Trained`."""
        self.vectors.restore(folder / averaging.FOLDER)

    def save_result(self, folder: Path) -> Path:
        """Writes a file for each word."""
        self.vectors.write(folder)
        self.model.finish(folder, self.objective)
        return folder / self.result_name
