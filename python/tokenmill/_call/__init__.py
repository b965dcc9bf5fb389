"""How a call runs: library, operator, autograd, attach, choose, run, each above the last."""
