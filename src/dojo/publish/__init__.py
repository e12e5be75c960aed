"""What leaves the house with a result: its model card, and the way to the hubs."""

from dojo.publish.card import write_card
from dojo.publish.hubs import PublishArgs, upload
from dojo.publish.result import Card, finish

__all__ = ["Card", "PublishArgs", "finish", "upload", "write_card"]
