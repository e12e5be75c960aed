"""The steps of `python -m dojo.bench check` that need no training: numbers against other numbers.

Every step takes a `Report`, which keeps what it finds, and a `Place`. Bounds are loose enough for
any GPU: they catch what is wrong, not what rounds otherwise.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

from dojo import doctor
from dojo.bench import models
from dojo.finetune import lora
from dojo.finetune.offload import Storage, in_blocks
from dojo.lazy import F, nn, torch
from dojo.models import family, opening
from dojo.models.precisions import dtype_of
from dojo.models.quantised import pack, quantise, unpack

if TYPE_CHECKING:
    from torch import Tensor

    from dojo.bench.report import Place, Report
    from dojo.models.quantised import Precision

SEED = 0
# Relative errors of a product of two normal matrices against float64, and of a network's
# prediction against float32: rounding alone stays well below.
PRODUCTS = {"fp32": 1e-5, "tf32": 3e-3, "bf16": 1e-2, "fp16": 2e-3}
NETWORKS = {"bf16": 0.05, "fp16": 0.01}
QUANTISED: dict[Precision, float] = {
    "int8": 0.02,
    "fp8": 0.05,
    "nf4": 0.08,
}  # of the pocket model's velocity, against its own dtype
SAME_KERNELS = 1e-3  # between the GPU's and the CPU's packed weight

# Heads, queries, keys and width of a head: [name, ...]. SD3.5-Medium has 256 + 77 tokens of text.
SHAPES = (
    ("SD3.5-Medium 1024 px", 24, 4096 + 333, 4096 + 333, 64),
    ("SDXL 1024 px, self", 10, 4096, 4096, 64),
    ("SDXL 1024 px, text", 10, 4096, 77, 64),
    ("SD1.5 512 px, self", 8, 4096, 4096, 40),
    ("SD1.5 512 px, deep", 8, 64, 64, 160),
)
COMPARED = 4  # heads that the plain form attends with: it keeps every weight, and heads are apart
POCKET_SHAPES = (("pocket", 6, 64 + 48, 64 + 48, 32), ("pocket, text", 4, 64, 24, 16))
BACKENDS = ("flash", "efficient", "cudnn")
_KERNELS = {
    "flash": "FLASH_ATTENTION",
    "efficient": "EFFICIENT_ATTENTION",
    "cudnn": "CUDNN_ATTENTION",
    "math": "MATH",
}


def environment(report: Report, place: Place) -> None:
    """What is installed, and what is known to be wrong with it."""
    found = doctor.examine()
    report.note("environment", found)
    for remark in found["remarks"]:
        report.remark(remark)


# -- precision --------------------------------------------------------------------------------


def precision(report: Report, place: Place) -> None:
    """Products and whole networks in every precision, against a better one."""
    _products(report, place)
    for name in models.POCKETS:
        _network(report, place, name)
    _timestep(report, place)


def _products(report: Report, place: Place) -> None:
    size = 4096 if place.on_gpu else 256
    draws = torch.Generator().manual_seed(SEED)
    left, right = (torch.randn(size, size, generator=draws).to(place.device) for _ in range(2))
    exact = left.double() @ right.double()
    errors: dict[str, float] = {}
    for name, limit in PRODUCTS.items():
        if name == "tf32" and not place.on_gpu:
            report.skip("tf32: only GPUs have it")
            continue
        dtype = torch.float32 if name == "tf32" else dtype_of(name)
        a, b = left.to(dtype), right.to(dtype)
        with _tf32(allowed=name == "tf32"):
            errors[name] = distance(a @ b, exact)
            report.below(f"a product in {name} is right", errors[name], limit)
            if place.on_gpu:
                seconds = _seconds(lambda a=a, b=b: a @ b, place)
                report.note(f"{name}, TFLOP/s", round(2 * size**3 / seconds / 1e12, 1))
    if "tf32" in errors:
        better = f"{errors['fp32']:.2g} and {errors['tf32']:.2g}"
        report.claim(
            "without --allow_tf32 float32 is float32", better, errors["fp32"] < errors["tf32"] / 10
        )
    _convolution(report, place, draws)


def _convolution(report: Report, place: Place, draws: torch.Generator) -> None:
    """Convolutions have a flag of their own, which torch leaves on: the autoencoder is of them."""
    pictures, kernel = (
        torch.randn(*shape, generator=draws).to(place.device)
        for shape in ((1, 256, 32, 32), (64, 256, 3, 3))
    )
    exact = F.conv2d(pictures.double(), kernel.double())
    with _tf32(allowed=False):
        error = distance(F.conv2d(pictures, kernel), exact)
    report.below("a convolution in fp32 is right", error, PRODUCTS["fp32"])


@contextmanager
def _tf32(*, allowed: bool) -> Iterator[None]:
    """As `--allow_tf32` does."""
    places: tuple[Any, ...] = (torch.backends.cuda.matmul, torch.backends.cudnn)
    before = [place.allow_tf32 for place in places]
    for place in places:
        place.allow_tf32 = allowed
    try:
        yield
    finally:
        for place, was in zip(places, before, strict=True):
            place.allow_tf32 = was


def _network(report: Report, place: Place, name: str) -> None:
    """A pocket model's prediction in half precision against float32."""
    exact = prediction(place, name, torch.float32)
    for kind, limit in NETWORKS.items():
        if kind == "fp16" and not place.on_gpu:
            continue
        found = prediction(place, name, dtype_of(kind))
        report.below(f"{name} predicts in {kind} as in fp32", distance(found, exact), limit)


