"""llama.cpp's imatrix files: sums of squared inputs of every matrix and expert, and over how many rows.

B experts (or 1), I inputs. llama-quantize takes the mean; an expert of no rows has every input alike.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from contextlib import closing
from pathlib import Path

import numpy as np
from torch import Tensor

from moe_compress.checkpoints.gguf.library import gguf_library

# Tensors whose inputs come in another order than here.
REORDERED = ("ssm_out.weight",)


def tensor_names(architecture: str, layers: int, stored: Iterable[str]) -> dict[str, str]:
    """GGUF's names of tensors by those that a checkpoint stores them under; without those that it has none for."""
    library = gguf_library()
    number = next(each for each, name in library.MODEL_ARCH_NAMES.items() if name == architecture)
    known = library.get_tensor_name_map(number, layers)
    names = {key: known.get_name(key, try_suffixes=(".weight",)) for key in stored}
    return {key: name for key, name in names.items() if name and not name.endswith(REORDERED)}


def write_imatrix_file(
    path: Path, sums: Mapping[str, tuple[Tensor, Tensor]], dataset: str, chunks: int, chunk_tokens: int
) -> None:
    """Write the sums [B, I] and counts [B] of every tensor, by GGUF's names; whole or not at all."""
    library = gguf_library()
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(path.name + ".tmp")
    writer = library.GGUFWriter(temporary, arch="")
    writer.add_type(library.GGUFType.IMATRIX)
    writer.add_array(library.Keys.IMatrix.DATASETS, [dataset])
    writer.add_uint32(library.Keys.IMatrix.CHUNK_COUNT, chunks)
    writer.add_uint32(library.Keys.IMatrix.CHUNK_SIZE, chunk_tokens)
    for name, (square_BI, count_B) in sorted(sums.items()):
        writer.add_tensor(f"{name}.in_sum2", square_BI.numpy().astype(np.float32, copy=False))
        writer.add_tensor(f"{name}.counts", count_B.numpy().astype(np.float32)[:, None])
    try:
        with closing(writer):
            writer.write_header_to_file()
            writer.write_kv_data_to_file()
            writer.write_tensors_to_file()
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
