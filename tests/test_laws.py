"""
Laws against quiet mistakes: what every setting of a config changes and what it leaves as it is, where
dropout acts, which optimizer has which parameter, and formulas written out a second time. Each law fails
under a wrong sign, place or constant that breaks nothing else.
"""
import dataclasses
import itertools
import math
import zlib
from unittest import mock

import pytest
import torch
from torch.nn import functional as F
from torch.nn.attention import flex_attention

from model import DFGPT, OBJECTIVES, ORDERS, Denoiser, UserError
from model import block_ids, dense_mask, load_checkpoint, pick_device, score, token_probs

TEXT = torch.tensor([
    [0, 3, 1, 4, 2, 2, 0, 1],
    [4, 4, 2, 0, 3, 1, 2, 3],
    [1, 0, 0, 2, 4, 3, 1, 4],
])

def fill(model):
    """
    Large random weights, so that every output depends on every input.
    The values of a parameter follow from its name, whatever its size.
    """
    for name, p in model.named_parameters():
        generator = torch.Generator().manual_seed(zlib.crc32(name.encode()))
        draws = torch.randn(256, 256, generator=generator)
        p.data = 0.4 * draws[:p.size(0), :p.size(1)] if p.dim() == 2 else 1 + 0.3 * draws[0, :p.size(0)]
        if name.endswith('bias'):
            p.data -= 1
    return model

def make(objective, **settings):
    """ a small filled model in evaluation mode: 5 ids of text, 5 begins, 7 is [MASK] """
    own = OBJECTIVES[objective]
    sizes = dict(block_size=8, vocab_size=9, text_size=5, begin_id=5, mask_id=7, n_layer=2, n_head=2, n_embd=16,
                 attention=own.attentions[0])
    if objective in ('bd3lm', 'aogpt'):
        sizes['diffusion_block_size'] = 4 if objective == 'bd3lm' else 1
    if issubclass(own, DFGPT):
        sizes |= dict(df_sampling_timesteps=32, df_scheduling_matrix='pyramid')
    return fill(own(own.config_class(**{**sizes, **settings}))).eval()

def batch(model):
    """ a text of which everything is scored; denoise is given one that is corrupted already """
    if type(model) is Denoiser:
        hidden = torch.tensor([0, 1, 1, 0, 0, 1, 0, 1]).bool()
        return dict(idx=TEXT.masked_fill(hidden, 7), targets=TEXT.masked_fill(~hidden, -1))
    return dict(idx=TEXT, targets=TEXT)

def label(value):
    """ the id of a test's parameter that is a dict of settings """
    return ('-'.join(map(str, value.values())) or 'default') if isinstance(value, dict) else None

# ---- what can be seen of a model

def shapes(model):
    return {name: tuple(p.shape) for name, p in model.named_parameters()}

def names(model):
    return [name for name, _ in model.named_parameters()]

def names_of_matrices(model):
    return [name for name, p in model.named_parameters() if p.dim() == 2]

def embedding_shape(model):
    return model.transformer.wte.weight.shape

def layer_names(model):
    return [name for name in names(model) if '.h.' in name]

def first_weights(model):
    """ the weights that a new model has, before fill """
    torch.manual_seed(0)
    return [p.detach() for p in type(model)(model.config).parameters()]

def longest(model):
    """ how many tokens it reads """
    for T in itertools.count(1):
        try:
            model(torch.zeros(1, T, dtype=torch.long))
        except UserError:
            return T - 1

def logits(model):
    return model(TEXT)[0]

def text_logits(model):
    """ logits of the ids that a text contains """
    return logits(model)[..., :5]

def possible(model):
    return logits(model).isfinite()

def columns(start, end):
    """ logits of some positions """
    return lambda model: logits(model)[:, start:end]

def loss(model, training=True):
    torch.manual_seed(0)
    return model.train(training)(**batch(model))[1].detach()

def gradient(model):
    torch.manual_seed(0)
    model.train()(**batch(model))[1].backward()
    return [p.grad for p in model.parameters()]

def bound(model):
    torch.manual_seed(0)
    return model.nll_bound(TEXT, TEXT, 2)

def scored(model):
    return bound(model)[1]

def levels(model):
    """ the noise level of every token """
    torch.manual_seed(0)
    return model.corrupt(TEXT, TEXT)[2]

def levels_per_row(model):
    return [len(row.unique()) for row in levels(model)]

def writing(model, prompt=TEXT[:, :2], **options):
    """ -> (what it writes, [(step, text so far, distributions, state), ...]) """
    calls, room = [], model.config.block_size - prompt.size(1)
    def on_step(step, idx, *more):
        calls.append((step, idx.clone(), *more))
    torch.manual_seed(0)
    return model.generate(prompt, room, on_step=on_step, **options), calls

def written(model):
    return writing(model)[0]

def written_embeddings(model):
    torch.manual_seed(0)
    return model.generate_df(TEXT[:, :2], 6)

def written_after_stops(model):
    """ many hot rows, each of them with several stops """
    return writing(model, TEXT.repeat(40, 1)[:, :1], stop=1, temperature=5.0)[0]

def first_prediction(model):
    return writing(model)[1][0][2]

def network_calls(model):
    return writing(model)[1][-1][3]['nfe']

def first_layer_runs(model):
    """ how often it runs in a step of training, forward and backward """
    runs = []
    model.transformer.h[0].attn.c_attn.register_forward_hook(lambda *_: runs.append(1))
    gradient(model)
    return len(runs)

def flex_masks(model):
    """ how many masks are made for FlexAttention """
    create = flex_attention.create_block_mask
    with mock.patch.object(flex_attention, 'create_block_mask', side_effect=create) as spy:
        bound(model)
    return spy.call_count

def alike(a, b):
    """ whether two things seen of models are equal, up to rounding """
    if torch.is_tensor(a) and a.is_floating_point():
        return a.shape == b.shape and torch.allclose(a, b, atol=1e-5)
    if torch.is_tensor(a):
        return a.shape == b.shape and torch.equal(a, b)
    if isinstance(a, (list, tuple)) and a and torch.is_tensor(a[0]):
        return len(a) == len(b) and all(map(alike, a, b))
    return a == b

# ---- every setting does something, and nothing else