def prediction(
    place: Place,
    name: str,
    dtype: torch.dtype,
    change: Callable[[nn.Module], object] = lambda network: None,
) -> Tensor:
    """What a pocket model says of some noise: float32, on the device.

    Args:
        change: what is done to the network before.
    """
    model = opened(name)
    network = model.load_network(dtype, place.device)
    change(network)
    noisy, level, conditions = inputs(model, place.device, dtype)
    with torch.no_grad():
        return model.predict(network, noisy, level, conditions, dtype)


def opened(name: str) -> family.Model:
    """A pocket model, opened."""
    path = str(models.pocket(name))
    door = opening.family_of(family.ModelArgs(pretrained_model_name_or_path=path))
    more = {"max_sequence_length": 24} if models.has_option(name, "max_sequence_length") else {}
    return door.open_model(door.ModelArgs(pretrained_model_name_or_path=path, **more))


def inputs(
    model: family.Model, device: torch.device, dtype: torch.dtype, rows: int = 2
) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """Noise, levels and made-up embeddings, the same for every device and precision."""
    size = model.native_size
    noisy, level, conditions = model.meta_inputs(rows, model.latent_shape(size, size), dtype)
    draws = torch.Generator().manual_seed(SEED)

    def drawn(like: Tensor) -> Tensor:
        return torch.randn(like.shape, generator=draws).to(device, like.dtype)

    told = {
        key: torch.full(value.shape, float(size), device=device)
        if key == "time_ids"
        else drawn(value)
        for key, value in conditions.items()
    }
    uniform = torch.linspace(0.3, 0.7, rows)
    levels = model.objective((size, size)).level(uniform).to(device, level.dtype)
    return drawn(noisy), levels, told


def _timestep(report: Report, place: Place) -> None:
    """The timestep reaches its embedding in float32 whatever the network computes in."""
    seen: list[torch.dtype] = []

    def watch(network: nn.Module) -> None:
        for module in network.modules():
            if type(module).__name__ == "Timesteps":
                module.register_forward_pre_hook(lambda _, args: seen.append(args[0].dtype))

    prediction(place, "pocket", torch.bfloat16, watch)
    whole = all(dtype in (torch.float32, torch.int64) for dtype in seen) and bool(seen)
    report.claim("a bf16 network reads its timestep in float32", ", ".join(map(str, seen)), whole)


def distance(found: Tensor, exact: Tensor) -> float:
    """Relative L2 distance, in float64."""
    exact = exact.double()
    return float((found.double() - exact).norm() / exact.norm())


def _seconds(act: Callable[[], object], place: Place, times: int = 10) -> float:
    """Of one call, after a first one that does not count."""
    act()
    _wait(place)
    started = time.perf_counter()
    for _ in range(times):
        act()
    _wait(place)
    return (time.perf_counter() - started) / times


def _wait(place: Place) -> None:
    if place.on_gpu:
        torch.cuda.synchronize(place.device)


# -- attention --------------------------------------------------------------------------------


def attention(report: Report, place: Place) -> None:
    """Every fused backend, forward and backward, against the plain form in float32."""
    dtype = torch.bfloat16 if place.on_gpu else torch.float32
    for name, heads, queries, keys, width in SHAPES if place.on_gpu else POCKET_SHAPES:
        draws = torch.Generator().manual_seed(SEED)
        parts = [
            torch.randn(1, heads, tokens, width, generator=draws).to(place.device)
            for tokens in (queries, keys, keys)
        ]
        few = [part[:, :COMPARED] for part in parts]
        exact = _attended(few, torch.float32, "math")
        worked = [
            backend for backend in BACKENDS if _backend(report, place, name, backend, parts, exact)
        ]
        report.claim(f"{name}: a fused backend works", ", ".join(worked) or "none", bool(worked))
        query, key, value = (part.to(dtype) for part in parts)
        choice = torch._fused_sdp_choice(query, key, value)
        report.note(f"{name}: torch's own choice", nn.attention.SDPBackend(choice).name)


