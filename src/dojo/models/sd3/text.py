"""Captions to what the transformer reads, and what takes its place when a caption is dropped.

One caption is `prompt_embeds` [T, D], CLIP rows first (CLIP-L and CLIP-G side by side, zeros up to
D), then T5's, and `pooled_prompt_embeds` [P], CLIP-L's part first. SD3 has no attention mask, so
padding is attended to.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from dojo.lazy import F, no_grad, torch, transformers
from dojo.models import int8, loaded
from dojo.models.folders import Embeds
from dojo.models.sd3.config import Config
from dojo.models.sd3.models import load_text_pipeline
from dojo.models.truncation import Reader
from dojo.models.words import teach_pipeline

if TYPE_CHECKING:
    from torch import Tensor

_CLIPS = ("clip_l", "clip_g")


@dataclass(frozen=True)
class Layout:
    """Where each encoder's numbers lie in the embeddings of a caption."""

    clip_tokens: int
    clip_l_width: int
    clip_g_width: int
    clip_l_pooled: int

    @classmethod
    def of(cls, config: Config) -> Layout:
        """Reads the widths from the encoders' configurations."""

        def read(part: str) -> dict[str, Any]:
            return json.loads((config.folder / part / "config.json").read_text())

        clip_l, clip_g = read("text_encoder"), read("text_encoder_2")
        return cls(
            clip_tokens=config.clip_tokens,
            clip_l_width=clip_l["hidden_size"],
            clip_g_width=clip_g["hidden_size"],
            clip_l_pooled=clip_l["projection_dim"],
        )

    def drop(self, embeds: Mapping[str, Tensor], dropped: Mapping[str, Tensor]) -> Embeds:
        """Zeros in place of single encoders' outputs, as SD3 was trained (arXiv:2403.03206, B.3).

        Args:
            dropped: `clip_l`, `clip_g`, `t5`, each bool [B]: whose output a sample goes without.
        """
        rows = embeds["prompt_embeds"].clone()  # [B, T, D]
        pooled = embeds["pooled_prompt_embeds"].clone()  # [B, P]
        n, split, end = self.clip_tokens, self.clip_l_width, self.clip_l_width + self.clip_g_width
        rows[dropped["clip_l"], :n, :split] = 0
        pooled[dropped["clip_l"], : self.clip_l_pooled] = 0
        rows[dropped["clip_g"], :n, split:end] = 0
        pooled[dropped["clip_g"], self.clip_l_pooled :] = 0
        rows[dropped["t5"], n:] = 0
        return {"prompt_embeds": rows, "pooled_prompt_embeds": pooled}


def readers(config: Config) -> list[Reader]:
    """The tokenizers of a model and how much its encoders read, without the encoders."""
    folder, limit, words = config.folder, config.clip_tokens, config.words
    found: list[Reader] = []
    for part in ("tokenizer", "tokenizer_2"):
        clip = loaded.tokenizer(transformers.CLIPTokenizer, folder, part, flag=config.flag)
        found.append(Reader("CLIP", words.reader(clip) if words else clip, limit))
    if config.has_t5:
        t5 = loaded.tokenizer(transformers.T5Tokenizer, folder, "tokenizer_3", flag=config.flag)
        t5 = words.deaf(t5) if words else t5
        found.append(Reader("T5", t5, config.args.max_sequence_length, "--max_sequence_length"))
    return found


