# The demo's three suites for its three models, on a CPU:  python eval_slm.py config/demo_eval.py
init = 'untrained:out/demo/slm,out/demo/slm,out/demo/dpo'
data_dir = 'out/demo/audio'
# agreement broken; an ending that contradicts the story; an ending of another topic. Each once more
# in voices that nothing was trained on, where there is a folder of its name and _unseen
tasks = 'grammar,sstory,tstory'
out = 'out/demo/eval.json'
html = 'out/demo/report.html'
