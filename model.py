"""
One transformer and the objectives that train it to write text, all in this file.

The one idea: a *block* is a set of tokens that share a noise level and see each other, and every block sees the clean
blocks before it. Attention pattern and noise granularity are then the same integer tensor, block_ids:
0,1,2,3,... is GPT; 0,0,0,0,... is BERT; pos // diffusion_block_size is block diffusion.

An objective is a class whose forward rhymes: corrupt, attend, loss. To add one, subclass and add a row to OBJECTIVES.
References: nanoGPT for the network and the loop (https://github.com/karpathy/nanoGPT),
BD3-LM for the two-stream mask (https://arxiv.org/abs/2503.09573), diffusion forcing for noise levels per token (https://arxiv.org/abs/2407.01392).
"""

import contextlib
import copy
import functools
import itertools
import math
import numbers
import os
import warnings
from collections import Counter
from dataclasses import dataclass, fields, replace

import torch
import torch.nn as nn
import torch.utils.checkpoint
from torch.nn import functional as F

# -----------------------------------------------------------------------------
# the one kind of error that is not a bug

class UserError(ValueError):
    """ A setting, a file or a prompt that cannot work. Scripts show its text, one sentence, in place of a traceback """

def check(fits, sentence):
    """ raise a UserError unless fits. What only a mistake in the code can break is an assert """
    if not fits:
        raise UserError(sentence)

def check_length(T, room):
    if T > room: # no check(): torch.compile would have to trace the sentence
        raise UserError(f"{T} tokens do not fit the context: block_size is {room}")

def check_shape(block_ids, B, T):
    if block_ids.dtype != torch.long or block_ids.shape not in ((T,), (1, T), (B, T)):
        raise UserError(f"block_ids are {block_ids.dtype} of shape {tuple(block_ids.shape)}, "
                        f"expected torch.int64 of ({T},) or ({B}, {T})")

# -----------------------------------------------------------------------------
# who may look at whom

def block_ids(attention, T, diffusion_block_size=None, segments=None):
    """
    The block of every position, (T,) int64: non-decreasing from 0.
    attention: causal | full | block | hierarchical. segments, for hierarchical only: lengths that add up to T, the
    question first; the question is one block, every later segment is whole (diffusion_block_size=None) or cut.
    """
    n = diffusion_block_size
    check(attention in ATTENTIONS, f"attention is {attention!r}, expected one of {', '.join(ATTENTIONS)}")
    check(n is None or n >= 1, f"diffusion_block_size is {n}, expected at least 1 token per block")
    check(attention != 'block' or n is not None, "attention 'block' needs diffusion_block_size, the tokens per block")
    return ATTENTIONS[attention](T, n, segments)

def _hierarchical_ids(T, n, segments):
    check(segments and sum(segments) == T, f"segments {segments} add up to {sum(segments or [0])}, the row has {T} tokens")
    ids, first = [], 0
    for i, length in enumerate(segments):
        whole = i == 0 or n is None # the question is never cut
        ids.append(first + torch.arange(length) // (length if whole else n))
        first = int(ids[-1][-1]) + 1
    return torch.cat(ids)

ATTENTIONS = {
    'causal': lambda T, n, segments: torch.arange(T),
    'full': lambda T, n, segments: torch.zeros(T, dtype=torch.long),
    'block': lambda T, n, segments: torch.arange(T) // n, # the last block may be ragged
    'hierarchical': _hierarchical_ids,
}

def mask_mod(block, noisy, clean_causal=False, question=None):
    """
    The one attention rule, a pure function of indices, for SDPA (as a bool matrix) and FlexAttention alike.
    block: (N,) or (B, N) int, the block of each row; noisy: (N,) bool, this row is the corrupted copy of a token whose
    clean copy is also in the sequence. A noisy token is seen only by its own noisy block; a clean token is seen by every
    later block and by its own clean block. The diagonal is always allowed, so no row of a softmax is ever empty.
    With block = cat(ids, ids), noisy first, this is BD3-LM's three-part training mask (https://arxiv.org/abs/2503.09573).
    clean_causal: a clean row sees no later clean row of its own block either, so the clean rows alone are a GPT.
    question: the largest id of what a hierarchy is given; no row of a larger one sees a later row of its own block. None: they do.
    """
    def mod(b, h, q_idx, kv_idx):
        at = (lambda i: block[i]) if block.dim() == 1 else (lambda i: block[b, i])
        same, past = at(q_idx) == at(kv_idx), at(q_idx) > at(kv_idx)
        if question is not None:
            same = same & ((q_idx >= kv_idx) | (at(q_idx) <= question))
        clean = same & ~noisy[q_idx]
        if clean_causal:
            clean = clean & (q_idx >= kv_idx)
        return torch.where(noisy[kv_idx], same & noisy[q_idx], past | clean)
    return mod

def dense_mask(block, noisy=None, clean_causal=False, rows=None, cols=None, question=None):
    """ mask_mod as a bool matrix, True = may look: (N, N) for block (N,), (B, 1, N, N) for block (B, N); or only some rows, columns """
    i = torch.arange(block.size(-1), device=block.device)
    noisy = torch.zeros_like(i, dtype=torch.bool) if noisy is None else noisy
    b = None if block.dim() == 1 else torch.arange(block.size(0), device=block.device)[:, None, None, None]
    q, k = i if rows is None else rows, i if cols is None else cols
    return mask_mod(block, noisy, clean_causal, question)(b, None, q[:, None], k[None, :])

def flex_mask(block, noisy=None, clean_causal=False, rows=None, cols=None, question=None):
    """ the same for FlexAttention, which skips the tiles that nobody may look at """
    from torch.nn.attention.flex_attention import create_block_mask
    i = torch.arange(block.size(-1), device=block.device)
    noisy = torch.zeros_like(i, dtype=torch.bool) if noisy is None else noisy
    mod, q, k = mask_mod(block, noisy, clean_causal, question), i if rows is None else rows, i if cols is None else cols
    return create_block_mask(lambda b, h, q_idx, kv_idx: mod(b, h, q[q_idx], k[kv_idx]), block.size(0) if block.dim() > 1 else None,
                             None, len(q), len(k), device=block.device)

def whole_blocks(ids, size):
    """ cut a row into runs of at least `size` tokens that split no block: [(start, end), ...]; ids is a list """
    edges = [0]
    for i in range(1, len(ids)):
        if ids[i] != ids[i - 1] and i - edges[-1] >= size:
            edges.append(i)
    return list(zip(edges, edges[1:] + [len(ids)]))

def attend(q, k, v, mask, dropout_p=0.0):
    """
    Scaled dot-product attention, (B, H, Tq, D) over (B, H, Tk, D). mask: 'causal' (queries and keys begin together),
    'full', a bool matrix that broadcasts to (B, H, Tq, Tk), a FlexAttention BlockMask, or the parts of a two-stream mask: a pair
    (noisy, clean) of lists [(rows, clean keys, mask), ...]. A run of noisy rows looks at itself and at the first so many clean keys, a
    run of clean rows at the latter only; clean runs without queries are left out.
    """
    if isinstance(mask, tuple):
        noisy, clean = ([[n for n, _, _ in runs], runs] for runs in mask)
        T = sum(noisy[0])
        (qn, qc), (kn, kc), (vn, vc) = (x.split((T, x.size(2) - T), dim=2) for x in (q, k, v))
        y = [attend(q, torch.cat((k, kc[:, :, :past]), 2), torch.cat((v, vc[:, :, :past]), 2), part, dropout_p)
             for q, k, v, (_, past, part) in zip(*(x.split(noisy[0], 2) for x in (qn, kn, vn)), noisy[1])]
        if qc.size(2):
            y += [attend(q, kc[:, :, :past], vc[:, :, :past], part, dropout_p) for q, (_, past, part) in zip(qc.split(clean[0], 2), clean[1])]
        return torch.cat(y, dim=2)
    if isinstance(mask, str):
        # no matrix: the kernels skip what is_causal rules out
        return F.scaled_dot_product_attention(q, k, v, dropout_p=dropout_p, is_causal=mask == 'causal')
    if torch.is_tensor(mask):
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, dropout_p=dropout_p)
    from torch.nn.attention.flex_attention import flex_attention
    check(q.is_cuda or not q.requires_grad, "FlexAttention has no backward pass on this device: use attn_backend=sdpa")
    flex = flex_attention if torch.compiler.is_compiling() or not q.is_cuda else compiled(flex_attention)
    return flex(q, k, v, block_mask=mask)

@functools.cache
def compiled(fn):
    """ FlexAttention is only fast (and only saves memory) when compiled; once per process is enough """
    return torch.compile(fn)

