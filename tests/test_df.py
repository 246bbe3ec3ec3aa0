"""
Diffusion forcing against numbers produced by the published code, and the laws it must obey.
https://github.com/buoyancy99/diffusion-forcing, commit 475e0bc, run on the CPU in float32.
df_golden.npz is sequence first, (T, B, C); everything here is batch first. The numbers were made
with a stand-in for the network: a plain causal function of x and of the real noise level, `net`.
"""
import importlib.util
import itertools
import math
import os
import re
import sys

import numpy as np
import pytest
import torch
from torch.nn import functional as F

import tools.plot
from model import (DFGPT, GPT, DFPublishedConfig, DFText, DFTextConfig, DFTextReader, GPTConfig, Sinusoidal, UserError,
                   df_loss_weight, df_real_levels, df_schedule, scheduling_matrix, score)

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
GOLDEN = np.load(os.path.join(ROOT, 'tests', 'df_golden.npz'))
NAMES = list(GOLDEN.files)
SEQUENCE_FIRST = '_TBC?$|_out$|noise_ctx$|noise_step$|raw_noise$|^mp_|x_pred$'

def golden(name):
    """ an array of the published code, batch first """
    array = torch.from_numpy(GOLDEN[name])
    return array.transpose(0, 1) if re.search(SEQUENCE_FIRST, name) else array

def close(a, b):
    return torch.allclose(a.float(), b.float(), atol=1e-4, rtol=1e-4)

def net(x, k):
    """ the stand-in that the numbers were made with: x (B, T, C), real levels k (B, T) """
    past = x.cumsum(1) / torch.arange(1, x.size(1) + 1)[:, None]
    level = k[..., None] / 32 * golden('lin_c')
    return x @ golden('lin_W1').T + past @ golden('lin_W2').T + golden('lin_b') + level

SIZES = dict(block_size=7, vocab_size=11, text_size=9, n_layer=2, n_head=2, n_embd=8)
PATH = dict(df_sampling_timesteps=32, df_scheduling_matrix='pyramid') # unless a test says otherwise

def build(seed=0, own=DFGPT, **settings):
    """ a small model of class `own` with large random weights """
    torch.manual_seed(seed)
    model = own(own.config_class(**{**SIZES, **PATH, **settings})).eval()
    for p in model.parameters():
        if p.dim() == 2:
            torch.nn.init.normal_(p, std=0.4)
    return model

def published(pattern):
    """ the arrays whose name matches, as test parameters: (name, groups) """
    found = [(m[0], m.groups()) for m in (re.fullmatch(pattern, name) for name in NAMES) if m]
    assert found
    return pytest.mark.parametrize('name, parts', found, ids=[name for name, _ in found])

def draws(*arrays):
    """ a function noise(shape) that returns these raw draws in order; each must be asked for in its own shape """
    arrays = iter(arrays)
    def noise(shape):
        array = next(arrays)
        assert tuple(shape) == tuple(array.shape)
        return array
    return noise

# ---- the published numbers

def test_schedule():
    schedule = df_schedule('cosine', 32)
    names = [n for n in NAMES if n.startswith('sched_')]
    assert {n.removeprefix('sched_cosine_') for n in names} == schedule.keys()
    for name, values in schedule.items():
        assert values.dtype == torch.float32
        assert close(values, golden(f'sched_cosine_{name}'))

@published(r'realsteps_T32_S(\d+)')
def test_real_levels(name, parts):
    assert torch.equal(df_real_levels(32, int(parts[0])), golden(name))

def our_loss_weight(kind):
    """ our name for a loss weight of the published code """
    return {'minsnr': 'min_snr'}.get(kind, kind)

@published(r'lw(1?)_cosine_(\w+)_(fused|minsnr)_TB')
def test_loss_weights(name, parts):
    one, objective, kind = parts
    k = golden(f'lw{one}_noise_levels_TB')
    snr = df_schedule('cosine', 32)['snr']
    found = df_loss_weight(k, snr, 5.0, 0.95, objective, our_loss_weight(kind))
    assert close(found, golden(name))

def test_q_sample():
    found = build().q_sample(golden('x0_TBC'), golden('k_TB'), golden('q_noise_TBC'))
    assert close(found, golden('q_sample_cosine_TBC'))

@published(r'mp_cosine_(\w+)_clip([\d.]+)_model_out')
def test_model_predictions_and_posterior_mean(name, parts):
    objective, clip = parts
    model = build(df_objective=objective, df_clip_noise=float(clip))
    x, k = golden('xt_TBC'), golden('k_TB')
    eps, x0, out = model._df_model_predictions(x, k, net)
    mean = model.df_at('posterior_mean_coef1', k) * x0 + model.df_at('posterior_mean_coef2', k) * x
    expected = {'pred_noise': eps, 'pred_x_start': x0, 'model_out': out, 'post_mean': mean}
    for what, found in expected.items():
        assert close(found, golden(name.replace('model_out', what)))

@published(r'fw_cosine_(\w+)_clip([\d.]+)_(fused|minsnr)_raw_noise')
def test_training_loss(name, parts):
    objective, clip, kind = parts
    model = build(df_objective=objective, df_clip_noise=float(clip), df_loss_weight=our_loss_weight(kind))
    x0, k = golden('x0_TBC'), golden('k_TB')
    noise = model.df_noise((3, 7, 8), draws(golden(name)))
    _, found, out = model._df_model_predictions(model.q_sample(x0, k, noise), k, net)
    loss = model._compute_loss_weight(k)[..., None] * (out - model.df_target(x0, k, noise)) ** 2
    assert close(found, golden(name.replace('raw_noise', 'x_pred')))
    assert close(loss, golden(name.replace('raw_noise', 'loss_TBC')))
    assert close(loss.mean(), golden(name.replace('raw_noise', 'loss_mean')))

@published(r'ddpm_cosine_(\w+)_stab([1-9]\d*)_clip([\d.]+)_out')
def test_ddpm_step(name, parts):
    objective, stab, clip = parts
    model = build(df_objective=objective, df_stabilization_level=int(stab), df_clip_noise=float(clip))
    levels = golden('ddpm_curr_idx_TB'), golden('ddpm_next_idx_TB')
    context, step = (golden(name.replace('_out', end)) for end in ('_noise_ctx', '_noise_step'))
    found = model._sample_step_seq(golden('xt_TBC'), *levels, net, draws(context, step))
    assert close(found, golden(name))

@published(r'ddim_cosine_(\w+)_S(\d+)_eta([\d.]+)_stab([1-9]\d*)_out')
def test_ddim_step(name, parts):
    objective, S, eta, stab = parts
    settings = dict(df_sampling_timesteps=int(S), df_ddim_eta=float(eta), df_stabilization_level=int(stab))
    model = build(df_objective=objective, **settings)
    levels = golden(f'ddim_S{S}_curr_idx_TB'), golden(f'ddim_S{S}_next_idx_TB')
    draw = golden(name.replace('_out', '_noise_step'))
    for step in model._ddim_sample_step_seq, model._sample_step_seq: # S is below 32, so the second calls the first
        assert close(step(golden('xt_TBC'), *levels, net, draws(draw)), golden(name))

@published(r'sm_(pyramid|full_sequence|autoregressive)_S8_h(\d+)_us([\d.]+)')
def test_scheduling_matrices(name, parts):
    assert torch.equal(scheduling_matrix(parts[0], int(parts[1]), 8, float(parts[2])), golden(name))

@pytest.mark.parametrize('name, settings', [
    ('ro_ddim_pyr', dict(df_sampling_timesteps=8, df_ddim_eta=0.5)),
    ('ro_ddpm_full', dict(df_scheduling_matrix='full_sequence')),
])
def test_whole_roll_outs(name, settings):
    """
    Context, sliding window and chunks together. Every draw is asked for in the published order, and
    every step goes from and to the published levels.
    """
    model = build(block_size=5, df_stabilization_level=3, df_objective='pred_x0', df_chunk_size=3, **settings)
    xs, flat = golden(f'{name}_xs_TBC'), torch.from_numpy(GOLDEN[f'{name}_noise_flat'])
    at, starts, ends = 0, [], []
    def noise(shape):
        nonlocal at
        B, T, C = shape
        at += B * T * C
        return flat[at - B * T * C:at].view(T, B, C).transpose(0, 1)
    step = model._sample_step_seq
    def recorded(x, curr, next, *more):
        starts.extend(curr[0].tolist())
        ends.extend(next[0].tolist())
        return step(x, curr, next, *more)
    model._sample_step_seq = recorded
    out = model.generate_df(xs[:, :2], xs.size(1) - 2, net, noise)
    assert close(out, golden(f'{name}_pred_TBC'))
    assert torch.equal(out[:, :2], xs[:, :2])
    assert at == len(flat)
    assert starts == GOLDEN[f'{name}_from_flat'].tolist()
    assert ends == GOLDEN[f'{name}_to_flat'].tolist()

@published(r'sinemb_dim(\d+)_k-1..31')
def test_level_embedding(name, parts):
    assert close(Sinusoidal(int(parts[0]))(torch.arange(-1, 32)), golden(name))

