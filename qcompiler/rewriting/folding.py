"""Divides a value that linear layers read by a vector and multiplies their weights by it; the function stays.

    x = n ⊙ g (+ b),  y_i = x W_i        →        x' = n ⊙ (g / s) (+ b / s),  y_i = x' (s ⊙ W_i)

The division is folded into what writes the value: the gain (and bias) of a norm, or the columns (and bias) of another
linear layer, x = a ⊙ (v W + b) (`sites.Factor`). Where nothing can take it, a Mul can stand before the layers.
An exact pass chooses s > 0, one number for each channel of the value, equal where channels come from one (`shared`).

    rescalable(model, step, insert_mul=False)     the groups of layers, each with the reason why not, or None
    fits(group, scale)                            whether the float types of the constants have room for it
    rescale(group, scale, rw, step, changes)   do it
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace

import ml_dtypes
import numpy as np
import onnx_ir as ir

from qcompiler.graph.edit import (
    array,
    constant,
)
from qcompiler.graph.lazy import derived, read
from qcompiler.graph.rewriter import Rewriter
from qcompiler.rewriting.contract import Changes, Pass
from qcompiler.sites.analyses import linear_groups_of
from qcompiler.sites.find import Linear, NormGroup
from qcompiler.sites.kinds import Factor

NO_ROOM = "the rescaled gain or weight does not fit its float type"
COLUMNS_AT_ONCE = 512
SILENT = 1e-6  # channels that stay this far below the loudest one say nothing about a scale


def rescalable(
    model: ir.Model, step: Pass, *, insert_mul: bool, instead: str = "", products_only: bool = False
) -> list[tuple[NormGroup, str | None]]:
    """The groups of layers of which the pass selects any, and why it cannot rescale a group, or None.

    `instead` says what the pass could do where nothing takes the division; with `insert_mul` it does. With
    `products_only` a linear layer takes a factor where it is one side of a product (a gated MLP), and neither through
    attention nor on behalf of the next layer in a chain.
    """
    groups = [group for group in linear_groups_of(model) if any(step.selects(linear) for linear in group.linears)]
    if products_only:
        groups = [group if _is_product(group) else replace(group, factor=None) for group in groups]
    found = []
    for group in groups:
        obstacle, no_fold = _obstacle(group, step), _no_fold(group, step, f" ({instead})" if instead else "")
        if no_fold is not None and insert_mul:
            found.append((replace(group, gains=(), factor=None), obstacle))
        else:
            found.append((group, obstacle or no_fold))
    return found


def _is_product(group: NormGroup) -> bool:
    node = group.output.producer()
    attends = group.factor is not None and group.factor.through_attention
    return node is not None and node.op_type == "Mul" and not attends


def _obstacle(group: NormGroup, step: Pass) -> str | None:
    if not all(step.selects(linear) for linear in group.linears):
        return "another layer that reads the same value is excluded"
    if any(linear.dequantize is not None for linear in group.linears):
        return f"its weight is quantized already: {step.name} comes before the passes that quantize weights"
    if any(is_shared(linear) for linear in group.linears):
        return "its weight is shared (tied) with another node, and scaling it would store it twice"
    return None


def _no_fold(group: NormGroup, step: Pass, instead: str) -> str | None:
    """Why nothing that is there can take the division, or None."""
    if not group.gains and group.factor is None:
        why = group.refusal or "no norm writes its input, so the scales cannot be folded"
        return f"{why}{instead}"
    if group.factor is not None:
        writer = group.factor.linear
        if not step.selects(writer):
            return f"{writer.module_path} would take the scales and is excluded{instead}"
        if writer.dequantize is not None or is_shared(writer):
            return f"the weight of {writer.module_path}, which would take the scales, is shared or quantized already"
    if group.others:
        kinds = ", ".join(sorted({node.op_type for node in group.others}))
        return f"its input is read by {kinds}, too{instead}"
    return None


def folds(group: NormGroup) -> bool:
    """Whether what writes the value takes the division; else a Mul does."""
    return bool(group.gains) or group.factor is not None


def place(group: NormGroup) -> str:
    """Where the division goes, for the report."""
    if not folds(group):
        return "divided by a Mul"
    return f"folded into {group.factor.linear.module_path if group.factor is not None else group.module_path}"


def shared(group: NormGroup, squares: np.ndarray) -> np.ndarray:
    """Mean squares [K] with those averaged that must get one scale, because they come from one channel of a layer."""
    if group.factor is None:
        return squares
    channels = group.factor.channels
    total, count = np.bincount(channels, squares), np.bincount(channels)
    mean: np.ndarray = total[channels] / count[channels]
    return mean


def without_silence(channels: np.ndarray) -> np.ndarray:
    """Channels that were never active, or that no weight reads, count as the quietest of the others.

    No formula has a scale for them, and any other (1, say) could make theirs the largest weights or activations.
    """
    heard = channels[channels > SILENT * channels.max()]
    return np.maximum(channels, heard.min()) if heard.size else np.ones_like(channels)


def fits(group: NormGroup, scale: np.ndarray) -> bool:
    """Whether all rescaled constants keep their precision in their own type (float16 has little room)."""
    for node, index in group.gains:
        gain = array(node.inputs[index])  # type: ignore[arg-type]
        if not _keeps_precision([gain.ravel() / scale], gain.dtype):
            return False
    if group.factor is not None:
        writer = group.factor.linear
        if not _weight_fits(writer, writer.channel_axis, 1 / _columns(group.factor, scale)):
            return False
    return all(_weight_fits(linear, 1 - linear.channel_axis, scale) for linear in group.linears)


def rescale(group: NormGroup, scale: np.ndarray, rw: Rewriter, changes: Changes) -> None:
    """Divide the value by `scale` [K], and multiply the weights that read it.

    Says in `changes` what is now divided along its last axis: the value, and the output of the layer that took the
    division. What stands between these two is divided, too; nothing measures it.
    """
    for node, index in group.gains:
        _divide_vector(node, index, scale, rw)
    if group.factor is not None:
        columns = _columns(group.factor, scale)
        _divide_layer(group.factor.linear, columns, rw)
        value = str(group.factor.linear.output.name)
        changes.rescaled[value] = columns * changes.rescaled.get(value, 1.0)
    if folds(group):
        changes.rescaled[str(group.output.name)] = scale
    else:
        _insert_mul(group, scale, rw)
    for linear in group.linears:
        _scale_weight(linear, 1 - linear.channel_axis, scale, rw)


def is_shared(linear: Linear) -> bool:
    """Whether another node reads the layer's constant, or the Transpose between."""
    between = linear.transpose.outputs[0].uses() if linear.transpose is not None else ()
    return len(linear.weight.uses()) > 1 or len(between) > 1


