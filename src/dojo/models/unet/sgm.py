"""Names of a UNet's layers in the original code (LDM, sgm) and in diffusers, both ways.

The original counts all of a side's places in one row: after `conv_in`, every block of the way down
takes one place for each ResNet (with its attention) and one for its downsampler; on the way up the
upsampler stands behind the block's last ResNet and its attention.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

_TOP = {
    "conv_in": "input_blocks.0.0",
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    "add_embedding.linear_1": "label_emb.0.0",
    "add_embedding.linear_2": "label_emb.0.2",
    "conv_out": "out.2",
}
_RESNET = {
    "conv1": "in_layers.2",
    "time_emb_proj": "emb_layers.1",
    "conv2": "out_layers.3",
    "conv_shortcut": "skip_connection",
}
_TOP_BACK = {original: ours for ours, original in _TOP.items()}
_RESNET_BACK = {original: ours for ours, original in _RESNET.items()}
_OURS = re.compile(
    r"(?:(?P<side>down|up)_blocks\.(?P<block>\d+)|mid_block)"
    r"\.(?P<kind>resnets|attentions|downsamplers|upsamplers)\.(?P<index>\d+)\.(?P<rest>.+)"
)
_ORIGINAL = re.compile(
    r"(?:(?P<side>input|output)_blocks\.(?P<place>\d+)|middle_block)\.(?P<step>\d+)\.(?P<rest>.+)"
)


@dataclass(frozen=True, kw_only=True)
class Blocks:
    """How a UNet is built, as far as its original names depend on it; the defaults are SDXL's."""

    layers: int = 2
    """ResNets of a block on the way down (`layers_per_block`); on the way up there is one more"""
    attended: frozenset[int] = frozenset({0, 1})
    """the blocks of the way up that have attentions"""

    @classmethod
    def of(cls, config: Mapping[str, Any]) -> Blocks:
        """Of a UNet's configuration."""
        layers, kinds = config.get("layers_per_block", 2), config.get("up_block_types", ())
        kinds = list(kinds) if isinstance(kinds, Sequence) else []
        return cls(
            layers=layers if isinstance(layers, int) else int(max(layers)),
            attended=frozenset(i for i, kind in enumerate(kinds) if "CrossAttn" in str(kind)),
        )

    @classmethod
    def among(cls, names: Iterable[str]) -> Blocks | None:
        """Of the names of modules or of adapted layers; None if they do not tell the depth.

        Layers of one ResNet a block are believed only where both ways have them: a file may adapt
        a few layers of a deeper UNet.
        """
        found = [match for name in names if (match := _OURS.fullmatch(name)) and match["side"]]
        rows = [match for match in found if match["kind"] in ("resnets", "attentions")]
        down = [1 + int(match["index"]) for match in rows if match["side"] == "down"]
        up = [int(match["index"]) for match in rows if match["side"] == "up"]
        if not down and not up:
            return None
        shallow = bool(down) and bool(up) and max(down) == max(up) == 1
        return cls(
            layers=1 if shallow else max([2, *down, *up]),
            attended=frozenset(
                int(match["block"])
                for match in rows
                if match["side"] == "up" and match["kind"] == "attentions"
            ),
        )

    @classmethod
    def told_by(cls, originals: Iterable[str]) -> Blocks:
        """Of original names: SDXL's, unless something stands where a block of its depth ends."""
        for name in originals:
            match = _ORIGINAL.fullmatch(name)
            if match and match["side"] == "input" and match["place"] != "0":
                ends = int(match["place"]) % 3 == 0
                if ends != (match["rest"] == "op"):
                    return cls(layers=1)
        return cls()

    def original(self, name: str) -> str:
        """A layer's original name, of diffusers'.

        Raises:
            KeyError: no such layer stands in a UNet.
        """
        if name in _TOP:
            return _TOP[name]
        match = _OURS.fullmatch(name)
        if match is None:
            raise KeyError(name)
        kind, rest = match["kind"], match["rest"]
        block, index = int(match["block"] or 0), int(match["index"])
        if kind == "resnets":
            rest = _RESNET[rest]
        step = int(kind == "attentions")
        if match["side"] is None:
            return f"middle_block.{2 * index + step}.{rest}"
        first = (self.layers + 1) * block
        if kind == "downsamplers":
            return f"input_blocks.{first + self.layers + 1}.0.op"
        if kind == "upsamplers":
            return f"output_blocks.{first + self.layers}.{1 + (block in self.attended)}.conv"
        if match["side"] == "down":
            return f"input_blocks.{first + 1 + index}.{step}.{rest}"
        return f"output_blocks.{first + index}.{step}.{rest}"

    def ours(self, name: str) -> str | None:
        """diffusers' name of a layer, of the original one; None if a UNet has no such layer."""
        if name in _TOP_BACK:
            return _TOP_BACK[name]
        match = _ORIGINAL.fullmatch(name)
        if match is None:
            return None
        step, rest = int(match["step"]), match["rest"]
        if match["side"] is None:
            return self._inside("mid_block", step // 2, step % 2, rest)
        place = int(match["place"]) - (match["side"] == "input")
        block, index = divmod(place, self.layers + 1)
        if place < 0:
            return None
        if match["side"] == "output":
            if rest == "conv":
                return f"up_blocks.{block}.upsamplers.0.conv"
            return self._inside(f"up_blocks.{block}", index, step, rest)
        if rest == "op":
            return f"down_blocks.{block}.downsamplers.0.conv"
        return self._inside(f"down_blocks.{block}", index, step, rest)

    def _inside(self, block: str, index: int, step: int, rest: str) -> str | None:
        if step == 1:
            return f"{block}.attentions.{index}.{rest}"
        if step == 0 and rest in _RESNET_BACK:
            return f"{block}.resnets.{index}.{_RESNET_BACK[rest]}"
        return None
