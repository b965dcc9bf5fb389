"""What a policy costs and what it keeps: a causal model of transformers judged on a long text.

A text is read once for each policy and length. Then tokens are decoded under the policy from copies
of its cache: the text's own continuation, repetitions of passages from five depths, and the answers
to questions about facts that were hidden in the text. Loss, answers and tokens per second stand
beside the keys and bytes that a step reads.
"""

from .run import evaluate
from .table import Row, markdown, picture
from .tasks import TASKS, Text, make_text

__all__ = ["TASKS", "Row", "Text", "evaluate", "make_text", "markdown", "picture"]
