"""
Laws of masked and block diffusion; where spaces are tiny enough, by enumerating them.
P1 to P21 number the properties that docstrings and comments refer to.
"""
import functools
import itertools
import math
from dataclasses import asdict

import pytest
import torch
from torch.nn import functional as F

from model import GPT, MDLM, OBJECTIVES, QUOTAS, SAMPLERS, GPTConfig, UserError, Window
from model import bell, dense_mask, leading, random_subset, reverse_steps

KINDS = [ # every way to denoise: objective, attention, block size, segments, more
    ('mdlm', dict(attention='full')),
    ('mdlm', dict(attention='causal')),
    ('mdlm', dict(attention='block', diffusion_block_size=3)),
    ('mdlm', dict(attention='hierarchical', segments='2,2,4')),
    ('bd3lm', dict(diffusion_block_size=1)),
    ('bd3lm', dict(diffusion_block_size=2)),
    ('bd3lm', dict(diffusion_block_size=3)), # ragged: 3, 3, 2
    ('bd3lm', dict(diffusion_block_size=8)),
    ('bd3lm', dict(diffusion_block_size=2, clean_causal=True, ar_weight=1.0)),
    ('bd3lm', dict(diffusion_block_size=2, begin_id=6, clean_causal=True, ar_weight=1.0)),
    ('bd3lm', dict(diffusion_block_size=3, begin_id=6)),
    ('bd3lm', dict(diffusion_block_size=8, begin_id=6)),
    ('bd3lm', dict(attention='hierarchical', segments='2,2,4', diffusion_block_size=2)),
    ('bd3lm', dict(attention='hierarchical', segments='2,2,4')),
]
def kinds(which=lambda kind: True):
    chosen = [kind for kind in KINDS if which(kind)]
    names = ['-'.join(map(str, (objective, *settings.values()))) for objective, settings in chosen]
    return pytest.mark.parametrize('kind', chosen, ids=names)
every_kind = kinds()
blockwise_kinds = kinds(lambda kind: kind[0] == 'bd3lm' or 'segments' in kind[1])

SIZES = dict(block_size=8, vocab_size=8, text_size=5, mask_id=7, n_layer=2, n_head=2, n_embd=16)

def build(objective, seed=0, dtype=torch.double, **settings):
    """ a small model with large random weights; 5 ids of text, [MASK] is 7 """
    torch.manual_seed(seed)
    own = OBJECTIVES[objective]
    settings = {**SIZES, 'attention': own.attentions[0], **settings}
    model = own(own.config_class(**settings)).to(dtype).eval()
    for p in model.parameters():
        if p.dim() == 2:
            torch.nn.init.normal_(p, std=0.4)
    return model

def tiny(objective, V=3, T=4, **settings):
    """ few enough texts to list them all: (model, (V^T, T) texts) """
    model = build(objective, block_size=T, text_size=V, vocab_size=8, **settings)
    return model, torch.tensor(list(itertools.product(range(V), repeat=T)))

def log_probs(model, xt, x0):
    """ (B, T, V): log p of every token, given the noisy xt and, where there are two streams, the clean x0 """
    return model.logits(model.denoise(xt, x0)).log_softmax(-1)

def cross_entropy(model, xt, x):
    """ nats of every true token of x (B, T), given the noisy xt: (B, T) """
    return -log_probs(model, xt, x).gather(2, x[..., None])[..., 0]

def close_to_mean(samples, expected, errors):
    """ whether the mean of the samples is the expected value, up to so many standard errors and rounding """
    error = samples.std().item() / math.sqrt(samples.numel())
    return abs(samples.mean().item() - expected) < errors * error + 1e-9

def group_positions(model, T):
    groups, G = model.groups(torch.zeros(1, T, dtype=torch.long))
    return [[i for i in range(T) if groups[0, i] == g] for g in range(G)]

def exact_nelbo(model, x):
    """ nats per text: subsets of k of a group's n tokens are hidden, with the weight (k-1)!(n-k)!/n! """
    total = torch.zeros(len(x), dtype=torch.double)
    for where in group_positions(model, x.size(1)):
        n = len(where)
        for k in range(1, n + 1):
            for subset in itertools.combinations(where, k):
                xt = x.clone()
                xt[:, list(subset)] = model.config.mask_id
                lp = -cross_entropy(model, xt, x)[:, list(subset)].sum(1)
                total -= lp * math.factorial(k - 1) * math.factorial(n - k) / math.factorial(n)
    return total

def order_log_probs(model, x):
    """ log p of every text for every order within the groups: (orders, texts) """
    groups, rows = group_positions(model, x.size(1)), []
    for orders in itertools.product(*(itertools.permutations(g) for g in groups)):
        total = torch.zeros(len(x), dtype=torch.double)
        for order in orders: # groups are independent given the clean text before them
            hidden = list(order)
            while hidden:
                xt = x.clone()
                xt[:, hidden] = model.config.mask_id
                i = hidden.pop(0)
                total += log_probs(model, xt, x)[:, i].gather(1, x[:, i:i + 1])[:, 0]
        rows.append(total)
    return torch.stack(rows)

def exact_log_p(model, x):
    lp = order_log_probs(model, x)
    return lp.logsumexp(0) - math.log(len(lp))

TINY = [
    ('mdlm', {}),
    ('bd3lm', dict(diffusion_block_size=2)),
    ('bd3lm', dict(diffusion_block_size=3)),
    ('bd3lm', dict(diffusion_block_size=1, begin_id=6)),
    ('bd3lm', dict(diffusion_block_size=2, begin_id=6, clean_causal=True)),
]

# ---- bounds

@pytest.mark.parametrize('kind', TINY)
@torch.no_grad()
def test_bound_likelihood_and_orders_by_enumeration(kind):
    """ P1, P2: the two forms of the bound agree, the likelihood sums to 1 and lies below the bound """
    model, x = tiny(kind[0], **kind[1])
    nelbo, lp = exact_nelbo(model, x), order_log_probs(model, x)
    assert torch.allclose(nelbo, -lp.mean(0), atol=1e-10)
    exact = lp.logsumexp(0) - math.log(len(lp))
    assert abs(exact.exp().sum() - 1) < 1e-10
    assert (nelbo >= -exact - 1e-10).all()
    assert (-nelbo).exp().sum() <= 1 + 1e-10
    if kind[1].get('diffusion_block_size') == 1: # P8c: tight
        assert torch.allclose(nelbo, -exact, atol=1e-10)

@pytest.mark.parametrize('kind', TINY)
@torch.no_grad()
def test_bound_and_training_loss_are_unbiased(kind):
    """ P3, P17: their means are the exact bound, with one row too, where level and block could be tied """
    model, x = tiny(kind[0], **kind[1])
    x = x[[5]]
    nelbo = exact_nelbo(model, x).item()
    torch.manual_seed(1)
    rows = x.expand(500, -1)
    samples = torch.cat([model.nll_bound(rows, rows, 8)[0] for _ in range(5)]).flatten()
    assert close_to_mean(samples, nelbo, 4)
    one = torch.stack([model(x, x)[1] for _ in range(3000)]) * 4
    assert close_to_mean(one, nelbo, 4)
    if kind[1].get('diffusion_block_size') == 1: # P8: exact, zero variance, in the loss too
        assert samples.std() < 1e-9
        assert one.std() < 1e-9
    else: # k-stratified estimates vary less than levels drawn freely
        free = torch.stack([model.nll_bound(x, x, 1)[0][0, 0] for _ in range(2000)])
        together = torch.stack([model.nll_bound(x, x, 4)[0].mean() for _ in range(500)])
        assert together.var() < free.var() / 4 * 0.8 # four free ones would have a quarter

@torch.no_grad()
def test_block_size_one_is_the_chain_rule():
    """ P8: every token given the clean ones before it, written out one by one """
    model = build('bd3lm', diffusion_block_size=1, begin_id=6)
    x = torch.randint(5, (3, 8))
    chain = torch.zeros(3, dtype=torch.double)
    for i in range(8):
        xt = x.clone()
        xt[:, i:] = 7
        logits = one_stream_logits(model, xt, i, i + 1)
        chain -= logits.log_softmax(-1)[:, 0].gather(1, x[:, i:i + 1])[:, 0]
    nats, scored = model.nll_bound(x, x, 3)
    assert torch.allclose(nats, chain[:, None].expand(-1, 3), atol=1e-9)
    assert scored.tolist() == [8] * 3
    assert torch.allclose(model(x, x)[1] * 24, chain.sum())

