"""`python -m zonebundle.agent.hold_server`: the hold server, with the index that tells its workers what is stored."""

from zonebundle.capture import server
from zonebundle.store.index_hint import IndexHint

if __name__ == "__main__":
    server.main(IndexHint)
