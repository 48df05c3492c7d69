"""Columns of tables from the reports of the speed harness. Nothing of torch is imported here."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from moe_compress.reports.companions import LATENCY, STARTS_NEEDED, Columns, CompanionResult, JoinedColumns, join
from moe_compress.reports.reading import ValidMetric
from moe_compress.reports.record import Record


def timed(speed: Mapping[str, Any]) -> list[CompanionResult]:
    """Every point of a speed file: how many times as fast, and decoding time over the original's."""
    found = speed["found"]
    gpu, setting = found["original"]["gpu"], found["setting"]
    where = gpu["name"] if gpu else speed["environment"]["processor"]
    what = (setting["tokens"], setting["dtype"], setting["device"], where, found["original"]["threads"])
    return [
        CompanionResult(
            speed["model"], speed["fingerprint"], speed["original"], (point["batch"], point["prompt"], *what),
            _speedups(point), bool(found["machine"]["busy"]), point["prefill"].get("starts", 1) < STARTS_NEEDED,
        )
        for point in found["points"]
    ]  # fmt: skip


def _speedups(point: Mapping[str, Any]) -> dict[str, ValidMetric]:
    prefill, decode = (
        ValidMetric(value=point[what]["speedup"], unit="ratio", interval=tuple(point[what]["speedup_interval"]))
        for what in ("prefill", "decode")
    )
    low, high = decode.interval or (decode.value, decode.value)
    if min(low, prefill.value) <= 0:
        raise ValueError("a speedup is a number above zero")
    latency = ValidMetric(value=1 / decode.value, unit="ratio", interval=(1 / high, 1 / low))
    return {"prefill x": prefill, "decoding x": decode, LATENCY: latency}


def speedups(found: Sequence[CompanionResult], records: Sequence[Record]) -> JoinedColumns:
    """Times at the point and in the setting which most were timed at."""
    kept, most, left = join(found, records)
    if not kept:
        return JoinedColumns({}, "")
    batch, prompt, tokens, dtype, device, where, threads = most
    how = f"{batch} x {tokens} tokens behind prompts of {prompt}, {dtype} on {device} ({where}), {threads} thread(s)"
    busy = sum(each.busy for each in kept.values())
    how += f"; the machine was BUSY for {busy} of them" if busy else ""
    narrow = sum(each.narrow for each in kept.values())
    how += f"; {narrow} of too few starts, so that their intervals are too narrow" if narrow else ""
    return JoinedColumns({name: each.values for name, each in kept.items()}, how + left)


COLUMNS = Columns(timed, speedups, cost=LATENCY)
