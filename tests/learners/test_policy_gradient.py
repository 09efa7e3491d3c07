"""The estimators against the exact derivative of what they estimate: a small MDP whose every outcome is enumerated."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import product

import pytest
import torch
from torch import Tensor, nn

from metadist.core.errors import InputError
from metadist.core.random import Draws
from metadist.core.task import Examples, Task, TaskId
from metadist.engine import Engine, Method
from metadist.engine.graph_cache import AFTER
from metadist.environments import Goals, Navigation, Step
from metadist.learners import PolicyGradient
from metadist.learners.learner import Fast
from metadist.learners.policy_gradient import FIRST, KEY, QUERY, UNADAPTED
from metadist.models import GaussianPolicy, Model
from metadist.models.losses import mean_squared_error
from metadist.models.noise import uniform

from .small import differences, distance

RATE, DISCOUNT, N = 0.7, 0.8, 2
REWARDS = torch.tensor([[1.0, -0.5], [0.3, 2.0]], dtype=torch.float64)
SETS = 8  # keys apart, of two outcomes


class Chain:
    """Two states, shown one-hot; action 1 goes to the other one, and from the second ends the trajectory. The task
    brings the rewards [state, action]."""

    discrete = True

    def reset(self, parameters, key, trajectories):
        del key
        state = torch.zeros(trajectories, dtype=torch.int64)
        return state, self.shown(parameters, state)

    def step(self, parameters, state, actions):
        after = (state + actions) % 2
        return Step(after, self.shown(parameters, after), parameters[0][state, actions], (state * actions) == 1)

    def shown(self, parameters, state):
        return torch.stack([state == 0, state == 1], dim=-1).to(parameters[0].dtype)


@dataclass(frozen=True, kw_only=True)
class Scripted(PolicyGradient):
    """The actions of each set of trajectories are bits of the task's key, whatever the policy."""

    def noise(self, key: Tensor, outputs: Tensor) -> Tensor:
        number, outcome, size = key % SETS, key // SETS, self.horizon * self.trajectories
        bits = (outcome >> (number * size + torch.arange(size))) & 1
        wanted = bits.reshape(self.horizon, self.trajectories, 1) == torch.arange(2)
        return wanted.to(outputs.dtype) * 1e6


class Outcome:
    """A stream of random words whose first is the key of an outcome."""

    def __init__(self, number: int):
        self.number = number

    def word(self) -> int:
        return self.number * SETS << 1


def learner(sampling: str, horizon: int = 2, **options) -> Scripted:
    torch.manual_seed(1)
    settings = {"trajectories": N, "discount": DISCOUNT, "inner_lr": RATE, "sampling": sampling} | options
    model = Model(nn.Linear(2, 2, bias=False))
    return Scripted(model=model, loss=mean_squared_error, environment=Chain(), horizon=horizon, **settings)


Episode = list[tuple[int, int, float]]
"""(state, action, reward) of each step."""


def episode(actions: Sequence[int]) -> Episode:
    state, found = 0, []
    for action in actions:
        found.append((state, action, float(REWARDS[state, action])))
        if state == action == 1:
            break
        state = (state + action) % 2
    return found


def probability(logits: Tensor, episodes: Sequence[Episode]) -> Tensor:
    policy = logits.softmax(dim=0)  # [action, state]
    return torch.stack([policy[a, s] for each in episodes for s, a, _ in each]).prod()


def value(logits: Tensor, horizon: int) -> Tensor:
    """The expected return: a sum over all trajectories that differ."""
    different = {tuple(episode(actions)) for actions in product((0, 1), repeat=horizon)}
    return sum((probability(logits, [list(e)]) * sum(r for *_, r in e) for e in different), torch.zeros(()))


def raw(episodes: Sequence[Episode]) -> list[list[float]]:
    """Discounted rewards to go, less the other trajectory's at that step."""
    to_go = [[sum(DISCOUNT**i * step[2] for i, step in enumerate(each[t:])) for t in range(3)] for each in episodes]
    return [[to_go[n][t] - to_go[1 - n][t] for t in range(len(each))] for n, each in enumerate(episodes)]


def advantages(episodes: Sequence[Episode], horizon: int) -> list[list[float]]:
    found = raw(episodes)
    size = (sum(a * a for own in found for a in own) / (horizon * N)) ** 0.5 + 1e-8
    return [[a / size for a in own] for own in found]


