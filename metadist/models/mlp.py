"""Fully connected network."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn


class MLP(nn.Module):
    """All inputs, flattened and joined -> hidden layers with ReLU -> `head`. [n, ...] each -> [n, outputs].

    The sinusoid network of Finn et al. 2017, section 5.1, is `hidden=(40, 40)` on one input. `context`: so many
    parameters of that name, zero to begin with, are joined to every example's inputs (for CAVIA).

    `vocabularies`: of each input that is an identifier, how many numbers it can be, None of the others (or nothing,
    where no input is one). Of an identifier int64 [n] the row of a table of that size by `embedding` is joined. Row 0,
    of names that training data does not have, begins as zeros, since no training example moves it.
    """

    def __init__(
        self,
        input_shapes: Sequence[Sequence[int]],
        outputs: int,
        hidden: Sequence[int] = (40, 40),
        context: int = 0,
        vocabularies: Sequence[int | None] = (),
        embedding: int = 16,
    ):
        super().__init__()
        sizes = list(vocabularies) or [None] * len(input_shapes)
        self.context = nn.Parameter(torch.zeros(context)) if context else None
        joined = zip(sizes, input_shapes, strict=True)
        width = sum(math.prod(shape) if size is None else embedding for size, shape in joined)
        tables = {f"input_{i}": nn.Embedding(size, embedding) for i, size in enumerate(sizes) if size is not None}
        with torch.no_grad():
            for table in tables.values():
                table.weight[0] = 0
        self.embeddings = nn.ModuleDict(tables)
        widths = [width + context, *hidden]
        self.body = nn.Sequential()
        for width_in, width_out in zip(widths, widths[1:], strict=False):
            self.body.extend([nn.Linear(width_in, width_out), nn.ReLU()])
        self.head = nn.Linear(widths[-1], outputs)

    def features(self, *inputs: Tensor) -> Tensor:
        dtype = next(self.body.parameters(), self.head.weight).dtype
        columns = [
            self.embeddings[f"input_{i}"](x) if f"input_{i}" in self.embeddings else x.reshape(len(x), -1).to(dtype)
            for i, x in enumerate(inputs)
        ]
        if self.context is not None:
            columns.append(self.context.expand(len(inputs[0]), -1))
        return self.body(torch.cat(columns, dim=1))

    def forward(self, *inputs: Tensor) -> Tensor:
        return self.head(self.features(*inputs))
