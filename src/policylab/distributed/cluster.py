"""The processes of a run, for Lightning."""

from __future__ import annotations

from lightning.fabric.plugins.environments import ClusterEnvironment

from policylab.distributed.world import main_address, world


class Cluster(ClusterEnvironment):
    """Gives Lightning the processes of `policylab.distributed.world`, however they were started.

    Lightning's own class for SLURM requeues jobs itself, needs variables that not every step has, and treats a single
    process in a job of several tasks as one of the tasks.
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
        """Does nothing: the size is known."""

    def global_rank(self) -> int:
        return world().rank

    def set_global_rank(self, rank: int) -> None:
        """Does nothing: the rank is known."""

    def local_rank(self) -> int:
        return world().local_rank

    def node_rank(self) -> int:
        return world().rank // world().local_size
