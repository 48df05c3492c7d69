"""The seam to transformers: the only files that touch its internals; pinned to 5.23, held by identity tests.

skeleton: models without weights; edited_architectures: edited model types; state_dict: checkpoint tensors <->
parameters; layer_calls: how each layer is called; expert_taps: what was routed where.
"""

from moe_compress.models.hf.edited_architectures import (
    PROCESSORS,
    edited_config_values,
    modelling_files,
)
from moe_compress.models.hf.expert_taps import (
    EXPERTS_FUNCTION,
    AllExperts,
    all_experts,
    run_rows,
    tap,
    untap,
    use_experts_function,
)
from moe_compress.models.hf.layer_calls import (
    LayerCall,
    LayerOutput,
    called_alike,
    enter,
    head,
    head_rows,
    layer_output,
    logits,
    run_layer,
)
from moe_compress.models.hf.shipped_code import foreign_code, imported_files
from moe_compress.models.hf.skeleton import (
    buffers_to,
    config_from,
    decoder_layers,
    encode_values,
    is_architecture,
    layer_kind,
    layers_prefix,
    num_layers,
    quiet,
    read_values,
    shapes,
    skeleton,
    stack,
    stored_dtype,
    tie,
    tied_names,
)
from moe_compress.models.hf.state_dict import (
    checkpoint_tensors,
    is_prediction_key,
    knows_prediction_layers,
    layer_of,
    layer_state,
    materialize,
    renumbered,
    stored_names,
)
from moe_compress.models.modeling.expert_forward import RoutedRows
from moe_compress.models.modeling.unfused_experts import gate_on_input

__all__ = [
    "EXPERTS_FUNCTION",
    "PROCESSORS",
    "AllExperts",
    "LayerCall",
    "LayerOutput",
    "RoutedRows",
    "all_experts",
    "buffers_to",
    "called_alike",
    "checkpoint_tensors",
    "config_from",
    "decoder_layers",
    "edited_config_values",
    "encode_values",
    "enter",
    "foreign_code",
    "gate_on_input",
    "head",
    "head_rows",
    "imported_files",
    "is_architecture",
    "is_prediction_key",
    "knows_prediction_layers",
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
    "renumbered",
    "run_layer",
    "run_rows",
    "shapes",
    "skeleton",
    "stack",
    "stored_dtype",
    "stored_names",
    "tap",
    "tie",
    "tied_names",
    "untap",
    "use_experts_function",
]
