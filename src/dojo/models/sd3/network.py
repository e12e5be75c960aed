"""What is known of SD3's network."""

from dojo.models.facts import NetworkFacts

# The query of the text stream in the last block is asked, and its answer thrown away.
MMDIT = NetworkFacts(part="transformer", unread_in_last=("attn.add_q_proj", "attn.norm_added_q"))
