"""`accelerate` and `restore`: gn_fast under a model that exists, and its activations fused where that is certain.

A norm stays the object that it is and changes its class; an activation that its norm applies now is replaced, in the
place where it is called, by a module that passes its input on and keeps the activation for `restore`.
"""

import inspect
import itertools
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field

import torch
from torch import nn

from . import _activations
from ._arrays import Activation
from ._module import GroupNorm


class Accelerated(GroupNorm):
    """A `torch.nn.GroupNorm` that was accelerated."""

    def _get_name(self) -> str:
        return "GroupNorm"


class Fused(nn.Identity):
    """In the place of an activation that the norm before it applies."""

    def __init__(self, activation: nn.Module) -> None:
        super().__init__()
        self.activation = activation


@dataclass
class Report:
    """What `accelerate` did: names of modules, as `named_modules` has them.

    Attributes
    ----------
    replaced : list of str
        The norms that are gn_fast's now.
    fused : dict of str to str
        Of these, the ones that apply the activation that followed; and its name.
    left : dict of str to str
        Norms that stay as they are, and activations that stay apart; and why.
    """

    replaced: list[str] = field(default_factory=list)
    fused: dict[str, str] = field(default_factory=dict)
    left: dict[str, str] = field(default_factory=dict)

    def __str__(self) -> str:
        lines = [f"{len(self.replaced)} replaced, {len(self.fused)} of them with the activation that follows"]
        lines += [
            f"  {name} + {self.fused[name]}" if name in self.fused else f"  {name}" for name in self.replaced
        ]
        lines += ["left as they are:"] * bool(self.left)
        lines += [f"  {name}: {reason}" for name, reason in self.left.items()]
        return "\n".join(lines)


def accelerate(model: nn.Module) -> Report:
    """Put gn_fast under a model: each `torch.nn.GroupNorm` in it, in place.

    Parameters, buffers, hooks, training mode, device, dtype and state_dict stay as they are. A SiLU, ReLU, LeakyReLU,
    GELU, Mish, Hardswish, Sigmoid or Tanh is fused into the norm before it where it is certain to follow: as its
    neighbour in a `torch.nn.Sequential`, or if `torch.fx` shows that the module that holds both calls the one with the
    result of the other and with nothing else, whichever of its arguments are None. Functions are not seen; `backend`
    fuses these.

    Parameters
    ----------
    model : torch.nn.Module
        A norm itself, or what holds some; also on the ``meta`` device.

    Returns
    -------
    Report
        What was replaced and fused, and what was not, and why.

    Raises
    ------
    TypeError
        If `model` is no module.

    Examples
    --------
    >>> import torch, gn_fast.torch
    >>> model = torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3), torch.nn.GroupNorm(2, 8), torch.nn.SiLU())
    >>> print(gn_fast.torch.accelerate(model))
    1 replaced, 1 of them with the activation that follows
      1 + silu
    >>> gn_fast.torch.restore(model)
    """
    _check_module(model)
    report = Report()
    for name, module in model.named_modules():
        if type(module) is nn.GroupNorm and "forward" not in vars(module) and _is_here(module):
            module.__class__ = Accelerated
            vars(module)["activation"] = None
            report.replaced.append(name)
        elif _is_another(module):
            report.left[name] = _why_left(module)
    places = Counter(id(m) for _, m in model.named_modules(remove_duplicate=False))
    names = {id(m): name for name, m in model.named_modules()}
    for prefix, parent in list(model.named_modules()):
        for slot, norms, activation in list(_pairs(parent, places, prefix, names, report)):
            for norm in norms:
                vars(norm)["activation"] = activation
                report.fused[names[id(norm)]] = (
                    activation[0] if isinstance(activation, tuple) else str(activation)
                )
            parent._modules[slot] = Fused(parent._modules[slot])
    return report


def restore(model: nn.Module) -> None:
    """Undo `accelerate`: the norms' classes and the activations are what they were; what was trained meanwhile stays.

    Parameters
    ----------
    model : torch.nn.Module
        What `accelerate` was given, or a copy of it.

    Raises
    ------
    TypeError
        If `model` is no module.
    """
    _check_module(model)
    for module in list(model.modules()):
        if type(module) is Accelerated:
            del module.activation
            module.__class__ = nn.GroupNorm  # type: ignore[assignment]
        for slot, child in module._modules.items():
            if type(child) is Fused:
                child.activation.train(child.training)
                module._modules[slot] = child.activation


def _check_module(model: nn.Module) -> None:
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, not {type(model).__name__}")


def _is_here(module: nn.Module) -> bool:
    return all(p.device.type in ("cpu", "meta") for p in module.parameters())


