"""What one update of an answer costs: Gradio hands each output to a thread and searches it for files, here text alone.

While answers stream nothing changes but what the panes say. Everything else goes the way that Gradio has for it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import gradio as gr

from fastchat.web.chat_pane import ChatPane
from fastchat.web.components import AS_IT_IS


class StreamedBlocks(gr.Blocks):
    """A page whose streamed updates are written at once."""

    async def postprocess_data(self, block_fn: Any, predictions: Any, state: Any) -> list[Any]:  # Any: Gradio's own
        """The outputs of one update as the browser gets them."""
        outputs = block_fn.outputs
        if isinstance(predictions, Sequence) and len(outputs) == len(predictions) and state is not None:
            pairs = list(zip(outputs, predictions, strict=True))
            if all(_is_streamed(block, value) for block, value in pairs):
                return [_streamed(block, value, state) for block, value in pairs]
        written: list[Any] = await super().postprocess_data(block_fn, predictions, state)
        return written


def _is_streamed(block: Any, value: Any) -> bool:
    if block.stateful:
        return not isinstance(value, dict)  # Gradio's own mark for "as it is" is a dict
    return value is AS_IT_IS or (isinstance(block, ChatPane) and isinstance(value, list))


def _streamed(block: Any, value: Any, state: Any) -> Any:
    if block.stateful:
        state[block._id] = value  # noqa: SLF001 - the key that Gradio keeps a state by
        return None
    return gr.skip() if value is AS_IT_IS else block.postprocess(value).model_dump()
