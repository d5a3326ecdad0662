"""SASRec's network: a small causal transformer over a user's likes, and its file."""

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor, nn

from ccf_llm_hf.errors import InputError

ENCODER_FILE = "sasrec.safetensors"
FORMAT_VERSION = "1"
INITIAL_SCALE = 0.02  # as transformers are usually initialized (GPT, BERT)
SEQUENCES_AT_ONCE = 256  # bounds the memory of a pass


class SASRecEncoder(nn.Module):
    """States of users from their likes, and item vectors to multiply them with.

    A sequence opens with a learned start token, so that the empty history has a state too (our
    choice); blocks normalize first, as is usual today. States `(dim,)` are the last block's output,
    normalized. With `item_bias` an item has a bias and the model an offset. `known`, `(num_items,)`
    bool, marks the items that it was fitted on; it does not read the others.

    Args:
        num_items: items of the catalog.
        dim: of states and items.
        blocks: transformer blocks.
        heads: attention heads.
        max_history: likes read at most, the latest.
        dropout: of embeddings, attention output and feed-forward network.
        item_bias: whether items have a bias.
    """

    def __init__(
        self,
        num_items: int,
        dim: int,
        blocks: int,
        heads: int,
        max_history: int,
        dropout: float,
        item_bias: bool,
    ) -> None:
        super().__init__()
        self.settings = {
            "num_items": num_items,
            "dim": dim,
            "blocks": blocks,
            "heads": heads,
            "max_history": max_history,
            "dropout": dropout,
            "item_bias": item_bias,
        }
        self.known: Tensor
        self.max_history, self.dropout, self.item_bias = max_history, dropout, item_bias
        self.start_token = num_items
        self.items = nn.Embedding(num_items + 1, dim)
        self.positions = nn.Embedding(max_history + 1, dim)
        self.register_buffer("known", torch.zeros(num_items, dtype=torch.bool))
        for table in (self.items, self.positions):
            nn.init.normal_(table.weight, std=INITIAL_SCALE)
        self.blocks = nn.ModuleList(_Block(dim, heads, dropout) for _ in range(blocks))
        self.norm = nn.LayerNorm(dim)
        self.biases = nn.Parameter(torch.zeros(num_items), requires_grad=item_bias)
        self.offset = nn.Parameter(torch.zeros(1), requires_grad=item_bias)

    def forward(self, tokens: Tensor) -> Tensor:
        """States `(n, length, dim)` after each token of `(n, length)` int64, the start included.

        Attention is causal, so what pads a sequence behind its end changes nothing before it.
        """
        vectors = self.items(tokens) + self.positions.weight[: tokens.shape[1]]
        vectors = F.dropout(vectors, self.dropout, self.training)
        for block in self.blocks:
            vectors = block(vectors)
        return self.norm(vectors)

    def tokens(self, histories: Sequence[np.ndarray]) -> tuple[Tensor, Tensor]:
        """Histories as padded sequences.

        Args:
            histories: places of liked items in the catalog, oldest first, any number of them, of
                which the last `max_history` count; -1 and unknown items are left out of these.

        Returns:
            Tokens `(n, length)` int64, and how many likes each sequence holds, `(n,)` int64.
        """
        known = np.append(self.known.numpy(), False)  # which is where -1 points
        latest = [history[-self.max_history :] for history in histories]
        read = [history[known[history]] for history in latest]
        lengths = torch.tensor([len(history) for history in read], dtype=torch.int64)
        tokens = np.full((len(read), 1 + max(map(len, read), default=0)), self.start_token)
        for row, history in enumerate(read):
            tokens[row, 1 : 1 + len(history)] = history
        return torch.from_numpy(tokens), lengths

    @torch.no_grad()
    def states(self, histories: Sequence[np.ndarray]) -> Tensor:
        """The state `(n, dim)` float32 after each history, see [`tokens`]; without dropout."""
        training = self.training
        self.eval()
        tokens, lengths = self.tokens(histories)
        states = torch.empty(len(tokens), self.norm.weight.shape[0])
        # By length, so that little of a batch is padding.
        for rows in lengths.argsort().split(SEQUENCES_AT_ONCE):
            ends = lengths[rows]
            found = self(tokens[rows, : int(ends.max()) + 1])
            states[rows] = found[torch.arange(len(rows)), ends]
        self.train(training)
        return states

    def as_users(self, states: Tensor) -> Tensor:
        """User vectors of states: with item biases one more dimension, which holds 1."""
        return F.pad(states, (0, 1), value=1.0) if self.item_bias else states

    def item_vectors(self) -> Tensor:
        """`(num_items, dim)`, with item biases one more dimension, which holds them."""
        vectors = self.items.weight[:-1]
        return torch.cat([vectors, self.biases[:, None]], 1) if self.item_bias else vectors

    def to_bytes(self) -> bytes:
        """Weights and settings as a safetensors file."""
        metadata = {"format_version": FORMAT_VERSION, "settings": json.dumps(self.settings)}
        return save(self.state_dict(), metadata=metadata)

    @classmethod
    def load(cls, path: Path) -> "SASRecEncoder":
        """Read a file of [`to_bytes`]. Raises InputError that names it."""
        try:
            with safe_open(path, framework="pt") as file:
                metadata = file.metadata() or {}
                weights = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            if metadata["format_version"] != FORMAT_VERSION:
                raise InputError(
                    f"{path} has format version {metadata['format_version']}, this package reads "
                    f"{FORMAT_VERSION}; fit it again or update the package"
                )
            encoder = cls(**json.loads(metadata["settings"]))
            encoder.load_state_dict(weights)
        except (OSError, SafetensorError, KeyError, ValueError, TypeError, RuntimeError) as error:
            raise InputError(
                f"{path} is missing or no SASRec encoder ({error}); name the folder that "
                "`ccf-llm fit-cf sasrec` wrote, or fit it again"
            ) from error
        return encoder.eval()


class _Block(nn.Module):
    """Causal self-attention and a feed-forward network of the same width, each residual."""

    def __init__(self, dim: int, heads: int, dropout: float) -> None:
        super().__init__()
        self.heads, self.dropout = heads, dropout
        self.attention_norm, self.feed_norm = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.queries_keys_values = nn.Linear(dim, 3 * dim)
        self.output = nn.Linear(dim, dim)
        self.feed_in, self.feed_out = nn.Linear(dim, dim), nn.Linear(dim, dim)

    def forward(self, vectors: Tensor) -> Tensor:
        """`(n, length, dim)` to the same."""
        vectors = vectors + self._dropped(self.output(self._attended(vectors)))
        hidden = self._dropped(F.relu(self.feed_in(self.feed_norm(vectors))))
        return vectors + self._dropped(self.feed_out(hidden))

    def _attended(self, vectors: Tensor) -> Tensor:
        n, length, dim = vectors.shape
        projected = self.queries_keys_values(self.attention_norm(vectors))
        shape = (n, length, 3, self.heads, dim // self.heads)
        # -> (3, n, heads, length, dim / heads)
        queries, keys, values = projected.view(shape).permute(2, 0, 3, 1, 4)
        found = F.scaled_dot_product_attention(queries, keys, values, is_causal=True)
        return found.transpose(1, 2).reshape(n, length, dim)

    def _dropped(self, vectors: Tensor) -> Tensor:
        return F.dropout(vectors, self.dropout, self.training)
