"""What is known of SD1's network."""

from dojo.models.facts import NetworkFacts

UNET = NetworkFacts(part="unet")
