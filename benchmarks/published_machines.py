"""The machine of a published run: a hardware file of the package, changed by what the row says of its GPU and network.

Figures of data sheets: H100 with HBM2e 2.4 TB/s and a power limit as in the row; 40 GB A100 1.555 TB/s; A800 has NVLink
at 400 GB/s in both directions; the PCIe cards have no NVLink. Assumed:
- under a power limit the rates of whole steps fall with the cube root of the power that is left beside 150 W for
  memory and leakage (power grows with the cube of the clock where the voltage follows it);
- where neither the row nor another row of its publisher states the network: 8 x 200 Gb/s a node for A100 and A800
  (DGX A100), 8 x 400 Gb/s for the others;
- FlashAttention-1 ("fa1") runs at 0.555 of the rates of FlashAttention-2, fitted by `calibrate_runs.py`;
  `data/kernels.csv` has its first version on the A100 at 0.44 to 0.57 of them"""

from __future__ import annotations

import re
from dataclasses import dataclass, field, replace

from published_rows import Row, SkipRow

from omnicompile.cost_model.hardware import Hardware, load_hardware

GIGABIT = 1e9 / 8
FIRST_FLASH = 0.555
IDLE_WATTS = 150.0
GIB_PER_NAMED_GB = 79.1 / 80  # an "80 GB" card shows 79.1 GiB


@dataclass(frozen=True)
class Card:
    """A GPU that rows name. file: of `cost_model/hardware`. watts: of the data sheet. network: bytes/s of a GPU's
    share between nodes where nothing is stated. changes: fields of Hardware."""

    pattern: str
    file: str
    memory_gb: int
    watts: float
    network: float
    changes: dict[str, object] = field(default_factory=dict)
    nvlink: float = 0.0
    peak: float = 0.0


CARDS = (
    Card(r"\bA800\b", "a100", 80, 400, 200 * GIGABIT, nvlink=200e9),
    Card(r"\bA100\b.*PCIe", "a100", 80, 300, 200 * GIGABIT, {"memory_bandwidth": 1.935e12}, nvlink=26e9),
    Card(r"\bA100\b", "a100", 80, 400, 200 * GIGABIT),
    Card(r"\bH100\b.*PCIe", "h100", 80, 350, 400 * GIGABIT, {"memory_bandwidth": 2.0e12, "sm_count": 114},
         nvlink=52e9, peak=756e12),
    Card(r"\bH800\b", "h800", 80, 700, 400 * GIGABIT),
    Card(r"\bH200\b", "h200", 141, 700, 400 * GIGABIT),
    Card(r"\bH100\b|\bHopper\b", "h100", 80, 700, 400 * GIGABIT),
    Card(r"\bB200\b", "b200", 180, 1000, 400 * GIGABIT),
)  # fmt: skip


def machine_of(row: Row, network: float | None = None) -> tuple[Hardware, str]:
    """The hardware of a row and the name of the file that it comes from. network: bytes/s of a GPU between nodes, for
    rows that state none. Raises SkipRow for a GPU without a hardware file."""
    card = next((c for c in CARDS if re.search(c.pattern, row["gpu"], re.IGNORECASE)), None)
    if card is None:
        raise SkipRow("GPU without a hardware file")
    hardware = load_hardware(card.file)
    hardware = replace(hardware, **card.changes)  # type: ignore[arg-type]
    if card.nvlink:
        hardware = replace(hardware, intra_link=replace(hardware.intra_link, bytes_per_second=card.nvlink))
    if card.peak:
        hardware = replace(hardware, peak_flops=_scaled(hardware.peak_flops, card.peak))
    hardware = with_first_flash(_with_memory(hardware, card, row))
    hardware = replace(hardware, sustained_fraction=hardware.sustained_fraction * _power(card, row))
    rate = stated_network(row) or network or card.network
    return replace(hardware, inter_link=replace(hardware.inter_link, bytes_per_second=rate)), card.file


def with_first_flash(hardware: Hardware, share: float = FIRST_FLASH) -> Hardware:
    """The hardware with FlashAttention-1 as "fa1", at `share` of the rates of FlashAttention-2."""
    second = hardware.attention.get("fa2")
    if second is None:
        return hardware
    first = replace(
        second,
        forward_fraction={dim: value * share for dim, value in second.forward_fraction.items()},
        backward_fraction={dim: value * share for dim, value in second.backward_fraction.items()},
    )
    return replace(hardware, attention={**hardware.attention, "fa1": first})


def _scaled(peaks: object, bfloat16: float) -> dict[str, float]:
    assert isinstance(peaks, dict)
    return {dtype: value * bfloat16 / peaks["bfloat16"] for dtype, value in peaks.items()}


def _with_memory(hardware: Hardware, card: Card, row: Row) -> Hardware:
    """Size and bandwidth of the memory, from "A100-40GB", "H100-96GB HBM2e", "HBM2e 2.4 TB/s"."""
    size = re.search(r"\b(\d+)\s?GB\b", row["gpu"])
    gigabytes = int(size.group(1)) if size else card.memory_gb
    if gigabytes != card.memory_gb and gigabytes >= 16:
        hardware = replace(hardware, memory_bytes=gigabytes * GIB_PER_NAMED_GB * 2**30)
        if card.file == "a100" and gigabytes == 40:
            hardware = replace(hardware, memory_bandwidth=1.555e12)
    bandwidth = re.search(r"HBM\w*\s+(\d+(?:\.\d+)?)\s*TB/s", f"{row['gpu']}; {row['notes']}")
    if bandwidth:
        hardware = replace(hardware, memory_bandwidth=float(bandwidth.group(1)) * 1e12)
    return hardware


def _power(card: Card, row: Row) -> float:
    """Of the rates at the data sheet's power, those under the row's limit."""
    stated = re.search(r"\b(\d{3,4})\s?W\b", row["gpu"]) or row.notes_match(r"\b(\d{3,4})\s?W power limit")
    watts = float(stated.group(1)) if stated else card.watts
    left = max(1.0, watts - IDLE_WATTS) / (card.watts - IDLE_WATTS)
    return float(min(1.0, left) ** (1 / 3))


def stated_network(row: Row) -> float | None:
    """Bytes/s between nodes for each GPU of a node, in one direction, as the row states it."""
    per_node = row.number("gpus_per_node") or 8
    text = f"{row['gpu']}; {row['notes']}"
    if found := re.search(r"(\d+)\s*Gb/s RDMA per GPU", text):
        return float(found.group(1)) * GIGABIT
    if found := re.search(r"(\d+)\s*x\s*(\d+)\s*GB/s per node", text):
        return int(found.group(1)) * float(found.group(2)) * 1e9 / per_node
    if found := re.search(r"(\d+)\s*x\s*(\d+)\s*Gb(?:ps|/s)?\s*(?:/node|RoCE|IB\b|InfiniBand|per node)", text):
        return int(found.group(1)) * float(found.group(2)) * GIGABIT / per_node
    if found := re.search(r"(\d+)\s*Gb(?:ps|/s)\s*/\s*node", text):
        return float(found.group(1)) * GIGABIT / per_node
    if re.search(r"\bEFA\b|\bp5\b", text):
        return 3200 * GIGABIT / per_node
    return None


def networks(rows: list[Row]) -> dict[tuple[str, str], float]:
    """By (publisher, GPU), the network that all of its rows that state one agree on."""
    stated: dict[tuple[str, str], set[float]] = {}
    for row in rows:
        if (rate := stated_network(row)) is not None:
            stated.setdefault((row.suite, row["gpu"]), set()).add(rate)
    return {key: rates.pop() for key, rates in stated.items() if len(rates) == 1}
