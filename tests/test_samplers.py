"""
Laws of the samplers: what they have in common, what each one promises, what an order means (P-numbers as in test_diffusion).
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
from model import ACCEPTS, ORDERS, QUOTAS, SAMPLERS, SCHEDULES, UserError, entropy, leading, ranks, reverse_steps, spread
from prepare import PrepareError, Tokenizer, vocabulary
from test_diffusion import build, tiny

KINDS = [('mdlm', {}), ('bd3lm', dict(diffusion_block_size=4)), ('bd3lm', dict(diffusion_block_size=3, begin_id=6)), ('denoise', {}),
         ('mdlm', dict(attention='hierarchical', segments='2,2,4'))]
every_kind = pytest.mark.parametrize('kind', KINDS, ids=lambda k: '-'.join([k[0], *map(str, k[1].values())]))
EVERY_WAY = [dict(sampler=s, **more) for s in SAMPLERS for more in
             [*([dict(order=o) for o in ('random', *ORDERS)] if 'order' in SAMPLERS[s] else [{}]),
              *([dict(steps=3), dict(steps=5, schedule='cosine'), dict(steps=4, remask=0.5)] if 'steps' in SAMPLERS[s] else [])]]
every_way = pytest.mark.parametrize('way', EVERY_WAY, ids=lambda w: '-'.join(map(str, w.values())))

def write(model, prompt, n, seed=0, **options):
    """ -> (what was written, [(idx, probs, state) of every call]) """
    calls = []
    torch.manual_seed(seed)
    out = model.generate(prompt, n, on_step=lambda step, idx, probs, state: calls.append((idx.clone(), probs, state)), **options)
    return out, calls

def revealed(calls):
    """ tokens per call, over all rows """
    return [len(probs) for _, probs, _ in calls]

def same(a, b):
    """ token for token, call for call """
    return torch.equal(a[0], b[0]) and len(a[1]) == len(b[1]) and all(torch.equal(x[0], y[0]) for x, y in zip(a[1], b[1]))

def empty(rows=1):
    return torch.zeros(rows, 0, dtype=torch.long)

# ---- what all have in common

@every_kind
@every_way
@torch.no_grad()
def test_given_text_stays_and_nothing_is_left_hidden(kind, way):
    """ P13: gaps of different lengths on both sides of given text, a model that is eager to write [MASK] """
    way = dict(way, steps=way['steps'] + 2) if 'steps' in way else way # at least one per block
    model = build(kind[0], **kind[1])
    torch.nn.init.constant_(model.lm_head.weight[7], 5.0)
    torch.manual_seed(1)
    prompt = torch.randint(5, (40, 8))
    prompt[:, 2:] = prompt[:, 2:].masked_fill(torch.rand(40, 6) < 0.6, -1)
    out, calls = write(model, prompt, 0, **way)
    assert out.min() >= 0 and out.max() < 5 and torch.equal(out[prompt != -1], prompt[prompt != -1])
    for idx, probs, state in calls:
        assert torch.equal(idx[prompt != -1], prompt[prompt != -1]) and idx.max() < 5
        assert torch.equal(idx[:, :state['done']], out[:, :state['done']]) # settled for good
    assert calls[-1][2]['done'] == 8
    if 'remask' not in way: # P13: what is written stays
        assert all(torch.equal(b[0][a[0] != -1], a[0][a[0] != -1]) for a, b in zip(calls, calls[1:]))

@pytest.mark.parametrize('way', [w for w in EVERY_WAY if w.get('order', 'random') != 'random'], ids=lambda w: '-'.join(map(str, w.values())))
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

STEPS = [dict(sampler=sampler, **more) for sampler in ('fixed', 'ancestral') for more in (
    {}, dict(steps=7), dict(steps=4, schedule='cosine'), dict(steps=9, remask=0.5), dict(remask=0.3))]

@pytest.mark.parametrize('way', STEPS, ids=str)
@torch.no_grad()
def test_steps_are_a_row_s_own(way, monkeypatch):
    """ rows that fill different blocks, one of them none: each as if alone; the slowest row decides the calls """
    in_blocks = [build('bd3lm', block_size=12, begin_id=6, diffusion_block_size=n) for n in (3, 4)]
    alike = lambda shape, **more: (torch.arange(shape[1]) * 0.37 % 1).expand(shape) # in all rows
    quota = lambda hidden, total, t, s: torch.where(s > 0, (t * 20 + total).long() % 3, hidden.sum(1)) # sometimes none
    monkeypatch.setattr(torch, 'rand', alike)
    monkeypatch.setitem(QUOTAS, 'ancestral', quota)
    for model in (*in_blocks, build('mdlm', block_size=12)):
        torch.manual_seed(3)
        prompt, alone = torch.randint(5, (5, 12)), []
        for row, gaps in zip(prompt, (range(1, 12), range(5, 8), (1, 2, 9, 10, 11), (), (3, 8))):
            row[list(gaps)] = -1
        together, calls = write(model, prompt, 0, temperature=0, **way)
        for given, row in zip(prompt, together):
            out, own = write(model, given[None], 0, temperature=0, **way)
            assert torch.equal(out[0], row) and len(own) <= way.get('steps', 11)
            alone.append(len(own))
        assert max(alone) <= len(calls) <= sum(alone)
        plan = model.plan(prompt == -1, way.get('steps'), way['sampler'])
        for b, row in enumerate(prompt == -1):
            own = model.plan(row, way.get('steps'), way['sampler'])
            own = [(start, s, e, int(n)) for start, _, blocks in own for s, e, n in blocks]
            assert own == [(start, s, e, int(n[b])) for start, _, blocks in plan for s, e, n in blocks if n[b]]

def test_steps_of_rows_by_hand():
    """ t and s of each row, as reverse_steps has them, then 1 and 0; a quota reads them row by row """
    for schedule in SCHEDULES:
        found = [torch.stack(pair, 1).tolist() for pair in models.row_steps(torch.tensor([2, 0, 3, 2]), schedule)]
        for b, n in enumerate((2, 0, 3, 2)):
            assert [tuple(pairs[b]) for pairs in found] == reverse_steps(n, schedule) + [(1, 0)] * (3 - n)
    hidden, total = torch.ones(3, 12).bool(), torch.tensor([12, 12, 12])
    t, s = torch.tensor([1.0, 1.0, 1.0]), torch.tensor([0.0, 0.5, 1.0])
    assert QUOTAS['fixed'](hidden, total, t, s).tolist() == [12, 6, 0]
    many = torch.stack([QUOTAS['ancestral'](hidden, total, t, s) for _ in range(1000)]).double().mean(0)
    assert many[0] == 12 and many[2] == 0 and abs(many[1].item() - 6) < 0.3

@torch.no_grad()
def test_what_there_is_to_write_decides_the_shape():
    """ (B, T + n) for no rows, no prompt and nothing to write, in every class """
    every_model = [build('ar'), build('ar', begin_id=6), build('df'), build('df', df_objective='pred_x0')]
    every_model += [build(kind[0], **kind[1]) for kind in KINDS]
    for model in every_model:
        for B, T, n in [(0, 0, 0), (0, 3, 0), (0, 0, 4), (0, 3, 4), (2, 0, 0), (2, 4, 0), (2, 3, 1)]:
            idx = torch.ones(B, T, dtype=torch.long)
            for stop in None, 1:
                out = model.generate(idx, n, stop=stop, on_step=lambda *step: None)
                assert out.shape == (B, T + n) and out.dtype == torch.long and torch.equal(out[:, :T], idx)
        assert (idx == 1).all() # the prompt is nobody's to write on

@every_way
@torch.no_grad()
def test_a_stop_token_ends_every_row_by_itself(way):
    for kind, more in ('mdlm', {}), ('bd3lm', dict(diffusion_block_size=4)):
        model, prompt = build(kind, **more), torch.full((12, 2), 3)
        out, _ = write(model, prompt, 12, stop=3, temperature=3.0, **dict(way, **({'steps': 8} if 'steps' in way else {})))
        lengths = [row.index(3) if 3 in row else 12 for row in out[:, 2:].tolist()]
        assert torch.equal(out[:, :2], prompt) and out.min() >= 0 and len(set(lengths)) > 2
        assert all(set(row[n:]) <= {3} for row, n in zip(out[:, 2:].tolist(), lengths))

SEGMENTED = [
    ('mdlm', dict(attention='hierarchical', segments='2,2,4')),
    ('bd3lm', dict(attention='hierarchical', segments='2,2,4', diffusion_block_size=2, begin_id=6)),
    ('bd3lm', dict(segments='2,4,2', diffusion_block_size=1)),
    ('bd3lm', dict(segments='1,3,4', diffusion_block_size=3)), # blocks that segments cut
    ('mdlm', dict(segments='2,2,4')),
    ('denoise', dict(attention='causal', segments='4,4')),
    ('mdlm', dict(attention='block', segments='2,2,4', diffusion_block_size=2)),
]

@pytest.mark.parametrize('kind', SEGMENTED, ids=str)
@torch.no_grad()
def test_a_stop_ends_its_segment_wherever_the_text_ends(kind):
    """ within a segment, in the question, past the context, where the last segment goes on and a hierarchy says no """
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
        else:
            out = model.generate(prompt, n, stop=3, temperature=2.0, **way)
            assert out.shape == (6, T + n) and torch.equal(out[:, :T], prompt) and out.min() >= 0
            for row in out.tolist():
                for a, z in zip(edges, [*edges[1:-1], T + n]):
                    own = row[max(a, T):z]
                    assert 3 not in own or set(own[own.index(3):]) == {3}
                    stopped += 3 in own[:-1]
    assert stopped > 15

@pytest.mark.parametrize('more, N', [(dict(attention='hierarchical'), 8), ({}, 8), (dict(begin_id=6), 14)])
@torch.no_grad()
def test_nobody_sees_what_follows_the_block_of_a_stop(more, N, monkeypatch):
    """ a plan that stopped is read up to its stop, in a new window too, as if the rest of it did not exist """
    model, calls = build('bd3lm', segments='2,4,2', diffusion_block_size=1, **more), []
    note = lambda step, idx, probs, state: calls.append(probs[0])
    script = torch.tensor([1, 2, 0, 3, 3, 3] + [4, 1] * 4) # column 3 is the stop
    written = iter([2, 3, *range(6, N)])
    monkeypatch.setattr(models, 'draw', lambda probs: script[[next(written)]])
    out = model.generate(script[None, :2], N - 2, stop=3, on_step=note)
    assert out[0].tolist() == script[:N].tolist() and len(calls) == N - 4
    lead = model.lead
    for c, probs in zip([2, 3, *range(6, N)], calls):
        start = 0 if c < 8 else c // 4 * 4 - 4
        columns = torch.tensor([j for j in range(start, c + 1) if j not in (4, 5)])
        text = script[columns].masked_fill(columns == c, 7)
        text, pos = F.pad(text, (lead, 0), value=6)[None], F.pad(columns - start + lead, (lead, 0))
        ids = F.pad(model.ids[columns - start] + lead, (lead, 0))
        states = model.trunk(model.embed(text, pos), pos, models.dense_mask(ids))
        assert torch.allclose(model.logits(states[0, -1]).softmax(-1), probs.double(), atol=1e-6), c

@torch.no_grad()
def test_every_call_is_counted():
    """ NFE, against the passes through the trunk; a guided call is two """
    for kind, more in ('mdlm', {}), ('bd3lm', dict(diffusion_block_size=4)):
        model = build(kind, **more)
        rows, trunk = [], model.trunk
        model.trunk = lambda x, *a, **k: rows.append(len(x)) or trunk(x, *a, **k)
        for way in EVERY_WAY:
            for guidance in 0.0, 0.5:
                rows.clear()
                _, calls = write(model, torch.tensor([[1, 2]] * 3), 6, guidance=guidance, **way)
                assert calls[-1][2]['nfe'] == sum(rows) // 3 and set(rows) == {3 + 3 * (guidance > 0)} and len(calls) == len(rows)

@pytest.mark.parametrize('sampler', list(SAMPLERS))
@torch.no_grad()
def test_logits_only_where_they_are_needed(sampler):
    """ in random order only of what is revealed; all that is hidden where an order or a bound must see them """
    model, seen = build('mdlm'), []
    logits = model.logits
    model.logits = lambda x: seen.append(len(x)) or logits(x)
    for order in 'random', 'margin':
        if order == 'random' or 'order' in SAMPLERS[sampler]:
            seen.clear()
            _, calls = write(model, empty(2), 8, sampler=sampler, order=order)
            before = [16] + [int((idx == -1).sum()) for idx, *_ in calls[:-1]]
            assert seen == (before if order == 'margin' or sampler in ACCEPTS else revealed(calls))

@pytest.mark.parametrize('remask', [0.0, 0.5])
@pytest.mark.parametrize('guidance', [0.0, 1.5])
@torch.no_grad()
def test_every_call_reads_what_stands(guidance, remask):
    """ its distributions and its choice, from the text that the call before left; what is called settled stays """
    model, given = build('mdlm'), torch.tensor([[1, 3, -1, -1, -1, 0, -1, -1]])
    states = lambda x: model.logits(model.one_stream(x.masked_fill(x == -1, 7)))[0, :, :5]
    for seed in range(10):
        out, calls = write(model, given, 8, seed, sampler='fixed', order='confidence', steps=16, guidance=guidance, remask=remask)
        before, calls = given, [c for c in calls if (c[0][:, 8:] == -1).all()] # the first window
        for idx, probs, state in calls:
            u = states(before.masked_fill(given != -1, -1))
            p = (u + (1 + guidance) * (states(before) - u)).softmax(-1)
            hidden = (before[0] == -1).nonzero()[:, 0].tolist()
            first = sorted(hidden, key=lambda i: (-ORDERS['confidence'](p)[i].item(), i))[:len(probs)]
            assert torch.allclose(probs[:, :5].double(), p[sorted(first)], atol=1e-5)
            assert torch.equal(idx[:, :state['done']], out[:, :state['done']])
            before = idx[:, :8]
        assert len(calls) > 4

# ---- orders

@pytest.mark.parametrize('order', list(ORDERS))
@pytest.mark.parametrize('kind', [('mdlm', dict(V=2)), ('bd3lm', dict(V=3, diffusion_block_size=2, begin_id=6))])
@torch.no_grad()
def test_one_token_per_call_in_an_order_is_the_model_of_nll_order(kind, order):
    """ chi-squared on a space small enough to list, bins that expect fewer than 5 pooled """
    model, x = tiny(kind[0], **kind[1])
    p, n, V = (-model.nll_order(x, x, order)[0].double()).exp(), 20000, kind[1]['V']
    out, calls = write(model, empty(n), 4, order=order)
    assert revealed(calls) == [n] * 4
    counts = torch.bincount((out * V ** torch.arange(3, -1, -1)).sum(1), minlength=len(x)).double()
    rare = p * n < 5
    bins = [*zip(counts[~rare].tolist(), (p * n)[~rare].tolist()), *([(counts[rare].sum().item(), (p * n)[rare].sum().item())] if (p * n)[rare].sum() > 1 else [])]
    chi2, df = sum((c - e) ** 2 / e for c, e in bins), len(bins) - 1
    assert chi2 < df + 4 * math.sqrt(2 * df) + 8

@torch.no_grad()
def test_an_order_looks_at_the_model_alone():
    """ at temperature 1, before top_k and top_p: the first token to be revealed is the same whatever is drawn """
    model = build('mdlm')
    for order in ORDERS:
        first = [(write(model, torch.tensor([[1, 4]]), 6, seed, order=order, **how)[1][0][0] != -1).tolist()
                 for seed, how in enumerate([{}, dict(temperature=0), dict(temperature=5.0), dict(top_k=1), dict(top_p=0.1)])]
        assert all(f == first[0] for f in first) and sum(first[0][0]) == 3

@torch.no_grad()
@pytest.mark.parametrize('kind, favourite', [('mdlm', 'margin'), ('bd3lm', 'left_to_right'), ('denoise', 'random')])
def test_the_order_nobody_chose(kind, favourite):
    """ is the class's own; random where a fixed number is revealed, not chosen for being sure """
    model, prompt = build(kind, **({'diffusion_block_size': 4} if kind == 'bd3lm' else {})), torch.tensor([[1], [4]])
    for way, order in ({}, favourite), (dict(sampler='threshold'), favourite), (dict(sampler='fixed', steps=5), 'random'):
        found = {o: write(model, prompt, 7, **way, order=o) for o in (None, 'random', *ORDERS)}
        assert [o for o in ('random', *ORDERS) if same(found[None], found[o])] == [order]

