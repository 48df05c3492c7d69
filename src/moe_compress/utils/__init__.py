"""What every part needs and none should invent; nothing here knows about models."""
