"""Energy and clock of a GPU, asked of its driver (NVML) where that is there: `pip install nvidia-ml-py`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any


class Meter:
    """Adds up the energy of one GPU while something runs. uuid: as the driver knows it; None: no GPU."""

    def __init__(self, uuid: str | None) -> None:
        self.handle = None if uuid is None else _handle(uuid)
        self.millijoules: float | None = 0.0 if self.handle is not None else None

    def around(self, run: Callable[[], float]) -> Callable[[], float]:
        """The same, and what it takes is counted."""

        def metered() -> float:
            before = self._energy()
            seconds = run()
            after = self._energy()
            if self.millijoules is not None and before is not None and after is not None:
                self.millijoules += after - before
            return seconds

        return metered

    def taken(self, runs: int) -> float | None:
        """Joules of each of so many runs since it was last asked; None where there is nothing that counts."""
        found, self.millijoules = self.millijoules, None if self.millijoules is None else 0.0
        return None if found is None else found / 1000 / runs

    def megahertz(self) -> float | None:
        """How fast the processors of the GPU are clocked now."""
        return _ask("nvmlDeviceGetClockInfo", self.handle, 1)

    def _energy(self) -> float | None:
        return _ask("nvmlDeviceGetTotalEnergyConsumption", self.handle)


def _handle(uuid: str) -> Any:
    try:
        import pynvml  # type: ignore[import-not-found]

        pynvml.nvmlInit()
    except Exception:  # no library, no driver: each has an error of its own
        return None
    return _ask("nvmlDeviceGetHandleByUUID", uuid)


def _ask(question: str, *words: Any) -> Any:
    """The driver's answer; None where there is none."""
    if words[0] is None:
        return None
    try:
        import pynvml

        return getattr(pynvml, question)(*words)
    except Exception:  # an older GPU has no such counter
        return None
