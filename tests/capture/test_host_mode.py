import pytest
import torch
import torch.nn.functional as F
from torch import nn

from omnicompile.capture.trace import trace_forward
from omnicompile.errors import CaptureError

from .small import WIDTH


class Windowed(nn.Module):
    """Cuts its tokens into the lengths that a host tensor holds, and selects with a host mask."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(WIDTH, WIDTH)

    def forward(self, inputs, lengths, keep=None):
        parts = [self.inner(part) for part in inputs.split(lengths.tolist(), dim=1)]
        x = torch.cat([part * (index + 1) for index, part in enumerate(parts)], dim=1)
        if keep is not None:
            x = x[:, keep]
        return F.mse_loss(x, torch.zeros_like(x))


def products(traced):
    return [n for n in traced.graph.graph.nodes if "linear" in str(n.target)]


def test_loops_over_host_lengths_see_numbers() -> None:
    kwargs = {"inputs": torch.zeros(1, 12, WIDTH), "lengths": torch.tensor([3, 4, 5])}
    traced = trace_forward(Windowed(), kwargs, {"lengths"})
    assert [n.meta["val"].shape[1] for n in products(traced)] == [3, 4, 5]


def test_a_host_mask_becomes_an_index_of_fixed_size() -> None:
    keep = torch.tensor([True, False, True] * 4)
    kwargs = {"inputs": torch.zeros(1, 12, WIDTH), "lengths": torch.tensor([12]), "keep": keep}
    traced = trace_forward(Windowed(), kwargs, {"lengths", "keep"})
    assert any(n.meta["val"].shape == (1, 8, WIDTH) for n in traced.graph.graph.nodes if "index" in str(n.target))


class Branching(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(WIDTH, WIDTH)

    def forward(self, inputs, sizes):
        x = self.inner(inputs)
        return (x if sizes.sum() > 10 else 2 * x).sum()


def test_control_flow_on_metadata_is_followed() -> None:
    kwargs = {"inputs": torch.zeros(1, 12, WIDTH), "sizes": torch.tensor([3, 4])}
    traced = trace_forward(Branching(), kwargs, {"sizes"})
    assert any("mul" in str(n.target) for n in traced.graph.graph.nodes)


def test_control_flow_on_data_is_refused_with_its_line() -> None:
    kwargs = {"inputs": torch.zeros(1, 12, WIDTH), "sizes": torch.tensor([3, 4])}
    with pytest.raises(CaptureError, match=r"Branching could not be traced.*test_host_mode.py:\d+.*host metadata"):
        trace_forward(Branching(), kwargs, set())


def test_the_metadata_is_left_as_it_was() -> None:
    lengths = torch.tensor([3, 4, 5])
    trace_forward(Windowed(), {"inputs": torch.zeros(1, 12, WIDTH), "lengths": lengths}, {"lengths"})
    assert lengths.tolist() == [3, 4, 5]


class SizedAndPadded(nn.Module):
    """Shapes by host numbers, and leaves out images that are all zeros."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(WIDTH, WIDTH)

    def forward(self, inputs, sizes):
        rows, columns = sizes
        real = (inputs.to(torch.float32) == 0.0).sum(dim=(-1, -2)) != inputs[0].numel()
        return self.inner(inputs[real].reshape(rows, columns, WIDTH)).sum()


def test_inputs_have_no_padding_and_host_numbers_are_sizes() -> None:
    kwargs = {"inputs": torch.zeros(2, 6, WIDTH), "sizes": torch.tensor([3, 4])}
    traced = trace_forward(SizedAndPadded(), kwargs, {"sizes"})
    assert [tuple(n.meta["val"].shape) for n in products(traced)] == [(3, 4, WIDTH)]


class Widened(nn.Module):
    """Selects rows with a mask of positions that it expands over their width, and writes them back."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(WIDTH, WIDTH)

    def forward(self, inputs, keep):
        x = inputs.clone()
        wide = keep[..., None].expand_as(x).to(x.device)
        rows = self.inner(x[~wide].view(1, -1, WIDTH))
        x[~wide] = rows.flatten()
        return x.sum()


def test_a_host_mask_expanded_over_the_width_selects_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    # As wide as features are, such a mask has more elements than metadata has.
    monkeypatch.setattr("omnicompile.capture.host_mode.MAX_HOST_ELEMENTS", 12)
    kwargs = {"inputs": torch.zeros(1, 12, WIDTH), "keep": torch.tensor([[True, False, False] * 4])}
    traced = trace_forward(Widened(), kwargs, {"keep"})
    assert [n.meta["val"].shape for n in products(traced)] == [(1, 8, WIDTH)]


def test_a_host_mask_of_another_shape_is_refused() -> None:
    kwargs = {"inputs": torch.zeros(1, 12, WIDTH), "lengths": torch.tensor([12]), "keep": torch.ones(1, 7).bool()}

    class Selecting(nn.Module):
        def forward(self, inputs, lengths, keep):
            return inputs[keep].sum()

    with pytest.raises(CaptureError, match=r"a mask of shape \[1, 7\] does not match"):
        trace_forward(Selecting(), kwargs, {"lengths", "keep"})


class Distances(nn.Module):
    """Looks up a bias by the distance of every position from every other."""

    def __init__(self) -> None:
        super().__init__()
        self.bias = nn.Embedding(12, WIDTH)

    def forward(self, inputs, places):
        distance = (places[:, None] - places[None, :]).clamp(0, 11)
        return (self.bias(distance) * inputs[:, None]).sum()


def test_what_host_tensors_make_of_each_other_is_traced_once_it_is_large(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("omnicompile.capture.host_mode.MAX_HOST_ELEMENTS", 12)
    traced = trace_forward(Distances(), {"inputs": torch.zeros(12, WIDTH), "places": torch.arange(12)}, {"places"})
    differences = [n for n in traced.graph.graph.nodes if "sub" in str(n.target)]
    assert [n.meta["val"].shape for n in differences] == [(12, 12)]
