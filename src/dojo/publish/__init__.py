"""What leaves the house with a result: its model card, and the way to the hubs."""

from dojo.publish.card import write_card
from dojo.publish.hubs import PublishArgs, upload

__all__ = ["PublishArgs", "upload", "write_card"]
