"""What is known of the UNet of every Stable Diffusion that has one."""

from dojo.models.facts import NetworkFacts

UNET = NetworkFacts(part="unet")
