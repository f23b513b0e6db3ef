"""Layouts and numbers of the interfaces hostel speaks. No I/O here."""
