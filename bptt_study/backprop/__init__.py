"""The forward pass, the backward recursion over time, and the parameter gradient."""

# The axis of JAX's mesh over which a batch is split; see `training.devices.split_batch`.
BATCH_AXIS = "bptt_study_batch"
