"""
Tiny shakespeare, one id per character, exactly as nanoGPT's shakespeare_char: 65 characters, the first 90 % are train.
$ python prepare.py shakespeare_char
$ python prepare.py shakespeare_char --input=input.txt   # a local copy, or any other text to split the same way
"""
import os

from prepare import download, file_sum, read_text, split_documents

tokenizer = 'char'
URL = 'https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt'
SHA256 = '86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed'

def corpus(folder, input='', url=URL, sha256=''):
    path = input or download(url, os.path.join(folder, 'input.txt'), sha256 or SHA256)
    splits = split_documents([read_text(path, sha256)], 0.1)
    # each split is one document, without an end id: the split falls into the middle of a speech
    return {'splits': splits, 'closed': False, 'source': path if input else url, 'source_sha256': file_sum(path),
            'licence': 'the text of the usual file is in the public domain'}
