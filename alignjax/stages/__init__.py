"""The stages of the paper, one file each: pretrain, sft, rm, ppo_ptx. Each reads top to bottom as numbered phases."""
