"""
Pictures from settings or a config alone, and of a run's text while it is written; no training.
$ python -m tools.plot scheduling_matrix config/df_published.py
$ python -m tools.plot mask config/train_arithmetic.py
$ python -m tools.plot mask --objective=bd3lm --attention=hierarchical --block_size=32 --diffusion_block_size=4 \
      --segments=question:4,plan:8,check:4,execution:16
$ python -m tools.plot scheduling_matrix --df_scheduling_matrix=trapezoid --df_uncertainty_scale=2 --horizon=12 \
      --output=trapezoid.png
$ python -m tools.plot strip out-shakespeare-mdlm --sampler=fixed --steps=32 --start="ROMEO:" --seed=1
A strip takes the folder of a run, and the options that its model has in sample.py, such as --order or --top_p.
"""
import inspect
import itertools
import os
import sys
import unicodedata
from dataclasses import fields

import torch

import prepare
from configurator import configure, fail, print_anything
from model import OBJECTIVES, OPTIONS, DFConfig, block_ids, check, dense_mask, pick_device, scheduling_matrix
from model import segment_lengths
from tools.bench import own_settings, train_settings
from tools.runs import as_command, check_options, check_output, check_sizes, contenders, load, sentences

# what can be set: whatever of train.py is a field of GPTConfig or DFConfig (`--help` lists them), and
objective = 'ar' # mask: a row of OBJECTIVES
dataset = '' # mask: where segments come from, prepared or not, if not from --segments
skip = '' # mask: segments of the dataset to do without
horizon = 16 # scheduling_matrix: tokens in the chunk
start = '' # strip: the prompt, of a model of segments the question
max_new_tokens = 128 # strip: tokens to write after the prompt
seed = 1337 # strip: of the text
device = 'auto' # strip: auto (cuda, mps, cpu, whichever there is) | cuda | cuda:1 | mps | cpu
output = '' # file to write, its ending decides the format; '': the picture's name.png

DPI = 150
MOST = 8192 ** 2 # cells of a matrix: nobody sees more, and it must fit into memory

def plot_scheduling_matrix(config, axes):
    """ rows: network calls, downwards; columns: tokens of a chunk; dark is noise """
    S = config.df_sampling_timesteps
    # network calls between a token and the next, at most
    waits = S if config.df_scheduling_matrix == 'autoregressive' else config.df_uncertainty_scale
    check(not (S + horizon * waits) * horizon > MOST, f"horizon is {horizon}, which is too much for a picture")
    matrix = scheduling_matrix(config.df_scheduling_matrix, horizon, S, config.df_uncertainty_scale)
    image = axes.imshow(matrix.numpy(), cmap='Purples', aspect='auto', interpolation='nearest')
    axes.figure.colorbar(image, label='noise level (index)')
    axes.set(title=f"{config.df_scheduling_matrix}, uncertainty scale {config.df_uncertainty_scale:g}: "
                   f"{len(matrix) - 1} network calls for {horizon} tokens",
             xlabel='token of the chunk', ylabel='network calls made')

def segments_of(dataset):
    """ the segments of a prepared dataset, or those that it would be prepared with; '' for plain text """
    if dataset in prepare.names() and not os.path.exists(os.path.join(prepare.data_folder(dataset), 'meta.json')):
        return getattr(prepare.load(os.path.join(prepare._DATA, dataset), 'prepare.py'), 'segments', '')
    return prepare.read_meta(dataset).get('segments', '')

