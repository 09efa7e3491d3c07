"""A small text model: a weighted mean of token embeddings, then a fully connected network."""

from collections.abc import Sequence

from torch import Tensor, nn


class Bag(nn.Module):
    """tokens [n, length] int, mask [n, length] bool -> logits [n, outputs].

    Embeddings of the tokens present are averaged (Iyyer et al. 2015, deep averaging network), each weighted by its
    learned importance, which starts equal; then normalised, and passed through one hidden layer (none with `hidden=0`)
    to the linear `head`.
    """

    def __init__(
        self,
        input_shapes: Sequence[Sequence[int]],
        outputs: int,
        vocabulary_size: int = 4000,
        embedding: int = 256,
        hidden: int = 0,
    ):
        super().__init__()
        del input_shapes
        self.embedding = nn.Embedding(vocabulary_size, embedding)
        self.importance = nn.Embedding(vocabulary_size, 1)
        nn.init.zeros_(self.importance.weight)
        self.body = nn.Sequential(nn.LayerNorm(embedding))
        if hidden:
            self.body.extend([nn.Linear(embedding, hidden), nn.ReLU()])
        self.head = nn.Linear(hidden or embedding, outputs)

    def features(self, tokens: Tensor, mask: Tensor) -> Tensor:
        importance = self.importance(tokens).masked_fill(~mask.unsqueeze(-1), -1e4)
        mean = (self.embedding(tokens) * importance.softmax(dim=1)).sum(dim=1)
        return self.body(mean)

    def forward(self, tokens: Tensor, mask: Tensor) -> Tensor:
        return self.head(self.features(tokens, mask))
