"""The served models as GET /v1/models shows them, from the table."""

from __future__ import annotations

from typing import Any

from fastchat.api import model_cards
from fastchat.cluster.contract import TableSnapshot
from fastchat.cluster.dispatch import served_models
from fastchat.errors import ModelNotFoundError


def model_list(snapshot: TableSnapshot) -> dict[str, Any]:  # Any: JSON
    """All models, sorted by name. One that several workers serve is listed once, as old as the oldest of them."""
    return model_cards.model_list(sorted(_created_by_model(snapshot).items()))


def model_card(snapshot: TableSnapshot, name: str) -> dict[str, Any]:  # Any: JSON
    """One model's card. Raises `ModelNotFoundError`."""
    created = _created_by_model(snapshot)
    if name not in created:
        raise ModelNotFoundError(name, served_models(snapshot))
    return model_cards.model_card(name, created[name])


def _created_by_model(snapshot: TableSnapshot) -> dict[str, int]:
    created: dict[str, int] = {}
    for worker in snapshot.workers:
        for model in worker.models:
            created[model.name] = min(created.get(model.name, model.created), model.created)
    return created
