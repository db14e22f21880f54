"""Train position specialists for a target: the script form of `hf-poss train`.

On one device, from the target's own answers (`hf-poss regenerate`) or any chats, texts, or prompts with completions:

    python examples/train_poss.py \
        --target meta-llama/Meta-Llama-3-8B-Instruct --dtype bfloat16 \
        --dataset chats.jsonl --eval_share 0.02 \
        --positions_per_specialist 2 --num_draft_positions 6 \
        --output_dir PosS2-Llama3-8B --bf16 --learning_rate 1e-3 --num_train_epochs 2 \
        --per_device_train_batch_size 2 --gradient_accumulation_steps 8 --packing \
        --eval_strategy steps --eval_steps 500 --save_steps 500 --save_total_limit 2

The same on all devices of a machine; each process loads the target on its own:

    accelerate launch --num_processes 4 examples/train_poss.py ...

With a configuration, for FSDP, DeepSpeed or several machines:

    accelerate launch --config_file examples/accelerate_configs/fsdp2.yaml examples/train_poss.py ...

As in the paper, from a published EAGLE layer and with its losses and rates, which are the defaults:

    accelerate launch --num_processes 4 examples/train_poss.py \
        --target meta-llama/Meta-Llama-3-8B-Instruct --init_from_eagle yuhuili/EAGLE-LLaMA3-Instruct-8B \
        --dataset sharegpt.jsonl --output_dir PosS2-Llama3-8B --bf16 --per_device_train_batch_size 2

The same command again goes on from the last whole checkpoint. `--preview 3` shows what would be learnt from three
samples, `--push_to_hub` publishes the result with its model card, `--help` lists everything.
"""

import sys

from hf_poss.cli.train import main


if __name__ == "__main__":
    sys.exit(main())
