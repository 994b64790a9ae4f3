"""The TEA head: configuration, members, policy, drop-in layer, saved form."""
