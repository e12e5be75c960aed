"""Captioned pictures wherever they lie: found, read, and told apart."""
