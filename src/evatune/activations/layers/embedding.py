"""Embeddings: rows are one-hot and are never formed; token numbers (n,) represent them."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator, Sequence
from typing import Any

from torch import Tensor, nn

from evatune.activations.layer_type import LayerType, Rows, described
from evatune.activations.rows import select
from evatune.errors import EvaError
from evatune.pca import StreamingPCA
from evatune.pca.one_hot import OneHotPCA


class EmbeddingType(LayerType):
    """Embeddings: rows are one-hot, so counting tokens is all there is to do."""

    def features(self, module: Any) -> tuple[int, int] | None:
        """Return (num_embeddings, embedding_dim)."""
        return (module.num_embeddings, module.embedding_dim) if isinstance(module, nn.Embedding) else None

    def form(self, module: Any) -> Hashable:
        """Return the size of the vocabulary, and the token that does not count."""
        return "tokens", module.num_embeddings, module.padding_idx

    def activations(self, module: Any, entering: Any) -> tuple[Tensor, ...]:
        """Return token numbers, (..., 1)."""
        if not isinstance(entering, Tensor) or entering.is_floating_point():
            raise EvaError(f"takes token numbers, but its input is {described(entering)}.")
        return (entering.unsqueeze(-1),)

    def rows(self, module: Any, entering: Any, masks: Sequence[Tensor | None] = (None,)) -> Iterator[Rows]:
        """Yield token numbers, (n,), without padding."""
        (activation,) = self.activations(module, entering)
        tokens_n = select(activation, masks[0]).squeeze(1)
        # The column of A that belongs to the padding token gets no gradient.
        yield tokens_n if module.padding_idx is None else tokens_n[tokens_n != module.padding_idx]

    def new_pca(self, module: Any, n_components: int, make: Callable[[int], StreamingPCA]) -> OneHotPCA:
        """Return a `OneHotPCA`."""
        return OneHotPCA(n_components, n_features=module.num_embeddings, center=make(1).center)
