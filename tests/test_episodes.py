"""Episodes: turns of the policy and of an environment in one rollout, without Lightning."""

from __future__ import annotations

import itertools
from dataclasses import dataclass, field, replace
from typing import Any

import pytest
import torch
from torch import Tensor

from enumeration import NO_PENALTY, algorithm, one_process, penalty
from policylab.algorithms import GAE, GreedyBaseline, LeaveOneOut, NStep, ReturnToGo, VTrace
from policylab.data.plan import BatchPlan
from policylab.data.rollout import Evaluation, Prompt, Rollout
from policylab.data.text import Completion, Turn
from policylab.errors import RunError, UserError
from policylab.functional.masks import length_mask
from policylab.rewards.base import Score, Scores, score
from policylab.rewards.environment import environment as own_rewards
from policylab.rewards.scorer import Scorer
from policylab.rewards.weighted_sum import WeightedSum
from policylab.rollouts.cached import CachedEngine
from policylab.rollouts.engine import assemble
from policylab.rollouts.episodes import Episodes
from policylab.rollouts.generate import GenerateEngine
from policylab.rollouts.noise import TRAIN, seed_of, uniforms
from policylab.rollouts.row_limit import RowLimit
from policylab.tasks.guess_number import GuessNumber
from policylab.training.collector import Collector
from policylab.training.means import Means
from policylab.training.metrics import means_of, measure
from policylab.training.sampler import conversations, rewarded
from small_runs import algo, quick, small, train

END = 0


class Letters:
    """A policy without a network, whose tokens are letters: 1 is a, 2 is b, 0 ends."""

    device = torch.device("cpu")
    eos_ids = (END,)

    def decode(self, tokens: list[int]) -> str:
        return "".join(chr(96 + token) for token in tokens if token)

    def encode_answer(self, text: str, *, ended: bool) -> list[int]:
        return [ord(letter) - 96 for letter in text]

    def prompts(self, examples: Any, instruction: str | None) -> list[Prompt]:
        return [
            Prompt(i, text, (END, *self.encode_answer(text, ended=True)), ref, ())
            for i, (text, _, ref) in enumerate(examples)
        ]


@dataclass
class Scripted:
    """An engine that writes the given tokens for each prompt id, turn by turn, and records its calls."""

    turns: list[list[list[int]]]
    max_new_tokens: int = 3
    temperature: float = 1.0
    exact: bool = True
    asked: list[tuple[int, tuple[int, ...], list[float]]] = field(default_factory=list)

    def sample(
        self, policy: Any, prompts: Any, group_size: int, noise: Tensor, behaviour: Any = None
    ) -> Rollout:
        assert group_size == 1
        assert noise.shape == (len(prompts), self.max_new_tokens)
        written = [self.turns[p.id][sum(number == p.id for number, *_ in self.asked)] for p in prompts]
        self.asked += [(p.id, p.tokens, row.tolist()) for p, row in zip(prompts, noise, strict=True)]
        lengths = torch.tensor([len(turn) for turn in written])
        tokens = torch.zeros(len(prompts), self.max_new_tokens, dtype=torch.long)
        for row, turn in enumerate(written):
            tokens[row, : len(turn)] = torch.tensor(turn)
        logprobs = -(tokens + 1).float() / 8
        return assemble(
            prompts, 1, tokens, lengths, torch.tensor([END in turn for turn in written]), logprobs
        )


class Until:
    """Answers "kl" until the policy writes a c. The c gives 1, other turns -0.5."""

    def reset(self, prompt: Prompt, seed: int) -> str:
        return prompt.reference or ""

    def step(self, text: str) -> Turn:
        done = "c" in text
        return Turn(
            "kl" if text else "",
            1.0 if done else -0.5,
            done,
            truncated="d" in text,
            parts={"letters": len(text)},
        )


def prompt(number: int, reference: Any = None) -> Prompt:
    return Prompt(number, "x", (END, 24), reference, ())


def played(
    turns: list[list[list[int]]], environment: Any = Until, prompts: Any = None, **limits: Any
) -> tuple[Rollout, Scripted]:
    """The scripted rows, each with its own prompt, and the engine that wrote them."""
    engine = Scripted(turns)
    episodes = Episodes(engine, environment, instruction=None, **{"turns": 3, "answer_tokens": 2} | limits)
    prompts = [prompt(i) for i in range(len(turns))] if prompts is None else prompts
    noise = uniforms(0, TRAIN, 0, range(len(prompts)), episodes.max_new_tokens)
    return episodes.sample(Letters(), prompts, 1, noise), engine


def completions_of(rollout: Rollout, prompts: Any = None) -> list[Completion]:
    return conversations(rollout, prompts or [prompt(i) for i in range(len(rollout))])


