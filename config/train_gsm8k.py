"""
Plan, then execute: grade school math. A question has 128 tokens of GPT-2's byte pairs, a plan 128 and an execution
256. This size needs a GPU.
$ python train.py config/train_gsm8k.py
Compare it with --skip=plan (question -> execution) and --objective=ar, each in an --out_dir of its own.
Longer rows: python prepare.py gsm8k --question_len=256 --plan_len=256 --exec_len=512
Without the BPE at hand: python prepare.py gsm8k --tokenizer=byte --question_len=256 --plan_len=256 --exec_len=512
"""
out_dir = 'out-gsm8k'
dataset = 'gsm8k'
objective = 'bd3lm'
block_size = 0 # what the segments add up to
diffusion_block_size = 16
n_layer = 8
n_head = 8
n_embd = 512
dropout = 0.1 # 7,000 records are few
batch_size = 32
learning_rate = 2e-3
max_iters = 5000
warmup_iters = 200
t_dist = 'bell'
