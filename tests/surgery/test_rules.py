"""Every rule asks for arguments by the names in its op's schema: the whole table is walked."""

from __future__ import annotations

import ast
import inspect
import textwrap
import warnings

import pytest
import torch
from torch import fx, nn
from torch.nn import functional as F

import ockham
from ockham.surgery import trace
from ockham.surgery.labels import argument, chunks, reshaped
from ockham.surgery.ops import RULES

from .law import difference, outputs, randomise, worst_difference
from .nets import Fn, L

BRANCHES = {  # names asked only for some ops of a rule, after a look at which op it is
    "movement": {"dim1", "dim2"},
    "shuffle": {"groups"},
    "binary": {"other"},
    "reduction": {"other"},
    "indexing": {"values"},
}
ELSEWHERE = {
    "uneven_norm",
    "grouped_mm",
    "grouped_mm_fallback",
    "_to_dtype",
    "relu_",
    "detach_",
    "double",
    "float",
    "half",
    "cpu",
    "cuda",
}


def schemas(name):
    """All schemas of an op of this name on tensors (not those which write to `out`)."""
    found = []
    for bare in (name, name + "_"):
        packet = getattr(torch.ops.aten, bare, None)
        for overload in packet.overloads() if packet is not None else ():
            schema = getattr(packet, overload)._schema
            if not any(a.is_out for a in schema.arguments) and "Tensor" in str(schema):
                found.append(schema)
    return found


def asked(rule):
    """(names without which the rule fails, names it can do without), from its source and that of its helpers."""
    module = inspect.getmodule(rule)
    must, may, seen, waiting = [], set(), set(), [rule.__name__]
    while waiting:
        name = waiting.pop()
        function = getattr(module, name, None)
        if name in seen or not inspect.isfunction(function) or inspect.getmodule(function) is not module:
            continue
        seen.add(name)
        for node in ast.walk(ast.parse(textwrap.dedent(inspect.getsource(function)))):
            if not isinstance(node, ast.Call):
                continue
            if isinstance(node.func, ast.Name):
                waiting.append(node.func.id)
            elif isinstance(node.func, ast.Attribute) and getattr(node.func.value, "id", "") == "call":
                names = [a.value for a in node.args if isinstance(a, ast.Constant) and isinstance(a.value, str)]
                if node.func.attr == "need" or (node.func.attr in ("get", "listed") and len(node.args) == 1):
                    must.append(names)
                elif node.func.attr in ("get", "tensor"):
                    may |= set(names[:1])
    return must, may


@pytest.mark.parametrize("name", sorted(set(RULES) - ELSEWHERE))
def test_what_a_rule_asks_for_is_in_the_schema(name):
    rule, known = RULES[name], schemas(name)
    if (not known and name.startswith(("__", "new_"))) or name in ("mT", "mH", "numpy_T"):
        return
    assert known, f"there is no op {name}"
    must, _ = asked(rule)
    arguments = [{a.name for a in schema.arguments} for schema in known]
    for names in must:
        if names and not set(names) <= BRANCHES.get(rule.__name__, set()):
            assert any(set(names) & have for have in arguments), f"{name}: no argument {names} in {known}"


@pytest.mark.parametrize("rule", sorted(set(RULES.values()), key=lambda r: r.__name__), ids=lambda r: r.__name__)
def test_no_rule_asks_for_a_name_that_no_op_has(rule):
    must, may = asked(rule)
    have = {a.name for op, r in RULES.items() if r is rule for schema in schemas(op) for a in schema.arguments}
    have |= (
        {"exponent", "value", "fill_value", "other", "tensor2", "p", "ord"}
        if rule.__name__ in ("binary", "reduction")
        else set()
    )
    assert {n for names in must for n in names} | may <= have | {"dimension", "source", "src", "input", "data", "x"}


def test_arguments_are_found_by_name_wherever_they_stand():
    graph = fx.Graph()
    x = graph.placeholder("x")
    node = graph.call_function(torch.ops.aten.roll.default, (x, [1, 2]), {"dims": [2, 3]})
    assert argument(node, "shifts") == [1, 2] and argument(node, "dims") == [2, 3]
    node = graph.call_function(torch.ops.aten.sum.dim_IntList, (x, [1]))
    assert argument(node, "keepdim") is False and argument(node, "nothing", 7) == 7
    with pytest.raises(LookupError, match="nothing"):
        argument(node, "nothing")


@pytest.mark.parametrize(
    ("shape", "out"), [((2, 3, 4), (6, 4)), ((2, 12), (2, 3, 4)), ((1, 6, 1), (2, 3)), ((4, 6), (8, 3))]
)
def test_labels_of_a_view_are_those_of_the_whole_tensor(shape, out):
    for dim, size in enumerate(shape):
        factor = torch.arange(size).reshape([size if d == dim else 1 for d in range(len(shape))])
        whole = factor.expand(shape).reshape(out)
        assert torch.equal(reshaped(factor, shape, out).expand(out), whole)
    assert sorted(d for ins, _ in chunks(shape, out) for d in ins) == list(range(len(shape)))


