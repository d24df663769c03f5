"""The demo's speech, in the toy language: 15 hours of stories, 2,000 preference pairs, three suites
of 500 minimal pairs, and 200 of each in voices that nothing else has. About 90 s on two cores."""

out = 'out/demo/audio'
task = 'stories,pairs,grammar,sstory,tstory'
text = 'toy'
n_stories = 9000
n_pairs = 2000
n_suite = 500
n_unseen = 200
# six variants of one accent, two of them with narrow formants as m7 has: 76 % of m7's pairs of
# neighbouring units then occur in the training stories (k = 500), without these two 65 %
voices = 'gmw/en,gmw/en+m3,gmw/en+m4,gmw/en+m6'
test_voices = 'gmw/en+m1,gmw/en+m7'
# Whisper tiny gets 23 % of the words wrong at a speed of 1.0, and 40 % at 1.15
speed = '1.0-1.1'
pitch = '40-60'
pause = 0.1  # as much speech as with 0.2 at 1.07
