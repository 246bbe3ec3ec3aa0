""" laws of the data format: what goes in comes out, all or nothing, and every mistake is one sentence. No network """
import glob
import hashlib
import http.server
import json
import os
import random
import subprocess
import sys
import threading

import numpy as np
import pytest

import prepare
from prepare import Corpus, PrepareError, Tokenizer, vocabulary

ROOT = os.path.dirname(os.path.abspath(prepare.__file__))
DEAD = 'http://127.0.0.1:9' # nobody listens there: as a proxy it is "no network"
BOOK = ''.join(random.Random(1).choices('abc de\n', k=5000)) + 'é😀'

def run(*args, encoding='utf-8', **env):
    """ the command as a reader would type it -> (exit code, stdout, stderr) """
    env = {**os.environ, 'no_proxy': '127.0.0.1', 'NO_PROXY': '127.0.0.1', **env}
    command = [sys.executable, 'prepare.py', *map(str, args)]
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, encoding=encoding)
    return done.returncode, done.stdout, done.stderr

def refused(*args, says, **env):
    code, _, err = run(*args, **env)
    line = err.strip().splitlines()[-1]
    assert code == 2 and line.startswith('error: ') and 'Traceback' not in err
    assert [words for words in ([says] if isinstance(says, str) else says) if words not in line] == []

def write(path, text):
    path.parent.mkdir(exist_ok=True, parents=True)
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return path

def bins(folder):
    meta = json.loads((folder / 'meta.json').read_text())
    return {split: np.fromfile(folder / f'{split}.bin', dtype=meta['dtype']) for split in meta['splits']}

@pytest.fixture
def book(tmp_path):
    """ a folder prepared from one file """
    prepare.prepare('text', str(tmp_path / 'book'), input=str(write(tmp_path / 'book.txt', BOOK)))
    return tmp_path / 'book'

@pytest.fixture
def gpt2(monkeypatch):
    """ a real tiktoken encoding with three merges instead of fifty thousand """
    tiktoken = pytest.importorskip('tiktoken')
    ranks = {bytes([i]): i for i in range(256)} | {b'th': 256, b'the': 257, b' a': 258}
    small = tiktoken.Encoding('small', pat_str=r' ?\w+|\s+|[^\w\s]+', mergeable_ranks=ranks,
                              special_tokens={'<|endoftext|>': 50256})
    monkeypatch.setattr(tiktoken, 'get_encoding', lambda name: small)
    monkeypatch.setattr(prepare, 'download', lambda url, path, *rest: path)

# tokenizers

@pytest.mark.parametrize('kind', ['char', 'byte', 'gpt2'])
def test_decode_undoes_encode(kind, gpt2):
    texts = ['', 'the a the\n', BOOK, '<|endoftext|> is text', '\x00\t\r\n \u2028 é 日本 😀', 'x' * 300]
    meta = vocabulary(kind, texts, closed=True)
    tokenizer = Tokenizer(json.loads(json.dumps(meta)))
    for text in texts + random.Random(2).choices(texts, k=9):
        ids = tokenizer.encode(text)
        assert tokenizer.decode(ids) == text and ids.dtype == np.int64
        assert len(ids) == 0 or 0 <= ids.min() <= ids.max() < meta['end_id']
    # reserved ids: right after the text, silent
    assert [meta[k] - meta['end_id'] for k in ('begin_id', 'mask_id', 'pad_id', 'text_size')] == [1, 2, 3, 1]
    the = [*tokenizer.encode('the')]
    assert tokenizer.decode([meta['end_id'], *the, meta['mask_id'], *the, meta['vocab_size'] - 1]) == 'thethe'

def test_vocabularies(gpt2):
    assert vocabulary('byte')['text_size'] == 256 and vocabulary('byte', closed=True)['text_size'] == 257
    assert vocabulary('gpt2') == dict(tokenizer='gpt2', vocab_size=50304, text_size=50257, end_id=50256, begin_id=50257,
                                      mask_id=50258, pad_id=50259)
    assert Tokenizer(vocabulary('gpt2')).encode('the a').tolist() == [257, 258] # the merges were used
    assert Tokenizer(vocabulary('byte')).decode([0xc3]) == '\ufffd' # half a letter
    with pytest.raises(PrepareError, match=r"unknown character 'x' \(U\+0078\) at position 2.*only 'ab'"):
        Tokenizer(vocabulary('char', ['ab'])).encode('abxx')
    with pytest.raises(PrepareError, match='did you mean byte'):
        vocabulary('bytes')

def test_gpt2_without_network(tmp_path):
    pytest.importorskip('tiktoken')
    env = dict(TIKTOKEN_CACHE_DIR=str(tmp_path / 'cache'), HTTPS_PROXY=DEAD, https_proxy=DEAD)
    names = ['6d1cbeee0f20b3d9449abfede4726ed8212e3aee', '6c7ea1a7e38e3a7f062df639a5b80947f075ffe6']
    refused('text', f"--input={write(tmp_path / 'a.txt', BOOK)}", '--tokenizer=gpt2', f'--dataset={tmp_path}/out',
            says=['no connection', 'vocab.bpe', 'encoder.json', *names, str(tmp_path / 'cache')], **env)
    assert not (tmp_path / 'out' / 'meta.json').exists()

