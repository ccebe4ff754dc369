"""Episodes: the policy writes a turn, the environment answers, and so on until the episode ends.

Each turn is a call of the engine for the rows whose episodes continue, with the episode so far as their prompt. The
policy's tokens are kept and never encoded again. The environment's answer is encoded once, and ``action_mask`` is false
on it. A row's noise is keyed by position in its episode, and its environment's seed by the noise, so episodes do not
depend on other rows.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from policylab.data.rollout import Prompt, Rollout
from policylab.data.text import Environment, Episode, Turn
from policylab.errors import UserError
from policylab.functional.behaviour import Behaviour
from policylab.models.policy import Policy
from policylab.rollouts.engine import Engine, assemble
from policylab.rollouts.noise import seed_of
from policylab.user_code import as_number, call, check_names, is_finite, shown


class Token(NamedTuple):
    """A position of an episode; the last four fields are false or zero on the environment's tokens."""

    token: int
    chosen: bool  #: whether the policy chose it
    last: bool  #: whether it ends a turn of the policy
    logprob: float
    value: float


@dataclass
class Row:
    """A running episode."""

    environment: Environment
    prompt: Prompt  #: followed by the first observation
    noise: Float[Tensor, " T"]
    observation: str
    tokens: list[Token] = field(default_factory=list)
    turns: list[tuple[str, Turn]] = field(default_factory=list)

    @property
    def over(self) -> bool:
        """Whether the environment has ended the episode."""
        return bool(self.turns) and (self.turns[-1][1].done or self.turns[-1][1].truncated)

    def so_far(self) -> Prompt:
        """The episode so far, as the prompt of the next turn."""
        return replace(self.prompt, tokens=self.prompt.tokens + tuple(step.token for step in self.tokens))


class Episodes:
    """An engine that samples episodes with another engine. Prefixes are computed again in each turn.

    Args:
        engine: samples the turns; its ``max_new_tokens`` limits each turn.
        environment: creates the environment of an episode.
        turns: most turns of the policy in an episode.
        answer_tokens: most tokens of an answer of the environment, and of its first observation.
        instruction: the template of the prompts.

    Raises:
        UserError: when a limit is out of its bounds, or ``environment`` does not return an environment.
        RunError: when ``environment`` raises an exception.
    """

    def __init__(
        self,
        engine: Engine,
        environment: Callable[[], Environment],
        *,
        turns: int,
        answer_tokens: int,
        instruction: str | None,
    ) -> None:
        for name, limit in (("turns", turns), ("answer_tokens", answer_tokens)):
            if not isinstance(limit, int) or isinstance(limit, bool) or limit < 1:
                raise UserError(f"task.{name}={limit!r}; it must be a whole number, at least 1")
        self.engine = engine
        self.environment = environment
        self.turns = turns
        self.answer_tokens = answer_tokens
        self.instruction = instruction
        self.name = f"environment {type(self.create()).__name__}"

    @property
    def temperature(self) -> float:
        """The engine's."""
        return self.engine.temperature

    @property
    def exact(self) -> bool:
        """Whether the engine's log-probs are exact."""
        return self.engine.exact

    @property
    def max_new_tokens(self) -> int:
        """Most tokens of an episode after its prompt."""
        return self.turns * (self.engine.max_new_tokens + self.answer_tokens)

    @property
    def limits(self) -> str:
        """The settings that give ``max_new_tokens``, for messages."""
        turn, answer = self.engine.max_new_tokens, self.answer_tokens
        return f"task.turns={self.turns} x (rollout.max_new_tokens={turn} + task.answer_tokens={answer})"

    def create(self) -> Environment:
        """A new environment."""
        made = call("task.environment", self.environment)
        if not all(callable(getattr(made, name, None)) for name in ("reset", "step")):
            raise UserError(
                f"task.environment returned {shown(made)}; an environment has reset(prompt, seed) and step(text)"
            )
        return made

    @torch.no_grad()
    def sample(
        self,
        policy: Policy,
        prompts: Sequence[Prompt],
        group_size: int,
        noise: Float[Tensor, "B T"],
        behaviour: Behaviour | None = None,
    ) -> Rollout:
        """Samples ``group_size`` episodes of each prompt; see `policylab.rollouts.engine.Engine.sample`.

        Raises:
            UserError: when the environment returns an invalid value, or a text that is too long, or two episodes have
                the same environment.
            RunError: when the environment raises an exception.
        """
        environments = [self.create() for _ in noise]
        if len(set(map(id, environments))) < len(environments):
            raise UserError(
                f"task.environment returned the same {type(environments[0]).__name__} for two episodes, which would "
                "mix them up; it must make a new one at each call"
            )
        given = (prompt for prompt in prompts for _ in range(group_size))
        rows = [self.begin(policy, *started) for started in zip(environments, given, noise, strict=True)]
        playing, has_values = rows, False
        for turn in range(1, self.turns + 1):
            sampled = self.write(policy, playing, behaviour)
            has_values = sampled.values is not None
            playing = [row for row in playing if not row.over]
            if not playing or turn == self.turns:
                break
            for row in playing:
                self.read(policy, row)
        rollout = assembled(rows, policy.device)
        groups = torch.arange(len(prompts), device=policy.device).repeat_interleave(group_size)
        return rollout.replace(group_ids=groups, values=rollout.values if has_values else None)

    def begin(
        self, policy: Policy, environment: Environment, prompt: Prompt, noise: Float[Tensor, " T"]
    ) -> Row:
        """A new episode, with the first observation after its prompt."""
        given = replace(
            prompt, reference=call("copying a reference (plain data)", copy.deepcopy, prompt.reference)
        )
        text = call(f"{self.name}: reset", environment.reset, given, seed_of(noise))
        check_text(f"{self.name}: reset", text)
        if text:
            (read,) = policy.prompts([(prompt.text + text, "", None)], self.instruction)
            self.check_length("reset", text, len(read.tokens) - len(prompt.tokens))
            prompt = replace(prompt, tokens=read.tokens)
        return Row(environment, prompt, noise, text)

    def write(self, policy: Policy, rows: Sequence[Row], behaviour: Behaviour | None) -> Rollout:
        """Samples a turn of each row and gets the environment's answer."""
        width = self.engine.max_new_tokens
        noise = torch.stack([row.noise[len(row.tokens) :][:width] for row in rows])
        sampled = self.engine.sample(policy, [row.so_far() for row in rows], 1, noise, behaviour)
        values = torch.zeros_like(sampled.logprobs) if sampled.values is None else sampled.values
        columns = (sampled.lengths, sampled.tokens, sampled.logprobs, values)
        for row, length, *chosen in zip(rows, *(x.tolist() for x in columns), strict=True):
            steps = zip(*(column[:length] for column in chosen), strict=True)
            row.tokens += [
                Token(token, True, t == length, *rest) for t, (token, *rest) in enumerate(steps, 1)
            ]
            text = policy.decode(chosen[0][:length])
            answer = call(f"{self.name}: step", row.environment.step, text)
            row.turns.append((text, checked(f"{self.name}: step", answer)))
        return sampled

    def read(self, policy: Policy, row: Row) -> None:
        """Appends the environment's last answer to the episode."""
        text = row.turns[-1][1].text
        words = policy.encode_answer(text, ended=row.tokens[-1].token in policy.eos_ids)
        self.check_length("step", text, len(words))
        row.tokens += [Token(word, False, False, 0.0, 0.0) for word in words]

    def check_length(self, method: str, text: str, tokens: int) -> None:
        """Refuses a text of more than ``answer_tokens`` tokens."""
        if tokens > self.answer_tokens:
            raise UserError(
                f"{self.name}: {method} gave the text {shown(text)}, which has {tokens} tokens, but "
                f"task.answer_tokens={self.answer_tokens}; shorten the text, or raise task.answer_tokens"
            )


