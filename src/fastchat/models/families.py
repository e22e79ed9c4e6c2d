"""The families of models that run here, as data: an allow-list. Torch-free; `weights.py` builds what it names.

A family says which class of transformers computes it, how its `config.json` becomes that class's configuration, and
how its tensors are called there. Nothing else in the package asks which family a model belongs to.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from fastchat.errors import UnsupportedModelError
from fastchat.models import chatglm
from fastchat.models.stored_quantization import stored_quantization

Config = Mapping[str, Any]  # Any: config.json as it is on disk

STATIC_ROPE_TYPES = frozenset({"default", "linear", "llama3", "yarn"})
"""Kinds of rotary embedding whose angles depend on the position alone, never on the rest of the batch."""

MAX_SIZES: Mapping[str, int] = {
    "vocab_size": 2**22,
    "padded_vocab_size": 2**22,
    "hidden_size": 2**20,
    "intermediate_size": 2**20,
    "ffn_hidden_size": 2**20,
    "num_hidden_layers": 2**10,
    "num_layers": 2**10,
    "num_attention_heads": 2**14,
    "num_key_value_heads": 2**14,
    "multi_query_group_num": 2**14,
    "head_dim": 2**14,
    "kv_channels": 2**14,
}
"""Far above every model there is. A larger number is a damaged file, and would take all memory before it is noticed."""

NATIVE_OPTIONS = frozenset(
    {
        "vocab_size",
        "hidden_size",
        "intermediate_size",
        "num_hidden_layers",
        "num_attention_heads",
        "num_key_value_heads",
        "head_dim",
        "hidden_act",
        "rms_norm_eps",
        "max_position_embeddings",
        "original_max_position_embeddings",
        "rope_parameters",
        "rope_scaling",
        "rope_theta",
        "partial_rotary_factor",
        "attention_bias",
        "mlp_bias",
        "sliding_window",
        "use_sliding_window",
        "max_window_layers",
        "layer_types",
        "tie_word_embeddings",
    }
)
"""What a config.json may say to transformers: the maths. The other keys are for training, or choose code to be run:
`auto_map` names remote code, and `attn_implementation` a kernel that transformers would download."""

WINDOW_OF_QWEN = 4096
"""Where use_sliding_window is set and no window is given."""

DECODER_PARTS = ("embed_tokens.", "layers.", "norm.")
"""How the names of a decoder's tensors begin in transformers' own classes."""


@dataclass(frozen=True, slots=True)
class Family:
    """One kind of model. `name` is the `model_type` of its config.json; class names are transformers' own."""

    name: str
    model_class: str
    config_class: str
    check_config: Callable[[Config], None]
    """Raises `UnsupportedModelError` for an option that would change the result and that we do not compute."""
    map_config: Callable[[Config, str | None], dict[str, Any]]  # Any: values of a JSON file
    """config.json and the recognised chat format -> the keyword arguments of `config_class`."""
    rename: Callable[[str], tuple[str, ...]]
    """A tensor's name on disk -> the parameters it holds, stacked along its rows; none for one that is not needed."""


def find_family(config: Config) -> Family:
    """The family of a checkpoint, its options checked. Raises `UnsupportedModelError`."""
    model_type = config.get("model_type")
    family = FAMILIES.get(model_type) if isinstance(model_type, str) else None
    if family is None:
        raise UnsupportedModelError(
            f"config.json: the architecture {model_type!r} does not run here; families that do: {', '.join(FAMILIES)}"
        )
    _refuse_absurd_sizes(config)
    stored_quantization(config)  # raises for what is not read
    _refuse_moving_angles(config)
    family.check_config(config)
    return family


def rope_options(config: Config) -> Config:
    """The options of the rotary embedding; empty for the plain one. Of both keys transformers obeys the old one."""
    options = config.get("rope_scaling") or config.get("rope_parameters") or {}
    return options if isinstance(options, Mapping) else {}


def rope_type(config: Config) -> str:
    """The kind of rotary embedding: `default`, `linear`, `yarn`, ..."""
    options = rope_options(config)
    return str(options.get("rope_type") or options.get("type") or "default")


