"""The stages that make pocket-kolors: pocket-sdxl's UNet, taught to hear a bilingual ChatGLM.

The autoencoder is pocket-sd15's, and the UNet begins as pocket-sdxl's. The text encoder is new: it
first learns to say what pocket-sdxl's attention makes of its own encoders, in English and in
Chinese, for which no UNet has to be trained; then both learn that pocket-kolors predicts what
pocket-sdxl does.
"""

from __future__ import annotations

import functools
import random
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from dojo import rng
from dojo.files import tensors
from dojo.lazy import F, diffusers, nn, no_grad, safetensors_torch, torch
from dojo.maths import ddpm
from dojo.models import kolors, loaded
from dojo.pocket import build_sdxl, chinese, models, scenes
from dojo.pocket.build_sd15 import MIN_SNR
from dojo.pocket.fitting import SEED, Args, encode, optimise

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence

    from diffusers import KolorsPipeline
    from torch import Tensor

BATCH = 64  # half of it whole pictures
MAPPED = 4000  # captions that the maps of texts are fitted on
NO_CAPTION = 0.1  # share of the samples
HEARD = 100  # batches of which is kept what the teacher's attentions were asked and answered,
QUERIES = 8  # of each picture so many places


# ---------------------------------------------------------------------------------------------
# The start


def directions(rows: Tensor, count: int) -> Tensor:
    """The map from `count` numbers to rows [..., D] that can say most of them: [D, count], its
    columns orthonormal (the first singular vectors; no mean is taken away)."""
    flat = rows.flatten(0, -2).double()
    return torch.linalg.eigh(flat.T @ flat).eigenvectors.flip(1)[:, :count].float()


def inherit_unet(unet: Any, teacher: Any, row_map: Tensor, pooled_map: Tensor) -> None:
    """Gives Kolors' UNet the weights of SDXL's: it then predicts the same for texts that the maps
    reach. The projection of the text has no counterpart and stays as it is.

    Args:
        row_map: [160, 40], which makes rows of SDXL's texts of what the projection says.
        pooled_map: [96, 48], the same for the pooled text.
    """
    width = pooled_map.shape[0]
    state = unet.state_dict()
    for name, weight in teacher.state_dict().items():
        if name == "add_embedding.linear_1.weight":
            weight = torch.cat([weight[:, :width] @ pooled_map, weight[:, width:]], dim=1)
        elif ".attn2.to_k." in name or ".attn2.to_v." in name:
            weight = weight @ row_map
        state[name].copy_(weight)
    unet.load_state_dict(state)


# ---------------------------------------------------------------------------------------------
# Texts


@dataclass(frozen=True)
class Text:
    """What the UNet hears of captions, of the padding no more than the batch needs."""

    rows: Tensor
    """[B, T, 48], T one more than the longest caption has tokens"""
    pooled: Tensor
    """[B, 48]"""
    bias: Tensor
    """[B, T], what is added to the attention to a row: the logarithm of how many it stands for"""

    @property
    def mask(self) -> Tensor:
        """The bias in the form in which the UNet of diffusers takes it, which is one of masks."""
        return 1 + self.bias / 10_000


def text_of(pipeline: Any, captions: Sequence[str]) -> Text:
    """The pipeline's `encode_prompt` with gradients, at a fraction of the work.

    A caption is padded to 256 tokens, and whatever stands in for padding says the same: it has one
    number and one position, and looks everywhere. A few rows with a greater weight say it as well.
    """
    asked = {"padding": "max_length", "max_length": kolors.TOKENS, "truncation": True}
    tokens = pipeline.tokenizer(list(captions), **asked, return_tensors="pt")
    words = tokens.attention_mask.bool()
    length = min(kolors.TOKENS, int(words.sum(1).max()) + 1)
    tokens = {name: rows[:, -length:].to(pipeline.unet.device) for name, rows in tokens.items()}
    shown = tokens.pop("attention_mask").bool()
    weight = (~words).sum(1).to(shown.device) / (~shown).sum(1).clamp(min=1)
    bias = weight.log()[:, None].where(~shown, 0.0)
    before = torch.ones(length, length, dtype=torch.bool, device=shown.device).tril()
    seen = (before & shown[:, None]) | ~shown[:, :, None]
    mask = bias[:, None].where(seen, -torch.inf)[:, None]
    with _weighing(pipeline.text_encoder):
        states = pipeline.text_encoder(
            **tokens,
            full_attention_mask=mask,
            output_hidden_states=True,
            use_cache=False,
            return_dict=True,
        ).hidden_states
    return Text(states[-2].transpose(0, 1), states[-1][-1], bias)


