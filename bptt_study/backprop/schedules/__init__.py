"""The order in which a gradient is computed: each file is one way, with the same result to rounding.

| schedule | when to use it | states held |
|---|---|---|
| `store_all` | the default where gradients may pass all links | all T |
| `recompute` | exact, where memory is short: some states are computed again | those asked for |
| `windowed` | TBPTT(k1, k2): each block of losses goes back a fixed number of steps | one segment |
| `per_segment` | random cuts in a long sequence: each sequence goes from cut to cut | one segment |

Each has the signature `(call, state, …) -> Sums`. `revolve` is the order of recomputation.
"""