def test_orders_by_hand():
    p = torch.tensor([[0.5, 0.5, 0.0], [0.6, 0.2, 0.2], [0.55, 0.4, 0.05]])
    first = {name: ORDERS[name](p).argmax().item() for name in ORDERS}
    assert first == {'left_to_right': 0, 'confidence': 1, 'entropy': 0, 'margin': 1}
    assert torch.allclose(entropy(p)[0], torch.tensor(math.log(2)))
    key, hidden = torch.tensor([[2.0, 9.0, 1.0, 3.0, 3.0]]), torch.tensor([[True, False, True, True, True]])
    assert ranks(key, hidden).tolist() == [[2, 4, 3, 0, 1]] and leading(key, hidden, torch.tensor([9])).tolist() == hidden.tolist()
    assert leading(key, hidden, torch.tensor([1])).int().tolist() == [[0, 0, 0, 1, 0]]
    assert spread(torch.tensor([5.0, 6.0, 7.0, 8.0]), hidden).tolist() == [[5, 0, 6, 7, 8]]

@torch.no_grad()
def test_confidence_decoding_by_hand():
    """ P14: one token per call, temperature 0: the likeliest token at the position where it is likeliest; blocks of one: left to right """
    model, text = build('mdlm'), torch.full((1, 8), 7)
    out, calls = write(model, empty(), 8, order='confidence', temperature=0)
    for idx, *_ in calls:
        p = model.logits(model.one_stream(text)).softmax(-1)[0]
        best = p.max(-1).values.round(decimals=4).masked_fill(text[0] != 7, -1).argmax() # where all is hidden all are alike
        text[0, best] = p[best].argmax()
        assert torch.equal(idx.masked_fill(idx == -1, 7), text)
    model = build('bd3lm', diffusion_block_size=1, begin_id=6)
    assert len({tuple(write(model, torch.tensor([[2]]), 7, order=order, temperature=0)[0][0].tolist()) for order in ('random', *ORDERS)}) == 1

