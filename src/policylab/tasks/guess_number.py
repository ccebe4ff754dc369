"""Guess a number: the environment answers higher or lower. A small task with a known optimum: bisection."""

from __future__ import annotations

from collections.abc import Sequence

from policylab.data.text import Completion, Prompt, Turn
from policylab.errors import UserError, check_range
from policylab.tasks.base import Example


class GuessNumber:
    """Each prompt hides one of the numbers (see ``tasks.base.Task``).

    Args:
        name: names the run.
        prompt: text that the policy reads first.
        numbers: names of the numbers, from the lowest to the highest.
        higher: the answer to a guess that is too low.
        lower: the answer to a guess that is too high.
        cost: cost of a wrong guess; the right one gives 1.
        held_out: number of validation prompts, which cycle through the numbers.

    Raises:
        UserError: when there are fewer than two numbers, a number is repeated, or an argument is out of range.
    """

    instruction = None

    def __init__(
        self, name: str, prompt: str, numbers: list[str], higher: str, lower: str, cost: float, held_out: int
    ) -> None:
        check_range("task.cost", cost, 0)
        check_range("task.held_out", held_out, 1)
        if len(set(numbers)) < max(2, len(numbers)):
            raise UserError(f"task.numbers={numbers}; give two or more, each once")
        self.name = name
        self.numbers, self.higher, self.lower, self.cost = numbers, higher, lower, cost
        self.train = [Example(prompt, "", number) for number in numbers]
        self.val = [self.train[i % len(numbers)] for i in range(held_out)]

    def environment(self) -> Game:
        """A new game."""
        return Game(self)

    def metrics(self, completions: Sequence[Completion]) -> dict[str, list[float]]:
        """The share of numbers that were found, and of guesses that were a number."""
        found = [float(completion.ended) for completion in completions]
        return {"found": found, "valid": [self._valid(completion) for completion in completions]}

    def _valid(self, completion: Completion) -> float:
        return sum(text.strip() in self.numbers for text, _ in completion.turns) / len(completion.turns)


class Game:
    """The environment of one episode."""

    def __init__(self, task: GuessNumber) -> None:
        self.task = task

    def reset(self, prompt: Prompt, seed: int) -> str:
        """Hides the prompt's number; the seed is not used."""
        self.secret = self.task.numbers.index(prompt.reference)
        return ""

    def step(self, text: str) -> Turn:
        """The answer to a guess; empty if the guess is not a number."""
        task = self.task
        guess = task.numbers.index(text.strip()) if text.strip() in task.numbers else None
        if guess == self.secret:
            return Turn("right", reward=1.0, done=True)
        answer = "" if guess is None else task.higher if guess < self.secret else task.lower
        return Turn(answer, reward=-task.cost, done=False)
