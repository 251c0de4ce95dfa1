"""A model open in onnxruntime with what it is to run on, ready to be timed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from qcompiler.errors import DataError
from qcompiler.graph.runtime_library import SILENT
from qcompiler.graph.runtime_library import onnxruntime as onnxruntime_library
from qcompiler.sessions.runtime import one_line
from qcompiler.sessions.session import ort_values

if TYPE_CHECKING:
    import onnxruntime


def timing_options(threads: int) -> onnxruntime.SessionOptions:
    """Those of sessions that run in turns."""
    options = onnxruntime_library().SessionOptions()
    options.intra_op_num_threads = threads
    options.log_severity_level = SILENT
    # Threads of one model that spin after its run would take time from the next model's.
    options.add_session_config_entry("session.force_spinning_stop", "1")
    return options


class Runner:
    """Runs a session on one sample a call, in turn.

    What goes in is handed to onnxruntime beforehand, and what comes out stays there: a run is the model's own time.
    """

    def __init__(
        self, name: str, session: onnxruntime.InferenceSession, samples: Sequence[Mapping[str, np.ndarray]]
    ) -> None:
        """`name` is for error messages."""
        self.name, self._session = name, session
        self._outputs = [output.name for output in session.get_outputs()]
        known = {item.name for item in session.get_inputs()}
        self._samples: list[Any] = []
        for sample in samples:
            feeds = {name: array for name, array in sample.items() if name in known}
            text = any(array.dtype.kind in "OU" for array in feeds.values())  # only a plain run takes text
            self._samples.append(feeds if text else ort_values(feeds))
        self._plain = any(isinstance(value, np.ndarray) for sample in self._samples for value in sample.values())

    def __call__(self, number: int) -> None:
        """One run. Raises DataError where the sample does not go through."""
        feeds = self._samples[number % len(self._samples)]
        try:
            if self._plain:
                self._session.run(self._outputs, feeds)
            else:
                self._session.run_with_ort_values(self._outputs, feeds)
        except Exception as error:  # onnxruntime's errors share no base class
            raise DataError(f"the sample does not go through {self.name}: {one_line(error)}") from error