# ---- what each sampler promises

@every_kind
@pytest.mark.parametrize('order', ['random', *ORDERS])
@torch.no_grad()
def test_samplers_agree_where_they_reveal_one_token_per_call(kind, order):
    """ fixed with as many steps as tokens, a threshold that nothing exceeds, no budget at all: first_hitting, token for token """
    model, prompt = build(kind[0], **kind[1]), torch.tensor([[1, 2, 3], [4, -1, -1], [0, 2, -1]])
    one = write(model, prompt, 5, order=order)
    assert max(revealed(one[1])) <= 3
    for sampler, options in ('threshold', dict(confidence_threshold=1.1)), ('entropy_bound', dict(entropy_budget=0)):
        other = write(model, prompt, 5, sampler=sampler, order=order, **options)
        if order != 'random': # or else these, which look before they choose, use other random numbers
            assert same(one, other), sampler
        assert revealed(other[1]) == revealed(one[1])
    rows = prompt[[0, 0], :2] # fixed gives a row that has less to write fewer tokens per call
    one = write(model, rows, 6, order=order)
    assert same(one, write(model, rows, 6, order=order, sampler='fixed')) and revealed(one[1]) == [2] * 6
    if not model.blockwise:
        assert same(one, write(model, rows, 6, order=order, sampler='fixed', steps=6))

