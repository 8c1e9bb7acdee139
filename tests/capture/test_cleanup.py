import torch
from torch import fx, nn

from omnicompile.capture.cleanup import clean, drop_checks

from .small import WIDTH, Scored, trace

aten = torch.ops.aten


def targets(graph: fx.Graph) -> list[str]:
    return [str(n.target) for n in graph.nodes if n.op == "call_function"]


def test_what_is_computed_without_gradients_is_detached() -> None:
    def scaled(x, w):
        with torch.no_grad():
            scale = (x @ w).exp()
        return (x @ w) * scale

    graph = trace(Scored(scaled), {"inputs": torch.zeros(1, 7, WIDTH)}).graph.graph
    assert not any("set_grad_enabled" in t for t in targets(graph))
    (exp,) = [n for n in graph.nodes if n.target is aten.exp.default]
    assert [u.target for u in exp.users] == [aten.detach.default]


def test_checks_that_nothing_uses_are_dropped() -> None:
    graph = fx.Graph()
    x = graph.placeholder("x")
    graph.call_function(aten._assert_async.msg, (x, "must hold"))
    graph.output(graph.call_function(aten.relu.default, (x,)))
    drop_checks(graph)
    assert targets(graph) == ["aten.relu.default"]


def test_dead_code_goes() -> None:
    graph = fx.Graph()
    x = graph.placeholder("x")
    graph.call_function(aten.exp.default, (x,))
    graph.output(graph.call_function(aten.relu.default, (x,)))
    module = fx.GraphModule(nn.Module(), graph)
    clean(module)
    assert targets(module.graph) == ["aten.relu.default"]
