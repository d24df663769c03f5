"""TWIST-350M by its own recipe with sTinyStories added to the data."""

exec(open('config/twist_350m.py').read())
out_dir = 'out/twist_350m_stinystories'
data = 'librilight,librispeech,stinystories'
