"""
Laws of the samplers: what they have in common, what each one promises, what an order means.
P-numbers are those of test_diffusion.
"""
import dataclasses
import inspect
import io
import itertools
import math
import random
import re
import runpy
import sys

import pytest
import torch
from torch.nn import functional as F

import sample
import model as models
from model import ACCEPTS, ORDERS, QUOTAS, SAMPLERS, SCHEDULES, UserError
from model import entropy, leading, ranks, reverse_steps, spread
from prepare import PrepareError, Tokenizer, vocabulary
from test_diffusion import against_uncached, build, tiny

KINDS = [
    ('mdlm', {}),
    ('bd3lm', dict(diffusion_block_size=4)),
    ('bd3lm', dict(diffusion_block_size=3, begin_id=6)),
    ('denoise', {}),
    ('mdlm', dict(attention='hierarchical', segments='2,2,4')),
]

def label(options):
    """ the values of some options, as the id of a test """
    return '-'.join(map(str, options.values()))
every_kind = pytest.mark.parametrize('kind', KINDS, ids=lambda kind: label({'objective': kind[0], **kind[1]}))

def ways(sampler):
    """ every choice of options that a sampler has a use for: its orders, and its steps """
    orders = [dict(order=order) for order in ('random', *ORDERS)] if 'order' in SAMPLERS[sampler] else [{}]
    steps = [dict(steps=3), dict(steps=5, schedule='cosine'), dict(steps=4, remask=0.5)]
    more = orders + steps if 'steps' in SAMPLERS[sampler] else orders
    return [dict(sampler=sampler, **options) for options in more]
EVERY_WAY = [way for sampler in SAMPLERS for way in ways(sampler)]
IN_ORDER = [way for way in EVERY_WAY if way.get('order', 'random') != 'random']
every_way = pytest.mark.parametrize('way', EVERY_WAY, ids=label)

def write(model, prompt, n, seed=0, **options):
    """ -> (what was written, [(idx, probs, state) of every call]) """
    calls = []
    def on_step(step, idx, probs, state):
        calls.append((idx.clone(), probs, state))
    torch.manual_seed(seed)
    out = model.generate(prompt, n, on_step=on_step, **options)
    return out, calls

def revealed(calls):
    """ tokens per call, over all rows """
    return [len(probs) for _, probs, _ in calls]

def same(a, b):
    """ whether two results of write are equal, token for token and call for call """
    (out, calls), (other_out, other_calls) = a, b
    if not torch.equal(out, other_out) or len(calls) != len(other_calls):
        return False
    return all(torch.equal(x[0], y[0]) for x, y in zip(calls, other_calls))

def empty(rows=1):
    return torch.zeros(rows, 0, dtype=torch.long)

# ---- what all have in common

@every_kind
@every_way
@torch.no_grad()
def test_given_text_stays_and_nothing_is_left_hidden(kind, way):
    """ P13: gaps of different lengths on both sides of given text, and a model that is eager to write [MASK] """
    way = dict(way, steps=way['steps'] + 2) if 'steps' in way else way # at least one per block
    model = build(kind[0], **kind[1])
    torch.nn.init.constant_(model.lm_head.weight[7], 5.0)
    torch.manual_seed(1)
    prompt = torch.randint(5, (40, 8))
    prompt[:, 2:] = prompt[:, 2:].masked_fill(torch.rand(40, 6) < 0.6, -1)
    out, calls = write(model, prompt, 0, **way)
    given = prompt != -1
    assert out.min() >= 0 and out.max() < 5
    assert torch.equal(out[given], prompt[given])
    for idx, probs, state in calls:
        done = state['done']
        assert torch.equal(idx[given], prompt[given])
        assert idx.max() < 5
        assert torch.equal(idx[:, :done], out[:, :done]) # settled for good
    assert calls[-1][2]['done'] == 8
    if 'remask' not in way: # P13: what is written stays
        for (before, *_), (after, *_) in zip(calls, calls[1:]):
            assert torch.equal(after[before != -1], before[before != -1])

@pytest.mark.parametrize('way', IN_ORDER, ids=label)
@pytest.mark.parametrize('guidance', [0.0, 1.5])
@torch.no_grad()
def test_batch_is_row_by_row(way, guidance):
    """ P21: an order and temperature 0 leave nothing to chance; prompts and gaps of different lengths """
    for kind, more in ('mdlm', {}), ('bd3lm', dict(diffusion_block_size=4, begin_id=6)):
        model = build(kind, **more)
        torch.manual_seed(2)
        prompt = torch.randint(5, (6, 8)).masked_fill(F.pad(torch.rand(6, 7) < 0.6, (1, 0)), -1)
        prompt[:, 5] = -1 # or else a block of a row alone might need no step
        prompt[:, 2] = -1
        together, _ = write(model, prompt, 0, temperature=0, guidance=guidance, **way)
        for row, given in zip(together, prompt):
            alone, _ = write(model, given[None], 0, temperature=0, guidance=guidance, **way)
            assert torch.equal(alone[0], row)

OF_STEPS = [
    {},
    dict(steps=7),
    dict(steps=4, schedule='cosine'),
    dict(steps=9, remask=0.5),
    dict(remask=0.3),
]
STEPS = [dict(sampler=sampler, **more) for sampler in ('fixed', 'ancestral') for more in OF_STEPS]

@pytest.mark.parametrize('way', STEPS, ids=str)
@torch.no_grad()
def test_steps_are_a_row_s_own(way, monkeypatch):
    """
    Rows that fill different blocks, one of them none, are written as if alone.
    The slowest row decides the number of calls.
    """
    in_blocks = [build('bd3lm', block_size=12, begin_id=6, diffusion_block_size=n) for n in (3, 4)]
    def alike(shape, **more): # the same numbers in all rows
        return (torch.arange(shape[1]) * 0.37 % 1).expand(shape)
    def quota(hidden, total, t, s): # 0, 1 or 2 before the last step
        return torch.where(s > 0, (t * 20 + total).long() % 3, hidden.sum(1))
    all_gaps = range(1, 12), range(5, 8), (1, 2, 9, 10, 11), (), (3, 8)
    monkeypatch.setattr(torch, 'rand', alike)
    monkeypatch.setitem(QUOTAS, 'ancestral', quota)
    for model in (*in_blocks, build('mdlm', block_size=12)):
        torch.manual_seed(3)
        prompt, alone = torch.randint(5, (5, 12)), []
        for row, gaps in zip(prompt, all_gaps):
            row[list(gaps)] = -1
        together, calls = write(model, prompt, 0, temperature=0, **way)
        for given, row in zip(prompt, together):
            out, own = write(model, given[None], 0, temperature=0, **way)
            assert torch.equal(out[0], row)
            assert len(own) <= way.get('steps', 11)
            alone.append(len(own))
        assert max(alone) <= len(calls) <= sum(alone)
        steps, sampler = way.get('steps'), way['sampler']
        plan = model.plan(prompt == -1, steps, sampler)
        for b, row in enumerate(prompt == -1):
            alone = model.plan(row, steps, sampler)
            own = [(start, s, e, int(n)) for start, _, blocks in alone for s, e, n in blocks]
            shared = [(start, s, e, int(n[b])) for start, _, blocks in plan for s, e, n in blocks if n[b]]
            assert own == shared

