"""A process that holds one model and runs what it is asked: prefill and decoding, their times and their memory.

Never are two of them asked at once, so that each has the machine to itself.
"""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing import Pipe
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from moe_compress import zoo
from moe_compress.checkpoints.load import load_as_run
from moe_compress.checkpoints.reader import open_checkpoint
from moe_compress.evaluation.speed.memory import cache_tensors, step_bytes, weight_tensors
from moe_compress.models.modeling.packed_linear import PackedMatrix
from moe_compress.utils.devices import DTYPES, peak_memory_bytes, reset_peak_memory, return_memory, threads

WARM_UP = 3
LAST_SECONDS = 5.0
END = "end"
START = "from moe_compress.evaluation.speed.worker import main; main()"


@dataclass(frozen=True, slots=True)
class RunSetup:
    """As what, where, and on how many threads a model is run; copied: by a copy of a process that only imported."""

    dtype: str
    device: str
    threads: int
    copied: bool = True


@dataclass(frozen=True, slots=True)
class Workload:
    """`batch` sequences of `prompt` tokens, behind which `tokens` more are decoded."""

    batch: int
    prompt: int
    tokens: int


class Worker:
    """The other end: starts processes for one model, asks them, and passes their errors on.

    One process imports what is needed, once; every start is a copy of it in which nothing has run yet. (CUDA stands no
    copies: there every start is a process from the beginning.) Not multiprocessing's, which would run the user's script
    once more.
    """

    def __init__(self, folder: Path, how: RunSetup) -> None:
        self.folder, self.how = folder, how

    def __enter__(self) -> Worker:
        self._launch()
        return self

    def __exit__(self, *_: Any) -> None:
        self.connection.close()  # at which the processes end by themselves, if they live and listen
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.process.wait(LAST_SECONDS)
        self.process.kill()
        self.process.wait()

    def _launch(self) -> None:
        self.connection, theirs = Pipe()
        with theirs:
            self.process = subprocess.Popen(
                [sys.executable, "-P", "-c", START, str(theirs.fileno())],
                pass_fds=[theirs.fileno()],
                env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
            )

    def start(self) -> None:
        """Begin to load, and go on meanwhile."""
        if self.process.poll() is not None:
            self._launch()
        self._send((self.folder, self.how))

    def loaded(self) -> dict[str, Any]:
        """What has been loaded, when it has."""
        return dict(self._answer())

    def ask(self, what: str, point: Workload) -> Any:
        """The answer to one question: seconds of `prefill` or `decode` (all tokens), or their `memory`."""
        self._send((what, point))
        return self._answer()

    def end(self) -> None:
        """End what was started; its memory is free then."""
        self._send((END, None))
        if self.how.copied:
            self._answer()
        else:
            self.process.wait()

    def _send(self, words: Any) -> None:
        with contextlib.suppress(OSError):  # the answer is then that it ended
            self.connection.send(words)

    def _answer(self) -> Any:
        try:
            answer = self.connection.recv()
        except (EOFError, OSError) as error:
            raise ValueError("the process that measures speed ended early: it may have run out of memory.") from error
        if isinstance(answer, Exception):
            raise answer
        return answer


def main() -> None:
    """What the process runs, for which its end of the pipe is the number of an open file: start after start."""
    warnings.simplefilter("ignore")  # what runs how is part of the answer, once and not for every start
    connection = Connection(int(sys.argv[1]))
    with contextlib.suppress(EOFError, OSError, KeyboardInterrupt):  # the other end is gone
        while True:
            folder, how = connection.recv()
            if not how.copied:
                return serve(connection, folder, how)
            if not (child := os.fork()):
                serve(connection, folder, how)
                os._exit(0)
            if os.waitpid(child, 0)[1]:
                return None  # killed: the other end sees that nobody answers
            connection.send(END)


def serve(connection: Any, folder: Path, how: RunSetup) -> None:
    """Load, say what was loaded, answer until the end."""
    try:
        device = torch.device(how.device)
        pin(how.threads)
        if device.type == "cuda":
            torch.cuda.set_device(device)
        with threads(how.threads), torch.inference_mode():
            # Libraries that come in with a first model are no part of what this one takes.
            small = Workload(1, 8, 2)
            decode(load(zoo.path(zoo.NAMES[0]), DTYPES[how.dtype], device), small)
            held = _start(device)
            model = load(folder, DTYPES[how.dtype], device)
            decode(model, small)
            connection.send(
                {**kernels(model), "process": os.getpid(), "load_peak_bytes": peak_memory_bytes(device) - held}
            )
            warm: set[tuple[str, Workload]] = set()
            while (question := connection.recv())[0] != END:
                connection.send(answer(model, question[0], question[1], warm))
    except (EOFError, BrokenPipeError, KeyboardInterrupt):
        return  # the other end is gone
    except Exception as error:  # whatever loading and running may raise: the other end says it
        words = f"{folder}: {type(error).__name__}: {' '.join(str(error).split())}"
        with contextlib.suppress(OSError):
            connection.send(error if isinstance(error, ValueError) else ValueError(words))


