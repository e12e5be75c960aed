"""CLIP score: how well pictures fit their prompts (Hessel et al. 2021, arXiv:2104.08718).

transformers' CLIP itself and not torchmetrics' CLIPScore: that one (1.9) takes no local folder,
expects plain tensors where transformers 5 returns outputs, and cuts the end token off long texts.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from dojo.cli import UserError
from dojo.lazy import no_grad, torch, transformers
from dojo.models import loaded

if TYPE_CHECKING:
    from PIL import Image


def check(name: str) -> None:
    """Reads the configuration of a CLIP, no weights.

    Raises:
        UserError: there is none under this name, or it is another kind of model.
    """
    try:
        kind = transformers.AutoConfig.from_pretrained(name).model_type
    except Exception as error:  # transformers has many kinds of them
        reason = str(error).strip().splitlines()[0]
        raise UserError(f"--validation_clip_model: {name} cannot be read ({reason})") from error
    if kind != "clip":
        raise UserError(f"--validation_clip_model: {name} is a {kind}, no CLIP")


class ClipScore:
    """A CLIP in float32; it waits on the CPU and is on `device` only while it scores."""

    def __init__(self, name: str, device: torch.device) -> None:
        flag = "--validation_clip_model"
        model = loaded.network(transformers.CLIPModel, name, flag=flag, dtype=torch.float32)
        processor = loaded.tokenizer(transformers.CLIPProcessor, name, flag=flag, encoder=model)
        self.model = model.requires_grad_(False).eval()
        self.processor = processor
        self.max_length = int(model.config.text_config.max_position_embeddings)
        self.device = device

    @no_grad
    def __call__(self, pictures: list[Image.Image], prompts: list[str]) -> list[float]:
        """100 * max(cosine, 0) of each picture with its prompt, which is cut to CLIP's length."""
        self.model.to(self.device)
        scores = [self._one(*pair) for pair in zip(pictures, prompts, strict=True)]
        self.model.to("cpu")
        return scores

    def _one(self, picture: Image.Image, prompt: str) -> float:
        """One pair at a time, so that a score does not depend on what else is scored."""
        inputs = self.processor(
            images=[picture],
            text=[prompt],
            truncation=True,
            max_length=self.max_length,
            return_tensors="pt",
        ).to(self.device)
        output = self.model(**inputs)
        cosine = torch.nn.functional.cosine_similarity(output.image_embeds, output.text_embeds)
        return 100 * max(float(cosine), 0.0)
