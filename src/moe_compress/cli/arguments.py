"""Arguments of the command line as words: `--key value` and `--key=value` are as good as `key=value`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from moe_compress.utils.choices import key_value

FLAGS = ("", "check", "dry-run", "help", "pad", "verbose", "version")


def normalised(arguments: list[str]) -> list[str]:
    """Arguments with dashes as words, but for flags, which stay as they are. ValueError for a key without a value."""
    words: list[str] = []
    rest = iter(arguments)
    for argument in rest:
        key, equals, value = argument.removeprefix("--").partition("=")
        if not argument.startswith("--") or key in FLAGS:
            words.append(argument)
            continue
        key = key.replace("-", "_")
        given = value if equals else next(rest, None)
        if given is None:
            raise ValueError(f"{argument} needs a value: {key}=VALUE.")
        words.append(f"{key}={given}")
    return words


def option_pairs(words: Sequence[str]) -> dict[str, str]:
    """Options from `key=value` words. ValueError for one that is given twice."""
    found: dict[str, str] = {}
    for key, value in map(key_value, words):
        if key in found:
            raise ValueError(f"{key}= is given twice.")
        found[key] = value
    return found


def only(options: Mapping[str, str], known: tuple[str, ...], command: str) -> Mapping[str, str]:
    """The options, if the command has them all."""
    for key in options:
        if key not in known:
            raise ValueError(f"{command} has no option {key!r}; it takes: {', '.join(known)}.")
    return options