def weight_of(linear: Linear) -> ir.TensorProtocol:
    """The layer's constant as it is now; `linear.weight` is the one that was there when the layer was found."""
    reader, index = reader_of(linear)
    tensor = constant(reader.inputs[index])
    assert tensor is not None  # recognisers only report constants
    return tensor


def _columns(factor: Factor, scale: np.ndarray) -> np.ndarray:
    """What each output channel of the layer that takes the division is divided by [N]; 1 where it goes elsewhere."""
    columns = np.ones(factor.linear.out_features, scale.dtype)
    columns[factor.channels] = scale
    if not np.array_equal(columns[factor.channels], scale):
        raise ValueError(f"scales differ where channels come from one of {factor.linear.module_path}")
    return columns


def _weight_fits(linear: Linear, axis: int, factors: np.ndarray) -> bool:
    tensor = weight_of(linear)
    if tensor.dtype not in (ir.DataType.FLOAT16, ir.DataType.BFLOAT16):
        return True  # unread: wider types have room for any scale

    def compute(data: np.ndarray) -> bool:
        rows = np.moveaxis(data, axis, 0)
        starts = range(0, rows.shape[1], COLUMNS_AT_ONCE)
        column = factors.astype(np.float32)[:, None]
        return _keeps_precision(
            (rows[:, i : i + COLUMNS_AT_ONCE].astype(np.float32) * column for i in starts), data.dtype
        )

    return read(tensor, compute)


def _keeps_precision(parts: Iterable[np.ndarray], dtype: np.dtype) -> bool:
    """Whether rounding to `dtype` costs no more than its precision, in the norm: what over- or underflows does."""
    lost, energy = 0.0, 0.0
    for part in parts:
        with np.errstate(over="ignore", invalid="ignore"):
            lost += float(np.sum(np.square(part.astype(dtype).astype(np.float64) - part)))
        energy += float(np.sum(np.square(part, dtype=np.float64)))
    return lost <= float(ml_dtypes.finfo(dtype).eps) ** 2 * energy


def _divide_layer(linear: Linear, columns: np.ndarray, rw: Rewriter) -> None:
    """Divide the output channels of a linear layer: the columns of its weight, and its bias."""
    _scale_weight(linear, linear.channel_axis, 1 / columns, rw)
    if linear.bias is not None:
        node = linear.bias_node or linear.node
        _divide_vector(node, list(node.inputs).index(linear.bias), columns, rw)


def _divide_vector(node: ir.Node, index: int, scale: np.ndarray, rw: Rewriter) -> None:
    """Divide a constant of K numbers along its last axis; others have size 1."""
    vector = array(node.inputs[index])  # type: ignore[arg-type]  # a constant, as it was found
    rw.set_constant(node, index, (vector.astype(np.float64) / scale).astype(vector.dtype))
    rw.mark(node)


def _insert_mul(group: NormGroup, scale: np.ndarray, rw: Rewriter) -> None:
    source, first = group.output, group.linears[0].node
    graph = first.graph
    assert isinstance(graph, ir.Graph)
    dtype = weight_of(group.linears[0]).dtype.numpy()  # as that of the value, by the operators' types
    reciprocal = rw.constant(f"{source.name}.smoothing", (1 / scale).astype(dtype), graph)
    mul = rw.node("Mul", [source, reciprocal], f"{source.name}.smoothed", like=source)
    rw.insert_before(first, [mul])
    for linear in group.linears:
        linear.node.replace_input_with(0, mul.outputs[0])


def _scale_weight(linear: Linear, axis: int, factors: np.ndarray, rw: Rewriter) -> None:
    """Multiply the constant along an axis, lazily: the scaled matrix exists only while somebody reads it."""
    reader, index = reader_of(linear)
    source = weight_of(linear)
    column = np.expand_dims(factors.astype(np.float32), 1 - axis)

    def compute(data: np.ndarray) -> np.ndarray:
        return (data.astype(np.float32) * column).astype(data.dtype)

    shape = tuple(int(size) for size in source.shape.numpy())
    rw.set_constant(reader, index, derived(source, compute, source.dtype, shape, str(linear.weight.name)))
    rw.mark(linear.node)


def reader_of(linear: Linear) -> tuple[ir.Node, int]:
    """The node and input that read the layer's constant."""
    return (linear.transpose, 0) if linear.transpose is not None else (linear.node, 1)