@torch.no_grad()
def test_clipped_and_bell_levels_weigh_the_same_losses_differently():
    """ P18: the expected loss by quadrature over the density of t; evaluation does not depend on that density """
    x = torch.randint(5, (1, 4))
    plain = build('mdlm', block_size=4)
    per_k = [] # the mean cross-entropy sum over subsets of size k
    for k in range(1, 5):
        subsets = list(itertools.combinations(range(4), k))
        xt = x.repeat(len(subsets), 1)
        for row, subset in zip(xt, subsets):
            row[list(subset)] = 7
        ce = cross_entropy(plain, xt, x.expand(len(subsets), -1))
        per_k.append(sum(ce[i, list(subset)].sum() for i, subset in enumerate(subsets)).item())
    t = (torch.arange(20000).double() + 0.5) / 20000
    clipped, bell_shaped = ((t > 0.3) & (t < 0.8)) / 0.5, 6 * t * (1 - t)
    for settings, density in (dict(t_min=0.3, t_max=0.8), clipped), (dict(t_dist='bell'), bell_shaped):
        model = build('mdlm', block_size=4, **settings)
        chances = [(density / t * t ** k * (1 - t) ** (4 - k)).mean().item() for k in range(1, 5)]
        expected = sum(chance * nats for chance, nats in zip(chances, per_k))
        torch.manual_seed(0)
        rows = x.expand(64, -1)
        losses = torch.stack([model(rows, rows)[1] for _ in range(300)]) * 4
        assert close_to_mean(losses, expected, 4)
        assert model.loss_name == 'ce'
        assert plain.loss_name == 'nelbo'
        torch.manual_seed(3)
        a = model.nll_bound(x, x, 4)[0]
        torch.manual_seed(3)
        assert torch.equal(a, plain.nll_bound(x, x, 4)[0])

@torch.no_grad()
def test_a_ratio_per_token_hides_half_and_is_no_bound():
    model, x = build('mdlm', single_ratio_per_sequence=False), torch.randint(5, (64, 8))
    masked = torch.stack([model.corrupt(x, x)[1] for _ in range(50)]).double()
    assert abs(masked.mean().item() - 0.5) < 0.01
    assert masked.mean(2).std() < 0.2 # rows hardly differ, unlike with one t per row
    assert model.loss_name == 'ce'
    assert model(x, x)[1].isfinite()

@torch.no_grad()
def test_ratios_per_token_weigh_by_their_mean():
    model = build('mdlm', single_ratio_per_sequence=False, t_min=0.2, t_max=0.4)
    x = torch.randint(5, (8, 8))
    torch.manual_seed(0)
    xt, masked, _ = model.corrupt(x, x)
    ce = cross_entropy(model, xt, x)
    torch.manual_seed(0)
    assert torch.allclose(model(x, x)[1], (ce * masked).sum() / 0.3 / 64)

def beta_quantile(u):
    """ t with 3 t^2 - 2 t^3 = u, by bisection in float64 of the smaller side """
    near = torch.minimum(u.double(), 1 - u.double())
    low, high = torch.zeros_like(near), torch.ones_like(near)
    for _ in range(200):
        middle = (low + high) / 2
        below = middle * middle * (3 - 2 * middle) < near
        low, high = torch.where(below, middle, low), torch.where(below, high, middle)
    return torch.where(u < 0.5, high, 1 - high)

def test_the_bell_is_beta_2_2_to_the_last_bit():
    """
    Within an ulp of a float64 reference on all of (0, 1], down to the smallest float.
    The bell is never 0 and never falls.
    """
    # all values that 1 - torch.rand() can have
    steps = torch.arange(1, 2 ** 24 + 1, dtype=torch.double).div(2 ** 24).float()
    small = torch.cat([2.0 ** torch.arange(-149, -24), torch.rand(20000) * 1e-6]).sort().values
    starts = torch.tensor([1e-45, 1e-38, 1e-9, 0.1, 0.49999, 0.9999]).view(torch.int32)[:, None]
    next_floats = (starts + torch.arange(2000, dtype=torch.int32)).view(torch.float32).clamp(max=1)
    for u in steps, small[small > 0], *next_floats:
        t = bell(u)
        assert t.dtype == torch.float
        assert t.min() > 0 and t.max() <= 1
        assert (t.diff() >= 0).all()
        n = len(u)
        some = torch.cat((torch.arange(50), torch.randint(n, (20000,)), torch.arange(n - 50, n)))
        ulp = torch.nextafter(t[some], torch.tensor(2.0)) - t[some]
        assert ((t[some].double() - beta_quantile(u[some])).abs() <= ulp).all()
    assert bell(torch.ones(1)) == 1
    assert bell(torch.full((1,), 0.5)) == 0.5

@pytest.mark.parametrize('settings, quantile', [
    ({}, lambda u: u),
    (dict(t_min=0.3), lambda u: 0.3 + 0.7 * u),
    (dict(t_max=0.6), lambda u: 0.6 * u),
    (dict(t_min=0.9999), lambda u: 0.9999 + 0.0001 * u),
    (dict(t_dist='bell'), beta_quantile),
    (dict(t_min=0.2, t_max=0.7, t_dist='bell'), lambda u: 0.2 + 0.5 * beta_quantile(u)),
])
def test_noise_levels_have_the_distribution_asked_for(settings, quantile):
    """ one level in each n-th of the distribution, whatever is drawn within the n-th """
    model, n = build('mdlm', **settings), 40000
    torch.manual_seed(0)
    every_other = torch.arange(2 * n) % 2 == 0
    for t in model.sample_t(n), model.sample_t(2 * n, used=every_other)[::2]:
        t, edges = t.sort().values.double(), quantile(torch.arange(n + 1).double() / n)
        assert (t >= edges[:-1] - 1e-6).all()
        assert (t <= edges[1:] + 1e-6).all()
        assert 0 < t.min() and t.max() <= 1

@pytest.mark.parametrize('settings', [
    {},
    dict(t_dist='bell'),
    dict(t_max=1e-3),
    dict(t_dist='bell', t_max=1e-3),
])
@pytest.mark.parametrize('n', [1, 64, 64 * 1024])
def test_no_draw_gives_a_level_of_zero(settings, n, monkeypatch):
    """ with the smallest and the largest value that torch.rand can return """
    model = build('mdlm', **settings)
    for drawn, least, most in (1 - 2 ** -24, 2 ** -24 / n, 1), (0.0, 1 / n, 1):
        monkeypatch.setattr(torch, 'rand', lambda *size, device=None: torch.full(size, drawn))
        t = model.sample_t(n)
        assert t.min() > 0 and t.max() <= 1
        if not settings:
            assert abs(t.min().item() / least - 1) < 1e-6
            assert drawn > 0 or t.max() == most