@torch.no_grad()
def test_fixed_splits_evenly():
    """ P14: the counts of a block add up, differ by at most one when linear, follow the cosine when not; rows have their own """
    for total in range(1, 20):
        for steps in range(1, 25):
            for schedule in SCHEDULES:
                hidden, counts = torch.tensor([total, 7]), []
                for t, s in reverse_steps(steps, schedule):
                    row = torch.arange(20) < hidden[:, None]
                    counts.append(QUOTAS['fixed'](row, torch.tensor([total, 7]), t, s).tolist())
                    hidden = hidden - torch.tensor(counts[-1])
                for own, n in zip(zip(*counts), (total, 7)):
                    assert sum(own) == n and min(own) >= 0
                    if schedule == 'linear':
                        assert max(own) - min(own) <= 1
                    else: # behind the curve by less than one token
                        left = [n - sum(own[:i + 1]) for i in range(steps)]
                        assert all(-1e-6 < k - n * math.cos(math.pi / 2 * (i + 1) / steps) < 1 + 1e-6 for i, k in enumerate(left))
    model = build('mdlm', block_size=32)
    assert revealed(write(model, empty(), 32, sampler='fixed', steps=8)[1]) == [4] * 8
    assert revealed(write(model, empty(), 32, sampler='fixed', steps=4, schedule='cosine')[1]) == [2, 7, 10, 13]
    model = build('bd3lm', diffusion_block_size=4)
    assert revealed(write(model, empty(), 8, sampler='fixed', steps=4, order='margin')[1]) == [2] * 4

@torch.no_grad()
def test_ancestral_follows_its_schedule():
    """ P12 with both schedules: the share still hidden after every step """
    model = build('mdlm', dtype=torch.float)
    for schedule in SCHEDULES:
        _, calls = write(model, empty(2000), 8, sampler='ancestral', steps=4, schedule=schedule)
        left = [(idx == -1).double().mean().item() for idx, *_ in calls]
        assert len(left) == 4 and left[-1] == 0
        for (_, s), share in zip(reverse_steps(4, schedule), left):
            assert abs(share - s) < 4 * math.sqrt(s * (1 - s) / 16000) + 1e-9
    assert [round(s, 3) for _, s in reverse_steps(3, 'cosine')] == [0.866, 0.5, 0.0] and reverse_steps(1, 'linear') == [(1, 0)]

@pytest.mark.parametrize('order', ['random', 'margin'])
@torch.no_grad()
def test_bounds_decide_by_what_is_predicted(order):
    """ every call against its definition, with the distributions that a pass over the text so far gives """
    model = build('mdlm')
    for sampler, name, bounds in ('threshold', 'confidence_threshold', (0.3, 0.5, 0.8)), ('entropy_bound', 'entropy_budget', (0.5, 2.0, 100.0)):
        several = 0
        for bound in bounds:
            out, calls = write(model, torch.tensor([[2, -1, -1, -1, 3, -1, -1, -1]] * 16), 0, sampler=sampler, order=order, temperature=1.5, **{name: bound})
            before = torch.tensor([[2, -1, -1, -1, 3, -1, -1, -1]] * 16)
            for idx, *_ in calls:
                p = model.logits(model.one_stream(before.masked_fill(before == -1, 7))).softmax(-1)
                for row, now, q in zip(before, idx, p):
                    hidden, new = (row == -1).nonzero()[:, 0].tolist(), ((row == -1) & (now != -1)).nonzero()[:, 0].tolist()
                    several += len(new) > 1
                    first = max(hidden, key=lambda i: (ORDERS['margin'](q)[i].item(), -i), default=None)
                    if sampler == 'threshold':
                        sure = [i for i in hidden if q[i].max() > bound]
                        assert new == sure if sure else len(new) == min(1, len(hidden)) and (order == 'random' or new == [first][:len(hidden)])
                        continue
                    h = entropy(q)
                    assert not hidden or sum(h[new]) - max(h[new]) <= bound + 1e-6 and (order == 'random' or first in new)
                    if order != 'random' and len(new) < len(hidden): # one more would have been too many
                        line = sorted(hidden, key=lambda i: (-ORDERS['margin'](q)[i].item(), i))[:len(new) + 1]
                        assert set(new) == set(line[:-1]) and sum(h[line]) - max(h[line]) > bound - 1e-6
                before = idx
        assert several
    assert revealed(write(model, empty(), 8, sampler='entropy_bound', entropy_budget=100.0)[1]) == [8]
    assert revealed(write(model, empty(), 8, sampler='threshold', confidence_threshold=0.0)[1]) == [8]

