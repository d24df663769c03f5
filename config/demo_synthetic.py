# The demo's speech, from the toy grammar: 15 hours of stories, 2,000 preference pairs, three suites of 500 minimal pairs. About 80 s on 2 cores.
out = 'out/demo/audio'
task = 'stories,pairs,grammar,sstory,tstory'
text = 'toy'
n_stories = 7400
n_pairs = 2080  # of which auto-BLEU drops a few
n_suite = 500
voices = 'gmw/en+m3,gmw/en+m7,gmw/en+Annie,gmw/en+steph'  # four variants of one accent, of the fastest that espeak has
speed = '1.0-1.15'
pitch = '40-60'
