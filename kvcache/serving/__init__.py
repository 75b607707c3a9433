"""The loop: requests, who is scheduled, what is sampled, and all of it in one program.

`scheduler` decides, `serve` runs the decode loop, `sampling` picks tokens,
`speculation`, `draft_model` and `search` are other ways to get them, and `generation`
is the host's convenience. Nothing here knows a particular model.
"""