def adapted(logits: Tensor, episodes: Sequence[Episode], horizon: int) -> Tensor:
    """After one step; d log pi(a | s) / d logits of s = (one at a) - pi(s)."""
    policy, step = logits.softmax(dim=0), torch.zeros_like(logits)
    for own, each in zip(advantages(episodes, horizon), episodes, strict=True):
        for advantage, (s, a, _) in zip(own, each, strict=True):
            one = torch.zeros(2, dtype=torch.float64)
            one[a] = 1
            step = step + torch.stack([(one - policy[:, s]) * (s == state) for state in range(2)], 1) * advantage
    return logits + RATE * step / (horizon * N)


def sets(horizon: int) -> Iterator[tuple[int, list[Episode]]]:
    """Each outcome of N trajectories: as a number whose bits are the actions [H, N], and what happens."""
    for number in range(2 ** (horizon * N)):
        bits = [number >> place & 1 for place in range(horizon * N)]
        yield number, [episode(bits[n::N]) for n in range(N)]


def chance(logits: Tensor, number: int, horizon: int) -> Tensor:
    """Of all the actions of an outcome, those after a trajectory's end too, which the learner draws and leaves out."""
    policy, found = logits.softmax(dim=0), []
    for n in range(N):
        state = 0
        for t in range(horizon):
            action = number >> (t * N + n) & 1
            found.append(policy[action, state])
            state = (state + action) % 2
    return torch.stack(found).prod()


def expected(own: Scripted) -> tuple[Tensor, Tensor, Tensor]:
    """The exact expectation of what the learner gives, its loss and its meta-gradient; and the logits [2, 2]."""
    engine = Engine(own, "vmap", dtype=torch.float64)
    theta = engine.initial_theta()
    logits, horizon, size = theta.reshape(2, 2), own.horizon, own.horizon * N
    outcomes, weights = [], []

    def spread(at: Tensor, k: int, outcome: int, weight: Tensor) -> None:
        for number, episodes in sets(horizon):
            after = weight * chance(at, number, horizon)
            if k < own.inner_steps:
                moved = adapted(at, episodes, horizon)
                spread(moved, k + 1, outcome + (number << ((FIRST + k) * size)), after)
            else:
                for unadapted, _ in sets(horizon) if own.sampling == "score" else [(0, [])]:
                    outcomes.append(outcome + (number << (QUERY * size)) + (unadapted << (UNADAPTED * size)))
                    weights.append(after * (chance(logits, unadapted, horizon) if own.sampling == "score" else 1))

    spread(logits, 0, 0, torch.ones((), dtype=torch.float64))
    part = Examples((REWARDS.numpy()[None],), ())
    losses, rows = engine.meta_gradients(theta, [Task(part, part)] * len(outcomes), draws=list(map(Outcome, outcomes)))
    chances = torch.stack(weights)
    assert abs(float(chances.sum()) - 1) < 1e-12
    return chances @ losses, chances @ rows, logits


def objective(own: Scripted, held: Tensor | None = None) -> Callable[[Tensor], Tensor]:
    """Minus the expected return after adaptation as a function of theta [4]; support sets are drawn by the policy of
    `held`, adapted as it goes, or by theta's own."""

    def found(logits: Tensor, drawn: Tensor, k: int) -> Tensor:
        if k == own.inner_steps:
            return -value(logits, own.horizon)
        total = torch.zeros((), dtype=torch.float64)
        for _, episodes in sets(own.horizon):
            after, other = (adapted(at, episodes, own.horizon) for at in (logits, drawn))
            total = total + probability(drawn, episodes) * found(after, other, k + 1)
        return total

    return lambda theta: found(theta.reshape(2, 2), theta.reshape(2, 2) if held is None else held, 0)


@pytest.mark.parametrize(("horizon", "steps"), [(1, 1), (2, 1), (1, 2)])
def test_with_the_sampling_term_it_is_the_derivative_of_the_expected_return(horizon, steps):
    own = learner("score", horizon, inner_steps=steps)
    loss, row, logits = expected(own)
    exact = objective(own)
    assert abs(float(loss - exact(logits.flatten()))) < 1e-12
    assert distance(row, differences(exact, logits.flatten())) < 1e-7


@pytest.mark.parametrize(("horizon", "steps"), [(1, 1), (2, 1), (1, 2)])
def test_without_it_it_is_the_derivative_with_the_sampling_distribution_held_fixed(horizon, steps):
    own = learner("fixed", horizon, inner_steps=steps)
    _, row, logits = expected(own)
    derivative = differences(objective(own, held=logits), logits.flatten())
    assert distance(row, derivative) < 1e-7
    assert distance(row, differences(objective(own), logits.flatten())) > 1e-2, "the term is not small here"


