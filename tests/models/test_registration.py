"""An edited checkpoint loads through stock `AutoModelForCausalLM` after `import moe_compress`, whichever came first."""

from __future__ import annotations

import subprocess
import sys

import pytest

from moe_compress.models import registration
from moe_compress.models.modeling import edited_model
from support.slow import slow_after

LOAD = """
import sys
model = AutoModelForCausalLM.from_pretrained(sys.argv[1])
assert type(model).__name__ == "EditedMixtralForCausalLM", type(model)
assert type(model.model.layers[1].self_attn).__name__ == "ZeroSublayer"
"""
OURS, THEIRS = "import moe_compress", "from transformers import AutoModelForCausalLM"
# A library that imports transformers itself, when it is first used.
LATER = f"{OURS}\ndef library():\n    from transformers import AutoModelForCausalLM\n    return AutoModelForCausalLM\n"
CONFIG = "from transformers import AutoConfig\nAutoConfig.from_pretrained(sys.argv[1])"
ORDERS = {
    "ours first": f"{OURS}\nassert 'torch' not in sys.modules\n{THEIRS}",
    "theirs first": f"{THEIRS}\n{OURS}",
    "all of transformers first": f"import transformers.models.auto.modeling_auto\n{OURS}\n{THEIRS}",
    "by another library": f"{LATER}AutoModelForCausalLM = library()",
    "the config alone": f"{OURS}\n{CONFIG}\n{THEIRS}",
}


@pytest.mark.parametrize("order", slow_after(1, ORDERS))
def test_an_edited_checkpoint_loads_whichever_was_imported_first(order, made):
    folder = made("mixtral", "layer_drop layers=1 part=attention")
    code = f"import sys\n{ORDERS[order]}\n{LOAD}"
    done = subprocess.run([sys.executable, "-c", code, str(folder)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_the_prefix_is_the_shipped_one():
    assert registration.PREFIX == edited_model.PREFIX
