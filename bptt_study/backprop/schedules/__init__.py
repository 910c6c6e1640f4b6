"""The schedules: orders in which a gradient is computed, one file each.

| schedule | when to use it | states held |
|---|---|---|
| `store_all` | the default if gradients may pass all links | all T |
| `recompute` | exact, if memory is short: some states are computed again | as many as are asked for |
| `windowed` | TBPTT(k1, k2): each block of losses goes back a fixed number of steps | one segment |
| `per_segment` | random cuts in a long sequence: each sequence goes from cut to cut | one segment |
| `tails` | chunks that start from a prediction of the adjoint that lies beyond them | one chunk |

Each has the signature `(call, state, …) -> Sums`; `tails` also returns its learned state. `revolve` finds the
order of recomputation.
"""
