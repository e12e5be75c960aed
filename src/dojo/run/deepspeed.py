"""DeepSpeed's ZeRO under a run: what its engine has to be told, and what of it a checkpoint keeps.

accelerate makes the engine on GPUs, as one of scripts/accelerate/deepspeed_zero*.yaml says. The
engine then owns the backward pass, the clipping and the step; the rest stays the run's. It is told
to train float32 weights, which autocast computes with as in any run here: DeepSpeed's own bfloat16
would round every weight, adapters too, and keep the exact ones to itself.

ZeRO-1 shards the optimizer's state and ZeRO-2 the gradients too: each process has whole weights, so
that all but the optimizer is as with plain data parallelism. A checkpoint has what each process
keeps of the optimizer in `deepspeed/`; DeepSpeed writes the trained weights there too, and has no
switch for leaving them out (its `exclude_frozen_parameters` is of frozen ones alone).

ZeRO-3 shards the weights as well, frozen ones too. The average is then one of each process's parts,
and a checkpoint has nothing but what is in `deepspeed/`.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any, ClassVar

from dojo.cli import UserError
from dojo.files import tensors
from dojo.lazy import accelerate, nn, safetensors_torch, torch
from dojo.run import checkpoint, finite
from dojo.run.optim import OptimArgs
from dojo.run.replicas import (
    AS_IT_WAS,
    MADE_BY,
    ZERO,
    Learned,
    Replicas,
    by_zero,
    check_options,
    made_by,
)

LIVE_WEIGHTS = 1_000_000_000
"""Numbers of weights that ZeRO-3 keeps whole at once in a step (stage3_max_live_parameters)."""
BUCKET_BYTES = 4 * 500_000_000
"""ZeRO-3's room for float32 gradients on their way, whatever is trained (reduce_bucket_size)."""

_TAG = "zero"
# Those whose step is the same on a flat part of all weights as on each by itself.
OPTIMIZERS = ("adamw", "lion")
# Options, and the value at which they change nothing.
_UNTRIED: Mapping[str, object] = {
    "train_text_encoder": False,
    "new_tokens": (),
    "train_dtype": "fp32",
    "torch_compile": False,
    "base_precision": "bf16",
    "blocks_on_cpu": 0,
    "activations_on_cpu": False,
}
_POLICY = "num_inner_epochs"  # an option of methods that step after several backward passes
_METHODS = (
    "DeepSpeed is for supervised training, DPO and ReFL; several processes of this method start "
    "with scripts/accelerate/multi_gpu.yaml"
)


def asked() -> bool:
    """Whether accelerate's configuration asks for DeepSpeed."""
    return _is_set("ACCELERATE_USE_DEEPSPEED")


def check(mixed_precision: str | None, optim: OptimArgs, *, shard: bool = False) -> None:
    """Refuses, before accelerate acts on it, a configuration that would not do what it says.

    Raises:
        UserError: naming what stands against it.
    """
    if not asked():
        return
    if shard:
        raise UserError(
            "--shard does not go with DeepSpeed, which shards in its own way: start it with "
            "scripts/accelerate/multi_gpu.yaml, or leave --shard out"
        )
    if _is_set("ACCELERATE_USE_CPU") or not torch.cuda.is_available():
        # accelerate 1.15 makes plain data parallelism of it, or processes without each other.
        raise UserError(
            "DeepSpeed needs GPUs: on a CPU accelerate does something else and does not say so; "
            "start several processes with ACCELERATE_USE_CPU=true torchrun --nproc_per_node N"
        )
    if find_spec("deepspeed") is None:
        raise UserError("DeepSpeed is not installed: pip install deepspeed")
    _check_settings()
    if (mixed_precision or os.environ.get("ACCELERATE_MIXED_PRECISION")) == "fp16":
        raise UserError("--mixed_precision fp16 does not go with DeepSpeed: take bf16")
    check_optimizer(optim)


def _check_settings() -> None:
    """Refuses settings of accelerate's that are not ours to keep exact.

    Raises:
        UserError: naming the setting.
    """
    settings = {
        name: os.environ.get(f"ACCELERATE_DEEPSPEED_{name.upper()}", "none")
        for name in ("config_file", "offload_optimizer_device", "offload_param_device")
    }
    for name, value in settings.items():
        if value != "none":
            raise UserError(
                f"DeepSpeed: {name} {value} is not supported; take "
                "scripts/accelerate/deepspeed_zero2.yaml as it is, or for less memory --shard"
            )
    stage = os.environ.get("ACCELERATE_DEEPSPEED_ZERO_STAGE", "2")
    if stage not in ("1", "2", "3"):
        raise UserError(
            f"DeepSpeed: zero_stage {stage} is not supported, 1, 2 and 3 are "
            "(scripts/accelerate/deepspeed_zero2.yaml)"
        )