# writing

@pytest.mark.parametrize('kind', ['char', 'byte', 'gpt2'])
def test_bins_are_the_encoding_and_meta_their_sums(kind, gpt2, tmp_path):
    last = '<|endoftext|>\n' * 100
    texts = {'a/1.txt': BOOK, 'a/2.txt': 'z' * 3000, 'b/3.txt': '', 'b/c/4.txt': last.replace('\n', '\r\n'),
             'b/5.md': '#'}
    for name, text in texts.items():
        write(tmp_path / name, text)
    prepare.prepare('text', str(tmp_path / 'out'), kind, input=f'{tmp_path}/**/*.txt', val_fraction=0.3)
    corpus, whole = Corpus(str(tmp_path / 'out')), BOOK + 'z' * 3000 + last
    cut = int(len(whole) * 0.7)
    expected = {'train': [BOOK, whole[len(BOOK):cut]], 'val': [whole[cut:-len(last)], last]} # 2.txt straddles
    for split, ids in bins(tmp_path / 'out').items():
        encoded = [np.append(corpus.tokenizer.encode(d), corpus.meta['end_id']) for d in expected[split]]
        assert (ids == np.concatenate(encoded)).all() and ids.max() < corpus.meta['text_size']
        file, n = (tmp_path / 'out' / f'{split}.bin').read_bytes(), sum(map(len, expected[split]))
        counts = dict(tokens=len(ids), characters=n, documents=2, sha256=hashlib.sha256(file).hexdigest())
        assert corpus.meta['splits'][split] == counts
    prepare.prepare('text', str(tmp_path / 'flat'), kind, input=str(tmp_path / 'a')) # a folder is its own *.txt
    assert Corpus(str(tmp_path / 'flat')).meta['files'] == 2

def test_a_vocabulary_of_any_size_fits_its_dtype(tmp_path):
    """ 16 bits hold 65,536 ids; a corpus with more characters needs 32 """
    letters = [chr(n) for n in range(32, 0x11000) if not 0xd800 <= n <= 0xdfff]
    for n, dtype in (1000, 'uint16'), (65_531, 'uint16'), (65_532, 'uint32'), (len(letters), 'uint32'):
        text = ''.join(random.Random(n).sample(letters[:n], n)) * 2
        prepare.prepare('text', str(tmp_path / 'out'), input=str(write(tmp_path / 'a.txt', text)), val_fraction=0.5)
        corpus = Corpus(str(tmp_path / 'out'))
        assert corpus.meta['dtype'] == dtype and corpus.meta['vocab_size'] == n + 4 and np.iinfo(dtype).max >= n + 3
        assert corpus.tokenizer.decode(np.concatenate(list(bins(tmp_path / 'out').values()))) == text
        found = next(corpus.windows('val', 1, n))['idx'][0]
        assert len(set(found.tolist())) == n and found.max() == n - 1 and found.min() == 0

def test_shakespeare_is_split_as_nanogpt_does(tmp_path):
    text = write(tmp_path / 'input.txt', BOOK)
    code, out, err = run('shakespeare_char', f'--input={text}', f'--dataset={tmp_path}/out')
    assert code == 0 and not err and '4,501 characters' in out
    chars, data = sorted(set(BOOK)), bins(tmp_path / 'out')
    expected = [chars.index(c) for c in BOOK]
    assert data['train'].tolist() == expected[:int(5002 * 0.9)] and data['val'].tolist() == expected[int(5002 * 0.9):]
    meta = json.loads((tmp_path / 'out' / 'meta.json').read_text())
    assert meta['text_size'] == meta['end_id'] == len(chars) and meta['chars'] == ''.join(chars)
    assert meta['source_sha256'] == hashlib.sha256(BOOK.encode()).hexdigest()

def test_python_docs(tmp_path):
    for name in ('one', 'two'):
        prepare.prepare('python_docs', str(tmp_path / name))
        corpus = Corpus(str(tmp_path / name))
    for file in ('train.bin', 'val.bin', 'meta.json'):
        assert (tmp_path / 'one' / file).read_bytes() == (tmp_path / 'two' / file).read_bytes()
    documents = {}
    for split, ids in bins(tmp_path / 'one').items():
        assert ids[-1] == corpus.meta['end_id']
        documents[split] = [corpus.tokenizer.decode(d) for d in np.split(ids, np.flatnonzero(ids == ids[-1]))[:-1]]
        assert len(documents[split]) == corpus.meta['splits'][split]['documents']
    assert sum(n['characters'] for n in corpus.meta['splits'].values()) >= 1_000_000
    assert set(corpus.meta['chars']) <= {'\n', *map(chr, range(32, 127))}
    assert not set(documents['train']) & set(documents['val'])
    # nor in pieces: a topic of the reference may quote another
    paragraphs = {s: [p for d in ds for p in d.split('\n\n') if len(p) > 80] for s, ds in documents.items()}
    known = set(paragraphs['train'])
    assert sum(len(p) for p in paragraphs['val'] if p in known) < 0.01 * sum(map(len, paragraphs['val']))
    assert sys.version.split()[0].strip('+') in corpus.meta['source']

