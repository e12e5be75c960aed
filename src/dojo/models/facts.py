"""What adapters, freezing and files have to know of a class of networks."""

from __future__ import annotations

import re
from collections.abc import Collection
from dataclasses import dataclass

# diffusers has the same names in nearly all of its networks.
_ATTENTION = r"attn[12]?\.(to_q|to_k|to_v|to_out\.0|add_q_proj|add_k_proj|add_v_proj|to_add_out)"
_FEED_FORWARD = r"ff(_context)?\.net\.(0\.proj|2)"

# A UNet's, by the full names; no transformer has any of these.
_CONVOLUTIONS = (
    r"(?:.*\.)?(?:resnets\.\d+\.conv(?:1|2|_shortcut)|(?:down|up)samplers\.\d+\.conv|"
    r"attentions\.\d+\.proj_(?:in|out))"
)


@dataclass(frozen=True, kw_only=True)
class NetworkFacts:
    """Of one class of networks."""

    part: str
    """the network's name in a pipeline and in a LoRA file"""
    blocks: str = "transformer_blocks"
    """name of the list of transformer blocks, wherever in the network it is"""
    attention: str = _ATTENTION
    """expression for the projections of attentions, by their names in a block"""
    feed_forward: str = _FEED_FORWARD
    """the same for the linear layers between them"""
    convolutions: str = _CONVOLUTIONS
    """expression for the full names of the convolutions that adapters may be put on"""
    unread_in_last: tuple[str, ...] = ()
    """modules of the last block of the list at the top whose result nothing reads"""

    @property
    def block(self) -> str:
        """Expression for the full name of a block."""
        return rf"(.*\.)?{self.blocks}\.\d+"

    def unread(self, names: Collection[str]) -> set[str]:
        """Those of some modules or weights, all of the network, that could never learn."""
        numbers = re.compile(rf"{self.blocks}\.(\d+)\.")
        blocks = [int(found[1]) for name in names if (found := numbers.match(name))]
        if not blocks:
            return set()
        dead = [f"{self.blocks}.{max(blocks)}.{module}" for module in self.unread_in_last]
        return {name for name in names for one in dead if f"{name}.".startswith(f"{one}.")}
