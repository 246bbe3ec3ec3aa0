"""
One transformer and the objectives that train it to write text, all in this file.

The one idea: a *block* is a set of tokens that share a noise level and see each other, and every block sees the clean
blocks before it. Attention pattern and noise granularity are then the same integer tensor, block_ids:
0,1,2,3,... is GPT; 0,0,0,0,... is BERT; pos // diffusion_block_size is block diffusion.

An objective is a class whose forward rhymes: corrupt, attend, loss. To add one, subclass and add a row to OBJECTIVES.
References: nanoGPT for the network and the loop (https://github.com/karpathy/nanoGPT),
BD3-LM for the two-stream mask (https://arxiv.org/abs/2503.09573).
"""

import math
from dataclasses import dataclass, fields

import torch
import torch.nn as nn
import torch.utils.checkpoint
from torch.nn import functional as F

# -----------------------------------------------------------------------------
# who may look at whom

def block_ids(attention, T, diffusion_block_size=None, segments=None):
    """
    The block of every position, (T,) int64: non-decreasing from 0.
    attention: causal | full | block | hierarchical. segments, for hierarchical only: lengths that add up to T, the
    question first; the question is one block, every later segment is whole (diffusion_block_size=None) or cut.
    """
    n = diffusion_block_size
    assert attention in ATTENTIONS, f"attention is {attention!r}, expected one of {', '.join(ATTENTIONS)}"
    assert n is None or n >= 1, f"diffusion_block_size is {n}, expected at least 1 token per block"
    assert attention != 'block' or n is not None, "attention 'block' needs diffusion_block_size, the tokens per block"
    return ATTENTIONS[attention](T, n, segments)

def _hierarchical_ids(T, n, segments):
    assert segments and sum(segments) == T, f"segments {segments} add up to {sum(segments or [0])}, the row has {T} tokens"
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

def mask_mod(block, noisy):
    """
    The one attention rule, a pure function of indices, for SDPA (as a bool matrix) and FlexAttention alike.
    block: (N,) or (B, N) int, the block of each row; noisy: (N,) bool, this row is the corrupted copy of a token whose
    clean copy is also in the sequence. A noisy token is seen only by its own noisy block; a clean token is seen by every
    later block and by its own clean block. The diagonal is always allowed, so no row of a softmax is ever empty.
    With block = cat(ids, ids), noisy first, this is BD3-LM's three-part training mask (https://arxiv.org/abs/2503.09573).
    """
    def mod(b, h, q_idx, kv_idx):
        at = (lambda i: block[i]) if block.dim() == 1 else (lambda i: block[b, i])
        same, past = at(q_idx) == at(kv_idx), at(q_idx) > at(kv_idx)
        return torch.where(noisy[kv_idx], same & noisy[q_idx], past | same & ~noisy[q_idx])
    return mod

def dense_mask(block, noisy=None):
    """ mask_mod as a bool matrix, True = may look: (N, N) for block (N,), (B, 1, N, N) for block (B, N) """
    N = block.size(-1)
    noisy = torch.zeros(N, dtype=torch.bool, device=block.device) if noisy is None else noisy
    i = torch.arange(N, device=block.device)
    b = None if block.dim() == 1 else torch.arange(block.size(0), device=block.device)[:, None, None, None]
    return mask_mod(block, noisy)(b, None, i[:, None], i[None, :])

def attend(q, k, v, mask, dropout_p=0.0):
    """
    Scaled dot-product attention, (B, H, Tq, D) over (B, H, Tk, D). mask: 'causal' (queries and keys begin together),
    'full', a bool matrix that broadcasts to (B, H, Tq, Tk), or a FlexAttention BlockMask.
    """
    if isinstance(mask, str):
        # no matrix: the kernels skip what is_causal rules out
        return F.scaled_dot_product_attention(q, k, v, dropout_p=dropout_p, is_causal=mask == 'causal')
    if torch.is_tensor(mask):
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, dropout_p=dropout_p)
    from torch.nn.attention.flex_attention import flex_attention
    assert dropout_p == 0, "FlexAttention has no dropout on attention weights: set dropout=0 or attn_backend=sdpa"
    flex = flex_attention if torch.compiler.is_compiling() or not q.is_cuda else _compiled(flex_attention)
    return flex(q, k, v, block_mask=mask)

def _compiled(fn, cache={}):
    """ FlexAttention is only fast (and only saves memory) when compiled; once per process is enough """
    if fn not in cache:
        cache[fn] = torch.compile(fn)
    return cache[fn]

