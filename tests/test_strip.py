"""
Laws of the strip of tools/plot.py, a text at five moments of its denoising: what is hidden, what is new, where it
stands. The models are tiny and untrained.
"""
import os
from unittest.mock import MagicMock

import pytest
import torch

from prepare import Tokenizer, vocabulary
from tests.test_sample import TEXT, save
from tests.test_train import here # noqa: F401, a fixture
from tools import plot

CHARS = Tokenizer(vocabulary('char', [TEXT]))
BYTES = Tokenizer(vocabulary('byte'))

# ---- which moments

def frames_of(*rows):
    """ frames of a text of four tokens, given as '__7_': a hidden token is _; one call between any two of them """
    return [([-1 if c == '_' else int(c) for c in row], calls) for calls, row in enumerate(rows)]

def written(*rows):
    found = plot.moments(frames_of(*rows))
    return [(''.join('_' if i == -1 else str(i) for i in ids), calls) for ids, calls, _ in found]

def test_moments_are_the_nearest():
    assert written('____', '1___', '1_3_', '123_', '1234') == [
        ('____', 0), ('1___', 1), ('1_3_', 2), ('123_', 3), ('1234', 4)]
    assert [share for *_, share in plot.moments(frames_of('9___', '91__', '912_', '9123'))] == [0, 1/3, 1/3, 2/3, 1]
    # two tokens per call: the earlier of two that are as near
    assert written('____', '12__', '1234') == [('____', 0), ('____', 0), ('12__', 1), ('12__', 1), ('1234', 2)]
    # what is given does not count, and calls without news change nothing
    assert written('9__9', '9__9', '91_9', '9129') == [
        ('9__9', 0), ('9__9', 0), ('91_9', 2), ('91_9', 2), ('9129', 3)]
    assert written('____', '1234') == [('____', 0)] * 3 + [('1234', 1)] * 2

def test_moments_never_go_back():
    """ also where a call hides tokens again; the last is the whole text """
    assert written('____', '12__', '1___', '1_34', '1234') == [
        ('____', 0), ('1___', 2), ('1___', 2), ('1_34', 3), ('1234', 4)]

@pytest.mark.parametrize('objective, settings', [
    ('ar', {}), ('mdlm', {}), ('denoise', {}), ('bd3lm', {'diffusion_block_size': 4}), ('df', {})])
def test_what_is_watched(tmp_path, objective, settings):
    """ the prompt alone, then what stands after every call, the whole text last; the calls are those of the model """
    model, _ = plot.load(str(save(tmp_path, objective, **settings)))
    torch.manual_seed(1)
    given, new = CHARS.encode('my').tolist(), 12
    frames = plot.watch(model.generate, torch.tensor([given]), new, {})
    assert frames[0] == (given + [-1] * new, 0) and -1 not in frames[-1][0]
    calls = [n for _, n in frames[:-1]]
    assert calls == sorted(set(calls)) and frames[-1][1] == calls[-1] > 0
    for ids, _ in frames:
        assert len(ids) == len(given) + new and ids[:len(given)] == given
    for (a, _), (b, _) in zip(frames, frames[1:]): # nothing that stands changes
        assert all(x in (-1, y) for x, y in zip(a, b))
    torch.manual_seed(1)
    assert model.generate(torch.tensor([given]), new)[0].tolist() == frames[-1][0]

def test_calls_are_those_of_the_network(runs):
    """ with guidance a step needs two """
    model, _ = plot.load(str(runs['mdlm']))
    frames = plot.watch(model.generate, torch.tensor([CHARS.encode('my').tolist()]), 3, {'guidance': 1.0})
    assert [calls for _, calls in frames] == [0, 2, 4, 6, 6]

# ---- what is shown of them

