"""What all ways of training a network promise, so that no script asks which one it has."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dojo.lazy import late
from dojo.run import optim

if TYPE_CHECKING:
    import torch
    from torch import nn

    from dojo.maths.objective import Objective
    from dojo.models.family import Model, ModelArgs
    from dojo.run import fused
    from dojo.run.averaging import EmaArgs
    from dojo.run.optim import OptimArgs
    from dojo.run.run import Run
else:
    fused = late("dojo.run.fused")


class Trained(ABC):
    """What of a network is trained: how it is loaded, kept, and what it leaves behind.

    It is made before any weights are read: what could not be trained is refused, what training
    takes is counted, and the result is known by its name. `load` brings the network. A network is
    in eval mode then, without dropout, so that two passes over one input agree.
    """

    result_name: str
    """The file by which a finished run is known."""
    card_weights: str
    """The result, as the model card calls it."""
    reference_is_free: bool
    """Whether the model as it was can be asked without a copy of it."""
    result_has_frozen: bool
    """Whether weights that are not trained belong to the result."""
    has_reference: bool
    """Whether there is a `reference`."""
    model: Model
    objective: Objective
    network: Any
    """The network, as it was loaded: accelerate's wrapping is not in it."""
    params: list[nn.Parameter]
    """What is trained, of all `modules`."""
    groups: list[dict[str, Any]]
    """The same for the optimizer: `params`, and `lr` where it is not the run's."""
    modules: list[Any]
    """The network, and text encoders that are trained beside it."""

    def __init__(self, run: Run) -> None:
        self.run = run

    # ---- before weights are read ----

    @property
    def beside(self) -> int:
        """Numbers that are trained outside of the network."""
        return 0

    def text_networks(self) -> Mapping[str, nn.Module]:
        """The text encoders through which something learns, by their folders: on the meta device,
        as they are trained."""
        return {}

    @property
    @abstractmethod
    def dtype(self) -> torch.dtype:
        """Of the weights that are trained."""

    def check(self, args: OptimArgs) -> None:
        """Refuses what could not be trained.

        Raises:
            UserError: the weights' precision does not fit the run's or the optimizer's, or the
                steps cannot be taken in the backward pass.
        """
        optim.check(args, self.dtype)
        if args.fused_backward:
            fused.check_run(self.run)

    @abstractmethod
    def adapt(self, network: nn.Module) -> list[nn.Parameter]:
        """Makes what is trained of a frozen network (also on the meta device), and returns it."""

    @abstractmethod
    def stored(self, network: nn.Module) -> nn.Module:
        """The network, adapted and in the run's precision, with weights as they lie in memory."""

    @abstractmethod
    def bytes_per_weight(self, optim: OptimArgs, ema: EmaArgs) -> int:
        """What training one weight takes: itself, gradient, optimizer, average, autocast's copy."""

    def reference_bytes(self, network: nn.Module) -> int:
        """What a `reference` takes on the device beside the network.

        Args:
            network: as `stored` gives it, also on the meta device.
        """
        return 0

    @abstractmethod
    def check_model(self, args: ModelArgs) -> None:
        """Refuses options of the model that do not go with those of the training.

        Raises:
            UserError: naming both.
        """

    def stored_bytes(self, network: nn.Module) -> tuple[int, int]:
        """Bytes on the device of the network's frozen weights, as training stores them; and of
        these those of weights that are only on their way, which stay when the network leaves.

        Args:
            network: as `stored` gives it, also on the meta device.
        Raises:
            UserError: it cannot be stored so.
        """
        return sum(param.nbytes for param in network.parameters() if not param.requires_grad), 0

    # ---- the network ----

    @abstractmethod
    def load(
        self,
        model: Model,
        objective: Objective,
        *,
        with_reference: bool = False,
        text_encoders: Sequence[nn.Module] = (),
        text_rates: Sequence[float] = (),
    ) -> None:
        """Reads the network and readies it for training.

        Args:
            objective: that is trained; a scheduler that goes with it is saved beside the weights.
            with_reference: whether the model as it was will be asked for.
            text_encoders: CLIPs, frozen, that are trained too; only adapters can.
            text_rates: their learning rates; further ones are passed over, none is the
                network's.
        Raises:
            UserError: the options name layers or weights that are not there.
        """

    def spread(self) -> None:
        """Leaves this process its part of what was just read, where a run is sharded."""
        self.params = []  # nothing but the modules may hold the whole weights
        self.params = self.run.replicas.spread(self.modules, self.groups)

    @contextmanager
    def whole(self) -> Iterator[None]:
        """The whole weights in `modules` of the process that writes, for a while: a collective."""
        if not self.run.replicas.sharded:
            yield
            return
        kept = self.network, self.modules
        state = self.run.replicas.whole(self.network, frozen=self.result_has_frozen)
        if self.run.main:
            self.network = self.model.meta_network()
            self.adapt(self.network)
            self.network.load_state_dict(state, strict=False, assign=True)
            self.modules = [self.network]
        try:
            yield
        finally:
            self.network, self.modules = kept

    @abstractmethod
    def reference(self) -> AbstractContextManager[nn.Module]:
        """The model as it was before training, in the trained network's own precision."""

    # ---- files ----

    @abstractmethod
    def save(self, folder: Path) -> None:
        """Writes the weights, and what belongs beside them, for a checkpoint."""

    @abstractmethod
    def restore(self, folder: Path) -> None:
        """Reads a checkpoint's weights back, to the bit.

        Raises:
            UserError: it holds others.
        """

    @abstractmethod
    def save_average(self, folder: Path) -> None:
        """Writes the weights, which are averaged ones now, into their place in a checkpoint."""

    @abstractmethod
    def restore_average(self, folder: Path) -> None:
        """Reads a checkpoint's averaged weights into the network."""

    @abstractmethod
    def save_result(self, folder: Path) -> Path:
        """Writes what the training was for, and returns the file or folder that holds it."""
