from __future__ import annotations

import numpy as np
import pytest
from populations import in_sorts, realistic

from timm_cascade.thresholds import Samples, ThresholdError, joint, outcome
from timm_cascade.thresholds.rule_joint import joint_choice, within_budget


def drawn(population, n, seed, stage):
    i = np.random.default_rng(seed).integers(0, len(population[0]), n)
    return Samples(population[0][i], population[1][i], stage)


def test_exits_that_do_not_pay_are_closed():
    c, r = realistic(400, 2)
    stage = np.array([1.0, 5.0, 1.0])  # the second head costs more than going on
    t = joint(Samples(c, r, stage, [0.1, 4.9]), 1.0)
    assert t[0] == c[:, 0].min() and np.isinf(t[1])
    c[:, 0] = np.nan
    assert np.isinf(joint(Samples(c, r, stage, [0.1, 4.9]), 1.0)).all()


def test_float32_confidences_come_back_exactly():
    c, r = realistic(20_000, 3)
    t = joint(Samples(c, r), 0.01)
    for m in range(3):
        assert np.isinf(t[m]) or (np.float32(t[m]) in c[:, m] and np.float32(t[m]) == t[m])


@pytest.mark.parametrize('max_drop', [0.0, 0.01, 1.0])
@pytest.mark.parametrize('n', [1, 2, 3, 10])
@pytest.mark.parametrize('fill', ['ties', 'nan', 'right', 'wrong'])
def test_borders(n, max_drop, fill):
    c, r = np.random.default_rng(n).random((n, 2)), np.random.default_rng(n).random((n, 2)) < 0.5
    if fill == 'ties':
        c[:] = 0.5
    elif fill == 'nan':
        c[:] = np.nan
    else:
        r[:] = fill == 'right'
    samples = Samples(c, r)
    choice = joint_choice(samples, max_drop)
    assert choice.thresholds.shape == (1,) and 0 <= choice.measured.accuracy <= 1
    if fill in ('right', 'wrong') and n == 10 and max_drop == 1:
        assert choice.thresholds[0] == c[:, 0].min()  # nothing to lose
    assert within_budget(samples, 2.0).measured.n == n


def test_a_budget_out_of_reach_is_refused():
    c, r = realistic(200, 2)
    samples = Samples(c, r)
    with pytest.raises(ThresholdError, match='cheapest thresholds cost 1 '):
        within_budget(samples, 0.99)
    with pytest.raises(ThresholdError, match='above 0'):
        within_budget(samples, np.nan)
    assert outcome(samples, within_budget(samples, 1.0).thresholds).cost == 1


def test_a_larger_budget_never_costs_accuracy():
    """Exits that are better than the network: spending more must not run past the accurate thresholds."""
    samples = drawn(realistic(20_000, 3, first=0.85, last=0.8), 2000, 0, np.ones(4))
    choices = [within_budget(samples, budget) for budget in np.linspace(1.2, 4, 15)]
    accuracy = [choice.measured.accuracy for choice in choices]
    assert accuracy == sorted(accuracy)
    assert choices[-1].measured.cost < 3.9 and choices[-1].measured.drop < 0


def test_the_cost_dial_keeps_the_budget_and_says_what_it_delivers():
    population = realistic(60_000, 4, seed=1)
    everyone, errors = Samples(*population), []
    for seed in range(20):
        choice = within_budget(drawn(population, 2000, seed, np.ones(5)), 3.0)
        assert choice.measured.cost <= 3
        truth = outcome(everyone, choice.thresholds)
        assert truth.cost < 3.1
        errors.append(choice.measured.drop - truth.drop)
    assert abs(np.mean(errors)) < 0.002


@pytest.mark.slow
@pytest.mark.parametrize(
    ('exits', 'first', 'last', 'n'), [(3, 0.8, 0.93, 1500), (5, 0.66, 0.72, 3000), (4, 0.9, 0.93, 4000)]
)
def test_the_dial_is_on_target_on_unseen_data(exits, first, last, n):
    population = realistic(60_000, exits, seed=exits, first=first, last=last)
    everyone, draws = Samples(*population), 40
    for max_drop in (0.005, 0.01, 0.02):
        lost, estimated = [], []
        for seed in range(draws):
            choice = joint_choice(drawn(population, n, seed, np.ones(exits + 1)), max_drop)
            lost.append(outcome(everyone, choice.thresholds).drop / max_drop)
            estimated.append(choice.measured.drop / max_drop)
        error = np.std(lost) / np.sqrt(draws)
        assert np.mean(lost) <= 1 + 2 * error and np.mean(lost) >= 0.5 - 2 * error
        assert abs(np.mean(lost) - np.mean(estimated)) < 0.35


@pytest.mark.slow  # a verdict about time
def test_it_is_quick():
    c, r = realistic(50_000, 8)
    samples = Samples(c, r, np.ones(9), np.full(8, 0.05))
    assert in_sorts(lambda: joint(samples, 0.01), len(c)) < 20  # about 4