def check_optimizer(optim: OptimArgs) -> None:
    """Refuses what could not train flat parts of all weights.

    Raises:
        UserError: naming the flag.
    """
    if optim.kind not in OPTIMIZERS:
        raise UserError(
            f"--optimizer {optim.kind} looks at each weight as a whole and DeepSpeed shards all of "
            f"them as one row of numbers: take {' or '.join(OPTIMIZERS)}"
        )
    if optim.fused_backward:
        raise UserError("--fused_backward does not go with DeepSpeed, which has its own")


def of(accelerator: Any) -> bool:
    """Whether these processes are DeepSpeed's."""
    return accelerator.distributed_type == accelerate.DistributedType.DEEPSPEED


def deals_out(accelerator: Any) -> bool:
    """Whether they share out the weights too: ZeRO-3."""
    return of(accelerator) and _stage(accelerator) == 3


def check_script(args: Any, accelerator: Any) -> None:
    """Refuses before the work on the data what its engine could not train, or nobody has tried.

    Args:
        args: the script's options.
    Raises:
        UserError: naming the option.
    """
    if not of(accelerator):
        return
    groups = vars(args)
    if any(hasattr(group, _POLICY) for group in groups.values()):
        raise UserError(_METHODS)
    check_options(args, _UNTRIED, "DeepSpeed")
    if deals_out(accelerator) and "validation" not in groups:  # as scripts for captions have it
        raise UserError(
            "DeepSpeed ZeRO-3 is for training on captioned pictures; DPO and ReFL start with "
            "scripts/accelerate/deepspeed_zero2.yaml, or with --shard on multi_gpu.yaml"
        )


def _stage(accelerator: Any) -> int:
    plugin: Any = accelerator.state.deepspeed_plugin
    return plugin.zero_stage


def make(accelerator: Any, optim: OptimArgs) -> Zero:
    """How the processes of a run that DeepSpeed takes part in share the work."""
    kind = ZeroThree if deals_out(accelerator) else Zero
    return kind(accelerator, optim)


