"""A transformer encoder of texts, small enough to be trained here, with LoRA adapters."""

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

ADAPTED = ("lora_", "head.")
FASTER = 10.0
"""Times its weights is a token's importance: Adam moves all weights alike, and of these there is one to a token."""


class Encoder(nn.Module):
    """tokens [n, length] int, mask [n, length] bool (True where there is a token) -> logits [n, outputs].

    Token and position embeddings, pre-norm layers (Xiong et al. 2020, https://arxiv.org/abs/2002.04745), the mean over
    the tokens present, each weighted by its learned importance (which starts equal), normalised, and the linear `head`.
    What is padding changes no output.

    It begins as about the mean of random token embeddings, which tell words apart before anything is learned, those
    never seen in training too: the wider they are, the better. The layers between are narrow, so that they are cheap
    and leave that standing.

    Args:
        input_shapes: of tokens and mask.
        outputs: of the head.
        vocabulary_size: how many tokens there are.
        width: of embeddings, and of what passes from layer to layer.
        layers, heads, head_width: how many layers; how many heads in each, and the width of each.
        feedforward: width of the hidden layer after attention.
        lora_rank: rank of the adapters on query and value projections (Hu et al. 2022, equation 3,
            https://arxiv.org/abs/2106.09685): W x + (alpha / rank) B A x, parameters `lora_b` and `lora_a`, with B = 0
            at the start. 0: none.
        lora_alpha: how far a step on the adapters reaches.
        frozen_base: all but `lora_*` and `head.*` stay as they are, also for the outer loop: constants, which travel
            in the checkpoint. A job gives them as `model.weights`, and is refused where any of them is not filled.

    Raises:
        ValueError: where a frozen base has no adapters.

    Example:
        >>> import torch
        >>> from metadist.models import Encoder
        >>> encoder = Encoder([[6], [6]], 3, vocabulary_size=20, width=8, lora_rank=1)
        >>> tokens = torch.tensor([[5, 7, 9, 0, 0, 0]])
        >>> encoder(tokens, tokens != 0).shape
        torch.Size([1, 3])
    """

    def __init__(
        self,
        input_shapes: Sequence[Sequence[int]],
        outputs: int,
        vocabulary_size: int = 4000,
        width: int = 512,
        layers: int = 1,
        heads: int = 4,
        head_width: int = 16,
        feedforward: int = 128,
        lora_rank: int = 0,
        lora_alpha: float = 8.0,
        frozen_base: bool = False,
    ):
        super().__init__()
        if frozen_base and not lora_rank:
            raise ValueError("frozen_base leaves the layers nothing to learn: set lora_rank to 1 or more, such as 4")
        self.tokens = nn.Embedding(vocabulary_size, width)
        self.positions = nn.Embedding(input_shapes[0][0], width)
        nn.init.normal_(self.positions.weight, std=0.1)
        self.layers = nn.ModuleList(
            Layer(width, heads, head_width, feedforward, (lora_rank, lora_alpha)) for _ in range(layers)
        )
        self.importance = nn.Embedding(vocabulary_size, 1)
        nn.init.zeros_(self.importance.weight)
        self.norm = nn.LayerNorm(width)
        nn.init.constant_(self.norm.weight, width**-0.25)  # distances of features, logits of class means, begin small
        self.head = nn.Linear(width, outputs)
        nn.init.zeros_(self.head.weight)  # no class before another: in a few inner steps one would remain so
        if frozen_base:
            for name, parameter in self.named_parameters():
                parameter.requires_grad_(any(part in name for part in ADAPTED))

    def features(self, tokens: Tensor, mask: Tensor) -> Tensor:
        x = self.tokens(tokens) + self.positions.weight[: tokens.shape[1]]
        away = (~mask).to(x.dtype) * -1e4  # finite, so that a text without tokens has derivatives
        for layer in self.layers:
            x = layer(x, away[:, None, None, :])
        weights = (FASTER * self.importance(tokens) + away.unsqueeze(-1)).softmax(dim=1)
        return self.norm((x * weights).sum(dim=1))

    def forward(self, tokens: Tensor, mask: Tensor) -> Tensor:
        return self.head(self.features(tokens, mask))


class Layer(nn.Module):
    """Self-attention, then two linear maps, each normalised before and added to what came in. [n, length, width] ->
    same; `away` [n, 1, 1, length] is added to what attention gives to each position, before its softmax."""

    def __init__(self, width: int, heads: int, head_width: int, feedforward: int, lora: tuple[int, float]):
        super().__init__()
        self.heads, inner = heads, heads * head_width
        self.norm_attention, self.norm_feedforward = nn.LayerNorm(width), nn.LayerNorm(width)
        self.query, self.value = AdaptedLinear(width, inner, *lora), AdaptedLinear(width, inner, *lora)
        self.key, self.out = nn.Linear(width, inner), nn.Linear(inner, width)
        self.up, self.down = nn.Linear(width, feedforward), nn.Linear(feedforward, width)
        for last in (self.out, self.down):
            nn.init.normal_(last.weight, std=0.1 / math.sqrt(last.in_features))
            nn.init.zeros_(last.bias)

    def forward(self, x: Tensor, away: Tensor) -> Tensor:
        y = self.norm_attention(x)
        query, key, value = (
            project(y).unflatten(-1, (self.heads, -1)).transpose(1, 2) for project in (self.query, self.key, self.value)
        )  # [n, heads, length, head_width]
        attended = F.scaled_dot_product_attention(query, key, value, attn_mask=away)
        x = x + self.out(attended.transpose(1, 2).flatten(-2))
        return x + self.down(F.gelu(self.up(self.norm_feedforward(x))))


class AdaptedLinear(nn.Linear):
    """W x + b + (alpha / rank) B A x, with A `lora_a` [rank, inputs] and B `lora_b` [outputs, rank], 0 at the start;
    without them at rank 0. [..., inputs] -> [..., outputs]."""

    def __init__(self, inputs: int, outputs: int, rank: int, alpha: float):
        super().__init__(inputs, outputs)
        self.factor = alpha / rank if rank else 0.0
        if rank:
            self.lora_a = nn.Parameter(torch.randn(rank, inputs) / math.sqrt(inputs))
            self.lora_b = nn.Parameter(torch.zeros(outputs, rank))

    def forward(self, x: Tensor) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        y = super().forward(x)
        return y + self.factor * F.linear(F.linear(x, self.lora_a), self.lora_b) if self.factor else y