def test_steps_of_rows_by_hand():
    """ each row has the t and s of reverse_steps, then 1 and 0; a quota reads them row by row """
    numbers = 2, 0, 3, 2
    for schedule in SCHEDULES:
        steps = models.row_steps(torch.tensor(numbers), schedule)
        found = [torch.stack(pair, 1).tolist() for pair in steps]
        for b, n in enumerate(numbers):
            expected = reverse_steps(n, schedule) + [(1, 0)] * (3 - n)
            assert [tuple(pairs[b]) for pairs in found] == expected
    hidden, total = torch.ones(3, 12).bool(), torch.tensor([12, 12, 12])
    t, s = torch.tensor([1.0, 1.0, 1.0]), torch.tensor([0.0, 0.5, 1.0])
    assert QUOTAS['fixed'](hidden, total, t, s).tolist() == [12, 6, 0]
    many = torch.stack([QUOTAS['ancestral'](hidden, total, t, s) for _ in range(1000)])
    mean = many.double().mean(0)
    assert mean[0] == 12
    assert mean[2] == 0
    assert abs(mean[1].item() - 6) < 0.3

@torch.no_grad()
def test_what_there_is_to_write_decides_the_shape():
    """ (B, T + n) for no rows, no prompt and nothing to write, in every class """
    every_model = [build('ar'), build('ar', begin_id=6), build('df'), build('df_published', df_objective='pred_x0')]
    every_model += [build(kind[0], **kind[1]) for kind in KINDS]
    sizes = [(0, 0, 0), (0, 3, 0), (0, 0, 4), (0, 3, 4), (2, 0, 0), (2, 4, 0), (2, 3, 1)]
    for model, (B, T, n) in itertools.product(every_model, sizes):
        idx = torch.ones(B, T, dtype=torch.long)
        for stop in None, 1:
            out = model.generate(idx, n, stop=stop, on_step=lambda *step: None)
            assert out.shape == (B, T + n)
            assert out.dtype == torch.long
            assert torch.equal(out[:, :T], idx)
        assert (idx == 1).all() # generate does not write on the prompt

@every_way
@torch.no_grad()
def test_a_stop_token_ends_every_row_by_itself(way):
    for kind, more in ('mdlm', {}), ('bd3lm', dict(diffusion_block_size=4)):
        model, prompt = build(kind, **more), torch.full((12, 2), 3)
        options = way | dict(steps=8) if 'steps' in way else way
        out, _ = write(model, prompt, 12, stop=3, temperature=3.0, **options)
        written = out[:, 2:].tolist()
        lengths = [row.index(3) if 3 in row else 12 for row in written]
        assert torch.equal(out[:, :2], prompt)
        assert out.min() >= 0
        assert len(set(lengths)) > 2
        assert all(set(row[n:]) <= {3} for row, n in zip(written, lengths))

SEGMENTED = [
    ('mdlm', dict(attention='hierarchical', segments='2,2,4')),
    ('bd3lm', dict(attention='hierarchical', segments='2,2,4', diffusion_block_size=2, begin_id=6)),
    ('bd3lm', dict(segments='2,4,2', diffusion_block_size=1)),
    ('bd3lm', dict(segments='1,3,4', diffusion_block_size=3)), # blocks that segments cut
    ('mdlm', dict(segments='2,2,4')),
    ('denoise', dict(attention='causal', segments='4,4')),
    ('mdlm', dict(attention='block', segments='2,2,4', diffusion_block_size=2)),
]

def segments_that_stopped(row, T, edges):
    """ how many segments of a row stopped before their end; after its first stop a segment must hold stops only """
    stopped = 0
    for a, z in zip(edges, [*edges[1:-1], len(row)]):
        own = row[max(a, T):z]
        assert 3 not in own or set(own[own.index(3):]) == {3}
        stopped += 3 in own[:-1]
    return stopped

@pytest.mark.parametrize('kind', SEGMENTED, ids=str)
@torch.no_grad()
def test_a_stop_ends_its_segment_wherever_the_text_ends(kind):
    """
    The text ends within a segment, in the question, or past the context. There the last segment goes on,
    and a hierarchy refuses.
    """
    model = build(kind[0], **kind[1])
    model.unseen[3] = 1.0 # stops enough
    edges, stopped = [0, *itertools.accumulate(model.config.lengths)], 0
    for T, n, guidance in itertools.product((0, 1, 3, 7), (1, 3, 5, 13), (0, 0.5)):
        prompt, way = torch.randint(5, (6, T)), dict(order='left_to_right', guidance=guidance)
        if T == 0 and guidance:
            continue
        if T + n > 8 and model.config.attention == 'hierarchical':
            with pytest.raises(UserError, match='a hierarchy has 8 tokens'):
                model.generate(prompt, n, stop=3, **way)
            continue
        out = model.generate(prompt, n, stop=3, temperature=2.0, **way)
        assert out.shape == (6, T + n)
        assert torch.equal(out[:, :T], prompt)
        assert out.min() >= 0
        stopped += sum(segments_that_stopped(row, T, edges) for row in out.tolist())
    assert stopped > 15

@pytest.mark.parametrize('more, N', [(dict(attention='hierarchical'), 8), ({}, 8), (dict(begin_id=6), 14)])
@torch.no_grad()
def test_nobody_sees_what_follows_the_block_of_a_stop(more, N, monkeypatch):
    """ a plan that stopped is read up to its stop, in a new window too, as if the rest of it did not exist """
    model, calls = build('bd3lm', segments='2,4,2', diffusion_block_size=1, **more), []
    script = torch.tensor([1, 2, 0, 3, 3, 3] + [4, 1] * 4) # column 3 is the stop
    columns_written = [2, 3, *range(6, N)]
    written = iter(columns_written)
    monkeypatch.setattr(models, 'draw', lambda probs: script[[next(written)]])
    def on_step(step, idx, probs, state):
        calls.append(probs[0])
    out = model.generate(script[None, :2], N - 2, stop=3, on_step=on_step)
    assert out[0].tolist() == script[:N].tolist()
    assert len(calls) == N - 4
    lead = model.lead
    for c, probs in zip(columns_written, calls):
        start = 0 if c < 8 else c // 4 * 4 - 4
        columns = torch.tensor([j for j in range(start, c + 1) if j not in (4, 5)])
        text = script[columns].masked_fill(columns == c, 7)
        text = F.pad(text, (lead, 0), value=6)[None]
        pos = F.pad(columns - start + lead, (lead, 0))
        ids = F.pad(model.ids[columns - start] + lead, (lead, 0))
        states = model.trunk(model.embed(text, pos), pos, models.dense_mask(ids))
        expected = model.logits(states[0, -1]).softmax(-1)
        assert torch.allclose(expected, probs.double(), atol=1e-6), c

