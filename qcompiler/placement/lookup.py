"""Finds the kernel that a provider runs a node with, by the rules by which ONNX Runtime finds it."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence

import onnx
import onnx_ir as ir

from qcompiler.targets.conditions import type_name
from qcompiler.targets.kernels import KernelTable, RegisteredKernel


class Kernels:
    """The kernels of one provider, by node."""

    def __init__(self, table: KernelTable, opsets: Mapping[str, int]) -> None:
        self.runtime = table.runtime
        self._opsets = dict(opsets)
        self._signatures = table.signatures
        self._by_operator: dict[tuple[str, str], list[RegisteredKernel]] = defaultdict(list)
        for kernel in table.kernels:
            self._by_operator[kernel.domain, kernel.op].append(kernel)

    def find(self, node: ir.Node, *, widened: bool = False) -> RegisteredKernel | None:
        """The node's kernel, or None. `widened`: else one for float32 where values are float16, as on CPUs."""
        since = self._since(node)
        current = [kernel for kernel in self._by_operator.get(_key(node), ()) if kernel.fits(since)]
        for wide in (False, True) if widened else (False,):
            types = self._types(node, wide)
            for kernel in current:
                if _takes(kernel, types):
                    return kernel
        return None

    def is_defined_by_others(self, node: ir.Node) -> bool:
        """Whether ONNX defines the operator as a function of others, so that the runtime can take it apart."""
        try:
            schema = onnx.defs.get_schema(node.op_type, self._opset(node), _domain(node))
        except onnx.defs.SchemaError:
            return False
        return bool(schema.has_function or schema.has_context_dependent_function)

    def obstacle(self, node: ir.Node) -> str:
        """Why `find` finds nothing, as one clause."""
        provider = self.runtime.rpartition(" ")[2].removesuffix("ExecutionProvider")
        known = self._by_operator.get(_key(node), [])
        if not known:
            return f"{provider} has no kernel for this operator"
        since = self._since(node)
        current = [kernel for kernel in known if kernel.fits(since)]
        if not current:
            return f"{provider} has no kernel for version {since} of this operator"
        types = self._types(node, False)
        for name in sorted({name for kernel in current for name, _ in kernel.types}):
            allowed = {item for kernel in current for item in dict(kernel.types).get(name, ())}
            wrong = [item for item in types.get(name, ()) if item not in allowed]
            if wrong:
                return f"{provider}'s kernel takes {', '.join(sorted(allowed))} as {name}, and not {wrong[0]}"
        together = ", ".join(f"{name} {'/'.join(items)}" for name, items in sorted(types.items()) if items)
        return f"{provider} has no kernel for these types together: {together}"

    def _since(self, node: ir.Node) -> int:
        try:
            return int(onnx.defs.get_schema(node.op_type, self._opset(node), _domain(node)).since_version)
        except onnx.defs.SchemaError:
            return 1  # the runtime's own operators have one version

    def _opset(self, node: ir.Node) -> int:
        return node.version or self._opsets.get(_domain(node), 1)

    def _types(self, node: ir.Node, widened: bool) -> dict[str, list[str]]:
        """What the node has for each type constraint, and for each parameter by its own name."""
        found: dict[str, list[str]] = defaultdict(list)
        inputs, outputs = self._parameters(node)
        for parameters, values in ((inputs, node.inputs), (outputs, node.outputs)):
            for (name, constraint), value in zip(_repeated(parameters, len(values)), values, strict=False):
                kind = type_name(value)
                kind = "float" if widened and kind == "float16" else kind
                if kind:
                    found[constraint].append(kind)
                    if name != constraint:
                        found[name].append(kind)
        return found

    def _parameters(self, node: ir.Node) -> tuple[Sequence[tuple[str, str]], Sequence[tuple[str, str]]]:
        own = self._signatures.get(_key(node))
        if own is not None:
            return own.inputs, own.outputs
        try:
            schema = onnx.defs.get_schema(node.op_type, self._opset(node), _domain(node))
        except onnx.defs.SchemaError:
            return (), ()
        sides = (schema.inputs, schema.outputs)
        inputs, outputs = (tuple((item.name, item.type_str) for item in side) for side in sides)
        return inputs, outputs


def operator(node: ir.Node) -> str:
    """An operator's name, with its domain where that is not ONNX's own."""
    return f"{_domain(node)}::{node.op_type}" if _domain(node) else node.op_type


def _key(node: ir.Node) -> tuple[str, str]:
    return _domain(node), node.op_type


def _domain(node: ir.Node) -> str:
    return "" if node.domain == "ai.onnx" else node.domain


def _takes(kernel: RegisteredKernel, types: Mapping[str, Sequence[str]]) -> bool:
    return all(item in allowed for name, allowed in kernel.types for item in types.get(name, ()))


def _repeated(parameters: Sequence[tuple[str, str]], count: int) -> Iterator[tuple[str, str]]:
    """The last parameter stands for all further values."""
    for index in range(count):
        if parameters:
            yield parameters[min(index, len(parameters) - 1)]