ROWS = [
    [[1, END], [2, 2, 2], [3, END]],  # a turn that ends, one that is cut, one that is right
    [[3]],  # right at once
    [[END], [1], [1, END]],  # an empty turn with an empty answer; then no turns are left
    [[4, END]],  # the environment stops
]


def test_an_episode_lies_on_the_grid():
    rollout, engine = played(ROWS)
    assert rollout.tokens.tolist() == [
        [1, 0, 11, 12, 2, 2, 2, 11, 12, 3, 0],
        [3, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0],
        [0, 1, 11, 12, 1, 0, 0, 0, 0, 0, 0],
        [4, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0],
    ]
    assert rollout.lengths.tolist() == [11, 1, 6, 2]
    assert rollout.action_mask.int().tolist() == [
        [1, 1, 0, 0, 1, 1, 1, 0, 0, 1, 1],
        [1, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0],
        [1, 1, 0, 0, 1, 1, 0, 0, 0, 0, 0],
        [1, 1, 0, 0, 0, 0, 0, 0, 0, 0, 0],
    ]
    assert [row.nonzero().flatten().tolist() for row in rollout.turn_ends] == [
        [1, 6, 10],
        [0],
        [0, 1, 5],
        [1],
    ]
    assert rollout.ended.tolist() == [True, True, False, False]
    assert torch.equal(rollout.logprobs, torch.where(rollout.action_mask, -(rollout.tokens + 1) / 8, 0.0))
    assert rollout.values is None
    assert rollout.group_ids.tolist() == rollout.prompt_ids.tolist() == [0, 1, 2, 3]
    asked = {number: [tokens for n, tokens, _ in engine.asked if n == number] for number in range(4)}
    assert asked[0] == [(0, 24), (0, 24, 1, 0, 11, 12), (0, 24, 1, 0, 11, 12, 2, 2, 2, 11, 12)]
    assert asked[2] == [(0, 24), (0, 24, 0), (0, 24, 0, 1, 11, 12)]
    assert len(asked[1]) == len(asked[3]) == 1, "what is over is not sampled again"
    first, second, third, _ = completions_of(rollout)
    assert (first.text, first.tokens, first.prompt) == ("a\nbbb\nc", (1, 0, 2, 2, 2, 3, 0), "x")
    assert [written for written, _ in first.turns] == ["a", "bbb", "c"]
    assert first.transcript == "a [kl] bbb [kl] c [kl]"
    assert (third.text, third.ended, second.ended) == ("\na\na", False, True)


def test_noise_is_keyed_by_position_whatever_other_rows_do():
    rollout, engine = played(ROWS)
    noise = uniforms(0, TRAIN, 0, range(4), 15).tolist()
    seen = {number: [row for n, _, row in engine.asked if n == number] for number in range(4)}
    assert seen[0] == [noise[0][0:3], noise[0][4:7], noise[0][9:12]]
    assert seen[2] == [noise[2][0:3], noise[2][1:4], noise[2][4:7]]
    for i, row in enumerate(ROWS):
        alone, _ = played([row], prompts=[Prompt(0, "x", (END, 24), None, ())])
        width = alone.tokens.shape[1]
        assert torch.equal(alone.tokens[0], rollout.tokens[i, :width])


def test_the_first_observation_belongs_to_the_prompt():
    prompts = [prompt(0, "bc"), prompt(1)]
    rollout, engine = played([[[3]], [[3]]], prompts=prompts)
    assert rollout.prompt_tokens.tolist() == [[0, 24, 2, 3], [0, 0, 0, 24]]
    assert rollout.prompt_lengths.tolist() == [4, 2]
    assert [c.prompt for c in completions_of(rollout, prompts)] == ["xbc", "x"]
    assert [tokens for _, tokens, _ in engine.asked] == [(0, 24, 2, 3), (0, 24)]


def test_each_episode_has_an_environment_and_a_seed_of_its_own():
    made = []

    class Noted(Until):
        def reset(self, prompt, seed):
            prompt.reference.append("changed")
            made.append((self, seed))
            return ""

    given = Prompt(0, "x", (END,), [], ())
    engine = Scripted([[[3]] * 9])
    episodes = Episodes(engine, Noted, turns=1, answer_tokens=1, instruction=None)
    noise = uniforms(3, TRAIN, 0, range(4), episodes.max_new_tokens)
    episodes.sample(Letters(), [given], 4, noise)
    assert len({id(environment) for environment, _ in made}) == 4
    assert [seed for _, seed in made] == [seed_of(row) for row in noise]
    assert len({seed for _, seed in made}) == 4
    assert given.reference == []


