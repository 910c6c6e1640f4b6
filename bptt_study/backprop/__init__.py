"""The forward pass, the backward recursion over time, and the parameter gradient."""

# The axes of JAX's meshes over which a batch is split, see `training.devices.split_batch`, and a run's seeds. A
# user's code may have axes `batch` and `seeds` of its own
BATCH_AXIS = "bptt_study_batch"
SEED_AXIS = "bptt_study_seeds"