class Cache:
    """
    Keys and values of every layer for up to `size` positions, so that generation reads each token once.
    A pass writes behind the `length` positions already kept; keep(n) makes the next n of them permanent.
    """
    def __init__(self, config, batch, size, like):
        shape = (config.n_layer, batch, config.n_head, size, config.n_embd // config.n_head)
        self.k, self.v, self.size, self.length = like.new_empty(shape).unbind(), like.new_empty(shape).unbind(), size, 0

    def append(self, layer, k, v):
        """ k, v (B, H, T, D) of a layer -> all keys and values so far, (B, H, length + T, D) """
        n, keys, values = k.size(2), self.k[layer], self.v[layer]
        assert self.length + n <= self.size, f"{self.length + n} positions do not fit a cache of {self.size}"
        keys.narrow(2, self.length, n).copy_(k)
        values.narrow(2, self.length, n).copy_(v)
        return keys.narrow(2, 0, self.length + n), values.narrow(2, 0, self.length + n)

    def keep(self, n):
        self.length += n

# -----------------------------------------------------------------------------
# the network

@dataclass
class GPTConfig:
    """ what the model is; train.py has a setting of the same name for nearly every field """
    block_size: int = 1024 # tokens of context
    vocab_size: int = 50304 # rows of the embedding: the text's ids, then begin, [MASK], pad and padding to a round number
    text_size: int = None # ids a text can contain are below this one, all others have logit -inf. None: all rows
    begin_id: int = None # ar reads it before the first token, so that every token is scored. None: nanoGPT's windows
    n_layer: int = 12
    n_head: int = 12
    n_embd: int = 768
    dropout: float = 0.0
    bias: bool = False # in linear layers and in layernorm
    pos: str = 'rope' # rope | learned
    norm: str = 'rmsnorm' # rmsnorm | layernorm
    mlp: str = 'swiglu' # swiglu | gelu; equal in parameters
    qk_norm: bool = True # layernorm without parameters on queries and keys (https://arxiv.org/abs/2302.05442)
    tie_weights: bool = False # one matrix for embedding and head
    init: str = 'zero' # zero: output projections (and an untied head) start at 0 | gpt2: small normals, scaled by depth
    attention: str = 'causal' # causal | full | block | hierarchical: see block_ids
    attn_backend: str = 'auto' # auto | sdpa | flex. auto: flex on cuda where there is a mask to skip, else sdpa
    grad_checkpointing: bool = False # compute activations twice instead of keeping them: less memory, ~1/3 more time

    def __post_init__(self):
        for name, options in CHOICES.items():
            value = getattr(self, name)
            assert value in options, f"{name} is {value!r}, expected one of {', '.join(options)}"
        assert self.n_embd % self.n_head == 0, f"n_embd {self.n_embd} is not a multiple of n_head {self.n_head}"
        head = self.n_embd // self.n_head
        assert self.pos != 'rope' or head % 2 == 0, f"rope turns pairs: a head of {head} dimensions (n_embd / n_head) is odd"
        self.text_size = self.vocab_size if self.text_size is None else self.text_size
        assert self.text_size <= self.vocab_size, f"text_size {self.text_size} exceeds vocab_size {self.vocab_size}"

CHOICES = {'pos': ('rope', 'learned'), 'norm': ('rmsnorm', 'layernorm'), 'mlp': ('swiglu', 'gelu'),
           'init': ('zero', 'gpt2'), 'attention': tuple(ATTENTIONS), 'attn_backend': ('auto', 'sdpa', 'flex')}

def make_norm(config):
    return nn.RMSNorm(config.n_embd, eps=1e-5) if config.norm == 'rmsnorm' else nn.LayerNorm(config.n_embd, bias=config.bias)

def rope_table(config):
    """ cos and signed sin of position * frequency, (2, block_size, D) for heads of D, https://arxiv.org/abs/2104.09864 """
    half = config.n_embd // config.n_head // 2
    freq = 10000.0 ** (-torch.arange(half).float() / half)
    angle = torch.arange(config.block_size).float()[:, None] * freq
    return torch.stack((angle.cos().repeat(1, 2), torch.cat((-angle.sin(), angle.sin()), dim=1)))

def rotate(x, cos, sin):
    """ rotary positions: dimension i < D/2 and dimension i + D/2 of x (..., D) are the two coordinates of a pair """
    return torch.addcmul(x * cos, x.roll(x.size(-1) // 2, -1), sin)

def drop(x, module):
    """ dropout, where there is any """
    return F.dropout(x, module.dropout) if module.training and module.dropout else x

class Attention(nn.Module):

    def __init__(self, config, layer):
        super().__init__()
        self.layer, self.n_head, self.qk_norm, self.dropout = layer, config.n_head, config.qk_norm, config.dropout
        self.c_attn = nn.Linear(config.n_embd, 3 * config.n_embd, bias=config.bias) # query, key, value
        self.c_proj = nn.Linear(config.n_embd, config.n_embd, bias=config.bias)

    def forward(self, x, rope, mask, cache=None):
        B, T, C = x.shape
        qkv = self.c_attn(x).view(B, T, 3, self.n_head, C // self.n_head)
        if self.qk_norm or rope is not None:
            qk, v = qkv[:, :, :2], qkv[:, :, 2].transpose(1, 2) # queries and keys take the same steps, so take them together
            qk = F.layer_norm(qk, qk.shape[-1:]) if self.qk_norm else qk
            qk = rotate(qk, *rope) if rope is not None else qk
            q, k = qk.permute(2, 0, 3, 1, 4).unbind()
        else:
            q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind() # (B, H, T, D)
        if cache is not None:
            k, v = cache.append(self.layer, k, v) # (B, H, length + T, D)
        y = attend(q, k, v, mask, self.dropout if self.training else 0.0)
        y = self.c_proj(y.transpose(1, 2).reshape(B, T, C))
        return drop(y, self)

class MLP(nn.Module):

    def __init__(self, config):
        super().__init__()
        self.gated, self.dropout = config.mlp == 'swiglu', config.dropout
        # a gate is a third matrix: 8/3 of the width instead of 4, in steps of 16, costs the same parameters
        hidden = round(config.n_embd / 6) * 16 if self.gated else 4 * config.n_embd
        self.c_fc = nn.Linear(config.n_embd, 2 * hidden if self.gated else hidden, bias=config.bias)
        self.c_proj = nn.Linear(hidden, config.n_embd, bias=config.bias)

    def forward(self, x):
        x = self.c_fc(x)
        if self.gated:
            x, gate = x.chunk(2, dim=-1)
            x = F.silu(gate) * x # https://arxiv.org/abs/2002.05202
        else:
            x = F.gelu(x)
        return drop(self.c_proj(x), self)

class Block(nn.Module):

    def __init__(self, config, layer):
        super().__init__()
        self.ln_1, self.attn = make_norm(config), Attention(config, layer)
        self.ln_2, self.mlp = make_norm(config), MLP(config)

    def forward(self, x, rope, mask, cache=None):
        x = x + self.attn(self.ln_1(x), rope, mask, cache)
        return x + self.mlp(self.ln_2(x))

# -----------------------------------------------------------------------------
# sampling, shared by every objective

def token_probs(logits, temperature=1.0, top_k=None, top_p=None):
    """ (..., V) logits -> float32 probabilities; temperature 0 is the argmax; top_p keeps the token that crosses p """
    assert temperature >= 0, f"temperature is {temperature}, expected 0 (greedy) or more"
    assert top_k is None or top_k >= 1, f"top_k is {top_k}, expected at least 1"
    assert top_p is None or 0 < top_p <= 1, f"top_p is {top_p}, expected a probability in (0, 1]"
    logits = logits.float()
    if temperature == 0:
        return F.one_hot(logits.argmax(-1), logits.size(-1)).float()
    logits = logits / temperature
    if top_k is not None and top_k < logits.size(-1):
        logits = logits.masked_fill(logits < logits.topk(top_k).values[..., -1:], -math.inf)
    probs = logits.softmax(-1)
    if top_p is not None and top_p < 1:
        sorted_probs, order = probs.sort(-1, descending=True)
        beyond = sorted_probs.cumsum(-1) - sorted_probs >= top_p # the mass before this token already reached p
        probs = probs.masked_fill(torch.zeros_like(beyond).scatter(-1, order, beyond), 0.0)
        probs = probs / probs.sum(-1, keepdim=True)
    return probs

def draw(probs):
    """ one id per distribution, (..., V) -> (...); multinomial, because a float32 Gumbel race lowers the temperature """
    return torch.multinomial(probs.flatten(0, -2), 1).view(probs.shape[:-1])

# -----------------------------------------------------------------------------
# objectives

class GPT(nn.Module):
    """
    ar: predict the next token; the trunk that every other objective shares, with the same parameter names.
    The contract with the training loop is `logits, loss = model(**batch)`; batch holds idx (B, T), optional targets
    (B, T), aligned with idx, -1 = not scored (and never corrupted), and whatever else a provider sends.
    """
    loss_name = 'nll' # what forward's loss is, in nats per scored token
    bound_name = 'nll' # what nll_bound gives: 'nll' is exact, 'nelbo' an upper bound, None: there is none
    attentions = ('causal',) # patterns this objective can be trained with, its default first

    def __init__(self, config):
        super().__init__()
        assert config.attention in self.attentions, \
            f"{type(self).__name__} works with attention {' | '.join(self.attentions)}, not {config.attention!r}"
        self.config, self.dropout = config, config.dropout
        self.transformer = nn.ModuleDict(dict(
            wte = nn.Embedding(config.vocab_size, config.n_embd),
            h = nn.ModuleList([Block(config, layer) for layer in range(config.n_layer)]),
            ln_f = make_norm(config),
        ))
        if config.pos == 'learned':
            self.transformer.wpe = nn.Embedding(config.block_size, config.n_embd)
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

    def _init_weights(self, module):
        if isinstance(module, (nn.Linear, nn.Embedding)):
            nn.init.normal_(module.weight, std=0.02)
        if isinstance(module, nn.Linear) and module.bias is not None:
            nn.init.zeros_(module.bias)

    @property
    def row_length(self):
        """ tokens of text in a training row: without a begin id the first one is only context, as in nanoGPT """
        return self.config.block_size + (self.config.begin_id is None)

    def n_params(self):
        return sum(p.numel() for p in self.parameters())

    # ---- the pieces of every forward

    def embed(self, idx, pos):
        """ idx (B, N), pos (N,) -> x (B, N, C) """
        x = self.transformer.wte(idx)
        if self.config.pos == 'learned':
            x = x + self.transformer.wpe(pos)
        return drop(x, self)

    def trunk(self, x, pos, mask, cache=None):
        """ x (B, N, C) at positions pos (N,) -> (B, N, C), normalised. mask as in attend; cache: rows follow what it keeps """
        rope = None
        if self.config.pos == 'rope': # written out for every head, because broadcasting costs more than reading
            rope = self.rope[:, pos, None, None].to(x.dtype).expand(-1, -1, 2, self.config.n_head, -1).contiguous()
        for block in self.transformer.h:
            if self.config.grad_checkpointing and self.training:
                x = torch.utils.checkpoint.checkpoint(block, x, rope, mask, use_reentrant=False)
            else:
                x = block(x, rope, mask, cache)
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
        assert T <= self.config.block_size, f"{T} tokens do not fit the context: block_size is {self.config.block_size}"
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
        loss = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=-1, reduction='sum')
        return logits, loss / (targets != -1).sum().clamp(min=1)

    @torch.no_grad()
    def nll_bound(self, idx, targets, n_samples=1):
        """ -log p of the scored tokens in nats, (B, n_samples), and how many there are, (B,). Exact here: columns agree """
        inputs, targets = self.shift(idx, targets)
        logits = self.next_token_logits(inputs).float()
        nll = F.cross_entropy(logits.transpose(1, 2), targets, ignore_index=-1, reduction='none').sum(1) # (B,)
        return nll[:, None].expand(-1, n_samples), (targets != -1).sum(1)

    @torch.no_grad()
    def metrics(self, idx, targets):
        """ what the log shows beside the loss, over scored tokens: accuracy, and the mean entropy of predictions (nats) """
        inputs, targets = self.shift(idx, targets)
        probs = self.next_token_logits(inputs).float().softmax(-1)
        scored = targets != -1
        return {'accuracy': (probs.argmax(-1) == targets)[scored].float().mean().item(),
                'entropy': -torch.xlogy(probs, probs).sum(-1)[scored].mean().item()}

    @torch.no_grad()
    def generate(self, idx, max_new_tokens, *, temperature=1.0, top_k=None, top_p=None, stop=None, on_step=None):
        """
        Continue idx (B, T), T >= 0, by max_new_tokens: (B, T + max_new_tokens). Rows may differ in prompt length: -1 behind a
        row's prompt means "yours to fill". stop: a token id; a row that emitted it is filled up with it.
        on_step(step, idx, probs, state): called after every token with what is written so far, the distributions it came
        from (B, V) and {'nfe': network evaluations, 'done': positions settled, 'total': positions in all}.
        The KV cache is exact. When the context is full, the newer half of it is read again from position 0 and writing goes on.
        """
        B, given = idx.size(0), (idx != -1).sum(1) # (B,), prompt lengths
        begin = idx.new_full((B, self.config.begin_id is not None), self.config.begin_id or 0) # (B, 1) or (B, 0)
        first, T, room = int(given.min()) if B else 0, idx.size(1), self.config.block_size - begin.size(1)
        assert first + begin.size(1) > 0, "without a begin id a prompt needs at least one token"
        assert ((idx != -1).cumprod(1).sum(1) == given).all(), "a prompt has a gap (-1 before a given token): ar only writes on"
        out = torch.cat((idx, idx.new_full((B, max_new_tokens), -1)), dim=1)
        ended = torch.zeros(B, dtype=torch.bool, device=idx.device)
        cache = None
        for n in range(first, out.size(1)): # the shortest prompt decides where writing starts
            if cache is None or cache.length == cache.size:
                kept = room if cache is None else max(1, room // 2)
                window = torch.cat((begin, out[:, max(0, n - kept):n]), dim=1)
                cache = Cache(self.config, B, min(self.config.block_size, window.size(1) + out.size(1) - n), self.lm_head.weight)
            else:
                window = out[:, n - 1:n]
            with torch.inference_mode(): # small tensors: what autograd would note down costs more than the arithmetic
                pos = torch.arange(cache.length, cache.length + window.size(1), device=idx.device)
                x = self.trunk(self.embed(window, pos), pos, 'full' if window.size(1) == 1 else 'causal', cache)
                cache.keep(window.size(1))
                probs = token_probs(self.logits(x[:, -1]), temperature, top_k, top_p) # (B, V)
                token = draw(probs)
            if stop is not None:
                token = token.masked_fill(ended, stop)
            out[:, n] = token if n >= T else torch.where(out[:, n] == -1, token, out[:, n]) # a longer prompt keeps its own
            if stop is not None:
                ended |= (out[:, n] == stop) & (n >= given)
            if on_step is not None:
                on_step(n - first + 1, out[:, :n + 1], probs, {'nfe': n - first + 1, 'done': n + 1, 'total': out.size(1)})
            if stop is not None and ended.all():
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
        assert optimizer in ('adamw', 'muon'), f"optimizer is {optimizer!r}, expected adamw or muon"
        matrices = {id(p) for p in self.transformer.h.parameters() if p.dim() == 2} if optimizer == 'muon' else set()
        rest = [p for p in self.parameters() if id(p) not in matrices]
        groups = [{'params': [p for p in rest if p.dim() >= 2], 'weight_decay': weight_decay},
                  {'params': [p for p in rest if p.dim() < 2], 'weight_decay': 0.0}]
        fused = self.lm_head.weight.device.type in ('cuda', 'cpu') # one kernel instead of one per parameter
        optimizers = [torch.optim.AdamW(groups, lr=learning_rate, betas=betas, fused=fused)]
        if matrices:
            assert hasattr(torch.optim, 'Muon'), f"optimizer=muon needs torch 2.9 or newer, this is {torch.__version__}"
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

OBJECTIVES = {'ar': GPT}

# -----------------------------------------------------------------------------
# the only file access

FORMAT = 1 # of checkpoints

def read_checkpoint(path):
    """ the dict of a checkpoint that train.py wrote, tensors on the CPU; never executes pickled code """
    try:
        ckpt = torch.load(path, map_location='cpu', weights_only=True)
    except OSError:
        raise
    except Exception as e: # truncated, foreign or unsafe: the kinds of exception are many, the news is one
        raise ValueError(f"{path} is no checkpoint that can be read ({type(e).__name__}): truncated, or from elsewhere") from None
    if not isinstance(ckpt, dict) or 'format' not in ckpt:
        raise ValueError(f"{path} is not one of our checkpoints: it has no 'format'")
    if ckpt['format'] > FORMAT:
        raise ValueError(f"{path} has checkpoint format {ckpt['format']}, this code reads up to {FORMAT}: update the code")
    return ckpt

def load_checkpoint(path, device='cpu', weights='ema', objectives=OBJECTIVES):
    """
    A checkpoint of train.py (its path, or what read_checkpoint gave) -> (model in eval mode, the checkpoint's dict).
    weights: 'ema' takes the averaged weights where the run kept them, 'raw' those of the last step.
    """
    assert weights in ('ema', 'raw'), f"weights is {weights!r}, expected ema or raw"
    ckpt = path if isinstance(path, dict) else read_checkpoint(path)
    unknown = sorted(ckpt['config'].keys() - {f.name for f in fields(GPTConfig)})
    if unknown or ckpt['objective'] not in objectives:
        raise ValueError(f"the checkpoint was written by another version: {', '.join(unknown) or ckpt['objective']} is unknown here")
    model = objectives[ckpt['objective']](GPTConfig(**ckpt['config']))
    model.load_state_dict(ckpt['ema'] if weights == 'ema' and ckpt['ema'] else ckpt['model'])
    return model.eval().to(device), ckpt
