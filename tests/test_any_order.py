"""
Laws of any order: every order is a distribution, training sees exactly the earlier tokens, and generation with its
cache computes what training computed.
"""
import itertools
import math

import pytest
import torch
from torch.nn import functional as F

import model as models
from model import AOGPT, BD3LM, MDLM, GPTConfig, OrderWindow, UserError, score
from tests.test_diffusion import build, tiny

ORDERS = list(itertools.permutations(range(4)))
HIERARCHY = dict(attention='hierarchical', segments='2,2,4')
KINDS = [
    dict(diffusion_block_size=1),
    dict(diffusion_block_size=1, begin_id=6),
    dict(diffusion_block_size=3, begin_id=6),
    dict(diffusion_block_size=1, begin_id=6, pos='learned'),
    dict(diffusion_block_size=1, begin_id=6, **HIERARCHY),
    dict(diffusion_block_size=2, **HIERARCHY),
]
every_kind = pytest.mark.parametrize('kind', KINDS, ids=lambda kind: '-'.join(map(str, kind.values())))
WAYS = [
    dict(),
    dict(order='left_to_right'),
    dict(order='confidence'),
    dict(order='entropy', temperature=0.7, top_k=3),
    dict(sampler='threshold', confidence_threshold=0.3),
    dict(sampler='entropy_bound', order='margin', entropy_budget=2.0),
    dict(sampler='fixed', steps=8),
    dict(sampler='ancestral', steps=8, schedule='cosine'),
    dict(guidance=1.0),
]

def log_probs(model, x, ids):
    """ log p of texts x (B, T) in the order of block ids (T,) or (B, T), one token per group: (B,) """
    return -MDLM.nll_bound(model, x, x, 1, ids)[0][:, 0]

# ---- likelihood

def test_every_order_is_a_distribution():
    model, x = tiny('aogpt', diffusion_block_size=1, begin_id=6)
    found = [log_probs(model, x, torch.tensor(order)) for order in ORDERS]
    for log_p in found:
        assert abs(log_p.exp().sum() - 1) < 1e-9
    assert min((a - b).abs().max() for a, b in itertools.combinations(found, 2)) > 1e-3 # and each another one

def test_the_bound_is_the_mean_over_orders():
    model, x = tiny('aogpt', diffusion_block_size=1, begin_id=6)
    exact = -torch.stack([log_probs(model, x, torch.tensor(order)) for order in ORDERS]).mean(0)
    nats, scored = model.nll_bound(x, x, 600)
    assert (scored == 4).all()
    assert abs(nats.mean() - exact.mean()) < 0.01
    assert (nats.mean(1) - exact).abs().max() < 5 * (nats.std(1) / 600 ** 0.5).max()
    mixture = torch.stack([log_probs(model, x, torch.tensor(order)) for order in ORDERS]).logsumexp(0) - math.log(24)
    assert (exact > -mixture - 1e-9).all() # of the model that draws the order too

@pytest.mark.parametrize('k', [1, 2, 3])
def test_left_to_right_is_block_diffusion(k):
    """ the same weights as bd3lm, whose bound in blocks of k is drawn in the same way """
    ours = build('aogpt', diffusion_block_size=k, begin_id=6)
    theirs = BD3LM(GPTConfig(**{f.name: getattr(ours.config, f.name) for f in models.fields(GPTConfig)})).double()
    theirs.load_state_dict(ours.state_dict())
    x = torch.randint(5, (6, 8))
    view = ours.views()['left_to_right']
    found = []
    for model in view, theirs.eval():
        torch.manual_seed(0)
        found.append(model.nll_bound(x, x, 3, model.ids)[0])
    assert torch.allclose(*found, atol=1e-9)
    assert (view.bound_name, ours.bound_name) == ('nll' if k == 1 else 'nelbo', 'nelbo')
    assert score(view, [dict(idx=x, targets=x)])['sign'] == ('=' if k == 1 else '<=')
    assert view.views() == {}

