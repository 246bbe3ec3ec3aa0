"""
The size of GPT-2, 124M parameters and context 1024, on the BPE tokens of WikiText-2. It shows what a step costs
(tokens/s, share of the promised FLOP/s, peak memory), and it can start from GPT-2's weights.
Not measured yet: it needs a GPU.
$ python prepare.py wikitext2
$ python train.py config/train_gpt2_124m.py --objective=mdlm
$ python -m tools.bench config/train_gpt2_124m.py,objective=ar config/train_gpt2_124m.py,objective=mdlm \
config/train_gpt2_124m.py,objective=bd3lm --text_size=50256 --samples=0
"""
out_dir = 'out-gpt2-124m'
dataset = 'wikitext2'
n_layer = 12
n_head = 12
n_embd = 768
block_size = 1024
batch_size = 16
gradient_accumulation_steps = 4
tie_weights = True
learning_rate = 1e-3
max_iters = 2000
ema = 0.999
