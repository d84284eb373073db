"""
The figures that the README gives, each measured beside what it is compared with, in one run:

    python -m benchmarks             all of them
    python -m benchmarks decisions   one: decisions, memory, clients, faults, latency
"""
