"""
Laws of question, plan and execution: which part sees which, that nothing sees pads, and that generation
sees what training saw. Ids 0 to 3 are text, 4 is the end, 6 begins, 7 is [MASK], 8 pads.
"""
import itertools
import json
import os
from unittest import mock

import numpy as np
import pytest
import torch

import model as models
import prepare
from model import UserError, block_ids, dense_mask, load_checkpoint
from prepare import Layout
from tests.test_diffusion import build
from tests.test_train import here # noqa: F401, a fixture
from tools import answers, plot

ROOT = os.path.dirname(os.path.abspath(prepare.__file__))
SEGMENTS, WITH_CHECK = 'question:4,plan:4,execution:8', 'question:4,plan:4,check:2,execution:6'
META = dict(end_id=4, pad_id=8)
RECORDS = [
    [[1, 2], [3], [1, 2, 3, 0, 0]],
    [[1, 2, 3], [0, 1, 2], []],
    [[0], [], [3, 2, 1]],
    [[2, 2], [1, 0], [3, 3, 3, 3, 3, 3, 3]],
]
WAYS = [ # objective and settings
    ('mdlm', dict(attention='hierarchical')),
    ('mdlm', dict(attention='hierarchical', causal_within_block=True)),
    ('bd3lm', dict(attention='hierarchical')),
    ('bd3lm', dict(attention='hierarchical', diffusion_block_size=2)),
    ('bd3lm', dict(attention='hierarchical', diffusion_block_size=2, begin_id=6)),
    ('bd3lm', dict(attention='hierarchical', diffusion_block_size=1)),
    ('bd3lm', dict(attention='hierarchical', diffusion_block_size=4, begin_id=6, causal_within_block=True)),
    ('bd3lm', dict(attention='hierarchical', diffusion_block_size=2, segments=WITH_CHECK)),
]
FULL = [
    ('mdlm', dict(attention='full')),
    ('bd3lm', dict(attention='block', diffusion_block_size=2)),
]
name = lambda way: '-'.join(map(str, (way[0], *way[1].values())))
every_way = pytest.mark.parametrize('way', WAYS, ids=name)

def tensors(arrays):
    """ the arrays of a batch as tensors; other values as they are """
    return {k: torch.from_numpy(v) if isinstance(v, np.ndarray) else v for k, v in arrays.items()}

def make(way):
    """ (model, layout, batch) of 16 tokens """
    segments = way[1].get('segments', SEGMENTS)
    model = build(way[0], **{'segments': segments, 'block_size': 16, 'vocab_size': 9, **way[1]})
    layout, records = Layout({**META, 'segments': segments}, model.id_list), RECORDS
    if segments != SEGMENTS: # with a check between plan and execution
        records = [[question, plan, [1], execution[:5]] for question, plan, execution in RECORDS]
    return model, layout, tensors(layout.rows(layout.raw(records)))

def hide(batch):
    """ the text (B, T) with about half of the scored tokens masked """
    idx, scored = batch['idx'], batch['targets'] != -1
    return idx.masked_fill((torch.rand(idx.shape) < 0.5) & scored, 7)

def two_streams(model, xt, batch, **more):
    """ the states of the noisy text xt, given the clean text of the batch """
    return model.two_stream(xt, batch['idx'], batch['block_ids'], **more)

def denoised(model, xt, batch):
    """ the logits of the noisy text xt, given the batch that it was made from """
    return model.logits(model.denoise(xt, batch['idx'], batch['block_ids']))

# ---- who sees whom

def is_seen(viewer, seen):
    """ whether one token sees another, by the rule in words; a token is (segment, block within it, noisy or not) """
    (segment, block, noisy), (seen_segment, seen_block, seen_noisy) = viewer, seen
    own = segment == seen_segment
    if seen_noisy: # a noisy token is seen by its own noisy block alone, and the question is one block
        return noisy and own and (segment == 0 or block == seen_block)
    if segment == 0:
        return own and not noisy
    # a clean token is seen by later segments, by later blocks of its own, and by its own block if that is clean
    if own:
        return block > seen_block or (not noisy and block == seen_block)
    return segment > seen_segment

