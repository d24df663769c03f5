# The demo's speech, in the toy language: 15 hours of stories, 2,000 preference pairs, three suites
# of 500 minimal pairs, and 200 of each in voices that nothing else has. About 90 s on two cores.
out = 'out/demo/audio'
task = 'stories,pairs,grammar,sstory,tstory'
text = 'toy'
n_stories = 9000
n_pairs = 2000
n_suite = 500
n_unseen = 200
# four variants of one accent whose formants differ little: MFCC units tell voices apart, and then
# a small model learns everything four times
voices = 'gmw/en,gmw/en+m3,gmw/en+m4,gmw/en+m6'
test_voices = 'gmw/en+m1,gmw/en+m7'
speed = '1.0-1.15'
pitch = '40-60'