def test_the_largest_entropy_is_free():
    """ of a run of tokens in order, the largest entropy counts nothing: the others decide how far it goes """
    p = torch.tensor([[0.5, 0.5, 0], [0.9, 0.1, 0], [1, 0, 0], [0.6, 0.3, 0.1]]) # entropies .69, .33, 0, .90
    hidden, rank = torch.tensor([[True, False, True, True, True]]), torch.tensor([[1, 4, 2, 0, 3]])
    order = [3, 0, 2, 4] # positions by rank: entropies 0, .69, .33, .90, so the others have 0, 0, .33, 1.02
    for bound, n in (0, 2), (0.32, 2), (0.33, 3), (1.01, 3), (1.02, 4), (math.inf, 4):
        chosen = ACCEPTS['entropy_bound'](hidden, rank, p, bound)
        assert chosen[0].nonzero()[:, 0].tolist() == sorted(order[:n]), bound

# ---- hidden again

@pytest.mark.parametrize('sampler', ['fixed', 'ancestral'])
@torch.no_grad()
def test_remasking(sampler):
    """ the least probable of what the block has written, never what is given, never a finished block, never after the last step """
    for kind, more in ('mdlm', {}), ('bd3lm', dict(diffusion_block_size=8)), ('bd3lm', dict(diffusion_block_size=4, begin_id=6)):
        model = build(kind, block_size=16, **more)
        prompt = torch.tensor([[1, 2, -1, 3], [4, -1, -1, -1]])
        plain, none = (write(model, prompt, 12, sampler=sampler, steps=16, **o) for o in ({}, dict(remask=0.0)))
        assert same(plain, none)
        out, calls = write(model, prompt, 12, sampler=sampler, steps=16, remask=0.5)
        assert out.min() >= 0 and torch.equal(out[:, :4][prompt != -1], prompt[prompt != -1])
        states, again = [F.pad(prompt, (0, 12), value=-1)] + [idx for idx, *_ in calls], 0
        for a, b in zip(states, states[1:]):
            gone, n = (a != -1) & (b == -1), model.config.diffusion_block_size or 16
            again += gone.sum().item()
            blocks = (a == -1).any(0).nonzero()[:, 0] // n # the current one is the first with a gap
            assert not gone.any() or (gone.any(0).nonzero()[:, 0] // n == blocks.min()).all()
        assert again > 0 and len(calls) <= 16
        few, _ = write(model, prompt, 12, sampler=sampler, steps=16, remask=0.01) # less than one token
        assert torch.equal(few, plain[0])

@torch.no_grad()
def test_remasking_takes_the_least_probable():
    """ a model that ignores its context: rare tokens are hidden again as they come, so the likeliest pile up """
    model = build('mdlm', block_size=16)
    logits = torch.tensor([0.6, 0.2, 0.1, 0.05, 0.05, 0, 0, 0]).log()
    model.logits = lambda x: logits.expand(*x.shape[:-1], -1)
    model.one_stream = lambda xt, ids, only: torch.zeros(len(only), 1)
    out, calls = write(model, empty(200), 16, sampler='fixed', steps=8, remask=0.5, temperature=1.0)
    before = calls[-2][0] # after the seventh call 14 stood, 7 were hidden again
    assert ((before == -1).sum(1) == 9).all() and (before[before != -1] == 0).double().mean() > 0.95
    plain, _ = write(model, empty(200), 16, sampler='fixed', steps=8)
    assert abs((plain == 0).double().mean().item() - 0.6) < 0.04

@torch.no_grad()
def test_remasking_goes_by_the_model_s_own_probabilities():
    """ not by what temperature or top_k left of them: of tokens drawn for certain, those it doubts are hidden again """
    model, doubtful = build('mdlm', block_size=8), torch.tensor([1, 4, 6])
    sure, unsure = (torch.tensor([p, 1 - p, 0, 0, 0, 0, 0, 0]).log() for p in (0.95, 0.55))
    model.one_stream = lambda xt, ids, only: only[:, None]
    model.logits = lambda at: torch.where(torch.isin(at, doubtful), unsure, sure)
    for certain in dict(temperature=0), dict(temperature=0.01), dict(top_k=1), dict(top_p=0.1):
        out, calls = write(model, empty(), 8, sampler='fixed', steps=2, remask=0.75, order='confidence', **certain)
        assert (out == 0).all() and (calls[0][0] == -1).sum() == 7 # four written, then three of them hidden again
        out, calls = write(model, empty(), 8, sampler='fixed', steps=8, remask=0.4, order='left_to_right', **certain)
        assert (calls[4][0][0] == -1).nonzero()[:, 0].tolist() == [1, 4, 5, 6, 7], certain

# ---- guidance

@every_kind
@torch.no_grad()
def test_guidance(kind):
    """ P15: 0 is none at all; else logits = u + (1 + w)(c - u), affine in w; u is what is said without the prompt """
    model = build(kind[0], **kind[1])
    n = model.id_list.index(1) if 1 in model.id_list else 4
    prompt = torch.tensor([[1, 3, 0, 2]])[:, :n if 'segments' in kind[1] else n - 1] # the question, or most of the first block
    assert same(write(model, prompt, 8 - prompt.size(1)), write(model, prompt, 8 - prompt.size(1), guidance=0))
    spaced = lambda w: write(model, prompt, 8 - prompt.size(1), guidance=w, order='left_to_right')[1][0][1].log()[:, :5]
    odds = {w: (lambda l: l - l[:, :1])(spaced(w)) for w in (0, 0.5, 1.0, 2.0)} # up to the constant that normalises
    assert torch.allclose(odds[1.0] - odds[0], odds[2.0] - odds[1.0], atol=1e-3) and torch.allclose(odds[0.5] * 2, odds[0] + odds[1.0], atol=1e-3)
    assert not torch.allclose(odds[0], odds[1.0], atol=1e-2)
    text = F.pad(prompt, (0, 8 - prompt.size(1)), value=7)
    clean = torch.full_like(text, 7)
    c, u = ((model.two_stream(x, x) if model.blockwise else model.one_stream(x)) for x in (text, clean))
    c, u = (model.logits(x)[0, prompt.size(1), :5] for x in (c, u))
    expected = u + 3 * (c - u)
    assert torch.allclose(odds[2.0][0].double(), expected - expected[0], atol=1e-3)
    batch = prompt.repeat(3, 1)
    out, _ = write(model, batch, 8 - prompt.size(1), guidance=2.0, order='confidence', temperature=0)
    assert torch.equal(out[:, :prompt.size(1)], batch) and (out == out[0]).all()

# ---- sentences

@torch.no_grad()
def test_unknown_names_and_unused_options_end_in_sentences():
    model, prompt = build('mdlm'), torch.tensor([[1]])
    for options, word in [
            (dict(sampler='magic'), 'sampler is \'magic\', expected one of first_hitting, ancestral, fixed, threshold, entropy_bound'),
            (dict(order='luck'), "order is 'luck', expected one of random, left_to_right, confidence, entropy, margin"),
            (dict(sampler='fixed', schedule='square'), "schedule is 'square', expected one of linear, cosine"),
            (dict(steps=5), 'first_hitting has no use for steps=5: leave steps out, or take sampler ancestral | fixed'),
            (dict(sampler='threshold', steps=5), 'leave steps out'),
            (dict(sampler='ancestral', order='margin'), 'ancestral has no use for order=margin'),
            (dict(schedule='cosine'), 'no use for schedule=cosine'),
            (dict(remask=0.1), 'no use for remask=0.1'),
            (dict(sampler='threshold', remask=0.1), 'or take sampler ancestral | fixed'),
            (dict(sampler='fixed', confidence_threshold=0.9), 'or take sampler threshold'),
            (dict(sampler='threshold', entropy_budget=0), 'no use for entropy_budget=0: leave entropy_budget out, or take sampler entropy_bound'),
            (dict(sampler='fixed', remask=1.0), r'remask is 1.0, expected a share in \[0, 1\)'),
            (dict(sampler='entropy_bound', entropy_budget=-1), 'entropy_budget is -1, expected 0 or more'),
            (dict(guidance=-0.5), 'guidance is -0.5, expected 0'),
            (dict(sampler='fixed', steps=0), '0 steps are fewer than the 1 blocks')]:
        with pytest.raises(UserError, match=word):
            model.generate(prompt, 7, **options)
    with pytest.raises(UserError, match='a row without a prompt'):
        model.generate(torch.tensor([[1], [-1]]), 7, guidance=1.0)
    for name, options in SAMPLERS.items(): # every option is one of generate's, and read
        assert set(options) <= set(inspect.signature(model.generate).parameters) and (name in QUOTAS) != (name in ACCEPTS)

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
    'steps': [4], 'confidence_threshold': [0, 1, 5.0, math.inf], 'entropy_budget': [0, 5, math.inf],
    'temperature': [0, 1e-39, 1e6], 'top_k': [1, 10 ** 400], 'top_p': [1e-50, 1], 'remask': [0, 0.999],
    'guidance': [0, 1e-9, 1000], 'stop': [0, 2 ** 31 - 1], 'df_uncertainty_scale': [0, 0.5],
}
READS = {'steps': 'fixed', 'schedule': 'fixed', 'remask': 'fixed',
         'confidence_threshold': 'threshold', 'entropy_budget': 'entropy_bound'}