@torch.no_grad()
def test_every_call_is_counted():
    """ NFE is the number of passes through the trunk; a guided call is two """
    for kind, more in ('mdlm', {}), ('bd3lm', dict(diffusion_block_size=4)):
        model = build(kind, **more)
        rows, trunk = [], model.trunk
        model.trunk = lambda x, *a, **k: rows.append(len(x)) or trunk(x, *a, **k)
        for way, guidance in itertools.product(EVERY_WAY, (0.0, 0.5)):
            rows.clear()
            _, calls = write(model, torch.tensor([[1, 2]] * 3), 6, guidance=guidance, **way)
            assert calls[-1][2]['nfe'] == len(rows) == len(calls) * (1 + (guidance > 0))
            assert set(rows) == {3}

@pytest.mark.parametrize('sampler', list(SAMPLERS))
@torch.no_grad()
def test_logits_only_where_they_are_needed(sampler):
    """ in random order for the revealed tokens only; for all hidden ones where an order or a bound needs them """
    model, seen = build('mdlm'), []
    logits = model.logits
    model.logits = lambda x: seen.append(len(x)) or logits(x)
    for order in 'random', 'margin':
        if order != 'random' and 'order' not in SAMPLERS[sampler]:
            continue
        seen.clear()
        _, calls = write(model, empty(2), 8, sampler=sampler, order=order)
        hidden = [16] + [int((idx == -1).sum()) for idx, *_ in calls[:-1]]
        sees_all = order == 'margin' or sampler in ACCEPTS
        assert seen == (hidden if sees_all else revealed(calls))

@pytest.mark.parametrize('remask', [0.0, 0.5])
@pytest.mark.parametrize('guidance', [0.0, 1.5])
@torch.no_grad()
def test_every_call_reads_what_stands(guidance, remask):
    """
    The distributions and the choice of a call come from the text that the call before left.
    What is called settled stays.
    """
    model, given = build('mdlm'), torch.tensor([[1, 3, -1, -1, -1, 0, -1, -1]])
    way = dict(sampler='fixed', order='confidence', steps=16, guidance=guidance, remask=remask)
    states = lambda x: model.logits(model.one_stream(x.masked_fill(x == -1, 7)))[0, :, :5]
    for seed in range(10):
        out, calls = write(model, given, 8, seed, **way)
        calls = [call for call in calls if (call[0][:, 8:] == -1).all()] # the first window
        before = given
        for idx, probs, state in calls:
            u = states(before.masked_fill(given != -1, -1))
            p = (u + (1 + guidance) * (states(before) - u)).softmax(-1)
            hidden = (before[0] == -1).nonzero()[:, 0].tolist()
            confidence = ORDERS['confidence'](p).tolist()
            first = sorted(hidden, key=lambda i: (-confidence[i], i))[:len(probs)]
            done = state['done']
            assert torch.allclose(probs[:, :5].double(), p[sorted(first)], atol=1e-5)
            assert torch.equal(idx[:, :done], out[:, :done])
            before = idx[:, :8]
        assert len(calls) > 4

# ---- orders

SMALL_SPACES = [
    ('mdlm', dict(V=2)),
    ('bd3lm', dict(V=3, diffusion_block_size=2, begin_id=6)),
]

@pytest.mark.parametrize('order', list(ORDERS))
@pytest.mark.parametrize('kind', SMALL_SPACES)
@torch.no_grad()
def test_one_token_per_call_in_an_order_is_the_model_of_nll_order(kind, order):
    """ chi-squared on a space small enough to list; bins that expect fewer than 5 are pooled """
    model, x = tiny(kind[0], **kind[1])
    p, n, V = (-model.nll_order(x, x, order)[0].double()).exp(), 20000, kind[1]['V']
    out, calls = write(model, empty(n), 4, order=order)
    assert revealed(calls) == [n] * 4
    number = (out * V ** torch.arange(3, -1, -1)).sum(1) # of each text among all
    counts, expected = torch.bincount(number, minlength=len(x)).double(), p * n
    rare = expected < 5
    bins = [*zip(counts[~rare].tolist(), expected[~rare].tolist())]
    if expected[rare].sum() > 1:
        bins.append((counts[rare].sum().item(), expected[rare].sum().item()))
    chi2, df = sum((c - e) ** 2 / e for c, e in bins), len(bins) - 1
    assert chi2 < df + 4 * math.sqrt(2 * df) + 8

@torch.no_grad()
def test_an_order_looks_at_the_model_alone():
    """ at temperature 1, before top_k and top_p: the first token to be revealed is the same whatever is drawn """
    model, prompt = build('mdlm'), torch.tensor([[1, 4]])
    draws = {}, dict(temperature=0), dict(temperature=5.0), dict(top_k=1), dict(top_p=0.1)
    for order in ORDERS:
        first = []
        for seed, how in enumerate(draws):
            _, calls = write(model, prompt, 6, seed, order=order, **how)
            first.append((calls[0][0] != -1).tolist())
        assert all(f == first[0] for f in first)
        assert sum(first[0][0]) == 3

@torch.no_grad()
@pytest.mark.parametrize('kind, favourite', [
    ('mdlm', 'margin'),
    ('bd3lm', 'left_to_right'),
    ('denoise', 'random'),
])
def test_the_order_nobody_chose(kind, favourite):
    """ is the class's favourite; but `fixed` reveals a number of tokens however unsure they are, so random """
    more = dict(diffusion_block_size=4) if kind == 'bd3lm' else {}
    model, prompt = build(kind, **more), torch.tensor([[1], [4]])
    every_order = 'random', *ORDERS
    for way, order in [
        ({}, favourite),
        (dict(sampler='threshold'), favourite),
        (dict(sampler='fixed', steps=5), 'random'),
    ]:
        found = {o: write(model, prompt, 7, **way, order=o) for o in (None, *every_order)}
        assert [o for o in every_order if same(found[None], found[o])] == [order]

def test_orders_by_hand():
    p = torch.tensor([[0.5, 0.5, 0.0], [0.6, 0.2, 0.2], [0.55, 0.4, 0.05]])
    first = {name: ORDERS[name](p).argmax().item() for name in ORDERS}
    assert first == {'left_to_right': 0, 'confidence': 1, 'entropy': 0, 'margin': 1}
    assert torch.allclose(entropy(p)[0], torch.tensor(math.log(2)))
    key = torch.tensor([[2.0, 9.0, 1.0, 3.0, 3.0]])
    hidden = torch.tensor([[True, False, True, True, True]])
    assert ranks(key, hidden).tolist() == [[2, 4, 3, 0, 1]]
    assert leading(key, hidden, torch.tensor([9])).tolist() == hidden.tolist()
    assert leading(key, hidden, torch.tensor([1])).int().tolist() == [[0, 0, 0, 1, 0]]
    assert spread(torch.tensor([5.0, 6.0, 7.0, 8.0]), hidden).tolist() == [[5, 0, 6, 7, 8]]

