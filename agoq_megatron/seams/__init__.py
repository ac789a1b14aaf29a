"""Where this project meets what is not its own: Megatron, torch and NCCL, other ranks, and whoever
types the flags."""
