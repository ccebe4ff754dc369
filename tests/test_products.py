"""oneDNN's matrix products and all their derivatives are correct."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from transformers.pytorch_utils import Conv1D

from policylab.functional import products
from policylab.functional.products import (
    CLASSES,
    ONEDNN,
    PYTORCH,
    Choice,
    FastProducts,
    linear,
    onednn_multiplies,
    outer,
)
from policylab.models.decoders.linear import Linear
from policylab.rollouts import products as choosing

pytestmark = pytest.mark.skipif(not onednn_multiplies(), reason="this build of PyTorch has no such operator")


@pytest.fixture(autouse=True)
def choice_of_tests():
    yield
    products.use(ONEDNN)


@pytest.fixture
def seen(monkeypatch):
    """Records the products given to oneDNN, with no minimum size."""
    calls = []
    own = products._onednn
    monkeypatch.setattr(products, "WORTH_A_CALL", 1)
    monkeypatch.setattr(products, "_onednn", lambda *args: calls.append(args) or own(*args))
    return calls


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize(("inner", "outer"), [(5, 9), (9, 5)])
def test_the_product_and_its_gradient(seen, inner, outer, bias):
    x, weight = torch.randn(2, 4, inner, requires_grad=True), torch.randn(outer, inner, requires_grad=True)
    leaves = [x, weight] + ([torch.randn(outer, requires_grad=True)] if bias else [])
    found, expected = linear(*leaves[:2], leaves[2] if bias else None), F.linear(*leaves)
    torch.testing.assert_close(found, expected)
    slope = torch.randn_like(found)
    for ours, theirs in zip(*(torch.autograd.grad(y, leaves, slope) for y in (found, expected)), strict=True):
        torch.testing.assert_close(ours, theirs)
    assert len(seen) == 3


def test_second_derivatives_and_forward_mode(seen):
    """oneDNN computes in fp32, so gradients are compared with PyTorch's own, not with finite differences."""
    leaves = [torch.randn(3, 4), torch.randn(5, 4), torch.randn(5)]
    found = []
    for function in (linear, F.linear):

        def loss(*x, function=function):
            return (function(*x).sin() ** 2).sum()

        _, slopes = torch.autograd.functional.jvp(loss, tuple(leaves), tuple(x + 1 for x in leaves))
        hessian = torch.autograd.functional.hessian(loss, tuple(leaves))
        with torch.autograd.forward_ad.dual_level():
            duals = [torch.autograd.forward_ad.make_dual(x, x + 1) for x in leaves]
            tangent = torch.autograd.forward_ad.unpack_dual(function(*duals)).tangent
        found.append([slopes, tangent, *(block for row in hessian for block in row)])
    for ours, theirs in zip(*found, strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=1e-4)


def test_a_tangent_of_the_bias_alone(seen):
    x, weight, bias = torch.randn(3, 4), torch.randn(5, 4), torch.randn(5)
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(bias, bias + 1)
        tangent = torch.autograd.forward_ad.unpack_dual(linear(x, weight, dual)).tangent
    torch.testing.assert_close(tangent, (bias + 1).expand(3, 5))


@pytest.mark.parametrize("layer", [nn.Linear(6, 4), nn.Linear(6, 4, bias=False), Conv1D(4, 6)], ids=str)
def test_layers_of_models_multiply_by_it(seen, layer):
    x = torch.randn(2, 3, 6)
    with FastProducts():
        found = layer(x)
    torch.testing.assert_close(found, layer(x))
    assert len(seen) == 1


def test_other_inputs_use_pytorch(seen):
    x, weight = torch.randn(3, 4), torch.randn(5, 4)
    with FastProducts(), torch.autocast("cpu", torch.bfloat16):
        assert F.linear(x, weight).dtype == torch.bfloat16
    with FastProducts():
        F.linear(x.double(), weight.double())
        torch.addmm(torch.zeros(3, 5), x, weight.t(), beta=0.5)
    assert not seen


def test_small_products_are_not_worth_a_call(monkeypatch):
    def never(*_):
        raise AssertionError

    monkeypatch.setattr(products, "_onednn", never)
    linear(torch.randn(3, 4), torch.randn(5, 4), None)


# -- operands of any strides -------------------------------------------------------------------------------