@pytest.mark.parametrize('kind', ['ar', 'mdlm', 'bd3lm', 'denoise', 'df'])
def test_every_option_is_checked_by_its_name(kind):
    """ one sentence that names the option, whatever was typed for it; what is on the edge works """
    more = dict(df_timesteps=4, df_sampling_timesteps=4, diffusion_block_size=4 if kind == 'bd3lm' else None)
    model, prompt = build(kind, begin_id=6, **more), torch.tensor([[1, 2]])
    takes = set(inspect.signature(model.generate).parameters) - {'idx', 'on_step', 'block_ids'}
    assert takes <= models.OPTIONS.keys() == BAD.keys()
    for name in sorted(takes):
        options = {'max_new_tokens': 5} | ({'sampler': READS[name]} if name in READS and kind != 'df' else {})
        for value in GOOD.get(name, []):
            assert model.generate(prompt, **{**options, name: value}).shape == (1, 7)
        for value in BAD[name]:
            says = f'{name} is ', f'{value} {name} are fewer', f'{value} new ones', f'df_sampling_timesteps is {value},'
            with pytest.raises(UserError, match='|'.join(map(re.escape, says))):
                model.generate(prompt, **{**options, name: value})

@pytest.mark.parametrize('dtype', [torch.float16, torch.bfloat16])
def test_half_precision_writes_at_every_edge(dtype):
    """ with logits far beyond those of any text """
    edges = dict(temperature=0), dict(temperature=1e-39), dict(temperature=1e6), dict(top_p=1e-50), dict(guidance=1000)
    for kind, more in ('ar', dict(begin_id=6)), ('mdlm', {}), ('bd3lm', dict(diffusion_block_size=4)), ('df', {}):
        model = build(kind, dtype=torch.float, n_embd=64, **more)
        torch.nn.init.normal_((model.df_head if kind == 'df' else model.lm_head).weight, std=20.0)
        for options in edges[:4 if kind == 'ar' else 5]:
            with torch.autocast('cpu', dtype):
                out = model.generate(torch.tensor([[1, 2]]), 6, **options)
            assert out.min() >= 0 and out.max() < 5

