"""TWIST-350M by its own recipe with sTinyStories added to the data."""

with open('config/twist_350m.py', encoding='utf-8') as _file:
    exec(_file.read())
out_dir = 'out/twist_350m_stinystories'
data = 'librilight,librispeech,stinystories'