def assembled(rows: Sequence[Row], device: torch.device) -> Rollout:
    """The rows as a rollout."""

    def columns() -> Iterator[Tensor]:
        for column in zip(*(zip(*row.tokens, strict=True) for row in rows), strict=True):
            yield pad_sequence([torch.tensor(values) for values in column], batch_first=True).to(device)

    tokens, chosen, last, logprobs, values = columns()
    lengths = torch.tensor([len(row.tokens) for row in rows], device=device)
    ended = torch.tensor([row.turns[-1][1].done for row in rows], device=device)
    rollout = assemble([row.prompt for row in rows], 1, tokens, lengths, ended, logprobs)
    return rollout.replace(
        action_mask=chosen,
        values=values,
        turn_ends=last,
        episodes=tuple(Episode(row.observation, tuple(row.turns)) for row in rows),
    )


def checked(owner: str, answer: Any) -> Turn:
    """The environment's answer, in plain values.

    Raises:
        UserError: when it is not a Turn, a member has a wrong type, or a number is not finite.
    """
    if not isinstance(answer, Turn):
        raise UserError(f"{owner} returned {shown(answer)}; it must return a Turn(text, reward, done)")
    check_text(owner, answer.text)
    for name in ("done", "truncated"):
        if not isinstance(getattr(answer, name), bool | np.bool_):
            raise UserError(f"{owner} gave {name}={shown(getattr(answer, name))}; it must be True or False")
    check_names(owner, "its parts", answer.parts)
    for name, value in {
        "reward": answer.reward,
        **{f"part {n!r}": x for n, x in answer.parts.items()},
    }.items():
        if not is_finite(value):
            raise UserError(
                f"{owner} gave {shown(value)} as the {name}; it must be a finite number (of single precision)"
            )
    return Turn(
        answer.text,
        as_number(answer.reward),
        bool(answer.done),
        bool(answer.truncated),
        {name: as_number(value) for name, value in answer.parts.items()},
    )


def check_text(owner: str, text: Any) -> None:
    """Refuses a value that is not a str."""
    if not isinstance(text, str):
        raise UserError(f"{owner} gave {shown(text)} as its text; it must be a str")
