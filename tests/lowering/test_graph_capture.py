"""One captured graph serves every batch of its budget."""

from __future__ import annotations

from typing import ClassVar

import pytest
import torch
from tiny_models import image_batch, mixture_model, text_batch, vision_language_model
from torch import Tensor, nn

from omnicompile.errors import CaptureError, InputError, LoweringError
from omnicompile.lowering.driver import find_targets
from omnicompile.lowering.graph_capture import CapturedForward, capture_forward

GRIDS = [[(1, 4, 8), (1, 8, 8)], [(1, 6, 16)], [(1, 8, 4), (1, 4, 8), (1, 4, 8)], [(1, 2, 2), (1, 2, 46)]]


def run(captured: CapturedForward, model: nn.Module, values: dict[str, Tensor]) -> tuple[Tensor, ...]:
    state = dict(model.named_parameters()) | dict(model.named_buffers())
    names = captured.params | captured.buffers
    arguments = []
    for node in captured.gm.graph.find_nodes(op="placeholder"):
        known = captured.constants.get(node.name, values.get(node.name))
        arguments.append(state[names[node.name]] if node.name in names else known)
    return captured.gm(*arguments)


def test_other_grids_and_numbers_of_images_run_through_the_same_graph() -> None:
    model = vision_language_model()
    captured, inputs = capture_forward(model, image_batch(0, GRIDS[0]))
    assert captured.outputs == ("loss", "logits")
    for seed, grids in enumerate(GRIDS, start=7):
        batch = image_batch(seed, grids)
        loss, logits = run(captured, model, inputs.prepare(batch))
        want = model(**batch)
        torch.testing.assert_close(loss, want.loss)
        torch.testing.assert_close(logits, want.logits)


def test_experts_with_an_auxiliary_loss() -> None:
    model = mixture_model(aux=True)
    captured, inputs = capture_forward(model, text_batch(0))
    batch = text_batch(3)
    torch.testing.assert_close(run(captured, model, inputs.prepare(batch))[0], model(**batch).loss)


def test_the_caller_s_model_is_left_as_it_was() -> None:
    model = vision_language_model()
    before = {name: (id(p), p.clone()) for name, p in model.named_parameters()}
    capture_forward(model, image_batch(0, GRIDS[0]))
    for name, parameter in model.named_parameters():
        assert before[name][0] == id(parameter) and torch.equal(before[name][1], parameter)
    assert model(**image_batch(0, GRIDS[0])).loss.isfinite()


def test_targets_are_counted_by_the_model_s_own_shift() -> None:
    captured, inputs = capture_forward(mixture_model(), text_batch(0))
    targets = find_targets(captured)
    batch = text_batch(4)
    assert targets is not None
    assert targets.count(inputs.prepare(batch)) == int((batch["labels"][:, 1:] != -100).sum())


def test_more_segments_than_the_budget_are_refused() -> None:
    _, inputs = capture_forward(vision_language_model(), image_batch(0, GRIDS[1]), segments=2)
    with pytest.raises(InputError, match=r"3 attention segments, the budget holds 2"):
        inputs.prepare(image_batch(1, GRIDS[2]))


def test_a_batch_of_another_size_is_refused() -> None:
    _, inputs = capture_forward(vision_language_model(), image_batch(0, GRIDS[1]))
    with pytest.raises((InputError, LoweringError), match="budget"):
        inputs.prepare(image_batch(1, [(1, 4, 8)]))


class LoopsOverClips(nn.Module):
    """Its graph depends on the numbers in its batch."""

    def __init__(self) -> None:
        super().__init__()
        self.proj = nn.Linear(4, 4)

    def forward(self, x: Tensor, lengths: Tensor) -> Tensor:
        total = self.proj(x).sum() * 0
        for length in lengths.tolist():
            total = total + self.proj(x[:length]).mean()
        return total


def test_a_batch_that_would_change_the_graph_is_refused_by_name() -> None:
    model, x = LoopsOverClips(), torch.randn(8, 4)
    captured, inputs = capture_forward(model, {"x": x, "lengths": torch.tensor([3, 5])})
    values = inputs.prepare({"x": x, "lengths": torch.tensor([3, 5])})
    torch.testing.assert_close(run(captured, model, values)[0], model(x, torch.tensor([3, 5])))
    with pytest.raises(LoweringError, match="changes the graph at traced operation"):
        inputs.prepare({"x": x, "lengths": torch.tensor([4, 4])})