@torch.no_grad()
def test_confidence_decoding_by_hand():
    """
    P14: with one token per call and temperature 0, the likeliest token is written at the position where
    it is likeliest. With blocks of one token every order is left to right.
    """
    model, text = build('mdlm'), torch.full((1, 8), 7)
    out, calls = write(model, empty(), 8, order='confidence', temperature=0)
    for idx, *_ in calls:
        p = model.logits(model.one_stream(text)).softmax(-1)[0]
        top = p.max(-1).values.round(decimals=4) # rounded, because where all is hidden all are alike
        best = top.masked_fill(text[0] != 7, -1).argmax()
        text[0, best] = p[best].argmax()
        assert torch.equal(idx.masked_fill(idx == -1, 7), text)
    model = build('bd3lm', diffusion_block_size=1, begin_id=6)
    prompt = torch.tensor([[2]])
    written = set()
    for order in 'random', *ORDERS:
        out, _ = write(model, prompt, 7, order=order, temperature=0)
        written.add(tuple(out[0].tolist()))
    assert len(written) == 1

# ---- what each sampler promises

@every_kind
@pytest.mark.parametrize('order', ['random', *ORDERS])
@torch.no_grad()
def test_samplers_agree_where_they_reveal_one_token_per_call(kind, order):
    """
    One token per call is revealed by `fixed` with as many steps as tokens, by a threshold that nothing
    exceeds and by a budget of nothing. Each then writes what first_hitting writes, token for token.
    """
    model = build(kind[0], **kind[1])
    prompt = torch.tensor([[1, 2, 3], [4, -1, -1], [0, 2, -1]])
    one = write(model, prompt, 5, order=order)
    assert max(revealed(one[1])) <= 3
    for way in [
        dict(sampler='threshold', confidence_threshold=1.1),
        dict(sampler='entropy_bound', entropy_budget=0),
    ]:
        other = write(model, prompt, 5, order=order, **way)
        if order != 'random': # in random order these two look before they choose, so other numbers are drawn
            assert same(one, other), way
        assert revealed(other[1]) == revealed(one[1])
    rows = prompt[[0, 0], :2] # fixed gives a row that has less to write fewer tokens per call
    one = write(model, rows, 6, order=order)
    assert same(one, write(model, rows, 6, order=order, sampler='fixed'))
    assert revealed(one[1]) == [2] * 6
    if not model.blockwise:
        assert same(one, write(model, rows, 6, order=order, sampler='fixed', steps=6))

def fixed_counts(totals, steps, schedule):
    """ how many of `totals` tokens are revealed in each step, for every row: a list of `steps` numbers """
    totals, counts = torch.tensor(totals), []
    hidden = totals
    for t, s in reverse_steps(steps, schedule):
        row = torch.arange(20) < hidden[:, None]
        counts.append(QUOTAS['fixed'](row, totals, t, s))
        hidden = hidden - counts[-1]
    return torch.stack(counts, 1).tolist()

def follows_the_cosine(counts):
    """ whether in every step at most one token more is left than the curve says, and not one less """
    n, steps = sum(counts), len(counts)
    for i in range(steps):
        left = n - sum(counts[:i + 1])
        curve = n * math.cos(math.pi / 2 * (i + 1) / steps)
        if not -1e-6 < left - curve < 1 + 1e-6:
            return False
    return True

@torch.no_grad()
def test_fixed_splits_evenly():
    """
    P14: the counts of a block add up. They differ by at most one with the linear schedule, and follow
    the curve with the cosine. Every row has its own.
    """
    for total, steps, schedule in itertools.product(range(1, 20), range(1, 25), SCHEDULES):
        for counts, n in zip(fixed_counts([total, 7], steps, schedule), (total, 7)):
            assert sum(counts) == n
            assert min(counts) >= 0
            if schedule == 'linear':
                assert max(counts) - min(counts) <= 1
            else:
                assert follows_the_cosine(counts)
    def of_each_call(model, n, **options):
        return revealed(write(model, empty(), n, sampler='fixed', **options)[1])
    model = build('mdlm', block_size=32)
    assert of_each_call(model, 32, steps=8) == [4] * 8
    assert of_each_call(model, 32, steps=4, schedule='cosine') == [2, 7, 10, 13]
    model = build('bd3lm', diffusion_block_size=4)
    assert of_each_call(model, 8, steps=4, order='margin') == [2] * 4

@torch.no_grad()
def test_ancestral_follows_its_schedule():
    """ P12 with both schedules: the share still hidden after every step """
    model = build('mdlm', dtype=torch.float)
    for schedule in SCHEDULES:
        _, calls = write(model, empty(2000), 8, sampler='ancestral', steps=4, schedule=schedule)
        left = [(idx == -1).double().mean().item() for idx, *_ in calls]
        assert len(left) == 4
        assert left[-1] == 0
        for (_, s), share in zip(reverse_steps(4, schedule), left):
            assert abs(share - s) < 4 * math.sqrt(s * (1 - s) / 16000) + 1e-9
    assert [round(s, 3) for _, s in reverse_steps(3, 'cosine')] == [0.866, 0.5, 0.0]
    assert reverse_steps(1, 'linear') == [(1, 0)]

def check_threshold(p, hidden, new, bound, in_order):
    """ all tokens above the threshold are new; if there is none, one token is: the first, if there is an order """
    sure = [i for i in hidden if p[i].max() > bound]
    if sure:
        assert new == sure
    else:
        assert len(new) == min(1, len(hidden))
        assert not in_order or new == by_margin(p, hidden)[:1]

def check_entropy(p, hidden, new, bound, in_order):
    """ the entropies of the new tokens, except for the largest, fit the budget; those of one more would not """
    h = entropy(p)
    def cost(where):
        return sum(h[where]) - max(h[where])
    assert not hidden or cost(new) <= bound + 1e-6
    if not hidden or not in_order:
        return
    line = by_margin(p, hidden)
    assert line[0] in new
    if len(new) < len(hidden):
        n = len(new)
        assert set(new) == set(line[:n])
        assert cost(line[:n + 1]) > bound - 1e-6

def by_margin(p, hidden):
    """ the hidden positions in the order of their margins, ties by position """
    margin = ORDERS['margin'](p).tolist()
    return sorted(hidden, key=lambda i: (-margin[i], i))

@pytest.mark.parametrize('order', ['random', 'margin'])
@torch.no_grad()
def test_bounds_decide_by_what_is_predicted(order):
    """ every call obeys the definition of its sampler, given the distributions of a pass over the text so far """
    model = build('mdlm')
    prompt = torch.tensor([[2, -1, -1, -1, 3, -1, -1, -1]] * 16)
    for sampler, name, check, bounds in [
        ('threshold', 'confidence_threshold', check_threshold, (0.3, 0.5, 0.8)),
        ('entropy_bound', 'entropy_budget', check_entropy, (0.5, 2.0, 100.0)),
    ]:
        several = 0
        for bound in bounds:
            way = {'sampler': sampler, name: bound}
            out, calls = write(model, prompt, 0, order=order, temperature=1.5, **way)
            before = prompt
            for idx, *_ in calls:
                p = model.logits(model.one_stream(before.masked_fill(before == -1, 7))).softmax(-1)
                for row, now, q in zip(before, idx, p):
                    hidden = (row == -1).nonzero()[:, 0].tolist()
                    new = ((row == -1) & (now != -1)).nonzero()[:, 0].tolist()
                    several += len(new) > 1
                    check(q, hidden, new, bound, order != 'random')
                before = idx
        assert several
    def of_each_call(**options):
        return revealed(write(model, empty(), 8, **options)[1])
    assert of_each_call(sampler='entropy_bound', entropy_budget=100.0) == [8]
    assert of_each_call(sampler='threshold', confidence_threshold=0.0) == [8]

