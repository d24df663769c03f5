# The demo's speech, from the toy grammar: 15 hours of stories, 2,000 preference pairs, three suites of 500 minimal pairs. About 100 s on 2 cores.
out = 'out/demo/audio'
task = 'stories,pairs,grammar,sstory,tstory'
text = 'toy'
n_stories = 7000
n_pairs = 2000
n_suite = 500
# four variants of one accent; units of MFCC tell voices apart, so the closer they are the fewer stories a small model needs
voices = 'gmw/en+m1,gmw/en+m3,gmw/en+m7,gmw/en+f2'
speed = '1.0-1.15'
pitch = '40-60'