def test_wikitext_articles_put_together_are_the_file(tmp_path):
    article = ' \n = {} = \n \n Some = equal = signs . \n \n = = Section = = \n \n Yes . \n \n = = = Deeper = = = \n \n'
    text = ''.join(article.format(name) for name in ('One', 'Two ( 2 )', 'Three'))
    for name in ('train', 'valid', 'test'):
        write(tmp_path / f'{name}.txt', text)
    prepare.prepare('wikitext2', str(tmp_path / 'out'), 'byte', input=str(tmp_path))
    corpus = Corpus(str(tmp_path / 'out'))
    assert {k: v['documents'] for k, v in corpus.meta['splits'].items()} == {'train': 3, 'val': 3, 'test': 3}
    assert corpus.tokenizer.decode(bins(tmp_path / 'out')['test']) == text

@pytest.mark.parametrize('victim', ['fsync', 'replace', 'encode'])
def test_all_or_nothing(victim, book, tmp_path, monkeypatch):
    def full(*args):
        raise OSError(28, 'No space left on device')
    before = {path: open(path, 'rb').read() for path in glob.glob(f'{book}/*')}
    monkeypatch.setattr(*(Tokenizer, victim) if victim == 'encode' else (os, victim), full)
    for folder in (book, tmp_path / 'new'):
        with pytest.raises(PrepareError, match='cannot write .*: No space left'):
            prepare.prepare('text', str(folder), 'byte', input=str(tmp_path / 'book.txt'))
    assert os.listdir(tmp_path / 'new') == []
    after = {path: open(path, 'rb').read() for path in glob.glob(f'{book}/*')}
    assert after == before if victim != 'replace' else f'{book}/meta.json' not in after # half renamed: not prepared
    assert not glob.glob(f'{book}/*.tmp')

# text as it comes, from whichever editor and system

SAID = 'One day,\tsaid she,\n\n\nit is “late” 😀.\nNo?'
ENDS = {'unix': '\n', 'windows': '\r\n', 'old mac': '\r'}
MARKED = {'no mark': ('', 'utf-8'), 'utf-8': ('\ufeff', 'utf-8'),
          'utf-16, little end': ('\ufeff', 'utf-16-le'), 'utf-16, big end': ('\ufeff', 'utf-16-be'),
          'utf-32, little end': ('\ufeff', 'utf-32-le'), 'utf-32, big end': ('\ufeff', 'utf-32-be')}

@pytest.mark.parametrize('mark', MARKED)
@pytest.mark.parametrize('end', ENDS)
def test_a_text_is_the_same_whoever_wrote_it(tmp_path, mark, end):
    (mark, encoding), last = MARKED[mark], SAID + '\n'
    for text in SAID, last, '\n' + last:
        path = write(tmp_path / 'a.txt', (mark + text.replace('\n', ENDS[end])).encode(encoding))
        assert prepare.read_text(str(path)) == text
        assert prepare.read_text(str(path), prepare.file_sum(path)) == text # of the bytes as they are

def test_mixed_line_ends_and_what_is_no_line_end(tmp_path):
    path = write(tmp_path / 'a.txt', 'a\r\n\rb\n\r\nc\r\r\n\x0b\x0c\x85\u2028 \t\ufeff')
    assert prepare.read_text(str(path)) == 'a\n\nb\n\nc\n\n\x0b\x0c\x85\u2028 \t\ufeff'

@pytest.mark.parametrize('data, says', [
    (b'', 'is empty'), (b'\xef\xbb\xbf', 'is empty'), ('\ufeff'.encode('utf-16-le'), 'is empty'),
    (b'\xff\xfea', 'is not UTF-16 text'), ('\ufeffa'.encode('utf-16-le') + b'\x00\xd8', 'is not UTF-16 text'),
    (b'ab\x00c', 'has a NUL character at position 2'),
    ('a text'.encode('utf-16-le'), 'has a NUL character at position 1'),
    ('a text'.encode('utf-16-be'), 'save it as UTF-8'),
    (b'\x89PNG\r\n\x1a\n\x00\x00', 'is not UTF-8 text: byte 0x89 at offset 0')])
def test_what_is_no_text(tmp_path, data, says):
    path = str(write(tmp_path / 'a.txt', data))
    for read in (lambda: prepare.read_text(path), lambda: prepare.prepare('text', str(tmp_path / 'out'), input=path),
                 lambda: prepare.prepare('records', str(tmp_path / 'out'), input=path)):
        with pytest.raises(PrepareError, match=says):
            read()

def test_every_reader_of_text_takes_every_line_end(tmp_path, monkeypatch):
    """ the same tokens from \\n and from \\r\\n behind a byte order mark: text, shakespeare_char, wikitext2 """
    article = ' \n = {} = \n \n Some = equal = signs . \n'
    text = ''.join(map(article.format, ('One', 'Two'))) * 9
    found = {}
    changes = {'unix': str, 'windows': lambda text: '\ufeff' + text.replace('\n', '\r\n'),
               'trimmed': lambda text: text.replace(' \n', '\n')}
    for kind, change in changes.items():
        for name in 'train', 'valid', 'test':
            write(tmp_path / kind / f'{name}.txt', change(text))
        for name, place in ('text', 'train.txt'), ('shakespeare_char', 'train.txt'), ('wikitext2', ''):
            prepare.prepare(name, str(tmp_path / name), 'byte', input=str(tmp_path / kind / place))
            found[kind, name] = {split: ids.tobytes() for split, ids in bins(tmp_path / name).items()}
            documents = {n['documents'] for n in Corpus(str(tmp_path / name)).meta['splits'].values()}
            assert documents == ({18} if name == 'wikitext2' else {1})
    for name in 'text', 'shakespeare_char', 'wikitext2':
        assert found['unix', name] == found['windows', name] != found['trimmed', name]

