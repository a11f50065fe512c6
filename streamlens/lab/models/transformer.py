"""`TransformerLM`: a small language model, which reads images too."""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor, nn
from torch.nn import functional

from streamlens.lab.models._checks import check_probability, check_sizes

__all__ = ["TransformerLM"]


class TransformerLM(nn.Module):
    """A causal transformer in the manner of GPT-2: no position sees a later one.

    Learned positions, then `depth` blocks of attention and a perceptron with GELU, each behind a
    layer norm and beside a shortcut; a last layer norm and a linear layer (Radford et al., Language
    Models are Unsupervised Multitask Learners, 2019; the weights of words and classifier are not
    shared). Queries, keys and values come from one linear layer, so that every weight belongs to a
    module that is called.

    Read as text, `image_size` is the longest text, `classes` the vocabulary and `channels` must be 1;
    every position predicts the next token. Read as images, the words of the text are the rows of the
    image, and the position of the last row predicts the class.

    Args:
        channels: Channels of an image.
        image_size: Height and width of an image in pixels, or the longest text in tokens.
        classes: Number of classes, or of different tokens.
        text: Whether it is given token ids instead of images.
        width: Features of a position, a multiple of `heads`.
        depth: Number of blocks.
        heads: Attention heads of a block.
        dropout: Probability of dropping a feature, in [0, 1).

    Raises:
        ValueError: An option is out of its range.
    """

    def __init__(
        self,
        *,
        channels: int = 3,
        image_size: int = 32,
        classes: int = 10,
        text: bool = False,
        width: int = 64,
        depth: int = 2,
        heads: int = 4,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        check_sizes(
            "TransformerLM",
            channels=channels,
            image_size=image_size,
            classes=classes,
            width=width,
            depth=depth,
            heads=heads,
        )
        check_probability("TransformerLM", dropout=dropout)
        if width % heads:
            raise ValueError(f"TransformerLM: width must be a multiple of heads, got {width} and {heads}")
        if text and channels != 1:
            raise ValueError(f"TransformerLM: a text has 1 channel, got channels={channels}")
        self.text = text
        self.words: nn.Module = (
            nn.Embedding(classes, width) if text else nn.Linear(channels * image_size, width)
        )
        self.positions = nn.Embedding(image_size, width)
        self.dropout = nn.Dropout(dropout)
        self.blocks = nn.Sequential(*(_Block(width, heads, dropout) for _ in range(depth)))
        self.norm = nn.LayerNorm(width)
        self.classifier = nn.Linear(width, classes)

    def forward(self, inputs: Tensor) -> Tensor:
        """What comes next, as logits.

        Args:
            inputs: Token ids, int64 `(batch, length)`, or images, `(batch, channels, height, width)`.

        Returns:
            `(batch, classes, length)` of a text, the shape in which `CrossEntropyLoss` takes it beside
            labels `(batch, length)`; `(batch, classes)` of images.

        Raises:
            ValueError: A text is longer than the longest.
        """
        words = inputs if self.text else inputs.transpose(1, 2).flatten(2)
        length = words.shape[1]
        if length > self.positions.num_embeddings:
            raise ValueError(
                f"TransformerLM: the longest text has {self.positions.num_embeddings} tokens "
                f"(image_size=), got {length}"
            )
        places = self.positions(torch.arange(length, device=words.device))
        features = self.norm(self.blocks(self.dropout(self.words(words) + places)))
        if self.text:
            return cast("Tensor", self.classifier(features)).transpose(1, 2)
        return cast("Tensor", self.classifier(features[:, -1]))


class _Block(nn.Module):
    """Attention to what came before, then a perceptron at each position."""

    def __init__(self, width: int, heads: int, dropout: float) -> None:
        super().__init__()
        self.heads = heads
        self.attention_norm = nn.LayerNorm(width)
        self.attention_in = nn.Linear(width, 3 * width)
        self.attention_out = nn.Linear(width, width)
        self.perceptron = nn.Sequential(
            nn.LayerNorm(width),
            nn.Linear(width, 4 * width),
            nn.GELU(),
            nn.Linear(4 * width, width),
            nn.Dropout(dropout),
        )
        self.dropout = nn.Dropout(dropout)

    def forward(self, features: Tensor) -> Tensor:
        features = features + self.dropout(self._attend(self.attention_norm(features)))
        return features + cast("Tensor", self.perceptron(features))

    def _attend(self, features: Tensor) -> Tensor:
        query, key, value = (
            part.unflatten(-1, (self.heads, -1)).transpose(1, 2)
            for part in self.attention_in(features).chunk(3, dim=-1)
        )
        seen = functional.scaled_dot_product_attention(query, key, value, is_causal=True)
        return cast("Tensor", self.attention_out(seen.transpose(1, 2).flatten(2)))
