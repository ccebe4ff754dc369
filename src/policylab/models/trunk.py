"""A Hugging Face causal LM taken apart: its layers, how they were called, what follows the last of them.

Nothing here knows an architecture. Layers are found by their number, what follows them by watching a
forward pass, and the calls of a layer by hooks; `policylab.models.critic` then checks that the parts, put
together again, say the same as the whole.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from policylab.errors import UserError
from policylab.models.head import watch_head
from policylab.models.shape import layer_count

#: Variants of a function that torch compiles before it gives up and runs it as it is. Its own limit of 8 is reached in
#: a few passes, as every kind of product goes through one function (`policylab.functional.products.FastProducts`).
RECOMPILE_LIMIT = 64


@dataclass(frozen=True)
class LayerCall:
    """The arguments with which a model called one of its layers; the first is the hidden state."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]

    @property
    def hidden(self) -> Float[Tensor, "B S H"]:
        """The hidden state that the layer read, without gradient."""
        return (self.args[0] if self.args else self.kwargs["hidden_states"]).detach()

    def repeat(self, layer: nn.Module, hidden: Float[Tensor, "B S H"]) -> Float[Tensor, "B S H"]:
        """Calls another layer in the same way on another hidden state; nothing of the model gets a gradient."""
        if self.args:
            out = layer(hidden, *_detached(self.args[1:]), **_detached(self.kwargs))
        else:
            out = layer(**{**_detached(self.kwargs), "hidden_states": hidden})
        return out[0] if isinstance(out, tuple) else out


