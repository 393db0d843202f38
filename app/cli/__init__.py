"""The command line, gpuctl: the platform from a terminal. Needs requests and click; docs/client.md.

Exit codes:

0    done
1    the job failed, or somebody else cancelled it
2    the command is not what it should be
3    the API cannot be reached, or answers 5xx
4    it refused: no key, a wrong one, no such thing, bad input, too much for now
5    not done in time
130  interrupted; the job that was waited for is cancelled
"""
