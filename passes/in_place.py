"""Results that Inductor writes over what they are made of.

a = mm(x, w); b = exp(a)                 b takes the memory of a
a = mm(x, w); b = exp(a); c = sin(a)     neither does: one kernel makes both, and reads a for both
"""

from __future__ import annotations

import operator
from collections.abc import Iterable, Mapping, Sequence

from torch import fx

from omnicompile.capture.classify import aten, is_free, is_fusible, is_in_place
from omnicompile.capture.fusion import elements, group_traffic

_SAME_ORDER = frozenset(
    {aten.view.default, aten._unsafe_view.default, aten.alias.default, aten.detach.default, aten.unsqueeze.default,
     aten.squeeze.dim}
)  # fmt: skip


def written_over(kernels: Iterable[Sequence[fx.Node]], compiled: Sequence[fx.Node]) -> dict[fx.Node, fx.Node]:
    """Result of a kernel -> the tensor whose memory it takes. compiled: the nodes of one piece of compiled code in the
    order in which they run; kernels: those of it that run together.

    Such a tensor is made and last read in this code (what comes in belongs to the caller) and is no element of a tuple.
    The result has its dtype and number of elements, and needs of it, for an element, that in the same place or sums.
    What else the kernel makes of it is smaller: sums, which come first.
    """
    position = {node: index for index, node in enumerate(compiled)}
    found: dict[fx.Node, fx.Node] = {}
    for kernel in kernels:
        if not is_fusible(kernel[0]):
            continue
        read, results = group_traffic(list(kernel))
        written = {node for node in results if node in kernel and not is_in_place(node)} - found.keys()
        for base in read:
            result = _result_over(base, kernel, written, position)
            if result is not None:
                found[result] = base
                written.discard(result)
    return found


def _result_over(
    base: fx.Node, kernel: Sequence[fx.Node], written: set[fx.Node], position: Mapping[fx.Node, int]
) -> fx.Node | None:
    """The one result of a kernel that can be written over `base`, if it can."""
    size, readers = elements(base), _readers(base, kernel, position)
    if size is None or not readers:
        return None
    inside, made, seen = set(kernel), list[fx.Node](), set[fx.Node]()
    while readers:
        node = readers.pop()
        if node in seen:
            continue
        seen.add(node)
        if is_free(node) and elements(node) == size and node.target not in _SAME_ORDER and _leads_into(node, inside):
            return None
        if node in written and elements(node) == size:
            made.append(node)
        readers += [user for user in node.users if user in inside or is_free(user)]
    alike = len(made) == 1 and made[0].meta["val"].dtype == base.meta["val"].dtype
    return made[0] if alike else None


def _readers(base: fx.Node, kernel: Sequence[fx.Node], position: Mapping[fx.Node, int]) -> list[fx.Node]:
    """What in `kernel` reads `base`; empty if something else does that runs later or elsewhere, or in another order, or
    if `base` is not this code's own."""
    if base not in position or base.target is operator.getitem:
        return []
    inside, start = set(kernel), min(position[node] for node in kernel)
    found: list[fx.Node] = []
    views = [base]
    while views:
        view = views.pop()
        for user in view.users:
            if user.op == "call_function" and is_free(user):
                views.append(user)
            elif user in inside:
                if view is not base and view.target not in _SAME_ORDER:
                    return []
                found.append(user)
            elif position.get(user, start) >= start:
                return []
    return found


def _leads_into(view: fx.Node, inside: set[fx.Node]) -> bool:
    return any(user in inside or (is_free(user) and _leads_into(user, inside)) for user in view.users)
