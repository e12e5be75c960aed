"""SD Dojo: the library under the training scripts."""
