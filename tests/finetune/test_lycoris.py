"""Claims about LoHa and LoKr files: read, drawn with, trained on, merged, at the strength that
LyCORIS trained them at."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from dojo.cli import UserError
from dojo.finetune import lora
from dojo.finetune.lora import formats, info, merging, reading, resizing
from dojo.finetune.lora.bases import Base
from dojo.finetune.lora.layers import Factors
from dojo.models.unet.sgm import Blocks
from tests.finetune import sdxl

State = dict[str, Tensor]
RANK, ALPHA = 3, 1.5
LINEAR = (
    "down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_q",
    "mid_block.attentions.0.transformer_blocks.1.ff.net.0.proj",
    "up_blocks.0.attentions.1.transformer_blocks.0.attn2.to_k",
)
CONVOLUTIONS = (
    *("down_blocks.1.resnets.0.conv1", "down_blocks.0.downsamplers.0.conv"),
    "down_blocks.1.resnets.0.conv_shortcut",
)


def draw(*shape: int) -> Tensor:
    return 0.5 * torch.randn(*shape)


def halves(size: int) -> tuple[int, int]:
    """A size as a small and a large factor, as LoKr takes it apart."""
    small = next(n for n in range(int(size**0.5), 0, -1) if size % n == 0)
    return small, size // small


def loha(weight: Tensor, *, core: bool) -> tuple[State, Tensor]:
    """Tensors and the product that LyCORIS' `HadaWeight` makes of them."""
    rows, columns, kernel = weight.shape[0], weight.shape[1], weight.shape[2:]
    if core and kernel.numel() > 1:
        state = {
            f"hada_{kind}": draw(RANK, size)
            for kind, size in (("w1_a", rows), ("w1_b", columns), ("w2_a", rows), ("w2_b", columns))
        }
        state |= {f"hada_t{i}": draw(RANK, RANK, *kernel) for i in (1, 2)}
        product = torch.ones(1)
        for i in (1, 2):
            chain = torch.tensordot(state[f"hada_t{i}"], state[f"hada_w{i}_b"], dims=([1], [0]))  # pyright: ignore
            product = product * torch.tensordot(state[f"hada_w{i}_a"].T, chain, dims=1).movedim(
                -1, 1
            )
        return state, product
    columns *= kernel.numel()
    state = {
        f"hada_{kind}": draw(*shape)
        for kind, shape in (
            *(("w1_a", (rows, RANK)), ("w1_b", (RANK, columns))),
            *(("w2_a", (rows, RANK)), ("w2_b", (RANK, columns))),
        )
    }
    first = state["hada_w1_a"] @ state["hada_w1_b"]
    return state, first * (state["hada_w2_a"] @ state["hada_w2_b"])


def lokr(weight: Tensor, *, first: bool, second: bool, core: bool = False) -> tuple[State, Tensor]:
    """Tensors and their Kronecker product; first, second: whether a factor is a whole matrix."""
    rows, columns, kernel = halves(weight.shape[0]), halves(weight.shape[1]), weight.shape[2:]
    state: State = {}
    if first:
        state["lokr_w1"] = small = draw(rows[0], columns[0])
    else:
        state |= {"lokr_w1_a": draw(rows[0], RANK), "lokr_w1_b": draw(RANK, columns[0])}
        small = state["lokr_w1_a"] @ state["lokr_w1_b"]
    if second:
        state["lokr_w2"] = draw(rows[1], columns[1], *kernel)
        large = state["lokr_w2"]
    elif core and kernel.numel() > 1:
        state |= {"lokr_w2_a": draw(RANK, rows[1]), "lokr_w2_b": draw(RANK, columns[1])}
        state["lokr_t2"] = draw(RANK, RANK, *kernel)
        chain = torch.tensordot(state["lokr_t2"], state["lokr_w2_b"], dims=([1], [0]))  # pyright: ignore
        large = torch.tensordot(state["lokr_w2_a"].T, chain, dims=1).movedim(-1, 1)
    else:
        state |= {
            "lokr_w2_a": draw(rows[1], RANK),
            "lokr_w2_b": draw(RANK, columns[1] * kernel.numel()),
        }
        large = (state["lokr_w2_a"] @ state["lokr_w2_b"]).reshape(rows[1], columns[1], *kernel)
    blocks = [torch.cat([value * large for value in row], dim=1) for row in small]
    return state, torch.cat(blocks)


