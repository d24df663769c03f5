# Listen to the demo's model: three held-out stories, continued from their first 3 s.
#     python sample.py config/demo_sample.py
init = 'out/demo/dpo'
prompt = 'out/demo/audio/stories'
max_prompts = 3
max_new_tokens = 150
out = 'out/demo/sample'
html = 'out/demo/sample/page.html'
