"""`backend`, for `torch.compile`: group norms, and the activations behind them, wherever dynamo shows them."""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F

from . import _activations
from ._arrays import DTYPES
from ._functional import group_norm

_NORMS = (F.group_norm, torch.group_norm)
_ARGUMENTS = ("input", "num_groups", "weight", "bias", "eps")


def backend(
    graph: torch.fx.GraphModule,
    example_inputs: list[Any],
    *,
    mode: str | None = None,
    options: dict[str, Any] | None = None,
) -> Callable[..., Any]:
    """Compile a model such that its group norms are gn_fast's: ``torch.compile(model, backend=gn_fast.torch.backend)``.

    Each group norm of the graph, with an activation that alone sees its result, becomes one call; the rest runs as it
    is, or is compiled by another backend.

    Parameters
    ----------
    graph, example_inputs
        What dynamo gives.
    mode : str, optional
        Passed on to the other backend.
    options : dict, optional
        ``{"rest": "inductor"}`` has another backend compile the rest: any that `torch.compiler.list_backends` names.
        What else is in it is that backend's.

    Examples
    --------
    >>> import torch, gn_fast.torch
    >>> model = torch.nn.Sequential(torch.nn.GroupNorm(2, 8), torch.nn.SiLU())
    >>> compiled = torch.compile(model, backend=gn_fast.torch.backend)
    >>> compiled(torch.randn(2, 8, 4, 4)).shape
    torch.Size([2, 8, 4, 4])
    """
    rewrite(graph)
    options = dict(options or {})
    rest = options.pop("rest", "eager")
    more = {name: value for name, value in (("mode", mode), ("options", options)) if value}
    compiled: Callable[..., Any]
    if rest == "inductor":  # which takes neither, where torch.compile is not what calls it
        compiled = torch._TorchCompileInductorWrapper(mode, options, None)(graph, example_inputs)  # type: ignore[no-untyped-call]
    else:
        compiled = torch._dynamo.lookup_backend(rest)(graph, example_inputs, **more)
    return compiled


def _is_ours(norm: torch.fx.Node) -> bool:
    value = norm.meta.get("example_value")
    return value is None or (value.device.type == "cpu" and value.dtype in DTYPES)


def _modes_change(begin: torch.fx.Node, end: torch.fx.Node) -> bool:
    """Whether gradients, autocast or the like may be turned on or off between two nodes: by what has no value."""
    node = begin.next
    while node is not end and "example_value" in node.meta:
        node = node.next
    return node is not end


def rewrite(graph: torch.fx.GraphModule) -> int:
    """Make each group norm of a graph, with its activation, a call of ours; returns how many have one."""
    fused = 0
    for norm in list(graph.graph.nodes):
        if norm.op != "call_function" or norm.target not in _NORMS or not _is_ours(norm):
            continue
        arguments = dict(zip(_ARGUMENTS, norm.args, strict=False))
        arguments |= {name: value for name, value in norm.kwargs.items() if name in _ARGUMENTS}
        last, activation = norm, None
        if len(norm.users) == 1:
            user = next(iter(norm.users))
            if user.args[:1] == (norm,) and not _modes_change(norm, user):
                activation = _activations.of_call(user)
                last = norm if activation is None else user
        with graph.graph.inserting_before(norm):  # where its input is: it may be changed in place before the activation
            ours = graph.graph.call_function(group_norm, (), arguments | {"activation": activation})
        ours.meta = dict(last.meta)
        last.replace_all_uses_with(ours)
        for node in dict.fromkeys((last, norm)):
            graph.graph.erase_node(node)
        fused += activation is not None
    graph.recompile()
    return fused
