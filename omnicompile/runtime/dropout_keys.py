"""The random numbers of a forward: one seed, the same on all ranks, from which every dropout site gets its key."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from omnicompile.passes.dropout_op import site_keys
from omnicompile.passes.rank_program import RankProgram


@dataclass
class ForwardSeed:
    """Drawn when first asked for, by all ranks together, from torch's default generator; that of rank 0 counts."""

    control: dist.ProcessGroup
    _value: int | None = None

    @property
    def value(self) -> int:
        if self._value is None:
            drawn = torch.randint(torch.iinfo(torch.int64).max, (1,))
            dist.broadcast(drawn, group=self.control, group_src=0)
            self._value = int(drawn)
        return self._value

    def keys(self, program: RankProgram, device: torch.device) -> dict[str, Tensor]:
        """0-d int64 by placeholder. A program without dropout draws nothing."""
        sites = {name: int(spec.name) for name, spec in program.inputs.items() if spec.kind == "dropout"}
        if not sites:
            return {}
        keys = site_keys(self.value, len(sites))
        rows = torch.stack([keys, keys], 1).to(device)  # two a row, so that compiled code finds each one aligned
        return {name: rows[site, 0] for name, site in sites.items()}
