"""FSDP2: each process holds a share of every weight, of its gradient and of its moments.

Layers are gathered one by one as a pass comes to them, and let go again; what is in no layer (embeddings, norms, heads)
stays from the start of a forward pass to the end of the backward pass, for who reads the head's weight after it.
Gathering is a collective: all processes make the same passes in the same order. A rollout cannot, as each process
decodes as many steps as its own completions take; so it runs on whole weights, in a copy of the model that has none of
its own and no hooks of FSDP either, for which our fast decoders would not take it.
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
from policylab.models.policy import Policy
from policylab.models.trunk import decoder_layers

#: Methods of a policy that are forward passes.
PASSES = ("values", "logprobs_of", "log_distributions", "scores_of", "evaluate", "within")


def shard(policies: Sequence[Policy], mesh: DeviceMesh, *, offload: bool) -> None:
    """Leaves each process its share of the weights, on the mesh's device or, with ``offload``, in main memory.

    Args:
        policies: the one that acts, then those beside it that never train.

    Raises:
        UserError: when a model's layers cannot be told.
    """
    acting, *others = policies
    vars(acting)["hollow"] = _hollow(acting)  # not a submodule: its weights are no more weights
    _divide(acting, mesh, offload)
    vars(acting)["within"] = _run
    _declare_passes(acting, PASSES)
    for other in others:
        if other.lm is acting.lm:  # the same weights, without adapters
            vars(other)["_read"] = partial(_through, acting, other._read)
        else:
            _divide(other, mesh, offload)
            _declare_passes(other, PASSES[:-1] if other.critic is not None else ("_read",))


@contextmanager
def gathered(policy: Policy) -> Iterator[Policy]:
    """While active, the policy with all weights that a rollout needs on this process, as one that is not sharded.

    It must be entered on all processes at once, and nothing inside is a collective. Entered again inside, it gives the
    same.
    """
    hollow: Policy | None = vars(policy).get("hollow")
    if hollow is None or not next(hollow.lm.parameters()).is_meta:
        yield policy if hollow is None else hollow
        return
    release(policy)
    parts: list[tuple[nn.Module, nn.Module]] = [(policy.lm, hollow.lm)]
    if policy.critic is not None and hollow.critic is not None and policy.critic.trains_trunk:
        parts.append((policy.critic, hollow.critic))  # whose values come with sampling
    weights: dict[int, nn.Parameter] = {}

    def gather(weight: Tensor) -> nn.Parameter:
        if id(weight) not in weights:  # tied weights stay so
            value = whole(weight.detach().to(policy.device))
            weights[id(weight)] = nn.Parameter(value, requires_grad=False)
        return weights[id(weight)]

    try:
        for own, empty in parts:
            _fill(empty, own, gather)
        yield hollow
    finally:
        for own, empty in parts:
            _fill(empty, own, _outline)


def release(network: nn.Module) -> None:
    """Lets go of the whole weights that passes without a backward pass have left gathered. No collective."""
    for module in network.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


def whole_state(state: Any, *, keep: bool) -> Any:
    """Nested dicts and lists with the shares in them gathered, in main memory; it is a collective.

    Args:
        keep: whether this process wants the result; the others' has None in the place of what was shared out.
    """
    seen: dict[int, Tensor | None] = {}

    def collect(value: Any) -> Any:
        if isinstance(value, DTensor):
            if id(value) not in seen:  # tied weights stay so
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
    """A tensor with its shares gathered, where it is; it is a collective. Others come back as they are."""
    return value.full_tensor() if isinstance(value, DTensor) else value


def share_of(value: Tensor, like: Tensor) -> Tensor:
    """This process's share of a whole tensor, cut as ``like`` is; the tensor itself where nothing is shared out."""
    if not isinstance(like, DTensor) or isinstance(value, DTensor):
        return value
    # Nobody sends anything: each process has read the whole.
    return distribute_tensor(value, like.device_mesh, like.placements, src_data_rank=None).to(like.device)


def _divide(policy: Policy, mesh: DeviceMesh, offload: bool) -> None:
    """Makes FSDP units of the layers, and of all the rest."""
    unit = partial(fully_shard, mesh=mesh, offload_policy=CPUOffloadPolicy() if offload else OffloadPolicy())
    critic = policy.critic
    if critic is not None:
        _set_apart(critic, policy.lm)
    for layer in decoder_layers(policy.lm):
        unit(layer)
    if critic is not None:
        layers = critic.layers if isinstance(critic, OwnLayers) else ()
        for layer in decoder_layers(critic.backbone) if isinstance(critic, SeparateNetwork) else layers:
            unit(layer)
        unit(critic.head, reshard_after_forward=False)  # fp32, whatever the rest is in
    unit(policy)
    root: Any = policy  # an FSDPModule now
    # A process without rows takes part as well; gloo knows sums, but no averages.
    root.set_reduce_scatter_unused_params(True)
    root.set_force_sum_reduction_for_comms(mesh.device_type == "cpu")
    if mesh.device_type == "cuda":
        policy.runs_on = torch.device("cuda", torch.cuda.current_device())


def _declare_passes(policy: Policy, names: Sequence[str]) -> None:
    for name in names:
        register_fsdp_forward_method(policy, name)


def _run(work: Callable[[], Any]) -> Any:
    return work()


def _through(acting: Any, read: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """A pass of a policy that shares another's weights."""
    return acting.within(partial(read, *args, **kwargs))


def _set_apart(critic: nn.Module, lm: nn.Module) -> None:
    """Weights that never train may be the policy's own ones in a critic, too; FSDP wants each in one place."""
    held = set(map(id, lm.parameters()))
    for module in critic.modules():
        for name, weight in module._parameters.items():
            if id(weight) in held:
                assert weight is not None
                module._parameters[name] = nn.Parameter(weight.detach(), requires_grad=False)


def _hollow(policy: Policy) -> Policy:
    """A copy without weights."""
    memo: dict[int, Any] = {id(weight): _outline(weight) for weight in policy.parameters()}
    return copy.deepcopy(policy, memo | {id(policy.tokenizer): policy.tokenizer}).requires_grad_(False)


def _outline(weight: Tensor) -> nn.Parameter:
    return nn.Parameter(torch.empty(weight.shape, dtype=weight.dtype, device="meta"), requires_grad=False)


def _fill(empty: nn.Module, own: nn.Module, weight_of: Callable[[Tensor], nn.Parameter]) -> None:
    """Gives a copy of a module weights made of its own, and its buffers."""
    for copied, module in zip(empty.modules(), own.modules(), strict=True):
        copied._buffers = dict(module._buffers)
        copied._parameters = {
            name: None if weight is None else weight_of(weight) for name, weight in module._parameters.items()
        }
