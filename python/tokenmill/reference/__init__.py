"""The oracle: every operator in plain PyTorch, written for reading, up to float64.

Each file holds one operator and begins with its formula. The function takes the arguments of the
schema, in order, and PyTorch's autograd differentiates it.
"""