def test_parts_are_whole_characters():
    ids = BYTES.encode('a日é').tolist()
    assert plot.characters(BYTES, ids) == [(0, 1), (1, 4), (4, 6)]
    assert plot.characters(BYTES, [255, 97, 230]) == [(0, 2), (2, 3)] # no UTF-8; what is begun at the end
    assert plot.characters(CHARS, [0, 1, 2]) == [(0, 1), (1, 2), (2, 3)]

def test_every_character_can_be_seen():
    assert plot.signs('a b\n\t\r\0\ufffd') == 'a b↵→↵·\ufffd' and plot.signs('') == '∎'
    assert plot.width('ab') == 2 and plot.width('日') == 2

def test_lines_end_between_words():
    def lines(text, columns):
        places = plot.wrapped([1] * len(text), [c == ' ' for c in text], columns)
        assert all(column < columns for _, column in places)
        assert places == sorted(places) and len(set(places)) == len(text)
        return [''.join(c for c, (line, _) in zip(text, places) if line == n) for n in range(places[-1][0] + 1)]
    assert lines('one two three', 9) == ['one two ', 'three']
    assert lines('one two three', 8) == ['one two ', 'three']
    assert lines('one twothree', 9) == ['one twoth', 'ree'] # a word too long for the place that is left
    assert lines('abcdefgh', 3) == ['abc', 'def', 'gh'] and lines('ab', 9) == ['ab']
    assert plot.wrapped([4, 4, 4], [True] * 3, 9) == [(0, 0), (0, 4), (1, 0)]

def test_rows_show_what_is_hidden_and_what_is_new():
    a, b, c = (int(CHARS.encode(letter)[0]) for letter in 'my\n')
    found = [([a, -1, -1], 0, 0.0), ([a, -1, c], 3, 0.5), ([a, b, -1], 4, 0.5), ([a, b, c], 5, 1.0)]
    places, widths, rows = plot.strip_parts(CHARS, found)
    assert places == [(0, 0), (0, 1), (0, 2)] and widths == [1, 1, 1]
    assert rows == [
        (0, 0.0, [('m', False), (None, False), (None, False)]), (3, 0.5, [('m', False), (None, False), ('↵', True)]),
        (4, 0.5, [('m', False), ('y', True), (None, True)]), (5, 1.0, [('m', False), ('y', False), ('↵', True)])]

def test_a_part_stands_at_the_same_place_in_all_rows():
    """ as wide as the widest text that it ever has; half a character is hidden """
    a, *day = BYTES.encode('a日').tolist()
    first, last = [a, day[0], -1, day[2]], [a, *day]
    places, widths, rows = plot.strip_parts(BYTES, [(first, 0, 0.0), (last, 1, 1.0)])
    assert places == [(0, 0), (0, 1)] and widths == [1, 2]
    assert [row for *_, row in rows] == [[('a', False), (None, False)], [('a', False), ('日', True)]]

# ---- the picture

@pytest.fixture(scope='module')
def runs(tmp_path_factory):
    place = tmp_path_factory.mktemp('runs')
    records = vocabulary('char', [TEXT], closed=True) | {'segments': 'question:8,plan:8,execution:16'}
    hierarchy = dict(meta=records, segments=records['segments'], attention='hierarchical')
    hierarchy |= dict(diffusion_block_size=4)
    return {'ar': save(place / 'ar'), 'mdlm': save(place / 'mdlm', 'mdlm'), 'df': save(place / 'df', 'df'),
            'bd3lm': save(place / 'bd3lm', 'bd3lm', diffusion_block_size=4),
            'denoise': save(place / 'denoise', 'denoise'), 'alone': save(place / 'alone', 'mdlm', begin=False),
            'byte': save(place / 'byte', 'mdlm', vocabulary('byte')),
            'plans': save(place / 'plans', 'bd3lm', **hierarchy),
            'records': save(place / 'records', meta=records, segments=records['segments'])}