# -- rewards ---------------------------------------------------------------------------------------------


def shaped(reward: Any, gamma: float = 1.0) -> Rollout:
    rollout, _ = played(ROWS)
    scores = score(reward, completions_of(rollout))
    algo = algorithm(ReturnToGo(gamma, "none", False))
    return algo.estimate_advantages(algo.shape_rewards(rewarded(rollout, scores), 0.0), one_process)


def test_a_reward_lands_at_the_last_action_of_its_turn():
    rollout = shaped(own_rewards)
    assert rollout.rewards.tolist() == [0.0, 1.0, -1.5, -0.5]
    assert rollout.part_names == ("letters",)
    assert rollout.reward_parts.flatten().tolist() == [5.0, 1.0, 2.0, 1.0]
    assert [row[row != 0].tolist() for row in rollout.token_rewards] == [
        [-0.5, -0.5, 1.0],
        [1.0],
        [-0.5] * 3,
        [-0.5],
    ]
    assert rollout.token_rewards.nonzero().tolist() == rollout.turn_ends.nonzero().tolist()
    assert rollout.episodes == ()


def test_gamma_counts_the_tokens_of_the_policy():
    returns = shaped(own_rewards, gamma=0.5).returns[0]
    # a, end: -0.5; b, b, b: -0.5; c, end: 1. The answers between them take no time.
    late = [-0.0625, -0.125, -0.25]  # of b, b, b: -0.5 + 0.5 x 0.5 at the last
    assert returns.tolist() == [0.5 * (-0.5 + 0.5 * late[0]), -0.5 + 0.5 * late[0], 0, 0, *late, 0, 0, 0.5, 1]


def test_rewards_on_top_add_to_the_last_turn():
    def brief(completions):
        return [-float(len(completion.text)) for completion in completions]

    def by_turn(completions):
        return [Score(1.0, {}, [float(len(text)) for text, _ in c.turns]) for c in completions]

    both = WeightedSum(
        {"own": own_rewards, "brief": brief, "by_turn": by_turn}, {"own": 2, "brief": 0.5, "by_turn": 1}
    )
    rollout = shaped(both)
    assert rollout.token_rewards[0][rollout.turn_ends[0]].tolist() == [-1 + 1, -1 + 3, 2 + 1 - 3.5 + 1 - 5]
    assert rollout.rewards[0] == 2 * 0.0 + 0.5 * -7 + 1
    assert rollout.part_names == ("own", "brief", "by_turn", "own/letters")
    torch.testing.assert_close(rollout.token_rewards.sum(-1), rollout.rewards)


@pytest.mark.parametrize("pool", ["thread", "process"])
def test_workers_score_turns_as_well(pool):
    rollout, _ = played(ROWS)
    with Scorer(own_rewards, workers=2, pool=pool) as scorer:
        shared = scorer.begin(completions_of(rollout))()
    assert shared == score(own_rewards, completions_of(rollout))


def test_turns_that_do_not_fit_are_refused():
    completions = completions_of(played(ROWS)[0])
    with pytest.raises(
        UserError, match=r"reward wrong gave \[1.0\] to the turns of completion 0, which has 3"
    ):
        score(lambda_of("wrong", [1.0]), completions)
    with pytest.raises(UserError, match=r"gave \[nan, 0.0, 0.0\] to the turns of completion 0"):
        score(lambda_of("wrong", [float("nan"), 0.0, 0.0]), completions)
    with pytest.raises(UserError, match="reward=environment: the completions have no turns"):
        score(own_rewards, [Completion("x", "a", None, (1,), True)])
    for turns, message in [
        (0.5, r"gave 0.5 to the turns of completion 0, which has 3; give a finite number for each"),
        (None, "gave None to the turns of completion 0, which has 3"),
        (torch.ones(()), r"gave tensor\(1.\) to the turns of completion 0, which has 3"),
    ]:
        with pytest.raises(UserError, match=message):
            score(lambda_of("wrong", turns), completions)
    for turns, message in [
        (None, "reward Batch gave None as turns; give a list of numbers for each completion"),
        ([0.5] * 4, "reward Batch gave 0.5 to the turns of completion 0, which has 3"),
        (torch.ones(4), "reward Batch gave 1.0 to the turns of completion 0, which has 3"),
        ([[0.5]], "reward Batch: turns returned 1 score for 4 completions"),
    ]:
        with pytest.raises(UserError, match=message):
            score(Batch(turns), completions)
    alike = [completions[0], completions[2]]
    assert score(Batch(torch.ones(2, 3)), alike).turns == ([1.0] * 3, [1.0] * 3)
    assert score(lambda_of("plain", torch.ones(3)), alike).turns == ([1.0] * 3, [1.0] * 3)
    assert score(lambda_of("plain", ()), completions).turns == ([0.0] * 3, [0.0], [0.0] * 3, [0.0])