#: Memory layouts of a matrix of a given shape.
LAYOUTS = {
    "contiguous": lambda m, n: torch.randn(m, n),
    "transposed": lambda m, n: torch.randn(n, m).t(),
    "one row expanded": lambda m, n: torch.randn(1, n).expand(m, n),
    "one column expanded": lambda m, n: torch.randn(m, 1).expand(m, n),
    "a number expanded": lambda m, n: torch.randn(1, 1).expand(m, n),
    "columns of a wider one": lambda m, n: torch.randn(m, n + 3)[:, 2:-1],
    "rows of a wider one, transposed": lambda m, n: torch.randn(n, m + 3)[:, 2:-1].t(),
    "every second column": lambda m, n: torch.randn(m, 2 * n)[:, ::2],
    "every second row": lambda m, n: torch.randn(2 * m, n)[::2],
}
BIASES = {
    "contiguous": torch.randn,
    "a number expanded": lambda n: torch.randn(1).expand(n),
    "every second": lambda n: torch.randn(2 * n)[::2],
}


def check_fast(calls):
    """Asserts that oneDNN has fast kernels for its inputs: its reference kernel takes minutes for a layer."""
    for _, weight, bias in calls:
        assert weight.is_contiguous() or weight.t().is_contiguous()
        assert bias is None or bias.is_contiguous()


@pytest.mark.parametrize("lies", LAYOUTS)
@pytest.mark.parametrize("operand", ["x", "weight", "slope"])
@pytest.mark.parametrize(("n", "i", "o"), [(6, 5, 9), (6, 9, 5), (1, 5, 9), (6, 1, 9), (6, 5, 1)])
def test_any_strides_in_both_directions(seen, operand, lies, n, i, o):
    shapes = {"x": (n, i), "weight": (o, i), "slope": (n, o)}
    made = {
        name: LAYOUTS[lies if name == operand else "contiguous"](*shape) for name, shape in shapes.items()
    }
    leaves = [made["x"].requires_grad_(), made["weight"].requires_grad_()]
    found, expected = linear(*leaves, None), F.linear(*leaves)
    torch.testing.assert_close(found, expected)
    for ours, theirs in zip(
        *(torch.autograd.grad(y, leaves, made["slope"]) for y in (found, expected)), strict=True
    ):
        torch.testing.assert_close(ours, theirs)
    assert len(seen) == 3
    check_fast(seen)


@pytest.mark.parametrize("lies", BIASES)
def test_a_bias_of_any_stride(seen, lies):
    """oneDNN reads a bias as contiguous: with another stride it read memory beyond the end."""
    x, weight, bias = torch.randn(6, 5), torch.randn(9, 5), BIASES[lies](9)
    torch.testing.assert_close(linear(x, weight, bias), F.linear(x, weight, bias))
    torch.testing.assert_close(Linear(weight, bias, torch.float32)(x), F.linear(x, weight, bias))
    check_fast(seen)


def test_the_gradient_of_a_sum_is_fast(seen):
    """Its gradient is an expanded scalar."""
    layer, x = nn.Linear(5, 9), torch.randn(2, 6, 5, requires_grad=True)
    with FastProducts():
        found = torch.autograd.grad(layer(x).sum(), [x, *layer.parameters()])
    expected = torch.autograd.grad(layer(x).sum(), [x, *layer.parameters()])
    torch.testing.assert_close(found, expected)
    assert len(seen) == 3
    check_fast(seen)


# -- who multiplies ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("onednn", "calls"), [(CLASSES, 3), ({"rows/small"}, 1), ({"columns/small"}, 1), ({"outer/small"}, 1),
                          ({"rows/large", "packed/small"}, 0), (frozenset(), 0)]
)  # fmt: skip
def test_each_product_goes_to_the_library_of_its_class(seen, onednn, calls):
    products.use(Choice("test", frozenset(onednn)))
    layer, x, slope = nn.Linear(5, 9), torch.randn(6, 5, requires_grad=True), torch.randn(6, 9)
    with FastProducts():
        found = torch.autograd.grad(layer(x), [x, *layer.parameters()], slope)
    torch.testing.assert_close(found, torch.autograd.grad(layer(x), [x, *layer.parameters()], slope))
    assert len(seen) == calls


def test_pytorchs_products_are_equal_to_the_bit(seen):
    products.use(PYTORCH)
    x, weight = torch.randn(60, 50, requires_grad=True), torch.randn(90, 50, requires_grad=True)
    assert torch.equal(linear(x, weight, None), F.linear(x, weight))
    assert torch.equal(outer(x, x), x.t() @ x)
    assert not products.replaces_layers()
    assert not seen