def plot_mask(config, axes):
    """
    A dark cell: the row (query) sees the column (key). Of two streams the noisy copy (xt) comes first, then the clean
    one (x0). Lines separate segments.
    """
    kind, T = OBJECTIVES[objective], config.block_size
    streams = 1 + getattr(kind, 'two_streams', False)
    check((streams * T) ** 2 <= MOST, f"block_size is {T}, which is too much for a picture")
    check(config.attention in kind.attentions,
          f"{objective} works with attention {' | '.join(kind.attentions)}, not {config.attention!r}")
    total = sum(config.lengths)
    check(total in (0, T), f"segments {config.segments} add up to {total}, block_size is {T}")
    cut = config.diffusion_block_size if config.attention == 'block' or streams == 2 else None
    ids = block_ids(config.attention, T, cut, config.lengths)
    if hasattr(kind, 'permuted'): # a random order, always the same one
        generator = torch.Generator().manual_seed(1337)
        parts = ids.split(config.lengths or [T])
        ids = torch.cat([part[torch.randperm(len(part), generator=generator)] for part in parts])
    noisy = torch.arange(streams * T) < T * (streams - 1)
    question = 0 if config.causal_within_block else None
    mask = dense_mask(ids.repeat(streams), noisy, config.clean_causal, question=question)
    axes.imshow(mask.numpy(), cmap='Purples', interpolation='nearest', vmin=0, vmax=1.5)
    lengths = config.lengths or [T]
    names = [part.partition(':')[0] if ':' in part else '' for part in (config.segments or '').split(',')]
    names = [name or f'segment {i}' if config.lengths else 'text' for i, name in enumerate(names)]
    labels = [name + stream for stream in ((' xt', ' x0') if streams == 2 else ('',)) for name in names]
    edges = [0, *itertools.accumulate(lengths * streams)]
    for edge in edges[1:-1]:
        axes.axhline(edge - 0.5, color='tab:orange', linewidth=0.8)
        axes.axvline(edge - 0.5, color='tab:orange', linewidth=0.8)
    for name, axis in ('x', axes.secondary_xaxis('top')), ('y', axes.secondary_yaxis('right')):
        middles = [(a + b - 1) / 2 for a, b in zip(edges, edges[1:])]
        getattr(axis, f'set_{name}ticks')(middles, labels, rotation=90 if name == 'x' else 0)
        axis.tick_params(length=0)
    blocks = f", blocks of {cut}" if cut else ''
    axes.set(xlabel='Key position', ylabel='Query position')
    causal = ', causal within blocks' * config.causal_within_block
    axes.set_title(f"{objective}, attention {config.attention}{blocks}{causal}: {int(mask.sum()):,} pairs", pad=12)

# -----------------------------------------------------------------------------
# strip: a text at five moments of its denoising

COLUMNS = 68 # characters of a line
MOST_TOKENS = 2048
INK, PURPLE, GREY, PALE = '#26243a', '#7a70b2', '#8d8b99', '#e9e8ef' # purple: that of the masks
SIGNS = {'\n': '↵', '\r': '↵', '\t': '→', '': '∎'} # '': the end id and other ids that no text contains
OURS = 'idx', 'max_new_tokens', 'on_step', 'block_ids', 'stop' # what a strip itself gives to generate

def read_prompt(model, meta, tokenizer):
    """ --start -> idx (1, T), -1 where segments are to be written, how many tokens follow, more options of generate """
    if 'segments' not in meta:
        ids = torch.from_numpy(tokenizer.encode(start))
        return ids[None], max_new_tokens, {}
    check(start, "this model answers questions: give one with --start=")
    told = prepare.Layout(meta, getattr(model, 'id_list', None)).prompt([tokenizer.encode(start)])
    new = told.pop('max_new_tokens')
    told = {name: torch.from_numpy(ids) for name, ids in told.items()}
    return told.pop('idx'), new, told | {'stop': tokenizer.end_id}

def watch(generate, idx, new, told):
    """
    What stands after every network call, [(ids of all columns, -1 where hidden; calls so far), ...]: first idx (1, T)
    and `new` hidden tokens, at last the whole text. told: options of generate.
    """
    length = idx.size(1) + new
    frames = [(idx[0].tolist() + [-1] * new, 0)]
    def note(step, out, probs, state):
        ids = out[0].tolist()
        frames.append((ids + [-1] * (length - len(ids)), state['nfe']))
    out = generate(idx, new, on_step=note, **told)
    return [*frames, (out[0].tolist(), frames[-1][1])]

