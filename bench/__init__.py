"""Benchmarks: named cases against named peers, one runner, results per machine."""
