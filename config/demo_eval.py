# The demo's three suites for its three models, on a CPU:  python eval_slm.py config/demo_eval.py
init = 'untrained:out/demo/slm,out/demo/slm,out/demo/dpo'
data_dir = 'out/demo/audio'
# wrong sides: broken agreement; an ending that contradicts the story; an ending of another topic.
# A suite is also scored in voices that were not used in training, if a folder NAME_unseen exists
tasks = 'grammar,sstory,tstory'
out = 'out/demo/eval.json'
html = 'out/demo/report.html'