@pytest.mark.parametrize('order', list(models.ORDERS))
def test_a_deterministic_order_is_a_distribution(order):
    model, x = tiny('aogpt', diffusion_block_size=1, begin_id=6)
    nats, scored = model.nll_order(x, x, order)
    assert abs((-nats).exp().sum() - 1) < 1e-9
    assert (scored == 4).all()
    if order == 'left_to_right':
        assert torch.allclose(nats, -log_probs(model, x, torch.arange(4)), atol=1e-9)
    targets = x.clone()
    targets[:, :2] = -1 # given, so the rest is a distribution for each beginning
    nats, scored = model.nll_order(x, targets, order)
    sums = torch.zeros(9, dtype=torch.double).index_add(0, x[:, 0] * 3 + x[:, 1], (-nats).exp())
    assert torch.allclose(sums, torch.ones(9, dtype=torch.double))
    assert (scored == 2).all()

# ---- training

def test_a_row_sees_exactly_the_earlier_tokens():
    """ by gradient: of a prediction with respect to the clean tokens, at every place of random orders """
    model = build('aogpt', diffusion_block_size=1, begin_id=6)
    torch.manual_seed(1)
    ids = model.permuted(torch.zeros(5, 8, dtype=torch.long))
    idx = torch.randint(5, (5, 8))
    seen = []
    def leaf(wte, inputs, output):
        seen.append(output.detach().requires_grad_())
        return seen[-1]
    model.transformer.wte.register_forward_hook(leaf)
    x = model.two_stream(torch.full_like(idx, 7), idx, ids) @ torch.randn(16, dtype=torch.double)
    for row, t in itertools.product(range(5), range(8)):
        grad, = torch.autograd.grad(x[row, t], seen[0], retain_graph=True)
        reached = grad[row].abs().sum(-1) > 0
        assert torch.equal(reached[8 + 1:], ids[row] < ids[row, t]) # clean copies, after 8 noisy rows and begin
        assert torch.equal(reached[:8], torch.arange(8) == t) # itself, and no other query
        assert reached[8] # begin

@pytest.mark.parametrize('kind', [dict(diffusion_block_size=1), dict(diffusion_block_size=3)])
def test_orders_are_permutations(kind):
    model = build('aogpt', **kind)
    own, x = model.ids.sort().values, torch.zeros(4000, 8, dtype=torch.long)
    ids = model.permuted(x)
    assert torch.equal(ids.sort(1).values, own.expand(4000, -1))
    for t, n in itertools.product(range(8), own.unique()): # every token is equally likely in every group
        share = (own == n).double().mean()
        assert abs((ids[:, t] == n).double().mean() - share) < 0.04
    left = model.permuted(x, left_to_right=0.3)
    assert abs((left == model.ids).all(1).double().mean() - 0.3) < 0.01 + (kind == KINDS[2])
    assert (model.permuted(x, left_to_right=1.0) == model.ids).all()

def test_a_hierarchy_is_permuted_inside_its_segments():
    model = build('aogpt', diffusion_block_size=1, **HIERARCHY)
    ids = model.permuted(torch.zeros(300, 8, dtype=torch.long))
    for a, z in (0, 2), (2, 4), (4, 8):
        assert torch.equal(ids[:, a:z].sort(1).values, model.ids[a:z].expand(300, -1))
    assert (ids[:, 2:4] != model.ids[2:4]).any() and (ids[:, 4:] != model.ids[4:]).any()
    pads = model.ids.clone()
    pads[6:] = pads.max() + 1
    padded = model.permuted(torch.zeros(300, 8, dtype=torch.long), pads)
    assert (padded[:, 6:] == pads[6:]).all()
    assert torch.equal(padded[:, 4:6].sort(1).values, model.ids[4:6].expand(300, -1))

@every_kind
def test_the_loss_reaches_every_parameter_and_ar_weights_begin_it(kind):
    model = build('aogpt', dtype=torch.float, **kind).train()
    x = torch.randint(5, (4, 8))
    logits, loss = model(x, x)
    loss.backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
    ar = build('ar', dtype=torch.float, pos=model.config.pos, begin_id=model.config.begin_id)
    model.load_pretrained(ar.state_dict())
    assert torch.equal(model.transformer.h[0].attn.c_attn.weight, ar.transformer.h[0].attn.c_attn.weight)

def test_what_the_loss_is_called():
    assert build('aogpt', diffusion_block_size=1).loss_name == 'ce' # some rows from left to right
    assert build('aogpt', diffusion_block_size=1, left_to_right=0.0).loss_name == 'nelbo'
    assert build('aogpt', diffusion_block_size=2, left_to_right=0.0, t_dist='bell').loss_name == 'ce'