def test_a_folder_of_text_files_of_any_spelling(tmp_path):
    names = ['a.txt', 'B.TXT', 'c.Txt', 'd.text', 'e.TEXT']
    for name in [*names, 'f.md', 'txt', 'g.txt.gz', '.h.txt', 'i.txt~']:
        write(tmp_path / 'in' / name, name[0] * 100)
    write(tmp_path / 'in' / 'j.txt' / 'k.txt', 'a folder that is called like a file')
    write(tmp_path / 'in' / 'l.txt', '\ufeff') # empty, but for its mark
    prepare.prepare('text', str(tmp_path / 'out'), input=str(tmp_path / 'in'))
    meta = Corpus(str(tmp_path / 'out')).meta
    assert meta['files'] == 5 and meta['chars'] == 'Bacde' and meta['closed']
    write(tmp_path / 'no' / 'a.txt', '')
    write(tmp_path / 'no' / 'b.txt', '\ufeff')
    with pytest.raises(PrepareError, match='all of the 2 files of .*no are empty'):
        prepare.prepare('text', str(tmp_path / 'out'), input=str(tmp_path / 'no'))

# downloads, from a server of our own

@pytest.fixture(scope='module')
def server():
    class Page(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            self.server.asked.append(self.path)
            self.send_response(404 if 'missing' in self.path else 200)
            self.send_header('Content-Length', len(BOOK.encode()))
            self.end_headers()
            self.wfile.write(BOOK.encode()[:100 if 'short' in self.path else None]) # short: and then it hangs up

        def log_message(self, *args):
            pass
    with http.server.ThreadingHTTPServer(('127.0.0.1', 0), Page) as server:
        server.asked, server.url = [], f'http://127.0.0.1:{server.server_address[1]}'
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield server
        server.shutdown()

def test_download(server, tmp_path):
    out, bad = tmp_path / 'out', tmp_path / 'bad'
    good = '--sha256=' + hashlib.sha256(BOOK.encode()).hexdigest().upper()
    blob = '--sha256=' + hashlib.sha1(b'blob %d\0' % len(BOOK.encode()) + BOOK.encode()).hexdigest() # as git counts
    for checksum in (good, blob): # the second time the file is there
        code, text, _ = run('shakespeare_char', f'--url={server.url}/ok', checksum, f'--dataset={out}')
        assert code == 0 and '4,501 characters' in text and (out / 'input.txt').read_text() == BOOK
    assert server.asked == ['/ok']
    for page, checksum, says in [('ok', '--sha256=' + '0' * 64, [good[9:].lower(), '0' * 64, '--sha256=']),
                                 ('ok', '--sha256=', ['86c4e6aa']), # the usual file is expected unless said otherwise
                                 ('missing', good, ['404', '/missing', '--input=', '--url=']),
                                 ('short', good, ['broke off', '/short', '--input='])]:
        refused('shakespeare_char', f'--url={server.url}/{page}', checksum, f'--dataset={bad}', says=says)
        assert os.listdir(bad) == []
    refused('shakespeare_char', f'--url={DEAD}', f'--dataset={bad}', says=['no connection', DEAD, '--input='])
    refused('wikitext2', f'--url={server.url}', '--sha256=1,2', says='three')
    refused('wikitext2', f'--url={server.url}', '--tokenizer=byte', f'--dataset={bad}',
            says=['/train.txt has the checksum', '2d84b35a'])
    sums = ','.join([good[9:]] * 3)
    assert run('wikitext2', f'--url={server.url}', f'--sha256={sums}', '--tokenizer=byte', f'--dataset={out}')[0] == 0
    assert server.asked[-3:] == ['/train.txt', '/valid.txt', '/test.txt']

# reading

def test_batches_are_windows_of_the_corpus(book):
    corpus = Corpus(str(book))
    data, n = bins(book)['val'], corpus.tokens('val')
    windows = list(corpus.windows('val', 3, 40))
    assert [len(w['idx']) for w in windows] == [3, 3, 3, 3] and corpus.n_windows('val', 40) == n // 40 == 12
    assert (np.concatenate([w['idx'] for w in windows]).ravel() == data[:n // 40 * 40]).all() # disjoint, in order, all
    assert [len(w['idx']) for w in corpus.windows('val', 3, 40, limit=4)] == [3, 1]
    for batch in windows + [corpus.batch('val', 200, 40, np.random.default_rng(0))]:
        assert batch['idx'].dtype == batch['targets'].dtype == np.int64 and (batch['idx'] == batch['targets']).all()
        assert not np.shares_memory(batch['idx'], batch['targets'])
    assert batch['idx'].shape == (200, 40)
    assert all(row.astype(data.dtype).tobytes() in data.tobytes() for row in batch['idx'])
    # every start is drawn, the last one included, and the generator decides which
    starts = {bytes(row) for row in corpus.batch('val', 999, n - 3, np.random.default_rng(1))['idx']}
    assert starts == {bytes(data[i:i + n - 3].astype(np.int64)) for i in range(4)}
    a, b = (corpus.batch('train', 4, 9, np.random.default_rng(7))['idx'] for _ in range(2))
    assert (a == b).all()

def test_what_reading_refuses(book):
    def says(pattern, split='val', length=40):
        with pytest.raises(PrepareError, match=pattern):
            Corpus(str(book)).batch(split, 2, length, np.random.default_rng(0))
    assert prepare.provider('text') == {}
    write(book / 'provider.py', 'OBJECTIVES = {"mine": int}')
    assert prepare.provider(str(book))['OBJECTIVES'] == {'mine': int} and 'data_book_provider' in sys.modules
    says('no split .test., only train, val', split='test')
    says('val.bin has 501 tokens, fewer than the context of 999: lower block_size', length=999)
    (book / 'val.bin').write_bytes(np.full(501, 9, dtype=np.uint16).tobytes())
    says(r'val.bin holds the id 9, but ids of text are below 9: prepare it again')
    (book / 'val.bin').write_bytes(bytes(1004))
    says('val.bin has 1004 bytes and meta.json says 1002')
    (book / 'val.bin').write_bytes(b'1234')
    says('val.bin has 4 bytes and meta.json says 1002')
    meta = json.loads((book / 'meta.json').read_text())
    for known in json.dumps(meta | {'format': 0}), '\ufeff' + json.dumps(meta): # an older one, and an editor's mark
        write(book / 'meta.json', known)
        says('val.bin has 4 bytes')
    for broken, pattern in [(json.dumps(meta | {'format': 2}), 'format 2, newer'), ('{"format": 1}', 'KeyError'),
                            ('{', 'cannot make sense of .*meta.json'), ('[]', 'cannot make sense')]:
        (book / 'meta.json').write_text(broken)
        says(pattern)
    (book / 'meta.json').unlink()
    says(r'there is no .*meta.json: run python prepare.py NAME --dataset=')

def test_damaged_files_never_end_in_a_traceback(book):
    """ any change to meta.json and to a bin is either harmless or a sentence """
    hypothesis = pytest.importorskip('hypothesis')
    st, meta, val = hypothesis.strategies, json.loads((book / 'meta.json').read_text()), (book / 'val.bin').read_bytes()
    leaf = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5)
    leaf |= st.sampled_from(['char', 'byte', 'uint32', 'float64'])
    keys = st.sampled_from(['train', 'val', 'tokens'])
    inside = lambda inner: st.lists(inner, max_size=2) | st.dictionaries(keys, inner, max_size=2)
    anything = st.recursive(leaf, inside, max_leaves=4)
    known = st.sampled_from(sorted(meta))
    changed = st.dictionaries(known, anything, min_size=1, max_size=2)
    changed = changed.map(lambda changes: json.dumps({**meta, **changes}).encode())
    without = known.map(lambda key: json.dumps({k: v for k, v in meta.items() if k != key}).encode())
    cut = st.integers(0, len(val)).map(lambda n: val[:n])
    bits = st.binary(max_size=9) | cut | st.binary(min_size=2, max_size=2).map(lambda two: val[:-2] + two)

    @hypothesis.settings(max_examples=300, deadline=None, database=None)
    @hypothesis.given(st.just(json.dumps(meta).encode()) | changed | without | st.binary(), st.just(val) | bits)
    def law(text, data):
        (book / 'meta.json').write_bytes(text)
        (book / 'val.bin').write_bytes(data)
        try:
            corpus = Corpus(str(book))
            for batch in [corpus.batch('val', 2, 9, np.random.default_rng(0)), *corpus.windows('val', 8, 9)]:
                assert batch['idx'].min() >= 0 and batch['idx'].max() < corpus.meta['text_size']
                corpus.tokenizer.decode(batch['idx'])
        except PrepareError as e:
            assert '\n' not in str(e)
    law()

def test_plain_text_has_no_segments(book):
    for args, says in [((str(book), 16, 'plan'), 'skip=plan leaves out segments, and .*book is plain text'),
                       ((str(book), 0), 'block_size=0 is what segments add up to')]:
        with pytest.raises(PrepareError, match=says):
            prepare.open_corpus(*args)
    corpus, n = prepare.open_corpus(str(book), 16)
    assert n == 16 and type(corpus) is Corpus and corpus.n_windows('val', 16) == 501 // 16

def test_ensure(book, tmp_path, monkeypatch, capsys):
    assert prepare.ensure(str(book)) == str(book)
    for dataset, pattern in [(str(tmp_path / 'no'), 'run python prepare.py NAME --dataset='),
                             ('shakespear', 'did you mean shakespeare_char')]:
        with pytest.raises(PrepareError, match=pattern):
            prepare.ensure(dataset)
    # built-in names: into a data folder elsewhere, so that the repository stays clean
    for name in ('text', 'python_docs'):
        write(tmp_path / 'data' / name / 'prepare.py', open(f'{ROOT}/data/{name}/prepare.py').read())
    monkeypatch.setattr(prepare, '_DATA', str(tmp_path / 'data'))
    capsys.readouterr()
    with pytest.raises(PrepareError, match='python prepare.py text --input='):
        prepare.ensure('text')
    assert prepare.ensure('python_docs') == prepare.ensure('python_docs') == str(tmp_path / 'data' / 'python_docs')
    assert capsys.readouterr().out.count('preparing') == 1 and Corpus('python_docs').tokens('val')
    script = "tokenizer = 'char'\ndef corpus():\n    return {'train': ['ab'], 'val': ['b']}\n"
    write(tmp_path / 'data' / 'mine' / 'prepare.py', script)
    with pytest.raises(PrepareError, match='no dict of splits and closed'):
        prepare.ensure('mine')
    assert prepare.data_folder('./x') == './x' and prepare.data_folder('a/b') == 'a/b'

# the settings of a dataset are the parameters of its corpus()

@pytest.fixture
def own(tmp_path, monkeypatch, capsys):
    """
    own(signature, *argv, segments='', lines=''): `python prepare.py mine ARGV`, where the parameters of corpus() are as
    in signature -> (exit code, stdout, stderr, meta.json)
    """
    def run(signature, *argv, segments='', lines=''):
        document = "{'question': 'why', 'plan': 'so'}" if segments else "'why'"
        code = f"""
\"\"\" My words, n times. \"\"\"
{lines}
tokenizer = 'char'
{segments and f'segments = {segments!r}'}
def corpus({signature}):
    print('told', {{key: value for key, value in locals().items()}})
    return {{'splits': {{'train': [{document}] * 3, 'val': [{document}]}}, 'closed': True, 'source': 'made up'}}
""".lstrip()
        write(tmp_path / 'data' / 'mine' / 'prepare.py', code)
        monkeypatch.setattr(sys, 'dont_write_bytecode', True) # two scripts of one second and one length would be one
        monkeypatch.setattr(prepare, '_DATA', str(tmp_path / 'data'))
        meta, left = tmp_path / 'data' / 'mine' / 'meta.json', 0
        meta.unlink(missing_ok=True)
        try:
            prepare.main(['mine', *argv])
        except SystemExit as e:
            left = e.code
        found = json.loads(meta.read_text()) if meta.exists() else None
        return left, *capsys.readouterr(), found
    return run

SIGNATURE = "n=500, share=0.5, word='so', loud=False, seed=0"

def test_a_parameter_of_corpus_is_a_setting(own):
    everything = dict(n=500, share=0.5, word='so', loud=False, seed=0)
    for argv, told in [([], {}), (['--n=300'], dict(n=300)),
                       (['--n=3e2', '--share=1', '--word=1e3', '--loud=True', '--seed=-7'],
                        dict(n=300, share=1.0, word='1e3', loud=True, seed=-7)),
                       (['--word='], dict(word='')), (['--n=500', '--loud=false'], {})]:
        code, out, err, meta = own(SIGNATURE, *argv)
        assert code == 0 and err == '' and f'told {everything | told}' in out, err
        assert meta['settings'] == everything | told and meta['source'] == 'made up'
        assert [type(v) for v in meta['settings'].values()] == [int, float, str, bool, int]
    for argv, says in [('--n=2.5', 'n must be int (default 500), got float 2.5'), ('--n=abc', 'n must be int'),
                       ('--n=True', 'n must be int'), ('--n=', 'n must be int'),
                       ('--share=half', 'share must be float (default 0.5)'),
                       ('--loud=1', 'loud must be bool (default False)'),
                       ('--n', '--n needs a value, e.g. --n=500'),
                       ('--wrd=a', 'unknown setting wrd on the command line; did you mean word?'),
                       ('--m=3', 'unknown setting m'), ('--folder=x', 'unknown setting folder')]:
        code, out, err, meta = own('folder, ' + SIGNATURE, argv)
        assert code == 2 and err.startswith('error: ') and err.count('\n') == 1 and says in err and meta is None, err

def test_a_parameter_without_a_default_must_be_given(own):
    assert "mine needs to know its n: python prepare.py mine --n=..." in own('n, word="a"')[2]
    three = own('n, word="a"', '--n=3')[3]['settings']
    assert three == {'n': 3, 'word': 'a'} == own('*, n, word="a", **more', '--n=3')[3]['settings']
    assert 'mine needs to know its input: python prepare.py mine --input=...' in own('input')[2]
    assert own('input', '--input=')[0] == 2
    assert own('input', '--input=3')[3]['settings'] == {'input': '3'} # text, as prepare.py's own setting is

def test_a_type_without_a_default(own):
    """ an annotation says it; without one a number is a number """
    signature = 'a, b: int, c: float | None = None, d: str = None'
    assert own(signature, '--a=3', '--b=2e0', '--c=1', '--d=4')[3]['settings'] == dict(a=3, b=2, c=1.0, d='4')
    assert own(signature, '--a=None', '--b=2')[2].startswith('error: mine needs to know its a')
    for text, value in ('2.5', 2.5), ('-1', -1), ('True', True), ('abc', 'abc'), ('', ''), ('[1]', '[1]'):
        found = own(signature, f'--a={text}', '--b=-2')[3]['settings']
        assert found == dict(a=value, b=-2, c=None, d=None) and type(found['a']) is type(value)
    for argv, says in [('--b=2.5', 'b must be int (default None), got float 2.5'), ('--b=None', 'b must be int'),
                       ('--c=x', 'c must be float or None')]:
        assert says in own(signature, '--a=1', argv)[2]
    assert own('n: "int"', '--n=3', lines='from __future__ import annotations')[3]['settings'] == {'n': 3}

def test_what_is_no_scalar_is_no_setting(own):
    _, out, _, meta = own('n=1, names=("a", "b"), _hidden=2, make=print')
    assert meta['settings'] == {'n': 1, 'names': ['a', 'b'], '_hidden': 2, 'make': '<built-in function print>'}
    for key in 'names', '_hidden', 'make':
        assert f'unknown setting {key}' in own('n=1, names=("a", "b"), _hidden=2, make=print', f'--{key}=1')[2]

def test_a_name_of_prepare_py_keeps_its_meaning(own, tmp_path):
    """ whatever the default of corpus() for it is """
    _, out, _, meta = own('folder, fields, tokenizer="word", dataset=None, val_fraction=0, name="x"',
                          '--val_fraction=0.25', '--tokenizer=byte', '--name=y')
    told = dict(folder=str(tmp_path / 'data' / 'mine'), fields=[], tokenizer='byte', dataset='mine', val_fraction=0.25,
                name='y')
    assert f'told {told}' in out and meta['tokenizer'] == 'byte'
    assert meta['settings'] == {k: v for k, v in told.items() if k not in ('folder', 'fields')}
    plain = own('tokenizer="word", val_fraction=0')
    assert plain[3]['settings'] == dict(tokenizer='char', val_fraction=0) and plain[3]['tokenizer'] == 'char'
    lengths = own('fields, too_long="never", plan_len=7', '--plan_len=9', segments='question:8,plan:8')
    assert lengths[3]['settings'] == dict(too_long='drop', plan_len=9)
    assert lengths[3]['segments'] == 'question:8,plan:9' and "['question', 'plan']" in lengths[1]
    assert own('tokenizer=""')[3]['settings'] == {'tokenizer': 'char'}
    with pytest.raises(PrepareError, match='mine has no use for --folder, only for tokenizer'):
        prepare.prepare('mine', str(tmp_path / 'out'), folder='x')

def test_help_shows_what_a_dataset_takes(own, capsys):
    code, out, _, _ = own(SIGNATURE + ', val_fraction=0.2', '--help')
    begins = 'My words, n times.\n\n--n=500\n--share=0.5\n--word=so\n--loud=False\n--seed=0\n--val_fraction=0.2'
    assert code == 0 and out.startswith(begins)
    lines = {line.split('=')[0]: line for line in out.splitlines() if line.startswith('--')}
    assert [*lines][5:] == ['--val_fraction', '--dataset', '--tokenizer']
    assert 'byte or gpt2' in lines['--tokenizer'] and 'becomes val' in lines['--val_fraction']
    assert '--plan_len=0' in own('n', '--help', segments='question:8,plan:8')[1]
    assert '--n=None' in own('n', '--help')[1] and '--n=None' in own('n: int', '--help')[1]
    with pytest.raises(SystemExit):
        prepare.main(['--help'])
    out = capsys.readouterr().out
    assert 'too_long=drop' in out
    assert not any(f'--{key}=' in out for key in ('difficulty', 'max_records', 'marks', 'seed'))

def test_suggestions_are_among_what_is_expected(own):
    for argv, suggests in [('--plan_ln=3', None), ('--quetsion_len=3', None), ('--tokeniser=byte', 'tokenizer'),
                           ('--inptu=x', None), ('--wodr=x', 'word')]:
        err = own(SIGNATURE, argv)[2]
        assert 'unknown setting' in err
        assert f'did you mean {suggests}?' in err if suggests else 'did you mean' not in err, err
    assert 'did you mean plan_len?' in own('n=1', '--plan_ln=3', segments='question:8,plan:8')[2]
    assert 'mine has no use for --plan_len, only for n, dataset, tokenizer' in own('n=1', '--plan_len=3')[2]
    with pytest.raises(PrepareError, match='mine has no use for --number, only for n$'):
        prepare.prepare('mine', number=3)
    with pytest.raises(PrepareError, match='skip names .question., expected some of plan, execution$'):
        prepare.without({'question': 8, 'plan': 8, 'execution': 8}, 'question')
    with pytest.raises(PrepareError, match='expected some of plan, execution; did you mean execution?'):
        prepare.without({'question': 8, 'plan': 8, 'execution': 8}, 'exectuion')

def test_memory_that_does_not_suffice_is_a_sentence(own):
    code, _, err, meta = own('n=[][:1]', lines='def full(*a): raise MemoryError\nprint = full')
    assert (code, meta) == (2, None)
    assert err == 'error: out of memory: prepare a part of it, such as fewer files or records\n'

# ~, which no shell replaces behind an =

def test_a_tilde_is_the_home_folder(own, tmp_path, monkeypatch):
    monkeypatch.setenv('HOME', str(tmp_path / 'home'))
    for name in 'in/a.txt', 'in/train.txt', 'in/valid.txt', 'in/test.txt':
        write(tmp_path / 'home' / name, BOOK)
    write(tmp_path / 'home' / 'in' / 'r.json', json.dumps([dict(question='a', plan='b', execution='c')] * 3))
    for split in 'train', 'test':
        problem = json.dumps(dict(question='a', answer='b\n#### 1')) + '\n'
        write(tmp_path / 'home' / 'in' / f'{split}.jsonl', 2 * problem)
    for name, place in [('text', 'a.txt'), ('text', ''), ('text', '*.txt'), ('text', '**/a.t?t'),
                        ('shakespeare_char', 'a.txt'), ('records', 'r.json'), ('wikitext2', ''), ('gsm8k', '')]:
        prepare.main([name, f'--input=~/in/{place}', '--dataset=~/out/x', '--tokenizer=byte'])
        meta = json.loads((tmp_path / 'home' / 'out' / 'x' / 'meta.json').read_text())
        assert meta['dataset'] == name and meta['settings']['input'] == f'{tmp_path}/home/in/{place}'
        assert open_any('~/out/x').folder == str(tmp_path / 'home' / 'out' / 'x') == prepare.ensure('~/out/x')
    assert prepare.data_folder('~') == str(tmp_path / 'home') and prepare.read_text('~/in/a.txt') == BOOK
    for name in 'a~', '~~', '~no_such_user_', 'a~b': # names, not paths
        assert prepare.data_folder(name) == os.path.join(prepare._DATA, name)
    assert prepare.data_folder('./~/a') == './~/a' and not os.path.exists('~')

def open_any(dataset):
    return prepare.open_corpus(dataset, 0 if 'segments' in prepare.read_meta(dataset) else 8)[0]

# output that cannot show a character, and output that nobody reads any more

@pytest.mark.parametrize('encoding', ['ascii', 'cp1252', 'utf-8', 'latin-1:strict'])
def test_any_text_can_be_shown(tmp_path, encoding):
    """ in a folder with a name that is no text at all, too """
    folder = os.fsdecode(os.fsencode(tmp_path) + b'/caf\xe9 \xe2\x80\x9c')
    records = [dict(question='“wh\x00y” 日本', plan='é', execution='\ud83d\ude00 \x80')] * 4
    path = write(tmp_path / 'r.json', json.dumps(records))
    as_is = dict(PYTHONIOENCODING=encoding, encoding=encoding.split(':')[0])
    for name, place in ('records', path), ('text', write(tmp_path / 'a.txt', 'é“日本😀' * 50)):
        code, out, err = run(name, f'--input={place}', f'--dataset={folder}/{name}', **as_is)
        assert code == 0 and err == '' and 'preparing' in out, err
        assert Corpus(f'{folder}/text').meta['chars'] == 'é“日本😀' if name == 'text' else '[execution]' in out
    code, _, err = run('text', f'--input={folder}/none', **as_is)
    assert code == 2 and 'no file matches' in err and 'Traceback' not in err

@pytest.mark.parametrize('argv', ['--help', 'text --help', 'arithmetic --max_records=200', 'nonsense'])
def test_a_reader_that_has_enough_ends_it_quietly(tmp_path, argv):
    """ as `| head -c 3` does; and where stderr is the same pipe """
    for both in False, True:
        command = [sys.executable, 'prepare.py', *argv.split(), *([f'--dataset={tmp_path}/out'] if '=' in argv else [])]
        to = subprocess.STDOUT if both else subprocess.PIPE
        done = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=to, bufsize=0)
        done.stdout.close()
        err = b'' if both else done.stderr.read()
        code = done.wait(60)
        assert (code, err) == (141, b'') if argv != 'nonsense' or both else code == 2 and err.startswith(b'error: ')
    assert not glob.glob(f'{tmp_path}/out/*.tmp')

def test_the_command_refuses_with_a_sentence(tmp_path):
    a, empty = write(tmp_path / 'a.txt', BOOK), write(tmp_path / 'e.txt', '')
    latin = write(tmp_path / 'l.txt', b'caf\xe9!')
    refused(says=['NAME', 'python_docs, records, shakespeare_char, text'])
    refused('shakespear', says='did you mean shakespeare_char')
    refused('text', says='python prepare.py text --input=')
    refused('text', f'--input={tmp_path}/*.md', says=f'no file matches {tmp_path}/*.md')
    refused('text', f'--input={empty}', says='e.txt is empty')
    refused('text', f'--input={latin}', says='l.txt is not UTF-8 text: byte 0xe9 at offset 3')
    refused('text', f'--input={a}', '--val_fraction=0', says='val_fraction=0.0 of 5002 characters would leave')
    refused('text', f'--input={a}', '--val_fraction=nan', says='val_fraction=nan')
    refused('text', f'--input={a}', '--tokenizer=chars', says='did you mean char')
    refused('text', f'--input={a}', f'--dataset={a}/x', says='cannot write')
    refused('python_docs', f'--input={a}', says='no use for --input')
    refused('shakespeare_char', f'--input={a}', f'--url={DEAD}', says='only one')
    refused('shakespeare_char', f'--input={a}', f'--sha256={"0" * 64}', says=['a.txt has the checksum', '0' * 64])
    refused('shakespeare_char', f'--input={tmp_path}/none.txt', says='cannot read')
    refused('text', '--inptu=x', says='did you mean input')
