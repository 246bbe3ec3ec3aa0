"""
tiny shakespeare at a size for one GPU: 6 layers, width 384, context 256, 10.7M parameters.
One word chooses the objective. Not measured yet: it needs a GPU.
$ python train.py config/train_shakespeare_10m.py --objective=ar
$ python train.py config/train_shakespeare_10m.py --objective=mdlm --t_dist=bell --out_dir=out-shakespeare-10m-mdlm
$ python train.py config/train_shakespeare_10m.py --objective=bd3lm --diffusion_block_size=4 --t_dist=bell \
--clean_causal=True --ar_weight=1 --out_dir=out-shakespeare-10m-dual
"""
out_dir = 'out-shakespeare-10m'
dataset = 'shakespeare_char'
n_layer = 6
n_head = 6
n_embd = 384
block_size = 256
batch_size = 64
dropout = 0.2 # 80 epochs
max_iters = 5000
log_interval = 50
