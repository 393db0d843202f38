"""How far a workflow has come, from what ComfyUI tells of it on its socket."""

from collections.abc import Collection, Mapping
from typing import Any

from engines.contract import Progress

#: A prompt that is told of by one of these has ended, or soon will have.
_ENDS = ("execution_success", "execution_error", "execution_interrupted")


class Nodes:
    """Which nodes of a workflow are done."""

    def __init__(self, ids: Collection[str]) -> None:
        """ids: of the workflow's nodes. Others, which nodes put in their own place as they run, do not count."""
        self._ids = frozenset(ids)
        self._done: set[str] = set()
        self._current: str | None = None
        #: Newer servers say which nodes are done; with others the one before is done when the next begins.
        self._exact = False
        #: The share of the current node's steps that are done.
        self._share = 0.0
        self._told = 0.0

    @property
    def progress(self) -> Progress:
        """Nodes that are done, those from ComfyUI's cache among them, and the part of the one that runs."""
        part = self._share if self._current not in self._done else 0.0
        # Never back: what one node puts in its place may begin anew.
        self._told = max(self._told, round(len(self._done) + part, 3))
        return Progress(self._told, len(self._ids), "node")

    def finish(self) -> None:
        """All are done, those that nothing asked for among them."""
        self._done = set(self._ids)

    def hear(self, message: Mapping[str, Any], prompt_id: str) -> bool:
        """Take one message in; True if it says that the prompt has ended."""
        kind, data = message.get("type"), message.get("data")
        if not isinstance(data, dict) or data.get("prompt_id") != prompt_id:
            return False
        match kind:
            case "execution_cached":
                self._done |= self._ids & set(data.get("nodes", []))
            case "executing":
                if data.get("node") is None:
                    return True
                self._begin(str(data.get("display_node") or data["node"]))
            case "progress":
                self._step(str(data.get("node")), data)
            case "progress_state":
                self._exact = True
                for node, state in data.get("nodes", {}).items():
                    shown = str(state.get("display_node_id") or node)
                    if state.get("state") == "running":
                        self._begin(shown)
                        self._step(shown, state)
                    elif state.get("state") == "finished":
                        self._done |= self._ids & {node}
        return kind in _ENDS

    def _begin(self, node: str) -> None:
        if node in self._ids and node != self._current:
            if self._current is not None and not self._exact:
                self._done.add(self._current)
            self._current, self._share = node, 0.0

    def _step(self, node: str, said: Mapping[str, Any]) -> None:
        value, most = said.get("value"), said.get("max")
        if node == self._current and isinstance(value, (int, float)) and isinstance(most, (int, float)) and most > 0:
            self._share = min(max(value / most, 0.0), 1.0)
