"""What a policy or a token reduction costs, and what it keeps, on a model of transformers.

A text is read once for each policy and length. Then tokens are decoded under the policy from copies
of its cache: the text's own continuation, repetitions of passages from five depths, and the answers
to questions about facts that were hidden in the text. Loss, answers and tokens per second stand
beside the keys and bytes that a step reads. Of a vision transformer the features are compared.
"""

from .run import evaluate
from .table import Row, markdown, picture
from .tasks import Text, make_text
from .vision import VisionRow, evaluate_vision, photographs, vision_markdown

__all__ = [
    "Row",
    "Text",
    "VisionRow",
    "evaluate",
    "evaluate_vision",
    "make_text",
    "markdown",
    "photographs",
    "picture",
    "vision_markdown",
]