@contextmanager
def _weighing(encoder: Any) -> Iterator[None]:
    """For a while, a ChatGLM's masks are what is added to the attention, not what is left out."""
    cores = [layer.self_attention.core_attention for layer in encoder.encoder.layers]
    for core in cores:
        core.forward = _attend
    try:
        yield
    finally:
        for core in cores:
            del core.forward


def _attend(query: Tensor, key: Tensor, value: Tensor, mask: Tensor) -> Tensor:
    """Attention as ChatGLM's core has it: [T, B, heads, D] each -> [T, B, heads * D]."""
    rows = [one.permute(1, 2, 0, 3) for one in (query, key, value)]
    found = F.scaled_dot_product_attention(*rows, attn_mask=mask)
    return found.permute(2, 0, 1, 3).flatten(2)


class Listening:
    """What the attentions to the text of a UNet were asked and answered, at its last call."""

    def __init__(self, unet: nn.Module) -> None:
        self.heard: dict[str, tuple[Tensor, Tensor]] = {}
        self._hooks = [
            attention.register_forward_hook(functools.partial(self._hear, name))
            for name, attention in attentions(unet).items()
        ]

    def _hear(self, name: str, attention: Any, inputs: tuple[Any, ...], output: Any) -> None:
        self.heard[name] = (inputs[0], output)

    def end(self) -> None:
        """Listens no more."""
        for hook in self._hooks:
            hook.remove()


def attention_error(unet: Any, text: Text, heard: Mapping[str, tuple[Tensor, Tensor]]) -> Tensor:
    """How far a UNet's attentions are off that are asked about their own text what another's were
    asked about its: mean squared error as a share of the variance.

    Args:
        heard: questions and answers [B, queries, channels], by the attention's name.
    """
    rows, errors = unet.encoder_hid_proj(text.rows), []
    for name, attention in attentions(unet).items():
        asked, answered = heard[name]
        found = attention(asked, encoder_hidden_states=rows, attention_mask=text.bias[:, None])
        errors.append((found - answered).square().mean() / answered.var(dim=(0, 1)).mean())
    return torch.stack(errors).mean()


def attentions(unet: nn.Module) -> dict[str, Any]:
    """A UNet's attentions to the text, by name."""
    return {name: module for name, module in unet.named_modules() if name.endswith(".attn2")}


# ---------------------------------------------------------------------------------------------
# Timesteps


def same_signal(schedule: ddpm.Schedule, other: ddpm.Schedule) -> Tensor:
    """The timestep of another schedule that has as much signal, for each of a schedule's: float32
    [T], between two where none has the same, and the other's last where all have more."""
    own, theirs = (np.log(one.alphas_cumprod.numpy()) for one in (schedule, other))
    found = np.interp(-own, -theirs, np.arange(len(theirs)))
    return torch.from_numpy(found).float()


# ---------------------------------------------------------------------------------------------
# Training