# ---- everything at once

def any_model(rng):
    """ -> (objective, model) of 1 to 9 tokens, whatever fits together """
    kind, room = rng.choice(['ar', 'mdlm', 'mdlm', 'bd3lm', 'bd3lm', 'denoise', 'df']), rng.randint(1, 9)
    own = dict(block_size=room, begin_id=rng.choice([None, 6]), pos=rng.choice(['rope', 'learned']), n_embd=8)
    if room > 1 and rng.random() < 0.5:
        cuts = [0, *sorted(rng.sample(range(1, room), rng.randint(1, min(3, room - 1)))), room]
        own['segments'] = ','.join(str(b - a) for a, b in zip(cuts, cuts[1:]))
    if kind in ('mdlm', 'bd3lm', 'denoise'):
        patterns = ['block'] + ['hierarchical'] * 3 * ('segments' in own) + ['full', 'causal'] * (kind != 'bd3lm')
        own |= dict(attention=rng.choice(patterns), diffusion_block_size=rng.randint(1, room + 1))
        own['clean_causal'] = kind == 'bd3lm' and rng.random() < 0.3
        own['causal_within_block'] = own['attention'] == 'hierarchical' and rng.random() < 0.5
    elif kind == 'df':
        own |= dict(df_timesteps=4, df_sampling_timesteps=4, df_objective=rng.choice(['pred_token', 'pred_x0']))
        own['df_chunk_size'] = rng.choice([None, 1, room])
    return kind, build(kind, rng.randrange(99), **own)