class Cache:
    """
    Keys and values of every layer for up to `size` positions, so that generation reads each token once, and what else no pass needs
    to look up again. A pass writes behind the `length` positions already kept; keep(n) makes the next n of them permanent.
    """
    def __init__(self, model, batch, size):
        c, like = model.config, model.lm_head.weight
        self.kv = like.new_empty(2 * c.n_layer, batch, c.n_head, size, c.n_embd // c.n_head)
        self.size, self.length = size, 0
        self.rope = model.rotations(torch.arange(size, device=like.device), like.dtype)
        self.parts = [[bare(part) for part in block.parts()] for block in model.transformer.h]

    def open(self, n):
        """ make room for the next n rows, for all layers at once; returns their rotary positions """
        assert self.length + n <= self.size, f"{self.length + n} positions do not fit a cache of {self.size}"
        self.new, self.seen = self.kv.narrow(3, self.length, n).unbind(), self.kv.narrow(3, 0, self.length + n).unbind()
        return self.rope if self.rope is None else self.rope.narrow(1, self.length, n)

    def append(self, layer, k, v):
        """ k, v (B, H, n, D) of a layer -> all keys and values so far, (B, H, length + n, D) """
        i = 2 * layer
        self.new[i].copy_(k)
        self.new[i + 1].copy_(v)
        return self.seen[i], self.seen[i + 1]

    def keep(self, n):
        self.length += n

# -----------------------------------------------------------------------------
# the network

@dataclass
class Task:
    """ the fields of a GPTConfig that weights leave open: the text, how a model trains on it, and how it writes """
    block_size: int = 1024 # tokens of context
    vocab_size: int = 50304 # rows of the embedding: the text's ids, then begin, [MASK], pad and padding to a round number
    text_size: int = None # ids a text can contain are below this one, all others have logit -inf. None: all rows
    begin_id: int = None # ar reads it before the first token, so that every token is scored. None: nanoGPT's windows
    dropout: float = 0.0
    init: str = 'zero' # zero: output projections (and an untied head) start at 0 | gpt2: small normals, scaled by depth
    attention: str = None # causal | full | block | hierarchical: see block_ids. None: usual_attention of the objective
    diffusion_block_size: int = None # tokens per block; None: segments of a hierarchy stay whole
    segments: str = None # lengths of a hierarchy, the question first: '128,128,256', each with or without a name, 'plan:128'
    causal_within_block: bool = False # hierarchical: plan and execution see no later tokens of their own block
    mask_id: int = None # what a hidden token reads as
    t_min: float = 0.0 # noise levels that training draws; bounds always use all of (0, 1]
    t_max: float = 1.0
    t_dist: str = 'uniform' # uniform | bell: Beta(2, 2), another weighting of the same losses (https://arxiv.org/abs/2605.13026)
    single_ratio_per_sequence: bool = True # False: a noise level per token; then the loss is no bound
    clean_causal: bool = False # bd3lm: clean tokens see no later ones of their block, so the clean stream is a GPT
    ar_weight: float = 0.0 # weight of a next-token loss: bd3lm's on the clean stream, mdlm's on half of the rows
    attn_backend: str = 'auto' # auto | sdpa | flex. auto: flex on cuda where there is a mask to skip and no dropout, else sdpa
    grad_checkpointing: bool = False # compute activations twice instead of keeping them: less memory, ~1/3 more time
    df_sampling_timesteps: int = 32 # levels that sampling visits
    df_clean_share: float = 0.5 # pred_token, causal attention: share of the training rows in which all that a token sees is clean, as in ar
    df_sampler: str = 'auto' # mixture | ddpm | ddim. auto: mixture for pred_token, else ddpm, or ddim where sampling leaves levels out
    df_loss_weight: str = 'fused' # fused | min_snr | uniform: see df_loss_weight
    df_snr_clip: float = 5.0 # signal-to-noise ratios above it weigh no more
    df_cum_snr_decay: float = 0.95 # of the average over earlier tokens in fused weights, per token
    df_clip_noise: float = 5.0 # of squared errors: noise is clamped to +- this
    df_ddim_eta: float = 0.0 # share of fresh noise in a DDIM step: 0 none, 1 as much as DDPM
    df_stabilization_level: int = 1 # finished tokens are read as if at this level, 1 the least noisy; 0 is refused
    df_scheduling_matrix: str = 'pyramid' # pyramid | full_sequence | autoregressive | trapezoid: see scheduling_matrix
    df_uncertainty_scale: float = 1.0 # steps a token begins later than the one before it; 0: all at once
    df_chunk_size: int = None # tokens denoised together; 0: all that are asked for. None: half of the context

@dataclass
class GPTConfig(Task):
    """
    what the model is; train.py has a setting of the same name for nearly every field.
    The weights fix the fields of this class: a checkpoint brings them along wherever its weights go.
    A field that may change on the way belongs to Task.
    """
    n_layer: int = 12
    n_head: int = 12
    n_embd: int = 768
    bias: bool = False # in linear layers and in layernorm
    pos: str = 'rope' # rope | learned
    norm: str = 'layernorm' # layernorm | rmsnorm (as good at 0.8M parameters, slower on a CPU)
    mlp: str = 'swiglu' # swiglu | gelu | gelu_tanh (GPT-2's approximation of it); equal in parameters
    qk_norm: bool = True # layernorm on queries and keys, with a gain (https://arxiv.org/abs/2302.05442)
    tie_weights: bool = False # one matrix for embedding and head
    # of df alone: what the network predicts: pred_token, by cross-entropy; as published, by squared error, the others
    df_objective: str = 'pred_token' # pred_token | pred_noise | pred_x0 | pred_v
    df_timesteps: int = 32 # noise levels of training
    df_beta_schedule: str = 'cosine' # linear | cosine | sigmoid
    df_embed_norm: float = 4.0 # pred_token: length of all embeddings, so a noise level means the same for any n_embd
    df_x0_wpe: bool = False # add positions to the embeddings that get noisy, instead of in the network; needs pos='learned'
    df_level_embed: str = 'add' # of squared errors: add | concat (and an MLP): how the network reads noise levels

    def __post_init__(self):
        for name, options in CHOICES.items():
            value = getattr(self, name)
            usual = name == 'attention' and value is None # the model resolves it
            check(usual or value in options, f"{name} is {value!r}, expected one of {', '.join(options)}")
        check(self.n_embd % self.n_head == 0, f"n_embd {self.n_embd} is not a multiple of n_head {self.n_head}")
        head = self.n_embd // self.n_head
        check(self.pos != 'rope' or head % 2 == 0, f"rope turns pairs: a head of {head} dimensions (n_embd / n_head) is odd")
        check(not self.causal_within_block or self.attention in ('hierarchical', None),
              "causal_within_block is about the segments of attention=hierarchical")
        self.text_size = self.vocab_size if self.text_size is None else self.text_size
        check(self.text_size <= self.vocab_size, f"text_size {self.text_size} exceeds vocab_size {self.vocab_size}")

    @property
    def lengths(self):
        """ of the segments, [] where there are none """
        parts = [part.rpartition(':')[2].strip() for part in self.segments.split(',')] if self.segments else []
        check(not parts or len(parts) > 1 and all(n.isdecimal() and int(n) > 0 for n in parts), f"segments is {self.segments!r}, expected lengths like 32,32,64")
        return [int(n) for n in parts]

    @property
    def n_positions(self):
        """ a begin id comes in addition to the text """
        return self.block_size + (self.begin_id is not None)

CHOICES = {'pos': ('rope', 'learned'), 'norm': ('rmsnorm', 'layernorm'), 'mlp': ('swiglu', 'gelu', 'gelu_tanh'),
           'init': ('zero', 'gpt2'), 't_dist': ('uniform', 'bell'), 'attention': tuple(ATTENTIONS), 'attn_backend': ('auto', 'sdpa', 'flex'),
           'df_objective': ('pred_noise', 'pred_x0', 'pred_v', 'pred_token'), 'df_sampler': ('auto', 'mixture', 'ddpm', 'ddim'), 'df_beta_schedule': ('linear', 'cosine', 'sigmoid'),
           'df_loss_weight': ('fused', 'min_snr', 'uniform'), 'df_level_embed': ('add', 'concat'),
           'df_scheduling_matrix': ('pyramid', 'full_sequence', 'autoregressive', 'trapezoid')}

# the fields that weights fix, those of every objective and those of df besides
_FIXED = [f.name for f in fields(GPTConfig) if f not in fields(Task)]
ARCHITECTURE = tuple(name for name in _FIXED if not name.startswith('df_'))
DF_ARCHITECTURE = tuple(name for name in _FIXED if name.startswith('df_'))

def make_norm(config):
    return nn.RMSNorm(config.n_embd, eps=1e-5) if config.norm == 'rmsnorm' else nn.LayerNorm(config.n_embd, bias=config.bias)

def rope_table(config):
    """ cos and signed sin of position * frequency, (2, n_positions, D) for heads of D, https://arxiv.org/abs/2104.09864 """
    half = config.n_embd // config.n_head // 2
    freq = 10000.0 ** (-torch.arange(half).float() / half)
    angle = torch.arange(config.n_positions).float()[:, None] * freq
    return torch.stack((angle.cos().repeat(1, 2), torch.cat((-angle.sin(), angle.sin()), dim=1)))

def rotate(x, cos, sin):
    """ rotary positions: dimension i < D/2 and dimension i + D/2 of x (..., D) are the two coordinates of a pair """
    return torch.addcmul(x * cos, x.roll(x.size(-1) // 2, -1), sin)

def drop(x, module):
    """ dropout, where there is any """
    return F.dropout(x, module.dropout) if module.training and module.dropout else x

def bare(module):
    """ what a module computes, without nn.Module's look-ups and hooks: for one token they cost more than the arithmetic """
    if type(module) is nn.Linear:
        return functools.partial(F.linear, weight=module.weight, bias=module.bias)
    if type(module) is nn.LayerNorm:
        return functools.partial(F.layer_norm, normalized_shape=module.normalized_shape, weight=module.weight, bias=module.bias, eps=module.eps)
    return module # whatever else a reader puts in its place

class Block(nn.Module):
    """ one layer: attention, then an MLP, each added to the residual stream x """

    def __init__(self, config, layer):
        super().__init__()
        C, self.layer, self.n_head, self.dropout = config.n_embd, layer, config.n_head, config.dropout
        self.gated, self.gelu = config.mlp == 'swiglu', 'tanh' if config.mlp == 'gelu_tanh' else 'none'
        # a gate is a third matrix: 8/3 of the width instead of 4, in steps of 16, costs the same parameters
        hidden = round(C / 6) * 16 if self.gated else 4 * C
        linear = functools.partial(nn.Linear, bias=config.bias)
        self.ln_1, self.ln_2 = make_norm(config), make_norm(config)
        self.attn = nn.ModuleDict(dict(c_attn = linear(C, 3 * C), c_proj = linear(C, C))) # query, key, value; output
        if config.qk_norm:
            self.attn.qk_norm = nn.LayerNorm(C // config.n_head, bias=False) # one gain, squared in q @ k: learns how sharply to look
        self.mlp = nn.ModuleDict(dict(c_fc = linear(C, (1 + self.gated) * hidden), c_proj = linear(hidden, C)))

    def parts(self):
        qk_norm = self.attn.qk_norm if 'qk_norm' in self.attn else None
        return self.ln_1, self.attn.c_attn, qk_norm, self.attn.c_proj, self.ln_2, self.mlp.c_fc, self.mlp.c_proj

    def forward(self, x, rope, mask, cache=None, rows=None, only=None):
        """ what anybody needs after this layer: rows, so many of them, counted from the first; only (R,), some of those, flat -> (R, C) """
        ln_1, c_attn, qk_norm, attn_proj, ln_2, c_fc, mlp_proj = self.parts() if cache is None else cache.parts[self.layer]
        B, T, C = x.shape
        # attention
        qkv = c_attn(ln_1(x)).view(B, T, 3, self.n_head, C // self.n_head)
        qk, v = qkv[:, :, :2], qkv[:, :, 2].transpose(1, 2) # queries and keys take the same steps, so take them together
        qk = qk if qk_norm is None else qk_norm(qk)
        qk = qk if rope is None else rotate(qk, *rope)
        q, k = qk.permute(2, 0, 3, 1, 4).unbind() # (B, H, T, D)
        if cache is not None:
            k, v = cache.append(self.layer, k, v) # (B, H, length + T, D)
        if rows is not None:
            x, q = x[:, :rows], q[:, :, :rows]
        y = attend(q, k, v, mask, self.dropout if self.training else 0.0).transpose(1, 2).reshape(B, -1, C)
        if only is not None:
            x, y = x.flatten(0, 1)[only], y.flatten(0, 1)[only]
        x = x + drop(attn_proj(y), self)
        # mlp
        h = c_fc(ln_2(x))
        if self.gated:
            h, gate = h.chunk(2, dim=-1)
            h = F.silu(gate) * h # https://arxiv.org/abs/2002.05202
        else:
            h = F.gelu(h, approximate=self.gelu)
        return x + drop(mlp_proj(h), self)

# -----------------------------------------------------------------------------
# sampling, shared by every objective

def not_negative(x):
    return 0 <= x <= 1e9 or x == math.inf # no nan, and no int that is too large for a float

# what generate takes under each name, in every class: the kind of value, what is expected of it, does a value fit
WHOLE, NUMBER, NAME = 'a whole number', 'a number', 'a name'
OPTIONS = {
    'max_new_tokens': (WHOLE, '0 or more', lambda n: n >= 0),
    'steps': (WHOLE, 'at most 1,000,000', lambda n: n <= 10 ** 6), # at least: see plan, and df_sampling_timesteps
    'sampler': (NAME, None, None), # see check_sampler, and df_sampler
    'order': (NAME, None, None),
    'schedule': (NAME, None, None),
    'confidence_threshold': (NUMBER, '0 or more, 1e9 at most or inf', not_negative),
    'entropy_budget': (NUMBER, '0 or more, 1e9 at most or inf', not_negative),
    'temperature': (NUMBER, '0 (greedy) to 1e6', lambda t: 0 <= t <= 1e6),
    'top_k': (WHOLE, 'at least 1', lambda k: k >= 1),
    'top_p': (NUMBER, 'a probability in (0, 1]', lambda p: 0 < p <= 1),
    'remask': (NUMBER, 'a share in [0, 1)', lambda r: 0 <= r < 1),
    'guidance': (NUMBER, '0 (off) or more, up to 1000', lambda w: 0 <= w <= 1000),
    'stop': (WHOLE, 'the id of a token', lambda token: 0 <= token < 2 ** 31),
    'df_scheduling_matrix': (NAME, None, None), # these two: see DFGPT.check
    'df_uncertainty_scale': (NUMBER, None, None),
}
KINDS = {WHOLE: numbers.Integral, NUMBER: (float, numbers.Integral), NAME: str} # bool is none of them
NEEDED = ('max_new_tokens', 'schedule', 'temperature', 'remask', 'guidance') # the others may be None: not given

def check_options(given):
    """ a sentence for an option of `given`, {name: value}, whose value is of another kind or does not fit """
    for name, value in given.items():
        if name not in OPTIONS or value is None and name not in NEEDED:
            continue
        kind, expected, fits = OPTIONS[name]
        right = isinstance(value, KINDS[kind]) and not isinstance(value, bool)
        check(right, f"{name} is {value!r}, expected {kind}, not a {type(value).__name__!r}")
        check(fits is None or fits(value), f"{name} is {value}, expected {expected}")

def token_probs(logits, temperature=1.0, top_k=None, top_p=None):
    """
    (..., V) logits -> float32 probabilities. Temperature 0 is the argmax, the first where several are largest; below
    1e-6 it is taken for 0, as logits that differ by so little differ by rounding. top_p keeps the token that crosses p.
    """
    check_options({'temperature': temperature, 'top_k': top_k, 'top_p': top_p})
    logits = logits.float()
    if temperature < 1e-6:
        return F.one_hot(logits.argmax(-1), logits.size(-1)).float()
    if temperature != 1:
        logits = (logits - logits.amax(-1, keepdim=True)) / temperature # first the difference, which cannot overflow
    if top_k is not None and top_k < logits.size(-1):
        logits = logits.masked_fill(logits < logits.topk(top_k).values[..., -1:], -math.inf)
    probs = logits.softmax(-1)
    if top_p is not None and top_p < 1:
        sorted_probs, order = probs.sort(-1, descending=True)
        before = sorted_probs.cumsum(-1) - sorted_probs
        beyond = (before > 0) & (before >= top_p) # the mass before this token already reached p; the first token stays
        probs = probs.masked_fill(torch.zeros_like(beyond).scatter(-1, order, beyond), 0.0)
        probs = probs / probs.sum(-1, keepdim=True)
    return probs

def draw(probs):
    """ one id per distribution, (..., V) -> (...); multinomial, because a float32 Gumbel race lowers the temperature """
    return torch.multinomial(probs.flatten(0, -2), 1).view(probs.shape[:-1])

def random_subset(groups, eligible, k):
    """ k[b, g] random positions of every group, among the eligible ones: groups (B, T) int, eligible (B, T) bool -> (B, T) bool """
    r = torch.rand(groups.shape, device=groups.device).masked_fill(~eligible, 2.0)
    shuffled = r.argsort(1)
    order = shuffled.gather(1, groups.gather(1, shuffled).argsort(dim=1, stable=True)) # by group, shuffled within, eligible first
    sizes = torch.zeros_like(k).scatter_add(1, groups, torch.ones_like(groups))
    sorted_groups = groups.gather(1, order)
    rank = torch.arange(groups.size(1), device=groups.device) - (sizes.cumsum(1) - sizes).gather(1, sorted_groups)
    chosen = rank < k.gather(1, sorted_groups)
    return torch.zeros_like(eligible).scatter(1, order, chosen) & eligible

def ranks(key, among):
    """ (B, n): how many of the tokens `among` come before each of them when the largest key is first, ties by position; all others are last """
    return key.masked_fill(~among, -math.inf).argsort(dim=1, descending=True, stable=True).argsort(dim=1)

def leading(key, among, k):
    """ (B, n) bool: the k (B,) of them that come first, or all if they are fewer """
    return among & (ranks(key, among) < k[:, None])

def spread(values, where):
    """ values (R,) of the R true positions, in their order -> (B, n), 0 elsewhere """
    return torch.zeros(where.shape, dtype=values.dtype, device=where.device).masked_scatter_(where, values)

def entropy(probs):
    """ in nats, (..., V) -> (...); xlogy, because 0 log 0 is 0 here and not NaN """
    return -torch.xlogy(probs, probs).sum(-1)

# which hidden token comes first: the largest value, ties by position. Of the distributions (..., V) alone, as the model has them, whatever
# is drawn later. Where all is hidden every position may predict the same, so values are rounded: else the last bit of a sum would decide
ORDERS = {
    'left_to_right': lambda probs: probs.new_zeros(probs.shape[:-1]),
    'confidence': lambda probs: probs.max(-1).values.round(decimals=4),
    'entropy': lambda probs: -entropy(probs).round(decimals=4),
    'margin': lambda probs: probs.topk(2).values.diff(dim=-1).neg().squeeze(-1).round(decimals=4),
}

# the share of a block that is still hidden after a share u of its steps; exactly 0 at the end
SCHEDULES = {'linear': lambda u: 1 - u, 'cosine': lambda u: math.sin(math.pi / 2 * (1 - u))}

def reverse_steps(steps, schedule):
    """ [(t, s), ...]: the share hidden before and after each of the steps """
    at = SCHEDULES[schedule]
    return [(at(i / steps), at((i + 1) / steps)) for i in range(steps)]

def row_steps(counts, schedule):
    """
    The same for rows that take counts (B,) steps each: yields t and s, both (B,), as often as the slowest row needs.
    A row without steps left has t = 1 and s = 0: nothing is hidden any more.
    """
    counts, row = counts.unique(return_inverse=True)
    longest = int(counts[-1])
    table = [reverse_steps(n, schedule) + [(1.0, 0.0)] * (longest - n) for n in counts.tolist()]
    table = torch.tensor(table, dtype=torch.float64) # (numbers of steps, longest, 2)
    for i in range(longest):
        yield table[row, i].unbind(1)

def first_hitting(hidden, total, t, s):
    """ one: in random order masked diffusion in infinitely many steps, without those that reveal nothing (https://arxiv.org/abs/2409.02908) """
    return hidden.any(1).long()

def ancestral(hidden, total, t, s):
    """ the reverse process: what is hidden at t is revealed by s < t with probability (t - s) / t, which is 1 at the last step """
    rate = torch.as_tensor(1 - s / t, dtype=torch.float32, device=hidden.device).view(-1, 1)
    return (hidden & (torch.rand(hidden.shape, device=hidden.device) < rate)).sum(1)

def fixed(hidden, total, t, s):
    """ all but a share s of the block: linear, every step the same number, or one more (https://arxiv.org/abs/2502.09992) """
    written = torch.as_tensor(1 - s, dtype=torch.float32, device=hidden.device)
    return hidden.sum(1) - total + (total * written + 1e-4).long() # 1e-4: 5 * (1 - 0.8) is 0.99...

def threshold(hidden, rank, probs, bound):
    """ all that the model is sure of, or else the first (https://arxiv.org/abs/2505.22618) """
    sure = hidden & (spread(probs.max(-1).values, hidden) > bound)
    return torch.where(sure.any(1, keepdim=True), sure, hidden & (rank < 1))

def entropy_bound(hidden, rank, probs, bound):
    """ the longest run, in order, whose joint error the entropies bound: their sum less the largest (https://arxiv.org/abs/2505.24857) """
    h = spread(entropy(probs), hidden).gather(1, rank.argsort(dim=1))
    n = (h.cumsum(1) - h.cummax(1).values <= bound).sum(1, keepdim=True) # grows along the run; the first is free
    return hidden & (rank < n)

# how many hidden tokens of each row, the first in `order`, a call reveals, (B,). Known before the call, which may then
# be left out. From hidden (B, n), total (B,), how many were hidden when the block was begun, and t and s of the step,
# both floats or both (B,)
QUOTAS = {'first_hitting': first_hitting, 'ancestral': ancestral, 'fixed': fixed}
# which of them it reveals, where only the distributions tell: hidden, rank in `order` (B, n), probs (hidden, V), a bound -> (B, n) bool
ACCEPTS = {'threshold': threshold, 'entropy_bound': entropy_bound}
BOUNDS = {'threshold': 0.9, 'entropy_bound': 0.1} # where confidence_threshold (a probability), entropy_budget (nats) are not given
# first_hitting is exact in random order; in any other, at temperature 1, nll_order has its exact likelihood.
# ancestral is random by nature
SAMPLERS = { # and the options that each of them reads
    'first_hitting': ('order',),
    'ancestral': ('steps', 'schedule', 'remask'),
    'fixed': ('steps', 'order', 'schedule', 'remask'),
    'threshold': ('order', 'confidence_threshold'),
    'entropy_bound': ('order', 'entropy_budget'),
}

def choose(sampler, order, bound, hidden, k, logits):
    """ what a call reveals, (B, n) bool, when that depends on what it predicts for all that is hidden, logits (R, V); k as by QUOTAS """
    probs = token_probs(logits)
    key = torch.rand(hidden.shape, device=hidden.device) if order == 'random' else spread(ORDERS[order](probs), hidden)
    return leading(key, hidden, k) if sampler in QUOTAS else ACCEPTS[sampler](hidden, ranks(key, hidden), probs, bound)

def lengthened(idx, n):
    """ idx (B, T) and n columns to write -> (B, T + n), -1 there """
    B, T = idx.shape
    check(max(1, B) * (T + n) <= 10 ** 8,
          f"{B} rows of {T} tokens and {n} new ones are more than the 100,000,000 tokens of one call: ask for fewer")
    return F.pad(idx, (0, n), value=-1)

def settled(out):
    """ leading columns of out (B, N) that are written in every row, -1 being to be written """
    return int((out != -1).all(0).long().cumprod(0).sum())

def end_rows(out, unknown, stop):
    """ what a row wrote after its first stop does not count and becomes stop, in place -> (B, N) bool, from the stop on. All before a stop must be written """
    ended = ((out == stop) & unknown & (out != -1).cumprod(1).bool()).cumsum(1) > 0
    out.masked_fill_(ended & unknown, stop)
    return ended

def check_sampler(sampler, **options):
    """ a sentence for a name that does not exist and for an option that this sampler would not read """
    orders, order = ('random', *ORDERS), 'random' if options['order'] is None else options['order']
    names = ('sampler', sampler, SAMPLERS), ('order', order, orders), ('schedule', options['schedule'], SCHEDULES)
    for name, value, known in names:
        check(value in known, f"{name} is {value!r}, expected one of {', '.join(known)}")
    neutral = {'order': 'random', 'schedule': 'linear', 'remask': 0}
    for name, value in options.items():
        check(name in SAMPLERS[sampler] or value in (None, neutral.get(name)),
              f"sampler {sampler} has no use for {name}={value}: leave {name} out, "
              f"or take sampler {' | '.join(s for s in SAMPLERS if name in SAMPLERS[s])}")

# -----------------------------------------------------------------------------
# diffusion forcing: noise levels per token (https://arxiv.org/abs/2407.01392). Level k = 0 is already noisy, -1 is clean

def _betas_from(T, signal):
    """ the share of variance that each of T steps replaces by noise; signal(s): what is left after a share s of them, up to a factor """
    left = signal(torch.linspace(0, 1, T + 1, dtype=torch.float64))
    return (1 - left[1:] / left[:-1]).clamp(0, 0.999)

BETA_SCHEDULES = {
    'linear': lambda T: torch.linspace(0.1 / T, 20 / T, T, dtype=torch.float64),
    'cosine': lambda T: _betas_from(T, lambda s: ((s + 0.008) / 1.008 * math.pi / 2).cos() ** 2),
    'sigmoid': lambda T: _betas_from(T, lambda s: torch.tensor(3.0).sigmoid() - (6 * s - 3).sigmoid()), # the first in float32, as published
}

def df_schedule(kind, T, snr_clip=5.0):
    """ everything that depends on the noise level alone: {name: (T,) float32}, computed in float64. kind: linear | cosine | sigmoid """
    check(kind in BETA_SCHEDULES, f"df_beta_schedule is {kind!r}, expected one of {', '.join(BETA_SCHEDULES)}")
    check(T >= 1, f"df_timesteps is {T}, expected at least 1")
    check(kind != 'linear' or T > 20,
          f"the linear schedule needs df_timesteps of at least 21, not {T}: it ends at a beta of 20 / T, which must be below 1")
    betas = BETA_SCHEDULES[kind](T)
    abar = (1 - betas).cumprod(0)
    before = F.pad(abar[:-1], (1, 0), value=1.0)
    snr, variance = abar / (1 - abar), betas * (1 - before) / (1 - abar)
    return {name: value.float() for name, value in {
        'betas': betas, 'alphas_cumprod': abar, 'alphas_cumprod_prev': before,
        'sqrt_alphas_cumprod': abar.sqrt(), 'sqrt_one_minus_alphas_cumprod': (1 - abar).sqrt(),
        'log_one_minus_alphas_cumprod': (1 - abar).log(),
        'sqrt_recip_alphas_cumprod': (1 / abar).sqrt(), 'sqrt_recipm1_alphas_cumprod': (1 / abar - 1).sqrt(),
        'posterior_variance': variance, 'posterior_log_variance_clipped': variance.clamp(min=1e-20).log(),
        'posterior_mean_coef1': betas * before.sqrt() / (1 - abar), 'posterior_mean_coef2': (1 - before) * (1 - betas).sqrt() / (1 - abar),
        'snr': snr, 'clipped_snr': snr.clamp(max=snr_clip)}.items()}

def df_real_levels(T, S):
    """ (S + 1,) int64: the level, -1 (clean) to T - 1, of every index level 0 (clean) to S that sampling in S steps visits """
    return torch.linspace(-1, T - 1, S + 1).long()

def df_loss_weight(k, snr, clip, decay, objective, kind):
    """
    What the squared error of a token at level k (B, T) counts, (B, T); snr (levels,) is the schedule's. min_snr: never more than at
    an snr of `clip` (https://arxiv.org/abs/2303.09556). fused: clean tokens before it inform about a token too, so their snr, as a decaying
    average, counts as its own. uniform: 1 for the objective as it is.
    """
    for name, value, options in ('df_objective', objective, CHOICES['df_objective']), ('df_loss_weight', kind, CHOICES['df_loss_weight']):
        check(value in options, f"{name} is {value!r}, expected one of {', '.join(options)}")
    own = snr[k] / clip
    clipped, past = own.clamp(max=1), torch.zeros_like(own)
    if kind == 'uniform':
        return torch.ones_like(own)
    if kind == 'fused':
        average = torch.cat((clipped[:, :1], (1 - decay) * clipped[:, 1:]), dim=1) # over one token, then 2, 4, 8, ... of them
        for n in (2 ** i for i in range((k.size(1) - 1).bit_length())):
            average = average + decay ** n * F.pad(average, (n, 0))[:, :-n]
        past = decay * F.pad(average, (1, 0))[:, :-1] # up to the token before
    own, clipped = (clip * (past + (1 - past) * x) for x in (own, clipped))
    return {'pred_noise': clipped / own, 'pred_x0': clipped, 'pred_v': clipped / (own + 1)}[objective]

# how many rows token t of a chunk of h waits before its noise begins to fall, one index level of S per row
SCHEDULING_MATRICES = {
    'pyramid': lambda t, h, S, u: int(t * u),
    'full_sequence': lambda t, h, S, u: 0,
    'autoregressive': lambda t, h, S, u: t * S,
    'trapezoid': lambda t, h, S, u: int(min(t, h - 1 - t) * u), # from both ends; the published one mirrors token t to h - t
}

def scheduling_matrix(kind, horizon, sampling_timesteps, uncertainty_scale):
    """
    How a chunk of `horizon` tokens becomes clean: (rows, horizon) int64 index levels, all sampling_timesteps in the first row, all 0 in the
    last. A reverse step takes a row to the next one. kind: pyramid | full_sequence | autoregressive | trapezoid
    """
    h, S, u = horizon, sampling_timesteps, uncertainty_scale
    check(kind in SCHEDULING_MATRICES, f"df_scheduling_matrix is {kind!r}, expected one of {', '.join(SCHEDULING_MATRICES)}")
    check(h >= 1 and S >= 1, f"a scheduling matrix of {h} tokens and {S} steps is empty: expected at least 1 of both")
    check(0 <= u < math.inf, f"df_uncertainty_scale is {u}, expected 0 or more rows between a token and the next")
    wait = torch.tensor([SCHEDULING_MATRICES[kind](t, h, S, u) for t in range(h)])
    row = torch.arange(S + int(wait.max()) + 1)[:, None]
    return (S + wait - row).clamp(0, S)

# -----------------------------------------------------------------------------
# objectives

def who_says(cls, *names):
    """ the nearest class of the mro that gives one of these names a value, None where none does """
    return next((c for c in cls.__mro__ if any(vars(c).get(name) is not None for name in names)), None)

def changed_since(cls, owner, names):
    """ the names that are not in cls what they are in owner; of a mixin those it has, as it may be about any class """
    names = [name for name in names if hasattr(owner, name) or issubclass(owner, GPT)]
    return [name for name in names if getattr(cls, name, None) != getattr(owner, name, None)]

def not_inherited(cls, claim, owner, changed):
    """ what stands in cls in place of a method of `owner`, because cls changed what that method is about """
    @functools.wraps(getattr(owner, claim)) # sample.py reads the parameters of generate
    def refuse(self, *args, **options):
        raise UserError(
            f"{cls.__name__} defines its own {', '.join(changed)}, so {claim} of {owner.__name__} is not about it: "
            f"define {claim} in {cls.__name__}, "
            f"or write {claim} = {owner.__name__}.{claim} there if it holds all the same")
    return refuse

def mean_over(name, values, among):
    """ {name: the mean of values (B, T) where among (B, T) is True}; {} where it nowhere is: there is no mean then """
    chosen = values[among].float()
    return {name: chosen.mean().item()} if len(chosen) else {}

# what a class says of itself that may say nothing
NOTHING_SAID = {'loss_name': 'ce', 'views': lambda self: {}, 'metrics': lambda self, *args, **batch: {}}

class GPT(nn.Module):
    """
    ar: predict the next token; the trunk that every other objective shares, with the same parameter names.
    The contract with the training loop is `logits, loss = model(**batch)`; batch holds idx (B, T), optional targets
    (B, T), aligned with idx, -1 = not scored (and never corrupted), and whatever else a provider sends.
    A subclass that trains in another way inherits no bound and no sampler that are not its own: see __init_subclass__.
    A subclass of GPT itself that defines forward alone, say with smoothed labels, has no bound, but it still writes and
    is measured token by token: generate and metrics ask next_token_logits, which its forward is trusted to train.
    """
    loss_name = 'nll' # what forward's loss is, in nats per scored token; 'ce' is one that bounds nothing
    bound_name = 'nll' # what nll_bound gives: 'nll' is exact, 'nelbo' an upper bound, None: there is none
    attentions = ('causal',) # patterns this objective can be trained with, its default first
    # what a class says of itself, and what that is about: a subclass that changes the latter loses the former
    rests_on = {
        'loss_name': ('forward', 'corrupt', 'shift', 'next_token_logits', 'next_token_loss'),
        'nll_bound': ('forward', 'corrupt', 'shift', 'next_token_logits'),
        'generate': ('attentions', 'corrupt', 'shift', 'next_token_logits'),
        'metrics': ('attentions', 'corrupt', 'shift', 'next_token_logits'),
    }

    def __init_subclass__(cls, **options):
        """
        Where this class defines anew what a claim of its parent rests on, it does not inherit the claim: loss_name is
        'ce', bound_name None, views() and metrics() are empty; nll_bound, nll_order and generate say what to define.
        A claim that still holds is kept by naming it in the class: generate = MDLM.generate (text is still written by
        filling in [MASK]), bound_name = 'nelbo' (nll_bound and nll_order still hold).
        """
        super().__init_subclass__(**options)
        bounds = next(vars(c) for c in cls.__mro__ if {'nll_bound', 'bound_name'} & vars(c).keys())
        if cls.bound_name is None and 'bound_name' not in bounds: # a bound without a name
            cls.bound_name = 'nelbo' # the weaker of the two
        for claim, grounds in cls.rests_on.items():
            owner = who_says(cls, claim, *['bound_name'] * (claim in ('nll_bound', 'nll_order')))
            changed = changed_since(cls, owner, grounds) if hasattr(cls, claim) else []
            if changed:
                setattr(cls, claim, NOTHING_SAID.get(claim) or not_inherited(cls, claim, owner, changed))
            if changed and claim == 'nll_bound':
                cls.bound_name = None

    def __init__(self, config):
        super().__init__()
        if config.attention is None: # in a copy: another objective may be given the same config
            config = replace(config, attention=self.usual_attention(config.segments))
        check(config.attention in self.attentions,
              f"{type(self).__name__} works with attention {' | '.join(self.attentions)}, not {config.attention!r}")
        self.config, self.dropout = config, config.dropout
        self.transformer = nn.ModuleDict(dict(
            wte = nn.Embedding(config.vocab_size, config.n_embd),
            h = nn.ModuleList([Block(config, layer) for layer in range(config.n_layer)]),
            ln_f = make_norm(config),
        ))
        if config.pos == 'learned':
            self.transformer.wpe = nn.Embedding(config.n_positions, config.n_embd)
        self.lm_head = nn.Linear(config.n_embd, config.vocab_size, bias=False)
        self.apply(self._init_weights)
        for name, p in self.named_parameters():
            if name.endswith('c_proj.weight'): # what a layer adds to the residual stream
                nn.init.normal_(p, std=0.0 if config.init == 'zero' else 0.02 / math.sqrt(2 * config.n_layer))
        if config.init == 'zero':
            nn.init.zeros_(self.lm_head.weight)
        if config.tie_weights:
            self.lm_head.weight = self.transformer.wte.weight
        # constants, not parameters: rebuilt from the config, so they are in no checkpoint
        unseen = torch.zeros(config.vocab_size).masked_fill(torch.arange(config.vocab_size) >= config.text_size, -math.inf)
        self.register_buffer('unseen', unseen if config.text_size < config.vocab_size else None, persistent=False)
        self.register_buffer('rope', rope_table(config) if config.pos == 'rope' else None, persistent=False)

    @classmethod
    def usual_attention(cls, segments):
        """ the pattern for rows of these segments ('' or None: plain text) where none is asked for """
        return 'hierarchical' if segments and 'hierarchical' in cls.attentions else cls.attentions[0]

    def _init_weights(self, module):
        if isinstance(module, (nn.Linear, nn.Embedding)):
            nn.init.normal_(module.weight, std=0.02)
        if isinstance(module, nn.Linear) and module.bias is not None:
            nn.init.zeros_(module.bias)

    @classmethod
    def from_pretrained(cls, source, **settings):
        """ a model that starts from the weights of read_pretrained; settings: fields of GPTConfig, what they do not fix """
        known, weights, _ = read_pretrained(source)
        model = cls(GPTConfig(**{**known, **settings}))
        model.load_pretrained(weights)
        return model

    def taken_from(self, weights):
        """ {name: tensor} of any objective -> what this class takes of it """
        return dict(weights)

    def load_pretrained(self, weights):
        """
        As load_state_dict, but the tables of ids and of positions may have other numbers of rows: those that both have
        are taken. Objectives share the names of their parameters, so the weights may come from any of them but df,
        which has another head. What does not fit is named in a UserError.
        """
        own, weights = self.state_dict(), self.taken_from(weights)
        if self.config.tie_weights and 'lm_head.weight' in own and 'transformer.wte.weight' in weights:
            wte = weights['transformer.wte.weight']
            head = weights.setdefault('lm_head.weight', wte)
            check(torch.equal(head, wte), "the weights have a head of their own: set tie_weights=False")
        for name, needed, what in (('transformer.wte.weight', self.config.text_size, 'ids, the text has'), ('lm_head.weight', 0, ''),
                                   ('transformer.wpe.weight', self.config.block_size, 'positions, block_size is')):
            if name in own and torch.is_tensor(w := weights.get(name)) and w.shape[1:] == own[name].shape[1:]:
                n = min(len(own[name]), len(w))
                check(n >= needed, f"the weights know {n} {what} {needed}")
                weights[name] = torch.cat((w[:n].to(own[name]), own[name][n:]))
        check_fit(own, weights)
        self.load_state_dict(weights)

    @property
    def measured(self):
        """ the name of the number by which models are compared """
        return self.bound_name or self.loss_name

    @property
    def row_length(self):
        """ tokens of text in a training row: without a begin id the first one is only context, as in nanoGPT """
        return self.config.block_size + (self.config.begin_id is None)

    def views(self):
        """ {objective: model}: what else these weights can be read as; evaluated beside the model itself """
        return {}

    def n_params(self):
        return sum(p.numel() for p in self.parameters())

    # ---- the pieces of every forward

    def embed(self, idx, pos):
        """ idx (B, N), pos (N,) -> x (B, N, C) """
        return self.enter(self.transformer.wte(idx), pos)

    def enter(self, x, pos):
        """ x (B, N, C) with what is added to it before the first layer """
        return drop(x + self.transformer.wpe(pos) if self.config.pos == 'learned' else x, self)

    def rotations(self, pos, dtype):
        """ cos and signed sin at positions pos (N,), (2, N, 2, H, D): written out, because broadcasting costs more than reading """
        if self.config.pos != 'rope':
            return None
        return self.rope[:, pos, None, None].to(dtype).expand(-1, -1, 2, self.config.n_head, -1).contiguous()

    def trunk(self, x, pos, mask, cache=None, rows=None, only=None):
        """
        x (B, N, C) at positions pos (N,) -> (B, N, C), normalised; mask as in attend. cache: the rows follow what it keeps.
        rows: only so many, counted from the first, are wanted, so the last layer computes no others. only (R,): of those, (B, rows) counted
        flat, just these -> (R, C): of what only they need, the MLP of the last layer, nothing is computed for the others.
        """
        rope = self.rotations(pos, x.dtype) if cache is None else cache.open(x.size(1))
        for block in self.transformer.h:
            last = (rows, only) if block is self.transformer.h[-1] else (None, None)
            if self.config.grad_checkpointing and self.training:
                x = torch.utils.checkpoint.checkpoint(block, x, rope, mask, None, *last, use_reentrant=False)
            else:
                x = block(x, rope, mask, cache, *last)
        return self.transformer.ln_f(x)

    def logits(self, x):
        """ (..., C) -> (..., vocab_size); ids that no text contains get -inf, as a bias, because that costs nothing """
        return F.linear(x, self.lm_head.weight, self.unseen)

    # ---- ar

    def shift(self, idx, targets):
        """ what to read and what to predict: position i reads up to token i-1 and predicts token i """
        if self.config.begin_id is None:
            return idx[:, :-1], targets[:, 1:] # the first token has nothing before it: context only
        return F.pad(idx[:, :-1], (1, 0), value=self.config.begin_id), targets

    def next_token_logits(self, idx):
        """ idx (B, T) -> logits (B, T, V) of the token after each position """
        T = idx.size(1)
        check_length(T, self.config.n_positions)
        pos = torch.arange(T, device=idx.device)
        return self.logits(self.trunk(self.embed(idx, pos), pos, 'causal'))

    def forward(self, idx, targets=None):
        if targets is None:
            return self.next_token_logits(idx), None
        # corrupt: hide the future, nothing else
        inputs, targets = self.shift(idx, targets)
        # attend
        logits = self.next_token_logits(inputs)
        # loss
        return logits, self.next_token_loss(logits, targets)

    def next_token_loss(self, logits, targets):
        """ logits (B, T, V), targets (B, T) -> nats per scored token; a sum first, because the mean over nothing is NaN """
        loss = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=-1, reduction='sum')
        return loss / (targets != -1).sum().clamp(min=1)

    @torch.no_grad()
    def nll_bound(self, idx, targets, n_samples=1):
        """ -log p of the scored tokens in nats, (B, n_samples), and how many there are, (B,). Exact here: columns agree """
        inputs, targets = self.shift(idx, targets)
        logits = self.next_token_logits(inputs)
        nll = F.cross_entropy(logits.transpose(1, 2), targets, ignore_index=-1, reduction='none').sum(1) # (B,)
        return nll[:, None].expand(-1, n_samples), (targets != -1).sum(1)

    @torch.no_grad()
    def metrics(self, idx, targets):
        """
        {name: number} that the log shows beside the loss, over scored tokens: accuracy, and the mean entropy of
        predictions (nats); {} where none is scored
        """
        inputs, targets = self.shift(idx, targets)
        probs = self.next_token_logits(inputs).softmax(-1)
        scored = targets != -1
        return mean_over('accuracy', probs.argmax(-1) == targets, scored) | mean_over('entropy', entropy(probs), scored)

    @torch.no_grad()
    def generate(self, idx, max_new_tokens, *, temperature=1.0, top_k=None, top_p=None, stop=None, on_step=None):
        """
        Continue idx (B, T), T >= 0, by max_new_tokens: (B, T + max_new_tokens). Rows may differ in prompt length: -1 behind a
        row's prompt means "yours to fill". stop: a token id; a row that emitted it, once per segment to write, is filled up with it.
        on_step(step, idx, probs, state): called after every token with what is written so far, the distributions it came
        from (B, V) and {'nfe': network evaluations, 'done': positions settled, 'total': positions in all}.
        The KV cache is exact. When the context is full, the newer half of it is read again from position 0 and writing
        goes on. A row is written as if alone if all prompts fit the context; else the shortest prompt decides where the
        first window ends.
        """
        check_options(locals())
        out, B, T, given = lengthened(idx, max_new_tokens), *idx.shape, (idx != -1).sum(1) # (B,), prompt lengths
        if not (out == -1).any():
            return out
        begin = idx.new_full((B, self.config.begin_id is not None), self.config.begin_id or 0) # (B, 1) or (B, 0)
        first, room = int(given.min()), self.config.block_size - begin.size(1)
        check(first + begin.size(1) > 0, "without a begin id a prompt needs at least one token")
        check(((idx != -1).cumprod(1).sum(1) == given).all(), "a prompt has a gap (-1 before a given token): ar only writes on")
        cache, stops, enough = None, torch.zeros_like(given), max(1, len(self.config.lengths) - 1) # stops that end a row
        with torch.inference_mode(): # small tensors: what autograd would note down costs more than the arithmetic
            for n in range(first, out.size(1)): # the shortest prompt decides where writing starts
                if cache is None or cache.length == cache.size:
                    kept = room if cache is None else min(room, max(1, room // 2))
                    window = torch.cat((begin, out[:, max(0, n - kept):n]), dim=1)
                    cache = Cache(self, B, min(self.config.block_size, window.size(1) + out.size(1) - n))
                else:
                    window = out[:, n - 1:n]
                pos = torch.arange(cache.length, cache.length + window.size(1), device=idx.device)
                x = self.trunk(self.embed(window, pos), pos, 'full' if window.size(1) == 1 else 'causal', cache)
                cache.keep(window.size(1))
                probs = token_probs(self.logits(x[:, -1]), temperature, top_k, top_p) # (B, V)
                token = draw(probs)
                if stop is not None:
                    token = token.masked_fill(stops >= enough, stop)
                out[:, n] = token if n >= T else torch.where(out[:, n] == -1, token, out[:, n]) # a longer prompt keeps its own
                if stop is not None:
                    stops += (out[:, n] == stop) & (n >= given)
                if on_step is not None:
                    on_step(n - first + 1, out[:, :n + 1], probs, {'nfe': n - first + 1, 'done': n + 1, 'total': out.size(1)})
                if stop is not None and (stops >= enough).all():
                    out[:, n + 1:] = stop
                    break
        return out

    # ---- training

    def configure_optimizers(self, optimizer='adamw', learning_rate=1e-3, muon_learning_rate=0.02, weight_decay=0.1,
                             betas=(0.9, 0.95)):
        """
        A list of optimizers. adamw: all parameters, decay on the 2-D ones. muon: the matrices of attention and MLP by Muon
        (https://kellerjordan.github.io/posts/muon/), embeddings, head, norms and biases by AdamW.
        """
        check(optimizer in ('adamw', 'muon'), f"optimizer is {optimizer!r}, expected adamw or muon")
        matrices = {id(p) for p in self.transformer.h.parameters() if p.dim() == 2} if optimizer == 'muon' else set()
        rest = [p for p in self.parameters() if id(p) not in matrices]
        groups = [{'params': [p for p in rest if p.dim() >= 2], 'weight_decay': weight_decay},
                  {'params': [p for p in rest if p.dim() < 2], 'weight_decay': 0.0}]
        fused = self.transformer.wte.weight.device.type in ('cuda', 'cpu') # one kernel instead of one per parameter
        optimizers = [torch.optim.AdamW(groups, lr=learning_rate, betas=betas, fused=fused)]
        if matrices:
            check(hasattr(torch.optim, 'Muon'), f"optimizer=muon needs torch 2.9 or newer, this is {torch.__version__}")
            optimizers.append(torch.optim.Muon([p for p in self.parameters() if id(p) in matrices],
                                               lr=muon_learning_rate, weight_decay=weight_decay))
        return optimizers

    def flops_per_token(self):
        """ of one training step, forward and backward, per token of text: PaLM's count (https://arxiv.org/abs/2204.02311) """
        c = self.config
        lookups = self.transformer.wpe.weight.numel() if c.pos == 'learned' else 0
        lookups += 0 if c.tie_weights else self.transformer.wte.weight.numel() # a lookup is not a multiplication
        return 6 * (self.n_params() - lookups) + 12 * c.n_layer * c.n_embd * c.block_size

    def estimate_mfu(self, tokens_per_second, peak_flops):
        """ model flops utilization: the share of the hardware's peak (FLOP/s) that the step's necessary arithmetic makes up """
        return self.flops_per_token() * tokens_per_second / peak_flops

class Denoiser(GPT):
    """
    denoise: a provider corrupted idx and kept in targets what stood there; fill in. Also what all masked diffusion shares: one or
    two streams of attention, and generation by iterative unmasking.
    """
    loss_name, bound_name = 'ce', None # whatever the provider's corruption is, its cross-entropy bounds no likelihood
    attentions = ('full', 'causal', 'block', 'hierarchical')
    favourite_order = 'random'
    # a bound uses all of (0, 1] and no weights of the loss, so levels and weights are the loss's alone
    rests_on = {
        'loss_name': ('forward', 'corrupt', 'groups', 'scored', 'ce', 'sample_t', 'nelbo', 'rows', 'enough_rows'),
        'nll_bound': ('forward', 'corrupt', 'groups', 'scored', 'ce', 'denoise'),
        'nll_order': ('forward', 'corrupt', 'groups', 'scored', 'denoise'),
        'generate': ('forward', 'corrupt', 'groups', 'scored'),
        'metrics': ('forward', 'corrupt', 'groups', 'scored', 'denoise'),
        'views': ('forward',),
    }

    def __init__(self, config):
        super().__init__(config)
        c, name = self.config, type(self).__name__
        check(c.mask_id is not None, f"{name} needs mask_id, the id that a hidden token reads as")
        check(0 <= c.t_min < c.t_max <= 1, f"t_min {c.t_min} and t_max {c.t_max} must be in order within [0, 1]")
        check(c.attn_backend != 'flex' or c.dropout == 0, "FlexAttention has no dropout on attention weights: set dropout=0 or attn_backend=sdpa")
        check(c.ar_weight >= 0, f"ar_weight is {c.ar_weight}, expected 0 (off) or more")
        check(c.ar_weight == 0 or type(self).forward is not Denoiser.forward,
              f"{name} has no next-token loss: leave ar_weight out")
        check(self.two_streams or not c.clean_causal, f"clean_causal is about the clean stream of bd3lm, and {name} has none: leave it out")
        check(c.clean_causal or c.ar_weight == 0 or not self.two_streams,
              "ar_weight needs clean_causal=True: else a clean token sees the next one")
        cut = c.diffusion_block_size if c.attention == 'block' or self.two_streams else None
        self.register_buffer('ids', block_ids(c.attention, c.block_size, cut, c.lengths), persistent=False)
        self.id_list = self.ids.tolist() # for decisions that must not wait for a device
        self._masks = {} # built once per length and device
        self.met_corruption = False # of a provider
    two_streams = False # trained on a noisy and a clean copy of the text at once

    @property
    def question(self):
        """ the id of the question, where all later segments are causal within their blocks """
        return self.lead if self.config.causal_within_block else None

    @property
    def row_length(self):
        return self.config.block_size

    @property
    def blockwise(self):
        """ is a block denoised when those before it are clean (else the row as a whole is)? It is what generation does """
        return self.two_streams or self.config.attention == 'hierarchical'

    @property
    def lead(self):
        """ clean rows before the text: the begin id, where there is a clean stream for it to begin """
        return int(self.two_streams and self.config.begin_id is not None)

    def mask(self, block, noisy=None, rows=None, cols=None):
        """ the attention rule as the backend wants it """
        return (flex_mask if self.flex(block.device) else dense_mask)(block, noisy, self.config.clean_causal, rows, cols, self.question)

    def flex(self, device):
        return self.config.attn_backend == 'flex' or self.config.attn_backend == 'auto' and device.type == 'cuda' and self.config.dropout == 0

    def kept(self, key, make):
        """ masks of whole batches are built once per length and device """
        if key not in self._masks:
            self._masks[key] = make()
        return self._masks[key]

    def check_blocks(self, block_ids, B, T, own=False):
        """
        a sentence for block ids (T,) or (B, T) from outside that would be computed as something else. They must not
        fall along a row, but after pads, which have the largest id of the row, larger than any of the config.
        own: they must be the config's, but for pads.
        Where a step trains on a GPU only their shape is looked at, because values have to be waited for: train.py looks
        at a first batch of every run, and every evaluation at its own. On a CPU a step looks at all of them, which is
        0.05 % of its time (200 tokens, 0.8M parameters).
        """
        check_shape(block_ids, B, T)
        if torch.compiler.is_compiling() or self.training and block_ids.device.type != 'cpu':
            return
        last, most = self.id_list[T - 1], self.most_blocks(T) - 1
        if own:
            check(((block_ids == self.ids[:T]) | (block_ids > last)).all(),
                  f"block_ids are not those of segments={self.config.segments!r}, which a hierarchy's must be, "
                  f"but for pads, with an id of {last + 1} or more")
        low, high = block_ids.aminmax()
        check(low >= 0 and high <= most, f"block_ids are {low} to {high}, expected 0 to {most}")
        pads = (block_ids == block_ids.amax(-1, keepdim=True)) & (block_ids > last)
        before = block_ids.masked_fill(pads, -1).cummax(-1).values # the largest so far
        check((pads | (block_ids >= before)).all(),
              "block_ids fall along a row: no block may be followed by one with a smaller id, except that pads, "
              f"with the largest id of the row, {last + 1} or more, may stand anywhere")

    def most_blocks(self, T):
        """ how many a row of T tokens may have whose ids come from outside: one per token, or the config's and pads """
        return max(T, self.id_list[T - 1] + 2)

    def one_stream(self, xt, block_ids=None, only=None):
        """ xt (B, T), hidden or not, sees itself through the attention pattern -> (B, T, C), or of `only` (R,), flat indices, (R, C) """
        T, pos = xt.size(1), torch.arange(xt.size(1), device=xt.device)
        check_length(T, self.config.block_size)
        if block_ids is not None and only is not None and self.config.attention == 'hierarchical':
            self.check_blocks(block_ids, *xt.shape, own=True)
        elif block_ids is not None: # any others are a mask like any other
            check_shape(block_ids, *xt.shape)
        if block_ids is not None:
            mask = self.mask(block_ids)
        elif self.id_list[T - 1] == 0:
            mask = 'full'
        else:
            mask = 'causal' if self.config.attention == 'causal' else self.kept((T, xt.device), lambda: self.mask(self.ids[:T]))
        return self.trunk(self.embed(xt, pos), pos, mask, only=only)

    def two_stream(self, xt, x0, block_ids=None, clean_too=False, only=None):
        """
        Every block of xt (B, T) sees itself and the clean blocks before it -> (B, T, C), one pass for all blocks; only as in one_stream.
        clean_too: the states of the clean rows follow, those of begin, x0[:, :-1]. block_ids of a hierarchy are the config's, but for pads.
        """
        T, lead = xt.size(1), self.lead
        check_length(T, self.config.block_size)
        ids = self.ids[:T] if block_ids is None else block_ids
        # of the config's blocks nobody looks at the clean copy of the last one, of others somebody may
        hierarchy = block_ids is not None and only is not None and self.config.attention == 'hierarchical' # its blocks, but for pads
        if block_ids is not None:
            self.check_blocks(block_ids, *xt.shape, own=hierarchy)
        own = block_ids is None or hierarchy
        n = T - 1 if clean_too else self.id_list.index(self.id_list[T - 1]) if own else T
        q = self.config.lengths[0] if hierarchy and not clean_too else 0 # nor is the noisy copy of a question ever asked for
        clean = F.pad(x0[:, :n], (lead, 0), value=self.config.begin_id or 0)
        if clean.size(1) == 0: # one block spans the sequence
            return self.one_stream(xt, block_ids, only)
        mask = self.two_stream_mask(ids, T, n, q, own=hierarchy) if block_ids is not None else \
            self.kept((T, n, xt.device), lambda: self.two_stream_mask(ids, T, n))
        # a noisy token stands where its clean copy stands
        pos = torch.cat((torch.arange(q, T, device=xt.device) + lead, torch.arange(n + lead, device=xt.device)))
        x = torch.cat((xt[:, q:], clean), dim=1)
        only = (only // T * (T - q) + only % T - q).clamp(min=0) if q else only # flat in what is left; of a question, anything
        return self.trunk(self.embed(x, pos), pos, mask, rows=None if clean_too else T - q, only=only)

    def two_stream_mask(self, ids, T, n, q=0, own=True):
        """
        The rule for T noisy rows, without the first q, then begin and n clean ones, in parts that compute less than half of the dense matrix: clean rows look
        at clean ones only, and a run of some 128 rows needs no later ones. FlexAttention finds what to skip by itself.
        own: ids are the config's, but for pads, which nobody sees; others stay in one part.
        """
        lead, T = self.lead, T - q
        row = torch.arange(T + n + lead, device=ids.device)
        block = torch.cat((ids[..., q:] + lead, F.pad(ids[..., :n] + lead, (lead, 0))), dim=-1)
        listed = self.id_list if own and not self.flex(ids.device) else None # None: in one run
        noisy, clean = [], [(n + lead, n + lead, 'causal')] if self.config.clean_causal else []
        for s, e in whole_blocks(listed[q:q + T], 128) if listed else [(0, T)]:
            past = lead + (min(n, listed.index(listed[q + e - 1])) if listed else n)
            noisy.append((e - s, past, self.mask(block, row < T, row[s:e], torch.cat((row[s:e], row[T:T + past])))))
        for s, e in (whole_blocks([0] * lead + [i + lead for i in listed[:n]], 128) if listed else [(0, n + lead)]) if not clean else []:
            clean.append((e - s, e, self.mask(block, row < T, row[T + s:T + e], row[T:T + e])))
        return noisy, clean

    def ce(self, x, targets, rows):
        """ states x (R, C) of the rows (R,), flat indices into targets (B, T) -> their logits (R, V) and cross-entropies (R,) """
        logits = self.logits(x)
        return logits, F.cross_entropy(logits, targets.flatten()[rows].clamp(min=0), reduction='none')

    def check_corrupted(self, idx, targets):
        """
        a sentence where nothing that is scored is corrupted: the loss would only teach to copy. It is looked for until
        a first batch has something: a provider that corrupts little may by chance leave a small batch as it is, and no
        later batch has to wait for the device.
        """
        if not self.met_corruption:
            scored = targets != -1
            self.met_corruption = bool((scored & (idx != targets)).any())
            check(self.met_corruption or not scored.any(),
                  "nothing is hidden: denoise fills in what the Provider in provider.py of a dataset corrupted, "
                  "and in these rows every scored token stands in idx as it is in targets")

    def forward(self, idx, targets=None, block_ids=None):
        # corrupt: the provider did
        if targets is None:
            return self.logits(self.one_stream(idx, block_ids)), None
        self.check_corrupted(idx, targets)
        # attend
        rows = (targets.flatten() != -1).nonzero()[:, 0]
        x = self.one_stream(idx, block_ids, rows)
        # loss
        logits, ce = self.ce(x, targets, rows)
        return logits, ce.sum() / max(1, len(ce))

    def nll_bound(self, idx, targets, n_samples=1, block_ids=None):
        raise NotImplementedError("denoise has no likelihood bound: how a provider corrupts is no process that generates text; train mdlm or bd3lm")

    @torch.no_grad()
    def metrics(self, idx, targets, block_ids=None):
        """ {'accuracy': of the tokens that the provider asks for}; {} where it asks for none """
        logits, _ = self(idx, None, block_ids)
        return mean_over('accuracy', logits.argmax(-1) == targets, targets != -1)

    # ---- writing

    def windows(self, unknown):
        """
        Which windows of the text to fill in which order, and which blocks in each, counted from the window's start:
        [(start, end, [(block start, block end), ...]), ...]. unknown: a list of bools, what to fill.
        A text that outgrows the context goes on in a new window, which begins with the newer half of the last one.
        """
        room, N = self.config.block_size, len(unknown)
        check(self.config.attention != 'hierarchical' or N <= room,
              f"a hierarchy has {room} tokens, no room for prompt and new tokens together: {N}")
        n = self.id_list.index(1) if 1 in self.id_list else 1 # the first block's length
        kept = min(max(1, room // 2 // n) * n, room - 1) # whole blocks, so that new text begins with a block
        windows, end = [], 0
        while (first := next((i for i in range(end, N) if unknown[i]), None)) is not None:
            start, filled = 0 if first < room else first - kept, end
            end = min(start + room, N)
            T = end - start
            ids = self.id_list[:T] if self.blockwise else [0] * T
            edges = [i for i in range(T + 1) if i in (0, T) or ids[i] != ids[i - 1]]
            blocks = [(s, e) for s, e in zip(edges, edges[1:]) if any(unknown[max(filled, start + s):start + e])]
            windows.append((start, end, blocks))
        return windows

    def plan(self, unknown, steps, sampler):
        """
        The windows for unknown (N,) or (B, N), and how many steps each block takes:
        [(start, end, [(block start, block end, steps), ...]), ...]. The steps of a row are split evenly over the blocks
        that this row has to fill: () or (B,), 0 for a row that waits. None for a sampler that has no steps.
        """
        unknown = unknown.cpu()
        windows = self.windows((unknown if unknown.dim() == 1 else unknown.any(0)).tolist())
        counts, filled = [], 0
        for start, end, blocks in windows:
            counts += [unknown[..., max(filled, start + s):start + e].sum(-1) for s, e in blocks] # a step per token
            filled = end
        if 'steps' not in SAMPLERS[sampler]:
            counts = [None] * len(counts)
        elif steps is not None and counts:
            own = torch.stack(counts) > 0 # (blocks,) or (blocks, B)
            i, blocks = own.cumsum(0), own.sum(0).clamp(min=1)
            most = int(blocks.max())
            check(steps >= most, f"{steps} steps are fewer than the {most} blocks to fill: each needs at least one")
            counts = (own * (steps * i // blocks - steps * (i - 1) // blocks)).unbind()
        share = iter(counts)
        return [(start, end, [(s, e, next(share)) for s, e in blocks]) for start, end, blocks in windows]

    def pads(self, out, block_ids, stop):
        """
        Which tokens of out (B, N) nobody may look at, (B, N) bool: those whose block_ids (B, N) are larger than any of
        the config's. After a stop, end() adds more. None: there will be none.
        """
        N, room = out.size(1), self.config.block_size
        if block_ids is None:
            return torch.zeros_like(out, dtype=torch.bool) if self.config.lengths and stop is not None else None
        check(block_ids.shape == out.shape and N <= room,
              f"block_ids have the shape {tuple(block_ids.shape)}, expected {tuple(out.shape)}, prompt and new tokens, "
              f"and at most {room} columns, as a text that outgrows the context has none")
        pads = block_ids > self.id_list[-1]
        check((pads | (block_ids == self.ids[:N])).all(),
              "block_ids are not the config's: only those of pads may differ, and must be larger")
        return pads

    def shown(self, out, unknown, guidance):
        """
        What the network reads where out (B, n) stands: begin id first, [MASK] for -1 -> (B, lead + n). With guidance
        (2B, lead + n): in the second half, what is given is hidden as well.
        """
        lead, mask_id = self.lead, self.config.mask_id
        text = F.pad(out.masked_fill(out == -1, mask_id), (lead, 0), value=self.config.begin_id or 0)
        return torch.cat((text, text.masked_fill(F.pad(~unknown, (lead, 0)), mask_id))) if guidance else text

    def seen(self, n, pads, halves):
        """ block ids of begin id and n columns, (lead + n,); where there may be pads (B, n), (halves * B, lead + n) """
        ids = F.pad(self.ids[:n] + self.lead, (self.lead, 0))
        if pads is None:
            return ids
        pads = F.pad(pads, (self.lead, 0)).repeat(halves, 1)
        return ids.expand_as(pads).masked_fill(pads, self.id_list[-1] + self.lead + 1) # the largest, so nobody's past

    def end(self, out, unknown, pads, stop, e):
        """ after a block that ends at column e: fill up with stops, in place, what has stopped -> is all written? """
        lengths = self.config.lengths
        edges = [0, *itertools.accumulate(lengths[:-1]), max(sum(lengths), out.size(1))] # the last segment goes on
        for a, z in zip(edges, edges[1:]):
            beyond = end_rows(out[:, a:z], unknown[:, a:z], stop) & unknown[:, a:z]
            if pads is not None: # what is left of the block stays visible, as in training
                pads[:, max(a, e):z] |= beyond[:, max(0, e - a):]
        return (out != -1).all()

    @torch.no_grad()
    def generate(self, idx, max_new_tokens, *, steps=None, sampler='first_hitting', order=None, schedule='linear',
                 confidence_threshold=None, entropy_budget=None, temperature=1.0, top_k=None, top_p=None, remask=0.0,
                 guidance=0.0, stop=None, on_step=None, block_ids=None):
        """
        Fill in every -1 of idx (B, T), anywhere, and max_new_tokens more: (B, T + max_new_tokens). Given tokens stay.
        Block by block, each given the finished blocks before it, whose keys and values are cached, exactly.
        sampler: how many tokens of each row a network call reveals, and by which of these options, see SAMPLERS.
        order: which tokens come first, random | confidence | entropy | margin | left_to_right, see ORDERS. None is what
          measured best: random for fixed, as the surest tokens of one moment are neighbours that clash, else the
          class's favourite_order.
        steps: all reverse steps of a row, split evenly over the blocks that it has to fill. None: one per token. A row
          waits while others fill a block, so calls are counted by the slowest row of every block.
        schedule: linear | cosine, few tokens at first and many at the end, when there is more to go by.
        remask: after each step of a block but the last, this share of what the block has written, rounded down, is
          hidden again: the tokens drawn with the least probability (https://arxiv.org/abs/2503.00307).
        guidance: w of logits = u + (1 + w)(c - u), where u are those without what idx gives
          (https://arxiv.org/abs/2207.12598). Such a call counts 2, as each row is read twice.
        stop: a token id. A row that wrote it is filled up with it; with segments, only that segment of the row is, and
          later ones see the block where it stopped and nothing after. The last segment ends with the text.
        block_ids (B, all columns): the config's, but for pads, whose id is larger.
        on_step(step, idx, probs, state): called after every network call with what stands (-1 elsewhere), the
          distributions (R, V) of the tokens just revealed and {'nfe': network evaluations, 'done': leading columns
          settled in every row, for good but for what follows a stop, 'total': columns}.
        A row is written as if alone. Only where the text outgrows the context, rows share their windows, see there.
        """
        check_options(locals())
        check_sampler(sampler, steps=steps, order=order, schedule=schedule, remask=remask,
                      confidence_threshold=confidence_threshold, entropy_budget=entropy_budget)
        out, halves, step = lengthened(idx, max_new_tokens), 1 + (guidance > 0), 0
        unknown, pads = out == -1, self.pads(out, block_ids, stop)
        check(not guidance or (~unknown).any(1).all(), "guidance compares with a text whose prompt is hidden, "
                                                       "and there is a row without a prompt")
        if order is None:
            order = 'random' if sampler in ('fixed', 'ancestral') else self.favourite_order
        bound = next((b for b in (confidence_threshold, entropy_budget) if b is not None), BOUNDS.get(sampler))
        how = dict(sampler=sampler, order=order, bound=bound, temperature=temperature, top_k=top_k, top_p=top_p,
                   remask=remask, guidance=guidance)
        with torch.inference_mode(): # small tensors: what autograd would note down costs more than the arithmetic
            for start, end, blocks in self.plan(unknown, steps, sampler):
                cache = Cache(self, halves * len(out), self.lead + end - start) if self.blockwise else None
                for s, e, counts in [(start + s, start + e, counts) for s, e, counts in blocks]:
                    text = self.shown(out[:, start:e], unknown[:, start:e], guidance)
                    ids = self.seen(e - start, None if pads is None else pads[:, start:e], halves)
                    calls = [(1.0, 0.0)] * (e - s) if counts is None else row_steps(counts, schedule)
                    for probs, final in self.fill(out[:, s:e], text, ids, cache, calls, **how):
                        step += 1
                        if on_step is not None:
                            done = settled(out) if final else min(s, settled(out))
                            on_step(step, out, probs, {'nfe': step * halves, 'done': done, 'total': out.size(1)})
                    if stop is not None and self.end(out, unknown, pads, stop, e):
                        return out
        return out

    def fill(self, block, text, ids, cache, calls, *, sampler, order, bound, temperature, top_k, top_p, remask,
             guidance):
        """
        Write what is hidden (-1) of a block (B, n), in place. The block is the end of text, which shown() made; ids are
        the text's blocks. calls: t and s of every step. Yields after each network call the distributions (R, V) of the
        tokens that it revealed, and whether all that stands will stay.
        """
        s, own = text.size(1) - block.size(1), block == -1
        page = text.unflatten(0, (-1, len(block)))[..., s:] # a view, to write on
        drawn = torch.zeros(own.shape, device=own.device) # the probability of what is written
        looks = order not in ('random', 'left_to_right') or sampler in ACCEPTS # do distributions say what comes first?
        for t, rest in calls:
            hidden = block == -1
            k = QUOTAS[sampler](hidden, own.sum(1), t, rest) if sampler in QUOTAS else hidden.any(1)
            if not k.any():
                continue
            rows = hidden
            if not looks:
                key = torch.rand(own.shape, device=own.device) if order == 'random' else torch.zeros_like(drawn)
                rows = leading(key, hidden, k)
            b, i = rows.nonzero(as_tuple=True) # (R,) rows and positions within the block
            logits = self.look(text, s, ids, cache, b, i, guidance)
            if looks:
                chosen = choose(sampler, order, bound, hidden, k, logits)[b, i]
                b, i, logits = b[chosen], i[chosen], logits[chosen]
            probs = token_probs(logits, temperature, top_k, top_p) # (R, V)
            block[b, i] = page[:, b, i] = token = draw(probs)
            if remask: # of rows that took this step and have another one
                drawn[b, i] = token_probs(logits).gather(1, token[:, None])[:, 0]
                written, goes_on = own & (block != -1), (k > 0) & (rest > 0).to(k.device)
                again = leading(-drawn, written, (remask * written.sum(1) + 1e-4).long() * goes_on)
                block.masked_fill_(again, -1)
                page.masked_fill_(again, self.config.mask_id)
            yield probs, not remask or not (rest > 0).any()

    def look(self, text, s, ids, cache, b, i, guidance):
        """ logits (R, V) of rows b (R,) at positions i (R,) of the block that begins at s and ends the text """
        halves, first, e = 1 + (guidance > 0), 0 if cache is None else cache.length, text.size(1)
        at = b * (e - first) + s - first + i # flat, of what is read
        only = torch.cat((at, at + len(text) // 2 * (e - first))) if guidance else at
        x = self.read(text[:, first:], first, s, ids, cache, only).unflatten(0, (halves, len(b))) # (halves, R, C)
        if not guidance:
            return self.logits(x[0])
        with torch.autocast(text.device.type, enabled=False): # what guidance overstates may overflow float16
            x = x.to(self.lm_head.weight.dtype)
            return self.logits(x[1] + (1 + guidance) * (x[0] - x[1])) # logits are linear in x

    def read(self, text, first, s, ids, cache, only):
        """
        One pass over the rows from `first` on -> the states of `only` (R,), flat indices. Rows before s are settled and not yet in the
        cache, which keeps them from now on; the others are the block being written.
        """
        if cache is None: # the row is denoised as a whole
            return self.one_stream(text, ids if ids.dim() > 1 else None, only)
        row = torch.arange(ids.size(-1), device=text.device)
        mask = 'full' if first == s and ids.dim() == 1 and self.question is None else \
            dense_mask(ids, row >= s, self.config.clean_causal, row[first:], None, self.question) # a new shape each time
        x = self.trunk(self.embed(text, row[first:]), row[first:], mask, cache, only=only)
        cache.keep(s - first)
        return x

def bell(u):
    """
    u (n,), uniform on (0, 1] -> t (n,) in (0, 1], distributed as Beta(2, 2): the inverse of 3 t^2 - 2 t^3.
    Near 0 a product of positive terms, where the textbook's 1/2 - sin(asin(1 - 2u) / 3) cancels to 0; near 1 by
    symmetry.
    """
    exact = u if u.device.type == 'mps' else u.double() # MPS has no float64; elsewhere t never falls where u grows
    near = torch.minimum(exact, 1 - exact)
    angle = near.sqrt().asin() / 3
    t = 2 * angle.sin() * (angle + math.pi / 3).sin()
    return torch.where(exact < 0.5, t, 1 - t).to(u.dtype)

class MDLM(Denoiser):
    """
    mdlm: masked diffusion (https://arxiv.org/abs/2406.07524, https://arxiv.org/abs/2502.09992). A token is hidden with probability t;
    t is drawn per row, or per segment of a hierarchy.
    """
    bound_name = 'nelbo'
    generate = Denoiser.generate # [MASK] is what hides tokens in training too
    favourite_order = 'margin' # of samples of tiny shakespeare, an ar model's nll is 2.58 nats/char in this order, 2.62 to 2.89 in the others

    @property
    def loss_name(self):
        """ the loss is the bound, in expectation, unless levels are drawn otherwise or another loss is added """
        c = self.config
        return 'nelbo' if (c.t_min, c.t_max, c.t_dist, c.single_ratio_per_sequence, c.ar_weight) == (0, 1, 'uniform', True, 0) and self.two_streams == self.blockwise else 'ce'

    def groups(self, idx, block_ids=None):
        """ (B, T) int, which tokens share a noise level; and how many groups there may be """
        if not self.blockwise:
            return torch.zeros_like(idx), 1
        T = idx.size(1)
        if block_ids is None:
            return self.ids[:T].expand_as(idx), self.id_list[T - 1] + 1
        self.check_blocks(block_ids, *idx.shape)
        return block_ids.expand_as(idx), self.most_blocks(T)

    def scored(self, targets, groups):
        """ the tokens that count, and so may be hidden; the question of a hierarchy is given, never asked for """
        return (targets != -1) & (groups > 0) if self.config.attention == 'hierarchical' else targets != -1

    def sample_t(self, n, device=None, used=None):
        """
        n noise levels in (0, 1]. Stratified, one in each n-th of the interval, or the loss would mostly show which levels were drawn;
        in random order, or level and position would go together. used (n,) bool: only these matter, so they share the interval.
        """
        t = torch.randperm(n, device=device) if used is None else (torch.rand(n, device=device) + ~used).argsort().argsort()
        t = ((t + (1 - torch.rand(n, device=device))) / (n if used is None else used.sum().clamp(min=1))).clamp(max=1) # never 0, however many
        t = bell(t) if self.config.t_dist == 'bell' else t
        return self.config.t_min + (self.config.t_max - self.config.t_min) * t

    def corrupt(self, idx, targets, block_ids=None):
        """ xt, masked and the noise levels t, all (B, T) """
        groups, G = self.groups(idx, block_ids)
        if not self.config.single_ratio_per_sequence:
            t = self.sample_t(idx.numel(), idx.device).view(idx.shape)
        elif self.two_streams and self.config.diffusion_block_size == 1: # one token of a block: hidden or there is nothing to learn
            t = torch.ones(idx.shape, device=idx.device)
        else:
            used = None if block_ids is None else groups.new_zeros(len(idx), G).scatter_reduce(1, groups, self.scored(targets, groups).long(), 'amax').flatten() > 0
            t = self.sample_t(len(idx) * G, idx.device, used).view(-1, G).gather(1, groups)
        masked = (torch.rand(idx.shape, device=idx.device) < t) & self.scored(targets, groups)
        return idx.masked_fill(masked, self.config.mask_id), masked, t

    def rows(self, masked, block_ids=None):
        """ what the loss is about: (R,) flat indices of masked (B, T), the hidden tokens and, to a fixed number, some others """
        return masked.flatten().int().argsort(descending=True, stable=True)[:self.enough_rows(*masked.shape, block_ids)]

    def nelbo(self, x, rows, targets, masked, t, block_ids=None):
        """ states x (R, C) of the rows (R,) -> their logits and the loss: nats per scored token """
        groups, _ = self.groups(targets, block_ids)
        logits, ce = self.ce(x, targets, rows)
        # 1/t: a token is hidden with probability t, so this undoes how rarely we ask about it
        weight = 1 / t if self.config.single_ratio_per_sequence else torch.full_like(t, 2 / (self.config.t_min + self.config.t_max))
        weight = weight.masked_fill(~masked, 0) # not times masked: 1/t may be infinite where nothing is hidden
        return logits, (ce * weight.flatten()[rows]).sum() / self.scored(targets, groups).sum().clamp(min=1)

    def enough_rows(self, B, T, block_ids=None):
        """ a fixed number of rows, so that nothing waits for the device, that holds all masked ones but once in 10^9 steps """
        c, G = self.config, B * (self.id_list[T - 1] + 1 if self.blockwise else 1)
        equal = not self.blockwise or len(set(Counter(self.id_list[:T]).values())) == 1
        if block_ids is not None and c.attention == 'hierarchical':
            return B * (T - c.lengths[0])
        if block_ids is not None or self.two_streams and c.diffusion_block_size == 1:
            return B * T
        # a level per token averages out; stratified levels of equal groups hardly vary; those of unequal ones count as if drawn freely
        variance = 0 if not c.single_ratio_per_sequence else 1 / (12 * G ** 3) if equal else 1 / G
        return min(B * T, math.ceil(B * T * ((c.t_min + c.t_max) / 2 + 6 * math.sqrt(variance + 0.25 / (B * T)))))

    def forward(self, idx, targets=None, block_ids=None):
        if targets is None:
            return self.logits(self.one_stream(idx, block_ids)), None
        ar_loss = 0
        if self.config.ar_weight > 0: # half of the rows teach the same weights to read on: a step costs what it did
            half = len(idx) // 2
            check(half, "ar_weight needs batch_size of at least 2: mdlm takes half of the rows for the next-token loss")
            ar_loss = self.config.ar_weight * GPT.forward(self, idx[:half], targets[:half])[1]
            idx, targets, block_ids = idx[half:], targets[half:], block_ids if block_ids is None else block_ids[half:]
        # corrupt
        xt, masked, t = self.corrupt(idx, targets, block_ids)
        # attend
        rows = self.rows(masked, block_ids)
        x = self.one_stream(xt, block_ids, rows)
        # loss
        logits, loss = self.nelbo(x, rows, targets, masked, t, block_ids)
        return logits, loss + ar_loss

    def views(self):
        """ weights that learned to read on are a GPT too """
        return {'ar': as_ar(self)} if self.config.clean_causal or self.config.ar_weight else {}

    def denoise(self, xt, x0, block_ids=None, only=None):
        """ states as generation has them: with clean blocks before each noisy one, where it writes block by block """
        return self.two_stream(xt, x0, block_ids, only=only) if self.blockwise else self.one_stream(xt, block_ids, only)

    @torch.no_grad()
    def nll_bound(self, idx, targets, n_samples=1, block_ids=None):
        """
        An upper bound on -log p of the scored tokens in nats: (B, n_samples) unbiased estimates, and how many tokens, (B,). Of each
        group of n tokens k are hidden, k uniform on 1..n (stratified over samples), and their cross-entropy counts n/k: the exact
        discrete form of the integral over t (https://arxiv.org/abs/2502.09992). Exact if groups have one token.
        """
        groups, G = self.groups(idx, block_ids)
        scored = self.scored(targets, groups)
        n = torch.zeros(len(idx), G, dtype=torch.long, device=idx.device).scatter_add(1, groups, scored.long()) # (B, G)
        strata = torch.rand(n_samples, *n.shape, device=idx.device).argsort(0)
        nats = []
        for stratum in strata:
            u = (stratum + torch.rand(n.shape, device=idx.device)) / n_samples
            k = torch.minimum((u * n).long() + 1, n)
            masked = random_subset(groups, scored, k)
            rows = masked.flatten().nonzero()[:, 0]
            x = self.denoise(idx.masked_fill(masked, self.config.mask_id), idx, block_ids, rows)
            weight = (n / k.clamp(min=1)).gather(1, groups).flatten()[rows]
            _, ce = self.ce(x, targets, rows)
            nats.append(ce.new_zeros(len(idx)).index_add(0, rows // idx.size(1), ce * weight))
        return torch.stack(nats, dim=1), scored.sum(1)

    @torch.no_grad()
    def nll_order(self, idx, targets, order='confidence', block_ids=None):
        """
        Exact -log p (nats, (B,)) of the text, and its scored tokens, under the model that reveals one token per call in a deterministic order, a
        function of what is revealed so far (https://arxiv.org/abs/2603.01367): left_to_right | confidence | entropy | margin. It is
        another model than nll_bound's, so it may lie on either side of it. Costs as many passes as a block has tokens.
        """
        check(order in ORDERS, f"order is {order!r}, expected one of {', '.join(ORDERS)}")
        (groups, G), at = self.groups(idx, block_ids), torch.arange(idx.size(1), device=idx.device).expand_as(idx)
        scored = hidden = self.scored(targets, groups)
        nats = torch.zeros(len(idx), device=idx.device)
        while hidden.any():
            x = self.denoise(idx.masked_fill(hidden, self.config.mask_id), idx, block_ids)
            log_p = self.logits(x).log_softmax(-1)
            key = ORDERS[order](log_p.exp()).masked_fill(~hidden, -math.inf) # (B, T)
            best = key.new_full((len(idx), G), -math.inf).scatter_reduce(1, groups, key, 'amax')
            tied = hidden & (key == best.gather(1, groups))
            first = at.new_full(best.shape, at.size(1)).scatter_reduce(1, groups, at.masked_fill(~tied, at.size(1)), 'amin')
            reveal = tied & (at == first.gather(1, groups))
            nats = nats - log_p.gather(2, idx[..., None])[..., 0].masked_fill(~reveal, 0).sum(1)
            hidden = hidden & ~reveal
        return nats, scored.sum(1)

    @torch.no_grad()
    def metrics(self, idx, targets, block_ids=None):
        """
        {name: the share of hidden tokens whose likeliest guess is right}, by how much is hidden; no name where nothing
        was, by chance
        """
        groups, _ = self.groups(idx, block_ids)
        found, scored = {}, self.scored(targets, groups)
        for level in 15, 50, 85:
            masked = scored & (torch.rand(idx.shape, device=idx.device) < level / 100)
            logits = self.logits(self.denoise(idx.masked_fill(masked, self.config.mask_id), idx, block_ids))
            found |= mean_over(f'accuracy_{level}_hidden', logits.argmax(-1) == idx, masked)
        return found

class BD3LM(MDLM):
    """
    bd3lm: block diffusion (https://arxiv.org/abs/2503.09573). Blocks are written left to right, the tokens of a block by masked diffusion;
    t is drawn per block. Trained on the noisy and the clean copy of a text at once.
    """
    attentions = ('block', 'hierarchical')
    bound_name = 'nelbo' # its forward hides what mdlm's hides, so all that mdlm says of itself holds here too
    loss_name, generate, metrics, views = MDLM.loss_name, MDLM.generate, MDLM.metrics, MDLM.views
    favourite_order = 'left_to_right' # blocks of 4: 1.56 nats/char, 1.77 to 2.19 in the others
    two_streams = True

    def forward(self, idx, targets=None, block_ids=None):
        if targets is None: # what every block makes of itself and of those before it
            return self.logits(self.two_stream(idx, idx, block_ids)), None
        # corrupt
        xt, masked, t = self.corrupt(idx, targets, block_ids)
        # attend
        dual, T, rows = self.config.ar_weight > 0, idx.size(1), self.rows(masked, block_ids)
        x = self.two_stream(xt, idx, block_ids, clean_too=dual, only=None if dual else rows)
        # loss
        logits, loss = self.nelbo(x[:, :T].flatten(0, 1)[rows] if dual else x, rows, targets, masked, t, block_ids)
        if dual: # the clean rows are a GPT: their next-token loss costs no pass
            _, targets = self.shift(idx, targets)
            loss = loss + self.config.ar_weight * self.next_token_loss(self.logits(x[:, T:]), targets)
        return logits, loss

    def flops_per_token(self):
        """ two streams, less what nobody needs of the clean one: its head and its last layer, and all of it where one block spans the row """
        one, head, dual = super().flops_per_token(), 6 * self.lm_head.weight.numel(), self.config.ar_weight > 0
        if self.id_list[-1] == 0 and not dual and not self.lead:
            return one
        return 2 * one - (0 if dual else head + (one - head) / self.config.n_layer)

class Sinusoidal(nn.Module):
    """ noise levels k (...) -> (..., dim): sines, then cosines, of k times frequencies from 1 down to 1/10000 """
    def __init__(self, dim):
        super().__init__()
        half = dim // 2
        self.register_buffer('freq', (-math.log(10000) / (half - 1) * torch.arange(half)).exp(), persistent=False)

    def forward(self, k):
        angle = k[..., None] * self.freq
        return torch.cat((angle.sin(), angle.cos()), dim=-1)

class DFGPT(GPT):
    """
    df: diffusion forcing (https://arxiv.org/abs/2407.01392), the mathematics of https://github.com/buoyancy99/diffusion-forcing. Every
    token's embedding is noisy at a level of its own; levels fall token by token as a scheduling matrix says. Levels k are
    real ones, 0 to df_timesteps - 1, where the network reads them, and index levels, 0 (clean) to df_sampling_timesteps, where sampling counts.
    What learns to write is pred_token. Given the token, its noise says nothing about the others, so by Bayes' rule
      p(token | z, the noisy ones before) ~ p(token | the noisy ones before) * q(z | token)
    where the second factor is a formula and the first a GPT that reads noisy text. x0 is predicted as the mean of the embeddings under it.
    """
    attentions = ('causal', 'full')
    rests_on = { # loss_name is 'ce' or 'mse', which claims nothing
        'nll_bound': ('forward', 'corrupt', 'q_sample', 'df_noise', 'likelihood', 'df_target', 'df_posterior'),
        'generate': ('forward', 'corrupt', 'q_sample', 'df_noise', 'likelihood', 'df_target'),
        'metrics': ('forward', 'corrupt', 'q_sample', 'df_noise', 'likelihood', 'df_target'),
        'views': ('forward', 'corrupt', 'q_sample', 'df_noise', 'likelihood', 'df_target', 'df_posterior'),
    }

    def __init__(self, config):
        super().__init__(config)
        self.check()
        c = self.config
        del self.lm_head # predictions are embeddings, or compared with them
        if not self.tokens:
            add = c.df_level_embed == 'add'
            self.df_t_embed = Sinusoidal(c.n_embd if add else c.n_embd // 2)
            self.df_mix = None if add else nn.Sequential(nn.Linear(c.n_embd * 3 // 2, c.n_embd), nn.ReLU(), nn.Linear(c.n_embd, c.n_embd)).apply(self._init_weights)
            self.register_buffer('df_error', torch.ones(c.df_timesteps)) # of x0 at each level, squared, a running mean of training
        self.df_head = nn.Linear(c.n_embd, c.n_embd, bias=c.bias).apply(self._init_weights)
        nn.init.zeros_(self.df_head.weight)
        for name, values in df_schedule(c.df_beta_schedule, c.df_timesteps, c.df_snr_clip).items():
            self.register_buffer(f'df_{name}', values, persistent=False)

    def check(self):
        c, T, S = self.config, self.config.df_timesteps, self.config.df_sampling_timesteps
        for name, fits, expected in [
            ('n_embd', self.tokens or c.n_embd % 4 == 0 and c.n_embd >= 8, "a multiple of 4 from 8 on: half of it holds sines and cosines of the noise level"),
            ('df_timesteps', T >= 1, "at least 1"),
            ('df_sampling_timesteps', 1 <= S <= T, f"1 to df_timesteps, {T}"),
            ('df_snr_clip', 0 < c.df_snr_clip < math.inf, "a finite number above 0"),
            ('df_cum_snr_decay', 0 <= c.df_cum_snr_decay < 1, "0 or more and below 1"),
            ('df_clip_noise', c.df_clip_noise > 0, "a number above 0 (inf: no clamp)"),
            ('df_ddim_eta', 0 <= c.df_ddim_eta <= 1, "0 to 1: a step cannot add more noise than it takes away"),
            ('df_stabilization_level', 1 <= c.df_stabilization_level <= T,
             f"1 to df_timesteps, {T}: finished tokens are read at real level df_stabilization_level - 1, and of 0 that would be the last, pure noise"),
            ('df_uncertainty_scale', 0 <= c.df_uncertainty_scale <= S, f"0 to df_sampling_timesteps, {S}: from there on no two tokens are denoised together"),
            ('df_chunk_size', c.df_chunk_size in (None, *range(c.block_size + 1)), f"0 to block_size, {c.block_size}, or None"),
            ('df_x0_wpe', not c.df_x0_wpe or c.pos == 'learned', f"False with pos={c.pos!r}: only learned positions can be added to embeddings"),
            ('df_x0_wpe', not c.df_x0_wpe or not self.tokens, "False with pred_token: a token's noise must not depend on where it stands"),
            ('df_embed_norm', 0 < c.df_embed_norm < math.inf, "a finite length above 0"),
            ('df_clean_share', 0 <= c.df_clean_share <= 1, "a share, 0 to 1"),
            ('df_sampler', c.df_sampler != 'mixture' or self.tokens, f"ddpm or ddim with {c.df_objective}: only pred_token has a distribution over tokens to mix by"),
            ('df_sampler', c.df_sampler != 'ddpm' or S == T, f"ddim or auto where sampling leaves levels out: df_sampling_timesteps is {S}, df_timesteps {T}"),
        ]:
            check(fits, f"{name} is {getattr(c, name)}, expected {expected}")

    def taken_from(self, weights):
        """ also of another objective: its trunk begins this model, its head has no use here, and what only df has stays as it is """
        own = {k: v for k, v in self.state_dict().items() if k.startswith('df_')}
        return own | {k: v for k, v in weights.items() if k != 'lm_head.weight'}

    def load_state_dict(self, state_dict, *args, **kwargs):
        return super().load_state_dict(self.taken_from(state_dict), *args, **kwargs)

    @property
    def row_length(self):
        return self.config.block_size

    @property
    def tokens(self):
        """ does the network predict tokens (else embeddings or noise)? """
        return self.config.df_objective == 'pred_token'

    @property
    def loss_name(self):
        return 'ce' if self.tokens else 'mse' # a weighted error between embeddings

    # ---- the pieces

    def embeddings(self):
        """ what noise is added to, (vocab_size, C). Of one length in pred_token: else it would pay to outgrow the noise """
        E = self.transformer.wte.weight
        return F.normalize(E, dim=-1) * self.config.df_embed_norm if self.tokens else E

    def df_wpe(self, n):
        """ what x0 has of positions 0 to n - 1: (n, C), or zeros (n, 1) """
        check_length(n, self.config.block_size)
        return self.transformer.wpe.weight[:n] if self.config.df_x0_wpe else self.df_betas.new_zeros(n, 1)

    def df_noise(self, shape, noise=None):
        """ noise, ours or the raw draws of noise(shape), clamped but in pred_token, whose probabilities are those of a normal distribution """
        raw = torch.randn(shape, device=self.df_betas.device, dtype=self.df_betas.dtype) if noise is None else noise(shape)
        return raw if self.tokens else raw.clamp(-self.config.df_clip_noise, self.config.df_clip_noise)

    def df_at(self, name, k):
        """ a constant of the schedule at real levels k (B, T) -> (B, T, 1) """
        return getattr(self, f'df_{name}')[k][..., None]

    def df_signal(self, k):
        """ the share of variance that is x0's at real levels k (B, T), 1 at -1: (B, T, 1) """
        return self.df_at('alphas_cumprod', k.clamp(min=0)).masked_fill(k[..., None] < 0, 1)

    def q_sample(self, x0, k, noise):
        """ x0 and noise (B, T, C) -> x0 at real levels k (B, T) """
        return self.df_at('sqrt_alphas_cumprod', k) * x0 + self.df_at('sqrt_one_minus_alphas_cumprod', k) * noise

    def likelihood(self, x, k):
        """ log q(x | token) at real levels k (B, T), up to what all tokens share: (B, T, V) """
        return self.logits(x / self.df_at('sqrt_alphas_cumprod', k), self.df_at('snr', k))

    def df_context(self, x, k):
        """
        log p(token | the noisy ones before it), (B, T, V), of x (B, T, C) at real levels k (B, T). A GPT that reads, for each token, the mean of
        wte under its likelihood: a clean token as ar reads it, pure noise as the mean of all. With full attention it sees them all.
        """
        T, wte = x.size(1), self.transformer.wte.weight
        h, pos = self.likelihood(x, k).softmax(-1) @ wte, torch.arange(T, device=x.device)
        if self.config.attention == 'causal': # row i reads token i - 1
            begin = wte[self.config.begin_id] if self.config.begin_id is not None else wte.new_zeros(wte.size(1))
            h = torch.cat((begin.expand(len(h), 1, -1), h[:, :-1]), dim=1)
        return F.linear(self.df_head(self.trunk(self.enter(h, pos), pos, self.config.attention)), self.embeddings(), self.unseen)

    def df_network(self, x, k, past=None):
        """
        x (B, T, C) at real levels k (B, T), at positions 0 to T - 1 -> what df_objective names: log-probabilities of tokens, up to a constant,
        (B, T, V), or (B, T, C). past, (x, k): another copy of the text, which is what each token sees of those before it.
        """
        if self.tokens:
            return self.df_context(*(past or (x, k))) + self.likelihood(x, k)
        if past: # two streams: the copies side by side
            x, k = (torch.cat(both, dim=1) for both in zip((x, k), past))
        c, pos, level = self.config, torch.arange(x.size(1), device=x.device), self.df_t_embed(k)
        T = len(pos) // 2 if past else len(pos)
        h, ids = x + level if self.df_mix is None else self.df_mix(torch.cat((x, level), dim=-1)), pos % T
        if c.pos == 'learned' and not c.df_x0_wpe:
            h = h + self.transformer.wpe(ids)
        return self.df_head(self.trunk(drop(h, self), ids, dense_mask(ids, pos < T) if past else c.attention)[:, :T]).to(x.dtype)

    def df_target(self, x0, k, noise):
        """ what the network should have predicted, (B, T, C) """
        v = self.df_at('sqrt_alphas_cumprod', k) * noise - self.df_at('sqrt_one_minus_alphas_cumprod', k) * x0
        return {'pred_noise': noise, 'pred_x0': x0, 'pred_v': v}[self.config.df_objective]

    def _df_model_predictions(self, x, k, net=None):
        """ x (B, T, C) at real levels k (B, T) -> noise, x0 and what the network said, all (B, T, C) """
        out = (net or self.df_network)(x, k)
        recip, recipm1 = self.df_at('sqrt_recip_alphas_cumprod', k), self.df_at('sqrt_recipm1_alphas_cumprod', k)
        x0 = {'pred_noise': lambda: recip * x - recipm1 * out.clamp(-self.config.df_clip_noise, self.config.df_clip_noise),
              'pred_x0': lambda: out,
              'pred_v': lambda: self.df_at('sqrt_alphas_cumprod', k) * x - self.df_at('sqrt_one_minus_alphas_cumprod', k) * out,
              'pred_token': lambda: out.softmax(-1) @ self.embeddings(),
              }[self.config.df_objective]()
        return (recip * x - x0) / recipm1, x0, out

    def _compute_loss_weight(self, k):
        c = self.config
        return df_loss_weight(k, self.df_snr, c.df_snr_clip, c.df_cum_snr_decay, c.df_objective, c.df_loss_weight)

    def logits(self, x0, snr=None):
        """
        Embeddings without positions (..., C) -> (..., vocab_size): how likely each token's embedding becomes x0 at a signal-to-noise ratio snr
        (..., 1), None: that of the least noisy level, 0; all tokens being equally frequent, the nearest one is the likeliest.
        """
        E, snr = self.embeddings(), self.df_snr[0] if snr is None else snr
        bias = -snr / 2 * E.square().sum(1) # -snr / 2 |x0 - E|^2, but for |x0|^2, which is the same for all
        with torch.autocast(x0.device.type, enabled=False): # distances are small differences
            return F.linear(snr * x0, E) + (bias if self.unseen is None else bias + self.unseen)

    def forward(self, idx, targets=None):
        # corrupt: each token by itself. What is not scored, and all where nothing is, is context: as clean as sampling shows it
        context = torch.ones_like(idx, dtype=torch.bool) if targets is None else targets == -1
        clean = context
        if self.tokens and self.config.attention == 'causal' and targets is not None: # nobody sees its own copy, so it may be clean
            clean = context | (torch.arange(1, len(idx) + 1, device=idx.device) <= len(idx) * self.config.df_clean_share + torch.rand(1, device=idx.device))[:, None]
        x0, wpe = F.embedding(idx, self.embeddings()), self.df_wpe(idx.size(1))
        k = torch.randint(self.config.df_timesteps, idx.shape, device=idx.device).masked_fill(clean, self.config.df_stabilization_level - 1)
        noise = self.df_noise(x0.shape).masked_fill(clean[..., None], 0)
        x = self.q_sample(x0 + wpe, k, noise)
        # attend
        if self.tokens:
            logits = self.df_context(x, k) if self.config.attention == 'causal' else self.df_network(x, k)
            return logits, None if targets is None else self.next_token_loss(logits, targets)
        _, found, out = self._df_model_predictions(x, k)
        logits = self.logits(found - wpe)
        if targets is None:
            return logits, None
        # loss: the target is detached, the noisy input is not
        error = (out - self.df_target(x0 + wpe, k, noise).detach()).square().mean(-1) # (B, T)
        if self.training:
            self.note_error(found.detach() - x0.detach() - wpe.detach(), k, ~context)
        return logits, (self._compute_loss_weight(k) * error).masked_fill(context, 0).sum() / (~context).sum().clamp(min=1)

    def note_error(self, error, k, scored):
        """ the running mean of squared errors of x0 per level, error (B, T, C): nll_bound takes predictions for that uncertain """
        level, zeros = k.flatten(), torch.zeros_like(self.df_error)
        n = zeros.index_add(0, level, scored.flatten().to(zeros))
        total = zeros.index_add(0, level, (error.square().mean(-1) * scored).flatten().to(zeros))
        self.df_error += 0.05 * (total - n * self.df_error) / n.clamp(min=1)

    # ---- likelihood

    path = None # the scheduling matrix that nll_bound follows, token by token and level by level; None: each token in one step from pure noise

    @property
    def bound_name(self):
        return 'nelbo' if self.tokens else 'nelbo_gaussian' # the latter under steps of another kind than any that writes

    def views(self):
        """ bounds along whole paths; what predicts tokens from clean ones is a GPT too, whose head is ours times the embeddings """
        found = {kind: self.variant(kind) for kind in ('autoregressive', 'pyramid', 'full_sequence')}
        if self.tokens and self.config.attention == 'causal' and self.config.begin_id is not None and self.df_head.bias is None:
            with torch.no_grad():
                found['ar'] = as_ar(self, self.embeddings() @ self.df_head.weight)
        return found

    def df_posterior(self, x, k, past=None):
        """ log p(token | x, past), (B, T, V), and the predicted x0; a squared error becomes a probability by how large it was in training """
        _, x0, out = self._df_model_predictions(x, k, lambda x, k: self.df_network(x, k, past))
        out = out if self.tokens else self.logits(x0 - self.df_wpe(x.size(1)), 1 / self.df_error[k][..., None])
        return out.log_softmax(-1)[..., :self.config.text_size], x0

    def df_step_nats(self, idx, curr, next, past=None):
        """
        The step of idx (B, T) from index levels curr to next as -log p(z_next | z) + log q(z_next | z, idx) in nats, (B, T), z drawn; 0 where a
        token waits. The last step is the token's own -log p. p mixes q over tokens as they are predicted (pred_token), or is normal.
        """
        x0, w = F.embedding(idx, self.embeddings()) + self.df_wpe(idx.size(1)), idx[..., None]
        seen, k, k_next = self._read_levels(x0, curr, next, torch.zeros_like(x0))
        waits = (curr == next)[..., None]
        a_next = self.df_signal(k_next)
        left = (self.df_signal(k) / a_next).masked_fill(waits, 1) # of z_next in z
        z_next = a_next.sqrt() * x0 + (1 - a_next).sqrt() * torch.randn_like(x0)
        z = torch.where((curr == 0)[..., None], seen, left.sqrt() * z_next + (1 - left).sqrt() * torch.randn_like(x0))
        log_p, found = self.df_posterior(z, k, past)
        if self.tokens: # log q(z_next | z, token) but for what all tokens share
            gain = (self.likelihood(z_next, k_next.clamp(min=0)) - self.likelihood(z, k))[..., :log_p.size(-1)]
            nats = gain.gather(2, w) - (log_p + gain).logsumexp(-1, keepdim=True)
        else: # https://arxiv.org/abs/2107.00630
            nats = (self.df_at('snr', k_next.clamp(min=0)) - self.df_at('snr', k)) / 2 * (x0 - found).square().sum(-1, keepdim=True)
        return torch.where(k_next[..., None] < 0, -log_p.gather(2, w), nats).masked_fill(waits, 0)[..., 0]

    @torch.no_grad()
    def nll_bound(self, idx, targets, n_samples=1):
        """
        An upper bound on -log p of the scored tokens in nats: (B, n_samples) unbiased estimates, and how many tokens, (B,).
        path None: each token in one step from pure noise, given the clean ones before it. Else of the law by which the mixture sampler
        writes along that scheduling matrix, chunk by chunk: of its steps one is drawn, stratified over samples, and counts for all;
        of autoregressive's, one for every token. With full attention, where a token sees what is behind it, None is df_scheduling_matrix.
        """
        c, scored, B, nats = self.config, targets != -1, len(idx), []
        path = self.path or (None if c.attention == 'causal' else c.df_scheduling_matrix)
        x0, stab = F.embedding(idx, self.embeddings()) + self.df_wpe(idx.size(1)), torch.full_like(idx, c.df_stabilization_level - 1)
        past = self.q_sample(x0, stab, torch.zeros_like(x0)), stab
        # what pure noise still tells of the token
        prior = (self.df_alphas_cumprod[-1] * (x0.square().sum(-1) - c.n_embd) - c.n_embd * self.df_log_one_minus_alphas_cumprod[-1]) / 2
        together = path == 'autoregressive' and c.attention == 'causal'
        chunks = [(0, idx.size(1))] if together else self.chunks(scored.any(0).tolist())
        paths = [(first, end, torch.rand(n_samples, *(idx.shape if together else (B, 1)), device=idx.device).argsort(0)) for first, end in chunks]
        for i in range(n_samples):
            if path is None:
                log_p, _ = self.df_posterior(torch.randn_like(x0), torch.full_like(idx, c.df_timesteps - 1), past)
                found = -log_p.gather(2, idx[..., None])[..., 0]
            else:
                found = prior.clone()
                for first, end, strata in paths:
                    rows = torch.arange(c.df_sampling_timesteps, -1, -1)[:, None] if together else self._generate_scheduling_matrix(end - first)
                    steps = len(rows) - 1
                    at = ((strata[i] + torch.rand(strata[i].shape, device=idx.device)) / n_samples * steps).long().clamp(max=steps - 1)
                    rows = F.pad(rows.to(idx.device), (0 if together else first, 0))
                    curr, next = ((rows[at + n].squeeze(-1) if together else rows[at[:, 0] + n]).masked_fill(~scored[:, :end], 0) for n in (0, 1))
                    found[:, :end] += steps * self.df_step_nats(idx[:, :end], curr, next, past if together else None)
            nats.append(found.masked_fill(~scored, 0).sum(1))
        return torch.stack(nats, dim=1), scored.sum(1)

    @torch.no_grad()
    def metrics(self, idx, targets):
        """
        {name: the share of scored tokens that are found again from one level}, no name where none is scored; and how
        far embeddings are from their mean, in units of their own size, 0 where they have none
        """
        found, scored, x0, wpe = {}, targets != -1, F.embedding(idx, self.embeddings()), self.df_wpe(idx.size(1))
        for quarter in 1, 2, 3:
            level = self.config.df_timesteps * quarter // 4
            k = torch.full_like(idx, level)
            _, guess, _ = self._df_model_predictions(self.q_sample(x0 + wpe, k, self.df_noise(x0.shape)), k)
            found |= mean_over(f'accuracy_level_{level}', self.logits(guess - wpe).argmax(-1) == idx, scored)
        text = self.embeddings()[:self.config.text_size]
        return found | {'embedding_spread': ((text - text.mean(0)).norm() / text.norm().clamp(min=1e-20)).item()}

    # ---- writing

    @property
    def sampler(self):
        c = self.config
        return c.df_sampler if c.df_sampler != 'auto' else 'mixture' if self.tokens else 'ddim' if c.df_sampling_timesteps < c.df_timesteps else 'ddpm'

    def variant(self, path=None, **settings):
        """ the same weights under other settings of sampling, None: as they are; path: the scheduling matrix that nll_bound follows """
        other = copy.copy(self)
        settings = {'df_scheduling_matrix': path} | settings
        other.config, other.path = replace(self.config, **{k: v for k, v in settings.items() if v is not None}), path
        other.check()
        return other

    def _read_levels(self, x, curr, next, context_noise):
        """ index levels -> real ones, and x as the network reads it: finished tokens (index 0) at df_stabilization_level """
        T, S = self.config.df_timesteps, self.config.df_sampling_timesteps
        check(((0 <= next) & (next <= curr) & (curr <= S)).all(),
              f"a reverse step takes index levels from {S} at most down to 0 at least, and no token's noise may rise (next above curr)")
        real = df_real_levels(T, S).to(x.device)
        k, k_next = real[curr].masked_fill(curr == 0, self.config.df_stabilization_level - 1), real[next]
        return torch.where((curr == 0)[..., None], self.q_sample(x, k, context_noise), x), k, k_next

    @torch.no_grad()
    def _sample_step_seq(self, x, curr, next, net=None, noise=None, guidance_fn=None):
        """
        One reverse step: x (B, T, C) at index levels curr (B, T) -> the same at levels next; a token with next == curr waits, untouched.
        A step of df_sampler: mixture is a DDIM step with all of DDPM's noise, towards the embedding of a drawn token. net(x, k): in place of the network, k (B, T) real levels;
        noise(shape): raw draws, before the clamp, the context's first, then the step's; guidance_fn: see _ddim_sample_step_seq.
        """
        if self.sampler != 'ddpm':
            return self._ddim_sample_step_seq(x, curr, next, net, noise, guidance_fn)
        check(guidance_fn is None, "guidance needs DDIM steps: set df_sampling_timesteps below df_timesteps")
        seen, k, _ = self._read_levels(x, curr, next, self.df_noise(x.shape, noise))
        check((curr - next <= 1).all(), "a DDPM step lowers a level by 1 or leaves it: to jump, set df_sampling_timesteps below df_timesteps")
        _, x0, _ = self._df_model_predictions(seen, k, net)
        mean = self.df_at('posterior_mean_coef1', k) * x0 + self.df_at('posterior_mean_coef2', k) * seen
        fresh = self.df_at('posterior_variance', k).sqrt() * self.df_noise(x.shape, noise) # none in the last step
        return torch.where((curr == next)[..., None], x, mean + fresh)

    @torch.no_grad()
    def _ddim_sample_step_seq(self, x, curr, next, net=None, noise=None, guidance_fn=None):
        """
        The same by a DDIM step (https://arxiv.org/abs/2010.02502), over any number of levels; it reads the context without noise, scaled.
        guidance_fn(x0): a value to raise, of the predicted x0 (B, T, C); its gradient moves the predicted noise.
        """
        seen, k, k_next = self._read_levels(x, curr, next, torch.zeros_like(x))
        a, a_next = self.df_signal(k), self.df_signal(k_next)
        with torch.set_grad_enabled(guidance_fn is not None):
            eps, x0, _ = self._df_model_predictions(seen.requires_grad_(guidance_fn is not None), k, net)
            slope = torch.autograd.grad(guidance_fn(x0).sum(), seen)[0] if guidance_fn is not None else None
        if guidance_fn is not None:
            eps = eps - (1 - a_next).sqrt() * slope
            x0 = self.df_at('sqrt_recip_alphas_cumprod', k) * seen - self.df_at('sqrt_recipm1_alphas_cumprod', k) * eps
        eta = 1.0 if self.sampler == 'mixture' else self.config.df_ddim_eta
        sigma = eta * ((1 - a / a_next) * (1 - a_next) / (1 - a)).sqrt()
        kept = (1 - a_next - sigma ** 2).clamp(min=0).sqrt() # of the predicted noise; rounding may pass 0
        return torch.where((curr == next)[..., None], x, a_next.sqrt() * x0 + kept * eps + sigma * self.df_noise(x.shape, noise))

    def _generate_scheduling_matrix(self, horizon):
        c = self.config
        return scheduling_matrix(c.df_scheduling_matrix, horizon, c.df_sampling_timesteps, c.df_uncertainty_scale)

    def chunks(self, unknown):
        """ what is denoised together, [(start, end), ...], of a text of which these positions are unknown (a list of bools) """
        room, size, N, end, found = self.config.block_size, self.config.df_chunk_size, len(unknown), 0, []
        while (first := next((i for i in range(end, N) if unknown[i]), None)) is not None:
            h = min(N - first, max(1, room // 2) if size is None else size or N)
            check(h <= room, f"df_chunk_size=0 denoises all {h} new tokens together, but the context has {room}: choose a smaller df_chunk_size")
            found.append((first, first + h))
            end = first + h
        return found

    @torch.no_grad()
    def df_rollout(self, xs, given, net=None, noise=None, guidance_fn=None):
        """
        Write, in place, the embeddings xs (B, N, C), without positions, where given (B, N) is False: chunk by chunk from noise, by the
        scheduling matrix. Yields after every step the window, a slice of positions, and which of its tokens are finished now, (B, window) bool.
        The network sees the chunk and what fits of the text before it, none behind it; positions count from where its window begins.
        """
        B, N, C = xs.shape
        for first, end in self.chunks((~given).any(0).tolist()):
            start, h = max(0, end - self.config.block_size), end - first
            settled = given[:, start:end] | (torch.arange(start, end, device=xs.device) < first)
            wpe, fresh = self.df_wpe(end - start), F.pad(self.df_noise((B, h, C), noise), (0, 0, first - start, 0))
            x = torch.where(settled[..., None], xs[:, start:end] + wpe, fresh)
            matrix = F.pad(self._generate_scheduling_matrix(h).to(xs.device), (first - start, 0)) # (rows, window)
            levels = [row.masked_fill(settled, 0) for row in matrix] # rows x (B, window)
            for curr, next in zip(levels, levels[1:]):
                x = self._sample_step_seq(x, curr, next, net, noise, guidance_fn)
                xs[:, start:end] = torch.where(settled[..., None], xs[:, start:end], x - wpe)
                yield slice(start, end), (curr > 0) & (next == 0)

    def generate_df(self, context, max_new_tokens, net=None, noise=None, guidance_fn=None):
        """
        Continue context, ids (B, T) or embeddings without positions (B, T, C), T >= 0, by max_new_tokens: embeddings (B, T + max_new_tokens, C).
        noise(shape) is asked for every chunk, then for the steps on it. An id of -1 is to be written, wherever it stands.
        """
        raw = context.is_floating_point()
        xs = F.pad(context if raw else F.embedding(context.clamp(min=0), self.embeddings()).detach(), (0, 0, 0, max_new_tokens))
        given = F.pad(torch.ones(context.shape[:2], dtype=torch.bool, device=xs.device) if raw else context != -1, (0, max_new_tokens))
        for _ in self.df_rollout(xs, given, net, noise, guidance_fn):
            pass
        return xs

    @torch.no_grad()
    def generate(self, idx, max_new_tokens, *, steps=None, sampler=None, df_scheduling_matrix=None, df_uncertainty_scale=None, temperature=1.0,
                 top_k=None, top_p=None, guidance=0.0, stop=None, on_step=None):
        """
        Fill in every -1 of idx (B, T), T >= 0, anywhere, and max_new_tokens behind it: (B, T + max_new_tokens); what is given stays. Chunk by chunk,
        from noise, as df_rollout does. steps: noise levels that a token passes (df_sampling_timesteps); sampler: df_sampler; like the
        others, None: the model's own setting. pred_token: temperature, top_k and top_p shape what is expected of a token before its noise is
        seen; mixture samples the law that nll_bound bounds, ddim and ddpm another, in which a token is drawn in its last step
        only. guidance: w of logits = u + (1 + w)(c - u), where u are those behind pure noise instead of finished text
        (https://arxiv.org/abs/2502.06764); such a call counts 2. Else the token of a finished embedding is drawn from `logits`.
        stop, on_step: as in Denoiser.generate, but a stop always ends the row. Rows share their chunks, which begin at
        a column that any of them has to fill.
        """
        check_options(locals())
        model = self.variant(df_sampling_timesteps=steps, df_sampler=sampler, df_scheduling_matrix=df_scheduling_matrix, df_uncertainty_scale=df_uncertainty_scale)
        check(guidance == 0 or self.tokens, f"guidance is {guidance}, expected 0 (off) or, with pred_token, more")
        out, nfe = lengthened(idx, max_new_tokens), 0
        unknown, xs, probs, token = out == -1, F.embedding(out.clamp(min=0), self.embeddings()), None, None
        def net(x, k):
            nonlocal nfe, probs, token
            nfe += 1 + (guidance > 0)
            if not self.tokens:
                return self.df_network(x, k)
            expected, finished = self.df_context(x, k), k == self.config.df_stabilization_level - 1
            if guidance:
                hidden = torch.where(finished[..., None], self.df_noise(x.shape), x), k.masked_fill(finished, self.config.df_timesteps - 1)
                change = (expected - self.df_context(*hidden)).float().nan_to_num() # -inf less itself
                expected = expected + guidance * change # not in float16, which this may overflow
            log_p = token_probs(expected, temperature, top_k, top_p).log() + self.likelihood(x, k)
            probs = log_p.softmax(-1)
            token = draw(probs)
            drawn = (k <= df_real_levels(self.config.df_timesteps, model.config.df_sampling_timesteps)[1]) | (model.sampler == 'mixture') # or in the last step
            return torch.where(drawn[..., None], F.one_hot(token, probs.size(-1)).log(), log_p)
        for step, (window, finished) in enumerate(model.df_rollout(xs, ~unknown, net), 1):
            found = probs[finished] if self.tokens else token_probs(self.logits(xs[:, window][finished]), temperature, top_k, top_p) # (R, V)
            out[:, window][finished] = token[finished] if self.tokens else draw(found)
            ended = stop is not None and end_rows(out, unknown, stop)[:, -1].all()
            if on_step is not None:
                on_step(step, out, found, {'nfe': nfe, 'done': settled(out), 'total': out.size(1)})
            if ended:
                break
        return out

def as_ar(model, head=None):
    """ the autoregressive model of the same weights, which it shares; head (V, C), where the model has none """
    with torch.device('meta'):
        gpt = GPT(replace(model.config, attention='causal', causal_within_block=False))
    gpt.transformer, gpt.rope, gpt.unseen = model.transformer, model.rope, model.unseen
    if head is None:
        gpt.lm_head = model.lm_head
    else:
        gpt.lm_head.weight = nn.Parameter(head)
    return gpt.train(model.training)

OBJECTIVES = {'ar': GPT, 'denoise': Denoiser, 'mdlm': MDLM, 'bd3lm': BD3LM, 'df': DFGPT}

def score(model, batches, n_samples=1):
    """
    One number for every objective: nats per scored token over batches (dicts, on the model's device), exact or an upper bound, with
    two standard errors: Monte Carlo (of this text's bound) and over rows (would another text differ?). An objective without a
    bound gives its training loss, under that name; a squared error is in no nats and has no perplexity.
    A UserError where no token is scored.
    """
    nats, scored, exact = [], [], model.bound_name == 'nll'
    for batch in batches:
        if model.bound_name:
            n, s = model.nll_bound(**batch, n_samples=1 if exact else n_samples)
        else:
            s = (batch['targets'] != -1).sum(1)
            n = (model(**batch)[1] * s)[:, None]
        nats.append(n.cpu().double()) # in this order: MPS has no float64
        scored.append(s.cpu().double())
    check(sum(s.sum() for s in scored) > 0, "there is nothing to score: no row has a target other than -1")
    nats, scored = torch.cat(nats), torch.cat(scored) # (rows, samples), (rows,)
    tokens, rows, n = scored.sum().item(), len(nats), nats.size(1)
    value, means = nats.mean(1).sum().item() / tokens, nats.mean(1) / scored.clamp(min=1)
    sign, squared = '=' if exact else '<=' if model.bound_name else 'is no bound:', model.measured == 'mse'
    return {'name': model.measured, 'exact': exact, 'sign': sign, 'nats_per_token': value,
            'unit': 'squared error' if squared else 'nats/token', 'perplexity': None if squared else math.exp(min(value, 700.0)),
            'stderr_monte_carlo': (nats.var(1).sum() / n).sqrt().item() / tokens if n > 1 else 0.0,
            'stderr_windows': means.std().item() / math.sqrt(rows) if rows > 1 else 0.0,
            'windows': rows, 'tokens': int(tokens), 'samples_per_window': n}

def pick_device(device='auto', dtype='auto'):
    """ settings -> (torch.device, autocast context, name of the dtype); auto takes the best there is, float32 on a CPU """
    low = {'float32': None, 'bfloat16': torch.bfloat16, 'float16': torch.float16}
    check(dtype in ('auto', *low), f"dtype is {dtype!r}, expected auto or one of {', '.join(low)}")
    asked = device
    if device == 'auto':
        device = 'cuda' if torch.cuda.is_available() else 'mps' if torch.backends.mps.is_available() else 'cpu'
    try:
        device = torch.device(device)
        torch.zeros(1, device=device).item() # meta has no numbers
    except (RuntimeError, AssertionError, ImportError) as e: # torch's own ways to say no, some in very many lines
        why = str(e).strip().partition('\n')[0][:200] or type(e).__name__
        raise UserError(f"device {asked!r} cannot be used here ({why}): try --device=auto or --device=cpu") from None
    if dtype == 'auto':
        dtype = 'bfloat16' if device.type == 'cuda' and torch.cuda.is_bf16_supported() else 'float32'
    return device, autocast(device, low[dtype], dtype), dtype

def autocast(device, low, name):
    """ the context in which a device computes in a low precision, or as always where low is None """
    if low is None:
        return contextlib.nullcontext()
    try:
        with warnings.catch_warnings(): # torch may warn and go on in float32
            warnings.simplefilter('ignore')
            context = torch.autocast(device.type, low)
            with context:
                works = torch.is_autocast_enabled(device.type)
    except RuntimeError: # or refuse
        works = False
    check(works, f"dtype {name} does not work on {device}: try --dtype=auto or --dtype=float32")
    return context

# -----------------------------------------------------------------------------
# the only file access

FORMAT = 1 # of checkpoints

def read_pickle(path):
    """ what torch.save wrote, tensors on the CPU; never executes pickled code """
    if not os.path.exists(path):
        folder = os.path.dirname(path) or '.'
        others = sorted(name for name in os.listdir(folder) if name.endswith('.pt')) if os.path.isdir(folder) else []
        raise UserError(f"there is no checkpoint {path}; {'its folder has ' + ', '.join(others) if others else 'train a model first, or name the folder of a run'}")
    try:
        return torch.load(path, map_location='cpu', weights_only=True)
    except Exception as e: # truncated, foreign or unsafe: the kinds of exception are many, the news is one
        if isinstance(e, OSError) and e.filename is not None: # not what is in it: no permission, or a folder
            raise UserError(f"cannot read {path}: {e.strerror}") from None
        raise UserError(f"{path} is no checkpoint that can be read ({type(e).__name__}): truncated, or from elsewhere") from None

def read_checkpoint(path):
    """ the dict of a checkpoint that train.py wrote """
    ckpt = read_pickle(path)
    if not isinstance(ckpt, dict) or not isinstance(ckpt.get('format'), int):
        raise UserError(f"{path} is not one of our checkpoints: it has no 'format'")
    if ckpt['format'] > FORMAT:
        raise UserError(f"{path} has checkpoint format {ckpt['format']}, this code reads up to {FORMAT}: update the code")
    return ckpt

def entry(ckpt, name, where, kind=dict):
    """ ckpt[name] of a checkpoint, a sentence where there is no such thing """
    check(isinstance(ckpt.get(name), kind), f"{where} has no {name!r}, so it is not a whole checkpoint")
    return ckpt[name]

def fixed_by_weights(config, weights, where):
    """ {field of GPTConfig: value} that a checkpoint's weights fix; config is what any version saved it with """
    unknown = sorted(config.keys() - {f.name for f in fields(GPTConfig)})
    check(not unknown, f"{where} was written by another version: {', '.join(unknown)} is unknown here")
    fixed = ARCHITECTURE + DF_ARCHITECTURE * any(name.startswith('df_') for name in weights)
    missing = ', '.join(name for name in fixed if name not in config) # any other field takes its default
    check(not missing, f"{where} was written by another version: it does not say {missing}, which the weights fix")
    return {name: config[name] for name in fixed}

def and_more(names):
    """ the first three of a list as text, and how many are left """
    return ', '.join(names[:3]) + f' and {len(names) - 3} more' * (len(names) > 3)

def check_fit(own, weights, whose='the weights'):
    """ a sentence that names what of `weights` a model with state dict `own` cannot load; both are {name: tensor} """
    shape = lambda w: tuple(w.shape) if torch.is_tensor(w) else type(w).__name__
    both = [name for name in own if name in weights and shape(weights[name]) != shape(own[name])]
    wrong = [f"{name} is {shape(weights[name])} there and {shape(own[name])} here" for name in both]
    wrong += [f"{name} is missing" for name in own if name not in weights]
    wrong += [f"{name} is unknown here" for name in weights if name not in own]
    check(not wrong, f"{whose} do not fit this model: {and_more(wrong)}")

# what of a network of our kind is GPT-2's: all but the sizes, the biases, the gelu and the head
GPT2 = dict(pos='learned', norm='layernorm', qk_norm=False)

def gpt2_weights(weights, where):
    """
    Weights of a GPT-2 by nanoGPT's names -> ({field of GPTConfig: value} that they show, the weights by our names).
    torch.compile's prefix goes, and so do causal masks, which old versions saved. The oldest had a head of their own;
    who saved a tied one may have left it out.
    """
    weights = {str(name).removeprefix('_orig_mod.'): w for name, w in weights.items()}
    masks = '.attn.bias', '.attn.masked_bias'
    weights = {name: w for name, w in weights.items() if not name.endswith(masks)}
    wte = weights.get('transformer.wte.weight')
    check(torch.is_tensor(wte), f"{where} has no weights of a GPT: transformer.wte.weight is missing")
    tied = torch.equal(weights.setdefault('lm_head.weight', wte), wte)
    return dict(tie_weights=tied, bias='transformer.ln_f.bias' in weights), weights

def read_nanogpt(ckpt, where):
    """ a ckpt.pt of nanoGPT, of any version, as read_pretrained gives it """
    args, weights = entry(ckpt, 'model_args', where), entry(ckpt, 'model', where)
    names = 'n_layer', 'n_head', 'n_embd', 'block_size', 'vocab_size'
    sizes = {name: entry(args, name, f"'model_args' of {where}", int) for name in names}
    shown, weights = gpt2_weights(weights, where)
    mlp = 'gelu' if 'bias' in args else 'gelu_tanh' # before it had that option, nanoGPT computed GPT-2's approximation
    text = {'tokenizer': 'gpt2'} if sizes['vocab_size'] in (50257, 50304) else {} # the latter is padded
    return GPT2 | sizes | shown | dict(mlp=mlp), weights, text

def read_hugging_face(source):
    """ a GPT-2 of any size from a folder or the hub, as read_pretrained gives it """
    try:
        from transformers import GPT2LMHeadModel
        hf, loaded = GPT2LMHeadModel.from_pretrained(source, output_loading_info=True)
    except ImportError:
        raise UserError(f"{source} is no checkpoint; if it is a GPT-2 of Hugging Face, "
                        "that needs transformers: pip install transformers") from None
    except (OSError, ValueError, RuntimeError) as e:
        why = str(e).strip().partition('\n')[0] or type(e).__name__
        what = "neither a checkpoint nor a GPT-2 of Hugging Face that can be read"
        raise UserError(f"{source} is {what} ({why})") from None
    c, gelus = hf.config, {'gelu_new': 'gelu_tanh', 'gelu_pytorch_tanh': 'gelu_tanh', 'gelu': 'gelu'}
    plain = c.scale_attn_weights and not c.scale_attn_by_inverse_layer_idx and not c.add_cross_attention
    usual = c.n_inner in (None, 4 * c.n_embd) and c.layer_norm_epsilon == 1e-5
    check(plain and usual and c.activation_function in gelus,
          f"{source} is a GPT-2 of another kind: {c.activation_function}, n_inner {c.n_inner}, "
          f"epsilon {c.layer_norm_epsilon}, {'the usual' if plain else 'another'} attention")
    missing = sorted(loaded['missing_keys']) # transformers would begin those at random
    check(not missing, f"{source} is not a whole GPT-2: it lacks {and_more(missing)}")
    linear = 'attn.c_attn.weight', 'attn.c_proj.weight', 'mlp.c_fc.weight', 'mlp.c_proj.weight' # there inputs x outputs
    weights = {k: v.t().contiguous() if k.endswith(linear) else v for k, v in hf.state_dict().items()}
    shown, weights = gpt2_weights(weights, source)
    sizes = dict(n_layer=c.n_layer, n_head=c.n_head, n_embd=c.n_embd, block_size=c.n_positions, vocab_size=c.vocab_size)
    return GPT2 | sizes | shown | dict(mlp=gelus[c.activation_function]), weights, {'tokenizer': 'gpt2'}

def read_pretrained(source):
    """
    Weights to start from -> (fields of GPTConfig that they fix, weights by our names, {'tokenizer': ...} as far as known).
    source: a checkpoint of ours or of nanoGPT, or a GPT-2 of Hugging Face, a folder or a hub name (needs transformers).
    """
    if not os.path.isfile(source) and not str(source).endswith('.pt'):
        known, weights, text = read_hugging_face(source)
    elif isinstance(ckpt := read_pickle(source), dict) and 'model_args' in ckpt:
        known, weights, text = read_nanogpt(ckpt, source)
    else:
        ckpt = read_checkpoint(source)
        config, weights, meta = (entry(ckpt, name, source) for name in ('config', 'model', 'meta'))
        tables = 'block_size', 'vocab_size', 'text_size', 'begin_id', 'mask_id'
        known = {name: config[name] for name in tables if name in config} | fixed_by_weights(config, weights, source)
        text = {name: meta[name] for name in ('tokenizer', 'chars') if name in meta}
    assert known.keys() >= set(ARCHITECTURE), "a new field of GPTConfig: GPT2 must say what GPT-2 has there"
    return known, weights, text

def load_checkpoint(path, device='cpu', weights='ema', objectives={}, view=None):
    """
    A checkpoint of train.py (its path, or what read_checkpoint gave) -> (model in eval mode, the checkpoint's dict).
    weights: 'ema' takes the averaged weights where the run kept them, 'raw' those of the last step. objectives: more of them than are here. view: what else the
    weights can be read as, a name that its views() has: 'ar', of a bd3lm run with clean_causal, an mdlm run with ar_weight, or of df.
    """
    check(weights in ('ema', 'raw'), f"weights is {weights!r}, expected ema or raw")
    ckpt, where = (path, 'the checkpoint') if isinstance(path, dict) else (read_checkpoint(path), path)
    name, config = entry(ckpt, 'objective', where, str), entry(ckpt, 'config', where)
    objectives, dataset = OBJECTIVES | objectives, ckpt.get('settings', {}).get('dataset')
    check(name in objectives, f"the objective {name!r} of {where} is not known here, only {', '.join(objectives)}: "
          f"one of a provider.py needs that file in the folder of its dataset{f', {dataset}' if dataset else ''}")
    state = ckpt['ema'] if weights == 'ema' and ckpt.get('ema') else entry(ckpt, 'model', where)
    fixed_by_weights(config, state, where)
    model = objectives[name](GPTConfig(**config))
    check_fit(model.state_dict(), state, f"the weights of {where}")
    model.load_state_dict(state)
    model = model.eval().to(device)
    views = {None: model} | model.views()
    if view not in views:
        raise UserError(f"this {name} checkpoint cannot be read as {view}, only as "
                         f"{', '.join(v for v in views if v) or 'itself'}")
    return views[view], ckpt
