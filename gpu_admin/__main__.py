"""`python -m gpu_admin`: the same as `gunicorn 'gpu_admin:create_app()'` in the project's folder, from any other."""

import sys

from gunicorn.app.wsgiapp import run

from gpu_admin.settings import ROOT

if __name__ == "__main__":
    sys.argv[1:1] = ["--config", str(ROOT / "gunicorn.conf.py"), "gpu_admin:create_app()"]
    run()
