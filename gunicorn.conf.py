"""How `gunicorn 'gpu_admin:create_app()'` serves, in this folder; any other app is served as gunicorn would by itself.

What stands on its command line wins over this.
"""

import sys

if any(argument.startswith("gpu_admin:") for argument in sys.argv):
    from gpu_admin import serve

    bind = serve.address()
    worker_class = "gthread"
    # A stop holds one for as long as it takes. Several processes would do too: they agree by files.
    threads = 32
    # Of a worker's main thread, which no request can hold up.
    timeout = 60
    # A stop takes at most half a minute; what is being started goes on in the next process.
    graceful_timeout = 40
    # It has one path for all servers of a user; signals do what it does.
    control_socket_disable = True
    on_starting = serve.on_starting
    worker_exit = serve.worker_exit
