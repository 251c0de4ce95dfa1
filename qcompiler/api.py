"""What authors of passes import, from one place; names here are kept from one version to the next.

    from qcompiler.api import OPTIONS, Changed, Changes, Pass, Rewriter, options, sites_of

`docs/writing-a-pass.md` shows them on an example. All other modules are private.
"""

from __future__ import annotations

from pydantic import Field
from pydantic.dataclasses import dataclass as options

from qcompiler.errors import QCompilerError, SchemeError
from qcompiler.formats.arithmetic import Quantized, dequantize, quantize
from qcompiler.formats.scheme import PerBlock, PerChannel, PerGroup, PerTensor, PerToken, Scheme
from qcompiler.formats.search import quantize_weight
from qcompiler.graph.edit import array, constant
from qcompiler.graph.lazy import read
from qcompiler.graph.rewriter import Rewriter
from qcompiler.rewriting.contract import OPTIONS, Changed, Changes, Kind, Pass, Skipped, Tap
from qcompiler.rewriting.staged import Computed, StagedPass, Unit
from qcompiler.rewriting.weights import WeightConstant, WeightPass
from qcompiler.sites.analyses import caches_of, linear_groups_of, norm_groups_of, sites_of
from qcompiler.sites.kinds import Convolution, Embedding, Linear, NormGroup, Site, Sites, Unsupported
from qcompiler.statistics import (
    MSE,
    ChannelAbsMax,
    ChannelFolds,
    ChannelMoments,
    ChannelRange,
    Entropy,
    HeadRange,
    MinMax,
    MovingAverageMinMax,
    Percentile,
    SecondMoment,
    Statistic,
    StatisticsStore,
)

__all__ = [
    "MSE", "OPTIONS", "Changed", "Changes", "ChannelAbsMax", "ChannelFolds", "ChannelMoments", "ChannelRange",
    "Computed", "Convolution", "Embedding", "Entropy", "Field", "HeadRange", "Kind", "Linear", "MinMax",
    "MovingAverageMinMax", "NormGroup", "Pass", "PerBlock", "PerChannel", "PerGroup", "PerTensor", "PerToken",
    "Percentile", "QCompilerError", "Quantized", "Rewriter", "Scheme", "SchemeError", "SecondMoment", "Site",
    "Sites", "Skipped", "StagedPass", "Statistic", "StatisticsStore", "Tap", "Unit", "Unsupported",
    "WeightConstant", "WeightPass", "array", "caches_of", "constant", "dequantize", "linear_groups_of",
    "norm_groups_of", "options", "quantize", "quantize_weight", "read", "sites_of",
]  # fmt: skip
