"""A graph being rewritten: constants by name, readers of a value, nodes kept in order."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
from onnx import helper, numpy_helper

__all__ = ["Graph"]


class Graph:
    """Wraps a ModelProto. Nodes are replaced in place; `finish` drops what nobody reads.

    Attributes:
        nodes: in execution order.
        early: nodes on constants alone, in their own order, to run before all others.
        constants: initializers by name.
    """

    def __init__(self, proto: onnx.ModelProto) -> None:
        self.proto = proto
        self.nodes: list[onnx.NodeProto] = list(proto.graph.node)
        self.early: list[onnx.NodeProto] = []
        self.constants = {t.name: t for t in proto.graph.initializer}
        self.outputs = {v.name for v in proto.graph.output}
        self._domains = {o.domain for o in proto.opset_import}
        self._count = 0

    def name(self, stem: str) -> str:
        """A fresh name."""
        self._count += 1
        return f"{stem}_penjing{self._count}"

    def constant(self, stem: str, array: np.ndarray) -> str:
        """Add an initializer and give its name."""
        name = self.name(stem)
        self.constants[name] = numpy_helper.from_array(np.ascontiguousarray(array), name)
        return name

    def array(self, name: str) -> np.ndarray:
        """Values of a constant."""
        return np.asarray(numpy_helper.to_array(self.constants[name]))

    def readers(self, value: str) -> list[onnx.NodeProto]:
        """Nodes that read `value`."""
        return [n for n in self.nodes if value in n.input]

    def writer(self, value: str) -> onnx.NodeProto | None:
        """The node that makes `value`, None for inputs and constants."""
        return next((n for n in self.nodes if value in n.output), None)

    def node(
        self, kind: str, inputs: list[str], outputs: list[str], domain: str = "", **attributes: Any
    ) -> onnx.NodeProto:
        """A new node, not placed yet; its domain is declared."""
        if domain and domain not in self._domains:
            self.proto.opset_import.append(helper.make_opsetid(domain, 1))
            self._domains.add(domain)
        return helper.make_node(kind, inputs, outputs, self.name(kind), domain=domain, **attributes)

    def position(self, node: onnx.NodeProto) -> int:
        """Where `node` stands."""
        return next(i for i, other in enumerate(self.nodes) if other is node)

    def replace(self, old: list[onnx.NodeProto], new: list[onnx.NodeProto]) -> None:
        """Put `new` where the first of `old` stands, and take `old` away."""
        start = min(self.position(node) for node in old)
        gone = {id(node) for node in old}
        head = [n for n in self.nodes[:start] if id(n) not in gone]
        tail = [n for n in self.nodes[start:] if id(n) not in gone]
        self.nodes = [*head, *new, *tail]

    def before(self, node: onnx.NodeProto, new: list[onnx.NodeProto]) -> None:
        """Put `new` in front of `node`."""
        at = self.position(node)
        self.nodes[at:at] = new

    def sweep(self) -> set[str]:
        """Drop the nodes that nobody reads; what is read."""
        alive, needed = self.behind(self.outputs)
        kept = {id(node) for node in alive}
        self.early = [node for node in self.early if id(node) in kept]
        self.nodes = [node for node in self.nodes if id(node) in kept]
        return needed

    def behind(self, values: set[str]) -> tuple[list[onnx.NodeProto], set[str]]:
        """The nodes that make `values`, in order, and all that is read on the way to them."""
        nodes, needed = [], set(values)
        for node in reversed([*self.early, *self.nodes]):
            if needed.intersection(node.output):
                nodes.append(node)
                needed.update(node.input)
        return nodes[::-1], needed

    def finish(self) -> onnx.ModelProto:
        """The rewritten model, without dead nodes and constants."""
        needed = self.sweep()
        graph = self.proto.graph
        # Copies first: clearing a repeated field ends the messages it held.
        nodes = [_copied(node) for node in [*self.early, *self.nodes]]
        tensors = [_copied(t) for name, t in self.constants.items() if name in needed]
        values = [_copied(v) for v in graph.value_info if v.name in needed]
        for node in nodes:
            del node.metadata_props[:]
        for field, content in (
            (graph.node, nodes), (graph.initializer, tensors), (graph.value_info, values)
        ):  # fmt: skip
            del field[:]
            field.extend(content)
        return self.proto


def _copied(message: Any) -> Any:
    twin = type(message)()
    twin.CopyFrom(message)
    return twin
