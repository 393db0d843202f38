"""Keys and values of all running rows: one slot a row, one column a token, no padding.

transformers' models write to it and read from it as from any cache; what a forward pass writes where, and what it may
read, is the Plan that is set before the pass.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from transformers.cache_utils import Cache, CacheLayerMixin

from engines.thread import NoRoom

#: Columns are added in blocks of this many: each growth copies what is there.
BLOCK = 256


class CacheFull(NoRoom):
    """The rows need more memory than the cache may have."""


@dataclass(slots=True)
class Plan:
    """What one forward pass does with the cache."""

    #: Where each token of the pass goes, as row * columns + column; shape (tokens,). The last place is a bin.
    places: torch.Tensor
    #: First row, row behind the last, and number of columns that attention sees; None if it sees this pass alone.
    view: tuple[int, int, int] | None


class SlotLayer(CacheLayerMixin):  # type: ignore[misc]
    """One layer's part. Tokens lie behind each other, so that a write is one copy of whole tokens."""

    is_sliding = False

    def __init__(self, cache: "SlotCache") -> None:
        super().__init__()
        self._cache = cache
        #: Rows and columns that are there; shape of keys: (rows * columns + 1, heads, width).
        self._rows = 0
        self._columns = 0

    @property
    def bytes_per_token(self) -> int:
        """Memory that one token takes in this layer."""
        return int(self.keys[0].nbytes + self.values[0].nbytes) if self.is_initialized else 0

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        """Allocate for states of that shape, dtype and device."""
        tokens = self._cache.rows * self._cache.columns + 1
        # Zeros: a masked column counts for nothing only while it holds a number (0 x NaN is NaN).
        self.keys = key_states.new_zeros((tokens, key_states.shape[1], key_states.shape[3]))
        self.values = value_states.new_zeros((tokens, value_states.shape[1], value_states.shape[3]))
        self._rows, self._columns = self._cache.rows, self._cache.columns
        self.is_initialized = True

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: object, **kwargs: object
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Write the states of this pass, shape (rows, heads, tokens, width), and return those that attention sees."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        plan = self._cache.plan
        places = plan.places.to(key_states.device)
        self.keys.index_copy_(0, places, key_states.transpose(1, 2).flatten(0, 1))
        self.values.index_copy_(0, places, value_states.transpose(1, 2).flatten(0, 1))
        if plan.view is None:
            return key_states, value_states
        first, end, columns = plan.view
        keys, values = self._grid(self.keys), self._grid(self.values)
        return keys[first:end, :columns].transpose(1, 2), values[first:end, :columns].transpose(1, 2)

    def resize(self, rows: int, columns: int) -> None:
        """Allocate again, keeping the rows and columns that are in both."""
        if not self.is_initialized or (rows, columns) == (self._rows, self._columns):
            return
        keep = min(rows, self._rows), min(columns, self._columns)
        self.keys, self.values = (self._copy(old, rows, columns, *keep) for old in (self.keys, self.values))
        self._rows, self._columns = rows, columns

    def move(self, source: int, target: int, length: int) -> None:
        """Copy the first `length` columns of one row to another."""
        for states in (self.keys, self.values):
            grid = self._grid(states)
            grid[target, :length] = grid[source, :length]

    def clear(self, row: int) -> None:
        """Fill a row with zeros."""
        for states in (self.keys, self.values):
            self._grid(states)[row] = 0

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Never asked: every pass brings its own mask."""
        return query_length, 0

    def get_seq_length(self) -> int:
        """Never asked: every pass brings its own positions."""
        return 0

    def get_max_length(self) -> int:
        """Columns that are there."""
        return self._columns

    def _grid(self, states: torch.Tensor) -> torch.Tensor:
        """The states without the bin, shape (rows, columns, heads, width)."""
        return states[:-1].view(self._rows, self._columns, *states.shape[1:])

    def _copy(self, old: torch.Tensor, rows: int, columns: int, keep_rows: int, keep_columns: int) -> torch.Tensor:
        new = old.new_zeros((rows * columns + 1, *old.shape[1:]))
        grid = new[:-1].view(rows, columns, *old.shape[1:])
        grid[:keep_rows, :keep_columns] = self._grid(old)[:keep_rows, :keep_columns]
        return new


class SlotCache(Cache):  # type: ignore[misc]
    """The cache of one model, as large as the rows need and the budget allows."""

    def __init__(self, layers: int, slots: int) -> None:
        self.plan: Plan
        self.rows = 1
        self.columns = BLOCK
        #: Rows there may ever be.
        self.slots = slots
        #: Tokens that rows x columns may come to; set once the size of a token is known.
        self.budget_tokens = slots * BLOCK
        super().__init__(layers=[SlotLayer(self) for _ in range(layers)])

    @property
    def bytes_per_token(self) -> int:
        """Memory that one token takes in all layers; known after the first pass."""
        return sum(layer.bytes_per_token for layer in self.layers)

    def fits(self, rows: int, columns: int) -> bool:
        """Whether so many rows of so many columns are within the budget."""
        return rows <= self.slots and rows * columns <= self.budget_tokens

    def hold(self, rows: int, columns: int) -> None:
        """Make room for so many rows of so many columns.

        Raises CacheFull beyond the budget, torch.OutOfMemoryError where the device has less; both leave the rows whole.
        """
        if rows <= self.rows and columns <= self.columns:
            return
        if not self.fits(rows, columns):
            raise CacheFull(f"{rows} rows of {columns} tokens do not fit the {self.budget_tokens} there is room for")
        wide = max(-(-columns // BLOCK) * BLOCK, self.columns)
        if rows * wide > self.budget_tokens:
            wide = min(-(-columns // BLOCK) * BLOCK, self.budget_tokens // rows)
        many = min(self.slots, self.budget_tokens // wide)
        # If a layer finds no memory, the layers differ in size: (0, 0) makes the next call bring them together.
        self.rows = self.columns = 0
        for layer in self.layers:
            layer.resize(many, wide)
        self.rows, self.columns = many, wide

    def move(self, source: int, target: int, length: int) -> None:
        """Copy the first `length` columns of one row to another."""
        for layer in self.layers:
            layer.move(source, target, length)

    def clear(self, row: int) -> None:
        """Fill a row with zeros, after it held what is no number."""
        for layer in self.layers:
            layer.clear(row)

    def places(self, rows: Sequence[int], columns: Sequence[int]) -> list[int]:
        """Where the tokens at these rows and columns lie; a negative column is the bin."""
        bin_place = self.rows * self.columns
        return [
            row * self.columns + column if column >= 0 else bin_place for row, column in zip(rows, columns, strict=True)
        ]
