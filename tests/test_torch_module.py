"""A model that is accelerated is the same model: values, state, copies, and what it was before, if wanted."""

import copy
import functools
import io
import pickle
import random
import warnings

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="PyTorch is not installed")

import torch.nn.functional as F  # noqa: E402
from torch import nn  # noqa: E402
from torch.testing import assert_close  # noqa: E402
from torch.testing._internal.common_modules import module_db  # noqa: E402

import gn_fast.torch  # noqa: E402
from gn_fast.torch import accelerate, restore  # noqa: E402

ACTIVATIONS = [
    nn.ReLU(), nn.ReLU(inplace=True), nn.LeakyReLU(0.2), nn.SiLU(), nn.GELU(), nn.GELU("tanh"), nn.Mish(),
    nn.Hardswish(), nn.Sigmoid(), nn.Tanh(),
]  # fmt: skip


def x():
    return torch.randn(2, 8, 5, 5, generator=torch.Generator().manual_seed(0)) * 2 + 1


def trained(model):
    """With parameters that are not ones and zeros."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(torch.randn(p.shape, generator=generator))
    return model


# ---- the module ------------------------------------------------------------------------------------------


def test_samples_of_pytorch():
    info = next(info for info in module_db if info.module_cls is nn.GroupNorm)
    for training in (True, False):
        for sample in info.module_inputs_func(info, "cpu", torch.float32, True, training):
            made, given = sample.constructor_input, sample.forward_input
            ours = gn_fast.torch.GroupNorm(*made.args, **made.kwargs).train(training)
            theirs = nn.GroupNorm(*made.args, **made.kwargs).train(training)
            ours.load_state_dict(theirs.state_dict())
            assert_close(ours(*given.args), theirs(*given.args), rtol=1e-5, atol=1e-5)
            if sample.reference_fn is not None:
                sample.reference_fn(ours, list(ours.parameters()), *given.args, **given.kwargs)
            assert repr(ours) == repr(theirs)


def test_an_activation_is_in_the_module():
    norm = trained(gn_fast.torch.GroupNorm(2, 8, activation="silu"))
    assert_close(norm(x()), F.silu(F.group_norm(x(), 2, norm.weight, norm.bias)), rtol=1e-5, atol=1e-5)
    assert repr(norm).endswith("activation='silu')")
    assert list(norm.state_dict()) == ["weight", "bias"]
    assert isinstance(norm, nn.GroupNorm)
    with pytest.raises(ValueError, match=r"activation must be one of .*, not 'selu'"):
        gn_fast.torch.GroupNorm(2, 8, activation="selu")
    with pytest.raises(ValueError, match="divisible"):
        gn_fast.torch.GroupNorm(3, 8)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64], ids=str)
def test_dtypes_move_with_the_module(dtype):
    norm = gn_fast.torch.GroupNorm(2, 8, dtype=dtype)
    assert norm(x().to(dtype)).dtype == dtype
    assert norm.to(torch.float32).weight.dtype == torch.float32


# ---- accelerate ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("activation", ACTIVATIONS, ids=repr)
def test_neighbours_in_a_sequential(activation):
    model = trained(nn.Sequential(nn.Conv2d(8, 8, 3), nn.GroupNorm(2, 8), activation, nn.Conv2d(8, 4, 1)))
    expected, text, state = model(x()), repr(model), copy.deepcopy(model.state_dict())
    report = accelerate(model)
    assert (report.replaced, list(report.fused), report.left) == (["1"], ["1"], {})
    assert_close(model(x()), expected, rtol=1e-5, atol=1e-5)
    assert list(model.state_dict()) == list(state)
    assert_close(dict(model.state_dict()), dict(state))
    restore(model)
    assert repr(model) == text
    assert model[2] is activation
    assert type(model[1]) is nn.GroupNorm
    assert torch.equal(model(x()), expected)


@pytest.mark.parametrize("slope", [float("inf"), float("nan")])
def test_a_slope_that_the_kernel_does_not_take(slope):
    model = nn.Sequential(nn.GroupNorm(2, 8), nn.LeakyReLU(slope))
    expected = model(x())
    torch._dynamo.reset()
    assert_close(torch.compile(model, backend=gn_fast.torch.backend)(x()), expected, equal_nan=True)
    assert not accelerate(model).fused
    assert_close(model(x()), expected, equal_nan=True)


class Block(nn.Module):
    """As residual blocks are: one activation for two norms."""

    def __init__(self):
        super().__init__()
        self.norm1, self.norm2 = nn.GroupNorm(2, 8), nn.GroupNorm(4, 8)
        self.conv1, self.conv2 = nn.Conv2d(8, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1)
        self.act = nn.SiLU()

    def forward(self, x):
        h = self.conv1(self.act(self.norm1(x)))
        return x + self.conv2(self.act(self.norm2(h)))


class Told(Block):
    def forward(self, x, embedding=None):
        h = self.act(self.norm1(x))
        if embedding is not None:
            h = h + self.act(embedding)
        return x + self.conv2(self.act(self.norm2(h)))


class Trains(Block):
    def forward(self, x):
        h = self.norm1(x)
        return self.act(h) if self.training else h


class SeenTwice(Block):
    def forward(self, x):
        h = self.norm1(x)
        return self.act(h) + h + self.norm2(x)


class NormTwice(Block):
    def forward(self, x):
        return self.act(self.norm1(x)) + self.conv1(self.norm1(-x))


class Depends(Block):
    def forward(self, x):
        h = self.norm1(x)
        return self.act(h) if h.sum() > 0 else h


class TwoNames(Block):
    def __init__(self):
        super().__init__()
        self.act2 = self.act

    def forward(self, x):
        return self.act2(self.norm1(x)) + self.act(self.norm2(x))


class Looped(Block):
    def forward(self, x):
        for _ in range(2):
            x = self.act(self.norm1(x))
        return x


class Functional(Block):
    def forward(self, x):
        return F.silu(self.norm1(x))


class Listed(Block):
    """Which is traced to the activation by its name, and runs the one in the list."""

    def __init__(self):
        super().__init__()
        self.acts = [self.act]

    def forward(self, x):
        return self.acts[0](self.norm1(x))


class Moded(Block):
    def __init__(self, mode):
        super().__init__()
        self.mode = mode

    def forward(self, x):
        h = self.norm1(x)
        with self.mode():
            a = self.act(h)
        return x + a


class Counts(Block):
    def __init__(self):
        super().__init__()
        self.calls, self.log = 0, []

    def forward(self, x):
        self.calls += 1
        self.log.append(x)
        return super().forward(x)


class Draws(Block):
    def __init__(self, draw):
        super().__init__()
        self.draw = draw

    def forward(self, x):
        h = self.norm1(x)
        return self.act(h) + 0 * self.draw()


class Selects(Block):
    """Whose activation is seen in a run with the last argument only, and which cannot be traced without."""

    def forward(self, x, scale=1):
        h = self.norm1(x)
        if scale is None:
            return h if x.sum() > 0 else self.act(h)
        return self.act(h) * scale


class More(Block):
    """As diffusers' blocks, which warn of what they do not take any more."""

    def forward(self, x, *args, **kwargs):
        if len(args) > 0 or kwargs.get("scale") is not None:
            warnings.warn("scale is ignored", stacklevel=2)
        return super().forward(x)


