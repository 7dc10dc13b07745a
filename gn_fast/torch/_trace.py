"""What one module's forward does, by `torch.fx`, as far as it is certain whatever it is called with.

A copy of the module is traced, in training and not, with any argument None and flags either way. What cannot be told
from that, as it depends on values, classes or random numbers, is an `UnclearError`.
"""

import contextlib
import copy
import inspect
import itertools
import random
import warnings
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import nn


class UnclearError(Exception):
    """What a module does cannot be told from a trace."""


class _Proxy(torch.fx.Proxy):
    """Is found in no set and no dict, where what it stands for may be."""

    __hash__ = None  # type: ignore[assignment]


class _Shallow(torch.fx.Tracer):
    """Sees one module's own forward, its children as calls, and the modes that these run in."""

    proxy_buffer_attributes = True  # or what a forward does to a buffer in place would be done

    def __init__(self, given: Mapping[str, Any]) -> None:
        super().__init__()
        self.given = given

    def create_args_for_root(self, root_fn: Any, is_module: bool, concrete_args: Any = None) -> tuple[Any, list[Any]]:
        """What is given, and tensors for all else. Behind ``*`` is nothing if it is not given, behind ``**`` never."""
        positional, named = [], {}
        for p in list(inspect.signature(root_fn).parameters.values())[1:]:
            if p.kind == p.VAR_KEYWORD or (p.kind == p.VAR_POSITIONAL and p.name not in self.given):
                continue
            stand_in = p.kind == p.VAR_POSITIONAL or p.name not in self.given
            value = self.create_proxy("placeholder", p.name, (), {}) if stand_in else self.given[p.name]
            if p.kind == p.KEYWORD_ONLY:
                named[p.name] = value
            else:
                positional.append(value)
        return lambda root: root_fn(root, *positional, **named), [self.root]

    def proxy(self, node: torch.fx.Node) -> torch.fx.Proxy:
        return _Proxy(node, self)

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return True

    def create_node(self, *args: Any, **kwargs: Any) -> torch.fx.Node:
        node = super().create_node(*args, **kwargs)
        autocast = torch.is_autocast_enabled("cpu"), torch.get_autocast_dtype("cpu")
        node.meta["modes"] = torch.is_grad_enabled(), torch.is_inference_mode_enabled(), autocast
        return node


def graphs(
    parent: nn.Module, stand_ins: Sequence[Mapping[str, nn.Module]], shared: Mapping[int, Any]
) -> Iterator[torch.fx.Graph]:
    """Graphs of a module's forward, each the same with any of these sets of children in their places.

    `shared` is what the copy that is traced has in common with the module, by id.
    """
    if _looks_at_classes(parent):
        raise UnclearError("it may look at the class of an argument, which is no tensor in a trace")
    for training, given in itertools.product((False, True), _arguments(parent)):
        try:
            with _nothing_left_behind(parent):
                graph, *others = (_trace(parent, children, shared, training, given) for children in stand_ins)
        except UnclearError:
            raise
        except Exception as error:  # whatever a forward raises that is not given tensors
            if None in given.values() and _speaks_of_none(error):
                continue
            raise UnclearError(f"{type(error).__name__}: {str(error).partition(chr(10))[0]}") from None
        if any(str(other) != str(graph) for other in others):
            raise UnclearError("it looks at the class of its activation")
        yield graph


def _trace(
    parent: nn.Module, children: Mapping[str, nn.Module], shared: Mapping[int, Any], training: bool,
    given: dict[str, Any],
) -> torch.fx.Graph:  # fmt: skip
    memo = dict(shared)
    del memo[id(parent)]
    trial = copy.deepcopy(parent, memo)
    trial._modules.update(children)
    for module in trial.modules():
        if "training" in vars(module):
            module.training = training
    return _Shallow(given).trace(trial)


def _looks_at_classes(parent: nn.Module) -> bool:
    """By the names in the code of its forward and of the methods that this calls."""
    todo, names = ["forward"], {"forward"}
    own = [vars(kind) for kind in type(parent).__mro__ if kind is not nn.Module]
    while todo:
        name = todo.pop()
        methods = [inspect.unwrap(kind[name]) for kind in own if name in kind]
        codes = [method.__code__ for method in methods if inspect.isfunction(method)]
        while codes:
            code = codes.pop()
            codes += [c for c in code.co_consts if inspect.iscode(c)]
            todo += {*code.co_names} - names
            names.update(code.co_names)
    return not names.isdisjoint({"isinstance", "is_tensor"})


def _arguments(parent: nn.Module) -> list[dict[str, Any]]:
    """What forward is given besides tensors: any argument None, all of them, flags either way, and more of them."""
    try:
        parameters = list(inspect.signature(parent.forward).parameters.values())
    except ValueError as error:
        raise UnclearError(str(error)) from None
    named = [p for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)]
    ordinary = [p.name for i, p in enumerate(named) if i or p.default is not p.empty]
    flags = [{p.name: value} for p in named if isinstance(p.default, bool) for value in (True, False)]
    more = [{p.name: ...} for p in parameters if p.kind == p.VAR_POSITIONAL]
    return [{}, *({name: None} for name in ordinary), dict.fromkeys(ordinary), *flags, *more]


def _speaks_of_none(error: Exception) -> bool:
    """Whether a forward refuses None for an argument, as it would in a real run."""
    own = isinstance(error, AssertionError | ValueError) and not isinstance(error, torch.fx.proxy.TraceError)
    return own or "NoneType" in str(error)


@contextlib.contextmanager
def _nothing_left_behind(parent: nn.Module) -> Iterator[None]:
    """A forward that draws random numbers may do anything; others find theirs, and what they hold, as they were."""
    before = _random_states()
    held = [d for m in parent.modules() for d in (vars(m), m._modules, m._parameters, m._buffers) if type(d) is dict]
    was = [dict(d) for d in held]
    try:
        with warnings.catch_warnings(action="ignore"):
            yield
        after = _random_states()
    finally:
        torch.set_rng_state(before[0])
        random.setstate(before[1])
        np.random.set_state(before[2])  # noqa: NPY002
        for now, then in zip(held, was, strict=True):
            now.update(then)
            for added in now.keys() - then.keys():
                del now[added]
    same = torch.equal(before[0], after[0]), before[1] == after[1], *map(np.array_equal, before[2], after[2])
    if not all(same):
        raise UnclearError("it draws random numbers")


def _random_states() -> tuple[Any, ...]:
    return torch.get_rng_state(), random.getstate(), np.random.get_state()  # noqa: NPY002