def train_kolors(args: Args, sdxl_folder: Path) -> KolorsPipeline:
    """Kolors' text encoder and UNet, distilled from pocket-sdxl.

    Half of each batch are whole pictures, half are the views of `build_sdxl`; half of the captions
    are Chinese, and one in ten is none. Where the schedule has less signal than SDXL's ever has,
    the teacher knows nothing: there the noise itself is the target.
    """
    torch.manual_seed(SEED + 9)
    teacher = loaded.pipeline(sdxl_folder, flag="--models_dir").to(args.device)
    pipeline: Any = models.kolors_pipeline(args.work_dir / "kolors-tokenizer")
    vae: Any = loaded.network(diffusers.AutoencoderKL, sdxl_folder, "vae", flag="--models_dir")
    pipeline.register_modules(vae=vae)
    pipeline.to(args.device)
    schedule = ddpm.Schedule.of({**models.DDPM, **models.KOLORS})
    teacher_steps = same_signal(schedule, ddpm.Schedule.of(models.DDPM))
    known = int((teacher_steps < len(ddpm.Schedule.of(models.DDPM).alphas_cumprod) - 1).sum())

    @functools.cache
    def training_set() -> tuple[list[tuple[str, str]], dict[str, Tensor]]:
        """Captions in both languages; latents and time ids."""
        draw = random.Random(SEED + 9)
        captions, seen = [], []
        for i in range(args.kolors_scenes):
            spec = scenes.random_spec(draw, scenes.TASKS[i // 2 % len(scenes.TASKS)])
            view = build_sdxl.random_view(draw) if i % 2 else build_sdxl.WHOLE
            captions.append(chinese.both(spec))
            seen.append((view, scenes.realise(spec, draw)))
        path = args.work_dir / "kolors-latents.safetensors"
        if not path.is_file():
            pictures = np.stack([view.of(scene) for view, scene in seen])
            mean, std = encode(vae, pictures, args.device)
            time_ids = torch.tensor([view.time_ids for view, _ in seen], dtype=torch.float32)
            tensors.save(path, {"mean": mean, "std": std, "time_ids": time_ids})
        return captions, safetensors_torch.load_file(path)

    @no_grad
    def heard(captions: Sequence[str]) -> tuple[Tensor, Tensor]:
        """What the teacher hears: nothing of no caption."""
        ids = [
            tokenizer(list(captions), padding="max_length", return_tensors="pt").input_ids
            for tokenizer in (teacher.tokenizer, teacher.tokenizer_2)
        ]
        rows, pooled = build_sdxl.text_rows(
            teacher, (ids[0].to(args.device), ids[1].to(args.device))
        )
        spoken = torch.tensor([bool(caption) for caption in captions], device=args.device)
        return rows * spoken[:, None, None], pooled * spoken[:, None]

    english = [first for first, _ in training_set()[0][:MAPPED]]
    row_map, pooled_map = (
        directions(rows, count)
        for rows, count in zip(heard(english), (models.KOLORS_WIDTH, models.GLM_WIDTH), strict=True)
    )
    inherit_unet(pipeline.unet, teacher.unet, row_map, pooled_map)

    def batch(name: str, step: int) -> dict[str, Any]:
        """Noisy latents and all that is said about them, in both languages' words."""
        captions, kept = training_set()
        count, whole = len(captions), BATCH // 2
        pick = np.random.default_rng([SEED + 9, len(name), step])
        rows = 2 * pick.integers(count // 2, size=BATCH)
        rows[whole:] += 1  # the odd ones are views
        spoken, language = pick.random(BATCH) >= NO_CAPTION, pick.integers(2, size=BATCH)
        shape = (2, BATCH, *kept["mean"].shape[1:])
        noises = torch.randn(*shape, generator=rng.generator(SEED, name, step))
        clean = (kept["mean"][rows] + kept["std"][rows] * noises[0]) * vae.config.scaling_factor
        timestep = torch.from_numpy(pick.integers(len(teacher_steps), size=BATCH)).to(args.device)
        clean, noise = clean.to(args.device), noises[1].to(args.device)
        return {
            "captions": [
                captions[i] if some else ("", "") for i, some in zip(rows, spoken, strict=True)
            ],
            "language": language,
            "time_ids": kept["time_ids"][rows].to(args.device),
            "timestep": timestep,
            "noise": noise,
            "noisy": ddpm.add_noise(clean, noise, timestep, schedule),
        }

    @no_grad
    def taught(made: dict[str, Any]) -> tuple[Tensor, Tensor]:
        """The teacher's prediction, and its pooled text."""
        rows, pooled = heard([english for english, _ in made["captions"]])
        predicted = teacher.unet(
            made["noisy"],
            teacher_steps.to(args.device)[made["timestep"]],
            rows,
            added_cond_kwargs={"text_embeds": pooled, "time_ids": made["time_ids"]},
            return_dict=False,
        )[0]
        return predicted, pooled

    @functools.cache
    def told_and_heard() -> tuple[list[tuple[str, str]], dict[str, Tensor]]:
        """Captions, and what the teacher makes of them: `asked` and `answered` of each attention at
        some places, and the pooled text."""
        listening, captions = Listening(teacher.unet), []
        kept: dict[str, list[Tensor]] = {}
        for step in range(HEARD):
            made = batch("kolors-text", step)
            _, pooled = taught(made)
            captions += made["captions"]
            kept.setdefault("pooled", []).append(pooled)
            places = np.random.default_rng([SEED + 9, step]).random(QUERIES)
            for name, both in listening.heard.items():
                for kind, rows in zip(("asked", "answered"), both, strict=True):
                    chosen = (places * rows.shape[1]).astype(int)
                    kept.setdefault(f"{kind} {name}", []).append(rows[:, chosen])
        listening.end()
        return captions, {name: torch.cat(rows) for name, rows in kept.items()}

    def text_loss(step: int) -> Tensor:
        captions, kept = told_and_heard()
        pick = np.random.default_rng([SEED + 10, step])
        rows, language = pick.integers(len(captions), size=BATCH), pick.integers(2, size=BATCH)
        text = text_of(pipeline, [captions[i][k] for i, k in zip(rows, language, strict=True)])
        heard = {
            name: (kept[f"asked {name}"][rows], kept[f"answered {name}"][rows])
            for name in attentions(pipeline.unet)
        }
        pooled = kept["pooled"][rows]
        off = F.mse_loss(text.pooled @ pooled_map.T, pooled) / pooled.var(dim=0).mean()
        return attention_error(pipeline.unet, text, heard) + off

    projection = pipeline.unet.encoder_hid_proj
    pipeline.unet.requires_grad_(False)
    projection.requires_grad_(True)
    _fit("kolors-text", args, [pipeline.text_encoder, projection], text_loss, 2e-3, 1.0)
    pipeline.unet.requires_grad_(True)

    def loss_at(step: int) -> Tensor:
        made = batch("kolors", step)
        target, _ = taught(made)
        said = zip(made["captions"], made["language"], strict=True)
        text = text_of(pipeline, [both[one] for both, one in said])
        predicted = pipeline.unet(
            made["noisy"],
            made["timestep"],
            text.rows,
            encoder_attention_mask=text.mask,
            added_cond_kwargs={"text_embeds": text.pooled, "time_ids": made["time_ids"]},
            return_dict=False,
        )[0]
        beyond = (made["timestep"] >= known)[:, None, None, None]
        target = torch.where(beyond, made["noise"], target)
        snr = schedule.snr(made["timestep"])
        weight = snr.clamp(max=MIN_SNR) / snr
        return (weight * ddpm.squared_error(predicted, target)).mean()

    _fit("kolors", args, [pipeline.unet, pipeline.text_encoder], loss_at, 5e-4, 0.7)
    return pipeline


def _fit(
    name: str,
    args: Args,
    modules: Sequence[nn.Module],
    loss_at: Callable[[int], Tensor],
    learning_rate: float,
    decay: float,
) -> None:
    steps = args.kolors_text_steps if name == "kolors-text" else args.kolors_steps
    optimise(name, args, modules, loss_at, steps=steps, learning_rate=learning_rate, decay=decay)