@pytest.mark.parametrize('level', [0.0, 1e-45, 1e-38, 2.0 ** -60])
@pytest.mark.parametrize('kind', [
    ('mdlm', {}),
    ('mdlm', dict(t_dist='bell')),
    ('bd3lm', dict(diffusion_block_size=2)),
], ids=str)
def test_what_is_not_hidden_has_no_weight(kind, level, monkeypatch):
    """ where nothing is hidden, 1/t may be infinite; loss and gradient are those of the other rows or blocks """
    model, x = build(kind[0], **kind[1]), torch.randint(5, (4, 8))
    def sample_t(n, device=None, used=None):
        return torch.ones(n).index_fill(0, torch.arange(n // 2), level)
    monkeypatch.setattr(model, 'sample_t', sample_t)
    xt, masked, t = model.corrupt(x, x)
    assert (t < 1e-9).float().mean() == 0.5
    assert torch.equal(masked, t == 1)
    ce = cross_entropy(model, xt, x)
    loss = model(x, x)[1]
    loss.backward()
    assert torch.allclose(loss, ce[masked].sum() / 32)
    assert all(p.grad.isfinite().all() for p in model.parameters() if p.grad is not None)

@pytest.mark.parametrize('batch', [1, 3, 16])
def test_noise_levels_are_uniform_for_every_row_and_block(batch):
    """
    P4: each level alone is U(0, 1], whatever the batch. A batch has one level per stratum.
    As many tokens are hidden as the levels say.
    """
    model, n = build('bd3lm', diffusion_block_size=2), 10000
    torch.manual_seed(0)
    t = torch.stack([model.sample_t(batch * 4) for _ in range(n)]).view(n, batch, 4)
    assert t.min() > 0 and t.max() <= 1
    for row, block in [(0, 0), (0, 3), (batch - 1, 1)]:
        sample = t[:, row, block].sort().values
        distance = (sample - (torch.arange(n) + 0.5) / n).abs().max()
        assert distance < 1.95 / math.sqrt(n) # Kolmogorov-Smirnov, p about 0.001
    strata = (t.view(n, -1) * batch * 4).ceil().long() - 1
    one_each = strata.sort(1).values == torch.arange(batch * 4)
    assert one_each.float().mean() > 0.999 # except for rounding at an edge
    x = torch.randint(5, (batch, 8))
    hidden, expected = 0, 0
    for _ in range(300):
        xt, masked, t = model.corrupt(x, x)
        assert torch.equal(xt == 7, masked)
        assert torch.equal(xt[~masked], x[~masked])
        assert (t.view(batch, 4, 2).diff(dim=-1) == 0).all()
        hidden, expected = hidden + masked.sum().item(), expected + t.sum().item()
    assert abs(hidden - expected) < 5 * math.sqrt(300 * batch * 8 / 6)

def test_unscored_tokens_are_never_corrupted_and_losses_count_scored_ones():
    """
    P16: the bound is ln V at initialisation. The loss is the cross-entropy of hidden tokens over t.
    The column of [MASK] in the head gets no gradient.
    """
    torch.manual_seed(0)
    sizes = dict(block_size=64, vocab_size=69, text_size=65, mask_id=67, n_layer=1, n_head=2, n_embd=32)
    model = MDLM(GPTConfig(attention='full', **sizes))
    x = torch.randint(65, (16, 64))
    assert abs(model.nll_bound(x, x, 4)[0].mean().item() / 64 - math.log(65)) < 1e-4
    model = build('bd3lm', diffusion_block_size=2)
    x, targets = torch.randint(5, (4, 8)), torch.randint(5, (4, 8))
    targets[:, :3] = -1
    for _ in range(20):
        assert not model.corrupt(x, targets)[1][:, :3].any()
    assert model.nll_bound(x, targets)[1].tolist() == [5] * 4
    torch.manual_seed(1)
    xt, masked, t = model.corrupt(x, x)
    ce = cross_entropy(model, xt, x)
    torch.manual_seed(1)
    loss = model(x, x)[1]
    assert torch.allclose(loss, (ce * masked / t).sum() / 32, atol=1e-6)
    loss.backward()
    assert (model.lm_head.weight.grad[5:] == 0).all()
    assert model(x, torch.full_like(x, -1))[1] == 0

@pytest.mark.parametrize('kind', ['mdlm', 'bd3lm'])
@torch.no_grad()
def test_partly_scored_rows_weigh_what_is_scored(kind):
    """ two of four tokens count: bound and loss are those of a text of two tokens, given the other two """
    torch.manual_seed(0)
    model = build(kind, block_size=4, **({'diffusion_block_size': 4} if kind == 'bd3lm' else {}))
    x = torch.randint(5, (1, 4)).expand(2000, -1)
    targets = x.masked_fill(torch.arange(4) < 2, -1)
    def lp(*hidden):
        xt = x[:1].index_fill(1, torch.tensor(hidden), 7)
        return -cross_entropy(model, xt, x[:1])[0, list(hidden)].sum()
    exact = -(lp(2, 3) / 2 + lp(2) / 2 + lp(3) / 2).item() # (k-1)!(n-k)!/n! for k = 2 and 1 of n = 2
    bound = model.nll_bound(x, targets)[0]
    losses = torch.stack([model(x[:50], targets[:50])[1] for _ in range(200)]) * 2
    for estimates in bound, losses:
        error = estimates.std().item() / len(estimates) ** 0.5
        assert abs(estimates.mean().item() - exact) < 5 * error

@torch.no_grad()
def test_the_samples_of_a_bound_are_strata(monkeypatch):
    """ with as many samples as tokens, each number of hidden tokens comes once, in its own order for every row """
    seen, model, x = [], build('mdlm'), torch.randint(5, (64, 8))
    def recorded(groups, scored, k):
        seen.append(k)
        return random_subset(groups, scored, k)
    monkeypatch.setattr('model.random_subset', recorded)
    model.nll_bound(x, x, 8)
    assert torch.equal(torch.cat(seen, 1).sort(1).values, torch.arange(1, 9).expand(64, -1))
    assert seen[0].unique().numel() == 8

@torch.no_grad()
def test_the_question_is_never_asked_for():
    for kind in 'mdlm', 'bd3lm':
        model = build(kind, attention='hierarchical', segments='2,2,4')
        x = torch.randint(5, (64, 8))
        assert not model.corrupt(x, x)[1][:, :2].any()
        assert model.nll_bound(x, x)[1].tolist() == [6] * 64

@every_kind
def test_enough_rows_hold_every_hidden_token(kind):
    model, x = build(kind[0], dtype=torch.float, **kind[1]), torch.randint(5, (32, 8))
    for _ in range(500):
        assert model.corrupt(x, x)[1].sum() <= model.enough_rows(32, 8)
    for T, n in (64, 63), (128, 100): # unequal blocks
        model, x = build('bd3lm', block_size=T, diffusion_block_size=n), torch.randint(5, (4, T))
        assert max(model.corrupt(x, x)[1].sum() for _ in range(500)) <= model.enough_rows(4, T)
    # the largest block decides: these three have the average length of the even ones
    uneven = build('mdlm', block_size=12, attention='hierarchical', segments='2,6,4')
    even = build('bd3lm', block_size=12, diffusion_block_size=4)
    assert uneven.enough_rows(8, 12) > even.enough_rows(8, 12)
    model = build('mdlm', block_size=8)
    assert model.enough_rows(512, 8) < 0.7 * 512 * 8 # and not simply all of them

def test_random_subsets():
    torch.manual_seed(0)
    groups = torch.tensor([[0, 0, 0, 1, 1, 2, 2, 2]]).expand(6000, -1)
    eligible = torch.tensor([[1, 1, 1, 1, 0, 1, 1, 0]]).bool().expand(6000, -1)
    k = torch.tensor([[2, 1, 1]]).expand(6000, -1)
    chosen = random_subset(groups, eligible, k)
    assert not (chosen & ~eligible).any()
    assert all((chosen[:, groups[0] == g].sum(1) == k[0, g]).all() for g in range(3))
    share = chosen.double().mean(0)
    expected = torch.tensor([2 / 3, 2 / 3, 2 / 3, 1, 0, 1 / 2, 1 / 2, 0])
    assert (share - expected).abs().max() < 0.03

# ---- orders

def order_key(order, p, i):
    """ how early a sampler with this order reveals position i, whose predicted distribution is p[i] """
    top = p[i].topk(2).values
    if order == 'left_to_right':
        return -i
    if order == 'confidence':
        return round(top[0].item(), 4)
    if order == 'margin':
        return round((top[0] - top[1]).item(), 4)
    return -round(-sum(q * math.log(q) for q in p[i].tolist() if q > 0), 4)

@pytest.mark.parametrize('kind', TINY)
@pytest.mark.parametrize('order', ['left_to_right', 'confidence', 'entropy', 'margin'])
@torch.no_grad()
def test_order_likelihood_sums_to_one_and_is_its_definition(kind, order):
    model, x = tiny(kind[0], **kind[1])
    nats, scored = model.nll_order(x, x, order)
    assert abs((-nats.double()).exp().sum() - 1) < 1e-5
    assert scored.tolist() == [4] * len(x)
    text, expected, hidden = x[[17]], 0.0, group_positions(model, 4)
    for group in hidden: # one text, one token at a time, in the order of a sampler
        while group:
            xt = text.clone()
            xt[:, group] = 7
            p = log_probs(model, xt, text)[0].exp()
            i = max(group, key=lambda i: (order_key(order, p, i), -i))
            group.remove(i)
            expected -= p[i, text[0, i]].log().item()
    assert abs(nats[17].item() - expected) < 1e-5
    if order == 'left_to_right' and kind[1].get('diffusion_block_size') == 1:
        assert torch.allclose(nats.double(), model.nll_bound(x, x)[0][:, 0], atol=1e-5)

@torch.no_grad()
def test_an_order_takes_one_token_per_block_and_pass(monkeypatch):
    """ from all blocks at once; where all values tie, by position """
    model = build('bd3lm', diffusion_block_size=3)
    torch.nn.init.zeros_(model.lm_head.weight)
    seen, plain = [], model.denoise
    def recorded(xt, x0, ids=None):
        seen.append((xt == 7)[0].int().tolist())
        return plain(xt, x0, ids)
    monkeypatch.setattr(model, 'denoise', recorded)
    x = torch.randint(5, (2, 8))
    nats, _ = model.nll_order(x, x, 'confidence')
    assert seen == [[1, 1, 1, 1, 1, 1, 1, 1], [0, 1, 1, 0, 1, 1, 0, 1], [0, 0, 1, 0, 0, 1, 0, 0]]
    assert torch.allclose(nats, torch.full((2,), 8 * math.log(5), dtype=torch.double))

@torch.no_grad()
def test_losses_are_per_scored_token_and_levels_never_zero():
    """
    With half of the tokens unscored the loss is still nats per scored token.
    t is in (0, 1], because 1/t would be infinite at 0.
    """
    x = torch.randint(5, (2, 8)).repeat(5, 1)
    targets = x.clone()
    targets[:, 4:] = -1
    for objective, more in [
        ('mdlm', {}),
        ('bd3lm', dict(diffusion_block_size=2)),
        ('bd3lm', dict(diffusion_block_size=1, clean_causal=True, ar_weight=1.0)),
    ]:
        model = build(objective, **more)
        torch.nn.init.zeros_(model.lm_head.weight) # every prediction costs ln 5, whatever is hidden
        losses = torch.stack([model(x, targets)[1] for _ in range(400)])
        # without a begin id ar scores 3 of the 4
        expected = math.log(5) * (1 + (more.get('ar_weight', 0) * 3 / 3))
        assert close_to_mean(losses, expected, 4)
        nats, scored = model.nll_bound(x, targets, 4)
        assert scored.tolist() == [4] * 10
        assert torch.allclose(nats, torch.full_like(nats, 4 * math.log(5)))
    assert model.sample_t(3_000_000).min() > 0

@torch.no_grad()
def test_masks_are_kept_per_length():
    for kind in 'mdlm', 'bd3lm':
        x = torch.randint(5, (1, 8))
        used, fresh = (build(kind, attention='block', diffusion_block_size=3) for _ in range(2))
        used.denoise(x, x)
        for T in 6, 5: # 6 and 5 tokens have the same clean part, but not the same rows
            short = x[:, :T]
            assert torch.allclose(used.denoise(short, short), fresh.denoise(short, short), atol=1e-10)
            fresh._masks.clear()

# ---- streams

def one_stream_logits(model, xt, s, e):
    """ logits of the block s..e from one stream: the tokens before it are clean """
    lead, T = model.lead, e
    ids = F.pad(model.ids[:T] + lead, (lead, 0))
    noisy = torch.arange(T + lead) >= s + lead
    mask = dense_mask(ids, noisy, model.config.clean_causal)
    pos = torch.arange(T + lead)
    text = F.pad(xt[:, :T], (lead, 0), value=model.config.begin_id or 0)
    x = model.trunk(model.embed(text, pos), pos, mask)
    return model.logits(x[:, s + lead:])

@pytest.mark.parametrize('n', [1, 5, 16, 100, 200])
@pytest.mark.parametrize('more', [{}, dict(begin_id=6), dict(begin_id=6, clean_causal=True)])
def test_the_parts_of_a_two_stream_mask_are_the_whole(n, more):
    """ every allowed pair is computed once, and few others are computed """
    T = 200
    model = build('bd3lm', block_size=T, diffusion_block_size=n, **more)
    clean = T - 1 if more.get('clean_causal') else model.id_list.index(model.id_list[-1])
    N = T + clean + model.lead
    if N == T:
        return
    whole = torch.zeros(N, N, dtype=torch.int)
    computed = 0
    both = model.two_stream_mask(model.ids, T, clean)
    end, row = 0, torch.arange(N)
    for length, past, mask in both.noisy + both.clean:
        rows, end = row[end:end + length], end + length
        cols = torch.cat((rows, row[T:T + past])) if end <= T else row[T:T + past]
        mask = torch.ones(length, len(cols)).tril().bool() if isinstance(mask, str) else mask
        whole[rows[:, None], cols] += mask.int()
        computed += mask.numel()
    assert end == N
    clean_ids = F.pad(model.ids[:clean] + model.lead, (model.lead, 0))
    block = torch.cat((model.ids + model.lead, clean_ids))
    expected = dense_mask(block, torch.arange(N) < T, model.config.clean_causal)
    assert torch.equal(whole, expected.int())
    assert n > 64 or computed < 0.6 * N * N

@blockwise_kinds
@torch.no_grad()
def test_two_streams_are_one_stream_block_by_block(kind):
    """ P9: the logits of a block are those of sampling, where the blocks before it are a clean prefix """
    model = build(kind[0], **kind[1])
    x, xt = torch.randint(5, (2, 8)), torch.randint(5, (2, 8))
    xt = xt.masked_fill(torch.rand(2, 8) < 0.5, 7)
    two = model.logits(model.two_stream(xt, x))
    ids = model.ids.tolist()
    for b in range(ids[-1] + 1):
        s, e = ids.index(b), 8 - ids[::-1].index(b)
        mixed = torch.cat((x[:, :s], xt[:, s:e]), 1)
        assert torch.allclose(two[:, s:e], one_stream_logits(model, mixed, s, e), atol=1e-9)
    both = model.two_stream(xt, x, clean_too=True)
    assert torch.allclose(both[:, :8], model.two_stream(xt, x), atol=1e-9)

@blockwise_kinds
def test_no_leakage_between_streams_and_blocks(kind):
    """ P6, P7, P19, by gradients: a block depends on its own noisy tokens and on clean earlier blocks """
    model = build(kind[0], **kind[1])
    x, xt, seen = torch.randint(5, (1, 8)), torch.full((1, 8), 7), []
    def embed(idx, pos):
        seen.append(type(model).embed(model, idx, pos).detach().requires_grad_())
        return seen[-1]
    model.embed = embed
    logits = model.logits(model.two_stream(xt, x))[..., :5]
    n, ids = seen[0].size(1) - 8 - model.lead, model.ids
    for i in range(8):
        grad, = torch.autograd.grad(logits[0, i].square().sum(), seen[0], retain_graph=True)
        used = grad[0].abs().sum(-1) > 0
        noisy, clean = used[:8], used[8 + model.lead:]
        assert torch.equal(noisy, ids == ids[i])
        assert torch.equal(clean, (ids < ids[i])[:n])
    if kind[1].get('segments'):
        assert ids[0] == ids[1] < ids[2] <= ids[3] < ids[4] # question, plan, execution

@torch.no_grad()
def test_one_block_is_mdlm():
    """ P7: bd3lm with one block over the row equals mdlm: logits, bound, and loss with the same seed """
    a, b = build('bd3lm', diffusion_block_size=8), build('mdlm')
    x = torch.randint(5, (4, 8))
    xt = x.masked_fill(torch.rand(4, 8) < 0.5, 7)
    assert torch.allclose(a.logits(a.two_stream(xt, x)), b.logits(b.one_stream(xt)), atol=1e-10)
    for f in (lambda m: m(x, x)[1], lambda m: m.nll_bound(x, x, 3)[0]):
        torch.manual_seed(2)
        first = f(a)
        torch.manual_seed(2)
        assert torch.allclose(first, f(b), atol=1e-10)

@pytest.mark.parametrize('begin_id', [None, 6])
def test_the_clean_stream_is_a_gpt(begin_id):
    """
    P8d: with clean_causal the clean stream equals a GPT, number for number. That GPT's loss is the second
    term of the dual loss, and the view as ar shares the weights.
    """
    settings = dict(diffusion_block_size=4, begin_id=begin_id)
    model = build('bd3lm', clean_causal=True, ar_weight=0.5, **settings)
    gpt, x = model.views()['ar'], torch.randint(5, (3, 8))
    assert type(gpt) is GPT
    assert gpt.lm_head.weight is model.lm_head.weight
    assert not gpt.training
    assert model.train().views()['ar'].training
    model.eval()
    xt = x.masked_fill(torch.rand(3, 8) < 0.5, 7)
    clean = model.logits(model.two_stream(xt, x, clean_too=True)[:, 8:])
    inputs, _ = gpt.shift(x, x)
    assert torch.allclose(clean, gpt(inputs)[0], atol=1e-10)
    torch.manual_seed(0)
    both = model(x, x)[1]
    model.config.ar_weight = 0.0
    torch.manual_seed(0)
    assert torch.allclose(both, model(x, x)[1] + 0.5 * gpt(x, x)[1], atol=1e-10)
    assert not build('bd3lm', diffusion_block_size=4).views()

@pytest.mark.parametrize('begin_id', [None, 6])
def test_half_of_the_rows_of_a_dual_mdlm_are_a_gpts(begin_id):
    """ the loss is the bound's on the second half of the rows, plus that of a GPT of the same weights on the first """
    dual, alone = build('mdlm', ar_weight=0.5, begin_id=begin_id), build('mdlm', begin_id=begin_id)
    gpt, x = dual.views()['ar'], torch.randint(5, (5, 8))
    assert gpt.lm_head.weight is dual.lm_head.weight
    assert not alone.views()
    assert (dual.loss_name, alone.loss_name) == ('ce', 'nelbo')
    torch.manual_seed(0)
    both = dual(x, x)[1]
    torch.manual_seed(0)
    expected = alone(x[2:], x[2:])[1] + 0.5 * gpt(x[:2], x[:2])[1]
    assert torch.allclose(both, expected, atol=1e-10)
    with pytest.raises(UserError, match='batch_size of at least 2'):
        dual(x[:1], x[:1])

def test_an_ar_checkpoint_initialises_every_other_objective():
    ar = build('ar', begin_id=6)
    for name in 'denoise', 'mdlm', 'bd3lm':
        more = dict(diffusion_block_size=2) if name == 'bd3lm' else {}
        model = build(name, seed=1, begin_id=6, **more)
        model.load_state_dict(ar.state_dict())
        assert all(torch.equal(p, q) for p, q in zip(model.parameters(), ar.parameters()))

def test_denoise_scores_what_the_provider_asks_for():
    model = build('denoise')
    corrupted, targets = torch.randint(5, (2, 8)), torch.full((2, 8), -1)
    targets[:, 3:5] = 2
    logits, loss = model(corrupted, targets)
    full, _ = model(corrupted)
    ce = F.cross_entropy(full[:, 3:5].flatten(0, 1), targets[:, 3:5].flatten())
    assert logits.shape == (4, 8)
    assert torch.allclose(loss, ce)
    with pytest.raises(NotImplementedError, match='no likelihood bound'):
        model.nll_bound(corrupted, targets)
    assert model.generate(corrupted.masked_fill(targets != -1, -1), 0).max() < 5

@pytest.mark.parametrize('scored', [slice(0, 8), slice(3, 8), slice(0, 8, 3), slice(5, 6)], ids=str)
@pytest.mark.parametrize('elsewhere', [False, True])
def test_denoise_refuses_to_learn_to_copy(scored, elsewhere):
    """ unscored tokens (a question, pads, most tokens) may differ from the text or not; some scored token must """
    model, x = build('denoise'), torch.randint(5, (4, 8))
    targets = torch.full_like(x, -1)
    targets[:, scored] = x[:, scored]
    idx = torch.where(targets == -1, 7, x) if elsewhere else x
    for _ in range(2): # and not once only
        with pytest.raises(UserError, match='nothing is hidden: denoise fills in what the Provider'):
            model(idx, targets)
    assert model(idx, torch.full_like(x, -1))[1] == 0 # nothing scored is no loss
    idx = idx.clone()
    idx[2, scored.start] = 7 # the others stay visible, as BERT's do
    assert model(idx, targets)[1] > 0
    assert model(x, targets)[1] > 0 # a provider that corrupts little met a small batch

@every_kind
@pytest.mark.filterwarnings('ignore:flex_attention called without')
@torch.no_grad()
def test_flex_and_dense_masks_agree(kind):
    """ the attention of training and of generation through FlexAttention's masks """
    model = build(kind[0], dtype=torch.float, **{**kind[1], 'n_embd': 32})
    x = torch.randint(5, (2, 8))
    xt = x.masked_fill(torch.rand(2, 8) < 0.5, 7)
    dense = model.logits(model.denoise(xt, x))
    model.config.attn_backend, model._masks = 'flex', {} # rebuilt
    flex = model.logits(model.denoise(xt, x))
    assert torch.allclose(dense[..., :5], flex[..., :5], atol=1e-4)

def test_flex_is_left_out_where_there_is_dropout():
    """ FlexAttention has no dropout on attention weights """
    cuda, cpu = torch.device('cuda'), torch.device('cpu')
    assert build('mdlm').flex(cuda)
    assert not build('mdlm', dropout=0.1).flex(cuda)
    assert not build('mdlm').flex(cpu)
    with pytest.raises(UserError, match='has no dropout'):
        build('mdlm', dropout=0.1, attn_backend='flex')

def test_a_loss_is_called_what_it_is():
    """ mdlm trains a hierarchy on noisy plans, but writes from clean ones, so its loss is not its bound """
    segments = dict(attention='hierarchical', segments='2,2,4')
    assert build('mdlm').loss_name == 'nelbo'
    assert build('mdlm', **segments).loss_name == 'ce'
    assert build('bd3lm', diffusion_block_size=2, **segments).loss_name == 'nelbo'
    with pytest.raises(UserError, match='no next-token loss'):
        build('denoise', ar_weight=1.0)
    with pytest.raises(UserError, match='0 .off. or more'):
        build('mdlm', ar_weight=-1.0)

def test_a_hierarchy_causal_within_blocks_is_read_as_ar():
    segments = dict(attention='hierarchical', segments='2,2,4')
    model = build('mdlm', begin_id=6, ar_weight=1.0, causal_within_block=True, **segments)
    logits, _ = model.views()['ar'](torch.randint(5, (2, 8)))
    assert logits.shape == (2, 8, 8)

def test_flops_count_the_head_of_the_noisy_stream_only():
    """
    Compared with ar of the same size: one block over the row is one stream. Two streams cost twice as
    much, less the clean stream's last layer and head, which are paid only if its loss is asked for too.
    """
    def flops(kind, **more):
        return build(kind, begin_id=None, **more).flops_per_token()
    one = flops('ar')
    head = 6 * build('ar', begin_id=None).lm_head.weight.numel()
    last_layer = (one - head) / 2 # of two
    assert flops('bd3lm', diffusion_block_size=8) == flops('mdlm') == one
    assert flops('bd3lm', diffusion_block_size=2) == 2 * one - head - last_layer
    assert flops('bd3lm', diffusion_block_size=2, clean_causal=True, ar_weight=1.0) == 2 * one

def test_weights_to_start_from_bring_no_task(tmp_path):
    """ a hierarchy's weights begin a model of plain text, and the other way round """
    segments, path = dict(attention='hierarchical', segments='2,2,4'), tmp_path / 'ckpt.pt'
    model = build('mdlm', causal_within_block=True, **segments)
    torch.save({'format': 1, 'config': asdict(model.config), 'model': model.state_dict(), 'meta': {}}, path)
    plain, same = MDLM.from_pretrained(path), MDLM.from_pretrained(path, segments='2,2,4')
    assert plain.config.attention == 'full'
    assert same.config.attention == 'hierarchical'
    assert plain.config.mask_id == 7
    assert not plain.config.segments
    saved = model.float().state_dict()
    assert all(torch.equal(a, b) for a, b in zip(plain.state_dict().values(), saved.values()))

# ---- writing

@pytest.mark.parametrize('kind', TINY)
@torch.no_grad()
def test_first_hitting_draws_from_the_model(kind):
    """ P11: the histogram of samples against enumeration """
    V = 2 if kind[0] == 'mdlm' else 3
    model, x = tiny(kind[0], V=V, **kind[1])
    p, n = exact_log_p(model, x).exp(), 20000
    torch.manual_seed(0)
    out = model.generate(torch.zeros(n, 0, dtype=torch.long), 4, order='random')
    number = (out * V ** torch.arange(3, -1, -1)).sum(1) # of each text among all
    counts = torch.bincount(number, minlength=len(x)).double()
    rare = p * n < 5
    bins = [(c, e) for c, e, r in zip(counts.tolist(), (p * n).tolist(), rare.tolist()) if not r]
    if rare.any() and (p[rare].sum() * n) > 1:
        bins.append((counts[rare].sum().item(), (p[rare].sum() * n).item()))
    chi2, df = sum((c - e) ** 2 / e for c, e in bins), len(bins) - 1
    assert chi2 < df + 4 * math.sqrt(2 * df) + 8
    assert (counts / n - p).abs().sum() / 2 < 0.03

@torch.no_grad()
def test_ancestral_reveals_exactly_as_many_as_the_process():
    """
    P12: binomial counts in every step, and nothing hidden after the last, T = 1 included.
    Many steps come near first hitting.
    """
    torch.manual_seed(0)
    for steps in 1, 2, 5, 40:
        hidden, revealed = torch.ones(4000, 6).bool(), []
        for t, s in reverse_steps(steps, 'linear'):
            quota = QUOTAS['ancestral'](hidden, hidden.sum(1), t, s)
            reveal = leading(torch.rand(4000, 6), hidden, quota)
            assert not (reveal & ~hidden).any()
            revealed.append(reveal.sum().item())
            hidden = hidden & ~reveal
        assert not hidden.any()
        if steps == 5: # every step reveals a fifth of all
            assert max(abs(r / 24000 - 0.2) for r in revealed) < 4 * math.sqrt(0.16 / 24000)
    model, x = tiny('mdlm', V=2)
    p, n = exact_log_p(model, x).exp(), 6000
    distance = []
    empty = torch.zeros(n, 0, dtype=torch.long)
    for steps in 1, 4, 64:
        out = model.generate(empty, 4, sampler='ancestral', steps=steps)
        number = (out * 2 ** torch.arange(3, -1, -1)).sum(1) # of each text among all
        counts = torch.bincount(number, minlength=16).double()
        distance.append((counts / n - p).abs().sum().item() / 2)
    assert distance[0] > distance[1] > distance[2]
    assert distance[2] < 0.04

def test_a_step_reveals_at_the_exact_rate_however_rare():
    """
    P20: many rare tokens against a nearly certain [MASK].
    A float32 race over all of them would reveal half as often.
    """
    torch.manual_seed(0)
    hidden, n = torch.ones(2000, 1000).bool(), 2_000_000
    t, s = reverse_steps(10000, 'linear')[0]
    revealed = QUOTAS['ancestral'](hidden, hidden.sum(1), t, s).sum().item()
    expected = n * 1e-4
    assert abs(revealed - expected) < 4 * math.sqrt(expected)

def watch_calls(monkeypatch, watch):
    """ call watch(window, s, e, b, i, states) after every network call of masked and block diffusion """
    states = Window.states
    def watched(window, s, e, b, i):
        x = states(window, s, e, b, i)
        watch(window, s, e, b, i, x)
        return x
    monkeypatch.setattr(Window, 'states', watched)

def whole_text(window, e):
    """ what the network has read up to column e, cached or not: (B, lead + e) """
    cache, window.cache = window.cache, None
    text, window.cache = window.text(e), cache
    return text

def against_uncached(monkeypatch):
    """ repeat every pass that uses a cache over the whole text without it; returns a list of the differences """
    errors = []
    def repeat(window, s, e, b, i, x):
        if window.cache is None:
            return
        model, text, begins = window.model, whole_text(window, e), window.model.lead + s
        ids, pos = window.block_ids(e), torch.arange(text.size(1))
        mask = dense_mask(ids, pos >= begins, model.config.clean_causal, question=model.question)
        y = model.trunk(model.embed(text, pos), pos, mask)
        errors.append((x - y[b, begins + i]).abs().max().item())
    watch_calls(monkeypatch, repeat)
    return errors

@every_kind
@pytest.mark.parametrize('sampler', list(SAMPLERS))
@torch.no_grad()
def test_writing_keeps_what_is_given_and_caches_exactly(kind, sampler, monkeypatch):
    """
    P10, P13, P21: given tokens stay, with prompts of different lengths, gaps and ragged blocks.
    The cached passes equal uncached ones.
    """
    model = build(kind[0], **kind[1])
    torch.nn.init.constant_(model.lm_head.weight[7], 5.0) # an eager [MASK]
    prompt = torch.randint(5, (3, 6))
    prompt[0, 1:], prompt[1, 4:], prompt[2, 2] = -1, -1, -1
    errors = against_uncached(monkeypatch)
    out = model.generate(prompt, 2, sampler=sampler)
    assert out.shape == (3, 8)
    assert out.min() >= 0 and out.max() < 5
    assert torch.equal(out[:, :6][prompt != -1], prompt[prompt != -1])
    assert max(errors, default=0) < 1e-9
    assert bool(errors) == model.blockwise

@every_kind
@torch.no_grad()
def test_only_some_states_are_the_same_states(kind):
    """ the last layer skips states that are not needed; training, bounds and sampling need hidden tokens only """
    model, x = build(kind[0], **kind[1]), torch.randint(5, (3, 8))
    xt, only = x.masked_fill(torch.rand(3, 8) < 0.5, 7), torch.randperm(24)[:9]
    streams = [model.one_stream]
    if model.blockwise:
        streams.append(functools.partial(model.two_stream, x0=x))
    for states in streams:
        assert torch.allclose(states(xt, only=only), states(xt).flatten(0, 1)[only], atol=1e-12)
        assert states(xt, only=only[:0]).shape == (0, model.config.n_embd)

@every_kind
@torch.no_grad()
def test_writing_past_the_context_stops_and_steps(kind):
    model = build(kind[0], **kind[1])
    if model.config.attention == 'hierarchical':
        with pytest.raises(UserError, match='a hierarchy has 8 tokens'):
            model.generate(torch.zeros(1, 2, dtype=torch.long), 20)
        return
    states, few = [], []
    def on_step(step, idx, probs, state):
        states.append((step, state['nfe'], state['done']))
        assert torch.allclose(probs.sum(-1), torch.ones(len(probs)))
    out = model.generate(torch.randint(5, (2, 11)), 20, on_step=on_step)
    assert out.shape == (2, 31)
    assert out.min() >= 0
    assert [(step, nfe) for step, nfe, _ in states] == [(n, n) for n in range(1, 21)]
    assert states[-1][2] == 31
    prompt = torch.zeros(1, 1, dtype=torch.long)
    model.generate(prompt, 7, sampler='ancestral', steps=8, on_step=lambda *a: few.append(a[0]))
    assert 1 <= len(few) <= 8
    torch.manual_seed(0)
    out = model.generate(torch.full((4, 2), 3), 20, stop=3, temperature=2.0)
    for row in out[:, 2:].tolist(): # the prompt's own 3 ends nothing
        assert 3 not in row or set(row[row.index(3):]) == {3}
    assert (out[:, 2:] == 3).any()
    for options, word in [
        (dict(sampler='ancestral', steps=0), 'fewer than the'),
        (dict(steps=5), 'leave steps out'),
        (dict(sampler='magic'), 'first_hitting, ancestral'),
    ]:
        with pytest.raises(UserError, match=word):
            model.generate(prompt, 7, **options)

def test_the_plan_covers_every_gap_once():
    """
    The newer half of a full window, in whole blocks, begins the next window.
    Steps are shared out evenly, and none is lost.
    """
    unknown = torch.arange(21) >= 3
    plan = build('bd3lm', diffusion_block_size=2).plan(unknown, 19, 'ancestral')
    assert [(s, e, [b[:2] for b in blocks]) for s, e, blocks in plan] == [
        (0, 8, [(2, 4), (4, 6), (6, 8)]),
        (4, 12, [(4, 6), (6, 8)]),
        (8, 16, [(4, 6), (6, 8)]),
        (12, 20, [(4, 6), (6, 8)]),
        (16, 21, [(4, 5)]),
    ]
    steps = [b[2] for *_, blocks in plan for b in blocks]
    assert sum(steps) == 19
    assert max(steps) - min(steps) <= 1
    plan = build('mdlm', diffusion_block_size=2).plan(unknown, None, 'first_hitting')
    assert plan == [ # the row is one block
        (0, 8, [(0, 8, None)]),
        (4, 12, [(0, 8, None)]),
        (8, 16, [(0, 8, None)]),
        (12, 20, [(0, 8, None)]),
        (16, 21, [(0, 5, None)]),
    ]
    plan = build('mdlm').plan(torch.arange(12) >= 7, None, 'first_hitting')
    assert [(s, e) for s, e, _ in plan] == [(0, 8), (4, 12)] # a window is filled first

def kept_tokens_are_right(filled, start, room, n):
    """ whether a window at start, with `filled` tokens written, keeps as many as it should of those """
    kept = filled - start
    if filled < room:
        return start == 0
    if n < room:
        return kept % n == 0 and min(n, room // 2) <= kept <= max(n, room // 2)
    return kept == room // 2

@pytest.mark.parametrize('kind', ['bd3lm', 'mdlm'])
def test_windows_keep_whole_blocks(kind):
    """ a new window begins with whole blocks, about half of the context; with exactly half if one block fills it """
    for room, n in itertools.product(range(1, 10), range(1, 11)):
        model = build(kind, block_size=room, attention='block', diffusion_block_size=n)
        for filled, N in (0, 1), (1, 30), (room, room + 1), (2 * room + 1, 4 * room + 3):
            for start, end, blocks in model.plan(torch.arange(N) >= filled, None, 'first_hitting'):
                assert kept_tokens_are_right(filled, start, room, n)
                edges = [*range(0, end - start, n if model.blockwise else room), end - start]
                left = [(s, e, None) for s, e in zip(edges, edges[1:]) if start + e > filled]
                assert filled < end <= start + room
                assert blocks == left
                filled = end
            assert filled == N

@pytest.mark.parametrize('begin_id', [None, 6])
@torch.no_grad()
def test_the_smallest_contexts(begin_id):
    """ windows of one token, or of the begin id and one token, slide on without end too """
    prompts = torch.zeros(2, 0, dtype=torch.long), torch.tensor([[1, -1, 2, 3], [-1, 4, 0, -1]])
    for kind, room, n in itertools.product(('mdlm', 'bd3lm', 'denoise'), (1, 2, 3), (1, 2, 3, 4)):
        sizes = dict(block_size=room, diffusion_block_size=n, begin_id=begin_id)
        attentions = ('block',) if kind == 'bd3lm' else ('full', 'causal', 'block')
        for attention, prompt in itertools.product(attentions, prompts):
            model = build(kind, attention=attention, **sizes)
            out = model.generate(prompt, 7, order='left_to_right')
            given = F.pad(prompt, (0, 7), value=-1)
            assert out.min() >= 0 and out.max() < 5
            assert torch.equal(out[given != -1], given[given != -1])

@pytest.mark.parametrize('block', [1, 2, 3])
@torch.no_grad()
def test_a_stop_is_the_end_of_its_row_only(block):
    """ after the first stop that a row writes come only stops; other rows go on, and read these stops """
    model = build('bd3lm', diffusion_block_size=block)
    torch.manual_seed(0)
    prompt, calls = torch.randint(5, (6, 2)), []
    def on_step(step, idx, probs, state):
        calls.append(idx.clone())
    out = model.generate(prompt, 14, stop=3, temperature=3.0, on_step=on_step)
    assert out.min() >= 0
    assert torch.equal(out[:, :2], prompt)
    written = out[:, 2:].tolist()
    lengths = [row.index(3) if 3 in row else 14 for row in written]
    assert all(set(row[n:]) <= {3} for row, n in zip(written, lengths))
    assert len(set(lengths)) > 2
    assert (calls[-1][lengths.index(max(lengths))] != -1).sum() > (calls[0][0] != -1).sum()
    ended = model.generate(torch.full((8, 2), 3), 6, stop=3)
    assert not (ended[:, 2:] == 3).all() # stops in the prompt end nothing

@torch.no_grad()
def test_block_ids_from_the_batch_are_those_of_the_config():
    """ the same ids sent by a provider, for every row alike, change nothing; other ids do """
    x = torch.randint(5, (3, 8))
    for objective in 'mdlm', 'bd3lm':
        begin_id = 6 if objective == 'bd3lm' else None
        model = build(objective, attention='hierarchical', segments='2,2,4', begin_id=begin_id)
        sent = model.ids.expand(3, -1)
        def logits(ids):
            return model.logits(model.denoise(x, x, ids))
        def loss(ids):
            return model(x, x, ids)[1]
        def finite(ids): # of the bound only that it can be computed: 0, or NaN
            return model.nll_bound(x, x, 2, ids)[0].mean() * 0
        for f in loss, logits, finite:
            torch.manual_seed(4)
            a = f(None)
            torch.manual_seed(4)
            b = f(sent)
            assert a.shape == b.shape
            assert a.dim() == 0 or torch.allclose(a, b, atol=1e-9)
        other = torch.tensor([0, 0, 1, 1, 2, 2, 3, 3]).expand(3, -1)
        assert not torch.allclose(logits(sent), logits(other))

@torch.no_grad()
def test_every_row_may_send_its_own_block_ids():
    ids = torch.tensor([[0, 0, 0, 0, 1, 1, 1, 1], [0, 1, 2, 3, 4, 5, 6, 7], [0, 0, 1, 1, 1, 1, 1, 2]])
    for kind, more in [
        ('mdlm', dict(attention='hierarchical', segments='2,2,4')),
        ('bd3lm', dict(diffusion_block_size=2)),
    ]:
        model, x = build(kind, **more), torch.randint(5, (3, 8))
        xt = x.masked_fill(torch.rand(3, 8) < 0.5, 7)
        together, single = model.two_stream(xt, x, ids), model.one_stream(xt, ids)
        for i in range(3):
            row = slice(i, i + 1)
            assert torch.allclose(together[row], model.two_stream(xt[row], x[row], ids[row]))
            assert torch.allclose(single[row], model.one_stream(xt[row], ids[row]))
            t = model.corrupt(x, x, ids)[2][i]
            own = ids[i].unique()
            assert all(t[ids[i] == g].unique().numel() == 1 for g in own)
            assert t.unique().numel() == own.numel()

HIERARCHY = dict(attention='hierarchical', segments='2,2,4')
BLOCKWISE = [
    ('mdlm', HIERARCHY),
    ('bd3lm', dict(diffusion_block_size=2)),
    ('bd3lm', dict(diffusion_block_size=2, begin_id=6)),
    ('bd3lm', HIERARCHY | dict(diffusion_block_size=2)),
]
RISING = [ # except for pads, which have the largest id and may stand anywhere
    [0, 0, 0, 0, 1, 1, 1, 1],
    [0, 1, 2, 3, 4, 5, 6, 7],
    [0, 0, 1, 1, 1, 1, 1, 2],
    [0, 0, 2, 2, 5, 5, 7, 7],
    [0] * 8,
    [0, 0, 7, 1, 1, 7, 2, 7],
    [7, 7, 0, 0, 1, 1, 2, 2],
    [5, 0, 0, 1, 5, 1, 1, 1],
]
FALLING = [
    [[1, 1, 1, 1, 0, 0, 0, 0]] * 3,
    [[0, 1, 2, 3, 3, 2, 4, 4]] * 3,
    [[2, 2, 0, 0, 0, 0, 1, 1]] * 3,
    [[0, 0, 1, 1, 2, 2, 3, 3]] * 2 + [[0, 0, 2, 1, 1, 2, 3, 3]],
    [0, 1, 0, 1, 2, 1, 2, 3],
    [[0, 0, 6, 6, 5, 5, 7, 7]] * 3,
    [[7, 6, 5, 4, 3, 2, 1, 0]],
]
SHAPES = [
    torch.zeros(3, 7).long(),
    torch.zeros(2, 8).long(),
    torch.zeros(3, 1).long(),
    torch.zeros(1, 3, 8).long(),
    torch.zeros(3, 8),
    torch.zeros(3, 8).int(),
    torch.zeros(8).bool(),
    torch.tensor(0),
]

@pytest.mark.parametrize('kind', BLOCKWISE, ids=str)
@torch.no_grad()
def test_block_ids_from_outside_are_the_rule_itself(kind):
    """
    Any ids that rise along the row, except for pads anywhere, are one mask over both copies.
    They may be the same for all rows, or each row may have its own.
    """
    model = build(kind[0], **kind[1])
    x, lead = torch.randint(5, (len(RISING), 8)), model.lead
    xt = x.masked_fill(torch.rand(x.shape) < 0.5, 7)
    at = torch.cat((torch.arange(8) + lead, torch.arange(8 + lead)))
    noisy = torch.arange(16 + lead) < 8
    both = torch.cat((xt, F.pad(x, (lead, 0), value=6)), dim=1)
    def reference(ids):
        block = torch.cat((ids + lead, F.pad(ids + lead, (lead, 0))), dim=-1)
        return model.trunk(model.embed(both, at), at, dense_mask(block, noisy))[:, :8]
    together = model.two_stream(xt, x, torch.tensor(RISING))
    assert torch.allclose(together, reference(torch.tensor(RISING)), atol=1e-10)
    for row in RISING:
        for ids in torch.tensor(row), torch.tensor([row]):
            assert torch.allclose(model.two_stream(xt, x, ids), reference(ids), atol=1e-10)

@pytest.mark.parametrize('kind', BLOCKWISE, ids=str)
@pytest.mark.parametrize('ids, sentence', [
    *((torch.tensor(ids), 'fall along a row') for ids in FALLING),
    *((ids, 'expected torch.int64 of ') for ids in SHAPES),
    (torch.tensor([[0, 0, 1, 1, 2, 2, 3, 9]] * 3), 'block_ids are 0 to 9, expected 0 to 7'),
    (torch.tensor([[-1, 0, 0, 0, 0, 1, 1, 1]] * 3), 'block_ids are -1 to 1, expected 0 to 7'),
])
def test_block_ids_that_would_be_something_else_are_refused(kind, ids, sentence):
    """ in training and in every other call that takes them """
    model, x = build(kind[0], **kind[1]), torch.randint(5, (3, 8))
    calls = [
        lambda: model.train()(x, x, ids),
        lambda: model.eval().nll_bound(x, x, 2, ids),
        lambda: model.nll_order(x, x, 'confidence', ids),
        lambda: model.metrics(x, x, ids),
        lambda: model.denoise(x, x, ids),
        lambda: model.two_stream(x, x, ids),
    ]
    for call in calls:
        with pytest.raises(UserError, match=sentence):
            call()

@pytest.mark.parametrize('objective', ['denoise', 'mdlm'])
def test_block_ids_of_one_stream_have_a_shape_too(objective):
    model, x = build(objective), torch.randint(5, (3, 8))
    for ids in SHAPES:
        calls = [
            lambda: model(x.roll(1, 1), x, ids),
            lambda: model(x, None, ids),
            lambda: model.metrics(x, x, ids),
        ]
        for call in calls:
            with pytest.raises(UserError, match='expected torch.int64 of'):
                call()
    for ids in torch.tensor([1, 1, 0, 0, 3, 3, 2, 2]), torch.arange(24).view(3, 8): # a mask like any other
        assert model(x.roll(1, 1), x, ids)[1].isfinite()

@pytest.mark.parametrize('kind', [kind for kind in BLOCKWISE if kind[1].get('segments')], ids=str)
def test_a_hierarchy_has_the_blocks_of_its_config(kind):
    """ which states are left out is decided by the config, so other ids are refused; pads may stand anywhere """
    model, x = build(kind[0], **kind[1]), torch.randint(5, (3, 8))
    own = model.ids
    other = own.clone()
    other[1] = 1 # a shorter question
    sentence = 'not those of segments=.2,2,4., which a hierarchy.s must be'
    for ids in other, other.expand(3, -1), torch.tensor(RISING[0]).expand(3, -1), torch.arange(8):
        for call in (lambda: model.train()(x, x, ids), lambda: model.eval().nll_bound(x, x, 2, ids)):
            with pytest.raises(UserError, match=sentence):
                call()
    for pads in [1], [3, 6, 7], []:
        pads = torch.tensor(pads, dtype=torch.long)
        ids = own.expand(3, -1).index_fill(1, pads, int(own[-1]) + 1)
        targets = x.index_fill(1, pads, -1)
        assert model(x, targets, ids)[1].isfinite()
        assert model.nll_bound(x, targets, 2, ids)[0].isfinite().all()

def test_blocks_of_one_token_leave_room_for_pads():
    """ their ids use up all of 0 to T - 1, so pads have the id T; bound and loss are exact, whatever pads hold """
    model, x = build('bd3lm', diffusion_block_size=1), torch.randint(5, (2, 8))
    ids = torch.tensor([[0, 8, 2, 3, 8, 5, 8, 8], [0, 1, 2, 3, 4, 5, 6, 8]])
    targets = x.masked_fill(ids == 8, -1)
    for idx in x, torch.where(ids == 8, 0, x):
        nats, scored = model.nll_bound(idx, targets, 2, ids)
        assert scored.tolist() == [4, 7]
        assert torch.equal(nats[:, 0], nats[:, 1])
        assert torch.allclose(model(idx, targets, ids)[1] * 11, nats[:, 0].sum())
        first = nats if idx is x else first
        assert torch.allclose(first, nats)

def test_metrics_say_how_much_was_hidden():
    """ three shares of the text are hidden, and each accuracy is named by its share """
    model, x = build('mdlm', block_size=64), torch.zeros(8, 64, dtype=torch.long)
    hidden = []
    def denoise(xt, x0, ids=None):
        hidden.append((xt == 7).double().mean().item())
        return torch.zeros(8, 64, 16, dtype=torch.double)
    model.denoise = denoise
    found = model.metrics(x, x)
    assert list(found) == ['accuracy_15_hidden', 'accuracy_50_hidden', 'accuracy_85_hidden']
    assert all(abs(h - level) < 0.08 for h, level in zip(hidden, (0.15, 0.5, 0.85)))

def test_metrics_ask_for_hidden_tokens_only():
    """ a model that copies what it sees is right about every token except the hidden ones """
    model, x = build('mdlm', block_size=64), torch.randint(5, (8, 64))
    model.denoise = lambda xt, x0, ids=None: F.one_hot(xt, 8).double()
    model.logits = lambda x: x
    assert set(model.metrics(x, x).values()) == {0.0}

@torch.no_grad()
def test_greedy_rows_do_not_depend_on_their_batch():
    """ P21: block size 1 and temperature 0 leave nothing to chance, so a row is the same alone and in a batch """
    model = build('bd3lm', diffusion_block_size=1, begin_id=6)
    prompts = [torch.randint(5, (1, n)) for n in (0, 2, 5)]
    padded = [F.pad(p, (0, 5 - p.size(1)), value=-1) for p in prompts]
    together = model.generate(torch.cat(padded), 3, temperature=0)
    for p, row in zip(prompts, together):
        assert torch.equal(model.generate(p, 8 - p.size(1), temperature=0)[0], row)

def test_wrong_settings_end_in_a_sentence():
    for objective, settings, word in [
        ('mdlm', dict(mask_id=None), 'needs mask_id'),
        ('mdlm', dict(t_min=0.5, t_max=0.5), 'in order'),
        ('bd3lm', dict(diffusion_block_size=2, ar_weight=1.0), 'clean_causal'),
        ('bd3lm', {}, 'needs diffusion_block_size'),
        ('bd3lm', dict(attention='full'), 'works with attention block'),
        ('mdlm', dict(t_dist='gauss'), 'uniform, bell'),
        ('mdlm', dict(clean_causal=True), 'leave it out'),
        ('mdlm', dict(attention='hierarchical', segments='2,3'), 'add up to 5'),
    ]:
        with pytest.raises(UserError, match=word):
            build(objective, **settings)

def test_what_generation_keeps_training_can_use():
    """ a mask that generate needs first is no inference tensor, which autograd may refuse to save """
    model = build('mdlm', attention='block', diffusion_block_size=3)
    model.generate(torch.zeros(1, 0, dtype=torch.long), 8)
    masks = list(model._masks.values())
    assert len(masks) == 1 and not masks[0].is_inference()
