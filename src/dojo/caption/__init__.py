"""Captions for a folder of pictures, written beside them: `python -m dojo.caption`."""