def curvature(logits: Tensor, episodes: Sequence[Episode], horizon: int) -> Tensor:
    """[4, 4], of what an inner step descends, after ProMP (LVC): the mean over trajectories and time of
    -A (H + g g'), with g and H the derivatives of log pi(a | s)."""
    policy, total = logits.softmax(dim=0), torch.zeros(2, 2, 2, 2, dtype=torch.float64)
    for own, each in zip(advantages(episodes, horizon), episodes, strict=True):
        for advantage, (s, a, _) in zip(own, each, strict=True):
            p, g = policy[:, s], -policy[:, s].clone()
            g[a] += 1
            total[:, s, :, s] += advantage * (torch.outer(p, p) - p.diag() + torch.outer(g, g))
    return -total.reshape(4, 4) / (horizon * N)


@pytest.mark.parametrize("horizon", [1, 2])
def test_the_low_variance_one_is_that_of_promp(horizon):
    own = learner("low_variance", horizon)
    _, row, logits = expected(own)
    by_hand = torch.zeros(4, dtype=torch.float64)
    for _, episodes in sets(horizon):
        after = adapted(logits, episodes, horizon).flatten()
        outer = differences(lambda at: -value(at.reshape(2, 2), horizon), after)
        jacobian = torch.eye(4, dtype=torch.float64) - RATE * curvature(logits, episodes, horizon)
        by_hand += probability(logits, episodes) * (jacobian.T @ outer)
    assert distance(row, by_hand) < 1e-7


def test_its_curvature_is_on_average_that_of_the_expected_return():
    """Of advantages that are not scaled, where an episode is one step: over more, how actions hang together is left
    out. The mean over both outcomes of -A (H + g g')."""
    logits = learner("low_variance").model.parameters["weight"].double()
    mean, policy = torch.zeros(4, 4, dtype=torch.float64), logits.softmax(dim=0)[:, 0]
    for number, episodes in sets(1):
        size = (sum(a * a for own in raw(episodes) for a in own) / N) ** 0.5 + 1e-8
        mean += probability(logits, episodes) * size * curvature(logits, episodes, 1)
        assert chance(logits, number, 1) == pytest.approx(float(policy[number & 1] * policy[number >> 1]))
    hessian = torch.func.hessian(lambda at: -value(at.reshape(2, 2), 1))(logits.flatten())
    assert distance(mean, hessian) < 1e-7


GAUSSIAN = {"trajectories": 4, "horizon": 3, "inner_steps": 2, "inner_lr": 0.3}


def navigator(**options) -> PolicyGradient:
    torch.manual_seed(2)
    model = Model(GaussianPolicy([[2]], 2, hidden=(5,), initial_std=0.2))
    return PolicyGradient(model=model, loss=mean_squared_error, environment=Navigation(), **(GAUSSIAN | options))


def goals(count: int = 3) -> list[Task]:
    return [Goals(seed=0)(TaskId("train", 0, index)) for index in range(count)]


def streams(count: int = 3) -> list[Draws]:
    return [Draws(0, TaskId("train", 0, index), 1) for index in range(count)]


@pytest.mark.parametrize("sampling", ["low_variance", "score", "fixed"])
def test_every_engine_gives_the_same(sampling):
    def rows(method: Method) -> Tensor:
        engine = Engine(navigator(sampling=sampling), method, dtype=torch.float64)
        return engine.meta_gradients(engine.initial_theta(), goals(), draws=streams()).rows

    expected = rows(Method("loop"))
    assert expected.norm() > 1e-3
    for method in (Method("vmap"), Method("loop", "remat"), Method("vmap", "remat", spacing=2)):
        assert distance(rows(method), expected) < 1e-9


def test_what_it_computes_can_be_recorded_to_the_same_bits():
    own = navigator()
    plain, recorded = Engine(own, "vmap"), Engine(own, "vmap")
    theta, steps = plain.initial_theta(), range(AFTER + 3)
    whole = [recorded.meta_gradients(theta + step / 100, goals(), step, draws=streams()).rows for step in steps]
    for step in (AFTER, AFTER + 1, AFTER + 2):  # of an engine that has recorded nothing
        assert torch.equal(plain.meta_gradients(theta + step / 100, goals(), step, draws=streams()).rows, whole[step])
    assert any(record.play is not None and record.checked > 1 for record in recorded._program._records.values())


def test_actions_are_normal_around_the_mean_and_their_log_probabilities_torchs():
    own = navigator(trajectories=4000, horizon=1)
    theta = own.layout()
    sampled = own.sample(theta, Fast({}, {KEY: torch.tensor(5)}), (torch.zeros(1, 2),), QUERY)
    mean, log_std = own.model(theta, torch.zeros(1, 2)).chunk(2, dim=-1)
    actions = sampled.actions[0]
    assert torch.allclose(actions.mean(dim=0), mean[0], atol=4 * 0.2 / 4000**0.5)
    assert torch.allclose(actions.std(dim=0), log_std.exp()[0], rtol=0.05)
    known = torch.distributions.Normal(mean, log_std.exp()).log_prob(actions).sum(dim=-1)
    assert torch.allclose(own.log_probabilities(theta, Fast({}, {}), sampled)[0], known, atol=1e-5)


