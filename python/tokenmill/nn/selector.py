"""Learned image summaries per task (MULTI-LANE)."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from .._check import as_int, check, check_bool, check_device_of, check_tensor, fail
from .rules import check_input, check_tokens

NAME = "nn.SelectorSummary"


class SelectorSummary(nn.Module):
    r"""Summarises patches by selectors, which attend to them with one head over all channels:

    .. math::
       y_{t,b} = \operatorname{softmax}(S_t X_b^\top / \sqrt{C})\, X_b.

    The patches X are used as keys and values without projection, and have no gradient: only the
    selectors S of a task are trained. In the paper a layer attends to its summaries and class token
    instead of all patches, and the selectors, not the processed summaries, are passed to the next
    layer.

    Args:
        dim: channels C.
        num_selectors: number of selectors per task.
        num_tasks: number of tasks T.
        detach: whether patches have no gradient.

    Shape:
        x ``[B, N, C]``, patches and class token after the norm of the layer, and selectors ``[T, B,
        S, C]`` or ``[T, S, C]`` (None: the module's selectors of all tasks), to ``[T, B, S, C]``;
        tasks, indices ``[T']``, selects among the module's tasks. An image without patches gives 0.
        Any floating-point dtype.

    Weights: selectors ``[T, S, C]``.

    Raises:
        RuntimeError: naming argument, rule and value.

    Complexity: 4 T S C operations per patch; two matrix products of PyTorch, with [T, B, S, N]
    weights in memory, because a head_dim of 768 exceeds the kernels of :func:`tokenmill.attention`,
    and selectors are few.

    Paper: Less is more: Summarizing Patch Tokens (De Min et al. 2024), section 3; 20 selectors (10
    for VOC) of 768 channels, drawn from a standard normal distribution. A new task is initialised
    with the selectors of the previous task (:meth:`begin_task`).

    Example:
        >>> import torch, tokenmill as tm
        >>> summary = tm.nn.SelectorSummary(num_tasks=3)
        >>> x = torch.randn(2, 197, 768)
        >>> summary(x).shape, summary(x, tasks=torch.tensor([1])).shape
        (torch.Size([3, 2, 20, 768]), torch.Size([1, 2, 20, 768]))
    """

    def __init__(
        self, dim: int = 768, num_selectors: int = 20, num_tasks: int = 1, *, detach: bool = True
    ) -> None:
        super().__init__()
        sizes = {"num_tasks": num_tasks, "num_selectors": num_selectors, "dim": dim}
        for name, size in sizes.items():
            sizes[name] = as_int(NAME, name, size, minimum=1, maximum=2**31 - 1)
        check_bool(NAME, "detach", detach)
        self.selectors = nn.Parameter(torch.randn(*sizes.values()))
        self.detach = detach

    def forward(
        self, x: Tensor, selectors: Tensor | None = None, tasks: Tensor | None = None
    ) -> Tensor:
        check_tokens(NAME, x, self.selectors)
        channels = x.shape[2]
        given = self._chosen(tasks) if selectors is None else selectors
        if selectors is not None:
            check(tasks is None, NAME, "tasks", "requires the module's selectors", tasks)
            check_input(NAME, "selectors", selectors, self.selectors)
        ranked = given.dim() in (3, 4) and given.shape[-1] == channels
        rule = f"must have shape [T, B, S, {channels}] or [T, S, {channels}]"
        check(ranked, NAME, "selectors", rule, given.shape)
        if given.dim() == 3:
            given = given[:, None].expand(-1, x.shape[0], -1, -1)
        if given.shape[1] != x.shape[0]:
            fail(NAME, "selectors", f"must have the batch size of x, {x.shape[0]}", given.shape)
        patches = x.detach() if self.detach else x
        # The selectors of all tasks are rows of one product with the patches of an image.
        rows = given.transpose(0, 1).flatten(1, 2)
        logits = (rows * channels**-0.5) @ patches.mT
        wide = torch.promote_types(logits.dtype, torch.float32)
        weights = torch.softmax(logits, 2, dtype=wide).to(logits.dtype)
        out = weights @ patches.to(logits.dtype)
        return out.unflatten(1, (given.shape[0], given.shape[2])).transpose(0, 1)

    @torch.no_grad()
    def begin_task(self, task: int) -> None:
        """Initialises the selectors of this task with the previous task's."""
        task, tasks = as_int(NAME, "task", task), self.selectors.shape[0]
        check(1 <= task < tasks, NAME, "task", f"must be 1 to num_tasks - 1, {tasks - 1}", task)
        self.selectors[task] = self.selectors[task - 1]

    def _chosen(self, tasks: Tensor | None) -> Tensor:
        if tasks is None:
            return self.selectors
        check_tensor(NAME, "tasks", tasks)
        check_device_of(NAME, "tasks", tasks, "x", self.selectors)
        whole = tasks.dim() == 1 and tasks.dtype in (torch.int32, torch.int64)
        check(whole, NAME, "tasks", "must be int32 or int64 of 1 dimension", tasks)
        return self.selectors[tasks.long()]

    def extra_repr(self) -> str:
        tasks, selectors, dim = self.selectors.shape
        return f"{dim}, num_selectors={selectors}, num_tasks={tasks}, detach={self.detach}"