class Zero(Replicas):
    """The engine of a run, and its part of a checkpoint.

    Args:
        accelerator: of a run that DeepSpeed takes part in.
    Raises:
        UserError: it cannot train by this optimizer.
    """

    owns_storage = True  # each weight is a view of one row of numbers
    zero_settings: ClassVar[Mapping[str, object]] = {}

    def __init__(self, accelerator: Any, optim: OptimArgs) -> None:
        check_optimizer(optim)
        super().__init__(accelerator)
        self._settings = {
            "train_micro_batch_size_per_gpu": optim.train_batch_size,
            "gradient_accumulation_steps": optim.gradient_accumulation_steps,
            "gradient_clipping": optim.max_grad_norm,
            "zero_allow_untested_optimizer": True,
            "zero_force_ds_cpu_optimizer": False,
        }
        self.engine: Any = None
        self._resumed: Path | None = None

    # -- training -----------------------------------------------------------------------------

    def prepare(
        self, modules: Sequence[nn.Module], optimizer: torch.optim.Optimizer, passes: int = 1
    ) -> tuple[list[nn.Module], Any]:
        """The engine, which is called as the network, and the optimizer as accelerate wraps it.

        Args:
            modules: what is trained.
            passes: backward passes of a micro-batch.
        Raises:
            UserError: there are several of either, or trained weights are not float32.
        """
        if passes > 1:
            raise UserError(_METHODS)
        if len(modules) > 1:
            raise UserError(
                "DeepSpeed trains one network: leave --train_text_encoder and --new_tokens out"
            )
        network = modules[0]
        if any(p.dtype != torch.float32 for p in network.parameters() if p.requires_grad):
            raise UserError("--train_dtype bf16 does not go with DeepSpeed; --shard takes it")
        accelerator = self.accelerator
        low = accelerator.mixed_precision == "bf16"
        accelerator.native_amp = low  # as in other runs: asked by what wraps the forward pass
        network = accelerator.prepare_model(network)
        plugin: Any = accelerator.state.deepspeed_plugin
        config = plugin.deepspeed_config
        config.update(self._settings)
        config["zero_optimization"].update(self.zero_settings)
        config["bf16"] = {"enabled": False}
        try:
            self.engine, wrapped = accelerator.prepare(network, optimizer)
        finally:
            config["bf16"] = {"enabled": low}  # where accelerate looks the precision up
        if self._resumed is not None:
            self._load(self._resumed)
        return [self.engine], wrapped

    def clip(self, params: Sequence[nn.Parameter], max_norm: float) -> torch.Tensor:
        """The gradients' norm over all processes before the engine clipped them; infinite where
        one is not finite, and then no weight has moved."""
        found = self.engine.get_global_grad_norm()
        return torch.as_tensor(found, dtype=torch.float32, device=self.accelerator.device)

    def state(self, optimizer: torch.optim.Optimizer) -> Iterable[torch.Tensor]:
        """What this process keeps of the optimizer; nothing before there is an engine."""
        if self.engine is None:
            return
        for state in self.engine.optimizer.optimizer.state.values():
            yield from (value for value in state.values() if isinstance(value, torch.Tensor))

    def anywhere(self, names: list[str]) -> list[str]:
        """What is wrong on this process, or that something is on another: a collective."""
        number = torch.tensor(float(bool(names)), device=self.accelerator.device)
        found = self.accelerator.reduce(number, "sum").item() > 0  # pyright: ignore
        return names or (["another process's part"] if found else [])

    # -- checkpoints --------------------------------------------------------------------------

    def check_resume(self, folder: Path) -> None:
        """See `Replicas`: as many processes, and the same stage."""
        made, now = made_by(folder), self._made_by
        if made == now:
            return
        if made is None:
            super().check_resume(folder)  # one of --shard's
        then = "without DeepSpeed" if made is None else by_zero(made)
        raise UserError(f"{folder} was made {then}, and this run is {by_zero(now)}: {AS_IT_WAS}")

    @property
    def _made_by(self) -> dict[str, int]:
        plugin: Any = self.accelerator.state.deepspeed_plugin
        return {"stage": plugin.zero_stage, "processes": self.accelerator.num_processes}

    def write(self, folder: Path, learned: Learned, rest: Callable[[Path], None]) -> None:
        """Every process writes its part; the first one writes the rest and gives the name."""

        def others(inside: Path) -> None:
            self.write_weights(inside, learned)
            text = json.dumps(self._made_by)
            (inside / ZERO / MADE_BY).write_text(text, encoding="utf-8")
            rest(inside)

        self.write_together(folder, lambda inside: self.write_own(inside, learned), others)

    def write_own(self, folder: Path, learned: Learned) -> list[Path]:
        """Writes this process's files, and returns which they are: a collective."""
        self.engine.save_checkpoint(
            str(folder / ZERO), tag=_TAG, save_latest=False, exclude_frozen_parameters=True
        )
        mine = f"*zero_pp_rank_{self.accelerator.process_index}_*.pt"
        return sorted((folder / ZERO / _TAG).glob(mine))

    def read(self, folder: Path, learned: Learned) -> None:
        """Puts back weights and average; the optimizer follows when there is an engine."""
        self.read_weights(folder, learned)
        self._resumed = folder

    def _load(self, folder: Path) -> None:
        """Reads this process's part of a checkpoint.

        Raises:
            UserError: it is damaged.
        """
        with checkpoint.reading(folder):
            path, _ = self.engine.load_checkpoint(
                str(folder / ZERO), tag=_TAG, load_module_strict=False
            )
        if path is None:
            raise UserError(f"{folder / ZERO} is no checkpoint of DeepSpeed's")
        groups = {"the optimizer's state": self.state(self.engine.optimizer)}
        if broken := self.anywhere(finite.not_finite(groups)):
            raise checkpoint.damaged(folder, f"NaN or infinite numbers in {', '.join(broken)}")