@dataclass
class Batch:
    """A reward that gives these turns."""

    turns: Any

    def score(self, batch):
        return Scores([1.0] * len(batch.completions), {}, self.turns)


class Solved(Until):
    """Gives a part only in the turn that is right."""

    def step(self, text: str) -> Turn:
        turn = super().step(text)
        return replace(turn, parts={"solved": 1.0} if turn.done else {})


def test_a_part_may_be_given_in_some_turns_only():
    """Where it is not given it counts 0: in a turn, an episode, a worker's share, a batch and a process."""
    rollout, _ = played(ROWS, Solved)
    completions = completions_of(rollout)
    solved = {"solved": [1.0, 1.0, 0.0, 0.0]}
    assert score(own_rewards, completions).parts == solved
    with Scorer(own_rewards, workers=4, pool="thread") as scorer:
        assert scorer.begin(completions)().parts == solved
    halves = [
        rewarded(rollout.select(torch.tensor(rows)), score(own_rewards, [completions[row] for row in rows]))
        for rows in ([2, 3], [0, 1])
    ]
    assert [half.part_names for half in halves] == [(), ("solved",)]
    both = Rollout.concatenate(halves)
    assert (both.part_names, both.reward_parts.flatten().tolist()) == (("solved",), [0.0, 0.0, 1.0, 1.0])
    means = Means()
    for half in halves:
        measure(half, means, "val")
    assert means_of(means.reduce(lambda x: x, means.names))["val/reward/solved"] == 0.5


def lambda_of(name: str, turns: Any) -> Any:
    def reward(completions):
        return [Score(0.0, {}, turns) for _ in completions]

    reward.__name__ = name
    return reward


# -- what is refused -------------------------------------------------------------------------------------


def answering(answer: Any) -> Any:
    class Answering(Until):
        def step(self, text):
            return answer

    return Answering


class Raising(Until):
    def step(self, text):
        return {}["missing"]


class Starting(Until):
    def __init__(self, observation=None):
        self.observation = observation

    def reset(self, prompt, seed):
        return self.observation


FAULTS = [
    (answering(None), "environment Answering: step returned None; it must return a Turn"),
    (answering(Turn(3, 0.0, False)), "environment Answering: step gave 3 as its text; it must be a str"),
    (answering(Turn("", float("inf"), False)), "environment Answering: step gave inf as the reward; it must be"),
    (answering(Turn("", "1", False)), "step gave '1' as the reward"),
    (answering(Turn("", 0.0, "no")), "step gave done='no'; it must be True or False"),
    (answering(Turn("", 0.0, True, parts={"a": None})), "step gave None as the part 'a'"),
    (answering(Turn("", 0.0, True, parts={"a/b": 1})), "step gave 'a/b' as a name in its parts; .* has no slash"),
    (answering(Turn("", 0.0, True, parts=[1])), r"step gave \[1\] as its parts"),
    (answering(Turn("abc", 0.0, False)), r"step gave the text 'abc', which has 3 tokens, but task.answer_tokens=2"),
    (Raising, r"environment Raising: step failed at .*test_episodes.py:\d+: KeyError: 'missing'"),
    (Starting, "environment Starting: reset gave None as its text"),
    (lambda: Starting("abc"), "environment Starting: reset gave the text 'abc', which has 3 tokens"),
    (lambda: None, r"task.environment returned None; an environment has reset\(prompt, seed\) and step\(text\)"),
    (lambda: {}["x"], r"task.environment failed at .*test_episodes.py:\d+: KeyError"),
]  # fmt: skip


@pytest.mark.parametrize(("environment", "message"), FAULTS)
def test_a_fault_of_the_environment_is_told_in_one_line(environment, message):
    with pytest.raises((UserError, RunError), match=message) as told:
        played([[[1], [1], [1]]], environment)
    assert "\n" not in str(told.value)


