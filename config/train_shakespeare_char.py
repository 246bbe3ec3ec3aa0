"""
A character model of tiny shakespeare, 0.8M parameters.
$ python train.py config/train_shakespeare_char.py --objective=ar
"""
out_dir = 'out-shakespeare-char'
dataset = 'shakespeare_char'