@pytest.mark.parametrize('settings, sentence', [
    (dict(left_to_right=1.1), 'left_to_right is 1.1, expected a share'),
    (dict(clean_causal=True), 'about text from left to right'),
    (dict(diffusion_block_size=None), 'diffusion_block_size'),
    (dict(diffusion_block_size=None, **HIERARCHY), 'aogpt needs diffusion_block_size'),
    (dict(attention='full'), 'works with attention block . hierarchical'),
])
def test_wrong_settings_end_in_a_sentence(settings, sentence):
    with pytest.raises(UserError, match=sentence):
        build('aogpt', **{'diffusion_block_size': 1, **settings})

# ---- generation

def against_training(monkeypatch):
    """ repeat every call by training's two streams, one query or group at a time; returns a list of the differences """
    errors, states = [], OrderWindow.states
    def compared(window, begin, end, b, i):
        x = states(window, begin, end, b, i)
        model, later = window.model, 2 ** 30
        text = window.out.masked_fill(window.out == -1, 7)
        kept = window.kept[:, :]
        for n, row in enumerate(b.tolist()):
            column = window.at[row, i[n]]
            asked = window.at[row][window.real[row]] if model.config.diffusion_block_size > 1 else column
            ids = torch.where(kept[row], window.read_as[row], later + 1)
            ids[asked] = later
            noisy = text[row].index_fill(0, column, 7) if model.config.diffusion_block_size == 1 else text[row]
            y = model.two_stream(noisy[None], text[row][None], ids[None])[0, column]
            errors.append((x[n] - y).abs().max().item())
        return x
    monkeypatch.setattr(OrderWindow, 'states', compared)
    return errors

PROMPTS = [
    torch.tensor([[1, 2], [3, 0]]),
    torch.tensor([[1, 2, -1, 4], [3, 0, 2, -1]]),
    torch.tensor([[1, -1, -1, -1, 0, 2], [3, 0, -1, -1, -1, -1]]),
]

@every_kind
@pytest.mark.parametrize('stop', [None, 3])
@torch.no_grad()
def test_generation_computes_what_training_computed(kind, stop, monkeypatch):
    """ with its cache, in any order and by any sampler, rows with different prompts, gaps and stops """
    model, errors = build('aogpt', **kind), against_training(monkeypatch)
    for way, prompt in itertools.product(WAYS, PROMPTS):
        text, calls = F.pad(prompt, (0, 8 - prompt.size(1)), value=-1), []
        def on_step(step, idx, probs, state):
            assert torch.allclose(probs.sum(-1), torch.ones(len(probs)))
            calls.append((step, state['nfe'], state['done'], idx.clone()))
        out = model.generate(prompt, 8 - prompt.size(1), stop=stop, on_step=on_step, **way)
        assert torch.equal(out[text != -1], text[text != -1])
        assert out.min() >= 0 and out.max() < 5
        assert [step for step, *_ in calls] == list(range(1, len(calls) + 1))
        assert all(nfe == step * (1 + ('guidance' in way)) for step, nfe, *_ in calls)
        assert calls[-1][2] == 8
        for _, _, done, idx in calls:
            assert torch.equal(idx[:, :done], out[:, :done]) or stop is not None
    assert len(errors) > 200
    assert max(errors) < 1e-9

@torch.no_grad()
def test_a_stop_ends_a_row_or_its_segment():
    for kind in KINDS[1], KINDS[4]:
        model, ended = build('aogpt', **kind), 0
        model.unseen[3] = 2.0 # stops often
        segments = model.parts(8)[1:] if kind.get('segments') else [(0, 8)]
        for seed in range(10):
            torch.manual_seed(seed)
            out = model.generate(torch.tensor([[1, 2]] * 4), 6, stop=3)
            for row, (a, z) in itertools.product(out[:, :], segments):
                part = row[max(a, 2):z].tolist()
                if 3 in part:
                    ended += 1
                    assert set(part[part.index(3):]) == {3}
        assert ended > 20

@torch.no_grad()
def test_random_orders_write_their_mixture():
    """ samples against enumeration, by chi-squared; and rows from left to right against theirs """
    model, x = tiny('aogpt', diffusion_block_size=1, begin_id=6)
    mixture = torch.stack([log_probs(model, x, torch.tensor(order)) for order in ORDERS]).logsumexp(0) - math.log(24)
    left = log_probs(model, x, torch.arange(4))
    n = 20000
    for way, log_p in (dict(order='random'), mixture), (dict(order='left_to_right'), left):
        torch.manual_seed(0)
        out = model.generate(torch.zeros(n, 0, dtype=torch.long), 4, **way)
        counts = torch.bincount((out * 3 ** torch.arange(3, -1, -1)).sum(1), minlength=81).double()
        expected = log_p.exp() * n
        assert ((counts - expected) ** 2 / expected).sum() < 80 + 4 * math.sqrt(160)