# ---- where ours differs from the published code, and why

@published(r'ddp?i?m_cosine_(\w+)_(?:S(\d+)_eta([\d.]+)_)?stab0(?:_clip([\d.]+))?_out')
def test_published_stabilization_0_reads_the_context_as_pure_noise(name, parts):
    """
    Their level 0 - 1 wraps around to the last level. So the published code treats the context as we do
    at stabilization level 32, except that it labels the context -1.
    """
    objective, S, eta, clip = parts
    settings = dict(df_objective=objective, df_sampling_timesteps=int(S or 32),
                    df_ddim_eta=float(eta or 0), df_clip_noise=float(clip or 5))
    kind = name.split('_')[0] + (f'_S{S}' if S else '')
    levels = golden(f'{kind}_curr_idx_TB'), golden(f'{kind}_next_idx_TB')
    kept = [name.replace('_out', end) for end in ('_noise_ctx', '_noise_step')]
    def step(stab, net):
        noise = draws(*(golden(n) for n in kept if n in NAMES))
        model = build(df_stabilization_level=stab, **settings)
        return model._sample_step_seq(golden('xt_TBC'), *levels, net, noise)
    assert not close(step(1, net), golden(name))
    assert close(step(32, lambda x, k: net(x, k.masked_fill(levels[0] == 0, -1))), golden(name))

@pytest.mark.parametrize('u', [0.0, 0.3, 0.5, 1.0, 1.7, 2.0, 4.0])
@pytest.mark.parametrize('h', [1, 2, 3, 4, 5, 8])
def test_trapezoid_is_symmetric_and_ends_clean_where_the_published_one_does_not(h, u):
    """ the left half of theirs is ours; each assertion after it shows one difference """
    ours, theirs = scheduling_matrix('trapezoid', h, 8, u), golden(f'sm_trapezoid_S8_h{h}_us{u}')
    assert torch.equal(ours, ours.flip(1))
    assert (ours[0] == 8).all()
    assert (ours[-1] == 0).all()
    n, half = min(len(ours), len(theirs)), (h + 1) // 2
    assert torch.equal(ours[:n, :half], theirs[:n, :half])
    # theirs mirrors token t to h - t, not to h - 1 - t
    assert all(torch.equal(theirs[:, -t], theirs[:, t]) for t in range(1, half))
    # so with an even h one token in the middle, which is never denoised, is called clean from the start
    if h % 2 == 0:
        assert (theirs[:, half] == 0).all()
    # and theirs either lacks the last row or has some idle rows after it
    if len(theirs) >= len(ours):
        assert theirs[-1, 0] == 0
    else:
        assert theirs[-1, :half].max() == 1
        assert len(theirs) == len(ours) - 1
    assert (theirs[len(ours):, :half] == 0).all()

# ---- laws of the pure functions

def sigmoid_signal(t):
    """ the signal left at time t, 0 to 1, of a sigmoid schedule from -3 to 3 """
    sigmoid = lambda x: 1 / (1 + math.exp(-x))
    return (sigmoid(3) - sigmoid(6 * t - 3)) / (sigmoid(3) - sigmoid(-3))

SIGNALS = {
    'cosine': lambda t: math.cos((t + 0.008) / 1.008 * math.pi / 2) ** 2,
    'sigmoid': sigmoid_signal,
}
SCHEDULES = [('linear', 21), ('linear', 32), ('cosine', 1), ('cosine', 1000), ('sigmoid', 1), ('sigmoid', 32)]

@pytest.mark.parametrize('kind, T', SCHEDULES)
def test_schedules_are_their_formulas(kind, T):
    schedule, abar = df_schedule(kind, T), 1.0
    tolerance = dict(rel_tol=1e-3 if kind == 'sigmoid' else 1e-5, abs_tol=1e-12)
    for k in range(T):
        if kind == 'linear':
            beta = 0.1 / T + k / (T - 1) * 19.9 / T
        else:
            beta = min(0.999, 1 - SIGNALS[kind]((k + 1) / T) / SIGNALS[kind](k / T))
        before, abar = abar, abar * (1 - beta)
        expected = {
            'betas': beta,
            'alphas_cumprod': abar,
            'snr': abar / (1 - abar),
            'posterior_variance': beta * (1 - before) / (1 - abar),
            'posterior_mean_coef1': beta * before ** 0.5 / (1 - abar),
            'sqrt_recipm1_alphas_cumprod': (1 / abar - 1) ** 0.5,
        }
        for name, value in expected.items():
            assert math.isclose(schedule[name][k].item(), value, **tolerance)
    assert all(values.shape == (T,) and values.isfinite().all() for values in schedule.values())

def test_impossible_schedules_end_in_a_sentence():
    for kind, T, sentence in [
        ('linear', 20, 'needs df_timesteps of at least 21, not 20'),
        ('linear', 1, 'at least 21'),
        ('cosine', 0, 'at least 1'),
        ('quadratic', 32, 'expected one of linear, cosine, sigmoid'),
    ]:
        with pytest.raises(UserError, match=sentence):
            df_schedule(kind, T)
    for args, sentence in [
        (('cone', 3, 8, 1.0), 'one of pyramid'),
        (('pyramid', 0, 8, 1.0), 'is empty'),
        (('pyramid', 3, 0, 1.0), 'is empty'),
        (('pyramid', 3, 8, -1.0), '0 or more'),
        (('pyramid', 3, 8, math.inf), '0 or more'),
    ]:
        with pytest.raises(UserError, match=sentence):
            scheduling_matrix(*args)
    for args, sentence in [
        (('pred_x', 'fused'), 'one of pred_noise'),
        (('pred_x0', 'max_snr'), 'one of fused'),
    ]:
        with pytest.raises(UserError, match=sentence):
            df_loss_weight(torch.zeros(1, 1, dtype=torch.long), torch.ones(1), 5.0, 0.95, *args)

@pytest.mark.parametrize('objective', ['pred_noise', 'pred_x0', 'pred_v'])
@pytest.mark.parametrize('decay', [0.0, 0.6, 0.95])
def test_fused_weights_are_a_loop_over_tokens(objective, decay):
    """
    The running average over the past, one token after the other, for 300 tokens.
    The first token, and every token without memory, has the weight of min-SNR.
    """
    snr, k = df_schedule('sigmoid', 40)['snr'], torch.randint(40, (3, 300))
    fused = df_loss_weight(k, snr, 3.0, decay, objective, 'fused')
    plain = df_loss_weight(k, snr, 3.0, decay, objective, 'min_snr')
    assert close(fused[:, 0], plain[:, 0])
    assert close(fused, plain) == (decay == 0)
    for row, weights in zip(k, fused):
        average = None
        for level, weight in zip(row, weights.tolist()):
            own = snr[level].item() / 3
            clipped = min(own, 1)
            past = 0 if average is None else decay * average
            a = 1 - (1 - past) * (1 - clipped)
            b = 1 - (1 - past) * (1 - own)
            expected = {'pred_noise': a / b, 'pred_x0': 3 * a, 'pred_v': 3 * a / (3 * b + 1)}[objective]
            assert math.isclose(weight, expected, rel_tol=1e-3, abs_tol=1e-4)
            average = clipped if average is None else decay * average + (1 - decay) * clipped
    assert (df_loss_weight(k, snr, 3.0, decay, objective, 'uniform') == 1).all()

def test_a_clean_past_makes_pure_noise_count():
    """
    Pure noise after clean tokens is next-token prediction as diffusion forcing sees it.
    min-SNR gives it no weight, fused SNR nearly the largest weight there is.
    """
    k, snr = torch.tensor([[0] * 40 + [31]]), df_schedule('cosine', 32)['snr']
    assert df_loss_weight(k, snr, 5.0, 0.95, 'pred_x0', 'min_snr')[0, -1] < 1e-4
    assert abs(df_loss_weight(k, snr, 5.0, 0.95, 'pred_x0', 'fused')[0, -1] - 4.75) < 1e-3

@pytest.mark.parametrize('kind', ['pyramid', 'full_sequence', 'autoregressive', 'trapezoid'])
def test_levels_fall_by_one_or_wait(kind):
    """ no level rises or falls by more than 1, so that ddpm and ddim can both follow every matrix """
    for h in 1, 2, 7:
        for u in 0.0, 0.4, 1.0, 2.5:
            matrix = scheduling_matrix(kind, h, 6, u)
            falls = matrix.diff(dim=0).neg()
            assert matrix.dtype == torch.int64
            assert (matrix[0] == 6).all()
            assert (matrix[-1] == 0).all()
            assert falls.min() >= 0
            assert falls.max() == 1
            assert (falls.sum(1) > 0).all() # no call for nothing

# ---- laws of a step

