"""Tests: claims about the code, each of which can fail."""
