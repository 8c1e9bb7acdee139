"""Blocks by what a node depends on."""

from __future__ import annotations

import pytest
from torch import fx

from omnicompile.errors import PlanError
from omnicompile.lowering.placing import assign_blocks


def blocks_of(blocks: list[str], *inputs: str) -> dict[str, str]:
    """The block of each input of a graph that adds them all up, and of the sum."""
    graph = fx.Graph()
    nodes = [graph.placeholder(name) for name in inputs]
    total = nodes[0]
    for node in nodes[1:]:
        total = graph.call_function(max, (total, node))
    graph.output(total)
    gm = fx.GraphModule({}, graph)
    assign_blocks(gm, blocks, {name: [name] for name in inputs})
    return {node.name: node.meta["block"] for node in gm.graph.nodes if node.op == "placeholder"}


def test_inputs_go_by_their_modality() -> None:
    found = blocks_of(["text", "vision"], "input_ids", "pixel_values")
    assert found == {"input_ids": "text", "pixel_values": "vision"}


@pytest.mark.parametrize(("block", "name"), [("vision", "pixel_values_videos"), ("video", "pixel_values")])
def test_one_encoder_takes_images_and_videos(block: str, name: str) -> None:
    assert blocks_of(["text", block], "input_ids", name)[name] == block


def test_inputs_of_unknown_kinds_may_go_with_the_backbone() -> None:
    """And a block may be for inputs that this batch lacks."""
    assert blocks_of(["text", "vision"], "input_ids", "bias")["bias"] == "text"


def test_a_misspelt_block_is_named() -> None:
    with pytest.raises(
        PlanError, match=r"'vison', which the model does not have \(did you mean vision\?\), .*'vision'"
    ):
        blocks_of(["text", "vison"], "input_ids", "pixel_values")