@pytest.mark.parametrize('objective', ['pred_noise', 'pred_x0', 'pred_v'])
@pytest.mark.parametrize('kind', ['linear', 'cosine', 'sigmoid'])
def test_ddpm_is_ddim_with_all_steps_and_all_noise(objective, kind):
    """ in mean (no noise drawn) and in standard deviation (noise of 1), at every level """
    model = build(block_size=8, df_ddim_eta=1.0, df_objective=objective, df_beta_schedule=kind)
    curr = torch.arange(1, 33).view(4, 8)
    x, steps = torch.randn(4, 8, 8), []
    for step in model._sample_step_seq, model._ddim_sample_step_seq:
        mean = step(x, curr, curr - 1, net, torch.zeros)
        shifted = step(x, curr, curr - 1, net, torch.ones)
        steps.append((mean, shifted - mean))
    (ddpm_mean, ddpm_std), (ddim_mean, ddim_std) = steps
    assert torch.allclose(ddpm_mean, ddim_mean, atol=2e-3, rtol=1e-3)
    assert torch.allclose(ddpm_std, ddim_std, atol=2e-3, rtol=1e-3)
    assert (ddim_std[curr > 1] > 0).all()
    assert (ddim_std[curr == 1] == 0).all()

@pytest.mark.parametrize('S', [8, 32])
def test_any_mixture_of_waiting_and_moving_tokens(S):
    """ a waiting token is untouched, bit for bit; a moving one does not depend on which others move """
    model = build(df_sampling_timesteps=S, df_ddim_eta=0.3)
    x = torch.randn(64, 7, 8)
    curr = torch.randint(S + 1, (64, 7))
    curr[:, 0] = 0
    moves = (torch.rand(64, 7) < 0.5) & (curr > 0)
    draw = torch.randn(64, 7, 8)
    mixed = model._sample_step_seq(x, curr, curr - moves.long(), net, lambda shape: draw)
    every = model._sample_step_seq(x, curr, (curr - 1).clamp(min=0), net, lambda shape: draw)
    assert torch.equal(mixed[~moves], x[~moves])
    assert close(mixed[moves], every[moves])
    assert mixed.isfinite().all()
    assert not close(mixed[moves], x[moves])

def test_steps_that_make_no_sense_end_in_a_sentence():
    x, two, three = torch.randn(1, 2, 8), torch.tensor([[0, 2]]), torch.tensor([[0, 3]])
    ddpm, ddim = build(), build(df_sampling_timesteps=8)
    for step in ddpm._sample_step_seq, ddim._sample_step_seq, ddim._ddim_sample_step_seq:
        for curr, next in (two, three), (two + 40, two), (two, two - 1):
            with pytest.raises(UserError, match='no token.s noise may rise'):
                step(x, curr, next, net)
    with pytest.raises(UserError, match='lowers a level by 1'):
        ddpm._sample_step_seq(x, three, three - torch.tensor([[0, 2]]), net)
    with pytest.raises(UserError, match='guidance needs DDIM'):
        ddpm._sample_step_seq(x, two, two, net, guidance_fn=lambda x0: x0.sum())
    assert ddim._sample_step_seq(x, three, three * 0, net).isfinite().all()

@pytest.mark.parametrize('objective', ['pred_noise', 'pred_x0', 'pred_v'])
def test_guidance_is_a_gradient_step_on_the_noise(objective):
    """ with a linear network and linear guidance, whose gradient d sum(w x0) / dx is known """
    model = build(df_sampling_timesteps=8, df_objective=objective)
    x, w = torch.randn(2, 3, 8), torch.randn(8)
    curr, next = torch.tensor([[0, 3, 8], [1, 2, 5]]), torch.tensor([[0, 2, 8], [0, 1, 2]])
    linear = lambda x, k: 0.3 * x
    free = model._ddim_sample_step_seq(x, curr, next, linear, guidance_fn=None)
    guided = model._ddim_sample_step_seq(x, curr, next, linear, guidance_fn=lambda x0: (x0 * w).sum())
    real = df_real_levels(32, 8)
    abar = df_schedule('cosine', 32)['alphas_cumprod']
    for b, t in (0, 1), (1, 1), (1, 2):
        a, a_next = abar[real[curr[b, t]]], abar[real[next[b, t]]]
        slope = {
            'pred_noise': (1 - 0.3 * (1 - a).sqrt()) / a.sqrt(),
            'pred_x0': 0.3,
            'pred_v': a.sqrt() - 0.3 * (1 - a).sqrt(),
        }[objective]
        moved = -(1 - a_next).sqrt() * slope * w # in the noise; x0 follows from x and the noise
        expected = (1 - a_next).sqrt() * moved - a_next.sqrt() * (1 / a - 1).sqrt() * moved
        assert torch.allclose(guided[b, t] - free[b, t], expected, atol=1e-3, rtol=1e-3)
    assert torch.equal(guided[0, [0, 2]], x[0, [0, 2]]) # these wait
    assert torch.allclose(guided[1, 0], free[1, 0], atol=1e-5) # no guidance on the last step

# ---- the network and its loss

@pytest.mark.parametrize('attention', ['causal', 'full'])
@pytest.mark.parametrize('more', [{}, dict(df_level_embed='concat', pos='learned')])
def test_no_leakage_by_gradient(attention, more):
    """ the prediction at i depends on the noisy tokens and levels up to i; with full attention, on all """
    model = build(attention=attention, **more).double()
    x = torch.randn(1, 7, 8, dtype=torch.double, requires_grad=True)
    levels = torch.rand(1, 7, dtype=torch.double, requires_grad=True)
    out = model.df_network(x, levels * 31)
    allowed = torch.ones(7, 7).tril() > 0 if attention == 'causal' else torch.ones(7, 7) > 0
    for i in range(7):
        by_x, by_level = torch.autograd.grad(out[0, i].square().sum(), (x, levels), retain_graph=True)
        assert torch.equal(by_x[0].abs().sum(-1) > 0, allowed[i])
        assert torch.equal(by_level[0].abs() > 0, allowed[i])

VARIANTS = [
    {},
    dict(pos='learned'),
    dict(pos='learned', df_x0_wpe=True),
    dict(df_level_embed='concat', bias=True),
    dict(attention='full', df_objective='pred_v'),
]

@pytest.mark.parametrize('more', VARIANTS)
def test_loss_starts_finite_repeats_with_the_seed_and_reaches_every_parameter(more):
    torch.manual_seed(0)
    sizes = dict(block_size=16, vocab_size=11, n_layer=2, n_head=2, n_embd=16)
    model = DFGPT(DFPublishedConfig(**{**sizes, **PATH, **more}))
    idx, losses = torch.randint(11, (4, 16)), []
    assert (model.df_head.weight == 0).all()
    for seed in 1, 1, 2:
        torch.manual_seed(seed)
        losses.append(model(idx, idx)[1].item())
    assert losses[0] == losses[1] != losses[2]
    assert 0 < losses[0] < 5 # noise has variance 1, and the head starts at zero
    logits, loss = model(idx, idx)
    loss.backward()
    assert all(p.grad is not None for p in model.parameters())
    assert logits.shape == (4, 16, 11)
    assert model.row_length == 16
    assert model.df_head.weight.grad.abs().sum() > 0
    assert not any(name.startswith('lm_head') for name, _ in model.named_parameters())
    kept = [name for name in model.state_dict() if 'df_' in name]
    assert all(name.startswith(('df_head', 'df_mix', 'df_error')) for name in kept) # constants stay out

@pytest.mark.parametrize('objective', ['pred_noise', 'pred_x0', 'pred_v'])
def test_the_target_is_detached_and_the_noisy_input_is_not(objective):
    model = build(df_objective=objective, pos='learned', df_x0_wpe=True)
    idx = torch.randint(9, (4, 7))
    model(idx, idx)[1].backward()
    assert model.transformer.wte.weight.grad.abs().sum() > 0
    model.zero_grad()
    torch.nn.init.zeros_(model.df_head.weight) # now nothing passes through the network
    model(idx, idx)[1].backward()
    assert (model.transformer.wte.weight.grad == 0).all()
    assert (model.transformer.wpe.weight.grad == 0).all()

def test_unscored_tokens_are_context():
    """
    Unscored tokens are read at the stabilization level without noise, as sampling reads a prompt.
    The loss is the mean over scored tokens.
    """
    model, idx, seen = build(df_stabilization_level=3), torch.randint(9, (2, 7)), []
    targets = idx.clone()
    targets[:, :4] = -1
    model.df_network = lambda x, k: seen.append((x, k)) or torch.full_like(x, 0.5)
    torch.manual_seed(0)
    loss = model(idx, targets)[1]
    (x, k), x0 = seen[0], model.transformer.wte(idx)
    assert torch.allclose(x[:, :4], x0[:, :4] * model.df_sqrt_alphas_cumprod[2])
    assert (k[:, :4] == 2).all()
    assert (k[:, 4:] != 2).any()
    a = model.df_alphas_cumprod[k][:, 4:, None]
    noise = (x[:, 4:] - a.sqrt() * x0[:, 4:]) / (1 - a).sqrt()
    weight = df_loss_weight(k, model.df_snr, 5.0, 0.95, 'pred_noise', 'fused')[:, 4:, None]
    assert torch.allclose(loss, (weight * (0.5 - noise) ** 2).mean(), rtol=1e-4)
    assert model(idx, torch.full_like(idx, -1))[1] == 0
    model(idx)
    x, k = seen[-1]
    assert (k == 2).all()
    assert torch.equal(x, x0 * model.df_sqrt_alphas_cumprod[2])

