"""The oracle: every operator in plain PyTorch, written for reading, up to float64.

A file holds one operator and begins with its formula. Its function takes the arguments of the
schema, in that order, and PyTorch's autograd differentiates it.
"""
