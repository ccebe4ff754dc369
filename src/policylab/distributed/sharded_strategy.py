"""Lightning's side of FSDP2 (`policylab.distributed.sharding`)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from lightning import Trainer
from lightning.pytorch.core.optimizer import LightningOptimizer
from lightning.pytorch.strategies import DDPStrategy
from lightning.pytorch.trainer.states import TrainerFn
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.optim import Optimizer

from policylab.distributed.sharding import release, shard, shard_of, whole_state
from policylab.models.policy import Policy


class ShardedStrategy(DDPStrategy):
    """Data-parallel processes as with DDP, each with a shard of weights, gradients and moments.

    Checkpoints are gathered on rank 0 and equal those of a single process, so a run can be resumed with any number of
    processes, sharded or not. Lightning's own ``ModelParallelStrategy`` would also save the frozen reference, and
    requires sharding before weights are loaded.

    Args:
        cpu_offload: whether the shards are in main memory.
    """

    def __init__(self, *, cpu_offload: bool, **settings: Any) -> None:
        super().__init__(**settings)
        self.cpu_offload = cpu_offload

    def setup(self, trainer: Trainer) -> None:
        """Called by Lightning before validation and before training; the weights are sharded only once."""
        assert self.accelerator is not None
        self.accelerator.setup(trainer)
        self.model_to_device()
        if trainer.state.fn == TrainerFn.FITTING:
            self.setup_optimizers(trainer)
        self.setup_precision_plugin()

    def model_to_device(self) -> None:
        module: Any = self.lightning_module
        if module.sharded:
            return
        mesh = init_device_mesh(self.root_device.type, (self.world_size,))
        shard(self.policies, mesh, offload=self.cpu_offload)
        module.sharded = True
        module._device = self.root_device  # Lightning's record of it; `to` would move offloaded weights

    @property
    def policies(self) -> list[Policy]:
        """The policy in training, and the frozen ones."""
        assert self.lightning_module is not None
        return [module for module in self.lightning_module.children() if isinstance(module, Policy)]

    def lightning_module_state_dict(self) -> dict[str, Any]:
        """The whole weights, on rank 0."""
        module: Any = self.lightning_module
        self._release()
        given = module.given_weights()
        own = module.state_dict(keep_vars=True)
        state: dict[str, Any] = whole_state(
            {name: value for name, value in own.items() if name not in given}, keep=self.is_global_zero
        )
        return state

    def load_model_state_dict(self, checkpoint: Mapping[str, Any], strict: bool = True) -> None:
        """Each process takes its shard."""
        assert self.lightning_module is not None
        self._release()
        own = self.lightning_module.state_dict(keep_vars=True)
        shards = {
            name: shard_of(value, own[name]) if name in own else value
            for name, value in checkpoint["state_dict"].items()
        }
        self.lightning_module.load_state_dict(shards, strict=strict)

    def optimizer_state(self, optimizer: Optimizer | LightningOptimizer) -> dict[str, Any]:
        """The whole moments, on rank 0."""
        bare = optimizer._optimizer if isinstance(optimizer, LightningOptimizer) else optimizer
        state: dict[str, Any] = whole_state(bare.state_dict(), keep=self.is_global_zero)
        return state

    def load_optimizer_state_dict(self, checkpoint: Mapping[str, Any]) -> None:
        """Each process takes its shard; values without their weight's shape (Adam's step) are copied to all."""
        for optimizer, state in zip(self.optimizers, checkpoint["optimizer_states"], strict=True):
            weights = [weight for group in optimizer.param_groups for weight in group["params"]]
            shards = {
                index: {
                    name: shard_of(value, weights[index])
                    if isinstance(value, Tensor) and value.shape == weights[index].shape
                    else value
                    for name, value in moments.items()
                }
                for index, moments in state["state"].items()
            }
            optimizer.load_state_dict({**state, "state": shards})

    def teardown(self) -> None:
        """Leaves the weights on their devices, because one device may be too small for all of them."""
        assert self.accelerator is not None
        assert self.cluster_environment is not None
        self.cluster_environment.teardown()
        self.precision_plugin.teardown()
        self.accelerator.teardown()
        self.checkpoint_io.teardown()

    def _release(self) -> None:
        for policy in self.policies:
            release(policy)
