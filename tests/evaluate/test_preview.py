"""Previews: they change nothing, show where a drawing is heading, and fit every autoencoder."""

from __future__ import annotations

import json
import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import diffusers
import pytest
import torch
from diffusers import AutoencoderTiny
from PIL import Image
from torch import Tensor
from torchvision.transforms.functional import pil_to_tensor

import train_grpo_sd3
from dojo.cli import UserError
from dojo.evaluate import __main__ as command
from dojo.evaluate import drawing, preview
from dojo.models import opening
from dojo.models.family import Model, ModelArgs
from tests.conftest import ROOT, rl_flags
from tests.evaluate import test_validation as validation
from tests.scripts.runs import in_process

CPU = torch.device("cpu")
micro_sd3 = validation.micro_sd3


def opened(name: str) -> tuple[Model, Any]:
    folder = ROOT / "models" / f"pocket-{name}"
    model = opening.open_model(ModelArgs(pretrained_model_name_or_path=str(folder)))
    return model, model.load_vae(CPU)


def tiny_autoencoder(folder: Path, channels: int = 16) -> Path:
    """Of the same shape as TAESD3, with four numbers in every layer."""
    torch.manual_seed(0)
    blocks: Any = {"encoder_block_out_channels": (4, 4, 4, 4), "num_encoder_blocks": (1, 1, 1, 1)}
    blocks |= {"decoder_block_out_channels": (4, 4, 4, 4), "num_decoder_blocks": (1, 1, 1, 1)}
    AutoencoderTiny(latent_channels=channels, **blocks).save_pretrained(folder)
    return folder


# -- what is drawn stays as it is ---------------------------------------------------------------


@pytest.mark.parametrize("how", ["linear", "tiny"])
def test_a_preview_changes_neither_the_pictures_nor_random_numbers(
    micro_sd3: Path, tmp_path: Path, how: str
) -> None:
    config, network = validation.model_of(micro_sd3)
    tiny = str(tiny_autoencoder(tmp_path / "tiny")) if how == "tiny" else None
    options: dict[str, Any] = {"validation_inference_steps": 5}
    found: list[tuple[dict[str, bytes], Tensor]] = []
    for name, more in (("without", {}), ("with", {"preview_steps": 2, "preview_vae": tiny})):
        args = validation.args_of("a star", **options, **more)
        run = validation.start(tmp_path / name)
        torch.manual_seed(1)
        validation.validator(run, config, network, args)()
        run.finish()
        pictures = {file: bytes(image.tobytes()) for file, image in drawn(tmp_path / name).items()}
        found.append((pictures, torch.get_rng_state()))
    assert found[0][0] == found[1][0]
    assert torch.equal(found[0][1], found[1][1])
    assert not (tmp_path / "without" / preview.FILE).exists()
    with Image.open(tmp_path / "with" / preview.FILE) as shown:
        assert shown.size == (256, 256)
    assert not list((tmp_path / "with").glob("*.partial"))
    listed = (tmp_path / "with" / "manifest.jsonl").read_text()
    assert listed.count(preview.FILE) == 1


def drawn(folder: Path) -> dict[str, Image.Image]:
    return validation.drawn(folder)


def test_evaluations_of_rewards_show_theirs_too(tmp_path: Path, tiny_sd3: Path) -> None:
    flags = [*rl_flags(tmp_path, tiny_sd3), "--preview_steps", "1", "--max_train_steps", "2"]
    in_process(train_grpo_sd3, flags)
    with Image.open(tmp_path / "run" / preview.FILE) as shown:
        assert max(shown.size) == 256
    record = json.loads((tmp_path / "run" / "args.json").read_text())
    assert record["args"]["evaluation"]["preview_steps"] == 1


# -- where a drawing is heading -----------------------------------------------------------------