@torch.no_grad()
def test_deterministic_orders_write_what_nll_order_scores():
    model, x = tiny('aogpt', diffusion_block_size=1, begin_id=6)
    n = 20000
    for order in 'confidence', 'margin':
        expected = (-model.nll_order(x, x, order)[0]).exp() * n
        torch.manual_seed(0)
        out = model.generate(torch.zeros(n, 0, dtype=torch.long), 4, order=order)
        counts = torch.bincount((out * 3 ** torch.arange(3, -1, -1)).sum(1), minlength=81).double()
        assert ((counts - expected) ** 2 / expected).sum() < 80 + 4 * math.sqrt(160)

@every_kind
@pytest.mark.parametrize('stop', [None, 3])
@torch.no_grad()
def test_rows_of_a_batch_are_as_if_alone(kind, stop):
    """ greedy, in orders that the model decides: different prompts and gaps, and stops at different times """
    for seed in range(6):
        model = build('aogpt', seed=seed, **kind)
        prompt = torch.tensor([[1, 2, -1, -1], [3, 0, 2, -1], [0, 4, -1, 1]])
        for way in [dict(order='left_to_right'), dict(order='confidence'), dict(sampler='threshold', order='margin')]:
            together = model.generate(prompt, 4, temperature=0, stop=stop, **way)
            for b in range(3):
                alone = model.generate(prompt[b:b + 1], 4, temperature=0, stop=stop, **way)
                assert torch.equal(alone[0], together[b])

@torch.no_grad()
def test_text_outgrows_the_context():
    for kind in KINDS[:4]:
        model = build('aogpt', **kind)
        for way in {}, dict(order='left_to_right'), dict(sampler='fixed', steps=20):
            out = model.generate(torch.tensor([[1, 2, -1, 3], [0, 1, 2, -1]]), 17, **way)
            assert out.shape == (2, 21)
            assert out.min() >= 0 and out.max() < 5
            assert out[0, [0, 1, 3]].tolist() == [1, 2, 3]

@pytest.mark.parametrize('options, sentence', [
    (dict(sampler='fixed', remask=0.3), 'aogpt cannot hide again what it has written'),
    (dict(sampler='fixed', steps=2), None),
])
def test_what_generate_cannot_do(options, sentence):
    model = build('aogpt', diffusion_block_size=1, begin_id=6)
    if sentence is None:
        assert model.generate(torch.zeros(1, 0, dtype=torch.long), 8, **options).shape == (1, 8)
        with pytest.raises(UserError, match='2 steps are fewer than the 3 groups of 3 tokens'):
            build('aogpt', diffusion_block_size=3).generate(torch.zeros(1, 0, dtype=torch.long), 8, **options)
        return
    with pytest.raises(UserError, match=sentence):
        model.generate(torch.zeros(1, 0, dtype=torch.long), 8, **options)

@torch.no_grad()
def test_what_is_read_is_what_training_could_show():
    """ the ids of tokens that are kept fall into segments, never cross a group's size, and a question shares one """
    for k, segments in (1, '2,2,4'), (2, '1,3,4'), (2, '3,2,3'):
        model, seen = build('aogpt', diffusion_block_size=k, attention='hierarchical', segments=segments), []
        states = OrderWindow.states
        prompt = torch.full((3, 8), -1)
        prompt[:, :model.parts(8)[0][1]], prompt[0, 5], prompt[1, 2:4] = 1, 2, 4
        def check_row(ids):
            """ ids (8,) of the tokens of a row that are kept, -1 of others """
            for a, z in model.parts(8):
                before, own = (part[part >= 0] for part in (ids[:a], ids[a:z]))
                if len(own) and len(before):
                    assert own.min() > before.max()
                if len(own) and a == 0:
                    assert len(own.unique()) == 1
                elif len(own):
                    assert own.unique(return_counts=True)[1].max() <= k
        def spy(window, begin, end, b, i):
            x = states(window, begin, end, b, i)
            for ids in torch.where(window.kept, window.read_as, -1):
                check_row(ids)
            seen.append(len(b))
            return x
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(OrderWindow, 'states', spy)
            model.generate(prompt, 0, stop=3)
        assert len(seen) > 2