def test_noise_levels_are_drawn_per_token_and_all_of_them():
    model, seen = build(df_timesteps=4, df_sampling_timesteps=4), []
    model.df_network = lambda x, k: seen.append(k) or torch.zeros_like(x)
    for _ in range(50):
        model(torch.zeros(32, 7, dtype=torch.long), torch.zeros(32, 7, dtype=torch.long))
    k = torch.stack(seen)
    shares = torch.bincount(k.flatten()) / k.numel()
    assert (shares - 0.25).abs().max() < 0.02
    assert (k[..., 0] == k[..., 1]).float().mean() < 0.3

def test_logits_are_distances_to_embeddings():
    model, x0 = build(), torch.randn(5, 8)
    E = model.transformer.wte.weight[:9]
    expected = -(x0[:, None] - E).square().sum(-1) / 2 * model.df_snr[0]
    logits = model.logits(x0)
    assert torch.allclose(logits[:, :9].log_softmax(-1), expected.log_softmax(-1), atol=1e-3)
    assert (logits[:, 9:] == -math.inf).all()
    assert torch.equal(model.logits(E).argmax(-1), torch.arange(9))

@pytest.mark.parametrize('x0_wpe', [True, False])
def test_logits_of_a_text_need_no_positions(x0_wpe):
    """ a network that finds x0 gives back the text, whether x0 holds positions or not """
    model = build(pos='learned', df_x0_wpe=x0_wpe, df_objective='pred_x0')
    idx = torch.randint(9, (2, 7))
    for table in model.transformer.wte, model.transformer.wpe: # far apart, compared with the noise of level 8
        torch.nn.init.normal_(table.weight, std=9.0)
    model.df_network = lambda x, k: x / model.df_at('sqrt_alphas_cumprod', k)
    found = model.metrics(idx, idx)
    assert torch.equal(model(idx)[0].argmax(-1), idx)
    assert found['accuracy_level_8'] == 1
    assert 0.8 < found['embedding_spread'] <= 1

def test_an_ar_checkpoint_begins_a_df_model():
    """ trunk and embeddings; the head of ar has no use, that of df stays as it is """
    sizes = dict(block_size=7, vocab_size=11, n_layer=2, n_head=2, n_embd=8)
    ar, df = GPT(GPTConfig(**sizes)), build(df_level_embed='concat')
    head = df.df_head.weight.clone()
    df.load_state_dict(ar.state_dict())
    for name, p in ar.named_parameters():
        assert name == 'lm_head.weight' or torch.equal(p, df.get_parameter(name))
    assert torch.equal(head, df.df_head.weight)
    with pytest.raises(RuntimeError, match='size mismatch'):
        df.load_state_dict(GPT(GPTConfig(**{**sizes, 'n_embd': 16})).state_dict())

@pytest.mark.parametrize('settings, sentence', [
    (dict(df_timesteps=0), 'df_timesteps is 0, expected at least 1'),
    (dict(df_sampling_timesteps=33), 'df_sampling_timesteps is 33, expected 1 to df_timesteps, 32'),
    (dict(df_sampling_timesteps=0), 'is 0, expected 1 to'),
    (dict(df_snr_clip=0.0), 'df_snr_clip is 0.0, expected a finite'),
    (dict(df_snr_clip=math.nan), 'df_snr_clip is nan'),
    (dict(df_snr_clip=math.inf), 'df_snr_clip is inf'),
    (dict(df_cum_snr_decay=1.0), 'df_cum_snr_decay is 1.0'),
    (dict(df_cum_snr_decay=-0.1), 'expected 0 or more and below 1'),
    (dict(df_clip_noise=0.0), 'df_clip_noise is 0.0'),
    (dict(df_ddim_eta=1.1), 'df_ddim_eta is 1.1, expected 0 to 1'),
    (dict(df_ddim_eta=-1.0), 'df_ddim_eta is -1.0'),
    (dict(df_stabilization_level=0), 'would be the last, pure noise'),
    (dict(df_stabilization_level=33), 'expected 1 to df_timesteps, 32'),
    (dict(df_uncertainty_scale=-1.0), 'df_uncertainty_scale is -1.0'),
    (dict(df_uncertainty_scale=33.0), 'no two tokens are denoised together'),
    (dict(df_chunk_size=8), 'df_chunk_size is 8, expected 0 to block_size, 7'),
    (dict(df_chunk_size=-1), 'df_chunk_size is -1'),
    (dict(df_chunk_size='all'), 'df_chunk_size is all'),
    (dict(df_x0_wpe=True), "False with pos='rope'"),
    (dict(n_embd=6, n_head=1), 'n_embd is 6, expected a multiple of 4'),
    (dict(n_embd=4, n_head=1), 'from 8 on'),
    (dict(df_beta_schedule='linear', df_timesteps=20, df_sampling_timesteps=8), 'at least 21'),
    (dict(attention='block', diffusion_block_size=2), 'works with attention causal'),
    (dict(df_objective='x0'), "df_objective is 'x0', expected one of pred_noise"),
    (dict(df_sampler='mixture'), 'only objective df has a distribution over tokens'),
    (dict(own=DFText, df_embed_norm=0.0), 'df_embed_norm is 0.0, expected a finite length'),
    (dict(own=DFText, df_clean_share=1.1), 'df_clean_share is 1.1, expected a share'),
    (dict(own=DFText, df_sampling_timesteps=33), 'expected 1 to df_timesteps, 32'),
    (dict(df_beta_schedule='square'), 'expected one of linear'),
    (dict(df_loss_weight='snr'), 'expected one of fused'),
    (dict(df_level_embed='film'), 'expected one of add'),
    (dict(df_scheduling_matrix='cone'), 'expected one of pyramid'),
])
def test_wrong_settings_end_in_a_sentence(settings, sentence):
    with pytest.raises(UserError, match=re.escape(sentence)):
        build(**settings)

# ---- writing

KINDS = [
    dict(),
    dict(df_sampling_timesteps=8, df_ddim_eta=0.5),
    dict(df_scheduling_matrix='full_sequence'),
    dict(df_scheduling_matrix='trapezoid', df_chunk_size=7),
    dict(df_scheduling_matrix='autoregressive', df_sampling_timesteps=4),
    dict(df_chunk_size=1),
    dict(attention='full', df_uncertainty_scale=0.5),
]

def only_fills_holes(now, then):
    """ whether `then` equals `now` everywhere but where `now` is still unwritten, -1 """
    return all(a == b or a == -1 for a, b in zip(now, then))

@pytest.mark.parametrize('kind', KINDS, ids=lambda k: '-'.join(map(str, k.values())) or 'default')
@pytest.mark.parametrize('pos', [{}, dict(pos='learned', df_x0_wpe=True)])
def test_prompts_stay_and_text_outgrows_the_context(kind, pos):
    model, calls = build(**kind, **pos), []
    model.df_network = lambda x, k: calls.append(x.size(1)) or DFGPT.df_network(model, x, k)
    prompt = torch.tensor([[1, 2, 3, 4], [5, 6, -1, -1], [-1, 7, -1, 8]]) # rows of unequal length, and gaps
    steps = []
    out = model.generate(prompt, 15, on_step=lambda *step: steps.append((step[1].clone(), *step[2:])))
    assert out.shape == (3, 19)
    assert torch.equal(out[:, :4][prompt != -1], prompt[prompt != -1])
    assert out.min() >= 0 and out.max() < 9
    last = steps[-1][-1]
    assert max(calls) == 7
    assert len(calls) == len(steps) == last['nfe']
    assert last['done'] == last['total'] == 19
    written = [idx[0].tolist() for idx, *_ in steps]
    assert all(only_fills_holes(now, then) for now, then in zip(written, written[1:]))
    probs = torch.cat([probs for _, probs, _ in steps])
    assert len(probs) == 3 * 15 + 4
    assert torch.allclose(probs.sum(-1), torch.ones(49))
    xs = model.transformer.wte(prompt.clamp(min=0))
    calls.clear()
    # no calls where there is nothing to write
    model.generate(torch.tensor([[1, -1] + [2] * 20 + [-1, 3]]), 0)
    assert len(calls) <= 2 * (32 + 6)
    embedded = model.generate_df(xs, 5)
    assert torch.equal(embedded[:, :4], xs)
    assert embedded.shape == (3, 9, 8)
    assert model.generate(torch.zeros(2, 0, dtype=torch.long), 3).shape == (2, 3)
    assert torch.equal(model.generate(out, 0), out)

