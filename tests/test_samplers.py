"""
Laws of the samplers: what they have in common, what each one promises, what an order means (P-numbers as in test_diffusion).
"""
import dataclasses
import inspect
import io
import math
import re
import runpy
import sys

import pytest
import torch
from torch.nn import functional as F

import sample
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

@every_way
@torch.no_grad()
def test_a_stop_token_ends_every_row_by_itself(way):
    for kind, more in ('mdlm', {}), ('bd3lm', dict(diffusion_block_size=4)):
        model, prompt = build(kind, **more), torch.full((12, 2), 3)
        out, _ = write(model, prompt, 12, stop=3, temperature=3.0, **dict(way, **({'steps': 8} if 'steps' in way else {})))
        lengths = [row.index(3) if 3 in row else 12 for row in out[:, 2:].tolist()]
        assert torch.equal(out[:, :2], prompt) and out.min() >= 0 and len(set(lengths)) > 2
        assert all(set(row[n:]) <= {3} for row, n in zip(out[:, 2:].tolist(), lengths))

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
