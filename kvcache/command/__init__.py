"""The command line: what `python -m kvcache` does, plans and prints.

It may use everything else of the library, and nothing else imports it.
"""