def test_one_environment_for_two_episodes_is_refused():
    shared = Until()
    with pytest.raises(UserError, match="returned the same Until for two episodes"):
        played([[[1]], [[1]]], lambda: shared)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (
            ["task=reviews", "+task.turns=2"],
            "task.turns is for a task with an environment, and task reviews has none",
        ),
        (["task=guess_number", "~task.turns"], "task.turns is missing; task guess_number has an environment"),
        (["task=guess_number", "task.answer_tokens=0"], "task.answer_tokens=0; it must be a whole number"),
        (["task=guess_number", "task.turns=2.5"], "task.turns=2.5; it must be a whole number"),
        (["task=guess_number", "algo=dqn"], "algo=dqn keeps one reward per sequence"),
        (
            ["task=guess_number", "algo=dapo", "rollout.max_new_tokens=4"],
            "algo/truncation=penalty counts the tokens",
        ),
        (
            ["task=guess_number", "task.turns=16"],
            r"7 of 7 rows of train do not fit .* needs 33, .* lower task.turns=16 x \(rollout.max_new_tokens=1 \+ "
            r"task.answer_tokens=1\), or take",
        ),
        (["task=guess_number", "task.numbers=[a,a]"], r"task.numbers=\['a', 'a'\]; give two or more"),
    ],
)
def test_what_does_not_go_together_is_refused_at_the_start(compose, tmp_path, overrides, message):
    from policylab.config.build import build

    with pytest.raises(UserError, match=message):
        build(compose([*overrides, "hardware=cpu", "callbacks=none"]), tmp_path)


# -- with language models --------------------------------------------------------------------------------


class Mirror:
    """Starts with a word drawn from the seed, then repeats up to two letters; ends after three turns."""

    def reset(self, prompt: Prompt, seed: int) -> str:
        self.turns = 0
        return " no" if seed % 2 else ""

    def step(self, text: str) -> Turn:
        self.turns += 1
        over = self.turns > len(text) % 3
        return Turn(text[:2], len(text) / 16, over)


@pytest.fixture
def talkative(tiny_policy):
    """A policy that ends about half of its turns."""
    with torch.no_grad():
        tiny_policy.lm.get_output_embeddings().weight[tiny_policy.eos_id] *= 80
    return tiny_policy


def mirrored(policy: Any, engine: Any, rows: Any = range(6), behaviour: Any = None) -> Rollout:
    """Episodes of these rows of one prompt."""
    episodes = Episodes(engine, Mirror, turns=3, answer_tokens=6, instruction=None)
    prompts = policy.prompts([("the plot", "", None)], None)
    noise = uniforms(0, TRAIN, 0, rows, episodes.max_new_tokens)
    return RowLimit(None).sample(episodes, policy, prompts, len(noise), noise, behaviour)


def test_every_engine_plays_the_same_episodes(talkative):
    cached, hf = (mirrored(talkative, engine(1.0, 5)) for engine in (CachedEngine, GenerateEngine))
    assert torch.equal(cached.tokens, hf.tokens)
    assert torch.equal(cached.action_mask, hf.action_mask)
    assert torch.equal(cached.turn_ends, hf.turn_ends)
    assert cached.episodes == hf.episodes
    assert len(set(cached.turn_ends.sum(-1).tolist())) > 1
    assert {len(episode.observation) for episode in cached.episodes} == {0, 3}
    with torch.no_grad():
        recomputed, values = talkative.logprobs_of(cached, 1.0), talkative.values(cached)
    torch.testing.assert_close(cached.logprobs, recomputed, atol=1e-4, rtol=0)
    torch.testing.assert_close(cached.values, values, atol=1e-4, rtol=0)
    assert (~cached.action_mask & length_mask(cached.lengths, cached.tokens.shape[1])).any()


def test_an_episode_is_the_same_alone_and_in_pieces(talkative):
    whole = mirrored(talkative, CachedEngine(1.0, 5))
    for row in range(6):
        alone = mirrored(talkative, CachedEngine(1.0, 5), [row])
        assert alone.episodes == (whole.episodes[row],)
        assert alone.tokens[0].tolist() == whole.tokens[row, : alone.tokens.shape[1]].tolist()
    limit = RowLimit(2)
    episodes = Episodes(CachedEngine(1.0, 5), Mirror, turns=3, answer_tokens=6, instruction=None)
    noise = uniforms(0, TRAIN, 0, range(6), episodes.max_new_tokens)
    pieces = limit.sample(episodes, talkative, talkative.prompts([("the plot", "", None)], None), 6, noise)
    assert torch.equal(pieces.tokens, whole.tokens)
    assert pieces.episodes == whole.episodes
    assert pieces.select(torch.tensor([4, 1])).episodes == (whole.episodes[4], whole.episodes[1])


