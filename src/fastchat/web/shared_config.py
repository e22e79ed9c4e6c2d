"""What a new session costs: Gradio describes all components of a page to itself for each, and here for all once.

That takes tens of milliseconds, for which everybody's updates would wait whenever somebody comes.
"""

from __future__ import annotations

from typing import Any

import gradio as gr
from gradio.blocks import BlocksConfig

Description = dict[str, Any]  # Any: Gradio's own


class SharedConfig(BlocksConfig):
    """The components of a page. Copies are those of a session, and share what they describe."""

    def __init__(self, root_block: gr.Blocks) -> None:
        super().__init__(root_block)
        self._known: dict[int, Description] = {}
        self._is_session = False

    def __copy__(self) -> SharedConfig:
        session = SharedConfig(self.root_block)
        copied: BlocksConfig = super().__copy__()  # type: ignore[no-untyped-call]  # Gradio's has no types
        vars(session).update(vars(copied), _known=self._known, _is_session=True)
        return session

    def config_for_block(  # type: ignore[override]  # static there, and always called on an instance
        self, _id: int, rendered_ids: list[int], block: Any, renderable: Any = None
    ) -> Description:
        """One component's description, with properties of its own that may be changed."""
        is_everyones = self._is_session and self.root_block.blocks.get(_id) is block
        if not is_everyones or renderable is not None:
            return super().config_for_block(_id, rendered_ids, block, renderable)
        if _id not in self._known:
            self._known[_id] = super().config_for_block(_id, rendered_ids, block, renderable)
        known = self._known[_id]
        return {**known, "props": dict(known["props"])}