def moments(frames):
    """
    Five of the frames, in order: the first, those nearest to 25, 50 and 75 % of the new tokens written, the last ->
    [(ids, calls, share written), ...]
    """
    hidden = [i for i, token in enumerate(frames[0][0]) if token == -1]
    written = [sum(ids[i] != -1 for i in hidden) for ids, _ in frames]
    found = [0]
    for quarter in 1, 2, 3: # never back: tokens may be hidden again
        found.append(min(range(found[-1], len(frames)), key=lambda n: abs(4 * written[n] - quarter * len(hidden))))
    return [(*frames[n], written[n] / len(hidden)) for n in (*found, len(frames) - 1)]

def characters(tokenizer, ids):
    """ [(first, end), ...]: the fewest tokens of a text that make whole characters, for tokens of half a character """
    found, first = [], 0
    for end in range(1, len(ids) + 1):
        half = tokenizer.decode(ids[first:end]).endswith('\ufffd')
        if not half or end - first == 4 or end == len(ids): # UTF-8 has at most 4 bytes
            found.append((first, end))
            first = end
    return found

def signs(text):
    """ a text of which every character can be seen """
    return ''.join(SIGNS.get(c, c if c.isprintable() else '·') for c in text) or SIGNS['']

def width(text):
    return sum(1 + (unicodedata.east_asian_width(c) in 'WF') for c in text)

def wrapped(widths, breaks, columns=COLUMNS):
    """
    Where the parts of a text stand, [(line, column), ...]. widths: of each; breaks: may a line end after it? If there
    is no such place in the last third of a line, the line ends anywhere.
    """
    places, line, column = [], 0, 0
    for i, wide in enumerate(widths):
        if column and column + wide > columns:
            fit = [j for j in range(i, 0, -1) if places[j - 1][0] == line and breaks[j - 1]]
            first = fit[0] if fit and (fit[0] == i or places[fit[0]][1] > columns * 2 / 3) else i
            line, column = line + 1, 0
            for j in range(first, i): # the begun word moves along
                places[j] = line, column
                column += widths[j]
        places.append((line, column))
        column += wide
    return places

def strip_parts(tokenizer, found):
    """
    found: moments of one text -> (places of its parts, their widths, rows). A row is (calls, share, [(text or None
    where hidden, is it new since the last moment?), ...]). A part is a token, or several that make a character; it
    stands at the same place in all rows.
    """
    last = found[-1][0]
    parts = characters(tokenizer, last)
    before, rows = found[0][0], []
    for ids, calls, share in found:
        row = []
        for part in (slice(*part) for part in parts):
            hidden = -1 in ids[part]
            row.append((None if hidden else signs(tokenizer.decode(ids[part])), ids[part] != before[part]))
        rows.append((calls, share, row))
        before = ids
    widths = [min(COLUMNS, max(width(row[i][0] or '') for _, _, row in rows)) for i in range(len(parts))]
    texts = [text for text, _ in rows[-1][2]] + [' ']
    breaks = [text[-1] in ' ↵∎→' or after[0] == ' ' for text, after in zip(texts, texts[1:])]
    return wrapped(widths, breaks), widths, rows