class TextEncoders:
    """The three text encoders; the two CLIPs may be in training.

    Equal to `StableDiffusion3Pipeline.encode_prompt` bit for bit when T5's padding is unmodified.
    """

    def __init__(
        self,
        pipeline: Any,
        *,
        clip_tokens: int,
        max_sequence_length: int,
        t5_padding: Literal["unmodified", "zero"],
        width: int,
        device: torch.device,
    ) -> None:
        """Takes the encoders of a pipeline; None where one was not loaded.

        Args:
            clip_tokens: length that the CLIPs' captions are padded to.
            max_sequence_length: tokens of T5.
            width: D, that the transformer reads.
            device: where the encoders compute.
        """
        self.clip_tokenizers = [pipeline.tokenizer, pipeline.tokenizer_2]
        self.clips = [pipeline.text_encoder, pipeline.text_encoder_2]
        self.tokenizer_3 = pipeline.tokenizer_3
        self.t5 = pipeline.text_encoder_3
        self.clip_tokens = clip_tokens
        self.t5_tokens = max_sequence_length
        self.width = width
        self.zero_padding = t5_padding == "zero"
        self.device = device

    @classmethod
    def load(
        cls,
        config: Config,
        dtype: torch.dtype,
        device: torch.device,
        *,
        with_t5: bool = True,
        only: str | None = None,
    ) -> TextEncoders:
        """The frozen encoders of a model, or one of them."""
        pipeline: Any = load_text_pipeline(config, dtype, with_t5=with_t5, only=only)
        precision = config.args.text_encoder_precision
        encoders = (pipeline.text_encoder, pipeline.text_encoder_2, pipeline.text_encoder_3)
        for part in encoders:
            if part is not None:
                int8.as_asked(part, precision).requires_grad_(False).eval()
        if config.words:
            teach_pipeline(pipeline, config.words)
        for part in encoders:
            if part is not None:
                part.to(device)
        return cls(
            pipeline,
            clip_tokens=config.clip_tokens,
            max_sequence_length=config.args.max_sequence_length,
            t5_padding=config.text.t5_padding,
            width=int(config.transformer["joint_attention_dim"]),
            device=device,
        )

    @no_grad
    def __call__(self, captions: Sequence[str]) -> Embeds:
        """Everything that the transformer reads of the captions, on the CPU."""
        return {name: value.cpu() for name, value in self.joined(self.said(captions)).items()}

    def said(self, captions: Sequence[str]) -> Embeds:
        """What each loaded encoder says, on the device."""
        found = self._clips(captions)
        if self.t5 is not None:
            found["t5"] = self._t5(captions)
        return found

    def joined(self, said: Mapping[str, Tensor]) -> Embeds:
        """CLIP's rows over T5's, or over zeros, as the pipeline has them for a model without T5."""
        rows, pooled = self._side_by_side(said)
        t5 = said.get("t5")
        if t5 is None:
            t5 = torch.zeros(len(rows), self.t5_tokens, self.width, device=rows.device)
        prompt_embeds = torch.cat([rows, t5.to(rows.dtype)], dim=1)
        return {"prompt_embeds": prompt_embeds, "pooled_prompt_embeds": pooled}

    def clip(self, captions: Sequence[str]) -> tuple[Tensor, Tensor]:
        """CLIP's rows [B, clip tokens, D] and pooled vectors [B, P], with gradients if they train.

        A caption longer than CLIP's 77 tokens is cut; T5 sees more of it.
        """
        return self._side_by_side(self._clips(captions))

    def _clips(self, captions: Sequence[str]) -> Embeds:
        """Rows [B, clip tokens, width] and pooled vectors of the CLIPs that are loaded."""
        found: Embeds = {}
        for name, tokenizer, encoder in zip(_CLIPS, self.clip_tokenizers, self.clips, strict=True):
            if encoder is None:
                continue
            tokens = tokenizer(
                list(captions),
                padding="max_length",
                max_length=self.clip_tokens,
                truncation=True,
                return_tensors="pt",
            )
            encoder.train(torch.is_grad_enabled())  # dropout of adapters in training only
            output = encoder(tokens.input_ids.to(self.device), output_hidden_states=True)
            found[name] = output.hidden_states[-2]
            found[f"{name} pooled"] = output[0]
        return found

    def _side_by_side(self, said: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
        """CLIP-L's and CLIP-G's numbers as one: rows padded to D, and pooled vectors."""
        side_by_side = torch.cat([said[name] for name in _CLIPS], dim=-1)
        padded = F.pad(side_by_side, (0, self.width - side_by_side.shape[-1]))
        return padded, torch.cat([said[f"{name} pooled"] for name in _CLIPS], dim=-1)

    @property
    def trainable(self) -> list[Any]:
        """The two CLIPs."""
        return self.clips

    def refresh(self, cached: Mapping[str, Tensor], captions: Sequence[str]) -> Embeds:
        """Cached embeddings with CLIP's part replaced by what CLIP says now (it is in training)."""
        return with_live_clip(cached, *self.clip(captions))

    def free_others(self) -> None:
        """Forgets T5, the largest of the three, once its rows are cached."""
        self.t5 = None

    def _t5(self, captions: Sequence[str]) -> Tensor:
        t5: Any = self.t5
        assert t5 is not None, "it is loaded"
        tokens = self.tokenizer_3(
            list(captions),
            padding="max_length",
            max_length=self.t5_tokens,
            truncation=True,
            return_tensors="pt",
        )
        rows = t5(tokens.input_ids.to(self.device))[0]
        if self.zero_padding:
            rows = rows * tokens.attention_mask.to(rows).unsqueeze(-1)
        return rows


def with_live_clip(cached: Mapping[str, Tensor], rows: Tensor, pooled: Tensor) -> Embeds:
    """Cached embeddings with CLIP's part replaced by what CLIP says now (it is in training)."""
    tail = cached["prompt_embeds"][:, rows.shape[1] :]
    joined = torch.cat([rows, tail.to(rows.dtype)], dim=1)
    return {"prompt_embeds": joined, "pooled_prompt_embeds": pooled}
