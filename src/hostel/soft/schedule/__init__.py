"""The scheduler: vCPUs of several machines on a few pCPUs, in virtual time.

::

    Runnable (a vCPU)          what it must be able to do: runnable.py
       │ add: weight, priority, affinity
    Scheduler                  who goes where next, and until when: scheduler.py
       │ run(pcpu, budget)       with rules for choosing: queue.py
    PhysicalCpu                its TSC is its clock

One thread runs it all; the pCPU whose next slice begins first goes next. So a run is the same every time,
however many pCPUs there are.
"""
