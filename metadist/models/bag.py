"""A small text model: the mean of token embeddings, then a fully connected network."""

from collections.abc import Sequence

from torch import Tensor, nn


class Bag(nn.Module):
    """tokens [n, length] int, mask [n, length] bool -> logits [n, outputs].

    Embeddings of the tokens present are averaged (Iyyer et al. 2015, deep averaging network), normalised, and passed
    through one hidden layer to the linear `head`.
    """

    def __init__(
        self,
        input_shapes: Sequence[Sequence[int]],
        outputs: int,
        vocabulary_size: int = 4000,
        embedding: int = 128,
        hidden: int = 128,
    ):
        super().__init__()
        del input_shapes
        self.embedding = nn.Embedding(vocabulary_size, embedding)
        self.body = nn.Sequential(nn.LayerNorm(embedding), nn.Linear(embedding, hidden), nn.ReLU())
        self.head = nn.Linear(hidden, outputs)

    def forward(self, tokens: Tensor, mask: Tensor) -> Tensor:
        present = mask.unsqueeze(-1).to(self.head.weight.dtype)
        mean = (self.embedding(tokens) * present).sum(dim=1) / present.sum(dim=1).clamp(min=1)
        return self.head(self.body(mean))
