"""
The first model: characters of python's own documentation and library, embedded in every python, so no network is needed.
$ python train.py config/train_python_docs.py --objective=ar
"""
out_dir = 'out-python-docs'
dataset = 'python_docs'
