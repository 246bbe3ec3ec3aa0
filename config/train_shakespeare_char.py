"""
A character model of tiny shakespeare: 4 layers, width 128, context 128, 0.8M parameters.
One word chooses the objective.
Scoreboard on one CPU core: ar nll 1.520 (8 minutes), bd3lm(4) nelbo <= 1.934, mdlm nelbo <= 2.063.
$ python train.py config/train_shakespeare_char.py --objective=ar
$ python train.py config/train_shakespeare_char.py --objective=mdlm --out_dir=out-shakespeare-mdlm
$ python train.py config/train_shakespeare_char.py --objective=bd3lm --diffusion_block_size=4 \
--out_dir=out-shakespeare-bd3lm
$ python train.py config/train_shakespeare_char.py --objective=df --out_dir=out-shakespeare-df
"""
out_dir = 'out-shakespeare-char'
dataset = 'shakespeare_char'
block_size = 128
batch_size = 16
max_iters = 1500
