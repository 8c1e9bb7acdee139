"""The machine that is measured, as the cost model names its parts."""

from __future__ import annotations

import os
import platform
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path

import torch

from omnicompile.cost_model.measurements import Machine


def device_of(rank: int) -> torch.device:
    """The GPU of this rank, or the CPU."""
    if not torch.cuda.is_available():
        return torch.device("cpu")
    return torch.device("cuda", int(os.environ.get("LOCAL_RANK", str(rank))) % torch.cuda.device_count())


def describe(device: torch.device, world: int, local: int, name: str) -> Machine:
    """name: what the hardware is called; "" takes one from the device."""
    gpu = device.type == "cuda"
    cores = torch.cuda.get_device_properties(device).multi_processor_count if gpu else torch.get_num_threads()
    model = torch.cuda.get_device_name(device) if gpu else processor()
    where = f"{local} x {model}" if gpu else f"{model}, {local} ranks of {cores} thread{'s' * (cores > 1)}"
    return Machine(
        name=name or short_name(device.type, model),
        model=model,
        description=f"{where}, calibrated",
        device=device.type,
        memory_bytes=_gpu_bytes(device) if gpu else memory_bytes() / local,
        context_bytes=_gpu_context(device) if gpu else resident_bytes(),
        cores=cores,
        ranks=world,
        ranks_per_node=local,
        facts=_facts(model, gpu),
    )


def short_name(device: str, model: str) -> str:
    """A name for a file: "nvidia-h100-80gb-hbm3", or "cpu"."""
    return "-".join(model.lower().split()).replace("/", "-") if device == "cuda" else "cpu"


def _gpu_bytes(device: torch.device) -> float:
    return float(torch.cuda.get_device_properties(device).total_memory)


def _gpu_context(device: torch.device) -> float:
    """What is taken of the memory beside torch's allocator: the CUDA context, libraries, buffers of NCCL."""
    torch.cuda.empty_cache()
    free, total = torch.cuda.mem_get_info(device)
    return float(max(0, total - free - torch.cuda.memory_reserved(device)))


def memory_bytes() -> float:
    """Main memory of the machine."""
    return float(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")) if hasattr(os, "sysconf") else 16e9


def resident_bytes() -> float:
    """Main memory that this process takes; 0 where that cannot be found out."""
    try:
        pages = int(Path("/proc/self/statm").read_text().split()[1])
    except (OSError, IndexError, ValueError):
        return 0.0
    return float(pages * os.sysconf("SC_PAGE_SIZE"))


def processor() -> str:
    """The name of the processor's model."""
    try:
        text = Path("/proc/cpuinfo").read_text()
    except OSError:
        return platform.processor() or platform.machine()
    models = [line.partition(":")[2].strip() for line in text.splitlines() if line.startswith("model name")]
    return models[0] if models else platform.machine()


def _facts(model: str, gpu: bool) -> dict[str, str]:
    facts = {
        "date": datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
        "machine": f"{model}, {os.cpu_count()} CPU cores, {memory_bytes() / 2**30:.0f} GiB of main memory",
        "system": f"{platform.system()} {platform.release()}, Python {platform.python_version()}",
        "packages": f"omnicompile {version('omnicompile')}, torch {torch.__version__}",
        "load": f"{os.getloadavg()[0]:.1f} before it began" if hasattr(os, "getloadavg") else "unknown",
    }
    if gpu:
        nccl = ".".join(map(str, torch.cuda.nccl.version())) if torch.distributed.is_nccl_available() else "none"
        facts["cuda"] = f"CUDA {torch.version.cuda}, NCCL {nccl}"
    return facts