@pytest.mark.parametrize("then", [None, "gelu", "swish"])
@pytest.mark.parametrize("choice", [PYTORCH, ONEDNN], ids=lambda choice: choice.reason)
@pytest.mark.parametrize("lies", LAYOUTS)
def test_decoding_by_either_library(choice, then, lies):
    products.use(choice)
    x, weight, bias, residual = torch.randn(6, 5), LAYOUTS[lies](9, 5), torch.randn(9), torch.randn(6, 9)
    layer = Linear(weight, bias, torch.float32, then)
    assert layer.packed == (choice is ONEDNN)
    expected = F.linear(x, weight, bias)
    if then is not None:
        expected = F.gelu(expected, approximate="tanh") if then == "gelu" else F.silu(expected)
    torch.testing.assert_close(layer(x), expected)
    if then is None:
        torch.testing.assert_close(layer.onto(x, residual), residual + expected)


def test_an_unknown_class_is_refused():
    with pytest.raises(ValueError, match="no classes of products"):
        products.use(Choice("test", frozenset({"rows/huge"})))


# -- choosing ----------------------------------------------------------------------------------------------


@pytest.fixture
def measurements(monkeypatch):
    """Counts the measurements. By the first, oneDNN wins only for ``rows/small``; by later ones, for every class."""
    count = []

    def measured():
        count.append(1)
        return {name: (1.0, 2.0 if name == "rows/small" or len(count) > 1 else 1.05) for name in CLASSES}

    monkeypatch.setattr(choosing, "measured", measured)
    return count


def test_a_machine_is_measured_once(measurements, tmp_path):
    first = choosing.choice_of_machine(tmp_path / "new")
    assert first.onednn == {"rows/small"}
    assert choosing.choice_of_machine(tmp_path / "new") == first
    assert len(measurements) == 1
    assert [file.suffix for file in (tmp_path / "new").iterdir()] == [".json"]


def test_of_two_processes_the_first_to_write_chooses_for_both(measurements, tmp_path, monkeypatch):
    ours = choosing.measured

    def meanwhile_another():
        rates = ours()
        if len(measurements) == 1:
            choosing.choice_of_machine(tmp_path)
        return rates

    monkeypatch.setattr(choosing, "measured", meanwhile_another)
    assert choosing.choice_of_machine(tmp_path).onednn == CLASSES


@pytest.mark.parametrize(
    "content", ["", "{}", '{"onednn": ["rows/huge"]}', '{"onednn": 3}', "[]", '{"onednn": [[]]}']
)
def test_a_damaged_choice_is_measured_again_with_a_message(measurements, tmp_path, caplog, content):
    choosing.choice_of_machine(tmp_path)
    (file,) = tmp_path.iterdir()
    file.write_text(content)
    assert choosing.choice_of_machine(tmp_path).onednn == CLASSES
    assert "is damaged; the products are measured again" in caplog.text


def test_a_choice_that_cannot_be_saved_is_told(measurements, tmp_path, caplog):
    (tmp_path / "file").touch()
    assert choosing.choice_of_machine(tmp_path / "file").onednn == PYTORCH.onednn
    assert "hardware.products=pytorch or onednn" in caplog.text


def test_measuring_leaves_threads_and_choice_as_they_were(monkeypatch):
    monkeypatch.setattr(choosing, "SHAPES", dict.fromkeys(products.SIZES, (16, 8, 8)))
    monkeypatch.setattr(choosing, "DECODING", dict.fromkeys(products.SIZES, (16, 8, 8)))
    threads = torch.get_num_threads()
    rates = choosing.measured()
    assert rates.keys() == CLASSES
    assert all(rate > 0 for pair in rates.values() for rate in pair)
    assert (torch.get_num_threads(), products.chosen()) == (threads, ONEDNN)


@pytest.mark.parametrize(("name", "shape"), [*choosing.SHAPES.items(), *choosing.DECODING.items()])
def test_measured_products_belong_to_their_class(name, shape):
    n, i, o = shape
    rows = products.PACKED_ROWS if (n, i, o) in choosing.DECODING.values() else n
    assert products.size_of(rows * i * o) == name
    assert n * i * o >= products.WORTH_A_CALL


def test_a_resumed_run_uses_the_same_library():
    products.use(Choice("this machine", frozenset({"rows/small"})))
    kept = products.chosen().plain()
    products.use(Choice("this machine", frozenset()))  # although the cache has changed
    products.restore(kept)
    assert products.chosen().onednn == {"rows/small"}
    products.use(Choice("another machine", frozenset()))
    products.restore(kept)
    assert products.chosen().onednn == set()
