"""What is read and written: checkpoints, data folders, results."""
