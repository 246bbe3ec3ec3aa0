""" before any test imports anything """
import os

os.environ['HF_HUB_OFFLINE'] = '1' # no test asks the network for weights, where transformers is installed
