"""How long a training is waited for: while it lives, and while it may be started again."""

from __future__ import annotations

import time
from pathlib import Path

from moe_compress.checkpoints.life_signs import LifeSign, read_sign, sign_file
from moe_compress.utils.logging import log

# Without a sign for so long, a training is said to be silent. Signs come every few seconds.
SILENT_SECONDS = 60.0


class Patience:
    """Waits for one training; timeout: seconds without a sign of life (0: any number).

    Its own clock says how long a sign has not changed, not that of the machine which writes it.
    """

    def __init__(self, out: Path, timeout: float) -> None:
        self.out, self.timeout = out, timeout
        self.last: tuple[LifeSign, int] | None = None
        self.since, self.said = time.monotonic(), False

    def end(self, training: str | None = None) -> str | None:
        """How it ended, in a sentence, which is empty if it finished; None while it lives, or may begin or come back.

        training: its identity, once that is known.
        """
        found = read_sign(self.out)
        if found is None and self.last is not None:
            return (
                f"{sign_file(self.out)} is gone: the training ended before its first checkpoint, or was removed; its "
                "own output says why."
            )
        if found is not None and found != self.last:
            self.last, self.since, self.said = found, time.monotonic(), False
        if self.last is None:
            return self._waited("no training has begun", "to begin")
        sign = self.last[0]
        if training not in (None, sign.run):
            return f"another training is writing {self.out} by now."
        if sign.state == "finished":
            return ""
        if sign.state == "failed":
            return f"the training failed: {sign.reason}"
        if sign.state == "stopped":
            return self._waited(f"the training stopped ({sign.reason.rstrip('.')})", "to be started again")
        where = f"process {sign.process} on {sign.host}"
        return self._waited(f"the training ({where}) gives no sign of life", "to be started again")

    def _waited(self, why: str, what: str) -> str | None:
        """The sentence once it has taken too long; before that, a warning."""
        silent = time.monotonic() - self.since
        if self.timeout and silent >= self.timeout:
            return f"{why}, for {silent:.0f} s (timeout={self.timeout:g})."
        if silent >= SILENT_SECONDS and not self.said:
            self.said = True
            limit = f"up to {self.timeout:g} s" if self.timeout else "for ever"
            log.warning("%s: waiting %s for it %s.", why, limit, what)
        return None