class ZeroThree(Zero):
    """The same where each process has a part of every weight.

    DeepSpeed's hooks gather the weights of a layer when its turn comes. What is averaged, checked
    and swapped for the average are the parts.
    """

    sharded = True
    # A weight that stays gathered would not see the average in its part.
    zero_settings: ClassVar[Mapping[str, object]] = {"stage3_param_persistence_threshold": 0}

    def __init__(self, accelerator: Any, optim: OptimArgs) -> None:
        super().__init__(accelerator, optim)
        # Or transformers and diffusers would deal out every model that they read, text encoders
        # too, whatever accelerate's zero3_init_flag says.
        import_module("transformers.integrations").unset_hf_deepspeed_config()
        self._shared: list[Any] = []  # every weight, trained or not
        self._trained: list[tuple[Any, nn.Parameter]] = []  # a weight, and this process's part

    # -- the weights --------------------------------------------------------------------------

    @property
    def home(self) -> torch.device:
        """The CPU: a weight at a time goes to the device, and its part stays there."""
        return torch.device("cpu")

    def spread(
        self, modules: Sequence[nn.Module], groups: list[dict[str, Any]]
    ) -> list[nn.Parameter]:
        """See `Replicas`."""
        config = {
            "train_micro_batch_size_per_gpu": 1,
            "zero_optimization": {"stage": 3, **self.zero_settings},
        }
        for module in modules:
            import_module("deepspeed").zero.Init(module=module, config_dict_or_path=config)
            for one in module.modules():
                for name, buffer in one.named_buffers(recurse=False):
                    one.register_buffer(
                        name,
                        buffer.to(self.accelerator.device),
                        persistent=name not in one._non_persistent_buffers_set,
                    )
            self._shared += module.parameters()
        for group in groups:
            self._trained += [(one, nn.Parameter(one.ds_tensor)) for one in group["params"]]
        return [part for _, part in self._trained]

    def _find_parts(self) -> None:
        """The parts, where the engine has moved them to."""
        for one, part in self._trained:
            part.data = one.ds_tensor.data

    def whole(self, network: nn.Module, *, frozen: bool) -> dict[str, torch.Tensor]:
        """See `Replicas`; on the CPU, and one weight at a time on the device."""
        main, found = self.accelerator.is_main_process, dict[str, torch.Tensor]()
        own = dict(network.named_parameters())
        for name, value in network.state_dict(keep_vars=True).items():
            if not (frozen or (name in own and value.requires_grad)):
                continue
            with _gathered([value] if name in own else []):
                if main:
                    found[name] = value.detach().to("cpu", copy=True)
        return found

    @contextmanager
    def gathered(self) -> Iterator[None]:
        """All weights on every process."""
        with _gathered(self._shared):
            for one in self._shared:
                one.ds_active_sub_modules.add(_HELD)  # or a layer's hook lets go of its weights
            try:
                yield
            finally:
                for one in self._shared:
                    one.ds_active_sub_modules.discard(_HELD)

    # -- training and checkpoints -------------------------------------------------------------

    def prepare(
        self, modules: Sequence[nn.Module], optimizer: torch.optim.Optimizer, passes: int = 1
    ) -> tuple[list[nn.Module], Any]:
        """See `Zero`."""
        prepared = super().prepare(modules, optimizer, passes)
        self._find_parts()
        return prepared

    def write_weights(self, folder: Path, learned: Learned) -> None:
        """Nothing but how far the average is: the weights are in the processes' parts."""
        learned.averaged.save_progress(folder)

    def write_own(self, folder: Path, learned: Learned) -> list[Path]:
        """See `Zero`; and the part of the average."""
        shadows = {str(i): value for i, value in enumerate(learned.averaged.shadows())}
        if shadows:
            tensors.save(self._average(folder), shadows)
        return [*super().write_own(folder, learned), *([self._average(folder)] if shadows else [])]

    def read_weights(self, folder: Path, learned: Learned) -> None:
        """The average alone; weights come with the optimizer."""
        learned.averaged.restore_progress(folder)
        if shadows := learned.averaged.shadows():
            with checkpoint.reading(folder):
                saved = safetensors_torch.load_file(self._average(folder))
                for i, shadow in enumerate(shadows):
                    shadow.copy_(saved[str(i)])

    def _average(self, folder: Path) -> Path:
        return folder / ZERO / f"average_{self.accelerator.process_index}.safetensors"


_HELD = -1  # DeepSpeed counts layers from 0


def _gathered(weights: list[Any]) -> AbstractContextManager[None]:
    if not weights:
        return nullcontext()
    return import_module("deepspeed").zero.GatheredParameters(weights)


def _is_set(name: str) -> bool:
    return os.environ.get(name, "").lower() in ("1", "true")
