# The demo's speech, from the toy grammar: 15 hours of stories, 2,000 preference pairs, three suites of 500 minimal pairs. About 90 s on 2 cores.
out = 'out/demo/audio'
task = 'stories,pairs,grammar,sstory,tstory'
text = 'toy'
n_stories = 9000
n_pairs = 2000
n_suite = 500
# four variants of one accent whose formants differ little: MFCC units tell voices apart, and then a small model learns everything four times
voices = 'gmw/en,gmw/en+m3,gmw/en+m4,gmw/en+m6'
speed = '1.0-1.15'
pitch = '40-60'