@pytest.mark.parametrize(
    "name",
    [
        *("FlowMatchEulerDiscreteScheduler", "DDIMScheduler", "PNDMScheduler"),
        *("EulerDiscreteScheduler", "DPMSolverMultistepScheduler", "HeunDiscreteScheduler"),
    ],
)
def test_every_preview_of_a_network_that_knows_the_picture_is_that_picture(name: str) -> None:
    whole = {"timestep_spacing": "leading"} if name[:4] in ("Eule", "Heun") else {}
    scheduler = getattr(diffusers, name)(**whole)  # timesteps that are in the tables
    clean = torch.linspace(-1, 1, 4 * 4 * 4).view(4, 4, 4)
    seen: list[Tensor] = []

    class Kept(preview.Preview):
        def __call__(self, scheduler: Any, step: int, latents: Tensor) -> None:
            self.colours = lambda heading: seen.append(heading) or torch.zeros(3, 4, 4)
            super().__call__(scheduler, step, latents)

    made: Any = None  # the scheduler that draws, once it is known

    def predict(latents: Tensor, timestep: Tensor) -> Tensor:
        a, s = shares(made, float(timestep[0]))
        plain = latents / scaling(made, float(timestep[0]))  # Euler hands over scaled ones
        noise = (plain - a * clean) / s
        return noise - clean if "Flow" in name else noise

    looker = Kept(Path("/dev/null"), 1, lambda latents: latents)

    def look(scheduler: Any, step: int, latents: Tensor) -> None:
        looker(scheduler, step, latents)

    kind = type(scheduler)
    settings, original = scheduler.config, kind.from_config

    class Watched(kind):
        @classmethod
        def from_config(cls, config: Any, **more: Any) -> Any:
            nonlocal made
            made = original(config, **more)
            return made

    scheduler.__class__ = Watched
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(preview, "write", lambda path, colours: None)
        drawing.sample(
            *(predict, (4, 4, 4), [0], scheduler, 8),
            dtype=torch.float32,
            device=CPU,
            look=look,
        )
    assert settings is not None
    # The first has no latents before it; a step over no distance says nothing.
    told = [one for i, one in enumerate(seen) if i > 0 and apart(made, i)]
    assert len(told) >= 4
    for heading in told:  # PNDM's steps are of another kind: about
        torch.testing.assert_close(heading, clean, rtol=0, atol=6e-2 if "PNDM" in name else 1e-3)


@pytest.mark.parametrize(
    ("name", "options", "draws"),
    [
        ("DDPMScheduler", {}, True),
        ("EulerAncestralDiscreteScheduler", {}, True),
        ("DPMSolverMultistepScheduler", {"algorithm_type": "sde-dpmsolver++"}, True),
        ("FlowMatchEulerDiscreteScheduler", {"stochastic_sampling": True}, True),
        ("DPMSolverMultistepScheduler", {}, False),
        ("FlowMatchEulerDiscreteScheduler", {}, False),
        ("DDIMScheduler", {}, False),
    ],
)
def test_latents_with_noise_of_their_own_are_shown_as_they_are(
    name: str, options: dict[str, Any], draws: bool, tmp_path: Path
) -> None:
    scheduler = getattr(diffusers, name)(**options)
    scheduler.set_timesteps(8)
    shown: list[Tensor] = []
    looker = preview.Preview(
        tmp_path / "preview.png", 1, lambda latents: shown.append(latents) or torch.zeros(3, 4, 4)
    )
    given = [torch.randn(1, 4, 4, 4) for _ in range(3)]
    for step, latents in enumerate(given):
        looker(scheduler, step, latents)
    as_they_are = [torch.equal(a, b[0]) for a, b in zip(shown, given, strict=True)]
    assert as_they_are == [True, draws, draws]


def shares(scheduler: Any, timestep: float) -> tuple[float, float]:
    """What the latents at a timestep are made of, by the schedulers' own tables."""
    if scheduler.config.get("prediction_type") is None:
        return 1 - timestep / 1000, timestep / 1000
    abar = float(scheduler.alphas_cumprod[int(timestep)])
    if scheduler.init_noise_sigma > 1:
        return 1.0, math.sqrt((1 - abar) / abar)
    return math.sqrt(abar), math.sqrt(1 - abar)


