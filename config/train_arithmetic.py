"""
Plan, then execute: word problems in two steps. They are generated, so no network is needed.
Block diffusion over question, plan and execution takes 7 minutes on one core of a CPU. It answers 28 to 34 % of 500
test questions right in three runs (chance is 7 %), ar 43 and 46 %. config/README.md has the table.
$ python train.py config/train_arithmetic.py
$ python train.py config/train_arithmetic.py --skip=plan --out_dir=out-arithmetic-no-plan
$ python train.py config/train_arithmetic.py --objective=ar --out_dir=out-arithmetic-ar
Other comparisons on the same rows: --objective=mdlm (one noise level per segment), and the same with
--attention=full (no hierarchy).
$ python sample.py --out_dir=out-arithmetic \
--start="Ann has 7 figs. Bob has 5 more than Ann. Cid has 2 fewer than Bob. How many has Bob?"
"""
out_dir = 'out-arithmetic'
dataset = 'arithmetic'
objective = 'bd3lm'
block_size = 0 # what the segments add up to: 136 + 32 + 32, or 168 without the plan
diffusion_block_size = 8
batch_size = 16
max_iters = 1200
t_dist = 'bell'
