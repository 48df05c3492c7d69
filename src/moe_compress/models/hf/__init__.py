"""The seam to transformers: the only files that touch its internals; pinned to 5.23, held by identity tests.

configs, config_checks: config.json values; skeleton: models without weights; edited_architectures: edited types;
state_dict: checkpoint tensors <-> parameters; layer_calls: how layers are called; expert_taps: what was routed where.
"""

from moe_compress.models.hf.configs import (
    TEXT_KEYS,
    auto_class,
    config_from,
    encode_values,
    is_wrapper,
    num_layers,
    read_values,
    stored_dtype,
    text_values,
    with_text_values,
)
from moe_compress.models.hf.edited_architectures import (
    edited_config_values,
    modelling_files,
)
from moe_compress.models.hf.expert_taps import (
    EXPERTS_FUNCTION,
    AllExperts,
    all_experts,
    complete_experts,
    run_rows,
    tap,
    untap,
    use_experts_function,
)
from moe_compress.models.hf.layer_calls import (
    LayerCall,
    called_alike,
    enter,
    head,
    head_rows,
    layer_output,
    logits,
    run_layer,
)
from moe_compress.models.hf.skeleton import (
    buffers_to,
    decoder_layers,
    layer_kind,
    layers_prefix,
    quiet,
    shapes,
    skeleton,
    stack,
    text_prefixes,
    tower_names,
)
from moe_compress.models.hf.state_dict import (
    checkpoint_tensors,
    holds_towers,
    layer_of,
    layer_state,
    materialize,
    remember_names,
    renumbered,
    stored_names,
)
from moe_compress.models.modeling.expert_forward import RoutedRows
from moe_compress.models.modeling.unfused_experts import gate_on_input

__all__ = [
    "EXPERTS_FUNCTION",
    "TEXT_KEYS",
    "AllExperts",
    "LayerCall",
    "RoutedRows",
    "all_experts",
    "auto_class",
    "buffers_to",
    "called_alike",
    "checkpoint_tensors",
    "complete_experts",
    "config_from",
    "decoder_layers",
    "edited_config_values",
    "encode_values",
    "enter",
    "gate_on_input",
    "head",
    "head_rows",
    "holds_towers",
    "is_wrapper",
    "layer_kind",
    "layer_of",
    "layer_output",
    "layer_state",
    "layers_prefix",
    "logits",
    "materialize",
    "modelling_files",
    "num_layers",
    "quiet",
    "read_values",
    "remember_names",
    "renumbered",
    "run_layer",
    "run_rows",
    "shapes",
    "skeleton",
    "stack",
    "stored_dtype",
    "stored_names",
    "tap",
    "text_prefixes",
    "text_values",
    "tower_names",
    "untap",
    "use_experts_function",
    "with_text_values",
]
