"""Kolors behind the contract of `dojo.models.family`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from dojo.lazy import torch
from dojo.models import folders
from dojo.models.kolors import text
from dojo.models.kolors.config import TEXT_ENCODER, TOKENIZER, TOKENS, Config, ModelArgs, TextArgs
from dojo.models.truncation import Reader
from dojo.models.unet import config, schedule, sized


@dataclass(frozen=True, kw_only=True)
class Model(Config, sized.Model):
    """One opened Kolors."""

    def readers(self) -> list[Reader]:
        """ChatGLM's tokenizer, which cuts at the end and puts no mark there."""
        tokenizer = self.load_tokenizer(TEXT_ENCODER)
        return [Reader("ChatGLM", tokenizer, TOKENS, marks_end=False)]

    def load_text(
        self,
        dtype: torch.dtype,
        device: torch.device,
        *,
        whole: bool = True,
        only: str | None = None,
    ) -> text.TextEncoders:
        """The frozen ChatGLM."""
        return text.TextEncoders.load(self, dtype, device, only)

    def meta_encoder(self, part: str) -> Any:
        """ChatGLM, which transformers does not have."""
        kind: Any = self.text_classes[part]
        settings = kind.config_class(**folders.read_config(self.folder, self.flag, part))
        # Left to itself, the class asks for the memory of all weights on the CPU.
        with torch.device("meta"):
            return kind(settings, empty_init=False).eval()

    def load_pipeline(self, dtype: torch.dtype, device: torch.device, *, texts: bool = True) -> Any:
        """The whole pipeline, of either layout.

        Args:
            texts: with text encoder and tokenizer.
        """
        parts: dict[str, Any] = dict.fromkeys(self.text_folders)
        for part, kind in self.networks.items():
            if texts or part not in self.text_encoders:
                parts[part] = self.load_part(kind, part, dtype)
        if texts:
            parts[TOKENIZER] = self.load_tokenizer(TEXT_ENCODER, parts[TEXT_ENCODER])
        folders.frugal(parts["vae"], self.args)
        kind: Any = self.pipeline_class
        pipeline = kind(
            **parts,
            scheduler=schedule.own(self.scheduler),
            **dict.fromkeys(self.optional_parts),
            **self.pipeline_options,
        )
        return pipeline.to(device)


def open_model(args: ModelArgs, text: TextArgs | None = None) -> Model:
    """Finds the model's folder (downloading a hub id) and reads its configurations.

    Raises:
        UserError: there is no such folder or hub repository, or it holds no Kolors.
    """
    return config.read(Model, args, text or TextArgs())
