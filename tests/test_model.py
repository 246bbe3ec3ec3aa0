"""
Laws of the network and of the attention rule. They hold for random weights, so nothing here trains for long.
"""
import contextlib
import inspect
import math
import os
import textwrap
import typing
from dataclasses import asdict, fields, replace

import pytest
import torch
from torch.nn import functional as F

import prepare
from model import OBJECTIVES, Cache, GPTConfig, UserError, fields_of
from model import BD3LM, DFGPT, GPT, MDLM, Denoiser, DFText
from model import attend, block_ids, dense_mask, draw, load_checkpoint, mask_mod, pick_device, read_pretrained
from model import rope_table, rotate, score, token_probs
from tests.test_train import TINY, here # noqa: F401, a fixture

NANOGPT = dict(pos='learned', norm='layernorm', mlp='gelu', qk_norm=False, tie_weights=True, init='gpt2')
SWITCHES = [
    {},
    NANOGPT,
    dict(pos='learned'),
    dict(norm='rmsnorm', bias=True),
    dict(mlp='gelu', qk_norm=False),
    dict(tie_weights=True),
]

def gpt(seed=0, **settings):
    """ a small model with large random weights, so that every output depends visibly on every input """
    torch.manual_seed(seed)
    sizes = dict(block_size=12, vocab_size=11, n_layer=2, n_head=2, n_embd=16)
    model = GPT(GPTConfig(**{**sizes, **settings})).eval()
    for p in model.parameters():
        if p.dim() == 2:
            torch.nn.init.normal_(p, std=0.3)
    return model

def matrix(rows):
    """ a boolean matrix from lines of 0 and 1 """
    return torch.tensor([[int(c) for c in row.split()] for row in rows.strip().splitlines()]).bool()

# ---- the attention rule

@pytest.mark.parametrize('attention, T, n, rows', [
    ('causal', 3, None, "1 0 0\n1 1 0\n1 1 1"),
    ('full', 3, None, "1 1 1\n1 1 1\n1 1 1"),
    ('block', 5, 2, "1 1 0 0 0\n1 1 0 0 0\n1 1 1 1 0\n1 1 1 1 0\n1 1 1 1 1"), # the last block is ragged
    ('block', 4, 4, "1 1 1 1\n1 1 1 1\n1 1 1 1\n1 1 1 1"),
])
def test_one_stream_masks_written_out(attention, T, n, rows):
    assert torch.equal(dense_mask(block_ids(attention, T, n)), matrix(rows))

# noisy rows first, then clean ones: BD3-LM's training mask
@pytest.mark.parametrize('T, n, rows', [
    (4, 2, "1 1 0 0 0 0 0 0\n1 1 0 0 0 0 0 0\n0 0 1 1 1 1 0 0\n0 0 1 1 1 1 0 0\n"
           "0 0 0 0 1 1 0 0\n0 0 0 0 1 1 0 0\n0 0 0 0 1 1 1 1\n0 0 0 0 1 1 1 1"),
    (3, 1, "1 0 0 0 0 0\n0 1 0 1 0 0\n0 0 1 1 1 0\n0 0 0 1 0 0\n0 0 0 1 1 0\n0 0 0 1 1 1"),
    (3, 2, "1 1 0 0 0 0\n1 1 0 0 0 0\n0 0 1 1 1 0\n0 0 0 1 1 0\n0 0 0 1 1 0\n0 0 0 1 1 1"),
    (2, 2, "1 1 0 0\n1 1 0 0\n0 0 1 1\n0 0 1 1"),
])
def test_two_stream_masks_written_out(T, n, rows):
    ids, noisy = block_ids('block', T, n), torch.arange(2 * T) < T
    mask = dense_mask(torch.cat((ids, ids)), noisy)
    assert torch.equal(mask, matrix(rows))
    if T % n == 0:
        assert mask.sum() == T * T + T * n # P5 of any whole number of blocks

def test_hierarchical_ids_and_their_errors():
    assert block_ids('hierarchical', 9, 2, (2, 3, 4)).tolist() == [0, 0, 1, 1, 2, 3, 3, 4, 4]
    assert block_ids('hierarchical', 9, None, (2, 3, 4)).tolist() == [0, 0, 1, 1, 1, 2, 2, 2, 2]
    for args, word in [
        (('hierarchical', 9, 2, (2, 3)), 'add up to 5'),
        (('block', 4), 'diffusion_block_size'),
        (('diagonal', 4), 'diagonal'),
    ]:
        with pytest.raises(UserError, match=word):
            block_ids(*args)

def test_a_batch_of_block_ids_and_invisible_padding():
    ids = torch.tensor([[0, 0, 1, 1], [0, 1, 1, 9]]) # the second row ends in a pad: it has the largest id
    mask = dense_mask(ids)
    assert mask.shape == (2, 1, 4, 4)
    for row, m in zip(ids, mask):
        assert torch.equal(m[0], dense_mask(row))
    assert not mask[1, 0, :3, 3].any()

@pytest.mark.filterwarnings('ignore:flex_attention called without')
def test_flex_attention_agrees_with_sdpa():
    from torch.nn.attention.flex_attention import create_block_mask
    ids, noisy = block_ids('block', 24, 5).repeat(2), torch.arange(48) < 24
    q, k, v = torch.randn(3, 2, 2, 48, 16)
    mask = create_block_mask(mask_mod(ids, noisy), None, None, 48, 48, device='cpu')
    expected = attend(q, k, v, dense_mask(ids, noisy))
    assert torch.allclose(attend(q, k, v, mask), expected, atol=1e-5)

