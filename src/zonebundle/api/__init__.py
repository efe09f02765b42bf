"""The HTTP interface of the agent: routes, downloads, the socket."""
