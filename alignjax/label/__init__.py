"""Collects demonstrations and rankings from people: a server of pages for labelers, its database,
what goes into it and what comes out of it."""