def _refuse_absurd_sizes(config: Config) -> None:
    for name, limit in MAX_SIZES.items():
        value = config.get(name)
        if isinstance(value, int | float) and value > limit:
            raise UnsupportedModelError(
                f"config.json: {name} is {value}, above {limit}, which no model has; download the file again"
            )


def _refuse_moving_angles(config: Config) -> None:
    """Angles computed from the batch would make one user's numbers depend on another's length."""
    nested = [name for name, value in rope_options(config).items() if isinstance(value, Mapping)]
    if nested:
        raise UnsupportedModelError(
            f"config.json: a rotary embedding for {nested[0]} alone does not run here; one for all layers does"
        )
    kind = rope_type(config)
    if kind not in STATIC_ROPE_TYPES:
        raise UnsupportedModelError(
            f"config.json: the rotary embedding {kind!r} does not run here (its angles depend on the batch or are "
            f"not known); kinds that do: {', '.join(sorted(STATIC_ROPE_TYPES))}"
        )


def _accept_config(_config: Config) -> None:
    """transformers' own class obeys every option of this family."""


def _refuse_partial_rotation(config: Config) -> None:
    """Without scaling these classes rotate whole heads whatever the file says; with it, transformers fails."""
    kind = rope_type(config)
    share = rope_options(config).get("partial_rotary_factor") or config.get("partial_rotary_factor") or 1.0
    if share != 1.0 and kind != "default":
        raise UnsupportedModelError(
            f"config.json: partial_rotary_factor {share!r} with the rotary embedding {kind!r} does not run here for "
            f"{config.get('model_type')}"
        )


def _check_mistral(config: Config) -> None:
    _refuse_partial_rotation(config)
    _refuse_empty_window(config.get("sliding_window"))


def _check_qwen(config: Config) -> None:
    """Layers that slide need a window, which these families have only where they are told to use it."""
    _refuse_partial_rotation(config)
    window = config.get("sliding_window", WINDOW_OF_QWEN) if config.get("use_sliding_window") else None
    _refuse_empty_window(window)
    layer_types = config.get("layer_types")
    if window is None and isinstance(layer_types, list) and "sliding_attention" in layer_types:
        raise UnsupportedModelError(
            "config.json: layer_types has sliding_attention, but use_sliding_window and sliding_window give no window; "
            "correct the file"
        )


def _refuse_empty_window(window: object) -> None:
    if isinstance(window, int | float) and window < 1:
        raise UnsupportedModelError(f"config.json: sliding_window is {window}; correct the file (null is no window)")


def _same_config(config: Config, _format_name: str | None) -> dict[str, Any]:  # Any: values of a JSON file
    """The file is the configuration, as far as it says what to compute."""
    options = {key: value for key, value in config.items() if key in NATIVE_OPTIONS}
    return options | {"pad_token_id": None}  # a class's own default may lie outside of this vocabulary


def _same_name(name: str) -> tuple[str, ...]:
    """Old checkpoints carry the rotary angles of each layer, which are computed here; embedding models are often saved
    without their output head, and so without the prefix that sets the decoder apart from it."""
    if "rotary_emb" in name.split("."):
        return ()
    return (f"model.{name}" if name.startswith(DECODER_PARTS) else name,)


def _native(name: str, prefix: str, check_config: Callable[[Config], None] = _refuse_partial_rotation) -> Family:
    """A family whose checkpoints are in transformers' own layout."""
    return Family(
        name=name,
        model_class=f"{prefix}ForCausalLM",
        config_class=f"{prefix}Config",
        check_config=check_config,
        map_config=_same_config,
        rename=_same_name,
    )


FAMILIES: Mapping[str, Family] = {
    family.name: family
    for family in (
        Family(
            name="chatglm",
            model_class="GlmForCausalLM",
            config_class="GlmConfig",
            check_config=chatglm.check_config,
            map_config=chatglm.map_config,
            rename=chatglm.rename,
        ),
        _native("glm", "Glm", _accept_config),
        _native("llama", "Llama"),
        _native("mistral", "Mistral", _check_mistral),
        _native("qwen2", "Qwen2", _check_qwen),
        _native("qwen3", "Qwen3", _check_qwen),
    )
}
