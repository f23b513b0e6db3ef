"""The version, readable without importing anything: ``hostel --version`` is measured."""

VERSION = "0.1.0"