def scaling(scheduler: Any, timestep: float) -> float:
    """What the scheduler multiplies latents with before the network sees them."""
    if scheduler.config.get("prediction_type") is None or scheduler.init_noise_sigma == 1:
        return 1.0
    return 1 / math.sqrt(shares(scheduler, timestep)[1] ** 2 + 1)


def apart(scheduler: Any, step: int) -> bool:
    (a, s), (a_now, s_now) = preview.level(scheduler, step), preview.level(scheduler, step + 1)
    return abs(s * a_now - s_now * a) > 1e-4


def test_two_latents_of_a_path_have_one_picture_in_common() -> None:
    clean, noise = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    was, now = (0.3, 0.9), (0.8, 0.4)
    before, after = was[0] * clean + was[1] * noise, now[0] * clean + now[1] * noise
    torch.testing.assert_close(preview.heading(before, after, was, now), clean)
    assert preview.heading(before, after, was, was) is after


def test_steps_between_looks_are_not_shown(monkeypatch: pytest.MonkeyPatch) -> None:
    shown: list[Path] = []
    monkeypatch.setattr(preview, "write", lambda path, colours: shown.append(path))
    look = preview.Preview(Path("x.png"), 3, lambda latents: latents)
    config: Any = {"prediction_type": None}
    sigmas = torch.linspace(1, 0, 8)
    scheduler = SimpleNamespace(config=config, sigmas=sigmas, timesteps=1000 * sigmas[:-1])
    for step in range(7):
        look(scheduler, step, torch.zeros(2, 4, 2, 2))
    assert len(shown) == 2


# -- colours ------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "least"), [("sd15", 0.65), ("sd3", 0.8)])
def test_the_map_that_charts_give_shows_the_colours_of_pictures(name: str, least: float) -> None:
    model, vae = opened(name)
    factors = preview.Linear(model, vae).factors
    files = sorted((ROOT / "datas" / "pocket-hearts").glob("*.png"))[:8]
    pictures = [pil_to_tensor(Image.open(file).convert("RGB")) / 255 for file in files]
    latents, colours = preview.seen(model, vae, torch.stack(pictures))
    assert preview.explained(factors, latents, colours) > least
    wrong = preview.explained(factors.flip(0), latents, colours)
    assert wrong < least, "any map would do"


def test_the_fit_finds_a_map_that_is_linear() -> None:
    latents = torch.randn(3, 5, 4, 4, generator=torch.Generator().manual_seed(0))
    factors = torch.linspace(-1, 1, 6 * 3).view(6, 3)
    constant = torch.cat([latents, torch.ones(3, 1, 4, 4)], dim=1)
    colours = torch.einsum("nchw,cr->nrhw", constant, factors)
    torch.testing.assert_close(preview.fitted(latents, colours), factors, atol=1e-4, rtol=0)
    assert preview.explained(factors, latents, colours) == pytest.approx(1)


def test_a_tiny_autoencoder_of_another_kind_is_refused(tmp_path: Path) -> None:
    model, _ = opened("sd15")
    tiny_autoencoder(tmp_path / "tiny", channels=16)
    with pytest.raises(UserError, match=r"--preview_vae: .*16 channels; .* has 4"):
        preview.Tiny(str(tmp_path / "tiny"), model, CPU)
    with pytest.raises(UserError, match="--preview_vae"):
        preview.Tiny(str(tmp_path / "nothing"), model, CPU)


@pytest.mark.parametrize(
    ("wrong", "words"),
    [({"preview_steps": 0}, "--preview_steps"), ({"preview_vae": "x"}, "needs --preview_steps")],
)
def test_options_out_of_range_are_refused(wrong: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        validation.args_of("a star", **wrong)
    with pytest.raises(ValueError, match=words):
        train_grpo_sd3.rl.EvalArgs(**wrong)


def test_the_command_prints_the_map(capsys: pytest.CaptureFixture[str]) -> None:
    command.main(
        command.FitArgs(pretrained_model_name_or_path=str(ROOT / "models" / "pocket-sd15"))
    )
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 1 + 4 + 1 + 1
    assert "constant" in lines[-2]
    assert "explains 8" in lines[-1]