HIERARCHY = dict(attention='hierarchical', segments='2,2,4')
EIGHT = dict(df_timesteps=16, df_sampling_timesteps=8)
# field, objective, other settings, two values of the field, what they make different, what they leave as it is
SETTINGS = [
    ('block_size', 'ar', {}, 8, 10, longest, logits),
    ('block_size', 'mdlm', dict(pos='learned'), 8, 10, longest, logits),
    ('block_size', 'df', {}, 8, 10, longest, shapes),
    ('vocab_size', 'ar', {}, 9, 12, shapes, text_logits),
    ('vocab_size', 'mdlm', {}, 9, 12, embedding_shape, text_logits),
    ('text_size', 'ar', {}, 5, 7, possible, text_logits),
    ('text_size', 'mdlm', {}, 5, 7, possible, text_logits),
    ('text_size', 'bd3lm', {}, 5, None, possible, text_logits),
    ('text_size', 'df', {}, 5, 7, possible, shapes),
    ('text_size', 'df_published', {}, 5, 7, possible, text_logits),
    ('begin_id', 'ar', {}, None, 5, scored, logits),
    ('begin_id', 'ar', {}, 5, 6, bound, logits),
    ('begin_id', 'ar', {}, 5, 6, loss, logits),
    ('begin_id', 'mdlm', dict(ar_weight=1.0), 5, 6, loss, bound),
    ('begin_id', 'bd3lm', {}, 5, 6, bound, scored),
    ('begin_id', 'bd3lm', {}, 5, 6, loss, levels),
    ('begin_id', 'bd3lm', {}, 5, 6, logits, shapes),
    ('begin_id', 'bd3lm', {}, 5, 6, first_prediction, network_calls),
    ('begin_id', 'df', {}, 5, 6, bound, scored),
    ('n_layer', 'ar', {}, 1, 2, layer_names, embedding_shape),
    ('n_head', 'ar', dict(qk_norm=False), 1, 2, logits, shapes),
    ('n_embd', 'ar', {}, 16, 32, shapes, names),
    ('dropout', 'ar', {}, 0.0, 0.5, loss, logits),
    ('dropout', 'denoise', {}, 0.0, 0.5, loss, logits),
    ('dropout', 'mdlm', {}, 0.0, 0.5, loss, bound),
    ('dropout', 'bd3lm', {}, 0.0, 0.5, loss, bound),
    ('dropout', 'df', {}, 0.0, 0.5, loss, bound),
    ('bias', 'ar', {}, False, True, logits, names_of_matrices),
    ('bias', 'df', {}, False, True, names, names_of_matrices),
    ('pos', 'ar', {}, 'rope', 'learned', names, layer_names),
    ('pos', 'ar', {}, 'rope', 'learned', logits, scored),
    ('pos', 'df', {}, 'rope', 'learned', logits, layer_names),
    ('pos', 'df_published', {}, 'rope', 'learned', logits, layer_names),
    ('norm', 'ar', {}, 'layernorm', 'rmsnorm', logits, shapes),
    ('mlp', 'ar', {}, 'swiglu', 'gelu', shapes, names),
    ('mlp', 'ar', {}, 'gelu', 'gelu_tanh', logits, shapes),
    ('qk_norm', 'ar', {}, True, False, logits, names_of_matrices),
    ('tie_weights', 'ar', {}, False, True, names, layer_names),
    ('init', 'ar', {}, 'zero', 'gpt2', first_weights, logits),
    ('attention', 'denoise', {}, 'full', 'causal', logits, shapes),
    ('attention', 'mdlm', {}, 'full', 'causal', logits, levels),
    ('attention', 'mdlm', dict(segments='2,2,4'), 'full', 'hierarchical', scored, shapes),
    ('attention', 'df', {}, 'causal', 'full', logits, shapes),
    ('diffusion_block_size', 'bd3lm', {}, 2, 4, logits, shapes),
    ('diffusion_block_size', 'bd3lm', {}, 2, 4, levels, shapes),
    ('diffusion_block_size', 'mdlm', dict(attention='block'), 2, 4, logits, levels),
    ('segments', 'mdlm', HIERARCHY, '2,2,4', '2,4,2', logits, scored),
    ('segments', 'bd3lm', HIERARCHY, '2,2,4', '4,2,2', scored, shapes),
    ('segments', 'ar', {}, '2,2,4', '2,6', written_after_stops, logits),
    ('causal_within_block', 'mdlm', HIERARCHY, False, True, logits, columns(0, 2)),
    ('causal_within_block', 'bd3lm', HIERARCHY, False, True, logits, columns(0, 2)),
    ('mask_id', 'mdlm', {}, 6, 7, loss, logits),
    ('mask_id', 'bd3lm', {}, 6, 7, bound, logits),
    ('mask_id', 'denoise', {}, 6, 7, first_prediction, loss),
    ('left_to_right', 'aogpt', {}, 0.0, 0.5, loss, bound),
    ('t_min', 'mdlm', {}, 0.0, 0.3, levels, bound),
    ('t_max', 'bd3lm', {}, 1.0, 0.8, levels, bound),
    ('t_dist', 'mdlm', {}, 'uniform', 'bell', levels, bound),
    ('single_ratio_per_sequence', 'mdlm', {}, True, False, levels_per_row, bound),
    ('clean_causal', 'bd3lm', {}, False, True, logits, levels),
    ('ar_weight', 'mdlm', {}, 0.0, 1.0, loss, bound),
    ('ar_weight', 'mdlm', {}, 0.5, 1.0, loss, bound),
    ('ar_weight', 'bd3lm', dict(clean_causal=True), 0.0, 1.0, loss, bound),
    ('attn_backend', 'bd3lm', dict(n_embd=32), 'sdpa', 'flex', flex_masks, bound),
    ('attn_backend', 'bd3lm', dict(n_embd=32), 'auto', 'flex', flex_masks, bound), # auto is sdpa on a CPU
    ('grad_checkpointing', 'ar', {}, False, True, first_layer_runs, gradient),
    ('grad_checkpointing', 'bd3lm', {}, False, True, first_layer_runs, gradient),
    ('df_timesteps', 'df', dict(df_sampling_timesteps=8), 8, 32, loss, shapes),
    ('df_sampling_timesteps', 'df', {}, 8, 32, network_calls, loss),
    ('df_objective', 'df_published', {}, 'pred_noise', 'pred_v', loss, shapes),
    ('df_embed_norm', 'df', {}, 4.0, 2.0, logits, shapes),
    ('df_clean_share', 'df', {}, 0.0, 1.0, loss, bound),
    ('df_clean_share', 'df', {}, 0.0, 0.3, loss, bound),
    ('df_sampler', 'df', EIGHT, 'mixture', 'ddim', written, loss),
    ('df_sampler', 'df_published', {}, 'ddpm', 'ddim', written, loss),
    ('df_beta_schedule', 'df', {}, 'cosine', 'sigmoid', loss, shapes),
    ('df_loss_weight', 'df_published', {}, 'fused', 'min_snr', loss, written),
    ('df_loss_weight', 'df_published', {}, 'fused', 'uniform', loss, written),
    ('df_snr_clip', 'df_published', {}, 5.0, 2.0, loss, written),
    ('df_cum_snr_decay', 'df_published', {}, 0.95, 0.5, loss, written),
    ('df_clip_noise', 'df_published', dict(df_objective='pred_x0'), 5.0, 0.5, loss, bound),
    ('df_clip_noise', 'df_published', {}, 5.0, 0.5, bound, shapes),
    ('df_ddim_eta', 'df_published', EIGHT, 0.0, 1.0, written_embeddings, loss),
    ('df_stabilization_level', 'df', {}, 1, 25, bound, shapes),
    ('df_stabilization_level', 'df_published', {}, 1, 9, written, loss),
    ('df_scheduling_matrix', 'df', {}, 'pyramid', 'full_sequence', network_calls, loss),
    ('df_uncertainty_scale', 'df', {}, 1.0, 2.0, network_calls, loss),
    ('df_chunk_size', 'df', {}, None, 1, network_calls, loss),
    ('df_chunk_size', 'df', {}, None, 0, network_calls, loss),
    ('df_x0_wpe', 'df_published', dict(pos='learned'), False, True, loss, shapes),
    ('df_level_embed', 'df_published', {}, 'add', 'concat', names, layer_names),
]

def test_no_setting_is_left_out():
    """ a new field of a config needs a row: what it changes, and what it does not """
    every = {field.name for kind in OBJECTIVES.values() for field in dataclasses.fields(kind.config_class)}
    assert every == {row[0] for row in SETTINGS}

@pytest.mark.filterwarnings('ignore:flex_attention called without')
@pytest.mark.parametrize('field, objective, others, a, b, differs, same', SETTINGS,
                         ids=['-'.join((row[0], row[1], row[5].__name__)) for row in SETTINGS])
