"""Seconds of collectives: latency and bandwidth per algorithm, with a message-size ramp.

Formulas and the sources of their constants are in docs/cost_model.md.
"""

from __future__ import annotations

from math import ceil, log2

from omnicompile.cost_model.hardware import Hardware
from omnicompile.errors import InputError

KINDS = ("all_gather", "reduce_scatter", "all_reduce", "all_to_all", "broadcast", "send_recv")


def channel(ranks: int, ranks_per_node: int) -> str:
    """The stream that a collective of this group runs on: "inter" if it leaves the node, else "intra"."""
    return "inter" if ranks > ranks_per_node else "intra"


def collective_seconds(
    kind: str, nbytes: float, ranks: int, ranks_per_node: int, hw: Hardware, copies: int = 0, tensors: int = 1
) -> float:
    """Seconds of one collective over `ranks` ranks, of which `ranks_per_node` share a node.

    nbytes: for all_gather, reduce_scatter, all_reduce and broadcast the full (gathered, unsharded) tensor; for
    all_to_all the local buffer of one rank (of which (ranks-1)/ranks leaves it); for send_recv the message.
    copies: of an all-to-all, rows of which this many each are copies of one, sent to random ranks, each node and each
    rank receiving one of them at most (0: all rows are sent).
    tensors: that `nbytes` are made of, gathered or reduced by one call.
    A group of one rank, or no bytes, costs nothing. The other ranks of the node may run the same collective in groups
    of their own at the same time: each GPU has its own NIC.
    """
    if kind not in KINDS:
        raise InputError(f"unknown collective {kind!r}: known are {', '.join(KINDS)}")
    if ranks <= 1 or nbytes <= 0:
        return 0.0
    local = max(1, min(ranks, ranks_per_node))
    constants = hw.collective
    each = (tensors - 1) * constants.tensor_seconds.get(kind, 0.0)
    return constants.kind_factor.get(kind, 1.0) * _seconds(kind, nbytes, ranks, local, hw, copies) + each


def _seconds(kind: str, nbytes: float, ranks: int, local: int, hw: Hardware, copies: int) -> float:
    """Of a collective of more than one rank, `local` of them on a node."""
    nodes = ceil(ranks / local)
    if kind == "all_to_all":
        return _all_to_all(nbytes, ranks, local, nodes, hw, copies)
    if kind == "send_recv":
        inside = ranks <= local  # otherwise the slowest of the hops leaves the node
        rate = hw.collective.ring * hw.intra_link.bytes_per_second if inside else _network_rate(1, hw)
        return hw.collective.base_seconds + _ramped(nbytes, rate, nbytes, nodes, hw)
    if kind == "all_reduce":
        ring = _ring(2.0 * (ranks - 1) / ranks, 2, nbytes, ranks, local, nodes, hw)
        return min(ring, _tree(nbytes, local, nodes, hw), _in_switch(nbytes, nodes, hw))
    share = 1.0 if kind == "broadcast" else (ranks - 1) / ranks
    return _ring(share, 1, nbytes, ranks, local, nodes, hw)


def _ramped(volume: float, rate: float, nbytes: float, nodes: int, hw: Hardware) -> float:
    """`volume` bytes over a link of `rate`, slowed for a small message of `nbytes`."""
    constants = hw.collective
    half = constants.ramp_bytes if nodes == 1 else constants.inter_ramp_bytes
    return volume / rate * (1.0 + (half / nbytes) ** constants.ramp_power)


def _network_rate(local: int, hw: Hardware) -> float:
    """Bytes/s between nodes with `local` NICs working."""
    return local * hw.collective.inter * hw.inter_link.bytes_per_second


def _ring(share: float, passes: int, nbytes: float, ranks: int, local: int, nodes: int, hw: Hardware) -> float:
    """`passes` trips around the rings, `share` of the bytes over each link; as many rings cross as NICs work."""
    rate = hw.collective.ring * hw.intra_link.bytes_per_second if local > 1 else float("inf")
    latency = (ranks - nodes) * hw.intra_link.latency_seconds
    if nodes > 1:
        rate = min(rate, _network_rate(local, hw))
        latency += (nodes - 1) * hw.inter_link.latency_seconds
    return hw.collective.base_seconds + passes * latency + _ramped(share * nbytes, rate, nbytes, nodes, hw)


def _tree(nbytes: float, local: int, nodes: int, hw: Hardware) -> float:
    """All-reduce: reduced inside each node, then over a double binary tree of nodes, and back."""
    if nodes == 1:
        return float("inf")
    constants = hw.collective
    volume = nbytes if nodes == 2 else 2.0 * nbytes
    slowest = volume / _network_rate(local, hw)
    latency = 2.0 * (ceil(log2(nodes)) * hw.inter_link.latency_seconds + (local - 1) * hw.intra_link.latency_seconds)
    if local > 1:
        ring = nbytes * 2.0 * (local - 1) / local / (constants.ring * hw.intra_link.bytes_per_second)
        switch = nbytes / (constants.nvls * hw.intra_link.bytes_per_second) if constants.nvls else ring
        slowest = max(slowest, min(ring, switch))
    return constants.base_seconds + latency + _ramped(slowest, 1.0, nbytes, nodes, hw)


def _in_switch(nbytes: float, nodes: int, hw: Hardware) -> float:
    """All-reduce inside one node by an NVLink switch that adds (NVLS)."""
    if nodes > 1 or not hw.collective.nvls:
        return float("inf")
    rate = hw.collective.nvls * hw.intra_link.bytes_per_second
    return hw.collective.base_seconds + 2.0 * hw.intra_link.latency_seconds + _ramped(nbytes, rate, nbytes, 1, hw)


def _all_to_all(nbytes: float, ranks: int, local: int, nodes: int, hw: Hardware, copies: int) -> float:
    """Every pair at once: the part inside the node over NVLink beside the part that leaves it over one's own NIC.

    A rank's own share is copied (read and written) in its memory.
    """
    constants = hw.collective
    seconds = constants.base_seconds + (ranks - 1) * hw.intra_link.latency_seconds
    inside, outside = nbytes * (local - 1) / ranks, nbytes * (ranks - local) / ranks
    if copies:
        inside = nbytes / copies * _touched(ranks, copies) * (local - 1) / local
        outside = nbytes / copies * _touched(nodes, copies) * (nodes - 1) / nodes
    transfer = inside / (constants.all_to_all_intra * hw.intra_link.bytes_per_second)
    if nodes > 1:
        transfer = max(transfer, outside / (constants.all_to_all_inter * hw.inter_link.bytes_per_second))
        seconds += hw.inter_link.latency_seconds
    seconds += 2.0 * nbytes / ranks / (hw.memory_bandwidth * hw.memory_fraction)
    return seconds + _ramped(transfer, 1.0, nbytes, nodes, hw)


def _touched(places: int, copies: int) -> float:
    """Of `places`, how many at least one of `copies` random choices falls on, on average."""
    return places * (1.0 - (1.0 - 1.0 / places) ** copies)