def draw_strip(title, places, widths, rows, axes):
    """ five texts below each other, with their calls. axes become as large as they need; their units are pixels """
    from matplotlib.patches import Rectangle
    wide, tall, gap, side = 18, 38, 32, 36 # a character, a line, between texts, margins
    left, top, lines = 180, 100, max(2, places[-1][0] + 1) # where text begins; a caption has two lines
    columns = max(56, *(column + n for (_, column), n in zip(places, widths))) # 56: room for the title
    across, down = left + columns * wide + side, top + len(rows) * (lines * tall + gap) + 24 + side
    figure = axes.figure
    figure.set_layout_engine('none')
    figure.set_size_inches(across / DPI, down / DPI)
    figure.set_facecolor('white')
    axes.set_position((0, 0, 1, 1))
    axes.set(xlim=(0, across), ylim=(down, 0))
    axes.axis('off')
    size = wide / 0.602 * 72 / DPI # points: a monospaced character is 0.602 times as wide
    def write(x, y, text, color, share=1.0, **more):
        axes.text(x, y, text, color=color, size=share * size, va='center_baseline', parse_math=False, **more)
    def block(x, y, n, color):
        axes.add_patch(Rectangle((x + 1, y + 1), n * wide - 2, tall - 2, color=color, linewidth=0))
    write(side, 48, title, INK, min(1, 1.17 * columns / len(title))) # no wider than the text
    for i, (calls, share, row) in enumerate(rows):
        y = top + i * (lines * tall + gap)
        write(side, y + tall / 2, f'{100 * share:.0f} %', INK, weight='bold')
        write(side, y + tall * 1.5, f"{calls} call{'s' * (calls != 1)}", GREY, 0.8)
        for (line, column), n, (text, new) in zip(places, widths, row):
            x, above = left + column * wide, y + line * tall
            if text is None or new:
                block(x, above, n, PALE if text is None else PURPLE)
            for c in text or '':
                ink = 'white' if new else GREY if c in SIGNS.values() else INK
                write(x + width(c) * wide / 2, above + tall / 2, c, ink, family='monospace', ha='center')
                x += width(c) * wide
    for x, words, color in (left, 'hidden', PALE), (left + 150, 'written since the row above', PURPLE):
        block(x, down - side - tall * 3 / 4, 1, color)
        write(x + 28, down - side - tall / 4, words, GREY, 0.8)

def plot_strip(run, axes):
    """ run: (label, folder, options of generate). The text of a run while it is written """
    label, folder, options = run
    where, _, _ = pick_device(device)
    model, state = load(folder, where)
    check_options(label, model, state['objective'], options, OURS)
    if 'temperature' in inspect.signature(model.generate).parameters:
        options = {'temperature': 0.8} | options # as sample.py has it
    tokenizer = prepare.Tokenizer(state['meta'])
    idx, new, told = read_prompt(model, state['meta'], tokenizer)
    torch.manual_seed(seed)
    told = {name: v.to(where) if torch.is_tensor(v) else v for name, v in told.items()}
    frames = watch(model.generate, idx.to(where), new, told | options)
    shown = [i for i, token in enumerate(frames[0][0]) if token != state['meta']['pad_id']]
    frames = [([ids[i] for i in shown], calls) for ids, calls in frames]
    name = ', '.join([state['objective'], *label.split(',')[1:]])
    written = frames[0][0].count(-1)
    title = f"{name}: {written} tokens in {frames[-1][1]} network calls"
    draw_strip(title, *strip_parts(tokenizer, moments(frames)), axes)

PICTURES = {'mask': plot_mask, 'scheduling_matrix': plot_scheduling_matrix, 'strip': plot_strip}

