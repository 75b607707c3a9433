"""What users do to a Context: each verb takes it first and returns it first.

Sequences come and go (`lifecycle`), a step is prepared, computed and committed
(`stepping`, `metadata`, `attention`, `recurrent`), and a context is moved, saved,
checked, scrubbed and spread over devices. Nothing here knows requests or models.
"""
