"""One training run: its processes, folder, numbers, checkpoints, optimizer and cost."""
