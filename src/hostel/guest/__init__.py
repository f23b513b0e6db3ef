"""The agent that runs inside, its protocol, and the host's side of it."""
