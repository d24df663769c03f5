# The demo's units: MFCC and k-means fitted on the training stories, 25 frames a second, and a
# voice for them. No download.
audio = 'out/demo/audio/stories,out/demo/audio/pairs'
out = 'out/demo/units'
encoder = 'mfcc'
fit_kmeans = 500
fit_frames = 100_000
fit_vocoder = True
