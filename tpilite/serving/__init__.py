"""What people and programs talk to: OpenAI's API and the page, over HTTP.

Begin with `server.py`, then `routes.py` (which path does what) and `service.py` (the queue before the
engine). The connections are those of `net`.
May import: `engine` and what it stands on.
Must never know: sockets between ranks, slices, how ranks were found.
"""
