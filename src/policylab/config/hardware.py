"""The number of processes of a run, and the hardware that they run on."""

from __future__ import annotations

from omegaconf import DictConfig, OmegaConf

from policylab.distributed.machine import cores, gpus
from policylab.distributed.world import world
from policylab.errors import UserError, counted

AUTO = "auto"
#: More processes per core than this are refused. More than one per core is slow, but useful for a test.
MAX_PER_CORE = 4


def processes(config: DictConfig) -> int:
    """Number of processes of the whole run, over all machines. Takes a settled config."""
    return int(config.hardware.devices) * int(config.hardware.num_nodes)


def with_devices(config: DictConfig, *, start: bool = True) -> DictConfig:
    """A copy of the config with numbers instead of ``auto`` for devices and machines.

    If torchrun or SLURM has started several processes, their numbers replace those of the config.

    Args:
        start: whether the run is to start here; a plan may be for devices of another machine.

    Raises:
        UserError: when the devices do not exist, or the settings need several processes and there is one.
    """
    hardware, here = config.hardware.copy(), world()
    if hardware.accelerator == AUTO and (here.size > 1 or hardware.devices != 1):
        hardware.accelerator = "gpu" if gpus() else "cpu"
    if start and hardware.accelerator == "gpu" and not gpus():
        raise UserError(
            "hardware.accelerator=gpu, but torch sees no GPU; take hardware=cpu or hardware=ddp_cpu, or install a CUDA "
            "build of torch"
        )
    if here.size > 1:
        hardware.devices, hardware.num_nodes = here.local_size, here.nodes
    if hardware.num_nodes == AUTO:
        raise UserError(
            "hardware.num_nodes=auto takes the processes that SLURM has started, and there are none; start it with "
            "srun, or with hydra.launcher.cluster=slurm and -m (plan=true takes a number)"
        )
    if hardware.devices == AUTO:
        hardware.devices = gpus() if hardware.accelerator == "gpu" else 1
        if not hardware.devices:
            raise UserError(
                f"hardware.devices={AUTO}, and there is no GPU here to count; say hardware.devices=8 to plan for eight "
                "a machine"
            )
    if start:
        check_present(hardware)
    changed = config.copy()
    OmegaConf.update(changed, "hardware", hardware, merge=False)
    check_hardware(changed)
    return changed


def check_present(hardware: DictConfig) -> None:
    """Refuses devices that this machine lacks, and machines whose processes have not been started.

    Raises:
        UserError: saying what to take instead.
    """
    here = world()
    if hardware.accelerator == "gpu" and hardware.devices > gpus():
        raise UserError(
            f"hardware.devices={hardware.devices}, but torch sees {counted(gpus(), 'GPU')}; take at most that"
        )
    if hardware.accelerator != "gpu" and here.size == 1 and hardware.devices > MAX_PER_CORE * cores():
        raise UserError(
            f"hardware.devices={hardware.devices} on the CPU, and this machine has {counted(cores(), 'core')}; take at "
            "most that many: each process holds its own copy of the model, and all processes share the cores"
        )
    if hardware.num_nodes > 1 and here.size == 1:
        raise UserError(
            f"hardware.num_nodes={hardware.num_nodes}: start it on each machine with torchrun --nnodes="
            f"{hardware.num_nodes} --nproc-per-node={hardware.devices} --rdzv-backend=c10d --rdzv-endpoint=HOST:29400 "
            "train.py ..., or with srun"
        )


def check_hardware(config: DictConfig) -> None:
    """Refuses combinations of settings that fail with every algorithm. Call `with_devices` first.

    Raises:
        UserError: naming the settings and what to take instead.
    """
    hardware, count = config.hardware, processes(config)
    if hardware.strategy == "fsdp":
        if count == 1:
            raise UserError(
                "hardware.strategy=fsdp shards a model over processes, and there is one; take hardware.devices=2 or "
                "more"
            )
        if config.model.get("adapter") is not None:
            raise UserError(
                "model/adapter=lora with hardware.strategy=fsdp cannot export the policy yet; take hardware=ddp: LoRA "
                "trains few weights, and the frozen ones have neither gradients nor moments"
            )
        if hardware.compile:
            raise UserError(
                "hardware.compile=true has not been tried with hardware.strategy=fsdp; take hardware.compile=false"
            )
        if hardware.cpu_offload and hardware.accelerator == "cpu":
            raise UserError(
                "hardware.cpu_offload=true moves weights out of a GPU's memory, and hardware.accelerator is cpu; take "
                "hardware.cpu_offload=false"
            )


def backend(hardware: DictConfig) -> str:
    """Torch's library for collective operations. Takes the ``hardware`` of a settled config."""
    if hardware.accelerator == "cpu":
        return "gloo"
    return "cpu:gloo,cuda:nccl" if hardware.cpu_offload else "nccl"  # offloaded shards are summed on the CPU
