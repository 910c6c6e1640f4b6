"""The order in which a gradient is computed: each file is one way.

| schedule | when to use it | states held |
|---|---|---|
| `store_all` | the default where gradients may pass all links | all T |
| `recompute` | exact, where memory is short: some states are computed again | those asked for |
| `windowed` | TBPTT(k1, k2): each block of losses goes back a fixed number of steps | one segment |
| `per_segment` | random cuts in a long sequence: each sequence goes from cut to cut | one segment |
| `tails` | chunks that start from a prediction of what lies beyond them | one chunk |

Each has the signature `(call, state, …) -> Sums`; `tails` also returns what was learned. `revolve` is the order
of recomputation.
"""
