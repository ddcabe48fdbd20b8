"""The stages of the paper, one file each: pretrain, sft, rm, ppo_ptx. stage.py says what a stage
is."""
