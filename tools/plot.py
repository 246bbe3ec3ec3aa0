"""
Pictures from settings or a config alone; no checkpoint, no training.
$ python -m tools.plot scheduling_matrix config/df_published.py
$ python -m tools.plot scheduling_matrix --df_scheduling_matrix=trapezoid --df_uncertainty_scale=2 --horizon=12 --output=trapezoid.png
"""
import sys
from dataclasses import fields

from configurator import configure, fail, run_config
from model import GPTConfig, scheduling_matrix

# what can be set: every field of GPTConfig (`--help` lists them), and
horizon = 16 # scheduling_matrix: tokens in the chunk
output = '' # file to write, its ending decides the format; '': the picture's name.png

def plot_scheduling_matrix(config, axes):
    """ rows: network calls, downwards; columns: tokens of a chunk; dark is noise """
    matrix = scheduling_matrix(config.df_scheduling_matrix, horizon, config.df_sampling_timesteps, config.df_uncertainty_scale)
    image = axes.imshow(matrix.numpy(), cmap='Purples', aspect='auto', interpolation='nearest')
    axes.figure.colorbar(image, label='noise level (index)')
    axes.set(title=f"{config.df_scheduling_matrix}, uncertainty scale {config.df_uncertainty_scale:g}: {len(matrix) - 1} network calls for {horizon} tokens",
             xlabel='token of the chunk', ylabel='network calls made')

PICTURES = {'scheduling_matrix': plot_scheduling_matrix}

def read_settings(argv):
    """ config files (what they set for the model) and --key=value -> (GPTConfig, {'horizon': ..., 'output': ...}) """
    defaults = {f.name: f.default for f in fields(GPTConfig)}
    own = dict(__file__=__file__, __doc__=__doc__, horizon=horizon, output=output)
    for path in (a for a in argv if not a.startswith('-')):
        defaults |= {k: v for k, v in run_config(path, defaults).items() if k in defaults}
    config = configure(own | defaults, [a for a in argv if a.startswith('-')])
    return GPTConfig(**{k: config[k] for k in defaults}), {k: config[k] for k in ('horizon', 'output')}

def main():
    names = [a for a in sys.argv[1:2] if not a.startswith('-')]
    if names and names[0] not in PICTURES:
        fail(f"there is no picture {names[0]!r}, expected one of {', '.join(PICTURES)}")
    try:
        config, own = read_settings(sys.argv[1 + len(names):])
        if not names:
            fail(f"name a picture: python -m tools.plot {' | '.join(PICTURES)}")
        globals().update(own)
        try:
            from matplotlib.figure import Figure # not pyplot: no display, no window
        except ImportError:
            fail("a picture needs matplotlib: pip install matplotlib")
        figure = Figure(figsize=(6, 7), layout='constrained')
        PICTURES[names[0]](config, figure.subplots())
        path = output or f'{names[0]}.png'
        figure.savefig(path, dpi=150)
        print(path)
    except (AssertionError, ValueError, OSError) as e:
        fail(str(e))

if __name__ == '__main__':
    main()