@pytest.mark.parametrize('S', [4, 32])
@pytest.mark.parametrize('pos', [{}, dict(pos='learned', df_x0_wpe=True)])
def test_a_network_that_can_count_writes_numbers_past_the_context(S, pos):
    """ each token is the one before it plus 1; positions, where x0 holds them, are those in the window """
    model = build(df_scheduling_matrix='autoregressive', df_sampling_timesteps=S, df_objective='pred_x0',
                  df_chunk_size=2, **pos)
    torch.nn.init.normal_(model.transformer.wte.weight)
    if pos:
        # so large that positions which are not subtracted change the text
        torch.nn.init.normal_(model.transformer.wpe.weight, std=5.0)
    def count(x, k):
        wpe = model.df_wpe(x.size(1))
        before = model.logits(x / model.df_at('sqrt_alphas_cumprod', k) - wpe).argmax(-1)
        return model.transformer.wte(F.pad(before + 1, (1, 0))[:, :-1] % 9) + wpe
    model.df_network = count
    def generate(prompt, n, **options):
        return model.generate(torch.tensor(prompt), n, temperature=0, **options).tolist()
    counted = [[(first + i) % 9 for i in range(32)] for first in (3, 8)]
    assert generate([[3, 4], [8, 0]], 30) == counted
    filled = [[3, 4, 5, 6, 7, 8, 0], [8, 0, 1, 2, 3, 4, 5]]
    assert generate([[3, 4, -1, 6], [8, 0, 1, -1]], 3) == filled
    ended = [[3, 4, 5, 6] + [7] * 28, [8, 0, 1, 2, 3, 4, 5, 6] + [7] * 24]
    assert generate([[3, 4], [8, 0]], 30, stop=7) == ended

def test_a_stop_counts_when_all_before_it_is_written():
    """ a trapezoid writes both ends of a chunk before its middle """
    model = build(df_scheduling_matrix='trapezoid', df_objective='pred_x0', df_chunk_size=0)
    row = torch.tensor([[1, 2, 3, 4, 5, 6, 7]])
    model.df_network = lambda x, k: model.transformer.wte(row)
    nothing = torch.zeros(1, 0, dtype=torch.long)
    assert torch.equal(model.generate(nothing, 7, temperature=0, stop=7), row)

def test_the_context_is_seen_where_it_lies_in_the_window():
    """ at the stabilization level, scaled, and with the positions that the tokens have in the window """
    settings = dict(df_sampling_timesteps=8, df_stabilization_level=2, df_chunk_size=3)
    model, seen = build(pos='learned', df_x0_wpe=True, **settings), []
    model.df_network = lambda x, k: seen.append((x, k)) or torch.zeros_like(x)
    prompt = torch.randint(9, (1, 7))
    model.generate_df(prompt, 3)
    x, k = seen[0]
    x0 = model.transformer.wte(prompt[:, 3:]) + model.transformer.wpe.weight[:4]
    assert torch.allclose(x[:, :4], x0 * model.df_sqrt_alphas_cumprod[1], atol=1e-6)
    assert (k[:, :4] == 1).all()
    assert (k[:, 4:] == 31).all()

def test_a_chunk_of_everything_must_fit():
    model = build(df_chunk_size=0)
    assert model.generate(torch.zeros(1, 2, dtype=torch.long), 7).shape == (1, 9)
    too_long = 'denoises all 8 new tokens together, but the context has 7'
    with pytest.raises(UserError, match=too_long):
        model.generate(torch.zeros(1, 2, dtype=torch.long), 8)
    with pytest.raises(UserError, match='8 tokens do not fit the context'):
        model(torch.zeros(1, 8, dtype=torch.long))

# ---- predictions are distributions over tokens

def speller(seed=0, **settings):
    """ a small model that predicts tokens, neither by a guess nor with certainty """
    sizes = dict(vocab_size=5, text_size=3, begin_id=3, block_size=4)
    model = build(seed, DFText, **{**sizes, **settings})
    model.df_head.weight.data *= 0.3
    return model

@pytest.mark.parametrize('attention', ['causal', 'full'])
def test_a_posterior_is_bayes_rule(attention):
    """
    p(token | past, z) is proportional to p(token | past) times the density of z given the token's
    embedding, a normal density.
    """
    model = speller(attention=attention)
    z, k, E = torch.randn(2, 4, 8), torch.randint(32, (2, 4)), model.embeddings()[:3]
    a = model.df_alphas_cumprod[k][..., None]
    normal = torch.distributions.Normal(a.sqrt()[..., None] * E, (1 - a).sqrt()[..., None])
    density = normal.log_prob(z[:, :, None]).sum(-1)
    expected = (model.df_context(z, k)[..., :3] + density).log_softmax(-1)
    found, x0 = model.df_posterior(z, k)
    assert torch.allclose(found, expected, atol=1e-3)
    assert torch.allclose(x0, found.exp() @ E, atol=1e-3)
    assert torch.allclose(model.embeddings().norm(dim=1), torch.tensor(4.0))
    assert (model.df_network(z, k)[..., 3:] == -math.inf).all()

@pytest.mark.parametrize('pos', ['rope', 'learned'])
def test_what_a_token_may_depend_on(pos):
    """
    What the model expects of token i depends on the noisy tokens before i, not on token i's own noisy
    copy. Where the past is another noisy copy of the text, only that copy's tokens before i count.
    The posterior of token i then depends on token i of the first copy, and on no other of its tokens.
    """
    model = speller(pos=pos)
    streams = [(torch.randn(1, 4, 8), torch.randint(20, 30, (1, 4))) for _ in range(2)]
    (z, k), (other, levels) = streams
    base, two = model.df_context(z, k), model.df_network(z, k, (other, levels))
    def differs(found, base):
        return (found != base).any(-1)[0]
    assert torch.allclose(model.df_network(z, k, (z, k)), model.df_network(z, k), atol=1e-4)
    for j in range(4):
        moved = z.clone()
        moved[:, j] += torch.randn(8)
        assert torch.equal(differs(model.df_context(moved, k), base), torch.arange(4) > j)
        assert torch.equal(differs(model.df_network(moved, k, (other, levels)), two), torch.arange(4) == j)
        moved = other.clone()
        moved[:, j] += torch.randn(8)
        assert torch.equal(differs(model.df_network(z, k, (moved, levels)), two), torch.arange(4) > j)

@pytest.mark.parametrize('more', [
    dict(pos='learned'),
    dict(pos='learned', df_x0_wpe=True),
    dict(df_level_embed='concat'),
])
def test_two_streams_of_a_squared_error(more):
    """ a token sees its own noisy copy and the past of the other stream, which sees nothing of the first """
    model, seen = build(**more), []
    streams = [(torch.randn(1, 7, 8), torch.randint(32, (1, 7))) for _ in range(2)]
    (z, k), (other, levels) = streams
    trunk = model.trunk
    model.trunk = lambda *args, **more: seen.append(trunk(*args, **more)) or seen[-1]
    base = model.df_network(z, k, (other, levels))
    assert torch.allclose(model.df_network(z, k, (z, k)), model.df_network(z, k), atol=1e-5)
    for j in range(7):
        moved = z.clone()
        moved[:, j] += torch.randn(8)
        found = model.df_network(moved, k, (other, levels))
        changed = (found - base).abs().amax(-1)[0] > 1e-6
        assert torch.equal(changed, torch.arange(7) == j)
        assert torch.allclose(seen[-1][:, 7:], seen[0][:, 7:], atol=1e-6)

def test_training_rows_are_clean_or_noisy_and_ask_for_every_token():
    model, seen = speller(df_clean_share=0.5).train(), []
    idx = torch.randint(3, (8, 4))
    idx[:, 0], targets = 2, idx.clone()
    targets[:, 0] = -1
    uniform = torch.zeros(8, 4, 5).masked_fill(torch.arange(5) > 2, -math.inf)
    model.df_context = lambda x, k, cache=None, end=None: seen.append((x, k)) or uniform[:len(x)]
    assert abs(model(idx, targets)[1].item() - math.log(3)) < 1e-5
    (x, k), x0 = seen[0], model.embeddings()[idx] * model.df_sqrt_alphas_cumprod[0]
    clean = (x - x0).abs().amax(-1) < 1e-5
    assert clean[:4].all()
    assert clean[:, 0].all()
    assert (k[clean] == 0).all()
    assert not clean[4:, 1:].any()
    assert (k[4:, 1:] > 0).any()
    model(idx)
    assert torch.allclose(seen[-1][0], x0)
    counts, model.config.df_clean_share = 0, 0.25
    for _ in range(400): # a batch that the share does not divide: 3 rows
        model(idx[:3], idx[:3])
        counts += (seen[-1][1] == 0).all(1).sum()
    assert abs(counts / 400 - 0.75) < 0.1

def test_learning_changes_neither_length_nor_variety_of_embeddings():
    torch.manual_seed(0)
    model = DFText(DFTextConfig(block_size=8, vocab_size=8, n_layer=1, n_head=2, n_embd=16))
    idx = torch.arange(8).repeat(8, 1)
    optimizer, = model.configure_optimizers('adamw', 3e-3)
    before, losses = model.metrics(idx, idx)['embedding_spread'], []
    for _ in range(60):
        loss = model(idx, idx)[1]
        losses.append(loss.item())
        loss.backward()
        assert all(p.grad is not None for p in model.parameters())
        optimizer.step()
        optimizer.zero_grad()
    assert torch.allclose(model.embeddings().norm(dim=1), torch.tensor(4.0))
    assert abs(model.metrics(idx, idx)['embedding_spread'] - before) < 0.1
    assert abs(losses[0] - math.log(8)) < 1e-3
    assert losses[-1] < 0.5