def test_the_largest_entropy_is_free():
    """ the largest entropy of a run of tokens does not count, so the others decide how long the run is """
    p = torch.tensor([[0.5, 0.5, 0], [0.9, 0.1, 0], [1, 0, 0], [0.6, 0.3, 0.1]]) # entropies .69, .33, 0, .90
    hidden = torch.tensor([[True, False, True, True, True]])
    rank = torch.tensor([[1, 4, 2, 0, 3]])
    order = [3, 0, 2, 4] # positions by rank: entropies 0, .69, .33, .90, so the others have 0, 0, .33, 1.02
    for bound, n in (0, 2), (0.32, 2), (0.33, 3), (1.01, 3), (1.02, 4), (math.inf, 4):
        chosen = ACCEPTS['entropy_bound'](hidden, rank, p, bound)
        assert chosen[0].nonzero()[:, 0].tolist() == sorted(order[:n]), bound

# ---- hidden again

@pytest.mark.parametrize('sampler', ['fixed', 'ancestral'])
@torch.no_grad()
def test_remasking(sampler):
    """
    The least probable of what the block has written is hidden again. Given text never is, a finished
    block never is, and nothing is after the last step.
    """
    for kind, more in [
        ('mdlm', {}),
        ('bd3lm', dict(diffusion_block_size=8)),
        ('bd3lm', dict(diffusion_block_size=4, begin_id=6)),
    ]:
        model = build(kind, block_size=16, **more)
        prompt = torch.tensor([[1, 2, -1, 3], [4, -1, -1, -1]])
        def remasked(**remask):
            return write(model, prompt, 12, sampler=sampler, steps=16, **remask)
        plain = remasked()
        assert same(plain, remasked(remask=0.0))
        out, calls = remasked(remask=0.5)
        assert out.min() >= 0
        assert torch.equal(out[:, :4][prompt != -1], prompt[prompt != -1])
        states, again = [F.pad(prompt, (0, 12), value=-1)] + [idx for idx, *_ in calls], 0
        n = model.config.diffusion_block_size or 16
        for a, b in zip(states, states[1:]):
            gone = (a != -1) & (b == -1)
            again += gone.sum().item()
            gaps = (a == -1).any(0).nonzero()[:, 0]
            where = gone.any(0).nonzero()[:, 0]
            assert (where // n == gaps.min() // n).all() # the current block is the first with a gap
        assert again > 0
        assert len(calls) <= 16
        few, _ = remasked(remask=0.01) # less than one token
        assert torch.equal(few, plain[0])

@torch.no_grad()
def test_remasking_takes_the_least_probable():
    """ a model that ignores its context: rare tokens are hidden again as they come, so the likeliest pile up """
    model = build('mdlm', block_size=16)
    logits = torch.tensor([0.6, 0.2, 0.1, 0.05, 0.05, 0, 0, 0]).log()
    model.logits = lambda x: logits.expand(*x.shape[:-1], -1)
    model.one_stream = lambda xt, ids, only: torch.zeros(len(only), 1)
    way = dict(sampler='fixed', steps=8)
    out, calls = write(model, empty(200), 16, remask=0.5, temperature=1.0, **way)
    before = calls[-2][0] # after the seventh call 14 stood, 7 were hidden again
    assert ((before == -1).sum(1) == 9).all()
    assert (before[before != -1] == 0).double().mean() > 0.95
    plain, _ = write(model, empty(200), 16, **way)
    assert abs((plain == 0).double().mean().item() - 0.6) < 0.04

@torch.no_grad()
def test_remasking_goes_by_the_model_s_own_probabilities():
    """
    The probabilities are the model's, not what temperature or top_k made of them. Of tokens that are
    certain to be drawn, those that the model doubts are hidden again.
    """
    model, doubtful = build('mdlm', block_size=8), torch.tensor([1, 4, 6])
    sure, unsure = (torch.tensor([p, 1 - p, 0, 0, 0, 0, 0, 0]).log() for p in (0.95, 0.55))
    model.one_stream = lambda xt, ids, only: only[:, None]
    model.logits = lambda at: torch.where(torch.isin(at, doubtful), unsure, sure)
    for certain in dict(temperature=0), dict(temperature=0.01), dict(top_k=1), dict(top_p=0.1):
        way = dict(sampler='fixed', **certain)
        out, calls = write(model, empty(), 8, steps=2, remask=0.75, order='confidence', **way)
        assert (out == 0).all()
        assert (calls[0][0] == -1).sum() == 7 # four written, then three of them hidden again
        out, calls = write(model, empty(), 8, steps=8, remask=0.4, order='left_to_right', **way)
        assert (calls[4][0][0] == -1).nonzero()[:, 0].tolist() == [1, 4, 5, 6, 7], certain

# ---- guidance

@every_kind
@torch.no_grad()
def test_guidance(kind):
    """
    P15: a guidance of 0 is none at all. Otherwise logits = u + (1 + w) (c - u), which is affine in w:
    c given the prompt, u without it.
    """
    model = build(kind[0], **kind[1])
    n = model.id_list.index(1) if 1 in model.id_list else 4
    given = n if 'segments' in kind[1] else n - 1 # the question, or most of the first block
    prompt, new = torch.tensor([[1, 3, 0, 2]])[:, :given], 8 - given
    assert same(write(model, prompt, new), write(model, prompt, new, guidance=0))
    def odds(w): # up to the constant that normalises
        _, calls = write(model, prompt, new, guidance=w, order='left_to_right')
        log_p = calls[0][1].log()[:, :5]
        return log_p - log_p[:, :1]
    none, half, one, two = map(odds, (0, 0.5, 1.0, 2.0))
    assert torch.allclose(one - none, two - one, atol=1e-3)
    assert torch.allclose(half * 2, none + one, atol=1e-3)
    assert not torch.allclose(none, one, atol=1e-2)
    def logits(text):
        states = model.two_stream(text, text) if model.blockwise else model.one_stream(text)
        return model.logits(states)[0, given, :5]
    text = F.pad(prompt, (0, new), value=7)
    c, u = logits(text), logits(torch.full_like(text, 7))
    expected = u + 3 * (c - u)
    assert torch.allclose(two[0].double(), expected - expected[0], atol=1e-3)
    batch = prompt.repeat(3, 1)
    out, _ = write(model, batch, new, guidance=2.0, order='confidence', temperature=0)
    assert torch.equal(out[:, :given], batch)
    assert (out == out[0]).all()

# ---- sentences

@torch.no_grad()
def test_unknown_names_and_unused_options_end_in_sentences():
    model, prompt = build('mdlm'), torch.tensor([[1]])
    for options, word in [
        (dict(sampler='magic'),
         "sampler is 'magic', expected one of first_hitting, ancestral, fixed, threshold, entropy_bound"),
        (dict(order='luck'), "order is 'luck', expected one of random, left_to_right, confidence, entropy, margin"),
        (dict(sampler='fixed', schedule='square'), "schedule is 'square', expected one of linear, cosine"),
        (dict(steps=5), 'first_hitting has no use for steps=5: leave steps out, or take sampler ancestral | fixed'),
        (dict(sampler='threshold', steps=5), 'leave steps out'),
        (dict(sampler='ancestral', order='margin'), 'ancestral has no use for order=margin'),
        (dict(schedule='cosine'), 'no use for schedule=cosine'),
        (dict(remask=0.1), 'no use for remask=0.1'),
        (dict(sampler='threshold', remask=0.1), 'or take sampler ancestral | fixed'),
        (dict(sampler='fixed', confidence_threshold=0.9), 'or take sampler threshold'),
        (dict(sampler='threshold', entropy_budget=0),
         'no use for entropy_budget=0: leave entropy_budget out, or take sampler entropy_bound'),
        (dict(sampler='fixed', remask=1.0), r'remask is 1.0, expected a share in \[0, 1\)'),
        (dict(sampler='entropy_bound', entropy_budget=-1), 'entropy_budget is -1, expected 0 or more'),
        (dict(guidance=-0.5), 'guidance is -0.5, expected 0'),
        (dict(sampler='fixed', steps=0), '0 steps are fewer than the 1 blocks'),
    ]:
        with pytest.raises(UserError, match=word):
            model.generate(prompt, 7, **options)
    with pytest.raises(UserError, match='a row without a prompt'):
        model.generate(torch.tensor([[1], [-1]]), 7, guidance=1.0)
    takes = set(inspect.signature(model.generate).parameters)
    for name, options in SAMPLERS.items(): # every option is one of generate's, and read
        assert set(options) <= takes
        assert (name in QUOTAS) != (name in ACCEPTS)

BAD = { # what no value of an option can be
    'max_new_tokens': [-1, 2.5, True, 'abc', None, math.nan, 10 ** 12, 10 ** 30],
    'steps': [0, -1, 2.5, True, 'abc', math.nan, 10 ** 12],
    'sampler': [0, True, 2.5, [1], '', 'magic'],
    'order': [0, True, [1], '', 'magic'],
    'schedule': [0, True, [1], '', 'magic', None],
    'confidence_threshold': [-0.1, math.nan, -math.inf, True, 'abc', [1], 10 ** 400],
    'entropy_budget': [-0.1, math.nan, True, 'abc', 10 ** 400],
    'temperature': [-1, math.nan, math.inf, 1e39, True, 'abc', None, 10 ** 400],
    'top_k': [0, -1, 2.5, True, 'abc', math.nan],
    'top_p': [0, -1, 1.5, math.nan, True, 'abc'],
    'remask': [-0.1, 1, math.nan, True, 'abc', None],
    'guidance': [-1, math.nan, math.inf, True, 'abc', None, 1e39, 10 ** 400],
    'stop': [-1, 2.5, True, 'abc', math.nan, 10 ** 400],
    'df_scheduling_matrix': [0, True, [1], '', 'magic'],
    'df_uncertainty_scale': [-1, math.nan, math.inf, True, 'abc'],
}
GOOD = { # and what is as far as it may go
    'steps': [4],
    'confidence_threshold': [0, 1, 5.0, math.inf],
    'entropy_budget': [0, 5, math.inf],
    'temperature': [0, 1e-39, 1e6],
    'top_k': [1, 10 ** 400],
    'top_p': [1e-50, 1],
    'remask': [0, 0.999],
    'guidance': [0, 1e-9, 1000],
    'stop': [0, 2 ** 31 - 1],
    'df_uncertainty_scale': [0, 0.5],
}
READS = { # a sampler that has a use for the option
    'steps': 'fixed',
    'schedule': 'fixed',
    'remask': 'fixed',
    'confidence_threshold': 'threshold',
    'entropy_budget': 'entropy_bound',
}

@pytest.mark.parametrize('kind', ['ar', 'mdlm', 'bd3lm', 'denoise', 'aogpt', 'df'])
def test_every_option_is_checked_by_its_name(kind):
    """ one sentence that names the option, whatever was typed for it; what is on the edge works """
    more = {'bd3lm': dict(diffusion_block_size=4), 'aogpt': dict(diffusion_block_size=1), 'df': dict(df_timesteps=4)}
    more = more.get(kind, {})
    model, prompt = build(kind, begin_id=6, **more), torch.tensor([[1, 2]])
    takes = set(inspect.signature(model.generate).parameters) - {'idx', 'on_step', 'block_ids'}
    assert takes <= models.OPTIONS.keys() == BAD.keys()
    for name in sorted(takes):
        options = {'max_new_tokens': 5}
        if name in READS and kind != 'df':
            options['sampler'] = READS[name]
        refused = kind == 'aogpt' and name == 'remask' # of any value, see test_any_order
        for value in [] if refused else GOOD.get(name, []):
            assert model.generate(prompt, **{**options, name: value}).shape == (1, 7)
        for value in BAD[name]:
            says = [
                f'{name} is ',
                f'{value} {name} are fewer',
                f'{value} new ones',
                f'df_sampling_timesteps is {value},',
            ]
            with pytest.raises(UserError, match='|'.join(map(re.escape, says))):
                model.generate(prompt, **{**options, name: value})

@pytest.mark.parametrize('dtype', [torch.float16, torch.bfloat16])
def test_half_precision_writes_at_every_edge(dtype):
    """ with logits far beyond those of any text """
    edges = [
        dict(temperature=0),
        dict(temperature=1e-39),
        dict(temperature=1e6),
        dict(top_p=1e-50),
        dict(guidance=1000),
    ]
    for kind, more in ('ar', dict(begin_id=6)), ('mdlm', {}), ('bd3lm', dict(diffusion_block_size=4)), ('df', {}):
        model = build(kind, dtype=torch.float, n_embd=64, **more)
        head = model.df_head if kind == 'df' else model.lm_head
        torch.nn.init.normal_(head.weight, std=20.0)
        for options in edges[:4 if kind == 'ar' else 5]:
            with torch.autocast('cpu', dtype):
                out = model.generate(torch.tensor([[1, 2]]), 6, **options)
            assert out.min() >= 0 and out.max() < 5

# ---- everything at once

def any_model(rng):
    """ -> (objective, model) of 1 to 9 tokens, with any settings that fit together """
    kind = rng.choice(['ar', 'mdlm', 'mdlm', 'bd3lm', 'bd3lm', 'denoise', 'aogpt', 'df'])
    room = rng.randint(1, 9)
    own = dict(block_size=room, begin_id=rng.choice([None, 6]), pos=rng.choice(['rope', 'learned']), n_embd=8)
    if room > 1 and rng.random() < 0.5:
        inner = rng.sample(range(1, room), rng.randint(1, min(3, room - 1)))
        cuts = [0, *sorted(inner), room]
        own['segments'] = ','.join(str(b - a) for a, b in zip(cuts, cuts[1:]))
    if kind in ('mdlm', 'bd3lm', 'denoise'):
        patterns = ['block'] + ['hierarchical'] * 3 * ('segments' in own) + ['full', 'causal'] * (kind != 'bd3lm')
        own |= dict(attention=rng.choice(patterns), diffusion_block_size=rng.randint(1, room + 1))
        own['clean_causal'] = kind == 'bd3lm' and rng.random() < 0.3
        own['causal_within_block'] = own['attention'] == 'hierarchical' and rng.random() < 0.5
    elif kind == 'aogpt':
        own['diffusion_block_size'] = rng.choice([1, 1, 3])
        own['attention'] = 'hierarchical' if 'segments' in own else 'block'
    elif kind == 'df':
        own |= dict(df_timesteps=4, df_sampling_timesteps=4, df_chunk_size=rng.choice([None, 1, room]))
        if rng.random() < 0.5:
            return kind, build('df_published', rng.randrange(99), **own, df_objective='pred_x0')
    return kind, build(kind, rng.randrange(99), **own)

def any_prompt(rng, kind, model):
    """ -> (B, T) with gaps, and how many tokens to write after it """
    room = model.config.block_size
    B, T = rng.randint(0, 4), rng.randint(0, rng.choice([room, 2 * room + 2]))
    n = rng.choice([0, 1, max(0, room - T), rng.randint(0, 2 * room)])
    if model.config.attention == 'hierarchical' and rng.random() < 0.8: # what a hierarchy has room for
        T, n = min(T, room // 2), room - min(T, room // 2)
    prompt, same = torch.randint(5, (B, T)), torch.rand(T) < 0.4
    holes = {'ar': ['none', 'end'], 'df': ['none', 'gaps']}.get(kind, ['none', 'end', 'gaps', 'same gaps'])
    how = rng.choice(holes)
    for row in prompt:
        gaps = {
            'none': slice(0),
            'end': slice(rng.randint(0, T), None),
            'gaps': torch.rand(T) < 0.4,
            'same gaps': same,
        }
        row[gaps[how]] = -1
    return prompt, n

def any_options(rng, kind, model, prompt, n):
    """ -> options of generate that the objective takes, though not all fit together """
    options = dict(temperature=rng.choice([0, 0, 1.0]), stop=rng.choice([None, None, 0, 3]))
    if kind in ('mdlm', 'bd3lm', 'denoise', 'aogpt'):
        sampler = options['sampler'] = rng.choice(list(SAMPLERS))
        values = dict(steps=[None, 3, 9, 20], order=[None, 'random', *ORDERS, *ORDERS], schedule=[*SCHEDULES],
                      remask=[0, 0, 0.5], confidence_threshold=[None, 0.5], entropy_budget=[None, 1.0])
        options |= {name: rng.choice(values[name]) for name in SAMPLERS[sampler]}
        options['guidance'] = rng.choice([0, 0, 0.5])
        B, N = len(prompt), prompt.size(1) + n
        if N <= model.config.block_size and rng.random() < 0.3: # pads, where something is given
            pads = F.pad(prompt != -1, (0, n)) & (torch.rand(B, N) < 0.2)
            options['block_ids'] = model.ids[:N].expand(B, -1).masked_fill(pads, model.id_list[-1] + 1)
    elif kind == 'df':
        options |= dict(steps=rng.choice([None, 1, 2]), sampler=rng.choice([None, 'ddim']))
        options['df_scheduling_matrix'] = rng.choice([None, 'autoregressive', 'trapezoid'])
    return options

@pytest.mark.parametrize('stop', [None, 3])
@pytest.mark.parametrize('kind', ['mdlm', 'bd3lm'])
@torch.no_grad()
def test_the_cache_is_exact_where_segments_are_causal(kind, stop, monkeypatch):
    """ causal_within_block: in the passes that read a block alone, no token sees a later one either """
    model = build(kind, attention='hierarchical', segments='2,2,4', causal_within_block=True)
    errors = against_uncached(monkeypatch)
    model.generate(torch.tensor([[1, 2], [3, 0]]), 6, stop=stop)
    assert len(errors) > 4
    assert max(errors) < 1e-9

def leaves_no_choice(kind, model, options):
    """ whether the model alone decides all that is written """
    sampler, order = options.get('sampler'), options.get('order')
    if kind == 'ar':
        return options['temperature'] == 0
    if order is None and kind != 'df':
        order = 'random' if sampler == 'fixed' else model.favourite_order
    return kind != 'df' and options['temperature'] == 0 and sampler != 'ancestral' and order != 'random'

@pytest.mark.parametrize('seed', range(8))
@torch.no_grad()
def test_anything_works_or_is_one_sentence(seed, monkeypatch):
    """ given tokens stay, what is new is text, the cache is exact, and greedy rows are as if alone """
    rng, done, alone, errors = random.Random(seed), 0, 0, against_uncached(monkeypatch)
    for _ in range(25):
        kind, model = any_model(rng)
        prompt, n = any_prompt(rng, kind, model)
        options, text = any_options(rng, kind, model, prompt, n), F.pad(prompt, (0, n), value=-1)
        try:
            out = model.generate(prompt.clone(), n, on_step=lambda *step: None, **options)
        except UserError as e:
            assert 20 < len(str(e)) < 250
            continue
        assert out.shape == text.shape
        assert torch.equal(out[text != -1], text[text != -1])
        assert ((out >= 0) & (out < 5)).all()
        assert max(errors, default=0) < 1e-9
        done += 1
        room = model.config.block_size - (kind == 'ar' and model.config.begin_id is not None)
        same_gaps = ((text == -1) == (text[:1] == -1)).all()
        if not leaves_no_choice(kind, model, options) or not (text.size(1) <= room or same_gaps):
            continue # rows with different gaps share their windows
        for b in range(len(prompt)):
            own = options | {k: v[b:b + 1] for k, v in options.items() if k == 'block_ids'}
            assert torch.equal(model.generate(prompt[b:b + 1], n, **own)[0], out[b])
            alone += 1
    assert done > 8 and alone

@torch.no_grad()
def test_an_acceptance_rule_of_ones_own(monkeypatch):
    """ three entries, as the README says; it reads the option that its bound names """
    bounds = []
    def at_least_one(hidden, rank, probs, bound):
        bounds.append(bound)
        return hidden & (rank < 1)
    monkeypatch.setitem(ACCEPTS, 'mine', at_least_one)
    monkeypatch.setitem(models.BOUNDS, 'mine', ('confidence_threshold', 0.3))
    monkeypatch.setitem(SAMPLERS, 'mine', ('order', 'confidence_threshold'))
    model = build('mdlm')
    model.generate(empty(), 3, sampler='mine')
    model.generate(empty(), 3, sampler='mine', confidence_threshold=0.7)
    assert bounds == [0.3] * 3 + [0.7] * 3
    with pytest.raises(UserError, match='sampler mine has no use for entropy_budget'):
        model.generate(empty(), 3, sampler='mine', entropy_budget=0.1)

# ---- sample.py

META = vocabulary('char', ['ROMEO: and my love.[]\\\n0123456789'])

@pytest.fixture(scope='module')
def checkpoints(tmp_path_factory):
    """ untrained models, as train.py would have saved them """
    paths = {}
    ids = {k: META[k] for k in ('vocab_size', 'text_size', 'begin_id', 'mask_id')}
    for name, more in ('ar', {}), ('mdlm', {}), ('bd3lm', dict(diffusion_block_size=4)):
        model = build(name, dtype=torch.float, block_size=64, **ids, **more)
        paths[name] = tmp_path_factory.mktemp(name) / 'ckpt_best.pt'
        torch.save({
            'format': 1,
            'objective': name,
            'config': dataclasses.asdict(model.config),
            'model': model.state_dict(),
            'ema': None,
            'iteration': 0,
            'settings': {'dataset': 'text'},
            'meta': META,
        }, paths[name])
    return paths

@pytest.fixture
def sample_py(checkpoints, monkeypatch, capsys):
    """
    run(name, *args) -> stdout, stderr of the script with fresh settings.
    It runs in this process, which has imported torch already.
    """
    def run(name, *args, code=0):
        monkeypatch.setattr(sys, 'argv', ['sample.py', f'--ckpt={checkpoints[name]}', '--device=cpu', *args])
        try:
            runpy.run_path(sample.__file__, run_name='__main__')
            left = 0
        except SystemExit as e:
            left = e.code
        done = capsys.readouterr()
        assert left == code, done.err
        return done.out, done.err
    return run

@pytest.mark.parametrize('name', ['mdlm', 'bd3lm'])
def test_infills_keep_what_is_given(sample_py, tmp_path, name):
    """
    Several gaps are filled, of the lengths that were asked for, and a literal [[ stays one.
    A stop in a gap ends what is written, not what is given.
    """
    start = 'ROMEO: [[12]]and \\[[4]] my[[3]]love.\n[[1]]'
    (tmp_path / 'start.txt').write_text(start)
    expected = r'ROMEO: [\s\S]{12}and \[\[4\]\] my[\s\S]{3}love\.\n[\s\S]'
    options = ['--sampler=fixed', '--steps=16', '--remask=0.3', '--order=margin', '--guidance=0.5']
    for more in [], ['--stream=False'], options:
        for given in start, f'FILE:{tmp_path}/start.txt':
            out, err = sample_py(name, f'--start={given}', '--max_new_tokens=0', '--num_samples=2', *more)
            *samples, rest = out.split('\n---------------\n')
            assert len(samples) == 2
            assert rest == ''
            assert all(re.fullmatch(expected, s) for s in samples), out
            assert '32 tokens at most' in err
    longer, _ = sample_py(name, '--start=ROMEO: [[4]]love.', '--max_new_tokens=3', '--num_samples=1')
    assert re.fullmatch(r'ROMEO: [\s\S]{4}love\.[\s\S]{3}\n---------------\n', longer)
    def gap(*more):
        out, _ = sample_py(name, '--start=ROMEO: [[40]]love.', '--max_new_tokens=0', '--num_samples=1', *more)
        return re.fullmatch(r'ROMEO: ([\s\S]*)love\.\n---------------\n', out)[1]
    plain = gap()
    stop = next(c for c in plain[5:] if c.isalpha())
    assert len(plain) == 40
    assert gap(f'--stop={stop}') == plain[:plain.index(stop)]

def test_prompts_with_gaps():
    tokenizer = Tokenizer(META)
    encode = lambda start: sample.encode_prompt(tokenizer, start)[0].tolist()
    text = lambda ids: tokenizer.decode([i for i in ids if i != -1])
    assert encode('[[3]]') == [-1] * 3
    for start, gaps, given in [
        ('a[[2]][[1]]o', 3, 'ao'),
        ('\\[[2]]', 0, '[[2]]'),
        ('[[a]] [[ ]]', 0, '[[a]] [[ ]]'),
        ('\\\\[[2]]', 0, '\\[[2]]'),
        ('[ [2]]\\[2', 0, '[ [2]]\\[2'),
        ('[[[2]]]', 2, '[]'),
    ]:
        ids = encode(start)
        assert (ids.count(-1), text(ids)) == (gaps, given)
    with pytest.raises(PrepareError, match=r'gap of no tokens, \[\[0\]\]'):
        encode('love[[0]]')
    assert sample.until([1, 2, 9, 3, 9, 4], 9, {0, 1, 3}) == [1, 2, 3]
    assert sample.until([9, 1, 9, 2], 9, {0}) == [9, 1]
    assert sample.until([1], None, set()) == [1]

def test_settings_reach_generate_or_are_refused(sample_py):
    for args, word in [
        ('--sampler=fixed --confidence_threshold=0.5', 'sampler fixed has no use for confidence_threshold=0.5'),
        ('--order=luck', 'expected one of random'),
        ('--remask=a', 'remask must be float or None (default None), got str a'),
        ('--steps=2.5', 'steps must be int or None'),
        ('--sampler=[1]', "sampler is '[1]', expected one of first_hitting"),
        ('--max_new_tokens=0', 'max_new_tokens is 0, expected at least 1, or 0 and a gap like [[40]]'),
        ('--num_samples=0', 'num_samples is 0'),
    ]:
        assert word in sample_py('mdlm', '--start=my', *args.split(), code=2)[1]
    assert 'ar has no use for --guidance' in sample_py('ar', '--guidance=1', code=2)[1]
    assert 'a prompt has a gap' in sample_py('ar', '--start=my[[4]]love', code=2)[1]
    args = '--start=my --max_new_tokens=20 --num_samples=2 --sampler=fixed --steps=5 --guidance=1'
    _, err = sample_py('mdlm', *args.split())
    assert '40 tokens at most, 20 network evaluations' in err
    takes = inspect.signature(build('mdlm').generate).parameters
    names = [k for k in takes if k not in ('idx', 'on_step', 'block_ids')]
    assert all(hasattr(sample, k) for k in names) # the same names here and there

class Screen(io.StringIO):
    def isatty(self):
        return self.tty

@pytest.mark.parametrize('tty', [True, False])
def test_progress(monkeypatch, tty):
    """ on stderr, at intervals; on a terminal one line, which is cleared before text is printed """
    clock, err, out = [100.0], Screen(), Screen()
    err.tty = out.tty = tty
    monkeypatch.setattr(sample.time, 'time', lambda: clock[0])
    monkeypatch.setattr(sys, 'stderr', err)
    monkeypatch.setattr(sys, 'stdout', out)
    progress = sample.Progress(40, 2)
    printer, idx = sample.Printer(Tokenizer(META).decode, progress), torch.full((1, 42), -1)
    idx[0, :2], idx[0, 22:32] = 0, 0
    for now in 100.1, 110.0, 110.1:
        clock[0] = now
        printer(1, idx, None, {'nfe': 1, 'done': 0})
    said = '10 of 40 tokens, 10 s, 30 s left'
    assert err.getvalue() == (f'\r{said}\033[K' if tty else f'{said}\n')
    assert out.getvalue() == ''
    clock[0] = 130.0
    printer(2, idx, None, {'nfe': 2, 'done': 2})
    assert len(out.getvalue()) == 2
    assert err.getvalue().endswith('\r\033[K' if tty else '30 s, 90 s left\n')
