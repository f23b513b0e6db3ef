"""Bits of the engine's ``hflags``: what translated code depends on, and what blocks are known by."""

HF_CPL, HF_INHIBIT, HF_CS32, HF_SS32, HF_ADDSEG, HF_PE = 3, 8, 0x10, 0x20, 0x40, 0x80
HF_TS_SHIFT, HF_LMA, HF_CS64, HF_OSFXSR, HF_SMAP = 9, 1 << 14, 1 << 15, 1 << 22, 1 << 23
TIGHT, TIGHT_CS = 0x1F << 27, 1 << 31
"""Ours: the engine keeps and does not use them (see ``segments.py``)."""
