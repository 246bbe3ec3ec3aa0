"""
nanoGPT's CPU configuration with nanoGPT's network and optimizer, on tiny shakespeare: 1.814 by its protocol, 1.805 on
the scoreboard. Its README promises 1.88 in 3 minutes.
$ python train.py config/train_shakespeare_char_nanogpt.py
"""
out_dir = 'out-shakespeare-char-nanogpt'
dataset = 'shakespeare_char'
begin = False # windows of 64 + 1 tokens, the first only context
block_size = 64
batch_size = 12

pos = 'learned'
norm = 'layernorm'
mlp = 'gelu'
qk_norm = False
tie_weights = True
init = 'gpt2'

optimizer = 'adamw'
learning_rate = 2e-3 # nanoGPT's own 1e-3 ends at 1.91 here
beta2 = 0.99
max_iters = 2000
warmup_iters = 100
decay = 'cosine'
final_lr = 0.1
