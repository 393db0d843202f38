"""Iteration-level batching: rows join and leave between any two steps, and each step gives every row one token."""

import itertools
from collections import deque
from collections.abc import Sequence

import torch

from engines.llm.slot_network import SlotNetwork
from engines.text.drawing import draw
from engines.text.row import Row


class Batched:
    """The rows that are being computed, row i in slot i of the cache. Used by the engine thread alone.

    A row first reads its prompt (short ones together, a long one in pieces), then is decoded beside the others. When a
    row leaves, the last one takes its place.
    """

    def __init__(self, network: SlotNetwork, penalty: float, read_tokens: int) -> None:
        """penalty: the model's repetition penalty, 1 for none.

        read_tokens: prompt tokens read between two steps; more makes running rows wait, fewer makes new rows wait.
        """
        self.rows: list[Row] = []
        #: The rows that are being computed right now: if a pass raises, these have failed.
        self.stepping: Sequence[Row] = ()
        self._network = network
        self._cache = network.cache
        self._penalty = penalty
        self._read_tokens = read_tokens
        self._joins = itertools.count()
        #: Somebody had to leave for want of memory: nobody joins until a row has ended.
        self._crowded = False

    def turn(self, waiting: deque[Row]) -> None:
        """Let waiting rows join, then compute: some prompt, and one token for every row whose prompt is read.

        Raises CacheFull or torch.OutOfMemoryError where make_room() helps, and whatever else a forward pass may raise.
        """
        for row in self.rows:
            if len(row.ids) - row.cached > 1:  # gets no token in this turn
                row.poll()
        self.reap()
        self._admit(waiting)
        self._read_short()
        self._read_long()
        self._decode()

    def make_room(self) -> Sequence[Row]:
        """Take out the row that joined last, to be computed again from its text so far, and let nobody in for now."""
        if len(self.rows) == 1:
            return []
        row = max(self.rows, key=lambda row: row.joined)
        self._remove(row)
        row.cached = 0
        self._crowded = True
        return [row]

    def reap(self) -> None:
        """Take out the rows that have ended."""
        for row in [row for row in self.rows if row.ended.is_set()]:
            self._remove(row)
            self._crowded = False

    def _remove(self, row: Row) -> None:
        slot, last = self.rows.index(row), self.rows.pop()
        if last is not row:
            self._cache.move(len(self.rows), slot, last.cached)
            self.rows[slot] = last

    def _admit(self, waiting: deque[Row]) -> None:
        while waiting and not self._crowded:
            columns = max(len(row.ids) for row in (*self.rows, waiting[0])) + 1
            if self.rows and not self._cache.fits(len(self.rows) + 1, columns):
                break
            row = waiting.popleft()
            row.joined = next(self._joins)
            self.rows.append(row)

    def _read_short(self) -> None:
        """Read as many whole prompts as one pass may hold."""
        group, room = [], self._read_tokens
        for slot, row in enumerate(self.rows):
            if row.cached == 0 and len(row.ids) <= room:
                group.append(slot)
                room -= len(row.ids)
        if group:
            rows = self._begin([self.rows[slot] for slot in group], max(len(self.rows[slot].ids) for slot in group))
            logits = self._network.read_prompts([row.ids for row in rows], group)
            for row in rows:
                row.cached = len(row.ids)
            self._accept(rows, logits)

    def _read_long(self) -> None:
        """Read the next piece of one prompt that is too long for a single pass."""
        for slot, row in enumerate(self.rows):
            if len(row.ids) > self._read_tokens and len(row.ids) - row.cached > 1:
                piece = row.ids[row.cached : row.cached + self._read_tokens]
                self._begin([row], row.cached + len(piece))
                logits = self._network.read_piece(piece, row.cached, slot)
                row.cached += len(piece)
                if row.cached == len(row.ids):
                    self._accept([row], logits)
                return

    def _decode(self) -> None:
        """One more token for every row that has only its newest token left to compute."""
        rows = [row for row in self.rows if len(row.ids) - row.cached == 1]
        if rows:
            self._begin(rows, max(len(row.ids) for row in rows))
            ready = set(rows)
            logits = self._network.step(
                [row.ids[-1] for row in self.rows], [row.cached if row in ready else -1 for row in self.rows]
            )
            if len(rows) < len(self.rows):
                logits = logits[[slot for slot, row in enumerate(self.rows) if row in ready]]
            for row in rows:
                row.cached += 1
            self._accept(rows, logits)

    def _begin(self, rows: list[Row], columns: int) -> list[Row]:
        """Name the rows of the coming pass, and see to it that the cache holds them and everyone else."""
        self.stepping = rows
        self._cache.hold(len(self.rows), max(columns, *(row.cached for row in self.rows)))
        return rows

    def _accept(self, rows: list[Row], logits: torch.Tensor) -> None:
        """Give each row its next token, drawn from its logits, shape (rows, vocabulary)."""
        for row, token in zip(rows, draw(rows, logits, self._penalty), strict=True):
            if token is None:
                self._cache.clear(self.rows.index(row))
            else:
                row.accept(token)
        self.reap()
