"""What was measured at which value, and the file that keeps it: calibrate once, compile many times."""

from __future__ import annotations

import json
import logging
import os
import sys
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, TypeVar

from qcompiler.errors import DataError, OutputError
from qcompiler.graph.checksum import checksum
from qcompiler.graph.places import exists, is_file
from qcompiler.statistics.channels import ChannelAbsMax, ChannelFolds, ChannelMoments, ChannelRange, SecondMoment
from qcompiler.statistics.heads import HeadRange
from qcompiler.statistics.ranges import MSE, Entropy, MinMax, MovingAverageMinMax, Percentile
from qcompiler.statistics.statistic import Array, Statistic, class_name

S = TypeVar("S", bound=Statistic)

BUILT_IN: dict[str, type[Statistic]] = {
    statistic.__name__: statistic
    for statistic in (
        *(MinMax, MovingAverageMinMax, Percentile, Entropy, MSE),
        *(ChannelAbsMax, ChannelFolds, ChannelRange, ChannelMoments, SecondMoment, HeadRange),
    )
}

_METADATA_KEY = "qcompiler.statistics"
_CHECKSUM_KEY = "sha256"
_VERSION = 2
_log = logging.getLogger(__name__)


class StatisticsStore:
    """Statistics by (value name, key of the statistic)."""

    def __init__(self) -> None:
        self._entries: dict[tuple[str, str], Statistic] = {}

    def __len__(self) -> int:
        return len(self._entries)

    def __iter__(self) -> Iterator[tuple[str, Statistic]]:
        """(value name, statistic), in the order of measurement."""
        return ((value, statistic) for (value, _), statistic in self._entries.items())

    def put(self, value: str, statistic: Statistic) -> None:
        """Keep what was measured at `value`, in the place of an earlier statistic of the same key."""
        self._entries[value, statistic.key] = statistic

    def get(self, value: str, statistic: S) -> S:
        """What was measured at `value` with the class and options of `statistic`; `DataError` where nothing was."""
        found = self._entries.get((value, statistic.key))
        if found is None:
            raise DataError(f"{statistic.key} was not measured at value {value!r}: calibrate for this recipe.")
        if not isinstance(found, type(statistic)):
            raise DataError(f"{statistic.key} at value {value!r} was measured by another class: calibrate again.")
        return found

    def missing(self, wanted: Iterable[tuple[str, Statistic]]) -> list[tuple[str, Statistic]]:
        """Those of the pairs (value, statistic) that are not here; each once."""
        absent = {(value, s.key): (value, s) for value, s in wanted if (value, s.key) not in self._entries}
        return list(absent.values())

    def rescale(self, value: str, divisor: Array) -> None:
        """The value is now divided by `divisor` along its last axis.

        Statistics that can follow are rescaled; the value's others are forgotten, to be measured again.
        """
        for entry in [entry for entry in self._entries if entry[0] == value]:
            rescaled = self._entries.pop(entry).rescaled(divisor)
            if rescaled is not None:
                self._entries[entry] = rescaled

    def drop(self, value: str) -> None:
        """Forget all that was measured at `value`."""
        self._entries = {entry: statistic for entry, statistic in self._entries.items() if entry[0] != value}

    def save(self, path: Path | str, header: dict[str, str]) -> None:
        """Write a safetensors file, whole or not at all; `header` is what its reader is to check (hashes, versions).

        Raises `OutputError` where it cannot be written.
        """
        from safetensors import SafetensorError
        from safetensors.numpy import save_file

        path = Path(path)
        entries: list[dict[str, Any]] = []
        tensors: dict[str, Array] = {}
        for number, (value, statistic) in enumerate(self):
            entries.append({"value": value, "class": class_name(type(statistic)), "options": statistic.options})
            tensors |= {f"{number}.{name}": array for name, array in statistic.state().items()}
        description = json.dumps({"version": _VERSION, "header": header, "entries": entries})
        temporary: str | None = None
        try:
            handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
            os.close(handle)
            noted = {_METADATA_KEY: description, _CHECKSUM_KEY: checksum(description, tensors)}
            save_file(tensors, temporary, metadata=noted)
            Path(temporary).replace(path)
        except (OSError, SafetensorError) as error:
            if temporary is not None:
                Path(temporary).unlink(missing_ok=True)
            raise OutputError(f"the statistics cannot be written to {path}: {error}.") from error

    @classmethod
    def load(cls, path: Path | str) -> tuple[StatisticsStore, dict[str, str]]:
        """The store and the header that `save` wrote; raises `DataError` where the file is not one of ours.

        A file never makes a module be imported: entries of a user's class are taken where its module is already
        imported (the recipe that names the class does that), and left out otherwise, as nothing here can ask for them.
        """
        from safetensors import SafetensorError, safe_open

        store = cls()
        if exists(path) and not is_file(path):
            raise DataError(f"{path} is no file, and so holds no statistics: write some with `qcompiler calibrate`.")
        try:
            with safe_open(path, framework="numpy") as file:
                noted = file.metadata() or {}
                description = json.loads(noted[_METADATA_KEY])
                if description["version"] != _VERSION:
                    raise DataError(
                        f"the statistics in {path} are of version {description['version']}, and this qcompiler reads "
                        f"version {_VERSION}: calibrate again."
                    )
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (no mapping)
                if noted[_CHECKSUM_KEY] != checksum(noted[_METADATA_KEY], tensors):
                    raise ValueError("its checksum is not that of what it holds")
                states: dict[str, dict[str, Array]] = {}
                for name, array in tensors.items():
                    number, _, measured = name.partition(".")
                    states.setdefault(number, {})[measured] = array
                for number, entry in enumerate(description["entries"]):
                    store._restore(entry, states.get(str(number), {}))
                return store, dict(description["header"])
        except FileNotFoundError as error:
            raise DataError(f"there is no statistics file {path}: write one with `qcompiler calibrate`.") from error
        except DataError:
            raise
        except (OSError, SafetensorError, LookupError, TypeError, ValueError, AttributeError, RecursionError) as error:
            raise DataError(f"{path} is not a statistics file, or a damaged one: calibrate again ({error}).") from error

    def _restore(self, entry: dict[str, Any], state: dict[str, Array]) -> None:
        statistic_class = _class_named(entry["class"])
        if statistic_class is None:
            _log.info("statistics of class %s are left out: its module is not imported", entry["class"])
            return
        statistic = statistic_class(**entry["options"])
        statistic.load_state(state)
        self.put(entry["value"], statistic)


def _class_named(name: str) -> type[Statistic] | None:
    if name in BUILT_IN:
        return BUILT_IN[name]
    module, _, qualified_name = name.partition(":")
    found: Any = sys.modules.get(module)
    for part in qualified_name.split("."):
        found = getattr(found, part, None)
    return found if isinstance(found, type) and issubclass(found, Statistic) else None
