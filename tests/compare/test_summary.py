"""Who leads, what speaks against whom, and whether the claims hold."""

import math
import re

import numpy as np
import pytest
from comparisons import (
    base,
    best_of_n,
    comparison,
    failed,
    full_comparison,
    hacker,
    lora,
    metrics,
    seed_result,
    tea,
)

from tea_rl.compare.claims import against_peer, judge_claims, reward_at_kl
from tea_rl.compare.intervals import interval, paired_difference
from tea_rl.compare.results import CurvePoint, FrontierPoint, KlEstimate
from tea_rl.compare.summary import level_time, summarise
from tea_rl.compare.tables import peers_table
from tea_rl.recipe_compare import Guards

COLOURS = {name: "#000" for name in ("base", "tea", "grpo-lora")}


def kinds(summary, name):
    return {concern.kind for concern in summary.warnings if concern.method == name}


def test_the_hacker_has_most_reward_and_does_not_lead():
    summary = summarise(full_comparison())
    names = [row.name for row in summary.rows]
    hacking = summary.row("rloo-lora")
    assert hacking.reward.mean == max(row.reward.mean for row in summary.rows if row.finished)
    assert summary.best == "tea" and names[:3] == ["tea", "grpo-lora", "dpo-lora"]
    assert hacking.rank == 4 and not hacking.sound
    assert kinds(summary, "rloo-lora") == {"hacking", "diversity", "kl"}
    assert kinds(summary, "tea") == set()
    (text,) = [c.text for c in summary.warnings if (c.method, c.kind) == ("rloo-lora", "hacking")]
    assert "surprise under the base model 3.25 to 4.60" in text and "compressed size" in text


def test_the_base_model_and_best_of_n_are_references_and_failures_come_last():
    rows = summarise(full_comparison()).rows
    unranked = [row.name for row in rows if row.rank is None]
    assert unranked == ["base", "best-of-n", "full-dpo", "kto-lora", "sft-prompt-tuning"]
    assert [row.finished for row in rows[-3:]] == [False] * 3
    assert "ran out of memory: needed more" in rows[-3].warnings[0].text


def test_without_a_sound_method_nobody_is_best():
    assert summarise(comparison(base(), hacker())).best is None
    assert summarise(comparison(base(), *failed())).best is None
    assert summarise(comparison()).rows == []


def test_without_the_base_model_the_page_is_told_so():
    summary = summarise(comparison(hacker()))
    assert kinds(summary, "") == {"base"} and kinds(summary, "rloo-lora") == {"kl"}


def test_forgetting_kl_and_disagreement_are_judged_by_the_guards():
    methods = [base(), tea(1), lora()]
    loose = summarise(comparison(*methods))
    assert kinds(loose, "grpo-lora") == {"forgetting"} and "English 14.2 to 15.9" in loose.warnings[0].text
    guards = Guards(kl_budget=0.3, disagreement_limit=0.2, forgetting_rise=0.5, independent_fall=0.01)
    strict = summarise(comparison(*methods, guards=guards))
    assert kinds(strict, "tea") == {"kl", "disagreement", "hacking"}
    assert "forgetting" not in kinds(strict, "grpo-lora")


def test_a_falling_metric_without_more_reward_is_no_hacking():
    worse = lora(seeds=[seed_result(0.1, metrics=metrics(0.1, surprise=6.0))])
    assert kinds(summarise(comparison(base(), worse)), "grpo-lora") == set()


def points(*values):
    return [CurvePoint(seconds=s, step=0, reward_calls=c, reward=r) for s, c, r in values]


def test_time_to_a_level_is_that_of_the_first_point_at_or_above_it():
    curves = [
        points((0, 0, 0.2), (10, 64, 0.5), (20, 128, 0.4), (30, 192, 0.9)),
        points((0, 0, 0.2), (50, 640, 0.6)),
    ]
    seeds = [seed_result(0.5, curve=curve) for curve in curves]
    one, both, high = level_time(seeds[:1], 0.5), level_time(seeds, 0.5), level_time(seeds, 0.9)
    assert (one.seconds, one.reward_calls, one.reached, one.seeds) == (10, 64, 1, 1)
    assert (both.seconds, both.reward_calls) == (50, 640)
    assert math.isinf(high.seconds) and (high.reached, high.seeds) == (1, 2)
    assert math.isnan(level_time([seed_result(0.5)], 0.5).seconds)