@contextmanager
def watch_layers(layers: Sequence[nn.Module]) -> Iterator[list[LayerCall]]:
    """While active, collects the calls of the given layers."""
    calls: list[LayerCall] = []

    def collect(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        calls.append(LayerCall(args, kwargs))

    handles = [layer.register_forward_pre_hook(collect, with_kwargs=True) for layer in layers]
    try:
        yield calls
    finally:
        for handle in handles:
            handle.remove()


def decoder_layers(lm: nn.Module) -> nn.ModuleList:
    """The list of the model's layers: the outermost one with as many entries as its config says.

    Raises:
        UserError: when there is none, or more than one.
    """
    count = layer_count(lm)
    lists = {
        name: module
        for name, module in lm.named_modules()
        if isinstance(module, nn.ModuleList) and len(module) == count
    }
    outer = [m for name, m in lists.items() if not any(name.startswith(f"{other}.") for other in lists)]
    if len(outer) != 1:
        raise cannot_take_apart(lm, f"it has {len(outer)} lists of {count} layers, not 1")
    return outer[0]


@contextmanager
def recomputed_layers(lm: nn.Module, context: Callable[[], AbstractContextManager[None]]) -> Iterator[None]:
    """While active, each layer keeps nothing but its input for the backward pass, and runs again there.

    "Training Deep Nets with Sublinear Memory Cost", arXiv:1604.06174: about a third more arithmetic, and a layer's
    memory instead of all layers'.

    Args:
        context: what a layer needs around it when it runs again.

    Raises:
        UserError: when the model's layers cannot be told.
    """
    layers = decoder_layers(lm)
    for layer in layers:
        layer.forward = functools.partial(
            checkpoint, layer.forward, use_reentrant=False, context_fn=lambda: (nullcontext(), _Anew(context))
        )
    try:
        yield
    finally:
        for layer in layers:
            del layer.forward


class _Anew(AbstractContextManager[None]):
    """A context that may be entered again: a layer runs once for each backward pass over a graph that is kept."""

    def __init__(self, make: Callable[[], AbstractContextManager[None]]) -> None:
        self._make = make
        self._entered = list[AbstractContextManager[None]]()

    def __enter__(self) -> None:
        self._entered.append(self._make())
        self._entered[-1].__enter__()

    def __exit__(self, *error: Any) -> None:
        self._entered.pop().__exit__(*error)


@torch.no_grad()
def after_layers(lm: nn.Module) -> list[nn.Module]:
    """The modules that the last layer's output passes on its way to the LM head, in order: the final norm."""
    layers = decoder_layers(lm)
    (owner,) = (m for m in lm.modules() if any(child is layers for child in m.children()))
    seen: list[nn.Module] = []

    def note(module: nn.Module, *_: Any) -> None:
        seen.append(module)

    watched = [layers[-1], *(child for child in owner.children() if child is not layers)]
    handles = [module.register_forward_hook(note) for module in watched]
    try:
        probe(lm)
    finally:
        for handle in handles:
            handle.remove()
    if layers[-1] not in seen:
        raise cannot_take_apart(lm, "its last layer is not called")
    return seen[seen.index(layers[-1]) + 1 :]


def layers_above(lm: nn.Module, count: int) -> list[nn.Module]:
    """The model's layers but for the ``count`` lowest.

    Raises:
        UserError: when there are no more, or they cannot be told.
    """
    layers = decoder_layers(lm)
    if count >= len(layers):
        raise UserError(
            f"optim.frozen_layers is {count}, but the model has {len(layers)} layers; take at most {len(layers) - 1}"
        )
    return list(layers)[count:]


def freeze_below(lm: nn.Module, count: int) -> None:
    """Takes the gradient from the embeddings and the ``count`` lowest layers; a head that is tied to the embeddings
    stays as it is, too.

    Raises:
        UserError: when there are no more layers, or they cannot be told.
    """
    upper = layers_above(lm, count)
    head = lm.get_output_embeddings()  # type: ignore[operator]
    tied = head.weight is lm.get_input_embeddings().weight  # type: ignore[operator]
    above = [*upper, *after_layers(lm), *([] if tied else [head])]
    trained = {id(parameter) for module in above for parameter in module.parameters()}
    for parameter in lm.parameters():
        parameter.requires_grad_(id(parameter) in trained)


def compile_layers(lm: nn.Module, trial: Callable[[], Tensor]) -> str | None:
    """Has torch compile each decoder layer, and tries it.

    Args:
        trial: a scalar that comes out of the layers, as in training and where they will run.

    Returns:
        None, or in one line why it cannot be done; the model then is as it was.
    """
    layers = list[nn.Module]()
    try:
        layers += decoder_layers(lm)
        torch._dynamo.config.recompile_limit = max(RECOMPILE_LIMIT, torch._dynamo.config.recompile_limit)
        for layer in layers:
            layer.compile(dynamic=True)
        with torch.enable_grad():
            trial().backward()
    except Exception as error:  # whatever a compiler that is missing, or does not like the model, raises
        for layer in layers:
            layer._compiled_call_impl = None
        return f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}"
    finally:
        lm.zero_grad(set_to_none=True)
    return None


@torch.no_grad()
def probe(
    lm: nn.Module, layers: Sequence[nn.Module] = ()
) -> tuple[Float[Tensor, "S H"], Sequence[LayerCall]]:
    """A forward pass over a few tokens: the hidden states that the LM head reads, and calls of the given layers."""
    device = next(lm.parameters()).device
    tokens = torch.arange(4, device=device)[None] % lm.get_input_embeddings().num_embeddings  # type: ignore[operator]
    with watch_head(lm) as seen, watch_layers(layers) as calls:
        lm(input_ids=tokens, use_cache=False)
    assert seen.hidden is not None
    return seen.hidden[0], calls


def cannot_take_apart(lm: nn.Module, reason: str) -> UserError:
    """The error for an architecture that is built otherwise."""
    return UserError(
        f"{type(lm).__name__} cannot be taken apart into its layers ({reason}); take algo.critic.own_layers=0 (the "
        "policy's trunk), hardware.gradient_checkpointing=false, hardware.strategy=auto, optim.frozen_layers=0 and "
        "model/adapter=none"
    )


def _detached(x: Any) -> Any:
    """The same arguments without gradient."""
    if isinstance(x, Tensor):
        return x.detach()
    if type(x) in (tuple, list):
        return type(x)(_detached(item) for item in x)
    if type(x) is dict:
        return {name: _detached(item) for name, item in x.items()}
    return x
