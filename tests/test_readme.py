"""README's commands for your own language, on synthetic German speech: as they are written, but for
the encoder (no download here) and sizes."""

import os
import re
import shlex

from conftest import ROOT, run_checked

SENTENCES = """Der Hund schläft im Garten. Die Katze sitzt auf dem Dach. Wir gehen heute ins Kino.
Morgen kommt meine Schwester. Das Wetter ist schön. Ich trinke gerne Kaffee. Er liest ein Buch.
Die Kinder spielen am Fluss. Das Brot ist frisch. Sie singt ein altes Lied.""".split('. ')

# what README says -> what is small enough for a test
SMALLER = {
    '--encoder=mhubert25': '--encoder=mfcc',
    '--fit_kmeans=500': '--fit_kmeans=20',
    '--prompt=a.wav': '--prompt=my_speech/stories',
    '--num_samples=4': '--num_samples=2',
}
MORE = {
    'prepare_units.py': ['--val_fraction=0.2', '--workers=1'],
    'train.py': [
        *('--init=scratch', '--n_layer=1', '--n_embd=32', '--n_head=2', '--n_kv_head=1'),
        *('--n_ffn=64', '--batch_tokens=2048', '--max_steps=3', '--warmup_steps=1'),
    ],
    'sample.py': ['--split=', '--max_prompts=2', '--max_new_tokens=10'],
}


def readme_commands(section):
    """The python commands of a section's code blocks, comments left out, as lists of words."""
    with open(os.path.join(ROOT, 'README.md'), encoding='utf-8') as file:
        text = file.read().split(f'## {section}\n')[1].split('\n## ')[0]
    blocks = re.findall(r'```\n(.*?)```', text, re.S)
    lines = [line for block in blocks for line in block.splitlines()]
    return [shlex.split(line, comments=True)[1:] for line in lines if line.startswith('python ')]


def run(folder, command):
    script, *flags = command
    flags = [SMALLER.get(flag, flag) for flag in flags] + MORE.get(script, [])
    return run_checked(script, *flags, '--device=cpu', folder=folder).stdout


def test_your_own_language(tmp_path):
    (tmp_path / 'config').symlink_to(os.path.join(ROOT, 'config'))
    texts = [f'{a}. {b}.' for a in SENTENCES for b in SENTENCES[:3]]
    (tmp_path / 'german.txt').write_text('\n\n'.join(texts), encoding='utf-8')
    (tmp_path / 'articles.csv').write_text('right,wrong\nDer Hund ist da.,Die Hund ist da.\n')
    speak = ['make_synthetic.py', '--text=german.txt', '--voices=de', '--out=my_speech']
    run(tmp_path, speak)

    commands = readme_commands('Your own language')
    scripts = [command[0] for command in commands]
    assert scripts[0] == 'prepare_units.py' and {'train.py', 'sample.py'} < set(scripts)
    for command in commands:
        printed = run(tmp_path, command)
        if '--resynth' in command:
            assert 'frames_unchanged' in printed
    assert (tmp_path / 'out' / 'mine' / 'model.safetensors').exists()
    assert (tmp_path / 'out' / 'eval.json').exists()
    assert (tmp_path / 'page.html').stat().st_size > 10_000
