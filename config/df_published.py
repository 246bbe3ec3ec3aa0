"""
Diffusion forcing as published (https://arxiv.org/abs/2407.01392), on characters of Python's documentation.
2 minutes on one CPU core, and the result is no language model. The squared error falls from 0.85 to 0.07, but only
because embeddings are small beside the noise and move together (embedding_spread falls from 0.99 to 0.41). From level 8
of 32 the model recovers 1.5 % of the characters (3.2 % untrained). A character in pure noise, given clean text to its
left, costs 4.575 nats at the best temperature. That is ln 97, a blind guess.
$ python train.py config/df_published.py
$ python sample.py --out_dir=out-df-published --start="def "
"""
out_dir = 'out-df-published'
objective = 'df_published'
dataset = 'python_docs'
block_size = 128
batch_size = 16
max_iters = 300
eval_interval = 150
eval_iters = 4
scoreboard_windows = 50 # of some thousands: a blind guess needs no more

pos = 'learned'
init = 'gpt2'
df_x0_wpe = True # x0 is what a GPT reads: token and position
df_sampling_timesteps = 32 # DDPM, over all levels of training
df_scheduling_matrix = 'pyramid'