Make = Callable[[Tensor], tuple[State, Tensor]]
METHODS: dict[str, tuple[Make, float]] = {
    "LoHa": (lambda w: loha(w, core=False), ALPHA / RANK),
    "LoHa with cores": (lambda w: loha(w, core=True), ALPHA / RANK),
    "LoKr": (lambda w: lokr(w, first=True, second=False), ALPHA / RANK),
    "LoKr of four": (lambda w: lokr(w, first=False, second=False), ALPHA / RANK),
    "LoKr with cores": (lambda w: lokr(w, first=True, second=False, core=True), ALPHA / RANK),
    "LoKr, the second whole": (lambda w: lokr(w, first=False, second=True), ALPHA / RANK),
    # LyCORIS' scale is 1 here, whatever alpha says.
    "LoKr, whole": (lambda w: lokr(w, first=True, second=True), 1.0),
}


def write(path: Path, method: str, *, sgm: bool = True) -> dict[str, Tensor]:
    """A file of LyCORIS for SDXL's UNet, and what it adds to which weight."""
    torch.manual_seed(5)
    make, scale = METHODS[method]
    unet, state, deltas = sdxl.unet(), {}, {}
    for name in (*LINEAR, *CONVOLUTIONS):
        layer: Any = unet.get_submodule(name)
        tensors_, product = make(layer.weight)
        own = Blocks().original(name) if sgm else name
        key = f"lora_unet_{own.replace('.', '_')}"
        state |= {f"{key}.{kind}": tensor.contiguous() for kind, tensor in tensors_.items()}
        state[f"{key}.alpha"] = torch.tensor(ALPHA)
        deltas[name] = scale * product.reshape(layer.weight.shape)
    save_file(state, path)
    return deltas


def output(unet: nn.Module) -> Tensor:
    return sdxl.outputs(sdxl.namespace({"unet": unet}))["unet"]


def changed(deltas: dict[str, Tensor], strength: float = 1.0) -> nn.Module:
    unet = sdxl.unet()
    for name, delta in deltas.items():
        layer: Any = unet.get_submodule(name)
        layer.weight.data += strength * delta
    return unet