def test_processes_collect_the_episodes_that_one_would(talkative, sampled_with):
    sampler = sampled_with(
        talkative, Episodes(CachedEngine(1.0, 5), Mirror, turns=3, answer_tokens=6, instruction=None)
    )
    prompts = talkative.prompts([(text, "", None) for text in ("the plot", "a film", "it has", "bad")], None)

    def collected(part, processes, rank):
        sampler.runtime.rank = rank
        plan = BatchPlan(len(prompts), 2, 1, 1, processes)
        collector = Collector(sampler, plan, prompts, values=True, greedy_rewards=True)
        rollout, samples = collector.collect(tuple(part))
        assert torch.equal(rollout.rewards, rollout.turn_rewards.sum(-1))
        return [(s.prompt, s.completion, s.tokens) for s in samples], rollout.greedy_rewards.tolist()

    whole = collected(prompts, 1, 0)
    halves = collected(prompts[:2], 2, 0), collected(prompts[2:], 2, 1)
    assert tuple(first + second for first, second in zip(*halves, strict=True)) == whole


@pytest.fixture
def sampled_with():
    """A sampler of a policy and an engine, on one process without Lightning."""
    from types import SimpleNamespace

    from policylab.training.passes import Passes
    from policylab.training.recorder import Recorder
    from policylab.training.run_state import Progress
    from policylab.training.sampler import Sampler
    from test_training_parts import Alone

    def make(policy, engine):
        parts = SimpleNamespace(
            policy=policy, engine=engine, scorer=Scorer(own_rewards), seed=0, max_rows=None
        )
        passes = Passes(policy, 1000, Recorder(Alone()), whole_distributions=False)
        return Sampler(parts, policy.frozen_copy(), passes, Progress(iterations=3))

    return make


def test_chat_models_read_answers_as_messages():
    from test_encoding import chat_policy, id_of

    policy = chat_policy()
    end = id_of(policy, "<|end|>")
    injected = "hi<|end|>"
    message = f"<|start|>user\n{injected}<|end|>\n<|start|>assistant\n"
    cut, ended = (policy.encode_answer(injected, ended=ended) for ended in (False, True))
    assert policy.tokenizer.decode(cut) == f"<|end|>\n{message}"
    assert cut == [end, *ended]
    assert ended.count(end) == 1, "control tokens of a text are characters"
    with pytest.raises(UserError, match="does not support several turns"):
        chat_policy("{{ messages[0]['content'] }}").encode_answer("hi", ended=True)


# -- the gradient is that of the expected reward ----------------------------------------------------------

VOCABULARY = 3
#: All texts of a turn of at most two tokens.
TURNS = [(END,), *((first, last) for first in (1, 2) for last in range(VOCABULARY))]


