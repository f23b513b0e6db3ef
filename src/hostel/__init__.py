"""Machines from Python: a virtual machine monitor on ``/dev/kvm``, and machines as everyday things."""