def close(found: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(found, expected, rtol=0, atol=5e-5)


@pytest.mark.parametrize("method", METHODS)
def test_a_file_is_applied_once_at_alpha_over_rank(method: str, tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    deltas = write(path, method)
    expected = output(changed(deltas))
    assert (expected - output(sdxl.unet())).abs().max() > 1e-3
    models = sdxl.namespace({"unet": sdxl.unet()})
    assert lora.load(models, path, "mine") == len(load_file(path)) - len(deltas)
    close(output(models.unet), expected)


@pytest.mark.parametrize("method", ["LoHa", "LoKr", "LoKr, whole"])
def test_the_scale_at_drawing_is_of_the_whole_update(method: str, tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    deltas = write(path, method)
    models = sdxl.namespace({"unet": sdxl.unet()})
    lora.load(models, path, "mine")
    models.unet.set_adapters(["mine"], [0.25])
    close(output(models.unet), output(changed(deltas, 0.25)))


@pytest.mark.parametrize("method", METHODS)
def test_training_goes_on_with_what_the_file_holds(method: str, tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    deltas = write(path, method)
    args = lora.LoraArgs(init_lora_weights_path=str(path))
    start = lora.lycoris_start(args)
    assert start == path
    unet = sdxl.unet()
    params = lora.add_lycoris(path, unet, args, "unet")
    lora.start_from(args, unet)
    close(output(unet), output(changed(deltas)))
    assert sum(param.numel() for param in params) == sum(
        tensor.numel() for name, tensor in load_file(path).items() if not name.endswith("alpha")
    )
    assert all(param.dtype == torch.float32 and param.requires_grad for param in params)
    # One step, saved, restored to the bit, and loaded as a file.
    loss = forward(unet).square().mean()
    loss.backward()
    with torch.no_grad():
        for param in params:
            assert param.grad is not None
            assert param.grad.any()
            param -= 0.1 * param.grad
    expected = output(unet)
    assert (expected - output(changed(deltas))).abs().max() > 1e-5
    lora.save(tmp_path / "run", unet)
    other = sdxl.unet()
    lora.add_lycoris(path, other, args, "unet")
    lora.restore(tmp_path / "run", other)
    assert torch.equal(output(other), expected)
    models = sdxl.namespace({"unet": sdxl.unet()})
    lora.load(models, tmp_path / "run", "mine")
    assert torch.equal(output(models.unet), expected)
    with lora.disabled(unet):
        assert torch.equal(output(unet), output(sdxl.unet()))


def forward(unet: Any) -> Tensor:
    added = {"text_embeds": torch.ones(1, sdxl.POOLED), "time_ids": torch.ones(1, 6)}
    torch.manual_seed(0)
    return unet(
        torch.randn(1, 4, 8, 8),
        torch.tensor([100]),
        encoder_hidden_states=torch.randn(1, 5, sdxl.WIDTH),
        added_cond_kwargs=added,
    )[0]


@pytest.mark.parametrize("method", METHODS)
def test_merged_into_a_model_it_does_what_training_did(method: str, tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    deltas = write(path, method, sgm=False)
    base = tmp_path / "base"
    sdxl.unet().save_pretrained(base / "unet")
    merging.main(merging.Args(input=(str(path),), output=tmp_path / "out", base=str(base)))
    kind: Any = type(sdxl.unet())
    close(output(kind.from_pretrained(tmp_path / "out" / "unet")), output(changed(deltas)))


def test_resized_it_becomes_a_lora(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "x.safetensors"
    deltas = write(path, "LoHa")
    linear = {name: delta for name, delta in deltas.items() if name in LINEAR}
    state = {n: x for n, x in load_file(path).items() if "attn" in n or "_ff_" in n}
    save_file(state, path)
    target = tmp_path / "y.safetensors"
    resizing.main(resizing.Args(input=str(path), output=target, rank=64))
    models = sdxl.namespace({"unet": sdxl.unet()})
    lora.load(models, target, "mine")
    close(output(models.unet), output(changed(linear)))
    capsys.readouterr()
    info.main(info.Args(input=str(path)))
    said = capsys.readouterr().out
    assert "method: 3 x LoHa" in said
    assert "rank 3, alpha 1.5" in said


def one(method: str, **changes: Tensor | None) -> State:
    """A file of one linear layer, with tensors changed or taken out."""
    torch.manual_seed(5)
    layer: Any = sdxl.unet().get_submodule(LINEAR[0])
    parts: dict[str, Tensor | None] = {
        **METHODS[method][0](layer.weight)[0],
        "alpha": torch.tensor(ALPHA),
        **changes,
    }
    key = f"lora_unet_{LINEAR[0].replace('.', '_')}"
    return {f"{key}.{kind}": tensor for kind, tensor in parts.items() if tensor is not None}


REFUSED: dict[str, tuple[Callable[[], State], str]] = {
    "LoKr without alpha": (lambda: one("LoKr", alpha=None), "a LoKr without its alpha"),
    "LoHa without alpha": (lambda: one("LoHa", alpha=None), "a LoHa without its alpha"),
    "half": (lambda: one("LoHa", hada_w2_b=None), "half a LoHa"),
    "one core": (lambda: one("LoHa", hada_t1=torch.ones(3, 3, 3, 3)), "half a LoHa"),
    "core of w1": (lambda: one("LoKr", lokr_t1=torch.ones(1)), "a LoKr with lokr_t1, which peft"),
    "DoRA": (lambda: one("LoKr", dora_scale=torch.ones(16, 1)), "with a DoRA's norms"),
    "scalar": (lambda: one("LoHa", scalar=torch.ones(1)), "a scalar of its own"),
    "two ranks": (lambda: one("LoHa", hada_w2_b=torch.ones(5, 16)), "shapes that do not belong"),
    "NaN": (lambda: one("LoKr", lokr_w1=torch.full((4, 4), torch.nan)), "not finite"),
    "too large": (
        lambda: one("LoHa", hada_w1_a=torch.ones(32, RANK), hada_w2_a=torch.ones(32, RANK)),
        r"has another size in this model \(\[16, 16\], not \[32, 16\]\)",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_peft_cannot_hold_is_refused_by_name(case: str, tmp_path: Path) -> None:
    make, said = REFUSED[case]
    save_file({name: x.clone() for name, x in make().items()}, tmp_path / "x.safetensors")
    with pytest.raises(UserError, match=said):
        lora.load(sdxl.namespace({"unet": sdxl.unet()}), tmp_path / "x.safetensors", "mine")


def test_without_alpha_whole_factors_are_of_scale_one(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    deltas = write(path, "LoKr, whole")
    save_file({n: x for n, x in load_file(path).items() if not n.endswith("alpha")}, path)
    models = sdxl.namespace({"unet": sdxl.unet()})
    lora.load(models, path, "mine")
    close(output(models.unet), output(changed(deltas)))


def test_two_methods_in_one_part_are_refused_and_may_be_merged(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    deltas = write(path, "LoHa", sgm=False)
    factors = Factors(torch.ones(1, 16), torch.ones(16, 1), 0.1)
    other = "mid_block.attentions.0.transformer_blocks.0.attn1.to_q"
    formats.write(
        tmp_path / "y.safetensors", {"unet": {other: factors}}, "kohya", Base(family="sd1")
    )
    save_file({**load_file(path), **load_file(tmp_path / "y.safetensors")}, path)
    with pytest.raises(UserError, match=r"some layers of the unet by LoHa and some by LoRA.*merge"):
        lora.load(sdxl.namespace({"unet": sdxl.unet()}), path, "mine")
    deltas[other] = torch.full((16, 16), 0.1)
    base = tmp_path / "base"
    sdxl.unet().save_pretrained(base / "unet")
    merging.main(merging.Args(input=(str(path),), output=tmp_path / "out", base=str(base)))
    kind: Any = type(sdxl.unet())
    close(output(kind.from_pretrained(tmp_path / "out" / "unet")), output(changed(deltas)))


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"lora_format": "kohya"}, "--lora_format kohya: a LoHa or LoKr is saved"),
        ({"conv_rank": 2}, "--conv_rank: .* is a LoHa or LoKr"),
        ({"lora_dropout": 0.1}, "--lora_dropout: .* is a LoHa or LoKr"),
    ],
)
def test_options_of_a_lora_are_refused_with_it(
    options: dict[str, Any], said: str, tmp_path: Path
) -> None:
    path = tmp_path / "x.safetensors"
    write(path, "LoHa")
    args = lora.LoraArgs(init_lora_weights_path=str(path), **options)
    with pytest.raises(UserError, match=said):
        lora.add_lycoris(path, sdxl.unet(), args, "unet")


def test_files_in_original_and_in_diffusers_names_are_one(tmp_path: Path) -> None:
    write(tmp_path / "x.safetensors", "LoKr", sgm=True)
    write(tmp_path / "y.safetensors", "LoKr", sgm=False)
    first, second = (
        reading.read_any(tmp_path / f"{name}.safetensors").kin["unet"] for name in "xy"
    )
    assert first.keys() == second.keys()