def test_a_setting_changes_what_it_should_and_nothing_else(field, objective, others, a, b, differs, same):
    see = lambda observe, value: observe(make(objective, **{**others, field: value}))
    assert alike(see(differs, a), see(differs, a)) # what is drawn is the same each time
    assert not alike(see(differs, a), see(differs, b))
    assert alike(see(same, a), see(same, b))

# ---- dropout

DROPOUT = [ # objective, settings, passes through the trunk in a step of training
    ('ar', {}, 1),
    ('ar', dict(pos='learned', mlp='gelu', norm='rmsnorm', bias=True), 1),
    ('denoise', dict(attention='causal'), 1),
    ('mdlm', {}, 1),
    ('mdlm', HIERARCHY, 1),
    ('mdlm', dict(attention='block', diffusion_block_size=3), 1),
    ('mdlm', dict(ar_weight=1.0), 2),
    ('bd3lm', {}, 1),
    ('bd3lm', dict(begin_id=None, diffusion_block_size=8), 1),
    ('bd3lm', HIERARCHY, 1),
    ('bd3lm', dict(clean_causal=True, ar_weight=1.0, pos='learned'), 1),
    ('df', {}, 1),
    ('df', dict(attention='full', pos='learned'), 1),
    ('df_published', dict(pos='learned'), 1),
    ('df_published', dict(df_level_embed='concat'), 1),
]
every_dropout = pytest.mark.parametrize('objective, settings, passes', DROPOUT, ids=label)

@every_dropout
def test_dropout_acts_in_every_place_of_training(objective, settings, passes, monkeypatch):
    """
    Once on the embeddings, twice per layer on what the layer adds, and in every call of attention. Each of
    these calls matters: the loss changes when one call drops everything and the others drop nothing. When
    none drops anything, the loss is that of evaluation.
    """
    model = make(objective, dropout=0.3, **settings)
    weights, places, wiped = [], [], None
    attention = F.scaled_dot_product_attention
    def attend(q, k, v, attn_mask=None, dropout_p=0.0, **more):
        weights.append(dropout_p)
        return attention(q, k, v, attn_mask=attn_mask, **more)
    def dropout(x, p=0.5, training=True, inplace=False):
        places.append(p if training else 0.0)
        return x * (len(places) != wiped)
    monkeypatch.setattr(F, 'scaled_dot_product_attention', attend)
    monkeypatch.setattr(F, 'dropout', dropout)
    whole, n = loss(model), passes * (1 + 2 * 2)
    assert set(weights) == {0.3}
    assert places == [0.3] * n
    for wiped in range(1, n + 1):
        places.clear()
        assert not alike(loss(model), whole)
    weights.clear()
    places.clear()
    assert alike(loss(model, training=False), whole)
    assert not any(weights + places)

@every_dropout
def test_evaluation_drops_nothing(objective, settings, passes):
    """ so loss, bound, predictions and writing repeat themselves; two steps of training do not """
    model, plain = make(objective, dropout=0.3, **settings), make(objective, **settings)
    assert alike(loss(model, training=False), loss(plain, training=False))
    assert not alike(loss(model), loss(plain))
    for observe in logits, written, *([bound] if model.bound_name else []):
        assert alike(observe(model.eval()), observe(plain.eval()))

# ---- the network

SWITCHES = [
    {},
    dict(norm='rmsnorm'),
    dict(bias=True, mlp='gelu_tanh', pos='learned', qk_norm=False, tie_weights=True),
    dict(norm='rmsnorm', bias=True, mlp='gelu'),
    dict(pos='learned', mlp='gelu_tanh', norm='rmsnorm'),
    dict(begin_id=None, qk_norm=False),
]
every_switch = pytest.mark.parametrize('switches', SWITCHES, ids=label)

def turned(x):
    """ rotary positions of x (B, H, T, D) by complex numbers: dimensions i and i + D/2 are a pair """
    half = x.size(-1) // 2
    angle = torch.arange(x.size(-2))[:, None] / 10000 ** (torch.arange(half) / half)
    z = torch.complex(x[..., :half], x[..., half:]) * torch.polar(torch.ones_like(angle), angle)
    return torch.cat((z.real, z.imag), -1)

def written_out(model, idx):
    """ logits of idx (B, T), from the parameters and the config alone """
    c, w, (B, T) = model.config, model.state_dict(), idx.shape
    def norm(x, name, kind=c.norm):
        x = x if kind == 'rmsnorm' else x - x.mean(-1, keepdim=True)
        scale = (x.square().mean(-1, keepdim=True) + 1e-5).sqrt()
        return x / scale * w[name + '.weight'] + w.get(name + '.bias', 0)
    def linear(x, name):
        return x @ w[name + '.weight'].T + w.get(name + '.bias', 0)
    x = w['transformer.wte.weight'][idx]
    if c.pos == 'learned':
        x = x + w['transformer.wpe.weight'][:T]
    for i in range(c.n_layer):
        h = f'transformer.h.{i}.'
        qkv = linear(norm(x, h + 'ln_1'), h + 'attn.c_attn')
        qkv = qkv.view(B, T, 3, c.n_head, -1).permute(2, 0, 3, 1, 4)
        q, k = (norm(each, h + 'attn.qk_norm', 'layernorm') if c.qk_norm else each for each in qkv[:2])
        q, k = (turned(each) if c.pos == 'rope' else each for each in (q, k))
        att = q @ k.transpose(-1, -2) / math.sqrt(q.size(-1))
        att = att.masked_fill(torch.ones(T, T).triu(1).bool(), -math.inf).softmax(-1)
        x = x + linear((att @ qkv[2]).transpose(1, 2).reshape(B, T, -1), h + 'attn.c_proj')
        up = linear(norm(x, h + 'ln_2'), h + 'mlp.c_fc')
        if c.mlp == 'swiglu':
            up, gate = up.chunk(2, -1)
            up = up * gate * gate.sigmoid()
        else: # https://arxiv.org/abs/1606.08415, and its approximation
            inner = math.sqrt(2 / math.pi) * (up + 0.044715 * up ** 3)
            up = up * (1 + (inner.tanh() if c.mlp == 'gelu_tanh' else (up / math.sqrt(2)).erf())) / 2
        x = x + linear(up, h + 'mlp.c_proj')
    head = w['transformer.wte.weight' if c.tie_weights else 'lm_head.weight']
    found = norm(x, 'transformer.ln_f') @ head.T
    found[..., c.text_size:] = -math.inf
    return found

@every_switch
@torch.no_grad()
def test_the_network_is_its_formulas(switches):
    """ every switch, with gains and biases of their own """
    model = make('ar', **switches)
    assert torch.allclose(model(TEXT)[0], written_out(model, TEXT), atol=2e-5)

@every_switch
@torch.no_grad()
def test_writing_uses_the_same_network(switches):
    """
    A cached pass does not call the modules. So the distributions of every call are compared, with gains
    and biases of their own.
    """
    model = make('ar', **switches)
    begin = torch.full((3, int(model.config.begin_id is not None)), 5)
    out, calls = writing(model)
    for n, (step, idx, probs, state) in enumerate(calls, 2):
        expected = model(torch.cat((begin, out[:, :n]), 1))[0][:, -1]
        assert torch.allclose(probs, expected.softmax(-1), atol=1e-5)
    for objective, more in ('mdlm', {}), ('mdlm', HIERARCHY), ('bd3lm', {}), ('bd3lm', dict(clean_causal=True)):
        model = make(objective, **{**switches, **more})
        before = F.pad(TEXT[:, :2], (0, 6), value=-1)
        _, calls = writing(model, order='left_to_right')
        for n, (step, idx, probs, state) in enumerate(calls, 2):
            text = before.masked_fill(before == -1, 7)
            expected = model.logits(model.denoise(text, text))[:, n]
            assert torch.allclose(probs, expected.softmax(-1), atol=1e-5)
            before = idx

