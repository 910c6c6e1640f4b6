"""Credit carried forward in time: the recursion M_t = J_t M_{t-1} + I_t, and one file per way of storing M."""