class MoreChanges(Block):
    def forward(self, x, *args):
        h = self.norm1(x)
        return h if len(args) > 0 else self.act(h)


class Asks(Block):
    def forward(self, x):
        h = self.act(self.norm1(x))
        return h + 1 if isinstance(self.act, nn.SiLU) else h


class Bound(Block):
    """Whose forward is the object's own."""

    def __init__(self):
        super().__init__()
        self.forward = lambda x: self.act(self.norm1(x)) + self.norm1(x)


class OwnSequential(nn.Sequential):
    def __init__(self):
        super().__init__(nn.GroupNorm(2, 8), nn.SiLU())

    def forward(self, x):
        return self[0](x) + self[1](x)


class Backwards(nn.Sequential):
    def __init__(self):
        super().__init__(nn.GroupNorm(2, 8), nn.SiLU())

    def __iter__(self):
        return iter(list(self._modules.values())[::-1])


class BoundSequential(nn.Sequential):
    def __init__(self):
        super().__init__(nn.GroupNorm(2, 8), nn.SiLU())
        self.forward = lambda x: self[0](x)


class Calls(Block):
    def __call__(self, x):
        return super().__call__(x) + self.norm1(x)


class CallsSequential(nn.Sequential):
    def __init__(self):
        super().__init__(nn.GroupNorm(2, 8), nn.SiLU())

    def __call__(self, x):
        return self[0](x)