INITS = [
    ('ar', {}),
    ('ar', dict(tie_weights=True)),
    ('mdlm', dict(bias=True, norm='rmsnorm')),
    ('df', {}),
    ('df_published', dict(df_level_embed='concat', bias=True)),
    ('ar', dict(init='gpt2', bias=True, pos='learned')),
    ('ar', dict(init='gpt2', tie_weights=True)),
    ('bd3lm', dict(init='gpt2')),
]

@pytest.mark.parametrize('objective, settings', INITS, ids=label)
def test_first_weights(objective, settings):
    """ gains 1, biases 0, matrices 0.02 wide; what a layer adds and an untied head start at 0, or as in GPT-2 """
    model = make(objective, n_embd=64, vocab_size=64, n_layer=8, **settings)
    small = 0.0 if model.config.init == 'zero' else 0.02 / math.sqrt(2 * 8)
    for name, p in zip(names(model), first_weights(model)):
        if p.dim() == 1:
            assert (p == (0 if name.endswith('bias') else 1)).all()
            continue
        head = 0.0 if model.config.init == 'zero' or name.startswith('df_') else 0.02
        expected = small if name.endswith('c_proj.weight') else head if 'head' in name else 0.02
        assert abs(p.std().item() - expected) <= 0.15 * expected, name
        assert expected or not p.any()

def test_a_text_and_a_begin_id_fit_together():
    assert longest(make('ar')) == longest(make('ar', pos='learned')) == 9
    assert longest(make('ar', begin_id=None)) == longest(make('mdlm')) == 8

@torch.no_grad()
def test_a_norm_without_means_keeps_them():
    """ a constant added to all of a token's numbers changes nothing with layernorm, but does with rmsnorm """
    x = torch.randn(2, 6, 16)
    for norm in 'layernorm', 'rmsnorm':
        ln_f = make('ar', norm=norm).transformer.ln_f
        assert torch.allclose(ln_f(x), ln_f(x + 3), atol=1e-4) == (norm == 'layernorm')

@torch.no_grad()
def test_whole_segments_are_never_cut_in_one_stream():
    """ mdlm hides a segment of a hierarchy at one level, whatever diffusion_block_size is """
    whole, cut = (make('mdlm', **HIERARCHY, diffusion_block_size=n) for n in (None, 1))
    for observe in levels, logits, bound:
        assert alike(observe(whole), observe(cut))
    assert [len(part.unique()) for part in levels(cut)[0].split((2, 2, 4))] == [1, 1, 1]

# ---- distributions

def by_hand(row, temperature, top_k, top_p):
    """ probabilities of logits (V,): first the temperature, then the k likeliest, then the fewest that reach p """
    p = (row / temperature).softmax(-1)
    if top_k is not None:
        p = torch.where(p >= sorted(p.tolist())[-min(top_k, len(p))], p, 0.0)
        p = p / p.sum()
    if top_p is not None:
        kept, mass = torch.zeros_like(p), 0.0
        for i in p.argsort(descending=True).tolist():
            if mass < top_p:
                kept[i] = p[i]
            mass += p[i].item()
        p = kept / kept.sum()
    return p

@pytest.mark.parametrize('temperature', [0.5, 1.0, 2.0])
@pytest.mark.parametrize('top_k', [None, 1, 3, 9])
@pytest.mark.parametrize('top_p', [None, 0.2, 0.7, 0.95])
def test_temperature_then_top_k_then_top_p(temperature, top_k, top_p):
    rows = 2 * torch.randn(5, 4, 9, generator=torch.Generator().manual_seed(0))
    found = token_probs(rows, temperature, top_k, top_p)
    for row, p in zip(rows.flatten(0, 1), found.flatten(0, 1)):
        assert torch.allclose(p, by_hand(row, temperature, top_k, top_p), atol=1e-6)

def test_equal_tokens_and_probabilities_that_are_exactly_reached():
    four = torch.zeros(4)
    assert (token_probs(four, top_p=0.5) > 0).sum() == 2 # two of them reach it, a third is beyond
    tied = token_probs(torch.tensor([1.0, 1.0, 1.0, 0.0]), top_k=2) > 0
    assert tied.tolist() == [True, True, True, False] # no token is left out because of its id
    assert token_probs(four, top_k=4, top_p=1.0).tolist() == [0.25] * 4

def test_distributions_are_float32_whatever_the_logits_are():
    rows = torch.randn(2, 9)
    for options in {}, dict(temperature=0), dict(temperature=0.7, top_k=4, top_p=0.9):
        for dtype in torch.bfloat16, torch.float16, torch.double:
            found = token_probs(rows.to(dtype), **options)
            assert found.dtype == torch.float32
            assert torch.allclose(found.sum(-1), torch.ones(2), atol=1e-6)

# ---- writing

def opinion(model, *distribution):
    """ the same distribution over the first ids everywhere, whatever is read """
    others = [0.0] * (model.config.vocab_size - len(distribution))
    everywhere = torch.tensor([*distribution, *others]).log()
    model.logits = lambda x: everywhere.expand(*x.shape[:-1], -1)
    return model

def tokens_per_call(model, **options):
    """ how many tokens of a text of eight each call reveals """
    _, calls = writing(model, TEXT[:1, :0], **options)
    left = [8] + [int((idx[0] == -1).sum()) for _, idx, *_ in calls]
    return [a - b for a, b in zip(left, left[1:])]

def test_a_bound_is_exceeded_or_kept_and_has_a_default():
    """
    A probability must exceed its threshold, which is 0.9 by default.
    Entropies may reach their budget, which is 0.1 nats by default.
    """
    def calls(*distribution, **options):
        return tokens_per_call(opinion(make('mdlm'), *distribution), **options)
    assert calls(0.5, 0.5, sampler='threshold', confidence_threshold=0.5) == [1] * 8
    assert calls(0.5, 0.5, sampler='threshold', confidence_threshold=0.49) == [8]
    assert calls(0.89, 0.11, sampler='threshold') == [1] * 8
    assert calls(0.91, 0.09, sampler='threshold') == [8]
    h = -0.992 * math.log(0.992) - 0.008 * math.log(0.008) # 0.047 nats, and one of three is free
    assert 2 * h < 0.1 < 3 * h
    assert calls(0.992, 0.008, sampler='entropy_bound') == [3, 3, 2]
    assert calls(1.0, sampler='entropy_bound', entropy_budget=0.0) == [8] # what is certain costs nothing

@pytest.mark.parametrize('n', [22, 23, 29, 37])
def test_as_many_fixed_steps_as_tokens_reveal_one_each(n):
    """ also where n * (i / n) is a little less than i in floating point """
    model = opinion(make('mdlm', block_size=n), 0.5, 0.5)
    out, calls = writing(model, TEXT[:1, :0], sampler='fixed', steps=n)
    assert [len(probs) for _, _, probs, _ in calls] == [1] * n

def with_entropy(nats):
    """
    Probabilities of five tokens with this entropy. Below 0.69 nats two tokens share all; above, one token
    has a part and four share the rest.
    """
    others = 1 if nats < 0.69 else 4
    def distribution(p):
        return [p] + [(1 - p) / others] * others + [0.0] * (4 - others)
    low, high = 1 / (1 + others), 1.0
    for _ in range(60):
        middle = (low + high) / 2
        entropy = -sum(q * math.log(q) for q in distribution(middle) if q)
        low, high = (middle, high) if entropy > nats else (low, middle)
    return distribution(low)