# ---- likelihood

ALL = torch.cartesian_prod(*[torch.arange(3)] * 3) # every text of three tokens

def test_nats_of_an_untrained_model_are_those_of_a_guess():
    sizes = dict(block_size=8, vocab_size=11, text_size=9, n_layer=2, n_head=2, n_embd=16)
    model = DFText(DFTextConfig(**sizes)).eval()
    idx = torch.randint(9, (4, 8))
    one_step = dict(df_scheduling_matrix='autoregressive', df_sampling_timesteps=1)
    for bound in model, model.variant('autoregressive', **one_step):
        nats, scored = bound.nll_bound(idx, idx, 3)
        assert nats.shape == (4, 3)
        assert (scored == 8).all()
        assert (nats / 8 - math.log(9)).abs().max() < 1e-2
    targets = idx.clone()
    targets[:, :5] = -1
    nats, scored = model.nll_bound(idx, targets, 2)
    assert (scored == 3).all()
    assert (nats / 3 - math.log(9)).abs().max() < 1e-2

@pytest.mark.parametrize('own, settings', [(DFText, {}), (DFGPT, dict(df_objective='pred_x0'))])
def test_one_step_per_token_is_ar_nll(own, settings, monkeypatch):
    """
    The path of one step per token, where z = noise + sqrt(abar) x0, scores what pure noise scores.
    Both get the same draws of noise.
    """
    model, idx = build(own=own, **settings), torch.randint(9, (64, 7))
    noise = torch.randn(64, 7, 8)
    path = model.variant('autoregressive', df_scheduling_matrix='autoregressive', df_sampling_timesteps=1)
    monkeypatch.setattr(torch, 'randn_like', lambda x: noise)
    a, b = (m.nll_bound(idx, idx)[0] / 7 for m in (model, path))
    assert (a - b).abs().max() < 1e-2
    assert a.std() > 0.05

def test_weights_that_predict_tokens_are_a_gpt():
    """
    The nats of df are those of ar with the same weights, up to what the pure noise adds.
    The two also write the same text.
    """
    model, idx = speller(block_size=6), torch.randint(3, (32, 6))
    gpt = model.views()['ar']
    (a, n), (b, m) = model.nll_bound(idx, idx, 20), gpt.nll_bound(idx, idx)
    assert torch.equal(n, m)
    assert (a.mean(1) - b[:, 0]).abs().max() < 0.05
    assert b.std() > 0.5
    assert gpt.bound_name == 'nll'
    prompt = torch.tensor([[0, 1], [2, -1]])
    expected = gpt.generate(prompt, 4, temperature=0)
    for more in [
        dict(sampler='mixture'),
        dict(sampler='ddim', steps=5),
        dict(sampler='ddpm'),
        dict(sampler='mixture', steps=1),
    ]:
        found = model.generate(prompt, 4, temperature=0, df_scheduling_matrix='autoregressive', **more)
        assert torch.equal(found, expected)

@pytest.mark.parametrize('S', [8, 32])
def test_a_mixture_step_is_the_posterior_of_the_drawn_token(S):
    """
    z_next given z and the token, by Bayes' rule from two normal densities: z_next given the token, and
    z given z_next. Its mean and its standard deviation, which nothing clamps.
    """
    model, curr = speller(df_sampling_timesteps=S, block_size=S), torch.arange(1, S + 1)[None]
    z, real, v = torch.randn(1, S, 8), df_real_levels(32, S), torch.tensor(1)
    sure = lambda x, k: F.one_hot(v, 5).log().expand(*x.shape[:2], 5)
    def step(value): # with this value for every draw of noise
        return model._sample_step_seq(z, curr, curr - 1, sure, lambda shape: torch.full(shape, value))
    mean, moved = step(0.0), step(9.0)
    a = model.df_alphas_cumprod[real[1:]]
    a_next = torch.cat((torch.ones(1), a[:-1]))
    alpha = a / a_next
    precision = 1 / (1 - a_next) + alpha / (1 - alpha)
    from_token = (a_next.sqrt() / (1 - a_next))[:, None] * model.embeddings()[v]
    from_z = (alpha.sqrt() / (1 - alpha))[:, None] * z[0]
    expected = (from_token + from_z) / precision[:, None]
    deviation = (moved - mean)[0, :, 0] / 9
    assert torch.allclose(mean[0, 1:], expected[1:], atol=1e-3)
    assert torch.allclose(mean[0, 0], model.embeddings()[v], atol=1e-5)
    assert torch.allclose(deviation[1:], precision[1:] ** -0.5, atol=1e-3)

def written(model, n, **options):
    """ how often each of ALL is written, as a share """
    torch.manual_seed(0)
    out = model.generate(torch.full((n, 3), -1), 0, **options)
    return torch.bincount(out @ torch.tensor([9, 3, 1]), minlength=27) / n

@pytest.mark.parametrize('S, sampler', [(1, 'mixture'), (3, 'mixture'), (1, 'ddim')])
def test_tokens_one_after_the_other_have_the_law_of_ar(S, sampler):
    model = speller(block_size=3, df_sampling_timesteps=S, df_scheduling_matrix='autoregressive',
                    df_sampler=sampler)
    for temperature in 1.0, 0.5:
        logits = model.views()['ar'](F.pad(ALL[:, :-1], (1, 0), value=3))[0]
        log_p = (logits / temperature).log_softmax(-1)
        p = log_p.gather(2, ALL[..., None]).sum((1, 2)).exp()
        shares = written(model, 20000, temperature=temperature)
        assert (shares - p).abs().sum() < 0.06
        assert p.max() < 0.6

@pytest.mark.parametrize('kind, S, chunk, attention', [
    ('pyramid', 2, 0, 'causal'),
    ('full_sequence', 3, 2, 'causal'),
    ('autoregressive', 2, 0, 'causal'),
    ('full_sequence', 2, 0, 'full'),
])
def test_a_path_bounds_what_the_mixture_writes(kind, S, chunk, attention):
    """ never below -log of how often a text is written; autoregressive: equal to it """
    model = speller(block_size=3, df_sampling_timesteps=S, df_chunk_size=chunk, attention=attention)
    model = model.variant(kind, df_scheduling_matrix=kind)
    p, texts = written(model, 20000), ALL.repeat(100, 1)
    nats = model.nll_bound(texts, texts, S * 2)[0].view(100, 27, -1).mean(2).T # strata: each step equally often
    slack, often = nats.mean(1) + p.log(), p > 0.005
    error = 4 * (nats.var(1) / 100 + 1 / (20000 * p)).sqrt() # of the bound and of the share
    assert often.sum() > 12
    assert (slack > -error)[often].all()
    assert (slack[often] * p[often]).sum() < 0.3
    assert kind != 'autoregressive' or (slack.abs() < error)[often].all()

@pytest.mark.parametrize('path', ['pyramid', 'full_sequence', 'autoregressive'])
def test_a_path_begins_with_what_pure_noise_still_tells(path):
    """ the KL divergence of the noisiest level from pure noise, per scored token; long embeddings enlarge it """
    model = speller(block_size=6, df_embed_norm=1000.0).variant(path)
    idx = torch.randint(3, (4, 6))
    model.df_step_nats = lambda idx, *levels: torch.zeros(idx.shape)
    targets = idx.masked_fill(torch.arange(6) < 2, -1)
    a, pure = model.df_alphas_cumprod[-1], torch.distributions.Normal(0, 1)
    noisiest = torch.distributions.Normal(a.sqrt() * model.embeddings()[idx], (1 - a).sqrt())
    expected = torch.distributions.kl_divergence(noisiest, pure).sum(-1)[:, 2:].sum(1)
    nats, _ = model.nll_bound(idx, targets, 2)
    assert torch.allclose(nats, expected[:, None].expand(-1, 2), rtol=1e-3)
    assert expected.min() > 1

@pytest.mark.parametrize('S', [8, 32])
def test_a_step_costs_what_the_mixture_does_not_know(S, monkeypatch):
    """
    -log of the mixture of q(z_next | z, token) over the predicted tokens, minus -log of the same density
    given the true token. Both are written out as normal densities.
    """
    model, idx = speller(df_sampling_timesteps=S, block_size=6), torch.randint(3, (64, 6))
    curr = torch.randint(2, S + 1, (64, 6))
    real, noise = df_real_levels(32, S), [torch.randn(64, 6, 8) for _ in range(2)]
    k, k_next, E = real[curr], real[curr - 1], model.embeddings()[:3]
    a, a_next = (model.df_alphas_cumprod[level][..., None] for level in (k, k_next))
    z_next = a_next.sqrt() * E[idx] + (1 - a_next).sqrt() * noise[0]
    z = (a / a_next).sqrt() * z_next + (1 - a / a_next).sqrt() * noise[1]
    def density(z, a): # log q(z | token) of every token
        normal = torch.distributions.Normal(a.sqrt()[..., None] * E, (1 - a).sqrt()[..., None])
        return normal.log_prob(z[:, :, None]).sum(-1)
    # log q(z_next | z, token), without the term log q(z | z_next), which does not depend on the token
    step = density(z_next, a_next) - density(z, a)
    log_p, _ = model.df_posterior(z, k)
    expected = step.gather(2, idx[..., None])[..., 0] - (log_p + step).logsumexp(-1)
    draws = iter(noise)
    monkeypatch.setattr(torch, 'randn_like', lambda x: next(draws))
    found = model.df_step_nats(idx, curr, curr - 1)
    assert torch.allclose(found, expected, atol=1e-2, rtol=1e-3)
    assert expected.std() > 0.05

