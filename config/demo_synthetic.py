"""The demo's speech, in the toy language: 13 hours of stories, 1,400 preference pairs, three suites
of 500 minimal pairs, and 200 pairs of each suite again, in voices that are used only there."""

out = 'out/demo/audio'
task = 'stories,pairs,grammar,sstory,tstory'
text = 'toy'
n_stories = 8000
n_pairs = 1400  # 80 steps of 16, and 64 held out
n_suite = 500
n_unseen = 200
# four variants of one accent whose formants differ little, because MFCC units tell voices apart:
# with voices max and Mario, and units without slopes, a 3-gram model gave a story 10 % more nats
voices = 'gmw/en,gmw/en+m3,gmw/en+m4,gmw/en+m6'
test_voices = 'gmw/en+m1,gmw/en+m7'
# Whisper tiny gets 23 % of the words wrong at a speed of 1.0, and 40 % at 1.15
speed = '1.0-1.1'
pitch = '40-60'
pause = 0.1
