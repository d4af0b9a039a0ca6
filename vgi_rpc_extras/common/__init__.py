# Needs: nothing (pyarrow for names and coding, httpx for fetch). No seam: what the extras share.
"""What several extras share. It imports no extra, so extras import downward only (tests/extras/test_house_extras.py).

http ---> auth, storage, otel, sentry
            |      |      |      |
tools       |      |      |      |      access_log
  |         v      v      v      v          |
  +-------->        common       <----------+
                      |
                   the core

names, coding    headers and paths of the HTTP transport; content codings
texts, urls      base64url and printable texts; which URLs may be called, and how they are shown
html             what a page for people is: its frame, a notice, a place for a key
net, fetch       connecting within one budget of time; bounded requests to servers that are not ours
"""