def test_steps_of_a_squared_error_add_up():
    """
    A normal step costs half the gain in signal-to-noise ratio times the squared error.
    So with a constant guess the sum over all steps is known.
    """
    model = build(df_objective='pred_x0', df_scheduling_matrix='full_sequence', df_chunk_size=0,
                  df_sampling_timesteps=8)
    idx = torch.randint(9, (3, 7))
    model.df_network = lambda x, k, past=None: torch.full_like(x, 0.1)
    model.df_error.fill_(0.25)
    real = df_real_levels(32, 8)[1:]
    nats, _ = model.variant('full_sequence').nll_bound(idx, idx, 8) # a stratum per step
    x0, a = model.embeddings()[idx], model.df_alphas_cumprod[-1]
    prior = (a * x0.square() - a - (1 - a).log()).sum(-1) / 2
    distance = (0.1 - model.embeddings()[:9]).square().sum(-1)
    last = (-distance / 2 / 0.25).log_softmax(0)[idx]
    gain = model.df_snr[real[0]] - model.df_snr[real[-1]]
    expected = prior + gain / 2 * (x0 - 0.1).square().sum(-1) - last
    assert torch.allclose(nats.mean(1), expected.sum(1), rtol=1e-3)
    assert model.bound_name == 'nelbo_gaussian'

def test_the_error_of_training_is_remembered_by_level():
    model = build(df_objective='pred_x0', df_timesteps=4, df_sampling_timesteps=4).train()
    idx = torch.randint(9, (64, 7))
    model.df_network = lambda x, k: model.transformer.wte(idx) + k[..., None] + 1.0
    for _ in range(200):
        model(idx, idx)
    assert torch.allclose(model.df_error, torch.tensor([1.0, 4.0, 9.0, 16.0]), rtol=1e-2)
    assert 'df_error' in model.state_dict()
    before = model.df_error.clone()
    model.eval()(idx, idx)
    assert torch.equal(before, model.df_error)

def test_the_score_names_the_bound():
    names = {DFGPT: ('nelbo_gaussian', 'mse'), DFText: ('nelbo', 'ce')}
    for own, attention in itertools.product(names, ['causal', 'full']):
        name, loss = names[own]
        model = build(own=own, attention=attention, begin_id=10)
        idx = torch.randint(9, (4, 7))
        found = score(model, [dict(idx=idx, targets=idx)], 2)
        assert (found['name'], found['sign'], found['unit']) == (name, '<=', 'nats/token')
        assert model.loss_name == loss
        assert found['nats_per_token'] > 1
        views = {'autoregressive', 'pyramid', 'full_sequence'}
        if (own, attention) == (DFText, 'causal'):
            views.add('ar')
        assert model.views().keys() == views

# ---- writing tokens

@pytest.mark.parametrize('kind', [
    dict(),
    dict(df_sampling_timesteps=8, df_sampler='ddim', df_ddim_eta=0.5),
    dict(df_sampler='ddpm', df_scheduling_matrix='full_sequence'),
    dict(df_scheduling_matrix='trapezoid', df_chunk_size=7, df_sampling_timesteps=3),
    dict(attention='full', df_uncertainty_scale=0.5),
])
def test_token_prompts_stay_and_text_outgrows_the_context(kind):
    model, calls, steps = speller(block_size=7, **kind), [], []
    model.df_context = lambda x, k, cache=None, end=None: calls.append(x.size(1)) or DFText.df_context(model, x, k)
    prompt = torch.tensor([[1, 2, 0, 1], [2, 1, -1, -1], [-1, 2, -1, 0]])
    out = model.generate(prompt, 15, on_step=lambda *step: steps.append((step[1].clone(), *step[2:])))
    assert out.shape == (3, 19)
    assert torch.equal(out[:, :4][prompt != -1], prompt[prompt != -1])
    assert out.min() >= 0 and out.max() < 3
    last = steps[-1][-1]
    assert max(calls) == 7
    assert len(calls) == len(steps) == last['nfe']
    assert last['done'] == last['total'] == 19
    shown = [idx[0].tolist() for idx, *_ in steps]
    assert all(only_fills_holes(now, then) for now, then in zip(shown, shown[1:]))
    probs = torch.cat([probs for _, probs, _ in steps])
    assert len(probs) == 3 * 15 + 4
    assert torch.allclose(probs.sum(-1), torch.ones(49))
    assert (probs[:, 3:] == 0).all()
    assert torch.equal(model.generate(out, 0), out)
    assert model.generate(torch.zeros(2, 0, dtype=torch.long), 3).shape == (2, 3)

def test_temperature_top_k_and_top_p_shape_what_is_expected():
    model, texts = speller(block_size=3, df_sampling_timesteps=2), []
    empty = torch.full((200, 3), -1)
    for options in dict(temperature=0), dict(top_k=1), dict(top_p=1e-6), dict(temperature=1e-4):
        texts.append(model.generate(empty[:20], 0, df_scheduling_matrix='autoregressive', **options))
    assert all(torch.equal(texts[0], t) and (t == t[:1]).all() for t in texts)
    assert len(model.generate(empty, 0).unique(dim=0)) > 8

def test_guidance_goes_on_from_what_is_expected_given_noise():
    """ logits are guided as u + (1 + w) (c - u): c given the prompt, u given noise in its place """
    model, w = speller(block_size=4, df_sampling_timesteps=3, df_scheduling_matrix='full_sequence'), 1.5
    prompt, seen, steps = torch.tensor([[2, 1, -1, -1]]).expand(500, -1), [], []
    c = torch.tensor([2.0, 1.0, 0.0, -math.inf, -math.inf])
    u = torch.tensor([0.0, 1.0, 0.5, -math.inf, -math.inf])
    def context(x, k, cache=None, end=None):
        seen.append(k[0].tolist())
        return (u if k[0, 0] == 31 else c).expand(*k.shape, 5)
    model.df_context = context
    out = model.generate(prompt, 0, guidance=w, on_step=lambda *step: steps.append(step[-1]['nfe']))
    p = (u + (1 + w) * (c - u))[:3].softmax(0)
    assert steps == [2, 4, 6]
    assert seen[0] == [0, 0, 31, 31]
    assert seen[1] == [31] * 4
    assert seen[5][:2] == [31, 31]
    shares = torch.bincount(out[:, 2:].flatten(), minlength=3) / 1000
    assert (shares - p).abs().max() < 0.05
    for wrong in -1.0, math.nan:
        with pytest.raises(UserError, match='guidance is'):
            model.generate(prompt, 0, guidance=wrong)
    with pytest.raises(UserError, match='with objective df'):
        build().generate(torch.zeros(1, 1, dtype=torch.long), 2, guidance=1.0)

def test_options_of_a_call_are_settings_of_the_model():
    model, nfe = speller(block_size=8, df_chunk_size=8), []
    empty = torch.full((1, 8), -1)
    for options, expected in [
        ({}, 32 + 7),
        (dict(steps=4), 4 + 7),
        (dict(steps=4, df_scheduling_matrix='full_sequence'), 4),
        (dict(steps=4, df_uncertainty_scale=0.5), 4 + 3),
        (dict(steps=2, df_scheduling_matrix='autoregressive'), 16),
        (dict(sampler='ddim', steps=1), 8),
    ]:
        model.generate(empty, 0, on_step=lambda *step: nfe.append(step[-1]['nfe']), **options)
        assert nfe[-1] == expected
        assert model.config.df_sampling_timesteps == 32
        assert model.path is None
    for options, sentence in [
        (dict(steps=33), 'df_sampling_timesteps is 33'),
        (dict(steps=4, sampler='ddpm'), 'ddim or auto where sampling leaves levels out'),
        (dict(df_scheduling_matrix='cone'), 'expected one of pyramid'),
        (dict(sampler='first_hitting'), 'expected one of auto, mixture'),
    ]:
        with pytest.raises(UserError, match=sentence):
            model.generate(empty, 0, **options)

