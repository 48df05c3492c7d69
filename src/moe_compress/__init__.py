"""moe-compress: compress Mixture-of-Experts language models, and measure what it cost.

    import moe_compress
    moe_compress.compress("expert_drop score=reap keep=6", model="tiny-mixtral")

Importing the package also lets `AutoModelForCausalLM` load the checkpoints whose layers differ.
"""

import importlib
from typing import Any

from moe_compress.api import analyze, apply, compare, compress, evaluate, export, load, plan, push, table
from moe_compress.evaluation.harnesses import flops, routing, speed, tasks, verify
from moe_compress.reports.html_report import report

__version__ = "0.1.0"
# Fetched when first asked for.
COMPRESSOR = (
    "CompressedMoEConfig", "CompressionPlan", "ExpertCompressor", "ExpertMergeResult", "LayerAnalysis", "MoEHooks",
    "MoELayerInfo", "estimate_compressed_size", "estimate_model_size", "get_moe_layer_info",
    "print_compression_summary",
)  # fmt: skip
__all__ = [
    "analyze", "apply", "compare", "compress", "evaluate", "export", "flops", "load", "plan", "push", "report",
    "routing", "speed", "table", "tasks", "verify", *COMPRESSOR,
]  # fmt: skip


def __getattr__(name: str) -> Any:
    if name in COMPRESSOR:
        return getattr(importlib.import_module("moe_compress.analysis.compressor"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
