"""The oracle: every operator in plain PyTorch, written for reading, up to float64."""
