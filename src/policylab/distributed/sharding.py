"""FSDP2: each process holds a shard of every weight, of its gradient and of its moments.

A pass gathers one layer at a time, and frees it again. Weights outside the layers (embeddings, norms, heads) stay
gathered from the start of a forward pass to the end of the backward pass, because the head's weight is read after the
forward pass. Gathering is a collective, so all processes must make the same passes in the same order. In a rollout they
cannot: each process decodes as many steps as its own completions need. So rollouts use an unsharded copy of the policy,
filled with gathered weights. The copy has no FSDP hooks, because our fast decoders refuse hooks.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import (
    CPUOffloadPolicy,
    FSDPModule,
    OffloadPolicy,
    fully_shard,
    register_fsdp_forward_method,
)
from torch.distributed.tensor import DTensor, distribute_tensor

from policylab.models.critic import OwnLayers, SeparateNetwork
from policylab.models.layers import decoder_layers
from policylab.models.policy import Policy

#: Methods of a policy that are forward passes.
FORWARD_METHODS = ("values", "logprobs_of", "log_distributions", "scores_of", "evaluate", "within")


def shard(policies: Sequence[Policy], mesh: DeviceMesh, *, offload: bool) -> None:
    """Shards the weights over the processes, on the mesh's device or, with ``offload``, in main memory.

    Args:
        policies: the policy in training, then the frozen ones.

    Raises:
        UserError: when a model's layers cannot be found.
    """
    acting, *others = policies
    # not registered as a submodule: it has no own weights
    vars(acting)["unsharded"] = _without_weights(acting)
    _shard_layers(acting, mesh, offload)
    vars(acting)["within"] = _call
    _declare_forward_methods(acting, FORWARD_METHODS)
    for other in others:
        if other.lm is acting.lm:  # the same weights, without adapters
            vars(other)["_read"] = partial(_within_forward, acting, other._read)
        else:
            _shard_layers(other, mesh, offload)
            _declare_forward_methods(other, FORWARD_METHODS[:-1] if other.critic is not None else ("_read",))


@contextmanager
def gathered(policy: Policy) -> Iterator[Policy]:
    """While active, an unsharded copy of the policy with all weights that a rollout needs.

    Entering is a collective, because it gathers the weights; nothing inside is one. Nested calls give the same copy.
    """
    unsharded: Policy | None = vars(policy).get("unsharded")
    if unsharded is None or not next(unsharded.lm.parameters()).is_meta:
        yield policy if unsharded is None else unsharded
        return
    release(policy)
    parts: list[tuple[nn.Module, nn.Module]] = [(policy.lm, unsharded.lm)]
    if policy.critic is not None and unsharded.critic is not None and policy.critic.trains_trunk:
        parts.append((policy.critic, unsharded.critic))  # sampling records its values
    weights: dict[int, nn.Parameter] = {}

    def gather(weight: Tensor) -> nn.Parameter:
        if id(weight) not in weights:  # tied weights stay tied
            value = whole(weight.detach().to(policy.device))
            weights[id(weight)] = nn.Parameter(value, requires_grad=False)
        return weights[id(weight)]

    try:
        for own, empty in parts:
            _fill(empty, own, gather)
        yield unsharded
    finally:
        for own, empty in parts:
            _fill(empty, own, _meta_copy)


def release(network: nn.Module) -> None:
    """Frees weights that are still gathered after forward passes without backward passes. Not a collective."""
    for module in network.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


def whole_state(state: Any, *, keep: bool) -> Any:
    """Nested dicts and lists with all shards gathered to main memory; a collective.

    Args:
        keep: whether this process keeps the result; on other processes, sharded tensors are None in it.
    """
    seen: dict[int, Tensor | None] = {}

    def collect(value: Any) -> Any:
        if isinstance(value, DTensor):
            if id(value) not in seen:  # tied weights stay tied
                full = whole(value.detach().to(value.device_mesh.device_type))
                seen[id(value)] = full.cpu() if keep else None
            return seen[id(value)]
        if isinstance(value, Mapping):
            return {name: collect(item) for name, item in value.items()}
        if type(value) in (list, tuple):
            return type(value)(collect(item) for item in value)
        return value

    with torch.no_grad():
        return collect(state)


def whole(value: Tensor) -> Tensor:
    """A sharded tensor gathered on its device, which is a collective; other tensors unchanged."""
    return value.full_tensor() if isinstance(value, DTensor) else value


def shard_of(value: Tensor, like: Tensor) -> Tensor:
    """This process's shard of a whole tensor, sharded like ``like``; the tensor itself if ``like`` is not sharded."""
    if not isinstance(like, DTensor) or isinstance(value, DTensor):
        return value
    # no communication: each process has the whole tensor
    return distribute_tensor(value, like.device_mesh, like.placements, src_data_rank=None).to(like.device)


def _shard_layers(policy: Policy, mesh: DeviceMesh, offload: bool) -> None:
    """Makes each layer an FSDP unit, and all other weights one more."""
    unit = partial(fully_shard, mesh=mesh, offload_policy=CPUOffloadPolicy() if offload else OffloadPolicy())
    critic = policy.critic
    if critic is not None:
        _unshare(critic, policy.lm)
    for layer in decoder_layers(policy.lm):
        unit(layer)
    if critic is not None:
        layers = critic.layers if isinstance(critic, OwnLayers) else ()
        for layer in decoder_layers(critic.backbone) if isinstance(critic, SeparateNetwork) else layers:
            unit(layer)
        unit(critic.head, reshard_after_forward=False)  # fp32, whatever the precision of the rest
    unit(policy)
    root: Any = policy  # an FSDPModule now
    # sums, because gloo cannot average
    root.set_reduce_scatter_unused_params(True)
    root.set_force_sum_reduction_for_comms(mesh.device_type == "cpu")
    if mesh.device_type == "cuda":
        policy.runs_on = torch.device("cuda", torch.cuda.current_device())


def _declare_forward_methods(policy: Policy, names: Sequence[str]) -> None:
    for name in names:
        register_fsdp_forward_method(policy, name)


def _call(work: Callable[[], Any]) -> Any:
    return work()


def _within_forward(acting: Any, read: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """A forward pass of a policy that shares another's weights."""
    return acting.within(partial(read, *args, **kwargs))


def _unshare(critic: nn.Module, lm: nn.Module) -> None:
    """Gives a critic its own parameters for the policy's frozen weights, because FSDP manages each only once."""
    held = set(map(id, lm.parameters()))
    for module in critic.modules():
        for name, weight in module._parameters.items():
            if id(weight) in held:
                assert weight is not None
                module._parameters[name] = nn.Parameter(weight.detach(), requires_grad=False)


def _without_weights(policy: Policy) -> Policy:
    """A copy of a policy with all weights on the meta device."""
    memo: dict[int, Any] = {id(weight): _meta_copy(weight) for weight in policy.parameters()}
    return copy.deepcopy(policy, memo | {id(policy.tokenizer): policy.tokenizer}).requires_grad_(False)


def _meta_copy(weight: Tensor) -> nn.Parameter:
    return nn.Parameter(torch.empty(weight.shape, dtype=weight.dtype, device="meta"), requires_grad=False)


def _fill(empty: nn.Module, own: nn.Module, weight_of: Callable[[Tensor], nn.Parameter]) -> None:
    """Fills a copy of a module with weights made from its own, and with its buffers."""
    for copied, module in zip(empty.modules(), own.modules(), strict=True):
        copied._buffers = dict(module._buffers)
        copied._parameters = {
            name: None if weight is None else weight_of(weight) for name, weight in module._parameters.items()
        }