@pytest.mark.parametrize(
    ("make", "fused"),
    [(Block, ["norm1", "norm2"]), (Told, []), (Trains, []), (SeenTwice, []), (NormTwice, []), (Depends, []),
     (TwoNames, ["norm1", "norm2"]), (Looped, []), (Functional, []), (OwnSequential, []), (Listed, []), (Selects, []),
     (Counts, ["norm1", "norm2"]), (More, ["norm1", "norm2"]), (MoreChanges, []),
     (Asks, []), (Bound, []), (Backwards, []), (BoundSequential, []),
     (Calls, []), (CallsSequential, [])],
    ids=lambda value: getattr(value, "__name__", None),
)  # fmt: skip
def test_what_is_fused_is_certain(make, fused):
    model = trained(make())
    inputs = [(x(),), (x(), x())] if isinstance(model, Told) else [(x(),)]
    expected = [model.train(mode)(*given) for given in inputs for mode in (True, False)]
    report = accelerate(model)
    assert sorted(report.fused) == fused, report
    for e, y in zip(
        expected, [model.train(mode)(*given) for given in inputs for mode in (True, False)], strict=True
    ):
        assert_close(y, e, rtol=1e-5, atol=1e-5)
    restore(model)
    assert torch.equal(model.train()(*inputs[0]), expected[0])


class Hands(nn.Module):
    def forward(self, x, module):
        return module(x)


def by_a_flag(self, x, raw=False):
    h = self.norm1(x)
    return h if raw is True else self.act(h)


def by_a_name(self, x, mode="none"):
    h = self.norm1(x)
    return h if mode in {"none", "linear"} else self.act(h)


def by_a_class(self, x):
    h = self.norm1(x)
    return h if isinstance(x, torch.Tensor) else self.act(h)


def by_the_first_argument(self, x=None, other=None):
    return self.norm1(other) if x is None else self.act(self.norm1(x))


def by_a_childs_mode(self, x):
    h = self.norm1(x)
    return self.act(h) if self.norm1.training else h


def hands_the_activation_on(self, x):
    return self.hands(self.act(self.norm1(x)) - 1, self.act)


def hands_the_norm_on(self, x):
    return self.hands(self.act(self.norm1(x)) - 1, self.norm1)


def calls_a_forward(self, x):
    return self.act(self.norm1(x)) + self.norm1.forward(x)


@pytest.mark.parametrize(
    ("forward", "calls"),
    [(by_a_flag, [{}, {"raw": True}]), (by_a_name, [{}, {"mode": "silu"}]), (by_a_class, [{}]),
     (by_the_first_argument, [{}, {"x": None, "other": x()}]), (by_a_childs_mode, [{}]), (hands_the_norm_on, [{}]),
     (hands_the_activation_on, [{}]), (calls_a_forward, [{}])],
    ids=lambda value: getattr(value, "__name__", None),
)  # fmt: skip
def test_what_a_forward_goes_by(forward, calls):
    model = Block()
    model.__class__ = type(forward.__name__, (Block,), {"forward": forward})
    model.hands = Hands()
    trained(model)

    def run():
        return [model.train(mode)(**({"x": x()} | call)) for mode in (False, True) for call in calls]

    expected = run()
    report = accelerate(model)
    assert not report.fused
    assert "act" in report.left
    assert_close(run(), expected, rtol=1e-5, atol=1e-5)


class Marks(Block):
    """Which changes what it holds when it runs."""

    def __init__(self):
        super().__init__()
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x):
        self.calls.add_(1)
        self.conv1.seen = x
        return super().forward(x)