@pytest.mark.parametrize('n', [None, 2])
def test_the_table_of_five_parts(n):
    """ question, noisy and clean plan, noisy and clean execution: who sees whom; for more segments just as well """
    for lengths in (2, 4, 6), (3, 2, 4), (2, 2, 2, 4):
        T = sum(lengths)
        ids = block_ids('hierarchical', T, n, lengths)
        mask = dense_mask(ids.repeat(2), torch.arange(2 * T) < T)
        tokens = [(segment, i // (n or length)) for segment, length in enumerate(lengths) for i in range(length)]
        rows = [(*token, noisy) for noisy in (True, False) for token in tokens]
        for (i, viewer), (j, seen) in itertools.product(enumerate(rows), repeat=2):
            assert mask[i, j] == is_seen(viewer, seen), (lengths, i, j)


def test_one_id_per_token_is_ar_and_one_for_all_is_bert():
    """ P19: the hierarchy's two ends, and uniform blocks are block diffusion """
    assert torch.equal(block_ids('hierarchical', 6, 1, (1, 2, 3)), block_ids('causal', 6))
    assert torch.equal(block_ids('hierarchical', 6, 2, (2, 4)), block_ids('block', 6, 2))
    causal = dense_mask(block_ids('hierarchical', 6, None, (2, 2, 2)), question=0)
    expected = torch.ones(6, 6).tril().bool()
    expected[:2, :2] = True # the question sees all of itself
    assert torch.equal(causal, expected)
    two = dense_mask(block_ids('hierarchical', 4, None, (2, 2)).repeat(2), torch.arange(8) < 4, question=0)
    assert two[2].tolist() == [False, False, True, False, True, True, False, False]
    assert two[7].tolist() == [False] * 4 + [True] * 4

@every_way
def test_by_gradient_later_segments_and_pads_move_nothing(way):
    """
    By d logits / d embeddings, through one stream and through two: the question depends on the question
    only, the plan on no execution, and nothing on a pad.
    """
    model, layout, batch = make(way)
    xt, seen, embed = hide(batch), [], model.embed
    model.embed = lambda idx, pos: seen.append(embed(idx, pos).detach().requires_grad_()) or seen[-1]
    pad, segment = batch['idx'] == 8, torch.from_numpy(layout.segment)
    def check(states, inputs, where): # where: the position of each input in the text, -1 for the begin id
        logits = model.logits(states)[..., :5]
        for b, i in (~pad).nonzero().tolist():
            grad, = torch.autograd.grad(logits[b, i].square().sum(), inputs, retain_graph=True)
            used = where[grad[b].abs().sum(-1) > 0]
            at = used[used >= 0]
            assert not pad[b, at].any()
            assert (segment[at] <= segment[i]).all()
            assert i in at
            assert segment[i] == 0 or 0 in at # and a later segment does see the question
    states = model.one_stream(xt, batch['block_ids'])
    check(states, seen[-1], torch.arange(16))
    states = two_streams(model, xt, batch)
    begin = torch.full((model.lead,), -1)
    clean = torch.arange(seen[-1].size(1) - 16 - model.lead)
    check(states, seen[-1], torch.cat([torch.arange(16), begin, clean]))


@pytest.mark.parametrize('way', WAYS + FULL, ids=name)
@torch.no_grad()
def test_what_pads_hold_is_all_the_same(way):
    """ logits, loss and bound of the same record, whatever id the pads have """
    model, layout, batch = make(way)
    pad = batch['idx'] == 8
    other = {**batch, 'idx': torch.where(pad, torch.randint(4, pad.shape), batch['idx'])}
    assert pad.any()
    losses = [
        lambda b: model(**b)[1],
        lambda b: model.nll_bound(**b, n_samples=2)[0],
        lambda b: model.denoise(hide(b), b['idx'], b['block_ids'])[~pad],
    ]
    for f in losses:
        torch.manual_seed(5)
        first = f(batch)
        torch.manual_seed(5)
        assert torch.allclose(first, f(other), atol=1e-10)

@pytest.mark.filterwarnings('ignore:flex_attention called without')
@every_way
@torch.no_grad()
def test_flex_and_dense_masks_agree_row_by_row(way):
    """ FlexAttention with pads and blocks of each row's own, as a GPU trains and scores """
    model, layout, batch = make((way[0], {**way[1], 'n_embd': 32, 'dtype': torch.float}))
    xt, real = hide(batch), batch['idx'] != 8
    dense = denoised(model, xt, batch)
    model.config.attn_backend = 'flex'
    flex = denoised(model, xt, batch)
    assert batch['block_ids'].dim() == 2
    assert torch.allclose(dense[real][:, :5], flex[real][:, :5], atol=1e-4)

@pytest.mark.parametrize('more', [
    dict(diffusion_block_size=10),
    dict(begin_id=6),
    dict(diffusion_block_size=20, causal_within_block=True),
], ids=str)
@torch.no_grad()
def test_long_rows_are_cut_into_runs_that_leave_nothing_out(more, monkeypatch):
    """ what is computed in several parts is what one mask over all of it gives, with each row's own pads too """
    segments = 'question:150,plan:140,execution:200'
    model = build('bd3lm', attention='hierarchical', segments=segments, block_size=490, vocab_size=9, **more)
    layout = Layout({**META, 'segments': segments}, model.id_list)
    records = [[1] * 149, [2] * 30, [3] * 180], [[0] * 20, [1] * 139, [2]]
    batch = tensors(layout.rows(layout.raw(records)))
    only, xt = (batch['targets'].flatten() != -1).nonzero()[:, 0], hide(batch)
    cut, whole = [], models.whole_blocks
    monkeypatch.setattr(models, 'whole_blocks', lambda ids, size: cut.append(whole(ids, size)) or cut[-1])
    parts = two_streams(model, xt, batch, only=only)
    monkeypatch.setattr(models, 'whole_blocks', lambda ids, size: [(0, len(ids))])
    assert max(map(len, cut)) > 1
    assert torch.allclose(parts, two_streams(model, xt, batch, only=only), atol=1e-10)

@torch.no_grad()
def test_a_packed_row_is_ar_without_leaks():
    """ pads at the end change nothing; each token of plan and execution is scored once, given all before it """
    model = build('ar', block_size=16, vocab_size=9, begin_id=6, segments=SEGMENTS)
    layout = Layout({**META, 'segments': SEGMENTS})
    batch = tensors(layout.rows(layout.raw(RECORDS), length=model.row_length))
    nats, scored = model.nll_bound(**batch)
    assert scored.tolist() == [len(plan) + len(execution) + 2 for _, plan, execution in RECORDS]
    for record, total in zip(RECORDS, nats[:, 0]):
        row = [6, *record[0], 4, *record[1], 4, *record[2], 4]
        start = len(record[0]) + 2
        alone = 0
        for i in range(start, len(row)):
            logits, _ = model(torch.tensor([row[:i]]))
            alone -= logits[0, -1].log_softmax(-1)[row[i]]
        assert abs(alone - total) < 1e-9

@torch.no_grad()
def test_levels_are_spread_over_what_is_scored():
    """ one noise level in each n-th of the interval, where n counts the scored segments and no others """
    model, layout, batch = make(WAYS[0])
    _, _, t = model.corrupt(**batch)
    drawn = t[:, [4, 8]].flatten().sort().values
    assert ((drawn * 8).ceil() == torch.arange(1, 9)).all()
    assert t.max() <= 1
    plan = torch.where(torch.arange(16) < 8, batch['targets'], -1) # the first part of a curriculum
    xt, masked, t = model.corrupt(batch['idx'], plan, batch['block_ids'])
    assert ((t[:, 4].sort().values * 4).ceil() == torch.arange(1, 5)).all()
    assert not masked[:, 8:].any()
    assert not masked[:, :4].any()

@every_way
@torch.no_grad()
def test_what_is_asked_for_is_the_same_without_the_rest(way):
    """ where only hidden tokens are needed, the noisy question and the clean copy of the last block are left out """
    model, layout, batch = make(way)
    xt = hide(batch)
    only = (batch['targets'].flatten() != -1).nonzero()[:, 0]
    whole = two_streams(model, xt, batch).flatten(0, 1)
    seen, embed = [], model.embed
    model.embed = lambda idx, pos: seen.append(idx.size(1)) or embed(idx, pos)
    assert torch.allclose(two_streams(model, xt, batch, only=only), whole[only], atol=1e-10)
    assert seen == [12 + model.id_list.index(model.id_list[-1]) + model.lead]
    model.embed, rows = embed, model.loss_rows(batch['targets'] != -1, batch['block_ids'])
    assert set(only.tolist()) <= set(rows.tolist())
    assert len(rows) == 4 * 12

# ---- pads in a block of their own

ATTENTIONS = [
    ('mdlm', dict(attention='full')),
    ('mdlm', dict(attention='causal')),
]
for kind, attention, n in itertools.product(('mdlm', 'bd3lm'), ('block', 'hierarchical'), (1, 2, 4)):
    ATTENTIONS.append((kind, dict(attention=attention, diffusion_block_size=n)))

@pytest.mark.parametrize('way', ATTENTIONS, ids=name)
@torch.no_grad()
def test_every_number_of_a_record_is_as_without_its_pads(way):
    """
    A row that ends in pads, of whatever larger id, gives the numbers of the same row cut before them:
    states, likelihoods, and what is hidden.
    """
    model, layout, _ = make(way)
    row = layout.rows(layout.raw([[[1, 2, 3], [0, 1, 2], [3, 2, 1]]]))
    row, pad = {k: v.expand(64, -1) for k, v in tensors(row).items()}, torch.arange(16) >= 12
    ids = row['block_ids'].masked_fill(pad, 0)
    cut = {k: v[:, :12] for k, v in (row | {'block_ids': ids}).items()}
    row |= {'idx': row['idx'].masked_fill(pad, 8), 'targets': row['targets'].masked_fill(pad, -1)}
    bound, scored = model.nll_bound(**cut, n_samples=6)
    def first(batch):
        return {k: v[:1] for k, v in batch.items()}
    orders = {order: model.nll_order(**first(cut), order=order)[0] for order in models.ORDERS}
    for larger in [n for n in (1, 2, 9) if model.id_list[-1] + n < model.most_blocks(16)]:
        padded = row | {'block_ids': ids.masked_fill(pad, model.id_list[-1] + larger)}
        xt = hide(padded)
        states = model.denoise(xt, padded['idx'], padded['block_ids'])[:, :12]
        assert torch.allclose(states, model.denoise(xt[:, :12], cut['idx'], cut['block_ids']), atol=1e-10)
        for order, nats in orders.items():
            found = model.nll_order(**first(padded), order=order)[0]
            assert torch.allclose(found, nats, atol=1e-9)
        nats, n = model.nll_bound(**padded, n_samples=6)
        error = ((nats.mean(1).var() + bound.mean(1).var()) / 64).sqrt()
        assert torch.equal(n, scored)
        assert (nats.mean() - bound.mean()).abs() < 5 * error + 1e-9
        assert model(**padded)[1].isfinite()
        assert set(model.metrics(**padded)) == set(model.metrics(**cut))
        _, masked, t = model.corrupt(**padded)
        rows = model.loss_rows(masked, padded['block_ids'])
        assert not (masked & (padded['targets'] == -1)).any()
        assert (t > 0).all()
        assert set(masked.flatten().nonzero()[:, 0].tolist()) <= set(rows.tolist())

@torch.no_grad()
def test_block_ids_of_a_prompt_are_the_config_s_but_for_pads():
    model, layout, _ = make(('bd3lm', dict(attention='block', diffusion_block_size=2)))
    prompt, way = tensors(layout.prompt([[1], [1, 2, 3]])), dict(order='left_to_right', temperature=0)
    out = model.generate(**prompt, **way)
    for larger in 1, 100:
        ids = prompt['block_ids'] + larger * (prompt['block_ids'] > model.id_list[-1])
        assert torch.equal(model.generate(**{**prompt, 'block_ids': ids}, **way), out)
    other = prompt['block_ids'].clone()
    other[0, 8] = 3
    ids = prompt['block_ids']
    for wrong, says in (other, 'must be larger'), (ids[:, :8], 'expected'), (ids[:1], 'expected'):
        with pytest.raises(UserError, match=says):
            model.generate(**{**prompt, 'block_ids': wrong})
    with pytest.raises(UserError, match='outgrows the context'):
        model.generate(prompt['idx'], 4, block_ids=torch.zeros(2, 20, dtype=torch.long))

# ---- generation

def ask(model, layout, questions, **options):
    """
    -> (text, looks, number of calls): what the model writes, and for every call
    (where its block ends, rows and columns of what is hidden, their states, the text up to there)
    """
    looks, states = [], models.Window.states
    def spy(window, s, e, b, i):
        text = window.out[:, :e].clone()
        looks.append((e, b, s + i, states(window, s, e, b, i), text.masked_fill(text == -1, 7)))
        return looks[-1][3]
    prompt, calls = tensors(layout.prompt(questions)), []
    def on_step(step, idx, probs, state):
        calls.append(state['nfe'])
    with mock.patch.object(models.Window, 'states', spy):
        out = model.generate(**prompt, stop=4, on_step=on_step, **options)
    return out, looks, calls[-1]

def compare_looks(model, rows, looks):
    """
    How many states of the calls were compared.
    They must be those of a two-stream pass over the finished rows.
    """
    compared = 0
    for e, b, at, x, text in looks:
        xt = rows['idx'].clone()
        xt[b, at] = 7 # what was hidden in the call
        states = two_streams(model, xt, rows)[b, at]
        # A call may have seen text that was written after an end in the same block, which is not there any
        # more. Such rows are left out.
        same = ((xt[:, :e] == text) | (rows['idx'][:, :e] == 8)).all(1)[b]
        assert torch.allclose(x[same], states[same], atol=1e-9)
        compared += int(same.sum())
    return compared

@every_way
@torch.no_grad()
def test_generation_sees_what_training_saw(way):
    """
    Every call, cached and with each row's own pads, has the states of a two-stream pass over the finished
    rows. Stops end segments, not rows.
    """
    model, layout, _ = make(way)
    model.unseen[4] = 3.0 # ends enough
    stopped = compared = 0
    for seed in range(120):
        if stopped >= 2 and compared > 20:
            break
        torch.manual_seed(seed)
        questions = [[1], [1, 2, 3]]
        out, looks, nfe = ask(model, layout, questions, order='left_to_right', temperature=2.0)
        records = [[part.tolist() for part in layout.parts(row).values()] for row in out]
        rows = tensors(layout.rows(layout.raw(records)))
        full = [len(p) == n for parts in records for p, n in zip(parts, layout.lengths.values())]
        if any(full): # the data have no segment without an end
            continue
        stopped += 1
        pad = rows['idx'] == 8
        assert torch.equal(out[~pad], rows['idx'][~pad]) # the row is one that training could have shown
        assert nfe == len(looks)
        compared += compare_looks(model, rows, looks)
    assert stopped >= 2
    assert compared > 20

@torch.no_grad()
def test_network_calls_end_with_the_segments():
    """ blocks that are past every row's end cost nothing, and the execution begins where it should """
    model, layout, _ = make(('bd3lm', dict(attention='hierarchical', diffusion_block_size=2)))
    model.unseen[4] = 1e4 # always the end
    out, looks, nfe = ask(model, layout, [[1], [2, 3]])
    assert nfe == 4
    assert {e for e, *_ in looks} == {6, 10}
    assert (out[:, 4:] == 4).all()
    parts = [[part.tolist() for part in layout.parts(row).values()] for row in out]
    assert parts == [[[1], [], []], [[2, 3], [], []]]

@pytest.mark.parametrize('way', WAYS + FULL, ids=name)
@torch.no_grad()
def test_rows_of_a_batch_are_as_if_alone(way):
    """
    Greedy, one token per call from the left, with guidance too. The questions have different lengths,
    and the segments end at different places.
    """
    model, layout, _ = make(way)
    questions, greedy = [[1], [1, 2, 3], [0, 2], [3, 3]], dict(order='left_to_right', temperature=0)
    for options in greedy, dict(guidance=0.5, **greedy), dict(sampler='fixed', steps=12, **greedy):
        together, _, _ = ask(model, layout, questions, **options)
        for question, row in zip(questions, together):
            alone, _, _ = ask(model, layout, [question], **options)
            assert torch.equal(alone[0], row)

@torch.no_grad()
def test_ar_writes_every_segment_and_stops_after_the_last():
    model = build('ar', block_size=16, vocab_size=9, begin_id=6, segments=SEGMENTS)
    layout = Layout({**META, 'segments': SEGMENTS})
    torch.manual_seed(1)
    prompt = tensors(layout.prompt([[1], [1, 2, 3], [0, 2]] * 4))
    out = model.generate(prompt['idx'], prompt['max_new_tokens'], stop=4, temperature=2.0)
    lengths = set()
    for row in out:
        ends = (row == 4).nonzero()[:, 0].tolist()
        if len(ends) >= 3: # question, plan, execution
            assert set(row[ends[2]:].tolist()) == {4}
            lengths.add(ends[2])
            names = [*layout.parts(row)]
            assert names == ['question', 'plan', 'execution'][:len(names)]
    assert len(lengths) > 2

def test_causal_within_block_is_for_hierarchies():
    with pytest.raises(UserError, match='attention=hierarchical'):
        build('mdlm', causal_within_block=True)
    with pytest.raises(UserError, match='expected lengths like'):
        build('mdlm', attention='hierarchical', segments='question:4,plan:-4')

# ---- as a user

@pytest.fixture(scope='module')
def problems(tmp_path_factory):
    folder = tmp_path_factory.mktemp('data') / 'arithmetic'
    prepare.prepare('arithmetic', str(folder), max_records=200, difficulty=1)
    return folder

SMALL = '''
    --block_size=0 --batch_size=4 --n_layer=1 --n_head=2 --n_embd=16 --max_iters=3 --warmup_iters=1
    --eval_interval=3 --eval_iters=1 --bound_samples=1 --scoreboard_windows=4 --device=cpu
    --compile=False --curriculum=0.5
'''.split()
QUESTION = 'Ann has 7 figs. Bob has 5 more than Ann. How many has Bob?'

@pytest.mark.parametrize('args', [
    '--objective=ar',
    '--objective=mdlm --attention=hierarchical',
    '--objective=bd3lm --attention=hierarchical --diffusion_block_size=8',
    '--objective=bd3lm --diffusion_block_size=8 --skip=plan',
    '--objective=mdlm --attention=full',
])
def test_train_and_ask(problems, tmp_path, here, args):
    """ objectives differ by one word and train on the same rows; answers come under labels """
    here('train.py', *SMALL, *args.split(), f'--dataset={problems}', f'--out_dir={tmp_path}/run')
    here('train.py --init_from=resume --max_iters=4', f'--out_dir={tmp_path}/run')
    text = here('sample.py --num_samples=1', f'--out_dir={tmp_path}/run', f'--start={QUESTION}')
    shown = [line for line in text.split('\n') if line in ('question:', 'plan:', 'execution:')]
    if 'skip' in args:
        assert shown == ['execution:']
    elif args == '--objective=ar': # which writes what it likes, and may stop early
        assert shown == ['plan:', 'execution:'][:len(shown)]
    else:
        assert shown == ['plan:', 'execution:']
    for start, says in [
        (f'--start={3 * QUESTION}', 'at most 135'),
        ('--start=Ürs?', 'unknown character'),
        ('--seed=1', 'give one with --start'),
    ]:
        assert says in here('sample.py', f'--out_dir={tmp_path}/run', start, code=2)

@pytest.mark.parametrize('args, says', [
    ('--block_size=128', 'add up to 200 tokens, block_size is 128'),
    ('--segments=2,2', 'has its own'),
    ('--skip=execution,plan', 'expected names and lengths'),
    ('--objective=bd3lm --attention=hierarchical --diffusion_block_size=12',
     'plan begins at token 136 and has 32 tokens, no whole blocks of diffusion_block_size=12'),
    ('--objective=mdlm --ar_weight=1', 'leave out ar_weight'),
    ('--curriculum=2', 'curriculum is 2'),
])
def test_wrong_settings_are_said(problems, tmp_path, here, args, says):
    run = f'--dataset={problems}', f'--out_dir={tmp_path}/run'
    assert says in here('train.py', *SMALL, *args.split(), *run, code=2)

RUNS = {
    'ar': '--objective=ar',
    'bd3lm': '--objective=bd3lm --diffusion_block_size=8',
    'short': '--objective=bd3lm --diffusion_block_size=8 --skip=plan',
}

def test_answers(problems, tmp_path, here, monkeypatch):
    """ one table of several runs; what is right counts as right; ar's nats add up; JSON beside the run """
    for name, args in RUNS.items():
        here('train.py', *SMALL, *args.split(), f'--dataset={problems}', f'--out_dir={tmp_path}/{name}')
    sizes = ['--num_samples=9', '--batch_size=4', '--bound_samples=2', '--device=cpu']
    folders = [f'{tmp_path}/{name}' for name in RUNS]
    text = here('tools/answers.py', *folders, f'{tmp_path}/bd3lm,sampler=fixed,steps=8|12', *sizes)
    assert text.count(' to 0.') == 5
    assert text.count('given generated') == 1
    found = {name: json.loads((tmp_path / name / 'answers.json').read_text()) for name in RUNS}
    assert [len(rows) for rows in found.values()] == [1, 3, 1]
    assert all(row['nfe'] <= n for row, n in zip(found['bd3lm'], (64, 8, 12)))
    assert 'plan_same' not in found['short'][0]
    assert found['bd3lm'][0]['questions'] == 9
    assert 0 < found['ar'][0]['chance'] < 1
    gpt, _ = load_checkpoint(tmp_path / 'ar' / 'ckpt_best.pt')
    corpus = prepare.Records(str(problems))
    batch = tensors(next(corpus.windows('test', 9, 201)))
    mean = gpt.nll_bound(**batch)[0].mean()
    assert abs(mean - found['ar'][0]['nats_plan'] - found['ar'][0]['nats_execution']) < 1e-3
    for run, says in [
        ('bd3lm,sampler=threshold,confidence_threshold=x', "'str'"),
        ('ar,magic=1', 'has no use for magic'),
    ]:
        assert says in here('tools/answers.py', f'{tmp_path}/{run}', *sizes, code=2)
    assert 'name the folders' in here('tools/answers.py', code=2)

    packed = corpus.layout.rows(corpus.raw('test', slice(None)))['idx']
    def solution(row):
        n = row.index(-1) if -1 in row else len(row)
        return next(r for r in packed if (r[:n] == row[:n]).all())
    def oracle(model, idx, max_new_tokens, stop=None, on_step=None, **options):
        """ writes what the data say, except in the first row of a batch """
        rows = [solution(row) for row in idx.tolist()]
        rows[0] = rows[0] * 0
        on_step(1, idx, None, {'nfe': 7})
        return torch.tensor(np.stack(rows))
    monkeypatch.setattr(type(gpt), 'generate', oracle)
    found = answers.answered('oracle', f'{tmp_path}/ar', {})[0]
    n = found['questions']
    wrong = -(-n // 32)
    assert found['accuracy'] == found['plan_same'] == (n - wrong) / n
    assert found['nfe'] == 7
    assert found['accuracy_low'] < found['accuracy'] < found['accuracy_high'] <= 1

def test_answers_and_intervals():
    thousand = answers.answer('1 + 1 = 2\n#### 1,200')
    assert thousand == answers.answer('#### $1200.00') == 1200
    assert answers.answer('#### 3 x') == '3 x'
    assert answers.answer(' so it is ') == 'so it is'
    assert answers.wilson(0, 10) == pytest.approx((0, 0.2775), abs=1e-3)
    assert answers.wilson(5, 10) == pytest.approx((0.2366, 0.7634), abs=1e-3)

def test_plain_text_in_segments_is_a_hierarchy_wherever_it_is_named(tmp_path, here):
    """ training and the picture of its mask choose the same pattern, and take the same defaults """
    (tmp_path / 'a.txt').write_text('to be or not to be ' * 100)
    prepare.prepare('text', str(tmp_path / 'text'), 'byte', input=str(tmp_path / 'a.txt'))
    small = [arg for arg in SMALL if not arg.startswith('--curriculum')] # which is for records
    args = [*small, '--objective=mdlm', '--segments=4,4,8', '--block_size=16']
    said = here('train.py', *args, f'--dataset={tmp_path}/text', f'--out_dir={tmp_path}/run')
    assert 'attention hierarchical' in said
    def read(*args):
        return plot.read_settings([*args])[0]
    assert read(*args[-3:]).attention == 'hierarchical'
    assert read('--objective=mdlm').attention == 'full'
    assert read('--objective=bd3lm').diffusion_block_size == 16

def test_masks_from_a_config_alone(tmp_path, here, monkeypatch):
    """ also of a dataset that nobody prepared; the picture shows dense_mask with lines where segments begin """
    pytest.importorskip('matplotlib')
    from matplotlib.figure import Figure
    hierarchy = '--objective=mdlm --block_size=4 '
    for args, pairs, lines in [
        ('config/train_arithmetic.py --dataset=arithmetic', None, 5),
        (hierarchy + '--segments=question:2,plan:2', 2 * 2 + 2 * 4, 1),
        (hierarchy + '--segments=2,2 --causal_within_block=True', 2 * 2 + 3 + 4, 1),
        ('--objective=ar --block_size=4', 10, 0),
    ]:
        config, own = plot.read_settings(args.split())
        monkeypatch.setattr(plot, 'objective', own['objective'])
        axes = Figure().subplots()
        plot.plot_mask(config, axes)
        shown = axes.images[0].get_array()
        assert axes.get_xlabel() == 'Key position'
        assert axes.get_ylabel() == 'Query position'
        assert len(axes.lines) == 2 * lines
        assert pairs is None or shown.sum() == pairs
    here(f'tools/plot.py mask config/train_arithmetic.py --dataset=arithmetic --output={tmp_path}/mask.png')
    assert (tmp_path / 'mask.png').stat().st_size > 1000
    assert 'expected one of ar' in here('tools/plot.py mask --objective=gpt', code=2)
