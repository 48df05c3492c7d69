"""Whose code an edited checkpoint carries: ours is what this version ships, or a listed earlier one, byte for byte."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers.dynamic_module_utils import get_relative_import_files

from moe_compress.models.hf.edited_architectures import MODELLING_FILE, SHIPPED, auto_map_of, loader_of

# Where transformers looks for a generate() of the checkpoint's own.
CUSTOM_GENERATE = "custom_generate"


@dataclass(frozen=True, slots=True)
class Version:
    """The modelling files of one version: the module that makes the edited classes, and the SHA-256 of every file."""

    module: str
    files: Mapping[str, str]


# A version is listed here once checkpoints of it are about and its files have changed since.
EARLIER = (
    Version(
        "edited",
        {
            "codes.py": "a944435d232a14ce26c2e48497b98bf9e2529ae16f8bdbbf12c790ba2dfdab9a",
            "edited.py": "1a58da8df0cf697e890dcc7ba9b49e4c2ffcba7e56a9c65e827996eda23df6c4",
            "edited_layers.py": "eca5ff27765bf6ccb5c74c660219ba5fbf486b3ccd68571d1491e174b8da8518",
            "expert_forward.py": "261a6c4ffa3be29ef7595e7372309f4f52528c0fee805913603a3a71aec45f16",
            "kernels.py": "17c75b9d369e837b34bcbc9110e3aba531307cab743c8c09c1fdd9da26ac182c",
            "packed.py": "2ecf445bb092650b2e03b8295153622994860de382c879ccc3d93cdf891502c8",
            "rerouting.py": "ab9ac8287356ccdee83c75e5221ff381e5d9f2ff3e74931ac9ff41c9885917ee",
            "rounding.py": "6de6a987661872072acb3b677c2ec0d71f2b43a3d84cd89ba1a4bbacc885ac64",
            "separate.py": "f7f0970648d33e5e86984da33d82235f20ecf7f3c0f941cbf7bff9992cef76b8",
        },
    ),
    Version(
        "edited_model",
        {
            "activation_rounding.py": "081add098712593366fd2e19738838eb01e0c246c8bac27172e54d6ee0a0900b",
            "bit_packing.py": "a944435d232a14ce26c2e48497b98bf9e2529ae16f8bdbbf12c790ba2dfdab9a",
            "edit_layer.py": "391296cdccb96452adaa834f1ed99f13c37f4c7c0256e706f929d250a07694a4",
            "edited_model.py": "9dc9229eb3820dd54893795d510bec878f5d60153cc402c75e226fec42160259",
            "expert_forward.py": "9427fea260677f766290a46ac48e26654ac8893aeed70c92cfc267ad6f48e5ef",
            "packed_kernels.py": "7521a1e0363ca2c40eaaed94320854cc984cd2929e6c1b2d7b0c88fe3dfcd5f8",
            "packed_linear.py": "5a7d3fb416ebff58575209a7eeeb67d35e8a5ab03ff1651414b763283d7bea91",
            "rerouting.py": "c88da3c7f716d9ae9f38e9c2ebb0817e30d5b16ab6d8634fda869cbb27ee7e93",
            "unfused_experts.py": "f5d62a3fa1fa30b9864a7069ab6a240491dd175df7177b9bdd3b4152bf4d4fc8",
        },
    ),
    Version(
        "edited_model",
        {
            "activation_rounding.py": "081add098712593366fd2e19738838eb01e0c246c8bac27172e54d6ee0a0900b",
            "bit_packing.py": "a944435d232a14ce26c2e48497b98bf9e2529ae16f8bdbbf12c790ba2dfdab9a",
            "edit_layer.py": "9dfa1e4b6aa23f18ef0e7b1e8cd91e13c2b5b64ec802990d7a3e0ad37df2651e",
            "edited_model.py": "43a7d81bbdbef311875a52d8d7a2a0a16e376054c69d8693f5c2db2c031b847c",
            "expert_forward.py": "6ea3b6840ebfae3ccafb61e0a5941399367965784c59e520ed13d4220bf063a0",
            "packed_kernels.py": "7521a1e0363ca2c40eaaed94320854cc984cd2929e6c1b2d7b0c88fe3dfcd5f8",
            "packed_linear.py": "5a7d3fb416ebff58575209a7eeeb67d35e8a5ab03ff1651414b763283d7bea91",
            "rerouting.py": "c88da3c7f716d9ae9f38e9c2ebb0817e30d5b16ab6d8634fda869cbb27ee7e93",
            "unfused_experts.py": "f5d62a3fa1fa30b9864a7069ab6a240491dd175df7177b9bdd3b4152bf4d4fc8",
        },
    ),
)


def imported_files(file: Path) -> list[Path]:
    """The files beside a module that it imports relatively, and those that they import."""
    return [found for name in get_relative_import_files(file) if (found := Path(name)).is_file()]


def foreign_code(folder: Path, values: Mapping[str, Any]) -> str:
    """What of the code that loading an edited checkpoint would run is not ours; empty if all of it is."""
    if (folder / CUSTOM_GENERATE).exists():
        return f"{CUSTOM_GENERATE} is no part of it"
    try:
        expected = auto_map_of(values["moe_compress"]["base_model_type"])
    except KeyError:
        return "config.json names an architecture that transformers does not have"
    given = values.get("auto_map")
    if not isinstance(given, dict) or {key: given.get(key) for key in expected} != expected:
        return "the auto_map of config.json leads elsewhere"
    current = Version("edited_model", {path.name: _digest(path) for path in SHIPPED})
    wrong = [_first_foreign(folder, values, version) for version in (current, *EARLIER)]
    return "" if "" in wrong else f"{wrong[0]} is not the file that moe-compress ships"


def _first_foreign(folder: Path, values: Mapping[str, Any], version: Version) -> str:
    """The first file that is not this version's."""
    loader = loader_of(values["moe_compress"]["base_model_type"], version.module).encode()
    expected = {f"{MODELLING_FILE}.py": hashlib.sha256(loader).hexdigest(), **version.files}
    return next((name for name, digest in expected.items() if _digest(folder / name) != digest), "")


def _digest(path: Path) -> str:
    """Of a file; empty if there is none, or a link stands in its place."""
    return hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() and not path.is_symlink() else ""
