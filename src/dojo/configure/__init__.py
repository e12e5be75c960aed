"""A file of options for a run, from a dozen answers or from another trainer's configuration."""
