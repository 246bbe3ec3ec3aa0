"""
Everything once, in under a minute on two CPU cores: prepare a corpus that comes with Python, train 50 iterations,
evaluate. Works with any objective.
$ python train.py config/quick_test.py --objective=ar
"""
out_dir = 'out-quick-test'
dataset = 'python_docs'
block_size = 64
batch_size = 8
n_layer = 2
n_head = 2
n_embd = 64
max_iters = 50
warmup_iters = 5
log_interval = 10
eval_interval = 25
eval_iters = 4
scoreboard_windows = 100 # the first of some thousands
