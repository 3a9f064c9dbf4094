"""The shipped checks as tests of the run.

shipped    their modules, their ids, and which of them take no part
collect    the node that brings them in;   workers  which of xdist's workers runs what
selectors  ids on the command line;   xfails  known failures
"""