def test_discrete_actions_come_as_often_as_the_policy_says():
    own = replace(learner("fixed", 1, trajectories=4000), environment=Chain())
    plain = PolicyGradient(model=own.model, loss=own.loss, environment=Chain(), trajectories=4000, horizon=1)
    theta = plain.layout()
    sampled = plain.sample(theta, Fast({}, {KEY: torch.tensor(5)}), (REWARDS.float()[None],), QUERY)
    chance = theta["weight"][:, 0].softmax(dim=0)
    assert torch.allclose((sampled.actions == 1).float().mean(), chance[1], atol=4 * 0.5 / 4000**0.5)
    assert torch.allclose(plain.log_probabilities(theta, Fast({}, {}), sampled)[0].exp(), chance[sampled.actions[0]])


def test_each_set_of_trajectories_has_noise_of_its_own_and_the_same_when_sampled_again():
    own = navigator()
    theta, fast = own.layout(), Fast({}, {KEY: torch.tensor(7)})

    def actions(number: int) -> Tensor:
        return own.sample(theta, fast, (torch.ones(1, 2),), number).actions

    sets_of = [actions(number) for number in (QUERY, UNADAPTED, FIRST, FIRST + 1)]
    assert torch.equal(sets_of[0], actions(QUERY))
    flat = torch.stack([each.flatten() for each in sets_of])
    assert flat.unique().numel() == flat.numel()


class Scattered(Chain):
    """Shows what chance it begins with."""

    def reset(self, parameters, key, trajectories):
        return torch.zeros(trajectories, dtype=torch.int64), uniform(key, (trajectories, 2))


def test_where_trajectories_begin_has_nothing_to_do_with_the_noise_of_their_actions():
    """All uniform numbers, of the starts and behind the noise of every set, differ from each other."""
    plain = PolicyGradient(
        model=Model(nn.Linear(2, 2, bias=False).double()), loss=mean_squared_error, environment=Scattered(),
        trajectories=5, horizon=3,
    )  # fmt: skip
    key, numbers = torch.tensor(7), (QUERY, UNADAPTED, FIRST, FIRST + 1)
    sets_of = [plain.sample(plain.layout(), Fast({}, {KEY: key}), (REWARDS[None],), number) for number in numbers]
    starts = torch.stack([each.observations[0] for each in sets_of])
    noise = torch.stack([plain.noise(key + number, starts[0]) for number in numbers])
    behind = 1 - (-(-noise).exp()).exp()  # as a Gumbel number is -log(-log(1 - u))
    drawn = torch.cat([starts.flatten(), behind.flatten()])
    assert (drawn.sort().values.diff() > 1e-12).all()


def test_nothing_counts_after_a_trajectory_has_ended():
    own = learner("fixed", 3)
    key = torch.tensor(0b000101 * SETS)  # [H, N]: the first trajectory takes 1, 1, 0, the second 0, 0, 0
    sampled = own.sample(own.layout(), Fast({}, {KEY: key}), (REWARDS.float()[None],), QUERY)
    assert sampled.present.T.tolist() == [[1, 1, 0], [1, 1, 1]]
    assert torch.allclose(sampled.rewards.T, torch.tensor([[-0.5, 2.0, 0.0], [1.0, 1.0, 1.0]]))
    other = sampled._replace(actions=torch.cat([sampled.actions[:2], 1 - sampled.actions[2:]]))
    logs = own.log_probabilities(own.layout(), Fast({}, {}), sampled)
    changed = own.log_probabilities(own.layout(), Fast({}, {}), other)
    assert torch.equal(logs[:2], changed[:2]) and not torch.equal(logs[2, 0], changed[2, 0])
    assert own.advantages(sampled, 1.0)[:, 0].tolist() == pytest.approx([-1.5, 0, -1.0])


def test_options_out_of_range_are_refused():
    for options in ({"trajectories": 1}, {"horizon": 0}, {"discount": 1.5}):
        with pytest.raises(ValueError, match="trajectories=.* horizon=.* discount="):
            navigator(**options)
    with pytest.raises(InputError, match="3 outputs"):
        own = replace(navigator(), model=Model(nn.Linear(2, 3)))
        own.sample(own.layout(), Fast({}, {KEY: torch.tensor(0)}), (torch.ones(1, 2),), QUERY)
