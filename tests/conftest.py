""" before any test imports anything """
import os

os.environ['HF_HUB_OFFLINE'] = '1' # no test asks the network for weights, where transformers is installed
# One thread, here and in the processes that tests start, so that a sum has one order. Tensors are tiny, so it is faster
# too: beside another busy process two threads wait for each other on two cores, and tests/test_diffusion.py takes over
# four minutes instead of 47 s.
os.environ['OMP_NUM_THREADS'] = '1'
