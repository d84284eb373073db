"""
Many clients against real servers under faults; what each saw is recorded and judged afterwards.

    make soak                                  a minute on one server for each alias
    python -m tests.soak --layout haproxy --seconds 3600 --seed 7

``history`` is the format of the record, ``judge`` judges it and knows nothing of the package,
``site`` is the Django project, which ``served`` passes to a web server, ``rig`` runs it with its
databases and cache, ``faults`` disturbs those, ``clients`` are its users.
"""