@pytest.mark.parametrize('name, args', [
    ('ar', '--start=my'), ('mdlm', ''), ('mdlm', '--start=my --sampler=fixed --steps=5 --remask=0.3'),
    ('bd3lm', '--order=random'), ('denoise', '--max_new_tokens=40'), ('df', '--start=my'), ('byte', '--start=é'),
    ('alone', ''), ('plans', '--start=my'), ('records', '--start=my'), ('mdlm', '--max_new_tokens=1')])
def test_a_strip_is_drawn(here, runs, tmp_path, name, args): # noqa: F811
    pytest.importorskip('matplotlib')
    path = tmp_path / 'strip.png'
    out = here(f"tools/plot.py strip {runs[name]} --output={path}", '--max_new_tokens=12', *args.split())
    assert out.splitlines()[-1] == str(path)
    from PIL import Image # as matplotlib does
    picture = Image.open(path)
    assert picture.width > 1000 and picture.height > 500 and 2 < len(picture.getcolors()) <= 64 # a small file

class Words:
    """ a tokenizer whose ids are places in a list of words """
    def __init__(self, *words):
        self.words = words

    def decode(self, ids):
        return ''.join(self.words[i] for i in ids)

@pytest.mark.filterwarnings('ignore:Glyph') # the font has no 日
def test_what_is_drawn():
    """ a block for all that is hidden or new, a letter for all that stands; everything within the picture """
    figure = pytest.importorskip('matplotlib.figure').Figure(dpi=plot.DPI)
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.colors import to_hex
    axes, words = figure.subplots(), Words('My', ' 日本', '$x', '$', '\n', ' and' * 9, ' so' * 10, ' on' * 9)
    frames = [([0, *[-1] * 7], 0), ([0, 1, *[-1] * 6], 1), ([*range(8)], 2)]
    places, widths, rows = plot.strip_parts(words, plot.moments(frames))
    assert widths[:5] == [2, 5, 2, 1, 1] and places[5:] == [(0, 11), (1, 0), (1, 30)]
    plot.draw_strip('a title that is longer than any text, ' * 9, places, widths, rows, axes)
    blocks, texts = axes.patches, [text for text in axes.texts if text.get_text() != ' ']
    hidden, new = 7 + 6 + 6, 1 + 6
    colors = [to_hex(block.get_facecolor()) for block in blocks]
    assert (colors.count(plot.PALE), colors.count(plot.PURPLE)) == (hidden + 1, new + 1) # and those of the legend
    assert [text.get_text() for text in texts if text.get_family() == ['monospace']][:2] == ['M', 'y']
    window, renderer = figure.bbox, FigureCanvasAgg(figure).get_renderer()
    for part in (*blocks, *texts):
        box = part.get_window_extent(renderer)
        assert window.x0 < box.x0 and box.x1 < window.x1 and window.y0 < box.y0 and box.y1 < window.y1, part
    letters = [c for text, _ in rows[-1][2] for c in text] # a wide one takes two columns
    at = [text.get_position()[0] for text in axes.texts if text.get_family() == ['monospace']][-len(letters):]
    steps = [b - a for a, b in zip(at[:10], at[1:10])] # of the first line: 'My 日本$x$↵ '
    assert steps == [18, 18, 27, 36, 27, 18, 18, 18, 18]

def test_a_line_may_end_before_a_space():
    """ where a tokenizer puts the space in front of its word """
    words = Words('a' * 60, ' bb', 'cc', 'dddddd')
    places, _, _ = plot.strip_parts(words, [([-1] * 4, 0, 0), ([*range(4)], 1, 1)])
    assert places == [(0, 0), (1, 0), (1, 3), (1, 5)]

def parts_drawn(folder, *args):
    """ title, places, widths and rows of a strip, without matplotlib """
    run, own = plot.read_run([str(folder), '--device=cpu', *args])
    with pytest.MonkeyPatch.context() as patch:
        for key, value in own.items():
            patch.setattr(plot, key, value)
        patch.setattr(plot, 'draw_strip', draw := MagicMock())
        plot.plot_strip(run, None)
    return draw.call_args.args[:-1]

