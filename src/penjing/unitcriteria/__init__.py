"""Criteria that look at a unit as a whole: a channel, a hidden unit, a head."""