def test_a_row_ends_at_its_stop():
    model = speller(block_size=8, vocab_size=11, text_size=9, begin_id=9, df_scheduling_matrix='trapezoid',
                    df_sampling_timesteps=2, df_chunk_size=0)
    row = torch.tensor([[1, 2, 3, 4, 5, 6, 7, 8], [7, 5, 0, 0, 0, 0, 0, 0]])
    model.df_context = lambda x, k, cache=None, end=None: F.one_hot(row, 11)[:, :end] * 100.0
    found = model.generate(torch.full((2, 8), -1), 0, stop=7)
    assert found.tolist() == [[1, 2, 3, 4, 5, 6, 7, 7], [7] * 8]
    given = torch.tensor([[-1] * 8, [7] + [-1] * 7]) # a stop in the prompt does not end the row
    assert model.generate(given, 0, stop=7)[1].tolist() == row[1].tolist()

def test_what_is_drawn_is_what_is_written_and_what_is_done_stays():
    """ also with embeddings so small, compared with the noise, that no token could be read from the noisy one """
    model = speller(block_size=8, df_chunk_size=0, df_embed_norm=0.1)
    row = torch.tensor([[0, 2, 1, 1, 0, 2, 2, 0]])
    model.df_context = lambda x, k, cache=None, end=None: F.one_hot(row, 5)[:, :end] * 1e4
    assert model.generate(torch.full((3, 8), -1), 0, steps=2).tolist() == row.tolist() * 3
    model = speller(block_size=8)
    for steps in 1, 2, 4, 8:
        seen = []
        def on_step(step, idx, probs, state):
            seen.append((state['done'], idx.clone()))
        out = model.generate(torch.full((6, 8), -1), 0, stop=1, steps=steps, on_step=on_step)
        assert all(torch.equal(idx[:, :done], out[:, :done]) for done, idx in seen)
        assert seen[-1][0] == 8
    guided = speller(df_stabilization_level=4, df_chunk_size=0)
    levels, network = [], DFText.df_context
    guided.df_context = lambda x, k, cache=None, end=None: levels.append(k) or network(guided, x, k)
    prompt = torch.tensor([[0, -1, -1, -1]])
    guided.generate(prompt, 0, guidance=1.0, df_scheduling_matrix='full_sequence')
    for own, unguided in zip(levels[::2], levels[1::2]):
        if own[0, 1] != 3: # only finished text is hidden from the second pass
            assert unguided[0].tolist() == [31, *own[0, 1:].tolist()]

def test_guidance_hides_what_is_finished_and_nothing_else():
    """ a token in its last step from the least noisy level is read at the same real level as finished text """
    model, seen, finished = speller(block_size=4, df_chunk_size=0), [], [torch.tensor([True, False, False, False])]
    network = model.df_context
    model.df_context = lambda x, k, cache=None, end=None: seen.append(k[0]) or network(x, k)
    def on_step(step, idx, probs, state):
        finished.append(idx[0] != -1)
    model.generate(torch.tensor([[0, -1, -1, -1]]), 0, guidance=1.0, on_step=on_step)
    last_steps = 0
    for done, guided, unguided in zip(finished, seen[::2], seen[1::2]):
        assert torch.equal(unguided, guided.masked_fill(done[:len(guided)], 31)) # later ones still wait
        last_steps += ((guided == 0) & ~done[:len(guided)]).sum()
    assert last_steps == 3

@pytest.mark.parametrize('matrix', ['autoregressive', 'pyramid', 'full_sequence', 'trapezoid'])
@pytest.mark.parametrize('chunk', [None, 0, 1, 3])
def test_the_cache_of_finished_text_is_exact(matrix, chunk, monkeypatch):
    """ gaps, guidance, windows past the context: the same text, and the same distributions at every call """
    cached, calls = DFTextReader.context, []
    def uncached(reader, before, x, level, k, cache=None):
        return cached(reader, before, x, level, k)
    prompts = [
        (torch.tensor([[1, 2], [0, 1]]), 5, {}),
        (torch.tensor([[1, -1, 2], [0, 2, -1]]), 5, dict(guidance=1.0)),
        (torch.zeros(2, 0, dtype=torch.long), 8, dict(sampler='ddim')),
        (torch.tensor([[1, 2, 0]]), 14, {}),
    ]
    for S, pos in (1, 'rope'), (3, 'learned'):
        settings = dict(df_sampling_timesteps=S, df_scheduling_matrix=matrix, df_chunk_size=chunk, pos=pos)
        model = speller(block_size=8, **settings).double()
        for prompt, n, options in prompts[:3] if chunk == 0 else prompts: # 0: all at once, which must fit
            found = []
            for context in cached, uncached:
                monkeypatch.setattr(DFTextReader, 'context', context)
                torch.manual_seed(1)
                probs = []
                out = model.generate(prompt, n, on_step=lambda *step: probs.append(step[2]), **options)
                found.append((out, torch.cat(probs)))
            assert torch.equal(found[0][0], found[1][0])
            assert torch.allclose(found[0][1], found[1][1], atol=1e-9)
            calls.append(len(probs))
    assert len(calls) >= 6

def test_a_call_reads_what_is_new():
    """ one token after another: the first of its calls reads the token that was finished last, too """
    model, rows = speller(block_size=8, df_sampling_timesteps=3, df_scheduling_matrix='autoregressive'), []
    trunk = model.trunk
    model.trunk = lambda x, *more: rows.append(x.size(1)) or trunk(x, *more)
    model.generate(torch.tensor([[1, 2]]), 6)
    assert rows == [3, 1, 1] + [2, 1, 1] * 5

def test_a_path_is_the_matrix_it_names():
    for kind in 'pyramid', 'full_sequence':
        model = speller(df_scheduling_matrix='autoregressive').variant(kind)
        assert model.config.df_scheduling_matrix == kind

# ---- a picture

@pytest.mark.parametrize('args, sentence', [
    ('scheduling_matrix config/df_published.py --horizon=5', ''),
    ('scheduling_matrix --df_scheduling_matrix=trapezoid --df_sampling_timesteps=6', ''),
    ('', 'name a picture'),
    ('atention', "no picture 'atention', expected one of mask, scheduling_matrix"),
    ('scheduling_matrix --horizon=0', 'is empty'),
    ('scheduling_matrix --df_scheduling_matrix=cone', 'expected one of pyramid'),
    ('scheduling_matrix --horizn=3', 'did you mean horizon'),
    ('scheduling_matrix config/nowhere.py', 'there is no config file'),
])
def test_pictures_from_settings_alone(tmp_path, monkeypatch, capsys, args, sentence):
    there = importlib.util.find_spec('matplotlib') is not None
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(sys, 'argv', ['plot', *args.split(), f'--output={tmp_path}/a.png'])
    if there and not sentence:
        importlib.reload(tools.plot).main()
        assert (tmp_path / 'a.png').stat().st_size > 5000
        (tmp_path / 'a.png').unlink()
        monkeypatch.setitem(sys.modules, 'matplotlib.figure', None)
    with pytest.raises(SystemExit) as stopped:
        importlib.reload(tools.plot).main()
    said = capsys.readouterr().err
    assert stopped.value.code == 2
    assert said.count('\n') == 1
    assert not (tmp_path / 'a.png').exists()
    assert (sentence or 'needs matplotlib') in said or not there

# ---- why the published recipe is no way to learn a language

def test_the_plain_recipe_collapses():
    """
    x_t is easiest to denoise when all embeddings are equal. So the loss falls because the embeddings
    fall together. Given clean context and a token in pure noise, the model then predicts that token no
    better than a guess, while ar learns the same text in the same time.
    """
    text = 'The quick brown fox jumps over the lazy dog, and so on.\n' * 9
    ids, batch = sorted(set(text)), torch.Generator().manual_seed(0)
    data, V = torch.tensor([ids.index(c) for c in text]), len(ids)
    rows = lambda n: data[torch.randint(len(data) - 16, (n, 1), generator=batch) + torch.arange(16)]
    def train(own, steps, **settings):
        torch.manual_seed(0)
        sizes = dict(block_size=16, vocab_size=V, n_layer=2, n_head=2, n_embd=32)
        model = own(own.config_class(**sizes, **settings))
        optimizer, = model.configure_optimizers('adamw', 3e-3, weight_decay=0.0)
        losses = []
        for _ in range(steps):
            x = rows(16)
            loss = model(x, x)[1]
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.item())
        return model, losses
    assert train(GPT, 100)[1][-1] < 1
    model, losses = train(DFGPT, 300, pos='learned', df_x0_wpe=True)
    x, last = rows(256), torch.arange(16) == 15
    found = model.metrics(x, x)
    assert losses[-1] < losses[0] / 4
    assert found['embedding_spread'] < 0.4
    assert found['accuracy_level_8'] < 0.1
    with torch.no_grad():
        k = torch.where(last, 31, 0).expand_as(x)
        wpe, x0 = model.df_wpe(16), model.transformer.wte(x)
        x_t = model.q_sample(x0 + wpe, k, model.df_noise(x0.shape))
        _, guess, _ = model._df_model_predictions(x_t, k)
        logits = model.logits(guess - wpe)[:, -1]
    # even at the best temperature
    nats = min(F.cross_entropy(logits * 10.0 ** -i, x[:, -1]).item() for i in range(8))
    assert abs(nats - math.log(V)) < 0.1