def pin(count: int) -> None:
    """Stay on the first so many of the processors that this process may use."""
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:count])


def _start(device: torch.device) -> int:
    """Forget what was; the bytes that are held now."""
    return_memory()
    reset_peak_memory(device)
    return peak_memory_bytes(device)


RUNS: dict[str, Callable[[Any, Workload], float]] = {}


def answer(model: Any, what: str, point: Workload, warm: set[tuple[str, Workload]]) -> Any:
    """Seconds or memory; what is timed for the first time is warmed up."""
    if what == "memory":
        return memory(model, point)
    if (what, point) not in warm:
        for _ in range(WARM_UP):
            RUNS[what](model, point)
        warm.add((what, point))
    return RUNS[what](model, point)


def load(folder: Path, dtype: torch.dtype, device: torch.device) -> Any:
    """A checkpoint as it is run: what is packed stays packed."""
    model = load_as_run(open_checkpoint(folder), dtype, device)
    for module in model.modules():
        if isinstance(module, PackedMatrix):  # else, of an edited one, only at its first product
            module.prepare(dtype, device)
    return model


def prefill(model: Any, point: Workload) -> float:
    """Seconds from the prompt to the first token."""
    ids = _prompt(model, point)
    return _timed(model, lambda: model(ids, use_cache=True, logits_to_keep=1).logits[:, -1:].argmax(-1))


def decode(model: Any, point: Workload) -> float:
    """Seconds of all steps of greedy decoding with a cache, the prompt not counted."""
    cache, token = _prefilled(model, point)

    def steps() -> None:
        nonlocal token
        for _ in range(point.tokens):
            token = model(token, past_key_values=cache, use_cache=True).logits[:, -1:].argmax(-1)

    return _timed(model, steps)


RUNS |= {"prefill": prefill, "decode": decode}


def _prompt(model: Any, point: Workload) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    shape = (point.batch, point.prompt)
    return torch.randint(0, model.config.get_text_config().vocab_size, shape, generator=generator).to(model.device)


def _prefilled(model: Any, point: Workload) -> tuple[Any, Tensor]:
    out = model(_prompt(model, point), use_cache=True, logits_to_keep=1)
    return out.past_key_values, out.logits[:, -1:].argmax(-1)


def _timed(model: Any, run: Callable[[], Any]) -> float:
    """Seconds of a run, by the device's own clock where it has one."""
    if model.device.type != "cuda":
        started = time.perf_counter()
        run()
        return time.perf_counter() - started
    start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    run()
    stop.record()
    torch.cuda.synchronize(model.device)
    return float(start.elapsed_time(stop)) / 1000


# --- memory -------------------------------------------------------------------------------------------------


def memory(model: Any, point: Workload) -> dict[str, int]:
    """Bytes of the weights, of the cache behind the prompt, and of what prefill and decoding take beside both.

    step_bytes: of weights and cache that one step of decoding reads, each expert once if any sequence is expected to
    use it.
    """
    held = _start(model.device)
    cache, token = _prefilled(model, point)
    kept = sum(tensor.nbytes for tensor in cache_tensors(cache))
    model(token, past_key_values=cache, use_cache=True)
    return {
        "weights": sum(tensor.untyped_storage().nbytes() for tensor in weight_tensors(model)),
        "cache": kept,
        "activations": max(peak_memory_bytes(model.device) - held - kept, 0),
        "step_bytes": round(step_bytes(model, point.batch)) + kept,
    }


def kernels(model: Any) -> dict[str, Any]:
    """Which implementations run: attention, experts, packed matrices by kernel; on how many threads, on which GPU."""
    packed = [module for module in model.modules() if isinstance(module, PackedMatrix)]
    names = [f"{module.bits} bits in {type(module.kernel).__name__.lstrip('_')}" for module in packed if module.kernel]
    names += [f"{module.bits} bits made dense" for module in packed if not module.kernel]
    return {
        "attention": str(model.config._attn_implementation),
        "experts": str(getattr(model.config.get_text_config(), "_experts_implementation", None)),
        "packed": {name: names.count(name) for name in sorted(set(names))},
        "threads": torch.get_num_threads(),
        "gpu": _gpu(model.device),
    }


def _gpu(device: torch.device) -> dict[str, str] | None:
    """Name and identity of the GPU, by which its driver knows it."""
    if device.type != "cuda":
        return None
    found = torch.cuda.get_device_properties(device)
    return {"name": found.name, "uuid": f"GPU-{found.uuid}"}
