"""The object that watches a run: eval losses, pictures, CLIP scores, the contact sheet."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image

from dojo.bars import Bar
from dojo.evaluate import preview
from dojo.evaluate.args import Picture, ValidationArgs
from dojo.evaluate.clip import ClipScore
from dojo.evaluate.loss import eval_losses
from dojo.files.outputs import clear, own
from dojo.files.pictures import contact_sheet, to_pil
from dojo.inputs.pictures import Inputs
from dojo.lazy import late, no_grad, torch
from dojo.models import attention
from dojo.models.family import NoiseArgs
from dojo.run.checkpoint import write_file
from dojo.run.run import Run

if TYPE_CHECKING:
    from torch import Tensor, nn

    from dojo.run import residence
else:
    residence = late("dojo.run.residence")


class Validator:
    """The validations of one run; made once on every process.

    The pictures of all sizes are drawn with the saved scheduler, as a user of the result will.

    Args:
        network: the trained one.
        noise: the objective's options.
        size: height and width of training.
    Raises:
        UserError: see `ValidationArgs.check`.
    """

    def __init__(
        self,
        run: Run,
        inputs: Inputs,
        network: nn.Module,
        noise: NoiseArgs,
        args: ValidationArgs,
        size: tuple[int, int],
    ) -> None:
        model = inputs.model
        args.check(model)
        self.run, self.inputs, self.model = run, inputs, model
        # Past DDP: the processes need not have equally many pictures.
        self.network: Any = run.accelerator.unwrap_model(network)
        self.noise, self.args = noise, args
        self.objective = model.objective(size, noise)
        self.folder = run.output_dir / "validation"
        self.pictures = args.pictures(size)
        self.mine = range(len(self.pictures))[run.share["process"] :: run.share["num_processes"]]
        drawn = bool(self.pictures)
        self.preview = preview.of_run(
            args, run.output_dir, model, inputs.vae, main=run.main and drawn
        )
        self.clip: ClipScore | None = None
        if args.validation_clip_model and self.pictures:
            with run.accelerator.main_process_first():  # a download
                self.clip = ClipScore(args.validation_clip_model, run.device) if self.mine else None
        if self.pictures and run.main:
            write_prompts(self.folder, [asdict(picture) for picture in self.pictures])

    @property
    def metrics(self) -> list[str]:
        """The numbers that it writes into metrics.jsonl."""
        parts = [part.name for part in self.inputs.evaluation]
        names = ["eval_loss" if part == "eval" else f"{part}_eval_loss" for part in parts]
        if "eval" in parts:
            names += [f"eval_loss_sigma_{k}" for k in range(1, self.args.eval_sigmas + 1)]
        names += ["eval_gap"] if {"eval", "train"} <= {*parts} else []
        clip = self.pictures and self.args.validation_clip_model
        return [*names, "clip_score"] if clip else names

    def catch_up(self, *, due: bool) -> None:
        """The validation before the first step, or the one that a run did not stay for.

        Args:
            due: whether one belongs where the run stands.
        """
        if due and (self.run.step == 0 or not self._done()):
            self()

    def _done(self) -> bool:
        names = ["eval_loss"] if self.inputs.evaluation else []
        names += ["clip_score"] if self.pictures and self.args.validation_clip_model else []
        folder = self.folder / f"step-{self.run.step}"
        return all(self.run.has_logged(name) for name in names) and all(
            (folder / picture.file).is_file() for picture in self.pictures
        )

    @no_grad
    def __call__(self) -> None:
        """Eval losses into metrics.jsonl and pictures into `validation/step-N/`, at the run's step.

        A collective: all processes call it. It draws from no global generator, so that a run with
        validations learns what one without them learns.

        Raises:
            Interrupted: the run was asked to stop.
        """
        network = self.network
        training = network.training
        network.eval()
        row: dict[str, float] = {}
        with self.run.phase("validation"):
            if self.inputs.evaluation:
                row |= eval_losses(self.run, network, self.inputs, self.noise, self.args)
            if self.pictures:
                with residence.at_work(self.inputs.vae, self.run.device):
                    row |= self._draw_all()
                if self.run.main:
                    log_pictures(self.run, self.folder / f"step-{self.run.step}")
        network.train(training)
        if row:
            self.run.write_metrics(row)
        self.run.teller.validation(self.folder / f"step-{self.run.step}", row)

    def finish(self) -> None:
        """Writes `contact_sheet.png`: a row per picture, a column per step. One process does."""
        if self.run.main:
            sheet = contact_sheet(self.folder, last_step=self.run.step)
            if sheet is not None:
                sheet.save(own(self.run.output_dir / "contact_sheet.png"))

    def _draw_all(self) -> dict[str, float]:
        """Draws this process's pictures; returns {"clip_score": ...} if there is a CLIP."""
        run, folder = self.run, self.folder / f"step-{self.run.step}"
        if run.main:
            clear(folder)  # what a branch of the run that was left drew
            for picture in self.pictures:
                own(folder / picture.file)
            folder.mkdir(parents=True, exist_ok=True)
        run.accelerator.wait_for_everyone()
        pipeline = self.model.pipeline(self.network, self.inputs.vae, self.objective)
        pipeline.set_progress_bar_config(disable=True)
        drawn: list[Image.Image] = []
        share = run.stopping.paused(self.mine, len(self.pictures))
        bar = Bar(share, "validation", len(self.mine), disable=not run.main, leave=False)
        with attention.while_drawing(self.network, self.args.validation_attention_backend):
            latents = [self._draw(pipeline, self.pictures[i]) for (i,) in bar]
        # For the autoencoder's activations.
        stays = run.replicas.owns_storage
        with nullcontext() if stays else residence.away(self.network, run.device):
            for i, one in zip(self.mine, latents, strict=True):
                drawn.append(self._decoded(one))
                drawn[-1].save(folder / self.pictures[i].file)
        row: dict[str, float] = {}
        if self.args.validation_clip_model:
            row["clip_score"] = self._clip_score(drawn)
        run.accelerator.wait_for_everyone()
        return row

    def _draw(self, pipeline: Any, picture: Picture) -> Tensor:
        """The latents of the picture that every pipeline with the result draws from this seed."""
        args, dtype = self.args, self.run.dtype
        embeds = self.inputs.text([picture.prompt])
        negative = self.inputs.text([picture.negative])
        more: dict[str, Any] = {}
        if args.validation_skip_guidance_layers:
            more["skip_guidance_layers"] = list(args.validation_skip_guidance_layers)
            for name in ("scale", "start", "stop"):
                option = f"skip_layer_guidance_{name}"
                more[option] = getattr(args, f"validation_{option}")
        if args.validation_guidance_rescale:
            more["guidance_rescale"] = args.validation_guidance_rescale
        if self.preview is not None:
            more["callback_on_step_end"] = self.preview.callback
        noise = self.model.step_noise(pipeline.scheduler, picture.seed)
        with self.run.replicas.autocast(), noise:
            return pipeline(
                **{name: value.to(dtype) for name, value in embeds.items()},
                **{f"negative_{name}": value.to(dtype) for name, value in negative.items()},
                height=picture.height,
                width=picture.width,
                num_inference_steps=picture.num_inference_steps,
                guidance_scale=picture.guidance_scale,
                generator=torch.Generator().manual_seed(picture.seed),
                output_type="latent",
                **self.model.call_options,
                **more,
            ).images

    def _decoded(self, latents: Tensor) -> Image.Image:
        return to_pil(self.model.decode(self.inputs.vae, latents))[0]

    def _clip_score(self, drawn: list[Image.Image]) -> float:
        """Mean score of all pictures over all processes; each is scored where it was drawn."""
        scores = torch.zeros(len(self.pictures))
        if self.clip is not None:
            prompts = [self.pictures[i].prompt for i in self.mine]
            scores[list(self.mine)] = torch.tensor(self.clip(drawn, prompts))
        if self.run.accelerator.num_processes > 1:  # zero where another process has it: exact
            reduced: Any = self.run.accelerator.reduce(scores.to(self.run.device), "sum")
            scores = reduced.cpu()
        return scores.double().mean().item()


def write_prompts(folder: Path, pictures: Sequence[Mapping[str, object]]) -> None:
    """Writes prompts.json, by which contact sheet and report know the pictures (file, label)."""
    folder.mkdir(parents=True, exist_ok=True)
    text = json.dumps({"pictures": pictures}, indent=1, ensure_ascii=False)
    write_file(folder / "prompts.json", text)


def log_pictures(run: Run, folder: Path) -> None:
    """Sends the pictures of a step to the trackers, each under its own name,
    which begins with that of the validation's folder.

    They are not stacked: their sizes may differ. wandb without a network wants WANDB_MODE=offline
    in the environment, swanlab SWANLAB_MODE=offline (or local).
    """
    for path in sorted(folder.glob("*.png")):
        name = f"{folder.parent.name}/{path.stem}"
        with Image.open(path) as picture:
            pixels = np.asarray(picture.convert("RGB"))
        for tracker in run.accelerator.trackers:
            if tracker.name == "mlflow":  # accelerate sends it files alone
                tracker.log_artifact(str(path), f"{folder.parent.name}/{folder.name}")
                continue
            extra = {"dataformats": "NHWC"} if tracker.name == "tensorboard" else {}
            tracker.log_images({name: pixels[None]}, step=run.step, **extra)
