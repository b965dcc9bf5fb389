"""Attention of transformers' models on the operators, which policies and integrations share."""