def test_a_trace_changes_nothing_that_a_module_holds():
    model = Marks()
    assert len(accelerate(model).fused) == 2
    assert model.calls == 0
    assert not hasattr(model.conv1, "seen")


def test_a_forward_without_a_signature():
    model = Block()
    model.__class__ = type("Odd", (Block,), {"forward": min})
    assert "no signature" in accelerate(model).left["act"]


def test_a_norm_with_an_activation_of_its_own_stays():
    model = nn.GroupNorm(2, 8)
    model.activation = nn.SiLU()
    assert "attribute" in accelerate(model).left[""]
    assert type(model.activation) is nn.SiLU


def test_another_activation_in_the_place_of_one_that_was_fused():
    model = trained(nn.Sequential(nn.GroupNorm(2, 8), nn.SiLU()))
    accelerate(model)
    model[1], expected = nn.Tanh(), model(x()).tanh()
    model.append(nn.GroupNorm(2, 8))
    assert "has an activation" in accelerate(model).left["1"]
    assert_close(model[:2](x()), expected)


MODES = {
    "no_grad": torch.no_grad,
    "inference_mode": torch.inference_mode,
    "autocast": lambda: torch.autocast("cpu", torch.bfloat16),
}


@pytest.mark.parametrize("mode", MODES.values(), ids=MODES)
def test_a_mode_between_them_keeps_them_apart(mode):
    model = trained(Moded(mode))
    expected = torch.autograd.grad(model(given := x().requires_grad_()).sum(), given)
    assert not accelerate(model).fused
    assert_close(torch.autograd.grad(model(given).sum(), given), expected, rtol=1e-5, atol=1e-5)


def test_what_a_trace_would_leave_behind():
    model = Counts()
    accelerate(model)
    assert (model.calls, model.log) == (0, [])
    copy.deepcopy(model)


DRAWS = {"torch": lambda: torch.rand(()), "numpy": lambda: np.random.rand(), "python": random.random}  # noqa: NPY002


@pytest.mark.parametrize("draw", DRAWS.values(), ids=DRAWS)
def test_random_numbers_are_not_drawn(draw):
    model = Draws(draw)
    for seed in (torch.manual_seed, np.random.seed, random.seed):
        seed(0)
    expected = draw(), draw()
    for seed in (torch.manual_seed, np.random.seed, random.seed):
        seed(0)
    first = draw()
    assert "draws random numbers" in accelerate(model).left["act"]
    assert (first, draw()) == expected


def test_an_activation_with_a_state_stays():
    model = nn.Sequential(nn.GroupNorm(2, 8), nn.ReLU())
    model[1].register_buffer("calls", torch.zeros(1))
    keys = list(model.state_dict())
    assert "state of its own" in accelerate(model).left["1"]
    assert list(model.state_dict()) == keys


def test_training_mode_is_kept():
    model = nn.Sequential(nn.GroupNorm(2, 8), nn.ReLU()).eval()
    accelerate(model)
    assert not any(m.training for m in model.modules())
    restore(model)
    assert not any(m.training for m in model.modules())


@pytest.mark.parametrize("place", [0, 1])
@pytest.mark.parametrize("hook", ["forward", "forward_pre", "full_backward"])
def test_hooks_are_kept_and_see_what_they_saw(place, hook):
    model, seen = trained(nn.Sequential(nn.GroupNorm(2, 8), nn.SiLU())), []
    getattr(model[place], f"register_{hook}_hook")(lambda *args: seen.append(args[1:]))

    def run():
        seen.clear()
        model(x().requires_grad_()).sum().backward()
        return list(seen)

    expected = run()
    report = accelerate(model)
    assert report.replaced == ["0"]
    assert not report.fused
    assert "hooks" in report.left["1"]
    assert_close(run(), expected, rtol=1e-4, atol=1e-5)


