"""
One transformer and the objectives that train it to write text, all in this file.

The one idea: a *block* is a set of tokens that share a noise level and see each other, and every block sees the (clean)
blocks before it. Attention pattern and noise granularity are then the same integer tensor, block_ids:
0,1,2,3,... is GPT; 0,0,0,0,... is BERT; position // diffusion_block_size is block diffusion.

In this order: config, attention rule, network, GPT (ar), masked diffusion (denoise, mdlm), block diffusion (bd3lm), how
these write, diffusion forcing (df_published, df), evaluation and files. An objective is a class whose forward has three
steps, corrupt, attend, loss: see GPT. The network is nanoGPT's in style (https://github.com/karpathy/nanoGPT).
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
from dataclasses import dataclass, field, fields, replace

import torch
import torch.nn as nn
import torch.utils.checkpoint
from torch.nn import functional as F

class UserError(ValueError):
    """ A setting, a file or a prompt that cannot work. Scripts print its one sentence instead of a traceback """

def check(fits, sentence):
    """ raise a UserError unless fits. What only a bug in the code can break is an assert instead """
    if not fits:
        raise UserError(sentence)

# -----------------------------------------------------------------------------
# the config

def of_weights(default):
    """ a field that trained weights fix: a checkpoint brings its value along wherever its weights go """
    return field(default=default, metadata={'kind': 'weights'})

def free(default):
    """ a field that may change when a run is resumed. Fields of neither kind stay what the run began with """
    return field(default=default, metadata={'kind': 'free'})

@dataclass
class GPTConfig:
    """ what the model is and how it trains. train.py has a setting of the same name for nearly every field """
    n_layer: int = of_weights(12)
    n_head: int = of_weights(12)
    n_embd: int = of_weights(768)
    bias: bool = of_weights(False) # in linear layers and in layernorm
    pos: str = of_weights('rope') # rope | learned
    norm: str = of_weights('layernorm') # layernorm | rmsnorm (as good at 0.8M parameters, slower on a CPU)
    mlp: str = of_weights('swiglu') # swiglu | gelu | gelu_tanh (GPT-2's approximation); equal in parameters
    qk_norm: bool = of_weights(True) # layernorm on queries and keys (https://arxiv.org/abs/2302.05442)
    tie_weights: bool = of_weights(False) # one matrix for embedding and head
    init: str = 'zero' # zero: output projections (and an untied head) start at 0 | gpt2: small normals
    dropout: float = free(0.0)
    # the text
    block_size: int = 1024 # tokens of context
    vocab_size: int = 50304 # rows of the embedding: the text's ids, begin, [MASK], pad, then padding to a round number
    text_size: int | None = None # ids below this can be in a text, all others have logit -inf. None: all rows
    begin_id: int | None = None # ar reads it first, so that every token is scored. None: the first one is not
    mask_id: int | None = None # what a hidden token reads as
    # who sees whom
    attention: str | None = None # causal | full | block | hierarchical, see block_ids. None: the usual one of the class
    diffusion_block_size: int | None = None # tokens per block; None: segments of a hierarchy stay whole
    segments: str | None = None # lengths of a hierarchy, question first: '32,32,64' or with names 'plan:32,...'
    causal_within_block: bool = False # hierarchical: plan and execution see no later tokens of their own block
    clean_causal: bool = False # bd3lm: clean tokens see no later ones of their block, so the clean stream is a GPT
    attn_backend: str = free('auto') # auto | sdpa | flex. auto: flex on cuda without dropout
    grad_checkpointing: bool = free(False) # compute activations twice: less memory, about 1/3 more time
    # the noise
    t_min: float = free(0.0) # noise levels that training draws; bounds always use all of (0, 1]
    t_max: float = free(1.0)
    t_dist: str = free('uniform') # uniform | bell: Beta(2, 2) (https://arxiv.org/abs/2605.13026)
    single_ratio_per_sequence: bool = True # False: a noise level per token; then the loss is no bound
    ar_weight: float = free(0.0) # weight of a next-token loss: bd3lm's on the clean stream, mdlm's on half of the rows

    choices = {'attention': ('causal', 'full', 'block', 'hierarchical', None), 'pos': ('rope', 'learned'),
               'norm': ('rmsnorm', 'layernorm'), 'mlp': ('swiglu', 'gelu', 'gelu_tanh'), 'init': ('zero', 'gpt2'),
               't_dist': ('uniform', 'bell'), 'attn_backend': ('auto', 'sdpa', 'flex')}

    def __post_init__(self):
        for name, options in self.choices.items():
            check(getattr(self, name) in options,
                  f"{name} is {getattr(self, name)!r}, expected one of {', '.join(filter(None, options))}")
        check(self.n_embd % self.n_head == 0, f"n_embd {self.n_embd} is not a multiple of n_head {self.n_head}")
        head, rope = self.n_embd // self.n_head, self.pos == 'rope'
        check(not rope or head % 2 == 0, f"rope turns pairs: a head of {head} dimensions (n_embd / n_head) is odd")
        check(not self.causal_within_block or self.attention in ('hierarchical', None),
              "causal_within_block is about the segments of attention=hierarchical")
        self.text_size = self.vocab_size if self.text_size is None else self.text_size
        check(self.text_size <= self.vocab_size, f"text_size {self.text_size} exceeds vocab_size {self.vocab_size}")

    @property
    def lengths(self):
        """ tokens of each segment, a list of ints; [] without segments """
        return segment_lengths(self.segments)

    @property
    def n_positions(self):
        """ of the network: block_size, and one for the begin id where there is one """
        return self.block_size + (self.begin_id is not None)

# -----------------------------------------------------------------------------
# the attention rule: who sees whom

def block_ids(attention, T, diffusion_block_size=None, segments=None):
    """
    The block of every position, (T,) int64, starting at 0 and never falling.
    attention: causal | full | block | hierarchical. segments, for hierarchical only: lengths that add up to T, the
    question first. The question is one block; each later segment is one block too, or cut by diffusion_block_size.
    """
    n = diffusion_block_size
    check(attention in BLOCK_IDS, f"attention is {attention!r}, expected one of {', '.join(BLOCK_IDS)}")
    check(n is None or n >= 1, f"diffusion_block_size is {n}, expected at least 1 token per block")
    check(attention != 'block' or n is not None, "attention 'block' needs diffusion_block_size, the tokens per block")
    return BLOCK_IDS[attention](T, n, segments)

BLOCK_IDS = {
    'causal': lambda T, n, segments: torch.arange(T),
    'full': lambda T, n, segments: torch.zeros(T, dtype=torch.long),
    'block': lambda T, n, segments: torch.arange(T) // n, # the last block may be shorter
    'hierarchical': lambda T, n, segments: hierarchical_ids(T, n, segments),
}

def mask_mod(block, noisy, clean_causal=False, question=None):
    """
    The rule as a function of indices, for SDPA (as a matrix) and FlexAttention alike. block (N,) or (B, N): the block
    of each position. noisy (N,) bool: this is the corrupted copy of a token whose clean copy is in the sequence too.
    A noisy token is seen only by its own noisy block. A clean token is seen by its own clean block and by every later
    block. Every token sees itself, so no softmax is empty.
    With block = cat(ids, ids), noisy copies first, this is BD3-LM's training mask (https://arxiv.org/abs/2503.09573).
    clean_causal: inside a block a clean token sees no later clean one, so the clean tokens alone are a GPT.
    question: id of the prompt's last block. Blocks with a larger id are causal inside. None: no block is.
    """
    def mod(b, h, q_idx, kv_idx):
        at = (lambda i: block[i]) if block.dim() == 1 else (lambda i: block[b, i])
        same, past = at(q_idx) == at(kv_idx), at(q_idx) > at(kv_idx)
        if question is not None:
            same = same & ((q_idx >= kv_idx) | (at(q_idx) <= question))
        sees_noisy, sees_clean = same & noisy[q_idx], same & ~noisy[q_idx]
        if clean_causal:
            sees_clean = sees_clean & (q_idx >= kv_idx)
        return torch.where(noisy[kv_idx], sees_noisy, sees_clean | past)
    return mod

def attend(q, k, v, mask, dropout_p=0.0):
    """
    q (B, H, Tq, D), k and v (B, H, Tk, D) -> (B, H, Tq, D). mask: 'causal', 'full', a bool matrix that broadcasts to
    (B, H, Tq, Tk), a FlexAttention BlockMask or a TwoStreamMask.
    """
    if isinstance(mask, str): # no matrix: the kernels skip what is_causal rules out
        causal = {'causal': True, 'full': False}[mask]
        return F.scaled_dot_product_attention(q, k, v, dropout_p=dropout_p, is_causal=causal)
    if torch.is_tensor(mask):
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, dropout_p=dropout_p)
    return mask.attend(q, k, v, dropout_p) if isinstance(mask, TwoStreamMask) else flex_attend(q, k, v, mask)

# -----------------------------------------------------------------------------
# the network

def make_norm(config):
    rms, C = config.norm == 'rmsnorm', config.n_embd
    return nn.RMSNorm(C, eps=1e-5) if rms else nn.LayerNorm(C, bias=config.bias)

def rope_table(config):
    """ cos and signed sin of every position, (2, n_positions, D) for heads of D (https://arxiv.org/abs/2104.09864) """
    half = config.n_embd // config.n_head // 2
    freq = 10000.0 ** (-torch.arange(half).float() / half)
    angle = torch.arange(config.n_positions).float()[:, None] * freq
    return torch.stack((angle.cos().repeat(1, 2), torch.cat((-angle.sin(), angle.sin()), dim=1)))

def rotate(x, cos, sin):
    """ rotary positions: dimensions i < D/2 and i + D/2 of x (..., D) are the two coordinates of a pair """
    return torch.addcmul(x * cos, x.roll(x.size(-1) // 2, -1), sin)

class Attention(nn.Module):
    def __init__(self, config, layer):
        super().__init__()
        self.layer, self.n_head, self.dropout = layer, config.n_head, config.dropout
        self.c_attn = nn.Linear(config.n_embd, 3 * config.n_embd, bias=config.bias) # query, key, value
        self.c_proj = nn.Linear(config.n_embd, config.n_embd, bias=config.bias)
        # queries and keys have the same gain, so q @ k has its square: it learns how sharply to look
        self.qk_norm = nn.LayerNorm(config.n_embd // config.n_head, bias=False) if config.qk_norm else None

    def forward(self, x, rope, mask, cache=None, first=None, only=None):
        """ x (B, T, C) -> (B, T, C). first, only: see Block """
        B, T, C = x.shape
        # project the input to queries, keys and values
        qkv = self.c_attn(x).view(B, T, 3, self.n_head, C // self.n_head)
        # normalise queries and keys, and turn them by their position: both take the same steps, so take them together
        qk, v = qkv[:, :, :2], qkv[:, :, 2].transpose(1, 2)
        if self.qk_norm is not None:
            qk = self.qk_norm(qk)
        if rope is not None:
            qk = rotate(qk, *rope)
        q, k = qk.permute(2, 0, 3, 1, 4).unbind() # from (B, T, 2, H, D) to (B, H, T, D) each
        if cache is not None:
            k, v = cache.append(self.layer, k, v) # (B, H, length + T, D)
        # attend, project back
        q = q if first is None else q[:, :, :first]
        y = attend(q, k, v, mask, self.dropout if self.training else 0.0).transpose(1, 2).reshape(B, -1, C)
        return drop(self.c_proj(y if only is None else y.flatten(0, 1)[only]), self)

class MLP(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.gated, self.dropout = config.mlp == 'swiglu', config.dropout
        self.gelu = 'tanh' if config.mlp == 'gelu_tanh' else 'none'
        # a gate is a third matrix: with 8/3 of the width instead of 4, in steps of 16, it costs the same parameters
        hidden = round(config.n_embd / 6) * 16 if self.gated else 4 * config.n_embd
        self.c_fc = nn.Linear(config.n_embd, 2 * hidden if self.gated else hidden, bias=config.bias)
        self.c_proj = nn.Linear(hidden, config.n_embd, bias=config.bias)

    def forward(self, x):
        h = self.c_fc(x)
        if self.gated:
            h, gate = h.chunk(2, dim=-1)
            h = F.silu(gate) * h # https://arxiv.org/abs/2002.05202
        else:
            h = F.gelu(h, approximate=self.gelu)
        return drop(self.c_proj(h), self)

class Block(nn.Module):
    """ one layer: attention, then an MLP, each added to the residual stream x """

    def __init__(self, config, layer):
        super().__init__()
        self.ln_1, self.ln_2 = make_norm(config), make_norm(config)
        self.attn = Attention(config, layer)
        self.mlp = MLP(config)

    def forward(self, x, rope, mask, cache=None, first=None, only=None):
        """
        x (B, T, C) -> (B, T, C). Two speed-ups for the last layer, whose other results nobody reads. first=n: compute
        only the first n positions. only (R,): flat indices into those B * n positions; returns (R, C).
        Without them, a training step of mdlm takes 1.10 times as long, one of bd3lm 1.20 times.
        """
        y = self.attn(self.ln_1(x), rope, mask, cache, first, only)
        x = x if first is None else x[:, :first]
        x = (x if only is None else x.flatten(0, 1)[only]) + y
        return x + self.mlp(self.ln_2(x))

class GPT(nn.Module):
    """
    ar: predict the next token. Also the network that every objective shares, with the same parameter names.

    What an objective is: a subclass of a class here, and a row in OBJECTIVES (here or in a dataset's provider.py).
    forward(idx, targets=None, **batch) -> logits, loss. idx (B, T): token ids. targets (B, T): what to predict at each
      position, -1 = not scored and never corrupted. batch: block_ids, and whatever else the provider sends, by name.
      Without targets: logits of all positions, and None. With targets, train.py reads the loss only.
    loss_name: what the log calls the loss. 'nll' is exact, 'nelbo' an upper bound, 'ce' and 'mse' bound nothing.
    nll_bound(idx, targets, n_samples, **batch): see GPT.nll_bound. bound_name: 'nll', 'nelbo...' or None: no bound.
    metrics(idx, targets, **batch) -> {name: number}, for the log.
    generate(idx, max_new_tokens, *, stop, on_step, ...) -> ids, see GPT.generate; its other options are in OPTIONS.
    config_class: the dataclass of its settings. attentions: the patterns that it can train with, the default first.
    All of it is inherited, except what may have become false: a subclass of MDLM that redefines forward or corrupt has
      loss_name 'ce', no bound, no generate and no metrics until it defines or names them, see __init_subclass__.
    """
    config_class = GPTConfig
    attentions = ('causal',)
    loss_name = 'nll'
    bound_name = 'nll'
    usual_block_size = 16 # diffusion_block_size where a run names none

    def __init__(self, config):
        super().__init__()
        if not isinstance(config, self.config_class): # fields that it lacks have their defaults
            shared = [f.name for f in fields(self.config_class) if hasattr(config, f.name)]
            config = self.config_class(**{name: getattr(config, name) for name in shared})
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
        # constants, rebuilt from the config and so in no checkpoint; unseen: -inf for ids that no text contains
        unseen = torch.zeros(config.vocab_size)
        unseen[config.text_size:] = -math.inf
        self.register_buffer('unseen', unseen if config.text_size < config.vocab_size else None, persistent=False)
        self.register_buffer('rope', rope_table(config) if config.pos == 'rope' else None, persistent=False)

    @classmethod
    def usual_attention(cls, segments):
        """ the pattern for rows of these segments ('' or None: plain text) where none is asked for """
        return 'hierarchical' if segments and 'hierarchical' in cls.attentions else cls.attentions[0]

    @classmethod
    def block_size_for(cls, asked):
        """ the config's diffusion_block_size for what a setting says: None is the usual one, 0 whole segments """
        return (cls.usual_block_size if asked is None else asked) or None

    def _init_weights(self, module):
        if isinstance(module, (nn.Linear, nn.Embedding)):
            nn.init.normal_(module.weight, std=0.02)
        if isinstance(module, nn.Linear) and module.bias is not None:
            nn.init.zeros_(module.bias)

    # ---- the steps of every forward

    def embed(self, idx, pos):
        """ token ids idx (B, N) at positions pos (N,) -> x (B, N, C) """
        return self.add_positions(self.transformer.wte(idx), pos)

    def add_positions(self, x, pos):
        """ x (B, N, C) -> x with learned positions, if the model has those, and dropout """
        if self.config.pos == 'learned':
            x = x + self.transformer.wpe(pos)
        return drop(x, self)

    def rotations(self, pos, dtype):
        """
        cos and signed sin at positions pos (N,), (2, N, 2, H, D); None without rope. Copied for every head, because
        reading them is faster than broadcasting.
        """
        if self.config.pos != 'rope':
            return None
        return self.rope[:, pos, None, None].to(dtype).expand(-1, -1, 2, self.config.n_head, -1).contiguous()

    def trunk(self, x, pos, mask, cache=None, first=None, only=None):
        """
        x (B, N, C) at positions pos (N,) or (B, N) -> (B, N, C), normalised. mask: see attend.
        cache: x continues what it keeps, and pos (N,) must too; pos (B, N) may be any.
        first, only: what of the last layer is wanted, see Block.
        """
        if cache is None:
            rope, layers = self.rotations(pos, x.dtype), self.transformer.h
        else:
            rope, layers = cache.open(pos), cache.layers
        if self.config.grad_checkpointing and self.training:
            checkpoint = torch.utils.checkpoint.checkpoint
            layers = [functools.partial(checkpoint, layer, use_reentrant=False) for layer in layers]
        *others, last = layers
        for layer in others:
            x = layer(x, rope, mask, cache)
        return self.transformer.ln_f(last(x, rope, mask, cache, first, only))

    def logits(self, x):
        """ (..., C) -> (..., vocab_size). Ids that no text contains get -inf, as a bias, because that costs nothing """
        return F.linear(x, self.lm_head.weight, self.unseen)

    # ---- predicting the next token

    def shift(self, idx, targets):
        """ what to read and what to predict: position i reads up to token i-1 and predicts token i """
        if self.config.begin_id is None:
            return idx[:, :-1], targets[:, 1:] # the first token has nothing before it: it is context only
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
        """ logits (B, T, V), targets (B, T) -> nats per scored token; a sum first, as the mean over nothing is NaN """
        loss = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=-1, reduction='sum')
        return loss / (targets != -1).sum().clamp(min=1)

    @torch.no_grad()
    def nll_bound(self, idx, targets, n_samples=1):
        """
        -log p of the scored tokens of each row, or an upper bound on it: nats (B, n_samples), unbiased estimates, and
        the number of scored tokens (B,). Here it is exact, so all columns are equal.
        """
        inputs, targets = self.shift(idx, targets)
        logits = self.next_token_logits(inputs)
        nll = F.cross_entropy(logits.transpose(1, 2), targets, ignore_index=-1, reduction='none').sum(1) # (B,)
        return nll[:, None].expand(-1, n_samples), (targets != -1).sum(1)

    @torch.no_grad()
    def metrics(self, idx, targets):
        """
        {name: number} for the log, over scored tokens: accuracy, and the mean entropy of predictions in nats.
        {} where no token is scored.
        """
        inputs, targets = self.shift(idx, targets)
        probs = self.next_token_logits(inputs).softmax(-1)
        scored = targets != -1
        return mean_over('accuracy', probs.argmax(-1) == targets, scored) | mean_over('entropy', entropy(probs), scored)

    @torch.no_grad()
    def generate(self, idx, max_new_tokens, *, temperature=1.0, top_k=None, top_p=None, stop=None, on_step=None):
        """
        Continue idx (B, T), T >= 0, by max_new_tokens: (B, T + max_new_tokens). Rows may have prompts of different
        lengths: -1 after a row's prompt is a position to write.
        stop: a token id. After a row writes it, the rest of the row is filled with it. A row of segments writes one
          stop for each segment after the question first.
        on_step(step, idx, probs, state): called after every token with the text so far, the distributions (B, V) it
          was drawn from and {'nfe': network calls, 'done': positions settled, 'total': positions in all}.
        The KV cache is exact. When the context is full, its newer half is read again from position 0, and writing goes
        on. A row is written as if it were alone, if all prompts fit the context. Otherwise the shortest prompt decides
        where the first window ends.
        """
        check_options(locals())
        out, given = lengthened(idx, max_new_tokens), (idx != -1).sum(1) # (B,), prompt lengths
        if not (out == -1).any():
            return out
        first = int(given.min()) # the shortest prompt decides where writing starts
        check(first > 0 or self.config.begin_id is not None, "without a begin id a prompt needs at least one token")
        check(((idx != -1).cumprod(1).sum(1) == given).all(),
              "a prompt has a gap (-1 before a given token): ar only writes on")
        cache, stops, enough = None, torch.zeros_like(given), max(1, len(self.config.lengths) - 1)
        with torch.inference_mode(): # for small tensors, autograd's bookkeeping costs more than the arithmetic
            for n in range(first, out.size(1)):
                cache, tokens = self.what_to_read(out, n, cache)
                probs = token_probs(self.read_on(tokens, cache), temperature, top_k, top_p) # (B, V)
                token = draw(probs)
                if stop is not None:
                    token = token.masked_fill(stops >= enough, stop)
                out[:, n] = torch.where(out[:, n] == -1, token, out[:, n]) # a longer prompt keeps its own
                if on_step is not None:
                    state = {'nfe': n - first + 1, 'done': n + 1, 'total': out.size(1)}
                    on_step(n - first + 1, out[:, :n + 1], probs, state)
                if stop is not None:
                    stops += (out[:, n] == stop) & (n >= given)
                    if (stops >= enough).all():
                        out[:, n + 1:] = stop
                        break
        return out

    def what_to_read(self, out, n, cache):
        """ a cache with room, and the tokens that it has to read before token n of out (B, N) can be drawn """
        if cache is not None and cache.length < cache.size:
            return cache, out[:, n - 1:n]
        lead = int(self.config.begin_id is not None)
        begin = out.new_full((len(out), lead), self.config.begin_id or 0)
        room = self.config.block_size - begin.size(1)
        kept = room if cache is None else min(room, max(1, room // 2)) # the newer half of a full context
        tokens = torch.cat((begin, out[:, max(0, n - kept):n]), dim=1)
        size = min(self.config.block_size, tokens.size(1) + out.size(1) - n)
        return Cache(self, len(out), size), tokens

    def read_on(self, tokens, cache):
        """ read tokens (B, n) after those that the cache keeps -> logits (B, V) of the token that follows """
        n = tokens.size(1)
        assert n == 1 or cache.length == 0, "'causal' takes queries and keys that begin together"
        pos = torch.arange(cache.length, cache.length + n, device=tokens.device)
        x = self.trunk(self.embed(tokens, pos), pos, 'full' if n == 1 else 'causal', cache)
        cache.keep(n)
        return self.logits(x[:, -1])

    # ---- training

    def configure_optimizers(self, optimizer='adamw', learning_rate=1e-3, muon_learning_rate=0.02, weight_decay=0.1,
                             betas=(0.9, 0.95)):
        """
        A list of optimizers. adamw: all parameters, with decay on the 2-D ones. muon: the matrices of attention and
        MLP by Muon (https://kellerjordan.github.io/posts/muon/); embeddings, head, norms and biases by AdamW.
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

    @property
    def measured(self):
        """ the name of the number by which models are compared: its bound, or else its loss """
        return self.bound_name or self.loss_name

    @property
    def row_length(self):
        """ tokens of text in a training row: without a begin id the first one is only context, as in nanoGPT """
        return self.config.block_size + (self.config.begin_id is None)

    def views(self):
        """ {objective: model}: what else these weights can be read as. Evaluated beside the model itself """
        return {}

    def n_params(self):
        return sum(p.numel() for p in self.parameters())

    def flops_per_token(self):
        """ of a training step, forward and backward, per token of text, as PaLM (https://arxiv.org/abs/2204.02311) """
        c = self.config
        lookups = self.transformer.wpe.weight.numel() if c.pos == 'learned' else 0
        lookups += 0 if c.tie_weights else self.transformer.wte.weight.numel() # a lookup is not a multiplication
        return 6 * (self.n_params() - lookups) + 12 * c.n_layer * c.n_embd * c.block_size

    def estimate_mfu(self, tokens_per_second, peak_flops):
        """ model flops utilization: the share of the hardware's peak (FLOP/s) that the arithmetic of a step needs """
        return self.flops_per_token() * tokens_per_second / peak_flops

    # ---- weights from elsewhere

    @classmethod
    def from_pretrained(cls, source, **settings):
        """ a model with the weights that read_pretrained finds. settings: config fields that they leave open """
        known, weights, _ = read_pretrained(source)
        own = {f.name for f in fields(cls.config_class)} # another objective's weights may come with more
        model = cls(cls.config_class(**{name: value for name, value in known.items() if name in own} | settings))
        model.load_pretrained(weights)
        return model

    def adapted(self, weights):
        """ {name: tensor}, weights of any objective -> what this class can load of them """
        return dict(weights)

    def load_pretrained(self, weights):
        """
        As load_state_dict, but the tables of ids and of positions may have other numbers of rows: those that both have
        are taken. Objectives share the names of their parameters, so the weights may come from any of them but
        diffusion forcing, which has another head. What does not fit is named in a UserError.
        """
        own, weights = self.state_dict(), self.adapted(weights)
        if self.config.tie_weights and 'lm_head.weight' in own and 'transformer.wte.weight' in weights:
            wte = weights['transformer.wte.weight']
            head = weights.setdefault('lm_head.weight', wte)
            check(torch.equal(head, wte), "the weights have a head of their own: set tie_weights=False")
        for name, needed, what in [ # tables, the rows that they must have, and how a sentence names those
            ('transformer.wte.weight', self.config.text_size, 'ids, the text has'), ('lm_head.weight', 0, ''),
            ('transformer.wpe.weight', self.config.block_size, 'positions, block_size is'),
        ]:
            new, old = weights.get(name), own.get(name)
            if not torch.is_tensor(new) or old is None or new.shape[1:] != old.shape[1:]:
                continue # check_fit says what is wrong, if anything is
            check(min(len(old), len(new)) >= needed, f"the weights know {len(new)} {what} {needed}")
            weights[name] = torch.cat((new[:len(old)].to(old), old[len(new):]))
        check_fit(own, weights)
        self.load_state_dict(weights)

    # ---- what a subclass inherits

    # what each claim of a class is about. A subclass that redefines one of the methods on the right loses the claim
    rests_on = {
        'loss_name': ('forward', 'corrupt', 'shift', 'next_token_logits', 'next_token_loss'),
        'nll_bound': ('forward', 'corrupt', 'shift', 'next_token_logits'),
        'generate': ('attentions', 'corrupt', 'shift', 'next_token_logits'),
        'metrics': ('attentions', 'corrupt', 'shift', 'next_token_logits'),
    }

    def __init_subclass__(cls, **options):
        """
        A lost loss_name becomes 'ce', a lost bound_name None; lost views() and metrics() are empty; lost nll_bound,
        nll_order and generate say what to define.
        A claim that still holds is kept by naming it in the class: `generate = MDLM.generate` (text is still written by
        filling in [MASK]), `bound_name = 'nelbo'` (nll_bound and nll_order still hold).
        A subclass of GPT itself that redefines forward alone, say with smoothed labels, has no bound, but it keeps
        generate and metrics: these ask next_token_logits, which its forward is trusted to train.
        """
        super().__init_subclass__(**options)
        drop_false_claims(cls)

# what a class that may say nothing says
NOTHING_SAID = {'loss_name': 'ce', 'views': lambda self: {}, 'metrics': lambda self, *args, **batch: {}}

def drop_false_claims(cls):
    """ replace, in a new class, the inherited claims that rest on something it changed: see GPT.__init_subclass__ """
    nearest = next(vars(c) for c in cls.__mro__ if 'nll_bound' in vars(c) or 'bound_name' in vars(c))
    bound_name = nearest.get('bound_name', 'nelbo') # the weaker claim, if somebody defined a bound and no name for it
    for claim, grounds in cls.rests_on.items():
        if not hasattr(cls, claim):
            continue
        about_bound = claim in ('nll_bound', 'nll_order') # naming bound_name renews these claims too
        owner = nearest_owner(cls, *([claim, 'bound_name'] if about_bound else [claim]))
        changed = changed_since(cls, owner, grounds)
        if changed:
            setattr(cls, claim, NOTHING_SAID.get(claim) or not_inherited(cls, claim, owner, changed))
        if changed and claim == 'nll_bound':
            bound_name = None
    cls.bound_name = bound_name

def nearest_owner(cls, *names):
    """ the first class of the mro that gives one of these names a value, None where none does """
    return next((c for c in cls.__mro__ if any(vars(c).get(name) is not None for name in names)), None)

def changed_since(cls, owner, names):
    """ which of these names differ between cls and owner; if owner is a mixin, of those that it has """
    names = [name for name in names if hasattr(owner, name) or issubclass(owner, GPT)]
    return [name for name in names if getattr(cls, name, None) != getattr(owner, name, None)]

def not_inherited(cls, claim, owner, changed):
    """ a method that says why cls has no `claim` of `owner` """
    @functools.wraps(getattr(owner, claim)) # sample.py reads the parameters of generate
    def refuse(self, *args, **options):
        raise UserError(
            f"{cls.__name__} defines its own {', '.join(changed)}, so {claim} of {owner.__name__} is not about it: "
            f"define {claim} in {cls.__name__}, "
            f"or write {claim} = {owner.__name__}.{claim} there if it holds all the same")
    return refuse

def drop(x, module):
    """ dropout, if the module trains with any """
    return F.dropout(x, module.dropout) if module.training and module.dropout else x

def check_length(T, room):
    if T > room: # not check(): torch.compile would have to trace the sentence
        raise UserError(f"{T} tokens do not fit the context of {room}: raise block_size, or give fewer")

def mean_over(name, values, among):
    """ {name: the mean of values (B, T) where among (B, T) is True}; {} if it is True nowhere: there is no mean """
    chosen = values[among].float()
    return {name: chosen.mean().item()} if len(chosen) else {}

# -----------------------------------------------------------------------------
# masked diffusion: hide tokens, fill them in

class Denoiser(GPT):
    """
    denoise: a provider corrupted idx and kept the original in targets; fill it in. Also what all masked diffusion
    shares: one or two streams of attention, and writing by filling in.
    """
    loss_name, bound_name = 'ce', None # whatever the provider's corruption is, its cross-entropy bounds no likelihood
    attentions = ('full', 'causal', 'block', 'hierarchical')
    favourite_order = 'random' # of generate, see there
    two_streams = False # is it trained on a noisy and a clean copy of the text at once?
    # sample_t and nelbo are about the loss alone: a bound draws its own levels, over all of (0, 1]
    rests_on = {
        'loss_name': ('forward', 'corrupt', 'groups', 'scored', 'ce', 'sample_t', 'nelbo', 'loss_rows', 'enough_rows'),
        'nll_bound': ('forward', 'corrupt', 'groups', 'scored', 'ce', 'denoise'),
        'nll_order': ('forward', 'corrupt', 'groups', 'scored', 'denoise'),
        'generate': ('forward', 'corrupt', 'groups', 'scored'),
        'metrics': ('forward', 'corrupt', 'groups', 'scored', 'denoise'),
        'views': ('forward',),
    }

    def __init__(self, config):
        super().__init__(config)
        c = self.config
        self.check_fields()
        cut = c.diffusion_block_size if c.attention == 'block' or self.two_streams else None
        self.register_buffer('ids', block_ids(c.attention, c.block_size, cut, c.lengths), persistent=False)
        self.id_list = self.ids.tolist() # for decisions that must not wait for a device
        lengths = c.lengths if c.attention == 'hierarchical' else []
        edges = torch.tensor(list(itertools.accumulate(lengths[:-1]))) # where the later segments begin
        segment = (torch.arange(c.block_size)[:, None] >= edges).sum(1) if len(edges) else torch.zeros_like(self.ids)
        self.register_buffer('segment', segment, persistent=False) # the number of every position's segment
        self._masks = {} # built once per length and device
        self.met_corruption = False # see check_corrupted

    def check_fields(self):
        c, name = self.config, type(self).__name__
        check(c.mask_id is not None, f"{name} needs mask_id, the id that a hidden token reads as")
        check(0 <= c.t_min < c.t_max <= 1, f"t_min {c.t_min} and t_max {c.t_max} must be in order within [0, 1]")
        check(c.attn_backend != 'flex' or c.dropout == 0,
              "FlexAttention has no dropout on attention weights: set dropout=0 or attn_backend=sdpa")
        check(c.ar_weight >= 0, f"ar_weight is {c.ar_weight}, expected 0 (off) or more")
        check(c.ar_weight == 0 or type(self).forward is not Denoiser.forward,
              f"{name} has no next-token loss: leave ar_weight out")
        check(self.two_streams or not c.clean_causal,
              f"clean_causal is about the clean stream of bd3lm, and {name} has none: leave it out")
        check(c.clean_causal or c.ar_weight == 0 or not self.two_streams,
              "ar_weight needs clean_causal=True: else a clean token sees the next one")

    @property
    def row_length(self):
        return self.config.block_size

    @property
    def blockwise(self):
        """ True: generate and bounds take one block after another, given clean ones. False: the whole row at once """
        return self.two_streams or self.config.attention == 'hierarchical'

    @property
    def lead(self):
        """ clean rows before the text: 1 for the begin id, if there is a clean stream for it to begin, or 0 """
        return int(self.two_streams and self.config.begin_id is not None)

    @property
    def question(self):
        """ see mask_mod: id of the prompt's last block, if later segments are causal within their blocks """
        return self.lead if self.config.causal_within_block else None

    # ---- streams of attention

    def one_stream(self, xt, block_ids=None, only=None):
        """
        xt (B, T), some of it hidden, sees itself through the attention pattern: states (B, T, C).
        only (R,): flat indices into the B * T states; returns (R, C).
        """
        T, pos = xt.size(1), torch.arange(xt.size(1), device=xt.device)
        check_length(T, self.config.block_size)
        if self.must_be_ours(block_ids, only):
            self.check_blocks(block_ids, *xt.shape, own=True)
        elif block_ids is not None: # any others are a mask like any other
            check_shape(block_ids, *xt.shape)
        if block_ids is not None:
            mask = self.mask(block_ids)
        elif self.id_list[T - 1] == 0: # one block
            mask = 'full'
        elif self.config.attention == 'causal':
            mask = 'causal'
        else:
            mask = self.kept((T, xt.device), lambda: self.mask(self.ids[:T]))
        return self.trunk(self.embed(xt, pos), pos, mask, only=only)

    def two_stream(self, xt, x0, block_ids=None, clean_too=False, only=None):
        """
        Every block of xt (B, T) sees itself and the clean blocks of x0 (B, T) before it, in one pass for all blocks:
        states (B, T, C). A token stands at the same position in both copies.
        clean_too: also return the clean stream's states (of begin, x0[0], ..., x0[T-2]), after the noisy ones.
        only (R,): flat indices into the B * T noisy states; returns (R, C). With it, the block_ids of a hierarchy must
          be the config's, but for pads.
        """
        T, lead = xt.size(1), self.lead
        check_length(T, self.config.block_size)
        # whose blocks: the config's (None), the config's with pads (rows of a hierarchy), or anybody's
        with_pads = self.must_be_ours(block_ids, only)
        foreign = block_ids is not None and not with_pads
        if block_ids is not None:
            self.check_blocks(block_ids, *xt.shape, own=with_pads)
        # n: how many clean tokens take part, counted from the first
        if clean_too:
            n = T - 1 # each predicts the next one, so all but the last
        elif foreign:
            n = T # somebody may look at any
        else:
            n = self.id_list.index(self.id_list[T - 1]) # nobody looks at the clean copy of the last block
        # q: how many noisy tokens do not: nobody asks for those of a question
        q = self.config.lengths[0] if with_pads and not clean_too else 0
        clean = F.pad(x0[:, :n], (lead, 0), value=self.config.begin_id or 0)
        if clean.size(1) == 0: # one block spans the sequence
            return self.one_stream(xt, block_ids, only)
        if block_ids is None:
            mask = self.kept((T, n, xt.device), lambda: self.two_stream_mask(self.ids[:T], T, n))
        else:
            mask = self.two_stream_mask(block_ids, T, n, q, foreign)
        pos = torch.cat((torch.arange(q, T, device=xt.device) + lead, torch.arange(n + lead, device=xt.device)))
        x = self.embed(torch.cat((xt[:, q:], clean), dim=1), pos)
        if q: # re-index without the q columns of the question; who asked for one of them gets any state
            only = (only // T * (T - q) + only % T - q).clamp(min=0)
        return self.trunk(x, pos, mask, first=None if clean_too else T - q, only=only)

    def two_stream_mask(self, ids, T, n, q=0, foreign=False):
        """
        The rule for T noisy rows, less the first q, followed by begin and n clean rows: a TwoStreamMask.
        ids (T,) or (B, T). Unless they are foreign, they are the config's but for pads, so where to cut the rows into
        runs is known without waiting for a device. FlexAttention needs no cuts.
        """
        lead, cut = self.lead, not foreign and not self.flex(ids.device)
        T = T - q # noisy rows, from here on
        row = torch.arange(T + n + lead, device=ids.device)
        block = torch.cat((ids[..., q:] + lead, F.pad(ids[..., :n] + lead, (lead, 0))), dim=-1)
        noisy_ids, clean_ids = self.id_list[q:q + T], [0] * lead + [i + lead for i in self.id_list[:n]]
        noisy, clean = [], []
        for start, end in whole_blocks(noisy_ids, 128) if cut else [(0, T)]:
            # the last row of a run sees the most: the clean rows before its own block. The mask says who sees fewer
            past = lead + (min(n, self.id_list.index(noisy_ids[end - 1])) if cut else n)
            keys = torch.cat((row[start:end], row[T:T + past]))
            noisy.append((end - start, past, self.mask(block, row < T, row[start:end], keys)))
        if self.config.clean_causal:
            return TwoStreamMask(noisy, [(n + lead, n + lead, 'causal')])
        for start, end in whole_blocks(clean_ids, 128) if cut else [(0, n + lead)]:
            mask = self.mask(block, row < T, row[T + start:T + end], row[T:T + end])
            clean.append((end - start, end, mask))
        return TwoStreamMask(noisy, clean)

    def mask(self, block, noisy=None, rows=None, cols=None):
        """ the attention rule as the backend wants it """
        make = flex_mask if self.flex(block.device) else dense_mask
        return make(block, noisy, self.config.clean_causal, rows, cols, self.question)

    def flex(self, device):
        """ does attention on this device use FlexAttention where there is a mask? """
        c = self.config
        return c.attn_backend == 'flex' or c.attn_backend == 'auto' and device.type == 'cuda' and c.dropout == 0

    def kept(self, key, make):
        """ masks of whole batches are built once per length and device """
        if key not in self._masks:
            with torch.inference_mode(False): # training may use a mask that generate needed first
                self._masks[key] = make()
        return self._masks[key]

    def must_be_ours(self, block_ids, only):
        """ must these block ids be the config's, but for pads? So it is where rows of a hierarchy are scored """
        return block_ids is not None and only is not None and self.config.attention == 'hierarchical'

    def check_blocks(self, block_ids, B, T, own=False):
        """
        A sentence for block ids (T,) or (B, T) from outside that would be computed as something else. They must not
        fall along a row, except at pads. Pads have the largest id of the row, larger than any of the config: nobody
        sees a later block, so nobody sees them.
        own: they must be the config's, but for pads.
        A training step on a GPU looks at their shape only, because values would have to be waited for; train.py looks
        at the first batch of every run, and every evaluation at its own. On a CPU a step looks at all values, which is
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
        """ the most blocks that a row of T tokens may have if its ids come from outside """
        return max(T, self.id_list[T - 1] + 2) # one per token, or the config's and pads

    # ---- training

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

    def ce(self, x, targets, rows):
        """ states x (R, C) of rows (R,), flat indices into targets (B, T) -> logits (R, V) and cross-entropies (R,) """
        logits = self.logits(x)
        return logits, F.cross_entropy(logits, targets.flatten()[rows].clamp(min=0), reduction='none')

    def check_corrupted(self, idx, targets):
        """
        A sentence if nothing that is scored is corrupted: the loss would only teach to copy. Looked at until a first
        batch has a corrupted token: a provider that corrupts little may leave a small batch as it is, and no later
        batch has to wait for the device.
        """
        if not self.met_corruption:
            scored = targets != -1
            self.met_corruption = bool((scored & (idx != targets)).any())
            check(self.met_corruption or not scored.any(),
                  "nothing is hidden: denoise fills in what the Provider in provider.py of a dataset corrupted, "
                  "and in these rows every scored token stands in idx as it is in targets")

    def nll_bound(self, idx, targets, n_samples=1, block_ids=None):
        raise NotImplementedError("denoise has no likelihood bound: how a provider corrupts is no process that "
                                  "generates text; train mdlm or bd3lm")

    @torch.no_grad()
    def metrics(self, idx, targets, block_ids=None):
        """ {'accuracy': of the tokens that the provider asks for}; {} where it asks for none """
        logits, _ = self(idx, None, block_ids)
        return mean_over('accuracy', logits.argmax(-1) == targets, targets != -1)

    # ---- writing: the steps are below, under "how masked and block diffusion write"

    @torch.no_grad()
    def generate(self, idx, max_new_tokens, *, steps=None, sampler='first_hitting', order=None, schedule='linear',
                 confidence_threshold=None, entropy_budget=None, temperature=1.0, top_k=None, top_p=None, remask=0.0,
                 guidance=0.0, stop=None, on_step=None, block_ids=None):
        """
        Fill in every -1 of idx (B, T), anywhere, and max_new_tokens more: (B, T + max_new_tokens). Given tokens stay.
        Block by block, each given the finished blocks before it, whose keys and values are cached, exactly.
        sampler: how many tokens of each row a network call reveals, and which of these options say so: see SAMPLERS.
        order: which tokens come first, random | confidence | entropy | margin | left_to_right, see ORDERS. None takes
          what measured best: for fixed and ancestral random, because the most confident positions tend to be adjacent,
          and adjacent tokens drawn independently contradict each other; otherwise the class's favourite_order.
        steps: reverse steps of a row, split evenly over the blocks that it has to fill. None: one per token. A row
          waits while others fill a block, so the slowest row of every block decides the number of calls.
        schedule: linear | cosine, which reveals few tokens at first and many at the end, when more is known.
        remask: after each step of a block but its last, this share of what the block has written, rounded down, is
          hidden again: the tokens that were drawn with the least probability (https://arxiv.org/abs/2503.00307).
        guidance: w in logits = u + (1 + w)(c - u), where c are the logits and u those with the given tokens hidden
          (https://arxiv.org/abs/2207.12598). A step costs two network calls.
        stop: a token id. After a row writes it, the rest of the row (with segments: of the segment, except that the
          last one ends with the text) is filled with it; later segments see the block that contains it and nothing
          after it.
        block_ids (B, all columns): the config's, except that pads have a larger id.
        on_step(step, idx, probs, state): called after every step with the text so far (-1: not yet written), the
          distributions (R, V) of the tokens just revealed and {'nfe': network calls, 'done': leading columns that will
          not change any more in any row, except after a stop, 'total': columns}.
        A row is written as if it were alone, unless the text outgrows the context: then rows share their windows.
        """
        check_options(locals())
        check_sampler(sampler, steps=steps, order=order, schedule=schedule, remask=remask,
                      confidence_threshold=confidence_threshold, entropy_budget=entropy_budget)
        if order is None:
            order = 'random' if sampler in ('fixed', 'ancestral') else self.favourite_order
        option, bound = BOUNDS.get(sampler, (None, None))
        given = {'confidence_threshold': confidence_threshold, 'entropy_budget': entropy_budget}.get(option)
        rule = Rule(sampler, order, bound if given is None else given, steps, schedule, remask, guidance,
                    temperature, top_k, top_p)
        out = lengthened(idx, max_new_tokens)
        check(not guidance or (out != -1).any(1).all(),
              "guidance compares with a text whose prompt is hidden, and there is a row without a prompt")
        return self.write(out, rule, stop, on_step, self.pads(out, block_ids, stop))

    def write(self, out, rule, stop, on_step, pads):
        return write(self, out, rule, stop, on_step, pads)

    def windows(self, unknown):
        """
        Which windows of the text are filled in which order, and which blocks in each, counted from the window's start:
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
        The windows for unknown (N,) or (B, N), with the number of steps of every block:
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
        the config's. After a stop, end_segments adds more. None: there will be none.
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

def bell(u):
    """
    u (n,), uniform on (0, 1] -> t (n,) in (0, 1], distributed as Beta(2, 2): the inverse of 3 t^2 - 2 t^3.
    Near 0 it is a product of positive terms, where the textbook's 1/2 - sin(asin(1 - 2u) / 3) cancels to 0; near 1 it
    is that by symmetry.
    """
    exact = u if u.device.type == 'mps' else u.double() # MPS has no float64; elsewhere t never falls where u grows
    near = torch.minimum(exact, 1 - exact)
    angle = near.sqrt().asin() / 3
    t = 2 * angle.sin() * (angle + math.pi / 3).sin()
    return torch.where(exact < 0.5, t, 1 - t).to(u.dtype)

class MDLM(Denoiser):
    """
    mdlm: masked diffusion (https://arxiv.org/abs/2406.07524, https://arxiv.org/abs/2502.09992). A token is hidden with
    probability t, the noise level, which is drawn once per row. Of a hierarchy it is drawn once per block, and training
    shows noisy earlier blocks where generate has clean ones, so the loss ('ce') is not the bound; bd3lm has both.
    """
    bound_name = 'nelbo'
    generate = Denoiser.generate # [MASK] is what hides tokens in training too
    # on tiny shakespeare, an ar model gives samples in this order 2.58 nats/char, in the others 2.62 to 2.89
    favourite_order = 'margin'
    scores_orders = True # has it a likelihood for every deterministic order, nll_order?

    @property
    def loss_name(self):
        """ in expectation the loss is the bound, unless levels are drawn otherwise or another loss is added """
        c = self.config
        usual = (c.t_min, c.t_max, c.t_dist, c.single_ratio_per_sequence, c.ar_weight) == (0, 1, 'uniform', True, 0)
        return 'nelbo' if usual and self.two_streams == self.blockwise else 'ce'

    def groups(self, idx, block_ids=None):
        """ which tokens share a noise level, (B, T) int, and how many groups a row may have """
        if not self.blockwise:
            return torch.zeros_like(idx), 1
        T = idx.size(1)
        if block_ids is None:
            return self.ids[:T].expand_as(idx), self.id_list[T - 1] + 1
        self.check_blocks(block_ids, *idx.shape)
        return block_ids.expand_as(idx), self.most_blocks(T)

    def scored(self, targets, groups):
        """ tokens that count and may be hidden, (B, T) bool. The question of a hierarchy is given, never asked for """
        return (targets != -1) & (groups > 0) if self.config.attention == 'hierarchical' else targets != -1

    def sample_t(self, n, device=None, used=None):
        """
        n noise levels in (0, 1]. Stratified: one level from each of n equal bins, so that the draw of t does not
        dominate the loss's variance; shuffled, so that level and position are independent.
        used (n,) bool: only these levels matter, so they share the bins among themselves.
        """
        if used is None:
            bins, n_bins = torch.randperm(n, device=device), n
        else:
            bins = (torch.rand(n, device=device) + ~used).argsort().argsort() # ranks; the used ones come first
            n_bins = used.sum().clamp(min=1)
        t = ((bins + (1 - torch.rand(n, device=device))) / n_bins).clamp(max=1) # never 0, however many
        t = bell(t) if self.config.t_dist == 'bell' else t
        return self.config.t_min + (self.config.t_max - self.config.t_min) * t

    def corrupt(self, idx, targets, block_ids=None):
        """ hide tokens of idx (B, T) -> xt, masked (bool) and the noise levels t, all (B, T) """
        groups, G = self.groups(idx, block_ids)
        scored = self.scored(targets, groups)
        if not self.config.single_ratio_per_sequence:
            t = self.sample_t(idx.numel(), idx.device).view(idx.shape)
        elif self.two_streams and self.config.diffusion_block_size == 1:
            t = torch.ones(idx.shape, device=idx.device) # one token per block: if it is not hidden, nothing is learned
        else:
            used = None
            if block_ids is not None: # groups without a scored token need no level
                used = groups.new_zeros(len(idx), G).scatter_reduce(1, groups, scored.long(), 'amax').flatten() > 0
            t = self.sample_t(len(idx) * G, idx.device, used).view(-1, G).gather(1, groups)
        masked = (torch.rand(idx.shape, device=idx.device) < t) & scored
        return idx.masked_fill(masked, self.config.mask_id), masked, t

    def nelbo(self, x, rows, targets, masked, t, block_ids=None):
        """ states x (R, C) of the rows (R,) -> their logits and the loss: nats per scored token """
        groups, _ = self.groups(targets, block_ids)
        logits, ce = self.ce(x, targets, rows)
        if self.config.single_ratio_per_sequence:
            weight = 1 / t # a token is hidden with probability t, so this undoes how rarely we ask about it
        else:
            weight = torch.full_like(t, 2 / (self.config.t_min + self.config.t_max))
        weight = weight.masked_fill(~masked, 0) # not times masked: a tiny t may give inf, and inf * 0 is NaN
        return logits, (ce * weight.flatten()[rows]).sum() / self.scored(targets, groups).sum().clamp(min=1)

    def loss_rows(self, masked, block_ids=None):
        """
        Which states the loss needs, (R,) flat indices into masked (B, T): the hidden tokens first, then others up to a
        fixed number. A number that varied would make the GPU wait, and torch.compile trace anew.
        """
        enough = self.enough_rows(*masked.shape, block_ids)
        return masked.flatten().int().argsort(descending=True, stable=True)[:enough]

    def enough_rows(self, B, T, block_ids=None):
        """
        The mean number of hidden tokens and 6 standard deviations. Once in 10^9 steps more are hidden, and those are
        left out of that loss.
        """
        c, G = self.config, B * (self.id_list[T - 1] + 1 if self.blockwise else 1)
        if block_ids is not None and c.attention == 'hierarchical':
            return B * max(0, T - c.lengths[0]) # all but the question
        if block_ids is not None or self.two_streams and c.diffusion_block_size == 1:
            return B * T
        sizes = Counter(self.id_list[:T]).values() if self.blockwise else [T]
        if not c.single_ratio_per_sequence:
            variance = 0 # a level per token averages out
        elif len(set(sizes)) == 1:
            variance = 1 / (12 * G ** 3) # G levels, each with variance 1 / (12 G^2) in its bin, are averaged
        else:
            variance = 1 / G # stratified levels of unequal groups: as if drawn freely
        share = (c.t_min + c.t_max) / 2 + 6 * math.sqrt(variance + 0.25 / (B * T))
        return min(B * T, math.ceil(B * T * share))

    def forward(self, idx, targets=None, block_ids=None):
        if targets is None:
            return self.logits(self.one_stream(idx, block_ids)), None
        ar_loss = 0
        if self.config.ar_weight > 0: # half of the rows teach the next token, so a step costs what it did
            half = len(idx) // 2
            check(half, "ar_weight needs batch_size of at least 2: mdlm takes half of the rows for the next-token loss")
            ar_loss = self.config.ar_weight * GPT.forward(self, idx[:half], targets[:half])[1]
            if block_ids is not None and block_ids.shape == idx.shape: # otherwise all rows share the ids
                block_ids = block_ids[half:]
            idx, targets = idx[half:], targets[half:]
        # corrupt
        xt, masked, t = self.corrupt(idx, targets, block_ids)
        # attend
        rows = self.loss_rows(masked, block_ids)
        x = self.one_stream(xt, block_ids, rows)
        # loss
        logits, loss = self.nelbo(x, rows, targets, masked, t, block_ids)
        return logits, loss + ar_loss

    def views(self):
        """ with a causal clean stream, or a next-token loss, the weights are a GPT too """
        return {'ar': as_ar(self)} if self.config.clean_causal or self.config.ar_weight else {}

    # ---- likelihood

    def denoise(self, xt, x0, block_ids=None, only=None):
        """ states as in generate: where it writes block by block, each noisy block sees the clean ones before it """
        if self.blockwise:
            return self.two_stream(xt, x0, block_ids, only=only)
        return self.one_stream(xt, block_ids, only)

    @torch.no_grad()
    def nll_bound(self, idx, targets, n_samples=1, block_ids=None):
        """
        An upper bound on -log p of the scored tokens in nats: unbiased estimates (B, n_samples), and how many tokens
        (B,). Revealing the n tokens of a group one by one in random order costs, with k still hidden, the mean
        cross-entropy of those k, summed over k = 1..n. One k is drawn (stratified over samples) and counts for all n,
        so each of its k hidden tokens counts n/k (https://arxiv.org/abs/2502.09992). Exact if groups have one token.
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
        Exact -log p of the text in nats (B,), and its scored tokens (B,), under the model that reveals one token per
        call in a deterministic order, a function of what is revealed so far (https://arxiv.org/abs/2603.01367):
        left_to_right | confidence | entropy | margin. That is another model than the one of nll_bound, so its number
        may lie on either side of that bound. Costs as many passes as a block has tokens.
        """
        check(order in ORDERS, f"order is {order!r}, expected one of {', '.join(ORDERS)}")
        (groups, G), T = self.groups(idx, block_ids), idx.size(1)
        at = torch.arange(T, device=idx.device).expand_as(idx)
        scored = hidden = self.scored(targets, groups)
        nats = torch.zeros(len(idx), device=idx.device)
        while hidden.any():
            x = self.denoise(idx.masked_fill(hidden, self.config.mask_id), idx, block_ids)
            log_p = self.logits(x).log_softmax(-1)
            key = ORDERS[order](log_p.exp()).masked_fill(~hidden, -math.inf) # (B, T)
            best = key.new_full((len(idx), G), -math.inf).scatter_reduce(1, groups, key, 'amax')
            tied = hidden & (key == best.gather(1, groups))
            first = at.new_full(best.shape, T).scatter_reduce(1, groups, at.masked_fill(~tied, T), 'amin')
            reveal = tied & (at == first.gather(1, groups)) # of every group, the first of the best
            found = log_p.gather(2, targets.clamp(min=0)[..., None])[..., 0]
            nats = nats - found.masked_fill(~reveal, 0).sum(1)
            hidden = hidden & ~reveal
        return nats, scored.sum(1)

    @torch.no_grad()
    def metrics(self, idx, targets, block_ids=None):
        """
        {name: the share of hidden tokens whose likeliest guess is right}, for three shares of hidden tokens; a name is
        left out where nothing was hidden, by chance
        """
        groups, _ = self.groups(idx, block_ids)
        found, scored = {}, self.scored(targets, groups)
        for level in 15, 50, 85:
            masked = scored & (torch.rand(idx.shape, device=idx.device) < level / 100)
            logits = self.logits(self.denoise(idx.masked_fill(masked, self.config.mask_id), idx, block_ids))
            found |= mean_over(f'accuracy_{level}_hidden', logits.argmax(-1) == targets, masked)
        return found

def hierarchical_ids(T, n, segments):
    """ see block_ids; n: tokens per block, None for whole segments """
    check(segments and sum(segments) == T,
          f"segments {segments} add up to {sum(segments or [0])}, the row has {T} tokens")
    ids, first = [], 0
    for i, length in enumerate(segments):
        block = length if i == 0 or n is None else n # the question is never cut
        ids.append(first + torch.arange(length) // block)
        first = int(ids[-1][-1]) + 1
    return torch.cat(ids)

def segment_lengths(segments):
    """ '32,32,64' or 'question:32,plan:32,execution:64' -> [32, 32, 64]; '' or None -> [] """
    parts = [part.rpartition(':')[2].strip() for part in segments.split(',')] if segments else []
    check(not parts or len(parts) > 1 and all(n.isdecimal() and int(n) > 0 for n in parts),
          f"segments is {segments!r}, expected lengths like 32,32,64")
    return [int(n) for n in parts]

def check_shape(block_ids, B, T):
    if block_ids.dtype != torch.long or block_ids.shape not in ((T,), (1, T), (B, T)):
        raise UserError(f"block_ids are {block_ids.dtype} of shape {tuple(block_ids.shape)}, "
                        f"expected torch.int64 of ({T},) or ({B}, {T})")

def dense_mask(block, noisy=None, clean_causal=False, rows=None, cols=None, question=None):
    """
    mask_mod as a bool matrix, True = may look: (N, N) for block (N,), (B, 1, N, N) for block (B, N).
    rows, cols: indices of some rows and columns; None: all.
    """
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
    mod = mask_mod(block, noisy, clean_causal, question)
    q, k = i if rows is None else rows, i if cols is None else cols
    return create_block_mask(lambda b, h, q_idx, kv_idx: mod(b, h, q[q_idx], k[kv_idx]),
                             block.size(0) if block.dim() > 1 else None, None, len(q), len(k), device=block.device)

def flex_attend(q, k, v, mask):
    from torch.nn.attention.flex_attention import flex_attention
    check(q.is_cuda or not q.requires_grad,
          "FlexAttention has no backward pass on this device: use attn_backend=sdpa")
    flex = flex_attention if torch.compiler.is_compiling() or not q.is_cuda else compiled(flex_attention)
    return flex(q, k, v, block_mask=mask)

@functools.cache
def compiled(fn):
    """ FlexAttention is only fast (and only saves memory) when compiled; once per process is enough """
    return torch.compile(fn)

# -----------------------------------------------------------------------------
# block diffusion: masked diffusion in one block after another

class TwoStreamMask:
    """
    The mask of noisy rows followed by clean rows, cut into runs of at least 128 rows that split no block. A noisy run
    looks at itself and at the first `past` clean rows, a clean run only at the latter. That leaves out most of what is
    False in the dense matrix, with which a step of bd3lm on a CPU takes 0.96 | 1.07 | 1.29 times as long for 128 | 256
    | 512 tokens.
    noisy, clean: lists of (rows, past, mask).
    """
    def __init__(self, noisy, clean):
        self.noisy, self.clean = noisy, clean

    def attend(self, q, k, v, dropout_p):
        """ see attend. In the last layer q has the noisy rows only, because nobody needs the clean ones there """
        T = sum(rows for rows, _, _ in self.noisy)
        (qn, qc), (kn, kc), (vn, vc) = (x.split((T, x.size(2) - T), dim=2) for x in (q, k, v))
        sizes = [rows for rows, _, _ in self.noisy]
        parts = []
        for (_, past, mask), q, k, v in zip(self.noisy, *(x.split(sizes, dim=2) for x in (qn, kn, vn))):
            k, v = torch.cat((k, kc[:, :, :past]), dim=2), torch.cat((v, vc[:, :, :past]), dim=2)
            parts.append(attend(q, k, v, mask, dropout_p))
        if qc.size(2):
            for (_, past, mask), q in zip(self.clean, qc.split([rows for rows, _, _ in self.clean], dim=2)):
                parts.append(attend(q, kc[:, :, :past], vc[:, :, :past], mask, dropout_p))
        return torch.cat(parts, dim=2)

def whole_blocks(ids, size):
    """ cut a row into runs of at least `size` tokens that split no block: [(start, end), ...]; ids is a list """
    edges = [0]
    for i in range(1, len(ids)):
        if ids[i] != ids[i - 1] and i - edges[-1] >= size:
            edges.append(i)
    return list(zip(edges, edges[1:] + [len(ids)]))

class BD3LM(MDLM):
    """
    bd3lm: block diffusion (https://arxiv.org/abs/2503.09573). Blocks are written left to right, the tokens of a block
    by masked diffusion. The noise level is drawn once per block. Trained on a noisy and a clean copy of the text.
    """
    attentions = ('block', 'hierarchical')
    bound_name = 'nelbo' # its forward hides what mdlm's hides, so all that mdlm says of itself holds here too
    loss_name, generate, metrics, views = MDLM.loss_name, MDLM.generate, MDLM.metrics, MDLM.views
    favourite_order = 'left_to_right' # blocks of 4: 1.56 nats/char by an ar model, 1.77 to 2.19 in the others
    two_streams = True

    def forward(self, idx, targets=None, block_ids=None):
        if targets is None: # what every block predicts given the clean ones before it
            return self.logits(self.two_stream(idx, idx, block_ids)), None
        # corrupt
        xt, masked, t = self.corrupt(idx, targets, block_ids)
        # attend
        T, rows, dual = idx.size(1), self.loss_rows(masked, block_ids), self.config.ar_weight > 0
        if dual:
            both = self.two_stream(xt, idx, block_ids, clean_too=True)
            x = both[:, :T].flatten(0, 1)[rows]
        else:
            x = self.two_stream(xt, idx, block_ids, only=rows)
        # loss
        logits, loss = self.nelbo(x, rows, targets, masked, t, block_ids)
        if dual: # the clean rows are a GPT: their next-token loss costs no pass
            _, targets = self.shift(idx, targets)
            loss = loss + self.config.ar_weight * self.next_token_loss(self.logits(both[:, T:]), targets)
        return logits, loss

    def flops_per_token(self):
        """
        Two streams, less what nobody needs of the clean one: its head and its last layer, or all of it where one block
        spans the row.
        """
        one, head, dual = super().flops_per_token(), 6 * self.lm_head.weight.numel(), self.config.ar_weight > 0
        if self.id_list[-1] == 0 and not dual and not self.lead:
            return one
        return 2 * one - (0 if dual else head + (one - head) / self.config.n_layer)

@dataclass
class AOConfig(GPTConfig):
    """ the setting of any order """
    left_to_right: float = free(0.1) # share of the training rows in the order left to right; others have random orders

class AOGPT(BD3LM):
    """
    aogpt: any-order GPT, as sigma-GPT (https://arxiv.org/abs/2404.09562) and AO-GPT (https://arxiv.org/abs/2506.19935)
    have it: every row of training has a random order of its own, and each token is predicted given its position and the
    tokens before it in that order, wherever they stand. The block ids of bd3lm are permuted, and nothing else: a noisy
    token is [MASK] at its position, XLNet's query (https://arxiv.org/abs/1906.08237).
    With diffusion_block_size=k the groups that are written together have k tokens, and masked diffusion inside.
    """
    config_class = AOConfig
    usual_block_size = 1
    favourite_order = 'random'
    bound_name = 'nelbo' # its mean over random orders
    generate = BD3LM.generate # what is hidden reads as [MASK], and generate asks about it in the same way
    fixed_order = False # see in_order
    rests_on = {claim: (*grounds, 'permuted', *('parts', 'windows', 'write') * (claim == 'generate'))
                for claim, grounds in BD3LM.rests_on.items()}

    def check_fields(self):
        super().check_fields()
        c = self.config
        check(0 <= c.left_to_right <= 1, f"left_to_right is {c.left_to_right}, expected a share of the rows, 0 to 1")
        check(c.diffusion_block_size is not None, "aogpt needs diffusion_block_size, the tokens per group: 1, or more")
        check(not c.clean_causal and c.ar_weight == 0 and not c.causal_within_block,
              "clean_causal, ar_weight and causal_within_block are about text from left to right: leave them out")

    @property
    def loss_name(self):
        """ rows from left to right are not what the bound is about """
        return 'nelbo' if MDLM.loss_name.fget(self) == 'nelbo' and self.config.left_to_right == 0 else 'ce'

    @property
    def scores_orders(self):
        return self.config.diffusion_block_size == 1 and not self.fixed_order

    def must_be_ours(self, block_ids, only):
        return False # they are permuted

    def check_blocks(self, block_ids, B, T, own=False):
        check_shape(block_ids, B, T)

    def permuted(self, idx, block_ids=None, left_to_right=0.0):
        """
        Block ids (B, T) in which the tokens of every segment have random places, and those of about this share of the
        rows their own. Pads, which have the largest ids, stay where they are, and so does the question. block_ids: the
        config's, but for pads.
        """
        B, T = idx.shape
        if block_ids is not None:
            super().check_blocks(block_ids, B, T, own=True)
        ids = (self.ids[:T] if block_ids is None else block_ids).expand(B, T)
        if self.fixed_order:
            return ids
        place = torch.rand(B, T, device=idx.device)
        if left_to_right > 0:
            n = B * left_to_right + torch.rand(1, device=idx.device) # rounded up or down, so that the mean is right
            stays = torch.arange(1, B + 1, device=idx.device) <= n
            place = torch.where(stays[:, None], torch.arange(T, device=idx.device) / T, place)
        group = 2 * self.segment[:T] + (ids > self.id_list[T - 1]) # in each segment text, then pads
        ids = ids.gather(1, group.argsort(dim=1, stable=True))
        return torch.empty_like(ids).scatter(1, (group + place).argsort(1), ids)

    def enough_rows(self, B, T, block_ids=None):
        return super().enough_rows(B, T, block_ids if self.config.attention == 'hierarchical' else None)

    def forward(self, idx, targets=None, block_ids=None):
        if targets is None: # given the tokens to the left
            return self.logits(self.two_stream(idx, idx, block_ids)), None
        return super().forward(idx, targets, self.permuted(idx, block_ids, self.config.left_to_right))

    @torch.no_grad()
    def nll_bound(self, idx, targets, n_samples=1, block_ids=None):
        """
        An upper bound on -log p of the scored tokens in nats: (B, n_samples) estimates, each of a random order, and how
        many tokens, (B,). Exact given the order if groups have one token: see in_order.
        """
        if self.fixed_order:
            return super().nll_bound(idx, targets, n_samples, self.permuted(idx, block_ids))
        nats = []
        for _ in range(n_samples):
            n, scored = super().nll_bound(idx, targets, 1, self.permuted(idx, block_ids))
            nats.append(n)
        return torch.cat(nats, dim=1), scored

    def in_order(self):
        """ the same weights as the model of text from left to right: with the config's ids everywhere, as they are """
        other = copy.copy(self)
        other.fixed_order, other.favourite_order = True, 'left_to_right'
        if self.config.diffusion_block_size == 1:
            other.bound_name = 'nll'
        return other

    @torch.no_grad()
    def nll_order(self, idx, targets, order='confidence', block_ids=None):
        """
        Exact -log p of the text in nats (B,), and its scored tokens (B,), in this order: see MDLM.nll_order. A token
        also depends on the order of those before it, so they are read as generate would have written them.
        """
        check(order in ORDERS, f"order is {order!r}, expected one of {', '.join(ORDERS)}")
        check(self.config.diffusion_block_size == 1, "nll_order of aogpt needs groups of one token")
        scored = self.scored(targets, self.groups(idx, block_ids)[0])
        out, nats = idx.masked_fill(scored, -1), torch.zeros(len(idx), device=idx.device)
        pads = None if block_ids is None else (block_ids > self.id_list[-1]).expand_as(idx)
        window = OrderWindow(self, out, scored, pads, 0, idx.size(1))
        for s, e in self.parts(idx.size(1)):
            window.ask(torch.arange(s, e, device=idx.device).expand(len(idx), -1), e)
            while (hidden := out[:, s:e] == -1).any():
                b, i = hidden.nonzero(as_tuple=True)
                log_p = self.logits(window.states(0, e - s, b, i)).log_softmax(-1)
                reveal = leading(spread(ORDERS[order](log_p.exp()), hidden), hidden, hidden.any(1).long())
                own = log_p.gather(1, targets[b, s + i][:, None])[:, 0]
                nats = nats + spread(own, hidden).masked_fill(~reveal, 0).sum(1)
                out[:, s:e] = torch.where(reveal, targets[:, s:e], out[:, s:e])
        return -nats, scored.sum(1)

    def parts(self, T):
        """ [(start, end), ...], each finished before the next is begun: the text, or the segments of a hierarchy """
        lengths = self.config.lengths if self.config.attention == 'hierarchical' else []
        edges = [0, *(e for e in itertools.accumulate(lengths) if e < T), T]
        return list(zip(edges, edges[1:]))

    def windows(self, unknown):
        """ as in Denoiser, but what is written there in any order is a part, not a block """
        windows, filled = [], 0
        for start, end, _ in super().windows(unknown):
            parts = [(s, e) for s, e in self.parts(end - start) if any(unknown[max(filled, start + s):start + e])]
            windows.append((start, end, parts))
            filled = end
        return windows

    def write(self, out, rule, stop, on_step, pads):
        check(not rule.remask, "aogpt cannot hide again what it has written, because it keeps that in a cache: "
                               "leave remask out, or take mdlm or bd3lm")
        return write_any_order(self, out, rule, stop, on_step, pads)

    def views(self):
        return {} if self.fixed_order else {'left_to_right': self.in_order()}

    @torch.no_grad()
    def metrics(self, idx, targets, block_ids=None):
        """ {'accuracy': of the likeliest guesses for scored tokens, in random orders}; {} where none is scored """
        ids = self.permuted(idx, block_ids)
        groups, _ = self.groups(idx, ids)
        scored = self.scored(targets, groups)
        x = self.two_stream(idx.masked_fill(scored, self.config.mask_id), idx, ids)
        return mean_over('accuracy', self.logits(x).argmax(-1) == targets, scored)

# -----------------------------------------------------------------------------
# how masked and block diffusion write: options, then draws, orders, how many tokens a call reveals, and the loop

def not_negative(x):
    return 0 <= x <= 1e9 or x == math.inf # no nan, and no int that is too large for a float

# the options of generate, of all classes; what one means is said there: kind of value, what is expected, does it fit
WHOLE, NUMBER, NAME = 'a whole number', 'a number', 'a name'
OPTIONS = {
    'max_new_tokens': (WHOLE, '0 or more', lambda n: n >= 0),
    'steps': (WHOLE, 'at most 1,000,000', lambda n: n <= 10 ** 6), # the least: see Denoiser.plan and DFConfig
    'sampler': (NAME, None, None), # see check_sampler and DFConfig
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
    'df_scheduling_matrix': (NAME, None, None), # these two: see DFConfig
    'df_uncertainty_scale': (NUMBER, None, None),
}
KINDS = {WHOLE: numbers.Integral, NUMBER: (float, numbers.Integral), NAME: str} # bool is none of them
NEEDED = ('max_new_tokens', 'schedule', 'temperature', 'remask', 'guidance') # the others may be None: not given

def check_options(given):
    """ a sentence for an option in `given`, {name: value}, whose value is of another kind or does not fit """
    for name, value in given.items():
        if name not in OPTIONS or value is None and name not in NEEDED:
            continue
        kind, expected, fits = OPTIONS[name]
        right = isinstance(value, KINDS[kind]) and not isinstance(value, bool)
        check(right, f"{name} is {value!r}, expected {kind}, not a {type(value).__name__!r}")
        check(fits is None or fits(value), f"{name} is {value}, expected {expected}")

def lengthened(idx, n):
    """ idx (B, T) and n columns to write -> (B, T + n), -1 in the new columns """
    B, T = idx.shape
    check(max(1, B) * (T + n) <= 10 ** 8,
          f"{B} rows of {T} tokens and {n} new ones are more than the 100,000,000 tokens of one call: ask for fewer")
    return F.pad(idx, (0, n), value=-1)

# ---- drawing tokens

def token_probs(logits, temperature=1.0, top_k=None, top_p=None):
    """
    (..., V) logits -> float32 probabilities. Temperature 0 is the argmax, the first one where several are largest.
    Below 1e-6 temperature counts as 0, because logits that differ by so little differ by rounding.
    top_p keeps the token that crosses p.
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
        beyond = (before > 0) & (before >= top_p) # the tokens before this one already reach p; the first token stays
        probs = probs.masked_fill(torch.zeros_like(beyond).scatter(-1, order, beyond), 0.0)
        probs = probs / probs.sum(-1, keepdim=True)
    return probs

def draw(probs):
    """ one id per distribution, (..., V) -> (...). Not by Gumbel noise, whose tail float32 cuts off """
    return torch.multinomial(probs.flatten(0, -2), 1).view(probs.shape[:-1])

def entropy(probs):
    """ in nats, (..., V) -> (...); xlogy, because 0 log 0 is 0 here and not NaN """
    return -torch.xlogy(probs, probs).sum(-1)

# ---- choosing positions

def random_subset(groups, eligible, k):
    """ groups (B, T) int, eligible (B, T) bool: k[b, g] random eligible positions of every group, as (B, T) bool """
    r = torch.rand(groups.shape, device=groups.device).masked_fill(~eligible, 2.0)
    shuffled = r.argsort(1)
    # sorted by group, and shuffled within a group, the eligible ones first
    order = shuffled.gather(1, groups.gather(1, shuffled).argsort(dim=1, stable=True))
    sizes = torch.zeros_like(k).scatter_add(1, groups, torch.ones_like(groups))
    sorted_groups = groups.gather(1, order)
    begins = (sizes.cumsum(1) - sizes).gather(1, sorted_groups) # where each position's group begins
    rank = torch.arange(groups.size(1), device=groups.device) - begins
    chosen = rank < k.gather(1, sorted_groups)
    return torch.zeros_like(eligible).scatter(1, order, chosen) & eligible

def ranks(key, among):
    """ (B, n): the rank of each token of `among` by key, the largest key first, ties by position; all others last """
    return key.masked_fill(~among, -math.inf).argsort(dim=1, descending=True, stable=True).argsort(dim=1)

def leading(key, among, k):
    """ (B, n) bool: the first k (B,) tokens of `among` by key, or all of them if they are fewer """
    return among & (ranks(key, among) < k[:, None])

def spread(values, where):
    """ values (R,) of the R positions where `where` (B, n) is True, in their order -> (B, n), 0 elsewhere """
    return torch.zeros(where.shape, dtype=values.dtype, device=where.device).masked_scatter_(where, values)

# Which hidden token comes first: the one with the largest value, ties by position. Functions of the model's
# distributions (..., V) before temperature. Where everything is hidden every position may predict the same, so values
# are rounded: otherwise the last bit of a sum, and not the position, would decide ties
ORDERS = {
    'left_to_right': lambda probs: probs.new_zeros(probs.shape[:-1]),
    'confidence': lambda probs: probs.max(-1).values.round(decimals=4),
    'entropy': lambda probs: -entropy(probs).round(decimals=4),
    'margin': lambda probs: probs.topk(2).values.diff(dim=-1).neg().squeeze(-1).round(decimals=4),
}

# ---- how many tokens a call reveals

# the share of a block that is still hidden after a share u of its steps; exactly 0 at the end
SCHEDULES = {'linear': lambda u: 1 - u, 'cosine': lambda u: math.sin(math.pi / 2 * (1 - u))}

def reverse_steps(steps, schedule):
    """ [(t, s), ...]: the share hidden before and after each of the steps """
    at = SCHEDULES[schedule]
    return [(at(i / steps), at((i + 1) / steps)) for i in range(steps)]

def row_steps(counts, schedule):
    """
    The same for rows that take counts (B,) steps each: yields t and s, both (B,), as often as the slowest row needs.
    A row without steps left has t = 1 and s = 0, "reveal all", but nothing in it is hidden any more.
    """
    counts, row = counts.unique(return_inverse=True)
    longest = int(counts[-1])
    table = [reverse_steps(n, schedule) + [(1.0, 0.0)] * (longest - n) for n in counts.tolist()]
    table = torch.tensor(table, dtype=torch.float64) # (numbers of steps, longest, 2)
    for i in range(longest):
        yield table[row, i].unbind(1)

# A quota says how many hidden tokens of each row a call reveals, (B,), those that come first in `order`. It is known
# before the call, and where it is 0 for all rows the call is left out. hidden (B, n) bool; total (B,): how many were
# hidden when the block was begun; t and s of the step: both floats, or both (B,)

def first_hitting(hidden, total, t, s):
    """
    One. In random order this is masked diffusion in infinitely many steps, without those that reveal nothing
    (https://arxiv.org/abs/2409.02908). In any other order, at temperature 1, nll_order has its exact likelihood.
    """
    return hidden.any(1).long()

def ancestral(hidden, total, t, s):
    """ the reverse process: what is hidden at t is revealed by s < t with probability (t - s) / t, at last 1 """
    rate = torch.as_tensor(1 - s / t, dtype=torch.float32, device=hidden.device).view(-1, 1)
    return (hidden & (torch.rand(hidden.shape, device=hidden.device) < rate)).sum(1)

def fixed(hidden, total, t, s):
    """ all but a share s of the block: if linear, equal numbers per step (https://arxiv.org/abs/2502.09992) """
    share = torch.as_tensor(1 - s, dtype=torch.float32, device=hidden.device)
    due = (total * share + 1e-4).long() # 1e-4: 5 * (1 - 0.8) is 0.99...
    return (due - (total - hidden.sum(1))).clamp(min=0) # less what is written

# An acceptance says which hidden tokens a call reveals, (B, n) bool, where only its distributions can tell. rank
# (B, n): the tokens' rank in `order`; probs (R, V): the distributions of the R hidden tokens; bound: see BOUNDS

def threshold(hidden, rank, probs, bound):
    """
    All positions whose likeliest token is more probable than the bound, or else the first
    (https://arxiv.org/abs/2505.22618). What is written there is drawn afterwards.
    """
    confident = hidden & (spread(probs.max(-1).values, hidden) > bound)
    return torch.where(confident.any(1, keepdim=True), confident, hidden & (rank < 1))

def entropy_bound(hidden, rank, probs, bound):
    """
    The longest run, in order, with a sum of entropies, less the largest of them, within the bound: it limits the error
    of drawing these tokens independently (https://arxiv.org/abs/2505.24857).
    """
    h = spread(entropy(probs), hidden).gather(1, rank.argsort(dim=1))
    within = h.cumsum(1) - h.cummax(1).values <= bound # the first token is free
    n = within.sum(1, keepdim=True) # the length of the run, because the sums never fall
    return hidden & (rank < n)

QUOTAS = {'first_hitting': first_hitting, 'ancestral': ancestral, 'fixed': fixed}
ACCEPTS = {'threshold': threshold, 'entropy_bound': entropy_bound}
# the option that sets an acceptance's bound, and its default (a probability, nats)
BOUNDS = {'threshold': ('confidence_threshold', 0.9), 'entropy_bound': ('entropy_budget', 0.1)}
SAMPLERS = { # and the options that each of them reads
    'first_hitting': ('order',),
    'ancestral': ('steps', 'schedule', 'remask'), # random by nature
    'fixed': ('steps', 'order', 'schedule', 'remask'),
    'threshold': ('order', 'confidence_threshold'),
    'entropy_bound': ('order', 'entropy_budget'),
}
NEUTRAL = {'order': 'random', 'schedule': 'linear', 'remask': 0} # values that ask a sampler for nothing

def check_sampler(sampler, **options):
    """ a sentence for a name that does not exist, and for an option that this sampler would not read """
    orders, order = ('random', *ORDERS), 'random' if options['order'] is None else options['order']
    names = ('sampler', sampler, SAMPLERS), ('order', order, orders), ('schedule', options['schedule'], SCHEDULES)
    for name, value, known in names:
        check(value in known, f"{name} is {value!r}, expected one of {', '.join(known)}")
    for name, value in options.items():
        check(name in SAMPLERS[sampler] or value in (None, NEUTRAL.get(name)),
              f"sampler {sampler} has no use for {name}={value}: leave {name} out, "
              f"or take sampler {' | '.join(s for s in SAMPLERS if name in SAMPLERS[s])}")

@dataclass
class Rule:
    """ how a block is written; the fields are options of Denoiser.generate, bound is the sampler's (see BOUNDS) """
    sampler: str
    order: str
    bound: float
    steps: int
    schedule: str
    remask: float
    guidance: float
    temperature: float
    top_k: int
    top_p: float

    @property
    def needs_probs(self):
        """ must a call's distributions be known before its positions can be chosen? """
        return self.order not in ('random', 'left_to_right') or self.sampler in ACCEPTS

    def quota(self, hidden, total, t, s):
        """ how many tokens of each row to reveal, (B,); of an acceptance all that is known is whether any """
        return QUOTAS[self.sampler](hidden, total, t, s) if self.sampler in QUOTAS else hidden.any(1).long()

    def key(self, hidden, probs=None):
        """ (B, n): the hidden tokens with the largest key come first. probs: their distributions (R, V) """
        if self.order == 'random':
            return torch.rand(hidden.shape, device=hidden.device)
        if self.order == 'left_to_right':
            return torch.zeros(hidden.shape, device=hidden.device)
        return spread(ORDERS[self.order](probs), hidden)

    def choose(self, hidden, quota, probs):
        """ which hidden tokens to reveal, (B, n) bool, given the distributions probs (R, V) of all of them """
        key = self.key(hidden, probs)
        if self.sampler in QUOTAS:
            return leading(key, hidden, quota)
        return ACCEPTS[self.sampler](hidden, ranks(key, hidden), probs, self.bound)

# ---- what the network reads

class Cache:
    """
    Keys and values of every layer for up to `size` positions, so that generation reads each token once.
    A forward pass writes its keys and values after position `length`. The next pass overwrites them unless keep(n) is
    called, which advances `length` by n.
    """
    def __init__(self, model, batch, size):
        c, like = model.config, model.transformer.wte.weight
        self.kv = like.new_empty(2 * c.n_layer, batch, c.n_head, size, c.n_embd // c.n_head)
        self.size, self.length = size, 0
        self.rope = model.rotations(torch.arange(size, device=like.device), like.dtype)
        self.layers = [bare(layer) for layer in model.transformer.h]

    def open(self, pos):
        """ take the next places in all layers, for positions pos (n,) or (B, n); returns their rotations, as GPT's """
        n = pos.size(-1)
        assert self.length + n <= self.size, f"{self.length + n} positions do not fit a cache of {self.size}"
        self.new = self.kv.narrow(3, self.length, n).unbind()
        self.seen = self.kv.narrow(3, 0, self.length + n).unbind()
        if self.rope is None:
            return None
        return self.rope.narrow(1, self.length, n) if pos.dim() == 1 else self.rope[:, pos]

    def append(self, layer, k, v):
        """ k, v (B, H, n, D) of a layer -> all its keys and values so far, (B, H, length + n, D) each """
        i = 2 * layer
        self.new[i].copy_(k)
        self.new[i + 1].copy_(v)
        return self.seen[i], self.seen[i + 1]

    def keep(self, n):
        self.length += n

    def reserve(self, n):
        """ make room for n more places, if there is too little """
        if self.length + n > self.size:
            size = 2 * (self.length + n)
            kv = self.kv.new_empty(*self.kv.shape[:3], size, self.kv.size(4))
            kv[:, :, :, :self.length] = self.kv[:, :, :, :self.length]
            self.kv, self.size = kv, size

def bare(module):
    """
    What a module computes, without nn.Module's look-ups, which for one token cost as much as the arithmetic: without
    it, cached generation by a 0.8M model on a CPU takes 1.2 times as long. A module of another class, or with hooks,
    stays as it is.
    """
    if module._forward_hooks or module._forward_pre_hooks:
        return module
    if type(module) is nn.Linear:
        return functools.partial(F.linear, weight=module.weight, bias=module.bias)
    if type(module) is nn.LayerNorm:
        return functools.partial(F.layer_norm, normalized_shape=module.normalized_shape, weight=module.weight,
                                 bias=module.bias, eps=module.eps)
    if isinstance(module, (Block, Attention, MLP)):
        twin = copy.copy(module)
        for name, child in module.named_children():
            twin.__dict__[name] = bare(child) # Python looks here first, and then asks nn.Module
        return twin.forward
    return module

class Window:
    """
    Columns start to end of a text, as the network reads them: the begin id first, [MASK] where nothing is written yet.
    If the model writes block by block, a cache keeps all that stands before the current block: a block is read as clean
    text, and kept, in the first call of the block after it.
    hide_prompt: given tokens read as [MASK] too, for guidance.
    """
    def __init__(self, model, out, unknown, pads, start, end, hide_prompt=False):
        self.model, self.hide_prompt = model, hide_prompt
        # views, so that the window sees what is written and, after a stop, what becomes a pad
        self.out, self.unknown = out[:, start:end], unknown[:, start:end]
        self.pads = None if pads is None else pads[:, start:end]
        self.cache = Cache(model, len(out), model.lead + end - start) if model.blockwise else None

    def text(self, e):
        """ what the network reads up to column e, without what the cache keeps: (B, n) """
        lead, mask_id = self.model.lead, self.model.config.mask_id
        first = self.cache.length if self.cache else 0
        here = slice(max(0, first - lead), e)
        text = self.out[:, here]
        text = text.masked_fill(text == -1, mask_id)
        if self.hide_prompt:
            text = text.masked_fill(~self.unknown[:, here], mask_id)
        return F.pad(text, (lead, 0), value=self.model.config.begin_id) if first < lead else text

    def block_ids(self, e):
        """ ids of the begin id and of columns 0 to e, (lead + e,); (B, lead + e) where there may be pads """
        model, lead = self.model, self.model.lead
        ids = F.pad(model.ids[:e] + lead, (lead, 0))
        if self.pads is None:
            return ids
        pads = F.pad(self.pads[:, :e], (lead, 0))
        return ids.expand_as(pads).masked_fill(pads, model.id_list[-1] + lead + 1) # the largest: nobody sees them

    def states(self, s, e, b, i):
        """ one network call: states (R, C) of rows b (R,) at positions i (R,) of the block in columns s to e """
        model, text, ids = self.model, self.text(e), self.block_ids(e)
        if self.cache is None: # the row is denoised as a whole
            return model.one_stream(text, ids if ids.dim() > 1 else None, b * text.size(1) + s + i)
        first, begins = self.cache.length, model.lead + s # positions where reading begins, and where the block does
        pos = torch.arange(model.lead + e, device=text.device)
        if first == begins and ids.dim() == 1 and model.question is None:
            mask = 'full' # the block alone is read, and sees itself and all that is cached
        else:
            mask = dense_mask(ids, pos >= begins, model.config.clean_causal, pos[first:], None, model.question)
        only = b * text.size(1) + begins - first + i
        x = model.trunk(model.embed(text, pos[first:]), pos[first:], mask, self.cache, only=only)
        self.cache.keep(begins - first)
        return x

def guided_logits(windows, s, e, b, i, guidance):
    """ logits (R, V) of rows b at positions i of the block in columns s to e; see guidance in Denoiser.generate """
    model, states = windows[0].model, [window.states(s, e, b, i) for window in windows]
    if len(states) == 1:
        return model.logits(states[0])
    with torch.autocast(states[0].device.type, enabled=False): # float16 may overflow
        c, u = (x.to(model.lm_head.weight.dtype) for x in states)
        return model.logits(u + (1 + guidance) * (c - u)) # logits are linear in the states

# ---- the loop

def write_block(block, begin, windows, rule, steps):
    """
    Reveal what is hidden (-1) of a block (B, n), in place, in at most one network call per step. The block begins at
    column `begin` of the windows; a second window is the one that hides the prompt, for guidance. steps: (t, s) each.
    Yields after each call the distributions (R, V) of the tokens just revealed, and whether all that stands will stay.
    """
    asked, end = block == -1, begin + block.size(1)
    certainty = torch.zeros(block.shape, device=block.device) # the probability with which each token was drawn
    for t, s in steps:
        hidden = block == -1
        quota = rule.quota(hidden, asked.sum(1), t, s)
        if not (quota > 0).any():
            continue
        candidates = hidden if rule.needs_probs else leading(rule.key(hidden), hidden, quota)
        b, i = candidates.nonzero(as_tuple=True) # (R,), rows and positions within the block
        logits = guided_logits(windows, begin, end, b, i, rule.guidance)
        if rule.needs_probs:
            chosen = rule.choose(hidden, quota, token_probs(logits))[b, i]
            b, i, logits = b[chosen], i[chosen], logits[chosen]
        probs = token_probs(logits, rule.temperature, rule.top_k, rule.top_p) # (R, V)
        block[b, i] = token = draw(probs)
        if rule.remask:
            certainty[b, i] = token_probs(logits).gather(1, token[:, None])[:, 0]
            goes_on = (quota > 0) & (s > 0).to(quota.device) # rows that took this step and have another one
            written = asked & (block != -1)
            again = (rule.remask * written.sum(1) + 1e-4).long() * goes_on
            block.masked_fill_(leading(-certainty, written, again), -1)
        yield probs, not rule.remask or not (s > 0).any()

@torch.inference_mode() # for small tensors, autograd's bookkeeping costs more than the arithmetic
def write(model, out, rule, stop=None, on_step=None, pads=None):
    """ fill in out (B, N), -1 = to be written, in place: see Denoiser.generate. pads (B, N) bool: nobody sees these """
    unknown, step = out == -1, 0
    for start, end, blocks in model.plan(unknown, rule.steps, rule.sampler):
        hide_prompt = [False, True] if rule.guidance else [False]
        windows = [Window(model, out, unknown, pads, start, end, hide) for hide in hide_prompt]
        for s, e, counts in blocks: # columns of the window
            steps = [(1.0, 0.0)] * (e - s) if counts is None else row_steps(counts, rule.schedule)
            for probs, final in write_block(out[:, start + s:start + e], s, windows, rule, steps):
                step += 1
                if on_step is not None:
                    done = settled(out) if final else min(start + s, settled(out))
                    on_step(step, out, probs, {'nfe': step * len(windows), 'done': done, 'total': out.size(1)})
            if stop is not None and end_segments(out, unknown, pads, stop, start + e, model.config.lengths):
                return out
    return out

class OrderWindow(Window):
    """
    A window of a model that reads tokens in any order (AOGPT). The cache keeps the tokens that are written, in the
    order in which they came. A call reads those that are new, and asks about hidden positions, whose rows are not kept:
    each sees all that is kept and itself, or the group that is written together. Rows with fewer new tokens than others
    leave places of the cache unused.
    """
    UNSEEN = 2 ** 31 # the block id of a place in the cache that nobody sees

    def __init__(self, model, out, unknown, pads, start, end, hide_prompt=False):
        super().__init__(model, out, unknown, pads, start, end, hide_prompt)
        B, T = self.out.shape
        self.read_as = torch.full((B, T), self.UNSEEN, device=out.device) # the block id of every token that was read
        self.kept = torch.zeros(B, T, dtype=torch.bool, device=out.device)
        self.place_ids = self.read_as[:, :0] # the block ids of the places of the cache
        self.last = 0 # the largest id so far

    def forget(self, rows):
        """ rows (B,) bool: read these once more, in the same order: what they kept has seen what is a pad now """
        self.kept &= ~rows[:, None]
        lead = min(self.model.lead, self.place_ids.size(1))
        self.place_ids[:, lead:] = self.place_ids[:, lead:].masked_fill(rows[:, None], self.UNSEEN)

    def ask(self, at, until, real=None):
        """
        What is written next: columns at (B, n), of which some rows need only the `real` (B, n) ones. Text from column
        `until` on is of later segments, which nobody may see yet.
        """
        self.at, self.until, self.real = at, until, torch.ones_like(at, dtype=torch.bool) if real is None else real

    def unread(self):
        """ columns (B, m) of the tokens that are written and not kept yet, in order, and their block ids """
        k, T, segment = self.model.config.diffusion_block_size, self.out.size(1), self.model.segment
        fresh = (self.out != -1) & ~self.kept
        fresh[:, self.until:] = False
        if self.hide_prompt:
            fresh &= self.unknown
        if self.pads is not None:
            fresh &= ~self.pads
        if k != 1: # the group that is being written is not kept yet
            fresh &= ~torch.zeros_like(fresh).scatter_reduce(1, self.at, self.real, 'amax')
        # a token that was read before keeps its id; new ones get the next, in groups of k within their segment
        new = fresh & (self.read_as == self.UNSEEN)
        place = new.long().cumsum(1) - 1
        begins = torch.stack([new[:, a:z].any(1) * new[:, :a].sum(1) for a, z in self.model.parts(T)], dim=1)
        ids = self.last + 1 + segment[:T] * T + (place - begins[:, segment[:T]]) // k
        if segment[-1] > 0: # a question that is given is one block
            given = (segment[:T] == 0) & ~self.kept.any(1, keepdim=True)
            ids = torch.where(given, self.last + 1, ids)
        self.read_as = torch.where(new, ids, self.read_as)
        self.last = max(self.last, int(torch.where(new, ids, 0).max())) if new.any() else self.last
        self.kept |= fresh
        m = int(fresh.sum(1).max()) if len(fresh) else 0
        ids, columns = torch.where(fresh, self.read_as, self.UNSEEN).sort(dim=1, stable=True)
        return columns[:, :m], ids[:, :m]

    def states(self, begin, end, b, i):
        model, lead, k = self.model, self.model.lead, self.model.config.diffusion_block_size
        text = self.out.masked_fill(self.out == -1, model.config.mask_id)
        first = self.cache.length == 0
        columns, ids = self.unread()
        if k == 1: # ask about these positions only, each by itself
            n = torch.bincount(b, minlength=len(text))
            j = torch.arange(len(b), device=b.device) - (n.cumsum(0) - n)[b]
            asked = self.at.new_zeros(len(text), int(n.max())).index_put((b, j), self.at[b, i])
            together = torch.eye(asked.size(1), dtype=torch.bool, device=b.device).expand(len(text), -1, -1)
        else: # the rows of a group see each other
            asked, j = self.at, i
            together = self.real[:, None] | torch.eye(asked.size(1), dtype=torch.bool, device=b.device)
        columns = torch.cat((columns, asked), dim=1)
        tokens, pos = text.gather(1, columns), columns + lead
        if first and lead:
            tokens, pos = (F.pad(x, (1, 0), value=v) for x, v in ((tokens, model.config.begin_id), (pos, 0)))
            ids = F.pad(ids, (1, 0))
        m, r = ids.size(1), asked.size(1)
        self.place_ids = torch.cat((self.place_ids, ids), dim=1)
        clean = self.place_ids[:, None] <= ids[:, :, None] # (B, m, places)
        query = (self.place_ids < self.UNSEEN)[:, None].expand(-1, r, -1)
        mask = torch.cat((F.pad(clean, (0, r)), torch.cat((query, together), dim=2)), dim=1)[:, None]
        self.cache.reserve(m + r)
        only = b * (m + r) + m + j
        x = model.trunk(model.embed(tokens, pos), pos, mask, self.cache, only=only)
        self.cache.keep(m)
        return x

def groups_to_write(text, s, e, k, rule):
    """
    The groups of k > 1 that are written one after another in columns s to e of text (B, T): columns at (B, n), and
    which of them a row needs, real (B, n). A group has k hidden tokens of each row: random ones, or the first.
    """
    while (hidden := text[:, s:e] == -1).any():
        key = rule.key(hidden) if rule.order == 'random' else torch.zeros(hidden.shape, device=hidden.device)
        chosen = leading(key, hidden, torch.full((len(text),), k, device=text.device))
        n = min(k, e - s)
        at = s + (~chosen).int().argsort(dim=1, stable=True)[:, :n]
        yield at, torch.arange(n, device=at.device) < chosen.sum(1, keepdim=True)

def steps_of_groups(unknown, windows, k, rule):
    """
    A function, tokens (B,) of a group -> its steps, (t, s) of each: a row's steps are split evenly over all of its
    groups in all parts of all windows. unknown (B, N); windows: see Denoiser.plan.
    """
    if 'steps' not in SAMPLERS[rule.sampler]:
        return lambda tokens: [(1.0, 0.0)] * int(tokens.max())
    spans, filled = [], 0
    for start, end, parts in windows:
        spans += [unknown[:, max(filled, start + s):start + e].sum(1) for s, e, _ in parts]
        filled = end
    groups = sum(-(-hidden // k) for hidden in spans).cpu()
    most, done = int(groups.max()), torch.zeros_like(groups)
    check(rule.steps is None or rule.steps >= most,
          f"{rule.steps} steps are fewer than the {most} groups of {k} tokens to fill: each needs at least one")
    def share(tokens):
        nonlocal done
        tokens = tokens.cpu()
        if rule.steps is None: # one per token
            return row_steps(tokens, rule.schedule)
        total = groups.clamp(min=1)
        own = (rule.steps * (done + 1) // total - rule.steps * done // total) * (tokens > 0)
        done = done + (tokens > 0)
        return row_steps(own, rule.schedule)
    return share

@torch.inference_mode()
def write_any_order(model, out, rule, stop=None, on_step=None, pads=None):
    """ as write, for AOGPT: every part of a window in any order """
    unknown, step, k = out == -1, 0, model.config.diffusion_block_size
    plan = model.plan(unknown, rule.steps if k == 1 else None, rule.sampler)
    share = steps_of_groups(unknown, plan, k, rule) if plan and k > 1 else None
    for start, end, parts in plan:
        hide_prompt = [False, True] if rule.guidance else [False]
        windows = [OrderWindow(model, out, unknown, pads, start, end, hide) for hide in hide_prompt]
        ends = None if stop is None else (out, unknown, pads, stop)
        for probs in write_window(out[:, start:end], parts, windows, rule, share, ends):
            step += 1
            if on_step is not None:
                on_step(step, out, probs, {'nfe': step * len(windows), 'done': settled(out), 'total': out.size(1)})
    return out

def write_window(text, parts, windows, rule, share, ends):
    """
    Write parts of text (B, T), a view, in place; yields each call's probs. share: see steps_of_groups, None for groups
    of one token: then a part is one block, of which every call reveals what the rule says. ends: for end_any_order.
    """
    model = windows[0].model
    for s, e, counts in parts:
        if share is None:
            at = torch.arange(s, e, device=text.device).expand(len(text), -1)
            steps = [(1.0, 0.0)] * (e - s) if counts is None else row_steps(counts, rule.schedule)
            groups = [(at, torch.ones_like(at, dtype=torch.bool))]
        else:
            groups = groups_to_write(text, s, e, model.config.diffusion_block_size, rule)
        for at, real in groups:
            yield from write_group(text, at, real, e, windows, rule, share(real.sum(1)) if share else steps, ends)

def write_group(text, at, real, until, windows, rule, steps, ends):
    """ write the `real` ones of columns at (B, n) of text (B, T), a view, in place; yields each call's probs """
    for window in windows:
        window.ask(at, until, real)
    block = text.gather(1, at).masked_fill(~real, 0)
    for probs, _ in write_block(block, 0, windows, rule, steps):
        text.scatter_(1, at, torch.where(real, block, text.gather(1, at)))
        if ends:
            end_any_order(windows, *ends)
            block.copy_(text.gather(1, at).masked_fill(~real, 0))
        yield probs

def end_any_order(windows, out, unknown, pads, stop):
    """ after a call: fill up, in place, what has stopped """
    model, before = windows[0].model, None if pads is None else pads.clone()
    for a, z in model.parts(out.size(1)):
        ended = end_rows(out[:, a:z], unknown[:, a:z], stop) & unknown[:, a:z]
        if pads is not None: # what is left of the block stays visible, as in training
            block = model.ids[a:z]
            last = torch.where(ended, block, OrderWindow.UNSEEN).amin(1, keepdim=True)
            pads[:, a:z] |= (block > last) & unknown[:, a:z]
    if pads is not None:
        rows = (pads != before).any(1)
        for window in windows if rows.any() else []:
            window.forget(rows)

def settled(out):
    """ how many leading columns of out (B, N) are written (not -1) in every row """
    return int((out != -1).all(0).long().cumprod(0).sum())

def end_segments(out, unknown, pads, stop, e, lengths):
    """ after the block that ends at column e: fill up, in place, what has stopped. True if everything is written """
    # where segments begin and end; the last one, or a text without segments, goes on to the end of out
    edges = [0, *itertools.accumulate(lengths[:-1]), max(sum(lengths), out.size(1))]
    for a, z in zip(edges, edges[1:]):
        beyond = end_rows(out[:, a:z], unknown[:, a:z], stop) & unknown[:, a:z]
        if pads is not None: # what is left of the block stays visible, as in training
            pads[:, max(a, e):z] |= beyond[:, max(0, e - a):]
    return (out != -1).all()

def end_rows(out, unknown, stop):
    """
    What a row of out (B, n) wrote after its first stop does not count and becomes stop, in place. Everything before
    a stop must be written. Returns (B, n) bool: True from the stop on.
    """
    ended = ((out == stop) & unknown & (out != -1).cumprod(1).bool()).cumsum(1) > 0
    out.masked_fill_(ended & unknown, stop)
    return ended

# -----------------------------------------------------------------------------
# diffusion forcing: Gaussian noise on embeddings, each token at a level of its own. Level k = 0 is already noisy,
# -1 is clean (https://arxiv.org/abs/2407.01392, https://github.com/buoyancy99/diffusion-forcing).
# DFGPT is the published mathematics, which predicts embeddings or noise. Its subclass DFText predicts tokens: given a
# token, its noise carries no information about the others, so a GPT that reads noisy text is multiplied with the
# Gaussian likelihood of each token's own noisy embedding

@dataclass
class DFConfig(GPTConfig):
    """ settings of both objectives of diffusion forcing """
    df_timesteps: int = of_weights(32) # noise levels of training
    df_beta_schedule: str = of_weights('cosine') # linear | cosine | sigmoid
    df_sampling_timesteps: int = free(4) # noise levels that a token passes when it is written
    # how the tokens of a chunk become clean. Judged by an ar model, text of df has 1.67 nats/char if written
    # autoregressive, 1.95 | 2.51 | 4.20 along pyramids of 2 | 4 | 32 levels
    df_scheduling_matrix: str = free('autoregressive') # pyramid | full_sequence | autoregressive | trapezoid
    df_uncertainty_scale: float = free(1.0) # steps a token begins later than the one before it; 0: all at once
    df_chunk_size: int | None = free(None) # tokens denoised together; 0: all that are asked for; None: half the context
    # auto: mixture for df; for df_published ddpm, or ddim where sampling leaves levels out
    df_sampler: str = free('auto') # auto | mixture | ddpm | ddim: the kind of reverse step
    df_ddim_eta: float = free(0.0) # share of fresh noise in a DDIM step: 0 none, 1 as much as DDPM
    df_stabilization_level: int = 1 # finished tokens are read as if at this level, 1 the least noisy; 0 is refused

    choices = GPTConfig.choices | {
        'df_beta_schedule': ('linear', 'cosine', 'sigmoid'), 'df_sampler': ('auto', 'mixture', 'ddpm', 'ddim'),
        'df_scheduling_matrix': ('pyramid', 'full_sequence', 'autoregressive', 'trapezoid')}

@dataclass
class DFPublishedConfig(DFConfig):
    """ and of diffusion forcing as published """
    df_objective: str = of_weights('pred_noise') # pred_noise | pred_x0 | pred_v: what the network predicts
    df_x0_wpe: bool = of_weights(False) # add learned positions to the embeddings that get noisy
    df_level_embed: str = of_weights('add') # add | concat (and an MLP): how the network reads noise levels
    df_loss_weight: str = 'fused' # fused | min_snr | uniform, see df_loss_weight
    df_snr_clip: float = 5.0 # signal-to-noise ratios above it weigh no more
    df_cum_snr_decay: float = 0.95 # per token, of the average over earlier tokens in fused weights
    df_clip_noise: float = 5.0 # noise is clamped to +- this

    choices = DFConfig.choices | {
        'df_objective': ('pred_noise', 'pred_x0', 'pred_v'), 'df_level_embed': ('add', 'concat'),
        'df_loss_weight': ('fused', 'min_snr', 'uniform')}

@dataclass
class DFTextConfig(DFConfig):
    """ and of diffusion forcing that predicts tokens """
    df_embed_norm: float = of_weights(4.0) # length of all embeddings, so a noise level means the same for any n_embd
    # on tiny shakespeare, shares of 0.5 | 0.75 have 1.568 | 1.541 nats/char given clean text (ar has 1.520), and
    # 2.41 | 2.49 along a pyramid
    df_clean_share: float = free(0.5) # causal attention: share of training rows that are clean, as in ar

# ---- the mathematics, as published

def betas_from(T, signal):
    """ the share of variance that each of T steps replaces by noise, given what is left after a share s, signal(s) """
    left = signal(torch.linspace(0, 1, T + 1, dtype=torch.float64))
    return (1 - left[1:] / left[:-1]).clamp(0, 0.999)

BETA_SCHEDULES = {
    'linear': lambda T: torch.linspace(0.1 / T, 20 / T, T, dtype=torch.float64),
    'cosine': lambda T: betas_from(T, lambda s: ((s + 0.008) / 1.008 * math.pi / 2).cos() ** 2),
    # the first sigmoid in float32, as published
    'sigmoid': lambda T: betas_from(T, lambda s: torch.tensor(3.0).sigmoid() - (6 * s - 3).sigmoid()),
}

def df_schedule(kind, T, snr_clip=5.0):
    """ the published constants of every noise level, {name: (T,) float32}, from float64. kind: a beta schedule """
    check(kind in BETA_SCHEDULES, f"df_beta_schedule is {kind!r}, expected one of {', '.join(BETA_SCHEDULES)}")
    check(T >= 1, f"df_timesteps is {T}, expected at least 1")
    check(kind != 'linear' or T > 20,
          f"the linear schedule needs df_timesteps of at least 21, not {T}: "
          "it ends at a beta of 20 / T, which must be below 1")
    betas = BETA_SCHEDULES[kind](T)
    abar = (1 - betas).cumprod(0)
    before = F.pad(abar[:-1], (1, 0), value=1.0)
    snr, variance = abar / (1 - abar), betas * (1 - before) / (1 - abar)
    constants = {
        'betas': betas, 'alphas_cumprod': abar, 'alphas_cumprod_prev': before,
        'sqrt_alphas_cumprod': abar.sqrt(), 'sqrt_one_minus_alphas_cumprod': (1 - abar).sqrt(),
        'log_one_minus_alphas_cumprod': (1 - abar).log(),
        'sqrt_recip_alphas_cumprod': (1 / abar).sqrt(), 'sqrt_recipm1_alphas_cumprod': (1 / abar - 1).sqrt(),
        'posterior_variance': variance, 'posterior_log_variance_clipped': variance.clamp(min=1e-20).log(),
        'posterior_mean_coef1': betas * before.sqrt() / (1 - abar),
        'posterior_mean_coef2': (1 - before) * (1 - betas).sqrt() / (1 - abar),
        'snr': snr, 'clipped_snr': snr.clamp(max=snr_clip)}
    return {name: value.float() for name, value in constants.items()}

def df_real_levels(T, S):
    """ (S + 1,) int64: the real level, -1 (clean) to T - 1, of each index level, 0 (clean) to S """
    return torch.linspace(-1, T - 1, S + 1).long()

def df_loss_weight(k, snr, clip, decay, objective, kind):
    """
    The weight of the squared error of each token at level k (B, T): (B, T). snr (levels,): the schedule's.
    min_snr: never more than at an snr of `clip` (https://arxiv.org/abs/2303.09556). fused: clean tokens before it
    inform about a token too, so their snr, as a decaying average, is added to its own. uniform: 1.
    """
    names = {'df_objective': objective, 'df_loss_weight': kind}
    for name, value in names.items():
        options = DFPublishedConfig.choices[name]
        check(value in options, f"{name} is {value!r}, expected one of {', '.join(options)}")
    own = snr[k] / clip
    clipped, past = own.clamp(max=1), torch.zeros_like(own)
    if kind == 'uniform':
        return torch.ones_like(own)
    if kind == 'fused':
        # the published loop over tokens in few steps: the average over 1 token, then over 2, 4, 8, ...
        average = torch.cat((clipped[:, :1], (1 - decay) * clipped[:, 1:]), dim=1)
        for n in (2 ** i for i in range((k.size(1) - 1).bit_length())):
            average = average + decay ** n * F.pad(average, (n, 0))[:, :-n]
        past = decay * F.pad(average, (1, 0))[:, :-1] # up to the token before
    own, clipped = (clip * (past + (1 - past) * x) for x in (own, clipped))
    return {'pred_noise': clipped / own, 'pred_x0': clipped, 'pred_v': clipped / (own + 1)}[objective]

# how many rows token t of a chunk of h waits before its noise begins to fall, by one index level of S per row
SCHEDULING_MATRICES = {
    'pyramid': lambda t, h, S, u: int(t * u),
    'full_sequence': lambda t, h, S, u: 0,
    'autoregressive': lambda t, h, S, u: t * S,
    'trapezoid': lambda t, h, S, u: int(min(t, h - 1 - t) * u), # from both ends; the published one mirrors t to h - t
}

def scheduling_matrix(kind, horizon, sampling_timesteps, uncertainty_scale):
    """
    How a chunk of `horizon` tokens becomes clean: (rows, horizon) int64 index levels, all sampling_timesteps in the
    first row, all 0 in the last. A reverse step takes a row to the next one.
    kind: pyramid | full_sequence | autoregressive | trapezoid
    """
    h, S, u = horizon, sampling_timesteps, uncertainty_scale
    check(kind in SCHEDULING_MATRICES,
          f"df_scheduling_matrix is {kind!r}, expected one of {', '.join(SCHEDULING_MATRICES)}")
    check(h >= 1 and S >= 1, f"a scheduling matrix of {h} tokens and {S} steps is empty: expected at least 1 of both")
    check(0 <= u < math.inf, f"df_uncertainty_scale is {u}, expected 0 or more rows between a token and the next")
    wait = torch.tensor([SCHEDULING_MATRICES[kind](t, h, S, u) for t in range(h)])
    row = torch.arange(S + int(wait.max()) + 1)[:, None]
    return (S + wait - row).clamp(0, S)

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
    df_published: diffusion forcing (https://arxiv.org/abs/2407.01392) with the mathematics and the method names of
    https://github.com/buoyancy99/diffusion-forcing: predict noise, x0 or v of every token's noisy embedding, by a
    weighted squared error, and step back by DDPM or DDIM. What learns to write well is its subclass DFText.

    Levels come in two kinds: real ones, 0 to df_timesteps - 1, as the network reads them, and index levels, 0 (clean)
    to df_sampling_timesteps, as sampling counts them. They fall token by token along a scheduling matrix.
    """
    config_class = DFPublishedConfig
    attentions = ('causal', 'full')
    loss_name = 'mse' # a weighted error between embeddings
    bound_name = 'nelbo_gaussian' # a bound under Gaussian steps, which are none of those that write
    usual_samplers = 'ddpm', 'ddim' # df_sampler auto: if sampling visits all levels, if it leaves some out
    path = None # the scheduling matrix that nll_bound follows. None: each token in one step from pure noise
    rests_on = { # loss_name is 'mse' or 'ce', which claims nothing
        'nll_bound': ('forward', 'corrupt', 'q_sample', 'df_noise', 'likelihood', 'df_target', 'df_posterior'),
        'generate': ('forward', 'corrupt', 'q_sample', 'df_noise', 'likelihood', 'df_target'),
        'metrics': ('forward', 'corrupt', 'q_sample', 'df_noise', 'likelihood', 'df_target'),
        'views': ('forward', 'corrupt', 'q_sample', 'df_noise', 'likelihood', 'df_target', 'df_posterior'),
    }

    def __init__(self, config):
        super().__init__(config)
        self.check_settings()
        c = self.config
        del self.lm_head # predictions are embeddings, or are compared with them
        self.add_levels()
        self.df_head = nn.Linear(c.n_embd, c.n_embd, bias=c.bias).apply(self._init_weights)
        nn.init.zeros_(self.df_head.weight)
        for name, values in self.constants().items():
            self.register_buffer(f'df_{name}', values, persistent=False)

    def add_levels(self):
        """ how the network reads noise levels, and how large its errors were at each """
        C, concat = self.config.n_embd, self.config.df_level_embed == 'concat'
        self.df_t_embed, self.df_mix = Sinusoidal(C // 2 if concat else C), None
        if concat:
            layers = nn.Linear(C * 3 // 2, C), nn.ReLU(), nn.Linear(C, C)
            self.df_mix = nn.Sequential(*layers).apply(self._init_weights)
        self.register_buffer('df_error', torch.ones(self.config.df_timesteps)) # running mean of the squared error of x0

    def constants(self):
        return df_schedule(self.config.df_beta_schedule, self.config.df_timesteps, self.config.df_snr_clip)

    def check_settings(self):
        """ a sentence for the first setting that is wrong """
        for name, fits, expected in self.requirements() + self.own_requirements():
            check(fits, f"{name} is {getattr(self.config, name)}, expected {expected}")

    def requirements(self):
        """ what settings of both objectives must be: [(name, does it hold, what is expected), ...] """
        c, T, S = self.config, self.config.df_timesteps, self.config.df_sampling_timesteps
        return [
            ('df_timesteps', T >= 1, "at least 1"),
            ('df_sampling_timesteps', 1 <= S <= T, f"1 to df_timesteps, {T}"),
            ('df_ddim_eta', 0 <= c.df_ddim_eta <= 1, "0 to 1: a step cannot add more noise than it takes away"),
            ('df_stabilization_level', 1 <= c.df_stabilization_level <= T,
             f"1 to df_timesteps, {T}: finished tokens are read at real level df_stabilization_level - 1, "
             "and of 0 that would be the last, pure noise"),
            ('df_uncertainty_scale', 0 <= c.df_uncertainty_scale <= S,
             f"0 to df_sampling_timesteps, {S}: from there on no two tokens are denoised together"),
            ('df_chunk_size', c.df_chunk_size in (None, *range(c.block_size + 1)),
             f"0 to block_size, {c.block_size}, or None"),
            ('df_sampler', c.df_sampler != 'ddpm' or S == T,
             "ddim or auto where sampling leaves levels out: "
             f"df_sampling_timesteps is {S}, df_timesteps {T}")]

    def own_requirements(self):
        c = self.config
        return [
            ('n_embd', c.n_embd % 4 == 0 and c.n_embd >= 8,
             "a multiple of 4 from 8 on: half of it holds sines and cosines of the noise level"),
            ('df_snr_clip', 0 < c.df_snr_clip < math.inf, "a finite number above 0"),
            ('df_cum_snr_decay', 0 <= c.df_cum_snr_decay < 1, "0 or more and below 1"),
            ('df_clip_noise', c.df_clip_noise > 0, "a number above 0 (inf: no clamp)"),
            ('df_x0_wpe', not c.df_x0_wpe or c.pos == 'learned',
             f"False with pos={c.pos!r}: only learned positions can be added to embeddings"),
            ('df_sampler', c.df_sampler != 'mixture',
             f"ddpm or ddim with {c.df_objective}: only objective df has a distribution over tokens to mix by")]

    def adapted(self, weights):
        """ of another objective the trunk; what diffusion forcing alone has stays where the weights lack it """
        own = {name: w for name, w in self.state_dict().items() if name.startswith('df_')}
        trunk = {name: w for name, w in weights.items() if not name.startswith('df_') and name != 'lm_head.weight'}
        return trunk | {name: weights.get(name, w) for name, w in own.items()}

    def load_state_dict(self, state_dict, *args, **kwargs):
        return super().load_state_dict(self.adapted(state_dict), *args, **kwargs)

    @property
    def row_length(self):
        return self.config.block_size

    # ---- embeddings and their noise

    def embeddings(self):
        """ what noise is added to, (vocab_size, C) """
        return self.transformer.wte.weight

    def df_wpe(self, n):
        """ what x0 has of positions 0 to n - 1: (n, C), or zeros (n, 1) """
        check_length(n, self.config.block_size)
        return self.transformer.wpe.weight[:n] if self.config.df_x0_wpe else self.df_betas.new_zeros(n, 1)

    def df_noise(self, shape, noise=None):
        """ clamped noise of this shape. noise(shape): draws to use instead of ours """
        raw = self.raw_noise(shape, noise)
        return raw.clamp(-self.config.df_clip_noise, self.config.df_clip_noise)

    def raw_noise(self, shape, noise=None):
        if noise is not None:
            return noise(shape)
        return torch.randn(shape, device=self.df_betas.device, dtype=self.df_betas.dtype)

    def df_at(self, name, k):
        """ a constant of the schedule at real levels k (B, T) -> (B, T, 1) """
        return getattr(self, f'df_{name}')[k][..., None]

    def df_signal(self, k):
        """ the share of the variance that is signal at real levels k (B, T), 1 at -1: (B, T, 1) """
        return self.df_at('alphas_cumprod', k.clamp(min=0)).masked_fill(k[..., None] < 0, 1)

    def q_sample(self, x0, k, noise):
        """ x0 and noise (B, T, C) -> x0 at real levels k (B, T) """
        return self.df_at('sqrt_alphas_cumprod', k) * x0 + self.df_at('sqrt_one_minus_alphas_cumprod', k) * noise

    def logits(self, x0, snr=None):
        """
        Embeddings x0 without positions (..., C) -> (..., vocab_size): the log-likelihood of x0 given each token, whose
        embedding has Gaussian noise of signal-to-noise ratio snr (..., 1) (None: that of level 0), up to a constant.
        """
        E, snr = self.embeddings(), self.df_snr[0] if snr is None else snr
        bias = -snr / 2 * E.square().sum(1) # -snr / 2 |x0 - E|^2, but for |x0|^2, which is the same for all
        with torch.autocast(x0.device.type, enabled=False): # distances are small differences
            return F.linear(snr * x0, E) + (bias if self.unseen is None else bias + self.unseen)

    # ---- what the network predicts

    def df_network(self, x, k, past=None):
        """
        x (B, T, C) at real levels k (B, T), at positions 0 to T - 1 -> what df_objective names, (B, T, C).
        past, (x, k): another copy of the text, which is what each token sees of those before it.
        """
        if past: # two streams: the copies side by side
            x, k = (torch.cat(both, dim=1) for both in zip((x, k), past))
        level, at = self.df_t_embed(k), torch.arange(x.size(1), device=x.device)
        T = len(at) // 2 if past else len(at)
        h, pos = x + level if self.df_mix is None else self.df_mix(torch.cat((x, level), dim=-1)), at % T
        if self.config.pos == 'learned' and not self.config.df_x0_wpe:
            h = h + self.transformer.wpe(pos)
        mask = dense_mask(pos, at < T) if past else self.config.attention
        return self.df_head(self.trunk(drop(h, self), pos, mask)[:, :T]).to(x.dtype)

    def df_target(self, x0, k, noise):
        """ what the network should have predicted, (B, T, C) """
        v = self.df_at('sqrt_alphas_cumprod', k) * noise - self.df_at('sqrt_one_minus_alphas_cumprod', k) * x0
        return {'pred_noise': noise, 'pred_x0': x0, 'pred_v': v}[self.config.df_objective]

    def predicted_x0(self, x, k, out):
        """ x0 (B, T, C) as the network's prediction `out` for x at real levels k has it """
        clip, objective = self.config.df_clip_noise, self.config.df_objective
        if objective == 'pred_noise':
            recip, recipm1 = self.df_at('sqrt_recip_alphas_cumprod', k), self.df_at('sqrt_recipm1_alphas_cumprod', k)
            return recip * x - recipm1 * out.clamp(-clip, clip)
        if objective == 'pred_v':
            return self.df_at('sqrt_alphas_cumprod', k) * x - self.df_at('sqrt_one_minus_alphas_cumprod', k) * out
        return out

    def _df_model_predictions(self, x, k, net=None):
        """ x (B, T, C) at real levels k (B, T) -> noise and x0, both (B, T, C), and what the network said """
        out = (net or self.df_network)(x, k)
        x0 = self.predicted_x0(x, k, out)
        recip, recipm1 = self.df_at('sqrt_recip_alphas_cumprod', k), self.df_at('sqrt_recipm1_alphas_cumprod', k)
        return (recip * x - x0) / recipm1, x0, out

    # ---- training

    def corrupt(self, idx, context):
        """
        Noisy embeddings x of idx (B, T), each token at a level k of its own, with x0 and the noise: x, k, x0, noise.
        context (B, T) bool: tokens as clean as sampling shows finished ones.
        """
        x0 = F.embedding(idx, self.embeddings()) + self.df_wpe(idx.size(1))
        k = torch.randint(self.config.df_timesteps, idx.shape, device=idx.device)
        k = k.masked_fill(context, self.config.df_stabilization_level - 1)
        noise = self.df_noise(x0.shape).masked_fill(context[..., None], 0)
        return self.q_sample(x0, k, noise), k, x0, noise

    def forward(self, idx, targets=None):
        # corrupt. What is not scored is context, and without targets everything is
        context = torch.ones_like(idx, dtype=torch.bool) if targets is None else targets == -1
        x, k, x0, noise = self.corrupt(idx, context)
        # attend
        _, found, out = self._df_model_predictions(x, k)
        logits = self.logits(found - self.df_wpe(idx.size(1)))
        if targets is None:
            return logits, None
        # loss: the target is detached, so embeddings learn through the noisy input only
        error = (out - self.df_target(x0, k, noise).detach()).square().mean(-1) # (B, T)
        if self.training:
            self.note_error(found.detach() - x0.detach(), k, ~context)
        loss = (self._compute_loss_weight(k) * error).masked_fill(context, 0).sum()
        return logits, loss / (~context).sum().clamp(min=1)

    def _compute_loss_weight(self, k):
        c = self.config
        return df_loss_weight(k, self.df_snr, c.df_snr_clip, c.df_cum_snr_decay, c.df_objective, c.df_loss_weight)

    def note_error(self, error, k, scored):
        """ update the running mean of squared errors of x0 per level, which df_posterior needs; error (B, T, C) """
        level, zeros = k.flatten(), torch.zeros_like(self.df_error)
        n = zeros.index_add(0, level, scored.flatten().to(zeros))
        total = zeros.index_add(0, level, (error.square().mean(-1) * scored).flatten().to(zeros))
        self.df_error += 0.05 * (total - n * self.df_error) / n.clamp(min=1)

    # ---- likelihood

    def views(self):
        """ bounds along whole paths """
        return {kind: self.variant(kind) for kind in ('autoregressive', 'pyramid', 'full_sequence')}

    def df_posterior(self, x, k, past=None):
        """
        log p(token | x, past), (B, T, V), and the predicted x0 (B, T, C). Models each prediction of x0 as a Gaussian
        whose variance is the mean squared error seen in training.
        """
        _, x0, _ = self._df_model_predictions(x, k, lambda x, k: self.df_network(x, k, past))
        logits = self.logits(x0 - self.df_wpe(x.size(1)), 1 / self.df_error[k][..., None])
        return logits.log_softmax(-1)[..., :self.config.text_size], x0

    def step_gap(self, idx, x0, z, k, z_next, k_next, log_p, found):
        """
        -log p(z_next | z) + log q(z_next | z, x0) in nats, (B, T, 1), for a Gaussian p
        (https://arxiv.org/abs/2107.00630).
        """
        snr, snr_next = self.df_at('snr', k), self.df_at('snr', k_next.clamp(min=0))
        return (snr_next - snr) / 2 * (x0 - found).square().sum(-1, keepdim=True)

    def df_step_nats(self, idx, curr, next, past=None):
        """
        What the step of idx (B, T) from index levels curr to next adds to the bound, (B, T):
        -log p(z_next | z) + log q(z_next | z, idx) in nats, with z and z_next drawn from q; 0 where a token waits. The
        last step of a token is its own -log p.
        """
        x0 = F.embedding(idx, self.embeddings()) + self.df_wpe(idx.size(1))
        seen, k, k_next = self._read_levels(x0, curr, next, torch.zeros_like(x0))
        waits = (curr == next)[..., None]
        a_next = self.df_signal(k_next)
        left = (self.df_signal(k) / a_next).masked_fill(waits, 1) # of the signal of z_next, in z
        z_next = a_next.sqrt() * x0 + (1 - a_next).sqrt() * torch.randn_like(x0)
        z = left.sqrt() * z_next + (1 - left).sqrt() * torch.randn_like(x0)
        z = torch.where((curr == 0)[..., None], seen, z)
        log_p, found = self.df_posterior(z, k, past)
        nats = self.step_gap(idx, x0, z, k, z_next, k_next, log_p, found)
        nats = torch.where(k_next[..., None] < 0, -log_p.gather(2, idx[..., None]), nats)
        return nats.masked_fill(waits, 0)[..., 0]

    @torch.no_grad()
    def nll_bound(self, idx, targets, n_samples=1):
        """
        An upper bound on -log p of the scored tokens in nats: unbiased estimates (B, n_samples), and how many tokens
        (B,). path None: every token is generated in one step from pure noise, given the clean text to its left.
        Otherwise: steps along that scheduling matrix, chunk by chunk; of df those of its sampler mixture.
        With full attention, where a token sees those to its right, None is df_scheduling_matrix.
        """
        c, scored = self.config, targets != -1
        path = self.path or (None if c.attention == 'causal' else c.df_scheduling_matrix)
        x0 = F.embedding(idx, self.embeddings()) + self.df_wpe(idx.size(1))
        finished = torch.full_like(idx, c.df_stabilization_level - 1)
        past = self.q_sample(x0, finished, torch.zeros_like(x0)), finished
        if path is None:
            nats = [self.one_step_nats(idx, x0, past) for _ in range(n_samples)]
        elif path == 'autoregressive' and c.attention == 'causal':
            nats = self.token_path_nats(idx, x0, scored, past, n_samples)
        else:
            nats = self.chunk_path_nats(idx, x0, scored, n_samples)
        return torch.stack([n.masked_fill(~scored, 0).sum(1) for n in nats], dim=1), scored.sum(1)

    def one_step_nats(self, idx, x0, past):
        """ -log p of every token, (B, T), in one step from pure noise, given the clean text to its left """
        noisiest = torch.full_like(idx, self.config.df_timesteps - 1)
        log_p, _ = self.df_posterior(torch.randn_like(x0), noisiest, past)
        return -log_p.gather(2, idx[..., None])[..., 0]

    def prior_nats(self, x0):
        """ what the noisiest level still tells of each token, in nats (B, T): KL of q(z_T | x0) from pure noise """
        signal = self.df_alphas_cumprod[-1] * (x0.square().sum(-1) - self.config.n_embd)
        return (signal - self.config.n_embd * self.df_log_one_minus_alphas_cumprod[-1]) / 2

    def token_path_nats(self, idx, x0, scored, past, n_samples):
        """
        A list of bounds (B, T) for tokens written one after another: of the steps of every token one is drawn,
        stratified over samples, and counts for all. All tokens in one pass, each given the clean text to its left.
        """
        steps = self.config.df_sampling_timesteps
        strata = torch.rand(n_samples, *idx.shape, device=idx.device).argsort(0)
        nats = []
        for stratum in strata:
            at = self.drawn_step(stratum, n_samples, steps)
            curr, next = ((steps - at - n).masked_fill(~scored, 0) for n in (0, 1))
            nats.append(self.prior_nats(x0) + steps * self.df_step_nats(idx, curr, next, past))
        return nats

    def chunk_path_nats(self, idx, x0, scored, n_samples):
        """ the same along a scheduling matrix: one step is drawn for every row of the batch and chunk of the text """
        chunks = self.chunks(scored.any(0).tolist())
        strata = [torch.rand(n_samples, len(idx), 1, device=idx.device).argsort(0) for _ in chunks]
        nats = [self.prior_nats(x0) for _ in range(n_samples)]
        for i, found in enumerate(nats):
            for (first, end), stratum in zip(chunks, strata):
                matrix = F.pad(self._generate_scheduling_matrix(end - first), (first, 0)).to(idx.device)
                steps = len(matrix) - 1
                at = self.drawn_step(stratum[i], n_samples, steps)[:, 0]
                curr, next = (matrix[at + n].masked_fill(~scored[:, :end], 0) for n in (0, 1))
                found[:, :end] += steps * self.df_step_nats(idx[:, :end], curr, next)
        return nats

    def drawn_step(self, stratum, n_samples, steps):
        """ a random step, 0 to steps - 1, in this stratum of n_samples equal ones: int64 of the same shape """
        u = (stratum + torch.rand(stratum.shape, device=stratum.device)) / n_samples
        return (u * steps).long().clamp(max=steps - 1)

    @torch.no_grad()
    def metrics(self, idx, targets):
        """
        {name: the share of scored tokens that are found again from one level}, a name left out where none is scored;
        and how far embeddings are from their mean, in units of their own size, 0 where they have none
        """
        found, scored = {}, targets != -1
        wpe = self.df_wpe(idx.size(1))
        x0 = F.embedding(idx, self.embeddings()) + wpe
        for quarter in 1, 2, 3:
            level = self.config.df_timesteps * quarter // 4
            k = torch.full_like(idx, level)
            _, guess, _ = self._df_model_predictions(self.q_sample(x0, k, self.df_noise(x0.shape)), k)
            found |= mean_over(f'accuracy_level_{level}', self.logits(guess - wpe).argmax(-1) == idx, scored)
        text = self.embeddings()[:self.config.text_size]
        return found | {'embedding_spread': ((text - text.mean(0)).norm() / text.norm().clamp(min=1e-20)).item()}

    # ---- reverse steps

    @property
    def sampler(self):
        c = self.config
        all_levels, some = self.usual_samplers
        usual = some if c.df_sampling_timesteps < c.df_timesteps else all_levels
        return usual if c.df_sampler == 'auto' else c.df_sampler

    def variant(self, path=None, **settings):
        """ the same weights with other settings of sampling (None: as they are); path: see the class attribute """
        other = copy.copy(self)
        settings = {'df_scheduling_matrix': path} | settings
        other.config, other.path = replace(self.config, **{k: v for k, v in settings.items() if v is not None}), path
        other.check_settings()
        return other

    def _read_levels(self, x, curr, next, context_noise):
        """ index levels -> real ones, and x as the network reads it: finished tokens at df_stabilization_level """
        T, S = self.config.df_timesteps, self.config.df_sampling_timesteps
        check(((0 <= next) & (next <= curr) & (curr <= S)).all(),
              f"a reverse step takes index levels from {S} at most down to 0 at least, and no token's noise may rise "
              "(next above curr)")
        real = df_real_levels(T, S).to(x.device)
        k, k_next = real[curr].masked_fill(curr == 0, self.config.df_stabilization_level - 1), real[next]
        return torch.where((curr == 0)[..., None], self.q_sample(x, k, context_noise), x), k, k_next

    @torch.no_grad()
    def _sample_step_seq(self, x, curr, next, net=None, noise=None, guidance_fn=None):
        """
        One reverse step of kind df_sampler: x (B, T, C) at index levels curr (B, T) -> the same at levels next. A token
        with next == curr waits, untouched. net(x, k): in place of the network, k (B, T) real levels. noise(shape): raw
        draws before the clamp, the context's first, then the step's. guidance_fn: see _ddim_sample_step_seq.
        """
        if self.sampler != 'ddpm':
            return self._ddim_sample_step_seq(x, curr, next, net, noise, guidance_fn)
        check(guidance_fn is None, "guidance needs DDIM steps: set df_sampling_timesteps below df_timesteps")
        seen, k, _ = self._read_levels(x, curr, next, self.df_noise(x.shape, noise))
        check((curr - next <= 1).all(), "a DDPM step lowers a level by 1 or leaves it: to jump, set "
                                        "df_sampling_timesteps below df_timesteps")
        _, x0, _ = self._df_model_predictions(seen, k, net)
        mean = self.df_at('posterior_mean_coef1', k) * x0 + self.df_at('posterior_mean_coef2', k) * seen
        fresh = self.df_at('posterior_variance', k).sqrt() * self.df_noise(x.shape, noise) # none in the last step
        return torch.where((curr == next)[..., None], x, mean + fresh)

    @torch.no_grad()
    def _ddim_sample_step_seq(self, x, curr, next, net=None, noise=None, guidance_fn=None):
        """
        The same by a DDIM step (https://arxiv.org/abs/2010.02502), over any number of levels. It reads the context
        without noise, scaled; mixture is such a step with all of DDPM's noise, towards the embedding of a drawn token.
        guidance_fn(x0): a value to raise, of the predicted x0 (B, T, C); its gradient moves the predicted noise.
        """
        seen, k, k_next = self._read_levels(x, curr, next, torch.zeros_like(x))
        a, a_next = self.df_signal(k), self.df_signal(k_next)
        guided = guidance_fn is not None
        with torch.set_grad_enabled(guided):
            eps, x0, _ = self._df_model_predictions(seen.requires_grad_(guided), k, net)
            slope = torch.autograd.grad(guidance_fn(x0).sum(), seen)[0] if guided else None
        if guided:
            eps = eps - (1 - a_next).sqrt() * slope
            recip, recipm1 = self.df_at('sqrt_recip_alphas_cumprod', k), self.df_at('sqrt_recipm1_alphas_cumprod', k)
            x0 = recip * seen - recipm1 * eps
        eta = 1.0 if self.sampler == 'mixture' else self.config.df_ddim_eta
        sigma = eta * ((1 - a / a_next) * (1 - a_next) / (1 - a)).sqrt()
        kept = (1 - a_next - sigma ** 2).clamp(min=0).sqrt() # of the predicted noise; rounding may fall below 0
        moved = a_next.sqrt() * x0 + kept * eps + sigma * self.df_noise(x.shape, noise)
        return torch.where((curr == next)[..., None], x, moved)

    # ---- writing

    def _generate_scheduling_matrix(self, horizon):
        c = self.config
        return scheduling_matrix(c.df_scheduling_matrix, horizon, c.df_sampling_timesteps, c.df_uncertainty_scale)

    def chunks(self, unknown):
        """ what is denoised together, [(start, end), ...]; unknown: a list of bools, what is to be written """
        room, size, N, end, found = self.config.block_size, self.config.df_chunk_size, len(unknown), 0, []
        while (first := next((i for i in range(end, N) if unknown[i]), None)) is not None:
            h = min(N - first, max(1, room // 2) if size is None else size or N)
            check(h <= room, f"df_chunk_size=0 denoises all {h} new tokens together, but the context has {room}: "
                             "choose a smaller df_chunk_size")
            found.append((first, first + h))
            end = first + h
        return found

    @torch.no_grad()
    def df_rollout(self, xs, given, net=None, noise=None, guidance_fn=None):
        """
        Write, in place, the embeddings xs (B, N, C), without positions, where given (B, N) is False: chunk by chunk
        from noise, along the scheduling matrix. Yields after every step the window, a slice of positions, and which of
        its tokens were finished by this step, (B, window) bool. The network sees the chunk and as much of the text
        before it as fits, none after it; positions count from where its window begins.
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
                a, z = net.active(start, x, curr, next) if isinstance(net, DFReader) else (0, end - start)
                x = x.clone()
                x[:, a:z] = self._sample_step_seq(x[:, a:z], curr[:, a:z], next[:, a:z], net, noise, guidance_fn)
                xs[:, start:end] = torch.where(settled[..., None], xs[:, start:end], x - wpe)
                yield slice(start, end), (curr > 0) & (next == 0)

    def generate_df(self, context, max_new_tokens, net=None, noise=None, guidance_fn=None):
        """
        Continue context, ids (B, T) or embeddings without positions (B, T, C), T >= 0, by max_new_tokens: embeddings
        (B, T + max_new_tokens, C). An id of -1 is to be written, wherever it stands. noise(shape) is asked for every
        chunk, then for the steps on it.
        """
        raw = context.is_floating_point()
        if raw:
            xs, given = context, torch.ones(context.shape[:2], dtype=torch.bool, device=context.device)
        else:
            xs, given = F.embedding(context.clamp(min=0), self.embeddings()).detach(), context != -1
        xs, given = F.pad(xs, (0, 0, 0, max_new_tokens)), F.pad(given, (0, max_new_tokens))
        for _ in self.df_rollout(xs, given, net, noise, guidance_fn):
            pass
        return xs

    @torch.no_grad()
    def generate(self, idx, max_new_tokens, *, steps=None, sampler=None, df_scheduling_matrix=None,
                 df_uncertainty_scale=None, temperature=1.0, top_k=None, top_p=None, guidance=0.0, stop=None,
                 on_step=None):
        """
        Fill in every -1 of idx (B, T), T >= 0, anywhere, and max_new_tokens after it: (B, T + max_new_tokens). Given
        tokens stay. Chunk by chunk, from noise, as df_rollout does.
        steps: noise levels that a token passes (df_sampling_timesteps). sampler: df_sampler. These two,
          df_scheduling_matrix and df_uncertainty_scale: None is the model's own setting.
        temperature, top_k, top_p: of the token that is drawn for a finished embedding; see DFText for its own meaning.
        guidance: see DFText; refused here.
        stop, on_step: as in Denoiser.generate, but a stop always ends the row. Rows share their chunks, which begin at
          a column that any of them has to fill.
        """
        check_options(locals())
        model = self.variant(df_sampling_timesteps=steps, df_sampler=sampler,
                             df_scheduling_matrix=df_scheduling_matrix, df_uncertainty_scale=df_uncertainty_scale)
        out = lengthened(idx, max_new_tokens)
        unknown, xs = out == -1, F.embedding(out.clamp(min=0), self.embeddings())
        reader = model.reader(guidance, lambda logits: token_probs(logits, temperature, top_k, top_p))
        for step, (window, finished) in enumerate(model.df_rollout(xs, ~unknown, reader), 1):
            probs, token = reader.tokens(xs[:, window], finished) # (R, V), (R,)
            out[:, window][finished] = token
            ended = stop is not None and end_rows(out, unknown, stop)[:, -1].all()
            if on_step is not None:
                on_step(step, out, probs, {'nfe': reader.nfe, 'done': settled(out), 'total': out.size(1)})
            if ended:
                break
        return out

    def reader(self, guidance, shape):
        """ the network as generate asks it; shape(logits): the probabilities to draw a token from """
        check(guidance == 0, f"guidance is {guidance}, expected 0 (off) or, with objective df, more")
        return DFReader(self, guidance, shape)

class DFReader:
    """ a network that counts its calls, nfe, and turns finished embeddings into tokens """
    def __init__(self, model, guidance, shape):
        self.model, self.guidance, self.shape, self.nfe = model, guidance, shape, 0

    def active(self, start, x, curr, next):
        """ columns (first, end) of the window x (B, T, C) that a step is about; start: where it begins in the text """
        return 0, x.size(1)

    def __call__(self, x, k):
        self.nfe += 1
        return self.model.df_network(x, k)

    def tokens(self, xs, finished):
        """ embeddings xs (B, n, C) and which of them are finished, (B, n) bool -> probs (R, V) and drawn ids (R,) """
        probs = self.shape(self.model.logits(xs[finished]))
        return probs, draw(probs)

class DFText(DFGPT):
    """
    df: diffusion forcing that predicts tokens by cross-entropy, and so learns to write. It shares noise levels,
    schedules, reverse steps and paths with its parent.

    Once a token is known, its noise carries no information about the other tokens. So p(token | everything seen) is a
    product: what a GPT that reads the noisy text before it predicts (learned), times the Gaussian likelihood of the
    noisy embedding given the token (closed form). x0 is predicted as the mean of the embeddings under it.
    """
    config_class = DFTextConfig
    loss_name, bound_name = 'ce', 'nelbo'
    usual_samplers = 'mixture', 'mixture'
    # what these rest on is defined here anew, and so are the bound's steps and what generate reads
    nll_bound, generate, metrics = DFGPT.nll_bound, DFGPT.generate, DFGPT.metrics

    def add_levels(self):
        pass # likelihood() reads noise levels, by a formula

    def constants(self):
        return df_schedule(self.config.df_beta_schedule, self.config.df_timesteps)

    def own_requirements(self):
        c = self.config
        return [('df_embed_norm', 0 < c.df_embed_norm < math.inf, "a finite length above 0"),
                ('df_clean_share', 0 <= c.df_clean_share <= 1, "a share, 0 to 1")]

    def embeddings(self):
        """ all of one length: otherwise it would pay to outgrow the noise """
        return F.normalize(self.transformer.wte.weight, dim=-1) * self.config.df_embed_norm

    def df_wpe(self, n):
        """ zeros (n, 1): a token's noise must not depend on where it stands """
        check_length(n, self.config.block_size)
        return self.df_betas.new_zeros(n, 1)

    def df_noise(self, shape, noise=None):
        """ without a clamp: likelihood() is that of a normal distribution """
        return self.raw_noise(shape, noise)

    def likelihood(self, x, k):
        """ log q(x | token) at real levels k (B, T), up to what all tokens share: (B, T, V) """
        return self.logits(x / self.df_at('sqrt_alphas_cumprod', k), self.df_at('snr', k))

    def df_context(self, x, k, cache=None, end=None):
        """
        log p(token | the noisy ones before it), (B, T, V), for x (B, T, C) at real levels k (B, T). A GPT that reads,
        in place of each token, the mean of wte under its likelihood: a clean token as ar reads it, pure noise as the
        mean of all. With full attention it sees all tokens.
        cache, end: only the positions from cache.length to end, (B, n, V), given the kept ones before them.
        """
        wte, first, end = self.transformer.wte.weight, cache.length if cache else 0, x.size(1) if end is None else end
        causal, pos = self.config.attention == 'causal', torch.arange(first, end, device=x.device)
        if causal: # position i reads token i - 1
            x, k = (tensor[:, max(0, first - 1):end - 1] for tensor in (x, k))
        h = self.likelihood(x, k).softmax(-1) @ wte
        if causal and first == 0:
            begin = wte[self.config.begin_id] if self.config.begin_id is not None else wte.new_zeros(wte.size(1))
            h = torch.cat((begin.expand(len(h), 1, -1), h), dim=1)
        mask = self.config.attention
        if first > 0: # each new position sees the kept ones and, of the new ones, those up to itself
            mask = torch.arange(end, device=x.device) <= pos[:, None]
        h = self.df_head(self.trunk(self.add_positions(h, pos), pos, mask, cache))
        return F.linear(h, self.embeddings(), self.unseen)

    def df_network(self, x, k, past=None):
        """
        log p(token | everything seen), (B, T, V), up to a constant, for x (B, T, C) at real levels k (B, T).
        past, (x, k): another copy of the text, which is what each token sees of those before it.
        """
        return self.df_context(*(past or (x, k))) + self.likelihood(x, k)

    def predicted_x0(self, x, k, out):
        return out.softmax(-1) @ self.embeddings()

    def _read_levels(self, x, curr, next, context_noise):
        self.finished = curr == 0 # for guidance: a token in its last step may be read at the same real level
        return super()._read_levels(x, curr, next, context_noise)

    def forward(self, idx, targets=None):
        context = torch.ones_like(idx, dtype=torch.bool) if targets is None else targets == -1
        causal = self.config.attention == 'causal'
        clean = context
        if causal and targets is not None: # position i reads token i - 1, so a clean row is a row of ar: no leak
            n_clean = len(idx) * self.config.df_clean_share + torch.rand(1, device=idx.device)
            clean = context | (torch.arange(1, len(idx) + 1, device=idx.device) <= n_clean)[:, None]
        # corrupt
        x, k, _, _ = self.corrupt(idx, clean)
        # attend
        logits = self.df_context(x, k) if causal else self.df_network(x, k)
        # loss
        return logits, None if targets is None else self.next_token_loss(logits, targets)

    def views(self):
        """ bounds along whole paths; with causal attention also a GPT, whose head is df_head times the embeddings """
        found, c = super().views(), self.config
        if c.attention == 'causal' and c.begin_id is not None and self.df_head.bias is None:
            with torch.no_grad():
                found['ar'] = as_ar(self, self.embeddings() @ self.df_head.weight)
        return found

    def df_posterior(self, x, k, past=None):
        _, x0, out = self._df_model_predictions(x, k, lambda x, k: self.df_network(x, k, past))
        return out.log_softmax(-1)[..., :self.config.text_size], x0

    def step_gap(self, idx, x0, z, k, z_next, k_next, log_p, found):
        """ the same for p that mixes q(z_next | z, token) over the predicted tokens """
        # log q(z_next | z, token), but for what all tokens share
        gain = (self.likelihood(z_next, k_next.clamp(min=0)) - self.likelihood(z, k))[..., :log_p.size(-1)]
        return gain.gather(2, idx[..., None]) - (log_p + gain).logsumexp(-1, keepdim=True)

    def reader(self, guidance, shape):
        """
        temperature, top_k and top_p shape what is expected of a token before its noise is seen. mixture samples the
        distribution that nll_bound bounds; ddim and ddpm sample another one, in which a token is drawn in its last
        step only. guidance: w in logits = c + w (c - u), where u is expected if finished text is replaced by pure
        noise (https://arxiv.org/abs/2502.06764); such a step costs two network calls.
        """
        return DFTextReader(self, guidance, shape)

class DFTextReader(DFReader):
    """
    Also draws the token of every position at every call, and remembers the last draw. With causal attention the keys
    and values of finished text never change, so a cache keeps them, and a step is about the columns from the first
    unfinished token to the last one that moves.
    """
    cache, start, before = None, None, None

    def active(self, start, x, curr, next):
        if self.model.config.attention != 'causal' or self.model.sampler == 'ddpm': # DDPM reads with new noise
            self.before = x[:, :0]
            return super().active(start, x, curr, next)
        if start != self.start: # positions count from the beginning of the window
            self.cache, self.start = Cache(self.model, len(x), self.model.config.block_size), start
        first = int((curr == 0).all(0).long().cumprod(0).sum()) # leading finished columns
        first = min(first, x.size(1) - 1) # a step is about one column at least, even where no row needs it
        moving = (curr != next).any(0).nonzero().flatten().tolist()
        self.before = x[:, :first]
        return first, max([first, *moving]) + 1

    def context(self, before, x, level, k, cache=None):
        """ df_context (B, n, V) of columns x (B, n, C) at real levels k (B, n), given the text before, at one level """
        a, z = before.size(1), before.size(1) + x.size(1)
        levels = torch.cat((torch.full_like(before[..., 0], level, dtype=torch.long), k), dim=1)
        found = self.model.df_context(torch.cat((before, x), dim=1), levels, cache, z)
        if cache is not None:
            cache.keep(a - cache.length)
        return found[:, -x.size(1):]

    def __call__(self, x, k):
        model, c = self.model, self.model.config
        self.nfe += 1 + (self.guidance > 0)
        level = c.df_stabilization_level - 1
        before = self.before * model.df_sqrt_alphas_cumprod[level] # as a step reads finished text
        expected = self.context(before, x, level, k, self.cache)
        if self.guidance: # with new noise in place of what is finished, so nothing of it is kept
            finished, last = model.finished, c.df_timesteps - 1
            forgotten = torch.where(finished[..., None], model.df_noise(x.shape), x)
            u = self.context(model.df_noise(before.shape), forgotten, last, k.masked_fill(finished, last))
            change = (expected - u).float().nan_to_num() # -inf less itself
            expected = expected + self.guidance * change # not in float16, which this may overflow
        log_p = self.shape(expected).log() + model.likelihood(x, k)
        self.probs = log_p.softmax(-1)
        self.token = draw(self.probs)
        last_step = k <= df_real_levels(c.df_timesteps, c.df_sampling_timesteps)[1]
        certain = last_step | (model.sampler == 'mixture') # the step goes to the drawn token, not to the mean
        return torch.where(certain[..., None], F.one_hot(self.token, log_p.size(-1)).log(), log_p)

    def tokens(self, xs, finished):
        first = self.before.size(1)
        finished = finished[:, first:first + self.token.size(1)]
        return self.probs[finished], self.token[finished]

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

OBJECTIVES = {'ar': GPT, 'denoise': Denoiser, 'mdlm': MDLM, 'bd3lm': BD3LM, 'aogpt': AOGPT, 'df_published': DFGPT,
              'df': DFText}

# -----------------------------------------------------------------------------
# evaluation

@torch.no_grad()
def score(model, batches, n_samples=1):
    """
    One number for every objective: nats per scored token over batches (dicts, on the model's device), exact or an upper
    bound, with two standard errors: Monte Carlo (of this text's bound) and over rows (of another text). An objective
    without a bound gives its training loss, under that name. A squared error is not in nats and has no perplexity.
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
    monte_carlo = (nats.var(1).sum() / n).sqrt().item() / tokens if n > 1 else 0.0 if exact else None
    sign, squared = '=' if exact else '<=' if model.bound_name else 'is no bound:', model.measured == 'mse'
    return {'name': model.measured, 'exact': exact, 'sign': sign, 'nats_per_token': value,
            'unit': 'squared error' if squared else 'nats/token',
            'perplexity': None if squared else math.exp(min(value, 700.0)),
            'stderr_monte_carlo': monte_carlo, # None: one draw says nothing of it
            'stderr_windows': means.std().item() / math.sqrt(rows) if rows > 1 else 0.0,
            'windows': rows, 'tokens': int(tokens), 'samples_per_window': n}

def pick_device(device='auto', dtype='auto'):
    """ settings -> (torch.device, autocast context, name of the dtype). auto: the best there is, float32 on a CPU """
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
    """ the context in which a device computes in the low precision of this name; low None: as always """
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
# files

FORMAT = 1 # of checkpoints

def read_pickle(path):
    """ what torch.save wrote, tensors on the CPU; never executes pickled code """
    if not os.path.exists(path):
        folder = os.path.dirname(path) or '.'
        others = sorted(name for name in os.listdir(folder) if name.endswith('.pt')) if os.path.isdir(folder) else []
        has = f"its folder has {', '.join(others)}"
        raise UserError(f"there is no checkpoint {path}; "
                        f"{has if others else 'train a model first, or name the folder of a run'}")
    try:
        return torch.load(path, map_location='cpu', weights_only=True)
    except Exception as e: # truncated, foreign or unsafe: the kinds of exception are many, the news is one
        if isinstance(e, OSError) and e.filename is not None: # not what is in it: no permission, or a folder
            raise UserError(f"cannot read {path}: {e.strerror}") from None
        raise UserError(f"{path} is no checkpoint that can be read ({type(e).__name__}): "
                        "truncated, or from elsewhere") from None

def fields_of(config_class, kind):
    """ names of the fields that are declared by of_weights (kind 'weights') or by free (kind 'free') """
    return [f.name for f in fields(config_class) if f.metadata.get('kind') == kind]

def read_checkpoint(path):
    """ the dict of a checkpoint that train.py wrote """
    ckpt = read_pickle(path)
    if not isinstance(ckpt, dict) or not isinstance(ckpt.get('format'), int):
        raise UserError(f"{path} is not one of our checkpoints: it has no 'format'")
    if ckpt['format'] > FORMAT:
        raise UserError(f"{path} has checkpoint format {ckpt['format']}, this code reads up to {FORMAT}: "
                        "update the code")
    return separate_df(ckpt)

def separate_df(ckpt):
    """ the checkpoint's dict in its newer form: once all objectives had the settings of df, which was one objective """
    config = ckpt.get('config')
    if not isinstance(config, dict) or not {'df_objective', 'df_embed_norm'} <= config.keys():
        return ckpt
    objective = ckpt.get('objective')
    if objective == 'df' and config['df_objective'] != 'pred_token':
        objective = 'df_published'
    known = {f.name for f in fields(OBJECTIVES.get(objective, GPT).config_class)}
    config = {name: value for name, value in config.items() if name in known or not name.startswith('df_')}
    return ckpt | {'objective': objective, 'config': config}

def entry(ckpt, name, where, kind=dict):
    """ ckpt[name] of a checkpoint, a sentence where there is no such thing """
    check(isinstance(ckpt.get(name), kind), f"{where} has no {name!r}, so it is not a whole checkpoint")
    return ckpt[name]

def check_config(config, config_class, where):
    """ a sentence if config, {field: value} as any version saved it, is not one of this class """
    unknown = sorted(config.keys() - {f.name for f in fields(config_class)})
    check(not unknown, f"{where} was written by another version: {', '.join(unknown)} is unknown here")
    missing = ', '.join(name for name in fields_of(config_class, 'weights') if name not in config)
    check(not missing, f"{where} was written by another version: it does not say {missing}, which the weights fix")

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

# what makes a network of ours a GPT-2, besides the sizes, the biases, the gelu and the head
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

def read_pretrained(source, objectives={}):
    """
    Weights to start from -> (config fields that they fix, weights by our names, {'tokenizer': ...} as far as known).
    source: a checkpoint of ours or of nanoGPT, or a GPT-2 of Hugging Face, a folder or a hub name (needs transformers).
    objectives: {name: class}, more than there are here, as a dataset's provider.py has them.
    """
    if not os.path.isfile(source) and not str(source).endswith('.pt'):
        known, weights, text = read_hugging_face(source)
    elif isinstance(ckpt := read_pickle(source), dict) and 'model_args' in ckpt:
        known, weights, text = read_nanogpt(ckpt, source)
    else:
        ckpt = read_checkpoint(source)
        config, weights, meta = (entry(ckpt, name, source) for name in ('config', 'model', 'meta'))
        kind = (OBJECTIVES | objectives).get(ckpt.get('objective'))
        if kind is None: # its provider.py is not here, so neither are the settings that it may have of its own
            config = {f.name: config[f.name] for f in fields(GPTConfig) if f.name in config}
        config_class = kind.config_class if kind else GPTConfig
        check_config(config, config_class, source)
        fixed = fields_of(config_class, 'weights')
        tables = 'block_size', 'vocab_size', 'text_size', 'begin_id', 'mask_id'
        known = {name: config[name] for name in (*tables, *fixed) if name in config}
        text = {name: meta[name] for name in ('tokenizer', 'chars') if name in meta}
    assert known.keys() >= set(fields_of(GPTConfig, 'weights')), "GPT2 must say what GPT-2 has in a new field"
    return known, weights, text

def load_checkpoint(path, device='cpu', weights='ema', objectives={}, view=None):
    """
    A checkpoint of train.py (its path, or what read_checkpoint gave) -> (model in eval mode, the checkpoint's dict).
    weights: 'ema' takes the averaged weights where the run kept them, 'raw' those of the last step.
    objectives: {name: class}, more than there are here, as a dataset's provider.py has them.
    view: what else the weights can be read as, a name that its views() has: 'ar' for a bd3lm run with clean_causal, an
      mdlm run with ar_weight, or df; 'left_to_right' for aogpt.
    """
    check(weights in ('ema', 'raw'), f"weights is {weights!r}, expected ema or raw")
    ckpt, where = (path, 'the checkpoint') if isinstance(path, dict) else (read_checkpoint(path), path)
    name, config = entry(ckpt, 'objective', where, str), entry(ckpt, 'config', where)
    objectives, dataset = OBJECTIVES | objectives, ckpt.get('settings', {}).get('dataset')
    check(name in objectives,
          f"the objective {name!r} of {where} is not known here, only {', '.join(objectives)}: "
          f"one of a provider.py needs that file in the folder of its dataset{f', {dataset}' if dataset else ''}; "
          "from Python, give load_checkpoint its OBJECTIVES as objectives=")
    state = ckpt['ema'] if weights == 'ema' and ckpt.get('ema') else entry(ckpt, 'model', where)
    check_config(config, objectives[name].config_class, where)
    model = objectives[name](objectives[name].config_class(**config))
    check_fit(model.state_dict(), state, f"the weights of {where}")
    model.load_state_dict(state)
    model = model.eval().to(device)
    views = {None: model} | model.views()
    if view not in views:
        raise UserError(f"this {name} checkpoint cannot be read as {view}, only as "
                         f"{', '.join(v for v in views if v) or 'itself'}")
    return views[view], ckpt
