"""Small GGUF files as llama.cpp's converter lays them out, written by the gguf package, and read back by it alone."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import gguf
import numpy as np
from gguf.quants import dequantize, quantize

DIM, INNER, VOCAB = 256, 32, 16
Tensors = dict[str, tuple[tuple[int, ...], Any]]
Q4_0, Q8_0, Q4_K, F16, F32 = (
    getattr(gguf.GGMLQuantizationType, name) for name in ("Q4_0", "Q8_0", "Q4_K", "F16", "F32")
)


def packed(shape: tuple[int, ...], kind: gguf.GGMLQuantizationType, seed: int) -> np.ndarray:
    """Random numbers in blocks of a kind; of one that the package cannot make, blocks of bytes with small scales."""
    generator = np.random.default_rng(seed)
    if kind in (F16, F32):
        return generator.standard_normal(shape).astype(np.float16 if kind == F16 else np.float32)
    if kind != Q4_K:
        return quantize(generator.standard_normal(shape).astype(np.float32), kind)
    block, size = gguf.GGML_QUANT_SIZES[kind]
    blocks = generator.integers(0, 256, (*shape[:-1], shape[-1] // block, size), dtype=np.uint8)
    blocks[..., :4] = np.array([0.01, 0.02], np.float16).view(np.uint8)
    return blocks.reshape(*shape[:-1], -1)


def layer_tensors(
    layer: int, experts: int, *, bias: bool = False, small: bool = False
) -> dict[str, tuple[tuple[int, ...], Any]]:
    """Shape and kind of one layer's tensors by name: dense where there are no experts; small: one tensor alone."""
    found: Tensors = {
        "attn_norm.weight": ((DIM,), F32),
        "attn_q.weight": ((DIM, DIM), Q4_0),
        "attn_output.weight": ((DIM, DIM), Q8_0),
    }
    if not experts:
        found |= {f"ffn_{part}.weight": ((INNER, DIM), Q4_0) for part in ("gate", "up")}
        return {
            f"blk.{layer}.{name}": each for name, each in (found | {"ffn_down.weight": ((DIM, INNER), Q4_0)}).items()
        }
    if small:
        found = {"ffn_down_exps.weight": ((experts, 2, 32), Q8_0)}
        return {f"blk.{layer}.{name}": each for name, each in found.items()}
    found |= {
        "ffn_gate_inp.weight": ((experts, DIM), F32),
        "ffn_gate_exps.weight": ((experts, INNER, DIM), Q4_0),
        "ffn_up_exps.weight": ((experts, INNER, DIM), Q4_K),
        "ffn_down_exps.weight": ((experts, DIM, INNER), Q8_0),
        "ffn_gate_shexp.weight": ((INNER, DIM), Q4_0),
        "ffn_gate_inp_shexp.weight": ((DIM,), F16),
    }
    if bias:
        found |= {
            "exp_probs_b.bias": ((experts,), F32),
            "ffn_gate_inp.bias": ((experts,), F32),
            "ffn_gate_exps.bias": ((experts, INNER), F32),
            "ffn_up_exps.scale": ((experts,), F32),
            "ffn_up_exps.input_scale": ((experts,), F32),
            "ffn_gate_up_exps.weight": ((experts, 2 * INNER, DIM), Q4_0),
            "ffn_down_exps.bias": ((experts, DIM), F32),
        }
    return {f"blk.{layer}.{name}": each for name, each in found.items()}


def write_model(
    path: Path,
    architecture: str = "qwen2moe",
    *,
    experts: Sequence[int] = (8, 8, 8),
    top_k: int = 2,
    keys: Mapping[str, Any] | None = None,
    more: Mapping[str, tuple[tuple[int, ...], Any]] | None = None,
    bias: bool = False,
    small: bool = False,
    alignment: int = 32,
    shards: int = 1,
    name: str = "Tiny Model",
) -> Path:
    """A model with `experts` in each layer (0: dense). Returns its first file."""
    tensors = {"token_embd.weight": ((VOCAB, DIM), Q8_0)}
    for layer, count in enumerate(experts):
        tensors |= layer_tensors(layer, count, bias=bias, small=small)
    tensors |= {"output_norm.weight": ((DIM,), F32), **(more or {})}
    writer = gguf.GGUFWriter(path, architecture, split_max_tensors=-(-len(tensors) // shards) if shards > 1 else 0)
    writer.add_custom_alignment(alignment)
    writer.add_type("model")
    writer.add_name(name)
    writer.add_size_label("8x7B")
    writer.add_token_list([f"t{i}" for i in range(VOCAB)])
    numbers = {"block_count": len(experts), "expert_count": max(experts), "expert_used_count": top_k}
    numbers |= {"embedding_length": DIM, "feed_forward_length": INNER}
    for key, value in {**numbers, **(keys or {})}.items():
        add = writer.add_array if isinstance(value, list) else writer.add_uint32
        add(f"{architecture}.{key}", value)
    for seed, (key, (shape, kind)) in enumerate(tensors.items()):
        writer.add_tensor(key, packed(shape, kind, seed), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path if shards == 1 else path.with_name(f"{path.stem}-00001-of-{shards:05d}.gguf")


class Read:
    """What the gguf package finds in a file."""

    def __init__(self, *paths: Path) -> None:
        self.readers = [gguf.GGUFReader(path) for path in paths]

    @property
    def values(self) -> dict[str, Any]:
        """The first file's metadata, without the header's own fields."""
        fields = self.readers[0].fields.items()
        return {key: field.contents() for key, field in fields if not key.startswith("GGUF.")}

    @property
    def raw(self) -> dict[str, np.ndarray]:
        """The bytes of every tensor, the slowest axis first."""
        return {t.name: np.array(t.data) for reader in self.readers for t in reader.tensors}

    @property
    def numbers(self) -> dict[str, np.ndarray]:
        """Dequantized."""
        found = {t.name: dequantize(t.data, t.tensor_type) for reader in self.readers for t in reader.tensors}
        return {name: values.astype(np.float32) for name, values in found.items()}