IMAGE = torch.linspace(-2, 2, 2 * 3 * 36).sin().reshape(2, 3, 6, 6)
SPATIAL = {
    "roll": lambda h: torch.roll(h, (1, 2), (2, 3)),
    "flip": lambda h: h.flip(3),
    "rot90": lambda h: torch.rot90(h, 1, (2, 3)),
    "diagonal": lambda h: torch.diagonal(h, 0, 2, 3)[..., None],
    "repeat_interleave": lambda h: h.repeat_interleave(2, dim=3),
    "repeat": lambda h: h.repeat(1, 1, 2, 1),
    "std": lambda h: h / (h.std(dim=(2, 3), keepdim=True) + 1),
    "norm": lambda h: h / (h.norm(dim=1, keepdim=True) + 1),
    "var over units": lambda h: h * h.var(1, keepdim=True, unbiased=False),
    "mean over units": lambda h: h + h.mean(1, keepdim=True),
    "local": lambda h: F.unfold(h, 3, padding=1).unflatten(1, (-1, 9)).mean(2, keepdim=True),
    "gather": lambda h: h.flatten(2).gather(2, torch.tensor([0, 3, 5]).expand(*h.shape[:2], 3))[..., None],
    "index_add": lambda h: h.index_add(2, torch.tensor([0, 0, 1, 2]), h),
    "grid": lambda h: F.grid_sample(h, torch.zeros(h.shape[0], 4, 4, 2), align_corners=False),
    "expand": lambda h: h.unsqueeze(1).expand(-1, 3, -1, -1, -1).sum(1),
}


@pytest.mark.parametrize("name", SPATIAL)
def test_what_happens_to_positions_leaves_channels_removable(name):
    torch.manual_seed(0)
    net = Fn(
        lambda self, x: self.b(SPATIAL[name](self.a(x).relu()).flatten(2).mean(2)), a=nn.Conv2d(3, 10, 3), b=L(10, 4)
    )
    randomise(net.eval(), torch.Generator().manual_seed(1))
    groups = trace(net, IMAGE)
    assert {g.id: g.size for g in groups} == {"a.weight:0": 10}
    assert worst_difference(net, groups, IMAGE, ratio=0.5, seed=0)[0] <= 1e-5


EQUATIONS = ["nc,cd->nd", "...c,cd->...d", "ac,cd", "nc,cd,de->ne"]


@pytest.mark.parametrize("equation", EQUATIONS)
def test_einsum_of_all_spellings(equation):
    torch.manual_seed(0)

    def forward(self, x):
        more = [self.v] if equation.count(",") == 2 else []
        return self.b(torch.einsum(equation, self.a(x).relu(), self.w, *more))

    net = Fn(forward, a=L(6, 9), b=L(7, 2))
    net.w, net.v = nn.Parameter(torch.randn(9, 7)), nn.Parameter(torch.randn(7, 7))
    x = torch.randn(4, 6)
    groups = trace(net.eval(), x)
    assert {"a.weight:0", "w:1"} <= set(groups.groups)
    assert worst_difference(net, groups, x, ratio=0.5, seed=0)[0] <= 1e-5


COMPARED = {
    "cosine": (lambda h, k: F.cosine_similarity(h[:, None], k[None], dim=-1), True),
    "cosine of the first dimension but one": (lambda h, k: F.cosine_similarity(h.unsqueeze(2), k.T[None]), True),
    "distances": (torch.cdist, True),
    "distances of a batch": (lambda h, k: torch.cdist(h.unflatten(0, (2, -1)), k), True),
    "sums of differences": (lambda h, k: torch.cdist(h, k, p=1.0), True),
    "largest difference": (lambda h, k: torch.cdist(h, k, p=float("inf")), True),
    "numbers that differ": (lambda h, k: torch.cdist(h, k, p=0.0), True),
    "distances from what is not zero": (lambda h, k: torch.cdist(h + 0.3, k), False),
    "cosine with what is not zero": (lambda h, k: F.cosine_similarity(h[:, None], k.sigmoid(), dim=-1), False),
    "distances that add a little": (lambda h, k: F.pairwise_distance(h[:, None], k[None]), False),
    "over the examples": (lambda h, k: F.cosine_similarity(h, k[0], dim=0), False),
    "one number against all": (lambda h, k: F.cosine_similarity(h[:, None], k[None, :, :1], dim=-1), False),
}


@pytest.mark.parametrize("name", COMPARED)
def test_units_that_are_zero_on_both_sides_add_nothing_to_a_comparison(name):
    function, goes = COMPARED[name]
    torch.manual_seed(0)
    net = Fn(lambda self, x: function(self.a(x).relu(), self.k), a=L(6, 9))
    net.k = nn.Parameter(torch.randn(5, 9))
    randomise(net.eval(), torch.Generator().manual_seed(1))
    x = torch.randn(4, 6)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ockham.OckhamWarning)
        groups = trace(net, x)
    assert set(groups.groups) == ({"a.weight:0"} if goes else set())
    for seed in range(3 if goes else 0):
        assert worst_difference(net, groups, x, ratio=0.6, seed=seed)[0] <= 1e-5


def test_an_op_in_place_that_fills_ends_the_zeros_that_a_norm_needs():
    def forward(self, x):
        y = self.a(x)
        y[:, :4].fill_(1.0)
        return self.b(F.layer_norm(y, (8,)))

    net = Fn(forward, a=L(6, 8), b=L(8, 2))
    x = torch.randn(4, 6)
    from .test_frozen import quiet

    groups = quiet(net.eval(), x)
    assert len(groups) == 0 or worst_difference(net, groups, x, ratio=0.5, seed=0)[0] <= 1e-5
    assert difference(outputs(net, x), outputs(net, x)) == 0
