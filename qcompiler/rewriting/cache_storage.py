"""How a cache is stored: the nodes that turn keys or values into codes and back, and what a position takes.

    static      x → QuantizeCache(x, s) → [PackInt4] → …joined… → [UnpackInt4] → DequantizeCache(·, s)
    per token   x → [(x - center) / reach] → DynamicQuantizeCache → … → DequantizeCache → [· reach + center]

Scales per token, and offsets where codes are asymmetric, are *companions* of the codes: they are joined and travel from
step to step as these do, in values of their own. The functions are those of `cache_functions`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import ml_dtypes
import numpy as np
import onnx_ir as ir

from qcompiler.formats.arithmetic import Array, scale_and_zero_point
from qcompiler.formats.scheme import PerTensor, PerToken, Scheme
from qcompiler.functions import cache as functions
from qcompiler.functions.library import DOMAIN
from qcompiler.graph.metadata import CACHE_SOURCE
from qcompiler.graph.rewriter import Rewriter
from qcompiler.sites.caches import Cache

SCALE, OFFSET = "scale", "offset"
"""What companions are called: past_key_values.0.key has past_key_values.0.key_scale beside it."""


@dataclass(frozen=True)
class Storage:
    """How one cache is to be stored."""

    scheme: Scheme
    """Per tensor, per channel (of each head, static), or per token (of each head, dynamic)."""
    scale_dtype: ir.DataType = ir.DataType.FLOAT16
    """Of the companions."""
    normalize: bool = False
    """Per token only: put every channel into -1 … 1 by its calibrated range first."""

    @property
    def per_token(self) -> bool:
        return isinstance(self.scheme.granularity, PerToken)

    @property
    def packed(self) -> bool:
        return self.scheme.number_format.bits == 4

    @property
    def dtype(self) -> ir.DataType:
        """Of the codes as they are stored."""
        return ir.DataType.UINT8 if self.packed else ir.DataType[self.scheme.number_format.storage]

    @property
    def companions(self) -> tuple[str, ...]:
        if not self.per_token:
            return ()
        return (SCALE,) if self.scheme.symmetric else (SCALE, OFFSET)

    @property
    def needs_range(self) -> bool:
        return self.normalize or not self.per_token

    def bytes(self, cache: Cache) -> int:
        """Bytes of one position of one sequence, companions counted."""
        codes = cache.head_size * self.scheme.number_format.bits // 8
        return cache.heads * (codes + len(self.companions) * self.scale_dtype.bitwidth // 8)

    def shape(self, shape: ir.Shape | None) -> ir.Shape | None:
        """Of the codes, from that of the numbers."""
        if shape is None or not self.packed:
            return shape
        last = shape[-1]
        return ir.Shape([*shape[:-1], last // 2 if isinstance(last, int) else None])

    @property
    def reported(self) -> Scheme:
        """The scheme as it is told: with what is done before numbers become codes."""
        return replace(self.scheme, normalized=self.normalize)


@dataclass(frozen=True)
class Encoded:
    """The nodes that make codes, in order, and what they make."""

    nodes: list[ir.Node]
    codes: ir.Value
    companions: dict[str, ir.Value]


def static_scale(cache: Cache, scheme: Scheme, lo: Array, hi: Array, dtype: ir.DataType | None = None) -> Array:
    """The scale of a cache with the calibrated range lo, hi [heads, channels]: [] or [heads, channels].

    It is of the cache's own type, unless another one is given.
    """
    if isinstance(scheme.granularity, PerTensor):
        lo, hi = lo.min(), hi.max()
    scale, _ = scale_and_zero_point(lo, hi, scheme, scale_dtype=(dtype or cache.dtype).numpy())
    return scale


class Coder:
    """Makes the nodes for one cache of a model, with constants that encoding and decoding share."""

    def __init__(self, rw: Rewriter, cache: Cache, storage: Storage, range: tuple[Array, Array] | None) -> None:
        """`range` is the calibrated one, (lo, hi) [heads, channels], where `storage.needs_range`."""
        self._rw, self._cache, self._storage = rw, cache, storage
        self._base = str(cache.present.name)
        self._scale: ir.Value | None = None
        self._center: ir.Value | None = None
        self._reach: ir.Value | None = None
        if storage.needs_range and range is None:
            raise ValueError(f"the range of {self._base!r} is needed and was not measured")
        if range is not None and not storage.per_token:
            self._scale = self._constant(SCALE, static_scale(cache, storage.scheme, *range))
        elif range is not None and storage.normalize:
            lo, hi = (end.astype(np.float64) for end in range)
            least = float(ml_dtypes.finfo(cache.dtype.numpy()).smallest_normal)
            reach = np.where(hi > lo, np.maximum((hi - lo) / 2, least), 1.0)
            self._center = self._constant("center", (hi + lo) / 2)
            self._reach = self._constant("reach", reach)

    def encode(self, x: ir.Value) -> Encoded:
        """The nodes from numbers of the cache's layout to codes."""
        nodes: list[ir.Node] = []
        source = str(x.name)
        if self._center is not None and self._reach is not None:
            nodes.append(self._node("Sub", [x, self._center], "centered", like=x))
            nodes.append(self._node("Div", [nodes[-1].outputs[0], self._reach], "normalized", like=x))
            x = nodes[-1].outputs[0]
        companions = {
            kind: ir.Value(
                name=self._fresh(f"new_{kind}"), type=ir.TensorType(self._storage.scale_dtype), shape=_row(x.shape)
            )
            for kind in self._storage.companions
        }
        codes = ir.Value(name=self._fresh("new_codes"), type=ir.TensorType(ir.DataType.INT8), shape=x.shape)
        nodes.append(self._quantize(x, codes, list(companions.values())))
        nodes[-1].metadata_props[CACHE_SOURCE] = source
        if self._storage.packed:
            functions.add_cache_function(self._rw.model, functions.PACK)
            nodes.append(self._node(functions.PACK, [codes], "new_packed", domain=DOMAIN,
                                    dtype=ir.DataType.UINT8, shape=self._storage.shape(x.shape)))  # fmt: skip
            codes = nodes[-1].outputs[0]
        return Encoded(nodes, codes, companions)

    def decode(self, codes: ir.Value, companions: Mapping[str, ir.Value], shape: ir.Shape | None) -> list[ir.Node]:
        """The nodes from codes to numbers; the output of the last one is ``<present>.dequantized``."""
        nodes: list[ir.Node] = []
        dtype = self._cache.dtype
        if self._storage.packed:
            functions.add_cache_function(self._rw.model, functions.UNPACK)
            nodes.append(self._node(functions.UNPACK, [codes], "unpacked", domain=DOMAIN, dtype=dtype,
                                    shape=shape, attributes={"output_dtype": int(dtype)}))  # fmt: skip
            codes = nodes[-1].outputs[0]
        scale = companions.get(SCALE, self._scale)
        offset = companions.get(OFFSET)
        name = functions.DEQUANTIZE if offset is None else functions.DEQUANTIZE_OFFSET
        functions.add_cache_function(self._rw.model, name)
        inputs = [codes, scale] if offset is None else [codes, scale, offset]
        normalized = self._center is not None and self._reach is not None
        nodes.append(self._node(name, inputs, "normalized" if normalized else "dequantized", domain=DOMAIN,
                                dtype=dtype, shape=shape, attributes={"output_dtype": int(dtype)}))  # fmt: skip
        if normalized:
            nodes.append(self._node("Mul", [nodes[-1].outputs[0], self._reach], "centered", dtype=dtype,
                                    shape=shape))  # fmt: skip
            nodes.append(self._node("Add", [nodes[-1].outputs[0], self._center], "dequantized", dtype=dtype,
                                    shape=shape))  # fmt: skip
        return nodes

    def _quantize(self, x: ir.Value, codes: ir.Value, companions: Sequence[ir.Value]) -> ir.Node:
        number_format = self._storage.scheme.number_format
        attributes: dict[str, object] = {"qmin": float(number_format.qmin), "qmax": float(number_format.qmax)}
        inputs: list[ir.Value | None] = [x]
        if not self._storage.per_token:
            name = functions.QUANTIZE
            inputs.append(self._scale)
        elif self._storage.scheme.symmetric:
            name = functions.DYNAMIC
            # Not qmax + ½ as for static scales: the largest number would be a tie, rounded now this way and now that.
            attributes["divisor"] = float(number_format.qmax)
        else:
            name = functions.DYNAMIC_OFFSET
        if companions:
            attributes["scale_dtype"] = int(self._storage.scale_dtype)
        functions.add_cache_function(self._rw.model, name)
        attrs = [ir.convenience.convert_attribute(key, item) for key, item in attributes.items()]
        return ir.Node(DOMAIN, name, inputs, attrs, outputs=[codes, *companions], name=codes.name)

    def _constant(self, kind: str, numbers: Array) -> ir.Value:
        """A number, or one for each head and channel, laid out to go with the cache."""
        if numbers.ndim == 2:
            numbers = numbers[:, None] if self._cache.heads_axis == 1 else numbers[None]
        data = numbers.astype(self._cache.dtype.numpy())
        return self._rw.constant(f"{self._base}.{kind}", np.asarray(data))

    def _fresh(self, kind: str) -> str:
        return self._rw.fresh(f"{self._base}.{kind}")

    def _node(
        self, op_type: str, inputs: Sequence[ir.Value | None], kind: str, *, like: ir.Value | None = None,
        domain: str = "", dtype: ir.DataType | None = None, shape: ir.Shape | None = None,
        attributes: dict[str, object] | None = None,
    ) -> ir.Node:  # fmt: skip
        base = f"{self._base}.{kind}"
        return self._rw.node(
            op_type, inputs, base, like=like, domain=domain, dtype=dtype, shape=shape, attributes=attributes
        )


def _row(shape: ir.Shape | None) -> ir.Shape | None:
    return None if shape is None else ir.Shape([*shape[:-1], 1])