def test_claims_say_yes_no_or_that_they_cannot_tell():
    results = full_comparison()
    texts = {claim.text: claim for claim in judge_claims(results, summarise(results))}
    sooner = texts["reward 0.8 at least 8 times sooner than best grpo-lora"]
    found = against_peer(summarise(results).row("tea"), summarise(results).row("grpo-lora"), 0.8)
    assert sooner.holds is (found.sooner >= 8) and f"{found.sooner:.1f}" in sooner.answer
    assert texts["peak memory at most 20% of grpo-lora"].holds is True
    assert texts["fewer trainable parameters than grpo-lora"].answer == "yes, 42% of its number"
    assert texts["at equal KL a reward no lower than grpo-lora"].holds is True

    slow = comparison(base(), tea(1), lora(level=100.0))
    answer = judge_claims(slow, summarise(slow))[0]
    assert answer.holds is False and answer.answer.startswith("no, ")

    never = comparison(base(), tea(1), lora(reward=0.3))
    answer = judge_claims(never, summarise(never))[0]
    found = against_peer(summarise(never).row("tea"), summarise(never).row("grpo-lora"), 0.8)
    bound = f"at least {found.sooner:.1f} times (not reached within 620 s)"
    assert answer.answer == f"yes, {bound}" and found.sooner >= 8
    (row,) = re.findall(r'<table id="peers">.*?</table>', peers_table(never, summarise(never), COLOURS))
    assert f"at least {found.sooner:.1f}&times; <small>not reached within 620 s</small>" in row
    for seed in never.methods[2].seeds:
        seed.train_seconds = 100.0
    answer = judge_claims(never, summarise(never))[0]
    assert answer.holds is None and answer.answer.startswith("cannot be told, at least ")

    unasked = comparison(base(), tea(1), lora(), levels=[])
    assert judge_claims(unasked, summarise(unasked))[0].text.startswith("reward 0.8")
    assert judge_claims(unasked, summarise(unasked))[0].holds is not None

    missing = comparison(base(), tea(1), lora(seeds=[], status="failed", reason="x"))
    assert {claim.holds for claim in judge_claims(missing, summarise(missing))} == {None}
    assert judge_claims(comparison(base(), tea(1)), summarise(comparison(base(), tea(1)))) == []


def test_reward_at_a_kl_is_read_off_the_frontier():
    frontier = [
        FrontierPoint(strength=a, reward=r, kl=k) for a, r, k in ((0, 0.2, 0), (1, 0.8, 0.5), (1.5, 0.7, 1.0))
    ]
    assert reward_at_kl(frontier, 0.25) == pytest.approx(0.5)
    assert reward_at_kl(frontier, 0.75) == pytest.approx(0.75)
    assert reward_at_kl(frontier, 9) == pytest.approx(0.7)
    assert math.isnan(reward_at_kl([], 0.5)) and math.isnan(reward_at_kl(frontier, math.nan))


def equal_kl(*methods):
    results = comparison(base(), *methods)
    return judge_claims(results, summarise(results))[3]


def test_reward_at_equal_kl_is_read_between_two_strengths_or_it_says_why_not():
    """One seed alone was swept, and the peer's KL of 0.62 lies between 0.5 (strength 1) and 0.78125 (1.25)."""
    ours = tea()
    for seed in ours.seeds[1:]:
        seed.frontier = []
    line = {point.strength: point for point in ours.seeds[0].frontier}
    low, high = line[1.0], line[1.25]
    expected = low.reward + (0.62 - low.kl) / (high.kl - low.kl) * (high.reward - low.reward)
    peer = lora()
    difference = expected - np.mean(peer.seeds[0].metrics.reward_sampled)
    claim = equal_kl(ours, peer)
    assert claim.holds is bool(difference >= 0)
    assert claim.answer.endswith(f", {difference:+.2f} at KL 0.62, between strength 1 and 1.25")

    ours.seeds[0].frontier = [low]
    assert equal_kl(ours, peer).answer.endswith("beyond our frontier: its last point has KL 0.5 (strength 1)")
    ours.seeds[0].frontier = [high]
    assert equal_kl(ours, peer).answer == (
        "cannot be told, KL 0.62 of grpo-lora is below the smallest of our frontier, 0.78"
    )
    ours.seeds[0].frontier = []
    claim = equal_kl(ours, peer)
    assert (
        claim.holds is None and claim.answer == "cannot be told, the strengths of our head were not measured"
    )
    ours.seeds[0].frontier = [low, high]
    peer.seeds[0].metrics.kl = None
    assert equal_kl(ours, peer).answer == "cannot be told, the KL of grpo-lora was not measured"


def test_intervals_cover_the_truth_as_often_as_they_say():
    rng = np.random.default_rng(1)
    covered = [
        found.low <= 2.0 <= found.high
        for found in (interval([rng.normal(2.0, 1.0, 60).tolist()]) for _ in range(200))
    ]
    assert 0.88 <= np.mean(covered) <= 0.99


def test_seeds_that_differ_widen_the_interval():
    rng = np.random.default_rng(2)
    prompts = rng.normal(0, 0.1, 40)
    alike = interval([(prompts + s).tolist() for s in (0.0, 0.0, 0.0)])
    apart = interval([(prompts + s).tolist() for s in (-0.3, 0.0, 0.3)])
    assert apart.high - apart.low > 2 * (alike.high - alike.low)
    assert all(
        math.isnan(value) for value in (*interval([]), *interval([[]]), *paired_difference([], [[1.0]]))
    )


def test_a_paired_difference_forgives_hard_prompts():
    rng = np.random.default_rng(3)
    hard = rng.normal(0, 1, 50)
    first, second = [(hard + 0.2 + rng.normal(0, 0.05, 50)).tolist()], [hard.tolist()]
    paired, single = paired_difference(first, second), interval(first)
    assert 0.15 < paired.low < paired.mean < paired.high < 0.25
    assert paired.high - paired.low < 0.2 * (single.high - single.low)


def test_best_of_n_is_not_judged():
    greedy = best_of_n()
    greedy.seeds[0].metrics.kl = KlEstimate(value=9.0, kind="bound")
    assert summarise(comparison(base(), greedy)).warnings == []