def test_a_norm_in_two_places_is_not_fused():
    norm = nn.GroupNorm(2, 8)
    model = trained(nn.Sequential(norm, nn.SiLU(), nn.Sequential(norm, nn.Conv2d(8, 8, 1))))
    expected = model(x())
    report = accelerate(model)
    assert "several places" in report.left["1"]
    assert_close(model(x()), expected, rtol=1e-5, atol=1e-5)
    assert model[0] is model[2][0]


def test_an_activation_in_two_places_is_fused_in_one():
    act = nn.SiLU()
    model = trained(nn.Sequential(nn.GroupNorm(2, 8), act, nn.Conv2d(8, 8, 1), act))
    expected = model(x())
    assert list(accelerate(model).fused) == ["0"]
    assert_close(model(x()), expected, rtol=1e-5, atol=1e-5)
    restore(model)
    assert model[1] is model[3] is act


def test_the_model_itself_may_be_the_norm():
    model = nn.GroupNorm(2, 8).eval()
    report = accelerate(model)
    assert report.replaced == [""]
    assert type(model) is not nn.GroupNorm
    assert not model.training
    restore(model)
    assert type(model) is nn.GroupNorm


class Special(nn.GroupNorm):
    def forward(self, input):
        return super().forward(input) + 1


def test_what_is_left_says_why():
    other = nn.GroupNorm(2, 8)
    other.forward = lambda input: input
    model = nn.ModuleDict({"own": Special(2, 8), "patched": other, "script": torch.jit.script(nn.GroupNorm(2, 8)),
                           "ours": gn_fast.torch.GroupNorm(2, 8),
                           "complex": nn.GroupNorm(2, 8, dtype=torch.complex64)})  # fmt: skip
    report = accelerate(model)
    assert report.replaced == []
    assert "Special" in report.left["own"]
    assert "forward is another" in report.left["patched"]
    assert "TorchScript" in report.left["script"]
    assert "complex64" in report.left["complex"]
    assert "ours" not in report.left
    assert str(report).startswith("0 replaced")
    restore(model)
    assert type(model["ours"]) is gn_fast.torch.GroupNorm


@pytest.mark.parametrize("way", ["deepcopy", "pickle", "save"])
def test_copies_can_be_restored(way):
    model = trained(nn.Sequential(nn.GroupNorm(2, 8), nn.SiLU(), Block()))
    text = repr(model)
    expected = model(x())
    accelerate(model)
    if way == "deepcopy":
        other = copy.deepcopy(model)
    elif way == "pickle":
        other = pickle.loads(pickle.dumps(model))
    else:
        file = io.BytesIO()
        torch.save(model, file)
        file.seek(0)
        other = torch.load(file, weights_only=False)
    assert_close(other(x()), expected, rtol=1e-5, atol=1e-5)
    restore(other)
    assert repr(other) == text
    assert torch.equal(other(x()), expected)


def test_the_meta_device_and_frozen_parameters():
    with torch.device("meta"):
        model = nn.Sequential(nn.GroupNorm(2, 8), nn.SiLU())
    model[0].weight.requires_grad_(False)
    weight = model[0].weight
    accelerate(model)
    assert model[0].weight is weight
    assert not weight.requires_grad
    assert model(torch.empty(2, 8, 5, device="meta")).is_meta
    model.to_empty(device="cpu")
    assert model(x()).shape == (2, 8, 5, 5)


def test_twice_is_once():
    model = nn.Sequential(nn.GroupNorm(2, 8), nn.SiLU())
    accelerate(model)
    assert accelerate(model).replaced == []
    restore(model)
    restore(model)
    assert [type(m) for m in model] == [nn.GroupNorm, nn.SiLU]


def test_training_goes_on_after_restore():
    model = trained(nn.Sequential(nn.GroupNorm(2, 8), nn.SiLU()))
    accelerate(model)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    model(x()).square().sum().backward()
    optimizer.step()
    y = model(x())
    restore(model.eval())
    assert not model[1].training
    assert_close(model(x()), y, rtol=1e-5, atol=1e-5)


