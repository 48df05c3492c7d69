"""moe-compress: compress Mixture-of-Experts language models, and measure what it cost.

    import moe_compress
    moe_compress.compress("expert_drop score=reap keep=6", model="tiny-mixtral")

Importing the package also lets `AutoModelForCausalLM` load the checkpoints whose layers differ.
"""

from moe_compress.api import apply, compress, evaluate, load, plan, table

__version__ = "0.1.0"
__all__ = ["apply", "compress", "evaluate", "load", "plan", "table"]
