"""The reverse process: LLaDA's tokens, exact distributions of outcomes on a toy, correction, invariants, batches."""

import functools
import itertools
import math
from collections import Counter

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from toy import MASK, T, TrueConditionals, V, all_strings, assert_frequencies, seeded

import sampler
from config import ORDERS, SCHEDULES, SWEEP_STEPS, SamplingConfig
from likelihood import policy_likelihood
from logits import draw
from sampler import CORRECTION_STEPS, has_exact_likelihood, make_plan, policy_of, reverse_process
from tokenizer import MASK_ID, NEVER_WRITTEN
from utils.errors import ArgumentError

TOY = TrueConditionals()


class Mixing:
    """A made-up predictor over 12 tokens in which every position depends on every other; counts its calls.

    kind: "ties", coarsely rounded; "one", -inf for all tokens but 4.
    """

    def __init__(self, seed: int, kind: str = "", never=()):
        g = seeded(seed)
        self.values = torch.randn(12, 64, 12, generator=g, dtype=torch.float64)
        self.weights = torch.randn(64, 64, generator=g, dtype=torch.float64)
        self.kind, self.never, self.calls, self.rows = kind, list(never), 0, 0

    def __call__(self, tokens):
        self.calls, self.rows = self.calls + 1, self.rows + len(tokens)
        n = tokens.shape[1]
        logits = torch.einsum("ij,bjv->biv", self.weights[:n, :n], self.values[tokens, torch.arange(n)])
        if self.kind == "ties":
            logits = (logits / 8).round()
        if self.kind == "one":
            logits = logits.masked_fill(torch.arange(12) != 4, -torch.inf)
        return logits.index_fill(-1, torch.tensor(self.never, dtype=torch.long), -40.0)


def last(steps):
    *_, step = steps
    return step


def project_process(predict, tokens, **settings):
    """`reverse_process` with this project's vocabulary: [PAD] 0, [MASK] 1, [START] 2 are never written."""
    return reverse_process(predict, tokens, MASK_ID, never=NEVER_WRITTEN, **({"correct": 0} | settings))


def toy_ends(**settings) -> torch.Tensor:
    """(2000, T): texts of the toy, drawn from the network's own probabilities."""
    settings = {"temperature": 1.0, "correct": 0} | settings
    return last(reverse_process(TOY, torch.full((2000, T), MASK), MASK, **settings)).tokens


def template(length=21, seed=0):
    """Tokens 3..11 with [MASK]s among them, at the beginning and at the end too."""
    g = seeded(seed)
    tokens = torch.randint(3, 12, (length,), generator=g)
    hidden = torch.rand(length, generator=g) < 0.7
    hidden[[0, -1]] = True
    return tokens.masked_fill(hidden, MASK_ID)


# ------------------------------------------------------------------------------------------------- one token
@pytest.mark.parametrize("p", [(0, 0.5, 0, 0.25, 0.25, 0), (0, 0, 1, 0), (1e-300, 0, 0.1, 0.2, 0.3, 0.4, 0, 0)])
def test_a_draw_inverts_the_distribution_function_and_never_meets_probability_zero(p):
    grid = torch.arange(1000, dtype=torch.float64) / 1000
    u = torch.cat([grid, torch.tensor([1 - 2**-53, 5e-324], dtype=torch.float64)])  # the outermost a generator gives
    weights = torch.tensor(p, dtype=torch.float64)
    tokens = draw(weights.expand(len(u), -1), u)
    assert (weights[tokens] > 0).all()
    shares = tokens[: len(grid)].bincount(minlength=len(p)) / len(grid)
    assert torch.allclose(shares.double(), weights, atol=2e-3)