def test_settings_reach_the_strip(runs):
    options = '--sampler=fixed', '--steps=4', '--max_new_tokens=8', '--start=my'
    title, places, _, rows = parts_drawn(runs['mdlm'], *options)
    assert title == 'mdlm, sampler=fixed, steps=4: 8 tokens in 4 network calls' and len(places) == 10
    assert [(calls, share) for calls, share, _ in rows] == [(0, 0), (1, 0.25), (2, 0.5), (3, 0.75), (4, 1)]
    for calls, _, row in rows:
        assert [text for text, _ in row[:2]] == ['m', 'y'] and not any(new for _, new in row[:2])
        assert sum(text is not None for text, _ in row[2:]) == 2 * calls
        assert sum(new for _, new in row) == 2 * (calls > 0)
    text = lambda *args: [part for part, _ in parts_drawn(runs['mdlm'], *args)[3][-1][2]]
    assert text('--seed=3') == text('--seed=3') != text('--seed=4') and len(text()) == 128
    assert text('--temperature=0') == text('--temperature=0', '--seed=4')

def test_a_plan_is_written_before_its_execution(runs):
    """ the pads of a question are left out; what follows an end is ends """
    title, places, _, rows = parts_drawn(runs['plans'], '--start=my')
    assert len(places) == 3 + 8 + 16 and [text for text, _ in rows[0][2]] == ['m', 'y', '∎'] + [None] * 24
    halfway = [text for text, _ in rows[2][2]]
    assert None not in halfway[:11] and None in halfway[11:] and '24 tokens' in title

@pytest.mark.parametrize('args, sentence', [
    ('', 'a strip shows one run, got 0'), ('{mdlm} {ar}', 'a strip shows one run, got 2'),
    ('{mdlm} --order=random|margin', 'a strip shows one run, got 2'), ('nowhere', 'there is no checkpoint nowhere'),
    ('{mdlm} --steps=3', 'has no use for steps=3'), ('{mdlm} --steps', "'steps' is no option, expected key=value"),
    ('{mdlm},steps=3 --steps=4', 'steps is given twice'), ('{mdlm},stepps=3', 'did you mean steps?'),
    ('{mdlm} --stop=3', 'mdlm has no use for stop'), ('{ar} --order=random', 'ar has no use for order'),
    ('{mdlm} --n_layer=3', 'unknown setting n_layer'), ('{mdlm} --sed=3', 'did you mean seed'),
    ('{mdlm} --max_new_tokens=0', 'max_new_tokens is 0, expected 1'), ('{mdlm} --seed=-1', 'seed is -1'),
    ('{mdlm} --max_new_tokens=2049', 'max_new_tokens is 2049, expected at most 2,048'),
    ('{mdlm} --max_new_tokens=x', 'max_new_tokens must be int'), ('{mdlm} --start=é', "unknown character 'é'"),
    ('{mdlm}:ar', 'cannot be read as ar'), ('{plans}', 'this model answers questions: give one with --start='),
    ('{plans} --start=mymymymymy', 'the question has 10 tokens'), ('{mdlm} --output={mdlm}', 'it is a folder'),
    ('{mdlm} --output=a.xyz', 'expected a name that ends in'), ('{mdlm} --device=abacus', 'cannot be used here')])
def test_what_cannot_be_drawn_is_a_sentence(here, runs, args, sentence): # noqa: F811
    said = here('tools/plot.py strip', *args.format_map(runs).split(), code=2)
    if 'needs matplotlib' in said:
        pytest.importorskip('matplotlib')
    assert sentence in said and said.count('\n') == 1 and not os.path.exists('strip.png')

def test_help_of_a_strip_lists_its_settings(here): # noqa: F811
    said = here('tools/plot.py strip --help')
    assert '--max_new_tokens=128   strip: tokens' in said and '--n_layer' not in said