def read_settings(argv):
    """ config files and --key=value -> (DFConfig, {'objective': ..., 'horizon': ..., 'output': ...}) """
    train, names = train_settings(), [f.name for f in fields(DFConfig)]
    annotations = train['__annotations__'] | DFConfig.__annotations__
    train |= {name: getattr(DFConfig, name) for name in DFConfig.__annotations__} | {'__annotations__': annotations}
    own = dict(objective=objective, dataset=dataset, skip=skip, horizon=horizon, output=output)
    # a config may say whatever train.py knows, a command line what the picture depends on
    files = [os.path.expanduser(a) for a in argv if not a.startswith('-')]
    found = configure(train | own, files, own=('objective', own_settings))
    defaults = {k: v for k, v in found.items() if k in names or k in own}
    about = dict(__file__=__file__, __doc__=__doc__, __annotations__=annotations)
    config = configure(about | defaults, [a for a in argv if a.startswith('-')])
    check(config['objective'] in OBJECTIVES,
          f"objective is {config['objective']!r}, expected one of {', '.join(OBJECTIVES)}")
    segments = config['segments'] or config['dataset'] and segments_of(config['dataset'])
    if segments and config['skip']:
        segments = prepare.segments_text(prepare.without(prepare.read_segments(segments), config['skip']))
    config['segments'] = segments or None
    config['attention'] = config['attention'] or OBJECTIVES[config['objective']].usual_attention(segments)
    config['diffusion_block_size'] = OBJECTIVES[config['objective']].block_size_for(config['diffusion_block_size'])
    config['block_size'] = config['block_size'] or sum(segment_lengths(config['segments']))
    check(config['block_size'] >= 1, f"block_size is {config['block_size']}, expected at least 1, or 0 and segments")
    return DFConfig(**{k: v for k, v in config.items() if k in names}), {k: config[k] for k in own}

def read_run(argv):
    """
    a run's folder and --key=value -> ((its label, folder, options of generate), {'start': ..., 'seed': ..., ...}). What
    is no setting of a strip but an option of generate may also follow the folder: 'out-mdlm,steps=32'.
    """
    own = dict(start=start, max_new_tokens=max_new_tokens, seed=seed, device=device, output=output)
    option = lambda arg: arg[2:].partition('=')[0] in OPTIONS.keys() - own.keys()
    flags, options = [a for a in argv if a.startswith('-') and not option(a)], [a[2:] for a in argv if option(a)]
    own = configure(dict(__file__=__file__, __doc__=__doc__) | own, flags)
    runs = contenders([','.join([a, *options]) for a in argv if not a.startswith('-')])
    check(len(runs) == 1, f"a strip shows one run, got {len(runs)}: python -m tools.plot strip out-shakespeare-mdlm")
    check_sizes(own, max_new_tokens=1)
    check(own['max_new_tokens'] <= MOST_TOKENS,
          f"max_new_tokens is {own['max_new_tokens']}, expected at most {MOST_TOKENS:,}: nobody could read more")
    return runs[0], own

def draw(name, config):
    """ write the picture; returns its path """
    try:
        from matplotlib.figure import Figure # not pyplot: no display, no window
    except ImportError:
        fail("a picture needs matplotlib: pip install matplotlib")
    figure = Figure(figsize=(6, 7), layout='constrained')
    path, kinds = os.path.expanduser(output or f'{name}.png'), figure.canvas.get_supported_filetypes()
    path += '' if os.path.splitext(path)[1] or os.path.isdir(path) else '.png'
    ending = os.path.splitext(path)[1][1:].lower()
    check_output(path)
    check(ending in kinds, f"output is {output}, expected a name that ends in .{', .'.join(sorted(kinds))}")
    PICTURES[name](config, figure.subplots())
    with prepare.replacing(path) as (temporary,):
        figure.savefig(temporary, dpi=DPI, format=ending)
        if (name, ending) == ('strip', 'png'): # of few colours, and so a third of the size
            from PIL import Image # matplotlib needs it too
            Image.open(temporary).convert('RGB').quantize(64, dither=Image.Dither.NONE).save(temporary, ending)
    return path

def main():
    print_anything()
    names = [a for a in sys.argv[1:2] if not a.startswith('-')]
    if names and names[0] not in PICTURES:
        fail(f"there is no picture {names[0]!r}, expected one of {', '.join(PICTURES)}")
    with sentences():
        read = read_run if names == ['strip'] else read_settings
        config, own = read(sys.argv[1 + len(names):])
        if not names:
            fail(f"name a picture: python -m tools.plot {' | '.join(PICTURES)}")
        globals().update(own)
        print(draw(names[0], config))

if __name__ == '__main__':
    as_command(main)
