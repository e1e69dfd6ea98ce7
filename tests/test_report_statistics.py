"""Intervals and tests of reports: their level by simulation, and other libraries as oracles."""

import math

import numpy as np
import pytest
import scikit_posthocs
from scipy import stats
from statsmodels.stats.multitest import multipletests
from statsmodels.stats.weightstats import DescrStatsW

from kshot.seeing.statistics import holm
from kshot.studies.statistics import (
    FEWEST_SETS,
    average,
    bootstrap,
    mean_interval,
    paired,
    ranks,
    too_few,
    wilcoxon,
)

RNG = np.random.default_rng(14)


class TestIntervals:
    @pytest.mark.parametrize("seeds", [2, 3, 5])
    def test_they_hold_the_truth_as_often_as_they_say(self, seeds):
        values = np.random.default_rng(seeds).normal(0.7, 0.03, (20_000, seeds))
        mean, half = mean_interval(values)
        held = float((np.abs(mean - 0.7) <= half).mean())
        usual, numpys = (
            float((np.abs(mean - 0.7) <= 1.96 * values.std(-1, ddof=ddof) / math.sqrt(seeds)).mean()) for ddof in (1, 0)
        )
        said = f"{seeds} seeds: t {held:.1%}; 1.96 s/√n {usual:.1%}, and {numpys:.1%} with NumPy's own s"
        print(said)
        assert 0.94 <= held <= 0.96, said
        assert (usual, numpys) == pytest.approx(
            [stats.t.cdf(1.96 * math.sqrt(k), seeds - 1) * 2 - 1 for k in (1, (seeds - 1) / seeds)], abs=0.01
        ), said
        assert seeds != 3 or (0.80 < usual < 0.82 and 0.74 < numpys < 0.76), said

    @pytest.mark.parametrize("level", [0.9, 0.95])
    def test_they_are_students(self, level):
        values = RNG.normal(size=4)
        mean, half = mean_interval(values, level)
        low, high = DescrStatsW(values).tconfint_mean(1 - level)
        assert (mean - half, mean + half) == pytest.approx((low, high))

    def test_one_value_has_none(self):
        mean, half = mean_interval([0.5])
        assert mean == 0.5
        assert math.isnan(half)

    def test_an_average_is_over_seeds_that_all_data_sets_have(self):
        values = {"a": {1: 0.1, 2: 0.3, 3: 0.2}, "b": {3: 0.6, 1: 0.5}}
        found = average(values)
        low, high = DescrStatsW([0.3, 0.4]).tconfint_mean()
        assert (found.mean, found.half, found.seeds) == (pytest.approx(0.35), pytest.approx((high - low) / 2), 2)

    def test_without_a_common_seed_there_is_no_interval(self):
        found = average({"a": {1: 0.1, 3: 0.3}, "b": {2: 0.6}})
        assert found.mean == pytest.approx(0.4)
        assert found.seeds == 0
        assert math.isnan(found.half)


class TestBootstrap:
    def test_of_one_seed_a_set_it_is_scipys(self):
        values = RNG.normal(size=40)
        theirs = stats.bootstrap((values,), np.mean, n_resamples=10_000, method="percentile", rng=RNG)
        low, high = bootstrap([[value] for value in values])
        assert (low, high) == pytest.approx(tuple(theirs.confidence_interval), abs=0.02)

    def test_its_spread_is_that_of_both_stages(self):
        values = [list(RNG.normal(mean, 0.5, 4)) for mean in RNG.normal(size=30)]
        low, high = bootstrap(values, level=0.6827)  # one standard deviation to either side
        means = np.array([np.mean(row) for row in values])
        within = np.mean([np.var(row) / len(row) for row in values])
        assert (high - low) / 2 == pytest.approx(math.sqrt((means.var() + within) / len(values)), rel=0.04)

    def test_data_sets_weigh_the_same_whatever_their_seeds(self):
        low, high = bootstrap([[0.0] * 9, [1.0]])
        assert (low, high) == (0.0, 1.0)
        assert bootstrap([[0.0] * 9, [1.0]], level=0.2) == (0.5, 0.5)

    def test_it_holds_new_data_sets_about_as_often_as_it_says(self):
        rng, held = np.random.default_rng(1), 0
        for _ in range(1000):
            effects = rng.normal(0, 1, (11, 1))
            low, high = bootstrap((effects + rng.normal(0, 0.5, (11, 3))).tolist(), draws=300)
            held += low <= 0 <= high
        print(f"bootstrap over 11 data sets of 3 seeds: {held / 1000:.1%}")
        assert 0.90 <= held / 1000 <= 0.97, held / 1000


