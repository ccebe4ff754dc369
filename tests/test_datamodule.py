"""The prompts of an iteration: a pure function of seed and iteration, split among processes."""

from __future__ import annotations

from itertools import chain
from types import SimpleNamespace
from typing import Any

import pytest

from policylab.data.rollout import Prompt
from policylab.errors import UserError
from policylab.tasks.datamodule import IterationSampler, PromptData

DEFAULTS: dict[str, Any] = {"batch_size": 4, "val_batch_size": 4, "seed": 0, "iterations": 5}


def prompts(count: int) -> list[Prompt]:
    return [Prompt(id=i, text=str(i), tokens=(i,), reference=None, target=()) for i in range(count)]


def data(train: int = 6, val: int = 10, rank: int = 0, processes: int = 1, **changes: Any) -> PromptData:
    """A data module as in a run, with a trainer of this rank."""
    module = PromptData(train=prompts(train), val=prompts(val), **(DEFAULTS | changes))
    module.trainer = SimpleNamespace(  # type: ignore[assignment]
        global_rank=rank, world_size=processes, lightning_module=SimpleNamespace(iteration=3)
    )
    return module


def ids(loader: Any) -> list[list[int]]:
    return [[prompt.id for prompt in batch.prompts] for batch in loader]


def test_batches_are_pinned():
    """Another order would change every published run."""
    assert ids(data().train_dataloader()) == [
        [0, 3, 5, 1],
        [2, 4, 3, 4],
        [2, 1, 5, 0],
        [4, 3, 5, 2],
        [0, 1, 1, 3],
    ]


def test_every_epoch_holds_every_row_once():
    order = [row for batch in ids(data(iterations=6).train_dataloader()) for row in batch]
    epochs = [order[first : first + 6] for first in range(0, 24, 6)]
    assert all(sorted(epoch) == list(range(6)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) > 1


def test_a_batch_may_be_larger_than_the_data_set():
    batches = ids(data(train=3, batch_size=8, iterations=3).train_dataloader())
    assert [len(batch) for batch in batches] == [8, 8, 8]
    order = [row for batch in batches for row in batch]
    assert all(sorted(order[first : first + 3]) == [0, 1, 2] for first in range(0, 24, 3))


def test_the_seed_decides():
    first, again, other = (ids(data(seed=seed).train_dataloader()) for seed in (1, 1, 2))
    assert first == again != other


def test_resume_reads_on():
    whole = ids(data().train_dataloader())
    resumed = data()
    resumed.load_state_dict(data().state_dict())
    loader = resumed.train_dataloader()
    assert len(loader) == 5  # Lightning counts the three iterations done
    assert ids(loader) == whole[3:]


@pytest.mark.parametrize("processes", [2, 3])
def test_processes_share_each_batch(processes: int):
    """The parts in the order of ranks equal the batch of one process."""
    whole = ids(data(train=9).train_dataloader())
    parts = [
        ids(data(train=9, rank=rank, processes=processes).train_dataloader()) for rank in range(processes)
    ]
    assert [list(chain(*batch)) for batch in zip(*parts, strict=True)] == whole


def test_validation_is_in_order():
    assert ids(data().val_dataloader()) == [[0, 1, 2], [3, 4, 5], [6, 7, 8, 9]]


@pytest.mark.parametrize(("prompts", "processes"), [(11, 2), (11, 3), (9, 4), (4, 4), (5, 3)])
def test_processes_share_the_validation(prompts: int, processes: int):
    """The parts in the order of ranks are all prompts; all processes have as many batches, and no batch is empty."""
    parts = [
        ids(data(val=prompts, rank=rank, processes=processes).val_dataloader()) for rank in range(processes)
    ]
    assert list(chain(*chain(*parts))) == list(range(prompts))
    assert len({len(batches) for batches in parts}) == 1
    assert all(0 < len(batch) <= 4 for batches in parts for batch in batches)


def test_refuses_more_processes_than_prompts():
    with pytest.raises(UserError, match="a batch of 2 prompts cannot be shared by 3 processes"):
        ids(data(batch_size=2, processes=3).train_dataloader())


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"train": 0}, "training prompts: 0"),
        ({"batch_size": 0}, "prompts an iteration: 0"),
        ({"val_batch_size": 0}, "validation.batch_size: 0"),
    ],
)
def test_refuses(wrong: dict[str, int], message: str):
    with pytest.raises(UserError, match=message):
        data(**wrong)


def test_the_sampler_is_sized_by_the_whole_run():
    sampler = IterationSampler(10, 4, seed=0, iterations=7, start=5, share=list)
    assert len(sampler) == 7
    assert len(list(sampler)) == 2
