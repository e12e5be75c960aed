"""Preference pairs: found, checked, chosen, read."""