def test_a_norm_that_is_parametrized_meanwhile():
    model = trained(nn.Sequential(nn.GroupNorm(2, 8), nn.SiLU()))
    expected = model(x())
    accelerate(model)
    nn.utils.parametrize.register_parametrization(model[0], "weight", nn.Identity())
    restore(model)
    assert_close(model(x()), expected, rtol=1e-5, atol=1e-5)
    nn.utils.parametrize.remove_parametrizations(model[0], "weight")
    restore(model)
    assert type(model[0]) is nn.GroupNorm


@pytest.mark.parametrize("call", [accelerate, restore])
def test_what_is_no_model(call):
    with pytest.raises(TypeError, match=r"model must be a torch.nn.Module, not list"):
        call([nn.GroupNorm(2, 8)])


# ---- the backend -----------------------------------------------------------------------------------------


class Everything(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm = nn.GroupNorm(2, 8)
        self.modules_ = nn.ModuleList(ACTIVATIONS)

    def forward(self, x):
        for act in self.modules_:
            x = act(self.norm(x))
        for act in (
            torch.relu,
            F.silu,
            torch.sigmoid,
            torch.tanh,
            F.relu_,
            F.gelu,
            F.hardswish,
            F.mish,
            F.leaky_relu,
        ):
            x = act(self.norm(x))
        x = self.norm(x).relu() + F.gelu(F.group_norm(x, num_groups=4, eps=1e-3), approximate="tanh")
        y = self.norm(x)
        return F.silu(y) + y


@pytest.mark.parametrize("rest", ["eager", "aot_eager"])
def test_backend(rest):
    torch._dynamo.reset()
    model, rewritten = trained(Everything()), []
    from gn_fast.torch import _backend

    def spy(graph):
        rewritten.append(
            (rewrite(graph), sum(n.target is gn_fast.torch.group_norm for n in graph.graph.nodes))
        )
        assert not any(n.target is F.group_norm for n in graph.graph.nodes)

    rewrite, _backend.rewrite = _backend.rewrite, spy
    try:
        compiled = torch.compile(model, backend=gn_fast.torch.backend, options={"rest": rest}, fullgraph=True)
        expected, y = model(x()), compiled(x())
    finally:
        _backend.rewrite = rewrite
    assert rewritten == [(21, 22)]
    assert_close(y, expected, rtol=1e-4, atol=1e-5)
    parameters = list(model.parameters())
    assert_close(torch.autograd.grad(y.sum(), parameters), torch.autograd.grad(expected.sum(), parameters),
                 rtol=1e-3, atol=1e-3)  # fmt: skip


def compiled(f):
    torch._dynamo.reset()
    return torch.compile(f, backend=gn_fast.torch.backend, fullgraph=True)


def test_backend_and_what_is_changed_in_place():
    def f(x):
        x = x * 1
        h = F.group_norm(x, 4)
        x.mul_(0).add_(1)
        return F.silu(h) + x

    assert_close(compiled(f)(x()), f(x()), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("mode", MODES.values(), ids=MODES)
def test_backend_and_modes(mode):
    def f(x):
        h = F.group_norm(x, 4)
        with mode():
            a = F.silu(h)
        return x + a

    given = x().requires_grad_()
    found, expected = (torch.autograd.grad(g(given).sum(), given)[0] for g in (compiled(f), f))
    assert_close(found, expected, rtol=1e-5, atol=1e-5)


def test_backend_and_what_inductor_is_told(monkeypatch):
    import torch._inductor.compile_fx

    def spy(graph, example_inputs, *args, config_patches=None, **kwargs):
        told.append(config_patches)
        return graph

    told = []
    monkeypatch.setattr(torch._inductor.compile_fx, "compile_fx", spy)
    model = trained(nn.Sequential(nn.GroupNorm(2, 8), nn.SiLU()))
    for mode in (None, "max-autotune-no-cudagraphs"):
        torch._dynamo.reset()
        options = {"rest": "inductor", "epilogue_fusion": False}
        call = functools.partial(gn_fast.torch.backend, mode=mode, options=options)
        assert_close(torch.compile(model, backend=call)(x()), model(x()), rtol=1e-5, atol=1e-5)
    assert [told_.get("epilogue_fusion") for told_ in told] == [False, False]
    assert "max_autotune" not in told[0]
    assert told[1]["max_autotune"]