def _backend(
    report: Report, place: Place, shape: str, backend: str, parts: list[Tensor], exact: list[Tensor]
) -> bool:
    """Whether a backend takes a shape; what it makes of it is compared."""
    dtype = torch.bfloat16 if place.on_gpu else torch.float32
    try:
        found = _attended(parts, dtype, backend)
    except RuntimeError as error:
        report.note(f"{shape}: {backend}", f"does not take it: {str(error).splitlines()[0]}")
        return False
    few = [one[:, :COMPARED] for one in found]
    furthest = max(distance(a, b) for a, b in zip(few, exact, strict=True))
    limit = 0.02 if place.on_gpu else 1e-4
    report.below(f"{shape}: {backend} attends and derives as plain float32", furthest, limit)
    seconds = _seconds(lambda: _attended(parts, dtype, backend), place, 5)
    report.note(f"{shape}: {backend}, ms forward and backward", round(1000 * seconds, 3))
    return True


def _attended(parts: list[Tensor], dtype: torch.dtype, backend: str) -> list[Tensor]:
    """The output of attention and the gradients of its inputs."""
    query, key, value = (part.to(dtype).requires_grad_() for part in parts)
    one = getattr(nn.attention.SDPBackend, _KERNELS[backend])
    with nn.attention.sdpa_kernel(one):
        output = F.scaled_dot_product_attention(query, key, value)
        gradients = torch.autograd.grad(output.square().sum(), (query, key, value))
    return [output.detach(), *gradients]


# -- quantised weights, weights in CPU memory --------------------------------------------------


def quantised(report: Report, place: Place) -> None:
    """Packed weights on the GPU against the CPU's, and the pocket model with them."""
    exact = prediction(place, "pocket", torch.bfloat16)
    for kind, limit in QUANTISED.items():
        if kind == "nf4" and find_spec("bitsandbytes") is None:
            report.skip('nf4: bitsandbytes is missing: pip install -e ".[bitsandbytes]"')
            continue
        if place.on_gpu:
            _kernels(report, place, kind)
        found = prediction(
            *(place, "pocket", torch.bfloat16),
            lambda net, kind=kind: quantise(net, kind, in_blocks(net)),
        )
        gap = distance(found, exact)
        report.below(f"the pocket model in {kind} predicts as in bf16", gap, limit)


def _kernels(report: Report, place: Place, kind: Precision) -> None:
    """One weight, packed and unpacked on either device."""
    draws = torch.Generator().manual_seed(SEED)
    weight = torch.randn(512, 512, generator=draws) / 512**0.5
    made: dict[str, Tensor] = {}
    for device in (torch.device("cpu"), place.device):
        packed = pack(weight.to(device), kind)
        made[device.type] = unpack(packed, kind, weight.shape, torch.float32).cpu()
    gap = distance(made["cuda"], made["cpu"])
    report.below(f"a weight in {kind} is packed as on the CPU", gap, SAME_KERNELS)
    report.note(f"{kind}: distance of a weight from float32", distance(made["cuda"], weight))


def offload(report: Report, place: Place) -> None:
    """The gradients of a network whose blocks lie in CPU memory, to the bit."""
    away = Storage(blocks_on_cpu=2)
    for checkpointing in (False, True):
        here = _gradients(place, lambda network: None, checkpointing)
        there = _gradients(place, lambda net: away.prepare(net, place.device), checkpointing)
        same = all(torch.equal(a, b) for a, b in zip(here, there, strict=True))
        how = "with" if checkpointing else "without"
        report.claim(
            f"gradients with blocks in CPU memory, {how} checkpointing: equal to the bit",
            f"{len(here)} gradients",
            same and len(here) > 0,
        )


def _gradients(
    place: Place, change: Callable[[nn.Module], object], checkpointing: bool
) -> list[Tensor]:
    """Of the pocket model's LoRA.

    Args:
        change: what is done to the network before.
    """
    dtype = torch.bfloat16 if place.on_gpu else torch.float32
    model = opened("pocket")
    network = model.load_network(dtype, place.device)
    change(network)
    torch.manual_seed(SEED)
    params = lora.add(network, lora.LoraArgs(rank=4))
    for param in params:  # B is zero at first, and so would A's gradient be
        nn.init.normal_(param, std=0.02)
    if checkpointing:
        network.train()
        network.enable_gradient_checkpointing()
    noisy, level, conditions = inputs(model, place.device, dtype)
    model.predict(network, noisy, level, conditions, dtype).square().mean().backward()
    return [param.grad for param in params if param.grad is not None]
