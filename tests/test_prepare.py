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

def run(*args, **env):
    """ the command as a reader would type it -> (exit code, stdout, stderr) """
    env = {**os.environ, 'no_proxy': '127.0.0.1', 'NO_PROXY': '127.0.0.1', **env}
    command = [sys.executable, 'prepare.py', *map(str, args)]
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True)
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
    texts = {'a/1.txt': BOOK, 'a/2.txt': 'z' * 3000, 'b/3.txt': '', 'b/c/4.txt': last.replace('\n', '\r\n'), 'b/5.md': '#'}
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
MARKED = {'no mark': ('', 'utf-8'), 'utf-8': ('\ufeff', 'utf-8'), 'utf-16, little end': ('\ufeff', 'utf-16-le'),
          'utf-16, big end': ('\ufeff', 'utf-16-be'), 'utf-32, little end': ('\ufeff', 'utf-32-le'), 'utf-32, big end': ('\ufeff', 'utf-32-be')}

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
    (b'ab\x00c', 'has a NUL character at position 2'), ('a text'.encode('utf-16-le'), 'has a NUL character at position 1'),
    ('a text'.encode('utf-16-be'), 'save it as UTF-8'), (b'\x89PNG\r\n\x1a\n\x00\x00', 'is not UTF-8 text: byte 0x89 at offset 0')])
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
    for kind, change in ('unix', str), ('windows', lambda text: '\ufeff' + text.replace('\n', '\r\n')), ('trimmed', lambda text: text.replace(' \n', '\n')):
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
    (book / 'val.bin').write_bytes(b'1234')
    says('val.bin has 4 bytes and meta.json says 1002')
    meta = json.loads((book / 'meta.json').read_text())
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
    anything = st.recursive(st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5) | st.sampled_from(['char', 'byte', 'uint32', 'float64']),
                            lambda inner: st.lists(inner, max_size=2) | st.dictionaries(st.sampled_from(['train', 'val', 'tokens']), inner, max_size=2), max_leaves=4)
    changed = st.dictionaries(st.sampled_from(sorted(meta)), anything, min_size=1, max_size=2).map(lambda changes: json.dumps({**meta, **changes}).encode())
    without = st.sampled_from(sorted(meta)).map(lambda key: json.dumps({k: v for k, v in meta.items() if k != key}).encode())
    bits = st.binary(max_size=9) | st.integers(0, len(val)).map(lambda n: val[:n]) | st.binary(min_size=2, max_size=2).map(lambda two: val[:-2] + two)

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
    write(tmp_path / 'data' / 'mine' / 'prepare.py', "tokenizer = 'char'\ndef corpus():\n    return {'train': ['ab'], 'val': ['b']}\n")
    with pytest.raises(PrepareError, match='no dict of splits and closed'):
        prepare.ensure('mine')
    assert prepare.data_folder('./x') == './x' and prepare.data_folder('a/b') == 'a/b'

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