# ------------------------------------------------------------------------------------------------- LLaDA's sampler
def llada_tokens(predict, prompt, mask, steps, gen_length, block_length, cfg_scale):
    """Low-confidence remasking as arXiv 2502.09992 and its published sampler describe it, for one row.

    Of equal confidences the left one comes first, where torch.topk leaves it to the device.
    """
    start, steps = len(prompt), steps // (gen_length // block_length)
    x = torch.cat([prompt, torch.full((gen_length,), mask)])
    for begin in range(start, len(x), block_length):
        end = begin + block_length
        hidden = int((x[begin:end] == mask).sum())
        for k in range(steps):
            logits = predict(x[None])[0]
            if cfg_scale:
                alone = x.clone()
                alone[:start] = mask
                without = predict(alone[None])[0]
                logits = without + (cfg_scale + 1) * (logits - without)
            confidence, best = logits.double().softmax(-1).max(-1)
            confidence[(x != mask) | (torch.arange(len(x)) >= end)] = -torch.inf
            chosen = confidence.argsort(descending=True, stable=True)[: hidden // steps + (k < hidden % steps)]
            x[chosen] = best[chosen]
    return x


@pytest.mark.parametrize("mask", [1, 11])
@pytest.mark.parametrize("cfg_scale", [0.0, 1.5])
@pytest.mark.parametrize("kind", ["", "ties"])
def test_temperature_0_gives_the_tokens_of_lladas_published_sampler(mask, cfg_scale, kind):
    g = seeded()
    for seed in range(12):
        predict = Mixing(seed, kind, never=[0, 1, 2] if mask == 1 else [11])
        block, blocks, prompt_length, per_block = (int(torch.randint(1, 7, (1,), generator=g)) for _ in range(4))
        prompt = torch.randint(3, 11, (prompt_length,), generator=g)
        expected = llada_tokens(predict, prompt, mask, per_block * blocks, block * blocks, block, cfg_scale)
        tokens = torch.cat([prompt, torch.full((block * blocks,), mask)])[None]
        flags = {"temperature": 0.0, "steps": per_block * blocks, "block_length": block, "cfg_scale": cfg_scale}
        never = NEVER_WRITTEN if mask == MASK_ID else ()
        for order in ("drawn_confidence", "confidence"):  # the same at temperature 0
            steps = reverse_process(predict, tokens, mask, never=never, order=order, correct=0, **flags)
            assert last(steps).tokens[0].tolist() == expected.tolist()


# ------------------------------------------------------------------------------------------------- outcomes by hand
@functools.cache
def conditionals(row) -> list[list[float]]:
    """(T, V) probabilities of the toy, given what is visible in row."""
    return TOY(torch.tensor([row]))[0].exp().tolist()


def masked_in(row):
    return [i for i in range(T) if row[i] == MASK]


def subsets(row, n):
    return list(itertools.combinations(masked_in(row), n))


def sure(row, drawn=None, among=range(T)):
    """p at each masked position: of the drawn token, or of the likeliest."""
    p = conditionals(row)
    return {i: p[i][drawn[i]] if drawn else max(p[i]) for i in masked_in(row) if i in among}


def best(p, n=1):
    """The n surest positions of {position: p}."""
    return [sorted(p, key=lambda i: -p[i])[:n]]


def or_above(p, first):
    """The first position, and all others that reach 0.5."""
    return [[first[0], *(i for i in p if i != first[0] and p[i] >= 0.5)]]


RULES = [  # settings, and row, step, drawn tokens -> equally likely lists of positions to reveal
    ({"order": "random"}, lambda row, k, _: subsets(row, 1)),
    ({"order": "random", "steps": 2}, lambda row, k, _: subsets(row, 2)),
    ({"order": "random", "block_length": 2, "steps": 2}, lambda row, k, _: [[[0, 1], [2, 3]][k]]),
    ({"order": "left"}, lambda row, k, _: [[k]]),
    ({"order": "left", "steps": 3}, lambda row, k, _: [masked_in(row)[: [2, 1, 1][k]]]),
    ({"order": "left", "threshold": 0.5}, lambda row, k, _: or_above(sure(row), masked_in(row))),
    ({"order": "sweep", "steps": 2}, lambda row, k, _: [[k, k + 2]]),
    ({"order": "sweep", "steps": 3}, lambda row, k, _: [[[0, 3], [1], [2]][k]]),
    ({"order": "sweep", "threshold": 0.5}, lambda row, k, _: or_above(sure(row), masked_in(row))),
    ({"order": "confidence"}, lambda row, k, _: best(sure(row))),
    ({"order": "confidence", "steps": 2}, lambda row, k, _: best(sure(row), 2)),
    ({"order": "confidence", "schedule": [1, 3]}, lambda row, k, _: best(sure(row), [1, 3][k])),
    ({"order": "confidence", "block_length": 2}, lambda row, k, _: best(sure(row, among=[[0, 1], [2, 3]][k // 2]))),
    ({"order": "confidence", "threshold": 0.5}, lambda row, k, _: or_above(sure(row), *best(sure(row)))),
    ({"order": "drawn_confidence", "steps": 2}, lambda row, k, x: best(sure(row, x), 2)),
    ({"order": "drawn_confidence", "schedule": [1, 3]}, lambda row, k, x: best(sure(row, x), [1, 3][k])),
    ({"order": "drawn_confidence", "threshold": 0.5}, lambda row, k, x: or_above(sure(row, x), *best(sure(row, x)))),
]


def outcomes_by_hand(rule) -> torch.Tensor:
    """(V^T,) probabilities of texts: at each step tokens are drawn at all masked positions, each from its own
    conditional, and those at the positions of the rule stay."""
    states = {(MASK,) * T: 1.0}
    for k in range(T):
        following = Counter()
        for row, q in states.items():
            p, masked = conditionals(row), masked_in(row)
            for tokens in itertools.product(range(V), repeat=len(masked)):
                drawn = dict(zip(masked, tokens, strict=True))
                choices = rule(row, k, drawn) if masked else [[]]
                chance = q * math.prod(p[i][token] for i, token in drawn.items()) / len(choices)
                for positions in choices:
                    following[tuple(drawn[i] if i in positions else token for i, token in enumerate(row))] += chance
        states = following
    return torch.tensor([states[tuple(row)] for row in all_strings().tolist()], dtype=torch.float64)


@pytest.mark.parametrize(("flags", "rule"), RULES)
def test_each_strategy_has_the_distribution_of_outcomes_and_the_likelihood_its_rule_says(flags, rule):
    config, expected = SamplingConfig(temperature=1.0, correct=0, **flags), outcomes_by_hand(rule)
    assert_frequencies(toy_ends(**flags), expected)
    assert has_exact_likelihood(config) == (config.order in sampler.EXACT_ORDERS)
    if has_exact_likelihood(config):
        likelihood, _ = policy_likelihood(TOY, all_strings(), policy_of(config), MASK)
        assert not likelihood.is_bound
        torch.testing.assert_close((-likelihood.window_nats).exp(), expected)
    else:
        with pytest.raises(ValueError, match="no exact likelihood"):
            policy_of(config)
    if flags == {"order": "random"}:  # one at a time, from true conditionals: the joint distribution
        torch.testing.assert_close(expected, TOY.p)


# ------------------------------------------------------------------------------------------------- likelihoods
def test_what_changes_the_distribution_of_draws_claims_no_exact_likelihood():
    changes = {"temperature": 0.5, "top_k": 2, "top_p": 0.9, "repetition_penalty": 1.1, "cfg_scale": 1.0, "correct": 1}
    for name, value in changes.items():
        assert not has_exact_likelihood(SamplingConfig(**{"temperature": 1.0, "correct": 0, name: value}))


@pytest.mark.parametrize("steps", [1, 2, 4])
def test_the_random_order_has_an_upper_bound(steps):
    """Over many drawn orders, the mean of -log p given the order is above -log of the sampler's distribution."""
    policy = policy_of(SamplingConfig(order="random", steps=steps), seeded())
    exact = -outcomes_by_hand(lambda row, k, _: subsets(row, T // steps)).log()
    repeats = [policy_likelihood(TOY, all_strings(), policy, MASK, is_bound=True) for _ in range(60)]
    assert all(likelihood.is_bound and (nfe == steps).all() for likelihood, nfe in repeats)
    mean = float(torch.stack([likelihood.window_nats for likelihood, _ in repeats]).mean())
    if steps == 2:
        assert mean > float(exact.mean()) + 0.01
    else:  # a single order: nothing to average over; true conditionals: each order gives the exact joint probability
        assert mean == pytest.approx(float(exact.mean()))


# ------------------------------------------------------------------------------------------------- correction
def test_a_pass_keeps_the_joint_distribution_exactly_and_moves_others_towards_it(monkeypatch):
    """Every text is a row, and every draw gives the row's own token again: so each step shows what it draws from."""
    texts = all_strings()
    with monkeypatch.context() as patch:
        patch.setattr(sampler, "draw_tokens", lambda logits, where, *_: texts[where])
        steps = list(reverse_process(TOY, torch.full_like(texts, MASK), MASK, steps=2, correct=1))[2:]
    assert len(steps) == T
    after = apart = outcomes_by_hand(lambda row, k, _: [masked_in(row)])  # positions that were drawn apart
    for step in steps:
        assert torch.equal(step.tokens, texts)
        same = (texts[:, None] == texts) | step.masked[:, None]  # nothing else changes
        one = step.masked.nonzero()[:, 1]  # (V^T,): each step redraws a single position
        transition = same.all(2) * step.probabilities.gather(1, texts.T[one])  # (V^T, V^T)
        torch.testing.assert_close(transition.sum(1), torch.ones(V**T, dtype=torch.float64), rtol=0, atol=1e-12)
        torch.testing.assert_close(TOY.p @ transition, TOY.p, rtol=0, atol=1e-12)
        after = after @ transition
    assert (after - TOY.p).abs().sum() < 0.8 * (apart - TOY.p).abs().sum()
    assert_frequencies(toy_ends(steps=1, correct=1, correct_temperature=1.0), after)
    assert_frequencies(toy_ends(order="random", correct=2, correct_temperature=1.0), TOY.p)


def test_a_pass_draws_every_written_position_once_with_positions_far_apart_and_given_ones_never():
    tokens = torch.stack([template(seed=0), template(seed=1)])
    steps = list(project_process(Mixing(0), tokens, steps=4, correct=2))
    plain, again = steps[3], steps[4:]
    assert torch.equal(plain.tokens, last(project_process(Mixing(0), tokens, steps=4)).tokens)
    assert len(again) == 2 * CORRECTION_STEPS
    for one_pass in (again[:CORRECTION_STEPS], again[CORRECTION_STEPS:]):
        assert torch.equal(sum(step.revealed.long() for step in one_pass), (tokens == MASK_ID).long())
        assert all((row.nonzero()[:, 0].diff() >= CORRECTION_STEPS).all() for step in one_pass for row in step.masked)
    assert (again[-1].tokens != plain.tokens).any()


# ------------------------------------------------------------------------------------------------- invariants
def test_a_foreign_vocabulary_keeps_its_ids():
    """Only the mask and the ids in `never` are excluded, whatever the mask's id is."""
    predict, tokens = lambda tokens: torch.zeros(*tokens.shape, 5), torch.full((1, 200), 1)
    for order in ORDERS:
        for never in ((), (0,), NEVER_WRITTEN):
            steps = reverse_process(predict, tokens, 1, never=never, order=order, steps=4, correct=1)
            assert set(last(steps).tokens.flatten().tolist()) == {0, 1, 2, 3, 4} - {1, *never}


SAMPLINGS = st.fixed_dictionaries({
    "order": st.sampled_from(sorted(ORDERS)),
    "steps": st.none() | st.integers(1, 40),
    "temperature": st.sampled_from([0.0, 0.3, 1.0, 5.0]),
    "top_k": st.none() | st.integers(1, 12),
    "top_p": st.none() | st.floats(0.01, 1.0),
    "repetition_penalty": st.sampled_from([0.5, 1.0, 2.0]),
    "correct": st.integers(0, 2),
    "threshold": st.none() | st.floats(0, 1),
    "cfg_scale": st.sampled_from([0.0, 1.5]),
    "block_length": st.none() | st.integers(1, 9),
    "schedule": st.sampled_from(SCHEDULES),
})  # fmt: skip


@settings(max_examples=120, deadline=None)
@given(st.integers(1, 3), st.integers(1, 21), SAMPLINGS, st.sampled_from(["", "ties", "one"]), st.integers(0, 10**6))
def test_every_state_keeps_the_rules_and_no_row_depends_on_its_batch(B, T, values, kind, seed):
    config = SamplingConfig(**values | ({"schedule": "uniform"} if values["order"] == "sweep" else {}))
    tokens = before = torch.stack([template(T, seed + b) for b in range(B)])
    tokens[2:] = 7  # nothing to write
    known, predict = tokens != MASK_ID, Mixing(seed, kind)
    process = project_process(predict, tokens, config=config, generator=seeded(seed))
    try:
        steps = [(step, predict.calls) for step in process]
    except ArgumentError as error:  # fewer steps than blocks
        if error.argument != "steps":
            raise
        return
    for step, calls in steps:
        assert torch.equal(step.tokens[~step.revealed], before[~step.revealed])
        assert step.revealed.any()
        if (before == MASK_ID).any():
            assert torch.equal(step.masked, before == MASK_ID)
            assert not (step.revealed & ~step.masked).any()
            assert torch.equal(step.tokens == MASK_ID, step.masked & ~step.revealed)
            assert config.steps is None or calls <= config.steps
        else:  # correction
            assert torch.equal(step.revealed, step.masked)
            assert not (step.revealed & known).any()
        assert step.probabilities.shape == (int(step.masked.sum()), 12)
        if kind in ("", "ties") and config.cfg_scale == 0 and config.repetition_penalty == 1:
            logits = predict(before.masked_fill(step.masked, MASK_ID))[step.masked]
            expected = logits.index_fill(1, torch.tensor(NEVER_WRITTEN), -torch.inf).softmax(-1)
            torch.testing.assert_close(step.probabilities, expected)
        assert step.nfe == calls * (1 if config.cfg_scale == 0 else 2)  # a guided call reads every row twice
        before = step.tokens
    for b in range(B):
        alone = last(project_process(predict, tokens[b : b + 1], config=config, generator=seeded(seed)))
        assert torch.equal(alone.tokens[0], before[b]) or (tokens[:b] == tokens[b]).all(1).any()  # a copy: another text
    assert (before >= 3).all()  # neither [PAD] nor [MASK] nor [START], which the predictor likes as well as any other


def test_equal_rows_are_different_samples():
    for order in ORDERS:
        one, other = last(project_process(Mixing(0), torch.full((2, 21), 1), order=order, temperature=2.0)).tokens
        assert (one != other).any()


def test_what_is_finished_costs_nothing():
    predict = Mixing(0)
    (step,) = project_process(predict, torch.tensor([[4, 5, 6]]), steps=4, correct=2)
    assert step.tokens.tolist() == [[4, 5, 6]]
    assert step.nfe == predict.calls == 0
    tokens = torch.tensor([[1, 1, 1, 1, 1, 1], [5, 5, 5, 5, 5, 1]])
    assert last(project_process(predict, tokens)).nfe == 6
    assert (predict.calls, predict.rows) == (6, 7)
    last(project_process(predict, tokens, correct=1))
    assert (predict.calls, predict.rows) == (18, 21)  # 6 + 6 more, of which the short row takes part in one


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_schedules_reveal_everything_and_beyond_two_steps_a_position_one_at_a_time(schedule):
    """So more steps than that are not planned: they would change nothing."""
    for size in range(1, 40):
        for steps in range(1, 4 * size):
            counts = sampler.SCHEDULES[schedule](size, steps)
            assert (len(counts), sum(counts), min(counts) >= 0) == (steps, size, True)
            assert steps < 2 * size or max(counts) == 1
    plan = make_plan(torch.ones(1, 21, dtype=torch.bool), SamplingConfig(order="left", steps=10**6, schedule=schedule))
    assert plan.remaining.shape[1] <= 43


def test_every_block_gets_its_default_steps():
    predict, tokens = Mixing(0), torch.full((1, 48), 1)
    assert last(project_process(predict, tokens, block_length=16)).nfe == 48  # 16 a block
    assert last(project_process(predict, tokens)).nfe == SWEEP_STEPS
    assert last(project_process(predict, tokens[:, :10])).nfe == 10  # no more than positions
    assert last(project_process(predict, tokens, order="confidence")).nfe == 48


def test_reaching_the_threshold_is_enough():
    for threshold, count in ((0.5, 6), (0.5 + 1e-15, 1)):
        settings = {"order": "confidence", "threshold": threshold}
        step = next(reverse_process(lambda tokens: torch.zeros(1, 6, 2), torch.full((1, 6), 5), 5, **settings))
        assert int(step.revealed.sum()) == count


# ------------------------------------------------------------------------------------------------- what is refused
@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"block_length": 2, "steps": 2}, "steps must be at least 3, one for each block, got 2"),
        ({"order": "left", "schedule": [3, 3]}, "reveals 6 positions, but 5 are masked"),
        ({"order": "left", "schedule": [2, 3], "steps": 2}, "steps does not go with a list of counts"),
        ({"schedule": "square"}, "schedule must be uniform, cosine"),
        ({"temperature": math.nan}, "temperature must be"),
    ],
    ids=str,
)
def test_what_does_not_go_together_is_refused_before_the_network_is_asked(flags, message):
    predict = Mixing(0)
    with pytest.raises(ValueError, match=message):
        next(project_process(predict, torch.full((1, 5), 1), **flags))
    assert predict.calls == 0
