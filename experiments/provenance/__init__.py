"""The origin of a result: digests of source, split and configuration, the commit and the versions.

`sources` keeps the source that this process started with; `definitions` digests the functions and classes in it that a
result depends on; `fingerprint` makes the tags of runs from that.
"""
