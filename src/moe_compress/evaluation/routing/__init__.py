"""Routing fidelity: how far routers choose otherwise than the original's."""