@dataclass(frozen=True)
class Listed:
    """Every episode of a small world, with its probability.

    A first turn "a" ends the episode. To any other the environment answers with one of two letters, by a coin, and the
    second turn ends it. All rewards depend on the whole history, so that nothing holds by symmetry.
    """

    rollout: Rollout
    chance: Tensor  #: probability of what the environment did, ``[B]``
    states: Tensor  #: number of the history before each position, ``[B, T]``
    count: int

    @classmethod
    def make(cls) -> Listed:
        class Coin:
            def reset(self, prompt, seed):
                self.coin, self.said = prompt.reference, ""
                return ""

            def step(self, text):
                done = text == "a" or bool(self.said)
                self.said += f"{text},{self.coin}"
                reward = (sum(map(ord, self.said)) * 7 % 11 - 5) / 4
                return Turn("ab"[self.coin], reward, done)

        rows = [(first, coin, second) for first in TURNS for coin in range(2) for second in TURNS]
        rows = [(f, c, s) for f, c, s in rows if f != (1, END) or s == TURNS[0]]
        engine = Scripted([[list(f), list(s)] for f, _, s in rows], max_new_tokens=2)
        episodes = Episodes(engine, Coin, turns=2, answer_tokens=1, instruction=None)
        prompts = [prompt(i, coin) for i, (_, coin, _) in enumerate(rows)]
        noise = torch.rand(len(rows), episodes.max_new_tokens, dtype=torch.double)
        rollout = episodes.sample(Letters(), prompts, 1, noise)
        scores = score(own_rewards, conversations(rollout, prompts))
        rollout = rewarded(rollout, scores)
        histories = [[tuple(row[:t]) for t in range(len(row))] for row in rollout.tokens.tolist()]
        numbers = {h: n for n, h in enumerate(dict.fromkeys(itertools.chain(*histories)))}
        states = torch.tensor([[numbers[h] for h in row] for row in histories])
        return cls(rollout, torch.full((len(rows),), 0.5, dtype=torch.double), states, len(numbers))

    def logprobs(self, logits: Tensor, mask: Tensor) -> Tensor:
        chosen = logits.log_softmax(-1)[self.states].gather(-1, self.rollout.tokens[..., None]).squeeze(-1)
        return chosen.masked_fill(~mask, 0.0)

    def probabilities(self, logits: Tensor) -> Tensor:
        return self.logprobs(logits, self.rollout.action_mask).sum(-1).exp() * self.chance

    def gradient(
        self, advantage: Any, logits: Tensor, size: int = 1, mask: Tensor | None = None, beta: float = 0.0
    ) -> Tensor:
        """Expected direction of ascent over all batches of one episode, or of two."""
        mask = self.rollout.action_mask if mask is None else mask
        generator = torch.Generator().manual_seed(1)
        values = torch.randn(self.count, generator=generator, dtype=torch.double)[self.states].masked_fill(
            ~mask, 0
        )
        old = self.logprobs(logits, mask).detach()
        reference = self.logprobs(torch.zeros_like(logits), mask)
        rollout = self.rollout.replace(
            action_mask=mask, rewards=self.rollout.rewards.double(), turn_rewards=self.rollout.turn_rewards.double(),
            logprobs=old, policy_logprobs=old, ref_logprobs=reference, values=values,
            greedy_rewards=torch.full_like(self.chance, 0.375),
        )  # fmt: skip
        algo = algorithm(advantage, kl=penalty(beta) if beta else NO_PENALTY)

        def loss(logits: Tensor, batches: Tensor) -> Tensor:
            rows = batches.flatten()
            fields = {name: x[rows] for name, x in vars(rollout).items() if isinstance(x, Tensor)}
            fields["group_ids"] = torch.arange(len(batches)).repeat_interleave(size)
            batch = algo.shape_rewards(rollout.replace(**fields), beta)
            batch = algo.estimate_advantages(batch, one_process)
            new = self.logprobs(logits, mask)[rows]
            terms = algo.loss_terms(batch, Evaluation(new, torch.zeros_like(new), batch.values, None))
            of_rows = (algo.loss(terms, beta) * batch.loss_mask).sum(-1).view(-1, size)
            return (of_rows.mean(-1) * self.probabilities(logits).detach()[batches].prod(-1)).sum()

        every = itertools.product(range(len(self.chance)), repeat=size)
        parts = torch.tensor(list(every)).split(len(self.chance))
        return -sum(torch.func.grad(loss)(logits, part) for part in parts)

    def truth(self, logits: Tensor, beta: float = 0.0) -> Tensor:
        """Gradient of the expected reward, less the KL to a uniform reference, by automatic differentiation."""

        def expected(logits: Tensor) -> Tensor:
            p = self.probabilities(logits)
            mask = self.rollout.action_mask
            ratio = (self.logprobs(logits, mask) - self.logprobs(torch.zeros_like(logits), mask)).sum(-1)
            return (p * (self.rollout.rewards.double() - beta * ratio)).sum()

        return torch.func.grad(expected)(logits)


@pytest.fixture(scope="module")
def listed() -> Listed:
    return Listed.make()


@pytest.fixture(scope="module")
def logits(listed) -> Tensor:
    return torch.randn(
        listed.count, VOCABULARY, generator=torch.Generator().manual_seed(0), dtype=torch.double
    )


def test_all_episodes_are_listed(listed, logits):
    assert len(listed.rollout) == 2 * (6 * 7 + 1)
    torch.testing.assert_close(listed.probabilities(logits).sum().item(), 1.0)
    assert set(listed.rollout.turn_ends.sum(-1).tolist()) == {1, 2}


@pytest.mark.parametrize("beta", [0.0, 0.3])
@pytest.mark.parametrize(
    ("advantage", "size"),
    [
        (ReturnToGo(1.0, "none", False), 1),
        (GreedyBaseline(), 1),
        (LeaveOneOut(), 2),
        (GAE(1.0, 1.0, False), 1),
        (NStep(1.0, 9, False), 1),
        (VTrace(1.0, 1.0, 1.0, False), 1),
    ],
    ids=lambda x: type(x).__name__ if not isinstance(x, int) else str(x),
)
def test_the_expected_gradient_is_that_of_the_expected_reward(listed, logits, advantage, size, beta):
    """For random answers of any text: the environment's tokens have no gradient."""
    gradient = listed.gradient(advantage, logits, size, beta=beta)
    torch.testing.assert_close(gradient, listed.truth(logits, beta))
    spoken = length_mask(listed.rollout.lengths, listed.states.shape[1]) & ~listed.rollout.action_mask
    only_spoken = set(listed.states[spoken].tolist()) - set(
        listed.states[listed.rollout.action_mask].tolist()
    )
    assert only_spoken
    assert not gradient[list(only_spoken)].any()


def test_words_that_were_trained_on_would_be_seen(listed, logits):
    every = length_mask(listed.rollout.lengths, listed.states.shape[1])
    wrong, truth = listed.gradient(ReturnToGo(1.0, "none", False), logits, mask=every), listed.truth(logits)
    assert (wrong - truth).norm() > 0.1 * truth.norm()