def any_prompt(rng, kind, model):
    """ -> (B, T) with gaps, and how many tokens to write after it """
    room = model.config.block_size
    B, T = rng.randint(0, 4), rng.randint(0, rng.choice([room, 2 * room + 2]))
    n = rng.choice([0, 1, max(0, room - T), rng.randint(0, 2 * room)])
    if model.config.attention == 'hierarchical' and rng.random() < 0.8: # what a hierarchy has room for
        T, n = min(T, room // 2), room - min(T, room // 2)
    prompt, same = torch.randint(5, (B, T)), torch.rand(T) < 0.4
    how = rng.choice({'ar': ['none', 'end'], 'df': ['none', 'gaps']}.get(kind, ['none', 'end', 'gaps', 'same gaps']))
    for row in prompt:
        gaps = {'none': slice(0), 'end': slice(rng.randint(0, T), None), 'gaps': torch.rand(T) < 0.4, 'same gaps': same}
        row[gaps[how]] = -1
    return prompt, n

def any_options(rng, kind, model, prompt, n):
    options = dict(temperature=rng.choice([0, 0, 1.0]), stop=rng.choice([None, None, 0, 3]))
    if kind in ('mdlm', 'bd3lm', 'denoise'):
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

def against_uncached(model, errors):
    """ every pass that uses the cache once more, over all that stands and without one; differences go to errors """
    read, settled = model.read, None
    def both(text, first, s, ids, cache, only):
        nonlocal settled
        x = read(text, first, s, ids, cache, only)
        if cache is not None:
            whole, pos = torch.cat((settled[:, :first], text), 1) if first else text, torch.arange(ids.size(-1))
            settled = whole[:, :s]
            mask = models.dense_mask(ids, pos >= s, model.config.clean_causal, question=model.question)
            y = model.trunk(model.embed(whole, pos), pos, mask)
            errors.append((x - y[:, first:].flatten(0, 1)[only]).abs().max().item())
        return x
    model.read = both

@pytest.mark.parametrize('stop', [None, 3])
@pytest.mark.parametrize('kind', ['mdlm', 'bd3lm'])
@torch.no_grad()
def test_the_cache_is_exact_where_segments_are_causal(kind, stop):
    """ causal_within_block: in the passes that read a block alone, no token sees a later one either """
    model, errors = build(kind, attention='hierarchical', segments='2,2,4', causal_within_block=True), []
    against_uncached(model, errors)
    model.generate(torch.tensor([[1, 2], [3, 0]]), 6, stop=stop)
    assert len(errors) > 4 and max(errors) < 1e-9

def leaves_no_choice(kind, model, options):
    """ is all that is written decided by the model alone? """
    sampler, order = options.get('sampler'), options.get('order')
    if kind == 'ar':
        return options['temperature'] == 0
    if order is None and kind != 'df':
        order = 'random' if sampler == 'fixed' else model.favourite_order
    return kind != 'df' and options['temperature'] == 0 and sampler != 'ancestral' and order != 'random'

@pytest.mark.parametrize('seed', range(8))
@torch.no_grad()
def test_anything_works_or_is_one_sentence(seed):
    """ given tokens stay, what is new is text, the cache is exact, and greedy rows are as if alone """
    rng, done, alone = random.Random(seed), 0, 0
    for _ in range(25):
        kind, model = any_model(rng)
        prompt, n = any_prompt(rng, kind, model)
        options, errors, text = any_options(rng, kind, model, prompt, n), [], F.pad(prompt, (0, n), value=-1)
        if hasattr(model, 'read'):
            against_uncached(model, errors)
        try:
            out = model.generate(prompt.clone(), n, on_step=lambda *step: None, **options)
        except UserError as e:
            assert 20 < len(str(e)) < 250
            continue
        assert out.shape == text.shape and torch.equal(out[text != -1], text[text != -1])
        assert ((out >= 0) & (out < 5)).all() and max(errors, default=0) < 1e-9
        done += 1
        room = model.config.block_size - (kind == 'ar' and model.config.begin_id is not None)
        fits = text.size(1) <= room or ((text == -1) == (text[:1] == -1)).all() # or else rows share their windows
        for b in range(len(prompt) if fits and leaves_no_choice(kind, model, options) else 0):
            own = options | {k: v[b:b + 1] for k, v in options.items() if k == 'block_ids'}
            assert torch.equal(model.generate(prompt[b:b + 1], n, **own)[0], out[b])
            alone += 1
    assert done > 8 and alone

# ---- sample.py

META = vocabulary('char', ['ROMEO: and my love.[]\\\n0123456789'])

@pytest.fixture(scope='module')
def checkpoints(tmp_path_factory):
    """ untrained models, as train.py would have saved them """
    paths = {}
    for name, more in ('ar', {}), ('mdlm', {}), ('bd3lm', dict(diffusion_block_size=4)):
        ids = {k: META[k] for k in ('vocab_size', 'text_size', 'begin_id', 'mask_id')}
        model = build(name, dtype=torch.float, block_size=64, **ids, **more)
        paths[name] = tmp_path_factory.mktemp(name) / 'ckpt_best.pt'
        torch.save({'format': 1, 'objective': name, 'config': dataclasses.asdict(model.config), 'model': model.state_dict(), 'ema': None,
                    'iteration': 0, 'settings': {'dataset': 'text'}, 'meta': META}, paths[name])
    return paths

@pytest.fixture
def sample_py(checkpoints, monkeypatch, capsys):
    """ the script as a command, with fresh settings, but in this process, which has torch already -> stdout, stderr """
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
    """ several gaps, of the lengths that were asked for; a literal [[; a stop in a gap ends the writing, not what is given """
    start = 'ROMEO: [[12]]and \\[[4]] my[[3]]love.\n[[1]]'
    (tmp_path / 'start.txt').write_text(start)
    expected = r'ROMEO: [\s\S]{12}and \[\[4\]\] my[\s\S]{3}love\.\n[\s\S]'
    for more in [], ['--stream=False'], ['--sampler=fixed', '--steps=16', '--remask=0.3', '--order=margin', '--guidance=0.5']:
        for given in start, f'FILE:{tmp_path}/start.txt':
            out, err = sample_py(name, f'--start={given}', '--max_new_tokens=0', '--num_samples=2', *more)
            samples = out.split('\n---------------\n')
            assert len(samples) == 3 and samples[2] == '' and all(re.fullmatch(expected, s) for s in samples[:2]), out
            assert '32 tokens at most' in err
    longer, _ = sample_py(name, '--start=ROMEO: [[4]]love.', '--max_new_tokens=3', '--num_samples=1')
    assert re.fullmatch(r'ROMEO: [\s\S]{4}love\.[\s\S]{3}\n---------------\n', longer)
    gap = lambda *more: re.fullmatch(r'ROMEO: ([\s\S]*)love\.\n---------------\n', sample_py(name, '--start=ROMEO: [[40]]love.', '--max_new_tokens=0', '--num_samples=1', *more)[0])[1]
    plain = gap()
    stop = next(c for c in plain[5:] if c.isalpha())
    assert len(plain) == 40 and gap(f'--stop={stop}') == plain[:plain.index(stop)]

def test_prompts_with_gaps():
    tokenizer, encode = Tokenizer(META), lambda start: sample.encode_prompt(Tokenizer(META), start)[0].tolist()
    text = lambda ids: tokenizer.decode([i for i in ids if i != -1])
    assert encode('[[3]]') == [-1] * 3
    for start, gaps, given in [('a[[2]][[1]]o', 3, 'ao'), ('\\[[2]]', 0, '[[2]]'), ('[[a]] [[ ]]', 0, '[[a]] [[ ]]'), ('\\\\[[2]]', 0, '\\[[2]]'),
                               ('[ [2]]\\[2', 0, '[ [2]]\\[2'), ('[[[2]]]', 2, '[]')]:
        ids = encode(start)
        assert (ids.count(-1), text(ids)) == (gaps, given)
    with pytest.raises(PrepareError, match=r'gap of no tokens, \[\[0\]\]'):
        encode('love[[0]]')
    assert sample.until([1, 2, 9, 3, 9, 4], 9, {0, 1, 3}) == [1, 2, 3] and sample.until([9, 1, 9, 2], 9, {0}) == [9, 1] and sample.until([1], None, set()) == [1]

def test_settings_reach_generate_or_are_refused(sample_py):
    for args, word in [(['--sampler=fixed', '--confidence_threshold=0.5'], 'sampler fixed has no use for confidence_threshold=0.5'), (['--order=luck'], 'expected one of random'),
                       (['--remask=a'], 'remask must be float or None (default None), got str a'), (['--steps=2.5'], 'steps must be int or None'), (['--sampler=[1]'], "sampler is '[1]', expected one of first_hitting"),
                       (['--max_new_tokens=0'], 'max_new_tokens is 0, expected at least 1, or 0 and a gap like [[40]]'), (['--num_samples=0'], 'num_samples is 0')]:
        assert word in sample_py('mdlm', '--start=my', *args, code=2)[1]
    assert 'ar has no use for --guidance' in sample_py('ar', '--guidance=1', code=2)[1]
    assert 'a prompt has a gap' in sample_py('ar', '--start=my[[4]]love', code=2)[1]
    _, err = sample_py('mdlm', '--start=my', '--max_new_tokens=20', '--num_samples=2', '--sampler=fixed', '--steps=5', '--guidance=1')
    assert '40 tokens at most, 20 network evaluations' in err
    names = [k for k in inspect.signature(build('mdlm').generate).parameters if k not in ('idx', 'on_step', 'block_ids')]
    assert all(hasattr(sample, k) for k in names) # the same names here and there

class Screen(io.StringIO):
    def isatty(self):
        return self.tty

@pytest.mark.parametrize('tty', [True, False])
def test_progress(monkeypatch, tty):
    """ on stderr, at intervals; on a terminal one line, which text clears """
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
    assert err.getvalue() == ('\r10 of 40 tokens, 10 s, 30 s left\033[K' if tty else '10 of 40 tokens, 10 s, 30 s left\n') and out.getvalue() == ''
    clock[0] = 130.0
    printer(2, idx, None, {'nfe': 2, 'done': 2})
    assert len(out.getvalue()) == 2 and err.getvalue().endswith('\r\033[K' if tty else '30 s, 90 s left\n')
