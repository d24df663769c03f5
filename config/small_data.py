"""A language or corpus of your own, 1 to 100 hours of speech.

    python train.py config/small_data.py --data=data/mine                   needs a GPU and the hub
    python train.py config/small_data.py --data=data/mine --init=scratch    neither; 2.6 M weights

Set _hours to what prepare_units.py reports. With little speech a model overfits after few passes:
watch the validation loss, and lower _epochs if it rises.
"""

_hours = 10
_epochs = 10
_units_a_second = 19  # after de-duplication, at 25 Hz; see tokens_per_second in your meta.json

out_dir = 'out/mine'
data = 'data/mine'
val_data = ''  # the val split of data
init = 'HuggingFaceTB/SmolLM2-135M'  # from 100 h on, use Qwen/Qwen2.5-0.5B
n_layer = 6  # these five apply only to --init=scratch
n_embd = 192
n_head = 6
n_kv_head = 2
n_ffn = 576
context = 512
row_tokens = 2_048
batch_tokens = 2_048 * max(1, round(_hours / 5))  # 1 h: 33 steps an epoch; 100 h: 167
max_steps = round(_epochs * _hours * 3600 * _units_a_second / batch_tokens)
train_hours = 24.0
dropout = 0.1
lr = 1e-3
min_lr = 1e-4
warmup_fraction = 0.05
warmup_steps = 20
eval_interval = max(20, max_steps // 10)
save_interval = eval_interval
