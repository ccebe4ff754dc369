"""oneDNN's products are the products, with all their derivatives."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from transformers.pytorch_utils import Conv1D

from policylab.functional import products
from policylab.functional.products import FastProducts, linear, onednn_multiplies

pytestmark = pytest.mark.skipif(not onednn_multiplies(), reason="this build of PyTorch has no such operator")


@pytest.fixture
def seen(monkeypatch):
    """The products that oneDNN was asked for, however small they are."""
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
    """fp32 is what oneDNN multiplies, so these are held against PyTorch's own, not against differences."""
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


def test_what_it_is_not_for_stays_as_it_was(seen):
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
