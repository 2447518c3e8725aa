"""The service: QMP for any number of clients, in front of one QEMU, with commands of ours beside.

channel   a connected socket on the event loop: bytes and descriptors, both ways, bounded
relay     who said what, whose turn it is, who gets the answer; no I/O
jobs      our jobs, as `query-jobs` tells of them; no I/O
work      the thread in which operations run, so that nobody waits for their files
own       our commands: an operation begun, its job looked after
translating  what a client asks for as operations take it, and back
serving   all of it put together: listen, connect, go over when QEMU is replaced
"""
