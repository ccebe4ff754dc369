"""The processes of a run, as Lightning wants to know them."""

from __future__ import annotations

from lightning.fabric.plugins.environments import ClusterEnvironment

from policylab.distributed.world import main_address, world


class Cluster(ClusterEnvironment):
    """What `policylab.distributed.world` says, whoever has started the processes.

    In place of Lightning's own for SLURM, which would requeue jobs by itself, wants variables that not every step has,
    and takes a single process in a job of several tasks for one of them.
    """

    @property
    def creates_processes_externally(self) -> bool:
        return True

    @property
    def main_address(self) -> str:
        return main_address()[0]

    @property
    def main_port(self) -> int:
        return main_address()[1]

    @staticmethod
    def detect() -> bool:
        return True

    def world_size(self) -> int:
        return world().size

    def set_world_size(self, size: int) -> None:
        """It is known."""

    def global_rank(self) -> int:
        return world().rank

    def set_global_rank(self, rank: int) -> None:
        """It is known."""

    def local_rank(self) -> int:
        return world().local_rank

    def node_rank(self) -> int:
        return world().rank // world().local_size