# -- the small world, and training in it ------------------------------------------------------------------


def world(**changes: Any) -> GuessNumber:
    return GuessNumber(
        **{
            "name": "n",
            "prompt": "",
            "numbers": list("abcdefg"),
            "higher": "h",
            "lower": "l",
            "cost": 0.1,
            "held_out": 14,
        }
        | changes
    )


def bisected(task: GuessNumber, secret: str) -> list[Turn]:
    """A game played by bisection."""
    game, left, turns = task.environment(), list(task.numbers), list[Turn]()
    game.reset(Prompt(0, "", (0,), secret, ()), 0)
    while not turns or not turns[-1].done:
        middle = len(left) // 2
        turns.append(game.step(f" {left[middle]} "))
        left = left[middle + 1 :] if turns[-1].text == task.higher else left[:middle]
    return turns


def optimum(numbers: int, turns: int, cost: float) -> float:
    """The largest sum of rewards over all secrets, by trying every first guess."""
    if numbers == 0 or turns == 0:
        return 0.0
    return max(
        1 - cost * (numbers - 1) + optimum(low, turns - 1, cost) + optimum(numbers - 1 - low, turns - 1, cost)
        for low in range(numbers)
    )


def test_bisection_is_the_optimum_of_the_world():
    task = world()
    games = [bisected(task, secret) for secret in task.numbers]
    assert max(map(len, games)) == 3
    assert [game[-1].text for game in games] == ["right"] * 7
    mean = sum(turn.reward for game in games for turn in game) / 7
    assert mean == pytest.approx(optimum(7, 3, 0.1) / 7) == pytest.approx(0.857, abs=1e-3)
    assert world().environment() is not task.environment()
    game = task.environment()
    game.reset(Prompt(0, "", (0,), "c", ()), 0)
    assert [game.step(text) for text in ("z", "d", "")] == [
        Turn("", -0.1, False),
        Turn("l", -0.1, False),
        Turn("", -0.1, False),
    ]
    completion = Completion(
        "", "d\nx", "c", (4, 20), False, (("d", Turn("l", -0.1, False)), ("x", Turn("", -0.1, False)))
    )
    assert task.metrics([completion]) == {"found": [0.0], "valid": [0.5]}


@pytest.mark.parametrize(
    "preset", quick(["ppo", "rloo", "grpo", "reinforce", "remax", "trpo"], ["ppo", "rloo"])
)
def test_methods_train_on_episodes(preset):
    def trained(lr: float) -> Any:
        changes = {"iterations": 2, "rollout.max_new_tokens": 1, "optim.lr": lr}
        return train(small(algo(preset), changes, "guess_number"), reward=None)

    trace = trained(0.1)
    metrics = trace.metrics[0]
    assert 1 <= metrics["train/turns"] <= 3
    assert metrics["train/turns"] == metrics["train/length"]
    assert -0.3 - 1e-6 <= metrics["train/reward"] <= 1
    if preset != "trpo":  # whose step has no rate
        assert trace.distance(trained(0.0)) > 0


def test_a_resumed_run_plays_the_same_episodes(tmp_path):
    """To the bit: nothing of an environment is in a checkpoint, because no episode spans two iterations."""
    from test_faults import experiment, fit, weights

    def run(folder: str, checkpoint: Any = None, **changes: Any) -> Any:
        folder = tmp_path / folder
        folder.mkdir(exist_ok=True)
        changes |= {"rollout.max_new_tokens": 1}
        return fit(experiment(folder, algo("ppo"), "guess_number", **changes), checkpoint)

    through, _ = run("through"), run("half", iterations=2)
    resumed = run("half", tmp_path / "half" / "checkpoints" / "last.ckpt")
    assert torch.equal(weights(resumed), weights(through))
    assert [sample.completion for sample in resumed.samples] == [s.completion for s in through.samples]
    assert any("[h]" in sample.completion for sample in through.samples)


def test_a_plan_counts_whole_episodes(compose):
    from policylab.planning.read import describe

    assert describe(compose(["task=guess_number"])).new_tokens == 3 * (1 + 1)


def test_the_sum_over_a_sequence_is_divided_by_the_most_tokens_of_the_policy(compose):
    """Of all turns, without the answers; without an environment, those of a completion."""
    constants = {
        "guess_number": 3, "guess_number rollout.max_new_tokens=2 task.turns=5": 10, "reviews": 24, "random_walks": 10
    }  # fmt: skip
    for words, constant in constants.items():
        config = compose(["algo=dr_grpo", *f"task={words}".split()])
        assert config.algo.reduction.constant == constant