@pytest.mark.parametrize('ids', [
    block_ids('causal', 6),
    block_ids('full', 6),
    block_ids('block', 6, 4),
    block_ids('block', 6, 2).repeat(2),
])
def test_no_leakage_by_gradient(ids):
    """ P6: d output[i] / d input[j] is zero exactly where attention over two layers cannot carry it """
    N, model = len(ids), gpt().double()
    noisy = torch.arange(N) < (6 if N == 12 else 0)
    mask = dense_mask(ids, noisy)
    x = torch.randn(1, N, 16, dtype=torch.double, requires_grad=True)
    pos = torch.arange(6).repeat(N // 6)
    out = model.trunk(x, pos, mask)
    for i in range(N):
        grad, = torch.autograd.grad(out[0, i].square().sum(), x, retain_graph=True)
        used = grad[0].abs().sum(-1) > 0
        assert torch.equal(used, mask[i]) # the rule is transitive, so layers add nothing

# ---- the network

def test_nanogpt_network_written_out():
    """ one setting of the switches is nanoGPT's network, number for number """
    model = gpt(**NANOGPT, bias=True)
    for p in model.parameters():
        if p.dim() == 1:
            torch.nn.init.normal_(p)
    w, idx = model.state_dict(), torch.randint(11, (2, 12))
    x = w['transformer.wte.weight'][idx] + w['transformer.wpe.weight']
    norm = lambda x, name: F.layer_norm(x, (16,), w[name + '.weight'], w[name + '.bias'])
    linear = lambda x, name: x @ w[name + '.weight'].T + w[name + '.bias']
    for i in range(2):
        h = f'transformer.h.{i}.'
        qkv = linear(norm(x, h + 'ln_1'), h + 'attn.c_attn').split(16, -1)
        q, k, v = (t.view(2, 12, 2, 8).transpose(1, 2) for t in qkv)
        future = torch.ones(12, 12).triu(1).bool()
        att = (q @ k.transpose(-1, -2) / math.sqrt(8)).masked_fill(future, -math.inf).softmax(-1)
        x = x + linear((att @ v).transpose(1, 2).reshape(2, 12, 16), h + 'attn.c_proj')
        hidden = linear(norm(x, h + 'ln_2'), h + 'mlp.c_fc')
        x = x + linear(0.5 * hidden * (1 + torch.erf(hidden / math.sqrt(2))), h + 'mlp.c_proj')
    logits = norm(x, 'transformer.ln_f') @ w['transformer.wte.weight'].T
    assert torch.allclose(model(idx)[0], logits, atol=1e-4)
    row = torch.randint(11, (2, 13)) # and its loss: without a begin id the first token is context
    expected = F.cross_entropy(model(row[:, :-1])[0].flatten(0, 1), row[:, 1:].flatten())
    assert torch.allclose(model(row, row)[1], expected)
    assert model.row_length == 13

@pytest.mark.parametrize('switches', SWITCHES)
def test_switches_have_equal_parameters_and_start_at_ln_v(switches):
    torch.manual_seed(0)
    sizes = dict(vocab_size=69, text_size=65, begin_id=66, block_size=32, n_layer=2, n_head=4, n_embd=96)
    model = GPT(GPTConfig(**{**sizes, **switches}))
    body = sum(p.numel() for p in model.transformer.h.parameters() if p.dim() == 2)
    assert abs(body / (12 * 96 ** 2 * 2) - 1) < 0.01
    idx = torch.randint(65, (8, 32))
    loss = model(idx, idx)[1].item()
    uniform = switches.get('init') != 'gpt2' and not switches.get('tie_weights')
    assert abs(loss - math.log(65)) < (1e-5 if uniform else 0.1)

@pytest.mark.parametrize('mlp', ['swiglu', 'gelu'])
@torch.no_grad()
def test_the_mlp_written_out(mlp):
    model = gpt(mlp=mlp)
    block, x = model.transformer.h[0], torch.randn(1, 1, 16)
    block.attn.c_proj.weight.zero_()
    h = block.mlp.c_fc(block.ln_2(x))
    up, gate = h.chunk(2, dim=-1)
    h = up * gate * gate.sigmoid() if mlp == 'swiglu' else h * (1 + torch.erf(h / math.sqrt(2))) / 2
    found = block(x, model.rotations(torch.arange(1), x.dtype), 'causal')
    assert torch.allclose(found, x + block.mlp.c_proj(h), atol=1e-5)

def test_rope_depends_on_distance_only():
    model = gpt(block_size=40, begin_id=10)
    x = torch.randn(1, 6, 16)
    def states(positions):
        return model.trunk(x, positions, 'causal')
    near, far, stretched = states(torch.arange(6)), states(torch.arange(30, 36)), states(torch.arange(6) * 2)
    assert torch.allclose(near, far, atol=1e-5)
    assert not torch.allclose(near, stretched, atol=1e-2)

def test_rope_turns_pairs_by_position_times_frequency():
    """ compared with complex multiplication: pair i turns by position * 10000^(-i / pairs) """
    table = rope_table(GPTConfig(block_size=50, n_head=2, n_embd=16))
    x = torch.randn(50, 8)
    angle = torch.arange(50.0)[:, None] * 10000 ** (-torch.arange(4.0) / 4)
    turned = torch.complex(x[:, :4], x[:, 4:]) * torch.polar(torch.ones(50, 4), angle)
    expected = torch.cat((turned.real, turned.imag), 1)
    assert torch.allclose(rotate(x, *table), expected, atol=1e-4)

def test_ids_that_no_text_contains_cannot_be_predicted():
    model = gpt(text_size=8, begin_id=9)
    idx = torch.randint(8, (4, 12))
    logits, loss = model(idx, idx)
    assert (logits[..., 8:] == -math.inf).all()
    assert logits[..., :8].isfinite().all()
    loss.backward()
    grad = model.lm_head.weight.grad
    assert (grad[8:] == 0).all()
    assert grad[:8].abs().sum() > 0
    assert model.generate(idx, 50).max() < 8

def test_begin_scores_every_token_and_targets_mark_what_counts():
    model = gpt(text_size=8, begin_id=9)
    idx = torch.randint(8, (3, 12))
    nats, scored = model.nll_bound(idx, idx, n_samples=2)
    assert scored.tolist() == [12] * 3
    assert torch.equal(nats[:, 0], nats[:, 1])
    chain = torch.zeros(3, 1)
    for i in range(12):
        log_p = model(F.pad(idx[:, :i], (1, 0), value=9))[0][:, -1].log_softmax(-1)
        chain -= log_p.gather(1, idx[:, i:i + 1])
    assert torch.allclose(nats[:, :1], chain, atol=1e-4)
    targets = idx.clone()
    targets[:, :5] = -1
    some, n = model.nll_bound(idx, targets)
    assert n.tolist() == [7] * 3
    assert torch.allclose(model(idx, targets)[1], some.sum() / 21)
    assert model(idx, torch.full_like(idx, -1))[1] == 0 # nothing scored is no loss, not NaN
    found = model.metrics(idx, targets)
    p = model(F.pad(idx[:, :-1], (1, 0), value=9))[0].softmax(-1)[:, 5:]
    accuracy = (p.argmax(-1) == idx[:, 5:]).float().mean().item()
    entropy = torch.distributions.Categorical(p).entropy().mean().item()
    assert abs(found['accuracy'] - accuracy) < 1e-6
    assert abs(found['entropy'] - entropy) < 1e-5

def test_gradient_checkpointing_and_dropout():
    idx = torch.randint(11, (2, 12))
    grads = []
    for kept in False, True:
        model = gpt(grad_checkpointing=kept, begin_id=10, dropout=0.3).train()
        torch.manual_seed(5)
        model(idx, idx)[1].backward()
        grads.append(model.transformer.h[0].attn.c_attn.weight.grad)
    assert torch.allclose(*grads, atol=1e-6)
    assert not torch.equal(model(idx)[0], model(idx)[0])
    assert torch.equal(model.eval()(idx)[0], model(idx)[0])

def test_checkpointing_computes_every_layer_twice():
    """ once forward and, as nothing was kept, once more for the gradients, which stay the same """
    idx, found = torch.randint(11, (2, 12)), []
    for again in False, True:
        model, calls = gpt(grad_checkpointing=again, begin_id=10).train(), []
        for block in model.transformer.h:
            block.register_forward_pre_hook(lambda block, inputs: calls.append(block.attn.layer))
        loss = model(idx, idx)[1]
        assert calls == [0, 1]
        loss.backward()
        found.append((calls, [p.grad for p in model.parameters()]))
    assert [calls for calls, _ in found] == [[0, 1], [0, 1, 1, 0]]
    assert all(torch.allclose(a, b, atol=1e-6) for a, b in zip(found[0][1], found[1][1]))

# ---- writing

def uncached(model, idx, n, **options):
    """ generation as its definition: the whole visible window through the network for every token """
    begin = [] if model.config.begin_id is None else [model.config.begin_id]
    begin = torch.tensor([begin] * len(idx), dtype=torch.long)
    room = model.config.block_size - begin.size(1)
    start = max(0, idx.size(1) - room)
    for _ in range(n):
        if idx.size(1) - start > room: # the stated policy: the newer half is kept
            start = idx.size(1) - min(room, max(1, room // 2))
        logits = model(torch.cat((begin, idx[:, start:]), 1))[0][:, -1]
        idx = torch.cat((idx, draw(token_probs(logits, **options))[:, None]), 1)
    return idx

@pytest.mark.parametrize('switches', SWITCHES)
@pytest.mark.parametrize('begin_id', [None, 10])
@pytest.mark.parametrize('T', [1, 5, 12, 30])
def test_cached_generation_is_uncached_generation(switches, begin_id, T):
    """ also far past the context of 12, and for prompts longer than it """
    model = gpt(text_size=10, begin_id=begin_id, **switches).double()
    prompt = torch.randint(10, (3, T))
    torch.manual_seed(1)
    a = model.generate(prompt, 40, temperature=0.9, top_k=7)
    torch.manual_seed(1)
    assert torch.equal(a, uncached(model, prompt, 40, temperature=0.9, top_k=7))
    assert torch.equal(a[:, :T], prompt)

@pytest.mark.parametrize('begin_id', [None, 10])
@pytest.mark.parametrize('block_size', [1, 2, 3])
def test_the_smallest_contexts(block_size, begin_id):
    """ windows of one token, or of the begin id alone, slide on without end too """
    model = gpt(text_size=10, block_size=block_size, begin_id=begin_id).double()
    for T in range(begin_id is None, 5):
        prompt = torch.randint(10, (3, T))
        torch.manual_seed(1)
        a = model.generate(prompt, 9)
        torch.manual_seed(1)
        assert torch.equal(a, uncached(model, prompt, 9))

def test_rows_with_prompts_of_different_lengths():
    model = gpt(begin_id=10, text_size=10)
    prompts = [torch.randint(10, (1, n)) for n in (0, 3, 7)]
    padded = torch.cat([F.pad(p, (0, 7 - p.size(1)), value=-1) for p in prompts])
    together = model.generate(padded, 4, temperature=0)
    for p, row in zip(prompts, together):
        alone = model.generate(p, 11 - p.size(1), temperature=0)
        assert torch.equal(alone[0], row)
    padded[0, 0], stop = 4, int(prompts[2][0, 3]) # a stop within a longer prompt ends nothing
    out = model.generate(padded.repeat(8, 1), 20, stop=stop)[2::3]
    assert (out[:, :7] == prompts[2][0]).all()
    assert not (out[:, 7:] == stop).all()
    with pytest.raises(UserError, match='gap'):
        model.generate(torch.tensor([[1, -1, 2]]), 1)
    with pytest.raises(UserError, match='begin id'):
        gpt().generate(torch.zeros(1, 0, dtype=torch.long), 1)

def test_stop_ends_each_row_by_itself_and_on_step_sees_every_token():
    model, steps = gpt(begin_id=10, text_size=3), []
    torch.manual_seed(0)
    def on_step(step, idx, probs, state):
        steps.append((step, idx.clone(), probs, state['nfe']))
    prompt = torch.tensor([[2, 1], [0, 1]])
    out = model.generate(prompt, 60, temperature=5.0, stop=2, on_step=on_step)
    for row in out:
        new = row[2:].tolist() # a hot model emits it soon; the prompt's own 2 is no stop
        assert 2 in new
        assert set(new[new.index(2):]) == {2}
    assert [step for step, *_ in steps] == list(range(1, len(steps) + 1)) == [nfe for *_, nfe in steps]
    assert len(steps) < 60
    assert all(torch.equal(idx, out[:, :idx.size(1)]) for _, idx, *_ in steps)
    assert torch.allclose(steps[0][2].sum(-1), torch.ones(2))

def test_token_probs():
    logits = torch.tensor([[2.0, 1.0, 0.0, -1.0]])
    p = logits.softmax(-1)
    assert torch.allclose(token_probs(logits, 0.5), (logits * 2).softmax(-1))
    assert torch.equal(token_probs(logits, 0), torch.tensor([[1.0, 0, 0, 0]]))
    assert (token_probs(logits, top_k=2) > 0).tolist() == [[True, True, False, False]]
    crossing = p[0, 0].item() + 0.01 # the token that crosses p stays
    assert (token_probs(logits, top_p=crossing) > 0).tolist() == [[True, True, False, False]]
    assert token_probs(logits, top_p=crossing).sum() == 1
    assert torch.allclose(token_probs(logits, top_p=1.0), p)
    assert token_probs(logits, top_p=1e-6).argmax() == 0
    torch.manual_seed(0)
    counts = torch.bincount(draw(p.expand(40000, 4)), minlength=4) / 40000
    assert (counts - p[0]).abs().max() < 0.01
    for options in dict(temperature=-1), dict(top_k=0), dict(top_p=0.0), dict(top_p=1.5):
        with pytest.raises(UserError, match='expected'):
            token_probs(logits, **options)

@pytest.mark.parametrize('dtype', [torch.float32, torch.float16, torch.bfloat16])
def test_token_probs_are_a_distribution_up_to_the_limits(dtype):
    """
    The coldest distribution is the argmax, ties included; the hottest is uniform over the text's ids.
    top_p always keeps a token.
    """
    rows = [[2.0, 3.0, 3.0, -1.0, -math.inf], [-6e4, -5e4, -6e4, -5e4, -math.inf]]
    logits = torch.tensor(rows).to(dtype)
    greedy = torch.tensor([[0.0, 1, 0, 0, 0], [0, 1, 0, 0, 0]])
    for temperature in 0, 0.0, 5e-324, 1e-320, 1e-39, 1e-30, 1e-9:
        for more in {}, dict(top_k=2), dict(top_p=0.5), dict(top_k=3, top_p=1e-320):
            assert torch.equal(token_probs(logits, temperature, **more), greedy)
    for temperature in 1e-6, 1e-3: # no limit yet: equal logits are equally likely
        assert torch.equal(token_probs(logits, temperature)[0], torch.tensor([0, 0.5, 0.5, 0, 0]))
    hot = token_probs(logits[:1], 1e6)
    assert torch.allclose(hot, torch.tensor([[0.25, 0.25, 0.25, 0.25, 0]]), atol=1e-4)
    for top_p in 1e-6, 1e-50, 5e-324: # the first token crosses p, however small
        assert torch.equal(token_probs(logits, top_p=top_p) > 0, greedy > 0)
    large = torch.tensor([[3e38, 1e38, -3e38]]) # their difference is infinite in float32, and that is enough
    assert torch.equal(token_probs(large, 0.5), torch.tensor([[1.0, 0, 0]]))
    bad = {
        'temperature': [math.inf, math.nan, 1e39, 10 ** 400, None, True, 'cold'],
        'top_k': [-1, 2.5, True, 'abc', math.nan],
        'top_p': [-0.1, math.nan, math.inf, True, 'x'],
    }
    for name, values in bad.items():
        for value in values:
            with pytest.raises(UserError, match=f'{name} is'):
                token_probs(logits, **{name: value})

@torch.no_grad()
def test_a_cache_refuses_what_does_not_fit():
    model = gpt()
    cache, x = Cache(model, 1, 4), torch.randn(1, 3, 16)
    model.trunk(x, torch.arange(3), 'causal', cache)
    cache.keep(3)
    with pytest.raises(AssertionError, match='do not fit a cache of 4'):
        model.trunk(x, torch.arange(3), 'causal', cache)

# ---- optimizers

@pytest.mark.parametrize('optimizer', ['adamw', 'muon'])
def test_every_parameter_is_optimized_once_and_learns(optimizer):
    torch.manual_seed(0)
    model = GPT(GPTConfig(block_size=12, vocab_size=11, n_layer=2, n_head=2, n_embd=16))
    optimizers = model.configure_optimizers(optimizer, 1e-2)
    held = [p for opt in optimizers for group in opt.param_groups for p in group['params']]
    assert sorted(map(id, held)) == sorted(map(id, model.parameters()))
    assert len(optimizers) == 1 + (optimizer == 'muon')
    row = torch.arange(13)[None] % 11
    for _ in range(30):
        loss = model(row, row)[1]
        loss.backward()
        for opt in optimizers:
            opt.step()
            opt.zero_grad()
    assert loss < 0.5

def test_wrong_settings_end_in_a_sentence():
    for settings, word in [
        (dict(norm='batchnorm'), 'rmsnorm, layernorm'),
        (dict(n_embd=10, n_head=3), 'multiple of n_head'),
        (dict(n_embd=6, n_head=2), 'odd'),
        (dict(attention='full'), 'works with attention causal'),
        (dict(text_size=99), 'exceeds vocab_size'),
    ]:
        with pytest.raises(UserError, match=word):
            gpt(**settings)
    with pytest.raises(UserError, match='do not fit the context'):
        gpt()(torch.zeros(1, 13, dtype=torch.long))
    with pytest.raises(UserError, match='expected adamw or muon'):
        gpt().configure_optimizers('sgd')

# ---- numbers that are reported

def test_score_is_the_mean_over_tokens_with_two_errors():
    """
    Rows of unequal length count by their tokens.
    The two errors are those of the mean over samples and of the mean over rows.
    """
    class Fake:
        bound_name = measured = 'nelbo'
        def nll_bound(self, nats, scored, n_samples):
            return nats, scored
    nats = torch.tensor([[4.0, 6.0], [9.0, 11.0], [20.0, 20.0]])
    scored = torch.tensor([5, 10, 10])
    batches = [dict(nats=nats[:2], scored=scored[:2]), dict(nats=nats[2:], scored=scored[2:])]
    found = score(Fake(), batches, 2)
    variances = 2, 2, 0 # of the two samples of each row
    assert abs(found['nats_per_token'] - 35 / 25) < 1e-12
    assert abs(found['perplexity'] - math.exp(1.4)) < 1e-9
    assert abs(found['stderr_monte_carlo'] - math.sqrt(sum(variances) / 2) / 25) < 1e-12
    means = torch.tensor([1.0, 1.0, 2.0])
    assert abs(found['stderr_windows'] - means.std().item() / math.sqrt(3)) < 1e-6
    assert (found['windows'], found['tokens'], found['samples_per_window'], found['exact']) == (3, 25, 2, False)

def test_gpt2_init_optimizer_rates_and_flops():
    torch.manual_seed(0)
    settings = {**NANOGPT, 'pos': 'rope'}
    big = GPT(GPTConfig(block_size=8, vocab_size=64, n_layer=8, n_head=4, n_embd=128, **settings))
    for name, p in big.named_parameters():
        if p.dim() == 2: # what a layer adds shrinks with depth
            expected = 0.02 / math.sqrt(16) if name.endswith('c_proj.weight') else 0.02
            assert abs(p.std().item() / expected - 1) < 0.1
    rates = dict(learning_rate=1e-3, muon_learning_rate=3e-2, weight_decay=0.2)
    adamw, muon = big.configure_optimizers('muon', **rates)
    groups = [(g['lr'], g['weight_decay']) for g in adamw.param_groups + muon.param_groups]
    assert groups == [(1e-3, 0.2), (1e-3, 0.0), (3e-2, 0.2)]
    body = sum(p.numel() for p in big.parameters()) # tied: the one matrix multiplies in the head
    assert big.flops_per_token() == 6 * body + 12 * 8 * 128 * 8
    assert big.estimate_mfu(1000, 2000 * big.flops_per_token()) == 0.5

def test_queries_and_keys_are_normalised():
    """ so scaling both changes nothing; without qk_norm it does """
    for normalised in True, False:
        model = gpt(qk_norm=normalised, n_layer=1).double()
        x = torch.randn(1, 6, 16, dtype=torch.double)
        before = model.trunk(x, torch.arange(6), 'causal')
        with torch.no_grad():
            model.transformer.h[0].attn.c_attn.weight[:32] *= 100
        after = model.trunk(x, torch.arange(6), 'causal')
        assert torch.allclose(before, after, atol=1e-4) == normalised

def test_dropout_acts_in_every_place(monkeypatch):
    """
    Dropout acts on the embedding, on attention weights and on both outputs of a layer. p near 1 wipes out
    what passes, so it is seen where only one path is open.
    """
    idx = torch.randint(11, (1, 12))
    def differs(where, closed=None):
        """ whether dropout in these places changes the logits, with the path through `closed` shut """
        plain, dropped = gpt(), gpt().train()
        for block in [*plain.transformer.h, *dropped.transformer.h] if closed else []:
            getattr(block, closed).c_proj.weight.data.zero_()
        layers = [part for block in dropped.transformer.h for part in (block.attn, block.mlp)]
        for part in [dropped] if where == 'embedding' else layers:
            part.dropout = 0.99
        return not torch.allclose(plain(idx)[0], dropped(idx)[0])
    assert differs('embedding')
    assert differs('layers', 'attn')
    assert differs('layers', 'mlp')
    with monkeypatch.context() as m:
        m.setattr('model.drop', lambda x, module: x)
        assert differs('layers', 'mlp') # the attention weights drop by themselves
        assert not differs('layers', 'attn')
    monkeypatch.setattr('model.attend', lambda q, k, v, mask, p: attend(q, k, v, mask))
    assert differs('layers', 'mlp') # and so does what attention adds
    q = torch.randn(1, 1, 4, 8)
    for mask in 'causal', torch.ones(4, 4).bool():
        assert not torch.equal(attend(q, q, q, mask, 0.9), attend(q, q, q, mask, 0.9))

# ---- weights from elsewhere

def test_weights_of_nanogpt(tmp_path):
    """
    A checkpoint in nanoGPT's format gives the same logits, whatever number of rows the tables of the new
    model have. Nothing pickled is executed.
    """
    torch.manual_seed(0)
    args = dict(n_layer=2, n_head=2, n_embd=16, block_size=12, bias=True, vocab_size=11, dropout=0.1)
    theirs = GPT(GPTConfig(**args, **NANOGPT)).eval()
    for p in theirs.parameters():
        torch.nn.init.normal_(p, std=0.3)
    weights = {'_orig_mod.' + k: v for k, v in theirs.state_dict().items()}
    path = tmp_path / 'ckpt.pt'
    torch.save({
        'model': weights,
        'optimizer': {},
        'model_args': args,
        'iter_num': 7,
        'best_val_loss': torch.tensor(1.5),
        'config': {'seed': 1},
    }, path)
    idx = torch.randint(11, (2, 12))
    assert torch.allclose(GPT.from_pretrained(path).eval()(idx)[0], theirs(idx)[0], atol=1e-4)
    ours = GPT.from_pretrained(path, vocab_size=16, text_size=11, begin_id=12, block_size=8).eval()
    short = idx[:, :8]
    assert torch.allclose(ours(short)[0][..., :11], theirs(short)[0], atol=1e-4)
    assert ours.config.bias
    assert ours.config.n_positions == 9
    mdlm = OBJECTIVES['mdlm'].from_pretrained(path, mask_id=10, text_size=10)
    assert mdlm.config.attention == 'full'
    for settings, sentence in [
        (dict(vocab_size=64), 'know 11 ids, the text has 64'),
        (dict(block_size=13), 'know 12 positions, block_size is 13'),
    ]:
        with pytest.raises(UserError, match=sentence):
            GPT.from_pretrained(path, **settings)
    torch.save({'model': {}, 'model_args': print}, tmp_path / 'unsafe.pt')
    with pytest.raises(ValueError, match='no checkpoint that can be read'):
        GPT.from_pretrained(tmp_path / 'unsafe.pt')

def nanogpt(**settings):
    """ a network of nanoGPT's kind with large random weights, and the model_args that it is saved with """
    torch.manual_seed(0)
    args = dict(n_layer=2, n_head=2, n_embd=16, block_size=12, vocab_size=11)
    model = GPT(GPTConfig(**{**args, **NANOGPT, **settings})).eval()
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.3)
    return model, args

IDX = torch.arange(24).view(2, 12) % 11
MASKS = {f'transformer.h.{i}.attn.bias': torch.ones(1, 1, 12, 12).tril() for i in range(2)}
MASKS |= {f'transformer.h.{i}.attn.masked_bias': torch.tensor(-1e4) for i in range(2)}
BEFORE = dict(bias=True, mlp='gelu_tanh') # the option bias: biases, and GPT-2's approximation of gelu
OLD = [
    # a version's network, what its model_args hold besides sizes,
    # what it saves besides its parameters, and which of those it leaves out
    (dict(bias=True), dict(bias=True, dropout=0.0), {}, []), # today's
    (dict(bias=False), dict(bias=False), {}, []),
    (BEFORE, dict(dropout=0.1), {}, []),
    (BEFORE | dict(tie_weights=False), {}, {}, []), # the first had a head of its own
    (BEFORE, {}, MASKS, []), # causal masks among the weights
    (dict(bias=False), dict(bias=False), MASKS, []),
    (dict(bias=True), dict(bias=True), {}, ['lm_head.weight']), # a tied head, saved once
    (dict(bias=False), dict(bias=True), {}, []), # what the weights hold decides
]

@pytest.mark.parametrize('prefix', ['', '_orig_mod.'])
@pytest.mark.parametrize('network, more, masks, gone', OLD)
def test_every_version_of_nanogpt_is_read(network, more, masks, gone, prefix, tmp_path):
    theirs, args = nanogpt(**network)
    weights = {prefix + k: v for k, v in (theirs.state_dict() | masks).items() if k not in gone}
    torch.save({'model': weights, 'model_args': args | more, 'iter_num': 7, 'config': {}}, tmp_path / 'ckpt.pt')
    ours = GPT.from_pretrained(tmp_path / 'ckpt.pt').eval()
    assert torch.allclose(ours(IDX)[0], theirs(IDX)[0], atol=1e-5)
    for name in fields_of(GPTConfig, 'weights'): # as train.py takes them
        assert getattr(ours.config, name) == getattr(theirs.config, name)

def test_tokens_of_nanogpt_are_gpt2s_where_its_table_is(tmp_path):
    for rows, text in (50257, {'tokenizer': 'gpt2'}), (50304, {'tokenizer': 'gpt2'}), (65, {}), (100000, {}):
        args = dict(n_layer=1, n_head=1, n_embd=1, block_size=1, vocab_size=rows, bias=False)
        weights = {'transformer.wte.weight': torch.zeros(rows, 1)}
        torch.save({'model': weights, 'model_args': args}, tmp_path / 'ckpt.pt')
        known, _, found = read_pretrained(tmp_path / 'ckpt.pt')
        assert found == text
        assert known['vocab_size'] == rows

@pytest.mark.parametrize('n_layer, n_head, n_embd, parameters', [ # gpt2, -medium, -large, -xl, as published
    (12, 12, 768, 124439808),
    (24, 16, 1024, 354823168),
    (36, 20, 1280, 774030080),
    (48, 25, 1600, 1557611200),
])
def test_gpt2_of_every_size_has_a_network_here(n_layer, n_head, n_embd, parameters):
    sizes = dict(block_size=1024, vocab_size=50257, n_layer=n_layer, n_head=n_head, n_embd=n_embd)
    with torch.device('meta'):
        assert GPT(GPTConfig(**sizes, bias=True, **{**NANOGPT, 'mlp': 'gelu_tanh'})).n_params() == parameters

@pytest.mark.parametrize('broken, sentence', [
    (lambda c: c.pop('model'), "ckpt.pt has no 'model'"),
    (lambda c: c.update(model=[1]), "has no 'model'"),
    (lambda c: c.update(model_args=None), "has no 'model_args'"),
    (lambda c: c['model_args'].pop('n_head'), "'model_args' of .*ckpt.pt has no 'n_head'"),
    (lambda c: c['model_args'].update(n_head='2'), "has no 'n_head'"),
    (lambda c: c['model'].pop('transformer.wte.weight'), 'transformer.wte.weight is missing'),
    (lambda c: c['model'].pop('transformer.ln_f.bias'), 'transformer.h.0.ln_1.bias is unknown here, .* and 9 more'),
    (lambda c: c['model'].pop('transformer.h.1.mlp.c_fc.bias'), 'model: transformer.h.1.mlp.c_fc.bias is missing'),
    (lambda c: c['model_args'].update(n_layer=1), 'transformer.h.1.ln_1.weight is unknown here, .* and 9 more'),
    (lambda c: c['model_args'].update(n_layer=3), 'transformer.h.2.ln_1.weight is missing'),
    (lambda c: c['model_args'].update(n_head=3), 'not a multiple of n_head'),
    (lambda c: c['model_args'].update(n_embd=32), r'transformer.wte.weight is \(11, 16\) there and \(11, 32\) here'),
    (lambda c: c['model_args'].update(block_size=13), 'know 12 positions, block_size is 13'),
    (lambda c: c['model_args'].update(vocab_size=12), 'know 11 ids, the text has 12'),
    (lambda c: c['model'].update({'transformer.ln_f.weight': 3}), 'transformer.ln_f.weight is int there'),
    (lambda c: c['model'].update(rotary=torch.ones(2)), 'do not fit this model: rotary is unknown here'),
])
def test_a_broken_checkpoint_of_nanogpt_is_a_sentence(broken, sentence, tmp_path):
    theirs, args = nanogpt(bias=True)
    ckpt = {'model': theirs.state_dict(), 'model_args': args | {'bias': True}}
    broken(ckpt)
    torch.save(ckpt, tmp_path / 'ckpt.pt')
    with pytest.raises(UserError, match=sentence):
        GPT.from_pretrained(tmp_path / 'ckpt.pt')

def test_weights_of_gpt2(tmp_path):
    """ a folder as Hugging Face writes it: same logits """
    transformers = pytest.importorskip('transformers')
    torch.manual_seed(0)
    sizes = dict(n_layer=2, n_head=2, n_embd=32, vocab_size=101, n_positions=24, bos_token_id=0, eos_token_id=0)
    theirs = transformers.GPT2LMHeadModel(transformers.GPT2Config(**sizes)).eval()
    for p in theirs.parameters():
        torch.nn.init.normal_(p, std=0.3) # large, so that gelu and its approximation differ
    theirs.save_pretrained(tmp_path / 'gpt2')
    idx = torch.randint(101, (2, 24))
    ours = GPT.from_pretrained(str(tmp_path / 'gpt2')).eval()
    assert torch.allclose(ours(idx)[0], theirs(idx).logits, atol=1e-4)
    assert ours.config.mlp == 'gelu_tanh'
    theirs.config.activation_function = 'relu'
    theirs.config.save_pretrained(tmp_path / 'gpt2')
    with pytest.raises(ValueError, match='another kind: relu'):
        GPT.from_pretrained(str(tmp_path / 'gpt2'))

@pytest.mark.parametrize('tied, saved', [(True, True), (True, False), (False, True)])
def test_gpt2_with_and_without_a_head(tied, saved, tmp_path):
    """ a tied head may be in the file or not; a head of its own must be, and is read as one """
    transformers = pytest.importorskip('transformers')
    torch.manual_seed(0)
    sizes = dict(n_layer=1, n_head=2, n_embd=8, vocab_size=11, n_positions=12, bos_token_id=0, eos_token_id=0)
    config = transformers.GPT2Config(**sizes, tie_word_embeddings=tied)
    theirs = transformers.GPT2LMHeadModel(config).eval()
    for p in theirs.parameters():
        torch.nn.init.normal_(p, std=0.5)
    weights = {k: v for k, v in theirs.state_dict().items() if saved or k != 'lm_head.weight'}
    config.save_pretrained(tmp_path)
    torch.save(weights | MASKS, tmp_path / 'pytorch_model.bin')
    ours = GPT.from_pretrained(str(tmp_path)).eval()
    assert torch.allclose(ours(IDX)[0], theirs(IDX).logits, atol=1e-4)
    assert ours.config.tie_weights == tied
    for gone in ['transformer.h.0.mlp.c_fc.bias'] + ['lm_head.weight'] * (not tied):
        torch.save({k: v for k, v in weights.items() if k != gone}, tmp_path / 'pytorch_model.bin')
        with pytest.raises(UserError, match=f'is not a whole GPT-2: it lacks {gone}'):
            GPT.from_pretrained(str(tmp_path))
    for other in dict(scale_attn_by_inverse_layer_idx=True), dict(activation_function='relu'), dict(n_inner=8):
        transformers.GPT2Config(**config.to_dict() | other).save_pretrained(tmp_path)
        torch.save(weights, tmp_path / 'pytorch_model.bin')
        with pytest.raises(UserError, match='another kind|neither a checkpoint nor'):
            GPT.from_pretrained(str(tmp_path))

def test_checkpoints_give_the_weights_asked_for(tmp_path):
    model = gpt()
    ema = {k: v * 2 for k, v in model.state_dict().items()}
    path = tmp_path / 'c.pt'
    ckpt = {'format': 1, 'objective': 'ar', 'config': asdict(model.config), 'model': model.state_dict(), 'ema': ema}
    torch.save(ckpt, path)
    raw, average = (load_checkpoint(path, weights=w)[0] for w in ('raw', 'ema'))
    assert torch.equal(raw.lm_head.weight * 2, average.lm_head.weight)
    assert not raw.training
    with pytest.raises(ValueError, match='cannot be read as ar'):
        load_checkpoint(path, view='ar')

# ---- what a subclass inherits

def own(self, *args, **options):
    """ a method of somebody's own """

WHOLE = dict(loss='kept', bound='kept', writes=True, measures=True, views=True)
NOTHING = dict(loss='ce', bound=None, writes=False, measures=False, views=False)
DISCRETE_HEIRS = [ # what a subclass of MDLM or BD3LM defines, and what of the rest still holds
    ({}, WHOLE),
    (dict(logits=own, embed=own, __init__=own), WHOLE),
    (dict(generate=own, metrics=own), WHOLE),
    # another corruption
    (dict(forward=own), NOTHING),
    (dict(forward=own, corrupt=own, nelbo=own, sample_t=own), NOTHING),
    (dict(corrupt=own), NOTHING | dict(views=True)),
    (dict(groups=own), NOTHING | dict(views=True)),
    (dict(scored=own), NOTHING | dict(views=True)),
    # another loss, other levels, another reading
    (dict(nelbo=own), WHOLE | dict(loss='ce')),
    (dict(sample_t=own), WHOLE | dict(loss='ce')),
    (dict(loss_rows=own), WHOLE | dict(loss='ce')),
    (dict(ce=own), WHOLE | dict(loss='ce', bound=None)),
    (dict(denoise=own), WHOLE | dict(bound=None, measures=False)),
    # what the class says itself
    (dict(forward=own, nll_bound=own), NOTHING | dict(bound='kept')),
    (dict(corrupt=own, bound_name='nelbo'), NOTHING | dict(bound='kept', views=True)),
    (dict(forward=own, bound_name=None), NOTHING),
    (dict(forward=own, loss_name='nelbo'), NOTHING | dict(loss='nelbo')),
    (dict(forward=own, generate=MDLM.generate), NOTHING | dict(writes=True)),
    (dict(forward=own, generate=own), NOTHING | dict(writes=True)),
    (dict(forward=own, loss_name=MDLM.loss_name, bound_name='nelbo', generate=MDLM.generate,
          metrics=MDLM.metrics, views=MDLM.views), WHOLE),
]
HEIRS = [ # a class, what a subclass of it defines, and what of the rest still holds
    (GPT, dict(forward=own), NOTHING | dict(writes=True, measures=True)),
    (GPT, dict(forward=own, attentions=('full',)), NOTHING),
    (GPT, dict(shift=own), NOTHING),
    (GPT, dict(next_token_logits=own), NOTHING),
    (GPT, dict(forward=own, corrupt=own), NOTHING),
    (GPT, dict(next_token_loss=own), WHOLE | dict(loss='ce')),
    (GPT, dict(logits=own), WHOLE),
    (GPT, dict(__init__=own, embed=own, trunk=own), WHOLE),
    (GPT, dict(forward=own, nll_bound=own), NOTHING | dict(bound='nelbo', writes=True, measures=True)),
    (GPT, dict(nll_bound=own), WHOLE | dict(bound='nelbo')), # exact only if it says so
    (GPT, dict(nll_bound=own, bound_name='nll'), WHOLE),
    (Denoiser, dict(forward=own), NOTHING),
    (Denoiser, dict(forward=own, nll_bound=own), NOTHING | dict(bound='nelbo')),
    (DFGPT, dict(forward=own), NOTHING | dict(loss='kept')),
    (DFGPT, dict(q_sample=own), NOTHING | dict(loss='kept')),
    (DFGPT, dict(df_noise=own), NOTHING | dict(loss='kept')),
    (DFGPT, dict(_compute_loss_weight=own), WHOLE),
    (DFText, dict(forward=own), NOTHING | dict(loss='kept')),
    (DFText, dict(likelihood=own), NOTHING | dict(loss='kept')),
    (DFText, dict(df_posterior=own), WHOLE | dict(bound=None, views=False)),
    (DFText, dict(df_context=own), WHOLE),
    *((kind, *case) for kind in (MDLM, BD3LM) for case in DISCRETE_HEIRS),
]

def subclass(how, parent, defines):
    """ a class that inherits from parent and defines these names, made in one of four ways """
    if how == 'class':
        return type('Mine', (parent,), defines)
    if how == 'mixin':
        return type('Mine', (type('Own', (), defines), parent), {})
    if how == 'grandchild':
        return type('Mine', (type('Base', (parent,), defines),), {})
    return type('Mine', (type('Base', (parent,), {}),), defines)

@pytest.mark.parametrize('how', ['class', 'mixin', 'grandchild', 'wrapped'])
@pytest.mark.parametrize('parent, defines, holds', HEIRS, ids=lambda x: getattr(x, '__name__', None) or ','.join(x))
def test_a_class_claims_only_what_is_its_own(parent, defines, holds, how):
    """
    A class with another corruption has neither a bound nor a sampler of [MASK]; one with other weights
    has both. This holds however the class is made.
    """
    kind = subclass(how, parent, defines)
    kept_or = lambda said, parents: parents if said == 'kept' else said
    refuses = lambda claim: getattr(kind, claim).__code__.co_name == 'refuse'
    assert kind.loss_name == kept_or(holds['loss'], parent.loss_name)
    assert kind.bound_name == kept_or(holds['bound'], parent.bound_name)
    assert refuses('nll_bound') == (holds['bound'] is None) or parent is Denoiser # which refuses by itself
    assert refuses('generate') != holds['writes']
    if hasattr(parent, 'nll_order'):
        changed = defines.keys() & set(parent.rests_on['nll_order'])
        assert refuses('nll_order') == (bool(changed) and not defines.get('bound_name'))
    ours = object.__new__(kind) # no network: what is empty is so without one
    for claim, kept in ('metrics', holds['measures']), ('views', holds['views']):
        assert kept or getattr(kind, claim)(ours) == {}
        assert not kept or getattr(kind, claim) is defines.get(claim, getattr(parent, claim))
    for claim in (claim for claim in ('generate', 'nll_bound') if refuses(claim)):
        # one sentence: who, what, and what to write; and the parameters are known before the call
        sentence = f'(Mine|Base) defines its own .*: define {claim} in (Mine|Base), or write {claim} = '
        with pytest.raises(UserError, match=sentence):
            getattr(kind, claim)(ours, None)
        assert inspect.signature(getattr(kind, claim)) == inspect.signature(getattr(parent, claim))

def test_the_objectives_here_keep_their_names():
    assert (GPT.bound_name, GPT.loss_name, Denoiser.bound_name, Denoiser.loss_name) == ('nll', 'nll', None, 'ce')
    sizes = dict(block_size=8, vocab_size=8, mask_id=7, n_layer=1, n_head=1, n_embd=8)
    blocks = dict(diffusion_block_size=4)
    for name, settings, loss in ('mdlm', {}, 'nelbo'), ('bd3lm', blocks, 'nelbo'), ('mdlm', dict(t_dist='bell'), 'ce'):
        model = OBJECTIVES[name](GPTConfig(**sizes, **settings))
        assert (model.measured, model.bound_name, model.loss_name) == ('nelbo', 'nelbo', loss)
    for name, measured, loss in ('df', 'nelbo', 'ce'), ('df_published', 'nelbo_gaussian', 'mse'):
        model = OBJECTIVES[name](GPTConfig(**sizes)) # its own settings have their defaults
        assert (model.measured, model.loss_name) == (measured, loss)
        assert set(model.views()) == {'autoregressive', 'pyramid', 'full_sequence'}

def test_a_corruption_of_ones_own_has_neither_bound_nor_sampler(tmp_path, here):
    """ random tokens in place of [MASK], as people write it: ce and no nelbo; sample.py says what is missing """
    (tmp_path / 'a.txt').write_text('The quick brown fox jumps over the lazy dog.\n' * 60)
    folder = prepare.prepare('text', str(tmp_path / 'corpus'), 'char', input=str(tmp_path / 'a.txt'))
    with open(os.path.join(folder, 'provider.py'), 'w') as f:
        f.write(textwrap.dedent("""
            import torch
            from model import MDLM
            class Uniform(MDLM):
                def forward(self, idx, targets=None, block_ids=None):
                    if targets is None:
                        return super().forward(idx)
                    # corrupt
                    noisy = torch.rand(idx.shape) < 0.5
                    xt = torch.where(noisy, torch.randint_like(idx, self.config.text_size), idx)
                    # attend
                    rows = noisy.flatten().nonzero()[:, 0]
                    x = self.one_stream(xt, only=rows)
                    # loss
                    logits, ce = self.ce(x, targets, rows)
                    return logits, ce.mean()
            class Writes(Uniform):
                generate = MDLM.generate
            OBJECTIVES = {'uniform': Uniform, 'writes': Writes}
            """))
    for name in 'uniform', 'writes':
        text = here('train.py', *TINY, f'--dataset={folder}', f'--out_dir={tmp_path}/{name}', f'--objective={name}')
        log, results = ((tmp_path / name / file).read_text() for file in ('log.csv', 'results.json'))
        assert 'nelbo' not in text + log + results and 'hidden' not in log
        assert 'ce is no bound:' in text and 'val_ce' in log
    text = here('sample.py --start=The --num_samples=1', f'--out_dir={tmp_path}/uniform', code=2)
    assert text.splitlines()[-1] == (
        'error: Uniform defines its own forward, so generate of MDLM is not about it: define generate in Uniform, '
        'or write generate = MDLM.generate there if it holds all the same')
    assert 'The' in here('sample.py --start=The --num_samples=1 --max_new_tokens=5', f'--out_dir={tmp_path}/writes')

TINIEST = dict(block_size=8, vocab_size=8, mask_id=7, n_layer=1, n_head=1, n_embd=8)

@pytest.mark.parametrize('settings, usual', [
    ({}, dict(ar='causal', denoise='full', mdlm='full', df='causal')),
    (dict(diffusion_block_size=4), dict(ar='causal', mdlm='full', bd3lm='block')),
    (dict(segments='2,2,4'), dict(ar='causal', denoise='hierarchical', mdlm='hierarchical', bd3lm='hierarchical')),
    (dict(segments='2,2,4', causal_within_block=True), dict(mdlm='hierarchical', bd3lm='hierarchical')),
    (dict(attention='causal'), dict(ar='causal', mdlm='causal', df='causal')),
    (dict(attention='full', segments='2,2,4'), dict(mdlm='full')),
])
def test_the_attention_nobody_chose_is_the_objectives(settings, usual, tmp_path):
    """ the model's own config and its checkpoint name it; a config that several classes are given stays as it is """
    config = GPTConfig(**TINIEST, **settings)
    before = asdict(config)
    for name, attention in usual.items():
        model = OBJECTIVES[name](config)
        assert model.config.attention == attention
        assert asdict(config) == before
        assert load_checkpoint(saved(tmp_path, model, name))[0].config == model.config
        if attention == 'full': # a later token does change an earlier prediction
            for p in model.parameters():
                torch.nn.init.normal_(p)
            zeros, others = torch.zeros(1, 8).long(), torch.arange(8)[None]
            assert not torch.equal(model(zeros)[0][:, 0], model(others)[0][:, 0])

@pytest.mark.parametrize('objective, settings, sentence', [
    ('ar', dict(attention='full'), 'works with attention causal, not .full'),
    ('bd3lm', {}, 'needs diffusion_block_size'),
    ('mdlm', dict(attention='diagonal'), "attention is 'diagonal', expected one of causal"),
    ('mdlm', dict(causal_within_block=True), 'segments of attention=hierarchical'),
    ('df', dict(attention='block', diffusion_block_size=2), 'works with attention causal . full'),
])
def test_an_attention_that_does_not_go_ends_in_a_sentence(objective, settings, sentence):
    with pytest.raises(UserError, match=sentence):
        OBJECTIVES[objective](GPTConfig(**TINIEST, **settings))

# ---- checkpoints

def small(objective='mdlm', **settings):
    torch.manual_seed(0)
    sizes = dict(block_size=8, vocab_size=8, text_size=5, begin_id=6, mask_id=7, n_layer=1, n_head=2, n_embd=8)
    own = OBJECTIVES[objective]
    levels = dict(df_sampling_timesteps=2) if issubclass(own, DFGPT) else {}
    model = own(own.config_class(**{**sizes, **levels, **settings})).eval()
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.5)
    return model

def saved(tmp_path, model, objective='mdlm', **changes):
    """ the path of a checkpoint of ours """
    ckpt = {'format': 1, 'objective': objective, 'config': asdict(model.config), 'model': model.state_dict(),
            'ema': None, 'meta': {}, 'settings': {'dataset': 'mine'}}
    torch.save(ckpt | changes, tmp_path / 'ckpt.pt')
    return tmp_path / 'ckpt.pt'

def other_values(config_class, field, value):
    """ values of a field other than this one """
    if field.name in config_class.choices:
        return [choice for choice in config_class.choices[field.name] if choice != value]
    kind = (typing.get_args(field.type) or [field.type])[0]
    return {bool: [not value], int: [(value or 4) - 1, (value or 4) + 1], float: [0.25, 0.5]}[kind]

@pytest.mark.parametrize('objective', ['mdlm', 'df', 'df_published'])
def test_a_field_says_whether_weights_fix_it(objective):
    """ any value of another field goes with the same weights """
    model, idx = small(objective, attention='causal', pos='learned'), torch.arange(8)[None] % 5
    config_class, fixed = type(model.config), fields_of(type(model.config), 'weights')
    meant_to_differ = {'block_size', 'vocab_size', 'begin_id', 'text_size', 'attention', 'diffusion_block_size',
                       'segments', 'causal_within_block', 'df_stabilization_level', 'df_clip_noise'}
    others = [f for f in fields(config_class) if f.name not in meant_to_differ and f.name not in fixed]
    assert len(others) > 10
    for field in others:
        for value in other_values(config_class, field, getattr(model.config, field.name)):
            with contextlib.suppress(UserError): # some do not go with the other settings
                same = type(model)(replace(model.config, **{field.name: value})).eval()
                same.load_state_dict(model.state_dict())
                assert torch.equal(same(idx)[0], model(idx)[0]), f"weights fix {field.name}: declare it of_weights"

OTHER = dict( # than the defaults
    n_layer=2,
    n_head=4,
    n_embd=16,
    bias=True,
    pos='learned',
    norm='rmsnorm',
    mlp='gelu_tanh',
    qk_norm=False,
    tie_weights=True,
    df_objective='pred_v',
    df_timesteps=16,
    df_beta_schedule='sigmoid',
    df_embed_norm=2.0,
    df_x0_wpe=True,
    df_level_embed='concat',
)

FIXED = [('mdlm', 'bd3lm', name) for name in fields_of(GPTConfig, 'weights')] # (from, into, field)
FIXED += [(kind, kind, name) for kind in ('df', 'df_published')
          for name in fields_of(OBJECTIVES[kind].config_class, 'weights') if name.startswith('df_')]

@pytest.mark.parametrize('source, target, name', FIXED)
def test_weights_bring_what_they_fix(source, target, name, tmp_path):
    """ each field alone, into another objective too; a checkpoint without the field is another version's """
    value = OTHER[name]
    model = small(source, **{'pos': 'learned', name: value} if name == 'df_x0_wpe' else {name: value})
    path = saved(tmp_path, model, source)
    settings = {'bd3lm': dict(diffusion_block_size=2)}.get(target, dict(df_sampling_timesteps=2))
    other = OBJECTIVES[target].from_pretrained(path, **settings)
    assert getattr(other.config, name) == value != getattr(type(model.config)(), name)
    assert all(torch.equal(v, model.state_dict()[k]) for k, v in other.state_dict().items())
    assert read_pretrained(path)[0][name] == value
    # weights of others say nothing of df, and those of df more than others need
    assert (name in read_pretrained(saved(tmp_path, small()))[0]) == (source == 'mdlm')
    saved(tmp_path, model, source)
    config = {k: v for k, v in asdict(model.config).items() if k != name}
    for read in read_pretrained, load_checkpoint:
        with pytest.raises(UserError, match=f'another version: it does not say {name}, which the weights fix'):
            read(saved(tmp_path, model, source, config=config))

@pytest.mark.parametrize('source, target', [('df', 'df_published'), ('df', 'mdlm'), ('df_published', 'df')])
def test_settings_of_another_objective_stay_where_they_are(source, target, tmp_path):
    """ the weights of one df say how many levels they know, which the other may use, and no setting of mdlm """
    model = small(source, df_timesteps=16)
    known, weights, _ = read_pretrained(saved(tmp_path, model, source))
    if target == 'mdlm':
        with pytest.raises(UserError, match='lm_head.weight is missing'):
            MDLM.from_pretrained(tmp_path / 'ckpt.pt')
        return
    other = OBJECTIVES[target].from_pretrained(tmp_path / 'ckpt.pt')
    assert other.config.df_timesteps == 16
    trunk = {k: v for k, v in weights.items() if not k.startswith('df_')}
    assert all(torch.equal(other.state_dict()[k], v) for k, v in trunk.items())

@pytest.mark.parametrize('objective', ['ar', 'mdlm', 'df', 'df_published'])
def test_checkpoints_from_when_df_was_one_objective(objective, tmp_path):
    """ every objective then had the settings of df, and df_objective said which of the two it was """
    model = small(objective)
    once = {f.name: f.default for kind in ('df', 'df_published') for f in fields(OBJECTIVES[kind].config_class)}
    once |= {'df_objective': 'pred_token'} | asdict(model.config)
    path = saved(tmp_path, model, 'df' if objective == 'df_published' else objective, config=once)
    loaded, ckpt = load_checkpoint(path)
    assert type(loaded) is type(model) and loaded.config == model.config
    assert ckpt['objective'] == objective and ckpt['config'] == asdict(model.config)
    assert type(model).from_pretrained(path).config.n_embd == 8

def test_checkpoints_of_other_versions(tmp_path):
    """ a field that the weights do not fix takes its default; a field that is not known here may mean anything """
    model = small()
    newer = 't_dist', 'ar_weight', 'attn_backend'
    path = saved(tmp_path, model, config={k: v for k, v in asdict(model.config).items() if k not in newer})
    assert load_checkpoint(path)[0].config == model.config
    brought = ['block_size', 'vocab_size', 'text_size', 'begin_id', 'mask_id', 'attention']
    brought += fields_of(GPTConfig, 'weights')
    assert MDLM.from_pretrained(path).config == GPTConfig(**{k: getattr(model.config, k) for k in brought})
    later = asdict(model.config) | {'n_expert': 4, 'logit_cap': 30.0}
    for read in read_pretrained, load_checkpoint:
        with pytest.raises(UserError, match='ckpt.pt was written by another version: logit_cap, n_expert is unknown'):
            read(saved(tmp_path, model, config=later))

def test_an_objective_that_is_not_known_here(tmp_path):
    """ one sentence names it, the known ones, and the file that defines it; with that file it is known """
    path = saved(tmp_path, small(), 'uniform')
    for objectives in {}, {'mine': MDLM}:
        with pytest.raises(UserError) as e:
            load_checkpoint(path, objectives=objectives)
        assert str(e.value) == (
            f"the objective 'uniform' of {path} is not known here, only {', '.join([*OBJECTIVES, *objectives])}: "
            "one of a provider.py needs that file in the folder of its dataset, mine; "
            "from Python, give load_checkpoint its OBJECTIVES as objectives=")
    with pytest.raises(UserError, match="the objective 'uniform' of the checkpoint is not known here"):
        load_checkpoint(torch.load(path))
    assert type(load_checkpoint(path, objectives={'uniform': MDLM})[0]) is MDLM

@pytest.mark.parametrize('objective', ['ar', 'mdlm', 'df'])
@pytest.mark.parametrize('broken, sentence', [
    (lambda c: c.pop('objective'), "has no 'objective'"),
    (lambda c: c.pop('config'), "has no 'config'"),
    (lambda c: c.pop('model'), "has no 'model'"),
    (lambda c: c.pop('format'), "has no 'format'"),
    (lambda c: c.update(format='new'), "has no 'format'"),
    (lambda c: c.update(config=[1]), "has no 'config'"),
    (lambda c: c['model'].pop('transformer.ln_f.weight'), 'of .*ckpt.pt do not fit .*ln_f.weight is missing'),
    (lambda c: c['model'].update(rotary=torch.ones(2)), 'rotary is unknown here'),
    (lambda c: c['config'].update(n_embd=16), r'wte.weight is \(8, 8\) there and \(8, 16\) here, .* and \d+ more'),
    (lambda c: c['config'].update(vocab_size=9), r'wte.weight is \(8, 8\) there and \(9, 8\) here'),
    (lambda c: c['config'].update(n_layer=2), 'transformer.h.1.ln_1.weight is missing'),
    (lambda c: c['config'].update(bias=True), 'transformer.h.0.ln_1.bias is missing'),
    (lambda c: c['config'].update(qk_norm=False), 'attn.qk_norm.weight is unknown here'),
    (lambda c: c.update(ema={'a': torch.ones(1)}), 'is missing, .* and'),
    (lambda c: c['model'].update({'transformer.ln_f.weight': [1.0]}), 'transformer.ln_f.weight is list there'),
])
def test_a_checkpoint_that_does_not_fit_is_a_sentence(objective, broken, sentence, tmp_path):
    ckpt = torch.load(saved(tmp_path, small(objective), objective))
    broken(ckpt)
    torch.save(ckpt, tmp_path / 'ckpt.pt')
    with pytest.raises(UserError, match=sentence):
        load_checkpoint(tmp_path / 'ckpt.pt')

@pytest.mark.parametrize('source, target, settings, sentence', [
    ('mdlm', 'mdlm', dict(n_embd=16), r'wte.weight is \(8, 8\) there and \(8, 16\) here'),
    ('mdlm', 'ar', dict(n_layer=2), 'h.1.ln_1.weight is missing'),
    ('mdlm', 'df', dict(bias=True), 'ln_1.bias is missing'),
    ('mdlm', 'ar', dict(mlp='gelu', n_head=1), r'attn.qk_norm.weight is \(4,\) there and \(8,\) here'),
    ('ar', 'mdlm', dict(tie_weights=True), 'have a head of their own: set tie_weights=False'),
    ('ar', 'mdlm', dict(pos='learned'), 'transformer.wpe.weight is missing'),
    ('mdlm', 'ar', dict(vocab_size=16, text_size=9), 'the weights know 8 ids, the text has 9'),
    ('df', 'mdlm', {}, 'lm_head.weight is missing, df_head.weight is unknown here'),
    ('ar', 'mdlm', dict(block_size=16), None),
    ('ar', 'df', {}, None),
    ('df', 'df', {}, None),
    ('ar', 'df_published', {}, None),
])
def test_weights_that_do_not_fit_are_named(source, target, settings, sentence):
    """ whichever objective they come from: first shapes, then what is missing, then what is unknown """
    weights = small(source).state_dict()
    model = small(target, **settings)
    if sentence is None:
        model.load_pretrained(weights)
        assert torch.equal(model.state_dict()['transformer.ln_f.weight'], weights['transformer.ln_f.weight'])
        return
    with pytest.raises(UserError, match=sentence):
        model.load_pretrained(weights)

def test_a_tied_head_need_not_be_saved():
    weights = small(tie_weights=True).state_dict()
    weights.pop('lm_head.weight')
    model = small(tie_weights=True)
    model.load_pretrained(weights)
    assert model.lm_head.weight is model.transformer.wte.weight
    assert torch.equal(model.lm_head.weight, weights['transformer.wte.weight'])

# ---- where nothing is hidden or scored

KINDS = [
    ('ar', {}),
    ('ar', dict(begin_id=None)),
    ('denoise', {}),
    ('mdlm', {}),
    ('mdlm', dict(segments='2,2,4')),
    ('bd3lm', dict(diffusion_block_size=2)),
    ('bd3lm', dict(diffusion_block_size=1)),
    ('df', {}),
    ('df', dict(attention='full')),
    ('df_published', dict(df_objective='pred_v')),
]

@pytest.mark.parametrize('objective, settings', KINDS, ids=str)
def test_no_metric_is_nan(objective, settings):
    """ where nothing is scored, or by chance nothing is hidden, a metric has no value and is left out """
    model, x = small(objective, **settings), torch.arange(512).view(64, 8) % 5
    with_text = set(model.metrics(x, x))
    one = {'ar': 'entropy', 'denoise': 'accuracy', 'mdlm': 'accuracy_15_hidden', 'bd3lm': 'accuracy_15_hidden',
           'df': 'accuracy_level_8', 'df_published': 'accuracy_level_8'}[objective]
    assert one in with_text
    shortest = 1 + (objective == 'ar' and 'begin_id' in settings)
    for rows, T in (2, 8), (1, 8), (1, shortest):
        for scored in 0, 1, T:
            idx = x[:rows, :T]
            targets = torch.where(torch.arange(T) >= T - scored, idx, -1)
            for seed in range(8): # of 15 % of a token mostly nothing is hidden
                torch.manual_seed(seed)
                found = model.metrics(idx, targets)
                assert all(math.isfinite(v) for v in found.values())
                assert found.keys() <= with_text
            assert scored or found.keys() <= {'embedding_spread'}

@pytest.mark.parametrize('objective, settings', KINDS, ids=str)
@torch.no_grad()
def test_a_score_of_nothing_is_a_sentence(objective, settings):
    """ no rows, or rows without a scored token; among others such rows change nothing """
    model, x = small(objective, **settings), torch.arange(16).view(2, 8) % 5
    nothing = torch.full_like(x, -1)
    for batches in [], [dict(idx=x, targets=nothing)], [dict(idx=x, targets=nothing)] * 2:
        with pytest.raises(UserError, match='nothing to score: no row has a target other than -1'):
            score(model, batches, 2)
    idx = (x + 1) % 5 if objective == 'denoise' else x
    batch = dict(idx=idx, targets=torch.where(torch.arange(8) > 5, x, -1))
    found = score(model, [batch, dict(idx=x, targets=nothing)], 2)
    assert found['tokens'] == 4
    assert all(math.isfinite(v) for v in found.values() if isinstance(v, float))

def test_embeddings_without_size_have_no_spread():
    model = small('df_published')
    torch.nn.init.zeros_(model.transformer.wte.weight)
    x = torch.zeros(1, 8, dtype=torch.long)
    assert model.metrics(x, x)['embedding_spread'] == 0

# ---- devices

@pytest.mark.parametrize('device', [
    'meta', 'cuda:99', 'mps:7', 'xpu:7', 'vulkan', 'xla', 'hpu', 'mtia', 'ipu', 've', 'fpga', 'maia', 'lazy', 'opengl',
    'mkldnn', 'privateuseone', 'gpu', 'GPU', 'CPU', '', ' ', 'cpu ', 'cpu\n', 'auto ', 'None', '0', 'cuda:-1', 'cuda:',
    'cuda:x', 'cpu:-1', 'cpu:99999999999', 'a' * 2000], ids=lambda device: repr(device)[:20])
@pytest.mark.filterwarnings('ignore:.mkldnn. is no longer used')
def test_a_device_that_cannot_be_used_is_a_sentence(device):
    """ and a short one, whatever torch has to say """
    with pytest.raises(UserError) as e:
        pick_device(device)
    text = str(e.value)
    start, end = f'device {device!r} cannot be used here (', '): try --device=auto or --device=cpu'
    assert text.startswith(start) and text.endswith(end)
    assert start + end != text
    assert '\n' not in text
    assert len(text) < 300 + len(repr(device))

@pytest.mark.parametrize('backend', ['cuda', 'mps', 'xpu'])
def test_a_device_that_is_not_there(backend):
    there = getattr(torch, backend).is_available()
    if there:
        assert pick_device(backend)[0].type == backend
    else:
        with pytest.raises(UserError, match=f"device '{backend}' cannot be used here"):
            pick_device(backend)

def test_a_precision_that_a_device_has_not_is_a_sentence(monkeypatch):
    """ whether torch refuses it or warns and goes on without it """
    def product():
        return torch.mm(torch.ones(2, 2), torch.ones(2, 2)).dtype
    device, context, dtype = pick_device('cpu', 'bfloat16')
    with context:
        assert product() == torch.bfloat16
        assert dtype == 'bfloat16'
    assert product() == torch.float
    with pick_device('cpu')[1]:
        assert product() == torch.float
        assert pick_device('cpu')[2] == 'float32'
    for dtype in 'float8', '', None, 16:
        with pytest.raises(UserError, match=f'dtype is {dtype!r}, expected auto or one of float32'):
            pick_device('cpu', dtype)
    plain = torch.autocast
    def refuses(device_type, dtype):
        raise RuntimeError(f"Current {device_type} does not support {dtype}")
    for other in refuses, lambda device_type, dtype: plain(device_type, dtype, enabled=False):
        monkeypatch.setattr(torch, 'autocast', other)
        sentence = 'dtype float16 does not work on cpu: try --dtype=auto or --dtype=float32'
        with pytest.raises(UserError, match=sentence):
            pick_device('cpu', 'float16')
