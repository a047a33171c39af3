"""verl on a machine without a GPU: a platform, an FSDP engine, a rollout engine and a fast start."""