class TestWilcoxon:
    def test_it_is_scipys_exact_one(self):
        values = RNG.normal(0.3, 1, 9)
        assert wilcoxon(values) == pytest.approx(stats.wilcoxon(values, method="exact").pvalue)

    def test_ties_are_counted_exactly(self):
        values = np.array([1, 1, -1, 2, 2, 2, 0]) / 3  # every sign of six, counted by hand below
        ranked = stats.rankdata(np.abs(values[:-1]))
        signs = np.array(np.meshgrid(*[[0, 1]] * 6)).reshape(6, -1).T
        sums = signs @ ranked
        mine = ranked[values[:-1] > 0].sum()
        expected = 2 * min((sums >= mine).mean(), (sums <= mine).mean())
        assert wilcoxon(values) == pytest.approx(min(1, expected))

    def test_equal_ones_do_not_differ(self):
        assert wilcoxon([0.0, 0.1 + 0.2 - 0.3]) == 1.0

    @pytest.mark.parametrize("sets", [2, 5, 6, 8])
    def test_it_says_when_it_cannot_tell(self, sets):
        least = wilcoxon(np.arange(1, sets + 1))  # all of one sign: the clearest there is
        assert bool(too_few(sets)) == (least > 0.05)
        corrected = holm([least] * 4)[0]
        assert bool(too_few(sets, 4)) == (corrected > 0.05)
        assert f"{sets} data sets" in (too_few(sets, 4) or f"{sets} data sets")
        assert (sets < FEWEST_SETS) == ("Wilcoxon's test:" in too_few(sets))

    def test_holm_is_that_of_statsmodels(self):
        p = RNG.random(12) ** 3
        assert holm(p.tolist()) == pytest.approx(multipletests(p, method="holm")[1])


class TestRanks:
    def values(self, sets=8, contenders=5):
        rng = np.random.default_rng(sets)
        return rng.normal(0, 1, (sets, contenders)) + np.linspace(0, 2.5, contenders)

    def test_friedman_is_scipys(self):
        values = self.values()
        found = ranks(values)
        assert found.p == pytest.approx(stats.friedmanchisquare(*values.T).pvalue)
        assert found.mean == pytest.approx(stats.rankdata(-values, axis=1).mean(0))

    @pytest.mark.parametrize(("sets", "contenders"), [(12, 5), (11, 12), (20, 3)])
    def test_the_critical_distance_parts_what_scikit_posthocs_parts(self, sets, contenders):
        values = self.values(sets, contenders)
        found, p = ranks(values), scikit_posthocs.posthoc_nemenyi_friedman(values).to_numpy()
        gaps = np.abs(found.mean[:, None] - found.mean)
        assert ((gaps >= found.distance) == (p < 0.05)).all()
        assert (p < 0.05).any()
        assert not (p + np.eye(contenders) < 0.05).all()

    def test_groups_are_those_that_cannot_be_told_apart(self):
        found = ranks(self.values(11, 12))
        for group in found.groups:
            spread = np.ptp(found.mean[group])
            assert spread < found.distance
            outside = [i for i in range(12) if i not in group]
            assert all(np.ptp(found.mean[[*group, i]]) >= found.distance for i in outside), "not the largest"
        close = [(i, j) for i in range(12) for j in range(i) if abs(found.mean[i] - found.mean[j]) < found.distance]
        assert all(any({i, j} <= set(group) for group in found.groups) for i, j in close)

    def test_demsars_example(self):
        # Demšar 2006, section 3.2.4: k = 4 algorithms on N = 14 data sets have CD = 2.569 · √(4 · 5 / (6 · 14)) = 1.25.
        assert ranks(self.values(14, 4)).distance == pytest.approx(1.25, abs=0.005)

    def test_equal_contenders_are_alike(self):
        found = ranks(np.full((5, 3), 0.7))
        assert (found.p, found.mean.tolist(), found.groups) == (1.0, [2, 2, 2], [[0, 1, 2]])


def test_paired_differences_come_together():
    rng = np.random.default_rng(3)
    values = {f"set{i}": {seed: float(rng.normal(0.02, 0.01)) for seed in range(3)} for i in range(7)}
    found = paired(values)
    assert found.mean == pytest.approx(np.mean([list(each.values()) for each in values.values()]))
    low, high = DescrStatsW(np.mean([list(each.values()) for each in values.values()], 0)).tconfint_mean()
    assert found.half == pytest.approx((high - low) / 2)
    assert (found.low, found.high) == bootstrap([list(each.values()) for each in values.values()])
    assert found.p == pytest.approx(stats.wilcoxon([np.mean(list(each.values())) for each in values.values()]).pvalue)
    assert found.told == (abs(found.mean) > found.half)
    few = paired({name: values[name] for name in list(values)[:5]})
    assert math.isnan(few.low)
    assert not paired({"a": {1: 0.5}}).told
