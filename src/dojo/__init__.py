"""SD Dojo: the library under the training scripts."""

import logging

# On some CPUs bitsandbytes says at its import, which diffusers and peft do, that a kernel of the
# hub's could not be had; it computes without.
logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)