def _is_another(module: nn.Module) -> bool:
    """Whether this is a group norm that stays as it is."""
    if isinstance(module, torch.jit.ScriptModule):
        return getattr(module, "original_name", "") == "GroupNorm"
    return isinstance(module, nn.GroupNorm) and not isinstance(module, GroupNorm)


def _why_left(module: nn.Module) -> str:
    if isinstance(module, torch.jit.ScriptModule):
        return "it is compiled by TorchScript"
    if type(module) is nn.GroupNorm and not _is_here(module):
        return f"it is on {next(module.parameters()).device}, and gn_fast works on the CPU"
    if type(module) is nn.GroupNorm:
        return "its forward is another"
    return f"it is a {type(module).__qualname__}, which may do more than a GroupNorm"


# ---- what is certain to follow ---------------------------------------------------------------------------

Pair = tuple[str, list[Accelerated], Activation]


def _pairs(
    parent: nn.Module, places: Counter[int], prefix: str, names: dict[int, str], report: Report
) -> Iterator[Pair]:
    """The places of activations in a module that go into the norms whose results are all that they see."""
    children = list(parent._modules.values())
    if not any(type(m) is Accelerated and m.activation is None for m in children):
        return
    found = _neighbours(parent) if type(parent).forward is nn.Sequential.forward else _traced(parent)
    for slot, norms in found:
        module = parent._modules[slot]
        activation = _activations.of_module(module) if module is not None else None
        if activation is None:
            continue
        reason = next(filter(None, (_why_apart(m, places) for m in (*norms, module))), None)
        if reason is None:
            yield slot, norms, activation
        else:
            report.left[f"{prefix}.{slot}".lstrip(".")] = f"not fused with {names[id(norms[0])]}: {reason}"


def _why_apart(module: nn.Module | None, places: Counter[int]) -> str | None:
    """What forbids to fuse a norm or an activation."""
    name = "the norm" if isinstance(module, nn.GroupNorm) else "the activation"
    hooks = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    if any(getattr(module, hook, None) for hook in hooks):
        return f"{name} has hooks, which see what is between them"
    if "forward" in vars(module):
        return f"{name}'s forward is another"
    if isinstance(module, nn.GroupNorm) and places[id(module)] > 1:
        return f"{name} is in several places"
    return None


def _neighbours(parent: nn.Module) -> Iterator[tuple[str, list[Accelerated]]]:
    items = list(parent._modules.items())
    for (_, norm), (slot, _) in itertools.pairwise(items):
        if isinstance(norm, Accelerated):
            yield slot, [norm]


class _Shallow(torch.fx.Tracer):
    """Sees one module's own forward, and its children as calls."""

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return True


def _traced(parent: nn.Module) -> list[tuple[str, list[Accelerated]]]:
    """What every run of a module's forward shows: in training or not, and with any argument but the first None."""
    parameters = list(inspect.signature(parent.forward).parameters.values())[1:]
    ordinary = [p.name for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)]
    training = parent.training
    shown: list[dict[str, list[Accelerated]]] = []
    try:
        for mode in (False, True):
            parent.training = mode
            for concrete in ({}, *({name: None} for name in ordinary), dict.fromkeys(ordinary)):
                try:
                    graph = _Shallow().trace(parent, concrete_args=concrete or None)
                except Exception:  # whatever a forward raises that is not given tensors
                    if not concrete:
                        return []
                    continue
                shown.append(dict(_followers(parent, graph)))
    finally:
        parent.training = training
    first, *others = shown
    return [
        (slot, norms)
        for slot, norms in first.items()
        if all({id(n) for n in other.get(slot, ())} == {id(n) for n in norms} for other in others)
    ]


def _followers(parent: nn.Module, graph: torch.fx.Graph) -> Iterator[tuple[str, list[Accelerated]]]:
    """Children that see nothing but the results of norms, which nobody else sees."""
    calls: dict[str, list[torch.fx.Node]] = {}
    for node in graph.nodes:
        if node.op == "call_module":
            calls.setdefault(str(node.target), []).append(node)
    own = Counter(id(m) for m in parent._modules.values())

    def norm_of(node: torch.fx.Node) -> Accelerated | None:
        before = node.args[0] if len(node.args) == 1 and not node.kwargs else None
        if not isinstance(before, torch.fx.Node) or before.op != "call_module" or len(before.users) != 1:
            return None
        norm = parent._modules.get(str(before.target))
        return norm if type(norm) is Accelerated and len(calls[str(before.target)]) == 1 else None

    for slot, nodes in calls.items():
        norms = [norm_of(node) for node in nodes]
        if own[id(parent._modules.get(slot))] == 1 and all(norms):
            yield slot, [norm for norm in norms if norm is not None]