@torch.no_grad()
def test_a_plan_does_not_see_a_given_execution():
    model = build('aogpt', diffusion_block_size=1, **HIERARCHY)
    first = []
    for token in range(5):
        text, calls = torch.tensor([[1, 2, -1, -1, token, 2, 1, 0]]), []
        model.generate(text, 0, order='left_to_right', on_step=lambda *step: calls.append(step[2]))
        first.append(calls[0])
    assert all(torch.equal(probs, first[0]) for probs in first)
    whole = torch.tensor([[1, 2, 3, 0, 4, 2, 1, 0]])
    targets = torch.tensor([[-1, -1, 3, 0, -1, -1, -1, -1]])
    exact = model.in_order().nll_bound(whole, targets)[0][:, 0]
    assert torch.allclose(model.nll_order(whole, targets, 'left_to_right')[0], exact.double())

@torch.no_grad()
def test_a_stop_ends_calls_and_a_text_may_be_short():
    model, calls = build('aogpt', diffusion_block_size=1, begin_id=6), []
    model.unseen[3] = 1e4 # always the stop
    model.generate(torch.tensor([[1]]), 7, sampler='fixed', steps=7, order='left_to_right', stop=3,
                   on_step=lambda *step: calls.append(step[3]['done']))
    assert calls == [8]
    model = build('aogpt', diffusion_block_size=1, begin_id=6, **HIERARCHY)
    assert model.generate(torch.tensor([[1, 2], [3, 0]]), 2, stop=3).shape == (2, 4)

@torch.no_grad()
def test_steps_are_split_over_groups():
    """ as many as there are groups suffice, in segments and in windows past the context; fewer are one sentence """
    cases = [
        (dict(attention='hierarchical', segments='2,2,4'), torch.tensor([[1, 2]]), 6, 2, 3),
        (dict(), torch.tensor([[1]]), 19, 3, 8), # windows of 7, 5, 5 and 2 new tokens
        (dict(), torch.tensor([[1, 2, 3, 0, 1, 2, 3, 0], [1, -1, -1, -1, -1, -1, -1, 2]]), 0, 3, 2),
    ]
    for more, prompt, n, k, groups in cases:
        model, calls = build('aogpt', diffusion_block_size=k, begin_id=6, **more), []
        model.generate(prompt, n, sampler='fixed', steps=groups, on_step=lambda *step: calls.append(step[0]))
        assert calls == list(range(1, groups + 1))
        with pytest.raises(UserError, match=f'{groups - 1} steps are fewer than the {groups} groups of {k}'):
            model.generate(prompt, n, sampler='fixed', steps=groups - 1)

def test_pads_stay_pads_wherever_they_stand():
    model, x = build('aogpt', diffusion_block_size=1, **HIERARCHY), torch.zeros(200, 8, dtype=torch.long)
    ids = torch.tensor([0, 0, 1, 2, 7, 4, 5, 6])
    found = model.permuted(x, ids)
    assert ((found == 7) == (ids == 7)).all()
    assert torch.equal(found[:, 5:].sort(1).values, torch.tensor([4, 5, 6]).expand(200, -1))
    for wrong in torch.arange(8) * 9, torch.tensor([0, 0, 2, 1, 3, 4, 5, 6]):
        with pytest.raises(UserError, match='block_ids are'):
            model.permuted(x, wrong)

@torch.no_grad()
def test_the_view_reads_from_left_to_right():
    view = build('aogpt', diffusion_block_size=1, begin_id=6).in_order()
    x, out = torch.randint(5, (4, 8)), []
    assert (view.permuted(x) == view.ids).all()
    view.generate(x[:1, :1], 7, on_step=lambda step, idx, probs, state: out.append((idx[0] != -1).long().tolist()))
    assert out == [[1] * n + [0] * (8 - n) for n in range(2, 9)]
    assert view.scores_orders is False and build('aogpt', diffusion_block_size=2).scores_orders is False

def test_an_own_permutation_is_no_claim_of_ours():
    own = type('Own', (AOGPT,), dict(permuted=lambda self, idx, block_ids=None, left_to_right=0.0: idx))
    assert own.bound_name is None
