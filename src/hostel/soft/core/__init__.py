"""The cores: what runs non-root code, by translation or by intercept (``soft/silicon.py``)."""
