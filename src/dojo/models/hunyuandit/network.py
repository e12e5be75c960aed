"""What is known of Hunyuan-DiT's network."""

from dojo.models.facts import NetworkFacts

DIT = NetworkFacts(part="transformer", blocks="blocks")
