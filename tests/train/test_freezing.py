"""Parts that are not trained, by name."""

from __future__ import annotations

import pytest
from tiny_models import vision_language_model

from omnicompile.errors import InputError
from omnicompile.train import freeze


def test_a_module_is_frozen_with_all_inside() -> None:
    model = vision_language_model()
    frozen = set(freeze(model, ["model.visual", "*.bias"]))
    names = [name for name, _ in model.named_parameters()]
    assert frozen == {name for name in names if name.startswith("model.visual.") or name.endswith(".bias")}
    assert {name for name, p in model.named_parameters() if not p.requires_grad} == frozen


def test_a_pattern_without_a_match_and_nothing_left_are_refused() -> None:
    with pytest.raises(InputError, match=r"'model.visua'.*did you mean model.visual"):
        freeze(vision_language_model(), ["model.visua"])
    with pytest.raises(InputError, match="nothing to train"):
        freeze(vision_language_model(), ["*"])
