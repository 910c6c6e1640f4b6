"""`python -m bptt_study` is `bptt-study`."""

from bptt_study.app import main

main()