class Counted(nn.Linear):
    """entered: shapes that its code has run on."""

    entered: ClassVar[list[tuple[int, ...]]] = []

    def forward(self, x: Tensor) -> Tensor:
        self.entered.append(tuple(x.shape))
        return super().forward(x)


class PicksRows(nn.Module):
    """Rows of features by positions that the host knows, as models pick image features."""

    def __init__(self) -> None:
        super().__init__()
        self.proj = Counted(4, 4)

    def forward(self, x: Tensor, kinds: Tensor) -> Tensor:
        return self.proj(x)[kinds.nonzero()[:, 0]].square().mean()


def test_a_submodule_without_host_work_is_not_entered_for_another_batch() -> None:
    model, x = PicksRows(), torch.randn(4, 4)
    captured, inputs = capture_forward(model, {"x": x, "kinds": torch.tensor([1, 0, 1, 0])})
    Counted.entered.clear()
    values = inputs.prepare({"x": x, "kinds": torch.tensor([0, 1, 1, 0])})
    assert not Counted.entered
    torch.testing.assert_close(run(captured, model, values)[0], model(x, torch.tensor([0, 1, 1, 0])))


class SplitsAndJoins(nn.Module):
    """Splits features per clip and joins them again, as models do to hand out features per image."""

    def __init__(self) -> None:
        super().__init__()
        self.proj = nn.Linear(4, 4)

    def forward(self, x: Tensor, lengths: Tensor) -> Tensor:
        pieces = torch.split(self.proj(x), lengths.tolist())
        return torch.cat(list(pieces)).square().mean()


def test_features_split_only_to_be_joined_again_stay_whole() -> None:
    model, x = SplitsAndJoins(), torch.randn(8, 4)
    captured, inputs = capture_forward(model, {"x": x, "lengths": torch.tensor([3, 5])})
    other = torch.tensor([1, 2, 5])
    torch.testing.assert_close(run(captured, model, inputs.prepare({"x": x, "lengths": other}))[0], model(x, other))


def test_a_model_without_loss_or_logits_is_refused() -> None:
    with pytest.raises(CaptureError, match="neither a loss nor logits"):
        capture_forward(NoOutput(), {"x": torch.randn(2)})


class NoOutput(nn.Module):
    def forward(self, x: Tensor) -> dict[str, Tensor]:
        return {"features": x * 2}


class DropsPadding(nn.Module):
    """Leaves out images that are all zeros, as models do that pad to a number of images."""

    def __init__(self) -> None:
        super().__init__()
        self.proj = nn.Linear(4, 4)

    def forward(self, pixels: Tensor) -> Tensor:
        real = (pixels.reshape(-1, 4) == 0.0).sum(dim=-1) != 4
        return self.proj(pixels.reshape(-1, 4)[real].contiguous()).square().mean()


def test_padding_is_found_by_the_values_of_the_batch() -> None:
    model, first, second = DropsPadding(), torch.randn(2, 2, 4), torch.randn(2, 2, 4)
    first[0, 1], second[1, 0] = 0, 0
    captured, inputs = capture_forward(model, {"pixels": first})
    torch.testing.assert_close(run(captured, model, inputs.prepare({"pixels": second}))[0], model(second))
    with pytest.raises((InputError, LoweringError)):
        inputs.prepare({"pixels": torch.randn(2, 2, 4)})


class _WideMask(nn.Module):
    """Attention weights hidden by a matrix that is made of the batch's tokens, as wide as long."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.embed = nn.Embedding(8, 4)
        self.width = width

    def forward(self, input_ids: Tensor) -> dict[str, Tensor]:
        x = self.embed(input_ids)
        seen = (input_ids > 3).unsqueeze(-1).expand(-1, -1, self.width)
        return {"loss": (x @ x.new_ones(4, self.width)).masked_fill(seen, 0.0).sum()}


def test_metadata_too_large_for_an_input_is_refused() -> None:
    capture_forward(_WideMask(16), {"input_ids": torch.arange(6000).view(1, -1) % 8})
    with pytest.raises(CaptureError, match=r"shape \[1, 6000, 6000\] outside the traced graph, too large"):
        capture_forward(_WideMask(6000), {"input_ids": torch.arange(6000).view(1, -1) % 8})
