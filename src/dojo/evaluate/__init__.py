"""Watching a run: pictures from fixed prompts and seeds, and an eval loss that does not jump about.

The eval loss uses the same pictures, the same noise per picture every time and sigmas spread evenly
over the training density, so that its changes come from the weights alone.
"""

from dojo.evaluate.args import Picture, ValidationArgs
from dojo.evaluate.validator import Validator, log_pictures, write_prompts

__all__ = ["Picture", "ValidationArgs", "Validator", "log_pictures", "write_prompts"]
