"""The page as an app: guard, shell, the page's own small routes, and Gradio behind them."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from functools import partial
from typing import Any

import gradio as gr
from fastapi import FastAPI
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Mount, Route
from starlette.types import ASGIApp

from fastchat.web.answering import Answerer
from fastchat.web.api_client import ApiClient
from fastchat.web.arena_tab import ARENA_KINDS, ArenaTab
from fastchat.web.chat_tab import ChatTab
from fastchat.web.config import PageConfig
from fastchat.web.guard import Guard
from fastchat.web.judging import JudgeButtons
from fastchat.web.leaderboard_tab import LeaderboardTab
from fastchat.web.login import LoginGate
from fastchat.web.served_models import ServedModels
from fastchat.web.shared_config import SharedConfig
from fastchat.web.shell import ASSETS, PageShell, asset_response
from fastchat.web.streamed_blocks import StreamedBlocks
from fastchat.web.theme import page_theme
from fastchat.web.translation import gradio_tables, label


def create_web_app(config: PageConfig) -> ASGIApp:
    """The whole page. It opens its connection to the API server in its lifespan."""
    client = ApiClient(config.api_url, api_key=config.api_key)
    models = ServedModels(client, mode=config.model_list_mode, expected=config.expected_models)

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        async with client.keep_open():
            yield

    app = FastAPI(lifespan=lifespan, openapi_url=None, docs_url=None, redoc_url=None)
    app.router.routes.extend(_own_routes(models))
    gr.mount_gradio_app(
        app,
        _blocks(config, client, models),
        path="/",
        auth=config.accounts.are_right if config.accounts else None,
        root_path=config.root_path or None,
        allowed_paths=[],
        max_file_size=1,
        show_error=False,
        footer_links=[],
        run_history=False,
        ssr_mode=False,
        enable_monitoring=False,
        pwa=False,
        mcp_server=False,
        i18n=gradio_tables(),
        theme=page_theme(),
    )
    if config.accounts is None:
        return Guard(PageShell(app), allowed_hosts=config.allowed_hosts)
    gradio_app = next(route.app for route in app.router.routes if isinstance(route, Mount))
    gate = LoginGate(PageShell(app), partial(_is_logged_in, gradio_app))
    return Guard(gate, allowed_hosts=config.allowed_hosts, has_login=True)


def _is_logged_in(gradio_app: Any, cookies: dict[str, str]) -> bool:  # Any: Gradio's own app, with its sessions
    names = (f"access-token-{gradio_app.cookie_id}", f"access-token-unsecure-{gradio_app.cookie_id}")
    return any(cookies.get(name) in gradio_app.tokens for name in names)


def _blocks(config: PageConfig, client: ApiClient, models: ServedModels) -> gr.Blocks:
    answerer = Answerer(client)
    chat = ChatTab(models, answerer, JudgeButtons(client), max_answers=config.max_answers)
    compare, battle = (ArenaTab(kind, models, client, answerer, max_answers=config.max_answers) for kind in ARENA_KINDS)
    blocks = StreamedBlocks(analytics_enabled=False, title="FastChat", fill_width=True)
    blocks.default_config = SharedConfig(blocks)
    with blocks:
        gr.HTML('<div id="page-end"></div>', elem_id="page-end-box", js_on_load=None, apply_default_css=False)
        with gr.Tabs(elem_id="tabs"):
            with gr.Tab(label("tab_chat"), id="chat"):
                chat.build()
            for kind, tab in zip(ARENA_KINDS, (compare, battle), strict=True):
                with gr.Tab(label(f"tab_{kind}"), id=kind):
                    tab.build()
            with gr.Tab(label("tab_leaderboard"), id="leaderboard") as board:
                LeaderboardTab(client).build(board)
        chat.listen(blocks, followers=compare.models)
    blocks.queue(default_concurrency_limit=None, api_open=False, max_size=None)
    return blocks


def _own_routes(models: ServedModels) -> list[Route]:
    async def show_models(_: Request) -> Response:
        await models.refresh()
        return JSONResponse(models.as_json(), headers={"cache-control": "no-store"})

    async def show_asset(_: Request, name: str) -> Response:
        return asset_response(name)

    return [
        Route("/page/models", show_models),
        *(Route(f"/page/{name}", partial(show_asset, name=name)) for name in ASSETS),
    ]
