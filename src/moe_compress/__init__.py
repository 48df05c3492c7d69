"""moe-compress: compress Mixture-of-Experts language models, and measure what it cost.

    import moe_compress
    moe_compress.compress("expert_drop score=reap keep=6", model="tiny-mixtral")

Importing the package also lets `AutoModelForCausalLM` load the checkpoints whose layers differ. It imports neither
torch nor transformers: names are fetched when they are first asked for.
"""

from __future__ import annotations

import importlib
import importlib.util
from typing import TYPE_CHECKING, Any

from moe_compress.models.registration import register_edited_architectures

if TYPE_CHECKING:
    from moe_compress.analysis.compressor import (
        CompressedMoEConfig,
        CompressionPlan,
        ExpertCompressor,
        ExpertMergeResult,
        LayerAnalysis,
        MoEHooks,
        MoELayerInfo,
        estimate_compressed_size,
        estimate_model_size,
        get_moe_layer_info,
        print_compression_summary,
    )
    from moe_compress.api import (
        analyze,
        apply,
        compare,
        compress,
        evaluate,
        export,
        export_gguf_plan,
        export_imatrix,
        flops,
        load,
        plan,
        push,
        report,
        routing,
        show_data,
        speed,
        table,
        tasks,
        verify,
        watch,
    )

__version__ = "0.1.0"
COMPRESSOR = (
    "CompressedMoEConfig", "CompressionPlan", "ExpertCompressor", "ExpertMergeResult", "LayerAnalysis", "MoEHooks",
    "MoELayerInfo", "estimate_compressed_size", "estimate_model_size", "get_moe_layer_info",
    "print_compression_summary",
)  # fmt: skip
__all__ = [
    "CompressedMoEConfig", "CompressionPlan", "ExpertCompressor", "ExpertMergeResult", "LayerAnalysis", "MoEHooks",
    "MoELayerInfo", "analyze", "apply", "compare", "compress", "estimate_compressed_size", "estimate_model_size",
    "evaluate", "export", "export_gguf_plan", "export_imatrix", "flops", "get_moe_layer_info", "load", "plan",
    "print_compression_summary", "push", "report", "routing", "show_data", "speed", "table", "tasks", "verify", "watch",
]  # fmt: skip


def __getattr__(name: str) -> Any:
    # `from moe_compress import run` asks here first: packages are not to import anything else on the way.
    if name.startswith("_") or importlib.util.find_spec(f"{__name__}.{name}") is not None:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    if name not in __all__ and name not in importlib.import_module("moe_compress.evaluation.harnesses").HARNESSES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    module = "moe_compress.analysis.compressor" if name in COMPRESSOR else "moe_compress.api"
    return getattr(importlib.import_module(module), name)


register_edited_architectures()
