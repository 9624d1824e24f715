"""Which job goes where, and when: fit, order, reservations, explanations."""