def test_the_largest_entropy_is_free_wherever_it_comes():
    """ entropies 0.1, 1.5, 0.2 by position cost their sum less the largest, 0.3, not less the first """
    entropies = 0.1, 1.5, 0.2, 0.6, 0.6, 0.6, 0.6, 0.6
    table = torch.tensor([with_entropy(nats) + [0.0] * 4 for nats in entropies]).log()
    for budget, n in (0.05, 1), (0.11, 2), (0.29, 2), (0.31, 3), (0.89, 3), (0.91, 4):
        model = make('mdlm')
        model.one_stream = lambda xt, ids, only: only[:, None] % 8
        model.logits = lambda x: table[x[:, 0]]
        options = dict(sampler='entropy_bound', order='left_to_right', entropy_budget=budget)
        assert tokens_per_call(model, **options)[0] == n

@pytest.mark.parametrize('remask', [0.4, 0.6, 0.84, 0.99])
def test_how_many_are_hidden_again(remask):
    """
    A share of the tokens that a block has written, rounded down: 0.84 of 75 is exactly 63.
    Given tokens do not count.
    """
    for given, steps in (0, 2), (50, 2), (4, 7):
        model = opinion(make('mdlm', block_size=150 + given), 0.4, 0.3, 0.2, 0.1)
        prompt = torch.zeros(1, given, dtype=torch.long)
        model.one_stream = lambda xt, ids, only: torch.zeros(len(only), 1)
        out, calls = writing(model, prompt, sampler='fixed', steps=steps, remask=remask)
        for i, (_, idx, *_) in enumerate(calls[:-1], 1):
            stood = 150 * i // steps # after the call, before any of it is hidden again
            assert 150 - (idx == -1).sum() == stood - int(round(remask * 100) * stood // 100)

def test_hidden_again_is_what_the_model_believes_least():
    """ least by its own probability of what was drawn, before the temperature, which makes everything certain """
    sure = (0.5, 0.9, 0.3, 0.8, 0.7, 0.4, 0.95, 0.6) # the largest probability at each position
    table = torch.tensor([[p, *[(1 - p) / 4] * 4, *[0.0] * 4] for p in sure]).log()
    model = make('mdlm')
    model.one_stream = lambda xt, ids, only: only[:, None] % 8
    model.logits = lambda x: table[x[:, 0]]
    options = dict(sampler='fixed', steps=8, order='left_to_right', remask=0.5, temperature=0)
    out, calls = writing(model, TEXT[:1, :0], **options)
    before = torch.full((8,), -1)
    for step, idx, probs, state in calls[:-1]:
        now = set((before != -1).nonzero()[:, 0].tolist())
        hidden = [i for i in range(8) if i not in now][:step - len(now)] # revealed in this call
        stood = sorted(now | set(hidden), key=lambda i: sure[i])
        assert (idx[0] != -1).nonzero()[:, 0].tolist() == sorted(stood[len(stood) // 2:])
        before = idx[0]

FEW = dict(df_timesteps=8, df_sampling_timesteps=8)
KINDS = [
    ('ar', {}),
    ('denoise', {}),
    ('mdlm', {}),
    ('mdlm', HIERARCHY),
    ('bd3lm', {}),
    ('df', FEW),
    ('df_published', FEW),
    ('df', dict(FEW, df_scheduling_matrix='trapezoid')),
]

@pytest.mark.parametrize('objective, settings', KINDS, ids=label)
def test_every_call_says_how_far_it_is(objective, settings):
    """
    Steps count from 1. Columns that are done change no more.
    `total` is the length of the text, and all of it is done in the end.
    """
    for prompt in TEXT[:, :2], torch.tensor([[1, 2, 3], [4, -1, -1], [0, 2, -1]]):
        out, calls = writing(make(objective, **settings), prompt)
        done = [state['done'] for *_, state in calls]
        assert [step for step, *_ in calls] == list(range(1, len(calls) + 1))
        assert done == sorted(done)
        assert done[-1] == 8
        for (step, idx, probs, state), n in zip(calls, done):
            assert state['total'] == 8
            assert torch.equal(idx[:, :n], out[:, :n])
            assert torch.allclose(probs.sum(-1), torch.ones(len(probs)), atol=1e-5)
            assert n == (idx != -1).all(0).long().cumprod(0).sum()

@pytest.mark.parametrize('objective, settings', KINDS, ids=label)
def test_what_shapes_a_distribution_shapes_what_is_written(objective, settings):
    """ hot, all ids are alike; the likeliest alone, by top_k or by top_p, is what temperature 0 writes """
    model, prompt, hot = make(objective, **settings), TEXT[:1, :2].repeat(16, 1), dict(temperature=1e3)
    if model.loss_name == 'mse': # distances to embeddings are large
        hot = dict(temperature=1e6)
    greedy = writing(model, prompt, temperature=0)[0]
    for alone in dict(top_k=1), dict(top_p=1e-6):
        assert torch.equal(writing(model, prompt, **hot, **alone)[0], greedy)
    out, calls = writing(model, prompt, **hot)
    assert out[:, 2:].unique().tolist() == [0, 1, 2, 3, 4]
    assert not torch.equal(out, greedy)
    if objective != 'df': # its distributions are given the noise too
        assert all(((probs[:, :5] - 0.2).abs() < 0.02).all() for *_, probs, _ in calls)
    two = writing(model, prompt, top_k=2, **hot)[1]
    assert all(((probs > 0).sum(-1) <= 2).all() for *_, probs, _ in two)

# ---- masked diffusion

def test_samples_of_a_bound_are_independent_between_blocks_and_rows():
    """ the number of hidden tokens in a block is stratified over samples, in its own order for each block and row """
    model, hidden = make('bd3lm'), []
    denoise = model.denoise
    def counted(xt, *args, **more):
        hidden.append((xt == 7).unflatten(1, (2, 4)).sum(2))
        return denoise(xt, *args, **more)
    model.denoise = counted
    torch.manual_seed(0)
    rows = TEXT.repeat(8, 1)
    model.nll_bound(rows, rows, 4)
    counts = torch.stack(hidden) # (samples, rows, blocks)
    assert (counts.sort(0).values == torch.arange(1, 5)[:, None, None]).all()
    assert not torch.equal(counts[..., 0], counts[..., 1])
    assert not (counts == counts[:, :1]).all()

@pytest.mark.parametrize('objective, settings', [('mdlm', {}), ('mdlm', HIERARCHY), ('bd3lm', {})], ids=label)
def test_accuracy_is_of_hidden_tokens_that_are_scored(objective, settings):
    """ the model knows what it sees and guesses 0 for [MASK]; an unscored token is never hidden """
    model, texts = make(objective, **settings), TEXT.repeat(200, 1)
    targets = texts.clone()
    targets[:, 3] = -1
    model.denoise = lambda xt, x0, block_ids=None, only=None: xt
    shown = []
    model.logits = lambda xt: shown.append(xt) or F.one_hot(xt.masked_fill(xt == 7, 0), 9).float()
    found = model.metrics(texts, targets)
    for xt, share in zip(shown, found.values()):
        assert (xt[:, 3] == texts[:, 3]).all()
        assert not settings or (xt[:, :2] == texts[:, :2]).all()
        assert abs(share - (texts[xt == 7] == 0).float().mean().item()) < 1e-6

@pytest.mark.parametrize('t_min, t_max', [(0.0, 1.0), (0.3, 0.8)])
@pytest.mark.parametrize('bell', [False, True])
def test_levels_are_one_in_each_stratum_of_their_distribution(t_min, t_max, bell):
    """ from t_min to t_max, with distribution function t, or 3 t^2 - 2 t^3; never 0, whatever torch.rand draws """
    model, n = make('mdlm', t_min=t_min, t_max=t_max, t_dist='bell' if bell else 'uniform'), 1000
    t = (model.sample_t(n).double() - t_min) / (t_max - t_min)
    share = (3 * t ** 2 - 2 * t ** 3 if bell else t).sort().values - torch.arange(n) / n
    assert share.min() > -1e-5
    assert share.max() < 1 / n + 1e-5
    assert not torch.equal(t, t.sort().values)
    for u, size in itertools.product((0.0, 1 - 2 ** -24), (1, 7, 4096)): # the least and the most that rand draws
        with mock.patch.object(torch, 'rand', lambda *size, **more: torch.full(size, u)):
            levels = model.sample_t(size)
        assert levels.min() > 0
        assert levels.min() >= t_min - 1e-6
        assert levels.max() <= t_max + 1e-6

@torch.no_grad()
def test_an_order_costs_as_many_passes_as_a_block_has_tokens():
    """ all blocks of all rows at once """
    for settings, n in (dict(diffusion_block_size=4), 4), (dict(diffusion_block_size=3), 3), (HIERARCHY, 4):
        for order in ORDERS:
            model, passes = make('bd3lm', **settings), []
            denoise = model.denoise
            model.denoise = lambda *args, **more: passes.append(1) or denoise(*args, **more)
            model.nll_order(TEXT, TEXT, order)
            assert len(passes) == n

@torch.no_grad()
def test_the_rows_that_are_denoised_keep_their_own_block_ids():
    """ where the first half of a batch learns next-token prediction instead """
    more = dict(HIERARCHY, segments='2,3,3')
    dual, alone = make('mdlm', ar_weight=0.5, **more), make('mdlm', **more)
    ids = torch.tensor([ # 7: pads
        [0, 0, 1, 1, 1, 2, 2, 2],
        [0, 0, 1, 7, 7, 7, 7, 7],
        [0, 0, 1, 1, 1, 2, 2, 7],
        [0, 0, 1, 1, 7, 7, 7, 7],
    ])
    rows = TEXT.repeat(2, 1)[:4]
    torch.manual_seed(0)
    both = dual(rows, rows, ids)[1]
    torch.manual_seed(0)
    diffusion = alone(rows[2:], rows[2:], ids[2:])[1]
    next_token = dual.views()['ar'](rows[:2], rows[:2])[1]
    assert torch.allclose(both, diffusion + 0.5 * next_token, atol=1e-5)

def test_denoise_counts_what_it_was_asked_for():
    """ loss and accuracy are means over scored tokens, whatever the others are; with none the loss is 0, not NaN """
    model, rows = make('denoise'), batch(make('denoise'))
    asked, found = rows['targets'] != -1, model(rows['idx'])[0]
    right = found.argmax(-1) == rows['targets']
    assert abs(model.metrics(**rows)['accuracy'] - right[asked].float().mean().item()) < 1e-6
    expected = F.cross_entropy(found[asked], rows['targets'][asked])
    assert torch.allclose(model(**rows)[1], expected)
    assert model(rows['idx'], torch.full_like(TEXT, -1))[1] == 0

@pytest.mark.parametrize('settings', [
    {},
    dict(begin_id=None),
    dict(diffusion_block_size=3),
    dict(clean_causal=True),
], ids=label)
@torch.no_grad()
def test_without_targets_every_block_is_read_given_the_clean_ones_before_it(settings):
    """ each block in a stream of its own, begin, then clean text, then the block, which sees all of itself """
    model, lead = make('bd3lm', **settings), int(settings.get('begin_id', 5) is not None)
    ids = block_ids('block', 8, model.config.diffusion_block_size)
    for b in range(int(ids[-1]) + 1):
        n = int((ids <= b).sum()) + lead
        rows = F.pad(TEXT, (lead, 0), value=5)[:, :n]
        block, noisy = F.pad(ids + lead, (lead, 0))[:n], F.pad(ids == b, (lead, 0))[:n]
        pos, mask = torch.arange(n), dense_mask(block, noisy, model.config.clean_causal)
        states = model.trunk(model.embed(rows, pos), pos, mask)
        expected = model.logits(states[:, noisy])[..., :5]
        assert torch.allclose(text_logits(model)[:, ids == b], expected, atol=1e-5)

MASKED = [('mdlm', {}), ('mdlm', HIERARCHY), ('bd3lm', {}), ('bd3lm', dict(diffusion_block_size=3))]

@pytest.mark.parametrize('objective, settings', MASKED, ids=label)
def test_a_loss_is_the_hidden_tokens_over_the_scored_ones(objective, settings):
    """ by definition the cross-entropy of hidden tokens over t, in rows of which some tokens are not scored """
    model, targets = make(objective, **settings), TEXT.clone()
    targets[0, 5:], targets[2, 3] = -1, -1
    torch.manual_seed(0)
    found = model(TEXT, targets)[1]
    torch.manual_seed(0)
    xt, masked, t = model.corrupt(TEXT, targets)
    states = model.two_stream(xt, TEXT) if objective == 'bd3lm' else model.one_stream(xt)
    ce = -model.logits(states).log_softmax(-1).gather(2, TEXT[..., None])[..., 0]
    asked = (targets != -1) & (torch.arange(8) >= (2 if settings == HIERARCHY else 0))
    assert not masked[~asked].any()
    assert torch.allclose(found, (ce * masked / t).sum() / asked.sum(), rtol=1e-4)

def test_all_hidden_tokens_are_in_the_loss_of_a_large_batch():
    """ the number of rows is fixed beforehand; the hidden number varies most with blocks of unequal length """
    per_token = dict(single_ratio_per_sequence=False)
    uneven = dict(attention='hierarchical', segments='1,1,6')
    for objective, settings in *MASKED, ('mdlm', per_token), ('bd3lm', uneven):
        model, rows = make(objective, **settings), TEXT[:1]
        torch.manual_seed(0)
        for _ in range(400):
            _, masked, _ = model.corrupt(rows, rows)
            assert set(masked.flatten().nonzero()[:, 0].tolist()) <= set(model.loss_rows(masked).tolist())

# ---- optimizers and cost

@pytest.mark.parametrize('objective, settings', [
    ('ar', {}),
    ('ar', dict(tie_weights=True)),
    ('ar', dict(bias=True, pos='learned')),
    ('denoise', {}),
    ('mdlm', {}),
    ('bd3lm', dict(tie_weights=True, norm='rmsnorm')),
    ('df', dict(bias=True)),
    ('df_published', dict(df_level_embed='concat', bias=True)),
], ids=label)
@pytest.mark.parametrize('kind', ['adamw', 'muon'])
def test_which_optimizer_has_which_parameter(objective, settings, kind):
    """ Muon: the matrices of the layers; AdamW: the rest, with decay on what has two dimensions and nothing else """
    model = make(objective, **settings)
    name_of = {id(p): name for name, p in model.named_parameters()}
    given = dict(learning_rate=3e-4, muon_learning_rate=0.05, weight_decay=0.3, betas=(0.7, 0.8))
    adamw, *muon = model.configure_optimizers(kind, **given)
    assert type(adamw) is torch.optim.AdamW
    assert [type(optimizer) for optimizer in muon] == [torch.optim.Muon] * (kind == 'muon')
    def held(optimizer, decay):
        groups = [group for group in optimizer.param_groups if group['weight_decay'] == decay]
        return {name_of[id(p)] for group in groups for p in group['params']}
    inner = {name for name in names_of_matrices(model) if name.startswith('transformer.h.')} if muon else set()
    flat = {name for name, p in model.named_parameters() if p.dim() == 1}
    assert held(adamw, 0.3) == set(name_of.values()) - flat - inner
    assert held(adamw, 0.0) == flat
    assert all(g['lr'] == 3e-4 and tuple(g['betas']) == (0.7, 0.8) for g in adamw.param_groups)
    for optimizer in muon:
        assert held(optimizer, 0.3) == inner
        assert all(g['lr'] == 0.05 for g in optimizer.param_groups)
    sizes = [len(g['params']) for optimizer in (adamw, *muon) for g in optimizer.param_groups]
    assert sum(sizes) == len(name_of) # each of them once

def test_optimizers_by_default():
    adamw, muon = make('ar').configure_optimizers('muon')
    assert all(g['lr'] == 1e-3 and tuple(g['betas']) == (0.9, 0.95) for g in adamw.param_groups)
    assert [g['weight_decay'] for g in adamw.param_groups + muon.param_groups] == [0.1, 0.0, 0.1]
    assert muon.param_groups[0]['lr'] == 0.02

def test_the_first_adamw_step_is_its_formula():
    """ rate times sign of the gradient, and decay of the weight itself where it has two dimensions """
    model = make('ar', bias=True)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    rates = dict(learning_rate=0.01, weight_decay=0.5, betas=(0.5, 0.5))
    optimizer, = model.configure_optimizers('adamw', **rates)
    gradient(model)
    optimizer.step()
    for name, p in model.named_parameters():
        moved = p.grad.abs() > 1e-5 # where epsilon does not matter
        expected = before[name] * (1 - 0.01 * 0.5 * (p.dim() == 2)) - 0.01 * p.grad.sign()
        assert torch.allclose(p[moved], expected[moved], atol=1e-4), name

@pytest.mark.parametrize('pos', ['rope', 'learned'])
@pytest.mark.parametrize('tied', [False, True])
def test_flops_leave_out_what_is_only_looked_up(pos, tied):
    """
    6 per weight that multiplies, and 12 per layer, width and token of context for attention.
    A tied table multiplies too, as the head.
    """
    model = make('ar', pos=pos, tie_weights=tied)
    tables = ('transformer.wpe',) if tied else ('transformer.wpe', 'transformer.wte')
    weights = sum(p.numel() for name, p in model.named_parameters() if not name.startswith(tables))
    assert model.flops_per_token() == 6 * weights + 12 * 2 * 16 * 8
    assert model.estimate_mfu(10.0, 40.0 * model.flops_per_token()) == 0.25

# ---- checkpoints and scores

@pytest.mark.parametrize('objective', ['ar', 'mdlm'])
def test_tied_weights_stay_tied(objective, tmp_path):
    """ whichever way they are loaded: one matrix, which a step moves in both places """
    model, path = make(objective, tie_weights=True), tmp_path / 'ckpt.pt'
    config, weights = dataclasses.asdict(model.config), model.state_dict()
    ckpt = {'format': 1, 'objective': objective, 'config': config, 'model': weights, 'ema': None, 'meta': {}}
    torch.save(ckpt, path)
    for found in load_checkpoint(path)[0], type(model).from_pretrained(path):
        assert found.lm_head.weight is found.transformer.wte.weight
        assert names(found) == names(model)
        assert alike(logits(found.eval()), logits(model))
        assert not found.training
        optimizer, = found.configure_optimizers('adamw', 1e-2)
        gradient(found)
        optimizer.step()
        assert torch.equal(found.lm_head.weight, found.transformer.wte.weight)

def test_scores_of_what_has_no_bound():
    """ rows count by their tokens; the sign says that it bounds nothing """
    model = make('denoise')
    rows = batch(model)
    few = dict(idx=rows['idx'][:1], targets=rows['targets'][:1].clone())
    few['targets'][0, 2:] = -1 # one token against twelve
    found = score(model, [rows, few])
    twelve, one = (model(**each)[1].item() for each in (rows, few))
    nats = found['nats_per_token']
    assert abs(nats - (12 * twelve + one) / 13) < 1e-5
    assert found['tokens'] == 13
    assert (found['name'], found['sign'], found['exact']) == ('ce', 'is no bound:', False)
    assert found['unit'] == 'nats/token'
    assert abs(found['perplexity'] - math.exp(nats)) < 1e-9
    assert found['stderr_monte_carlo'] is None # one draw of a corruption says nothing of its error

def test_a_squared_error_is_in_no_nats():
    class Error:
        bound_name, measured = None, 'mse'
        def __call__(self, idx, targets):
            return None, torch.tensor(2.0)
    found = score(Error(), [dict(idx=TEXT, targets=TEXT)])
    assert (found['unit'], found['perplexity'], found['nats_per_token']) == ('squared error', None, 2.0)

def test_scores_sample_bounds_and_not_what_is_exact():
    for objective, n in ('ar', 1), ('mdlm', 3):
        model = make(objective)
        assert score(model, [batch(model)], 3)['samples_per_window'] == n

def test_low_precision_is_the_one_that_was_named():
    a = torch.randn(4, 4)
    for name in 'float32', 'bfloat16', 'float16':
        device, context, said = pick_device('cpu', name)
        with context:
            assert (a @ a).dtype == getattr(torch, name)
            assert said == name
            assert device.type == 'cpu'

# ---- diffusion forcing

def published(**settings):
    return make('df_published', **settings)

def test_the_remembered_error_is_of_scored_tokens():
    """ predictions of context may be as wrong as they like, because they are never used """
    model = published(df_objective='pred_x0', df_timesteps=2, df_sampling_timesteps=2).train()
    targets = TEXT.clone()
    targets[:, :5] = -1
    wrong = torch.where(targets == -1, 100.0, 2.0)[..., None]
    model.df_network = lambda x, k: model.embeddings()[TEXT] + wrong
    for _ in range(300):
        model(TEXT, targets)
    assert torch.allclose(model.df_error, torch.full((2,), 4.0), rtol=1e-2)

def test_with_full_attention_a_token_reads_its_own_noisy_copy():
    """ it finds a nearly clean token again, and the loss is lower; with causal attention only earlier tokens help """
    for attention in 'full', 'causal':
        model = make('df', attention=attention)
        assert torch.equal(logits(model).argmax(-1), TEXT) == (attention == 'full')
        torch.manual_seed(0)
        found, value = model(TEXT, TEXT)
        assert torch.allclose(value, F.cross_entropy(found.flatten(0, 1), TEXT.flatten()))
    blank = make('df', attention='full')
    blank.df_head.weight.data.zero_() # nothing is expected, so only the copy itself tells
    assert loss(blank) < 0.8 * math.log(5)

@pytest.mark.parametrize('objective', ['df', 'df_published'])
def test_accuracy_by_level_is_of_scored_tokens(objective):
    """ of a network that is right about the second half and wrong about the first """
    model, targets = make(objective, **{'df_objective': 'pred_x0'} if objective == 'df_published' else {}), TEXT.clone()
    guess = torch.where(torch.arange(8) < 4, (TEXT + 1) % 5, TEXT)
    if objective == 'df':
        model.df_network = lambda x, k, past=None: 1e3 * F.one_hot(guess, 9).float()
    else:
        model.df_network = lambda x, k, past=None: model.embeddings()[guess]
    for start, share in (0, 0.5), (2, 4 / 6), (4, 1.0):
        targets[:, :start] = -1
        found = {k: v for k, v in model.metrics(TEXT, targets).items() if k.startswith('accuracy')}
        assert len(found) == 3
        assert all(abs(v - share) < 1e-6 for v in found.values())

def test_a_share_of_rows_is_clean_on_average():
    """ exactly, where the batch divides, and by chance where it does not """
    for share, rows, expected in (0.5, 4, 2.0), (0.25, 2, 0.5), (0.9, 3, 2.7), (0.0, 3, 0.0), (1.0, 3, 3.0):
        model, clean = make('df', df_clean_share=share), []
        def context(x, k, cache=None, end=None):
            clean.append((k == 0).all(1).sum().item())
            return torch.zeros(*k.shape, 9)
        model.df_context = context
        batch = TEXT[:1].repeat(rows, 1)
        torch.manual_seed(0)
        for _ in range(400):
            model(batch, batch)
        assert abs(sum(clean) / 400 - expected) < 0.1
        assert max(clean) - min(clean) <= 1

def test_a_chunk_is_half_of_the_context_by_default():
    """ how many tokens each chunk begins with as pure noise; 0: all that are asked for """
    for settings, sizes in ({}, [4, 2]), (dict(df_chunk_size=0), [6]), (dict(df_chunk_size=1), [1] * 6):
        model, seen = published(df_scheduling_matrix='full_sequence', **FEW, **settings), []
        network = model.df_network
        model.df_network = lambda x, k: seen.append((k == 7).sum().item()) or network(x, k)
        model.generate(TEXT[:1, :2], 6)
        assert [n for n in seen if n] == sizes

def test_positions_are_added_once():
    """ either before the noise, or in the network, whose output then depends on them for the same noisy input """
    x, k = torch.randn(2, 8, 16), torch.randint(32, (2, 8))
    for inside in True, False:
        model = published(pos='learned', df_x0_wpe=not inside)
        before = model.df_network(x, k)
        model.transformer.wpe.weight.data *= -1
        assert alike(before, model.df_network(x, k)) == (not inside)

def test_the_remembered_error_moves_where_training_looked():
    """ levels that were not drawn keep theirs; evaluation and predictions keep all of them """
    model, levels = published(df_objective='pred_x0'), []
    network = model.df_network
    model.df_network = lambda x, k: levels.append(k) or network(x, k)
    for _ in model(TEXT, TEXT), model(TEXT), model.train()(TEXT):
        assert (model.df_error == 1).all()
    model(TEXT, TEXT)
    drawn = torch.zeros(32, dtype=torch.bool).index_fill(0, levels[-1].unique(), True)
    assert not drawn.all()
    assert torch.equal(model.df_error != 1, drawn)

def test_how_wrong_a_level_was_decides_how_sure_a_prediction_is_there():
    """ of one step from pure noise only the last level's error counts """
    model = published(df_objective='pred_x0')
    before = bound(model)
    model.df_error[:-1] = 7.0
    assert alike(bound(model), before)
    model.df_error[-1] = 7.0
    assert not alike(bound(model), before)

def test_a_path_costs_its_steps_by_densities_written_out():
    """
    Two levels: what the noisiest one tells by itself, the step between them, and the last step. By Bayes'
    rule the density of z_next given z and the token is a product of normal densities: that of z_next given
    the token, times that of z given z_next, over that of z given the token.
    """
    more = dict(df_timesteps=2, df_sampling_timesteps=2, df_chunk_size=0, df_embed_norm=3.0)
    model = make('df', **more).variant('full_sequence')
    noise = torch.randn(3, 8, 16, generator=torch.Generator().manual_seed(0))
    expected = torch.tensor([1.0, 0.0, -1.0, 0.5, 2.0, *[-math.inf] * 4])
    model.df_network = lambda x, k, past=None: expected.expand(*k.shape, 9)
    with mock.patch.object(torch, 'randn_like', lambda x: noise):
        nats = model.nll_bound(TEXT, TEXT, 2)[0].mean(1) # a sample of each of the two steps
    E = model.embeddings()[:5].double()
    a, b = model.df_alphas_cumprod.double() # b: of the noisier level
    log_p = expected[:5].double().log_softmax(0)
    normal = lambda mean, share: torch.distributions.Normal(mean, (1 - share).sqrt())
    z_next = a.sqrt() * E[TEXT] + (1 - a).sqrt() * noise
    z = (b / a).sqrt() * z_next + (1 - b / a).sqrt() * noise
    def given_token(z, share): # log density of z given each token, (3, 8, 5)
        return normal(share.sqrt() * E, share).log_prob(z[:, :, None]).sum(-1)
    given_next = normal((b / a).sqrt() * z_next, b / a).log_prob(z).sum(-1, keepdim=True)
    q = given_token(z_next, a) + given_next - given_token(z, b)
    true = q.gather(2, TEXT[..., None])[..., 0]
    step = true - (log_p + q).logsumexp(-1)
    pure = normal(0.0, 0.0 * b)
    prior = torch.distributions.kl_divergence(normal(b.sqrt() * E[TEXT], b), pure).sum(-1)
    assert torch.allclose(nats.double(), (prior + step - log_p[TEXT]).sum(1), rtol=1e-4)

def test_the_noisiest_level_is_paid_for():
    """ where it is not pure noise: with embeddings so long that a thousandth of their variance shows """
    more = dict(df_timesteps=1, df_sampling_timesteps=1, df_chunk_size=0, df_embed_norm=50.0)
    model = make('df', **more).variant('full_sequence')
    uniform = torch.tensor([0.0] * 5 + [-math.inf] * 4)
    model.df_network = lambda x, k, past=None: uniform.expand(*k.shape, 9)
    share = model.df_alphas_cumprod[-1]
    known = torch.distributions.Normal(share.sqrt() * model.embeddings()[TEXT], (1 - share).sqrt())
    prior = torch.distributions.kl_divergence(known, torch.distributions.Normal(0.0, 1.0)).sum((1, 2))
    assert prior.min() > 1
    nats, _ = model.nll_bound(TEXT, TEXT)
    assert torch.allclose(nats[:, 0], prior + 8 * math.log(5), rtol=1e-4)

@pytest.mark.parametrize('guidance', [0.5, 1.0, 3.0])
def test_guided_expectations_of_tokens_are_their_formula(guidance):
    """ u + (1 + w)(c - u) of log-probabilities; the embeddings are so short that noisy ones tell nothing """
    model = make('df', df_embed_norm=1e-4, df_scheduling_matrix='full_sequence', **FEW)
    c, u = torch.tensor([[1.0, 0.2, -0.4, 0.0, -1.0], [0.1, 0.5, 0.3, -0.2, 0.0]])
    turn = itertools.cycle((c, u)) # with the prompt, then without it
    def context(x, k, cache=None, end=None):
        return F.pad(next(turn).log_softmax(0), (0, 4), value=-math.inf).expand(*k.shape, 9)
    model.df_context = context
    out, calls = writing(model, guidance=guidance)
    c, u = c.log_softmax(0), u.log_softmax(0)
    expected = (u + (1 + guidance) * (c - u)).softmax(0)
    probs = calls[-1][2]
    assert torch.allclose(probs[:, :5], expected.expand(len(probs), 5), atol=1e-3)
