"""Samples packed into micro-batches of a fixed budget, every one exactly once per epoch."""

from omnicompile.data.budget import Budget, ItemBudget, Size, attention_weights, suggest_budget
from omnicompile.data.encode import Encoded, ProcessorEncoder
from omnicompile.data.items import ItemTokens
from omnicompile.data.loader import PackedLoader, Step, make_loader
from omnicompile.data.policy import Policy
from omnicompile.data.read import sample_sizes
from omnicompile.data.sample import BadSample, Sample
from omnicompile.data.sources import DatasetSource, JsonLines, Source, WebShards, open_source

__all__ = [
    "BadSample",
    "Budget",
    "DatasetSource",
    "Encoded",
    "ItemBudget",
    "ItemTokens",
    "JsonLines",
    "PackedLoader",
    "Policy",
    "ProcessorEncoder",
    "Sample",
    "Size",
    "Source",
    "Step",
    "WebShards",
    "attention_weights",
    "make_loader",
    "open_source",
    "sample_sizes",
    "suggest_budget",
]
